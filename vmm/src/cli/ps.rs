//! `orrery ps`.

use serde::Serialize;

use super::args::PsArgs;
use super::exit::{self, Failure};
use super::place;
use crate::inspect::{InspectError, Inspector, Task};

#[derive(Serialize)]
struct Row {
    #[serde(flatten)]
    task: Task,
    executable: Option<String>,
    arguments: Vec<String>,
}

pub(super) fn ps(arguments: PsArgs) -> Result<u8, Failure> {
    let (_place, moment) = place::open(&arguments.at)?;
    let machine = &moment.machine;
    let inspector = Inspector::new(machine);
    let mut tasks = inspector.tasks().map_err(failure)?;
    if !arguments.threads {
        // The running thread is shown in any case.
        tasks.retain(|task| task.is_leader() || task.current);
    }
    if arguments.json {
        let rows: Vec<Row> = tasks
            .into_iter()
            .map(|task| Row {
                executable: inspector.executable(&task).map(|file| file.path),
                arguments: inspector.arguments(&task),
                task,
            })
            .collect();
        super::say(serde_json::to_string(&rows).expect("rows are plain data"));
        return Ok(0);
    }
    say!("{:>6} {:>6} {:>6} S {:>12} {:>16} NAME", "PID", "TID", "PARENT", "TIME", "CR3");
    for task in &tasks {
        let words = inspector.arguments(task);
        let name = match task.kernel_thread || words.is_empty() {
            true => format!("[{}]", task.name),
            false => printable(&words.join(" ")),
        };
        let root = task.root.map_or("-".into(), |root| format!("{root:x}"));
        let time = format!("{}.{:06}", task.runtime_ns / 1_000_000_000, task.runtime_ns % 1_000_000_000 / 1000);
        let mark = if task.current { " *" } else { "" };
        let (pid, tid, parent, state) = (task.pid, task.tid, task.parent, task.state.letter());
        say!("{pid:>6} {tid:>6} {parent:>6} {state} {time:>12} {root:>16} {name}{mark}");
    }
    Ok(0)
}

/// Text of the guest without anything that a terminal would act on.
pub(super) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// A failure to look into the guest.
pub(super) fn failure(error: InspectError) -> Failure {
    Failure::new(exit::INSPECT, error)
}
