//! `call`: one tool, called as a client would.

use std::{
    io::{self, IsTerminal as _, Write as _},
    process::ExitCode,
};

use anyhow::{Result, anyhow};
use serde_json::{Value, value::RawValue};

use super::{
    DataDir, Silent, Usage, args,
    control::{Arguments, Call, Called},
    say,
    tools::say_missing,
};
use crate::protocol::RawObject;

pub(super) async fn run(args: args::Call, dir: &DataDir) -> Result<()> {
    let arguments = arguments(args.arguments)?;
    let call = Call { tool: args.tool.clone(), arguments, wait: args.wait.wait };
    match dir.control().await?.call(call).await? {
        Called::Result(result) => show(&args.tool, &result, args.json),
        Called::Error(error) => {
            if args.json {
                say(error.get())?;
            }
            Err(anyhow!("`{}` was not called: {}", args.tool, printable(&rpc_error(&error))))
        }
        Called::Unknown { similar, missing } => {
            say_missing(&missing);
            let advice = match &similar[..] {
                [] => "`portcullis tools` shows those there are".to_owned(),
                near => format!("did you mean `{}`?", near.join("` or `")),
            };
            Err(anyhow!("there is no tool `{}`: {advice}", args.tool))
        }
    }
}

/// One object, or pairs.
fn arguments(texts: Vec<String>) -> Result<Arguments> {
    if let [text] = &texts[..]
        && text.trim_start().starts_with('{')
    {
        let json = RawValue::from_string(text.trim().to_owned());
        return json
            .and_then(|json| RawObject::parse(json.get().to_owned().into()).map(|_| Arguments::Json(json)))
            .map_err(|error| Usage(format!("the arguments are not one JSON object: {error}")).into());
    }
    let mut pairs: Vec<(String, String)> = Vec::with_capacity(texts.len());
    for text in texts {
        let Some((name, value)) = text.split_once('=').filter(|(name, _)| !name.is_empty()) else {
            let said = format!("{text:?} is neither a JSON object nor NAME=VALUE");
            return Err(Usage(said).into());
        };
        if pairs.iter().any(|(given, _)| given == name) {
            return Err(Usage(format!("the argument `{name}` is given twice")).into());
        }
        pairs.push((name.to_owned(), value.to_owned()));
    }
    Ok(Arguments::Pairs(pairs))
}

fn show(tool: &str, result: &RawValue, json: bool) -> Result<()> {
    let value: Option<Value> = serde_json::from_str(result.get()).ok();
    let failed = value.as_ref().is_some_and(|value| value["isError"] == true);
    let asks = value.as_ref().is_some_and(|value| value["resultType"] == "input_required");
    let text = match &value {
        Some(value) if !json => readable(value),
        // As it came; also when a number in it fits nowhere.
        _ => result.get().to_owned(),
    };
    if asks {
        if json {
            say(&text)?;
        }
        return Err(anyhow!("`{tool}` asks something back, and nobody can answer it here"));
    }
    if failed && !json {
        let text = if text.is_empty() { "it said nothing about why".to_owned() } else { text };
        let _ = writeln!(io::stderr().lock(), "error: `{tool}` failed: {text}");
    } else if !text.is_empty() {
        say(&text)?;
    }
    match failed {
        true => Err(Silent(ExitCode::FAILURE).into()),
        false => Ok(()),
    }
}

/// Text as it is, everything else as JSON. Beside text, structured content is left out: it is the same for
/// programs, and they use `--json`.
fn readable(result: &Value) -> String {
    let content = result["content"].as_array().map(Vec::as_slice).unwrap_or_default();
    let structured = result.get("structuredContent").filter(|value| !value.is_null());
    let mut parts = Vec::new();
    let mut has_text = false;
    for block in content {
        match (block["type"].as_str(), block["text"].as_str()) {
            // Structured content once more, for clients that do not know it. Below it is better to read.
            (Some("text"), Some(text)) if structured.is_some() && is_same(text, structured) => {}
            (Some("text"), Some(text)) => {
                parts.push(printable(text));
                has_text = true;
            }
            _ => parts.push(pretty(block)),
        }
    }
    match structured {
        Some(structured) if !has_text => parts.push(pretty(structured)),
        None if content.is_empty() => parts.push(pretty(result)),
        _ => {}
    }
    parts.join("\n")
}

fn is_same(text: &str, structured: Option<&Value>) -> bool {
    serde_json::from_str::<Value>(text).ok().as_ref() == structured
}

fn pretty(value: &Value) -> String {
    serde_json::to_string_pretty(value).unwrap_or_else(|_| value.to_string())
}

fn rpc_error(error: &RawValue) -> String {
    match serde_json::from_str::<Value>(error.get()) {
        Ok(error) => format!("{} ({})", error["message"].as_str().unwrap_or("no message"), error["code"]),
        Err(_) => error.get().to_owned(),
    }
}

/// A tool's text must not steer a terminal.
fn printable(text: &str) -> String {
    if !io::stdout().is_terminal() {
        return text.to_owned();
    }
    let harmless = |c: char| !c.is_control() || matches!(c, '\n' | '\t');
    text.chars().map(|c| if harmless(c) { c } else { char::REPLACEMENT_CHARACTER }).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn texts(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn arguments_are_an_object_or_pairs() {
        assert!(matches!(arguments(texts(&[r#"{"a":1e400}"#])), Ok(Arguments::Json(_))));
        let Ok(Arguments::Pairs(pairs)) = arguments(texts(&["a=1", "b=x=y", "c="])) else { panic!() };
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(pairs, [pair("a", "1"), pair("b", "x=y"), pair("c", "")]);
        for bad in [&["{"][..], &["{}x"], &["a"], &["=1"], &["a=1", "a=2"], &["{}", "a=1"]] {
            assert!(arguments(texts(bad)).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn structured_content_is_not_shown_twice() {
        let result = json!({
            "content": [{ "type": "text", "text": "{\"a\": 1}" }],
            "structuredContent": { "a": 1 },
        });
        assert_eq!(readable(&result), "{\n  \"a\": 1\n}");
        let result =
            json!({ "content": [{ "type": "text", "text": "one" }], "structuredContent": { "a": 1 } });
        assert_eq!(readable(&result), "one");
        let result = json!({ "content": [{ "type": "text", "text": "1" }] });
        assert_eq!(readable(&result), "1");
    }
}
