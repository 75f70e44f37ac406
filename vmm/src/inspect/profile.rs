//! Where a guest spends its instructions: samples of its stack, one every so many instructions. Nothing is estimated:
//! a run sampled twice gives the same profile, and sampling changes nothing in the guest.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;

use super::{Frame, InspectCache, Inspector};
use crate::machine::Machine;

/// What stands for code without a name.
const UNKNOWN: &str = "[unknown]";

/// How a function fared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Line {
    /// The function, as in the stacks.
    pub function: String,
    /// Samples in the function itself.
    pub own: u64,
    /// Samples in the function and in what it called.
    pub total: u64,
}

/// Samples of a guest.
#[derive(Default)]
pub struct Profile {
    cache: Arc<InspectCache>,
    /// Only the function where the vCPU is, not its callers.
    flat: bool,
    samples: u64,
    stacks: BTreeMap<Vec<String>, u64>,
}

impl Profile {
    /// An empty profile. `flat`: without callers.
    pub fn new(flat: bool) -> Profile {
        Profile { flat, ..Profile::default() }
    }

    /// Number of samples.
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// Adds the place where a machine is now.
    pub fn sample(&mut self, machine: &Machine) {
        let inspector = Inspector::with_cache(machine, &self.cache);
        let task = inspector.current_task().ok();
        let process = task.as_ref().map_or("[no process]".into(), |task| folded_name(&task.name));
        let mut stack = vec![process];
        if self.flat {
            let rip = machine.cpu().rip;
            let symbol = match &task {
                Some(task) => inspector.symbolize_in(task, rip),
                None => inspector.symbolize(rip),
            };
            stack.push(label(symbol.map(|symbol| (symbol.name, symbol.object)), machine.cpu().cpl == 3));
        } else {
            let frames = inspector.backtrace_with(task.as_ref());
            stack.extend(frames.iter().rev().map(frame_label));
        }
        self.samples += 1;
        *self.stacks.entry(stack).or_default() += 1;
    }

    /// The stacks as lines that flame graph tools read: `process;outer;inner COUNT`, in order.
    pub fn folded(&self) -> Vec<String> {
        self.stacks.iter().map(|(stack, count)| format!("{} {count}", stack.join(";"))).collect()
    }

    /// Functions, those with most samples of their own first.
    pub fn lines(&self) -> Vec<Line> {
        let mut functions: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
        for (stack, count) in &self.stacks {
            let frames = &stack[1..];
            if let Some(innermost) = frames.last() {
                functions.entry(innermost).or_default().0 += count;
            }
            // A function that calls itself is counted once per sample.
            let mut distinct: Vec<&str> = frames.iter().map(String::as_str).collect();
            distinct.sort_unstable();
            distinct.dedup();
            for function in distinct {
                functions.entry(function).or_default().1 += count;
            }
        }
        let mut lines: Vec<Line> = functions
            .into_iter()
            .map(|(function, (own, total))| Line { function: function.to_owned(), own, total })
            .collect();
        lines.sort_by(|a, b| (b.own, b.total, &a.function).cmp(&(a.own, a.total, &b.function)));
        lines
    }

    /// Samples by process, most first.
    pub fn processes(&self) -> Vec<(String, u64)> {
        let mut processes: BTreeMap<&str, u64> = BTreeMap::new();
        for (stack, count) in &self.stacks {
            *processes.entry(&stack[0]).or_default() += count;
        }
        let mut processes: Vec<(String, u64)> =
            processes.into_iter().map(|(name, count)| (name.to_owned(), count)).collect();
        processes.sort_by(|a, b| (b.1, &a.0).cmp(&(a.1, &b.0)));
        processes
    }

    /// A flame graph as SVG. `every`: instructions per sample.
    pub fn flame_graph(&self, title: &str, every: u64, into: impl std::io::Write) -> std::io::Result<()> {
        let mut options = inferno::flamegraph::Options::default();
        options.title = title.to_owned();
        options.count_name = "instructions".into();
        options.factor = every as f64;
        options.deterministic = true;
        let lines = self.folded();
        inferno::flamegraph::from_lines(&mut options, lines.iter().map(String::as_str), into)
    }
}

fn frame_label(frame: &Frame) -> String {
    label(frame.symbol.as_ref().map(|symbol| (symbol.name.clone(), symbol.object.clone())), frame.user)
}

/// A frame in the folded form: functions of the kernel and of modules are marked as other tools mark them.
fn label(symbol: Option<(String, Option<String>)>, user: bool) -> String {
    let (name, object) = symbol.unwrap_or((UNKNOWN.into(), None));
    let name = folded_name(&name);
    match (user, object) {
        (true, _) => name,
        (false, Some(module)) => format!("{name} [{}]_[k]", folded_name(&module)),
        (false, None) => format!("{name}_[k]"),
    }
}

/// A name without what has a meaning in the folded form or for a terminal.
fn folded_name(name: &str) -> String {
    name.chars().map(|c| if c == ';' || c.is_control() { '_' } else { c }).collect()
}

/// The least prime that is not below a number: an interval that falls into step with few loops.
pub fn interval_near(instructions: u64) -> u64 {
    let prime = |n: u64| n >= 2 && (2..).take_while(|d| d * d <= n).all(|d| !n.is_multiple_of(d));
    (instructions.clamp(2, 1 << 40)..).find(|n| prime(*n)).expect("there is always another prime")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_counted_by_function_and_by_process() {
        let mut profile = Profile::new(false);
        let stacks: [(&[&str], u64); 4] =
            [(&["a", "main", "work", "work"], 3), (&["a", "main"], 2), (&["b", "main", "work"], 1), (&["b"], 1)];
        for (stack, count) in stacks {
            profile.stacks.insert(stack.iter().map(|part| (*part).to_string()).collect(), count);
            profile.samples += count;
        }
        let line = |function: &str, own, total| Line { function: function.into(), own, total };
        assert_eq!(profile.lines(), [line("work", 4, 4), line("main", 2, 6)]);
        assert_eq!(profile.processes(), [("a".into(), 5), ("b".into(), 2)]);
        assert_eq!(profile.folded()[1], "a;main;work;work 3");
        let mut svg = Vec::new();
        profile.flame_graph("title", 1000, &mut svg).unwrap();
        let svg = String::from_utf8(svg).unwrap();
        assert!(svg.contains("work") && svg.contains("7,000"), "the whole is seven samples of a thousand");
    }

    #[test]
    fn names_of_guests_cannot_forge_stacks() {
        assert_eq!(folded_name("a;b\x1b[2J\n"), "a_b_[2J_");
        assert_eq!(label(Some(("f".into(), Some("ext4".into()))), false), "f [ext4]_[k]");
        assert_eq!(label(None, true), UNKNOWN);
    }

    #[test]
    fn intervals_are_prime() {
        assert_eq!(interval_near(0), 2);
        assert_eq!(interval_near(1_000_000), 1_000_003);
    }
}
