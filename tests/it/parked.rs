//! A modern client, and a legacy upstream that asks in the middle of a call.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt as _, stream};
use serde_json::{Value, json};
use tokio::sync::oneshot;

use crate::stage::{
    Answer, Fixture, Gateway, Modern, Probe, Script, Sent, Upstream, events, eventually, open_events, plain,
    result,
};

/// The answers that a quiz waits for, by the question's id.
type Waiting = Arc<Mutex<HashMap<String, oneshot::Sender<Value>>>>;

/// A legacy upstream whose tool asks `rounds` questions, one after the other, and tells the answers.
fn quiz(rounds: usize, inside: Probe) -> Script {
    let (waiting, next) = (Waiting::default(), Arc::new(AtomicUsize::new(0)));
    let answered = waiting.clone();
    Upstream::legacy()
        .tool("quiz")
        .on("tools/call", move |sent| {
            let (waiting, next, inside) = (waiting.clone(), next.clone(), inside.enter());
            let begin = (0, Vec::<Value>::new(), None::<oneshot::Receiver<Value>>);
            let messages = stream::unfold(Some(begin), move |state| {
                let (waiting, next, sent, _inside) = (waiting.clone(), next.clone(), sent.clone(), &inside);
                async move {
                    let (round, mut answers, asked) = state?;
                    if let Some(asked) = asked {
                        answers.push(asked.await.expect("an answer"));
                    }
                    if round == rounds {
                        return Some((told(&sent, &answers), None));
                    }
                    let id = format!("ask-{}", next.fetch_add(1, Ordering::SeqCst));
                    let (answer, asked) = oneshot::channel();
                    waiting.lock().expect("no panic").insert(id.clone(), answer);
                    let nonce = &sent.params()["arguments"]["nonce"];
                    let params = json!({ "message": format!("round {round} of {nonce}"), "requestedSchema": {} });
                    let question = json!({ "jsonrpc": "2.0", "id": id, "method": "elicitation/create", "params": params });
                    Some((question.to_string(), Some((round + 1, answers, Some(asked)))))
                }
            });
            async { open_events(messages.boxed()) }
        })
        .on("", move |sent| {
            let answer = answered.lock().expect("no panic").remove(sent.raw("id").trim_matches('"'));
            if let Some(answer) = answer {
                let said: Value = serde_json::from_slice(&sent.body).expect("JSON");
                let _ = answer.send(said);
            }
            async { plain(202, "") }
        })
}

