//! Clients of 2026-07-28.

use std::time::Duration;

use portcullis::server::Options;
use serde_json::{Value, json};

use crate::stage::{Fixture, Gateway, Probe, Request, Upstream, error, eventually, result};

#[tokio::test]
async fn a_call_reaches_upstreams_of_either_era() {
    for fixture in [Fixture::legacy().await, Fixture::modern().await] {
        let gateway = Gateway::with([("fix", fixture.url())]).start().await;
        let client = gateway.modern();
        let answer = client.call("fix_echo", json!({ "a": [1, "é"] })).await;
        assert_eq!(answer.status, 200);
        let result = answer.result();
        assert_eq!(result["structuredContent"], json!({ "a": [1, "é"] }));
        assert_eq!(result["resultType"], "complete");
        let prompt = client.ask("prompts/get", json!({ "name": "fix_test_simple_prompt" })).await.result();
        assert!(prompt["messages"][0]["content"]["text"].is_string());
        let read = client.ask("resources/read", json!({ "uri": "test://static-text" })).await.result();
        assert!(read["contents"][0]["text"].is_string());
        let read = client.ask("resources/read", json!({ "uri": "test://template/7/data" })).await.result();
        assert_eq!(read["contents"][0]["uri"], "test://template/7/data");
        let reference = json!({ "type": "ref/prompt", "name": "fix_test_prompt_with_arguments" });
        let completing = json!({ "ref": reference, "argument": { "name": "arg1", "value": "par" } });
        let completed = client.ask("completion/complete", completing).await.result();
        assert_eq!(completed["completion"]["values"], json!(["paris", "park", "party"]));
    }
}

#[tokio::test]
async fn an_upstream_learns_who_the_client_is() {
    let fixture = Fixture::modern().await;
    let gateway = Gateway::with([("fix", fixture.url())]).start().await;
    for seen in [
        gateway.modern().call("fix_seen", json!({})).await.result(),
        gateway.legacy().await.call("fix_seen", json!({})).await.result(),
    ] {
        let seen = &seen["structuredContent"];
        assert_eq!(seen["client"]["name"], "story", "{seen}");
        assert_eq!(seen["protocolVersion"], "2026-07-28");
        assert_eq!(seen["headers"]["mcp-method"], "tools/call");
        assert_eq!(seen["headers"]["mcp-name"], "seen");
    }
}

