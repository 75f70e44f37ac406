//! The entropy device (virtio 1.2, 5.4): the guest's random bytes, a function of the seed.

use serde::{Deserialize, Serialize};

use super::queue::{QueueError, scatter, split_front};
use super::transport::{Queues, VirtioDevice};
use crate::{Context, RandomStream};

/// Most bytes that one chain is filled with; the used length tells the driver.
pub const FILL_MAX: u64 = 64 * 1024;

/// A source of random bytes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Entropy {
    random: RandomStream,
}

impl Entropy {
    /// The source for `seed`.
    pub fn new(seed: u64) -> Entropy {
        Entropy { random: RandomStream::new(seed, "virtio entropy") }
    }
}

impl VirtioDevice for Entropy {
    fn id(&self) -> u32 {
        4
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[64]
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn notify(&mut self, ctx: &mut Context, queues: &mut Queues, queue: u16) -> Result<(), QueueError> {
        for _ in 0..queues.size(queue) {
            let Some(mut chain) = queues.pop(ctx, queue)? else { break };
            let len = chain.writable_len().min(FILL_MAX);
            let spans = split_front(&mut chain.writable, len).unwrap_or_default();
            let mut bytes = vec![0; len as usize];
            self.random.fill(&mut bytes);
            scatter(ctx.memory, &spans, &bytes)?;
            queues.push_used(ctx, queue, chain.head, len as u32)?;
        }
        Ok(())
    }

    fn event(&mut self, _ctx: &mut Context, _queues: &mut Queues, _token: u32) -> Result<(), QueueError> {
        Ok(())
    }

    fn reset(&mut self, _ctx: &mut Context) {}

    fn rekey(&mut self, seed: u64) {
        self.random.rekey(seed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Bench;
    use crate::virtio::VirtioMmio;
    use crate::virtio::driver::Driver;

    fn bytes(seed: u64) -> Vec<u8> {
        let mut bench = Bench::new();
        let mut device = VirtioMmio::new(2, Entropy::new(seed));
        let mut driver = Driver::start(&mut bench, &mut device, 1);
        driver.offer(&mut bench, 0, &[(0x9000, 10, true), (0x9100, 22, true)]);
        driver.notify(&mut bench, &mut device, 0);
        assert_eq!(driver.used(&bench, 0), vec![(0, 32)]);
        [bench.load(0x9000, 10), bench.load(0x9100, 22)].concat()
    }

    #[test]
    fn the_bytes_follow_from_the_seed() {
        assert_eq!(bytes(1), bytes(1));
        assert_ne!(bytes(1), bytes(2));
    }
}
