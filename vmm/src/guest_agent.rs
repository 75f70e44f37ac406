//! The host's side of the guest's agent: messages to a process inside the guest and back, over the machine's virtio
//! console. What is asked enters the guest as an input, so it belongs to a branch of its own; the caller brings a
//! machine that nobody else needs. `guest-image/init/src/agent.rs` is the other side and lists the messages.

use orrery_cpu::Icount;
use orrery_devices::VirtualNs;

use crate::inputs::InputChannel;
use crate::inspect::Inspector;
use crate::machine::{ForeignInputs, Limits, Machine, Pause};
use crate::run::Ended;

/// The agent's name among the guest's processes.
pub const PROCESS: &str = "orrery-agent";
/// Most bytes of one message; a longer one is a broken agent.
const MESSAGE_MAX: usize = 64 << 10;
/// Instructions between two looks at the host.
const SLICE_INSTRUCTIONS: u64 = 1 << 22;
/// Instructions in which a file must be on its way.
const ANSWER_INSTRUCTIONS: u64 = 20_000_000_000;

/// The guest's agent cannot do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// There is none.
    #[error(
        "the guest has no agent at this moment: it starts right before the image's command does, if the image was \
         built by this version of Orrery"
    )]
    NoAgent,
    /// It says no.
    #[error("the guest says: {reason}")]
    Refused {
        /// Its words.
        reason: String,
    },
    /// What came is not a message.
    #[error("the guest's agent sent something that is not a message")]
    Garbage,
    /// The guest came to its end.
    #[error("the guest ended before it answered: {0}")]
    Ended(Ended),
    /// Nothing came.
    #[error("the guest's agent did not answer within {instructions} instructions")]
    Silent {
        /// How long was waited.
        instructions: u64,
    },
    /// The machine cannot go on.
    #[error(transparent)]
    Inputs(#[from] ForeignInputs),
}

/// A message from the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Standard output, or what a terminal shows.
    Output(Vec<u8>),
    /// Standard error.
    Errors(Vec<u8>),
    /// The command has ended.
    Exited(u32),
    /// Part of a file.
    File(Vec<u8>),
    /// The file is complete.
    FileEnd(u64),
    /// A request cannot be fulfilled.
    Refused(String),
}

/// What [`Agent::turn`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Turn {
    /// The guest goes on computing.
    Busy,
    /// The guest is idle up to a moment, or until there is input.
    Idle(Option<VirtualNs>),
}

/// A machine whose agent is spoken to.
pub struct Agent {
    machine: Machine,
    received: Vec<u8>,
}

impl Agent {
    /// Takes a machine, if an agent runs in it.
    pub fn new(machine: Machine) -> Result<Agent, AgentError> {
        let tasks = Inspector::new(&machine).processes().unwrap_or_default();
        if !tasks.iter().any(|task| task.name == PROCESS && !task.kernel_thread) {
            return Err(AgentError::NoAgent);
        }
        let mut machine = machine;
        machine.take_output();
        Ok(Agent { machine, received: Vec::new() })
    }

