//! Images, kernels, manifests, logs of inputs, Debian packages, and what is typed at the command line.

use std::cell::RefCell;
use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::PathBuf;

use clap::Parser;
use orrery_devices::GuestMemory;
use orrery_guest_image::deb::Package;
use orrery_guest_image::{Image, format, kernel};
use orrery_vmm::boot::{self, Kernel};
use orrery_vmm::chain::Hash;
use orrery_vmm::cli::args::Cli;
use orrery_vmm::moment::MomentName;
use orrery_vmm::run::manifest::Manifest;
use orrery_vmm::{inputs, ram};

use crate::bytes::Bytes;

thread_local! {
    static FILE: RefCell<Option<File>> = const { RefCell::new(None) };
    static MEMORY: GuestMemory = ram::create(16 << 20).expect("16 MiB of memory");
}

/// Calls `read` with the path of a file in memory that holds `content`.
fn as_file<T>(content: &[u8], read: impl FnOnce(&PathBuf) -> T) -> T {
    FILE.with_borrow_mut(|slot| {
        let file = slot.get_or_insert_with(|| {
            // SAFETY: the name is a C string; the descriptor is fresh and owned by nobody else.
            unsafe {
                let descriptor = libc::memfd_create(c"fuzz".as_ptr(), libc::MFD_CLOEXEC);
                assert!(descriptor >= 0, "a file in memory");
                File::from_raw_fd(descriptor)
            }
        });
        file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(content)).expect("a file in memory");
        read(&PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd())))
    })
}

/// An image whose hashes fit, around sections that need not.
pub fn image(data: &[u8]) {
    let _ = format::decode_table(data);
    let _ = as_file(data, |path| Image::open(path));
    // The table's hash put right, as whoever forges an image would.
    if data.len() >= format::HEADER_BYTES {
        let mut file = data.to_vec();
        file[..8].copy_from_slice(&format::MAGIC);
        file[8..12].copy_from_slice(&format::VERSION.to_le_bytes());
        let count = u32::from_le_bytes([file[12], file[13], file[14], file[15]]) as usize;
        let end = format::HEADER_BYTES.saturating_add(count.saturating_mul(format::ENTRY_BYTES));
        if let Some(table) = file.get(format::HEADER_BYTES..end) {
            let word = |at: usize| u64::from_le_bytes(table[at..at + 8].try_into().expect("eight bytes"));
            let entries: Option<Vec<format::SectionEntry>> = (0..count)
                .map(|n| {
                    let at = n * format::ENTRY_BYTES;
                    Some(format::SectionEntry {
                        kind: format::SectionKind::from_number(word(at) as u32)?,
                        content_len: word(at + 8),
                        offset: word(at + 16),
                        stored_len: word(at + 24),
                        hash: table[at + 40..at + 72].try_into().expect("32 bytes"),
                    })
                })
                .collect();
            if let Some(entries) = entries {
                let encoded = format::encode_table(&entries);
                file[..encoded.len()].copy_from_slice(&encoded);
                if let Ok((again, _)) = format::decode_table(&file) {
                    assert_eq!(again, entries);
                }
                if let Ok(image) = as_file(&file, |path| Image::open(path)) {
                    image.describe();
                }
            }
        }
    }
    small_image(&mut Bytes::new(data));
}

/// Sections of one chunk each, stored as the input says, with every hash right.
fn small_image(bytes: &mut Bytes) {
    let count = 1 + bytes.below(6);
    let mut entries = Vec::new();
    let mut body = Vec::new();
    let start = format::HEADER_BYTES + count * format::ENTRY_BYTES;
    for n in 0..count {
        let kind = format::SectionKind::from_number(1 + u32::from(bytes.u8()) % 7).expect("one of seven");
        let len = usize::from(bytes.u8());
        let content = if n == 0 {
            b"\x7fELF\x02\x01\x01".iter().chain(bytes.take(len)).copied().collect()
        } else {
            bytes.take(len).to_vec()
        };
        let claimed = if bytes.u8() == 0xFF { bytes.u64() } else { content.len() as u64 };
        let hashes = if content.is_empty() { vec![] } else { vec![format::chunk_hash(&content)] };
        let mut stored = Vec::new();
        for hash in &hashes {
            let claimed = if bytes.u8() == 0xFF { bytes.u32() } else { content.len() as u32 };
            stored.extend_from_slice(&claimed.to_le_bytes());
            stored.extend_from_slice(hash);
        }
        stored.extend_from_slice(&content);
        entries.push(format::SectionEntry {
            kind: if n == 0 { format::SectionKind::Kernel } else { kind },
            content_len: claimed,
            offset: (start + body.len()) as u64,
            stored_len: stored.len() as u64,
            hash: format::section_hash(claimed, hashes),
        });
        body.extend(stored);
    }
    entries.sort_by_key(|entry| if bytes.is_empty() { entry.kind as u64 } else { entry.offset });
    let mut file = format::encode_table(&entries);
    file.extend(body);
    if let Ok(image) = as_file(&file, |path| Image::open(path)) {
        let description = image.describe();
        assert_eq!(description.command_line, image.command_line());
        boot(image.kernel(), image.initramfs(), image.command_line());
    }
}

