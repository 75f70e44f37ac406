//! Writes cpio archives in the "newc" format that Linux unpacks as initramfs
//! (Documentation/driver-api/early-userspace/buffer-format.rst). Byte for byte a function of what is added, in
//! its order: owners are root, times are zero, inode numbers count up.

/// An archive in the making.
pub struct CpioWriter {
    bytes: Vec<u8>,
    next_inode: u32,
}

const S_IFDIR: u32 = 0o040000;
const S_IFREG: u32 = 0o100000;
const S_IFCHR: u32 = 0o020000;

impl Default for CpioWriter {
    fn default() -> CpioWriter {
        CpioWriter::new()
    }
}

impl CpioWriter {
    /// An empty archive.
    pub fn new() -> CpioWriter {
        CpioWriter { bytes: Vec::new(), next_inode: 1 }
    }

    /// Adds a directory with mode 0755. Parents must be added first.
    pub fn directory(&mut self, path: &str) {
        self.entry(path, S_IFDIR | 0o755, &[], (0, 0));
    }

    /// Adds a regular file.
    pub fn file(&mut self, path: &str, permissions: u32, content: &[u8]) {
        self.entry(path, S_IFREG | permissions, content, (0, 0));
    }

    /// Adds a character device node with mode 0600.
    pub fn character_device(&mut self, path: &str, major: u32, minor: u32) {
        self.entry(path, S_IFCHR | 0o600, &[], (major, minor));
    }

    /// Ends the archive and returns its bytes, padded to 512.
    pub fn finish(mut self) -> Vec<u8> {
        self.next_inode = 0;
        self.entry("TRAILER!!!", 0, &[], (0, 0));
        self.pad(512);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8], device: (u32, u32)) {
        let inode = self.next_inode;
        self.next_inode = inode.wrapping_add(1);
        let links = if mode & 0o170000 == S_IFDIR { 2 } else { 1 };
        let fields = [
            inode,
            mode,
            0,
            0,
            links,
            0,
            u32::try_from(content.len()).expect("initramfs files are far below 4 GiB"),
            0,
            0,
            device.0,
            device.1,
            path.len() as u32 + 1,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad(4);
        self.bytes.extend_from_slice(content);
        self.pad(4);
    }

    fn pad(&mut self, alignment: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(alignment), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layout_is_newc() {
        let mut archive = CpioWriter::new();
        archive.directory("dev");
        archive.character_device("dev/console", 5, 1);
        archive.file("init", 0o755, b"abc");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 512, 0);
        assert_eq!(&bytes[..14], b"07070100000001");
        assert_eq!(&bytes[110..114], b"dev\0");
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.contains("init\0") && text.contains("abc\0") && text.contains("TRAILER!!!\0"));
    }
}
