//! Writing and reading a mapped node file.

use std::ptr::NonNull;
use std::sync::Arc;

use bytemuck::Pod;

use super::{
    Counter, DEVICE_ROWS, DOMAIN_ROWS, DeviceRow, DomainRow, Gauge, HISTOGRAM_BUCKETS, Histogram,
    LEASE_ROWS, LeaseRow, NAMESPACE_ROWS, NODE_LAYOUT, NODE_MAGIC, NamespaceRow, NodeHeader,
    SESSION_ROWS, SSD_ROWS, SessionRow, SsdRow, bucket_end, bucket_of,
};
use crate::mapping::Mapping;
use crate::row;
use crate::sync::{AtomicU64, Ordering, fence};

const COUNTERS_AT: usize = 4096 / 8;
const GAUGES_AT: usize = COUNTERS_AT + Counter::ALL.len();
const HISTOGRAMS_AT: usize = GAUGES_AT + Gauge::ALL.len();
const HISTOGRAM_WORDS: usize = 2 + HISTOGRAM_BUCKETS;
const SESSIONS_AT: usize = HISTOGRAMS_AT + Histogram::ALL.len() * HISTOGRAM_WORDS;
const SESSION_WORDS: usize = 1 + size_of::<SessionRow>() / 8;
const LEASES_AT: usize = SESSIONS_AT + SESSION_ROWS * SESSION_WORDS;
const LEASE_WORDS: usize = 1 + size_of::<LeaseRow>() / 8;
const NAMESPACES_AT: usize = LEASES_AT + LEASE_ROWS * LEASE_WORDS;
const NAMESPACE_WORDS: usize = 1 + size_of::<NamespaceRow>() / 8;
const DOMAINS_AT: usize = NAMESPACES_AT + NAMESPACE_ROWS * NAMESPACE_WORDS;
const DOMAIN_WORDS: usize = 1 + size_of::<DomainRow>() / 8;
const DEVICES_AT: usize = DOMAINS_AT + DOMAIN_ROWS * DOMAIN_WORDS;
const DEVICE_WORDS: usize = 1 + size_of::<DeviceRow>() / 8;
const SSDS_AT: usize = DEVICES_AT + DEVICE_ROWS * DEVICE_WORDS;
const SSD_WORDS: usize = 1 + size_of::<SsdRow>() / 8;
const TOTAL_WORDS: usize = SSDS_AT + SSD_ROWS * SSD_WORDS;
const HEADER_WORDS: usize = size_of::<NodeHeader>() / 8;

/// A node file that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NodeFault {
    /// The file is shorter than its layout.
    #[error("node file of {found} bytes, layout {NODE_LAYOUT} has {expected}")]
    Size {
        /// Mapped.
        found: usize,
        /// Needed.
        expected: usize,
    },
    /// Not a node file, or its daemon has not finished starting.
    #[error(
        "node file magic {found:#018x}, expected {NODE_MAGIC:#018x}: no daemon has started here"
    )]
    Magic {
        /// In the file.
        found: u64,
    },
    /// Written by another version.
    #[error(
        "node file layout {found}, this tool reads {NODE_LAYOUT}: use the tool of the daemon's version"
    )]
    Layout {
        /// In the file.
        found: u32,
    },
}

/// The words of the file. Every access is one relaxed atomic; ordering is added where rows need it.
#[derive(Clone)]
struct Words {
    base: NonNull<AtomicU64>,
    _mapping: Arc<Mapping>,
}

// SAFETY: `base` points into a mapping that `_mapping` keeps alive, and is only used for atomic
// access.
unsafe impl Send for Words {}
// SAFETY: as above; atomics may be shared.
unsafe impl Sync for Words {}

impl Words {
    fn new(mapping: Arc<Mapping>) -> Result<Words, NodeFault> {
        let size = NodeFault::Size {
            found: mapping.len(),
            expected: TOTAL_WORDS * 8,
        };
        let base = mapping
            .ptr_at(0, TOTAL_WORDS * 8)
            .map_err(|_| size.clone())?;
        let base = NonNull::new(base.cast::<AtomicU64>()).ok_or(size)?;
        Ok(Words {
            base,
            _mapping: mapping,
        })
    }

