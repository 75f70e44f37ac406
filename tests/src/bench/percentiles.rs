//! Lines of a benchmark whose figures are a median and a 99th percentile, in microseconds.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use serde::Serialize;

/// One line of the result.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// What was done.
    pub name: String,
    /// Median, in microseconds.
    pub p50_us: f64,
    /// 99th percentile, in microseconds.
    pub p99_us: f64,
    /// How many times it was done.
    pub samples: usize,
    /// Whatever else was measured, with its unit in the name.
    #[serde(flatten)]
    pub more: std::collections::BTreeMap<&'static str, f64>,
}

/// All lines, as in the file.
#[derive(Debug, Serialize)]
pub struct Figures {
    /// In the order of measuring.
    pub lines: Vec<Line>,
}

impl Line {
    /// From all samples of one kind, of which there is at least one.
    pub fn of(name: &str, mut micros: Vec<f64>) -> Line {
        micros.sort_by(f64::total_cmp);
        let at = |share: f64| micros[((micros.len() - 1) as f64 * share).round() as usize];
        Line {
            name: name.to_owned(),
            p50_us: at(0.5),
            p99_us: at(0.99),
            samples: micros.len(),
            more: Default::default(),
        }
    }

    /// With something else that was measured; its unit is in the name.
    pub fn with(mut self, name: &'static str, value: f64) -> Line {
        self.more.insert(name, value);
        self
    }

    /// For people.
    pub fn text(&self) -> String {
        let mut text = format!("{:<20} p50 {:>10.1} us   p99 {:>10.1} us", self.name, self.p50_us, self.p99_us);
        for (name, value) in &self.more {
            let digits = if *value < 10.0 { 2 } else { 1 };
            text += &format!("   {name} {value:.digits$}");
        }
        text
    }
}

impl Figures {
    /// Writes the file.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)? + "\n";
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }
}

/// The host's time since a moment, in microseconds.
pub fn micros_since(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e6
}
