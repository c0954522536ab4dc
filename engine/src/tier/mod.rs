//! The tier below the pool: what the lane asks of it, whatever keeps the bytes.
//!
//! | file | what it does |
//! | --- | --- |
//! | [`store`] | the trait: look up, write, read, poll |
//! | [`options`] | when blocks are written, and how far reading ahead may go |
//! | [`ssd`] | blocks on drives |
//! | `row` | a shard in the node file |
//! | `told` | changes of shards' health in the log |
//! | `memory` | a store in memory that tests steer |

#[cfg(test)]
pub mod memory;
pub mod options;
mod row;
pub mod ssd;
pub mod store;
mod told;

pub use options::{AdmitWhen, TierOptions};
pub use row::ssd_row;
pub use store::{BlockStore, PageSpan, Refused, StoreDone, StoreKey, StoreOutcome};
pub use told::ToldHealth;
