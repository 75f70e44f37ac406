//! A run in one file, to go through again on another host.
//!
//! `ORRYRUN1`, then sections, then 32 bytes of BLAKE3 over everything before. A section is a kind (1 byte: manifest,
//! console, chain, inputs, image), a length (8 bytes, little-endian) and the bytes. There are no snapshots in it:
//! states are never taken from another host, the run goes through them itself.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use orrery_guest_image::{Image, ImageError};

use super::directory::{CHAIN, CONSOLE, INPUTS, MANIFEST, StoreError, claim_run, read_manifest, sync_names};
use super::manifest::{Manifest, ManifestError};
use crate::chain::Hash;
use crate::inputs::{self, InputsError};

const MAGIC: &[u8; 8] = b"ORRYRUN1";
const IMAGE: u8 = 5;
/// Kinds of sections that become files of the run.
const FILES: [(u8, &str); 4] = [(1, MANIFEST), (2, CONSOLE), (3, CHAIN), (4, INPUTS)];
/// Most bytes of a section that is not the image.
const FILE_BYTES_MAX: u64 = 4 << 30;
/// Most bytes of an image.
const IMAGE_BYTES_MAX: u64 = 256 << 30;
/// Where imported images are, in the directory of runs.
pub const IMAGES: &str = "images";

/// A run that could not be exported or imported. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
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
    /// The directory of runs.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The file is not an exported run, or not whole.
    #[error("{path} is no exported run, or damaged: {what}")]
    Damaged {
        /// Which file.
        path: String,
        /// What is wrong with it.
        what: String,
    },
    /// The manifest in it.
    #[error("the manifest in {path}: {source}")]
    Manifest {
        /// Which file.
        path: String,
        /// What is wrong with it.
        source: ManifestError,
    },
    /// The inputs in it.
    #[error(transparent)]
    Inputs(#[from] InputsError),
    /// The image.
    #[error("the image of the run: {0}")]
    Image(#[from] ImageError),
    /// The image is another one.
    #[error("the image has hash {actual} and the run wants {expected}; name the right one with --image")]
    OtherImage {
        /// Hash in the manifest.
        expected: Hash,
        /// Hash of the file.
        actual: Hash,
    },
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ArchiveError {
    let path = path.display().to_string();
    move |source| ArchiveError::Io { action, path, source }
}

/// Hashes what goes through it.
struct Hashing<T> {
    inner: T,
    hasher: blake3::Hasher,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..count]);
        Ok(count)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(bytes)?;
        self.hasher.update(&bytes[..count]);
        Ok(count)
    }
}

/// Writes a run, and its image if one is given, to a file: a crash leaves the old file or the new one.
pub fn export(run: &Path, image: Option<&Path>, output: &Path) -> Result<(), ArchiveError> {
    read_manifest(run)?;
    let parent = output.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = output.file_name().unwrap_or_default().to_string_lossy();
    let temporary = parent.join(format!(".{name}.{}", std::process::id()));
    let file = File::create(&temporary).map_err(failed("create", &temporary))?;
    let written = write_archive(file, run, image).and_then(|()| {
        fs::rename(&temporary, output).map_err(failed("rename", &temporary))?;
        sync_names(parent).map_err(ArchiveError::from)
    });
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written.map_err(|error| match error {
        ArchiveError::Io { action: "write", source, .. } => failed("write", output)(source),
        error => error,
    })
}

fn write_archive(file: File, run: &Path, image: Option<&Path>) -> Result<(), ArchiveError> {
    let mut writer = Hashing { inner: BufWriter::new(file), hasher: blake3::Hasher::new() };
    let output = |source| ArchiveError::Io { action: "write", path: String::new(), source };
    writer.write_all(MAGIC).map_err(output)?;
    let files = FILES.iter().map(|(kind, name)| (*kind, run.join(name)));
    for (kind, path) in files.chain(image.map(|path| (IMAGE, path.to_owned()))) {
        let file = File::open(&path).map_err(failed("open", &path))?;
        let len = file.metadata().map_err(failed("look at", &path))?.len();
        writer.write_all(&[kind]).and_then(|()| writer.write_all(&len.to_le_bytes())).map_err(output)?;
        // A run that goes on may grow meanwhile.
        let copied = io::copy(&mut file.take(len), &mut writer).map_err(output)?;
        if copied != len {
            let what = "it became shorter while it was read".to_owned();
            return Err(ArchiveError::Damaged { path: path.display().to_string(), what });
        }
    }
    let hash = writer.hasher.finalize();
    let mut inner = writer.inner;
    inner.write_all(hash.as_bytes()).and_then(|()| inner.flush()).map_err(output)?;
    inner.get_ref().sync_all().map_err(output)
}

/// Takes a run from a file into a directory of runs. `image`: the image, if it is not in the file or another copy is
/// to be used. Gives the manifest of the new run.
pub fn import(archive: &Path, runs: &Path, image: Option<&Path>) -> Result<Manifest, ArchiveError> {
    fs::create_dir_all(runs).map_err(failed("create directory", runs))?;
    let workshop = runs.join(format!(".import-{}", std::process::id()));
    fs::create_dir_all(&workshop).map_err(failed("create directory", &workshop))?;
    let imported = unpack(archive, &workshop).and_then(|()| settle(archive, &workshop, runs, image));
    let _ = fs::remove_dir_all(&workshop);
    imported
}

