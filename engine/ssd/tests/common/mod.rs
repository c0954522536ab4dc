//! A tier over real files, driven as the lane drives it.
#![allow(dead_code, reason = "each test program uses some of it")]

use std::cell::UnsafeCell;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use pegaflow_ssd::{
    BlockKey, Completion, IoChoice, NO_CHECKSUM, OpenError, OpenReport, Options, Outcome, PageRef,
    PoolMemory, Refused, ShardSpec, Tier,
};

/// Long enough on any machine; only a test that fails waits for it.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Bytes that are touched through raw pointers only.
struct Bytes(Vec<UnsafeCell<u8>>);

// SAFETY: the test touches a byte only while no request names it.
unsafe impl Send for Bytes {}
// SAFETY: as above.
unsafe impl Sync for Bytes {}

/// Memory for pages.
pub struct Pool {
    bytes: Arc<Bytes>,
    shift: usize,
}

impl Pool {
    /// `bytes` bytes that begin at a page's boundary.
    pub fn new(bytes: usize) -> Self {
        let mut memory = Vec::with_capacity(bytes + 4096);
        memory.resize_with(bytes + 4096, || UnsafeCell::new(0));
        let shift = memory.as_ptr().cast::<u8>().align_offset(4096);
        Self {
            bytes: Arc::new(Bytes(memory)),
            shift,
        }
    }

    fn at(&self, offset: usize) -> *mut u8 {
        self.bytes.0[self.shift + offset].get()
    }

    pub fn memory(&self) -> PoolMemory {
        let bytes = (self.bytes.0.len() - 4096) as u64;
        let base = NonNull::new(self.at(0)).expect("not null");
        let keep_alive = Arc::<Bytes>::clone(&self.bytes);
        // SAFETY: the vector lives as long as `keep_alive`, has that many bytes, and its bytes are
        // cells; the test touches no page that a request names.
        unsafe { PoolMemory::new(base, bytes, keep_alive) }
    }

    pub fn fill(&self, page: PageRef, content: &[u8]) {
        assert_eq!(page.bytes as usize, content.len());
        let target = self.at(page.offset as usize);
        assert!(page.offset as usize + content.len() <= self.bytes.0.len() - 4096);
        // SAFETY: in the vector (checked above), and no request names the page.
        unsafe { target.copy_from_nonoverlapping(content.as_ptr(), content.len()) }
    }

    pub fn content(&self, page: PageRef) -> Vec<u8> {
        let mut content = vec![0; page.bytes as usize];
        assert!(page.offset as usize + content.len() <= self.bytes.0.len() - 4096);
        let source = self.at(page.offset as usize);
        // SAFETY: as above.
        unsafe { source.copy_to_nonoverlapping(content.as_mut_ptr(), content.len()) }
        content
    }
}

/// The bytes of a page, different for each block, version and page.
pub fn bytes_for(block: u64, version: u64, page: usize, bytes: usize) -> Vec<u8> {
    let mut state = (block + 1)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(version.wrapping_mul(0xd134_2543_de82_ef95))
        .wrapping_add(page as u64)
        | 1;
    (0..bytes)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 24) as u8
        })
        .collect()
}

pub fn key(block: u64) -> BlockKey {
    let mut hash = [0; 32];
    hash[..8].copy_from_slice(&block.to_le_bytes());
    BlockKey {
        scope: [7; 32],
        group: 0,
        hash,
    }
}

pub fn page(offset: u64, bytes: u32) -> PageRef {
    PageRef {
        offset,
        bytes,
        checksum: NO_CHECKSUM,
    }
}

pub fn options(io: IoChoice, paths: &[(&Path, u64)]) -> Options {
    let shards = paths.iter().map(|&(path, bytes)| ShardSpec {
        path: path.to_owned(),
        bytes: Some(bytes),
    });
    let mut options = Options::new("test", shards.collect());
    options.io = io;
    options.segment_bytes = 1 << 20;
    options.preallocate = false;
    options
}

/// A tier, and what wakes its owner.
pub struct Rig {
    pub tier: Tier,
    pub report: OpenReport,
    news: Receiver<()>,
}

impl Rig {
    pub fn open(options: Options, pool: &Pool) -> Result<Self, OpenError> {
        let (wake, news) = channel();
        let (tier, report) = Tier::open(options, pool.memory(), move || {
            // The owner may be gone.
            let _ = wake.send(());
        })?;
        Ok(Self { tier, report, news })
    }

    /// Waits for the next completions.
    pub fn completions(&mut self) -> Vec<Completion> {
        let end = Instant::now() + PATIENCE;
        let mut out = Vec::new();
        loop {
            let now = Instant::now();
            self.tier.poll(now, &mut out);
            if !out.is_empty() {
                return out;
            }
            assert!(now < end, "nothing ended");
            let until = self.tier.next_deadline().unwrap_or(end).min(end);
            let _ = self.news.recv_timeout(until.saturating_duration_since(now));
        }
    }

    /// Waits until everything written is durable.
    pub fn settle(&mut self) {
        let end = Instant::now() + PATIENCE;
        let mut out = Vec::new();
        loop {
            let now = Instant::now();
            self.tier.flush(now);
            self.tier.poll(now, &mut out);
            if self
                .tier
                .stats()
                .iter()
                .all(|shard| shard.uncommitted_blocks == 0)
            {
                return;
            }
            assert!(now < end, "not durable");
            let _ = self.news.recv_timeout(Duration::from_millis(1));
        }
    }

    /// Writes a block and waits for it.
    pub fn write(&mut self, ticket: u64, key: &BlockKey, pages: &[PageRef]) -> Outcome {
        let end = Instant::now() + PATIENCE;
        loop {
            match self.tier.write(Instant::now(), ticket, key, pages) {
                Ok(()) => break,
                Err(Refused::Reclaiming | Refused::QueueFull) => {
                    assert!(Instant::now() < end, "no room");
                    self.tier.poll(Instant::now(), &mut Vec::new());
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(why) => panic!("refused: {why}"),
            }
        }
        self.outcome(ticket)
    }

    /// Reads a block and waits for it.
    pub fn read(&mut self, ticket: u64, key: &BlockKey, pages: &[PageRef]) -> Outcome {
        self.tier
            .read(Instant::now(), ticket, key, pages)
            .unwrap_or_else(|why| panic!("refused: {why}"));
        self.outcome(ticket)
    }

    fn outcome(&mut self, ticket: u64) -> Outcome {
        let mut ended = self.completions();
        assert_eq!(ended.len(), 1, "{ended:?}");
        let end = ended.remove(0);
        assert_eq!(end.ticket, ticket);
        end.outcome
    }
}
