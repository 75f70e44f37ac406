//! What was measured, as a file for programs.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::lines::Line;
use super::platform::{Hypervisors, Platform};

/// Name of the file's format, its first field.
pub const FORMAT: &str = "orrery-bench";
/// Version of the file's format.
pub const VERSION: u32 = 1;

/// The host that measured. Figures of different hosts do not compare; ratios do.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Host {
    /// Model name of the processor.
    pub processor: String,
    /// CPUs that could be used.
    pub cpus: usize,
    /// Version of QEMU.
    pub qemu: String,
    /// How fast additions were while it was measured, as a part of the best seen then: 1 if nothing else was at work on
    /// the same cores. The median of looks before each session.
    #[serde(default)]
    pub pace: Option<f64>,
}

impl Host {
    /// Looks at this host.
    pub fn look(hypervisors: &Hypervisors) -> Host {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpuinfo.lines().find(|line| line.starts_with("model name"));
        Host {
            processor: model.and_then(|line| line.split_once(": ")).map_or("", |(_, name)| name).to_owned(),
            cpus: std::thread::available_parallelism().map_or(1, |cpus| cpus.get()),
            qemu: hypervisors.qemu_version().unwrap_or_default(),
            pace: None,
        }
    }
}

/// One line's figures.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LineFigures {
    /// Name of the line.
    pub name: String,
    /// Median on the host, in seconds.
    pub native_s: Option<f64>,
    /// Median in QEMU, in seconds.
    pub qemu_s: Option<f64>,
    /// Median in Orrery's `soft` engine, in seconds.
    pub soft_s: Option<f64>,
    /// Median in Orrery with the engine that it chooses, in seconds.
    pub auto_s: Option<f64>,
    /// Every round's figure in seconds, by platform.
    pub rounds: BTreeMap<String, Vec<f64>>,
    /// The checksum of the line's work.
    pub result: Option<String>,
}

impl LineFigures {
    /// The median on a platform, in seconds.
    pub fn of(&self, platform: Platform) -> Option<f64> {
        match platform {
            Platform::Native => self.native_s,
            Platform::Qemu => self.qemu_s,
            Platform::Soft => self.soft_s,
            Platform::Auto => self.auto_s,
        }
    }

    /// How many times as long it takes on one platform as on another.
    pub fn ratio(&self, above: Platform, below: Platform) -> Option<f64> {
        Some(self.of(above)? / self.of(below)?)
    }
}

/// Everything that was measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// [`FORMAT`].
    pub format: String,
    /// [`VERSION`].
    pub version: u32,
    /// Who measured.
    pub host: Host,
    /// The lines in the table's order.
    pub lines: Vec<LineFigures>,
    /// Sessions that failed, and results that differ.
    pub failures: Vec<String>,
}

impl Figures {
    /// No figures yet.
    pub fn new(lines: &[Line], host: Host) -> Figures {
        let empty = |line: &Line| LineFigures { name: line.name.to_owned(), ..LineFigures::default() };
        Figures {
            format: FORMAT.to_owned(),
            version: VERSION,
            host,
            lines: lines.iter().map(empty).collect(),
            failures: Vec::new(),
        }
    }

    /// Adds a round's figure. A result that differs from an earlier one, on whatever platform, is a failure.
    pub fn add(&mut self, name: &str, platform: Platform, seconds: f64, result: Option<&str>) {
        let Some(line) = self.lines.iter_mut().find(|line| line.name == name) else { return };
        if let Some(result) = result {
            let expected = line.result.get_or_insert_with(|| result.to_owned());
            if expected != result {
                let place = platform.name();
                self.failures.push(format!("{name}: the result is {result} in {place}, but {expected} elsewhere"));
            }
        }
        let rounds = line.rounds.entry(platform.name().to_owned()).or_default();
        rounds.push(seconds);
        let median = median(rounds);
        match platform {
            Platform::Native => line.native_s = median,
            Platform::Qemu => line.qemu_s = median,
            Platform::Soft => line.soft_s = median,
            Platform::Auto => line.auto_s = median,
        }
    }

    /// Writes the file; a crash leaves the old one or the new one.
    pub fn write(&self, path: &Path) -> Result<()> {
        let context = || format!("cannot write {}", path.display());
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).with_context(context)?;
        }
        let new = path.with_extension("new");
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        fs::write(&new, text).with_context(context)?;
        fs::rename(&new, path).with_context(context)
    }

    /// Reads a file.
    pub fn read(path: &Path) -> Result<Figures> {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let figures: Figures =
            serde_json::from_str(&text).with_context(|| format!("{} holds no figures", path.display()))?;
        if figures.format != FORMAT || figures.version != VERSION {
            bail!(
                "{} is {:?} version {}, not {FORMAT:?} version {VERSION}",
                path.display(),
                figures.format,
                figures.version
            );
        }
        Ok(figures)
    }
}

/// The middle value, or the mean of the two in the middle.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        count if count % 2 == 1 => Some(sorted[middle]),
        _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::lines;

    fn figures() -> Figures {
        Figures::new(&lines::select(&["go-fib".into(), "boot-cold".into()]).unwrap(), Host::default())
    }

    #[test]
    fn medians_and_ratios() {
        let mut figures = figures();
        for (platform, seconds) in [(Platform::Native, [1.0, 9.0, 2.0]), (Platform::Qemu, [8.0, 7.0, 10.0])] {
            seconds.into_iter().for_each(|seconds| figures.add("go-fib", platform, seconds, Some("7")));
        }
        assert_eq!((figures.lines[1].native_s, figures.lines[1].qemu_s), (Some(2.0), Some(8.0)));
        assert!(figures.failures.is_empty());
        assert_eq!(median(&[1.0, 2.0]), Some(1.5));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn different_results_are_failures() {
        let mut figures = figures();
        figures.add("go-fib", Platform::Native, 1.0, Some("7"));
        figures.add("go-fib", Platform::Soft, 1.0, Some("8"));
        assert_eq!(figures.failures.len(), 1);
    }

    #[test]
    fn the_file_survives_the_round_trip() {
        let mut figures = figures();
        figures.add("boot-cold", Platform::Qemu, 3.5, None);
        let path = std::env::temp_dir().join(format!("orrery-figures-{}.json", std::process::id()));
        figures.write(&path).unwrap();
        assert_eq!(Figures::read(&path).unwrap(), figures);
        fs::write(&path, "{}").unwrap();
        assert!(Figures::read(&path).is_err());
        fs::remove_file(path).unwrap();
    }
}
