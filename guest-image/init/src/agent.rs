//! The guest agent: what people outside ask of the guest goes through a virtio console to a process of init's own.
//!
//! The agent is a child of init that waits for requests on the first virtio console. As long as nobody asks, it costs
//! the guest nothing. When it is up it says so with the line `orrery-agent 2 ready`; from then on both directions are
//! messages: a kind (1 byte), the number of bytes that follow (4 bytes, little-endian, at most 64 KiB), and those
//! bytes. From the host:
//!
//! | kind | bytes | |
//! |---|---|---|
//! | `T` | rows (2), columns (2), a command in NUL-ended words | start a command, or the shell, in a terminal |
//! | `P` | a command in NUL-ended words | start a command, or the shell, with pipes |
//! | `D` | any | standard input |
//! | `E` | none | end of standard input |
//! | `W` | rows (2), columns (2) | the terminal's size |
//! | `R` | a path | read a file, all other processes being stopped |
//!
//! To the host:
//!
//! | kind | bytes | |
//! |---|---|---|
//! | `d` | any | standard output, or the terminal's output |
//! | `e` | any | standard error |
//! | `x` | status (4) | the command has ended: its exit code, or 128 plus the signal |
//! | `f` | any | the next bytes of the file |
//! | `F` | number of bytes (8) | the file is complete |
//! | `!` | text | the request cannot be fulfilled |

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};

use crate::config::Config;
use crate::sys;

/// The first virtio console, where the machine has one.
const CHANNEL: &str = "/dev/hvc0";
/// Most bytes of one message.
const MESSAGE_MAX: usize = 64 << 10;
/// Bytes that are read at once.
const READ_BYTES: usize = 4096;
/// How often a command is asked whether it has room for input, in milliseconds; on old kernels also whether it has ended.
const LOOK_INTERVAL_MS: i32 = 50;
/// Shells, in the order in which they are tried.
const SHELLS: [&[&str]; 4] = [&["/bin/bash"], &["/bin/sh"], &["/usr/bin/sh"], &["/bin/busybox", "sh"]];

/// What init knows of the agent. The file is locked by the agent while a command runs for the host.
pub struct Busy(Option<File>);

impl Busy {
    /// Waits until no command runs for the host: the machine stays on for whoever is in a shell.
    pub fn wait(&self) {
        if let Some(file) = &self.0 {
            // Without locks nobody is waited for.
            let _ = file.lock();
        }
    }
}

/// Starts the agent and says that the guest is up; a machine without the channel is none the wiser.
pub fn start(config: &Config) -> Busy {
    let Ok(channel) = sys::open_terminal(CHANNEL) else { return Busy(None) };
    sys::make_raw(&channel);
    let mut channel = File::from(channel);
    let busy = sys::memory_file("orrery-agent").ok();
    if channel.write_all(b"orrery-agent 2 ready\n").is_err() || !sys::fork_daemon("orrery-agent") {
        return Busy(busy);
    }
    // A lock belongs to an open file, which init and the agent would share: the agent opens it again.
    let busy = busy.and_then(|file| File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).ok());
    let mut agent = Agent { channel, received: Vec::new(), session: None, busy, environment: config };
    // Only a broken channel ends it, and then there is nobody to tell.
    let _ = agent.serve();
    sys::exit_now(0);
}

/// A command that runs for the host.
struct Session {
    child: Child,
    /// Becomes readable when the child ends.
    ended: Option<OwnedFd>,
    /// The terminal's other side, or the pipes: output, and errors.
    outputs: Vec<(u8, File)>,
    /// Where its input goes; writing there never blocks.
    input: Option<File>,
    /// Input that it has had no room for yet.
    pending: Vec<u8>,
    /// The host has no more input.
    closing: bool,
}

impl Session {
    fn new(child: Child, outputs: Vec<(u8, File)>, input: Option<File>) -> Session {
        if let Some(input) = &input {
            sys::set_nonblocking(input);
        }
        let ended = sys::watch_process(child.id());
        Session { child, ended, outputs, input, pending: Vec::new(), closing: false }
    }

    /// Passes input on, as far as there is room.
    fn feed(&mut self) {
        if let Some(input) = &mut self.input {
            match input.write(&self.pending) {
                Ok(count) => drop(self.pending.drain(..count)),
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                // A command that reads no more is its own affair.
                Err(_) => self.pending.clear(),
            }
        }
        if self.closing && self.pending.is_empty() {
            self.input = None;
        }
    }
}

struct Agent<'a> {
    channel: File,
    /// Bytes from the host that are not a whole message yet.
    received: Vec<u8>,
    session: Option<Session>,
    /// Locked while there is a session, see [`Busy`].
    busy: Option<File>,
    environment: &'a Config,
}

