use std::io;
use std::sync::atomic::AtomicU32;
use std::sync::{Condvar, Mutex, mpsc};

use super::*;
use crate::io::{Ended, Piece};
use crate::memory::aligned;
use crate::mover::{Alignment, Op, bounce_area};

/// Counts its rings.
#[derive(Default)]
struct CountingBell {
    rings: AtomicU32,
    rung: Mutex<bool>,
    news: Condvar,
}

impl Bell for CountingBell {
    fn ring(&self) {
        self.rings.fetch_add(1, Ordering::SeqCst);
        *self.rung.lock().expect("nobody panics") = true;
        self.news.notify_one();
    }
}

/// Ends everything at once; with nothing to end it waits for its bell, however long.
struct Sleeping {
    bell: Arc<CountingBell>,
    ended: Vec<Ended>,
}

impl Engine for Sleeping {
    fn name(&self) -> &'static str {
        "sleeping"
    }

    fn depth(&self) -> u32 {
        4
    }

    fn submit(&mut self, piece: Piece) -> Result<(), Piece> {
        self.ended.push(Ended {
            id: piece.id,
            result: Ok(piece.bytes),
        });
        Ok(())
    }

    fn wait(&mut self, timeout: Option<Duration>, out: &mut Vec<Ended>) -> io::Result<()> {
        if timeout.is_some() && self.ended.is_empty() {
            let rung = self.bell.rung.lock().expect("nobody panics");
            let rung = self.bell.news.wait_while(rung, |rung| !*rung);
            *rung.expect("nobody panics") = false;
        }
        out.append(&mut self.ended);
        Ok(())
    }

    fn bell(&self) -> Arc<dyn Bell> {
        Arc::<CountingBell>::clone(&self.bell)
    }
}

#[test]
fn a_ring_behind_many_commands_wakes_for_all_and_nothing_rings_without_one() {
    const ROUNDS: u32 = 20;
    const COMMANDS: u32 = 30;
    let bell = Arc::new(CountingBell::default());
    let engine = Sleeping {
        bell: bell.clone(),
        ended: Vec::new(),
    };
    let alignment = Alignment {
        memory: 512,
        offset: 512,
    };
    let mover = Mover::new(engine, aligned(4096), bounce_area(4), alignment);
    let (wake, news) = mpsc::channel();
    let wake = Arc::new(move || {
        // The test may be over.
        let _ = wake.send(());
    });
    let lock = Arc::new(tempfile::tempfile().expect("a file"));
    let mut port = ThreadPort::start("ssd-test".into(), mover, lock, 64, wake).expect("a thread");
    for round in 0..ROUNDS {
        let rings = bell.rings.load(Ordering::SeqCst);
        for id in 0..COMMANDS {
            port.send(Command {
                id,
                at: Instant::now(),
                offset: 0,
                op: Op::Sync,
            });
        }
        assert_eq!(bell.rings.load(Ordering::SeqCst), rings, "round {round}");
        port.ring();
        let mut ended = 0;
        while ended < COMMANDS {
            while port.receive().is_some() {
                ended += 1;
            }
            if ended < COMMANDS {
                let woken = news.recv_timeout(Duration::from_secs(60));
                woken.expect("the thread was not woken, or does not tell");
            }
        }
        port.ring();
        let rung = bell.rings.load(Ordering::SeqCst) - rings;
        assert!(rung <= 1, "{rung} rings for one batch");
    }
}
