//! The JSON-RPC envelope: one scan tells request, notification and response apart.

use std::{borrow::Cow, fmt};

use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{Method, Params, Payload, RpcError, code, shape::is_object};

/// One JSON-RPC message, its params and result still raw.
#[derive(Debug)]
pub enum Message {
    /// Wants an answer.
    Request {
        /// Echoed in the answer.
        id: RequestId,
        /// What is asked.
        method: Method,
        /// With what.
        params: Params,
    },
    /// Wants none.
    Notification {
        /// What happened.
        method: Method,
        /// With what.
        params: Params,
    },
    /// Answers a request of ours.
    Response {
        /// The request's id. An error about a message that could not be read has none.
        id: Option<RequestId>,
        /// [`Payload::Raw`] or [`Payload::Error`].
        payload: Payload,
    },
}

impl Message {
    /// Reads one message. Never panics, on whatever bytes.
    pub fn parse(bytes: Bytes) -> Result<Message, ParseError> {
        let text = std::str::from_utf8(&bytes).map_err(|_| ParseError::syntax("the body is not UTF-8"))?;
        if text.trim_ascii_start().starts_with('[') {
            return Err(ParseError::invalid(
                None,
                "JSON-RPC batches are not supported: send one message a request",
            ));
        }
        let envelope: Envelope<'_> = match serde_json::from_str(text) {
            Ok(envelope) => envelope,
            Err(e) if e.is_data() => return Err(ParseError::invalid(None, e)),
            Err(e) => return Err(ParseError::syntax(e)),
        };
        envelope.classify(&bytes)
    }

    /// Reads an upstream's answer. When it opens as the common serializers write it and closes with `id`, the
    /// result is cut out, if it is one whole object; anything else goes through [`Message::parse`].
    pub fn parse_response(bytes: Bytes, id: &RequestId) -> Result<Message, ParseError> {
        match cut_result(&bytes, id) {
            Some(result) => Ok(Message::Response { id: Some(id.clone()), payload: Payload::Raw(result) }),
            None => Message::parse(bytes),
        }
    }
}

