//! Leases: time-limited holds on an ordered list of blocks.
//!
//! A lease id carries a generation, so that an id from the past never names a later lease. Under a
//! mask made from the boot id it means nothing to the next daemon: an id of another boot would have
//! to hit one of the live leases by chance, at most 2^24 of 2^64 numbers. Engines hand ids from
//! process to process, so it is the daemon that has to tell.
//!
//! Each worker rank loads from a lease once; the lease ends when the last one has, when it is
//! released, replaced or expired, or when its session goes. Whatever ends it, its blocks stay
//! pinned until the copies that use them have drained.

#![forbid(unsafe_code)]

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::time::Instant;

use pegaflow_shm::BootId;
use pegaflow_shm::node::SESSION_ROWS;
use pegaflow_shm::status::Status;

use crate::cache::MAX_DOMAINS;
use crate::cache::domain::DomainId;
use crate::isolation::share::{allowance, may_take};

/// Deadlines of ended leases that may stay in the queue beyond one for each live lease.
const DEADLINE_SLACK: usize = 1024;

/// What a repeated query is recognised by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RequestKey {
    /// The registry's number of the instance.
    pub instance: u64,
    /// Cache group.
    pub group: u16,
    /// The engine's request key.
    pub key: u64,
}

/// Why a lease ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseEnd {
    /// Every worker has loaded.
    Consumed,
    /// Given back.
    Released,
    /// Past its time to live.
    Expired,
    /// A query with the same key and other hashes took its place.
    Replaced,
    /// Its session ended.
    OwnerGone,
}

/// A live lease.
#[derive(Debug)]
pub struct Lease {
    /// Isolation domain of its blocks.
    pub domain: DomainId,
    /// Namespace of its blocks.
    pub namespace: u32,
    /// Session that holds it.
    pub session: u64,
    /// Place of that session in the lane's list.
    pub place: usize,
    /// Identity of the query.
    pub request: RequestKey,
    /// Hashes asked for.
    pub total: u32,
    /// Digest of the hashes asked for.
    pub digest: u64,
    /// Pinned entries, in the order of the hits.
    pub entries: Vec<u32>,
    /// Hits, as the query answered them (bitmap for membership queries).
    pub hits: Vec<u64>,
    /// When it expires.
    pub deadline: Instant,
    /// Time to live it was given, in ms.
    pub ttl_ms: u64,
    /// Ranks that may load.
    pub world_size: u32,
    consumers: u128,
    copies: u32,
    ending: Option<LeaseEnd>,
}

struct Slot {
    generation: u32,
    lease: Option<Lease>,
    last_end: Option<LeaseEnd>,
}

/// A lease whose blocks can be let go of.
#[derive(Debug)]
pub struct Ended {
    /// Its id.
    pub id: u64,
    /// Why.
    pub end: LeaseEnd,
    /// The lease.
    pub lease: Lease,
}

/// All live leases.
pub struct LeaseTable {
    /// What an id is masked with; see the head of this file.
    mask: u64,
    slots: Vec<Slot>,
    free: Vec<u32>,
    by_request: HashMap<RequestKey, u64>,
    deadlines: BinaryHeap<Reverse<(Instant, u64)>>,
    max_leases: usize,
    live: usize,
    /// Of these, those that are promised.
    promised: usize,
    /// Live leases of each domain.
    by_domain: [u32; MAX_DOMAINS],
    /// What the session at each place of the lane's list holds. A lease that outlives its session
    /// by the copies that use it counts for whoever has the place by then.
    by_place: Box<[Holding; SESSION_ROWS]>,
}

/// What a session holds by its leases.
#[derive(Clone, Copy, Default)]
struct Holding {
    leases: u32,
    pins: u64,
}

impl LeaseTable {
    /// An empty table of at most `max_leases`, whose ids mean nothing in any other boot.
    pub fn new(max_leases: usize, boot_id: &BootId) -> LeaseTable {
        let number = u128::from_le_bytes(*boot_id);
        LeaseTable {
            mask: (number ^ number >> 64) as u64,
            slots: Vec::new(),
            free: Vec::new(),
            by_request: HashMap::new(),
            deadlines: BinaryHeap::new(),
            max_leases,
            live: 0,
            promised: 0,
            by_domain: [0; MAX_DOMAINS],
            by_place: Box::new([Holding::default(); SESSION_ROWS]),
        }
    }

