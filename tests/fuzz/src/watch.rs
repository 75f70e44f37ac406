//! What libFuzzer cannot do here. Its timer's signal handler would run on the guest's stack pointer, so hangs are
//! noticed by a thread of our own; and since engines live on from one input to the next, the inputs before a failing
//! one are kept and written beside it.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, Once};
use std::time::Duration;

/// Seconds of processor time after which an input counts as one that hangs. The host's clock says nothing on a busy
/// machine.
const HANG_SECONDS: u64 = 30;
/// Inputs that are remembered.
const HISTORY: usize = 256;

static INPUTS: AtomicU64 = AtomicU64::new(0);
static RECENT: Mutex<VecDeque<Vec<u8>>> = Mutex::new(VecDeque::new());
static RUNNING: AtomicBool = AtomicBool::new(false);
static STARTED: Once = Once::new();

/// An input is being executed until this is dropped.
#[must_use]
pub struct Running(());

impl Drop for Running {
    fn drop(&mut self) {
        RUNNING.store(false, Ordering::Relaxed);
    }
}

/// An input is about to be executed. `remember` keeps it, for targets whose state lives on.
pub fn input(data: &[u8], remember: bool) -> Running {
    STARTED.call_once(start);
    INPUTS.fetch_add(1, Ordering::Relaxed);
    RUNNING.store(true, Ordering::Relaxed);
    if remember && let Ok(mut recent) = RECENT.lock() {
        let mut oldest = if recent.len() >= HISTORY { recent.pop_front().unwrap_or_default() } else { Vec::new() };
        oldest.clear();
        oldest.extend_from_slice(data);
        recent.push_back(oldest);
    }
    Running(())
}

/// Seconds of processor time that this process has used.
fn processor_seconds() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a plain system call that fills the structure.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    time.tv_sec as u64
}

/// Installs the panic hook and starts the thread that looks for hangs.
fn start() {
    let next = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        write_history();
        next(info);
    }));
    std::thread::spawn(|| {
        let mut last = (u64::MAX, 0);
        loop {
            std::thread::sleep(Duration::from_secs(1));
            let (input, used) = (INPUTS.load(Ordering::Relaxed), processor_seconds());
            if input != last.0 || !RUNNING.load(Ordering::Relaxed) {
                last = (input, used);
            } else if used - last.1 >= HANG_SECONDS {
                eprintln!("an input has been running for {HANG_SECONDS} seconds");
                write_history();
                std::process::abort();
            }
        }
    });
}

/// Writes the remembered inputs to $FUZZ_HISTORY/NNN, oldest first, if that is set.
fn write_history() {
    let Some(directory) = std::env::var_os("FUZZ_HISTORY").map(PathBuf::from) else { return };
    let Ok(recent) = RECENT.try_lock() else { return };
    if recent.is_empty() || std::fs::create_dir_all(&directory).is_err() {
        return;
    }
    for (index, data) in recent.iter().enumerate() {
        let _ = std::fs::write(directory.join(format!("{index:03}")), data);
    }
    eprintln!("the last {} inputs are in {}", recent.len(), directory.display());
}
