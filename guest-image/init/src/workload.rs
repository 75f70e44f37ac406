//! The entry command: started with a terminal, waited for, and everything it left behind ended.

use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus};

use crate::config::Config;
use crate::failure::Failure;
use crate::sys;

/// Runs the entry command to its end and returns its exit code, or 128 plus the number of the signal that ended
/// it. Orphans are reaped meanwhile.
pub fn run(config: &Config) -> Result<u8, Failure> {
    let (program, arguments) = config.command.split_first().expect("parsing refuses an empty command");
    let failure = |error| Failure::Exec { command: program.to_string_lossy().into_owned(), error };
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .envs(config.environment.iter().map(|(name, value)| (name, value)))
        .current_dir(&config.working_directory);
    // SAFETY: the closure runs in the child between fork and exec and makes system calls only (setsid, open,
    // ioctl, dup2, close): no allocation, no lock.
    unsafe { command.pre_exec(sys::become_session_leader) };
    let child = command.spawn().map_err(failure)?;
    let child_id = child.id() as i32;
    loop {
        match sys::wait_any() {
            Ok((id, status)) if id == child_id => {
                return Ok(exit_code(ExitStatus::from_raw(status)));
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failure(error)),
        }
    }
}

/// Ends every other process and reaps it, so that the disk has no writer left.
pub fn stop_everything() {
    sys::kill_all();
    while sys::wait_any().is_ok() {}
}

fn exit_code(status: ExitStatus) -> u8 {
    match (status.code(), status.signal()) {
        (Some(code), _) => code as u8,
        (None, Some(signal)) => 128 + (signal as u8 & 0x7f),
        (None, None) => 255,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_follow_the_shell() {
        assert_eq!(exit_code(ExitStatus::from_raw(0)), 0);
        assert_eq!(exit_code(ExitStatus::from_raw(3 << 8)), 3);
        assert_eq!(exit_code(ExitStatus::from_raw(9)), 137);
    }
}
