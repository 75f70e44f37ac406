//! The console device (virtio 1.2, 5.3) that carries the guest agent's channel: one port, /dev/hvc0 in Linux.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::VirtioMmio;
use super::queue::{QueueError, gather, scatter, split_front};
use super::transport::{Queues, VirtioDevice};
use crate::{Context, Effect};

/// The channel of the bytes that the guest sends.
pub const CHANNEL: &str = "agent";
/// Most bytes that wait to be read by the guest.
pub const INPUT_MAX: usize = 1 << 20;
/// Most bytes of one chain from the driver.
pub const SEND_MAX: u64 = 1 << 20;

const RECEIVE_QUEUE: u16 = 0;
const TRANSMIT_QUEUE: u16 = 1;

/// A byte channel between the guest and the outside.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Console {
    input: VecDeque<u8>,
}

impl Console {
    /// A channel with nothing in it.
    pub fn new() -> Console {
        Console::default()
    }

    /// Moves waiting input into the buffers that the driver has offered.
    fn receive(&mut self, ctx: &mut Context, queues: &mut Queues) -> Result<(), QueueError> {
        for _ in 0..queues.size(RECEIVE_QUEUE) {
            if self.input.is_empty() {
                break;
            }
            let Some(chain) = queues.pop(ctx, RECEIVE_QUEUE)? else { break };
            let count = chain.writable_len().min(self.input.len() as u64) as usize;
            let bytes: Vec<u8> = self.input.drain(..count).collect();
            scatter(ctx.memory, &chain.writable, &bytes)?;
            queues.push_used(ctx, RECEIVE_QUEUE, chain.head, count as u32)?;
        }
        Ok(())
    }

    fn transmit(&mut self, ctx: &mut Context, queues: &mut Queues) -> Result<(), QueueError> {
        for _ in 0..queues.size(TRANSMIT_QUEUE) {
            let Some(mut chain) = queues.pop(ctx, TRANSMIT_QUEUE)? else { break };
            let len = chain.readable_len();
            if len > SEND_MAX {
                return Err(QueueError::Size { head: chain.head });
            }
            let spans = split_front(&mut chain.readable, len).unwrap_or_default();
            let mut bytes = vec![0; len as usize];
            gather(ctx.memory, &spans, &mut bytes)?;
            if !bytes.is_empty() {
                ctx.effects.push(Effect::Output { channel: CHANNEL, bytes });
            }
            queues.push_used(ctx, TRANSMIT_QUEUE, chain.head, 0)?;
        }
        Ok(())
    }
}

impl VirtioMmio<Console> {
    /// Bytes from outside arrive for the guest's agent. Takes as many as fit into the queue and says how many; they
    /// wait there if no driver is running yet.
    pub fn agent_input(&mut self, ctx: &mut Context, bytes: &[u8]) -> usize {
        let input = &mut self.device_mut().input;
        let count = bytes.len().min(INPUT_MAX.saturating_sub(input.len()));
        input.extend(&bytes[..count]);
        self.work(ctx, Console::receive);
        count
    }
}

impl VirtioDevice for Console {
    fn id(&self) -> u32 {
        3
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[64, 64]
    }

    /// cols, rows: le16; max_nr_ports, emerg_wr: le32, all without their features (5.3.4).
    fn config(&self) -> Vec<u8> {
        vec![0; 12]
    }

    fn notify(&mut self, ctx: &mut Context, queues: &mut Queues, queue: u16) -> Result<(), QueueError> {
        match queue {
            RECEIVE_QUEUE => self.receive(ctx, queues),
            TRANSMIT_QUEUE => self.transmit(ctx, queues),
            _ => Ok(()),
        }
    }

    fn event(&mut self, _ctx: &mut Context, _queues: &mut Queues, _token: u32) -> Result<(), QueueError> {
        Ok(())
    }

    /// Input that has not been read stays: it belongs to the channel, not to the driver.
    fn reset(&mut self, _ctx: &mut Context) {}

    fn rekey(&mut self, _seed: u64) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Bench, assert_round_trip};
    use crate::virtio::driver::Driver;

    #[test]
    fn bytes_go_both_ways() {
        let mut bench = Bench::new();
        let mut device = VirtioMmio::new(3, Console::new());
        assert_eq!(device.agent_input(&mut bench.context(), b"early"), 5);
        let mut driver = Driver::start(&mut bench, &mut device, 2);
        driver.offer(&mut bench, 0, &[(0x9000, 4, true)]);
        driver.offer(&mut bench, 0, &[(0x9100, 4, true)]);
        driver.notify(&mut bench, &mut device, 0);
        assert_eq!(bench.load(0x9000, 4), b"earl");
        assert_eq!(driver.used(&bench, 0), vec![(0, 4), (1, 1)]);
        driver.offer(&mut bench, 0, &[(0x9200, 4, true)]);
        device.agent_input(&mut bench.context(), b"later");
        assert_eq!(bench.load(0x9200, 4), b"late");
        assert_eq!(assert_round_trip(&device).device().input, [b'r']);

        bench.take();
        bench.store(0x9300, b"answer");
        driver.offer(&mut bench, 1, &[(0x9300, 6, false)]);
        driver.notify(&mut bench, &mut device, 1);
        assert!(bench.take().contains(&Effect::Output { channel: CHANNEL, bytes: b"answer".to_vec() }));
    }

    #[test]
    fn the_queue_of_input_is_bounded() {
        let mut bench = Bench::new();
        let mut device = VirtioMmio::new(3, Console::new());
        assert_eq!(device.agent_input(&mut bench.context(), &vec![0; INPUT_MAX + 1]), INPUT_MAX);
        assert_eq!(device.agent_input(&mut bench.context(), b"x"), 0);
    }
}
