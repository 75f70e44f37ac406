//! Processes and threads, from the kernel's list of tasks. The guest may have written anything into it: every walk is
//! bounded, and what cannot be read ends it.

use std::collections::BTreeSet;

use serde::Serialize;

use super::InspectError;
use super::kernel::{Kernel, list};
use super::layout::Layout;
use super::memory::{AddressSpace, ReadError};

/// Most tasks that are believed: Linux's own limit (PID_MAX_LIMIT).
pub const TASKS_MAX: usize = 4 << 20;
/// Bytes of a task's name (TASK_COMM_LEN).
const NAME_BYTES: usize = 16;
/// PF_KTHREAD.
const KERNEL_THREAD: u64 = 0x0020_0000;
/// Most bytes of a command line.
const ARGUMENTS_MAX: u64 = 4096;

/// What a task is doing, as `ps` tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum TaskState {
    /// Running or ready to run.
    Running,
    /// Waiting for something, and woken by signals.
    Sleeping,
    /// Waiting for something, and not woken by signals.
    Uninterruptible,
    /// Stopped by a signal.
    Stopped,
    /// Stopped by a tracer.
    Traced,
    /// Ended, and not yet waited for.
    Zombie,
    /// Ended.
    Dead,
    /// A kernel thread that waits and counts as idle.
    Idle,
    /// Parked kernel thread.
    Parked,
    /// A new task, or a state that is not known here.
    Other,
}

impl TaskState {
    /// From `task_struct`'s state and exit state (include/linux/sched.h).
    fn of(state: u64, exit_state: u64) -> TaskState {
        if exit_state & 0x20 != 0 {
            return TaskState::Zombie;
        }
        if exit_state & 0x10 != 0 {
            return TaskState::Dead;
        }
        match state {
            0 => TaskState::Running,
            // TASK_UNINTERRUPTIBLE | TASK_NOLOAD
            state if state & 0x402 == 0x402 => TaskState::Idle,
            state if state & 0x1 != 0 => TaskState::Sleeping,
            state if state & 0x2 != 0 => TaskState::Uninterruptible,
            state if state & 0x4 != 0 => TaskState::Stopped,
            state if state & 0x8 != 0 => TaskState::Traced,
            state if state & 0x40 != 0 => TaskState::Parked,
            state if state & 0x80 != 0 => TaskState::Dead,
            _ => TaskState::Other,
        }
    }

    /// The letter that `ps` uses.
    pub fn letter(self) -> char {
        match self {
            TaskState::Running => 'R',
            TaskState::Sleeping => 'S',
            TaskState::Uninterruptible => 'D',
            TaskState::Stopped => 'T',
            TaskState::Traced => 't',
            TaskState::Zombie => 'Z',
            TaskState::Dead => 'X',
            TaskState::Idle => 'I',
            TaskState::Parked => 'P',
            TaskState::Other => '?',
        }
    }
}

/// A task: a thread of a process, or of the kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Task {
    /// Thread id.
    pub tid: i32,
    /// Process id: the id of the first of the threads.
    pub pid: i32,
    /// Process id of the parent.
    pub parent: i32,
    /// Its name, of up to 15 bytes.
    pub name: String,
    /// What it is doing.
    pub state: TaskState,
    /// It belongs to the kernel and has no memory of its own.
    pub kernel_thread: bool,
    /// It is the one that runs on the vCPU.
    pub current: bool,
    /// Root of its page tables (a guest-physical address, as in CR3), if it has memory of its own.
    pub root: Option<u64>,
    /// Time it has run, in nanoseconds of virtual time, up to when the kernel last looked.
    pub runtime_ns: u64,
    /// Time in user mode, in nanoseconds, up to the last tick.
    pub user_ns: u64,
    /// Time in kernel mode, in nanoseconds, up to the last tick.
    pub system_ns: u64,
    /// Address of its `task_struct`.
    pub address: u64,
    /// Address of its `mm_struct`.
    #[serde(skip)]
    pub mm: u64,
    /// Address of its kernel stack.
    #[serde(skip)]
    pub stack: u64,
}

