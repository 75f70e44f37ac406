//! Steps both sides through a guest, one instruction of the engine at a time, and compares everything after each.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use iced_x86::{Decoder, DecoderOptions, Formatter, Instruction, IntelFormatter, Mnemonic, Register};
use orrery_cpu::engine::{Engine, EngineConfig, Stop, Undefined};
use orrery_cpu::memory::{GuestMemory, PAGE_SIZE};
use orrery_cpu::model::ModelFeatures;
use orrery_cpu::paging;
use orrery_cpu::state::{CpuState, gpr, rflags, seg};
use orrery_cpu::{Bus, Icount, PhysMemory, bus::MsrRefused};
use vm_memory::{Bytes, GuestAddress};

use crate::differences::{add, differences};
use crate::flags::UndefinedFlags;
use crate::machine::{self, Guest, RAM_BYTES};
use crate::quirks::{Meeting, branch_target, operand_address};
use crate::vm::{Step, Vm};

/// Most instructions of one guest.
const BUDGET: u64 = 20_000;
/// KVM does not stop behind some instructions (IRET here): the engine may have so many to make up for.
const CATCH_UP: u64 = 8;
/// A REP steps once per repetition; none of ours repeats more often.
const REPETITIONS: u64 = 20_000;

struct EmptyBus;

impl Bus for EmptyBus {
    fn port_read(&mut self, _: Icount, _: u16, size: usize) -> u32 {
        (1u64 << (8 * size)).wrapping_sub(1) as u32
    }
    fn port_write(&mut self, _: Icount, _: u16, _: usize, _: u32) {}
    fn mmio_read(&mut self, _: Icount, _: u64, data: &mut [u8]) {
        data.fill(0xFF);
    }
    fn mmio_write(&mut self, _: Icount, _: u64, _: &[u8]) {}
    fn msr_read(&mut self, _: Icount, _: u32) -> Result<u64, MsrRefused> {
        Err(MsrRefused)
    }
    fn msr_write(&mut self, _: Icount, _: u32, _: u64) -> Result<(), MsrRefused> {
        Err(MsrRefused)
    }
    fn task_priority(&mut self, _: Icount) -> u8 {
        0
    }
    fn set_task_priority(&mut self, _: Icount, _: u8) {}
    fn tsc(&mut self, now: Icount) -> u64 {
        now.0
    }
    fn random(&mut self) -> u64 {
        0x5EED
    }
    fn attention(&self) -> bool {
        false
    }
}

/// How a guest ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Both sides agreed to the end.
    Agreed,
    /// It was left where one side could not go on, for this reason.
    Skipped(String),
    /// KVM cannot execute this instruction.
    Refused(String, Option<Instruction>),
    /// What differed, and where.
    Differed(String),
}

/// Both sides.
pub struct Lockstep {
    vm: Vm,
    engine: Engine,
    memory: GuestMemory,
    view: PhysMemory,
    /// Instructions that the engine retired.
    pub steps: u64,
    /// Of these, those after which both sides were compared and agreed.
    pub comparisons: u64,
    start: u64,
    /// Status flags that may differ. A processor that steps with TF shows that in frames, too.
    undefined: UndefinedFlags,
    /// The guest is a case at CPL 0, where KVM may emulate everything.
    emulated: bool,
    /// The guest writes its code through another address than it is fetched from.
    writes_code: bool,
    /// Everything is printed before it runs.
    trace: bool,
    /// How often an instruction was compared, by mnemonic.
    pub executed: BTreeMap<String, u64>,
}

/// True if KVM's word is the engine's but for what QEMU 7.2 does to error codes: IDT indexes count gates of 16 bytes as
/// two (SDM volume 3, 6.13: the vector is the index), a reserved bit in a page table does not mean P, and the read of a
/// read-modify-write faults as a read (SDM volume 3, 4.7).
fn qemu_error_code(kvm: u64, engine: u64) -> bool {
    let index = engine & 2 != 0 && engine < 0x800 && kvm == (((engine & !7) * 2) | (engine & 7));
    let page_fault = engine < 32 && {
        let reserved = if engine & 9 == 9 { 1 } else { 0 };
        (kvm ^ engine) & !(2 | reserved) == 0 && kvm & 2 == 0
    };
    index || page_fault
}

