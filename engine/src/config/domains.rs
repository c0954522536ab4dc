//! The `[[domain]]` tables of the file: users that share an isolation domain, and its models.

#![forbid(unsafe_code)]

use std::collections::HashMap;

use toml::{Table, Value};

use super::ConfigError;
use super::ids::{self, Who, sorted};
use super::load::nearest;
use super::value::quoted;
use crate::cache::MAX_DOMAINS;
use crate::isolation::domain::USER_PREFIX;
use crate::isolation::{IsolationDomain, MAX_DOMAIN_NAME_BYTES};

/// The key of the tables.
pub(super) const KEY: &str = "domain";
/// Most `[[domain]]` tables: half of all domains, so that users of their own find room.
pub const MAX_NAMED_DOMAINS: usize = MAX_DOMAINS / 2;
/// Most patterns of one domain.
const MAX_PATTERNS: usize = 256;
/// Longest pattern in bytes: that of a model's name.
const MAX_PATTERN_BYTES: usize = pegaflow_shm::namespace::MAX_FIELD_BYTES;
const KEYS: [&str; 4] = ["name", "uids", "gids", "namespaces"];

/// One `[[domain]]` table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainRule {
    /// Its name.
    pub name: String,
    /// Users that belong to it.
    pub uids: Vec<u32>,
    /// Groups whose members belong to it.
    pub gids: Vec<u32>,
    /// Patterns of model names.
    pub namespaces: Vec<String>,
}

impl DomainRule {
    /// The table as TOML.
    pub(super) fn show(&self) -> String {
        let patterns: Vec<String> = self.namespaces.iter().map(|text| quoted(text)).collect();
        format!(
            "\n[[domain]]\nname = {}\nuids = {}\ngids = {}\nnamespaces = [{}]\n",
            quoted(&self.name),
            ids::show(&self.uids),
            ids::show(&self.gids),
            patterns.join(", ")
        )
    }
}

/// Reads all tables, and reports all that is wrong with them.
pub(super) fn read(value: &Value, file: &str, errors: &mut Vec<ConfigError>) -> Vec<DomainRule> {
    let mut report = Report { file, errors };
    let tables = value
        .as_array()
        .filter(|list| list.iter().all(Value::is_table));
    let Some(tables) = tables else {
        report.add(
            "(all)",
            "write each domain as a table: [[domain]]".to_owned(),
        );
        return Vec::new();
    };
    if tables.len() > MAX_NAMED_DOMAINS {
        let text = format!(
            "{} tables: at most {MAX_NAMED_DOMAINS} are allowed",
            tables.len()
        );
        report.add("(all)", text);
    }
    let mut rules = Vec::new();
    for (position, table) in tables.iter().filter_map(Value::as_table).enumerate() {
        let unnamed = format!("number {}", position + 1);
        let label = table.get("name").and_then(Value::as_str);
        let label = label.filter(|name| !name.is_empty()).unwrap_or(&unnamed);
        rules.push(read_one(table, label, &mut report));
    }
    check_apart(&rules, &mut report);
    rules
}

struct Report<'a> {
    file: &'a str,
    errors: &'a mut Vec<ConfigError>,
}

impl Report<'_> {
    fn add(&mut self, domain: &str, problem: String) {
        self.errors.push(ConfigError::Domain {
            domain: domain.to_owned(),
            file: self.file.to_owned(),
            problem,
        });
    }
}

fn read_one(table: &Table, label: &str, report: &mut Report<'_>) -> DomainRule {
    for key in table.keys().filter(|key| !KEYS.contains(&key.as_str())) {
        let hint = nearest(key, KEYS.into_iter());
        report.add(
            label,
            format!(
                "unknown key `{key}`{hint}; the keys are {}",
                KEYS.join(", ")
            ),
        );
    }
    let name = match table.get("name") {
        Some(Value::String(name)) => name.clone(),
        Some(other) => {
            report.add(label, format!("name = {other}: give a text"));
            String::new()
        }
        None => String::new(),
    };
    if let Some(problem) = name_problem(&name) {
        report.add(label, problem);
    }
    let uids = read_ids(table, "uids", Who::User, label, report);
    let gids = read_ids(table, "gids", Who::Group, label, report);
    if table.get("uids").is_none() && table.get("gids").is_none() {
        report.add(label, "nobody belongs to it: give uids or gids".to_owned());
    }
    let namespaces = read_patterns(table, label, report);
    DomainRule {
        name,
        uids,
        gids,
        namespaces,
    }
}

