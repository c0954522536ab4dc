//! Steps and checks of the tier below the pool.

#![forbid(unsafe_code)]

use std::time::Duration;

use pegaflow_shm::desc::{Completion, flags};
use pegaflow_shm::namespace::tier_scope;
use pegaflow_shm::node::Gauge;

use crate::sim::drives::{DriveRequest, Mood, SimDrives};
use crate::sim::kv::Content;
use crate::sim::plan::TierPlan;
use crate::sim::truth::{Checked, ensure};
use crate::sim::world::{Daemon, World};
use crate::tier::{StoreKey, StoreOutcome};

/// Rounds that drives may take to end everything.
const ROUNDS: usize = 300;
/// What the lane waits before it tries something again.
pub const PAUSE: Duration = Duration::from_millis(5);
/// Blocks that each process has fetched at the end.
const FETCHED_BACK: usize = 4;

/// A query that was answered `loading`.
#[derive(Clone, Debug)]
pub struct Polled {
    pub process: usize,
    pub group: u16,
    pub key: u64,
    pub hashes: Vec<u64>,
}

/// Polled queries that are remembered.
const MOST_POLLED: usize = 8;

impl World {
    /// Some drive goes on with something.
    pub fn step_drive(&mut self) -> Checked {
        let Some((plan, drives)) = self.tier() else {
            return Ok(());
        };
        if self.rng.percent(10) {
            drives.commit();
        }
        if self.rng.percent(plan.rot) {
            drives.rot(&mut self.rng);
        }
        let numbers = drives.numbers();
        if numbers.is_empty() || self.daemon.is_none() {
            return Ok(());
        }
        let number = self.rng.pick(&numbers);
        if self.rng.percent(25) {
            let pages = self.rng.between(1, 3);
            drives.scribble_if_read(number, pages, self.rng.next());
            self.note(|| format!("request {number} goes on at its drive"));
            return Ok(());
        }
        let fails = self.rng.percent(plan.failures);
        self.end_drive_request(&drives, number, fails)
    }

    fn end_drive_request(&mut self, drives: &SimDrives, number: u64, fails: bool) -> Checked {
        let Some(request) = drives.request(number) else {
            return Ok(());
        };
        let (outcome, contents) = drives.end(number, fails);
        self.note(|| format!("request {number} ends at its drive: {outcome:?}"));
        self.count(match outcome {
            StoreOutcome::Written => "blocks written below",
            StoreOutcome::Read => "blocks read from below",
            StoreOutcome::Bad => "bad pages below",
            StoreOutcome::Failed => "drive failures",
        });
        for (span, content) in request.spans.iter().zip(contents) {
            if !request.is_write {
                self.truth.set_page(span.offset, content);
            }
        }
        self.inv_2_drives_find_their_pages_as_they_were(drives)
    }

    /// A drive stalls, fails, comes back or rots.
    pub fn step_drive_fault(&mut self) {
        let Some((_, drives)) = self.tier() else {
            return;
        };
        let drive = self.rng.below(drives.drives());
        if self.rng.percent(25) {
            self.note_line("a block rots on its drive");
            drives.rot(&mut self.rng);
            return;
        }
        let moods = [
            Mood::Fine,
            Mood::Fine,
            Mood::Stalled,
            Mood::ReadOnly,
            Mood::Down,
        ];
        let mood = self.rng.pick(&moods);
        self.note(|| format!("drive {drive} is {mood:?} from now on"));
        self.count("moods of drives");
        drives.set_mood(drive, mood);
    }

    /// The drives' faults stop.
    pub fn heal(&mut self) {
        if let Some(drives) = &self.drives {
            drives.heal();
        }
    }

    fn tier(&self) -> Option<(TierPlan, SimDrives)> {
        let plan = self.plan.tier.clone()?;
        Some((plan, self.drives.clone()?))
    }

    /// Flags and times of a query, where there is something below the pool: `arg2`, given its low
    /// half.
    pub fn draw_reach(&mut self, ttl_ms: u64) -> (u8, u64) {
        if self.drives.is_none() {
            return (0, ttl_ms);
        }
        match self.rng.below(6) {
            0 => (flags::NOW, ttl_ms),
            1 => (flags::WAIT, ttl_ms),
            2 => {
                let most = self.rng.between(1, 300) as u64;
                (flags::WAIT, ttl_ms | most << 32)
            }
            _ => (0, ttl_ms),
        }
    }

