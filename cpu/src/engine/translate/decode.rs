//! Which instructions a block consists of: what follows the first one in its page and, if the block runs often, what its
//! branches, jumps and calls lead to.

use super::*;

/// Forward branches that a block goes on behind, as if they were not taken.
const SIDE_BRANCHES_MAX: usize = COUNTED - 1;

/// Branches that a hot block goes on behind.
const HOT_SIDE_BRANCHES_MAX: usize = 12;

/// How often a hot block holds an instruction, if a loop is unrolled.
const UNROLLED_MAX: usize = 4;

/// Most bytes of each page that a hot block reaches over. All of them count as its code.
const REACH_MAX: usize = 1024;

/// What a block's instructions were decoded from.
pub(super) struct Path {
    pub(super) guest_before: u32,
    pub(super) guest_len: u32,
    /// Address behind the last of them.
    pub(super) next: u64,
    /// If the block were hot it could be another.
    pub(super) could_be_better: bool,
}

/// What must be known for a translation, besides what the request says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lacks {
    /// The first instruction does not end within the bytes given.
    Bytes,
    /// The block could go on in this linear page, for which there is no [`OtherPage`].
    Page(u64),
}

/// A page that a hot block may go on in.
#[derive(Clone, Copy, Debug)]
pub struct OtherPage<'a> {
    pub vpage: u64,
    /// Its identity, where it is in RAM, and what is in it, if the instruction TLB has it.
    pub code: Option<(u32, u32, &'a [u8])>,
}

/// What a block was translated from in another page than its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Elsewhere {
    pub vpage: u64,
    pub page: u32,
    pub first: u16,
    pub len: u16,
}

/// In front of the instruction with this number the block enters another page, and must look whether that is still the
/// page that it was translated from.
#[derive(Clone, Copy)]
pub(super) struct Crossing {
    pub(super) position: usize,
    pub(super) vpage: u64,
    pub(super) identity: u32,
}

/// Most pages that a block consists of.
pub const PARTS_MAX: usize = 4;

/// A piece of a page that a block was decoded from.
struct Part<'a> {
    vpage: u64,
    identity: u32,
    page: u32,
    code: &'a [u8],
    /// Linear address of the first byte of `code`.
    base: u64,
    /// First byte decoded, and one past the last.
    low: usize,
    high: usize,
}

/// A way through guest code.
struct Walk<'a> {
    decoder: Decoder<'a>,
    parts: Vec<Part<'a>>,
    /// The part that the decoder is in.
    now: usize,
    guide: Option<Guide<'a>>,
    /// A hot block would have gone on.
    longer: bool,
}