impl Task {
    /// True for the first thread of a process.
    pub fn is_leader(&self) -> bool {
        self.tid == self.pid
    }
}

/// Reads tasks of one kernel.
pub(super) struct TaskReader<'a> {
    pub space: &'a AddressSpace<'a>,
    pub kernel: &'a Kernel,
    pub layout: &'a Layout,
    /// The running task.
    pub current: Option<u64>,
}

impl TaskReader<'_> {
    /// Every thread of every process, the idle task first.
    pub fn all(&self) -> Result<Vec<Task>, InspectError> {
        let init = self.kernel.init_task()?;
        let layout = self.layout;
        let mut seen = BTreeSet::from([init]);
        let mut tasks = vec![self.task(init)?];
        for leader in list(self.space, init.wrapping_add(layout.task_tasks), layout.task_tasks, TASKS_MAX) {
            let Ok(leader) = leader else { break };
            let Ok(signal) = self.space.u64(leader.wrapping_add(layout.task_signal)) else { break };
            let threads =
                list(self.space, signal.wrapping_add(layout.signal_thread_head), layout.task_thread_node, TASKS_MAX);
            // A process that is just being made or taken apart may not be among its own threads.
            let mut found = std::iter::once(leader).chain(threads.map_while(Result::ok));
            while seen.len() < TASKS_MAX
                && let Some(thread) = found.next()
            {
                if seen.insert(thread)
                    && let Ok(task) = self.task(thread)
                {
                    tasks.push(task);
                }
            }
        }
        Ok(tasks)
    }

    /// One task.
    pub fn task(&self, address: u64) -> Result<Task, ReadError> {
        let (space, layout) = (self.space, self.layout);
        let at = |offset: u64| address.wrapping_add(offset);
        let mm = space.u64(at(layout.task_mm))?;
        let parent = space.u64(at(layout.task_real_parent))?;
        let state = space.unsigned(at(layout.task_state.offset), layout.task_state.size)?;
        let exit_state = u64::from(space.u32(at(layout.task_exit_state))?);
        let root = match mm {
            0 => None,
            mm => {
                let table = space.u64(mm.wrapping_add(layout.mm_pgd))?;
                space.translate(table).map(|mapped| mapped.physical)
            }
        };
        Ok(Task {
            tid: space.u32(at(layout.task_pid))? as i32,
            pid: space.u32(at(layout.task_tgid))? as i32,
            parent: space.u32(parent.wrapping_add(layout.task_tgid)).unwrap_or(0) as i32,
            name: space.string(at(layout.task_comm), NAME_BYTES)?,
            state: TaskState::of(state, exit_state),
            kernel_thread: u64::from(space.u32(at(layout.task_flags))?) & KERNEL_THREAD != 0,
            current: self.current == Some(address),
            root,
            runtime_ns: space.u64(at(layout.task_runtime))?,
            user_ns: space.u64(at(layout.task_utime))?,
            system_ns: space.u64(at(layout.task_stime))?,
            address,
            mm,
            stack: space.u64(at(layout.task_stack))?,
        })
    }

    /// The command line of a process, as it is in its memory.
    pub fn arguments(&self, task: &Task, user: &AddressSpace) -> Vec<String> {
        let read = |offset: u64| self.space.u64(task.mm.wrapping_add(offset)).unwrap_or(0);
        if task.mm == 0 {
            return Vec::new();
        }
        let (start, end) = (read(self.layout.mm_arg_start), read(self.layout.mm_arg_end));
        let bytes = user.read_up_to(start, end.saturating_sub(start).min(ARGUMENTS_MAX) as usize);
        let text = bytes.strip_suffix(&[0]).unwrap_or(&bytes);
        if text.is_empty() {
            return Vec::new();
        }
        text.split(|byte| *byte == 0).map(|part| String::from_utf8_lossy(part).into_owned()).collect()
    }
}
