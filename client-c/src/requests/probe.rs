//! Answering from the block index, without the daemon.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use pegaflow_shm::BlockHash;

use crate::Error;
use crate::client::Shared;
use crate::completion::RegistrationId;
use crate::session::Session;

impl Shared {
    pub(crate) fn probe(
        &self,
        registration: RegistrationId,
        group: u16,
        hashes: &[BlockHash],
    ) -> Result<u32, Error> {
        let hits = match self.scope(registration)? {
            Some((session, namespace)) => session.index.prefix_len(namespace, group, hashes),
            None => 0,
        };
        self.count_probe(hashes.len(), hits);
        Ok(hits)
    }

    pub(crate) fn probe_membership(
        &self,
        registration: RegistrationId,
        group: u16,
        hashes: &[BlockHash],
        bitmap: &mut [u64],
    ) -> Result<u32, Error> {
        if bitmap.len().saturating_mul(64) < hashes.len() {
            let value = format!("{} words for {} positions", bitmap.len(), hashes.len());
            return Err(Error::argument(
                "bitmap",
                value,
                "give one bit for each hash",
            ));
        }
        let hits = match self.scope(registration)? {
            Some((session, namespace)) => {
                session.index.membership(namespace, group, hashes, bitmap)
            }
            None => {
                bitmap.fill(0);
                0
            }
        };
        self.count_probe(hashes.len(), hits);
        Ok(hits)
    }

    /// Where to look; `None` while no daemon answers for the registration.
    fn scope(&self, registration: RegistrationId) -> Result<Option<(Arc<Session>, u32)>, Error> {
        self.check_process()?;
        let inner = self.lock();
        let namespace = inner.registration(registration)?.namespace;
        let (Some(live), Some(namespace)) = (&inner.live, namespace) else {
            return Ok(None);
        };
        let session = live.session.clone();
        drop(inner);
        Ok(session.serves().then_some((session, namespace)))
    }

    fn count_probe(&self, blocks: usize, hits: u32) {
        self.probes.fetch_add(1, Ordering::Relaxed);
        self.probed_blocks
            .fetch_add(blocks as u64, Ordering::Relaxed);
        self.probe_hits
            .fetch_add(u64::from(hits), Ordering::Relaxed);
    }
}
