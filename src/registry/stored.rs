//! Records as bytes: JSON in an envelope that says which format it has.
//!
//! An envelope is read in two steps, the format first, so that what a newer release wrote is recognised as such
//! instead of being misread.

use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::record::{CatalogRecord, ServerRecord};

/// A server's record, with its place among the others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct StoredServer {
    #[serde(flatten)]
    pub(super) top: Placed,
    /// What was added by hand under the name that the config file took. It comes back when the file lets go.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) beneath: Option<Placed>,
}

/// A record, and where it stands among those of its origin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Placed {
    pub(super) ordinal: u64,
    pub(super) server: Arc<ServerRecord>,
}

/// A small text.
#[derive(Serialize, Deserialize)]
pub(super) struct StoredSetting {
    pub(super) value: String,
}

/// A catalog.
#[derive(Serialize, Deserialize)]
pub(super) struct StoredCatalog<C = CatalogRecord> {
    pub(super) catalog: C,
}

pub(super) fn encode(record: &impl Serialize) -> Result<Bytes, serde_json::Error> {
    #[derive(Serialize)]
    struct Envelope<'a, T> {
        format: u32,
        record: &'a T,
    }
    serde_json::to_vec(&Envelope { format: FORMAT, record }).map(Bytes::from)
}

/// The record, or what is wrong with it.
pub(super) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    #[derive(Deserialize)]
    struct Format {
        format: u32,
    }
    #[derive(Deserialize)]
    struct Envelope<T> {
        record: T,
    }
    let text = std::str::from_utf8(bytes).map_err(|_| "it is not UTF-8".to_owned())?;
    let said = |error: serde_json::Error| format!("it is not what it should be ({error})");
    let Format { format } = serde_json::from_str(text).map_err(said)?;
    if format != FORMAT {
        return Err(format!("it has format {format}, and this release reads format {FORMAT}"));
    }
    let Envelope { record } = serde_json::from_str(text).map_err(said)?;
    Ok(record)
}

/// Grows when an older release would misread a record.
const FORMAT: u32 = 1;

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::Duration};

    use super::*;
    use crate::{
        registry::{Origin, Rules},
        upstream::{Isolation, Transport, UpstreamSpec},
    };

    fn record(transport: Transport) -> ServerRecord {
        ServerRecord {
            name: "files".parse().unwrap(),
            spec: UpstreamSpec {
                timeout: Duration::from_millis(1500),
                concurrency: 7,
                isolation: Isolation::Session,
                transport,
            },
            enabled: false,
            rules: Rules { allow: Some(vec![]), deny: vec!["x*".to_owned()] },
            origin: Origin::File,
        }
    }

    fn pairs() -> BTreeMap<String, String> {
        BTreeMap::from([("K".to_owned(), "${V}".to_owned())])
    }

    #[test]
    fn every_kind_of_server_comes_back_as_it_was() {
        let url = "http://x/mcp".to_owned();
        let transports = [
            Transport::Http { url: url.clone(), headers: pairs() },
            Transport::Sse { url, headers: pairs() },
            Transport::Stdio {
                command: "sh".to_owned(),
                args: vec!["-c".to_owned(), String::new()],
                env: pairs(),
                cwd: Some("/tmp".into()),
            },
            Transport::Builtin { kind: "clock".to_owned() },
        ];
        for transport in transports {
            let top = Placed { ordinal: u64::MAX, server: Arc::new(record(transport)) };
            for beneath in [None, Some(top.clone())] {
                let stored = StoredServer { top: top.clone(), beneath };
                assert_eq!(decode::<StoredServer>(&encode(&stored).unwrap()), Ok(stored));
            }
        }
    }

    /// What is in people's registries: this text must stay readable for as long as the format is 1.
    #[test]
    fn format_1_stays_readable() {
        let text = r#"{"format":1,"record":{"ordinal":3,"server":{"name":"files","transport":"stdio",
            "command":"sh","args":[],"env":{},"cwd":null,"timeout":60000,"concurrency":256,"enabled":true,
            "rules":{"deny":["rm*"]},"origin":"cli"}}}"#;
        let stored: StoredServer = decode(text.as_bytes()).unwrap();
        assert_eq!(stored.top.ordinal, 3);
        let again = String::from_utf8(encode(&stored).unwrap().to_vec()).unwrap();
        assert_eq!(again, text.split_whitespace().collect::<String>());
    }

    #[test]
    fn says_what_is_wrong() {
        let why = |bytes: &[u8]| decode::<StoredSetting>(bytes).err().unwrap();
        assert_eq!(why(br#"{"format":2,"record":[]}"#), "it has format 2, and this release reads format 1");
        assert_eq!(why(b"\xff"), "it is not UTF-8");
        assert_eq!(why(b"{}"), "it is not what it should be (missing field `format` at line 1 column 2)");
    }

    #[test]
    fn definitions_are_kept_byte_for_byte() {
        let raw = r#"{"b":1e400,"a":18446744073709551616,  "x":[ ]}"#;
        let mut catalog = CatalogRecord::default();
        catalog.tools.push(serde_json::value::RawValue::from_string(raw.to_owned()).unwrap());
        let bytes = encode(&StoredCatalog { catalog: &catalog }).unwrap();
        let StoredCatalog::<CatalogRecord> { catalog } = decode(&bytes).unwrap();
        assert_eq!(catalog.tools[0].get(), raw);
    }
}
