//! The image format: what is written comes back, and no damaged file panics, opens, or fails without a reason.

use std::fs;
use std::path::Path;

use orrery_guest_image::content::Content;
use orrery_guest_image::{Image, ImageError, ImageParts, Metadata};
use proptest::prelude::*;

const MIB: usize = 1 << 20;

/// The smallest file that passes as a bzImage (Linux boot protocol 2.15, 64-bit entry point).
fn kernel() -> Content {
    let mut kernel = vec![0; 1024 + 4096];
    kernel[0x1f1] = 1;
    kernel[0x1f4..0x1f8].copy_from_slice(&256u32.to_le_bytes());
    kernel[0x202..0x206].copy_from_slice(b"HdrS");
    kernel[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    kernel[0x236] = 1;
    Content::from(kernel)
}

fn parts() -> ImageParts {
    let mut disk = vec![0; 2 * MIB + 4096];
    disk[MIB + 5] = 1;
    disk[2 * MIB..].copy_from_slice(&[0xaa; 4096]);
    ImageParts {
        kernel: kernel(),
        initramfs: Content::from(b"070701 not really".to_vec()),
        disks: vec![Content::from(disk), Content::from(vec![0; 512])],
        command_line: "console=ttyS0".to_string(),
        entry: vec!["/bin/sh".into(), "-c".into(), "echo 'a b'".into(), String::new()],
        environment: vec![("PATH".into(), "/bin".into()), ("EMPTY".into(), String::new())],
        metadata: Metadata { kernel_release: Some("6.1.0".into()), ..Metadata::default() },
    }
}

fn written(path: &Path) -> (Image, Vec<u8>) {
    let image = Image::from_parts(parts()).unwrap();
    image.write(path).unwrap();
    (image, fs::read(path).unwrap())
}

/// Opens these bytes as an image file.
fn open(bytes: &[u8]) -> Result<Image, ImageError> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("damaged.img");
    fs::write(&path, bytes).unwrap();
    Image::open(&path)
}

#[test]
fn what_is_written_comes_back() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.img");
    let (image, _) = written(&path);
    let opened = Image::open(&path).unwrap();
    assert_eq!(opened.hash(), image.hash());
    assert_eq!(opened.describe(), image.describe());
    assert_eq!(opened.kernel(), image.kernel());
    assert_eq!(opened.initramfs(), image.initramfs());
    assert!(opened.disks().iter().zip(image.disks()).all(|(a, b)| a[..] == b[..]));
    assert_eq!(opened.entry(), image.entry());
    assert_eq!(opened.environment(), image.environment());
}

#[test]
fn the_hash_names_the_contents() {
    let base = Image::from_parts(parts()).unwrap().hash();
    assert_eq!(Image::from_parts(parts()).unwrap().hash(), base);
    let changes: [fn(&mut ImageParts); 7] = [
        |parts| parts.initramfs = Content::from(b"another".to_vec()),
        |parts| parts.disks.swap(0, 1),
        |parts| parts.disks.truncate(1),
        |parts| parts.command_line.push_str(" quiet"),
        |parts| parts.entry.push("x".into()),
        |parts| parts.environment[1].1.push('x'),
        |parts| parts.metadata.kernel_release = None,
    ];
    for (index, change) in changes.iter().enumerate() {
        let mut parts = parts();
        change(&mut parts);
        assert_ne!(Image::from_parts(parts).unwrap().hash(), base, "change {index} keeps the hash");
    }
}

/// The hash is part of every run's identity: it must not change from one release to the next.
#[test]
fn the_hash_is_pinned() {
    let hash = Image::from_parts(parts()).unwrap().describe().hash;
    assert_eq!(hash, "999f7b991a1234107699b83b5b13de68833a049418c4ba88715df9f4c2ea315e");
}

#[test]
fn the_empty_and_the_foreign_are_not_images() {
    for bytes in [&b""[..], b"x", b"\x7fELF", b"ORRERY\r\n0000000000000000000000000000000000000000000000000000000000"] {
        assert!(matches!(open(bytes), Err(ImageError::NotAnImage { .. })));
    }
    assert!(matches!(Image::open("/nonexistent.img"), Err(ImageError::Io { .. })));
    assert!(matches!(Image::open("/"), Err(ImageError::Io { .. })));
}

#[test]
fn truncation_is_reported_with_its_section() {
    let directory = tempfile::tempdir().unwrap();
    let (_, bytes) = written(&directory.path().join("a.img"));
    let step = (bytes.len() / 300).max(1);
    for len in (1..bytes.len()).step_by(step) {
        match open(&bytes[..len]) {
            Err(ImageError::Truncated { needed, present, .. }) => {
                assert_eq!(present, len as u64);
                assert!(needed > present);
            }
            other => panic!("{len} of {} bytes: {other:?}", bytes.len()),
        }
    }
    let message = open(&bytes[..bytes.len() - 1]).unwrap_err().to_string();
    assert!(message.contains("metadata") && message.contains("again"), "{message}");
}

#[test]
fn bytes_after_the_end_are_reported() {
    let directory = tempfile::tempdir().unwrap();
    let (_, mut bytes) = written(&directory.path().join("a.img"));
    bytes.push(0);
    assert!(matches!(open(&bytes), Err(ImageError::Corrupt { .. })));
}

