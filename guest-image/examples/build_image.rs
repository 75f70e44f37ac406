//! Builds an image from a kernel and a root, and optionally extracts it again:
//! `build_image KERNEL ROOT IMAGE [EXTRACT_DIRECTORY] [-- ENTRY...]`.

use std::time::Instant;

use orrery_guest_image::{BuildOptions, Image, build};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let mut next = || arguments.next().filter(|argument| argument != "--");
    let (Some(kernel), Some(root), Some(output)) = (next(), next(), next()) else {
        return Err("usage: build_image KERNEL ROOT IMAGE [EXTRACT_DIRECTORY] [-- ENTRY...]".into());
    };
    let extract = next();
    let entry: Vec<String> = arguments.filter(|argument| argument != "--").collect();
    let options = BuildOptions { kernel: kernel.into(), root: root.into(), entry, ..BuildOptions::default() };
    build(&options, |step| eprintln!("{}", step.describe()))?.write(&output)?;
    let start = Instant::now();
    let image = Image::open(&output)?;
    eprintln!("opened in {:?}", start.elapsed());
    println!("{:#?}", image.describe());
    if let Some(directory) = extract {
        image.extract(directory)?;
    }
    Ok(())
}
