//! The files of one run.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use orrery_cpu::Icount;
use orrery_devices::VirtualNs;

use super::manifest::{Manifest, ManifestError};
use crate::chain::Link;
use crate::inputs::{self, Input};
use crate::store::PartialLine;

/// Name of the manifest in a run's directory.
pub const MANIFEST: &str = "manifest.json";
/// Name of the console log: one line of output per line, with its icount and virtual time.
pub const CONSOLE: &str = "console.log";
/// Name of the hash chain.
pub const CHAIN: &str = "chain.jsonl";
/// Name of the log of inputs.
pub const INPUTS: &str = "inputs.jsonl";
/// First line of the hash chain.
pub const CHAIN_HEADER: &str = r#"{"format":"orrery-chain","version":1}"#;

/// Runs that share a name before the number at its end; more than that is refused.
const NUMBER_MAX: u32 = 999_999;

/// The run could not be written to disk, or not be read.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file operation failed.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: String,
        /// The system's answer.
        source: io::Error,
    },
    /// Every name is taken.
    #[error("{path} already holds {NUMBER_MAX} runs of this image and seed; remove some, or give another --runs")]
    Full {
        /// Directory of runs.
        path: String,
    },
    /// The manifest is damaged.
    #[error("{path}: {source}")]
    Manifest {
        /// Which file.
        path: String,
        /// What is wrong with it.
        source: ManifestError,
    },
}

pub(crate) fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.display().to_string();
    move |source| StoreError::Io { action, path, source }
}

/// What a branch takes over from the run that it leaves.
#[derive(Clone, Debug, Default)]
pub struct Past {
    /// Links of the hash chain.
    pub links: Vec<Link>,
    /// Inputs that have entered.
    pub inputs: Vec<Input>,
    /// Whole lines of the console log.
    pub console: String,
    /// Console output after them.
    pub line: Option<PartialLine>,
}

/// Reads the links of a run's chain. What comes after damage, or was cut by a crash, is left out.
pub fn read_links(run: &Path) -> Result<Vec<Link>, StoreError> {
    let path = run.join(CHAIN);
    let text = fs::read_to_string(&path).map_err(io_error("read", &path))?;
    let mut lines = text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
    if lines.next() != Some(CHAIN_HEADER) {
        return Ok(Vec::new());
    }
    Ok(lines.map_while(|line| serde_json::from_str(line).ok()).collect())
}

/// A line of the console log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsoleLine {
    /// Icount of its first byte.
    pub icount: u64,
    /// Virtual time of its first byte, in nanoseconds.
    pub virtual_ns: u64,
    /// The line as it is in the log: bytes that are not printable are escaped.
    pub text: String,
}

impl ConsoleLine {
    /// Its text without the line's end.
    pub fn content(&self) -> &str {
        let mut text = self.text.as_str();
        while let Some(rest) = text.strip_suffix("\\n").or_else(|| text.strip_suffix("\\r")) {
            text = rest;
        }
        text
    }
}

/// Reads a run's console log. Lines that are not of its form are left out.
pub fn read_console(run: &Path) -> Result<Vec<ConsoleLine>, StoreError> {
    let path = run.join(CONSOLE);
    let bytes = fs::read(&path).map_err(io_error("read", &path))?;
    let text = String::from_utf8_lossy(&bytes);
    let lines = text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
    Ok(lines
        .filter_map(|line| {
            let mut parts = line.splitn(3, ' ');
            let icount = parts.next()?.parse().ok()?;
            let virtual_ns = parts.next()?.parse().ok()?;
            Some(ConsoleLine { icount, virtual_ns, text: parts.next()?.to_owned() })
        })
        .collect())
}

/// An open run directory.
pub struct RunDirectory {
    path: PathBuf,
    id: String,
    console: ConsoleLog<BufWriter<File>>,
    chain: BufWriter<File>,
    inputs: BufWriter<File>,
}

