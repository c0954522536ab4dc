//! Requests that are not complete yet: put together from chunks, or waiting for copies.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use pegaflow_shm::desc::{DescriptorFault, MissReason, Submission, flags};
use pegaflow_shm::node::Counter;
use pegaflow_shm::status::Status;

use crate::cache::store::ShardScope;
use crate::copy::Signal;
use crate::lane::below::Reach;
use crate::lane::prefetch::Piece;

/// What the first chunk fixes and every further one must repeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ListHead {
    pub op: u8,
    pub group: u16,
    pub registration: u32,
    pub request_id: u64,
    pub total: u32,
    pub args: [u64; 3],
    /// Flags that say how a query is meant.
    pub reach: u8,
}

impl ListHead {
    pub(super) fn of(submission: &Submission) -> ListHead {
        ListHead {
            op: submission.op,
            group: submission.group,
            registration: submission.registration,
            request_id: submission.request_id,
            total: submission.total,
            args: [submission.arg0, submission.arg1, submission.arg2],
            reach: submission.flags & (flags::NOW | flags::WAIT),
        }
    }
}

/// Progress of a list.
#[derive(Clone, Debug)]
pub(super) struct ListProgress {
    pub head: ListHead,
    pub received: u32,
    pub started: Instant,
    /// The list's last chunk is in.
    pub listed: bool,
    /// The request failed before its list was complete: the rest is only counted.
    pub failed: Option<(Status, u64)>,
}

impl ListProgress {
    pub(super) fn new(submission: &Submission, started: Instant) -> ListProgress {
        let head = ListHead::of(submission);
        ListProgress {
            head,
            received: 0,
            started,
            listed: false,
            failed: None,
        }
    }

    /// Counts a chunk in.
    pub(super) fn take(
        &mut self,
        submission: &Submission,
        more: bool,
    ) -> Result<(), DescriptorFault> {
        let contradiction = DescriptorFault::Chunk {
            request_id: submission.request_id,
        };
        if self.listed || ListHead::of(submission) != self.head {
            return Err(contradiction);
        }
        self.received = match self.received.checked_add(submission.count) {
            Some(received) if received <= self.head.total => received,
            _ => return Err(contradiction),
        };
        if !more {
            if self.received != self.head.total {
                return Err(contradiction);
            }
            self.listed = true;
        }
        Ok(())
    }

    pub(super) fn fail(&mut self, status: Status, about: u64) {
        self.failed.get_or_insert((status, about));
    }
}

/// A query while its hashes come in.
#[derive(Debug)]
pub(super) struct QueryRequest {
    pub list: ListProgress,
    pub scope: Option<QueryScope>,
    /// Pinned entries, in order.
    pub entries: Vec<u32>,
    pub digest: u64,
    /// First miss of a prefix query, or of a membership query.
    pub miss: Option<MissReason>,
    /// Misses by reason, for the metrics.
    pub misses: [u32; MissReason::ALL.len()],
    /// Membership: bit i is set when position i is a hit. As long as the list that is in.
    pub bits: Vec<u64>,
    /// What it does about blocks below the pool.
    pub reach: Reach,
    /// How long it waits for them at most, in ms; 0 for as long as it takes.
    pub deadline_ms: u64,
    /// Positions from the first on that is not in the pool but below; of a membership query only
    /// those that are below.
    pub pieces: Vec<Piece>,
    /// Of its blocks, those that had to come up.
    pub fetched: u32,
    /// Its answer comes later.
    pub waits: bool,
    /// It has waited and takes what is there.
    pub resumed: bool,
}

impl QueryRequest {
    /// None of its positions is a hit.
    pub(super) fn miss_all(&mut self, reason: MissReason) {
        let total = self.list.head.total;
        let group = self.list.head.group;
        self.misses.fill(0);
        self.bits.fill(0);
        self.miss = Some(reason);
        if group == 0 {
            self.misses[reason as usize] = 1;
            self.misses[MissReason::AfterMiss as usize] = total.saturating_sub(1);
        } else {
            self.misses[reason as usize] = total;
        }
    }
}

/// Where a query looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct QueryScope {
    pub domain: usize,
    pub namespace: u32,
    pub instance: u64,
    pub group: u16,
    /// Workers that may load from its lease.
    pub loaders: u16,
    /// Shards of a block.
    pub shards: u16,
}

/// A load: first its block ids come in, then its copies run.
#[derive(Debug)]
pub(super) struct LoadRequest {
    pub list: ListProgress,
    /// Position in the lease of the first block.
    pub first: u64,
    pub blocks: Vec<u32>,
    /// Block ids that it keeps, here or in its copies, until it is finished.
    pub counted: usize,
    pub copies: CopyProgress,
    /// What is raised as it comes in, and when it has ended.
    pub signal: Option<Signal>,
    /// Its copies come in steps.
    pub steps: Option<StepsProgress>,
}

/// Copies of a load that come in steps, each with all of its pages.
#[derive(Debug, Default)]
pub(super) struct StepsProgress {
    /// Not every page came in every step; what its pages are counted as.
    pub failed: Option<Counter>,
}

/// A save: its copies start with the first chunk.
#[derive(Debug)]
pub(super) struct SaveRequest {
    pub list: ListProgress,
    pub scope: Option<ShardScope>,
    pub skipped: u32,
    pub no_space: u32,
    pub not_admitted: u32,
    pub copies: CopyProgress,
}

/// Copies of one request.
#[derive(Debug)]
pub(super) struct CopyProgress {
    pub running: u32,
    pub pages: u32,
    pub bytes: u64,
    pub failed_pages: u32,
    pub cancelled: Arc<AtomicBool>,
}

impl CopyProgress {
    pub(super) fn new() -> CopyProgress {
        CopyProgress {
            running: 0,
            pages: 0,
            bytes: 0,
            failed_pages: 0,
            cancelled: Arc::new(AtomicBool::new(false)),
        }
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}

/// Any request that is not complete.
#[derive(Debug)]
pub(super) enum Request {
    Query(Box<QueryRequest>),
    Load(Box<LoadRequest>),
    Save(Box<SaveRequest>),
}

impl Request {
    pub(super) fn list(&self) -> &ListProgress {
        match self {
            Request::Query(query) => &query.list,
            Request::Load(load) => &load.list,
            Request::Save(save) => &save.list,
        }
    }

    pub(super) fn copies(&self) -> Option<&CopyProgress> {
        match self {
            Request::Query(_) => None,
            Request::Load(load) => Some(&load.copies),
            Request::Save(save) => Some(&save.copies),
        }
    }
}
