//! The task behind each upstream: connect, list, listen, and again.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use futures_util::{FutureExt as _, StreamExt as _};
use serde_json::json;
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};
use tower::ServiceExt as _;

use super::{Catalog, Shared, Upstream};
use crate::{
    BoxError, BoxMcpService, McpService as _,
    error::Chain,
    error::{Fault, UpstreamError},
    protocol::{Frame, FrameStream, McpRequest, Method, Params, Payload},
};

const FIRST_WAIT: Duration = Duration::from_millis(250);
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// An upstream that does not even acknowledge a subscription has none.
const LISTEN_WITHIN: Duration = Duration::from_secs(5);
/// Changes that come sooner after a listing than this may come of it.
const SOON: Duration = Duration::from_secs(2);
/// Several changes in a row are one.
const DEBOUNCE: Duration = Duration::from_millis(50);

/// Clients' failed requests cause no more listing than this.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// How an upstream is.
#[derive(Clone, Debug)]
pub struct Status {
    /// In what state.
    pub kind: StatusKind,
    /// How often its catalog was listed.
    pub listed: u64,
    /// How often that was tried.
    pub tried: u64,
}

/// The states of an upstream.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StatusKind {
    /// Not tried yet.
    Connecting,
    /// It answers.
    Up,
    /// It does not; its last-known catalog is listed.
    Down {
        /// Why, for the operator.
        error: String,
    },
}

impl Status {
    pub(super) fn connecting() -> Self {
        Status { kind: StatusKind::Connecting, listed: 0, tried: 0 }
    }
}

impl fmt::Display for StatusKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StatusKind::Connecting => f.write_str("connecting"),
            StatusKind::Up => f.write_str("up"),
            StatusKind::Down { error } => write!(f, "down: {error}"),
        }
    }
}

/// Runs until it is aborted: when the upstream is removed or replaced, or the gateway is gone.
pub(super) async fn run(shared: Weak<Shared>, upstream: Arc<Upstream>) {
    let (mut wait, mut pause) = (FIRST_WAIT, Duration::ZERO);
    loop {
        let listed = Instant::now();
        let outcome = match list_and_listen(&shared, &upstream).await {
            Ok(changes) => {
                let Some(every) = shared.upgrade().map(|s| s.refresh_every) else { return };
                tokio::select! {
                    ended = until_changed(changes, every) => ended,
                    () = upstream.refresh.notified() => Next::List,
                }
            }
            Err(error) => {
                report_down(&upstream, &error);
                Next::Wait
            }
        };
        match outcome {
            Next::List => {
                wait = FIRST_WAIT;
                // One that changes whenever it is listed is not listed all the time.
                pause = if listed.elapsed() < SOON {
                    (pause * 2).clamp(DEBOUNCE, LONGEST_WAIT)
                } else {
                    Duration::ZERO
                };
                let _ = tokio::time::timeout(pause, upstream.refresh.notified()).await;
            }
            Next::Wait => {
                // The one who asks does not wait.
                let _ = tokio::time::timeout(wait, upstream.refresh.notified()).await;
                wait = (wait * 2).min(LONGEST_WAIT);
            }
        }
    }
}

/// The service, with an ear for its failures: an upstream that was up and cannot be reached is listed again as soon as
/// it is back, for it may not be what it was. Many have no stream whose end would tell.
pub(super) fn heard(
    service: BoxMcpService,
    status: watch::Sender<Status>,
    refresh: Arc<Notify>,
) -> BoxMcpService {
    let told = Arc::new(Mutex::new(None::<Instant>));
    let hear = move |error: BoxError| {
        let gone = error.downcast_ref().is_some_and(|e: &UpstreamError| e.fault == Fault::Unreachable);
        if gone && status.borrow().kind == StatusKind::Up {
            let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
            if told.is_none_or(|at| at.elapsed() >= TELL_EVERY) {
                *told = Some(Instant::now());
                refresh.notify_one();
            }
        }
        error
    };
    service.map_err(hear).boxed_mcp()
}

