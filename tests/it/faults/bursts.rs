//! Twenty thousand notifications in the middle of a call, to a client that reads slowly: the memory stays bounded, and
//! the result arrives.
//!
//! Over HTTP nothing is lost, for whoever does not read makes the upstream wait. A child's output is shared by all its
//! calls and must be read on, so what one client does not read in time is dropped, oldest first or newest; never the
//! result.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt as _, stream};
use serde_json::{Value, json};

use super::house::House;
use crate::stage::{PATIENCE, Request, Upstream, eventually, open_events};

const NOTICES: usize = 20_000;
/// Together more than all buffers between here and there.
const PADDING: usize = 1_000;

fn progress(token: &str, n: usize) -> String {
    let text = "x".repeat(PADDING);
    format!(
        r#"{{"jsonrpc":"2.0","method":"notifications/progress","params":{{"progressToken":{token},"progress":{n},"message":"{text}"}}}}"#
    )
}

/// The clients of either era that want progress.
async fn clients(house: &House) -> [(&'static str, Request); 2] {
    let params = json!({ "name": "bad_t", "_meta": { "progressToken": "mine" } });
    let legacy = house.legacy().await;
    [
        ("modern", house.modern().request("tools/call", params.clone())),
        ("legacy", legacy.request("tools/call", params)),
    ]
}

/// Reads nothing until nothing moves any more, and then all of it, a little at a time. Gives how many notifications
/// there were.
async fn read_slowly(house: &House, what: &str, request: Request, sent: &dyn Fn() -> usize) -> (usize, u64) {
    let read = async {
        let mut stream = request.open().await;
        let first = stream.next_json().await;
        assert_eq!(first["method"], "notifications/progress", "{first}");
        let (mut seen, mut still) = (sent(), 0);
        eventually("the burst has come as far as it can", async || {
            tokio::time::sleep(Duration::from_millis(50)).await;
            still = if sent() == seen { still + 1 } else { 0 };
            seen = sent();
            still >= 6
        })
        .await;
        println!("{what}: {seen} sent before anybody read");
        let (mut count, mut last) = (1, 1);
        loop {
            let message = stream.next_json().await;
            if message["method"] != "notifications/progress" {
                assert_eq!(message["result"]["content"][0]["text"], "done", "{message}");
                assert_eq!(stream.next().await, None, "nothing comes after the result");
                return (count, last);
            }
            let params = &message["params"];
            assert_eq!(params["progressToken"], "mine");
            let n = params["progress"].as_u64().expect("a number");
            assert!(n > last, "{n} after {last}");
            (count, last) = (count + 1, n);
            if count % 100 == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
    };
    let (count, last) = house.during_at_most(PATIENCE, what, read).await;
    println!("{what}: {count} arrived");
    (count, last)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_http() {
    let house = House::new().await;
    for (era, script) in [("modern", Upstream::modern()), ("legacy", Upstream::legacy())] {
        let sent = Arc::new(AtomicUsize::new(0));
        let counter = sent.clone();
        let script = script.tool("t").on("tools/call", move |call| {
            let (counter, id) = (counter.clone(), call.raw("id"));
            let token: Value = call.params()["_meta"]["progressToken"].clone();
            let burst = stream::iter(1..=NOTICES).map(move |n| {
                counter.fetch_add(1, Ordering::Relaxed);
                progress(&token.to_string(), n)
            });
            let done = r#"{"content":[{"type":"text","text":"done"}],"resultType":"complete"}"#;
            let end = format!(r#"{{"jsonrpc":"2.0","id":{id},"result":{done}}}"#);
            std::future::ready(open_events(burst.chain(stream::iter([end]))))
        });
        let upstream = script.start().await;
        house.add_within(&upstream.url(), "60s");
        house.lists("bad_t").await;
        for (client, request) in clients(&house).await {
            sent.store(0, Ordering::Relaxed);
            let what = format!("a burst from {era} to {client}");
            let (_, last) = read_slowly(&house, &what, request, &|| sent.load(Ordering::Relaxed)).await;
            // Progress that nobody has read yet gives way to newer progress, and the newest arrives.
            assert_eq!(last, NOTICES as u64, "{what}");
        }
        house.remove("a burst").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn from_a_child() {
    let house = House::new().await;
    let padding = "x".repeat(PADDING);
    let notes = house.file("sent");
    let call = format!(
        r#"
        seq -f '{{"jsonrpc":"2.0","method":"notifications/progress","params":{{"progressToken":'"$id"',"progress":%.0f,"message":"{padding}"}}}}' {NOTICES}
        say "$id" '"result":{{"resultType":"complete","content":[{{"type":"text","text":"done"}}]}}'
        echo x >> {}
        "#,
        notes.display()
    );
    for (era, discover) in [("modern", super::stdio::MODERN), ("legacy", super::stdio::LEGACY)] {
        let script = super::stdio::Script { call: &call, ..super::stdio::WELL };
        house.add_program_within("60s", &script.program(discover));
        house.lists("bad_t").await;
        for (client, request) in clients(&house).await {
            let what = format!("a burst from a {era} child to {client}");
            let before = std::fs::read_to_string(&notes).expect("the file is there").len();
            let done = || std::fs::read_to_string(&notes).expect("the file is there").len() - before;
            // The child is not held up by a client that does not read.
            let moving = AtomicUsize::new(1);
            let sent = || if done() > 0 { NOTICES } else { moving.fetch_add(1, Ordering::Relaxed) };
            let (count, _) = read_slowly(&house, &what, request, &sent).await;
            assert!((1..=NOTICES).contains(&count), "{what}: {count}");
        }
        house.remove("a burst").await;
    }
}
