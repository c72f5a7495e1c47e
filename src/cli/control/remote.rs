//! The gateway that runs, through its socket: HTTP/1.1 with JSON, one request to a connection.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::{client::conn::http1, upgrade::Upgraded};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::json;
use tokio::net::UnixStream;

use super::{Call, Called, Edit, Edited, Info, ServerView, Servers, Tools, socket_path};
use crate::protocol::ServerName;

/// A gateway that answered the knock.
pub(in crate::cli) struct Remote {
    stream: UnixStream,
    socket: PathBuf,
}

/// Why the gateway did not do it.
#[derive(Serialize, Deserialize)]
pub(super) struct Refusal {
    pub(super) error: String,
}

impl Remote {
    /// The gateway on `data_dir`. A socket that nobody listens on was left by one that was killed: as good as none.
    pub(super) async fn find(data_dir: &Path) -> Result<Option<Remote>> {
        let socket = socket_path(data_dir);
        match UnixStream::connect(&socket).await {
            Ok(stream) => Ok(Some(Remote { stream, socket })),
            Err(error) => match error.kind() {
                io::ErrorKind::NotFound
                | io::ErrorKind::ConnectionRefused
                | io::ErrorKind::NotADirectory
                // A path that is too long for a socket: no gateway can be there either.
                | io::ErrorKind::InvalidInput => Ok(None),
                _ => Err(error).with_context(|| format!("cannot reach the gateway at {}", socket.display())),
            },
        }
    }

    pub(super) async fn info(self) -> Result<Info> {
        match tokio::time::timeout(INFO_WITHIN, self.send(Method::GET, "/info", &())).await {
            Ok(info) => info,
            Err(_) => bail!("the gateway does not answer"),
        }
    }

    pub(super) async fn servers(self) -> Result<Servers> {
        self.send(Method::GET, "/servers", &()).await
    }

    pub(super) async fn edit(self, edit: Edit) -> Result<Edited> {
        self.send(Method::POST, "/servers", &edit).await
    }

    pub(super) async fn refresh(self, name: &ServerName) -> Result<ServerView> {
        self.send(Method::POST, &format!("/servers/{name}/refresh"), &()).await
    }

    pub(super) async fn tools(self, wait: Duration) -> Result<Tools> {
        self.send(Method::POST, "/tools", &json!({ "wait": wait })).await
    }

    pub(super) async fn call(self, call: Call) -> Result<Called> {
        self.send(Method::POST, "/call", &call).await
    }

    /// A line to the gateway that a client speaks on as if it were stdin and stdout.
    pub(super) async fn line(self) -> Result<TokioIo<Upgraded>> {
        let socket = self.socket.display().to_string();
        let (mut sender, connection) = http1::handshake(TokioIo::new(self.stream)).await?;
        tokio::spawn(connection.with_upgrades());
        let request = Request::builder()
            .uri("/line")
            .header(http::header::HOST, "portcullis")
            .header(http::header::CONNECTION, "upgrade")
            .header(http::header::UPGRADE, LINE)
            .body(Full::new(Bytes::new()))?;
        let response = sender.send_request(request).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            bail!("the gateway at {socket} is of another release: stop it and start it again");
        }
        Ok(TokioIo::new(hyper::upgrade::on(response).await?))
    }

    async fn send<T: DeserializeOwned>(self, method: Method, path: &str, body: &impl Serialize) -> Result<T> {
        let socket = self.socket.clone();
        let (status, body) = self.exchange(method, path, body).await.with_context(|| {
            let socket = socket.display();
            format!(
                "the gateway at {socket} went away before it answered; `portcullis list` shows what was done"
            )
        })?;
        if status.is_success() {
            return serde_json::from_slice(&body)
                .context("the gateway answered something else than expected");
        }
        match serde_json::from_slice::<Refusal>(&body) {
            Ok(refusal) => Err(anyhow!(refusal.error)),
            Err(_) => Err(anyhow!("the gateway at {} answered {status}", socket.display())),
        }
    }

    async fn exchange(
        self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<(StatusCode, Bytes)> {
        let (mut sender, connection) = http1::handshake(TokioIo::new(self.stream)).await?;
        let driven = tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(http::header::HOST, "portcullis")
            .body(Full::new(Bytes::from(serde_json::to_vec(body)?)))?;
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        driven.abort();
        Ok((status, body))
    }
}

/// What a line is called in `Upgrade`.
pub(super) const LINE: &str = "mcp-stdio";
const INFO_WITHIN: Duration = Duration::from_secs(2);
