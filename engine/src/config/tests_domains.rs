//! `[[domain]]` tables and the lists of users and groups.

use super::tests::{errors, file, load_with, path};
use super::*;

const TWO: &str = r#"
pool-size = "64MiB"
allow-gid = [44, "root"]
[[domain]]
name = "serving"
uids = [1000, "root"]
gids = [500]
namespaces = ["meta-llama/*", "qwen-?b"]
[[domain]]
name = "other"
gids = [600]
"#;

#[test]
fn tables_are_read_and_the_effective_configuration_reads_back_as_itself() {
    let given = file(TWO);
    let loaded = load_with(&["--config", path(&given)], &[]).unwrap();
    let config = &loaded.config;
    assert_eq!(config.allow_gid, vec![0, 44]);
    assert_eq!(
        config.domains,
        vec![
            DomainRule {
                name: "serving".into(),
                uids: vec![0, 1000],
                gids: vec![500],
                namespaces: vec!["meta-llama/*".into(), "qwen-?b".into()],
            },
            DomainRule {
                name: "other".into(),
                uids: vec![],
                gids: vec![600],
                namespaces: vec!["*".into()],
            },
        ]
    );
    assert!(config.serves_others());
    assert_eq!(config.socket_mode, 0o666, "listed users reach the socket");
    let text = loaded.effective_toml();
    let again = file(&text);
    let again = load_with(&["--config", path(&again)], &[]).unwrap();
    assert_eq!(again.config, loaded.config, "{text}");
}

#[test]
fn groups_are_given_by_flag_and_environment_too() {
    let loaded = load_with(&["--allow-gid=7", "--allow-gid=root"], &[]).unwrap();
    assert_eq!(loaded.config.allow_gid, vec![0, 7]);
    let env = [("PEGAFLOW_ALLOW_GID", "8, 9")];
    assert_eq!(load_with(&[], &env).unwrap().config.allow_gid, vec![8, 9]);
}

#[test]
fn each_mistake_in_a_table_is_named_with_the_way_out() {
    let cases: &[(&str, &[&str])] = &[
        ("uids = [1]", &["domain number 1", "has no name"]),
        (
            "name = \"\"\nuids = [1]",
            &["domain number 1", "has no name"],
        ),
        ("name = 3\nuids = [1]", &["name = 3", "give a text"]),
        ("name = \"a b\"\nuids = [1]", &["domain a b", "letters"]),
        (
            "name = \".a\"\nuids = [1]",
            &["domain .a", "starting with a dot"],
        ),
        ("name = \"uid-7\"\nuids = [1]", &["`uid-`", "single users"]),
        ("name = \"a\"", &["domain a", "give uids or gids"]),
        ("name = \"a\"\nuids = 7", &["uids = 7", "give a list"]),
        (
            "name = \"a\"\nuids = [\"no-such\"]",
            &["uids", "`no-such`", "id -u"],
        ),
        (
            "name = \"a\"\ngids = [\"no-such\"]",
            &["gids", "`no-such`", "id -g"],
        ),
        ("name = \"a\"\nuids = [-1]", &["uids", "`-1`"]),
        ("name = \"a\"\nuids = [1.5]", &["uids", "`1.5`"]),
        (
            "name = \"a\"\nuid = [1]\nuids = [1]",
            &["unknown key `uid`", "did you mean `uids`?"],
        ),
        (
            "name = \"a\"\nuids = [1]\nnamespaces = \"x\"",
            &["give a list of patterns"],
        ),
        (
            "name = \"a\"\nuids = [1]\nnamespaces = []",
            &["0 patterns", "leave it out"],
        ),
        (
            "name = \"a\"\nuids = [1]\nnamespaces = [\"\"]",
            &["is no pattern", "`*`"],
        ),
        (
            "name = \"a\"\nuids = [1]\nnamespaces = [7]",
            &["7 is no pattern"],
        ),
        (
            "name = \"a\"\nuids = [1]\nnamespaces = [\"a\\u0007\"]",
            &["control characters"],
        ),
        (
            "name = \"a\"\nuids = [1]\n[[domain]]\nname = \"a\"\nuids = [2]",
            &["domain a", "two tables of this name"],
        ),
        (
            "name = \"a\"\nuids = [1]\n[[domain]]\nname = \"b\"\nuids = [1]",
            &["domain b", "user 1", "domain `a`, too"],
        ),
        (
            "name = \"a\"\ngids = [1]\n[[domain]]\nname = \"b\"\ngids = [1]",
            &["domain b", "group 1", "domain `a`, too"],
        ),
    ];
    for (table, words) in cases {
        let given = file(&format!("[[domain]]\n{table}\n"));
        let found = errors(&["--config", path(&given)]).join("\n");
        for word in *words {
            assert!(found.contains(word), "{table}: {found} lacks {word}");
        }
        assert!(found.contains(path(&given)), "{found} lacks the file");
    }
}

#[test]
fn a_domain_that_is_no_table_and_too_many_tables_are_refused() {
    for text in [
        "domain = \"serving\"",
        "domain = [1, 2]",
        "[domain]\nname = \"a\"",
    ] {
        let given = file(text);
        let found = errors(&["--config", path(&given)]);
        assert!(
            found.len() == 1 && found[0].contains("[[domain]]"),
            "{found:?}"
        );
    }
    let many: String = (0..=MAX_NAMED_DOMAINS)
        .map(|n| format!("[[domain]]\nname = \"d{n}\"\nuids = [{n}]\n"))
        .collect();
    let given = file(&many);
    let found = errors(&["--config", path(&given)]);
    assert!(
        found.len() == 1 && found[0].contains("at most 32"),
        "{found:?}"
    );
}

#[test]
fn all_mistakes_of_tables_and_options_come_at_once() {
    let given =
        file("copy-threads = 0\n[[domain]]\nname = \"a b\"\n[[domain]]\nuids = [\"x y\"]\n");
    let found = errors(&["--config", path(&given), "--allow-gid=no-such"]);
    assert_eq!(found.len(), 6, "{found:#?}");
}
