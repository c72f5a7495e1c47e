//! What nobody opens leaves as it came, for every pair of eras. Where client and upstream are of the same era that
//! is every byte; across eras it is every member but the marks of an era.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use portcullis::protocol::{NamingMode, RawObject};
use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};
use serde_json::json;

use crate::stage::{Answer, Gateway, Legacy, META, Modern, Request, Sent, Upstream, error, events, result};

/// Everything typed code would lose: order, spaces, spellings, numbers too large for any number type.
const PARAMS: &str = r#"{"zeta": 1e400 ,"name":"t", "arguments":{"b": 18446744073709551617, "a":[ 1.0,2.50 ],"\u0061é":"\u00e9\ud83d\ude00\/", "c" : null},"vendor":{"x":[ ]}"#;

const RESULT: &str = r#"{ "content":[{"type":"hologram","data": 1e400},{"type":"text","text":"a\u0062\/c","vendor":18446744073709551617}],"zz":{"b":1, "a":2} ,
 "structuredContent":{"n": 1.10},"aa":-0.0,"isError" : false }"#;

const ERROR: &str =
    r#"{"vendor":[1e400], "code":-31999,"message":"n\u006f","data":{"b":1,"a":18446744073709551617}}"#;

const TOOL: &str = r#"{ "zz":1e400,"name":"t","inputSchema":{"type":"object","required":[],"$defs":{"b":{},"a":{}}},"execution":{"taskSupport":"optional"},"annotations":{"vendorHint":18446744073709551617} }"#;

/// A client in front of an upstream, each of an era.
struct Pair {
    client: Client,
    upstream: Upstream,
    gateway: Gateway,
    same_era: bool,
}

enum Client {
    Modern(Modern),
    Legacy(Legacy),
}

impl Pair {
    /// All four.
    async fn all<F, Fut>(answer: F) -> Vec<Pair>
    where
        F: Fn(Sent) -> Fut + Clone + Send + Sync + 'static,
        Fut: Future<Output = axum::response::Response> + Send + 'static,
    {
        let mut pairs = Vec::new();
        for (modern_client, modern_upstream) in [(true, true), (false, false), (true, false), (false, true)] {
            let script = if modern_upstream { Upstream::modern() } else { Upstream::legacy() };
            let script =
                script.tools(&[TOOL]).on("tools/call", answer.clone()).on("vendor/x", answer.clone());
            let upstream = script.start().await;
            let gateway = Gateway::with([("up", upstream.url())]).naming(NamingMode::Bare).start().await;
            let client = match modern_client {
                true => Client::Modern(gateway.modern()),
                false => Client::Legacy(gateway.legacy().await),
            };
            pairs.push(Pair { client, upstream, gateway, same_era: modern_client == modern_upstream });
        }
        pairs
    }

