//! `pegaflow.h` and the library say the same: names, signatures, constants, layouts, symbol
//! versions.

mod tools;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::mem::offset_of;

use pegaflow::ffi::*;
use pegaflow::{MissReason, Op, State, Status};
use tools::{client_dir, compile};

fn header() -> String {
    std::fs::read_to_string(client_dir().join("include/pegaflow.h")).unwrap()
}

/// The header without comments and preprocessor lines.
fn code() -> String {
    let text = header();
    let mut code = String::new();
    let mut rest = text.as_str();
    while let Some(start) = rest.find("/*") {
        code.push_str(&rest[..start]);
        rest = &rest[start..];
        let end = rest.find("*/").expect("a comment ends");
        rest = &rest[end + 2..];
    }
    code.push_str(rest);
    let lines = code
        .lines()
        .filter(|line| !line.starts_with('#') && !line.contains("extern \"C\""));
    lines.collect::<Vec<_>>().join("\n")
}

/// Prototypes as `name -> (return type, [(argument, type)])`.
fn prototypes() -> BTreeMap<String, (String, Vec<(String, String)>)> {
    let code = code();
    let mut found = BTreeMap::new();
    for statement in code.split(';') {
        // The type of a callback, not a function of the library.
        if statement.trim_start().starts_with("typedef void (*") {
            continue;
        }
        let Some(open) = statement.find('(') else {
            continue;
        };
        let Some(close) = statement.rfind(')') else {
            continue;
        };
        let before = statement[..open].rsplit('}').next().unwrap();
        let (returns, name) = split_name(before);
        let arguments = statement[open + 1..close].split(',').map(str::trim);
        let arguments = arguments.filter(|text| *text != "void").map(|text| {
            let (kind, name) = split_name(text);
            (name, kind)
        });
        found.insert(name, (returns, arguments.collect()));
    }
    found
}

/// `const char *name` into `const char *` and `name`.
fn split_name(text: &str) -> (String, String) {
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let at = text.rfind([' ', '*']).unwrap() + 1;
    (text[..at].trim().to_owned(), text[at..].to_owned())
}

/// A Rust type as C writes it.
fn c_type(rust: &str) -> String {
    let rust = rust.replace(' ', "");
    if let Some(target) = rust.strip_prefix("*const") {
        return match target.strip_prefix("*const") {
            Some(_) => panic!("no such pointer in this interface: {rust}"),
            None => join_pointer(&format!("const {}", c_type(target))),
        };
    }
    if let Some(target) = rust.strip_prefix("*mut") {
        return join_pointer(&c_type(target));
    }
    match rust.as_str() {
        "c_int" => "int".into(),
        "c_char" => "char".into(),
        "c_void" => "void".into(),
        "usize" => "size_t".into(),
        "u16" => "uint16_t".into(),
        "u32" => "uint32_t".into(),
        "u64" => "uint64_t".into(),
        other => other.to_owned(),
    }
}

fn join_pointer(target: &str) -> String {
    if target.ends_with('*') {
        format!("{target}*")
    } else {
        format!("{target} *")
    }
}

#[test]
fn the_header_declares_exactly_what_the_code_defines() {
    let declared = prototypes();
    let mut defined = BTreeMap::new();
    for signature in SIGNATURES.iter().copied().flatten() {
        let arguments = signature.arguments.iter();
        let arguments = arguments.map(|(name, kind)| (name.to_string(), c_type(kind)));
        let entry = (c_type(signature.returns), arguments.collect::<Vec<_>>());
        assert!(defined.insert(signature.name.to_owned(), entry).is_none());
    }
    assert_eq!(declared, defined);
    assert!(defined.len() >= 31);
}

#[test]
fn the_version_script_exports_exactly_what_the_code_defines() {
    let map = std::fs::read_to_string(client_dir().join("pegaflow.map")).unwrap();
    let listed: BTreeSet<&str> = map
        .lines()
        .filter_map(|line| line.trim().strip_suffix(';'))
        .filter(|name| name.starts_with("pega_"))
        .collect();
    let defined: BTreeSet<&str> = SIGNATURES
        .iter()
        .copied()
        .flatten()
        .map(|signature| signature.name)
        .collect();
    assert_eq!(listed, defined);
}