    #[inline]
    fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at < TOTAL_WORDS);
        // SAFETY: `at` is below TOTAL_WORDS, which `new` checked against the mapping's length; a
        // mapping is page-aligned, and all access to these bytes is atomic on both sides.
        unsafe { self.base.add(at).as_ref() }
    }

    fn load(&self, at: usize) -> u64 {
        self.word(at).load(Ordering::Relaxed)
    }

    fn read_pod<T: Pod>(&self, at: usize) -> T {
        let mut value = T::zeroed();
        let words: &mut [u64] = bytemuck::cast_slice_mut(std::slice::from_mut(&mut value));
        for (offset, word) in words.iter_mut().enumerate() {
            *word = self.load(at + offset);
        }
        value
    }

    fn write_pod<T: Pod>(&self, at: usize, value: &T) {
        let words: &[u64] = bytemuck::cast_slice(std::slice::from_ref(value));
        for (offset, word) in words.iter().enumerate() {
            self.word(at + offset).store(*word, Ordering::Relaxed);
        }
    }

    /// The version word and the words of a row of type `T`.
    fn row<T: Pod>(&self, at: usize) -> &[AtomicU64] {
        let count = 1 + size_of::<T>() / 8;
        assert!(at + count <= TOTAL_WORDS);
        // SAFETY: the range was checked just now against TOTAL_WORDS, and `new` checked that
        // against the mapping; it stays mapped while `self` lives, and both sides access it by
        // atomics only.
        unsafe { std::slice::from_raw_parts(self.base.add(at).as_ptr(), count) }
    }

    /// One writer at a time: the control thread owns the table of GPUs, the lane the others.
    fn write_row<T: Pod>(&self, at: usize, row: &T) {
        let values = bytemuck::cast_slice(std::slice::from_ref(row));
        row::write(self.row::<T>(at), values);
    }

    fn read_row<T: Pod>(&self, at: usize) -> Option<T> {
        let mut value = T::zeroed();
        let values = bytemuck::cast_slice_mut(std::slice::from_mut(&mut value));
        row::read(self.row::<T>(at), values).then_some(value)
    }
}

/// The daemon's side of the node file.
#[derive(Clone)]
pub struct NodeWriter {
    words: Words,
}

impl NodeWriter {
    /// Bytes a node file has.
    pub const FILE_BYTES: usize = (TOTAL_WORDS * 8).next_multiple_of(4096);

    /// Takes a zeroed, writable mapping of [`Self::FILE_BYTES`] and publishes the header.
    ///
    /// # Errors
    /// The mapping is too short.
    pub fn create(mapping: Arc<Mapping>, header: &NodeHeader) -> Result<NodeWriter, NodeFault> {
        let words = Words::new(mapping)?;
        let header = NodeHeader {
            magic: 0,
            layout: NODE_LAYOUT,
            total_bytes: Self::FILE_BYTES as u64,
            counters: Counter::ALL.len() as u32,
            gauges: Gauge::ALL.len() as u32,
            histograms: Histogram::ALL.len() as u32,
            buckets: HISTOGRAM_BUCKETS as u32,
            ..*header
        };
        words.write_pod(0, &header);
        // SYNC: node-magic. Whoever sees the magic sees the header.
        words.word(0).store(NODE_MAGIC, Ordering::Release);
        Ok(NodeWriter { words })
    }

    /// Adds to a counter.
    #[inline]
    pub fn add(&self, counter: Counter, amount: u64) {
        self.words
            .word(COUNTERS_AT + counter as usize)
            .fetch_add(amount, Ordering::Relaxed);
    }

    /// Sets a gauge.
    #[inline]
    pub fn set(&self, gauge: Gauge, value: u64) {
        self.words
            .word(GAUGES_AT + gauge as usize)
            .store(value, Ordering::Relaxed);
    }

    /// Counts one observation of `nanos`.
    #[inline]
    pub fn observe(&self, histogram: Histogram, nanos: u64) {
        let at = HISTOGRAMS_AT + histogram as usize * HISTOGRAM_WORDS;
        self.words.word(at).fetch_add(1, Ordering::Relaxed);
        self.words.word(at + 1).fetch_add(nanos, Ordering::Relaxed);
        self.words
            .word(at + 2 + bucket_of(nanos))
            .fetch_add(1, Ordering::Relaxed);
    }

    /// Writes a session row; a position beyond the table is not shown.
    pub fn write_session(&self, position: usize, row: &SessionRow) {
        if position < SESSION_ROWS {
            self.words
                .write_row(SESSIONS_AT + position * SESSION_WORDS, row);
        }
    }

    /// Writes a lease row; a position beyond the table is not shown.
    pub fn write_lease(&self, position: usize, row: &LeaseRow) {
        if position < LEASE_ROWS {
            self.words
                .write_row(LEASES_AT + position * LEASE_WORDS, row);
        }
    }

