//! An upstream that is a child process speaking on stdin and stdout.
//!
//! The child is started when the first request comes, and again when it has died, with backoff. It lives in a process
//! group of its own, which ends with the client, and also when the gateway is killed: `process` tells how.
//!
//! By default all requests share one child. With [`Isolation::Session`] each client session has one of its own, which
//! can ask its client and ends with the session.
//!
//! ```no_run
//! use portcullis::{protocol::McpRequest, upstream::{StdioCommand, StdioUpstream}};
//! use tower::ServiceExt as _;
//!
//! # async fn run() -> Result<(), portcullis::BoxError> {
//! let command = StdioCommand::new("npx").arg("-y").arg("@modelcontextprotocol/server-memory");
//! let memory = StdioUpstream::new("memory".parse()?, command);
//! let answer = memory.clone().oneshot(McpRequest::call_tool("read_graph", serde_json::json!({}))).await?;
//! memory.shutdown().await;
//! # Ok(()) }
//! ```

mod child;
mod process;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    fmt,
    path::PathBuf,
    process::Command,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use futures_util::future::BoxFuture;
use tokio::{sync::watch, time::timeout};
use tower::Service;

use self::child::{Graces, Pipes, Process};
use super::{
    Isolation, Transport,
    lines::{self, Lines, Opened, Owner, Place, Places, Surroundings, Unopened, Wire},
    link::ATTEMPT,
};
use crate::{
    BoxError,
    error::{Fault, UpstreamError},
    identity::{AffinityKey, Caller},
    protocol::{Era, McpRequest, McpResponse, ServerName},
};

/// Children of one upstream, beside the gateway's own. Each is a process of its own, and some are large.
const MOST_CHILDREN: usize = 64;
/// Those and others that take their time to end: clients come and go faster than some programs.
const MOST_PROCESSES: usize = 4 * MOST_CHILDREN;

/// From the start of the process to the end of the handshake. Some commands download themselves first.
const CONNECT: Duration = Duration::from_secs(30);

/// What to run. Any value may hold references such as `${VAR}`, which the [resolver](StdioUpstream::with_resolver)
/// replaces each time the command is run.
#[derive(Clone, PartialEq, Eq)]
pub struct StdioCommand {
    program: String,
    args: Vec<String>,
    env: BTreeMap<String, String>,
    cwd: Option<PathBuf>,
}

impl StdioCommand {
    /// A program, looked up in `PATH`.
    pub fn new(program: impl Into<String>) -> Self {
        StdioCommand { program: program.into(), args: Vec::new(), env: BTreeMap::new(), cwd: None }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<String>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Adds a variable to the gateway's own environment.
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.env.insert(name.into(), value.into());
        self
    }

    /// Sets the working directory.
    #[must_use]
    pub fn cwd(mut self, cwd: impl Into<PathBuf>) -> Self {
        self.cwd = Some(cwd.into());
        self
    }

    /// The command of a stdio transport. `None` for the others.
    pub fn of(transport: &Transport) -> Option<Self> {
        let Transport::Stdio { command, args, env, cwd } = transport else { return None };
        let (args, env, cwd) = (args.clone(), env.clone(), cwd.clone());
        Some(StdioCommand { program: command.clone(), args, env, cwd })
    }

    fn resolved(&self, resolve: &Resolve) -> Result<Command, BoxError> {
        let mut command = Command::new(resolve(&self.program)?);
        for arg in &self.args {
            command.arg(resolve(arg)?);
        }
        for (name, value) in &self.env {
            command.env(name, resolve(value)?);
        }
        if let Some(cwd) = &self.cwd {
            match cwd.to_str() {
                Some(text) => command.current_dir(resolve(text)?),
                None => command.current_dir(cwd),
            };
        }
        Ok(command)
    }
}

/// Values of the environment may be secrets.
impl fmt::Debug for StdioCommand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StdioCommand")
            .field("program", &self.program)
            .field("args", &self.args)
            .field("env", &Vec::from_iter(self.env.keys()))
            .field("cwd", &self.cwd)
            .finish()
    }
}

/// Replaces the references in a value.
pub type Resolve = Arc<dyn Fn(&str) -> Result<String, BoxError> + Send + Sync>;

