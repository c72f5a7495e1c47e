//! The other doors: stdin and stdout of the binary, HTTP+SSE, and what all doors have in common.

use std::{path::Path, process::Stdio, sync::Arc, time::Duration};

use futures_util::{StreamExt as _, stream};
use http::Method;
use portcullis::{
    BoxError, McpService,
    protocol::{
        Frame, McpRequest, McpResponse, Method as Mcp, Notification, Params, Payload, Reply, ServerRequest,
    },
    server::{McpStdio, Options, Server},
    upstream::SseUpstream,
};
use rmcp::{
    ClientLifecycleMode, ClientServiceExt as _,
    model::{CallToolRequestParams, ProtocolVersion, SubscriptionFilter},
    transport::TokioChildProcess,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    process::{Child, ChildStdin, ChildStdout},
    sync::mpsc,
    time::timeout,
};
use tower::ServiceExt as _;

use crate::{
    stage::{
        Fixture, Gateway, Legacy, META, PATIENCE, Probe, Request, Stream, Upstream, eventually, open_events,
    },
    support::Home,
};

// === stdin and stdout ===

/// `portcullis stdio` as a client starts it.
struct Program {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Program {
    fn start(home: &Home, args: &[&str]) -> Program {
        let mut command = home.command(&[&["stdio"], args].concat());
        command
            .env("PORTCULLIS_LOG", "trace")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut child =
            tokio::process::Command::from(command).kill_on_drop(true).spawn().expect("the binary runs");
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().expect("it is piped"));
        Program { child, stdin, stdout }
    }

    /// In front of these: a name and a URL each.
    fn with(home: &Home, upstreams: &[(&str, String)]) -> Program {
        let servers: serde_json::Map<String, Value> =
            upstreams.iter().map(|(name, url)| ((*name).to_owned(), json!({ "url": url }))).collect();
        let file = home.write("mcp.json", &json!({ "mcpServers": servers }).to_string());
        Program::start(home, &["--config", file.to_str().expect("a path")])
    }

    async fn say(&mut self, line: impl AsRef<str>) {
        let stdin = self.stdin.as_mut().expect("it is open");
        stdin.write_all(format!("{}\n", line.as_ref()).as_bytes()).await.expect("it listens");
    }

    async fn send(&mut self, message: Value) {
        self.say(message.to_string()).await;
    }

    async fn legacy(&mut self, id: u64, method: &str, params: Value) {
        self.send(json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params })).await;
    }

    async fn modern(&mut self, id: u64, method: &str, mut params: Value) {
        let mut meta: Value = serde_json::from_str(META).expect("JSON");
        for (key, value) in params["_meta"].as_object().into_iter().flatten() {
            meta[key] = value.clone();
        }
        params["_meta"] = meta;
        self.legacy(id, method, params).await;
    }

    async fn notify(&mut self, method: &str, params: Value) {
        self.send(json!({ "jsonrpc": "2.0", "method": method, "params": params })).await;
    }

    /// The next line, which is a message. `None` at the end.
    async fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        let read = timeout(PATIENCE, self.stdout.read_line(&mut line)).await;
        (read.expect("a line in time").expect("UTF-8") > 0).then_some(line)
    }

    async fn next(&mut self) -> Value {
        let line = self.line().await.expect("one more line");
        let message: Value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"));
        assert_eq!(message["jsonrpc"], "2.0", "{line}");
        message
    }

    async fn answer(&mut self, id: u64) -> Value {
        loop {
            let message = self.next().await;
            if message["id"] == id && message["method"].is_null() {
                return message;
            }
        }
    }

    async fn until(&mut self, method: &str) -> Value {
        loop {
            let message = self.next().await;
            if message["method"] == method {
                return message;
            }
        }
    }

    /// Opens a session.
    async fn initialize(&mut self, capabilities: Value) -> Value {
        self.say(Legacy::initialize("2025-11-25", capabilities)).await;
        let answer = self.answer(0).await;
        self.notify("notifications/initialized", json!({})).await;
        answer
    }

    fn signal(&self, signal: &str) {
        let pid = self.child.id().expect("it runs").to_string();
        let sent = std::process::Command::new("kill").args([signal, &pid]).status();
        assert!(sent.expect("kill runs").success());
    }

    /// Closes stdin and reads the rest; gives that and the exit code.
    async fn close(mut self) -> (String, Option<i32>) {
        self.stdin = None;
        self.ended().await
    }

    async fn ended(&mut self) -> (String, Option<i32>) {
        let mut rest = String::new();
        let ended = async {
            self.stdout.read_to_string(&mut rest).await.expect("UTF-8");
            self.child.wait().await.expect("it is ours").code()
        };
        let code = timeout(PATIENCE, ended).await.expect("an end in time");
        (rest, code)
    }
}

