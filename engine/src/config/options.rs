//! The table of all options. A new option is one entry here and, if it has limits, a line in
//! `check`.

#![forbid(unsafe_code)]

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use pegaflow_shm::paths;

use super::devices::{Gpus, Rate};
use super::domains::DomainRule;
use super::ids::{Gids, Uids};
use super::ssd::{Admit, MaybeSpan, Shards, SsdIo, SsdShard};
use super::value::{
    AdmissionChoice, BadValue, Choice, Count, FileMode, Hugepages, Kind, Listen, LogFormat,
    LogLevel, Path, PoolStart, Size, Span, Switch, Text,
};
use crate::copy::ChecksumMode;
use crate::device::{DeviceChoice, DeviceOptions, PinMode, STAGING_SLOTS};
use crate::isolation::DomainRules;
use crate::policy::{AdmissionKind, PolicyKind};
use crate::tier::AdmitWhen;

/// How an option stands on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// `--name VALUE`.
    Single,
    /// `--name VALUE`, as often as wanted.
    List,
    /// `--name` alone.
    Switch,
}

/// One option, as the command line, the environment and the file know it.
pub(super) struct OptionDef {
    pub(super) name: &'static str,
    pub(super) env: &'static str,
    pub(super) value_name: &'static str,
    pub(super) shape: Shape,
    pub(super) help: &'static str,
    /// Words for a default that follows from something else; empty when it is a constant.
    pub(super) derived: &'static str,
}

