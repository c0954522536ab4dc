//! Options of the SSD tier.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use clap::ValueEnum;
use pegaflow_ssd as ssd;

use super::check::Problems;
use super::options::Config;
use super::value::{BadValue, Kind, Size, Span, quoted};
use crate::tier::{AdmitWhen, TierOptions};

/// Smallest shard.
const MIN_SHARD_BYTES: u64 = 128 << 20;
/// Most requests at one drive.
const MAX_QUEUE_DEPTH: u32 = 1024;
/// Requests of a shard that wait or are at its drive. Enough to keep it busy while it makes a batch
/// durable.
const MAX_PENDING: u32 = 1024;
/// Most blocks on their way up at once.
const MAX_PREFETCH: u32 = 65_536;
/// Slowest writing, in bytes a second.
const MIN_WRITE_LIMIT: u64 = 1 << 20;

/// One file of the tier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SsdShard {
    /// Where.
    pub path: PathBuf,
    /// Its size in bytes; `None` keeps that of the file.
    pub bytes: Option<u64>,
}

/// How bytes get to a drive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum SsdIo {
    /// io_uring where it is allowed, else threads.
    #[default]
    Auto,
    /// io_uring or nothing.
    Uring,
    /// Threads with pread and pwrite.
    Threads,
}

/// `PATH` or `PATH:SIZE`, several separated by commas.
pub(super) struct Shards;
impl Kind for Shards {
    type Value = Vec<SsdShard>;
    fn parse(text: &str) -> Result<Vec<SsdShard>, BadValue> {
        let words = text.split(',').filter(|word| !word.is_empty());
        words.map(shard).collect()
    }
    fn show(value: &Vec<SsdShard>) -> String {
        let shards: Vec<String> = value
            .iter()
            .map(|shard| {
                let path = shard.path.to_string_lossy();
                let bytes = shard.bytes.map(|bytes| Size::show(&bytes).replace('"', ""));
                quoted(&match bytes {
                    Some(bytes) => format!("{path}:{bytes}"),
                    None => path.into_owned(),
                })
            })
            .collect();
        format!("[{}]", shards.join(", "))
    }
}

fn shard(word: &str) -> Result<SsdShard, BadValue> {
    let (path, bytes) = match word.rsplit_once(':') {
        Some((path, size)) => {
            let bytes = Size::parse(size).map_err(|_| {
                BadValue(format!(
                    "`{size}` behind the last colon of `{word}` is no size: give PATH or PATH:SIZE, \
                     such as /mnt/nvme0/pegaflow.ssd:500GB"
                ))
            })?;
            (path, Some(bytes))
        }
        None => (word, None),
    };
    let path = PathBuf::from(path);
    if !path.is_absolute() {
        return Err(BadValue(format!(
            "`{word}` is no absolute path: the daemon's folder may change"
        )));
    }
    Ok(SsdShard { path, bytes })
}

/// `evict`, `seal` or `hits:N`.
pub(super) struct Admit;
impl Kind for Admit {
    type Value = AdmitWhen;
    fn parse(text: &str) -> Result<AdmitWhen, BadValue> {
        let hits = text.strip_prefix("hits:").and_then(|n| n.parse().ok());
        match (text, hits) {
            ("evict", _) => Ok(AdmitWhen::Evict),
            ("seal", _) => Ok(AdmitWhen::Seal),
            (_, Some(wanted @ 1..)) => Ok(AdmitWhen::Hits(wanted)),
            _ => Err(BadValue(
                "give evict, seal, or hits:N with N from 1 to 255".into(),
            )),
        }
    }
    fn show(value: &AdmitWhen) -> String {
        match value {
            AdmitWhen::Evict => quoted("evict"),
            AdmitWhen::Seal => quoted("seal"),
            AdmitWhen::Hits(wanted) => quoted(&format!("hits:{wanted}")),
        }
    }
}

/// A span of time, or `off`.
pub(super) struct MaybeSpan;
impl Kind for MaybeSpan {
    type Value = Option<Duration>;
    fn parse(text: &str) -> Result<Option<Duration>, BadValue> {
        if text == "off" {
            return Ok(None);
        }
        Span::parse(text)
            .map(Some)
            .map_err(|_| BadValue("give off, or a number with a unit: 50ms, 1s".into()))
    }
    fn show(value: &Option<Duration>) -> String {
        value.as_ref().map_or_else(|| quoted("off"), Span::show)
    }
}

impl Config {
    /// How the lane uses the tier; `None` without one.
    pub fn tier_options(&self) -> Option<TierOptions> {
        (!self.ssd.is_empty()).then_some(TierOptions {
            admit: self.ssd_admit,
            max_prefetch: self.max_prefetch,
            patience: self.prefetch_timeout,
            save_wait: self.ssd_save_wait,
        })
    }

