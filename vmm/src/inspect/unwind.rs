//! Stack backtraces, kernel and user. Each frame says how it was found: by tables that the compiler made, by a chain
//! of frame pointers, or by a guess.

use std::sync::Arc;

use gimli::{BaseAddresses, CfaRule, EhFrame, EhFrameHdr, LittleEndian, RegisterRule, UnwindSection};
use orrery_cpu::CpuState;
use orrery_cpu::state::gpr;
use serde::Serialize;

use super::mappings::Mapping;
use super::memory::AddressSpace;
use super::object::{Object, UnwindTables};

/// Most frames of one backtrace.
pub const FRAMES_MAX: usize = 512;
/// Words of a stack that are looked through for a return address.
const SCAN_WORDS: u64 = 512;
/// Most bytes between two frames that are chained by frame pointers.
const FRAME_BYTES_MAX: u64 = 1 << 20;
/// Numbers of DWARF registers (System V ABI, AMD64 supplement, figure 3.36) to numbers in encoding order.
const DWARF_REGISTERS: [usize; 16] = [
    gpr::RAX,
    gpr::RDX,
    gpr::RCX,
    gpr::RBX,
    gpr::RSI,
    gpr::RDI,
    gpr::RBP,
    gpr::RSP,
    gpr::R8,
    gpr::R9,
    gpr::R10,
    gpr::R11,
    gpr::R12,
    gpr::R13,
    gpr::R14,
    gpr::R15,
];

/// Registers of a frame, as far as they are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registers {
    /// The instruction.
    pub rip: u64,
    /// General-purpose registers in encoding order.
    pub gpr: [Option<u64>; 16],
}

impl Registers {
    /// Those of the vCPU.
    pub fn of(cpu: &CpuState) -> Registers {
        Registers { rip: cpu.rip, gpr: cpu.gpr.map(Some) }
    }

    /// From the kernel's `struct pt_regs` (arch/x86/include/asm/ptrace.h).
    pub fn from_pt_regs(space: &AddressSpace, address: u64) -> Option<Registers> {
        const ORDER: [usize; 15] = [
            gpr::R15,
            gpr::R14,
            gpr::R13,
            gpr::R12,
            gpr::RBP,
            gpr::RBX,
            gpr::R11,
            gpr::R10,
            gpr::R9,
            gpr::R8,
            gpr::RAX,
            gpr::RCX,
            gpr::RDX,
            gpr::RSI,
            gpr::RDI,
        ];
        let word = |number: u64| space.u64(address.wrapping_add(8 * number)).ok();
        let mut registers = Registers { rip: word(16)?, gpr: [None; 16] };
        for (number, register) in ORDER.into_iter().enumerate() {
            registers.gpr[register] = word(number as u64);
        }
        // `orig_ax` holds the system call's number, or an error code; RAX is what the call has put there since.
        registers.gpr[gpr::RSP] = Some(word(19)?);
        Some(registers)
    }
}

/// How a frame was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum How {
    /// It is where the vCPU, or the thread, is.
    Exact,
    /// By the compiler's or the kernel's unwind tables.
    Tables,
    /// By a chain of frame pointers.
    FramePointer,
    /// A word on the stack looks like a return address: the frame may be wrong.
    Guess,
}

/// One user-mode step.
pub(super) struct UserStep {
    pub caller: Registers,
    pub how: How,
}

/// Unwinds user stacks.
pub(super) struct UserUnwinder<'a> {
    pub space: AddressSpace<'a>,
    pub mappings: &'a [Mapping],
    /// The object that a mapping shows.
    pub object: &'a dyn Fn(&Mapping) -> Option<Arc<Object>>,
}

