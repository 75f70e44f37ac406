//! `orrery trace`.

use std::io::{BufWriter, Write};

use super::args::TraceArgs;
use super::exit::{self, Failure};
use super::place::{Place, Progress, debug_failure};
use super::ps::printable;
use crate::debug::search::{self, Flow, Traced};

/// Deepest indentation.
const DEPTH_SHOWN_MAX: usize = 40;

/// `RUN@A..B`.
fn split(text: &str) -> Result<(&str, u64, u64), Failure> {
    let parse = || {
        let (run, span) = text.rsplit_once('@')?;
        let (from, to) = span.split_once("..")?;
        let number = |text: &str| text.replace('_', "").parse::<u64>().ok();
        Some((run, number(from)?, number(to)?)).filter(|(run, from, to)| !run.is_empty() && from <= to)
    };
    parse().ok_or_else(|| {
        let message = format!("{text:?} is not a span; write RUN@A..B, such as go-1-001@1000000..1000100");
        Failure::new(exit::USAGE, message)
    })
}

pub(super) fn trace(arguments: TraceArgs) -> Result<u8, Failure> {
    let (run, from, to) = split(&arguments.span)?;
    let place = Place::find(run, &arguments.reach)?;
    if let Some(outcome) = &place.run.manifest.outcome
        && to > outcome.icount
    {
        let (end, ended) = (outcome.icount, outcome.ended.clone());
        return Err(debug_failure(crate::debug::DebugError::BeyondEnd { target: to, end, ended }));
    }
    let mut session = place.session(from)?;
    let progress = Progress::new("tracing", to);
    let mut out = BufWriter::new(std::io::stdout());
    let mut depth = 0usize;
    let result = search::trace(&mut session, to, &mut progress.watcher(), |traced| {
        let text = if arguments.json {
            Some(serde_json::to_string(&traced).expect("plain data"))
                .filter(|_| !arguments.calls || traced.flow != Flow::Plain)
        } else if arguments.calls {
            call(&traced, &mut depth)
        } else {
            Some(line(&traced))
        };
        text.is_none_or(|text| writeln!(out, "{text}").is_ok())
    });
    progress.finish();
    let _ = out.flush();
    result.map_err(debug_failure)?;
    Ok(0)
}

fn line(traced: &Traced) -> String {
    let symbol = traced.symbol.as_deref().map_or(String::new(), printable);
    let mark = if traced.flow == Flow::Interrupted { "!" } else { " " };
    format!("{:>12}{mark}{:#018x} {symbol:<40} {}", traced.icount, traced.rip, traced.instruction)
}

/// A line for a call or a return, indented by the depth of calls.
fn call(traced: &Traced, depth: &mut usize) -> Option<String> {
    let name =
        |symbol: &Option<String>, address: u64| symbol.as_deref().map_or_else(|| format!("{address:#x}"), printable);
    let target = name(&traced.target_symbol, traced.target);
    let (text, at) = match traced.flow {
        Flow::Plain => return None,
        Flow::Call => {
            *depth += 1;
            (format!("call {target}"), *depth - 1)
        }
        Flow::SystemCall => {
            *depth += 1;
            (format!("enter {target}"), *depth - 1)
        }
        Flow::Interrupted => {
            *depth += 1;
            (format!("interrupt or exception: {}", name(&traced.symbol, traced.rip)), *depth - 1)
        }
        Flow::Return | Flow::SystemReturn => {
            *depth = depth.saturating_sub(1);
            (format!("back to {target}"), *depth)
        }
    };
    let indent = at.min(DEPTH_SHOWN_MAX) * 2;
    Some(format!("{:>12} {:indent$}{text}", traced.icount, ""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_read() {
        assert_eq!(split("go-1@5..1_000").unwrap(), ("go-1", 5, 1000));
        for wrong in ["go-1", "go@5", "go@9..5", "@1..2", "go@a..b", "go@1..", "go@..2"] {
            assert!(split(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn calls_are_indented() {
        let traced = |flow| Traced {
            icount: 7,
            rip: 1,
            symbol: None,
            instruction: String::new(),
            flow,
            target: 0x20,
            target_symbol: Some("f".into()),
            cpl: 3,
        };
        let mut depth = 0;
        assert_eq!(call(&traced(Flow::Call), &mut depth).unwrap().trim(), "7 call f");
        assert!(call(&traced(Flow::Call), &mut depth).unwrap().ends_with("   call f"));
        assert_eq!((call(&traced(Flow::Plain), &mut depth), depth), (None, 2));
        for _ in 0..5 {
            call(&traced(Flow::Return), &mut depth);
        }
        assert_eq!(depth, 0);
    }
}
