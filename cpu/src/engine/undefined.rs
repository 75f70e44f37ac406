//! Flags and results that the manual leaves undefined: the model is that of AMD's processors, where the host's own
//! behaviour is the model. On other hosts the instructions that leave something undefined are executed by the
//! emulation, which has the model, unless nobody can see the difference.

use super::classify::{self, Treatment};
use iced_x86::{Code, Instruction, Mnemonic, OpKind, RflagsBits};

const STATUS: u32 = RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// The host leaves in undefined flags and results what the model says.
// It decides who computes them, never what they are.
#[allow(clippy::disallowed_methods)]
pub fn host_is_the_model() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0);
    (leaf.ebx, leaf.edx, leaf.ecx) == (0x6874_7541, 0x6974_6E65, 0x444D_4163)
}

/// Processors differ in flags, or in the result, that this instruction leaves undefined. Bit tests are not among
/// them: vendors agree that they change CF alone.
pub fn leaves_undefined(ins: &Instruction) -> bool {
    use Mnemonic::*;
    let by_constant = ins.op_count() > 1 && ins.op_kind(ins.op_count() - 1) == OpKind::Immediate8;
    let count = if by_constant { ins.immediate8() & 0x3F } else { 2 };
    match ins.mnemonic() {
        Rol | Ror | Rcl | Rcr => count > 1,
        Shl | Sal | Shr | Sar | Shld | Shrd => count > 0,
        Mul | Imul | Div | Idiv | Bsf | Bsr | Lzcnt | Tzcnt | Andn | Blsi | Blsr | Blsmsk | Bextr | Bzhi => true,
        _ => false,
    }
}

/// All flags are overwritten by this instruction before anything can look at them. It must not leave the block.
pub fn hides(ins: &Instruction, treatment: Treatment) -> bool {
    let defined = (ins.rflags_written() | ins.rflags_cleared() | ins.rflags_set()) & STATUS;
    treatment == Treatment::Plain
        && (defined == STATUS || classify::clears_af(ins))
        && ins.rflags_read() & STATUS == 0
        && !classify::may_fault(ins)
        && !ins.op_kinds().any(|kind| kind == OpKind::Memory)
}

/// The result itself is undefined: 16-bit double shifts by more than 16.
pub fn has_undefined_result(ins: &Instruction) -> bool {
    match ins.code() {
        Code::Shld_rm16_r16_imm8 | Code::Shrd_rm16_r16_imm8 => ins.immediate8() & 31 > 16,
        Code::Shld_rm16_r16_CL | Code::Shrd_rm16_r16_CL => true,
        _ => false,
    }
}
