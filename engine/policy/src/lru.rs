//! Least recently used: one list, a use moves to the front, the back leaves first.

use super::EvictionPolicy;
use super::list::{Links, List};

pub(super) const NAME: &str = "lru";

/// The least-recently-used order.
pub struct Lru {
    links: Links,
    order: List,
}

impl Lru {
    /// A policy for ids below `capacity`.
    pub fn new(capacity: u32) -> Self {
        Self {
            links: Links::new(capacity),
            order: List::new(),
        }
    }
}

impl EvictionPolicy for Lru {
    fn name(&self) -> &'static str {
        NAME
    }

    fn insert(&mut self, id: u32, _key_hash: u64) {
        if self.links.contains(id) {
            self.order.move_to_front(&mut self.links, id);
        } else {
            self.order.push_front(&mut self.links, id);
        }
    }

    fn touch(&mut self, id: u32) {
        if self.links.contains(id) {
            self.order.move_to_front(&mut self.links, id);
        }
    }

    fn remove(&mut self, id: u32) {
        if self.links.contains(id) {
            self.order.unlink(&mut self.links, id);
        }
    }

    fn victim(&mut self, evictable: &mut dyn FnMut(u32) -> bool) -> Option<u32> {
        for _ in 0..self.order.len() {
            let id = self.order.back()?;
            if evictable(id) {
                return Some(id);
            }
            self.order.move_to_front(&mut self.links, id);
        }
        None
    }

    fn upcoming(&self, visit: &mut dyn FnMut(u32) -> bool) {
        self.order.visit_from_back(&self.links, visit);
    }

    fn contains(&self, id: u32) -> bool {
        self.links.contains(id)
    }

    fn len(&self) -> usize {
        self.order.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(policy: &mut Lru) -> Vec<u32> {
        std::iter::from_fn(|| {
            let id = policy.victim(&mut |_| true)?;
            policy.remove(id);
            Some(id)
        })
        .collect()
    }

    #[test]
    fn the_longest_unused_leaves_first() {
        let mut policy = Lru::new(4);
        for id in 0..4 {
            policy.insert(id, 0);
        }
        policy.touch(0);
        policy.touch(2);
        assert_eq!(drain(&mut policy), [1, 3, 0, 2]);
    }

    #[test]
    fn what_cannot_leave_counts_as_just_used() {
        let mut policy = Lru::new(4);
        for id in 0..4 {
            policy.insert(id, 0);
        }
        assert_eq!(policy.victim(&mut |id| id >= 2), Some(2));
        assert_eq!(drain(&mut policy), [2, 3, 0, 1]);
    }
}
