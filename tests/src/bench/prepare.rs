//! Programs and images of the benchmark, made when their sources are newer.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::lines::{BOOT, LINES, Line, Program};
use crate::workshop;

/// Heap of the JVM, in MiB: fixed, so that the collector does the same work everywhere.
const JVM_HEAP_MIB: u32 = 256;

/// A program ready to run everywhere.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// Which one.
    pub program: Program,
    /// Command for a native run: the same files as in the image.
    pub native: Vec<String>,
    /// Image for Orrery.
    pub image: PathBuf,
    /// What `orrery image extract` would write from it, for QEMU.
    pub extracted: PathBuf,
}

/// Builds the programs that `lines` need, with images that run exactly these lines, in `directory`.
pub fn prepare(lines: &[Line], directory: &Path) -> Result<Vec<Prepared>> {
    fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let kernel = workshop::kernel_package()?;
    let mut prepared = Vec::new();
    for program in Program::ALL {
        if lines.iter().any(|line| line.program == program) {
            prepared.push(prepare_program(program, lines, &kernel, directory)?);
        }
    }
    Ok(prepared)
}

fn prepare_program(program: Program, lines: &[Line], kernel: &Path, directory: &Path) -> Result<Prepared> {
    let sources = workshop::workspace().join("tests/bench").join(program.name());
    let root = directory.join(format!("{}-root", program.name()));
    let stamp = directory.join(format!("{}-root.made", program.name()));
    if !workshop::is_fresh(&stamp, &[&sources]) {
        eprintln!("bench: building the {} program", program.name());
        workshop::empty_directory(&root)?;
        match program {
            Program::Go => build_go(&sources, &root)?,
            Program::Jvm => build_jvm(&sources, &root)?,
        }
        fs::write(&stamp, b"")?;
    }
    let arguments = arguments(program, lines);
    let suffix = match &arguments[..] {
        [] => String::new(),
        names => format!("-{}", names.join("-")),
    };
    let image = directory.join(format!("{}{suffix}.img", program.name()));
    let extracted = image.with_extension("extracted");
    let entry: Vec<String> = command(program, Path::new("/"), &arguments);
    if !workshop::is_fresh(&image, &[&stamp, kernel]) {
        eprintln!("bench: building {}", image.display());
        workshop::build_image(kernel, &root, &entry, &image)?;
    }
    if !workshop::is_fresh(&extracted.join("cmdline.txt"), &[&image]) {
        workshop::extract_image(&image, &extracted)?;
    }
    let native = command(program, &root.canonicalize()?, &arguments);
    Ok(Prepared { program, native, image, extracted })
}

/// The names that the program is given: none if it is to run all its lines.
fn arguments(program: Program, lines: &[Line]) -> Vec<String> {
    let of_program = |line: &&Line| line.program == program && line.name != BOOT;
    let chosen: Vec<String> = lines.iter().filter(of_program).map(|line| line.name.to_owned()).collect();
    let all = LINES.iter().filter(of_program).count();
    match chosen.len() {
        count if count == all => Vec::new(),
        // Only the boot is wanted; the shortest line keeps it company.
        0 => vec!["go-nbody".to_owned()],
        _ => chosen,
    }
}

/// The program's command line, with its files below `root`.
fn command(program: Program, root: &Path, arguments: &[String]) -> Vec<String> {
    let at = |path: &str| root.join(path).to_string_lossy().into_owned();
    let mut words = match program {
        Program::Go => vec![at("bin/bench")],
        Program::Jvm => vec![
            at("opt/jvm/bin/java"),
            "-XX:+UseSerialGC".into(),
            "-XX:-UsePerfData".into(),
            format!("-Xms{JVM_HEAP_MIB}m"),
            format!("-Xmx{JVM_HEAP_MIB}m"),
            "-cp".into(),
            at("opt/bench"),
            "Bench".into(),
        ],
    };
    words.extend_from_slice(arguments);
    words
}

/// A static Go program.
fn build_go(sources: &Path, root: &Path) -> Result<()> {
    let output = root.canonicalize()?.join("bin/bench");
    let mut go = Command::new("go");
    go.args(["build", "-trimpath", "-ldflags=-buildid=", "-o"]).arg(output).arg(".").current_dir(sources);
    go.env("CGO_ENABLED", "0").env("GOFLAGS", "-mod=mod").env("GOTOOLCHAIN", "local");
    workshop::tool(&mut go, "golang-go")?;
    Ok(())
}

/// A Java runtime with one module, the classes, and the shared libraries of the host that the runtime needs.
fn build_jvm(sources: &Path, root: &Path) -> Result<()> {
    let runtime = root.join("opt/jvm");
    fs::create_dir_all(root.join("opt"))?;
    let mut jlink = Command::new("jlink");
    jlink.args(["--add-modules", "java.base", "--strip-java-debug-attributes", "--no-header-files", "--no-man-pages"]);
    workshop::tool(jlink.arg("--output").arg(&runtime), "openjdk-17-jdk-headless")?;
    let mut javac = Command::new("javac");
    javac.args(["-Xlint:all", "-Werror", "--release", "17", "-d"]).arg(root.join("opt/bench"));
    workshop::tool(javac.arg(sources.join("Bench.java")), "openjdk-17-jdk-headless")?;
    let runtime = runtime.canonicalize()?;
    let files: Vec<PathBuf> = ["bin/java", "lib/libjli.so", "lib/libjava.so", "lib/libjimage.so", "lib/libzip.so"]
        .into_iter()
        .chain(["lib/libnio.so", "lib/libnet.so", "lib/server/libjvm.so"])
        .map(|path| runtime.join(path))
        .filter(|path| path.exists())
        .collect();
    for library in workshop::shared_libraries(&files, &runtime.join("lib"))? {
        workshop::copy_into(root, &library)?;
    }
    Ok(())
}
