//! What upstreams do wrong, and that the client hears one clear sentence of it.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use axum::{body::Body, response::Response};
use http::{HeaderValue, StatusCode, header};
use serde_json::{Value, json};

use crate::stage::{Gateway, Script, Sent, Upstream, error, events, eventually, plain, result};

/// A gateway in front of one that goes wrong and one that does not.
struct House {
    gateway: Gateway,
    upstream: Upstream,
    _other: Upstream,
}

impl House {
    async fn with(script: Script) -> House {
        let upstream = script.start().await;
        let other = Upstream::modern().tool("t").answers(r#"{"content":[]}"#).start().await;
        let gateway = Gateway::with([("bad", upstream.url()), ("good", other.url())]).start().await;
        upstream.forget();
        House { gateway, upstream, _other: other }
    }

    /// A call of either era's client fails in this way, and the other upstream does not notice.
    async fn fails(&self, what: &str, code: &str) {
        let (modern, legacy) = (self.gateway.modern(), self.gateway.legacy().await);
        for answer in [modern.call("bad_t", json!({})).await, legacy.call("bad_t", json!({})).await] {
            assert_eq!(answer.status, 200, "{what}: {answer}");
            let result = answer.result();
            assert_eq!(result["isError"], true, "{what}: {answer}");
            assert_eq!(result["structuredContent"]["code"], code, "{what}: {answer}");
            assert_eq!(result["structuredContent"]["details"], json!({ "upstream": "bad" }), "{what}");
            let text = result["content"][0]["text"].as_str().expect("text");
            assert!(text.contains("`bad`"), "{what}: {text}");
            for secret in ["hunter2", "127.0.0.1", "http", "line 1", "os error"] {
                assert!(!answer.text().contains(secret), "{what} tells {secret}: {answer}");
            }
        }
        modern.call("good_t", json!({})).await.result();
    }
}

fn with_type(kind: &'static str, status: u16, body: impl Into<Body>) -> Response {
    let mut response = plain(status, body);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

fn envelope(sent: &Sent, rest: &str) -> String {
    format!(r#"{{"jsonrpc":"2.0","id":{},{rest}}}"#, sent.raw("id"))
}

type Wrong = fn(&Sent) -> Response;

#[tokio::test]
async fn whatever_goes_wrong_is_one_clear_sentence() {
    const JSON: &str = "application/json";
    let cases: &[(&str, &str, Wrong)] = &[
        ("HTML", "bad_upstream", |_| with_type("text/html", 200, "<html>hunter2</html>")),
        ("text", "bad_upstream", |_| with_type("text/plain", 200, "hunter2")),
        ("no content type", "bad_upstream", |_| plain(200, "{\"hunter2\":1}")),
        ("no JSON", "bad_upstream", |_| with_type(JSON, 200, "hunter2")),
        ("not UTF-8", "bad_upstream", |_| with_type(JSON, 200, &b"{\"a\":\"\xff\"}"[..])),
        ("half a message", "bad_upstream", |sent| {
            with_type(JSON, 200, envelope(sent, r#""result":{"hunter2"#)[..30].to_owned())
        }),
        ("nothing", "bad_upstream", |_| with_type(JSON, 200, "")),
        ("accepted", "bad_upstream", |_| plain(202, "")),
        ("a list", "bad_upstream", |_| with_type(JSON, 200, "[]")),
        ("another id", "bad_upstream", |_| {
            with_type(JSON, 200, r#"{"jsonrpc":"2.0","id":"hunter2","result":{}}"#)
        }),
        ("a result without id", "bad_upstream", |_| {
            with_type(JSON, 200, r#"{"jsonrpc":"2.0","id":null,"result":{}}"#)
        }),
        ("a request", "bad_upstream", |sent| with_type(JSON, 200, envelope(sent, r#""method":"hunter2""#))),
        ("neither result nor error", "bad_upstream", |sent| with_type(JSON, 200, envelope(sent, r#""x":1"#))),
        ("both", "bad_upstream", |sent| {
            with_type(JSON, 200, envelope(sent, r#""error":{"code":1,"message":"hunter2"},"result":{}"#))
        }),
        ("an error without code", "bad_upstream", |sent| {
            with_type(JSON, 200, envelope(sent, r#""error":{"message":"hunter2"}"#))
        }),
        ("500", "unavailable", |_| with_type("text/plain", 500, "hunter2 at /etc/secret")),
        ("502", "unavailable", |_| with_type("text/html", 502, "<html>hunter2</html>")),
        ("401", "unavailable", |_| with_type("text/plain", 401, "hunter2")),
        ("403", "unavailable", |_| with_type("text/plain", 403, "hunter2")),
        ("418", "bad_upstream", |_| with_type("text/plain", 418, "hunter2")),
        ("a stream of nothing", "unavailable", |_| events([])),
        ("a stream of something else", "bad_upstream", |_| events(["hunter2".to_owned()])),
        ("a stream with another id", "bad_upstream", |_| {
            events([r#"{"jsonrpc":"2.0","id":"hunter2","result":{}}"#.to_owned()])
        }),
        ("a body cut short", "unavailable", |sent| {
            let begun = envelope(sent, r#""result":{"#)[..20].to_owned();
            let cut = futures_util::stream::iter([Ok(begun), Err(std::io::Error::other("hunter2"))]);
            with_type(JSON, 200, Body::from_stream(cut))
        }),
        ("a stream cut short", "unavailable", |_| {
            let cut =
                futures_util::stream::iter([Ok("data: {\"json"), Err(std::io::Error::other("hunter2"))]);
            with_type("text/event-stream", 200, Body::from_stream(cut))
        }),
    ];
    for (what, code, wrong) in cases {
        let wrong = *wrong;
        for script in [Upstream::modern(), Upstream::legacy()] {
            let script = script.tool("t").on("tools/call", move |sent| {
                let answer = wrong(&sent);
                async { answer }
            });
            House::with(script).await.fails(what, code).await;
        }
    }
}

#[tokio::test]
async fn a_stream_cut_after_some_of_it_ends_with_an_error() {
    for script in [Upstream::modern(), Upstream::legacy()] {
        let script = script.tool("t").on("tools/call", |_| async {
            events([r#"{"jsonrpc":"2.0","method":"notifications/vendor","params":{}}"#.to_owned()])
        });
        let house = House::with(script).await;
        let (modern, legacy) = (house.gateway.modern(), house.gateway.legacy().await);
        for answer in [modern.call("bad_t", json!({})).await, legacy.call("bad_t", json!({})).await] {
            assert_eq!(answer.messages().len(), 2, "{answer}");
            assert_eq!(answer.result()["structuredContent"]["code"], "unavailable", "{answer}");
        }
    }
}

#[tokio::test]
async fn an_answer_without_end_is_cut_off() {
    let script = Upstream::modern().tool("t").on("tools/call", |_| async {
        let chunk = Ok::<_, std::io::Error>("x".repeat(1 << 20));
        with_type(
            "application/json",
            200,
            Body::from_stream(futures_util::stream::repeat_with(move || {
                chunk.as_ref().map(Clone::clone).map_err(|_| std::io::Error::other("never"))
            })),
        )
    });
    House::with(script).await.fails("without end", "bad_upstream").await;
}

#[tokio::test]
async fn a_connection_that_breaks_is_a_failure_of_one_call() {
    let upstream = Upstream::answering(|_| async { plain(200, "") }).await;
    let address = upstream.stop().await;
    let listener = tokio::net::TcpListener::bind(address).await.expect("the port is free again");
    let breaking = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            drop(stream);
        }
    });
    let other = Upstream::modern().tool("t").answers(r#"{"content":[]}"#).start().await;
    let url = format!("http://{address}/mcp");
    let gateway = Gateway::with([("bad", url), ("good", other.url())]).start().await;
    gateway.modern().call("good_t", json!({})).await.result();
    assert!(format!("{:?}", gateway.inner.status()).contains("Down"), "{:?}", gateway.inner.status());
    breaking.abort();
}

#[tokio::test]
async fn what_an_upstream_refuses_by_protocol_passes_with_its_words() {
    for script in [Upstream::modern(), Upstream::legacy()] {
        let script = script.tool("t").on("tools/call", |sent| {
            let answer = error(&sent, 400, r#"{"code":-32602,"message":"`a` must be a number"}"#);
            async { answer }
        });
        let house = House::with(script).await;
        let answer = house.gateway.modern().call("bad_t", json!({})).await;
        assert_eq!(answer.error()["message"], "`a` must be a number", "{answer}");
        let answer = house.gateway.legacy().await.call("bad_t", json!({})).await;
        assert_eq!(answer.error()["message"], "`a` must be a number", "{answer}");
    }
}

// === sessions ===

#[tokio::test]
async fn a_session_that_expired_is_opened_anew_and_the_call_goes_out_once_more() {
    for status in [StatusCode::NOT_FOUND, StatusCode::BAD_REQUEST] {
        let upstream = Upstream::legacy().tool("t").answers(r#"{"content":[]}"#).start().await;
        let gateway = Gateway::with([("up", upstream.url())]).start().await;
        let (modern, legacy) = (gateway.modern(), gateway.legacy().await);
        modern.call("up_t", json!({})).await.result();
        legacy.call("up_t", json!({})).await.result();
        upstream.forget();
        upstream.forget_sessions(status);
        for answer in [modern.call("up_t", json!({})).await, legacy.call("up_t", json!({})).await] {
            assert_eq!(answer.result()["content"], json!([]), "{answer}");
        }
        assert_eq!(upstream.seen_of("initialize").len(), 2, "one for each client: {status}");
        assert_eq!(upstream.seen_of("tools/call").len(), 4, "one retry each: {status}");
    }
}

#[tokio::test]
async fn a_server_that_forgets_every_session_is_tried_twice() {
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = calls.clone();
    let script = Upstream::legacy().tool("t").on("tools/call", move |_| {
        counted.fetch_add(1, Ordering::SeqCst);
        async { plain(404, "") }
    });
    let house = House::with(script).await;
    house.fails("forgetful", "bad_upstream").await;
    assert_eq!(calls.load(Ordering::SeqCst), 4, "twice for each of two clients");
}

#[tokio::test]
async fn many_calls_on_a_session_that_expired_open_one_new_one() {
    let upstream = Upstream::legacy().tool("t").answers(r#"{"content":[]}"#).start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let client = gateway.modern();
    client.call("up_t", json!({})).await.result();
    upstream.forget();
    upstream.forget_sessions(StatusCode::NOT_FOUND);
    let calls: Vec<_> = (0..20)
        .map(|_| tokio::spawn(client.request("tools/call", json!({ "name": "up_t" })).send()))
        .collect();
    for call in calls {
        assert_eq!(call.await.expect("no panic").result()["content"], json!([]));
    }
    assert_eq!(upstream.seen_of("initialize").len(), 1);
}

#[tokio::test]
async fn a_question_in_the_middle_of_a_call_is_refused_for_a_modern_client() {
    let script = Upstream::legacy().tool("t").on("tools/call", |sent| {
        let question = r#"{"jsonrpc":"2.0","id":"q1","method":"elicitation/create","params":{}}"#;
        let answer = events([question.to_owned(), envelope(&sent, r#""result":{"content":[]}"#)]);
        async { answer }
    });
    let house = House::with(script).await;
    let answer = house.gateway.modern().call("bad_t", json!({})).await;
    assert_eq!((answer.messages().len(), &answer.result()["content"]), (1, &json!([])), "{answer}");
    eventually("the upstream was refused", async || {
        house.upstream.seen().iter().any(|sent| sent.raw("id") == "\"q1\"" && sent.raw("error") != "null")
    })
    .await;
}

#[tokio::test]
async fn pings_of_an_upstream_are_answered_within_the_call() {
    let script = Upstream::legacy().tool("t").on("tools/call", |sent| {
        let ping = r#"{"jsonrpc":"2.0","id":"p1","method":"ping"}"#.to_owned();
        let answer = events([ping, envelope(&sent, r#""result":{"content":[]}"#)]);
        async { answer }
    });
    let house = House::with(script).await;
    let answer = house.gateway.legacy().await.call("bad_t", json!({})).await;
    assert_eq!(answer.messages().len(), 1, "{answer}");
    eventually("it was answered", async || {
        house.upstream.seen().iter().any(|sent| sent.raw("id") == "\"p1\"" && sent.raw("result") == "{}")
    })
    .await;
}

// === redirects ===

fn redirect(status: u16, to: &str) -> Response {
    let mut response = plain(status, "");
    response.headers_mut().insert(header::LOCATION, HeaderValue::from_str(to).expect("a location"));
    response
}

/// An upstream at `/mcp` that has moved to `/new` of wherever `base` is.
async fn moved(status: u16, base: Option<String>) -> (Gateway, Upstream) {
    let first = Arc::new(AtomicUsize::new(0));
    let upstream = Upstream::answering(move |sent| {
        let base = base.clone().unwrap_or_default();
        let moved = first.fetch_add(1, Ordering::SeqCst) == 0;
        async move {
            if moved {
                return redirect(status, &format!("{base}/new"));
            }
            match &*sent.method() {
                "server/discover" => result(
                    &sent,
                    r#"{"resultType":"complete","supportedVersions":["2026-07-28"],"capabilities":{"tools":{}},"ttlMs":0,"cacheScope":"private"}"#,
                ),
                "tools/list" => result(&sent, r#"{"tools":[{"name":"t"}]}"#),
                "tools/call" => result(&sent, r#"{"content":[]}"#),
                _ => error(&sent, 404, r#"{"code":-32601,"message":"Method not found"}"#),
            }
        }
    })
    .await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    (gateway, upstream)
}

#[tokio::test]
async fn a_redirect_within_the_origin_is_followed() {
    for status in [307, 308] {
        let (gateway, upstream) = moved(status, None).await;
        gateway.modern().call("up_t", json!({})).await.result();
        let paths: Vec<String> = upstream.seen().iter().map(|sent| sent.path.clone()).collect();
        assert_eq!(paths[0], "/mcp");
        assert!(paths[1..].iter().all(|path| path == "/new"), "{paths:?}");
    }
}

#[tokio::test]
async fn a_redirect_elsewhere_is_not_followed() {
    for (status, scheme) in
        [(307, "http://"), (308, "http://"), (307, "//"), (302, "http://"), (301, "http://")]
    {
        let elsewhere = Upstream::modern().tool("t").start().await;
        let base = format!("{scheme}{}", elsewhere.address);
        let (gateway, _upstream) = moved(status, Some(base)).await;
        assert!(elsewhere.seen().is_empty(), "{status}");
        let text = format!("{:?}", gateway.inner.status());
        assert_eq!(gateway.modern().call("up_t", json!({})).await.status, 200, "{text}");
    }
}

#[tokio::test]
async fn redirects_in_a_circle_end() {
    let upstream = Upstream::answering(|_| async { redirect(307, "/mcp") }).await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    assert!(upstream.seen().len() < 20, "{}", upstream.seen().len());
    let status: Vec<Value> =
        gateway.inner.status().values().map(|status| json!(status.kind.to_string())).collect();
    assert!(status[0].as_str().expect("text").starts_with("down"), "{status:?}");
}
