//! The faults stop: everything must come to its end within a bounded number of turns, and what is
//! sealed must be there for whoever asks.

#![forbid(unsafe_code)]

use std::time::Duration;

use bytemuck::Zeroable;
use pegaflow_shm::desc::{Op, Submission};
use pegaflow_shm::status::Status;

use crate::lane::Turned;
use crate::lane::api::CloseReason;
use crate::sim::below::PAUSE;
use crate::sim::kv::hash_of;
use crate::sim::session::Asked;
use crate::sim::truth::{Checked, ensure};
use crate::sim::world::World;

/// Rounds that everything may take to complete.
const ROUNDS: usize = 300;
/// Longer than the lane ever sleeps while sessions are open.
const NAP: Duration = Duration::from_millis(1100);
/// Blocks that each process reads back.
const READ_BACK: usize = 5;
/// The request key of those queries.
const READ_BACK_KEY: u64 = 100;

impl World {
    /// Lets everything come to its end and checks that it has.
    pub fn quiet(&mut self) -> Checked {
        self.note_line("quiet");
        self.count("quiet times");
        self.armed = None;
        if self.daemon.is_none() {
            self.step_start()?;
            self.armed = None;
            if self.daemon.is_none() {
                self.step_start_safely()?;
            }
        }
        for process in 0..self.processes.len() {
            if self.is_hostile(process) {
                self.close(process, CloseReason::Died);
            }
        }
        // Whoever waits is answered, whatever the drives do.
        if self.rng.percent(50) {
            self.heal();
        }
        self.everything_completes()?;
        self.heal();
        self.everything_is_let_go()?;
        self.everything_is_there()?;
        self.everything_comes_up()
    }

    fn everything_completes(&mut self) -> Checked {
        for _ in 0..ROUNDS {
            self.quiet_round()?;
            if self.is_done() {
                return Ok(());
            }
        }
        ensure(false, "inv_6_everything_completes", || {
            let sessions = self.processes.iter().filter_map(|p| p.session.as_ref());
            let left: Vec<_> = sessions.map(|s| (s.id, &s.requests)).collect();
            format!("after {ROUNDS} rounds without a fault: {left:?}")
        })
    }

    /// Everybody goes one step on, and nothing fails.
    fn quiet_round(&mut self) -> Checked {
        for process in 0..self.processes.len() {
            let absent = self.processes[process].session.is_none();
            if absent && (self.is_hostile(process) || self.is_full()) {
                continue;
            }
            self.control(process)?;
            self.send_rest(process);
        }
        let numbers = self
            .daemon
            .as_ref()
            .map_or(Vec::new(), |d| d.copies.numbers());
        for number in numbers {
            self.end_copy(number)?;
        }
        self.drives_go_on()?;
        match self.turn()? {
            Turned::Asleep => self.clock.advance(NAP),
            Turned::Idle if self.drives.is_some() => self.clock.advance(4 * PAUSE),
            _ => {}
        }
        for process in 0..self.processes.len() {
            self.take(process, usize::MAX)?;
        }
        self.check(false)
    }

    fn is_full(&self) -> bool {
        let open = self
            .processes
            .iter()
            .filter(|p| p.session.is_some())
            .count();
        open >= self.plan.max_sessions
    }

    pub fn send_rest(&mut self, process: usize) {
        let Some(session) = self.processes[process].session.as_mut() else {
            return;
        };
        if !session.is_open() {
            return;
        }
        let ids: Vec<u64> = session.requests.keys().copied().collect();
        for id in ids {
            while session.send_next(id) {}
        }
        session.ring(false);
    }

    fn is_done(&self) -> bool {
        let Some(daemon) = &self.daemon else {
            return false;
        };
        let sessions = self.processes.iter().filter_map(|p| p.session.as_ref());
        let settled = sessions.clone().all(|session| {
            session.requests.is_empty()
                && session.is_open()
                && session.registration.is_some()
                && session.registering.is_none()
                && session.unregistering.is_none()
        });
        settled && daemon.lane.tasks() == 0 && daemon.lane.sessions().len() == sessions.count()
    }

    /// Leases run out, half-saved blocks go, gauges agree, no byte is astray.
    fn everything_is_let_go(&mut self) -> Checked {
        for by in [
            2 * self.plan.lease_ttl + Duration::from_millis(10),
            self.plan.incomplete_ttl + Duration::from_secs(1),
            NAP,
        ] {
            self.clock.advance(by);
            for _ in 0..2 {
                self.turn()?;
                self.check(true)?;
            }
            self.drives_settle()?;
        }
        let Some(daemon) = &self.daemon else {
            return Ok(());
        };
        let figures = daemon.lane.cache().figures();
        let (leases, prefetches) = (daemon.lane.leases().len(), daemon.lane.prefetches());
        ensure(
            leases == 0 && prefetches == 0 && figures.pinned == 0,
            "inv_4_every_lease_ends",
            || format!("{leases} leases, {prefetches} prefetches, {figures:?}"),
        )?;
        ensure(
            figures.unfinished == 0,
            "inv_1_half_saved_blocks_vanish",
            || format!("long after the last save: {figures:?}"),
        )?;
        self.gauges_are_true()?;
        for process in &self.processes {
            let Some(memory) = &process.memory else {
                continue;
            };
            for (at, group) in memory.groups.iter().enumerate() {
                let astray =
                    (0..group.content.len() as u32).find(|block| !memory.is_intact(at, *block));
                ensure(astray.is_none(), "inv_2_no_byte_goes_astray", || {
                    format!(
                        "block {astray:?} of group {at} of process {}",
                        process.number
                    )
                })?;
            }
        }
        Ok(())
    }