fn boot(kernel: &[u8], initramfs: &[u8], command_line: &str) {
    MEMORY.with(|memory| {
        let _ = boot::load(memory, &Kernel { kernel, initramfs, command_line, rsdp: None });
    });
}

/// A bzImage or ELF kernel, which may be far longer than the input: zeros follow.
pub fn kernel(data: &[u8]) {
    let (Some(how), file) = (data.first(), data.get(1..).unwrap_or_default()) else { return };
    let mut file = file.to_vec();
    if how & 1 != 0 && file.len() >= 20 {
        file[..5].copy_from_slice(b"\x7fELF\x02");
        file[18..20].copy_from_slice(&[62, 0]);
    } else if how & 2 != 0 {
        file.resize(file.len().max(0x268), 0);
        file[0x202..0x206].copy_from_slice(b"HdrS");
        file[0x206..0x208].copy_from_slice(&0x20Fu16.to_le_bytes());
        file[0x236] |= 1;
    }
    file.resize(file.len() + usize::from(how >> 2) * 256, 0);
    let _ = kernel::recognise(&file);
    let _ = kernel::release(&file);
    boot(&file, &data[..data.len().min(64)], "console=ttyS0");
}

/// A run's manifest.
pub fn manifest(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    if let Ok(manifest) = Manifest::from_json(&text) {
        assert_eq!(Manifest::from_json(&manifest.to_json()).as_ref(), Ok(&manifest));
        let _ = manifest.machine.validate();
    }
    // Past the checksum, which is over what was understood.
    if let Ok(mut value) = serde_json::from_str::<serde_json::Value>(&text)
        && let Some(object) = value.as_object_mut()
    {
        object.insert("format".into(), "orrery-run".into());
        object.insert("version".into(), orrery_vmm::run::manifest::VERSION.into());
        if let Ok(manifest) = serde_json::from_value::<Manifest>(value) {
            let again = Manifest::from_json(&manifest.to_json()).expect("what was written");
            assert_eq!(again.to_json(), manifest.to_json());
        }
    }
}

/// A log of inputs.
pub fn inputs(data: &[u8]) {
    let mut file = format!("{}\n", inputs::HEADER).into_bytes();
    file.extend_from_slice(data);
    for file in [data, &file[..]] {
        if let Ok(list) = as_file(file, |path| inputs::read(path)) {
            let mut text = format!("{}\n", inputs::HEADER);
            for input in &list {
                text.push_str(&serde_json::to_string(input).expect("an input is plain data"));
                text.push('\n');
            }
            assert_eq!(as_file(text.as_bytes(), |path| inputs::read(path)).expect("what was written"), list);
        }
    }
}

/// A Debian package.
pub fn package(data: &[u8]) {
    let Ok(package) = as_file(data, |path| Package::open(path)) else { return };
    let files: Vec<String> = package.files().map(str::to_owned).collect();
    for file in files.iter().take(8) {
        let _ = package.read(file);
    }
    let _ = package.field("Architecture");
}

/// Moments, hashes, and whole command lines.
pub fn words(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    if let Ok(name) = text.parse::<MomentName>() {
        assert_eq!(name.to_string().parse(), Ok(name));
    }
    if let Ok(hash) = text.parse::<Hash>() {
        assert_eq!(hash.to_string().parse::<Hash>().ok(), Some(hash));
    }
    let _ = Cli::try_parse_from(std::iter::once("orrery").chain(text.split_whitespace()));
}
