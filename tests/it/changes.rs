//! Who is told what, when lists or rules change: every client whose view is another one now, and no other.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering},
};

use futures_util::StreamExt as _;
use serde_json::{Value, json};
use tokio::sync::broadcast;

use crate::stage::{
    Gateway, Legacy, Modern, Script, Stream, Upstream, eventually, names, open_events, result,
};

/// A server whose tools change, and which says so.
#[derive(Clone)]
struct Shifting {
    tools: Arc<Mutex<Vec<String>>>,
    said: broadcast::Sender<String>,
    listening: Arc<AtomicUsize>,
}

impl Shifting {
    fn new(tools: &[&str]) -> Self {
        let shifting =
            Shifting { tools: Arc::default(), said: broadcast::Sender::new(16), listening: Arc::default() };
        shifting.set(tools);
        shifting
    }

    fn script(&self) -> Script {
        let (lists, listens) = (self.clone(), self.clone());
        Upstream::modern()
            .tool("t")
            .list("resources", &[r#"{"uri":"demo://x","name":"x"}"#, r#"{"uri":"demo://y","name":"y"}"#])
            .on("tools/list", move |sent| {
                let answer = result(&sent, &json!({ "tools": lists.listed() }).to_string());
                async { answer }
            })
            .on("subscriptions/listen", move |sent| {
                let filter = sent.params()["notifications"].clone();
                let acknowledged =
                    message("notifications/subscriptions/acknowledged", &json!({ "notifications": filter }));
                let said = listens.said.subscribe();
                listens.listening.fetch_add(1, Ordering::SeqCst);
                let rest = futures_util::stream::unfold(said, |mut said| async {
                    Some((said.recv().await.ok()?, said))
                });
                let stream = futures_util::stream::iter([acknowledged]).chain(rest);
                async { open_events(stream) }
            })
    }

    fn listed(&self) -> Vec<Value> {
        self.tools.lock().expect("no panic").iter().map(|name| json!({ "name": name })).collect()
    }

    fn set(&self, tools: &[&str]) {
        *self.tools.lock().expect("no panic") = tools.iter().map(|tool| (*tool).to_owned()).collect();
    }

    fn changes_to(&self, tools: &[&str]) {
        self.set(tools);
        self.say("notifications/tools/list_changed", json!({}));
    }

    fn say(&self, method: &str, params: Value) {
        let _ = self.said.send(message(method, &params));
    }

    async fn is_heard_by(&self, count: usize) {
        eventually("it is listened to", async || self.listening.load(Ordering::SeqCst) >= count).await;
    }
}

fn message(method: &str, params: &Value) -> String {
    json!({ "jsonrpc": "2.0", "method": method, "params": params }).to_string()
}

/// A subscription, acknowledged.
async fn subscribed(client: &Modern, filter: Value) -> Stream {
    let mut stream = client.request("subscriptions/listen", json!({ "notifications": filter })).open().await;
    let first = stream.next_json().await;
    assert_eq!(first["method"], "notifications/subscriptions/acknowledged");
    stream
}

async fn tools_of(client: &Legacy) -> Vec<String> {
    names(&client.ask("tools/list", json!({})).await.result()["tools"])
}

const TOOLS: &str = "notifications/tools/list_changed";
const PROMPTS: &str = "notifications/prompts/list_changed";

#[tokio::test]
async fn a_change_reaches_clients_of_both_eras_and_finds_the_new_list() {
    let server = Shifting::new(&["a"]);
    let upstream = server.script().start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let (modern, legacy) = (gateway.modern(), gateway.legacy().await);
    let (mut told, mut heard) =
        (subscribed(&modern, json!({ "toolsListChanged": true })).await, legacy.listen().await);
    server.changes_to(&["a", "b"]);
    told.until(TOOLS).await;
    heard.until(TOOLS).await;
    assert_eq!(modern.tools().await, ["up_a", "up_b"]);
    assert_eq!(tools_of(&legacy).await, ["up_a", "up_b"]);
}

#[tokio::test]
async fn what_is_hidden_changes_for_nobody() {
    let server = Shifting::new(&["a"]);
    let upstream = server.script().start().await;
    let gateway = Gateway::with([("up", upstream.url())]).deny("up", &["secret*"]).start().await;
    let client = gateway.modern();
    let mut told = subscribed(&client, json!({ "toolsListChanged": true })).await;
    server.changes_to(&["a", "secret"]);
    eventually("the gateway knows", async || {
        gateway.inner.list(portcullis::protocol::ItemKind::Tools).len() == 2
    })
    .await;
    // The next thing the client hears of is the next thing it can see.
    server.changes_to(&["a", "secret", "b"]);
    assert_eq!(told.next_json().await["method"], TOOLS);
    assert_eq!(client.tools().await, ["up_a", "up_b"]);
    gateway.deny("up", &["secret*", "a"]);
    assert_eq!(told.next_json().await["method"], TOOLS);
    assert_eq!(client.tools().await, ["up_b"]);
}

#[tokio::test]
async fn new_rules_are_told_to_those_who_see_a_difference() {
    let server = Shifting::new(&["a", "b"]);
    let upstream = server.script().list("prompts", &[r#"{"name":"p"}"#]).start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let (client, legacy) = (gateway.modern(), gateway.legacy().await);
    let mut told = subscribed(&client, json!({ "toolsListChanged": true, "promptsListChanged": true })).await;
    let mut heard = legacy.listen().await;
    // A legacy client's stream has no acknowledgement; a change it hears of says that it is open.
    server.changes_to(&["a", "b", "c"]);
    heard.until(TOOLS).await;
    told.until(TOOLS).await;
    gateway.deny("up", &["nothing"]);
    gateway.deny("up", &["p"]);
    assert_eq!(told.next_json().await["method"], PROMPTS);
    assert_eq!(heard.next_json().await["method"], PROMPTS);
    gateway.deny("up", &["p", "a"]);
    assert_eq!(told.next_json().await["method"], TOOLS);
    assert_eq!(heard.next_json().await["method"], TOOLS);
    assert_eq!(tools_of(&legacy).await, ["up_b", "up_c"]);
}

#[tokio::test]
async fn an_upstream_that_comes_or_goes_is_a_change() {
    let (a, b) = (Shifting::new(&["a"]), Shifting::new(&["b"]));
    let (first, second) = (a.script().start().await, b.script().start().await);
    let gateway = Gateway::with([("one", first.url())]).start().await;
    let mut told = subscribed(&gateway.modern(), json!({ "toolsListChanged": true })).await;
    let name: portcullis::protocol::ServerName = "two".parse().expect("a name");
    gateway.inner.put(name.clone(), portcullis::upstream::HttpUpstream::new(name.clone(), second.url()));
    told.until(TOOLS).await;
    assert_eq!(gateway.modern().tools().await, ["one_a", "two_b"]);
    gateway.inner.remove(&name);
    told.until(TOOLS).await;
    assert_eq!(gateway.modern().tools().await, ["one_a"]);
}

#[tokio::test]
async fn new_rules_end_the_updates_of_an_open_subscription() {
    let server = Shifting::new(&["a"]);
    let upstream = server.script().start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    let (client, legacy) = (gateway.modern(), gateway.legacy().await);
    let both = json!({ "resourceSubscriptions": ["demo://x", "demo://y"] });
    let mut told = subscribed(&client, both).await;
    let mut heard = legacy.listen().await;
    for uri in ["demo://x", "demo://y"] {
        legacy.ask("resources/subscribe", json!({ "uri": uri })).await.result();
    }
    server.is_heard_by(4).await;
    let update = |uri: &str| server.say("notifications/resources/updated", json!({ "uri": uri }));
    let next = async |stream: &mut Stream| {
        stream.until("notifications/resources/updated").await["params"]["uri"].clone()
    };
    update("demo://x");
    assert_eq!((next(&mut told).await, next(&mut heard).await), (json!("demo://x"), json!("demo://x")));
    gateway.deny("up", &["demo://x"]);
    update("demo://x");
    update("demo://x/part");
    update("demo://y");
    assert_eq!((next(&mut told).await, next(&mut heard).await), (json!("demo://y"), json!("demo://y")));
    gateway.deny("up", &["nothing"]);
    update("demo://x/part");
    assert_eq!(next(&mut told).await, "demo://x/part");
}

#[tokio::test]
async fn many_listeners_are_told_once_each() {
    let server = Shifting::new(&["a"]);
    let upstream = server.script().start().await;
    let gateway = Gateway::with([("up", upstream.url())]).deny("up", &["secret"]).start().await;
    let mut all = Vec::new();
    for _ in 0..40 {
        all.push(subscribed(&gateway.modern(), json!({ "toolsListChanged": true })).await);
    }
    server.changes_to(&["a", "b"]);
    for told in &mut all {
        told.until(TOOLS).await;
    }
    gateway.deny("up", &["a"]);
    for told in &mut all {
        assert_eq!(told.next_json().await["method"], TOOLS);
    }
    // Each change was one notification: the next is that of the next.
    gateway.deny("up", &["secret"]);
    for told in &mut all {
        assert_eq!(told.next_json().await["method"], TOOLS);
    }
}
