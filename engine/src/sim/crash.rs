//! Daemons die, stop and start again over the same files.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use crate::cache::block::Shard;
use crate::cache::inspect::BlockView;
use crate::fault::{Crash, CrashPoint, arm};
use crate::lane::Turned;
use crate::lane::api::CloseReason;
use crate::sim::session::{Answer, poll_once};
use crate::sim::truth::{Checked, ensure};
use crate::sim::world::{Daemon, World};

/// A block by what outlives a daemon: domain, namespace, group, hash.
pub type BlockName = (u64, [u8; 32], u16, [u8; 32]);

/// What the next daemon must and may take over.
#[derive(Clone, Debug, Default)]
pub struct Survivors {
    /// Blocks that a client could see.
    must: BTreeSet<BlockName>,
    /// Those, and others all of whose shards are in.
    may: BTreeSet<BlockName>,
}

/// Turns that a stopping daemon may take.
const STOP_TURNS: usize = 200;

fn name_of(daemon: &Daemon, view: &BlockView) -> Option<BlockName> {
    let key = view.key?;
    let namespace = daemon.lane.cache().catalog().namespace_in(key.namespace)?;
    Some((
        namespace.domain_key,
        namespace.digest,
        key.group,
        key.hash(),
    ))
}

fn readable(daemon: &Daemon) -> BTreeSet<BlockName> {
    let blocks = daemon.lane.cache().block_views();
    let readable = blocks.iter().filter(|view| view.readable);
    readable.filter_map(|view| name_of(daemon, view)).collect()
}

impl World {
    /// The daemon is gone from one step to the next.
    pub fn step_crash(&mut self) -> Checked {
        self.absorb()?;
        let Some(daemon) = &self.daemon else {
            return Ok(());
        };
        let sealed = readable(daemon);
        self.note(|| format!("the daemon crashes; {} blocks are sealed", sealed.len()));
        self.count("crashes");
        self.survivors = Some(Survivors {
            must: sealed.clone(),
            may: sealed,
        });
        self.tear_running();
        self.forget_daemon();
        Ok(())
    }

    /// The daemon crashed at a named point, in the middle of a turn.
    pub fn crash_in_turn(&mut self, at: CrashPoint) -> Checked {
        self.note(|| format!("the daemon crashes at {}", at.name()));
        self.count("crashes at a point");
        self.armed = None;
        self.absorb()?;
        let Some(daemon) = &self.daemon else {
            return Ok(());
        };
        let must = readable(daemon);
        let blocks = daemon.lane.cache().block_views();
        let whole = blocks.iter().filter(|view| {
            (0u16..).zip(&view.shards).all(|(shard, place)| {
                let (Shard::In(page) | Shard::Copying(page)) = place else {
                    return false;
                };
                let found = self.truth.pages.get(&page.offset());
                match self.expected(daemon, view, shard) {
                    Some(expected) => found.is_some_and(|found| found.same_shard(&expected)),
                    None => true,
                }
            })
        });
        let mut may: BTreeSet<_> = whole.filter_map(|view| name_of(daemon, view)).collect();
        may.extend(self.sealed_before.iter().copied());
        may.extend(must.iter().copied());
        self.survivors = Some(Survivors { must, may });
        self.tear_running();
        self.forget_daemon();
        Ok(())
    }

    /// Remembers what is sealed before a turn that may end in a crash.
    pub fn note_sealed(&mut self) {
        if self.armed.is_some()
            && let Some(daemon) = &self.daemon
        {
            self.sealed_before = readable(daemon);
        }
    }

    /// The next passes of a crash point end the daemon.
    pub fn step_crash_point(&mut self) {
        let at = self.rng.pick(CrashPoint::ALL);
        let nth = self.rng.between(1, 4);
        self.note(|| format!("armed: {} at pass {nth}", at.name()));
        self.armed = None;
        self.armed = Some(arm(at, nth as u64));
    }

    /// Copies that were running leave their page half written.
    fn tear_running(&mut self) {
        let numbers = match &self.daemon {
            Some(daemon) => daemon.copies.numbers(),
            None => return,
        };
        for number in numbers {
            if self.rng.percent(60) {
                self.tear(number);
            }
        }
    }

    /// The daemon and everything that was said to it are gone.
    fn forget_daemon(&mut self) {
        self.daemon = None;
        if let Some(drives) = &self.drives {
            drives.crash(&mut self.rng);
        }
        self.polled.clear();
        self.truth.old_leases = self.truth.leases.keys().copied().collect();
        self.truth.leases.clear();
        self.truth.rows.clear();
        self.unseen_since = None;
        for process in 0..self.processes.len() {
            self.processes[process].session = None;
            self.forget_requests(process);
        }
    }