impl UserUnwinder<'_> {
    fn mapping(&self, address: u64) -> Option<&Mapping> {
        let after = self.mappings.partition_point(|mapping| mapping.start <= address);
        self.mappings.get(after.checked_sub(1)?).filter(|mapping| address < mapping.end)
    }

    /// The path of the file that is mapped at an address.
    pub fn file(&self, address: u64) -> Option<String> {
        self.mapping(address)?.file.as_ref().map(|file| file.path.clone())
    }

    /// The caller of the frame with these registers; None where the stack ends. `returning`: RIP is a return address.
    pub fn step(&self, registers: &Registers, returning: bool) -> Option<UserStep> {
        let pc = registers.rip.wrapping_sub(u64::from(returning));
        if let Some(mapping) = self.mapping(pc)
            && let Some(object) = (self.object)(mapping)
            && let Some(address) = object.address_of_offset((pc - mapping.start).wrapping_add(mapping.offset))
        {
            if let Some(go) = &object.go
                && go.is_outermost(address)
            {
                return None;
            }
            let by_go = || self.by_go(&object, address, registers);
            match by_go().or_else(|| self.by_tables(&object, address, pc, registers)) {
                Some(Some(caller)) => return self.checked(registers, caller, How::Tables),
                Some(None) => return None,
                None => {}
            }
        }
        self.by_frame_pointer(registers).or_else(|| self.by_scan(registers))
    }

    /// A caller is believed if its code is executable and its frame lies above.
    fn checked(&self, registers: &Registers, caller: Registers, how: How) -> Option<UserStep> {
        let (below, above) = (registers.gpr[gpr::RSP]?, caller.gpr[gpr::RSP]?);
        let executable = self.mapping(caller.rip.wrapping_sub(1)).is_some_and(|mapping| mapping.executable);
        (executable && above > below).then_some(UserStep { caller, how })
    }

    fn by_go(&self, object: &Object, address: u64, registers: &Registers) -> Option<Found> {
        let bytes = object.go.as_ref()?.frame_bytes(address)?;
        let return_place = registers.gpr[gpr::RSP]?.checked_add(bytes)?;
        let mut caller = *registers;
        caller.rip = self.space.u64(return_place).ok()?;
        caller.gpr = [None; 16];
        caller.gpr[gpr::RSP] = Some(return_place.wrapping_add(8));
        caller.gpr[gpr::RBP] = match bytes {
            0 => registers.gpr[gpr::RBP],
            _ => self.space.u64(return_place.wrapping_sub(8)).ok(),
        };
        Some(Some(caller))
    }

    /// By `.eh_frame` (Linux Standard Base, 10.6; DWARF 5, section 6.4).
    fn by_tables(&self, object: &Object, address: u64, pc: u64, registers: &Registers) -> Option<Found> {
        let tables = object.unwind.as_ref()?;
        let bias = pc.wrapping_sub(address);
        let frames = EhFrame::new(&tables.frames.1, LittleEndian);
        let mut context = gimli::UnwindContext::new();
        let row = find_row(tables, &frames, address, &mut context)?;
        let known = |register: gimli::Register| registers.gpr[*DWARF_REGISTERS.get(usize::from(register.0))?];
        let evaluate = |expression: &gimli::UnwindExpression<usize>, start: Option<u64>| {
            let expression = expression.get(&frames).ok()?;
            self.evaluate(expression, start, bias, &known)
        };
        let cfa = match row.cfa() {
            CfaRule::RegisterAndOffset { register, offset } => known(*register)?.wrapping_add_signed(*offset),
            CfaRule::Expression(expression) => evaluate(expression, None)?,
        };
        let value = |rule: RegisterRule<usize>, same: Option<u64>| match rule {
            RegisterRule::SameValue => same,
            RegisterRule::Offset(offset) => self.space.u64(cfa.wrapping_add_signed(offset)).ok(),
            RegisterRule::ValOffset(offset) => Some(cfa.wrapping_add_signed(offset)),
            RegisterRule::Register(register) => known(register),
            RegisterRule::Expression(expression) => self.space.u64(evaluate(&expression, Some(cfa))?).ok(),
            RegisterRule::ValExpression(expression) => evaluate(&expression, Some(cfa)),
            RegisterRule::Constant(value) => Some(value),
            _ => None,
        };
        let mut caller = Registers { rip: 0, gpr: [None; 16] };
        for (number, place) in DWARF_REGISTERS.into_iter().enumerate() {
            // Registers that the ABI lets a function change are not known further up, unless the tables say so.
            let kept = [gpr::RBX, gpr::RBP, gpr::R12, gpr::R13, gpr::R14, gpr::R15].contains(&place);
            caller.gpr[place] = match row.register(gimli::Register(number as u16)) {
                Some(rule) => value(rule, registers.gpr[place]),
                None if place == gpr::RSP => Some(cfa),
                None if kept => registers.gpr[place],
                None => None,
            };
        }
        match row.register(gimli::X86_64::RA) {
            // An undefined return address marks the outermost frame.
            Some(RegisterRule::Undefined) | None => Some(None),
            Some(rule) => {
                caller.rip = value(rule, None)?;
                Some(Some(caller).filter(|caller| caller.rip != 0))
            }
        }
    }

    fn evaluate(
        &self,
        expression: gimli::Expression<gimli::EndianSlice<LittleEndian>>,
        start: Option<u64>,
        bias: u64,
        known: &dyn Fn(gimli::Register) -> Option<u64>,
    ) -> Option<u64> {
        use gimli::{EvaluationResult, Location, Value};
        let encoding = gimli::Encoding { address_size: 8, format: gimli::Format::Dwarf32, version: 4 };
        let mut evaluation = expression.evaluation(encoding);
        evaluation.set_max_iterations(1000);
        if let Some(start) = start {
            evaluation.set_initial_value(start);
        }
        let mut result = evaluation.evaluate().ok()?;
        loop {
            result = match result {
                EvaluationResult::Complete => break,
                EvaluationResult::RequiresRegister { register, .. } => {
                    evaluation.resume_with_register(Value::Generic(known(register)?)).ok()?
                }
                EvaluationResult::RequiresMemory { address, size, .. } => {
                    let value = self.space.unsigned(address, usize::from(size)).ok()?;
                    evaluation.resume_with_memory(Value::Generic(value)).ok()?
                }
                EvaluationResult::RequiresRelocatedAddress(address) => {
                    evaluation.resume_with_relocated_address(address.wrapping_add(bias)).ok()?
                }
                _ => return None,
            };
        }
        match evaluation.result().first()?.location {
            Location::Address { address } => Some(address),
            Location::Value { value } => value.to_u64(u64::MAX).ok(),
            _ => None,
        }
    }

    fn by_frame_pointer(&self, registers: &Registers) -> Option<UserStep> {
        let (sp, bp) = (registers.gpr[gpr::RSP]?, registers.gpr[gpr::RBP]?);
        if bp < sp || bp - sp > FRAME_BYTES_MAX || bp % 8 != 0 {
            return None;
        }
        let mut caller = Registers { rip: self.space.u64(bp.wrapping_add(8)).ok()?, gpr: [None; 16] };
        caller.gpr[gpr::RSP] = Some(bp.wrapping_add(16));
        caller.gpr[gpr::RBP] = self.space.u64(bp).ok();
        self.after_call(caller.rip).then_some(())?;
        self.checked(registers, caller, How::FramePointer)
    }

    fn by_scan(&self, registers: &Registers) -> Option<UserStep> {
        let sp = registers.gpr[gpr::RSP]?;
        for number in 0..SCAN_WORDS {
            let place = sp.checked_add(8 * number)?;
            let rip = self.space.u64(place).ok()?;
            if self.after_call(rip) {
                let mut caller = Registers { rip, gpr: [None; 16] };
                caller.gpr[gpr::RSP] = Some(place.wrapping_add(8));
                caller.gpr[gpr::RBP] = registers.gpr[gpr::RBP];
                return self.checked(registers, caller, How::Guess);
            }
        }
        None
    }

    /// True if the address is in executable memory, right behind a call.
    fn after_call(&self, address: u64) -> bool {
        self.mapping(address).is_some_and(|mapping| mapping.executable) && follows_call(&self.space, address)
    }
}

