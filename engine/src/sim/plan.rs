//! What one run is made of, all of it drawn from the seed: sizes, limits, processes, and how often
//! each kind of step comes.

#![forbid(unsafe_code)]

use std::time::Duration;

use crate::copy::ChecksumMode;
use crate::policy::{AdmissionKind, PolicyKind};
use crate::sim::rng::Rng;
use crate::tier::{AdmitWhen, TierOptions};

/// A namespace: a user's, with a salt of its own and the pages that its ranks hold.
#[derive(Clone, Debug)]
pub struct NamespacePlan {
    pub uid: u32,
    /// Namespaces of different users may have the same salt.
    pub salt: String,
    /// Pages of each rank: group and bytes.
    pub ranks: Vec<Vec<(u16, u64)>>,
    /// Its processes write anything anywhere: nothing is known of what its blocks hold.
    pub hostile: bool,
}

impl NamespacePlan {
    /// Where a rank's shard stands among those of a group, and how many there are.
    pub fn shard(&self, rank: usize, group: u16) -> Option<(u16, u16)> {
        let holds = |rank: &Vec<(u16, u64)>| rank.iter().any(|(found, _)| *found == group);
        if !holds(self.ranks.get(rank)?) {
            return None;
        }
        let before = self.ranks[..rank].iter().filter(|rank| holds(rank)).count();
        let all = self.ranks.iter().filter(|rank| holds(rank)).count();
        Some((before as u16, all as u16))
    }

    /// Whether any rank holds the group.
    pub fn has_group(&self, group: u16) -> bool {
        self.ranks
            .iter()
            .flatten()
            .any(|(found, _)| *found == group)
    }
}

/// A process: a rank, or a scheduler.
#[derive(Clone, Debug)]
pub struct ProcessPlan {
    /// Number of the instance, which is also in its name.
    pub instance: usize,
    pub namespace: usize,
    pub rank: Option<u32>,
    pub save_only: bool,
}

/// What lies below the pool.
#[derive(Clone, Debug)]
pub struct TierPlan {
    pub options: TierOptions,
    pub drives: usize,
    /// Requests that a drive has at a time.
    pub depth: usize,
    /// Blocks that all of them keep.
    pub most: usize,
    /// Percent of requests that are refused because too much is under way.
    pub busy: usize,
    /// Percent of writes that are refused because of the limit for writing.
    pub limited: usize,
    /// Percent of requests that fail.
    pub failures: usize,
    /// Percent of a drive's steps after which some block has rotted.
    pub rot: usize,
}

impl TierPlan {
    /// By a chance of its own: the rest of a seed means what it means without a tier.
    fn draw(rng: &mut Rng) -> TierPlan {
        let ms = Duration::from_millis;
        let admit = [
            AdmitWhen::Evict,
            AdmitWhen::Evict,
            AdmitWhen::Seal,
            AdmitWhen::Hits(2),
        ];
        TierPlan {
            options: TierOptions {
                admit: rng.pick(&admit),
                max_prefetch: rng.pick(&[1, 2, 4, 256]),
                patience: ms(rng.between(5, 3000) as u64),
                save_wait: rng.pick(&[None, None, Some(ms(1)), Some(ms(200)), Some(ms(2_000))]),
            },
            drives: rng.between(1, 3),
            depth: rng.pick(&[1, 2, 8, 64]),
            most: rng.pick(&[8, 40, 10_000]),
            busy: rng.pick(&[0, 0, 5, 40]),
            limited: rng.pick(&[0, 0, 20]),
            failures: rng.pick(&[0, 2, 20]),
            rot: rng.pick(&[0, 0, 3, 20]),
        }
    }
}

/// Kinds of steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepKind {
    Turn,
    Request,
    Continue,
    Take,
    Copy,
    Control,
    Time,
    Sleep,
    Probe,
    Leave,
    Crash,
    CrashPoint,
    Restart,
    Hostile,
    Quiet,
    Drive,
    DriveFault,
}

