//! The first program inside the guest.
fn main() {}
