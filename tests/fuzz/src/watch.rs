//! What libFuzzer cannot do here. Its timer's signal handler would run on the guest's stack pointer, so hangs are
//! noticed by a thread of our own; and since engines live on from one input to the next, the inputs before a failing
//! one are kept and written beside it.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, Once};
use std::time::Duration;

/// Seconds after which an input counts as one that hangs, on a busy machine.
const HANG_SECONDS: u64 = 60;
/// Inputs that are remembered.
const HISTORY: usize = 256;

static INPUTS: AtomicU64 = AtomicU64::new(0);
static RECENT: Mutex<VecDeque<Vec<u8>>> = Mutex::new(VecDeque::new());
static STARTED: Once = Once::new();

/// An input is about to be executed. `remember` keeps it, for targets whose state lives on.
pub fn input(data: &[u8], remember: bool) {
    STARTED.call_once(start);
    INPUTS.fetch_add(1, Ordering::Relaxed);
    if remember && let Ok(mut recent) = RECENT.lock() {
        let mut oldest = if recent.len() >= HISTORY { recent.pop_front().unwrap_or_default() } else { Vec::new() };
        oldest.clear();
        oldest.extend_from_slice(data);
        recent.push_back(oldest);
    }
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
            let now = INPUTS.load(Ordering::Relaxed);
            last = if now == last.0 { (now, last.1 + 1) } else { (now, 0) };
            if last.1 >= HANG_SECONDS {
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
