//! The invariants of the design page, each as a check of the whole state.

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::cache::block::Shard;
use crate::cache::inspect::BlockView;
use crate::clock::Clock;
use crate::copy::{Direction, PageCopy};
use crate::sim::drives::DriveRequest;
use crate::sim::kv::Content;
use crate::sim::truth::{Checked, ensure};
use crate::sim::world::{Daemon, World};

/// How late a lease may end: the lane looks once a millisecond.
const LATE: Duration = Duration::from_millis(2);
/// Places in queues beyond those that are in use.
const SLACK: usize = 1024;

/// Where blocks lie, gathered once for all checks.
pub struct Picture {
    pub blocks: Vec<BlockView>,
    /// Block and shard of each page.
    pages: BTreeMap<u64, (usize, u16)>,
    /// Tasks that have not drained.
    tasks: Vec<(Direction, Vec<PageCopy>)>,
    /// Requests to drives whose end the lane has not heard of.
    unheard: Vec<DriveRequest>,
}

impl World {
    /// Checks everything that must hold between two steps. `turned` right after the lane did what
    /// was due.
    pub fn check(&mut self, turned: bool) -> Checked {
        self.absorb()?;
        let Some(daemon) = &self.daemon else {
            return Ok(());
        };
        let picture = self.inv_2_a_page_has_one_owner(daemon)?;
        self.inv_1_visible_only_after_every_copy(daemon, &picture)?;
        self.inv_2_no_page_is_reused_under_a_copy(&picture)?;
        self.inv_4_pins_are_those_of_leases(daemon, &picture)?;
        if turned {
            self.inv_4_every_lease_ends(daemon)?;
        }
        self.inv_7_the_catalog_names_sealed_blocks_alone(daemon, &picture)?;
        self.inv_8_the_tier_is_within_its_bounds(daemon, &picture.unheard)?;
        self.inv_8_nothing_is_above_its_maximum(daemon)
    }

    /// What a shard of a block should hold; `None` where nobody can tell.
    pub fn expected(&self, daemon: &Daemon, block: &BlockView, shard: u16) -> Option<Content> {
        let key = block.key?;
        let namespace = daemon.lane.cache().catalog().namespace_in(key.namespace)?;
        let digest = (namespace.domain_key, namespace.digest);
        let namespace = *self.by_digest.get(&digest)?;
        if self.plan.namespaces[namespace].hostile {
            return None;
        }
        Some(Content {
            namespace,
            group: key.group,
            hash: *self.numbers.get(&key.hash())?,
            shard,
            version: 0,
        })
    }

    pub fn inv_1_visible_only_after_every_copy(
        &self,
        daemon: &Daemon,
        picture: &Picture,
    ) -> Checked {
        const NAME: &str = "inv_1_visible_only_after_every_copy";
        for view in &picture.blocks {
            let block = &view.block;
            ensure(block.sealed == view.readable, NAME, || {
                format!("cache and index do not agree: {view:?}")
            })?;
            if !view.readable {
                continue;
            }
            ensure(
                block.shards_in == block.shards && block.copying == 0,
                NAME,
                || format!("sealed without all its shards: {view:?}"),
            )?;
            for (shard, place) in (0u16..).zip(&view.shards) {
                let Shard::In(page) = place else {
                    return ensure(false, NAME, || format!("shard {shard} is not in: {view:?}"));
                };
                let Some(expected) = self.expected(daemon, view, shard) else {
                    continue;
                };
                let found = self.truth.pages.get(&page.offset());
                ensure(
                    found.is_some_and(|found| found.same_shard(&expected)),
                    NAME,
                    || format!("page {page} holds {found:?} instead of {expected:?}: {view:?}"),
                )?;
            }
        }
        Ok(())
    }

