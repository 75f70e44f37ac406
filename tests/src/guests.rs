//! Small guests, one per behaviour.
