//! `pegactl`: look at, measure and exercise a PegaFlow node.

#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    pegaflow_tools::cli::main()
}