impl Agent<'_> {
    fn serve(&mut self) -> io::Result<()> {
        loop {
            let mut waiting = vec![self.channel.as_raw_fd()];
            let mut timeout = -1;
            if let Some(session) = &self.session {
                waiting.extend(session.outputs.iter().map(|(_, output)| output.as_raw_fd()));
                waiting.extend(session.ended.as_ref().map(AsRawFd::as_raw_fd));
                if session.ended.is_none() || !session.pending.is_empty() {
                    timeout = LOOK_INTERVAL_MS;
                }
            }
            let ready = sys::wait_readable(&waiting, timeout)?;
            self.forward_outputs(&ready[1..])?;
            if ready[0] {
                let mut buffer = [0; READ_BYTES];
                let count = self.channel.read(&mut buffer)?;
                self.received.extend(&buffer[..count]);
                self.obey()?;
            }
            if let Some(session) = &mut self.session {
                session.feed();
            }
            self.look_after_child()?;
        }
    }

    fn send(&mut self, kind: u8, bytes: &[u8]) -> io::Result<()> {
        let mut message = vec![kind];
        message.extend((bytes.len() as u32).to_le_bytes());
        message.extend(bytes);
        self.channel.write_all(&message)
    }

    fn refuse(&mut self, what: &str, error: &dyn std::fmt::Display) -> io::Result<()> {
        self.send(b'!', format!("{what}: {error}").as_bytes())
    }

    /// Carries out every message that is complete.
    fn obey(&mut self) -> io::Result<()> {
        while let Some((kind, bytes)) = take_message(&mut self.received)? {
            match kind {
                b'T' | b'P' => self.begin(kind == b'T', &bytes)?,
                b'D' => {
                    if let Some(session) = &mut self.session {
                        session.pending.extend(bytes);
                    }
                }
                b'E' => {
                    if let Some(session) = &mut self.session {
                        session.closing = true;
                    }
                }
                b'W' => {
                    if let (Some(session), Some((rows, columns))) = (&self.session, size(&bytes)) {
                        session.outputs.iter().for_each(|(_, terminal)| sys::set_size(terminal, rows, columns));
                    }
                }
                b'R' => self.read_file(&bytes)?,
                _ => self.send(b'!', b"this agent does not know that request")?,
            }
        }
        Ok(())
    }

    fn begin(&mut self, terminal: bool, bytes: &[u8]) -> io::Result<()> {
        if self.session.is_some() {
            return self.send(b'!', b"a command is running already");
        }
        let (rows, columns) = size(bytes).filter(|_| terminal).unwrap_or((24, 80));
        let words = if terminal { bytes.get(4..).unwrap_or_default() } else { bytes };
        let words: Vec<&OsStr> =
            words.split(|byte| *byte == 0).filter(|word| !word.is_empty()).map(OsStr::from_bytes).collect();
        let shells = SHELLS.map(|shell| shell.iter().map(OsStr::new).collect());
        let candidates = if words.is_empty() { Vec::from(shells) } else { vec![words] };
        let mut error = io::Error::from(io::ErrorKind::NotFound);
        for command in candidates {
            match self.spawn(&command, terminal.then_some((rows, columns))) {
                Ok(session) => {
                    self.session = Some(session);
                    let _ = self.busy.as_ref().map(File::lock);
                    return Ok(());
                }
                Err(other) => error = other,
            }
        }
        self.refuse("cannot start the command or a shell", &error)
    }

    fn spawn(&self, words: &[&OsStr], terminal: Option<(u16, u16)>) -> io::Result<Session> {
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).env_clear().current_dir("/");
        command.envs(self.environment.environment.iter().map(|(name, value)| (name, value)));
        if !self.environment.environment.iter().any(|(name, _)| name == "PATH") {
            command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        }
        let Some((rows, columns)) = terminal else {
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            let mut child = command.spawn()?;
            let file = |fd: Option<OwnedFd>| fd.map(File::from);
            let output = file(child.stdout.take().map(Into::into));
            let errors = file(child.stderr.take().map(Into::into));
            let input = file(child.stdin.take().map(Into::into));
            let outputs = [(b'd', output), (b'e', errors)];
            let outputs = outputs.into_iter().filter_map(|(kind, file)| Some((kind, file?))).collect();
            return Ok(Session::new(child, outputs, input));
        };
        let (ours, theirs) = sys::open_pseudo_terminal()?;
        sys::set_size(&ours, rows, columns);
        command.env("TERM", "xterm");
        command.stdin(theirs.try_clone()?).stdout(theirs.try_clone()?).stderr(theirs);
        // SAFETY: the closure runs in the child between fork and exec and makes system calls only.
        unsafe { command.pre_exec(sys::take_terminal) };
        let child = command.spawn()?;
        let input = Some(ours.try_clone()?);
        Ok(Session::new(child, vec![(b'd', ours)], input))
    }

    /// Sends what the command has written. `ready`: which of its outputs have something.
    fn forward_outputs(&mut self, ready: &[bool]) -> io::Result<()> {
        let Some(mut session) = self.session.take() else { return Ok(()) };
        let mut number = 0;
        let mut result = Ok(());
        session.outputs.retain_mut(|(kind, output)| {
            let readable = ready.get(number).copied().unwrap_or(false);
            number += 1;
            if !readable || result.is_err() {
                return true;
            }
            let mut buffer = [0; READ_BYTES];
            match output.read(&mut buffer) {
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => true,
                // A terminal whose other side is closed says EIO.
                Ok(0) | Err(_) => false,
                Ok(count) => {
                    result = self.send(*kind, &buffer[..count]);
                    true
                }
            }
        });
        self.session = Some(session);
        result
    }

    /// Says so when the command has ended, after everything that it has written.
    fn look_after_child(&mut self) -> io::Result<()> {
        let Some(session) = &mut self.session else { return Ok(()) };
        let Ok(Some(status)) = session.child.try_wait() else { return Ok(()) };
        let fds: Vec<i32> = session.outputs.iter().map(|(_, output)| output.as_raw_fd()).collect();
        if !fds.is_empty() {
            let ready = sys::wait_readable(&fds, 0)?;
            if ready.contains(&true) {
                // There is more; the next turn comes back here.
                return self.forward_outputs(&ready);
            }
        }
        self.session = None;
        let code = match (status.code(), status.signal()) {
            (Some(code), _) => code as u32,
            (None, signal) => 128 + signal.unwrap_or(0) as u32,
        };
        self.send(b'x', &code.to_le_bytes())?;
        let _ = self.busy.as_ref().map(File::unlock);
        Ok(())
    }

    fn read_file(&mut self, path: &[u8]) -> io::Result<()> {
        if CString::new(path).is_err() {
            return self.send(b'!', b"a path has no NUL");
        }
        sys::stop_all();
        let path = OsStr::from_bytes(path);
        let opened = std::fs::metadata(path).and_then(|metadata| match metadata.is_dir() {
            true => Err(io::Error::from(io::ErrorKind::IsADirectory)),
            false => File::open(path),
        });
        let mut file = match opened {
            Ok(file) => file,
            Err(error) => return self.refuse(&path.to_string_lossy(), &error),
        };
        let mut total = 0u64;
        let mut buffer = vec![0; MESSAGE_MAX / 2];
        loop {
            match file.read(&mut buffer) {
                Ok(0) => return self.send(b'F', &total.to_le_bytes()),
                Ok(count) => {
                    total += count as u64;
                    self.send(b'f', &buffer[..count])?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return self.refuse(&path.to_string_lossy(), &error),
            }
        }
    }
}

