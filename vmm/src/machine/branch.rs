//! Branches in this process: a machine frozen at a moment, and machines that go on from there.
//!
//! A [`Template`] is a moment whose RAM no longer changes. Whoever branches off maps that RAM privately, copies the
//! state beside it, and runs at once: nothing in it is proportional to the guest's memory. A machine that came from
//! a template can go [back](Machine::reset) to it, at the cost of the pages that it has written since. One that is
//! dropped goes back by itself, and its engine and memory wait for the next branch, for which the host has then mapped
//! and copied already what it needs. The templates of one machine, and of its branches, have one stock of these.
//!
//! With its parent's seed a branch is bit for bit the parent's future; with another one every random stream is keyed
//! anew at that moment.

use std::mem::ManuallyDrop;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use orrery_cpu::engine::{Engine, EngineError, FrozenTranslations, Observation};
use orrery_cpu::memory::PAGE_SIZE;
use orrery_cpu::{CpuState, Icount};
use orrery_devices::GuestMemory;

use super::dirty::DirtyPages;
use super::save::LastSave;
use super::state::MachineState;
use super::{Board, Limits, Machine, Scheduled};
use crate::config::Seed;
use crate::digest::MemoryDigest;
use crate::inputs::Input;
use crate::ram::{self, FrozenRam, RamError};

/// Most pages that branches copy on their way out for ever, instead of having them in the file that they map.
const PATCHES_FEW: usize = 64;
/// Most engines with their memory that wait in a template for branches.
pub const SPARES_MAX: usize = 16;
/// Most pages of RAM that such a spare may own: 32 MiB.
const SPARE_PAGES_MAX: usize = 8192;
/// Most bytes of code that it may have translated itself.
const SPARE_CODE_MAX: usize = 8 << 20;

/// Most pages that are put back so that a branch can go on in the memory of one from another moment: 4 MiB.
const ADAPTED_MAX: usize = 1024;

/// A branch that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BranchError {
    /// RAM cannot be frozen or mapped.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The engine cannot be started.
    #[error("cannot start the engine of a branch: {0}")]
    Engine(#[from] EngineError),
    /// A machine that was booted and never frozen has no branch point.
    #[error("this machine has no branch point to go back to: it was neither frozen nor branched off")]
    NoBranchPoint,
}

/// A moment from which machines branch off. Copies share it; it may be used by several threads at once.
#[derive(Clone)]
pub struct Template {
    frozen: Arc<Frozen>,
    /// What machines that are gone have left, for branches to come.
    stock: Arc<Stock>,
}

/// Spares for all templates whose RAM has one file below: there as long as one of these, or a machine that was frozen.
pub(super) type Stock = Mutex<Vec<Spare>>;

/// What a template is made of.
pub(super) struct Frozen {
    ram: Mutex<Ram>,
    state: MachineState,
    digest: OnceLock<MemoryDigest>,
    /// The digest as it was known, and the pages written after that: hashed when somebody asks.
    stale_digest: (MemoryDigest, Vec<u64>),
    translations: FrozenTranslations,
    /// The same with those of what comes next, see [`Template::learn`].
    learned: OnceLock<FrozenTranslations>,
    /// What the next save of a branch builds on.
    saved: Option<Box<LastSave>>,
}

/// RAM of a template, whose form may change.
struct Ram {
    frozen: Arc<FrozenRam>,
    /// Pages that branches have copied on their way out.
    copied: u64,
}

/// An engine and the memory it works on, which holds what it did at a template's moment.
pub(super) struct Spare {
    engine: Engine,
    memory: GuestMemory,
    dirty: DirtyPages,
    /// RAM as `memory` has mapped it.
    ram: Arc<FrozenRam>,
    /// The template with whose translations the engine began.
    frozen: Arc<Frozen>,
}

/// Where a machine branched off, to go back to.
pub(super) struct Origin {
    frozen: Arc<Frozen>,
    /// Where its engine and memory go when it is dropped.
    stock: Weak<Stock>,
    /// RAM as the machine has mapped it.
    ram: Arc<FrozenRam>,
    /// The state at which this machine began: the template's, with its own seed and inputs.
    start: MachineState,
}

impl Machine {
    /// Freezes the machine at this moment. It goes on as a branch of the template itself: RAM is mapped privately
    /// from now on, and [`Machine::reset`] leads back here if the machine has no earlier branch point.
    ///
    /// The first time this costs the same for any size of memory, but the pages that the machine touches afterwards
    /// are mapped and copied again. On a machine that is a branch already it costs the pages that it has written. Beside
    /// that it costs what [`Template::learn`] does, so that branches need not begin cold.
    pub fn freeze(&mut self) -> Result<Template, BranchError> {
        let template = self.freeze_only()?;
        template.learn();
        Ok(template)
    }

