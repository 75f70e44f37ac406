//! The guest agent's channel: a virtio console that the host reads.
//!
//! Version 1 of the protocol has one message, from guest to host: the line `orrery-agent 1 ready`, sent when the
//! system is up and before the entry command starts. Nothing is read. Later versions keep the line format.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;

/// The first virtio console, where the machine has one.
const CHANNEL: &str = "/dev/hvc0";

/// Says that the guest is up; a machine without the channel is none the wiser.
pub fn announce() {
    let channel = OpenOptions::new().write(true).custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK).open(CHANNEL);
    if let Ok(mut channel) = channel {
        let _ = channel.write_all(b"orrery-agent 1 ready\n");
    }
}
