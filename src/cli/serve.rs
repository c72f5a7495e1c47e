//! `serve`: registry, app, doors and control socket put together, and taken apart again in order.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process,
    sync::Arc,
};

use anyhow::{Context as _, Result, anyhow};
use axum::routing::get;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};

use super::{
    DataDir, args,
    control::{Control, Desk, Info, Lock, Socket, open_registry, remember_naming},
    say, view, warn,
};
use crate::{
    app::{App, Settings},
    config::{self, Config},
    demo,
    protocol::Naming,
    registry::{MemoryBackend, Origin, Registry, RegistryError, ServerRecord, Snapshot},
    server,
};

/// Where the gateway listens unless told otherwise: on this machine only.
pub(super) const DEFAULT_LISTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8000);

pub(super) async fn run(args: args::Serve, dir: DataDir) -> Result<()> {
    // First whatever may be refused, so that it is refused before anything changed.
    let config = args.config.as_ref().map(config::read).transpose()?;
    let wanted = config.as_ref().and_then(|config| config.listen);
    let listen = args.listen.or(wanted).unwrap_or(DEFAULT_LISTEN);
    let naming = naming(&args, config.as_ref());
    let shutdown = signals()?;
    let home = Home::of(&args, &dir).await?;
    let doors = server::Server::bind(listen).await.map_err(|error| {
        anyhow!("cannot listen on {listen}: {error}; choose another address with --listen")
    })?;
    let listen = doors.local_addr().context("cannot listen")?;
    let socket = home.lock.map(Socket::bind).transpose()?;

    let sse = args.sse || config.as_ref().and_then(|config| config.sse).unwrap_or_default();
    let (registry, keeps) = (home.registry, home.data_dir.is_some());
    let servers = config.map(|config| config.servers);
    let settings = Settings { naming: naming.clone(), ..Settings::default() };
    let registry = blocking(move || {
        write_file_servers(&registry, servers)?;
        if args.demo {
            write_demo_servers(&registry)?;
        }
        remember_naming(&registry, &naming)?;
        Ok(registry)
    })
    .await?;

    // Who closed stdout wants a gateway all the same.
    let _ = say(greeting(&registry.snapshot(), listen, &Hints::new(&args, &dir, socket.is_some())));
    if !listen.ip().is_loopback() {
        warn(format!("{listen} can be reached from other machines, and nobody is asked who they are"));
    }
    let app = App::start(registry, settings);
    let (end_control, control_ends) = oneshot::channel::<()>();
    let control = socket.map(|socket| {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let info = Info { version, pid: process::id(), listen, keeps };
        let ended = async { drop(control_ends.await) };
        tokio::spawn(socket.serve(Desk::new(app.clone(), keeps), info, ended))
    });
    let served = serve_doors(&app, doors, &args, sse, shutdown).await;

    if let Some(control) = control {
        drop(end_control);
        // Its end takes the socket away.
        let _ = control.await;
    }
    end(app).await?;
    served.context("the gateway cannot go on")
}

/// What the door lets in beside the default.
fn options(args: &args::Serve) -> server::Options {
    let options = args.hosts.iter().fold(server::Options::default(), |options, host| match host.as_str() {
        "*" => options.allow_any_host(),
        host => options.allow_host(host),
    });
    args.origins.iter().fold(options, server::Options::allow_origin)
}

/// One for each core.
fn default_lanes() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

