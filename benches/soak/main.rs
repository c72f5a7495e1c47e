//! A hundred thousand calls over a thousand sessions, by clients that vanish in the middle of a call, and what is left
//! of it: no crossed reply, no child, no session, no descriptor, no memory.
//!
//! ```text
//! cargo bench --bench soak                       # about two minutes
//! cargo bench --bench soak -- --calls 20         # calls of each client, instead of 84
//! cargo bench --bench soak -- --rounds 5         # more of the same, to see where the memory goes
//! cargo bench --bench soak -- --gateway PATH     # another binary
//! ```
//!
//! The daemon is the release binary, in a process of its own and watched from outside. This process plays the clients
//! and the upstreams over HTTP; two children of the daemon are this program again, as servers on stdio.
//!
//! Two short rounds and a long one warm it up, and another long one follows. What the daemon holds after that is compared
//! with what it held before: a leak of one of anything in a call would show. Ends with `N passed, M failed`.

mod child;
mod client;
mod daemon;
mod upstream;

use std::{
    path::PathBuf,
    process::ExitCode,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    client::{Fate, Ledger, Session, Worker},
    daemon::Daemon,
    upstream::{Era, Upstream},
};

const WORKERS: usize = 100;
/// Legacy sessions of each worker, and clients without a session.
const SESSIONS: usize = 10;
const MODERN: usize = 2;
/// What each of the 1,200 clients calls.
const CALLS: usize = 84;
const WARM_UP: usize = 20;
/// How much memory the long round may leave. Nothing grows with the number of calls; what differs is how the allocator's
/// free blocks lie (measured: 0 to 2 MiB from one long round to the next). 40 bytes kept by each call would be more than this.
const MARGIN: u64 = 4 << 20;
/// Upstream sessions whose clients are gone are ended every 30 s.
const SWEPT: Duration = Duration::from_secs(50);

fn main() -> Result<ExitCode> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let [role, era] = &words[..]
        && role == "child"
    {
        child::main(era == "modern")?;
        return Ok(ExitCode::SUCCESS);
    }
    let args = Args::read(words)?;
    if !args.bench {
        println!("nothing to test here; run it with: cargo bench --bench soak");
        return Ok(ExitCode::SUCCESS);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let (mut interrupt, mut terminate) =
            (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        // Whoever leaves this block drops the daemon, and it takes its children along.
        tokio::select! {
            outcome = soak(args) => outcome,
            _ = interrupt.recv() => bail!("interrupted"),
            _ = terminate.recv() => bail!("terminated"),
        }
    })
}

struct Args {
    /// Cargo says so; without it we are being run as a test.
    bench: bool,
    calls: usize,
    rounds: usize,
    gateway: PathBuf,
}

impl Args {
    fn read(words: Vec<String>) -> Result<Args> {
        let gateway = PathBuf::from(env!("CARGO_BIN_EXE_portcullis"));
        let mut args = Args { bench: false, calls: CALLS, rounds: 2, gateway };
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            let mut value = || words.next().with_context(|| format!("{word} needs a value"));
            match word.as_str() {
                "--bench" => args.bench = true,
                "--calls" => args.calls = value()?.parse()?,
                "--rounds" => args.rounds = value()?.parse()?,
                "--gateway" => args.gateway = value()?.into(),
                _ => bail!("unknown argument {word:?}"),
            }
        }
        Ok(args)
    }
}

/// Everything that takes part.
struct Stage {
    daemon: Daemon,
    old: Arc<Upstream>,
    new: Arc<Upstream>,
    ledger: Arc<Ledger>,
}

/// What the daemon holds when nobody asks it anything.
struct Rest {
    descriptors: usize,
    children: Vec<u32>,
    resident: u64,
}

