//! The client: one process's door to the node daemon.

#![forbid(unsafe_code)]

mod devices;
mod events;
mod life;
mod regions;
mod registrations;
mod state;

pub(crate) use events::Event;
pub(crate) use regions::add_region;
pub(crate) use registrations::{Missing, Registered, may_pass, register_message};
pub(crate) use state::{Inner, Shared, Wakes};

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pegaflow_shm::BlockHash;
use pegaflow_shm::control::Welcome;

use crate::completion::{Completion, RegistrationId, RequestId};
use crate::cuda::Order;
use crate::memory::{HostMemory, Registration};
use crate::requests::Draft;
use crate::session::{Bound, Session};
use crate::stats::{Limits, State, Stats};
use crate::{Error, Fetch, Options, autostart, keeper};

/// A connection to the node daemon that mends itself.
///
/// Any thread may call anything at any time. No call blocks beyond the bound that it takes or that
/// [`Options`] names; submissions, probes and [`Client::poll`] do not block at all.
///
/// While the daemon is away, [`Client::state`] says so, probes find nothing, queries complete at
/// once with [`Status::Disconnected`](crate::Status::Disconnected), everything else fails fast with
/// [`Error::Disconnected`], and a thread of the client reconnects and registers again.
#[derive(Debug)]
pub struct Client {
    shared: Arc<Shared>,
    keeper: Option<JoinHandle<()>>,
}

impl Client {
    /// Connects to the node's daemon, starting one first if none listens and `options` say so.
    ///
    /// # Errors
    /// An impossible option; and, unless [`Options::start_without_daemon`]: no daemon, a refusal,
    /// another protocol version, or no answer in time.
    pub fn connect(options: Options) -> Result<Client, Error> {
        let resolved = options.resolve()?;
        let deadline = Instant::now() + resolved.options.connect_timeout;
        let opened = autostart::connect(&resolved, deadline)
            .and_then(|channel| Session::open(&resolved, 1, channel, Bound::until(deadline)));
        let (first, reason) = match opened {
            Ok(live) => (Some(live), String::new()),
            Err(error) if resolved.start_without_daemon => (None, error.to_string()),
            Err(error) => return Err(error),
        };
        let shared = Shared::new(resolved, first, reason)?;
        shared.note_start();
        let keeper = keeper::spawn(shared.clone())?;
        Ok(Client {
            shared,
            keeper: Some(keeper),
        })
    }

    /// Allocates KV memory that the daemon maps too; zeroed, page-aligned, populated.
    ///
    /// # Errors
    /// No memory, or the daemon refused the region.
    pub fn alloc_host(&self, bytes: usize) -> Result<HostMemory, Error> {
        self.shared.alloc_host(bytes)
    }

    /// Registers a rank with its KV memory, or a scheduler. The id stays valid across
    /// reconnections.
    ///
    /// # Errors
    /// An impossible or contradictory registration, a disconnected daemon, or no answer in time.
    pub fn register(&self, registration: &Registration) -> Result<RegistrationId, Error> {
        self.shared.register(registration)
    }

    /// Ends a registration once no copy touches its memory.
    ///
    /// # Errors
    /// No such registration, or no answer in time; then the registration stays.
    pub fn unregister(&self, registration: RegistrationId) -> Result<(), Error> {
        self.shared.unregister(registration)
    }

    /// Waits until every rank of the registration's instance has registered. A `timeout` of zero
    /// only looks.
    ///
    /// # Errors
    /// [`Error::NotReadyInTime`]; what the present daemon has against the registration, at once if
    /// waiting does not mend it; or no such registration.
    pub fn wait_ready(&self, registration: RegistrationId, timeout: Duration) -> Result<(), Error> {
        self.shared.wait_ready(registration, timeout)
    }

    /// How many of `hashes`, from the first on, are cached without a gap: a pure memory read. 0
    /// while the daemon is away or the instance incomplete. Only a query's lease holds the blocks.
    ///
    /// # Errors
    /// No such registration.
    pub fn probe(
        &self,
        registration: RegistrationId,
        group: u16,
        hashes: &[BlockHash],
    ) -> Result<u32, Error> {
        self.shared.probe(registration, group, hashes)
    }

    /// Sets bit `i % 64` of `bitmap[i / 64]` for each cached `hashes[i]`, clears all others, and
    /// returns how many are cached. Otherwise like [`Self::probe`].
    ///
    /// # Errors
    /// No such registration, or a bitmap that is too short.
    pub fn probe_membership(
        &self,
        registration: RegistrationId,
        group: u16,
        hashes: &[BlockHash],
        bitmap: &mut [u64],
    ) -> Result<u32, Error> {
        self.shared
            .probe_membership(registration, group, hashes, bitmap)
    }

