//! The world of one run: a daemon, processes with their memory, and the truth.

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytemuck::Zeroable;
use pegaflow_shm::control::{Mode, RegisterSpec};
use pegaflow_shm::desc::Completion;
use pegaflow_shm::mapping::{Access, NamedFile};
use pegaflow_shm::namespace::{NamespaceSpec, PackedGroup};
use pegaflow_shm::node::{NodeHeader, NodeReader, NodeWriter};

use crate::clock::Clock;
use crate::config::PoolStart;
use crate::copy::{BoundLayout, Direction};
use crate::fault::Arming;
use crate::isolation::DomainRules;
use crate::lane::{LaneOptions, LaneStartError, LaneWake, SimLane};
use crate::sim::below::Polled;
use crate::sim::copies::{CopyEvent, SimCopies, SimMachine, TaskView};
use crate::sim::crash::{BlockName, Survivors};
use crate::sim::drives::SimDrives;
use crate::sim::kv::{Content, KvMemory, hash_of};
use crate::sim::plan::{NamespacePlan, Plan};
use crate::sim::rng::{Rng, mix};
use crate::sim::session::Session;
use crate::sim::time::SimClock;
use crate::sim::truth::{Checked, Truth, ensure};

/// A running daemon.
pub struct Daemon {
    pub lane: SimLane<SimMachine>,
    pub copies: SimCopies,
    pub node: NodeReader,
    pub sessions: u64,
    pub started: Instant,
}

/// A process of an engine.
pub struct Process {
    pub number: usize,
    pub memory: Option<KvMemory>,
    pub session: Option<Session>,
}

/// Steps that a failure shows.
const SHOWN_STEPS: usize = 60;

/// Everything.
pub struct World {
    pub plan: Plan,
    pub rng: Rng,
    pub clock: SimClock,
    pub dir: tempfile::TempDir,
    pub boots: u8,
    pub daemon: Option<Daemon>,
    pub processes: Vec<Process>,
    pub truth: Truth,
    /// Number of each hash.
    pub numbers: BTreeMap<[u8; 32], u64>,
    /// Namespace by the catalog's domain key and digest.
    pub by_digest: BTreeMap<(u64, [u8; 32]), usize>,
    /// What the next daemon must find.
    pub survivors: Option<Survivors>,
    pub armed: Option<Arming>,
    /// What was sealed before the turn at hand.
    pub sealed_before: BTreeSet<BlockName>,
    /// The last completion that any client took.
    pub last_completion: Option<Completion>,
    /// Where the prompt begins that engines work on most.
    pub focus: u64,
    /// Since when the lane has been sleeping over a submission.
    pub unseen_since: Option<Duration>,
    /// What is below the pool.
    pub drives: Option<SimDrives>,
    /// Queries that were answered `loading`.
    pub polled: VecDeque<Polled>,
    pub trace: VecDeque<String>,
    pub verbose: bool,
    pub step: usize,
    pub counts: BTreeMap<&'static str, u64>,
}

impl World {
    pub fn new(seed: u64, verbose: bool) -> World {
        let mut rng = Rng::new(seed);
        let mut plan = Plan::draw(&mut rng);
        let mut chance = Rng::new(mix(seed));
        if seed % 2 == 1 {
            plan.add_tier(&mut chance);
        }
        plan.add_checksums(&mut Rng::new(mix(mix(seed))));
        let drives = plan.tier.clone().map(|tier| SimDrives::new(tier, chance));
        let processes = plan.processes.iter().enumerate().map(|(number, process)| {
            let namespace = &plan.namespaces[process.namespace];
            let memory = process.rank.map(|rank| {
                let groups = &namespace.ranks[rank as usize];
                KvMemory::new(number as u64, plan.kv_blocks, groups)
            });
            Process {
                number,
                memory,
                session: None,
            }
        });
        let processes = processes.collect();
        let numbers = (0..plan.hashes).map(|number| (hash_of(number), number));
        let numbers = numbers.collect();
        let by_digest = plan.namespaces.iter().enumerate().map(|(at, namespace)| {
            let key = u64::from(namespace.uid);
            ((key, digest(namespace)), at)
        });
        let by_digest = by_digest.collect();
        World {
            rng,
            clock: SimClock::new(),
            dir: tempfile::tempdir_in("/dev/shm").expect("a folder in /dev/shm"),
            boots: 0,
            daemon: None,
            processes,
            truth: Truth::default(),
            numbers,
            by_digest,
            survivors: None,
            armed: None,
            sealed_before: BTreeSet::new(),
            last_completion: None,
            focus: 0,
            unseen_since: None,
            drives,
            polled: VecDeque::new(),
            trace: VecDeque::new(),
            verbose,
            step: 0,
            counts: BTreeMap::new(),
            plan,
        }
    }

