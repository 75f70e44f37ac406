//! Virtqueues (virtio 1.2, 2.7): a `virtio-queue` split ring with a serde form, and descriptor chains that have been
//! walked and checked before a device sees them.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::guest_memory::Permissions;
use vm_memory::{Bytes, GuestAddress, GuestMemory as _};

use crate::GuestMemory;

/// VIRTQ_AVAIL_F_NO_INTERRUPT (virtio 1.2, 2.7.6).
const AVAIL_NO_INTERRUPT: u16 = 1;
/// Most descriptors in one chain, indirect ones included.
pub const CHAIN_DESCRIPTORS_MAX: usize = 1024;

/// A ring or chain that breaks the specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The rings are not in RAM or the available index is more than the queue's size ahead.
    #[error("the rings of the queue are not in RAM or inconsistent")]
    Ring,
    /// A chain that loops, leaves the table, or mixes up its order or its indirect tables.
    #[error("the descriptor chain at {head} is malformed")]
    Chain {
        /// Index of its first descriptor.
        head: u16,
    },
    /// A buffer that is not RAM.
    #[error("the descriptor chain at {head} names {len} bytes at {address:#x}, which is not RAM")]
    Buffer {
        /// Index of the chain's first descriptor.
        head: u16,
        /// Guest-physical address of the buffer.
        address: u64,
        /// Its length in bytes.
        len: u32,
    },
    /// A chain that is too short or too long for the device.
    #[error("the descriptor chain at {head} has a size that the device does not take")]
    Size {
        /// Index of the chain's first descriptor.
        head: u16,
    },
}

/// A range of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// Guest-physical address.
    pub address: u64,
    /// Length in bytes.
    pub len: u32,
}

/// A checked descriptor chain: every span is in RAM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chain {
    /// Index of the first descriptor, which names the chain in the used ring.
    pub head: u16,
    /// What the device reads.
    pub readable: Vec<Span>,
    /// What the device writes, after the readable part.
    pub writable: Vec<Span>,
}

impl Chain {
    /// Number of bytes that the device can read.
    pub fn readable_len(&self) -> u64 {
        total(&self.readable)
    }

    /// Number of bytes that the device can write.
    pub fn writable_len(&self) -> u64 {
        total(&self.writable)
    }
}

/// Number of bytes in a list of spans.
pub fn total(spans: &[Span]) -> u64 {
    spans.iter().map(|span| u64::from(span.len)).sum()
}

/// Cuts the first `count` bytes off a list of spans and returns them; None if there are fewer.
pub fn split_front(spans: &mut Vec<Span>, count: u64) -> Option<Vec<Span>> {
    if total(spans) < count {
        return None;
    }
    let mut rest = count;
    let mut front = Vec::new();
    let mut back = Vec::new();
    for span in spans.drain(..) {
        let taken = rest.min(u64::from(span.len)) as u32;
        rest -= u64::from(taken);
        if taken > 0 {
            front.push(Span { address: span.address, len: taken });
        }
        if taken < span.len {
            back.push(Span { address: span.address.wrapping_add(u64::from(taken)), len: span.len - taken });
        }
    }
    *spans = back;
    Some(front)
}

/// Copies from guest RAM into `data`, as far as the spans go; returns the number of bytes.
pub fn gather(memory: &GuestMemory, spans: &[Span], data: &mut [u8]) -> Result<usize, QueueError> {
    let mut done = 0;
    for span in spans {
        let count = (data.len() - done).min(span.len as usize);
        let target = &mut data[done..done + count];
        memory.read_slice(target, GuestAddress(span.address)).map_err(|_| QueueError::Ring)?;
        done += count;
    }
    Ok(done)
}

/// Copies `data` into guest RAM, as far as the spans go; returns the number of bytes.
pub fn scatter(memory: &GuestMemory, spans: &[Span], data: &[u8]) -> Result<usize, QueueError> {
    let mut done = 0;
    for span in spans {
        let count = (data.len() - done).min(span.len as usize);
        let source = &data[done..done + count];
        memory.write_slice(source, GuestAddress(span.address)).map_err(|_| QueueError::Ring)?;
        done += count;
    }
    Ok(done)
}

/// A virtqueue. Its serde form is everything but the rings, which are in guest RAM.
#[derive(Debug, Deserialize, Serialize)]
#[serde(try_from = "Saved", into = "Saved")]
pub struct Virtqueue {
    queue: Queue,
}

