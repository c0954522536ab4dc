//! What clients ask for, with right and wrong arguments.

#![forbid(unsafe_code)]

use bytemuck::Zeroable;
use pegaflow_shm::desc::{Op, Submission, flags};
use pegaflow_shm::payload;

use crate::sim::kv::hash_of;
use crate::sim::session::Asked;
use crate::sim::world::World;

/// Submissions of one request with their payloads.
type Parts = Vec<(Vec<u8>, Submission)>;

/// Most submissions that one list is cut into.
const MOST_PARTS: usize = 3;

/// A submission of a registration, with everything else left open.
fn submission(op: Op, registration: u32, group: u16) -> Submission {
    Submission {
        op: op as u8,
        group,
        registration,
        ..Submission::zeroed()
    }
}

impl World {
    /// A client submits something.
    pub fn step_request(&mut self) {
        let ready = (0..self.processes.len()).filter(|at| {
            let session = self.processes[*at].session.as_ref();
            session.is_some_and(|session| {
                session.is_open() && session.has_credit() && session.free_chunks() >= MOST_PARTS
            })
        });
        let ready: Vec<usize> = ready.collect();
        if ready.is_empty() {
            return;
        }
        let process = self.rng.pick(&ready);
        // Before its instance is complete, little of what it asks can be answered.
        let session = self.processes[process].session.as_ref();
        if session.is_some_and(|session| session.ready.is_none()) && self.rng.percent(85) {
            return;
        }
        let wrong = self.rng.percent(self.plan.wrong_arguments);
        let made = match self.rng.weighted(&[4, 30, 40, 26, 6, 5, 6]) {
            0 => Some((Asked::Nop, vec![(Vec::new(), submission(Op::Nop, 0, 0))])),
            1 => Some(self.query(process, wrong)),
            2 => self.save(process, wrong),
            3 => self.load(process, wrong),
            4 => Some(self.about_lease(process, Op::Release, wrong)),
            5 => Some(self.about_lease(process, Op::Renew, wrong)),
            _ => Some(self.cancel(process)),
        };
        let Some((asked, parts)) = made else {
            return;
        };
        self.note(|| {
            format!(
                "process {process} asks {asked:?}{}",
                if wrong { " (wrong)" } else { "" }
            )
        });
        self.count(asked.op().label());
        let session = self.processes[process].session.as_mut();
        let session = session.expect("it is open");
        let Some(id) = session.begin(asked, parts) else {
            return;
        };
        let all = self.rng.percent(70);
        self.send(process, id, all);
    }

    /// Sends a request's next submission, or all that are left, and rings.
    pub fn send(&mut self, process: usize, id: u64, all: bool) {
        let lost = self.rng.percent(self.plan.lost_bells);
        let session = self.processes[process].session.as_mut();
        let session = session.expect("it is open");
        let mut sent = 0;
        while session.send_next(id) {
            sent += 1;
            if !all {
                break;
            }
        }
        let rung = session.ring(lost);
        self.note(|| {
            let bell = match (rung, lost) {
                (true, true) => ", bell lost",
                (true, false) => ", rings",
                _ => "",
            };
            format!("process {process} sends {sent} of request {id}{bell}")
        });
    }

    /// A client sends more of a list that it has begun.
    pub fn step_continue(&mut self) {
        let mut begun = Vec::new();
        for (at, process) in self.processes.iter().enumerate() {
            let Some(session) = process.session.as_ref().filter(|s| s.is_open()) else {
                continue;
            };
            let requests = session.requests.iter();
            let unsent = requests.filter(|(_, request)| !request.rest.is_empty());
            begun.extend(unsent.map(|(id, _)| (at, *id)));
        }
        if !begun.is_empty() {
            let (process, id) = self.rng.pick(&begun);
            let all = self.rng.percent(50);
            self.send(process, id, all);
        }
    }

    fn registration(&mut self, process: usize) -> u32 {
        let session = self.processes[process].session.as_ref();
        session
            .and_then(|session| session.registration)
            .unwrap_or(77)
    }

    /// Hashes as a prompt has them, or at random.
    fn some_hashes(&mut self) -> Vec<u64> {
        let count = self.rng.between(0, self.plan.list_most);
        let all = self.plan.hashes;
        if self.rng.percent(4) {
            self.focus = self.rng.next() % all;
        }
        if self.rng.percent(80) {
            let start = match self.rng.below(4) {
                0 => self.rng.next() % all / 8 * 8,
                1 => self.rng.next() % all,
                _ => self.focus,
            };
            (0..count as u64).map(|at| (start + at) % all).collect()
        } else {
            let chosen = self.rng.distinct(count, all as usize);
            chosen.into_iter().map(|number| number as u64).collect()
        }
    }

