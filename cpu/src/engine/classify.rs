//! Decides for each guest instruction who executes it: the host processor, renamed, or the emulation in Rust.

use super::mode::Mode;
use crate::system::availability::{Unit, in_model, unit};
use iced_x86::{
    Code, EncodingKind, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register,
};

/// How the translator treats an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Treatment {
    /// Executes natively with renamed registers and a replaced memory operand.
    Plain,
    /// Has no effect but to retire.
    Nothing,
    /// LEA.
    Lea,
    /// VZEROUPPER or VZEROALL outside 64-bit mode: of eight registers.
    ZeroUpper,
    /// BT, BTS, BTR or BTC with a register bit offset into memory.
    BitString,
    /// PUSH of a register, constant or memory.
    Push,
    /// POP to a register or memory.
    Pop,
    /// LEAVE.
    Leave,
    /// Direct near JMP.
    Jump,
    /// Jcc.
    Branch,
    /// LOOP, LOOPE, LOOPNE, JRCXZ.
    CountBranch,
    /// Direct near CALL.
    Call,
    /// Near JMP to register or memory.
    IndirectJump,
    /// Near CALL to register or memory.
    IndirectCall,
    /// Near RET.
    Return,
    /// A call behind which the block goes on at the target.
    FollowedCall,
    /// The return from there.
    FollowedReturn,
    /// CLI.
    ClearInterrupt,
    /// STI, followed by another instruction of the block.
    SetInterrupt,
    /// CLD or STD.
    Direction,
    /// SWAPGS.
    SwapGs,
    /// PUSHFQ.
    PushFlags,
    /// CLAC or STAC: the next instruction has another access class.
    AccessFlag,
    /// MOV of a segment register's selector to a general register, or to memory in 64-bit code.
    ReadSelector,
    /// RDFSBASE, RDGSBASE, WRFSBASE or WRGSBASE with 64 bits.
    SegmentBase,
    /// RDTSC or RDTSCP, where the counter is a function of the icount.
    ReadTsc,
    /// REP MOVS or REP STOS with 64-bit addresses in flat segments.
    RepeatedMove,
    /// Executed by `system::execute`; ends the block.
    Emulate,
}

impl Treatment {
    /// No instruction follows this one in its block.
    pub fn ends_block(self) -> bool {
        use Treatment::*;
        matches!(
            self,
            AccessFlag
                | Jump
                | Branch
                | CountBranch
                | Call
                | IndirectJump
                | IndirectCall
                | Return
                | RepeatedMove
                | Emulate
        )
    }
}

/// REP MOVS or REP STOS with 64-bit addresses in flat segments.
fn is_repeated_move(ins: &Instruction) -> bool {
    use Mnemonic::{Movsb, Movsd, Movsq, Movsw, Stosb, Stosd, Stosq, Stosw};
    let string = matches!(ins.mnemonic(), Movsb | Movsw | Movsd | Movsq | Stosb | Stosw | Stosd | Stosq);
    string
        && ins.has_rep_prefix()
        && ins.op0_kind() == OpKind::MemoryESRDI
        && matches!(ins.op1_kind(), OpKind::MemorySegRSI | OpKind::Register)
        && !matches!(ins.segment_prefix(), Register::FS | Register::GS)
}

/// Near branches of the operand size that the mode uses; others are left to the emulation.
fn near_branch(ins: &Instruction, mode: Mode) -> Treatment {
    let wide = mode.is_64bit();
    match ins.code() {
        Code::Jmp_rel8_64 | Code::Jmp_rel32_64 if wide => Treatment::Jump,
        Code::Jmp_rel8_32 | Code::Jmp_rel32_32 if !wide => Treatment::Jump,
        Code::Call_rel32_64 if wide => Treatment::Call,
        Code::Call_rel32_32 if !wide => Treatment::Call,
        Code::Jmp_rm64 if wide => Treatment::IndirectJump,
        Code::Jmp_rm32 if !wide => Treatment::IndirectJump,
        Code::Call_rm64 if wide => Treatment::IndirectCall,
        Code::Call_rm32 if !wide => Treatment::IndirectCall,
        Code::Retnq | Code::Retnq_imm16 if wide => Treatment::Return,
        Code::Retnd | Code::Retnd_imm16 if !wide => Treatment::Return,
        _ => {
            let fits = match ins.op0_kind() {
                OpKind::NearBranch64 => wide,
                OpKind::NearBranch32 => !wide,
                _ => return Treatment::Emulate,
            };
            if !fits {
                Treatment::Emulate
            } else if ins.is_jcc_short_or_near() {
                Treatment::Branch
            } else if ins.is_loop() || ins.is_loopcc() || ins.is_jcx_short() {
                Treatment::CountBranch
            } else {
                Treatment::Emulate
            }
        }
    }
}

