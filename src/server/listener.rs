//! A listener with limits: connections, header time, and an orderly end.

use std::{io, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use axum::{Router, extract::Request};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
};
use tower::ServiceExt as _;

/// A client that sends no complete request head in this time is cut off.
const HEADER_TIME: Duration = Duration::from_secs(15);
/// How long requests under way may take to end at a shutdown.
const DRAIN_TIME: Duration = Duration::from_secs(8);
const MOST_CONNECTIONS: usize = 10_000;

/// A bound TCP port.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    connections: Arc<Semaphore>,
}

/// In the extensions of every request: becomes `true` when the server is about to end. Streams that would stay open
/// end themselves then.
#[derive(Clone, Debug)]
pub struct Draining(pub watch::Receiver<bool>);

impl Server {
    /// Binds. Port 0 takes a free one.
    pub async fn bind(address: SocketAddr) -> io::Result<Server> {
        let listener = TcpListener::bind(address).await?;
        Ok(Server { listener, connections: Arc::new(Semaphore::new(MOST_CONNECTIONS)) })
    }

    /// At most this many connections at once; the rest wait to be accepted. 10,000 by default.
    #[must_use]
    pub fn most_connections(mut self, most: usize) -> Self {
        self.connections = Arc::new(Semaphore::new(most));
        self
    }

    /// Where it listens.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `shutdown`, then lets requests end: streams are closed at once, calls have 8 seconds.
    pub async fn serve(self, router: Router, shutdown: impl Future<Output = ()>) -> io::Result<()> {
        let (drain, draining) = watch::channel(false);
        let graceful = GracefulShutdown::new();
        let mut shutdown = pin!(shutdown);
        loop {
            let (stream, permit) = tokio::select! {
                accepted = accept(&self.listener, &self.connections) => accepted,
                () = &mut shutdown => break,
            };
            let router = router.clone();
            let draining = Draining(draining.clone());
            let service = router.map_request(move |mut request: Request<_>| {
                request.extensions_mut().insert(draining.clone());
                request
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIME)
                .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
            let connection = graceful.watch(connection);
            tokio::spawn(async move {
                let _held: OwnedSemaphorePermit = permit;
                if let Err(error) = connection.await {
                    tracing::debug!(%error, "connection ended");
                }
            });
        }
        drop(self.listener);
        drain.send_replace(true);
        if tokio::time::timeout(DRAIN_TIME, graceful.shutdown()).await.is_err() {
            tracing::warn!("some requests did not end in time; they are cut off");
        }
        Ok(())
    }
}

/// The next connection. Failures to accept are the machine's (no descriptors left, for one) and pass.
async fn accept(listener: &TcpListener, connections: &Arc<Semaphore>) -> (TcpStream, OwnedSemaphorePermit) {
    let permit = connections.clone().acquire_owned().await.expect("the semaphore is never closed");
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                // A result must not wait for the last packet's acknowledgement: that is 40 ms.
                let _ = stream.set_nodelay(true);
                return (stream, permit);
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}