    /// A request with these params, whose closing brace is still to come.
    fn request(&self, method: &str, id: &str, open_params: &str) -> Request {
        match &self.client {
            Client::Modern(client) => {
                let params = format!(r#"{open_params},"_meta":{META}}}"#);
                let request = client.raw(method, message(id, method, &params));
                if method == "tools/call" { request.header("mcp-name", "t") } else { request }
            }
            Client::Legacy(client) => client.raw(message(id, method, &format!("{open_params}}}"))),
        }
    }

    async fn call(&self) -> Answer {
        self.request("tools/call", "1", PARAMS).send().await
    }
}

fn message(id: &str, method: &str, params: &str) -> String {
    format!(r#"{{"jsonrpc":"2.0","id":{id},"method":"{method}","params":{params}}}"#)
}

/// A member of a message, as it stands there.
fn raw(message: &Bytes, member: &str) -> String {
    let message = RawObject::parse(message.clone()).expect("a message is an object");
    message.get(member).unwrap_or_else(|| panic!("no {member} in {}", message.as_str())).to_owned()
}

/// The members that no era owns, in their order, as they stand there.
fn members(object: &str) -> Vec<(String, String)> {
    let object = RawObject::parse(object.to_owned().into()).expect("an object");
    let marks = ["_meta", "resultType", "ttlMs", "cacheScope"];
    let members = object.iter().filter(|(key, _)| !marks.contains(key));
    members.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

#[tokio::test]
async fn params_arrive_as_they_were_sent() {
    for pair in Pair::all(async |sent| result(&sent, "{}")).await {
        pair.call().await.result();
        let sent = pair.upstream.seen_of("tools/call")[0].raw("params");
        assert_eq!(members(&sent), members(&format!("{PARAMS}}}")));
        match (&pair.client, pair.same_era) {
            (Client::Modern(_), true) => assert_eq!(sent, format!(r#"{PARAMS},"_meta":{META}}}"#)),
            (Client::Legacy(_), true) => assert_eq!(sent, format!("{PARAMS}}}")),
            _ => {}
        }
    }
}

#[tokio::test]
async fn results_arrive_as_they_were_sent() {
    for pair in Pair::all(async |sent| result(&sent, RESULT)).await {
        let answer = pair.call().await;
        let got = raw(&answer.message(), "result");
        assert_eq!(members(&got), members(RESULT));
        match &pair.client {
            Client::Modern(_) => {
                let inner = RESULT.strip_prefix('{').expect("an object");
                assert_eq!(got, format!(r#"{{"resultType":"complete",{inner}"#));
            }
            Client::Legacy(_) => assert_eq!(got, RESULT),
        }
    }
}

#[tokio::test]
async fn a_result_with_the_marks_of_its_era_keeps_every_byte_within_it() {
    let marked = r#"{"zz": 1e400,"resultType":"complete", "content":[] }"#;
    for pair in Pair::all(async move |sent| result(&sent, marked)).await {
        let got = raw(&pair.call().await.message(), "result");
        assert_eq!(members(&got), members(marked));
        match &pair.client {
            Client::Modern(_) => assert_eq!(got, marked),
            Client::Legacy(_) => assert!(!got.contains("resultType"), "{got}"),
        }
    }
}

#[tokio::test]
async fn the_marks_as_data_of_a_tool_are_data() {
    let data = r#"{"content":[],"structuredContent":{"resultType":"x","ttlMs":1e400,"cacheScope":[ ]}}"#;
    for pair in Pair::all(async move |sent| result(&sent, data)).await {
        assert_eq!(members(&raw(&pair.call().await.message(), "result")), members(data));
    }
}

#[tokio::test]
async fn errors_of_upstreams_arrive_as_they_were_sent() {
    for pair in Pair::all(async |sent| error(&sent, 200, ERROR)).await {
        let answer = pair.call().await;
        assert_eq!(answer.status, 200);
        assert_eq!(raw(&answer.message(), "error"), ERROR);
    }
}

#[tokio::test]
async fn frames_of_a_stream_arrive_as_they_were_sent() {
    let told = r#"{"z": 1e400,"progress":50,"vendor":18446744073709551617, "text":"\u0061"}"#;
    let one_line = RESULT.replace('\n', " ");
    let says = one_line.clone();
    let answer = move |sent: Sent| {
        let told = format!(r#"{{"jsonrpc":"2.0","method":"notifications/vendor","params":{told}}}"#);
        let answer =
            events([told, format!(r#"{{"jsonrpc":"2.0","id":{},"result":{says}}}"#, sent.raw("id"))]);
        async { answer }
    };
    for pair in Pair::all(answer).await {
        let answer = pair.call().await;
        let messages = answer.messages();
        assert_eq!(messages.len(), 2, "{answer}");
        assert_eq!(raw(&messages[0], "params"), told);
        assert_eq!(members(&raw(&messages[1], "result")), members(&one_line));
    }
}

#[tokio::test]
async fn methods_nobody_knows_pass_through() {
    for pair in Pair::all(async |sent| result(&sent, RESULT)).await {
        let answer = pair.request("vendor/x", "1", PARAMS).send().await;
        assert_eq!(members(&raw(&answer.message(), "result")), members(RESULT));
        let sent = pair.upstream.seen_of("vendor/x")[0].raw("params");
        assert_eq!(members(&sent), members(&format!("{PARAMS}}}")));
    }
}

#[tokio::test]
async fn ids_come_back_as_they_were_written() {
    for pair in Pair::all(async |sent| result(&sent, "{}")).await {
        for id in ["18446744073709551617", "-7", r#""a\u0062\/""#, r#""""#, "0"] {
            let answer = pair.request("tools/call", id, PARAMS).send().await;
            assert_eq!(raw(&answer.message(), "id"), id);
        }
    }
}

#[tokio::test]
async fn definitions_are_listed_as_they_were_given() {
    for pair in Pair::all(async |sent| result(&sent, "{}")).await {
        let answer = pair.request("tools/list", "1", r#"{"x":1"#).send().await;
        let tools = raw(&Bytes::from(raw(&answer.message(), "result")), "tools");
        assert_eq!(tools, format!("[{TOOL}]"));
    }
}

#[tokio::test]
async fn renaming_touches_nothing_but_the_name() {
    let upstream = Upstream::modern().tools(&[TOOL]).answers("{}").start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let listed = gateway.modern().ask("tools/list", json!({})).await;
    let tools = raw(&Bytes::from(raw(&listed.message(), "result")), "tools");
    assert_eq!(tools, format!("[{}]", TOOL.replace(r#""name":"t""#, r#""name":"up_t""#)));

    let params = |name| format!(r#"{},"_meta":{META}}}"#, PARAMS.replace(r#""t""#, name));
    let call = gateway.modern().raw("tools/call", message("1", "tools/call", &params(r#""up_t""#)));
    call.header("mcp-name", "up_t").send().await.result();
    let sent = &upstream.seen_of("tools/call")[0];
    assert_eq!(sent.raw("params"), params(r#""t""#));
    assert_eq!(sent.header("mcp-name"), Some("t"));
}

/// JSON as servers may write it, not as one serializer does.
fn json_text() -> impl Strategy<Value = String> {
    let string = r#"([ !#-\[\]-~é日😀]|\\[n"\\/]|\\u00e9){0,6}"#.prop_map(|s| format!("\"{s}\""));
    let number = r"-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,4})?([eE][+-]?[0-9]{1,3})?";
    let leaf = prop_oneof![string.clone(), number, Just("null".to_owned()), Just("true".to_owned())];
    leaf.prop_recursive(4, 24, 4, move |inner| {
        let space = "[ \t\r\n]{0,2}";
        let items = prop::collection::vec((space, inner.clone()), 0..4);
        let pairs = prop::collection::vec((space, string.clone(), inner), 0..4);
        prop_oneof![
            items.prop_map(|items| {
                let items: Vec<String> = items.iter().map(|(space, item)| format!("{space}{item}")).collect();
                format!("[{}]", items.join(","))
            }),
            pairs.prop_map(|pairs| {
                let pairs: Vec<String> =
                    pairs.iter().map(|(space, key, value)| format!("{space}{key}{space}:{value}")).collect();
                format!("{{{}}}", pairs.join(","))
            }),
        ]
    })
}

#[test]
fn whatever_the_json_it_passes() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let says: Arc<Mutex<String>> = Arc::default();
    let answer = {
        let says = says.clone();
        move |sent: Sent| {
            let says = says.lock().expect("no panic").clone();
            async move { result(&sent, &says) }
        }
    };
    let pairs = runtime.block_on(Pair::all(answer));
    let mut runner = TestRunner::new(Config { cases: 32, failure_persistence: None, ..Config::default() });
    let values = prop::collection::vec(json_text(), 0..4);
    let outcome = runner.run(&values, |values| {
        let object: Vec<String> =
            values.iter().enumerate().map(|(i, value)| format!("\"m{i}\" : {value}")).collect();
        let object = format!("{{{}}}", object.join(" ,"));
        *says.lock().expect("no panic") = object.clone();
        for pair in &pairs {
            pair.upstream.forget();
            let open = format!(r#"{{"name":"t","v":{object}"#);
            let answer = runtime.block_on(pair.request("tools/call", "1", &open).send());
            prop_assert_eq!(members(&raw(&answer.message(), "result")), members(&object));
            let sent = pair.upstream.seen_of("tools/call")[0].raw("params");
            prop_assert_eq!(members(&sent), members(&format!("{open}}}")));
        }
        Ok(())
    });
    outcome.unwrap_or_else(|failure| panic!("{failure}"));
    drop(pairs.into_iter().map(|pair| pair.gateway).collect::<Vec<_>>());
}
