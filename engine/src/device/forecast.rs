//! When the chunks of one direction should be done, so that the thread sleeps until then.
//!
//! The bus's rate is learnt from what began and ended when it was seen to: from chunks of which a
//! look shortly before found them under way, and from whole runs, which begin with a chunk on an
//! idle bus and end with one that has none behind it. A chunk that is done at the first look may
//! have been done for long. Taken for the bus's rate, that would let the thread sleep longer each
//! time; so the next chunks are looked for earlier instead, until one is found under way.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

/// What the bus is taken to do until chunks have shown it, in bytes a microsecond.
const FIRST_BYTES_PER_US: f64 = 50_000.0;
/// Between which any bus is.
const RATES: (f64, f64) = (100.0, 1e6);
/// What a chunk takes beside its bytes.
const CHUNK_OVERHEAD: Duration = Duration::from_micros(12);
/// Chunks of less say little about the bus.
const TELLING_BYTES: u64 = 4 << 20;
/// A chunk that should be done this soon is waited for awake, when nothing is queued behind it: a
/// sleep may take as much longer than it should.
const SOON: Duration = Duration::from_micros(60);
/// After a chunk of this many bytes and more, a sleep that takes longer is of no weight.
const LONG_BYTES: u64 = 32 << 20;
/// A chunk of more is a few copies, which take the thread next to no time: while such chunks follow
/// each other, the bus is busy for sure.
const FEW_COPIES_BYTES: u64 = 32 << 20;
/// The same for such a chunk.
const SOON_OF_LONG: Duration = Duration::from_micros(15);
/// For how long past its time a chunk is waited for awake, at most.
const LATE: Duration = Duration::from_micros(100);
/// The same for a long one: as much costs a sleep.
const LATE_OF_LONG: Duration = Duration::from_micros(15);
/// How long to sleep when a chunk is later than that, at least.
const LATE_PAUSE: Duration = Duration::from_micros(25);
/// And at least this share of its time,
const LATE_PAUSE_SHARE: u32 = 128;
/// or this one, while the bus has another one behind it.
const LATE_PAUSE_SHARE_BEFORE: u32 = 32;
/// A look before the end says when that was if it lies back no longer than this share of the
/// chunk's time: a pause, and the sleep's own delay.
const FRESH_SHARE: u32 = 3;
/// Of so many chunks two are looked for when they should be done, to learn the bus's rate. The
/// others have a chunk behind them that keeps the bus busy, and are looked for when they are done
/// for sure.
const PROBED: u32 = 16;
/// By which share of its time such a chunk is looked for late.
const MARGIN: u32 = 6;
/// By how much a chunk that was done at the first look lets the bus be taken for faster.
const EARLIER: f64 = 0.08;
/// The same while chunks are long, whose times are sharp, and for each further one in a row twice
/// as much as for the one before, up to the second figure.
const EARLIER_OF_LONG: (f64, f64) = (0.005, 0.08);
/// A run's end is seen if a look found its last chunk under way no longer ago than this share of
/// the run.
const SHARP_SHARE: u32 = 64;

/// A chunk under way, as it is waited for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Awaited {
    bytes: u64,
    /// How long it should have the bus.
    bus: Duration,
    started: Instant,
    /// When it should be done.
    expected: Instant,
    /// How much later it is looked for when the bus has another one behind it.
    margin: Duration,
    /// When it was last found not to be.
    unfinished: Option<Instant>,
}

impl Awaited {
    /// Whether a look at it is worth while: of a long one, when half of its time is over.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.bytes < LONG_BYTES || now + self.bus / 2 >= self.expected
    }

    /// A look has found it under way.
    pub(super) fn is_unfinished(&mut self, now: Instant) {
        self.unfinished = Some(now);
    }
}