async fn soak(args: Args) -> Result<ExitCode> {
    let began = Instant::now();
    let (old, new) = (Upstream::start(Era::Legacy).await?, Upstream::start(Era::Modern).await?);
    let servers = [("old", old.port), ("new", new.port)];
    let daemon = Daemon::start(&args.gateway, &servers, &["kid", "pup"]).await?;
    let stage = Stage { daemon, old, new, ledger: Arc::default() };
    let first = stage.rest(None).await?;

    // Once with those who are forgotten left alone for a while, once as it will be.
    let forgotten = stage.round("first", WARM_UP).await?;
    stage.check_upstream_sessions(&forgotten).await?;
    stage.end(forgotten).await?;
    let mut last = stage.whole_round("second", WARM_UP, &first).await?;
    let mut warm = last.resident;
    tell(began, &format!("warmed up: {:.1} MiB resident", mib(warm)));
    for round in 0..args.rounds {
        last = stage.whole_round(&format!("main{round}"), args.calls, &first).await?;
        let calls = stage.ledger.calls.load(Relaxed);
        tell(began, &format!("{calls} calls: {:.1} MiB resident", mib(last.resident)));
        if round == 0 {
            // As many sessions as in the rounds to come.
            warm = last.resident;
        }
    }
    stage.report(&first, warm, &last)
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn tell(began: Instant, what: &str) {
    eprintln!("  {:>4.0} s  {what}", began.elapsed().as_secs_f64());
}

impl Stage {
    /// All clients at once: they open their sessions, call, and go in their several ways. Gives the sessions that
    /// nobody ended.
    async fn round(&self, name: &str, calls: usize) -> Result<Vec<Session>> {
        let upstreams = [self.old.clone(), self.new.clone()];
        let mut workers = tokio::task::JoinSet::new();
        // No two nonces are the same, in no two rounds.
        let first = self.ledger.calls.load(Relaxed);
        for n in 0..WORKERS {
            let number = first + n as u64;
            let mut worker = Worker::new(self.daemon.port, number, upstreams.clone(), self.ledger.clone());
            let name = name.to_owned();
            workers.spawn(async move {
                let mut sessions = Vec::new();
                for s in 0..SESSIONS + MODERN {
                    // Of twenty sessions two are forgotten, and one is ended in the middle of a call.
                    let fate = match (n * SESSIONS + s) % 20 {
                        3 | 13 => Fate::Forgotten,
                        7 => Fate::EndedInACall,
                        _ => Fate::Ended,
                    };
                    sessions.push(match s < SESSIONS {
                        true => worker.open(format!("{name}-{n}-{s}"), fate).await?,
                        false => Session::modern(),
                    });
                }
                for _ in 0..calls {
                    for session in &mut sessions {
                        worker.call(session).await?;
                    }
                }
                let mut forgotten = Vec::new();
                for session in sessions {
                    forgotten.extend(worker.leave(session).await?);
                }
                anyhow::Ok(forgotten)
            });
        }
        let mut forgotten = Vec::new();
        while let Some(worker) = workers.join_next().await {
            forgotten.extend(worker??);
        }
        Ok(forgotten)
    }

    /// A round after which nobody has a session.
    async fn whole_round(&self, name: &str, calls: usize, first: &Rest) -> Result<Rest> {
        let forgotten = self.round(name, calls).await?;
        self.end(forgotten).await?;
        self.check_upstream_sessions(&[]).await?;
        self.rest(Some(first)).await
    }

    /// Does at once what the daemon would do after four idle hours.
    async fn end(&self, forgotten: Vec<Session>) -> Result<()> {
        let upstreams = [self.old.clone(), self.new.clone()];
        let mut worker = Worker::new(self.daemon.port, 0, upstreams, self.ledger.clone());
        for session in forgotten {
            worker.end(&session).await?;
        }
        Ok(())
    }

    /// Of those who ended their sessions nothing is left at the upstream; those who just went may come back.
    async fn check_upstream_sessions(&self, forgotten: &[Session]) -> Result<()> {
        let kept = |owner: &str| owner == upstream::SHARED || forgotten.iter().any(|s| s.owner == owner);
        until(SWEPT, "the sessions that were ended are ended at the upstream", || {
            self.old.owners().iter().all(|owner| kept(owner))
        })
        .await?;
        let left = self.old.owners();
        for session in forgotten {
            ensure!(left.contains(&session.owner), "{}, which nobody ended, is gone", session.owner);
        }
        Ok(())
    }

    /// Waits until everything is as it was, and looks.
    async fn rest(&self, first: Option<&Rest>) -> Result<Rest> {
        until(SWEPT, "no call is under way", || self.old.under_way() + self.new.under_way() == 0).await?;
        // Idle connections are not counted, which the daemon keeps for a minute; new ones may just have been made.
        let (mut last, mut same) = (0, 0);
        let settled = || {
            self.old.hang_up();
            self.new.hang_up();
            let now = self.daemon.descriptors().unwrap_or_default();
            same = if std::mem::replace(&mut last, now) == now { same + 1 } else { 0 };
            same >= 10 && first.is_none_or(|first| now <= first.descriptors)
        };
        // What does not come true is reported in the end, with numbers.
        until(Duration::from_secs(10), "descriptors settle", settled).await.ok();
        Ok(Rest {
            descriptors: self.daemon.descriptors()?,
            children: self.daemon.children()?,
            resident: self.daemon.memory("VmRSS:")?,
        })
    }

    fn report(&self, first: &Rest, warm: u64, last: &Rest) -> Result<ExitCode> {
        let (ledger, old) = (&*self.ledger, &*self.old);
        let read = |counter: &std::sync::atomic::AtomicU64| counter.load(Relaxed);
        println!("{} calls over {} sessions", read(&ledger.calls), read(&ledger.sessions));
        println!("  {} answered, {} of them with progress", read(&ledger.answered), read(&ledger.streamed));
        println!(
            "  {} left by a client that vanished, {} cancelled",
            read(&ledger.vanished),
            read(&ledger.cancelled)
        );
        println!("  {} sessions ended in a call, {} forgotten", read(&ledger.cut), read(&ledger.forgotten));
        println!("upstream sessions: {} opened, {} ended", read(&old.opened), read(&old.ended));
        println!("connections to an upstream: {} at most", old.most_connections());
        println!("descriptors: {} at first, {} last", first.descriptors, last.descriptors);
        println!("children: {:?} at first, {:?} last", first.children, last.children);
        println!(
            "resident: {:.1} MiB at first, {:.1} warm, {:.1} last, {:.1} at most",
            mib(first.resident),
            mib(warm),
            mib(last.resident),
            mib(self.daemon.memory("VmHWM:")?)
        );
        for trouble in ledger.troubles.lock().expect("no panic").iter().take(10) {
            println!("  {trouble}");
        }
        let checks = [
            ("no reply went to somebody else", read(&ledger.crossed) == 0),
            ("no reply was lost", read(&ledger.lost) == 0),
            ("no session was used for two clients", read(&old.crossed) == 0),
            ("no call came on a session that was over", read(&old.strangers) == 0),
            ("cancelled calls were cancelled at the upstream", old.cancels() >= read(&ledger.told)),
            ("upstream sessions ended", read(&old.opened) - read(&old.ended) == old.owners().len() as u64),
            (
                "ending sessions opened no more connections than calling",
                old.most_connections() <= 3 * WORKERS,
            ),
            ("no descriptor is left", last.descriptors <= first.descriptors),
            ("the children are the same", last.children == first.children && !first.children.is_empty()),
            ("the memory is back", last.resident <= warm + MARGIN),
        ];
        for (what, so) in checks {
            println!("{} {what}", if so { "ok    " } else { "FAILED" });
        }
        let passed = checks.iter().filter(|(_, so)| *so).count();
        println!("{passed} passed, {} failed", checks.len() - passed);
        Ok(if passed == checks.len() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// Waits until it is so.
async fn until(limit: Duration, what: &str, mut is_so: impl FnMut() -> bool) -> Result<()> {
    let began = Instant::now();
    while !is_so() {
        ensure!(began.elapsed() < limit, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}
