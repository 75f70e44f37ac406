//! Where an input starts: mode, registers, the tweaks of page tables, the code, and what happens on the way.

use orrery_cpu::CpuState;
use orrery_cpu::engine::{Observation, Place, Watchpoint};
use orrery_cpu::paging::entry;
use orrery_cpu::state::{Segment, TableRegister, control, gpr, rflags, seg};

use super::bus::mix;
use super::world::{HIGH, LARGE_PAGE, LOW, PAGE, TEST_PAGES, frame, selector, test_page};
use crate::bytes::Bytes;

/// Bytes before the code.
pub const HEADER_BYTES: usize = 64;
/// Most bytes of code that are used.
pub const CODE_BYTES_MAX: usize = 2 * PAGE as usize;
const EVENTS: usize = 4;
const TWEAKS: usize = 4;

/// What happens at a moment of the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Happening {
    /// An external interrupt waits to be accepted.
    Interrupt(u8),
    /// A device writes `value` to RAM.
    Write {
        /// Where.
        gpa: u64,
        /// What.
        value: u64,
    },
    /// Somebody asks which pages were written.
    TakeDirty,
    /// Cached translations are forgotten.
    Forget,
}

/// See the module's text.
#[derive(Clone)]
pub struct Start {
    /// Which of the other engines.
    pub variant: u8,
    /// How the other engine's run is cut.
    pub slices: u8,
    /// Instructions to execute.
    pub budget: u64,
    /// See `bus::Recorder`.
    pub attention_every: u64,
    /// What is looked at in the sliced run.
    pub observation: Observation,
    /// The vCPU.
    pub state: CpuState,
    /// Writes to RAM before the start.
    pub pokes: Vec<(u64, Vec<u8>)>,
    /// What happens after how many instructions, in order.
    pub events: Vec<(u64, Happening)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Kernel64,
    User64,
    User32,
    Kernel32,
    User16,
    Kernel16,
    UserBased,
    Ring1,
    Unpaged32,
    Real,
}

const MODES: [Mode; 16] = [
    Mode::Kernel64,
    Mode::User64,
    Mode::User32,
    Mode::Kernel32,
    Mode::User16,
    Mode::Kernel16,
    Mode::UserBased,
    Mode::Ring1,
    Mode::Unpaged32,
    Mode::Real,
    Mode::Kernel64,
    Mode::User64,
    Mode::Kernel64,
    Mode::User64,
    Mode::User32,
    Mode::Kernel64,
];

impl Mode {
    fn user(self) -> bool {
        matches!(self, Mode::User64 | Mode::User32 | Mode::User16 | Mode::UserBased)
    }
    fn paged(self) -> bool {
        !matches!(self, Mode::Unpaged32 | Mode::Real)
    }
}

/// The decoder's bitness for the code of an input.
pub fn bitness(data: &[u8]) -> u32 {
    match MODES[usize::from(data.first().copied().unwrap_or(0)) % MODES.len()] {
        Mode::Kernel64 | Mode::User64 | Mode::Ring1 => 64,
        Mode::User32 | Mode::Kernel32 | Mode::UserBased | Mode::Unpaged32 => 32,
        Mode::User16 | Mode::Kernel16 | Mode::Real => 16,
    }
}

