//! An engine with GPU memory in a process of its own, driven by commands over its standard input.

#![forbid(unsafe_code)]

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use pegaflow::{Client, Completion, Options, Order, RequestId, Status};
use pegaflow_tools::gpu::{Event, Gate, Gpu, PinnedMemory};
use serde::{Deserialize, Serialize};

use super::rank::{GpuSpec, Rank};
use super::soak;
use crate::content;

/// What a save or load comes after.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum After {
    /// Nothing: the bytes are there.
    Nothing,
    /// The stream, which has nothing to do.
    Stream,
    /// The stream, which goes on at [`Task::OpenGate`].
    HeldStream,
    /// An event of that stream.
    HeldEvent,
}

/// What an engine is told; hashes are given by number (see [`content::hash`]).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Task {
    /// Connect, allocate, register.
    Open {
        /// Socket of the daemon.
        socket: PathBuf,
        /// What to register.
        spec: GpuSpec,
    },
    /// Wait until the instance is complete.
    WaitReady,
    /// Compute blocks under the hashes from `first` on and save them, without waiting.
    StartSave {
        /// Cache group.
        group: u16,
        /// First hash number.
        first: u64,
        /// Block ids, one for each hash.
        blocks: Vec<u32>,
        /// When the bytes are there.
        after: After,
    },
    /// Load a lease into blocks, without waiting.
    StartLoad {
        /// Cache group.
        group: u16,
        /// The lease.
        lease: u64,
        /// First hash number.
        first: u64,
        /// Block ids.
        blocks: Vec<u32>,
        /// When they may be overwritten.
        after: After,
    },
    /// Load a lease into blocks in steps, and compare what a stream finds that waits for each of
    /// them.
    LoadInSteps {
        /// Cache group.
        group: u16,
        /// The lease.
        lease: u64,
        /// First hash number.
        first: u64,
        /// Block ids.
        blocks: Vec<u32>,
        /// Steps.
        steps: u16,
    },
    /// Let the stream go on.
    OpenGate,
    /// Wait for the oldest request that was started.
    Finish,
    /// Tell whether the oldest request is answered within so many milliseconds; it stays.
    IsDone {
        /// How long to wait.
        within_ms: u64,
    },
    /// Ask for a lease.
    Query {
        /// Cache group.
        group: u16,
        /// Request key.
        key: u64,
        /// First hash number.
        first: u64,
        /// Hashes.
        count: usize,
    },
    /// Compare every byte of all GPU memory.
    Check,
    /// Whether the client serves the registration.
    State,
    /// Give registration and memory back and live on.
    Leave,
    /// Tell the free memory of a GPU, without registering anything.
    FreeMemory {
        /// Number of the GPU.
        gpu: u32,
    },
    /// Do as the soak run's engines do.
    Soak(soak::Plan),
}

/// What an engine answers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// Label of the status.
    pub status: String,
    /// Hits, blocks loaded, or blocks stored.
    pub count: u32,
    /// Bytes copied, or free.
    pub bytes: u64,
    /// A query's lease.
    pub lease: u64,
    /// Bytes that differ, or an error's words.
    pub error: String,
    /// What a soak has done.
    pub tally: Option<soak::Tally>,
}

impl Reply {
    /// The status was `ok` and no byte differed.
    pub fn is_ok(&self) -> bool {
        self.status == Status::Ok.label() && self.error.is_empty()
    }
}

/// An engine's process; killed when dropped.
pub struct Engine {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Engine {
    /// Starts the command, which runs `gpu-engine`.
    ///
    /// # Panics
    /// It does not start.
    pub fn spawn(mut command: Command) -> Engine {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the engine starts");
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().expect("piped"));
        Engine {
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
    /// # Errors
    /// It is gone.
    pub fn tell(&mut self, task: &Task) -> anyhow::Result<()> {
        let mut line = serde_json::to_vec(task)?;
        line.push(b'\n');
        let input = self.input.as_mut().context("its input was closed")?;
        Ok(input.write_all(&line)?)
    }

    /// Waits for the answer to the oldest task that has none.
    ///
    /// # Errors
    /// It ended instead.
    pub fn hear(&mut self) -> anyhow::Result<Reply> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        serde_json::from_str(&line).with_context(|| format!("the engine said `{line}`"))
    }

