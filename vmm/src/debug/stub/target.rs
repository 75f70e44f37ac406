//! gdb's wishes, mapped to a session.

use gdbstub::common::Signal;
use gdbstub::stub::SingleThreadStopReason;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::reverse_exec::{ReplayLogPosition, ReverseCont, ReverseStep};
use gdbstub::target::ext::base::single_register_access::SingleRegisterAccess;
use gdbstub::target::ext::base::singlethread::{SingleThreadBase, SingleThreadResume, SingleThreadSingleStep};
use gdbstub::target::ext::breakpoints::{self, Breakpoints, HwBreakpoint, HwWatchpoint, SwBreakpoint};
use gdbstub::target::ext::monitor_cmd::{ConsoleOutput, MonitorCmd};
use gdbstub::target::{Target, TargetError, TargetResult};

use super::monitor;
use super::registers::{self, Number, OrreryX86, Values};
use crate::debug::session::{Direction, Session, StopReason};
use crate::debug::watch::{Wanted, WatchKind, Watched, What};
use crate::debug::{DebugError, memory};

/// The system's number for a bad address.
const EFAULT: u8 = 14;
/// And for an operation that is not permitted.
const EPERM: u8 = 1;
/// Breakpoints and watchpoints of one debugger.
const POINTS_MAX: usize = 4096;
/// Resumptions during which the address space of a removed watchpoint is remembered: gdb takes all of them out while
/// it stands still and puts them back.
const MEMORY: u64 = 4;

/// A movement that gdb has asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Motion {
    Step,
    StepBack,
    Resume(Direction),
}

/// A watchpoint as gdb numbers it.
type WatchKey = (u64, u64, WatchKind);

/// A session as gdb sees it.
pub struct GdbTarget<'a> {
    session: &'a mut Session,
    motion: Option<Motion>,
    breakpoints: Vec<u64>,
    watchpoints: Vec<WatchKey>,
    /// What watchpoints meant when they were new, and the last resumption that used them.
    meanings: std::collections::BTreeMap<WatchKey, (Watched, u64)>,
    resumptions: u64,
}

impl<'a> GdbTarget<'a> {
    /// A target without breakpoints.
    pub fn new(session: &'a mut Session) -> GdbTarget<'a> {
        GdbTarget {
            session,
            motion: None,
            breakpoints: Vec::new(),
            watchpoints: Vec::new(),
            meanings: Default::default(),
            resumptions: 0,
        }
    }

    /// Drops the movement that was asked for.
    pub fn forget_motion(&mut self) {
        self.motion = None;
    }

    /// Makes the movement that was asked for; None if something came in meanwhile, then it is still to be finished.
    pub fn go(
        &mut self,
        incoming: &mut dyn FnMut() -> bool,
    ) -> Result<Option<SingleThreadStopReason<u64>>, DebugError> {
        let motion = self.motion.unwrap_or(Motion::Resume(Direction::Forward));
        let wanted = self.wanted();
        let mut watcher = |_| incoming();
        let reason = match motion {
            Motion::Step => self.session.step(&wanted),
            Motion::StepBack => self.session.step_back(&mut watcher),
            Motion::Resume(direction) => self.session.resume(direction, &wanted, &mut watcher),
        };
        let reason = match reason {
            Err(DebugError::Interrupted { .. }) | Ok(StopReason::Interrupted) => return Ok(None),
            reason => reason?,
        };
        self.motion = None;
        Ok(Some(match reason {
            StopReason::Step => SingleThreadStopReason::DoneStep,
            StopReason::Beginning => SingleThreadStopReason::ReplayLog { tid: None, pos: ReplayLogPosition::Begin },
            StopReason::End(_) => SingleThreadStopReason::ReplayLog { tid: None, pos: ReplayLogPosition::End },
            StopReason::Interrupted => SingleThreadStopReason::Signal(Signal::SIGINT),
            StopReason::Event(event) => match event.what {
                What::Breakpoint { .. } => SingleThreadStopReason::SwBreak(()),
                What::Access { watched, .. } => {
                    let (Watched::Linear { address, kind, .. } | Watched::Physical { address, kind, .. }) = watched;
                    let kind = match kind {
                        WatchKind::Write => breakpoints::WatchKind::Write,
                        WatchKind::Read => breakpoints::WatchKind::Read,
                        WatchKind::Access => breakpoints::WatchKind::ReadWrite,
                    };
                    SingleThreadStopReason::Watch { tid: (), kind, addr: address }
                }
            },
        }))
    }

    /// What gdb's points mean now. A watchpoint keeps the address space in which it was set.
    fn wanted(&mut self) -> Wanted {
        self.resumptions += 1;
        let now = self.resumptions;
        self.meanings.retain(|_, (_, used)| now - *used <= MEMORY);
        let machine = self.session.machine();
        let watched = self.watchpoints.iter().map(|&(address, size, kind)| {
            let new = || (Watched::linear(machine, address, size, kind), now);
            let meaning = self.meanings.entry((address, size, kind)).or_insert_with(new);
            meaning.1 = now;
            meaning.0
        });
        Wanted { breakpoints: self.breakpoints.clone(), watched: watched.collect() }
    }

    fn change<T>(&mut self, change: impl FnOnce(&mut crate::Machine) -> T) -> TargetResult<T, Self> {
        match self.session.change(change) {
            Ok(Some(result)) => Ok(result),
            Ok(None) => Err(TargetError::Errno(EPERM)),
            Err(error) => Err(TargetError::Fatal(error)),
        }
    }
}

impl Target for GdbTarget<'_> {
    type Arch = OrreryX86;
    type Error = DebugError;

