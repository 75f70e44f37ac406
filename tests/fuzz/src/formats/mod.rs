//! Every file that Orrery reads, and what its debugger reads out of a guest: hostile, whoever made it.
//!
//! The first byte of an input chooses the format. The oracle: no panic, no hang, and what is accepted survives being
//! written and read again. Where a checksum stands in the way, the generator puts it right.

mod files;
mod state;
mod store;
mod symbols;

/// Runs one input. Panics if a promise is broken.
pub fn execute(data: &[u8]) {
    let _running = crate::watch::input(data, false);
    let Some((format, rest)) = data.split_first() else { return };
    match format % 17 {
        0 => files::image(rest),
        1 => files::kernel(rest),
        2 => files::manifest(rest),
        3 => files::inputs(rest),
        4 => files::package(rest),
        5 | 6 => state::machine_state(rest),
        7 => files::words(rest),
        8 => symbols::object(rest),
        9 => symbols::types(rest),
        10 => symbols::kernel_symbols(rest),
        11 => symbols::inspector(rest),
        12 | 13 => store::damaged(rest),
        14 => store::parts(rest),
        15 => store::exported(rest),
        _ => store::translations(rest),
    }
}
