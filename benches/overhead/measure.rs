//! What the kernel knows of a process: CPU time to the nanosecond, resident memory; and the machine's name.

use std::collections::HashMap;
use std::fs;
use std::time::Duration;

use anyhow::Context;

/// CPU time used so far, by thread.
pub(crate) struct Cpu(HashMap<String, u64>);

// === impl Cpu ===

impl Cpu {
    /// Reads the clock of every thread of `pid`: `schedstat` counts nanoseconds where `stat` counts 10 ms ticks.
    pub(crate) fn of(pid: u32) -> anyhow::Result<Cpu> {
        let mut threads = HashMap::new();
        for task in fs::read_dir(format!("/proc/{pid}/task")).context("the process is gone")? {
            let task = task?;
            // A thread may end between listing and reading.
            let Ok(text) = fs::read_to_string(task.path().join("schedstat")) else { continue };
            let nanos = text.split_whitespace().next().context("schedstat is empty")?.parse()?;
            threads.insert(task.file_name().to_string_lossy().into_owned(), nanos);
        }
        Ok(Cpu(threads))
    }

    /// The time used since `before`. Threads that ended in between are missed; workers do not end.
    pub(crate) fn since(&self, before: &Cpu) -> Duration {
        let used = |(thread, nanos): (&String, &u64)| nanos - before.0.get(thread).unwrap_or(&0).min(nanos);
        Duration::from_nanos(self.0.iter().map(used).sum())
    }
}

/// Resident memory of `pid` in bytes.
pub(crate) fn rss(pid: u32) -> anyhow::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).context("the process is gone")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib * 1024)
}

/// One line about the machine: a number means nothing without it.
pub(crate) fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name| info.lines().find(|line| line.starts_with(name))?.split(": ").nth(1);
    let model = field("model name").unwrap_or("unknown CPU");
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!("{cores} cores, {model}, Linux {}", kernel.trim())
}

/// The middle of `values`; NaN when there are none.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The value below which `share` of the sorted `values` lie.
pub(crate) fn percentile(values: &[Duration], share: f64) -> Duration {
    let at = (values.len() as f64 * share) as usize;
    values.get(at.min(values.len().saturating_sub(1))).copied().unwrap_or_default()
}
