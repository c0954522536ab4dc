//! The targets without libFuzzer: corpus, regressions, and random mutations of both.
//!
//! `PEGAFLOW_FUZZ_CASES` sets the mutations per target, `PEGAFLOW_FUZZ_SEED` their start;
//! `PEGAFLOW_FUZZ_WRITE_SEEDS=1` writes the corpus anew instead.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use pegaflow_shm::control::{
    ClientMessage, DaemonMessage, DeviceHandle, DeviceUuid, GroupLayout, Hello, IpcHandle,
    MemoryRef, Mode, PROTOCOL_MAX, RegisterSpec, SegmentLayout, Welcome,
};
use pegaflow_shm::namespace::NamespaceSpec;
use pegaflow_shm::status::Status;
use serde::Serialize;

use super::input::Seed;
use super::{TARGETS, Target};

const CASES: u64 = 300;

fn folder(kind: &str, target: &str) -> PathBuf {
    let engine = Path::new(env!("CARGO_MANIFEST_DIR"));
    engine.join("../fuzz").join(kind).join(target)
}

fn number(variable: &str, default: u64) -> u64 {
    let text = std::env::var(variable).unwrap_or_default();
    text.parse().unwrap_or(default)
}

fn inputs(target: &str) -> Vec<(String, Vec<u8>)> {
    let folders = ["corpus", "regressions"].map(|kind| folder(kind, target));
    let files = folders.iter().flat_map(fs::read_dir).flatten().flatten();
    let mut inputs: Vec<_> = files
        .map(|file| {
            (
                file.path().display().to_string(),
                fs::read(file.path()).unwrap(),
            )
        })
        .collect();
    inputs.sort();
    inputs
}

/// Runs a target, and keeps an input that fails it.
fn run(target: &Target, origin: &str, bytes: &[u8]) {
    if catch_unwind(AssertUnwindSafe(|| target.1(bytes))).is_err() {
        let path = std::env::temp_dir().join(format!("pegaflow-fuzz-{}", target.0));
        fs::write(&path, bytes).unwrap();
        let (name, path) = (target.0, path.display());
        panic!(
            "{name} fails ({origin}); the input is in {path}: add it to fuzz/regressions/{name}"
        );
    }
}

struct Random(u64);

impl Random {
    /// splitmix64.
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }
}

/// What libFuzzer does without looking: bits, bytes, numbers, pieces moved, doubled and taken away.
fn mutate(random: &mut Random, bytes: &mut Vec<u8>, other: &[u8]) {
    const NUMBERS: [u64; 8] = [0, 1, 0x7f, 0xff, 0xffff, 0x7fff_ffff, 0xffff_ffff, u64::MAX];
    for _ in 0..=random.below(6) {
        let at = random.below(bytes.len() + 1);
        let end = (at + random.below(24)).min(bytes.len());
        match random.below(8) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            1 if at < bytes.len() => bytes[at] = random.next() as u8,
            2 => {
                let number = NUMBERS[random.below(NUMBERS.len())].to_le_bytes();
                let end = (at + (1 << random.below(4))).min(bytes.len());
                bytes[at..end].copy_from_slice(&number[..end - at]);
            }
            3 => drop(bytes.drain(at..end)),
            4 => {
                let piece = bytes[at..end].to_vec();
                let to = random.below(bytes.len() + 1);
                bytes.splice(to..to, piece);
            }
            5 => {
                let from = random.below(other.len() + 1);
                let until = (from + random.below(64)).min(other.len());
                bytes.splice(at..end, other[from..until].iter().copied());
            }
            6 => bytes.insert(at, random.next() as u8),
            _ => bytes.truncate(at.max(bytes.len() / 2)),
        }
    }
}