/// The emulation of the instruction finds out by itself whether it writes to CS: it writes only sometimes, or
/// something else comes first.
pub fn looks_at_code_segment_itself(ins: &Instruction) -> bool {
    use Mnemonic::{Arpl, Fxsave, Fxsave64, Pop, Vmaskmovpd, Vmaskmovps, Vpmaskmovd, Vpmaskmovq};
    matches!(ins.mnemonic(), Arpl | Fxsave | Fxsave64 | Pop | Vmaskmovpd | Vmaskmovps | Vpmaskmovd | Vpmaskmovq)
}

/// The instruction writes to a memory operand in CS, which 32-bit code cannot.
pub fn writes_code_segment(ins: &Instruction) -> bool {
    ins.segment_prefix() == Register::CS
        && (0..ins.op_count()).any(|i| {
            use OpAccess::*;
            ins.op_kind(i) == OpKind::Memory
                && matches!(
                    InstructionInfoFactory::new().info(ins).op_access(i),
                    Write | CondWrite | ReadWrite | ReadCondWrite
                )
        })
}

/// The memory operand's linear address is made of 64-bit general registers and a constant.
pub fn has_plain_address(ins: &Instruction) -> bool {
    let (base, index) = (ins.memory_base(), ins.memory_index());
    let is_plain = |register: Register| register == Register::None || register.is_gpr64();
    is_plain(base)
        && is_plain(index)
        && (base, index) != (Register::None, Register::None)
        && !matches!(ins.memory_segment(), Register::FS | Register::GS)
}

/// The memory operand's address is computed in 16 bits.
pub fn has_16_bit_address(ins: &Instruction) -> bool {
    let register = if ins.memory_base() != Register::None { ins.memory_base() } else { ins.memory_index() };
    register != Register::None && register.size() == 2
}

/// How to treat `ins` in `mode`.
pub fn treatment(ins: &Instruction, mode: Mode) -> Treatment {
    if ins.is_invalid() || !in_model(ins) || mode.bitness() == 16 || !mode.is_flat() {
        return Treatment::Emulate;
    }
    match ins.flow_control() {
        FlowControl::Next => {}
        FlowControl::Interrupt | FlowControl::Exception | FlowControl::XbeginXabortXend => return Treatment::Emulate,
        _ => return near_branch(ins, mode),
    }
    match ins.mnemonic() {
        Mnemonic::Cld | Mnemonic::Std => return Treatment::Direction,
        Mnemonic::Pushfq if mode.is_64bit() => return Treatment::PushFlags,
        Mnemonic::Mov if ins.op1_kind() == OpKind::Register && ins.op1_register().is_segment_register() => {
            let inline = ins.op0_kind() == OpKind::Register || mode.is_64bit() && !mode.is_direct();
            return if inline { Treatment::ReadSelector } else { Treatment::Emulate };
        }
        Mnemonic::Rdfsbase | Mnemonic::Rdgsbase | Mnemonic::Wrfsbase | Mnemonic::Wrgsbase
            if mode.fsgsbase() && mode.is_64bit() && !mode.is_direct() && ins.op0_register().size() == 8 =>
        {
            return Treatment::SegmentBase;
        }
        Mnemonic::Rdtsc | Mnemonic::Rdtscp => return Treatment::ReadTsc,
        Mnemonic::Cli if mode.ring0() => return Treatment::ClearInterrupt,
        Mnemonic::Sti if mode.ring0() => return Treatment::SetInterrupt,
        Mnemonic::Swapgs if mode.ring0() && mode.is_64bit() => return Treatment::SwapGs,
        Mnemonic::Clac | Mnemonic::Stac if mode.ring0() => return Treatment::AccessFlag,
        _ => {}
    }
    if mode.is_64bit() && is_repeated_move(ins) {
        return Treatment::RepeatedMove;
    }
    if must_emulate(ins) || !mode.is_64bit() && writes_code_segment(ins) {
        return Treatment::Emulate;
    }
    let permitted = match unit(ins) {
        Unit::Integer => true,
        Unit::X87 => mode.x87(),
        Unit::Sse => mode.sse(),
        Unit::Avx => mode.avx(),
    };
    if !permitted {
        return Treatment::Emulate;
    }
    use Mnemonic::*;
    let stack_word = if mode.is_64bit() { 8 } else { 4 };
    match ins.mnemonic() {
        Nop | Pause | Prefetchnta | Prefetcht0 | Prefetcht1 | Prefetcht2 | Prefetchw | Prefetch | Lfence | Sfence
        | Mfence | Cldemote | Prefetchit0 | Prefetchit1 | Endbr64 | Endbr32 | Rdsspd | Rdsspq | Reservednop
        | Prefetchwt1 => Treatment::Nothing,
        Lea => Treatment::Lea,
        Bt | Bts | Btr | Btc if ins.op0_kind() == OpKind::Memory && ins.op1_kind() == OpKind::Register => {
            if has_16_bit_address(ins) {
                Treatment::Emulate
            } else {
                Treatment::BitString
            }
        }
        Vzeroupper | Vzeroall if !mode.is_64bit() => Treatment::ZeroUpper,
        Push if ins.stack_pointer_increment() == -stack_word => Treatment::Push,
        Pop if ins.stack_pointer_increment() == stack_word => Treatment::Pop,
        Leave if ins.code() == Code::Leaveq || ins.code() == Code::Leaved => Treatment::Leave,
        Push | Pop | Leave => Treatment::Emulate,
        // The address, the implicit AL and CH all want to be in the host's RAX or RCX.
        Cmpxchg if ins.op0_kind() == OpKind::Memory && ins.op1_register() == Register::CH => Treatment::Emulate,
        _ => {
            let memory = (0..ins.op_count()).any(|i| ins.op_kind(i) == OpKind::Memory);
            if memory && !(1..=32).contains(&ins.memory_size().size()) { Treatment::Emulate } else { Treatment::Plain }
        }
    }
}

