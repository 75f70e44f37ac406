//! Runs many cases on both sides and gathers the disagreements by cause.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use iced_x86::{Code, Mnemonic};

use orrery_cpu::engine::Undefined;

use crate::case::{Case, Executor, Outcome, Refusal};
use crate::compare::{self, Difference, Tolerance};
use crate::generate::sequence;
use crate::guest::Guest;
use crate::native::{Native, reset_floating_point, scans};
use crate::rng::Rng;

/// Ends the process if a case takes more than a minute, naming it: a program without end, on either side.
struct Watchdog {
    current: Arc<Mutex<Option<(u64, Case)>>>,
}

impl Watchdog {
    fn start() -> Watchdog {
        let current: Arc<Mutex<Option<(u64, Case)>>> = Arc::default();
        let watched = Arc::downgrade(&current);
        std::thread::spawn(move || {
            let mut last = 0;
            loop {
                std::thread::sleep(Duration::from_secs(60));
                let Some(current) = watched.upgrade() else {
                    return;
                };
                let Ok(guard) = current.lock() else { return };
                if let Some((number, case)) = guard.as_ref() {
                    if *number == last {
                        eprintln!("no end in sight:\n{}", compare::describe(case));
                        std::process::abort();
                    }
                    last = *number;
                }
            }
        });
        Watchdog { current }
    }

    fn see(&self, number: u64, case: &Case) {
        if let Ok(mut guard) = self.current.lock() {
            *guard = Some((number, case.clone()));
        }
    }
}

/// One kind of disagreement: how often, and the smallest case seen.
struct Kind {
    count: u64,
    /// Names of some instructions that show it.
    codes: BTreeSet<String>,
    case: Case,
    differences: Vec<Difference>,
}

/// Both sides and what they disagreed about.
pub struct Campaign {
    native: Native,
    guest: Guest,
    make_guest: Box<dyn Fn() -> Guest>,
    tolerance: Tolerance,
    watchdog: Watchdog,
    trace: bool,
    runs: u64,
    kinds: BTreeMap<String, Kind>,
    refusals: BTreeMap<String, (u64, Case)>,
    /// Cases of one instruction, and of several.
    pub cases: [u64; 2],
    /// Cases about which the two sides disagreed, or that one of them refused.
    pub differed: u64,
    /// How often each instruction was compared, and how often it ran without an exception.
    pub covered: BTreeMap<Code, [u64; 2]>,
    endings: [u64; 32],
}

/// Whether the host can count by stepping: TF and ID must not be seen, and gathers behave differently with it.
fn can_count(case: &Case) -> bool {
    !case.instructions.iter().any(|i| {
        matches!(
            i.mnemonic(),
            Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq | Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq
        ) || i.is_vsib()
    })
}

impl Campaign {
    /// A campaign against the guests that `make_guest` makes. `supervisor` says that they run cases at CPL 0.
    pub fn new(make_guest: Box<dyn Fn() -> Guest>, supervisor: bool) -> Campaign {
        // The engine's handlers come first: those of the host's side lie over them.
        let guest = make_guest();
        let mut native = Native::new();
        let (scans, others): (Vec<_>, Vec<_>) =
            Undefined::measured().kinds().partition(|(name, _)| matches!(name.as_str(), "Bsf" | "Bsr"));
        native.corrects_scans = !scans.is_empty();
        Campaign {
            native,
            guest,
            make_guest,
            tolerance: Tolerance { undefined_flags: !others.is_empty(), user_bit: supervisor },
            watchdog: Watchdog::start(),
            trace: std::env::var_os("ORACLE_TRACE").is_some(),
            runs: 0,
            kinds: BTreeMap::new(),
            refusals: BTreeMap::new(),
            cases: [0; 2],
            differed: 0,
            covered: BTreeMap::new(),
            endings: [0; 32],
        }
    }

    fn differences(&mut self, case: &Case) -> Result<Vec<Difference>, String> {
        self.runs += 1;
        self.watchdog.see(self.runs, case);
        self.native.count = can_count(case) && Rng::new(case.seed).one_in(8);
        let expected = self.native.run(case);
        self.native.count = false;
        let expected = match expected {
            Ok(expected) => expected,
            Err(Refusal::Endless) => return Ok(Vec::new()),
            Err(Refusal::Lacks(what)) => return Err(what),
        };
        self.endings[usize::from(expected.ending.vector & 31)] += 1;
        for instruction in &case.instructions {
            let counts = self.covered.entry(instruction.code()).or_default();
            counts[0] += 1;
            counts[1] += u64::from(expected.ending.vector == 3);
        }
        let got = self.run_guest(case)?;
        let mut differences = compare::outcomes(case, &expected, &got, self.tolerance);
        if compare::left_the_model(case, &expected, &got, &self.guest) {
            return Ok(Vec::new());
        }
        differences.extend(compare::memory(case, &self.native, &self.guest));
        Ok(differences)
    }