    pub fn inv_2_a_page_has_one_owner(
        &self,
        daemon: &Daemon,
    ) -> Result<Picture, crate::sim::truth::Violation> {
        const NAME: &str = "inv_2_a_page_has_one_owner";
        let cache = daemon.lane.cache();
        let blocks = cache.block_views();
        let mut pages = BTreeMap::new();
        let mut bytes = vec![0; cache.domain_count()];
        for (at, view) in blocks.iter().enumerate() {
            for (shard, place) in (0u16..).zip(&view.shards) {
                let (Shard::In(page) | Shard::Copying(page)) = place else {
                    continue;
                };
                let size = cache.pool().page_bytes_of(*page);
                ensure(size.is_ok(), NAME, || {
                    format!("{page} is not allocated: {view:?}")
                })?;
                bytes[view.domain] += u64::from(size.unwrap_or(0));
                let other = pages.insert(page.offset(), (at, shard));
                ensure(other.is_none(), NAME, || {
                    let other = other.map(|(other, _)| &blocks[other]);
                    format!("{page} is held twice: {view:?} and {other:?}")
                })?;
            }
        }
        let stats = cache.pool().stats();
        let total = bytes.iter().sum::<u64>();
        ensure(
            stats.used_bytes == total
                && stats.used_bytes + stats.free_bytes + stats.unusable_bytes == stats.pool_bytes,
            NAME,
            || format!("blocks hold {total} bytes: {stats:?}"),
        )?;
        for (domain, bytes) in bytes.iter().enumerate() {
            let counted = cache.domain_ref(domain).bytes;
            ensure(counted == *bytes, NAME, || {
                format!("domain {domain} counts {counted} bytes and holds {bytes}")
            })?;
        }
        let mut tasks: Vec<_> = daemon
            .copies
            .views()
            .into_iter()
            .map(|task| (task.direction, task.pages))
            .collect();
        tasks.extend(daemon.lane.waiting_tasks());
        let unheard = self.unheard_of_drives(daemon);
        tasks.extend(unheard.iter().map(DriveRequest::as_task));
        Ok(Picture {
            blocks,
            pages,
            tasks,
            unheard,
        })
    }

    pub fn inv_2_no_page_is_reused_under_a_copy(&self, picture: &Picture) -> Checked {
        const NAME: &str = "inv_2_no_page_is_reused_under_a_copy";
        let mut copying = BTreeSet::new();
        for (direction, pages) in &picture.tasks {
            for page in pages {
                let offset = page.pool_offset;
                let owner = picture.pages.get(&offset);
                let (view, shard) = match owner {
                    Some((at, shard)) => (&picture.blocks[*at], *shard),
                    None => {
                        return ensure(false, NAME, || {
                            format!("page {offset:#x} is free while a {direction:?} touches it")
                        });
                    }
                };
                let place = view.shards[usize::from(shard)];
                let right = match direction {
                    Direction::Save => copying.insert(offset) && matches!(place, Shard::Copying(_)),
                    Direction::Load => matches!(place, Shard::In(_)) && view.block.pins > 0,
                };
                ensure(right, NAME, || {
                    format!("page {offset:#x} is touched by a {direction:?}: {view:?}")
                })?;
            }
        }
        for view in &picture.blocks {
            let running = view
                .shards
                .iter()
                .filter(|s| matches!(s, Shard::Copying(_)));
            let listed = running.clone().all(|place| match place {
                Shard::Copying(page) => copying.contains(&page.offset()),
                _ => true,
            });
            ensure(
                listed && running.count() == usize::from(view.block.copying),
                NAME,
                || format!("a shard waits for a copy that does not run: {view:?}"),
            )?;
        }
        Ok(())
    }

    pub fn inv_4_pins_are_those_of_leases(&self, daemon: &Daemon, picture: &Picture) -> Checked {
        const NAME: &str = "inv_4_pins_are_those_of_leases";
        let mut pins: BTreeMap<(usize, u32), u32> = BTreeMap::new();
        let leases = daemon.lane.leases();
        let leased = leases.iter().flat_map(|(_, lease)| {
            let domain = lease.domain;
            lease.entries.iter().map(move |entry| (domain, *entry))
        });
        for pinned in leased.chain(daemon.lane.pins_of_queries()) {
            *pins.entry(pinned).or_default() += 1;
        }
        for view in &picture.blocks {
            let held = pins.remove(&(view.domain, view.entry.0)).unwrap_or(0);
            ensure(
                held == view.block.pins && (held == 0 || view.readable),
                NAME,
                || format!("leases and queries hold it {held} times: {view:?}"),
            )?;
        }
        ensure(pins.is_empty(), NAME, || {
            format!("pins of blocks that are gone: {pins:?}")
        })?;
        for domain in 0..daemon.lane.cache().domain_count() {
            let home = daemon.lane.cache().domain_ref(domain);
            let own = picture.blocks.iter().filter(|view| view.domain == domain);
            let all: u64 = own.clone().map(|view| u64::from(view.block.pins)).sum();
            let blocks = own.filter(|view| view.block.pins > 0).count();
            ensure(
                home.pins == all && home.pinned as usize == blocks,
                NAME,
                || {
                    format!(
                        "{} pins of {} blocks, counted {all} and {blocks}",
                        home.pins, home.pinned
                    )
                },
            )?;
        }
        for (id, lease) in leases.iter() {
            let Some(given) = self.truth.leases.get(&id) else {
                continue;
            };
            let held = lease.entries.iter().map(|entry| {
                let view = picture
                    .blocks
                    .iter()
                    .find(|view| view.domain == lease.domain && view.entry.0 == *entry);
                let key = view.and_then(|view| view.key);
                key.and_then(|key| self.numbers.get(&key.hash()).copied())
            });
            let same = held.eq(given.hits.iter().map(|hash| Some(*hash)));
            ensure(same, "inv_3_a_lease_holds_what_was_answered", || {
                format!("lease {id:#x}: {given:?} and {lease:?}")
            })?;
        }
        Ok(())
    }

