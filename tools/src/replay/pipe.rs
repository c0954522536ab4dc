//! Processes of this program that talk by JSON lines over standard input and output.

#![forbid(unsafe_code)]

use std::io::{BufRead, BufReader, BufWriter, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::children;
use crate::error::ToolError;

/// How long a child may take to end after its input has ended.
const PATIENCE: Duration = Duration::from_secs(5);

/// A child process of this program.
pub struct ChildProcess {
    name: String,
    child: Child,
}

/// Lines to a child.
pub struct LineWriter<W: Write> {
    name: String,
    writer: BufWriter<W>,
}

/// Lines from a child.
pub struct LineReader<R: std::io::Read> {
    name: String,
    reader: BufReader<R>,
    line: String,
}

/// A started child, lines to it, lines from it.
pub type Started = (
    ChildProcess,
    LineWriter<ChildStdin>,
    LineReader<ChildStdout>,
);

/// Starts this program again with one hidden argument; `name` is for errors.
///
/// # Errors
/// The process cannot be started.
pub fn start(name: &str, argument: &str) -> Result<Started, ToolError> {
    let program = std::env::current_exe().map_err(ToolError::io("this program's path"))?;
    let mut child = Command::new(program)
        .arg(argument)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(ToolError::io(format!("starting {name}")))?;
    children::remember_process(child.id());
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let process = ChildProcess {
        name: name.to_owned(),
        child,
    };
    let (Some(stdin), Some(stdout)) = (stdin, stdout) else {
        return Err(process.failure("has no pipes"));
    };
    Ok((
        process,
        LineWriter::new(name, stdin),
        LineReader::new(name, stdout),
    ))
}

impl ChildProcess {
    fn failure(&self, what: &str) -> ToolError {
        ToolError::Child {
            process: self.name.clone(),
            what: what.to_owned(),
        }
    }

    /// Waits for the end of a child whose input has ended.
    ///
    /// # Errors
    /// It failed, or had to be killed.
    pub fn finish(mut self) -> Result<(), ToolError> {
        let asked = Instant::now();
        loop {
            match self
                .child
                .try_wait()
                .map_err(ToolError::io("waiting for a process"))?
            {
                Some(status) if status.success() => return Ok(()),
                Some(status) => return Err(self.failure(&format!("ended with {status}"))),
                None if asked.elapsed() > PATIENCE => return Err(self.failure("does not end")),
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }
}

impl Drop for ChildProcess {
    fn drop(&mut self) {
        let pid = self.child.id();
        if matches!(self.child.try_wait(), Ok(None)) {
            children::end_process(pid, || !matches!(self.child.try_wait(), Ok(None)));
        }
        children::forget_process(pid);
    }
}

impl<W: Write> LineWriter<W> {
    /// Lines to `writer`; `name` is for errors.
    pub fn new(name: &str, writer: W) -> LineWriter<W> {
        LineWriter {
            name: name.to_owned(),
            writer: BufWriter::new(writer),
        }
    }

    /// Sends one message.
    ///
    /// # Errors
    /// The other side is gone.
    pub fn send(&mut self, message: &impl Serialize) -> Result<(), ToolError> {
        let mut write = || -> std::io::Result<()> {
            serde_json::to_writer(&mut self.writer, message)?;
            self.writer.write_all(b"\n")?;
            self.writer.flush()
        };
        write().map_err(|error| ToolError::Child {
            process: self.name.clone(),
            what: format!("does not listen: {error}"),
        })
    }
}

impl<R: std::io::Read> LineReader<R> {
    /// Lines from `reader`; `name` is for errors.
    pub fn new(name: &str, reader: R) -> LineReader<R> {
        LineReader {
            name: name.to_owned(),
            reader: BufReader::new(reader),
            line: String::new(),
        }
    }

    /// The next message, or `None` at the end.
    ///
    /// # Errors
    /// Not a message.
    pub fn receive<M: DeserializeOwned>(&mut self) -> Result<Option<M>, ToolError> {
        self.line.clear();
        let failed = |what: String| ToolError::Child {
            process: self.name.clone(),
            what,
        };
        let bytes = self
            .reader
            .read_line(&mut self.line)
            .map_err(|error| failed(error.to_string()))?;
        if bytes == 0 {
            return Ok(None);
        }
        serde_json::from_str(&self.line)
            .map(Some)
            .map_err(|error| failed(error.to_string()))
    }

    /// The next message; an end is an error.
    ///
    /// # Errors
    /// Not a message, or the end.
    pub fn expect<M: DeserializeOwned>(&mut self) -> Result<M, ToolError> {
        let process = self.name.clone();
        self.receive()?.ok_or(ToolError::Child {
            process,
            what: "ended early".into(),
        })
    }
}
