//! Translates one block: decodes guest instructions up to the next branch and emits the same instructions with
//! renamed registers and replaced memory operands, an instruction budget in front and links behind.
//!
//! Invariants of emitted code: at every block boundary the guest's status flags are in the vCPU block's slot, RAX
//! and RCX are free, all other guest registers are at home (`registers`). At every site that can leave in the
//! middle of a block the state is that before the instruction, so that it can be executed again.

use super::archive::Relocation;
use super::assembler::{Assembler, Operand, POINTER, cc, host, op};
use super::block::{Class, WINDOW_SPANS, field, window_of};
use super::classify::{self, Treatment};
use super::flags::{self, Need, STATUS};
use super::groups::{Member, Plan, Registers, Which, needs_pointer, reads, writes};
use super::homeless;
use super::mode::Mode;
use super::registers::{BORROWABLE, HOME, Homes, gpr_number, is_high_byte, sized};
use super::residents::{self, Free, Residents};
use super::thunks::Thunks;
use super::undefined::{self, Undefined};
use crate::state::{rflags, seg};
use iced_x86::{
    Code, Decoder, DecoderError, DecoderOptions, Encoder, Instruction, InstructionInfo, InstructionInfoFactory,
    Mnemonic, OpAccess, OpKind, Register, RflagsBits,
};
use serde::{Deserialize, Serialize};

/// Longest block, in instructions. The budget's immediate is one byte.
pub const MAX_INSTRUCTIONS: u32 = 64;

/// Forward branches that a block goes on behind, as if they were not taken.
const SIDE_BRANCHES_MAX: u32 = 4;

/// Most bytes that the translation of one block can take.
pub const MAX_BLOCK_BYTES: usize = 64 * 1024;

/// Most sites, emulated instructions or fault sites of one block.
pub const MAX_RECORDS: usize = 1024;

/// Host registers whose guest values are in the vCPU block's temporaries from 4 on.
pub type Borrowed = [Option<u8>; 3];

/// The first access of a group.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct First {
    /// Where in the group's range it begins.
    pub offset: u16,
    pub size: u8,
    /// Another access of the group writes.
    pub others_write: bool,
}

/// Why and from where translated code leaves to Rust.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum SiteKind {
    /// A memory access that missed the TLB. `resume` is the offset behind the check, which wants the host address in RCX.
    /// For a group, `first` is the access that happens now, which `read` and `write` are about.
    Memory { size: u16, read: bool, write: bool, class: Class, careful: bool, first: Option<First>, resume: u32 },
    /// A direct branch whose rel32 at `patch` may be led to the target's translation. `same_stack` says that RSP is
    /// what it was when the block began.
    Link { target: u64, patch: u32, same_stack: bool },
    /// An indirect branch missed the jump cache. `popped` has been added to RSP.
    Indirect { popped: i32 },
    /// The budget does not cover the block.
    Budget,
    /// The block reaches beyond the stack window. The rel32 at `patch` may be led to a translation without it.
    Window { patch: u32 },
    /// The block must be looked up again: its page may have changed, or it was invalidated.
    Lookup,
    /// An instruction for the emulation, kept decoded.
    Emulate { instruction: u32 },
    /// The host processor faulted on the guest's instruction.
    Fault { flags_in_host: bool, borrowed: Borrowed, residents: Residents },
}

/// A place in translated code from which it can leave.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Site {
    pub kind: SiteKind,
    /// Address of the guest instruction.
    pub rip: u64,
    /// Instructions of the block that have been counted but have not retired.
    pub unretired: u32,
    /// The block it belongs to.
    pub block: u32,
}

/// What is asked of the translator.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    pub rip: u64,
    /// Guest code from RIP to the end of the page, or up to 15 bytes across it if `straddles`.
    pub bytes: &'a [u8],
    pub mode: Mode,
    pub max_instructions: u32,
    /// Every memory access goes to Rust first.
    pub careful: bool,
    /// Nearby accesses share a translation.
    pub grouping: bool,
    /// Accesses near RSP go through the stack window.
    pub window: bool,
    /// Uses from which a register without a home gets one for the block.
    pub resident_uses: u8,
    /// The block goes nowhere but back to Rust.
    pub isolated: bool,
    /// Kinds of instructions whose undefined flags and results are not the host's, if they can be seen.
    pub undefined: Undefined,
    pub block: u32,
    /// Indexes that the block's first site and first instruction for the emulation will have.
    pub first_site: u32,
    pub first_emulated: u32,
    /// Instruction-TLB identity of the page, checked at the checked entry.
    pub page_identity: u32,
    /// Linear page and identity of the second page, for an instruction that straddles two.
    pub second_page: Option<(u64, u32)>,
    pub tlb_mask: u32,
    /// Addresses before which the block ends, ascending.
    pub cuts: &'a [u64],
}

/// Where the pieces of a translated block stand: offsets in the code memory.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Placed {
    /// Entry that checks the page first.
    pub checked: u32,
    /// Entry for branches within the page.
    pub entry: u32,
    /// Entry for branches within the page that know that the stack window covers the block's reach.
    pub inner: u32,
    /// Reach of the block from RSP that its check covers: lowest offset, one past the highest.
    pub window: Option<(i16, i16)>,
    /// Stub that looks the block up again; invalidated entries lead there.
    pub lookup_stub: u32,
    /// Guest bytes translated.
    pub guest_len: u32,
}

/// The first instruction does not end within the bytes given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeedsMoreBytes;

/// Where the guest's status flags are at a point of the emitted code.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Flags {
    Slot,
    Host,
    Both,
    /// Nowhere, but `Translator::source` gives them again.
    Source,
}

/// A host instruction without memory operand that gives the flags that an earlier one gave, while the guest registers
/// that it reads are what they were.
#[derive(Clone, Copy)]
struct Source {
    instruction: Instruction,
    /// Guest registers that it reads, as a bit mask.
    reads: u32,
}

/// What a scratch register is known to hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Holds {
    /// A guest register that lives in the vCPU block.
    Guest(u8),
    /// The host address of a group's range.
    Group(usize),
}

/// What RAX and RCX are known to hold between instructions.
#[derive(Clone, Copy, Default)]
struct ScratchRegisters {
    rax: Option<Holds>,
    rcx: Option<Holds>,
}

impl ScratchRegisters {
    fn of(&mut self, register: u8) -> Option<&mut Option<Holds>> {
        match register {
            host::RAX => Some(&mut self.rax),
            host::RCX => Some(&mut self.rcx),
            _ => None,
        }
    }

    fn forget(&mut self, register: u8) {
        self.set(register, None);
    }

    fn set(&mut self, register: u8, holds: Option<Holds>) {
        if let Some(known) = self.of(register) {
            *known = holds;
        }
    }

    /// The guest register has another value now.
    fn changed(&mut self, guest: u8) {
        for known in [&mut self.rax, &mut self.rcx] {
            if *known == Some(Holds::Guest(guest)) {
                *known = None;
            }
        }
    }

    /// A register that holds the guest register.
    fn find(&self, guest: u8) -> Option<u8> {
        let wanted = Some(Holds::Guest(guest));
        if self.rax == wanted {
            Some(host::RAX)
        } else if self.rcx == wanted {
            Some(host::RCX)
        } else {
            None
        }
    }
}

/// A piece of out-of-line code at the end of the block.
pub(super) enum Cold {
    /// `patch` leads here: recover the address and take the slow path.
    Memory { patch: u32, site: u32, tlb: u32, source: Option<Instruction> },
    /// `patch` leads here: take the slow path with an address that is known.
    Constant { patch: u32, site: u32, address: u64, source: Option<Instruction> },
    /// `patch` leads here: leave with the site.
    Leave { patch: u32, site: u32 },
    /// `patch` leads here when a branch in the middle of the block is taken: save the flags if need be, give back
    /// what the budget was charged for the rest of the block, and go to the target.
    Side { patch: u32, target: u64, ip: u64, save_flags: bool, unretired: u32, same_stack: bool },
    /// `patch` leads here when the stack window does not cover the block.
    Window { patch: u32 },
    /// `patch` leads here from a call that missed the jump cache: push the return address, unless the target is not
    /// canonical, and leave with the site and the next RIP, which is in RCX.
    Call { patch: u32, site: u32, back: u32 },
    /// `patch` leads here: leave with the site and the next RIP, which is in RCX.
    Indirect { patch: u32, site: u32 },
}

/// The translator: buffers that are reused from block to block.
pub struct Translator {
    thunks: Thunks,
    pub a: Assembler,
    encoder: Encoder,
    pub(super) info: InstructionInfoFactory,
    instructions: Vec<(Instruction, Treatment)>,
    pub(super) cold: Vec<Cold>,
    plan: Plan,
    /// Records of the block translated last: its sites, instructions for the emulation, and code offsets of
    /// instructions that may fault with their sites, ascending.
    pub sites: Vec<Site>,
    pub emulated: Vec<Instruction>,
    pub faults: Vec<(u32, u32)>,
    /// Places in the block's code that depend on where it stands.
    pub relocations: Vec<Relocation>,
    first_site: u32,
    first_emulated: u32,
    pub(super) flags: Flags,
    /// What gives the flags that `flags` is about, if that can be repeated.
    source: Option<Source>,
    needs: Vec<Need>,
    scratch: ScratchRegisters,
    /// Where guest registers are at this point.
    pub(super) home: Homes,
    residents: Residents,
    /// Out-of-line code whose way out begins where the residents are in.
    inhabited: std::ops::Range<usize>,
    pub(super) mode: Mode,
    careful: bool,
    /// Of the flags that the current instruction leaves, only ZF is the guest's; the others stay as they are.
    mends_flags: bool,
    isolated: bool,
    block: u32,
    tlb_mask: u32,
    count: u32,
    index: u32,
    position: usize,
    length: usize,
    pub(super) ip: u64,
    /// Offset of the last guest instruction emitted.
    last_native: u64,
}

