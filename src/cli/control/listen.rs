//! The daemon's side of the socket.
//!
//! Who serves a data directory holds the lock on `control.lock` there, which the kernel takes back however the
//! process ends. So whoever holds the lock knows that a socket it finds was left behind, and replaces it.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError},
    io,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    pin::pin,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use axum::{
    Router,
    extract::{DefaultBodyLimit, Path as PathParam, Request, State},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bytes::Bytes;
use http::{StatusCode, header};
use hyper::{server::conn::http1, upgrade::OnUpgrade};
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::{
    net::UnixListener,
    sync::{mpsc, watch},
    task::JoinSet,
};

use super::{
    Control, Desk, Info,
    remote::{LINE, Refusal},
    socket_path,
};
use crate::{protocol::ServerName, server::McpStdio};

/// The right to serve a data directory; given back when it is dropped.
pub(in crate::cli) struct Lock {
    data_dir: PathBuf,
    _file: File,
}

/// The socket, bound. It is gone when this is dropped.
pub(in crate::cli) struct Socket {
    listener: UnixListener,
    path: PathBuf,
    /// Held for as long as the socket is there.
    _lock: Lock,
}

impl Lock {
    /// `None` when another gateway serves the directory.
    pub(in crate::cli) fn take(data_dir: &Path) -> Result<Option<Lock>> {
        let cannot = |path: &Path| format!("cannot use {}", path.display());
        DirBuilder::new().recursive(true).mode(0o700).create(data_dir).with_context(|| cannot(data_dir))?;
        let path = data_dir.join("control.lock");
        let opened = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
        let file = opened.with_context(|| cannot(&path))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Lock { data_dir: data_dir.to_owned(), _file: file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error).with_context(|| cannot(&path)),
        }
    }

    /// One sentence about who has the directory instead.
    pub(in crate::cli) async fn refused(data_dir: &Path) -> anyhow::Error {
        let who = match Control::running(data_dir).await {
            Some(info) => format!("another portcullis (process {}, listening on {})", info.pid, info.listen),
            None => "another portcullis".to_owned(),
        };
        anyhow::anyhow!(
            "{who} already serves the data directory {}: stop it, or choose another directory with --data-dir",
            data_dir.display()
        )
    }
}

impl Socket {
    /// Binds the socket, in place of one that was left behind.
    pub(in crate::cli) fn bind(lock: Lock) -> Result<Socket> {
        let path = socket_path(&lock.data_dir);
        let cannot = || format!("cannot make the control socket {}", path.display());
        let length = path.as_os_str().len();
        if length > LONGEST_PATH {
            bail!(
                "the path of the control socket, {}, has {length} bytes, and a socket's path may have \
                 {LONGEST_PATH}: choose a shorter data directory with --data-dir",
                path.display()
            );
        }
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error).with_context(cannot),
            _ => {}
        }
        // Nobody else comes in before the mode is set: the directory is the owner's.
        let listener = UnixListener::bind(&path).with_context(cannot)?;
        fs::set_permissions(&path, Permissions::from_mode(0o600)).with_context(cannot)?;
        Ok(Socket { listener, path, _lock: lock })
    }

    /// Answers until `ended`. Commands under way are then cut off; clients on lines have their grace.
    pub(in crate::cli) async fn serve(self, desk: Desk, info: Info, ended: impl Future<Output = ()>) {
        let (lines, serving) = watch::channel(());
        let (open, mut all_closed) = mpsc::channel(1);
        let router = router(desk, info, Lines { serving, open });
        let mut ended = pin!(ended);
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        let service = TowerToHyperService::new(router.clone());
                        let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
                        connections.spawn(connection.with_upgrades());
                    }
                    Err(error) => {
                        // Out of file descriptors, most likely: others are closed soon.
                        tracing::warn!(%error, "cannot accept on the control socket");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                },
                Some(_) = connections.join_next() => {}
                () = &mut ended => break,
            }
        }
        // Who waits for a line that ended waits for nothing; the others have begun to end.
        drop((lines, router, connections));
        let _: Result<Option<()>, _> = tokio::time::timeout(LINES_GRACE, all_closed.recv()).await;
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // A socket that stays behind does no harm: the next gateway replaces it.
        let _ = fs::remove_file(&self.path);
    }
}

