//! Streams: a thread that does what was submitted, in order.

#![forbid(unsafe_code)]

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use crate::code::{Code, Outcome};
use crate::context::Context;
use crate::control::Count;
use crate::driver::driver;
use crate::event::{Event, LOOK};
use crate::kernel::Launch;
use crate::mapping::{Place, copy};

/// What a stream does.
pub enum Work {
    /// A copy.
    Copy {
        /// Where to.
        to: Vec<Place>,
        /// Where from; as many bytes.
        from: Vec<Place>,
        /// Whether it leaves the device.
        way: Way,
    },
    /// Copies what was read of pageable memory into the device, late.
    Land {
        /// Where to.
        to: Vec<Place>,
        /// As many bytes.
        staged: Vec<u8>,
        /// How late.
        late: Duration,
    },
    /// Fills memory with a pattern.
    Fill {
        /// Where.
        to: Vec<Place>,
        /// With what.
        pattern: Vec<u8>,
    },
    /// Runs a kernel.
    Kernel(Launch),
    /// Completes a record of an event.
    Record(Arc<Event>, u64),
    /// Waits for a record of an event.
    Wait(Arc<Event>, u64),
    /// Waits until a word of host memory is at least a value, in the order that wraps around.
    WaitWord(Place, u32),
    /// Calls the host.
    Call(Box<dyn FnOnce() + Send>),
}

/// Direction of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Device to host.
    Out,
    /// Host to device.
    In,
    /// Neither.
    Inside,
}

struct Job {
    work: Work,
    after: Vec<Ticket>,
}

/// How far a stream has come.
#[derive(Default)]
struct Progress {
    done: Mutex<u64>,
    moved: Condvar,
}

/// A job of a stream, which can be waited for.
#[derive(Clone)]
pub struct Ticket {
    progress: Arc<Progress>,
    number: u64,
}

impl Ticket {
    /// Waits until it and everything before it is done.
    pub fn wait(&self) {
        let done = self.progress.done.lock().expect("no panic while locked");
        let pending = |done: &mut u64| *done < self.number;
        let done = self.progress.moved.wait_while(done, pending);
        drop(done.expect("no panic while locked"));
    }

    /// True if it and everything before it is done.
    pub fn is_done(&self) -> bool {
        *self.progress.done.lock().expect("no panic while locked") >= self.number
    }
}

/// A stream of a context.
pub struct Stream {
    /// Its handle.
    pub id: u64,
    /// Its context.
    pub context: Arc<Context>,
    /// Waits for the default stream, and that for it.
    pub blocking: bool,
    queue: Mutex<(Sender<Job>, u64)>,
    progress: Arc<Progress>,
}

impl Stream {
    /// Starts the thread, which ends after the last job once the stream is dropped.
    pub fn start(id: u64, context: &Arc<Context>, blocking: bool) -> Arc<Stream> {
        let (sender, receiver) = channel();
        let progress = Arc::new(Progress::default());
        let stream = Arc::new(Stream {
            id,
            context: context.clone(),
            blocking,
            queue: Mutex::new((sender, 0)),
            progress: progress.clone(),
        });
        context.remember(&stream);
        let context = context.clone();
        let run = move || run(&receiver, &context, &progress);
        let thread = std::thread::Builder::new().name("emulated-stream".into());
        if let Err(error) = thread.spawn(run) {
            panic!("emulated libcuda: no thread for a stream: {error}");
        }
        stream
    }

    /// Submits; a fault of the work shows in the context.
    pub fn submit(&self, work: Work) -> Ticket {
        let after = self.waits_for();
        let mut queue = self.queue.lock().expect("no panic while locked");
        queue.1 += 1;
        // The thread lives as long as the sender.
        queue.0.send(Job { work, after }).expect("the thread runs");
        Ticket {
            progress: self.progress.clone(),
            number: queue.1,
        }
    }

    /// The default stream and the blocking ones wait for each other.
    fn waits_for(&self) -> Vec<Ticket> {
        if self.id == 0 {
            let others = self.context.streams();
            let blocking = others.iter().filter(|stream| stream.blocking);
            return blocking
                .filter(|stream| stream.id != 0)
                .map(|stream| stream.last())
                .collect();
        }
        let default = self.context.used_default_stream();
        let default = default.filter(|_| self.blocking);
        default.map(|stream| stream.last()).into_iter().collect()
    }

    /// The last job submitted.
    pub fn last(&self) -> Ticket {
        Ticket {
            progress: self.progress.clone(),
            number: self.queue.lock().expect("no panic while locked").1,
        }
    }
}

fn run(jobs: &Receiver<Job>, context: &Context, progress: &Progress) {
    for Job { work, after } in jobs {
        after.iter().for_each(Ticket::wait);
        // What a broken context still had to do is never done.
        let result = context.state().and_then(|()| work.execute(context));
        if let Err(code) = result {
            context.fail(code);
        }
        *progress.done.lock().expect("no panic while locked") += 1;
        progress.moved.notify_all();
    }
}

impl Work {
    fn execute(self, context: &Context) -> Outcome {
        let control = driver()?.control();
        match self {
            Work::Copy { to, from, way } => {
                if let Some(code) = control.fault(context.device) {
                    return Err(code);
                }
                copy(&to, &from);
                let bytes: usize = to.iter().map(Place::bytes).sum();
                account(context.device, way, bytes)
            }
            Work::Land { to, staged, late } => {
                if let Some(code) = control.fault(context.device) {
                    return Err(code);
                }
                std::thread::sleep(late);
                let address = staged.as_ptr().expose_provenance();
                let from = Place::in_host(address, staged.len(), &Arc::default());
                copy(&to, &[from]);
                account(context.device, Way::In, staged.len())
            }
            Work::Fill { to, pattern } => {
                to.iter().for_each(|place| place.fill(&pattern));
                Ok(())
            }
            Work::Kernel(launch) => {
                if let Some(code) = control.fault(context.device) {
                    return Err(code);
                }
                control.add(context.device, Count::Kernels, 1);
                launch.run()
            }
            Work::Record(event, record) => {
                event.complete(record);
                Ok(())
            }
            Work::Wait(event, record) => {
                while !event.has_reached(record) && context.state().is_ok() {
                    std::thread::sleep(LOOK);
                }
                Ok(())
            }
            Work::WaitWord(place, value) => {
                let reached =
                    |word: Option<u32>| word.is_some_and(|w| w.wrapping_sub(value) as i32 >= 0);
                while !reached(place.word()) && context.state().is_ok() {
                    std::thread::sleep(LOOK);
                }
                Ok(())
            }
            Work::Call(function) => {
                function();
                Ok(())
            }
        }
    }
}

/// Counts a copy and takes the time that the machine says.
fn account(device: usize, way: Way, bytes: usize) -> Result<(), Code> {
    let driver = driver()?;
    let (copies, moved) = match way {
        Way::Out => (Count::CopiesOut, Some(Count::BytesOut)),
        Way::In => (Count::CopiesIn, Some(Count::BytesIn)),
        Way::Inside => (Count::CopiesInside, None),
    };
    driver.control().add(device, copies, 1);
    if let Some(moved) = moved {
        driver.control().add(device, moved, bytes as u64);
        let us = (driver.machine().us_per_mib * bytes as u64) >> 20;
        if us > 0 {
            std::thread::sleep(Duration::from_micros(us));
        }
    }
    Ok(())
}
