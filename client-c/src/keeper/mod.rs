//! The thread that keeps a client connected.
//!
//! It alone reads the session's socket: answers to requests, readiness of instances, the daemon's
//! farewell, and the end of the socket, which is how the kernel tells at once that the daemon died.
//! Then it connects anew, with growing pauses, and brings regions and registrations back.

#![forbid(unsafe_code)]

mod bringing;

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use pegaflow_shm::control::{ClientMessage, DaemonMessage, PROTOCOL_DEVICES, PROTOCOL_DRAINING};
use pegaflow_shm::status::Status;
use rustix::event::{PollFd, PollFlags, poll};

use crate::Error;
use crate::client::{Shared, add_region, may_pass, register_message};
use crate::memory::HostRegion;
use crate::session::control::{Purpose, Reply};
use crate::session::{Bound, Channel, ConnectError, Live, Session, kind};
use crate::shared::process::without_signals;
use crate::shared::timespec;
use bringing::{Bringing, Parcel, Refusal};

/// Longest sleep without looking up.
const LONGEST_SLEEP: Duration = Duration::from_secs(10);

/// How long the end of a client waits for the daemon to take notice.
const LEAVE_BOUND: Duration = Duration::from_millis(500);

/// How long after the end of a daemon that said goodbye its successor is looked for without growing
/// pauses.
const SUCCESSION: Duration = Duration::from_secs(30);

/// Refusals after which a session counts as up although a registration is not back.
const PATIENCE: u32 = 6;

/// Longest pause between two attempts to register what the daemon refuses.
const REGISTERING_MAX: Duration = Duration::from_secs(5);

/// Pause between two attempts to say what a daemon that reads nothing has no room for.
const REMOVAL_PAUSE: Duration = Duration::from_millis(100);

/// Starts the keeper of a client.
pub(crate) fn spawn(shared: Arc<Shared>) -> Result<JoinHandle<()>, Error> {
    let options = &shared.resolved.options;
    let backoff = Backoff::new(options.backoff_min, options.backoff_max);
    let registering = Backoff::new(
        options.backoff_min,
        options.backoff_max.max(REGISTERING_MAX),
    );
    let mut keeper = Keeper {
        shared,
        backoff,
        registering,
        sessions: 1,
        retry_at: None,
        refusals: 0,
        expects_successor: false,
        bringing: Bringing::default(),
    };
    let builder = std::thread::Builder::new().name("pega-keeper".to_owned());
    without_signals(|| builder.spawn(move || keeper.run()))
        .map_err(|error| Error::system("starting the keeper thread", error))
}

struct Keeper {
    shared: Arc<Shared>,
    backoff: Backoff,
    /// Pauses between attempts to register.
    registering: Backoff,
    /// Sessions so far.
    sessions: u64,
    /// When to register again what the present daemon refused.
    retry_at: Option<Instant>,
    /// Registrations that the present daemon refused, counting every attempt.
    refusals: u32,
    /// The present daemon has said that it stops.
    expects_successor: bool,
    /// Registrations of device memory on their way to the present daemon.
    bringing: Bringing,
}

impl Keeper {
    fn run(&mut self) {
        while !self.shared.is_closing() {
            self.shared.journal.say();
            match self.shared.session() {
                Ok(session) => self.watch(&session),
                Err(_) if self.shared.resolved.options.reconnect => self.reconnect(),
                Err(_) => self.sleep(LONGEST_SLEEP),
            }
        }
        if let Ok(session) = self.shared.session() {
            session.channel.take_leave(Instant::now() + LEAVE_BOUND);
            let reason = "this client disconnected";
            self.shared
                .lose(session.number, Status::Disconnected, reason);
        }
        self.shared.journal.say();
    }

