//! MCP Apps, Skills and trace context: what they say of one another must hold through the gateway.

use serde_json::{Value, json};

use crate::stage::{Gateway, Modern, Script, Upstream, error, eventually, result};

const SKILLS: &str = "io.modelcontextprotocol/skills";
const UI: &str = "io.modelcontextprotocol/ui";

/// Reads answer with the URI they were asked for, and who answers.
fn reads(script: Script, name: &'static str) -> Script {
    script.on("resources/read", move |sent| {
        let contents = json!({ "contents": [{ "uri": sent.params()["uri"], "text": name }] });
        let answer = result(&sent, &contents.to_string());
        async { answer }
    })
}

async fn read(client: &Modern, uri: &str) -> String {
    let read = client.ask("resources/read", json!({ "uri": uri })).await.result();
    assert_eq!(read["contents"][0]["uri"], uri, "the client finds what it asked for");
    read["contents"][0]["text"].as_str().expect("a text").to_owned()
}

// === apps ===

/// A server whose tool has a view that no list has, at the same URI as everybody's.
fn app(name: &'static str) -> Script {
    let tool = json!({
        "name": "show",
        "inputSchema": { "type": "object" },
        "_meta": { "ui": { "resourceUri": "ui://chart/view.html", "visibility": ["model"] }, "ui/resourceUri": "ui://chart/view.html" },
    });
    let links = json!({ "resultType": "complete", "content": [
        { "type": "resource_link", "uri": "demo://same", "name": "same" },
        { "type": "resource", "resource": { "uri": "demo://same", "text": "x" } },
        { "type": "resource_link", "uri": "https://example.com/", "name": "elsewhere" },
        { "type": "text", "text": "demo://same" },
    ]});
    let script = Upstream::modern()
        .tools(&[&tool.to_string()])
        .list("resources", &[r#"{"uri":"demo://same","name":"same"}"#])
        .declares("extensions", &format!(r#"{{"{UI}":{{"mimeTypes":["text/html;profile=mcp-app"]}}}}"#))
        .answers(links.to_string());
    reads(script, name)
}

#[tokio::test]
async fn a_view_is_found_where_the_tool_says_it_is() {
    let (a, b) = (app("A").start().await, app("B").start().await);
    let gateway = Gateway::with([("a", a.url()), ("b", b.url())]).start().await;
    let client = gateway.modern();
    let tools = client.ask("tools/list", json!({})).await.result();
    let views: Vec<&str> = tools["tools"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|tool| {
            let m = &tool["_meta"];
            assert_eq!(m["ui"]["resourceUri"], m["ui/resourceUri"]);
            assert_eq!(m["ui"]["visibility"], json!(["model"]));
            m["ui"]["resourceUri"].as_str().expect("a view")
        })
        .collect();
    // Hosts accept no other scheme.
    assert_eq!(views, ["ui://chart/view.html", "ui://b+chart/view.html"]);
    assert_eq!((read(&client, views[0]).await, read(&client, views[1]).await), ("A".into(), "B".into()));
    assert_eq!(b.seen_of("resources/read")[0].params()["uri"], "ui://chart/view.html");
    let legacy = gateway.legacy().await;
    let same = legacy.ask("resources/read", json!({ "uri": views[1] })).await.result();
    assert_eq!(same["contents"][0]["text"], "B");
}

#[tokio::test]
async fn links_in_results_lead_where_they_should() {
    let (a, b) = (app("A").start().await, app("B").start().await);
    let gateway = Gateway::with([("a", a.url()), ("b", b.url())]).start().await;
    let client = gateway.modern();
    let uris = |answer: &Value| -> Vec<String> {
        let blocks = answer["content"].as_array().expect("content").iter();
        let uri = |block: &Value| match block["type"].as_str() {
            Some("resource") => block["resource"]["uri"].clone(),
            Some("text") => block["text"].clone(),
            _ => block["uri"].clone(),
        };
        blocks.map(|block| uri(block).as_str().expect("a text").to_owned()).collect()
    };
    let of_a = client.call("a_show", json!({})).await.result();
    assert_eq!(uris(&of_a), ["demo://same", "demo://same", "https://example.com/", "demo://same"]);
    let of_b = client.call("b_show", json!({})).await.result();
    assert_eq!(uris(&of_b), ["b+demo://same", "b+demo://same", "https://example.com/", "demo://same"]);
    assert_eq!(read(&client, &uris(&of_b)[0]).await, "B");
}

#[tokio::test]
async fn a_denied_view_is_unknown() {
    let upstream = app("A").start().await;
    let gateway = Gateway::with([("a", upstream.url())]).deny("a", &["ui://*"]).start().await;
    let refused = gateway.modern().ask("resources/read", json!({ "uri": "ui://chart/view.html" })).await;
    assert_eq!(refused.refusal(), (200, -32602));
    assert!(upstream.seen_of("resources/read").is_empty());
}

// === skills ===

fn skill(path: &str) -> String {
    let name = path.rsplit('/').next().expect("a name");
    let file =
        |file: &str| json!({ "uri": format!("skill://{path}/{file}"), "digest": "sha256:0", "size": 1 });
    json!({
        "uri": format!("skill://{path}/SKILL.md"),
        "frontmatter": { "name": name, "description": "?" },
        "resources": [file("SKILL.md"), file("refs/a.md")],
    })
    .to_string()
}

/// A server with these skills, of which it lists none as resources.
fn skilled(name: &'static str, paths: &[&str]) -> Script {
    let skills: Vec<String> = paths.iter().map(|path| skill(path)).collect();
    let listed: Vec<&str> = skills.iter().map(String::as_str).collect();
    let script = Upstream::modern()
        .list("skills", &listed)
        .declares("resources", "{}")
        .declares("extensions", &format!(r#"{{"{SKILLS}":{{"directoryRead":true}}}}"#))
        .on("skills/get", move |sent| {
            let uri = sent.params()["uri"].as_str().expect("a URI").to_owned();
            let path = uri.strip_prefix("skill://").and_then(|path| path.strip_suffix("/SKILL.md"));
            let answer = match path {
                Some(path) => result(&sent, &format!(r#"{{"skill":{}}}"#, skill(path))),
                None => error(&sent, 200, r#"{"code":-32602,"message":"no skill"}"#),
            };
            async { answer }
        })
        .on("resources/directory/read", |sent| {
            let uri = sent.params()["uri"].as_str().expect("a URI").to_owned();
            let entries =
                ["a.md", "secret.md"].map(|file| json!({ "uri": format!("{uri}/{file}"), "name": file }));
            let answer = result(&sent, &json!({ "resources": entries }).to_string());
            async { answer }
        });
    reads(script, name)
}

fn uris(list: &Value) -> Vec<&str> {
    list.as_array().expect("a list").iter().map(|item| item["uri"].as_str().expect("a URI")).collect()
}

#[tokio::test]
async fn skills_of_many_servers_are_one_list() {
    let (a, b) = (
        skilled("A", &["git", "acme/refunds"]).start().await,
        skilled("B", &["git", "pdf", "acme/refunds/nested"]).start().await,
    );
    let none = Upstream::modern().tool("t").start().await;
    let gateway =
        Gateway::with([("a", a.url()), ("none", none.url()), ("b", b.url())]).page_size(3).start().await;
    let client = gateway.modern();
    let discovered = client.ask("server/discover", json!({})).await.result();
    assert_eq!(discovered["capabilities"]["extensions"], json!({ SKILLS: { "directoryRead": true } }));
    let first = client.ask("skills/list", json!({})).await.result();
    let rest = client.ask("skills/list", json!({ "cursor": first["nextCursor"] })).await.result();
    assert_eq!(
        uris(&first["skills"]),
        ["skill://git/SKILL.md", "skill://acme/refunds/SKILL.md", "b+skill://git/SKILL.md"]
    );
    // What is in a directory of another server's skill is not taken for that skill's.
    assert_eq!(uris(&rest["skills"]), ["skill://pdf/SKILL.md", "b+skill://acme/refunds/nested/SKILL.md"]);
    assert_eq!((&first["cacheScope"], &first["ttlMs"]), (&json!("private"), &json!(0)));
    assert!(none.seen_of("skills/list").is_empty());
    for (files, answers) in
        [(&first["skills"][0], "A"), (&first["skills"][2], "B"), (&rest["skills"][0], "B")]
    {
        for file in uris(&files["resources"]) {
            assert_eq!(read(&client, file).await, answers, "{file}");
        }
    }
    let legacy = gateway.legacy().await;
    let listed = legacy.ask("skills/list", json!({})).await.result();
    assert_eq!(uris(&listed["skills"]), uris(&first["skills"]));
}

#[tokio::test]
async fn one_skill_and_one_directory_are_asked_for_where_they_are() {
    let (a, b) = (skilled("A", &["git"]).start().await, skilled("B", &["git"]).start().await);
    let gateway = Gateway::with([("a", a.url()), ("b", b.url())]).start().await;
    let client = gateway.modern();
    let got = client.ask("skills/get", json!({ "uri": "b+skill://git/SKILL.md" })).await.result();
    assert_eq!(got["skill"]["uri"], "b+skill://git/SKILL.md");
    assert_eq!(uris(&got["skill"]["resources"]), ["b+skill://git/SKILL.md", "b+skill://git/refs/a.md"]);
    assert_eq!(b.seen_of("skills/get")[0].params()["uri"], "skill://git/SKILL.md");
    assert!(got["ttlMs"].is_number(), "a legacy or lax server's entry is marked: {got}");
    let read = client.ask("resources/directory/read", json!({ "uri": "b+skill://git/refs" })).await.result();
    assert_eq!(uris(&read["resources"]), ["b+skill://git/refs/a.md", "b+skill://git/refs/secret.md"]);
    let read = client.ask("resources/directory/read", json!({ "uri": "skill://git/refs" })).await.result();
    assert_eq!(uris(&read["resources"]), ["skill://git/refs/a.md", "skill://git/refs/secret.md"]);
    let unknown = client.ask("skills/get", json!({ "uri": "skill://other/SKILL.md" })).await;
    assert_eq!(unknown.refusal(), (200, -32602));
    assert_eq!(client.ask("skills/get", json!({})).await.refusal(), (200, -32602));
}

#[tokio::test]
async fn the_only_server_with_skills_may_have_more_than_it_lists() {
    let upstream = skilled("A", &[]).start().await;
    let gateway = Gateway::with([("a", upstream.url())]).start().await;
    let got = gateway.modern().ask("skills/get", json!({ "uri": "skill://hidden/SKILL.md" })).await.result();
    assert_eq!(got["skill"]["frontmatter"]["name"], "hidden");
}

#[tokio::test]
async fn denied_skills_are_unknown_with_all_that_is_in_them() {
    let upstream = skilled("A", &["git", "pdf"]).start().await;
    let rules = ["skill://git/SKILL.md", "*secret*"];
    let gateway = Gateway::with([("a", upstream.url())]).deny("a", &rules).start().await;
    let client = gateway.modern();
    let listed = client.ask("skills/list", json!({})).await.result();
    assert_eq!(uris(&listed["skills"]), ["skill://pdf/SKILL.md"]);
    for (method, uri) in [
        ("skills/get", "skill://git/SKILL.md"),
        ("resources/read", "skill://git/refs/a.md"),
        ("resources/read", "skill://pdf/../git/refs/a.md"),
        ("resources/read", "skill://pdf/%2E%2e/git/refs/a.md"),
        ("resources/read", "skill://pdf/..%2fgit/refs/a.md"),
        ("resources/read", "skill://%67it/refs/a.md"),
        ("resources/read", "skill://pdf/refs//secret.md"),
        ("resources/read", "a+skill://git/refs/a.md"),
        ("resources/read", "skill://pdf/refs/secre%74.md"),
        ("resources/directory/read", "skill://git/refs"),
    ] {
        assert_eq!(
            client.ask(method, json!({ "uri": uri })).await.refusal(),
            (200, -32602),
            "{method} {uri}"
        );
    }
    let read = client.ask("resources/directory/read", json!({ "uri": "skill://pdf/refs" })).await.result();
    assert_eq!(uris(&read["resources"]), ["skill://pdf/refs/a.md"]);
    assert!(upstream.seen_of("skills/get").is_empty() && upstream.seen_of("resources/read").is_empty());
}

#[tokio::test]
async fn without_skills_there_is_no_such_method() {
    let upstream = Upstream::modern().tool("t").start().await;
    let gateway = Gateway::with([("a", upstream.url())]).start().await;
    assert_eq!(gateway.modern().ask("skills/list", json!({})).await.refusal(), (404, -32601));
}

// === trace context ===

#[tokio::test]
async fn trace_context_passes_through_every_pair() {
    let trace = json!({
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "tracestate": "vendor=a,b=c",
        "baggage": "user=alice",
    });
    for upstream in [
        Upstream::modern().tool("t").answers(r#"{"content":[]}"#).start().await,
        Upstream::legacy().tool("t").answers(r#"{"content":[]}"#).start().await,
    ] {
        let gateway = Gateway::with([("up", upstream.url())]).start().await;
        let call = json!({ "name": "up_t", "arguments": {}, "_meta": trace });
        gateway.modern().ask("tools/call", call.clone()).await.result();
        gateway.legacy().await.ask("tools/call", call).await.result();
        let told = r#"{"jsonrpc":"2.0","method":"notifications/vendor/x","params":{"_meta":{"traceparent":"00-1-1-01"}}}"#;
        gateway.modern().raw("notifications/vendor/x", told).send().await;
        let calls = upstream.seen_of("tools/call");
        assert_eq!(calls.len(), 2);
        for sent in calls {
            for (key, value) in trace.as_object().expect("an object") {
                assert_eq!(&sent.params()["_meta"][key], value);
            }
        }
        eventually("the notification is there", async || {
            let told = upstream.seen_of("notifications/vendor/x");
            told.iter().any(|sent| sent.params()["_meta"]["traceparent"] == "00-1-1-01")
        })
        .await;
    }
}