/// Instructions that are privileged, leak the host, touch hidden state, or access memory in other ways than
/// through one operand.
fn must_emulate(ins: &Instruction) -> bool {
    use Mnemonic::*;
    if ins.is_privileged() || ins.is_vsib() || ins.is_string_instruction() {
        return true;
    }
    for i in 0..ins.op_count() {
        match ins.op_kind(i) {
            OpKind::Register => {
                let r = ins.op_register(i);
                if !(r.is_gpr() || r.is_xmm() || r.is_ymm() || r.is_mm() || r.is_st()) {
                    return true; // segment, control, debug, mask, tile registers
                }
            }
            OpKind::Memory => {}
            OpKind::Immediate8
            | OpKind::Immediate8_2nd
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64 => {}
            _ => return true,
        }
    }
    // Of MOVSXD with 16 bits, AMD reads 32 bits of memory, Intel 16.
    // CMPXCHG that leaves a 32-bit register alone clears its upper half on some.
    let exchanges_registers = ins.mnemonic() == Mnemonic::Cmpxchg && ins.op0_kind() == OpKind::Register;
    if ins.code() == Code::Movsxd_r16_rm16 || exchanges_registers || super::undefined::has_undefined_result(ins) {
        return true;
    }
    match ins.mnemonic() {
        Vpmaskmovd | Vpmaskmovq | Vmaskmovps | Vmaskmovpd | Maskmovq | Maskmovdqu | Vmaskmovdqu => true,
        Nop | Endbr64 | Endbr32 => false,
        Cpuid | Rdtsc | Rdtscp | Rdrand | Rdseed | Rdpid | Rdpmc | Xgetbv | Xsetbv | Sgdt | Sidt | Sldt | Str
        | Smsw | Lmsw | Lar | Lsl | Verr | Verw | Arpl | Rdfsbase | Rdgsbase | Wrfsbase | Wrgsbase | Swapgs | Pushf
        | Pushfd | Pushfq | Popf | Popfd | Popfq | Cli | Sti | Clac | Stac | Cld | Std | Hlt | In | Out | Xlatb
        | Enter | Bound | Fxsave | Fxsave64 | Fxrstor | Fxrstor64 | Xsave | Xsave64 | Xrstor | Xrstor64 | Xsavec
        | Xsavec64 | Xsaveopt | Xsaveopt64 | Xsaves | Xsaves64 | Xrstors | Xrstors64 | Fnsave | Fsave | Frstor
        | Fnstenv | Fstenv | Fldenv | Ldmxcsr | Vldmxcsr | Clflush | Clflushopt | Clwb | Pusha | Pushad | Popa
        | Popad | Aaa | Aas | Aam | Aad | Daa | Das | Salc | Into | Lds | Les | Lfs | Lgs | Lss | Monitor | Mwait
        | Invlpg | Invpcid | Rsm => true,
        Sha1msg1 | Sha1msg2 | Sha1nexte | Sha1rnds4 | Sha256msg1 | Sha256msg2 | Sha256rnds2 => {
            ins.op1_kind() == OpKind::Memory
        }
        // Approximations: processors differ in the last bits.
        Rcpps | Rcpss | Rsqrtps | Rsqrtss | Vrcpps | Vrcpss | Vrsqrtps | Vrsqrtss | F2xm1 | Fcos | Fpatan | Fptan
        | Fsin | Fsincos | Fyl2x | Fyl2xp1 => true,
        _ => false,
    }
}

