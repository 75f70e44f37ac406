//! Page tables and accesses, in the engine and in a model without caches.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| orrery_fuzz::paging::execute(data));
