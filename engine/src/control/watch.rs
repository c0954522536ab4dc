//! Descriptors on the runtime.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Lets the runtime watch a descriptor, which the result owns.
#[allow(
    deprecated,
    reason = "unsound only for types whose descriptor can change or close while they live; an \
              `OwnedFd`'s cannot"
)]
pub(super) fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(fd, interest)
}
