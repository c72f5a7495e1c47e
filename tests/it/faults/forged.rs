//! Clients that name what is not theirs: sessions, tasks, states, events.

use http::Method;
use serde_json::{Value, json};

use super::house::{House, tells_nothing};
use crate::stage::{Answer, Fixture, Legacy, Request, Upstream};

/// Refused, with an error and nothing else.
fn refused(what: &str, answer: &Answer, status: u16, code: i64) {
    assert_eq!(answer.refusal(), (status, code), "{what}: {answer}");
    tells_nothing(what, answer.text());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn session_ids_that_are_forged_stale_or_foreign() {
    let house = House::new().await;
    let upstream = Upstream::legacy().tool("t").answers(r#"{"content":[]}"#).start().await;
    house.add(&upstream).await;
    let (mine, ended) = (house.legacy().await, house.legacy().await);
    mine.call("bad_t", json!({})).await.result();
    ended.end().await;
    // The id that the gateway has at its upstream.
    let theirs = upstream.seen_of("tools/call")[0].header("mcp-session-id").expect("a session").to_owned();
    let mut bent = mine.session.clone();
    let last = if bent.ends_with('A') { 'B' } else { 'A' };
    bent.pop();
    bent.push(last);
    upstream.forget();
    let call = |session: &str| {
        let body =
            json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": { "name": "bad_t" } });
        let request = Request::post(house.address(), "/mcp", body.to_string());
        request.header("mcp-session-id", session).header("mcp-protocol-version", "2025-11-25")
    };
    let long = "x".repeat(4000);
    let (upper, doubled) = (mine.session.to_uppercase(), format!("{0}{0}", mine.session));
    let forged =
        ["", "0", "../../etc/passwd", "null", &long, &bent, &theirs, &ended.session, &upper, &doubled];
    for session in forged {
        house
            .during("forged", async {
                refused(session, &call(session).send().await, 404, -32600);
                for method in [Method::GET, Method::DELETE] {
                    let answer = Request::new(house.address(), method, "/mcp")
                        .header("accept", "text/event-stream")
                        .header("mcp-session-id", session);
                    assert_eq!(answer.send().await.status, 404, "{session}");
                }
            })
            .await;
    }
    let both = call(&mine.session).header("mcp-session-id", &ended.session);
    refused("two at once", &both.send().await, 400, -32600);
    // A session of one door is none at another.
    let elsewhere =
        Request::post(house.address(), "/mcp/g/none", "{}").header("mcp-session-id", &mine.session);
    assert_eq!(elsewhere.send().await.status, 404);
    assert!(upstream.seen().is_empty(), "nothing of it reached the upstream");
    mine.call("bad_t", json!({})).await.result();
    mine.end().await;
    house.remove("forged").await;
}

/// Nothing is kept to be sent again, so there is nothing that a forged event id could be given.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn event_ids_that_are_forged_or_foreign() {
    let house = House::new().await;
    let upstream = Upstream::legacy().tool("t").answers(r#"{"content":[{"type":"text","text":"secret"}]}"#);
    let upstream = upstream.start().await;
    house.add(&upstream).await;
    let (mine, theirs) = (house.legacy().await, house.legacy().await);
    theirs.call("bad_t", json!({})).await.result();
    for id in ["0", "1", "-1", "99999999999999999999", "' or 1=1", &theirs.session] {
        for client in [&mine, &theirs] {
            let request = client.bare(Method::GET).header("accept", "text/event-stream");
            let mut stream = request.header("last-event-id", id).open().await;
            if stream.status != 200 {
                assert!(stream.status.is_client_error(), "{}", stream.status);
                continue;
            }
            // It is a stream like any other: the first thing on it is what is said from now on.
            let first = tokio::time::timeout(std::time::Duration::from_millis(100), stream.next()).await;
            assert!(first.is_err(), "{first:?} was sent again");
        }
    }
    let modern = Request::new(house.address(), Method::GET, "/mcp").header("last-event-id", "1");
    assert_eq!(modern.send().await.status, 405);
    mine.end().await;
    theirs.end().await;
    house.remove("forged events").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn task_ids_that_are_forged() {
    let house = House::new().await;
    let upstream = Upstream::modern().tool("t").answers(r#"{"content":[]}"#).start().await;
    house.add(&upstream).await;
    upstream.forget();
    let (modern, legacy) = (house.modern(), house.legacy().await);
    for task in ["1", "bad_1", "bad:1", "good_task", "../x", "", &"x".repeat(10_000)] {
        for method in ["tasks/get", "tasks/cancel", "tasks/update"] {
            let params = json!({ "taskId": task, "inputResponses": {} });
            let named = modern.request(method, params.clone()).header("mcp-name", task);
            for answer in [named.send().await, legacy.ask(method, params).await] {
                assert!(answer.error()["code"].is_i64(), "{method} {task}: {answer}");
                tells_nothing(method, answer.text());
            }
        }
    }
    assert!(upstream.seen().is_empty(), "{:?}", upstream.seen());
    legacy.end().await;
    house.remove("forged tasks").await;
}

/// A state that is the upstream's alone is the upstream's to check, and goes there untouched.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn states_that_are_forged() {
    let house = House::new().await;
    let fixture = Fixture::modern().await;
    house.add_at(&fixture.url());
    house.lists("bad_echo").await;
    let client = house.modern().declaring(json!({ "elicitation": {}, "sampling": {}, "roots": {} }));
    let tool = "bad_test_input_required_result_request_state";
    let first = client.call(tool, json!({})).await.result();
    assert_eq!(first["resultType"], "input_required", "{first}");
    let state = first["requestState"].as_str().expect("a state").to_owned();
    let key = first["inputRequests"].as_object().expect("questions").keys().next().expect("one").clone();
    let again = |tool: &str, state: Value| {
        let answers =
            json!({ (key.clone()): { "action": "accept", "content": { "ok": true, "confirm": true } } });
        client.request(
            "tools/call",
            json!({ "name": tool, "arguments": {}, "inputResponses": answers, "requestState": state }),
        )
    };
    let mut bent = state.clone();
    bent.pop();
    for forged in [json!("forged"), json!(""), json!(bent), json!(format!("{state}x"))] {
        let answer = house.during("a forged state", again(tool, forged.clone()).send()).await;
        let said = answer.json();
        assert!(said["error"]["code"].is_i64() || said["result"]["isError"] == true, "{forged}: {answer}");
        tells_nothing("a forged state", answer.text());
    }
    for strange in [json!(7), json!({}), json!(null)] {
        let answer = house.during("a strange state", again(tool, strange.clone()).send()).await;
        tells_nothing("a strange state", answer.text());
    }
    let whole = again(tool, json!(state)).send().await;
    assert_eq!(whole.result()["resultType"], "complete", "the true one does it: {whole}");
    house.remove("a forged state").await;
}

/// Answers to questions that nobody asked, or that somebody else was asked, change nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_to_the_questions_of_others() {
    let house = House::new().await;
    let fixture = Fixture::legacy().await;
    house.add_at(&fixture.url());
    house.lists("bad_test_elicitation").await;
    let asked = house.legacy_with(json!({ "elicitation": {} })).await;
    let eve: Legacy = house.legacy_with(json!({ "elicitation": {} })).await;
    let params = json!({ "name": "bad_test_elicitation", "arguments": { "message": "Who?" } });
    let mut call = asked.request("tools/call", params).open().await;
    let question = call.until("elicitation/create").await;
    for id in [question["id"].clone(), json!(1), json!("1"), json!(-1), json!(0), json!(1e300)] {
        let forged =
            json!({ "jsonrpc": "2.0", "id": id, "result": { "action": "accept", "content": { "x": 1 } } });
        let status = eve.raw(forged.to_string()).send().await.status;
        assert!(status == 202 || status == 400, "{status}");
    }
    asked.answer(&question, json!({ "action": "decline" })).await;
    let last = call.next_json().await;
    assert!(last["result"]["content"][0]["text"].as_str().expect("text").contains("decline"), "{last}");
    asked.end().await;
    eve.end().await;
    house.remove("foreign answers").await;
}
