//! The machine put together: the vCPU's engine, the board with its devices, virtual time.
//!
//! `State(N)` is the state at the *first moment* at which N instructions have retired: before an event due then
//! is delivered, before an input enters, before an interrupt is taken or idle time skipped. [`Machine::run`]
//! stops there, and going on from there is the same as never having stopped.

pub mod board;
mod branch;
mod bus;
pub mod checkpoints;
mod devices;
pub mod dirty;
mod hash;
pub mod hashing;
mod learn;
mod save;
pub mod state;
mod transfer;
mod virtio;

use std::collections::VecDeque;
use std::mem::ManuallyDrop;
use std::sync::Arc;

use orrery_cpu::engine::{Engine, EngineConfig, EngineError, Hit, Observation, Stop};
use orrery_cpu::memory::PAGE_SIZE;
use orrery_cpu::state::rflags;
use orrery_cpu::{CpuState, Icount};
use orrery_devices::VirtualNs;
use orrery_guest_image::Image;

pub use board::{Board, Output};
pub use branch::{BranchError, SPARES_MAX, Template};
pub use checkpoints::Checkpoints;
pub use save::SavedMachine;
pub use state::{MachineState, StateError};

use self::dirty::DirtyPages;
use crate::boot::{self, BootError};
use crate::chain::Hash;
use crate::config::{ConfigError, MachineConfig, Seed};
use crate::digest::MemoryDigest;
use crate::inputs::{Input, InputChannel};
use crate::ram::{self, RamError};
use crate::run::Ended;

/// A machine that cannot be put together.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The description is out of bounds.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No RAM.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The image cannot be booted.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The devices cannot be put together.
    #[error("cannot put the devices together: {reason}")]
    Devices {
        /// Which and why.
        reason: String,
    },
    /// A saved state does not fit.
    #[error("cannot restore the machine: {0}")]
    State(#[from] StateError),
    /// The engine cannot run on this host.
    #[error("cannot start the engine: {0}")]
    Engine(#[from] EngineError),
}

/// Why [`Machine::run`] returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pause {
    /// One of the limits is reached.
    Limit,
    /// There is output to be taken.
    Output,
    /// The vCPU is halted and the next event is due at `until`. Only if [`Limits::pause_when_idle`] is set.
    Idle {
        /// When time would go on; None if nothing is queued.
        until: Option<VirtualNs>,
    },
    /// The observation has found something, see [`Machine::take_hits`].
    Observed,
    /// A string instruction has been at work for a while and is not done. Only if [`Limits::pause_when_long`] is set.
    Unfinished,
    /// The run is over.
    Ended(Ended),
}

/// How far to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Stop when this many instructions have retired.
    pub icount: Icount,
    /// Stop at the first moment at which virtual time has reached this.
    pub time: VirtualNs,
    /// Return instead of skipping idle time, for callers that may have input.
    pub pause_when_idle: bool,
    /// Return as soon as a line of output is complete.
    pub pause_on_output: bool,
    /// Return now and then in the middle of a string instruction that takes long, which no icount bounds, for callers
    /// that may give up. It goes on with the next run. Until then the state is that of no moment.
    pub pause_when_long: bool,
}

impl Limits {
    /// No limit at all.
    pub const NONE: Limits = Limits {
        icount: Icount(u64::MAX),
        time: VirtualNs(u64::MAX),
        pause_when_idle: false,
        pause_on_output: false,
        pause_when_long: false,
    };

    /// Until an icount.
    pub fn until(icount: Icount) -> Limits {
        Limits { icount, ..Limits::NONE }
    }
}

