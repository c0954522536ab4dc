//! The pool's bookkeeping: which extent serves which page size, which page is free.
//!
//! An extent serves one page size from its first page to its last, so there is no fragmentation
//! between sizes; when its last page is freed it goes back to its store and may serve any
//! size. A class fills one extent, lowest page first, before it opens another: pages allocated one
//! after the other lie side by side, which lets a copy of many blocks become few transfers.
//!
//! A pool that is cut by memory nodes has a store of extents for each part, and a class fills one
//! of each part at a time. Who is near a part gets its pages as long as it has some.
//!
//! Every operation takes constant time but for opening an extent (its bitmap is made then, one bit
//! per page, and dropped when the extent empties): the bookkeeping of a large pool grows with use.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use super::extent::{Extent, Place};
use super::nodes::NodePart;
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
    /// It lies in another part than the one asked for, where none was free.
    pub is_far: bool,
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
    /// Where it allocates, in each part.
    open: Vec<OpenExtents>,
    extents: u32,
    draining: u32,
    used: u64,
    /// Free pages in extents that are not draining.
    free: u64,
    /// Free pages in draining extents.
    free_draining: u64,
}

/// A class's extents with free pages, in one part of the pool.
#[derive(Clone, Default)]
struct OpenExtents {
    current: Option<ExtentId>,
    partial: Vec<ExtentId>,
}

/// Extents that serve no page size, of one part of the pool.
struct Store {
    /// The memory node that it is near to; `None` where the pool is not cut.
    node: Option<u32>,
    first: ExtentId,
    /// By their place behind the first.
    free: Slots,
}

/// The allocator of page addresses.
pub struct Pool {
    pool_bytes: u64,
    extent_bytes: u64,
    extents: Vec<Option<Box<Extent>>>,
    /// In the order of their extents.
    stores: Vec<Store>,
    /// By class index; a class without extents is vacant and its index is used again.
    classes: Vec<Class>,
    class_of_page: BTreeMap<u32, u32>,
    /// The class of the last allocation: saves the look-up in a run of equal ones.
    last: u32,
}

impl Pool {
    /// An empty pool that is not cut.
    pub fn new(pool_bytes: u64, extent_bytes: u64) -> Result<Self, PoolError> {
        Self::with_parts(pool_bytes, extent_bytes, |_| Vec::new())
    }

