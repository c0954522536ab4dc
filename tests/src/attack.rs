//! Clients that do what no engine should, as often as they can.

#![forbid(unsafe_code)]

use std::path::Path;
use std::time::{Duration, Instant};

use pegaflow::{Client, Options, RequestId};
use pegaflow_shm::control::ClientMessage;
use pegaflow_shm::desc::{Op, Submission, flags};

use crate::content::{Stream, hashes};
use crate::raw::{RawClient, RawSocket};
use crate::worker::{Worker, WorkerSpec, first_blocks};

/// Blocks of the longest query: about half a million tokens.
const LONGEST_QUERY: u64 = 32_768;

/// What is done to the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attack {
    /// Writes random words over the whole segment while its requests are under way.
    Scribble,
    /// Descriptors with right numbers and random fields.
    Descriptors,
    /// Random messages on the socket, and what is no message.
    Messages,
    /// Connects and goes away.
    Connects,
    /// Rings without a submission.
    Bells,
    /// Registers and takes it back.
    Registers,
    /// Asks for leases and keeps them for ever.
    Leases,
    /// Queries of the longest list, every block a hit, several at once.
    Queries,
    /// Saves of the longest list, every block new, several at once.
    Saves,
    /// Fills its completion ring and never takes one out.
    TakesNothing,
    /// Asks over the socket and never reads an answer.
    ReadsNothing,
    /// Talks to nobody: what a busy process alone costs.
    BurnsCpu,
}

impl Attack {
    /// Every one, the control first.
    pub const ALL: [Attack; 12] = [
        Attack::BurnsCpu,
        Attack::Scribble,
        Attack::Descriptors,
        Attack::Messages,
        Attack::Connects,
        Attack::Bells,
        Attack::Registers,
        Attack::Leases,
        Attack::Queries,
        Attack::Saves,
        Attack::TakesNothing,
        Attack::ReadsNothing,
    ];

    /// Label in tables and arguments.
    pub fn label(self) -> &'static str {
        match self {
            Attack::Scribble => "scribble",
            Attack::Descriptors => "random-descriptors",
            Attack::Messages => "random-messages",
            Attack::Connects => "connects",
            Attack::Bells => "bells",
            Attack::Registers => "registers",
            Attack::Leases => "leases",
            Attack::Queries => "longest-queries",
            Attack::Saves => "longest-saves",
            Attack::TakesNothing => "takes-nothing",
            Attack::ReadsNothing => "reads-nothing",
            Attack::BurnsCpu => "burns-cpu",
        }
    }

    /// The attack of this label.
    pub fn from_label(label: &str) -> Option<Attack> {
        Attack::ALL
            .into_iter()
            .find(|attack| attack.label() == label)
    }

    /// Attacks for so long, once it is ready to; returns how often. A daemon that closes the
    /// session is connected to again.
    ///
    /// # Errors
    /// The library refuses what the attack needs at its start.
    pub fn run(self, socket: &Path, time: Duration) -> Result<u64, pegaflow::Error> {
        let until = Instant::now() + time;
        let mut random = Stream::new(&[0x6174_7461, self as u64]);
        let library = |round: &mut dyn FnMut(&Worker) -> Result<(), pegaflow::Error>| {
            let worker = attacker(self, socket)?;
            let until = Instant::now() + time;
            repeat(until, || round(&worker).unwrap_or_else(|_| pause()))
        };
        match self {
            Attack::BurnsCpu => repeat(until, || {
                random.next();
            }),
            Attack::Connects => repeat(until, || drop(RawSocket::connect(socket))),
            Attack::Messages => repeat(until, || messages(socket, &mut random)),
            Attack::Scribble => repeat(until, || scribble(socket, &mut random)),
            Attack::Descriptors => repeat(until, || descriptors(socket, &mut random)),
            Attack::Bells => with_session(socket, until, |client| client.ring()),
            Attack::ReadsNothing => with_session(socket, until, |client| {
                let removal = ClientMessage::RemoveRegion { seq: 1, region: 9 };
                client.socket.send(&removal, &[]);
            }),
            Attack::TakesNothing => with_session(socket, until, takes_nothing),
            Attack::Registers => library(&mut |worker| {
                let spec = worker.spec.scheduler();
                let id = worker.client.register(&spec.registration(&[]))?;
                worker.client.unregister(id)
            }),
            Attack::Leases => {
                let mut key = 1;
                library(&mut |worker| {
                    key += 1;
                    let names = hashes(1, 16);
                    submit(worker, |client| {
                        client.query(worker.registration, 0, key, &names, 600_000)
                    })
                })
            }
            Attack::Queries => {
                let mut key = 1;
                let mut names = Vec::new();
                library(&mut |worker| {
                    if names.is_empty() {
                        let longest = worker.client.limits().query_hashes;
                        names = hashes(1, longest.min(LONGEST_QUERY as usize));
                    }
                    key += 1;
                    // One key for all: the daemon replaces the lease each time.
                    names.swap(0, key as usize % 8);
                    submit(worker, |client| {
                        client.query(worker.registration, 0, 7, &names, 0)
                    })
                })
            }
            Attack::Saves => {
                let mut first = 1_000_000;
                library(&mut |worker| {
                    let count = worker.spec.blocks as usize;
                    first += count as u64;
                    let names = hashes(first, count);
                    let blocks = first_blocks(count);
                    submit(worker, |client| {
                        client.save(worker.registration, 0, &names, &blocks)
                    })
                })
            }
        }
    }
}