    /// Notes what happens, for the reader of a failure.
    pub fn note(&mut self, what: impl FnOnce() -> String) {
        let line = format!("{:5} {:>9.3?} {}", self.step, self.clock.elapsed(), what());
        if self.verbose {
            eprintln!("{line}");
        }
        if self.trace.len() == SHOWN_STEPS {
            self.trace.pop_front();
        }
        self.trace.push_back(line);
    }

    /// Notes something that needs no words of its own.
    pub fn note_line(&mut self, what: &str) {
        self.note(|| what.to_owned());
    }

    pub fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    pub fn namespace_of(&self, process: usize) -> &NamespacePlan {
        &self.plan.namespaces[self.plan.processes[process].namespace]
    }

    pub fn is_hostile(&self, process: usize) -> bool {
        self.namespace_of(process).hostile
    }

    /// The sizes and limits of the next daemon.
    pub fn options(&self, node: NodeWriter) -> LaneOptions {
        let plan = &self.plan;
        LaneOptions {
            rules: DomainRules::any_user(),
            dir: self.dir.path().to_owned(),
            boot_id: bytemuck::cast([1, 2].map(|half| mix(u64::from(self.boots) << 8 | half))),
            node_name: "simulated".into(),
            node,
            pool_bytes: plan.extents * plan.extent_bytes,
            extent_bytes: plan.extent_bytes,
            nodes: crate::pool::MemoryNodes::default(),
            hugepages: false,
            max_blocks: plan.max_blocks,
            policy: plan.policy,
            admission: plan.admission,
            copy_threads: 1,
            checksum: plan.checksum,
            lease_ttl: plan.lease_ttl,
            lease_ttl_max: plan.lease_ttl * 2,
            incomplete_ttl: plan.incomplete_ttl,
            max_leases: plan.max_leases,
            max_sessions: plan.max_sessions,
            max_instances: 8,
            spin: Duration::ZERO,
            pool: PoolStart::Adopt,
            tier: plan.tier.as_ref().map(|tier| tier.options),
        }
    }

    fn node_path(&self) -> PathBuf {
        self.dir.path().join(format!("node-{}", self.boots))
    }

    /// Starts a daemon over the files that are there.
    pub fn start_daemon(&mut self) -> Result<(), LaneStartError> {
        let old = self.node_path();
        self.boots = self.boots.wrapping_add(1);
        if old.exists() {
            std::fs::remove_file(old)?;
        }
        let bytes = NodeWriter::FILE_BYTES as u64;
        if self.node_path().exists() {
            std::fs::remove_file(self.node_path())?;
        }
        let file = NamedFile::create(&self.node_path(), "node file", bytes).expect("a node file");
        let mapping = Arc::new(file.map(Access::ReadWrite).expect("a mapping"));
        let node = NodeWriter::create(mapping, &NodeHeader::zeroed()).expect("a node file");
        let reader = node.reader();
        let options = self.options(node);
        let wake = Arc::new(LaneWake::new()?);
        let mut copies = None;
        let max_tasks = self.plan.max_copy_tasks;
        let drives = self.drives.clone();
        let lane = SimLane::open(
            options,
            self.clock.clone(),
            wake.clone(),
            self.plan.task_bytes,
            |pool| {
                let store = drives.map(|drives| drives.open(&pool, wake.clone()));
                let made = SimCopies::new(pool, max_tasks, wake);
                copies = Some(made.clone());
                (made, store)
            },
        )?;
        self.daemon = Some(Daemon {
            lane,
            copies: copies.expect("made with the lane"),
            node: reader,
            sessions: 0,
            started: self.clock.now(),
        });
        Ok(())
    }

