//! From a call to the ring, and from the ring to the caller.
//!
//! | module | what it holds |
//! | --- | --- |
//! | `table` | every request until its completion is consumed |
//! | `arena` | free chunks of the submission arena |
//! | `results` | free room of the result arena |
//! | `submit` | credit, payload, publication |
//! | `collect` | judging completions and handing them out |
//! | `unloaded` | blocks of failed loads |
//! | `wait` | polling, waiting, the completion descriptor |
//! | `probe` | reading the block index |

#![forbid(unsafe_code)]

mod arena;
mod collect;
mod probe;
mod results;
mod submit;
mod table;
mod unloaded;
mod wait;

pub(crate) use arena::{ChunkPool, Links};
pub(crate) use collect::Collector;
pub(crate) use results::ResultPool;
pub(crate) use submit::Draft;
pub(crate) use table::{ResultSource, Table, local_answer};
pub(crate) use unloaded::Unloaded;