#[test]
fn another_version_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let (_, mut bytes) = written(&directory.path().join("a.img"));
    bytes[8] = 2;
    assert!(matches!(open(&bytes), Err(ImageError::Version { found: 2, supported: 1, .. })));
}

#[test]
fn a_missing_kernel_is_named() {
    let error = Image::from_parts(ImageParts { kernel: Content::default(), ..parts() }).unwrap_err();
    assert_eq!(error.to_string(), "the kernel is empty");
}

#[test]
fn writing_replaces_whole_files_only() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.img");
    let (image, bytes) = written(&path);
    image.write(&path).unwrap();
    assert_eq!(fs::read(&path).unwrap(), bytes);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "a temporary file is left");
    let nowhere = directory.path().join("missing/a.img");
    assert!(matches!(image.write(nowhere), Err(ImageError::Io { .. })));
}

#[test]
fn extracted_files_are_the_contents() {
    let directory = tempfile::tempdir().unwrap();
    let image = Image::from_parts(parts()).unwrap();
    let paths = image.extract(directory.path().join("out")).unwrap();
    let names: Vec<_> = paths.iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["vmlinuz", "cmdline.txt", "initrd.img", "disk0.img", "disk1.img"]);
    assert_eq!(fs::read(&paths[3]).unwrap(), image.disks()[0][..]);
}

/// The file is refused, or its contents are what they were: zstd has bits that no decoder looks at, in the frame header
/// (RFC 8878, Unused_Bit) and at the ends of its tables, and the hashes cover contents. Returns whether it was refused.
fn refused_or_the_same(changed: &[u8], image: &Image) -> Result<bool, String> {
    match open(changed) {
        Err(error) if error.to_string().contains("damaged.img") => Ok(true),
        Err(error) => Err(format!("no word of the file: {error}")),
        Ok(opened) if opened.hash() == image.hash() => {
            // What the header has of hashes is not believed.
            let contents = |image: &Image| {
                let directory = tempfile::tempdir().unwrap();
                let paths = image.extract(directory.path().join("out")).unwrap();
                paths.iter().map(|path| fs::read(path).unwrap()).collect::<Vec<_>>()
            };
            if contents(&opened) == contents(image) { Ok(false) } else { Err("other contents".to_string()) }
        }
        Ok(_) => Err("another image".to_string()),
    }
}

/// Where the first zstd frame begins, behind all tables of the file.
fn first_frame(bytes: &[u8]) -> usize {
    bytes.windows(4).position(|four| four == [0x28, 0xB5, 0x2F, 0xFD]).expect("something is compressed")
}

#[test]
fn a_changed_bit_is_found_or_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let (image, mut bytes) = written(&directory.path().join("a.img"));
    let frames = first_frame(&bytes);
    let mut ignored = 0;
    for at in 0..bytes.len() {
        for bit in 0..8 {
            bytes[at] ^= 1 << bit;
            let refused = refused_or_the_same(&bytes, &image).unwrap_or_else(|e| panic!("bit {bit} of byte {at}: {e}"));
            assert!(refused || at >= frames, "bit {bit} of byte {at} is in no frame");
            ignored += usize::from(!refused);
            bytes[at] ^= 1 << bit;
        }
    }
    assert!(ignored <= 4, "{ignored} bits of {} bytes mean nothing", bytes.len());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    /// Every byte of the file is checked, or what it decodes to is covered by a hash.
    #[test]
    fn a_changed_byte_is_found_or_changes_nothing(at in any::<prop::sample::Index>(), in_tables in any::<bool>(), flip in 1u8..=255) {
        let directory = tempfile::tempdir().unwrap();
        let (image, mut bytes) = written(&directory.path().join("a.img"));
        let at = at.index(if in_tables { first_frame(&bytes) } else { bytes.len() });
        bytes[at] ^= flip;
        let refused = refused_or_the_same(&bytes, &image);
        prop_assert!(refused == Ok(true) || refused == Ok(false) && !in_tables, "byte {}: {:?}", at, refused);
    }

    /// Tables with arbitrary numbers in them, under a header that is right, neither panic nor allocate what they say.
    #[test]
    fn arbitrary_tables_are_refused(
        entries in proptest::collection::vec((0u32..9, any::<u64>(), any::<u64>(), any::<u64>()), 0..6),
        small in any::<bool>(),
    ) {
        let mut bytes = b"ORRERY\x1a\n".to_vec();
        bytes.extend(1u32.to_le_bytes());
        bytes.extend((entries.len() as u32).to_le_bytes());
        bytes.extend([0; 48]);
        for (kind, content_len, offset, stored_len) in entries {
            let mask = if small { 0xffff } else { u64::MAX };
            bytes.extend(kind.to_le_bytes());
            bytes.extend([0; 4]);
            for field in [content_len & mask, offset & mask, stored_len & mask, 0] {
                bytes.extend(field.to_le_bytes());
            }
            bytes.extend([0; 32]);
        }
        bytes.resize(bytes.len() + 4096, 0);
        prop_assert!(open(&bytes).is_err());
    }
}
