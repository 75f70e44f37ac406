//! The block device (virtio 1.2, 5.2): read, write, flush, get-ID.
//!
//! A request is taken from the queue when the driver notifies, given a due time (a fixed latency and a seeded part),
//! and done as a whole when that time comes: data moves between disk and RAM only then. Requests complete in the order
//! of their due times, those due together in the order of arrival.

use serde::{Deserialize, Serialize};

use super::queue::{Chain, QueueError, Span, gather, scatter, split_front};
use super::transport::{Queues, VirtioDevice};
use crate::disk::{CowDisk, Disk, DiskError};
use crate::{Context, Effect, GuestMemory, Latency, RandomStream, VirtualNs};

/// Bytes of a sector, the unit of capacity and of request offsets.
pub const SECTOR_LEN: u64 = 512;
/// Most bytes that one request may move.
pub const REQUEST_BYTES_MAX: u64 = 16 << 20;
/// Length of the answer to get-ID, in bytes.
const ID_LEN: usize = 20;
/// Most segments of data in a request.
const SEGMENTS_MAX: u32 = 254;
const QUEUE_SIZE: u16 = 256;
const COMPLETION_TOKEN: u32 = 0;
/// Bytes moved at once between disk and RAM.
const CHUNK_LEN: usize = 64 * 1024;

mod feature {
    pub const SEG_MAX: u64 = 1 << 2;
    pub const READ_ONLY: u64 = 1 << 5;
    pub const BLOCK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
}

mod request {
    pub const READ: u32 = 0;
    pub const WRITE: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
}

mod status {
    pub const OK: u8 = 0;
    pub const IO_ERROR: u8 = 1;
    pub const UNSUPPORTED: u8 = 2;
}

/// A request waiting for its time.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Pending {
    due_ns: u64,
    head: u16,
    kind: u32,
    sector: u64,
    /// Readable for writes, writable for reads and get-ID.
    data: Vec<Span>,
    /// Where the status byte goes.
    status_address: u64,
}

/// A disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Block<D = CowDisk> {
    disk: D,
    id: String,
    latency: Latency,
    random: RandomStream,
    /// In the order of completion.
    pending: Vec<Pending>,
}

impl<D: Disk> Block<D> {
    /// A device over `disk`. `id` is what get-ID answers, cut to 20 bytes; with `seed` it keys the random part of the
    /// latency, so it must differ between the disks of a machine.
    pub fn new(disk: D, id: &str, latency: Latency, seed: u64) -> Block<D> {
        let random = RandomStream::new(seed, &format!("virtio block {id}"));
        Block { disk, id: id.to_string(), latency, random, pending: Vec::new() }
    }

    /// The disk.
    pub fn disk(&self) -> &D {
        &self.disk
    }

    /// The disk, to attach its content after it was restored.
    pub fn disk_mut(&mut self) -> &mut D {
        &mut self.disk
    }

    /// Takes a chain apart (5.2.6). A chain without room for header and status cannot be answered.
    fn parse(&self, memory: &GuestMemory, mut chain: Chain, due_ns: u64) -> Result<Pending, QueueError> {
        let size = QueueError::Size { head: chain.head };
        let header_spans = split_front(&mut chain.readable, 16).ok_or(size)?;
        let mut header = [0; 16];
        gather(memory, &header_spans, &mut header)?;
        let kind = crate::value_of(&header[..4]) as u32;
        let sector = crate::value_of(&header[8..]);
        // The last writable byte is the status.
        let data_len = chain.writable_len().checked_sub(1).ok_or(size)?;
        let inbound = split_front(&mut chain.writable, data_len).ok_or(size)?;
        let status_address = chain.writable.iter().find(|span| span.len > 0).ok_or(size)?.address;
        let data = if kind == request::WRITE { chain.readable } else { inbound };
        Ok(Pending { due_ns, head: chain.head, kind, sector, data, status_address })
    }

