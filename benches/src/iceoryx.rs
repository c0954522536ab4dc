//! iceoryx2 publish-subscribe between two processes, polled, with samples of 64 bytes.

#![forbid(unsafe_code)]

use std::hint::spin_loop;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use iceoryx2::port::publisher::Publisher;
use iceoryx2::port::subscriber::Subscriber;
use iceoryx2::prelude::*;
use pegaflow_tools::bench::rings::pin;

use crate::{BATCHES, Measured, Message, Outcome, PER_BATCH, STREAM_MESSAGES, round_trips};

/// Argument by which the bench program knows that it is the second process.
pub const PEER_ARGUMENT: &str = "__iceoryx-peer";
const BUFFER: usize = 1024;
const PATIENCE: Duration = Duration::from_secs(20);

type Out = Publisher<ipc::Service, Message, ()>;
type In = Subscriber<ipc::Service, Message, ()>;

struct Ports {
    _node: Node<ipc::Service>,
    out: Out,
    incoming: In,
}

/// Both services of a run, seen from one side. Nothing is lost: a full buffer holds the publisher
/// up.
fn ports(run: u32, is_peer: bool) -> Outcome<Ports> {
    set_log_level(LogLevel::Error);
    let node = NodeBuilder::new().create::<ipc::Service>()?;
    let service = |direction: &str| -> Outcome<_> {
        let name = format!("pegaflow-bench/{run}/{direction}");
        Ok(node
            .service_builder(&name.as_str().try_into()?)
            .publish_subscribe::<Message>()
            .enable_safe_overflow(false)
            .subscriber_max_buffer_size(BUFFER)
            .history_size(0)
            .open_or_create()?)
    };
    let (there, back) = (service("there")?, service("back")?);
    let (send, receive) = if is_peer {
        (back, there)
    } else {
        (there, back)
    };
    let out = send
        .publisher_builder()
        .backpressure_strategy(BackpressureStrategy::RetryUntilDelivered)
        .create()?;
    let incoming = receive.subscriber_builder().create()?;
    Ok(Ports {
        _node: node,
        out,
        incoming,
    })
}

fn receive(port: &In) -> Outcome<Message> {
    let mut spins = 0_u32;
    let mut started = None;
    loop {
        if let Some(sample) = port.receive()? {
            return Ok(*sample.payload());
        }
        spin_loop();
        spins = spins.wrapping_add(1);
        if spins.is_multiple_of(1 << 14)
            && started.get_or_insert_with(Instant::now).elapsed() > PATIENCE
        {
            return Err("the other iceoryx2 process says nothing".into());
        }
    }
}

/// Ends the second process when the bench fails.
struct Peer(Child);

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Measures with this thread on its present CPU and the second process on `peer_cpu`.
///
/// # Errors
/// iceoryx2 refuses something, or the second process is gone.
pub fn measure(peer_cpu: Option<usize>) -> Outcome<Measured> {
    let run = std::process::id();
    let ports = ports(run, false)?;
    let cpu = peer_cpu.map_or_else(|| "-".to_owned(), |cpu| cpu.to_string());
    let mut peer = Peer(
        Command::new(std::env::current_exe()?)
            .args([PEER_ARGUMENT, &run.to_string(), &cpu])
            .stdin(Stdio::null())
            .spawn()?,
    );
    // The first message is its greeting: before it, nobody would hear ours.
    receive(&ports.incoming)?;
    let rtt_ns = round_trips(|number| {
        ports.out.send_copy([number; 8])?;
        let answer = receive(&ports.incoming)?;
        if answer[0] == number {
            Ok(())
        } else {
            Err("iceoryx2 answered another message".into())
        }
    })?;
    let start = Instant::now();
    for number in 1..=STREAM_MESSAGES {
        ports.out.send_copy([number; 8])?;
    }
    let sum = receive(&ports.incoming)?[0];
    let seconds = start.elapsed().as_secs_f64();
    if sum != STREAM_MESSAGES * (STREAM_MESSAGES + 1) / 2 {
        return Err("iceoryx2 lost messages".into());
    }
    peer.0.wait()?;
    Ok(Measured {
        rtt_ns,
        oneway_mps: STREAM_MESSAGES as f64 / seconds / 1e6,
    })
}

/// The second process; its arguments are the run and its CPU.
///
/// # Errors
/// iceoryx2 refuses something, or the first process is gone.
pub fn peer_main(arguments: &[String]) -> Outcome<()> {
    pegaflow_tools::children::die_with_parent();
    let [run, cpu] = arguments else {
        return Err("expected a run and a CPU".into());
    };
    if let Ok(cpu) = cpu.parse() {
        pin(cpu)?;
    }
    let ports = ports(run.parse()?, true)?;
    ports.out.send_copy([0; 8])?;
    for _ in 0..BATCHES * PER_BATCH {
        let message = receive(&ports.incoming)?;
        ports.out.send_copy(message)?;
    }
    let mut sum = 0_u64;
    for _ in 0..STREAM_MESSAGES {
        sum = sum.wrapping_add(receive(&ports.incoming)?[0]);
    }
    ports.out.send_copy([sum; 8])?;
    // The answer dies with its publisher: give the other side time to take it.
    std::thread::sleep(Duration::from_millis(200));
    Ok(())
}
