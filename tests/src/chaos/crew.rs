//! The line from a scheduler's thread to the ranks: jobs out, what became of them back.

#![forbid(unsafe_code)]

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::message::fault;
use super::requests::REQUEST_BOUND;

/// How long a rank may take to say which one it is.
const GREETING: Duration = Duration::from_secs(2);

/// One request's share of work, the same for each rank.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// The lease; 0 without hits.
    pub lease: u64,
    /// Numbers of the blocks that the lease holds.
    pub load: Vec<u64>,
    /// Numbers of the blocks to compute and save.
    pub save: Vec<u64>,
    /// Cancels what it has just submitted.
    pub cancel: bool,
}

/// What became of a job in one rank.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobDone {
    /// All blocks were loaded and right.
    pub loaded: bool,
    /// Boot id of the daemon that has newly stored every block to be saved.
    pub stored: Option<String>,
}

/// Where thread `thread` of an instance's scheduler listens.
pub fn line_path(folder: &Path, instance: &str, thread: usize) -> PathBuf {
    folder.join(format!("{instance}-{thread}.line"))
}

/// One end of a line.
#[derive(Debug)]
pub struct Line {
    stream: BufReader<UnixStream>,
}

impl Line {
    /// Over a stream whose reads take no longer than `limit`.
    ///
    /// # Errors
    /// The stream takes no limit.
    pub fn new(stream: UnixStream, limit: Duration) -> io::Result<Line> {
        stream.set_read_timeout(Some(limit))?;
        let stream = BufReader::new(stream);
        Ok(Line { stream })
    }

    /// Sends a message.
    ///
    /// # Errors
    /// The other end is gone.
    pub fn send(&mut self, message: &impl Serialize) -> io::Result<()> {
        let mut bytes = serde_json::to_vec(message)?;
        bytes.push(b'\n');
        self.stream.get_mut().write_all(&bytes)
    }

    /// The next message.
    ///
    /// # Errors
    /// The other end is gone, or says nothing within the limit.
    pub fn receive<T: DeserializeOwned>(&mut self) -> io::Result<T> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(serde_json::from_str(&line)?)
    }

    /// True when the next message, or the end, can be read at once; waits so long for it.
    pub fn is_readable(&self, limit: Duration) -> bool {
        if !self.stream.buffer().is_empty() {
            return true;
        }
        let stream = self.stream.get_ref();
        let mut fds = [rustix::event::PollFd::new(
            stream,
            rustix::event::PollFlags::IN,
        )];
        let limit = rustix::event::Timespec {
            tv_sec: limit.as_secs() as i64,
            tv_nsec: i64::from(limit.subsec_nanos()),
        };
        rustix::event::poll(&mut fds, Some(&limit)).is_ok_and(|ready| ready > 0)
    }
}

/// A scheduler thread's lines to all ranks.
#[derive(Debug)]
pub struct Crew {
    listener: UnixListener,
    ranks: Vec<Option<Line>>,
}

impl Crew {
    /// Listens; the file of a killed predecessor goes.
    ///
    /// # Errors
    /// The path cannot be listened on.
    pub fn listen(path: &Path, ranks: usize) -> io::Result<Crew> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        let ranks = (0..ranks).map(|_| None).collect();
        Ok(Crew { listener, ranks })
    }

    /// Takes in the ranks that have come; true when all are there.
    pub fn is_complete(&mut self) -> bool {
        while let Ok((stream, _)) = self.listener.accept() {
            // A rank that is killed before it says which one it is comes again.
            let _ = self.take_in(stream);
        }
        self.ranks.iter().all(Option::is_some)
    }

    fn take_in(&mut self, stream: UnixStream) -> io::Result<()> {
        stream.set_nonblocking(false)?;
        let mut line = Line::new(stream, GREETING)?;
        let rank: usize = line.receive()?;
        let stream = line.stream.get_ref();
        stream.set_read_timeout(Some(REQUEST_BOUND * 3))?;
        self.ranks[rank] = Some(line);
        Ok(())
    }

    /// Has every rank do a job; `None` if one of them died over it.
    pub fn run(&mut self, job: &Job) -> Option<Vec<JobDone>> {
        for place in &mut self.ranks {
            place.take_if(|line| line.send(job).is_err());
        }
        let mut done = Vec::new();
        for place in &mut self.ranks {
            let Some(line) = place else { continue };
            match line.receive::<JobDone>() {
                Ok(answer) => done.push(answer),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    fault("hang: a rank does not answer its scheduler".into())
                }
                Err(_) => *place = None,
            }
        }
        (done.len() == self.ranks.len()).then_some(done)
    }
}