impl Translator {
    pub fn new(thunks: Thunks) -> Translator {
        Translator {
            thunks,
            a: Assembler::default(),
            encoder: Encoder::new(64),
            info: InstructionInfoFactory::new(),
            instructions: Vec::new(),
            cold: Vec::new(),
            plan: Plan::default(),
            sites: Vec::new(),
            emulated: Vec::new(),
            faults: Vec::new(),
            relocations: Vec::new(),
            first_site: 0,
            first_emulated: 0,
            flags: Flags::Slot,
            source: None,
            needs: Vec::new(),
            scratch: ScratchRegisters::default(),
            home: HOME,
            residents: Residents::default(),
            inhabited: 0..0,
            mode: Mode(0),
            careful: false,
            mends_flags: false,
            isolated: false,
            block: 0,
            tlb_mask: 0,
            count: 0,
            index: 0,
            position: 0,
            length: 0,
            ip: 0,
            last_native: 0,
        }
    }

    /// Translates the block at `request.rip` into `self.a`, to be placed at offset `origin` of the code memory.
    pub fn translate(&mut self, request: &Request, origin: u32) -> Result<Placed, NeedsMoreBytes> {
        let guest_len = self.decode(request)?;
        self.mode = request.mode;
        self.careful = request.careful;
        self.isolated = request.isolated;
        self.block = request.block;
        self.first_site = request.first_site;
        self.first_emulated = request.first_emulated;
        self.sites.clear();
        self.emulated.clear();
        self.faults.clear();
        self.relocations.clear();
        self.tlb_mask = request.tlb_mask;
        self.cold.clear();
        (self.flags, self.source) = (Flags::Slot, None);
        self.scratch = ScratchRegisters::default();
        (self.home, self.inhabited) = (HOME, 0..0);
        let list = std::mem::take(&mut self.instructions);
        self.count = list.iter().filter(|(_, t)| *t != Treatment::Emulate).count() as u32;
        self.index = 0;
        self.ip = request.rip;
        self.a.start(origin as u64);
        let use_window = request.window && !request.isolated;
        if (request.grouping || use_window) && !request.careful && request.mode.is_64bit() {
            self.plan.make(&list, &mut self.info, use_window, request.grouping);
        } else {
            self.plan.clear();
        }
        let plan = &self.plan;
        let stays = |i: usize| !request.mode.is_direct() && flags::stays(&list[i], plan.stays_in_window(i, list[i].1));
        flags::needs(&list, stays, &mut self.needs);

        let settles = !request.careful && !request.isolated;
        self.residents = if settles && request.mode.is_64bit() {
            let free = Free { r11: self.plan.window.is_none(), r15: !request.mode.is_direct() };
            residents::choose(&list, &mut self.info, free, request.resident_uses)
        } else {
            Residents::default()
        };

        let mut placed = Placed { checked: origin, guest_len, ..Placed::default() };
        let lookup = self.site(SiteKind::Lookup, 0);
        self.check_page(request.rip >> 12, request.page_identity, lookup);
        placed.entry = self.a.here() as u32;
        if let Some((vpage, identity)) = request.second_page {
            self.check_page(vpage, identity, lookup);
        }
        placed.window = self.check_window();
        placed.inner = self.a.here() as u32;
        if self.count > 0 {
            self.a.sub_imm(host::R15, self.count as i32);
            let site = self.site(SiteKind::Budget, self.count);
            let patch = self.a.jcc(cc::S, 0);
            self.cold.push(Cold::Leave { patch, site });
        } else {
            // Room for the jump that invalidation writes over the entry.
            self.a.put(&[0x0F, 0x1F, 0x44, 0x00, 0x00]);
        }
        self.settle_in();

        self.length = list.len();
        for (position, (ins, treatment)) in list.iter().enumerate() {
            self.position = position;
            self.ip = ins.ip();
            self.mends_flags = request.undefined.mends(ins) && self.live_behind() & !RflagsBits::ZF != 0;
            if treatment.ends_block() && position + 1 == list.len() {
                self.move_out();
            }
            self.keep_source(ins);
            self.instruction(ins, *treatment);
            self.index += 1;
        }
        if !list.last().is_some_and(|(_, t)| t.ends_block()) {
            self.move_out();
            self.save_flags();
            self.link(request.rip.wrapping_add(guest_len as u64));
        }
        self.instructions = list;
        self.instructions.clear();

        placed.lookup_stub = self.a.here() as u32;
        self.leave(lookup);
        for (number, cold) in std::mem::take(&mut self.cold).into_iter().enumerate() {
            let inhabited = self.inhabited.contains(&number);
            match cold {
                Cold::Memory { patch, site, tlb, source } => {
                    self.a.land(patch);
                    self.a.gs_base_op(true, op::XOR, host::RCX, host::RAX, tlb);
                    self.settle(source);
                    self.slow_access(site, inhabited);
                }
                Cold::Constant { patch, site, address, source } => {
                    self.a.land(patch);
                    self.settle(source);
                    self.a.mov_imm(host::RCX, address);
                    self.slow_access(site, inhabited);
                }
                Cold::Leave { patch, site } => {
                    self.a.land(patch);
                    if inhabited {
                        self.emit_move_out();
                    }
                    self.leave(site);
                }
                Cold::Call { patch, site, back } => {
                    self.a.land(patch);
                    self.compare_canonical();
                    let bad = self.a.jcc(cc::NE, 0);
                    self.push_short(back);
                    self.a.land(bad);
                    self.a.store_gs(host::RCX, field::RIP);
                    self.leave(site);
                }
                Cold::Indirect { patch, site } => {
                    self.a.land(patch);
                    self.a.store_gs(host::RCX, field::RIP);
                    self.leave(site);
                }
                Cold::Window { patch } => {
                    self.a.land(patch);
                    let after = self.a.lea_rcx_rip();
                    self.jump_away(self.thunks.window[window_of(self.mode.class() as usize)]);
                    self.a.land(after);
                    self.a.jcc(cc::C, placed.entry as u64);
                    self.a.decrement_gs32(field::WINDOW_PATIENCE);
                    let impatient = self.a.jcc(cc::S, 0);
                    let jump = self.a.jmp(0);
                    self.ip = request.rip;
                    let site = self.site(SiteKind::Window { patch: self.a.origin as u32 + jump }, 0);
                    self.a.land(impatient);
                    self.a.land(jump);
                    self.leave(site);
                }
                Cold::Side { patch, target, ip, save_flags, unretired, same_stack } => {
                    self.a.land(patch);
                    if save_flags {
                        self.a.save_flags(field::FLAGS);
                    }
                    if inhabited {
                        self.emit_move_out();
                    }
                    self.a.lea(true, host::R15, Some(host::R15), None, unretired as i32);
                    let jump = self.a.jmp(0);
                    self.ip = ip;
                    let kind = SiteKind::Link { target, patch: self.a.origin as u32 + jump, same_stack };
                    let site = self.site(kind, 0);
                    self.a.land(jump);
                    self.leave(site);
                }
            }
        }
        Ok(placed)
    }

    /// The slow path of a memory access, whose address is in RCX.
    fn slow_access(&mut self, site: u32, inhabited: bool) {
        if inhabited {
            self.emit_move_out();
        }
        self.site_in_rax(site);
        self.jump_away(self.thunks.memory);
        if !inhabited || self.residents == Residents::default() {
            return;
        }
        let here = self.a.here() as u32;
        if let SiteKind::Memory { resume, .. } = &mut self.sites[(site - self.first_site) as usize].kind {
            let behind = std::mem::replace(resume, here);
            self.emit_settle_in();
            self.a.jmp(u64::from(behind));
        }
    }

    /// Jumps to one of the doors.
    fn jump_away(&mut self, door: u64) {
        let at = self.a.jmp(door);
        self.relocations.push(Relocation::Away(at));
    }

    fn site_in_rax(&mut self, site: u32) {
        let at = self.a.mov32_imm(host::RAX, site);
        self.relocations.push(Relocation::Site(at));
    }

    fn leave(&mut self, site: u32) {
        self.site_in_rax(site);
        let direct = self.mode.is_direct();
        self.jump_away(if direct { self.thunks.exit_direct } else { self.thunks.exit_site });
    }

    /// Decodes the block into `self.instructions`; returns its length in bytes.
    fn decode(&mut self, request: &Request) -> Result<u32, NeedsMoreBytes> {
        self.instructions.clear();
        let mut decoder = Decoder::with_ip(request.mode.bitness(), request.bytes, request.rip, DecoderOptions::NONE);
        let mut len = 0;
        let mut side_branches = 0;
        let mut undefined = false;
        while (self.instructions.len() as u32) < request.max_instructions.min(MAX_INSTRUCTIONS) {
            if !self.instructions.is_empty() && request.cuts.binary_search(&decoder.ip()).is_ok() {
                break;
            }
            let mut ins = Instruction::default();
            decoder.decode_out(&mut ins);
            if ins.is_invalid() && decoder.last_error() == DecoderError::NoMoreBytes {
                if self.instructions.is_empty() && request.second_page.is_none() {
                    return Err(NeedsMoreBytes);
                }
                if !self.instructions.is_empty() {
                    break;
                }
            }
            let treatment = classify::treatment(&ins, request.mode);
            if let Some((_, last)) = self.instructions.last_mut()
                && *last == Treatment::SetInterrupt
                && matches!(treatment, Treatment::Emulate | Treatment::ReadTsc)
            {
                // Between STI and this one the run may stop: STI must leave its shadow in the state.
                *last = Treatment::Emulate;
                break;
            }
            if undefined && !undefined::hides(&ins, treatment) {
                break;
            }
            undefined = treatment == Treatment::Plain && request.undefined.emulates(&ins);
            self.instructions.push((ins, treatment));
            len = decoder.position() as u32;
            let goes_on = treatment == Treatment::Branch
                && request.mode.is_64bit()
                && !request.isolated
                && ins.near_branch_target() > ins.ip()
                && side_branches < SIDE_BRANCHES_MAX;
            side_branches += goes_on as u32;
            if treatment.ends_block() && !goes_on || request.second_page.is_some() {
                break;
            }
        }
        if undefined && let [.., (before, Treatment::SetInterrupt), _] = self.instructions.as_slice() {
            // As above, for one that is emulated because nothing followed it.
            len = before.next_ip().wrapping_sub(request.rip) as u32;
            self.instructions.pop();
        }
        if let Some((_, last)) = self.instructions.last_mut()
            && (*last == Treatment::SetInterrupt || undefined)
        {
            *last = Treatment::Emulate;
        }
        Ok(len)
    }

