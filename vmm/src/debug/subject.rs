//! Opening a run to look into it. The run's files are read and never written.

use orrery_cpu::Icount;
use orrery_guest_image::Image;

use super::DebugError;
use crate::config::Seed;
use crate::inputs::Input;
use crate::machine::Machine;
use crate::moment::{self, MomentOptions, RunReference};
use crate::run::directory;
use crate::run::manifest::Manifest;

/// A run that machines can be opened from.
pub struct Subject {
    run: RunReference,
    image: Image,
    inputs: Vec<Input>,
    options: MomentOptions,
}

impl Subject {
    /// Opens a run.
    pub fn open(run: RunReference, options: MomentOptions) -> Result<Subject, DebugError> {
        let image = run.image(options.image.as_deref())?;
        let inputs = run.inputs()?;
        Ok(Subject { run, image, inputs, options })
    }

    /// What the run was a function of, and how it ended.
    pub fn manifest(&self) -> &Manifest {
        &self.run.manifest
    }

    /// A machine that stands at some moment at or before `icount`: that of the nearest snapshot, or power-on. A damaged
    /// snapshot is passed over, since an earlier one does as well.
    pub fn machine_before(&self, icount: Icount) -> Result<Machine, DebugError> {
        let (manifest, engine) = (self.manifest(), &self.options.engine);
        let found = match self.options.from_power_on {
            true => None,
            false => moment::nearest(&self.run, &self.inputs, icount, &self.image, engine, &mut Vec::new()),
        };
        let mut machine = match found {
            Some(start) => start.machine,
            None => Machine::new(&self.image, &manifest.machine, Seed(manifest.seed), engine.clone())?,
        };
        machine.replay(self.inputs[machine.inputs_entered() as usize..].to_vec());
        Ok(machine)
    }

    /// The first moment after `icount` at which the run got another seed: there it left its parent.
    pub fn next_branch_point(&self, icount: u64) -> Option<u64> {
        self.manifest().branches.iter().map(|point| point.icount).filter(|at| *at > icount).min()
    }

    /// The seed that the run got at an icount, if it left its parent there.
    pub fn seed_at(&self, icount: u64) -> Option<Seed> {
        self.manifest().branches.iter().rfind(|point| point.icount == icount).map(|point| Seed(point.seed))
    }

    /// Lines of the console with their icount, up to `icount`, the last `count` of them. Empty if the log cannot be
    /// read: what is shown besides does not depend on it.
    pub fn console_until(&self, icount: u64, count: usize) -> Vec<(u64, String)> {
        let lines = directory::read_console(&self.run.path).unwrap_or_default();
        let end = lines.partition_point(|line| line.icount <= icount);
        let last = &lines[end.saturating_sub(count)..end];
        last.iter().map(|line| (line.icount, line.content().to_owned())).collect()
    }
}
