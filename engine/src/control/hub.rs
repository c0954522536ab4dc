//! Who is connected, and how the lane's events and the daemon's end reach each session's task.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use pegaflow_shm::control::DeviceUuid;
use tokio::sync::mpsc;

use crate::lane::api::{LaneEvent, SessionId};

/// Notices that wait for one session's task; one more, and the session ends.
pub const MAX_WAITING_NOTICES: usize = 1024;

/// What a session's task is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Notice {
    /// From the lane, about this session.
    Lane(LaneEvent),
    /// The daemon takes no new work, and gives what it has taken this long.
    Draining {
        /// In milliseconds.
        limit_ms: u64,
    },
    /// A GPU has failed.
    DeviceDown {
        /// Which.
        device: DeviceUuid,
        /// What happened, and the way out.
        message: String,
    },
    /// A GPU can be used again.
    DeviceUp {
        /// Which.
        device: DeviceUuid,
    },
    /// The daemon stops: close.
    Stop,
}

/// The sessions' mailboxes.
#[derive(Default)]
pub(super) struct Hub {
    mailboxes: Mutex<HashMap<SessionId, mpsc::Sender<Notice>>>,
}

impl Hub {
    fn mailboxes(&self) -> std::sync::MutexGuard<'_, HashMap<SessionId, mpsc::Sender<Notice>>> {
        // No code panics while it holds the map, and a map is whole at every step.
        self.mailboxes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a mailbox.
    pub(super) fn join(&self, session: SessionId) -> mpsc::Receiver<Notice> {
        let (sender, receiver) = mpsc::channel(MAX_WAITING_NOTICES);
        self.mailboxes().insert(session, sender);
        receiver
    }

    /// Closes it.
    pub(super) fn leave(&self, session: SessionId) {
        self.mailboxes().remove(&session);
    }

    /// Puts an event into the mailbox of its session, if that is still there. A full mailbox is
    /// taken away, which the session's task sees.
    pub(super) fn deliver(&self, event: LaneEvent) {
        let (LaneEvent::Ready { session, .. }
        | LaneEvent::NotReady { session, .. }
        | LaneEvent::Fault { session, .. }) = event;
        let mut mailboxes = self.mailboxes();
        if let Some(mailbox) = mailboxes.get(&session)
            && mailbox.try_send(Notice::Lane(event)).is_err()
        {
            mailboxes.remove(&session);
        }
    }

    /// Puts a notice into every mailbox.
    pub(super) fn tell_all(&self, notice: &Notice) {
        self.mailboxes()
            .retain(|_, mailbox| mailbox.try_send(notice.clone()).is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(session: SessionId) -> LaneEvent {
        LaneEvent::NotReady {
            session,
            registration: 1,
        }
    }

    #[test]
    fn an_event_reaches_its_session_alone() {
        let hub = Hub::default();
        let (mut one, mut two) = (hub.join(1), hub.join(2));
        hub.deliver(event(2));
        hub.deliver(event(3));
        assert_eq!(two.try_recv(), Ok(Notice::Lane(event(2))));
        assert!(one.try_recv().is_err());
        hub.tell_all(&Notice::Stop);
        assert_eq!(one.try_recv(), Ok(Notice::Stop));
    }

    #[test]
    fn a_full_mailbox_is_taken_away() {
        let hub = Hub::default();
        let mut one = hub.join(1);
        for _ in 0..=MAX_WAITING_NOTICES {
            hub.deliver(event(1));
        }
        for _ in 0..MAX_WAITING_NOTICES {
            assert!(one.try_recv().is_ok());
        }
        assert_eq!(one.try_recv(), Err(mpsc::error::TryRecvError::Disconnected));
    }
}
