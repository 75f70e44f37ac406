//! Where things are, and how tools are called: shared by the benchmark and the small guests.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context, Result, bail};
use orrery_guest_image::{BuildOptions, Image, build};

/// The workspace.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("this crate is in the workspace").to_path_buf()
}

/// Where `make` keeps packages and images, whatever the directory of Cargo's output.
pub fn target() -> PathBuf {
    workspace().join("target")
}

/// The Debian kernel package that all images are made with.
pub fn kernel_package() -> Result<PathBuf> {
    made("target/packages/kernel.deb").context("there is no kernel package for the guests")
}

/// A file that the Makefile knows how to fetch or build, made if it is not there yet.
pub fn made(name: &str) -> Result<PathBuf> {
    let file = workspace().join(name);
    if !file.exists() {
        tool(Command::new("make").arg(name).current_dir(workspace()), "make")?;
    }
    Ok(file)
}

/// Runs a tool to its end; what it printed is in the error if it fails. `package` is the Debian package it is from.
pub fn tool(command: &mut Command, package: &str) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = match command.output() {
        Ok(output) => output,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            bail!("{name} is missing: apt-get install {package}")
        }
        Err(error) => return Err(error).with_context(|| format!("cannot start {name}")),
    };
    let words = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!("{name} failed with {}:\n{words}{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(words)
}

/// True if `output` exists and nothing in `inputs` (files, or directories with their files) is newer.
pub fn is_fresh(output: &Path, inputs: &[&Path]) -> bool {
    let Ok(made) = fs::metadata(output).and_then(|metadata| metadata.modified()) else { return false };
    inputs.iter().all(|input| newest(input).is_some_and(|changed| changed <= made))
}

fn newest(path: &Path) -> Option<SystemTime> {
    let metadata = fs::metadata(path).ok()?;
    if !metadata.is_dir() {
        return metadata.modified().ok();
    }
    let mut changed = SystemTime::UNIX_EPOCH;
    for entry in fs::read_dir(path).ok()? {
        changed = changed.max(newest(&entry.ok()?.path())?);
    }
    Some(changed)
}

/// An empty directory at `path`, whatever was there.
pub fn empty_directory(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot remove {}", path.display()));
        }
        _ => {}
    }
    fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))
}

/// Copies a file of the host to the same place below `root`, with the directories it needs.
pub fn copy_into(root: &Path, file: &Path) -> Result<()> {
    let place = root.join(file.strip_prefix("/").unwrap_or(file));
    fs::create_dir_all(place.parent().expect("a file is in a directory"))?;
    fs::copy(file, &place).with_context(|| format!("cannot copy {} to {}", file.display(), place.display()))?;
    Ok(())
}

/// The shared libraries that programs and libraries need, with the dynamic loader, as paths of the host.
pub fn shared_libraries(files: &[PathBuf], search: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for file in files {
        let words = tool(Command::new("ldd").arg(file).env("LD_LIBRARY_PATH", search), "libc-bin")?;
        for word in words.split_whitespace().filter(|word| word.starts_with('/')) {
            let path = PathBuf::from(word.trim_end_matches(':'));
            if !path.starts_with(search) && !files.contains(&path) && !found.contains(&path) {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Builds an image from a root directory and the kernel package.
pub fn build_image(kernel: &Path, root: &Path, entry: &[String], output: &Path) -> Result<()> {
    let options = BuildOptions {
        kernel: kernel.to_path_buf(),
        root: root.to_path_buf(),
        entry: entry.to_vec(),
        ..BuildOptions::default()
    };
    let image = build(&options, |_| {}).with_context(|| format!("cannot build {}", output.display()))?;
    image.write(output).with_context(|| format!("cannot write {}", output.display()))
}

/// Takes an image apart for another hypervisor.
pub fn extract_image(image: &Path, directory: &Path) -> Result<()> {
    empty_directory(directory)?;
    Image::open(image)?.extract(directory)?;
    Ok(())
}
