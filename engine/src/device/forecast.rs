//! When the chunks of one direction should be done, so that the thread sleeps until then.
//!
//! The bus's rate is learnt from chunks whose begin and end were seen when they came: a look
//! shortly before found the chunk under way. A chunk that is done at the first look may have been
//! done for long. Taken for the bus's rate, that would let the thread sleep longer each time; so
//! the next chunks are looked for earlier instead, until one is found under way. The one behind it
//! is looked at, too: if it is done as well, the bus has had nothing to do, and is at least as fast
//! as both tell.
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
/// The same for such a chunk.
const SOON_OF_LONG: Duration = Duration::from_micros(15);
/// For how long past its time a chunk is waited for awake, at most.
const LATE: Duration = Duration::from_micros(100);
/// And at most for this share of its time: of long chunks, being awake is most of what they cost.
const LATE_SHARE: u32 = 128;
/// How long to sleep when a chunk is later than that, at least.
const LATE_PAUSE: Duration = Duration::from_micros(25);
/// And at least this share of its time, while the bus has another one behind it.
const LATE_PAUSE_SHARE: u32 = 32;
/// And this share of how late it is: a GPU that stands still does not keep a CPU busy.
const LATER_SHARE: u32 = 64;
/// A look before the end says when that was if it lies back no longer than this share of the
/// chunk's time: a pause, and the sleep's own delay.
const FRESH_SHARE: u32 = 3;
/// Of so many chunks two are looked for when they should be done, to learn the bus's rate. The
/// others have a chunk behind them that keeps the bus busy, and are looked for when they are done
/// for sure.
const PROBED: u32 = 16;
/// By which share of its time such a chunk is looked for late.
const MARGIN: u32 = 6;
/// Chunks with none behind them are looked for when they should be done, too. When so many in a row
/// are done at the first look, more than the sleeps is late.
const UNSEEN_ENDS: u32 = 8;
/// By how much a chunk that was done at the first look lets the bus be taken for faster.
const EARLIER: f64 = 1.08;

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
    /// The one before it may have been done for long.
    is_suspect: bool,
}

impl Awaited {
    /// Whether a look at it is worth while: of a long one, when half of its time is over, and once
    /// when the one before it may have been done for long.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.bytes < LONG_BYTES || self.is_suspect || now + self.bus / 2 >= self.expected
    }

    /// A look has found it under way.
    pub(super) fn is_unfinished(&mut self, now: Instant) {
        self.unfinished = Some(now);
        self.is_suspect = false;
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
    /// Since when the bus has done what the last look has found done, if it was idle before, and
    /// how much that is.
    look_began: Option<Instant>,
    look_bytes: u64,
    /// A look has found several chunks done, and none under way since.
    is_behind: bool,
    /// Chunks in a row, with none behind them, that were done at the first look.
    unseen_ends: u32,
    /// Chunks that were started.
    started: u32,
}

impl Forecast {
    pub(super) fn new(now: Instant) -> Forecast {
        Forecast {
            bytes_per_us: FIRST_BYTES_PER_US,
            busy_until: now,
            last_done: now,
            last_is_seen: false,
            look_began: None,
            look_bytes: 0,
            is_behind: false,
            unseen_ends: 0,
            started: 0,
        }
    }

    /// Bytes that should take the bus this long.
    pub(super) fn bytes_in(&self, time: Duration) -> u64 {
        (self.bytes_per_us * time.as_secs_f64() * 1e6) as u64
    }

    fn on_the_bus(&self, bytes: u64) -> Duration {
        Duration::from_nanos((bytes as f64 * 1e3 / self.bytes_per_us) as u64)
    }

