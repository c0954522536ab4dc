//! What a client says about itself: one line for each change that an operator would ask about.
//!
//! Lines are put into a journal by whoever makes the change, under any lock, and said by the keeper
//! alone, so that a slow terminal or callback never holds up a call of the engine.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::fmt;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::Error;

/// Lines that wait for the keeper; beyond, the oldest ones are dropped.
const MOST_WAITING: usize = 64;
/// Longest line on standard error: a pipe that is ready takes that much without waiting.
const LONGEST_LINE: usize = 1024;

/// How much a client says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum LogLevel {
    /// Nothing.
    Off = 1,
    /// The daemon is away, is back, or refuses something.
    Warn = 2,
    /// First connections, ends and attempts that fail, too.
    Info = 3,
}

impl LogLevel {
    pub(crate) fn from_env() -> Result<Option<LogLevel>, Error> {
        let Some(value) = std::env::var_os("PEGAFLOW_CLIENT_LOG") else {
            return Ok(None);
        };
        match value.to_str() {
            Some("") => Ok(None),
            Some("off") => Ok(Some(LogLevel::Off)),
            Some("warn") => Ok(Some(LogLevel::Warn)),
            Some("info") => Ok(Some(LogLevel::Info)),
            _ => {
                let value = value.to_string_lossy().into_owned();
                Err(Error::argument(
                    "PEGAFLOW_CLIENT_LOG",
                    value,
                    "off, warn or info",
                ))
            }
        }
    }
}

/// Where lines go instead of standard error.
///
/// It is called by the client's own thread, one line at a time, without a line end, and with all
/// signals blocked. While it runs the client neither notices a daemon's end nor reconnects, and
/// dropping the client waits for it: it must return soon, and it must not drop the client or call
/// what waits for the daemon (register, unregister, `alloc_host`, `wait`).
#[derive(Clone)]
pub struct Log(Arc<LogFn>);

type LogFn = dyn Fn(LogLevel, &str) + Send + Sync;

impl Log {
    /// Lines go to this function. Should it panic, the line is lost and nothing else.
    pub fn new(log: impl Fn(LogLevel, &str) + Send + Sync + 'static) -> Log {
        Log(Arc::new(log))
    }
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Log")
    }
}

/// Lines that the keeper has yet to say.
#[derive(Debug)]
pub(crate) struct Journal {
    name: String,
    level: LogLevel,
    sink: Option<Log>,
    waiting: Mutex<VecDeque<(LogLevel, String)>>,
}

impl Journal {
    /// The journal of the client of this name.
    pub(crate) fn new(name: String, level: LogLevel, sink: Option<Log>) -> Journal {
        let waiting = Mutex::new(VecDeque::new());
        Journal {
            name,
            level,
            sink,
            waiting,
        }
    }

    /// Keeps a line for the keeper, if anybody wants to read it.
    pub(crate) fn note(&self, level: LogLevel, line: impl FnOnce() -> String) {
        if level > self.level {
            return;
        }
        let line = line();
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() == MOST_WAITING {
            waiting.pop_front();
        }
        waiting.push_back((level, line));
    }

    /// Says what waits. Only for the keeper.
    pub(crate) fn say(&self) {
        loop {
            let next = {
                let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
                waiting.pop_front()
            };
            let Some((level, line)) = next else { return };
            match &self.sink {
                Some(Log(sink)) => {
                    let call = std::panic::AssertUnwindSafe(|| sink(level, &line));
                    // A panic of the engine's function is the engine's to report.
                    let _ = std::panic::catch_unwind(call);
                }
                None => write_line(&self.name, &line),
            }
        }
    }
}

/// Writes to standard error unless that would wait: a pipe that nobody empties, a stopped terminal.
fn write_line(name: &str, line: &str) {
    let mut text = format!("pegaflow[{name}]: {line}");
    let mut end = text.len().min(LONGEST_LINE - 1);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text.push('\n');
    let mut error = std::io::stderr();
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let mut fds = [PollFd::new(&error, PollFlags::OUT)];
    let ready = poll(&mut fds, Some(&now));
    if matches!(ready, Ok(1)) && fds[0].revents().contains(PollFlags::OUT) {
        // An engine without standard error has chosen not to read this.
        let _ = error.write_all(text.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Lines = Arc<Mutex<Vec<(LogLevel, String)>>>;

    fn journal(level: LogLevel) -> (Journal, Lines) {
        let lines = Lines::default();
        let kept = lines.clone();
        let sink = Log::new(move |level, line| {
            assert_ne!(line, "panic");
            kept.lock().unwrap().push((level, line.to_owned()));
        });
        (Journal::new("test".into(), level, Some(sink)), lines)
    }

    #[test]
    fn only_what_the_level_asks_for_is_said_and_in_order() {
        let (journal, lines) = journal(LogLevel::Warn);
        journal.note(LogLevel::Warn, || "a".into());
        journal.note(LogLevel::Info, || panic!("not even made"));
        journal.note(LogLevel::Warn, || "b".into());
        assert!(lines.lock().unwrap().is_empty(), "not before the keeper");
        journal.say();
        let said: Vec<String> = lines
            .lock()
            .unwrap()
            .iter()
            .map(|(_, l)| l.clone())
            .collect();
        assert_eq!(said, ["a", "b"]);
    }

    #[test]
    fn a_callback_that_panics_loses_its_line_only() {
        let (journal, lines) = journal(LogLevel::Info);
        for line in ["panic", "after"] {
            journal.note(LogLevel::Info, || line.into());
        }
        journal.say();
        assert_eq!(*lines.lock().unwrap(), [(LogLevel::Info, "after".into())]);
    }

    #[test]
    fn lines_that_nobody_says_do_not_pile_up() {
        let (journal, lines) = journal(LogLevel::Info);
        for number in 0..3 * MOST_WAITING {
            journal.note(LogLevel::Info, || number.to_string());
        }
        journal.say();
        let lines = lines.lock().unwrap();
        assert_eq!(lines.len(), MOST_WAITING);
        assert_eq!(lines[0].1, (2 * MOST_WAITING).to_string());
    }
}
