//! Which status flags the instructions of a block need: the translator moves flags only where someone can look.
//!
//! Flags can be seen wherever the block can be left: at its end, at a branch in its middle, and at every instruction
//! that may fault or whose memory access may miss. What an instruction keeps, or leaves undefined, passes through it.

use super::classify::{self, Treatment};
use iced_x86::{Instruction, Mnemonic, OpKind, RflagsBits};

pub const STATUS: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// Status flags that the instruction gives values of its own in any case.
pub fn overwritten(ins: &Instruction) -> u32 {
    use Mnemonic::*;
    let by_count = matches!(ins.mnemonic(), Shl | Sal | Shr | Sar | Rol | Ror | Rcl | Rcr | Shld | Shrd)
        && ins.op_kind(ins.op_count() - 1) == OpKind::Register;
    if by_count || classify::rotates_through_carry(ins) {
        // By a count of zero, all flags stay as they are.
        return 0;
    }
    let defined = ins.rflags_written() | ins.rflags_cleared() | ins.rflags_set();
    if defined != 0 && matches!(ins.mnemonic(), Shl | Sal | Shr | Sar | Shld | Shrd) {
        // Whoever executes a shift gives those that are undefined values that do not depend on their old ones.
        return STATUS;
    }
    let af = if classify::clears_af(ins) { RflagsBits::AF } else { 0 };
    (defined | af) & STATUS
}

/// What one instruction of a block needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Need {
    /// Status flags before the instruction that it or someone behind it may look at.
    pub live: u32,
    /// The host must have the guest's flags when it executes the instruction: it reads them, or keeps some that are
    /// looked at later.
    pub in_host: bool,
}

/// Fills `needs` for the instructions of a block; `stays` says which of them, by number, leave the block only by
/// retiring, for the one behind them.
pub fn needs(list: &[(Instruction, Treatment)], stays: impl Fn(usize) -> bool, needs: &mut Vec<Need>) {
    needs.clear();
    needs.resize(list.len(), Need { live: STATUS, in_host: false });
    let mut live = STATUS;
    for (i, (ins, _)) in list.iter().enumerate().rev() {
        let (read, overwritten) = (ins.rflags_read() & STATUS, overwritten(ins));
        let changes = ins.rflags_modified() & STATUS != 0 || classify::rotates_through_carry(ins);
        needs[i].in_host = read != 0 || changes && live & !overwritten != 0;
        live = if stays(i) { live & !overwritten | read } else { STATUS };
        needs[i].live = live;
    }
}

/// The instruction leaves the block only by retiring, for the one behind it; `inside` says that its memory accesses
/// cannot.
pub fn stays((ins, treatment): &(Instruction, Treatment), inside: bool) -> bool {
    match treatment {
        Treatment::Nothing | Treatment::Lea => true,
        Treatment::FollowedCall => inside,
        Treatment::Plain => !classify::may_fault(ins) && (inside || !ins.op_kinds().any(|kind| kind == OpKind::Memory)),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::super::mode::Mode;
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    fn of(bytes: &[u8]) -> Vec<Need> {
        let mode = Mode::of(&crate::state::CpuState::long_mode_boot(0, 0, 0, 0, 0, 0));
        let list: Vec<_> = Decoder::with_ip(64, bytes, 0x1000, DecoderOptions::NONE)
            .iter()
            .map(|ins| (ins, classify::treatment(&ins, mode)))
            .collect();
        let mut found = Vec::new();
        needs(&list, |i| stays(&list[i], false), &mut found);
        found
    }

    #[test]
    fn what_is_overwritten_before_it_is_seen_is_not_needed() {
        // inc rax; cmp rax, rbx; jl
        let found = of(&[0x48, 0xFF, 0xC0, 0x48, 0x39, 0xD8, 0x7C, 0x00]);
        assert_eq!(found.iter().map(|n| n.in_host).collect::<Vec<_>>(), [false, false, true]);
        assert_eq!(found[0].live, 0);
    }

    #[test]
    fn the_carry_that_increment_keeps_is_needed_by_a_fault() {
        // inc rax; mov rcx, [rdx]; cmp rax, rbx
        let found = of(&[0x48, 0xFF, 0xC0, 0x48, 0x8B, 0x0A, 0x48, 0x39, 0xD8]);
        assert!(found[0].in_host);
        assert_eq!(found[0].live, RflagsBits::CF);
    }

    #[test]
    fn a_shift_by_cl_may_keep_everything() {
        // shl rax, cl; adc rax, rbx
        let found = of(&[0x48, 0xD3, 0xE0, 0x48, 0x11, 0xD8]);
        assert_eq!((found[0].in_host, found[0].live), (true, RflagsBits::CF));
        // shl rax, cl; add rax, rbx
        let found = of(&[0x48, 0xD3, 0xE0, 0x48, 0x01, 0xD8]);
        assert_eq!((found[0].in_host, found[0].live), (false, 0));
    }
}