    /// Writes a namespace row; a position beyond the table is not shown.
    pub fn write_namespace(&self, position: usize, row: &NamespaceRow) {
        if position < NAMESPACE_ROWS {
            self.words
                .write_row(NAMESPACES_AT + position * NAMESPACE_WORDS, row);
        }
    }

    /// Writes an isolation domain's row; a position beyond the table is not shown.
    pub fn write_domain(&self, position: usize, row: &DomainRow) {
        if position < DOMAIN_ROWS {
            self.words
                .write_row(DOMAINS_AT + position * DOMAIN_WORDS, row);
        }
    }

    /// Writes a GPU's row; a position beyond the table is not shown.
    pub fn write_device(&self, position: usize, row: &DeviceRow) {
        if position < DEVICE_ROWS {
            self.words
                .write_row(DEVICES_AT + position * DEVICE_WORDS, row);
        }
    }

    /// Writes an SSD shard's row; a position beyond the table is not shown.
    pub fn write_ssd(&self, position: usize, row: &SsdRow) {
        if position < SSD_ROWS {
            self.words.write_row(SSDS_AT + position * SSD_WORDS, row);
        }
    }

    /// The reading side of the same file.
    pub fn reader(&self) -> NodeReader {
        NodeReader {
            words: self.words.clone(),
        }
    }
}

/// A copy of one histogram.
#[derive(Clone, Debug)]
pub struct HistogramSnapshot {
    /// Observations.
    pub count: u64,
    /// Sum in nanoseconds.
    pub sum_nanos: u64,
    /// Observations per bucket; see [`bucket_end`].
    pub buckets: [u64; HISTOGRAM_BUCKETS],
}

impl HistogramSnapshot {
    /// Upper end in nanoseconds of the bucket that holds the given quantile (0 to 1), 0 when empty.
    pub fn quantile_nanos(&self, quantile: f64) -> u64 {
        let total: u64 = self.buckets.iter().sum();
        let target = (quantile.clamp(0.0, 1.0) * total as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (bucket, count) in self.buckets.iter().enumerate() {
            seen += count;
            if total > 0 && seen >= target {
                return bucket_end(bucket).unwrap_or(u64::MAX);
            }
        }
        0
    }
}

/// A tool's side of the node file.
#[derive(Clone)]
pub struct NodeReader {
    words: Words,
}

impl NodeReader {
    /// Takes a mapping of a node file.
    ///
    /// # Errors
    /// The file is too short, not a node file, or of another layout.
    pub fn open(mapping: Arc<Mapping>) -> Result<NodeReader, NodeFault> {
        let words = Words::new(mapping)?;
        let magic = words.load(0);
        // SYNC: node-magic. A fence, as for rows.
        fence(Ordering::Acquire);
        if magic != NODE_MAGIC {
            return Err(NodeFault::Magic { found: magic });
        }
        let reader = NodeReader { words };
        let header = reader.header();
        let same_shape = header.counters as usize == Counter::ALL.len()
            && header.gauges as usize == Gauge::ALL.len()
            && header.histograms as usize == Histogram::ALL.len()
            && header.buckets as usize == HISTOGRAM_BUCKETS;
        if header.layout != NODE_LAYOUT || !same_shape {
            return Err(NodeFault::Layout {
                found: header.layout,
            });
        }
        Ok(reader)
    }

    /// The header.
    pub fn header(&self) -> NodeHeader {
        const { assert!(HEADER_WORDS * 8 == size_of::<NodeHeader>()) };
        self.words.read_pod(0)
    }

    /// A counter's value.
    pub fn counter(&self, counter: Counter) -> u64 {
        self.words.load(COUNTERS_AT + counter as usize)
    }

    /// A gauge's value.
    pub fn gauge(&self, gauge: Gauge) -> u64 {
        self.words.load(GAUGES_AT + gauge as usize)
    }

    /// A histogram's values; taken word by word, so a busy one may be off by a few.
    pub fn histogram(&self, histogram: Histogram) -> HistogramSnapshot {
        let at = HISTOGRAMS_AT + histogram as usize * HISTOGRAM_WORDS;
        HistogramSnapshot {
            count: self.words.load(at),
            sum_nanos: self.words.load(at + 1),
            buckets: std::array::from_fn(|bucket| self.words.load(at + 2 + bucket)),
        }
    }

    /// Sessions in use.
    pub fn sessions(&self) -> Vec<SessionRow> {
        self.rows(SESSIONS_AT, SESSION_WORDS, SESSION_ROWS)
            .filter(|row: &SessionRow| row.session != 0)
            .collect()
    }

