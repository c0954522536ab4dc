//! Pieces through threads that call `pread`, `pwrite` and `fdatasync`.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::{Bell, Ended, Engine, Kind, Piece};
use crate::memory::Area;

/// An engine over a pool of threads, one per piece at a time.
pub(crate) struct Threads {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    // What keeps the pieces' memory mapped.
    _areas: Vec<Area>,
    running: u32,
}

struct Shared {
    file: Arc<File>,
    todo: Mutex<Todo>,
    work: Condvar,
    done: Mutex<Done>,
    news: Condvar,
}

#[derive(Default)]
struct Todo {
    pieces: VecDeque<Piece>,
    stop: bool,
}

#[derive(Default)]
struct Done {
    ended: Vec<Ended>,
    rung: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code panics while it holds one of these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Bell for Shared {
    fn ring(&self) {
        lock(&self.done).rung = true;
        self.news.notify_one();
    }
}

impl Shared {
    fn work(&self) {
        loop {
            let mut todo = lock(&self.todo);
            let piece = loop {
                if let Some(piece) = todo.pieces.pop_front() {
                    break piece;
                }
                if todo.stop {
                    return;
                }
                todo = self.work.wait(todo).unwrap_or_else(PoisonError::into_inner);
            };
            drop(todo);
            let result = self.call(&piece);
            lock(&self.done).ended.push(Ended {
                id: piece.id,
                result,
            });
            self.news.notify_one();
        }
    }

    fn call(&self, piece: &Piece) -> Result<u32, i32> {
        let file = self.file.as_raw_fd();
        let memory = piece.address.as_ptr().cast::<libc::c_void>();
        let (bytes, offset) = (piece.bytes as usize, piece.offset as libc::off_t);
        loop {
            let moved = match piece.kind {
                Kind::Read => {
                    // SAFETY: the piece's maker promises that the memory is mapped and nobody
                    // else's until the piece has ended, which is after this call.
                    unsafe { libc::pread(file, memory, bytes, offset) }
                }
                Kind::Write => {
                    // SAFETY: as above.
                    unsafe { libc::pwrite(file, memory, bytes, offset) }
                }
                Kind::Sync => {
                    // SAFETY: it touches no memory, and the descriptor is open.
                    unsafe { libc::fdatasync(file) as isize }
                }
            };
            if moved >= 0 {
                return Ok(moved as u32);
            }
            match io::Error::last_os_error().raw_os_error() {
                Some(libc::EINTR) => {}
                error => return Err(error.unwrap_or(libc::EIO)),
            }
        }
    }
}

impl Threads {
    /// `depth` threads for pieces of `file`, whose memory lies in `areas`.
    pub fn new(file: Arc<File>, depth: u32, areas: Vec<Area>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            file,
            todo: Mutex::default(),
            work: Condvar::new(),
            done: Mutex::default(),
            news: Condvar::new(),
        });
        let mut engine = Self {
            shared,
            workers: Vec::new(),
            _areas: areas,
            running: 0,
        };
        for index in 0..depth {
            let shared = Arc::clone(&engine.shared);
            let thread = std::thread::Builder::new()
                .name(format!("ssd-io-{index}"))
                .spawn(move || shared.work())?;
            engine.workers.push(thread);
        }
        Ok(engine)
    }
}

impl Engine for Threads {
    fn name(&self) -> &'static str {
        "threads"
    }

    fn depth(&self) -> u32 {
        self.workers.len() as u32
    }

    fn submit(&mut self, piece: Piece) -> Result<(), Piece> {
        if self.running == self.depth() {
            return Err(piece);
        }
        self.running += 1;
        lock(&self.shared.todo).pieces.push_back(piece);
        self.shared.work.notify_one();
        Ok(())
    }

    fn wait(&mut self, timeout: Option<Duration>, out: &mut Vec<Ended>) -> io::Result<()> {
        let mut done = lock(&self.shared.done);
        if let Some(timeout) = timeout {
            done = self
                .shared
                .news
                .wait_timeout_while(done, timeout, |done| done.ended.is_empty() && !done.rung)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        done.rung = false;
        self.running -= done.ended.len() as u32;
        out.append(&mut done.ended);
        Ok(())
    }

    fn bell(&self) -> Arc<dyn Bell> {
        Arc::<Shared>::clone(&self.shared) as Arc<dyn Bell>
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        lock(&self.shared.todo).stop = true;
        self.shared.work.notify_all();
        for worker in self.workers.drain(..) {
            // A worker that panicked has printed why; nothing of it touches memory any more.
            let _ = worker.join();
        }
    }
}
