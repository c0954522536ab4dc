//! An engine worker as a process of its own: see `pegaflow_tests::process` and
//! `pegaflow_tests::dying`.

#![forbid(unsafe_code)]

use pegaflow_tests::{dying, process};

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.as_slice() {
        [first, fate] if first == dying::DIE_ARGUMENT => dying::main(fate),
        _ => process::serve(),
    }
}