/// One direction's bus.
#[derive(Debug)]
pub(super) struct Forecast {
    bytes_per_us: f64,
    /// When the chunks under way should all be done.
    busy_until: Instant,
    /// When the last chunk was seen to be done.
    last_done: Instant,
    /// That was when it came.
    last_is_seen: bool,
    /// When the bus was given its first chunk after it had none, and what it has been given since.
    run_began: Instant,
    run_bytes: u64,
    run_chunks: u32,
    /// How many of these are so short that they may be many copies.
    run_short: u32,
    /// Chunks that were started.
    started: u32,
    /// Chunks under way.
    under_way: u32,
    /// By how much the next long chunk that is done at the first look lets the bus be faster.
    earlier: f64,
}

impl Forecast {
    pub(super) fn new(now: Instant) -> Forecast {
        Forecast {
            bytes_per_us: FIRST_BYTES_PER_US,
            busy_until: now,
            last_done: now,
            last_is_seen: false,
            run_began: now,
            run_bytes: 0,
            run_chunks: 0,
            run_short: 0,
            started: 0,
            under_way: 0,
            earlier: EARLIER_OF_LONG.0,
        }
    }

    fn on_the_bus(&self, bytes: u64) -> Duration {
        Duration::from_nanos((bytes as f64 * 1e3 / self.bytes_per_us) as u64)
    }

    /// A chunk was queued behind those that are under way.
    pub(super) fn start(&mut self, bytes: u64, now: Instant) -> Awaited {
        let bus = self.on_the_bus(bytes);
        // Chunks queued before it go first; what they take at the start overlaps.
        self.busy_until = (self.busy_until + bus).max(now + bus + CHUNK_OVERHEAD);
        if self.under_way == 0 {
            (self.run_began, self.run_bytes) = (now, 0);
            (self.run_chunks, self.run_short) = (0, 0);
        }
        self.under_way += 1;
        self.run_bytes += bytes;
        self.run_chunks = self.run_chunks.wrapping_add(1);
        self.started = self.started.wrapping_add(1);
        let is_short = bytes <= FEW_COPIES_BYTES;
        self.run_short = self.run_short.saturating_add(u32::from(is_short));
        // Of long chunks, the end of a run tells the same.
        let is_probed = match is_short {
            true => self.started % PROBED < 2,
            false => self.run_chunks % PROBED >= PROBED - 2,
        };
        Awaited {
            bytes,
            bus,
            started: now,
            expected: self.busy_until,
            margin: if is_probed {
                Duration::ZERO
            } else {
                bus / MARGIN
            },
            unfinished: None,
        }
    }

