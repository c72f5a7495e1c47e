//! Questions in the name of who asks.
//!
//! The person who answers an elicitation must know which server that is (MCP 2025-11-25, elicitation, security
//! considerations). To the client there is one server, the gateway; so the upstream's name goes into the message.
//!
//! ```
//! use portcullis::protocol::{Method, Params, sign_question};
//!
//! let params = Params::parse(r#"{"message":"Which folder?"}"#.into())?;
//! let signed = sign_question(&"files".parse().unwrap(), &Method::Elicit, params);
//! assert_eq!(signed.as_str(), r#"{"message":"[files] Which folder?"}"#);
//! # Ok::<_, serde_json::Error>(())
//! ```

use bytes::Bytes;
use serde_json::Value;

use super::{Method, Params, Payload, RawObject, ResultType, ServerName};

/// A question on its way to a client, in the name of who asks.
pub fn sign_question(upstream: &ServerName, method: &Method, mut params: Params) -> Params {
    if *method == Method::Elicit {
        let message = params.get_string("message").unwrap_or_default();
        let signed = Value::from(format!("[{upstream}] {message}")).to_string();
        params.object_mut().set("message", signed);
    }
    params
}

/// A modern upstream's result, its questions in its name.
pub fn sign_result(upstream: &ServerName, payload: Payload) -> Payload {
    match (ResultType::of(&payload), &payload) {
        (ResultType::InputRequired, Payload::Raw(json)) => match sign_questions(upstream, json.clone()) {
            Some(signed) => Payload::Raw(signed),
            None => payload,
        },
        _ => payload,
    }
}

fn sign_questions(upstream: &ServerName, result: Bytes) -> Option<Bytes> {
    let mut result = RawObject::parse(result).ok()?;
    let mut questions = result.get_object("inputRequests")?;
    let read: Vec<(String, RawObject)> = questions
        .iter()
        .filter_map(|(key, question)| {
            Some((key.to_owned(), RawObject::parse(question.to_owned().into()).ok()?))
        })
        .collect();
    for (key, mut question) in read {
        let method = Method::from(&*question.get_string("method")?);
        if let Some(params) = question.get_bytes("params").and_then(|params| Params::parse(params).ok()) {
            question.set("params", sign_question(upstream, &method, params).as_str());
            questions.set(&key, question.as_str());
        }
    }
    result.set("inputRequests", questions.as_str());
    Some(result.into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_asks_a_person_is_named() {
        let result = r#"{"x":1e400,"resultType":"input_required","inputRequests":{"a":{"method":"elicitation/create","params":{"message":"Which?"}},"b":{"method":"roots/list"}}}"#;
        let Payload::Raw(signed) = sign_result(&"files".parse().unwrap(), Payload::Raw(result.into())) else {
            panic!()
        };
        assert_eq!(&signed[..], result.replace("Which?", "[files] Which?").as_bytes());
    }
}
