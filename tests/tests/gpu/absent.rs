//! Without a GPU everything says so, and the rest works.

use std::process::Command;

use pegaflow_tests::gpu::Gpus;
use pegaflow_tests::gpu::engine::Engine;
use pegaflow_tests::gpu::rank::GpuSpec;
use pegaflow_tests::{Daemon, binaries};

use crate::{ENGINE, open};

#[test]
fn a_daemon_without_gpu_refuses_gpu_memory_and_says_why() {
    let gpus = Gpus::emulated(1);
    // A driver that shows no device, whatever this machine has.
    let daemon = Daemon::start_with(pegaflow_tests::daemon::Config {
        environment: vec![
            gpus.environment()[1].clone(),
            ("EMULATED_CUDA_DIR".into(), String::new()),
        ],
        ..Default::default()
    });
    let mut worker = Engine::spawn(gpus.command(ENGINE));
    let refused = worker.run(&open(&daemon, &GpuSpec::default()));
    assert_eq!(refused.status, "device_unavailable", "{refused:?}");
    assert!(!refused.error.is_empty());
}

#[test]
fn bench_gpu_without_gpu_says_what_is_missing() {
    let gpus = Gpus::emulated(1);
    let output = Command::new(binaries::pegactl())
        .args(["bench", "gpu"])
        .envs(gpus.environment())
        .env("EMULATED_CUDA_DIR", "")
        .output()
        .expect("pegactl runs");
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        text.contains("GPU 0 is wanted and the driver shows 0"),
        "{text}"
    );
}

#[test]
fn bench_gpu_measures_and_prints_every_case() {
    let gpus = Gpus::with(emulated_cuda::machine::Machine {
        devices: vec![emulated_cuda::machine::DeviceSpec {
            uuid: [7; 16],
            memory_bytes: 4 << 30,
        }],
        ..emulated_cuda::machine::Machine::with_devices(1)
    });
    let output = Command::new(binaries::pegactl())
        .args([
            "bench", "gpu", "--json", "--memory", "16MiB", "--rounds", "1",
        ])
        .args(["--pool-size", "256MiB", "--only", "2-MiB"])
        .envs(gpus.environment())
        .output()
        .expect("pegactl runs");
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{err}");
    let report: serde_json::Value = serde_json::from_str(&out).expect("one object");
    assert_eq!(report["gpus"][0]["name"], "emulated GPU 0");
    assert!(report["rows"][0]["value"].as_f64().expect("a figure") > 0.0);
}
