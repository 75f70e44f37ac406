//! Guest code in two engines that work differently: equal states, equal memory, exact counts.
#![no_main]

use libfuzzer_sys::{Corpus, fuzz_mutator, fuzz_target, fuzzer_mutate};
use orrery_fuzz::code;

fuzz_target!(|data: &[u8]| -> Corpus {
    if data.len() <= code::HEADER_BYTES {
        return Corpus::Reject;
    }
    code::execute(data);
    Corpus::Keep
});

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    if seed % 2 == 0 || size <= code::HEADER_BYTES {
        fuzzer_mutate(data, size, max_size)
    } else {
        code::mutate(data, size, max_size, seed / 2)
    }
});
