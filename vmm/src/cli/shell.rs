//! `orrery shell`.

use std::io::{IsTerminal, Write};
use std::os::fd::AsRawFd;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use orrery_devices::VirtualNs;

use super::args::{MomentArgs, ShellArgs};
use super::cat::{agent_of, failure};
use super::console::read_stdin;
use super::exit::{self, Failure};
use super::place::{self, Place};
use crate::guest_agent::{Agent, AgentError, Message, Turn};

/// Longest wait before the terminal's size is looked at again.
const WAIT_MAX: Duration = Duration::from_millis(100);

/// A throwaway branch at a moment: the machine with its past, and none of the run's later inputs.
pub(super) fn open_branch(arguments: &MomentArgs) -> Result<(Place, Agent), Failure> {
    let (place, moment) = place::open(arguments)?;
    let mut machine = moment.machine;
    let seed = machine.seed();
    let template = machine.freeze_only().map_err(|error| Failure::new(exit::HOST, error))?;
    let branch = template.branch(seed, Some(Vec::new())).map_err(|error| Failure::new(exit::HOST, error))?;
    Ok((place, agent_of(branch)?))
}

pub(super) fn shell(arguments: ShellArgs) -> Result<u8, Failure> {
    let (_place, mut agent) = open_branch(&arguments.at)?;
    let terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    let size = terminal_size().filter(|_| terminal);
    if terminal {
        let icount = agent.machine().icount().0;
        eprintln!("orrery: a shell in a branch at icount {icount}; the run stays as it is. `exit` leaves.");
    }
    agent.start(&arguments.command, terminal.then_some(size.unwrap_or((24, 80))));
    let raw = terminal.then(RawMode::enter).flatten();
    let result = converse(&mut agent, size);
    drop(raw);
    match result {
        Ok(status) => Ok(status.min(255) as u8),
        Err(error) => Err(failure(error)),
    }
}

/// Carries bytes between the terminal and the guest until the command ends; its exit code.
fn converse(agent: &mut Agent, mut size: Option<(u16, u16)>) -> Result<u32, AgentError> {
    let input = read_stdin();
    let mut open = true;
    let mut until = None;
    loop {
        let mut end = None;
        let turn = agent.turn(until, &mut |message| match message {
            Message::Output(bytes) => write(&mut std::io::stdout(), &bytes),
            Message::Errors(bytes) => write(&mut std::io::stderr(), &bytes),
            Message::Exited(status) => end = Some(Ok(status)),
            Message::Refused(reason) => end = Some(Err(AgentError::Refused { reason })),
            Message::File(_) | Message::FileEnd(_) => {}
        });
        if let Some(end) = end {
            return end;
        }
        // While someone may be typing, idle time passes as on a clock; else at once.
        let (wait, next) = match turn? {
            Turn::Busy => (Duration::ZERO, None),
            Turn::Idle(None) if !open => return Err(AgentError::Silent { instructions: 0 }),
            Turn::Idle(None) => (WAIT_MAX, None),
            Turn::Idle(Some(due)) if !open => (Duration::ZERO, Some(due)),
            Turn::Idle(Some(due)) => (gap(agent, due), Some(due)),
        };
        let started = Instant::now();
        match receive(&input, wait, open) {
            Received::Bytes(bytes) => agent.input(&bytes),
            Received::End => {
                open = false;
                agent.end_input();
            }
            Received::Nothing => {}
        }
        // As much virtual time passes as was waited, and no more than up to the next event.
        let passed = agent.machine().time().0.saturating_add(started.elapsed().as_nanos() as u64);
        until = next.map(|due| if open { due.min(VirtualNs(passed.max(agent.machine().time().0 + 1))) } else { due });
        if let (Some(old), Some(new)) = (size, terminal_size())
            && old != new
        {
            size = Some(new);
            agent.resize(new.0, new.1);
        }
    }
}

/// How long to wait for input before an event that is due at some virtual time.
fn gap(agent: &Agent, due: VirtualNs) -> Duration {
    Duration::from_nanos(due.0.saturating_sub(agent.machine().time().0)).min(WAIT_MAX)
}

enum Received {
    Bytes(Vec<u8>),
    End,
    Nothing,
}

fn receive(input: &Receiver<Vec<u8>>, wait: Duration, open: bool) -> Received {
    if !open {
        return Received::Nothing;
    }
    let received = if wait.is_zero() {
        input.try_recv().map_err(|error| error == TryRecvError::Empty)
    } else {
        input.recv_timeout(wait).map_err(|error| error == RecvTimeoutError::Timeout)
    };
    match received {
        Ok(bytes) => Received::Bytes(bytes),
        Err(true) => Received::Nothing,
        Err(false) => Received::End,
    }
}

fn write(stream: &mut dyn Write, bytes: &[u8]) {
    // Whoever closed it wants no more.
    let _ = stream.write_all(bytes).and_then(|()| stream.flush());
}

/// Rows and columns of the terminal.
fn terminal_size() -> Option<(u16, u16)> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the request fills in a winsize, which is a valid place for it.
    let result = unsafe { libc::ioctl(std::io::stdout().as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
    (result == 0 && size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}

/// The terminal passing everything on, Ctrl-C included: it is the guest's terminal now.
struct RawMode {
    fd: i32,
    saved: libc::termios,
}

impl RawMode {
    fn enter() -> Option<RawMode> {
        let fd = std::io::stdin().as_raw_fd();
        // SAFETY: all-zero is a valid termios, and tcgetattr fills it in.
        let mut saved: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: `fd` is open and `saved` is a valid place.
        if unsafe { libc::tcgetattr(fd, &raw mut saved) } != 0 {
            return None;
        }
        let mut raw = saved;
        // SAFETY: `raw` is a valid termios.
        unsafe { libc::cfmakeraw(&raw mut raw) };
        // SAFETY: `raw` comes from tcgetattr on the same descriptor.
        (unsafe { libc::tcsetattr(fd, libc::TCSANOW, &raw const raw) } == 0).then_some(RawMode { fd, saved })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // SAFETY: puts back what tcgetattr gave.
        unsafe { libc::tcsetattr(self.fd, libc::TCSANOW, &raw const self.saved) };
    }
}