    /// A chunk was queued behind those that are under way.
    pub(super) fn start(&mut self, bytes: u64, now: Instant) -> Awaited {
        let bus = self.on_the_bus(bytes);
        // Chunks queued before it go first; what they take at the start overlaps.
        self.busy_until = (self.busy_until + bus).max(now + bus + CHUNK_OVERHEAD);
        self.started = self.started.wrapping_add(1);
        Awaited {
            bytes,
            bus,
            started: now,
            expected: self.busy_until,
            margin: if self.started % PROBED < 2 || self.is_behind {
                Duration::ZERO
            } else {
                bus / MARGIN
            },
            unfinished: None,
            is_suspect: false,
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
        let mut left = left.peekable();
        if chunk.bytes >= TELLING_BYTES && micros > 1.0 {
            self.unseen_ends = match is_seen {
                true => 0,
                false => self
                    .unseen_ends
                    .saturating_add(u32::from(left.peek().is_none())),
            };
            let is_probed = chunk.margin.is_zero() || self.unseen_ends > UNSEEN_ENDS;
            let seen = chunk.bytes as f64 / micros;
            if is_seen && self.last_is_seen {
                self.bytes_per_us += (seen - self.bytes_per_us) / 4.0;
            } else if !is_seen && is_probed {
                self.bytes_per_us *= EARLIER;
            }
        }
        self.learn_from_look(chunk, now);
        self.bytes_per_us = self.bytes_per_us.clamp(RATES.0, RATES.1);
        self.is_behind &= !is_seen;
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
            next.is_suspect |= !is_seen;
        }
        self.busy_until = at;
        busy
    }