/// A client of one child process, which all requests share, or of one for each client session. Clones share them too;
/// with the last one and the last call under way they end.
#[derive(Clone)]
pub struct StdioUpstream {
    shared: Arc<Shared>,
}

struct Shared {
    isolation: Isolation,
    /// The child that everybody shares. Under isolation it is the gateway's own: it tells what the server offers, so it
    /// must never be the one for which there is no room.
    common: Place,
    /// The children of those who have one of their own.
    own: Places,
    runner: Runner,
    closing: watch::Sender<bool>,
    living: watch::Sender<()>,
}

/// Everything that is needed to run the command once more.
#[derive(Clone)]
struct Runner {
    upstream: ServerName,
    command: StdioCommand,
    resolve: Resolve,
    max_line: usize,
    graces: Graces,
    /// What the last run spoke.
    era: Arc<Mutex<Option<Era>>>,
}

impl StdioUpstream {
    /// A client of `command`, which is not started before the first request.
    pub fn new(name: ServerName, command: StdioCommand) -> Self {
        let runner = Runner {
            upstream: name,
            command,
            resolve: Arc::new(|value| Ok(value.to_owned())),
            max_line: lines::MAX_LINE,
            graces: Graces::default(),
            era: Arc::default(),
        };
        Self::with(runner, Isolation::Shared)
    }

    /// The same, with a child for everybody or for each session. To be called before the first request.
    #[must_use]
    pub fn with_isolation(self, isolation: Isolation) -> Self {
        Self::with(self.shared.runner.clone(), isolation)
    }

    /// The same, whose command's values go through `resolve` each time it is run. Without it they are taken
    /// literally. To be called before the first request.
    #[must_use]
    pub fn with_resolver(self, resolve: Resolve) -> Self {
        Self::with(Runner { resolve, ..self.shared.runner.clone() }, self.shared.isolation)
    }

    /// The same with another limit to the length of one message. 16 MiB by default: as much as other clients accept.
    /// To be called before the first request.
    #[must_use]
    pub fn with_max_line(self, bytes: usize) -> Self {
        Self::with(Runner { max_line: bytes, ..self.shared.runner.clone() }, self.shared.isolation)
    }

    #[cfg(test)]
    fn with_graces(self, close: Duration, term: Duration) -> Self {
        Self::with(
            Runner { graces: Graces { close, term }, ..self.shared.runner.clone() },
            self.shared.isolation,
        )
    }

    fn with(runner: Runner, isolation: Isolation) -> Self {
        let owner = match isolation {
            Isolation::Shared => Owner::everybody(),
            Isolation::Session => Owner::of(&Caller::anonymous()),
        };
        let shared = Shared {
            isolation,
            common: Place::new(&runner.upstream, Arc::new(owner)),
            own: Places::new(runner.upstream.clone(), MOST_CHILDREN, ATTEMPT),
            runner,
            closing: watch::Sender::new(false),
            living: watch::Sender::new(()),
        };
        StdioUpstream { shared: Arc::new(shared) }
    }

    /// Ends the child or children, with everything they have started, and waits until nothing of them is left: at most
    /// a little more than 4 s. They get no chance to come back.
    pub async fn shutdown(&self) {
        self.shared.closing.send_replace(true);
        self.shared.living.closed().await;
    }
}

impl Shared {
    async fn call(&self, request: McpRequest) -> Result<McpResponse, BoxError> {
        let name = &self.runner.upstream;
        if *self.closing.borrow() {
            return Err(UpstreamError::new(name, Fault::Unreachable, "the gateway has ended it").into());
        }
        let connect = |owner| {
            let (runner, alive) = (self.runner.clone(), self.living.subscribe());
            let closing = self.closing.subscribe();
            let is_full = self.living.receiver_count() > MOST_PROCESSES;
            async move {
                match is_full {
                    true => {
                        let error = "too many of its processes have not ended yet";
                        Err(UpstreamError::new(&runner.upstream, Fault::Unreachable, error))
                    }
                    false => runner.connect(owner, closing, alive).await,
                }
            }
        };
        match self.isolation == Isolation::Shared || is_gateways_own(request.caller()) {
            true => self.common.call(request, connect).await,
            false => self.own.call(request, connect).await,
        }
    }
}

