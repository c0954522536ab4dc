//! S3-FIFO (Yang, Zhang, Qiu, Yue, Rashmi: "FIFO queues are all you need for cache eviction", SOSP
//! 2023).
//!
//! New content enters a *small* queue that is held at a tenth of the cache. What was used at least
//! twice there moves to the *main* queue, the rest leaves and its key is remembered in a *ghost*
//! table; content that comes back while remembered enters *main* at once. *Main* gives an entry one
//! more round for each use, at most three.
//!
//! The paper's cache knows its size. Here the pages of different models differ in size, so the
//! number of blocks that fit changes; a victim is asked for only when memory is full, therefore the
//! number of members at that moment stands for the cache size.
//!
//! Any removal from the small queue is remembered, not only that of the last victim: when a whole
//! extent is evacuated its blocks are evicted all the same.

use super::EvictionPolicy;
use super::list::{Links, List};

pub(super) const NAME: &str = "s3-fifo";

/// The small queue's share of the members is one in this many.
const SMALL_SHARE: usize = 10;
/// A use counter stops here; also the number of extra rounds that main can give.
const MAX_USES: u32 = 3;
/// From so many uses on, an entry leaves the small queue for main instead of the cache.
const PROMOTE_USES: u32 = 2;

// One word per entry: uses (2 bits), in main (1 bit), spare (1 bit), key fingerprint (28 bits).
const USES_MASK: u32 = 0b11;
const IN_MAIN: u32 = 0b100;
const KEY_SHIFT: u32 = 4;

/// The S3-FIFO order.
pub struct S3Fifo {
    links: Links,
    words: Vec<u32>,
    small: List,
    main: List,
    ghosts: Ghosts,
}

impl S3Fifo {
    /// A policy for ids below `capacity`.
    pub fn new(capacity: u32) -> Self {
        Self {
            links: Links::new(capacity),
            words: vec![0; capacity as usize],
            small: List::new(),
            main: List::new(),
            ghosts: Ghosts::new(capacity),
        }
    }

    fn small_over_share(&self) -> bool {
        self.small.len() > 0 && self.small.len() * SMALL_SHARE >= self.len()
    }

    fn promote(&mut self, id: u32) {
        self.small.unlink(&mut self.links, id);
        self.main.push_front(&mut self.links, id);
        let word = &mut self.words[id as usize];
        *word = (*word & !USES_MASK) | IN_MAIN;
    }

    /// Walks the small queue, all of it or down to its share.
    fn victim_in_small(
        &mut self,
        whole: bool,
        evictable: &mut dyn FnMut(u32) -> bool,
    ) -> Option<u32> {
        while whole || self.small_over_share() {
            let id = self.small.back()?;
            if self.words[id as usize] & USES_MASK < PROMOTE_USES && evictable(id) {
                return Some(id);
            }
            self.promote(id);
        }
        None
    }

    /// Walks the main queue until each member was met with no uses left.
    fn victim_in_main(&mut self, evictable: &mut dyn FnMut(u32) -> bool) -> Option<u32> {
        for _ in 0..self.main.len() * (MAX_USES as usize + 1) {
            let id = self.main.back()?;
            let word = &mut self.words[id as usize];
            if *word & USES_MASK > 0 {
                *word -= 1;
            } else if evictable(id) {
                return Some(id);
            }
            self.main.move_to_front(&mut self.links, id);
        }
        None
    }
}

impl EvictionPolicy for S3Fifo {
    fn name(&self) -> &'static str {
        NAME
    }

    fn insert(&mut self, id: u32, key_hash: u64) {
        if self.links.contains(id) {
            return self.touch(id);
        }
        let key = fingerprint(key_hash);
        let remembered = self
            .ghosts
            .forget(key, self.len() - self.len() / SMALL_SHARE);
        self.words[id as usize] = key << KEY_SHIFT | if remembered { IN_MAIN } else { 0 };
        let queue = if remembered {
            &mut self.main
        } else {
            &mut self.small
        };
        queue.push_front(&mut self.links, id);
    }

    fn touch(&mut self, id: u32) {
        // A non-member's word may change: `insert` writes it anew.
        let word = &mut self.words[id as usize];
        *word += u32::from(*word & USES_MASK < MAX_USES);
    }

    fn remove(&mut self, id: u32) {
        if !self.links.contains(id) {
            return;
        }
        let word = self.words[id as usize];
        if word & IN_MAIN != 0 {
            self.main.unlink(&mut self.links, id);
        } else {
            self.small.unlink(&mut self.links, id);
            self.ghosts.remember(word >> KEY_SHIFT);
        }
    }

    fn victim(&mut self, evictable: &mut dyn FnMut(u32) -> bool) -> Option<u32> {
        // The second round meets what the first promoted or left within the small queue's share.
        self.victim_in_small(false, evictable)
            .or_else(|| self.victim_in_main(evictable))
            .or_else(|| self.victim_in_small(true, evictable))
            .or_else(|| self.victim_in_main(evictable))
    }

    /// What was used does not leave with the next round: it comes after everything that does.
    fn upcoming(&self, visit: &mut dyn FnMut(u32) -> bool) {
        // Each with the uses from which on a member stays for another round.
        let (small, main) = ((&self.small, PROMOTE_USES), (&self.main, 1));
        let queues = match self.small_over_share() {
            true => [small, main],
            false => [main, small],
        };
        let mut go_on = true;
        for leaves in [true, false] {
            for (queue, stays) in queues {
                queue.visit_from_back(&self.links, &mut |id| {
                    if (self.words[id as usize] & USES_MASK < stays) == leaves {
                        go_on = visit(id);
                    }
                    go_on
                });
                if !go_on {
                    return;
                }
            }
        }
    }

    fn contains(&self, id: u32) -> bool {
        self.links.contains(id)
    }

    fn len(&self) -> usize {
        self.small.len() + self.main.len()
    }
}

