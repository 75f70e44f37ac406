//! Host memory for translated code: one reserved range, filled from the bottom, emptied as a whole.

use std::io;

/// An executable range. Code is placed by bumping a pointer; only clearing all of it gives space back.
pub struct CodeMemory {
    base: *mut u8,
    size: usize,
    used: usize,
    /// Bytes at the bottom that clearing keeps: the thunks.
    kept: usize,
}

// SAFETY: the mapping is owned by this value alone.
unsafe impl Send for CodeMemory {}

impl CodeMemory {
    /// Reserves `size` bytes. Fails when the host has no address space or forbids executable memory.
    pub fn new(size: usize) -> io::Result<CodeMemory> {
        // SAFETY: a fresh anonymous mapping; nothing else is touched.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(CodeMemory { base: base.cast(), size, used: 0, kept: 0 })
    }

    /// Host address of the range.
    pub fn start(&self) -> u64 {
        self.base as u64
    }

    /// One past the range.
    pub fn end(&self) -> u64 {
        self.base as u64 + self.size as u64
    }

    /// Host address at which the next piece of code will stand.
    pub fn next(&self) -> u64 {
        self.base as u64 + self.used as u64
    }

    /// True if `len` more bytes fit.
    pub fn has_room(&self, len: usize) -> bool {
        self.size - self.used >= len
    }

    /// Places code that was assembled for `next()`.
    pub fn place(&mut self, code: &[u8]) -> u64 {
        assert!(self.has_room(code.len()), "room is checked before translating");
        let at = self.next();
        // SAFETY: the range is inside the mapping, checked above; nobody executes there yet.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), at as *mut u8, code.len()) };
        self.used = (self.used + code.len()).next_multiple_of(16).min(self.size);
        at
    }

    /// Keeps what has been placed so far for good.
    pub fn keep(&mut self) {
        self.kept = self.used;
    }

    /// Forgets all code but what is kept.
    pub fn clear(&mut self) {
        self.used = self.kept;
    }

    /// Overwrites the rel32 at host address `at` so that it leads to `target`.
    pub fn patch_rel32(&mut self, at: u64, target: u64) {
        assert!(at >= self.start() && at + 4 <= self.end(), "patches stay inside the code memory");
        let displacement = target.wrapping_sub(at + 4) as u32;
        // SAFETY: inside the mapping, checked above; this thread executes nothing there right now.
        unsafe { (at as *mut u32).write_unaligned(displacement) };
    }

    /// Overwrites the instruction at `at` with `jmp target`.
    pub fn patch_jmp(&mut self, at: u64, target: u64) {
        assert!(at >= self.start() && at + 5 <= self.end(), "patches stay inside the code memory");
        // SAFETY: as above.
        unsafe { (at as *mut u8).write(0xE9) };
        self.patch_rel32(at + 1, target);
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` and is not used after this.
        unsafe { libc::munmap(self.base.cast(), self.size) };
    }
}