    /// Live leases, those that are promised or only wait for copies included.
    pub fn len(&self) -> usize {
        self.live
    }

    /// Leases that were given and have not ended.
    pub fn given(&self) -> usize {
        self.live - self.promised
    }

    /// True when there is none.
    pub fn is_empty(&self) -> bool {
        self.live == 0
    }

    /// Whether a session, by its place, may be given a lease on `pins` more blocks: neither it nor
    /// its domain may come to hold all leases or, with `pins_left` of the domain, all pins.
    pub fn has_room(&self, place: usize, domain: DomainId, pins: u64, pins_left: u64) -> bool {
        let free = self.max_leases.saturating_sub(self.live) as u64;
        // A session's share is one of what its domain has left, so that it leaves some there, too.
        let of_domain = allowance(u64::from(self.by_domain[domain]), free);
        let holding = self.by_place[place];
        may_take(u64::from(holding.leases), of_domain) && pins <= allowance(holding.pins, pins_left)
    }

    /// Sets a lease with `pins` aside for a query whose blocks are still on their way. It counts as
    /// one that was given, until [`Self::take_back`].
    pub fn promise(&mut self, place: usize, domain: DomainId, pins: u64) {
        self.live += 1;
        self.promised += 1;
        self.by_domain[domain] += 1;
        let holding = &mut self.by_place[place];
        holding.leases += 1;
        holding.pins += pins;
    }

    /// Takes a promise back: kept by a lease, or not wanted any more.
    pub fn take_back(&mut self, place: usize, domain: DomainId, pins: u64) {
        self.live -= 1;
        self.promised -= 1;
        self.by_domain[domain] -= 1;
        let holding = &mut self.by_place[place];
        holding.leases -= 1;
        holding.pins -= pins;
    }

    /// Live leases of a domain.
    pub fn count_of_domain(&self, domain: DomainId) -> u64 {
        u64::from(self.by_domain[domain])
    }

