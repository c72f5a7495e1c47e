//! A daemon with one server that is well and one that is not, and how it is watched.
//!
//! The faulty server is called `bad`, and is added when the daemon has settled. So "nothing is left" can be exact:
//! once `bad` is removed, the daemon has the descriptors and the processes it had before.

use std::{
    fs,
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio::time::timeout;

use crate::{
    stage::{Answer, Legacy, Modern, PATIENCE, Upstream, eventually},
    support::{Daemon, Home},
};

/// How long `bad` may take, by its record.
pub(super) const TIMEOUT: Duration = Duration::from_secs(2);
/// How long a busy machine may take on top of that.
const SLACK: Duration = Duration::from_secs(15);
/// How long the healthy upstream may take on a busy machine while another one fails.
const SOON: Duration = Duration::from_secs(5);
/// How much memory all faults of a story may cost together, in KiB: what one leaves behind counts for the next.
const GROWTH: u64 = 32 * 1024;
/// What must never be seen by a client. The first is in every header, variable, path and body of `bad`.
const INTERNALS: [&str; 6] = ["hunter2", "127.0.0.1", "os error", "line 1 column", "/tmp", "panicked"];

/// A running daemon.
pub(super) struct House {
    home: Home,
    daemon: Daemon,
    _good: Upstream,
    /// What it had when it had settled: descriptors, and memory in KiB.
    descriptors: usize,
    resident: u64,
}

impl House {
    pub(super) async fn new() -> House {
        let good = Upstream::modern().tool("t").answers(r#"{"content":[{"type":"text","text":"well"}]}"#);
        let good = good.start().await;
        let home = Home::new();
        // One lane, so that a warmed-up pool of connections stays as it is.
        let daemon = home.serve(&["--lanes", "1"]);
        home.ok(&["add", "good", &good.url()]);
        let mut house = House { home, daemon, _good: good, descriptors: 0, resident: 0 };
        house.lists("good_t").await;
        for _ in 0..3 {
            house.good().await;
            let legacy = house.legacy().await;
            assert_eq!(legacy.call("good_t", json!({})).await.content(), "well");
            legacy.end().await;
        }
        house.descriptors = house.settled_descriptors().await;
        house.resident = house.memory("VmRSS:");
        house
    }

    /// Adds an upstream over HTTP as `bad`.
    pub(super) async fn add(&self, upstream: &Upstream) {
        self.add_at(&upstream.url());
        self.lists("bad_t").await;
    }

    pub(super) fn add_at(&self, url: &str) {
        self.add_within(url, "2s");
    }

    pub(super) fn add_within(&self, url: &str, timeout: &str) {
        let header = "Authorization: Bearer hunter2";
        self.home.ok(&["add", "bad", url, "--timeout", timeout, "--header", header]);
    }

    /// Adds a program as `bad`.
    pub(super) fn add_program(&self, program: &[&str]) {
        self.add_program_within("2s", program);
    }

    pub(super) fn add_program_within(&self, timeout: &str, program: &[&str]) {
        // The shell's references are not the gateway's.
        let program: Vec<String> = program.iter().map(|arg| arg.replace("${", "$${")).collect();
        let mut args = vec!["add", "bad", "--timeout", timeout, "--env", "SECRET=hunter2", "--"];
        args.extend(program.iter().map(String::as_str));
        self.home.ok(&args);
    }

    /// Waits until clients see this tool.
    pub(super) async fn lists(&self, tool: &str) {
        let client = self.modern();
        eventually(tool, async || client.tools().await.iter().any(|name| name == tool)).await;
    }

    pub(super) fn modern(&self) -> Modern {
        Modern::of(self.daemon.listen)
    }

    pub(super) async fn legacy(&self) -> Legacy {
        self.legacy_with(json!({})).await
    }

    pub(super) async fn legacy_with(&self, capabilities: Value) -> Legacy {
        Legacy::open(self.daemon.listen, capabilities).await
    }

    pub(super) fn address(&self) -> std::net::SocketAddr {
        self.daemon.listen
    }

    /// A file beside the daemon's data.
    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.home.write(name, "")
    }

    /// The healthy upstream answers, and soon.
    pub(super) async fn good(&self) {
        let answer = timeout(SOON, self.modern().call("good_t", json!({}))).await;
        assert_eq!(answer.expect("the healthy upstream answers in time").content(), "well");
    }

    /// Runs a fault to its end: in bounded time and memory, and with the healthy upstream answering all the while.
    pub(super) async fn during<T>(&self, what: &str, fault: impl Future<Output = T>) -> T {
        self.during_at_most(TIMEOUT, what, fault).await
    }

    pub(super) async fn during_at_most<T>(
        &self,
        limit: Duration,
        what: &str,
        fault: impl Future<Output = T>,
    ) -> T {
        let (began, answers) = (Instant::now(), AtomicUsize::new(0));
        let healthy = async {
            loop {
                self.good().await;
                answers.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let outcome = tokio::select! {
            outcome = timeout(limit + SLACK, fault) => outcome,
            () = healthy => unreachable!("it goes on for ever"),
        };
        let took = began.elapsed();
        let outcome = outcome.unwrap_or_else(|_| panic!("{what}: no end within {took:?}"));
        let answers = answers.load(Ordering::Relaxed);
        assert!(answers > 0 || took < Duration::from_secs(1), "{what}: the others waited {took:?}");
        self.good().await;
        let growth = self.memory("VmHWM:").saturating_sub(self.resident);
        println!("{what}: {took:?}, {growth} KiB, {answers} healthy answers meanwhile");
        assert!(growth <= GROWTH, "{what}: {growth} KiB more than before");
        outcome
    }

    /// A call of either era's client ends in this one clean error.
    pub(super) async fn fails(&self, what: &str, code: &str) {
        let (modern, legacy) = (self.modern(), self.legacy().await);
        let calls = (modern.call("bad_t", json!({})), legacy.call("bad_t", json!({})));
        let answers = match code {
            // Whoever waits may wait together; what costs memory is measured alone.
            "timed_out" => self.during(what, async { tokio::join!(calls.0, calls.1) }).await,
            _ => (self.during(what, calls.0).await, self.during(what, calls.1).await),
        };
        clean(what, &answers.0, code);
        clean(what, &answers.1, code);
        legacy.end().await;
    }

    /// Takes `bad` away. Then the daemon is as it was before.
    pub(super) async fn remove(&self, what: &str) {
        self.home.ok(&["remove", "bad"]);
        let patience = Instant::now() + PATIENCE;
        loop {
            let (family, descriptors) = (self.family(), self.descriptors());
            if family.is_empty() && descriptors.len() <= self.descriptors {
                break;
            }
            assert!(
                Instant::now() < patience,
                "{what}: left behind: {family:?}, {descriptors:?} where {} were",
                self.descriptors
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.good().await;
    }

    /// The daemon's children, dead or alive, and every process that came of them: all have its environment.
    pub(super) fn family(&self) -> Vec<String> {
        let daemon = self.daemon.pid();
        let mut family = living(&self.mark(), daemon);
        let children = pids().filter_map(stat).filter(|(_, state, parent)| *parent == daemon && state == "Z");
        family.extend(children.map(|(name, ..)| format!("{name}, a zombie")));
        family
    }

    /// What is in the environment of the daemon and of everything that comes of it.
    pub(super) fn mark(&self) -> String {
        self.home.data_dir().to_str().expect("a readable path").to_owned()
    }

    /// Everything but the daemon goes, its data included.
    pub(super) fn into_daemon(self) -> Daemon {
        self.daemon
    }

    fn descriptors(&self) -> Vec<String> {
        let open =
            fs::read_dir(format!("/proc/{}/fd", self.daemon.pid())).expect("the daemon runs").flatten();
        let mut open: Vec<String> = open
            .map(|fd| fs::read_link(fd.path()).map(|to| to.display().to_string()).unwrap_or_default())
            .collect();
        open.sort();
        open
    }

    /// How many there are when the last clients have been seen to go.
    async fn settled_descriptors(&self) -> usize {
        let (mut count, mut same) = (self.descriptors().len(), 0);
        eventually("the descriptors settle", async || {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let now = self.descriptors().len();
            same = if now == count { same + 1 } else { 0 };
            count = now;
            same > 10
        })
        .await;
        count
    }

    /// One line of the daemon's status, in KiB.
    pub(super) fn memory(&self, line: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.daemon.pid())).expect("it runs");
        let value = status.lines().find_map(|l| l.strip_prefix(line)).expect("the kernel says so");
        value.trim().trim_end_matches(" kB").parse().expect("a number")
    }
}

/// The living processes with this in their environment, except one.
pub(super) fn living(mark: &str, except: u32) -> Vec<String> {
    let is_marked = |pid: &u32| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        *pid != except && memchr::memmem::find(&environment, mark.as_bytes()).is_some()
    };
    let living = pids().filter(is_marked).filter_map(stat).filter(|(_, state, _)| state != "Z");
    living.map(|(name, ..)| name).collect()
}

fn pids() -> impl Iterator<Item = u32> {
    fs::read_dir("/proc")
        .expect("proc")
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Name, state and parent.
fn stat(pid: u32) -> Option<(String, String, u32)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (name, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    Some((name.to_owned(), fields.next()?.to_owned(), fields.next()?.parse().ok()?))
}

/// One message, an error the model can read, and no word of what happened inside.
pub(super) fn clean(what: &str, answer: &Answer, code: &str) {
    assert_eq!(answer.status, 200, "{what}: {answer}");
    let messages = answer.messages();
    let last: Value = serde_json::from_slice(messages.last().expect("an answer")).expect("JSON");
    let result = &last["result"];
    assert_eq!(result["isError"], true, "{what}: {last}");
    assert_eq!(result["structuredContent"]["code"], code, "{what}: {last}");
    let text = result["content"][0]["text"].as_str().expect("text");
    assert!(text.contains("`bad`") || code == "timed_out", "{what}: {text}");
    let ends = messages.iter().filter(|message| memchr::memmem::find(message, b"\"method\"").is_none());
    assert_eq!(ends.count(), 1, "{what}: {answer}");
    tells_nothing(what, &last.to_string());
}

/// Nothing of the inside.
pub(super) fn tells_nothing(what: &str, text: &str) {
    for internal in INTERNALS {
        assert!(!text.contains(internal), "{what} tells {internal}: {text}");
    }
}
