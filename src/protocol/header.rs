//! Header values that mirror the body (MCP 2026-07-28, streamable HTTP, request metadata).

use std::{borrow::Cow, sync::Arc};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};
use serde_json::Value;

use super::RawObject;

const OPEN: &str = "=?base64?";
const CLOSE: &str = "?=";

/// A value as it stands in a header: as it is when it is plain, else in the Base64 sentinel.
///
/// ```
/// use portcullis::protocol::{decode_header, encode_header};
///
/// assert_eq!(encode_header("us-west1"), "us-west1");
/// assert_eq!(encode_header("日本"), "=?base64?5pel5pys?=");
/// assert_eq!(decode_header("=?base64?5pel5pys?=").as_deref(), Some("日本"));
/// ```
pub fn encode_header(value: &str) -> Cow<'_, str> {
    let plain = value.bytes().all(|b| (0x20..=0x7e).contains(&b));
    let padded = value.starts_with(' ') || value.ends_with(' ');
    let sentinel = value.starts_with(OPEN) && value.ends_with(CLOSE);
    match plain && !padded && !sentinel {
        true => Cow::Borrowed(value),
        false => Cow::Owned(format!("{OPEN}{}{CLOSE}", STANDARD.encode(value))),
    }
}

/// The value a header stands for. `None` when the sentinel holds no Base64 of UTF-8.
pub fn decode_header(header: &str) -> Option<Cow<'_, str>> {
    match header.strip_prefix(OPEN).and_then(|rest| rest.strip_suffix(CLOSE)) {
        None => Some(Cow::Borrowed(header)),
        Some(encoded) => String::from_utf8(STANDARD.decode(encoded).ok()?).ok().map(Cow::Owned),
    }
}

/// The headers of a modern HTTP request, which mirror its body. A door leaves them in the request's extensions, where
/// the router holds them against the arguments and the upstream client finds the ones to pass on.
#[derive(Clone, Debug)]
pub struct MirroredHeaders(pub Arc<HeaderMap>);

impl MirroredHeaders {
    /// `Mcp-Param-*` headers, which an intermediary passes on even when it knows no annotation for them (MCP
    /// 2026-07-28, streamable HTTP, server behavior for custom headers).
    pub fn params(&self) -> impl Iterator<Item = (&HeaderName, &HeaderValue)> {
        self.0.iter().filter(|(name, _)| name.as_str().starts_with("mcp-param-"))
    }
}

/// One `x-mcp-header` annotation of a tool: which argument is mirrored in which header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamHeader {
    /// `mcp-param-<name>`.
    pub header: HeaderName,
    /// The property path from the arguments' root.
    pub path: Arc<[String]>,
}

/// The `x-mcp-header` annotations of one tool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ParamHeaders(Arc<[ParamHeader]>);

impl ParamHeaders {
    /// Reads a tool's definition. An invalid annotation is an error: the specification wants such a tool dropped
    /// from the list by whoever talks HTTP to its server.
    pub fn of_definition(tool: &Bytes) -> Result<Self, String> {
        // Nearly no tool has one; nothing is parsed to learn that.
        if memchr::memmem::find(tool, b"x-mcp-header").is_none() {
            return Ok(Self::default());
        }
        let Ok(tool) = RawObject::parse(tool.clone()) else { return Ok(Self::default()) };
        let Some(Ok(schema)) = tool.get_as::<Value>("inputSchema") else { return Ok(Self::default()) };
        let mut found = Vec::new();
        collect(&schema, &mut Vec::new(), &mut found)?;
        if count(&schema) != found.len() {
            return Err("`x-mcp-header` stands where no chain of `properties` leads".to_owned());
        }
        Ok(Self(found.into()))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The annotations.
    pub fn iter(&self) -> impl Iterator<Item = &ParamHeader> {
        self.0.iter()
    }

    /// Each header with the value it must have for these arguments; `None` when it must be absent.
    pub fn expected<'a>(
        &'a self,
        arguments: &'a RawObject,
    ) -> impl Iterator<Item = (&'a HeaderName, Option<String>)> {
        self.0.iter().map(move |p| (&p.header, p.value(arguments)))
    }
}

