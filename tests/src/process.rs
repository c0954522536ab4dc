//! A worker in a process of its own, driven by commands over its standard input.

#![forbid(unsafe_code)]

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use pegaflow::{BlockHash, Options, Status};
use serde::{Deserialize, Serialize};

use crate::content;
use crate::daemon::Daemon;
use crate::worker::{Worker, WorkerSpec, first_blocks};

/// What a worker process is told; hashes are given by number (see [`content::hash`]).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Task {
    /// Connect and register.
    Open {
        /// Socket of the daemon.
        socket: PathBuf,
        /// What to register.
        spec: WorkerSpec,
    },
    /// Wait until the instance is complete.
    WaitReady,
    /// Compute and save blocks `0..count` under the hashes from `first` on.
    Save {
        /// First hash number.
        first: u64,
        /// Blocks.
        count: usize,
    },
    /// Ask for a lease.
    Query {
        /// Request key.
        key: u64,
        /// First hash number.
        first: u64,
        /// Hashes.
        count: usize,
    },
    /// Probe without asking the daemon.
    Probe {
        /// First hash number.
        first: u64,
        /// Hashes.
        count: usize,
    },
    /// Load a lease into blocks `0..count` and verify every byte.
    Load {
        /// The lease.
        lease: u64,
        /// First hash number.
        first: u64,
        /// Blocks.
        count: usize,
    },
    /// Save blocks `0..count` as they are under the hashes from `first` on, and do not wait.
    StartSave {
        /// First hash number.
        first: u64,
        /// Blocks.
        count: usize,
    },
    /// Load a lease into blocks `0..count`, and do not wait.
    StartLoad {
        /// The lease.
        lease: u64,
        /// Blocks.
        count: usize,
    },
    /// Close the session and live on.
    Leave,
    /// Save, query, load and verify at random until killed.
    Churn {
        /// Of the random numbers.
        seed: u64,
    },
}

/// What a worker process answers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Label of the status.
    pub status: String,
    /// Hits, blocks loaded, or blocks stored.
    pub count: u32,
    /// Blocks skipped by a save.
    pub skipped: u32,
    /// A query's lease.
    pub lease: u64,
    /// Bytes that differ, or an error's words.
    pub error: String,
}

impl Answer {
    /// The status was `ok` and no byte differed.
    pub fn is_ok(&self) -> bool {
        self.status == Status::Ok.label() && self.error.is_empty()
    }
}

/// A worker process; killed when dropped.
pub struct WorkerProcess {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl WorkerProcess {
    /// Starts the program `worker-process`, whose path a test knows as
    /// `env!("CARGO_BIN_EXE_worker-process")`, and registers.
    ///
    /// # Panics
    /// It does not start, or cannot register.
    pub fn start(program: &str, daemon: &Daemon, spec: &WorkerSpec) -> WorkerProcess {
        let mut worker = WorkerProcess::spawn(Command::new(program));
        let answer = worker.run(&Task::Open {
            socket: daemon.socket(),
            spec: spec.clone(),
        });
        assert!(answer.is_ok(), "{answer:?}\n{}", daemon.log());
        worker
    }

    /// Starts the command, which runs `worker-process`, and registers nothing yet.
    ///
    /// # Panics
    /// It does not start.
    pub fn spawn(mut command: Command) -> WorkerProcess {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the worker starts");
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().expect("piped"));
        WorkerProcess {
            child,
            input,
            output,
        }
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Gives it a task without waiting for the answer.
    ///
    /// # Panics
    /// It is gone.
    pub fn tell(&mut self, task: &Task) {
        let mut line = serde_json::to_vec(task).expect("a task can be written");
        line.push(b'\n');
        let input = self.input.as_mut().expect("open");
        input.write_all(&line).expect("the worker reads");
    }

    /// Waits for the answer to the oldest task that has none.
    ///
    /// # Panics
    /// It ended instead.
    pub fn hear(&mut self) -> Answer {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("the worker writes");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("worker ended: {error} `{line}`"))
    }

    /// Gives it a task and waits for the answer.
    pub fn run(&mut self, task: &Task) -> Answer {
        self.tell(task);
        self.hear()
    }

    /// True while the process runs.
    ///
    /// # Panics
    /// It cannot be asked.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("wait").is_none()
    }

    /// Kills it with SIGKILL.
    pub fn kill(&mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }

    /// Lets it end by itself.
    ///
    /// # Panics
    /// It fails.
    pub fn finish(mut self) {
        drop(self.input.take());
        let status = self.child.wait().expect("wait");
        assert!(status.success(), "worker ended with {status}");
    }
}

