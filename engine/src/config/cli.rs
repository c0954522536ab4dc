//! The command line, made from the table of options.

#![forbid(unsafe_code)]

use clap::builder::{NonEmptyStringValueParser, StringValueParser};
use clap::{Arg, ArgAction, Command};

use super::options::{Config, OPTIONS, OptionDef, Shape};

/// The flag that names the file.
pub(super) const CONFIG_FLAG: &str = "config";
/// The environment variable that names the file.
pub(super) const CONFIG_ENV: &str = "PEGAFLOW_CONFIG";
/// The flag that only validates.
pub(super) const CHECK_FLAG: &str = "check";

const ABOUT: &str = "The PegaFlow node daemon: keeps the KV-cache blocks of this host's engines";
const AFTER: &str = "\
A flag beats the environment variable in brackets, which beats the file, which beats the default.
The file is TOML with the flags' names, underscores for dashes, such as: pool_size = \"8GiB\"

Exit status: 0 stopped as asked, 1 failed while running, 2 configuration refused.
PEGAFLOW_SHM_DIR names another tmpfs folder than /dev/shm/pegaflow.";

/// The command line of `pegaflowd`.
pub fn command() -> Command {
    let defaults = Config::default();
    let mut command = Command::new("pegaflowd")
        .version(env!("CARGO_PKG_VERSION"))
        .about(ABOUT)
        .after_help(AFTER)
        .max_term_width(100)
        .arg(
            Arg::new(CONFIG_FLAG)
                .long(CONFIG_FLAG)
                .value_name("FILE")
                .value_parser(NonEmptyStringValueParser::new())
                .help(format!("TOML file with options [env: {CONFIG_ENV}]")),
        )
        .arg(
            Arg::new(CHECK_FLAG)
                .long(CHECK_FLAG)
                .action(ArgAction::SetTrue)
                .help("Validate everything, print the effective configuration as TOML, and exit"),
        );
    for option in OPTIONS {
        command = command.arg(argument(option, &defaults));
    }
    command
}

fn argument(option: &OptionDef, defaults: &Config) -> Arg {
    let default = match option.derived {
        "" => defaults.show(option.name).replace('"', ""),
        words => words.to_owned(),
    };
    let help = format!("{} [default: {default}] [env: {}]", option.help, option.env);
    let arg = Arg::new(option.name)
        .long(option.name)
        .value_name(option.value_name)
        .help(help)
        .allow_negative_numbers(matches!(option.shape, Shape::Single | Shape::List));
    match option.shape {
        Shape::Single => arg
            .value_parser(StringValueParser::new())
            .overrides_with(option.name),
        Shape::List => arg
            .value_parser(StringValueParser::new())
            .action(ArgAction::Append),
        Shape::Switch => arg
            .value_parser(StringValueParser::new())
            .num_args(0..=1)
            .require_equals(true)
            .default_missing_value("true"),
    }
}
