//! What governing costs: Portcullis beside a blind byte proxy, in one run, on one machine.
//!
//! ```text
//! cargo bench --bench overhead                        # everything, about ten minutes
//! cargo bench --bench overhead -- --quick             # a smoke of a minute
//! cargo bench --bench overhead -- --only "small call" # cases whose title contains the words
//! cargo bench --bench overhead -- --markdown          # tables for the README
//! cargo bench --bench overhead -- --gateway PATH      # another binary, such as target/release/portcullis
//! cargo bench --bench overhead -- --self-check        # blind beside blind: every ratio must be about 1
//! ```
//!
//! Four processes take part: this one (the load), a canned upstream, a blind hyper proxy, the gateway. The
//! two proxies take turns under the same load and their CPU time per request is compared. Only ratios to the
//! blind proxy are claims. A missed aim is marked in the table; wrong answers and wrong counts of upstream
//! requests (one per call, none per list) end with exit code 1.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::signal::unix::{SignalKind, signal};

use crate::canned::Era;
use crate::cases::Case;
use crate::report::Report;
use crate::rounds::{Comparison, Plan};
use crate::stage::{Gateway, Stage, Subject};

mod blind;
mod canned;
mod cases;
mod footprint;
mod growth;
mod load;
mod measure;
mod process;
mod report;
mod request;
mod rounds;
mod stage;
mod upstream;

const SESSIONS: &str = "idle legacy sessions";
const IDLE: &str = "RSS of an idle daemon";
const PARKED: &str = "1,000 parked calls";
const START: &str = "exec to first successful call, warm registry";

fn main() -> anyhow::Result<ExitCode> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["upstream", listeners] => upstream::main(listeners.parse()?)?,
        ["blind", upstream] => blind::main(upstream.parse()?)?,
        _ => return bench(Args::read(words)?),
    }
    Ok(ExitCode::SUCCESS)
}

