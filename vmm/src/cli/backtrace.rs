//! `orrery backtrace`.

use serde::Serialize;

use super::args::BacktraceArgs;
use super::exit::Failure;
use super::place;
use super::ps::{failure, printable};
use crate::inspect::{Frame, How, Inspector, Task};

#[derive(Serialize)]
struct Stack {
    pid: Option<i32>,
    tid: Option<i32>,
    name: Option<String>,
    frames: Vec<Frame>,
}

pub(super) fn backtrace(arguments: BacktraceArgs) -> Result<u8, Failure> {
    let (_place, moment) = place::open(&arguments.at)?;
    let machine = &moment.machine;
    let inspector = Inspector::new(machine);
    let stack = |task: &Task| -> Result<Stack, Failure> {
        let frames = inspector.backtrace_of(task).map_err(failure)?;
        Ok(Stack { pid: Some(task.pid), tid: Some(task.tid), name: Some(task.name.clone()), frames })
    };
    let stacks = if arguments.all {
        let mut stacks = Vec::new();
        for task in inspector.tasks().map_err(failure)? {
            // One that cannot be read hides no other.
            match stack(&task) {
                Ok(stack) => stacks.push(stack),
                Err(error) => eprintln!("orrery: thread {}: {}", task.tid, error.message),
            }
        }
        stacks
    } else if let Some(pid) = arguments.pid {
        vec![stack(&inspector.task(pid).map_err(failure)?)?]
    } else {
        match inspector.current_task() {
            Ok(task) => vec![stack(&task)?],
            // Without processes there are still registers and a stack.
            Err(_) => vec![Stack { pid: None, tid: None, name: None, frames: inspector.backtrace() }],
        }
    };
    if arguments.json {
        super::say(serde_json::to_string(&stacks).expect("stacks are plain data"));
        return Ok(0);
    }
    for stack in &stacks {
        if let (Some(pid), Some(tid), Some(name)) = (stack.pid, stack.tid, &stack.name) {
            say!("process {pid} thread {tid} {}", printable(name));
        }
        let mut user = false;
        for (number, frame) in stack.frames.iter().enumerate() {
            if frame.user && !user {
                user = true;
                say!("  -- user --");
            }
            say!("  {}", line(number, frame));
        }
    }
    Ok(0)
}

/// One frame as text.
fn line(number: usize, frame: &Frame) -> String {
    let symbol = match (&frame.symbol, &frame.object) {
        (Some(symbol), _) => printable(&symbol.to_string()),
        (None, Some(object)) => format!("? [{}]", printable(object)),
        (None, None) => "?".into(),
    };
    let source = frame.line.as_ref().map_or(String::new(), |line| format!(" at {}", printable(&line.to_string())));
    let how = match frame.how {
        How::Exact | How::Tables => "",
        How::FramePointer => "  (by frame pointer)",
        How::Guess => "  (a guess)",
    };
    format!("#{number:<3} {:#018x} {symbol}{source}{how}", frame.address)
}
