//! The keyboard controller's ports, as far as a machine without keyboard needs them: the status port reads as an
//! idle controller, and the pulse-reset command resets the machine.
//!
//! The FADT tells the guest that there is no controller; this is for guests that do not ask.

use serde::{Deserialize, Serialize};

use crate::{Context, Device, Effect, answer_byte};

/// Offset of the command port from the data port.
pub const COMMAND_OFFSET: u64 = 4;
/// Pulses output line 0, which is the processor's reset.
const PULSE_RESET: u8 = 0xFE;

/// Ports 0x60 and 0x64; offsets are from 0x60.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct I8042 {}

impl I8042 {
    /// A controller without devices.
    pub fn new() -> I8042 {
        I8042 {}
    }
}

impl Device for I8042 {
    fn read(&mut self, _ctx: &mut Context, offset: u64, data: &mut [u8]) {
        // Buffers empty: neither input full nor output full. No device answers at the data port.
        answer_byte(data, if offset == COMMAND_OFFSET { 0 } else { 0xFF });
    }

    fn write(&mut self, ctx: &mut Context, offset: u64, data: &[u8]) {
        if offset == COMMAND_OFFSET && data.first() == Some(&PULSE_RESET) {
            ctx.effects.push(Effect::Reset);
        }
    }

    fn event(&mut self, _ctx: &mut Context, _token: u32) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Bench, fuzz, steps};
    use proptest::prelude::*;

    #[test]
    fn only_the_pulse_command_resets() {
        let (mut bench, mut i8042) = (Bench::new(), I8042::new());
        bench.write(&mut i8042, 0, 1, 0xFE);
        bench.write(&mut i8042, 4, 1, 0xAA);
        assert_eq!(bench.take(), vec![]);
        bench.write(&mut i8042, 4, 1, 0xFE);
        assert_eq!(bench.take(), vec![Effect::Reset]);
        assert_eq!(bench.read(&mut i8042, 4, 1), 0);
    }

    proptest! {
        #[test]
        fn nothing_panics(steps in steps(8)) {
            fuzz(&mut I8042::new(), &steps);
        }
    }
}