    /// Runs a case in the engine. An assertion of the engine that fails is a refusal, and costs it its life.
    fn run_guest(&mut self, case: &Case) -> Result<Outcome, String> {
        let guest = &mut self.guest;
        match catch_unwind(AssertUnwindSafe(|| guest.run(case))) {
            Ok(outcome) => outcome.map_err(|refusal| match refusal {
                Refusal::Endless => "endless".to_string(),
                Refusal::Lacks(what) => what,
            }),
            Err(payload) => {
                reset_floating_point();
                self.guest = (self.make_guest)();
                let message = payload.downcast_ref::<String>().map_or("", String::as_str);
                Err(format!("panic: {}", message.chars().filter(|c| !c.is_ascii_digit()).collect::<String>()))
            }
        }
    }

    /// Runs one case on both sides, unless the host's flags of bit scans would show where it cannot be stepped.
    pub fn check(&mut self, case: &Case) {
        if self.native.corrects_scans && case.instructions.iter().any(scans) && !can_count(case) {
            return;
        }
        self.cases[usize::from(case.instructions.len() > 1)] += 1;
        if self.trace {
            eprintln!("{}", compare::describe(case));
        }
        match self.differences(case) {
            Ok(differences) if differences.is_empty() => {}
            Ok(differences) => {
                self.differed += 1;
                let (case, differences) = self.minimise(case.clone(), differences);
                let class = compare::class_of(&case, &differences);
                let kind = self.kinds.entry(class).or_insert_with(|| Kind {
                    count: 0,
                    codes: BTreeSet::new(),
                    case: case.clone(),
                    differences: differences.clone(),
                });
                kind.count += 1;
                if kind.codes.len() < 40 && case.instructions.len() == 1 {
                    kind.codes.insert(format!("{:?}", case.instructions[0].code()));
                }
                if case.instructions.len() < kind.case.instructions.len() {
                    kind.case = case;
                    kind.differences = differences;
                }
            }
            Err(refusal) => {
                self.differed += 1;
                let mut name = refusal;
                if let [one] = case.instructions.as_slice() {
                    let _ = write!(name, " ({:?})", one.mnemonic());
                }
                self.refusals.entry(name).or_insert_with(|| (0, case.clone())).0 += 1;
            }
        }
    }

    /// Drops instructions for as long as the two sides disagree.
    fn minimise(&mut self, mut case: Case, mut differences: Vec<Difference>) -> (Case, Vec<Difference>) {
        let mut index = 0;
        while case.instructions.len() > 2 && index + 1 < case.instructions.len() {
            // Removing a counter's start or step would leave a loop without end.
            let counts = matches!(case.instructions[index].code(), Code::Dec_rm64 | Code::Mov_r32_imm32);
            let smaller = if counts { None } else { sequence::without(&case, index) };
            let Some(smaller) = smaller else {
                index += 1;
                continue;
            };
            match self.differences(&smaller) {
                Ok(still) if !still.is_empty() => {
                    case = smaller;
                    differences = still;
                }
                _ => index += 1,
            }
        }
        (case, differences)
    }

    /// Everything that went wrong, in words; empty if nothing did.
    pub fn report(&self) -> String {
        let mut text = String::new();
        let mut kinds: Vec<_> = self.kinds.iter().collect();
        kinds.sort_by_key(|(_, kind)| std::cmp::Reverse(kind.count));
        for (class, kind) in kinds {
            let _ = writeln!(text, "=== {} times: {class}", kind.count);
            if kind.codes.len() > 1 {
                let _ = writeln!(text, "  in {}", kind.codes.iter().cloned().collect::<Vec<_>>().join(" "));
            }
            text.push_str(&compare::describe(&kind.case));
            for difference in &kind.differences {
                let _ = writeln!(text, "  * {}", difference.detail);
            }
        }
        for (name, (count, case)) in &self.refusals {
            let _ = writeln!(text, "=== {count} times refused: {name}\n{}", compare::describe(case));
        }
        text
    }

    /// One line about what ran.
    pub fn summary(&self) -> String {
        let endings: Vec<_> = (0..).zip(self.endings).filter(|(_, count)| *count > 0).collect();
        format!(
            "{} instructions, {} sequences, {} opcodes, {} differences of {} kinds; endings {endings:?}",
            self.cases[0],
            self.cases[1],
            self.covered.len(),
            self.differed,
            self.kinds.len() + self.refusals.len(),
        )
    }
}
