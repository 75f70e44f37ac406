//! Standing at a moment of a run, and going to another.

mod stepping;

use std::sync::Arc;

use orrery_cpu::Icount;
use orrery_cpu::engine::Observation;

use super::watch::{Event, Plan, Wanted, What};
use super::{DebugError, Subject};
use crate::config::Seed;
use crate::inspect::{InspectCache, Inspector};
use crate::machine::{Checkpoints, Limits, Machine, Pause};
use crate::run::Ended;

/// Bytes of page contents that a session keeps to go back quickly.
pub const KEPT_BYTES_MAX: u64 = 1 << 30;
/// Instructions between two looks at whether somebody wants the movement to stop.
const SLICE: u64 = 20_000_000;
/// Moments are kept this many instructions before a target, and four times as many, and so on.
const NEAREST_KEPT: u64 = 1 << 13;
/// Going forward freely, a moment is kept every so many instructions.
const SPACING: u64 = 1 << 27;
/// Below this distance a movement does not take the observation out of the engine.
const SHORT: u64 = 1 << 20;

/// Where a session stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Position {
    /// Instructions retired.
    pub icount: u64,
    /// None: the first moment of the icount, State(icount). Otherwise the last one, just before the instruction at
    /// this address: interrupts and exceptions that come at this icount have been delivered.
    pub about_to_execute: Option<u64>,
}

/// Which way to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To what comes.
    Forward,
    /// To what was.
    Backward,
}

/// Why a movement ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The step is done.
    Step,
    /// Something wanted was found.
    Event(Event),
    /// Going back came to the first moment there is.
    Beginning,
    /// Going forward came to the end of the run.
    End(Ended),
    /// Somebody asked to stop.
    Interrupted,
}

/// Told now and then how far a movement has come; true asks it to stop.
pub type Watcher<'a> = &'a mut dyn FnMut(u64) -> bool;

/// A run with a moment in it.
pub struct Session {
    subject: Subject,
    machine: Machine,
    kept: Checkpoints,
    /// The machine stands at the first moment of its icount.
    first_moment: bool,
    /// See [`Position`].
    about_to_execute: Option<u64>,
    /// What the engine observes now.
    observation: Observation,
    /// Last moment of the run and how it ended, as far as that is known.
    end: Option<(u64, Ended)>,
    /// On a branch: the first moment that can be reached.
    floor: Option<u64>,
    cache: Arc<InspectCache>,
}

impl Session {
    /// Stands at `icount` of a run.
    pub fn open(subject: Subject, icount: u64, watcher: Watcher) -> Result<Session, DebugError> {
        let end = subject.manifest().outcome.as_ref().map(|outcome| (outcome.icount, outcome.ended.clone()));
        if let Some((end, ended)) = &end
            && icount > *end
        {
            return Err(DebugError::BeyondEnd { target: icount, end: *end, ended: ended.clone() });
        }
        let mut machine = subject.machine_before(Icount(icount))?;
        let kept = machine.begin_checkpoints(KEPT_BYTES_MAX)?;
        let mut session = Session {
            subject,
            machine,
            kept,
            first_moment: true,
            about_to_execute: None,
            observation: Observation::default(),
            end,
            floor: None,
            cache: Arc::default(),
        };
        session.go_to(icount, watcher)?;
        Ok(session)
    }

    /// The run.
    pub fn subject(&self) -> &Subject {
        &self.subject
    }

    /// The machine, at rest.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Hash of the state. At the first moment of an icount it is that of State(icount).
    pub fn state_hash(&mut self) -> crate::chain::Hash {
        self.machine.state_hash()
    }

    /// Where the session stands.
    pub fn position(&self) -> Position {
        Position { icount: self.machine.icount().0, about_to_execute: self.about_to_execute }
    }

    /// Last moment of the run and how it ended, if it is known.
    pub fn end(&self) -> Option<(u64, &Ended)> {
        self.end.as_ref().map(|(icount, ended)| (*icount, ended))
    }

