//! The table for people: medians, ratios, and the geometric means of each group of lines.

use std::fmt::Write;

use super::figures::{Figures, LineFigures};
use super::lines::{self, Group, Line, Program};
use super::platform::Platform;

/// A line whose native run is at least so long is in the mean of the long user-mode lines.
const LONG_S: f64 = 1.0;

/// The ratios of the table: platform, what it is measured by, and the words above the column.
const RATIOS: [(Platform, Platform, &str); 4] = [
    (Platform::Soft, Platform::Native, "soft/native"),
    (Platform::Auto, Platform::Native, "auto/native"),
    (Platform::Qemu, Platform::Soft, "qemu/soft"),
    (Platform::Soft, Platform::Auto, "soft/auto"),
];

/// How the cells of a row become text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Columns of equal width, for a terminal.
    Plain,
    /// As Markdown has it.
    Markdown,
}

/// The table, with the columns that have figures.
pub fn table(figures: &Figures, style: Style) -> String {
    let has = |platform: &Platform| figures.lines.iter().any(|line| line.of(*platform).is_some());
    let platforms: Vec<Platform> = Platform::ALL.into_iter().filter(has).collect();
    let ratios: Vec<_> = RATIOS.into_iter().filter(|(above, below, _)| has(above) && has(below)).collect();
    let mut rows = vec![vec!["line".to_owned()]];
    rows[0].extend(platforms.iter().map(|platform| format!("{} s", platform.name())));
    rows[0].extend(ratios.iter().map(|(.., words)| (*words).to_owned()));
    for line in &figures.lines {
        let mut row = vec![line.name.clone()];
        row.extend(platforms.iter().map(|&platform| number(line.of(platform), 3)));
        row.extend(ratios.iter().map(|&(above, below, _)| number(line.ratio(above, below), 2)));
        rows.push(row);
    }
    let means = rows.len();
    for (title, members) in groups(figures) {
        let mean = |above, below| geometric_mean(members.iter().filter_map(|line| line.ratio(above, below)));
        if ratios.iter().all(|&(above, below, _)| mean(above, below).is_none()) {
            continue;
        }
        let mut row = vec![format!("mean: {title}")];
        row.extend(platforms.iter().map(|_| String::new()));
        row.extend(ratios.iter().map(|&(above, below, _)| number(mean(above, below), 2)));
        rows.push(row);
    }
    match style {
        Style::Plain => plain(&rows, means),
        Style::Markdown => markdown(&rows),
    }
}

/// The means that are made: each group of lines that has two or more; Go's lines, which compile nothing while they run, with
/// the JVM's when it has compiled; user-mode computing of a second and more.
fn groups(figures: &Figures) -> Vec<(&'static str, Vec<&LineFigures>)> {
    let mut groups = Vec::new();
    for group in Group::ALL {
        let is_member = |line: &&LineFigures| lines::group(&line.name) == Some(group);
        groups.push((group.title(), figures.lines.iter().filter(is_member).collect::<Vec<_>>()));
    }
    let is_steady = |line: &&LineFigures| {
        let compiled =
            |line: &Line| line.group == Group::Steady || line.group == Group::Runtime && line.program == Program::Go;
        lines::find(&line.name).is_some_and(compiled)
    };
    groups.push(("Go and JVM, steady", figures.lines.iter().filter(is_steady).collect()));
    let computes = |group| matches!(group, Group::Integer | Group::Vector | Group::Long | Group::Runtime);
    let is_long = |line: &&LineFigures| {
        lines::group(&line.name).is_some_and(computes) && line.native_s.is_some_and(|seconds| seconds >= LONG_S)
    };
    groups.push(("1 s and more", figures.lines.iter().filter(is_long).collect()));
    groups.retain(|(_, members)| members.len() >= 2);
    groups
}

fn number(value: Option<f64>, digits: usize) -> String {
    value.map_or("-".into(), |value| format!("{value:.digits$}"))
}

fn plain(rows: &[Vec<String>], means: usize) -> String {
    let mut text = String::new();
    for (place, row) in rows.iter().enumerate() {
        if place == means {
            text.push('\n');
        }
        let cells: String = row[1..].iter().map(|cell| format!(" {cell:>11}")).collect();
        writeln!(text, "{:<22}{cells}", row[0]).expect("writing to memory does not fail");
    }
    text
}

fn markdown(rows: &[Vec<String>]) -> String {
    let mut text = String::new();
    for (place, row) in rows.iter().enumerate() {
        writeln!(text, "| {} |", row.join(" | ")).expect("writing to memory does not fail");
        if place == 0 {
            writeln!(text, "|---{}|", "|--:".repeat(row.len() - 1)).expect("writing to memory does not fail");
        }
    }
    text
}

/// The mean of ratios.
pub fn geometric_mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let logarithms: Vec<f64> = values.map(f64::ln).collect();
    (!logarithms.is_empty()).then(|| (logarithms.iter().sum::<f64>() / logarithms.len() as f64).exp())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::figures::Host;

    fn figures() -> Figures {
        let mut figures = Figures::new(&lines::select(&["go".into()]).unwrap(), Host::default());
        for (name, native, soft) in [("go-fib", 1.0, 2.0), ("go-json", 0.5, 4.0)] {
            figures.add(name, Platform::Native, native, None);
            figures.add(name, Platform::Soft, soft, None);
        }
        figures
    }

    #[test]
    fn only_columns_with_figures_are_shown() {
        let text = table(&figures(), Style::Plain);
        let head: Vec<&str> = text.lines().next().unwrap().split_whitespace().collect();
        assert_eq!(head, ["line", "native", "s", "soft", "s", "soft/native"], "{text}");
    }

    #[test]
    fn means_are_geometric() {
        let text = table(&figures(), Style::Markdown);
        assert!(text.contains("| mean: Go and JVM |  |  | 4.00 |"), "{text}");
        // One line is no mean.
        assert!(!text.contains("1 s and more"), "{text}");
    }
}