/// The simulated computer.
pub struct Machine {
    config: MachineConfig,
    /// Dropped with the machine, unless a branch goes on with it.
    engine: ManuallyDrop<Engine>,
    board: Board,
    digest: MemoryDigest,
    /// The hash of a moment that is being computed beside the guest, and one that nobody has taken yet.
    hashing: Option<hashing::Hashing>,
    hashed: Option<hashing::Hashed>,
    /// Where the digest is to be taken from first, when somebody asks for it.
    digest_source: Option<Arc<branch::Frozen>>,
    /// Who has still to be told of which written pages.
    dirty: DirtyPages,
    /// What the random streams were keyed with last.
    seed: Seed,
    /// Where the machine branched off, if it did.
    origin: Option<branch::Origin>,
    /// Once it was frozen: spares for whoever branches off then or after the next time.
    stock: Option<Arc<branch::Stock>>,
    /// Inputs that have not entered yet: the replayed log, and what has just arrived.
    inputs: VecDeque<Scheduled>,
    /// Inputs that have entered since the last [`Machine::take_inputs`].
    entered: Vec<Input>,
    /// How many have entered since power-on.
    inputs_entered: u64,
    /// Virtual time up to which inputs and events have been delivered.
    settled: Option<VirtualNs>,
    /// The state is `State(N)`: nothing has happened since the last instruction retired.
    first_moment: bool,
    ended: Option<Ended>,
    /// The last [`Machine::save`].
    saved: Option<Box<save::LastSave>>,
}

/// An input waiting for its time.
#[derive(Clone, Debug)]
pub(crate) struct Scheduled {
    pub at: VirtualNs,
    /// For replayed inputs: the icount that the log promises.
    pub expected: Option<Icount>,
    pub channel: InputChannel,
    pub data: Vec<u8>,
}

impl From<Input> for Scheduled {
    fn from(input: Input) -> Scheduled {
        let (at, icount) = input.moment();
        Scheduled { at, expected: Some(icount), channel: input.channel, data: input.data }
    }
}

/// A log of inputs that was made with another image, machine or seed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the log of inputs is of another run: an input that belongs at icount {expected} would enter at {actual}; \
     use the image, machine and seed that the log was made with"
)]
pub struct ForeignInputs {
    /// What the log says.
    pub expected: u64,
    /// Where time has brought it.
    pub actual: u64,
}

impl Machine {
    /// Builds a machine at power-on.
    pub fn new(
        image: &Image,
        config: &MachineConfig,
        seed: Seed,
        engine: EngineConfig,
    ) -> Result<Machine, MachineError> {
        config.validate()?;
        let memory = ram::create(config.memory_mib << 20)?;
        let mut board = Board::new(memory.clone(), config, seed, image.disks())?;
        let rsdp = board.write_firmware_tables()?;
        let kernel = boot::Kernel {
            kernel: image.kernel(),
            initramfs: image.initramfs(),
            command_line: image.command_line(),
            rsdp: Some(rsdp),
        };
        let entry = boot::load(&memory, &kernel)?;
        let features = devices::model_features(config);
        let mut engine = Engine::new(memory.clone(), features, engine)?;
        *engine.state_mut() = boot_state(&entry);
        engine.state_replaced();
        let mut machine = Machine {
            config: config.clone(),
            digest: MemoryDigest::zeroed(&memory),
            digest_source: None,
            hashing: None,
            hashed: None,
            dirty: DirtyPages::new(ram::end(&memory) / PAGE_SIZE),
            seed,
            origin: None,
            stock: None,
            engine: ManuallyDrop::new(engine),
            board,
            inputs: VecDeque::new(),
            entered: Vec::new(),
            inputs_entered: 0,
            settled: None,
            first_moment: true,
            ended: None,
            saved: None,
        };
        machine.note_device_writes();
        Ok(machine)
    }

    /// What the machine is made of.
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// What the engine has done so far, for tuning.
    pub fn engine_statistics(&self) -> &orrery_cpu::engine::Statistics {
        self.engine.statistics()
    }

    /// Instructions retired.
    pub fn icount(&self) -> Icount {
        self.engine.icount()
    }

    /// Virtual time.
    pub fn time(&self) -> VirtualNs {
        self.board.clock.now(self.engine.icount())
    }

    /// The seed that the random streams were keyed with last.
    pub fn seed(&self) -> Seed {
        self.seed
    }

    /// Registers of the vCPU.
    pub fn cpu(&self) -> &CpuState {
        self.engine.state()
    }

    /// The devices and RAM.
    pub fn board(&self) -> &Board {
        &self.board
    }