    /// Pins cached blocks and answers with a lease: of group 0 the longest cached prefix, of
    /// another group every cached position (the completion then has a bitmap). `key` is the
    /// engine's request: the same key with the same hashes gives the same answer and no second pin.
    /// A `ttl_ms` of 0 takes the daemon's default.
    ///
    /// # Errors
    /// [`Error::Again`], [`Error::TooMany`], or no such registration. While disconnected the query
    /// is accepted and completes at once as a miss.
    pub fn query(
        &self,
        registration: RegistrationId,
        group: u16,
        key: u64,
        hashes: &[BlockHash],
        ttl_ms: u64,
    ) -> Result<RequestId, Error> {
        self.shared
            .submit(&Draft::query(registration, group, key, hashes, ttl_ms))
    }

    /// [`Self::query`] that says what becomes of blocks below the pool. A daemon that is older than
    /// its tiers takes it for a plain query.
    ///
    /// # Errors
    /// As [`Self::query`].
    pub fn query_with(
        &self,
        registration: RegistrationId,
        group: u16,
        key: u64,
        hashes: &[BlockHash],
        ttl_ms: u64,
        fetch: Fetch,
    ) -> Result<RequestId, Error> {
        let draft = Draft::query(registration, group, key, hashes, ttl_ms);
        self.shared.submit(&draft.with_fetch(fetch))
    }

    /// Copies the pages of a lease into the engine's blocks: position `first + i` of the lease goes
    /// to `blocks[i]`.
    ///
    /// # Errors
    /// [`Error::Again`], [`Error::TooMany`], [`Error::Disconnected`], or no such registration.
    pub fn load(
        &self,
        registration: RegistrationId,
        group: u16,
        lease: u64,
        first: u32,
        blocks: &[u32],
    ) -> Result<RequestId, Error> {
        self.shared
            .submit(&Draft::load(registration, group, lease, first, blocks))
    }

    /// [`Self::load`] that overwrites blocks only once `after` is through with them.
    ///
    /// # Errors
    /// As [`Self::load`]; an order over a registration without device memory, a stream that is
    /// being captured, or a failure of the CUDA driver. Where events cannot be shared with the
    /// daemon, the call itself waits for `after`, at most [`Options::control_timeout`], and fails
    /// with [`Error::Timeout`] when that is over: then nothing was submitted.
    pub fn load_after(
        &self,
        registration: RegistrationId,
        group: u16,
        lease: u64,
        first: u32,
        blocks: &[u32],
        after: Order,
    ) -> Result<RequestId, Error> {
        let draft = Draft::load(registration, group, lease, first, blocks);
        self.shared.submit_after(&draft, after)
    }

    /// [`Self::load_after`] whose blocks come in so many steps, for [`Self::stream_wait`]: step
    /// `n`, counted from 1, has the group's segments from `(n - 1) * segments / steps` on, up to
    /// `n * segments / steps`, of all blocks.
    ///
    /// # Errors
    /// As [`Self::load_after`]; more steps than the group has segments, or none;
    /// [`Error::Again`] while 256 such loads are under way.
    pub fn load_in_steps(
        &self,
        registration: RegistrationId,
        group: u16,
        lease: u64,
        (first, blocks): (u32, &[u32]),
        after: Order,
        steps: u16,
    ) -> Result<RequestId, Error> {
        if steps == 0 {
            return Err(Error::argument("steps", "0", "give 1 or more"));
        }
        let draft = Draft::load(registration, group, lease, first, blocks).in_steps(steps);
        self.shared.submit_after(&draft, after)
    }

    /// What `stream` gets from now on comes after the first `steps` steps of a load of
    /// [`Self::load_in_steps`], without a thread that waits. The stream goes on as well when the
    /// load has failed or its daemon is gone, and 30 to 40 seconds after the submission at the
    /// latest: only the completion says that the bytes are there.
    ///
    /// # Errors
    /// [`Error::UnknownRequest`] for a load whose completion was consumed; what became of a load
    /// that has failed. [`Status::DeviceUnavailable`](crate::Status::DeviceUnavailable) where
    /// driver or daemon cannot do it: wait for the completion instead. A stream that is being
    /// captured, or a failure of the CUDA driver.
    pub fn stream_wait(&self, request: RequestId, steps: u32, stream: Order) -> Result<(), Error> {
        self.shared.stream_wait(request, steps, stream)
    }

    /// Copies `blocks[i]` into the pool under the name `hashes[i]`. Blocks already held are
    /// skipped.
    ///
    /// # Errors
    /// As [`Self::load`], and lists of different length.
    pub fn save(
        &self,
        registration: RegistrationId,
        group: u16,
        hashes: &[BlockHash],
        blocks: &[u32],
    ) -> Result<RequestId, Error> {
        self.save_after(registration, group, hashes, blocks, Order::NONE)
    }

