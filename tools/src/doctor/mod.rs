//! `doctor`: whether this machine gives PegaFlow what it needs, and the way out where it does not.

#![deny(unsafe_code)]

mod kernel;
mod machine;
mod nodes;

pub use nodes::try_connect;
#[allow(unsafe_code)]
mod probe;

use std::io::IsTerminal;
use std::path::Path;

use serde::Serialize;
use serde_json::json;

use crate::node::NodePlace;
use crate::output::{print_json, table};

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Worth knowing; nothing is missing.
    Info,
    /// Works, but slower or with less room than it could.
    Warn,
    /// PegaFlow will not work.
    Fail,
}

impl Level {
    fn label(self) -> &'static str {
        match self {
            Level::Ok => "ok",
            Level::Info => "info",
            Level::Warn => "warn",
            Level::Fail => "FAIL",
        }
    }
}

/// One thing looked at.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// What.
    pub name: &'static str,
    /// How it came out.
    pub level: Level,
    /// What was found.
    pub value: String,
    /// What to do about it; empty when nothing needs doing.
    pub way_out: String,
}

impl Check {
    fn ok(name: &'static str, value: impl Into<String>) -> Check {
        Check {
            name,
            level: Level::Ok,
            value: value.into(),
            way_out: String::new(),
        }
    }

    fn info(name: &'static str, value: impl Into<String>) -> Check {
        Check {
            level: Level::Info,
            ..Check::ok(name, value)
        }
    }

    fn warn(name: &'static str, value: impl Into<String>, way_out: impl Into<String>) -> Check {
        Check {
            level: Level::Warn,
            way_out: way_out.into(),
            ..Check::ok(name, value)
        }
    }

    fn fail(name: &'static str, value: impl Into<String>, way_out: impl Into<String>) -> Check {
        Check {
            level: Level::Fail,
            way_out: way_out.into(),
            ..Check::ok(name, value)
        }
    }
}

/// All checks, in the order of the table.
pub fn run_checks(place: &NodePlace, socket: &Path) -> Vec<Check> {
    let mut checks = vec![machine::shm_space(&place.shm_dir)];
    checks.extend(machine::limits());
    checks.push(machine::cpus());
    checks.extend(machine::huge_pages(&place.shm_dir));
    checks.extend(kernel::features());
    checks.push(kernel::io_uring());
    checks.push(machine::cuda());
    checks.push(nodes::daemon(place, socket));
    checks.push(nodes::stale(place));
    checks
}

/// Columns of the terminal; of a file or pipe, what reads well.
fn terminal_width() -> u16 {
    const PLAIN_COLUMNS: u16 = 130;
    if !std::io::stdout().is_terminal() {
        return PLAIN_COLUMNS;
    }
    crossterm::terminal::size().map_or(PLAIN_COLUMNS, |(columns, _)| columns.max(60))
}

/// `pegactl doctor`; true when nothing failed.
pub fn doctor(place: &NodePlace, socket: &Path, as_json: bool) -> bool {
    let checks = run_checks(place, socket);
    let worst = checks
        .iter()
        .map(|check| check.level)
        .max()
        .unwrap_or(Level::Ok);
    if as_json {
        print_json(&json!({ "worst": worst, "checks": checks }));
        return worst != Level::Fail;
    }
    let mut table = table(&["check", "", "found", "way out"], &[]);
    table.set_content_arrangement(comfy_table::ContentArrangement::Dynamic);
    table.set_width(terminal_width());
    for check in &checks {
        table.add_row([
            check.name,
            check.level.label(),
            &check.value,
            &check.way_out,
        ]);
    }
    println!("{table}");
    let number = |level| checks.iter().filter(|check| check.level == level).count();
    println!(
        "{} warnings, {} failures",
        number(Level::Warn),
        number(Level::Fail)
    );
    worst != Level::Fail
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::tests::{fake_node, shm_folder};

    #[test]
    fn every_check_that_is_not_fine_says_what_to_do() {
        let root = shm_folder();
        fake_node(root.path(), "dead", u32::MAX >> 1);
        let place = NodePlace {
            node: "dead".into(),
            shm_dir: root.path().into(),
        };
        let checks = run_checks(&place, &root.path().join("no.sock"));
        for check in &checks {
            let needs = check.level >= Level::Warn;
            assert_eq!(needs, !check.way_out.is_empty(), "{check:?}");
            assert!(!check.value.is_empty(), "{check:?}");
        }
        let stale = checks
            .iter()
            .find(|check| check.name == "stale nodes")
            .unwrap();
        assert_eq!(stale.level, Level::Warn);
        assert!(stale.value.contains("dead"), "{stale:?}");
    }
}