/// What unwind tables say of a frame's caller: its registers, or None where the stack ends.
type Found = Option<Registers>;

/// True if the bytes before an address are those of a call: E8 rel32, or FF /2 of two to seven bytes.
pub(super) fn follows_call(space: &AddressSpace, address: u64) -> bool {
    let mut before = [0; 7];
    if space.read(address.wrapping_sub(7), &mut before).is_err() {
        return false;
    }
    let indirect = |len: usize| before[7 - len] == 0xFF && before[8 - len] >> 3 & 7 == 2;
    before[2] == 0xE8 || [2, 3, 4, 6, 7].into_iter().any(indirect)
}

fn find_row<'c>(
    tables: &UnwindTables,
    frames: &EhFrame<gimli::EndianSlice<'c, LittleEndian>>,
    address: u64,
    context: &'c mut gimli::UnwindContext<usize>,
) -> Option<&'c gimli::UnwindTableRow<usize>> {
    let mut bases = BaseAddresses::default().set_eh_frame(tables.frames.0).set_text(tables.text);
    if let Some((at, header)) = &tables.header {
        bases = bases.set_eh_frame_hdr(*at);
        let header = EhFrameHdr::new(header, LittleEndian).parse(&bases, 8).ok()?;
        if let Some(table) = header.table() {
            let fde = table.fde_for_address(frames, &bases, address, EhFrame::cie_from_offset).ok()?;
            return fde.unwind_info_for_address(frames, &bases, context, address).ok();
        }
    }
    frames.unwind_info_for_address(&bases, context, address, EhFrame::cie_from_offset).ok()
}
