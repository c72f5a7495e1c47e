//! Every sentence a config file can earn.

use std::{collections::BTreeMap, fs, time::Duration};

use proptest::prelude::*;

use super::*;
use crate::{
    protocol::{Naming, NamingMode},
    registry::{Origin, Rules, ServerRecord},
    upstream::{Isolation, Transport, UpstreamSpec},
};

fn parsed(text: &str) -> Config {
    parse(Path::new("f"), text).unwrap()
}

fn refused(text: &str) -> String {
    parse(Path::new("f"), text).unwrap_err().to_string()
}

/// Of a file with the one server `x`, without the place in the file.
fn refused_server(server: &str) -> String {
    let error = parse(Path::new("f"), &format!(r#"{{"mcpServers": {{"x": {server}}}}}"#)).unwrap_err();
    let said = Vec::from_iter(error.problems.iter().map(|problem| {
        let path = problem.path.strip_prefix("mcpServers.x").unwrap();
        format!("{}: {}", path.trim_start_matches('.'), problem.text)
    }));
    said.join("\n")
}

fn server(server: &str) -> ServerRecord {
    parsed(&format!(r#"{{"mcpServers": {{"x": {server}}}}}"#)).servers.remove(0)
}

#[test]
fn reads_everything_there_is() {
    let config = parsed(
        r#"
        // Comments, as in other clients' files,
        {
            "$schema": "https://example.com/schema.json",
            "listen": "127.0.0.1:9000",
            "sse": true,
            "naming": "on-collision",
            "separator": "__",
            "mcpServers": {
                "zeta": {
                    "type": "stdio", "command": "npx", "args": ["-y", "pkg"], "env": {"KEY": "${KEY}"},
                    "cwd": "/srv", "timeout": 1.5, "concurrency": 3, "isolation": "session", "enabled": false,
                },
                "alpha": {
                    "type": "http", "url": "https://mcp.example.com/mcp", "headers": {"X-Key": "${env:KEY}"},
                    "allow": ["read*", "{a,b}"], "deny": ["*secret*"], /* and trailing commas, */
                },
                "mid": {"type": "sse", "url": "http://localhost:1/sse", "disabled": false},
            },
        }"#,
    );
    let record = |name: &str, transport: Transport| ServerRecord {
        origin: Origin::File,
        ..ServerRecord::new(name.parse().unwrap(), UpstreamSpec::new(transport))
    };
    let map = |key: &str, value: &str| BTreeMap::from([(key.to_owned(), value.to_owned())]);
    let mut zeta = record(
        "zeta",
        Transport::Stdio {
            command: "npx".to_owned(),
            args: vec!["-y".to_owned(), "pkg".to_owned()],
            env: map("KEY", "${KEY}"),
            cwd: Some("/srv".into()),
        },
    );
    zeta.spec.timeout = Duration::from_millis(1500);
    zeta.spec.concurrency = 3;
    zeta.spec.isolation = Isolation::Session;
    zeta.enabled = false;
    let url = "https://mcp.example.com/mcp".to_owned();
    let mut alpha = record("alpha", Transport::Http { url, headers: map("X-Key", "${env:KEY}") });
    alpha.rules = Rules {
        allow: Some(vec!["read*".to_owned(), "{a,b}".to_owned()]),
        deny: vec!["*secret*".to_owned()],
    };
    let url = "http://localhost:1/sse".to_owned();
    let mid = record("mid", Transport::Sse { url, headers: BTreeMap::new() });
    let naming = Naming { mode: NamingMode::OnCollision, separator: "__".to_owned(), ..Naming::default() };
    assert_eq!(
        config,
        Config {
            listen: Some("127.0.0.1:9000".parse().unwrap()),
            sse: Some(true),
            naming: Some(naming),
            servers: vec![zeta, alpha, mid],
        }
    );
}

#[test]
fn what_is_not_there_is_not_set() {
    assert_eq!(parsed("{}"), Config::default());
    assert_eq!(parsed("\u{feff}{\"mcpServers\": {}}"), Config::default());
    let plain = server(r#"{"command": "c"}"#);
    assert_eq!(plain.spec, UpstreamSpec::stdio("c", [""; 0]));
    assert!(plain.enabled);
    assert_eq!(plain.rules, Rules::default());
    assert_eq!(parsed(r#"{"separator": "-"}"#).naming.unwrap().mode, NamingMode::Prefix);
}

#[test]
fn an_empty_allow_list_is_not_an_absent_one() {
    assert_eq!(server(r#"{"command": "c", "allow": []}"#).rules.allow, Some(vec![]));
}

#[test]
fn accepts_what_other_clients_write() {
    for kind in ["http", "streamable-http", "streamableHttp"] {
        let record = server(&format!(r#"{{"type": "{kind}", "url": "http://h/mcp"}}"#));
        assert_eq!(record.spec.transport.kind(), "http");
    }
    let vscode = parsed(r#"{"servers": {"x": {"command": "c"}}}"#);
    assert_eq!(vscode.servers[0].name.as_str(), "x");
    assert!(!server(r#"{"command": "c", "disabled": true}"#).enabled);
    for url in ["${BASE:-https://h}/mcp", "https://${HOST}/mcp", "HTTPS://h", "http://[::1]:80/mcp?a=b"] {
        server(&format!(r#"{{"url": "{url}"}}"#));
    }
}

#[test]
fn times_are_seconds_or_have_a_unit() {
    let timeout = |written: &str| {
        server(&format!(r#"{{"command": "c", "timeout": {written}}}"#)).spec.timeout.as_millis()
    };
    assert_eq!(timeout("5"), 5000);
    assert_eq!(timeout("0.25"), 250);
    assert_eq!(timeout(r#""5s""#), 5000);
    assert_eq!(timeout(r#""1.5s""#), 1500);
    assert_eq!(timeout(r#""500ms""#), 500);
    assert_eq!(timeout(r#""2m""#), 120_000);
    assert_eq!(timeout(r#""24h""#), 86_400_000);

    for written in ["0", "-1", "86401", "1e999", r#""0s""#, r#""0.5ms""#, r#""25h""#] {
        assert_eq!(
            refused_server(&format!(r#"{{"command": "c", "timeout": {written}}}"#)),
            "timeout: must be between 1 ms and 24 h; a number is in seconds",
            "{written}"
        );
    }
    for written in ["", "s", "5", "5 s", "-5s", "5x", "1.2.3s", "é"] {
        assert_eq!(
            refused_server(&format!(r#"{{"command": "c", "timeout": "{written}"}}"#)),
            format!(
                "timeout: {written:?} is not a time: use seconds, or a string such as \"500ms\", \"5s\" or \"2m\""
            )
        );
    }
}

#[test]
fn unknown_keys_are_told_with_the_right_one() {
    assert_eq!(
        refused("{\n  \"mcpServers\": {\n    \"files\": {\"comand\": \"c\"}\n  }\n}"),
        "f:3:15: mcpServers.files.comand: unknown key, did you mean `command`?"
    );
    assert_eq!(
        refused(r#"{"mcpservers": {}}"#),
        "f:1:2: mcpservers: unknown key, did you mean `mcpServers`?"
    );
    assert_eq!(
        refused(r#"{"mcp_servers": {}}"#),
        "f:1:2: mcp_servers: unknown key, did you mean `mcpServers`?"
    );
    let meant = [
        ("serverUrl", "url"),
        ("httpUrl", "url"),
        ("uri", "url"),
        ("transport", "type"),
        ("arguments", "args"),
        ("includeTools", "allow"),
        ("Timeout", "timeout"),
        ("environment", "env"),
        ("header", "headers"),
        ("isolated", "isolation"),
        ("enable", "enabled"),
    ];
    for (written, right) in meant {
        assert_eq!(
            refused_server(&format!(r#"{{"{written}": 1}}"#)),
            format!("{written}: unknown key, did you mean `{right}`?")
        );
    }
    assert_eq!(
        refused_server(r#"{"command": "c", "alwaysAllow": []}"#),
        "alwaysAllow: unknown key; known here: type, command, args, env, cwd, url, headers, allow, deny, enabled, \
         disabled, timeout, concurrency, isolation"
    );
    assert_eq!(
        refused(r#"{"zzz zzz": 1}"#),
        "f:1:2: [\"zzz zzz\"]: unknown key; known here: $schema, listen, sse, naming, separator, mcpServers, servers"
    );
}

#[test]
fn a_server_is_reached_in_one_way() {
    let cases = [
        ("{}", ": needs `command`, a program to start, or `url`, a server to call"),
        (
            r#"{"command": "c", "url": "http://h"}"#,
            ": has both `command` and `url`, and can have only one of them",
        ),
        (r#"{"type": "stdio", "url": "http://h"}"#, "type: \"stdio\" does not go with `url`"),
        (r#"{"type": "http", "command": "c"}"#, "type: \"http\" does not go with `command`"),
        (r#"{"url": "http://h", "args": []}"#, "args: does not go with `url`"),
        (r#"{"url": "http://h", "env": {}}"#, "env: does not go with `url`"),
        (r#"{"url": "http://h", "cwd": "/"}"#, "cwd: does not go with `url`"),
        (r#"{"command": "c", "headers": {}}"#, "headers: does not go with `command`"),
        (
            r#"{"url": "http://h", "isolation": "session"}"#,
            "isolation: does not go with `url`: such a server tells its sessions apart by itself",
        ),
        (
            r#"{"type": "websocket", "url": "http://h"}"#,
            "type: \"websocket\" is not a type: use \"http\", \"sse\" or \"stdio\"",
        ),
    ];
    for (written, said) in cases {
        assert_eq!(refused_server(written), said, "{written}");
    }
}

#[test]
fn values_are_checked_where_they_are_read() {
    let malformed = "is not a reference: use `${VAR}`, `${VAR:-default}` or `${file:PATH}`, or `$${` for the \
                     characters themselves";
    let cases = [
        (r#"{"url": "ftp://h"}"#, "url: must start with `http://` or `https://`"),
        (r#"{"url": "h/mcp"}"#, "url: must start with `http://` or `https://`"),
        (r#"{"url": "http:///mcp"}"#, "url: has no host"),
        (r#"{"url": "http://h/a b"}"#, "url: is not a URL: invalid uri character"),
        (r#"{"url": "http://u:p@h/"}"#, "url: must not hold a user name or password: send them in `headers`"),
        (r#"{"url": "http://h/${"}"#, "url: a `${` has no `}`: write `$${` for the characters themselves"),
        (r#"{"url": "http://h", "headers": {"a b": "v"}}"#, "headers[\"a b\"]: \"a b\" is not a header name"),
        (
            r#"{"url": "http://h", "headers": {"X-A": "a\nb"}}"#,
            "headers.X-A: has a character that a header cannot have",
        ),
        (r#"{"command": " "}"#, "command: must name a program"),
        (
            r#"{"command": "c", "args": ["a", "b\u0000"]}"#,
            "args[1]: has a NUL character, which cannot be given to a program",
        ),
        (
            r#"{"command": "c", "env": {"A=B": "v"}}"#,
            "env[\"A=B\"]: \"A=B\" is not a name of an environment variable",
        ),
        (
            r#"{"command": "c", "allow": ["ok", "[a"]}"#,
            "allow[1]: \"[a\" is not a glob: unclosed character class; missing ']'",
        ),
        (
            r#"{"command": "c", "deny": ["{a"]}"#,
            "deny[0]: \"{a\" is not a glob: unclosed alternate group; missing '}' (maybe escape '{' with '[{]'?)",
        ),
        (r#"{"command": "c", "concurrency": 0}"#, "concurrency: must be a whole number from 1 to 1000000"),
        (r#"{"command": "c", "concurrency": 1.5}"#, "concurrency: must be a whole number from 1 to 1000000"),
        (
            r#"{"command": "c", "isolation": "client"}"#,
            "isolation: \"client\" is not an isolation: use \"shared\" or \"session\"",
        ),
        (
            r#"{"command": "c", "enabled": true, "disabled": true}"#,
            "disabled: stands beside `enabled`, and one of them is enough",
        ),
    ];
    for (written, said) in cases {
        assert_eq!(refused_server(written), said, "{written}");
    }
    assert_eq!(
        refused_server(r#"{"command": "c", "env": {"A": "${input:key}"}}"#),
        format!("env.A: `${{input:key}}` {malformed}")
    );
}

#[test]
fn types_are_told_in_words() {
    let cases = [
        ("[]", ": must be an object, not a list"),
        (r#"{"command": ["c"]}"#, "command: must be a string, not a list"),
        (r#"{"command": "c", "args": "a"}"#, "args: must be a list of strings, not a string"),
        (r#"{"command": "c", "args": ["a", 5]}"#, "args[1]: must be a string, not a number"),
        (r#"{"command": "c", "env": {"PORT": 5}}"#, "env.PORT: must be a string, not a number"),
        (r#"{"command": "c", "enabled": "yes"}"#, "enabled: must be true or false, not a string"),
        (r#"{"command": "c", "cwd": null}"#, "cwd: must be a string, not null"),
        (r#"{"command": "c", "concurrency": "5"}"#, "concurrency: must be a number, not a string"),
        (
            r#"{"command": "c", "timeout": true}"#,
            "timeout: must be a number of seconds, or a string such as \"5s\", not true or false",
        ),
        (r#"{"url": {}}"#, "url: must be a string, not an object"),
    ];
    for (written, said) in cases {
        assert_eq!(refused_server(written), said, "{written}");
    }
    assert_eq!(refused("[]"), "f:1:1: must be an object, not a list");
    assert_eq!(refused(r#"{"mcpServers": []}"#), "f:1:2: mcpServers: must be an object, not a list");
}

#[test]
fn the_gateways_own_keys_are_checked() {
    assert_eq!(
        refused(r#"{"listen": "8000"}"#),
        "f:1:2: listen: \"8000\" is not an address and a port, such as \"127.0.0.1:8000\""
    );
    assert_eq!(
        refused(r#"{"naming": "none"}"#),
        "f:1:2: naming: \"none\" is not a naming mode: use prefix, bare or on-collision"
    );
    for separator in ["", "/", "_________", "é"] {
        assert_eq!(
            refused(&format!(r#"{{"separator": "{separator}"}}"#)),
            "f:1:2: separator: must be 1 to 8 letters, digits, `_`, `-` or `.`"
        );
    }
}

#[test]
fn a_bad_server_name_is_told_with_one_that_would_do() {
    assert_eq!(
        refused(r#"{"mcpServers": {"my_server": {"command": "c"}}}"#),
        "f:1:17: mcpServers.my_server: \"my_server\" is not a server name: use letters, digits and `-`, starting \
         with a letter or digit, at most 64; \"my-server\" would do"
    );
    assert_eq!(
        refused(r#"{"mcpServers": {"": {"command": "c"}}}"#),
        "f:1:17: mcpServers[\"\"]: \"\" is not a server name: use letters, digits and `-`, starting with a letter \
         or digit, at most 64"
    );
}

#[test]
fn a_key_is_given_once() {
    assert_eq!(
        refused("{\"listen\": \"127.0.0.1:1\",\n \"listen\": \"127.0.0.1:2\"}"),
        "f:2:2: listen: is given twice, first on line 1"
    );
    assert_eq!(
        refused("{\"mcpServers\": {\"a\": {\"command\": \"c\"},\n\n\"a\": {}}}"),
        "f:3:1: mcpServers.a: is given twice, first on line 1"
    );
    assert_eq!(
        refused_server(r#"{"command": "c", "env": {"A": "1", "A": "2"}}"#),
        "env.A: is given twice, first on line 1"
    );
    assert_eq!(
        refused(r#"{"mcpServers": {}, "servers": {}}"#),
        "f:1:20: servers: is another spelling of `mcpServers`, which is there too"
    );
}

#[test]
fn syntax_errors_say_where() {
    let cases = [
        ("{\n  \"mcpServers\": {\n", "f:2:17: unterminated object"),
        ("{\"a\" 1}", "f:1:6: expected colon after the string or word in object property"),
        ("{} {}", "f:1:4: text cannot contain more than one JSON value"),
        ("{\"listen\": '1'}", "f:1:12: single-quoted strings are not allowed"),
        ("{listen: 1}", "f:1:2: expected string for object property"),
        ("{\"a\": 1 \"b\": 2}", "f:1:8: expected comma"),
        ("nonsense", "f:1:1: unexpected word"),
    ];
    for (written, said) in cases {
        assert_eq!(refused(written), said, "{written}");
    }
    let deep = format!("{{\"a\": {}", "[".repeat(100_000));
    assert!(refused(&deep).ends_with("maximum nesting depth exceeded"));
}

#[test]
fn all_problems_are_told_in_the_order_of_the_file() {
    let text = r#"{
  "listen": 8000,
  "mcpServers": {
    "a": {"command": "c", "timeout": "soon"},
    "b": {"url": "x"},
    "c": {"comand": "c"}
  },
  "nameing": "bare"
}"#;
    assert_eq!(
        refused(text),
        "f:2:3: listen: must be a string, not a number\n\
         f:4:27: mcpServers.a.timeout: \"soon\" is not a time: use seconds, or a string such as \"500ms\", \"5s\" or \
         \"2m\"\n\
         f:5:11: mcpServers.b.url: must start with `http://` or `https://`\n\
         f:6:11: mcpServers.c.comand: unknown key, did you mean `command`?\n\
         f:8:3: nameing: unknown key, did you mean `naming`?"
    );
}

#[test]
fn files_that_hold_no_config_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mcp.json");
    let said = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let said = read(&path).unwrap_err().to_string();
        said.strip_prefix(&path.display().to_string()).unwrap().to_owned()
    };
    for empty in ["", " \n\t", "// only this\n", "\u{feff}"] {
        assert_eq!(said(empty.as_bytes()), ": the file is empty; `{}` is the least it can hold");
    }
    assert_eq!(said(b"{\n \"\xff\": 1}"), ":2:3: the text is not UTF-8");
    assert_eq!(said(&vec![b' '; LARGEST_FILE as usize + 1]), ": is larger than 16 MiB");

    let missing = dir.path().join("nowhere.json");
    assert_eq!(
        read(&missing).unwrap_err().to_string(),
        format!("{}: cannot be read: No such file or directory (os error 2)", missing.display())
    );
    assert_eq!(
        read(dir.path()).unwrap_err().to_string(),
        format!("{}: cannot be read: Is a directory (os error 21)", dir.path().display())
    );
    fs::write(&path, r#"{"mcpServers": {"x": {"command": "c"}}}"#).unwrap();
    assert_eq!(read(&path).unwrap().servers.len(), 1);
}

#[test]
fn messages_hold_no_values_that_may_be_secrets() {
    let text = r#"{"mcpServers": {
        "a": {"url": "htp://h/?key=s3cret", "headers": {"Authorization": "s3cret\n"}},
        "b": {"url": "http://u:s3cret@h", "headers": {"Authorization": ["s3cret"]}},
        "c": {"command": "c", "args": ["s3cret\u0000", "s3cret ${"], "env": {"K": "s3cret ${"}}
    }}"#;
    let said = refused(text);
    assert_eq!(said.lines().count(), 7, "{said}");
    assert!(!said.contains("s3cret"), "{said}");
}

#[test]
fn a_file_that_is_cut_anywhere_is_refused() {
    let whole =
        r#"{"listen": "127.0.0.1:1", /* é */ "mcpServers": {"x": {"url": "http://h", "timeout": "5s"}}}"#;
    parsed(whole);
    for part in (0..whole.len()).filter_map(|at| whole.get(..at)) {
        assert!(parse(Path::new("f"), part).is_err(), "{part}");
    }
}

/// Text that gets past the parser more often than chance would have it.
fn almost_a_config() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        Just("null".to_owned()),
        Just("true".to_owned()),
        "-?[0-9]{1,3}(\\.[0-9]|e[0-9]{3})?",
        "\"(\\PC|\\\\n|\\\\u00[0-9]{2}|\\$\\{|\\$|\\}|[a-z:/]){0,8}\"".prop_map(|text| text),
        Just("\"5s\"".to_owned()),
        Just("\"http://h/${V:-x}\"".to_owned()),
    ];
    let key = prop_oneof![
        Just("mcpServers".to_owned()),
        Just("servers".to_owned()),
        Just("listen".to_owned()),
        Just("command".to_owned()),
        Just("url".to_owned()),
        Just("env".to_owned()),
        Just("headers".to_owned()),
        Just("args".to_owned()),
        Just("allow".to_owned()),
        Just("timeout".to_owned()),
        Just("concurrency".to_owned()),
        Just("isolation".to_owned()),
        "[a-zé _-]{0,6}",
    ];
    leaf.prop_recursive(4, 40, 5, move |inner| {
        prop_oneof![
            proptest::collection::vec((key.clone(), inner.clone()), 0..5).prop_map(|pairs| {
                let pairs = pairs.iter().map(|(key, value)| format!("\"{key}\": {value}"));
                format!("{{{}}}", Vec::from_iter(pairs).join(",\n"))
            }),
            proptest::collection::vec(inner, 0..4).prop_map(|items| format!("[{}]", items.join(", "))),
        ]
    })
}

proptest! {
    #[test]
    fn never_panics_on_any_text(text in "\\PC{0,60}|[{}\\[\\]\",:a-z0-9é\\n/*\\\\-]{0,60}") {
        let _ = parse(Path::new("f"), &text);
    }

    #[test]
    fn never_panics_on_almost_a_config(text in almost_a_config()) {
        let text = format!("{{\"mcpServers\": {{\"x\": {text}, \"y\": {text}}}}}");
        if let Err(error) = parse(Path::new("f"), &text) {
            prop_assert!(!error.problems.is_empty());
            prop_assert!(error.problems.iter().all(|problem| !problem.text.is_empty()));
        }
    }
}
