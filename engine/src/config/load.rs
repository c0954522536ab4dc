//! The layers: defaults, file, environment, flags; and where each value came from.

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use clap::ArgMatches;
use clap::parser::ValueSource;

use super::ConfigError;
use super::check;
use super::cli::{CHECK_FLAG, CONFIG_ENV, CONFIG_FLAG};
use super::domains::{self, DomainRule};
use super::options::{Config, OPTIONS, OptionDef, Shape};

/// Variables with the daemon's prefix that the client library, the tools or the path rules read.
const OTHER_VARIABLES: &[&str] = &[
    CONFIG_ENV,
    "PEGAFLOW_AUTOSTART",
    "PEGAFLOW_DAEMON",
    "PEGAFLOW_SHM_DIR",
    "PEGAFLOW_TRACE",
    #[cfg(debug_assertions)]
    crate::fault::CRASH_AT,
];
const PREFIX: &str = "PEGAFLOW_";
/// Names this close are taken for a slip of the finger.
const MAX_SLIPS: usize = 3;

/// A layer of the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Built in.
    Default,
    /// The file.
    File(String),
    /// An environment variable.
    Environment(&'static str),
    /// The command line.
    Flag(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::File(path) => write!(f, "file {path}"),
            Origin::Environment(variable) => write!(f, "environment {variable}"),
            Origin::Flag(flag) => write!(f, "flag --{flag}"),
        }
    }
}

/// Where an option's value came from.
#[derive(Clone, Debug)]
pub struct Source {
    /// The layer.
    pub origin: Origin,
    /// The value as given there.
    pub text: String,
}

/// Everything that is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
#[error("{}", self.lines())]
pub struct ConfigErrors(pub Vec<ConfigError>);

impl ConfigErrors {
    fn lines(&self) -> String {
        let lines: Vec<String> = self
            .0
            .iter()
            .map(|error| format!("error: {error}"))
            .collect();
        lines.join("\n")
    }
}

/// A configuration that holds.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// Effective values.
    pub config: Config,
    /// What was adjusted, or looks like a mistake; for the log.
    pub notes: Vec<String>,
    /// True when the command line asks for validation only.
    pub check_only: bool,
    sources: HashMap<&'static str, Source>,
}

impl Loaded {
    /// Where an option's value came from.
    pub fn origin(&self, option: &str) -> Origin {
        self.sources
            .get(option)
            .map_or(Origin::Default, |source| source.origin.clone())
    }

    /// The effective configuration as TOML, with the origin of each value behind it.
    pub fn effective_toml(&self) -> String {
        let mut text = String::new();
        for note in &self.notes {
            text.push_str(&format!("# note: {note}\n"));
        }
        for option in OPTIONS {
            let value = self.config.show(option.name);
            let line = format!("{} = {value}", option.name.replace('-', "_"));
            text.push_str(&format!("{line:<44} # {}\n", self.origin(option.name)));
        }
        // Tables come last in TOML.
        for domain in &self.config.domains {
            text.push_str(&domain.show());
        }
        text
    }
}

/// Puts the layers on top of each other and checks the result.
///
/// # Errors
/// All that is wrong, not only the first.
pub fn load(
    matches: &ArgMatches,
    environment: impl IntoIterator<Item = (String, String)>,
) -> Result<Loaded, ConfigErrors> {
    let environment: BTreeMap<String, String> = environment
        .into_iter()
        .filter(|(name, _)| name.starts_with(PREFIX))
        .collect();
    let mut notes = unknown_variables(&environment);
    let mut errors = Vec::new();
    let mut sources = HashMap::new();

    let file = matches
        .get_one::<String>(CONFIG_FLAG)
        .or_else(|| environment.get(CONFIG_ENV));
    let domains = match file {
        Some(path) => read_file(path, &mut sources, &mut errors),
        None => Vec::new(),
    };
    for option in OPTIONS {
        if let Some(text) = environment.get(option.env) {
            let origin = Origin::Environment(option.env);
            sources.insert(
                option.name,
                Source {
                    origin,
                    text: text.clone(),
                },
            );
        }
        if let Some(text) = flag_text(matches, option) {
            sources.insert(
                option.name,
                Source {
                    origin: Origin::Flag(option.name),
                    text,
                },
            );
        }
    }

    let mut config = Config::constants();
    let mut misread = Vec::new();
    for option in OPTIONS {
        let Some(source) = sources.get(option.name) else {
            continue;
        };
        if let Err(problem) = config.set(option.name, &source.text) {
            misread.push(option.name);
            errors.push(value_error(
                option.name,
                source.clone(),
                problem.to_string(),
            ));
        }
    }
    config.domains = domains;
    config.derive(&|option| !sources.contains_key(option));
    let (problems, adjusted) = check::check(&mut config);
    notes.extend(adjusted);
    // A value that was not understood left its default behind: its range says nothing.
    for problem in problems
        .into_iter()
        .filter(|problem| !misread.contains(&problem.option))
    {
        let source = sources
            .get(problem.option)
            .cloned()
            .unwrap_or_else(|| Source {
                origin: Origin::Default,
                text: config.show(problem.option).replace('"', ""),
            });
        errors.push(value_error(problem.option, source, problem.text));
    }
    if !errors.is_empty() {
        return Err(ConfigErrors(errors));
    }
    Ok(Loaded {
        config,
        notes,
        check_only: matches.get_flag(CHECK_FLAG),
        sources,
    })
}

