//! The vocabulary of the oracle: the address space a case runs in, the registers it starts from, and what an
//! executor says about how it ended.

use iced_x86::Instruction;
use orrery_cpu::state::{XSAVE_SIZE, XsaveImage};

use crate::rng::Rng;

/// Bytes per page.
pub const PAGE: u64 = 4096;

/// How a region may be used by user-mode code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// Read, write, execute.
    Code,
    /// Read and write.
    Data,
    /// Read only.
    ReadOnly,
}

/// A range of linear addresses that exists on both sides. Everything else is unmapped.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    /// First linear address.
    pub start: u64,
    /// Length in pages.
    pub pages: u64,
    /// What user-mode code may do there.
    pub rights: Rights,
}

/// Where cases put their instructions.
pub const CODE: Region = Region { start: 0x1000_0000, pages: 4, rights: Rights::Code };
/// Ordinary operands.
pub const DATA: Region = Region { start: 0x2000_0000, pages: 4, rights: Rights::Data };
/// Directly after [`DATA`], so that operands can straddle the two.
pub const READ_ONLY: Region = Region { start: 0x2000_4000, pages: 1, rights: Rights::ReadOnly };
/// Directly after [`READ_ONLY`]; behind it nothing is mapped.
pub const TAIL: Region = Region { start: 0x2000_5000, pages: 1, rights: Rights::Data };
/// The stack, with nothing mapped on either side.
pub const STACK: Region = Region { start: 0x3000_0000, pages: 2, rights: Rights::Data };
/// All regions.
pub const REGIONS: [Region; 5] = [CODE, DATA, READ_ONLY, TAIL, STACK];
/// Pages of all regions together.
pub const PAGES: usize = 12;

/// Linear addresses of all pages, in the order of [`REGIONS`].
pub fn pages() -> impl Iterator<Item = (u64, Rights)> {
    REGIONS.iter().flat_map(|r| (0..r.pages).map(|i| (r.start + i * PAGE, r.rights)))
}

/// Registers that user-mode code can see.
#[derive(Clone, PartialEq, Eq)]
pub struct Registers {
    /// General-purpose registers, in encoding order.
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
    /// FS and GS bases.
    pub fs_gs_base: [u64; 2],
    /// x87, SSE, AVX.
    pub fpu: XsaveImage,
}

impl Default for Registers {
    fn default() -> Registers {
        let mut fpu = XsaveImage([0; XSAVE_SIZE]);
        fpu.0[0..2].copy_from_slice(&0x37Fu16.to_le_bytes());
        fpu.0[24..28].copy_from_slice(&0x1F80u32.to_le_bytes());
        fpu.0[28..32].copy_from_slice(&0xFFFFu32.to_le_bytes());
        fpu.0[512] = 7;
        Registers { gpr: [0; 16], rip: CODE.start, rflags: 0x202, fs_gs_base: [0; 2], fpu }
    }
}

/// One experiment.
#[derive(Clone)]
pub struct Case {
    /// What reproduces it.
    pub seed: u64,
    /// 64, or 32 for compatibility mode: then the upper halves of the registers do not count.
    pub bits: u32,
    /// Registers before; `rip` is where `code` is put.
    pub registers: Registers,
    /// Machine code, ending in INT3.
    pub code: Vec<u8>,
    /// Bytes put into memory beforehand, over the common pattern.
    pub pokes: Vec<(u64, Vec<u8>)>,
    /// The instructions of `code` in order, except for the INT3s.
    pub instructions: Vec<Instruction>,
    /// Memory that need not agree afterwards, as (address, length): where the host stores its own addresses.
    pub ignored_memory: Vec<(u64, u64)>,
    /// Bits of RFLAGS that nobody may look at afterwards.
    pub undefined_flags: u64,
}

/// The exception that ended a case (INT3, vector 3, if nothing went wrong).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ending {
    /// Vector.
    pub vector: u8,
    /// Error code, 0 if the vector has none.
    pub error_code: u32,
    /// CR2, 0 unless #PF.
    pub address: u64,
}

/// What an executor reports of a case; memory is left in place for [`Executor::page`].
#[derive(Clone)]
pub struct Outcome {
    /// Registers as the exception handler saw them: `rip` is the faulting instruction, or behind the INT3.
    pub registers: Registers,
    /// How it ended.
    pub ending: Ending,
    /// Instructions retired, the final INT3 included, if the executor can count.
    pub retired: Option<u64>,
}

/// Why an executor could not run a case.
#[derive(Clone, Debug)]
pub enum Refusal {
    /// It does not come to an end by itself.
    Endless,
    /// The executor lacks something.
    Lacks(String),
}

/// Something that executes cases.
pub trait Executor {
    /// Runs a case from a fresh copy of the common memory pattern.
    fn run(&mut self, case: &Case) -> Result<Outcome, Refusal>;
    /// The page that holds a linear address of one of the [`REGIONS`], as the last case left it.
    fn page(&self, linear: u64) -> &[u8];
}

/// The common pattern of all pages: random bytes mixed with numbers that floating point and arithmetic find
/// interesting.
pub fn pristine_memory() -> Vec<u8> {
    let mut rng = Rng::new(0x0A11_CE5E_ED00);
    let mut bytes = Vec::with_capacity(PAGES * PAGE as usize);
    while bytes.len() < PAGES * PAGE as usize {
        bytes.extend_from_slice(&crate::values::interesting_u64(&mut rng).to_le_bytes());
    }
    for (index, (_, rights)) in pages().enumerate() {
        if rights == Rights::Code {
            bytes[index * PAGE as usize..(index + 1) * PAGE as usize].fill(0xCC);
        }
    }
    bytes
}
