//! The benchmark of a branch's first million instructions, against the same million of a machine that goes on without
//! having been frozen.
//!
//! Two machines run the same way. At some moments the one is frozen, and branches of it run a million instructions each;
//! the other just goes on, so its figure is what those instructions cost where nobody branches: with all that it has
//! translated so far, and what is new in them to be translated. Branches are of four kinds: the first of a template, in
//! the memory of the one that has looked ahead; recycled ones, each with a seed of its own, in the memory of one that was
//! dropped just before; and ones that live at once, in RAM that nobody has used, or that was [prepared](Template::prepare)
//! for them.

use std::time::Instant;

use anyhow::Result;
use orrery_guest_image::Image;
use orrery_vmm::{Machine, MachineConfig, SPARES_MAX, Seed, Template};

use super::percentiles::{Line, micros_since};
use super::snapshots::{page_faults, run};

/// What is measured of each branch.
const MILLION: u64 = 1_000_000;
/// Branches of each moment, of each kind but the first.
const BRANCHES: usize = 4;
/// Every so many moments a branch without translations runs, too.
const COLD_EVERY: usize = 8;

/// Where a guest is measured.
pub struct Course {
    /// Instructions before the first moment.
    pub from: u64,
    /// Instructions from one moment to the next; more than a million.
    pub step: u64,
    /// How many moments.
    pub moments: usize,
}

impl Course {
    /// Moments of a guest from there on.
    pub fn new(from: u64, step: u64, rounds: usize) -> Course {
        Course { from, step, moments: rounds.clamp(1, 40) }
    }
}

/// Measures the line of an image: `p50_us` and `p99_us` are those of recycled branches.
pub fn measure(name: &str, image: &Image, course: &Course) -> Result<Line> {
    let config = MachineConfig { memory_mib: 512, ..Default::default() };
    let machine = || Machine::new(image, &config, Seed(1), Default::default());
    let (mut alone, mut parent) = (machine()?, machine()?);
    run(&mut alone, course.from)?;
    run(&mut parent, course.from)?;
    let mut samples = Samples::default();
    for moment in 0..course.moments {
        let taken = million(&mut alone)?;
        samples.parent.push(taken);
        run(&mut alone, course.step - MILLION)?;
        let before = Instant::now();
        let template = parent.freeze_only()?;
        samples.frozen.push(micros_since(before));
        let before = Instant::now();
        template.learn();
        samples.learned.push(micros_since(before));
        samples.branches(&template, taken, moment)?;
        if moment % COLD_EVERY == 0 {
            let saved = parent.save();
            let template = Machine::restore(image, &saved, Default::default())?.freeze_only()?;
            samples.cold.push(million(&mut template.branch(template.seed(), None)?)?);
        }
        run(&mut parent, course.step)?;
    }
    Ok(samples.line(name))
}

/// Branches of one kind.
#[derive(Default)]
struct Kind {
    micros: Vec<f64>,
    /// The same as a multiple of what the parent took.
    ratio: Vec<f64>,
    faults: Vec<f64>,
}

impl Kind {
    /// Runs a branch whose million its parent has done in `parent` microseconds.
    fn run(&mut self, machine: &mut Machine, parent: f64) -> Result<()> {
        let faults = page_faults()?;
        let taken = million(machine)?;
        self.faults.push(page_faults()? - faults);
        self.micros.push(taken);
        self.ratio.push(taken / parent);
        Ok(())
    }
}

#[derive(Default)]
struct Samples {
    first: Kind,
    recycled: Kind,
    live: Kind,
    prepared: Kind,
    parent: Vec<f64>,
    cold: Vec<f64>,
    dropped: Vec<f64>,
    frozen: Vec<f64>,
    learned: Vec<f64>,
}

impl Samples {
    /// Branches of one moment, whose million its parent has done in `parent` microseconds.
    fn branches(&mut self, template: &Template, parent: f64, moment: usize) -> Result<()> {
        let mut first = template.branch(template.seed(), None)?;
        self.first.run(&mut first, parent)?;
        drop(first);
        for index in 0..BRANCHES {
            // No other branch has had this seed.
            let seed = Seed(1_000 + (moment * BRANCHES + index) as u64);
            let mut child = template.branch(seed, None)?;
            self.recycled.run(&mut child, parent)?;
            let before = Instant::now();
            drop(child);
            self.dropped.push(micros_since(before));
        }
        // They take all memory that earlier branches have left.
        let idle: Vec<_> = (0..SPARES_MAX).map(|_| template.branch(template.seed(), None)).collect::<Result<_, _>>()?;
        let mut live = Vec::new();
        for prepared in [false, true] {
            if prepared {
                template.prepare(BRANCHES, MILLION)?;
            }
            for _ in 0..BRANCHES {
                let mut child = template.branch(template.seed(), None)?;
                if prepared { &mut self.prepared } else { &mut self.live }.run(&mut child, parent)?;
                live.push(child);
            }
        }
        drop(idle);
        Ok(())
    }

    fn line(self, name: &str) -> Line {
        let median = |samples| Line::of("", samples).p50_us;
        Line::of(name, self.recycled.micros)
            .with("to_parent_p50", median(self.recycled.ratio))
            .with("page_faults_p50", median(self.recycled.faults))
            .with("first_p50_us", median(self.first.micros))
            .with("first_to_parent_p50", median(self.first.ratio))
            .with("first_page_faults_p50", median(self.first.faults))
            .with("live_p50_us", median(self.live.micros))
            .with("live_to_parent_p50", median(self.live.ratio))
            .with("live_page_faults_p50", median(self.live.faults))
            .with("prepared_p50_us", median(self.prepared.micros))
            .with("prepared_to_parent_p50", median(self.prepared.ratio))
            .with("prepared_page_faults_p50", median(self.prepared.faults))
            .with("parent_p50_us", median(self.parent))
            .with("cold_p50_us", median(self.cold))
            .with("dropping_p50_us", median(self.dropped))
            .with("freezing_p50_us", median(self.frozen))
            .with("learning_p50_us", median(self.learned))
    }
}

fn million(machine: &mut Machine) -> Result<f64> {
    let before = Instant::now();
    run(machine, MILLION)?;
    Ok(micros_since(before))
}