    /// Freezes the machine without looking at what comes next: for who goes back to this moment or branches off once.
    pub fn freeze_only(&mut self) -> Result<Template, BranchError> {
        self.settle_hash();
        self.collect_dirty();
        let ram = Arc::new(match &self.origin {
            None => FrozenRam::freeze(&self.board.memory)?,
            Some(Origin { ram, .. }) => {
                let mut written = [self.dirty.branch.pages(), ram.patched()].concat();
                written.sort_unstable();
                written.dedup();
                FrozenRam::freeze_private(ram.file(), &self.board.memory, written)
            }
        });
        let (digest, mut stale) = match self.digest_source.take() {
            // Nobody has asked for a digest since this machine branched off.
            Some(source) => match source.digest.get() {
                Some(digest) => (digest.clone(), Vec::new()),
                None => source.stale_digest.clone(),
            },
            None => (self.digest.clone(), Vec::new()),
        };
        stale.extend(self.dirty.digest.take());
        let frozen = Arc::new(Frozen {
            ram: Mutex::new(Ram { frozen: Arc::clone(&ram), copied: 0 }),
            state: self.state(),
            digest: OnceLock::new(),
            stale_digest: (digest, stale),
            translations: self.engine.freeze()?,
            learned: OnceLock::new(),
            saved: self.saved.clone(),
        });
        let inherited = || self.origin.as_ref()?.stock.upgrade();
        let stock = self.stock.clone().or_else(inherited).unwrap_or_default();
        let template = Template { frozen, stock };
        self.stock = Some(Arc::clone(&template.stock));
        self.digest_source = Some(Arc::clone(&template.frozen));
        if self.origin.is_none() {
            self.dirty.branch.take();
            self.origin = Some(template.origin(ram, template.frozen.state.clone()));
        }
        Ok(template)
    }

    /// How many pages this machine has written since its branch point, or since power-on.
    pub fn pages_since_branch(&mut self) -> usize {
        self.collect_dirty();
        self.dirty.branch.len()
    }

    /// Goes back to the moment at which this machine branched off (or was frozen first), with the seed and the
    /// inputs that it had then. Costs what it has written since.
    pub fn reset(&mut self) -> Result<(), BranchError> {
        let start = self.origin.as_ref().ok_or(BranchError::NoBranchPoint)?.start.clone();
        self.go_back(start)
    }

    /// Goes back to the same moment, and on from there with another seed and other inputs, see [`Template::branch`].
    pub fn reset_as(&mut self, seed: Seed, inputs: Option<Vec<Input>>) -> Result<(), BranchError> {
        let origin = self.origin.as_mut().ok_or(BranchError::NoBranchPoint)?;
        origin.start = start(&origin.frozen.state, seed, inputs);
        let start = origin.start.clone();
        self.go_back(start)
    }

    fn go_back(&mut self, start: MachineState) -> Result<(), BranchError> {
        self.settle_hash();
        self.collect_dirty();
        let origin = self.origin.as_ref().ok_or(BranchError::NoBranchPoint)?;
        for page in self.dirty.branch.take() {
            let gpa = page * PAGE_SIZE;
            let engine = &mut self.engine;
            origin.ram.restore_page(&self.board.memory, page, |offset, len| {
                engine.memory_written(gpa + offset, len);
            });
        }
        // The digest goes back as well; nobody else needs to know of what was just written.
        self.engine.take_dirty();
        self.dirty.digest.take();
        self.digest_source = Some(Arc::clone(&origin.frozen));
        self.load(start);
        Ok(())
    }
}

impl Drop for Machine {
    /// Leaves engine and memory to the next branch of the same template, unless they have grown large.
    fn drop(&mut self) {
        // Only what others can use is left.
        self.stock = None;
        let spare = self.leave();
        // SAFETY: this is the end of the machine; nobody uses the engine after this.
        let engine = unsafe { ManuallyDrop::take(&mut self.engine) };
        if let Some((stock, origin)) = spare {
            let (memory, dirty) = (self.board.memory.clone(), std::mem::take(&mut self.dirty));
            let mut stock = lock(&stock);
            let oldest = (stock.len() >= SPARES_MAX).then(|| stock.remove(0));
            stock.push(Spare { engine, memory, dirty, ram: origin.ram, frozen: origin.frozen });
            drop(stock);
            drop(oldest);
        }
    }
}

