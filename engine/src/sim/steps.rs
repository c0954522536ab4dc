//! The steps of a run, chosen by chance.

#![forbid(unsafe_code)]

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Duration;

use pegaflow_shm::index::BlockKey;
use pegaflow_shm::node::Gauge;

use crate::copy::{CopyError, Direction};
use crate::fault::Crash;
use crate::lane::Turned;
use crate::sim::kv::hash_of;
use crate::sim::plan::StepKind;
use crate::sim::truth::{Checked, ensure};
use crate::sim::world::World;

impl World {
    /// One step, and the check of everything after it.
    pub fn run_step(&mut self) -> Checked {
        self.step += 1;
        if self.daemon.is_none() {
            self.step_start()?;
            return self.check(false);
        }
        let kind = StepKind::ALL[self.rng.weighted(&self.plan.weights)];
        let mut turned = false;
        match kind {
            StepKind::Turn => {
                let times = self.rng.between(1, 3);
                for _ in 0..times {
                    let came_to = self.turn()?;
                    turned = came_to != Turned::Asleep;
                    if came_to == Turned::Idle && self.rng.percent(40) {
                        self.lane_sleeps()?;
                    }
                }
            }
            StepKind::Request => self.step_request(),
            StepKind::Continue => self.step_continue(),
            StepKind::Take => self.step_take()?,
            StepKind::Copy => self.step_copy()?,
            StepKind::Control => self.step_control()?,
            StepKind::Time => self.step_time(),
            StepKind::Sleep => self.step_sleep()?,
            StepKind::Probe => self.step_probe()?,
            StepKind::Leave => self.step_leave(),
            StepKind::Crash => self.step_crash()?,
            StepKind::CrashPoint => self.step_crash_point(),
            StepKind::Restart => self.step_restart()?,
            StepKind::Hostile => self.step_hostile(),
            StepKind::Quiet => self.quiet()?,
            StepKind::Drive => self.step_drive()?,
            StepKind::DriveFault => self.step_drive_fault(),
        }
        self.check(turned)
    }

    /// Turns the lane once.
    pub fn turn(&mut self) -> Result<Turned, crate::sim::truth::Violation> {
        self.note_sealed();
        let Some(daemon) = self.daemon.as_mut() else {
            return Ok(Turned::Stopped);
        };
        let turned = catch_unwind(AssertUnwindSafe(|| daemon.lane.turn()));
        let turned = match turned {
            Ok(turned) => turned,
            Err(payload) => {
                let crash = payload.downcast::<Crash>();
                let crash = crash.unwrap_or_else(|payload| resume_unwind(payload));
                self.crash_in_turn(crash.at)?;
                return Ok(Turned::Stopped);
            }
        };
        self.note(|| format!("the lane turns: {turned:?}"));
        self.absorb()?;
        self.hear_events()?;
        self.inv_6_a_sleeper_is_woken()?;
        self.inv_6_a_submission_is_seen(turned)?;
        Ok(turned)
    }

    /// A sleeping lane finds what waits in a ring, rung for or not.
    fn inv_6_a_submission_is_seen(&mut self, turned: Turned) -> Checked {
        /// As long as the lane sleeps at most, and a little.
        const BOUND: Duration = Duration::from_millis(1010);
        let Some(daemon) = &self.daemon else {
            return Ok(());
        };
        if turned != Turned::Asleep || !daemon.lane.has_submission() {
            self.unseen_since = None;
            return Ok(());
        }
        let now = self.clock.elapsed();
        let since = *self.unseen_since.get_or_insert(now);
        ensure(now - since <= BOUND, "inv_6_a_submission_is_seen", || {
            format!("the lane sleeps over a submission since {since:?}")
        })
    }

    /// A client that waits on its bell hears it when there is something; one that writes anything
    /// anywhere may have written over the word that says that it waits.
    fn inv_6_a_sleeper_is_woken(&mut self) -> Checked {
        for number in 0..self.processes.len() {
            if self.is_hostile(number) {
                continue;
            }
            let process = &mut self.processes[number];
            let Some(session) = process.session.as_mut() else {
                continue;
            };
            if session.asleep && session.is_open() && session.has_completion() {
                let rung = session.is_rung();
                ensure(rung, "inv_6_a_sleeper_is_woken", || {
                    format!("process {} sleeps over a completion", process.number)
                })?;
            }
        }
        Ok(())
    }

    /// A copy goes on, ends, fails, or is seen to be cancelled.
    fn step_copy(&mut self) -> Checked {
        let Some(daemon) = &self.daemon else {
            return Ok(());
        };
        let numbers = daemon.copies.numbers();
        if numbers.is_empty() {
            return Ok(());
        }
        let copies = daemon.copies.clone();
        let number = self.rng.pick(&numbers);
        let pages = self.rng.between(0, 6);
        copies.advance(number, pages);
        self.absorb()?;
        if self.rng.percent(self.plan.copy_failures) {
            self.note(|| format!("copy {number} fails"));
            self.count("copies failed");
            self.tear(number);
            copies.finish(number, Some(CopyError::OwnerGone { pid: 1 }));
        } else if copies.is_cancelled(number) && self.rng.percent(70) {
            self.note(|| format!("copy {number} is cancelled"));
            self.count("copies cancelled");
            if self.rng.percent(50) {
                self.tear(number);
            }
            copies.finish(number, Some(CopyError::Cancelled));
        } else if self.rng.percent(60) {
            self.end_copy(number)?;
        } else {
            self.note(|| format!("copy {number} goes on"));
        }
        Ok(())
    }