    fn base_ops(&mut self) -> BaseOps<'_, OrreryX86, DebugError> {
        BaseOps::SingleThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<breakpoints::BreakpointsOps<'_, Self>> {
        Some(self)
    }

    fn support_monitor_cmd(&mut self) -> Option<gdbstub::target::ext::monitor_cmd::MonitorCmdOps<'_, Self>> {
        Some(self)
    }
}

impl SingleThreadBase for GdbTarget<'_> {
    fn read_registers(&mut self, values: &mut Values) -> TargetResult<(), Self> {
        *values = Values::of(self.session.machine());
        Ok(())
    }

    fn write_registers(&mut self, values: &Values) -> TargetResult<(), Self> {
        let mut complete = None;
        self.change(|machine| machine.poke_cpu(|cpu| complete = values.apply(cpu)))?;
        complete.ok_or(TargetError::NonFatal)
    }

    fn support_single_register_access(
        &mut self,
    ) -> Option<gdbstub::target::ext::base::single_register_access::SingleRegisterAccessOps<'_, (), Self>> {
        Some(self)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8]) -> TargetResult<usize, Self> {
        let machine = self.session.machine();
        match memory::read(&machine.board().memory, machine.cpu(), start, data) {
            0 if !data.is_empty() => Err(TargetError::Errno(EFAULT)),
            count => Ok(count),
        }
    }

    fn write_addrs(&mut self, start: u64, data: &[u8]) -> TargetResult<(), Self> {
        let done = self.change(|machine| {
            let mut places = Vec::new();
            for (at, len) in memory::pages(start, data.len() as u64) {
                let gpa = memory::translate(&machine.board().memory, machine.cpu(), at);
                places.push((gpa?, len as usize));
            }
            let mut rest = data;
            for (gpa, len) in places {
                let piece = rest.split_off(..len)?;
                machine.poke_memory(gpa, piece).then_some(())?;
            }
            Some(())
        })?;
        done.ok_or(TargetError::Errno(EFAULT))
    }

    fn support_resume(&mut self) -> Option<gdbstub::target::ext::base::singlethread::SingleThreadResumeOps<'_, Self>> {
        Some(self)
    }
}

impl SingleRegisterAccess<()> for GdbTarget<'_> {
    fn read_register(&mut self, _: (), number: Number, buffer: &mut [u8]) -> TargetResult<usize, Self> {
        let bytes = registers::read(self.session.machine(), number.0);
        let target = buffer.get_mut(..bytes.len()).ok_or(TargetError::NonFatal)?;
        target.copy_from_slice(&bytes);
        Ok(bytes.len())
    }

    fn write_register(&mut self, _: (), number: Number, value: &[u8]) -> TargetResult<(), Self> {
        let mut written = false;
        self.change(|machine| machine.poke_cpu(|cpu| written = registers::write(cpu, number.0, value)))?;
        if written { Ok(()) } else { Err(TargetError::NonFatal) }
    }
}