    /// The machine.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    fn send(&mut self, kind: u8, bytes: &[u8]) {
        let mut message = vec![kind];
        message.extend((bytes.len() as u32).to_le_bytes());
        message.extend(bytes);
        self.machine.input(InputChannel::Agent, message);
    }

    /// Starts a command, or the shell if it has no words: in a terminal of (rows, columns), or with pipes.
    pub fn start(&mut self, command: &[String], terminal: Option<(u16, u16)>) {
        let mut bytes = Vec::new();
        if let Some((rows, columns)) = terminal {
            bytes.extend(rows.to_le_bytes());
            bytes.extend(columns.to_le_bytes());
        }
        for word in command {
            bytes.extend(word.bytes());
            bytes.push(0);
        }
        self.send(if terminal.is_some() { b'T' } else { b'P' }, &bytes);
    }

    /// Sends standard input.
    pub fn input(&mut self, bytes: &[u8]) {
        bytes.chunks(MESSAGE_MAX / 2).for_each(|part| self.send(b'D', part));
    }

    /// Ends standard input.
    pub fn end_input(&mut self) {
        self.send(b'E', &[]);
    }

    /// Tells the terminal's size.
    pub fn resize(&mut self, rows: u16, columns: u16) {
        let (rows, columns) = (rows.to_le_bytes(), columns.to_le_bytes());
        self.send(b'W', &[rows[0], rows[1], columns[0], columns[1]]);
    }

    /// Lets the guest run for a while, at most up to a moment of virtual time, and calls `each` with what came.
    pub fn turn(&mut self, until: Option<VirtualNs>, each: &mut dyn FnMut(Message)) -> Result<Turn, AgentError> {
        let limits = Limits {
            icount: Icount(self.machine.icount().0.saturating_add(SLICE_INSTRUCTIONS)),
            time: until.unwrap_or(Limits::NONE.time),
            // A moment to be reached is a reason to skip idle time.
            pause_when_idle: until.is_none(),
            pause_on_output: true,
            pause_when_long: true,
        };
        let pause = self.machine.run(limits)?;
        for output in self.machine.take_output() {
            if output.channel == "agent" {
                self.received.extend(output.bytes);
            }
        }
        self.machine.take_inputs();
        while let Some(message) = take_message(&mut self.received)? {
            each(message);
        }
        match pause {
            Pause::Ended(ended) => Err(AgentError::Ended(ended)),
            Pause::Idle { until } => Ok(Turn::Idle(until)),
            _ => Ok(Turn::Busy),
        }
    }

    /// Reads a file as the guest's kernel has it, with everything else in the guest stopped. Calls `each` with its
    /// parts; returns its length.
    pub fn read_file(&mut self, path: &str, each: &mut dyn FnMut(&[u8])) -> Result<u64, AgentError> {
        self.send(b'R', path.as_bytes());
        let mut quiet_since = self.machine.icount().0;
        let mut until = None;
        loop {
            let mut end = None;
            let mut moved = false;
            let turn = self.turn(until, &mut |message| {
                moved = true;
                match message {
                    Message::File(bytes) => each(&bytes),
                    Message::FileEnd(len) => end = Some(Ok(len)),
                    Message::Refused(reason) => end = Some(Err(AgentError::Refused { reason })),
                    Message::Output(_) | Message::Errors(_) | Message::Exited(_) => {}
                }
            });
            if let Some(end) = end {
                return end;
            }
            let now = self.machine.icount().0;
            if moved {
                quiet_since = now;
            }
            until = match turn? {
                Turn::Busy => None,
                Turn::Idle(Some(until)) => Some(until),
                // Nothing will ever happen.
                Turn::Idle(None) => return Err(AgentError::Silent { instructions: now - quiet_since }),
            };
            if now - quiet_since > ANSWER_INSTRUCTIONS {
                return Err(AgentError::Silent { instructions: ANSWER_INSTRUCTIONS });
            }
        }
    }
}

/// Takes the first message off what was received, if it is complete.
fn take_message(received: &mut Vec<u8>) -> Result<Option<Message>, AgentError> {
    let Some(header) = received.get(..5) else { return Ok(None) };
    let (kind, len) = (header[0], u32::from_le_bytes([header[1], header[2], header[3], header[4]]) as usize);
    if len > MESSAGE_MAX {
        return Err(AgentError::Garbage);
    }
    if received.len() < 5 + len {
        return Ok(None);
    }
    let bytes = received[5..5 + len].to_vec();
    received.drain(..5 + len);
    let message = match kind {
        b'd' => Message::Output(bytes),
        b'e' => Message::Errors(bytes),
        b'x' => Message::Exited(u32::from_le_bytes(bytes.try_into().map_err(|_| AgentError::Garbage)?)),
        b'f' => Message::File(bytes),
        b'F' => Message::FileEnd(u64::from_le_bytes(bytes.try_into().map_err(|_| AgentError::Garbage)?)),
        b'!' => Message::Refused(String::from_utf8_lossy(&bytes).chars().filter(|c| !c.is_control()).collect()),
        _ => return Err(AgentError::Garbage),
    };
    Ok(Some(message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_taken_when_they_are_complete() {
        let mut received = b"d\x02\0\0\0hix\x04\0\0\0\x07\0\0".to_vec();
        assert_eq!(take_message(&mut received).unwrap(), Some(Message::Output(b"hi".to_vec())));
        assert_eq!(take_message(&mut received).unwrap(), None);
        received.push(0);
        assert_eq!(take_message(&mut received).unwrap(), Some(Message::Exited(7)));
        assert!(received.is_empty());
    }

    #[test]
    fn garbage_is_an_error() {
        for garbage in [&b"orrery-agent"[..], b"?\0\0\0\0", b"x\x01\0\0\0a", b"d\0\0\0\x01"] {
            assert!(matches!(take_message(&mut garbage.to_vec()), Err(AgentError::Garbage)), "{garbage:?}");
        }
    }
}