/// True if an instruction's prefixes begin with REX, and others follow.
fn rex_is_followed_by_prefix(bytes: &[u8]) -> bool {
    let is_prefix = |byte: &u8| matches!(byte, 0x26 | 0x2E | 0x36 | 0x3E | 0x64..=0x67 | 0xF0 | 0xF2 | 0xF3);
    let prefixes = bytes.iter().take_while(|byte| is_prefix(byte) || matches!(byte, 0x40..=0x4F)).count();
    bytes[..prefixes].windows(2).any(|pair| !is_prefix(&pair[0]))
}

/// True for the bytes of a gather, even one that is #UD for the registers that it names.
fn is_gather(bytes: &[u8]) -> bool {
    let prefixes =
        bytes.iter().take_while(|byte| matches!(byte, 0x26 | 0x2E | 0x36 | 0x3E | 0x64 | 0x65 | 0x67)).count();
    matches!(bytes[prefixes..], [0xC4, map, _, 0x90..=0x93, ..] if map & 0x1F == 2)
}

impl Lockstep {
    /// Both sides, with nothing loaded.
    pub fn new(vm: Vm) -> Lockstep {
        let memory = machine::memory();
        let config = EngineConfig { code_cache_bytes: 16 << 20, ..EngineConfig::default() };
        let engine =
            Engine::new(memory.clone(), ModelFeatures::default(), config).expect("the host can run the engine");
        let view = PhysMemory::new(memory.clone());
        Lockstep {
            vm,
            engine,
            memory,
            view,
            steps: 0,
            comparisons: 0,
            start: 0,
            undefined: UndefinedFlags::default(),
            trace: std::env::var_os("KVM_ORACLE_TRACE").is_some(),
            emulated: false,
            writes_code: false,
            executed: BTreeMap::new(),
        }
    }

    /// The instruction that the engine is about to execute, if its bytes can be read.
    fn next_instruction(&self) -> Option<Instruction> {
        let state = self.engine.state();
        let bits = if state.is_64bit() { 64 } else { 32 };
        let instruction = Decoder::with_ip(bits, &self.next_bytes(), state.rip, DecoderOptions::NONE).decode();
        (!instruction.is_invalid()).then_some(instruction)
    }

    /// Guest-physical address of eight bytes of data, which lie in one page.
    fn data_address(&self, state: &CpuState, linear: u64) -> Option<u64> {
        paging::walk(state, &self.view, linear, paging::Access::data(state, false)).ok().map(|found| found.gpa)
    }

    /// If the engine has just entered a handler, and executed its first instruction: where the frame has RFLAGS.
    fn pushed_flags(&self) -> Option<u64> {
        let state = self.engine.state();
        let vector = machine::vector_at(state.rip)?;
        let has_error = matches!(vector, 8 | 10..=14 | 17);
        let offset = match state.rip % 16 {
            1 if state.halted => 16 + 8 * u64::from(has_error),
            // Where the processor pushes no error code, the handler has just done so.
            2 => 24,
            _ => return None,
        };
        self.data_address(state, state.gpr[gpr::RSP].wrapping_add(offset))
    }

    /// If the engine is about to return from a handler: where the frame has RFLAGS.
    fn flags_to_pop(&self, instruction: &Instruction) -> Option<u64> {
        let state = self.engine.state();
        let returns = instruction.mnemonic() == Mnemonic::Iretq && machine::is_common_handler(state.rip);
        returns.then(|| self.data_address(state, state.gpr[gpr::RSP].wrapping_add(16))).flatten()
    }

    /// Follows the flags that are undefined through an instruction of the engine. `popped` is from before it.
    fn follow_flags(&mut self, executed: Option<&Instruction>, popped: Option<u64>) {
        // #DB comes behind an instruction, the others in place of it.
        let faulted = machine::vector_at(self.engine.state().rip).is_some_and(|vector| vector != 1);
        match (executed, popped) {
            _ if faulted => {}
            (_, Some(gpa)) => self.undefined.pop(gpa),
            (Some(executed), None) => self.undefined.retire(executed, self.vm.emulated_processor),
            (None, None) => {}
        }
        if let Some(gpa) = self.pushed_flags()
            && let Ok(flags) = self.memory.read_obj(GuestAddress(gpa))
        {
            self.undefined.push(gpa, flags);
        }
    }

