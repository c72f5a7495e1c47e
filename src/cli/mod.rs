//! The command line: what the binary `portcullis` is.
//!
//! Every command but `serve`, `stdio` and `connect` works through one `Control`: in the gateway that runs on the data
//! directory, or on the registry itself when none runs. Results go to stdout, everything said about them to
//! stderr, each error as one sentence that says what, where and what to do.
//!
//! ```no_run
//! fn main() -> std::process::ExitCode {
//!     portcullis::cli::main()
//! }
//! ```

mod args;
mod call;
mod connect;
mod control;
mod serve;
mod servers;
mod spec;
mod stdio;
mod tools;
mod view;

use std::{
    fmt,
    io::{self, IsTerminal as _, Write as _},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::Parser as _;
use tokio::runtime;

use self::{
    args::{Cli, Command},
    control::Control,
};
use crate::config::{ConfigError, env};

/// Reads the command line and does what it says.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report(&error),
    }
}

fn run(cli: Cli) -> Result<()> {
    let (serves, log) = match cli.command {
        Command::Serve(_) => (true, "info"),
        Command::Stdio(_) => (true, "warn"),
        _ => (false, "off"),
    };
    start_log(log)?;
    let on_stdio = matches!(cli.command, Command::Stdio(_));
    // Connections have lanes of their own; what is left is little.
    let mut builder =
        if serves { runtime::Builder::new_multi_thread() } else { runtime::Builder::new_current_thread() };
    let runtime = builder.worker_threads(1).enable_all().build().context("cannot start")?;
    let outcome = runtime.block_on(dispatch(cli));
    // What is left are tasks that wait for something, such as a line on stdin; the process does not.
    match on_stdio {
        true => runtime.shutdown_background(),
        false => runtime.shutdown_timeout(Duration::from_millis(500)),
    }
    outcome
}

async fn dispatch(cli: Cli) -> Result<()> {
    let dir = DataDir { flag: cli.data_dir };
    match cli.command {
        Command::Serve(args) => serve::run(args, dir).await,
        Command::Stdio(args) => stdio::run(args, &dir).await,
        Command::Add(args) => servers::add(&args, &dir).await,
        Command::Remove(args) => servers::remove(&args.name, &dir).await,
        Command::Enable(args) => servers::enable(&args.name, &dir).await,
        Command::Disable(args) => servers::disable(&args.name, &dir).await,
        Command::List(args) => servers::list(args.json, &dir).await,
        Command::Refresh(args) => servers::refresh(&args.name, &dir).await,
        Command::Tools(args) => tools::run(&args, &dir).await,
        Command::Call(args) => call::run(args, &dir).await,
        Command::Connect(args) => connect::run(&args, &dir).await,
    }
}

// === what commands share ===

/// Where the data is.
struct DataDir {
    flag: Option<PathBuf>,
}

impl DataDir {
    /// The directory: the flag's, the variable's, or the one in the home directory.
    fn path(&self) -> Result<PathBuf> {
        let dir =
            env::data_dir(self.flag.clone(), &env::process).map_err(|error| Usage(error.to_string()))?;
        std::path::absolute(&dir).with_context(|| format!("cannot use the data directory {}", dir.display()))
    }

    /// Whether somebody named a directory, so that what is in it is meant.
    fn is_named(&self) -> bool {
        self.flag.is_some() || env::process(env::DATA_DIR.name).is_some_and(|value| !value.is_empty())
    }

    /// The way to its servers.
    async fn control(&self) -> Result<Control> {
        Control::open(self.path()?).await
    }
}

/// Prints a line on stdout.
fn say(text: impl fmt::Display) -> Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{text}").and_then(|()| stdout.flush()).map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => Silent(ExitCode::SUCCESS).into(),
        _ => anyhow::Error::new(error).context("cannot write the output"),
    })
}

/// Says something beside the output.
fn note(text: impl fmt::Display) {
    // Who closed stderr does not want to know.
    let _ = writeln!(io::stderr().lock(), "note: {text}");
}

/// Says what is not quite right, and goes on.
fn warn(text: impl fmt::Display) {
    let _ = writeln!(io::stderr().lock(), "warning: {text}");
}

// === how it ends ===

/// The command line is wrong.
#[derive(Debug)]
struct Usage(String);

/// Everything was said.
#[derive(Debug)]
struct Silent(ExitCode);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

impl fmt::Display for Silent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("it ended")
    }
}

impl std::error::Error for Silent {}

fn report(error: &anyhow::Error) -> ExitCode {
    if let Some(Silent(code)) = error.downcast_ref() {
        return *code;
    }
    let mut stderr = io::stderr().lock();
    if let Some(config) = error.downcast_ref::<ConfigError>() {
        for line in config.to_string().lines() {
            let _ = writeln!(stderr, "error: {line}");
        }
        return ExitCode::from(WRONG_USE);
    }
    // Sources are often quoted by what they caused; nobody wants to read them twice.
    let _ = writeln!(stderr, "error: {}", crate::error::Chain(error.as_ref()));
    match error.is::<Usage>() {
        true => ExitCode::from(WRONG_USE),
        false => ExitCode::FAILURE,
    }
}

/// As clap has it.
const WRONG_USE: u8 = 2;

// === log ===

/// The log goes to stderr. Commands that only ask say themselves what matters, so theirs is off unless wanted.
fn start_log(default: &str) -> Result<()> {
    use tracing_subscriber::{EnvFilter, filter::ParseError};
    let wanted = env::process(env::LOG.name).filter(|value| !value.is_empty());
    let filter = match &wanted {
        Some(wanted) => EnvFilter::builder().parse(wanted.to_string_lossy()),
        None => EnvFilter::builder().parse(default),
    };
    let filter = filter.map_err(|error: ParseError| {
        Usage(format!("{} is not a filter such as `debug` or `portcullis=trace`: {error}", env::LOG.name))
    })?;
    let plain = env::process(env::NO_COLOR.name).is_some_and(|value| !value.is_empty());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(!plain && io::stderr().is_terminal())
        .init();
    Ok(())
}
