//! The command line over the real binary: with and without a daemon, and when something goes wrong.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    sync::Arc,
    thread,
    time::Duration,
};

use portcullis::{
    registry::{RedbBackend, Registry, ServerRecord},
    upstream::{Transport, UpstreamSpec},
};
use serde_json::Value;

use crate::support::{Daemon, Home, Outcome, bare_command};

/// Nobody listens there.
const NOBODY: &str = "http://127.0.0.1:9/mcp";

// === with and without a daemon ===

#[test]
fn servers_are_added_and_taken_away_without_a_daemon() {
    servers_are_added_and_taken_away(&Home::new(), "not-running");
}

#[test]
fn servers_are_added_and_taken_away_through_a_daemon() {
    let home = Home::new();
    let _daemon = home.serve(&[]);
    servers_are_added_and_taken_away(&home, "down");
}

fn servers_are_added_and_taken_away(home: &Home, status: &str) {
    assert!(home.ok(&["list"]).starts_with("No servers yet."));
    let added =
        home.ok(&["add", "docs", NOBODY, "--header", "Authorization: Bearer s3cret", "--deny", "rm*"]);
    assert!(added.starts_with("added `docs`"), "{added}");
    home.ok(&[
        "add",
        "git",
        "--env",
        "TOKEN=s3cret",
        "--timeout",
        "5s",
        "--isolation",
        "session",
        "--",
        "sh",
        "-c",
        "exit 1",
    ]);

    let list = home.json(&["list"]);
    assert_eq!(list[0]["name"], "docs");
    assert_eq!(list[0]["status"], status);
    assert_eq!(list[0]["headers"][0], "Authorization");
    assert_eq!(list[0]["deny"][0], "rm*");
    assert_eq!((&list[1]["env"][0], &list[1]["timeout_ms"]), (&"TOKEN".into(), &5000.into()));
    assert_eq!((&list[0]["isolation"], &list[1]["isolation"]), (&"shared".into(), &"session".into()));
    let shown = home.ok(&["list"]);
    assert!(shown.contains("(env TOKEN)  (one for each session)"), "{shown}");
    assert!(shown.contains("NAME") && shown.contains("deny rm*"), "{shown}");
    assert!(!shown.contains("s3cret") && !list.to_string().contains("s3cret"), "{shown}");

    assert_eq!(
        home.fails(1, &["add", "docs", NOBODY]),
        "error: server `docs` exists already: change it with --replace, or take it away with `portcullis remove \
         docs`"
    );
    assert!(home.ok(&["add", "docs", "--replace", NOBODY]).starts_with("replaced `docs`"));
    assert_eq!(home.ok(&["disable", "git"]), "disabled `git`\n");
    assert_eq!(home.ok(&["disable", "git"]), "`git` was so already\n");
    assert_eq!(home.json(&["list"])[1]["status"], "disabled");
    assert!(home.ok(&["enable", "git"]).starts_with("enabled `git`"));
    assert_eq!(home.ok(&["remove", "git"]), "removed `git`\n");
    assert_eq!(home.names(), ["docs"]);
    assert_eq!(home.fails(1, &["remove", "dosc"]), "error: there is no server `dosc`: did you mean `docs`?");
}

#[test]
fn what_a_daemon_was_told_outlives_it() {
    let home = Home::new();
    let daemon = home.serve(&[]);
    home.ok(&["add", "docs", NOBODY]);
    assert_eq!(daemon.end("-TERM"), Some(0));
    assert!(!home.data_dir().join("control.sock").exists());
    assert_eq!(home.names(), ["docs"]);
    let daemon = home.serve(&[]);
    assert!(daemon.greeting.contains("1 server behind it: docs"), "{}", daemon.greeting);
    assert_eq!(daemon.end("-INT"), Some(0));
}

// === tools ===

