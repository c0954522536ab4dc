//! The pool's bookkeeping: which extent serves which page size, which page is free.
//!
//! An extent serves one page size from its first page to its last, so there is no fragmentation
//! between sizes; when its last page is freed it goes back to the common store and may serve any
//! size. A class fills one extent, lowest page first, before it opens another: pages allocated one
//! after the other lie side by side, which lets a copy of many blocks become few transfers.
//!
//! Every operation takes constant time but for opening an extent (its bitmap is made then, one bit
//! per page, and dropped when the extent empties): the bookkeeping of a large pool grows with use.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use super::extent::{Extent, Place};
use super::slots::Slots;
use super::{
    ClassStats, EXTENT_GRANULE_BYTES, ExtentId, MAX_EXTENT_BYTES, MIN_PAGE_BYTES, PAGE_ALIGN_BYTES,
    PageAddr, PoolError, PoolStats,
};

/// The size at which a page of `bytes` is stored: a multiple of 64 bytes, at least 512.
pub fn round_page(bytes: u64) -> u64 {
    bytes
        .max(u64::from(MIN_PAGE_BYTES))
        .next_multiple_of(u64::from(PAGE_ALIGN_BYTES))
}

/// An allocated page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocation {
    /// Where it begins.
    pub addr: PageAddr,
    /// The extent that was opened for it, if one was: its catalog range must be prepared before the
    /// page is recorded.
    pub opened: Option<ExtentId>,
}

/// What freeing a page brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Freed {
    /// The size of the page, in bytes.
    pub page_bytes: u32,
    /// The extent that became empty and went back, if one did: its catalog range can be released.
    pub emptied: Option<ExtentId>,
}

/// The pages of one size.
struct Class {
    page_bytes: u32,
    current: Option<ExtentId>,
    partial: Vec<ExtentId>,
    extents: u32,
    draining: u32,
    used: u64,
    /// Free pages in extents that are not draining.
    free: u64,
    /// Free pages in draining extents.
    free_draining: u64,
}

/// The allocator of page addresses.
pub struct Pool {
    pool_bytes: u64,
    extent_bytes: u64,
    extents: Vec<Option<Box<Extent>>>,
    common: Slots,
    /// By class index; a class without extents is vacant and its index is used again.
    classes: Vec<Class>,
    class_of_page: BTreeMap<u32, u32>,
    /// The class of the last allocation: saves the look-up in a run of equal ones.
    last: u32,
}

impl Pool {
    /// An empty pool.
    pub fn new(pool_bytes: u64, extent_bytes: u64) -> Result<Self, PoolError> {
        if extent_bytes == 0
            || !extent_bytes.is_multiple_of(EXTENT_GRANULE_BYTES)
            || extent_bytes > MAX_EXTENT_BYTES
        {
            return Err(PoolError::ExtentSize { extent_bytes });
        }
        let refused = PoolError::PoolSize {
            pool_bytes,
            extent_bytes,
        };
        let extents = u32::try_from(pool_bytes / extent_bytes).map_err(|_| refused.clone())?;
        if extents == 0 || !pool_bytes.is_multiple_of(extent_bytes) {
            return Err(refused);
        }
        Ok(Self {
            pool_bytes,
            extent_bytes,
            extents: std::iter::repeat_with(|| None)
                .take(extents as usize)
                .collect(),
            common: Slots::new(extents),
            classes: Vec::new(),
            class_of_page: BTreeMap::new(),
            last: 0,
        })
    }

    /// The pool's size, in bytes.
    pub fn pool_bytes(&self) -> u64 {
        self.pool_bytes
    }

    /// The size of an extent, in bytes.
    pub fn extent_bytes(&self) -> u64 {
        self.extent_bytes
    }

    /// The size at which pages of `bytes` are stored, or why they cannot be.
    pub fn check_page(&self, bytes: u64) -> Result<u32, PoolError> {
        if bytes == 0 {
            return Err(PoolError::PageEmpty);
        }
        if bytes > self.extent_bytes || round_page(bytes) > self.extent_bytes {
            let extent_bytes = self.extent_bytes;
            return Err(PoolError::PageTooLarge {
                page_bytes: bytes,
                extent_bytes,
            });
        }
        Ok(round_page(bytes) as u32)
    }

