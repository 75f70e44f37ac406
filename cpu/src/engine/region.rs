//! Host memory for what the translator leaves behind: one mapping that holds arrays without a single address in
//! them, so that it can be copied, mapped privately by many engines, and kept in a file.

use std::io;
use std::marker::PhantomData;
use std::ops::{Index, IndexMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Size of the host's large pages. A mapping of them costs one fault where small ones cost five hundred, or thirty.
const LARGE: usize = 2 << 20;
/// Size of the host's pages.
pub const PAGE: usize = 4096;
/// Most regions that wait to be used again.
const SPARES_MAX: usize = 16;

/// A file that exists in memory alone, for regions to map.
pub struct MemoryFile {
    descriptor: OwnedFd,
    size: usize,
}

impl MemoryFile {
    /// A file of `size` zero bytes.
    pub fn new(size: usize) -> io::Result<MemoryFile> {
        // SAFETY: the name is a C string.
        let descriptor = owned(unsafe { libc::memfd_create(c"orrery-translations".as_ptr(), libc::MFD_CLOEXEC) })?;
        // SAFETY: a system call without pointers.
        if unsafe { libc::ftruncate(descriptor.as_raw_fd(), size as libc::off_t) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(MemoryFile { descriptor, size })
    }

    /// Asks the host for large pages where these ranges (offset, length; in ascending order) will fill a good part of
    /// them. Only an advice: without them everything works, and touching the mapping costs more.
    pub fn expect(&self, extents: &[(usize, usize)]) {
        let mut filled = vec![0; self.size / LARGE];
        for &(offset, len) in extents {
            for (piece, bytes) in filled.iter_mut().enumerate().skip(offset / LARGE).take(len / LARGE + 2) {
                let (first, end) = (piece * LARGE, (piece + 1) * LARGE);
                *bytes += (offset + len).clamp(first, end) - offset.clamp(first, end);
            }
        }
        let Ok(region) = Region::aligned(self.size, libc::MAP_SHARED, self.descriptor.as_raw_fd()) else { return };
        for (piece, _) in filled.iter().enumerate().filter(|(_, bytes)| **bytes >= LARGE / 4) {
            let at = region.at(piece * LARGE);
            // The host makes large pages of what is there, so something has to be: one byte, which is zero already.
            // SAFETY: inside the mapping, which is writable and which nobody else knows.
            unsafe { at.write_volatile(0) };
            // SAFETY: inside the mapping; the content does not change.
            unsafe { libc::madvise(at.cast(), LARGE, libc::MADV_COLLAPSE) };
        }
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

/// The descriptor that a system call has just made, or its error.
fn owned(fd: libc::c_int) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A fresh mapping; with MAP_FIXED, at `at`, where the caller has reserved as much.
fn map(at: *mut u8, size: usize, protection: libc::c_int, flags: libc::c_int, fd: libc::c_int) -> io::Result<*mut u8> {
    // SAFETY: what is mapped was not in use, see above.
    let base = unsafe { libc::mmap(at.cast(), size, protection, flags | libc::MAP_NORESERVE, fd, 0) };
    if base == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(base.cast()) }
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
        let (flags, descriptor) = match file {
            None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1),
            Some(file) => (libc::MAP_PRIVATE, file.descriptor.as_raw_fd()),
        };
        let region = Region::aligned(size, flags, descriptor)?;
        if file.is_none() {
            // Hot code lies all over the region, and does without large pages if the host has none to give.
            // SAFETY: the mapping that was just made.
            unsafe { libc::madvise(region.base.cast(), region.size, libc::MADV_HUGEPAGE) };
        }
        Ok(region)
    }

    /// A mapping at an address at which large pages can be mapped.
    fn aligned(size: usize, flags: libc::c_int, fd: libc::c_int) -> io::Result<Region> {
        let reserved = size.checked_add(LARGE).ok_or(io::ErrorKind::OutOfMemory)?;
        let nothing = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let start = map(std::ptr::null_mut(), reserved, libc::PROT_NONE, nothing, -1)?;
        let before = start.align_offset(LARGE);
        let unmap = |at: *mut u8, len: usize| {
            if len > 0 {
                // SAFETY: a part of the reservation, which nobody uses.
                unsafe { libc::munmap(at.cast(), len) };
            }
        };
        let base = start.wrapping_add(before);
        unmap(start, before);
        let end = size.next_multiple_of(4096);
        unmap(base.wrapping_add(end), reserved - before - end);
        let mapped = map(base, size, libc::PROT_READ | libc::PROT_WRITE, flags | libc::MAP_FIXED, fd);
        mapped.inspect_err(|_| unmap(base, end)).map(|base| Region { base, size })
    }

    /// Zeroed bytes like those of `new`, perhaps of memory that the host has mapped for an earlier region: touching that
    /// costs no faults.
    pub fn reused(size: usize) -> io::Result<Reused> {
        let mut spares = lock(&SPARES);
        let region = spares.iter().rposition(|spare| spare.size == size).map(|at| spares.swap_remove(at));
        drop(spares);
        let new = || {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let base = map(std::ptr::null_mut(), size, protection, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)?;
            Ok(Region { base, size })
        };
        region.map_or_else(new, Ok).map(|region| Reused(Some(region)))
    }

    /// Makes all bytes zero again; touches only those that the host has provided.
    fn zero(&mut self) -> io::Result<()> {
        let mut resident = vec![0u8; self.size.div_ceil(PAGE)];
        // SAFETY: the range is the whole mapping, and there is a byte for each of its pages.
        if unsafe { libc::mincore(self.base.cast(), self.size, resident.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        for (page, _) in resident.iter().enumerate().filter(|(_, state)| **state & 1 != 0) {
            let offset = page * PAGE;
            // SAFETY: inside the mapping, of which this value is the only owner.
            unsafe { self.base.add(offset).write_bytes(0, (self.size - offset).min(PAGE)) };
        }
        Ok(())
    }

    /// Offsets of the pages in these ranges (offset, length) that are no longer those of the file that is mapped here: they
    /// were written.
    pub fn written(&self, extents: &[(usize, usize)]) -> io::Result<Vec<usize>> {
        // Documentation/admin-guide/mm/pagemap.rst of Linux: eight bytes for each page of the address space.
        const PRESENT: u64 = 1 << 63;
        const SWAPPED: u64 = 1 << 62;
        const OF_FILE: u64 = 1 << 61;
        let pagemap = owned(
            // SAFETY: the path is a C string.
            unsafe { libc::open(c"/proc/self/pagemap".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) },
        )?;
        let mut entries = Vec::new();
        let mut written = Vec::new();
        for (offset, len) in extents {
            let first = offset / PAGE * PAGE;
            entries.resize(((offset + len).div_ceil(PAGE) - first / PAGE) * 8, 0u8);
            let at = self.at(first) as usize / PAGE * 8;
            // SAFETY: the buffer is valid for its length.
            let read = unsafe {
                libc::pread(pagemap.as_raw_fd(), entries.as_mut_ptr().cast(), entries.len(), at as libc::off_t)
            };
            if read != entries.len() as isize {
                return Err(io::Error::last_os_error());
            }
            for (index, entry) in entries.as_chunks::<8>().0.iter().enumerate() {
                let entry = u64::from_ne_bytes(*entry);
                if entry & (PRESENT | SWAPPED) != 0 && entry & OF_FILE == 0 {
                    written.push(first + index * PAGE);
                }
            }
        }
        Ok(written)
    }

    /// Maps a file with the same content over it, privately, as [`Region::new`] does; the first `executable` bytes, whole
    /// pages, are to be so. If that fails the content is what it was.
    pub fn map_over(&mut self, file: &MemoryFile, executable: usize) -> io::Result<()> {
        assert!(file.size == self.size && executable <= self.size && executable.is_multiple_of(PAGE));
        let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
        let data = libc::PROT_READ | libc::PROT_WRITE;
        for (from, to, protection) in [(0, executable, data | libc::PROT_EXEC), (executable, self.size, data)] {
            if from == to {
                continue;
            }
            let (at, fd) = (self.at(from), file.descriptor.as_raw_fd());
            // SAFETY: a part of the mapping that this value owns, which keeps its content and its rights.
            let base = unsafe { libc::mmap(at.cast(), to - from, protection, flags, fd, from as libc::off_t) };
            if base == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }

    /// Makes `len` bytes at `offset`, multiples of the page size, executable as well.
    pub fn make_executable(&self, offset: usize, len: usize) -> io::Result<()> {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.size), "inside the region");
        let protection = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        // SAFETY: the range is inside the mapping that this value owns.
        let result = unsafe { libc::mprotect(self.base.add(offset).cast(), len, protection) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Writes `bytes` at `offset`.
    pub fn write(&mut self, offset: usize, bytes: &[u8]) {
        assert!(offset.checked_add(bytes.len()).is_some_and(|end| end <= self.size), "inside the region");
        // SAFETY: inside the mapping, checked above; it is writable.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.add(offset), bytes.len()) };
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

/// A mapping of a file to read in.
pub struct View(Region);

// SAFETY: nobody writes to the mapping, nor to the file.
unsafe impl Sync for View {}

impl View {
    /// Maps a file that is not written any more.
    pub fn new(file: &MemoryFile) -> io::Result<View> {
        Region::new(file.size, Some(file)).map(View)
    }
}

/// Regions that wait to be used again.
static SPARES: Mutex<Vec<Region>> = Mutex::new(Vec::new());

fn lock(spares: &Mutex<Vec<Region>>) -> MutexGuard<'_, Vec<Region>> {
    // A region is in the list or not, whoever panics.
    spares.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A region from [`Region::reused`], which others get when this value is dropped.
pub struct Reused(Option<Region>);

impl Reused {
    /// The region.
    pub fn region(&self) -> &Region {
        self.0.as_ref().expect("it is there until this value is dropped")
    }
}

impl Drop for Reused {
    fn drop(&mut self) {
        let Some(mut region) = self.0.take() else { return };
        if lock(&SPARES).len() < SPARES_MAX && region.zero().is_ok() {
            lock(&SPARES).push(region);
        }
    }
}

/// A growing array in a region. Its elements are plain data for which all-zero bytes are a valid value.
pub struct Array<T> {
    base: *mut T,
    capacity: usize,
    len: usize,
    /// Offset in the region, in bytes.
    offset: usize,
    /// The first elements where many read them, and which pages of those have changed here.
    below: *const T,
    below_len: usize,
    changed: Vec<u64>,
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
        let base = region.at(offset).cast();
        Array {
            base,
            capacity,
            len,
            offset,
            below: std::ptr::null(),
            below_len: 0,
            changed: Vec::new(),
            kind: PhantomData,
        }
    }

    /// Reads its first `len` elements from now on in `view`, a mapping of the file that is mapped below its own region,
    /// as long as they are what they are there: pages of a new mapping that nobody touches cost nothing. The view must
    /// stay until another takes its place or [`Array::read_here`] is called. Pages of the region at `changed` differ.
    pub fn read_in(&mut self, view: &View, len: usize, changed: &[usize]) {
        assert!(len <= self.len && self.offset + len * size_of::<T>() <= view.0.size, "inside the view");
        self.below = view.0.at(self.offset).cast();
        self.below_len = len;
        self.changed = vec![0; (len * size_of::<T>()).div_ceil(PAGE).div_ceil(64)];
        for page in changed {
            if let Some(page) = page.checked_sub(self.offset).map(|at| at / PAGE)
                && let Some(word) = self.changed.get_mut(page / 64)
            {
                *word |= 1 << (page % 64);
            }
        }
    }

    /// Reads all elements in its own region.
    pub fn read_here(&mut self) {
        (self.below_len, self.changed) = (0, Vec::new());
    }

    /// The first and the last page of an element.
    fn pages_of(index: usize) -> [usize; 2] {
        [index * size_of::<T>() / PAGE, ((index + 1) * size_of::<T>() - 1) / PAGE]
    }

    /// The element is what it is in the view.
    fn is_below(&self, index: usize) -> bool {
        let same = |page: usize| self.changed[page / 64] & 1 << (page % 64) == 0;
        index < self.below_len && Self::pages_of(index).into_iter().all(same)
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
        self.read_here();
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
        // Any of them may change.
        (self.below_len, self.changed) = (0, Vec::new());
        // SAFETY: as above, and the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(self.base, self.len) }
    }
}

impl<T: Copy> Index<u32> for Array<T> {
    type Output = T;
    #[inline]
    fn index(&self, index: u32) -> &T {
        let index = index as usize;
        if self.is_below(index) {
            // SAFETY: inside the view, which is mapped, and has there what this array has.
            return unsafe { &*self.below.add(index) };
        }
        &(**self)[index]
    }
}

impl<T: Copy> IndexMut<u32> for Array<T> {
    #[inline]
    fn index_mut(&mut self, index: u32) -> &mut T {
        let index = index as usize;
        if index < self.below_len {
            for page in Self::pages_of(index) {
                self.changed[page / 64] |= 1 << (page % 64);
            }
        }
        assert!(index < self.len, "an index of the array");
        // SAFETY: inside the array, checked above; the borrow is unique.
        unsafe { &mut *self.base.add(index) }
    }
}

/// Lays arrays out one behind the other, each on a page of its own.
#[derive(Default)]
pub struct Layout {
    end: usize,
}

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
    fn a_region_that_is_used_again_is_zero() {
        // A size that nobody else has.
        let size = 37 * PAGE;
        let first = Region::reused(size).unwrap();
        let mut bytes: Array<u8> = Layout::array(first.region(), 0, size, size);
        bytes[5u32] = 1;
        bytes[size as u32 - 1] = 1;
        drop(first);
        let second = Region::reused(size).unwrap();
        assert!(second.region().bytes(0, size).iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_file_that_expects_much_is_as_any_other() {
        let file = MemoryFile::new(3 * LARGE + PAGE).unwrap();
        file.expect(&[(0, 5), (PAGE, LARGE), (3 * LARGE - 1, 2)]);
        file.expect(&[]);
        file.write(LARGE - 1, &[1, 2]).unwrap();
        file.write(3 * LARGE, &[3]).unwrap();
        let region = Region::new(3 * LARGE + PAGE, Some(&file)).unwrap();
        assert!(region.at(0).cast::<u8>().align_offset(LARGE) == 0);
        let set: Vec<usize> = (0..3 * LARGE + PAGE).filter(|at| region.bytes(*at, 1)[0] != 0).collect();
        assert_eq!(set, [LARGE - 1, LARGE, 3 * LARGE]);
    }

    #[test]
    fn what_was_written_is_known_and_what_is_mapped_over_stays() {
        let file = MemoryFile::new(8 * PAGE).unwrap();
        file.write(0, &[7; 8 * PAGE]).unwrap();
        let mut region = Region::new(8 * PAGE, Some(&file)).unwrap();
        let all = [(0, 3 * PAGE), (3 * PAGE, 5 * PAGE)];
        let read: u32 = (0..8).map(|page| u32::from(region.bytes(page * PAGE, 1)[0])).sum();
        assert_eq!(read, 56);
        assert!(region.written(&all).unwrap().is_empty(), "only read");
        region.write(2 * PAGE + 5, &[1]);
        region.write(6 * PAGE, &[2]);
        assert_eq!(region.written(&all).unwrap(), [2 * PAGE, 6 * PAGE]);
        assert_eq!(region.written(&[(2 * PAGE + 1, 1), (3 * PAGE, 5)]).unwrap(), [2 * PAGE]);
        let copy = MemoryFile::new(8 * PAGE).unwrap();
        copy.write(0, region.bytes(0, 8 * PAGE)).unwrap();
        region.map_over(&copy, 3 * PAGE).unwrap();
        assert!(region.written(&all).unwrap().is_empty());
        assert_eq!([2 * PAGE + 5, 6 * PAGE, 7 * PAGE].map(|at| region.bytes(at, 1)[0]), [1, 2, 7]);
        region.write(6 * PAGE, &[3]);
        assert_eq!(region.written(&all).unwrap(), [6 * PAGE]);
        assert_eq!(region.bytes(2 * PAGE, 6), [7, 7, 7, 7, 7, 1]);
    }

    #[test]
    fn arrays_are_read_in_a_view_until_they_change() {
        let len = 3 * PAGE / 12;
        let file = MemoryFile::new(5 * PAGE).unwrap();
        let content: Vec<u8> = (0..len as u32).flat_map(|n| [n, n + 1, n + 2]).flat_map(u32::to_le_bytes).collect();
        file.write(PAGE, &content).unwrap();
        let view = View::new(&file).unwrap();
        let mut region = Region::new(5 * PAGE, Some(&file)).unwrap();
        // As if it had been changed before.
        region.write(3 * PAGE, &[7; PAGE]);
        let mut array: Array<[u32; 3]> = Layout::array(&region, PAGE, len + 1, len);
        array.read_in(&view, len, &[0, 3 * PAGE, 4 * PAGE]);
        let elements = |array: &Array<[u32; 3]>| (0..array.len() as u32).map(|n| array[n]).collect::<Vec<_>>();
        let mut expected = array.to_vec();
        assert_eq!(elements(&array), expected);
        assert!(array.is_below(300) && !array.is_below(682), "the latter lies in the page that was changed");
        array.push([1, 2, 3]);
        // In two pages.
        array[341u32][1] = 5;
        expected.push([1, 2, 3]);
        expected[341][1] = 5;
        assert_eq!(elements(&array), expected);
        assert!([0, 341, 400].into_iter().all(|index| !array.is_below(index)));
        array.read_in(&view, 100, &[]);
        assert!(array.is_below(99) && !array.is_below(100));
        array.iter_mut().for_each(|element| element[0] = 1);
        assert!(elements(&array).iter().all(|element| element[0] == 1));
        array.read_in(&view, 0, &[]);
        array.clear();
        assert!(!array.is_below(0));
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
