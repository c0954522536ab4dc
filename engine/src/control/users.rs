//! How many connections each user has.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

type Counts = HashMap<u32, u64>;

/// The count of each user that has any.
#[derive(Default)]
pub(super) struct Users(Arc<Mutex<Counts>>);

/// One connection of a user, until it is dropped.
pub(super) struct Entry {
    uid: u32,
    counts: Arc<Mutex<Counts>>,
}

fn lock(counts: &Mutex<Counts>) -> MutexGuard<'_, Counts> {
    // No code panics while it holds the map, and a map is whole at every step.
    counts.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Users {
    /// Connections of a user.
    pub(super) fn count(&self, uid: u32) -> u64 {
        lock(&self.0).get(&uid).copied().unwrap_or(0)
    }

    /// Counts one more.
    pub(super) fn enter(&self, uid: u32) -> Entry {
        *lock(&self.0).entry(uid).or_default() += 1;
        let counts = self.0.clone();
        Entry { uid, counts }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut counts = lock(&self.counts);
        if let Some(count) = counts.get_mut(&self.uid) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.uid);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_without_connections_leaves_nothing() {
        let users = Users::default();
        let (one, two, other) = (users.enter(7), users.enter(7), users.enter(8));
        assert_eq!((users.count(7), users.count(8), users.count(9)), (2, 1, 0));
        drop((one, other));
        assert_eq!((users.count(7), users.count(8)), (1, 0));
        drop(two);
        assert!(lock(&users.0).is_empty());
    }
}
