//! One run of the child process: started, listened to, ended, collected.

use std::{
    process::{Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::future::BoxFuture;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    process::{Child, ChildStderr, ChildStdin, ChildStdout},
    sync::{oneshot, watch},
    time::{sleep, timeout},
};

use super::process::{self, Group};
use crate::protocol::ServerName;

/// How much of one line of stderr goes to the log.
const STDERR_LINE: usize = 4 * 1024;
/// How long a process that has ended may take to be collected, or its stderr to run dry.
const SOON: Duration = Duration::from_millis(200);

/// How long the stages of an ending last.
#[derive(Clone, Copy, Debug)]
pub(super) struct Graces {
    /// From the end of stdin to SIGTERM.
    pub(super) close: Duration,
    /// From SIGTERM to SIGKILL.
    pub(super) term: Duration,
}

impl Default for Graces {
    fn default() -> Self {
        Graces { close: Duration::from_secs(2), term: Duration::from_secs(2) }
    }
}

/// A running process. Dropped, it ends: its stdin should be closed at the same time.
pub(super) struct Process {
    exit: watch::Receiver<Option<String>>,
    _order: oneshot::Sender<()>,
}

/// Where one speaks with it.
pub(super) struct Pipes {
    pub(super) stdin: ChildStdin,
    pub(super) stdout: ChildStdout,
}

impl Process {
    /// Starts `command`. `closing` ends it as dropping it does; `alive` is dropped when nothing of it is left.
    pub(super) fn start(
        upstream: &ServerName,
        mut command: Command,
        graces: Graces,
        closing: watch::Receiver<bool>,
        alive: watch::Receiver<()>,
    ) -> std::io::Result<(Process, Pipes)> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let (mut child, group) = process::spawn(command, graces.term)?;
        let pipes = child.stdin.take().zip(child.stdout.take()).zip(child.stderr.take());
        let Some(((stdin, stdout), stderr)) = pipes else {
            return Err(std::io::Error::other("the pipes to the child are missing"));
        };
        let (order, ordered) = oneshot::channel();
        let (exited, exit) = watch::channel(None);
        let nurse = Nurse { upstream: upstream.clone(), child, group, graces, exited };
        tokio::spawn(nurse.attend(stderr, ordered, closing, alive));
        Ok((Process { exit, _order: order }, Pipes { stdin, stdout }))
    }

    /// Ready when the process has ended: says how.
    pub(super) fn gone(&self) -> BoxFuture<'static, String> {
        let mut exit = self.exit.clone();
        Box::pin(async move {
            match exit.wait_for(Option::is_some).await {
                Ok(how) => how.clone().unwrap_or_default(),
                Err(_) => "its process was given up".to_owned(),
            }
        })
    }
}

/// Sits with a process until it is buried.
struct Nurse {
    upstream: ServerName,
    child: Child,
    group: Group,
    graces: Graces,
    exited: watch::Sender<Option<String>>,
}

impl Nurse {
    /// When the task itself is dropped, with its runtime, the group's pipe closes, and the watcher ends the group.
    async fn attend(
        mut self,
        stderr: ChildStderr,
        ordered: oneshot::Receiver<()>,
        closing: watch::Receiver<bool>,
        alive: watch::Receiver<()>,
    ) {
        let last_line = Arc::new(Mutex::new(String::new()));
        let mut draining = tokio::spawn(drain(self.upstream.clone(), stderr, last_line.clone()));
        let status = tokio::select! {
            status = self.child.wait() => status.ok(),
            _ = ordered => None,
            () = super::told_to_close(closing) => None,
        };
        let status = match status {
            Some(status) => Some(status),
            // Its stdin is closed now: it may leave by itself.
            None => self.wait(self.graces.close).await,
        };
        let ended_by_itself = status.is_some();
        if ended_by_itself {
            // What it said last is the best explanation there is: the log gets it first.
            let _ = timeout(SOON, &mut draining).await;
            self.report(status, &last_line);
        }
        self.group.end();
        let status = match self.wait(self.graces.term + SOON).await {
            Some(status) => Some(status),
            None => {
                self.group.kill();
                self.wait(SOON).await
            }
        };
        if !ended_by_itself {
            self.report(status, &last_line);
        }
        self.bury().await;
        draining.abort();
        tracing::debug!(upstream = %self.upstream, ?status, "process ended");
        drop(alive);
    }

    async fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        timeout(limit, self.child.wait()).await.ok()?.ok()
    }

    fn report(&self, status: Option<ExitStatus>, last_line: &Mutex<String>) {
        let status = status.map_or_else(|| "it does not end".to_owned(), |status| status.to_string());
        let last = last_line.lock().unwrap_or_else(PoisonError::into_inner);
        // What it says may hold secrets: that is for the log, and the status for whoever asks how it is.
        tracing::debug!(upstream = %self.upstream, status, last_line = last.as_str(), "its process ended");
        let how = match last.is_empty() {
            true => format!("its process ended: {status}"),
            false => format!("its process ended: {status}; what it said last is in the log"),
        };
        self.exited.send_replace(Some(how));
    }

    /// Waits until nobody of the group is left.
    async fn bury(&self) {
        let patience = tokio::time::Instant::now() + self.graces.term + SOON;
        while !self.group.is_gone() && tokio::time::Instant::now() < patience {
            sleep(Duration::from_millis(10)).await;
        }
        for _ in 0..10 {
            if !self.group.reap() {
                return;
            }
            sleep(Duration::from_millis(10)).await;
        }
    }
}

/// Sends a child's stderr to the log, line by line, and remembers the last one.
async fn drain(upstream: ServerName, mut stderr: impl AsyncRead + Unpin, last: Arc<Mutex<String>>) {
    let mut line = Vec::new();
    let mut chunk = vec![0; STDERR_LINE];
    let say = |line: &mut Vec<u8>| {
        let text = String::from_utf8_lossy(line.trim_ascii()).into_owned();
        line.clear();
        if !text.is_empty() {
            tracing::info!(target: "upstream", upstream = %upstream, line = text.as_str(), "stderr");
            *last.lock().unwrap_or_else(PoisonError::into_inner) = text;
        }
    };
    loop {
        let read = match stderr.read(&mut chunk).await {
            Ok(0) | Err(_) => break,
            Ok(read) => read,
        };
        for part in chunk[..read].split_inclusive(|byte| *byte == b'\n') {
            let room = STDERR_LINE - line.len();
            line.extend_from_slice(&part[..part.len().min(room)]);
            if part.ends_with(b"\n") {
                say(&mut line);
            }
        }
    }
    say(&mut line);
}
