//! What a call costs when there is more of everything: upstreams, tools, idle sessions.
//!
//! Two gateways of different size run side by side and take turns under the same load.

use anyhow::Context;
use futures_util::TryStreamExt;
use futures_util::stream::FuturesUnordered;

use crate::canned::Era;
use crate::cases::{Case, USUAL, Work, fleet};
use crate::load::{self, Wire};
use crate::measure;
use crate::request::Endpoint;
use crate::rounds::{self, Comparison, Plan, Side};
use crate::stage::{Fleet, Gateway, Stage};

/// A call on a small gateway may cost so much more on a big one.
pub(crate) const AIM: f64 = 1.1;

/// A call that is bridged may cost so much more than one that stays in its era.
pub(crate) const BRIDGE_AIM: f64 = 1.15;

/// Connections over which idle sessions are opened.
const OPENERS: usize = 16;

/// A pair of gateways to compare.
pub(crate) struct Growth {
    pub(crate) title: &'static str,
    small: Fleet,
    big: Fleet,
}

pub(crate) fn all() -> [Growth; 2] {
    let modern = |upstreams, tools| fleet(Era::Modern, upstreams, tools);
    [
        Growth { title: "1 to 50 upstreams of 20 tools", small: modern(1, 20), big: modern(50, 20) },
        Growth { title: "10 to 1,000 tools", small: modern(1, 10), big: modern(1, 1000) },
    ]
}

/// What idle sessions cost.
pub(crate) struct Sessions {
    pub(crate) count: usize,
    pub(crate) bytes_each: f64,
    pub(crate) calls: Comparison,
}

// === impl Growth ===

impl Growth {
    pub(crate) async fn measure(&self, stage: &Stage, plan: Plan) -> anyhow::Result<Comparison> {
        let small = stage.gateway(self.small).await?;
        let big = stage.gateway(self.big).await?;
        calls(stage, &small, &big, plan).await
    }
}

/// Calls of clients of the upstream's own era, and of the other, on one gateway.
pub(crate) async fn bridged(stage: &Stage, upstream: Era, plan: Plan) -> anyhow::Result<Comparison> {
    let fleet = fleet(upstream, 1, 10);
    let gateway = stage.gateway(fleet).await?;
    let side =
        |client| Side::of_gateway(stage, &gateway, &Case::new(fleet, client, Work::Small, USUAL, None));
    rounds::compare(stage, side(upstream), side(upstream.other()), plan).await
}

/// The same gateway without and with idle legacy sessions, over a legacy upstream (the harder kind).
pub(crate) async fn sessions(stage: &Stage, plan: Plan) -> anyhow::Result<Sessions> {
    let legacy = fleet(Era::Legacy, 1, 10);
    let (without, with) = (stage.gateway(legacy).await?, stage.gateway(legacy).await?);
    let count = if plan.quick { 1_000 } else { 10_000 };
    let endpoint = with.endpoint(Era::Legacy);
    // The first hundred pay for what is paid once.
    let first = 100;
    open_sessions(&endpoint, first).await?;
    let before = measure::rss(with.process.pid())?;
    open_sessions(&endpoint, count - first).await.context("opening idle sessions")?;
    let after = measure::rss(with.process.pid())?;
    let bytes_each = after.saturating_sub(before) as f64 / (count - first) as f64;
    let calls = calls(stage, &without, &with, plan).await?;
    Ok(Sessions { count, bytes_each, calls })
}

async fn calls(stage: &Stage, small: &Gateway, big: &Gateway, plan: Plan) -> anyhow::Result<Comparison> {
    rounds::compare(stage, side(stage, small), side(stage, big), plan).await
}

/// Small calls by clients of the fleet's own era.
fn side(stage: &Stage, gateway: &Gateway) -> Side {
    let case = Case::new(gateway.fleet, gateway.fleet.era, Work::Small, USUAL, None);
    Side::of_gateway(stage, gateway, &case)
}

async fn open_sessions(endpoint: &Endpoint, count: usize) -> anyhow::Result<()> {
    let share = |opener: usize| count / OPENERS + usize::from(opener < count % OPENERS);
    let openers: FuturesUnordered<_> =
        (0..OPENERS).map(|opener| opener_of(endpoint, share(opener))).collect();
    openers.try_collect().await
}

async fn opener_of(endpoint: &Endpoint, count: usize) -> anyhow::Result<()> {
    let mut wire = Wire::connect(endpoint.port).await?;
    for opened in 0..count {
        load::open_session(&mut wire, endpoint).await.with_context(|| format!("after {opened} sessions"))?;
    }
    Ok(())
}
