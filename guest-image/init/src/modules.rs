//! Kernel modules: loads those whose device is there, in the builder's order.

use std::fs::{self, File};
use std::io;

use crate::config::{Condition, Module};
use crate::failure::Failure;
use crate::sys;

/// Loads the modules; those whose condition does not hold are passed over.
pub fn load(modules: &[Module]) -> Result<(), Failure> {
    for module in modules {
        if !wanted(&module.condition) {
            continue;
        }
        let loaded = File::open(&module.path).and_then(|file| sys::load_module(&file));
        match loaded {
            Ok(()) => {}
            // Built in or loaded before.
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
            // An optional accelerator whose processor feature is missing.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
            Err(error) => {
                let name = module.path.rsplit('/').next().unwrap_or(&module.path).to_string();
                return Err(Failure::Module { name, error });
            }
        }
    }
    Ok(())
}

/// True when the condition holds now; a bus that does not exist has no devices.
fn wanted(condition: &Condition) -> bool {
    match condition {
        Condition::Always => true,
        Condition::PciVendor(vendor) => any_device("/sys/bus/pci/devices", "vendor", *vendor),
        Condition::VirtioDevice(id) => any_device("/sys/bus/virtio/devices", "device", *id),
    }
}

/// True when a device on the bus has `value` in its attribute (a hexadecimal number in sysfs).
fn any_device(bus: &str, attribute: &str, value: u32) -> bool {
    let Ok(devices) = fs::read_dir(bus) else {
        return false;
    };
    devices.filter_map(io::Result::ok).any(|device| {
        fs::read_to_string(device.path().join(attribute))
            .ok()
            .and_then(|text| u32::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok())
            == Some(value)
    })
}
