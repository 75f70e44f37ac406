//! Reads Debian packages (deb(5)): an `ar` archive with a control and a data archive. Enough of it to take files
//! out; nothing is installed. Packages are untrusted: every size is checked against the file before it is used.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Take};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::error::BuildError;

/// The first bytes of every package.
pub const MAGIC: &[u8] = b"!<arch>\n";
/// Most bytes the data archive may unpack to.
const MAX_DATA_BYTES: u64 = 8 << 30;
/// Most bytes the control archive may unpack to.
const MAX_CONTROL_BYTES: u64 = 16 << 20;
const AR_HEADER_BYTES: u64 = 60;

/// An opened package. Its data archive is unpacked to an unnamed temporary file, so that single files can be read
/// from it at little cost.
pub struct Package {
    path: PathBuf,
    control: BTreeMap<String, String>,
    data: File,
    files: BTreeMap<String, Extent>,
}

/// Where a file lies in the data archive.
#[derive(Clone, Copy)]
struct Extent {
    offset: u64,
    len: u64,
}

/// A member of the `ar` archive.
struct Member {
    name: String,
    offset: u64,
    len: u64,
}

impl Package {
    /// Opens the package and reads its table of contents.
    pub fn open(path: &Path) -> Result<Package, BuildError> {
        let file = File::open(path).map_err(BuildError::io(path))?;
        let broken = |reason: String| BuildError::Package { path: path.to_path_buf(), reason };
        let members = list_members(&file).map_err(broken)?;
        let find = |prefix: &str| {
            members
                .iter()
                .find(|member| member.name.starts_with(prefix))
                .ok_or_else(|| broken(format!("it has no {prefix}*")))
        };
        let control = read_control(unpacked(&file, find("control.tar")?, MAX_CONTROL_BYTES).map_err(broken)?);
        let control = control.map_err(|error| broken(format!("its control archive: {error}")))?;
        let mut data = tempfile::tempfile().map_err(BuildError::io(std::env::temp_dir()))?;
        let mut stream = unpacked(&file, find("data.tar")?, MAX_DATA_BYTES).map_err(broken)?;
        let copied = io::copy(&mut stream, &mut data)
            .map_err(|error| broken(format!("its data archive does not unpack: {error}")))?;
        if copied == MAX_DATA_BYTES {
            return Err(broken(format!("its data archive is larger than {MAX_DATA_BYTES} bytes")));
        }
        let files = list_files(&data).map_err(|error| broken(format!("its data archive: {error}")))?;
        Ok(Package { path: path.to_path_buf(), control, data, files })
    }

    /// A field of the control file, for example "Architecture".
    pub fn field(&self, name: &str) -> Option<&str> {
        self.control.get(name).map(String::as_str)
    }

    /// Paths of all regular files, without a leading slash, sorted.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(String::as_str)
    }

    /// A file's content. `None` when the package has no such file.
    pub fn read(&self, file: &str) -> Result<Option<Vec<u8>>, BuildError> {
        let Some(extent) = self.files.get(file) else {
            return Ok(None);
        };
        let mut content = vec![0; extent.len as usize];
        self.data.read_exact_at(&mut content, extent.offset).map_err(|error| BuildError::Package {
            path: self.path.clone(),
            reason: format!("{file} cannot be read: {error}"),
        })?;
        Ok(Some(content))
    }
}

/// The `ar` archive's table of contents.
fn list_members(file: &File) -> Result<Vec<Member>, String> {
    let file_len = file.metadata().map_err(|error| error.to_string())?.len();
    if file_len == 0 {
        return Err("it is empty".into());
    }
    let mut magic = [0; 8];
    if file.read_exact_at(&mut magic, 0).is_err() || magic != MAGIC {
        return Err("it is not a Debian package".into());
    }
    let mut members = Vec::new();
    let mut offset = magic.len() as u64;
    while offset < file_len {
        let mut header = [0; AR_HEADER_BYTES as usize];
        file.read_exact_at(&mut header, offset).map_err(|_| "it is truncated".to_string())?;
        if header[58..] != *b"`\n" {
            return Err(format!("its archive is damaged at byte {offset}"));
        }
        let text = |field: &[u8]| String::from_utf8_lossy(field).trim_end().to_string();
        let name = text(&header[..16]).trim_end_matches('/').to_string();
        let len: u64 = text(&header[48..58]).parse().map_err(|_| format!("its member {name} has no size"))?;
        offset += AR_HEADER_BYTES;
        if len > file_len - offset {
            return Err(format!(
                "it is truncated: {name} needs {len} bytes, {} are there; download it again",
                file_len - offset
            ));
        }
        members.push(Member { name, offset, len });
        offset += len.next_multiple_of(2);
    }
    Ok(members)
}

