//! The end of the machine: a power-off that carries an exit code.

use crate::sys;

/// The machine's power port: a byte written here switches the machine off with that exit code.
const POWER_PORT: u16 = 0x604;

/// Powers off with `code`. On a machine without the port (another hypervisor) the ordinary power-off follows, and
/// the code is lost.
pub fn off(code: u8) -> ! {
    let _ = sys::write_port(POWER_PORT, code);
    sys::power_off();
    // Not even that: nothing is left to do, and the first process must not return.
    loop {
        std::thread::park();
    }
}
