//! Guest registers that live in the vCPU block, as memory operands of the instructions that use them.
//!
//! An instruction with a register operand in its r/m position takes the register's place in the block as well, which
//! saves a load, and for a 64-bit destination a store. 32-bit destinations are left alone: they clear the upper half.

use super::assembler::Assembler;
use super::block::field;
use super::registers::{Homes, gpr_number};
use iced_x86::{Code, Instruction, OpAccess, OpKind, Register};

/// What the instruction forms that are worth it have in common.
pub struct Form {
    /// The operand in the r/m position.
    pub rm: u32,
    /// The same instruction with the operands' positions exchanged.
    exchanged: Option<Code>,
}

/// The form of an integer instruction, if it is one of the common ones.
pub fn form(code: Code) -> Option<Form> {
    use Code::*;
    macro_rules! two_way {
        ($($rm32_r32:ident $r32_rm32:ident $rm64_r64:ident $r64_rm64:ident $($immediate:ident)+;)+) => {
            match code {
                $($rm32_r32 => return Some(Form { rm: 0, exchanged: Some($r32_rm32) }),
                $rm64_r64 => return Some(Form { rm: 0, exchanged: Some($r64_rm64) }),
                $r32_rm32 => return Some(Form { rm: 1, exchanged: Some($rm32_r32) }),
                $r64_rm64 => return Some(Form { rm: 1, exchanged: Some($rm64_r64) }),
                $($immediate)|+ => return Some(Form { rm: 0, exchanged: None }),)+
                _ => {}
            }
        };
    }
    two_way! {
        Add_rm32_r32 Add_r32_rm32 Add_rm64_r64 Add_r64_rm64 Add_rm32_imm8 Add_rm32_imm32 Add_rm64_imm8 Add_rm64_imm32;
        Or_rm32_r32 Or_r32_rm32 Or_rm64_r64 Or_r64_rm64 Or_rm32_imm8 Or_rm32_imm32 Or_rm64_imm8 Or_rm64_imm32;
        Adc_rm32_r32 Adc_r32_rm32 Adc_rm64_r64 Adc_r64_rm64 Adc_rm32_imm8 Adc_rm32_imm32 Adc_rm64_imm8 Adc_rm64_imm32;
        Sbb_rm32_r32 Sbb_r32_rm32 Sbb_rm64_r64 Sbb_r64_rm64 Sbb_rm32_imm8 Sbb_rm32_imm32 Sbb_rm64_imm8 Sbb_rm64_imm32;
        And_rm32_r32 And_r32_rm32 And_rm64_r64 And_r64_rm64 And_rm32_imm8 And_rm32_imm32 And_rm64_imm8 And_rm64_imm32;
        Sub_rm32_r32 Sub_r32_rm32 Sub_rm64_r64 Sub_r64_rm64 Sub_rm32_imm8 Sub_rm32_imm32 Sub_rm64_imm8 Sub_rm64_imm32;
        Xor_rm32_r32 Xor_r32_rm32 Xor_rm64_r64 Xor_r64_rm64 Xor_rm32_imm8 Xor_rm32_imm32 Xor_rm64_imm8 Xor_rm64_imm32;
        Cmp_rm32_r32 Cmp_r32_rm32 Cmp_rm64_r64 Cmp_r64_rm64 Cmp_rm32_imm8 Cmp_rm32_imm32 Cmp_rm64_imm8 Cmp_rm64_imm32;
    }
    let rm = match code {
        Test_rm32_r32 | Test_rm64_r64 | Test_rm32_imm32 | Test_rm64_imm32 => 0,
        Shl_rm64_imm8 | Shr_rm64_imm8 | Sar_rm64_imm8 | Rol_rm64_imm8 | Ror_rm64_imm8 => 0,
        Inc_rm64 | Dec_rm64 | Neg_rm64 | Not_rm64 => 0,
        Imul_r32_rm32 | Imul_r64_rm64 | Imul_r32_rm32_imm8 | Imul_r64_rm64_imm8 => 1,
        Imul_r32_rm32_imm32 | Imul_r64_rm64_imm32 => 1,
        Movzx_r32_rm8 | Movzx_r64_rm8 | Movzx_r32_rm16 | Movzx_r64_rm16 => 1,
        Movsx_r32_rm8 | Movsx_r64_rm8 | Movsx_r32_rm16 | Movsx_r64_rm16 | Movsxd_r64_rm32 => 1,
        VEX_Rorx_r32_rm32_imm8 | VEX_Rorx_r64_rm64_imm8 => 1,
        VEX_Shlx_r32_rm32_r32 | VEX_Shlx_r64_rm64_r64 | VEX_Shrx_r32_rm32_r32 | VEX_Shrx_r64_rm64_r64 => 1,
        VEX_Sarx_r32_rm32_r32 | VEX_Sarx_r64_rm64_r64 => 1,
        VEX_Andn_r32_r32_rm32 | VEX_Andn_r64_r64_rm64 => 2,
        _ => return None,
    };
    Some(Form { rm, exchanged: None })
}

/// Replaces a register operand that lives in the vCPU block by its place there, where the instruction has a form for
/// it. `out` is the instruction to be emitted, without a memory operand; `access` says how operands are used. Returns
/// the operand that was replaced.
pub fn use_place(out: &mut Instruction, access: &[OpAccess; 5], homes: &Homes) -> Option<u32> {
    let form = form(out.code())?;
    let place = |operand: u32| {
        let guest = (out.op_kind(operand) == OpKind::Register).then(|| gpr_number(out.op_register(operand)))??;
        homes[guest as usize].is_none().then_some(guest)
    };
    let uses = |guest: u8| {
        let is_used = |operand: &u32| {
            out.op_kind(*operand) == OpKind::Register && gpr_number(out.op_register(*operand)) == Some(guest)
        };
        (0..out.op_count()).filter(is_used).count()
    };
    let fits = |operand: u32| match access[operand as usize] {
        OpAccess::Read => true,
        OpAccess::ReadWrite => out.op_register(operand).size() == 8,
        _ => false,
    };
    if let Some(guest) = place(form.rm).filter(|guest| uses(*guest) == 1 && fits(form.rm)) {
        set_place(out, form.rm, guest);
        return Some(form.rm);
    }
    // The other operand's home is as good in the position that only takes registers.
    let other = 1 - form.rm.min(1);
    let exchanged = form.exchanged?;
    let guest = place(other).filter(|guest| uses(*guest) == 1 && fits(other))?;
    if place(form.rm).is_some() {
        return None;
    }
    out.set_code(exchanged);
    set_place(out, other, guest);
    Some(other)
}

fn set_place(out: &mut Instruction, operand: u32, guest: u8) {
    out.set_op_kind(operand, OpKind::Memory);
    let place = Assembler::field(field::homeless(guest));
    out.set_memory_base(Register::RAX + u32::from(place.base));
    out.set_memory_index(Register::None);
    out.set_memory_index_scale(1);
    out.set_memory_displacement64(place.disp as i64 as u64);
    out.set_memory_displ_size(1);
}
