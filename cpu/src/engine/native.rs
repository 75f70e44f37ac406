//! Instructions that the emulation does not have, where segments are not flat: x87, SSE, AVX, the rarer integer ones.
//!
//! Everywhere else the host executes them, with their operands' addresses translated. Here the address is computed
//! and checked first, as the segment wants it, and the host executes the same instruction with that address. The
//! translation is used once. Nothing of this is fast, and little code needs it.

use super::core::{Core, Pending};
use super::mode::Mode;
use super::residents;
use super::thunks::exit;
use super::translate::{Request, SiteKind};
use super::translations::Purpose;
use super::undefined::Undefined;
use super::{classify, classify::Treatment};
use crate::exception::Exception;
use crate::system;
use iced_x86::{CodeSize, Encoder, Instruction, OpKind, Register};

impl Core {
    /// Executes `instruction`, which lies at CS:RIP, but for counting it. None if the host cannot do that for it
    /// either; errors are exceptions that it raises, which have not been delivered.
    pub fn execute_natively(&mut self, instruction: &Instruction) -> Option<Result<(), Exception>> {
        let mode = Mode::of(self.state());
        if mode.is_64bit() || mode.is_flat() && mode.bitness() == 32 {
            return None;
        }
        let mode = mode.flat32();
        let mut flat = *instruction;
        flat.set_code_size(CodeSize::Code32);
        if let Some(operand) = (0..instruction.op_count()).find(|i| instruction.op_kind(*i) == OpKind::Memory) {
            let address = match system::operand_address(self.state(), instruction, operand) {
                Ok(address) => address,
                Err(exception) => return Some(Err(exception)),
            };
            flat.set_memory_base(Register::None);
            flat.set_memory_index(Register::None);
            flat.set_segment_prefix(Register::None);
            flat.set_memory_displacement64(address);
            flat.set_memory_displ_size(4);
        }
        if classify::treatment(&flat, mode) != Treatment::Plain {
            return None;
        }
        let mut encoder = Encoder::new(32);
        encoder.encode(&flat, self.state().rip).ok()?;
        let bytes = encoder.take_buffer();
        Some(self.execute_once(instruction, &bytes, mode))
    }

    fn execute_once(&mut self, instruction: &Instruction, bytes: &[u8], mode: Mode) -> Result<(), Exception> {
        if !self.has_room_for_block() {
            self.clear_code();
        }
        let (rip, behind) = (self.state().rip, system::rip_behind(self.state(), instruction));
        let request = Request {
            rip,
            code: bytes,
            at: 0,
            mode,
            max_instructions: 1,
            careful: true,
            window: false,
            hot: None,
            heats: false,
            grouping: false,
            resident_uses: residents::WORTH_IT,
            isolated: true,
            // The emulation has all that leave something undefined.
            undefined: Undefined::NONE,
            block: self.t.blocks.len() as u32,
            first_site: self.t.sites.len() as u32,
            first_emulated: self.t.emulated.len() as u32,
            // No page has this identity: the block is never found again.
            page_identity: 0,
            second_page: None,
            others: &[],
            tlb_mask: self.tlb_mask,
            cuts: &[],
        };
        let placed =
            self.translator.translate(&request, self.t.next_code()).expect("the bytes are a whole instruction");
        self.keep_translation(rip, 0, None, Purpose::Careful, &placed);
        let budget = self.budget();
        let argument = self.enter(placed.entry);
        let exception = match argument {
            exit::FAULT => Some(self.host_fault()),
            exit::ABORTED => {
                self.commit = None;
                match std::mem::replace(&mut self.pending, Pending::None) {
                    Pending::Exception(exception) => Some(exception),
                    _ => unreachable!("a careful access fails with an exception or not at all"),
                }
            }
            site => {
                assert!(matches!(self.t.sites[site].kind, SiteKind::Link { .. }), "it is a plain instruction");
                self.commit();
                None
            }
        };
        // Whoever asked for it counts it.
        self.set_budget(budget);
        self.state_mut().rip = if exception.is_some() { rip } else { behind };
        exception.map_or(Ok(()), Err)
    }
}
