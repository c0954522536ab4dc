//! What happens by the clock: leases expire, stalled rings end their session, figures are
//! published.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use pegaflow_shm::namespace::NamespaceSpec;
use pegaflow_shm::node::{Counter, DomainRow, Gauge, NamespaceRow, NodeWriter, text_field};

use crate::cache::{Held, MAX_DOMAINS};
use crate::catalog::Namespace;
use crate::clock::Clock;
use crate::lane::machine::Machine;
use crate::lane::run::Lane;
use crate::lane::session::SessionFault;
use crate::tier::ssd_row;

/// How often leases are looked at while the lane is busy.
const SHORT_TICK: Duration = Duration::from_millis(1);
/// How often rings and unfinished lists are looked at.
const LONG_TICK: Duration = Duration::from_millis(500);
/// How often figures are published while the lane is busy.
const PUBLISH_TICK: Duration = Duration::from_millis(50);
/// How long the lane sleeps at most while a session is open: what a bell that a client did not
/// ring, or that was lost, costs that client.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);
/// How long a claimed submission slot may stay unpublished, and a list incomplete.
const PATIENCE: Duration = Duration::from_secs(10);

/// When each kind of upkeep ran last.
pub(super) struct Clocks {
    started: Instant,
    short: Instant,
    long: Instant,
    published: Instant,
    /// When the rows of the SSD shards were written, if they were.
    shards: Option<Instant>,
}

impl Clocks {
    pub(super) fn new(now: Instant) -> Clocks {
        Clocks {
            started: now,
            short: now,
            long: now,
            published: now,
            shards: None,
        }
    }
}

impl<M: Machine> Lane<M> {
    /// Does what is due. Cheap when nothing is.
    pub(super) fn upkeep(&mut self, now: Instant) {
        if now.duration_since(self.clocks.short) < SHORT_TICK {
            return;
        }
        self.clocks.short = now;
        self.tell_time(now);
        // A client that submits without a pause keeps the lane from sleeping, not from stopping.
        self.settle_drain();
        let mut ended = std::mem::take(&mut self.ended);
        self.leases.expire(now, &mut ended);
        self.finish_leases(ended.drain(..));
        self.ended = ended;
        self.tier_upkeep(now);
        if now.duration_since(self.clocks.long) >= LONG_TICK {
            self.clocks.long = now;
            self.cache.drop_expired_unfinished();
            self.check_patience(now);
            self.check_stuck();
        }
        if now.duration_since(self.clocks.published) >= PUBLISH_TICK {
            self.publish(now);
        }
    }

    /// Tells the cache how old its unfinished blocks are.
    pub(super) fn tell_time(&mut self, now: Instant) {
        let age = now.duration_since(self.clocks.started);
        self.cache.tell_time(age.as_secs() as u32);
    }

    /// How long something that began at `start` has taken.
    pub(super) fn since(&self, start: Instant) -> Duration {
        self.clock.now().duration_since(start)
    }

    /// How long the lane may sleep; `None` until it is woken.
    pub(super) fn sleep_limit(&self, now: Instant) -> Option<Duration> {
        let lease = self
            .leases
            .next_deadline()
            .map(|at| at.saturating_duration_since(now).max(SHORT_TICK));
        let listing = self
            .sessions
            .iter()
            .flatten()
            .any(|session| !session.requests.is_empty());
        let patience = (listing || self.suspect_gap || self.cache.figures().unfinished > 0)
            .then_some(LONG_TICK);
        let watch = (!self.by_id.is_empty()).then_some(LONGEST_SLEEP);
        let tier = self
            .tier_deadline()
            .map(|at| at.saturating_duration_since(now).max(SHORT_TICK));
        [lease, patience, watch, tier].into_iter().flatten().min()
    }

    /// Ends sessions whose ring has a gap, or that left a list unfinished, for too long.
    fn check_patience(&mut self, now: Instant) {
        let mut faults = Vec::new();
        self.suspect_gap = false;
        for session in self.sessions.iter_mut().flatten() {
            if session.faulted || session.closing.is_some() {
                continue;
            }
            let stalled = session.is_stalled();
            self.suspect_gap |= stalled;
            if !stalled {
                session.stalled_since = None;
            } else if now.duration_since(*session.stalled_since.get_or_insert(now)) > PATIENCE {
                faults.push((session.id, SessionFault::Stalled(PATIENCE.as_secs())));
                continue;
            }
            let late = session.requests.iter().find(|(_, request)| {
                let list = request.list();
                !list.listed && now.duration_since(list.started) > PATIENCE
            });
            if let Some((id, _)) = late {
                faults.push((session.id, SessionFault::Abandoned(*id, PATIENCE.as_secs())));
            }
        }
        for (session, fault) in faults {
            self.with_session(session, |_, _| Err(fault));
        }
    }

