//! The thread that keeps a client connected.
//!
//! It alone reads the session's socket: answers to requests, readiness of instances, the daemon's
//! farewell, and the end of the socket, which is how the kernel tells at once that the daemon died.
//! Then it connects anew, with growing pauses, and brings regions and registrations back.

#![forbid(unsafe_code)]

use std::os::fd::AsFd;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use pegaflow_shm::control::{ClientMessage, DaemonMessage, PROTOCOL_DRAINING};
use pegaflow_shm::status::Status;
use rustix::event::{PollFd, PollFlags, poll};

use crate::Error;
use crate::client::{Shared, add_region};
use crate::memory::HostRegion;
use crate::session::control::{Purpose, Reply};
use crate::session::{Channel, ConnectError, Live, Session};
use crate::shared::process::without_signals;
use crate::shared::timespec;

/// Longest sleep without looking up.
const LONGEST_SLEEP: Duration = Duration::from_secs(10);

/// How long the end of a client waits for the daemon to take notice.
const LEAVE_BOUND: Duration = Duration::from_millis(500);

/// How long after the end of a daemon that said goodbye its successor is looked for without growing
/// pauses.
const SUCCESSION: Duration = Duration::from_secs(30);

/// Refusals after which a session counts as up although a registration is not back.
const PATIENCE: u32 = 6;

/// Starts the keeper of a client whose first session is up.
pub(crate) fn spawn(shared: Arc<Shared>) -> Result<JoinHandle<()>, Error> {
    let backoff = Backoff::new(&shared);
    let mut keeper = Keeper {
        shared,
        backoff,
        sessions: 1,
        retry_at: None,
        refusals: 0,
        expects_successor: false,
    };
    let builder = std::thread::Builder::new().name("pega-keeper".to_owned());
    without_signals(|| builder.spawn(move || keeper.run()))
        .map_err(|error| Error::system("starting the keeper thread", error))
}

struct Keeper {
    shared: Arc<Shared>,
    backoff: Backoff,
    /// Sessions so far.
    sessions: u64,
    /// When to register again what the present daemon refused.
    retry_at: Option<Instant>,
    /// Registrations that the present daemon refused, counting every attempt.
    refusals: u32,
    /// The present daemon has said that it stops.
    expects_successor: bool,
}

impl Keeper {
    fn run(&mut self) {
        while !self.shared.is_closing() {
            match self.shared.session() {
                Ok(session) => self.watch(&session),
                Err(_) if self.shared.resolved.options.reconnect => self.reconnect(),
                Err(_) => self.sleep(LONGEST_SLEEP),
            }
        }
        if let Ok(session) = self.shared.session() {
            session.channel.take_leave(Instant::now() + LEAVE_BOUND);
            self.shared.lose(session.number, "this client disconnected");
        }
    }

    /// Serves the socket until the session is lost or the client closes.
    fn watch(&mut self, session: &Arc<Session>) {
        loop {
            match session.channel.try_receive() {
                Ok(Some((message, _))) => {
                    if let Err(error) = self.handle(session, message) {
                        return self.shared.lose(session.number, &error.to_string());
                    }
                    continue;
                }
                Ok(None) => {}
                Err(error) => return self.end(session, &error.to_string()),
            }
            if self.shared.is_closing() || session.is_lost() {
                return;
            }
            self.register_again(session);
            let left = self
                .retry_at
                .map(|at| at.saturating_duration_since(Instant::now()));
            let limit = timespec(left.unwrap_or(LONGEST_SLEEP).min(LONGEST_SLEEP));
            let socket = session.socket();
            let mut fds = [
                PollFd::new(&socket, PollFlags::IN),
                PollFd::new(&self.shared.events.keeper, PollFlags::IN),
            ];
            // Interrupted or not, everything is looked at again.
            let _ = poll(&mut fds, Some(&limit));
            if !fds[1].revents().is_empty() {
                self.shared.events.keeper.clear();
            }
        }
    }

    /// The daemon is gone: what it had posted before still counts.
    fn end(&self, session: &Session, reason: &str) {
        self.shared.collect_last();
        self.shared.lose(session.number, reason);
    }

