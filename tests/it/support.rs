//! The binary, run on a data directory of its own.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;
use tempfile::TempDir;

/// A home with nothing in it yet.
pub(crate) struct Home {
    dir: TempDir,
}

/// A gateway that runs. It is killed when this is dropped.
pub(crate) struct Daemon {
    child: Child,
    /// Where it listens.
    pub(crate) listen: SocketAddr,
    /// What it printed first.
    pub(crate) greeting: String,
    _stdout: BufReader<std::process::ChildStdout>,
}

/// What a command came to.
pub(crate) struct Outcome {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Home {
    pub(crate) fn new() -> Self {
        Home { dir: tempfile::tempdir().expect("a directory") }
    }

    /// The data directory, which the first command makes.
    pub(crate) fn data_dir(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// A file beside the data.
    pub(crate) fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, text).expect("a file");
        path
    }

    /// The binary, on this home and with nothing else of the environment but `PATH`.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = bare_command(self.dir.path(), args);
        command.env("PORTCULLIS_DATA_DIR", self.data_dir());
        command
    }

    /// Runs a command to its end.
    pub(crate) fn run(&self, args: &[&str]) -> Outcome {
        Outcome::of(self.command(args).output().expect("the binary runs"))
    }

    /// Runs a command that must succeed; gives what it printed.
    pub(crate) fn ok(&self, args: &[&str]) -> String {
        let outcome = self.run(args);
        assert_eq!(outcome.code, Some(0), "{args:?}: {}", outcome.stderr);
        outcome.stdout
    }

    /// Runs a command that must fail with `code`; gives the line on stderr.
    pub(crate) fn fails(&self, code: i32, args: &[&str]) -> String {
        let outcome = self.run(args);
        assert_eq!(outcome.code, Some(code), "{args:?}: {}{}", outcome.stdout, outcome.stderr);
        outcome.stderr.trim_end().to_owned()
    }

    /// Runs a command with `--json`; gives what it printed.
    pub(crate) fn json(&self, args: &[&str]) -> Value {
        let stdout = self.ok(&[args, &["--json"]].concat());
        serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{args:?}: {error}: {stdout}"))
    }

    /// The names that `list` shows.
    pub(crate) fn names(&self) -> Vec<String> {
        let list = self.json(&["list"]);
        let names = list.as_array().expect("a list").iter();
        names.map(|server| server["name"].as_str().expect("a name").to_owned()).collect()
    }

    /// Starts `serve` with these arguments, on a free port.
    pub(crate) fn serve(&self, args: &[&str]) -> Daemon {
        Daemon::start(self.command(&[&["serve", "--listen", "127.0.0.1:0"], args].concat()))
    }
}

/// The binary, with `home` as its home directory and no data directory named.
pub(crate) fn bare_command(home: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_portcullis"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    command.args(args).env_clear().env("PATH", path).env("HOME", home).stdin(Stdio::null());
    command
}

impl Outcome {
    pub(crate) fn of(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).expect("the output is UTF-8");
        Outcome { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }
}

impl Daemon {
    /// Starts it, and waits until it listens.
    pub(crate) fn start(mut command: Command) -> Daemon {
        let mut child =
            command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("the binary runs");
        let mut stdout = BufReader::new(child.stdout.take().expect("it is piped"));
        let mut greeting = String::new();
        while !greeting.contains("Ctrl-C") {
            let read = stdout.read_line(&mut greeting).expect("it is UTF-8");
            assert!(read > 0, "the gateway ended: {:?}, {greeting}", child.wait());
        }
        let (_, address) = greeting.split_once("http://").expect("it says where it listens");
        let (address, _) = address.split_once("/mcp").expect("it says where it listens");
        let listen = address.parse().expect("an address");
        Daemon { child, listen, greeting, _stdout: stdout }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// SIGKILL, and gone.
    pub(crate) fn kill(mut self) {
        self.child.kill().expect("it runs");
        self.child.wait().expect("it ends");
    }

    /// Sends a signal and waits; gives the exit code.
    pub(crate) fn end(mut self, signal: &str) -> Option<i32> {
        let pid = self.pid().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().expect("kill runs").success());
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(status) = self.child.try_wait().expect("it is ours") {
                return status.code();
            }
            assert!(Instant::now() < deadline, "it does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
