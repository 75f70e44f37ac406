//! `orrery profile`.

use std::fs::File;
use std::io::{BufWriter, Write};

use serde::Serialize;

use super::args::ProfileArgs;
use super::exit::{self, Failure};
use super::standing;
use crate::inspect::profile::{Line, Profile, interval_near};

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
    let mut standing = standing::open_run(&arguments.place, &arguments.run, arguments.from)?;
    let from = standing.machine().icount().0;
    let Some(to) = arguments.to.or(standing.end()) else {
        let text = format!("run {} did not end in order, so its end is not known; give --to ICOUNT", standing.id());
        return Err(Failure::new(exit::USAGE, text));
    };
    if to <= from {
        return Err(Failure::new(exit::USAGE, format!("there is nothing between icount {from} and {to}")));
    }
    let every = arguments.every.unwrap_or_else(|| interval_near((to - from) / SAMPLES));
    let mut profile = Profile::new(arguments.flat);
    let bar = standing::bar(to);
    let mut next = from.saturating_add(every);
    while next <= to {
        // A run can end right at the last sample.
        if standing.advance(next)? {
            break;
        }
        profile.sample(standing.machine());
        bar.set_position(next);
        next = next.saturating_add(every);
    }
    bar.finish_and_clear();
    let title = format!("{}, icount {from} to {to}, a sample every {every} instructions", standing.id());
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
        run: standing.id().to_owned(),
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