/// A part of a file as a stream.
struct Slice<'a> {
    file: &'a File,
    offset: u64,
    end: u64,
}

impl Read for Slice<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = buffer.len().min((self.end - self.offset) as usize);
        let read = self.file.read_at(&mut buffer[..len], self.offset)?;
        self.offset += read as u64;
        Ok(read)
    }
}

/// The member's content, decompressed as its name says, cut off after `limit` bytes.
fn unpacked<'a>(file: &'a File, member: &Member, limit: u64) -> Result<Take<Box<dyn Read + 'a>>, String> {
    let slice = Slice { file, offset: member.offset, end: member.offset + member.len };
    let extension = member.name.rsplit('.').next().unwrap_or_default();
    Ok(decompressor(slice, extension).map_err(|error| format!("{}: {error}", member.name))?.take(limit))
}

/// A decompressing reader chosen by a file name's extension.
pub(crate) fn decompressor<'a>(stream: impl Read + 'a, extension: &str) -> io::Result<Box<dyn Read + 'a>> {
    Ok(match extension {
        "xz" => Box::new(liblzma::read::XzDecoder::new_multi_decoder(stream)),
        "zst" => Box::new(zstd::stream::read::Decoder::new(stream)?),
        "gz" => Box::new(flate2::read::MultiGzDecoder::new(stream)),
        _ => Box::new(stream),
    })
}

/// The fields of the `control` file; continuation lines are dropped.
fn read_control(stream: impl Read) -> io::Result<BTreeMap<String, String>> {
    let mut archive = tar::Archive::new(stream);
    for entry in archive.entries()? {
        let mut entry = entry?;
        if entry.path_bytes().as_ref() != b"./control" && entry.path_bytes().as_ref() != b"control" {
            continue;
        }
        let mut text = Vec::new();
        entry.by_ref().take(1 << 20).read_to_end(&mut text)?;
        let fields = String::from_utf8_lossy(&text)
            .lines()
            .filter(|line| !line.starts_with([' ', '\t']))
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_string(), value.trim().to_string()))
            .collect();
        return Ok(fields);
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "no control file"))
}

/// Regular files of the data archive and where their contents are.
fn list_files(data: &File) -> io::Result<BTreeMap<String, Extent>> {
    let end = data.metadata()?.len();
    let mut archive = tar::Archive::new(Slice { file: data, offset: 0, end });
    let mut files = BTreeMap::new();
    for entry in archive.entries()? {
        let entry = entry?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let extent = Extent { offset: entry.raw_file_position(), len: entry.size() };
        if extent.offset.checked_add(extent.len).is_none_or(|file_end| file_end > end) {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "a file reaches beyond the archive"));
        }
        let path = String::from_utf8_lossy(&entry.path_bytes()).trim_start_matches("./").to_string();
        files.insert(path, extent);
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    fn tar_with(path: &str, content: &[u8]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, path, content).unwrap();
        builder.into_inner().unwrap()
    }

    fn package() -> Vec<u8> {
        let control = tar_with("control", b"Package: linux\nVersion: 1\nArchitecture: amd64\nDescription: x\n more\n");
        let data = tar_with("boot/vmlinuz-1", b"kernel");
        let mut bytes = MAGIC.to_vec();
        let members = [
            ("debian-binary", b"2.0\n".to_vec()),
            ("control.tar", control),
            ("data.tar.zst", zstd::bulk::compress(&data, 1).unwrap()),
        ];
        for (name, content) in members {
            bytes.extend(format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n", 0, 0, 0, 100644, content.len()).bytes());
            bytes.extend(&content);
            if content.len() % 2 == 1 {
                bytes.push(b'\n');
            }
        }
        bytes
    }

    fn open(bytes: &[u8]) -> Result<Package, BuildError> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        Package::open(file.path())
    }

    #[test]
    fn files_come_out() {
        let package = open(&package()).unwrap();
        assert_eq!(package.field("Architecture"), Some("amd64"));
        assert_eq!(package.files().collect::<Vec<_>>(), ["boot/vmlinuz-1"]);
        assert_eq!(package.read("boot/vmlinuz-1").unwrap().unwrap(), b"kernel");
        assert!(package.read("boot/other").unwrap().is_none());
    }

    #[test]
    fn every_truncation_is_an_error() {
        let bytes = package();
        for len in 0..bytes.len() - 1 {
            assert!(open(&bytes[..len]).is_err(), "{len} of {} bytes open", bytes.len());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn flipped_bytes_do_not_panic(at in any::<prop::sample::Index>(), value in any::<u8>()) {
            let mut bytes = package();
            let at = at.index(bytes.len());
            bytes[at] = value;
            if let Ok(package) = open(&bytes) {
                for file in package.files().map(str::to_string).collect::<Vec<_>>() {
                    let _ = package.read(&file);
                }
            }
        }
    }
}
