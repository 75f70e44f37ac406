//! `orrery tree`: timelines, each below the one that it left.

use std::collections::BTreeMap;

use super::args::RunsArgs;
use super::exit::Failure;
use super::runs::{RunLine, describe, directories};

pub(super) fn tree(arguments: &RunsArgs) -> Result<u8, Failure> {
    let lines: BTreeMap<String, RunLine> =
        directories(&arguments.kept.runs, None).iter().map(|(id, path)| (id.clone(), describe(id, path).0)).collect();
    if arguments.json {
        for line in lines.values().filter(|line| shown(line, arguments)) {
            say!("{}", serde_json::to_string(line).expect("a line is plain data"));
        }
        return Ok(0);
    }
    let mut children: BTreeMap<&str, Vec<&RunLine>> = BTreeMap::new();
    let mut roots = Vec::new();
    for line in lines.values() {
        match line.parent.as_deref() {
            // A run cannot be its own ancestor, unless files were changed by hand: then it is a root.
            Some(parent) if lines.contains_key(parent) && !is_cyclic(&lines, line) => {
                children.entry(parent).or_default().push(line);
            }
            _ => roots.push(line),
        }
    }
    children.values_mut().for_each(|list| list.sort_by_key(|line| (line.branched_at, line.run.clone())));
    for root in roots {
        if arguments.name.as_ref().is_none_or(|name| root.run.starts_with(name.as_str())) {
            show(root, &children, "", "");
        }
    }
    Ok(0)
}

fn shown(line: &RunLine, arguments: &RunsArgs) -> bool {
    arguments.name.as_ref().is_none_or(|name| line.run.starts_with(name.as_str()))
}

fn is_cyclic(lines: &BTreeMap<String, RunLine>, line: &RunLine) -> bool {
    let mut at = line;
    for _ in 0..lines.len() {
        match at.parent.as_ref().and_then(|parent| lines.get(parent)) {
            Some(parent) => at = parent,
            None => return false,
        }
    }
    true
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
