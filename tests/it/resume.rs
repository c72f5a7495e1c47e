//! Legacy clients whose connection breaks: a stream is picked up where it was, and no other.

use http::Method;
use serde_json::{Value, json};

use crate::stage::{Fixture, Gateway, Legacy, Request, Stream, Upstream, events, eventually};

/// The id of an event and its message.
fn parts(event: &str) -> (String, Option<Value>) {
    let field = |name: &str| event.lines().find_map(|line| line.strip_prefix(name));
    let id = field("id: ").unwrap_or_else(|| panic!("no id: {event}")).to_owned();
    let data = field("data: ").unwrap_or_else(|| panic!("no data: {event}"));
    (id, (!data.is_empty()).then(|| serde_json::from_str(data).expect("JSON")))
}

async fn next(stream: &mut Stream) -> (String, Option<Value>) {
    parts(&stream.event().await.expect("one more event"))
}

fn resume(client: &Legacy, last: &str) -> Request {
    client.bare(Method::GET).header("accept", "text/event-stream").header("last-event-id", last)
}

fn elicit(client: &Legacy) -> Request {
    let params = json!({ "name": "fix_test_elicitation", "arguments": { "message": "Who?" } });
    client.request("tools/call", params)
}

const ANSWER: &str = r#"{"action":"accept","content":{"username":"ann","email":"ann@example.com"}}"#;

fn answer() -> Value {
    serde_json::from_str(ANSWER).expect("JSON")
}

#[tokio::test]
async fn a_call_whose_connection_broke_is_picked_up_with_its_result() {
    for fixture in [Fixture::legacy().await, Fixture::modern().await] {
        let gateway = Gateway::with([("fix", fixture.url())]).start().await;
        let client = gateway.legacy_with(json!({ "elicitation": {} })).await;
        let mut call = elicit(&client).open().await;
        let first = call.event().await.expect("an event");
        assert!(first.contains("\nretry: ") && first.contains("\ndata: \n"), "it can be picked up: {first}");
        let (primed, _) = parts(&first);
        let (asked, question) = next(&mut call).await;
        let question = question.expect("a question");
        drop(call);

        // From before the question, it comes again; from behind it, what follows does.
        let mut again = resume(&client, &primed).open().await;
        assert_eq!(again.status, 200);
        assert_eq!(next(&mut again).await, (asked.clone(), Some(question.clone())));
        drop(again);
        client.answer(&question, answer()).await;
        let mut rest = resume(&client, &asked).open().await;
        let (_, result) = next(&mut rest).await;
        let result = result.expect("the result");
        assert!(result["result"]["content"][0]["text"].as_str().expect("a text").contains("ann@example.com"));
        assert_eq!(rest.event().await, None, "the stream is over");
    }
}

#[tokio::test]
async fn a_stream_has_one_reader() {
    let fixture = Fixture::legacy().await;
    let gateway = Gateway::with([("fix", fixture.url())]).start().await;
    let client = gateway.legacy_with(json!({ "elicitation": {} })).await;
    let mut call = elicit(&client).open().await;
    let (primed, _) = next(&mut call).await;
    let (_, question) = next(&mut call).await;
    let mut second = resume(&client, &primed).open().await;
    assert_eq!(call.event().await, None, "the first reader is done");
    next(&mut second).await;
    client.answer(&question.expect("a question"), answer()).await;
    assert!(next(&mut second).await.1.expect("the result")["result"].is_object());
}

#[tokio::test]
async fn the_stream_for_everything_else_is_picked_up_too() {
    let fixture = Fixture::start().await;
    let gateway = Gateway::with([("fix", fixture.url())]).start().await;
    let client = gateway.legacy().await;
    let mut stream = client.listen().await;
    let (primed, _) = next(&mut stream).await;
    drop(stream);
    client.call("fix_add_tool", json!({ "name": "fresh" })).await.result();
    // Whether the gateway has noticed yet that the stream broke makes no difference.
    let mut stream = resume(&client, &primed).open().await;
    stream.until("notifications/tools/list_changed").await;
    client.call("fix_test_trigger_prompt_change", json!({})).await.result();
    stream.until("notifications/prompts/list_changed").await;
}

#[tokio::test]
async fn an_id_leads_only_where_it_was_given() {
    let fixture = Fixture::legacy().await;
    let gateway = Gateway::with([("fix", fixture.url())]).start().await;
    let declared = json!({ "elicitation": {} });
    let (client, other) = (gateway.legacy_with(declared.clone()).await, gateway.legacy_with(declared).await);
    let (mut call, mut theirs) = (elicit(&client).open().await, elicit(&other).open().await);
    let (id, _) = next(&mut call).await;
    let (foreign, _) = next(&mut theirs).await;
    let (question_id, question) = next(&mut call).await;

    let ahead = question_id.replace("-1-1", "-1-2");
    for bad in [&*foreign, "", "made-up", "1", "0-0-0", &*ahead, &*id.replace("-1-", "-7-")] {
        let refusal = resume(&client, bad).send().await;
        assert_eq!(refusal.refusal(), (400, -32600), "{bad:?}");
        assert!(!refusal.text().contains("elicitation"));
    }
    let twice = resume(&client, &id).header("last-event-id", &id);
    assert_eq!(twice.send().await.refusal(), (400, -32600));
    // The session comes first, and somebody else's is none.
    assert_eq!(resume(&client, &id).set("x-user", "eve").send().await.status, 404);
    assert_eq!(resume(&client, &id).without("mcp-session-id").send().await.status, 405);

    // Nothing of that took the stream away from its reader.
    client.answer(&question.expect("a question"), answer()).await;
    assert!(next(&mut call).await.1.expect("the result")["result"].is_object());
}