/// A register's value: mostly an address where something begins or ends.
fn palette(byte: u8, salt: u64) -> u64 {
    let near = u64::from(byte & 7);
    let end = |page: u64| LOW + (page + 1) * PAGE - 14 + 2 * near;
    let start = |page: u64| LOW + page * PAGE + 8 * near;
    match byte >> 3 {
        0 => near,
        1 => start(0),
        2 => start(4) + 0x100,
        3 => end(4),
        4 => end(7),
        5 => start(8) + 0x40,
        6 => end(8),
        7 => start(10),
        8 => start(11) + 0x100,
        9 => start(12) + 0x20,
        10 => end(11),
        11 => LOW + super::world::TABLE_PAGE * PAGE + 8 * (near + 3),
        12 => start(14),
        13 => end(14),
        14 => LOW + 17 * PAGE - 8 * near,
        15 => LOW + 16 * PAGE + near,
        16 => end(19),
        17 => start(21) + 0x20,
        18 => start(23),
        19 => LARGE_PAGE + frame::PT_LOW * PAGE + 8 * near,
        20 => LARGE_PAGE + test_page(4, 0) & !0xFFF | 8 * near,
        21 => HIGH + (test_page(4, 0) & 0xF_F000) + near,
        22 => HIGH + frame::PT_LOW * PAGE + 8 * (near + 3),
        23 => 0xFFFF_FFF8 + near * 2,
        24 => 0x7FFF_FFFF_FFF4 + near * 2,
        25 => u64::MAX - near,
        26 => 1 << (near * 9),
        27 => [frame::ROOT * PAGE, frame::SECOND_ROOT * PAGE, 0x8000_0000, 0xC000_0080, 0x6E0, 0x174, 0x8000_0011, 7]
            [near as usize],
        28 => [0x10, 0x18, 0x23, 0x2B, 0x33, 0x6B, 0x0C, 0xB8][near as usize],
        29 => mix(salt, near) & 0xFFFF,
        30 => mix(salt, near) & 0xFFFF_FFFF,
        _ => mix(salt, near),
    }
}

fn segment(selector: u16, attributes: u16) -> Segment {
    Segment { base: 0, limit: u32::MAX, selector, attributes }
}

fn segments(state: &mut CpuState, mode: Mode) {
    use selector::*;
    let (cs, ss) = match mode {
        Mode::Kernel64 => (segment(KERNEL_CS, 0xA9B), segment(KERNEL_SS, 0xC93)),
        Mode::User64 => (segment(USER_CS, 0xAFB), segment(USER_SS, 0xCF3)),
        Mode::User32 | Mode::UserBased => (segment(USER_CS32, 0xCFB), segment(USER_SS, 0xCF3)),
        Mode::Kernel32 | Mode::Unpaged32 => (segment(KERNEL_CS32, 0xC9B), segment(KERNEL_SS, 0xC93)),
        Mode::User16 => (segment(USER_CS16, 0x8FB), segment(USER_SS, 0xCF3)),
        Mode::Kernel16 => (segment(KERNEL_CS16, 0x89B), segment(KERNEL_SS, 0xC93)),
        Mode::Ring1 => (segment(CS1, 0xABB), segment(SS1, 0xCB3)),
        Mode::Real => (
            Segment { base: 0, limit: 0xFFFF, selector: 0, attributes: 0x9B },
            Segment { base: 0, limit: 0xFFFF, selector: 0, attributes: 0x93 },
        ),
    };
    state.seg = [ss; 6];
    state.seg[seg::CS] = cs;
    state.cpl = match mode {
        Mode::Ring1 => 1,
        mode if mode.user() => 3,
        _ => 0,
    };
    if mode == Mode::UserBased {
        let based = Segment { base: LOW + 4 * PAGE, limit: 0x1FFF, selector: USER_DATA_BASED, attributes: 0x4F3 };
        state.seg[seg::DS] = based;
        state.seg[seg::ES] = Segment { base: 0, limit: 0x3F_FFFF, selector: USER_DATA_DOWN, attributes: 0xCF7 };
        state.seg[seg::FS] = based;
    }
}

