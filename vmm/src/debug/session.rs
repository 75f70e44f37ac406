//! Standing at a moment of a run, and going to another.

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

    // Stepping -------------------------------------------------------------------------------------------------

    /// Goes one instruction forward, to the first moment after it.
    pub fn step(&mut self, wanted: &Wanted) -> Result<StopReason, DebugError> {
        let target = self.machine.icount().0 + 1;
        if let Some(end) = self.is_at_end() {
            return Ok(StopReason::End(end));
        }
        // Breakpoints are behind a single step's back; watchpoints are told.
        let plan = Plan::new(&Wanted { breakpoints: Vec::new(), ..wanted.clone() }, &self.machine);
        if !plan.observation().watchpoints.is_empty() {
            self.observe(plan.observation());
        }
        let mut event = None;
        loop {
            let pause = self.run_slice(target)?;
            for hit in self.machine.take_hits() {
                event = event.or_else(|| plan.accept(&hit, &self.machine));
            }
            match pause {
                Pause::Ended(ended) => {
                    self.end.get_or_insert((self.machine.icount().0, ended.clone()));
                    return Ok(StopReason::End(ended));
                }
                _ if self.machine.icount().0 >= target => break,
                _ => {}
            }
        }
        self.first_moment = true;
        Ok(event.map_or(StopReason::Step, StopReason::Event))
    }

    /// Goes one instruction back.
    pub fn step_back(&mut self, watcher: Watcher) -> Result<StopReason, DebugError> {
        let now = self.position();
        // From the last moment of an icount the first one is a step, if the two differ.
        if !self.first_moment {
            let rip = self.machine.cpu().rip;
            self.go_to(now.icount, watcher)?;
            if self.machine.cpu().rip != rip {
                return Ok(StopReason::Step);
            }
        }
        if now.icount <= self.floor.unwrap_or(0) {
            return Ok(StopReason::Beginning);
        }
        self.go_to(now.icount - 1, watcher)?;
        Ok(StopReason::Step)
    }

    fn is_at_end(&self) -> Option<Ended> {
        let (end, ended) = self.end.as_ref()?;
        (self.machine.icount().0 >= *end).then(|| ended.clone())
    }

    /// Goes on until something wanted is found.
    pub fn resume(
        &mut self,
        direction: Direction,
        wanted: &Wanted,
        watcher: Watcher,
    ) -> Result<StopReason, DebugError> {
        match direction {
            Direction::Forward => self.forward(wanted, watcher),
            Direction::Backward => self.backward(wanted, watcher),
        }
    }

    fn forward(&mut self, wanted: &Wanted, watcher: Watcher) -> Result<StopReason, DebugError> {
        let plan = Plan::new(wanted, &self.machine);
        self.observe(plan.observation());
        self.machine.take_hits();
        self.machine.pass_breakpoint();
        let mut last_kept = self.kept.at_or_before(self.machine.icount()).map_or(0, |kept| kept.0);
        loop {
            if let Some(ended) = self.is_at_end() {
                return Ok(StopReason::End(ended));
            }
            let limit = self.end.as_ref().map_or(u64::MAX, |(end, _)| *end);
            let pause = self.run_slice(limit)?;
            let now = self.machine.icount().0;
            if let Some(event) = self.first_event(&plan) {
                self.settle_at(event, watcher)?;
                return Ok(StopReason::Event(event));
            }
            match pause {
                Pause::Ended(ended) => {
                    self.end.get_or_insert((now, ended.clone()));
                    return Ok(StopReason::End(ended));
                }
                Pause::Limit if now - last_kept >= SPACING => {
                    self.machine.checkpoint(&mut self.kept);
                    last_kept = now;
                }
                _ => {}
            }
            if watcher(now) {
                self.interrupted()?;
                self.make_first_moment(watcher)?;
                return Ok(StopReason::Interrupted);
            }
        }
    }

    /// After an interruption anywhere: goes on to the next first moment of an icount.
    fn make_first_moment(&mut self, watcher: Watcher) -> Result<(), DebugError> {
        if self.first_moment {
            return Ok(());
        }
        let next = self.machine.icount().0 + 1;
        self.advance(next, watcher)
    }

    fn first_event(&mut self, plan: &Plan) -> Option<Event> {
        let hits = self.machine.take_hits();
        hits.iter().find_map(|hit| plan.accept(hit, &self.machine))
    }

    /// Stands where a forward movement shows an event: before a breakpoint's instruction, behind an access.
    fn settle_at(&mut self, event: Event, watcher: Watcher) -> Result<(), DebugError> {
        match event.what {
            What::Breakpoint { rip } => {
                self.about_to_execute = Some(rip);
                Ok(())
            }
            What::Access { .. } => {
                let after = event.icount + 1;
                if self.machine.icount().0 == after {
                    // The engine stopped behind the instruction, before anything else happened.
                    self.first_moment = true;
                    return Ok(());
                }
                if self.end.as_ref().is_some_and(|(end, _)| after > *end) {
                    return Ok(());
                }
                self.go_to(after, watcher)
            }
        }
    }

    fn backward(&mut self, wanted: &Wanted, watcher: Watcher) -> Result<StopReason, DebugError> {
        let found = match self.last_before(wanted, watcher) {
            Err(DebugError::Interrupted { .. }) => return Ok(StopReason::Interrupted),
            found => found?,
        };
        match found {
            Some(event) => {
                let about_to_execute = match event.what {
                    What::Breakpoint { rip } => Some(rip),
                    What::Access { .. } => None,
                };
                self.go_to_position(Position { icount: event.icount, about_to_execute }, watcher)?;
                Ok(StopReason::Event(event))
            }
            None => {
                self.go_to(self.floor.unwrap_or(0), watcher)?;
                Ok(StopReason::Beginning)
            }
        }
    }

    /// The last event before the present. The session's moment is another one afterwards, unless the search is
    /// interrupted by the watcher: then it is the same one as before.
    pub fn last_before(&mut self, wanted: &Wanted, watcher: Watcher) -> Result<Option<Event>, DebugError> {
        let present = self.position();
        let plan = Plan::new(wanted, &self.machine);
        let mut end = present;
        while let Some(begin) = self.segment_before(end)? {
            let found = match watcher(begin) {
                true => Err(DebugError::Interrupted { icount: begin }),
                false => self.scan(begin, end, &plan, watcher),
            };
            match found {
                Err(interrupted @ DebugError::Interrupted { .. }) => {
                    self.go_to_position(present, &mut |_| false)?;
                    return Err(interrupted);
                }
                Ok(None) => end = Position { icount: begin, about_to_execute: None },
                found => return found,
            }
        }
        Ok(None)
    }

    /// Goes to the last kept moment before `end`; None if there is nothing before it.
    fn segment_before(&mut self, end: Position) -> Result<Option<u64>, DebugError> {
        let before = if end.about_to_execute.is_some() { end.icount } else { end.icount.saturating_sub(1) };
        let beginning = self.floor.unwrap_or(0);
        if end.icount <= beginning && (end.about_to_execute.is_none() || end.icount < beginning) {
            return Ok(None);
        }
        match self.kept.at_or_before(Icount(before)) {
            Some(point) => self.return_to(point.0),
            None => self.reopen(before)?,
        }
        Ok(Some(self.machine.icount().0))
    }

    /// The last event from here, `begin`, up to but without `end`.
    fn scan(&mut self, begin: u64, end: Position, plan: &Plan, watcher: Watcher) -> Result<Option<Event>, DebugError> {
        debug_assert_eq!(self.machine.icount().0, begin);
        self.observe(plan.observation());
        self.machine.take_hits();
        let mut last = None;
        for mark in self.marks(end.icount).into_iter().chain([end.icount]) {
            self.scan_to(mark, plan, &mut last, watcher)?;
            if mark < end.icount {
                self.machine.checkpoint(&mut self.kept);
            }
        }
        let Some(rip) = end.about_to_execute else { return Ok(last) };
        // What happens at the last icount before its instruction.
        let mut observation = plan.observation().clone();
        observation.breakpoints.push(rip);
        self.observe(&observation);
        while self.machine.icount().0 == end.icount {
            if let Pause::Ended(_) = self.run_slice(end.icount + 1)? {
                break;
            }
            for hit in self.machine.take_hits() {
                if matches!(hit, orrery_cpu::engine::Hit::Breakpoint { rip: at, .. } if at == rip) {
                    return Ok(last);
                }
                last = plan.accept(&hit, &self.machine).or(last);
            }
        }
        Ok(last)
    }

    fn scan_to(
        &mut self,
        icount: u64,
        plan: &Plan,
        last: &mut Option<Event>,
        watcher: Watcher,
    ) -> Result<(), DebugError> {
        let mut looked = self.machine.icount().0;
        loop {
            let now = self.machine.icount().0;
            if now >= icount && self.first_moment {
                return Ok(());
            }
            let pause = self.run_slice(icount)?;
            for hit in self.machine.take_hits() {
                *last = plan.accept(&hit, &self.machine).or(*last);
            }
            let now = self.machine.icount().0;
            match pause {
                Pause::Ended(ended) if now < icount => return Err(self.ended_before(icount, ended)),
                // An access by the last instruction stops the engine behind it: that is the target's first moment.
                _ if now >= icount => {
                    self.first_moment = true;
                    return Ok(());
                }
                _ => {}
            }
            if now - looked >= SLICE || pause == Pause::Unfinished {
                looked = now;
                if watcher(now) {
                    return Err(self.interrupted()?);
                }
            }
        }
    }

    /// Runs on to `icount`, observing, and hands out every hit with the machine as it is then, which may be some
    /// instructions later.
    pub fn gather(
        &mut self,
        icount: u64,
        observation: &Observation,
        watcher: Watcher,
        mut each: impl FnMut(&Machine, orrery_cpu::engine::Hit) -> bool,
    ) -> Result<(), DebugError> {
        self.check_target(icount)?;
        self.observe(observation);
        self.machine.take_hits();
        let mut looked = self.machine.icount().0;
        loop {
            let pause = self.run_slice(icount)?;
            for hit in self.machine.take_hits() {
                if !each(&self.machine, hit) {
                    return Ok(());
                }
            }
            let now = self.machine.icount().0;
            match pause {
                Pause::Ended(ended) if self.end.is_none() || self.floor.is_some() => {
                    self.end.get_or_insert((now, ended));
                    return Ok(());
                }
                Pause::Ended(ended) if now < icount => return Err(self.ended_before(icount, ended)),
                _ if now >= icount => return Ok(()),
                _ => {}
            }
            if now - looked >= SLICE || pause == Pause::Unfinished {
                looked = now;
                if watcher(now) {
                    return Err(self.interrupted()?);
                }
            }
        }
    }

    /// Runs on until a complete line of output has left the machine; None if the run ends first.
    pub fn next_console_line(&mut self) -> Result<Option<String>, DebugError> {
        self.observe(&Observation::default());
        let mut line = Vec::new();
        loop {
            self.take_seed();
            let end = self.end.as_ref().map_or(u64::MAX, |(end, _)| *end);
            let point = self.subject.next_branch_point(self.machine.icount().0).filter(|_| self.floor.is_none());
            let limit = end.min(point.unwrap_or(u64::MAX));
            let limits = Limits { pause_on_output: true, ..Limits::until(Icount(limit)) };
            let pause = self.machine.run(limits)?;
            (self.first_moment, self.about_to_execute) = (true, None);
            for output in self.machine.take_output() {
                if output.channel == "console" {
                    line.extend(output.bytes);
                }
            }
            if line.ends_with(b"\n") {
                return Ok(Some(String::from_utf8_lossy(&line).trim_end().to_owned()));
            }
            match pause {
                Pause::Output => {}
                Pause::Limit if self.machine.icount().0 < end => {}
                _ => return Ok(None),
            }
        }
    }
}
