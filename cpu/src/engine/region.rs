//! Host memory for what the translator leaves behind: one mapping that holds arrays without a single address in
//! them, so that it can be copied, mapped privately by many engines, and kept in a file.

use std::io;
use std::marker::PhantomData;
use std::ops::{Index, IndexMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// A file that exists in memory alone, for regions to map.
pub struct MemoryFile {
    descriptor: OwnedFd,
}

impl MemoryFile {
    /// A file of `size` zero bytes.
    pub fn new(size: usize) -> io::Result<MemoryFile> {
        // SAFETY: the name is a C string and the flags are valid; the result is checked.
        let fd = unsafe { libc::memfd_create(c"orrery-translations".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a fresh descriptor that nobody else owns.
        let descriptor = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: a system call without pointers.
        if unsafe { libc::ftruncate(fd, size as libc::off_t) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(MemoryFile { descriptor })
    }

    /// Writes all of `bytes` at `offset`.
    pub fn write(&self, mut offset: usize, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let fd = self.descriptor.as_raw_fd();
            // SAFETY: the buffer is valid for its length.
            let written = unsafe { libc::pwrite(fd, bytes.as_ptr().cast(), bytes.len(), offset as libc::off_t) };
            if written <= 0 {
                return Err(io::Error::last_os_error());
            }
            offset += written as usize;
            bytes = &bytes[written as usize..];
        }
        Ok(())
    }
}

/// One mapping, unmapped when dropped.
pub struct Region {
    base: *mut u8,
    size: usize,
}

// SAFETY: the mapping is owned by this value alone.
unsafe impl Send for Region {}

impl Region {
    /// Reserves `size` zeroed bytes, or maps `file` privately: what is written stays here.
    pub fn new(size: usize, file: Option<&MemoryFile>) -> io::Result<Region> {
        let (kind, fd) = match file {
            None => (libc::MAP_ANONYMOUS, -1),
            Some(file) => (0, file.descriptor.as_raw_fd()),
        };
        // SAFETY: a fresh private mapping; nothing else is touched.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_NORESERVE | kind,
                fd,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Region { base: base.cast(), size })
    }

    /// Makes `len` bytes at `offset`, multiples of the page size, executable as well.
    pub fn make_executable(&self, offset: usize, len: usize) -> io::Result<()> {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.size), "inside the region");
        let protection = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        // SAFETY: the range is inside the mapping that this value owns.
        let result = unsafe { libc::mprotect(self.base.add(offset).cast(), len, protection) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Host address of `offset`.
    pub fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset <= self.size, "inside the region");
        // SAFETY: inside the mapping or one past it, checked above.
        unsafe { self.base.add(offset) }
    }

    /// The bytes from `offset` on.
    pub fn bytes(&self, offset: usize, len: usize) -> &[u8] {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.size), "inside the region");
        // SAFETY: inside the mapping, checked above; it is readable.
        unsafe { std::slice::from_raw_parts(self.base.add(offset), len) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` and is not used after this.
        unsafe { libc::munmap(self.base.cast(), self.size) };
    }
}

/// A growing array in a region. Its elements are plain data for which all-zero bytes are a valid value.
pub struct Array<T> {
    base: *mut T,
    capacity: usize,
    len: usize,
    /// Offset in the region, in bytes.
    offset: usize,
    kind: PhantomData<T>,
}

// SAFETY: the memory belongs to the region, which the owner of the array owns too.
unsafe impl<T: Send> Send for Array<T> {}

impl<T: Copy> Array<T> {
    /// The array of `capacity` elements at `offset` of the region, of which `len` are there. The region must live
    /// as long as the array, and the range be used by it alone.
    fn new(region: &Region, offset: usize, capacity: usize, len: usize) -> Array<T> {
        assert!(offset.is_multiple_of(align_of::<T>()) && len <= capacity);
        assert!(offset + capacity * size_of::<T>() <= region.size, "inside the region");
        Array { base: region.at(offset).cast(), capacity, len, offset, kind: PhantomData }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if `more` elements fit.
    pub fn has_room(&self, more: usize) -> bool {
        self.capacity - self.len >= more
    }

    /// Appends an element; room is checked by `has_room` before.
    pub fn push(&mut self, value: T) {
        assert!(self.len < self.capacity, "room is checked before translating");
        // SAFETY: below the capacity, so inside the region.
        unsafe { self.base.add(self.len).write(value) };
        self.len += 1;
    }

    /// Removes all elements.
    pub fn clear(&mut self) {
        self.len = 0;
    }

    /// Where the elements are in the region: offset and length in bytes.
    pub fn extent(&self) -> (usize, usize) {
        (self.offset, self.len * size_of::<T>())
    }
}

impl<T> std::ops::Deref for Array<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `len` elements have been written, or are zeroed memory or a copy of such an array.
        unsafe { std::slice::from_raw_parts(self.base, self.len) }
    }
}

impl<T> std::ops::DerefMut for Array<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(self.base, self.len) }
    }
}

impl<T: Copy> Index<u32> for Array<T> {
    type Output = T;
    #[inline]
    fn index(&self, index: u32) -> &T {
        &(**self)[index as usize]
    }
}

impl<T: Copy> IndexMut<u32> for Array<T> {
    #[inline]
    fn index_mut(&mut self, index: u32) -> &mut T {
        &mut (**self)[index as usize]
    }
}

/// Lays arrays out one behind the other, each on a page of its own.
#[derive(Default)]
pub struct Layout {
    end: usize,
}

const PAGE: usize = 4096;

impl Layout {
    /// Room for `capacity` elements of `T`; returns its offset.
    pub fn room<T>(&mut self, capacity: usize) -> usize {
        let offset = self.end;
        self.end += (capacity * size_of::<T>()).next_multiple_of(PAGE);
        offset
    }

    /// Bytes laid out so far.
    pub fn size(&self) -> usize {
        self.end
    }

    /// The array at `offset` of the region with `len` elements.
    pub fn array<T: Copy>(region: &Region, offset: usize, capacity: usize, len: usize) -> Array<T> {
        Array::new(region, offset, capacity, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_grow_within_their_room() {
        let region = Region::new(2 * PAGE, None).unwrap();
        let mut array: Array<u64> = Layout::array(&region, PAGE, 3, 0);
        assert!(array.has_room(3) && !array.has_room(4));
        array.push(5);
        array.push(6);
        array[1u32] = 7;
        assert_eq!(*array, [5, 7]);
        assert_eq!(array.extent(), (PAGE, 16));
        array.clear();
        assert!(array.is_empty());
    }

    #[test]
    fn a_private_mapping_keeps_its_writes() {
        let file = MemoryFile::new(PAGE).unwrap();
        file.write(0, &[7; PAGE]).unwrap();
        let (a, b) = (Region::new(PAGE, Some(&file)).unwrap(), Region::new(PAGE, Some(&file)).unwrap());
        let mut bytes: Array<u8> = Layout::array(&a, 0, PAGE, PAGE);
        bytes[0u32] = 1;
        assert_eq!((a.bytes(0, 2), b.bytes(0, 2)), (&[1u8, 7][..], &[7u8, 7][..]));
    }
}
