//! What the fuzz targets do: functions of bytes that return, or panic when a guarantee is broken.
//!
//! `fuzz/` wraps them for libFuzzer. The tests here run them without it, over the committed corpus,
//! the regressions, and inputs mutated from both. Each target has a generator of seeds that speaks
//! the protocol, so that the corpus can be written anew when the protocol changes (`make
//! fuzz-seeds`).
//!
//! * `control`: packets of the session socket and the header of a segment. Limits hold, layouts
//!   lie inside their memory, every answer fits a packet.
//! * `catalog`: records, tables and files of a previous daemon, damaged. Only pages that were
//!   sealed come back, none of them twice, and the next look finds the same.
//! * `descriptors`: rings and arenas of two clients at a lane, copies and time as the input says;
//!   in `lane/fuzz/`. No page is touched twice, counts agree, nothing is left of who left, and a
//!   third client finds its blocks unchanged.
//! * `ring`: every word that the peer writes. Positions, faults and bodies are those of a naive
//!   model.
//! * `index`: every byte of an index file. Look-ups are bounded and agree with each other, and a
//!   hit has a sealed entry of that very key.

#![forbid(unsafe_code)]

mod catalog;
mod control;
mod index;
pub(crate) mod input;
pub(crate) mod place;
mod ring;

#[cfg(test)]
mod tests;

pub use crate::lane::fuzz::descriptors;
pub use catalog::catalog;
pub use control::control;
pub use index::index;
pub use ring::ring;

/// A target: its name, what it does, and the seeds of its corpus.
#[cfg(test)]
type Target = (&'static str, fn(&[u8]), fn() -> Vec<Vec<u8>>);

#[cfg(test)]
const TARGETS: [Target; 5] = [
    ("control", control, control::seeds),
    ("catalog", catalog, catalog::seeds),
    ("descriptors", descriptors, crate::lane::fuzz::seeds),
    ("ring", ring, ring::seeds),
    ("index", index, index::seeds),
];
