//! Seeds that found something, and what.

#![forbid(unsafe_code)]

/// Seeds that are run each time, with what each found when it was new.
pub const FOUND: &[(u64, &str)] = &[];
