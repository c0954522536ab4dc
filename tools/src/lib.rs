//! `pegactl`: looks at a PegaFlow node, measures it and exercises it.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`cli`] | the command line, exit statuses |
//! | [`node`] | a node as its shared memory shows it |
//! | [`status`], [`rings`], [`metrics`], [`top`] | tables and the live screen |
//! | [`doctor`] | checks of the machine |
//! | [`gpu`] | GPUs of this process: memory, streams, events |
//! | [`replay`] | a workload through engine processes, every loaded byte checked |
//! | [`mod@bench`] | latency and throughput against the machine's limits |
//! | [`daemon`], [`children`] | processes of our own and their end |

pub mod bench;
pub mod children;
pub mod cli;
pub mod daemon;
pub mod doctor;
pub mod domains;
pub mod error;
pub mod gpu;
pub mod gpus;
pub mod metrics;
pub mod node;
pub mod output;
pub mod replay;
pub mod rings;
pub mod ssd;
pub mod ssds;
pub mod status;
pub mod top;
