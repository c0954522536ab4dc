//! Which part of the pool lies near which GPUs, on machines with several memory nodes.
//!
//! A GPU reaches the memory of its own node at the bus's full rate; what lies beyond another
//! socket's link it shares with everything else that crosses it. So the pool is cut by extents into
//! one part for each node that has GPUs, as large as its share of the GPUs. A part's memory is
//! brought into being by threads on the node's processors, for which the kernel takes the node's
//! memory as long as there is some, and the pages that a GPU's engine saves are taken from the part
//! near it as long as it has one free.
//!
//! The parts follow from the machine alone, so that the next daemon cuts an adopted pool alike.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::Path;

use rustix::thread::{CpuSet, sched_setaffinity};

use super::ExtentId;

/// The memory nodes that have GPUs. None where there is nothing to choose: no GPU whose node is
/// known, or one node only.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryNodes {
    nodes: Vec<MemoryNode>,
}

/// A memory node.
#[derive(Clone, Debug, PartialEq, Eq)]
struct MemoryNode {
    number: u32,
    gpus: u32,
    cpus: Vec<usize>,
}

/// A part of the pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodePart {
    /// The memory node that it is near to.
    pub node: u32,
    /// Its extents.
    pub extents: Range<ExtentId>,
    /// Processors of the node.
    pub cpus: Vec<usize>,
}

impl MemoryNodes {
    /// Asks `sys` (`/sys` on a real machine) about the nodes of these GPUs.
    pub fn of_gpus(sys: &Path, gpus: impl IntoIterator<Item = Option<u32>>) -> MemoryNodes {
        let folder = sys.join("devices/system/node");
        let listed = |name: &str| list(&folder.join(name)).unwrap_or_default();
        if listed("has_memory").len() < 2 {
            return MemoryNodes::default();
        }
        let mut counts = BTreeMap::<u32, u32>::new();
        for node in gpus.into_iter().flatten() {
            *counts.entry(node).or_default() += 1;
        }
        let node = |(number, gpus)| MemoryNode {
            number,
            gpus,
            cpus: listed(&format!("node{number}/cpulist")),
        };
        MemoryNodes {
            nodes: counts.into_iter().map(node).collect(),
        }
    }

    /// Cuts a pool of so many extents: all of them, in order, by the nodes' shares of the GPUs.
    pub fn parts(&self, extents: u32) -> Vec<NodePart> {
        let gpus: u32 = self.nodes.iter().map(|node| node.gpus).sum();
        let (mut first, mut before) = (0, 0);
        let part = |node: &MemoryNode| {
            before += node.gpus;
            let end = (u64::from(extents) * u64::from(before) / u64::from(gpus)) as u32;
            let extents = std::mem::replace(&mut first, end)..end;
            NodePart {
                node: node.number,
                extents,
                cpus: node.cpus.clone(),
            }
        };
        let parts = self.nodes.iter().map(part);
        parts.filter(|part| !part.extents.is_empty()).collect()
    }
}

/// A list of the kernel's such as `0-3,8`.
fn list(file: &Path) -> io::Result<Vec<usize>> {
    let text = fs::read_to_string(file)?;
    let wrong = || io::Error::new(io::ErrorKind::InvalidData, format!("{text:?}"));
    let mut numbers = Vec::new();
    for range in text.trim().split(',').filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let number = |text: &str| text.parse::<usize>().map_err(|_| wrong());
        numbers.extend(number(first)?..=number(last)?);
    }
    Ok(numbers)
}

/// Has the calling thread run on these processors only, near whose node the kernel then takes
/// memory for it.
pub(super) fn run_on(cpus: &[usize]) -> io::Result<()> {
    let mut set = CpuSet::new();
    for cpu in cpus.iter().filter(|cpu| **cpu < CpuSet::MAX_CPU) {
        set.set(*cpu);
    }
    Ok(sched_setaffinity(None, &set)?)
}

/// How much of an address range lies on which node, in bytes, as this process has it mapped.
pub(super) fn bytes_by_node(range: Range<u64>) -> io::Result<BTreeMap<u32, u64>> {
    Ok(count(&fs::read_to_string("/proc/self/numa_maps")?, &range))
}