/// 28 bits that stand for a key: at a million ghosts, one new key in 270 passes for a ghost.
fn fingerprint(key_hash: u64) -> u32 {
    (key_hash.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 36) as u32
}

/// The keys that left the small queue, forgotten after as many departures as main has places.
///
/// A set-associative table in which time does the forgetting: a slot holds (departure number,
/// fingerprint), a slot too old counts as free, and a full set loses its oldest. Wrong answers
/// (fingerprint collisions, a wrapped departure number) cost a misplaced block, never a wrong one.
struct Ghosts {
    slots: Vec<u64>,
    set_mask: usize,
    departures: u32,
}

const WAYS: usize = 4;

impl Ghosts {
    fn new(capacity: u32) -> Self {
        // More sets than fingerprints would stay empty.
        let sets = (capacity as usize / WAYS).next_power_of_two().min(1 << 26);
        Self {
            slots: vec![0; sets * WAYS],
            set_mask: sets - 1,
            departures: 0,
        }
    }

    fn set(&mut self, key: u32) -> &mut [u64] {
        let first = (key as usize & self.set_mask) * WAYS;
        &mut self.slots[first..first + WAYS]
    }

    fn remember(&mut self, key: u32) {
        // Number 0 marks a slot that was never used.
        self.departures = self.departures.checked_add(1).unwrap_or(1);
        let now = self.departures;
        let age = |slot: u64| match (slot >> 32) as u32 {
            0 => u32::MAX,
            number => now.wrapping_sub(number),
        };
        let oldest = self.set(key).iter_mut().max_by_key(|slot| age(**slot));
        if let Some(slot) = oldest {
            *slot = u64::from(now) << 32 | u64::from(key);
        }
    }

    /// Whether `key` was among the last `window` departures; it is not afterwards.
    fn forget(&mut self, key: u32, window: usize) -> bool {
        let now = self.departures;
        let slot = self
            .set(key)
            .iter_mut()
            .find(|slot| **slot >> 32 != 0 && **slot as u32 == key);
        let Some(slot) = slot else { return false };
        let number = (std::mem::take(slot) >> 32) as u32;
        (now.wrapping_sub(number) as usize) < window
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn evict(policy: &mut S3Fifo) -> Option<u32> {
        let id = policy.victim(&mut |_| true)?;
        policy.remove(id);
        Some(id)
    }

    fn filled(count: u32) -> S3Fifo {
        let mut policy = S3Fifo::new(64);
        for id in 0..count {
            policy.insert(id, u64::from(id));
        }
        policy
    }

    #[test]
    fn what_was_used_once_leaves_in_the_order_it_came() {
        let mut policy = filled(10);
        policy.touch(1);
        assert_eq!(evict(&mut policy), Some(0));
        assert_eq!(evict(&mut policy), Some(1));
    }

    #[test]
    fn two_uses_save_an_entry_from_a_scan() {
        let mut policy = filled(20);
        for id in [3, 7] {
            policy.touch(id);
            policy.touch(id);
        }
        for scan in 20..60 {
            policy.insert(scan, u64::from(scan));
            let gone = evict(&mut policy).expect("something can leave");
            assert!(gone != 3 && gone != 7, "a scan pushed out {gone}");
        }
    }

    #[test]
    fn content_that_comes_back_soon_enters_main() {
        let mut policy = filled(20);
        for id in 0..10 {
            policy.touch(id);
            policy.touch(id);
        }
        assert_eq!(evict(&mut policy), Some(10), "0 to 9 move to main");
        policy.insert(30, 10);
        assert_ne!(policy.words[30] & IN_MAIN, 0, "key 10 is remembered");
        policy.insert(31, 77);
        assert_eq!(policy.words[31] & IN_MAIN, 0, "key 77 was never seen");
    }

    #[test]
    fn ghosts_are_forgotten_after_the_given_number_of_departures() {
        let mut ghosts = Ghosts::new(64);
        for key in 0..8 {
            ghosts.remember(key);
        }
        assert!(!ghosts.forget(3, 4), "four departures since");
        assert!(ghosts.forget(4, 4));
        assert!(!ghosts.forget(4, 4), "a ghost answers once");
    }

    #[test]
    fn uses_saturate_and_each_buys_one_round_in_main() {
        let mut policy = filled(2);
        for _ in 0..1000 {
            policy.touch(0);
        }
        assert_eq!(policy.words[0] & USES_MASK, MAX_USES);
        assert_eq!(evict(&mut policy), Some(1));
        assert_eq!(evict(&mut policy), Some(0));
        assert_eq!(evict(&mut policy), None);
    }
}
