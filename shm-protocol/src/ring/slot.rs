//! One ring entry: a sequence word and seven body words, one cache line.

#![forbid(unsafe_code)]

use crate::sync::{AtomicU64, Ordering};

/// Words in a message body.
pub const BODY_WORDS: usize = 7;

/// One message: 56 bytes.
pub type Body = [u64; BODY_WORDS];

/// Bytes of a slot.
pub const SLOT_BYTES: usize = 64;

/// Words that are really copied. Each atomic access multiplies the executions that loom explores,
/// and two words show a torn message as well as seven.
const COPIED_WORDS: usize = if cfg!(loom) { 2 } else { BODY_WORDS };

/// A ring entry as it lies in shared memory. Zeroed memory is a slot that was never published.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Slot {
    /// `position + 1` once `position` is published here.
    pub seq: AtomicU64,
    /// The message; meaningful only under a matching `seq`.
    pub body: [AtomicU64; BODY_WORDS],
}

#[cfg(not(loom))]
const _: () = {
    assert!(size_of::<Slot>() == SLOT_BYTES);
    assert!(align_of::<Slot>() == SLOT_BYTES);
    assert!(core::mem::offset_of!(Slot, seq) == 0);
    assert!(core::mem::offset_of!(Slot, body) == 8);
};

impl Slot {
    /// A slot that was never published.
    #[must_use]
    pub fn empty() -> Self {
        Self {
            seq: AtomicU64::new(0),
            body: core::array::from_fn(|_| AtomicU64::new(0)),
        }
    }

    /// Copies `body` in and publishes it as `position`. Only the owner of `position` may call this.
    #[inline]
    pub(super) fn publish(&self, position: u64, body: &Body) {
        for (word, value) in self.body.iter().zip(body).take(COPIED_WORDS) {
            word.store(*value, Ordering::Relaxed);
        }
        self.seq.store(position + 1, Ordering::Release); // SYNC: ring-publish
    }

    /// Copies the body out. The caller has seen the sequence value and made its acquire fence.
    #[inline]
    pub(super) fn read(&self) -> Body {
        let mut body = [0; BODY_WORDS];
        for (value, word) in body.iter_mut().zip(&self.body).take(COPIED_WORDS) {
            *value = word.load(Ordering::Relaxed);
        }
        body
    }
}
