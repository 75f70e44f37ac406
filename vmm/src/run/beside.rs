//! The thread that hashes moments beside the guest.

use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use crate::machine::hashing::HashWork;

/// Started with the first work.
#[derive(Default)]
pub(super) struct Beside {
    thread: Option<(Sender<HashWork>, JoinHandle<()>)>,
}

impl Beside {
    /// Has the work done soon. If the host gives no thread, whoever needs the result does it.
    pub fn run(&mut self, work: HashWork) {
        if self.thread.is_none() {
            let (sender, receiver) = channel::<HashWork>();
            let works = move || receiver.into_iter().for_each(|work| work.run());
            let thread = std::thread::Builder::new().name("hashes".into()).spawn(works);
            self.thread = thread.ok().map(|thread| (sender, thread));
        }
        if let Some((sender, _)) = &self.thread {
            // A thread that is gone does nothing, as none does.
            let _ = sender.send(work);
        }
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        if let Some((sender, thread)) = self.thread.take() {
            drop(sender);
            // A panic was printed.
            let _ = thread.join();
        }
    }
}
