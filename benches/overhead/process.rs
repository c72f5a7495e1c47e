//! Child processes and how they die: the canned upstream, the blind proxy and the gateway.
//!
//! Our own two are this very program started again with a hidden first argument. They announce their ports
//! on stdout and leave when their stdin closes, so they cannot outlive us. The gateway is killed when its
//! [`Process`] is dropped.

use std::fs::File;
use std::future::Future;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};

/// A running child; dropping it kills it.
pub(crate) struct Process {
    child: Child,
    pub(crate) ports: Vec<u16>,
}

/// Telling the parent where we listen.
pub(crate) trait Announce {
    fn announce(&self) -> anyhow::Result<()>;
}

// === impl Process ===

impl Process {
    /// Starts this program again as `role` and waits for its ports.
    pub(crate) fn of_ourselves(role: &str, argument: impl ToString) -> anyhow::Result<Process> {
        let mut child = Command::new(std::env::current_exe()?)
            .args([role, &argument.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {role}"))?;
        let stdout = child.stdout.take();
        let mut process = Process { child, ports: Vec::new() };
        let mut line = String::new();
        BufReader::new(stdout.context("stdout is piped")?).read_line(&mut line)?;
        process.ports = line.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        ensure!(!process.ports.is_empty(), "{role} announced no port");
        Ok(process)
    }

    /// Starts the gateway `binary` on a free port, logging into `folder`.
    pub(crate) fn gateway(binary: &Path, folder: &Path) -> anyhow::Result<Process> {
        let port = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let log = File::create(folder.join("log"))?;
        let child = Command::new(binary)
            .arg("serve")
            .arg("--config")
            .arg(folder.join("config.json"))
            .args(["--listen", &format!("127.0.0.1:{port}")])
            .arg("--data-dir")
            .arg(folder.join("data"))
            // The default is what is measured, not what somebody's shell asks for.
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {}", binary.display()))?;
        Ok(Process { child, ports: vec![port] })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn port(&self) -> u16 {
        self.ports[0]
    }

    /// Fails if the child is no longer there; the end of `log` says why.
    pub(crate) fn check(&mut self, log: &Path) -> anyhow::Result<()> {
        if let Some(status) = self.child.try_wait()? {
            let mut text = String::new();
            File::open(log).and_then(|mut log| log.read_to_string(&mut text)).ok();
            let said = text.lines().last().unwrap_or("and said nothing");
            bail!("the gateway left ({status}): {said}");
        }
        Ok(())
    }

    /// Asks the child to end, as an operator would, and waits for it; a stubborn one is killed.
    pub(crate) fn stop(&mut self) -> anyhow::Result<()> {
        Command::new("sh").args(["-c", &format!("kill -TERM {}", self.pid())]).status()?;
        let patience = Instant::now() + Duration::from_secs(10);
        while Instant::now() < patience {
            if self.child.try_wait()?.is_some() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        bail!("the process did not leave within 10 s of SIGTERM")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only when the child is gone already, which is what we want.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

// === the side of the child ===

/// Opens `count` sockets on free ports of 127.0.0.1.
pub(crate) async fn listen(count: usize) -> anyhow::Result<Vec<TcpListener>> {
    let mut sockets = Vec::with_capacity(count);
    for _ in 0..count {
        sockets.push(TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await?);
    }
    Ok(sockets)
}

impl Announce for Vec<TcpListener> {
    fn announce(&self) -> anyhow::Result<()> {
        let mut line = String::new();
        for socket in self {
            line.push_str(&format!("{} ", socket.local_addr()?.port()));
        }
        let mut stdout = std::io::stdout();
        writeln!(stdout, "{line}")?;
        Ok(stdout.flush()?)
    }
}

/// Serves HTTP/1.1 with `answer` on every socket until the parent closes our stdin, or is gone.
pub(crate) async fn serve_until_stdin_closes<F, R, B, E>(
    sockets: Vec<TcpListener>,
    answer: F,
) -> anyhow::Result<()>
where
    F: Fn(Request<Incoming>) -> R + Clone + Send + 'static,
    R: Future<Output = Result<Response<B>, E>> + Send + 'static,
    B: hyper::body::Body<Error: std::error::Error + Send + Sync> + Send + 'static,
    B::Data: Send,
    E: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
{
    for socket in sockets {
        let answer = answer.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = socket.accept().await {
                tokio::spawn(serve(stream, answer.clone()));
            }
        });
    }
    let (closed, wait) = tokio::sync::oneshot::channel();
    // A plain thread: a blocking read on the runtime would keep it from ending.
    std::thread::spawn(move || {
        std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).ok();
        closed.send(()).ok();
    });
    wait.await.ok();
    Ok(())
}

async fn serve<F, R, B, E>(stream: TcpStream, answer: F)
where
    F: Fn(Request<Incoming>) -> R,
    R: Future<Output = Result<Response<B>, E>>,
    B: hyper::body::Body<Error: std::error::Error + Send + Sync> + 'static,
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    if stream.set_nodelay(true).is_ok() {
        // A peer that hangs up is none of our business.
        http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(answer)).await.ok();
    }
}
