//! Since when a drive has had the request that it has had longest: the shard's thread notes it, the
//! lane thread looks.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// No request is at the drive.
const NONE: u64 = u64::MAX;

/// A moment that one thread notes and others look at. It orders nothing else in memory.
#[derive(Debug)]
pub(crate) struct Oldest {
    base: Instant,
    /// Nanoseconds since `base`.
    nanos: AtomicU64,
}

impl Oldest {
    pub fn new() -> Self {
        Self {
            base: Instant::now(),
            nanos: AtomicU64::new(NONE),
        }
    }

    pub fn note(&self, since: Option<Instant>) {
        let nanos = since.map_or(NONE, |since| {
            let nanos = since.saturating_duration_since(self.base).as_nanos();
            u64::try_from(nanos).unwrap_or(NONE)
        });
        self.nanos.store(nanos, Ordering::Relaxed);
    }

    pub fn get(&self) -> Option<Instant> {
        let nanos = self.nanos.load(Ordering::Relaxed);
        (nanos != NONE).then(|| self.base + Duration::from_nanos(nanos))
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;

    use super::*;
    use crate::io::{Bell, Ended, Engine, Piece};
    use crate::memory::aligned;
    use crate::mover::{Alignment, Command, Mover, Op, bounce_area};

    struct NoBell;

    impl Bell for NoBell {
        fn ring(&self) {}
    }

    /// Ends everything at once but the first piece, which ends when the test lets it.
    #[derive(Default)]
    struct Holding {
        ended: Vec<Ended>,
        held: Option<Ended>,
        lets_go: bool,
        any: bool,
    }

    impl Engine for Holding {
        fn name(&self) -> &'static str {
            "holding"
        }

        fn depth(&self) -> u32 {
            4
        }

        fn submit(&mut self, piece: Piece) -> Result<(), Piece> {
            let end = Ended {
                id: piece.id,
                result: Ok(piece.bytes),
            };
            match std::mem::replace(&mut self.any, true) {
                false => self.held = Some(end),
                true => self.ended.push(end),
            }
            Ok(())
        }

        fn wait(&mut self, _: Option<Duration>, out: &mut Vec<Ended>) -> io::Result<()> {
            out.append(&mut self.ended);
            if self.lets_go {
                out.extend(self.held.take());
            }
            Ok(())
        }

        fn bell(&self) -> Arc<dyn Bell> {
            Arc::new(NoBell)
        }
    }

    #[test]
    fn what_the_drive_has_had_longest_stays_the_oldest_whatever_else_ends() {
        let alignment = Alignment {
            memory: 512,
            offset: 512,
        };
        let pool = aligned(1 << 16);
        let mut mover = Mover::new(Holding::default(), pool, bounce_area(4), alignment);
        let oldest = mover.oldest();
        let mut done = Vec::new();
        assert_eq!(oldest.get(), None);
        let mut begin = |mover: &mut Mover<Holding>, id| {
            mover.take(Command {
                id,
                at: Instant::now(),
                offset: 0,
                op: Op::Sync,
            });
            mover.turn(None, &mut done).expect("it never fails");
            done.drain(..).map(|done| done.id).collect::<Vec<_>>()
        };
        assert!(begin(&mut mover, 0).is_empty());
        let first = oldest.get().expect("one is at the drive");
        for id in 1..20 {
            assert_eq!(begin(&mut mover, id), [id]);
            assert_eq!(oldest.get(), Some(first), "after {id}");
        }
        mover.engine_mut().lets_go = true;
        let mut ended = begin(&mut mover, 20);
        ended.sort_unstable();
        assert_eq!(ended, [0, 20]);
        assert_eq!(oldest.get(), None, "nothing is at the drive");
    }
}
