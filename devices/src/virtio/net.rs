//! The network card (virtio 1.2, 5.1): a link that is up, and no one at its other end.
//!
//! Frames that the driver sends are counted and dropped in `Net::transmit`: a peer would plug in there. What a peer
//! sends would enter through [`VirtioMmio::<Net>::deliver`].

use serde::{Deserialize, Serialize};

use super::VirtioMmio;
use super::queue::{QueueError, gather, scatter};
use super::transport::{Queues, VirtioDevice};
use crate::Context;

/// Length of the header before each frame, with VIRTIO_F_VERSION_1 (5.1.6).
const HEADER_LEN: u64 = 12;
/// Most bytes of a frame, without that header: no offloads, so an Ethernet frame with one VLAN tag.
pub const FRAME_MAX: usize = 1518;

const RECEIVE_QUEUE: u16 = 0;
const TRANSMIT_QUEUE: u16 = 1;

mod feature {
    pub const MAC: u64 = 1 << 5;
    pub const STATUS: u64 = 1 << 16;
}

const STATUS_LINK_UP: u16 = 1;

/// A network card.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Net {
    mac: [u8; 6],
    frames_sent: u64,
}

impl Net {
    /// A card with this address.
    pub fn new(mac: [u8; 6]) -> Net {
        Net { mac, frames_sent: 0 }
    }

    /// Number of frames that the guest has sent.
    pub fn frames_sent(&self) -> u64 {
        self.frames_sent
    }

    /// A frame leaves the guest: nobody is there to take it.
    fn transmit(&mut self, _ctx: &mut Context, _frame: &[u8]) {
        self.frames_sent = self.frames_sent.wrapping_add(1);
    }

    fn send(&mut self, ctx: &mut Context, queues: &mut Queues) -> Result<(), QueueError> {
        for _ in 0..queues.size(TRANSMIT_QUEUE) {
            let Some(chain) = queues.pop(ctx, TRANSMIT_QUEUE)? else { break };
            let len = chain.readable_len();
            if len < HEADER_LEN || len > HEADER_LEN + FRAME_MAX as u64 {
                return Err(QueueError::Size { head: chain.head });
            }
            let mut bytes = vec![0; len as usize];
            gather(ctx.memory, &chain.readable, &mut bytes)?;
            self.transmit(ctx, &bytes[HEADER_LEN as usize..]);
            queues.push_used(ctx, TRANSMIT_QUEUE, chain.head, 0)?;
        }
        Ok(())
    }

    /// Puts a frame into the next buffer of the driver; false if there is none.
    fn receive(&mut self, ctx: &mut Context, queues: &mut Queues, frame: &[u8]) -> Result<bool, QueueError> {
        let Some(chain) = queues.pop(ctx, RECEIVE_QUEUE)? else { return Ok(false) };
        let mut bytes = vec![0; HEADER_LEN as usize];
        // num_buffers: the frame is in one buffer.
        bytes[10] = 1;
        bytes.extend_from_slice(frame);
        if chain.writable_len() < bytes.len() as u64 {
            return Err(QueueError::Size { head: chain.head });
        }
        scatter(ctx.memory, &chain.writable, &bytes)?;
        queues.push_used(ctx, RECEIVE_QUEUE, chain.head, bytes.len() as u32)?;
        Ok(true)
    }
}

impl VirtioMmio<Net> {
    /// A frame arrives from the network. False if it was dropped: no driver, no buffer, or longer than
    /// [`FRAME_MAX`].
    pub fn deliver(&mut self, ctx: &mut Context, frame: &[u8]) -> bool {
        frame.len() <= FRAME_MAX && self.work(ctx, |net, ctx, queues| net.receive(ctx, queues, frame))
    }
}

impl VirtioDevice for Net {
    fn id(&self) -> u32 {
        1
    }

    fn features(&self) -> u64 {
        feature::MAC | feature::STATUS
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[256, 256]
    }

    /// mac: 6 bytes, status: le16 (5.1.4).
    fn config(&self) -> Vec<u8> {
        let mut config = self.mac.to_vec();
        config.extend(STATUS_LINK_UP.to_le_bytes());
        config
    }

    fn notify(&mut self, ctx: &mut Context, queues: &mut Queues, queue: u16) -> Result<(), QueueError> {
        if queue == TRANSMIT_QUEUE { self.send(ctx, queues) } else { Ok(()) }
    }

    fn event(&mut self, _ctx: &mut Context, _queues: &mut Queues, _token: u32) -> Result<(), QueueError> {
        Ok(())
    }

    fn reset(&mut self, _ctx: &mut Context) {}

    fn rekey(&mut self, _seed: u64) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Bench;
    use crate::virtio::driver::Driver;

    #[test]
    fn frames_are_consumed_and_delivered() {
        let mut bench = Bench::new();
        let mut device = VirtioMmio::new(1, Net::new([2, 0, 0, 0, 0, 1]));
        assert!(!device.deliver(&mut bench.context(), b"nobody listens"));
        let mut driver = Driver::start(&mut bench, &mut device, 2);
        assert_eq!(bench.read(&mut device, 0x104, 4), 0x0001_0100);
        driver.offer(&mut bench, 1, &[(0x9000, 12, false), (0x9100, 60, false)]);
        driver.notify(&mut bench, &mut device, 1);
        assert_eq!(driver.used(&bench, 1), vec![(0, 0)]);
        assert_eq!(device.device().frames_sent(), 1);

        assert!(!device.deliver(&mut bench.context(), b"no buffer"));
        driver.offer(&mut bench, 0, &[(0xA000, 1530, true)]);
        assert!(device.deliver(&mut bench.context(), b"frame"));
        assert_eq!(bench.load(0xA000, 17), b"\0\0\0\0\0\0\0\0\0\0\x01\0frame");
        assert_eq!(driver.used(&bench, 0), vec![(0, 17)]);
    }
}