#[tokio::test]
async fn clients_before_2025_11_25_get_ids_and_no_empty_events() {
    let fixture = Fixture::legacy().await;
    let gateway = Gateway::with([("fix", fixture.url())]).start().await;
    for version in ["2025-03-26", "2025-06-18"] {
        let client =
            Legacy::open_as(None, gateway.address, "/mcp", version, json!({ "elicitation": {} })).await;
        let mut call = elicit(&client).open().await;
        let (id, question) = next(&mut call).await;
        let question = question.expect("a question at once");
        drop(call);
        client.answer(&question, answer()).await;
        let mut rest = resume(&client, &id).open().await;
        assert!(next(&mut rest).await.1.expect("the result")["result"].is_object());
    }
}

#[tokio::test]
async fn a_client_that_was_away_too_long_is_told_so() {
    // So many log messages that the first of them are gone.
    let script = Upstream::modern().tool("t").on("tools/call", |sent| {
        let log = |n: usize| {
            let params = json!({ "level": "info", "data": n });
            json!({ "jsonrpc": "2.0", "method": "notifications/message", "params": params }).to_string()
        };
        let answer = format!(r#"{{"jsonrpc":"2.0","id":{},"result":{{"content":[]}}}}"#, sent.raw("id"));
        let messages: Vec<String> = (0..1000).map(log).chain([answer]).collect();
        async move { events(messages) }
    });
    let upstream = script.start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let client = gateway.legacy().await;
    let mut call = client.request("tools/call", json!({ "name": "up_t" })).open().await;
    let (primed, _) = next(&mut call).await;
    let (second, _) = next(&mut call).await;
    drop(call);
    eventually("the first are gone", async || {
        resume(&client, &primed).open().await.status == 400
            && resume(&client, &second).open().await.status == 400
    })
    .await;
    // The session is as good as ever.
    client.ask("ping", json!({})).await.result();
}

#[tokio::test]
async fn a_stream_that_is_over_is_not_picked_up_for_nothing() {
    let fixture = Fixture::legacy().await;
    let gateway = Gateway::with([("fix", fixture.url())]).start().await;
    let client = gateway.legacy_with(json!({ "elicitation": {} })).await;
    let params = json!({ "name": "fix_test_elicitation", "arguments": { "message": "Who?" } });
    let mut call = client.request_with_id(json!("c"), "tools/call", params).open().await;
    let (primed, _) = next(&mut call).await;
    let (asked, _) = next(&mut call).await;
    client.notify("notifications/cancelled", json!({ "requestId": "c" })).await;
    assert_eq!(call.event().await, None);
    // A client that was sent an empty stream would come again and again.
    assert_eq!(resume(&client, &asked).send().await.refusal(), (400, -32600));
    let mut rest = resume(&client, &primed).open().await;
    assert_eq!(next(&mut rest).await.0, asked);
    assert_eq!(rest.event().await, None);
}

#[tokio::test]
async fn what_happened_while_a_client_was_away_waits_in_little_room() {
    let fixture = Fixture::legacy().await;
    let gateway = Gateway::with([("fix", fixture.url())]).start().await;
    let client = gateway.legacy_with(json!({ "elicitation": {} })).await;
    let mut call = elicit(&client).open().await;
    let (primed, _) = next(&mut call).await;
    drop(call);
    // Others come and go; each has a stream of its own, and all of them fit.
    for _ in 0..50 {
        let params = json!({ "name": "fix_test_tool_with_progress", "_meta": { "progressToken": "p" } });
        client.ask("tools/call", params).await.result();
    }
    let mut again = resume(&client, &primed).open().await;
    let (_, question) = next(&mut again).await;
    client.answer(&question.expect("the question"), answer()).await;
    assert!(next(&mut again).await.1.expect("the result")["result"].is_object());
}

#[tokio::test]
async fn modern_streams_have_no_ids() {
    let fixture = Fixture::modern().await;
    let gateway = Gateway::with([("fix", fixture.url())]).start().await;
    let params = json!({ "name": "fix_test_tool_with_progress", "_meta": { "progressToken": "p" } });
    let answer = gateway.modern().ask("tools/call", params).await;
    assert!(answer.text().contains("event: message") && !answer.text().contains("id: "), "{answer}");
}
