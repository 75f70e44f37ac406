//! A hostile guest and the whole machine's devices.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| orrery_fuzz::devices::execute(data));