#[tokio::test]
async fn a_legacy_client_has_the_whole_gateway_on_stdio() {
    for fixture in [Fixture::legacy().await, Fixture::modern().await] {
        let home = Home::new();
        let mut client = Program::with(&home, &[("fix", fixture.url())]);
        let initialized = client.initialize(json!({ "elicitation": {} })).await;
        assert_eq!(initialized["result"]["protocolVersion"], "2025-11-25");

        client.legacy(1, "tools/list", json!({})).await;
        assert!(client.answer(1).await["result"]["tools"].to_string().contains("fix_test_elicitation"));
        let params = json!({ "name": "fix_test_elicitation", "arguments": { "message": "Who?" } });
        client.legacy(2, "tools/call", params).await;
        let question = client.until("elicitation/create").await;
        let form = json!({ "action": "accept", "content": { "username": "ann", "email": "a@b.c" } });
        client.send(json!({ "jsonrpc": "2.0", "id": question["id"], "result": form })).await;
        assert!(client.answer(2).await["result"]["content"][0]["text"].to_string().contains("a@b.c"));

        let params = json!({ "name": "fix_test_tool_with_progress", "_meta": { "progressToken": "p" } });
        client.legacy(3, "tools/call", params).await;
        assert_eq!(client.until("notifications/progress").await["params"]["progressToken"], "p");
        client.answer(3).await;
        // Changes come by themselves.
        client.legacy(4, "tools/call", json!({ "name": "fix_add_tool", "arguments": { "name": "x" } })).await;
        client.until("notifications/tools/list_changed").await;
        let (_, code) = client.close().await;
        assert_eq!(code, Some(0));
    }
}

#[tokio::test]
async fn a_modern_client_has_the_whole_gateway_on_stdio() {
    let fixture = Fixture::modern().await;
    let home = Home::new();
    let mut client = Program::with(&home, &[("fix", fixture.url())]);
    client.modern(1, "server/discover", json!({})).await;
    let discovered = client.answer(1).await;
    assert!(discovered["result"]["supportedVersions"].to_string().contains("2026-07-28"));
    client.modern(2, "tools/call", json!({ "name": "fix_echo", "arguments": { "text": "hi" } })).await;
    assert_eq!(client.answer(2).await["result"]["resultType"], "complete");

    // A question the client did not declare to answer stays away from it.
    let params = json!({ "name": "fix_test_input_required_result_request_state", "arguments": {} });
    client.modern(3, "tools/call", params).await;
    assert_eq!(client.answer(3).await["error"]["code"], -32021);
    client.modern(4, "ping", json!({})).await;
    assert_eq!(client.answer(4).await["error"]["code"], -32601);
    client.send(json!({ "jsonrpc": "2.0", "id": 5, "method": "server/discover" })).await;
    assert_eq!(client.answer(5).await["error"]["code"], -32602);
    client.send(json!({ "jsonrpc": "2.0", "id": 6, "method": "tools/list" })).await;
    assert_eq!(client.answer(6).await["error"]["code"], -32600);
}

