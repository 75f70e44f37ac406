//! Guest registers without a home that get one for a block, in a host register that the block has no other use for.
//!
//! It takes four accesses to the vCPU block to move in and out, so only what a block uses often is worth it. Whoever
//! leaves the block, or calls Rust from its middle, moves out first.

use super::assembler::host;
use super::classify::Treatment;
use super::groups::{reads, writes};
use super::registers::{BORROWABLE, HOME, gpr_number};
use super::translate::Borrowed;
use iced_x86::{Instruction, InstructionInfoFactory};
use serde::{Deserialize, Serialize};

/// Most residents of a block.
pub const RESIDENTS_MAX: usize = 4;

/// Uses in a block, reads and writes, from which moving pays.
pub const WORTH_IT: u8 = 5;

/// A guest register and the host register that it lives in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resident {
    pub guest: u8,
    pub host: u8,
}

impl Resident {
    /// The guest register whose home this is otherwise.
    pub fn owner(self) -> Option<usize> {
        HOME.iter().position(|home| *home == Some(self.host))
    }
}

pub type Residents = [Option<Resident>; RESIDENTS_MAX];

/// Behind a host fault, once the host's registers are in `gpr` as if all were at home: gives guest registers that were
/// borrowed or lent for a while what is theirs. `temporary` and `evicted` are those of the vCPU block; `elsewhere` gives
/// what a host register held that is nobody's home, and is told what was evicted from it.
pub fn return_registers(
    gpr: &mut [u64; 16],
    (borrowed, temporary): (Borrowed, &[u64; 8]),
    (residents, evicted): (Residents, &[u64; RESIDENTS_MAX]),
    mut elsewhere: impl FnMut(u8, u64) -> u64,
) {
    for (register, value) in borrowed.into_iter().flatten().zip(&temporary[4..]) {
        let guest = HOME.iter().position(|home| *home == Some(register)).expect("borrowed registers are homes");
        gpr[guest] = *value;
    }
    for (resident, evicted) in residents.into_iter().flatten().zip(evicted) {
        gpr[resident.guest as usize] = match resident.owner() {
            Some(owner) => std::mem::replace(&mut gpr[owner], *evicted),
            None => elsewhere(resident.host, *evicted),
        };
    }
}

/// Homes in the order in which they are given away. Borrowable ones come last: an instruction may need them.
const LENT: [u8; 7] = [host::R12, host::R13, host::RDX, host::RBP, BORROWABLE[5], BORROWABLE[4], BORROWABLE[3]];
/// So many of the borrowable ones are left in any case.
const BORROWABLE_LENT: usize = 1;

/// Whether host registers that have a purpose can have another one in a block.
#[derive(Clone, Copy)]
pub struct Free {
    pub distance: bool,
    pub budget: bool,
}

/// Chooses for the instructions of a block; what ends it does not count. `uses_min` is what a register must be used to
/// be worth it; `spared` says which register an instruction does not read, although it is part of its operand.
pub fn choose(
    list: &[(Instruction, Treatment)],
    info: &mut InstructionInfoFactory,
    free: Free,
    uses_min: u8,
    spared: impl Fn(usize) -> Option<u8>,
) -> Residents {
    let mut uses = [0u32; 16];
    let mut reads_tsc = false;
    for (i, (ins, treatment)) in list.iter().enumerate().filter(|(_, (_, treatment))| !treatment.ends_block()) {
        reads_tsc |= *treatment == Treatment::ReadTsc;
        for used in info.info(ins).used_registers() {
            if let Some(guest) = gpr_number(used.register()).filter(|guest| spared(i) != Some(*guest)) {
                let access = used.access();
                uses[guest as usize] += u32::from(reads(access)) + u32::from(writes(access));
            }
        }
    }
    let mut wanted: Vec<u8> = (0..16)
        .filter(|guest| HOME[*guest as usize].is_none() && uses[*guest as usize] >= u32::from(uses_min))
        .collect();
    wanted.sort_by_key(|guest| std::cmp::Reverse(uses[*guest as usize]));
    let unused = |host: &u8| HOME.iter().position(|home| *home == Some(*host)).is_some_and(|owner| uses[owner] == 0);
    let borrowable = LENT.iter().filter(|host| BORROWABLE.contains(host) && unused(host)).take(BORROWABLE_LENT);
    let mut free = [free.distance.then_some(host::DISTANCE), (free.budget && !reads_tsc).then_some(host::BUDGET)]
        .into_iter()
        .flatten()
        .chain(LENT.iter().filter(|host| !BORROWABLE.contains(host) && unused(host)).copied())
        .chain(borrowable.copied());
    let mut residents = Residents::default();
    for (resident, guest) in residents.iter_mut().zip(wanted) {
        *resident = free.next().map(|host| Resident { guest, host });
    }
    residents
}
