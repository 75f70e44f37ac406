//! The soft engine: a binary translator from x86-64 to x86-64 with a software MMU and an exact instruction budget.
//!
//! `translate` turns guest code into host code block by block, with `classify`, `registers` and `assembler` as its
//! tools; `core` finds, enters and links blocks and acts on their exits; `mmu` serves memory; `system` (outside)
//! executes what is not worth translating. Nothing in here may change what a guest computes: see `EngineConfig`.

mod archive;
mod assembler;
mod block;
mod classify;
mod code;
mod coherence;
mod core;
mod debug;
mod deliveries;
mod dispatch;
mod emulation;
mod exceptions;
mod flags;
mod fpu;
mod groups;
mod hash;
mod homeless;
mod jumps;
mod kvm;
mod measure;
mod mmu;
mod mode;
mod native;
mod observe;
mod pages;
mod parked;
mod profile;
mod recent;
mod region;
mod registers;
mod residents;
mod segmented;
mod signals;
mod statistics;
mod threads;
mod thunks;
mod translate;
mod translations;
mod undefined;
mod window;

use std::sync::Arc;

use crate::bus::Bus;
use crate::memory::PhysMemory;
use crate::model::ModelFeatures;
use crate::state::CpuState;
use crate::{Icount, Past};
use vm_memory::GuestMemoryMmap;
use vm_memory::bitmap::Bitmap;

pub use archive::Archive;
pub use kvm::{KvmCosts, KvmError, available as kvm_available, measure as measure_kvm};
pub use observe::{Accessor, Hit, Observation, Place, WATCH_BYTES_MAX, Watchpoint};
pub use statistics::Statistics;
pub use undefined::Undefined;

/// Where user-mode code runs. Results are the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineKind {
    /// In translated code with a software MMU.
    #[default]
    Soft,
    /// In a virtual machine wherever that is possible.
    Kvm,
    /// Where it is faster.
    Auto,
    /// Now here, now there: for tests.
    Random,
}

/// How the engine works. None of it can change a state or a hash; tests vary all of it.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Entries of each software TLB, as a power of two, 1..=14.
    pub tlb_bits: u32,
    /// Lead branches straight to their targets' translations.
    pub chaining: bool,
    /// Translate nearby accesses of a block together.
    pub grouping: bool,
    /// Uses in a block, 1 or more, from which a guest register that lives in memory gets a host register for it.
    pub resident_uses: u8,
    /// Longest block, 1..=64 instructions.
    pub max_block_instructions: u32,
    /// After how much work that counts nothing the run stops, done or not: runs of elements (at most a page each) of a
    /// repeated string instruction, or exceptions without an instruction between them.
    pub patience: u32,
    /// Host memory reserved for translated code, in bytes.
    pub code_cache_bytes: usize,
    /// Kinds of instructions whose undefined flags and results are not left to the host's processor. By default those
    /// that it executes otherwise than the CPU model says.
    pub undefined: Undefined,
    /// Randomise block lengths and forget caches at random moments, from this seed.
    pub chaos_seed: Option<u64>,
    /// Where user-mode code runs.
    pub engine: EngineKind,
    /// Gets to know why user-mode code does not run in a virtual machine any more although that was asked for.
    pub kvm_failure: Option<std::sync::Arc<std::sync::OnceLock<KvmError>>>,
    /// The call to KVM that fails, for tests: its number.
    pub kvm_fails: Option<u32>,
    /// Translations to begin with, and where new ones are kept.
    pub archive: Option<std::sync::Arc<Archive>>,
}

impl Default for EngineConfig {
    fn default() -> EngineConfig {
        EngineConfig {
            tlb_bits: 20,
            chaining: true,
            grouping: true,
            resident_uses: residents::WORTH_IT,
            max_block_instructions: 64,
            patience: 1 << 16,
            code_cache_bytes: 512 << 20,
            undefined: Undefined::measured(),
            chaos_seed: None,
            engine: EngineKind::Soft,
            kvm_failure: None,
            kvm_fails: None,
            archive: None,
        }
    }
}

/// The engine cannot be made on this host.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// No executable memory.
    #[error(
        "cannot reserve executable memory for translated code: {0}; check the address-space limit (ulimit -v) and whether the host forbids writable executable memory"
    )]
    CodeMemory(std::io::Error),
    /// The processor lacks something the translator needs.
    #[error("this processor lacks {0}, which the engine needs")]
    Processor(&'static str),
}

