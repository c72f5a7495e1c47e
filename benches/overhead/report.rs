//! The tables: plain for the terminal, Markdown for the README. Misses are marked, not hidden.

use std::time::Duration;

use crate::cases::Case;
use crate::rounds::Comparison;

const COSTS: [&str; 12] = [
    "case",
    "connections",
    "blind CPU µs",
    "portcullis CPU µs",
    "ratio",
    "aim",
    "blind p50 µs",
    "p50 µs",
    "blind p99 µs",
    "p99 µs",
    "blind req/s",
    "req/s",
];
const GROWTH: [&str; 5] = ["growth of CPU per call", "before µs", "after µs", "ratio", "aim"];
const FIGURES: [&str; 3] = ["footprint", "measured", "aim"];

/// Everything measured, row by row.
#[derive(Default)]
pub(crate) struct Report {
    costs: Vec<Vec<String>>,
    growth: Vec<Vec<String>>,
    figures: Vec<Vec<String>>,
    failures: Vec<String>,
}

// === impl Report ===

impl Report {
    pub(crate) fn cost(&mut self, case: &Case, measured: &Comparison) {
        let Comparison { first, second, ratio } = measured;
        self.costs.push(vec![
            case.title.clone(),
            case.connections.to_string(),
            format!("{:.1}", first.cpu),
            format!("{:.1}", second.cpu),
            format!("{ratio:.2}"),
            case.aim.map_or("–".into(), |aim| at_most(*ratio, aim, "×")),
            micros(first.p50),
            micros(second.p50),
            micros(first.p99),
            micros(second.p99),
            format!("{:.0}", first.rate),
            format!("{:.0}", second.rate),
        ]);
    }

    pub(crate) fn growth(&mut self, title: &str, measured: &Comparison, aim: f64) {
        self.growth.push(vec![
            title.to_owned(),
            format!("{:.1}", measured.first.cpu),
            format!("{:.1}", measured.second.cpu),
            format!("{:.2}", measured.ratio),
            at_most(measured.ratio, aim, "×"),
        ]);
    }

    /// A single figure with its unit.
    pub(crate) fn figure(&mut self, title: &str, measured: f64, aim: f64, unit: &str) {
        self.figures.push(vec![
            title.to_owned(),
            format!("{measured:.1} {unit}"),
            at_most(measured, aim, &format!(" {unit}")),
        ]);
    }

    pub(crate) fn failure(&mut self, title: &str, error: &anyhow::Error) {
        self.failures.push(format!("{title}: {error:#}"));
    }

    pub(crate) fn failures(&self) -> &[String] {
        &self.failures
    }

    /// All tables that have rows.
    pub(crate) fn render(&self, markdown: bool) -> String {
        let tables: [(&[&str], _); 3] =
            [(&COSTS, &self.costs), (&GROWTH, &self.growth), (&FIGURES, &self.figures)];
        let tables = tables.into_iter().filter(|(_, rows)| !rows.is_empty());
        tables.map(|(head, rows)| table(head, rows, markdown) + "\n").collect()
    }
}

/// The aim, with a mark when `measured` misses it.
fn at_most(measured: f64, aim: f64, unit: &str) -> String {
    let mark = if measured <= aim { "" } else { " ✗" };
    format!("≤ {aim}{unit}{mark}")
}

fn micros(time: Duration) -> String {
    format!("{:.0}", time.as_secs_f64() * 1e6)
}

fn table(head: &[&str], rows: &[Vec<String>], markdown: bool) -> String {
    let head: Vec<String> = head.iter().map(ToString::to_string).collect();
    let width = |column: usize| {
        let cells = rows.iter().chain([&head]).filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let mut text = line(&head, &widths, markdown);
    let rule: Vec<String> = widths.iter().enumerate().map(|(at, width)| rule(at, *width, markdown)).collect();
    text += &line(&rule, &widths, markdown);
    for row in rows {
        text += &line(row, &widths, markdown);
    }
    text
}

/// Numbers stand to the right, the first column to the left.
fn rule(column: usize, width: usize, markdown: bool) -> String {
    match markdown && column > 0 {
        true => "-".repeat(width - 1) + ":",
        false => "-".repeat(width),
    }
}

fn line(cells: &[String], widths: &[usize], markdown: bool) -> String {
    let padded = cells.iter().zip(widths).enumerate().map(|(column, (cell, width))| match column {
        0 => format!("{cell:<width$}"),
        _ => format!("{cell:>width$}"),
    });
    let padded: Vec<String> = padded.collect();
    match markdown {
        true => format!("| {} |\n", padded.join(" | ")),
        false => format!("{}\n", padded.join("  ").trim_end()),
    }
}