impl StepKind {
    pub const ALL: [StepKind; 17] = [
        StepKind::Turn,
        StepKind::Request,
        StepKind::Continue,
        StepKind::Take,
        StepKind::Copy,
        StepKind::Control,
        StepKind::Time,
        StepKind::Sleep,
        StepKind::Probe,
        StepKind::Leave,
        StepKind::Crash,
        StepKind::CrashPoint,
        StepKind::Restart,
        StepKind::Hostile,
        StepKind::Quiet,
        StepKind::Drive,
        StepKind::DriveFault,
    ];
}

/// Everything that stays the same in one run.
#[derive(Clone, Debug)]
pub struct Plan {
    pub extents: u64,
    pub extent_bytes: u64,
    pub max_blocks: u32,
    pub policy: PolicyKind,
    pub admission: AdmissionKind,
    pub max_leases: usize,
    pub max_sessions: usize,
    pub lease_ttl: Duration,
    pub incomplete_ttl: Duration,
    pub max_copy_tasks: usize,
    pub task_bytes: u64,
    pub slots: u32,
    /// Blocks of each group in a process's memory.
    pub kv_blocks: u32,
    /// Different block hashes.
    pub hashes: u64,
    pub list_most: usize,
    pub namespaces: Vec<NamespacePlan>,
    pub processes: Vec<ProcessPlan>,
    pub weights: Vec<u32>,
    /// Percent of copies that fail.
    pub copy_failures: usize,
    /// Percent of bells that are lost.
    pub lost_bells: usize,
    /// Percent of requests with a wrong argument.
    pub wrong_arguments: usize,
    pub steps: usize,
    /// Every other seed has one.
    pub tier: Option<TierPlan>,
    /// Which pages have checksums, by a chance of its own.
    pub checksum: ChecksumMode,
}

const PAGES: [u64; 5] = [512, 576, 1024, 1536, 2048];

impl Plan {
    pub fn draw(rng: &mut Rng) -> Plan {
        let namespaces = namespaces(rng);
        let processes = processes(rng, &namespaces);
        let ms = |from: usize, to: usize, rng: &mut Rng| {
            Duration::from_millis(rng.between(from, to) as u64)
        };
        Plan {
            extents: rng.between(2, 10) as u64,
            extent_bytes: rng.pick(&[4096, 8192, 16384]),
            max_blocks: rng.between(24, 160) as u32,
            policy: rng.pick(&PolicyKind::ALL),
            admission: rng.pick(&[
                AdmissionKind::Off,
                AdmissionKind::Off,
                AdmissionKind::TinyLfu,
            ]),
            max_leases: rng.between(2, 24),
            max_sessions: processes.len() + 1 - rng.below(2),
            lease_ttl: ms(50, 4000, rng),
            incomplete_ttl: ms(1000, 8000, rng),
            max_copy_tasks: rng.between(1, 16),
            task_bytes: rng.pick(&[512, 2048, 8192, 1 << 20]),
            slots: rng.pick(&[16, 16, 32, 64]),
            kv_blocks: rng.between(12, 40) as u32,
            hashes: rng.between(10, 80) as u64,
            list_most: rng.between(2, 14),
            namespaces,
            processes,
            weights: weights(rng),
            copy_failures: rng.pick(&[0, 2, 10, 40]),
            lost_bells: rng.pick(&[0, 0, 5, 50, 100]),
            wrong_arguments: rng.pick(&[0, 3, 15]),
            steps: rng.between(200, 1600),
            tier: None,
            checksum: ChecksumMode::Off,
        }
    }

    /// Gives pages checksums, or some of them, or none.
    pub fn add_checksums(&mut self, rng: &mut Rng) {
        self.checksum = rng.pick(&[
            ChecksumMode::Off,
            ChecksumMode::Sampled,
            ChecksumMode::Always,
        ]);
    }