fn value_error(option: &'static str, source: Source, problem: String) -> ConfigError {
    ConfigError::Value {
        option,
        value: source.text,
        origin: source.origin,
        problem,
    }
}

fn flag_text(matches: &ArgMatches, option: &OptionDef) -> Option<String> {
    let given = |id: &str| matches.value_source(id) == Some(ValueSource::CommandLine);
    if !given(option.name) {
        return None;
    }
    let values: Vec<&str> = matches
        .get_many::<String>(option.name)?
        .map(String::as_str)
        .collect();
    Some(values.join(","))
}

fn read_file(
    path: &str,
    sources: &mut HashMap<&'static str, Source>,
    errors: &mut Vec<ConfigError>,
) -> Vec<DomainRule> {
    let file = || path.to_owned();
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) => {
            errors.push(ConfigError::File {
                file: file(),
                problem: error.to_string(),
            });
            return Vec::new();
        }
    };
    let table: toml::Table = match text.parse() {
        Ok(table) => table,
        Err(error) => {
            errors.push(ConfigError::Syntax {
                file: file(),
                problem: error.to_string(),
            });
            return Vec::new();
        }
    };
    let mut rules = Vec::new();
    for (key, value) in &table {
        if key == domains::KEY {
            rules = domains::read(value, path, errors);
            continue;
        }
        let dashed = key.replace('_', "-");
        let Some(option) = OPTIONS.iter().find(|option| option.name == dashed) else {
            let names = OPTIONS.iter().map(|option| option.name);
            let hint = nearest(key, names.chain([domains::KEY]));
            errors.push(ConfigError::UnknownKey {
                key: key.clone(),
                file: file(),
                hint,
            });
            continue;
        };
        let origin = Origin::File(file());
        let refused = |problem: &str| ConfigError::Value {
            option: option.name,
            value: value.to_string(),
            origin: origin.clone(),
            problem: problem.to_owned(),
        };
        match value_text(option, value) {
            Some(_) if sources.contains_key(option.name) => {
                errors.push(refused("given with dashes and with underscores: keep one"));
            }
            Some(text) => {
                sources.insert(option.name, Source { origin, text });
            }
            None => errors.push(refused(
                "give a text, a whole number, true or false (a list for allow-uid, allow-gid and ssd)",
            )),
        }
    }
    rules
}

fn value_text(option: &OptionDef, value: &toml::Value) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Boolean(yes) => Some(yes.to_string()),
        toml::Value::Array(items) if option.shape == Shape::List => {
            let texts: Option<Vec<String>> = items
                .iter()
                .map(|item| match item {
                    toml::Value::Integer(id) => Some(id.to_string()),
                    toml::Value::String(name) => Some(name.clone()),
                    _ => None,
                })
                .collect();
            Some(texts?.join(","))
        }
        _ => None,
    }
}

fn unknown_variables(environment: &BTreeMap<String, String>) -> Vec<String> {
    let known = || {
        OPTIONS
            .iter()
            .map(|option| option.env)
            .chain(OTHER_VARIABLES.iter().copied())
    };
    let unknown = environment
        .keys()
        .filter(|name| !known().any(|other| other == *name));
    unknown
        .map(|name| {
            let hint = nearest(name, known());
            format!("environment variable {name} means nothing to PegaFlow and is ignored{hint}")
        })
        .collect()
}

/// `: did you mean …?` for the closest of the known names, or nothing.
pub(super) fn nearest(name: &str, known: impl Iterator<Item = &'static str>) -> String {
    let same_dashes = name.replace('_', "-").to_ascii_lowercase();
    let distance = |other: &str| slips(&same_dashes, &other.replace('_', "-").to_ascii_lowercase());
    match known.map(|other| (distance(other), other)).min() {
        Some((slips, other)) if slips <= MAX_SLIPS => format!(": did you mean `{other}`?"),
        _ => String::new(),
    }
}

/// Letters to insert, delete or replace to get from one word to the other.
fn slips(left: &str, right: &str) -> usize {
    let right: Vec<char> = right.chars().collect();
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (line, letter) in left.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = line + 1;
        for (column, other) in right.iter().enumerate() {
            let replaced = diagonal + usize::from(letter != *other);
            diagonal = row[column + 1];
            row[column + 1] = replaced.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[right.len()]
}