impl RunDirectory {
    /// Makes a new directory `runs/<stem>-<seed>-<number>` and its files.
    pub fn create(runs: &Path, stem: &str, seed: u64) -> Result<RunDirectory, StoreError> {
        let (id, path) = claim_run(runs, stem, seed)?;
        let create = |name: &str| {
            let path = path.join(name);
            let file = OpenOptions::new().write(true).create_new(true).open(&path);
            file.map(BufWriter::new).map_err(io_error("create", &path))
        };
        let mut chain = create(CHAIN)?;
        writeln!(chain, "{CHAIN_HEADER}").map_err(io_error("write", &path.join(CHAIN)))?;
        let mut inputs = create(INPUTS)?;
        writeln!(inputs, "{}", inputs::HEADER).map_err(io_error("write", &path.join(INPUTS)))?;
        let console = ConsoleLog::new(create(CONSOLE)?);
        Ok(RunDirectory { path, id, console, chain, inputs })
    }

    /// Makes a new directory for a run that shares its past with another: `past` is written into its files.
    pub fn create_branch(runs: &Path, stem: &str, seed: u64, past: &Past) -> Result<RunDirectory, StoreError> {
        let mut run = RunDirectory::create(runs, stem, seed)?;
        for link in &past.links {
            run.link(link)?;
        }
        for input in &past.inputs {
            run.input(input)?;
        }
        let path = run.path.join(CONSOLE);
        run.console.file.write_all(past.console.as_bytes()).map_err(io_error("write", &path))?;
        if let Some(line) = &past.line {
            run.console.begin_with(line);
        }
        Ok(run)
    }

    /// Console output whose line has not ended.
    pub fn partial_line(&self) -> Option<PartialLine> {
        self.console.partial_line()
    }

    /// Name of the run.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Where its files are.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends console output.
    pub fn console(&mut self, now: Icount, time: VirtualNs, bytes: &[u8]) -> Result<(), StoreError> {
        let path = self.path.join(CONSOLE);
        self.console.append(now, time, bytes).map_err(io_error("write", &path))
    }

    /// Appends a link of the hash chain and makes everything so far visible to readers.
    pub fn link(&mut self, link: &Link) -> Result<(), StoreError> {
        let path = self.path.join(CHAIN);
        let text = serde_json::to_string(link).expect("a link is plain data");
        writeln!(self.chain, "{text}").and_then(|()| self.chain.flush()).map_err(io_error("write", &path))
    }

    /// Appends an input; on disk before the guest sees it.
    pub fn input(&mut self, input: &Input) -> Result<(), StoreError> {
        let path = self.path.join(INPUTS);
        let text = serde_json::to_string(input).expect("an input is plain data");
        writeln!(self.inputs, "{text}").and_then(|()| self.inputs.flush()).map_err(io_error("write", &path))
    }

    /// Replaces the manifest: a crash leaves the old one or the new one.
    pub fn write_manifest(&self, manifest: &Manifest) -> Result<(), StoreError> {
        let target = self.path.join(MANIFEST);
        let temporary = self.path.join("manifest.json.new");
        let mut file = File::create(&temporary).map_err(io_error("create", &temporary))?;
        file.write_all(manifest.to_json().as_bytes())
            .and_then(|()| file.sync_all())
            .map_err(io_error("write", &temporary))?;
        fs::rename(&temporary, &target).map_err(io_error("rename", &temporary))?;
        let directory = File::open(&self.path).map_err(io_error("open", &self.path))?;
        directory.sync_all().map_err(io_error("flush", &self.path))
    }

    /// Puts every log on disk. To be called before the manifest that says how the run ended.
    pub fn flush(&mut self) -> Result<(), StoreError> {
        let path = self.path.join(CONSOLE);
        self.console.end_line().map_err(io_error("write", &path))?;
        for (file, name) in [(&mut self.console.file, CONSOLE), (&mut self.chain, CHAIN), (&mut self.inputs, INPUTS)] {
            let path = self.path.join(name);
            file.flush().and_then(|()| file.get_ref().sync_all()).map_err(io_error("write", &path))?;
        }
        Ok(())
    }
}

/// Makes the directory of a new run and gives it a name that is free.
pub(super) fn claim_run(runs: &Path, stem: &str, seed: u64) -> Result<(String, PathBuf), StoreError> {
    fs::create_dir_all(runs).map_err(io_error("create directory", runs))?;
    let stem: String =
        stem.chars().take(40).map(|c| if c.is_ascii_alphanumeric() || "._".contains(c) { c } else { '-' }).collect();
    let stem = stem.trim_start_matches('.');
    claim(runs, if stem.is_empty() { "run" } else { stem }, seed)
}