impl<'a> Walk<'a> {
    fn new(request: &Request<'a>) -> Walk<'a> {
        let mut decoder = Decoder::new(request.mode.bitness(), request.code, DecoderOptions::NONE);
        decoder.set_ip(request.rip);
        decoder.set_position(request.at).expect("RIP is in the code");
        let own = Part {
            vpage: request.rip >> 12,
            identity: request.page_identity,
            page: 0,
            code: request.code,
            base: request.rip.wrapping_sub(request.at as u64),
            low: request.at,
            high: request.at,
        };
        let guide = request.hot.map(|ways| Guide::new(ways, request.rip));
        Walk { decoder, parts: vec![own], now: 0, guide, longer: false }
    }

    /// Notes that an instruction which began at `at` belongs to the block. Linear page and identity if it is the first
    /// one in another page.
    fn read(&mut self, at: usize) -> Option<(u64, u32)> {
        let part = &mut self.parts[self.now];
        let enters = part.high == part.low && self.now > 0;
        if part.high == part.low {
            part.low = at;
        }
        (part.low, part.high) = (part.low.min(at), part.high.max(self.decoder.position()));
        enters.then_some((part.vpage, part.identity))
    }

    /// What the guide knows of a conditional branch.
    fn usually(&mut self, ins: &Instruction) -> Option<bool> {
        self.guide.as_mut()?.usually(ins.next_ip())
    }

    /// Goes to `target`, if the block is hot, and that is not far from what else it has in the page.
    fn follow(&mut self, target: u64, request: &Request<'a>) -> Result<bool, Lacks> {
        let offset = |part: &Part| target.wrapping_sub(part.base);
        let known = self.parts.iter().position(|part| offset(part) < part.code.len() as u64);
        if request.hot.is_none() {
            self.longer |= known.is_none_or(|part| self.parts[part].reaches(offset(&self.parts[part]) as usize));
            return Ok(false);
        }
        let index = match known {
            Some(index) => index,
            None if self.parts.len() == PARTS_MAX || request.mode.is_direct() => return Ok(false),
            None => {
                let vpage = target >> 12;
                let other = request.others.iter().find(|other| other.vpage == vpage).ok_or(Lacks::Page(vpage))?;
                let Some((identity, page, code)) = other.code else { return Ok(false) };
                self.parts.push(Part { vpage, identity, page, code, base: vpage << 12, low: 0, high: 0 });
                self.parts.len() - 1
            }
        };
        let part = &self.parts[index];
        let to = offset(part) as usize;
        if !part.reaches(to) {
            return Ok(false);
        }
        if index != self.now {
            self.decoder = Decoder::new(request.mode.bitness(), part.code, DecoderOptions::NONE);
            self.now = index;
        }
        self.decoder.set_ip(target);
        self.decoder.set_position(to).expect("it is in the code");
        self.guide.iter_mut().for_each(|guide| guide.enter(target));
        Ok(true)
    }
}

impl Part<'_> {
    /// The block may have bytes at offset `at` as well.
    fn reaches(&self, at: usize) -> bool {
        self.high == self.low || self.high.max(at) - self.low.min(at) <= REACH_MAX
    }
}

/// Widest reach from RSP of a block that follows calls: what reaches farther often lies in two pages, and stacks may be
/// as small as a page.
const FOLLOWING_REACH_MAX: i32 = 256;

impl Translator {
    /// Decodes the block into `self.instructions`, and makes the plan for it.
    pub(super) fn decode_and_plan(&mut self, request: &Request) -> Result<Path, Lacks> {
        let path = self.decode(request, !request.mode.is_direct())?;
        self.make_plan(request);
        let follows_calls = self.instructions.iter().any(|(_, treatment)| *treatment == Treatment::FollowedCall);
        if !follows_calls || self.plan.window.is_none_or(|(min, max)| max - min <= FOLLOWING_REACH_MAX) {
            return Ok(path);
        }
        let path = self.decode(request, false)?;
        self.make_plan(request);
        Ok(path)
    }

    fn make_plan(&mut self, request: &Request) {
        let use_window = request.window && !request.isolated;
        if (request.grouping || use_window) && !request.careful && request.mode.is_64bit() {
            let use_threads = request.hot.is_some() && request.mode.class() == Class::User && !request.mode.is_direct();
            self.plan.make(&self.instructions, &mut self.info, use_window, request.grouping, use_threads);
        } else {
            self.plan.clear();
        }
    }

