//! `stdio`: one client on stdin and stdout.
//!
//! With a gateway running on the data directory this is only a way to it, byte for byte through its control socket:
//! there is one gateway to a directory, and its socket is nobody's but the owner's. Without one, the gateway runs here,
//! on a copy of what is registered, so that any number of such processes, a daemon and commands leave each other alone.
//!
//! Stdout is the client's. What is printed by mistake goes to stderr.

use std::{cell::Cell, fs::File, io, os::fd::AsFd as _, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _},
    sync::oneshot,
};

use super::{DataDir, args, control::Line, serve::signals};
use crate::{
    app::{App, Settings},
    config,
    protocol::Naming,
    registry::{MemoryBackend, Registry},
    server::McpStdio,
};

pub(super) async fn run(args: args::Stdio, dir: &DataDir) -> Result<()> {
    let (input, output) = take_stdio().context("cannot use stdin and stdout")?;
    let shutdown = signals()?;
    let shutdown = async { fired(shutdown).await };
    let line = match &args.config {
        Some(file) => {
            let config = config::read(file)?;
            let registry = Registry::open(Arc::new(MemoryBackend::new()))?;
            registry.replace_file_servers(config.servers)?;
            Line::Here(registry, config.naming.unwrap_or_default())
        }
        None => dir.control().await?.line().await?,
    };
    match line {
        Line::There(line) => pass_on(line, input, output, shutdown).await,
        Line::Here(registry, naming) => serve(registry, naming, input, output, shutdown).await,
    }
}

/// Runs the gateway for this client.
async fn serve(
    registry: Registry,
    naming: Naming,
    input: impl AsyncRead + Send + Unpin,
    output: impl AsyncWrite + Send + Unpin,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<()> {
    let app = App::start(registry, Settings { naming, ..Settings::default() });
    let served = McpStdio::new(app.service()).serve(input, output, shutdown).await;
    app.shutdown().await;
    served.context("the client cannot be served any longer")
}

/// Copies both ways until both are done.
async fn pass_on(
    line: impl AsyncRead + AsyncWrite,
    mut input: impl AsyncRead + Unpin,
    mut output: impl AsyncWrite + Unpin,
    shutdown: impl Future<Output = ()>,
) -> Result<()> {
    let (mut said, mut heard) = tokio::io::split(line);
    let down = async {
        let copied = tokio::io::copy(&mut said, &mut output).await;
        output.flush().await.and(copied)
    };
    let done = Cell::new(false);
    let up = async {
        tokio::select! {
            copied = tokio::io::copy(&mut input, &mut heard) => drop(copied),
            () = shutdown => {}
        }
        done.set(true);
        // The gateway gives what is under way its grace, and ends the line.
        let _ = heard.shutdown().await;
        tokio::time::sleep(GRACE).await;
    };
    tokio::select! {
        biased;
        copied = down => match copied {
            // The client has gone, or was done.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            Ok(_) if done.get() => Ok(()),
            Ok(_) => bail!("the gateway ended: start this again"),
            Err(error) => Err(error).context("the gateway went away"),
        },
        () = up => Ok(()),
    }
}

/// A little longer than the gateway takes.
const GRACE: Duration = Duration::from_secs(8);

async fn fired(shutdown: oneshot::Receiver<()>) {
    // An error would mean that nobody can send any more, and then nobody shuts down.
    if shutdown.await.is_err() {
        std::future::pending().await
    }
}

/// Stdin and stdout for the protocol alone. From now on, whoever prints to stdout prints to stderr.
fn take_stdio() -> io::Result<(tokio::fs::File, tokio::fs::File)> {
    let input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let output = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    redirect_stdout()?;
    Ok((tokio::fs::File::from_std(input), tokio::fs::File::from_std(output)))
}

#[allow(unsafe_code)]
fn redirect_stdout() -> io::Result<()> {
    // SAFETY: both descriptors are open, or the call fails; nobody owns 1 but the process.
    match unsafe { libc::dup2(libc::STDERR_FILENO, libc::STDOUT_FILENO) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
