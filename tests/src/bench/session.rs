//! One run of one program on one platform: started, listened to, timed by the markers it prints.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Most bytes of a line of output that are kept.
const LINE_BYTES_MAX: usize = 64 << 10;
/// Lines of output shown when a session fails.
const TAIL_LINES: usize = 12;

/// How long a line took and what came out.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// From marker to marker.
    pub seconds: f64,
    /// The program's checksum.
    pub result: String,
}

/// What a session gave.
#[derive(Debug, Default)]
pub struct Session {
    /// From the start of the process to the program's first marker.
    pub start_seconds: Option<f64>,
    /// Finished lines by name.
    pub lines: BTreeMap<String, Measured>,
    /// The last line of standard output, where Orrery prints its summary.
    pub last_line: String,
    /// Why the session did not come to its end.
    pub failure: Option<String>,
}

/// Runs `command` to its end, or for `limit`. Its output goes to the file `transcript` as well. A program without
/// markers has begun when it says `first_words`.
///
/// A session that fails still has the lines that were finished before; an error means that it could not be started.
pub fn run(
    mut command: Command,
    first_words: Option<&str>,
    cpu: Option<usize>,
    limit: Duration,
    transcript: &Path,
) -> Result<Session> {
    let log = File::create(transcript).with_context(|| format!("cannot write {}", transcript.display()))?;
    let errors = log.try_clone()?;
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(errors);
    let started = Instant::now();
    let mut child = Ending(spawn(command, cpu)?);
    let stdout = child.0.stdout.take().expect("standard output is piped");
    let (sender, receiver) = channel();
    // The time is taken where the bytes arrive; the thread does nothing else.
    thread::spawn(move || {
        let mut stdout = stdout;
        let mut buffer = vec![0; 1 << 16];
        while let Ok(count @ 1..) = stdout.read(&mut buffer) {
            if sender.send((Instant::now(), buffer[..count].to_vec())).is_err() {
                return;
            }
        }
    });
    let mut listener = Listener { started, first_words, log, begun: None, done: false, session: Session::default() };
    let heard = listener.listen(&receiver, started + limit);
    let ended = heard.and_then(|()| listener.expect_end(&mut child.0, started + limit));
    if let Err(error) = ended {
        let words = last_words(transcript);
        listener.session.failure = Some(format!("{error:#}; its last words ({}):{words}", transcript.display()));
    }
    Ok(listener.session)
}

/// The end of a transcript, standard error included, each line on a line of its own.
fn last_words(transcript: &Path) -> String {
    let bytes = std::fs::read(transcript).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].iter().map(|line| format!("\n    {line:.300}")).collect()
}

/// A child that does not outlive its owner.
struct Ending(Child);

