//! Randomises everything that must not matter: how the engine works, where the machine is stopped, and whether it is
//! still the same machine.
//!
//! A [`Plan`] follows from a number and says what changes at which moment; a [`Course`] takes a machine through it.
//! Its states must be those of the same machine left in peace, at every moment: `verify --perturb` compares them.

mod plan;

use orrery_cpu::Icount;
use orrery_devices::VirtualNs;

use orrery_guest_image::Image;
pub use plan::{Draws, Entry, Plan, Slicing, Stage};

use crate::chain::Hash;
use crate::inputs::Input;
use crate::machine::hashing::Wanted;
use crate::machine::{BranchError, ForeignInputs, Limits, Machine, MachineError, Pause};

/// At the beginning of how many stages the state is hashed beside the guest, in percent.
const HASHED_BESIDE_PERCENT: u64 = 30;

/// A course that cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum CourseError {
    /// The inputs are of another run.
    #[error(transparent)]
    Inputs(#[from] ForeignInputs),
    /// No machine, or no engine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The machine cannot be frozen or branched.
    #[error(transparent)]
    Branch(#[from] BranchError),
    /// A hash that was computed beside the guest is not that of its moment.
    #[error(
        "the state after {icount} instructions has the hash {expected}, but {actual} when it is computed while the \
         guest goes on: this is a bug; please report it with the image"
    )]
    HashedBeside {
        /// The moment.
        icount: u64,
        /// Its hash, computed at once.
        expected: Hash,
        /// What came later.
        actual: Hash,
    },
}

/// A machine on its way through a plan, or left in peace.
pub struct Course {
    machine: Machine,
    perturbed: Option<Perturbed>,
}

/// Where in its plan a machine is.
struct Perturbed {
    /// What the machine was booted from.
    image: Image,
    /// All inputs of the run, from power-on.
    replayed: Vec<Input>,
    plan: Plan,
    /// Decides about stops; apart from the plan, which must not depend on what the guest does.
    draws: Draws,
    /// Stages that have begun.
    begun: Vec<Stage>,
    next: Stage,
    /// The next stop of this stage's own.
    slice_end: u64,
    /// The hash of a moment that is being hashed beside the guest as well.
    promised: Option<Hash>,
    /// When the guest idles: how far to let time go on before the next stop. None: to the next event.
    idle: Option<Idle>,
}

/// How to go on from a pause in idle time.
#[derive(Clone, Copy)]
enum Idle {
    /// To the next event, or the run's end if there is none.
    ToTheEnd,
    /// To this time, which is before the next event's.
    Until(VirtualNs),
}

impl From<Machine> for Course {
    /// A machine that is left in peace.
    fn from(machine: Machine) -> Course {
        Course { machine, perturbed: None }
    }
}

impl Course {
    /// A machine at power-on that is going to be perturbed, with the image that it boots from and the log of inputs
    /// that is to be replayed.
    pub fn perturbed(image: &Image, mut machine: Machine, replayed: Vec<Input>, mut plan: Plan) -> Course {
        machine.replay(replayed.clone());
        let next = plan.next_stage();
        let draws = Draws::new(!plan.seed());
        let image = image.clone();
        let perturbed = Perturbed {
            image,
            replayed,
            plan,
            draws,
            begun: Vec::new(),
            next,
            slice_end: 0,
            promised: None,
            idle: None,
        };
        Course { machine, perturbed: Some(perturbed) }
    }

    /// The machine.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The machine, to look at its state.
    pub fn machine_mut(&mut self) -> &mut Machine {
        &mut self.machine
    }

    /// Stages that have begun so far; empty for a machine that is left in peace.
    pub fn stages(&self) -> &[Stage] {
        self.perturbed.as_ref().map_or(&[], |perturbed| &perturbed.begun)
    }