macro_rules! options {
    ($($field:ident: $type:ty, $kind:ty, $shape:ident, $default:expr, $derived:literal,
       $name:literal, $env:literal, $value_name:literal, $help:literal;)*) => {
        /// Every option of the daemon, with its effective value.
        #[derive(Clone, Debug, PartialEq)]
        pub struct Config {
            $(#[doc = $help] pub $field: $type,)*
            /// Isolation domains of several users, or of some models; in the file alone.
            pub domains: Vec<DomainRule>,
        }

        /// The table in the order of `--help`.
        pub(super) const OPTIONS: &[OptionDef] = &[$(OptionDef {
            name: $name,
            env: $env,
            value_name: $value_name,
            shape: Shape::$shape,
            help: $help,
            derived: $derived,
        },)*];

        impl Config {
            /// Defaults before those that follow from others are filled in.
            pub(super) fn constants() -> Config {
                Config { $($field: $default,)* domains: Vec::new() }
            }

            /// Reads a value into the option at this position of the table.
            pub(super) fn set(&mut self, option: &str, text: &str) -> Result<(), BadValue> {
                match option {
                    $($name => self.$field = <$kind as Kind>::parse(text)?,)*
                    _ => return Err(BadValue(format!("no option is called `{option}`"))),
                }
                Ok(())
            }

            /// The option's value as a TOML literal.
            pub(super) fn show(&self, option: &str) -> String {
                match option {
                    $($name => <$kind as Kind>::show(&self.$field),)*
                    _ => String::new(),
                }
            }
        }
    };
}

options! {
    node: String, Text, Single, paths::DEFAULT_NODE.to_owned(), "",
        "node", "PEGAFLOW_NODE", "NAME",
        "Name of the node: its shared files lie in /dev/shm/pegaflow/NAME. Two daemons on one host need two names";
    socket: PathBuf, Path, Single, PathBuf::new(),
        "/run/pegaflow/NODE.sock for root, else pegaflow/NODE.sock in $XDG_RUNTIME_DIR",
        "socket", "PEGAFLOW_SOCKET", "PATH",
        "Unix socket that engines connect to; an absolute path";
    socket_mode: u32, FileMode, Single, 0o600, "0600, or 0666 when other users may connect",
        "socket-mode", "PEGAFLOW_SOCKET_MODE", "OCTAL",
        "Permission bits of the socket";
    allow_uid: Vec<u32>, Uids, List, Vec::new(), "the daemon's own user and root",
        "allow-uid", "PEGAFLOW_ALLOW_UID", "UID",
        "User that may connect besides the daemon's own and root, by number or name; repeat it for several. Users see each other's blocks only where a domain table of the file says so";
    allow_gid: Vec<u32>, Gids, List, Vec::new(), "none",
        "allow-gid", "PEGAFLOW_ALLOW_GID", "GID",
        "Group whose members may connect, by number or name, primary or supplementary; repeat it for several";
    pool_bytes: u64, Size, Single, 1 << 30, "",
        "pool-size", "PEGAFLOW_POOL_SIZE", "SIZE",
        "Memory for blocks, in bytes or with a unit (512MB, 1GiB); allocated at start, rounded down to whole extents";
    extent_bytes: u64, Size, Single, 64 << 20, "",
        "extent-size", "PEGAFLOW_EXTENT_SIZE", "SIZE",
        "Part of the pool that serves one page size at a time, in bytes or with a unit; bounds the largest page. Made smaller when the pool would hold fewer than 4";
    max_blocks: u32, Count, Single, 0, "pool size / 4 KiB, at least 65536",
        "max-blocks", "PEGAFLOW_MAX_BLOCKS", "COUNT",
        "Most blocks that one user's index holds (128 bytes of memory each, when used)";
    policy: PolicyKind, Choice<PolicyKind>, Single, PolicyKind::Lru, "",
        "policy", "PEGAFLOW_POLICY", "POLICY",
        "Which block leaves first when memory is wanted: lru or s3-fifo";
    admission: AdmissionKind, AdmissionChoice, Single, AdmissionKind::Off, "",
        "admission", "PEGAFLOW_ADMISSION", "GATE",
        "Gate before a full cache: off (also: none) lets everything in, tinylfu what was used more often than the victim";
    copy_threads: u32, Count, Single, 0, "number of cores, at most 4",
        "copy-threads", "PEGAFLOW_COPY_THREADS", "COUNT",
        "Threads that copy blocks, and that bring the pool's memory into being";
    checksum: ChecksumMode, Choice<ChecksumMode>, Single, ChecksumMode::Off, "",
        "checksum", "PEGAFLOW_CHECKSUM", "MODE",
        "Checksums of pages, taken after a save and compared before each load: off, sampled (every 16th saved page) or always";
    lease_ttl: Duration, Span, Single, Duration::from_secs(30), "",
        "lease-ttl", "PEGAFLOW_LEASE_TTL", "TIME",
        "How long a lease lives when the query names no time, such as 30s";
    lease_ttl_max: Duration, Span, Single, Duration::from_secs(600), "",
        "lease-ttl-max", "PEGAFLOW_LEASE_TTL_MAX", "TIME",
        "Longest life that a query may ask for its lease, such as 10m";
    incomplete_ttl: Duration, Span, Single, Duration::from_secs(60), "",
        "incomplete-ttl", "PEGAFLOW_INCOMPLETE_TTL", "TIME",
        "How long a block waits for the shards of its remaining ranks before it is thrown away";
    max_sessions: u32, Count, Single, 256, "",
        "max-sessions", "PEGAFLOW_MAX_SESSIONS", "COUNT",
        "Most connected processes, 1 to 256";
    max_leases: u32, Count, Single, 65_536, "",
        "max-leases", "PEGAFLOW_MAX_LEASES", "COUNT",
        "Most live leases of all sessions";
    max_instances: u32, Count, Single, 128, "",
        "max-instances", "PEGAFLOW_MAX_INSTANCES", "COUNT",
        "Most registered engine replicas";
    http: Option<SocketAddr>, Listen, Single, Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 9464))), "",
        "http", "PEGAFLOW_HTTP", "ADDRESS",
        "Where /metrics and /health are served: IP:PORT (port 0 takes a free one), or off";
    http_allow_remote: bool, Switch, Switch, false, "",
        "http-allow-remote", "PEGAFLOW_HTTP_ALLOW_REMOTE", "BOOL",
        "Allow --http on an address that other hosts can reach; the pages are not protected";
    spin_us: u32, Count, Single, 40, "",
        "spin-us", "PEGAFLOW_SPIN_US", "MICROSECONDS",
        "How long the lane polls without work before it sleeps, in microseconds; 0 sleeps at once";
    hugepages: Hugepages, Choice<Hugepages>, Single, Hugepages::Off, "",
        "hugepages", "PEGAFLOW_HUGEPAGES", "MODE",
        "Hugepages for the pool: off, or advise (the log says what the kernel gave)";
    pool: PoolStart, Choice<PoolStart>, Single, PoolStart::Adopt, "",
        "pool", "PEGAFLOW_POOL", "START",
        "The previous daemon's pool of this node: adopt takes its sealed blocks over (and starts empty, with a warning, if it does not fit), fresh throws it away";
    devices: DeviceChoice, Gpus, Single, DeviceChoice::Auto, "",
        "devices", "PEGAFLOW_DEVICES", "GPUS",
        "GPUs whose memory engines may share: auto takes all that the driver shows, off does not look for any; or UUIDs as nvidia-smi -L prints them, separated by commas";
    pin: PinMode, Choice<PinMode>, Single, PinMode::Background, "",
        "pin", "PEGAFLOW_PIN", "MODE",
        "When the pool is pinned for GPUs, about 0.05 s for each GiB: start, before the daemon is ready; background, from the first engine with GPU memory on, whose copies are slower meanwhile; or off";
    device_staging: u64, Size, Single, 128 << 20, "",
        "device-staging", "PEGAFLOW_DEVICE_STAGING", "SIZE",
        "Memory of each GPU in which small segments are gathered, taken with the first engine on it, in bytes or with a unit; 0 copies every segment on its own";
    d2h_limit: Option<u64>, Rate, Single, None, "",
        "d2h-limit", "PEGAFLOW_D2H_LIMIT", "RATE",
        "Most bytes a second that saves read from one GPU, with or without a unit (20GB), or off";
    ssd: Vec<SsdShard>, Shards, List, Vec::new(), "none",
        "ssd", "PEGAFLOW_SSD", "PATH[:SIZE]",
        "File of the SSD tier, an absolute path, made with this size if it is not there; with another size than the file's it grows or shrinks. Repeat it for several files, on one drive or on several: blocks spread over all";
    ssd_admit: AdmitWhen, Admit, Single, AdmitWhen::Evict, "",
        "ssd-admit", "PEGAFLOW_SSD_ADMIT", "WHEN",
        "Which blocks the SSD tier is given: evict, those about to be evicted; seal, all as soon as they are complete; or hits:N, those that queries have found N times";
    ssd_write_limit: Option<u64>, Rate, Single, None, "",
        "ssd-write-limit", "PEGAFLOW_SSD_WRITE_LIMIT", "RATE",
        "Most bytes a second written to the SSD tier, with or without a unit (500MB), or off";
    ssd_save_wait: Option<Duration>, MaybeSpan, Single, None, "",
        "ssd-save-wait", "PEGAFLOW_SSD_SAVE_WAIT", "TIME",
        "How long the answer to a save may wait for the SSD tier to write what later saves would evict, such as 1s; or off: what was not written in time is lost below";
    ssd_io: SsdIo, Choice<SsdIo>, Single, SsdIo::Auto, "",
        "ssd-io", "PEGAFLOW_SSD_IO", "ENGINE",
        "How bytes get to the drives: uring (io_uring), threads (pread and pwrite), or auto, io_uring where the system allows it; the log says which";
    ssd_queue_depth: u32, Count, Single, 32, "",
        "ssd-queue-depth", "PEGAFLOW_SSD_QUEUE_DEPTH", "COUNT",
        "Most requests at one SSD shard's drive at a time; with --ssd-io threads, its number of threads";
    ssd_sqpoll: Option<Duration>, MaybeSpan, Single, None, "",
        "ssd-sqpoll", "PEGAFLOW_SSD_SQPOLL", "TIME",
        "Has a kernel thread poll for requests of each SSD shard, which takes a core until it was idle for so long, such as 50ms; or off";
    ssd_policy: PolicyKind, Choice<PolicyKind>, Single, PolicyKind::Lru, "",
        "ssd-policy", "PEGAFLOW_SSD_POLICY", "POLICY",
        "Which segment of an SSD shard is used anew first when it is full: lru or s3-fifo";
    ssd_open_wait: Duration, Span, Single, Duration::from_secs(10), "",
        "ssd-open-wait", "PEGAFLOW_SSD_OPEN_WAIT", "TIME",
        "How long the start waits at each of three steps (found, made or resized, read) for SSD shards that have not finished it, before the daemon serves without them, which join once they are open, such as 10s";
    ssd_stall_limit: Duration, Span, Single, Duration::from_secs(2), "",
        "ssd-stall-limit", "PEGAFLOW_SSD_STALL_LIMIT", "TIME",
        "A drive that takes longer for one request counts as out of order until it answers, such as 2s";
    max_prefetch: u32, Count, Single, 256, "",
        "max-prefetch", "PEGAFLOW_MAX_PREFETCH", "COUNT",
        "Most blocks that are on their way from the SSD tier to the pool at once";
    prefetch_timeout: Duration, Span, Single, Duration::from_secs(5), "",
        "prefetch-timeout", "PEGAFLOW_PREFETCH_TIMEOUT", "TIME",
        "A query waits no longer than this for the next of its blocks to come up from the SSD tier, such as 5s; then it goes without the rest";
    drain_timeout: Duration, Span, Single, Duration::from_secs(30), "",
        "drain-timeout", "PEGAFLOW_DRAIN_TIMEOUT", "TIME",
        "How long a stop waits for running requests, such as 30s";
    log_format: LogFormat, Choice<LogFormat>, Single, LogFormat::Text, "",
        "log-format", "PEGAFLOW_LOG_FORMAT", "FORMAT",
        "Log lines on standard error: text or json";
    log_level: String, LogLevel, Single, "info".to_owned(), "",
        "log-level", "PEGAFLOW_LOG", "LEVEL",
        "error, warn, info, debug, trace or off; or a list such as info,pegaflow_engine=debug";
}