impl Drop for Ending {
    fn drop(&mut self) {
        // It has usually exited; then both do nothing.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts the command, on one CPU if asked to.
fn spawn(mut command: Command, cpu: Option<usize>) -> Result<Child> {
    let name = command.get_program().to_string_lossy().into_owned();
    // A child inherits the affinity of the thread that starts it, so this thread is one of its own.
    let starter = thread::spawn(move || {
        if let Some(cpu) = cpu {
            let mut set = rustix::thread::CpuSet::new();
            set.set(cpu);
            rustix::thread::sched_setaffinity(None, &set)?;
        }
        command.spawn()
    });
    starter.join().expect("starting a process does not panic").with_context(|| format!("cannot start {name}"))
}

/// The lowest CPU that this process may use.
pub fn first_cpu() -> Result<usize> {
    let set = rustix::thread::sched_getaffinity(None).context("cannot read the CPU affinity")?;
    (0..rustix::thread::CpuSet::MAX_CPU).find(|&cpu| set.is_set(cpu)).context("no CPU may be used")
}

/// Follows the output of one session.
struct Listener<'a> {
    started: Instant,
    first_words: Option<&'a str>,
    log: File,
    begun: Option<(String, Instant)>,
    done: bool,
    session: Session,
}

impl Listener<'_> {
    fn listen(&mut self, receiver: &Receiver<(Instant, Vec<u8>)>, deadline: Instant) -> Result<()> {
        let mut line = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let (time, bytes) = match receiver.recv_timeout(left) {
                Ok(piece) => piece,
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    let seconds = self.started.elapsed().as_secs();
                    let place = self.begun.as_ref().map_or("outside any line".into(), |(name, _)| format!("in {name}"));
                    bail!("it was still running after {seconds} s, {place} (--timeout allows more)");
                }
            };
            self.log.write_all(&bytes)?;
            for byte in bytes {
                if byte == b'\n' {
                    let text = String::from_utf8_lossy(&line).trim().to_owned();
                    line.clear();
                    self.line(text, time)?;
                } else if line.len() < LINE_BYTES_MAX {
                    line.push(byte);
                }
            }
        }
        let text = String::from_utf8_lossy(&line).trim().to_owned();
        if !text.is_empty() {
            self.line(text, Instant::now())?;
        }
        Ok(())
    }

    fn line(&mut self, text: String, time: Instant) -> Result<()> {
        // The console may have put other words before the marker.
        if let Some(at) = text.find("@@ ") {
            self.marker(&text[at + 3..], time)?;
        } else if !self.done && self.first_words.is_some_and(|words| text.contains(words)) {
            self.session.start_seconds = Some((time - self.started).as_secs_f64());
            self.done = true;
        }
        if !text.is_empty() {
            self.session.last_line = text;
        }
        Ok(())
    }

    fn marker(&mut self, marker: &str, time: Instant) -> Result<()> {
        let words: Vec<&str> = marker.split_whitespace().collect();
        match (&words[..], self.begun.take()) {
            (["start"], None) if self.session.start_seconds.is_none() => {
                self.session.start_seconds = Some((time - self.started).as_secs_f64());
            }
            (["begin", name], None) => self.begun = Some((name.to_string(), time)),
            (["end", name, result], Some((begun, since))) if *name == begun => {
                let measured = Measured { seconds: (time - since).as_secs_f64(), result: result.to_string() };
                self.session.lines.insert(begun, measured);
            }
            (["done"], None) => self.done = true,
            _ => bail!("the marker {marker:?} is out of order"),
        }
        Ok(())
    }

    fn expect_end(&mut self, child: &mut Child, deadline: Instant) -> Result<()> {
        // Output is closed: the process is at its end, or has closed it on purpose and goes on.
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if Instant::now() >= deadline {
                bail!("it closed its output but did not end");
            }
            thread::sleep(Duration::from_millis(5));
        };
        if !status.success() {
            bail!("it ended with {status}");
        }
        if !self.done {
            bail!("it ended before its lines were done");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, first_words: Option<&str>, limit: Duration) -> Session {
        let transcript = std::env::temp_dir().join(format!("orrery-session-{}-{}", std::process::id(), script.len()));
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        let session = run(command, first_words, Some(first_cpu().unwrap()), limit, &transcript).unwrap();
        std::fs::remove_file(transcript).unwrap();
        session
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn markers_are_timed() {
        let script =
            "echo @@ start; echo @@ begin a; sleep 0.2; printf 'noise @@ end a 7f\\r\\n'; echo @@ done; echo {}";
        let session = shell(script, None, LONG);
        assert_eq!(session.failure, None);
        assert!(session.start_seconds.is_some());
        assert!(session.lines["a"].seconds >= 0.19, "{:?}", session.lines);
        assert_eq!(session.lines["a"].result, "7f");
        assert_eq!(session.last_line, "{}");
    }

    #[test]
    fn a_program_without_markers_has_first_words() {
        let script = "echo noise; echo ' hello from here'; echo more";
        let session = shell(script, Some("hello from "), LONG);
        assert_eq!(session.failure, None);
        assert!(session.start_seconds.is_some());
        assert!(shell(script, Some("hello from there"), LONG).failure.is_some());
    }

    #[test]
    fn failures_say_what_happened_and_keep_what_was_done() {
        let slow = "echo @@ start; echo @@ begin a; echo @@ end a 1; echo @@ begin b; exec sleep 30";
        for (script, limit, words) in [
            ("echo @@ start; echo @@ begin a; echo @@ end a 1; exit 3", LONG, "exit status: 3"),
            ("echo @@ start; echo @@ begin a; echo @@ end a 1", LONG, "before its lines were done"),
            ("echo @@ start; echo @@ begin a; echo @@ end a 1; echo @@ end b 1", LONG, "out of order"),
            (slow, Duration::from_millis(300), "in b"),
        ] {
            let session = shell(script, None, limit);
            let failure = session.failure.expect(words);
            assert!(failure.contains(words), "{failure}");
            assert_eq!(session.lines.len(), 1);
        }
    }
}
