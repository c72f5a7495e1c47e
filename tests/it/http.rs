//! The door and what must not come through it: each bad message gets its status and its code, and the next good one
//! its answer.

use http::Method;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::stage::{Answer, Gateway, META, PATIENCE, Request, Upstream};

const MIRRORED: &str = r#"{"name":"mirrored","inputSchema":{"type":"object","properties":{
    "region":{"type":"string","x-mcp-header":"Region"},"n":{"type":"integer","x-mcp-header":"N"}}}}"#;
const PLAIN: &str = r#"{"name":"t","inputSchema":{"type":"object"}}"#;

/// A gateway in front of two upstreams, so that nothing unknown is passed on to the only one.
struct House {
    gateway: Gateway,
    upstream: Upstream,
    _other: Upstream,
}

impl House {
    async fn open() -> House {
        let script = Upstream::modern().tools(&[PLAIN, MIRRORED]);
        let upstream = script.answers(r#"{"content":[]}"#).start().await;
        let other = Upstream::modern().tool("t").start().await;
        let gateway = Gateway::with([("up", upstream.url()), ("other", other.url())]).start().await;
        House { gateway, upstream, _other: other }
    }

    /// A request in good order, to be spoilt.
    fn good(&self) -> Request {
        self.gateway.modern().request("tools/call", json!({ "name": "up_t", "arguments": {} }))
    }

    fn mirrored(&self, arguments: Value) -> Request {
        self.gateway.modern().request("tools/call", json!({ "name": "up_mirrored", "arguments": arguments }))
    }

    /// Sends something bad, and then something good.
    async fn refuses(&self, what: &str, bad: Request, status: u16, code: i64) -> Answer {
        let before = self.upstream.seen_of("tools/call").len();
        let answer = bad.send().await;
        assert_eq!(answer.refusal(), (status, code), "{what}: {answer}");
        assert_eq!(answer.header("content-type"), Some("application/json"), "{what}");
        assert_eq!(self.upstream.seen_of("tools/call").len(), before, "{what} reached the upstream");
        self.is_well().await;
        answer
    }

    async fn is_well(&self) {
        self.good().send().await.result();
    }
}

#[tokio::test]
async fn what_is_no_message_is_refused() {
    let house = House::open().await;
    let deep = format!("{}{}", "[".repeat(200_000), "]".repeat(200_000));
    let cases: &[(&str, &[u8], i64)] = &[
        ("nothing", b"", -32700),
        ("no JSON", b"hello", -32700),
        ("a truncated message", br#"{"jsonrpc":"2.0","id":1,"method":"tools/li"#, -32700),
        ("a message and more", br#"{"jsonrpc":"2.0","id":1,"method":"ping"}{}"#, -32700),
        ("not UTF-8", b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"\xff\xfe\"}", -32700),
        ("a control character", b"{\"jsonrpc\":\"2.0\",\"id\":\"\x01\",\"method\":\"x\"}", -32700),
        ("a batch", br#"[{"jsonrpc":"2.0","id":1,"method":"tools/list"}]"#, -32600),
        ("an empty batch", b"[]", -32600),
        ("brackets without end", deep.as_bytes(), -32600),
        ("a number", b"3", -32600),
        ("a string", br#""tools/list""#, -32600),
        ("null", b"null", -32600),
        ("an empty object", b"{}", -32600),
        ("no version", br#"{"id":1,"method":"tools/list"}"#, -32600),
        ("another version", br#"{"jsonrpc":"1.0","id":1,"method":"tools/list"}"#, -32600),
        ("a version that is a number", br#"{"jsonrpc":2.0,"id":1,"method":"tools/list"}"#, -32600),
        ("a null id", br#"{"jsonrpc":"2.0","id":null,"method":"tools/list"}"#, -32600),
        ("a fractional id", br#"{"jsonrpc":"2.0","id":1.5,"method":"tools/list"}"#, -32600),
        ("an id that is an object", br#"{"jsonrpc":"2.0","id":{},"method":"tools/list"}"#, -32600),
        ("an id that is a boolean", br#"{"jsonrpc":"2.0","id":true,"method":"tools/list"}"#, -32600),
        ("a method that is a number", br#"{"jsonrpc":"2.0","id":1,"method":7}"#, -32600),
        ("neither method nor result", br#"{"jsonrpc":"2.0","id":1,"params":{}}"#, -32600),
        ("a key that comes twice", br#"{"jsonrpc":"2.0","id":1,"id":2,"method":"x"}"#, -32600),
        ("params that are a list", br#"{"jsonrpc":"2.0","id":1,"method":"x","params":[1]}"#, -32602),
        ("params that are a string", br#"{"jsonrpc":"2.0","id":1,"method":"x","params":"a"}"#, -32602),
        (
            "a param that comes twice",
            br#"{"jsonrpc":"2.0","id":1,"method":"x","params":{"a":1,"a":2}}"#,
            -32602,
        ),
        (
            "one twice, spelled otherwise",
            br#"{"jsonrpc":"2.0","id":1,"method":"x","params":{"a":1,"\u0061":2}}"#,
            -32602,
        ),
    ];
    for (what, body, code) in cases {
        let modern = house.good().body(body.to_vec());
        house.refuses(what, modern, 400, *code).await;
        let undressed = house.gateway.post(body.to_vec());
        house.refuses(what, undressed, 400, *code).await;
    }
}

#[tokio::test]
async fn a_refusal_names_the_request_where_it_can() {
    let house = House::open().await;
    let bad = house.good().body(r#"{"jsonrpc":"1.0","id":"seven","method":"x"}"#);
    assert_eq!(house.refuses("another version", bad, 400, -32600).await.json()["id"], "seven");
    let bad = house.good().body("{");
    assert_eq!(house.refuses("no JSON", bad, 400, -32700).await.json()["id"], Value::Null);
}

#[tokio::test]
async fn values_nested_without_end_do_no_harm() {
    let house = House::open().await;
    let deep = format!("{}{}", r#"{"a":["#.repeat(100_000), "]}".repeat(100_000));
    for (tool, answered) in [("up_t", 200), ("up_mirrored", 200), ("nothing", 200)] {
        let params = format!(r#"{{"name":"{tool}","arguments":{deep},"_meta":{META}}}"#);
        let body = format!(r#"{{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{params}}}"#);
        let request = house.gateway.modern().raw("tools/call", body).header("mcp-name", tool);
        assert_eq!(request.send().await.status, answered, "{tool}");
    }
    let body = format!(
        r#"{{"jsonrpc":"2.0","id":0,"method":"initialize","params":{{"protocolVersion":"2025-11-25","capabilities":{deep}}}}}"#
    );
    let opened = house.gateway.post(body).send().await;
    assert_eq!(opened.status, 400, "a session keeps no capabilities of this size");
    house.is_well().await;
}

#[tokio::test]
async fn a_body_of_more_than_4_mib_is_refused() {
    let house = House::open().await;
    let body = |size: usize| {
        let params = format!(r#"{{"name":"up_t","arguments":{{}},"_meta":{META},"pad":""#);
        let mut body = format!(r#"{{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{params}"#);
        body.push_str(&"x".repeat(size - body.len() - 3));
        body.push_str("\"}}");
        body
    };
    house.good().body(body(4 << 20)).send().await.result();
    house.refuses("one byte more", house.good().body(body((4 << 20) + 1)), 413, -32600).await;
    house.refuses("far more", house.good().body(body(40 << 20)), 413, -32600).await;
}

#[tokio::test]
async fn other_media_types_are_refused() {
    let house = House::open().await;
    for kind in ["text/plain", "application/json-rpc", "application/x-www-form-urlencoded", "", "json"] {
        house.refuses(kind, house.good().set("content-type", kind), 415, -32600).await;
    }
    house.refuses("none", house.good().without("content-type"), 415, -32600).await;
    for kind in ["text/html", "text/event-stream", "application/xml", ""] {
        house.refuses(kind, house.good().set("accept", kind), 406, -32600).await;
    }
    for kind in ["Application/JSON", "application/json; charset=utf-8"] {
        house.good().set("content-type", kind).send().await.result();
    }
}

#[tokio::test]
async fn headers_that_do_not_say_what_the_body_says_are_refused() {
    let house = House::open().await;
    let good = || house.good();
    let cases = [
        ("no version", good().without("mcp-protocol-version")),
        ("two versions", good().header("mcp-protocol-version", "2026-07-28")),
        ("another version", good().set("mcp-protocol-version", "2025-11-25")),
        ("no version at all", good().set("mcp-protocol-version", "")),
        ("no method", good().without("mcp-method")),
        ("two methods", good().header("mcp-method", "tools/call")),
        ("another method", good().set("mcp-method", "tools/list")),
        ("the method in capitals", good().set("mcp-method", "Tools/Call")),
        ("no name", good().without("mcp-name")),
        ("two names", good().header("mcp-name", "up_t")),
        ("another name", good().set("mcp-name", "up_x")),
        ("the name in capitals", good().set("mcp-name", "UP_T")),
        ("another name in Base64", good().set("mcp-name", "=?base64?dXBfeA==?=")),
        ("a name in broken Base64", good().set("mcp-name", "=?base64?dXBfd?=")),
        ("a name in Base64 of no text", good().set("mcp-name", "=?base64?//8=?=")),
        ("a name that is not ASCII", good().set("mcp-name", "üp_t")),
    ];
    for (what, bad) in cases {
        house.refuses(what, bad, 400, -32020).await;
    }
    good().set("mcp-name", "=?base64?dXBfdA==?=").send().await.result();
}

#[tokio::test]
async fn mirrored_arguments_must_say_what_the_arguments_say() {
    let house = House::open().await;
    let call = || house.mirrored(json!({ "region": "eu", "n": 42 })).header("mcp-param-region", "eu");
    call().header("mcp-param-n", "42").send().await.result();
    call().header("mcp-param-n", "42.0").send().await.result();
    house.mirrored(json!({})).send().await.result();
    house.mirrored(json!({ "region": null })).send().await.result();
    let japan = house.mirrored(json!({ "region": "日本" })).header("mcp-param-region", "=?base64?5pel5pys?=");
    japan.send().await.result();

    let cases = [
        ("none", house.mirrored(json!({ "region": "eu" }))),
        ("one of two", call()),
        ("another value", call().header("mcp-param-n", "43")),
        ("two values", call().header("mcp-param-n", "42").header("mcp-param-n", "42")),
        ("a value for nothing", house.mirrored(json!({})).header("mcp-param-region", "eu")),
        ("a value for null", house.mirrored(json!({ "region": null })).header("mcp-param-region", "eu")),
        ("broken Base64", call().header("mcp-param-n", "=?base64?!?=")),
    ];
    for (what, bad) in cases {
        house.refuses(what, bad, 400, -32020).await;
    }
}

#[tokio::test]
async fn mirrored_arguments_are_written_anew_for_the_upstream() {
    let house = House::open().await;
    let call = house.mirrored(json!({ "region": "日本", "n": 7 })).header("mcp-param-n", "7.0");
    let call = call.header("mcp-param-region", "=?base64?5pel5pys?=");
    call.header("mcp-param-vendor", "x").send().await.result();
    let sent = &house.upstream.seen_of("tools/call")[0];
    assert_eq!(sent.header("mcp-param-region"), Some("=?base64?5pel5pys?="));
    assert_eq!(sent.header("mcp-param-n"), Some("7"));
    assert_eq!(sent.header("mcp-param-vendor"), Some("x"), "what nobody here knows passes on");
}

#[tokio::test]
async fn a_request_must_carry_its_context() {
    let house = House::open().await;
    let with_meta = |meta: Value| {
        let params = json!({ "name": "up_t", "arguments": {}, "_meta": meta });
        let body = json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params });
        house.good().body(body.to_string())
    };
    let meta = |key: &str, value: Value| {
        let mut meta: Value = serde_json::from_str(META).expect("JSON");
        match value {
            Value::Null => drop(meta.as_object_mut().expect("an object").remove(key)),
            value => meta[key] = value,
        }
        meta
    };
    let key = |name: &str| format!("io.modelcontextprotocol/{name}");
    let cases = [
        ("no `_meta`", with_meta(Value::Null)),
        ("a `_meta` that is a list", with_meta(json!([]))),
        ("an empty `_meta`", with_meta(json!({}))),
        ("no version", with_meta(meta(&key("protocolVersion"), Value::Null))),
        ("a version that is a number", with_meta(meta(&key("protocolVersion"), json!(2026)))),
        ("no capabilities", with_meta(meta(&key("clientCapabilities"), Value::Null))),
        ("capabilities that are a list", with_meta(meta(&key("clientCapabilities"), json!([])))),
        ("a name that is a string", with_meta(meta(&key("clientInfo"), json!("me")))),
        ("a progress token that is a list", with_meta(meta("progressToken", json!([1])))),
    ];
    for (what, bad) in cases {
        house.refuses(what, bad, 400, -32602).await;
    }
    with_meta(meta(&key("clientInfo"), Value::Null)).send().await.result();
}

#[tokio::test]
async fn a_version_nobody_speaks_is_refused_with_those_spoken_here() {
    let house = House::open().await;
    let meta = json!({ "io.modelcontextprotocol/protocolVersion": "2031-01-01" });
    let bad = house.gateway.modern().request("tools/list", json!({ "_meta": meta }));
    let bad = bad.set("mcp-protocol-version", "2031-01-01");
    let error = house.refuses("a version to come", bad, 400, -32022).await.error();
    assert_eq!(error["data"]["requested"], "2031-01-01");
    let supported = error["data"]["supported"].as_array().expect("a list");
    assert!(supported.contains(&json!("2026-07-28")), "{error}");
}

#[tokio::test]
async fn methods_of_the_other_era_and_of_none_are_not_found() {
    let house = House::open().await;
    let methods = [
        "initialize",
        "ping",
        "logging/setLevel",
        "resources/subscribe",
        "resources/unsubscribe",
        "vendor/unknown",
        "tools/lists",
        "",
    ];
    for method in methods {
        let params = if method.starts_with("resources") { json!({ "uri": "a:b" }) } else { json!({}) };
        let bad = house.gateway.modern().request(method, params).header("mcp-name", "a:b");
        house.refuses(method, bad, 404, -32601).await;
    }
}

#[tokio::test]
async fn without_a_session_only_post_is_allowed() {
    let house = House::open().await;
    for verb in [Method::GET, Method::DELETE, Method::PUT, Method::PATCH, Method::OPTIONS] {
        for path in ["/mcp", "/mcp/"] {
            let bad = Request::new(house.gateway.address, verb.clone(), path);
            let bad = bad.header("accept", "text/event-stream");
            let answer = house.refuses(verb.as_str(), bad, 405, -32600).await;
            assert_eq!(answer.header("allow"), Some("POST"), "{verb}");
        }
    }
    for path in ["/", "/mcp/x", "/mcp/g/nobody"] {
        let lost = Request::post(house.gateway.address, path, "{}").send().await;
        assert_eq!(lost.status, 404, "{path}");
    }
}

#[tokio::test]
async fn foreign_hosts_and_origins_are_kept_out_of_both_eras() {
    let house = House::open().await;
    let initialize = || house.gateway.post(crate::stage::Legacy::initialize("2025-11-25", json!({})));
    let get = || Request::new(house.gateway.address, Method::GET, "/mcp");
    for host in ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "evil.example:80"] {
        house.refuses(host, house.good().set("host", host), 403, -32600).await;
        house.refuses(host, initialize().set("host", host), 403, -32600).await;
        house.refuses(host, get().set("host", host), 403, -32600).await;
    }
    for origin in ["http://evil.example", "null", "https://localhost.evil.example", "file://"] {
        house.refuses(origin, house.good().header("origin", origin), 403, -32600).await;
        house.refuses(origin, initialize().header("origin", origin), 403, -32600).await;
        house.refuses(origin, get().header("origin", origin), 403, -32600).await;
    }
    house.good().header("origin", "http://localhost:3000").send().await.result();
}

#[tokio::test]
async fn a_client_that_goes_away_within_its_body_harms_nobody() {
    let house = House::open().await;
    for _ in 0..20 {
        let mut stream = TcpStream::connect(house.gateway.address).await.expect("a connection");
        let head = "POST /mcp HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n";
        let rest = "content-length: 1000\r\n\r\n{\"jsonrpc\":";
        stream.write_all(format!("{head}{rest}").as_bytes()).await.expect("a write");
    }
    house.is_well().await;
}

#[tokio::test]
async fn bytes_that_are_no_http_are_refused() {
    let house = House::open().await;
    for bytes in
        ["\u{0}\u{1}\u{2}\r\n\r\n".to_owned(), "GET\r\n\r\n".to_owned(), "\r\n".repeat(9) + "{}\r\n\r\n"]
    {
        let mut stream = TcpStream::connect(house.gateway.address).await.expect("a connection");
        stream.write_all(bytes.as_bytes()).await.expect("a write");
        let mut answer = Vec::new();
        let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await;
        assert!(read.is_ok(), "the connection is closed");
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 400"), "{answer:?}");
    }
    let huge = "x".repeat(1 << 20);
    let mut stream = TcpStream::connect(house.gateway.address).await.expect("a connection");
    // The gateway may hang up before the end of this.
    let _ = stream
        .write_all(format!("POST /mcp HTTP/1.1\r\nhost: localhost\r\nx: {huge}\r\n\r\n").as_bytes())
        .await;
    house.is_well().await;
}

/// The limit itself is 15 seconds; it is bounded, and nobody waits for it.
#[tokio::test]
async fn a_head_that_never_ends_is_cut_off() {
    let house = House::open().await;
    let mut slow = TcpStream::connect(house.gateway.address).await.expect("a connection");
    slow.write_all(b"POST /mcp HTTP/1.1\r\nhost: loc").await.expect("a write");
    house.is_well().await;
    let mut rest = Vec::new();
    let cut_off = tokio::time::timeout(PATIENCE + PATIENCE, slow.read_to_end(&mut rest)).await;
    assert!(cut_off.is_ok(), "still open");
}