    pub(super) fn site(&mut self, kind: SiteKind, unretired: u32) -> u32 {
        self.sites.push(Site { kind, rip: self.ip, unretired, block: self.block });
        self.first_site + self.sites.len() as u32 - 1
    }

    fn emulation_site(&mut self, ins: &Instruction, unretired: u32) -> u32 {
        let instruction = self.first_emulated + self.emulated.len() as u32;
        self.emulated.push(*ins);
        self.site(SiteKind::Emulate { instruction }, unretired)
    }

    /// Instructions from the current one to the end of the block.
    pub(super) fn unretired(&self) -> u32 {
        self.count - self.index
    }

    fn check_page(&mut self, vpage: u64, identity: u32, lookup: u32) {
        self.a.cmp_gs_imm32(field::itlb(self.mode.class(), vpage), identity);
        self.relocations.push(Relocation::Identity(self.a.offset() - 4));
        let patch = self.a.jcc(cc::NE, 0);
        self.cold.push(Cold::Leave { patch, site: lookup });
    }

    /// Leaves if the stack window does not cover all that the block reaches through it.
    fn check_window(&mut self) -> Option<(i16, i16)> {
        let (min, max) = self.plan.window?;
        let span = WINDOW_SPANS.iter().position(|span| max - min <= *span).expect("the plan keeps to the widest span");
        let class = self.mode.class();
        self.a.lea(true, host::RCX, Some(host::RSP), None, min);
        self.a.gs_op(true, op::SUB, host::RCX, field::window_low(class));
        self.a.gs_op(true, op::CMP, host::RCX, field::window_places(class, span));
        let patch = self.a.jcc(cc::AE, 0);
        self.cold.push(Cold::Window { patch });
        Some((min as i16, (min + WINDOW_SPANS[span]) as i16))
    }

    // Flags ----------------------------------------------------------------------------------------------------

    /// Makes sure that the slot holds the flags, and the host, too, if it did. Uses RAX.
    fn save_flags(&mut self) {
        if self.flags == Flags::Source {
            self.repeat();
        }
        if self.flags == Flags::Host {
            self.a.save_flags(field::FLAGS);
            self.scratch.forget(host::RAX);
            self.flags = Flags::Both;
        }
    }

    /// Makes sure that the host's flags are the guest's. Uses RAX.
    fn need_flags(&mut self) {
        match self.flags {
            Flags::Source => self.repeat(),
            Flags::Slot => {
                match self.source {
                    Some(_) => self.repeat(),
                    None => {
                        self.a.restore_flags(field::FLAGS);
                        self.scratch.forget(host::RAX);
                    }
                }
                self.flags = Flags::Both;
            }
            Flags::Host | Flags::Both => {}
        }
    }

    /// The host's flags are about to be lost, in a place that may be left only through [`Translator::lookup_range`] or
    /// [`Translator::lookup_constant`].
    fn clobber_flags(&mut self) {
        self.flags = match self.flags {
            Flags::Host if self.source.is_some() => Flags::Source,
            Flags::Source => Flags::Source,
            Flags::Host | Flags::Both | Flags::Slot => {
                self.save_flags();
                Flags::Slot
            }
        };
    }

    /// The host's flags are about to be lost; the slot holds them.
    fn put_flags_away(&mut self) {
        self.save_flags();
        self.flags = Flags::Slot;
    }

    /// Gives the host its flags once more.
    fn repeat(&mut self) {
        let source = self.source.expect("flags that are nowhere have a source");
        self.emit(&source.instruction).expect("what was encoded once can be encoded again");
        self.flags = Flags::Host;
    }

    /// Before an instruction at which the host may fault: the flags are in the host or in the slot.
    fn leave_source(&mut self) {
        if self.flags == Flags::Source {
            self.save_flags();
        }
    }

    /// In cold code: puts flags that are nowhere into the slot. Uses RAX.
    fn settle(&mut self, source: Option<Instruction>) {
        if let Some(source) = source {
            self.emit(&source).expect("what was encoded once can be encoded again");
            self.a.save_flags(field::FLAGS);
        }
    }

    /// The instruction that cold code must repeat to have the flags.
    fn source_in_need(&self) -> Option<Instruction> {
        self.source.filter(|_| self.flags == Flags::Source).map(|source| source.instruction)
    }

    /// Status flags behind the current instruction that someone may look at.
    fn live_behind(&self) -> u32 {
        self.needs.get(self.position + 1).map_or(STATUS, |need| need.live)
    }

    /// Before an instruction: it may change what the source of the flags reads.
    fn keep_source(&mut self, ins: &Instruction) {
        let Some(source) = self.source else { return };
        let mut written = 0;
        for used in self.info.info(ins).used_registers() {
            if let Some(number) = gpr_number(used.register()).filter(|_| writes(used.access())) {
                written |= 1 << number;
            }
        }
        if source.reads & written != 0 {
            if self.needs[self.position].live != 0 {
                self.save_flags();
            }
            if self.flags == Flags::Source {
                self.flags = Flags::Slot;
            }
            self.source = None;
        }
    }

    /// Behind an instruction that was emitted as `out`: its flags are in the host, and can perhaps be had again.
    fn flags_from(&mut self, ins: &Instruction, out: &Instruction) {
        self.flags = Flags::Host;
        self.source = if self.mode.is_direct() { None } else { source(ins, out, &self.home) };
    }

    // Registers ------------------------------------------------------------------------------------------------

    /// Gives the block's residents their homes.
    fn settle_in(&mut self) {
        self.emit_settle_in();
        for resident in self.residents.into_iter().flatten() {
            if let Some(owner) = resident.owner() {
                self.home[owner] = None;
            }
            self.home[resident.guest as usize] = Some(resident.host);
        }
        self.inhabited = self.cold.len()..usize::MAX;
    }

    fn emit_settle_in(&mut self) {
        for (number, resident) in self.residents.into_iter().flatten().enumerate() {
            if resident.host != host::R11 {
                self.a.store_gs(resident.host, field::evicted(number));
            }
            self.a.load_gs(resident.host, field::gpr(resident.guest));
        }
    }

    /// Before the block ends: all registers go back to where they always are.
    fn move_out(&mut self) {
        let moving = self.residents.iter().flatten().fold(0, |mask, resident| mask | 1 << resident.guest);
        if self.source.is_some_and(|source| source.reads & moving != 0) {
            if self.flags == Flags::Source {
                self.save_flags();
            }
            self.source = None;
        }
        self.emit_move_out();
        self.home = HOME;
        self.inhabited.end = self.cold.len();
    }

    /// Leaves the flags alone.
    fn emit_move_out(&mut self) {
        for (number, resident) in self.residents.into_iter().flatten().enumerate() {
            self.a.store_gs(resident.host, field::gpr(resident.guest));
            let owner = if resident.host == host::R11 { field::WINDOW_DISTANCE } else { field::evicted(number) };
            self.a.load_gs(resident.host, owner);
        }
    }

    /// The residents that are in at this point.
    pub(super) fn residents_here(&self) -> Residents {
        if self.inhabited.end == usize::MAX { self.residents } else { Residents::default() }
    }

    /// Host registers that residents live in at this point, as a bit mask.
    fn inhabited_here(&self) -> u32 {
        self.residents_here().iter().flatten().fold(0, |mask, resident| mask | 1 << resident.host)
    }

    /// Loads a guest register, whole, into a host register.
    fn fetch(&mut self, dst: u8, guest: u8) {
        match self.home[guest as usize] {
            Some(home) => self.a.mov(dst, home),
            None => self.a.load_gs(dst, field::gpr(guest)),
        }
    }

    /// A host register that holds the guest register: its home, or `scratch` after loading it.
    pub(super) fn held(&mut self, guest: u8, scratch: u8) -> u8 {
        if let Some(home) = self.home[guest as usize] {
            return home;
        }
        match self.scratch.find(guest) {
            Some(register) if register == scratch => {}
            Some(register) => self.a.mov(scratch, register),
            None => self.a.load_gs(scratch, field::gpr(guest)),
        }
        self.scratch.set(scratch, Some(Holds::Guest(guest)));
        scratch
    }

    // Memory ---------------------------------------------------------------------------------------------------

    /// Linear address of the memory operand into RCX; uses RAX and the flags. `rsp_bias` is added to RSP.
    pub(super) fn address(&mut self, ins: &Instruction, rsp_bias: i32) {
        self.offset(ins, host::RCX, rsp_bias, true);
        self.add_segment_base(ins);
    }

