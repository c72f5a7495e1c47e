//! Gateways, upstreams and clients for stories: `Gateway::with([("files", files.url())]).start().await`.

mod client;
mod fixture;
mod gateway;
mod upstream;
mod wire;

use std::time::Duration;

pub(crate) use client::{Legacy, META, Modern, names};
pub(crate) use fixture::Fixture;
pub(crate) use gateway::Gateway;
pub(crate) use upstream::{Probe, Script, Sent, Upstream, error, events, open_events, plain, result};
pub(crate) use wire::{Answer, Request, Stream};

/// Longer than anything here takes on a busy machine; only a story that fails waits so long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until it is so.
pub(crate) async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let until_so = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, until_so).await.is_ok(), "never came true: {what}");
}
