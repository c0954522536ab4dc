//! Pieces through io_uring: one ring, one registered file, registered memory.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::types::{Fd, Fixed, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};
use rustix::event::{EventfdFlags, eventfd};

use super::{Bell, Ended, Engine, Kind, Piece};
use crate::memory::Area;

/// The `user_data` of the poll for the bell; pieces have ids below.
const BELL: u64 = u64::MAX;
/// The kernel registers at most that many bytes as one buffer.
const BUFFER_BYTES: u64 = 1 << 30;

/// Files beside the shard's that a ring keeps open.
const MOST_LOCKS: usize = 2;

/// So many ends one wake-up waits for at most.
const FEW: u32 = 4;
/// It waits no longer than that for more than one.
const FEW_WAIT: Duration = Duration::from_micros(500);

/// What the ring could not get; it works without.
pub(crate) type Shortfall = Option<String>;

/// An engine over one ring.
pub(crate) struct Uring {
    // Dropped before the file and before the memory's keepers.
    ring: IoUring,
    _file: Arc<File>,
    // What keeps `buffers` mapped.
    _areas: Vec<Area>,
    /// Registered memory as (first address, length), in the order of the kernel's indices.
    buffers: Vec<(usize, usize)>,
    bell: Arc<EventBell>,
    depth: u32,
    running: u32,
    bell_armed: bool,
}

struct EventBell(OwnedFd);

impl Bell for EventBell {
    fn ring(&self) {
        // It fails only when the counter is full, and then the other side will wake.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

impl Uring {
    /// A ring for `depth` pieces of `file`. `areas` is where most pieces' memory lies; it is
    /// registered if the system allows.
    pub fn new(
        file: Arc<File>,
        depth: u32,
        sqpoll_idle: Option<Duration>,
        areas: Vec<Area>,
    ) -> io::Result<(Self, Shortfall)> {
        // One entry more, for the bell.
        let ring = ring((depth + 1).next_power_of_two(), sqpoll_idle)?;
        if !ring.params().is_feature_ext_arg() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "this kernel's io_uring cannot wait with a limit (Linux 5.11 can)",
            ));
        }
        let mut files = [-1; 1 + MOST_LOCKS];
        files[0] = file.as_raw_fd();
        ring.submitter().register_files(&files)?;
        let buffers = split(&areas);
        let vectors: Vec<libc::iovec> = buffers
            .iter()
            .map(|&(address, bytes)| libc::iovec {
                iov_base: address as *mut libc::c_void,
                iov_len: bytes,
            })
            .collect();
        // SAFETY: the ranges are mapped as long as the areas live, which the engine owns and drops
        // after the ring; pieces on them end before that (`drop`).
        let registered = unsafe { ring.submitter().register_buffers(&vectors) };
        let shortfall = registered.err().map(|error| {
            format!(
                "memory is not registered with io_uring ({error}): raise RLIMIT_MEMLOCK to the \
                 size of the pool times the number of shards"
            )
        });
        let bell = Arc::new(EventBell(eventfd(
            0,
            EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK,
        )?));
        let engine = Self {
            ring,
            _file: file,
            _areas: areas,
            buffers: if shortfall.is_some() {
                Vec::new()
            } else {
                buffers
            },
            bell,
            depth,
            running: 0,
            bell_armed: false,
        };
        Ok((engine, shortfall))
    }

    /// Keeps these files open, and their locks with them, until the kernel has ended every piece.
    /// A killed process's descriptors are closed at once, but what it has asked of a drive may go
    /// on long after, and reads and writes the same pages.
    pub fn keep_open(&self, locks: &[&File]) -> io::Result<()> {
        assert!(locks.len() <= MOST_LOCKS);
        let files: Vec<_> = locks.iter().map(|file| file.as_raw_fd()).collect();
        self.ring.submitter().register_files_update(1, &files)?;
        Ok(())
    }

    fn buffer_of(&self, address: usize, bytes: usize) -> Option<u16> {
        self.buffers
            .iter()
            .position(|&(start, length)| {
                address >= start && address - start <= length && length - (address - start) >= bytes
            })
            .and_then(|index| u16::try_from(index).ok())
    }

    fn entry(&self, piece: &Piece) -> squeue::Entry {
        let (address, bytes) = (piece.address.as_ptr(), piece.bytes);
        let buffer = self.buffer_of(address as usize, bytes as usize);
        let entry = match (piece.kind, buffer) {
            (Kind::Read, Some(buffer)) => opcode::ReadFixed::new(Fixed(0), address, bytes, buffer)
                .offset(piece.offset)
                .build(),
            (Kind::Read, None) => opcode::Read::new(Fixed(0), address, bytes)
                .offset(piece.offset)
                .build(),
            (Kind::Write, Some(buffer)) => {
                opcode::WriteFixed::new(Fixed(0), address, bytes, buffer)
                    .offset(piece.offset)
                    .build()
            }
            (Kind::Write, None) => opcode::Write::new(Fixed(0), address, bytes)
                .offset(piece.offset)
                .build(),
            (Kind::Sync, _) => opcode::Fsync::new(Fixed(0))
                .flags(FsyncFlags::DATASYNC)
                .build(),
        };
        entry.user_data(piece.id)
    }

    /// Queues an entry. With a polling kernel thread the queue may be full of entries that it has
    /// not taken yet; it takes them without waiting for a drive.
    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: the entry's memory is the piece's, which stays valid until the piece ended;
            // the engine waits for all pieces before it is dropped. The bell's poll has none.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            self.ring.submit()?;
            self.ring.submitter().squeue_wait()?;
        }
    }

    /// Starts what is queued and takes in what the kernel holds back, without waiting.
    fn start(&mut self) -> io::Result<usize> {
        let queue = self.ring.submission();
        if queue.is_empty() && !queue.taskrun() && !queue.cq_overflow() {
            return Ok(0);
        }
        drop(queue);
        self.ring.submit()
    }

    /// Starts what is queued and waits for ends.
    fn start_and_wait(&mut self, timeout: Duration) -> io::Result<usize> {
        // With many under way several will end soon: one wake-up serves a few of them.
        let few = (self.running / 8).clamp(1, FEW);
        // Linux 6.12 can wait for a few at first and then for one. Others come back for nothing.
        let then_one = self.ring.params().is_feature_min_timeout();
        let limit = if few > 1 && !then_one {
            timeout.min(FEW_WAIT)
        } else {
            timeout
        };
        let limit = Timespec::from(limit);
        let mut args = SubmitArgs::new().timespec(&limit);
        if few > 1 && then_one {
            args = args.min_wait_usec(FEW_WAIT.as_micros() as u32);
        }
        self.ring.submitter().submit_with_args(few as usize, &args)
    }

    fn arm_bell(&mut self) -> io::Result<()> {
        if self.bell_armed {
            return Ok(());
        }
        let poll = opcode::PollAdd::new(Fd(self.bell.0.as_raw_fd()), libc::POLLIN as u32)
            .build()
            .user_data(BELL);
        self.push(&poll)?;
        self.bell_armed = true;
        Ok(())
    }

    /// Appends what has ended; true if the bell rang or anything ended.
    fn collect(&mut self, out: &mut Vec<Ended>) -> bool {
        let mut any = false;
        for done in self.ring.completion() {
            any = true;
            if done.user_data() == BELL {
                self.bell_armed = false;
                let mut count = [0; 8];
                // It is level-triggered and not blocking: nothing to read is fine.
                let _ = rustix::io::read(&self.bell.0, &mut count);
                continue;
            }
            self.running -= 1;
            out.push(Ended {
                id: done.user_data(),
                result: u32::try_from(done.result()).map_err(|_| -done.result()),
            });
        }
        any
    }
}

