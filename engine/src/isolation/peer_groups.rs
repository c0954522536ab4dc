//! The supplementary groups of the process at the other end of a Unix socket (`SO_PEERGROUPS`), as
//! they were when it connected.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Groups that the first try has room for; the kernel says how many there are when it is more.
const FIRST_TRY: usize = 64;
/// Most groups of a process (`NGROUPS_MAX` of the kernel).
const MOST: usize = 65_536;

/// Asks the kernel.
///
/// # Errors
/// The descriptor is no connected Unix socket.
pub fn peer_groups(socket: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    let mut groups = vec![0u32; FIRST_TRY];
    loop {
        let mut bytes =
            libc::socklen_t::try_from(size_of_val(groups.as_slice())).map_err(io::Error::other)?;
        // SAFETY: `groups` is writable memory of `bytes` bytes, which is all that the kernel fills;
        // `gid_t` is `u32` on Linux, for which any bits are a value; the descriptor is borrowed, so
        // open, for the length of the call.
        let answer = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut bytes,
            )
        };
        let found = bytes as usize / size_of::<u32>();
        if answer == 0 {
            groups.truncate(found);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::ERANGE) || found <= groups.len() || found > MOST {
            return Err(error);
        }
        groups.resize(found, 0);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn the_groups_are_those_of_the_process() {
        let (left, _right) = UnixStream::pair().unwrap();
        let mut found = peer_groups(left.as_fd()).unwrap();
        let mut own: Vec<u32> = rustix::process::getgroups()
            .unwrap()
            .into_iter()
            .map(|gid| gid.as_raw())
            .collect();
        found.sort_unstable();
        own.sort_unstable();
        assert_eq!(found, own);
    }

    #[test]
    fn what_is_no_unix_socket_has_no_groups() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(peer_groups(file.as_fd()).is_err());
    }
}
