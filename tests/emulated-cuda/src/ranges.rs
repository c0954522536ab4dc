//! Addresses of one process and what lies there: device memory of every kind, and host memory that
//! was registered or allocated through the driver.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::code::{Code, Outcome};
use crate::mapping::{Mapping, Place};
use crate::storage::Object;

/// Device addresses of one process; nothing is ever mapped there.
const WINDOW_BYTES: usize = 1 << 42;
/// Allocations begin at multiples of this, and the same lies unused behind each.
const GRAIN: u64 = 2 << 20;

/// How device memory came to its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Allocated here.
    Own,
    /// Opened from an IPC handle, so many times.
    Imported(u32),
    /// Mapped into reserved addresses.
    Mapped {
        /// `cuMemSetAccess` was called.
        accessible: bool,
    },
}

/// One piece of device memory.
pub struct Range {
    /// Length.
    pub bytes: u64,
    /// What backs it, from its start.
    pub object: Arc<Object>,
    /// The context in which it was allocated, opened or mapped.
    pub context: u64,
    /// How it came there.
    pub origin: Origin,
    /// Differs for every allocation of the process.
    pub buffer_id: u64,
}

/// Host memory that the driver knows.
pub struct HostRange {
    /// Length.
    pub bytes: u64,
    /// Allocated by the driver; otherwise registered.
    pub allocated: Option<Arc<Mapping>>,
    /// Places in use hold a clone.
    pub user: Arc<()>,
}

/// Bytes that an operation reads or writes.
pub struct Resolved {
    /// The bytes in order.
    pub places: Vec<Place>,
    /// The device on which they lie; none for host memory.
    pub device: Option<usize>,
    /// Device memory, or host memory that the driver knows.
    pub pinned: bool,
}

/// All addresses of the process.
pub struct Ranges {
    window: Mapping,
    next: u64,
    /// Device memory by address.
    pub device: BTreeMap<u64, Range>,
    /// Reserved addresses with their lengths.
    pub reserved: BTreeMap<u64, u64>,
    /// Host memory by address.
    pub host: BTreeMap<u64, HostRange>,
}

impl Ranges {
    /// Nothing yet.
    pub fn new() -> std::io::Result<Ranges> {
        let window = Mapping::reserved(WINDOW_BYTES)?;
        let next = (window.address() as u64 + GRAIN).next_multiple_of(GRAIN);
        Ok(Ranges {
            window,
            next,
            device: BTreeMap::new(),
            reserved: BTreeMap::new(),
            host: BTreeMap::new(),
        })
    }

    /// True for a device address, whether anything lies there or not.
    pub fn is_device(&self, address: u64) -> bool {
        let start = self.window.address() as u64;
        (start..start + WINDOW_BYTES as u64).contains(&address)
    }

    /// Addresses for `bytes` bytes that no other memory has or will have.
    pub fn take_addresses(&mut self, bytes: u64, alignment: u64) -> Outcome<u64> {
        let start = self.next.next_multiple_of(alignment.max(GRAIN));
        let end = start.checked_add(bytes).ok_or(Code::INVALID_VALUE)?;
        if !self.is_device(end) {
            return Err(Code::OUT_OF_MEMORY);
        }
        self.next = end.next_multiple_of(GRAIN) + GRAIN;
        Ok(start)
    }

    /// The device memory that contains an address, and where it begins.
    pub fn find(&self, address: u64) -> Option<(u64, &Range)> {
        let (start, range) = self.device.range(..=address).next_back()?;
        (address - start < range.bytes).then_some((*start, range))
    }

    /// The host memory that contains an address, and where it begins.
    pub fn find_host(&self, address: u64) -> Option<(u64, &HostRange)> {
        let (start, range) = self.host.range(..=address).next_back()?;
        (address - start < range.bytes).then_some((*start, range))
    }

    /// True if any host memory that the driver knows overlaps.
    pub fn overlaps_host(&self, address: u64, bytes: u64) -> bool {
        let before = self.host.range(..address + bytes).next_back();
        before.is_some_and(|(start, range)| start + range.bytes > address)
    }

    /// The bytes of a range. Device ranges must lie in one allocation, or in neighbours that were
    /// mapped with access; host ranges in one registration, or in memory that the driver does not
    /// know at all.
    pub fn resolve(&self, address: u64, bytes: u64) -> Outcome<Resolved> {
        if self.is_device(address) {
            return self.resolve_device(address, bytes);
        }
        let end = address.checked_add(bytes).ok_or(Code::INVALID_VALUE)?;
        let nobody = Arc::new(());
        let (pinned, user) = match self.find_host(address) {
            Some((start, range)) if end <= start + range.bytes => (true, &range.user),
            None if !self.overlaps_host(address, bytes) && address >= GRAIN => (false, &nobody),
            _ => return Err(Code::INVALID_VALUE),
        };
        Ok(Resolved {
            places: vec![Place::in_host(address as usize, bytes as usize, user)],
            device: None,
            pinned,
        })
    }

    fn resolve_device(&self, mut address: u64, bytes: u64) -> Outcome<Resolved> {
        let mut left = bytes;
        let mut places = Vec::with_capacity(1);
        let mut device = None;
        loop {
            let (start, range) = self.find(address).ok_or(Code::INVALID_VALUE)?;
            let within = address - start;
            let here = left.min(range.bytes - within);
            let mapped = match range.origin {
                Origin::Mapped { accessible: false } => return Err(Code::INVALID_VALUE),
                Origin::Mapped { accessible: true } => true,
                Origin::Own | Origin::Imported(_) => false,
            };
            if here < left && !mapped {
                return Err(Code::INVALID_VALUE);
            }
            let object = &range.object;
            let place = Place::in_mapping(
                &object.mapping,
                within as usize,
                here as usize,
                &object.user,
            );
            places.push(place.ok_or(Code::INVALID_VALUE)?);
            if *device.get_or_insert(object.name.device) != object.name.device {
                return Err(Code::INVALID_VALUE);
            }
            left -= here;
            address += here;
            if left == 0 {
                return Ok(Resolved {
                    places,
                    device,
                    pinned: true,
                });
            }
        }
    }
}