    /// Does a request; returns the number of bytes written to RAM before the status, and the status.
    fn perform(&mut self, memory: &GuestMemory, pending: &Pending) -> Result<(u32, u8), QueueError> {
        let len = super::queue::total(&pending.data);
        match pending.kind {
            request::READ | request::WRITE => {
                let offset = pending.sector.checked_mul(SECTOR_LEN);
                let end = offset.and_then(|offset| offset.checked_add(len));
                let fits = end.is_some_and(|end| end <= self.disk.len()) && len.is_multiple_of(SECTOR_LEN);
                match offset {
                    Some(offset) if fits && len <= REQUEST_BYTES_MAX => {
                        self.transfer(memory, pending, offset, pending.kind == request::WRITE)
                    }
                    _ => Ok((0, status::IO_ERROR)),
                }
            }
            request::FLUSH => Ok((0, status_of(self.disk.flush()))),
            request::GET_ID => {
                let mut id = [0; ID_LEN];
                for (byte, from) in id.iter_mut().zip(self.id.bytes()) {
                    *byte = from;
                }
                let written = scatter(memory, &pending.data, &id)?;
                Ok((written as u32, status::OK))
            }
            _ => Ok((0, status::UNSUPPORTED)),
        }
    }

    fn transfer(
        &mut self,
        memory: &GuestMemory,
        pending: &Pending,
        mut offset: u64,
        to_disk: bool,
    ) -> Result<(u32, u8), QueueError> {
        let mut buffer = vec![0; CHUNK_LEN.min(super::queue::total(&pending.data) as usize)];
        let mut spans = pending.data.clone();
        let mut written = 0;
        loop {
            let count = super::queue::total(&spans).min(buffer.len() as u64);
            let Some(front) = split_front(&mut spans, count).filter(|_| count > 0) else {
                return Ok((written, status::OK));
            };
            let chunk = &mut buffer[..count as usize];
            let done = if to_disk {
                gather(memory, &front, chunk)?;
                self.disk.write_at(offset, chunk)
            } else {
                self.disk.read_at(offset, chunk)
            };
            if status_of(done) != status::OK {
                return Ok((written, status::IO_ERROR));
            }
            if !to_disk {
                scatter(memory, &front, chunk)?;
                written += count as u32;
            }
            offset += count;
        }
    }

    fn complete(&mut self, ctx: &Context, queues: &mut Queues, pending: &Pending) -> Result<(), QueueError> {
        let (written, status) = self.perform(ctx.memory, pending)?;
        scatter(ctx.memory, &[Span { address: pending.status_address, len: 1 }], &[status])?;
        queues.push_used(ctx, 0, pending.head, written + 1)
    }

    fn schedule(&self, ctx: &mut Context) {
        if let Some(first) = self.pending.first() {
            ctx.effects.push(Effect::Wake { token: COMPLETION_TOKEN, at: VirtualNs(first.due_ns) });
        }
    }
}

fn status_of(result: Result<(), DiskError>) -> u8 {
    if result.is_ok() { status::OK } else { status::IO_ERROR }
}

impl<D: Disk> VirtioDevice for Block<D> {
    fn id(&self) -> u32 {
        2
    }

