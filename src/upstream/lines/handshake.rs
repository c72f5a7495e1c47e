//! Finding out which era the other side speaks (MCP 2026-07-28, basic/transports/stdio, backward compatibility).
//!
//! `server/discover` goes first. Whoever answers it like a modern server is one. Anything else, silence included, is
//! a legacy server and gets `initialize`. Some legacy servers cannot bear the question: they are started once more
//! and not asked.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::time::timeout;

use super::{
    calls::{Kind, Ticket},
    owner::Owner,
    wire::Wire,
};
use crate::{
    error::{Fault, UpstreamError},
    protocol::{Era, McpRequest, Method, Params, Payload, ProtocolVersion, RawObject, code},
    upstream::translate,
};

/// Long enough for an interpreter to start.
const PROBE: Duration = Duration::from_secs(3);
/// For `initialize` after a probe that was not understood. Beyond it the server is taken to be stuck on the probe. Not
/// too soon: it may as well be a package that is just being downloaded.
const AFTER_PROBE: Duration = Duration::from_secs(17);

/// What the handshake found.
pub(crate) enum Opened {
    Modern,
    Legacy {
        /// The answer to `server/discover`, made of the `initialize` result.
        discover: Bytes,
        capabilities: RawObject,
    },
}

impl Opened {
    pub(crate) fn era(&self) -> Era {
        match self {
            Opened::Modern => Era::Modern,
            Opened::Legacy { .. } => Era::Legacy,
        }
    }
}

/// Why there is no connection.
pub(crate) struct Unopened {
    pub(crate) error: UpstreamError,
    /// Whether a fresh start without the probe may help.
    pub(crate) probed: bool,
}

/// Opens as the `known` era wants it, or finds out. A legacy peer is told who `owner` is, and may ask them.
pub(crate) async fn open(wire: &Wire, known: Option<Era>, owner: &Arc<Owner>) -> Result<Opened, Unopened> {
    match known {
        Some(era) => open_known(wire, era, owner).await.map_err(|error| Unopened { error, probed: false }),
        None => probe(wire, owner).await,
    }
}

async fn open_known(wire: &Wire, era: Era, owner: &Arc<Owner>) -> Result<Opened, UpstreamError> {
    if era == Era::Legacy {
        return initialize(wire, owner).await;
    }
    let answer = ask(wire, Method::Discover, discover_params()).await?.answer().await?;
    match verdict(&answer) {
        Verdict::Modern => Ok(Opened::Modern),
        Verdict::Legacy | Verdict::NoCommonVersion(_) => {
            Err(fail(wire, Fault::Garbled, "it does not answer server/discover as it did before"))
        }
    }
}

async fn probe(wire: &Wire, owner: &Arc<Owner>) -> Result<Opened, Unopened> {
    let again = |error| Unopened { error, probed: true };
    let mut probe = ask(wire, Method::Discover, discover_params()).await.map_err(again)?;
    match timeout(PROBE, probe.answer()).await {
        Ok(Ok(answer)) => match verdict(&answer) {
            Verdict::Modern => return Ok(Opened::Modern),
            Verdict::Legacy => {}
            Verdict::NoCommonVersion(theirs) => {
                let error = fail(wire, Fault::Misconfigured, format!("it speaks only {theirs}"));
                return Err(Unopened { error, probed: false });
            }
        },
        Ok(Err(error)) => return Err(again(error)),
        Err(_) => {}
    }
    let error = match timeout(AFTER_PROBE, initialize(wire, owner)).await {
        Ok(Ok(opened)) => {
            // It may still answer the question one day.
            probe.forget();
            return Ok(opened);
        }
        Ok(Err(error)) => error,
        Err(_) => fail(wire, Fault::Unreachable, "it does not answer initialize"),
    };
    match probe.answer_now().map(|late| verdict(&late)) {
        Some(Verdict::Modern) => Ok(Opened::Modern),
        _ => Err(again(error)),
    }
}

async fn initialize(wire: &Wire, owner: &Arc<Owner>) -> Result<Opened, UpstreamError> {
    let params = Params::from_value(&translate::initialize_params(owner.client()));
    let result = match ask(wire, Method::Initialize, params).await?.answer().await? {
        Payload::Raw(result) => result,
        Payload::Error(error) => {
            return Err(fail(wire, Fault::Garbled, format!("initialize failed: {error}")));
        }
        _ => return Err(fail(wire, Fault::Garbled, "initialize was not answered with a result")),
    };
    let result = RawObject::parse(result)
        .map_err(|e| fail(wire, Fault::Garbled, format!("its initialize result is not an object: {e}")))?;
    wire.calls().belong_to(owner.clone());
    wire.calls().notify(crate::protocol::notification_json(&Method::Initialized, &Params::default())).await?;
    Ok(Opened::Legacy {
        discover: translate::discover_result(&result),
        capabilities: result.get_object("capabilities").unwrap_or_else(RawObject::empty),
    })
}

async fn ask(wire: &Wire, method: Method, params: Params) -> Result<Ticket, UpstreamError> {
    let ticket = wire.calls().register(None, Kind::Internal)?;
    ticket.send(&method, &params).await;
    Ok(ticket)
}

fn discover_params() -> Params {
    translate::modern_params(&McpRequest::bare(Method::Discover), ProtocolVersion::LATEST)
}

enum Verdict {
    Modern,
    Legacy,
    /// Modern, and there is no version that both of us speak. What it speaks.
    NoCommonVersion(String),
}

fn verdict(answer: &Payload) -> Verdict {
    let versions = match answer {
        Payload::Error(error) => {
            let data = RawObject::parse(error.as_bytes().clone()).ok().and_then(|e| e.get_object("data"));
            match (error.code(), data) {
                (code::HEADER_MISMATCH | code::MISSING_CAPABILITY, Some(_)) => return Verdict::Modern,
                (code::UNSUPPORTED_VERSION, Some(data)) => data.get_as("supported"),
                _ => return Verdict::Legacy,
            }
        }
        answer => answer.to_object().and_then(|result| result.get_as("supportedVersions")),
    };
    let Some(Ok(versions)) = versions else { return Verdict::Legacy };
    let versions: Vec<String> = versions;
    let known = || versions.iter().filter_map(|v| v.parse::<ProtocolVersion>().ok());
    if known().any(|version| version.era() == Era::Modern) {
        return Verdict::Modern;
    }
    match known().next() {
        Some(_) => Verdict::Legacy,
        None => Verdict::NoCommonVersion(versions.join(", ")),
    }
}

fn fail(wire: &Wire, fault: Fault, reason: impl Into<String>) -> UpstreamError {
    UpstreamError::new(wire.calls().upstream(), fault, reason.into())
}