fn told(sent: &Sent, answers: &[Value]) -> String {
    let said: Vec<&Value> =
        answers.iter().map(|a| if a["error"].is_null() { &a["result"] } else { &a["error"] }).collect();
    let text = json!({ "nonce": sent.params()["arguments"]["nonce"], "answers": said }).to_string();
    let result = json!({ "content": [{ "type": "text", "text": text }] });
    format!(r#"{{"jsonrpc":"2.0","id":{},"result":{result}}}"#, sent.raw("id"))
}

fn asking(gateway: &Gateway) -> Modern {
    gateway.modern().declaring(json!({ "elicitation": {} }))
}

/// The params of a call, and of its retry.
fn params(tool: &str, nonce: u64) -> Value {
    json!({ "name": tool, "arguments": { "nonce": nonce } })
}

fn retry(tool: &str, nonce: u64, state: &Value, answer: Value) -> Value {
    let mut params = params(tool, nonce);
    params["inputResponses"] = json!({ "q1": { "action": "accept", "content": answer } });
    params["requestState"] = state.clone();
    params
}

fn question(answer: &Answer) -> (Value, Value) {
    let result = answer.result();
    assert_eq!(result["resultType"], "input_required", "{answer}");
    (result["inputRequests"]["q1"]["params"]["message"].clone(), result["requestState"].clone())
}

fn outcome(answer: &Answer) -> Value {
    assert_eq!(answer.result()["resultType"], "complete", "{answer}");
    serde_json::from_str(&answer.content()).expect("JSON")
}

fn is_refused(answer: &Answer) {
    assert_eq!(answer.error()["code"], -32602, "{answer}");
    assert!(answer.error()["message"].as_str().is_some_and(|m| m.contains("requestState")), "{answer}");
}

#[tokio::test]
async fn round_after_round_the_client_answers_and_the_call_goes_on() {
    let inside = Probe::default();
    let upstream = quiz(3, inside.clone()).start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let client = asking(&gateway);
    let mut answer = client.ask("tools/call", params("up_quiz", 7)).await;
    for round in 0..3 {
        let (message, state) = question(&answer);
        assert_eq!(message, format!("[up] round {round} of 7"), "the asking upstream is named");
        answer = client.ask("tools/call", retry("up_quiz", 7, &state, json!({ "round": round }))).await;
    }
    let answers: Vec<Value> =
        (0..3).map(|round| json!({ "action": "accept", "content": { "round": round } })).collect();
    assert_eq!(outcome(&answer), json!({ "nonce": 7, "answers": answers }));
    assert_eq!(inside.has_begun(), 1, "one call, whatever the rounds");
}

#[tokio::test]
async fn a_real_legacy_server_asks_a_modern_client() {
    let fixture = Fixture::legacy().await;
    let gateway = Gateway::with([("fix", fixture.url())]).start().await;
    let client = gateway.modern().declaring(json!({ "elicitation": {}, "sampling": {} }));
    let call = json!({ "name": "fix_test_elicitation", "arguments": { "message": "Who?" } });
    let asked = client.ask("tools/call", call.clone()).await.result();
    let wanted = &asked["inputRequests"]["q1"];
    assert_eq!(wanted["method"], "elicitation/create");
    assert_eq!(wanted["params"]["message"], "[fix] Who?");
    let mut again = call;
    again["requestState"] = asked["requestState"].clone();
    again["inputResponses"] = json!({ "q1": { "action": "accept", "content": { "username": "ann" } } });
    let told = client.ask("tools/call", again).await;
    assert!(told.content().contains("ann"), "{told}");

    let call = json!({ "name": "fix_test_sampling", "arguments": { "prompt": "Hello" } });
    let asked = client.ask("tools/call", call.clone()).await.result();
    assert_eq!(asked["inputRequests"]["q1"]["method"], "sampling/createMessage", "{asked}");
    let mut again = call;
    again["requestState"] = asked["requestState"].clone();
    let said =
        json!({ "role": "assistant", "content": { "type": "text", "text": "good day" }, "model": "m" });
    again["inputResponses"] = json!({ "q1": said });
    let told = client.ask("tools/call", again).await;
    assert!(told.content().contains("good day"), "{told}");
}

#[tokio::test]
async fn a_state_is_refused_that_is_forged_stale_replayed_or_foreign() {
    let upstream = quiz(1, Probe::default()).start().await;
    let gateway = Gateway::with([("up", upstream.url()), ("twin", upstream.url())]).start().await;
    let client = asking(&gateway);
    let (_, state) = question(&client.ask("tools/call", params("up_quiz", 1)).await);
    let text = state.as_str().expect("a string");
    let forged = format!("{}{}", &text[..text.len() - 1], if text.ends_with('A') { "B" } else { "A" });
    let ask = |params: Value| client.ask("tools/call", params);
    is_refused(&ask(retry("up_quiz", 1, &json!(forged), json!({}))).await);
    is_refused(&ask(retry("up_quiz", 1, &json!("made up"), json!({}))).await);
    is_refused(&ask(retry("up_quiz", 2, &state, json!({}))).await);
    is_refused(&ask(retry("twin_quiz", 1, &state, json!({}))).await);
    let eve = client.request("tools/call", retry("up_quiz", 1, &state, json!({}))).header("x-user", "eve");
    is_refused(&eve.send().await);
    let elsewhere = Gateway::with([("up", upstream.url())]).start().await;
    let restarted = asking(&elsewhere).ask("tools/call", retry("up_quiz", 1, &state, json!({}))).await;
    is_refused(&restarted);

    outcome(&ask(retry("up_quiz", 1, &state, json!({}))).await);
    is_refused(&ask(retry("up_quiz", 1, &state, json!({}))).await);
}

#[tokio::test]
async fn a_call_that_waits_holds_no_permit_and_has_no_deadline_of_a_call() {
    let upstream = quiz(1, Probe::default()).start().await;
    let limit = Duration::from_millis(400);
    let gateway = Gateway::with([("up", upstream.url())]).concurrency(1).timeout(limit).start().await;
    let client = asking(&gateway);
    let (_, first) = question(&client.ask("tools/call", params("up_quiz", 1)).await);
    let (_, second) = question(&client.ask("tools/call", params("up_quiz", 2)).await);
    tokio::time::sleep(limit * 2).await;
    for (nonce, state) in [(2, second), (1, first)] {
        let answer = client.ask("tools/call", retry("up_quiz", nonce, &state, json!({}))).await;
        assert_eq!(outcome(&answer)["nonce"], nonce);
    }
}

#[tokio::test]
async fn a_client_that_vanishes_in_a_retry_has_cancelled_the_call() {
    let inside = Probe::default();
    let entered = inside.clone();
    let script = Upstream::legacy().tool("stuck").on("tools/call", move |_| {
        let question = r#"{"jsonrpc":"2.0","id":1,"method":"elicitation/create","params":{"message":"?"}}"#;
        let held = entered.enter();
        let messages = stream::once(async { question.to_owned() }).chain(stream::pending());
        async { open_events(messages.inspect(move |_| _ = &held)) }
    });
    let upstream = script.start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let client = asking(&gateway);
    let (_, state) = question(&client.ask("tools/call", params("up_stuck", 1)).await);
    let going_on = client.request("tools/call", retry("up_stuck", 1, &state, json!({}))).open().await;
    assert_eq!(inside.is_over(), 0);
    drop(going_on);
    inside.over().await;
    eventually("the upstream is told", async || upstream.seen_of("notifications/cancelled").len() == 1).await;
}

#[tokio::test]
async fn many_at_once_and_no_answer_is_crossed() {
    let upstream = quiz(3, Probe::default()).start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let client = asking(&gateway);
    let one = |nonce: u64| {
        let client = client.clone();
        async move {
            let mut answer = client.ask("tools/call", params("up_quiz", nonce)).await;
            for round in 0..3 {
                let (message, state) = question(&answer);
                assert_eq!(message, format!("[up] round {round} of {nonce}"));
                let reply = json!({ "nonce": nonce, "round": round });
                answer = client.ask("tools/call", retry("up_quiz", nonce, &state, reply)).await;
            }
            let outcome = outcome(&answer);
            assert_eq!(outcome["nonce"], nonce);
            for round in 0..3 {
                assert_eq!(outcome["answers"][round]["content"], json!({ "nonce": nonce, "round": round }));
            }
        }
    };
    stream::iter((0..100).map(one)).buffer_unordered(20).collect::<Vec<()>>().await;
}

#[tokio::test]
async fn a_client_that_cannot_be_asked_is_not() {
    let upstream = quiz(1, Probe::default()).start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let answer = gateway.modern().ask("tools/call", params("up_quiz", 1)).await;
    assert_eq!(outcome(&answer)["answers"][0]["code"], -32021, "{answer}");
    eventually("nothing waits", async || upstream.seen_of("tools/call").len() == 1).await;
}

/// A legacy upstream that says everything a call causes on the stream that belongs to no request, as many do.
fn aside() -> Script {
    // Each session has a stream of its own.
    let streams = Arc::new(Mutex::new(HashMap::<String, tokio::sync::mpsc::UnboundedSender<String>>::new()));
    let opened = streams.clone();
    let session = |sent: &Sent| sent.header("mcp-session-id").expect("a session").to_owned();
    let (answer, answered) = tokio::sync::mpsc::unbounded_channel::<Value>();
    let answered = Arc::new(tokio::sync::Mutex::new(answered));
    Upstream::legacy()
        .tool("t")
        .declares("logging", "{}")
        .on("logging/setLevel", |sent| async move { result(&sent, "{}") })
        .on("GET", move |sent| {
            let (stray, strays) = tokio::sync::mpsc::unbounded_channel();
            opened.lock().expect("no panic").insert(session(&sent), stray);
            let messages =
                stream::unfold(strays, |mut strays| async { Some((strays.recv().await?, strays)) });
            async { open_events(messages) }
        })
        .on("tools/call", move |sent| {
            let stray = streams.lock().expect("no panic")[&session(&sent)].clone();
            for level in ["debug", "info", "error"] {
                let params = json!({ "level": level, "data": level });
                let log = json!({ "jsonrpc": "2.0", "method": "notifications/message", "params": params });
                stray.send(log.to_string()).expect("somebody listens");
            }
            let params = json!({ "message": "Which?", "requestedSchema": {} });
            let question =
                json!({ "jsonrpc": "2.0", "id": "aside", "method": "elicitation/create", "params": params });
            stray.send(question.to_string()).expect("somebody listens");
            let answered = answered.clone();
            async move {
                let said = answered.lock().await.recv().await.expect("an answer");
                let text = said.to_string();
                result(&sent, &json!({ "content": [{ "type": "text", "text": text }] }).to_string())
            }
        })
        .on("", move |sent| {
            let said: Value = serde_json::from_slice(&sent.body).expect("JSON");
            let _ = answer.send(said);
            async { plain(202, "") }
        })
}

#[tokio::test]
async fn what_is_said_aside_in_the_middle_of_the_only_call_belongs_to_it() {
    let upstream = aside().start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let client = asking(&gateway);
    let mut call = params("up_t", 1);
    call["_meta"] = json!({ "io.modelcontextprotocol/logLevel": "info" });
    let answer = client.ask("tools/call", call).await;
    let said: Vec<Value> =
        answer.messages().iter().map(|m| serde_json::from_slice(m).expect("JSON")).collect();
    let levels: Vec<&Value> = said.iter().map(|m| &m["params"]["level"]).filter(|l| l.is_string()).collect();
    assert_eq!(levels, ["info", "error"], "no less than was asked for, and no more: {answer}");
    let (message, state) = question(&answer);
    assert_eq!(message, "[up] Which?");
    let answer = client.ask("tools/call", retry("up_t", 1, &state, json!({ "a": 1 }))).await;
    assert_eq!(outcome(&answer)["result"]["content"], json!({ "a": 1 }), "{answer}");
}

#[tokio::test]
async fn who_did_not_ask_for_logs_gets_none() {
    let script = Upstream::legacy().tool("t").on("tools/call", |sent| {
        let log = r#"{"jsonrpc":"2.0","method":"notifications/message","params":{"level":"error","data":1}}"#;
        let messages = [log.to_owned(), told(&sent, &[])];
        async { events(messages) }
    });
    let upstream = script.start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let answer = gateway.modern().ask("tools/call", params("up_t", 1)).await;
    assert_eq!(answer.messages().len(), 1, "{answer}");
    let answer = gateway.legacy().await.call("up_t", json!({})).await;
    assert_eq!(answer.messages().len(), 2, "a legacy client leaves that to the server: {answer}");
}
