//! Modes, and the actions that follow from the seed.

#![forbid(unsafe_code)]

use crate::content::Stream;

/// What a scene does to whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The daemon is killed.
    Daemon,
    /// Engine processes are killed.
    Engines,
    /// Both, in any order, or at once.
    Both,
    /// The daemon is stopped and continued, or killed while it is stopped.
    Stops,
    /// The daemon is killed again while it starts.
    Startup,
    /// All of it over a pool that is too small, so that blocks are evicted; only bytes are checked.
    SmallPool,
    /// The same with SSD shards below the pool, from which blocks come back.
    BothTiers,
}

impl Mode {
    /// Every mode.
    pub const ALL: [Mode; 7] = [
        Mode::Daemon,
        Mode::Engines,
        Mode::Both,
        Mode::Stops,
        Mode::Startup,
        Mode::SmallPool,
        Mode::BothTiers,
    ];

    /// Label in tables.
    pub fn label(self) -> &'static str {
        match self {
            Mode::Daemon => "daemon",
            Mode::Engines => "engines",
            Mode::Both => "both",
            Mode::Stops => "stops",
            Mode::Startup => "startup",
            Mode::SmallPool => "small-pool",
            Mode::BothTiers => "both-tiers",
        }
    }

    /// The mode of this label.
    pub fn from_label(label: &str) -> Option<Mode> {
        Mode::ALL.into_iter().find(|mode| mode.label() == label)
    }

    /// Parts of the run's daemon kills.
    fn weight(self) -> u32 {
        match self {
            Mode::Daemon => 6,
            Mode::Engines => 0,
            Mode::Both => 4,
            Mode::Stops | Mode::Startup | Mode::SmallPool | Mode::BothTiers => 3,
        }
    }

    /// Blocks leave the pool.
    pub fn evicts(self) -> bool {
        matches!(self, Mode::SmallPool | Mode::BothTiers)
    }
}

/// Daemon kills of each scene; they add up to `kills` if any of the modes kills daemons.
pub fn shares(modes: &[Mode], kills: u32) -> Vec<(Mode, u32)> {
    let total: u32 = modes.iter().map(|mode| mode.weight()).sum();
    let mut before = 0;
    let mut shares = Vec::new();
    for mode in modes {
        let after = before + mode.weight();
        let upto = |weight: u32| kills * weight / total.max(1);
        shares.push((*mode, upto(after) - upto(before)));
        before = after;
    }
    shares
}

/// One thing that is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Lets everybody work.
    Work {
        /// For so long.
        us: u64,
    },
    /// Kills the daemon.
    KillDaemon,
    /// Stops the daemon, and continues it unless it is killed meanwhile.
    StopDaemon {
        /// For so long.
        us: u64,
    },
    /// Continues the daemon.
    ContinueDaemon,
    /// Kills an engine process.
    KillEngine {
        /// Which one.
        engine: usize,
    },
    /// Starts the daemon and kills it so long after.
    StillbornDaemon {
        /// For so long it may start.
        us: u64,
    },
}

/// What is done between two times of full service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Round {
    /// In this order; what was killed is started again at the end.
    pub steps: Vec<Step>,
    /// The next round begins without waiting until the engines are back in service.
    pub hasty: bool,
}

impl Round {
    /// Daemons killed.
    pub fn daemon_kills(&self) -> u32 {
        let kills = |step: &&Step| matches!(step, Step::KillDaemon | Step::StillbornDaemon { .. });
        self.steps.iter().filter(kills).count() as u32
    }
}

/// The rounds of a scene, from a seed.
#[derive(Clone, Debug)]
pub struct Plan {
    mode: Mode,
    engines: usize,
    random: Stream,
}

impl Plan {
    /// Rounds for `engines` engine processes.
    pub fn new(seed: u64, mode: Mode, engines: usize) -> Plan {
        Plan {
            mode,
            engines,
            random: Stream::new(&[0x706C_616E, seed, mode as u64]),
        }
    }

    /// The next round, with at most `kills` kills of the daemon if that is not 0.
    pub fn next(&mut self, kills: u32) -> Round {
        let work = 20_000 + self.random.below(480_000);
        let mut steps = vec![Step::Work { us: work }];
        let mode = match self.mode {
            Mode::SmallPool | Mode::BothTiers => {
                let any = [Mode::Daemon, Mode::Both, Mode::Stops, Mode::Startup];
                any[self.random.below(4) as usize]
            }
            mode => mode,
        };
        match mode {
            Mode::Daemon | Mode::SmallPool | Mode::BothTiers => steps.push(Step::KillDaemon),
            Mode::Engines => steps.extend(self.engine_kills()),
            Mode::Both => {
                let mut both = self.engine_kills();
                let at = self.random.below(both.len() as u64 + 1) as usize;
                both.insert(at, Step::KillDaemon);
                steps.extend(both);
            }
            Mode::Stops => {
                let us = self.random.below(300_000);
                steps.push(Step::StopDaemon { us });
                if self.random.below(3) > 0 {
                    steps.push(Step::ContinueDaemon);
                    let us = self.random.below(50_000);
                    steps.push(Step::Work { us });
                }
                steps.push(Step::KillDaemon);
            }
            Mode::Startup => {
                steps.push(Step::KillDaemon);
                for _ in 0..(1 + self.random.below(3)).min(u64::from(kills.saturating_sub(1))) {
                    let us = self.random.below(60_000);
                    steps.push(Step::StillbornDaemon { us });
                }
            }
        }
        let hasty = mode == Mode::Daemon && self.random.below(6) == 0 && kills > 1;
        Round { steps, hasty }
    }

    fn engine_kills(&mut self) -> Vec<Step> {
        let mut steps = Vec::new();
        for _ in 0..1 + self.random.below(2) {
            let engine = self.random.below(self.engines as u64) as usize;
            steps.push(Step::KillEngine { engine });
            let us = self.random.below(20_000);
            steps.push(Step::Work { us });
        }
        steps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_rounds() {
        for mode in Mode::ALL {
            let rounds = |seed| {
                let mut plan = Plan::new(seed, mode, 4);
                (0..20).map(|_| plan.next(9)).collect::<Vec<_>>()
            };
            assert_eq!(rounds(7), rounds(7));
            assert_ne!(rounds(7), rounds(8));
        }
    }

    #[test]
    fn the_shares_add_up_and_no_round_kills_more_than_is_left() {
        for kills in [0, 1, 10, 200] {
            let shares = shares(&Mode::ALL, kills);
            assert_eq!(shares.iter().map(|(_, kills)| kills).sum::<u32>(), kills);
        }
        let mut plan = Plan::new(1, Mode::Startup, 4);
        for left in [1, 2, 3, 1, 2, 3] {
            assert!(plan.next(left).daemon_kills() <= left);
        }
    }

    #[test]
    fn labels_are_unique() {
        for mode in Mode::ALL {
            assert_eq!(Mode::from_label(mode.label()), Some(mode));
        }
    }
}
