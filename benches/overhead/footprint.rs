//! What the daemon takes while it does nothing, and how soon it does something.

use std::time::{Duration, Instant};

use anyhow::ensure;
use memchr::memmem;

use crate::canned::{ASKS, Era, MARKER};
use crate::cases::Work;
use crate::load::Wire;
use crate::measure::{self, median};
use crate::request::{Ask, FIRST_ID, Request};
use crate::rounds::Plan;
use crate::stage::{Fleet, Gateway, Stage};

const FLEET: Fleet = Fleet { era: Era::Modern, upstreams: 1, tools: 10, hidden: 0 };
const PATIENCE: Duration = Duration::from_secs(10);

/// Resident bytes of a gateway that was started on a warm registry and left alone.
pub(crate) async fn idle(stage: &Stage, plan: Plan) -> anyhow::Result<u64> {
    let mut gateway = stage.gateway(FLEET).await?;
    gateway.process.stop()?;
    gateway.process = stage.start(gateway.folder())?;
    tokio::time::sleep(Duration::from_millis(if plan.quick { 500 } else { 5_000 })).await;
    gateway.check()?;
    measure::rss(gateway.process.pid())
}

/// From exec to the first successful call, on a warm registry: the median of five starts, in ms.
pub(crate) async fn start(stage: &Stage, plan: Plan) -> anyhow::Result<f64> {
    let mut gateway = stage.gateway(FLEET).await?;
    let mut times = Vec::new();
    for _ in 0..if plan.quick { 1 } else { 5 } {
        gateway.process.stop()?;
        let start = Instant::now();
        gateway.process = stage.start(gateway.folder())?;
        while !tokio::time::timeout(PATIENCE, call(&gateway)).await?.unwrap_or(false) {
            gateway.check()?;
            ensure!(start.elapsed() < PATIENCE, "no call succeeded within {PATIENCE:?} of the start");
            tokio::time::sleep(Duration::from_micros(300)).await;
        }
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    Ok(median(times))
}

/// Bytes that 1,000 parked calls take: those of a modern client on a legacy upstream that asks it something.
pub(crate) async fn parked(stage: &Stage, plan: Plan) -> anyhow::Result<f64> {
    let gateway = stage.gateway(Fleet { era: Era::Legacy, ..FLEET }).await?;
    let endpoint = gateway.endpoint(Era::Modern);
    let ask = Ask::Question(Fleet::exposed(0, ASKS));
    let mut wire = Wire::connect(endpoint.port).await?;
    let mut park = async |calls: u64| -> anyhow::Result<u64> {
        let mut request = Request::new(&endpoint, Era::Modern, None, &ask);
        for call in 0..calls {
            let answer = wire.exchange(request.with_id(FIRST_ID + call)).await?;
            let waits = memmem::find(answer.body, b"input_required").is_some();
            ensure!(waits, "not parked: {} {}", answer.status, String::from_utf8_lossy(answer.body));
        }
        measure::rss(gateway.process.pid())
    };
    // The first hundred pay for what is paid once.
    let before = park(100).await?;
    let calls = if plan.quick { 100 } else { 1_000 };
    let after = park(calls).await?;
    Ok(after.saturating_sub(before) as f64 / calls as f64 * 1_000.0)
}

/// Tries one call on a new connection; until the socket listens, this fails.
async fn call(gateway: &Gateway) -> anyhow::Result<bool> {
    let endpoint = gateway.endpoint(Era::Modern);
    let mut wire = Wire::connect(endpoint.port).await?;
    let mut request = Request::new(&endpoint, Era::Modern, None, &Work::Small.ask(&FLEET, 0));
    let answer = wire.exchange(request.with_id(FIRST_ID)).await?;
    Ok(answer.status == 200 && memmem::find(answer.body, MARKER.as_bytes()).is_some())
}
