//! `orrery tree`: timelines, each below the one that it left.

use std::collections::BTreeMap;

use super::args::RunsArgs;
use super::exit::Failure;
use super::runs::{RunLine, describe, directories, note_none};

pub(super) fn tree(arguments: &RunsArgs) -> Result<u8, Failure> {
    let lines: BTreeMap<String, RunLine> =
        directories(&arguments.kept.runs, None).iter().map(|(id, path)| (id.clone(), describe(id, path).0)).collect();
    note_none(lines.values().filter(|line| shown(line, arguments)).count(), arguments);
    if arguments.json {
        for line in lines.values().filter(|line| shown(line, arguments)) {
            say!("{}", serde_json::to_string(line).expect("a line is plain data"));
        }
        return Ok(0);
    }
    // Every run below the one that it left; at the top those that left none, and without their parents those asked for.
    let mut children: BTreeMap<&str, Vec<&RunLine>> = BTreeMap::new();
    let mut roots = Vec::new();
    for line in lines.values() {
        let above = ancestors(&lines, line);
        if let Some(parent) = above.first() {
            children.entry(&parent.run).or_default().push(line);
        }
        if shown(line, arguments) && !above.iter().any(|other| shown(other, arguments)) {
            roots.push(line);
        }
    }
    children.values_mut().for_each(|list| list.sort_by_key(|line| (line.branched_at, line.run.clone())));
    for root in roots {
        show(root, &children, "", "");
    }
    Ok(0)
}

fn shown(line: &RunLine, arguments: &RunsArgs) -> bool {
    arguments.name.as_ref().is_none_or(|name| line.run.starts_with(name.as_str()))
}

/// The runs that a run left, the nearest first. A run cannot be its own ancestor, unless files were changed by hand: then
/// it has none.
fn ancestors<'a>(lines: &'a BTreeMap<String, RunLine>, line: &RunLine) -> Vec<&'a RunLine> {
    let parent = |line: &RunLine| lines.get(line.parent.as_deref()?);
    let found: Vec<&RunLine> = std::iter::successors(parent(line), |at| parent(at)).take(lines.len()).collect();
    if found.len() == lines.len() { Vec::new() } else { found }
}

/// Prints a run and those below it; not by recursion over hand-made depths that no stack has room for.
fn show(root: &RunLine, children: &BTreeMap<&str, Vec<&RunLine>>, first: &str, rest: &str) {
    let mut todo = vec![(root, first.to_owned(), rest.to_owned())];
    while let Some((line, first, rest)) = todo.pop() {
        let branched = line.branched_at.map_or(String::new(), |icount| format!("@{icount} "));
        let icount = line.icount.map_or("?".to_owned(), |icount| icount.to_string());
        let console = if line.last_line.is_empty() { String::new() } else { format!("  | {}", line.last_line) };
        say!("{first}{branched}{} seed {}: {} at {icount}{console}", line.run, line.seed, line.ended);
        let below = children.get(line.run.as_str()).map_or(&[][..], |list| list);
        for (index, child) in below.iter().enumerate().rev() {
            let last = index + 1 == below.len();
            let (mine, theirs) = if last { ("`- ", "   ") } else { ("|- ", "|  ") };
            todo.push((child, format!("{rest}{mine}"), format!("{rest}{theirs}")));
        }
    }
}