    /// What a process registers.
    pub fn spec(&self, process: usize) -> RegisterSpec {
        let plan = &self.plan.processes[process];
        let namespace = self.namespace_of(process);
        RegisterSpec {
            instance: format!("instance-{}", plan.instance),
            namespace: namespace_spec(namespace),
            world_size: namespace.ranks.len() as u32,
            rank: plan.rank,
            mode: if plan.save_only {
                Mode::SaveOnly
            } else {
                Mode::ReadWrite
            },
            groups: Vec::new(),
        }
    }

    /// The process and group whose memory a copy touches.
    pub fn owner_of(&self, target: &Arc<BoundLayout>) -> (usize, usize) {
        for process in &self.processes {
            let groups = process.memory.iter().flat_map(|memory| &memory.groups);
            for (at, group) in groups.enumerate() {
                if Arc::ptr_eq(&group.bound, target) {
                    return (process.number, at);
                }
            }
        }
        unreachable!("a copy touches memory that no process registered")
    }

    /// Brings the truth up to what the copies have done.
    pub fn absorb(&mut self) -> Checked {
        let Some(daemon) = &self.daemon else {
            return Ok(());
        };
        for event in daemon.copies.take_events() {
            match event {
                CopyEvent::Started(number, view) => self.task_started(number, &view)?,
                CopyEvent::Copied(view) => self.pages_copied(&view),
            }
        }
        self.absorb_drives()
    }

    fn task_started(&mut self, number: u64, view: &TaskView) -> Checked {
        self.count("copy tasks");
        if view.direction == Direction::Load {
            return Ok(());
        }
        for page in &view.pages {
            self.truth.pages.remove(&page.pool_offset);
        }
        let daemon = self.daemon.as_ref().expect("tasks come from a daemon");
        let others = daemon.copies.views_but(number);
        let at_drives = self.pages_at_drives();
        for page in &view.pages {
            let offset = page.pool_offset;
            let copied = others
                .iter()
                .any(|other| other.pages.iter().any(|page| page.pool_offset == offset));
            let taken = copied || at_drives.contains(&offset);
            ensure(!taken, "inv_2_no_page_is_reused_under_a_copy", || {
                format!(
                    "page {offset:#x} is given to a save while another copy or a drive touches it"
                )
            })?;
        }
        Ok(())
    }

    fn pages_copied(&mut self, view: &TaskView) {
        let (process, at) = self.owner_of(&view.target);
        let memory = self.processes[process].memory.as_mut().expect("its memory");
        let content = &mut memory.groups[at].content;
        for page in &view.pages {
            let block = page.block as usize;
            match view.direction {
                Direction::Save => match content[block] {
                    Some(what) => {
                        self.truth.pages.insert(page.pool_offset, what);
                    }
                    None => {
                        self.truth.pages.remove(&page.pool_offset);
                    }
                },
                Direction::Load => {
                    content[block] = self.truth.pages.get(&page.pool_offset).copied();
                }
            }
        }
    }

    /// The content that a process's next save of a block has.
    pub fn new_content(&mut self, process: usize, group: u16, hash: u64) -> Content {
        self.truth.last_version += 1;
        let plan = &self.plan.processes[process];
        let rank = plan.rank.unwrap_or(0) as usize;
        let namespace = &self.plan.namespaces[plan.namespace];
        let (shard, _) = namespace.shard(rank, group).unwrap_or((u16::MAX, 0));
        Content {
            namespace: plan.namespace,
            group,
            hash,
            shard,
            version: self.truth.last_version,
        }
    }
}

pub fn namespace_spec(namespace: &NamespacePlan) -> NamespaceSpec {
    NamespaceSpec {
        model: "m".into(),
        dtype: "bf16".into(),
        hash_algorithm: "blake3".into(),
        salt: namespace.salt.clone(),
        block_tokens: 16,
        ..NamespaceSpec::default()
    }
}

/// The digest by which the catalog knows a namespace.
fn digest(namespace: &NamespacePlan) -> [u8; 32] {
    let mut packed = Vec::new();
    for (rank, groups) in namespace.ranks.iter().enumerate() {
        for (group, page) in groups {
            let first = page / 3 / 64 * 64 + 64;
            packed.push(PackedGroup {
                rank: rank as u32,
                group: *group,
                segment_bytes: vec![first, page - first],
                replicated: false,
            });
        }
    }
    namespace_spec(namespace).digest(namespace.ranks.len() as u32, &packed)
}
