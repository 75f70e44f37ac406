//! Content hashes of pages: BLAKE3, computed for many pages at a time.
//!
//! One page is four chunks of 1024 bytes, which fill four lanes of a processor's vectors. Sixteen pages side by side
//! fill all of them, three times as fast with AVX-512. The library computes any number of equal inputs side by side,
//! but hides the way in; a test holds what comes out against its public function.

use blake3::IncrementCounter;
use blake3::platform::Platform;
use orrery_cpu::memory::{PAGE_SIZE, PageBytes};

use crate::chain::Hash;

/// The content hash of a page of zeros.
pub const ZERO_PAGE: Hash = Hash([0; 32]);

/// Pages that are hashed side by side.
pub const PAGES_AT_ONCE: usize = 16;

const CHUNK: usize = 1024;
const CHUNKS: usize = PAGE_SIZE as usize / CHUNK;
/// A node of the tree above the chunks: the hashes of its two children.
const NODE: usize = 64;

// BLAKE3's constants, by the names of its specification.
const IV: [u32; 8] =
    [0x6A09_E667, 0xBB67_AE85, 0x3C6E_F372, 0xA54F_F53A, 0x510E_527F, 0x9B05_688C, 0x1F83_D9AB, 0x5BE0_CD19];
const CHUNK_START: u8 = 1 << 0;
const CHUNK_END: u8 = 1 << 1;
const PARENT: u8 = 1 << 2;
const ROOT: u8 = 1 << 3;

/// True if every byte is zero.
fn is_zero(content: &[u8]) -> bool {
    // SAFETY: any bytes are valid u64 values; align_to returns what is aligned and leaves the rest in the ends.
    let (head, words, tail) = unsafe { content.align_to::<u64>() };
    words.iter().all(|w| *w == 0) && head.iter().chain(tail).all(|b| *b == 0)
}

/// The content hashes of up to [`PAGES_AT_ONCE`] pages, in their order.
pub fn content_hashes(pages: &[&PageBytes]) -> [Hash; PAGES_AT_ONCE] {
    let mut hashes = [ZERO_PAGE; PAGES_AT_ONCE];
    let filled: Vec<usize> = (0..pages.len()).filter(|index| !is_zero(pages[*index])).collect();
    let platform = Platform::detect();
    let mut chunks = [[[0; 32]; CHUNKS]; PAGES_AT_ONCE];
    for number in 0..CHUNKS {
        let inputs = filled.iter().map(|index| part::<CHUNK>(pages[*index], number));
        let flags = Flags { all: 0, first: CHUNK_START, last: CHUNK_END };
        let hashed: [_; PAGES_AT_ONCE] = side_by_side(platform, inputs, number as u64, flags);
        for (page, hash) in chunks.iter_mut().zip(hashed) {
            page[number] = hash;
        }
    }
    let nodes = chunks.as_flattened().as_flattened();
    let node = Flags { all: PARENT, first: 0, last: 0 };
    let below: [_; 2 * PAGES_AT_ONCE] =
        side_by_side(platform, (0..2 * filled.len()).map(|index| part::<NODE>(nodes, index)), 0, node);
    let nodes = below.as_flattened();
    let root = Flags { all: PARENT | ROOT, first: 0, last: 0 };
    let roots: [_; PAGES_AT_ONCE] =
        side_by_side(platform, (0..filled.len()).map(|index| part::<NODE>(nodes, index)), 0, root);
    for (index, root) in filled.into_iter().zip(roots) {
        hashes[index] = Hash(root);
    }
    hashes
}

/// Flags of all blocks of an input, and of its first and its last beside them.
struct Flags {
    all: u8,
    first: u8,
    last: u8,
}

fn side_by_side<'a, const BYTES: usize, const MOST: usize>(
    platform: Platform,
    inputs: impl Iterator<Item = &'a [u8; BYTES]>,
    counter: u64,
    flags: Flags,
) -> [[u8; 32]; MOST] {
    let mut out = [[0; 32]; MOST];
    let mut list = [&[0; BYTES]; MOST];
    let mut count = 0;
    for (place, input) in list.iter_mut().zip(inputs) {
        *place = input;
        count += 1;
    }
    let increment = IncrementCounter::No;
    let bytes = &mut out.as_flattened_mut()[..32 * count];
    platform.hash_many(&list[..count], &IV, counter, increment, flags.all, flags.first, flags.last, bytes);
    out
}

fn part<const BYTES: usize>(bytes: &[u8], number: usize) -> &[u8; BYTES] {
    bytes[number * BYTES..][..BYTES].try_into().expect("a slice of that length")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_pages_at_once_have_the_hashes_of_each() {
        let mut pages = [[0u8; PAGE_SIZE as usize]; PAGES_AT_ONCE];
        let mut word = 1u64;
        for byte in pages.as_flattened_mut() {
            word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *byte = (word >> 56) as u8;
        }
        pages[2] = [0; PAGE_SIZE as usize];
        pages[5] = [0; PAGE_SIZE as usize];
        pages[5][4095] = 1;
        for count in 0..=PAGES_AT_ONCE {
            let some: Vec<&PageBytes> = pages[..count].iter().collect();
            let hashes = content_hashes(&some);
            for (index, page) in pages.iter().enumerate() {
                let expected = match (index < count, index) {
                    (false, _) | (true, 2) => ZERO_PAGE,
                    (true, _) => Hash(*blake3::hash(page).as_bytes()),
                };
                assert_eq!(hashes[index], expected, "page {index} of {count}");
            }
        }
    }
}
