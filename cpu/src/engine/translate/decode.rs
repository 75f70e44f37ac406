//! Which instructions a block consists of: what follows the first one in its page and, if the block runs often, what its
//! jumps, backward branches and calls lead to.

use super::*;

/// Forward branches that a block goes on behind, as if they were not taken.
const SIDE_BRANCHES_MAX: usize = COUNTED - 1;

/// Branches that a hot block goes on behind.
const HOT_SIDE_BRANCHES_MAX: usize = 12;

/// How often a hot block holds an instruction, if a loop is unrolled.
const UNROLLED_MAX: usize = 4;

/// Most bytes of a page that a hot block reaches over. All of them count as its code.
const REACH_MAX: usize = 1024;

/// What a block's instructions were decoded from.
pub(super) struct Path {
    pub(super) guest_before: u32,
    pub(super) guest_len: u32,
    /// Address behind the last of them.
    pub(super) next: u64,
    /// The block has conditional branches.
    pub(super) branches: bool,
    /// If it were hot it would go on.
    pub(super) longer: bool,
}

/// The first instruction does not end within the bytes given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeedsMoreBytes;

/// Widest reach from RSP of a block that follows calls: what reaches farther often lies in two pages, and stacks may be
/// as small as a page.
const FOLLOWING_REACH_MAX: i32 = 256;

impl Translator {
    /// Decodes the block into `self.instructions`, and makes the plan for it.
    pub(super) fn decode_and_plan(&mut self, request: &Request) -> Result<Path, NeedsMoreBytes> {
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
            self.plan.make(&self.instructions, &mut self.info, use_window, request.grouping);
        } else {
            self.plan.clear();
        }
    }

    /// Decodes the block into `self.instructions`. Behind forward branches it goes on as if they were not taken. A hot
    /// block goes where its branches usually lead, if that is not far, and follows jumps, calls, and returns from these
    /// likewise.
    fn decode(&mut self, request: &Request, follows_calls: bool) -> Result<Path, NeedsMoreBytes> {
        self.instructions.clear();
        let mut decoder = Decoder::new(request.mode.bitness(), request.code, DecoderOptions::NONE);
        decoder.set_ip(request.rip);
        decoder.set_position(request.at).expect("RIP is in the code");
        let follows = request.mode.is_64bit() && !request.isolated && request.second_page.is_none();
        let (mut low, mut high) = (request.at, request.at);
        let mut guide = request.hot.map(|ways| Guide::new(ways, request.rip));
        let hot = guide.is_some();
        let side_branches_max = if hot { HOT_SIDE_BRANCHES_MAX } else { SIDE_BRANCHES_MAX };
        let mut side_branches = 0;
        // Where calls that were followed come back to.
        let mut calls = Vec::new();
        let (mut branches, mut longer) = (false, false);
        let mut undefined = false;
        let most = request.max_instructions.min(MAX_INSTRUCTIONS) as usize;
        while self.instructions.len() < most {
            if hot && self.ends_loop(decoder.ip(), most) {
                break;
            }
            if !self.instructions.is_empty() && request.cuts.binary_search(&decoder.ip()).is_ok() {
                break;
            }
            let (ip, at) = (decoder.ip(), decoder.position());
            let mut ins = Instruction::default();
            decoder.decode_out(&mut ins);
            if ins.is_invalid() && decoder.last_error() == DecoderError::NoMoreBytes {
                if self.instructions.is_empty() && request.second_page.is_none() {
                    return Err(NeedsMoreBytes);
                }
                if !self.instructions.is_empty() {
                    decoder.set_ip(ip);
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
            (low, high) = (low.min(at), high.max(decoder.position()));
            let target = ins.near_branch_target();
            let usual = match &mut guide {
                Some(guide) if treatment == Treatment::Branch => guide.usually(ins.next_ip()),
                _ => None,
            };
            // Loops go on.
            let taken = usual.unwrap_or(target <= ins.ip());
            let mut follow = |decoder: &mut Decoder, target: u64| {
                let to = target.wrapping_sub(request.rip).wrapping_add(request.at as u64);
                let near = to < request.code.len() as u64 && high.max(to as usize) - low.min(to as usize) <= REACH_MAX;
                longer |= follows && near && !hot;
                let goes_on = follows && near && hot;
                if goes_on {
                    guide.iter_mut().for_each(|guide| guide.enter(target));
                    decoder.set_ip(target);
                    decoder.set_position(to as usize).expect("it is in the code");
                }
                goes_on
            };
            let (treatment, goes_on) = match treatment {
                Treatment::Jump if follow(&mut decoder, target) => (Treatment::Nothing, true),
                Treatment::Branch if follows && side_branches < side_branches_max => {
                    (treatment, if taken { follow(&mut decoder, target) } else { true })
                }
                Treatment::Call if follows_calls && follow(&mut decoder, target) => {
                    calls.push(ins.next_ip());
                    (Treatment::FollowedCall, true)
                }
                Treatment::Return
                    if ins.op_count() == 0 && calls.last().is_some_and(|back| follow(&mut decoder, *back)) =>
                {
                    calls.pop();
                    (Treatment::FollowedReturn, true)
                }
                treatment => (treatment, !treatment.ends_block()),
            };
            side_branches += (treatment == Treatment::Branch && goes_on) as usize;
            branches |= treatment == Treatment::Branch;
            self.instructions.push((ins, treatment));
            if !goes_on || request.second_page.is_some() {
                break;
            }
        }
        let mut next = decoder.ip();
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
        Ok(Path {
            guest_before: (request.at - low) as u32,
            guest_len: (high - request.at) as u32,
            next,
            branches,
            longer,
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
