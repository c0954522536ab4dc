//! What can go wrong with memory and with copies.
#![forbid(unsafe_code)]

use std::io;

use crate::device::DriverError;
use crate::layout::MemoryName;
use pegaflow_shm::control::DeviceUuid;

use super::task::Direction;

/// A client's memory that the daemon cannot or will not use.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages name every field")]
pub enum MemoryError {
    #[error("region of zero bytes; give the size of the memfd")]
    EmptyRegion,
    #[error("region of {asked_bytes} bytes, but its memfd has {file_bytes}; ftruncate it first")]
    RegionTooSmall { asked_bytes: u64, file_bytes: u64 },
    #[error(
        "region is not sealed against shrinking (seals {seals:#x}): its owner could crash the \
         daemon; create it with memfd_create(MFD_ALLOW_SEALING) and add F_SEAL_SHRINK"
    )]
    NotSealed { seals: i32 },
    #[error(
        "region lies on file system type {magic:#x}, not tmpfs: only a plain memfd can be shared \
         (a hole in huge-page memory would raise SIGBUS in the daemon)"
    )]
    NotTmpfs { magic: i64 },
    #[error("{call} on a client's region failed: {source}; send a memfd that can be mapped")]
    Region {
        call: &'static str,
        source: io::Error,
    },
    #[error(
        "may not open the memory of process {pid}: {source}; run the daemon as the same user with \
         ptrace allowed (the client calls prctl(PR_SET_PTRACER), or kernel.yama.ptrace_scope=0), \
         or give it CAP_SYS_PTRACE and CAP_DAC_OVERRIDE, or register a shared region"
    )]
    NotPermitted { pid: i32, source: io::Error },
    #[error(
        "the memory of process {pid} belongs to user {owner}, its session to user {uid}: it runs a \
         program with other rights, or forbids to be traced (prctl(PR_SET_DUMPABLE)); connect \
         from the program whose memory it is, or register a shared region"
    )]
    OtherOwner { pid: i32, uid: u32, owner: u32 },
    #[error("process {pid} is gone; register again from a live process")]
    OwnerGone { pid: i32 },
    #[error("{call} for process {pid} failed: {source}; is /proc mounted for the daemon?")]
    Process {
        pid: i32,
        call: &'static str,
        source: io::Error,
    },
}

/// A layout that does not fit the memory it was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages name every field")]
pub enum BindError {
    #[error("part {part} lies in {memory}, which was not given; register it first")]
    Missing { part: usize, memory: MemoryName },
    #[error("part {part} lies in {memory} but memory of another kind was given")]
    WrongKind { part: usize, memory: MemoryName },
    #[error(
        "part {part} ends at byte {end} of {memory}, which has {region_bytes} bytes; \
         validate the layout against this region"
    )]
    OutOfRange {
        part: usize,
        memory: MemoryName,
        end: u64,
        region_bytes: u64,
    },
    #[error(
        "part {part} lies in {memory} and other parts of the group do not: the segments of a \
         registration lie all on one GPU, or none of them on any"
    )]
    MixedKinds { part: usize, memory: MemoryName },
    #[error(
        "part {part} lies in {memory} on GPU {device}, earlier parts of the group on GPU \
         {earlier}: all device segments of a registration lie on one device"
    )]
    OtherDevice {
        part: usize,
        memory: MemoryName,
        device: DeviceUuid,
        earlier: DeviceUuid,
    },
    #[error("part {part} lies in {memory}, which went when GPU {device} was reset: share it again")]
    DeviceReset {
        part: usize,
        memory: MemoryName,
        device: DeviceUuid,
    },
}

/// Why a task did not copy all its pages.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages name every field")]
pub enum CopyError {
    #[error("cancelled by its owner")]
    Cancelled,
    #[error("page {page} at pool offset {offset} ends beyond the pool of {pool_bytes} bytes")]
    PoolRange {
        page: usize,
        offset: u64,
        pool_bytes: u64,
    },
    #[error("block id {block} is out of range: the group was registered with {num_blocks} blocks")]
    BlockRange { block: u32, num_blocks: u32 },
    #[error("process {pid} is gone or runs another program; its blocks are out of reach")]
    OwnerGone { pid: i32 },
    #[error(
        "{direction:?} may not touch the memory of process {pid}: the same user with ptrace \
         allowed is needed (the client calls prctl(PR_SET_PTRACER), or \
         kernel.yama.ptrace_scope=0), or CAP_SYS_PTRACE, or a shared region"
    )]
    NotPermitted { pid: i32, direction: Direction },
    #[error(
        "{direction:?}: block {block} part {part} (registered segment {segment}): {address:#x} of \
         process {pid} is not mapped that way; register layouts before use and keep them mapped"
    )]
    BadAddress {
        pid: i32,
        direction: Direction,
        block: u32,
        part: usize,
        segment: usize,
        address: u64,
    },
    #[error("{direction:?} with process {pid} failed: {}", io::Error::from_raw_os_error(*errno))]
    System {
        pid: i32,
        direction: Direction,
        errno: i32,
    },
    #[error(
        "the page at pool offset {offset} has checksum {found:#018x}, recorded was \
         {recorded:#018x}: its memory has changed; is the machine's memory sound?"
    )]
    Checksum {
        offset: u64,
        recorded: u64,
        found: u64,
    },
    #[error(
        "no thread could be started for the session's process memory: {}; raise the daemon's limit \
         of threads (TasksMax, ulimit -u) or use shared regions",
        io::Error::from_raw_os_error(*errno)
    )]
    NoThread { errno: i32 },
    #[error("{direction:?} with GPU {device} failed: {error}")]
    Device {
        device: DeviceUuid,
        direction: Direction,
        error: DriverError,
    },
    #[error("GPU {device} was reset after an error: its memory must be registered again")]
    DeviceReset { device: DeviceUuid },
    #[error("the copy thread panicked: {message}; this is a fault of the daemon, please report it")]
    Panicked { message: String },
}
