//! Translates one block: decodes guest instructions up to the next branch and emits the same instructions with
//! renamed registers and replaced memory operands, an instruction budget in front and links behind.
//!
//! Invariants of emitted code: at every block boundary the guest's status flags are in the vCPU block's slot, RAX
//! and RCX are free, all other guest registers are at home (`registers`). At every site that can leave in the
//! middle of a block the state is that before the instruction, so that it can be executed again.

mod branches;
mod decode;
mod fading;
mod instructions;
mod memory;
mod places;
mod plain;
mod status;
mod strings;

pub use decode::{Elsewhere, Lacks, OtherPage, PARTS_MAX};
pub(super) use memory::set_memory;
pub(super) use status::Flags;

use decode::{Crossing, Path};
use memory::{Wanted, address_size};
use places::{Holds, ScratchRegisters};
use status::{Overflow, Source};

use super::archive::Relocation;
use super::assembler::{Assembler, Operand, POINTER, cc, host, op};
use super::block::{Class, JUMP_CODE, JUMP_ENTRIES, JumpEntry, WINDOW_SPANS, field, window_of};
use super::classify::{self, Treatment};
use super::flags::{self, Need, STATUS};
use super::groups::{Member, Plan, Registers, Which, needs_pointer, reads, writes};
use super::homeless;
use super::mode::Mode;
use super::profile::{COUNTED, Guide, HEAT_STEP, Ways};
use super::registers::{BORROWABLE, HOME, Homes, gpr_number, is_high_byte, sized};
use super::residents::{self, Free, Residents};
use super::threads::{self, Piece};
use super::thunks::Thunks;
use super::undefined::{self, Undefined};
use crate::memory::PAGE_SIZE;
use crate::state::{gpr, rflags, seg};
use iced_x86::{
    Code, Decoder, DecoderError, DecoderOptions, Encoder, Instruction, InstructionInfo, InstructionInfoFactory,
    Mnemonic, OpAccess, OpKind, Register, RflagsBits,
};
use serde::{Deserialize, Serialize};

/// What an address of code is multiplied by, to have that of its entry in the jump cache.
const JUMP_SCALE: u8 = (size_of::<JumpEntry>() / JUMP_CODE) as u8;
/// Longest block, in instructions. The budget's immediate is one byte.
pub const MAX_INSTRUCTIONS: u32 = 64;

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
    /// A direct branch whose rel32 at `patch` may be led to the target's translation. `depth` is where RSP is then, from
    /// where it was when the block began, if that is known.
    Link { target: u64, patch: u32, depth: Option<i16> },
    /// An indirect branch missed the jump cache. `popped` has been added to RSP.
    Indirect { popped: i32 },
    /// The budget does not cover the block.
    Budget,
    /// The block has run so often that it is worth another translation.
    Hot,
    /// The block reaches beyond the stack window. The rel32 at `patch` may be led to a translation without it.
    Window { patch: u32 },
    /// The range of a group of accesses crosses a page. The rel32 at `patch` may be led to a translation without groups.
    Crossing { patch: u32 },
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
    /// Guest code: the page, or what is from RIP on across its end.
    pub code: &'a [u8],
    /// Where in `code` RIP is.
    pub at: usize,
    pub mode: Mode,
    pub max_instructions: u32,
    /// Every memory access goes to Rust first.
    pub careful: bool,
    /// Nearby accesses share a translation.
    pub grouping: bool,
    /// Accesses near RSP go through the stack window.
    pub window: bool,
    /// The block runs often: it goes on where its branches usually lead.
    pub hot: Option<Ways<'a>>,
    /// The block says when it runs often, if it could be longer.
    pub heats: bool,
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
    /// What is known of other pages.
    pub others: &'a [OtherPage<'a>],
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
    /// Guest bytes from RIP on that were translated.
    pub guest_len: u32,
    /// Guest bytes before RIP that were translated.
    pub guest_before: u32,
    /// Bytes of other pages were translated, too.
    pub spreads: bool,
}