/// `{"jsonrpc":"2.0","id":7,"result":{..}}` (most servers) or `{"result":{..},"jsonrpc":"2.0","id":7}` (the
/// TypeScript SDK). What stands between must be one object and no more: the client gets it as it is, and it could say
/// anything in our envelope.
fn cut_result(bytes: &Bytes, id: &RequestId) -> Option<Bytes> {
    let body = bytes.trim_ascii();
    let id = id.as_str().as_bytes();
    let inner = if let Some(rest) = body.strip_prefix(br#"{"jsonrpc":"2.0","id":"#) {
        rest.strip_prefix(id)?.strip_prefix(br#","result":"#)?.strip_suffix(b"}")?
    } else {
        let rest = body.strip_prefix(br#"{"result":"#)?.strip_suffix(b"}")?;
        rest.strip_suffix(id)?.strip_suffix(br#","jsonrpc":"2.0","id":"#)?
    };
    is_object(inner).then(|| bytes.slice_ref(inner))
}

#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(borrow)]
    jsonrpc: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    id: Option<&'a RawValue>,
    #[serde(borrow)]
    method: Option<Text<'a>>,
    #[serde(borrow)]
    params: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    result: Option<&'a RawValue>,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
}

/// `null` is a value here: `"id": null` is not the same as no id.
fn present<'de: 'a, 'a, D: serde::Deserializer<'de>>(d: D) -> Result<Option<&'a RawValue>, D::Error> {
    <&RawValue>::deserialize(d).map(Some)
}

#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl Envelope<'_> {
    fn classify(self, bytes: &Bytes) -> Result<Message, ParseError> {
        let raw = |value: &RawValue| bytes.slice_ref(value.get().as_bytes());
        let id = match self.id {
            None => None,
            Some(id) if id.get() == "null" && self.method.is_none() => None,
            Some(id) => Some(
                RequestId::from_json(raw(id))
                    .ok_or_else(|| ParseError::invalid(None, "`id` must be a string or an integer"))?,
            ),
        };
        if self.jsonrpc.map(RawValue::get) != Some(r#""2.0""#) {
            return Err(ParseError::invalid(id, r#"`jsonrpc` must be "2.0""#));
        }
        if let Some(Text(method)) = self.method {
            let params = match self.params {
                None => Params::default(),
                Some(p) => Params::parse(raw(p)).map_err(|e| ParseError {
                    id: id.clone(),
                    code: code::INVALID_PARAMS,
                    message: format!("`params` must be an object: {e}"),
                })?,
            };
            let method = Method::from(method.as_ref());
            return Ok(match id {
                Some(id) => Message::Request { id, method, params },
                None => Message::Notification { method, params },
            });
        }
        let payload = match (self.result, self.error) {
            (Some(result), None) => Payload::Raw(raw(result)),
            (None, Some(error)) => match RpcError::parse(raw(error)) {
                Ok(error) => Payload::Error(error),
                Err(e) => return Err(ParseError::invalid(id, format!("`error` is malformed: {e}"))),
            },
            _ => return Err(ParseError::invalid(id, "neither a request, a notification nor a response")),
        };
        Ok(Message::Response { id, payload })
    }
}

/// A request's id, as the JSON it came as: an id is only ever echoed and compared.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct RequestId(Bytes);

impl RequestId {
    /// From JSON text: a string or an integer, else `None`.
    pub fn from_json(json: Bytes) -> Option<Self> {
        let ok = match json.first()? {
            b'"' => true,
            b'-' | b'0'..=b'9' => json[1..].iter().all(u8::is_ascii_digit),
            _ => false,
        };
        ok.then_some(RequestId(json))
    }

    /// The id as JSON text.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("an id is cut from valid JSON text")
    }

    /// The id as JSON bytes.
    pub fn as_bytes(&self) -> &Bytes {
        &self.0
    }
}

impl From<u64> for RequestId {
    fn from(n: u64) -> Self {
        RequestId(n.to_string().into())
    }
}

impl fmt::Debug for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why bytes are not a message, ready to be said to whoever sent them.
#[derive(Debug)]
pub struct ParseError {
    /// The id, when that much could be read.
    pub id: Option<RequestId>,
    /// [`code::PARSE_ERROR`], [`code::INVALID_REQUEST`] or [`code::INVALID_PARAMS`].
    pub code: i64,
    /// For the sender.
    pub message: String,
}

impl ParseError {
    fn syntax(what: impl fmt::Display) -> Self {
        ParseError { id: None, code: code::PARSE_ERROR, message: format!("not JSON: {what}") }
    }

    fn invalid(id: Option<RequestId>, what: impl fmt::Display) -> Self {
        ParseError { id, code: code::INVALID_REQUEST, message: format!("not a JSON-RPC message: {what}") }
    }
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ParseError {}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<Message, ParseError> {
        Message::parse(Bytes::copy_from_slice(text.as_bytes()))
    }

    #[test]
    fn tells_the_kinds_apart() {
        assert!(matches!(parse(r#"{"jsonrpc":"2.0","id":"a","method":"x"}"#), Ok(Message::Request { .. })));
        assert!(matches!(parse(r#"{"jsonrpc":"2.0","method":"x"}"#), Ok(Message::Notification { .. })));
        assert!(matches!(parse(r#"{"jsonrpc":"2.0","id":1,"result":{}}"#), Ok(Message::Response { .. })));
        assert!(matches!(
            parse(r#"{"jsonrpc":"2.0","id":null,"error":{"code":-32700,"message":"?"}}"#),
            Ok(Message::Response { id: None, payload: Payload::Error(_) })
        ));
    }

    #[test]
    fn names_what_is_wrong() {
        let code = |text| parse(text).unwrap_err().code;
        assert_eq!(code("{"), code::PARSE_ERROR);
        assert_eq!(code("\u{1}"), code::PARSE_ERROR);
        assert_eq!(code("[]"), code::INVALID_REQUEST);
        assert_eq!(code("3"), code::INVALID_REQUEST);
        assert_eq!(code(r#"{"jsonrpc":"1.0","id":1,"method":"x"}"#), code::INVALID_REQUEST);
        assert_eq!(code(r#"{"jsonrpc":"2.0","id":1.5,"method":"x"}"#), code::INVALID_REQUEST);
        assert_eq!(code(r#"{"jsonrpc":"2.0","id":null,"method":"x"}"#), code::INVALID_REQUEST);
        assert_eq!(code(r#"{"jsonrpc":"2.0","id":1,"method":3}"#), code::INVALID_REQUEST);
        assert_eq!(code(r#"{"jsonrpc":"2.0","id":1,"method":"x","method":"y"}"#), code::INVALID_REQUEST);
        assert_eq!(code(r#"{"jsonrpc":"2.0","id":1,"method":"x","params":[1]}"#), code::INVALID_PARAMS);
        assert_eq!(
            code(r#"{"jsonrpc":"2.0","id":1,"method":"x","params":{"a":1,"a":2}}"#),
            code::INVALID_PARAMS
        );
    }

    #[test]
    fn an_invalid_request_still_names_its_id() {
        let error = parse(r#"{"jsonrpc":"1.0","id":7,"method":"x"}"#).unwrap_err();
        assert_eq!(error.id.unwrap().as_str(), "7");
    }

    #[test]
    fn the_shortcut_refuses_another_id() {
        let id = RequestId::from(7);
        for body in [
            r#"{"jsonrpc":"2.0","id":8,"result":{"a":1}}"#,
            r#"{"result":{"a":1},"jsonrpc":"2.0","id":8}"#,
            r#"{"result":{"a":1},"jsonrpc":"2.0","id":17}"#,
        ] {
            let Ok(Message::Response { id: Some(got), .. }) = Message::parse_response(body.into(), &id)
            else {
                panic!("{body}")
            };
            assert_ne!(got, id);
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let bytes = Bytes::from(bytes);
            let _ = Message::parse(bytes.clone());
            let _ = Message::parse_response(bytes, &RequestId::from(1));
        }

        #[test]
        fn parsing_never_panics_near_json(text in r#"[\[\]{}",:a-z0-9\\ e.\-]{0,80}"#) {
            let _ = parse(&text);
        }

        #[test]
        fn both_ways_cut_the_same_result(value in "[ -~]{0,40}", n in any::<u64>()) {
            let result = serde_json::json!({ "v": value, "resultType": "complete" }).to_string();
            let id = RequestId::from(n);
            for body in [
                format!(r#"{{"jsonrpc":"2.0","id":{n},"result":{result}}}"#),
                format!(r#"{{"result":{result},"jsonrpc":"2.0","id":{n}}}"#),
                format!(r#"{{ "id":{n},"jsonrpc":"2.0", "result":{result} }}"#),
            ] {
                let Ok(Message::Response { payload: Payload::Raw(got), .. }) =
                    Message::parse_response(body.into(), &id) else { panic!() };
                prop_assert_eq!(&got[..], result.as_bytes());
            }
        }
    }
}
