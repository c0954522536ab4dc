//! A CUDA driver for tests on machines without GPU: built as `libcuda.so.1`, it exports the part of
//! the driver API that daemon and library use, over files in a folder that all processes of one
//! test share. Nobody gets it by accident: it lies in no search path, `cuInit` finds no device
//! unless [`machine::FOLDER_VARIABLE`] names a folder, and its devices are called "emulated".
//!
//! What is real about it, so that a test can trust it:
//!
//! * Device memory is a file of its own per allocation. A device address is reserved without
//!   access: a processor that follows one dies of it, in this process and through
//!   `process_vm_readv`. Every copy goes through the driver, which looks the range up.
//! * IPC handles, shared descriptors and interprocess events work between processes, and only
//!   there. Memory stays taken until the last process that opened it lets go or dies.
//! * Streams are threads: work is done later, in order per stream, in any order between streams.
//! * What the driver refuses is refused: freed or foreign memory, ranges beyond an allocation, host
//!   ranges across two registrations, the wrong device, handles of destroyed things.
//! * Memory that is closed while a copy still uses it is an illegal address, as it is on a GPU.
//! * A sticky error stays until the context is gone.
//!
//! It is stricter than the driver where the project has no business: copies on a stream of another
//! device than the current context's are refused, and addresses are not used twice.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`machine`] | devices of a test's machine: the folder, and what the environment says |
//! | [`control`] | faults to inject, and counters, shared by all processes |
//! | [`code`] | results |
//! | `storage` | files that back memory and events, and who has them open |
//! | `mapping` | shared mappings, places in them, copies between places |
//! | `driver` | the state of one process |
//! | `ranges` | device and host addresses and what lies there |
//! | `context`, `stream`, `event`, `kernel` | as the driver's documentation names them |
//! | `api` | the exported functions |

#![deny(unsafe_code)]

#[allow(unsafe_code)]
mod api;
pub mod code;
mod context;
pub mod control;
mod driver;
mod event;
mod kernel;
pub mod machine;
#[allow(unsafe_code)]
mod mapping;
mod ranges;
mod storage;
mod stream;
