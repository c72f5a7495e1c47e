//! Upstreams that speak over one channel: a program for each client session, a stream for each over HTTP+SSE, and what
//! happens when they go wrong.

use std::{
    collections::HashMap,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::RawQuery,
    http::{StatusCode, header},
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use futures_util::{StreamExt as _, future::join_all, stream};
use portcullis::{
    BoxError,
    app::{App, Settings},
    gateway::StatusKind,
    identity::{Affinity, Caller, Client, Principal, SessionToken},
    protocol::{Frame, McpRequest, Method, Params, Payload, Unsolicited},
    registry::{MemoryBackend, Registry, ServerRecord},
    server::{McpHttp, Server, mount},
    upstream::{Isolation, Transport, UpstreamSpec},
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::mpsc, task::JoinHandle};
use tower::{ServiceExt as _, util::MapRequestLayer};

use crate::{
    stage::{Answer, Legacy, META, Modern, PATIENCE, Request, Stream, eventually},
    support::Home,
};

/// The daemon's app with its door open.
struct House {
    app: App,
    address: SocketAddr,
    serving: JoinHandle<std::io::Result<()>>,
}

impl Drop for House {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl House {
    /// In front of these; not all of them may ever answer.
    async fn open<const N: usize>(servers: [(&str, UpstreamSpec); N]) -> House {
        let registry = Registry::open(Arc::new(MemoryBackend::new())).expect("an empty registry");
        let app = App::start(registry, Settings::default());
        for (name, spec) in servers {
            app.add(ServerRecord::new(name.parse().expect("a name"), spec)).await.expect("a new server");
        }
        let door = mount(McpHttp::new(app.service())).layer(MapRequestLayer::new(identify));
        let server = Server::bind(([127, 0, 0, 1], 0).into()).await.expect("a free port").lanes(2);
        let address = server.local_addr().expect("it is bound");
        let serving = tokio::spawn(server.serve(door, std::future::pending()));
        House { app, address, serving }
    }

    /// The same, when every server was tried.
    async fn with<const N: usize>(servers: [(&str, UpstreamSpec); N]) -> House {
        let house = House::open(servers).await;
        house.app.gateway().settled(PATIENCE).await;
        house
    }

    async fn legacy(&self) -> Legacy {
        Legacy::open(self.address, json!({ "elicitation": {}, "sampling": {}, "roots": {} })).await
    }

    fn modern(&self) -> Modern {
        Modern::of(self.address).declaring(json!({ "elicitation": {}, "sampling": {} }))
    }

    fn status(&self, name: &str) -> StatusKind {
        self.app.gateway().status()[&name.parse().expect("a name")].kind.clone()
    }
}

/// Whoever says who they are is believed.
fn identify(mut request: axum::extract::Request) -> axum::extract::Request {
    let user = request.headers().get("x-user").and_then(|user| user.to_str().ok()).map(str::to_owned);
    if let Some(user) = user {
        request.extensions_mut().insert(Principal::named(user));
    }
    request
}

/// The fixture server as a legacy child.
fn fixture(isolation: Isolation) -> UpstreamSpec {
    let test = std::env::current_exe().expect("this test has a path");
    let target = test.parent().and_then(|deps| deps.parent()).expect("it stands in target/<profile>/deps");
    let program: PathBuf = target.join("examples/fixture-server");
    let program = program.to_str().expect("UTF-8");
    UpstreamSpec { isolation, ..UpstreamSpec::stdio(program, ["stdio", "--legacy-only"]) }
}

fn script(script: &str) -> UpstreamSpec {
    UpstreamSpec::stdio("sh", ["-c", script])
}

fn elicit(message: &str) -> Value {
    json!({ "name": "fix_test_elicitation", "arguments": { "message": message } })
}

/// Answers everything that comes on a call's stream with what the question says, and gives the result.
async fn converse(client: &Legacy, mut call: Stream, seen: &mut Vec<String>) -> Value {
    loop {
        let message = call.next_json().await;
        if message["method"] != "elicitation/create" {
            assert!(message["result"].is_object(), "{message}");
            return message["result"].clone();
        }
        let asked = message["params"]["message"].as_str().expect("a message");
        let name = asked.strip_prefix("[fix] ").expect("the asking server is named");
        seen.push(name.to_owned());
        let content = json!({ "username": name, "email": "a@b" });
        client.answer(&message, json!({ "action": "accept", "content": content })).await;
    }
}

fn text(result: &Value) -> &str {
    result["content"][0]["text"].as_str().unwrap_or_else(|| panic!("no text: {result}"))
}

// === questions ===

#[tokio::test]
async fn clients_at_once_never_see_each_others_questions() {
    let house = House::with([("fix", fixture(Isolation::Session))]).await;
    let house = &house;
    let rounds = (0..4).map(|n| async move {
        let client = house.legacy().await;
        for round in 0..12 {
            let own = format!("client {n}, round {round}");
            let call = client.request("tools/call", elicit(&own)).open().await;
            let mut seen = Vec::new();
            let result = converse(&client, call, &mut seen).await;
            assert!(seen.iter().eq([&own]), "{seen:?}");
            assert!(text(&result).contains(&own), "{result}");
        }
    });
    join_all(rounds).await;
}

#[tokio::test]
async fn calls_of_one_client_at_once_are_all_answered() {
    let house = House::with([("fix", fixture(Isolation::Session))]).await;
    let client = &house.legacy().await;
    let calls = (0..6).map(|n| async move {
        let own = format!("call {n}");
        let call = client.request("tools/call", elicit(&own)).open().await;
        // The question of any of them may come on any stream of the client's.
        let result = converse(client, call, &mut Vec::new()).await;
        assert!(text(&result).contains(&own), "{result}");
    });
    join_all(calls).await;
}

fn asked(answer: &Answer) -> Option<(String, Value)> {
    let result = &answer.json()["result"];
    let message = result["inputRequests"]["q1"]["params"]["message"].as_str()?;
    Some((message.to_owned(), result["requestState"].clone()))
}

/// One question and its answer, of a modern client. `None` when it was refused.
async fn round(client: &Modern, user: &str, own: &str) -> Option<()> {
    let as_user = |request: Request| request.header("x-user", user);
    let first = as_user(client.request("tools/call", elicit(own))).send().await;
    let (message, state) = asked(&first)?;
    assert_eq!(message, format!("[fix] {own}"));
    let mut again = elicit(own);
    again["requestState"] = state;
    again["inputResponses"] = json!({ "q1": { "action": "accept", "content": { "username": own } } });
    let told = as_user(client.request("tools/call", again)).send().await;
    assert!(text(&told.result()).contains(own), "{told}");
    Some(())
}

#[tokio::test]
async fn modern_clients_of_several_users_are_asked_each_their_own() {
    let house = House::with([("fix", fixture(Isolation::Session))]).await;
    let client = &house.modern();
    let users = (0..4).map(|n| async move {
        let user = format!("user-{n}");
        for n in 0..8 {
            round(client, &user, &format!("{user}, round {n}")).await.expect("nobody else is meant");
        }
    });
    join_all(users).await;
}

#[tokio::test]
async fn modern_clients_of_one_user_are_asked_their_own_or_nothing() {
    let house = House::with([("fix", fixture(Isolation::Session))]).await;
    let client = &house.modern();
    let clients = (0..4).map(|n| async move {
        let mut answered = 0;
        for round_of in 0..12 {
            answered += usize::from(round(client, "ann", &format!("{n}/{round_of}")).await.is_some());
            if round_of % 3 == 0 {
                // One that is given up in the middle: what it asks must not reach the others.
                let call = client.request("tools/call", elicit("given up")).header("x-user", "ann").send();
                let _ = tokio::time::timeout(Duration::from_millis(1), call).await;
            }
        }
        answered
    });
    join_all(clients).await;
    let answer = client.request("tools/call", elicit("alone")).header("x-user", "bob").send().await;
    assert_eq!(asked(&answer).expect("there is no doubt").0, "[fix] alone");
}

#[tokio::test]
async fn a_child_that_everybody_shares_can_ask_nobody() {
    let house = House::with([("fix", fixture(Isolation::Shared))]).await;
    let client = house.legacy().await;
    let answer = client.ask("tools/call", elicit("anybody?")).await;
    assert!(answer.error()["message"].as_str().expect("words").contains("does not support"), "{answer}");
}

#[tokio::test]
async fn a_forged_state_is_refused_before_the_child_sees_it() {
    for isolation in [Isolation::Shared, Isolation::Session] {
        let house = House::with([("fix", fixture(isolation))]).await;
        let mut forged = elicit("x");
        forged["requestState"] = json!("forged");
        forged["inputResponses"] = json!({ "answer": { "action": "accept", "content": {} } });
        let message = "`requestState` is not known here or has expired: call again without it";
        let answer = house.modern().ask("tools/call", forged.clone()).await;
        assert_eq!(answer.error()["message"], message, "{answer}");
        let answer = house.legacy().await.ask("tools/call", forged).await;
        assert_eq!(answer.error()["message"], message, "{answer}");
    }
}

// === sessions ===

#[tokio::test]
async fn each_session_has_its_own_state_name_and_log_level() {
    let house = House::with([("fix", fixture(Isolation::Session))]).await;
    let (ann, bob) = (house.legacy().await, house.legacy().await);
    let read = json!({ "uri": "test://watched-resource" });
    ann.call("fix_update_resource", json!({ "uri": "test://watched-resource" })).await.result();
    let version = |answer: Answer| answer.result()["contents"][0]["text"].clone();
    assert_eq!(version(ann.ask("resources/read", read.clone()).await), "version 1");
    assert_eq!(version(bob.ask("resources/read", read.clone()).await), "version 0");

    let seen = ann.call("fix_seen", json!({})).await.result();
    assert_eq!(seen["structuredContent"]["client"]["name"], "story", "{seen}");

    ann.ask("logging/setLevel", json!({ "level": "error" })).await.result();
    bob.ask("logging/setLevel", json!({ "level": "debug" })).await.result();
    for (client, messages) in [(&ann, 1), (&bob, 4), (&ann, 1)] {
        let answer = client.call("fix_test_logging_tool", json!({})).await;
        assert_eq!(answer.messages().len(), messages + 1, "{answer}");
    }

    // One that dies is nobody else's loss.
    let died = ann.call("fix_die", json!({ "code": 1 })).await.result();
    assert_eq!(died["structuredContent"]["code"], "unavailable", "{died}");
    assert_eq!(version(bob.ask("resources/read", read).await), "version 0");
    assert_eq!(house.status("fix"), StatusKind::Up);
}

/// A legacy server in a few words, which notes its process id.
fn noting(path: &std::path::Path, isolation: Isolation) -> UpstreamSpec {
    let path = path.display();
    let program = format!(
        r#"echo $$ >> {path}
say() {{ printf '{{"jsonrpc":"2.0","id":%s,%s}}\n' "$(printf '%s' "$line" | sed 's/.*"id":\([0-9]*\).*/\1/')" "$1"; }}
while read -r line; do case "$line" in
  *server/discover*) say '"error":{{"code":-32601,"message":"unknown"}}' ;;
  *'"initialize"'*) say '"result":{{"protocolVersion":"2025-11-25","capabilities":{{"tools":{{}}}}}}' ;;
  *notifications/*) ;;
  *tools/list*) say '"result":{{"tools":[{{"name":"pid","inputSchema":{{"type":"object"}}}}]}}' ;;
  *) say "\"result\":{{\"content\":[{{\"type\":\"text\",\"text\":\"$$\"}}]}}" ;;
esac; done"#
    );
    UpstreamSpec { isolation, ..script(&program) }
}

fn is_running(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

#[tokio::test]
async fn a_session_takes_its_child_along_and_a_shutdown_all() {
    let folder = tempfile::tempdir().expect("a folder");
    let notes = folder.path().join("pids");
    let house = House::with([("p", noting(&notes, Isolation::Session))]).await;
    let (ann, bob) = (house.legacy().await, house.legacy().await);
    let modern = house.modern();
    let pid = |answer: Answer| answer.content();
    let (first, second) = (pid(ann.call("p_pid", json!({})).await), pid(bob.call("p_pid", json!({})).await));
    let third = pid(modern.call("p_pid", json!({})).await);
    let fourth = pid(Modern::of(house.address).call("p_pid", json!({})).await);
    assert_eq!(pid(ann.call("p_pid", json!({})).await), first);
    assert_eq!(pid(modern.call("p_pid", json!({})).await), third);
    let all = [&first, &second, &third, &fourth];
    assert!(all.iter().all(|pid| all.iter().filter(|other| other == &pid).count() == 1), "{all:?}");
    ann.end().await;
    eventually("the session's child is gone", async || !is_running(&first)).await;
    assert!([&second, &third, &fourth].into_iter().all(|pid| is_running(pid)));
    house.app.shutdown().await;
    let started = std::fs::read_to_string(&notes).expect("notes");
    assert!(started.lines().all(|pid| !is_running(pid)), "{started}");
    assert_eq!(started.lines().count(), 4 + usize::from(!started.contains(&fourth)), "{started}");
}

#[tokio::test]
async fn there_are_not_endlessly_many_children() {
    let folder = tempfile::tempdir().expect("a folder");
    let house = House::with([("p", noting(&folder.path().join("pids"), Isolation::Session))]).await;
    let clients = join_all((0..65).map(|_| house.legacy())).await;
    for client in &clients[..64] {
        client.call("p_pid", json!({})).await.content();
    }
    let listening = clients[64].listen().await;
    let refused = clients[64].call("p_pid", json!({})).await.result();
    assert_eq!(refused["structuredContent"]["code"], "overloaded", "{refused}");
    clients[0].end().await;
    clients[64].call("p_pid", json!({})).await.content();
    // The gateway's own is not one of them.
    assert!(house.app.gateway().refresh(&"p".parse().expect("a name")).await.is_ok());
    drop(listening);
    house.app.shutdown().await;
}

// === going wrong ===

#[tokio::test]
async fn whoever_starts_slowly_or_never_delays_nobody_else() {
    let folder = tempfile::tempdir().expect("a folder");
    let slow = script("sleep 5; exec sleep 1000");
    let house = House::open([
        ("slow", slow),
        ("mute", script("exec sleep 1000")),
        ("p", noting(&folder.path().join("pids"), Isolation::Session)),
    ])
    .await;
    eventually("the third is up", async || house.status("p") == StatusKind::Up).await;
    house.modern().call("p_pid", json!({})).await.content();
    house.legacy().await.call("p_pid", json!({})).await.content();
    for name in ["slow", "mute"] {
        assert_eq!(house.status(name), StatusKind::Connecting);
    }
}

#[test]
fn a_program_that_fails_again_and_again_is_said_to_in_one_sentence() {
    let home = Home::new();
    let _daemon = home.serve(&[]);
    home.ok(&["add", "loop", "--", "sh", "-c", "echo s3cret >&2; exit 3"]);
    let error = || home.json(&["list"])[0]["error"].as_str().unwrap_or_default().to_owned();
    let tripped = (0..200).any(|_| {
        std::thread::sleep(Duration::from_millis(100));
        error().contains("times in a row")
    });
    let said = error();
    assert!(tripped, "{said}");
    assert!(said.contains("it failed ") && said.contains(", and is not tried again before "), "{said}");
    assert!(said.contains("the last time: its process ended: exit status: 3"), "{said}");
    assert!(!said.contains("s3cret") && !said.contains('\n'), "{said}");
    let shown = home.run(&["list"]);
    assert!(shown.stderr.contains("`loop` is down: ") && shown.stderr.contains(" UTC"), "{}", shown.stderr);
}

// === HTTP+SSE ===

type Streams = Arc<Mutex<HashMap<u64, mpsc::UnboundedSender<Value>>>>;

/// A server of 2024-11-05 that has many sessions. `ask` asks within the call, `later` when it is over.
async fn sse_server() -> (UpstreamSpec, Streams) {
    let streams = Streams::default();
    let (open, take) = (streams.clone(), streams.clone());
    let app = Router::new().route("/sse", get(move || std::future::ready(sse_stream(&open)))).route(
        "/messages",
        post(move |RawQuery(query): RawQuery, body: Bytes| {
            let session = query.and_then(|query| query.strip_prefix("session=")?.parse().ok());
            std::future::ready(sse_answer(&take, session.expect("a session"), &body))
        }),
    );
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("http://{}/sse", listener.local_addr().expect("a bound port"));
    tokio::spawn(async move { axum::serve(listener, app).await });
    (UpstreamSpec::new(Transport::Sse { url, headers: Default::default() }), streams)
}

fn sse_stream(streams: &Streams) -> Response {
    let (sender, receiver) = mpsc::unbounded_channel::<Value>();
    let mut open = streams.lock().expect("no panic");
    let session = open.keys().max().unwrap_or(&0) + 1;
    open.insert(session, sender);
    let first = format!("event: endpoint\ndata: /messages?session={session}\n\n");
    let messages = stream::unfold(receiver, |mut receiver| async {
        let message = receiver.recv().await?;
        Some((Ok::<_, BoxError>(format!("data: {message}\n\n")), receiver))
    });
    let body = Body::from_stream(stream::iter([Ok(first)]).chain(messages));
    ([(header::CONTENT_TYPE, "text/event-stream")], body).into_response()
}

fn sse_answer(streams: &Streams, session: u64, body: &[u8]) -> StatusCode {
    let message: Value = serde_json::from_slice(body).expect("messages are JSON");
    let say = |message: Value| {
        let _ = streams.lock().expect("no panic")[&session].send(message);
    };
    let result = |result: Value| say(json!({ "jsonrpc": "2.0", "id": message["id"], "result": result }));
    let ask = |id: Value| {
        let asked = json!({ "message": message["params"]["arguments"]["message"], "requestedSchema": {} });
        say(json!({ "jsonrpc": "2.0", "id": id, "method": "elicitation/create", "params": asked }));
    };
    let told = |what: &Value| json!({ "content": [{ "type": "text", "text": what.to_string() }] });
    match message["method"].as_str() {
        Some("initialize") => {
            let info = json!({ "name": "old", "version": "1" });
            result(
                json!({ "protocolVersion": "2024-11-05", "capabilities": { "tools": {} }, "serverInfo": info }),
            );
        }
        Some("tools/list") => result(json!({ "tools": [{ "name": "ask" }, { "name": "later" }] })),
        // The call's id is in the question's.
        Some("tools/call") if message["params"]["name"] == "ask" => ask(json!(format!("q{}", message["id"]))),
        Some("tools/call") => {
            result(told(&json!("asked later")));
            ask(json!("later"));
        }
        Some(_) => {}
        // It has forgotten that it asked.
        None if message["id"] == "later" => return StatusCode::BAD_REQUEST,
        None => {
            let call = message["id"].as_str().and_then(|id| id.strip_prefix('q')?.parse::<u64>().ok());
            say(
                json!({ "jsonrpc": "2.0", "id": call, "result": told(&message["result"]["content"]["own"]) }),
            );
        }
    }
    StatusCode::ACCEPTED
}

#[tokio::test]
async fn an_sse_server_has_a_stream_for_each_client_and_asks_it() {
    let (spec, streams) = sse_server().await;
    let house = House::with([("sse", spec)]).await;
    let rounds = (0..4).map(|n| {
        let house = &house;
        async move {
            let client = house.legacy().await;
            for round in 0..8 {
                let own = format!("{n}/{round}");
                let call = json!({ "name": "sse_ask", "arguments": { "message": own } });
                let mut call = client.request("tools/call", call).open().await;
                let question = call.until("elicitation/create").await;
                assert_eq!(question["params"]["message"], format!("[sse] {own}"));
                client.answer(&question, json!({ "action": "accept", "content": { "own": own } })).await;
                assert_eq!(text(&call.next_json().await["result"]), format!("\"{own}\""));
            }
            client.end().await;
        }
    });
    join_all(rounds).await;
    eventually("only the gateway's own stream is left", async || {
        streams.lock().expect("no panic").values().filter(|stream| !stream.is_closed()).count() == 1
    })
    .await;
}

#[tokio::test]
async fn what_is_asked_outside_of_calls_reaches_the_session_that_listens() {
    let (spec, streams) = sse_server().await;
    let house = House::with([("sse", spec)]).await;
    let caller = || {
        let token = SessionToken::new();
        let client = Client { capabilities: r#"{"elicitation":{}}"#.into(), ..Client::gateway() };
        let affinity = Affinity::Session(token);
        Arc::new(Caller { client, affinity, ..(*Caller::anonymous()).clone() })
    };
    let (ann, bob) = (caller(), caller());
    let listen = async |caller: &Arc<Caller>| {
        let mut request = McpRequest::bare(Method::Listen).with_caller(caller.clone());
        request.extensions_mut().insert(Unsolicited);
        match house.app.service().oneshot(request).await.expect("a stream").into_payload() {
            Payload::Stream(frames) => frames,
            other => panic!("no stream: {other:?}"),
        }
    };
    let (mut of_ann, mut of_bob) = (listen(&ann).await, listen(&bob).await);
    assert_eq!(streams.lock().expect("no panic").len(), 1, "to listen opens no session");
    for (caller, name) in [(&ann, "ann"), (&bob, "bob"), (&ann, "ann")] {
        let call = json!({ "name": "sse_later", "arguments": { "message": name } });
        let call = McpRequest::new(Method::ToolsCall, Params::from_value(&call)).with_caller(caller.clone());
        house
            .app
            .service()
            .oneshot(call)
            .await
            .expect("an answer")
            .into_payload()
            .settle()
            .await
            .expect("a result");
        let frames = if name == "ann" { &mut of_ann } else { &mut of_bob };
        loop {
            match tokio::time::timeout(PATIENCE, frames.next()).await.expect("a frame in time") {
                Some(Ok(Frame::Notification(_))) => {}
                Some(Ok(Frame::Request(question))) => {
                    let message = question.params.get_string("message").expect("a message");
                    assert_eq!(message, format!("[sse] {name}"));
                    question.reply.send(Payload::Raw(r#"{"action":"decline"}"#.into()));
                    break;
                }
                other => panic!("it ended: {other:?}"),
            }
        }
    }
    assert_eq!(streams.lock().expect("no panic").len(), 3, "an answer that is refused ends no session");
}

/// The message that `META` is for stays one line, whatever a client puts between its tokens.
#[tokio::test]
async fn a_client_cannot_smuggle_a_message_past_the_rules() {
    let house = House::open([]).await;
    let mut record = ServerRecord::new("fix".parse().expect("a name"), fixture(Isolation::Shared));
    record.rules.deny = vec!["add_tool".to_owned()];
    house.app.add(record).await.expect("a new server");
    house.app.gateway().settled(PATIENCE).await;
    let smuggled = r#"{"jsonrpc":"2.0","id":99,"method":"tools/call","params":{"name":"add_tool","arguments":{"name":"smuggled"}}}"#;
    let body = format!(
        "{{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"tools/call\",\"params\":{{\"name\":\"fix_echo\",\"arguments\":{{\"a\":\n{smuggled}\n}},\"_meta\":{META}}}}}"
    );
    let client = house.modern();
    let answer = client.raw("tools/call", body).header("mcp-name", "fix_echo").send().await;
    assert_eq!(answer.result()["structuredContent"]["a"]["id"], 99, "{answer}");
    house.app.gateway().refresh(&"fix".parse().expect("a name")).await.expect("it is up");
    assert!(!client.tools().await.contains(&"fix_smuggled".to_owned()));
}
