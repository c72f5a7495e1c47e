//! What kind of result it is.

use memchr::memmem;

use super::{Payload, RawObject};

/// What a result's `resultType` says (MCP 2026-07-28, basic, results).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResultType {
    /// There is none: a legacy upstream's result.
    Absent,
    /// The result is the end of it.
    Complete,
    /// The upstream wants answers, and then the call again.
    InputRequired,
    /// Something an extension defines, or no result.
    Other,
}

impl ResultType {
    /// Reads it. Where serializers put it, at either end, nothing is scanned; a result that has the word somewhere else is
    /// looked at properly.
    pub fn of(payload: &Payload) -> ResultType {
        let json = match payload {
            Payload::Raw(json) => json,
            Payload::Value(value) => {
                return ResultType::named(value.get("resultType").and_then(|t| t.as_str()));
            }
            Payload::Items(_) | Payload::Error(_) | Payload::Stream(_) => return ResultType::Other,
        };
        if begins_complete(json) || ends_complete(json) {
            return ResultType::Complete;
        }
        if memmem::find(json, b"\"resultType\"").is_none() {
            return ResultType::Absent;
        }
        match RawObject::parse(json.clone()) {
            Ok(result) => ResultType::named(result.get_string("resultType").as_deref()),
            Err(_) => ResultType::Other,
        }
    }

    fn named(name: Option<&str>) -> ResultType {
        match name {
            None => ResultType::Absent,
            Some("complete") => ResultType::Complete,
            Some("input_required") => ResultType::InputRequired,
            Some(_) => ResultType::Other,
        }
    }
}

const COMPLETE: &[u8] = br#""resultType":"complete""#;

fn begins_complete(json: &[u8]) -> bool {
    json.strip_prefix(b"{").is_some_and(|rest| rest.starts_with(COMPLETE))
}

/// An unescaped quote cannot stand within a string, so these bytes before the last brace are its object's member.
fn ends_complete(json: &[u8]) -> bool {
    json.strip_suffix(b"}").is_some_and(|rest| rest.ends_with(COMPLETE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_found_wherever_it_stands_and_nowhere_else() {
        let of = |json: &'static str| ResultType::of(&Payload::Raw(json.as_bytes().into()));
        assert_eq!(of(r#"{"resultType":"complete","a":1}"#), ResultType::Complete);
        assert_eq!(of(r#"{"a":1,"resultType":"complete"}"#), ResultType::Complete);
        assert_eq!(of(r#"{"a":1, "resultType": "complete", "b":2}"#), ResultType::Complete);
        assert_eq!(of(r#"{"a":1,"resultType":"input_required"}"#), ResultType::InputRequired);
        assert_eq!(of(r#"{"resultType":"task"}"#), ResultType::Other);
        assert_eq!(of(r#"{"structuredContent":{"resultType":"input_required"}}"#), ResultType::Absent);
    }
}
