//! Two sides take turns under the same load; what counts is the median of their ratios.
//!
//! Interleaving is what makes the numbers worth something on a busy machine: whatever disturbs one side
//! disturbs the other half a second later. Every window has connections of its own: on which of two workers
//! a connection lands decides much of what it costs, and that shall not stay the same for a whole run.
//! Around every window the upstream's counters are read, and a wrong count is an error, however fast it was.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::ensure;

use crate::cases::Case;
use crate::load::{self, Connection, Errand};
use crate::measure::{Cpu, median, percentile};
use crate::request::{Ask, Endpoint};
use crate::stage::{Gateway, Stage, Subject};

/// How long and how often.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) rounds: usize,
    pub(crate) window: Duration,
    pub(crate) quick: bool,
}

/// One of the two compared: a process, an errand per connection, and what it may ask of the upstream.
pub(crate) struct Side {
    name: &'static str,
    pid: u32,
    errands: Vec<Errand>,
    method: &'static str,
    upstream_requests: u64,
}

/// What one side cost over all rounds.
pub(crate) struct Cost {
    /// Of the proxy's process, per request, in µs: the median round.
    pub(crate) cpu: f64,
    pub(crate) p50: Duration,
    pub(crate) p99: Duration,
    /// Requests per second: the median round.
    pub(crate) rate: f64,
}

pub(crate) struct Comparison {
    pub(crate) first: Cost,
    pub(crate) second: Cost,
    /// CPU of the second over CPU of the first: the median of the rounds.
    pub(crate) ratio: f64,
}

type Counts = BTreeMap<String, u64>;

struct Window {
    cpu: f64,
    rate: f64,
    latencies: Vec<Duration>,
    /// Upstream requests nobody asked for.
    strays: u64,
}

/// The blind proxy against `gateway` at one case.
pub(crate) async fn against_blind(
    stage: &Stage,
    gateway: &Gateway,
    case: &Case,
    plan: Plan,
) -> anyhow::Result<Comparison> {
    let path = case.fleet.as_seen(case.client).path();
    let blind = Endpoint { port: stage.blind.port(), path };
    // Behind the blind proxy stands a single upstream, so all its tools have the first one's prefix.
    let blind = Side::new("blind", stage.blind.pid(), &blind, case, |_| case.ask(0), |_| 1);
    let ours = Side::of_gateway(stage, gateway, case);
    compare(stage, blind, ours, plan).await
}

/// Lets both sides take turns, changing who goes first.
pub(crate) async fn compare(
    stage: &Stage,
    first: Side,
    second: Side,
    plan: Plan,
) -> anyhow::Result<Comparison> {
    let (mut ones, mut others) = (Vec::new(), Vec::new());
    for round in 0..plan.rounds {
        if round % 2 == 0 {
            ones.push(first.window(stage, plan.window).await?);
            others.push(second.window(stage, plan.window).await?);
        } else {
            others.push(second.window(stage, plan.window).await?);
            ones.push(first.window(stage, plan.window).await?);
        }
    }
    first.refuse_strays(&ones)?;
    second.refuse_strays(&others)?;
    let ratio = median(ones.iter().zip(&others).map(|(one, other)| other.cpu / one.cpu).collect());
    Ok(Comparison { first: Cost::of(ones), second: Cost::of(others), ratio })
}

// === impl Side ===

impl Side {
    /// A side that puts the case's load on `gateway`.
    pub(crate) fn of_gateway(stage: &Stage, gateway: &Gateway, case: &Case) -> Side {
        let endpoint = gateway.endpoint(case.client);
        let ask = |index| match stage.subject {
            Subject::Gateway(_) => case.ask(index),
            Subject::Blind => case.ask(0),
        };
        let allowed = |ask: &Ask| stage.upstream_requests_for(ask);
        Side::new("portcullis", gateway.process.pid(), &endpoint, case, ask, allowed)
    }

    fn new(
        name: &'static str,
        pid: u32,
        endpoint: &Endpoint,
        case: &Case,
        ask: impl Fn(usize) -> Ask,
        allowed: impl Fn(&Ask) -> u64,
    ) -> Side {
        let errand = |index| Errand {
            endpoint: endpoint.clone(),
            era: case.client,
            ask: ask(index),
            want: case.want(),
        };
        let errands = (0..case.connections).map(errand).collect();
        let ask = ask(0);
        Side { name, pid, errands, method: ask.method(), upstream_requests: allowed(&ask) }
    }

    async fn window(&self, stage: &Stage, window: Duration) -> anyhow::Result<Window> {
        let mut connections = Vec::with_capacity(self.errands.len());
        for errand in &self.errands {
            connections.push(Connection::open(errand).await?);
        }
        load::run(&mut connections, window / 10).await?;
        let before = counts(stage).await?;
        let cpu = Cpu::of(self.pid)?;
        let load = load::run(&mut connections, window).await?;
        let cpu = Cpu::of(self.pid)?.since(&cpu);
        let after = counts(stage).await?;
        let requests = load.latencies.len() as f64;
        ensure!(requests > 0.0, "no request fitted into the window");
        let strays = self.strays(&before, &after, load.latencies.len() as u64)?;
        for connection in connections {
            connection.close().await?;
        }
        Ok(Window {
            cpu: cpu.as_secs_f64() * 1e6 / requests,
            rate: requests / load.elapsed.as_secs_f64(),
            latencies: load.latencies,
            strays,
        })
    }

    /// Holds the upstream's counters against `requests` sent; what is beyond them is returned.
    fn strays(&self, before: &Counts, after: &Counts, requests: u64) -> anyhow::Result<u64> {
        let mut strays = 0;
        for (method, count) in after {
            let seen = count - before.get(method).unwrap_or(&0);
            let due = if method == self.method { requests * self.upstream_requests } else { 0 };
            let (name, asked) = (self.name, self.method);
            ensure!(
                due == 0 || seen == due,
                "{name} made {seen} {method} upstream for {requests} {asked}, {due} were due"
            );
            strays += seen - due;
        }
        Ok(strays)
    }

    /// A refresh may fall into one window; when every window has strays they belong to the work.
    fn refuse_strays(&self, windows: &[Window]) -> anyhow::Result<()> {
        let strays: Vec<u64> = windows.iter().map(|window| window.strays).collect();
        let (name, method) = (self.name, self.method);
        ensure!(
            strays.contains(&0),
            "{name} made upstream requests beyond those due for {method} in every round: {strays:?}"
        );
        Ok(())
    }
}

async fn counts(stage: &Stage) -> anyhow::Result<Counts> {
    let (_, body) = load::get(stage.upstream.port(), "/counts").await?;
    Ok(serde_json::from_slice(&body)?)
}

// === impl Cost ===

impl Cost {
    fn of(windows: Vec<Window>) -> Cost {
        let cpu = median(windows.iter().map(|window| window.cpu).collect());
        let rate = median(windows.iter().map(|window| window.rate).collect());
        let mut latencies: Vec<Duration> = windows.into_iter().flat_map(|window| window.latencies).collect();
        latencies.sort_unstable();
        let (p50, p99) = (percentile(&latencies, 0.5), percentile(&latencies, 0.99));
        Cost { cpu, p50, p99, rate }
    }
}
