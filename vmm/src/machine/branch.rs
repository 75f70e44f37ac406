//! Branches in this process: a machine frozen at a moment, and machines that go on from there.
//!
//! A [`Template`] is a moment whose RAM no longer changes. Whoever branches off maps that RAM privately, copies the
//! state beside it, and runs at once: nothing in it is proportional to the guest's memory. A machine that came from
//! a template can go [back](Machine::reset) to it, at the cost of the pages that it has written since.
//!
//! With its parent's seed a branch is bit for bit the parent's future; with another one every random stream is keyed
//! anew at that moment.

use std::sync::Arc;

use orrery_cpu::engine::{Engine, EngineError, FrozenTranslations};
use orrery_cpu::memory::PAGE_SIZE;
use orrery_cpu::{CpuState, Icount};

use super::dirty::DirtyPages;
use super::state::MachineState;
use super::{Board, Machine, Scheduled};
use crate::config::Seed;
use crate::digest::MemoryDigest;
use crate::inputs::Input;
use crate::ram::{self, FrozenRam, RamError};

/// Most pages that a branch copies on its way out instead of having them in the file that it maps.
const PATCHES_MAX: usize = 64;

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
pub struct Template(Arc<Frozen>);

/// What a template is made of.
struct Frozen {
    ram: FrozenRam,
    state: MachineState,
    digest: MemoryDigest,
    translations: FrozenTranslations,
}

/// Where a machine branched off, to go back to.
pub(super) struct Origin {
    frozen: Arc<Frozen>,
    /// The state at which this machine began: the template's, with its own seed and inputs.
    start: MachineState,
}

impl Machine {
    /// Freezes the machine at this moment. It goes on as a branch of the template itself: RAM is mapped privately
    /// from now on, and [`Machine::reset`] leads back here if the machine has no earlier branch point.
    ///
    /// The first time this costs the same for any size of memory, but the pages that the machine touches afterwards
    /// are mapped and copied again. On a machine that is a branch already, the pages that it has written are copied
    /// if they are few, else all of RAM is.
    pub fn freeze(&mut self) -> Result<Template, BranchError> {
        self.update_digest();
        let ram = match &self.origin {
            None => FrozenRam::freeze(&self.board.memory)?,
            Some(origin) => {
                let ram = &origin.frozen.ram;
                let mut written = [self.dirty.branch.pages(), ram.patched()].concat();
                written.sort_unstable();
                written.dedup();
                FrozenRam::freeze_private(ram.file(), &self.board.memory, written, PATCHES_MAX)?
            }
        };
        let frozen = Arc::new(Frozen {
            ram,
            state: self.state(),
            digest: self.digest.clone(),
            translations: self.engine.freeze()?,
        });
        if self.origin.is_none() {
            self.dirty.branch.take();
            self.origin = Some(Origin { start: frozen.state.clone(), frozen: Arc::clone(&frozen) });
        }
        Ok(Template(frozen))
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
        self.collect_dirty();
        let origin = self.origin.as_ref().ok_or(BranchError::NoBranchPoint)?;
        for page in self.dirty.branch.take() {
            let gpa = page * PAGE_SIZE;
            let engine = &mut self.engine;
            origin.frozen.ram.restore_page(&self.board.memory, page, |offset, len| {
                engine.memory_written(gpa + offset, len);
            });
        }
        // The digest goes back as well; nobody else needs to know of what was just written.
        self.engine.take_dirty();
        self.dirty.digest.take();
        self.digest = origin.frozen.digest.clone();
        self.load(start);
        Ok(())
    }
}

impl Template {
    /// A machine that goes on from here.
    ///
    /// With the template's own seed the random streams go on, with another one they are keyed anew. `inputs` are
    /// stamped with moments of this future; None means those that were waiting when the template was made.
    pub fn branch(&self, seed: Seed, inputs: Option<Vec<Input>>) -> Result<Machine, BranchError> {
        let frozen = &self.0;
        let start = start(&frozen.state, seed, inputs);
        let memory = frozen.ram.map()?;
        let mut engine = Engine::branch(&frozen.translations, memory.clone())?;
        *engine.state_mut() = start.cpu.clone();
        engine.set_icount(start.icount);
        engine.state_replaced();
        Ok(Machine {
            config: start.config.clone(),
            dirty: DirtyPages::new(ram::end(&memory) / PAGE_SIZE),
            digest: frozen.digest.clone(),
            engine,
            board: Board::at(memory, start.board.clone()),
            inputs: start.inputs.clone(),
            entered: Vec::new(),
            inputs_entered: start.inputs_entered,
            settled: start.settled,
            first_moment: start.first_moment,
            seed,
            ended: start.ended.clone(),
            saved: None,
            origin: Some(Origin { frozen: Arc::clone(frozen), start }),
        })
    }

    /// Instructions retired at the template's moment.
    pub fn icount(&self) -> Icount {
        self.0.state.icount
    }

    /// The seed of its past.
    pub fn seed(&self) -> Seed {
        self.0.state.seed
    }

    /// Registers of the vCPU at that moment.
    pub fn cpu(&self) -> &CpuState {
        &self.0.state.cpu
    }
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