    fn handle(&mut self, session: &Arc<Session>, message: DaemonMessage) -> Result<(), Error> {
        match message {
            DaemonMessage::Done { seq } => self.shared.control.answer(seq, Reply::Done),
            DaemonMessage::Registered { seq, registration } => {
                self.registered(session, seq, registration)?;
            }
            DaemonMessage::Failed {
                seq,
                status,
                message,
            } => {
                self.failed(session, seq, status, message);
            }
            DaemonMessage::Ready {
                registration,
                namespace,
            } => {
                self.shared.set_namespace(registration, Some(namespace));
            }
            DaemonMessage::NotReady { registration } => {
                self.shared.set_namespace(registration, None);
            }
            DaemonMessage::Draining { .. } => {
                if session.welcome.protocol < PROTOCOL_DRAINING {
                    let spoken = session.welcome.protocol;
                    let text = format!("a Draining in a session of protocol {spoken}");
                    return Err(Error::Protocol(text));
                }
                session.mark_draining();
                self.expects_successor = true;
            }
            DaemonMessage::Closing { status, message }
            | DaemonMessage::Refused { status, message } => {
                self.shared.collect_last();
                return Err(Error::Refused { status, message });
            }
            DaemonMessage::Welcome(_) => {
                return Err(Error::Protocol("a second Welcome in one session".into()));
            }
        }
        self.announce(session);
        Ok(())
    }

    fn registered(&self, session: &Session, seq: u64, remote: u32) -> Result<(), Error> {
        let Some((Purpose::Register(id), _)) = self.shared.control.purpose(seq) else {
            return Err(Error::Protocol(format!("a Registered for request {seq}")));
        };
        let wanted = self.shared.accepted(id, remote);
        self.shared.control.answer(seq, Reply::Registered(remote));
        if wanted {
            return Ok(());
        }
        let message = |seq| ClientMessage::Unregister {
            seq,
            registration: remote,
        };
        self.send(session, Purpose::Removal, &[], message)
    }

    fn failed(&mut self, session: &Session, seq: u64, status: Status, message: String) {
        if let Some((Purpose::Register(id), false)) = self.shared.control.purpose(seq) {
            self.shared.refused(id, status, message.clone());
            self.refusals += 1;
            // Another client may still hold the rank, or a limit: that can pass.
            self.retry_at = Some(Instant::now() + self.backoff.next());
        }
        if let Some((Purpose::AddRegion(id), false)) = self.shared.control.purpose(seq) {
            let reason = format!("the daemon refused region {id}: {message}");
            self.shared.lose(session.number, &reason);
        }
        self.shared
            .control
            .answer(seq, Reply::Failed { status, message });
    }

    fn reconnect(&mut self) {
        (self.retry_at, self.refusals) = (None, 0);
        if std::mem::take(&mut self.expects_successor) {
            self.backoff.hurry(SUCCESSION);
        }
        let pause = self.backoff.next();
        self.sleep(pause);
        if self.shared.is_closing() {
            return;
        }
        let deadline = Instant::now() + self.shared.resolved.options.connect_timeout;
        let Ok(live) = self.open(deadline) else {
            return;
        };
        let session = live.session.clone();
        let restored = self
            .shared
            .install(live)
            .and_then(|regions| self.restore(&session, &regions));
        match restored {
            Ok(()) => self.announce(&session),
            Err(error) => self.shared.lose(session.number, &error.to_string()),
        }
    }

    fn open(&mut self, deadline: Instant) -> Result<Live, Error> {
        let resolved = &self.shared.resolved;
        let channel =
            Channel::connect(&resolved.socket, deadline).map_err(|error| match error {
                ConnectError::Failed(error) => error,
                ConnectError::NobodyListens(errno) => Error::system("connect", errno),
            })?;
        self.sessions += 1;
        Session::open(resolved, self.sessions, channel, deadline)
    }

    /// Tells a fresh session about everything the engine has. The answers come one by one.
    fn restore(&self, session: &Session, regions: &[Weak<HostRegion>]) -> Result<(), Error> {
        for region in regions.iter().filter_map(Weak::upgrade) {
            let fds = [region.fd.as_fd()];
            self.send(session, Purpose::AddRegion(region.id), &fds, |seq| {
                add_region(seq, &region)
            })?;
        }
        self.register_missing(session)
    }