    /// How the tier's files are used; `None` without one.
    pub fn ssd_options(&self) -> Option<ssd::Options> {
        if self.ssd.is_empty() {
            return None;
        }
        let shards = self.ssd.iter().map(|shard| ssd::ShardSpec {
            path: shard.path.clone(),
            bytes: shard.bytes,
        });
        let mut options = ssd::Options::new(self.node.clone(), shards.collect());
        options.io = match self.ssd_io {
            SsdIo::Auto => ssd::IoChoice::Auto,
            SsdIo::Uring => ssd::IoChoice::Uring,
            SsdIo::Threads => ssd::IoChoice::Threads,
        };
        options.queue_depth = self.ssd_queue_depth;
        options.max_pending = MAX_PENDING.max(self.ssd_queue_depth);
        options.sqpoll_idle = self.ssd_sqpoll;
        options.policy = self.ssd_policy;
        options.write_limit = self.ssd_write_limit;
        options.open_wait = self.ssd_open_wait;
        options.stall_limit = self.ssd_stall_limit;
        Some(options)
    }
}

pub(super) fn check_ssd(config: &Config, problems: &mut Problems) {
    let most = ssd::Options::MAX_SHARDS;
    if config.ssd.len() > most {
        let text = format!(
            "{} shards are named, at most {most} can be used",
            config.ssd.len()
        );
        problems.add("ssd", text);
    }
    for (at, shard) in config.ssd.iter().enumerate() {
        let path = shard.path.display();
        if config.ssd[..at]
            .iter()
            .any(|other| other.path == shard.path)
        {
            problems.add("ssd", format!("{path} is named twice"));
        }
        if shard.bytes.is_some_and(|bytes| bytes < MIN_SHARD_BYTES) {
            let text = format!(
                "{path}: the smallest shard is {}",
                ByteSize(MIN_SHARD_BYTES)
            );
            problems.add("ssd", text);
        }
    }
    if config
        .ssd_write_limit
        .is_some_and(|limit| limit < MIN_WRITE_LIMIT)
    {
        let text = format!(
            "blocks would hardly be written: give off, or at least {} a second",
            ByteSize(MIN_WRITE_LIMIT)
        );
        problems.add("ssd-write-limit", text);
    }
    for (option, value, high) in [
        ("ssd-queue-depth", config.ssd_queue_depth, MAX_QUEUE_DEPTH),
        ("max-prefetch", config.max_prefetch, MAX_PREFETCH),
    ] {
        problems.range(option, value, 1, high, &format!("give 1 to {high}"));
    }
    for (option, value) in [
        ("ssd-open-wait", config.ssd_open_wait),
        ("ssd-stall-limit", config.ssd_stall_limit),
        ("prefetch-timeout", config.prefetch_timeout),
    ] {
        let (low, high) = (Duration::from_millis(10), Duration::from_secs(600));
        problems.range(option, value, low, high, "give 10ms to 10m");
    }
    if config
        .ssd_save_wait
        .is_some_and(|wait| !(Duration::from_millis(1)..=Duration::from_secs(60)).contains(&wait))
    {
        problems.add("ssd-save-wait", "give off, or 1ms to 1m".into());
    }
    if config
        .ssd_sqpoll
        .is_some_and(|idle| !(Duration::from_millis(1)..=Duration::from_secs(60)).contains(&idle))
    {
        problems.add("ssd-sqpoll", "give off, or 1ms to 1m".into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shard_is_a_path_with_or_without_a_size() {
        let shards = Shards::parse("/mnt/a,/mnt/b:2GiB").unwrap();
        assert_eq!((shards[0].bytes, shards[1].bytes), (None, Some(2 << 30)));
        assert_eq!(Shards::show(&shards), r#"["/mnt/a", "/mnt/b:2GiB"]"#);
        assert_eq!(Shards::parse(""), Ok(Vec::new()));
        for wrong in ["relative", "relative:1GiB", "/mnt/a:", "/mnt/a:big"] {
            assert!(Shards::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn admission_is_one_of_three() {
        for text in ["evict", "seal", "hits:1", "hits:255"] {
            let value = Admit::parse(text).unwrap();
            assert_eq!(Admit::show(&value), format!("\"{text}\""));
        }
        for wrong in ["", "hits", "hits:0", "hits:256", "never"] {
            assert!(Admit::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn polling_is_off_or_for_a_time() {
        assert_eq!(MaybeSpan::parse("off"), Ok(None));
        assert_eq!(
            MaybeSpan::parse("50ms"),
            Ok(Some(Duration::from_millis(50)))
        );
        assert!(MaybeSpan::parse("on").is_err());
    }
}
