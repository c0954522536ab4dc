use std::io::Write;
use std::time::Duration;

use super::*;
use crate::policy::{AdmissionKind, PolicyKind};

pub(super) fn load_with(flags: &[&str], env: &[(&str, &str)]) -> Result<Loaded, ConfigErrors> {
    let words = std::iter::once("pegaflowd").chain(flags.iter().copied());
    let matches = command().try_get_matches_from(words).unwrap();
    load(
        &matches,
        env.iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned())),
    )
}

pub(super) fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

pub(super) fn path(file: &tempfile::NamedTempFile) -> &str {
    file.path().to_str().unwrap()
}

pub(super) fn errors(flags: &[&str]) -> Vec<String> {
    let errors = load_with(flags, &[])
        .err()
        .map_or(Vec::new(), |errors| errors.0);
    errors.iter().map(ToString::to_string).collect()
}

#[test]
fn the_command_line_is_well_formed() {
    command().debug_assert();
}

#[test]
fn help_names_default_and_variable_of_every_option() {
    let help = command().render_long_help().to_string();
    for option in options::OPTIONS {
        assert!(
            help.contains(&format!("--{}", option.name)),
            "{}",
            option.name
        );
        assert!(help.contains(option.env), "{}", option.env);
    }
    let flat = help.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(flat.contains("[default: 1GiB]"), "{flat}");
    assert!(flat.contains("[default: 30s]"), "{flat}");
    assert!(flat.contains("[default: 127.0.0.1:9464]"), "{flat}");
}

#[test]
fn a_flag_beats_the_environment_which_beats_the_file_which_beats_the_default() {
    let file = file("spin_us = 1\nmax-leases = 11\nlease_ttl = \"1s\"\n");
    let env = [
        ("PEGAFLOW_CONFIG", path(&file)),
        ("PEGAFLOW_SPIN_US", "2"),
        ("PEGAFLOW_MAX_LEASES", "12"),
    ];
    let loaded = load_with(&["--spin-us", "3"], &env).unwrap();
    assert_eq!(loaded.config.spin_us, 3);
    assert_eq!(loaded.config.max_leases, 12);
    assert_eq!(loaded.config.lease_ttl, Duration::from_secs(1));
    assert_eq!(loaded.config.max_instances, 128);
    assert_eq!(loaded.origin("spin-us"), Origin::Flag("spin-us"));
    assert_eq!(
        loaded.origin("max-leases"),
        Origin::Environment("PEGAFLOW_MAX_LEASES")
    );
    assert_eq!(
        loaded.origin("lease-ttl"),
        Origin::File(path(&file).to_owned())
    );
    assert_eq!(loaded.origin("max-instances"), Origin::Default);
}

#[test]
fn every_kind_of_value_is_read() {
    let flags = [
        "--pool-size=512MB",
        "--extent-size=1MiB",
        "--policy=s3-fifo",
        "--admission=tinylfu",
        "--allow-uid=12",
        "--allow-uid=11",
        "--socket-mode=0660",
        "--http=off",
        "--hugepages=advise",
        "--pool=fresh",
        "--log-format=json",
        "--log-level=info,pegaflow_engine=trace",
        "--drain-timeout=1m 30s",
    ];
    let config = load_with(&flags, &[]).unwrap().config;
    assert_eq!(config.pool_bytes, 488 << 20);
    assert_eq!(config.extent_bytes, 1 << 20);
    assert_eq!(config.policy, PolicyKind::S3Fifo);
    assert_eq!(config.admission, AdmissionKind::TinyLfu);
    assert_eq!(config.allow_uid, vec![11, 12]);
    assert_eq!(config.socket_mode, 0o660);
    assert_eq!(config.http, None);
    assert_eq!(config.hugepages, Hugepages::Advise);
    assert_eq!(config.pool, PoolStart::Fresh);
    assert_eq!(config.log_format, LogFormat::Json);
    assert_eq!(config.drain_timeout, Duration::from_secs(90));
}

#[test]
fn a_switch_needs_no_value_and_takes_one() {
    let remote = |flag: &str| load_with(&[flag], &[]).unwrap().config.http_allow_remote;
    assert!(remote("--http-allow-remote"));
    assert!(!remote("--http-allow-remote=false"));
}

