//! The shared-memory protocol between inference engines and the PegaFlow node daemon.
//!
//! Everything two processes must agree on lives in this crate: the layout of the two segments
//! of a session, the rings of 64-byte descriptors, the doorbells, the payload encoding, the
//! shared read-only block index, the messages of the Unix socket and the node file that tools
//! read. Neither the daemon nor the client library depends on the other; both depend on this.
//!
//! | module | what it defines |
//! | --- | --- |
//! | [`desc`] | submissions and completions: the 56 bytes a ring slot carries |
//! | [`status`] | one table of status codes, shared with the C ABI |
//! | [`payload`] | how hash and block-id lists lie in arena chunks |
//! | [`segment`] | offsets and headers of the two session segments |
//! | [`ring`] | SPSC and shared (MPMC) rings over raw memory |
//! | [`bell`] | doorbells: spin, then sleep; `sleep_epoch` protocol |
//! | [`mapping`] | sealed memfds, checked access to memory that a peer can write |
//! | [`index`] | the block index, one writer, lock-free readers in other processes |
//! | [`control`] | messages of the session socket |
//! | [`seqpacket`] | sending and receiving them with file descriptors |
//! | [`namespace`] | what makes two blocks with one hash the same bytes |
//! | [`node`] | the node file: counters, histograms, tables |
//! | [`row`] | rows that are read while their one writer writes them |
//! | [`paths`] | where sockets and shared files lie |
//! | [`sync`] | the atomics facade that lets loom check the above |

pub mod bell;
pub mod index;
pub mod ring;
pub mod row;
pub mod sync;

#[cfg(not(loom))]
pub mod control;
#[cfg(not(loom))]
pub mod desc;
#[cfg(not(loom))]
pub mod mapping;
#[cfg(not(loom))]
pub mod namespace;
#[cfg(not(loom))]
pub mod node;
#[cfg(not(loom))]
pub mod paths;
#[cfg(not(loom))]
pub mod payload;
#[cfg(not(loom))]
pub mod segment;
#[cfg(not(loom))]
pub mod seqpacket;
#[cfg(not(loom))]
pub mod status;

/// Name of a block inside a namespace and group: 32 bytes that the engine computed.
pub type BlockHash = [u8; 32];

/// Random 128 bits, drawn anew at each start of the daemon.
pub type BootId = [u8; 16];