impl Drop for WorkerProcess {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// The main loop of `worker-process`: one task a line, one answer a line, until the end of input.
///
/// # Errors
/// Standard input or output is gone, or a line is no task.
pub fn serve() -> anyhow::Result<()> {
    let mut worker = None;
    for line in std::io::stdin().lock().lines() {
        let task: Task = serde_json::from_str(&line?)?;
        let answer = perform(task, &mut worker);
        let mut text = serde_json::to_vec(&answer)?;
        text.push(b'\n');
        let mut output = std::io::stdout().lock();
        output.write_all(&text)?;
        output.flush()?;
    }
    Ok(())
}

fn perform(task: Task, place: &mut Option<Worker>) -> Answer {
    if let Task::Open { socket, spec } = task {
        let options = Options {
            socket: Some(socket),
            autostart: Some(false),
            ..Options::default()
        };
        return match Worker::open(options, spec) {
            Ok(worker) => {
                *place = Some(worker);
                Answer {
                    status: Status::Ok.label().into(),
                    ..Answer::default()
                }
            }
            Err(error) => failure(&error),
        };
    }
    if matches!(task, Task::Leave) {
        *place = None;
        return Answer {
            status: Status::Ok.label().into(),
            ..Answer::default()
        };
    }
    let Some(worker) = place else {
        return Answer {
            error: "not open".into(),
            ..Answer::default()
        };
    };
    work(task, worker).unwrap_or_else(|error| failure(&error))
}

fn failure(error: &pegaflow::Error) -> Answer {
    let (status, error) = (error.status().label().into(), error.to_string());
    Answer {
        status,
        error,
        ..Answer::default()
    }
}

fn work(task: Task, worker: &Worker) -> Result<Answer, pegaflow::Error> {
    let client = &worker.client;
    let registration = worker.registration;
    let done = match task {
        Task::WaitReady => {
            client.wait_ready(registration, crate::SOON)?;
            pegaflow::Completion::default()
        }
        Task::Probe { first, count } => {
            let hits = client.probe(registration, 0, &content::hashes(first, count))?;
            let status = Status::Ok.label().into();
            return Ok(Answer {
                status,
                count: hits,
                ..Answer::default()
            });
        }
        Task::Save { first, count } => {
            let hashes = content::hashes(first, count);
            let blocks = first_blocks(count);
            for (block, hash) in blocks.iter().zip(&hashes) {
                worker.compute(0, *block, hash);
            }
            client.wait(client.save(registration, 0, &hashes, &blocks)?, crate::SOON)?
        }
        Task::Query { key, first, count } => {
            let request = client.query(registration, 0, key, &content::hashes(first, count), 0)?;
            client.wait(request, crate::SOON)?
        }
        Task::Load {
            lease,
            first,
            count,
        } => {
            return load(worker, lease, &content::hashes(first, count));
        }
        Task::StartSave { first, count } => {
            let hashes = content::hashes(first, count);
            client.save(registration, 0, &hashes, &first_blocks(count))?;
            pegaflow::Completion::default()
        }
        Task::StartLoad { lease, count } => {
            client.load(registration, 0, lease, 0, &first_blocks(count))?;
            pegaflow::Completion::default()
        }
        Task::Churn { seed } => churn(worker, seed),
        Task::Open { .. } | Task::Leave => pegaflow::Completion::default(),
    };
    Ok(Answer {
        status: done.status.label().into(),
        count: done.count,
        skipped: done.skipped,
        lease: done.lease,
        error: String::new(),
    })
}

fn load(worker: &Worker, lease: u64, hashes: &[BlockHash]) -> Result<Answer, pegaflow::Error> {
    let blocks = first_blocks(hashes.len());
    worker.wipe(0, &blocks);
    let request = worker
        .client
        .load(worker.registration, 0, lease, 0, &blocks)?;
    let done = worker.client.wait(request, crate::SOON)?;
    let mut answer = Answer {
        status: done.status.label().into(),
        count: done.count,
        ..Answer::default()
    };
    if done.is_ok() {
        for (block, hash) in blocks.iter().zip(hashes) {
            if let Err(mismatch) = worker.verify(0, *block, hash) {
                answer.error = format!("{mismatch:?}");
            }
        }
    }
    Ok(answer)
}

/// Numbers of hashes that churning workers share, so that they meet.
const CHURN_HASHES: u64 = 300;

/// Does not end by itself. A daemon that is away costs errors, which are no fault; a byte that
/// differs ends the process, which whoever watches it must look at.
fn churn(worker: &Worker, seed: u64) -> ! {
    let mut random = content::Stream::new(&[seed]);
    let mut key = 0;
    loop {
        key += 1;
        let first = 1_000_000 + random.below(CHURN_HASHES);
        let count = 1 + random.below(u64::from(worker.spec.blocks)) as usize;
        let leaves_lease = random.below(4) == 0;
        if churn_once(worker, key, first, count, leaves_lease).is_err() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

fn churn_once(
    worker: &Worker,
    key: u64,
    first: u64,
    count: usize,
    leaves_lease: bool,
) -> Result<(), pegaflow::Error> {
    let done = work(Task::Query { key, first, count }, worker)?;
    if done.lease != 0 && !leaves_lease {
        let task = Task::Load {
            lease: done.lease,
            first,
            count: done.count as usize,
        };
        let loaded = work(task, worker)?;
        assert_eq!(loaded.error, "", "bytes differ in request {key}");
    }
    work(Task::Save { first, count }, worker).map(drop)
}