    fn register_missing(&self, session: &Session) -> Result<(), Error> {
        for (id, spec, uses_process_memory) in self.shared.missing_registrations() {
            self.shared.prepare(session, uses_process_memory);
            self.send(session, Purpose::Register(id), &[], |seq| {
                ClientMessage::Register {
                    seq,
                    registration: Box::new((*spec).clone()),
                }
            })?;
        }
        Ok(())
    }

    /// Tries refused registrations again when their pause is over.
    fn register_again(&mut self, session: &Session) {
        if self.retry_at.is_none_or(|at| Instant::now() < at) {
            return;
        }
        self.retry_at = None;
        if let Err(error) = self.register_missing(session) {
            self.shared.lose(session.number, &error.to_string());
        }
    }

    /// Says that the session is up once nothing is left to be answered. A refusal is often that of
    /// our own last session, which the daemon is still ending: that is waited for a few times.
    fn announce(&mut self, session: &Session) {
        if self.retry_at.is_some() && self.refusals < PATIENCE {
            return;
        }
        if !self.shared.control.has_background() && self.shared.announce(session.number) {
            self.backoff.reset();
        }
    }

    fn send(
        &self,
        session: &Session,
        purpose: Purpose,
        fds: &[std::os::fd::BorrowedFd<'_>],
        message: impl FnOnce(u64) -> ClientMessage,
    ) -> Result<(), Error> {
        let bound = self.shared.resolved.options.control_timeout;
        self.shared
            .control
            .send(session, purpose, fds, bound, message)
    }

    /// Sleeps, unless the client closes.
    fn sleep(&self, pause: Duration) {
        let until = Instant::now() + pause;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || self.shared.is_closing() {
                return;
            }
            let mut fds = [PollFd::new(&self.shared.events.keeper, PollFlags::IN)];
            if poll(&mut fds, Some(&timespec(left))).is_ok_and(|ready| ready > 0) {
                self.shared.events.keeper.clear();
            }
        }
    }
}

/// Growing pauses, each cut by a random part so that the clients of one daemon do not come back in
/// step.
struct Backoff {
    min: Duration,
    max: Duration,
    pause: Duration,
    /// Until then, pauses do not grow.
    hurry_until: Option<Instant>,
    random: u64,
}

impl Backoff {
    fn new(shared: &Shared) -> Backoff {
        let options = &shared.resolved.options;
        let clock = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let seed = clock.as_nanos() as u64 ^ u64::from(std::process::id()) << 32;
        let (min, max) = (options.backoff_min, options.backoff_max);
        Backoff {
            min,
            max,
            pause: min,
            hurry_until: None,
            random: seed | 1,
        }
    }

    /// Half to all of the present pause; the one after is twice as long.
    fn next(&mut self) -> Duration {
        // xorshift64
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let pause = self.pause;
        if self.hurry_until.is_none_or(|until| Instant::now() > until) {
            self.pause = (pause * 2).min(self.max);
        }
        pause / 2 + (pause / 2).mul_f64((self.random % 1024) as f64 / 1024.0)
    }

    /// Goes on with the shortest pause for a while.
    fn hurry(&mut self, limit: Duration) {
        self.pause = self.min;
        self.hurry_until = Some(Instant::now() + limit);
    }

    fn reset(&mut self) {
        (self.pause, self.hurry_until) = (self.min, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_the_maximum_and_start_over() {
        let (min, max) = (Duration::from_millis(50), Duration::from_secs(5));
        let mut backoff = Backoff {
            min,
            max,
            pause: min,
            hurry_until: None,
            random: 7,
        };
        let mut full = min;
        for _ in 0..12 {
            let pause = backoff.next();
            assert!(pause >= full / 2 && pause <= full, "{pause:?} of {full:?}");
            full = (full * 2).min(max);
        }
        assert_eq!(full, max);
        backoff.reset();
        assert!(backoff.next() <= min);
        backoff.hurry(Duration::from_secs(3600));
        assert!(
            (0..12).all(|_| backoff.next() <= min),
            "in a hurry, pauses do not grow"
        );
    }
}