#[test]
fn the_previous_pool_is_adopted_unless_a_fresh_one_is_wanted() {
    assert_eq!(load_with(&[], &[]).unwrap().config.pool, PoolStart::Adopt);
    let env = [("PEGAFLOW_POOL", "fresh")];
    assert_eq!(load_with(&[], &env).unwrap().config.pool, PoolStart::Fresh);
    let flag = load_with(&["--pool", "adopt"], &env).unwrap();
    assert_eq!(flag.config.pool, PoolStart::Adopt);
    let file = file("pool = \"fresh\"\n");
    let config = load_with(&["--config", path(&file)], &[]).unwrap().config;
    assert_eq!(config.pool, PoolStart::Fresh);
}

#[test]
fn the_last_of_two_equal_flags_wins_and_lists_gather() {
    let flags = [
        "--spin-us=1",
        "--spin-us=2",
        "--allow-uid=5",
        "--allow-uid=6",
    ];
    let config = load_with(&flags, &[]).unwrap().config;
    assert_eq!((config.spin_us, config.allow_uid), (2, vec![5, 6]));
}

#[test]
fn none_is_another_word_for_no_admission_gate() {
    let loaded = load_with(&["--admission", "none"], &[]).unwrap();
    assert_eq!(loaded.config.admission, AdmissionKind::Off);
}

#[test]
fn defaults_follow_from_other_options() {
    let config = load_with(&["--node=n1", "--allow-uid=4242"], &[])
        .unwrap()
        .config;
    assert!(config.socket.ends_with("n1.sock"), "{:?}", config.socket);
    assert_eq!(config.socket_mode, 0o666);
    assert_eq!(config.max_blocks, (1 << 30) / 4096);
    assert!((1..=4).contains(&config.copy_threads));
    let small = load_with(&["--pool-size=2MiB"], &[]).unwrap().config;
    assert_eq!(small.max_blocks, 65_536);
    assert_eq!(Config::default().socket_mode, 0o600);
    assert_eq!(Config::default(), load_with(&[], &[]).unwrap().config);
}

#[test]
fn a_small_pool_gets_smaller_extents_and_a_note_says_so() {
    let loaded = load_with(&["--pool-size=8MiB"], &[]).unwrap();
    assert_eq!(loaded.config.extent_bytes, 2 << 20);
    assert!(
        loaded
            .notes
            .iter()
            .any(|note| note.contains("extent-size is made smaller"))
    );
    let odd = load_with(&["--pool-size=1073741825"], &[]).unwrap();
    assert_eq!(odd.config.pool_bytes, 1 << 30);
    assert!(odd.notes.iter().any(|note| note.contains("rounded down")));
}

#[test]
fn each_bad_value_is_named_with_its_option_and_the_way_out() {
    let cases: &[(&[&str], &[&str])] = &[
        (&["--node=a/b"], &["node = `a/b`", "flag --node", "letters"]),
        (&["--socket=rel.sock"], &["socket = `rel.sock`", "absolute"]),
        (&["--socket-mode=999"], &["socket-mode = `999`", "octal"]),
        (&["--socket-mode=0440"], &["socket-mode = `0440`", "0600"]),
        (&["--allow-uid=bob"], &["allow-uid = `bob`", "id -u"]),
        (&["--pool-size=lots"], &["pool-size = `lots`", "1GiB"]),
        (&["--pool-size=1KiB"], &["pool-size = `1KiB`", "1MiB"]),
        (
            &["--pool-size=900TiB"],
            &["pool-size = `900TiB`", "give less"],
        ),
        (
            &["--extent-size=1000"],
            &["extent-size = `1000`", "multiple of 4KiB"],
        ),
        (&["--max-blocks=0"], &["max-blocks = `0`", "give 1 to"]),
        (&["--max-blocks=-1"], &["max-blocks = `-1`", "whole number"]),
        (&["--policy=fifo"], &["policy = `fifo`", "lru, s3-fifo"]),
        (&["--admission=x"], &["admission = `x`", "off, tinylfu"]),
        (
            &["--copy-threads=1000"],
            &["copy-threads = `1000`", "give 1 to 64"],
        ),
        (&["--lease-ttl=30"], &["lease-ttl = `30`", "30s"]),
        (
            &["--lease-ttl=20m"],
            &["lease-ttl = `20m`", "--lease-ttl-max"],
        ),
        (
            &["--lease-ttl-max=9days"],
            &["lease-ttl-max = `9days`", "24h"],
        ),
        (
            &["--incomplete-ttl=1ms"],
            &["incomplete-ttl = `1ms`", "100ms"],
        ),
        (
            &["--max-sessions=257"],
            &["max-sessions = `257`", "give 1 to 256"],
        ),
        (
            &["--http=localhost:1"],
            &["http = `localhost:1`", "127.0.0.1:9464"],
        ),
        (
            &["--http=0.0.0.0:9464"],
            &["http = `0.0.0.0:9464`", "--http-allow-remote"],
        ),
        (
            &["--spin-us=99999"],
            &["spin-us = `99999`", "give 0 to 10000"],
        ),
        (&["--hugepages=yes"], &["hugepages = `yes`", "off, advise"]),
        (&["--pool=maybe"], &["pool = `maybe`", "adopt, fresh"]),
        (
            &["--http-allow-remote=maybe"],
            &["http-allow-remote = `maybe`", "true or false"],
        ),
        (&["--log-format=xml"], &["log-format = `xml`", "text, json"]),
        (&["--log-level=loud"], &["log-level = `loud`", "debug"]),
        (&["--drain-timeout=2h"], &["drain-timeout = `2h`", "1h"]),
    ];
    for (flags, words) in cases {
        let errors = errors(flags);
        assert_eq!(errors.len(), 1, "{flags:?}: {errors:?}");
        for word in *words {
            assert!(
                errors[0].contains(word),
                "{flags:?}: {} lacks {word}",
                errors[0]
            );
        }
    }
}

