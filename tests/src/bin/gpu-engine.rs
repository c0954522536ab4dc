//! An engine with GPU memory as a process of its own: see `pegaflow_tests::gpu::engine`.

#![forbid(unsafe_code)]

fn main() -> anyhow::Result<()> {
    pegaflow_tests::gpu::engine::serve()
}