    /// Ranks of complete instances read sealed blocks back.
    fn everything_is_there(&mut self) -> Checked {
        for process in 0..self.processes.len() {
            let Some(row) = self.row_of_reader(process) else {
                continue;
            };
            let Some(daemon) = &self.daemon else {
                return Ok(());
            };
            let blocks = daemon.lane.cache().block_views();
            let keys = blocks
                .iter()
                .filter(|view| view.readable)
                .filter_map(|view| view.key);
            let keys: Vec<_> = keys.filter(|key| key.namespace == row).collect();
            for number in self.rng.distinct(READ_BACK, keys.len()) {
                let hash = self.numbers[&keys[number].hash()];
                self.read_back(process, keys[number].group, hash)?;
            }
        }
        Ok(())
    }

    /// The namespace of a process that may be asked to load: a rank of a complete instance, which
    /// does not only save.
    pub fn row_of_reader(&self, process: usize) -> Option<u32> {
        let plan = &self.plan.processes[process];
        if plan.save_only || self.is_hostile(process) || plan.rank.is_none() {
            return None;
        }
        self.processes[process].session.as_ref()?.ready
    }

    pub fn read_back(&mut self, process: usize, group: u16, hash: u64) -> Checked {
        const NAME: &str = "inv_3_what_is_sealed_can_be_loaded";
        let memory = self.processes[process].memory.as_ref();
        let Some(at) = memory.and_then(|memory| memory.group_at(group)) else {
            return Ok(());
        };
        let session = self.processes[process]
            .session
            .as_ref()
            .expect("it is ready");
        let registration = session.registration.unwrap_or(0);
        let result_offset = session.next_request() % 4096 * 64;
        let list = |op: Op| Submission {
            op: op as u8,
            group,
            registration,
            count: 1,
            total: 1,
            ..Submission::zeroed()
        };
        let asked = Asked::Query {
            group,
            key: READ_BACK_KEY,
            flags: 0,
            hashes: vec![hash],
            result_offset,
        };
        let query = Submission {
            arg0: READ_BACK_KEY,
            arg1: result_offset,
            ..list(Op::Query)
        };
        let mut rounds = 0..ROUNDS;
        let answer = loop {
            let part = (hash_of(hash).to_vec(), query);
            self.ask(process, asked.clone(), part)?;
            let answer = self.last_completion.expect("it was answered");
            if answer.status() != Status::Loading || rounds.next().is_none() {
                break answer;
            }
        };
        ensure(answer.count == 1 && answer.lease != 0, NAME, || {
            format!("process {process} asks for {hash} of group {group}: {answer:?}")
        })?;
        let memory = self.processes[process].memory.as_mut().expect("a rank");
        memory.mark(at, 0, process as u64);
        memory.groups[at].busy[0] = true;
        let asked = Asked::Load {
            at,
            group,
            lease: answer.lease,
            first: 0,
            blocks: vec![0],
        };
        let load = Submission {
            arg0: answer.lease,
            ..list(Op::Load)
        };
        self.ask(process, asked, (vec![0; 4], load))?;
        let loaded = self.last_completion.expect("it was answered");
        ensure(
            loaded.status() == Status::Ok && loaded.count == 1,
            NAME,
            || format!("process {process} loads {hash} of group {group}: {loaded:?}"),
        )?;
        let release = Submission {
            op: Op::Release as u8,
            registration,
            arg0: answer.lease,
            ..Submission::zeroed()
        };
        self.ask(process, Asked::Release(answer.lease), (Vec::new(), release))
    }

    /// Submits and waits for the answer.
    fn ask(&mut self, process: usize, asked: Asked, part: (Vec<u8>, Submission)) -> Checked {
        let session = self.processes[process]
            .session
            .as_mut()
            .expect("it is ready");
        let id = session.begin(asked, vec![part]);
        for _ in 0..ROUNDS {
            self.quiet_round()?;
            let session = self.processes[process].session.as_ref();
            let open = session.and_then(|session| session.requests.get(&id?));
            if open.is_none() {
                return Ok(());
            }
        }
        ensure(false, "inv_6_everything_completes", || {
            format!("request {id:?} of process {process} is not answered")
        })
    }
}