fn replay_and_mutate(name: &str) {
    let target = TARGETS.iter().find(|target| target.0 == name).unwrap();
    if std::env::var_os("PEGAFLOW_FUZZ_WRITE_SEEDS").is_some() {
        return write_seeds(target);
    }
    let inputs = inputs(name);
    assert!(inputs.len() >= 8, "the corpus of {name} is committed");
    for (path, bytes) in &inputs {
        run(target, path, bytes);
    }
    let mut random = Random(number("PEGAFLOW_FUZZ_SEED", 1));
    for case in 0..number("PEGAFLOW_FUZZ_CASES", CASES) {
        let (path, mut bytes) = inputs[random.below(inputs.len())].clone();
        let other = &inputs[random.below(inputs.len())].1;
        mutate(&mut random, &mut bytes, other);
        run(target, &format!("case {case}, from {path}"), &bytes);
    }
}

fn write_seeds(target: &Target) {
    let folder = folder("corpus", target.0);
    // A corpus of seeds alone: what was found by chance belongs to the regressions.
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    for (at, seed) in target.2().iter().enumerate() {
        fs::write(folder.join(format!("{at:02}")), seed).unwrap();
    }
}

#[test]
fn control_packets_break_nothing() {
    replay_and_mutate("control");
}

#[test]
fn a_damaged_catalog_breaks_nothing() {
    replay_and_mutate("catalog");
}

#[test]
fn hostile_descriptors_break_nothing() {
    replay_and_mutate("descriptors");
}

#[test]
fn a_ring_shared_with_a_liar_breaks_nothing() {
    replay_and_mutate("ring");
}

#[test]
fn an_index_of_garbage_breaks_nothing() {
    replay_and_mutate("index");
}

fn packet(seed: Seed, message: &impl Serialize) -> Seed {
    seed.bytes(&serde_json::to_vec(message).unwrap()).u8(0)
}

fn namespace(model: &str) -> NamespaceSpec {
    NamespaceSpec {
        model: model.into(),
        dtype: "bf16".into(),
        hash_algorithm: "blake3".into(),
        salt: "s".into(),
        block_tokens: 16,
        ..NamespaceSpec::default()
    }
}

/// A session as an engine opens it: Hello, regions, registrations of several layouts, and their
/// ends; and the daemon's side of one.
pub(super) fn control_seeds() -> Vec<Vec<u8>> {
    let hello = ClientMessage::Hello(Hello {
        protocol_min: 1,
        protocol_max: PROTOCOL_MAX,
        client_version: "1.0".into(),
        client_name: "worker-0".into(),
        c2d_bytes: super::control::SHAPE.total_bytes() as u64,
        completion_slots: 256,
    });
    let region = |seq, region, bytes| ClientMessage::AddRegion { seq, region, bytes };
    let start = || packet(Seed::default().u8(1).u8(0), &hello);
    let mut seeds = vec![start().0];
    for patch in [0u8, 8, 10, 16, 56, 64, 68, 72, 80, 84] {
        seeds.push(packet(Seed::default().u8(1).u8(1).u8(patch).u8(3), &hello).0);
    }
    for (at, segments) in layouts().into_iter().enumerate() {
        let spec = |rank| RegisterSpec {
            instance: "engine".into(),
            namespace: namespace("llama"),
            world_size: 2,
            rank,
            mode: [Mode::ReadWrite, Mode::SaveOnly][at % 2],
            groups: rank.map_or(Vec::new(), |_| {
                vec![GroupLayout {
                    group: at as u16 % 3,
                    num_blocks: 64,
                    segments: segments.clone(),
                    replicated: false,
                }]
            }),
        };
        let register = |seq, rank| ClientMessage::Register {
            seq,
            signals: None,
            registration: Box::new(spec(rank)),
        };
        let mut seed = packet(start(), &region(1, 0, 1 << 20));
        seed = packet(seed, &region(2, 7, 1 << 16));
        seed = packet(seed, &register(3, Some(0)));
        seed = packet(seed, &register(4, Some(1)));
        seed = packet(seed, &register(5, None));
        seed = packet(seed, &ClientMessage::RemoveRegion { seq: 6, region: 0 });
        let unregister = |registration| ClientMessage::Unregister {
            seq: 7,
            registration,
        };
        seed = packet(packet(seed, &unregister(1)), &unregister(2));
        seed = packet(seed, &ClientMessage::RemoveRegion { seq: 8, region: 0 });
        seeds.push(seed.0);
    }
    seeds.push(device_seed());
    let mut seed = Seed::default().u8(0).u8(0);
    for message in daemon_messages() {
        seeds.push(packet(Seed::default().u8(0).u8(0), &message).0);
        seed = packet(seed, &message);
    }
    seeds.push(seed.0);
    seeds
}