impl Machine {
    /// No branch is to go on with this engine: it is not one as the template's.
    pub(super) fn keep_engine(&mut self) {
        if let Some(origin) = &mut self.origin {
            origin.stock = Weak::new();
        }
    }

    /// Goes back for the last time; to whom engine and memory are of use then, and where they are now.
    fn leave(&mut self) -> Option<(Arc<Stock>, Origin)> {
        let stock = self.origin.as_ref()?.stock.upgrade()?;
        self.collect_dirty();
        let origin = self.origin.as_ref()?;
        let small = self.dirty.owned.len() <= SPARE_PAGES_MAX
            && self.engine.code_since_branch().is_some_and(|bytes| bytes <= SPARE_CODE_MAX);
        let own = |spare: &&Spare| Arc::ptr_eq(&spare.frozen, &origin.frozen);
        let enough = lock(&stock).iter().filter(own).count() >= SPARES_MAX;
        if !small || enough || std::thread::panicking() {
            return None;
        }
        self.reset().ok()?;
        self.engine.observe(&Observation::default());
        self.engine.take_hits();
        Some((stock, self.origin.take()?))
    }
}

impl Template {
    /// A machine that goes on from here.
    ///
    /// With the template's own seed the random streams go on, with another one they are keyed anew. `inputs` are
    /// stamped with moments of this future; None means those that were waiting when the template was made.
    pub fn branch(&self, seed: Seed, inputs: Option<Vec<Input>>) -> Result<Machine, BranchError> {
        let start = start(&self.frozen.state, seed, inputs);
        let ram = self.ram();
        let spare = self.take(&ram);
        let spare = match spare {
            Some(spare) => self.adapt(spare, ram, self.frozen.learned.get().is_some())?,
            None => self.spare()?,
        };
        Ok(self.machine(spare, start))
    }

    /// The spare that costs least to go on in, with RAM that becomes `ram`; None if a new one costs less.
    fn take(&self, ram: &Arc<FrozenRam>) -> Option<Spare> {
        let own = |spare: &Spare| Arc::ptr_eq(&spare.frozen, &self.frozen);
        let near = |spare: &Spare| {
            let few = spare.ram.patched().len() <= ram.patched().len() + ADAPTED_MAX;
            few && Arc::ptr_eq(spare.ram.file(), ram.file())
        };
        let mut stock = lock(&self.stock);
        let at = stock.iter().rposition(own).or_else(|| stock.iter().rposition(near))?;
        Some(stock.remove(at))
    }

    /// Makes a spare of another moment one of this moment, with a new engine if it needs one or that is better: costs the
    /// pages in which either differs from the file.
    fn adapt(&self, mut spare: Spare, ram: Arc<FrozenRam>, new_engine: bool) -> Result<Spare, BranchError> {
        if Arc::ptr_eq(&spare.frozen, &self.frozen) {
            return Ok(spare);
        }
        if !Arc::ptr_eq(&spare.ram, &ram) {
            let Spare { engine, memory, ram: before, .. } = &mut spare;
            let mut pages = [before.patched(), ram.patched()].concat();
            pages.sort_unstable();
            pages.dedup();
            for page in pages {
                ram.restore_page(memory, page, |offset, len| engine.memory_written(page * PAGE_SIZE + offset, len));
            }
            engine.take_dirty();
            *before = ram;
        }
        let translations = self.frozen.translations();
        if new_engine || !spare.frozen.translations.are_like(translations) {
            spare.engine = Engine::branch(translations, spare.memory.clone())?;
        }
        spare.frozen = Arc::clone(&self.frozen);
        Ok(spare)
    }

    /// A new engine over RAM of its own.
    fn spare(&self) -> Result<Spare, BranchError> {
        let ram = self.frozen.ram()?;
        let memory = ram.map()?;
        let engine = Engine::branch(self.frozen.translations(), memory.clone())?;
        let dirty = DirtyPages::new(ram::end(&memory) / PAGE_SIZE);
        Ok(Spare { engine, dirty, memory, ram, frozen: Arc::clone(&self.frozen) })
    }

