//! A device's worker over the fake driver, turned by hand.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use pegaflow_shm::control::{GroupLayout, MemoryRef, SegmentLayout};

use super::fake::{FakeDriver, uuid};
use crate::copy::*;
use crate::device::PinMode;
use crate::device::card::{Card, DeviceNews, Workplace};
use crate::device::error::DriverError;
use crate::device::flights::Flights;
use crate::device::pin::Pinning;
use crate::device::worker::{Wait, Worker};
use crate::device::{AfterEvent, DeviceEvents, DeviceOptions, DeviceRegion, Devices, ShareHandle};
use crate::layout::ValidLayout;

pub const POOL_BYTES: usize = 8 << 20;

pub struct Rig {
    pub driver: FakeDriver,
    pub devices: Devices,
    pub place: Arc<Workplace>,
    pub worker: Option<Worker>,
    pool: Arc<Vec<u64>>,
}

/// Memory of an engine: its handle in the daemon, and its bytes.
pub struct Engine {
    pub region: Arc<DeviceRegion>,
    pub at: *mut u8,
    pub bytes: usize,
}

impl Engine {
    pub fn read(&self) -> Vec<u8> {
        // SAFETY: the fake driver keeps the allocation as long as the test's driver lives.
        unsafe { std::slice::from_raw_parts(self.at, self.bytes) }.to_vec()
    }

    pub fn write(&self, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.bytes);
        // SAFETY: as above; no copy runs unless the worker is turned.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at, bytes.len()) };
    }
}

impl Rig {
    /// A device whose worker was made; the pool is pinned if `pinned` says so.
    pub fn new(options: DeviceOptions, pinned: bool) -> Rig {
        Rig::with_ranges(options, pinned, 1 << 20)
    }

    /// The same, with ranges of so many bytes in which the pool is pinned.
    pub fn with_ranges(options: DeviceOptions, pinned: bool, range_bytes: u64) -> Rig {
        let driver = FakeDriver::default();
        let devices = Devices::with_driver(Arc::new(driver.clone()), options);
        let pool = Arc::new(vec![0u64; POOL_BYTES / 8]);
        let base = std::ptr::NonNull::new(pool.as_ptr() as *mut u8).unwrap();
        // SAFETY: the vector is kept by the handle; tests read it only between turns.
        let memory = unsafe { PoolMemory::new(base, POOL_BYTES as u64, pool.clone()) };
        let pins = Pinning::new(memory.clone(), range_bytes, PinMode::Off);
        (0..pins.map().ranges()).for_each(|number| pins.map().set(number, pinned));
        let place = Arc::new(Workplace {
            pool: memory,
            pins,
            results: Arc::new(Results::new(Arc::new(|| ()))),
            flights: Flights::new(1),
        });
        let mut rig = Rig {
            driver,
            devices,
            place,
            worker: None,
            pool,
        };
        rig.engine(64);
        rig.make_worker();
        rig
    }

    pub fn card(&self) -> &Arc<Card> {
        &self.devices.cards()[0]
    }

    /// A worker in the context that is open, or in a new one.
    pub fn make_worker(&mut self) {
        let opened = self.card().opened_for_tests();
        let worker = Worker::new(
            self.card().clone(),
            self.place.clone(),
            opened,
            Instant::now(),
        );
        self.worker = Some(worker.unwrap());
    }

    pub fn engine(&self, bytes: usize) -> Engine {
        let (handle, at) = self.driver.export(bytes);
        let region = self
            .devices
            .import(uuid(), bytes as u64, ShareHandle::Ipc(handle));
        let region = region.unwrap();
        Engine { region, at, bytes }
    }

    pub fn events(&self, handles: &[[u8; 64]]) -> Arc<DeviceEvents> {
        self.devices.import_events(uuid(), handles).unwrap()
    }

    pub fn pool_bytes(&self) -> Vec<u8> {
        bytemuck::cast_slice(&self.pool).to_vec()
    }

    pub fn submit(&self, task: CopyTask) {
        self.card().inbox().push(task);
    }

    pub fn turn(&mut self) -> Result<Wait, DriverError> {
        self.worker.as_mut().unwrap().turn(Instant::now())
    }

    pub fn turn_many(&mut self, turns: usize) {
        for _ in 0..turns {
            self.turn().unwrap();
        }
    }

    pub fn done(&self) -> Vec<CopyDone> {
        std::iter::from_fn(|| self.place.results.pop()).collect()
    }

    /// Turns until `count` tasks have come back.
    pub fn finish(&mut self, count: usize) -> Vec<CopyDone> {
        let mut done = Vec::new();
        for _ in 0..1_000_000 {
            done.extend(self.done());
            if done.len() >= count {
                return done;
            }
            self.turn().unwrap();
        }
        panic!("{} of {count} tasks came back", done.len());
    }

    pub fn news(&self) -> Vec<DeviceNews> {
        let Some(mut news) = self.devices.take_news() else {
            return Vec::new();
        };
        std::iter::from_fn(|| news.try_recv().ok()).collect()
    }
}

/// A layout of segments (base, stride, bytes) in an engine's memory.
pub fn bind(engine: &Engine, num_blocks: u32, segments: &[(u64, u64, u64)]) -> Arc<BoundLayout> {
    let segments = segments
        .iter()
        .map(|&(base, block_stride, bytes)| SegmentLayout {
            memory: MemoryRef::Region(0),
            base,
            block_stride,
            bytes,
        });
    let layout = GroupLayout {
        group: 0,
        num_blocks,
        segments: segments.collect(),
        replicated: false,
    };
    let valid = ValidLayout::new(&layout, |_| Some(engine.region.bytes())).unwrap();
    let resolve = |_| Some(ClientMemory::Device(engine.region.clone()));
    BoundLayout::bind(Arc::new(valid), resolve).unwrap()
}

pub fn task(
    session: u64,
    direction: Direction,
    target: &Arc<BoundLayout>,
    pages: &[(u64, u32)],
) -> CopyTask {
    let page = |&(pool_offset, block)| PageCopy {
        pool_offset,
        block,
        checksum: NO_CHECKSUM,
    };
    CopyTask {
        session,
        direction,
        target: target.clone(),
        pages: pages.iter().map(page).collect(),
        tag: session,
        cancelled: Arc::new(AtomicBool::new(false)),
        after: None,
        step: None,
    }
}

pub fn after(events: &Arc<DeviceEvents>, index: u32) -> Option<AfterEvent> {
    let events = events.clone();
    Some(AfterEvent { events, index })
}

/// Bytes that differ from place to place and from seed to seed.
pub fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..bytes).map(|_| next()).collect()
}
