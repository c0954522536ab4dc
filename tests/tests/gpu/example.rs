//! The CUDA example in C compiles without a warning and gives every byte back.

use std::process::Command;

use pegaflow_tests::binaries;
use pegaflow_tests::gpu::Gpus;

use crate::daemon;

#[test]
fn the_cuda_example_saves_behind_a_stream_and_loads_ahead_of_it() {
    let gpus = Gpus::emulated(1);
    let daemon = daemon(&gpus);
    let folder = tempfile::tempdir().expect("a folder");
    let program = folder.path().join("cuda");
    let repository = binaries::repository();
    let compiled = Command::new("cc")
        .args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-O1"])
        .arg(repository.join("client-c/examples/cuda.c"))
        .arg("-I")
        .arg(repository.join("client-c/include"))
        .arg("-I")
        .arg(repository.join("tests/emulated-cuda/include"))
        .arg("-o")
        .arg(&program)
        // The static library that was built together with this test.
        .arg(
            std::env::current_exe()
                .expect("path of this program")
                .with_file_name("libpegaflow.a"),
        )
        .args(["-lpthread", "-ldl", "-lm", "-lgcc_s", "-L"])
        .arg(gpus.folder())
        .arg("-lcuda")
        .output()
        .expect("a C compiler");
    let said = String::from_utf8_lossy(&compiled.stderr);
    assert!(compiled.status.success(), "{said}");
    let done = gpus
        .command(&program)
        .env("PEGAFLOW_SOCKET", daemon.socket())
        .env_remove("PEGAFLOW_AUTOSTART")
        .output()
        .expect("it starts");
    let (out, said) = (
        String::from_utf8_lossy(&done.stdout),
        String::from_utf8_lossy(&done.stderr),
    );
    assert!(done.status.success(), "{out}\n{said}\n{}", daemon.log());
    assert_eq!(
        out,
        "saved 64 blocks, 0 were there\nloaded 64 blocks in 2 steps: every byte is right\n"
    );
}
