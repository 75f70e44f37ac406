//! The smallest kernel.

/// An ELF executable with one segment, at `load`, where it is also entered.
pub fn executable(load: u64, code: &[u8]) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3E\0\x01\0\0\0".to_vec();
    file.extend(load.to_le_bytes());
    file.extend(64u64.to_le_bytes());
    file.extend([0; 12]);
    for half in [64u16, 56, 1, 64, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    file.extend([1, 0, 0, 0, 7, 0, 0, 0]);
    let bytes = code.len() as u64;
    for word in [120, load, load, bytes, bytes, 8] {
        file.extend(u64::to_le_bytes(word));
    }
    file.extend(code);
    file
}
