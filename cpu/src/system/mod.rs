//! Everything that the processor does besides plain arithmetic: privileged instructions, segmentation, control
//! transfers through descriptors, interrupt delivery, string and port instructions, the state of x87, SSE and AVX
//! as memory images.
//!
//! The engine executes ordinary instructions natively and hands every other one, decoded, to [`execute`]. What the
//! emulation needs in return (linear memory, caches of translations, the bus, time) it asks of a [`System`]. It
//! knows no engine and no host. All of it is a pure function of the state, memory and the answers of the bus.
//!
//! Not modelled: task switches, virtual-8086 mode, paging outside long mode, gates and interrupt delivery in
//! protected mode outside long mode. Breakpoints and single-stepping are the engine's.

pub(crate) mod alignment;
mod approximate;
mod arithmetic;
pub(crate) mod availability;
mod bits;
mod control;
mod descriptors;
mod gates;
mod interrupts;
mod io;
mod legacy;
mod masked;
mod operand;
mod privileged;
mod real;
mod scalar;
mod sha;
mod strings;
#[cfg(test)]
mod tests;
mod transfers;
mod x87;
mod xsave;

use crate::bus::{Bus, MsrRefused};
use crate::exception::Exception;
use crate::model::ModelFeatures;
use crate::state::{CpuState, rflags};
use crate::{Icount, paging};
use iced_x86::{Instruction, InstructionInfoFactory, Mnemonic, OpAccess};

pub use interrupts::{TripleFault, deliver_exception, deliver_interrupt, deliver_nmi};
pub use operand::effective_address;
pub(crate) use operand::{effective_offset, next_rip as rip_behind};
pub use paging::is_canonical;
pub use scalar::bit_string_address;

/// With whose rights a linear address is accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privilege {
    /// The current instruction's: CPL, and SMAP as RFLAGS.AC says.
    Current,
    /// An implicit supervisor access (descriptor tables, TSS, frames of exceptions): SMAP applies in any case.
    Supervisor,
}

impl Privilege {
    /// The access that [`paging::walk`] is to check.
    pub fn data(self, state: &CpuState, write: bool) -> paging::Access {
        match self {
            Privilege::Current => paging::Access::data(state, write),
            Privilege::Supervisor => paging::Access::supervisor(write),
        }
    }
}

/// Which cached translations are void.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// All of them, in every address space, global pages too (CR0, CR4, EFER, INVPCID type 2).
    All,
    /// All but global pages, in every address space (INVPCID type 3).
    NonGlobal,
    /// One page of the current address space, and global translations of it (INVLPG).
    Page(u64),
    /// CR3 was loaded: the address space is now that of `pcid` (0 without CR4.PCIDE). Its non-global translations
    /// are void unless `keep` is set; those of other address spaces must not be used but may be kept.
    AddressSpace {
        /// Process-context identifier of the new address space.
        pcid: u16,
        /// Translations cached for `pcid` are still valid.
        keep: bool,
    },
    /// All non-global translations of one address space (INVPCID type 1).
    Pcid(u16),
    /// One page of one address space, global pages excepted (INVPCID type 0).
    PcidPage(u16, u64),
}

/// What the emulation needs of the engine.
pub trait System {
    /// Reads `data.len()` (1..=4096) bytes at a linear address, all or nothing; may cross pages. Where that is not
    /// RAM it asks the bus. Errors: #PF.
    fn read(
        &mut self,
        state: &mut CpuState,
        linear: u64,
        data: &mut [u8],
        privilege: Privilege,
    ) -> Result<(), Exception>;
    /// Writes `data` (1..=4096 bytes) at a linear address: no byte is written unless all can be. Errors: #PF.
    fn write(&mut self, state: &mut CpuState, linear: u64, data: &[u8], privilege: Privilege) -> Result<(), Exception>;
    /// Host pointer to `linear`, translated for reading or writing, valid to the end of the 4 KiB page until the
    /// state changes; None where there is no RAM. With `write` set, the engine counts the `len` bytes from
    /// there (which lie in the page) as written. Errors: #PF.
    fn page_pointer(
        &mut self,
        state: &mut CpuState,
        linear: u64,
        len: usize,
        write: bool,
        privilege: Privilege,
    ) -> Result<Option<*mut u8>, Exception>;
    /// Forgets cached translations. The state has been changed already.
    fn flush(&mut self, what: Flush);
    /// The machine around the vCPU.
    fn bus(&mut self) -> &mut dyn Bus;
    /// Instructions retired before the current one.
    fn now(&self) -> Icount;
    /// What this machine's CPU model has.
    fn features(&self) -> &ModelFeatures;
    /// Runs of elements after which a repeated string instruction that is not done comes back, see
    /// [`Outcome::Unfinished`]; not zero.
    fn patience(&self) -> u32 {
        u32::MAX
    }
}

