//! `rings`: the rings of every session, read from its two segments.

#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use bytemuck::Zeroable;
use pegaflow_shm::mapping::{Access, Mapping, MappingError, NamedFile};
use pegaflow_shm::node::{SessionRow, field_text};
use pegaflow_shm::segment::{
    C2D_MAGIC, CONSUMED_OFFSET, D2C_MAGIC, SLEEP_EPOCH_OFFSET, SLOT_BYTES, SLOTS_OFFSET,
    STATE_OFFSET, SegmentFault, SegmentHeader, SegmentShape, SessionState,
};
use pegaflow_shm::sync::Ordering;
use serde::Serialize;
use serde_json::json;

use crate::node::NodeView;
use crate::output::{count, print_json, printable, size, table};
use crate::status::daemon_json;

/// Why a session's segment cannot be shown.
#[derive(Debug, thiserror::Error)]
enum SegmentError {
    #[error("{0}")]
    Open(#[from] std::io::Error),
    #[error("{0}")]
    Mapping(#[from] MappingError),
    #[error("{0}")]
    Fault(#[from] SegmentFault),
}

/// One segment, mapped read-only.
struct Segment {
    mapping: Mapping,
    shape: SegmentShape,
}

impl Segment {
    /// Follows a link of the `sessions` folder: it leads to the memfd through a process that holds
    /// it.
    fn open(path: &Path, magic: u64) -> Result<Segment, SegmentError> {
        let file = NamedFile::from_fd(OwnedFd::from(File::open(path)?), "session segment")?;
        let mapping = file.map(Access::ReadOnly)?;
        let mut header = SegmentHeader::zeroed();
        mapping.copy_out(0, bytemuck::bytes_of_mut(&mut header))?;
        let shape = header.check(magic, mapping.len())?;
        Ok(Segment { mapping, shape })
    }

    /// Positions published, by the highest sequence number in any slot.
    fn published(&self) -> Result<u64, MappingError> {
        let mut highest = 0;
        for slot in 0..self.shape.slots as usize {
            let word = self.mapping.atomic_u64(SLOTS_OFFSET + slot * SLOT_BYTES)?;
            highest = highest.max(word.load(Ordering::Relaxed));
        }
        Ok(highest)
    }

    fn consumed(&self) -> Result<u64, MappingError> {
        Ok(self
            .mapping
            .atomic_u64(CONSUMED_OFFSET)?
            .load(Ordering::Relaxed))
    }

    fn sleep_epoch(&self) -> Result<u32, MappingError> {
        Ok(self
            .mapping
            .atomic_u32(SLEEP_EPOCH_OFFSET)?
            .load(Ordering::Relaxed))
    }

    fn state(&self) -> Result<SessionState, MappingError> {
        let word = self.mapping.atomic_u32(STATE_OFFSET)?;
        Ok(SessionState::from_code(word.load(Ordering::Relaxed)))
    }
}

/// One direction of a session.
#[derive(Clone, Debug, Serialize)]
struct RingState {
    /// Slots.
    slots: u32,
    /// Messages published since the session began.
    published: u64,
    /// Messages that the consumer has reported as read; it reports every quarter of a lap and when
    /// idle.
    consumed: u64,
    /// `published - consumed`: an upper bound of what waits.
    waiting: u64,
    /// Bytes of the producer's arena.
    arena_bytes: u64,
    /// 0 while the consumer is awake, else the number of its sleep.
    consumer_sleep_epoch: u32,
}

/// Both rings of a session.
#[derive(Clone, Debug, Serialize)]
struct SessionRings {
    session: u64,
    pid: u32,
    client_name: String,
    state: &'static str,
    submission: RingState,
    completion: RingState,
}

fn ring(producer: &Segment, consumer: &Segment) -> Result<RingState, MappingError> {
    // The consumer's word first: read the other way round, it could run ahead of `published`.
    let consumed = consumer.consumed()?;
    let published = producer.published()?;
    Ok(RingState {
        slots: producer.shape.slots,
        published,
        consumed,
        waiting: published.saturating_sub(consumed),
        arena_bytes: producer.shape.arena_bytes() as u64,
        consumer_sleep_epoch: consumer.sleep_epoch()?,
    })
}

fn session_rings(dir: &Path, row: &SessionRow) -> Result<SessionRings, SegmentError> {
    let sessions = dir.join("sessions");
    let c2d = Segment::open(&sessions.join(format!("{}.c2d", row.session)), C2D_MAGIC)?;
    let d2c = Segment::open(&sessions.join(format!("{}.d2c", row.session)), D2C_MAGIC)?;
    Ok(SessionRings {
        session: row.session,
        pid: row.pid,
        client_name: field_text(&row.client_name),
        state: match d2c.state()? {
            SessionState::Active => "active",
            SessionState::Draining => "draining",
            SessionState::Closed => "closed",
        },
        submission: ring(&c2d, &d2c)?,
        completion: ring(&d2c, &c2d)?,
    })
}

/// `pegactl rings`.
pub fn rings(view: &NodeView, as_json: bool) {
    let mut shown = Vec::new();
    let mut hidden = Vec::new();
    for row in view.reader.sessions() {
        match session_rings(&view.dir, &row) {
            Ok(rings) => shown.push(rings),
            Err(error) => hidden.push((row.session, row.pid, error.to_string())),
        }
    }
    if as_json {
        let hidden: Vec<_> = hidden
            .iter()
            .map(|(session, pid, why)| json!({ "session": session, "pid": pid, "why": why }))
            .collect();
        print_json(&json!({ "daemon": daemon_json(view), "rings": shown, "unreadable": hidden }));
        return;
    }
    println!("{}", view.daemon_sentence());
    let header = [
        "session",
        "name",
        "state",
        "ring",
        "slots",
        "published",
        "read",
        "waiting",
        "arena",
        "reader",
    ];
    let mut table = table(&header, &[0, 4, 5, 6, 7, 8]);
    for rings in &shown {
        for (name, ring) in [
            ("submission", &rings.submission),
            ("completion", &rings.completion),
        ] {
            table.add_row([
                rings.session.to_string(),
                printable(&rings.client_name),
                rings.state.to_owned(),
                name.to_owned(),
                ring.slots.to_string(),
                count(ring.published),
                count(ring.consumed),
                count(ring.waiting),
                size(ring.arena_bytes),
                match ring.consumer_sleep_epoch {
                    0 => "awake".to_owned(),
                    epoch => format!("asleep, sleep {epoch}"),
                },
            ]);
        }
    }
    println!("{table}");
    println!(
        "`read` is what the reader has reported: every quarter of a lap, and whenever it idles."
    );
    for (session, pid, why) in hidden {
        println!(
            "session {session} (pid {pid}): segments cannot be opened, they live no longer than \
                  the processes that hold them: {why}"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::sync::Arc;

    use pegaflow_shm::mapping::create_segment;
    use pegaflow_shm::ring::{Consumer, Producer, RawRing};

    #[test]
    fn positions_are_read_from_live_segments() {
        let shape = SegmentShape {
            slots: 16,
            arena_chunks: 1,
        };
        let bytes = shape.total_bytes();
        let make = |magic| {
            let (fd, mapping) = create_segment("test", bytes as u64).unwrap();
            let header = shape.header(magic, [0; 16], 7);
            mapping.copy_in(0, bytemuck::bytes_of(&header)).unwrap();
            (fd, Arc::new(mapping))
        };
        let (c2d_fd, c2d) = make(C2D_MAGIC);
        let (d2c_fd, d2c) = make(D2C_MAGIC);
        let ring = RawRing::for_producer(&c2d, SLOTS_OFFSET, 16, &d2c, CONSUMED_OFFSET).unwrap();
        let mut producer = Producer::new(ring.clone());
        let mut consumer = Consumer::new(ring);
        for _ in 0..20 {
            producer.try_push(&[1; 7]).unwrap();
            consumer.try_pop().unwrap();
        }
        assert_eq!(consumer.try_pop().unwrap(), None);
        producer.try_push(&[1; 7]).unwrap();
        d2c.atomic_u32(STATE_OFFSET)
            .unwrap()
            .store(1, Ordering::Relaxed);

        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("sessions")).unwrap();
        for (fd, name) in [(&c2d_fd, "7.c2d"), (&d2c_fd, "7.d2c")] {
            let target = format!("/proc/{}/fd/{}", std::process::id(), fd.as_raw_fd());
            std::os::unix::fs::symlink(target, dir.path().join("sessions").join(name)).unwrap();
        }
        let row = SessionRow {
            session: 7,
            ..SessionRow::zeroed()
        };
        let rings = session_rings(dir.path(), &row).unwrap();
        assert_eq!(rings.submission.published, 21);
        assert_eq!(rings.submission.consumed, 20);
        assert_eq!(rings.submission.waiting, 1);
        assert_eq!(rings.completion.published, 0);
        assert_eq!(rings.state, "active");
        let gone = SessionRow {
            session: 8,
            ..SessionRow::zeroed()
        };
        assert!(session_rings(dir.path(), &gone).is_err());
    }
}
