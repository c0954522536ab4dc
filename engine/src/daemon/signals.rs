//! Signals: SIGTERM and SIGINT stop the daemon, SIGHUP does nothing.

#![forbid(unsafe_code)]

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{DaemonError, system};

/// The signals that the daemon listens to.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    pub(super) fn new() -> Result<Signals, DaemonError> {
        let listen = |kind| signal(kind).map_err(|source| system("listening to signals", source));
        Ok(Signals {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            hangup: listen(SignalKind::hangup())?,
        })
    }

    /// Waits for the next signal that means stop.
    pub(super) async fn stop(&mut self) {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => {
                    tracing::info!("SIGTERM received");
                    return;
                }
                _ = self.interrupt.recv() => {
                    tracing::info!("SIGINT received");
                    return;
                }
                _ = self.hangup.recv() => {
                    tracing::info!("SIGHUP ignored: options are read at start only");
                }
            }
        }
    }
}