#[test]
fn the_demonstration_works_from_end_to_end() {
    let home = Home::new();
    let daemon = home.serve(&["--demo"]);
    assert!(daemon.greeting.contains("2 servers behind it: clock, notes"), "{}", daemon.greeting);
    assert!(daemon.greeting.contains("connect") && daemon.greeting.contains("call clock_now"));

    let tools = home.ok(&["tools"]);
    assert!(tools.contains("clock_add_days") && tools.contains("notes_search"), "{tools}");
    let definitions = home.json(&["tools"]);
    assert_eq!(definitions[0]["name"], "clock_now");
    assert!(definitions[0]["inputSchema"].is_object());

    assert_eq!(home.ok(&["call", "clock_add_days", "date=2024-02-28", "days=2"]), "Friday, 2024-03-01\n");
    assert_eq!(home.ok(&["call", "notes_add", r#"{"text": "buy milk"}"#]), "kept as note 1\n");
    // The schema says that it is a text.
    home.ok(&["call", "notes_add", "text=12"]);
    let found = home.json(&["call", "notes_search", "query=milk"]);
    assert_eq!(found["structuredContent"]["notes"][0]["text"], "buy milk");
    assert_eq!(home.json(&["list"])[1]["tools"], 3);
    assert_eq!(home.ok(&["refresh", "notes"]), "refreshed `notes`: 3 tools\n");

    daemon.kill();
    assert!(home.names().is_empty(), "the demonstration is gone when it ends");
}

#[test]
fn a_tool_that_fails_says_so_on_stderr() {
    let home = Home::new();
    let _daemon = home.serve(&["--demo"]);
    let outcome = home.run(&["call", "clock_add_days", "days=many"]);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(1), ""));
    assert_eq!(outcome.stderr, "error: `clock_add_days` failed: `days` is missing, or no whole number\n");
    let outcome = home.run(&["call", "clock_add_days", "--json"]);
    assert_eq!(outcome.code, Some(1));
    assert_eq!(serde_json::from_str::<Value>(&outcome.stdout).unwrap()["isError"], true);
    assert_eq!(
        home.fails(1, &["call", "clock_nwo"]),
        "error: there is no tool `clock_nwo`: did you mean `clock_now`?"
    );
    assert_eq!(
        home.fails(1, &["call", "weather"]),
        "error: there is no tool `weather`: `portcullis tools` shows those there are"
    );
}

#[test]
fn without_a_daemon_tools_are_called_in_process_and_rules_hold() {
    let home = Home::new();
    {
        let registry = Registry::open(Arc::new(RedbBackend::open(home.data_dir()).unwrap())).unwrap();
        let spec = UpstreamSpec::new(Transport::Builtin { kind: "clock".to_owned() });
        let mut clock = ServerRecord::new("clock".parse().unwrap(), spec);
        clock.rules.deny = vec!["add_*".to_owned()];
        registry.create_server(clock).unwrap();
    }
    home.ok(&["add", "dead", NOBODY]);

    let tools = home.run(&["tools", "--wait", "5"]);
    assert!(tools.stdout.contains("clock_now") && !tools.stdout.contains("add_days"), "{}", tools.stdout);
    assert!(tools.stderr.contains("note: server `dead` is down"), "{}", tools.stderr);
    assert!(home.ok(&["call", "clock_now"]).ends_with("Z\n"));
    let said = home.fails(1, &["call", "clock_add_days", "days=1"]);
    assert!(said.contains("error: there is no tool `clock_add_days`"), "{said}");
    // Known from the last time.
    assert_eq!(home.json(&["list"])[0]["tools"], 1);
}

#[test]
fn tools_keep_their_names_when_the_daemon_is_gone() {
    let home = Home::new();
    let daemon = home.serve(&["--demo", "--naming", "bare"]);
    assert_eq!(home.json(&["tools"])[0]["name"], "now");
    drop(daemon);
    let registry = Registry::open(Arc::new(RedbBackend::open(home.data_dir()).unwrap())).unwrap();
    assert_eq!(registry.setting("naming.mode").unwrap().as_deref(), Some("bare"));
}

#[test]
fn a_demonstration_without_a_directory_keeps_nothing_and_is_reached_all_the_same() {
    let home = tempfile::tempdir().unwrap();
    let run = |args: &[&str]| Outcome::of(bare_command(home.path(), args).output().unwrap());
    let serve = ["serve", "--demo", "--listen", "127.0.0.1:0"];
    let daemon = Daemon::start(bare_command(home.path(), &serve));
    assert!(daemon.greeting.contains("nothing is kept"), "{}", daemon.greeting);
    assert_eq!(run(&["call", "notes_add", "text=hello"]).stdout, "kept as note 1\n");
    let added = run(&["add", "docs", NOBODY]);
    assert_eq!(added.code, Some(0));
    assert!(added.stderr.contains("nothing is kept when it ends"), "{}", added.stderr);

    // Another demonstration leaves the first in peace.
    let second = Daemon::start(bare_command(home.path(), &serve));
    assert!(second.greeting.contains("Commands act on another gateway"), "{}", second.greeting);
    drop(second);
    assert!(run(&["list"]).stdout.contains("docs"));

    assert_eq!(daemon.end("-INT"), Some(0));
    assert!(run(&["list"]).stdout.starts_with("No servers yet."));
}

// === the config file ===

#[test]
fn the_config_file_says_what_is_served() {
    let home = Home::new();
    home.ok(&["add", "files", NOBODY]);
    let file = home.write(
        "mcp.json",
        r#"{ "mcpServers": { "files": { "command": "sh" }, "web": { "url": "http://127.0.0.1:9/" } } }"#,
    );
    let daemon = home.serve(&["--config", file.to_str().unwrap()]);
    let list = home.json(&["list"]);
    assert_eq!(home.names(), ["files", "web"]);
    assert_eq!((&list[0]["origin"], &list[0]["transport"]), (&"file".into(), &"stdio".into()));
    let removed = home.run(&["remove", "web"]);
    assert!(removed.stderr.contains("`web` is the config file's"), "{}", removed.stderr);
    drop(daemon);

    home.write("mcp.json", "{}");
    let _daemon = home.serve(&["--config", file.to_str().unwrap()]);
    assert_eq!(home.json(&["list"])[0]["transport"], "http", "what was added by hand is back");
}

#[test]
fn a_name_in_the_file_and_by_hand_is_warned_of() {
    let home = Home::new();
    home.ok(&["add", "web", NOBODY]);
    let file = home.write("mcp.json", r#"{ "mcpServers": { "web": { "url": "http://127.0.0.1:9/" } } }"#);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    // An address that is taken is noticed before anything is written.
    let said = home.fails(1, &["serve", "--listen", &address, "--config", file.to_str().unwrap()]);
    assert!(said.contains(&format!("cannot listen on {address}")), "{said}");
    assert_eq!(home.json(&["list"])[0]["origin"], "cli");
}

#[test]
fn a_bad_config_file_says_everything_and_changes_nothing() {
    let home = Home::new();
    let text = "{\n  \"listn\": \"x\",\n  \"mcpServers\": { \"a b\": { \"url\": \"ftp://x\" } }\n}";
    let file = home.write("mcp.json", text);
    let file = file.to_str().unwrap();
    let said = home.fails(2, &["serve", "--config", file]);
    assert_eq!(said.lines().count(), 3, "{said}");
    assert!(said.starts_with(&format!("error: {file}:2:3: listn: unknown key, did you mean `listen`?")));
    assert!(said.lines().all(|line| line.starts_with("error: ")), "{said}");
    assert!(!home.data_dir().exists());
    let said = home.fails(2, &["serve", "--config", "/nowhere.json"]);
    assert_eq!(said, "error: /nowhere.json: cannot be read: No such file or directory (os error 2)");
}

// === one daemon to a directory ===

#[test]
fn a_second_daemon_is_told_of_the_first() {
    let home = Home::new();
    let first = home.serve(&[]);
    let said = home.fails(1, &["serve", "--listen", "127.0.0.1:0"]);
    let (pid, listen) = (first.pid(), first.listen);
    let dir = home.data_dir();
    assert_eq!(
        said,
        format!(
            "error: another portcullis (process {pid}, listening on {listen}) already serves the data directory \
             {}: stop it, or choose another directory with --data-dir",
            dir.display()
        )
    );
    assert!(home.ok(&["list"]).starts_with("No servers"), "the first goes on");
}

#[test]
fn nothing_acknowledged_is_lost_when_the_daemon_is_killed() {
    let home = Home::new();
    let mut acknowledged = Vec::new();
    for round in 0..3 {
        let daemon = home.serve(&[]);
        let adder = thread::scope(|scope| {
            let adder = scope.spawn(|| {
                let mut added = Vec::new();
                for n in 0..8 {
                    let name = format!("s{round}-{n}");
                    // One without a command, so that nothing waits for it.
                    let outcome = home.run(&["add", &name, "http://127.0.0.1:9/"]);
                    match outcome.code {
                        Some(0) => added.push(name),
                        _ => assert!(outcome.stderr.starts_with("error: "), "{}", outcome.stderr),
                    }
                }
                added
            });
            thread::sleep(Duration::from_millis(60 + 70 * round));
            daemon.kill();
            adder.join().unwrap()
        });
        assert!(!adder.is_empty());
        acknowledged.extend(adder);
        // The socket stayed behind, and is in nobody's way.
        assert!(home.data_dir().join("control.sock").exists());
        let names = home.names();
        assert!(acknowledged.iter().all(|name| names.contains(name)), "{acknowledged:?} {names:?}");
    }
    let _daemon = home.serve(&[]);
    let names = home.names();
    assert!(acknowledged.iter().all(|name| names.contains(name)), "{acknowledged:?} {names:?}");
}

#[test]
fn commands_that_meet_wait_for_each_other() {
    let home = Home::new();
    let _daemon = thread::scope(|scope| {
        for n in 0..6 {
            let home = &home;
            scope.spawn(move || home.ok(&["add", &format!("s{n}"), NOBODY]));
        }
        scope.spawn(|| home.serve(&[])).join().unwrap()
    });
    assert_eq!(home.names().len(), 6);
}

#[test]
fn no_child_outlives_whoever_started_it() {
    let home = Home::new();
    let pid_file = home.write("pid", "");
    let script = format!("echo $$ > {}; while read -r line; do :; done", pid_file.display());
    let child = || {
        let pid = || fs::read_to_string(&pid_file).unwrap().trim().to_owned();
        assert!(eventually(|| !pid().is_empty()), "the child starts");
        Path::new("/proc").join(pid())
    };
    let forget = || fs::write(&pid_file, "").unwrap();
    home.ok(&["add", "mute", "--", "sh", "-c", &script]);

    home.ok(&["tools", "--wait", "0.5"]);
    assert!(eventually(|| !child().exists()), "a command ends its children");
    forget();
    let daemon = home.serve(&[]);
    let running = child();
    assert!(running.exists());
    assert_eq!(daemon.end("-TERM"), Some(0));
    assert!(!running.exists(), "a daemon ends its children before it ends");
    forget();
    let daemon = home.serve(&[]);
    let running = child();
    daemon.kill();
    assert!(eventually(|| !running.exists()), "a killed daemon's children end too");
}

fn eventually(happens: impl Fn() -> bool) -> bool {
    let tries = std::iter::repeat_with(|| thread::sleep(Duration::from_millis(20)));
    tries.take(250).any(|()| happens())
}

#[test]
fn the_data_is_nobody_elses() {
    let home = Home::new();
    let _daemon = home.serve(&[]);
    home.ok(&["add", "docs", NOBODY]);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&home.data_dir()), 0o700);
    let files = fs::read_dir(home.data_dir()).unwrap().map(|entry| entry.unwrap().path());
    let files = Vec::from_iter(files);
    assert!(files.iter().any(|path| path.ends_with("control.sock")));
    for path in files {
        assert_eq!(mode(&path), 0o600, "{}", path.display());
    }
}