/// The host may fault on this instruction when the guest would: division, alignment, floating point.
pub fn may_fault(ins: &Instruction) -> bool {
    matches!(ins.mnemonic(), Mnemonic::Div | Mnemonic::Idiv | Mnemonic::Cmpxchg16b | Mnemonic::Wait)
        || unit(ins) != Unit::Integer
}

/// True for the flags form in which AF is the only undefined flag and every processor clears it.
pub fn clears_af(ins: &Instruction) -> bool {
    matches!(ins.mnemonic(), Mnemonic::And | Mnemonic::Or | Mnemonic::Xor | Mnemonic::Test)
}

/// The same instruction in a form that 64-bit mode has, and whose accumulator operand is not fixed by the opcode, where
/// there is one.
pub fn general_form(code: Code) -> Code {
    use Code::*;
    macro_rules! alu {
        ($($al:ident $ax:ident $eax:ident $rax:ident => $r8:ident $r16:ident $r32:ident $r64:ident;)+) => {
            match code {
                $($al => $r8, $ax => $r16, $eax => $r32, $rax => $r64,)+
                Xchg_r16_AX => Xchg_rm16_r16,
                Xchg_r32_EAX => Xchg_rm32_r32,
                Xchg_r64_RAX => Xchg_rm64_r64,
                Inc_r16 => Inc_rm16,
                Inc_r32 => Inc_rm32,
                Dec_r16 => Dec_rm16,
                Dec_r32 => Dec_rm32,
                Mov_AL_moffs8 => Mov_r8_rm8,
                Mov_AX_moffs16 => Mov_r16_rm16,
                Mov_EAX_moffs32 => Mov_r32_rm32,
                Mov_RAX_moffs64 => Mov_r64_rm64,
                Mov_moffs8_AL => Mov_rm8_r8,
                Mov_moffs16_AX => Mov_rm16_r16,
                Mov_moffs32_EAX => Mov_rm32_r32,
                Mov_moffs64_RAX => Mov_rm64_r64,
                Add_rm8_imm8_82 => Add_rm8_imm8,
                Or_rm8_imm8_82 => Or_rm8_imm8,
                Adc_rm8_imm8_82 => Adc_rm8_imm8,
                Sbb_rm8_imm8_82 => Sbb_rm8_imm8,
                And_rm8_imm8_82 => And_rm8_imm8,
                Sub_rm8_imm8_82 => Sub_rm8_imm8,
                Xor_rm8_imm8_82 => Xor_rm8_imm8,
                Cmp_rm8_imm8_82 => Cmp_rm8_imm8,
                other => other,
            }
        };
    }
    alu! {
        Add_AL_imm8 Add_AX_imm16 Add_EAX_imm32 Add_RAX_imm32 => Add_rm8_imm8 Add_rm16_imm16 Add_rm32_imm32 Add_rm64_imm32;
        Or_AL_imm8 Or_AX_imm16 Or_EAX_imm32 Or_RAX_imm32 => Or_rm8_imm8 Or_rm16_imm16 Or_rm32_imm32 Or_rm64_imm32;
        Adc_AL_imm8 Adc_AX_imm16 Adc_EAX_imm32 Adc_RAX_imm32 => Adc_rm8_imm8 Adc_rm16_imm16 Adc_rm32_imm32 Adc_rm64_imm32;
        Sbb_AL_imm8 Sbb_AX_imm16 Sbb_EAX_imm32 Sbb_RAX_imm32 => Sbb_rm8_imm8 Sbb_rm16_imm16 Sbb_rm32_imm32 Sbb_rm64_imm32;
        And_AL_imm8 And_AX_imm16 And_EAX_imm32 And_RAX_imm32 => And_rm8_imm8 And_rm16_imm16 And_rm32_imm32 And_rm64_imm32;
        Sub_AL_imm8 Sub_AX_imm16 Sub_EAX_imm32 Sub_RAX_imm32 => Sub_rm8_imm8 Sub_rm16_imm16 Sub_rm32_imm32 Sub_rm64_imm32;
        Xor_AL_imm8 Xor_AX_imm16 Xor_EAX_imm32 Xor_RAX_imm32 => Xor_rm8_imm8 Xor_rm16_imm16 Xor_rm32_imm32 Xor_rm64_imm32;
        Cmp_AL_imm8 Cmp_AX_imm16 Cmp_EAX_imm32 Cmp_RAX_imm32 => Cmp_rm8_imm8 Cmp_rm16_imm16 Cmp_rm32_imm32 Cmp_rm64_imm32;
        Test_AL_imm8 Test_AX_imm16 Test_EAX_imm32 Test_RAX_imm32 => Test_rm8_imm8 Test_rm16_imm16 Test_rm32_imm32 Test_rm64_imm32;
    }
}