    /// Allocates a page of at least `page_bytes`; `None` when no page of that size is free and no
    /// extent either, or when [`check_page`](Self::check_page) refuses the size.
    pub fn alloc(&mut self, page_bytes: u32) -> Option<Allocation> {
        let page_bytes = self.check_page(u64::from(page_bytes)).ok()?;
        let (class, opened) = match self.class(page_bytes) {
            Some(class) if self.current_of(class).is_some() => (class, None),
            _ => {
                let extent = self.common.take_lowest()?;
                let class = self.open(extent, page_bytes);
                self.set_place(extent, Place::Current);
                self.classes[class as usize].current = Some(extent);
                (class, Some(extent))
            }
        };
        self.last = class;
        let extent = self.classes[class as usize].current?;
        let slot = self.take_slot(extent, None)?;
        let addr = u64::from(extent) * self.extent_bytes + u64::from(slot) * u64::from(page_bytes);
        Some(Allocation {
            addr: PageAddr::from_offset(addr),
            opened,
        })
    }

    /// Marks one page as allocated: how the pages of a previous daemon are taken over.
    pub fn claim(&mut self, addr: PageAddr, page_bytes: u32) -> Result<(), PoolError> {
        if self.check_page(u64::from(page_bytes))? != page_bytes {
            return Err(PoolError::NotAPage {
                addr,
                page_bytes: round_page(page_bytes.into()) as u32,
            });
        }
        let extent = self.extent_of(addr)?;
        let within = addr.offset() % self.extent_bytes;
        let in_extent = self.extent_bytes / u64::from(page_bytes);
        if !within.is_multiple_of(page_bytes.into()) || within / u64::from(page_bytes) >= in_extent
        {
            return Err(PoolError::NotAPage { addr, page_bytes });
        }
        match &self.extents[extent as usize] {
            Some(open) if open.page_bytes != page_bytes => {
                let wanted_bytes = page_bytes;
                return Err(PoolError::OtherClass {
                    extent,
                    page_bytes: open.page_bytes,
                    wanted_bytes,
                });
            }
            Some(_) => {}
            None => {
                self.common.take(extent);
                self.open(extent, page_bytes);
                self.list_partial(extent);
            }
        }
        let slot = (within / u64::from(page_bytes)) as u32;
        self.take_slot(extent, Some(slot))
            .ok_or(PoolError::AlreadyAllocated { addr })?;
        Ok(())
    }

    /// Frees a page.
    pub fn free(&mut self, addr: PageAddr) -> Result<Freed, PoolError> {
        let (id, slot) = self.locate(addr)?;
        let not_allocated = PoolError::NotAllocated { addr };
        let extent = self.extents[id as usize]
            .as_mut()
            .ok_or(not_allocated.clone())?;
        if !extent.slots.put(slot) {
            return Err(not_allocated);
        }
        let page_bytes = extent.page_bytes;
        let empty = extent.slots.taken() == 0;
        let place = extent.place;
        let class = &mut self.classes[extent.class as usize];
        class.used -= 1;
        if place == Place::Draining {
            class.free_draining += 1;
        } else {
            class.free += 1;
        }
        if empty {
            self.close(id);
        } else if place == Place::Full {
            self.list_partial(id);
        }
        Ok(Freed {
            page_bytes,
            emptied: empty.then_some(id),
        })
    }

    /// Stops allocation from an extent, so that it empties as its pages are freed.
    pub fn drain(&mut self, extent: ExtentId) -> Result<(), PoolError> {
        let place = self.in_use(extent)?.place;
        if place != Place::Draining {
            self.unlist(extent);
            self.set_place(extent, Place::Draining);
            let free = u64::from(self.in_use(extent)?.slots.free());
            let class = self.class_of_extent(extent)?;
            class.draining += 1;
            class.free -= free;
            class.free_draining += free;
        }
        Ok(())
    }

    /// Takes back [`drain`](Self::drain).
    pub fn undrain(&mut self, extent: ExtentId) -> Result<(), PoolError> {
        let open = self.in_use(extent)?;
        if open.place == Place::Draining {
            let free = u64::from(open.slots.free());
            let class = self.class_of_extent(extent)?;
            class.draining -= 1;
            class.free += free;
            class.free_draining -= free;
            self.set_place(extent, Place::Full);
            if free > 0 {
                self.list_partial(extent);
            }
        }
        Ok(())
    }