    /// Effective address (offset in the segment) of the memory operand into `dst`; leaves the flags alone.
    /// Uses RAX and RCX. `wide_result` is false if only 32 bits of it are wanted.
    fn offset(&mut self, ins: &Instruction, dst: u8, rsp_bias: i32, wide_result: bool) {
        let mask = if wide_result { u64::MAX } else { u32::MAX as u64 };
        let base = ins.memory_base();
        let index = ins.memory_index();
        if ins.is_ip_rel_memory_operand() {
            self.a.mov_imm(dst, ins.ip_rel_memory_address() & mask);
            self.scratch.forget(dst);
            return;
        }
        let disp = ins.memory_displacement64();
        if base == Register::None && index == Register::None {
            self.a.mov_imm(dst, disp & mask);
            self.scratch.forget(dst);
            return;
        }
        let wide = wide_result && (base.size() == 8 || index.size() == 8);
        let bias = if base.full_register() == Register::RSP { rsp_bias } else { 0 };
        let index = gpr_number(index).map(|guest| (guest, ins.memory_index_scale() as u8));
        self.effective_address(dst, gpr_number(base), index, (disp as i32).wrapping_add(bias), wide);
        if classify::has_16_bit_address(ins) {
            self.a.movzx16(dst);
        }
    }

    /// `base + index * scale + disp` of guest registers into `dst`; leaves the flags alone. Uses RAX and RCX.
    fn effective_address(&mut self, dst: u8, base: Option<u8>, index: Option<(u8, u8)>, disp: i32, wide: bool) {
        let base = base.map(|guest| self.held(guest, host::RCX));
        let index = index.map(|(guest, scale)| (self.held(guest, host::RAX), scale));
        self.a.lea(wide, dst, base, index, disp);
        if dst == host::RAX || dst == host::RCX {
            self.scratch.forget(dst);
        }
    }

    fn add_segment_base(&mut self, ins: &Instruction) {
        let segment = match ins.memory_segment() {
            Register::FS => seg::FS,
            Register::GS => seg::GS,
            _ => return,
        };
        if self.mode.is_direct() {
            self.a.load_gs(host::RAX, field::segment_base(segment));
            self.scratch = ScratchRegisters::default();
            self.a.lea(true, host::RCX, Some(host::RCX), Some((host::RAX, 1)), 0);
            return;
        }
        self.clobber_flags();
        self.a.gs_op(self.mode.is_64bit(), op::ADD, host::RCX, field::segment_base(segment));
    }

    /// Turns the linear address in RCX into a host address in RCX. Uses RAX and the flags, which are in the slot.
    fn lookup(&mut self, size: usize, read: bool, write: bool) {
        self.lookup_range(size, read, write, None);
    }

    fn lookup_range(&mut self, size: usize, read: bool, write: bool, first: Option<First>) {
        if self.mode.is_direct() {
            return;
        }
        debug_assert!(matches!(self.flags, Flags::Slot | Flags::Source) || self.careful);
        let class = self.mode.class();
        self.scratch = ScratchRegisters::default();
        let kind = SiteKind::Memory { size: size as u16, read, write, class, careful: self.careful, first, resume: 0 };
        let site = self.site(kind, self.unretired());
        if self.careful {
            self.site_in_rax(site);
            self.jump_away(self.thunks.memory);
        } else {
            let tlb = field::tlb(class, write || first.is_some_and(|first| first.others_write));
            self.a.rorx_eax_ecx(8);
            self.a.and32(host::RAX, self.tlb_mask << 4);
            self.a.gs_base_op(true, op::XOR, host::RCX, host::RAX, tlb);
            self.a.cmp_imm(host::RCX, 4096 - size as i32);
            let patch = self.a.jcc(cc::A, 0);
            self.cold.push(Cold::Memory { patch, site, tlb, source: self.source_in_need() });
            self.a.gs_base_op(true, op::ADD, host::RCX, host::RAX, tlb + 8);
        }
        let here = self.a.here();
        if let SiteKind::Memory { resume, .. } = &mut self.sites[(site - self.first_site) as usize].kind {
            *resume = here as u32;
        }
    }

    /// The host address of an access by the translation of its group, whose range begins at RCX.
    fn grouped(&mut self, member: Member) -> Operand {
        let index = member.group;
        let group = self.plan.groups[index];
        if !group.ready {
            self.clobber_flags();
            let Registers { base, index: scaled, scale } = group.registers;
            self.effective_address(host::RCX, base, scaled.map(|index| (index, scale)), group.start(), true);
            let others_write = group.write && !group.first_write;
            let first = First { offset: group.first_offset(), size: group.first_size, others_write };
            self.lookup_range(group.span(), group.first_read, group.first_write, Some(first));
            self.a.store_gs(host::RCX, field::group(index));
            self.plan.groups[index].ready = true;
        } else if self.scratch.rcx != Some(Holds::Group(index)) {
            self.a.load_gs(host::RCX, field::group(index));
        }
        self.scratch.rcx = Some(Holds::Group(index));
        Operand { base: host::RCX, index: None, disp: member.offset, ..POINTER }
    }

    /// The linear address of the memory operand, if it is a constant of the translation.
    fn constant_address(&self, ins: &Instruction) -> Option<u64> {
        if !self.mode.is_64bit() || matches!(ins.memory_segment(), Register::FS | Register::GS) {
            return None;
        }
        if ins.is_ip_rel_memory_operand() {
            return Some(ins.ip_rel_memory_address());
        }
        let none = ins.memory_base() == Register::None && ins.memory_index() == Register::None;
        none.then(|| ins.memory_displacement64())
    }

    /// As `lookup`, for an address whose place in the TLB is known.
    fn lookup_constant(&mut self, address: u64, size: usize, read: bool, write: bool) {
        let class = self.mode.class();
        self.scratch = ScratchRegisters::default();
        let kind = SiteKind::Memory { size: size as u16, read, write, class, careful: false, first: None, resume: 0 };
        let site = self.site(kind, self.unretired());
        let entry = field::tlb(class, write) + 16 * ((address >> 12) as u32 & self.tlb_mask);
        let tag = address & !0xFFF;
        if tag as i64 == tag as i32 as i64 {
            self.a.cmp_gs_imm(entry, tag as u32);
        } else {
            self.a.mov_imm(host::RAX, tag);
            self.a.gs_op(true, op::CMP, host::RAX, entry);
        }
        let patch = self.a.jcc(cc::NE, 0);
        self.cold.push(Cold::Constant { patch, site, address, source: self.source_in_need() });
        self.a.load_gs(host::RCX, entry + 8);
        self.a.lea(true, host::RCX, Some(host::RCX), None, (address & 0xFFF) as i32);
        let here = self.a.here();
        if let SiteKind::Memory { resume, .. } = &mut self.sites[(site - self.first_site) as usize].kind {
            *resume = here as u32;
        }
    }

    /// Host address of the instruction's memory operand; uses RAX, RCX and perhaps the flags.
    fn operand(&mut self, ins: &Instruction, size: usize, read: bool, write: bool) -> Operand {
        if self.mode.is_direct() {
            return self.direct_operand(ins);
        }
        if self.plan.windowed(self.position, Which::Operand) {
            let base = gpr_number(ins.memory_base()).and_then(|base| self.home[base as usize]);
            let base = base.expect("RSP and RBP have homes");
            return Operand { base, index: Some(host::R11), disp: ins.memory_displacement64() as i32, ..POINTER };
        }
        if let Some(member) = self.plan.member(self.position, Which::Operand) {
            return self.grouped(member);
        }
        self.clobber_flags();
        match self.constant_address(ins) {
            Some(address) if !self.careful && (address & 0xFFF) as usize + size <= 4096 => {
                self.lookup_constant(address, size, read, write);
            }
            _ => {
                self.address(ins, 0);
                self.lookup(size, read, write);
            }
        }
        POINTER
    }

    /// Host address of stack memory at RSP + `offset`.
    pub(super) fn stack(&mut self, offset: i32, size: usize, write: bool) -> Operand {
        if self.mode.is_direct() {
            return Operand { base: host::RSP, disp: offset, ..POINTER };
        }
        if self.plan.windowed(self.position, Which::Stack) {
            return Operand { base: host::RSP, index: Some(host::R11), disp: offset, ..POINTER };
        }
        if let Some(member) = self.plan.member(self.position, Which::Stack) {
            return self.grouped(member);
        }
        self.clobber_flags();
        self.a.lea(self.mode.is_64bit(), host::RCX, Some(host::RSP), None, offset);
        self.lookup(size, !write, write);
        POINTER
    }

    /// An operand as a plain pointer in RCX.
    fn pointer(&mut self, operand: Operand) {
        if operand != POINTER {
            let index = operand.index.map(|i| (i, operand.scale));
            self.a.lea(true, host::RCX, Some(operand.base), index, operand.disp);
            self.scratch.forget(host::RCX);
        }
    }

    pub(super) fn adjust_rsp(&mut self, by: i32) {
        self.a.lea(self.mode.is_64bit(), host::RSP, Some(host::RSP), None, by);
    }

    fn word(&self) -> usize {
        if self.mode.is_64bit() { 8 } else { 4 }
    }

    // Instructions ---------------------------------------------------------------------------------------------

    fn instruction(&mut self, ins: &Instruction, treatment: Treatment) {
        let keeps_track = !self.mode.is_direct()
            && matches!(treatment, Treatment::Plain | Treatment::Lea | Treatment::Nothing | Treatment::Branch);
        if !keeps_track {
            self.scratch = ScratchRegisters::default();
        }
        self.treat(ins, treatment);
        if !keeps_track {
            self.scratch = ScratchRegisters::default();
        }
    }