impl Default for Config {
    /// The defaults, with those that follow from others filled in.
    fn default() -> Config {
        let mut config = Config::constants();
        config.derive(&|_| true);
        config
    }
}

impl Config {
    /// Fills in the defaults that follow from other options, wherever `unset` says so.
    pub(super) fn derive(&mut self, unset: &dyn Fn(&str) -> bool) {
        if unset("socket") {
            self.socket = paths::socket_path(&self.node);
        }
        if unset("socket-mode") && self.serves_others() {
            self.socket_mode = 0o666;
        }
        if unset("max-blocks") {
            let blocks = (self.pool_bytes / 4096).max(65_536);
            self.max_blocks = u32::try_from(blocks)
                .unwrap_or(u32::MAX)
                .min(super::check::MAX_BLOCKS);
        }
        if unset("copy-threads") {
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            self.copy_threads = cores.min(4) as u32;
        }
    }

    /// How the GPUs are used.
    pub fn device_options(&self) -> DeviceOptions {
        DeviceOptions {
            choice: self.devices.clone(),
            pin: self.pin,
            staging_bytes: self.device_staging / STAGING_SLOTS,
            d2h_limit: self.d2h_limit,
            ..DeviceOptions::default()
        }
    }

    /// True when a user besides the daemon's own and root may connect.
    pub fn serves_others(&self) -> bool {
        DomainRules::of(self).serves_others()
    }
}
