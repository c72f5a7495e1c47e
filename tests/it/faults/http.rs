//! What upstreams over HTTP do wrong, of either era.

use std::{convert::Infallible, time::Duration};

use axum::{body::Body, response::Response};
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http::{HeaderValue, header};
use serde_json::json;

use super::house::{House, clean};
use crate::stage::{Script, Sent, Upstream, events, open_events, plain, result};

const JSON: &str = "application/json";
const SSE: &str = "text/event-stream";
const MIB: usize = 1 << 20;

/// A server of each era that answers every call in this way, one after the other before the same daemon.
async fn each(what: &str, wrong: impl Fn(&Sent) -> Response + Copy + Send + Sync + 'static, code: &str) {
    let house = House::new().await;
    for script in eras() {
        let script = script.on("tools/call", move |sent| std::future::ready(wrong(&sent)));
        let upstream = script.start().await;
        house.add(&upstream).await;
        house.fails(what, code).await;
        house.remove(what).await;
    }
}

fn eras() -> [Script; 2] {
    [Upstream::modern().tool("t"), Upstream::legacy().tool("t")]
}

fn of_type(kind: &'static str, body: impl Into<Body>) -> Response {
    let mut response = plain(200, body);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

fn opening(sent: &Sent) -> String {
    format!(r#"{{"jsonrpc":"2.0","id":{},"result":{{"content":[{{"type":"text","text":""#, sent.raw("id"))
}

fn message(sent: &Sent, text: &str) -> String {
    opening(sent) + text + r#""}]}}"#
}

/// Chunks as they are.
fn body(chunks: impl futures_util::Stream<Item = Bytes> + Send + 'static) -> Body {
    Body::from_stream(chunks.map(Ok::<_, Infallible>))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage() {
    each("no JSON", |_| of_type(JSON, "hunter2 at /tmp/hunter2"), "bad_upstream").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_of_another_type() {
    each("HTML", |_| of_type("text/html", "<b>hunter2</b>"), "bad_upstream").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_in_an_event() {
    each("garbage in an event", |_| events(["hunter2".to_owned()]), "bad_upstream").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_wrong_id() {
    let wrong = |_: &Sent| of_type(JSON, r#"{"jsonrpc":"2.0","id":4711,"result":{"content":["hunter2"]}}"#);
    each("the wrong id", wrong, "bad_upstream").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_wrong_id_in_an_event() {
    let wrong =
        |_: &Sent| events([r#"{"jsonrpc":"2.0","id":4711,"result":{"content":["hunter2"]}}"#.to_owned()]);
    each("the wrong id in an event", wrong, "bad_upstream").await;
}

/// The first answer counts, and the second is nobody's: not even that of the next call.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_answers() {
    let house = House::new().await;
    for script in eras() {
        let script = script.on("tools/call", |sent| {
            let nonce = sent.params()["arguments"]["nonce"].to_string();
            std::future::ready(events([message(&sent, &nonce), message(&sent, "hunter2")]))
        });
        let upstream = script.start().await;
        house.add(&upstream).await;
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
async fn an_empty_answer() {
    each("an empty answer", |_| of_type(JSON, ""), "bad_upstream").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_of_nothing() {
    each("a stream of nothing", |_| events([]), "unavailable").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_answer() {
    let house = House::new().await;
    for script in eras() {
        let upstream = script.on("tools/call", |_| std::future::pending()).start().await;
        house.add(&upstream).await;
        house.fails("no answer", "timed_out").await;
        house.remove("no answer").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_says_nothing() {
    each("a silent stream", |_| open_events(stream::pending()), "timed_out").await;
}

fn a_byte_a_second(text: String) -> Body {
    body(stream::iter(text.into_bytes()).then(|byte| async move {
        tokio::time::sleep(Duration::from_secs(1)).await;
        Bytes::from(vec![byte])
    }))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_byte_a_second() {
    each("a byte a second", |sent| of_type(JSON, a_byte_a_second(message(sent, "hunter2"))), "timed_out")
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_byte_a_second_of_an_event() {
    let slowly =
        |sent: &Sent| of_type(SSE, a_byte_a_second(format!("data: {}\n\n", message(sent, "hunter2"))));
    each("a byte of an event a second", slowly, "timed_out").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gzip_bomb() {
    // 256 MiB of zeros.
    let bomb = std::process::Command::new("sh")
        .args(["-c", "head -c 268435456 /dev/zero | gzip -1"])
        .output()
        .expect("there is gzip");
    assert!(bomb.status.success() && bomb.stdout.len() < 4 * MIB);
    let bomb: &'static [u8] = bomb.stdout.leak();
    let house = House::new().await;
    for kind in [JSON, SSE] {
        for script in eras() {
            let script = script.on("tools/call", move |sent| {
                // Nobody said that this would be understood.
                assert_eq!(sent.header("accept-encoding"), None);
                let mut response = of_type(kind, bomb);
                response.headers_mut().insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
                std::future::ready(response)
            });
            let upstream = script.start().await;
            house.add(&upstream).await;
            house.fails("a gzip bomb", "bad_upstream").await;
            house.remove("a gzip bomb").await;
        }
    }
}

fn cut(begun: String) -> Body {
    Body::from_stream(stream::iter([Ok(begun), Err(std::io::Error::other("hunter2"))]))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_cut_short() {
    each("an answer cut short", |sent| of_type(JSON, cut(opening(sent))), "unavailable").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_cut_short() {
    each("a stream cut short", |sent| of_type(SSE, cut(format!("data: {}", opening(sent)))), "unavailable")
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_cut_after_some_of_it() {
    let notice = r#"{"jsonrpc":"2.0","method":"notifications/message","params":{"level":"info","data":"a"}}"#;
    each(
        "a stream cut later",
        move |_| of_type(SSE, cut(format!("data: {notice}\n\ndata: {{"))),
        "unavailable",
    )
    .await;
}

/// Whoever is elsewhere gets neither the call nor the credentials.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redirect_elsewhere() {
    let house = House::new().await;
    for script in eras() {
        let elsewhere = Upstream::answering(|sent| std::future::ready(result(&sent, "{}"))).await;
        let (there, statuses) =
            (elsewhere.url(), std::sync::Mutex::new([307, 308, 302, 303].into_iter().cycle()));
        let script = script.on("tools/call", move |_| {
            let status = statuses.lock().expect("no panic").next().expect("it is a circle");
            let mut response = plain(status, "hunter2");
            let there = HeaderValue::from_str(&there).expect("a location");
            response.headers_mut().insert(header::LOCATION, there);
            std::future::ready(response)
        });
        let upstream = script.start().await;
        house.add(&upstream).await;
        for _ in 0..2 {
            house.fails("a redirect elsewhere", "unavailable").await;
        }
        let sent = upstream.seen_of("tools/call");
        assert_eq!(sent.len(), 4);
        assert!(sent.iter().all(|sent| sent.header("authorization") == Some("Bearer hunter2")));
        assert!(elsewhere.seen().is_empty(), "{:?}", elsewhere.seen());
        house.remove("a redirect elsewhere").await;
    }
}

/// A server that sends the era's first question elsewhere is never connected, and nobody waits for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redirect_elsewhere_from_the_beginning() {
    let house = House::new().await;
    let elsewhere = Upstream::modern().tool("t").start().await;
    for status in [307, 308] {
        let there = elsewhere.url();
        let upstream = Upstream::answering(move |_| {
            let mut response = plain(status, "hunter2");
            response
                .headers_mut()
                .insert(header::LOCATION, HeaderValue::from_str(&there).expect("a location"));
            std::future::ready(response)
        });
        let upstream = upstream.await;
        house.add_at(&upstream.url());
        crate::stage::eventually("it was asked", async || !upstream.seen().is_empty()).await;
        let answer = house.during("redirected", house.modern().call("bad_t", json!({}))).await;
        assert_eq!(answer.error()["code"], -32602, "{answer}");
        super::house::tells_nothing("redirected", answer.text());
        assert!(elsewhere.seen().is_empty());
        house.remove("redirected").await;
    }
}

fn notice(text: &str) -> String {
    let params = json!({ "level": "info", "data": text });
    json!({ "jsonrpc": "2.0", "method": "notifications/vendor", "params": params }).to_string()
}

/// A client that reads them gets them, until the time is up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_notifications() {
    let house = House::new().await;
    for script in eras() {
        let script = script.on("tools/call", |_| {
            let flood = stream::repeat_with(|| notice(&"x".repeat(1000)));
            // So that the runtime we share with it gets a word in.
            std::future::ready(open_events(flood.then(|n| async {
                tokio::task::yield_now().await;
                n
            })))
        });
        let upstream = script.start().await;
        house.add(&upstream).await;
        for client in ["modern", "legacy"] {
            let legacy = house.legacy().await;
            let params = json!({ "name": "bad_t" });
            let request = match client {
                "modern" => house.modern().request("tools/call", params),
                _ => legacy.request("tools/call", params),
            };
            let (count, last) = house
                .during("a flood", async {
                    let mut stream = request.open().await;
                    let (mut count, mut last) = (0, None);
                    while let Some(message) = stream.next().await {
                        count += 1;
                        last = Some(message);
                    }
                    (count, last.expect("an end"))
                })
                .await;
            assert!(count > 100, "{count}");
            let last: serde_json::Value = serde_json::from_slice(&last).expect("JSON");
            assert_eq!(last["result"]["structuredContent"]["code"], "timed_out", "{last}");
            legacy.end().await;
        }
        house.remove("a flood").await;
    }
}

/// "Look again", without end: the gateway looks again, but not without end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_changes() {
    const CHANGED: &str = r#"{"jsonrpc":"2.0","method":"notifications/tools/list_changed"}"#;
    let initialized = r#"{"protocolVersion":"2025-11-25","capabilities":{"tools":{"listChanged":true}},"serverInfo":{"name":"x","version":"1"}}"#;
    let house = House::new().await;
    let script = Upstream::legacy().tool("t").answers(r#"{"content":[]}"#);
    let script = script
        .on("initialize", move |sent| {
            let mut response = result(&sent, initialized);
            response.headers_mut().insert("mcp-session-id", HeaderValue::from_static("s1"));
            std::future::ready(response)
        })
        .on("GET", |_| {
            let flood = stream::repeat_with(|| CHANGED.to_owned());
            std::future::ready(open_events(flood.then(|n| async {
                tokio::task::yield_now().await;
                n
            })))
        });
    let upstream = script.start().await;
    house.add(&upstream).await;
    crate::stage::eventually("the stream is open", async || {
        upstream.seen().iter().any(|sent| sent.verb == http::Method::GET)
    })
    .await;
    upstream.forget();
    let (began, modern) = (std::time::Instant::now(), house.modern());
    house
        .during("a flood of changes", async {
            while began.elapsed() < super::house::TIMEOUT {
                modern.call("bad_t", json!({})).await.result();
            }
        })
        .await;
    let lists = upstream.seen_of("tools/list").len();
    println!("a flood of changes: {lists} lists in {:?}", began.elapsed());
    assert!(lists < 200, "{lists} lists in {:?}", began.elapsed());
    drop(upstream);
    house.remove("a flood of changes").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_is_refused_in_mid_life() {
    let house = House::new().await;
    for script in eras() {
        let upstream = script.answers(r#"{"content":[]}"#).start().await;
        house.add(&upstream).await;
        house.modern().call("bad_t", json!({})).await.result();
        upstream.stop().await;
        // It may be a moment until its last connection is seen to be closed.
        let first = house.during("gone", house.modern().call("bad_t", json!({}))).await;
        clean("gone", &first, "unavailable");
        house.fails("gone", "unavailable").await;
        house.remove("gone").await;
    }
}

// === larger than anything ===

/// 256 MiB between an opening and an end that make it a good answer.
fn huge(before: String, after: &'static str) -> Body {
    let filling = Bytes::from(vec![b'x'; MIB]);
    let filling = stream::repeat_with(move || filling.clone()).take(256);
    body(
        stream::iter([before.into()])
            .chain(filling)
            .chain(stream::iter([Bytes::from_static(after.as_bytes())])),
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_of_256_mib() {
    each("256 MiB", |sent| of_type(JSON, huge(opening(sent), r#""}]}}"#)), "bad_upstream").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_of_256_mib() {
    let huge = |sent: &Sent| of_type(SSE, huge(format!("data: {}", opening(sent)), "\"}]}}\n\n"));
    each("an event of 256 MiB", huge, "bad_upstream").await;
}

// === an envelope in good order around something else ===

/// A result that is no JSON would make the whole answer none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_in_a_good_envelope() {
    let wrong = |sent: &Sent| {
        of_type(JSON, format!(r#"{{"jsonrpc":"2.0","id":{},"result":{{hunter2}}}}"#, sent.raw("id")))
    };
    each("garbage in an envelope", wrong, "bad_upstream").await;
}

/// What looks like a result has members of the envelope after it: another id, with which the answer would be one to
/// another call of the same client.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_id_hidden_behind_the_result() {
    let wrong = |sent: &Sent| {
        let result = r#"{"content":[]},"id":4711,"x":{}"#;
        of_type(JSON, format!(r#"{{"jsonrpc":"2.0","id":{},"result":{result}}}"#, sent.raw("id")))
    };
    each("a hidden id", wrong, "bad_upstream").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_error_hidden_behind_the_result() {
    let wrong = |sent: &Sent| {
        let result = r#"{"content":[]},"error":{"code":1,"message":"hunter2"}"#;
        of_type(JSON, format!(r#"{{"jsonrpc":"2.0","id":{},"result":{result}}}"#, sent.raw("id")))
    };
    each("a hidden error", wrong, "bad_upstream").await;
}
