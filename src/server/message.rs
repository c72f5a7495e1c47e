//! A payload as the message this client understands: its id around it, and the marks of its era.

use std::collections::VecDeque;

use bytes::{BufMut as _, Bytes, BytesMut};
use serde_json::json;

use crate::protocol::{
    Era, Method, Notification, Params, Payload, RawObject, RequestId, ResultType, RpcError, code,
};

/// A message in pieces: what nobody opened is never copied just to put braces around it.
#[derive(Clone, Debug, Default)]
pub(in crate::server) struct Chunks(pub(in crate::server) Vec<Bytes>);

impl Chunks {
    /// How many bytes it has.
    pub(in crate::server) fn len(&self) -> usize {
        self.0.iter().map(Bytes::len).sum()
    }

    /// All on one line. JSON may stand on several; between tokens a line break is as good as a space, and within
    /// strings JSON has none.
    pub(in crate::server) fn flatten(&mut self) {
        for chunk in &mut self.0 {
            if memchr::memchr2(b'\n', b'\r', chunk).is_some() {
                let mut flat = BytesMut::from(&chunk[..]);
                flat.iter_mut().filter(|b| matches!(**b, b'\n' | b'\r')).for_each(|b| *b = b' ');
                *chunk = flat.freeze();
            }
        }
    }

    /// Small ones as one piece.
    pub(in crate::server) fn joined(self) -> VecDeque<Bytes> {
        match self.len() < JOIN_BELOW {
            true => VecDeque::from([join(&self.0)]),
            false => self.0.into(),
        }
    }
}

/// Below this, one copy is cheaper than one more write.
const JOIN_BELOW: usize = 16 * 1024;

pub(in crate::server) fn join(chunks: &[Bytes]) -> Bytes {
    let mut joined = BytesMut::with_capacity(chunks.iter().map(Bytes::len).sum());
    chunks.iter().for_each(|chunk| joined.put_slice(chunk));
    joined.freeze()
}

/// The answer to `method` under `id`. A stream has no such form.
pub(in crate::server) fn response(id: &RequestId, method: &Method, payload: Payload, era: Era) -> Chunks {
    let mark = ResultType::of(&payload);
    marked_response(id, method, payload, mark, era)
}

/// The same for a payload whose mark is known: telling it is the only thing that reads a large result.
pub(in crate::server) fn marked_response(
    id: &RequestId,
    method: &Method,
    payload: Payload,
    mark: ResultType,
    era: Era,
) -> Chunks {
    let mut chunks = vec![prefix(id, b"result")];
    match payload {
        Payload::Items(list) => {
            let (open, close) = list.frame_json(era == Era::Modern);
            chunks.extend([open, list.items_json().clone(), close]);
        }
        Payload::Raw(json) => push_result(&mut chunks, json, mark, method, era),
        Payload::Value(value) => push_result(&mut chunks, value.to_string().into(), mark, method, era),
        Payload::Error(error) => {
            chunks = vec![prefix(id, b"error"), translate_error(error, method, era).as_bytes().clone()]
        }
        Payload::Stream(_) => {
            let error = RpcError::new(code::INTERNAL_ERROR, "internal error");
            chunks = vec![prefix(id, b"error"), error.as_bytes().clone()];
        }
    }
    chunks.push(Bytes::from_static(b"}"));
    Chunks(chunks)
}

/// An error about a message whose id may be unknown.
pub(in crate::server) fn error(id: Option<&RequestId>, error: &RpcError) -> Chunks {
    let null = Bytes::from_static(b"null");
    let id = id.map_or(&null, RequestId::as_bytes);
    let head = [b"{\"jsonrpc\":\"2.0\",\"id\":", id.as_ref(), b",\"error\":"].concat();
    Chunks(vec![head.into(), error.as_bytes().clone(), Bytes::from_static(b"}")])
}

/// A notification as a message.
pub(in crate::server) fn notification(notification: &Notification) -> Chunks {
    request_like(None, &notification.method, &notification.params)
}

/// A question to the client as a message.
pub(in crate::server) fn request(id: &RequestId, method: &Method, params: &Params) -> Chunks {
    request_like(Some(id), method, params)
}

fn request_like(id: Option<&RequestId>, method: &Method, params: &Params) -> Chunks {
    use crate::protocol::{notification_json, request_json};
    Chunks(vec![match id {
        Some(id) => request_json(id, method, params),
        None => notification_json(method, params),
    }])
}

fn prefix(id: &RequestId, member: &[u8]) -> Bytes {
    [b"{\"jsonrpc\":\"2.0\",\"id\":", id.as_bytes().as_ref(), b",\"", member, b"\":"].concat().into()
}

/// A result with or without the marks of the modern era: `resultType`, and for some methods cache hints.
fn push_result(chunks: &mut Vec<Bytes>, json: Bytes, mark: ResultType, method: &Method, era: Era) {
    match (era, mark) {
        (Era::Modern, ResultType::Absent) => push_modern(chunks, json, method),
        (Era::Modern, _) | (Era::Legacy, ResultType::Absent) => chunks.push(json),
        (Era::Legacy, _) => chunks.push(legacy_result(json, method)),
    }
}