/// Why `run` returned. The state is that between two instructions, but for [`Stop::Unfinished`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The icount is the limit.
    Limit,
    /// The bus asked for attention.
    Attention,
    /// An interrupt window was requested and the guest accepts interrupts now.
    InterruptWindow,
    /// The observation has found something, see [`Engine::take_hits`].
    Observed,
    /// HLT has retired.
    Halted,
    /// A repeated string instruction has been at work for a while and is not done, or exceptions have been delivered
    /// for a while without a handler that can be fetched. Nothing has been counted, and this is no state of its own:
    /// nothing may happen to the guest before the next `run`, which goes on with it.
    Unfinished,
    /// An exception could not be delivered: the processor shuts down.
    TripleFault,
    /// The guest needs something that is not implemented; nothing was executed in its place.
    Unsupported {
        /// Address of the instruction.
        rip: u64,
        /// Its bytes, if they can be read.
        bytes: Vec<u8>,
        /// What is missing.
        what: String,
    },
}

/// A small generator for the randomised engine; its numbers never reach the guest.
pub(crate) struct Chaos(u64);

impl Chaos {
    fn new(seed: u64) -> Chaos {
        Chaos(seed)
    }
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }
}

/// Translations that a branch's engine begins with; see [`Engine::freeze`].
#[derive(Clone)]
pub struct FrozenTranslations {
    start: translations::Start,
    features: ModelFeatures,
    config: EngineConfig,
}

impl FrozenTranslations {
    /// Most of both is the same.
    pub fn are_like(&self, other: &FrozenTranslations) -> bool {
        self.start.is_like(&other.start)
    }
}

/// One vCPU and its translations.
pub struct Engine {
    core: Box<core::Core>,
}