    /// [`Self::save`] that reads blocks only once `after` has written them.
    ///
    /// # Errors
    /// As [`Self::save`] and [`Self::load_after`].
    pub fn save_after(
        &self,
        registration: RegistrationId,
        group: u16,
        hashes: &[BlockHash],
        blocks: &[u32],
        after: Order,
    ) -> Result<RequestId, Error> {
        if hashes.len() != blocks.len() {
            let value = format!("{} hashes, {} blocks", hashes.len(), blocks.len());
            return Err(Error::argument(
                "blocks",
                value,
                "give one block id for each hash",
            ));
        }
        let draft = Draft::save(registration, group, hashes, blocks);
        self.shared.submit_after(&draft, after)
    }

    /// Gives a lease back without loading.
    ///
    /// # Errors
    /// [`Error::Again`], [`Error::Disconnected`], or no such registration.
    pub fn release(&self, registration: RegistrationId, lease: u64) -> Result<RequestId, Error> {
        self.shared.submit(&Draft::release(registration, lease))
    }

    /// Sets a lease's time to live to `ttl_ms` from now.
    ///
    /// # Errors
    /// As [`Self::release`].
    pub fn renew(
        &self,
        registration: RegistrationId,
        lease: u64,
        ttl_ms: u64,
    ) -> Result<RequestId, Error> {
        self.shared
            .submit(&Draft::renew(registration, lease, ttl_ms))
    }

    /// Asks to cancel an unfinished request. Both requests complete: the other one with
    /// [`Status::Cancelled`](crate::Status::Cancelled), or with its result if it was faster.
    ///
    /// # Errors
    /// [`Error::UnknownRequest`], [`Error::Again`] or [`Error::Disconnected`].
    pub fn cancel(&self, request: RequestId) -> Result<RequestId, Error> {
        self.shared.submit(&Draft::cancel(request))
    }

    /// Does nothing, there and back.
    ///
    /// # Errors
    /// [`Error::Again`] or [`Error::Disconnected`].
    pub fn nop(&self) -> Result<RequestId, Error> {
        self.shared.submit(&Draft::nop())
    }

    /// Takes finished requests that no other thread waits for, up to `out.len()`, and returns how
    /// many. Never blocks.
    pub fn poll(&self, out: &mut [Completion]) -> usize {
        self.shared.poll(out)
    }

    /// Waits for one request and consumes its completion. A `timeout` of zero only looks.
    ///
    /// # Errors
    /// [`Error::Timeout`] (the request goes on), or [`Error::UnknownRequest`].
    pub fn wait(&self, request: RequestId, timeout: Duration) -> Result<Completion, Error> {
        self.shared.wait(request, timeout)
    }

    /// The blocks that a load was to fill and that hold undefined bytes, because it completed with
    /// another status than `Ok`: all of its list. Kept from the consumption of the completion on,
    /// for the latest failed loads: at most as many as there are completion slots, and at most as
    /// many blocks together as all loads under way can name.
    ///
    /// # Errors
    /// [`Error::NoBlockList`].
    pub fn unloaded_blocks(&self, request: RequestId) -> Result<Vec<u32>, Error> {
        self.shared.unloaded_blocks(request, <[u32]>::to_vec)
    }

    /// A descriptor for the engine's event loop; it stays the same across reconnections. Call
    /// [`Self::poll`] until it returns 0, then sleep until this is readable.
    pub fn completion_fd(&self) -> BorrowedFd<'_> {
        self.shared.completion_fd()
    }

    /// Whether a session is up. One load.
    pub fn state(&self) -> State {
        self.shared.state()
    }

    /// Counters; zeros in a forked child.
    pub fn stats(&self) -> Stats {
        self.shared.stats()
    }

    /// The largest lists that this client can submit.
    pub fn limits(&self) -> Limits {
        self.shared.limits()
    }

    /// What the daemon said about itself and the session; `None` while disconnected.
    pub fn session_info(&self) -> Option<Welcome> {
        self.shared.session_info()
    }

    /// Fails in a forked child of the process that connected.
    ///
    /// # Errors
    /// [`Error::Forked`].
    pub fn check_process(&self) -> Result<(), Error> {
        self.shared.check_process()
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let Some(keeper) = self.keeper.take() else {
            return;
        };
        if self.shared.check_process().is_err() {
            // The thread and the session are the parent's; the handle is only forgotten here.
            std::mem::forget(keeper);
            std::mem::forget(self.shared.clone());
            return;
        }
        self.shared.close();
        // A keeper that panicked has nothing left to tidy up.
        let _ = keeper.join();
    }
}
