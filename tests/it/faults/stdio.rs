//! What child processes do wrong, of either era.

use std::{fs, time::Duration};

use serde_json::json;

use super::house::{House, TIMEOUT, clean, living, tells_nothing};
use crate::stage::eventually;

/// A server in a few words: `$1` runs before it reads, `$2` for each call, `$3` when its input has ended. `$4` is
/// what it says to `server/discover`.
const SERVER: &str = r#"
say() { printf '{"jsonrpc":"2.0","id":%s,%s}\n' "$1" "$2"; }
eval "$1"
while read -r line; do
  id=${line#*'"id":'}; id=${id%%[,\}]*}
  case "$line" in
    *'"server/discover"'*) say "$id" "$4" ;;
    *'"initialize"'*) say "$id" '"result":{"protocolVersion":"2025-11-25","capabilities":{"tools":{}},"serverInfo":{"name":"x","version":"1"}}' ;;
    *'"notifications/'*) ;;
    *'"tools/list"'*) say "$id" '"result":{"tools":[{"name":"t","inputSchema":{"type":"object"}}]}' ;;
    *'"tools/call"'*) eval "$2" ;;
    *) say "$id" '"error":{"code":-32601,"message":"unknown"}' ;;
  esac
done
eval "$3"
"#;

pub(super) const LEGACY: &str = r#""error":{"code":-32601,"message":"unknown"}"#;
pub(super) const MODERN: &str = r#""result":{"resultType":"complete","supportedVersions":["2026-07-28"],"capabilities":{"tools":{}},"ttlMs":0,"cacheScope":"private"}"#;

/// A good answer.
const ANSWER: &str =
    r#"say "$id" '"result":{"resultType":"complete","content":[{"type":"text","text":"well"}]}'"#;

/// What a child does.
#[derive(Clone, Copy)]
pub(super) struct Script<'a> {
    pub(super) before: &'a str,
    pub(super) call: &'a str,
    pub(super) after: &'a str,
}

pub(super) const WELL: Script<'static> = Script { before: "", call: ANSWER, after: "" };

impl Script<'_> {
    pub(super) fn program<'a>(&'a self, discover: &'a str) -> [&'a str; 8] {
        ["sh", "-c", SERVER, "sh", self.before, self.call, self.after, discover]
    }
}

/// A child of each era that answers every call in this way.
async fn each(what: &str, call: &str, code: &str) {
    let house = House::new().await;
    for era in [MODERN, LEGACY] {
        house.add_program(&Script { call, ..WELL }.program(era));
        house.lists("bad_t").await;
        house.fails(what, code).await;
        house.remove(what).await;
    }
}

async fn answers_well(house: &House, what: &str) {
    let (modern, legacy) = (house.modern(), house.legacy().await);
    assert_eq!(house.during(what, modern.call("bad_t", json!({}))).await.content(), "well");
    assert_eq!(house.during(what, legacy.call("bad_t", json!({}))).await.content(), "well");
    legacy.end().await;
}

