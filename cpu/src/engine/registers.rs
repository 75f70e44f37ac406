//! Where guest general-purpose registers live while translated code runs.
//!
//! Host RAX and RCX are scratch (flags need LAHF, shifts need CL), R11 points into the vCPU block, R14 holds the distance
//! of the stack window, R15 the instruction budget. Guest RAX and RCX move to R12 and R13; guest R11 to R15, which
//! compiled code uses least, stay in the vCPU block. All others, RSP included, are the host registers of the same name.

use iced_x86::Register;

/// The host register of each guest register, in encoding order; None for those that stay in memory.
pub type Homes = [Option<u8>; 16];

/// Where guest registers are at the boundaries of blocks.
pub const HOME: Homes = [
    Some(12),
    Some(13),
    Some(2),
    Some(3),
    Some(4),
    Some(5),
    Some(6),
    Some(7),
    Some(8),
    Some(9),
    Some(10),
    None,
    None,
    None,
    None,
    None,
];

/// Host registers that may be borrowed for one instruction that does not use them.
pub const BORROWABLE: [u8; 6] = [3, 6, 7, 8, 9, 10];

/// The register with number `number` in the family and size of `like`, which is a general-purpose register.
pub fn sized(like: Register, number: u8) -> Register {
    let base = match like.size() {
        8 => Register::RAX,
        4 => Register::EAX,
        2 => Register::AX,
        _ => {
            const BYTES: [Register; 16] = [
                Register::AL,
                Register::CL,
                Register::DL,
                Register::BL,
                Register::SPL,
                Register::BPL,
                Register::SIL,
                Register::DIL,
                Register::R8L,
                Register::R9L,
                Register::R10L,
                Register::R11L,
                Register::R12L,
                Register::R13L,
                Register::R14L,
                Register::R15L,
            ];
            return BYTES[number as usize & 15];
        }
    };
    base + (number as u32 & 15)
}

/// The number of the full register that `register` is a part of, if it is a general-purpose register.
pub fn gpr_number(register: Register) -> Option<u8> {
    register.is_gpr().then(|| register.full_register().number() as u8)
}

/// AH, CH, DH or BH.
pub fn is_high_byte(register: Register) -> bool {
    matches!(register, Register::AH | Register::CH | Register::DH | Register::BH)
}