#[test]
fn a_path_too_long_for_a_socket_is_said_to_be() {
    let home = Home::new();
    let dir = home.data_dir().join("x".repeat(120));
    let dir = dir.to_str().unwrap();
    let said = home.fails(1, &["serve", "--listen", "127.0.0.1:0", "--data-dir", dir]);
    assert!(said.contains("choose a shorter data directory with --data-dir"), "{said}");
    // Without a daemon nothing needs a socket.
    home.ok(&["list", "--data-dir", dir]);
}

// === bad input ===

#[test]
fn bad_input_gets_one_clear_sentence() {
    let home = Home::new();
    let add = |rest: &[&str]| home.fails(2, &[&["add", "x"], rest].concat());
    let cases = [
        (
            home.fails(2, &["add", "a b", NOBODY]),
            "\"a b\" is not a server name: use letters, digits and `-`, starting with a letter or digit, at most \
             64; \"a-b\" would do",
        ),
        (add(&["ftp://h/"]), "the URL must start with `http://` or `https://`"),
        (add(&["http://me:pw@h/"]), "the URL must not hold a user name or password: send them in `headers`"),
        (
            add(&["npx"]),
            "\"npx\" is not a URL, which starts with http:// or https://: to add a program, write `portcullis \
             add x -- npx ARGS..`",
        ),
        (add(&[]), "say what `x` is: `portcullis add x URL`, or `portcullis add x -- COMMAND ARGS..`"),
        (add(&[NOBODY, "--", "sh"]), "a server is either at a URL or a program after `--`, not both"),
        (
            add(&[NOBODY, "--allow", "["]),
            "--allow: \"[\" is not a glob: unclosed character class; missing ']'",
        ),
        (
            add(&[NOBODY, "--header", "s3cret"]),
            "--header: it is not of the form `NAME: VALUE`: there is no `:`",
        ),
        (add(&[NOBODY, "--header", "a b: c"]), "--header [\"a b\"]: \"a b\" is not a header name"),
        (add(&[NOBODY, "--header", "A: 1", "--header", "A: 2"]), "--header: `A` is given twice"),
        (
            add(&[NOBODY, "--header", "A: ${x"]),
            "--header A: a `${` has no `}`: write `$${` for the characters themselves",
        ),
        (add(&["--env", "s3cret", "--", "sh"]), "--env: it is not of the form `NAME=VALUE`: there is no `=`"),
        (add(&[NOBODY, "--env", "A=1"]), "--env: does not go with `url`"),
        (
            add(&[NOBODY, "--transport", "smtp"]),
            "--transport: \"smtp\" is not a type: use \"http\", \"sse\" or \"stdio\"",
        ),
        (add(&[NOBODY, "--transport", "stdio"]), "--transport: \"stdio\" does not go with `url`"),
        (
            add(&[NOBODY, "--isolation", "session"]),
            "--isolation: does not go with `url`: such a server tells its sessions apart by itself",
        ),
        (
            add(&["--isolation", "client", "--", "sh"]),
            "--isolation: \"client\" is not an isolation: use \"shared\" or \"session\"",
        ),
        (
            add(&[NOBODY, "--timeout", "soon"]),
            "--timeout: \"soon\" is not a time: use seconds, or a string such as \"500ms\", \"5s\" or \"2m\"",
        ),
        (home.fails(2, &["call", "t", "x"]), "\"x\" is neither a JSON object nor NAME=VALUE"),
        (
            home.fails(2, &["call", "t", "{x"]),
            "the arguments are not one JSON object: key must be a string at line 1 column 2",
        ),
        (home.fails(1, &["remove", "x"]), "there is no server `x`: `portcullis list` shows those there are"),
        (
            home.fails(2, &["remove", "x y"]),
            "\"x y\" is not a server name: use letters, digits and `-`, starting with a letter or digit, at most 64",
        ),
    ];
    for (said, expected) in cases {
        assert_eq!(said, format!("error: {expected}"));
    }
    assert!(home.names().is_empty());
}

