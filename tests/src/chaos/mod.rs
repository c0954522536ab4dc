//! Chaos: daemon and engines are killed at random under load, and nothing may be lost, wrong or
//! hung.
//!
//! A run is a series of scenes, one for each [`plan::Mode`], each with a daemon of its own and two
//! engine instances. An instance is two processes: a scheduler, several threads of which query,
//! probe, renew, release and hand out work, and the workers, several threads for each of several
//! ranks, that load, verify every byte, compute and save. Whatever a scheduler has seen sealed goes
//! into its ledger, a file that outlives it; after every return of the daemon the whole ledger must
//! be hits.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`plan`] | modes, and the actions that follow from the seed |
//! | [`shape`] | instances, ranks, page sizes, pools |
//! | [`message`] | what the conductor and the engine processes tell each other |
//! | [`timed`] | every call of the library against its bound, and the watchdog |
//! | [`requests`] | one request from submission to completion, and the answers that may come |
//! | [`ledger`] | the blocks that were seen sealed |
//! | [`crew`] | the line from a scheduler's thread to the ranks |
//! | [`scheduler`] | the scheduler process |
//! | [`ranks`] | the worker process |
//! | [`engine`] | what both kinds of process share, and their `main` |
//! | [`fleet`] | the engine processes as the conductor sees them |
//! | [`conductor`] | one scene: load, kills, returns |
//! | [`leftovers`] | what a scene must not leave behind |
//! | [`summary`] | figures of a run, as a table and as JSON |

#![forbid(unsafe_code)]

pub mod conductor;
pub mod crew;
pub mod engine;
pub mod fleet;
pub mod ledger;
pub mod leftovers;
pub mod message;
pub mod plan;
pub mod ranks;
pub mod requests;
pub mod scheduler;
pub mod shape;
pub mod summary;
pub mod timed;

use std::path::PathBuf;
use std::time::Duration;

/// What a run is like.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Program that becomes an engine process with [`engine::ENGINE_ARGUMENT`].
    pub program: PathBuf,
    /// Of every random choice.
    pub seed: u64,
    /// Kills of the daemon in all scenes together.
    pub kills: u32,
    /// Scenes.
    pub modes: Vec<plan::Mode>,
    /// Longest time from the daemon's return to the first query with a hit.
    pub service_bound: Duration,
    /// What a call may take beyond its documented bound: the scheduler of a busy machine.
    pub slack: Duration,
    /// Pool of the scenes in which nothing may be evicted, in MiB.
    pub pool_mib: u64,
    /// Progress on standard error.
    pub verbose: bool,
}

/// Runs all scenes.
///
/// # Errors
/// The first fault, with the seed, the scene and the round that showed it.
pub fn run(settings: &Settings) -> anyhow::Result<summary::Summary> {
    let mut summary = summary::Summary::new(settings);
    for (mode, kills) in plan::shares(&settings.modes, settings.kills) {
        conductor::Scene::new(settings, mode, kills)?.play(&mut summary)?;
    }
    Ok(summary)
}
