//! fio over the shard's file, with memory of the same kind.

#![forbid(unsafe_code)]

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::memory::Memory;
use super::rig::Rig;
use super::{Figure, SsdArgs};
use crate::error::ToolError;

/// The version of fio, if it is there.
pub(super) fn version() -> Result<String, ToolError> {
    let output = Command::new("fio").arg("--version").output();
    match output {
        Ok(output) if output.status.success() => {
            Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
        }
        _ => Err(ToolError::Plan(
            "fio is not installed: it is what the figures are compared with (apt-get install fio)"
                .to_owned(),
        )),
    }
}

/// fio over the shard's file.
pub(super) struct Fio<'a> {
    args: &'a SsdArgs,
    path: &'a Path,
    memory: &'a Memory,
    page: u32,
}

/// One run of fio.
#[derive(Clone, Copy)]
pub(super) struct Job {
    /// `write` or `randread`.
    pub pattern: &'static str,
    /// `io_uring` or `psync`.
    pub engine: &'static str,
    /// Bytes to move.
    pub bytes: u64,
    /// Where the part of the file begins that they are of, and its length.
    pub span: (u64, u64),
    /// What it writes carries checksums, and what it reads is compared with them.
    pub verify: bool,
}

impl<'a> Fio<'a> {
    /// Over this file, with memory of the kind that the rig has.
    pub(super) fn of(args: &'a SsdArgs, path: &'a Path, rig: &'a Rig) -> Self {
        Self {
            args,
            path,
            memory: &rig.memory,
            page: rig.page,
        }
    }

    /// Runs a job.
    pub(super) fn measure(&self, job: Job) -> Result<Figure, ToolError> {
        let Job {
            pattern,
            engine,
            bytes,
            span: (offset, span),
            verify,
        } = job;
        let mut command = Command::new("fio");
        command.args([
            "--name=bench",
            "--direct=1",
            "--output-format=json",
            "--end_fsync=1",
            "--randrepeat=0",
        ]);
        self.memory.tell_fio(&mut command);
        command.arg(format!("--filename={}", self.path.display()));
        command.arg(format!("--rw={pattern}"));
        command.arg(format!("--bs={}", self.page));
        command.arg(format!("--offset={offset}"));
        command.arg(format!("--size={span}"));
        command.arg(format!("--io_size={bytes}"));
        if verify {
            // By the processor's own instruction. Whole blocks, as ours.
            command.args(["--verify=crc32c", "--verify_fatal=1"]);
            command.arg("--verify_state_save=0");
            if pattern == "write" {
                command.arg("--do_verify=0");
            }
        }
        command.arg(format!("--ioengine={engine}"));
        if engine == "io_uring" {
            command.arg(format!("--iodepth={}", self.args.depth));
            command.args(["--fixedbufs=1", "--registerfiles=1"]);
        }
        let output = command.output().map_err(ToolError::io("fio"))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let parsed = text
            .find('{')
            .and_then(|start| serde_json::from_str::<Value>(&text[start..]).ok());
        let job = parsed.as_ref().map(|report| &report["jobs"][0]);
        let figure = job.and_then(|job| {
            let side = &job[if pattern == "write" { "write" } else { "read" }];
            let moved = side["io_bytes"].as_f64().filter(|&moved| moved > 0.0)?;
            // fio's own figures: its start is not part of them.
            let seconds = job["job_runtime"].as_f64()? / 1e3;
            let busy = (job["usr_cpu"].as_f64()? + job["sys_cpu"].as_f64()?) / 100.0 * seconds;
            Some(Figure {
                rate: moved / seconds,
                cpu: busy * f64::from(1 << 30) / moved,
                checksums: 0.0,
            })
        });
        figure.ok_or_else(|| {
            ToolError::Plan(format!(
                "fio failed: {}{}",
                String::from_utf8_lossy(&output.stderr),
                text.lines().take(5).collect::<Vec<_>>().join("\n")
            ))
        })
    }
}