impl ParamHeader {
    fn value(&self, arguments: &RawObject) -> Option<String> {
        let (last, way) = self.path.split_last()?;
        let mut at = arguments.clone();
        for key in way {
            at = at.get_object(key)?;
        }
        match at.get(last)? {
            text if text.starts_with('"') => at.get_string(last).map(Into::into),
            "null" => None,
            json if json.starts_with(['{', '[']) => None,
            // Numbers and booleans are written in a header as they are in JSON.
            json => Some(json.to_owned()),
        }
    }
}

fn collect(schema: &Value, path: &mut Vec<String>, found: &mut Vec<ParamHeader>) -> Result<(), String> {
    let Some(properties) = schema.get("properties").and_then(Value::as_object) else { return Ok(()) };
    for (name, property) in properties {
        path.push(name.clone());
        if let Some(annotation) = property.get("x-mcp-header") {
            found.push(annotated(annotation, property, path, found)?);
        }
        collect(property, path, found)?;
        path.pop();
    }
    Ok(())
}

fn annotated(
    annotation: &Value,
    property: &Value,
    path: &[String],
    found: &[ParamHeader],
) -> Result<ParamHeader, String> {
    let at = path.join(".");
    let name = annotation.as_str().filter(|n| !n.is_empty());
    let name = name.ok_or_else(|| format!("`x-mcp-header` of {at} is no header name"))?;
    let header = HeaderName::try_from(format!("mcp-param-{name}"))
        .map_err(|_| format!("`x-mcp-header` of {at} is no header name"))?;
    if !matches!(property.get("type").and_then(Value::as_str), Some("string" | "integer" | "boolean")) {
        return Err(format!("`x-mcp-header` of {at} needs type string, integer or boolean"));
    }
    if found.iter().any(|p| p.header == header) {
        return Err(format!("`x-mcp-header` of {at} is used twice"));
    }
    Ok(ParamHeader { header, path: path.into() })
}

/// How many annotations stand anywhere in the schema. A *property* named `x-mcp-header` is not one.
fn count(schema: &Value) -> usize {
    match schema {
        Value::Object(members) => members
            .iter()
            .map(|(key, value)| match (key.as_str(), value) {
                ("properties", Value::Object(properties)) => properties.values().map(count).sum(),
                ("x-mcp-header", _) => 1,
                ("enum" | "const" | "default" | "examples", _) => 0,
                _ => count(value),
            })
            .sum(),
        Value::Array(values) => values.iter().map(count).sum(),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn headers(schema: Value) -> Result<ParamHeaders, String> {
        let tool = json!({ "name": "t", "inputSchema": schema });
        ParamHeaders::of_definition(&tool.to_string().into())
    }

    #[test]
    fn finds_nested_annotations_and_their_values() {
        let found = headers(json!({ "properties": {
            "region": { "type": "string", "x-mcp-header": "Region" },
            "o": { "type": "object", "properties": { "n": { "type": "integer", "x-mcp-header": "N" } } },
        }}))
        .unwrap();
        let arguments = json!({ "region": "eu", "o": { "n": 42 } });
        let arguments = RawObject::parse(arguments.to_string().into()).unwrap();
        let mut values: Vec<_> = found.expected(&arguments).map(|(h, v)| (h.to_string(), v)).collect();
        values.sort();
        assert_eq!(
            values,
            [
                ("mcp-param-n".to_owned(), Some("42".to_owned())),
                ("mcp-param-region".to_owned(), Some("eu".to_owned()))
            ]
        );
    }

    #[test]
    fn refuses_what_the_specification_refuses() {
        let text = |v: &str| json!({ "type": "string", "x-mcp-header": v });
        for schema in [
            json!({ "properties": { "a": text("") } }),
            json!({ "properties": { "a": text("a b") } }),
            json!({ "properties": { "a": text("X"), "b": text("x") } }),
            json!({ "properties": { "a": { "type": "number", "x-mcp-header": "A" } } }),
            json!({ "properties": { "a": { "type": "array", "items": text("A") } } }),
            json!({ "anyOf": [{ "properties": { "a": text("A") } }] }),
        ] {
            assert!(headers(schema.clone()).is_err(), "{schema}");
        }
        assert!(headers(json!({ "properties": { "x-mcp-header": { "type": "string" } } })).is_ok());
    }

    proptest! {
        #[test]
        fn any_value_survives_a_header(value in ".{0,30}") {
            let header = encode_header(&value);
            prop_assert!(http::HeaderValue::from_str(&header).is_ok());
            let decoded = decode_header(&header);
            prop_assert_eq!(decoded.as_deref(), Some(value.as_str()));
        }
    }
}