    fn features(&self) -> u64 {
        let read_only = if self.disk.read_only() { feature::READ_ONLY } else { 0 };
        feature::SEG_MAX | feature::BLOCK_SIZE | feature::FLUSH | read_only
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    /// capacity: le64, size_max: le32, seg_max: le32, geometry: 4 bytes, blk_size: le32 (5.2.4).
    fn config(&self) -> Vec<u8> {
        let mut config = (self.disk.len() / SECTOR_LEN).to_le_bytes().to_vec();
        config.extend(0u32.to_le_bytes());
        config.extend(SEGMENTS_MAX.to_le_bytes());
        config.extend([0; 4]);
        config.extend((SECTOR_LEN as u32).to_le_bytes());
        config
    }

    fn notify(&mut self, ctx: &mut Context, queues: &mut Queues, queue: u16) -> Result<(), QueueError> {
        if queue != 0 {
            return Ok(());
        }
        let mut result = Ok(());
        for _ in 0..queues.size(0) {
            let chain = match queues.pop(ctx, 0) {
                Ok(Some(chain)) => chain,
                Ok(None) => break,
                Err(error) => {
                    result = Err(error);
                    break;
                }
            };
            // More requests in flight than the queue has descriptors: the driver has offered one twice.
            if self.pending.len() >= usize::from(queues.size(0)) {
                result = Err(QueueError::Chain { head: chain.head });
                break;
            }
            let due_ns = ctx.now.0.saturating_add(self.latency.draw(&mut self.random));
            match self.parse(ctx.memory, chain, due_ns) {
                Ok(pending) => {
                    let place = self.pending.partition_point(|other| other.due_ns <= due_ns);
                    self.pending.insert(place, pending);
                }
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        self.schedule(ctx);
        result
    }

    fn event(&mut self, ctx: &mut Context, queues: &mut Queues, token: u32) -> Result<(), QueueError> {
        if token != COMPLETION_TOKEN {
            return Ok(());
        }
        let due = self.pending.partition_point(|pending| pending.due_ns <= ctx.now.0);
        let rest = self.pending.split_off(due);
        let due = std::mem::replace(&mut self.pending, rest);
        let result = due.iter().try_for_each(|pending| self.complete(ctx, queues, pending));
        self.schedule(ctx);
        result
    }

    fn reset(&mut self, ctx: &mut Context) {
        self.pending.clear();
        ctx.effects.push(Effect::Cancel { token: COMPLETION_TOKEN });
    }

    fn rekey(&mut self, seed: u64) {
        self.random.rekey(seed);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::testing::{Bench, assert_round_trip};
    use crate::virtio::VirtioMmio;
    use crate::virtio::driver::Driver;

    const HEADER: u64 = 0x8000;
    const DATA: u64 = 0x9000;
    const STATUS: u64 = 0xA000;

    fn disk() -> CowDisk {
        CowDisk::new(Arc::new((0..8192u32).map(|i| (i / 512) as u8).collect::<Vec<u8>>()), false)
    }

    fn start(bench: &mut Bench, latency: Latency) -> (VirtioMmio<Block>, Driver) {
        let mut device = VirtioMmio::new(0, Block::new(disk(), "root", latency, 1));
        let driver = Driver::start(bench, &mut device, 1);
        bench.take();
        (device, driver)
    }

    fn request(bench: &mut Bench, driver: &mut Driver, kind: u32, sector: u64, len: u32) {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        bench.store(HEADER, &header);
        bench.store(STATUS, &[0xFF]);
        let inbound = kind != request::WRITE;
        let data = if len > 0 { vec![(DATA, len, inbound)] } else { vec![] };
        let chain: Vec<_> = [(HEADER, 16, false)].into_iter().chain(data).chain([(STATUS, 1, true)]).collect();
        driver.offer(bench, 0, &chain);
    }

    fn finish(bench: &mut Bench, device: &mut VirtioMmio<Block>, driver: &Driver) -> u8 {
        driver.notify(bench, device, 0);
        bench.now = bench.wake(COMPLETION_TOKEN).expect("a completion is due");
        bench.event(device, COMPLETION_TOKEN);
        bench.load(STATUS, 1)[0]
    }

    #[test]
    fn reads_writes_and_identifies() {
        let mut bench = Bench::new();
        let (mut device, mut driver) = start(&mut bench, Latency { base_ns: 1_000, jitter_ns: 500 });
        request(&mut bench, &mut driver, request::READ, 3, 1024);
        assert_eq!(finish(&mut bench, &mut device, &driver), status::OK);
        assert!((1_000..=1_500).contains(&bench.now));
        assert_eq!(bench.load(DATA, 1024), [[3; 512], [4; 512]].concat());
        assert_eq!(driver.used(&bench, 0), vec![(0, 1025)]);
        assert!(bench.take().contains(&Effect::Line { gsi: 5, level: true }));
        assert_eq!(bench.read(&mut device, 0x60, 4), 1);
        bench.write(&mut device, 0x64, 4, 1);
        assert_eq!(bench.take(), vec![Effect::Line { gsi: 5, level: false }]);

        bench.store(DATA, &[0xAB; 512]);
        request(&mut bench, &mut driver, request::WRITE, 5, 512);
        assert_eq!(finish(&mut bench, &mut device, &driver), status::OK);
        let mut sector = [0; 512];
        device.device().disk().read_at(5 * 512, &mut sector).unwrap();
        assert_eq!(sector, [0xAB; 512]);

        request(&mut bench, &mut driver, request::GET_ID, 0, 20);
        assert_eq!(finish(&mut bench, &mut device, &driver), status::OK);
        assert_eq!(bench.load(DATA, 5), b"root\0");
        request(&mut bench, &mut driver, request::FLUSH, 0, 0);
        assert_eq!(finish(&mut bench, &mut device, &driver), status::OK);
    }

    #[test]
    fn bad_requests_fail_with_a_status() {
        let mut bench = Bench::new();
        let (mut device, mut driver) = start(&mut bench, Latency::default());
        for (kind, sector, len, wanted) in [
            (request::READ, 16, 512, status::IO_ERROR),
            (request::READ, 15, 1024, status::IO_ERROR),
            (request::WRITE, u64::MAX, 512, status::IO_ERROR),
            (request::READ, u64::MAX / 512, 512, status::IO_ERROR),
            (request::READ, 0, 100, status::IO_ERROR),
            (99, 0, 512, status::UNSUPPORTED),
        ] {
            request(&mut bench, &mut driver, kind, sector, len);
            assert_eq!(finish(&mut bench, &mut device, &driver), wanted, "{kind} {sector:#x} {len}");
        }
        assert!(device.driver_ready());
    }

    #[test]
    fn a_chain_without_a_status_needs_a_reset() {
        let mut bench = Bench::new();
        let (mut device, mut driver) = start(&mut bench, Latency::default());
        driver.offer(&mut bench, 0, &[(HEADER, 16, false)]);
        driver.notify(&mut bench, &mut device, 0);
        assert_eq!(bench.read(&mut device, 0x70, 4) & 64, 64);
        assert_eq!(bench.read(&mut device, 0x60, 4) & 2, 2);
        let _ = Driver::start(&mut bench, &mut device, 1);
        assert!(device.driver_ready());
    }

    #[test]
    fn requests_complete_in_the_order_of_their_due_times() {
        let mut bench = Bench::new();
        let (mut device, mut driver) = start(&mut bench, Latency { base_ns: 0, jitter_ns: 1_000_000 });
        for _ in 0..20 {
            request(&mut bench, &mut driver, request::READ, 0, 512);
        }
        driver.notify(&mut bench, &mut device, 0);
        let mut twin = assert_round_trip(&device);
        twin.device_mut().disk_mut().attach(Arc::new(vec![0; 8192]), Default::default()).unwrap();
        while driver.used(&bench, 0).len() < 20 {
            let due = bench.wake(COMPLETION_TOKEN).unwrap();
            assert!(due >= bench.now);
            bench.now = due;
            bench.event(&mut device, COMPLETION_TOKEN);
        }
        let heads: Vec<u16> = driver.used(&bench, 0).into_iter().map(|(head, _)| head).collect();
        assert!(!heads.is_sorted());
        assert!(device.device().pending.is_empty());
        assert_eq!(twin.device().pending.len(), 20);
    }

    #[test]
    fn a_reset_forgets_what_is_pending() {
        let mut bench = Bench::new();
        let (mut device, mut driver) = start(&mut bench, Latency { base_ns: 10, jitter_ns: 0 });
        request(&mut bench, &mut driver, request::READ, 0, 512);
        driver.notify(&mut bench, &mut device, 0);
        bench.write(&mut device, 0x70, 4, 0);
        assert_eq!(bench.wake(COMPLETION_TOKEN), None);
        bench.event(&mut device, COMPLETION_TOKEN);
        assert_eq!(bench.load(STATUS, 1), [0xFF]);
    }
}