impl SingleThreadResume for GdbTarget<'_> {
    fn resume(&mut self, _signal: Option<Signal>) -> Result<(), DebugError> {
        self.motion = Some(Motion::Resume(Direction::Forward));
        Ok(())
    }

    fn support_single_step(
        &mut self,
    ) -> Option<gdbstub::target::ext::base::singlethread::SingleThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_reverse_step(
        &mut self,
    ) -> Option<gdbstub::target::ext::base::reverse_exec::ReverseStepOps<'_, (), Self>> {
        Some(self)
    }

    fn support_reverse_cont(
        &mut self,
    ) -> Option<gdbstub::target::ext::base::reverse_exec::ReverseContOps<'_, (), Self>> {
        Some(self)
    }
}

impl SingleThreadSingleStep for GdbTarget<'_> {
    fn step(&mut self, _signal: Option<Signal>) -> Result<(), DebugError> {
        self.motion = Some(Motion::Step);
        Ok(())
    }
}

impl ReverseStep<()> for GdbTarget<'_> {
    fn reverse_step(&mut self, _: ()) -> Result<(), DebugError> {
        self.motion = Some(Motion::StepBack);
        Ok(())
    }
}

impl ReverseCont<()> for GdbTarget<'_> {
    fn reverse_cont(&mut self) -> Result<(), DebugError> {
        self.motion = Some(Motion::Resume(Direction::Backward));
        Ok(())
    }
}

impl Breakpoints for GdbTarget<'_> {
    fn support_sw_breakpoint(&mut self) -> Option<breakpoints::SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<breakpoints::HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<breakpoints::HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for GdbTarget<'_> {
    fn add_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        let room = self.breakpoints.len() < POINTS_MAX;
        if room {
            self.breakpoints.push(address);
        }
        Ok(room)
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        let found = self.breakpoints.iter().position(|breakpoint| *breakpoint == address);
        Ok(found.map(|index| self.breakpoints.swap_remove(index)).is_some())
    }
}

impl HwBreakpoint for GdbTarget<'_> {
    fn add_hw_breakpoint(&mut self, address: u64, kind: usize) -> TargetResult<bool, Self> {
        self.add_sw_breakpoint(address, kind)
    }

    fn remove_hw_breakpoint(&mut self, address: u64, kind: usize) -> TargetResult<bool, Self> {
        self.remove_sw_breakpoint(address, kind)
    }
}

fn kind_of(kind: breakpoints::WatchKind) -> WatchKind {
    match kind {
        breakpoints::WatchKind::Write => WatchKind::Write,
        breakpoints::WatchKind::Read => WatchKind::Read,
        breakpoints::WatchKind::ReadWrite => WatchKind::Access,
    }
}

impl HwWatchpoint for GdbTarget<'_> {
    fn add_hw_watchpoint(&mut self, address: u64, len: u64, kind: breakpoints::WatchKind) -> TargetResult<bool, Self> {
        let room = self.watchpoints.len() < POINTS_MAX && (1..=orrery_cpu::engine::WATCH_BYTES_MAX).contains(&len);
        if room {
            self.watchpoints.push((address, len, kind_of(kind)));
        }
        Ok(room)
    }

    fn remove_hw_watchpoint(
        &mut self,
        address: u64,
        len: u64,
        kind: breakpoints::WatchKind,
    ) -> TargetResult<bool, Self> {
        let key = (address, len, kind_of(kind));
        let found = self.watchpoints.iter().position(|watchpoint| *watchpoint == key);
        Ok(found.map(|index| self.watchpoints.swap_remove(index)).is_some())
    }
}

impl MonitorCmd for GdbTarget<'_> {
    fn handle_monitor_cmd(&mut self, command: &[u8], mut out: ConsoleOutput<'_>) -> Result<(), DebugError> {
        let text = String::from_utf8_lossy(command);
        let answer = monitor::execute(self.session, &text);
        gdbstub::target::ext::monitor_cmd::outputln!(out, "{}", answer.trim_end());
        Ok(())
    }
}
