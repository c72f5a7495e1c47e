//! A listener with limits: connections, header time, and an orderly end.
//!
//! By default connections run on the runtime that serves. With [`Server::lanes`] each is handed to one of several
//! threads with a runtime of its own, and everything about it stays there, the connection to the upstream included.
//! A proxy's request is short and wakes the next task at every turn; waking one on another thread costs more than
//! the rest of the request (measured: a third of the CPU of a small call).

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
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch},
};
use tower::ServiceExt as _;

use crate::lane;

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
    lanes: usize,
}

/// In the extensions of every request: becomes `true` when the server is about to end. Streams that would stay open
/// end themselves then.
#[derive(Clone, Debug)]
pub struct Draining(Arc<watch::Receiver<bool>>);

impl Draining {
    /// Done when the server is about to end.
    pub async fn begins(&self) {
        let mut draining = (*self.0).clone();
        if draining.wait_for(|now| *now).await.is_err() {
            std::future::pending().await
        }
    }
}

impl Server {
    /// Binds. Port 0 takes a free one.
    pub async fn bind(address: SocketAddr) -> io::Result<Server> {
        let listener = TcpListener::bind(address).await?;
        Ok(Server { listener, connections: Arc::new(Semaphore::new(MOST_CONNECTIONS)), lanes: 0 })
    }

    /// At most this many connections at once; the rest wait to be accepted. 10,000 by default.
    #[must_use]
    pub fn most_connections(mut self, most: usize) -> Self {
        self.connections = Arc::new(Semaphore::new(most));
        self
    }

    /// Serves on this many threads of its own, each connection on one of them. 0, the default, serves on the
    /// caller's runtime.
    #[must_use]
    pub fn lanes(mut self, lanes: usize) -> Self {
        self.lanes = lanes;
        self
    }

    /// Where it listens.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `shutdown`, then lets requests end: streams are closed at once, calls have 8 seconds.
    pub async fn serve(self, router: Router, shutdown: impl Future<Output = ()>) -> io::Result<()> {
        let (drain, draining) = watch::channel(false);
        let door = Door { router, draining: Draining(Arc::new(draining)) };
        let lanes = match self.lanes {
            0 => vec![Lane::here(door)],
            n => (0..n).map(|i| Lane::thread(i, door.clone())).collect::<io::Result<_>>()?,
        };
        let mut shutdown = pin!(shutdown);
        let mut next = 0;
        loop {
            let connection = tokio::select! {
                accepted = accept(&self.listener, &self.connections) => accepted,
                () = &mut shutdown => break,
            };
            next = (next + 1) % lanes.len();
            // A lane that is gone panicked; its connections are lost, and the others go on.
            let mut connection = Some(connection);
            for lane in lanes[next..].iter().chain(&lanes[..next]) {
                let Some(c) = connection.take() else { break };
                connection = lane.connections.send(c).err().map(|e| e.0);
            }
        }
        drop(self.listener);
        drain.send_replace(true);
        // All at once: this drops every lane's sender before the first is waited for. An error says that it ended.
        let ended: Vec<_> = lanes.into_iter().map(|lane| lane.ended).collect();
        futures_util::future::join_all(ended).await;
        Ok(())
    }
}

type Accepted = (std::net::TcpStream, OwnedSemaphorePermit);

/// Where connections run.
struct Lane {
    connections: mpsc::UnboundedSender<Accepted>,
    ended: oneshot::Receiver<()>,
}

/// What connections are served with.
#[derive(Clone)]
struct Door {
    router: Router,
    draining: Draining,
}

impl Lane {
    /// On this runtime.
    fn here(door: Door) -> Lane {
        let (connections, accepted) = mpsc::unbounded_channel();
        let (done, ended) = oneshot::channel();
        tokio::spawn(async move {
            door.serve(accepted).await;
            let _ = done.send(());
        });
        Lane { connections, ended }
    }

    /// On a thread of its own.
    fn thread(index: usize, door: Door) -> io::Result<Lane> {
        let (connections, accepted) = mpsc::unbounded_channel();
        let (done, ended) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::Builder::new().name(format!("lane-{index}")).spawn(move || {
            lane::enter(index);
            runtime.block_on(door.serve(accepted));
            let _ = done.send(());
        })?;
        Ok(Lane { connections, ended })
    }
}

impl Door {
    /// Serves what is accepted until nothing more can be, then lets it end.
    async fn serve(self, mut accepted: mpsc::UnboundedReceiver<Accepted>) {
        let graceful = GracefulShutdown::new();
        while let Some((stream, permit)) = accepted.recv().await {
            let stream = match TcpStream::from_std(stream) {
                Ok(stream) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot serve a connection");
                    continue;
                }
            };
            let draining = self.draining.clone();
            let service = self.router.clone().map_request(move |mut request: Request<_>| {
                request.extensions_mut().insert(draining.clone());
                request
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIME)
                .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
            let connection = graceful.watch(connection);
            tokio::spawn(async move {
                let _held = permit;
                if let Err(error) = connection.await {
                    tracing::debug!(%error, "connection ended");
                }
            });
        }
        if tokio::time::timeout(DRAIN_TIME, graceful.shutdown()).await.is_err() {
            tracing::warn!("some requests did not end in time; they are cut off");
        }
    }
}

/// The next connection. Failures to accept are the machine's (no descriptors left, for one) and pass.
async fn accept(listener: &TcpListener, connections: &Arc<Semaphore>) -> Accepted {
    let permit = connections.clone().acquire_owned().await.expect("the semaphore is never closed");
    loop {
        let accepted = listener.accept().await.and_then(|(stream, _)| {
            // A result must not wait for the last packet's acknowledgement: that is 40 ms.
            stream.set_nodelay(true)?;
            stream.into_std()
        });
        match accepted {
            Ok(stream) => return (stream, permit),
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}