/// What `sun_path` holds, without the NUL at its end.
const LONGEST_PATH: usize = if cfg!(target_os = "linux") { 107 } else { 103 };

/// A little more than a line takes to end.
const LINES_GRACE: Duration = Duration::from_secs(8);

// === the API ===

/// More than any call's arguments; it is the owner's own memory.
const LARGEST_BODY: usize = 64 * 1024 * 1024;

fn router(desk: Desk, info: Info, lines: Lines) -> Router {
    let served = desk.clone();
    Router::new()
        .route("/line", get(move |request| std::future::ready(line(&served, request, lines.clone()))))
        .route("/info", get(move || std::future::ready(Json(info.clone()))))
        .route("/servers", get(servers).post(edit))
        .route("/servers/{name}/refresh", post(refresh))
        .route("/tools", post(tools))
        .route("/call", post(call))
        .layer(DefaultBodyLimit::max(LARGEST_BODY))
        .with_state(desk)
}

/// What every line holds as long as it is open.
#[derive(Clone)]
struct Lines {
    /// Gone when the socket's end has begun.
    serving: watch::Receiver<()>,
    open: mpsc::Sender<()>,
}

/// A client on somebody's stdin and stdout, passed on byte for byte.
fn line(desk: &Desk, mut request: Request, lines: Lines) -> Response {
    let asked = request.headers().get(header::UPGRADE).is_some_and(|value| value == LINE);
    let Some(upgrade) = request.extensions_mut().remove::<OnUpgrade>().filter(|_| asked) else {
        return refuse(StatusCode::UPGRADE_REQUIRED, format!("this is a line for `{LINE}`"));
    };
    let door = McpStdio::new(desk.service());
    tokio::spawn(async move {
        let Lines { mut serving, open: _open } = lines;
        let Ok(line) = upgrade.await else { return };
        let (input, output) = tokio::io::split(TokioIo::new(line));
        // Nothing is ever sent: it ends when the socket does.
        let ended = async { while serving.changed().await.is_ok() {} };
        if let Err(error) = door.serve(input, output, ended).await {
            tracing::debug!(%error, "a line broke");
        }
    });
    let headers = [(header::CONNECTION, "upgrade"), (header::UPGRADE, LINE)];
    (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()
}

async fn servers(State(desk): State<Desk>) -> Response {
    answer(desk.servers().await)
}

async fn edit(State(desk): State<Desk>, body: Bytes) -> Result<Response, Unread> {
    Ok(answer(desk.edit(read(&body)?).await))
}

async fn refresh(State(desk): State<Desk>, PathParam(name): PathParam<String>) -> Response {
    match name.parse::<ServerName>() {
        Ok(name) => answer(desk.refresh(&name).await),
        Err(error) => refuse(StatusCode::BAD_REQUEST, error.to_string()),
    }
}

async fn tools(State(desk): State<Desk>, body: Bytes) -> Result<Response, Unread> {
    #[derive(Deserialize)]
    struct Asked {
        wait: Duration,
    }
    let Asked { wait } = read(&body)?;
    Ok(answer(desk.tools(wait).await))
}

async fn call(State(desk): State<Desk>, body: Bytes) -> Result<Response, Unread> {
    Ok(answer(desk.call(read(&body)?).await))
}

struct Json<T>(T);

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        match serde_json::to_vec(&self.0) {
            Ok(body) => ([(header::CONTENT_TYPE, "application/json")], body).into_response(),
            Err(error) => refuse(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        }
    }
}

/// Why a body cannot be read.
struct Unread(serde_json::Error);

impl IntoResponse for Unread {
    fn into_response(self) -> Response {
        // A command of another release, perhaps.
        refuse(StatusCode::BAD_REQUEST, format!("the gateway does not understand this command: {}", self.0))
    }
}

fn read<T: DeserializeOwned>(body: &Bytes) -> Result<T, Unread> {
    serde_json::from_slice(body).map_err(Unread)
}

fn answer(outcome: Result<impl Serialize>) -> Response {
    match outcome {
        Ok(value) => Json(value).into_response(),
        Err(error) => refuse(StatusCode::UNPROCESSABLE_ENTITY, format!("{error:#}")),
    }
}

fn refuse(status: StatusCode, error: String) -> Response {
    (status, Json(Refusal { error })).into_response()
}
