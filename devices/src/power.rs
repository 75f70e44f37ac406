//! Power-off and reset: the registers of hardware-reduced ACPI and one port with an exit code.
//!
//! | port | register |
//! |---|---|
//! | 0x600 | SLEEP_CONTROL_REG (ACPI 6.4, 4.8.3.7): SLP_TYP 5 with SLP_EN powers off with code 0 |
//! | 0x601 | SLEEP_STATUS_REG: WAK_STS, never set |
//! | 0x602 | RESET_REG: writing 1 resets |
//! | 0x604 | exit code: writing N powers off with code N |

use serde::{Deserialize, Serialize};

use crate::{Context, Device, Effect, answer_byte, layout};

/// SLP_TYP of the S5 state, as the DSDT's `_S5` names it.
pub const SLEEP_TYPE_S5: u8 = 5;
const SLEEP_ENABLE: u8 = 1 << 5;

const SLEEP_CONTROL: u64 = (layout::SLEEP_CONTROL_PORT - layout::POWER_PORT) as u64;
const SLEEP_STATUS: u64 = (layout::SLEEP_STATUS_PORT - layout::POWER_PORT) as u64;
const RESET: u64 = (layout::RESET_PORT - layout::POWER_PORT) as u64;
const EXIT: u64 = (layout::EXIT_PORT - layout::POWER_PORT) as u64;

/// The power block; offsets are from [`layout::POWER_PORT`].
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Power {
    sleep_control: u8,
}

impl Power {
    /// The power block at power-on.
    pub fn new() -> Power {
        Power::default()
    }
}

impl Device for Power {
    fn read(&mut self, _ctx: &mut Context, offset: u64, data: &mut [u8]) {
        let value = match offset {
            SLEEP_CONTROL => self.sleep_control,
            SLEEP_STATUS | RESET | EXIT => 0,
            _ => 0xFF,
        };
        answer_byte(data, value);
    }

    fn write(&mut self, ctx: &mut Context, offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        match offset {
            SLEEP_CONTROL => {
                // SLP_EN is write-only.
                self.sleep_control = value & 0x1C;
                if value & SLEEP_ENABLE != 0 && value >> 2 & 7 == SLEEP_TYPE_S5 {
                    ctx.effects.push(Effect::PowerOff { code: 0 });
                }
            }
            RESET if value == layout::RESET_VALUE => ctx.effects.push(Effect::Reset),
            EXIT => ctx.effects.push(Effect::PowerOff { code: value }),
            _ => {}
        }
    }

    fn event(&mut self, _ctx: &mut Context, _token: u32) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Bench, assert_round_trip, fuzz, steps};
    use proptest::prelude::*;

    #[test]
    fn each_register_does_its_work() {
        let (mut bench, mut power) = (Bench::new(), Power::new());
        bench.write(&mut power, SLEEP_CONTROL, 1, 5 << 2);
        assert_eq!(bench.take(), vec![]);
        bench.write(&mut power, SLEEP_CONTROL, 1, 5 << 2 | 0x20);
        assert_eq!(bench.take(), vec![Effect::PowerOff { code: 0 }]);
        bench.write(&mut power, EXIT, 1, 42);
        assert_eq!(bench.take(), vec![Effect::PowerOff { code: 42 }]);
        bench.write(&mut power, RESET, 1, 1);
        assert_eq!(bench.take(), vec![Effect::Reset]);
    }

    proptest! {
        #[test]
        fn nothing_panics(steps in steps(6)) {
            let mut power = Power::new();
            fuzz(&mut power, &steps);
            assert_round_trip(&power);
        }
    }
}
