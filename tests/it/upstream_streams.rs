//! Streams of legacy upstreams: over several connections, and the one that belongs to no request.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{body::Body, response::Response};
use futures_util::{StreamExt as _, stream};
use http::{HeaderValue, header};
use portcullis::{
    BoxError,
    identity::{Affinity, Caller, Client, SessionToken},
    protocol::{Frame, FrameStream, McpRequest, Method, Params, Payload, ServerRequest, Unsolicited},
    upstream::HttpUpstream,
};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tower::ServiceExt as _;

use crate::stage::{Gateway, Probe, Script, Sent, Upstream, events, eventually, open_events, plain, result};

/// A stream as it is on the wire.
fn raw_events(body: impl Into<Body>) -> Response {
    let mut response = plain(200, body);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    response
}

fn answer_to(sent: &Sent, text: &str) -> String {
    let content = json!([{ "type": "text", "text": text }]);
    format!(r#"{{"jsonrpc":"2.0","id":{},"result":{{"content":{content}}}}}"#, sent.raw("id"))
}

fn progress(n: usize) -> String {
    json!({ "jsonrpc": "2.0", "method": "notifications/progress",
        "params": { "progressToken": "p", "progress": n } })
    .to_string()
}

/// A body that arrives, and is then cut.
fn cut<const N: usize>(begin: [String; N]) -> Body {
    let broken = stream::once(async {
        // What is under way together with the cut never arrives.
        tokio::time::sleep(Duration::from_millis(50)).await;
        Err(std::io::Error::other("cut"))
    });
    Body::from_stream(stream::iter(begin.map(Ok)).chain(broken))
}

/// The GETs an upstream got, by the event they begin after.
fn resumed(upstream: &Upstream) -> Vec<String> {
    let gets = upstream.seen().into_iter().filter(|sent| sent.verb == http::Method::GET);
    gets.filter_map(|sent| Some(sent.header("last-event-id")?.to_owned())).collect()
}

// === going on ===

/// Waits this long, in milliseconds.
const RETRY: u64 = 200;

#[tokio::test]
async fn a_stream_that_is_closed_to_be_polled_is_asked_for_when_the_server_said() {
    let pending = Arc::new(Mutex::new(None::<(String, Instant)>));
    let waited = Arc::new(Mutex::new(None::<Duration>));
    let (call, get, took) = (pending.clone(), pending, waited.clone());
    let script = Upstream::legacy().tool("t").on("tools/call", move |sent| {
        *call.lock().expect("no panic") = Some((answer_to(&sent, "at last"), Instant::now()));
        async { raw_events(format!("id: event-1\nretry: {RETRY}\ndata: \n\n")) }
    });
    let script = script.on("GET", move |sent| {
        let pending = match sent.header("last-event-id") {
            Some(_) => get.lock().expect("no panic").take(),
            None => None,
        };
        let body = pending.map_or_else(String::new, |(answer, closed)| {
            *took.lock().expect("no panic") = Some(closed.elapsed());
            format!("id: event-2\nretry: {RETRY}\ndata: \n\nevent: message\nid: event-3\ndata: {answer}\n\n")
        });
        async { raw_events(body) }
    });
    let upstream = script.start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    for modern in [true, false] {
        upstream.forget();
        let answer = match modern {
            true => gateway.modern().call("up_t", json!({})).await,
            false => gateway.legacy().await.call("up_t", json!({})).await,
        };
        assert_eq!(answer.content(), "at last");
        assert_eq!(resumed(&upstream), ["event-1"]);
        assert_eq!(upstream.seen_of("tools/call").len(), 1);
        assert_eq!(upstream.seen_of("notifications/cancelled").len(), 0);
        let waited = waited.lock().expect("no panic").take().expect("it was asked for");
        assert!(waited >= Duration::from_millis(RETRY), "{waited:?}");
    }
}

#[tokio::test]
async fn nothing_is_lost_and_nothing_comes_twice_over_broken_connections() {
    let answer = Arc::new(Mutex::new(String::new()));
    let kept = answer.clone();
    let script = Upstream::legacy().tool("t").on("tools/call", move |sent| {
        *kept.lock().expect("no panic") = answer_to(&sent, "whole");
        let first = format!("id: a1\nretry: 100\ndata: {}\n\nid: a2\ndata: {}\n\n", progress(1), progress(2));
        // An event that was cut has not arrived.
        async move { raw_events(cut([first, format!("id: a3\ndata: {}", progress(3))])) }
    });
    let script = script.on("GET", move |sent| {
        let answer = answer.lock().expect("no panic").clone();
        let response = match sent.header("last-event-id") {
            Some("a2") => raw_events(cut([format!("id: a3\ndata: {}\n\n", progress(3))])),
            Some("a3") => raw_events(format!("data: {}\n\ndata: {answer}\n\n", progress(4))),
            _ => plain(405, ""),
        };
        async { response }
    });
    let upstream = script.start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    for modern in [true, false] {
        upstream.forget();
        let params = json!({ "name": "up_t", "arguments": {}, "_meta": { "progressToken": "p" } });
        let answer = match modern {
            true => gateway.modern().ask("tools/call", params).await,
            false => gateway.legacy().await.ask("tools/call", params).await,
        };
        assert_eq!(answer.content(), "whole");
        let told: Vec<Value> = answer
            .messages()
            .iter()
            .map(|m| serde_json::from_slice::<Value>(m).expect("JSON")["params"]["progress"].take())
            .filter(|n| !n.is_null())
            .collect();
        assert_eq!(told, [1, 2, 3, 4]);
        assert_eq!(resumed(&upstream), ["a2", "a3"]);
    }
}

#[tokio::test]
async fn a_server_that_is_away_for_a_moment_is_asked_again() {
    let (answer, asked) = (Arc::new(Mutex::new(String::new())), Arc::new(AtomicUsize::new(0)));
    let kept = answer.clone();
    let script = Upstream::legacy().tool("t").on("tools/call", move |sent| {
        *kept.lock().expect("no panic") = answer_to(&sent, "back");
        async { raw_events("id: 1\nretry: 100\n\n") }
    });
    let script = script.on("GET", move |sent| {
        let answer = answer.lock().expect("no panic").clone();
        let response = match sent.header("last-event-id") {
            None => plain(405, ""),
            Some(_) if asked.fetch_add(1, Ordering::SeqCst) < 2 => plain(503, ""),
            Some(_) => raw_events(format!("data: {answer}\n\n")),
        };
        async { response }
    });
    let upstream = script.start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    assert_eq!(gateway.modern().call("up_t", json!({})).await.content(), "back");
    assert_eq!(resumed(&upstream), ["1", "1", "1"]);
}

#[tokio::test]
async fn a_stream_with_nothing_new_on_it_is_given_up_and_the_server_told() {
    let script = Upstream::legacy()
        .tool("t")
        .on("tools/call", |_| async { raw_events("id: 1\nretry: 100\ndata:\n\n") });
    let upstream = script.on("GET", |_| async { raw_events(": nothing\n\n") }).start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let answer = gateway.modern().call("up_t", json!({})).await;
    assert_eq!(answer.result()["structuredContent"]["code"], "unavailable", "{answer}");
    assert_eq!(resumed(&upstream), ["1"; 5]);
    assert_eq!(upstream.seen_of("tools/call").len(), 1, "it was processed, for all we know");
    eventually("it is told", async || upstream.seen_of("notifications/cancelled").len() == 1).await;
}

#[tokio::test]
async fn a_stream_that_cannot_be_resumed_fails_its_call_at_once() {
    let cases: [(&str, u16, usize); 4] = [
        ("id: 1\nretry: 100\n\n", 405, 1),
        ("id: 1\nretry: 100\n\n", 404, 1),
        ("retry: 100\n\n", 405, 0),
        ("id: 1\n\nid:\n\n", 405, 0),
    ];
    for (begun, status, gets) in cases {
        let script = Upstream::legacy().tool("t").on("tools/call", move |_| async move { raw_events(begun) });
        let upstream = script.on("GET", move |_| async move { plain(status, "") }).start().await;
        let gateway = Gateway::with([("up", upstream.url())]).start().await;
        let answer = gateway.modern().call("up_t", json!({})).await;
        assert_eq!(answer.result()["structuredContent"]["code"], "unavailable", "{answer}");
        assert_eq!(resumed(&upstream).len(), gets, "{begun:?} {status}");
        assert_eq!(upstream.seen_of("tools/call").len(), 1, "{begun:?} {status}");
    }
}

#[tokio::test]
async fn a_call_given_up_while_its_stream_is_away_is_cancelled() {
    let script =
        Upstream::legacy().tool("t").on("tools/call", |_| async { raw_events("id: 1\nretry: 60000\n\n") });
    let upstream = script.start().await;
    let gateway = Gateway::with([("up", upstream.url())]).timeout(Duration::from_millis(300)).start().await;
    let answer = gateway.modern().call("up_t", json!({})).await;
    assert_eq!(answer.result()["structuredContent"]["code"], "timed_out", "{answer}");
    eventually("it is told", async || upstream.seen_of("notifications/cancelled").len() == 1).await;
    assert!(resumed(&upstream).is_empty());
}

#[tokio::test]
async fn two_answers_on_one_stream_are_one() {
    for script in [Upstream::modern(), Upstream::legacy()] {
        let script = script.tool("t").on("tools/call", |sent| {
            let text = sent.params()["arguments"]["say"].to_string();
            let twice = events([answer_to(&sent, &text), answer_to(&sent, "again")]);
            async { twice }
        });
        let upstream = script.start().await;
        let gateway = Gateway::with([("up", upstream.url())]).start().await;
        for say in 0..20 {
            let answer = gateway.modern().call("up_t", json!({ "say": say })).await;
            assert_eq!((answer.messages().len(), answer.content()), (1, say.to_string()), "{answer}");
        }
    }
}

// === the stream that belongs to no request ===

/// A legacy client's session, as the door has it.
fn client(capabilities: &'static str) -> Arc<Caller> {
    let client = Client { capabilities: capabilities.into(), ..Client::gateway() };
    let affinity = Affinity::Session(SessionToken::new());
    Arc::new(Caller { client, affinity, ..(*Caller::anonymous()).clone() })
}

/// An upstream that says on the stream of each session but the gateway's own what it is told to say.
fn talkative() -> (Script, mpsc::UnboundedSender<String>, Arc<Mutex<usize>>) {
    let (say, said) = mpsc::unbounded_channel::<String>();
    let said = Arc::new(tokio::sync::Mutex::new(said));
    let opened = Arc::new(Mutex::new(0));
    let count = opened.clone();
    let script = Upstream::legacy().tool("t").answers(r#"{"content":[]}"#).on("GET", move |sent| {
        let (said, count) = (said.clone(), count.clone());
        async move {
            if sent.header("mcp-session-id") == Some("session-1") {
                return open_events(stream::pending());
            }
            *count.lock().expect("no panic") += 1;
            open_events(stream::unfold(said, |said| async {
                let message = said.lock().await.recv().await?;
                Some((message, said))
            }))
        }
    });
    (script, say, opened)
}