    /// Puts drives below the pool, given a chance of their own.
    pub fn add_tier(&mut self, rng: &mut Rng) {
        self.tier = Some(TierPlan::draw(rng));
        self.weights[StepKind::Drive as usize] = 200 * rng.pick(&[1, 2, 4]);
        self.weights[StepKind::DriveFault as usize] = rng.pick(&[0, 4, 20]);
        // Seldom anew, so that there is time for blocks to leave and come back.
        for kind in [
            StepKind::Leave,
            StepKind::Crash,
            StepKind::CrashPoint,
            StepKind::Restart,
        ] {
            let weight = &mut self.weights[kind as usize];
            *weight = weight.div_ceil(5);
        }
        self.weights[StepKind::Request as usize] *= 2;
        self.steps *= 2;
        // A pool so small that much is below it.
        self.extents = rng.between(2, 4) as u64;
        self.extent_bytes = rng.pick(&[4096, 4096, 8192]);
        self.hashes = rng.between(10, 40) as u64;
    }
}

fn weights(rng: &mut Rng) -> Vec<u32> {
    let base: [u32; 15] = [
        600, 500, 150, 400, 450, 200, 80, 80, 40, 10, 4, 12, 3, 30, 1,
    ];
    let scaled = base.map(|weight| weight * rng.pick(&[1, 2, 2, 4]));
    let mut weights = scaled.to_vec();
    weights.resize(StepKind::ALL.len(), 0);
    // Each run does without some of the faults, so that others get further.
    for kind in [
        StepKind::Time,
        StepKind::Leave,
        StepKind::Crash,
        StepKind::CrashPoint,
        StepKind::Restart,
        StepKind::Hostile,
    ] {
        if rng.percent(30) {
            weights[kind as usize] = 0;
        }
    }
    weights
}

fn namespaces(rng: &mut Rng) -> Vec<NamespacePlan> {
    let mut made: Vec<NamespacePlan> = Vec::new();
    let users = rng.between(1, 2) as u32;
    for number in 0..rng.between(1, 3) {
        let uid = 1000 + rng.below(users as usize) as u32;
        let world = rng.pick(&[1, 1, 2, 2, 3]);
        let both = rng.percent(60);
        let ranks: Vec<Vec<(u16, u64)>> = (0..world)
            .map(|rank| {
                let mut groups = vec![(0, rng.pick(&PAGES))];
                // The last rank holds every group; others may hold one less.
                if both && (rank + 1 == world || rng.percent(50)) {
                    groups.push((1, rng.pick(&PAGES)));
                }
                groups
            })
            .collect();
        let same = made.first().filter(|_| rng.percent(30)).cloned();
        made.push(match same {
            // Another user with the same model and the same layout.
            Some(first) if first.uid != uid && made.len() == 1 => NamespacePlan { uid, ..first },
            _ => NamespacePlan {
                uid,
                salt: format!("salt-{number}"),
                ranks,
                hostile: false,
            },
        });
    }
    if rng.percent(50) {
        made.push(NamespacePlan {
            uid: 1000 + rng.below(users as usize) as u32,
            salt: "hostile".into(),
            ranks: vec![vec![(0, rng.pick(&PAGES))]],
            hostile: true,
        });
    }
    made
}

fn processes(rng: &mut Rng, namespaces: &[NamespacePlan]) -> Vec<ProcessPlan> {
    let mut made = Vec::new();
    let mut instance = 0;
    for (namespace, plan) in namespaces.iter().enumerate() {
        let replicas = if plan.hostile { 1 } else { rng.between(1, 2) };
        for _ in 0..replicas {
            if made.len() + plan.ranks.len() > 6 && instance > 0 {
                break;
            }
            let save_only = !plan.hostile && rng.percent(8);
            for rank in 0..plan.ranks.len() as u32 {
                made.push(ProcessPlan {
                    instance,
                    namespace,
                    rank: Some(rank),
                    save_only,
                });
            }
            if made.len() < 6 && rng.percent(40) {
                made.push(ProcessPlan {
                    instance,
                    namespace,
                    rank: None,
                    save_only,
                });
            }
            instance += 1;
        }
    }
    made
}