    /// True if the state is `State(icount)`, the first moment at which that many instructions have retired: what a
    /// snapshot can be named after. It is after a run to [`Limits::icount`].
    pub fn at_moment(&self) -> bool {
        self.first_moment
    }

    /// The machine stands in the middle of an instruction, see [`Pause::Unfinished`].
    pub fn is_unfinished(&self) -> bool {
        self.engine.is_unfinished()
    }

    /// Number of inputs that have entered since power-on.
    pub fn inputs_entered(&self) -> u64 {
        self.inputs_entered
    }

    /// The digests of RAM, as of the last [`Machine::state_hash`].
    pub fn memory_digest(&self) -> &MemoryDigest {
        &self.digest
    }

    /// How the run ended, if it did.
    pub fn ended(&self) -> Option<&Ended> {
        self.ended.as_ref()
    }

    /// Replaces what is observed: breakpoints, watchpoints, records of executions. The guest cannot tell, and the
    /// states are the same. [`Machine::run`] pauses with [`Pause::Observed`] when something is found, which may be a
    /// moment that is not the first of its icount: an interrupt may have been taken.
    pub fn observe(&mut self, observation: &Observation) {
        self.engine.observe(observation);
    }

    /// What the observation has found since the last call. To be called after every pause.
    pub fn take_hits(&mut self) -> Vec<Hit> {
        self.engine.take_hits()
    }

    /// Lets the next [`Machine::run`] execute the instruction at RIP even if there is a breakpoint on it.
    pub fn pass_breakpoint(&mut self) {
        self.engine.pass_breakpoint();
    }

    /// Writes RAM from outside, which makes this machine's future its own: no run has it. False, and nothing is
    /// written, if some of the bytes are not RAM.
    pub fn poke_memory(&mut self, gpa: u64, bytes: &[u8]) -> bool {
        use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
        self.settle_hash();
        let memory = &self.board.memory;
        if !memory.check_range(GuestAddress(gpa), bytes.len()) || memory.write_slice(bytes, GuestAddress(gpa)).is_err()
        {
            return false;
        }
        self.note_device_writes();
        true
    }

    /// Changes registers from outside, see [`Machine::poke_memory`].
    pub fn poke_cpu(&mut self, change: impl FnOnce(&mut CpuState)) {
        change(self.engine.state_mut());
        self.engine.state_replaced();
    }

    /// Output since the last call.
    pub fn take_output(&mut self) -> Vec<Output> {
        self.board.take_output()
    }

    /// Inputs that entered since the last call, stamped.
    pub fn take_inputs(&mut self) -> Vec<Input> {
        std::mem::take(&mut self.entered)
    }

    /// Gives inputs that are to enter at the first moment at which virtual time has reached theirs, whatever the icount
    /// is then: for timelines that no run has gone through yet.
    pub fn schedule(&mut self, inputs: Vec<Input>) {
        let promised = inputs.into_iter().map(Scheduled::from);
        self.inputs.extend(promised.map(|input| Scheduled { expected: None, ..input }));
    }

    /// Forgets the inputs that have not entered yet.
    pub fn forget_inputs(&mut self) {
        self.inputs.clear();
    }

    /// Gives the log of a run whose inputs are to enter again, from the first that has not entered yet.
    pub fn replay(&mut self, inputs: Vec<Input>) {
        self.inputs.extend(inputs.into_iter().map(Scheduled::from));
    }

    /// Gives bytes from outside. They enter at the next moment at which nothing else has happened yet.
    pub fn input(&mut self, channel: InputChannel, data: Vec<u8>) {
        let now = self.time();
        let at = if self.settled == Some(now) { VirtualNs(now.0.saturating_add(1)) } else { now };
        let at = self.inputs.back().map_or(at, |last| last.at.max(at));
        self.inputs.push_back(Scheduled { at, expected: None, channel, data });
    }

