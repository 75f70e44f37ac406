//! Translations kept from run to run, in the user's cache directory, so that a second boot starts warm.
//!
//! One file for each image and each build of this program: the magic, the format's version, the BLAKE3 hash of what
//! follows, and an [`Archive`]. A file that is damaged, of another version, or that somebody else could have written
//! is not used: what it holds is host code. Losing the cache costs time and nothing else, so nothing here fails.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use orrery_cpu::engine::Archive;

const MAGIC: &[u8; 8] = b"ORRYTRNS";
const VERSION: u32 = 1;
const HEADER: usize = 8 + 4 + 32;
/// Bytes of all files together; the oldest go first.
const DIRECTORY_BYTES_MAX: u64 = 2 << 30;

/// The file of one image.
pub struct TranslationCache {
    path: Option<PathBuf>,
    archive: Arc<Archive>,
}

impl TranslationCache {
    /// What earlier runs of the image with this hash left behind in the user's cache directory.
    pub fn open(image: &[u8; 32]) -> TranslationCache {
        let path = directory().and_then(|directory| {
            let name = |hash: &[u8]| hash[..8].iter().map(|b| format!("{b:02x}")).collect::<String>();
            Some(directory.join(format!("{}-{}", name(image), name(&program()?))))
        });
        TranslationCache::at(path)
    }

    /// The cache in this file, or one that is kept nowhere.
    fn at(path: Option<PathBuf>) -> TranslationCache {
        let kept = path.as_deref().and_then(read).unwrap_or_default();
        let archive = Archive::new(kept).or_else(|| Archive::new(Vec::new())).expect("an empty archive is well-formed");
        TranslationCache { path, archive }
    }

    /// For [`orrery_cpu::engine::EngineConfig::archive`].
    pub fn archive(&self) -> Arc<Archive> {
        self.archive.clone()
    }

    /// Writes the file again if there is much in it that it did not have.
    pub fn keep(&self) {
        let (kept, fresh) = self.archive.sizes();
        if fresh > kept / 8
            && let Some(path) = &self.path
        {
            // A full or read-only disk only means a cold start next time.
            let _ = write(path, &self.archive.bytes());
            trim(path);
        }
    }
}

/// `$XDG_CACHE_HOME/orrery/translations`, or the same below `~/.cache`.
fn directory() -> Option<PathBuf> {
    let absolute = |path: PathBuf| path.is_absolute().then_some(path);
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).and_then(absolute);
    let cache = cache.or_else(|| absolute(PathBuf::from(std::env::var_os("HOME")?)).map(|home| home.join(".cache")));
    Some(cache?.join("orrery").join("translations"))
}

/// Hash of this program, which decides what its translations look like.
fn program() -> Option<[u8; 32]> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open("/proc/self/exe").ok()?).ok()?;
    Some(*hasher.finalize().as_bytes())
}

fn read(path: &Path) -> Option<Vec<u8>> {
    let mut file = fs::OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(path).ok()?;
    let metadata = file.metadata().ok()?;
    // SAFETY: a system call that only returns a number.
    let user = unsafe { libc::geteuid() };
    if metadata.uid() != user || metadata.mode() & 0o022 != 0 || metadata.len() > DIRECTORY_BYTES_MAX {
        return None;
    }
    let mut header = [0; HEADER];
    file.read_exact(&mut header).ok()?;
    let mut body = Vec::with_capacity((metadata.len() as usize).saturating_sub(HEADER));
    file.read_to_end(&mut body).ok()?;
    if header[..8] != *MAGIC
        || header[8..12] != VERSION.to_le_bytes()
        || header[12..] != *blake3::hash(&body).as_bytes()
    {
        return None;
    }
    Some(body)
}

/// Writes beside the file and renames, so that a reader finds the old one or the new one.
fn write(path: &Path, body: &[u8]) -> std::io::Result<()> {
    let directory = path.parent().ok_or(std::io::ErrorKind::InvalidInput)?;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let unfinished = path.with_extension(format!("{}.tmp", std::process::id()));
    let result =
        fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unfinished).and_then(|mut file| {
            file.write_all(MAGIC)?;
            file.write_all(&VERSION.to_le_bytes())?;
            file.write_all(blake3::hash(body).as_bytes())?;
            file.write_all(body)?;
            fs::rename(&unfinished, path)
        });
    if result.is_err() {
        let _ = fs::remove_file(&unfinished);
    }
    result
}

/// Removes the oldest files while there are too many bytes, but not the one just written.
fn trim(written: &Path) {
    let Some(entries) = written.parent().and_then(|directory| fs::read_dir(directory).ok()) else { return };
    let mut files: Vec<_> = entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let metadata = entry.metadata().ok()?;
            Some((metadata.modified().ok()?, metadata.len(), entry.path()))
        })
        .collect();
    files.sort();
    let mut bytes: u64 = files.iter().map(|file| file.1).sum();
    for (_, len, path) in files {
        if bytes <= DIRECTORY_BYTES_MAX {
            break;
        }
        if path.file_name() != written.file_name().map(OsStr::new) && fs::remove_file(&path).is_ok() {
            bytes -= len;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_files_of_the_user_alone_are_read() {
        let directory = std::env::temp_dir().join(format!("orrery-translations-{}", std::process::id()));
        let path = directory.join("image");
        assert!(TranslationCache::at(Some(path.clone())).archive.sizes() == (0, 0), "no file is an empty cache");
        write(&path, b"").unwrap();
        assert_eq!(read(&path), Some(Vec::new()));
        write(&path, &[1, 2, 3]).unwrap();
        assert_eq!(read(&path), Some(vec![1, 2, 3]));
        assert_eq!(TranslationCache::at(Some(path.clone())).archive.sizes(), (0, 0), "not an archive");
        let mut damaged = fs::read(&path).unwrap();
        *damaged.last_mut().unwrap() ^= 1;
        fs::write(&path, &damaged).unwrap();
        assert_eq!(read(&path), None);
        write(&path, &[1, 2, 3]).unwrap();
        let others = std::os::unix::fs::PermissionsExt::from_mode(0o666);
        fs::set_permissions(&path, others).unwrap();
        assert_eq!(read(&path), None, "others could have written it");
        fs::remove_dir_all(&directory).unwrap();
    }
}
