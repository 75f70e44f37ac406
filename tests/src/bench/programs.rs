//! What the programs are made of: how each is built into a root directory, and the command that runs it there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use super::lines::Program;
use crate::workshop;

/// Heap of the JVM, in MiB: fixed, so that the collector does the same work everywhere.
const JVM_HEAP_MIB: u32 = 256;
/// Debian's package of etcd, fetched by `make`.
const ETCD_PACKAGE: &str = "target/packages/etcd-server.deb";

/// What is on the disk of a program. Programs may share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Root {
    /// A static C program.
    C,
    /// A static Go program.
    Go,
    /// A Java runtime and classes.
    Jvm,
    /// etcd, and a static Go program as its client.
    Etcd,
}

impl Root {
    /// The root of a program; None for a program whose image is made elsewhere.
    pub fn of(program: Program) -> Option<Root> {
        match program {
            Program::HelloCold | Program::HelloWarm => None,
            Program::C | Program::CLong => Some(Root::C),
            Program::Go => Some(Root::Go),
            Program::JvmCold | Program::Jvm | Program::JvmSteady => Some(Root::Jvm),
            Program::Etcd => Some(Root::Etcd),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Root::C => "c",
            Root::Go => "go",
            Root::Jvm => "jvm",
            Root::Etcd => "etcd",
        }
    }

    /// Builds what is older than its source, in `directory`. Returns the root and the file that says when it was made.
    pub fn build(self, directory: &Path) -> Result<(PathBuf, PathBuf)> {
        let name = self.name();
        let sources = workshop::workspace().join("tests/bench").join(name);
        let root = directory.join(format!("{name}-root"));
        let stamp = directory.join(format!("{name}-root.made"));
        if !workshop::is_fresh(&stamp, &[&sources]) {
            eprintln!("bench: building the {name} program");
            workshop::empty_directory(&root)?;
            match self {
                Root::C => build_c(&sources, &root)?,
                Root::Go => build_go(&sources, &root)?,
                Root::Jvm => build_jvm(&sources, &root)?,
                Root::Etcd => build_etcd(&sources, &root)?,
            }
            fs::write(&stamp, b"")?;
        }
        Ok((root, stamp))
    }

    /// The command line of the program, with its files below `root`.
    pub fn command(self, root: &Path, arguments: &[String]) -> Vec<String> {
        let at = |path: &str| root.join(path).to_string_lossy().into_owned();
        let mut words = match self {
            Root::C | Root::Go => vec![at("bin/bench")],
            Root::Etcd => vec![at("bin/bench"), at("usr/bin/etcd")],
            Root::Jvm => vec![
                at("bin/launch"),
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
}

/// A static C program for every x86-64; what needs more asks for it.
fn build_c(sources: &Path, root: &Path) -> Result<()> {
    let files = ["main.c", "integer.c", "vector.c", "kernel.c"];
    // No fused products where the source has none: they round differently.
    compile(&files.map(|file| sources.join(file)), &root.join("bin/bench"), &["-ffp-contract=off", "-pthread"])
}

fn compile(files: &[PathBuf], output: &Path, options: &[&str]) -> Result<()> {
    fs::create_dir_all(output.parent().expect("a program is in a directory"))?;
    let mut gcc = Command::new("gcc");
    gcc.args(["-std=gnu17", "-O2", "-Wall", "-Wextra", "-Werror", "-static"]).args(options);
    workshop::tool(gcc.arg("-o").arg(output).args(files).arg("-lm"), "gcc libc6-dev")?;
    Ok(())
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

/// A Java runtime with one module, the classes, the shared libraries of the host that the runtime needs, and a launcher
/// that says when it starts.
fn build_jvm(sources: &Path, root: &Path) -> Result<()> {
    let runtime = root.join("opt/jvm");
    fs::create_dir_all(root.join("opt"))?;
    let mut jlink = Command::new("jlink");
    jlink.args(["--add-modules", "java.base", "--strip-java-debug-attributes", "--no-header-files", "--no-man-pages"]);
    workshop::tool(jlink.arg("--output").arg(&runtime), "openjdk-17-jdk-headless")?;
    let mut javac = Command::new("javac");
    javac.args(["-Xlint:all", "-Werror", "--release", "17", "-d"]).arg(root.join("opt/bench"));
    workshop::tool(javac.arg(sources.join("Bench.java")), "openjdk-17-jdk-headless")?;
    compile(&[sources.join("launch.c")], &root.join("bin/launch"), &[])?;
    let runtime = runtime.canonicalize()?;
    let files: Vec<PathBuf> = ["bin/java", "lib/libjli.so", "lib/libjava.so", "lib/libjimage.so", "lib/libzip.so"]
        .into_iter()
        .chain(["lib/libnio.so", "lib/libnet.so", "lib/server/libjvm.so"])
        .map(|path| runtime.join(path))
        .filter(|path| path.exists())
        .collect();
    copy_libraries(&files, &runtime.join("lib"), root)
}

/// etcd as Debian packages it, and its client.
fn build_etcd(sources: &Path, root: &Path) -> Result<()> {
    let package = workshop::made(ETCD_PACKAGE)?;
    let unpacked = root.with_extension("package");
    workshop::empty_directory(&unpacked)?;
    workshop::tool(Command::new("dpkg-deb").arg("-x").arg(package).arg(&unpacked), "dpkg")?;
    let server = root.join("usr/bin/etcd");
    fs::create_dir_all(root.join("usr/bin"))?;
    fs::copy(unpacked.join("usr/bin/etcd"), &server)?;
    fs::remove_dir_all(&unpacked)?;
    copy_libraries(&[server.canonicalize()?], &root.join("usr/lib"), root)?;
    build_go(sources, root)
}

fn copy_libraries(files: &[PathBuf], search: &Path, root: &Path) -> Result<()> {
    for library in workshop::shared_libraries(files, search)? {
        workshop::copy_into(root, &library)?;
    }
    Ok(())
}