#[test]
fn the_constants_of_the_header_are_those_of_the_code() {
    let mut expected = BTreeMap::new();
    let mut add = |name: String, value: i64| assert!(expected.insert(name, value).is_none());
    let upper = |prefix: &str, label: &str| format!("PEGA_{prefix}{}", label.to_uppercase());
    for status in Status::ALL {
        add(upper("", status.label()), *status as i64);
    }
    for op in (0..=u8::MAX).filter_map(Op::from_code) {
        add(upper("OP_", op.label()), op as i64);
    }
    for reason in MissReason::ALL {
        add(upper("REASON_", reason.label()), reason as i64);
    }
    for state in [State::Connected, State::Disconnected, State::Closed] {
        add(upper("STATE_", state.label()), state as i64);
    }
    for (name, value) in [
        ("PEGA_ABI_VERSION", i64::from(PEGA_ABI_VERSION)),
        ("PEGA_SCHEDULER", i64::from(PEGA_SCHEDULER)),
        ("PEGA_MODE_READ_WRITE", i64::from(PEGA_MODE_READ_WRITE)),
        ("PEGA_MODE_SAVE_ONLY", i64::from(PEGA_MODE_SAVE_ONLY)),
        ("PEGA_MEMORY_AUTO", i64::from(PEGA_MEMORY_AUTO)),
        ("PEGA_MEMORY_HOST", i64::from(PEGA_MEMORY_HOST)),
        ("PEGA_MEMORY_CUDA", i64::from(PEGA_MEMORY_CUDA)),
        ("PEGA_ORDER_NONE", i64::from(PEGA_ORDER_NONE)),
        ("PEGA_ORDER_STREAM", i64::from(PEGA_ORDER_STREAM)),
        ("PEGA_ORDER_EVENT", i64::from(PEGA_ORDER_EVENT)),
        ("PEGA_FETCH_POLL", i64::from(PEGA_FETCH_POLL)),
        ("PEGA_FETCH_NEVER", i64::from(PEGA_FETCH_NEVER)),
        ("PEGA_FETCH_WAIT", i64::from(PEGA_FETCH_WAIT)),
        ("PEGA_LOG_OFF", i64::from(PEGA_LOG_OFF)),
        ("PEGA_LOG_WARN", i64::from(PEGA_LOG_WARN)),
        ("PEGA_LOG_INFO", i64::from(PEGA_LOG_INFO)),
        ("PEGA_DEFAULT", i64::from(PEGA_DEFAULT)),
        ("PEGA_ON", i64::from(PEGA_ON)),
        ("PEGA_OFF", i64::from(PEGA_OFF)),
    ] {
        add(name.to_owned(), value);
    }
    let text = header();
    let mut declared = BTreeMap::new();
    for line in text.lines() {
        let Some(rest) = line.strip_prefix("#define PEGA_") else {
            continue;
        };
        let mut words = rest.split_whitespace();
        let name = format!("PEGA_{}", words.next().unwrap());
        let value = words.next().unwrap().trim_matches(['(', ')']);
        declared.insert(name, value.parse::<i64>().unwrap());
    }
    assert_eq!(declared, expected);
}

macro_rules! layout {
    ($out:ident: $($kind:ident { $($field:ident),* })*) => { $(
        let size = size_of::<$kind>();
        writeln!($out, "CHECK(sizeof({}) == {size});", stringify!($kind)).unwrap();
        $(
            let (kind, field) = (stringify!($kind), stringify!($field));
            let at = offset_of!($kind, $field);
            writeln!($out, "CHECK(offsetof({kind}, {field}) == {at});").unwrap();
        )*
    )* };
}

/// A translation unit that compiles only if every struct lies in memory as the code thinks.
fn layout_checks() -> String {
    let mut out = String::from(
        "#include \"pegaflow.h\"\n\
         #ifdef __cplusplus\n#define CHECK(x) static_assert(x, #x)\n\
         #else\n#define CHECK(x) _Static_assert(x, #x)\n#endif\n",
    );
    layout! { out:
        pega_hash { bytes }
        pega_options { size, ring_slots, node, socket, client_name, daemon, arena_bytes,
            connect_timeout_ms, control_timeout_ms, spin_ns, completion_slots, autostart, reconnect,
            no_spin, start_without_daemon, log_level, log, log_user }
        pega_namespace { size, block_tokens, model, revision, dtype, kv_layout, topology,
            hash_algorithm, salt }
        pega_segment { size, memory, address, block_stride, bytes }
        pega_group { size, group, num_blocks, num_segments, segments, replicated, reserved }
        pega_order { size, kind, handle }
        pega_query_options { size, fetch, ttl_ms, limit_ms }
        pega_registration { size, world_size, rank, mode, instance, ns, groups, num_groups,
            reserved }
        pega_completion { size, op, status, reason, request, lease, count, skipped, dropped,
            reserved0, bytes, value, daemon_ns, reserved }
        pega_stats { size, state, submitted, completed, failed, again, probes, probed_blocks,
            probe_hits, loaded_bytes, saved_bytes, disconnects, reconnects, outstanding, away_ms,
            failed_attempts, refused_registrations, waited_orders }
        pega_limits { size, reserved, query_hashes, membership_hashes, save_blocks, load_blocks,
            requests }
    }
    out.push_str("int main(void) { return 0; }\n");
    out
}

#[test]
fn the_structs_lie_as_the_code_thinks_in_c_and_in_cpp() {
    assert_eq!(size_of::<pega_completion>(), 96, "never changes");
    let folder = tempfile::tempdir().unwrap();
    for (compiler, name, standard) in [("cc", "layout.c", "c11"), ("c++", "layout.cpp", "c++17")] {
        let source = folder.path().join(name);
        std::fs::write(&source, layout_checks()).unwrap();
        let program = folder.path().join("layout");
        compile(
            compiler,
            &source,
            &program,
            &[&format!("-std={standard}")],
            &[],
        );
    }
}

#[test]
fn each_struct_of_the_header_is_checked() {
    let checks = layout_checks();
    for name in code().split("typedef struct ").skip(1) {
        let name = name.split_whitespace().next().unwrap();
        if name != "pega_client" {
            assert!(checks.contains(&format!("sizeof({name})")), "{name}");
        }
    }
}