/// Whether it is the gateway, or somebody who cannot be told from it.
fn is_gateways_own(caller: &Caller) -> bool {
    AffinityKey::of(caller) == AffinityKey::of(&Caller::anonymous())
}

impl Runner {
    async fn connect(
        self,
        owner: Arc<Owner>,
        mut closing: watch::Receiver<bool>,
        alive: watch::Receiver<()>,
    ) -> Result<Lines, UpstreamError> {
        let told = closing.clone();
        let attempt = timeout(CONNECT, self.attempt(&owner, &told, &alive));
        let failed = tokio::select! {
            outcome = attempt => match outcome {
                Ok(outcome) => return outcome,
                Err(_) => format!("it was not ready within {CONNECT:?}"),
            },
            _ = closing.wait_for(|closing| *closing) => "the gateway has ended it".to_owned(),
        };
        Err(UpstreamError::new(&self.upstream, Fault::Unreachable, failed))
    }

    async fn attempt(
        &self,
        owner: &Arc<Owner>,
        closing: &watch::Receiver<bool>,
        alive: &watch::Receiver<()>,
    ) -> Result<Lines, UpstreamError> {
        let known = *self.lock_era();
        let opened = match self.start(known, owner, closing, alive).await {
            Err(Unopened { probed: true, error }) => {
                tracing::debug!(upstream = %self.upstream, %error, "starting again without asking for the era");
                self.start(Some(Era::Legacy), owner, closing, alive).await
            }
            outcome => outcome,
        };
        match opened {
            Ok((lines, era)) => {
                *self.lock_era() = Some(era);
                Ok(lines)
            }
            Err(Unopened { error, .. }) => {
                // What was true of the last run may not be of the next one.
                *self.lock_era() = None;
                Err(error)
            }
        }
    }

    async fn start(
        &self,
        known: Option<Era>,
        owner: &Arc<Owner>,
        closing: &watch::Receiver<bool>,
        alive: &watch::Receiver<()>,
    ) -> Result<(Lines, Era), Unopened> {
        let (process, pipes) =
            self.spawn(closing, alive).map_err(|error| Unopened { error, probed: false })?;
        let around = Surroundings {
            max_line: self.max_line,
            gone: process.gone(),
            closing: Box::pin(told_to_close(closing.clone())),
        };
        let wire = Wire::start(&self.upstream, pipes.stdout, pipes.stdin, around);
        let opened: Opened = lines::open(&wire, known, owner).await?;
        let era = opened.era();
        tracing::debug!(upstream = %self.upstream, ?era, "connected");
        Ok((Lines::new(wire, opened, process), era))
    }

    fn spawn(
        &self,
        closing: &watch::Receiver<bool>,
        alive: &watch::Receiver<()>,
    ) -> Result<(Process, Pipes), UpstreamError> {
        let command = self
            .command
            .resolved(&self.resolve)
            .map_err(|error| UpstreamError::new(&self.upstream, Fault::Misconfigured, error))?;
        Process::start(&self.upstream, command, self.graces, closing.clone(), alive.clone()).map_err(
            |error| {
                let fault = match error.kind() {
                    std::io::ErrorKind::NotFound | std::io::ErrorKind::PermissionDenied => {
                        Fault::Misconfigured
                    }
                    _ => Fault::Unreachable,
                };
                let reason = format!("cannot start `{}`: {error}", self.command.program);
                UpstreamError::new(&self.upstream, fault, reason)
            },
        )
    }

    fn lock_era(&self) -> std::sync::MutexGuard<'_, Option<Era>> {
        self.era.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ready when the upstream is told to close. One that is only dropped ends with its last call instead.
async fn told_to_close(mut closing: watch::Receiver<bool>) {
    if closing.wait_for(|closing| *closing).await.is_err() {
        std::future::pending::<()>().await;
    }
}

impl Service<McpRequest> for StdioUpstream {
    type Response = McpResponse;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<McpResponse, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: McpRequest) -> Self::Future {
        let shared = self.shared.clone();
        Box::pin(async move { shared.call(request).await })
    }
}

impl fmt::Debug for StdioUpstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StdioUpstream")
            .field("name", &self.shared.runner.upstream)
            .field("command", &self.shared.runner.command)
            .finish_non_exhaustive()
    }
}
