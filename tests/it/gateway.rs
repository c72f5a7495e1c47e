//! Many upstreams behind one endpoint: names, routes, and what one that fails does to the others.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use portcullis::{
    BoxMcpLayer,
    gateway::CatalogStore,
    layers::{Next, Route, from_fn},
    protocol::{McpRequest, NamingMode, ServerName},
    registry::CatalogRecord,
    stack::Position,
};
use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::stage::{Fixture, Gateway, Modern, Probe, Upstream, error, eventually, result};

/// Says its own name to every call and read.
async fn named(name: &'static str, tools: &[&str]) -> Upstream {
    let tools: Vec<String> = tools.iter().map(|tool| format!(r#"{{"name":"{tool}"}}"#)).collect();
    let tools: Vec<&str> = tools.iter().map(String::as_str).collect();
    let script = Upstream::modern()
        .tools(&tools)
        .list("prompts", &[r#"{"name":"greet"}"#])
        .list("resources", &[r#"{"uri":"demo://same","name":"same"}"#])
        .list("resourceTemplates", &[r#"{"uriTemplate":"demo://t/{x}","name":"t"}"#])
        .answers(format!(r#"{{"content":[{{"type":"text","text":"{name}"}}]}}"#))
        .on("prompts/get", move |sent| {
            let answer = result(&sent, &format!(r#"{{"description":"{name}","messages":[]}}"#));
            async { answer }
        })
        .on("resources/read", move |sent| {
            let uri = sent.params()["uri"].clone();
            let contents = json!({ "contents": [{ "uri": uri, "text": name }] });
            let answer = result(&sent, &contents.to_string());
            async { answer }
        })
        .on("completion/complete", move |sent| {
            let answer = result(&sent, &format!(r#"{{"completion":{{"values":["{name}"]}}}}"#));
            async { answer }
        });
    script.start().await
}

// === names ===

#[tokio::test]
async fn every_tool_is_listed_under_its_upstreams_name() {
    let (a, b) = (named("A", &["add", "sub"]).await, named("B", &["add"]).await);
    let gateway = Gateway::with([("b", b.url()), ("a", a.url())]).start().await;
    let client = gateway.modern();
    assert_eq!(client.tools().await, ["b_add", "a_add", "a_sub"]);
    assert_eq!(client.call("a_add", json!({})).await.content(), "A");
    assert_eq!(client.call("b_add", json!({})).await.content(), "B");
    assert_eq!(client.call("add", json!({})).await.refusal(), (200, -32602));
}

#[tokio::test]
async fn bare_names_belong_to_the_first() {
    let (a, b) = (named("A", &["add", "sub"]).await, named("B", &["add", "mul"]).await);
    let gateway = Gateway::with([("a", a.url()), ("b", b.url())]).naming(NamingMode::Bare).start().await;
    let client = gateway.modern();
    assert_eq!(client.tools().await, ["add", "sub", "b_add", "mul"]);
    for (tool, answers) in [("add", "A"), ("b_add", "B"), ("sub", "A"), ("mul", "B")] {
        assert_eq!(client.call(tool, json!({})).await.content(), answers, "{tool}");
    }
}

#[tokio::test]
async fn on_collision_both_get_their_upstreams_name() {
    let (a, b) = (named("A", &["add", "sub"]).await, named("B", &["add", "mul"]).await);
    let gateway = Gateway::with([("a", a.url()), ("b", b.url())]).naming(NamingMode::OnCollision);
    let gateway = gateway.start().await;
    let client = gateway.modern();
    assert_eq!(client.tools().await, ["a_add", "sub", "b_add", "mul"]);
    for (tool, answers) in [("a_add", "A"), ("b_add", "B"), ("sub", "A"), ("mul", "B")] {
        assert_eq!(client.call(tool, json!({})).await.content(), answers, "{tool}");
    }
}

#[tokio::test]
async fn prompts_and_completions_go_where_the_name_says() {
    let (a, b) = (named("A", &[]).await, named("B", &[]).await);
    let gateway = Gateway::with([("a", a.url()), ("b", b.url())]).start().await;
    let client = gateway.modern();
    let prompt = client.ask("prompts/get", json!({ "name": "b_greet" })).await.result();
    assert_eq!(prompt["description"], "B");
    let reference = json!({ "type": "ref/prompt", "name": "b_greet" });
    let argument = json!({ "name": "x", "value": "" });
    let completing = json!({ "ref": reference, "argument": argument });
    let completed = client.ask("completion/complete", completing).await.result();
    assert_eq!(completed["completion"]["values"], json!(["B"]));
    assert_eq!(b.seen_of("completion/complete")[0].params()["ref"]["name"], "greet");
}

#[tokio::test]
async fn a_resource_two_upstreams_have_can_be_read_from_each() {
    let (a, b) = (named("A", &[]).await, named("B", &[]).await);
    let gateway = Gateway::with([("a", a.url()), ("b", b.url())]).start().await;
    let client = gateway.modern();
    let listed = client.ask("resources/list", json!({})).await.result();
    let uris: Vec<&str> =
        listed["resources"].as_array().expect("a list").iter().filter_map(|r| r["uri"].as_str()).collect();
    assert_eq!(uris, ["demo://same", "b+demo://same"]);
    let listed = client.ask("resources/templates/list", json!({})).await.result();
    let templates: Vec<&str> = listed["resourceTemplates"]
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|template| template["uriTemplate"].as_str())
        .collect();
    assert_eq!(templates, ["demo://t/{x}", "b+demo://t/{x}"]);
    for (uri, answers) in
        [("demo://same", "A"), ("b+demo://same", "B"), ("demo://t/1", "A"), ("b+demo://t/1", "B")]
    {
        let read = client.ask("resources/read", json!({ "uri": uri })).await.result();
        assert_eq!(read["contents"], json!([{ "uri": uri, "text": answers }]));
    }
}

// === what only upstreams understand ===

/// Answers `vendor/x` with its name; `vendor/fails` with an error of its own.
async fn vendor(name: &'static str) -> Upstream {
    let script = Upstream::modern()
        .tool("t")
        .on("vendor/x", move |sent| {
            let answer = result(&sent, &format!(r#"{{"by":"{name}", "n":1.10}}"#));
            async { answer }
        })
        .on("vendor/fails", |sent| {
            let answer = error(&sent, 200, r#"{"code":-32602,"message":"no"}"#);
            async { answer }
        });
    script.start().await
}

#[tokio::test]
async fn a_method_nobody_here_knows_goes_to_the_first_upstream_that_does() {
    let (a, b, c) = (named("A", &[]).await, vendor("B").await, vendor("C").await);
    let gateway = Gateway::with([("a", a.url()), ("b", b.url()), ("c", c.url())]).start().await;
    let client = gateway.modern();
    for _ in 0..2 {
        let answer = client.ask("vendor/x", json!({ "y": "z" })).await;
        assert!(answer.text().contains(r#"{"resultType":"complete","by":"B", "n":1.10}"#), "{answer}");
    }
    assert_eq!(b.seen_of("vendor/x")[0].params()["y"], "z");
    // Who answered is remembered, and nobody else is asked.
    assert_eq!((a.seen_of("vendor/x").len(), b.seen_of("vendor/x").len()), (1, 2));
    assert_eq!(client.ask("vendor/fails", json!({})).await.refusal(), (200, -32602));
    assert!(c.seen_of("vendor/x").is_empty() && c.seen_of("vendor/fails").is_empty());
    assert_eq!(client.ask("vendor/other", json!({})).await.refusal(), (404, -32601));
    gateway.inner.remove(&"b".parse().expect("a name"));
    assert_eq!(client.ask("vendor/x", json!({})).await.result()["by"], "C");
}

#[tokio::test]
async fn an_upstream_that_is_away_does_not_hide_who_knows_a_method() {
    let known = vendor("B").await;
    let gateway = Gateway::with([("gone", Upstream::nowhere().await), ("b", known.url())]).start().await;
    let client = gateway.modern();
    assert_eq!(client.ask("vendor/x", json!({})).await.result()["by"], "B");
    let refused = client.ask("vendor/other", json!({})).await;
    assert_eq!(refused.error()["code"], -31503, "perhaps the one that is away knows it: {refused}");
}

#[tokio::test]
async fn an_upstream_with_rules_gets_nothing_that_could_be_a_way_around_them() {
    let (a, b) = (vendor("A").await, vendor("B").await);
    let gateway = Gateway::with([("a", a.url()), ("b", b.url())]).deny("a", &["secret"]).start().await;
    let client = gateway.modern();
    assert_eq!(client.ask("vendor/x", json!({})).await.result()["by"], "B");
    let told = r#"{"jsonrpc":"2.0","method":"notifications/vendor/x","params":{}}"#;
    assert_eq!(client.raw("notifications/vendor/x", told).send().await.status, 202);
    eventually("b is told", async || b.seen_of("notifications/vendor/x").len() == 1).await;
    assert!(a.seen_of("vendor/x").is_empty() && a.seen_of("notifications/vendor/x").is_empty());
    let gateway = Gateway::with([("a", a.url())]).deny("a", &["secret"]).start().await;
    assert_eq!(gateway.modern().ask("vendor/x", json!({})).await.refusal(), (404, -32601));
}

#[tokio::test]
async fn a_notification_nobody_here_knows_is_told_to_all_and_waits_for_none() {
    let (release, probe) = (Arc::new(Notify::new()), Probe::default());
    let (gate, enter) = (release.clone(), probe.clone());
    let slow = Upstream::modern().tool("t").on("notifications/vendor/x", move |_| {
        let (gate, inside) = (gate.clone(), enter.enter());
        async move {
            gate.notified().await;
            drop(inside);
            crate::stage::plain(202, "")
        }
    });
    let (slow, quick) = (slow.start().await, vendor("B").await);
    let gateway = Gateway::with([("slow", slow.url()), ("b", quick.url())]).start().await;
    let told = r#"{"jsonrpc":"2.0","method":"notifications/vendor/x","params":{"a":1e400}}"#;
    assert_eq!(gateway.modern().raw("notifications/vendor/x", told).send().await.status, 202);
    eventually("the quick one is told", async || !quick.seen_of("notifications/vendor/x").is_empty()).await;
    probe.begun().await;
    assert!(quick.seen_of("notifications/vendor/x")[0].raw("params").contains("1e400"));
    release.notify_waiters();
    probe.over().await;
    assert_eq!((probe.has_begun(), quick.seen_of("notifications/vendor/x").len()), (1, 1));
}

// === upstream requests ===

#[tokio::test]
async fn a_call_costs_one_upstream_request_and_a_list_none() {
    for upstream in [
        Upstream::modern().tool("t").answers(r#"{"content":[]}"#).start().await,
        Upstream::legacy().tool("t").answers(r#"{"content":[]}"#).start().await,
    ] {
        let gateway = Gateway::with([("up", upstream.url())]).start().await;
        let (modern, legacy) = (gateway.modern(), gateway.legacy().await);
        modern.call("up_t", json!({})).await.result();
        legacy.call("up_t", json!({})).await.result();
        upstream.forget();
        for _ in 0..3 {
            modern.call("up_t", json!({})).await.result();
            legacy.call("up_t", json!({})).await.result();
        }
        let seen = upstream.seen();
        assert_eq!((seen.len(), upstream.seen_of("tools/call").len()), (6, 6), "{seen:?}");
        upstream.forget();
        for _ in 0..3 {
            modern.tools().await;
            legacy.ask("tools/list", json!({})).await.result();
            legacy.ask("resources/list", json!({})).await;
            modern.ask("server/discover", json!({})).await.result();
        }
        assert_eq!(upstream.seen().len(), 0);
    }
}

// === failing upstreams ===

/// What a failed call says, and that it says nothing else.
fn assert_failed(result: &Value, code: &str, upstream: &str) {
    assert_eq!(result["isError"], true, "{result}");
    assert_eq!(result["structuredContent"]["code"], code, "{result}");
    assert_eq!(result["structuredContent"]["details"]["upstream"], upstream, "{result}");
    assert!(result["content"][0]["text"].as_str().expect("text").contains(upstream), "{result}");
    assert!(!result.to_string().contains("127.0.0.1"), "addresses are nobody's business: {result}");
}

#[tokio::test]
async fn an_upstream_that_died_fails_fast_by_name_and_stays_listed() {
    let (dying, alive) = (named("A", &["add"]).await, named("B", &["add"]).await);
    let gateway = Gateway::with([("dying", dying.url()), ("alive", alive.url())]).start().await;
    let (modern, legacy) = (gateway.modern(), gateway.legacy().await);
    dying.stop().await;
    for _ in 0..5 {
        let begun = Instant::now();
        assert_failed(&modern.call("dying_add", json!({})).await.result(), "unavailable", "dying");
        assert_failed(&legacy.call("dying_add", json!({})).await.result(), "unavailable", "dying");
        assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
        assert_eq!(modern.call("alive_add", json!({})).await.content(), "B");
    }
    assert_eq!(modern.tools().await, ["dying_add", "alive_add"]);
    let prompt = modern.ask("prompts/get", json!({ "name": "dying_greet" })).await;
    assert_eq!(prompt.refusal(), (503, -31503), "{prompt}");
    assert_eq!(prompt.error()["data"]["upstream"], "dying");
}

#[tokio::test]
async fn an_upstream_that_was_never_there_empties_nobodys_list() {
    let alive = named("B", &["add"]).await;
    let nowhere = Upstream::nowhere().await;
    let gateway = Gateway::with([("gone", nowhere), ("alive", alive.url())]).unsettled().start().await;
    let begun = Instant::now();
    eventually("the other is listed", async || gateway.modern().tools().await == ["alive_add"]).await;
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!(gateway.modern().call("alive_add", json!({})).await.content(), "B");
    assert_eq!(gateway.modern().call("gone_add", json!({})).await.refusal(), (200, -32602));
}

/// The catalogs of the last run.
#[derive(Default)]
struct Remembered(Mutex<HashMap<ServerName, CatalogRecord>>);

impl CatalogStore for Remembered {
    fn load(&self, server: &ServerName) -> Option<CatalogRecord> {
        self.0.lock().expect("no panic").get(server).cloned()
    }

    fn save(&self, server: &ServerName, catalog: &CatalogRecord) {
        self.0.lock().expect("no panic").insert(server.clone(), catalog.clone());
    }
}

#[tokio::test]
async fn after_a_restart_the_last_known_tools_are_listed_at_once() {
    let store: Arc<Remembered> = Arc::default();
    let upstream = named("A", &["add"]).await;
    drop(Gateway::with([("a", upstream.url())]).store(store.clone()).start().await);
    let url = upstream.url();
    let address = upstream.stop().await;
    let gateway = Gateway::with([("a", url)]).store(store).unsettled().start().await;
    assert_eq!(gateway.modern().tools().await, ["a_add"]);
    assert_failed(&gateway.modern().call("a_add", json!({})).await.result(), "unavailable", "a");

    let script = Upstream::modern().tool("add").answers(r#"{"content":[{"type":"text","text":"back"}]}"#);
    let _again = script.start_at(address).await;
    eventually("it works again", async || {
        let answer = gateway.modern().call("a_add", json!({})).await;
        answer.result()["content"][0]["text"] == "back"
    })
    .await;
}

#[tokio::test]
async fn an_upstream_that_comes_back_works_again_with_whatever_it_has_now() {
    let upstream = named("A", &["add"]).await;
    let gateway = Gateway::with([("a", upstream.url())]).start().await;
    let (modern, legacy) = (gateway.modern(), gateway.legacy().await);
    let address = upstream.stop().await;
    assert_failed(&modern.call("a_add", json!({})).await.result(), "unavailable", "a");
    // It may even be of the other era now.
    let script = Upstream::legacy().tools(&[r#"{"name":"add"}"#, r#"{"name":"fresh"}"#]);
    let _again = script.answers(r#"{"content":[{"type":"text","text":"back"}]}"#).start_at(address).await;
    eventually("calls work again", async || {
        let answer = modern.call("a_add", json!({})).await;
        answer.result()["content"][0]["text"] == "back"
    })
    .await;
    assert_eq!(legacy.call("a_add", json!({})).await.content(), "back");
    eventually("its new tool is listed", async || modern.tools().await == ["a_add", "a_fresh"]).await;
}

#[tokio::test]
async fn an_upstream_that_hangs_holds_nobody_up() {
    let silence = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let hanging = format!("http://{}/mcp", silence.local_addr().expect("it is bound"));
    let held = tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((stream, _)) = silence.accept().await {
            held.push(stream);
        }
    });
    let alive = named("B", &["add"]).await;
    let gateway = Gateway::with([("hanging", hanging), ("alive", alive.url())]).unsettled().start().await;
    let begun = Instant::now();
    eventually("the other is listed", async || gateway.modern().tools().await == ["alive_add"]).await;
    assert!(begun.elapsed() < Duration::from_secs(4), "the first list waits about a second");
    let begun = Instant::now();
    for _ in 0..20 {
        assert_eq!(gateway.modern().tools().await, ["alive_add"]);
        assert_eq!(gateway.modern().call("alive_add", json!({})).await.content(), "B");
        gateway.legacy().await.call("alive_add", json!({})).await.result();
    }
    assert!(begun.elapsed() < Duration::from_secs(4), "and no other does: {:?}", begun.elapsed());
    held.abort();
}

#[tokio::test]
async fn calls_beyond_the_cap_are_refused_and_none_is_queued() {
    const CAP: usize = 16;
    let (release, probe) = (Arc::new(Notify::new()), Probe::default());
    let (gate, enter) = (release.clone(), probe.clone());
    let script = Upstream::modern().tool("t").on("tools/call", move |sent| {
        let (gate, inside) = (gate.clone(), enter.enter());
        async move {
            gate.notified().await;
            drop(inside);
            result(&sent, r#"{"content":[]}"#)
        }
    });
    let upstream = script.start().await;
    let gateway = Gateway::with([("up", upstream.url())]).concurrency(CAP).start().await;
    let client: Modern = gateway.modern();
    let calls: Vec<_> = (0..300)
        .map(|_| {
            let call = client.request("tools/call", json!({ "name": "up_t" }));
            tokio::spawn(call.send())
        })
        .collect();
    eventually("all but those under way were refused", async || {
        calls.iter().filter(|call| call.is_finished()).count() == 300 - CAP
    })
    .await;
    eventually("those under way have arrived", async || probe.has_begun() == CAP).await;
    assert_eq!(probe.is_over(), 0);
    let (mut done, mut refused) = (0, 0);
    release.notify_waiters();
    for call in calls {
        let answer = call.await.expect("no panic");
        let result = answer.result();
        match result["isError"].as_bool() {
            Some(true) => {
                assert_eq!(result["structuredContent"]["code"], "overloaded", "{result}");
                assert_eq!(answer.header("retry-after"), Some("1"));
                refused += 1;
            }
            _ => done += 1,
        }
    }
    assert_eq!((done, refused), (CAP, 300 - CAP));
    assert_eq!(probe.has_begun(), CAP);
    let last = tokio::spawn(client.request("tools/call", json!({ "name": "up_t" })).send());
    eventually("there is room again", async || probe.has_begun() == CAP + 1).await;
    release.notify_waiters();
    last.await.expect("no panic").result();
}

// === lists ===

#[tokio::test]
async fn a_long_list_comes_in_pages() {
    let fixture = Fixture::with(&["--page-size", "3"]).await;
    let other = named("B", &["z"]).await;
    let upstreams = [("fix", fixture.url()), ("b", other.url())];
    let whole = Gateway::with(upstreams.clone()).start().await.modern().tools().await;
    assert!(whole.len() > 30, "every page of the upstream was fetched: {whole:?}");
    let gateway = Gateway::with(upstreams).page_size(10).start().await;
    let (modern, legacy) = (gateway.modern(), gateway.legacy().await);
    let mut paged = Vec::new();
    let mut params = json!({});
    loop {
        let page = modern.ask("tools/list", params.clone()).await.result();
        let same = legacy.ask("tools/list", params).await.result();
        assert_eq!((&page["tools"], &page["nextCursor"]), (&same["tools"], &same["nextCursor"]));
        let tools = page["tools"].as_array().expect("a list");
        assert!(tools.len() <= 10);
        paged.extend(tools.iter().map(|tool| tool["name"].as_str().expect("a name").to_owned()));
        match &page["nextCursor"] {
            Value::Null => break,
            cursor => params = json!({ "cursor": cursor }),
        }
    }
    assert_eq!(paged, whole);
    for cursor in [json!("made up"), json!(7), json!("")] {
        let refused = modern.ask("tools/list", json!({ "cursor": cursor })).await;
        assert_eq!(refused.refusal(), (200, -32602), "{cursor}");
    }
}

#[tokio::test]
async fn an_upstream_whose_pages_never_end_is_cut_off() {
    let script = Upstream::modern().tool("t").on("tools/list", |sent| {
        let answer = result(&sent, r#"{"tools":[],"nextCursor":"again"}"#);
        async { answer }
    });
    let (endless, alive) = (script.start().await, named("B", &["add"]).await);
    let gateway = Gateway::with([("endless", endless.url()), ("alive", alive.url())]).start().await;
    assert_eq!(gateway.modern().tools().await, ["alive_add"]);
}

#[tokio::test]
async fn a_tool_without_a_name_is_left_out_and_the_rest_is_listed() {
    let script =
        Upstream::modern().tools(&[r#"{"description":"?"}"#, "7", r#"{"name":""}"#, r#"{"name":"t"}"#]);
    let upstream = script.start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    assert_eq!(gateway.modern().tools().await, ["up_t"]);
}

#[tokio::test]
async fn a_server_with_resources_and_no_templates_is_as_good_as_any() {
    let script = Upstream::legacy().tool("t").list("resources", &[r#"{"uri":"a:b","name":"b"}"#]).on(
        "resources/templates/list",
        |sent| {
            let answer = error(&sent, 200, r#"{"code":-32601,"message":"Method not found"}"#);
            async { answer }
        },
    );
    let upstream = script.start().await;
    let gateway = Gateway::with([("up", upstream.url())]).start().await;
    assert_eq!(gateway.modern().tools().await, ["up_t"]);
    let listed = gateway.modern().ask("resources/list", json!({})).await.result();
    assert_eq!(listed["resources"], json!([{ "uri": "a:b", "name": "b" }]));
}

// === layers ===

#[tokio::test]
async fn foreign_layers_stand_where_they_were_put() {
    let upstream = named("A", &["add", "hidden"]).await;
    let seen: Arc<Mutex<Vec<String>>> = Arc::default();
    let watch = |place: &'static str| {
        let seen = seen.clone();
        BoxMcpLayer::new(from_fn(move |request: McpRequest, next: Next| {
            let route = request.extensions().get::<Route>().map(|route| route.own.clone());
            let seen = seen.clone();
            seen.lock().expect("no panic").push(format!("{place} {}", route.as_deref().unwrap_or("-")));
            async move {
                let answer = next.run(request).await;
                let how = if answer.is_ok() { "ok" } else { "error" };
                seen.lock().expect("no panic").push(format!("{place} {how}"));
                answer
            }
        }))
    };
    let gateway = Gateway::with([("a", upstream.url())])
        .deny("a", &["hidden"])
        .layer(Position::BeforeRouter, watch("router"))
        .layer(Position::AfterAccess, watch("after"))
        .layer(Position::BeforeAccess, watch("before"))
        .layer(Position::Outermost, watch("outermost"))
        .layer(Position::AfterAccess, watch("after-too"))
        .start()
        .await;
    let take = || std::mem::take(&mut *seen.lock().expect("no panic"));
    assert_eq!(gateway.modern().call("a_add", json!({})).await.content(), "A");
    assert_eq!(
        take(),
        [
            "outermost -",
            "before -",
            "after add",
            "after-too add",
            "router add",
            "router ok",
            "after-too ok",
            "after ok",
            "before ok",
            "outermost ok",
        ]
    );
    assert_eq!(gateway.modern().call("a_hidden", json!({})).await.refusal(), (200, -32602));
    assert_eq!(take(), ["outermost -", "before -", "before error", "outermost error"]);
}

#[tokio::test]
async fn a_foreign_layer_may_answer_and_may_fail() {
    let upstream = named("A", &["add", "boom"]).await;
    let guard = from_fn(|request: McpRequest, next: Next| async move {
        match request.target().map(|target| target.name().to_string()).as_deref() {
            Some("a_boom") => Err("the password is hunter2".into()),
            _ => next.run(request).await,
        }
    });
    let gateway = Gateway::with([("a", upstream.url())]);
    let gateway = gateway.layer(Position::AfterAccess, BoxMcpLayer::new(guard)).start().await;
    let failed = gateway.modern().call("a_boom", json!({})).await;
    assert_eq!(failed.result()["structuredContent"]["code"], "internal", "{failed}");
    assert!(!failed.text().contains("hunter2"));
    assert_eq!(gateway.modern().call("a_add", json!({})).await.content(), "A");
}

// === the end ===

#[tokio::test]
async fn a_call_under_way_ends_before_the_gateway_does() {
    let (release, probe) = (Arc::new(Notify::new()), Probe::default());
    let (gate, enter) = (release.clone(), probe.clone());
    let script = Upstream::modern().tool("t").on("tools/call", move |sent| {
        let (gate, inside) = (gate.clone(), enter.enter());
        async move {
            let _inside = inside;
            gate.notified().await;
            result(&sent, r#"{"content":[]}"#)
        }
    });
    let upstream = script.start().await;
    let mut gateway = Gateway::with([("up", upstream.url())]).start().await;
    let call = tokio::spawn(gateway.modern().request("tools/call", json!({ "name": "up_t" })).send());
    probe.begun().await;
    gateway.shut_down();
    eventually("nobody else comes in", async || {
        tokio::net::TcpStream::connect(gateway.address).await.is_err()
    })
    .await;
    assert!(!call.is_finished());
    release.notify_waiters();
    call.await.expect("no panic").result();
    gateway.ended().await;
}