fn count(numa_maps: &str, range: &Range<u64>) -> BTreeMap<u32, u64> {
    let mut bytes = BTreeMap::new();
    for line in numa_maps.lines() {
        let mut words = line.split(' ');
        let start = words.next().and_then(|at| u64::from_str_radix(at, 16).ok());
        if !start.is_some_and(|start| range.contains(&start)) {
            continue;
        }
        let size = line.rsplit_once("kernelpagesize_kB=");
        let kib: u64 = size.and_then(|(_, kib)| kib.parse().ok()).unwrap_or(4);
        let pages = words.filter_map(|word| word.strip_prefix('N')?.split_once('='));
        for (node, pages) in pages {
            if let (Ok(node), Ok(pages)) = (node.parse::<u32>(), pages.parse::<u64>()) {
                *bytes.entry(node).or_default() += pages * kib * 1024;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine of two nodes with eight processors each.
    fn machine(has_memory: &str) -> tempfile::TempDir {
        let sys = tempfile::tempdir().expect("a folder");
        let folder = sys.path().join("devices/system/node");
        for (node, cpus) in [("node0", "0-3,8-11\n"), ("node1", "4-7,12-15\n")] {
            fs::create_dir_all(folder.join(node)).expect("folders");
            fs::write(folder.join(node).join("cpulist"), cpus).expect("a file");
        }
        fs::write(folder.join("has_memory"), has_memory).expect("a file");
        sys
    }

    #[test]
    fn the_parts_are_all_of_the_pool_by_the_nodes_shares_of_the_gpus() {
        let sys = machine("0-1\n");
        let parts = |gpus: &[Option<u32>], extents| {
            let nodes = MemoryNodes::of_gpus(sys.path(), gpus.iter().copied());
            let parts = nodes.parts(extents).into_iter();
            let part = |part: NodePart| (part.node, part.extents, part.cpus[0]);
            parts.map(part).collect::<Vec<_>>()
        };
        let even = [Some(0), Some(1), Some(0), Some(1)];
        assert_eq!(parts(&even, 11), [(0, 0..5, 0), (1, 5..11, 4)]);
        let uneven = [Some(1), Some(1), Some(1), Some(0), None];
        assert_eq!(parts(&uneven, 8), [(0, 0..2, 0), (1, 2..8, 4)]);
        assert_eq!(parts(&[Some(1)], 8), [(1, 0..8, 4)], "GPUs on one side");
        assert_eq!(parts(&even, 1), [(1, 0..1, 4)], "too small to be cut");
        assert_eq!(parts(&[None, None], 8), []);
    }

    #[test]
    fn a_machine_of_one_node_is_not_cut() {
        for has_memory in ["0\n", "", "nonsense\n"] {
            let sys = machine(has_memory);
            let nodes = MemoryNodes::of_gpus(sys.path(), [Some(0), Some(1)]);
            assert_eq!(nodes, MemoryNodes::default(), "{has_memory:?}");
            assert_eq!(nodes.parts(8), []);
        }
        let nothing = tempfile::tempdir().expect("a folder");
        let nodes = MemoryNodes::of_gpus(nothing.path(), [Some(0), Some(1)]);
        assert_eq!(nodes, MemoryNodes::default());
    }

    #[test]
    fn bytes_are_counted_by_node_over_all_mappings_of_the_range() {
        let maps = "7f0000000000 default file=/pool dirty=3 N0=2 N1=1 kernelpagesize_kB=4\n\
                    7f0000200000 default file=/pool huge dirty=1 N1=1 kernelpagesize_kB=2048\n\
                    7f0000400000 default anon=5 N0=5 kernelpagesize_kB=4\n";
        let found = count(maps, &(0x7f00_0000_0000..0x7f00_0040_0000));
        let expected = BTreeMap::from([(0, 8192), (1, 4096 + (2 << 20))]);
        assert_eq!(found, expected);
    }

    #[test]
    fn a_thread_runs_on_the_processors_that_it_is_told_to() {
        let first = list(Path::new("/sys/devices/system/cpu/online")).expect("a list")[0];
        let cpus = std::thread::spawn(move || {
            run_on(&[first]).expect("a processor that is there");
            let set = rustix::thread::sched_getaffinity(None).expect("a set");
            (set.is_set(first), set.count())
        });
        assert_eq!(cpus.join().expect("no panic"), (true, 1));
        assert!(run_on(&[]).is_err(), "nowhere to run");
    }
}