    /// Runs until a limit is reached or something else needs the caller.
    pub fn run(&mut self, limits: Limits) -> Result<Pause, ForeignInputs> {
        loop {
            let icount = self.engine.icount();
            if self.engine.is_unfinished() {
                // Nothing comes before its end.
                self.execute(Icount(icount.0 + 1));
                if self.engine.is_unfinished() && limits.pause_when_long {
                    return Ok(Pause::Unfinished);
                }
                continue;
            }
            let now = self.board.clock.now(icount);
            if self.engine.has_hits() {
                return Ok(Pause::Observed);
            }
            if let Some(ended) = &self.ended {
                return Ok(Pause::Ended(ended.clone()));
            }
            if icount >= limits.icount || now >= limits.time {
                return Ok(Pause::Limit);
            }
            if limits.pause_on_output && self.board.has_output_line() {
                return Ok(Pause::Output);
            }
            self.settle(icount, now)?;
            if self.deliver_interrupt() || self.ended.is_some() {
                continue;
            }
            let next = [self.board.queue.next_due(), self.inputs.front().map(|input| input.at)];
            let next = next.into_iter().flatten().min();
            if self.engine.state().halted {
                if let Some(pause) = self.idle(icount, next, &limits) {
                    return Ok(pause);
                }
                continue;
            }
            let bound = next.unwrap_or(limits.time).min(limits.time);
            let mut stop_at = limits.icount.min(self.board.clock.icount_at(bound));
            if self.board.nmi_pending() && !self.engine.state().nmi_blocked {
                // Only a shadow keeps it away, which the next instruction ends.
                stop_at = stop_at.min(Icount(icount.0 + 1));
            }
            self.board.begin_run(bound, limits.pause_on_output);
            self.execute(stop_at);
            if self.engine.is_unfinished() && limits.pause_when_long {
                return Ok(Pause::Unfinished);
            }
        }
    }

    /// Lets the engine go on, up to an icount.
    fn execute(&mut self, until: Icount) {
        let icount = self.engine.icount();
        let stop = self.engine.run(until, &mut self.board);
        self.first_moment |= self.engine.icount() > icount;
        self.first_moment &= stop != Stop::Unfinished;
        self.stopped(stop);
    }

    /// Lets inputs enter and delivers events whose time has come.
    fn settle(&mut self, icount: Icount, now: VirtualNs) -> Result<(), ForeignInputs> {
        self.settled = Some(now);
        self.first_moment = false;
        while self.inputs.front().is_some_and(|input| input.at <= now) {
            let Some(input) = self.inputs.pop_front() else { break };
            if let Some(expected) = input.expected
                && expected != icount
            {
                return Err(ForeignInputs { expected: expected.0, actual: icount.0 });
            }
            self.board.input(icount, input.channel, &input.data);
            self.inputs_entered += 1;
            self.entered.push(Input { icount: icount.0, virtual_ns: now.0, channel: input.channel, data: input.data });
        }
        self.board.deliver_events(icount);
        if self.board.devices_touched_memory() {
            self.note_device_writes();
        }
        if let Some(ended) = self.board.ended() {
            self.ended = Some(ended);
        }
        Ok(())
    }

    /// Tells the engine which pages devices have written.
    fn note_device_writes(&mut self) {
        for page in crate::digest::take_device_dirty(&self.board.memory) {
            self.engine.memory_written(page * PAGE_SIZE, PAGE_SIZE);
            self.dirty.insert(page);
        }
    }

    /// Asks the engine which pages were written since it was asked last. Nobody else asks it: it forgets them.
    fn collect_dirty(&mut self) {
        for page in self.engine.take_dirty() {
            self.dirty.insert(page);
        }
    }

    /// Takes a pending NMI, or else the highest pending interrupt, if the vCPU accepts one now; true if it did.
    fn deliver_interrupt(&mut self) -> bool {
        if self.board.nmi_pending() && self.engine.can_nmi() {
            self.board.acknowledge_nmi();
            if let Err(stop) = self.engine.nmi(&mut self.board) {
                self.stopped(stop);
            }
            return true;
        }
        let pending = self.board.interrupt_pending();
        let accepted = pending && self.engine.can_interrupt();
        self.board.window_requested = pending && !accepted;
        self.engine.request_interrupt_window(pending && !accepted);
        if accepted {
            let vector = self.board.acknowledge_interrupt();
            if let Err(stop) = self.engine.interrupt(vector, &mut self.board) {
                self.stopped(stop);
            }
        }
        accepted
    }

