//! Both eras, with the other side of an in-memory pipe in the test's hand.

use std::{future::pending, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::StreamExt as _;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, DuplexStream, ReadHalf, WriteHalf},
    task::JoinHandle,
};

use super::*;
use crate::{
    error::{Fault, InvalidParams},
    identity::{Affinity, Caller, Client, Principal, SessionToken},
    protocol::{Era, Notification, Params, RequestId, ServerRequest, Unsolicited, code, meta},
};

/// The scripted other side.
struct Peer {
    read: BufReader<ReadHalf<DuplexStream>>,
    write: WriteHalf<DuplexStream>,
}

impl Peer {
    async fn line(&mut self) -> Option<Value> {
        let mut line = String::new();
        self.read.read_line(&mut line).await.unwrap();
        (!line.is_empty()).then(|| serde_json::from_str(&line).unwrap())
    }

    async fn expect(&mut self, method: &str) -> Value {
        let message = self.line().await.expect("a message comes");
        assert_eq!(message["method"], method, "{message}");
        message
    }

    async fn say(&mut self, text: impl AsRef<str>) {
        self.write.write_all(text.as_ref().as_bytes()).await.unwrap();
        self.write.write_all(b"\n").await.unwrap();
    }

    async fn answer(&mut self, request: &Value, result: &str) {
        self.say(format!(r#"{{"jsonrpc":"2.0","id":{},"result":{result}}}"#, request["id"])).await;
    }

    async fn refuse(&mut self, request: &Value, error: &str) {
        self.say(format!(r#"{{"jsonrpc":"2.0","id":{},"error":{error}}}"#, request["id"])).await;
    }

    /// Waits until everything that was said before has been read.
    async fn sync(&mut self) {
        self.say(r#"{"jsonrpc":"2.0","id":"sync","method":"ping"}"#).await;
        assert_eq!(self.line().await.unwrap(), json!({ "jsonrpc": "2.0", "id": "sync", "result": {} }));
    }
}

const MODERN: &str = r#"{"resultType":"complete","supportedVersions":["2026-07-28"],"capabilities":{}}"#;
const LEGACY: &str = r#"{"protocolVersion":"2025-06-18","capabilities":{"tools":{"listChanged":true},"resources":{"subscribe":true}},"serverInfo":{"name":"old","version":"1"},"instructions":"be kind"}"#;

fn wire(max_line: usize) -> (Wire, Peer) {
    wire_of(max_line, 1024 * 1024)
}

fn wire_of(max_line: usize, pipe: usize) -> (Wire, Peer) {
    let (ours, theirs) = tokio::io::duplex(pipe);
    let (read, write) = tokio::io::split(ours);
    let around = Surroundings { max_line, gone: Box::pin(pending()), closing: Box::pin(pending()) };
    let wire = Wire::start(&"x".parse().unwrap(), read, write, around);
    let (read, write) = tokio::io::split(theirs);
    (wire, Peer { read: BufReader::new(read), write })
}

type Opening = JoinHandle<Result<(Wire, Opened), Unopened>>;

fn probing(known: Option<Era>) -> (Opening, Peer) {
    probing_for(known, Arc::new(Owner::everybody()))
}

fn probing_for(known: Option<Era>, owner: Arc<Owner>) -> (Opening, Peer) {
    let (wire, peer) = wire(MAX_LINE);
    let opening = tokio::spawn(async move {
        let opened = open(&wire, known, &owner).await?;
        Ok((wire, opened))
    });
    (opening, peer)
}

async fn modern() -> (Arc<Lines>, Peer) {
    let (wire, peer) = wire(MAX_LINE);
    (Arc::new(Lines::new(wire, Opened::Modern, ())), peer)
}

async fn legacy() -> (Arc<Lines>, Peer) {
    let (opening, mut peer) = probing(Some(Era::Legacy));
    let initialize = peer.expect("initialize").await;
    peer.answer(&initialize, LEGACY).await;
    let Ok(Ok((wire, opened))) = opening.await else { panic!("it opens") };
    peer.expect("notifications/initialized").await;
    (Arc::new(Lines::new(wire, opened, ())), peer)
}

fn echo(n: u32) -> McpRequest {
    McpRequest::call_tool("echo", json!({ "n": n }))
}

fn with_token(token: &str) -> McpRequest {
    let params = format!(r#"{{"name":"slow","_meta":{{"progressToken":{token}}}}}"#);
    McpRequest::new(Method::ToolsCall, Params::parse(params.into()).unwrap())
}

fn call(lines: &Arc<Lines>, request: McpRequest) -> JoinHandle<Result<McpResponse, UpstreamError>> {
    let lines = lines.clone();
    tokio::spawn(async move { lines.call(request).await.map_err(known) })
}

fn known(error: BoxError) -> UpstreamError {
    *error.downcast().expect("an upstream's error")
}

fn json_of(response: McpResponse) -> Bytes {
    response.payload().to_json().expect("no stream").expect("no error")
}

fn frames_of(response: McpResponse) -> FrameStream {
    match response.into_payload() {
        Payload::Stream(frames) => frames,
        other => panic!("no stream: {other:?}"),
    }
}

async fn notification(frames: &mut FrameStream) -> Notification {
    match frames.next().await {
        Some(Ok(Frame::Notification(notification))) => notification,
        other => panic!("no notification: {other:?}"),
    }
}

// === Requests and answers ===

#[tokio::test]
async fn answers_may_cross_and_stay_the_bytes_they_are() {
    let (lines, mut peer) = modern().await;
    let first = call(&lines, echo(1).with_id(RequestId::from(77)));
    let one = peer.expect("tools/call").await;
    let second = call(&lines, echo(2).with_id(RequestId::from(77)));
    let two = peer.expect("tools/call").await;
    assert_ne!(one["id"], two["id"]);
    peer.answer(&two, r#"{"b": 1e400, "a":[2]}"#).await;
    peer.say(format!(r#"{{"result":{{"n":1}},"jsonrpc":"2.0","id":{}}}"#, one["id"])).await;
    assert_eq!(json_of(second.await.unwrap().unwrap()), r#"{"b": 1e400, "a":[2]}"#);
    assert_eq!(json_of(first.await.unwrap().unwrap()), r#"{"n":1}"#);
}

#[tokio::test]
async fn an_upstreams_error_passes_verbatim() {
    let (lines, mut peer) = modern().await;
    let answer = call(&lines, echo(1));
    let request = peer.expect("tools/call").await;
    peer.refuse(&request, r#"{"code":-32002,"message":"no","data":{"x":1e400}}"#).await;
    let payload = answer.await.unwrap().unwrap().into_payload();
    let Payload::Error(error) = payload else { panic!("{payload:?}") };
    assert_eq!(error.as_bytes(), r#"{"code":-32002,"message":"no","data":{"x":1e400}}"#);
}

#[tokio::test]
async fn junk_and_answers_to_nobody_are_skipped() {
    let (lines, mut peer) = modern().await;
    let answer = call(&lines, echo(1));
    let request = peer.expect("tools/call").await;
    for junk in ["npm WARN", "[]", "{", "\u{1}\u{2}", r#"{"jsonrpc":"2.0","id":999,"result":{}}"#, "", "null"]
    {
        peer.say(junk).await;
    }
    peer.write.write_all(b"\xff\xfe\n").await.unwrap();
    peer.answer(&request, "{}").await;
    assert_eq!(json_of(answer.await.unwrap().unwrap()), "{}");
}

#[tokio::test]
async fn a_malformed_answer_fails_its_call_alone() {
    let (lines, mut peer) = modern().await;
    let (bad, good) = (call(&lines, echo(1)), call(&lines, echo(2)));
    let (one, two) = (peer.expect("tools/call").await, peer.expect("tools/call").await);
    let (bad, good, one, two) = match one["params"]["arguments"]["n"] == 1 {
        true => (bad, good, one, two),
        false => (bad, good, two, one),
    };
    peer.say(format!(r#"{{"jsonrpc":"2.0","id":{}}}"#, one["id"])).await;
    assert_eq!(bad.await.unwrap().unwrap_err().fault, Fault::Garbled);
    peer.answer(&two, "{}").await;
    assert!(good.await.unwrap().is_ok());
}

#[tokio::test]
async fn a_line_that_is_too_long_ends_the_connection() {
    let (wire, mut peer) = wire(1000);
    let lines = Arc::new(Lines::new(wire, Opened::Modern, ()));
    let (one, two) = (call(&lines, echo(1)), call(&lines, echo(2)));
    let request = peer.expect("tools/call").await;
    peer.answer(&request, &format!("{{\"x\":\"{}\"}}", "x".repeat(1000))).await;
    assert_eq!(one.await.unwrap().unwrap_err().fault, Fault::TooLarge);
    assert_eq!(two.await.unwrap().unwrap_err().fault, Fault::TooLarge);
    assert!(lines.is_closed());
}

#[tokio::test]
async fn when_the_other_side_goes_everybody_is_told() {
    let (lines, mut peer) = modern().await;
    let answer = call(&lines, echo(1));
    peer.expect("tools/call").await;
    drop(peer);
    assert_eq!(answer.await.unwrap().unwrap_err().fault, Fault::Lost);
    assert!(lines.is_closed());
    assert!(lines.clone().call(echo(2)).await.is_err());
}

#[tokio::test]
async fn requests_of_the_other_side_are_refused_and_ping_is_answered() {
    let (_lines, mut peer) = legacy().await;
    peer.sync().await;
    peer.say(r#"{"jsonrpc":"2.0","id":5,"method":"sampling/createMessage","params":{}}"#).await;
    let refusal = peer.line().await.unwrap();
    assert_eq!((&refusal["id"], &refusal["error"]["code"]), (&json!(5), &json!(-32601)));
}

#[tokio::test]
async fn notifications_are_written_through() {
    let (lines, mut peer) = legacy().await;
    let note = McpRequest::bare(Method::from("notifications/roots/list_changed"));
    assert_eq!(json_of(lines.clone().call(note).await.unwrap()), "{}");
    peer.expect("notifications/roots/list_changed").await;
}

// === Progress and cancellation ===

#[tokio::test]
async fn progress_comes_back_under_the_callers_own_token() {
    let (lines, mut peer) = modern().await;
    let (one, two) = (call(&lines, with_token("\"t\"")), call(&lines, with_token("\"t\"")));
    let (first, second) = (peer.expect("tools/call").await, peer.expect("tools/call").await);
    let token = |request: &Value| request["params"]["_meta"]["progressToken"].clone();
    assert_ne!(token(&first), token(&second));
    for (request, n) in [(&second, 2), (&first, 1), (&second, 2)] {
        let params = format!(r#"{{"progressToken":{},"progress": {n},"x":1e400}}"#, token(request));
        peer.say(format!(r#"{{"jsonrpc":"2.0","method":"notifications/progress","params":{params}}}"#)).await;
    }
    peer.say(
        r#"{"jsonrpc":"2.0","method":"notifications/progress","params":{"progressToken":99,"progress":1}}"#,
    )
    .await;
    peer.answer(&first, r#"{"n":1}"#).await;
    peer.answer(&second, r#"{"n":2}"#).await;
    let mut seen = Vec::new();
    for call in [one, two] {
        let mut frames = frames_of(call.await.unwrap().unwrap());
        let mut all = Vec::new();
        while let Some(frame) = frames.next().await {
            all.push(match frame.unwrap() {
                Frame::Notification(n) => n.params.as_str().to_owned(),
                Frame::Final(payload) => {
                    String::from_utf8(payload.to_json().unwrap().unwrap().to_vec()).unwrap()
                }
                Frame::Request(_) => panic!("nobody asked"),
            });
        }
        seen.push(all);
    }
    let progress = |n: u32| format!(r#"{{"progressToken":"t","progress": {n},"x":1e400}}"#);
    seen.sort_by_key(Vec::len);
    assert_eq!(seen[0], [progress(1), r#"{"n":1}"#.to_owned()]);
    assert_eq!(seen[1], [progress(2), progress(2), r#"{"n":2}"#.to_owned()]);
}

#[tokio::test]
async fn params_without_a_token_stay_the_bytes_they_are() {
    let (lines, mut peer) = legacy().await;
    let params = r#"{"name":"a" ,"arguments":{"x":1e400}}"#;
    let request = McpRequest::new(Method::ToolsCall, Params::parse(params.into()).unwrap());
    let _answer = call(&lines, request);
    let mut line = String::new();
    peer.read.read_line(&mut line).await.unwrap();
    assert!(line.contains(params), "{line}");
}

#[tokio::test]
async fn dropping_the_call_cancels_it_and_a_late_answer_is_ignored() {
    let (lines, mut peer) = modern().await;
    let answer = call(&lines, echo(1));
    let request = peer.expect("tools/call").await;
    answer.abort();
    let cancelled = peer.expect("notifications/cancelled").await;
    assert_eq!(cancelled["params"]["requestId"], request["id"]);
    peer.answer(&request, "{}").await;
    peer.sync().await;
    assert!(!lines.is_closed());
}

#[tokio::test]
async fn dropping_the_frames_cancels_the_call() {
    let (lines, mut peer) = modern().await;
    let answer = call(&lines, with_token("1"));
    let request = peer.expect("tools/call").await;
    let token = &request["params"]["_meta"]["progressToken"];
    peer.say(format!(
        r#"{{"jsonrpc":"2.0","method":"notifications/progress","params":{{"progressToken":{token},"progress":1}}}}"#
    ))
    .await;
    let mut frames = frames_of(answer.await.unwrap().unwrap());
    notification(&mut frames).await;
    drop(frames);
    let cancelled = peer.expect("notifications/cancelled").await;
    assert_eq!(cancelled["params"]["requestId"], request["id"]);
}

#[tokio::test]
async fn a_finished_call_is_not_cancelled() {
    let (lines, mut peer) = modern().await;
    let answer = call(&lines, echo(1));
    let request = peer.expect("tools/call").await;
    peer.answer(&request, "{}").await;
    answer.await.unwrap().unwrap();
    let _next = call(&lines, echo(2));
    peer.expect("tools/call").await;
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_never_reads_blocks_nobody_and_gathers_nothing() {
    let (wire, mut peer) = wire_of(MAX_LINE, 1000);
    let lines = Arc::new(Lines::new(wire, Opened::Modern, ()));
    let big = |n| McpRequest::call_tool("echo", json!({ "n": n, "x": "x".repeat(10_000) }));
    let calls: Vec<_> = (0..200).map(|n| call(&lines, big(n))).collect();
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(calls.iter().all(|call| !call.is_finished()));
    calls.iter().for_each(JoinHandle::abort);
    tokio::time::sleep(Duration::from_secs(1)).await;
    // Only the one that had begun is ever written, and taken back.
    let request = peer.expect("tools/call").await;
    let cancelled = peer.expect("notifications/cancelled").await;
    assert_eq!(cancelled["params"]["requestId"], request["id"]);
    peer.sync().await;
}

#[tokio::test]
async fn a_caller_that_does_not_read_loses_progress_and_not_the_result() {
    let (lines, mut peer) = modern().await;
    let answer = call(&lines, with_token("1"));
    let request = peer.expect("tools/call").await;
    let token = &request["params"]["_meta"]["progressToken"];
    for n in 0..1000 {
        let params = format!(r#"{{"progressToken":{token},"progress":{n}}}"#);
        peer.say(format!(r#"{{"jsonrpc":"2.0","method":"notifications/progress","params":{params}}}"#)).await;
    }
    peer.answer(&request, r#"{"done":true}"#).await;
    peer.sync().await;
    let payload = answer.await.unwrap().unwrap().into_payload().settle().await.unwrap();
    assert_eq!(payload.to_value(), Some(json!({ "done": true })));
}

#[tokio::test]
async fn a_log_message_goes_to_the_only_call_under_way() {
    let (lines, mut peer) = legacy().await;
    let answer = call(&lines, echo(1));
    let request = peer.expect("tools/call").await;
    peer.say(r#"{"jsonrpc":"2.0","method":"notifications/message","params":{"data":"hi"}}"#).await;
    peer.answer(&request, "{}").await;
    let mut frames = frames_of(answer.await.unwrap().unwrap());
    assert_eq!(notification(&mut frames).await.method, Method::LogMessage);
    assert!(matches!(frames.next().await, Some(Ok(Frame::Final(Payload::Raw(_))))));
    assert!(frames.next().await.is_none());
}

#[tokio::test]
async fn a_log_message_that_could_be_anybodys_goes_to_nobody() {
    let (lines, mut peer) = legacy().await;
    let (one, two) = (call(&lines, echo(1)), call(&lines, echo(2)));
    let (first, second) = (peer.expect("tools/call").await, peer.expect("tools/call").await);
    peer.say(r#"{"jsonrpc":"2.0","method":"notifications/message","params":{"data":"hi"}}"#).await;
    peer.answer(&first, "{}").await;
    peer.answer(&second, "{}").await;
    json_of(one.await.unwrap().unwrap());
    json_of(two.await.unwrap().unwrap());
}

#[tokio::test]
async fn a_flood_of_notifications_costs_neither_the_question_nor_the_result() {
    let caller = modern_client();
    let (lines, mut peer) = legacy_of(&caller).await;
    let answer = call(&lines, with_token("1").with_caller(caller));
    let request = peer.expect("tools/call").await;
    let token = &request["params"]["_meta"]["progressToken"];
    for n in 0..20_000 {
        let params = format!(r#"{{"progressToken":{token},"progress":{n}}}"#);
        peer.say(format!(r#"{{"jsonrpc":"2.0","method":"notifications/progress","params":{params}}}"#)).await;
    }
    peer.ask("1", "Sure?").await;
    peer.sync().await;
    assert!(lines.wire.calls().unread() <= 256);
    let mut frames = frames_of(answer.await.unwrap().unwrap());
    let question = loop {
        match frames.next().await {
            Some(Ok(Frame::Notification(_))) => {}
            Some(Ok(Frame::Request(question))) => break question,
            other => panic!("no question: {other:?}"),
        }
    };
    question.reply.send(accepted());
    assert_eq!(peer.line().await.unwrap()["result"]["action"], "accept");
    peer.answer(&request, r#"{"done":true}"#).await;
    assert!(matches!(frames.next().await, Some(Ok(Frame::Final(_)))));
}

#[tokio::test]
async fn an_answer_cut_short_by_the_end_is_lost_and_a_whole_one_is_not() {
    for (cut, whole) in [(0, true), (1, false), (10, false)] {
        let (lines, mut peer) = modern().await;
        let answer = call(&lines, echo(1));
        let request = peer.expect("tools/call").await;
        let line = format!(r#"{{"jsonrpc":"2.0","id":{},"result":{{"n":1}}}}"#, request["id"]);
        peer.write.write_all(&line.as_bytes()[..line.len() - cut]).await.unwrap();
        drop(peer);
        match answer.await.unwrap() {
            Ok(_) => assert!(whole, "{cut}"),
            Err(error) => assert_eq!((error.fault, whole), (Fault::Lost, false), "{cut}"),
        }
    }
}

#[tokio::test]
async fn an_answer_that_comes_twice_is_nobody_elses() {
    let (lines, mut peer) = modern().await;
    let answer = call(&lines, echo(1));
    let request = peer.expect("tools/call").await;
    peer.answer(&request, r#"{"n":1}"#).await;
    peer.answer(&request, r#"{"n":1,"again":true}"#).await;
    assert_eq!(json_of(answer.await.unwrap().unwrap()), r#"{"n":1}"#);
    let next = call(&lines, echo(2));
    let request = peer.expect("tools/call").await;
    peer.answer(&request, r#"{"n":2}"#).await;
    assert_eq!(json_of(next.await.unwrap().unwrap()), r#"{"n":2}"#);
}

#[tokio::test]
async fn whatever_line_breaks_a_client_writes_it_is_one_message() {
    let (lines, mut peer) = modern().await;
    let smuggled = r#"{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"denied"}}"#;
    let params = format!("{{\"name\":\"echo\",\"arguments\":{{\"a\":\n{smuggled}\r\n}}}}");
    let request = McpRequest::new(Method::ToolsCall, Params::parse(params.into()).unwrap());
    let _answer = call(&lines, request);
    let request = peer.expect("tools/call").await;
    assert_eq!(request["params"]["name"], "echo");
    assert_eq!(request["params"]["arguments"]["a"]["params"]["name"], "denied");
}

#[tokio::test]
async fn a_modern_peers_questions_are_in_its_name() {
    let (lines, mut peer) = modern().await;
    let answer = call(&lines, echo(1));
    let request = peer.expect("tools/call").await;
    let asks = r#"{"resultType":"input_required","inputRequests":{"a":{"method":"elicitation/create","params":{"message":"Who?"}}}}"#;
    peer.answer(&request, asks).await;
    assert_eq!(json_of(answer.await.unwrap().unwrap()), asks.replace("Who?", "[x] Who?"));
}

#[tokio::test]
async fn a_state_that_nobody_gave_out_does_not_reach_a_legacy_peer() {
    let (lines, mut peer) = legacy().await;
    let forged = json!({ "name": "echo", "requestState": "forged" });
    let forged = McpRequest::new(Method::ToolsCall, Params::from_value(&forged));
    let error = lines.clone().call(forged).await.unwrap_err();
    assert!(error.is::<InvalidParams>(), "{error}");
    let answers = json!({ "name": "echo", "inputResponses": {} });
    let _answer = call(&lines, McpRequest::new(Method::ToolsCall, Params::from_value(&answers)));
    assert_eq!(peer.expect("tools/call").await["params"], json!({ "name": "echo" }));
}

// === Questions ===

const ELICITATION: &[u8] = br#"{"elicitation":{},"roots":{},"tasks":{}}"#;

/// A client in a session of its own, which lives as long as the token.
fn legacy_client() -> (Arc<Caller>, Arc<SessionToken>) {
    let token = SessionToken::new();
    let client = Client { info: Some(r#"{"name":"own"}"#.into()), ..modern_client().client.clone() };
    let affinity = Affinity::Session(token.clone());
    (Arc::new(Caller { client, affinity, ..(*Caller::anonymous()).clone() }), token)
}

fn modern_client() -> Arc<Caller> {
    let client = Client { capabilities: Bytes::from_static(ELICITATION), ..Client::gateway() };
    Arc::new(Caller { client, principal: Principal::named("a"), ..(*Caller::anonymous()).clone() })
}

async fn legacy_of(caller: &Caller) -> (Arc<Lines>, Peer) {
    let (opening, mut peer) = probing_for(Some(Era::Legacy), Arc::new(Owner::of(caller)));
    let initialize = peer.expect("initialize").await;
    assert_eq!(initialize["params"]["capabilities"], json!({ "elicitation": declared(caller), "roots": {} }));
    let own = matches!(caller.affinity, Affinity::Session(_));
    assert_eq!(initialize["params"]["clientInfo"]["name"], if own { "own" } else { "portcullis" });
    peer.answer(&initialize, LEGACY).await;
    let Ok(Ok((wire, opened))) = opening.await else { panic!("it opens") };
    peer.expect("notifications/initialized").await;
    (Arc::new(Lines::new(wire, opened, ())), peer)
}

/// A client of several is described by what it can do, its own by itself.
fn declared(caller: &Caller) -> Value {
    match caller.affinity {
        Affinity::Shared => json!({ "form": {} }),
        Affinity::Session(_) => json!({}),
    }
}

impl Peer {
    /// Asks a person.
    async fn ask(&mut self, id: &str, message: &str) {
        let params = json!({ "message": message, "requestedSchema": {} });
        self.say(format!(r#"{{"jsonrpc":"2.0","id":{id},"method":"elicitation/create","params":{params}}}"#))
            .await;
    }

    async fn refused(&mut self, id: &Value) -> String {
        let answer = self.line().await.unwrap();
        assert_eq!(answer["id"], *id, "{answer}");
        assert_eq!(answer["error"]["code"], -32601, "{answer}");
        answer["error"]["message"].as_str().unwrap().to_owned()
    }
}

fn accepted() -> Payload {
    Payload::Raw(Bytes::from_static(br#"{"action":"accept"}"#))
}

async fn question(frames: &mut FrameStream) -> ServerRequest {
    match frames.next().await {
        Some(Ok(Frame::Request(question))) => question,
        other => panic!("no question: {other:?}"),
    }
}

fn message(question: &ServerRequest) -> String {
    question.params.get_string("message").unwrap().into_owned()
}

#[tokio::test]
async fn a_question_comes_in_the_only_call_and_its_answer_goes_back_under_its_own_id() {
    for caller in [modern_client(), legacy_client().0] {
        let (lines, mut peer) = legacy_of(&caller).await;
        for id in ["7", "-7", "\"7\"", r#""a\"b""#] {
            let answer = call(&lines, echo(1).with_caller(caller.clone()));
            let request = peer.expect("tools/call").await;
            peer.ask(id, "Which?").await;
            let mut frames = frames_of(answer.await.unwrap().unwrap());
            let asked = question(&mut frames).await;
            assert_eq!((asked.method.as_str(), &*message(&asked)), ("elicitation/create", "[x] Which?"));
            asked.reply.send(Payload::Raw("{\n\"action\":\r\n\"accept\"}".into()));
            let id: Value = serde_json::from_str(id).unwrap();
            let answered = json!({ "jsonrpc": "2.0", "id": id, "result": { "action": "accept" } });
            assert_eq!(peer.line().await.unwrap(), answered);
            peer.answer(&request, "{}").await;
            assert!(matches!(frames.next().await, Some(Ok(Frame::Final(_)))));
            assert_eq!(lines.wire.calls().open_questions(), 0);
        }
    }
}

#[tokio::test]
async fn what_the_client_cannot_do_it_is_not_asked() {
    let caller = modern_client();
    let (lines, mut peer) = legacy_of(&caller).await;
    let _answer = call(&lines, echo(1).with_caller(caller));
    peer.expect("tools/call").await;
    for method in ["sampling/createMessage", "tasks/get", "tools/list"] {
        peer.say(format!(r#"{{"jsonrpc":"2.0","id":5,"method":"{method}","params":{{}}}}"#)).await;
        assert_eq!(peer.refused(&json!(5)).await, "the client cannot be asked this");
    }
}

#[tokio::test]
async fn a_question_nobody_wants_to_answer_is_refused() {
    let caller = modern_client();
    let (lines, mut peer) = legacy_of(&caller).await;
    let answer = call(&lines, echo(1).with_caller(caller));
    let request = peer.expect("tools/call").await;
    peer.ask("1", "Which?").await;
    let mut frames = frames_of(answer.await.unwrap().unwrap());
    drop(question(&mut frames).await);
    assert_eq!(peer.refused(&json!(1)).await, "the client cannot be asked this");
    peer.answer(&request, "{}").await;
}

#[tokio::test]
async fn among_several_clients_a_question_that_may_be_anybodys_is_refused() {
    let caller = modern_client();
    let (lines, mut peer) = legacy_of(&caller).await;
    let (one, two) = (
        call(&lines, echo(1).with_caller(caller.clone())),
        call(&lines, echo(2).with_caller(caller.clone())),
    );
    let (first, second) = (peer.expect("tools/call").await, peer.expect("tools/call").await);
    peer.ask("1", "Which?").await;
    assert_eq!(peer.refused(&json!(1)).await, "cannot tell which call this belongs to");
    peer.answer(&first, "{}").await;
    peer.answer(&second, "{}").await;
    for call in [one, two] {
        json_of(call.await.unwrap().unwrap());
    }
    peer.ask("2", "Which?").await;
    assert_eq!(peer.refused(&json!(2)).await, "nobody can be asked outside of a call");
}

#[tokio::test(start_paused = true)]
async fn a_call_that_was_cancelled_may_still_be_the_one_that_asks() {
    let caller = modern_client();
    let (lines, mut peer) = legacy_of(&caller).await;
    let make = |n| call(&lines, echo(n).with_caller(caller.clone()));
    // Answered all the same, it is gone.
    let gone = make(1);
    let cancelled = peer.expect("tools/call").await;
    gone.abort();
    peer.expect("notifications/cancelled").await;
    let answer = make(2);
    let request = peer.expect("tools/call").await;
    peer.ask("1", "Whose?").await;
    assert_eq!(peer.refused(&json!(1)).await, "cannot tell which call this belongs to");
    let log = r#"{"jsonrpc":"2.0","method":"notifications/message","params":{"data":"whose?"}}"#;
    peer.say(log).await;
    peer.answer(&cancelled, "{}").await;
    peer.ask("2", "Whose?").await;
    let mut frames = frames_of(answer.await.unwrap().unwrap());
    let asked = question(&mut frames).await;
    // Not answered, it is gone after a while.
    let gone = make(3);
    peer.expect("tools/call").await;
    gone.abort();
    peer.expect("notifications/cancelled").await;
    peer.ask("3", "Whose?").await;
    assert_eq!(peer.refused(&json!(3)).await, "cannot tell which call this belongs to");
    tokio::time::advance(Duration::from_secs(60)).await;
    peer.ask("4", "Whose?").await;
    question(&mut frames).await.reply.send(accepted());
    assert_eq!(peer.line().await.unwrap()["id"], 4);
    // Withdrawn with its call.
    peer.answer(&request, "{}").await;
    assert_eq!(peer.refused(&json!(2)).await, "the call it belongs to is over");
    asked.reply.send(accepted());
    peer.sync().await;
}

#[tokio::test]
async fn among_calls_of_one_client_a_question_is_asked_until_the_call_that_asked_is_over() {
    let (caller, _token) = legacy_client();
    let (lines, mut peer) = legacy_of(&caller).await;
    let make = |n| call(&lines, echo(n).with_caller(caller.clone()));
    let old = make(1);
    let first = peer.expect("tools/call").await;
    let new = make(2);
    let second = peer.expect("tools/call").await;
    peer.ask("1", "Which?").await;
    let mut frames = frames_of(new.await.unwrap().unwrap());
    let asked = question(&mut frames).await;
    // It was not this one that asked, for it is done.
    peer.answer(&second, "{}").await;
    assert!(matches!(frames.next().await, Some(Ok(Frame::Final(_)))));
    drop(asked);
    let mut frames = frames_of(old.await.unwrap().unwrap());
    question(&mut frames).await.reply.send(accepted());
    assert_eq!(peer.line().await.unwrap()["result"]["action"], "accept");
    peer.ask("2", "Which?").await;
    let _asked = question(&mut frames).await;
    peer.answer(&first, "{}").await;
    peer.refused(&json!(2)).await;
}

#[tokio::test]
async fn a_question_the_peer_takes_back_gets_no_answer() {
    let caller = modern_client();
    let (lines, mut peer) = legacy_of(&caller).await;
    let answer = call(&lines, echo(1).with_caller(caller));
    peer.expect("tools/call").await;
    peer.ask("\"q\"", "Which?").await;
    let mut frames = frames_of(answer.await.unwrap().unwrap());
    let asked = question(&mut frames).await;
    peer.say(r#"{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":"q"}}"#).await;
    peer.sync().await;
    asked.reply.send(accepted());
    peer.ask("\"q\"", "Once more?").await;
    let again = question(&mut frames).await;
    assert_eq!(message(&again), "[x] Once more?");
    again.reply.send(accepted());
    assert_eq!(peer.line().await.unwrap()["id"], "q");
    peer.sync().await;
}

#[tokio::test]
async fn what_is_asked_at_the_beginning_waits_for_the_first_call() {
    for caller in [modern_client(), legacy_client().0] {
        let (lines, mut peer) = legacy_of(&caller).await;
        peer.say(r#"{"jsonrpc":"2.0","id":1,"method":"roots/list"}"#).await;
        peer.sync().await;
        let answer = call(&lines, echo(1).with_caller(caller.clone()));
        peer.expect("tools/call").await;
        let mut frames = frames_of(answer.await.unwrap().unwrap());
        let asked = question(&mut frames).await;
        assert_eq!(asked.method, Method::RootsList);
        asked.reply.send(Payload::Raw(Bytes::from_static(br#"{"roots":[]}"#)));
        assert_eq!(peer.line().await.unwrap()["result"], json!({ "roots": [] }));
    }
}

#[tokio::test(start_paused = true)]
async fn outside_of_calls_one_client_is_asked_where_it_listens_and_several_are_not() {
    for caller in [modern_client(), legacy_client().0] {
        let (_lines, mut peer) = legacy_of(&caller).await;
        peer.ask("1", "Anybody?").await;
        assert_eq!(peer.refused(&json!(1)).await, "nobody can be asked outside of a call");
    }
}

#[tokio::test(start_paused = true)]
async fn open_questions_are_bounded_and_every_one_is_answered() {
    let caller = modern_client();
    let (lines, mut peer) = legacy_of(&caller).await;
    let answer = call(&lines, echo(1).with_caller(caller));
    peer.expect("tools/call").await;
    for id in 0..100 {
        peer.ask(&id.to_string(), "Again?").await;
    }
    for id in 64..100 {
        assert_eq!(peer.refused(&json!(id)).await, "too many questions are open");
    }
    assert_eq!(lines.wire.calls().open_questions(), 64);
    let mut frames = frames_of(answer.await.unwrap().unwrap());
    let mut asked = Vec::new();
    for _ in 0..64 {
        asked.push(question(&mut frames).await);
    }
    // Nobody answers, and they end all the same.
    tokio::time::sleep(Duration::from_secs(10 * 60)).await;
    let mut late = Vec::new();
    for _ in 0..64 {
        let answer = peer.line().await.unwrap();
        assert_eq!(answer["error"]["code"], code::TIMED_OUT);
        late.push(answer["id"].as_u64().unwrap());
    }
    late.sort_unstable();
    assert_eq!(late, Vec::from_iter(0..64));
    assert_eq!(lines.wire.calls().open_questions(), 0);
}

#[tokio::test]
async fn whoever_asks_much_on_a_shared_connection_is_refused_as_often() {
    let (_lines, mut peer) = legacy().await;
    for id in 0..200 {
        peer.ask(&id.to_string(), "Anybody?").await;
    }
    for id in 0..200 {
        assert_eq!(peer.refused(&json!(id)).await, "the client cannot be asked this");
    }
}

#[tokio::test]
async fn whoever_asks_and_never_reads_blocks_nobody_and_gathers_nothing() {
    let (ours, theirs) = tokio::io::duplex(1000);
    let (read, write) = tokio::io::split(ours);
    let around = Surroundings { max_line: MAX_LINE, gone: Box::pin(pending()), closing: Box::pin(pending()) };
    let wire = Wire::start(&"x".parse().unwrap(), read, write, around);
    let (read, write) = tokio::io::split(theirs);
    let mut peer = Peer { read: BufReader::new(read), write };
    for id in 0..10_000 {
        peer.ask(&id.to_string(), "Anybody?").await;
    }
    let long = "9".repeat(100_000);
    peer.ask(&long, "Anybody?").await;
    let lines = Arc::new(Lines::new(wire, Opened::Modern, ()));
    let _answer = call(&lines, echo(1));
    let mut refused = 0;
    while peer.line().await.unwrap()["method"] != "tools/call" {
        refused += 1;
    }
    assert!(refused < 300, "{refused}");
}

/// A peer that asks in some calls, late in others, and in calls that were cancelled; and clients that cancel. Each
/// question says whose it is.
#[tokio::test(start_paused = true)]
async fn however_calls_are_interleaved_nobody_sees_anothers_question() {
    let mut asked = 0;
    for seed in 0..40 {
        let caller = modern_client();
        let (lines, peer) = legacy_of(&caller).await;
        let peer = tokio::spawn(asking_peer(peer, Dice(seed * 2 + 1)));
        let clients = (0..3_u64).map(|client| {
            let (lines, caller) = (lines.clone(), caller.clone());
            tokio::spawn(async move {
                let mut dice = Dice(seed * 1000 + client * 7 + 3);
                let mut asked = 0;
                for round in 0..15 {
                    let own = u32::try_from(client).unwrap() * 100 + round;
                    tokio::time::sleep(Duration::from_millis(dice.roll(20))).await;
                    let patience = if dice.roll(8) == 0 { 1 + dice.roll(9) } else { 10_000 };
                    let patience = Duration::from_millis(patience);
                    let run = run_to_its_end(&lines, echo(own).with_caller(caller.clone()), own);
                    asked += tokio::time::timeout(patience, run).await.unwrap_or(0);
                }
                asked
            })
        });
        for client in clients.collect::<Vec<_>>() {
            asked += client.await.unwrap();
        }
        peer.abort();
        // What was cancelled is forgotten.
        tokio::time::advance(Duration::from_secs(61)).await;
    }
    assert!(asked > 100, "{asked}");
}

/// How often it was asked.
async fn run_to_its_end(lines: &Arc<Lines>, request: McpRequest, own: u32) -> u32 {
    let mut asked = 0;
    let mut frames = match lines.clone().call(request).await.unwrap().into_payload() {
        Payload::Stream(frames) => frames,
        payload => {
            assert_eq!(payload.to_value().unwrap()["n"], own);
            return 0;
        }
    };
    while let Some(frame) = frames.next().await {
        match frame.unwrap() {
            Frame::Request(question) => {
                assert_eq!(message(&question), format!("[x] {own}"));
                asked += 1;
                question.reply.send(Payload::Raw(json!({ "n": own }).to_string().into()));
            }
            Frame::Final(payload) => assert_eq!(payload.to_value().unwrap()["n"], own),
            Frame::Notification(_) => {}
        }
    }
    asked
}

/// Chance that is the same each time.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

async fn asking_peer(mut peer: Peer, mut dice: Dice) {
    // Of each call that is not answered yet: its id and its number.
    let mut open: Vec<(Value, Value)> = Vec::new();
    let mut questions = 0;
    loop {
        let pause = Duration::from_millis(1 + dice.roll(3));
        let mut line = String::new();
        let message = match tokio::time::timeout(pause, peer.read.read_line(&mut line)).await {
            Ok(_) => serde_json::from_str::<Value>(&line).unwrap(),
            Err(_) => Value::Null,
        };
        if message["method"] == "tools/call" {
            open.push((message["id"].clone(), message["params"]["arguments"]["n"].clone()));
        } else if let Some(n) = message["result"]["n"].as_u64() {
            // An answer reaches the call whose question it is.
            assert!(message["id"].as_str().unwrap().ends_with(&format!("/{n}")), "{message}");
        }
        // Cancelled or not, it goes on with all of them.
        if open.is_empty() {
            continue;
        }
        tokio::time::sleep(Duration::from_millis(dice.roll(3))).await;
        let at = usize::try_from(dice.roll(open.len() as u64)).unwrap();
        let (id, n) = open[at].clone();
        if dice.roll(3) > 0 {
            questions += 1;
            peer.ask(&format!("\"{questions}/{n}\""), &n.to_string()).await;
        } else {
            open.swap_remove(at);
            peer.say(json!({ "jsonrpc": "2.0", "id": id, "result": { "n": n } }).to_string()).await;
        }
    }
}

#[tokio::test]
async fn nothing_is_left_of_a_connection_that_ends_with_open_questions() {
    let caller = modern_client();
    let (lines, mut peer) = legacy_of(&caller).await;
    let answer = call(&lines, echo(1).with_caller(caller));
    peer.expect("tools/call").await;
    peer.ask("1", "Which?").await;
    let mut frames = frames_of(answer.await.unwrap().unwrap());
    let asked = question(&mut frames).await;
    let calls = Arc::downgrade(lines.wire.calls());
    drop(peer);
    assert!(frames.next().await.unwrap().is_err());
    drop((lines, frames));
    while calls.strong_count() > 0 {
        tokio::task::yield_now().await;
    }
    asked.reply.send(accepted());
}

#[tokio::test]
async fn the_level_of_the_one_client_is_followed_and_of_several_the_least_severe() {
    const LOGS: &str = r#"{"protocolVersion":"2025-06-18","capabilities":{"logging":{}}}"#;
    for (caller, one) in [(legacy_client().0, true), (modern_client(), false)] {
        let (opening, mut peer) = probing_for(Some(Era::Legacy), Arc::new(Owner::of(&caller)));
        let initialize = peer.expect("initialize").await;
        peer.answer(&initialize, LOGS).await;
        let Ok(Ok((wire, opened))) = opening.await else { panic!("it opens") };
        peer.expect("notifications/initialized").await;
        let lines = Arc::new(Lines::new(wire, opened, ()));
        for (level, told) in [("info", true), ("info", false), ("error", one), ("debug", true)] {
            let mut caller = (*caller).clone();
            caller.client.log_level = Some(json!(level).to_string().into());
            let _answer = call(&lines, echo(1).with_caller(Arc::new(caller)));
            if told {
                let set = peer.expect("logging/setLevel").await;
                assert_eq!(set["params"], json!({ "level": level }));
                peer.answer(&set, "{}").await;
            }
            let request = peer.expect("tools/call").await;
            peer.answer(&request, "{}").await;
        }
    }
}

// === Places ===

fn place(caller: &Caller) -> (Place, Arc<std::sync::Mutex<Option<Wire>>>, Peer) {
    let (wire, peer) = wire(MAX_LINE);
    (
        Place::new(&"x".parse().unwrap(), Arc::new(Owner::of(caller))),
        Arc::new(std::sync::Mutex::new(Some(wire))),
        peer,
    )
}

#[tokio::test]
async fn a_client_that_listens_hears_what_its_own_peer_says_outside_of_calls() {
    let (caller, _token) = legacy_client();
    let (place, wire, mut peer) = place(&caller);
    let connect = |owner: Arc<Owner>| {
        let wire = wire.lock().unwrap().take();
        async move {
            let wire = wire.expect("nobody connected before");
            let opened = open(&wire, Some(Era::Legacy), &owner).await.map_err(|unopened| unopened.error)?;
            Ok(Lines::new(wire, opened, ()))
        }
    };
    // Neither of these is a reason to connect.
    let mut unsolicited = McpRequest::bare(Method::Listen).with_caller(caller.clone());
    unsolicited.extensions_mut().insert(Unsolicited);
    let mut told = frames_of(place.call(unsolicited, connect).await.unwrap());
    let changed = McpRequest::bare(Method::from("notifications/roots/list_changed"));
    place.call(changed.clone(), connect).await.unwrap();

    let (answered, ()) = tokio::join!(place.call(echo(1).with_caller(caller.clone()), connect), async {
        let initialize = peer.expect("initialize").await;
        peer.answer(&initialize, LEGACY).await;
        peer.expect("notifications/initialized").await;
        let request = peer.expect("tools/call").await;
        peer.answer(&request, "{}").await;
    });
    json_of(answered.unwrap());
    place.call(changed, connect).await.unwrap();
    peer.expect("notifications/roots/list_changed").await;

    peer.say(r#"{"jsonrpc":"2.0","method":"notifications/tools/list_changed"}"#).await;
    peer.say(r#"{"jsonrpc":"2.0","method":"notifications/message","params":{"data":"hi"}}"#).await;
    peer.ask("1", "There?").await;
    assert_eq!(notification(&mut told).await.method, Method::LogMessage);
    question(&mut told).await.reply.send(accepted());
    assert_eq!(peer.line().await.unwrap()["result"]["action"], "accept");
    drop(place);
    assert!(told.next().await.is_none());
}

#[tokio::test]
async fn an_attempt_ends_with_its_place_and_not_with_who_asked() {
    let (caller, _token) = legacy_client();
    let (ended, mut over) = tokio::sync::mpsc::channel::<()>(1);
    let place = Arc::new(Place::new(&"x".parse().unwrap(), Arc::new(Owner::of(&caller))));
    let asking = tokio::spawn({
        let place = place.clone();
        async move {
            let connect = |_| async move {
                let _held = ended;
                pending().await
            };
            place.call(echo(1), connect).await
        }
    });
    tokio::task::yield_now().await;
    asking.abort();
    assert!(asking.await.is_err());
    assert!(over.try_recv().is_err_and(|e| e == tokio::sync::mpsc::error::TryRecvError::Empty));
    drop(place);
    assert!(over.recv().await.is_none());
}

#[tokio::test]
async fn whoever_listens_to_a_shared_place_is_told_nothing_and_does_not_wait() {
    let place = Place::new(&"x".parse().unwrap(), Arc::new(Owner::everybody()));
    let mut unsolicited = McpRequest::bare(Method::Listen);
    unsolicited.extensions_mut().insert(Unsolicited);
    let answer = place.call(unsolicited, |_| async { panic!("nobody connects") }).await.unwrap();
    assert!(frames_of(answer).next().await.is_none());
}

// === Listening ===

fn listen(filter: Value) -> McpRequest {
    McpRequest::new(Method::Listen, Params::from_value(&json!({ "notifications": filter })))
}

#[tokio::test]
async fn a_modern_listen_is_told_apart_by_its_id_and_gets_its_own_back() {
    let (lines, mut peer) = modern().await;
    let filter = json!({ "toolsListChanged": true });
    let own = RequestId::from_json(Bytes::from_static(b"\"mine\"")).unwrap();
    let answer = call(&lines, listen(filter.clone()).with_id(own));
    let request = peer.expect("subscriptions/listen").await;
    let other = call(&lines, listen(filter));
    let another = peer.expect("subscriptions/listen").await;
    let say = |id: &Value, method: &str| {
        let m = json!({ meta::SUBSCRIPTION_ID: id });
        json!({ "jsonrpc": "2.0", "method": method, "params": { "_meta": m } }).to_string()
    };
    peer.say(say(&request["id"], "notifications/subscriptions/acknowledged")).await;
    peer.say(say(&another["id"], "notifications/subscriptions/acknowledged")).await;
    peer.say(say(&request["id"], "notifications/tools/list_changed")).await;
    let mut frames = frames_of(answer.await.unwrap().unwrap());
    assert_eq!(notification(&mut frames).await.method, Method::Acknowledged);
    let changed = notification(&mut frames).await;
    assert_eq!(changed.method, Method::ToolsChanged);
    assert_eq!(changed.params.meta().unwrap().get(meta::SUBSCRIPTION_ID), Some("\"mine\""));
    let result = json!({ "resultType": "complete", "_meta": { meta::SUBSCRIPTION_ID: request["id"] } });
    peer.answer(&request, &result.to_string()).await;
    let Some(Ok(Frame::Final(end))) = frames.next().await else { panic!("it ends") };
    assert_eq!(end.to_value().unwrap()["_meta"][meta::SUBSCRIPTION_ID], "mine");
    drop(other.await.unwrap().unwrap());
    let cancelled = peer.expect("notifications/cancelled").await;
    assert_eq!(cancelled["params"]["requestId"], another["id"]);
}

#[tokio::test]
async fn a_modern_peer_can_end_a_listen() {
    let (lines, mut peer) = modern().await;
    let answer = call(&lines, listen(json!({})));
    let request = peer.expect("subscriptions/listen").await;
    let params = json!({ "requestId": request["id"] });
    peer.say(json!({ "jsonrpc": "2.0", "method": "notifications/cancelled", "params": params }).to_string())
        .await;
    json_of(answer.await.unwrap().unwrap());
}

#[tokio::test]
async fn a_listen_keeps_no_connection_alive() {
    let (lines, mut peer) = modern().await;
    let answer = call(&lines, listen(json!({})));
    peer.expect("subscriptions/listen").await;
    drop(lines);
    assert!(answer.await.unwrap().is_err());
    assert!(peer.line().await.is_none());
}

#[tokio::test]
async fn a_call_keeps_its_connection_alive() {
    let (lines, mut peer) = modern().await;
    let answer = call(&lines, echo(1));
    let request = peer.expect("tools/call").await;
    drop(lines);
    peer.answer(&request, "{}").await;
    json_of(answer.await.unwrap().unwrap());
    assert!(peer.line().await.is_none());
}

#[tokio::test]
async fn a_legacy_peer_is_listened_to_as_far_as_it_can_speak() {
    let (lines, mut peer) = legacy().await;
    let uri = "file:///a";
    let filter =
        json!({ "toolsListChanged": true, "promptsListChanged": true, "resourceSubscriptions": [uri] });
    let answer = call(&lines, listen(filter.clone()));
    let subscribe = peer.expect("resources/subscribe").await;
    assert_eq!(subscribe["params"]["uri"], uri);
    peer.answer(&subscribe, "{}").await;
    let mut frames = frames_of(answer.await.unwrap().unwrap());
    let acknowledged = notification(&mut frames).await.params;
    assert_eq!(
        acknowledged.as_str(),
        json!({ "notifications": { "toolsListChanged": true, "resourceSubscriptions": [uri] } }).to_string()
    );

    // A second listener to the same resource costs nothing.
    let mut second = frames_of(lines.clone().call(listen(filter)).await.unwrap());
    notification(&mut second).await;
    for method in ["notifications/prompts/list_changed", "notifications/tools/list_changed"] {
        peer.say(format!(r#"{{"jsonrpc":"2.0","method":"{method}"}}"#)).await;
    }
    peer.say(r#"{"jsonrpc":"2.0","method":"notifications/resources/updated","params":{"uri":"file:///a"}}"#)
        .await;
    for frames in [&mut frames, &mut second] {
        assert_eq!(notification(frames).await.method, Method::ToolsChanged);
        assert_eq!(notification(frames).await.method, Method::ResourceUpdated);
    }
    drop(frames);
    peer.sync().await;
    drop(second);
    let unsubscribe = peer.expect("resources/unsubscribe").await;
    assert_eq!(unsubscribe["params"]["uri"], uri);
    peer.refuse(&unsubscribe, r#"{"code":-32000,"message":"never heard of it"}"#).await;
    peer.sync().await;
}

#[tokio::test]
async fn a_refused_subscription_is_not_acknowledged() {
    let (lines, mut peer) = legacy().await;
    let answer = call(&lines, listen(json!({ "resourceSubscriptions": ["file:///a"] })));
    let subscribe = peer.expect("resources/subscribe").await;
    peer.refuse(&subscribe, r#"{"code":-32002,"message":"no such resource"}"#).await;
    let mut frames = frames_of(answer.await.unwrap().unwrap());
    assert_eq!(notification(&mut frames).await.params.as_str(), r#"{"notifications":{}}"#);
}

#[tokio::test]
async fn changes_reach_the_listeners_even_in_the_middle_of_a_call() {
    let (lines, mut peer) = legacy().await;
    let mut frames =
        frames_of(lines.clone().call(listen(json!({ "toolsListChanged": true }))).await.unwrap());
    notification(&mut frames).await;
    let answer = call(&lines, echo(1));
    let request = peer.expect("tools/call").await;
    peer.say(r#"{"jsonrpc":"2.0","method":"notifications/tools/list_changed"}"#).await;
    peer.answer(&request, "{}").await;
    json_of(answer.await.unwrap().unwrap());
    assert_eq!(notification(&mut frames).await.method, Method::ToolsChanged);
    drop(peer);
    assert!(frames.next().await.is_none());
}

// === Finding the era ===

#[tokio::test]
async fn whoever_answers_discover_is_modern() {
    let (opening, mut peer) = probing(None);
    let discover = peer.expect("server/discover").await;
    assert_eq!(discover["params"]["_meta"][meta::PROTOCOL_VERSION], "2026-07-28");
    peer.answer(&discover, MODERN).await;
    assert!(matches!(opening.await.unwrap(), Ok((_, Opened::Modern))));
}

#[tokio::test]
async fn modern_errors_are_modern_and_others_are_legacy() {
    let supported = |versions: &str| {
        format!(
            r#"{{"code":-32022,"message":"?","data":{{"supported":{versions},"requested":"2026-07-28"}}}}"#
        )
    };
    for error in [supported(r#"["2026-07-28"]"#), r#"{"code":-32021,"message":"?","data":{}}"#.to_owned()] {
        let (opening, mut peer) = probing(None);
        let discover = peer.expect("server/discover").await;
        peer.refuse(&discover, &error).await;
        assert!(matches!(opening.await.unwrap(), Ok((_, Opened::Modern))), "{error}");
    }
    for error in [
        supported(r#"["2025-11-25"]"#),
        r#"{"code":-32022,"message":"?"}"#.to_owned(),
        r#"{"code":-32601,"message":"?"}"#.to_owned(),
        r#"{"code":0,"message":"?"}"#.to_owned(),
    ] {
        let (opening, mut peer) = probing(None);
        let discover = peer.expect("server/discover").await;
        peer.refuse(&discover, &error).await;
        let initialize = peer.expect("initialize").await;
        assert_eq!(initialize["params"]["capabilities"], json!({}));
        peer.answer(&initialize, LEGACY).await;
        assert!(matches!(opening.await.unwrap(), Ok((_, Opened::Legacy { .. }))), "{error}");
    }
    let (opening, mut peer) = probing(None);
    let discover = peer.expect("server/discover").await;
    peer.refuse(&discover, &supported(r#"["2030-01-01"]"#)).await;
    let Err(Unopened { error, probed: false }) = opening.await.unwrap() else { panic!("it cannot open") };
    assert!(error.source.to_string().contains("2030-01-01"));
}

#[tokio::test]
async fn a_legacy_peers_discover_result_is_made_of_its_initialize_result() {
    let (lines, _peer) = legacy().await;
    let result = lines.clone().call(McpRequest::bare(Method::Discover)).await.unwrap();
    let result = result.payload().to_value().unwrap();
    assert_eq!(result["supportedVersions"], json!(["2025-06-18"]));
    assert_eq!(result["instructions"], "be kind");
    assert_eq!(result["capabilities"]["tools"], json!({ "listChanged": true }));
}

#[tokio::test]
async fn a_modern_peer_answers_discover_itself() {
    let (lines, mut peer) = modern().await;
    let answer = call(&lines, McpRequest::bare(Method::Discover));
    let request = peer.expect("server/discover").await;
    peer.answer(&request, MODERN).await;
    assert_eq!(json_of(answer.await.unwrap().unwrap()), MODERN);
}

#[tokio::test(start_paused = true)]
async fn silence_is_legacy() {
    let (opening, mut peer) = probing(None);
    peer.expect("server/discover").await;
    let initialize = peer.expect("initialize").await;
    peer.answer(&initialize, LEGACY).await;
    assert!(matches!(opening.await.unwrap(), Ok((_, Opened::Legacy { .. }))));
    // And nothing is said of the question any more.
    peer.expect("notifications/initialized").await;
}

#[tokio::test(start_paused = true)]
async fn a_slow_modern_peer_is_still_found() {
    let (opening, mut peer) = probing(None);
    let discover = peer.expect("server/discover").await;
    let initialize = peer.expect("initialize").await;
    peer.answer(&discover, MODERN).await;
    peer.refuse(&initialize, r#"{"code":-32601,"message":"unknown method"}"#).await;
    assert!(matches!(opening.await.unwrap(), Ok((_, Opened::Modern))));
}

#[tokio::test(start_paused = true)]
async fn whoever_cannot_bear_the_question_is_to_be_started_again() {
    let (opening, mut peer) = probing(None);
    peer.expect("server/discover").await;
    drop(peer);
    assert!(matches!(opening.await.unwrap(), Err(Unopened { probed: true, .. })));

    let (opening, mut peer) = probing(None);
    peer.expect("server/discover").await;
    peer.expect("initialize").await;
    assert!(matches!(opening.await.unwrap(), Err(Unopened { probed: true, .. })));
    drop(peer);
}

proptest::proptest! {
    #[test]
    fn nothing_that_comes_in_panics(lines in proptest::collection::vec(r#"[\[\]{}",:a-z0-9\\ e.\-]{0,60}"#, 0..8)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let _inside = runtime.enter();
        let (calls, _outbox) = Calls::new("x".parse().unwrap());
        calls.belong_to(Arc::new(Owner::of(&legacy_client().0)));
        let ticket = calls.register(Some(Bytes::from_static(b"1")), Kind::Plain).unwrap();
        calls.begin_to_write(ticket.id());
        for (n, line) in lines.into_iter().enumerate() {
            let asks = format!(r#"{{"jsonrpc":"2.0","id":{},"method":"roots/list","params":{line}}}"#, n % 3);
            calls.receive(asks.into());
            calls.receive(line.into());
        }
    }
}
