//! Two files of figures side by side: which lines moved, and which only seem to.
//!
//! Medians of a few rounds always differ a little. A line has moved if every round of one file is on one side of
//! every round of the other, and the medians are further apart than a threshold. With one round per file nothing
//! can be said about noise, so the threshold decides alone, and is doubled.

use std::collections::BTreeMap;
use std::fmt;

use super::figures::{Figures, median};
use super::platform::Platform;

/// What became of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Less time than before.
    Faster,
    /// More time than before.
    Slower,
    /// Nothing that noise does not explain.
    Same,
    /// One of the files has no figure.
    Missing,
    /// The line's result is another, so its work is: it says nothing about speed.
    OtherWork,
}

/// One line of the comparison.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// Name of the line.
    pub name: String,
    /// The column.
    pub platform: Platform,
    /// Median before, in seconds.
    pub before_s: Option<f64>,
    /// Median after, in seconds.
    pub after_s: Option<f64>,
    /// What became of it.
    pub verdict: Verdict,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let seconds = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.3}"));
        let percent = match (self.before_s, self.after_s) {
            (Some(before), Some(after)) => format!("{:+.1} %", 100.0 * (after / before - 1.0)),
            _ => String::new(),
        };
        let verdict = match self.verdict {
            Verdict::Faster => "faster",
            Verdict::Slower => "SLOWER",
            Verdict::Same => "",
            Verdict::Missing => "no figure",
            Verdict::OtherWork => "other work",
        };
        let (name, platform) = (&self.name, self.platform.name());
        let (before, after) = (seconds(self.before_s), seconds(self.after_s));
        write!(f, "{name:<18} {platform:<7} {before:>9} {after:>9} {percent:>10}  {verdict}")
    }
}

/// Compares all lines of both files in the columns `platforms`. `threshold` is the smallest change that counts, as a
/// fraction.
pub fn compare(before: &Figures, after: &Figures, platforms: &[Platform], threshold: f64) -> Vec<Change> {
    let mut names: Vec<&str> = before.lines.iter().map(|line| line.name.as_str()).collect();
    for line in &after.lines {
        if !names.contains(&line.name.as_str()) {
            names.push(&line.name);
        }
    }
    let mut changes = Vec::new();
    for &platform in platforms {
        let (old_rounds, new_rounds) = (rounds_by_name(before, platform), rounds_by_name(after, platform));
        for &name in &names {
            let (old, new) = (old_rounds.get(name), new_rounds.get(name));
            if old.is_none() && new.is_none() {
                continue;
            }
            changes.push(Change {
                name: name.to_owned(),
                platform,
                before_s: old.and_then(|rounds| median(rounds)),
                after_s: new.and_then(|rounds| median(rounds)),
                verdict: match old.zip(new) {
                    None => Verdict::Missing,
                    Some(_) if result(before, name) != result(after, name) => Verdict::OtherWork,
                    Some((old, new)) => judge(old, new, threshold),
                },
            });
        }
    }
    changes
}

fn result<'a>(figures: &'a Figures, name: &str) -> Option<&'a str> {
    figures.lines.iter().find(|line| line.name == name)?.result.as_deref()
}

fn rounds_by_name(figures: &Figures, platform: Platform) -> BTreeMap<&str, &[f64]> {
    let rounds = figures.lines.iter().filter_map(|line| Some((line.name.as_str(), line.rounds.get(platform.name())?)));
    rounds.filter(|(_, rounds)| !rounds.is_empty()).map(|(name, rounds)| (name, &rounds[..])).collect()
}

fn judge(old: &[f64], new: &[f64], threshold: f64) -> Verdict {
    let (Some(before), Some(after)) = (median(old), median(new)) else { return Verdict::Missing };
    let threshold = if old.len().min(new.len()) < 2 { 2.0 * threshold } else { threshold };
    let least = |values: &[f64]| values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = |values: &[f64]| values.iter().copied().fold(0.0, f64::max);
    if most(new) < least(old) && after < before * (1.0 - threshold) {
        Verdict::Faster
    } else if least(new) > most(old) && after > before * (1.0 + threshold) {
        Verdict::Slower
    } else {
        Verdict::Same
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::figures::Host;
    use crate::bench::lines;

    fn measured(seconds: &[f64]) -> Figures {
        let mut figures = Figures::new(&lines::select(&["go-fib".into()]).unwrap(), Host::default());
        seconds.iter().for_each(|&seconds| figures.add("go-fib", Platform::Soft, seconds, None));
        figures
    }

    fn verdict(old: &[f64], new: &[f64]) -> Verdict {
        compare(&measured(old), &measured(new), &[Platform::Soft], 0.03)[0].verdict
    }

    #[test]
    fn moves_beyond_noise_count() {
        assert_eq!(verdict(&[10.0, 10.1, 10.2], &[9.0, 9.1, 9.2]), Verdict::Faster);
        assert_eq!(verdict(&[10.0, 10.1, 10.2], &[11.0, 11.1, 11.2]), Verdict::Slower);
        assert_eq!(verdict(&[10.0, 10.1, 12.0], &[11.0, 11.1, 11.2]), Verdict::Same);
        assert_eq!(verdict(&[10.0, 10.0, 10.0], &[10.1, 10.1, 10.1]), Verdict::Same);
        assert_eq!(verdict(&[10.0], &[10.5]), Verdict::Same);
        assert_eq!(verdict(&[10.0], &[11.5]), Verdict::Slower);
        assert_eq!(verdict(&[10.0], &[]), Verdict::Missing);
    }

    #[test]
    fn other_work_is_not_faster() {
        let (before, mut after) = (measured(&[10.0]), measured(&[1.0]));
        after.lines[0].result = Some("7".into());
        let changes = compare(&before, &after, &[Platform::Soft], 0.03);
        assert_eq!(changes[0].verdict, Verdict::OtherWork);
    }
}
