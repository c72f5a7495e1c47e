//! The fixture server of `tests/fixture`, as a process.

use std::{path::PathBuf, process::Stdio};

use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
    time::timeout,
};

use super::PATIENCE;

/// A running fixture server; it is killed when dropped.
pub(crate) struct Fixture {
    url: String,
    _process: Child,
}

impl Fixture {
    /// Both eras.
    pub(crate) async fn start() -> Fixture {
        Fixture::with(&[]).await
    }

    pub(crate) async fn legacy() -> Fixture {
        Fixture::with(&["--legacy-only"]).await
    }

    pub(crate) async fn modern() -> Fixture {
        Fixture::with(&["--modern-only"]).await
    }

    pub(crate) async fn with(options: &[&str]) -> Fixture {
        let mut process = Command::new(program())
            .args(["http", "--listen", "127.0.0.1:0"])
            .args(options)
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("the fixture server starts");
        let mut lines = BufReader::new(process.stdout.take().expect("it is piped")).lines();
        let first = timeout(PATIENCE, lines.next_line()).await.expect("a line in time").expect("a line");
        let first = first.expect("the fixture server says where it listens");
        let url = first.strip_prefix("listening on ").expect("the fixture's first line").to_owned();
        Fixture { url, _process: process }
    }

    pub(crate) fn url(&self) -> String {
        self.url.clone()
    }
}

fn program() -> PathBuf {
    let test = std::env::current_exe().expect("this test has a path");
    let target = test.parent().and_then(|deps| deps.parent()).expect("it stands in target/<profile>/deps");
    let program = target.join("examples/fixture-server");
    assert!(program.exists(), "there is no {}: run `cargo build --examples` first", program.display());
    program
}
