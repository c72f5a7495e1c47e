//! Tasks of both kinds: ids that lead back to their upstream, and are worth something to their creator only.

use std::sync::{Arc, Mutex};

use futures_util::StreamExt as _;
use portcullis::{
    app::{App, Settings},
    identity::{Caller, Client},
    protocol::{McpRequest, Method, Params},
    registry::{MemoryBackend, Registry, ServerRecord},
    upstream::UpstreamSpec,
};
use serde_json::{Value, json};
use tower::ServiceExt as _;

use crate::stage::{
    Answer, Gateway, Legacy, Modern, Request, Script, Sent, Upstream, error, eventually, open_events, plain,
    result,
};

const EXTENSION: &str = "io.modelcontextprotocol/tasks";
const RELATED: &str = "io.modelcontextprotocol/related-task";

// === the extension of 2026-07-28 ===

/// A server whose tool `slow` begins a task, which asks something.
fn slow(name: &'static str) -> Script {
    Upstream::modern()
        .tools(&[r#"{"name":"slow"}"#, r#"{"name":"quick"}"#])
        .declares("extensions", &format!(r#"{{"{EXTENSION}":{{}}}}"#))
        .on("tools/call", move |sent| {
            let answer = match sent.params()["name"].as_str() {
                Some("slow") => format!(
                    r#"{{"resultType":"task","taskId":"t-{name}","status":"working","ttlMs":null,"extra":1.10}}"#
                ),
                _ => r#"{"resultType":"complete","taskId":"mine","content":[]}"#.to_owned(),
            };
            let answer = result(&sent, &answer);
            async { answer }
        })
        .on("tasks/get", move |sent| {
            let question = json!({ "method": "elicitation/create", "params": { "message": "Sure?" } });
            let answer = known(&sent, name, |id| {
                json!({
                    "resultType": "complete", "taskId": id, "status": "input_required",
                    "inputRequests": { "q": question },
                })
            });
            async { answer }
        })
        .on("tasks/update", move |sent| {
            let answer = known(&sent, name, |_| json!({ "resultType": "complete" }));
            async { answer }
        })
        .on("tasks/cancel", move |sent| {
            let answer = known(&sent, name, |_| json!({ "resultType": "complete" }));
            async { answer }
        })
}

fn known(sent: &Sent, name: &str, answer: impl FnOnce(&str) -> Value) -> axum::response::Response {
    let id = sent.params()["taskId"].as_str().expect("an id").to_owned();
    match id == format!("t-{name}") {
        true => result(sent, &answer(&id).to_string()),
        false => error(sent, 200, r#"{"code":-32602,"message":"the server does not know it"}"#),
    }
}

fn able(client: Modern) -> Modern {
    client.declaring(json!({ "elicitation": {}, "extensions": { EXTENSION: {} } }))
}

/// A request about a task.
fn about(client: &Modern, method: &str, id: &str) -> Request {
    client.request(method, json!({ "taskId": id, "inputResponses": {} })).header("mcp-name", id)
}

fn id_of(answer: &Answer) -> String {
    answer.result()["taskId"].as_str().unwrap_or_else(|| panic!("no id: {answer}")).to_owned()
}

#[tokio::test]
async fn a_task_is_asked_for_where_it_is() {
    let (a, b) = (slow("a").start().await, slow("b").start().await);
    let gateway = Gateway::with([("a", a.url()), ("b", b.url())]).start().await;
    let client = able(gateway.modern());
    let discovered = client.ask("server/discover", json!({})).await.result();
    assert_eq!(discovered["capabilities"]["extensions"], json!({ EXTENSION: {} }));
    let created = client.call("b_slow", json!({})).await;
    assert_eq!(created.result()["resultType"], "task");
    assert!(created.text().contains(r#""ttlMs":null,"extra":1.10"#), "the rest is as it was: {created}");
    let id = id_of(&created);
    assert!(!id.contains("t-b"));
    let got = about(&client, "tasks/get", &id).send().await;
    assert_eq!(id_of(&got), id);
    // The person who is asked learns by whom.
    let question = &got.result()["inputRequests"]["q"]["params"]["message"];
    assert_eq!(question, "[b] Sure?");
    for method in ["tasks/update", "tasks/cancel"] {
        assert_eq!(about(&client, method, &id).send().await.result(), json!({ "resultType": "complete" }));
        let sent = &b.seen_of(method)[0];
        assert_eq!((sent.params()["taskId"].as_str(), sent.header("mcp-name")), (Some("t-b"), Some("t-b")));
    }
    assert!(a.seen_of("tasks/get").is_empty());
    // A member of that name in an ordinary result is none of ours.
    assert_eq!(client.call("b_quick", json!({})).await.result()["taskId"], "mine");
}

#[tokio::test]
async fn an_id_is_worth_nothing_to_anybody_else() {
    let upstream = slow("a").start().await;
    let gateway = Gateway::with([("a", upstream.url())]).start().await;
    let client = able(gateway.modern());
    let call = || client.request("tools/call", json!({ "name": "a_slow" }));
    let id = id_of(&call().header("x-user", "alice").send().await);
    let get = |id: &str| about(&client, "tasks/get", id);
    assert_eq!(id_of(&get(&id).header("x-user", "alice").send().await), id);
    let foreign = get(&id).header("x-user", "eve").send().await;
    assert_eq!(foreign.refusal(), (200, -32602));
    let nobody = get(&id).send().await;
    assert_eq!(nobody.error(), foreign.error());
    let tail = if id.ends_with('A') { "B" } else { "A" };
    for forged in ["t-a", "nonsense", &format!("{}{tail}", &id[..id.len() - 1])] {
        let refused = get(forged).header("x-user", "alice").send().await;
        assert_eq!(refused.refusal(), (200, -32602), "{forged}");
    }
    // Another gateway has another key.
    let other = Gateway::with([("a", upstream.url())]).start().await;
    let refused = about(&able(other.modern()), "tasks/get", &id).header("x-user", "alice").send().await;
    assert_eq!(refused.refusal(), (200, -32602));
    assert_eq!(upstream.seen_of("tasks/get").len(), 1);
}

#[tokio::test]
async fn who_does_not_declare_tasks_gets_none() {
    let upstream = slow("a").start().await;
    let gateway = Gateway::with([("a", upstream.url())]).start().await;
    let (able, plain) = (able(gateway.modern()), gateway.modern());
    let id = id_of(&able.call("a_slow", json!({})).await);
    for method in ["tasks/get", "tasks/update", "tasks/cancel"] {
        for id in [&*id, "nonsense"] {
            let refused = about(&plain, method, id).send().await;
            assert_eq!(refused.refusal(), (400, -32021), "{method}");
            let missing = &refused.error()["data"]["requiredCapabilities"];
            assert_eq!(*missing, json!({ "extensions": { EXTENSION: {} } }));
        }
    }
    // Even from a server that does not ask.
    assert_eq!(plain.call("a_slow", json!({})).await.refusal(), (400, -32021));
    let legacy = gateway.legacy_with(json!({ "extensions": { EXTENSION: {} } })).await;
    assert_eq!(legacy.call("a_slow", json!({})).await.error()["code"], -32021);
    assert_eq!(legacy.ask("tasks/get", json!({ "taskId": id })).await.error()["code"], -32601);
    for method in ["tasks/list", "tasks/result"] {
        let gone = able.request(method, json!({ "taskId": id })).send().await;
        assert_eq!(gone.refusal(), (404, -32601), "{method} is of another revision");
    }
    let listening = json!({ "notifications": { "taskIds": [id] } });
    assert_eq!(plain.ask("subscriptions/listen", listening).await.refusal(), (400, -32021));
}

#[tokio::test]
async fn without_a_server_that_has_them_there_are_no_tasks() {
    let upstream = Upstream::modern().tool("t").start().await;
    let gateway = Gateway::with([("a", upstream.url())]).start().await;
    let client = able(gateway.modern());
    assert_eq!(about(&client, "tasks/get", "x").send().await.refusal(), (404, -32601));
    let discovered = client.ask("server/discover", json!({})).await.result();
    assert!(discovered["capabilities"].get("extensions").is_none());
}

#[tokio::test]
async fn a_tool_that_is_denied_later_takes_its_tasks_along() {
    let upstream = slow("a").start().await;
    let gateway = Gateway::with([("a", upstream.url())]).start().await;
    let client = able(gateway.modern());
    let id = id_of(&client.call("a_slow", json!({})).await);
    gateway.deny("a", &["quick"]);
    assert_eq!(id_of(&about(&client, "tasks/get", &id).send().await), id);
    gateway.deny("a", &["slow"]);
    assert_eq!(about(&client, "tasks/get", &id).send().await.refusal(), (200, -32602));
    gateway.deny("a", &["a_sl*"]);
    assert_eq!(about(&client, "tasks/cancel", &id).send().await.refusal(), (200, -32602));
    assert_eq!(upstream.seen_of("tasks/get").len(), 1);
}

#[tokio::test]
async fn a_listener_hears_of_its_own_tasks() {
    let (say, said) = tokio::sync::mpsc::unbounded_channel::<String>();
    let said = Arc::new(Mutex::new(Some(said)));
    let script = slow("a").on("subscriptions/listen", move |sent| {
        let filter = sent.params()["notifications"].clone();
        let tasks = filter.get("taskIds").is_some();
        let said = said.lock().expect("no panic").take_if(|_| tasks);
        let first = message("notifications/subscriptions/acknowledged", &json!({ "notifications": filter }));
        let rest = futures_util::stream::unfold(said, |said| async {
            match said {
                Some(mut said) => Some((said.recv().await?, Some(said))),
                None => std::future::pending().await,
            }
        });
        async { open_events(futures_util::stream::iter([first]).chain(rest)) }
    });
    let upstream = script.start().await;
    let gateway = Gateway::with([("a", upstream.url())]).start().await;
    let client = able(gateway.modern());
    let id = id_of(&client.call("a_slow", json!({})).await);
    let wanted = json!({ "notifications": { "taskIds": [id, "nonsense"] } });
    let mut told = client.request("subscriptions/listen", wanted).open().await;
    let first = told.next_json().await;
    assert_eq!(first["params"]["notifications"], json!({ "taskIds": [id] }));
    let asked = upstream.seen_of("subscriptions/listen");
    assert_eq!(asked.last().expect("one").params()["notifications"], json!({ "taskIds": ["t-a"] }));
    let task = |id: &str, status: &str| {
        let _ = say.send(message("notifications/tasks", &json!({ "taskId": id, "status": status })));
    };
    task("somebody-elses", "working");
    task("t-a", "working");
    let heard = told.next_json().await;
    assert_eq!((&heard["params"]["taskId"], &heard["params"]["status"]), (&json!(id), &json!("working")));
    gateway.deny("a", &["slow"]);
    task("t-a", "failed");
    gateway.deny("a", &["quick"]);
    // What was said while it was denied is not said later. Rules and notifications come on ways of their own.
    tokio::task::yield_now().await;
    task("t-a", "completed");
    let heard = told.until("notifications/tasks").await;
    assert_eq!(heard["params"]["taskId"], json!(id));
}

fn message(method: &str, params: &Value) -> String {
    json!({ "jsonrpc": "2.0", "method": method, "params": params }).to_string()
}

#[tokio::test]
async fn an_id_is_good_after_a_restart() {
    let upstream = slow("a").start().await;
    let backend = Arc::new(MemoryBackend::new());
    let client = Client {
        capabilities: json!({ "extensions": { EXTENSION: {} } }).to_string().into(),
        ..Client::gateway()
    };
    let caller = Arc::new(Caller { client, ..(*Caller::anonymous()).clone() });
    let ask = async |app: &App, method: Method, params: Value| -> Value {
        app.gateway().settled(crate::stage::PATIENCE).await;
        let request = McpRequest::new(method, Params::from_value(&params)).with_caller(caller.clone());
        let answer = app.service().oneshot(request).await.expect("rescue answers");
        answer.payload().to_value().expect("a result")
    };
    let start = || App::start(Registry::open(backend.clone()).expect("a registry"), Settings::default());
    let app = start();
    let record = ServerRecord::new("a".parse().expect("a name"), UpstreamSpec::http(upstream.url()));
    app.add(record).await.expect("a new server");
    let created = ask(&app, Method::ToolsCall, json!({ "name": "a_slow" })).await;
    drop(app);
    let again = start();
    let got = ask(&again, Method::TasksGet, json!({ "taskId": created["taskId"] })).await;
    assert_eq!(got["taskId"], created["taskId"]);
}

// === the experiment of 2025-11-25 ===

/// A server of that revision. It tells every session of everybody's tasks.
fn experimental(name: &'static str) -> Script {
    let created: Arc<Mutex<Vec<String>>> = Arc::default();
    let all = created.clone();
    let answered: Arc<tokio::sync::Notify> = Arc::default();
    let after = answered.clone();
    Upstream::legacy()
        .tools(&[r#"{"name":"slow","execution":{"taskSupport":"optional"}}"#])
        .declares("tasks", r#"{"list":{},"cancel":{},"requests":{"tools":{"call":{}}}}"#)
        .on("tools/call", move |sent| {
            let answer = match sent.params().get("task") {
                None => r#"{"content":[{"type":"text","text":"at once"}]}"#.to_owned(),
                Some(_) => {
                    let mut created = created.lock().expect("no panic");
                    let id = format!("{name}-{}", created.len());
                    created.push(id);
                    json!({ "task": { "taskId": created.last(), "status": "working" } }).to_string()
                }
            };
            let answer = result(&sent, &answer);
            async { answer }
        })
        .on("tasks/list", move |sent| {
            // Two to a page.
            let from: usize =
                sent.params()["cursor"].as_str().map_or(0, |cursor| cursor.parse().expect("ours"));
            let all = all.lock().expect("no panic");
            let page: Vec<Value> = all
                .iter()
                .skip(from)
                .take(2)
                .map(|id| json!({ "taskId": id, "status": "working" }))
                .collect();
            let mut answer = json!({ "tasks": page });
            if from + 2 < all.len() {
                answer["nextCursor"] = json!((from + 2).to_string());
            }
            let answer = result(&sent, &answer.to_string());
            async { answer }
        })
        .on("tasks/get", |sent| {
            let task = json!({ "taskId": sent.params()["taskId"], "status": "completed" });
            let answer = result(&sent, &task.to_string());
            async { answer }
        })
        .on("tasks/cancel", |sent| {
            let task = json!({ "taskId": sent.params()["taskId"], "status": "cancelled" });
            let answer = result(&sent, &task.to_string());
            async { answer }
        })
        .on("", move |_| {
            answered.notify_one();
            async { plain(202, "") }
        })
        .on("tasks/result", move |sent| {
            let related = json!({ RELATED: { "taskId": sent.params()["taskId"] } });
            let question = json!({
                "jsonrpc": "2.0", "id": 77, "method": "elicitation/create",
                "params": { "message": "Sure?", "_meta": related },
            });
            let status = message(
                "notifications/tasks/status",
                &json!({ "taskId": sent.params()["taskId"], "status": "input_required" }),
            );
            let done = json!({
                "jsonrpc": "2.0", "id": serde_json::from_str::<Value>(&sent.raw("id")).expect("an id"),
                "result": { "content": [{ "type": "text", "text": "done" }], "_meta": related },
            });
            let after = after.clone();
            let last = futures_util::stream::once(async move {
                after.notified().await;
                done.to_string()
            });
            async move { open_events(futures_util::stream::iter([status, question.to_string()]).chain(last)) }
        })
}

async fn begin(client: &Legacy, tool: &str) -> String {
    let params = json!({ "name": tool, "arguments": {}, "task": { "ttl": 60000 } });
    let created = client.ask("tools/call", params).await.result();
    created["task"]["taskId"].as_str().unwrap_or_else(|| panic!("no id: {created}")).to_owned()
}

#[tokio::test]
async fn the_experiment_works_through_the_gateway() {
    let (a, b) = (experimental("a").start().await, experimental("b").start().await);
    let gateway = Gateway::with([("a", a.url()), ("b", b.url())]).start().await;
    let client = gateway.legacy_with(json!({ "elicitation": {} })).await;
    let id = begin(&client, "b_slow").await;
    assert!(!id.contains("b-0"));
    let got = client.ask("tasks/get", json!({ "taskId": id })).await.result();
    assert_eq!(got, json!({ "taskId": id, "status": "completed" }));
    let cancelled = client.ask("tasks/cancel", json!({ "taskId": id })).await.result();
    assert_eq!(cancelled, json!({ "taskId": id, "status": "cancelled" }));
    assert_eq!(b.seen_of("tasks/get")[0].params()["taskId"], "b-0");
    // The result, and what comes before it; questions belong to the task, and so do their answers.
    let mut stream = client.request("tasks/result", json!({ "taskId": id })).open().await;
    let status = stream.next_json().await;
    assert_eq!(status["params"]["taskId"], json!(id));
    let question = stream.next_json().await;
    assert_eq!(question["method"], "elicitation/create");
    assert_eq!(question["params"]["_meta"][RELATED]["taskId"], json!(id));
    client.answer(&question, json!({ "action": "decline", "_meta": { RELATED: { "taskId": id } } })).await;
    let done = stream.next_json().await;
    assert_eq!(done["result"]["content"][0]["text"], "done");
    assert_eq!(done["result"]["_meta"][RELATED]["taskId"], json!(id));
    eventually("the answer arrives in the upstream's own words", async || {
        b.seen().iter().any(|sent| sent.raw("id") == "77" && sent.raw("result").contains("b-0"))
    })
    .await;
    assert_eq!(client.ask("tasks/update", json!({ "taskId": id })).await.error()["code"], -32601);
}

#[tokio::test]
async fn a_list_of_tasks_has_ones_own_and_nobody_elses() {
    let (a, b) = (experimental("a").start().await, experimental("b").start().await);
    let gateway = Gateway::with([("a", a.url()), ("b", b.url())]).start().await;
    let open =
        |user: Option<&'static str>| Legacy::open_as(user, gateway.address, "/mcp", "2025-11-25", json!({}));
    let (alice, eve) = (open(Some("alice")).await, open(Some("eve")).await);
    let mut hers = Vec::new();
    for tool in ["a_slow", "b_slow", "a_slow", "a_slow"] {
        hers.push(begin(&alice, tool).await);
        begin(&eve, tool).await;
    }
    let listed = async |client: &Legacy| -> Vec<String> {
        let listed = client.ask("tasks/list", json!({})).await.result();
        let tasks = listed["tasks"].as_array().expect("a list").iter();
        tasks.map(|task| task["taskId"].as_str().expect("an id").to_owned()).collect()
    };
    let by_server = [&hers[0], &hers[2], &hers[3], &hers[1]].map(String::clone);
    assert_eq!(listed(&alice).await, by_server);
    // She is the same in another session; one nobody knows is only ever known by the session.
    assert_eq!(listed(&open(Some("alice")).await).await, by_server);
    let (one, other) = (open(None).await, open(None).await);
    let id = begin(&one, "a_slow").await;
    assert_eq!((listed(&one).await, listed(&other).await), (vec![id.clone()], Vec::new()));
    assert_eq!(eve.ask("tasks/get", json!({ "taskId": id })).await.error()["code"], -32602);
    assert_eq!(one.ask("tasks/list", json!({ "cursor": "2" })).await.error()["code"], -32602);
    gateway.deny("a", &["slow"]);
    assert_eq!(listed(&alice).await, [hers[1].clone()]);
}

#[tokio::test]
async fn nobody_learns_of_anothers_task_by_the_way() {
    // On a connection that many share, any answer may have anything before it.
    let gossip = |sent: &Sent, result: &Value| {
        let id = serde_json::from_str::<Value>(&sent.raw("id")).expect("an id");
        let status = message("notifications/tasks/status", &json!({ "taskId": "a-0", "status": "working" }));
        let log = json!({ "level": "info", "data": "x", "_meta": { RELATED: { "taskId": "a-0" } } });
        let plain = message("notifications/message", &json!({ "level": "info", "data": "for all" }));
        let done = json!({ "jsonrpc": "2.0", "id": id, "result": result }).to_string();
        crate::stage::events([status, message("notifications/message", &log), plain, done])
    };
    let script = experimental("a")
        .on("vendor/gossip", move |sent| {
            let answer = gossip(&sent, &json!({ "content": [] }));
            async { answer }
        })
        .on("tasks/get", move |sent| {
            let answer = gossip(&sent, &json!({ "taskId": sent.params()["taskId"], "status": "working" }));
            async { answer }
        });
    let upstream = script.start().await;
    let gateway = Gateway::with([("a", upstream.url())]).start().await;
    let open =
        |user: &'static str| Legacy::open_as(Some(user), gateway.address, "/mcp", "2025-11-25", json!({}));
    let (alice, eve) = (open("alice").await, open("eve").await);
    let (hers, his) = (begin(&alice, "a_slow").await, begin(&eve, "a_slow").await);
    for (client, id, heard) in [(&alice, &hers, 4), (&eve, &his, 2)] {
        for (method, params) in [("vendor/gossip", json!({})), ("tasks/get", json!({ "taskId": id }))] {
            let answer = client.ask(method, params).await;
            assert_eq!(answer.messages().len(), heard, "{method}: {answer}");
            assert!(!answer.text().contains("a-0"), "{method}: {answer}");
            assert_eq!(answer.text().contains(&*hers), heard == 4, "{method}: {answer}");
        }
    }
}

#[tokio::test]
async fn each_kind_is_offered_to_clients_of_its_own_revision() {
    let (old, new) = (experimental("old").start().await, slow("new").start().await);
    let gateway = Gateway::with([("old", old.url()), ("new", new.url())]).start().await;
    let offered =
        |text: String| serde_json::from_str::<Value>(&text).expect("JSON")["result"]["capabilities"].take();
    let modern =
        able(gateway.modern()).ask("server/discover", json!({})).await.result()["capabilities"].take();
    assert_eq!((modern.get("tasks"), &modern["extensions"]), (None, &json!({ EXTENSION: {} })));
    for (version, has) in [("2025-11-25", true), ("2025-06-18", false)] {
        let answer = gateway.post(Legacy::initialize(version, json!({}))).send().await;
        let legacy = offered(answer.text().to_owned());
        assert_eq!(legacy.get("tasks").is_some(), has, "{version}");
        assert!(legacy.get("extensions").is_none());
    }
    // A wish for a task that the other side does not know is no wish.
    let wishing = json!({ "name": "old_slow", "arguments": {}, "task": {} });
    let answer = able(gateway.modern()).ask("tools/call", wishing).await;
    assert_eq!(answer.content(), "at once");
    assert!(old.seen_of("tools/call")[0].params().get("task").is_none());
    let id = begin(&gateway.legacy().await, "old_slow").await;
    assert_eq!(about(&able(gateway.modern()), "tasks/get", &id).send().await.refusal(), (200, -32602));
}