#[tokio::test]
async fn credentials_and_sessions_of_the_client_stay_here() {
    let upstream = Upstream::modern().tool("t").answers(r#"{"content":[]}"#).start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let request = gateway.modern().request("tools/call", json!({ "name": "up_t" }));
    let request = request.header("authorization", "Bearer hunter2").header("cookie", "a=hunter2");
    let answer = request.header("mcp-session-id", "hunter2").send().await;
    answer.result();
    assert_eq!(answer.header("mcp-session-id"), None);
    let sent = &upstream.seen_of("tools/call")[0];
    assert!(!format!("{:?}", sent.headers).contains("hunter2"), "{:?}", sent.headers);
}

#[tokio::test]
async fn going_away_cancels_the_call_at_a_modern_upstream() {
    let probe = Probe::default();
    let enter = probe.clone();
    let script = Upstream::modern().tool("t").on("tools/call", move |_| {
        let inside = enter.enter();
        async move {
            let _inside = inside;
            std::future::pending().await
        }
    });
    let upstream = script.start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let call = tokio::spawn(gateway.modern().request("tools/call", json!({ "name": "up_t" })).send());
    probe.begun().await;
    call.abort();
    probe.over().await;
}

#[tokio::test]
async fn going_away_within_a_stream_cancels_the_call_at_upstreams_of_either_era() {
    for fixture in [Fixture::legacy().await, Fixture::modern().await] {
        let gateway = Gateway::with([("fix", fixture.url())]).start().await;
        let client = gateway.modern();
        let meta = json!({ "progressToken": "p" });
        let params = json!({ "name": "fix_slow", "arguments": { "ms": 60_000 }, "_meta": meta });
        let mut call = client.request("tools/call", params).open().await;
        assert_eq!(call.until("notifications/progress").await["params"]["progressToken"], "p");
        drop(call);
        eventually("the upstream noticed", async || {
            let count = client.call("fix_cancelled_count", json!({})).await.result();
            count["structuredContent"]["count"] == 1
        })
        .await;
    }
}

#[tokio::test]
async fn streams_are_not_to_be_held_back() {
    let fixture = Fixture::start().await;
    let gateway = Gateway::with([("fix", fixture.url())]).start().await;
    let params = json!({ "name": "fix_test_tool_with_progress", "_meta": { "progressToken": 9 } });
    let answer = gateway.modern().ask("tools/call", params).await;
    assert_eq!(answer.header("content-type"), Some("text/event-stream"));
    assert_eq!(answer.header("x-accel-buffering"), Some("no"));
    let messages = answer.messages();
    let progress = |message: &bytes::Bytes| {
        let message: Value = serde_json::from_slice(message).expect("JSON");
        assert_eq!(message["params"]["progressToken"], 9);
        message["params"]["progress"].as_f64().expect("a number")
    };
    let steps: Vec<f64> = messages[..messages.len() - 1].iter().map(progress).collect();
    assert_eq!(steps, [0.0, 50.0, 100.0]);
}

#[tokio::test]
async fn discovery_tells_what_the_gateway_can_do() {
    let fixture = Fixture::start().await;
    let gateway = Gateway::with([("fix", fixture.url())]).start().await;
    let discovered = gateway.modern().ask("server/discover", json!({})).await.result();
    let versions = json!(["2026-07-28", "2025-11-25", "2025-06-18", "2025-03-26"]);
    assert_eq!(discovered["supportedVersions"], versions);
    assert_eq!(discovered["capabilities"]["tools"]["listChanged"], true);
    assert_eq!(discovered["capabilities"]["resources"]["subscribe"], true);
    assert!(discovered["instructions"].as_str().expect("instructions").contains("A server for tests"));
    assert_eq!(discovered["_meta"]["io.modelcontextprotocol/serverInfo"]["name"], "portcullis");
    assert_cacheable(&discovered);
}

#[tokio::test]
async fn lists_and_reads_say_how_long_they_are_good() {
    for fixture in [Fixture::legacy().await, Fixture::modern().await] {
        let gateway = Gateway::with([("fix", fixture.url())]).start().await;
        for method in ["tools/list", "prompts/list", "resources/list", "resources/templates/list"] {
            let listed = gateway.modern().ask(method, json!({})).await.result();
            assert_cacheable(&listed);
            assert_eq!(listed["cacheScope"], "private", "{method}");
        }
        let uri = json!({ "uri": "test://static-text" });
        assert_cacheable(&gateway.modern().ask("resources/read", uri).await.result());
    }
}

fn assert_cacheable(result: &Value) {
    assert_eq!(result["resultType"], "complete", "{result}");
    assert!(result["ttlMs"].is_u64(), "{result}");
    assert!(["private", "public"].contains(&result["cacheScope"].as_str().expect("a scope")), "{result}");
}

#[tokio::test]
async fn what_nobody_has_is_a_protocol_error_within_a_good_answer() {
    let fixture = Fixture::start().await;
    let gateway = Gateway::with([("fix", fixture.url())]).start().await;
    let client = gateway.modern();
    for (method, params, message) in [
        ("tools/call", json!({ "name": "nope" }), "Unknown tool: nope"),
        ("tools/call", json!({ "name": "echo" }), "Unknown tool: echo"),
        ("prompts/get", json!({ "name": "nope" }), "Unknown prompt: nope"),
        ("resources/read", json!({ "uri": "no:such" }), "Resource not found: no:such"),
    ] {
        let answer = client.ask(method, params).await;
        assert_eq!(answer.refusal(), (200, -32602), "{answer}");
        assert_eq!(answer.error()["message"], message);
    }
    assert_eq!(client.ask("tools/call", json!({})).await.refusal(), (200, -32602));
    assert_eq!(client.ask("tools/call", json!({ "name": 7 })).await.refusal(), (200, -32602));
}

#[tokio::test]
async fn what_is_denied_is_what_nobody_has_byte_for_byte() {
    let fixture = Fixture::start().await;
    let gateway = Gateway::with([("fix", fixture.url())])
        .deny("fix", &["e*o", "test_simple_*", "test://static*"])
        .start();
    let gateway = gateway.await;
    let client = gateway.modern();
    assert!(!client.tools().await.contains(&"fix_echo".to_owned()));
    for (method, member, denied, unknown) in [
        ("tools/call", "name", "fix_echo", "fix_ecxo"),
        ("prompts/get", "name", "fix_test_simple_prompt", "fix_test_sixple_prompt"),
        ("resources/read", "uri", "test://static-text", "nope://static-text"),
    ] {
        let denial = client.ask(method, json!({ member: denied })).await;
        let unknowing = client.ask(method, json!({ member: unknown })).await;
        assert_eq!(denial.refusal(), (200, -32602), "{denial}");
        assert_eq!(denial.text().replace(denied, unknown), unknowing.text());
        let names = |answer: &crate::stage::Answer| -> Vec<(String, String)> {
            let headers = answer.headers.iter().filter(|(name, _)| *name != "date");
            headers.map(|(name, value)| (name.to_string(), format!("{value:?}"))).collect()
        };
        assert_eq!(names(&denial), names(&unknowing));
    }
    let legacy = gateway.legacy().await;
    let denial = legacy.request_with_id(json!(1), "tools/call", json!({ "name": "fix_echo" })).send().await;
    let unknowing =
        legacy.request_with_id(json!(1), "tools/call", json!({ "name": "fix_ecxo" })).send().await;
    assert_eq!(denial.text().replace("fix_echo", "fix_ecxo"), unknowing.text());
}

#[tokio::test]
async fn a_subscription_is_acknowledged_first_and_tagged_throughout() {
    for fixture in [Fixture::legacy().await, Fixture::modern().await] {
        let gateway = Gateway::with([("fix", fixture.url())]).start().await;
        let client = gateway.modern();
        let filter = json!({
            "toolsListChanged": true,
            "resourceSubscriptions": ["test://watched-resource", "no:such"],
        });
        let mut listening =
            client.request("subscriptions/listen", json!({ "notifications": filter })).open().await;
        assert_eq!(listening.headers["content-type"], "text/event-stream");
        let tag =
            |message: &Value| message["params"]["_meta"]["io.modelcontextprotocol/subscriptionId"].clone();

        let first = listening.next_json().await;
        assert_eq!(first["method"], "notifications/subscriptions/acknowledged");
        let honoured =
            json!({ "toolsListChanged": true, "resourceSubscriptions": ["test://watched-resource"] });
        assert_eq!((&first["params"]["notifications"], tag(&first)), (&honoured, json!(1)));

        client.call("fix_test_trigger_prompt_change", json!({})).await.result();
        client.call("fix_update_resource", json!({ "uri": "test://watched-resource" })).await.result();
        let updated = listening.next_json().await;
        assert_eq!(updated["method"], "notifications/resources/updated", "prompts were not asked for");
        assert_eq!((&updated["params"]["uri"], tag(&updated)), (&json!("test://watched-resource"), json!(1)));

        client.call("fix_add_tool", json!({ "name": "fresh" })).await.result();
        let changed = listening.next_json().await;
        assert_eq!(
            (&changed["method"], tag(&changed)),
            (&json!("notifications/tools/list_changed"), json!(1))
        );
    }
}

#[tokio::test]
async fn a_subscription_ends_with_a_result_when_the_gateway_does() {
    let upstream = Upstream::modern().tool("t").start().await;
    let mut gateway = Gateway::with([("up", upstream.url())]).start().await;
    let filter = json!({ "notifications": { "toolsListChanged": true } });
    let mut listening = gateway.modern().request("subscriptions/listen", filter).open().await;
    listening.until("notifications/subscriptions/acknowledged").await;
    gateway.shut_down();
    let last = listening.next_json().await;
    assert_eq!(last["id"], 1);
    assert_eq!(last["result"]["resultType"], "complete");
    assert_eq!(last["result"]["_meta"]["io.modelcontextprotocol/subscriptionId"], 1);
    assert_eq!(listening.next().await, None);
    gateway.ended().await;
}

#[tokio::test]
async fn questions_of_a_modern_upstream_are_the_clients_to_answer() {
    let fixture = Fixture::modern().await;
    let gateway = Gateway::with([("fix", fixture.url())]).start().await;
    let client = gateway.modern().declaring(json!({ "elicitation": { "form": {} } }));
    let call = json!({ "name": "fix_test_input_required_result_request_state", "arguments": {} });
    let asked = client.ask("tools/call", call.clone()).await.result();
    assert_eq!(asked["resultType"], "input_required");
    let mut answered = call.clone();
    let key = asked["inputRequests"].as_object().expect("questions").keys().next().expect("one").clone();
    answered["inputResponses"] = json!({ key: { "action": "accept", "content": { "ok": true } } });
    answered["requestState"] = asked["requestState"].clone();
    let done = client.ask("tools/call", answered).await;
    assert!(done.content().contains("state-ok"), "{done}");

    let incapable = gateway.modern().ask("tools/call", call).await;
    assert_eq!(incapable.refusal(), (400, -32021), "{incapable}");
}

#[tokio::test]
async fn errors_of_upstreams_keep_their_status() {
    let script = Upstream::modern().tool("t").on("tools/call", |sent| {
        let answer = error(&sent, 400, r#"{"code":-32021,"message":"no","data":{}}"#);
        async { answer }
    });
    let upstream = script.start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    assert_eq!(gateway.modern().call("up_t", json!({})).await.refusal(), (400, -32021));
}

#[tokio::test]
async fn a_group_is_an_endpoint_of_its_own() {
    let upstream = Upstream::modern().tool("t").answers(r#"{"content":[]}"#).start().await;
    let options = Options::default().groups(|group| group == "g");
    let gateway = Gateway::with([("up", upstream.url())]).options(options).start().await;
    gateway.modern().at("/mcp/g/g").call("up_t", json!({})).await.result();
    gateway.modern().at("/mcp/").call("up_t", json!({})).await.result();
    let lost = Request::post(gateway.address, "/mcp/g/h", "{}").send().await;
    assert_eq!(lost.status, 404);
}

#[tokio::test]
async fn a_call_that_takes_too_long_is_given_up() {
    let probe = Probe::default();
    let enter = probe.clone();
    let script = Upstream::modern().tool("t").on("tools/call", move |sent| {
        let inside = enter.enter();
        async move {
            let _inside = inside;
            std::future::pending::<()>().await;
            result(&sent, "{}")
        }
    });
    let upstream = script.start().await;
    let gateway = Gateway::with([("up", upstream.url())]).timeout(Duration::from_millis(200)).start().await;
    for result in [
        gateway.modern().call("up_t", json!({})).await.result(),
        gateway.legacy().await.call("up_t", json!({})).await.result(),
    ] {
        assert_eq!(result["isError"], true, "{result}");
        assert_eq!(result["structuredContent"]["code"], "timed_out");
    }
    eventually("both are over at the upstream", async || probe.is_over() == 2).await;
}
