//! The daemon's configuration: one table of options for flags, environment, file and defaults.
//!
//! A flag beats the environment, which beats the file, which beats the default. Nothing is ignored
//! in silence: an unknown key, a value out of range or two values that contradict each other end
//! the start, and all of them are reported at once. [`Loaded::effective_toml`] prints what came of
//! it and where each value came from; fed back with `--config`, it gives the same configuration.
//!
//! | file | what it does |
//! | --- | --- |
//! | [`options`](self) | the table: name, environment variable, default, help |
//! | `value` | how a value is read and printed |
//! | `cli` | the command line, made from the table |
//! | `load` | the four layers on top of each other |
//! | `check` | ranges, contradictions, values that follow from others |
//! | `domains` | the `[[domain]]` tables of the file |
//! | `devices` | GPUs by UUID, rates |
//! | `ssd` | files of the SSD tier, what is written to them |
//! | `ids` | users and groups by number or by name |

#![forbid(unsafe_code)]

mod check;
mod cli;
mod devices;
mod domains;
mod ids;
mod load;
mod options;
mod ssd;
mod value;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_domains;

pub use check::{MAX_COPY_THREADS, MAX_INSTANCES, MAX_LEASES, MIN_POOL_BYTES};
pub use cli::command;
pub use domains::{DomainRule, MAX_NAMED_DOMAINS};
pub use load::{ConfigErrors, Loaded, Origin, Source, load};
pub use options::Config;
pub use ssd::{SsdIo, SsdShard};
pub use value::{Hugepages, LogFormat, PoolStart};

/// Something about the configuration that cannot be accepted: option, value and the way out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A value that is malformed or out of range.
    #[error("{option} = `{value}` (from {origin}): {problem}")]
    Value {
        /// The option, as in the file and behind `--` on the command line.
        option: &'static str,
        /// Value as given.
        value: String,
        /// Where it was given.
        origin: Origin,
        /// What is wrong with it and what would be right.
        problem: String,
    },
    /// A key of the file that is no option.
    #[error("unknown option `{key}` in {file}{hint}; `pegaflowd --help` lists the options")]
    UnknownKey {
        /// The key.
        key: String,
        /// The file.
        file: String,
        /// `: did you mean …?`, or nothing.
        hint: String,
    },
    /// A `[[domain]]` table that cannot be accepted.
    #[error("domain {domain} in {file}: {problem}")]
    Domain {
        /// Its name, or its number.
        domain: String,
        /// The file.
        file: String,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// The file cannot be read.
    #[error(
        "configuration file {file} cannot be read: {problem}; check --config or PEGAFLOW_CONFIG"
    )]
    File {
        /// The file.
        file: String,
        /// The error.
        problem: String,
    },
    /// The file is not TOML.
    #[error("configuration file {file} is not TOML: {problem}")]
    Syntax {
        /// The file.
        file: String,
        /// Line, column and what was expected.
        problem: String,
    },
}