    fn some_group(&mut self, process: usize) -> u16 {
        let both = self.namespace_of(process).has_group(1);
        u16::from(both && self.rng.percent(35))
    }

    fn query(&mut self, process: usize, wrong: bool) -> (Asked, Parts) {
        let mut group = self.some_group(process);
        let mut registration = self.registration(process);
        let mut result_offset = self.result_place(process);
        let mut hashes = self.some_hashes();
        let mut key = None;
        if let Some(polled) = self.draw_polled(process) {
            (group, hashes) = (polled.group, polled.hashes);
            key = Some(polled.key);
        }
        if wrong {
            match self.rng.below(3) {
                0 => group = 9,
                1 => registration += 7,
                _ => result_offset = self.rng.next() | 1,
            }
        }
        let ttl = self.plan.lease_ttl.as_millis() as usize;
        let any = self.rng.below(6) as u64;
        let ttl_ms = if self.rng.percent(50) {
            0
        } else {
            self.rng.between(1, 3 * ttl) as u64
        };
        let (flags, arg2) = self.draw_reach(ttl_ms);
        let key = key.unwrap_or(any);
        let head = Submission {
            total: hashes.len() as u32,
            arg0: key,
            arg1: result_offset,
            arg2,
            flags,
            ..submission(Op::Query, registration, group)
        };
        let parts = self.cut(hashes.len(), head, |part, _| {
            let bytes: Vec<u8> = hashes[part]
                .iter()
                .flat_map(|hash| hash_of(*hash))
                .collect();
            (bytes, 0)
        });
        let asked = Asked::Query {
            group,
            key,
            flags,
            hashes,
            result_offset,
        };
        (asked, parts)
    }

    /// Where the next query's bitmap goes: unfinished ones never share a place.
    fn result_place(&self, process: usize) -> u64 {
        let session = self.processes[process].session.as_ref();
        session.map_or(0, |session| session.next_request() % 4096 * 64)
    }

    /// Blocks of a group that the request may name, marked as busy.
    fn take_blocks(&mut self, process: usize, at: usize, count: usize) -> Vec<u32> {
        let memory = self.processes[process].memory.as_mut().expect("a rank");
        let free = memory.free_blocks(at);
        let count = count.min(free.len());
        let blocks: Vec<u32> = if self.rng.percent(50) {
            let start = self.rng.below(free.len() - count + 1);
            free[start..start + count].to_vec()
        } else {
            let chosen = self.rng.distinct(count, free.len());
            chosen.into_iter().map(|at| free[at]).collect()
        };
        for block in &blocks {
            memory.groups[at].busy[*block as usize] = true;
        }
        blocks
    }

    /// A group that the process has memory for.
    fn own_group(&mut self, process: usize) -> Option<(usize, u16)> {
        let memory = self.processes[process].memory.as_ref()?;
        let at = self.rng.below(memory.groups.len());
        Some((at, memory.groups[at].group))
    }

    fn save(&mut self, process: usize, wrong: bool) -> Option<(Asked, Parts)> {
        let (at, mut group) = self.own_group(process)?;
        let mut registration = self.registration(process);
        let hashes = self.some_hashes();
        let mut blocks = self.take_blocks(process, at, hashes.len());
        let hashes = &hashes[..blocks.len()];
        for (hash, block) in hashes.iter().zip(&blocks) {
            let content = self.new_content(process, group, *hash);
            let memory = self.processes[process].memory.as_mut()?;
            memory.write(at, *block, content);
        }
        let asked = Asked::Save {
            at,
            blocks: blocks.clone(),
        };
        if wrong {
            match self.rng.below(3) {
                0 => group = 9,
                1 => registration += 7,
                _ => blocks.iter_mut().skip(1).for_each(|block| *block += 1000),
            }
        }
        let head = Submission {
            total: hashes.len() as u32,
            ..submission(Op::Save, registration, group)
        };
        let parts = self.cut(hashes.len(), head, |part, out| {
            out.extend(hashes[part.clone()].iter().flat_map(|hash| hash_of(*hash)));
            let runs = payload::encode_blocks(&blocks[part], out);
            (std::mem::take(out), runs)
        });
        Some((asked, parts))
    }

