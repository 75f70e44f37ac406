//! Programs and images of the benchmark, made when their sources are newer.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::lines::{LINES, Line, Program};
use super::programs::Root;
use crate::workshop;

/// The argument of programs that are to run none of their lines.
const NOTHING: &str = "nothing";

/// A program ready to run everywhere.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// Which one.
    pub program: Program,
    /// Command for a native run: the same files as in the image. Empty if the program is not run natively.
    pub native: Vec<String>,
    /// Image for Orrery.
    pub image: PathBuf,
    /// What `orrery image extract` would write from it, for QEMU.
    pub extracted: PathBuf,
}

/// Builds the programs that `lines` need, with images that run exactly these lines, in `directory`.
pub fn prepare(lines: &[Line], directory: &Path) -> Result<Vec<Prepared>> {
    fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let mut prepared = Vec::new();
    for program in Program::ALL {
        if lines.iter().any(|line| line.program == program) {
            prepared.push(match Root::of(program) {
                Some(root) => build(program, root, lines, directory)?,
                None => hello(program, directory)?,
            });
        }
    }
    Ok(prepared)
}

/// The demo image as `make images` has built it.
fn hello(program: Program, directory: &Path) -> Result<Prepared> {
    let image = workshop::made("target/images/hello.img")?;
    let extracted = directory.join("hello.extracted");
    extract(&image, &extracted)?;
    Ok(Prepared { program, native: Vec::new(), image, extracted })
}

fn build(program: Program, root: Root, lines: &[Line], directory: &Path) -> Result<Prepared> {
    let kernel = workshop::kernel_package()?;
    let (files, stamp) = root.build(directory)?;
    let (arguments, is_whole) = arguments(program, lines);
    let suffix = if is_whole { String::new() } else { format!("-{}", arguments.join("-")) };
    let image = directory.join(format!("{}{suffix}.img", program.name()));
    if !workshop::is_fresh(&image, &[&stamp, &kernel]) {
        eprintln!("bench: building {}", image.display());
        workshop::build_image(&kernel, &files, &root.command(Path::new("/"), &arguments), &image)?;
    }
    let extracted = image.with_extension("extracted");
    extract(&image, &extracted)?;
    let native = root.command(&files.canonicalize()?, &arguments);
    Ok(Prepared { program, native, image, extracted })
}

fn extract(image: &Path, directory: &Path) -> Result<()> {
    if workshop::is_fresh(&directory.join("cmdline.txt"), &[image]) {
        return Ok(());
    }
    workshop::extract_image(image, directory)
}

/// The names that the program is given, and whether these are all its lines.
fn arguments(program: Program, lines: &[Line]) -> (Vec<String>, bool) {
    let of_program = |lines: &[Line]| -> Vec<String> {
        let lines = lines.iter().filter(|line| line.program == program);
        lines.filter_map(Line::argument).map(str::to_owned).collect()
    };
    let (mut chosen, all) = (of_program(lines), of_program(LINES));
    let is_whole = chosen == all;
    if chosen.is_empty() {
        chosen.push(NOTHING.to_owned());
    }
    (chosen, is_whole)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::lines::select;

    #[test]
    fn programs_are_given_the_lines_that_are_wanted() {
        let given = |names: &[&str], program| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            arguments(program, &select(&names).unwrap())
        };
        assert_eq!(given(&["c-alu", "c-avx2"], Program::C), (vec!["c-alu".into(), "c-avx2".into()], false));
        assert_eq!(given(&["boot-to-init"], Program::Go), (vec![NOTHING.into()], false));
        assert_eq!(given(&["jvm-start"], Program::Jvm), (vec![NOTHING.into()], false));
        assert_eq!(given(&[], Program::JvmCold), (vec![NOTHING.into()], true));
        let (all, is_whole) = given(&[], Program::Jvm);
        assert!(is_whole && all.len() == 6, "{all:?}");
    }
}