    /// Publishes counters, gauges and tables.
    pub(super) fn publish(&mut self, now: Instant) {
        self.clocks.published = now;
        let evictions = self.cache.take_evictions();
        self.tally.add(Counter::EvictedCapacity, evictions.capacity);
        self.tally.add(Counter::EvictedExtent, evictions.extent);
        self.tally
            .add(Counter::EvictedIncomplete, evictions.incomplete);
        self.tally.add(Counter::SsdUnwritten, evictions.unwritten);
        self.tally.publish(&self.node);
        let figures = self.cache.figures();
        let node = &self.node;
        node.set(Gauge::PoolUsedBytes, figures.used_bytes);
        node.set(Gauge::PoolExtentsUsed, figures.used_extents);
        node.set(Gauge::BlocksHeld, figures.sealed);
        node.set(Gauge::BlocksUnfinished, figures.unfinished);
        node.set(Gauge::BlocksPinned, figures.pinned);
        node.set(Gauge::Leases, self.leases.given() as u64);
        node.set(Gauge::Sessions, self.by_id.len() as u64);
        node.set(Gauge::Instances, self.registry.iter().count() as u64);
        let ready = self
            .registry
            .iter()
            .filter(|instance| instance.ready.is_some())
            .count();
        node.set(Gauge::InstancesReady, ready as u64);
        node.set(Gauge::CopyTasks, self.tasks.len() as u64);
        node.set(Gauge::CopyTasksStuck, self.stuck_tasks());
        if let Some(tier) = &mut self.tier {
            let (down, up) = tier.under_way();
            node.set(Gauge::SsdWriting, u64::from(down));
            node.set(Gauge::SsdReading, u64::from(up));
            node.set(Gauge::Prefetches, tier.prefetches.len() as u64);
            let is_fresh = |at: Instant| now.duration_since(at) < PUBLISH_TICK;
            if !self.clocks.shards.is_some_and(is_fresh) {
                self.clocks.shards = Some(now);
                let shards = tier.store.shards();
                tier.told_health.tell(&shards);
                for (position, shard) in shards.iter().enumerate() {
                    node.write_ssd(position, &ssd_row(shard));
                }
            }
        }
        let requests: usize = self
            .sessions
            .iter()
            .flatten()
            .map(|s| s.requests.len())
            .sum();
        node.set(Gauge::Requests, requests as u64);
        for (position, session) in self.sessions.iter().enumerate() {
            if let Some(session) = session {
                node.write_session(position, &session.row());
            }
        }
        self.namespaces.publish(node, self.cache.held());
        self.publish_domains();
    }
}

impl<M: Machine> Lane<M> {
    /// Publishes what each isolation domain holds.
    fn publish_domains(&self) {
        let mut sessions = [0; MAX_DOMAINS];
        for session in self.sessions.iter().flatten() {
            sessions[session.domain] += 1;
        }
        for (position, domain) in self.cache.domains().iter().enumerate() {
            let row = DomainRow {
                key: domain.identity.key().0,
                used: 1,
                sessions: sessions[position],
                leases: self.leases.count_of_domain(position),
                blocks: u64::from(domain.index.writer.sealed_len()),
                bytes: domain.bytes,
                pinned: u64::from(domain.pinned),
                pins: domain.pins,
                name: text_field(domain.identity.name()),
            };
            self.node.write_domain(position, &row);
        }
    }
}

/// Figures of each namespace.
#[derive(Default)]
pub(super) struct NamespaceTable {
    rows: Vec<NamespaceRow>,
    dirty: bool,
}

impl NamespaceTable {
    fn row(&mut self, namespace: u32) -> &mut NamespaceRow {
        let position = namespace as usize;
        if self.rows.len() <= position {
            self.rows.resize(position + 1, bytemuck::Zeroable::zeroed());
        }
        self.dirty = true;
        &mut self.rows[position]
    }

    pub(super) fn note(
        &mut self,
        namespace: u32,
        domain: &str,
        world_size: u32,
        digest: [u8; 32],
        spec: &NamespaceSpec,
    ) {
        let row = self.row(namespace);
        row.used = 1;
        row.domain = text_field(domain);
        row.world_size = world_size;
        row.block_tokens = spec.block_tokens;
        row.digest = digest;
        row.summary = text_field(&spec.summary());
    }

    /// Shows a namespace whose blocks were taken over and whose engines have not registered yet.
    pub(super) fn note_adopted(&mut self, namespace: &Namespace, domain: &str) {
        let row = self.row(namespace.slot);
        row.used = 1;
        row.domain = text_field(domain);
        row.world_size = namespace.world_size;
        row.digest = namespace.digest;
        row.summary = text_field("(from a previous daemon)");
    }

    /// The row is free for another namespace.
    pub(super) fn forget(&mut self, namespace: u32) {
        *self.row(namespace) = bytemuck::Zeroable::zeroed();
    }

    pub(super) fn count_query(&mut self, namespace: u32, queried: u64, hits: u64) {
        let row = self.row(namespace);
        row.queried += queried;
        row.hits += hits;
    }

    fn publish(&mut self, node: &NodeWriter, held: &[Held]) {
        for (position, row) in self.rows.iter_mut().enumerate() {
            let now = held.get(position).copied().unwrap_or_default();
            if (row.blocks, row.bytes) != (now.blocks, now.bytes) {
                (row.blocks, row.bytes) = (now.blocks, now.bytes);
                self.dirty = true;
            }
        }
        if !std::mem::take(&mut self.dirty) {
            return;
        }
        for (position, row) in self.rows.iter().enumerate() {
            node.write_namespace(position, row);
        }
        node.set(
            Gauge::Namespaces,
            self.rows.iter().filter(|row| row.used == 1).count() as u64,
        );
    }
}
