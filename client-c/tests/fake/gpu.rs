//! What the fake says to device memory: it takes it for granted and copies none of it.

use std::collections::HashSet;

use pegaflow_shm::control::{ClientMessage, DaemonMessage, DeviceHandle};
use pegaflow_shm::status::Status;

/// A message about devices, or a request over device memory, as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// A region by handle, and its length.
    Handle(u32, u64),
    /// A region in so many physical allocations; and the descriptors that came along.
    Chunked(u32, usize, usize),
    /// More descriptors of a region.
    Chunks(u32, usize),
    /// So many events.
    Events(usize),
    /// A registration over these regions.
    Register(Vec<u32>),
    /// A save or load after this event.
    After(Option<u32>),
    /// A region is taken back.
    Remove(u32),
}

/// What tests ask of the fake's devices, and what it saw.
#[derive(Debug, Default)]
pub struct Gpu {
    pub seen: Vec<Seen>,
    /// Refuses regions with this status.
    pub refuse: Option<Status>,
    /// Refuses events.
    pub refuses_events: bool,
    /// To be said in a session.
    pub notices: Vec<DaemonMessage>,
    /// Regions of device memory.
    pub regions: HashSet<u32>,
}

impl Gpu {
    /// The answer to a message about devices.
    pub fn answer(&mut self, message: &ClientMessage, fds: usize) -> Option<DaemonMessage> {
        let (seq, seen, refusal) = match message {
            ClientMessage::AddDeviceRegion {
                seq,
                region,
                bytes,
                handle,
                ..
            } => {
                let seen = match handle {
                    DeviceHandle::Ipc { .. } => Seen::Handle(*region, *bytes),
                    DeviceHandle::Vmm { chunks } => Seen::Chunked(*region, chunks.len(), fds),
                };
                self.regions.insert(*region);
                (*seq, seen, self.refuse)
            }
            ClientMessage::AddDeviceChunks { seq, region } => {
                (*seq, Seen::Chunks(*region, fds), self.refuse)
            }
            ClientMessage::AddEvents { seq, handles, .. } => {
                let refusal = self.refuses_events.then_some(Status::DeviceUnavailable);
                (*seq, Seen::Events(handles.len()), refusal)
            }
            _ => return None,
        };
        self.seen.push(seen);
        Some(match refusal {
            None => DaemonMessage::Done { seq },
            Some(status) => DaemonMessage::Failed {
                seq,
                status,
                message: "refused for the test".into(),
            },
        })
    }
}
