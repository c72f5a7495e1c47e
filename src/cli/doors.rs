//! Stands in for `portcullis::server` until that is merged: the same three functions, and no MCP behind them.

use std::{io, net::SocketAddr};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{rt::TokioIo, server::graceful::GracefulShutdown, service::TowerToHyperService};
use tokio::net::TcpListener;

use crate::McpService;

pub(super) fn router(_: impl McpService) -> Router {
    Router::new()
}

pub(super) struct Server(TcpListener);

impl Server {
    pub(super) async fn bind(addr: SocketAddr) -> io::Result<Server> {
        TcpListener::bind(addr).await.map(Server)
    }

    pub(super) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }

    pub(super) async fn serve(self, router: Router, shutdown: impl Future<Output = ()>) -> io::Result<()> {
        let graceful = GracefulShutdown::new();
        let mut shutdown = std::pin::pin!(shutdown);
        loop {
            let (stream, _) = tokio::select! {
                accepted = self.0.accept() => accepted?,
                () = &mut shutdown => break,
            };
            let service = TowerToHyperService::new(router.clone());
            let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            tokio::spawn(graceful.watch(connection));
        }
        graceful.shutdown().await;
        Ok(())
    }
}
