//! Figures of a run, as a table and as JSON.

#![forbid(unsafe_code)]

use std::fmt::Write;
use std::time::Duration;

use serde::Serialize;

use super::Settings;
use super::leftovers::Usage;
use super::message::Tally;
use super::plan::Mode;

/// Figures of one scene.
#[derive(Clone, Debug)]
pub struct SceneFigures {
    /// Its mode.
    pub mode: Mode,
    /// Rounds begun.
    pub rounds: u32,
    /// Daemons killed.
    pub daemon_kills: u32,
    /// Of these, before they were ready.
    pub startup_kills: u32,
    /// Engine processes killed.
    pub engine_kills: u32,
    /// Times the daemon was stopped.
    pub stops: u32,
    /// Blocks asked for again after a return.
    pub swept_blocks: u64,
    /// Blocks of queries that came back from below the pool.
    pub ssd_hits: u64,
    /// From the start of a daemon until it serves.
    pub starts: Vec<Duration>,
    /// From the daemon's return to a scheduler's first query with a hit.
    pub service: Vec<Duration>,
    /// From the daemon's return to the first verified load.
    pub first_loads: Vec<Duration>,
    /// Times of service beyond the bound.
    pub late: u32,
    /// What the engines did.
    pub tally: Tally,
}

impl SceneFigures {
    /// Of a scene that has not begun.
    pub fn new(mode: Mode) -> SceneFigures {
        SceneFigures {
            mode,
            rounds: 0,
            daemon_kills: 0,
            startup_kills: 0,
            engine_kills: 0,
            stops: 0,
            swept_blocks: 0,
            ssd_hits: 0,
            starts: Vec::new(),
            service: Vec::new(),
            first_loads: Vec::new(),
            late: 0,
            tally: Tally::default(),
        }
    }

    /// Notes how long a scheduler took to be of service again.
    pub fn note_service(&mut self, took: Duration, bound: Duration) {
        self.service.push(took);
        self.late += u32::from(took > bound);
    }

    /// One line on standard error.
    pub fn progress(&self, kills: u32) {
        let last = self.service.last().copied().unwrap_or_default();
        eprintln!(
            "{:>10}: round {:>3}, {:>3} of {kills} daemon kills, {:>3} engine kills, back in {:.0} ms, \
             {} blocks asked for again",
            self.mode.label(),
            self.rounds,
            self.daemon_kills,
            self.engine_kills,
            last.as_secs_f64() * 1e3,
            self.swept_blocks,
        );
    }
}

/// Median, 99th percentile and maximum in ms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Spread {
    /// Values.
    pub count: usize,
    /// Median.
    pub p50_ms: f64,
    /// 99th percentile.
    pub p99_ms: f64,
    /// Maximum.
    pub max_ms: f64,
}

impl Spread {
    /// Of these times.
    pub fn of(times: &[Duration]) -> Spread {
        let mut sorted = times.to_vec();
        sorted.sort();
        let Some(last) = sorted.last() else {
            return Spread::default();
        };
        let ms = |time: &Duration| time.as_secs_f64() * 1e3;
        let at = |share: f64| ms(&sorted[((sorted.len() - 1) as f64 * share).round() as usize]);
        Spread {
            count: sorted.len(),
            p50_ms: at(0.5),
            p99_ms: at(0.99),
            max_ms: ms(last),
        }
    }

    fn text(self) -> String {
        let Spread {
            count,
            p50_ms,
            p99_ms,
            max_ms,
        } = self;
        format!("median {p50_ms:.0} ms, p99 {p99_ms:.0} ms, max {max_ms:.0} ms, {count} measured")
    }
}

/// Figures of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Seed.
    pub seed: u64,
    /// Bound of the time of service in ms.
    pub service_bound_ms: u64,
    /// Rows: one for each scene.
    pub scenes: Vec<Row>,
    /// From the start of a daemon until it serves.
    pub start: Spread,
    /// From the daemon's return to a scheduler's first query with a hit.
    pub service: Spread,
    /// From the daemon's return to the first verified load of a rank.
    pub first_load: Spread,
    /// Times of service beyond the bound.
    pub late: u32,
    /// What the engines did.
    pub tally: Tally,
    #[serde(skip)]
    times: [Vec<Duration>; 3],
}

