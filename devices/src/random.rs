//! Random numbers: one ChaCha20 stream per consumer, a pure function of (seed, consumer name, position).
//!
//! The key of a stream is `BLAKE3-derive-key("orrery random stream v1", seed as 8 little-endian bytes || name)`,
//! the stream number and the starting position are zero. Since each consumer has its own key, a new consumer
//! never shifts the numbers of another.

use rand_chacha::ChaCha20Rng;
use rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

const KEY_CONTEXT: &str = "orrery random stream v1";

/// The random numbers of one consumer. The serde form holds its position.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RandomStream {
    consumer: String,
    generator: ChaCha20Rng,
}

impl RandomStream {
    /// The stream of `consumer` ("rdrand", "virtio-rng", "lapic timer") under `seed`, at its start.
    pub fn new(seed: u64, consumer: &str) -> RandomStream {
        let mut hasher = blake3::Hasher::new_derive_key(KEY_CONTEXT);
        hasher.update(&seed.to_le_bytes());
        hasher.update(consumer.as_bytes());
        let generator = ChaCha20Rng::from_seed(*hasher.finalize().as_bytes());
        RandomStream { consumer: consumer.to_string(), generator }
    }

    /// Starts over with another seed, as a branch does at the moment it leaves its parent.
    pub fn rekey(&mut self, seed: u64) {
        *self = RandomStream::new(seed, &self.consumer);
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.generator.next_u64()
    }

    /// Fills a buffer with the next bytes.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        self.generator.fill_bytes(bytes);
    }

    /// A number in `0..=max`. Takes exactly one 64-bit draw; the bias is below 2^-64 times the range.
    pub fn up_to(&mut self, max: u64) -> u64 {
        let range = u128::from(max) + 1;
        ((u128::from(self.next_u64()) * range) >> 64) as u64
    }
}

/// How long something takes: a fixed part and a seeded one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latency {
    /// What it always takes, in nanoseconds of virtual time.
    pub base_ns: u64,
    /// Upper bound of what a random number adds, in nanoseconds. Zero draws no number.
    pub jitter_ns: u64,
}

impl Latency {
    /// Draws one duration, in nanoseconds.
    pub fn draw(&self, random: &mut RandomStream) -> u64 {
        let jitter = if self.jitter_ns == 0 { 0 } else { random.up_to(self.jitter_ns) };
        self.base_ns.saturating_add(jitter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::assert_round_trip;

    #[test]
    fn streams_differ_by_seed_and_by_name_and_only_by_them() {
        let first = |seed, name| RandomStream::new(seed, name).next_u64();
        assert_eq!(first(1, "a"), first(1, "a"));
        assert_ne!(first(1, "a"), first(2, "a"));
        assert_ne!(first(1, "a"), first(1, "b"));
    }

    #[test]
    fn the_numbers_never_change_between_versions() {
        let mut stream = RandomStream::new(1, "test");
        assert_eq!([stream.next_u64(), stream.next_u64()], PINNED);
    }

    const PINNED: [u64; 2] = [8_676_342_030_487_265_951, 15_963_827_032_771_817_226];

    #[test]
    fn the_stored_form_holds_the_position() {
        let mut stream = RandomStream::new(7, "test");
        stream.fill(&mut [0; 13]);
        let mut back = assert_round_trip(&stream);
        for _ in 0..100 {
            assert_eq!(back.next_u64(), stream.next_u64());
        }
    }

    #[test]
    fn a_new_seed_starts_a_new_stream() {
        let mut stream = RandomStream::new(7, "test");
        stream.next_u64();
        stream.rekey(8);
        assert_eq!(stream, RandomStream::new(8, "test"));
    }

    #[test]
    fn bounds_hold() {
        let mut stream = RandomStream::new(7, "test");
        assert_eq!(stream.up_to(0), 0);
        assert!((0..1000).map(|_| stream.up_to(3)).all(|n| n <= 3));
        stream.up_to(u64::MAX);
        let latency = Latency { base_ns: 10, jitter_ns: 5 };
        assert!((0..1000).map(|_| latency.draw(&mut stream)).all(|ns| (10..=15).contains(&ns)));
    }
}
