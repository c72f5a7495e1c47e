//! Clients of the legacy era: sessions, and everything only they have.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use http::Method;
use portcullis::server::Options;
use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::stage::{
    Answer, Fixture, Gateway, Legacy, PATIENCE, Probe, Request, Stream, Upstream, error, events, eventually,
    open_events, result,
};

/// A gateway in front of a scripted upstream of either era, which answers every call with nothing.
async fn house() -> (Gateway, Upstream) {
    let upstream = Upstream::modern().tool("t").answers(r#"{"content":[]}"#).start().await;
    (Gateway::with([("up", upstream.url())]).start().await, upstream)
}

#[tokio::test]
async fn every_revision_is_agreed_to_and_any_other_becomes_the_newest() {
    let (gateway, _upstream) = house().await;
    for (asked, agreed) in [
        ("2024-11-05", "2024-11-05"),
        ("2025-03-26", "2025-03-26"),
        ("2025-06-18", "2025-06-18"),
        ("2025-11-25", "2025-11-25"),
        ("2026-07-28", "2025-11-25"),
        ("2099-01-01", "2025-11-25"),
        ("soon", "2025-11-25"),
    ] {
        let answer = gateway.post(Legacy::initialize(asked, json!({}))).send().await;
        assert_eq!(answer.status, 200);
        let result = answer.result();
        assert_eq!(result["protocolVersion"], agreed, "{asked}");
        assert!(result["serverInfo"]["name"].is_string() && result["capabilities"]["tools"].is_object());
        let absent = ["resultType", "ttlMs", "cacheScope", "supportedVersions"];
        assert!(absent.iter().all(|mark| result.get(mark).is_none()), "{result}");
        let session = answer.header("mcp-session-id").expect("a session");
        assert!(session.len() >= 32 && session.bytes().all(|b| b.is_ascii_graphic()), "{session}");
    }
}

#[tokio::test]
async fn a_bad_initialize_opens_nothing() {
    let (gateway, _upstream) = house().await;
    for params in [
        json!({}),
        json!({ "protocolVersion": 7, "capabilities": {} }),
        json!({ "protocolVersion": "2025-11-25", "capabilities": [] }),
        json!({ "protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": "me" }),
    ] {
        let body = json!({ "jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params });
        let answer = gateway.post(body.to_string()).send().await;
        assert_eq!(answer.refusal(), (400, -32602), "{params}");
        assert_eq!(answer.header("mcp-session-id"), None);
    }
}

#[tokio::test]
async fn a_request_needs_a_session_that_exists() {
    let (gateway, _upstream) = house().await;
    let client = gateway.legacy().await;
    let list = || client.request("tools/list", json!({}));
    list().send().await.result();
    assert_eq!(list().without("mcp-session-id").send().await.refusal(), (400, -32600));
    assert_eq!(list().set("mcp-session-id", "made-up").send().await.refusal(), (404, -32600));
    assert_eq!(list().header("mcp-session-id", &client.session).send().await.refusal(), (400, -32600));
    assert_eq!(list().set("mcp-protocol-version", "2031-01-01").send().await.refusal().0, 400);
    // The header came with 2025-06-18; clients before it send none.
    list().without("mcp-protocol-version").send().await.result();
}

#[tokio::test]
async fn a_session_that_was_ended_is_gone() {
    let (gateway, _upstream) = house().await;
    let (client, other) = (gateway.legacy().await, gateway.legacy().await);
    assert_ne!(client.session, other.session);
    assert_eq!(client.end().await.status, 200);
    assert_eq!(client.ask("tools/list", json!({})).await.status, 404);
    assert_eq!(client.end().await.status, 404);
    let get = client.bare(Method::GET).header("accept", "text/event-stream");
    assert_eq!(get.send().await.status, 404);
    assert_eq!(client.notify("notifications/x", json!({})).await.status, 404);
    other.ask("tools/list", json!({})).await.result();
}

#[tokio::test]
async fn nobody_else_can_use_or_end_a_session() {
    let (gateway, _upstream) = house().await;
    let alice = Legacy::open_as(Some("alice"), gateway.address, "/mcp", "2025-11-25", json!({})).await;
    let list = || alice.request_with_id(json!(1), "tools/list", json!({}));
    let unknown = list().set("mcp-session-id", "made-up").send().await;
    for thief in [list().set("x-user", "eve"), list().without("x-user")] {
        let answer = thief.send().await;
        assert_eq!((answer.status, answer.text()), (unknown.status, unknown.text()), "as good as none");
    }
    for verb in [Method::DELETE, Method::GET] {
        let theft = alice.bare(verb).header("accept", "text/event-stream").set("x-user", "eve");
        assert_eq!(theft.send().await.status, 404);
    }
    list().send().await.result();
}

#[tokio::test]
async fn a_session_belongs_to_one_scope() {
    let upstream = Upstream::modern().tool("t").start().await;
    let options = Options::default().groups(|group| group == "g" || group == "h");
    let gateway = Gateway::with([("up", upstream.url())]).options(options).start().await;
    let client = Legacy::open_as(None, gateway.address, "/mcp/g/g", "2025-11-25", json!({})).await;
    client.ask("tools/list", json!({})).await.result();
    for path in ["/mcp", "/mcp/g/h"] {
        let body = json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/list" }).to_string();
        let elsewhere = Request::post(gateway.address, path, body).header("mcp-session-id", &client.session);
        assert_eq!(elsewhere.send().await.status, 404, "{path}");
    }
}

#[tokio::test]
async fn sessions_have_a_cap_and_idle_ones_make_room() {
    let upstream = Upstream::modern().tool("t").start().await;
    let options = Options::default().most_sessions(2).session_idle(Duration::from_millis(300));
    let gateway = Gateway::with([("up", upstream.url())]).options(options).start().await;
    let (kept, ended) = (gateway.legacy().await, gateway.legacy().await);
    let open = || gateway.post(Legacy::initialize("2025-11-25", json!({}))).send();
    assert_eq!(open().await.status, 503);
    kept.ask("ping", json!({})).await.result();
    ended.end().await;
    assert_eq!(open().await.status, 200);
    eventually("idle sessions are gone", async || open().await.status == 200).await;
}

#[tokio::test]
async fn changes_of_an_upstreams_tools_reach_the_stream() {
    for fixture in [Fixture::legacy().await, Fixture::modern().await] {
        let gateway = Gateway::with([("fix", fixture.url())]).start().await;
        let client = gateway.legacy().await;
        let mut stream = client.listen().await;
        client.call("fix_add_tool", json!({ "name": "fresh" })).await.result();
        stream.until("notifications/tools/list_changed").await;
        let tools = client.ask("tools/list", json!({})).await;
        assert!(tools.text().contains("fix_fresh"));
        client.call("fix_test_trigger_prompt_change", json!({})).await.result();
        stream.until("notifications/prompts/list_changed").await;
    }
}

#[tokio::test]
async fn a_second_stream_takes_over() {
    let fixture = Fixture::start().await;
    let gateway = Gateway::with([("fix", fixture.url())]).start().await;
    let client = gateway.legacy().await;
    let mut first = client.listen().await;
    let mut second = client.listen().await;
    assert_eq!(first.next().await, None);
    client.call("fix_add_tool", json!({ "name": "fresh" })).await.result();
    second.until("notifications/tools/list_changed").await;
}

#[tokio::test]
async fn a_resource_that_is_subscribed_to_tells_of_its_updates() {
    for fixture in [Fixture::legacy().await, Fixture::modern().await] {
        let gateway = Gateway::with([("fix", fixture.url())]).start().await;
        let client = gateway.legacy().await;
        let mut stream = client.listen().await;
        let uri = json!({ "uri": "test://watched-resource" });
        assert_eq!(client.ask("resources/subscribe", uri.clone()).await.result(), json!({}));
        client.call("fix_update_resource", uri.clone()).await.result();
        let updated = stream.until("notifications/resources/updated").await;
        assert_eq!(updated["params"]["uri"], "test://watched-resource");

        assert_eq!(client.ask("resources/unsubscribe", uri.clone()).await.result(), json!({}));
        client.call("fix_update_resource", uri).await.result();
        client.call("fix_add_tool", json!({ "name": "fresh" })).await.result();
        assert_eq!(stream.next_json().await["method"], "notifications/tools/list_changed");

        let nothing = client.ask("resources/subscribe", json!({ "uri": "no:such" })).await;
        assert_eq!(nothing.error()["code"], -32002);
    }
}

#[tokio::test]
async fn cancelling_ends_the_call_at_a_legacy_upstream() {
    let fixture = Fixture::legacy().await;
    let gateway = Gateway::with([("fix", fixture.url())]).start().await;
    let client = Arc::new(gateway.legacy().await);
    let params =
        json!({ "name": "fix_slow", "arguments": { "ms": 60_000 }, "_meta": { "progressToken": 1 } });
    let mut call = client.request_with_id(json!("c"), "tools/call", params).open().await;
    call.until("notifications/progress").await;
    client.notify("notifications/cancelled", json!({ "requestId": "c" })).await;
    eventually("the upstream heard of it", async || {
        let count = client.call("fix_cancelled_count", json!({})).await.result();
        count["structuredContent"]["count"] == 1
    })
    .await;
    assert_eq!(call.next().await, None, "no answer to what was cancelled");
}

#[tokio::test]
async fn cancelling_ends_the_call_at_a_modern_upstream() {
    let probe = Probe::default();
    let inside = probe.clone();
    let upstream = Upstream::modern().tool("t").on("tools/call", move |_| {
        let inside = inside.enter();
        async move {
            let _inside = inside;
            std::future::pending().await
        }
    });
    let upstream = upstream.start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let client = gateway.legacy().await;
    let call = client.request_with_id(json!(77), "tools/call", json!({ "name": "up_t" }));
    let call = tokio::spawn(call.send());
    probe.begun().await;
    client.notify("notifications/cancelled", json!({ "requestId": 77 })).await;
    probe.over().await;
    assert_eq!(call.await.expect("no panic").status, 202);
}

#[tokio::test]
async fn nobody_can_cancel_the_call_of_another_session() {
    let (release, probe) = (Arc::new(Notify::new()), Probe::default());
    let upstream = gated(&release, &probe).await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let (client, other) = (gateway.legacy().await, gateway.legacy().await);
    let call = client.request_with_id(json!(1), "tools/call", json!({ "name": "up_t" }));
    let call = tokio::spawn(call.send());
    probe.begun().await;
    other.notify("notifications/cancelled", json!({ "requestId": 1 })).await;
    release.notify_one();
    assert_eq!(call.await.expect("no panic").result(), json!({ "content": [] }));
}

#[tokio::test]
async fn going_away_before_the_first_word_cancels_nothing_either() {
    let (go, done) = (Arc::new(Notify::new()), Arc::new(AtomicBool::new(false)));
    let (went, told) = (go.clone(), done.clone());
    let script = Upstream::legacy().tool("t").on("tools/call", move |sent| {
        let (go, done) = (went.clone(), told.clone());
        let begun = r#"{"jsonrpc":"2.0","method":"notifications/vendor","params":{}}"#.to_owned();
        let end = format!(r#"{{"jsonrpc":"2.0","id":{},"result":{{"content":[]}}}}"#, sent.raw("id"));
        let messages = futures_util::stream::unfold(vec![end, begun], move |mut left| {
            let (go, done) = (go.clone(), done.clone());
            async move {
                match left.len() {
                    2 => go.notified().await,
                    0 => {
                        done.store(true, Ordering::SeqCst);
                        return None;
                    }
                    _ => {}
                }
                let message = left.pop()?;
                Some((message, left))
            }
        });
        async { open_events(messages) }
    });
    let upstream = script.start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let client = gateway.legacy().await;
    let call = tokio::spawn(client.request("tools/call", json!({ "name": "up_t" })).send());
    eventually("it is called", async || upstream.seen_of("tools/call").len() == 1).await;
    call.abort();
    let _ = call.await;
    // The gateway sees that the client is gone before the upstream says its first word.
    tokio::time::sleep(Duration::from_millis(100)).await;
    go.notify_one();
    eventually("it came to its end", async || done.load(Ordering::SeqCst)).await;
    assert!(upstream.seen_of("notifications/cancelled").is_empty());
}

#[tokio::test]
async fn going_away_cancels_nothing() {
    let (release, probe) = (Arc::new(Notify::new()), Probe::default());
    let upstream = gated(&release, &probe).await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let client = gateway.legacy().await;
    let call = tokio::spawn(client.request("tools/call", json!({ "name": "up_t" })).send());
    probe.begun().await;
    call.abort();
    let _ = call.await;
    // Whatever the gateway does about it, it has done by the time that it answers this.
    client.ask("ping", json!({})).await.result();
    assert_eq!(probe.is_over(), 0);
    release.notify_one();
    probe.over().await;
    client.ask("tools/list", json!({})).await.result();
}

/// Answers calls when released, and tells whether one is under way.
async fn gated(release: &Arc<Notify>, probe: &Probe) -> Upstream {
    let (release, probe) = (release.clone(), probe.clone());
    let script = Upstream::modern().tool("t").on("tools/call", move |sent| {
        let (release, inside) = (release.clone(), probe.enter());
        async move {
            release.notified().await;
            drop(inside);
            result(&sent, r#"{"content":[]}"#)
        }
    });
    script.start().await
}

#[tokio::test]
async fn an_id_that_is_under_way_cannot_be_used_again() {
    let (release, probe) = (Arc::new(Notify::new()), Probe::default());
    let upstream = gated(&release, &probe).await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let client = gateway.legacy().await;
    let call = || client.request_with_id(json!(5), "tools/call", json!({ "name": "up_t" }));
    let first = tokio::spawn(call().send());
    probe.begun().await;
    assert_eq!(call().send().await.refusal(), (400, -32600));
    release.notify_one();
    first.await.expect("no panic").result();
    release.notify_one();
    call().send().await.result();
}

#[tokio::test]
async fn the_gateway_answers_pings_itself() {
    let (gateway, upstream) = house().await;
    let client = gateway.legacy().await;
    upstream.forget();
    assert_eq!(client.ask("ping", json!({})).await.result(), json!({}));
    assert!(upstream.seen().is_empty());
}

#[tokio::test]
async fn log_messages_come_from_the_level_that_was_set() {
    for fixture in [Fixture::legacy().await, Fixture::modern().await] {
        let gateway = Gateway::with([("fix", fixture.url())]).start().await;
        let client = gateway.legacy().await;
        let wrong = client.ask("logging/setLevel", json!({ "level": "loud" })).await;
        assert_eq!(wrong.error()["code"], -32602);
        // rmcp's server sends them on the session's stream in the legacy era, and on the call's in the modern one.
        let mut stream = client.listen().await;
        let mut levels = async |level: &str, last: &str| {
            client.ask("logging/setLevel", json!({ "level": level })).await.result();
            let answer = client.call("fix_test_logging_tool", json!({})).await;
            let mut told: Vec<Value> = answer.messages().iter().map(|m| parsed(m)).collect();
            told.retain(|message| message["method"] == "notifications/message");
            while told.last().is_none_or(|message| message["params"]["level"] != last) {
                told.push(stream.until("notifications/message").await);
            }
            told.iter().map(|message| message["params"]["level"].clone()).collect::<Vec<_>>()
        };
        assert_eq!(levels("debug", "error").await, ["debug", "info", "warning", "error"]);
        assert_eq!(levels("error", "error").await, ["error"]);
        assert_eq!(levels("warning", "error").await, ["warning", "error"]);
    }
}

#[tokio::test]
async fn progress_comes_under_the_clients_own_token() {
    for fixture in [Fixture::legacy().await, Fixture::modern().await] {
        let gateway = Gateway::with([("fix", fixture.url())]).start().await;
        let client = gateway.legacy().await;
        for token in [json!("mine"), json!(7)] {
            let meta = json!({ "progressToken": token });
            let params = json!({ "name": "fix_test_tool_with_progress", "_meta": meta });
            let answer = client.ask("tools/call", params).await;
            let messages = answer.messages();
            assert!(messages.len() > 1, "{answer}");
            for message in &messages[..messages.len() - 1] {
                let message: Value = serde_json::from_slice(message).expect("JSON");
                assert_eq!(message["params"]["progressToken"], token);
            }
        }
    }
}

// === questions to the client ===

fn parsed(message: &[u8]) -> Value {
    serde_json::from_slice(message).expect("a message is JSON")
}

/// The next message, which is a question of this method.
async fn asked(stream: &mut Stream, method: &str) -> Value {
    let question = stream.next_json().await;
    assert_eq!(question["method"], method, "{question}");
    question
}

fn text_of(answer: &Value) -> &str {
    answer["result"]["content"][0]["text"].as_str().unwrap_or_else(|| panic!("no text: {answer}"))
}

#[tokio::test]
async fn a_person_is_asked_whatever_the_era_of_the_upstream() {
    for fixture in [Fixture::legacy().await, Fixture::modern().await] {
        let gateway = Gateway::with([("fix", fixture.url())]).start().await;
        let client = gateway.legacy_with(json!({ "elicitation": {} })).await;
        let params = json!({ "name": "fix_test_elicitation", "arguments": { "message": "Who?" } });
        let mut call = client.request("tools/call", params).open().await;
        let question = asked(&mut call, "elicitation/create").await;
        assert!(question["params"]["message"].as_str().expect("a message").contains("Who?"));
        assert!(question["params"]["requestedSchema"].is_object());
        let form = json!({ "username": "ann", "email": "ann@example.com" });
        client.answer(&question, json!({ "action": "accept", "content": form })).await;
        let answer = call.next_json().await;
        assert!(text_of(&answer).contains("ann@example.com"), "{answer}");
        assert_eq!(call.next().await, None);
    }
}

#[tokio::test]
async fn a_model_is_asked_whatever_the_era_of_the_upstream() {
    for fixture in [Fixture::legacy().await, Fixture::modern().await] {
        let gateway = Gateway::with([("fix", fixture.url())]).start().await;
        let client = gateway.legacy_with(json!({ "sampling": {} })).await;
        let params = json!({ "name": "fix_test_sampling", "arguments": { "prompt": "Hi" } });
        let mut call = client.request("tools/call", params).open().await;
        let question = asked(&mut call, "sampling/createMessage").await;
        let content = json!({ "type": "text", "text": "hello there" });
        let reply = json!({ "role": "assistant", "content": content, "model": "m", "stopReason": "endTurn" });
        client.answer(&question, reply).await;
        assert!(text_of(&call.next_json().await).contains("hello there"));
    }
}

#[tokio::test]
async fn rounds_of_questions_are_asked_one_after_another() {
    let fixture = Fixture::modern().await;
    let gateway = Gateway::with([("fix", fixture.url())]).start().await;
    let client = gateway.legacy_with(json!({ "elicitation": {} })).await;
    let params = json!({ "name": "fix_test_input_required_result_multi_round", "arguments": {} });
    let mut call = client.request("tools/call", params).open().await;
    let first = asked(&mut call, "elicitation/create").await;
    client.answer(&first, json!({ "action": "accept", "content": { "name": "ann" } })).await;
    let second = asked(&mut call, "elicitation/create").await;
    assert_ne!(first["id"], second["id"]);
    client.answer(&second, json!({ "action": "accept", "content": { "color": "red" } })).await;
    let answer = call.next_json().await;
    assert!(text_of(&answer).contains("ann") && text_of(&answer).contains("red"), "{answer}");
}

#[tokio::test]
async fn questions_of_one_round_are_asked_together() {
    let fixture = Fixture::modern().await;
    let gateway = Gateway::with([("fix", fixture.url())]).start().await;
    let client = gateway.legacy_with(json!({ "elicitation": {}, "sampling": {}, "roots": {} })).await;
    let params = json!({ "name": "fix_test_input_required_result_multiple_inputs", "arguments": {} });
    let mut call = client.request("tools/call", params).open().await;
    let mut methods = Vec::new();
    for _ in 0..3 {
        let question = call.next_json().await;
        let method = question["method"].as_str().expect("a method").to_owned();
        let reply = match &*method {
            "elicitation/create" => json!({ "action": "accept", "content": { "name": "ann" } }),
            "roots/list" => json!({ "roots": [{ "uri": "file:///home" }] }),
            _ => {
                let content = json!({ "type": "text", "text": "good day" });
                json!({ "role": "assistant", "content": content, "model": "m" })
            }
        };
        client.answer(&question, reply).await;
        methods.push(method);
    }
    methods.sort();
    assert_eq!(methods, ["elicitation/create", "roots/list", "sampling/createMessage"]);
    let answer = call.next_json().await;
    assert!(text_of(&answer).contains("good day") && text_of(&answer).contains("1 roots"), "{answer}");
}

#[tokio::test]
async fn only_the_session_that_was_asked_can_answer() {
    let fixture = Fixture::legacy().await;
    let gateway = Gateway::with([("fix", fixture.url())]).start().await;
    let client = gateway.legacy_with(json!({ "elicitation": {} })).await;
    let eve = gateway.legacy_with(json!({ "elicitation": {} })).await;
    let params = json!({ "name": "fix_test_elicitation", "arguments": { "message": "Who?" } });
    let mut call = client.request("tools/call", params).open().await;
    let question = asked(&mut call, "elicitation/create").await;
    eve.answer(&question, json!({ "action": "accept", "content": { "username": "eve" } })).await;
    client.answer(&question, json!({ "action": "decline" })).await;
    let answer = call.next_json().await;
    assert!(!text_of(&answer).contains("eve") && text_of(&answer).contains("decline"), "{answer}");
}

#[tokio::test]
async fn a_client_is_not_asked_what_it_did_not_declare_by_a_modern_upstream() {
    let question = r#"{"method":"elicitation/create","params":{"message":"?","requestedSchema":{}}}"#;
    let asks = format!(r#"{{"resultType":"input_required","inputRequests":{{"q":{question}}}}}"#);
    let upstream = Upstream::modern().tool("t").answers(asks).start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    for declared in [json!({}), json!({ "sampling": {} }), json!({ "elicitation": null })] {
        let client = gateway.legacy_with(declared).await;
        let answer = client.call("up_t", json!({})).await;
        assert_eq!(answer.messages().len(), 1, "{answer}");
        assert_eq!(answer.error()["code"], -32021);
        assert_eq!(answer.error()["data"]["requiredCapabilities"], json!({ "elicitation": { "form": {} } }));
    }
    assert_eq!(upstream.seen_of("tools/call").len(), 3, "nothing is tried again");
}

#[tokio::test]
async fn a_client_is_not_asked_what_it_did_not_declare_by_a_legacy_upstream() {
    let script = Upstream::legacy().tool("t").on("tools/call", |sent| {
        let id = sent.raw("id");
        let question = r#"{"jsonrpc":"2.0","id":"q1","method":"sampling/createMessage","params":{}}"#;
        let answer = format!(r#"{{"jsonrpc":"2.0","id":{id},"result":{{"content":[]}}}}"#);
        let answer = events([question.to_owned(), answer]);
        async { answer }
    });
    let upstream = script.start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let client = gateway.legacy().await;
    let answer = client.call("up_t", json!({})).await;
    assert_eq!((answer.messages().len(), answer.result()), (1, json!({ "content": [] })), "{answer}");
    eventually("the upstream was refused", async || {
        upstream.seen().iter().any(|sent| sent.raw("id") == "\"q1\"" && sent.raw("error") != "null")
    })
    .await;
}

#[tokio::test]
async fn an_upstream_that_asks_without_end_is_given_up() {
    let question = r#"{"method":"roots/list"}"#;
    let asks =
        format!(r#"{{"resultType":"input_required","inputRequests":{{"q":{question}}},"requestState":"s"}}"#);
    let upstream = Upstream::modern().tool("t").answers(asks).start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let client = gateway.legacy_with(json!({ "roots": {} })).await;
    let mut call = client.request("tools/call", json!({ "name": "up_t" })).open().await;
    loop {
        let message = call.next_json().await;
        if message["method"].is_null() {
            assert!(message["error"]["code"].is_i64(), "{message}");
            break;
        }
        client.answer(&message, json!({ "roots": [] })).await;
    }
    assert!(upstream.seen_of("tools/call").len() <= 32);
}

// === sessions at upstreams ===

#[tokio::test]
async fn each_client_has_a_session_of_its_own_at_a_legacy_upstream() {
    let upstream = Upstream::legacy().tool("t").answers(r#"{"content":[]}"#).start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let (one, two) = (gateway.legacy().await, gateway.legacy().await);
    for client in [&one, &two, &one] {
        client.call("up_t", json!({})).await.result();
    }
    let used: Vec<String> = upstream
        .seen_of("tools/call")
        .iter()
        .map(|sent| sent.header("mcp-session-id").expect("a session").to_owned())
        .collect();
    assert_eq!(used[0], used[2]);
    assert_ne!(used[0], used[1]);
    let initialize = &upstream.seen_of("initialize")[1];
    assert_eq!(initialize.params()["clientInfo"]["name"], "story");
}

#[tokio::test]
async fn what_an_upstream_says_unasked_reaches_the_stream() {
    let (say, said) = tokio::sync::mpsc::unbounded_channel::<String>();
    let said = Arc::new(tokio::sync::Mutex::new(Some(said)));
    let script = Upstream::legacy().tool("t").answers(r#"{"content":[]}"#).on("GET", move |sent| {
        let (said, story) = (said.clone(), sent.header("mcp-session-id") != Some("session-1"));
        async move {
            // The gateway's own session is the first; the client's is another.
            let said = if story { said.lock().await.take() } else { None };
            match said {
                Some(said) => open_events(futures_util::stream::unfold(said, |mut said| async {
                    Some((said.recv().await?, said))
                })),
                None => open_events(futures_util::stream::pending()),
            }
        }
    });
    let upstream = script.start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let client = gateway.legacy().await;
    let mut stream = client.listen().await;
    client.call("up_t", json!({})).await.result();
    let log = r#"{"jsonrpc":"2.0","method":"notifications/message","params":{"z":1e400,"level":"info"}}"#;
    say.send(log.to_owned()).expect("somebody listens");
    let told = stream.next().await.expect("a message");
    assert_eq!(told, log);
}

#[tokio::test]
async fn errors_have_the_codes_of_this_era() {
    let script = Upstream::modern().list("resources", &[r#"{"uri":"a:b","name":"b"}"#]);
    let script = script.on("resources/read", |sent| {
        let answer = error(&sent, 200, r#"{"code":-32602,"message":"gone","data":{"uri":"a:b"}}"#);
        async { answer }
    });
    let upstream = script.start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let client = gateway.legacy().await;
    let code = async |uri: &str| -> Value {
        let answer: Answer = client.ask("resources/read", json!({ "uri": uri })).await;
        assert_eq!(answer.status, 200);
        answer.error()["code"].clone()
    };
    assert_eq!(code("a:b").await, -32002);
    assert_eq!(code("no:such").await, -32002);
    let unknown = client.ask("vendor/x", json!({})).await;
    assert_eq!((unknown.status.as_u16(), unknown.error()["code"].clone()), (200, json!(-32601)));
}

#[tokio::test]
async fn an_ended_session_ends_its_calls_and_its_stream() {
    let (release, probe) = (Arc::new(Notify::new()), Probe::default());
    let upstream = gated(&release, &probe).await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let client = gateway.legacy().await;
    let mut stream = client.listen().await;
    let call = tokio::spawn(client.request("tools/call", json!({ "name": "up_t" })).send());
    probe.begun().await;
    client.end().await;
    probe.over().await;
    assert_eq!(stream.next().await, None);
    tokio::time::timeout(PATIENCE, call).await.expect("an end in time").expect("no panic");
}
