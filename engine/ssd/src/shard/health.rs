//! Whether a shard takes requests.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use crate::stats::{ShardFault, ShardHealth};

/// So many reads in a row that the system fails make a shard refuse reads.
const READ_FAILURES: u32 = 3;

/// What is known about a shard's drive.
#[derive(Debug)]
pub(crate) struct Health {
    reads: Option<Trouble>,
    writes: Option<Trouble>,
    /// With tables and syncs: no write is taken that could not be made durable.
    tables: Option<Trouble>,
    read_failures: u32,
    stalled: bool,
    stopped: bool,
    /// When this was last looked at.
    looked: Instant,
    /// Since when the drive has had what it has had longest, as of then.
    oldest: Option<Instant>,
    /// When something last ended, or was asked for while nothing was under way.
    progress: Instant,
    stall_limit: Duration,
    retry_after: Duration,
    /// How often the shard began to refuse.
    pub degradations: u64,
}

#[derive(Debug)]
struct Trouble {
    fault: ShardFault,
    retry_at: Instant,
}

impl Health {
    pub fn new(now: Instant, stall_limit: Duration, retry_after: Duration) -> Self {
        Self {
            reads: None,
            writes: None,
            tables: None,
            read_failures: 0,
            stalled: false,
            stopped: false,
            looked: now,
            oldest: None,
            progress: now,
            stall_limit,
            retry_after,
            degradations: 0,
        }
    }

    /// Something was asked for; `idle` if nothing was under way.
    pub fn asked(&mut self, now: Instant, idle: bool) {
        if idle {
            self.progress = now;
        }
    }

    /// Something ended.
    pub fn ended(&mut self, now: Instant) {
        self.progress = now;
    }

    /// Looks whether what is under way makes progress: the drive answers, and not only some
    /// requests. It has had one since `oldest`.
    pub fn look(&mut self, now: Instant, busy: bool, oldest: Option<Instant>) {
        self.looked = now;
        self.oldest = oldest;
        let late = |since: Instant| now.saturating_duration_since(since) >= self.stall_limit;
        let stalled = busy && (late(self.progress) || oldest.is_some_and(late));
        if stalled && !self.stalled {
            self.degradations += 1;
        }
        self.stalled = stalled;
    }

    /// The shard's thread is gone.
    pub fn stop(&mut self) {
        if !self.stopped {
            self.stopped = true;
            self.degradations += 1;
        }
    }

    /// Why no read is taken now. After a while one may try.
    pub fn refuses_reads(&self, now: Instant) -> Option<ShardFault> {
        self.refuses(&self.reads, now)
    }

    /// Why no write is taken now. After a while one may try.
    pub fn refuses_writes(&self, now: Instant) -> Option<ShardFault> {
        self.refuses(&self.writes, now)
            .or_else(|| self.refuses(&self.tables, now))
    }

    /// Whether tables cannot be written now.
    pub fn refuses_tables(&self, now: Instant) -> bool {
        self.refuses(&self.tables, now).is_some()
    }

    fn refuses(&self, trouble: &Option<Trouble>, now: Instant) -> Option<ShardFault> {
        if self.stopped {
            return Some(ShardFault::Stopped);
        }
        if self.stalled {
            return Some(ShardFault::Stalled);
        }
        trouble
            .as_ref()
            .filter(|trouble| now < trouble.retry_at)
            .map(|trouble| trouble.fault.clone())
    }

    /// A read was taken: while there is trouble, the next one waits for how it ends.
    pub fn took_read(&mut self, now: Instant) {
        if let Some(trouble) = &mut self.reads {
            trouble.retry_at = now + self.retry_after;
        }
    }

    /// A write was taken, likewise.
    pub fn took_write(&mut self, now: Instant) {
        if let Some(trouble) = &mut self.writes {
            trouble.retry_at = now + self.retry_after;
        }
    }

    /// A read ended well.
    pub fn read_fine(&mut self) {
        self.read_failures = 0;
        self.reads = None;
    }

    /// A page was written.
    pub fn write_fine(&mut self) {
        self.writes = None;
    }

    /// A sync ended well, and the tables before it.
    pub fn tables_fine(&mut self) {
        self.tables = None;
    }

    /// A read failed.
    pub fn read_failed(&mut self, now: Instant, fault: ShardFault) {
        if fault == ShardFault::Stopped {
            self.stop();
            return;
        }
        self.read_failures += 1;
        if self.read_failures >= READ_FAILURES {
            self.degradations += u64::from(self.reads.is_none());
            self.reads = Some(self.trouble(now, fault));
        }
    }

    /// A page could not be written.
    pub fn write_failed(&mut self, now: Instant, fault: ShardFault) {
        if fault == ShardFault::Stopped {
            self.stop();
            return;
        }
        self.degradations += u64::from(self.writes.is_none());
        self.writes = Some(self.trouble(now, fault));
    }

    /// A table could not be written, or a sync failed.
    pub fn tables_failed(&mut self, now: Instant, fault: ShardFault) {
        if fault == ShardFault::Stopped {
            self.stop();
            return;
        }
        self.degradations += u64::from(self.tables.is_none());
        self.tables = Some(self.trouble(now, fault));
    }

    fn trouble(&self, now: Instant, fault: ShardFault) -> Trouble {
        Trouble {
            fault,
            retry_at: now + self.retry_after,
        }
    }

    /// For statistics: the shard's health, whether or not one may try again.
    pub fn state(&self) -> ShardHealth {
        let fault = |trouble: &Option<Trouble>| trouble.as_ref().map(|t| t.fault.clone());
        if self.stopped {
            ShardHealth::Degraded(ShardFault::Stopped)
        } else if self.stalled {
            ShardHealth::Degraded(ShardFault::Stalled)
        } else if let Some(fault) = fault(&self.reads) {
            ShardHealth::Degraded(fault)
        } else if let Some(fault) = fault(&self.writes).or_else(|| fault(&self.tables)) {
            ShardHealth::ReadsOnly(fault)
        } else {
            ShardHealth::Healthy
        }
    }

    /// Whether a read would be taken, as of the last look.
    pub fn is_readable(&self) -> bool {
        self.refuses_reads(self.looked).is_none()
    }

    /// Whether tables can be written, as of the last look.
    pub fn can_commit(&self) -> bool {
        !self.refuses_tables(self.looked)
    }

    /// When to look again.
    pub fn deadline(&self, busy: bool) -> Option<Instant> {
        let retries = [&self.reads, &self.writes, &self.tables];
        let retries = retries
            .into_iter()
            .flatten()
            .map(|trouble| trouble.retry_at);
        let oldest = self.oldest.unwrap_or(self.progress).min(self.progress);
        let stall = (busy && !self.stalled).then(|| oldest + self.stall_limit);
        retries.chain(stall).filter(|&at| at > self.looked).min()
    }
}