/// How an emulated instruction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It retired; `state.rip` is that of the next instruction.
    Next,
    /// HLT retired; `state.halted` is set.
    Halt,
    /// A repeated string instruction has done a part of its work. It has not retired: RCX, RSI and RDI say how far it
    /// came, and executing it again, with nothing else in between, does the rest.
    Unfinished,
}

/// Why an instruction was not executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExecError {
    /// It raises an exception, which has not been delivered. The state is that before the instruction, but for
    /// RCX, RSI and RDI of a REP string instruction and the mask of a gather, which say how far it came.
    #[error("exception {0:?}")]
    Exception(Exception),
    /// The emulation lacks it.
    #[error("{0}")]
    Unsupported(&'static str),
}

impl From<Exception> for ExecError {
    fn from(exception: Exception) -> ExecError {
        ExecError::Exception(exception)
    }
}

impl From<MsrRefused> for ExecError {
    fn from(_: MsrRefused) -> ExecError {
        ExecError::Exception(Exception::GP0)
    }
}

pub(crate) type Executed = Result<Outcome, ExecError>;

/// #UD
pub(crate) const UD: ExecError = ExecError::Exception(Exception::InvalidOpcode);
/// #GP(0)
pub(crate) const GP0: ExecError = ExecError::Exception(Exception::GP0);

/// Linear address of the memory operand number `operand`, with the checks of its segment for the way it is accessed.
pub(crate) fn operand_address(state: &CpuState, instr: &Instruction, operand: u32) -> Result<u64, Exception> {
    use OpAccess::{CondWrite, ReadCondWrite, ReadWrite, Write};
    let access = InstructionInfoFactory::new().info(instr).op_access(operand);
    let write = matches!(access, Write | CondWrite | ReadWrite | ReadCondWrite);
    operand::address(state, instr, instr.memory_size().size().max(1), write)
}

/// Retires `instr`: RIP goes to the instruction behind it.
#[inline]
pub(crate) fn retire(state: &mut CpuState, instr: &Instruction) -> Executed {
    state.rip = operand::next_rip(state, instr);
    Ok(Outcome::Next)
}

/// Executes `instr`, which lies at `state.rip`. On success it has retired and RIP is that of the next one.
///
/// `instr` may have been decoded at any other address: only its length, its operands and the distance of its
/// relative ones are used. On an error nothing has changed, see [`ExecError::Exception`]; CR2 is set at delivery.
pub fn execute(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    let shadow_before = state.interrupt_shadow;
    state.interrupt_shadow = false;
    let result = dispatch(state, instr, sys);
    if result.is_err() {
        state.interrupt_shadow = shadow_before;
    }
    result
}