    /// A query that the process was told to repeat.
    pub fn draw_polled(&mut self, process: usize) -> Option<Polled> {
        let own = self
            .polled
            .iter()
            .filter(|polled| polled.process == process);
        let own: Vec<Polled> = own.cloned().collect();
        if own.is_empty() || self.rng.percent(30) {
            return None;
        }
        let at = self.rng.below(own.len());
        Some(own[at].clone())
    }

    /// A query is told that blocks are on their way up.
    pub fn is_loading(
        &mut self,
        process: usize,
        completion: &Completion,
        asked: (u16, u64, &[u64]),
    ) -> Checked {
        let (group, key, hashes) = asked;
        self.count("query loading");
        let coming = completion.count as usize + completion.arg0 as usize;
        ensure(
            self.drives.is_some()
                && completion.lease == 0
                && completion.arg0 > 0
                && coming <= hashes.len(),
            "inv_4_a_lease_for_hits_and_only_for_hits",
            || format!("loading {} hashes: {completion:?}", hashes.len()),
        )?;
        if self.polled.len() == MOST_POLLED {
            self.polled.pop_front();
        }
        self.polled.push_back(Polled {
            process,
            group,
            key,
            hashes: hashes.to_vec(),
        });
        Ok(())
    }

    /// Brings the truth up to what the drives were given.
    pub fn absorb_drives(&mut self) -> Checked {
        let (Some(drives), Some(daemon)) = (&self.drives, &self.daemon) else {
            return Ok(());
        };
        let copied = daemon.copies.views();
        let copied = copied.iter().flat_map(|view| &view.pages);
        let copied: Vec<u64> = copied.map(|page| page.pool_offset).collect();
        for (number, request) in drives.take_begun() {
            let contents: Vec<Option<Content>> = (request.spans.iter())
                .map(|span| self.truth.pages.get(&span.offset).copied())
                .collect();
            if request.is_write {
                drives.tell_content(number, &contents);
                continue;
            }
            for span in &request.spans {
                self.truth.pages.remove(&span.offset);
                let offset = span.offset;
                ensure(
                    !copied.contains(&offset),
                    "inv_2_no_page_is_reused_under_a_copy",
                    || format!("page {offset:#x} is given to a drive while a copy touches it"),
                )?;
            }
        }
        self.inv_2_drives_find_their_pages_as_they_were(&drives.clone())
    }

    /// Pages that drives have, for who is about to write to others.
    pub fn pages_at_drives(&self) -> Vec<u64> {
        let open = self.drives.iter().flat_map(SimDrives::open_requests);
        open.flat_map(|request| request.spans)
            .map(|span| span.offset)
            .collect()
    }

    fn inv_2_drives_find_their_pages_as_they_were(&self, drives: &SimDrives) -> Checked {
        match drives.fault() {
            Some(what) => ensure(false, "inv_2_drives_find_their_pages_as_they_were", || what),
            None => Ok(()),
        }
    }

    /// Requests whose end the lane has not heard of.
    pub fn unheard_of_drives(&self, daemon: &Daemon) -> Vec<DriveRequest> {
        let tickets = daemon.lane.tickets();
        let drives = self.drives.as_ref();
        drives.map_or(Vec::new(), |drives| drives.unheard(&tickets))
    }

    /// What the lane believes to be under way is, and no more than may be.
    pub fn inv_8_the_tier_is_within_its_bounds(
        &self,
        daemon: &Daemon,
        unheard: &[DriveRequest],
    ) -> Checked {
        const NAME: &str = "inv_8_nothing_is_above_its_maximum";
        let Some(plan) = &self.plan.tier else {
            return Ok(());
        };
        let tickets = daemon.lane.tickets();
        ensure(
            tickets.len() == unheard.len(),
            "inv_2_every_page_of_the_tier_is_accounted_for",
            || format!("the lane waits for {tickets:?}, the drives have {unheard:?}"),
        )?;
        let (writes, reads): (Vec<_>, Vec<_>) = unheard.iter().partition(|one| one.is_write);
        let bytes = |all: &[&DriveRequest]| {
            let spans = all.iter().flat_map(|one| &one.spans);
            spans.map(|span| u64::from(span.bytes)).sum::<u64>()
        };
        let pool = self.plan.extents * self.plan.extent_bytes;
        ensure(
            writes.len() <= 1 || bytes(&writes) <= pool / 4,
            NAME,
            || format!("{} bytes are written at a time", bytes(&writes)),
        )?;
        let timely = reads.len() - daemon.lane.late_fetches();
        ensure(timely <= plan.options.max_prefetch as usize, NAME, || {
            format!("{timely} blocks are fetched at a time: {plan:?}")
        })
    }