    /// An empty pool; `cut` is told the number of its extents and says which of them are near which
    /// memory node: all, in order, or none for a pool that is not cut.
    pub fn with_parts(
        pool_bytes: u64,
        extent_bytes: u64,
        cut: impl FnOnce(u32) -> Vec<NodePart>,
    ) -> Result<Self, PoolError> {
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
            stores: stores(&cut(extents), extents),
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

    /// Allocates a page of at least `page_bytes`, near a memory node if one is named and the pool
    /// is cut; `None` when no page of that size is free and no extent either, or when
    /// [`check_page`](Self::check_page) refuses the size.
    pub fn alloc(&mut self, page_bytes: u32, near: Option<u32>) -> Option<Allocation> {
        let page_bytes = self.check_page(u64::from(page_bytes)).ok()?;
        let near = near.and_then(|node| self.stores.iter().position(|s| s.node == Some(node)));
        let (part, extent, opened) = match near {
            Some(part) => self
                .open_in(part, page_bytes)
                .or_else(|| self.open_anywhere(page_bytes))?,
            None => self.open_anywhere(page_bytes)?,
        };
        let slot = self.take_slot(extent, None)?;
        let addr = u64::from(extent) * self.extent_bytes + u64::from(slot) * u64::from(page_bytes);
        Some(Allocation {
            addr: PageAddr::from_offset(addr),
            opened: opened.then_some(extent),
            is_far: near.is_some_and(|near| near != part),
        })
    }

    /// The extent of a part from which pages of this size come, and whether it was opened for them.
    fn open_in(&mut self, part: usize, page_bytes: u32) -> Option<(usize, ExtentId, bool)> {
        if let Some(class) = self.class(page_bytes)
            && let Some(extent) = self.current_of(class, part)
        {
            self.last = class;
            return Some((part, extent, false));
        }
        let store = &mut self.stores[part];
        let extent = store.first + store.free.take_lowest()?;
        let class = self.open(extent, page_bytes);
        self.set_place(extent, Place::Current);
        self.classes[class as usize].open[part].current = Some(extent);
        self.last = class;
        Some((part, extent, true))
    }

    /// As [`Self::open_in`] for the part that serves the size already, else the one with most free
    /// extents.
    fn open_anywhere(&mut self, page_bytes: u32) -> Option<(usize, ExtentId, bool)> {
        let parts = 0..self.stores.len();
        let class = self.class(page_bytes);
        let serving = class.and_then(|class| {
            let open = &self.classes[class as usize].open;
            let has_free = |open: &OpenExtents| open.current.is_some() || !open.partial.is_empty();
            open.iter().position(has_free)
        });
        let part = serving.or_else(|| {
            // The first of several that have as many.
            parts
                .rev()
                .max_by_key(|part| self.stores[*part].free.free())
        });
        self.open_in(part?, page_bytes)
    }

    /// The part in which an extent lies.
    fn part_of(&self, extent: ExtentId) -> usize {
        self.stores.partition_point(|store| store.first <= extent) - 1
    }

    fn store_of(&mut self, extent: ExtentId) -> (&mut Slots, u32) {
        let part = self.part_of(extent);
        let store = &mut self.stores[part];
        (&mut store.free, extent - store.first)
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
                let (store, place) = self.store_of(extent);
                store.take(place);
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
        in_class + u64::from(self.free_extents()) * (self.extent_bytes / u64::from(page_bytes))
    }

    /// Extents that serve no page size at present.
    pub fn free_extents(&self) -> u32 {
        self.stores.iter().map(|store| store.free.free()).sum()
    }

    /// Bytes in free pages and in free extents.
    pub fn free_bytes(&self) -> u64 {
        let in_classes: u64 = self
            .classes
            .iter()
            .map(|class| (class.free + class.free_draining) * u64::from(class.page_bytes))
            .sum();
        in_classes + u64::from(self.free_extents()) * self.extent_bytes
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
            extents: self.extents.len() as u32,
            extents_free: self.free_extents(),
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

    /// The extent of a part from which the class allocates; a partial one takes the place of a full
    /// one.
    fn current_of(&mut self, class: u32, part: usize) -> Option<ExtentId> {
        let open = &mut self.classes[class as usize].open[part];
        if open.current.is_none() {
            let extent = open.partial.pop()?;
            open.current = Some(extent);
            self.set_place(extent, Place::Current);
            return Some(extent);
        }
        open.current
    }

    /// Gives an extent of its store, taken already, to the class of `page_bytes`.
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
            open: vec![OpenExtents::default(); self.stores.len()],
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

    /// Returns an empty extent to its store.
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
        let (store, place) = self.store_of(extent);
        store.put(place);
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
        let part = self.part_of(id);
        let Some(extent) = self.extents[id as usize].as_mut() else {
            return;
        };
        let partial = &mut self.classes[extent.class as usize].open[part].partial;
        extent.place = Place::Partial(partial.len() as u32);
        partial.push(id);
    }

    /// Takes an extent out of its class's lists; its place is stale until set anew.
    fn unlist(&mut self, id: ExtentId) {
        let part = self.part_of(id);
        let Some(extent) = self.extents[id as usize].as_ref() else {
            return;
        };
        let open = &mut self.classes[extent.class as usize].open[part];
        match extent.place {
            Place::Current => open.current = None,
            Place::Partial(at) => {
                open.partial.swap_remove(at as usize);
                if let Some(&moved) = open.partial.get(at as usize) {
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

/// One store for each part, or one for all.
fn stores(parts: &[NodePart], extents: u32) -> Vec<Store> {
    let store = |part: &NodePart| Store {
        node: Some(part.node),
        first: part.extents.start,
        free: Slots::new(part.extents.len() as u32),
    };
    if parts.is_empty() {
        return vec![Store {
            node: None,
            first: 0,
            free: Slots::new(extents),
        }];
    }
    let end = parts.iter().fold(0, |end, part| {
        assert!(
            part.extents.start == end && !part.extents.is_empty(),
            "{parts:?} are not all extents in order"
        );
        part.extents.end
    });
    assert_eq!(end, extents, "{parts:?} are not all extents");
    parts.iter().map(store).collect()
}
