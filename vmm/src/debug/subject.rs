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
        let Ok(text) = std::fs::read_to_string(self.run.path.join(directory::CONSOLE)) else { return Vec::new() };
        let mut lines: std::collections::VecDeque<(u64, String)> = Default::default();
        for (at, line) in console_lines(&text) {
            if at > icount {
                break;
            }
            if lines.len() == count {
                lines.pop_front();
            }
            lines.push_back((at, line.to_owned()));
        }
        lines.into()
    }

    /// Icount of the first line of the console that contains a text, and the line.
    pub fn console_find(&self, wanted: &str) -> Result<Option<(u64, String)>, DebugError> {
        let path = self.run.path.join(directory::CONSOLE);
        let text = std::fs::read_to_string(&path).map_err(|source| directory::io_error("read", &path)(source))?;
        Ok(console_lines(&text).find(|(_, line)| line.contains(wanted)).map(|(at, line)| (at, line.to_owned())))
    }
}

/// Lines of a console log: the icount and the text.
fn console_lines(text: &str) -> impl Iterator<Item = (u64, &str)> {
    text.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ' ');
        let icount = parts.next()?.parse().ok()?;
        parts.next()?;
        Some((icount, parts.next().unwrap_or("").trim_end_matches("\\n").trim_end_matches("\\r")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn console_logs_are_read() {
        let text = "5 6 hey\\r\\n\n7 8 z\\x01\nbad\n9 9 \n";
        let lines: Vec<_> = console_lines(text).collect();
        assert_eq!(lines, [(5, "hey"), (7, "z\\x01"), (9, "")]);
    }
}
