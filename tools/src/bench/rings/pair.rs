//! The two processes: this program and a copy of it, on two CPUs, with a socket between them.

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pegaflow_shm::bell::{BellFd, BellListener};
use pegaflow_shm::seqpacket;
use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::{Deserialize, Serialize};

use super::case::{Case, Side};
use super::memory::{self, Alarm, Rings, Scratch};
use crate::error::ToolError;

/// Argument by which a program that calls [`peer_main`] knows that it is the second process.
pub const PEER_ARGUMENT: &str = "__ring-peer";

/// From the asking to the answering process.
#[derive(Debug, Serialize, Deserialize)]
enum Order {
    /// With the C2D segment, the scratch region and both eventfds.
    Open {
        cpu: Option<usize>,
        cpus: usize,
    },
    /// Answer so many round trips.
    Answer {
        case: Case,
        total: u64,
    },
    /// Receive so many messages.
    Drain {
        case: Case,
        total: u64,
    },
    Exit,
}

/// From the answering process.
#[derive(Debug, Serialize, Deserialize)]
enum Reply {
    /// With the D2C segment, the eventfd that rings this process and the pipe that it rings.
    Opened,
    /// It stands ready for the case.
    Ready,
    /// It is through; the sum of what it received.
    Done {
        sum: u64,
    },
    Failed {
        what: String,
    },
}

/// The asking process's hold on both.
pub struct Pair {
    child: Child,
    socket: OwnedFd,
    side: Side,
    /// CPUs of the asking and the answering process, if there are two.
    pub pinned: Option<(usize, usize)>,
}

/// Two different CPUs of this process's affinity, if it has two.
fn two_cpus() -> Option<(usize, usize)> {
    let set = sched_getaffinity(None).ok()?;
    let mut cpus = (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu));
    Some((cpus.next()?, cpus.next()?))
}

/// Keeps the calling thread on one CPU.
///
/// # Errors
/// The CPU is not among those that this process may use.
pub fn pin(cpu: usize) -> Result<(), ToolError> {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set).map_err(ToolError::errno(format!("pinning to CPU {cpu}")))
}

fn blocking_eventfd() -> Result<OwnedFd, ToolError> {
    eventfd(0, EventfdFlags::CLOEXEC).map_err(ToolError::errno("eventfd"))
}

fn duplicate(fd: &impl AsFd) -> Result<OwnedFd, ToolError> {
    fd.as_fd()
        .try_clone_to_owned()
        .map_err(ToolError::io("dup"))
}