    /// Whatever the tier has taken has begun: nobody would do it while the lane sleeps.
    pub fn inv_6_a_lane_that_sleeps_holds_nothing_back(&self) -> Checked {
        let open = self.drives.iter().flat_map(SimDrives::open_requests);
        let unbegun: Vec<_> = open.filter(|request| !request.started).collect();
        ensure(
            unbegun.is_empty(),
            "inv_6_a_lane_that_sleeps_holds_nothing_back",
            || format!("the lane sleeps, and nobody has had these begin: {unbegun:?}"),
        )
    }

    /// The drives end what they have, and the lane has nothing left to do with them.
    pub fn drives_settle(&mut self) -> Checked {
        let Some((_, drives)) = self.tier() else {
            return Ok(());
        };
        for _ in 0..ROUNDS {
            self.drives_go_on()?;
            self.turn()?;
            self.check(false)?;
            self.clock.advance(PAUSE);
            let Some(daemon) = &self.daemon else {
                return Ok(());
            };
            if drives.open_requests().is_empty() && daemon.lane.tickets().is_empty() {
                return Ok(());
            }
        }
        ensure(false, "inv_6_everything_completes", || {
            let open = drives.open_requests();
            format!("the tier has work left after {ROUNDS} rounds: {open:?}")
        })
    }

    /// Every drive that is not stalled ends what it has, well.
    pub fn drives_go_on(&mut self) -> Checked {
        let Some((_, drives)) = self.tier() else {
            return Ok(());
        };
        for number in drives.numbers() {
            self.end_drive_request(&drives, number, false)?;
        }
        Ok(())
    }

    /// The node file tells what is under way.
    pub fn tier_gauges_are_true(&self) -> Checked {
        let Some(daemon) = &self.daemon else {
            return Ok(());
        };
        let unheard = self.unheard_of_drives(daemon);
        let writes = unheard.iter().filter(|one| one.is_write).count() as u64;
        let found = [
            (Gauge::SsdWriting, writes),
            (Gauge::SsdReading, unheard.len() as u64 - writes),
        ];
        for (gauge, count) in found {
            let shown = daemon.node.gauge(gauge);
            ensure(shown == count, "gauges_are_true", || {
                format!("{gauge:?} shows {shown} of {count}")
            })?;
        }
        Ok(())
    }

    /// Ranks of complete instances have blocks fetched that are below the pool.
    pub fn everything_comes_up(&mut self) -> Checked {
        let Some((_, drives)) = self.tier() else {
            return Ok(());
        };
        let pool = self.plan.extents * self.plan.extent_bytes;
        for process in 0..self.processes.len() {
            let Some(row) = self.row_of_reader(process) else {
                continue;
            };
            let Some(scope) = self.scope_of_row(row) else {
                continue;
            };
            let fits = |sizes: &[u32]| {
                let bytes: u64 = sizes.iter().map(|bytes| u64::from(*bytes)).sum();
                bytes <= pool / 2
            };
            let sound = drives.sound_blocks().into_iter();
            let own = sound.filter(|(key, sizes)| key.scope == scope && fits(sizes));
            let own: Vec<StoreKey> = own.map(|(key, _)| key).collect();
            for number in self.rng.distinct(FETCHED_BACK, own.len()) {
                let key = own[number];
                if drives.holds(&key) {
                    let hash = self.numbers[&key.hash];
                    self.count("blocks fetched back");
                    self.read_back(process, key.group, hash)?;
                }
            }
        }
        Ok(())
    }

    fn scope_of_row(&self, row: u32) -> Option<[u8; 32]> {
        let daemon = self.daemon.as_ref()?;
        let stored = daemon.lane.cache().catalog().namespace_in(row)?;
        Some(tier_scope(stored.domain_key, &stored.digest))
    }
}