    /// Up to 15 bytes at RIP.
    fn next_bytes(&self) -> Vec<u8> {
        let state = self.engine.state();
        let linear = if state.is_64bit() { state.rip } else { state.seg[seg::CS].base.wrapping_add(state.rip) };
        let mut bytes = Vec::new();
        while bytes.len() < 15 {
            let at = linear.wrapping_add(bytes.len() as u64);
            let Ok(translation) = paging::walk(state, &self.view, at, paging::Access::fetch(state)) else {
                break;
            };
            let length = (PAGE_SIZE - at % PAGE_SIZE).min(15 - bytes.len() as u64);
            let Some(host) = self.view.host(translation.gpa, length) else {
                break;
            };
            // SAFETY: `host` is checked to be that long.
            bytes.extend_from_slice(unsafe { std::slice::from_raw_parts(host, length as usize) });
        }
        bytes
    }

    /// A word of the engine's memory, which lies in one page.
    fn read_word<T: vm_memory::ByteValued>(&self, state: &CpuState, linear: u64) -> Option<T> {
        self.memory.read_obj(GuestAddress(self.data_address(state, linear)?)).ok()
    }

    /// The processor below KVM is one that QEMU emulates.
    pub fn emulated_processor(&self) -> bool {
        self.vm.emulated_processor
    }

    /// KVM has no help of the processor here.
    pub fn emulates_kernel(&self) -> bool {
        self.vm.steps_by_trap
    }

    fn load(&mut self, state: &CpuState, image: &[u8]) -> Result<(), String> {
        machine::load(&self.memory, image);
        *self.engine.state_mut() = state.clone();
        self.engine.memory_written(0, RAM_BYTES);
        self.engine.state_replaced();
        let _ = self.engine.take_dirty();
        // A stepped HLT leaves a request to halt in KVM's emulator, which a later instruction would honour: one that
        // is not stepped takes it along.
        self.vm.load(&machine::halting_state(), image)?;
        self.vm.set_stepping(false);
        let step = self.vm.step();
        self.vm.set_stepping(true);
        if step != Step::Halted {
            return Err(format!("HLT ended in {step:?}"));
        }
        self.vm.load(state, image)
    }

    /// Steps KVM over one instruction or more. A REP stops after each repetition, and an exception may stop at its
    /// handler's first instruction, where the engine never does.
    fn step_kvm(&mut self, instruction: Option<Instruction>) -> Step {
        let mnemonic = instruction.map_or(Mnemonic::INVALID, |i| i.mnemonic());
        // With TF, a gather is left behind each element, too.
        let repeats = instruction.is_some_and(|i| i.has_rep_prefix() || i.has_repne_prefix() || i.is_vsib());
        let user = self.engine.state().cpl == 3;
        let returns = matches!(mnemonic, Mnemonic::Sysret | Mnemonic::Sysretq);
        if !user && (self.vm.steps_by_trap || returns) {
            self.trap_after_return(mnemonic);
        }
        if instruction.is_some_and(|i| i.op_count() == 2 && i.op1_register() == Register::DR6) {
            self.vm.clear_trap_status();
        }
        if returns && self.vm.steps_by_trap {
            // PVM loses its way when it steps SYSRET.
            self.vm.set_stepping(false);
        }
        let before = self.engine.state().rip;
        let mut step = Step::Refused("no end of repetitions".to_string());
        for _ in 0..REPETITIONS {
            step = self.vm.step();
            let rip = self.vm.rip();
            if step != Step::Done || !(repeats && rip == before || machine::is_handler(rip)) {
                break;
            }
        }
        if returns {
            self.vm.set_stepping(true);
        }
        self.hide_trap(mnemonic, user);
        step
    }