impl Engine {
    /// An engine over the machine's RAM, with all-zero state.
    pub fn new<B: Bitmap + Send + Sync + 'static>(
        memory: GuestMemoryMmap<B>,
        features: ModelFeatures,
        config: EngineConfig,
    ) -> Result<Engine, EngineError> {
        if !std::arch::is_x86_feature_detected!("avx2") {
            return Err(EngineError::Processor("AVX2"));
        }
        Ok(Engine { core: core::Core::new(PhysMemory::new(memory), features, config)? })
    }

    /// What this engine has translated so far, for the engines of branches: most of it, where all would cost much.
    pub fn freeze(&mut self) -> Result<FrozenTranslations, EngineError> {
        self.freeze_translations(false)
    }

    /// The engine works for others from now on, or no longer: what it does is to be known to those that branch off after
    /// [`Engine::freeze_all`].
    pub fn look_ahead(&mut self, on: bool) {
        self.core.exact_jumps = on;
        self.core.foreseen = true;
    }

    /// All that this engine has translated so far, and where its branches went.
    pub fn freeze_all(&mut self) -> Result<FrozenTranslations, EngineError> {
        self.freeze_translations(true)
    }

    fn freeze_translations(&mut self, all: bool) -> Result<FrozenTranslations, EngineError> {
        let start = self.core.freeze(all).map_err(EngineError::CodeMemory)?;
        Ok(FrozenTranslations { start, features: self.core.features, config: self.core.config.clone() })
    }

    /// An engine over memory whose content is that of the frozen engine's when it was frozen, with all-zero state:
    /// it begins with its translations. Costs the same however many they are.
    pub fn branch<B: Bitmap + Send + Sync + 'static>(
        frozen: &FrozenTranslations,
        memory: GuestMemoryMmap<B>,
    ) -> Result<Engine, EngineError> {
        let FrozenTranslations { start, features, config } = frozen;
        let core = core::Core::branch(PhysMemory::new(memory), *features, config.clone(), start)?;
        Ok(Engine { core })
    }

    /// Bytes of code that a branch's engine has translated itself; None if it has forgotten the translations with which it
    /// began.
    pub fn code_since_branch(&self) -> Option<usize> {
        self.core.t.code_since_branch()
    }

    /// The architectural state, complete and precise.
    pub fn state(&self) -> &CpuState {
        self.core.state()
    }

    /// The architectural state, to be changed between runs. Call `state_replaced` after changing control registers
    /// or page tables through other ways than the guest's own instructions.
    pub fn state_mut(&mut self) -> &mut CpuState {
        self.core.state_mut()
    }

    /// Forgets all cached address translations.
    pub fn state_replaced(&mut self) {
        self.core.forget_unfinished();
        self.core.flush_tlbs(true);
    }

    /// The last `run` stopped where nothing may happen to the guest, with [`Stop::Unfinished`].
    pub fn is_unfinished(&self) -> bool {
        self.core.is_unfinished()
    }

    /// Instructions retired since power-on.
    pub fn icount(&self) -> Icount {
        self.core.now()
    }

    /// Sets the icount, when a state is loaded.
    pub fn set_icount(&mut self, icount: Icount) {
        self.core.set_now(icount);
    }

    /// Executes until the icount is `limit` exactly, or another reason to stop.
    pub fn run(&mut self, limit: Icount, bus: &mut dyn Bus) -> Stop {
        self.core.run(limit, bus)
    }

    /// True if an external interrupt can be delivered now: IF is set and no shadow is in force.
    pub fn can_interrupt(&self) -> bool {
        self.core.can_interrupt()
    }

    /// Makes `run` stop as soon as `can_interrupt` is true.
    pub fn request_interrupt_window(&mut self, wanted: bool) {
        self.core.request_interrupt_window(wanted);
    }

    /// Delivers an external interrupt now and ends HLT. Call only if `can_interrupt`.
    pub fn interrupt(&mut self, vector: u8, bus: &mut dyn Bus) -> Result<(), Stop> {
        self.core.interrupt(Some(vector), bus)
    }

    /// True if a non-maskable interrupt can be delivered now: none is being handled and no shadow is in force. When
    /// one can be delivered again `run` stops with [`Stop::Attention`].
    pub fn can_nmi(&self) -> bool {
        self.core.can_nmi()
    }

    /// Delivers a non-maskable interrupt now and ends HLT. Call only if `can_nmi`.
    pub fn nmi(&mut self, bus: &mut dyn Bus) -> Result<(), Stop> {
        self.core.interrupt(None, bus)
    }

    /// Tells the engine that something else than the vCPU has written `len` bytes of RAM at `gpa`.
    pub fn memory_written(&mut self, gpa: u64, len: u64) {
        self.core.memory_written(gpa, len);
    }

    /// Replaces what is observed. What has been found and not been taken yet is dropped. The guest cannot tell.
    pub fn observe(&mut self, observation: &Observation) {
        self.core.observe(observation);
    }

    /// What the observation has found since the last call. Look after every call that lets the guest go on: `run`
    /// may have returned for another reason at the same moment, and `interrupt` and `memory_written` find things
    /// as well.
    pub fn take_hits(&mut self) -> Vec<Hit> {
        self.core.take_hits()
    }

    /// The observation has found something that is to stop the run.
    pub fn has_hits(&self) -> bool {
        self.core.has_hits()
    }

    /// Makes the next `run` execute the instruction at RIP even if there is a breakpoint on it. A breakpoint that has
    /// been reported is passed by itself.
    pub fn pass_breakpoint(&mut self) {
        self.core.pass_breakpoint();
    }

    /// What the engine has done so far, for tuning. It says nothing about the guest.
    pub fn statistics(&self) -> &Statistics {
        &self.core.statistics
    }

    /// Counts from zero again.
    pub fn forget_statistics(&mut self) {
        self.core.statistics = Statistics::default();
    }

    /// Numbers of the pages (guest-physical address / 4096) that may have been written since the last call, in
    /// ascending order.
    pub fn take_dirty(&mut self) -> Vec<u64> {
        self.core.take_dirty()
    }

    /// How many there are for [`Engine::take_dirty`].
    pub fn dirty_count(&self) -> usize {
        self.core.dirty_count()
    }

    /// Keeps the past of pages before the guest writes to them; None for no more. It is the past of now: nothing has run
    /// since the last [`Engine::take_dirty`].
    pub fn keep_past(&mut self, past: Option<Arc<Past>>) {
        assert!(past.is_none() || self.core.dirty_count() == 0, "what was written since is not the past");
        self.core.memory.keep_past(past);
    }
}