    /// The extent in which an address lies.
    pub fn extent_of(&self, addr: PageAddr) -> Result<ExtentId, PoolError> {
        if addr.offset() >= self.pool_bytes {
            return Err(PoolError::OutsidePool {
                addr,
                pool_bytes: self.pool_bytes,
            });
        }
        Ok((addr.offset() / self.extent_bytes) as ExtentId)
    }

    /// The size of an allocated page, in bytes.
    pub fn page_bytes_of(&self, addr: PageAddr) -> Result<u32, PoolError> {
        let (extent, slot) = self.locate(addr)?;
        let open = self.in_use(extent)?;
        if open.slots.is_free(slot) {
            return Err(PoolError::NotAllocated { addr });
        }
        Ok(open.page_bytes)
    }

    /// The page size that an extent serves, in bytes; `None` when it serves none.
    pub fn page_bytes_of_extent(&self, extent: ExtentId) -> Option<u32> {
        self.in_use(extent).ok().map(|open| open.page_bytes)
    }

    /// The allocated pages of an extent, lowest first; none when it is not in use.
    pub fn live_pages(&self, extent: ExtentId) -> impl Iterator<Item = PageAddr> + '_ {
        let base = u64::from(extent) * self.extent_bytes;
        let open = self.in_use(extent).ok();
        open.into_iter().flat_map(move |open| {
            let page_bytes = u64::from(open.page_bytes);
            let slots = open.slots.iter_taken();
            slots.map(move |slot| PageAddr::from_offset(base + u64::from(slot) * page_bytes))
        })
    }

    /// How many pages of this size can be allocated without freeing any.
    pub fn available(&self, page_bytes: u32) -> u64 {
        let Ok(page_bytes) = self.check_page(u64::from(page_bytes)) else {
            return 0;
        };
        let in_class = self
            .class(page_bytes)
            .map_or(0, |class| self.classes[class as usize].free);
        in_class + u64::from(self.common.free()) * (self.extent_bytes / u64::from(page_bytes))
    }

    /// Extents that serve no page size at present.
    pub fn free_extents(&self) -> u32 {
        self.common.free()
    }

    /// Bytes in free pages and in free extents.
    pub fn free_bytes(&self) -> u64 {
        let in_classes: u64 = self
            .classes
            .iter()
            .map(|class| (class.free + class.free_draining) * u64::from(class.page_bytes))
            .sum();
        in_classes + u64::from(self.common.free()) * self.extent_bytes
    }

    /// All figures at this moment.
    pub fn stats(&self) -> PoolStats {
        let classes: Vec<ClassStats> = self
            .class_of_page
            .values()
            .map(|class| {
                let class = &self.classes[*class as usize];
                let pages_free = class.free + class.free_draining;
                ClassStats {
                    page_bytes: class.page_bytes,
                    extents: class.extents,
                    extents_draining: class.draining,
                    pages_used: class.used,
                    pages_free,
                    used_bytes: class.used * u64::from(class.page_bytes),
                    free_bytes: pages_free * u64::from(class.page_bytes),
                }
            })
            .collect();
        let used_bytes = classes.iter().map(|class| class.used_bytes).sum();
        let free_bytes = self.free_bytes();
        PoolStats {
            pool_bytes: self.pool_bytes,
            extent_bytes: self.extent_bytes,
            extents: self.common.count(),
            extents_free: self.common.free(),
            used_bytes,
            free_bytes,
            unusable_bytes: self.pool_bytes - used_bytes - free_bytes,
            classes,
        }
    }

    fn class(&self, page_bytes: u32) -> Option<u32> {
        match self.classes.get(self.last as usize) {
            Some(class) if class.page_bytes == page_bytes && class.extents > 0 => Some(self.last),
            _ => self.class_of_page.get(&page_bytes).copied(),
        }
    }

    /// The extent from which the class allocates; a partial one takes the place of a full one.
    fn current_of(&mut self, class: u32) -> Option<ExtentId> {
        let class = &mut self.classes[class as usize];
        if class.current.is_none() {
            let extent = class.partial.pop()?;
            class.current = Some(extent);
            self.set_place(extent, Place::Current);
            return Some(extent);
        }
        class.current
    }

    /// Gives an extent of the common store, taken already, to the class of `page_bytes`.
    fn open(&mut self, extent: ExtentId, page_bytes: u32) -> u32 {
        let class = match self.class_of_page.get(&page_bytes) {
            Some(class) => *class,
            None => self.add_class(page_bytes),
        };
        let open = Extent::new(class, page_bytes, self.extent_bytes);
        self.classes[class as usize].extents += 1;
        self.classes[class as usize].free += u64::from(open.slots.count());
        self.extents[extent as usize] = Some(Box::new(open));
        class
    }

    fn add_class(&mut self, page_bytes: u32) -> u32 {
        let class = Class {
            page_bytes,
            current: None,
            partial: Vec::new(),
            extents: 0,
            draining: 0,
            used: 0,
            free: 0,
            free_draining: 0,
        };
        let vacant = self.classes.iter().position(|class| class.extents == 0);
        let index = vacant.unwrap_or(self.classes.len());
        if vacant.is_some() {
            self.classes[index] = class;
        } else {
            self.classes.push(class);
        }
        self.class_of_page.insert(page_bytes, index as u32);
        index as u32
    }

    /// Returns an empty extent to the common store.
    fn close(&mut self, extent: ExtentId) {
        self.unlist(extent);
        let Some(open) = self.extents[extent as usize].take() else {
            return;
        };
        let class = &mut self.classes[open.class as usize];
        class.extents -= 1;
        let pages = u64::from(open.slots.count());
        if open.place == Place::Draining {
            class.draining -= 1;
            class.free_draining -= pages;
        } else {
            class.free -= pages;
        }
        if class.extents == 0 {
            self.class_of_page.remove(&open.page_bytes);
        }
        self.common.put(extent);
    }

    /// Takes a slot of an open extent, the lowest or a given one.
    fn take_slot(&mut self, id: ExtentId, slot: Option<u32>) -> Option<u32> {
        let extent = self.extents[id as usize].as_mut()?;
        let taken = match slot {
            Some(slot) => extent.slots.take(slot).then_some(slot)?,
            None => extent.slots.take_lowest()?,
        };
        let (full, place) = (extent.slots.free() == 0, extent.place);
        let class = &mut self.classes[extent.class as usize];
        class.used += 1;
        if place == Place::Draining {
            class.free_draining -= 1;
        } else {
            class.free -= 1;
            if full {
                self.unlist(id);
                self.set_place(id, Place::Full);
            }
        }
        Some(taken)
    }

    fn list_partial(&mut self, id: ExtentId) {
        let Some(extent) = self.extents[id as usize].as_mut() else {
            return;
        };
        let partial = &mut self.classes[extent.class as usize].partial;
        extent.place = Place::Partial(partial.len() as u32);
        partial.push(id);
    }

    /// Takes an extent out of its class's lists; its place is stale until set anew.
    fn unlist(&mut self, id: ExtentId) {
        let Some(extent) = self.extents[id as usize].as_ref() else {
            return;
        };
        let class = &mut self.classes[extent.class as usize];
        match extent.place {
            Place::Current => class.current = None,
            Place::Partial(at) => {
                class.partial.swap_remove(at as usize);
                if let Some(&moved) = class.partial.get(at as usize) {
                    self.set_place(moved, Place::Partial(at));
                }
            }
            Place::Full | Place::Draining => {}
        }
    }

    fn set_place(&mut self, id: ExtentId, place: Place) {
        if let Some(extent) = self.extent_mut(id) {
            extent.place = place;
        }
    }

    fn extent_mut(&mut self, id: ExtentId) -> Option<&mut Extent> {
        self.extents[id as usize].as_deref_mut()
    }

    fn in_use(&self, extent: ExtentId) -> Result<&Extent, PoolError> {
        let open = self.extents.get(extent as usize).and_then(Option::as_deref);
        open.ok_or(PoolError::ExtentNotInUse { extent })
    }

    fn class_of_extent(&mut self, extent: ExtentId) -> Result<&mut Class, PoolError> {
        let class = self.in_use(extent)?.class;
        Ok(&mut self.classes[class as usize])
    }

    /// The extent and slot of an address that must be where a page begins.
    fn locate(&self, addr: PageAddr) -> Result<(ExtentId, u32), PoolError> {
        let extent = self.extent_of(addr)?;
        let Ok(open) = self.in_use(extent) else {
            return Err(PoolError::NotAllocated { addr });
        };
        let slot = open.slot_at(addr.offset() % self.extent_bytes);
        let slot = slot.ok_or(PoolError::NotAPage {
            addr,
            page_bytes: open.page_bytes,
        })?;
        Ok((extent, slot))
    }
}
