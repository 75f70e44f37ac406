//! Page walks.

use super::*;
use crate::paging::{Access, entry, fault, walk};

fn access(write: bool, fetch: bool, user: bool) -> Access {
    Access { write, fetch, user, smap_active: true }
}

fn error(result: Result<crate::paging::Translation, Exception>) -> u32 {
    match result {
        Err(Exception::PageFault { error, .. }) => error,
        other => panic!("{other:?} is not a page fault"),
    }
}

#[test]
fn rights_and_error_codes() {
    let mut m = Machine::new();
    let walk = |m: &Machine, at, a| walk(&m.state, &m.sys.memory, at, a);
    assert_eq!(walk(&m, USER + 5, access(false, false, true)).unwrap().gpa, USER + 5);
    assert_eq!(error(walk(&m, HOLE, access(false, false, true))), fault::USER);
    assert_eq!(error(walk(&m, HANDLER, access(true, false, true))), fault::PRESENT | fault::WRITE | fault::USER);
    assert_eq!(error(walk(&m, READ_ONLY, access(true, false, true))), 7);
    // The kernel may write it, until CR0.WP is set.
    assert!(walk(&m, READ_ONLY, access(true, false, false)).is_ok());
    m.state.cr0 |= control::CR0_WP;
    assert_eq!(error(walk(&m, READ_ONLY, access(true, false, false))), 3);
    m.state.cr4 |= control::CR4_SMAP | control::CR4_SMEP;
    assert_eq!(error(walk(&m, USER, access(false, false, false))), fault::PRESENT);
    let suspended = Access { smap_active: false, ..access(false, false, false) };
    assert!(walk(&m, USER, suspended).is_ok());
    assert_eq!(error(walk(&m, USER, access(false, true, false))), fault::PRESENT | fault::FETCH);
    // No-execute.
    m.poke(0x5000 + 5 * 8, (USER + 0x5000) | 7 | entry::NO_EXECUTE);
    assert_eq!(error(walk(&m, USER + 0x5000, access(false, true, true))), 0x15);
    m.state.efer &= !control::EFER_NXE;
    assert_eq!(error(walk(&m, USER + 0x5000, access(false, false, true))), 0xD);
    // A physical address beyond the model's width.
    m.poke(0x5000 + 6 * 8, 1 << 50 | 7);
    assert_eq!(error(walk(&m, USER + 0x6000, access(false, false, true))), 0xD);
}

#[test]
fn accessed_and_dirty_flags() {
    let m = Machine::new();
    let leaf = 0x5000 + 7 * 8;
    let at = USER + 0x7000;
    let refused = walk(&m.state, &m.sys.memory, READ_ONLY, access(true, false, true));
    assert!(refused.is_err() && m.peek(0x5000 + (0x102 * 8)) & entry::ACCESSED == 0);
    let first = walk(&m.state, &m.sys.memory, at, access(false, false, true)).unwrap();
    assert!(!first.dirty && first.updated & 8 != 0 && first.levels == 4 && first.table_entries[3] == leaf);
    assert_eq!(m.peek(leaf) & (entry::ACCESSED | entry::DIRTY), entry::ACCESSED);
    let second = walk(&m.state, &m.sys.memory, at, access(true, false, true)).unwrap();
    assert!(second.dirty && second.updated == 8);
    assert_eq!(walk(&m.state, &m.sys.memory, at, access(true, false, true)).unwrap().updated, 0);
}

#[test]
fn large_pages() {
    let m = Machine::new();
    m.poke(0x3000 + 8 * 8, 0x20_0000 | 7 | entry::PAGE_SIZE);
    let at = (8 << 21) + 0x12345;
    let found = walk(&m.state, &m.sys.memory, at, access(false, false, true)).unwrap();
    assert_eq!((found.gpa, found.page_size, found.levels), (0x21_2345, 2 << 20, 3));
    m.poke(0x3000 + 9 * 8, 0x20_2000 | 7 | entry::PAGE_SIZE);
    assert_eq!(error(walk(&m.state, &m.sys.memory, 9 << 21, access(false, false, true))), 0xD);
    m.poke(0x2008, 7 | entry::PAGE_SIZE);
    let found = walk(&m.state, &m.sys.memory, (1 << 30) + 0x345678, access(false, false, true)).unwrap();
    assert_eq!((found.gpa, found.page_size, found.levels), (0x345678, 1 << 30, 2));
}