    /// Gives it a task and waits for the answer.
    ///
    /// # Panics
    /// It ended instead.
    pub fn run(&mut self, task: &Task) -> Reply {
        let reply = self.tell(task).and_then(|()| self.hear());
        reply.unwrap_or_else(|error| panic!("{task:?}: {error:#}"))
    }

    /// [`Self::run`] of what must succeed.
    ///
    /// # Panics
    /// It does not.
    pub fn must(&mut self, task: &Task) -> Reply {
        let reply = self.run(task);
        assert!(reply.is_ok(), "{task:?}: {reply:?}");
        reply
    }

    /// True while the process runs.
    ///
    /// # Panics
    /// It cannot be asked.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("wait").is_none()
    }

    /// Kills it with SIGKILL.
    ///
    /// # Panics
    /// It cannot be waited for.
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
        assert!(status.success(), "the engine ended with {status}");
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// The main loop of `gpu-engine`: one task a line, one answer a line, until the end of input.
///
/// # Errors
/// Standard input or output is gone, or a line is no task.
pub fn serve() -> anyhow::Result<()> {
    let mut state = Serving::default();
    for line in std::io::stdin().lock().lines() {
        let task: Task = serde_json::from_str(&line?)?;
        let reply = state.perform(task).unwrap_or_else(|error| failure(&error));
        let mut text = serde_json::to_vec(&reply)?;
        text.push(b'\n');
        let mut output = std::io::stdout().lock();
        output.write_all(&text)?;
        output.flush()?;
    }
    Ok(())
}

/// An error of the library keeps its status.
fn failure(error: &anyhow::Error) -> Reply {
    let known = error.downcast_ref::<pegaflow::Error>();
    Reply {
        status: known.map_or(String::new(), |error| error.status().label().into()),
        error: format!("{error:#}"),
        ..Reply::default()
    }
}

fn reply(done: &Completion) -> Reply {
    Reply {
        status: done.status.label().into(),
        count: done.count,
        bytes: done.bytes,
        lease: done.lease,
        ..Reply::default()
    }
}

fn ok() -> Reply {
    reply(&Completion::default())
}

/// A request under way, and what should be where once it has succeeded.
struct Pending {
    request: RequestId,
    loads: Vec<(u16, u32, Vec<u8>)>,
}

#[derive(Default)]
struct Serving {
    pending: Vec<Pending>,
    held: Vec<(Gate, PinnedMemory)>,
    rank: Option<Rank>,
    watched: Option<Gpu>,
}

impl Serving {
    fn perform(&mut self, task: Task) -> anyhow::Result<Reply> {
        match task {
            Task::Open { socket, spec } => {
                self.rank = Some(Rank::open(options(socket), spec)?);
                return Ok(ok());
            }
            Task::Leave => {
                *self = Serving::default();
                return Ok(ok());
            }
            Task::OpenGate => {
                self.held.iter().for_each(|(gate, _)| gate.open());
                return Ok(ok());
            }
            Task::FreeMemory { gpu } => {
                let gpu = self.watched.take().map_or_else(|| Gpu::open(gpu), Ok)?;
                let bytes = gpu.memory()?.0 as u64;
                self.watched = Some(gpu);
                return Ok(Reply { bytes, ..ok() });
            }
            Task::Soak(plan) => {
                let tally = soak::run(&plan)?;
                let tally = Some(tally);
                return Ok(Reply { tally, ..ok() });
            }
            _ => {}
        }
        let rank = self.rank.as_mut().context("not open")?;
        match task {
            Task::WaitReady => {
                rank.client.wait_ready(rank.registration, crate::SOON)?;
            }
            Task::StartSave {
                group,
                first,
                blocks,
                after,
            } => {
                let pages = pages(rank, group, first, &blocks);
                let hashes = content::hashes(first, blocks.len());
                let held = matches!(after, After::HeldStream | After::HeldEvent);
                if held {
                    self.held.push(rank.put_later(group, &pages)?);
                } else {
                    for (block, page) in &pages {
                        rank.put(group, *block, page)?;
                    }
                }
                let (order, _event) = order(rank, after)?;
                let (client, registration) = (&rank.client, rank.registration);
                let request = client.save_after(registration, group, &hashes, &blocks, order)?;
                let loads = Vec::new();
                self.pending.push(Pending { request, loads });
            }
            Task::StartLoad {
                group,
                lease,
                first,
                blocks,
                after,
            } => {
                if matches!(after, After::HeldStream | After::HeldEvent) {
                    self.held.push(rank.read_later(group, blocks[0])?);
                }
                let loads = pages(rank, group, first, &blocks);
                let loads = loads.into_iter().map(|(block, page)| (group, block, page));
                let loads = loads.collect();
                let (order, _event) = order(rank, after)?;
                let (client, registration) = (&rank.client, rank.registration);
                let request = client.load_after(registration, group, lease, 0, &blocks, order)?;
                self.pending.push(Pending { request, loads });
            }
            Task::LoadInSteps {
                group,
                lease,
                first,
                blocks,
                steps,
            } => {
                let (found, answer) = rank.load_in_steps(group, lease, &blocks, steps)?;
                let answer = answer?;
                if answer.is_ok() {
                    for (number, (block, page)) in
                        pages(rank, group, first, &blocks).iter().enumerate()
                    {
                        anyhow::ensure!(
                            found[number] == *page,
                            "a stream that waited for {steps} steps found other bytes in block \
                             {block}"
                        );
                        rank.expect(group, *block, page);
                    }
                }
                return Ok(reply(&answer));
            }
            Task::Finish => {
                anyhow::ensure!(!self.pending.is_empty(), "nothing was started");
                let pending = self.pending.remove(0);
                let done = rank.wait(pending.request)?;
                if done.is_ok() {
                    for (group, block, page) in &pending.loads {
                        rank.expect(*group, *block, page);
                    }
                }
                return Ok(reply(&done));
            }
            Task::IsDone { within_ms } => {
                let pending = self.pending.first().context("nothing was started")?;
                let within = Duration::from_millis(within_ms);
                let answered = rank.client.wait(pending.request, within);
                let error = match answered {
                    Err(pegaflow::Error::Timeout { .. }) => String::new(),
                    other => format!("answered: {other:?}"),
                };
                return Ok(Reply { error, ..ok() });
            }
            Task::Query {
                group,
                key,
                first,
                count,
            } => {
                let hashes = content::hashes(first, count);
                let (client, registration) = (&rank.client, rank.registration);
                let request = client.query(registration, group, key, &hashes, 0)?;
                return Ok(reply(&rank.wait(request)?));
            }
            Task::Check => rank.check()?,
            Task::State => {
                let state = rank.client.state();
                let error = format!("{state:?}");
                return Ok(Reply { error, ..ok() });
            }
            Task::Open { .. }
            | Task::Leave
            | Task::OpenGate
            | Task::FreeMemory { .. }
            | Task::Soak(_) => {}
        }
        Ok(ok())
    }
}

/// Options with which a client finds the daemon at this socket.
pub fn options(socket: PathBuf) -> Options {
    Options {
        socket: Some(socket),
        autostart: Some(false),
        backoff_min: Duration::from_millis(10),
        backoff_max: Duration::from_millis(100),
        ..Options::default()
    }
}

fn pages(rank: &Rank, group: u16, first: u64, blocks: &[u32]) -> Vec<(u32, Vec<u8>)> {
    let hashes = content::hashes(first, blocks.len());
    let pages = hashes.iter().map(|hash| rank.page_of(group, hash));
    blocks.iter().copied().zip(pages).collect()
}

fn order(rank: &Rank, after: After) -> anyhow::Result<(Order, Option<Event>)> {
    Ok(match after {
        After::Nothing => (Order::NONE, None),
        After::Stream | After::HeldStream => (rank.after_stream(), None),
        After::HeldEvent => {
            let event = rank.record()?;
            (Rank::after_event(&event), Some(event))
        }
    })
}

/// A client of the same daemon without memory, to see that it still answers.
///
/// # Errors
/// It does not.
pub fn ping(socket: PathBuf) -> Result<(), pegaflow::Error> {
    let client = Client::connect(options(socket))?;
    let request = client.nop()?;
    client.wait(request, crate::SOON).map(drop)
}
