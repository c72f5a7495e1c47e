//! Upstreams that say too much, too slowly or in a way nobody asked for: none of it costs more than its own call.

use std::{fs, time::Duration};

use axum::{body::Body, response::Response};
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use http::{HeaderValue, header};
use serde_json::json;

use crate::{
    stage::{Gateway, Modern, Probe, Script, Sent, Upstream, eventually, open_events, plain, result},
    support::{Daemon, Home},
};

const MIB: usize = 1 << 20;
const JSON: &str = "application/json";
const EVENTS: &str = "text/event-stream";

/// Something much too large.
type Said = fn() -> Response;

type Chunk = Result<Bytes, std::io::Error>;

fn answer(kind: &'static str, body: impl Stream<Item = Chunk> + Send + 'static) -> Response {
    let mut response = plain(200, Body::from_stream(body));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

/// `head`, and then the same mebibyte again and again.
fn endless(head: &'static str, count: usize, piece: &'static [u8]) -> impl Stream<Item = Chunk> + Send {
    let filler = Bytes::from(piece.repeat(MIB / piece.len()));
    let rest = stream::iter(std::iter::repeat_n(filler, count)).map(Ok);
    stream::iter([Ok(Bytes::from_static(head.as_bytes()))]).chain(rest)
}

fn legacy_or_modern() -> [Script; 2] {
    [Upstream::modern(), Upstream::legacy()]
}

// === memory ===

/// What a process has had in memory at most since the last time it was asked, in bytes.
fn peak(daemon: &Daemon) -> usize {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("Linux counts it");
    let kib: usize = line.trim().trim_end_matches(" kB").parse().expect("a number");
    fs::write(format!("/proc/{}/clear_refs", daemon.pid()), "5").expect("it is ours");
    kib * 1024
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_of_256_mebibytes_costs_32_at_most() {
    let cases: [(&str, Said); 5] = [
        ("JSON that says how long it is", || {
            let mut response = answer(JSON, endless("{", 256, b"xxxxxxxx"));
            response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(256 * MIB as u64 + 1));
            response
        }),
        ("JSON that does not", || answer(JSON, endless("{", 256, b"xxxxxxxx"))),
        ("one line", || answer(EVENTS, endless("data: {", 256, b"xxxxxxxx"))),
        ("many lines", || answer(EVENTS, endless("", 256, b"data: xxxxxxxxxxxxxxxxxxxxxxxxx\n"))),
        ("two long lines", || {
            let first = endless("data: ", 9, b"xxxxxxxx");
            answer(EVENTS, first.chain(endless("\ndata: ", 256, b"xxxxxxxx")))
        }),
    ];
    for script in legacy_or_modern() {
        let script = script.tool("t").on("tools/call", move |sent| async move {
            match sent.params()["arguments"]["case"].as_u64() {
                Some(case) => cases[case as usize].1(),
                None => result(&sent, r#"{"content":[]}"#),
            }
        });
        let upstream = script.start().await;
        let home = Home::new();
        home.ok(&["add", "big", &upstream.url()]);
        let daemon = home.serve(&[]);
        let client = Modern::of(daemon.listen);
        eventually("its tool is listed", async || client.tools().await.contains(&"big_t".to_owned())).await;
        // Whatever is made once is made now.
        client.call("big_t", json!({})).await.result();
        for (number, (what, _)) in cases.iter().enumerate() {
            peak(&daemon);
            let before = peak(&daemon);
            let answer = client.call("big_t", json!({ "case": number })).await;
            assert!(answer.text().contains("larger answer than allowed"), "{what}: {answer}");
            let grown = peak(&daemon).saturating_sub(before);
            assert!(grown <= 32 * MIB, "{what}: {} MiB", grown / MIB);
        }
        client.call("big_t", json!({})).await.result();
    }
}

#[tokio::test]
async fn an_answer_just_as_large_as_allowed_arrives_whole() {
    let text = "x".repeat(16 * MIB - 200);
    let whole = format!(r#"{{"content":[{{"type":"text","text":"{text}"}}]}}"#);
    for (script, kind) in legacy_or_modern().into_iter().zip([JSON, EVENTS]) {
        let whole = whole.clone();
        let script = script.tool("t").on("tools/call", move |sent| {
            let message = format!(r#"{{"jsonrpc":"2.0","id":{},"result":{whole}}}"#, sent.raw("id"));
            let message = if kind == EVENTS { format!("data: {message}\n\n") } else { message };
            async move { answer(kind, stream::iter([Ok(Bytes::from(message))])) }
        });
        let upstream = script.start().await;
        let gateway = Gateway::with([("up", upstream.url())]).start().await;
        assert_eq!(gateway.modern().call("up_t", json!({})).await.content().len(), text.len());
    }
}

// === time ===

#[tokio::test]
async fn one_byte_after_another_ends_with_the_timeout_and_nothing_lives_on() {
    let bodies: [(&str, &str); 2] = [(JSON, " "), (EVENTS, ":\n")];
    for script in legacy_or_modern() {
        let probe = Probe::default();
        let inside = probe.clone();
        let script = script.tool("t").on("tools/call", move |sent| {
            let (kind, drop) = bodies[usize::from(sent.params()["arguments"]["events"] == true)];
            let inside = inside.enter();
            let drips = stream::unfold(inside, move |inside| async move {
                tokio::time::sleep(Duration::from_millis(20)).await;
                Some((Ok(Bytes::from_static(drop.as_bytes())), inside))
            });
            async move { answer(kind, drips) }
        });
        let upstream = script.start().await;
        let gateway =
            Gateway::with([("up", upstream.url())]).timeout(Duration::from_millis(300)).start().await;
        for events in [false, true] {
            let answer = gateway.modern().call("up_t", json!({ "events": events })).await;
            assert_eq!(answer.result()["structuredContent"]["code"], "timed_out", "{answer}");
        }
        eventually("the connections are closed", async || probe.is_over() == 2).await;
    }
}

// === codings ===

#[tokio::test]
async fn a_coding_nobody_asked_for_is_one_clear_error() {
    for script in legacy_or_modern() {
        let script = script.tool("t").on("tools/call", |sent| async move {
            let status = if sent.params()["arguments"]["refuse"] == true { 400 } else { 200 };
            let mut response = plain(status, &b"\x1f\x8b\x08\x00 not really"[..]);
            response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(JSON));
            response.headers_mut().insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
            response
        });
        let upstream = script.start().await;
        let gateway = Gateway::with([("up", upstream.url())]).start().await;
        for refuse in [false, true] {
            let answer = gateway.modern().call("up_t", json!({ "refuse": refuse })).await;
            assert_eq!(answer.result()["structuredContent"]["code"], "bad_upstream", "{answer}");
        }
        let asked = |sent: &Sent| sent.header("accept-encoding").is_some();
        assert!(!upstream.seen().iter().any(asked), "nothing was asked for");
    }
}

// === floods ===

/// More than all the buffers of two connections hold.
const FLOOD: usize = 20_000;

#[tokio::test]
async fn a_flood_of_notifications_waits_for_a_client_that_reads_slowly() {
    // A modern client's stream is read through one channel, a legacy client's through another.
    flood(Upstream::modern(), true).await;
    flood(Upstream::legacy(), true).await;
    flood(Upstream::legacy(), false).await;
}

async fn flood(script: Script, modern: bool) {
    let probe = Probe::default();
    let said = probe.clone();
    let script = script.tool("t").on("tools/call", move |sent| {
        let said = said.clone();
        let done = format!(r#"{{"jsonrpc":"2.0","id":{},"result":{{"content":[]}}}}"#, sent.raw("id"));
        let text = "x".repeat(2000);
        let flood = stream::iter(0..FLOOD).map(move |n| {
            drop(said.enter());
            format!(
                r#"{{"jsonrpc":"2.0","method":"notifications/flood","params":{{"text":"{text}","number":{n}}}}}"#
            )
        });
        async move { open_events(flood.chain(stream::iter([done]))) }
    });
    let upstream = script.start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let params = json!({ "name": "up_t", "arguments": {} });
    let call = match modern {
        true => gateway.modern().request("tools/call", params),
        false => gateway.legacy().await.request("tools/call", params),
    };
    let mut call = call.open().await;
    call.next().await.expect("the first of them");
    let mut before = 0;
    eventually("it is stopped", async || {
        tokio::time::sleep(Duration::from_millis(100)).await;
        std::mem::replace(&mut before, probe.has_begun()) == probe.has_begun()
    })
    .await;
    assert!(probe.has_begun() < FLOOD, "all of them are somewhere in between");
    for n in 1..FLOOD {
        let message = call.next().await.expect("one more");
        let end = format!(r#","number":{n}}}}}"#);
        assert!(message.ends_with(end.as_bytes()), "{n}: {message:?}");
    }
    assert_eq!(call.next_json().await["result"]["content"], json!([]));
}
