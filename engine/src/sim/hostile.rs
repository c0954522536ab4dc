//! A client that writes anything anywhere.

#![forbid(unsafe_code)]

use pegaflow_shm::segment::{CONSUMED_OFFSET, SLEEP_EPOCH_OFFSET, SLOT_BYTES, SLOTS_OFFSET};

use crate::sim::world::World;

impl World {
    /// A hostile client does its worst.
    pub fn step_hostile(&mut self) {
        let hostile = (0..self.processes.len()).find(|at| self.is_hostile(*at));
        let Some(process) = hostile else {
            return;
        };
        let choice = self.rng.below(8);
        let mut words = [0u64; 7];
        for word in &mut words {
            *word = self.rng.next() >> self.rng.below(64);
        }
        let at = self.rng.next() as usize;
        let registered = self.rng.percent(70);
        let Some(session) = self.processes[process]
            .session
            .as_mut()
            .filter(|s| s.is_open())
        else {
            return;
        };
        let (slots, c2d) = (session.shape.slots as usize, session.c2d.clone());
        let write = |offset: usize, word: u64| {
            c2d.copy_in(offset, &word.to_le_bytes()).expect("inside");
        };
        match choice {
            0 | 1 => {
                if registered {
                    // A known operation and the right registration get further.
                    let registration = u64::from(session.registration.unwrap_or(1));
                    words[0] = (registration << 32) | (words[0] & 0x1_0300) | (1 + words[1] % 7);
                    words[2] = ((words[2] % 2048) << 32) | (words[2] % 8 * 16384);
                    words[3] = ((words[3] % 64) << 32) | (words[3] % 64);
                }
                session.push_raw(words);
            }
            2 => write(SLOTS_OFFSET + at % slots * SLOT_BYTES, words[0]),
            3 => write(SLOTS_OFFSET + at % (slots * SLOT_BYTES / 8) * 8, words[0]),
            4 => write(CONSUMED_OFFSET, words[0]),
            5 => write(SLEEP_EPOCH_OFFSET, words[0]),
            6 => write(at % (session.shape.total_bytes() / 8) * 8, words[0]),
            _ => {
                for number in 0..2 * slots as u64 {
                    words = [1, 1 << 40 | number, 0, 0, 0, 0, 0];
                    session.push_raw(words);
                }
            }
        }
        session.ring_anyway();
        self.count("hostile acts");
        self.note(|| format!("hostile process {process}: act {choice}, {words:x?}"));
    }
}