    /// Serves the socket until the session is lost or the client closes.
    fn watch(&mut self, session: &Arc<Session>) {
        loop {
            self.shared.journal.say();
            self.shared.end_stale_waits();
            if self.shared.is_closing() || session.is_lost() {
                return;
            }
            let received = session.channel.try_receive();
            let handled = match received {
                Ok(Some((message, _))) => self.handle(session, message).map(|()| true),
                Ok(None) => self.register_again(session).map(|()| false),
                Err(error) => Err(error),
            };
            match handled {
                Ok(true) => continue,
                Ok(false) => {}
                Err(error) => return self.end(session, &error),
            }
            let left = self
                .retry_at
                .map(|at| at.saturating_duration_since(Instant::now()));
            let mut limit = left.unwrap_or(LONGEST_SLEEP).min(LONGEST_SLEEP);
            if !self.shared.send_removals(session) {
                limit = limit.min(REMOVAL_PAUSE);
            }
            let limit = timespec(limit);
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

    /// The session is over, for the reason that the daemon gave or for this one.
    fn end(&self, session: &Session, error: &Error) {
        let (status, mut reason) = session.end_reason(error);
        // Nobody said it: the daemon was killed, and what it had queued at a GPU may run on.
        let is_closing = || self.shared.is_closing();
        if session.ending().is_none() && !session.process.await_end(is_closing) {
            reason += "; its process is not seen to end, and may still copy to GPU memory";
        }
        self.shared.lose(session.number, status, &reason);
    }

    fn handle(&mut self, session: &Arc<Session>, message: DaemonMessage) -> Result<(), Error> {
        match message {
            DaemonMessage::Done { seq } => {
                self.step_answered(session, seq, &Reply::Done)?;
                self.shared.control.answer(seq, Reply::Done);
            }
            DaemonMessage::Registered {
                seq,
                registration,
                signals,
            } => self.registered(session, seq, (registration, signals))?,
            DaemonMessage::Failed {
                seq,
                status,
                message,
            } => self.failed(session, seq, status, message)?,
            DaemonMessage::Ready {
                registration,
                namespace,
            } => {
                self.shared
                    .set_namespace(session, registration, Some(namespace));
            }
            DaemonMessage::NotReady { registration } => {
                self.shared.set_namespace(session, registration, None);
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
            other @ (DaemonMessage::DeviceDown { .. } | DaemonMessage::DeviceUp { .. })
                if session.welcome.protocol < PROTOCOL_DEVICES =>
            {
                let (spoken, kind) = (session.welcome.protocol, kind(&other));
                let text = format!("{kind} in a session of protocol {spoken}");
                return Err(Error::Protocol(text));
            }
            DaemonMessage::DeviceDown { device, message } => {
                self.shared.device_down(session, device, &message);
            }
            DaemonMessage::DeviceUp { device } => {
                self.shared.note_device_up(device);
                self.retry_at = Some(Instant::now());
            }
            DaemonMessage::Closing { status, message }
            | DaemonMessage::Refused { status, message } => {
                // Unfinished requests end with the socket: until then copies may touch blocks.
                session.begin_end(status, message);
                self.shared.collect_now();
            }
            DaemonMessage::Welcome(_) => {
                return Err(Error::Protocol("a second Welcome in one session".into()));
            }
        }
        self.announce(session);
        Ok(())
    }

    fn registered(
        &self,
        session: &Session,
        seq: u64,
        (remote, signals): (u32, bool),
    ) -> Result<(), Error> {
        let Some((Purpose::Register(id), _)) = self.shared.control.purpose(seq) else {
            return Err(Error::Protocol(format!("a Registered for request {seq}")));
        };
        let wanted = self.shared.accepted(session, id, (remote, signals));
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

    fn failed(
        &mut self,
        session: &Session,
        seq: u64,
        status: Status,
        message: String,
    ) -> Result<(), Error> {
        if let Some((Purpose::Register(id), true)) = self.shared.control.purpose(seq) {
            self.refused(session, id, status, message.clone());
        }
        if let Some((Purpose::AddRegion(id), true)) = self.shared.control.purpose(seq) {
            let reason = format!("the daemon refused region {id}: {message}");
            self.shared.lose(session.number, status, &reason);
        }
        let reply = Reply::Failed { status, message };
        self.step_answered(session, seq, &reply)?;
        self.shared.control.answer(seq, reply);
        Ok(())
    }

    /// The present daemon does not take a registration, which is tried again later.
    fn refused(&mut self, session: &Session, id: u32, status: Status, message: String) {
        // Another client may still hold the rank, or a limit: that can pass.
        self.refusals += if may_pass(status) { 1 } else { PATIENCE };
        let patient = self.refusals < PATIENCE;
        let refusal = (status, message);
        self.shared.refused(session, id, refusal, patient);
        self.retry_at = Some(Instant::now() + self.registering.next());
    }

    /// Answers that are about a step on the way of a registration of device memory.
    fn step_answered(&mut self, session: &Session, seq: u64, reply: &Reply) -> Result<(), Error> {
        if !matches!(self.shared.control.purpose(seq), Some((Purpose::Device, _))) {
            return Ok(());
        }
        let next = self.bringing.answered(&self.shared, session, reply);
        self.pass_on(session, next)?;
        self.bring(session)
    }

    /// Sends what registrations of device memory need, up to the next answer.
    fn bring(&mut self, session: &Session) -> Result<(), Error> {
        while !self.bringing.is_idle() {
            let next = self.bringing.next(&self.shared, session);
            if !self.pass_on(session, next)? {
                break;
            }
        }
        Ok(())
    }

    /// Sends a parcel, or notes why there is none; false if there is none and nothing to say.
    fn pass_on(
        &mut self,
        session: &Session,
        next: Result<Option<Parcel>, Refusal>,
    ) -> Result<bool, Error> {
        match next {
            Ok(None) => Ok(false),
            Ok(Some(parcel)) => {
                let (purpose, message) = (parcel.purpose, parcel.message);
                let fds: Vec<_> = parcel.fds.iter().map(AsFd::as_fd).collect();
                self.send(session, purpose, &fds, message)?;
                Ok(true)
            }
            Err(Refusal {
                id,
                status,
                message,
            }) => {
                self.refused(session, id, status, message);
                Ok(true)
            }
        }
    }

    fn reconnect(&mut self) {
        (self.retry_at, self.refusals) = (None, 0);
        self.bringing.reset();
        if std::mem::take(&mut self.expects_successor) {
            self.backoff.hurry(SUCCESSION);
        }
        self.registering.reset();
        let pause = self.backoff.next();
        self.sleep(pause);
        if self.shared.is_closing() {
            return;
        }
        let live = match self.open() {
            Ok(live) => live,
            Err(_) if self.shared.is_closing() => return,
            Err(error) => return self.shared.note_failure(&error),
        };
        let session = live.session.clone();
        let regions = match self.shared.install(live) {
            Ok(regions) => regions,
            Err(error) => return self.shared.note_failure(&error),
        };
        match self.restore(&session, &regions) {
            Ok(()) => self.announce(&session),
            Err(error) => self.end(&session, &error),
        }
    }

    fn open(&mut self) -> Result<Live, Error> {
        let resolved = &self.shared.resolved;
        let bound = Bound::unless(&self.shared.events.stop, resolved.options.connect_timeout);
        let channel = Channel::connect(&resolved.socket, bound).map_err(|error| match error {
            ConnectError::Failed(error) => error,
            ConnectError::NobodyListens(errno) => Error::NoDaemon {
                socket: resolved.socket.clone(),
                detail: std::io::Error::from(errno).to_string(),
            },
        })?;
        self.sessions += 1;
        Session::open(resolved, self.sessions, channel, bound)
    }

    /// Tells a fresh session about everything the engine has. The answers come one by one.
    fn restore(&mut self, session: &Session, regions: &[Weak<HostRegion>]) -> Result<(), Error> {
        for region in regions.iter().filter_map(Weak::upgrade) {
            let fds = [region.fd.as_fd()];
            self.send(session, Purpose::AddRegion(region.id), &fds, |seq| {
                add_region(seq, &region)
            })?;
        }
        self.shared.regions_told(session);
        self.register_missing(session)
    }

    fn register_missing(&mut self, session: &Session) -> Result<(), Error> {
        for missing in self.shared.missing_registrations() {
            let (id, protocol) = (missing.id, session.welcome.protocol);
            if let Some((status, text)) = self.shared.is_beyond(id, protocol) {
                self.refused(session, id, status, text);
            } else if missing.device.is_some() {
                self.bringing.add(missing);
            } else {
                self.shared.prepare(session, missing.uses_process_memory);
                self.send(session, Purpose::Register(id), &[], |seq| {
                    register_message(seq, &missing.spec, None)
                })?;
            }
        }
        self.bring(session)
    }

    /// Tries refused registrations again when their pause is over.
    fn register_again(&mut self, session: &Session) -> Result<(), Error> {
        let soon = self.shared.register_soon.swap(false, Ordering::Relaxed);
        if !soon && self.retry_at.is_none_or(|at| Instant::now() < at) {
            return Ok(());
        }
        self.retry_at = None;
        self.register_missing(session)
    }

    /// Says that the session is up once nothing is left to be answered. A refusal is often that of
    /// our own last session, which the daemon is still ending: that is waited for a few times.
    fn announce(&mut self, session: &Session) {
        let waits = self.retry_at.is_some() && self.refusals < PATIENCE;
        if waits || session.ending().is_some() {
            return;
        }
        let is_idle = self.bringing.is_idle() && !self.shared.control.has_background();
        if is_idle && self.shared.announce(session) {
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
        let time = self.shared.resolved.options.control_timeout;
        let bound = Bound::unless(&self.shared.events.stop, time);
        self.shared
            .control
            .send(session, purpose, fds, bound, message)
    }

    /// Sleeps, unless the client closes.
    fn sleep(&self, pause: Duration) {
        let until = Instant::now() + pause;
        loop {
            self.shared.journal.say();
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
    fn new(min: Duration, max: Duration) -> Backoff {
        let clock = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let seed = clock.as_nanos() as u64 ^ u64::from(std::process::id()) << 32;
        // Neighbouring seeds must not give neighbouring pauses.
        let seed = (seed ^ seed >> 31).wrapping_mul(0x9E37_79B9_7F4A_7C15);
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
    fn clients_that_start_together_do_not_pause_alike() {
        let (min, max) = (Duration::from_millis(50), Duration::from_millis(500));
        let first: Vec<u128> = (0..100)
            .map(|_| Backoff::new(min, max).next().as_millis())
            .collect();
        let most = (25..=50)
            .map(|ms| first.iter().filter(|pause| **pause == ms).count())
            .max();
        assert!(most < Some(40), "{first:?}");
    }

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