    /// Sets TF in the flags that a return to user mode is about to load.
    fn trap_after_return(&mut self, mnemonic: Mnemonic) {
        let memory = self.vm.memory();
        match mnemonic {
            Mnemonic::Sysret | Mnemonic::Sysretq => self.vm.change_registers(|r| r.r11 |= rflags::TF),
            Mnemonic::Iretq => {
                let frame = self.engine.state().gpr[gpr::RSP].wrapping_sub(machine::HIGH);
                if let (Ok(selector), Ok(flags)) =
                    (memory.read_obj::<u64>(GuestAddress(frame + 8)), memory.read_obj::<u64>(GuestAddress(frame + 16)))
                    && selector & 3 == 3
                {
                    let _ = memory.write_obj(flags | rflags::TF, GuestAddress(frame + 16));
                }
            }
            _ => {}
        }
    }

    /// Takes TF out of where the instruction has put it.
    fn hide_trap(&mut self, mnemonic: Mnemonic, user: bool) {
        match mnemonic {
            Mnemonic::Syscall if user => self.vm.change_registers(|r| r.r11 &= !rflags::TF),
            Mnemonic::Sysret | Mnemonic::Sysretq => self.vm.change_registers(|r| r.r11 &= !rflags::TF),
            Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq
                if !self.vm.steps_by_trap || user && self.vm.is_parked() =>
            {
                let like = self.engine.state();
                let at = self.vm.capture(like).gpr[gpr::RSP].wrapping_add(1);
                if let Ok(translation) = paging::walk(like, &self.view, at, paging::Access::data(like, true)) {
                    let at = GuestAddress(translation.gpa);
                    let memory = self.vm.memory();
                    let byte: u8 = memory.read_obj(at).unwrap_or(0);
                    let _ = memory.write_obj(byte & !1, at);
                }
            }
            _ => {}
        }
    }