fn size(bytes: &[u8]) -> Option<(u16, u16)> {
    let half = |at: usize| Some(u16::from_le_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]));
    Some((half(0)?, half(2)?))
}

/// Takes the first message off the bytes received, if it is complete. A message that is too long ends the agent.
fn take_message(received: &mut Vec<u8>) -> io::Result<Option<(u8, Vec<u8>)>> {
    let Some(header) = received.get(..5) else { return Ok(None) };
    let len = u32::from_le_bytes([header[1], header[2], header[3], header[4]]) as usize;
    if len > MESSAGE_MAX {
        return Err(io::Error::from(io::ErrorKind::InvalidData));
    }
    if received.len() < 5 + len {
        return Ok(None);
    }
    let kind = received[0];
    let bytes = received[5..5 + len].to_vec();
    received.drain(..5 + len);
    Ok(Some((kind, bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_taken_when_they_are_complete() {
        let mut received = b"D\x03\0\0\0ab".to_vec();
        assert_eq!(take_message(&mut received).unwrap(), None);
        received.extend(b"cE\0\0\0\0W");
        assert_eq!(take_message(&mut received).unwrap(), Some((b'D', b"abc".to_vec())));
        assert_eq!(take_message(&mut received).unwrap(), Some((b'E', vec![])));
        assert_eq!(take_message(&mut received).unwrap(), None);
        assert!(take_message(&mut b"D\0\0\x02\0".to_vec()).is_err());
    }

    #[test]
    fn sizes_have_four_bytes() {
        assert_eq!(size(b"\x18\0\x50\0rest"), Some((24, 80)));
        assert_eq!(size(b"\x18\0\x50"), None);
    }
}