/// One scene in the table.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Mode.
    pub scene: &'static str,
    /// Rounds.
    pub rounds: u32,
    /// Daemons killed.
    pub daemon_kills: u32,
    /// Of these, before they were ready.
    pub startup_kills: u32,
    /// Engine processes killed.
    pub engine_kills: u32,
    /// Times the daemon was stopped.
    pub stops: u32,
    /// Blocks seen sealed.
    pub sealed_blocks: u64,
    /// Blocks asked for again after returns, each a hit.
    pub swept_blocks: u64,
    /// Blocks of queries that came back from below the pool.
    pub ssd_hits: u64,
    /// Bytes compared, none different.
    pub verified_bytes: u64,
    /// Anonymous memory of the last daemon at the end, in KiB.
    pub memory_kib: u64,
    /// The same of a fresh daemon over the same cache.
    pub fresh_memory_kib: u64,
}

impl Summary {
    /// Of a run that has not begun.
    pub fn new(settings: &Settings) -> Summary {
        Summary {
            seed: settings.seed,
            service_bound_ms: settings.service_bound.as_millis() as u64,
            scenes: Vec::new(),
            start: Spread::default(),
            service: Spread::default(),
            first_load: Spread::default(),
            late: 0,
            tally: Tally::default(),
            times: Default::default(),
        }
    }

    /// Adds a scene.
    pub fn add(&mut self, scene: SceneFigures, used: Usage, fresh: Usage) {
        self.scenes.push(Row {
            scene: scene.mode.label(),
            rounds: scene.rounds,
            daemon_kills: scene.daemon_kills,
            startup_kills: scene.startup_kills,
            engine_kills: scene.engine_kills,
            stops: scene.stops,
            sealed_blocks: scene.tally.sealed,
            swept_blocks: scene.swept_blocks,
            ssd_hits: scene.ssd_hits,
            verified_bytes: scene.tally.verified_bytes,
            memory_kib: used.memory_kib,
            fresh_memory_kib: fresh.memory_kib,
        });
        self.late += scene.late;
        self.tally.add(&scene.tally);
        let added = [scene.starts, scene.service, scene.first_loads];
        for (all, new) in self.times.iter_mut().zip(added) {
            all.extend(new);
        }
        [self.start, self.service, self.first_load] =
            std::array::from_fn(|at| Spread::of(&self.times[at]));
    }

    /// Daemons killed in all scenes.
    pub fn daemon_kills(&self) -> u32 {
        self.scenes.iter().map(|row| row.daemon_kills).sum()
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{:<10} {:>6} {:>6} {:>8} {:>7} {:>5} {:>7} {:>8} {:>8} {:>9} {:>13}\n",
            "scene",
            "rounds",
            "daemon",
            "start-up",
            "engines",
            "stops",
            "sealed",
            "re-asked",
            "from SSD",
            "verified",
            "memory/fresh"
        );
        for row in &self.scenes {
            let _ = writeln!(
                text,
                "{:<10} {:>6} {:>6} {:>8} {:>7} {:>5} {:>7} {:>8} {:>8} {:>5} MiB {:>5}/{:<3} MiB",
                row.scene,
                row.rounds,
                row.daemon_kills,
                row.startup_kills,
                row.engine_kills,
                row.stops,
                row.sealed_blocks,
                row.swept_blocks,
                row.ssd_hits,
                row.verified_bytes >> 20,
                row.memory_kib >> 10,
                row.fresh_memory_kib >> 10
            );
        }
        let Tally {
            hits, loads, calls, ..
        } = &self.tally;
        let _ = writeln!(
            text,
            "\n{} daemon kills, seed {}: 0 wrong bytes, 0 hangs, 0 lost blocks; {hits} queries with \
             hits, {loads} loads verified",
            self.daemon_kills(),
            self.seed
        );
        let _ = writeln!(text, "start to serving      {}", self.start.text());
        let _ = writeln!(text, "back in service       {}", self.service.text());
        let _ = writeln!(text, "first verified load   {}", self.first_load.text());
        let (late, bound) = (self.late, self.service_bound_ms);
        let _ = writeln!(text, "service after {bound} ms: {late}");
        let _ = writeln!(text, "\ncall         calls     longest  beyond its bound");
        for (call, longest) in calls {
            let _ = writeln!(
                text,
                "{call:<10} {:>7} {:>8.1} ms {:>11.1} ms",
                longest.count,
                longest.us as f64 / 1e3,
                longest.over_us as f64 / 1e3
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_of_one_value_is_that_value() {
        let spread = Spread::of(&[Duration::from_millis(7)]);
        assert_eq!((spread.p50_ms, spread.max_ms, spread.count), (7.0, 7.0, 1));
        assert_eq!(Spread::of(&[]), Spread::default());
    }
}
