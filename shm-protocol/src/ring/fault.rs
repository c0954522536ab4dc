//! What can go wrong with a ring.

#![forbid(unsafe_code)]

use thiserror::Error;

/// The peer wrote a word that no correct peer writes. The session must end; nothing else is
/// affected.
///
/// The handle that reported a fault has not moved and stays safe to call, but what it answers
/// afterwards means nothing.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum RingFault {
    /// The slot of `position` is neither published for it nor waiting for it.
    #[error(
        "slot of position {position} has sequence {found}, neither {expected} (empty) nor \
         published; close the session"
    )]
    Sequence {
        /// Position that the consumer wanted to read.
        position: u64,
        /// Value of an empty slot at this position.
        expected: u64,
        /// Value that was found.
        found: u64,
    },
    /// The consumer claims to have read more than was ever produced.
    #[error(
        "peer says it consumed {found} messages but at most {expected} were produced at position \
         {position}; close the session"
    )]
    ConsumedAhead {
        /// The producer's position.
        position: u64,
        /// Largest correct value.
        expected: u64,
        /// Value that was found.
        found: u64,
    },
    /// The consumer's progress went backwards.
    #[error(
        "peer says it consumed {found} messages after having said {expected}, at position \
         {position}; close the session"
    )]
    ConsumedBackwards {
        /// The producer's position.
        position: u64,
        /// Smallest correct value: what the consumer had said before.
        expected: u64,
        /// Value that was found.
        found: u64,
    },
}

/// Why a message was not pushed. Nothing was written in any of these cases.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum PushError {
    /// No room now; try again after the consumer has made progress.
    #[error("ring is full; retry after the consumer has made progress")]
    Full,
    /// More messages at once than the ring has slots: this can never succeed.
    #[error("{count} messages at once do not fit a ring of {capacity} slots; push fewer at a time")]
    TooMany {
        /// Messages in the call.
        count: usize,
        /// Slots of the ring.
        capacity: u32,
    },
    /// The peer broke the ring.
    #[error(transparent)]
    Fault(#[from] RingFault),
}