/// A legacy upstream's result has no marks; they are put in front.
fn push_modern(chunks: &mut Vec<Bytes>, json: Bytes, method: &Method) {
    let hinted = method.is_cacheable()
        && RawObject::parse(json.clone()).ok().is_none_or(|result| result.get("ttlMs").is_none());
    let rest = json.trim_ascii_start().strip_prefix(b"{").map(|rest| json.slice_ref(rest));
    let Some(rest) = rest else { return chunks.push(json) };
    chunks.push(Bytes::from_static(match hinted {
        true => br#"{"resultType":"complete","ttlMs":0,"cacheScope":"private""#,
        false => br#"{"resultType":"complete""#,
    }));
    if rest.trim_ascii_start().first() != Some(&b'}') {
        chunks.push(Bytes::from_static(b","));
    }
    chunks.push(rest);
}

/// Strict legacy clients refuse the marks of the modern era. A result without the first of them is a legacy
/// upstream's, and then the others are no marks.
fn legacy_result(json: Bytes, method: &Method) -> Bytes {
    if !method.is_cacheable() {
        // The usual case: one mark at one end, and the rest stays where it is.
        if let Some(rest) = json.strip_prefix(br#"{"resultType":"complete","#) {
            let mut out = BytesMut::with_capacity(rest.len() + 1);
            out.put_u8(b'{');
            out.put_slice(rest);
            return out.freeze();
        }
        if let Some(rest) = json.strip_suffix(br#","resultType":"complete"}"#) {
            let mut out = BytesMut::with_capacity(rest.len() + 1);
            out.put_slice(rest);
            out.put_u8(b'}');
            return out.freeze();
        }
    }
    let Ok(mut result) = RawObject::parse(json.clone()) else { return json };
    for mark in ["resultType", "ttlMs", "cacheScope"] {
        result.remove(mark);
    }
    result.into_bytes()
}

/// "No such resource" has a code of its own in the legacy era only.
fn translate_error(error: RpcError, method: &Method, era: Era) -> RpcError {
    if *method != Method::ResourcesRead {
        return error;
    }
    let data = RawObject::parse(error.as_bytes().clone()).ok().and_then(|e| e.get_object("data"));
    let uri = data.and_then(|data| Some(data.get_string("uri")?.into_owned()));
    let to = match (era, error.code(), &uri) {
        (Era::Modern, code::LEGACY_RESOURCE_NOT_FOUND, _) => code::INVALID_PARAMS,
        (Era::Legacy, code::INVALID_PARAMS, Some(_)) => code::LEGACY_RESOURCE_NOT_FOUND,
        _ => return error,
    };
    let translated = RpcError::new(to, error.message());
    match uri {
        Some(uri) => translated.with_data(&json!({ "uri": uri })),
        None => translated,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(payload: Payload, method: Method, era: Era) -> String {
        let chunks = response(&RequestId::from(1), &method, payload, era);
        String::from_utf8(join(&chunks.0).to_vec()).unwrap()
    }

    fn raw(json: &'static str) -> Payload {
        Payload::Raw(Bytes::from_static(json.as_bytes()))
    }

    #[test]
    fn a_modern_client_gets_the_marks_once() {
        let call = |json| text(raw(json), Method::ToolsCall, Era::Modern);
        assert_eq!(call("{}"), r#"{"jsonrpc":"2.0","id":1,"result":{"resultType":"complete"}}"#);
        assert_eq!(
            call(r#"{"a":1e400}"#),
            r#"{"jsonrpc":"2.0","id":1,"result":{"resultType":"complete","a":1e400}}"#
        );
        let marked = r#"{"content":[],"resultType":"input_required"}"#;
        assert_eq!(call(marked), format!(r#"{{"jsonrpc":"2.0","id":1,"result":{marked}}}"#));
        let nested = r#"{"structuredContent":{"resultType":"x"}}"#;
        assert!(call(nested).contains(r#""result":{"resultType":"complete","structuredContent""#));
    }

    #[test]
    fn a_read_gets_cache_hints_unless_it_has_some() {
        let read = |json| text(raw(json), Method::ResourcesRead, Era::Modern);
        assert!(read(r#"{"contents":[]}"#).contains(r#""ttlMs":0,"cacheScope":"private","contents""#));
        assert_eq!(read(r#"{"contents":[],"ttlMs":5}"#).matches("ttlMs").count(), 1);
    }

    #[test]
    fn a_legacy_client_gets_none_of_them() {
        let read = |json| text(raw(json), Method::ResourcesRead, Era::Legacy);
        let bare = r#"{"jsonrpc":"2.0","id":1,"result":{"contents":[]}}"#;
        assert_eq!(read(r#"{"resultType":"complete","contents":[]}"#), bare);
        assert_eq!(read(r#"{"contents":[],"ttlMs":0,"cacheScope":"public","resultType":"complete"}"#), bare);
        assert_eq!(read(r#"{"contents":[]}"#), bare);
    }

    #[test]
    fn no_such_resource_has_the_code_of_the_era() {
        let error = |code| Payload::Error(RpcError::new(code, "no").with_data(&json!({ "uri": "a:b" })));
        assert!(text(error(-32602), Method::ResourcesRead, Era::Legacy).contains("-32002"));
        assert!(text(error(-32002), Method::ResourcesRead, Era::Modern).contains("-32602"));
        assert!(text(error(-32602), Method::ToolsCall, Era::Legacy).contains("-32602"));
    }
}