/// A piece of out-of-line code at the end of the block.
pub(super) enum Cold {
    /// `patch` leads here: recover the address and take the slow path.
    Memory { patch: u32, miss: Miss },
    /// `patch` leads here if a piece of a thread window is not known: ask for it, or translate the range of the group, which
    /// begins `start` from where the register points, and go back with the host address of that.
    Thread { patch: u32, back: u64, piece: Piece, write: bool, start: i32, span: u16, miss: Miss },
    /// `patch` leads here: take the slow path with an address that is known.
    Constant { patch: u32, site: u32, address: u64, source: Option<Source> },
    /// `patch` leads here: leave with the site.
    Leave { patch: u32, site: u32 },
    /// `patch` leads here when a branch in the middle of the block is taken: save the flags if need be, give back
    /// what the budget was charged for the rest of the block, and go to the target.
    Side { patch: u32, side: Side },
    /// `patch` leads here when the stack window does not cover the block.
    Window { patch: u32 },
    /// `patch` leads here when a return in the middle of the block goes elsewhere, to the address in RCX: save the flags
    /// if need be, give back what the budget was charged for the rest of the block, and go there.
    Return { patch: u32, site: u32, source: Option<Source>, unretired: u32 },
    /// `patch` leads here from a call that missed the jump cache: push the return address, unless the target is not
    /// canonical, and leave with the site and the next RIP, which is in RCX.
    Call { patch: u32, site: u32, back: u32 },
    /// `patch` leads here: leave with the site and the next RIP, which is in RCX.
    Indirect { patch: u32, site: u32 },
}

/// An access that missed the TLB. If it is the range of a group, at this instruction, and crosses a page, the budget gets
/// back what it was charged, and the block goes on without groups.
pub(super) struct Miss {
    site: u32,
    tags: u32,
    source: Option<Source>,
    group: Option<(u64, u32)>,
    wanted: Wanted,
}

