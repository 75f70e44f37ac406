//! The benchmark of a branch's first million instructions, against the same million of a machine that goes on without
//! having been frozen.
//!
//! Two machines run the same way. At some moments the one is frozen, and branches of it run a million instructions each;
//! the other just goes on, so its figure is what those instructions cost where nobody branches: with all that it has
//! translated so far, and what is new in them to be translated.

use std::time::Instant;

use anyhow::Result;
use orrery_guest_image::Image;
use orrery_vmm::{Machine, MachineConfig, Template};

use super::percentiles::{Line, micros_since};
use super::snapshots::{page_faults, run};

/// What is measured of each branch.
const MILLION: u64 = 1_000_000;
/// Branches of each moment: one after the other, each dropped before the next is made.
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

/// Measures the line of an image: `p50_us` and `p99_us` are those of branches, one in four of which is the first of its
/// template.
pub fn measure(name: &str, image: &Image, course: &Course) -> Result<Line> {
    let config = MachineConfig { memory_mib: 512, ..Default::default() };
    let machine = || Machine::new(image, &config, orrery_vmm::Seed(1), Default::default());
    let (mut alone, mut parent) = (machine()?, machine()?);
    run(&mut alone, course.from)?;
    run(&mut parent, course.from)?;
    let mut samples = Samples::default();
    for moment in 0..course.moments {
        let taken = million(&mut alone)?;
        samples.parent.push(taken);
        run(&mut alone, course.step - MILLION)?;
        samples.branches(&parent.freeze()?, taken)?;
        if moment % COLD_EVERY == 0 {
            let saved = parent.save();
            let template = Machine::restore(image, &saved, Default::default())?.freeze()?;
            samples.cold.push(million(&mut template.branch(template.seed(), None)?)?);
        }
        run(&mut parent, course.step)?;
    }
    Ok(samples.line(name))
}

#[derive(Default)]
struct Samples {
    branch: Vec<f64>,
    /// Of these, the first of each template.
    new: Vec<f64>,
    new_faults: Vec<f64>,
    /// What a branch took, as a multiple of what its parent did.
    ratio: Vec<f64>,
    new_ratio: Vec<f64>,
    parent: Vec<f64>,
    cold: Vec<f64>,
    dropped: Vec<f64>,
}

impl Samples {
    /// Branches of one moment, whose million its parent has done in `parent` microseconds.
    fn branches(&mut self, template: &Template, parent: f64) -> Result<()> {
        for index in 0..BRANCHES {
            let mut child = template.branch(template.seed(), None)?;
            let faults = page_faults()?;
            let taken = million(&mut child)?;
            if index == 0 {
                self.new.push(taken);
                self.new_faults.push(page_faults()? - faults);
                self.new_ratio.push(taken / parent);
            }
            self.branch.push(taken);
            self.ratio.push(taken / parent);
            let before = Instant::now();
            drop(child);
            self.dropped.push(micros_since(before));
        }
        Ok(())
    }

    fn line(self, name: &str) -> Line {
        let median = |samples| Line::of("", samples).p50_us;
        Line::of(name, self.branch)
            .with("parent_p50_us", median(self.parent))
            .with("to_parent_p50", median(self.ratio))
            .with("new_p50_us", median(self.new))
            .with("new_to_parent_p50", median(self.new_ratio))
            .with("new_page_faults_p50", median(self.new_faults))
            .with("cold_p50_us", median(self.cold))
            .with("dropping_p50_us", median(self.dropped))
    }
}

fn million(machine: &mut Machine) -> Result<f64> {
    let before = Instant::now();
    run(machine, MILLION)?;
    Ok(micros_since(before))
}
