//! The engine processes as the conductor sees them.

#![forbid(unsafe_code)]

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::engine::ENGINE_ARGUMENT;
use super::message::{EngineStart, Event, Role, Tally};

/// Longest time of an engine's own end: a call may take its bound.
const END_BOUND: Duration = Duration::from_secs(40);

/// One engine process, over its lives.
struct Engine {
    start: EngineStart,
    /// How often it was started.
    life: u64,
    child: Option<(Child, ChildStdin)>,
    /// Figures of this life so far.
    tally: Tally,
    back: Option<(String, u64)>,
    swept: Option<(String, u64)>,
}

/// What an engine said, in which life; `None` is its end.
type Said = (usize, u64, Option<Event>);

/// All engine processes.
pub struct Fleet {
    program: std::path::PathBuf,
    engines: Vec<Engine>,
    sender: Sender<Said>,
    said: Receiver<Said>,
    /// Figures of earlier lives.
    past: Tally,
}

impl Fleet {
    /// Engines that are not started yet.
    pub fn new(program: &Path, starts: Vec<EngineStart>) -> Fleet {
        let (sender, said) = channel();
        let engines = starts
            .into_iter()
            .map(|start| Engine {
                start,
                life: 0,
                child: None,
                tally: Tally::default(),
                back: None,
                swept: None,
            })
            .collect();
        Fleet {
            program: program.to_owned(),
            engines,
            sender,
            said,
            past: Tally::default(),
        }
    }

    /// Processes.
    pub fn len(&self) -> usize {
        self.engines.len()
    }

    /// True of a fleet without processes.
    pub fn is_empty(&self) -> bool {
        self.engines.is_empty()
    }

    /// Name of an engine in messages.
    pub fn name(&self, engine: usize) -> String {
        let start = &self.engines[engine].start;
        format!("{} {:?}", start.instance.name, start.role)
    }

    /// What an engine process is.
    pub fn role(&self, engine: usize) -> Role {
        self.engines[engine].start.role
    }

    /// Starts every engine that does not run; returns which.
    ///
    /// # Errors
    /// A process cannot be started.
    pub fn start_missing(&mut self) -> anyhow::Result<Vec<usize>> {
        let mut started = Vec::new();
        for number in 0..self.engines.len() {
            if self.engines[number].child.is_none() {
                self.start(number)
                    .with_context(|| format!("starting {}", self.name(number)))?;
                started.push(number);
            }
        }
        Ok(started)
    }

    fn start(&mut self, number: usize) -> anyhow::Result<()> {
        let engine = &mut self.engines[number];
        engine.life += 1;
        engine.start.seed = engine.start.seed.wrapping_add(1);
        (engine.back, engine.swept) = (None, None);
        self.past.add(&std::mem::take(&mut engine.tally));
        let mut command = Command::new(&self.program);
        command.arg(ENGINE_ARGUMENT);
        // Its sessions come and go all the time, which is no news.
        command.env("PEGAFLOW_CLIENT_LOG", "off");
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn()?;
        let mut input = child.stdin.take().context("no input")?;
        let output = child.stdout.take().context("no output")?;
        let mut line = serde_json::to_vec(&engine.start)?;
        line.push(b'\n');
        input.write_all(&line)?;
        let (sender, life) = (self.sender.clone(), engine.life);
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines() {
                let Ok(line) = line else { break };
                // A process that was killed may leave half a line.
                let Ok(event) = serde_json::from_str(&line) else {
                    continue;
                };
                if sender.send((number, life, Some(event))).is_err() {
                    return;
                }
            }
            // Nobody listens any more: the scene is over.
            let _ = sender.send((number, life, None));
        });
        engine.child = Some((child, input));
        Ok(())
    }

    /// Kills an engine process; one that does not run stays so.
    ///
    /// # Errors
    /// It cannot be killed.
    pub fn kill(&mut self, number: usize) -> anyhow::Result<bool> {
        let engine = &mut self.engines[number];
        let Some((mut child, _input)) = engine.child.take() else {
            return Ok(false);
        };
        child.kill()?;
        child.wait()?;
        // What it still says is of a life that is over.
        engine.life += 1;
        Ok(true)
    }

    /// Listens for so long.
    ///
    /// # Errors
    /// An engine told of a fault, or ended by itself.
    pub fn listen(&mut self, limit: Duration) -> anyhow::Result<()> {
        let until = Instant::now() + limit;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.said.recv_timeout(left) {
                Ok(said) => self.take(said)?,
                Err(RecvTimeoutError::Timeout) => return Ok(()),
                Err(RecvTimeoutError::Disconnected) => bail!("the fleet is gone"),
            }
        }
    }

    fn take(&mut self, (number, life, event): Said) -> anyhow::Result<()> {
        if let Some(Event::Fault { what }) = &event {
            bail!("{}: {what}", self.name(number));
        }
        if self.engines[number].life != life {
            return Ok(());
        }
        let engine = &mut self.engines[number];
        match event {
            Some(Event::Back { boot, at_ns }) => engine.back = Some((boot, at_ns)),
            Some(Event::Swept { boot, blocks }) => engine.swept = Some((boot, blocks)),
            Some(Event::Tally(tally)) => engine.tally = tally,
            Some(Event::Fault { .. }) => {}
            None => {
                let ended = engine.child.take().map(|(mut child, _)| child.wait());
                bail!("{} ended by itself: {ended:?}", self.name(number));
            }
        }
        Ok(())
    }

    /// When an engine came back to service with the daemon of this boot id.
    pub fn back(&self, number: usize, boot: &str) -> Option<u64> {
        let (of, at_ns) = self.engines[number].back.as_ref()?;
        (of == boot).then_some(*at_ns)
    }

    /// Blocks of the ledger that an engine has gone through with the daemon of this boot id.
    pub fn swept(&self, number: usize, boot: &str) -> Option<u64> {
        let (of, blocks) = self.engines[number].swept.as_ref()?;
        (of == boot).then_some(*blocks)
    }

    /// Lets all engines end by themselves, and returns their figures.
    ///
    /// # Errors
    /// One of them does not end in time, or with a fault.
    pub fn finish(mut self) -> anyhow::Result<Tally> {
        let mut children = Vec::new();
        for (number, engine) in self.engines.iter_mut().enumerate() {
            if let Some((child, input)) = engine.child.take() {
                drop(input);
                children.push((number, child));
            }
        }
        let deadline = Instant::now() + END_BOUND;
        let mut left = children.len();
        while left > 0 {
            let wait = deadline.saturating_duration_since(Instant::now());
            match self.said.recv_timeout(wait) {
                Ok((number, life, None)) if self.engines[number].life == life => left -= 1,
                Ok((_, _, None)) => {}
                Ok(said) => self.take(said)?,
                Err(_) => bail!("{left} engines did not end within {END_BOUND:?}"),
            }
        }
        for (number, mut child) in children {
            let status = child.wait()?;
            if !status.success() {
                bail!("{} ended with {status}", self.name(number));
            }
        }
        let mut total = std::mem::take(&mut self.past);
        for engine in &self.engines {
            total.add(&engine.tally);
        }
        Ok(total)
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for engine in &mut self.engines {
            if let Some((mut child, _)) = engine.child.take() {
                child.kill().ok();
                child.wait().ok();
            }
        }
    }
}
