//! GPU memory: the driver, other processes' allocations, and the threads that copy from and to
//! them.
//!
//! The driver library is loaded at run time, so one binary serves machines with and without GPUs.
//! [`Devices`] is the handle to all of it. A client's allocation becomes a [`DeviceRegion`] by
//! [`Devices::import`]; dropping the last handle to it unmaps it, which a thread of its own does,
//! since the driver may take its time. What copies touch, they hold a handle to: so memory is
//! unmapped only when they have drained.
//!
//! | file | what it does |
//! | --- | --- |
//! | `driver` | what is asked of a driver, as traits |
//! | `cuda` | the CUDA driver behind them |
//! | `devices` | all devices of the daemon; import of memory and events |
//! | `card` | one device: its context, its threads, its faults |
//! | `region`, `events` | what was imported |
//! | `part` | a layout's part as the kernels read it |
//! | `plan` | how a task's bytes go over the bus, a chunk at a time |
//! | `pin`, `pin_map` | pinning of the pool, and which of it is pinned |
//! | `flights` | chunks under way over pinned memory, which must not be unpinned under them |
//! | `inbox` | tasks on their way to a device's thread |
//! | `turns`, `job` | whose turn it is; how far each task is |
//! | `forecast` | when chunks should be done, and when to look |
//! | `slot`, `side` | a stream with a chunk under way; a direction's two of them |
//! | `worker`, `thread` | a device's thread: its work; its sleeps and new beginnings |
//! | `counters` | what each device has done |
//! | `info` | names and places of the devices |
//! | `error` | errors |

mod card;
mod counters;
mod cuda;
mod devices;
mod driver;
mod error;
mod events;
mod flights;
mod forecast;
mod inbox;
mod info;
mod job;
mod options;
mod part;
mod pin;
mod pin_map;
mod plan;
mod region;
mod side;
mod slot;
mod thread;
mod turns;
mod worker;

#[cfg(test)]
mod tests;

pub use devices::Devices;
pub use error::{DeviceError, DriverError};
pub use events::{AfterEvent, DeviceEvents};
pub use info::{DeviceInfo, DeviceState};
pub use options::{DeviceChoice, DeviceOptions, PinMode, STAGING_SLOTS};
pub use region::{DeviceRegion, ShareHandle};

pub(crate) use card::Card;
pub(crate) use card::DeviceNews;
pub(crate) use part::DevicePart;
