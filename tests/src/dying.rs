//! Processes that connect, work and die, each in its own way.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::signal::{Signal, raise};
use pegaflow::{Client, Options};
use pegaflow_shm::control::ClientMessage;
use pegaflow_shm::segment::SegmentShape;
use serde::{Deserialize, Serialize};

use crate::content::{Stream, hashes};
use crate::raw::{RawClient, RawSocket, hello, segment};
use crate::worker::{Worker, WorkerSpec, first_blocks};

/// First argument of a program that is to die.
pub const DIE_ARGUMENT: &str = "__die";
/// How long a fork child of a dead process lives on.
const CHILD_LIFE_S: u32 = 2;

/// Where a process dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Death {
    /// Connected, nothing said.
    BeforeHello,
    /// Hello is sent, Welcome not read.
    DuringHello,
    /// Its region is shared, nothing is registered.
    AfterAddRegion,
    /// Saves are under way.
    MidSave,
    /// Loads are under way.
    MidLoad,
    /// Leases are held.
    HoldingLeases,
    /// One rank of two has saved.
    HalfSaved,
    /// The process dies, its fork child holds every descriptor and mapping for a while.
    ForkChildLivesOn,
    /// It ends by itself, without a word to the library.
    Exit,
    /// It closes its socket, goes on writing to its ring, and ends.
    DropsSocket,
    /// As an engine should.
    Leaves,
}

impl Death {
    /// Every one.
    pub const ALL: [Death; 11] = [
        Death::BeforeHello,
        Death::DuringHello,
        Death::AfterAddRegion,
        Death::MidSave,
        Death::MidLoad,
        Death::HoldingLeases,
        Death::HalfSaved,
        Death::ForkChildLivesOn,
        Death::Exit,
        Death::DropsSocket,
        Death::Leaves,
    ];
}

/// What such a process is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Fate {
    /// How it dies.
    pub death: Death,
    /// The daemon's socket.
    pub socket: PathBuf,
    /// What it registers.
    pub spec: WorkerSpec,
    /// Of its random choices.
    pub seed: u64,
}

/// The `main` of such a process; returns only where it leaves as it should.
///
/// # Errors
/// The argument is no [`Fate`], or it cannot do its work before it dies.
pub fn main(fate: &str) -> anyhow::Result<()> {
    let fate: Fate = serde_json::from_str(fate)?;
    let mut random = Stream::new(&[fate.seed]);
    match fate.death {
        Death::BeforeHello | Death::DuringHello => {
            let socket = RawSocket::connect(&fate.socket);
            if fate.death == Death::DuringHello {
                let shape = SegmentShape {
                    slots: 64,
                    arena_chunks: 4,
                };
                let (fd, _mapping) = segment(shape);
                let greeting = ClientMessage::Hello(hello(shape.total_bytes() as u64));
                socket.send(&greeting, &[fd.as_fd()]);
            }
            die(&mut random)
        }
        Death::AfterAddRegion => {
            let client = Client::connect(options(&fate))?;
            let _memory = client.alloc_host(1 << 20)?;
            die(&mut random)
        }
        Death::DropsSocket => {
            let client = RawClient::open(&fate.socket);
            client.drop_socket(|client| {
                for offset in (0..client.c2d.len() / 8).map(|word| word * 8) {
                    client.write_word(offset, random.next());
                }
            });
            Ok(())
        }
        Death::HalfSaved => {
            let first = Worker::open(options(&fate), fate.spec.rank(0, 2))?;
            let second = Worker::open(options(&fate), fate.spec.rank(1, 2))?;
            first.wait_ready();
            second.wait_ready();
            first.save(&hashes(fate.seed * 1000, 16));
            die(&mut random)
        }
        _ => work(&fate, &mut random),
    }
}

fn options(fate: &Fate) -> Options {
    Options {
        socket: Some(fate.socket.clone()),
        autostart: Some(false),
        ..Options::default()
    }
}

fn work(fate: &Fate, random: &mut Stream) -> anyhow::Result<()> {
    let worker = Worker::ready(options(fate), fate.spec.clone());
    let (client, registration) = (&worker.client, worker.registration);
    let names = hashes(1, 16);
    let blocks = first_blocks(16);
    match fate.death {
        Death::MidSave => {
            for first in 0..4 {
                let fresh = hashes(fate.seed * 1000 + first * 16, 16);
                client.save(registration, 0, &fresh, &blocks)?;
            }
        }
        Death::MidLoad => {
            worker.save(&names);
            for key in 1..4 {
                let lease = worker.query(key, &names).lease;
                client.load(registration, 0, lease, 0, &blocks)?;
            }
        }
        Death::HoldingLeases => {
            worker.save(&names);
            for key in 1..10 {
                client.query(registration, 0, key, &names, 600_000)?;
            }
        }
        _ => {
            worker.save(&names);
            worker.fetch(1, &names);
        }
    }
    match fate.death {
        Death::Leaves => Ok(()),
        Death::Exit => std::process::exit(0),
        Death::ForkChildLivesOn => {
            leave_child();
            die(random)
        }
        _ => die(random),
    }
}

/// A moment later, without a word.
fn die(random: &mut Stream) -> ! {
    std::thread::sleep(Duration::from_micros(random.below(3000)));
    let raised = raise(Signal::SIGKILL);
    unreachable!("SIGKILL cannot be caught: {raised:?}")
}

/// Forks a child that holds everything this process has, does nothing, and dies of an alarm.
fn leave_child() {
    // SAFETY: the child of this process of several threads calls `alarm` and `pause` only, which
    // are async-signal-safe, allocates nothing and takes no lock.
    match unsafe { nix::unistd::fork() } {
        Ok(nix::unistd::ForkResult::Child) => {
            nix::unistd::alarm::set(CHILD_LIFE_S);
            loop {
                nix::unistd::pause();
            }
        }
        Ok(nix::unistd::ForkResult::Parent { .. }) => {}
        Err(error) => panic!("fork: {error}"),
    }
}