fn control_registers(state: &mut CpuState, mode: Mode, toggles: u16) {
    use control::*;
    let bit = |n: u16, value: u64| if toggles >> n & 1 != 0 { value } else { 0 };
    state.cr0 = CR0_ET | CR0_NE | CR0_MP | bit(0, CR0_WP) | bit(1, CR0_AM) | bit(2, CR0_TS) | bit(3, CR0_EM);
    if mode != Mode::Real {
        state.cr0 |= CR0_PE;
    }
    if mode.paged() {
        state.cr0 |= CR0_PG;
        state.efer = EFER_LME | EFER_LMA;
    }
    // Bits 8 and up are mostly wanted: a zero sets them.
    let wanted = |n: u16, value: u64| if toggles >> n & 1 == 0 { value } else { 0 };
    state.efer |= wanted(8, EFER_NXE) | wanted(9, EFER_SCE);
    state.cr4 = CR4_PAE
        | bit(4, CR4_SMEP)
        | bit(5, CR4_SMAP)
        | bit(6, CR4_PGE)
        | bit(7, CR4_TSD)
        | wanted(10, CR4_OSFXSR | CR4_OSXMMEXCPT)
        | wanted(11, CR4_OSXSAVE)
        | wanted(12, CR4_FSGSBASE)
        | bit(13, CR4_UMIP)
        | bit(14, CR4_DE)
        | if mode.paged() { bit(15, CR4_PCIDE) } else { 0 };
    state.xcr0 = 7;
    state.cr3 = frame::ROOT * PAGE;
}