#[tokio::test]
async fn a_subscription_on_stdio_ends_without_a_word_or_with_the_right_ones() {
    let fixture = Fixture::modern().await;
    let home = Home::new();
    let mut client = Program::with(&home, &[("fix", fixture.url())]);
    let filter = json!({ "notifications": { "toolsListChanged": true } });
    for id in [7, 8] {
        client.modern(id, "subscriptions/listen", filter.clone()).await;
        let first = client.until("notifications/subscriptions/acknowledged").await;
        assert_eq!(first["params"]["_meta"]["io.modelcontextprotocol/subscriptionId"], id);
    }
    client.notify("notifications/cancelled", json!({ "requestId": 7 })).await;
    client.modern(9, "tools/call", json!({ "name": "fix_add_tool", "arguments": { "name": "x" } })).await;
    let told = client.until("notifications/tools/list_changed").await;
    assert_eq!(told["params"]["_meta"]["io.modelcontextprotocol/subscriptionId"], 8, "7 is over");
    let (rest, code) = client.close().await;
    let rest = rest.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    // The call's own answer comes when it comes.
    let rest: Vec<Value> = rest.filter(|message| message["id"] != 9).collect();
    assert!(rest.iter().all(|m| !m.to_string().contains(r#"subscriptionId":7"#)), "{rest:?}");
    let [.., cancelled, last] = &rest[..] else { panic!("{rest:?}") };
    assert_eq!(
        (&cancelled["method"], &cancelled["params"]["requestId"]),
        (&json!("notifications/cancelled"), &json!(8))
    );
    assert_eq!((&last["id"], &last["result"]["resultType"]), (&json!(8), &json!("complete")));
    assert_eq!(last["result"]["_meta"]["io.modelcontextprotocol/subscriptionId"], 8);
    assert_eq!(code, Some(0));
}

#[tokio::test]
async fn a_cancelled_call_on_stdio_ends_at_the_upstream_and_is_not_answered() {
    let probe = Probe::default();
    let inside = probe.clone();
    let script = Upstream::modern().tool("t").on("tools/call", move |_| {
        let inside = inside.enter();
        async move {
            let _inside = inside;
            std::future::pending().await
        }
    });
    let upstream = script.start().await;
    let home = Home::new();
    let mut client = Program::with(&home, &[("up", upstream.url())]);
    client.initialize(json!({})).await;
    client.legacy(1, "tools/call", json!({ "name": "up_t" })).await;
    client.modern(2, "tools/call", json!({ "name": "up_t" })).await;
    eventually("both are under way", async || probe.has_begun() == 2).await;
    client.legacy(1, "tools/call", json!({ "name": "up_t" })).await;
    assert_eq!(client.next().await["error"]["code"], -32600, "the id is taken");
    for id in [1, 2] {
        client.notify("notifications/cancelled", json!({ "requestId": id })).await;
    }
    eventually("both are over", async || probe.is_over() == 2).await;
    client.legacy(3, "ping", json!({})).await;
    assert_eq!(client.next().await["id"], 3, "nothing was said about the others");
    // A cancellation right behind its request finds it.
    client.legacy(4, "tools/call", json!({ "name": "up_t" })).await;
    client.notify("notifications/cancelled", json!({ "requestId": 4 })).await;
    client.legacy(5, "ping", json!({})).await;
    assert_eq!(client.next().await["id"], 5);
    let (rest, code) = client.close().await;
    assert_eq!((rest.as_str(), code), ("", Some(0)));
}

#[tokio::test]
async fn what_is_no_message_is_refused_and_the_next_line_is_read() {
    let home = Home::new();
    let mut client = Program::with(&home, &[]);
    let long = format!(r#"{{"jsonrpc":"2.0","id":1,"method":"ping","x":"{}"}}"#, "x".repeat(4 << 20));
    for (line, code) in [
        ("{", -32700),
        ("hello", -32700),
        ("\u{1}", -32700),
        (r#"[{"jsonrpc":"2.0","id":1,"method":"ping"}]"#, -32600),
        (r#"{"jsonrpc":"1.0","method":"x"}"#, -32600),
        (r#"{"jsonrpc":"2.0","method":"tools/list"}"#, -32600),
        (&long, -32600),
    ] {
        client.say(line).await;
        let refusal = client.next().await;
        assert_eq!(refusal["error"]["code"], code, "{refusal}");
        assert!(refusal["id"].is_null() && refusal.get("id").is_some());
    }
    client.say("\r").await;
    client.legacy(1, "ping", json!({})).await;
    assert_eq!(client.next().await["result"], json!({}));
}

#[tokio::test]
async fn everything_at_once_and_then_the_end_is_answered() {
    let fixture = Fixture::modern().await;
    let home = Home::new();
    let mut client = Program::with(&home, &[("fix", fixture.url())]);
    client.say(Legacy::initialize("2025-06-18", json!({}))).await;
    client.notify("notifications/initialized", json!({})).await;
    client.legacy(1, "tools/list", json!({})).await;
    client.legacy(2, "tools/call", json!({ "name": "fix_slow", "arguments": { "ms": 300 } })).await;
    let (said, code) = client.close().await;
    assert_eq!(code, Some(0));
    for id in [0, 1, 2] {
        assert!(
            said.lines().any(|line| serde_json::from_str::<Value>(line).expect("JSON")["id"] == id),
            "{said}"
        );
    }
}

#[tokio::test]
async fn a_signal_ends_it_in_good_order() {
    let home = Home::new();
    let pid_file = home.write("pid", "");
    let script = format!("echo $$ > {}; while read -r line; do :; done", pid_file.display());
    let servers = json!({ "mcpServers": { "mute": { "command": "sh", "args": ["-c", script] } } });
    let file = home.write("mcp.json", &servers.to_string());
    let mut client = Program::start(&home, &["--config", file.to_str().expect("a path")]);
    let pid = || std::fs::read_to_string(&pid_file).expect("a file").trim().to_owned();
    eventually("the child runs", async || !pid().is_empty()).await;
    client.legacy(1, "ping", json!({})).await;
    client.answer(1).await;
    client.signal("-TERM");
    let (rest, code) = client.ended().await;
    assert_eq!((rest.as_str(), code), ("", Some(0)));
    assert!(!Path::new("/proc").join(pid()).exists(), "its children are gone before it is");
}

#[tokio::test]
async fn with_a_daemon_running_it_is_the_daemon_that_is_spoken_with() {
    let home = Home::new();
    let daemon = home.serve(&["--demo"]);
    let (mut one, mut two) = (Program::start(&home, &[]), Program::start(&home, &[]));
    one.initialize(json!({})).await;
    one.legacy(1, "tools/call", json!({ "name": "notes_add", "arguments": { "text": "from stdio" } })).await;
    assert!(one.answer(1).await["result"]["content"].is_array());
    two.modern(1, "tools/call", json!({ "name": "notes_search", "arguments": { "query": "stdio" } })).await;
    assert!(two.answer(1).await["result"].to_string().contains("from stdio"), "it is one gateway");
    assert!(home.ok(&["call", "notes_search", "query=stdio"]).contains("from stdio"));
    // A change through the daemon is told.
    home.ok(&["disable", "clock"]);
    one.until("notifications/tools/list_changed").await;

    let (rest, code) = two.close().await;
    assert_eq!((rest.as_str(), code), ("", Some(0)));
    one.signal("-TERM");
    assert_eq!(one.ended().await.1, Some(0));
    let mut three = Program::start(&home, &[]);
    three.modern(1, "server/discover", json!({})).await;
    three.answer(1).await;
    daemon.kill();
    assert_eq!(three.ended().await.1, Some(1), "a client must notice");

    let daemon = home.serve(&["--demo"]);
    let mut four = Program::start(&home, &[]);
    four.modern(1, "subscriptions/listen", json!({ "notifications": { "toolsListChanged": true } })).await;
    four.until("notifications/subscriptions/acknowledged").await;
    assert_eq!(daemon.end("-TERM"), Some(0));
    let (rest, code) = four.ended().await;
    assert!(rest.contains("notifications/cancelled") && rest.contains(r#""id":1,"result""#), "{rest}");
    assert_eq!(code, Some(1));
}

#[tokio::test]
async fn a_daemon_that_ends_answers_its_stdio_clients_first() {
    let fixture = Fixture::modern().await;
    let home = Home::new();
    home.ok(&["add", "fix", &fixture.url()]);
    let daemon = home.serve(&[]);
    let mut client = Program::start(&home, &[]);
    client.modern(1, "tools/list", json!({})).await;
    client.answer(1).await;
    client.modern(2, "tools/call", json!({ "name": "fix_slow", "arguments": { "ms": 400 } })).await;
    client.modern(3, "server/discover", json!({})).await;
    client.answer(3).await;
    assert_eq!(daemon.end("-TERM"), Some(0));
    assert!(client.answer(2).await["result"].is_object());
    assert_eq!(client.ended().await.1, Some(1));
}

#[tokio::test]
async fn without_a_daemon_the_registry_stays_free_for_others() {
    let fixture = Fixture::modern().await;
    let home = Home::new();
    home.ok(&["add", "fix", &fixture.url(), "--deny", "echo"]);
    let (mut one, mut two) = (Program::start(&home, &[]), Program::start(&home, &[]));
    for client in [&mut one, &mut two] {
        client.modern(1, "tools/list", json!({})).await;
        let tools = client.answer(1).await.to_string();
        assert!(tools.contains("fix_slow") && !tools.contains("fix_echo"), "rules hold");
    }
    home.ok(&["add", "more", "http://127.0.0.1:9/"]);
    let daemon = home.serve(&[]);
    assert_eq!(daemon.end("-TERM"), Some(0));
    assert_eq!(one.close().await.1, Some(0));
    assert_eq!(two.close().await.1, Some(0));
}

#[tokio::test]
async fn what_goes_wrong_at_the_start_is_said_on_stderr() {
    let home = Home::new();
    let said = home.fails(2, &["stdio", "--config", "/nowhere.json"]);
    assert_eq!(said, "error: /nowhere.json: cannot be read: No such file or directory (os error 2)");
}

#[tokio::test]
async fn a_service_that_panics_leaves_nobody_waiting() {
    let service = tower::service_fn(|_: McpRequest| async { panic!("no") });
    let service = service.map_err(|never: BoxError| never).map_response(|never: McpResponse| never);
    let (mut client, server) = tokio::io::duplex(4096);
    let (input, output) = tokio::io::split(server);
    let serving = tokio::spawn(McpStdio::new(service).serve(input, output, std::future::pending()));
    let call = format!(r#"{{"jsonrpc":"2.0","id":1,"method":"tools/list","params":{{"_meta":{META}}}}}"#);
    client.write_all(format!("{call}\n").as_bytes()).await.expect("it listens");
    client.shutdown().await.expect("it is open");
    let mut said = String::new();
    timeout(PATIENCE, client.read_to_string(&mut said)).await.expect("in time").expect("UTF-8");
    assert!(said.contains("-32603") && said.lines().count() == 1, "{said}");
    serving.await.expect("no panic here").expect("a good end");
}

#[tokio::test]
async fn a_client_has_only_so_much_under_way() {
    let service = tower::service_fn(|_: McpRequest| std::future::pending::<Result<McpResponse, BoxError>>());
    let (client, server) = tokio::io::duplex(4096);
    let (input, output) = tokio::io::split(server);
    let door = McpStdio::new(service).most_requests(2).grace(Duration::from_millis(50));
    let serving = tokio::spawn(door.serve(input, output, std::future::pending()));
    let (said, mut say) = tokio::io::split(client);
    for id in 1..=3 {
        let call =
            format!(r#"{{"jsonrpc":"2.0","id":{id},"method":"tools/list","params":{{"_meta":{META}}}}}"#);
        say.write_all(format!("{call}\n").as_bytes()).await.expect("it listens");
    }
    let mut lines = BufReader::new(said).lines();
    let refused =
        timeout(PATIENCE, lines.next_line()).await.expect("in time").expect("UTF-8").expect("a line");
    assert!(refused.contains(r#""id":3"#) && refused.contains("-31429"), "{refused}");
    say.shutdown().await.expect("it is open");
    timeout(PATIENCE, serving).await.expect("an end in time").expect("no panic").expect("a good end");
}

#[tokio::test]
async fn rmcps_client_gets_along_with_it_in_each_of_its_modes() {
    let preferred_versions = vec![ProtocolVersion::V_2026_07_28];
    for fixture in [Fixture::legacy().await, Fixture::modern().await] {
        let home = Home::new();
        let servers = json!({ "mcpServers": { "fix": { "url": fixture.url() } } });
        let file = home.write("mcp.json", &servers.to_string());
        let modes = [
            ClientLifecycleMode::Initialize,
            ClientLifecycleMode::Discover { preferred_versions: preferred_versions.clone() },
            ClientLifecycleMode::Auto {
                preferred_versions: preferred_versions.clone(),
                legacy_version: None,
            },
        ];
        for (n, mode) in modes.into_iter().enumerate() {
            let is_legacy = matches!(mode, ClientLifecycleMode::Initialize);
            let command = home.command(&["stdio", "--config", file.to_str().expect("a path")]);
            let transport = TokioChildProcess::new(tokio::process::Command::from(command));
            let transport = transport.expect("the binary runs");
            let client = timeout(PATIENCE, ().serve_with_lifecycle(transport, mode)).await;
            let client = client.expect("in time").expect("a connection");
            let tools = client.list_all_tools().await.expect("tools");
            assert!(tools.iter().any(|tool| tool.name == "fix_echo"));
            let echo = CallToolRequestParams::new("fix_echo");
            let echo = echo.with_arguments(serde_json::Map::from_iter([("a".to_owned(), json!(1))]));
            let echoed = client.call_tool(echo).await.expect("an answer");
            assert_eq!(echoed.structured_content, Some(json!({ "a": 1 })));
            if !is_legacy {
                let filter = SubscriptionFilter::builder().tools_list_changed().build();
                let mut changes = client.listen(filter).await.expect("a subscription");
                let change = serde_json::Map::from_iter([("name".to_owned(), json!(format!("fresh-{n}")))]);
                let change = CallToolRequestParams::new("fix_add_tool").with_arguments(change);
                client.call_tool(change).await.expect("an answer");
                let heard = timeout(PATIENCE, changes.next()).await.expect("a change in time");
                assert!(heard.expect("a good stream").is_some());
                changes.cancel().await.expect("a good end");
                client.list_all_tools().await.expect("it goes on");
            }
            client.cancel().await.expect("a good end");
        }
    }
}

// === floods ===

const MANY: usize = 20_000;

/// Tells of its progress more often than anybody wants to know.
async fn chatty() -> Upstream {
    let script = Upstream::modern().tool("t").on("tools/call", |sent| {
        let token = sent.params()["_meta"]["progressToken"].to_string();
        let answer = format!(r#"{{"jsonrpc":"2.0","id":{},"result":{{"content":[]}}}}"#, sent.raw("id"));
        let progress = move |n: usize| {
            let filling = "x".repeat(200);
            format!(
                r#"{{"jsonrpc":"2.0","method":"notifications/progress","params":{{"progressToken":{token},"progress":{n},"message":"{filling}"}}}}"#
            )
        };
        let messages = stream::iter((1..=MANY).map(progress).chain([answer]));
        async move { open_events(messages) }
    });
    script.start().await
}

/// Counts progress up to the result. It only ever grows, and the last is the newest.
async fn read_flood(mut next: impl AsyncFnMut() -> Value) -> usize {
    let (mut seen, mut last) = (0, 0);
    loop {
        let message = next().await;
        if message["method"] != "notifications/progress" {
            assert_eq!(message["result"]["content"], json!([]), "{message}");
            assert_eq!(last, MANY as u64, "the newest progress is not lost");
            return seen;
        }
        let progress = message["params"]["progress"].as_u64().expect("a number");
        assert!(progress > last, "progress grows");
        (seen, last) = (seen + 1, progress);
    }
}

#[tokio::test]
async fn a_flood_of_progress_over_http_loses_neither_the_newest_nor_the_result() {
    let upstream = chatty().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let params = json!({ "name": "up_t", "_meta": { "progressToken": "p" } });
    let legacy = gateway.legacy().await;
    for request in
        [legacy.request("tools/call", params.clone()), gateway.modern().request("tools/call", params)]
    {
        let mut call: Stream = request.open().await;
        // It reads nothing for a while.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let seen = read_flood(async || call.next_json().await).await;
        assert!((1..=MANY).contains(&seen));
    }
}

#[tokio::test]
async fn a_flood_of_progress_on_stdio_takes_no_room() {
    let upstream = chatty().await;
    let home = Home::new();
    let mut client = Program::with(&home, &[("up", upstream.url())]);
    client.initialize(json!({})).await;
    let params = json!({ "name": "up_t", "_meta": { "progressToken": "p" } });
    client.legacy(1, "tools/call", params.clone()).await;
    client.modern(2, "tools/call", json!({ "name": "up_t", "_meta": { "progressToken": "q" } })).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let status = std::fs::read_to_string(format!("/proc/{}/status", client.child.id().expect("it runs")));
    let status = status.expect("it runs");
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line");
    let kib: u64 = resident.trim().trim_end_matches(" kB").parse().expect("a number");
    // All of it would be 2 × 6 MB; a debug build alone is tens of MB, so this is no tight bound.
    assert!(kib < 120_000, "{kib} KiB");
    let mut results = 0;
    let mut last = json!({});
    while results < 2 {
        let message = client.next().await;
        match message["method"].is_null() {
            true => results += 1,
            false => {
                last[message["params"]["progressToken"].as_str().expect("a token")] =
                    message["params"]["progress"].clone()
            }
        }
    }
    assert_eq!(last, json!({ "p": MANY, "q": MANY }));
    client.legacy(3, "ping", json!({})).await;
    client.answer(3).await;
}

// === HTTP+SSE ===

/// A client of 2024-11-05.
struct Old {
    gateway: std::net::SocketAddr,
    stream: Stream,
    endpoint: String,
}

impl Old {
    async fn open(gateway: &Gateway) -> Old {
        let request =
            Request::new(gateway.address, Method::GET, "/sse").header("accept", "text/event-stream");
        let mut stream = request.open().await;
        assert_eq!(stream.status, 200);
        let first = stream.event().await.expect("the endpoint");
        let endpoint =
            first.strip_prefix("event: endpoint\ndata: ").expect("the endpoint").trim_end().to_owned();
        assert!(endpoint.starts_with("/sse/messages?session="), "{endpoint}");
        Old { gateway: gateway.address, stream, endpoint }
    }

    fn post(&self, message: Value) -> Request {
        Request::post(self.gateway, &self.endpoint, message.to_string())
    }

    async fn send(&self, message: Value) {
        assert_eq!(self.post(message).send().await.status, 202);
    }

    async fn ask(&mut self, id: u64, method: &str, params: Value) -> Value {
        self.send(json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params })).await;
        loop {
            let message = self.stream.next_json().await;
            if message["id"] == id && message["method"].is_null() {
                return message;
            }
        }
    }

    async fn initialize(&mut self, capabilities: Value) {
        let params = json!({ "protocolVersion": "2024-11-05", "capabilities": capabilities,
            "clientInfo": { "name": "old", "version": "1" } });
        let answer = self.ask(0, "initialize", params).await;
        assert_eq!(answer["result"]["protocolVersion"], "2024-11-05");
        self.send(json!({ "jsonrpc": "2.0", "method": "notifications/initialized" })).await;
    }
}

#[tokio::test]
async fn the_oldest_clients_have_everything_on_one_stream() {
    for fixture in [Fixture::legacy().await, Fixture::modern().await] {
        let gateway = Gateway::with([("fix", fixture.url())]).start().await;
        let mut client = Old::open(&gateway).await;
        client.initialize(json!({ "elicitation": {} })).await;
        let tools = client.ask(1, "tools/list", json!({})).await;
        assert!(tools["result"]["tools"].to_string().contains("fix_echo"));
        let params = json!({ "name": "fix_test_elicitation", "arguments": { "message": "Who?" } });
        client.send(json!({ "jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": params })).await;
        let question = client.stream.until("elicitation/create").await;
        let form = json!({ "action": "accept", "content": { "username": "ann", "email": "a@b.c" } });
        client.send(json!({ "jsonrpc": "2.0", "id": question["id"], "result": form })).await;
        let answer = client.stream.next_json().await;
        assert!(answer["result"]["content"][0]["text"].to_string().contains("a@b.c"), "{answer}");
        client.ask(3, "tools/call", json!({ "name": "fix_add_tool", "arguments": { "name": "x" } })).await;
        client.stream.until("notifications/tools/list_changed").await;
    }
}

#[tokio::test]
async fn our_own_client_of_that_transport_gets_along_with_it() {
    let fixture = Fixture::modern().await;
    let gateway = Gateway::with([("fix", fixture.url())]).start().await;
    let upstream = SseUpstream::new("old".parse().unwrap(), format!("http://{}/sse", gateway.address));
    let call = McpRequest::call_tool("fix_echo", json!({ "text": "hi" }));
    let result = upstream.oneshot(call).await.unwrap().into_payload().settle().await.unwrap();
    assert!(result.to_value().unwrap()["content"].is_array());
}

#[tokio::test]
async fn a_session_of_the_old_transport_is_its_clients_alone_and_ends_with_the_stream() {
    let fixture = Fixture::modern().await;
    let gateway = Gateway::with([("fix", fixture.url())]).start().await;
    let mut client = Old::open(&gateway).await;
    let ping = || json!({ "jsonrpc": "2.0", "id": 1, "method": "ping" });
    assert_eq!(client.post(ping()).header("x-user", "eve").send().await.status, 404);
    assert_eq!(client.post(ping()).header("origin", "http://evil.example").send().await.status, 403);
    assert_eq!(client.post(ping()).set("host", "evil.example").send().await.status, 403);
    assert_eq!(client.post(ping()).set("content-type", "text/plain").send().await.status, 415);
    assert_eq!(client.post(json!([ping()])).send().await.refusal(), (400, -32600));
    let large = json!({ "jsonrpc": "2.0", "id": 1, "method": "ping", "x": "x".repeat(4 << 20) });
    assert_eq!(client.post(large).send().await.status, 413);
    let modern = json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/list",
        "params": { "_meta": serde_json::from_str::<Value>(META).unwrap() } });
    assert_eq!(client.post(modern).send().await.status, 400);
    for path in ["/sse/messages", "/sse/messages?session=made-up", "/sse/messages?session="] {
        let lost = Request::post(gateway.address, path, ping().to_string()).send().await;
        assert_eq!(lost.status, 404, "{path}");
    }
    let evil = Request::new(gateway.address, Method::GET, "/sse").set("host", "evil.example");
    assert_eq!(evil.header("accept", "text/event-stream").send().await.status, 403);
    assert_eq!(Request::new(gateway.address, Method::GET, "/sse").send().await.status, 406);
    assert_eq!(Request::post(gateway.address, "/sse", "{}").send().await.status, 405);
    assert_eq!(client.ask(9, "ping", json!({})).await["result"], json!({}));

    let Old { stream, endpoint, .. } = client;
    drop(stream);
    eventually("the session is over", async || {
        Request::post(gateway.address, &endpoint, ping().to_string()).send().await.status == 404
    })
    .await;
}

#[tokio::test]
async fn a_gateway_that_ends_answers_the_old_clients_first() {
    let fixture = Fixture::modern().await;
    let mut gateway = Gateway::with([("fix", fixture.url())]).start().await;
    let (mut busy, mut idle) = (Old::open(&gateway).await, Old::open(&gateway).await);
    busy.initialize(json!({})).await;
    idle.initialize(json!({})).await;
    let params = json!({ "name": "fix_slow", "arguments": { "ms": 300 } });
    busy.send(json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params })).await;
    gateway.shut_down();
    assert_eq!(idle.stream.next().await, None);
    let answer = busy.stream.next_json().await;
    assert!(answer["id"] == 1 && answer["result"].is_object(), "{answer}");
    assert_eq!(busy.stream.next().await, None);
    gateway.ended().await;
}

#[tokio::test]
async fn clients_of_the_old_transport_have_a_cap() {
    let fixture = Fixture::modern().await;
    let options = Options::default().most_sessions(1);
    let gateway = Gateway::with([("fix", fixture.url())]).options(options).start().await;
    let open =
        || Request::new(gateway.address, Method::GET, "/sse").header("accept", "text/event-stream").open();
    let first = open().await;
    assert_eq!((first.status.as_u16(), open().await.status.as_u16()), (200, 503));
    drop(first);
    eventually("there is room again", async || open().await.status == 200).await;
}

#[test]
fn the_daemon_serves_the_old_transport_when_told_to() {
    let home = Home::new();
    let file = home.write("mcp.json", r#"{ "sse": true, "mcpServers": {} }"#);
    let status = |daemon: &crate::support::Daemon| {
        use std::io::{Read as _, Write as _};
        let mut stream = std::net::TcpStream::connect(daemon.listen).unwrap();
        write!(stream, "GET /sse HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n").unwrap();
        let mut start = [0; 12];
        stream.read_exact(&mut start).unwrap();
        String::from_utf8(start.to_vec()).unwrap()
    };
    let daemon = home.serve(&[]);
    assert!(status(&daemon).ends_with("404"));
    drop(daemon);
    for args in [&["--sse"][..], &["--config", file.to_str().unwrap()]] {
        let daemon = home.serve(args);
        assert!(status(&daemon).ends_with("200"));
    }
}

// === questions outside of calls ===

/// Asks for the roots as soon as somebody listens, and tells what it heard.
fn curious(heard: mpsc::UnboundedSender<String>) -> impl McpService {
    tower::service_fn(move |request: McpRequest| {
        let heard = heard.clone();
        async move {
            Ok::<_, BoxError>(match request.method() {
                Mcp::Discover => {
                    McpResponse::raw(r#"{"supportedVersions":["2026-07-28"],"capabilities":{}}"#)
                }
                Mcp::Listen => {
                    let (reply, answer) = Reply::new();
                    tokio::spawn(async move {
                        let answer = match answer.await {
                            Ok(Payload::Raw(result)) => String::from_utf8_lossy(&result).into_owned(),
                            other => format!("{other:?}"),
                        };
                        let _ = heard.send(answer);
                    });
                    let params = Params::default();
                    let acknowledged = Notification { method: Mcp::Acknowledged, params: params.clone() };
                    let asked = ServerRequest { method: Mcp::RootsList, params, reply };
                    let frames = [Ok(Frame::Notification(acknowledged)), Ok(Frame::Request(asked))];
                    let frames = stream::iter(frames).chain(stream::pending());
                    McpResponse::new(Payload::Stream(Box::pin(frames)))
                }
                Mcp::Other(name) => {
                    let _ = heard.send(name.to_string());
                    McpResponse::raw("{}")
                }
                _ => McpResponse::raw("{}"),
            })
        }
    })
}

async fn hear(heard: &mut mpsc::UnboundedReceiver<String>) -> String {
    timeout(PATIENCE, heard.recv()).await.expect("in time").expect("something")
}

#[tokio::test]
async fn a_question_outside_of_a_call_reaches_the_stream_of_who_can_answer() {
    let (tell, mut heard) = mpsc::unbounded_channel();
    let server = Server::bind(([127, 0, 0, 1], 0).into()).await.unwrap();
    let address = server.local_addr().unwrap();
    let service = curious(tell);
    tokio::spawn(server.serve(portcullis::server::router(service), std::future::pending()));

    let client = Legacy::open(address, json!({ "roots": {} })).await;
    let mut stream = client.listen().await;
    let question = stream.next_json().await;
    assert_eq!(question["method"], "roots/list");
    let other = Legacy::open(address, json!({ "roots": {} })).await;
    other.answer(&question, json!({ "roots": "of somebody else" })).await;
    client.answer(&question, json!({ "roots": [] })).await;
    assert_eq!(hear(&mut heard).await, r#"{"roots":[]}"#);
    // It is passed on, not swallowed.
    client.notify("notifications/roots/list_changed", json!({})).await;
    assert_eq!(hear(&mut heard).await, "notifications/roots/list_changed");

    let incapable = Legacy::open(address, json!({})).await;
    let _stream = incapable.listen().await;
    assert!(hear(&mut heard).await.contains("-32601"), "refused");
    // Questions die with the session.
    let ending = Legacy::open(address, json!({ "roots": {} })).await;
    let mut stream = ending.listen().await;
    stream.next_json().await;
    ending.end().await;
    assert!(hear(&mut heard).await.contains("-32601"), "refused");
}

#[tokio::test]
async fn a_question_outside_of_a_call_is_asked_on_stdio() {
    let (tell, mut heard) = mpsc::unbounded_channel();
    let (client, server) = tokio::io::duplex(4096);
    let (input, output) = tokio::io::split(server);
    let _serving = tokio::spawn(McpStdio::new(curious(tell)).serve(input, output, std::future::pending()));
    let (said, mut say) = tokio::io::split(client);
    let mut lines = BufReader::new(said).lines();
    let hello = Legacy::initialize("2025-11-25", json!({ "roots": {} }));
    say.write_all(format!("{hello}\n").as_bytes()).await.unwrap();
    lines.next_line().await.unwrap().unwrap();
    let initialized = r#"{"jsonrpc":"2.0","method":"notifications/initialized"}"#;
    say.write_all(format!("{initialized}\n").as_bytes()).await.unwrap();
    let question: Value = serde_json::from_str(&lines.next_line().await.unwrap().unwrap()).unwrap();
    assert_eq!(question["method"], "roots/list");
    let answer = json!({ "jsonrpc": "2.0", "id": question["id"], "result": { "roots": [1] } });
    say.write_all(format!("{answer}\n").as_bytes()).await.unwrap();
    assert_eq!(hear(&mut heard).await, r#"{"roots":[1]}"#);
}

// === what was not declared ===

#[tokio::test]
async fn a_modern_client_is_never_shown_what_it_did_not_declare() {
    let question = |method: &str, params: Value| json!({ "method": method, "params": params });
    let asks = json!({ "resultType": "input_required", "inputRequests": {
        "a": question("elicitation/create", json!({ "mode": "url", "url": "https://x", "message": "?" })),
        "b": question("sampling/createMessage", json!({ "messages": [], "maxTokens": 1 })),
    } });
    let upstream = Upstream::modern().tool("t").answers(asks.to_string()).start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let refused = gateway.modern().declaring(json!({ "elicitation": {} })).call("up_t", json!({})).await;
    assert_eq!(refused.refusal(), (400, -32021));
    let required = json!({ "elicitation": { "url": {} }, "sampling": {} });
    assert_eq!(refused.error()["data"]["requiredCapabilities"], required);
    assert!(refused.json().get("result").is_none());
    let shown = gateway.modern().declaring(required).call("up_t", json!({})).await;
    assert_eq!(shown.result()["inputRequests"].as_object().unwrap().len(), 2);
}

#[tokio::test]
async fn what_is_done_at_a_url_has_an_id_for_a_legacy_client() {
    let params = json!({ "mode": "url", "url": "https://example.com/", "message": "Go there" });
    let question = json!({ "method": "elicitation/create", "params": params });
    let asks = json!({ "resultType": "input_required", "inputRequests": { "q": question } }).to_string();
    let done = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let script = Upstream::modern().tool("t").on("tools/call", move |sent| {
        let again = done.swap(true, std::sync::atomic::Ordering::SeqCst);
        let result = if again { r#"{"resultType":"complete","content":[]}"# } else { &*asks };
        let answer = crate::stage::result(&sent, result);
        async { answer }
    });
    let upstream = script.start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let client = gateway.legacy_with(json!({ "elicitation": { "url": {} } })).await;
    let mut call = client.request("tools/call", json!({ "name": "up_t" })).open().await;
    let question = call.until("elicitation/create").await;
    assert!(question["params"]["elicitationId"].as_str().expect("an id").len() >= 16, "{question}");
    client.answer(&question, json!({ "action": "accept" })).await;
    assert_eq!(call.next_json().await["result"]["content"], json!([]));
}