    fn treat(&mut self, ins: &Instruction, treatment: Treatment) {
        if self.mode.is_direct() && self.direct_stack(ins, treatment) {
            return;
        }
        match treatment {
            Treatment::Nothing => {}
            Treatment::Plain => {
                self.plain(ins);
                self.check_stack(ins);
            }
            Treatment::ZeroUpper => self.zero_upper(ins.mnemonic() == Mnemonic::Vzeroall),
            Treatment::Lea => {
                self.load_effective_address(ins);
                self.check_stack(ins);
            }
            Treatment::BitString => self.bit_string(ins),
            Treatment::Push => self.push(ins),
            Treatment::Pop => self.pop(ins),
            Treatment::Leave => self.leave_frame(),
            Treatment::Jump => {
                self.save_flags();
                self.link(ins.near_branch_target());
            }
            Treatment::Branch if self.position + 1 < self.length => self.side_branch(ins),
            Treatment::Branch => self.branch(ins),
            Treatment::CountBranch => self.count_branch(ins),
            Treatment::Call => {
                self.push_constant(ins.next_ip());
                self.save_flags();
                self.link(ins.near_branch_target());
            }
            Treatment::IndirectJump => {
                self.branch_target(ins);
                self.indirect(0);
            }
            Treatment::IndirectCall => {
                self.branch_target(ins);
                if self.call_through_window(ins.next_ip()) {
                    return;
                }
                self.check_canonical();
                self.a.store_gs(host::RCX, field::temporary(1));
                self.push_constant(ins.next_ip());
                self.a.load_gs(host::RCX, field::temporary(1));
                self.indirect(0);
            }
            Treatment::Return => {
                let word = self.word();
                let at = self.stack(0, word, false);
                self.a.load(word, host::RCX, at);
                let extra = if ins.op_count() == 1 { ins.immediate16() as i32 } else { 0 };
                self.adjust_rsp(word as i32 + extra);
                self.indirect(word as i32 + extra);
            }
            Treatment::ClearInterrupt => self.system_flag(rflags::IF, false),
            Treatment::SetInterrupt => self.set_interrupt(ins),
            Treatment::Direction => self.system_flag(rflags::DF, ins.mnemonic() == Mnemonic::Std),
            Treatment::SwapGs => {
                let base = field::segment_base(seg::GS);
                self.a.load_gs(host::RAX, base);
                self.a.load_gs(host::RCX, field::KERNEL_GS_BASE);
                self.a.store_gs(host::RCX, base);
                self.a.store_gs(host::RAX, field::KERNEL_GS_BASE);
            }
            Treatment::ReadTsc => self.read_tsc(ins),
            Treatment::PushFlags => self.push_flags(),
            Treatment::ReadSelector => {
                self.a.load_gs16_eax(field::selector(ins.op1_register().number()));
                let guest = gpr_number(ins.op0_register()).expect("a general register");
                match self.home[guest as usize] {
                    Some(home) => self.a.mov(home, host::RAX),
                    None => self.a.store_gs(host::RAX, field::gpr(guest)),
                }
            }
            Treatment::AccessFlag => {
                self.system_flag(rflags::AC, ins.mnemonic() == Mnemonic::Stac);
                self.link(ins.next_ip());
            }
            Treatment::Emulate => {
                self.save_flags();
                let site = self.emulation_site(ins, 0);
                let patch = self.a.jmp(0);
                self.cold.push(Cold::Leave { patch, site });
            }
        }
    }

    /// Jumps to the translation of `target`, through Rust until it is linked. Flags are in the slot.
    fn link(&mut self, target: u64) {
        assert!(matches!(self.flags, Flags::Slot | Flags::Both), "the flags are saved before a block ends");
        let target = if self.mode.is_64bit() { target } else { target & 0xFFFF_FFFF };
        let patch = self.a.jmp(0);
        self.link_site(target, patch);
    }

    fn link_site(&mut self, target: u64, patch: u32) {
        let same_stack = self.plan.same_stack(self.position + 1);
        let kind = SiteKind::Link { target, patch: self.a.origin as u32 + patch, same_stack };
        let site = self.site(kind, 0);
        self.cold.push(Cold::Leave { patch, site });
    }

    fn branch(&mut self, ins: &Instruction) {
        self.need_flags();
        self.save_flags();
        let condition = ins.condition_code() as u8 - 1;
        let patch = self.a.jcc(condition, 0);
        self.link_site(self.masked(ins.near_branch_target()), patch);
        self.link(ins.next_ip());
    }

    /// A branch in the middle of a block: taken, it leaves; otherwise the block goes on.
    fn side_branch(&mut self, ins: &Instruction) {
        self.need_flags();
        let condition = ins.condition_code() as u8 - 1;
        let patch = self.a.jcc(condition, 0);
        self.cold.push(Cold::Side {
            patch,
            target: self.masked(ins.near_branch_target()),
            ip: self.ip,
            save_flags: self.flags == Flags::Host,
            unretired: self.unretired() - 1,
            same_stack: self.plan.same_stack(self.position + 1),
        });
    }

    fn masked(&self, rip: u64) -> u64 {
        if self.mode.is_64bit() { rip } else { rip & 0xFFFF_FFFF }
    }

    fn count_branch(&mut self, ins: &Instruction) {
        self.put_flags_away();
        let address_bits = match ins.code() {
            Code::Jrcxz_rel8_64 | Code::Loop_rel8_64_RCX | Code::Loope_rel8_64_RCX | Code::Loopne_rel8_64_RCX => 64,
            Code::Jecxz_rel8_64
            | Code::Jecxz_rel8_32
            | Code::Loop_rel8_64_ECX
            | Code::Loope_rel8_64_ECX
            | Code::Loopne_rel8_64_ECX
            | Code::Loop_rel8_32_ECX
            | Code::Loope_rel8_32_ECX
            | Code::Loopne_rel8_32_ECX => 32,
            _ => 16,
        };
        // Guest RCX lives in R13.
        let wide = address_bits == 64;
        let zero_test = |a: &mut Assembler| match address_bits {
            64 => a.put(&[0x4D, 0x85, 0xED]),      // test r13, r13
            32 => a.put(&[0x45, 0x85, 0xED]),      // test r13d, r13d
            _ => a.put(&[0x66, 0x45, 0x85, 0xED]), // test r13w, r13w
        };
        let target = self.masked(ins.near_branch_target());
        if ins.is_jcx_short() {
            zero_test(&mut self.a);
            let patch = self.a.jcc(cc::E, 0);
            self.link_site(target, patch);
            self.link(ins.next_ip());
            return;
        }
        if address_bits == 16 {
            self.a.put(&[0x66, 0x41, 0xFF, 0xCD]); // dec r13w
        } else {
            self.a.lea(wide, host::R13, Some(host::R13), None, -1);
        }
        zero_test(&mut self.a);
        if ins.is_loop() {
            let patch = self.a.jcc(cc::NE, 0);
            self.link_site(target, patch);
        } else {
            let fall = self.a.jcc(cc::E, 0);
            self.a.gs_op(false, op::LOAD, host::RAX, field::FLAGS);
            self.a.put(&[0xF6, 0xC4, 0x40]); // test ah, ZF
            let loops_while_equal = matches!(ins.mnemonic(), Mnemonic::Loope);
            let patch = self.a.jcc(if loops_while_equal { cc::NE } else { cc::E }, 0);
            self.link_site(target, patch);
            self.a.land(fall);
        }
        self.link(ins.next_ip());
    }

    /// Target of an indirect branch into RCX.
    fn branch_target(&mut self, ins: &Instruction) {
        let word = self.word();
        if ins.op0_kind() == OpKind::Memory {
            let at = self.operand(ins, word, true, false);
            self.may_fault_here();
            self.a.load(word, host::RCX, at);
        } else {
            let guest = gpr_number(ins.op0_register()).expect("an indirect branch takes a general register");
            self.fetch(host::RCX, guest);
            if word == 4 {
                self.a.mov32(host::RCX, host::RCX);
            }
        }
        self.scratch.forget(host::RCX);
    }

    /// Leaves if RCX, the target of a call, is not canonical: nothing may be pushed then.
    fn check_canonical(&mut self) {
        if !self.mode.is_64bit() {
            return;
        }
        self.put_flags_away();
        let site = self.site(SiteKind::Indirect { popped: 0 }, self.unretired());
        self.compare_canonical();
        let patch = self.a.jcc(cc::NE, 0);
        self.cold.push(Cold::Indirect { patch, site });
    }

    /// Sets ZF if RCX is canonical; uses RAX.
    fn compare_canonical(&mut self) {
        self.a.mov(host::RAX, host::RCX);
        self.a.put(&[0x48, 0xC1, 0xE0, 16, 0x48, 0xC1, 0xF8, 16]); // shl rax, 16; sar rax, 16
        self.a.put(&[0x48, 0x39, 0xC8]); // cmp rax, rcx
    }

    /// Calls what RCX says, if the return address goes through the stack window: what is in the jump cache is canonical.
    fn call_through_window(&mut self, back: u64) -> bool {
        let short = back as i64 == back as i32 as i64;
        if self.isolated || self.mode.is_direct() || !short || !self.plan.windowed(self.position, Which::Stack) {
            return false;
        }
        self.put_flags_away();
        let site = self.site(SiteKind::Indirect { popped: 0 }, self.unretired());
        self.look_up_jump();
        let patch = self.a.jcc(cc::NE, 0);
        self.cold.push(Cold::Call { patch, site, back: back as u32 });
        self.push_short(back as u32);
        self.a.jmp_gs_rax(field::JUMP_HOST);
        true
    }