fn dispatch(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    use Mnemonic::*;
    if instr.is_invalid() {
        return Err(UD);
    }
    match instr.mnemonic() {
        // The hot ones of kernels first; the compiler makes a table of it.
        Syscall => transfers::syscall(state, instr),
        Sysretq => transfers::sysret(state, true),
        Sysret => transfers::sysret(state, false),
        Iretq | Iretd | Iret => transfers::iret(state, instr, sys),
        Swapgs => privileged::swapgs(state, instr),
        Cli => privileged::cli(state, instr),
        Sti => privileged::sti(state, instr),
        Clac => privileged::access_flag(state, instr, false),
        Stac => privileged::access_flag(state, instr, true),
        Pushfq | Pushfd | Pushf => privileged::pushf(state, instr, sys),
        Popfq | Popfd | Popf => privileged::popf(state, instr, sys),
        Cld => {
            state.rflags &= !rflags::DF;
            retire(state, instr)
        }
        Std => {
            state.rflags |= rflags::DF;
            retire(state, instr)
        }
        Rdtsc => privileged::rdtsc(state, instr, sys),
        Rdtscp => privileged::rdtscp(state, instr, sys),
        Rdmsr => privileged::rdmsr(state, instr, sys),
        Wrmsr => privileged::wrmsr(state, instr, sys),
        Cpuid => privileged::cpuid(state, instr, sys),
        Rdrand | Rdseed => privileged::random(state, instr, sys),
        Rdfsbase | Rdgsbase | Wrfsbase | Wrgsbase => privileged::segment_base(state, instr),
        Hlt => privileged::hlt(state, instr),
        Invlpg => control::invlpg(state, instr, sys),
        Invpcid => control::invpcid(state, instr, sys),
        Mov => match operand::special_move(instr) {
            operand::SpecialMove::None => scalar::execute(state, instr, sys),
            operand::SpecialMove::Segment => descriptors::mov_segment(state, instr, sys),
            operand::SpecialMove::Control => control::mov_control(state, instr, sys),
            operand::SpecialMove::Debug => control::mov_debug(state, instr),
        },
        Movsb | Movsw | Movsq | Stosb | Stosw | Stosd | Stosq | Lodsb | Lodsw | Lodsd | Lodsq | Cmpsb | Cmpsw
        | Cmpsq | Scasb | Scasw | Scasd | Scasq => strings::execute(state, instr, sys),
        // These two names are shared with SSE2.
        Movsd | Cmpsd if instr.is_string_instruction() => strings::execute(state, instr, sys),
        In | Out => io::port(state, instr, sys),
        Insb | Insw | Insd | Outsb | Outsw | Outsd => io::string(state, instr, sys),
        Clts => control::clts(state, instr),
        Lmsw => control::lmsw(state, instr, sys),
        Smsw => control::smsw(state, instr, sys),
        Xgetbv => control::xgetbv(state, instr),
        Xsetbv => control::xsetbv(state, instr),
        Rdpmc => privileged::rdpmc(state),
        Invd | Wbinvd => privileged::cache_control(state, instr),
        Clflush | Clflushopt | Clwb => privileged::cache_line(state, instr, sys),
        Nop | Pause | Prefetchnta | Prefetcht0 | Prefetcht1 | Prefetcht2 | Prefetchw | Prefetch | Prefetchwt1
        | Lfence | Sfence | Mfence | Endbr64 | Endbr32 | Rdsspd | Rdsspq | Reservednop => retire(state, instr),
        Int | Int3 | Int1 | Into => interrupts::software(state, instr, sys),
        Sysenter => transfers::sysenter(state),
        Sysexit | Sysexitq => transfers::sysexit(state, instr.mnemonic() == Sysexitq),
        Retf => transfers::far_return(state, instr, sys),
        Jmp | Call if operand::is_far(instr) => transfers::far_branch(state, instr, sys),
        Lgdt | Lidt => descriptors::load_table(state, instr, sys),
        Sgdt | Sidt => descriptors::store_table(state, instr, sys),
        Lldt => descriptors::lldt(state, instr, sys),
        Ltr => descriptors::ltr(state, instr, sys),
        Sldt | Str => descriptors::store_selector(state, instr, sys),
        Lar | Lsl => descriptors::lar_lsl(state, instr, sys),
        Verr | Verw => descriptors::verify(state, instr, sys),
        Arpl => descriptors::arpl(state, instr, sys),
        Lds | Les | Lfs | Lgs | Lss => descriptors::load_far_pointer(state, instr, sys),
        Push if instr.op0_register().is_segment_register() => descriptors::push_segment(state, instr, sys),
        Pop if instr.op0_register().is_segment_register() => descriptors::pop_segment(state, instr, sys),
        Fxsave | Fxsave64 => xsave::fxsave(state, instr, sys),
        Fxrstor | Fxrstor64 => xsave::fxrstor(state, instr, sys),
        Xsave | Xsave64 => xsave::xsave(state, instr, sys),
        Xrstor | Xrstor64 => xsave::xrstor(state, instr, sys),
        Ldmxcsr | Vldmxcsr => xsave::ldmxcsr(state, instr, sys),
        Stmxcsr | Vstmxcsr => xsave::stmxcsr(state, instr, sys),
        Fnsave | Fsave => x87::fnsave(state, instr, sys),
        Frstor => x87::frstor(state, instr, sys),
        Fnstenv | Fstenv => x87::fnstenv(state, instr, sys),
        Fldenv => x87::fldenv(state, instr, sys),
        Maskmovq | Maskmovdqu | Vmaskmovdqu => masked::maskmov_bytes(state, instr, sys),
        Vmaskmovps | Vmaskmovpd | Vpmaskmovd | Vpmaskmovq => masked::vmaskmov(state, instr, sys),
        Vgatherdps | Vgatherdpd | Vgatherqps | Vgatherqpd | Vpgatherdd | Vpgatherdq | Vpgatherqd | Vpgatherqq => {
            masked::gather(state, instr, sys)
        }
        Rcpps | Rcpss | Rsqrtps | Rsqrtss | Vrcpps | Vrcpss | Vrsqrtps | Vrsqrtss => {
            approximate::reciprocal(state, instr, sys)
        }
        F2xm1 | Fcos | Fpatan | Fptan | Fsin | Fsincos | Fyl2x | Fyl2xp1 => {
            approximate::transcendental(state, instr, sys)
        }
        Sha1rnds4 | Sha1nexte | Sha1msg1 | Sha1msg2 | Sha256rnds2 | Sha256msg1 | Sha256msg2 => {
            sha::execute(state, instr, sys)
        }
        Enter => legacy::enter(state, instr, sys),
        Bound => legacy::bound(state, instr, sys),
        Xlatb => legacy::xlat(state, instr, sys),
        Pusha | Pushad => legacy::pusha(state, instr, sys),
        Popa | Popad => legacy::popa(state, instr, sys),
        Aaa | Aas | Daa | Das | Aam | Aad | Salc => legacy::decimal(state, instr),
        Cmpxchg8b | Cmpxchg16b => legacy::compare_exchange_wide(state, instr, sys),
        Ud0 | Ud1 | Ud2 | Monitor | Mwait | Rsm | Rdpid => Err(UD),
        _ => match availability::refused(state, instr) {
            Some(exception) => Err(exception.into()),
            None => scalar::execute(state, instr, sys),
        },
    }
}