    /// Live leases.
    pub fn leases(&self) -> Vec<LeaseRow> {
        self.rows(LEASES_AT, LEASE_WORDS, LEASE_ROWS)
            .filter(|row: &LeaseRow| row.lease != 0)
            .collect()
    }

    /// Namespaces in use, with their index keys.
    pub fn namespaces(&self) -> Vec<(usize, NamespaceRow)> {
        (0..NAMESPACE_ROWS)
            .filter_map(|position| {
                let row: NamespaceRow = self
                    .words
                    .read_row(NAMESPACES_AT + position * NAMESPACE_WORDS)?;
                (row.used == 1).then_some((position, row))
            })
            .collect()
    }

    /// Isolation domains that have had sessions or blocks.
    pub fn domains(&self) -> Vec<DomainRow> {
        self.rows(DOMAINS_AT, DOMAIN_WORDS, DOMAIN_ROWS)
            .filter(|row: &DomainRow| row.used == 1)
            .collect()
    }

    /// GPUs that the daemon can use.
    pub fn devices(&self) -> Vec<DeviceRow> {
        self.rows(DEVICES_AT, DEVICE_WORDS, DEVICE_ROWS)
            .filter(|row: &DeviceRow| row.used == 1)
            .collect()
    }

    /// Files of the SSD tier, in the order of the options.
    pub fn ssds(&self) -> Vec<SsdRow> {
        self.rows(SSDS_AT, SSD_WORDS, SSD_ROWS)
            .filter(|row: &SsdRow| row.used == 1)
            .collect()
    }

    fn rows<T: Pod>(&self, at: usize, stride: usize, rows: usize) -> impl Iterator<Item = T> + '_ {
        (0..rows).filter_map(move |position| self.words.read_row(at + position * stride))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytemuck::Zeroable;

    fn pair() -> (NodeWriter, NodeReader) {
        let mapping = Arc::new(Mapping::anonymous(NodeWriter::FILE_BYTES).unwrap());
        let writer = NodeWriter::create(mapping.clone(), &NodeHeader::zeroed()).unwrap();
        (writer, NodeReader::open(mapping).unwrap())
    }

    #[test]
    fn what_is_written_is_read() {
        let (writer, reader) = pair();
        writer.add(Counter::QueryHit, 3);
        writer.add(Counter::QueryHit, 4);
        writer.set(Gauge::Leases, 9);
        let row = SessionRow {
            session: 5,
            pid: 6,
            ..SessionRow::zeroed()
        };
        writer.write_session(2, &row);
        writer.write_session(SESSION_ROWS, &row);
        assert_eq!(reader.counter(Counter::QueryHit), 7);
        assert_eq!(reader.gauge(Gauge::Leases), 9);
        assert_eq!(reader.sessions(), vec![row]);
        assert!(reader.leases().is_empty());
    }

    #[test]
    fn quantiles_lie_within_a_bucket() {
        let (writer, reader) = pair();
        for micros in 1..=1000u64 {
            writer.observe(Histogram::Query, micros * 1000);
        }
        let snapshot = reader.histogram(Histogram::Query);
        assert_eq!(snapshot.count, 1000);
        let median = snapshot.quantile_nanos(0.5) as f64;
        assert!((500_000.0..=625_000.0).contains(&median), "{median}");
    }

    #[test]
    fn a_row_is_never_read_torn() {
        let (writer, reader) = pair();
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let writing = {
            let stop = stop.clone();
            std::thread::spawn(move || {
                let mut n = 1;
                while !stop.load(Ordering::Relaxed) {
                    let row = LeaseRow {
                        lease: n,
                        session: n,
                        request_key: n,
                        ..LeaseRow::zeroed()
                    };
                    writer.write_lease(0, &row);
                    n += 1;
                }
            })
        };
        for _ in 0..20_000 {
            for row in reader.leases() {
                assert!(row.lease == row.session && row.session == row.request_key);
            }
        }
        stop.store(true, Ordering::Relaxed);
        writing.join().unwrap();
    }

    #[test]
    fn a_file_of_another_kind_is_refused() {
        let mapping = Arc::new(Mapping::anonymous(NodeWriter::FILE_BYTES).unwrap());
        assert!(matches!(
            NodeReader::open(mapping),
            Err(NodeFault::Magic { .. })
        ));
        let short = Arc::new(Mapping::anonymous(4096).unwrap());
        assert!(matches!(
            NodeReader::open(short),
            Err(NodeFault::Size { .. })
        ));
    }
}