    /// Runs to `icount` or `time`, whichever comes first, or to the run's end, as [`Machine::run`] does. Output is
    /// dropped.
    pub fn run(&mut self, icount: Icount, time: VirtualNs) -> Result<Pause, CourseError> {
        let until = Limits { icount, time, ..Limits::NONE };
        loop {
            if let Some(ended) = self.machine.ended() {
                return Ok(Pause::Ended(ended.clone()));
            }
            let now = self.machine.icount();
            if now >= icount || self.machine.time() >= time {
                return Ok(Pause::Limit);
            }
            let Some(perturbed) = &mut self.perturbed else {
                let pause = self.machine.run(until)?;
                self.machine.take_output();
                return Ok(pause);
            };
            while perturbed.next.from <= now.0 {
                perturbed.begin(&mut self.machine)?;
            }
            let limits = perturbed.limits(&self.machine, until);
            let pause = self.machine.run(limits)?;
            self.machine.take_output();
            perturbed.stopped(&mut self.machine, &pause);
        }
    }
}

impl Perturbed {
    /// Begins the next stage.
    fn begin(&mut self, machine: &mut Machine) -> Result<(), CourseError> {
        if let Some(expected) = self.promised.take()
            && let Some(hashed) = machine.take_hashed(true)
            && hashed.state_hash != expected
        {
            return Err(CourseError::HashedBeside { icount: hashed.icount.0, expected, actual: hashed.state_hash });
        }
        let following = self.plan.next_stage();
        let stage = std::mem::replace(&mut self.next, following);
        match stage.entry {
            Entry::NewEngine => machine.change_engine(stage.engine.clone()).map_err(MachineError::from)?,
            Entry::Restore => {
                let saved = machine.save();
                let mut restored = Machine::restore(&self.image, &saved, stage.engine.clone())?;
                // What has not entered yet is no part of a state.
                let entered = usize::try_from(machine.inputs_entered()).unwrap_or(usize::MAX);
                restored.replay(self.replayed.get(entered..).unwrap_or_default().to_vec());
                *machine = restored;
            }
            Entry::Branch => {
                let template = machine.freeze()?;
                // The first branch goes on in the memory of one that has been ahead, the second in its own.
                let _first = template.branch(machine.seed(), None)?;
                *machine = template.branch(machine.seed(), None)?;
            }
            Entry::Rewind { ahead } => {
                let mut branch = machine.freeze()?.branch(machine.seed(), None)?;
                let ahead = Icount(branch.icount().0.saturating_add(ahead));
                // Whether it gets there does not matter, nor how it ends.
                let _ = branch.run(Limits::until(ahead));
                branch.reset()?;
                *machine = branch;
            }
            Entry::Continue => {}
        }
        self.begun.push(stage);
        self.slice_end = 0;
        if self.draws.chance(HASHED_BESIDE_PERCENT) {
            self.promised = Some(machine.state_hash());
            // All of RAM. Nobody else does the work, so it is done as late as can be.
            let _ = machine.begin_hash(Some(Wanted { base: None, contents: Vec::new() }));
        }
        Ok(())
    }

    /// How far to run before the next stop.
    fn limits(&mut self, machine: &Machine, until: Limits) -> Limits {
        let Some(Stage { slicing, .. }) = self.begun.last() else { return until };
        let now = machine.icount().0;
        if self.slice_end <= now {
            self.slice_end = now.saturating_add(1 + self.draws.below(slicing.icount_max));
        }
        let mut limits = until;
        limits.icount = until.icount.min(Icount(self.slice_end.min(self.next.from)));
        limits.pause_on_output = slicing.at_output;
        match self.idle.take() {
            Some(Idle::ToTheEnd) => {}
            Some(Idle::Until(time)) => limits.time = until.time.min(time),
            None => {
                if let Some(time_max) = slicing.time_max_ns {
                    let time = machine.time().0.saturating_add(1 + self.draws.below(time_max));
                    limits.time = until.time.min(VirtualNs(time));
                    // A guest that idles forever must be left to end, which it does where time has no limit.
                    limits.pause_when_idle = true;
                }
            }
        }
        limits
    }

    fn stopped(&mut self, machine: &mut Machine, pause: &Pause) {
        if let Pause::Idle { until } = pause {
            let now = machine.time().0;
            self.idle = Some(match until {
                Some(next) if next.0 > now && self.draws.chance(50) => {
                    Idle::Until(VirtualNs(now + 1 + self.draws.below(next.0 - now)))
                }
                _ => Idle::ToTheEnd,
            });
        }
        let stops_per_hash = self.begun.last().and_then(|stage| stage.slicing.stops_per_hash);
        if stops_per_hash.is_some_and(|stops| self.draws.below(stops) == 0) {
            machine.state_hash();
        }
    }
}