async fn open(gateway: &Gateway, caller: &Arc<Caller>) -> FrameStream {
    let mut request = McpRequest::bare(Method::Listen).with_caller(caller.clone());
    request.extensions_mut().insert(Unsolicited);
    match gateway.inner.clone().oneshot(request).await.expect("a stream").into_payload() {
        Payload::Stream(mut frames) => {
            assert!(matches!(frames.next().await, Some(Ok(Frame::Notification(_)))), "acknowledged");
            frames
        }
        other => panic!("{other:?}"),
    }
}

/// A stream of the gateway begins to listen when it is first read.
async fn listening(frames: &mut FrameStream) {
    let heard = tokio::time::timeout(Duration::from_millis(50), frames.next()).await;
    assert!(heard.is_err(), "{heard:?}");
}

async fn call(gateway: &Gateway, caller: &Arc<Caller>) {
    let request = McpRequest::call_tool("up_t", json!({})).with_caller(caller.clone());
    gateway.inner.clone().oneshot(request).await.expect("an answer");
}

async fn question(frames: &mut FrameStream) -> ServerRequest {
    let next = tokio::time::timeout(crate::stage::PATIENCE, frames.next()).await.expect("a frame in time");
    match next.expect("one more").expect("no error") {
        Frame::Request(question) => question,
        other => panic!("{other:?}"),
    }
}