    /// The machine in that state.
    fn machine(&self, spare: Spare, start: MachineState) -> Machine {
        let Spare { mut engine, memory, dirty, ram, .. } = spare;
        *engine.state_mut() = start.cpu.clone();
        engine.set_icount(start.icount);
        engine.state_replaced();
        Machine {
            config: start.config.clone(),
            dirty,
            digest: self.frozen.stale_digest.0.clone(),
            digest_source: Some(Arc::clone(&self.frozen)),
            hashing: None,
            hashed: None,
            engine: ManuallyDrop::new(engine),
            board: Board::at(memory, start.board.clone()),
            inputs: start.inputs.clone(),
            entered: Vec::new(),
            inputs_entered: start.inputs_entered,
            settled: start.settled,
            first_moment: start.first_moment,
            seed: start.seed,
            ended: start.ended.clone(),
            saved: self.frozen.saved.clone(),
            stock: None,
            origin: Some(self.origin(ram, start)),
        }
    }

    fn origin(&self, ram: Arc<FrozenRam>, start: MachineState) -> Origin {
        Origin { frozen: Arc::clone(&self.frozen), stock: Arc::downgrade(&self.stock), ram, start }
    }

    /// A branch with a new engine, to go ahead: in memory that waits, if there is any.
    pub(super) fn scout(&self) -> Result<Machine, BranchError> {
        let ram = self.ram();
        let spare = match self.take(&ram) {
            Some(spare) => self.adapt(spare, ram, true)?,
            None => self.spare()?,
        };
        Ok(self.machine(spare, start(&self.frozen.state, self.seed(), None)))
    }

    pub(super) fn has_learned(&self) -> bool {
        self.frozen.learned.get().is_some()
    }

    pub(super) fn keep_learned(&self, translations: FrozenTranslations) {
        // If somebody else was faster, theirs are as good.
        let _ = self.frozen.learned.set(translations);
    }

    /// Makes the next `count` branches fast, at most [`SPARES_MAX`], as those are that come after others: so many machines
    /// run the template's own future for `instructions` and are dropped. May be called from a thread of its own.
    pub fn prepare(&self, count: usize, instructions: u64) -> Result<(), BranchError> {
        let mut ready = Vec::new();
        let own = |spare: &&Spare| Arc::ptr_eq(&spare.frozen, &self.frozen);
        let waiting = lock(&self.stock).iter().filter(own).count();
        for _ in waiting..count.min(SPARES_MAX) {
            let mut machine = self.machine(self.spare()?, start(&self.frozen.state, self.seed(), None));
            let until = Icount(self.icount().0.saturating_add(instructions));
            // However it ends: it goes back.
            let _ = machine.run(Limits::until(until));
            ready.push(machine);
        }
        Ok(())
    }

    /// Instructions retired at the template's moment.
    pub fn icount(&self) -> Icount {
        self.frozen.state.icount
    }

    /// Its RAM.
    pub(super) fn ram(&self) -> Arc<FrozenRam> {
        Arc::clone(&lock(&self.frozen.ram).frozen)
    }

    /// The seed of its past.
    pub fn seed(&self) -> Seed {
        self.frozen.state.seed
    }

    /// Registers of the vCPU at that moment.
    pub fn cpu(&self) -> &CpuState {
        &self.frozen.state.cpu
    }
}

impl Frozen {
    /// What the engines of branches begin with.
    fn translations(&self) -> &FrozenTranslations {
        self.learned.get().unwrap_or(&self.translations)
    }

    /// RAM for another branch. As long as few pages differ from the file, or few branches were made, they copy those
    /// pages; when that has cost as much as a file of its own costs, that is made. So nobody pays much more than
    /// twice what would have been best.
    fn ram(&self) -> Result<Arc<FrozenRam>, RamError> {
        let mut ram = lock(&self.ram);
        let patched = ram.frozen.patched().len();
        if patched > PATCHES_FEW {
            ram.copied += patched as u64;
            if ram.copied > ram.frozen.file().allocated_pages() {
                ram.frozen = Arc::new(ram.frozen.flatten()?);
            }
        }
        Ok(Arc::clone(&ram.frozen))
    }

    /// The digests of RAM.
    pub fn digest(&self) -> &MemoryDigest {
        self.digest.get_or_init(|| {
            let (mut digest, stale) = self.stale_digest.clone();
            let ram = Arc::clone(&lock(&self.ram).frozen);
            digest.update_from(|page| ram.page(page), stale);
            digest
        })
    }
}

/// Nobody leaves what these locks guard half-done, so a thread's panic elsewhere does not matter.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The state of a branch at its first moment.
fn start(template: &MachineState, seed: Seed, inputs: Option<Vec<Input>>) -> MachineState {
    let mut state = template.clone();
    state.rekey(seed);
    if let Some(inputs) = inputs {
        state.inputs = inputs.into_iter().map(Scheduled::from).collect();
    }
    state
}