#[test]
fn a_program_that_is_not_there_is_a_warning() {
    let home = Home::new();
    let outcome = home.run(&["add", "x", "--", "no-such-program"]);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(0), "added `x`\n"));
    assert_eq!(
        outcome.stderr,
        "warning: there is no program `no-such-program` now: `x` stays down until there is\n"
    );
}

#[test]
fn a_directory_that_cannot_be_used_is_named() {
    let home = Home::new();
    let file = home.write("file", "");
    let said = home.fails(1, &["list", "--data-dir", file.to_str().unwrap()]);
    assert!(said.starts_with(&format!("error: cannot use {}", file.display())), "{said}");
    let said = home.fails(1, &["list", "--data-dir", "/tmp"]);
    assert_eq!(
        said,
        "error: /tmp is shared by all users of this machine: choose a directory of its own with --data-dir"
    );
}

#[test]
fn a_bad_log_filter_is_refused() {
    let home = Home::new();
    let output = home.command(&["list"]).env("PORTCULLIS_LOG", "=x=").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).starts_with("error: PORTCULLIS_LOG is not a filter"));
}

// === connect, help, health ===

#[test]
fn connect_prints_the_address_of_the_daemon_that_runs() {
    let home = Home::new();
    let outcome = home.run(&["connect"]);
    assert!(outcome.stdout.contains("claude mcp add --transport http portcullis http://127.0.0.1:8000/mcp"));
    assert!(outcome.stderr.starts_with("note: no gateway runs now"), "{}", outcome.stderr);

    let daemon = home.serve(&[]);
    let url = format!("http://{}/mcp", daemon.listen);
    let line = |client| home.ok(&["connect", "--client", client]);
    assert_eq!(line("claude-code"), format!("claude mcp add --transport http portcullis {url}\n"));
    let parsed = |client| serde_json::from_str::<Value>(&line(client)).unwrap();
    assert_eq!(parsed("cursor")["mcpServers"]["portcullis"]["url"], url.as_str());
    assert_eq!(parsed("mcp-json")["mcpServers"]["portcullis"]["type"], "http");
    let vscode = line("vscode");
    let server = vscode.strip_prefix("code --add-mcp '").and_then(|s| s.strip_suffix("'\n")).unwrap();
    assert_eq!(serde_json::from_str::<Value>(server).unwrap()["url"], url.as_str());
}

#[test]
fn health_is_answered() {
    let home = Home::new();
    let daemon = home.serve(&[]);
    let mut stream = TcpStream::connect(daemon.listen).unwrap();
    let host = daemon.listen;
    write!(stream, "GET /healthz HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("ok"), "{answer}");
}

/// The help is what people read first: a change of it is looked at. `PORTCULLIS_BLESS=1` writes it anew.
#[test]
fn the_help_is_as_it_was_agreed() {
    let home = Home::new();
    let mut help = home.ok(&["--help"]);
    for command in [
        "serve", "stdio", "add", "remove", "enable", "disable", "list", "tools", "call", "refresh", "connect",
    ] {
        help += &format!("\n=== {command}\n\n{}", home.ok(&[command, "--help"]));
    }
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/golden/help.txt");
    if std::env::var_os("PORTCULLIS_BLESS").is_some() {
        fs::write(&golden, &help).unwrap();
    }
    assert_eq!(help, fs::read_to_string(golden).unwrap_or_default());
}