    /// Pushes a constant, sign-extended, through the stack window.
    fn push_short(&mut self, value: u32) {
        let at = Operand { base: host::RSP, index: Some(host::R11), disp: -8, ..POINTER };
        self.a.store_imm(8, at, value);
        self.adjust_rsp(-8);
    }

    /// Compares RCX with its entry in the jump cache, which RAX leads to.
    fn look_up_jump(&mut self) {
        self.a.rorx_eax_ecx(28);
        self.a.and32(host::RAX, (super::block::JUMP_ENTRIES as u32 - 1) << 4);
        self.a.gs_base_op(true, op::CMP, host::RCX, host::RAX, field::JUMP_RIP);
    }

    /// Goes where RCX says, through the jump cache. `popped` has been added to RSP, which is taken back if the
    /// target turns out to be no address.
    pub(super) fn indirect(&mut self, popped: i32) {
        self.put_flags_away();
        let site = self.site(SiteKind::Indirect { popped }, self.unretired());
        if self.isolated {
            let patch = self.a.jmp(0);
            self.cold.push(Cold::Indirect { patch, site });
            return;
        }
        self.look_up_jump();
        let patch = self.a.jcc(cc::NE, 0);
        self.cold.push(Cold::Indirect { patch, site });
        self.a.jmp_gs_rax(field::JUMP_HOST);
    }

    fn load_effective_address(&mut self, ins: &Instruction) {
        let dst = ins.op0_register();
        let guest = gpr_number(dst).expect("LEA writes a general register");
        let home = self.home[guest as usize];
        if dst.size() == 2 {
            self.offset(ins, host::RCX, 0, false);
            self.scratch = ScratchRegisters::default();
            let target = self.held(guest, host::RAX);
            self.scratch = ScratchRegisters::default();
            self.a.put(&[0x66, 0x40 | target >> 3, op::STORE, 0xC8 | target & 7]); // mov target16, cx
            if home.is_none() {
                self.a.store_gs(target, field::gpr(guest));
            }
            return;
        }
        let target = home.unwrap_or(host::RAX);
        self.offset(ins, target, 0, dst.size() == 8);
        if home.is_none() {
            self.a.store_gs(target, field::gpr(guest));
            self.scratch.changed(guest);
            self.scratch.set(target, Some(Holds::Guest(guest)));
        }
    }

    fn bit_string(&mut self, ins: &Instruction) {
        let offset_register = ins.op1_register();
        let guest = gpr_number(offset_register).expect("the bit offset is a general register");
        let size = offset_register.size();
        self.clobber_flags();
        self.offset(ins, host::RCX, 0, true);
        self.fetch(host::RAX, guest);
        match size {
            8 => self.a.put(&[0x48, 0xC1, 0xF8, 6]),                         // sar rax, 6
            4 => self.a.put(&[0x48, 0x63, 0xC0, 0x48, 0xC1, 0xF8, 5]),       // movsxd rax, eax; sar rax, 5
            _ => self.a.put(&[0x48, 0x0F, 0xBF, 0xC0, 0x48, 0xC1, 0xF8, 4]), // movsx rax, ax; sar rax, 4
        }
        // The distance counts before the effective address is cut to the address size.
        let wide = self.mode.is_64bit() && address_size(ins) == 8;
        self.a.lea(wide, host::RCX, Some(host::RCX), Some((host::RAX, size as u8)), 0);
        self.add_segment_base(ins);
        self.lookup(size, true, ins.mnemonic() != Mnemonic::Bt);
        self.fetch(host::RAX, guest);
        self.a.and32(host::RAX, size as u32 * 8 - 1);
        self.a.store_gs(host::RAX, field::temporary(1));
        self.need_flags();
        self.a.load_gs(host::RAX, field::temporary(1));
        let mut out = *ins;
        out.set_has_lock_prefix(false);
        out.set_op1_register(sized(offset_register, host::RAX));
        set_memory(&mut out, POINTER);
        self.may_fault_here();
        self.encode(ins, &out);
        (self.flags, self.source) = (Flags::Host, None);
    }

    fn push(&mut self, ins: &Instruction) {
        let word = self.word();
        let down = -(word as i32);
        match ins.op0_kind() {
            OpKind::Register => {
                let guest = gpr_number(ins.op0_register()).expect("segment registers are emulated");
                let at = self.stack(down, word, true);
                let value = self.held(guest, host::RAX);
                self.a.store(word, at, value);
            }
            OpKind::Memory => {
                let from = self.operand(ins, word, true, false);
                self.a.load(word, host::RAX, from);
                self.a.store_gs(host::RAX, field::temporary(1));
                let to = self.stack(down, word, true);
                self.a.load_gs(host::RAX, field::temporary(1));
                self.a.store(word, to, host::RAX);
            }
            _ => {
                self.push_constant(ins.immediate(0));
                return;
            }
        }
        self.adjust_rsp(down);
    }

    fn push_constant(&mut self, value: u64) {
        if self.mode.is_direct() {
            self.direct_push_constant(value);
            return;
        }
        let word = self.word();
        let at = self.stack(-(word as i32), word, true);
        if word == 4 || value as i64 == value as i32 as i64 {
            self.a.store_imm(word, at, value as u32);
        } else {
            self.a.mov_imm(host::RAX, value);
            self.a.store(8, at, host::RAX);
        }
        self.adjust_rsp(-(word as i32));
    }

    fn pop(&mut self, ins: &Instruction) {
        let word = self.word();
        let at = self.stack(0, word, false);
        if ins.op0_kind() == OpKind::Register {
            let guest = gpr_number(ins.op0_register()).expect("segment registers are emulated");
            match self.home[guest as usize] {
                Some(host::RSP) => {
                    self.a.load(word, host::RSP, at);
                    return;
                }
                Some(home) => self.a.load(word, home, at),
                None => {
                    self.a.load(word, host::RAX, at);
                    self.a.store_gs(host::RAX, field::gpr(guest));
                }
            }
        } else {
            self.a.load(word, host::RAX, at);
            self.a.store_gs(host::RAX, field::temporary(1));
            // An address based on RSP uses its value after the pop.
            self.clobber_flags();
            self.address(ins, word as i32);
            self.lookup(word, false, true);
            self.a.load_gs(host::RAX, field::temporary(1));
            self.a.store(word, POINTER, host::RAX);
        }
        self.adjust_rsp(word as i32);
    }

    fn leave_frame(&mut self) {
        let word = self.word();
        let at = if self.plan.windowed(self.position, Which::Stack) {
            Operand { base: host::RBP, index: Some(host::R11), ..POINTER }
        } else if let Some(member) = self.plan.member(self.position, Which::Stack) {
            self.grouped(member)
        } else {
            self.clobber_flags();
            self.a.lea(word == 8, host::RCX, Some(host::RBP), None, 0);
            self.lookup(word, true, false);
            POINTER
        };
        // RSP is a function of the old RBP, which the load replaces.
        self.a.lea(word == 8, host::RSP, Some(host::RBP), None, word as i32);
        self.a.load(word, host::RBP, at);
    }

    /// Sets or clears one flag of RFLAGS that is not a status flag.
    fn system_flag(&mut self, flag: u64, set: bool) {
        self.put_flags_away();
        // and/or dword gs:[RFLAGS], imm32
        self.a.put(&[0x65, 0x81, if set { 0x0C } else { 0x24 }, 0x25]);
        self.a.put(&field::RFLAGS.to_le_bytes());
        let value = if set { flag as u32 } else { !(flag as u32) };
        self.a.put(&value.to_le_bytes());
    }

    /// STI in the middle of a block: nothing can come between it and the next instruction, so that its shadow is
    /// only needed when an interrupt waits for it.
    fn set_interrupt(&mut self, ins: &Instruction) {
        self.put_flags_away();
        self.a.cmp_gs_imm32(field::WINDOW_WANTED, 0);
        let site = self.emulation_site(ins, self.unretired());
        let patch = self.a.jcc(cc::NE, 0);
        self.cold.push(Cold::Leave { patch, site });
        self.system_flag(rflags::IF, true);
    }

    /// RDTSC and RDTSCP: ticks when the budget is used up, less those of the instructions until then.
    fn read_tsc(&mut self, ins: &Instruction) {
        self.put_flags_away();
        self.a.cmp_gs_imm32(field::TSC_KNOWN, 0);
        let site = self.emulation_site(ins, self.unretired());
        let patch = self.a.jcc(cc::E, 0);
        self.cold.push(Cold::Leave { patch, site });
        self.a.lea(true, host::RAX, Some(host::R15), None, self.unretired() as i32);
        self.a.imul_rax_gs(field::TSC_PER_INSTRUCTION);
        self.a.load_gs(host::RCX, field::TSC_AT_LIMIT);
        self.a.sub(host::RCX, host::RAX);
        self.a.gs_op(true, op::ADD, host::RCX, field::TSC_OFFSET);
        self.a.mov32(HOME[0].expect("guest RAX has a home"), host::RCX);
        self.a.put(&[0x48, 0xC1, 0xE9, 32]); // shr rcx, 32
        self.a.mov32(HOME[2].expect("guest RDX has a home"), host::RCX);
        if ins.mnemonic() == Mnemonic::Rdtscp {
            self.a.load_gs(HOME[1].expect("guest RCX has a home"), field::TSC_AUX);
        }
    }

