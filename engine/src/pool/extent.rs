//! One extent in use: equal pages, each free or allocated.

#![forbid(unsafe_code)]

use super::slots::Slots;

/// Where the allocator keeps an extent that is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Its class allocates from it now.
    Current,
    /// In its class's list of extents with free pages, at this position.
    Partial(u32),
    /// No page is free.
    Full,
    /// Being emptied: nothing is allocated from it.
    Draining,
}

/// An extent that serves one page size.
pub(super) struct Extent {
    /// The index of its class.
    pub(super) class: u32,
    pub(super) page_bytes: u32,
    pub(super) place: Place,
    pub(super) slots: Slots,
}

impl Extent {
    pub(super) fn new(class: u32, page_bytes: u32, extent_bytes: u64) -> Self {
        let slots = Slots::new((extent_bytes / u64::from(page_bytes)) as u32);
        Self {
            class,
            page_bytes,
            place: Place::Full,
            slots,
        }
    }

    /// The slot whose page begins `within` bytes into the extent.
    pub(super) fn slot_at(&self, within: u64) -> Option<u32> {
        let page_bytes = u64::from(self.page_bytes);
        let slot = within / page_bytes;
        (within.is_multiple_of(page_bytes) && slot < u64::from(self.slots.count()))
            .then_some(slot as u32)
    }
}
