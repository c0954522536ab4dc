//! Waiting for the other process by spinning, with an end to it.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use pegaflow_shm::bell::relax;

use crate::error::ToolError;

/// Longest silence of the other process that is put down to a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);
/// Spins between two looks at the clock.
const SPINS_PER_CLOCK: u32 = 1 << 14;

/// How this process spins: with one CPU it gives the CPU away, since nothing happens otherwise.
#[derive(Clone, Copy, Debug)]
pub struct Spins {
    yields: bool,
    pause: bool,
}

impl Spins {
    /// For processes that share `cpus` CPUs; with `pause` they look as often as the product's
    /// loops do, without it all the time.
    pub fn new(cpus: usize, pause: bool) -> Spins {
        Spins {
            yields: cpus < 2,
            pause,
        }
    }

    /// Looks until `ready` answers.
    ///
    /// # Errors
    /// What `ready` fails with, or the other process says nothing for 20 seconds.
    #[inline(always)]
    pub fn until<T>(
        self,
        mut ready: impl FnMut() -> Result<Option<T>, ToolError>,
    ) -> Result<T, ToolError> {
        let mut spins = 0_u32;
        let mut started = None;
        loop {
            if let Some(value) = ready()? {
                return Ok(value);
            }
            if self.pause {
                relax();
            }
            spins += 1;
            if self.yields || spins == SPINS_PER_CLOCK {
                spins = 0;
                give_way(self.yields, &mut started)?;
            }
        }
    }
}

#[cold]
#[inline(never)]
fn give_way(yields: bool, started: &mut Option<Instant>) -> Result<(), ToolError> {
    if yields {
        std::thread::yield_now();
    }
    if started.get_or_insert_with(Instant::now).elapsed() > PATIENCE {
        let what = format!("said nothing for {} s", PATIENCE.as_secs());
        return Err(ToolError::Child {
            process: "the other process of the bench".into(),
            what,
        });
    }
    Ok(())
}