    fn push_flags(&mut self) {
        self.put_flags_away();
        let at = self.stack(-8, 8, true);
        // The image needs the host's flags, and RCX is part of the address: build the image in RAX, piece by piece into a temporary.
        self.a.gs_op(false, op::LOAD, host::RAX, field::FLAGS);
        self.a.put(&[0x0F, 0xB6, 0xC4]); // movzx eax, ah
        self.a.and32(host::RAX, 0xD5);
        self.a.store_gs(host::RAX, field::temporary(1));
        self.a.gs_op(false, op::LOAD, host::RAX, field::FLAGS);
        self.a.and32(host::RAX, 1);
        self.a.put(&[0xC1, 0xE0, 11]); // shl eax, 11
        self.a.gs_op(true, op::ADD, host::RAX, field::temporary(1));
        self.a.store_gs(host::RAX, field::temporary(1));
        self.a.load_gs(host::RAX, field::RFLAGS);
        // VM and RF are not pushed.
        self.a.and32(host::RAX, !(rflags::STATUS | rflags::RF | rflags::VM) as u32);
        self.a.gs_op(true, op::ADD, host::RAX, field::temporary(1));
        self.may_fault_here();
        self.a.store(8, at, host::RAX);
        self.adjust_rsp(-8);
    }

    /// Emits `out`, the renamed form of `ins`. Where the encoder has no form for it, the block leaves to the
    /// emulation, which will say what is missing.
    pub(super) fn encode(&mut self, ins: &Instruction, out: &Instruction) {
        if self.emit(out).is_err() {
            self.save_flags();
            let site = self.emulation_site(ins, self.unretired());
            let patch = self.a.jmp(0);
            self.cold.push(Cold::Leave { patch, site });
        }
    }

    fn emit(&mut self, out: &Instruction) -> Result<(), iced_x86::IcedError> {
        let start = self.a.bytes.len();
        self.last_native = self.a.here();
        self.encoder.set_buffer(std::mem::take(&mut self.a.bytes));
        let result = self.encoder.encode(out, self.last_native);
        self.a.bytes = self.encoder.take_buffer();
        if result.is_err() {
            self.a.bytes.truncate(start);
        }
        result.map(|_| ())
    }

    /// VZEROUPPER or VZEROALL of the eight registers that there are outside 64-bit mode.
    fn zero_upper(&mut self, all: bool) {
        for n in 0..8u8 {
            if all {
                self.a.put(&[0xC5, 0x81 | (!n & 15) << 3, 0xEF, 0xC0 | n << 3 | n]); // vpxor xmm, xmm, xmm
            } else {
                self.a.put(&[0xC5, 0xF9, 0x6F, 0xC0 | n << 3 | n]); // vmovdqa xmm, xmm
            }
        }
    }

    /// Any instruction that executes natively.
    fn plain(&mut self, ins: &Instruction) {
        if (0..ins.op_count()).any(|i| ins.op_kind(i) == OpKind::Register && is_high_byte(ins.op_register(i))) {
            self.scratch = ScratchRegisters::default();
            self.high_byte(ins);
            self.scratch = ScratchRegisters::default();
            return;
        }
        if self.move_register(ins) || self.exchange(ins) {
            return;
        }
        let use_of = Use::of(self.info.info(ins), ins);
        let mut out = *ins;
        out.set_code(classify::free_accumulator(ins.code()));
        out.set_has_lock_prefix(false);

        let mut at = POINTER;
        if let Some((_, access)) = use_of.memory {
            at = self.operand(ins, ins.memory_size().size(), reads(access), writes(access));
            self.touch_first(ins, at);
            if needs_pointer(ins) {
                self.pointer(at);
                at = POINTER;
            }
        }
        if self.mends_flags {
            self.save_flags();
        } else if self.needs[self.position].in_host {
            self.need_flags();
        }
        if classify::may_fault(ins) || self.mode.is_direct() {
            self.leave_source();
        }

        let (pin_rax, pin_rcx) = (classify::pins_rax(ins), classify::pins_rcx(ins));
        if pin_rax || pin_rcx {
            self.scratch = ScratchRegisters::default();
        }
        let mut scratch = Scratch {
            rax: !pin_rax,
            rcx: !pin_rcx && use_of.memory.is_none(),
            taken: use_of.gprs | self.inhabited_here(),
            borrowed: [0; 3],
            borrowed_count: 0,
        };
        if use_of.memory.is_some() {
            if pin_rcx {
                self.pointer(at);
                at = Operand { base: self.take(&mut scratch), ..POINTER };
                self.a.mov(at.base, host::RCX);
            }
            set_memory(&mut out, at);
        }
        if pin_rax {
            self.fetch(host::RAX, 0);
        }
        if pin_rcx {
            self.fetch(host::RCX, 1);
        }
        // A register that a scratch register holds is nearer than its place in the vCPU block.
        let near = (0..ins.op_count()).any(|i| {
            let guest = (ins.op_kind(i) == OpKind::Register).then(|| gpr_number(ins.op_register(i))).flatten();
            guest.is_some_and(|guest| self.scratch.find(guest).is_some())
        });
        let in_place = match use_of.memory {
            None if !pin_rax && !pin_rcx && !near => homeless::use_place(&mut out, &use_of.access, &self.home),
            _ => None,
        };
        if let Some(guest) = in_place.and_then(|i| gpr_number(ins.op_register(i))) {
            self.scratch.changed(guest);
        }
        let mut write_back: [Option<(u8, u8)>; 4] = [None; 4];
        let mut assigned: [Option<(u8, u8)>; 4] = [None; 4];
        for i in 0..ins.op_count() {
            if ins.op_kind(i) != OpKind::Register || in_place == Some(i) {
                continue;
            }
            let register = ins.op_register(i);
            let Some(guest) = gpr_number(register) else { continue };
            // An operand that is pinned too is the pinned register itself.
            if pin_rax && guest == 0 || pin_rcx && guest == 1 {
                continue;
            }
            let host_register = match self.home[guest as usize] {
                Some(home) => home,
                None => {
                    let access = use_of.access[i as usize];
                    let earlier = assigned.iter().flatten().find(|(g, _)| *g == guest).map(|(_, h)| *h);
                    let holder = self.scratch.find(guest).filter(|register| scratch.is_free(*register));
                    let (temp, fresh) = match earlier.or(holder) {
                        Some(temp) => (temp, false),
                        None => (self.take(&mut scratch), true),
                    };
                    scratch.use_up(temp);
                    let whole = access == OpAccess::Write && register.size() >= 4 && !conditional_result(ins);
                    let read_elsewhere = use_of.reads_gpr(guest);
                    if fresh && (!whole || read_elsewhere) {
                        self.a.load_gs(temp, field::gpr(guest));
                    }
                    if fresh {
                        self.scratch.set(temp, Some(Holds::Guest(guest)));
                    }
                    assigned[i as usize] = Some((guest, temp));
                    if writes(access) {
                        write_back[i as usize] = Some((guest, temp));
                    }
                    temp
                }
            };
            out.set_op_register(i, sized(register, host_register));
        }

        let flags_in_host = self.flags != Flags::Slot;
        let accesses = self.mode.is_direct() && use_of.memory.is_some();
        let fault = (classify::may_fault(ins) || accesses).then(|| {
            let kind = SiteKind::Fault {
                flags_in_host,
                borrowed: std::array::from_fn(|i| (i < scratch.borrowed_count).then_some(scratch.borrowed[i])),
                residents: self.residents_here(),
            };
            self.site(kind, self.unretired())
        });
        self.encode(ins, &out);
        if let Some(site) = fault {
            self.faults.push((self.last_native as u32, site));
        }
        for (guest, temp) in write_back.into_iter().flatten() {
            self.a.store_gs(temp, field::gpr(guest));
            self.scratch.changed(guest);
            self.scratch.set(temp, Some(Holds::Guest(guest)));
        }
        if pin_rax || pin_rcx {
            self.scratch = ScratchRegisters::default();
        }
        if pin_rax && use_of.writes_rax {
            self.a.mov(HOME[0].expect("guest RAX has a home"), host::RAX);
        }
        if pin_rcx && use_of.writes_rcx {
            self.a.mov(HOME[1].expect("guest RCX has a home"), host::RCX);
        }
        for i in 0..scratch.borrowed_count {
            self.a.load_gs(scratch.borrowed[i], field::temporary(4 + i as u32));
        }
        if self.mends_flags {
            self.a.merge_zero_flag(field::FLAGS);
            self.scratch = ScratchRegisters::default();
            (self.flags, self.source) = (Flags::Slot, None);
        } else if use_of.flags_out {
            self.flags_from(ins, &out);
        }
    }

    /// MOV between general registers of 32 or 64 bits: straight to or from the vCPU block if one lives there.
    fn move_register(&mut self, ins: &Instruction) -> bool {
        if ins.mnemonic() != Mnemonic::Mov
            || ins.op0_kind() != OpKind::Register
            || ins.op1_kind() != OpKind::Register
            || ins.op0_register().size() < 4
        {
            return false;
        }
        let (Some(dst), Some(src)) = (gpr_number(ins.op0_register()), gpr_number(ins.op1_register())) else {
            return false;
        };
        let wide = ins.op0_register().size() == 8;
        match (self.home[dst as usize], self.home[src as usize]) {
            (Some(to), Some(from)) if wide => self.a.mov(to, from),
            (Some(to), Some(from)) => self.a.mov32(to, from),
            (Some(to), None) => match self.scratch.find(src) {
                Some(register) if wide => self.a.mov(to, register),
                Some(register) => self.a.mov32(to, register),
                None => self.a.gs_op(wide, op::LOAD, to, field::gpr(src)),
            },
            (None, Some(from)) if wide => {
                self.a.store_gs(from, field::gpr(dst));
                self.scratch.changed(dst);
            }
            (None, from) => {
                match from {
                    Some(from) => self.a.mov32(host::RAX, from),
                    None => self.a.gs_op(wide, op::LOAD, host::RAX, field::gpr(src)),
                }
                self.a.store_gs(host::RAX, field::gpr(dst));
                self.scratch.changed(dst);
                self.scratch.rax = Some(Holds::Guest(dst));
            }
        }
        true
    }