/// The name goes into tables, metrics and the names of files.
fn name_problem(name: &str) -> Option<String> {
    if name.is_empty() {
        return Some("it has no name: give name = \"…\"".to_owned());
    }
    let safe = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.len() > MAX_DOMAIN_NAME_BYTES || !name.chars().all(safe) || name.starts_with('.') {
        return Some(format!(
            "name = `{name}`: use 1 to {MAX_DOMAIN_NAME_BYTES} letters, digits, `-`, `_` or `.`, not \
             starting with a dot"
        ));
    }
    name.starts_with(USER_PREFIX).then(|| {
        format!("name = `{name}`: names that begin with `{USER_PREFIX}` are those of single users")
    })
}

fn read_ids(
    table: &Table,
    key: &'static str,
    who: Who,
    label: &str,
    report: &mut Report<'_>,
) -> Vec<u32> {
    let mut found = Vec::new();
    let items = match table.get(key) {
        None => return found,
        Some(Value::Array(items)) => items,
        Some(other) => {
            report.add(
                label,
                format!("{key} = {other}: give a list of numbers or names"),
            );
            return found;
        }
    };
    for item in items {
        let resolved = match item {
            Value::String(text) => who.resolve(text),
            other => who.resolve(&other.to_string()),
        };
        match resolved {
            Ok(id) => found.push(id),
            Err(problem) => report.add(label, format!("{key}: {problem}")),
        }
    }
    sorted(found)
}

fn read_patterns(table: &Table, label: &str, report: &mut Report<'_>) -> Vec<String> {
    let items = match table.get("namespaces") {
        None => return vec!["*".to_owned()],
        Some(Value::Array(items)) => items,
        Some(other) => {
            let text = format!("namespaces = {other}: give a list of patterns such as [\"org/*\"]");
            report.add(label, text);
            return Vec::new();
        }
    };
    if items.is_empty() || items.len() > MAX_PATTERNS {
        let text = format!(
            "namespaces has {} patterns: give 1 to {MAX_PATTERNS}, or leave it out for every model",
            items.len()
        );
        report.add(label, text);
    }
    let mut patterns = Vec::new();
    for item in items {
        match item.as_str() {
            Some(text) if is_pattern(text) => patterns.push(text.to_owned()),
            _ => report.add(
                label,
                format!(
                    "namespaces: {item} is no pattern: give 1 to {MAX_PATTERN_BYTES} bytes of text \
                     without control characters, `*` for any text and `?` for any character"
                ),
            ),
        }
    }
    patterns
}

fn is_pattern(text: &str) -> bool {
    !text.is_empty() && text.len() <= MAX_PATTERN_BYTES && !text.chars().any(char::is_control)
}

/// A name, a user and a group stand in one table only.
fn check_apart(rules: &[DomainRule], report: &mut Report<'_>) {
    let mut names: HashMap<&str, ()> = HashMap::new();
    let mut keys = HashMap::new();
    let (mut uids, mut gids) = (HashMap::new(), HashMap::new());
    for rule in rules.iter().filter(|rule| !rule.name.is_empty()) {
        if names.insert(&rule.name, ()).is_some() {
            report.add(
                &rule.name,
                "there are two tables of this name: keep one".to_owned(),
            );
            continue;
        }
        let key = IsolationDomain::named(&rule.name, &rule.namespaces).key();
        if let Some(other) = keys.insert(key, &rule.name) {
            let text = format!("its digest is that of `{other}`: rename one of the two");
            report.add(&rule.name, text);
        }
        for (what, ids, seen) in [
            ("user", &rule.uids, &mut uids),
            ("group", &rule.gids, &mut gids),
        ] {
            for id in ids {
                if let Some(other) = seen.insert(*id, &rule.name) {
                    let text = format!("{what} {id} is listed in domain `{other}`, too: keep one");
                    report.add(&rule.name, text);
                }
            }
        }
    }
}