    /// Steps the engine until it agrees with KVM, which stands between two instructions, has halted or shut down.
    /// True if the guest has ended.
    fn catch_up(&mut self, target: &Step, instruction: Option<Instruction>) -> Result<bool, Verdict> {
        self.undefined.agree();
        let (mut refused_base, mut refused_target) = (false, false);
        let bytes = self.next_bytes();
        let mut mnemonics = Vec::new();
        let mut dirty = false;
        let before = self.engine.state().clone();
        let mut engine_vector = None;
        let kvm = self.vm.capture(self.engine.state());
        let mut first = None;
        let mut met = None;
        // A processor that steps with TF does not stop in handlers, where TF is clear.
        // Nor does it in what follows a return to the kernel that is none: the frame with TF is then forgotten.
        let catch_up = if self.vm.steps_by_trap { CATCH_UP } else { BUDGET / 2 };
        let mut left = catch_up;
        let mut is_first = true;
        while left > 0 {
            let now = self.engine.icount();
            let executed = if is_first || !self.vm.emulated_processor { instruction } else { self.next_instruction() };
            mnemonics.extend(executed.map(|i| i.mnemonic()));
            let loads_base = executed.is_some_and(|i| i.mnemonic() == Mnemonic::Wrmsr)
                && matches!(self.engine.state().gpr[gpr::RCX] as u32, 0xC000_0100..=0xC000_0102);
            let target_is_not_canonical = executed
                .and_then(|i| branch_target(&i, self.engine.state(), |at| self.read_word(self.engine.state(), at)))
                .is_some_and(|target| !paging::is_canonical(target));
            let popped = executed.and_then(|i| self.flags_to_pop(&i));
            let stop = self.engine.run(Icount(now.0 + 1), &mut EmptyBus);
            self.steps += 1;
            dirty |= !self.engine.take_dirty().is_empty();
            self.follow_flags(executed.as_ref(), popped);
            let vector = machine::vector_at(self.engine.state().rip);
            refused_base |= loads_base && vector.is_some();
            refused_target |= target_is_not_canonical && vector == Some(13);
            if self.trace {
                let (state, undefined) = (self.engine.state(), self.undefined.now());
                eprintln!(
                    "  engine: {:?}, then rip {:#x}, rflags {:#x}, of which {undefined:#x} undefined",
                    executed.map(|i| i.mnemonic()),
                    state.rip,
                    state.rflags
                );
            }
            if !self.vm.steps_by_trap
                && executed.is_some_and(|i| matches!(i.mnemonic(), Mnemonic::Rdtsc | Mnemonic::Rdtscp))
            {
                // The processor's time is its own.
                for register in [gpr::RAX, gpr::RDX] {
                    self.engine.state_mut().gpr[register] = kvm.gpr[register];
                }
            }
            let state = self.engine.state();
            if std::mem::take(&mut is_first) {
                engine_vector = machine::vector_at(state.rip);
            }
            let there = match (target, &stop) {
                (_, Stop::Unsupported { what, .. }) => return Err(Verdict::Skipped(format!("engine: {what}"))),
                (Step::Shutdown, Stop::TripleFault) => return Ok(true),
                (Step::Done, Stop::Limit | Stop::Halted) => {
                    state.rip == kvm.rip && state.seg[seg::CS].selector == kvm.seg[seg::CS].selector
                }
                (Step::Halted, Stop::Halted) => true,
                (_, Stop::Limit) => false,
                (_, stop) => {
                    first.get_or_insert(format!("  KVM {target:?} at {:#x}, engine {stop:?}\n", kvm.rip));
                    break;
                }
            };
            if there {
                let mut report = differences(&kvm, state, self.undefined.now());
                // What KVM emulates may have written the first of two pages before the second one faulted.
                let torn = self.emulated && matches!(machine::vector_at(kvm.rip), Some(8 | 14));
                // Comparing all of RAM is most of the work where the processor is emulated: done when the engine has written,
                // now and then, and at the end.
                let due = dirty || !self.vm.emulated_processor || self.steps % 16 < 2 || stop != Stop::Limit;
                if !torn && due {
                    report += &self.memory_differences();
                }
                if report.is_empty() {
                    self.comparisons += 1;
                    let (flags, undefined) = (state.rflags, self.undefined.now() & rflags::STATUS);
                    let model_is_elsewhere = self.vm.emulated_processor || Undefined::measured() != Undefined::NONE;
                    if model_is_elsewhere && (flags ^ kvm.rflags) & undefined != 0 {
                        // What is undefined is the model's from here on.
                        self.vm.change_flags(undefined, flags);
                    }
                    return Ok(stop != Stop::Limit);
                }
                if first.is_none() {
                    met = Some(state.clone());
                    first = Some(report);
                }
            }
            if stop == Stop::Halted {
                break;
            }
            // Everything before HLT may run without a stop.
            if *target == Step::Done {
                left -= 1;
            } else if self.steps - self.start >= BUDGET {
                if first.is_some() {
                    break;
                }
                return Err(Verdict::Skipped("no end in sight".to_string()));
            }
        }
        let state = self.engine.state();
        let meeting = Meeting {
            instruction,
            before: &before,
            engine_vector,
            emulates_kernel: self.vm.steps_by_trap,
            emulated_processor: self.vm.emulated_processor,
            mnemonics: &mnemonics,
            rex_is_followed_by_prefix: rex_is_followed_by_prefix(&bytes),
            refused_base,
            refused_target,
            is_gather: is_gather(&bytes),
            writes_code: self.writes_code,
            image_mxcsr: instruction
                .and_then(|instruction| operand_address(&instruction, &before))
                .and_then(|at| self.read_word(&before, at.wrapping_add(24))),
            kvm: &kvm,
            engine: met.as_ref().unwrap_or(state),
        };
        if let Some(quirk) = meeting.explain() {
            if self.vm.emulated_processor {
                // Not the instruction as such: others with it go on being tried.
                return Err(Verdict::Skipped(format!("QEMU: {quirk}")));
            }
            return Err(Verdict::Refused(quirk.to_string(), instruction));
        }
        let mut report = first.unwrap_or_else(|| {
            format!(
                "  KVM {target:?} at {:#x}, cr2 {:#x}, rsp {:#x}; the engine does not get there, but to {:#x}\n",
                kvm.rip,
                kvm.cr2,
                kvm.gpr[gpr::RSP],
                state.rip
            )
        });
        if mnemonics.len() > 1 {
            let last = &mnemonics[mnemonics.len().saturating_sub(40)..];
            let _ = writeln!(
                report,
                "  one step of KVM ({target:?} at {:#x}); the engine executed {} instructions, at last {last:?}",
                kvm.rip,
                mnemonics.len()
            );
        }
        Err(Verdict::Differed(report))
    }