/// GPU memory by handle and in chunks, events, and a registration over them.
fn device_seed() -> Vec<u8> {
    let device = DeviceUuid([0x5a; 16]);
    let add = |seq, region, bytes, handle| ClientMessage::AddDeviceRegion {
        seq,
        region,
        bytes,
        device,
        handle,
    };
    let handle = IpcHandle([7; 64]);
    let mut seed = packet(Seed::default().u8(1).u8(0), &{
        add(1, 1, 1 << 20, DeviceHandle::Ipc { handle })
    });
    let chunks = vec![1 << 21; 70];
    seed = packet(seed, &add(2, 6, 70 << 21, DeviceHandle::Vmm { chunks }));
    seed = packet(seed, &ClientMessage::AddDeviceChunks { seq: 3, region: 6 });
    let handles = vec![handle; 2];
    let events = ClientMessage::AddEvents {
        seq: 4,
        device,
        handles,
    };
    packet(seed, &events).0
}

/// Segments as engines have them: K and V apart, together, blocks first, two memories.
fn layouts() -> Vec<Vec<SegmentLayout>> {
    let segment = |memory, base, block_stride, bytes| SegmentLayout {
        memory,
        base,
        block_stride,
        bytes,
    };
    let (region, other) = (MemoryRef::Region(0), MemoryRef::Region(7));
    vec![
        vec![segment(region, 0, 4096, 4096)],
        vec![
            segment(region, 0, 4096, 2048),
            segment(region, 2048, 4096, 2048),
        ],
        (0..8)
            .map(|layer| segment(region, layer * 65536, 1024, 1024))
            .collect(),
        (0..8)
            .map(|layer| segment(region, layer * 512, 4096, 512))
            .collect(),
        vec![segment(region, 0, 4096, 4096), segment(other, 0, 1024, 512)],
        vec![segment(MemoryRef::Process, 1 << 40, 8192, 8192)],
        vec![
            segment(region, 0, 4096, 4096),
            segment(region, 4000, 4096, 96),
        ],
        vec![segment(region, u64::MAX - 4095, 4096, 4096)],
    ]
}

fn daemon_messages() -> Vec<DaemonMessage> {
    let text = || "why".to_owned();
    vec![
        DaemonMessage::Welcome(Welcome {
            protocol: PROTOCOL_MAX,
            daemon_version: "1.0".into(),
            boot_id: "07".repeat(16),
            node: "node".into(),
            session: 1,
            daemon_pid: 2,
            d2c_bytes: 1 << 18,
            index_bytes: 1 << 20,
            lease_ttl_ms: 30_000,
        }),
        DaemonMessage::Refused {
            status: Status::Limit,
            message: text(),
        },
        DaemonMessage::Done { seq: 1 },
        DaemonMessage::Failed {
            seq: 2,
            status: Status::BadLayout,
            message: text(),
        },
        DaemonMessage::Registered {
            seq: 3,
            registration: 1,
            signals: false,
        },
        DaemonMessage::Ready {
            registration: 1,
            namespace: 0,
        },
        DaemonMessage::NotReady { registration: 1 },
        DaemonMessage::Draining { limit_ms: 30_000 },
        DaemonMessage::DeviceDown {
            device: DeviceUuid([0x5a; 16]),
            message: text(),
        },
        DaemonMessage::DeviceUp {
            device: DeviceUuid([0x5a; 16]),
        },
        DaemonMessage::Closing {
            status: Status::Draining,
            message: text(),
        },
    ]
}