/// The serde form of a [`Virtqueue`].
#[derive(Clone, Copy, Serialize, Deserialize)]
struct Saved {
    max_size: u16,
    size: u16,
    ready: bool,
    next_avail: u16,
    next_used: u16,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

impl From<Virtqueue> for Saved {
    fn from(queue: Virtqueue) -> Saved {
        let state = queue.queue.state();
        Saved {
            max_size: state.max_size,
            size: state.size,
            ready: state.ready,
            next_avail: state.next_avail,
            next_used: state.next_used,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
        }
    }
}

impl TryFrom<Saved> for Virtqueue {
    type Error = String;

    fn try_from(saved: Saved) -> Result<Virtqueue, String> {
        let state = QueueState {
            max_size: saved.max_size,
            next_avail: saved.next_avail,
            next_used: saved.next_used,
            event_idx_enabled: false,
            size: saved.size,
            ready: saved.ready,
            desc_table: saved.desc_table,
            avail_ring: saved.avail_ring,
            used_ring: saved.used_ring,
        };
        let queue = Queue::try_from(state).map_err(|error| format!("the saved queue is invalid: {error}"))?;
        Ok(Virtqueue { queue })
    }
}

impl Clone for Virtqueue {
    fn clone(&self) -> Virtqueue {
        let queue = Queue::try_from(self.queue.state()).expect("the state of a queue is valid");
        Virtqueue { queue }
    }
}

impl Virtqueue {
    /// A queue that takes up to `max_size` descriptors, a power of two.
    pub(super) fn new(max_size: u16) -> Virtqueue {
        let queue = Queue::new(max_size).expect("queue sizes of devices are powers of two");
        Virtqueue { queue }
    }

    /// The registers behind the queue.
    pub(super) fn registers(&mut self) -> &mut Queue {
        &mut self.queue
    }

    /// Number of descriptors that the driver has chosen.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// True once the driver has enabled the queue.
    pub fn ready(&self) -> bool {
        self.queue.ready()
    }

    /// True if the rings are in RAM and the queue is enabled.
    pub fn valid(&self, memory: &GuestMemory) -> bool {
        self.queue.is_valid(memory)
    }

    /// Takes the next chain that the driver has made available.
    pub fn pop(&mut self, memory: &GuestMemory) -> Result<Option<Chain>, QueueError> {
        if !self.queue.ready() {
            return Ok(None);
        }
        if !self.queue.is_valid(memory) {
            return Err(QueueError::Ring);
        }
        let mut available = self.queue.iter(memory).map_err(|_| QueueError::Ring)?;
        let Some(descriptors) = available.next() else { return Ok(None) };
        let head = descriptors.head_index();
        let mut chain = Chain { head, readable: Vec::new(), writable: Vec::new() };
        let mut complete = false;
        for (count, descriptor) in descriptors.enumerate() {
            let (address, len) = (descriptor.addr(), descriptor.len());
            if count >= CHAIN_DESCRIPTORS_MAX || (!descriptor.is_write_only() && !chain.writable.is_empty()) {
                return Err(QueueError::Chain { head });
            }
            let access = if descriptor.is_write_only() { Permissions::Write } else { Permissions::Read };
            if !memory.check_range(address, len as usize, access) {
                return Err(QueueError::Buffer { head, address: address.0, len });
            }
            let spans = if descriptor.is_write_only() { &mut chain.writable } else { &mut chain.readable };
            spans.push(Span { address: address.0, len });
            // The walk ends early at a broken link: then the last descriptor still names a next one.
            complete = !descriptor.has_next();
        }
        if complete { Ok(Some(chain)) } else { Err(QueueError::Chain { head }) }
    }

    /// Gives a chain back with the number of bytes written into it.
    pub fn push_used(&mut self, memory: &GuestMemory, head: u16, len: u32) -> Result<(), QueueError> {
        self.queue.add_used(memory, head, len).map_err(|_| QueueError::Ring)
    }

    /// True unless the driver has asked for no interrupts.
    pub fn wants_interrupt(&self, memory: &GuestMemory) -> bool {
        let flags: Result<u16, _> = memory.read_obj(GuestAddress(self.queue.avail_ring()));
        flags.is_ok_and(|flags| u16::from_le(flags) & AVAIL_NO_INTERRUPT == 0)
    }
}
