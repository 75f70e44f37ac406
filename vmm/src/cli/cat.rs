//! `orrery cat`.

use std::io::Write;

use super::args::CatArgs;
use super::exit::{self, Failure};
use super::place;
use super::shell::open_branch;
use crate::guest_agent::{Agent, AgentError};
use crate::inspect::Inspector;

pub(super) fn cat(arguments: CatArgs) -> Result<u8, Failure> {
    let mut stdout = std::io::stdout().lock();
    if arguments.disk {
        let (_place, moment) = place::open(&arguments.at)?;
        let bytes = Inspector::new(&moment.machine).disk_file(&arguments.path).ok_or_else(|| {
            let text = format!("no disk of the guest has a file {} at that moment", arguments.path);
            Failure::new(exit::INSPECT, text)
        })?;
        let _ = stdout.write_all(&bytes).and_then(|()| stdout.flush());
        return Ok(0);
    }
    let (_place, mut agent) = open_branch(&arguments.at)?;
    let before = agent.machine().icount().0;
    let len = agent
        .read_file(&arguments.path, &mut |bytes| {
            let _ = stdout.write_all(bytes);
        })
        .map_err(failure)?;
    let _ = stdout.flush();
    if arguments.verbose {
        let instructions = agent.machine().icount().0 - before;
        eprintln!("orrery: {len} bytes, read by the guest within {instructions} instructions of the moment");
    }
    Ok(0)
}

/// A failure of the guest's agent.
pub(super) fn failure(error: AgentError) -> Failure {
    let code = match &error {
        AgentError::Inputs(_) => exit::INPUTS,
        AgentError::Refused { .. } => exit::INSPECT,
        _ => exit::AGENT,
    };
    Failure::new(code, error)
}

/// An agent in a machine, or what to do.
pub(super) fn agent_of(machine: crate::Machine) -> Result<Agent, Failure> {
    Agent::new(machine).map_err(failure)
}
