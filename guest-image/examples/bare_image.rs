//! Makes an image of a kernel alone, without initramfs and disks: `bare_image KERNEL IMAGE [COMMAND_LINE]`. For
//! programs that run on the bare machine.

use orrery_guest_image::{Content, Image, ImageParts};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(kernel), Some(output)) = (arguments.next(), arguments.next()) else {
        return Err("usage: bare_image KERNEL IMAGE [COMMAND_LINE]".into());
    };
    let parts = ImageParts {
        kernel: Content::from(std::fs::read(kernel)?),
        command_line: arguments.next().unwrap_or_default(),
        ..ImageParts::default()
    };
    Image::from_parts(parts)?.write(&output)?;
    Ok(())
}