    /// The vCPU is halted and nothing wakes it now: skips to what comes next.
    fn idle(&mut self, icount: Icount, next: Option<VirtualNs>, limits: &Limits) -> Option<Pause> {
        let rip = self.engine.state().rip;
        if self.engine.state().rflags & rflags::IF == 0 {
            self.ended = Some(Ended::HaltedForever { rip });
        } else if limits.pause_when_idle && self.inputs.is_empty() {
            return Some(Pause::Idle { until: next });
        } else if let Some(next) = next {
            self.board.clock.skip_to(icount, next.min(limits.time));
        } else if limits.time != Limits::NONE.time {
            self.board.clock.skip_to(icount, limits.time);
        } else {
            self.ended = Some(Ended::IdleForever { rip });
        }
        None
    }

    fn stopped(&mut self, stop: Stop) {
        match stop {
            Stop::Limit
            | Stop::Attention
            | Stop::InterruptWindow
            | Stop::Halted
            | Stop::Observed
            | Stop::Unfinished => {}
            Stop::TripleFault => {
                self.ended = Some(Ended::TripleFault { registers: registers(self.engine.state()) });
            }
            Stop::Unsupported { rip, bytes, what } => {
                let bytes = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
                self.ended = Some(Ended::Unsupported { rip, bytes, what });
            }
        }
        if let Some(ended) = self.board.ended() {
            self.ended = Some(ended);
        }
        if self.board.devices_touched_memory() {
            self.note_device_writes();
        }
    }

    /// Hash of the complete state at this moment.
    pub fn state_hash(&mut self) -> Hash {
        self.update_digest();
        hash::finish(hash::begin(self.engine.icount(), self.engine.state(), &self.board), self.digest.value())
    }

    /// Bytes of RAM in pages that may have been written since the digest of RAM was brought up to date, at most.
    pub fn unhashed_bytes(&self) -> u64 {
        (self.engine.dirty_count() + self.dirty.digest.len()) as u64 * PAGE_SIZE
    }

    /// Brings the digest of RAM up to date.
    pub(crate) fn update_digest(&mut self) {
        self.settle_hash();
        self.collect_dirty();
        self.adopt_digest();
        self.digest.update(&self.board.memory, self.dirty.digest.take());
    }

    /// A branch that has no digest of its own yet takes its template's.
    fn adopt_digest(&mut self) {
        if let Some(source) = self.digest_source.take() {
            self.digest = source.digest().clone();
        }
    }
}

fn boot_state(entry: &boot::Entry) -> CpuState {
    CpuState::long_mode_boot(entry.rip, entry.zero_page, entry.rsp, entry.cr3, entry.gdt, boot::GDT_BYTES - 1)
}

/// The registers as text, for people.
pub fn registers(state: &CpuState) -> String {
    use std::fmt::Write;
    const NAMES: [&str; 16] =
        ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];
    let mut text = format!("rip {:016x} rflags {:08x} cpl {}\n", state.rip, state.rflags, state.cpl);
    for (index, (name, value)) in NAMES.iter().zip(state.gpr).enumerate() {
        let end = if index % 4 == 3 { '\n' } else { ' ' };
        let _ = write!(text, "{name:>3} {value:016x}{end}");
    }
    let _ = write!(
        text,
        "cr0 {:08x} cr2 {:016x} cr3 {:016x} cr4 {:08x} efer {:04x}\ncs {:04x} ss {:04x} tr {:04x} gdt {:016x}:{:04x} idt {:016x}:{:04x}",
        state.cr0,
        state.cr2,
        state.cr3,
        state.cr4,
        state.efer,
        state.seg[1].selector,
        state.seg[2].selector,
        state.tr.selector,
        state.gdtr.base,
        state.gdtr.limit,
        state.idtr.base,
        state.idtr.limit,
    );
    text
}