    /// Looks into the guest as it is now.
    pub fn inspector(&self) -> Inspector<'_> {
        Inspector::with_cache(&self.machine, &self.cache)
    }

    /// What was learned about the guest at other moments.
    pub fn cache(&self) -> Arc<InspectCache> {
        Arc::clone(&self.cache)
    }

    /// How many moments are kept in memory, and the bytes of their pages.
    pub fn kept(&self) -> (usize, u64) {
        (self.kept.len(), self.kept.bytes())
    }

    /// Keeps this moment in memory, so that coming back to it is quick.
    pub fn keep(&mut self) {
        if self.first_moment {
            self.machine.checkpoint(&mut self.kept);
        }
    }

    // Branches -------------------------------------------------------------------------------------------------

    /// The first moment that can be reached on a branch; None if the session is on the run itself.
    pub fn floor(&self) -> Option<u64> {
        self.floor
    }

    /// Leaves the run: from here on the future is this session's own, and may be changed. With a seed, every random
    /// choice from here on derives from it.
    pub fn branch(&mut self, seed: Option<Seed>) -> Result<(), DebugError> {
        if let Some(seed) = seed {
            self.machine.rekey(seed);
        }
        self.changed()
    }

    /// Goes back to the run, at the moment at which the branch left it last.
    pub fn return_to_run(&mut self, watcher: Watcher) -> Result<(), DebugError> {
        let Some(floor) = self.floor.take() else { return Ok(()) };
        self.end = self.subject.manifest().outcome.as_ref().map(|outcome| (outcome.icount, outcome.ended.clone()));
        let target = self.end.as_ref().map_or(floor, |(end, _)| floor.min(*end));
        self.reopen(target)?;
        self.go_to(target, watcher)
    }

    /// Changes the machine, on a branch; gives what `change` gives. The past before this moment cannot be gone back
    /// to any more until the branch is left. None if the session is on the run itself, which nobody changes.
    pub fn change<T>(&mut self, change: impl FnOnce(&mut Machine) -> T) -> Result<Option<T>, DebugError> {
        if self.floor.is_none() {
            return Ok(None);
        }
        let result = change(&mut self.machine);
        self.changed()?;
        Ok(Some(result))
    }

    fn changed(&mut self) -> Result<(), DebugError> {
        self.floor = Some(self.machine.icount().0);
        self.end = None;
        self.kept = self.machine.begin_checkpoints(KEPT_BYTES_MAX)?;
        (self.first_moment, self.about_to_execute) = (true, None);
        Ok(())
    }

    // Going ----------------------------------------------------------------------------------------------------

    /// Goes to State(icount).
    pub fn go_to(&mut self, icount: u64, watcher: Watcher) -> Result<(), DebugError> {
        self.check_target(icount)?;
        let here = self.machine.icount().0;
        let here = (here < icount || here == icount && self.first_moment).then_some(here);
        match self.kept.at_or_before(Icount(icount)) {
            Some(point) if here.is_none_or(|here| point.0 > here) => self.return_to(point.0),
            None if here.is_none() => self.reopen(icount)?,
            _ => {}
        }
        if icount - self.machine.icount().0 > SHORT {
            self.observe(&Observation::default());
        }
        self.approach(icount, watcher)
    }

    fn check_target(&self, icount: u64) -> Result<(), DebugError> {
        if let Some((end, ended)) = &self.end
            && icount > *end
        {
            return Err(DebugError::BeyondEnd { target: icount, end: *end, ended: ended.clone() });
        }
        match self.floor {
            Some(floor) if icount < floor => Err(DebugError::BeforeChange { target: icount, floor }),
            _ => Ok(()),
        }
    }

    /// Goes to a position.
    pub fn go_to_position(&mut self, position: Position, watcher: Watcher) -> Result<(), DebugError> {
        self.go_to(position.icount, watcher)?;
        let Some(rip) = position.about_to_execute else { return Ok(()) };
        if self.machine.cpu().rip != rip {
            let plan = Plan::new(&Wanted { breakpoints: vec![rip], ..Wanted::default() }, &self.machine);
            self.observe(plan.observation());
            self.machine.run(Limits::until(Icount(position.icount + 1)))?;
            self.machine.take_hits();
            self.first_moment = false;
        }
        self.about_to_execute = Some(rip);
        Ok(())
    }

    fn observe(&mut self, observation: &Observation) {
        if self.observation != *observation {
            self.machine.observe(observation);
            self.observation = observation.clone();
        }
    }

    fn return_to(&mut self, icount: u64) {
        self.machine.return_to(&mut self.kept, Icount(icount));
        (self.first_moment, self.about_to_execute) = (true, None);
    }

    /// Replaces the machine by one that stands at or before `icount`.
    fn reopen(&mut self, icount: u64) -> Result<(), DebugError> {
        let mut machine = self.subject.machine_before(Icount(icount))?;
        self.kept = machine.begin_checkpoints(KEPT_BYTES_MAX)?;
        self.machine = machine;
        self.observation = Observation::default();
        (self.first_moment, self.about_to_execute) = (true, None);
        Ok(())
    }

    /// Runs on to `icount` and keeps moments on the way, the denser the nearer the target is: going back from there
    /// costs little at first.
    fn approach(&mut self, icount: u64, watcher: Watcher) -> Result<(), DebugError> {
        for mark in self.marks(icount) {
            self.advance(mark, watcher)?;
            self.machine.checkpoint(&mut self.kept);
        }
        self.advance(icount, watcher)
    }

    /// Moments to keep on the way from here to `icount`, ascending.
    fn marks(&self, icount: u64) -> Vec<u64> {
        let here = self.machine.icount().0;
        let mut marks = Vec::new();
        let mut distance = NEAREST_KEPT;
        while distance < icount - here.min(icount) {
            let mark = icount - distance;
            // Not where one is kept nearby already.
            let kept = self.kept.at_or_before(Icount(icount - distance / 2)).is_some_and(|kept| kept.0 >= mark);
            if !kept {
                marks.push(mark);
            }
            distance *= 4;
        }
        marks.reverse();
        marks
    }

    /// Runs on to `icount` without stopping at anything on the way.
    fn advance(&mut self, icount: u64, watcher: Watcher) -> Result<(), DebugError> {
        loop {
            let now = self.machine.icount().0;
            if now >= icount && (self.first_moment || now > icount) {
                return Ok(());
            }
            match self.run_slice(icount)? {
                Pause::Ended(ended) if self.machine.icount().0 < icount => {
                    return Err(self.ended_before(icount, ended));
                }
                pause => {
                    if pause == Pause::Observed {
                        self.machine.take_hits();
                    }
                    if self.machine.icount().0 >= icount {
                        self.first_moment = true;
                        return Ok(());
                    }
                }
            }
            if watcher(self.machine.icount().0) {
                return Err(self.interrupted()?);
            }
        }
    }

    /// A movement ends here. The middle of an instruction is no place to stand at: it is left backwards.
    fn interrupted(&mut self) -> Result<DebugError, DebugError> {
        let icount = self.machine.icount().0;
        if self.machine.is_unfinished() {
            self.go_to(icount, &mut |_| false)?;
        }
        Ok(DebugError::Interrupted { icount })
    }

    /// Runs one slice towards `icount`.
    fn run_slice(&mut self, icount: u64) -> Result<Pause, DebugError> {
        self.take_seed();
        let now = self.machine.icount().0;
        let point = self.subject.next_branch_point(now).filter(|_| self.floor.is_none());
        let slice = ((now / SLICE + 1) * SLICE).min(point.unwrap_or(u64::MAX));
        let limits = Limits { pause_when_long: true, ..Limits::until(Icount(icount.min(slice))) };
        let pause = self.machine.run(limits)?;
        self.machine.take_output();
        self.machine.take_inputs();
        self.about_to_execute = None;
        self.first_moment = matches!(pause, Pause::Limit);
        self.take_seed();
        Ok(pause)
    }

    /// Where a run left its parent it got another seed; the state of that moment has it already.
    fn take_seed(&mut self) {
        if self.floor.is_none()
            && self.first_moment
            && let Some(seed) = self.subject.seed_at(self.machine.icount().0)
        {
            self.machine.rekey(seed);
        }
    }

    fn ended_before(&mut self, target: u64, ended: Ended) -> DebugError {
        let icount = self.machine.icount().0;
        match &self.end {
            Some((end, recorded)) if self.floor.is_none() => {
                DebugError::NotRepeated { now: ended, icount, recorded: format!("{recorded} at icount {end}") }
            }
            _ => {
                self.end = Some((icount, ended.clone()));
                DebugError::BeyondEnd { target, end: icount, ended }
            }
        }
    }
}
