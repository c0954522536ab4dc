//! How one value is read from text and printed again, per kind of option.

#![forbid(unsafe_code)]

use std::marker::PhantomData;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use bytesize::ByteSize;
use clap::ValueEnum;

use crate::policy::AdmissionKind;

/// A text that is no value of its kind; says what would be one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct BadValue(pub(super) String);

/// A kind of option: reads text, prints a TOML literal that reads back as the same value.
pub(super) trait Kind {
    /// What the configuration holds.
    type Value;
    /// Reads a flag, an environment variable or a value of the file.
    fn parse(text: &str) -> Result<Self::Value, BadValue>;
    /// Prints a TOML literal.
    fn show(value: &Self::Value) -> String;
}

/// Ask for hugepages or not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Hugepages {
    /// Plain pages.
    #[default]
    Off,
    /// `madvise(MADV_HUGEPAGE)`; the log says what the kernel gave.
    Advise,
}

/// What becomes of the pool that a previous daemon of the node left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum PoolStart {
    /// Its sealed blocks are taken over, if the pool fits this daemon; else as `Fresh`.
    #[default]
    Adopt,
    /// It is thrown away.
    Fresh,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

pub(super) fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// Free text, not empty.
pub(super) struct Text;
impl Kind for Text {
    type Value = String;
    fn parse(text: &str) -> Result<String, BadValue> {
        if text.is_empty() {
            return Err(BadValue(
                "it is empty: give a value or leave the option out".into(),
            ));
        }
        Ok(text.to_owned())
    }
    fn show(value: &String) -> String {
        quoted(value)
    }
}

/// A path.
pub(super) struct Path;
impl Kind for Path {
    type Value = PathBuf;
    fn parse(text: &str) -> Result<PathBuf, BadValue> {
        Text::parse(text).map(PathBuf::from)
    }
    fn show(value: &PathBuf) -> String {
        quoted(&value.to_string_lossy())
    }
}

/// Bytes, with or without a unit.
pub(super) struct Size;
impl Kind for Size {
    type Value = u64;
    fn parse(text: &str) -> Result<u64, BadValue> {
        let way_out =
            || BadValue("give bytes or a number with a unit: 1073741824, 512MB, 1GiB".into());
        // `ByteSize` would saturate; a size beyond 64 bits is a mistake.
        match ByteSize::from_str(text) {
            Ok(size) if size.as_u64() < u64::MAX => Ok(size.as_u64()),
            _ => Err(way_out()),
        }
    }
    fn show(value: &u64) -> String {
        for (unit, bytes) in [("GiB", 1u64 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)] {
            if *value >= bytes && value.is_multiple_of(bytes) {
                return quoted(&format!("{}{unit}", value / bytes));
            }
        }
        value.to_string()
    }
}

/// A span of time, with a unit.
pub(super) struct Span;
impl Kind for Span {
    type Value = Duration;
    fn parse(text: &str) -> Result<Duration, BadValue> {
        humantime::parse_duration(text)
            .map_err(|_| BadValue("give a number with a unit: 500ms, 30s, 10m".into()))
    }
    fn show(value: &Duration) -> String {
        quoted(&humantime::format_duration(*value).to_string())
    }
}

/// A whole number.
pub(super) struct Count;
impl Kind for Count {
    type Value = u32;
    fn parse(text: &str) -> Result<u32, BadValue> {
        text.parse()
            .map_err(|_| BadValue(format!("give a whole number from 0 to {}", u32::MAX)))
    }
    fn show(value: &u32) -> String {
        value.to_string()
    }
}

/// Permission bits in octal.
pub(super) struct FileMode;
impl Kind for FileMode {
    type Value = u32;
    fn parse(text: &str) -> Result<u32, BadValue> {
        match u32::from_str_radix(text, 8) {
            Ok(mode) if mode <= 0o777 => Ok(mode),
            _ => Err(BadValue(
                "give permission bits in octal, 0600 to 0777".into(),
            )),
        }
    }
    fn show(value: &u32) -> String {
        quoted(&format!("{value:04o}"))
    }
}

/// Yes or no.
pub(super) struct Switch;
impl Kind for Switch {
    type Value = bool;
    fn parse(text: &str) -> Result<bool, BadValue> {
        match text {
            "true" | "1" | "yes" | "on" => Ok(true),
            "false" | "0" | "no" | "off" => Ok(false),
            _ => Err(BadValue("give true or false".into())),
        }
    }
    fn show(value: &bool) -> String {
        value.to_string()
    }
}

/// An address to listen on, or `off`.
pub(super) struct Listen;
impl Kind for Listen {
    type Value = Option<SocketAddr>;
    fn parse(text: &str) -> Result<Option<SocketAddr>, BadValue> {
        if text == "off" {
            return Ok(None);
        }
        text.parse().map(Some).map_err(|_| {
            BadValue("give `off` or an IP address with a port: 127.0.0.1:9464, [::1]:9464".into())
        })
    }
    fn show(value: &Option<SocketAddr>) -> String {
        value.map_or_else(|| quoted("off"), |address| quoted(&address.to_string()))
    }
}

/// A filter of log lines.
pub(super) struct LogLevel;
impl Kind for LogLevel {
    type Value = String;
    fn parse(text: &str) -> Result<String, BadValue> {
        let refusal = "give error, warn, info, debug, trace or off, or a list such as \
                       info,pegaflow_engine=debug";
        // The filter's own parser takes any word for a module name, and then nothing is logged.
        let bare_word = !text.contains([',', '=']);
        let known = ["error", "warn", "info", "debug", "trace", "off"];
        if text.is_empty() || (bare_word && !known.contains(&text.to_ascii_lowercase().as_str())) {
            return Err(BadValue(refusal.into()));
        }
        tracing_subscriber::EnvFilter::try_new(text)
            .map(|_| text.to_owned())
            .map_err(|error| BadValue(format!("{error}: {refusal}")))
    }
    fn show(value: &String) -> String {
        quoted(value)
    }
}

/// One of a few words.
pub(super) struct Choice<T>(PhantomData<T>);
impl<T: ValueEnum> Kind for Choice<T> {
    type Value = T;
    fn parse(text: &str) -> Result<T, BadValue> {
        T::from_str(text, false).map_err(|_| BadValue(format!("give one of: {}", words::<T>())))
    }
    fn show(value: &T) -> String {
        let name = value.to_possible_value();
        quoted(name.as_ref().map_or("", |name| name.get_name()))
    }
}

fn words<T: ValueEnum>() -> String {
    let names = T::value_variants()
        .iter()
        .filter_map(ValueEnum::to_possible_value);
    names
        .map(|name| name.get_name().to_owned())
        .collect::<Vec<_>>()
        .join(", ")
}

/// The admission gate; `none` is another word for its `off`.
pub(super) struct AdmissionChoice;
impl Kind for AdmissionChoice {
    type Value = AdmissionKind;
    fn parse(text: &str) -> Result<AdmissionKind, BadValue> {
        if text == "none" {
            return Ok(AdmissionKind::Off);
        }
        Choice::<AdmissionKind>::parse(text)
    }
    fn show(value: &AdmissionKind) -> String {
        Choice::<AdmissionKind>::show(value)
    }
}