    /// Several chunks that one look finds done, the first of which came upon an idle bus, tell how
    /// fast it is at least.
    fn learn_from_look(&mut self, chunk: Awaited, now: Instant) {
        if now > self.last_done {
            let was_idle = chunk.started >= self.last_done;
            self.look_began = was_idle.then_some(chunk.started);
            self.look_bytes = chunk.bytes;
            return;
        }
        self.look_bytes += chunk.bytes;
        if self.look_bytes < TELLING_BYTES {
            return;
        }
        self.is_behind = true;
        if let Some(began) = self.look_began {
            let micros = now.saturating_duration_since(began).as_secs_f64() * 1e6;
            let least = self.look_bytes as f64 / micros.max(1.0);
            self.bytes_per_us = self.bytes_per_us.max(least);
        }
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
        let late_pause = |least: Duration| {
            let late = now.saturating_duration_since(first);
            LATE_PAUSE.max(least).max(late / LATER_SHARE)
        };
        if count > 1 {
            // The bus has the next chunk already: nobody waits for this one to be noticed.
            let look = first + margin;
            let pause = late_pause(bus / LATE_PAUSE_SHARE);
            return Some(if look > now { look } else { now + pause });
        }
        let late = if bytes < LONG_BYTES {
            LATE
        } else {
            LATE.min(bus / LATE_SHARE)
        };
        if now > first + late {
            return Some(now + late_pause(Duration::ZERO));
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

    /// What a thread that queues two chunks at a time makes of a bus.
    struct Outcome {
        /// The share of the bus that it used within the runs.
        used: f64,
        /// Sleeps for each chunk.
        sleeps: f64,
        /// How late a chunk was found done, at worst.
        late: Duration,
    }

    /// The thread's sleeps take longer than they should; after `in_run` chunks it has none for a
    /// while. The outcome is that of the later half, before which the bus has the first rate.
    fn run(
        rates: (f64, f64),
        (chunk, in_run): (u64, u32),
        (oversleep, launch): (Duration, Duration),
        chunks: u32,
    ) -> Outcome {
        let begin = Instant::now();
        let mut forecast = Forecast::new(begin);
        let half = chunks / 2;
        let time_of = |number| {
            let rate = if number < half { rates.0 } else { rates.1 };
            Duration::from_nanos((chunk as f64 * 1e3 / rate) as u64)
        };
        let (mut now, mut bus_free, mut done, mut queued) = (begin, begin, 0, 0);
        let (mut busy, mut late, mut sleeps) = (Duration::ZERO, Duration::ZERO, 0);
        let mut under_way: VecDeque<(Awaited, Instant)> = VecDeque::new();
        while done < chunks {
            let until = chunks.min(done + in_run);
            while done < until {
                let began = now;
                let is_later = done >= half;
                while let Some((awaited, end)) = under_way.front_mut()
                    && awaited.is_due(now)
                {
                    if *end > now {
                        awaited.is_unfinished(now);
                        break;
                    }
                    if is_later {
                        late = late.max(now - *end);
                    }
                    let (awaited, _) = under_way.pop_front().unwrap();
                    forecast.done(awaited, under_way.iter_mut().map(|(a, _)| a), now);
                    done += 1;
                }
                while under_way.len() < 2 && queued < until {
                    bus_free = bus_free.max(now + launch) + time_of(queued);
                    under_way.push_back((forecast.start(chunk, now), bus_free));
                    now += launch;
                    queued += 1;
                }
                if let Some(look) = Forecast::next_look(under_way.iter().map(|(a, _)| *a), now) {
                    let sleep = look.saturating_duration_since(now);
                    now += match sleep.is_zero() {
                        true => Duration::from_micros(1),
                        false => sleep + oversleep,
                    };
                    sleeps += u32::from(is_later && !sleep.is_zero());
                }
                if is_later {
                    busy += now - began;
                }
            }
            now += Duration::from_millis(3);
        }
        let measured = chunks - half;
        Outcome {
            used: time_of(half).as_secs_f64() * f64::from(measured) / busy.as_secs_f64(),
            sleeps: f64::from(sleeps) / f64::from(measured),
            late,
        }
    }

    #[test]
    fn sleeps_that_are_late_do_not_make_the_bus_seem_slower_and_slower() {
        for us in [1, 8, 60, 150] {
            for rate in [55_000.0, 12_000.0, 25_000.0, 110_000.0] {
                let oversleep = Duration::from_micros(us);
                for chunk in [32 << 20, 256 << 20] {
                    let delays = (oversleep, Duration::ZERO);
                    let outcome = run((rate, rate), (chunk, 4000), delays, 8000);
                    let Outcome { used, sleeps, .. } = outcome;
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
    fn the_second_save_of_a_device_is_noticed_in_time_already() {
        for us in [1, 8, 20, 60] {
            for chunks in [
                (256 << 20, 4),
                (128 << 20, 8),
                (64 << 20, 16),
                (256 << 20, 1),
            ] {
                let delays = (Duration::from_micros(us), Duration::from_micros(5));
                let used = run((54_300.0, 54_300.0), chunks, delays, 2 * chunks.1).used;
                assert!(
                    used > 0.97,
                    "{chunks:?}, {us} us late: {used:.3} of the bus"
                );
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
            let rates = (54_300.0, 54_300.0);
            let used = run(rates, (32 << 20, 32), delays, 4096).used;
            assert!(
                used > least,
                "{used:.3} of the bus, {launch} us for each chunk"
            );
        }
    }

    #[test]
    fn a_bus_that_becomes_faster_is_used_at_once() {
        let delays = (Duration::from_micros(8), Duration::from_micros(5));
        for (slow, fast) in [
            (12_000.0, 55_000.0),
            (26_000.0, 54_000.0),
            (40_000.0, 55_000.0),
        ] {
            for (chunk, in_run) in [
                (256 << 20, 1000),
                (256 << 20, 4),
                (64 << 20, 16),
                (32 << 20, 32),
            ] {
                let Outcome { used, late, .. } = run((slow, fast), (chunk, in_run), delays, 128);
                let what = format!("{in_run} chunks of {chunk}, {slow} and then {fast}");
                assert!(used > 0.9, "{used:.3} of the bus: {what}");
                // A chunk's time on the slow bus at worst.
                let most = Duration::from_nanos((chunk as f64 * 1.2e3 / slow) as u64);
                assert!(late < most, "{late:?} late: {what}");
            }
            // Loads of one chunk each: after thirty they are noticed when they are done.
            let used = run((slow, fast), (64 << 20, 1), delays, 512).used;
            assert!(
                used > 0.85,
                "{used:.3} of the bus: single chunks, {slow} and then {fast}"
            );
        }
    }

    #[test]
    fn a_bus_that_stands_still_is_looked_at_less_and_less() {
        for chunks in [1, 2] {
            let begin = Instant::now();
            let mut forecast = Forecast::new(begin);
            let chunks: Vec<Awaited> = (0..chunks)
                .map(|_| forecast.start(64 << 20, begin))
                .collect();
            let (mut now, mut looks) = (begin, 0);
            while now < begin + Duration::from_secs(10) {
                let look = Forecast::next_look(chunks.iter().copied(), now).unwrap();
                // Each look takes a little.
                now = look.max(now + Duration::from_micros(1));
                looks += 1;
            }
            assert!(looks < 1000, "{looks} looks in ten seconds");
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
