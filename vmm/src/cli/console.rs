//! The guest's console on the host: standard output, standard input, signals, progress.

use std::io::{IsTerminal, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, sync_channel};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use orrery_cpu::Icount;
use orrery_devices::VirtualNs;

use crate::run::recorder::{Host, HostInput};

/// Signals that end a run in order.
const SIGNALS: [i32; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];
/// Bytes taken from standard input at once.
const READ_BYTES: usize = 4096;

/// What the console is connected to.
pub struct Console {
    show: bool,
    input: Option<Receiver<Vec<u8>>>,
    signal: Arc<AtomicI32>,
    progress: Option<ProgressBar>,
    started: Instant,
    drawn: Instant,
    _terminal: Option<RawTerminal>,
}

impl Console {
    /// Connects the console. `show`: output to standard output; `input`: input from standard input.
    pub fn connect(show: bool, input: bool) -> std::io::Result<Console> {
        let signal = watch_signals()?;
        let terminal = if input && foreground() { RawTerminal::enter() } else { None };
        let usable = input && (foreground() || !std::io::stdin().is_terminal());
        // Output on a terminal would be torn apart by a progress bar on the same one.
        let bar = std::io::stderr().is_terminal() && !(show && std::io::stdout().is_terminal());
        Ok(Console {
            show,
            input: usable.then(read_stdin),
            signal,
            progress: bar.then(progress_bar),
            started: Instant::now(),
            drawn: Instant::now(),
            _terminal: terminal,
        })
    }

    /// Removes the progress bar.
    pub fn finish(&mut self) {
        if let Some(bar) = self.progress.take() {
            bar.finish_and_clear();
        }
    }
}

/// Has a thread of its own take the signals: while translated code runs, the stack pointer is the guest's, so no
/// handler may run on this thread.
fn watch_signals() -> std::io::Result<Arc<AtomicI32>> {
    // SAFETY: an all-zero set is a valid place for sigemptyset to fill in.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is a valid place, and the numbers are those of signals.
    unsafe {
        libc::sigemptyset(&raw mut set);
        SIGNALS.iter().for_each(|number| {
            libc::sigaddset(&raw mut set, *number);
        });
    }
    // SAFETY: `set` is initialised; threads started from here on inherit the mask.
    let error = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    if error != 0 {
        return Err(std::io::Error::from_raw_os_error(error));
    }
    let signal = Arc::new(AtomicI32::new(0));
    let seen = signal.clone();
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        let mut number = 0;
        loop {
            // SAFETY: `set` is initialised and its signals are blocked in this thread.
            if unsafe { libc::sigwait(&raw const set, &raw mut number) } == 0 {
                seen.store(number, Ordering::Relaxed);
            }
        }
    })?;
    Ok(signal)
}

fn progress_bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{spinner} {msg}").expect("the template is constant");
    ProgressBar::new_spinner().with_style(style)
}

/// True if standard input is a terminal and this process may read it without being stopped.
fn foreground() -> bool {
    let stdin = std::io::stdin();
    // SAFETY: both calls only look up identifiers.
    stdin.is_terminal() && unsafe { libc::tcgetpgrp(stdin.as_raw_fd()) == libc::getpgrp() }
}

/// Standard input, read by a thread of its own; the channel closes at its end.
pub(super) fn read_stdin() -> Receiver<Vec<u8>> {
    let (sender, receiver) = sync_channel(16);
    std::thread::spawn(move || {
        let mut stdin = std::io::stdin().lock();
        let mut buffer = [0; READ_BYTES];
        loop {
            match stdin.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => {
                    if sender.send(buffer[..count].to_vec()).is_err() {
                        break;
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
    });
    receiver
}

impl Host for Console {
    fn output(&mut self, channel: &str, bytes: &[u8]) -> bool {
        if channel != "console" || !self.show {
            return true;
        }
        let mut stdout = std::io::stdout().lock();
        stdout.write_all(bytes).and_then(|()| stdout.flush()).is_ok()
    }

    fn input(&mut self, wait: Duration) -> HostInput {
        let Some(receiver) = &self.input else { return HostInput::Closed };
        let received = if wait.is_zero() {
            receiver.try_recv().map_err(|e| e == TryRecvError::Empty)
        } else {
            receiver.recv_timeout(wait).map_err(|e| e == RecvTimeoutError::Timeout)
        };
        match received {
            Ok(bytes) => HostInput::Data(bytes),
            Err(true) => HostInput::Nothing,
            Err(false) => HostInput::Closed,
        }
    }

    fn interrupted(&mut self) -> Option<i32> {
        Some(self.signal.load(Ordering::Relaxed)).filter(|signal| *signal != 0)
    }

    fn progress(&mut self, icount: Icount, time: VirtualNs) {
        let Some(bar) = &self.progress else { return };
        if self.drawn.elapsed() < Duration::from_millis(100) {
            return;
        }
        self.drawn = Instant::now();
        let speed = icount.0 as f64 / self.started.elapsed().as_secs_f64() / 1e6;
        bar.set_message(format!("icount {}  virtual {:.3} s  {speed:.0} MIPS", icount.0, time.0 as f64 / 1e9));
        bar.tick();
    }
}

/// The terminal without echo and line editing, which the guest does itself; Ctrl-C still ends the run.
struct RawTerminal {
    fd: i32,
    saved: libc::termios,
}

impl RawTerminal {
    fn enter() -> Option<RawTerminal> {
        let fd = std::io::stdin().as_raw_fd();
        // SAFETY: all-zero is a valid termios, and tcgetattr fills it in.
        let mut saved: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: `fd` is open and `saved` is a valid place.
        if unsafe { libc::tcgetattr(fd, &raw mut saved) } != 0 {
            return None;
        }
        let mut raw = saved;
        raw.c_lflag &= !(libc::ICANON | libc::ECHO);
        raw.c_iflag &= !(libc::ICRNL | libc::IXON);
        raw.c_oflag &= !libc::ONLCR;
        // SAFETY: `raw` comes from tcgetattr on the same descriptor.
        (unsafe { libc::tcsetattr(fd, libc::TCSANOW, &raw const raw) } == 0).then_some(RawTerminal { fd, saved })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // SAFETY: puts back what tcgetattr gave.
        unsafe { libc::tcsetattr(self.fd, libc::TCSANOW, &raw const self.saved) };
    }
}