fn repeat(until: Instant, mut round: impl FnMut()) -> Result<u64, pegaflow::Error> {
    let mut rounds = 0;
    while Instant::now() < until {
        round();
        rounds += 1;
    }
    Ok(rounds)
}

fn pause() {
    std::thread::sleep(Duration::from_millis(1));
}

fn attacker(attack: Attack, socket: &Path) -> Result<Worker, pegaflow::Error> {
    let options = Options {
        socket: Some(socket.to_owned()),
        client_name: attack.label().into(),
        autostart: Some(false),
        ..Options::default()
    };
    let spec = WorkerSpec {
        half_bytes: 256,
        layers: 1,
        blocks: 4096,
        ..WorkerSpec::default()
            .instance(attack.label())
            .salt("attacker")
    };
    let worker = Worker::ready(options, spec);
    if matches!(attack, Attack::Queries | Attack::Leases) {
        // Whatever the bytes are: nobody loads them.
        let at_once = worker.spec.blocks as usize;
        let blocks = first_blocks(at_once);
        for first in (1..=LONGEST_QUERY).step_by(at_once) {
            let names = hashes(first, at_once);
            let saved = worker.client.save(worker.registration, 0, &names, &blocks);
            worker.finish(saved);
        }
    }
    Ok(worker)
}

/// Submits as many as there is room for, and takes what is done.
fn submit(
    worker: &Worker,
    request: impl FnOnce(&Client) -> Result<RequestId, pegaflow::Error>,
) -> Result<(), pegaflow::Error> {
    let mut done: [pegaflow::Completion; 8] = Default::default();
    while worker.client.poll(&mut done) > 0 {}
    request(&worker.client).map(drop)
}

/// One session after the other.
fn with_session(
    socket: &Path,
    until: Instant,
    mut round: impl FnMut(&mut RawClient),
) -> Result<u64, pegaflow::Error> {
    let mut rounds = 0;
    while Instant::now() < until {
        let Some(mut client) = RawClient::try_open(socket) else {
            pause();
            continue;
        };
        while Instant::now() < until && !client.socket.is_closed() {
            for _ in 0..64 {
                round(&mut client);
                rounds += 1;
            }
        }
    }
    Ok(rounds)
}

fn nop(request_id: u64) -> Submission {
    let nop = Submission::from_body([Op::Nop as u64, 0, 0, 0, 0, 0, 0]);
    Submission { request_id, ..nop }
}

fn takes_nothing(client: &mut RawClient) {
    client.push(nop(client.pushed() + 1));
    client.ring();
}

fn messages(socket: &Path, random: &mut Stream) {
    let Some(client) = RawClient::try_open(socket) else {
        return pause();
    };
    for _ in 0..random.below(20) {
        let (seq, number) = (random.next(), random.below(3) as u32);
        match random.below(4) {
            0 => {
                let bytes: Vec<u8> = (0..random.below(3000))
                    .map(|_| random.next() as u8)
                    .collect();
                client.socket.send_bytes(&bytes);
            }
            1 => client.socket.send(
                &ClientMessage::RemoveRegion {
                    seq,
                    region: number,
                },
                &[],
            ),
            2 => client.socket.send(
                &ClientMessage::AddRegion {
                    seq,
                    region: number,
                    bytes: seq,
                },
                &[],
            ),
            _ => client.socket.send(
                &ClientMessage::Unregister {
                    seq,
                    registration: number,
                },
                &[],
            ),
        }
    }
}

fn scribble(socket: &Path, random: &mut Stream) {
    let Some(mut client) = RawClient::try_open(socket) else {
        return pause();
    };
    for request_id in 1..32 {
        client.push(nop(request_id));
    }
    client.ring();
    while !client.socket.is_closed() {
        for word in 0..client.c2d.len() / 8 {
            client.write_word(word * 8, random.next());
        }
        client.ring();
    }
}

fn descriptors(socket: &Path, random: &mut Stream) {
    let Some(mut client) = RawClient::try_open(socket) else {
        return pause();
    };
    for request_id in 1..=random.below(60) + 1 {
        let mut submission = Submission::from_body(std::array::from_fn(|_| random.next()));
        submission.op = random.below(9) as u8;
        if random.below(4) > 0 {
            submission.flags &= flags::KNOWN;
            submission.request_id = request_id;
            submission.payload_offset = random.below(5) as u32 * (16 << 10);
            submission.payload_bytes = random.below(17 << 10) as u32;
            submission.count = random.below(500) as u32;
            submission.total = submission.count + random.below(2) as u32;
        }
        client.push(submission);
    }
    client.ring();
}