#[test]
fn all_errors_come_at_once() {
    let file = file("pol_size = 1\nfrobnicate = 2\nnode = \"..\"\nlease-ttl = 1.5\n");
    let flags = ["--config", path(&file), "--copy-threads=0", "--http=x"];
    let errors = errors(&flags);
    assert_eq!(errors.len(), 6, "{errors:#?}");
    let all = errors.join("\n");
    assert!(all.contains("unknown option `pol_size`"), "{all}");
    assert!(all.contains("did you mean `pool-size`?"), "{all}");
    assert!(all.contains("unknown option `frobnicate`"), "{all}");
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let gone = errors(&["--config", "/nonexistent/pegaflow.toml"]);
    assert!(gone[0].contains("/nonexistent/pegaflow.toml"), "{gone:?}");
    let broken = file("node = \n");
    let errors = errors(&["--config", path(&broken)]);
    assert!(errors[0].contains("is not TOML"), "{errors:?}");
}

#[test]
fn remote_http_needs_the_explicit_flag() {
    let flags = ["--http=0.0.0.0:9464", "--http-allow-remote"];
    assert!(load_with(&flags, &[]).is_ok());
    assert!(load_with(&["--http=[::1]:0"], &[]).is_ok());
}

#[test]
fn an_unknown_variable_is_a_warning_and_those_of_the_client_are_not() {
    let env = [
        ("PEGAFLOW_POOLSIZE", "1GiB"),
        ("PEGAFLOW_AUTOSTART", "1"),
        ("PEGAFLOW_SHM_DIR", "/dev/shm/x"),
        ("HOME", "/"),
    ];
    let loaded = load_with(&[], &env).unwrap();
    assert_eq!(loaded.notes.len(), 1, "{:?}", loaded.notes);
    assert!(loaded.notes[0].contains("PEGAFLOW_POOLSIZE"));
    assert!(loaded.notes[0].contains("did you mean `PEGAFLOW_POOL_SIZE`?"));
}

#[test]
fn the_effective_configuration_reads_back_as_itself_and_names_origins() {
    let env = [("PEGAFLOW_LEASE_TTL", "1m 5s")];
    let flags = [
        "--pool-size=100MB",
        "--allow-uid=7",
        "--pool=fresh",
        "--http=off",
    ];
    let loaded = load_with(&flags, &env).unwrap();
    let text = loaded.effective_toml();
    assert!(text.contains("# environment PEGAFLOW_LEASE_TTL"), "{text}");
    assert!(text.contains("# flag --pool-size"), "{text}");
    assert!(text.contains("# default"), "{text}");
    let file = file(&text);
    let again = load_with(&["--config", path(&file)], &[]).unwrap();
    assert_eq!(again.config, loaded.config);
}

#[test]
fn one_option_under_two_spellings_is_refused() {
    let file = file("max-leases = 1\nmax_leases = 2\n");
    let errors = errors(&["--config", path(&file)]);
    assert!(errors[0].contains("keep one"), "{errors:?}");
}
