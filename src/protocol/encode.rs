//! Messages as they are written: the envelope around params that keep their bytes.

use bytes::Bytes;
use serde_json::json;

use super::{Method, Params, RequestId};

/// A whole request as it is written to the wire: no line breaks but those within `params`.
pub fn request_json(id: &RequestId, method: &Method, params: &Params) -> Bytes {
    message(Some(id), method, params)
}

/// A whole notification as it is written to the wire.
pub fn notification_json(method: &Method, params: &Params) -> Bytes {
    message(None, method, params)
}

fn message(id: Option<&RequestId>, method: &Method, params: &Params) -> Bytes {
    let json = params.as_json();
    let mut out = Vec::with_capacity(json.len() + 96);
    out.extend_from_slice(br#"{"jsonrpc":"2.0""#);
    if let Some(id) = id {
        out.extend_from_slice(br#","id":"#);
        out.extend_from_slice(id.as_bytes());
    }
    out.extend_from_slice(br#","method":"#);
    match method {
        // Only a foreign name can need escapes.
        Method::Other(name) => out.extend_from_slice(json!(**name).to_string().as_bytes()),
        known => {
            out.push(b'"');
            out.extend_from_slice(known.as_str().as_bytes());
            out.push(b'"');
        }
    }
    if params.is_present() {
        out.extend_from_slice(br#","params":"#);
        out.extend_from_slice(json);
    }
    out.push(b'}');
    out.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_method_names_are_escaped() {
        let json = request_json(&RequestId::from(1), &Method::from("a\"b"), &Params::default());
        assert_eq!(&json[..], br#"{"jsonrpc":"2.0","id":1,"method":"a\"b"}"#);
    }
}