/// Writes the sections to files in `workshop`.
fn unpack(archive: &Path, workshop: &Path) -> Result<(), ArchiveError> {
    let damaged = |what: &str| ArchiveError::Damaged { path: archive.display().to_string(), what: what.to_owned() };
    let file = File::open(archive).map_err(failed("open", archive))?;
    let len = file.metadata().map_err(failed("look at", archive))?.len();
    let mut left = len.checked_sub(32).ok_or_else(|| damaged("it is too short"))?;
    let mut reader = Hashing { inner: BufReader::new(file), hasher: blake3::Hasher::new() };
    let mut magic = [0; 8];
    reader.read_exact(&mut magic).map_err(failed("read", archive))?;
    left = left.checked_sub(8).ok_or_else(|| damaged("it is too short"))?;
    if &magic != MAGIC {
        return Err(damaged("it does not begin like one"));
    }
    let mut seen = [false; 6];
    while left > 0 {
        left = left.checked_sub(9).ok_or_else(|| damaged("a section is cut off"))?;
        let mut head = [0; 9];
        reader.read_exact(&mut head).map_err(failed("read", archive))?;
        let section = u64::from_le_bytes(head[1..].try_into().expect("eight bytes"));
        let kind = head[0];
        let name = FILES.iter().find(|(number, _)| *number == kind).map(|(_, name)| *name);
        let (name, most) = match name {
            Some(name) => (name, FILE_BYTES_MAX),
            None if kind == IMAGE => ("image", IMAGE_BYTES_MAX),
            None => return Err(damaged("it has a section of a kind that is not known")),
        };
        if std::mem::replace(&mut seen[usize::from(kind)], true) || section > most {
            return Err(damaged("a section is there twice, or too long"));
        }
        left = left.checked_sub(section).ok_or_else(|| damaged("a section is cut off"))?;
        let path = workshop.join(name);
        let mut output = File::create(&path).map_err(failed("create", &path))?;
        io::copy(&mut (&mut reader).take(section), &mut output).map_err(failed("write", &path))?;
        output.sync_all().map_err(failed("flush", &path))?;
    }
    let computed = *reader.hasher.finalize().as_bytes();
    let mut promised = [0; 32];
    reader.inner.read_exact(&mut promised).map_err(failed("read", archive))?;
    if computed != promised {
        return Err(damaged("its checksum does not match its content"));
    }
    if !FILES.iter().all(|(kind, _)| seen[usize::from(*kind)]) {
        return Err(damaged("a file of the run is missing"));
    }
    Ok(())
}

/// Checks what was unpacked and puts it where it belongs.
fn settle(archive: &Path, workshop: &Path, runs: &Path, image: Option<&Path>) -> Result<Manifest, ArchiveError> {
    let manifest_path = workshop.join(MANIFEST);
    let text = fs::read_to_string(&manifest_path).map_err(failed("read", &manifest_path))?;
    let manifest = Manifest::from_json(&text);
    let mut manifest =
        manifest.map_err(|source| ArchiveError::Manifest { path: archive.display().to_string(), source })?;
    inputs::read_log(&workshop.join(INPUTS))?;
    let inside = workshop.join("image");
    let found = image.map(Path::to_owned).or_else(|| inside.is_file().then(|| inside.clone()));
    if let Some(found) = found {
        let actual = Hash(Image::open(&found)?.hash());
        if actual != manifest.image.hash {
            return Err(ArchiveError::OtherImage { expected: manifest.image.hash, actual });
        }
        let place = if found == inside { keep_image(&inside, runs, actual)? } else { found };
        manifest.image.path = std::path::absolute(&place).unwrap_or(place).display().to_string();
    }
    let (id, path) = claim_run(runs, manifest.stem(), manifest.last_seed())?;
    manifest.id = id;
    for name in [CONSOLE, CHAIN, INPUTS] {
        fs::rename(workshop.join(name), path.join(name)).map_err(failed("rename", &path.join(name)))?;
    }
    // The manifest makes it a run, so it comes last.
    fs::write(&manifest_path, manifest.to_json()).map_err(failed("write", &manifest_path))?;
    let file = File::open(&manifest_path).map_err(failed("open", &manifest_path))?;
    file.sync_all().map_err(failed("flush", &manifest_path))?;
    fs::rename(&manifest_path, path.join(MANIFEST)).map_err(failed("rename", &manifest_path))?;
    sync_names(&path)?;
    sync_names(runs)?;
    Ok(manifest)
}

/// Keeps an image under its hash.
fn keep_image(image: &Path, runs: &Path, hash: Hash) -> Result<PathBuf, ArchiveError> {
    let directory = runs.join(IMAGES);
    fs::create_dir_all(&directory).map_err(failed("create directory", &directory))?;
    let place = directory.join(format!("{hash}.img"));
    fs::rename(image, &place).map_err(failed("rename", image))?;
    sync_names(&directory)?;
    Ok(place)
}