    /// Lets a copy run to its good end.
    pub fn end_copy(&mut self, number: u64) -> Checked {
        let Some(daemon) = &self.daemon else {
            return Ok(());
        };
        let copies = daemon.copies.clone();
        copies.advance(number, usize::MAX / 2);
        self.absorb()?;
        copies.finish(number, None);
        self.note(|| format!("copy {number} ends"));
        Ok(())
    }

    /// Leaves the page that a copy is at half written.
    pub fn tear(&mut self, number: u64) {
        let copies = match &self.daemon {
            Some(daemon) => daemon.copies.clone(),
            None => return,
        };
        let Some((direction, target, page)) = copies.page_at(number) else {
            return;
        };
        let (process, at) = self.owner_of(&target);
        let Some(memory) = self.processes[process].memory.as_mut() else {
            return;
        };
        match direction {
            Direction::Load => memory.tear(at, page.block, &mut self.rng),
            Direction::Save => {
                self.truth.pages.remove(&page.pool_offset);
                copies.scribble(page.pool_offset, self.rng.next());
            }
        }
    }

    fn step_time(&mut self) {
        let ttl = self.plan.lease_ttl;
        let by = match self.rng.below(6) {
            0 | 1 => Duration::from_micros(self.rng.between(1, 900) as u64),
            2 | 3 => Duration::from_millis(self.rng.between(1, 60) as u64),
            4 => ttl / 2,
            _ => self.plan.incomplete_ttl / 3 + ttl,
        };
        if self.drives.is_some() && by >= Duration::from_secs(1) {
            // Nobody takes so long over a list that the lane gives him up.
            for process in 0..self.processes.len() {
                if !self.is_hostile(process) {
                    self.send_rest(process);
                }
            }
        }
        self.clock.advance(by);
        self.note(|| format!("{by:?} go by"));
    }

    /// The lane or a client goes to sleep.
    fn step_sleep(&mut self) -> Checked {
        if self.rng.percent(50) {
            let process = self.rng.below(self.processes.len());
            let session = self.processes[process].session.as_mut();
            if let Some(session) = session.filter(|s| s.is_open() && !s.asleep) {
                session.fall_asleep();
                self.note(|| format!("process {process} waits on its bell"));
            }
            return Ok(());
        }
        self.lane_sleeps()
    }

    fn lane_sleeps(&mut self) -> Checked {
        let Some(daemon) = self.daemon.as_mut() else {
            return Ok(());
        };
        let asleep = daemon.lane.fall_asleep();
        self.note(|| format!("the lane falls asleep: {asleep}"));
        if asleep {
            self.inv_6_a_lane_that_sleeps_holds_nothing_back()?;
        }
        self.gauges_are_true()
    }

    /// The node file tells what is there.
    pub fn gauges_are_true(&mut self) -> Checked {
        let Some(daemon) = self.daemon.as_mut() else {
            return Ok(());
        };
        daemon.lane.publish();
        let (lane, node) = (&daemon.lane, &daemon.node);
        let blocks = lane.cache().block_views();
        let sealed = blocks.iter().filter(|view| view.readable).count();
        let pinned = blocks.iter().filter(|view| view.block.pins > 0).count();
        let stats = lane.cache().pool().stats();
        let sessions = lane.sessions();
        let figures = [
            (Gauge::PoolBytes, stats.pool_bytes as usize),
            (Gauge::PoolUsedBytes, stats.used_bytes as usize),
            (Gauge::BlocksHeld, sealed),
            (Gauge::BlocksUnfinished, blocks.len() - sealed),
            (Gauge::BlocksPinned, pinned),
            (Gauge::Leases, lane.leases().given()),
            (Gauge::Prefetches, lane.prefetches()),
            (Gauge::Sessions, sessions.len()),
            (Gauge::Instances, lane.instances()),
            (Gauge::CopyTasks, lane.tasks()),
            (Gauge::Requests, sessions.iter().map(|s| s.requests).sum()),
        ];
        for (gauge, wanted) in figures {
            let found = node.gauge(gauge);
            ensure(found == wanted as u64, "gauges_are_true", || {
                format!("{gauge:?} says {found}, there are {wanted}")
            })?;
        }
        let shown = node
            .sessions()
            .iter()
            .filter(|row| row.session != 0)
            .count();
        ensure(shown == sessions.len(), "gauges_are_true", || {
            format!("{shown} rows for {} sessions", sessions.len())
        })?;
        let leases = node.leases().iter().filter(|row| row.lease != 0).count();
        ensure(leases == lane.leases().given(), "gauges_are_true", || {
            format!("{leases} rows for {} leases", lane.leases().given())
        })?;
        self.tier_gauges_are_true()
    }

    /// A client reads the index: it sees the sealed blocks of its user, and no others.
    fn step_probe(&mut self) -> Checked {
        let process = self.rng.below(self.processes.len());
        let uid = self.namespace_of(process).uid;
        let session = self.processes[process].session.as_ref();
        let (Some(session), Some(daemon)) = (session, &self.daemon) else {
            return Ok(());
        };
        let Some(index) = session.index.as_ref().filter(|_| session.is_open()) else {
            return Ok(());
        };
        let blocks = daemon.lane.cache().block_views();
        for row in 0..6 {
            let namespace = daemon.lane.cache().catalog().namespace_in(row);
            let own = namespace.is_some_and(|row| row.domain_key == u64::from(uid));
            for (hash, group) in (0..self.plan.hashes).flat_map(|hash| [(hash, 0), (hash, 1)]) {
                let key = BlockKey::new(row, group, &hash_of(hash));
                let held = blocks
                    .iter()
                    .any(|view| view.readable && view.key == Some(key));
                ensure(
                    index.contains(&key) == (held && own),
                    "inv_3_the_index_is_true",
                    || format!("process {process} asks for {hash} of row {row}, group {group}"),
                )?;
            }
        }
        Ok(())
    }
}
