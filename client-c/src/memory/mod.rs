//! Memory that the daemon reaches: regions shared with it, and layouts over the engine's own
//! memory.

mod host;
mod index;
mod layout;

pub use host::HostMemory;
pub use layout::{GroupMemory, MemoryKind, Registration, SegmentMemory};

pub(crate) use host::HostRegion;
pub(crate) use index::IndexMapping;
pub(crate) use layout::{Places, ResolvedRegistration, resolve};
