//! Which block leaves when memory is wanted, and whether a new one is worth its place.
//!
//! A policy orders *entry ids* (small integers that address the block index) and nothing else: it
//! holds no keys, no pages and no locks, so one policy file can be read, tested and replaced alone.
//! The node's cache thread owns the one policy object.
//!
//! Memory: the per-entry arrays are allocated zeroed and are touched only where an entry lives, so
//! a policy for a hundred million entries costs real memory for those in use only (8 bytes per
//! entry for LRU, 12 for S3-FIFO).

#![forbid(unsafe_code)]

mod list;
mod lru;
mod s3fifo;
mod tinylfu;

#[cfg(test)]
mod conformance;
#[cfg(test)]
mod trace;

pub use lru::Lru;
pub use s3fifo::S3Fifo;
pub use tinylfu::TinyLfu;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// An order of eviction over entry ids.
///
/// What MUST hold for every implementation (the conformance suite tries to break each line):
///
/// * Ids are smaller than the capacity that the policy was built with; a larger id panics.
/// * An id is a member from `insert` to `remove`, whatever happens between. `insert` of a member
///   counts as a `touch`; `touch` and `remove` of a non-member do nothing.
/// * `victim` returns a member for which `evictable` just answered true, or `None` only if every
///   member was asked and refused. It does not remove the victim: the caller does, by `remove`.
/// * `upcoming` shows members, each once at most, until `visit` answers false or all were shown, in
///   about the order in which they would leave. It changes nothing.
/// * A member that `victim` finds not evictable stays a member and counts as recently used.
/// * `victim` takes at most a fixed multiple of `len()` steps; all else takes constant time and
///   allocates nothing.
pub trait EvictionPolicy: Send {
    /// The name that the configuration and the metrics use.
    fn name(&self) -> &'static str;

    /// Makes `id` a member. `key_hash` identifies the content: the same content carries the same
    /// value after an eviction, under whatever id it comes back.
    fn insert(&mut self, id: u32, key_hash: u64);

    /// Notes a use of `id`.
    fn touch(&mut self, id: u32);

    /// Ends the membership of `id`.
    fn remove(&mut self, id: u32);

    /// The member to evict next among those for which `evictable` answers true.
    fn victim(&mut self, evictable: &mut dyn FnMut(u32) -> bool) -> Option<u32>;

    /// Shows what would leave next, until `visit` answers false.
    fn upcoming(&self, visit: &mut dyn FnMut(u32) -> bool);

    /// Whether `id` is a member.
    fn contains(&self, id: u32) -> bool;

    /// The number of members.
    fn len(&self) -> usize;

    /// Whether there is no member.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A gate before insertion: whether new content deserves the place of the victim.
///
/// What MUST hold: `record` and `admit` take constant time, allocate nothing and accept any value.
pub trait Admission: Send {
    /// The name that the configuration and the metrics use.
    fn name(&self) -> &'static str;

    /// Notes one use (hit, miss or save) of the content.
    fn record(&mut self, key_hash: u64);

    /// Whether `candidate` should replace `victim`.
    fn admit(&mut self, candidate: u64, victim: u64) -> bool;

    /// Tells how many blocks the cache really holds when it is full, which decides how fast old
    /// uses are forgotten. Without it the capacity given at construction counts.
    fn set_resident(&mut self, blocks: usize);
}

/// The eviction policies that can be chosen by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PolicyKind {
    /// Least recently used leaves first.
    #[default]
    Lru,
    /// Three FIFO queues: what is used once leaves quickly, what is used again stays.
    #[value(name = "s3-fifo")]
    #[serde(rename = "s3-fifo")]
    S3Fifo,
}

impl PolicyKind {
    /// Every kind, for suites that run over all of them.
    pub const ALL: [Self; 2] = [Self::Lru, Self::S3Fifo];

    /// The name that the configuration and the metrics use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lru => lru::NAME,
            Self::S3Fifo => s3fifo::NAME,
        }
    }
}

/// The admission gates that can be chosen by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AdmissionKind {
    /// Everything is admitted.
    #[default]
    Off,
    /// Content enters a full cache only if it was used more often than the victim.
    #[value(name = "tinylfu")]
    #[serde(rename = "tinylfu")]
    TinyLfu,
}

/// Builds the policy for ids below `capacity`.
///
/// # Panics
/// If `capacity` exceeds [`MAX_CAPACITY`].
pub fn build(kind: PolicyKind, capacity: u32) -> Box<dyn EvictionPolicy> {
    match kind {
        PolicyKind::Lru => Box::new(Lru::new(capacity)),
        PolicyKind::S3Fifo => Box::new(S3Fifo::new(capacity)),
    }
}

/// Builds the admission gate for a cache of at most `capacity` blocks; `None` admits everything.
pub fn build_admission(kind: AdmissionKind, capacity: u32) -> Option<Box<dyn Admission>> {
    match kind {
        AdmissionKind::Off => None,
        AdmissionKind::TinyLfu => Some(Box::new(TinyLfu::new(capacity))),
    }
}

/// The most ids that a policy can order: list links keep two values for themselves.
pub const MAX_CAPACITY: u32 = u32::MAX - 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_on_the_command_line_in_files_and_in_metrics_are_the_same() {
        for kind in PolicyKind::ALL {
            let cli = kind.to_possible_value().expect("no kind is hidden");
            assert_eq!(cli.get_name(), kind.name());
            let json = serde_json::to_string(&kind).expect("a unit variant serializes");
            assert_eq!(json, format!("\"{}\"", kind.name()));
            assert_eq!(build(kind, 4).name(), kind.name());
        }
        let json = serde_json::to_string(&AdmissionKind::TinyLfu).expect("serializes");
        assert_eq!(json, "\"tinylfu\"");
        assert_eq!(
            AdmissionKind::TinyLfu
                .to_possible_value()
                .expect("shown")
                .get_name(),
            "tinylfu"
        );
    }
}