    /// The daemon drains and stops.
    pub fn step_restart(&mut self) -> Checked {
        let Some(daemon) = &self.daemon else {
            return Ok(());
        };
        let handle = daemon.lane.handle.clone();
        self.note_line("the daemon is stopped");
        let mut drained: Answer<_> = Box::pin(async move { handle.drain().await });
        let mut answered = poll_once(&mut drained).is_some();
        for _ in 0..STOP_TURNS {
            if answered {
                break;
            }
            self.turn()?;
            self.check(true)?;
            let Some(daemon) = &self.daemon else {
                return Ok(());
            };
            if let Some(number) = daemon.copies.numbers().first().copied() {
                self.end_copy(number)?;
            }
            answered = poll_once(&mut drained).is_some();
        }
        ensure(answered, "inv_6_everything_completes", || {
            "the daemon does not drain".to_owned()
        })?;
        for process in 0..self.processes.len() {
            if self.rng.percent(70) {
                self.close(process, CloseReason::Stopping);
            }
        }
        let Some(daemon) = &self.daemon else {
            return Ok(());
        };
        ensure(
            daemon.lane.handle.stop().is_ok(),
            "inv_6_everything_completes",
            || "the lane has ended by itself".to_owned(),
        )?;
        let turned = self.turn()?;
        let Some(daemon) = &self.daemon else {
            return Ok(());
        };
        ensure(
            turned == Turned::Stopped,
            "inv_6_everything_completes",
            || format!("the lane goes on: {turned:?}"),
        )?;
        let sealed = readable(daemon);
        self.count("clean restarts");
        self.survivors = Some(Survivors {
            must: sealed.clone(),
            may: sealed,
        });
        self.forget_daemon();
        Ok(())
    }

    /// A daemon starts, perhaps to die at once.
    pub fn step_start(&mut self) -> Checked {
        if self.boots > 0 && self.rng.percent(25) {
            self.step_crash_point();
        }
        self.step_start_safely()
    }

    /// A daemon starts.
    pub fn step_start_safely(&mut self) -> Checked {
        let started = catch_unwind(AssertUnwindSafe(|| self.start_daemon()));
        match started {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                return ensure(false, "inv_7_a_start_after_a_crash_succeeds", || {
                    error.to_string()
                });
            }
            Err(payload) => {
                let crash = payload.downcast::<Crash>();
                let crash = crash.unwrap_or_else(|payload| resume_unwind(payload));
                self.armed = None;
                self.note(|| format!("the daemon crashes at {} while it starts", crash.at.name()));
                self.count("crashes at start");
                return Ok(());
            }
        }
        self.note_line("a daemon starts");
        self.inv_7_adopted_what_was_sealed()?;
        self.inv_7_every_file_is_known()
    }

    fn inv_7_adopted_what_was_sealed(&mut self) -> Checked {
        const NAME: &str = "inv_7_adopted_what_was_sealed";
        let survivors = self.survivors.take().unwrap_or_default();
        let Some(daemon) = &self.daemon else {
            return Ok(());
        };
        let found = readable(daemon);
        ensure(found.is_superset(&survivors.must), NAME, || {
            let lost: Vec<_> = survivors.must.difference(&found).collect();
            format!("{} sealed blocks are lost: {lost:?}", lost.len())
        })?;
        ensure(found.is_subset(&survivors.may), NAME, || {
            let foreign: Vec<_> = found.difference(&survivors.may).collect();
            format!("{} blocks come from nowhere: {foreign:?}", foreign.len())
        })?;
        let blocks = daemon.lane.cache().block_views();
        for view in &blocks {
            ensure(view.readable, NAME, || {
                format!("adopted and not sealed: {view:?}")
            })?;
            for (shard, place) in (0u16..).zip(&view.shards) {
                let (Shard::In(page), Some(expected)) = (place, self.expected(daemon, view, shard))
                else {
                    continue;
                };
                let content = self.truth.pages.get(&page.offset());
                let content = content.filter(|found| found.same_shard(&expected));
                let bytes = self.page_bytes(&expected);
                let intact = content
                    .is_some_and(|found| daemon.copies.page_holds(page.offset(), bytes, *found));
                ensure(intact, "inv_3_bytes_adopted_are_bytes_saved", || {
                    format!("page {page}: {content:?} instead of {expected:?}")
                })?;
            }
        }
        Ok(())
    }

    /// Bytes of the page of a rank's shard.
    fn page_bytes(&self, content: &crate::sim::kv::Content) -> u64 {
        let ranks = &self.plan.namespaces[content.namespace].ranks;
        let pages = ranks.iter().flatten();
        let mut pages = pages.filter(|(group, _)| *group == content.group);
        pages
            .nth(usize::from(content.shard))
            .map_or(0, |(_, page)| *page)
    }

    fn inv_7_every_file_is_known(&self) -> Checked {
        let names = std::fs::read_dir(self.dir.path()).expect("the node's folder");
        for name in names {
            let name = name
                .expect("an entry")
                .file_name()
                .to_string_lossy()
                .into_owned();
            let own = format!("node-{}", self.boots);
            let known = matches!(name.as_str(), "pool" | "catalog") || name == own;
            let index = name.strip_prefix("index-uid-");
            let index = index.is_some_and(|uid| uid.parse::<u32>().is_ok());
            ensure(known || index, "inv_7_every_file_is_known", || name)?;
        }
        Ok(())
    }
}
