//! Memory that a process withholds: whoever touches it waits until the process has ended.

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `UFFD_API`, and the numbers of the two calls (`_IOWR(0xAA, 0x3F, 24)`, `_IOWR(0xAA, 0, 32)`).
const UFFD_API: u64 = 0xAA;
const UFFDIO_API: u64 = 0xC018_AA3F;
const UFFDIO_REGISTER: u64 = 0xC020_AA00;
const MODE_MISSING: u64 = 1;

/// `struct uffdio_api`.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    start: u64,
    bytes: u64,
    mode: u64,
    ioctls: u64,
}

/// Memory behind a userfaultfd that nobody answers. It stays until the process ends, whatever
/// becomes of this value: a copy may be waiting for it.
#[derive(Clone, Copy, Debug)]
pub struct Withheld {
    address: usize,
    bytes: usize,
}

impl Withheld {
    /// Maps `bytes` bytes that nobody gets.
    ///
    /// # Errors
    /// This machine refuses userfaultfd for faults of the kernel, which is for root alone.
    pub fn map(bytes: usize) -> io::Result<Withheld> {
        let bytes = bytes.next_multiple_of(4096);
        // SAFETY: takes flags only.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
        check(fd)?;
        // SAFETY: the call gave a new descriptor.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        let mut api = Api {
            api: UFFD_API,
            features: 0,
            ioctls: 0,
        };
        // SAFETY: the kernel reads and writes one `struct uffdio_api`.
        check(i64::from(unsafe {
            libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api)
        }))?;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let mut register = Register {
            start: address.addr() as u64,
            bytes: bytes as u64,
            mode: MODE_MISSING,
            ioctls: 0,
        };
        // SAFETY: the kernel reads and writes one `struct uffdio_register`; the range was mapped
        // just now and nobody has touched it.
        check(i64::from(unsafe {
            libc::ioctl(fd.as_raw_fd(), UFFDIO_REGISTER, &raw mut register)
        }))?;
        // Closing it would let everybody have zeros.
        std::mem::forget(fd);
        Ok(Withheld {
            address: address.expose_provenance(),
            bytes,
        })
    }

    /// Why this machine cannot have such memory, if it cannot.
    pub fn refused() -> Option<String> {
        Withheld::map(4096)
            .err()
            .map(|error| format!("userfaultfd is refused here: {error}"))
    }

    /// Where it begins.
    pub fn address(&self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut::<c_void>(self.address).cast()
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

fn check(answer: i64) -> io::Result<()> {
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