/// What is no message is nobody's business: the answers between it are good.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn junk_between_the_messages() {
    let junk = r#"
        echo 'hunter2 is starting'; echo '{"jsonrpc":"2.0"'; echo '[]'; echo 'null'; printf '\0\377\376\n\n\r\n'
        head -c 20000 /dev/urandom; echo
        head -c 1000000 /dev/zero >&2; seq 20000 >&2
    "#;
    let call = format!("{junk}{ANSWER}; {junk}");
    let house = House::new().await;
    for era in [MODERN, LEGACY] {
        house.add_program_within("20s", &Script { before: junk, call: &call, ..WELL }.program(era));
        house.lists("bad_t").await;
        for _ in 0..3 {
            answers_well(&house, "junk").await;
        }
        house.remove("junk").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage() {
    each("neither result nor error", r#"say "$id" '"hunter2":1'"#, "bad_upstream").await;
}

/// A line that is no message is no answer, and the call it was to answer need not wait for another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_in_a_good_envelope() {
    each("garbage in an envelope", r#"say "$id" '"result":{hunter2}'"#, "bad_upstream").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_id_hidden_behind_the_result() {
    each("a hidden id", r#"say "$id" '"result":{"content":[]},"id":4711,"x":{}'"#, "bad_upstream").await;
}

/// Junk has no id, so nobody knows whose answer it was to be.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_but_junk() {
    each("junk", "echo hunter2", "timed_out").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_wrong_id() {
    each("the wrong id", r#"say 4711 '"result":{"content":["hunter2"]}'"#, "timed_out").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_answers() {
    // The nonce is what the arguments say.
    let call = r#"
        nonce=${line#*'"nonce":'}; nonce=${nonce%%[,\}]*}
        say "$id" '"result":{"resultType":"complete","content":[{"type":"text","text":"'"$nonce"'"}]}'
        say "$id" '"result":{"resultType":"complete","content":[{"type":"text","text":"hunter2"}]}'
    "#;
    let house = House::new().await;
    for era in [MODERN, LEGACY] {
        house.add_program(&Script { call, ..WELL }.program(era));
        house.lists("bad_t").await;
        let (modern, legacy) = (house.modern(), house.legacy().await);
        for nonce in 0..10 {
            let arguments = json!({ "nonce": nonce });
            let answer = house.during("two answers", modern.call("bad_t", arguments.clone())).await;
            assert_eq!((answer.content(), answer.messages().len()), (nonce.to_string(), 1));
            let answer = house.during("two answers", legacy.call("bad_t", arguments)).await;
            assert_eq!((answer.content(), answer.messages().len()), (nonce.to_string(), 1));
        }
        legacy.end().await;
        house.remove("two answers").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_answer() {
    each("no answer", ":", "timed_out").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_byte_a_second() {
    let call = r#"for byte in '{' '"' j s o n r p c '"' : ; do printf %s "$byte"; sleep 1; done"#;
    each("a byte a second", call, "timed_out").await;
}

/// The line is not gathered, and the child is replaced.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_line_of_256_mib() {
    let call = r#"
        printf '{"jsonrpc":"2.0","id":%s,"result":{"content":[{"type":"text","text":"' "$id"
        head -c 268435456 /dev/zero | tr '\0' x
        echo '"}]}}'
    "#;
    each("a line of 256 MiB", call, "bad_upstream").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_cut_short() {
    each("cut short", r#"printf '{"jsonrpc":"2.0","id":%s,"resu' "$id"; exit 3"#, "unavailable").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_child_that_dies_in_the_middle() {
    each("a death", "echo 'hunter2 in /tmp/x' >&2; kill -9 $$", "unavailable").await;
}

/// Whoever closes its output says nothing any more, even if it lives on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_child_that_closes_its_output() {
    each("closed output", "exec >&-; exec sleep 1000", "unavailable").await;
}

/// Those about the call go to its client, who reads them; those about nothing go nowhere.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_notifications() {
    let house = House::new().await;
    for about in [
        r#""method":"notifications/message","params":{"level":"info","data":"x"}"#,
        r#""method":"notifications/progress","params":{"progressToken":4711,"progress":1}"#,
    ] {
        let call = format!(r#"yes '{{"jsonrpc":"2.0",{about}}}'"#);
        for era in [MODERN, LEGACY] {
            house.add_program(&Script { call: &call, ..WELL }.program(era));
            house.lists("bad_t").await;
            let (legacy, params) = (house.legacy().await, json!({ "name": "bad_t" }));
            let request = match era {
                MODERN => legacy.request("tools/call", params),
                _ => house.modern().request("tools/call", params),
            };
            let answer = house.during("a flood", request.send()).await;
            assert_eq!(answer.result()["structuredContent"]["code"], "timed_out");
            legacy.end().await;
            house.remove("a flood").await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_child_that_ignores_sigterm_and_leaves_grandchildren() {
    let house = House::new().await;
    let before = "trap '' TERM INT HUP; (while :; do sleep 1; done) & (sleep 1000 & sleep 1000) &";
    let after = "while :; do sleep 1; done";
    for era in [MODERN, LEGACY] {
        house.add_program_within("20s", &Script { before, after, ..WELL }.program(era));
        house.lists("bad_t").await;
        answers_well(&house, "stubborn").await;
        assert!(house.family().len() >= 5, "{:?}", house.family());
        house.remove("stubborn").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn grandchildren_of_a_child_that_died() {
    let house = House::new().await;
    let call = "(trap '' TERM; sleep 1000 & sleep 1000) >/dev/null 2>&1 & sleep 0.1; exit 3";
    house.add_program(&Script { call, ..WELL }.program(LEGACY));
    house.lists("bad_t").await;
    let answer = house.during("a death", house.modern().call("bad_t", json!({}))).await;
    clean("a death", &answer, "unavailable");
    // They hold neither the call nor, with `bad` still there, their lives.
    eventually("they are gone", async || !house.family().iter().any(|name| name.contains("sleep"))).await;
    house.remove("a death").await;
}

/// Calls that nobody reads wait for their time to be up, in bounded space, and cost the others nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_child_that_never_reads_its_input() {
    let house = House::new().await;
    for era in [MODERN, LEGACY] {
        house.add_program(&Script { call: "exec sleep 1000", ..WELL }.program(era));
        house.lists("bad_t").await;
        let (modern, legacy) = (house.modern(), house.legacy().await);
        let arguments = json!({ "text": "x".repeat(200_000) });
        let calls = async {
            let modern = (0..20).map(|_| modern.call("bad_t", arguments.clone()));
            let legacy = (0..20).map(|_| legacy.call("bad_t", arguments.clone()));
            let (mut first, second) =
                tokio::join!(futures_util::future::join_all(modern), futures_util::future::join_all(legacy));
            first.extend(second);
            first
        };
        for answer in house.during("deaf", calls).await {
            clean("deaf", &answer, "timed_out");
        }
        house.fails("still deaf", "timed_out").await;
        legacy.end().await;
        house.remove("deaf").await;
    }
}

/// One that says nothing from the beginning offers nothing, and nobody waits for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_child_that_never_says_anything() {
    let house = House::new().await;
    house.add_program(&["sleep", "1000"]);
    eventually("it runs", async || !house.family().is_empty()).await;
    let (modern, legacy) = (house.modern(), house.legacy().await);
    for answer in [
        house.during("mute", modern.call("bad_t", json!({}))).await,
        house.during("mute", legacy.call("bad_t", json!({}))).await,
    ] {
        assert_eq!(answer.error()["code"], -32602, "{answer}");
        tells_nothing("mute", answer.text());
    }
    legacy.end().await;
    house.remove("mute").await;
}

/// One that cannot live is tried again, ever more rarely.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_child_that_dies_at_once() {
    let house = House::new().await;
    let starts = house.file("starts");
    let before = format!("echo >> {}; exit 1", starts.display());
    house.add_program(&Script { before: &before, ..WELL }.program(LEGACY));
    let started = || fs::read_to_string(&starts).expect("the file is there").lines().count();
    eventually("it was started", async || started() > 0).await;
    let began = std::time::Instant::now();
    let client = house.modern();
    house
        .during("dying", async {
            while began.elapsed() < TIMEOUT {
                assert_eq!(client.call("bad_t", json!({})).await.error()["code"], -32602);
            }
        })
        .await;
    let limit = 20 + began.elapsed().as_secs() as usize;
    assert!(started() < limit, "{} starts in {:?}", started(), began.elapsed());
    house.remove("dying").await;
}

/// Several children at once, ended with the daemon.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn children_end_with_the_daemon() {
    let house = House::new().await;
    let before = "trap '' TERM; (while :; do sleep 1; done) &";
    house.add_program(&Script { before, after: "while :; do sleep 1; done", ..WELL }.program(LEGACY));
    house.lists("bad_t").await;
    assert!(house.family().len() >= 3);
    let (mark, began) = (house.mark(), std::time::Instant::now());
    assert_eq!(house.into_daemon().end("-TERM"), Some(0));
    assert_eq!(living(&mark, 0), [""; 0]);
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
}
