//! `orrery profile`.

use std::fs::File;
use std::io::{BufWriter, Write};

use orrery_cpu::Icount;
use serde::Serialize;

use super::args::ProfileArgs;
use super::exit::{self, Failure};
use super::place::{Place, Progress, moment_failure};
use crate::inspect::profile::{Line, Profile, interval_near};
use crate::moment::{Moment, MomentError, advance};

/// Samples that are taken if no interval is given, about.
const SAMPLES: u64 = 10_000;

#[derive(Serialize)]
struct Report {
    run: String,
    from: u64,
    to: u64,
    every: u64,
    samples: u64,
    processes: Vec<(String, u64)>,
    functions: Vec<Line>,
}

pub(super) fn profile(arguments: ProfileArgs) -> Result<u8, Failure> {
    let place = Place::find(&arguments.run, &arguments.reach)?;
    let (from, to) = (arguments.from, place.icount(arguments.to)?);
    if to <= from {
        return Err(Failure::new(exit::USAGE, format!("there is nothing between icount {from} and {to}")));
    }
    let every = arguments.every.unwrap_or_else(|| interval_near((to - from) / SAMPLES));
    let mut profile = Profile::new(arguments.flat);
    let Moment { run, mut machine, .. } = place.moment(Some(Icount(from)))?;
    let progress = Progress::new("sampling", to);
    let mut watcher = progress.watcher();
    let mut next = from.saturating_add(every);
    while next <= to {
        match advance(&mut machine, &run.manifest, Icount(next), &mut |_| {}) {
            Ok(()) => {}
            Err(MomentError::BeyondEnd { .. }) => break,
            Err(error) => return Err(moment_failure(error)),
        }
        // A run can end right at the last sample.
        if machine.ended().is_some() {
            break;
        }
        profile.sample(&machine);
        watcher(next);
        next = next.saturating_add(every);
    }
    progress.finish();
    let title = format!("{}, icount {from} to {to}, a sample every {every} instructions", run.id());
    if let Some(path) = &arguments.svg {
        let file = File::create(path)
            .map_err(|error| Failure::new(exit::STORE, format!("cannot create {}: {error}", path.display())))?;
        let mut file = BufWriter::new(file);
        profile
            .flame_graph(&title, every, &mut file)
            .and_then(|()| file.flush())
            .map_err(|error| Failure::new(exit::STORE, format!("cannot write {}: {error}", path.display())))?;
        eprintln!("orrery: the flame graph is in {}", path.display());
    }
    let report = Report {
        run: run.id().to_owned(),
        from,
        to,
        every,
        samples: profile.samples(),
        processes: profile.processes(),
        functions: profile.lines(),
    };
    if arguments.folded {
        profile.folded().iter().for_each(super::say);
    } else if arguments.json {
        super::say(serde_json::to_string(&report).expect("a report is plain data"));
    } else {
        print(&report, &title, arguments.top);
    }
    Ok(0)
}

fn print(report: &Report, title: &str, top: usize) {
    let part = |count: u64| 100.0 * count as f64 / report.samples.max(1) as f64;
    say!("{title}: {} samples", report.samples);
    for (process, count) in report.processes.iter().take(8) {
        say!("  {:5.1} %  process {process}", part(*count));
    }
    say!("{:>8} {:>8}  FUNCTION", "SELF", "TOTAL");
    for line in report.functions.iter().take(top) {
        say!("{:>6.2} % {:>6.2} %  {}", part(line.own), part(line.total), line.function);
    }
    let left = report.functions.len().saturating_sub(top);
    if left > 0 {
        say!("and {left} more; --top N shows them");
    }
}