/// Opens a stream of changes, when the upstream has one, and lists once. In this order: a change between listing
/// and listening would be lost.
async fn list_and_listen(
    shared: &Weak<Shared>,
    upstream: &Arc<Upstream>,
) -> Result<Option<FrameStream>, BoxError> {
    // Only now begins what the stream may take: a program that is being downloaded must not lose it.
    upstream.service.clone().oneshot(McpRequest::bare(Method::Discover)).await?;
    let changes = tokio::time::timeout(LISTEN_WITHIN, listen(upstream)).await.ok().flatten();
    let catalog = Catalog::fetch(&upstream.name, &upstream.service).await?;
    if let Some(shared) = shared.upgrade() {
        adopt(&shared, upstream, catalog);
    }
    Ok(changes)
}

/// Makes a fetched catalog the one in force.
fn adopt(shared: &Shared, upstream: &Arc<Upstream>, catalog: Catalog) {
    let was_up = upstream.status.borrow().kind == StatusKind::Up;
    let changed = *upstream.catalog.load_full() != catalog;
    if changed {
        let upstreams = shared.lock();
        if !upstreams.iter().any(|current| Arc::ptr_eq(current, upstream)) {
            // It was removed or replaced meanwhile, and this is nobody's catalog any more.
            return;
        }
        if let Some(store) = &shared.store {
            store.save(&upstream.name, &catalog.to_record());
        }
        upstream.catalog.store(Arc::new(catalog));
        shared.publish(&upstreams);
    }
    if !was_up {
        tracing::info!(upstream = %upstream.name, "upstream is up");
    }
    upstream.status.send_modify(|status| {
        status.kind = StatusKind::Up;
        status.listed += 1;
        status.tried += 1;
    });
}

async fn listen(upstream: &Upstream) -> Option<FrameStream> {
    let filter = json!({ "notifications": {
        "toolsListChanged": true, "promptsListChanged": true, "resourcesListChanged": true,
    }});
    let request = McpRequest::new(Method::Listen, Params::from_value(&filter));
    match upstream.service.clone().oneshot(request).await.map(|r| r.into_payload()) {
        Ok(Payload::Stream(frames)) => Some(frames),
        Ok(_) => None,
        Err(error) => {
            tracing::debug!(upstream = %upstream.name, %error, "no stream of changes");
            None
        }
    }
}

enum Next {
    /// List again now.
    List,
    /// List again after a while.
    Wait,
}

/// Waits for a change, the end of the stream or the clock, whichever is first.
async fn until_changed(changes: Option<FrameStream>, every: Duration) -> Next {
    let started = Instant::now();
    let changed = async {
        let Some(mut changes) = changes else { return std::future::pending().await };
        while let Some(Ok(frame)) = changes.next().await {
            match frame {
                Frame::Notification(n) if n.method != Method::Acknowledged => {
                    // Drain what comes right behind it.
                    tokio::time::sleep(DEBOUNCE).await;
                    while let Some(Some(Ok(Frame::Notification(_)))) = changes.next().now_or_never() {}
                    return Next::List;
                }
                Frame::Notification(_) | Frame::Request(_) => {}
                Frame::Final(_) => break,
            }
        }
        // The connection ended, or the upstream stopped telling. One that does so at once is not asked at once.
        if started.elapsed() > LONGEST_WAIT { Next::List } else { Next::Wait }
    };
    tokio::time::timeout(every, changed).await.unwrap_or(Next::List)
}

fn report_down(upstream: &Upstream, error: &BoxError) {
    let text = Chain(&**error).to_string();
    upstream.status.send_modify(|status| {
        status.tried += 1;
        let down = StatusKind::Down { error: text.clone() };
        if status.kind != down {
            tracing::warn!(upstream = %upstream.name, error = text, "upstream is down");
            status.kind = down;
        }
    });
}