/// A branch out of the middle of a block.
pub(super) struct Side {
    target: u64,
    ip: u64,
    save_flags: Option<Overflow>,
    /// What gives the flags if they are nowhere.
    source: Option<Source>,
    unretired: u32,
    depth: Option<i16>,
    /// Where it is counted.
    counter: Option<u32>,
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
    /// What the block consists of besides bytes of its own page.
    pub elsewhere: Vec<Elsewhere>,
    crossings: Vec<Crossing>,
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
    /// Only cold code will look at the flags of the current instruction when they have left the host, and by then these
    /// registers, of those that it reads, have other values, as a bit mask.
    fades: Option<u32>,
    /// Of the flags that the current instruction leaves, only ZF is the guest's; the others stay as they are.
    mends_flags: bool,
    isolated: bool,
    /// The next of the branches whose ways are counted.
    counting: Option<usize>,
    start: u64,
    block: u32,
    tlb_mask: u32,
    count: u32,
    index: u32,
    position: usize,
    /// Address of the instruction that follows in the block.
    follower: Option<u64>,
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
            elsewhere: Vec::new(),
            crossings: Vec::new(),
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
            fades: None,
            mends_flags: false,
            isolated: false,
            counting: None,
            start: 0,
            block: 0,
            tlb_mask: 0,
            count: 0,
            index: 0,
            position: 0,
            follower: None,
            ip: 0,
            last_native: 0,
        }
    }

    /// Translates the block at `request.rip` into `self.a`, to be placed at offset `origin` of the code memory.
    pub fn translate(&mut self, request: &Request, origin: u32) -> Result<Placed, Lacks> {
        let path = self.decode_and_plan(request)?;
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
        (self.start, self.ip) = (request.rip, request.rip);
        self.a.start(origin as u64);
        let plan = &self.plan;
        let crossings = std::mem::take(&mut self.crossings);
        let crosses = |i: usize| crossings.iter().enumerate().find(|(_, crossing)| crossing.position == i);
        let stays = |i: usize| {
            !request.mode.is_direct() && crosses(i).is_none() && flags::stays(&list[i], plan.stays(i, list[i].1))
        };
        flags::needs(&list, stays, &mut self.needs);

        let settles = !request.careful && !request.isolated;
        let fading = settles && request.hot.is_some() && !request.mode.is_direct();
        self.residents = if settles && request.mode.is_64bit() {
            let free = Free { distance: self.plan.window.is_none(), budget: !request.mode.is_direct() };
            let spared = |i| self.plan.spared(i);
            residents::choose(&list, &mut self.info, free, request.resident_uses, spared)
        } else {
            Residents::default()
        };

        let Path { guest_before, guest_len, next, could_be_better } = path;
        self.counting = (request.heats && request.hot.is_none() && could_be_better).then_some(0);
        let mut placed = Placed {
            checked: origin,
            guest_len,
            guest_before,
            spreads: !self.elsewhere.is_empty(),
            ..Placed::default()
        };
        let lookup = self.site(SiteKind::Lookup, 0);
        self.check_page(request.rip >> 12, request.page_identity, lookup);
        placed.entry = self.a.here() as u32;
        if let Some((vpage, identity)) = request.second_page {
            self.check_page(vpage, identity, lookup);
        }
        placed.window = self.check_window();
        placed.inner = self.a.here() as u32;
        if self.count > 0 {
            self.a.sub_imm(host::BUDGET, self.count as i32);
            let site = self.site(SiteKind::Budget, self.count);
            self.leave_if(cc::S, site);
            if self.counting.is_some() {
                self.a.add_field16(field::runs(request.rip), HEAT_STEP);
                let site = self.site(SiteKind::Hot, self.count);
                self.leave_if(cc::C, site);
            }
        } else {
            // Room for the jump that invalidation writes over the entry.
            self.a.put(&[0x0F, 0x1F, 0x44, 0x00, 0x00]);
        }
        self.settle_in();

        for (position, (ins, treatment)) in list.iter().enumerate() {
            self.position = position;
            self.ip = ins.ip();
            if let Some((number, crossing)) = crosses(position) {
                self.cross(number, crossing);
            }
            self.mends_flags = request.undefined.mends(ins) && self.live_behind() & !RflagsBits::ZF != 0;
            self.fades = match fading {
                true => self.fade(&list, position, |at| crosses(at).is_some()),
                false => None,
            };
            if treatment.ends_block() && position + 1 == list.len() {
                self.move_out();
            }
            self.keep_source(ins, *treatment);
            self.forget_threads(ins);
            self.follower = list.get(position + 1).map(|(follower, _)| follower.ip());
            self.instruction(ins, *treatment);
            self.index += 1;
        }
        if !list.last().is_some_and(|(_, t)| t.ends_block()) {
            self.move_out();
            self.save_flags();
            self.link(next);
        }
        self.instructions = list;
        self.instructions.clear();
        self.crossings = crossings;

        placed.lookup_stub = self.a.here() as u32;
        self.leave(lookup);
        for (number, cold) in std::mem::take(&mut self.cold).into_iter().enumerate() {
            let inhabited = self.inhabited.contains(&number);
            match cold {
                Cold::Memory { patch, miss } => {
                    self.a.land(patch);
                    self.missed(miss, inhabited);
                }
                Cold::Thread { patch, back, piece, write, start, span, miss } => {
                    self.a.land(patch);
                    let after = self.a.lea_rcx_rip();
                    let thunk = *piece.thunk(&mut self.thunks.threads, write);
                    self.jump_away(thunk);
                    self.a.land(after);
                    self.a.jcc(cc::AE, back);
                    // A resident is here, too: the block does not write it.
                    self.a.load_field(host::RCX, field::homeless(piece.guest()));
                    self.a.lea(true, host::RCX, Some(host::RCX), None, start);
                    let missed = self.compare_tag(span.into(), miss.tags);
                    self.add_distance();
                    let translated = self.a.here();
                    self.resume_at(miss.site, translated);
                    self.a.lea(true, host::RCX, Some(host::RCX), None, -start);
                    self.a.jmp(back);
                    self.a.land(missed);
                    self.missed(miss, inhabited);
                }
                Cold::Constant { patch, site, address, source } => {
                    self.a.land(patch);
                    self.settle(source);
                    self.a.mov_imm(host::RCX, address);
                    self.slow_access(site, inhabited, Wanted::Host);
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
                    self.a.store_field(host::RCX, field::RIP);
                    self.leave(site);
                }
                Cold::Indirect { patch, site } => {
                    self.a.land(patch);
                    self.a.store_field(host::RCX, field::RIP);
                    self.leave(site);
                }
                Cold::Window { patch } => {
                    self.a.land(patch);
                    let after = self.a.lea_rcx_rip();
                    self.jump_away(self.thunks.window[window_of(self.mode.class() as usize)]);
                    self.a.land(after);
                    self.a.jcc(cc::C, placed.entry as u64);
                    self.a.decrement_field32(field::WINDOW_PATIENCE);
                    let impatient = self.a.jcc(cc::S, 0);
                    let jump = self.a.jmp(0);
                    self.ip = request.rip;
                    let site = self.site(SiteKind::Window { patch: self.a.origin as u32 + jump }, 0);
                    self.a.land(impatient);
                    self.a.land(jump);
                    self.leave(site);
                }
                Cold::Return { patch, site, source, unretired } => {
                    self.a.land(patch);
                    self.settle(source);
                    if inhabited {
                        self.emit_move_out();
                    }
                    self.a.lea(true, host::BUDGET, Some(host::BUDGET), None, unretired as i32);
                    self.look_up_jump();
                    let missed = self.a.jcc(cc::NE, 0);
                    self.a.jmp_field_index_rax(JUMP_SCALE, field::jump_host(self.mode.class()));
                    self.a.land(missed);
                    self.a.store_field(host::RCX, field::RIP);
                    self.leave(site);
                }
                Cold::Side { patch, side: Side { target, ip, save_flags, source, unretired, depth, counter } } => {
                    self.a.land(patch);
                    self.settle(source);
                    if let Some(overflow) = save_flags {
                        self.store_flags(overflow);
                    }
                    if let Some(counter) = counter {
                        self.a.add_field16(counter, 1);
                    }
                    let kind = |patch| SiteKind::Link { target, patch, depth };
                    self.leave_early(inhabited, ip, unretired, kind);
                }
            }
        }
        Ok(placed)
    }

    /// Leaves in the middle of the block, at `ip`: gives back what the budget was charged for the rest, and goes where
    /// the rel32 that `kind` is told of leads, which is the exit at first.
    fn leave_early(&mut self, inhabited: bool, ip: u64, unretired: u32, kind: impl FnOnce(u32) -> SiteKind) {
        if inhabited {
            self.emit_move_out();
        }
        if unretired > 0 {
            self.a.lea(true, host::BUDGET, Some(host::BUDGET), None, unretired as i32);
        }
        let jump = self.a.jmp(0);
        self.ip = ip;
        let site = self.site(kind(self.a.origin as u32 + jump), 0);
        self.a.land(jump);
        self.leave(site);
    }

    /// Behind a comparison with a tag that failed.
    fn missed(&mut self, miss: Miss, inhabited: bool) {
        let Miss { site, tags, source, group, wanted } = miss;
        let offset = if wanted == Wanted::Host { host::RAX } else { host::RCX };
        if let Some((ip, unretired)) = group {
            self.a.cmp_imm(offset, 0xFFF);
            let missed = self.a.jcc(cc::A, 0);
            self.settle(source);
            self.leave_early(inhabited, ip, unretired, |patch| SiteKind::Crossing { patch });
            self.a.land(missed);
        }
        if wanted == Wanted::Distance {
            self.a.field_index_op(op::XOR, host::RCX, host::RAX, 8, tags);
        }
        self.settle(source);
        self.slow_access(site, inhabited, wanted);
    }

    /// The slow path of a memory access, whose address is in RCX.
    fn slow_access(&mut self, site: u32, inhabited: bool, wanted: Wanted) {
        if inhabited {
            self.emit_move_out();
        }
        self.site_in_rax(site);
        self.jump_away(self.thunks.memory);
        let settles = inhabited && self.residents != Residents::default();
        if !settles && wanted == Wanted::Host {
            return;
        }
        let here = self.a.here();
        let behind = self.resume_at(site, here);
        if wanted == Wanted::Distance {
            self.a.field_op(true, op::SUB, host::RCX, field::SLOW_ADDRESS);
        }
        if settles {
            self.emit_settle_in();
        }
        self.a.jmp(u64::from(behind));
    }

    /// Before an instruction: it may write a register that has a thread window.
    fn forget_threads(&mut self, ins: &Instruction) {
        if self.mode.class() == Class::User && !self.mode.is_direct() {
            for (register, written) in threads::written(ins, &mut self.info).into_iter().enumerate() {
                if written {
                    self.a.clear_field8(field::threads_known(register));
                }
            }
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

    pub(super) fn site(&mut self, kind: SiteKind, unretired: u32) -> u32 {
        self.sites.push(Site { kind, rip: self.ip, unretired, block: self.block });
        self.first_site + self.sites.len() as u32 - 1
    }

    pub(in crate::engine) fn emulation_site(&mut self, ins: &Instruction, unretired: u32) -> u32 {
        let instruction = self.first_emulated + self.emulated.len() as u32;
        self.emulated.push(*ins);
        self.site(SiteKind::Emulate { instruction }, unretired)
    }

    /// Leaves with the site if the condition holds; the flags are in the slot then.
    pub(in crate::engine) fn leave_if(&mut self, condition: u8, site: u32) {
        let patch = self.a.jcc(condition, 0);
        self.cold.push(Cold::Leave { patch, site });
    }

    /// Instructions from the current one to the end of the block.
    pub(super) fn unretired(&self) -> u32 {
        self.count - self.index
    }

    fn check_page(&mut self, vpage: u64, identity: u32, lookup: u32) {
        self.a.cmp_field_imm32(field::itlb(self.mode.class(), vpage), identity);
        self.relocations.push(Relocation::Identity(self.a.offset() - 4));
        self.leave_if(cc::NE, lookup);
    }

    /// Leaves if the stack window does not cover all that the block reaches through it.
    fn check_window(&mut self) -> Option<(i16, i16)> {
        let (min, max) = self.plan.window?;
        let span = WINDOW_SPANS.iter().position(|span| max - min <= *span).expect("the plan keeps to the widest span");
        let class = self.mode.class();
        self.a.lea(true, host::RCX, Some(host::RSP), None, min);
        self.a.field_op(true, op::SUB, host::RCX, field::window_low(class));
        self.a.field_op(true, op::CMP, host::RCX, field::window_places(class, span));
        let patch = self.a.jcc(cc::AE, 0);
        self.cold.push(Cold::Window { patch });
        Some((min as i16, (min + WINDOW_SPANS[span]) as i16))
    }

    /// Emits `out`, the renamed form of `ins`. Where the encoder has no form for it, the block leaves to the
    /// emulation, which will say what is missing: False, and what is emitted behind it is never executed.
    pub(super) fn encode(&mut self, ins: &Instruction, out: &Instruction) -> bool {
        let encoded = self.emit(out).is_ok();
        if !encoded {
            self.save_flags();
            let site = self.emulation_site(ins, self.unretired());
            let patch = self.a.jmp(0);
            self.cold.push(Cold::Leave { patch, site });
        }
        encoded
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
}

#[cfg(test)]
impl Translator {
    /// One whose doors lead nowhere, to look at what it emits.
    pub(super) fn alone() -> Translator {
        let mut a = Assembler::default();
        a.start(0);
        Translator::new(super::thunks::emit(&mut a, 0xFFF))
    }
}

#[cfg(test)]
impl<'a> Request<'a> {
    /// An ordinary block of 64-bit supervisor code.
    pub(super) fn ordinary(code: &'a [u8]) -> Request<'a> {
        Request {
            rip: 0x40_1000,
            code,
            at: 0,
            mode: Mode::of(&crate::state::CpuState::long_mode_boot(0, 0, 0, 0, 0, 0)),
            max_instructions: MAX_INSTRUCTIONS,
            careful: false,
            grouping: true,
            resident_uses: residents::WORTH_IT,
            window: true,
            hot: None,
            heats: true,
            isolated: false,
            undefined: Undefined::NONE,
            block: 0,
            first_site: 0,
            first_emulated: 0,
            page_identity: 0,
            second_page: None,
            others: &[],
            tlb_mask: 0xFFF,
            cuts: &[],
        }
    }
}