/// Puts the names in a directory on disk.
pub(super) fn sync_names(directory: &Path) -> Result<(), StoreError> {
    let file = File::open(directory).map_err(io_error("open", directory))?;
    file.sync_all().map_err(io_error("flush", directory))
}

/// Takes the first free name.
fn claim(runs: &Path, stem: &str, seed: u64) -> Result<(String, PathBuf), StoreError> {
    for number in 1..=NUMBER_MAX {
        let id = format!("{stem}-{seed}-{number:03}");
        let path = runs.join(&id);
        match fs::create_dir(&path) {
            Ok(()) => return Ok((id, path)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(source) => return Err(io_error("create directory", &path)(source)),
        }
    }
    Err(StoreError::Full { path: runs.display().to_string() })
}

/// Reads and checks the manifest of a run directory.
pub fn read_manifest(run: &Path) -> Result<Manifest, StoreError> {
    let path = run.join(MANIFEST);
    let text = fs::read_to_string(&path).map_err(io_error("read", &path))?;
    Manifest::from_json(&text).map_err(|source| StoreError::Manifest { path: path.display().to_string(), source })
}

/// Writes `ICOUNT VIRTUAL_NS TEXT` for each line of output; bytes that are not printable are escaped.
pub struct ConsoleLog<W> {
    file: W,
    line: Vec<u8>,
    /// Moment of the first byte of `line`.
    moment: Option<(Icount, VirtualNs)>,
}

/// Longer lines are split.
const LINE_MAX: usize = 4096;

impl<W: Write> ConsoleLog<W> {
    /// A log with no output yet.
    pub fn new(file: W) -> ConsoleLog<W> {
        ConsoleLog { file, line: Vec::new(), moment: None }
    }

    /// Goes on in the middle of a line.
    pub fn begin_with(&mut self, line: &PartialLine) {
        self.line = line.bytes.clone();
        self.moment = Some((Icount(line.icount), VirtualNs(line.virtual_ns)));
    }

    /// Output whose line has not ended.
    pub fn partial_line(&self) -> Option<PartialLine> {
        let (icount, time) = self.moment?;
        Some(PartialLine { icount: icount.0, virtual_ns: time.0, bytes: self.line.clone() })
    }

    /// Where the whole lines are.
    pub fn lines(&self) -> &W {
        &self.file
    }

    /// Appends output.
    pub fn append(&mut self, now: Icount, time: VirtualNs, bytes: &[u8]) -> io::Result<()> {
        for byte in bytes {
            self.moment.get_or_insert((now, time));
            self.line.push(*byte);
            if *byte == b'\n' || self.line.len() >= LINE_MAX {
                self.end_line()?;
            }
        }
        Ok(())
    }

    fn end_line(&mut self) -> io::Result<()> {
        if let Some((icount, time)) = self.moment.take() {
            writeln!(self.file, "{} {} {}", icount.0, time.0, self.line.escape_ascii())?;
            self.line.clear();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_claimed_once() {
        let runs = tempfile::tempdir().unwrap();
        let first = RunDirectory::create(runs.path(), "a/b", 1).unwrap();
        let second = RunDirectory::create(runs.path(), "a/b", 1).unwrap();
        assert_eq!((first.id(), second.id()), ("a-b-1-001", "a-b-1-002"));
    }

    #[test]
    fn console_lines_carry_their_moment() {
        let runs = tempfile::tempdir().unwrap();
        let mut run = RunDirectory::create(runs.path(), "x", 1).unwrap();
        run.console(Icount(5), VirtualNs(6), b"he").unwrap();
        run.console(Icount(7), VirtualNs(8), b"y\nz\x01").unwrap();
        run.flush().unwrap();
        let text = fs::read_to_string(run.path().join(CONSOLE)).unwrap();
        assert_eq!(text, "5 6 hey\\n\n7 8 z\\x01\n");
        let lines = read_console(run.path()).unwrap();
        let read: Vec<_> = lines.iter().map(|line| (line.icount, line.virtual_ns, line.content())).collect();
        assert_eq!(read, [(5, 6, "hey"), (7, 8, "z\\x01")]);
    }

    #[test]
    fn an_impossible_place_is_an_error() {
        let Err(error) = RunDirectory::create(Path::new("/proc/nowhere"), "x", 1) else { panic!("created") };
        assert!(matches!(error, StoreError::Io { action: "create directory", .. }));
    }
}