    /// Takes a lease in and returns its id.
    pub fn grant(&mut self, lease: Lease) -> u64 {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot {
                generation: 0,
                lease: None,
                last_end: None,
            });
            (self.slots.len() - 1) as u32
        });
        let place = &mut self.slots[slot as usize];
        let mut id = 0;
        // 0 is no lease.
        while id == 0 {
            place.generation = place.generation.wrapping_add(1);
            id = make_id(self.mask, place.generation, slot);
        }
        self.by_request.insert(lease.request, id);
        self.deadlines.push(Reverse((lease.deadline, id)));
        self.by_domain[lease.domain] += 1;
        let holding = &mut self.by_place[lease.place];
        holding.leases += 1;
        holding.pins += lease.entries.len() as u64;
        place.lease = Some(lease);
        self.live += 1;
        if self.deadlines.len() > 2 * self.live + DEADLINE_SLACK {
            self.forget_ended_deadlines();
        }
        id
    }

    /// Leases that ended early leave their deadline in the queue; this takes them all out.
    fn forget_ended_deadlines(&mut self) {
        self.deadlines = self
            .iter()
            .map(|(id, lease)| Reverse((lease.deadline, id)))
            .collect();
    }

    /// The position of a lease's slot, for tables.
    pub fn position(&self, id: u64) -> usize {
        ((id ^ self.mask) & u64::from(u32::MAX)) as usize
    }

    fn generation(&self, id: u64) -> u32 {
        ((id ^ self.mask) >> 32) as u32
    }

    /// A live lease that is not ending.
    ///
    /// # Errors
    /// The status that tells the caller what became of it.
    pub fn get(&self, id: u64) -> Result<&Lease, Status> {
        let slot = self
            .slots
            .get(self.position(id))
            .ok_or(Status::UnknownLease)?;
        if slot.generation != self.generation(id) {
            return Err(Status::UnknownLease);
        }
        match &slot.lease {
            Some(lease) => match lease.ending {
                None => Ok(lease),
                Some(end) => Err(status_of(end)),
            },
            None => Err(slot.last_end.map_or(Status::UnknownLease, status_of)),
        }
    }

    fn slot_mut(&mut self, id: u64) -> Option<&mut Lease> {
        let (position, generation) = (self.position(id), self.generation(id));
        let slot = self.slots.get_mut(position)?;
        if slot.generation != generation {
            return None;
        }
        slot.lease.as_mut()
    }

    /// The live lease of an earlier query with the same identity.
    pub fn of_request(&self, request: &RequestKey) -> Option<u64> {
        self.by_request.get(request).copied()
    }

    /// Marks a rank as having loaded, and counts `copies` tasks that now use the lease's blocks.
    ///
    /// # Errors
    /// The lease is gone, or this rank has loaded from it.
    pub fn consume(&mut self, id: u64, rank: u32, copies: u32) -> Result<(), Status> {
        self.check_consume(id, rank)?;
        if let Some(lease) = self.slot_mut(id) {
            lease.consumers |= 1 << rank;
            lease.copies += copies;
        }
        Ok(())
    }

    /// What [`Self::consume`] would answer.
    ///
    /// # Errors
    /// As [`Self::consume`].
    pub fn check_consume(&self, id: u64, rank: u32) -> Result<(), Status> {
        let lease = self.get(id)?;
        if rank >= 128 || lease.consumers & (1 << rank) != 0 {
            return Err(Status::LeaseConsumed);
        }
        Ok(())
    }

    /// One copy task that used the lease has drained. Yields the lease if that ended it.
    pub fn copy_drained(&mut self, id: u64) -> Option<Ended> {
        let lease = self.slot_mut(id)?;
        debug_assert!(lease.copies > 0);
        lease.copies = lease.copies.saturating_sub(1);
        self.settle(id)
    }

    /// Ends a consumed or ending lease that no copy uses any more.
    pub fn settle(&mut self, id: u64) -> Option<Ended> {
        let lease = self.slot_mut(id)?;
        if lease.copies > 0 {
            return None;
        }
        let all = lease.consumers.count_ones() >= lease.world_size;
        let end = lease.ending.or(all.then_some(LeaseEnd::Consumed))?;
        self.remove(id, end)
    }

    /// Ends a lease: at once, or when its copies have drained.
    pub fn end(&mut self, id: u64, end: LeaseEnd) -> Option<Ended> {
        let lease = self.slot_mut(id)?;
        lease.ending.get_or_insert(end);
        self.settle(id)
    }

    fn remove(&mut self, id: u64, end: LeaseEnd) -> Option<Ended> {
        let position = self.position(id);
        let slot = self.slots.get_mut(position)?;
        let lease = slot.lease.take()?;
        slot.last_end = Some(end);
        self.free.push(position as u32);
        if self.by_request.get(&lease.request) == Some(&id) {
            self.by_request.remove(&lease.request);
        }
        self.live -= 1;
        self.by_domain[lease.domain] -= 1;
        let holding = &mut self.by_place[lease.place];
        holding.leases -= 1;
        holding.pins -= lease.entries.len() as u64;
        Some(Ended { id, end, lease })
    }

    /// Moves a lease's deadline back; an earlier one than it has changes nothing.
    ///
    /// # Errors
    /// The lease is gone.
    pub fn extend(&mut self, id: u64, deadline: Instant, ttl_ms: u64) -> Result<(), Status> {
        self.get(id)?;
        // The queue of deadlines is not touched: `expire` puts a lease that is not due back in, so
        // a client that extends in a loop cannot make it grow.
        if let Some(lease) = self.slot_mut(id).filter(|lease| lease.deadline < deadline) {
            lease.deadline = deadline;
            lease.ttl_ms = ttl_ms;
        }
        Ok(())
    }

    /// Ends leases past their deadline and appends those whose blocks can be let go of.
    pub fn expire(&mut self, now: Instant, ended: &mut Vec<Ended>) {
        while let Some(Reverse((deadline, id))) = self.deadlines.peek().copied() {
            if deadline > now {
                break;
            }
            self.deadlines.pop();
            match self.get(id).map(|lease| lease.deadline) {
                Ok(deadline) if deadline <= now => {
                    ended.extend(self.end(id, LeaseEnd::Expired));
                }
                Ok(deadline) => self.deadlines.push(Reverse((deadline, id))),
                Err(_) => {}
            }
        }
    }

    /// When the next lease may expire.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines
            .peek()
            .map(|Reverse((deadline, _))| *deadline)
    }

    /// Deadlines in the queue, those of leases that ended early included.
    #[cfg(test)]
    pub fn deadlines_len(&self) -> usize {
        self.deadlines.len()
    }

    /// Ids of the leases of a session.
    pub fn of_session(&self, session: u64) -> Vec<u64> {
        self.iter()
            .filter(|(_, lease)| lease.session == session)
            .map(|(id, _)| id)
            .collect()
    }

    /// Ids of the leases of an instance.
    pub fn of_instance(&self, instance: u64) -> Vec<u64> {
        self.iter()
            .filter(|(_, lease)| lease.request.instance == instance)
            .map(|(id, _)| id)
            .collect()
    }

    /// Live leases with their ids, those that only wait for copies included.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &Lease)> {
        self.slots
            .iter()
            .enumerate()
            .filter_map(|(position, slot)| {
                let id = make_id(self.mask, slot.generation, position as u32);
                slot.lease.as_ref().map(|lease| (id, lease))
            })
    }
}