/// RCL or RCR by a count other than 0.
pub fn rotates_through_carry(ins: &Instruction) -> bool {
    let by_nothing = ins.op1_kind() == OpKind::Immediate8 && ins.immediate8() & 31 == 0;
    matches!(ins.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr) && !by_nothing
}

/// The instruction raises #GP if its memory operand is not aligned to its size, whatever is mapped there.
pub fn must_be_aligned(ins: &Instruction) -> bool {
    use Mnemonic::*;
    let size = ins.memory_size().size();
    if size < 16 {
        return false;
    }
    match ins.mnemonic() {
        Movups | Movupd | Movdqu | Lddqu | Pcmpestri | Pcmpestrm | Pcmpistri | Pcmpistrm | Pcmpestri64
        | Pcmpestrm64 => false,
        Cmpxchg16b | Cvtpd2pi | Cvttpd2pi => true,
        Vmovaps | Vmovapd | Vmovdqa | Vmovntps | Vmovntpd | Vmovntdq | Vmovntdqa => true,
        // The model does not want it of SHA, and hosts differ: of memory, SHA is emulated.
        Sha1msg1 | Sha1msg2 | Sha1nexte | Sha1rnds4 | Sha256msg1 | Sha256msg2 | Sha256rnds2 => false,
        _ => ins.encoding() == EncodingKind::Legacy && unit(ins) == Unit::Sse,
    }
}

/// Host RAX must hold guest RAX while the instruction executes.
pub fn pins_rax(ins: &Instruction) -> bool {
    use Mnemonic::*;
    match ins.mnemonic() {
        Imul => ins.op_count() == 1,
        Mul | Div | Idiv | Cbw | Cwde | Cdqe | Cwd | Cdq | Cqo | Cmpxchg | Cmpxchg8b | Cmpxchg16b | Lahf | Sahf
        | Pcmpestri | Pcmpestrm | Vpcmpestri | Vpcmpestrm | Pcmpestri64 | Pcmpestrm64 | Vpcmpestri64 | Vpcmpestrm64 => {
            true
        }
        Fnstsw | Fstsw => ins.op0_kind() == OpKind::Register,
        _ => false,
    }
}

/// Host RCX must hold guest RCX while the instruction executes.
pub fn pins_rcx(ins: &Instruction) -> bool {
    use Mnemonic::*;
    match ins.mnemonic() {
        Rol | Ror | Rcl | Rcr | Shl | Sal | Shr | Sar => {
            ins.op1_kind() == OpKind::Register && ins.op1_register() == Register::CL
        }
        Shld | Shrd => ins.op2_kind() == OpKind::Register && ins.op2_register() == Register::CL,
        Cmpxchg8b | Cmpxchg16b | Pcmpestri | Pcmpistri | Vpcmpestri | Vpcmpistri | Pcmpestri64 | Vpcmpestri64 => true,
        _ => false,
    }
}