/// A ring that interrupts nobody when a piece ends, where the kernel can (Linux 5.19).
///
/// One that brings ends only when asked (`DEFER_TASKRUN`) would belong to one thread, and took the
/// same CPU time.
fn ring(entries: u32, sqpoll_idle: Option<Duration>) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    if let Some(idle) = sqpoll_idle {
        builder.setup_sqpoll(u32::try_from(idle.as_millis()).unwrap_or(u32::MAX));
        return builder.build(entries);
    }
    builder.setup_coop_taskrun().setup_taskrun_flag();
    match builder.build(entries) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            IoUring::builder().build(entries)
        }
        built => built,
    }
}

/// The ranges to register: no longer than the kernel takes.
fn split(areas: &[Area]) -> Vec<(usize, usize)> {
    let mut ranges = Vec::new();
    for area in areas {
        let mut done = 0;
        while done < area.bytes {
            let bytes = (area.bytes - done).min(BUFFER_BYTES);
            ranges.push((area.base.as_ptr() as usize + done as usize, bytes as usize));
            done += bytes;
        }
    }
    ranges
}

impl Engine for Uring {
    fn name(&self) -> &'static str {
        "io_uring"
    }

    fn depth(&self) -> u32 {
        self.depth
    }

    fn submit(&mut self, piece: Piece) -> Result<(), Piece> {
        assert_ne!(piece.id, BELL);
        if self.running == self.depth {
            return Err(piece);
        }
        let entry = self.entry(&piece);
        if self.push(&entry).is_err() {
            return Err(piece);
        }
        self.running += 1;
        Ok(())
    }

    fn wait(&mut self, timeout: Option<Duration>, out: &mut Vec<Ended>) -> io::Result<()> {
        self.arm_bell()?;
        let ended = self.collect(out);
        let submitted = match timeout {
            Some(timeout) if !ended && !timeout.is_zero() => self.start_and_wait(timeout),
            _ => self.start(),
        };
        match submitted.map_err(|error| (error.raw_os_error(), error)) {
            // Interrupted, over, or too much has ended: the caller comes again.
            Ok(_) | Err((Some(libc::EINTR | libc::ETIME | libc::EBUSY | libc::EAGAIN), _)) => {}
            Err((_, error)) => return Err(error),
        }
        self.collect(out);
        Ok(())
    }

    fn bell(&self) -> Arc<dyn Bell> {
        Arc::<EventBell>::clone(&self.bell) as Arc<dyn Bell>
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        let mut out = Vec::new();
        while self.running > 0 {
            if self.wait(Some(Duration::from_secs(1)), &mut out).is_err() {
                // Memory that the kernel may still touch must not be given back.
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        // The kernel takes the ring apart later. If this fails, locks are free only then.
        let _ = self.ring.submitter().unregister_files();
    }
}
