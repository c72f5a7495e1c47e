//! The daemon, as the kernel sees it.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use tempfile::TempDir;

/// A running daemon; dropping it kills it.
pub(crate) struct Daemon {
    child: Child,
    pub(crate) port: u16,
    _stdout: BufReader<std::process::ChildStdout>,
    _home: TempDir,
}

impl Daemon {
    /// In front of servers on these ports, and of children that are this program again.
    pub(crate) async fn start(gateway: &Path, ports: &[(&str, u16)], children: &[&str]) -> Result<Daemon> {
        let home = tempfile::tempdir()?;
        let program = std::env::current_exe()?;
        let mut servers = serde_json::Map::new();
        for (name, port) in ports {
            let url = format!("http://127.0.0.1:{port}/mcp");
            servers.insert((*name).to_owned(), json!({ "url": url, "concurrency": 10_000 }));
        }
        for (name, era) in children.iter().zip(["legacy", "modern"].into_iter().cycle()) {
            let args = ["child", era];
            let server = json!({ "command": program, "args": args, "concurrency": 10_000 });
            servers.insert((*name).to_owned(), server);
        }
        let config = home.path().join("config.json");
        fs::write(&config, json!({ "mcpServers": servers }).to_string())?;
        let mut child = Command::new(gateway)
            .args(["serve", "--listen", "127.0.0.1:0", "--config"])
            .arg(&config)
            .arg("--data-dir")
            .arg(home.path().join("data"))
            // Memory that one thread has freed is kept for it alone, unless there is one arena for all: the threads
            // would take some rounds to have all they ever need, and a small leak would not be seen.
            .env("MALLOC_ARENA_MAX", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start the daemon")?;
        let mut stdout = BufReader::new(child.stdout.take().context("it is piped")?);
        let mut greeting = String::new();
        while !greeting.contains("Ctrl-C") {
            ensure!(stdout.read_line(&mut greeting)? > 0, "the daemon ended: {greeting}");
        }
        let address = greeting.split_once("127.0.0.1:").and_then(|(_, rest)| rest.split_once("/mcp"));
        let port = address.context("it does not say where it listens")?.0.parse()?;
        let daemon = Daemon { child, port, _stdout: stdout, _home: home };
        let names: Vec<&str> = ports.iter().map(|(name, _)| *name).chain(children.iter().copied()).collect();
        crate::client::wait_for(port, &names).await?;
        Ok(daemon)
    }

    /// How many are open.
    pub(crate) fn descriptors(&self) -> Result<usize> {
        Ok(fs::read_dir(format!("/proc/{}/fd", self.child.id())).context("the daemon is gone")?.count())
    }

    /// Its children, dead ones too.
    pub(crate) fn children(&self) -> Result<Vec<u32>> {
        let mut children = Vec::new();
        for entry in fs::read_dir("/proc")?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
            let parent =
                stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse().ok());
            if parent == Some(self.child.id()) {
                children.push(pid);
            }
        }
        children.sort_unstable();
        Ok(children)
    }

    /// A line of its status, in bytes.
    pub(crate) fn memory(&self, line: &str) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let value = status.lines().find_map(|l| l.strip_prefix(line)).context("the kernel does not say")?;
        Ok(value.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Both fail only when it is gone already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
