//! A task in the hands of a device's thread.
#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::copy::{CopyDone, CopyError, CopyTask};

use super::plan::Cursor;

/// The first pause between two looks at an event that has not happened.
const FIRST_PAUSE: Duration = Duration::from_micros(20);
/// The longest.
const LONGEST_PAUSE: Duration = Duration::from_micros(200);

/// Most pages of a job's first chunk, so that the bus has work while the others are looked at. Each
/// further chunk may have four times as many as the one before.
const FIRST_PAGES: usize = 2048;

/// Looks at the event that a job comes after.
#[derive(Debug, Clone, Copy)]
pub(super) struct Looks {
    /// Since when it has been waited for.
    pub(super) since: Instant,
    /// When to look again.
    pub(super) next: Instant,
    pause: Duration,
}

impl Looks {
    pub(super) fn new(now: Instant) -> Looks {
        Looks {
            since: now,
            next: now,
            pause: FIRST_PAUSE,
        }
    }

    /// It has not happened: pauses grow, because whoever computes for long is not hurried by looks.
    pub(super) fn again(&mut self, now: Instant) {
        self.next = now + self.pause;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }
}

/// A task, how far it is planned, and what of it is under way.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) task: CopyTask,
    /// Pages from the first on that may be copied: all, but for pages whose checksum is wrong.
    pub(super) sound: usize,
    /// Pages from the first on that have been looked at.
    pub(super) seen: usize,
    /// Most pages of the next chunk.
    ahead: usize,
    /// Why the page behind them may not.
    pub(super) corrupt: Option<CopyError>,
    /// Where the next chunk begins.
    pub(super) next: Cursor,
    /// Chunks under way.
    pub(super) in_flight: u32,
    /// The first place whose bytes did not arrive, and why.
    failed: Option<(Cursor, CopyError)>,
    /// What the event it comes after needs, until that has happened.
    pub(super) looks: Option<Looks>,
    /// What the thread has spent on it.
    pub(super) busy: Duration,
}

impl Job {
    pub(super) fn new(task: CopyTask, now: Instant) -> Job {
        Job {
            sound: task.pages.len(),
            seen: 0,
            ahead: FIRST_PAGES,
            corrupt: None,
            next: Cursor::default(),
            in_flight: 0,
            failed: None,
            looks: task.after.as_ref().map(|_| Looks::new(now)),
            busy: Duration::ZERO,
            task,
        }
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.task.cancelled.load(Ordering::Relaxed)
    }

    /// Where the pages end that the next chunk may have, where its bytes allow for `most`.
    pub(super) fn reach(&self, most: usize) -> usize {
        let reach = self.next.page.saturating_add(most.min(self.ahead));
        reach.min(self.sound)
    }

    /// A chunk was started, up to `next`.
    pub(super) fn started(&mut self, next: Cursor) {
        self.next = next;
        self.in_flight += 1;
        self.ahead = self.ahead.saturating_mul(4);
    }

    /// Nothing more of it is to be started.
    pub(super) fn is_planned(&self) -> bool {
        self.failed.is_some() || self.next.page >= self.sound
    }

    /// Nothing of it is under way, and nothing will be.
    pub(super) fn is_over(&self) -> bool {
        self.in_flight == 0 && self.is_planned()
    }

    /// The bytes from `at` on do not arrive; the earliest place counts, with its reason.
    pub(super) fn fail(&mut self, at: Cursor, error: CopyError) {
        if self
            .failed
            .as_ref()
            .is_none_or(|(earlier, _)| at < *earlier)
        {
            self.failed = Some((at, error));
        }
    }

    /// Pages from the first on that are copied; of a job that is over.
    pub(super) fn pages_done(&self) -> usize {
        debug_assert!(self.is_over(), "chunks of the job are under way");
        match &self.failed {
            Some((at, _)) => at.page,
            None => self.next.page,
        }
    }

    /// The result of a job that is over.
    pub(super) fn finish(self) -> CopyDone {
        let pages_done = self.pages_done();
        let bytes = pages_done as u64 * self.task.target.layout().page_bytes();
        let failed = self.failed.map(|(_, error)| error);
        let result = failed.or(self.corrupt).map_or(Ok(bytes), Err);
        crate::copy::finished(self.task, (result, pages_done as u32), self.busy)
    }
}