impl Pair {
    /// Starts the second process (this executable with [`PEER_ARGUMENT`]) and connects the rings.
    /// Pins the calling thread and the second process to two CPUs if there are two.
    ///
    /// # Errors
    /// No process, no memory, or an answer that makes no sense.
    pub fn start() -> Result<Pair, ToolError> {
        let (socket, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(ToolError::errno("socketpair"))?;
        let program = std::env::current_exe().map_err(ToolError::io("this program's path"))?;
        let child = Command::new(program)
            .arg(PEER_ARGUMENT)
            .stdin(Stdio::from(theirs))
            .spawn()
            .map_err(ToolError::io("starting the second process"))?;
        let pinned = two_cpus();
        let cpus = if pinned.is_some() { 2 } else { 1 };
        let (c2d_fd, c2d) = memory::own_segment(true)?;
        let (scratch_fd, scratch) = memory::create_scratch()?;
        let eventfds = [blocking_eventfd()?, blocking_eventfd()?];
        let order = Order::Open {
            cpu: pinned.map(|(_, theirs)| theirs),
            cpus,
        };
        let fds = [
            c2d_fd.as_fd(),
            scratch_fd.as_fd(),
            eventfds[0].as_fd(),
            eventfds[1].as_fd(),
        ];
        seqpacket::send(socket.as_fd(), &order, &fds)?;
        let (reply, fds) = seqpacket::receive::<Reply>(socket.as_fd())?;
        let fds: Result<[OwnedFd; 3], _> = fds.try_into();
        let (Reply::Opened, Ok([d2c_fd, bell, pipe])) = (&reply, fds) else {
            return Err(unexpected(&reply));
        };
        let d2c = memory::peer_segment(d2c_fd.as_fd())?;
        let rings = Rings::new(&c2d, &d2c, BellFd::from_eventfd(bell))?;
        let alarm = Alarm::Pipe(BellListener::new(pipe));
        if let Some((ours, _)) = pinned {
            pin(ours)?;
        }
        let scratch = Scratch::new(&scratch)?;
        Ok(Pair {
            child,
            socket,
            side: Side {
                rings,
                alarm,
                scratch,
                eventfds,
                cpus,
            },
            pinned,
        })
    }

    fn order(&self, order: &Order) -> Result<(), ToolError> {
        Ok(seqpacket::send(self.socket.as_fd(), order, &[])?)
    }

    fn reply(&self) -> Result<Reply, ToolError> {
        match seqpacket::receive::<Reply>(self.socket.as_fd())?.0 {
            Reply::Failed { what } => Err(ToolError::Child {
                process: "the answering process".into(),
                what,
            }),
            reply => Ok(reply),
        }
    }

    /// Round trips in batches; the mean nanoseconds of a round trip in each batch.
    ///
    /// # Errors
    /// The other process failed or is gone.
    pub fn round_trips(
        &mut self,
        case: Case,
        batches: u64,
        per_batch: u64,
        gap: Option<Duration>,
    ) -> Result<Vec<f64>, ToolError> {
        self.side.reset();
        self.order(&Order::Answer {
            case,
            total: batches * per_batch,
        })?;
        let Reply::Ready = self.reply()? else {
            return Err(unexpected(&"Ready"));
        };
        let means = self.side.ask_batches(case, batches, per_batch, gap)?;
        self.reply()?;
        Ok(means)
    }

    /// Messages per second one way, in millions.
    ///
    /// # Errors
    /// The other process failed or is gone, or did not receive what was sent.
    pub fn one_way(&mut self, case: Case, total: u64) -> Result<f64, ToolError> {
        self.side.reset();
        self.order(&Order::Drain { case, total })?;
        let Reply::Ready = self.reply()? else {
            return Err(unexpected(&"Ready"));
        };
        let start = Instant::now();
        self.side.stream(case, total)?;
        let Reply::Done { sum } = self.reply()? else {
            return Err(unexpected(&"Done"));
        };
        let elapsed = start.elapsed();
        let expected = total * (total + 1) / 2;
        if sum != expected {
            let what = format!("received messages that add up to {sum}, sent were {expected}");
            return Err(ToolError::Child {
                process: "the answering process".into(),
                what,
            });
        }
        Ok(total as f64 / elapsed.as_secs_f64() / 1e6)
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        // If it does not hear this, it hears the end of the socket.
        let _ = self.order(&Order::Exit);
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some((ours, theirs)) = self.pinned {
            let mut set = CpuSet::new();
            set.set(ours);
            set.set(theirs);
            let _ = sched_setaffinity(None, &set);
        }
    }
}

fn unexpected(reply: &impl std::fmt::Debug) -> ToolError {
    let what = format!("said something else than expected here: {reply:?}");
    ToolError::Child {
        process: "the other process of the bench".into(),
        what,
    }
}

/// The second process: serves orders that come over standard input until it is told to exit.
///
/// # Errors
/// Whatever keeps it from serving.
pub fn peer_main() -> Result<(), ToolError> {
    crate::children::die_with_parent();
    let socket = duplicate(&rustix::stdio::stdin())?;
    let (order, fds) = seqpacket::receive::<Order>(socket.as_fd())?;
    let fds: Result<[OwnedFd; 4], _> = fds.try_into();
    let (Order::Open { cpu, cpus }, Ok([c2d_fd, scratch_fd, first, second])) = (&order, fds) else {
        return Err(unexpected(&order));
    };
    if let Some(cpu) = cpu {
        pin(*cpu)?;
    }
    let (d2c_fd, d2c) = memory::own_segment(false)?;
    let c2d = memory::peer_segment(c2d_fd.as_fd())?;
    let scratch = Scratch::new(&memory::open_scratch(scratch_fd.as_fd())?)?;
    let failed = |error| ToolError::Io {
        what: "doorbell".into(),
        source: std::io::Error::other(error),
    };
    let wake_us = BellFd::eventfd().map_err(failed)?;
    let (wake_them, pipe) = BellFd::pipe().map_err(failed)?;
    let fds = [d2c_fd.as_fd(), wake_us.as_fd(), pipe.as_fd()];
    seqpacket::send(socket.as_fd(), &Reply::Opened, &fds)?;
    drop(pipe);
    let alarm = Alarm::epoll(wake_us.into_fd())?;
    let rings = Rings::new(&d2c, &c2d, wake_them)?;
    let mut side = Side {
        rings,
        alarm,
        scratch,
        eventfds: [first, second],
        cpus: *cpus,
    };
    loop {
        let (order, _) = seqpacket::receive::<Order>(socket.as_fd())?;
        if matches!(order, Order::Exit) {
            return Ok(());
        }
        seqpacket::send(socket.as_fd(), &Reply::Ready, &[])?;
        let served = match order {
            Order::Answer { case, total } => side.answer_all(case, total).map(|()| 0),
            Order::Drain { case, total } => side.drain(case, total),
            Order::Open { .. } | Order::Exit => Ok(0),
        };
        let reply = match served {
            Ok(sum) => Reply::Done { sum },
            Err(error) => Reply::Failed {
                what: error.to_string(),
            },
        };
        seqpacket::send(socket.as_fd(), &reply, &[])?;
    }
}
