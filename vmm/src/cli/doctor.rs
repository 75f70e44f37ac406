//! `orrery doctor`.

use super::args::DoctorArgs;
use super::exit::{self, Failure};
use super::say;
use crate::host::{Level, examine};

pub(super) fn doctor(arguments: DoctorArgs) -> Result<u8, Failure> {
    let findings = examine();
    let worst = findings.iter().map(|finding| finding.level).max().unwrap_or(Level::Ok);
    if arguments.json {
        let report = serde_json::json!({
            "orrery_version": env!("CARGO_PKG_VERSION"),
            "can_run": worst < Level::Error,
            "findings": findings,
        });
        say(report);
    } else {
        for finding in &findings {
            let mark = match finding.level {
                Level::Ok => "ok",
                Level::Warning => "warning",
                Level::Error => "ERROR",
            };
            say!("{:<13} {mark:<8} {}", finding.name, finding.detail);
        }
        say!(
            "\n{}",
            match worst {
                Level::Ok => "This host can run guests.",
                Level::Warning => "This host can run guests; see the warnings.",
                Level::Error => "This host cannot run guests; see the errors.",
            }
        );
    }
    Ok(if worst == Level::Error { exit::HOST } else { 0 })
}