impl Lease {
    /// A lease nobody has used.
    #[expect(
        clippy::too_many_arguments,
        reason = "each is a different field of the lease"
    )]
    pub fn new(
        domain: DomainId,
        namespace: u32,
        session: u64,
        request: RequestKey,
        asked: (u32, u64),
        entries: Vec<u32>,
        hits: Vec<u64>,
        ttl: (Instant, u64),
        world_size: u32,
    ) -> Lease {
        Lease {
            domain,
            namespace,
            session,
            place: 0,
            request,
            total: asked.0,
            digest: asked.1,
            entries,
            hits,
            deadline: ttl.0,
            ttl_ms: ttl.1,
            world_size,
            consumers: 0,
            copies: 0,
            ending: None,
        }
    }

    /// Ranks that have loaded.
    pub fn consumed_by(&self) -> u32 {
        self.consumers.count_ones()
    }

    /// Copies that use its blocks.
    pub fn copies(&self) -> u32 {
        self.copies
    }
}

fn make_id(mask: u64, generation: u32, slot: u32) -> u64 {
    (u64::from(generation) << 32 | u64::from(slot)) ^ mask
}

fn status_of(end: LeaseEnd) -> Status {
    match end {
        LeaseEnd::Consumed => Status::LeaseConsumed,
        LeaseEnd::Expired => Status::LeaseExpired,
        LeaseEnd::Released | LeaseEnd::Replaced | LeaseEnd::OwnerGone => Status::UnknownLease,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const BOOT: BootId = *b"one boot, 16 B. ";

    fn lease(world_size: u32, deadline: Instant) -> Lease {
        let request = RequestKey {
            instance: 1,
            group: 0,
            key: 7,
        };
        Lease::new(
            0,
            0,
            1,
            request,
            (3, 9),
            vec![1, 2, 3],
            vec![],
            (deadline, 10),
            world_size,
        )
    }

    fn later() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn each_rank_loads_once_and_the_last_ends_it() {
        let mut table = LeaseTable::new(8, &BOOT);
        let id = table.grant(lease(2, later()));
        assert_eq!(table.consume(id, 0, 1), Ok(()));
        assert_eq!(table.consume(id, 0, 1), Err(Status::LeaseConsumed));
        assert!(table.copy_drained(id).is_none());
        assert_eq!(table.consume(id, 1, 1), Ok(()));
        let ended = table.copy_drained(id).unwrap();
        assert_eq!(
            (ended.end, ended.lease.entries.len()),
            (LeaseEnd::Consumed, 3)
        );
        assert_eq!(table.get(id).err(), Some(Status::LeaseConsumed));
        assert!(table.is_empty());
    }

    #[test]
    fn expiry_waits_for_copies() {
        let mut table = LeaseTable::new(8, &BOOT);
        let now = Instant::now();
        let id = table.grant(lease(2, now));
        table.consume(id, 0, 2).unwrap();
        let mut ended = Vec::new();
        table.expire(now + Duration::from_secs(1), &mut ended);
        assert!(ended.is_empty());
        assert_eq!(table.get(id).err(), Some(Status::LeaseExpired));
        assert_eq!(table.consume(id, 1, 1), Err(Status::LeaseExpired));
        assert!(table.copy_drained(id).is_none());
        assert_eq!(table.copy_drained(id).unwrap().end, LeaseEnd::Expired);
    }

    #[test]
    fn leases_that_end_early_do_not_pile_up() {
        let mut table = LeaseTable::new(8, &BOOT);
        for _ in 0..10 * DEADLINE_SLACK {
            let id = table.grant(lease(1, later()));
            table.end(id, LeaseEnd::Released).unwrap();
        }
        assert!(table.deadlines.len() <= DEADLINE_SLACK + 2 && table.slots.len() == 1);
    }

    #[test]
    fn an_old_id_never_names_a_later_lease() {
        let mut table = LeaseTable::new(8, &BOOT);
        let first = table.grant(lease(1, later()));
        assert!(table.end(first, LeaseEnd::Released).is_some());
        let second = table.grant(lease(1, later()));
        assert_eq!(table.position(first), table.position(second));
        assert_eq!(table.get(first).err(), Some(Status::UnknownLease));
        assert!(table.end(first, LeaseEnd::Released).is_none());
        assert!(table.get(second).is_ok());
        assert!(table.get(0).is_err() && table.get(u64::MAX).is_err());
    }

    #[test]
    fn an_id_of_another_boot_names_nothing() {
        let mut first = LeaseTable::new(64, &BOOT);
        let ids: Vec<u64> = (0..64).map(|_| first.grant(lease(1, later()))).collect();
        for boot in [*b"other boot, 16 B", *b"0123456789abcdef", [0x80; 16]] {
            let mut second = LeaseTable::new(64, &boot);
            let live: Vec<u64> = (0..64).map(|_| second.grant(lease(1, later()))).collect();
            assert_eq!(second.of_session(1), live);
            for id in &ids {
                assert_eq!(second.get(*id).err(), Some(Status::UnknownLease));
                assert!(second.end(*id, LeaseEnd::Released).is_none());
                assert!(second.copy_drained(*id).is_none());
            }
            assert_eq!(second.len(), 64);
        }
    }

    #[test]
    fn no_lease_has_the_id_that_says_none() {
        // The mask of this boot id turns the first id of the first slot into 0.
        let mut boot = BootId::default();
        boot[4] = 1;
        let mut table = LeaseTable::new(8, &boot);
        let id = table.grant(lease(1, later()));
        assert_ne!(id, 0);
        assert!(table.get(id).is_ok() && table.get(0).is_err());
    }

    #[test]
    fn renewal_moves_the_deadline() {
        let mut table = LeaseTable::new(8, &BOOT);
        let now = Instant::now();
        let id = table.grant(lease(1, now));
        for _ in 0..100 {
            table
                .extend(id, now + Duration::from_secs(5), 5000)
                .unwrap();
        }
        assert_eq!(
            table.deadlines.len(),
            1,
            "extending must not grow the queue"
        );
        let mut ended = Vec::new();
        table.expire(now + Duration::from_secs(1), &mut ended);
        assert!(ended.is_empty() && table.get(id).is_ok());
        table.expire(now + Duration::from_secs(6), &mut ended);
        assert_eq!(ended.len(), 1);
        assert_eq!(table.get(id).err(), Some(Status::LeaseExpired));
    }
}
