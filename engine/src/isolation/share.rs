//! How much of a bounded resource one holder may take, so that none can take all.
//!
//! A holder may take one more while it holds less than [`SHARE`] times what is free. One that
//! takes all it can get thus stops at 8/9 of a large table; the next such one gets 8/9 of the
//! rest, and so on. Nothing is set aside, so a holder that is alone is hardly limited, and a
//! table of at most 8 places not at all. Where somebody could appear as many holders (a user with
//! many sessions), the same rule holds for the isolation domain that they all belong to.

#![forbid(unsafe_code)]

/// Parts that a holder may have for each part that is free.
pub const SHARE: u64 = 8;

/// Whether a holder of `own` may take one more while `free` are free.
pub fn may_take(own: u64, free: u64) -> bool {
    own < free.saturating_mul(SHARE)
}

/// How many more a holder of `own` may take while `free` are free.
pub fn allowance(own: u64, free: u64) -> u64 {
    let bound = free.saturating_mul(SHARE);
    match bound.checked_sub(own) {
        Some(left) => left.div_ceil(SHARE + 1).min(free),
        None => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Holders that come one after the other, each taking what it can get; what is left.
    fn left(places: u64, holders: usize) -> u64 {
        let mut free = places;
        for _ in 0..holders {
            let mut own = 0;
            while may_take(own, free) {
                own += 1;
                free -= 1;
            }
        }
        free
    }

    #[test]
    fn a_small_table_can_be_used_up_and_a_large_one_never_by_one() {
        for places in 0..=SHARE {
            assert_eq!(left(places, 1), 0);
        }
        assert_eq!(left(9, 1), 1);
        assert_eq!(left(65_536, 1), 7281);
    }

    #[test]
    fn whoever_comes_next_finds_something() {
        assert_eq!(left(65_536, 2), 809);
        assert_eq!(left(65_536, 3), 89);
        assert!(may_take(0, 1) && !may_take(0, 0) && !may_take(u64::MAX, u64::MAX));
    }

    #[test]
    fn the_allowance_is_what_one_by_one_would_come_to() {
        for own in 0..40 {
            for free in 0..60 {
                let (mut taken, mut left) = (own, free);
                while may_take(taken, left) {
                    taken += 1;
                    left -= 1;
                }
                assert_eq!(allowance(own, free), free - left, "{own} of {free} free");
            }
        }
    }
}
