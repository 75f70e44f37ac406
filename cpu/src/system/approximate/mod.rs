//! Approximations: RCPPS, RCPSS, RSQRTPS, RSQRTSS, their VEX forms, and the transcendental instructions of the x87.
//!
//! The manuals leave the last bits of these to the processor, and vendors differ. They are computed here, by integer
//! arithmetic only, so that the result is the same on every host. The models are described in `docs/cpu-model.md`;
//! changing one changes the State(N) of every guest that uses them.

mod extended;
mod functions;
mod reciprocal;
#[cfg(test)]
mod tests;
mod transcendental;
mod wide;

pub(super) use reciprocal::execute as reciprocal;
pub(super) use transcendental::execute as transcendental;