    pub fn inv_4_every_lease_ends(&self, daemon: &Daemon) -> Checked {
        let now = self.clock.now();
        if now.duration_since(daemon.started) > LATE {
            let overdue = daemon.lane.overdue(now - LATE);
            ensure(overdue == 0, "inv_6_nobody_waits_beyond_his_time", || {
                format!("{overdue} requests wait for the tier, and should not any more")
            })?;
        }
        for (id, lease) in daemon.lane.leases().iter() {
            ensure(
                lease.copies() > 0 || lease.deadline + LATE >= now,
                "inv_4_every_lease_ends",
                || format!("lease {id:#x} is past its time: {lease:?}"),
            )?;
        }
        Ok(())
    }

    pub fn inv_7_the_catalog_names_sealed_blocks_alone(
        &self,
        daemon: &Daemon,
        picture: &Picture,
    ) -> Checked {
        const NAME: &str = "inv_7_the_catalog_names_sealed_blocks_alone";
        let cache = daemon.lane.cache();
        for view in &picture.blocks {
            for (shard, place) in (0u8..).zip(&view.shards) {
                let (Shard::In(page) | Shard::Copying(page)) = place else {
                    continue;
                };
                let record = cache.catalog().record(*page);
                let Some(key) = view.key.filter(|_| view.readable) else {
                    ensure(record.is_none(), NAME, || {
                        format!("{record:?} of a block that is not sealed: {view:?}")
                    })?;
                    continue;
                };
                let same = record.as_ref().is_some_and(|record| {
                    (record.namespace, record.group, record.hash)
                        == (key.namespace, key.group, key.hash())
                        && record.rank == shard
                        && u16::from(record.shards) == view.block.shards
                });
                ensure(same, NAME, || format!("{record:?} of {view:?}"))?;
            }
        }
        Ok(())
    }

    pub fn inv_8_nothing_is_above_its_maximum(&self, daemon: &Daemon) -> Checked {
        let lane = &daemon.lane;
        let cache = lane.cache();
        let leases = lane.leases();
        let figures = cache.figures();
        let (entries, pages) = lane.spare_lists();
        let sessions = lane.sessions();
        let mut limits = vec![
            ("leases", leases.len(), self.plan.max_leases),
            (
                "deadlines",
                leases.deadlines_len(),
                2 * leases.len() + SLACK + 1,
            ),
            ("sessions", sessions.len(), self.plan.max_sessions),
            (
                "copy tasks",
                daemon.copies.views().len(),
                self.plan.max_copy_tasks,
            ),
            ("entry lists", entries, 64),
            ("page lists", pages, 256),
            (
                "unfinished blocks in the queue",
                cache.unfinished_queue_len(),
                2 * figures.unfinished as usize + SLACK + 1,
            ),
        ];
        let blocks = self.plan.max_blocks as usize;
        for domain in 0..cache.domain_count() {
            let home = cache.domain_ref(domain);
            limits.push(("blocks", home.index.writer.len() as usize, blocks));
            limits.push(("pins", home.pins as usize, 8 * blocks));
        }
        for session in &sessions {
            limits.push((
                "requests",
                session.requests,
                session.completion_slots as usize,
            ));
            limits.push(("listed blocks", session.listed_blocks, blocks));
        }
        let copies: u32 = sessions.iter().map(|session| session.copies).sum();
        ensure(
            copies as usize == lane.tasks(),
            "inv_8_nothing_is_above_its_maximum",
            || format!("sessions count {copies} copies, the lane {}", lane.tasks()),
        )?;
        for (what, found, most) in limits {
            ensure(found <= most, "inv_8_nothing_is_above_its_maximum", || {
                format!("{found} {what}, at most {most}")
            })?;
        }
        Ok(())
    }
}