async fn serve_doors(
    app: &App,
    doors: server::Server,
    args: &args::Serve,
    sse: bool,
    shutdown: oneshot::Receiver<()>,
) -> std::io::Result<()> {
    let door = server::McpHttp::with_options(app.service(), options(args));
    let mut router = server::mount(door).route("/healthz", get(|| std::future::ready("ok")));
    if sse {
        router = router.merge(server::mount_sse(server::McpSse::with_options(app.service(), options(args))));
    }
    let shutdown = async {
        // An error would mean that nobody can send any more, and then nobody shuts down.
        if shutdown.await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    let lanes = args.lanes.map_or_else(default_lanes, usize::from);
    doors.lanes(lanes).serve(router, shutdown).await
}

/// Ends the upstreams, and what only the demonstration brought.
async fn end(app: App) -> Result<()> {
    app.shutdown().await;
    for name in app.gateway().status().keys() {
        app.gateway().remove(name);
    }
    let registry = app.registry().clone();
    drop(app);
    blocking(move || Ok(registry.remove_origin(Origin::Demo)?)).await?;
    Ok(())
}

// === where it lives ===

/// The registry, and the right to be its gateway.
struct Home {
    registry: Registry,
    /// `None` when nothing is kept.
    data_dir: Option<PathBuf>,
    /// `None` when commands cannot find this gateway, because another is where they look.
    lock: Option<Lock>,
}

impl Home {
    async fn of(args: &args::Serve, dir: &DataDir) -> Result<Home> {
        match args.demo && !dir.is_named() {
            true => Home::in_memory(dir),
            false => Home::at(dir.path()?).await,
        }
    }

    async fn at(data_dir: PathBuf) -> Result<Home> {
        if Control::running(&data_dir).await.is_some() {
            return Err(Lock::refused(&data_dir).await);
        }
        let registry = match open_registry(&data_dir).await {
            Ok(registry) => registry,
            // It may have begun in the meantime.
            Err(_) if Control::running(&data_dir).await.is_some() => {
                return Err(Lock::refused(&data_dir).await);
            }
            Err(error) => return Err(error),
        };
        match Lock::take(&data_dir)? {
            Some(lock) => Ok(Home { registry, data_dir: Some(data_dir), lock: Some(lock) }),
            None => Err(Lock::refused(&data_dir).await),
        }
    }

    /// For the demonstration: it keeps nothing, but commands find it where they look.
    fn in_memory(dir: &DataDir) -> Result<Home> {
        let registry = Registry::open(Arc::new(MemoryBackend::new()))?;
        let lock = dir.path().and_then(|dir| Lock::take(&dir)).unwrap_or_else(|error| {
            tracing::warn!(error = format!("{error:#}"), "commands cannot reach this gateway");
            None
        });
        Ok(Home { registry, data_dir: None, lock })
    }
}

// === what it serves ===

fn naming(args: &args::Serve, config: Option<&Config>) -> Naming {
    let naming = config.and_then(|config| config.naming.clone()).unwrap_or_default();
    match args.naming {
        Some(mode) => Naming { mode, ..naming },
        None => naming,
    }
}

/// Makes the file's servers those of the registry. Without a file, those of the last one stay.
fn write_file_servers(registry: &Registry, servers: Option<Vec<ServerRecord>>) -> Result<()> {
    let Some(servers) = servers else { return Ok(()) };
    let change = registry.replace_file_servers(servers)?;
    for name in change.clashes {
        warn(format!(
            "server `{name}` is in the config file and was added by hand too: the file's counts as long as it is \
             there"
        ));
    }
    for skipped in change.skipped {
        warn(skipped);
    }
    Ok(())
}

fn write_demo_servers(registry: &Registry) -> Result<()> {
    for server in demo::servers() {
        match registry.create_server(server) {
            Err(RegistryError::Exists(name)) => {
                warn(format!("there is a server `{name}` already: the demonstration leaves it as it is"));
            }
            outcome => drop(outcome?),
        }
    }
    Ok(())
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.context("the registry's work did not end well")?
}

// === what it says ===

/// What the lines about the next step depend on.
struct Hints {
    /// How this program is called, with its data directory when it is not the usual one.
    command: String,
    demo: bool,
    keeps: bool,
    /// Whether commands find this gateway.
    reachable: bool,
}

impl Hints {
    fn new(args: &args::Serve, dir: &DataDir, reachable: bool) -> Self {
        let mut command = program();
        if let Some(dir) = &dir.flag {
            command.push_str(&format!(" --data-dir {}", quoted(dir)));
        }
        Hints { command, demo: args.demo, keeps: !args.demo || dir.is_named(), reachable }
    }
}

fn greeting(snapshot: &Snapshot, listen: SocketAddr, hints: &Hints) -> String {
    let Hints { command, .. } = hints;
    let names = Vec::from_iter(snapshot.enabled().map(|server| server.name.as_str()));
    let mut lines = vec![format!("Portcullis listens on {}", mcp_url(listen))];
    lines.push(match names.len() {
        0 => "No servers are behind it yet.".to_owned(),
        n if n <= 8 => format!("{} behind it: {}", view::count(n, "server"), names.join(", ")),
        n => format!("{} behind it", view::count(n, "server")),
    });
    if !hints.keeps {
        lines.push("This is a demonstration: nothing is kept when it ends.".to_owned());
    }
    if hints.reachable {
        lines.extend(["".to_owned(), "Next, in another terminal:".to_owned()]);
        let mut next = vec![("connect", "how to connect Claude Code, Cursor or VS Code")];
        if hints.demo {
            next.push(("call clock_now", "try a tool"));
        }
        next.extend([
            ("add NAME URL", "put a server behind the gateway"),
            ("add NAME -- COMMAND ARGS..", "the same with a program"),
        ]);
        lines.extend(next.iter().map(|(what, why)| format!("  {command} {what:<28}{why}")));
    } else {
        let said = "Commands act on another gateway, which runs on the usual data directory.";
        lines.extend(["".to_owned(), said.to_owned()]);
    }
    lines.extend(["".to_owned(), "Ctrl-C ends it.".to_owned()]);
    lines.join("\n")
}

/// The endpoint, as somebody on this machine reaches it.
pub(super) fn mcp_url(listen: SocketAddr) -> String {
    let mut listen = listen;
    if listen.ip().is_unspecified() {
        listen.set_ip(match listen.ip() {
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        });
    }
    format!("http://{listen}/mcp")
}

/// How this program was called, so that its lines can be copied.
fn program() -> String {
    match std::env::args_os().next().map(PathBuf::from) {
        Some(path) if path.components().count() > 1 => quoted(&path),
        _ => "portcullis".to_owned(),
    }
}

fn quoted(path: &Path) -> String {
    let path = path.display().to_string();
    let plain = |c: char| c.is_alphanumeric() || "/._-+,:@%~".contains(c);
    match path.chars().all(plain) && !path.is_empty() {
        true => path,
        false => format!("'{}'", path.replace('\'', r"'\''")),
    }
}

// === how it ends ===

/// Fires at the first SIGINT or SIGTERM. A second one ends the process at once.
pub(super) fn signals() -> Result<oneshot::Receiver<()>> {
    let mut interrupted = signal(SignalKind::interrupt()).context("cannot listen for signals")?;
    let mut terminated = signal(SignalKind::terminate()).context("cannot listen for signals")?;
    let (fire, fired) = oneshot::channel();
    tokio::spawn(async move {
        let mut next = async || {
            tokio::select! {
                _ = interrupted.recv() => {}
                _ = terminated.recv() => {}
            }
        };
        next().await;
        tracing::info!("ending; a second signal ends at once");
        let _ = fire.send(());
        next().await;
        process::exit(AT_ONCE);
    });
    Ok(fired)
}

/// As a shell says of a process that SIGINT ended.
const AT_ONCE: i32 = 130;