fn bench(args: Args) -> anyhow::Result<ExitCode> {
    if !args.bench {
        println!("nothing to test here; run it with: cargo bench --bench overhead");
        return Ok(ExitCode::SUCCESS);
    }
    // One thread: the load shall take as little of the machine as it can.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let report = runtime.block_on(async {
        let (mut interrupt, mut terminate) =
            (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        // Whoever leaves this block drops the stage, and the stage takes its processes along.
        tokio::select! {
            report = run(&args) => report,
            _ = interrupt.recv() => bail!("interrupted"),
            _ = terminate.recv() => bail!("terminated"),
        }
    })?;
    println!("{}", measure::machine());
    println!("{}, rounds of {:?} a side: {}\n", args.subject, args.plan.window, args.plan.rounds);
    print!("{}", report.render(args.markdown));
    for failure in report.failures() {
        println!("FAILED {failure}");
    }
    Ok(if report.failures().is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

struct Args {
    /// Cargo says so; without it we are being run as a test.
    bench: bool,
    markdown: bool,
    only: String,
    subject: Subject,
    plan: Plan,
}

async fn run(args: &Args) -> anyhow::Result<Report> {
    let stage = Stage::new(args.subject.clone())?;
    let mut report = Report::default();
    cases(&stage, args, &mut report).await;
    for growth in growth::all().into_iter().filter(|growth| args.wants(growth.title)) {
        tell(growth.title);
        match bounded(growth.measure(&stage, args.plan)).await {
            Ok(measured) => report.growth(growth.title, &measured, growth::AIM),
            Err(error) => report.failure(growth.title, &error),
        }
    }
    for upstream in [Era::Modern, Era::Legacy] {
        let title = format!("{upstream} client to {} client, {upstream} upstream", upstream.other());
        if args.wants(&title) {
            tell(&title);
            match bounded(growth::bridged(&stage, upstream, args.plan)).await {
                Ok(measured) => report.growth(&title, &measured, growth::BRIDGE_AIM),
                Err(error) => report.failure(&title, &error),
            }
        }
    }
    if args.wants(SESSIONS) {
        sessions(&stage, args.plan, &mut report).await;
    }
    if args.wants(IDLE) {
        tell(IDLE);
        match bounded(footprint::idle(&stage, args.plan)).await {
            Ok(bytes) => report.figure(IDLE, bytes as f64 / 1024.0 / 1024.0, 12.0, "MiB"),
            Err(error) => report.failure(IDLE, &error),
        }
    }
    if args.wants(PARKED) {
        tell(PARKED);
        match bounded(footprint::parked(&stage, args.plan)).await {
            Ok(bytes) => report.figure(PARKED, bytes / 1024.0 / 1024.0, 8.0, "MiB"),
            Err(error) => report.failure(PARKED, &error),
        }
    }
    if args.wants(START) {
        tell(START);
        match bounded(footprint::start(&stage, args.plan)).await {
            Ok(millis) => report.figure(START, millis, 50.0, "ms"),
            Err(error) => report.failure(START, &error),
        }
    }
    Ok(report)
}

/// The table of cases; a gateway serves all neighbouring cases with its fleet.
async fn cases(stage: &Stage, args: &Args, report: &mut Report) {
    let mut current: Option<Gateway> = None;
    for case in cases::all(args.plan.quick).iter().filter(|case| args.wants(&case.title)) {
        tell(&format!("{}, {} connections", case.title, case.connections));
        match bounded(compare(stage, &mut current, case, args.plan)).await {
            Ok(measured) => report.cost(case, &measured),
            Err(error) => {
                report.failure(&format!("{}, {} connections", case.title, case.connections), &error)
            }
        }
    }
}

async fn compare(
    stage: &Stage,
    current: &mut Option<Gateway>,
    case: &Case,
    plan: Plan,
) -> anyhow::Result<Comparison> {
    let gateway = match current.take().filter(|gateway| gateway.fleet == case.fleet) {
        Some(gateway) => gateway,
        None => stage.gateway(case.fleet).await.context("the gateway does not come up")?,
    };
    rounds::against_blind(stage, current.insert(gateway), case, plan).await
}

async fn sessions(stage: &Stage, plan: Plan, report: &mut Report) {
    tell(SESSIONS);
    match bounded(growth::sessions(stage, plan)).await {
        Ok(sessions) => {
            let title = format!("none to {} {SESSIONS}", sessions.count);
            report.growth(&title, &sessions.calls, growth::AIM);
            let title = format!("memory per idle {} session", Era::Legacy);
            report.figure(&title, sessions.bytes_each / 1024.0, 4.0, "KiB");
        }
        Err(error) => report.failure(SESSIONS, &error),
    }
}

/// Nothing here takes five minutes unless it hangs.
async fn bounded<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::time::timeout(Duration::from_secs(300), work).await.context("nothing came for five minutes")?
}

fn tell(what: &str) {
    eprintln!("  {what}");
}

// === impl Args ===

impl Args {
    fn read(words: Vec<String>) -> anyhow::Result<Args> {
        let mut args = Args {
            bench: false,
            markdown: false,
            only: String::new(),
            subject: Subject::Gateway(PathBuf::from(env!("CARGO_BIN_EXE_portcullis"))),
            plan: Plan { rounds: 9, window: Duration::from_millis(500), quick: false },
        };
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            let mut value = || words.next().with_context(|| format!("{word} needs a value"));
            match word.as_str() {
                "--bench" => args.bench = true,
                "--markdown" => args.markdown = true,
                "--quick" => args.plan = Plan { rounds: 1, window: Duration::from_millis(150), quick: true },
                "--only" => args.only = value()?,
                "--gateway" => args.subject = Subject::Gateway(value()?.into()),
                "--self-check" => args.subject = Subject::Blind,
                _ => bail!("unknown argument {word:?}"),
            }
        }
        Ok(args)
    }

    fn wants(&self, title: &str) -> bool {
        title.contains(&self.only)
    }
}
