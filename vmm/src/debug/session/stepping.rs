//! Going on or back to the next thing that is wanted.

use super::*;

impl Session {
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