    /// XCHG of memory and a register that has a home: a load and a store, for there is one vCPU and the processor's own
    /// instruction locks the bus.
    fn exchange(&mut self, ins: &Instruction) -> bool {
        if !matches!(ins.code(), Code::Xchg_rm32_r32 | Code::Xchg_rm64_r64) || ins.op0_kind() != OpKind::Memory {
            return false;
        }
        let Some(home) = gpr_number(ins.op1_register()).and_then(|guest| self.home[guest as usize]) else {
            return false;
        };
        self.scratch = ScratchRegisters::default();
        let size = ins.memory_size().size();
        let at = self.operand(ins, size, true, true);
        self.may_fault_here();
        self.a.load(size, host::RAX, at);
        self.may_fault_here();
        self.a.store(size, at, home);
        self.a.mov(home, host::RAX);
        self.scratch = ScratchRegisters::default();
        true
    }

    /// A scratch register for one instruction: RAX or RCX if free, else another one, borrowed.
    fn take(&mut self, scratch: &mut Scratch) -> u8 {
        // Rather one that holds nothing.
        let rather_rcx = scratch.rcx && self.scratch.rcx.is_none() && self.scratch.rax.is_some();
        if scratch.rax && !rather_rcx {
            scratch.rax = false;
            self.scratch.rax = None;
            return host::RAX;
        }
        if scratch.rcx {
            scratch.rcx = false;
            self.scratch.rcx = None;
            return host::RCX;
        }
        let free = BORROWABLE.iter().copied().find(|r| scratch.taken & 1 << r == 0);
        let register = free.expect("no instruction uses all borrowable registers");
        scratch.taken |= 1 << register;
        self.a.store_gs(register, field::temporary(4 + scratch.borrowed_count as u32));
        scratch.borrowed[scratch.borrowed_count] = register;
        scratch.borrowed_count += 1;
        register
    }

    /// Instructions with AH, CH, DH or BH, which cannot be combined with a REX prefix: guest RAX and RCX are
    /// brought into the host registers of the same name for them.
    fn high_byte(&mut self, ins: &Instruction) {
        let use_of = Use::of(self.info.info(ins), ins);
        let mut out = *ins;
        out.set_has_lock_prefix(false);
        let memory = use_of.memory;
        if let Some((_, access)) = memory {
            let at = self.operand(ins, ins.memory_size().size(), reads(access), writes(access));
            self.pointer(at);
            set_memory(&mut out, POINTER);
        }
        if self.needs[self.position].in_host {
            self.need_flags();
        }
        if classify::may_fault(ins) || self.mode.is_direct() {
            self.leave_source();
        }
        // The implicit AX of a multiplication, division or exchange.
        let mut rax_holds = classify::pins_rax(ins).then_some(0);
        let mut rcx_holds = None;
        for i in 0..ins.op_count() {
            if ins.op_kind(i) != OpKind::Register {
                continue;
            }
            let register = ins.op_register(i);
            match gpr_number(register) {
                Some(0) => rax_holds = Some(0),
                Some(1) if memory.is_some() => {
                    // RCX holds the address; the only register operand goes to RAX.
                    rax_holds = Some(1);
                    let renamed = if register == Register::CH { Register::AH } else { sized(register, host::RAX) };
                    out.set_op_register(i, renamed);
                }
                Some(1) => rcx_holds = Some(1),
                _ => {}
            }
        }
        // SHL AH, CL and its like.
        if ins.op_count() == 2 && ins.op1_kind() == OpKind::Register && ins.op1_register() == Register::CL {
            rcx_holds = Some(1);
        }
        if let Some(guest) = rax_holds {
            self.fetch(host::RAX, guest);
        }
        if let Some(guest) = rcx_holds {
            self.fetch(host::RCX, guest);
        }
        let accesses = self.mode.is_direct() && memory.is_some();
        let fault = (classify::may_fault(ins) || accesses).then(|| {
            let flags_in_host = self.flags != Flags::Slot;
            let residents = self.residents_here();
            self.site(SiteKind::Fault { flags_in_host, borrowed: Borrowed::default(), residents }, self.unretired())
        });
        self.encode(ins, &out);
        if let Some(site) = fault {
            self.faults.push((self.last_native as u32, site));
        }
        if let Some(guest) = rax_holds {
            self.a.mov(HOME[guest as usize].expect("RAX and RCX have homes"), host::RAX);
        }
        if let Some(guest) = rcx_holds {
            self.a.mov(HOME[guest as usize].expect("RAX and RCX have homes"), host::RCX);
        }
        if use_of.flags_out {
            (self.flags, self.source) = (Flags::Host, None);
        }
    }
}

/// Bytes of the addresses that the memory operand is computed in.
fn address_size(ins: &Instruction) -> usize {
    let register = if ins.memory_base() != Register::None { ins.memory_base() } else { ins.memory_index() };
    match register {
        Register::None => ins.memory_displ_size() as usize,
        Register::EIP => 4,
        register => register.size(),
    }
}

/// Scratch registers during one instruction.
struct Scratch {
    rax: bool,
    rcx: bool,
    /// Registers that the instruction uses, as a bit mask.
    taken: u32,
    borrowed: [u8; 3],
    borrowed_count: usize,
}

impl Scratch {
    fn is_free(&self, register: u8) -> bool {
        register == host::RAX && self.rax || register == host::RCX && self.rcx
    }

    /// RAX or RCX has a use now.
    fn use_up(&mut self, register: u8) {
        self.rax &= register != host::RAX;
        self.rcx &= register != host::RCX;
    }
}

/// What one instruction reads and writes, as far as the translator cares.
struct Use {
    /// The memory operand and how it is accessed.
    memory: Option<(u32, OpAccess)>,
    access: [OpAccess; 5],
    /// General-purpose registers used in any way, as a bit mask.
    gprs: u32,
    /// General-purpose registers read, as a bit mask.
    gprs_read: u32,
    writes_rax: bool,
    writes_rcx: bool,
    flags_out: bool,
}

impl Use {
    fn of(info: &InstructionInfo, ins: &Instruction) -> Use {
        let mut access = [OpAccess::None; 5];
        let mut memory = None;
        for i in 0..ins.op_count() {
            access[i as usize] = info.op_access(i);
            if ins.op_kind(i) == OpKind::Memory {
                memory = Some((i, info.op_access(i)));
            }
        }
        let (mut gprs, mut gprs_read, mut written) = (0, 0, 0);
        for used in info.used_registers() {
            if let Some(number) = gpr_number(used.register()) {
                gprs |= 1 << number;
                if reads(used.access()) {
                    gprs_read |= 1 << number;
                }
                if writes(used.access()) {
                    written |= 1 << number;
                }
            }
        }
        let mut modified = ins.rflags_modified() & STATUS;
        if classify::rotates_through_carry(ins) {
            // By whole turns it leaves the value alone, but not OF.
            modified |= RflagsBits::OF | RflagsBits::CF;
        }
        Use {
            memory,
            access,
            gprs,
            gprs_read,
            writes_rax: written & 1 != 0,
            writes_rcx: written & 2 != 0,
            flags_out: modified != 0,
        }
    }

    fn reads_gpr(&self, guest: u8) -> bool {
        self.gprs_read & 1 << guest != 0
    }
}

/// What gives the flags that `out` gives, the renamed form of `ins`, again behind it.
fn source(ins: &Instruction, out: &Instruction, homes: &Homes) -> Option<Source> {
    use Mnemonic::{And, Cmp, Or, Test, Xor};
    let mut repeated = *out;
    match ins.mnemonic() {
        Cmp | Test => {}
        // Their results give the same flags again.
        And | Or | Xor if out.op0_kind() == OpKind::Register && matches!(out.op0_register().size(), 4 | 8) => {
            let code = if out.op0_register().size() == 8 { Code::Test_rm64_r64 } else { Code::Test_rm32_r32 };
            repeated = Instruction::with2(code, out.op0_register(), out.op0_register()).ok()?;
        }
        _ => return None,
    }
    let mut reads = 0;
    for i in 0..repeated.op_count() {
        match repeated.op_kind(i) {
            OpKind::Register => {
                let home = gpr_number(repeated.op_register(i))?;
                // RAX and RCX are the translator's own.
                reads |= 1 << homes.iter().position(|place| *place == Some(home))?;
            }
            // A register that lives in the vCPU block.
            OpKind::Memory if ins.op_kind(i) == OpKind::Register || repeated.segment_prefix() == Register::GS => {
                reads |= (0..16).filter(|guest| homes[*guest].is_none()).fold(0, |mask, guest| mask | 1 << guest);
            }
            OpKind::Memory => return None,
            _ => {}
        }
    }
    Some(Source { instruction: repeated, reads })
}

/// The destination may stay as it was although it counts as written.
fn conditional_result(ins: &Instruction) -> bool {
    matches!(ins.mnemonic(), Mnemonic::Bsf | Mnemonic::Bsr)
}

/// Makes a host address the memory operand.
pub(super) fn set_memory(out: &mut Instruction, at: Operand) {
    out.set_segment_prefix(Register::None);
    out.set_memory_base(Register::RAX + at.base as u32);
    out.set_memory_index(at.index.map_or(Register::None, |index| Register::RAX + index as u32));
    out.set_memory_index_scale(u32::from(at.scale));
    out.set_memory_displacement64(at.disp as i64 as u64);
    out.set_memory_displ_size(match at.disp {
        0 => 0,
        disp if disp as i8 as i32 == disp => 1,
        _ => 8,
    });
}
