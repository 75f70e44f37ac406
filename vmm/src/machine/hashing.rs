//! The hash of a moment's state, computed while the guest goes on.
//!
//! The moment is taken down at once: registers, devices, and which pages were written since the digest of RAM was known.
//! Whoever writes to one of those pages later keeps its content first ([`Past`]), so another thread can hash them, and
//! copy what a snapshot needs, beside the guest.

use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};

use orrery_cpu::memory::{PAGE_SIZE, PageBytes};
use orrery_cpu::{Icount, Past};

use super::{Machine, hash};
use crate::chain::Hash;
use crate::digest::MemoryDigest;
use crate::page_hash::{PAGES_AT_ONCE, ZERO_PAGE, content_hashes};

/// Asks for the pages that differ from what another moment's digest says.
pub struct Wanted {
    /// None: from pages of zeros.
    pub base: Option<MemoryDigest>,
    /// Memory to put their contents into.
    pub contents: Vec<u8>,
}

/// What there was to know about a moment.
pub struct Hashed {
    /// Instructions retired.
    pub icount: Icount,
    /// The hash of the complete state.
    pub state_hash: Hash,
    /// The digests of RAM.
    pub digest: MemoryDigest,
    /// The pages that were wanted, ascending, with their content hashes.
    pub changed: Vec<(u64, Hash)>,
    /// The contents of those that are not zeros, one after the other.
    pub contents: Vec<u8>,
}

/// The work on a moment: any thread may do it. If nobody has begun it when the machine needs the result, the machine
/// does it itself.
#[derive(Clone)]
pub struct HashWork(Arc<Mutex<Option<Work>>>);

struct Work {
    past: Arc<Past>,
    icount: Icount,
    digest: MemoryDigest,
    /// It has everything but RAM.
    hasher: blake3::Hasher,
    wanted: Option<Wanted>,
    result: Sender<Hashed>,
}

/// A moment that is being worked on.
pub(super) struct Hashing {
    work: HashWork,
    past: Arc<Past>,
    result: Receiver<Hashed>,
}

impl HashWork {
    /// Does the work, unless somebody else has begun.
    pub fn run(&self) {
        let work = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(work) = work {
            work.run();
        }
    }
}

impl Work {
    fn run(self) {
        let Work { past, icount, mut digest, hasher, wanted, result } = self;
        let keeps = wanted.is_some();
        let (base, mut contents) = wanted.map_or_else(Default::default, |wanted| (wanted.base, wanted.contents));
        let mut changed = Vec::new();
        contents.clear();
        let mut buffer = [[0; PAGE_SIZE as usize]; PAGES_AT_ONCE];
        for (number, group) in past.pages().chunks(PAGES_AT_ONCE).enumerate() {
            for (slot, content) in buffer[..group.len()].iter_mut().enumerate() {
                past.take(number * PAGES_AT_ONCE + slot, content);
            }
            let pages: Vec<&PageBytes> = buffer[..group.len()].iter().collect();
            for ((page, hash), content) in group.iter().zip(content_hashes(&pages)).zip(pages) {
                digest.set(*page, hash);
                let before = base.as_ref().and_then(|base| base.hash_of(*page)).unwrap_or(ZERO_PAGE);
                if keeps && before != hash {
                    changed.push((*page, hash));
                    if hash != ZERO_PAGE {
                        contents.extend_from_slice(content);
                    }
                }
            }
        }
        let state_hash = hash::finish(hasher, digest.value());
        // A machine that is gone needs no result.
        let _ = result.send(Hashed { icount, state_hash, digest, changed, contents });
    }
}

impl Machine {
    /// Takes down this moment for its hash, and for a snapshot if pages are `wanted`. The machine may run on at once;
    /// [`Machine::take_hashed`] has the result when the work is done.
    pub fn begin_hash(&mut self, wanted: Option<Wanted>) -> HashWork {
        self.settle_hash();
        self.hashed = None;
        self.collect_dirty();
        self.adopt_digest();
        let mut pages = self.dirty.digest.take();
        if let Some(Wanted { base, .. }) = &wanted {
            let dirty = pages.len();
            match base {
                Some(base) => pages.extend(self.digest.differing_pages(base)),
                None => pages.extend(self.digest.pages().map(|(page, _)| page)),
            }
            if pages.len() > dirty {
                pages.sort_unstable();
                pages.dedup();
            }
        }
        let past = Arc::new(Past::new(self.board.memory.clone(), pages));
        self.engine.keep_past(Some(Arc::clone(&past)));
        self.board.past = Some(Arc::clone(&past));
        let icount = self.engine.icount();
        let (sender, result) = channel();
        let work = HashWork(Arc::new(Mutex::new(Some(Work {
            past: Arc::clone(&past),
            icount,
            digest: self.digest.clone(),
            hasher: hash::begin(icount, self.engine.state(), &self.board),
            wanted,
            result: sender,
        }))));
        self.hashing = Some(Hashing { work: work.clone(), past, result });
        work
    }

    /// The result of [`Machine::begin_hash`], once. None if there is none yet and the caller does not `wait`, or if
    /// nothing was begun.
    pub fn take_hashed(&mut self, wait: bool) -> Option<Hashed> {
        if let Some(hashing) = &self.hashing {
            let result = if wait { None } else { Some(hashing.result.try_recv()) };
            match result {
                Some(Err(TryRecvError::Empty)) => return None,
                Some(Ok(hashed)) => self.accept(Some(hashed)),
                Some(Err(TryRecvError::Disconnected)) | None => self.settle_hash(),
            }
        }
        self.hashed.take()
    }

    /// Waits for the hash that was begun: to be called before the digest is needed, or RAM changes behind the engine's
    /// and the devices' backs.
    pub(super) fn settle_hash(&mut self) {
        if let Some(hashing) = &self.hashing {
            hashing.work.run();
            let hashed = hashing.result.recv().ok();
            self.accept(hashed);
        }
    }

    /// Nothing needs to be kept any more.
    fn accept(&mut self, hashed: Option<Hashed>) {
        self.engine.keep_past(None);
        self.board.past = None;
        let Some(hashing) = self.hashing.take() else { return };
        match hashed {
            Some(hashed) => {
                self.digest = hashed.digest.clone();
                self.hashed = Some(hashed);
            }
            // The thread has died in its work: these pages are to be hashed another time.
            None => hashing.past.pages().iter().for_each(|page| {
                self.dirty.digest.insert(*page);
            }),
        }
    }
}