async fn answered(upstream: &Upstream, id: &str) -> Sent {
    let find = || upstream.seen().into_iter().find(|s| s.method().is_empty() && s.raw("id") == id);
    eventually("the upstream has an answer", async || find().is_some()).await;
    find().expect("it was there")
}

fn asks(id: &str, method: &str, params: &Value) -> String {
    json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params }).to_string()
}

const ABLE: &str = r#"{"roots":{"listChanged":true},"elicitation":{}}"#;

#[tokio::test]
async fn a_question_outside_of_a_call_reaches_the_one_client_whose_session_it_is() {
    let (script, say, _) = talkative();
    let upstream = script.start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let (one, two) = (client(ABLE), client(ABLE));
    let (mut stream, mut other) = (open(&gateway, &one).await, open(&gateway, &two).await);
    listening(&mut stream).await;
    listening(&mut other).await;
    call(&gateway, &one).await;

    say.send(asks("r", "roots/list", &json!({}))).expect("the stream is open");
    let roots = question(&mut stream).await;
    assert_eq!(roots.method, Method::RootsList);
    roots.reply.send(Payload::Raw(r#"{"roots":[{"uri":"file:///home","z":1e400}]}"#.into()));
    let sent = answered(&upstream, "\"r\"").await;
    assert_eq!(sent.raw("result"), r#"{"roots":[{"uri":"file:///home","z":1e400}]}"#);
    assert_eq!(sent.header("mcp-session-id"), Some("session-2"));

    say.send(asks("e", "elicitation/create", &json!({ "message": "Who?" }))).expect("the stream is open");
    let person = question(&mut stream).await;
    assert_eq!(person.params.get("message"), Some(r#""[up] Who?""#), "signed");
    drop(person);
    assert_eq!(answered(&upstream, "\"e\"").await.raw("result"), "null", "refused");

    say.send(asks("s", "sampling/createMessage", &json!({}))).expect("the stream is open");
    tokio::select! {
        sent = answered(&upstream, "\"s\"") => assert!(sent.raw("error").contains("-32021"), "not declared"),
        heard = stream.next() => panic!("{heard:?}"),
        heard = other.next() => panic!("{heard:?}"),
    }
}

#[tokio::test]
async fn a_client_that_begins_to_listen_is_asked_in_the_session_it_has() {
    let (script, say, opened) = talkative();
    let upstream = script.start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let caller = client(ABLE);
    call(&gateway, &caller).await;
    assert_eq!(*opened.lock().expect("no panic"), 1, "a call of who can be asked has an ear for it");
    let mut stream = open(&gateway, &caller).await;
    say.send(asks("r", "roots/list", &json!({}))).expect("the script is there");
    question(&mut stream).await.reply.send(Payload::Raw("{}".into()));
    assert_eq!(answered(&upstream, "\"r\"").await.raw("result"), "{}");
}

#[tokio::test]
async fn a_server_that_knows_no_get_loses_no_session_over_it() {
    for status in [404, 405, 400] {
        let script = Upstream::legacy().tool("t").answers(r#"{"content":[]}"#);
        let upstream = script.on("GET", move |_| async move { plain(status, "") }).start().await;
        let gateway = Gateway::with([("up", upstream.url())]).start().await;
        let gets = || upstream.seen().iter().filter(|sent| sent.verb == http::Method::GET).count();
        eventually("it was asked", async || gets() == 1).await;
        for _ in 0..3 {
            gateway.modern().call("up_t", json!({})).await.result();
        }
        assert_eq!((upstream.seen_of("initialize").len(), gets()), (1, 1), "{status}");
    }
}

#[tokio::test]
async fn a_question_is_asked_once_however_many_listen() {
    let (script, say, _) = talkative();
    let upstream = script.start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let caller = client(ABLE);
    let mut before = open(&gateway, &caller).await;
    let mut after = open(&gateway, &caller).await;
    listening(&mut before).await;
    listening(&mut after).await;
    call(&gateway, &caller).await;
    for n in 0..10 {
        let id = format!("r{n}");
        say.send(asks(&id, "roots/list", &json!({}))).expect("the stream is open");
        // The newer stream took over.
        tokio::select! {
            heard = before.next() => panic!("{heard:?}"),
            asked = question(&mut after) => asked.reply.send(Payload::Raw("{}".into())),
        }
        assert_eq!(answered(&upstream, &format!("\"{id}\"")).await.raw("result"), "{}");
    }
    let answers = upstream.seen().into_iter().filter(|s| s.method().is_empty() && s.raw("id") != "null");
    assert_eq!(answers.count(), 10, "one each");
}

#[tokio::test]
async fn a_question_that_nobody_hears_is_refused_at_once() {
    let (script, say, opened) = talkative();
    let upstream = script.start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let caller = client(ABLE);
    let mut stream = open(&gateway, &caller).await;
    listening(&mut stream).await;
    call(&gateway, &caller).await;
    eventually("the stream is open", async || *opened.lock().expect("no panic") == 1).await;
    drop(stream);
    say.send(asks("r", "roots/list", &json!({}))).expect("the stream is open");
    let error = answered(&upstream, "\"r\"").await.raw("error");
    assert!(error.contains("-32601") && error.contains("nobody can be asked"), "{error}");
}

#[tokio::test]
async fn questions_on_a_shared_session_are_refused() {
    let script = Upstream::legacy().tool("t").on("GET", |_| async {
        open_events(stream::iter([asks("r", "roots/list", &json!({}))]).chain(stream::pending()))
    });
    let upstream = script.start().await;
    let _gateway = Gateway::with([("up", upstream.url())]).start().await;
    assert!(answered(&upstream, "\"r\"").await.raw("error").contains("nobody can be asked"));
}

#[tokio::test]
async fn more_questions_than_anybody_answers_are_refused() {
    let (script, say, _) = talkative();
    let upstream = script.start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let caller = client(ABLE);
    let mut stream = open(&gateway, &caller).await;
    listening(&mut stream).await;
    call(&gateway, &caller).await;
    for n in 0..200 {
        say.send(asks(&format!("r{n}"), "roots/list", &json!({}))).expect("the stream is open");
    }
    let refused = || upstream.seen().iter().filter(|s| s.raw("error") != "null").count();
    eventually("most of them are refused", async || refused() >= 200 - 64).await;
    let first = question(&mut stream).await;
    first.reply.send(Payload::Raw("{}".into()));
    assert_eq!(answered(&upstream, "\"r0\"").await.raw("result"), "{}");
}

#[tokio::test]
async fn the_stream_that_belongs_to_no_request_goes_on_where_it_was() {
    let count = Arc::new(AtomicUsize::new(0));
    let script = Upstream::legacy().tool("t").answers(r#"{"content":[]}"#).on("GET", move |sent| {
        let own = sent.header("mcp-session-id") == Some("session-1");
        let n = if own { 0 } else { count.fetch_add(1, Ordering::SeqCst) + 1 };
        let message =
            |n| json!({ "jsonrpc": "2.0", "method": "notifications/message", "params": { "data": n } });
        let response = match n {
            0 => open_events(stream::pending()),
            1 => raw_events(format!("retry: 100\nid: s1\ndata: {}\n\n", message(1))),
            // It lost its memory.
            2 => plain(400, ""),
            3 => raw_events(format!("id: s3\ndata: {}\n\n", message(2))),
            _ => raw_events(Body::from_stream(
                stream::iter([Ok::<_, BoxError>(format!("data: {}\n\n", message(n - 1)))])
                    .chain(stream::pending()),
            )),
        };
        async { response }
    });
    let upstream = script.start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let client = gateway.legacy().await;
    let mut stream = client.listen().await;
    client.call("up_t", json!({})).await.result();
    for n in 1..=3 {
        assert_eq!(stream.until("notifications/message").await["params"]["data"], n);
    }
    assert_eq!(resumed(&upstream), ["s1", "s3"]);
}

// === what a session is told ===

#[tokio::test]
async fn sessions_of_modern_clients_declare_what_these_can_be_asked() {
    let upstream = Upstream::legacy().tool("t").answers(r#"{"content":[]}"#).start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    upstream.forget();
    let all =
        json!({ "roots": {}, "sampling": { "tools": {} }, "elicitation": {}, "experimental": { "x": {} } });
    for declared in [json!({}), all.clone(), all, json!({ "sampling": {} })] {
        gateway.modern().declaring(declared).call("up_t", json!({})).await.result();
    }
    let told: Vec<Value> =
        upstream.seen_of("initialize").iter().map(|sent| sent.params()["capabilities"].take()).collect();
    let all = json!({ "roots": {}, "sampling": { "tools": {} }, "elicitation": { "form": {} } });
    assert_eq!(told, [all, json!({ "sampling": {} })], "what needs no session of its own has none");
    let used: Vec<String> = upstream
        .seen_of("tools/call")
        .iter()
        .map(|sent| sent.header("mcp-session-id").expect("a session").to_owned())
        .collect();
    assert_eq!(used, ["session-1", "session-2", "session-2", "session-3"]);
}

#[tokio::test]
async fn a_question_within_a_call_is_a_frame_of_the_call_on_a_shared_session_too() {
    let script = Upstream::legacy().tool("t").on("tools/call", |sent| async move {
        let question = asks("q", "elicitation/create", &json!({ "message": "Who?" }));
        events([question, answer_to(&sent, "done")])
    });
    let upstream = script.start().await;
    let service = HttpUpstream::new("up".parse().expect("a name"), upstream.url());
    let client = Client { capabilities: r#"{"elicitation":{}}"#.into(), ..Client::gateway() };
    let caller = Arc::new(Caller { client, ..(*Caller::anonymous()).clone() });
    let call = McpRequest::call_tool("t", json!({})).with_caller(caller);
    let Payload::Stream(mut frames) = service.oneshot(call).await.expect("an answer").into_payload() else {
        panic!("no stream")
    };
    let asked = question(&mut frames).await;
    assert_eq!(asked.params.get("message"), Some(r#""[up] Who?""#));
    asked.reply.send(Payload::Raw(r#"{"action":"decline"}"#.into()));
    assert_eq!(answered(&upstream, "\"q\"").await.raw("result"), r#"{"action":"decline"}"#);
    assert!(matches!(frames.next().await, Some(Ok(Frame::Final(Payload::Raw(_))))));
    assert!(frames.next().await.is_none());
}

#[tokio::test]
async fn a_legacy_clients_session_declares_what_the_client_did() {
    let upstream = Upstream::legacy().tool("t").answers(r#"{"content":[]}"#).start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    upstream.forget();
    let declared = json!({ "roots": { "listChanged": true }, "vendor": { "x": 1 }, "tasks": {} });
    gateway.legacy_with(declared).await.call("up_t", json!({})).await.result();
    let told = upstream.seen_of("initialize")[0].params();
    assert_eq!(told["capabilities"], json!({ "roots": { "listChanged": true }, "vendor": { "x": 1 } }));
    assert_eq!(told["clientInfo"]["name"], "story");
}

#[tokio::test]
async fn a_notification_opens_no_session_and_reaches_the_one_there_is() {
    let upstream = Upstream::legacy().tool("t").answers(r#"{"content":[]}"#).start().await;
    let name = "up".parse().expect("a name");
    let service = HttpUpstream::new(name, upstream.url());
    let caller = client(ABLE);
    let tell = async |method: &str| {
        let params = Params::from_value(&json!({ "a": 1 }));
        let told = McpRequest::new(Method::from(method), params).with_caller(caller.clone());
        service.clone().oneshot(told).await.expect("it was taken");
    };
    tell("notifications/roots/list_changed").await;
    assert!(upstream.seen_of("initialize").is_empty());
    let call = McpRequest::call_tool("t", json!({})).with_caller(caller.clone());
    service.clone().oneshot(call).await.expect("an answer");
    for method in ["notifications/roots/list_changed", "notifications/vendor/x"] {
        tell(method).await;
        let told = upstream.seen_of(method);
        assert_eq!((told.len(), told[0].header("mcp-session-id")), (1, Some("session-1")), "{method}");
        assert_eq!(told[0].raw("params"), r#"{"a":1}"#);
    }
    // One that is over is not opened anew for this.
    upstream.forget_sessions(http::StatusCode::NOT_FOUND);
    tell("notifications/vendor/x").await;
    assert_eq!(upstream.seen_of("initialize").len(), 1);
}

#[tokio::test]
async fn a_state_that_nobody_gave_out_does_not_reach_a_legacy_upstream() {
    let upstream = Upstream::legacy().tool("t").answers(r#"{"content":[]}"#).start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let forged = json!({ "name": "up_t", "arguments": {}, "requestState": "forged", "inputResponses": {} });
    let answer = gateway.modern().ask("tools/call", forged.clone()).await;
    assert_eq!(answer.error()["code"], -32602, "{answer}");
    assert!(answer.text().contains("call again without it"), "{answer}");
    assert!(upstream.seen_of("tools/call").is_empty());
    let mut answers = forged;
    answers.as_object_mut().expect("an object").remove("requestState");
    gateway.modern().ask("tools/call", answers).await.result();
    assert!(upstream.seen_of("tools/call")[0].params().get("inputResponses").is_none());
}

// === leaving nothing behind ===

#[tokio::test]
async fn a_client_that_goes_away_takes_its_session_along_whatever_was_asked() {
    let (script, say, opened) = talkative();
    let probe = Probe::default();
    let ended = probe.clone();
    let script = script.on("DELETE", move |_| {
        drop(ended.enter());
        async { plain(200, "") }
    });
    let upstream = script.start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let caller = client(ABLE);
    let mut stream = open(&gateway, &caller).await;
    listening(&mut stream).await;
    call(&gateway, &caller).await;
    eventually("the stream is open", async || *opened.lock().expect("no panic") == 1).await;
    say.send(asks("r", "roots/list", &json!({}))).expect("the stream is open");
    let held = question(&mut stream).await;
    drop((stream, caller));
    probe.over().await;
    // Too late, and to nobody.
    held.reply.send(Payload::Raw("{}".into()));
    assert!(upstream.seen().iter().all(|sent| sent.raw("id") != "\"r\""));
}

#[tokio::test]
async fn a_redirect_in_mid_life_takes_no_credentials_elsewhere() {
    for status in [301, 302, 307, 308] {
        let elsewhere = Upstream::legacy().tool("t").start().await;
        let to = elsewhere.url();
        let script = Upstream::legacy().tool("t").on("tools/call", move |sent| {
            let mut response = result(&sent, "{}");
            *response.status_mut() = http::StatusCode::from_u16(status).expect("a status");
            response.headers_mut().insert(header::LOCATION, HeaderValue::from_str(&to).expect("a location"));
            async { response }
        });
        let upstream = script.start().await;
        let service = HttpUpstream::new("up".parse().expect("a name"), upstream.url());
        let service = service.header("authorization", "Bearer hunter2");
        let error = service.oneshot(McpRequest::call_tool("t", json!({}))).await.expect_err("a refusal");
        assert!(!error.to_string().contains("hunter2"), "{error}");
        assert_eq!(upstream.seen_of("tools/call")[0].header("authorization"), Some("Bearer hunter2"));
        assert!(elsewhere.seen().is_empty(), "{status}");
    }
}