fn floating_point(state: &mut CpuState, byte: u8) {
    let fpu = &mut state.fpu.0;
    if byte & 1 != 0 {
        // Unmasked x87 exceptions, single precision, another rounding.
        fpu[0..2].copy_from_slice(&[0x340u16, 0x37F, 0x07F, 0xB72][usize::from(byte >> 1 & 3)].to_le_bytes());
    }
    if byte & 8 != 0 {
        let mxcsr = [0x0000u32, 0x9FC0, 0x7F80, 0x1F00][usize::from(byte >> 4 & 3)];
        fpu[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    }
    if byte & 0x40 != 0 {
        // Eight values on the x87 stack, and something in every vector register.
        fpu[4] = 0xFF;
        let patterns = [0x3FF0_0000_0000_0000, 0x7FF0_0000_0000_0001, 0, u64::MAX, 1, 0xC08F_4000_0000_0000u64];
        for register in 0..8u64 {
            let at = 32 + register as usize * 16;
            fpu[at..at + 8].copy_from_slice(&mix(register, byte.into()).to_le_bytes());
            fpu[at + 8..at + 10].copy_from_slice(&(0x3FF0 + 7 * register as u16).to_le_bytes());
        }
        for register in 0..64u64 {
            let value = match register % 7 {
                6 => mix(register, 5),
                n => patterns[n as usize],
            };
            let at = if register < 32 { 160 + register as usize * 8 } else { 576 + (register as usize - 32) * 8 };
            fpu[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
    }
}

fn tables(state: &mut CpuState) {
    state.gdtr = TableRegister { base: HIGH + frame::GDT * PAGE, limit: 0xFF };
    state.idtr = TableRegister { base: HIGH + frame::IDT * PAGE, limit: 0xFFF };
    let tss = HIGH + frame::TSS * PAGE;
    state.tr = Segment { base: tss, limit: 0xFFF, selector: selector::TSS, attributes: 0x8B };
    let ldt = HIGH + frame::GDT * PAGE + 0x800;
    state.ldtr = Segment { base: ldt, limit: 0x1F, selector: selector::LDT, attributes: 0x82 };
    state.star = 0x0023_0010 << 32;
    state.lstar = HIGH + frame::STUBS * PAGE;
    state.cstar = state.lstar + 0x40;
    state.sfmask = rflags::IF | rflags::TF;
    state.kernel_gs_base = LOW + 4 * PAGE;
    state.sysenter_cs = selector::KERNEL_CS.into();
    state.sysenter_eip = HIGH + frame::STUBS * PAGE + 0x80;
    state.sysenter_esp = HIGH + (frame::KERNEL_STACK + 1) * PAGE;
}

/// A page-table entry made worse.
fn tweak(value: u64, how: u8) -> u64 {
    use entry::*;
    match how % 12 {
        0 => value,
        1 => value ^ PRESENT,
        2 => value ^ WRITE,
        3 => value ^ USER,
        4 => value ^ NO_EXECUTE,
        5 => value ^ GLOBAL,
        6 => value | ACCESSED,
        7 => value | ACCESSED | DIRTY,
        8 => value ^ 1 << 51,
        9 => value & 0xFFF | test_page(u64::from(how / 12), 0) & !0xFFF,
        10 => value & 0xFFF | u64::from(how / 12) * PAGE,
        _ => value & 0xFFF | 0x30_2000,
    }
}

/// Breakpoints and watchpoints where something is likely to happen.
fn observation(which: u8, state: &CpuState) -> Observation {
    let mut observation = Observation::default();
    if which & 1 != 0 {
        observation.breakpoints = (0..24).step_by(3).map(|n| state.rip.wrapping_add(n)).collect();
        observation.executions = vec![LOW, LOW + PAGE, HIGH + frame::HANDLERS * PAGE + 14 * 16];
    }
    if which & 2 != 0 {
        let watch = |place, size, write: bool| Watchpoint { place, size, read: !write, write };
        observation.watchpoints = vec![
            watch(Place::Linear { address: state.gpr[gpr::RDI], root: None }, 8, true),
            watch(Place::Linear { address: state.gpr[gpr::RSI], root: Some(state.cr3) }, 3, false),
            watch(Place::Linear { address: state.gpr[gpr::RSP].wrapping_sub(16), root: None }, 8, true),
            watch(Place::Physical { address: frame::PT_LOW * PAGE }, 64, true),
            watch(Place::Physical { address: test_page(0, 0) & 0xF_F000 }, 64, false),
        ];
    }
    observation
}

impl Start {
    /// From a fuzzer's bytes.
    pub fn new(data: &[u8]) -> Start {
        let mut bytes = Bytes::new(&data[..data.len().min(HEADER_BYTES)]);
        let mode = bytes.pick(&MODES);
        let (variant, slices) = (bytes.u8(), bytes.u8());
        let budget = 16 + 4 * u64::from(bytes.u8());
        let toggles = bytes.u16();
        let flags = bytes.u8();
        let style = bytes.u8();
        let place = bytes.u16();
        let fpu = bytes.u8();
        let misc = bytes.u8();

        let mut state = CpuState::power_on();
        segments(&mut state, mode);
        control_registers(&mut state, mode, toggles);
        floating_point(&mut state, fpu);
        tables(&mut state);
        state.rflags = rflags::FIXED
            | if flags & 1 != 0 { rflags::TF } else { 0 }
            | if flags & 2 != 0 { rflags::IF } else { 0 }
            | if flags & 4 != 0 { rflags::DF } else { 0 }
            | if flags & 8 != 0 { rflags::AC } else { 0 }
            | if flags & 16 != 0 { rflags::IOPL } else { 0 }
            | if flags & 32 != 0 { rflags::CF | rflags::ZF } else { 0 }
            | if flags & 64 != 0 { rflags::OF | rflags::AF } else { 0 }
            | if flags & 128 != 0 { rflags::NT } else { 0 };
        for register in 0..16 {
            state.gpr[register] = palette(bytes.u8(), register as u64);
        }
        let gs = bytes.u8();
        let stack = bytes.u8();
        state.gpr[gpr::RSP] = if stack < 192 { LOW + 17 * PAGE - 8 * u64::from(stack) } else { palette(stack << 2, 9) };
        for index in 0..4 {
            state.dr[index] = palette(bytes.u8(), index as u64);
        }
        // Mostly no breakpoints: they make every instruction run alone.
        let breakpoints = bytes.u16();
        if misc & 1 != 0 {
            state.dr[7] = 0x400 | u64::from(breakpoints & 0xFF) | u64::from(breakpoints) << 16;
        }
        state.seg[seg::FS].base = if state.is_64bit() { LOW + 5 * PAGE } else { state.seg[seg::FS].base };
        if state.is_64bit() && misc & 2 != 0 {
            state.seg[seg::GS].base = palette(gs, 17);
        }

        let mut pokes = Vec::new();
        let user = if mode.user() { entry::USER } else { 0 };
        let mut tables = Vec::new();
        let mut second = Vec::new();
        let mut entries: Vec<u64> = (0..TEST_PAGES).map(|page| test_page(page, user)).collect();
        for _ in 0..TWEAKS {
            let (page, how) = (bytes.below(TEST_PAGES as usize), bytes.u8());
            entries[page] = tweak(entries[page], how);
        }
        for (page, entry) in entries.iter().enumerate() {
            tables.extend(entry.to_le_bytes());
            second.extend(entries[if page < 4 { page } else { page ^ 1 }].to_le_bytes());
        }
        pokes.push((frame::PT_LOW * PAGE, tables));
        pokes.push((frame::SECOND_PT * PAGE, second));
        if style & 1 != 0 {
            // Handlers that stop.
            pokes.push((frame::HANDLERS * PAGE, vec![0xF4; 256]));
        }
        if style & 2 != 0 {
            // The upper half is open to user mode as far as the top-level table goes.
            pokes.push((frame::ROOT * PAGE + 256 * 8, (frame::PDPT_HIGH * PAGE | 7).to_le_bytes().to_vec()));
        }

        let mut events = Vec::new();
        let mut at = 0;
        for _ in 0..EVENTS {
            let (delay, kind, what, value) = (bytes.u8(), bytes.u8(), bytes.u8(), bytes.u16());
            at += u64::from(delay);
            let happening = match kind % 8 {
                1 | 2 => Happening::Interrupt(what),
                3 => Happening::Write {
                    gpa: frame::PT_LOW * PAGE + 8 * u64::from(what % 40),
                    value: tweak(entries[usize::from(what) % entries.len()], value as u8),
                },
                4 => Happening::Write {
                    gpa: (test_page(u64::from(what % 8), 0) & 0xF_F000) + u64::from(value & 0xFFF),
                    value: mix(value.into(), what.into()),
                },
                5 => Happening::TakeDirty,
                6 => Happening::Forget,
                _ => continue,
            };
            events.push((at, happening));
        }

        let offset = match place & 3 {
            0 => 0,
            1 => PAGE - 1 - u64::from(place >> 2 & 0x3F),
            2 => PAGE - 1 - u64::from(place >> 2 & 0x1FF),
            _ => u64::from(place >> 2) & 0xFFF,
        };
        let code = &data[HEADER_BYTES.min(data.len())..];
        let code = &code[..code.len().min(CODE_BYTES_MAX)];
        match mode {
            Mode::Real => {
                state.rip = frame::STUBS * PAGE + 0x800 + offset % 0x400;
                state.gpr.iter_mut().for_each(|value| *value &= 0xFFFF);
                pokes.push((state.rip, code[..code.len().min(0x400)].to_vec()));
            }
            Mode::Unpaged32 => {
                state.rip = frame::TEST * PAGE + offset;
                state.gpr.iter_mut().for_each(|value| *value = *value & 0xFFFF_FFFF & !LOW);
                pokes.push((state.rip, code.to_vec()));
            }
            _ => {
                state.rip = LOW + offset;
                let mut rest = code;
                let mut at = offset;
                while !rest.is_empty() {
                    let frame = test_page(at / PAGE, 0) & 0xF_F000;
                    let (piece, after) = rest.split_at(rest.len().min((PAGE - at % PAGE) as usize));
                    pokes.push((frame + at % PAGE, piece.to_vec()));
                    at += piece.len() as u64;
                    rest = after;
                }
                if !state.is_64bit() {
                    state.gpr.iter_mut().for_each(|value| *value &= 0xFFFF_FFFF);
                }
            }
        }
        let attention_every = [0, 1, 2, 5][usize::from(misc >> 4 & 3)];
        let observation = observation(misc >> 6, &state);
        Start { variant, slices, budget, attention_every, observation, state, pokes, events }
    }
}
