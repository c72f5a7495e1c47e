//! Real processes: how they start, speak and end.

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use futures_util::StreamExt as _;
use serde_json::{Value, json};
use tower::ServiceExt as _;

use super::*;
use crate::{
    identity::{Affinity, Client, SessionToken},
    protocol::{Frame, Method, Params, Payload},
};

/// A legacy server in a few words: `$1` runs before it reads, `$2` for each request after the handshake.
const SERVER: &str = r#"
say() { printf '{"jsonrpc":"2.0","id":%s,%s}\n' "$1" "$2"; }
id() { printf '%s' "$1" | sed 's/.*"id":\([0-9]*\).*/\1/'; }
eval "$1"
while read -r line; do case "$line" in
  *server/discover*) say "$(id "$line")" '"error":{"code":-32601,"message":"unknown"}' ;;
  *'"initialize"'*) say "$(id "$line")" '"result":{"protocolVersion":"2025-11-25","capabilities":{}}' ;;
  *notifications/*) ;;
  *) eval "$2" ;;
esac; done
eval "$3"
"#;

const ANSWER: &str = r#"say "$(id "$line")" '"result":{"ok":true}'"#;

fn server(before: &str, request: &str, after: &str) -> StdioUpstream {
    let command = StdioCommand::new("sh").arg("-c").arg(SERVER).arg("sh").arg(before).arg(request).arg(after);
    StdioUpstream::new("x".parse().unwrap(), command)
}

fn hurried(upstream: StdioUpstream) -> StdioUpstream {
    upstream.with_graces(Duration::from_millis(100), Duration::from_millis(300))
}

fn known(error: BoxError) -> UpstreamError {
    *error.downcast().expect("an upstream's error")
}

async fn ask(upstream: &StdioUpstream) -> Result<Value, UpstreamError> {
    let answer = upstream.clone().oneshot(McpRequest::bare(Method::ToolsList)).await.map_err(known)?;
    Ok(answer.into_payload().settle().await.unwrap().to_value().unwrap())
}

/// Where a script writes the ids of processes.
fn notes() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pids");
    (folder, path)
}

fn pids(path: &Path) -> Vec<u32> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().filter_map(|line| line.trim().parse().ok()).collect()
}

/// The living processes of a group, the watcher among them. The dead ones are ours to collect, or init's.
fn group(id: u32) -> Vec<u32> {
    let in_group = |pid: &u32| match stat(*pid) {
        Some((state, _, group)) => state != "Z" && group == id,
        None => false,
    };
    processes().filter(in_group).collect()
}

/// Dead processes that nobody but us can collect.
fn zombies() -> Vec<u32> {
    let us = std::process::id();
    let ours = |pid: &u32| stat(*pid).is_some_and(|(state, parent, _)| state == "Z" && parent == us);
    processes().filter(ours).collect()
}

fn processes() -> impl Iterator<Item = u32> {
    std::fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// State, parent and group of a process.
fn stat(pid: u32) -> Option<(String, u32, u32)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    Some((fields.next()?.to_owned(), fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
}

async fn until(what: &str, mut so: impl FnMut() -> bool) {
    let patience = Instant::now() + Duration::from_secs(10);
    while !so() {
        assert!(Instant::now() < patience, "{what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_child_answers_and_is_gone_after_shutdown() {
    let (_folder, path) = notes();
    let upstream = server(&format!("echo $$ >> {}", path.display()), ANSWER, "");
    assert_eq!(ask(&upstream).await.unwrap(), json!({ "ok": true }));
    let child = pids(&path)[0];
    assert_eq!(group(child).len(), 2, "the child and its watcher");
    let began = Instant::now();
    upstream.shutdown().await;
    assert!(began.elapsed() < Duration::from_secs(2), "it left when its stdin closed");
    assert_eq!(group(child), [0; 0]);
    assert_eq!(ask(&upstream).await.unwrap_err().fault, Fault::Unreachable);
}

#[tokio::test]
async fn a_group_that_ignores_sigterm_is_killed() {
    let (_folder, path) = notes();
    let path = path.display();
    let before = format!("trap '' TERM; echo $$ >> {path}; (while :; do sleep 1; done) & echo $! >> {path}");
    let upstream = hurried(server(&before, ANSWER, "while :; do sleep 1; done"));
    ask(&upstream).await.unwrap();
    let began = Instant::now();
    upstream.shutdown().await;
    assert!(began.elapsed() >= Duration::from_millis(400));
    let child = pids(Path::new(&path.to_string()))[0];
    until("the group is gone", || group(child).is_empty()).await;
}

#[tokio::test]
async fn sigterm_comes_before_sigkill() {
    let (_folder, path) = notes();
    let before = format!("trap 'echo 77 >> {}; exit' TERM", path.display());
    let upstream = server(&before, ANSWER, "while :; do sleep 0.01; done");
    let upstream = upstream.with_graces(Duration::from_millis(50), Duration::from_secs(5));
    ask(&upstream).await.unwrap();
    let began = Instant::now();
    upstream.shutdown().await;
    assert!(began.elapsed() < Duration::from_secs(4));
    assert_eq!(pids(&path), [77]);
}

#[tokio::test]
async fn grandchildren_go_with_a_child_that_goes_by_itself() {
    let (_folder, path) = notes();
    let before = format!("sleep 1000 >/dev/null 2>&1 & echo $$ >> {}", path.display());
    let upstream = hurried(server(&before, "exit 3", ""));
    assert_eq!(ask(&upstream).await.unwrap_err().fault, Fault::Lost);
    let child = pids(&path)[0];
    until("the group is gone", || group(child).is_empty()).await;
}

#[tokio::test]
async fn dropping_the_upstream_ends_the_group() {
    let (_folder, path) = notes();
    let upstream = hurried(server(&format!("sleep 1000 & echo $$ >> {}", path.display()), ANSWER, ""));
    ask(&upstream).await.unwrap();
    let child = pids(&path)[0];
    drop(upstream);
    until("the group is gone", || group(child).is_empty()).await;
}

#[test]
fn when_the_runtime_goes_the_group_goes() {
    let (_folder, path) = notes();
    let runtime = || tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let first = runtime();
    let upstream = first.block_on(async {
        let upstream = hurried(server(&format!("sleep 1000 & echo $$ >> {}", path.display()), ANSWER, ""));
        ask(&upstream).await.unwrap();
        upstream
    });
    drop(first);
    let child = pids(&path)[0];
    runtime().block_on(until("the group is gone", || group(child).is_empty()));
    drop(upstream);
}

#[tokio::test]
async fn a_child_that_dies_in_the_middle_is_lost_and_tells_why() {
    let upstream = server("", "echo 'out of cheese' >&2; exit 3", "");
    let error = ask(&upstream).await.unwrap_err();
    assert_eq!(error.fault, Fault::Lost);
    let reason = error.source.to_string();
    // What it said may be a secret: that is for the log alone.
    assert!(reason.contains("exit status: 3") && !reason.contains("cheese"), "{reason}");
}

#[tokio::test]
async fn a_command_that_is_missing_is_a_misconfiguration() {
    let missing = |command| StdioUpstream::new("x".parse().unwrap(), command);
    for upstream in [
        missing(StdioCommand::new("portcullis-no-such-command")),
        missing(StdioCommand::new("/dev/null")),
        missing(StdioCommand::new("sh").cwd("/no/such/folder")),
    ] {
        let error = ask(&upstream).await.unwrap_err();
        assert_eq!(error.fault, Fault::Misconfigured);
        assert!(error.source.to_string().starts_with("cannot start `"), "{error}");
    }
}

#[tokio::test]
async fn references_are_resolved_each_time_the_command_is_run() {
    let command = StdioCommand::new("${SH}")
        .arg("-c")
        .arg(SERVER)
        .arg("sh")
        .arg("")
        .arg(r#"say "$(id "$line")" "\"result\":{\"ok\":\"$TOKEN\"}""#);
    let resolve: Resolve = Arc::new(|value| match value {
        "${SH}" => Ok("sh".to_owned()),
        "${SECRET}" => Ok("s3cret".to_owned()),
        "${NONE}" => Err("NONE is not set".into()),
        other => Ok(other.to_owned()),
    });
    let upstream = StdioUpstream::new("x".parse().unwrap(), command.clone().env("TOKEN", "${SECRET}"));
    let upstream = upstream.with_resolver(resolve.clone());
    assert_eq!(ask(&upstream).await.unwrap(), json!({ "ok": "s3cret" }));
    assert!(!format!("{upstream:?}").contains("SECRET"));
    let upstream = StdioUpstream::new("x".parse().unwrap(), command.env("TOKEN", "${NONE}"));
    let error = ask(&upstream.with_resolver(resolve)).await.unwrap_err();
    assert_eq!((error.fault, error.source.to_string().as_str()), (Fault::Misconfigured, "NONE is not set"));
}

#[tokio::test]
async fn a_server_that_dies_of_the_probe_is_started_again_without_it() {
    let script = r#"read -r line
case "$line" in *server/discover*) exit 1 ;; esac
echo '{"jsonrpc":"2.0","id":1,"result":{"protocolVersion":"2024-11-05","capabilities":{}}}'
read -r line; read -r line
echo '{"jsonrpc":"2.0","id":2,"result":{"ok":true}}'
cat >/dev/null"#;
    let upstream = StdioUpstream::new("x".parse().unwrap(), StdioCommand::new("sh").arg("-c").arg(script));
    assert_eq!(ask(&upstream).await.unwrap(), json!({ "ok": true }));
}

#[tokio::test]
async fn too_long_a_line_ends_the_child_and_the_next_request_starts_another() {
    let long = r#"printf '%2000s\n' ''; cat /dev/zero"#;
    let (_folder, path) = notes();
    let before = format!("echo $$ >> {}", path.display());
    let request = format!("[ $(wc -l < {}) = 1 ] && {{ {long}; }}; {ANSWER}", path.display());
    let upstream = hurried(server(&before, &request, "")).with_max_line(1000);
    assert_eq!(ask(&upstream).await.unwrap_err().fault, Fault::TooLarge);
    assert_eq!(ask(&upstream).await.unwrap(), json!({ "ok": true }));
    let first = pids(&path)[0];
    until("the first group is gone", || group(first).is_empty()).await;
}

// === A child for each session ===

fn session() -> (Arc<Caller>, Arc<SessionToken>) {
    session_of("good")
}

fn session_of(name: &str) -> (Arc<Caller>, Arc<SessionToken>) {
    let token = SessionToken::new();
    let info = Some(json!({ "name": name, "version": "1" }).to_string().into());
    let client = Client { info, ..Client::gateway() };
    let affinity = Affinity::Session(token.clone());
    (Arc::new(Caller { client, affinity, ..(*Caller::anonymous()).clone() }), token)
}

async fn ask_as(upstream: &StdioUpstream, caller: &Arc<Caller>) -> Result<Value, UpstreamError> {
    let request = McpRequest::bare(Method::ToolsList).with_caller(caller.clone());
    let answer = upstream.clone().oneshot(request).await.map_err(known)?;
    Ok(answer.into_payload().settle().await.unwrap().to_value().unwrap())
}

#[tokio::test]
async fn a_session_that_ends_takes_its_child_along_whatever_that_ignores() {
    let (_folder, path) = notes();
    let before = format!("trap '' TERM; sleep 1000 & echo $$ >> {}", path.display());
    let upstream = hurried(server(&before, ANSWER, "while :; do sleep 1; done"));
    let upstream = upstream.with_isolation(Isolation::Session);
    let (ann, bob) = (session(), session());
    ask_as(&upstream, &ann.0).await.unwrap();
    ask_as(&upstream, &bob.0).await.unwrap();
    ask(&upstream).await.unwrap();
    let children = pids(&path);
    assert_eq!((children.len(), upstream.shared.own.len()), (3, 2));
    drop(ann);
    assert_eq!(upstream.shared.own.len(), 1);
    until("the session's group is gone", || group(children[0]).is_empty()).await;
    assert_eq!((group(children[1]).len(), group(children[2]).len()), (3, 3));
    upstream.shutdown().await;
    until("all are gone", || children.iter().all(|child| group(*child).is_empty())).await;
    assert!(ask_as(&upstream, &bob.0).await.is_err());
}

#[tokio::test]
async fn the_child_of_one_that_dies_or_hangs_is_no_failure_of_anothers() {
    let before = r#"say() {
        case "$line" in *'"bad"'*) exit 1 ;; *'"mute"'*) return ;; esac
        printf '{"jsonrpc":"2.0","id":%s,%s}\n' "$1" "$2"
    }"#;
    let upstream = hurried(server(before, ANSWER, "")).with_isolation(Isolation::Session);
    let (bad, mute, good) = (session_of("bad"), session_of("mute"), session());
    for _ in 0..3 {
        assert!(ask_as(&upstream, &bad.0).await.is_err());
    }
    let waiting = tokio::spawn({
        let (upstream, mute) = (upstream.clone(), mute.0.clone());
        async move { ask_as(&upstream, &mute).await.is_ok() }
    });
    assert_eq!(ask_as(&upstream, &good.0).await.unwrap(), json!({ "ok": true }));
    assert_eq!(ask(&upstream).await.unwrap(), json!({ "ok": true }));
    assert!(!waiting.is_finished());
    // Nobody waits for it any more, so it is not waited for.
    waiting.abort();
    let _ = waiting.await;
    drop(mute);
    upstream.shutdown().await;
}

#[tokio::test]
async fn a_child_that_speaks_without_end_is_read_without_gathering() {
    let flood = r#"i=0; while [ $i -lt 20000 ]; do
        echo '{"jsonrpc":"2.0","method":"notifications/message","params":{"level":"info","data":"again"}}'
        i=$((i + 1)); done; echo 'not MCP'; say "$(id "$line")" '"result":{"ok":true}'
        say "$(id "$line")" '"result":{"ok":"again"}'"#;
    let upstream = server("", flood, "");
    for _ in 0..2 {
        assert_eq!(ask(&upstream).await.unwrap(), json!({ "ok": true }));
    }
    upstream.shutdown().await;
}

#[tokio::test]
async fn nothing_leaks_over_many_restarts() {
    let fds = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let (_folder, path) = notes();
    let once = async || {
        let upstream = hurried(server(&format!("echo $$ >> {}", path.display()), ANSWER, ""));
        ask(&upstream).await.unwrap();
        upstream.shutdown().await;
    };
    once().await;
    let before = fds();
    for _ in 0..100 {
        once().await;
    }
    assert_eq!(pids(&path).len(), 101);
    for child in pids(&path) {
        assert_eq!(group(child), [0; 0]);
        assert!(!zombies().contains(&child));
    }
    // Other tests of this process come and go.
    assert!(fds() < before + 50, "{before} descriptors became {}", fds());
}

const PLAY_GATEWAY: &str = "PORTCULLIS_TEST_PLAY_GATEWAY";

/// The other half of the next test, in a process of its own: runs a child until it is killed.
#[tokio::test]
async fn a_gateway_that_is_killed_plays_its_part() {
    if let Some(path) = std::env::var_os(PLAY_GATEWAY) {
        let before = format!("trap '' TERM; sleep 1000 & echo $$ >> {}", Path::new(&path).display());
        let upstream = server(&before, ANSWER, "while :; do sleep 1; done");
        ask(&upstream).await.unwrap();
        std::fs::write(Path::new(&path).with_extension("ready"), "").unwrap();
        std::future::pending::<()>().await;
    }
}

#[tokio::test]
async fn nothing_is_left_when_the_gateway_is_killed() {
    let (_folder, path) = notes();
    let mut gateway = tokio::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "upstream::stdio::tests::a_gateway_that_is_killed_plays_its_part"])
        .env(PLAY_GATEWAY, &path)
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    until("the child runs", || path.with_extension("ready").exists()).await;
    let child = pids(&path)[0];
    assert_eq!(group(child).len(), 3, "the child, its own child and the watcher");
    gateway.kill().await.unwrap();
    until("the group is gone", || group(child).is_empty()).await;
}

#[tokio::test]
async fn the_group_ends_when_the_other_end_of_the_pipe_is_gone() {
    let mut command = Command::new("sh");
    command.arg("-c").arg("trap '' TERM; sleep 1000 & echo ready; while :; do sleep 1; done");
    command.stdout(std::process::Stdio::piped());
    let (mut child, watched) = process::spawn(command, Duration::from_millis(100)).unwrap();
    let id = child.id().unwrap();
    tokio::io::AsyncReadExt::read_exact(child.stdout.as_mut().unwrap(), &mut [0; 6]).await.unwrap();
    assert!(!watched.is_gone());
    drop(watched);
    let status = child.wait().await.unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGKILL));
    until("the group is gone", || group(id).is_empty()).await;
}

#[tokio::test]
async fn the_watcher_holds_nothing_but_the_pipe() {
    let (_folder, path) = notes();
    let upstream = hurried(server(&format!("echo $$ >> {}", path.display()), ANSWER, ""));
    ask(&upstream).await.unwrap();
    let child = pids(&path)[0];
    let watcher = group(child).into_iter().find(|pid| *pid != child).unwrap();
    let open: Vec<_> = std::fs::read_dir(format!("/proc/{watcher}/fd")).unwrap().flatten().collect();
    assert_eq!(open.len(), 1, "{open:?}");
    upstream.shutdown().await;
}

// === With the fixture server ===

fn fixture(args: &[&str]) -> StdioUpstream {
    // Beside the test binary, which is in `target/<profile>/deps`.
    let tests = std::env::current_exe().unwrap();
    let program = tests.parent().unwrap().parent().unwrap().join("examples/fixture-server");
    let mut command = StdioCommand::new(program.to_str().unwrap()).arg("stdio");
    for arg in args {
        command = command.arg(*arg);
    }
    StdioUpstream::new("fixture".parse().unwrap(), command.env("PORTCULLIS_TEST", "here"))
}

async fn tool(upstream: &StdioUpstream, name: &str, arguments: Value) -> Value {
    let answer = upstream.clone().oneshot(McpRequest::call_tool(name, arguments)).await.unwrap();
    answer.into_payload().settle().await.unwrap().to_value().unwrap()
}

#[tokio::test]
async fn both_eras_of_a_real_server() {
    for (args, era) in
        [(&[][..], Era::Modern), (&["--legacy-only"], Era::Legacy), (&["--modern-only"], Era::Modern)]
    {
        let upstream = fixture(args);
        let discovered = upstream.clone().oneshot(McpRequest::bare(Method::Discover)).await.unwrap();
        let discovered = discovered.payload().to_value().unwrap();
        assert!(discovered["capabilities"]["tools"].is_object(), "{discovered}");
        assert_eq!(*upstream.shared.runner.lock_era(), Some(era));
        let echoed = tool(&upstream, "echo", json!({ "a": [1] })).await;
        assert_eq!(echoed["structuredContent"]["a"], json!([1]), "{echoed}");
        let env = tool(&upstream, "env", json!({ "name": "PORTCULLIS_TEST" })).await;
        assert_eq!(env["content"][0]["text"], "here");

        let params = json!({ "name": "slow", "arguments": { "ms": 60 }, "_meta": { "progressToken": "p" } });
        let slow = McpRequest::new(Method::ToolsCall, Params::from_value(&params));
        let Payload::Stream(mut frames) = upstream.clone().oneshot(slow).await.unwrap().into_payload() else {
            panic!("no progress")
        };
        let mut steps = 0;
        while let Some(frame) = frames.next().await {
            match frame.unwrap() {
                Frame::Notification(n) => {
                    assert_eq!(n.params.get("progressToken"), Some("\"p\""));
                    steps += 1;
                }
                Frame::Final(payload) => {
                    assert_eq!(payload.to_value().unwrap()["content"][0]["text"], "took 60 ms")
                }
                Frame::Request(_) => panic!("nobody asked"),
            }
        }
        assert!(steps > 1);

        let listen = json!({ "notifications": { "toolsListChanged": true } });
        let listen = McpRequest::new(Method::Listen, Params::from_value(&listen));
        let Payload::Stream(mut frames) = upstream.clone().oneshot(listen).await.unwrap().into_payload()
        else {
            panic!("no stream")
        };
        assert!(
            matches!(frames.next().await, Some(Ok(Frame::Notification(n))) if n.method == Method::Acknowledged)
        );
        tool(&upstream, "add_tool", json!({ "name": "new" })).await;
        assert!(
            matches!(frames.next().await, Some(Ok(Frame::Notification(n))) if n.method == Method::ToolsChanged)
        );

        let call = upstream.clone().oneshot(McpRequest::call_tool("slow", json!({ "ms": 60_000 })));
        assert!(timeout(Duration::from_millis(200), call).await.is_err());
        let mut cancelled = 0;
        while cancelled == 0 {
            let count = tool(&upstream, "cancelled_count", json!({})).await;
            cancelled = count["structuredContent"]["count"].as_u64().unwrap();
        }

        let die = McpRequest::call_tool("die", json!({ "code": 7 }));
        let died = known(upstream.clone().oneshot(die).await.unwrap_err());
        assert_eq!(died.fault, Fault::Lost);
        assert!(died.source.to_string().contains("exit status: 7"), "{died}");
        upstream.shutdown().await;
    }
}

#[tokio::test]
async fn a_megabyte_comes_through() {
    let upstream = fixture(&[]);
    let big = tool(&upstream, "big", json!({ "bytes": 1_000_000 })).await;
    assert_eq!(big["content"][0]["text"].as_str().unwrap().len(), 1_000_000);
    upstream.shutdown().await;
}