    fn load(&mut self, process: usize, wrong: bool) -> Option<(Asked, Parts)> {
        let (at, group) = self.own_group(process)?;
        let mut registration = self.registration(process);
        let instance = self.plan.processes[process].instance;
        let fitting = self
            .truth
            .leases
            .iter()
            .filter(|(_, lease)| wrong || (lease.instance == instance && lease.group == group));
        let fitting: Vec<(u64, usize)> =
            fitting.map(|(id, lease)| (*id, lease.hits.len())).collect();
        if fitting.is_empty() {
            return None;
        }
        let (mut lease, held) = self.rng.pick(&fitting);
        let whole = self.rng.percent(60);
        let mut first = if whole || held == 0 {
            0
        } else {
            self.rng.below(held)
        };
        let count = if whole {
            held
        } else {
            self.rng.between(0, held - first)
        };
        let mut blocks = self.take_blocks(process, at, count);
        let asked_blocks = blocks.clone();
        let memory = self.processes[process].memory.as_mut()?;
        for block in &blocks {
            memory.mark(at, *block, process as u64);
        }
        if wrong {
            match self.rng.below(9) {
                0 if self.truth.old_leases.is_empty() => lease = lease.wrapping_add(1 << 32),
                0 => lease = self.rng.pick(&self.truth.old_leases),
                1 => registration += 7,
                2 => first += held,
                3 if blocks.len() > 1 => blocks[0] = blocks[1],
                // A lease of another instance or group, most likely.
                5.. => {}
                _ => blocks.iter_mut().skip(1).for_each(|block| *block += 1000),
            }
        }
        let head = Submission {
            total: blocks.len() as u32,
            arg0: lease,
            arg1: first as u64,
            ..submission(Op::Load, registration, group)
        };
        let parts = self.cut(blocks.len(), head, |part, out| {
            let runs = payload::encode_blocks(&blocks[part], out);
            (std::mem::take(out), runs)
        });
        let asked = Asked::Load {
            at,
            group,
            lease,
            first,
            blocks: asked_blocks,
        };
        Some((asked, parts))
    }

    fn about_lease(&mut self, process: usize, op: Op, wrong: bool) -> (Asked, Parts) {
        let known: Vec<u64> = self.truth.leases.keys().copied().collect();
        let lease = if wrong && !self.truth.old_leases.is_empty() {
            self.rng.pick(&self.truth.old_leases)
        } else if known.is_empty() || wrong {
            self.rng.next()
        } else {
            self.rng.pick(&known)
        };
        let registration = self.registration(process);
        let about = Submission {
            arg0: lease,
            arg1: if op == Op::Renew {
                self.rng.below(5000) as u64
            } else {
                0
            },
            ..submission(op, registration, 0)
        };
        let asked = match op {
            Op::Release => Asked::Release(lease),
            _ => Asked::Renew(lease),
        };
        (asked, vec![(Vec::new(), about)])
    }

    fn cancel(&mut self, process: usize) -> (Asked, Parts) {
        let session = self.processes[process].session.as_ref();
        let known: Vec<u64> = session.map_or(Vec::new(), |s| s.requests.keys().copied().collect());
        let request = if known.is_empty() {
            999
        } else {
            self.rng.pick(&known)
        };
        let about = Submission {
            arg0: request,
            ..submission(Op::Cancel, 0, 0)
        };
        (Asked::Cancel, vec![(Vec::new(), about)])
    }

    /// Cuts a list of `count` items into submissions.
    fn cut(
        &mut self,
        count: usize,
        head: Submission,
        mut encode: impl FnMut(std::ops::Range<usize>, &mut Vec<u8>) -> (Vec<u8>, u8),
    ) -> Parts {
        let mut parts = Vec::new();
        let wanted = if self.rng.percent(60) {
            1
        } else {
            self.rng.between(2, MOST_PARTS)
        };
        let mut from = 0;
        for part in 1..=wanted {
            let to = if part == wanted {
                count
            } else {
                self.rng.between(from, count)
            };
            let (bytes, runs) = encode(from..to, &mut Vec::new());
            let more = if part < wanted { flags::MORE } else { 0 };
            let submission = Submission {
                count: (to - from) as u32,
                flags: head.flags | runs | more,
                ..head
            };
            parts.push((bytes, submission));
            from = to;
        }
        parts
    }
}