    /// Decodes the block into `self.instructions`. Behind forward branches it goes on as if they were not taken. A hot
    /// block goes where its branches usually lead, and follows jumps, calls, and returns from these, also to other pages.
    fn decode(&mut self, request: &Request, follows_calls: bool) -> Result<Path, Lacks> {
        self.instructions.clear();
        self.crossings.clear();
        let follows = request.mode.is_64bit() && !request.isolated && request.second_page.is_none();
        let mut walk = Walk::new(request);
        let hot = request.hot.is_some();
        let side_branches_max = if hot { HOT_SIDE_BRANCHES_MAX } else { SIDE_BRANCHES_MAX };
        let mut side_branches = 0;
        // Where calls that were followed come back to.
        let mut calls = Vec::new();
        let mut branches = false;
        let mut undefined = false;
        let most = request.max_instructions.min(MAX_INSTRUCTIONS) as usize;
        while self.instructions.len() < most {
            if hot && self.ends_loop(walk.decoder.ip(), most) {
                break;
            }
            if !self.instructions.is_empty() && request.cuts.binary_search(&walk.decoder.ip()).is_ok() {
                break;
            }
            let (ip, at) = (walk.decoder.ip(), walk.decoder.position());
            let mut ins = Instruction::default();
            walk.decoder.decode_out(&mut ins);
            if ins.is_invalid() && walk.decoder.last_error() == DecoderError::NoMoreBytes {
                if self.instructions.is_empty() && request.second_page.is_none() {
                    return Err(Lacks::Bytes);
                }
                if !self.instructions.is_empty() {
                    walk.decoder.set_ip(ip);
                    break;
                }
            }
            let treatment = match classify::treatment(&ins, request.mode) {
                Treatment::RepeatedMove if request.careful || request.isolated => Treatment::Emulate,
                treatment => treatment,
            };
            if let Some((_, last)) = self.instructions.last_mut()
                && *last == Treatment::SetInterrupt
                && matches!(treatment, Treatment::Emulate | Treatment::ReadTsc | Treatment::RepeatedMove)
            {
                // Between STI and this one the run may stop: STI must leave its shadow in the state.
                *last = Treatment::Emulate;
                break;
            }
            if undefined && !undefined::hides(&ins, treatment) {
                break;
            }
            undefined = treatment == Treatment::Plain && request.undefined.emulates(&ins);
            if let Some((vpage, identity)) = walk.read(at) {
                self.crossings.push(Crossing { position: self.instructions.len(), vpage, identity });
            }
            let target = ins.near_branch_target();
            let mut followed = false;
            let wanted = match treatment {
                Treatment::Jump => Some(target),
                Treatment::Branch if side_branches < side_branches_max => {
                    // Loops go on.
                    let taken = walk.usually(&ins).unwrap_or(target <= ins.ip());
                    followed = follows && !taken;
                    taken.then_some(target)
                }
                Treatment::Call if follows_calls => Some(target),
                Treatment::Return if ins.op_count() == 0 => calls.last().copied(),
                _ => None,
            };
            if let Some(target) = wanted.filter(|_| follows) {
                followed = walk.follow(target, request)?;
            }
            let treatment = match treatment {
                Treatment::Jump if followed => Treatment::Nothing,
                Treatment::Call if followed => {
                    calls.push(ins.next_ip());
                    Treatment::FollowedCall
                }
                Treatment::Return if followed => {
                    calls.pop();
                    Treatment::FollowedReturn
                }
                treatment => treatment,
            };
            side_branches += (treatment == Treatment::Branch && followed) as usize;
            branches |= treatment == Treatment::Branch;
            self.instructions.push((ins, treatment));
            if !followed && treatment.ends_block() || request.second_page.is_some() {
                break;
            }
        }
        let mut next = walk.decoder.ip();
        if undefined && let [.., (before, Treatment::SetInterrupt), _] = self.instructions.as_slice() {
            // As above, for one that is emulated because nothing followed it.
            next = before.next_ip();
            self.instructions.pop();
        }
        if let Some((_, last)) = self.instructions.last_mut() {
            *last = match *last {
                Treatment::FollowedCall => Treatment::Call,
                Treatment::FollowedReturn => Treatment::Return,
                last if last == Treatment::SetInterrupt || undefined => Treatment::Emulate,
                last => last,
            };
        }
        let first = &walk.parts[0];
        self.elsewhere.clear();
        self.elsewhere.extend(walk.parts[1..].iter().filter(|part| part.high > part.low).map(|part| Elsewhere {
            vpage: part.vpage,
            page: part.page,
            first: part.low as u16,
            len: (part.high - part.low) as u16,
        }));
        Ok(Path {
            guest_before: (request.at - first.low) as u32,
            guest_len: (first.high - request.at) as u32,
            next,
            could_be_better: branches || walk.longer,
        })
    }

    /// The instructions decoded so far come to a loop's end, and another turn has no place in the block.
    fn ends_loop(&self, ip: u64, most: usize) -> bool {
        let mut turns = self.instructions.iter().enumerate().rev().filter(|(_, (earlier, _))| earlier.ip() == ip);
        let Some((last, _)) = turns.next() else { return false };
        let length = self.instructions.len();
        turns.count() + 1 >= UNROLLED_MAX || length + (length - last) > most
    }
}