    /// Pages that differ, but for accessed and dirty bits of page tables.
    fn memory_differences(&self) -> String {
        let (kvm, engine) = (machine::contents(self.vm.memory()), machine::contents(&self.memory));
        let mut report = String::new();
        if kvm == engine {
            return report;
        }
        for at in (0..kvm.len()).step_by(8) {
            let word = |bytes: &[u8]| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
            let (k, e) = (word(kvm), word(engine));
            let mask = match at as u64 {
                at if machine::is_table(at) => !0x60,
                at if machine::is_step_stack(at) && self.vm.steps_by_trap => 0,
                // KVM leaves RF set if a fault turned into the double fault.
                at if machine::is_double_fault_flags(at) => !(rflags::TF | rflags::RF),
                // Stepping shows in the flags that some KVMs push.
                // QEMU pushes RF as it is, where processors set it for faults (SDM volume 3, 18.3.1.1).
                at if self.vm.emulated_processor && self.undefined.of_frame(at, e).is_some() => {
                    !(rflags::TF | rflags::RF | self.undefined.of_frame(at, e).unwrap_or(0))
                }
                at if self.undefined.of_frame(at, e).is_some() && !self.vm.steps_by_trap => !rflags::TF,
                at if self.vm.emulated_processor && machine::is_kernel_stack(at) && qemu_error_code(k, e) => 0,
                at if machine::is_kernel_stack(at) => !rflags::TF,
                _ => !0,
            };
            // MXCSR_MASK of an AMD host, in an image of FXSAVE or XSAVE.
            let mxcsr_mask = k >> 32 == 0x2_FFFF && e >> 32 == 0xFFFF && k as u32 == e as u32;
            if (k ^ e) & mask != 0 && !mxcsr_mask {
                add(&mut report, &format!("memory at {at:#x}"), k, e);
            }
        }
        report
    }

    /// Runs `guest` on both sides to its end.
    ///
    /// `changes_tables` says that it changes page tables, which KVM must then see loaded anew: that takes it
    /// milliseconds.
    pub fn run(&mut self, name: &str, guest: &Guest, changes_tables: bool) -> Verdict {
        if changes_tables && let Err(reason) = self.vm.forget_translations() {
            return Verdict::Skipped(reason);
        }
        let (state, image) = (machine::state(guest), machine::ram(guest));
        if let Err(reason) = self.load(&state, &image) {
            return Verdict::Skipped(reason);
        }
        self.start = self.steps;
        self.undefined.start();
        self.emulated = matches!(guest, Guest::Case(_, true));
        self.writes_code = name.contains("self_modifying");
        let mut formatter = IntelFormatter::new();
        while self.steps - self.start < BUDGET {
            let instruction = self.next_instruction();
            let mut text = format!("(no instruction: {:02x?})", self.next_bytes());
            if let Some(instruction) = &instruction {
                text.clear();
                formatter.format(instruction, &mut text);
            }
            let rip = self.engine.state().rip;
            let place = format!("{name}: {text} at {rip:#x}, step {}", self.steps - self.start);
            if self.trace {
                eprintln!("{place}");
            }
            let mnemonic = instruction.map_or("none".to_string(), |i| format!("{:?}", i.mnemonic()).to_lowercase());
            *self.executed.entry(mnemonic.clone()).or_default() += 1;
            let step = self.step_kvm(instruction);
            if let Step::Refused(reason) = step {
                return Verdict::Refused(reason, instruction);
            }
            match self.catch_up(&step, instruction) {
                Ok(true) => return Verdict::Agreed,
                Ok(false) => {}
                Err(Verdict::Differed(report)) => return Verdict::Differed(format!("{place}\n{report}")),
                Err(other) => return other,
            }
        }
        Verdict::Skipped("no end in sight".to_string())
    }
}
