//! Host memory shared with the daemon.

#![forbid(unsafe_code)]

use std::os::fd::AsFd;
use std::sync::Arc;

use pegaflow_shm::control::ClientMessage;

use super::Shared;
use crate::Error;
use crate::memory::{HostMemory, HostRegion};
use crate::session::control::Purpose;
use crate::session::{Bound, Session};

impl Shared {
    pub(crate) fn alloc_host(&self, bytes: usize) -> Result<HostMemory, Error> {
        self.check_process()?;
        let id = self.next_region();
        let region = Arc::new(HostRegion::create(id, bytes, self.weak.clone())?);
        let session = {
            let mut inner = self.lock();
            inner.regions.insert(id, Arc::downgrade(&region));
            inner.live.as_ref().map(|live| live.session.clone())
        };
        // While the daemon is away the keeper adds it later.
        if let Some(session) = session {
            let bound = self.resolved.options.control_timeout;
            let reply = self.control.call(
                &session,
                Purpose::AddRegion(id),
                &[region.fd.as_fd()],
                bound,
                |seq| add_region(seq, &region),
            );
            match reply.and_then(|reply| reply.done()) {
                Ok(()) | Err(Error::Disconnected { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(HostMemory { region })
    }

    /// A number that no region of this client has had.
    pub(crate) fn next_region(&self) -> u32 {
        let mut inner = self.lock();
        let id = inner.next_region;
        inner.next_region += 1;
        id
    }

    /// The last user of a region is gone. Runs in its drop: nothing may fail or take long here.
    pub(crate) fn forget_region(&self, id: u32) {
        if self.check_process().is_err() {
            return;
        }
        let session = {
            let mut inner = self.lock();
            inner.regions.remove(&id);
            inner.live.as_ref().map(|live| live.session.clone())
        };
        if let Some(session) = session {
            self.take_back(&session, id);
        }
    }

    /// The last user of a region of device memory is gone; session `told` has it. As
    /// [`Self::forget_region`].
    pub(crate) fn forget_device_region(&self, id: u32, told: u64) {
        if self.check_process().is_err() {
            return;
        }
        let session = {
            let inner = self.lock();
            inner.live.as_ref().map(|live| live.session.clone())
        };
        if let Some(session) = session.filter(|session| session.number == told) {
            self.take_back(&session, id);
        }
    }

    fn take_back(&self, session: &Session, id: u32) {
        if self.send_removal(session, id) {
            return;
        }
        let mut inner = self.lock();
        if inner.is_present(session) {
            inner.removals.push(id);
        }
        drop(inner);
        self.events.keeper.signal();
    }

    /// Tells the daemon to forget a region, without waiting; false if it takes nothing now.
    fn send_removal(&self, session: &Session, region: u32) -> bool {
        let message = |seq| ClientMessage::RemoveRegion { seq, region };
        let sent = self
            .control
            .send(session, Purpose::Removal, &[], Bound::now(), message);
        // A daemon that is gone forgets the region with the session.
        !matches!(sent, Err(Error::Timeout { .. }))
    }

    /// Sends what could not be sent before; false if the daemon still takes nothing.
    pub(crate) fn send_removals(&self, session: &Session) -> bool {
        loop {
            let next = self.lock().removals.pop();
            let Some(region) = next else { return true };
            if !self.send_removal(session, region) {
                self.lock().removals.push(region);
                return false;
            }
        }
    }

    /// Every region that somebody holds.
    pub(crate) fn live_regions(&self) -> Vec<Arc<HostRegion>> {
        // The list is made first: dropping the last hold on a region takes the lock.
        let regions: Vec<_> = self.lock().regions.values().cloned().collect();
        regions
            .iter()
            .filter_map(|region| region.upgrade())
            .collect()
    }
}

/// The message that shares a region.
pub(crate) fn add_region(seq: u64, region: &HostRegion) -> ClientMessage {
    ClientMessage::AddRegion {
        seq,
        region: region.id,
        bytes: region.bytes() as u64,
    }
}