    /// A chunk is done; `left` are those under way behind it. Returns the time for which it had the
    /// bus for itself.
    pub(super) fn done<'a>(
        &mut self,
        chunk: Awaited,
        left: impl Iterator<Item = &'a mut Awaited>,
        now: Instant,
    ) -> Duration {
        let since = self.last_done.max(chunk.started);
        let busy = now.saturating_duration_since(since);
        let micros = busy.as_secs_f64() * 1e6;
        let is_fresh = |at: &Instant| now.saturating_duration_since(*at) <= busy / FRESH_SHARE;
        let still_there = chunk.unfinished.filter(is_fresh);
        let is_seen = still_there.is_some();
        self.under_way -= 1;
        let is_last = self.under_way == 0;
        let run = now.saturating_duration_since(self.run_began);
        let is_sharp = |at: Instant| now.saturating_duration_since(at) <= run / SHARP_SHARE;
        if chunk.bytes >= TELLING_BYTES && micros > 1.0 {
            // The last one may be what is left.
            let is_long = self.run_short <= 1 && self.run_bytes > FEW_COPIES_BYTES;
            if is_last && is_long && still_there.is_some_and(is_sharp) {
                let micros = run.saturating_sub(CHUNK_OVERHEAD).as_secs_f64() * 1e6;
                self.learn(self.run_bytes as f64 / micros.max(1.0));
            } else if is_seen && self.last_is_seen {
                self.learn(chunk.bytes as f64 / micros);
            } else if !is_seen && is_long && (is_last || chunk.margin.is_zero()) {
                self.bytes_per_us *= 1.0 + self.earlier;
                self.earlier = (2.0 * self.earlier).min(EARLIER_OF_LONG.1);
            } else if !is_seen && chunk.margin.is_zero() {
                self.bytes_per_us *= 1.0 + EARLIER;
            }
            self.bytes_per_us = self.bytes_per_us.clamp(RATES.0, RATES.1);
        }
        self.last_is_seen = is_seen;
        self.last_done = now;
        // What is behind it has the bus since the last look, or since nobody knows when.
        let mut at = still_there.unwrap_or(now);
        for next in left {
            at += self.on_the_bus(next.bytes);
            if still_there.is_none() {
                at = at.min(next.expected);
            }
            next.expected = at;
        }
        self.busy_until = at;
        busy
    }

    fn learn(&mut self, bytes_per_us: f64) {
        self.bytes_per_us += (bytes_per_us - self.bytes_per_us) / 4.0;
        self.earlier = EARLIER_OF_LONG.0;
    }

    /// When to look at the chunks again: `None` when nothing is under way.
    pub(super) fn next_look(
        chunks: impl Iterator<Item = Awaited>,
        now: Instant,
    ) -> Option<Instant> {
        let (mut next, mut count) = (None::<Awaited>, 0);
        for chunk in chunks {
            count += 1;
            next = match next {
                Some(next) if next.expected <= chunk.expected => Some(next),
                _ => Some(chunk),
            };
        }
        let Awaited {
            expected: first,
            margin,
            bytes,
            bus,
            ..
        } = next?;
        if count > 1 {
            // The bus has the next chunk already: nobody waits for this one to be noticed.
            let look = first + margin;
            let pause = LATE_PAUSE.max(bus / LATE_PAUSE_SHARE_BEFORE);
            return Some(if look > now { look } else { now + pause });
        }
        let late = if bytes < LONG_BYTES {
            LATE
        } else {
            LATE_OF_LONG
        };
        if now > first + late {
            return Some(now + LATE_PAUSE.max(bus / LATE_PAUSE_SHARE));
        }
        let early = if bytes < LONG_BYTES {
            SOON
        } else {
            SOON_OF_LONG
        };
        let soon = first.checked_sub(early).unwrap_or(now);
        Some(soon.max(now))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    /// A bus, and a thread that queues two chunks at a time and whose sleeps take longer than they
    /// should; after `in_run` of them it has none for a while. Returns the share of the bus that it
    /// used within the runs, sleeps for each chunk, and microseconds awake for each run, all of the
    /// later half.
    fn run(
        bytes_per_us: f64,
        (chunk, in_run): (u64, u32),
        (oversleep, launch): (Duration, Duration),
        chunks: u32,
    ) -> (f64, f64, f64) {
        let begin = Instant::now();
        let mut forecast = Forecast::new(begin);
        let time = Duration::from_nanos((chunk as f64 * 1e3 / bytes_per_us) as u64);
        let (mut now, mut bus_free, mut done, mut queued) = (begin, begin, 0, 0);
        let (mut busy, mut measured, mut sleeps, mut awake) = (Duration::ZERO, 0, 0, 0);
        let mut under_way: VecDeque<(Awaited, Instant)> = VecDeque::new();
        while done < chunks {
            let began = now;
            let first = done;
            while done < first + in_run {
                while let Some((awaited, end)) = under_way.front_mut()
                    && awaited.is_due(now)
                {
                    if *end > now {
                        awaited.is_unfinished(now);
                        break;
                    }
                    let (awaited, _) = under_way.pop_front().unwrap();
                    forecast.done(awaited, under_way.iter_mut().map(|(a, _)| a), now);
                    done += 1;
                }
                while under_way.len() < 2 && queued < first + in_run {
                    bus_free = bus_free.max(now + launch) + time;
                    under_way.push_back((forecast.start(chunk, now), bus_free));
                    now += launch;
                    queued += 1;
                }
                if let Some(look) = Forecast::next_look(under_way.iter().map(|(a, _)| *a), now) {
                    let sleep = look.saturating_duration_since(now);
                    let (slept, turn) = match sleep.is_zero() {
                        true => (0, Duration::from_micros(1)),
                        false => (1, sleep + oversleep),
                    };
                    now += turn;
                    if first >= chunks / 2 {
                        (sleeps, awake) = (sleeps + slept, awake + 1 - slept);
                    }
                }
            }
            if first >= chunks / 2 {
                busy += now - began;
                measured += in_run;
            }
            now += Duration::from_millis(3);
        }
        let used = time.as_secs_f64() * f64::from(measured) / busy.as_secs_f64();
        let runs = f64::from(measured / in_run);
        (
            used,
            f64::from(sleeps) / f64::from(measured),
            f64::from(awake) / runs,
        )
    }

    #[test]
    fn sleeps_that_are_late_do_not_make_the_bus_seem_slower_and_slower() {
        for us in [1, 8, 60, 150] {
            for rate in [55_000.0, 12_000.0, 25_000.0, 110_000.0] {
                let oversleep = Duration::from_micros(us);
                for chunk in [32 << 20, 256 << 20] {
                    let delays = (oversleep, Duration::ZERO);
                    let (used, sleeps, _) = run(rate, (chunk, 4000), delays, 8000);
                    assert!(
                        used > 0.97,
                        "{used:.3} of {rate} bytes/us, chunks of {chunk}, sleeps {us} us late"
                    );
                    assert!(sleeps < 2.5, "{sleeps:.1} sleeps for each chunk at {rate}");
                }
            }
        }
    }

    #[test]
    fn the_end_of_a_save_is_met_with_few_sleeps_and_little_waking() {
        for us in [1, 8, 20] {
            for rate in [54_300.0, 26_100.0] {
                for chunks in [(256 << 20, 4), (256 << 20, 1), (64 << 20, 16)] {
                    let delays = (Duration::from_micros(us), Duration::from_micros(5));
                    let (used, sleeps, awake) = run(rate, chunks, delays, 2000);
                    let what = format!("{chunks:?} at {rate}, {us} us late: {used:.4} of the bus");
                    assert!(used > 0.995, "{what}");
                    assert!(sleeps < 1.5, "{what}, {sleeps:.2} sleeps for each chunk");
                    assert!(awake < 30.0, "{what}, {awake:.1} us awake for each run");
                }
            }
        }
    }

    #[test]
    fn a_thread_that_takes_nearly_as_long_for_a_chunk_as_the_bus_keeps_it_busy() {
        // Such as batches of many copies: 0.62 ms on the bus.
        for (us, launch, least) in [
            (8, 300, 0.97),
            (8, 450, 0.95),
            (8, 550, 0.93),
            (50, 500, 0.95),
        ] {
            let delays = (Duration::from_micros(us), Duration::from_micros(launch));
            let (used, ..) = run(54_300.0, (32 << 20, 32), delays, 4000);
            assert!(
                used > least,
                "{used:.3} of the bus, {launch} us for each chunk"
            );
        }
    }

    #[test]
    fn a_bus_that_was_slow_for_a_while_is_found_to_be_fast_again() {
        let begin = Instant::now();
        let mut forecast = Forecast::new(begin);
        forecast.bytes_per_us = RATES.0;
        let mut now = begin;
        let bytes = 32 << 20;
        // Each is done long before it is looked for.
        for _ in 0..PROBED * 100 {
            let awaited = forecast.start(bytes, now);
            now = awaited.expected;
            forecast.done(awaited, std::iter::empty(), now);
        }
        assert!(forecast.on_the_bus(bytes) < Duration::from_millis(1));
    }
}
