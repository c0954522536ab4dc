//! Named places at which a test lets the daemon die.
//!
//! A crash point stands between two steps of which a crash must not see the order reversed. In unit
//! tests and in builds with debug assertions `PEGAFLOW_CRASH_AT=NAME[:N]` makes the `N`-th pass of
//! a point (the first by default) end the process by SIGKILL, as the kernel would; [`arm`] makes a
//! pass panic on the calling thread instead, with [`Crash`] as its payload, for a simulation that
//! runs the daemon inside its own process. In other builds a point is nothing at all.

#![forbid(unsafe_code)]

/// The environment variable that arms a point.
pub const CRASH_AT: &str = "PEGAFLOW_CRASH_AT";

macro_rules! crash_points {
    ($($(#[doc = $doc:literal])+ $point:ident = $name:literal,)*) => {
        /// A place at which the daemon can be made to die.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum CrashPoint { $($(#[doc = $doc])+ $point,)* }

        impl CrashPoint {
            /// Every point.
            pub const ALL: &'static [CrashPoint] = &[$(CrashPoint::$point,)*];

            /// The name by which the environment arms it.
            pub const fn name(self) -> &'static str {
                match self { $(CrashPoint::$point => $name,)* }
            }
        }
    };
}

crash_points! {
    /// Start: the node's folder is locked, nothing is changed yet.
    Locked = "start-locked",
    /// Start: the node file is made, but not yet under its name.
    NodeFileMade = "start-node-file-made",
    /// Start: the pool file has its size and no memory.
    PoolSized = "start-pool-sized",
    /// Start: a range of the pool has its memory, others may not.
    PoolRangeFilled = "start-pool-range-filled",
    /// Start: the pool is there, its catalog is not.
    PoolMade = "start-pool-made",
    /// Start: the catalog file is there, its header is not valid yet.
    CatalogHeaderless = "start-catalog-headerless",
    /// Start: a record of the previous daemon is thrown away.
    RecordDiscarded = "adopt-record-discarded",
    /// Start: a block of the previous daemon is taken over, others are not yet.
    BlockAdopted = "adopt-block-adopted",
    /// Start: all is taken over, memory of unused records is not given back yet.
    BlocksAdopted = "adopt-blocks-adopted",
    /// The index file of a domain is made.
    IndexMade = "index-made",
    /// Start: everything is up, the socket is not there yet.
    BeforeSocket = "start-before-socket",
    /// Namespace: the row is written, its state word is not.
    RowHalfWritten = "row-half-written",
    /// Namespace: the row is valid, nobody was told.
    NamespaceAdded = "namespace-added",
    /// Namespace: the row is given up.
    NamespaceRemoved = "namespace-removed",
    /// Save: a page is chosen, nothing is copied yet.
    PageOffered = "save-page-offered",
    /// Save: a shard's bytes are in its page, nothing is recorded.
    ShardCopied = "save-shard-copied",
    /// Seal: the fields of a record are written, its state word is not.
    RecordHalfWritten = "seal-record-half-written",
    /// Seal: one shard of a block is recorded.
    ShardRecorded = "seal-shard-recorded",
    /// Seal: all shards are recorded, no reader sees the block.
    BlockRecorded = "seal-block-recorded",
    /// Seal: readers see the block, its request is not answered.
    BlockSealed = "seal-block-sealed",
    /// Query: a lease is granted, its request is not answered.
    LeaseGranted = "query-lease-granted",
    /// Load: the lease is consumed, copies are running.
    LoadStarted = "load-started",
    /// Load: a copy has ended, its request is not answered.
    LoadCopied = "load-copied",
    /// Eviction: readers no longer see the block, its records are there.
    BlockUnindexed = "evict-block-unindexed",
    /// Eviction: a record is cleared, its page is not free yet.
    RecordCleared = "evict-record-cleared",
    /// Hand-over of an extent: it serves no allocation any more, its blocks are there.
    ExtentDrained = "extent-drained",
    /// Hand-over of an extent: its row is empty, the memory of its records is not given back.
    ExtentRowEmptied = "extent-row-emptied",
    /// An extent's records have memory, its row is empty.
    ExtentReserved = "extent-reserved",
    /// An extent's row names its page size, no record is there.
    ExtentOpened = "extent-opened",
    /// Stop: running requests are answered, sessions are open.
    Drained = "stop-drained",
    /// Stop: the lane has ended, the index files are there.
    LaneStopped = "stop-lane-stopped",
    /// Stop: the index files are removed, the socket is there.
    IndexRemoved = "stop-index-removed",
}

/// What a pass panics with after [`arm`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Crash {
    /// Where.
    pub at: CrashPoint,
}

/// A place at which a crash can be asked for.
#[cfg(not(any(debug_assertions, test)))]
#[inline(always)]
pub fn point(_at: CrashPoint) {}

#[cfg(any(debug_assertions, test))]
pub use armed::{Arming, arm, check_environment, point};

/// Checks the variable that arms a point; nothing reads it in this build.
#[cfg(not(any(debug_assertions, test)))]
pub fn check_environment() -> Result<(), UnknownPoint> {
    Ok(())
}

/// The environment names a point that does not exist.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{CRASH_AT}={0}: give the name of a crash point, or NAME:N for its N-th pass from 1 on")]
pub struct UnknownPoint(pub String);

#[cfg(any(debug_assertions, test))]
mod armed {
    use std::cell::Cell;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::{CRASH_AT, Crash, CrashPoint, UnknownPoint};

    thread_local! {
        static ARMED: Cell<Option<(CrashPoint, u64)>> = const { Cell::new(None) };
    }
    static FROM_ENVIRONMENT: OnceLock<Option<(CrashPoint, u64)>> = OnceLock::new();
    static PASSES: AtomicU64 = AtomicU64::new(0);

    /// A place at which a crash can be asked for.
    #[inline]
    pub fn point(at: CrashPoint) {
        if let Some((armed, passes)) = ARMED.get()
            && armed == at
        {
            if passes <= 1 {
                ARMED.set(None);
                std::panic::panic_any(Crash { at });
            }
            ARMED.set(Some((armed, passes - 1)));
        }
        let asked = FROM_ENVIRONMENT.get_or_init(|| from_environment().unwrap_or_default());
        if let Some((armed, nth)) = asked
            && *armed == at
            && PASSES.fetch_add(1, Ordering::Relaxed) + 1 == *nth
        {
            die();
        }
    }

    /// SIGKILL, which no handler sees and no destructor survives.
    fn die() -> ! {
        let own = rustix::process::getpid();
        loop {
            // Fails never for the own process; the signal may take a moment to arrive.
            let _ = rustix::process::kill_process(own, rustix::process::Signal::KILL);
            std::thread::yield_now();
        }
    }

    fn from_environment() -> Result<Option<(CrashPoint, u64)>, UnknownPoint> {
        std::env::var(CRASH_AT).map_or(Ok(None), |text| parse(&text).map(Some))
    }

    /// Checks the variable that arms a point.
    ///
    /// # Errors
    /// It names none.
    pub fn check_environment() -> Result<(), UnknownPoint> {
        from_environment().map(drop)
    }

    pub(super) fn parse(text: &str) -> Result<(CrashPoint, u64), UnknownPoint> {
        let unknown = || UnknownPoint(text.to_owned());
        let (name, nth) = text.split_once(':').unwrap_or((text, "1"));
        let mut points = CrashPoint::ALL.iter().copied();
        let point = points.find(|point| point.name() == name);
        let nth = nth.parse().ok().filter(|nth| *nth > 0);
        point.zip(nth).ok_or_else(unknown)
    }

    /// A point armed on this thread, until it is dropped or has been passed.
    #[derive(Debug)]
    pub struct Arming(());

    /// Makes the `nth` pass (from 1) of a point on this thread panic with [`Crash`].
    pub fn arm(at: CrashPoint, nth: u64) -> Arming {
        ARMED.set(Some((at, nth)));
        Arming(())
    }

    impl Arming {
        /// True while the point has not been passed often enough.
        pub fn is_waiting(&self) -> bool {
            ARMED.get().is_some()
        }
    }

    impl Drop for Arming {
        fn drop(&mut self) {
            ARMED.set(None);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_point_has_a_name_of_its_own() {
        let names: HashSet<&str> = CrashPoint::ALL.iter().map(|point| point.name()).collect();
        assert_eq!(names.len(), CrashPoint::ALL.len());
    }

    #[test]
    fn the_variable_names_a_point_and_a_pass() {
        for at in CrashPoint::ALL {
            assert_eq!(armed::parse(at.name()), Ok((*at, 1)));
            assert_eq!(armed::parse(&format!("{}:17", at.name())), Ok((*at, 17)));
        }
        for wrong in ["", "start", "index-made:0", "index-made:x", ":1"] {
            assert_eq!(armed::parse(wrong), Err(UnknownPoint(wrong.to_owned())));
        }
    }

    #[test]
    fn an_armed_point_panics_at_its_nth_pass_and_once() {
        let armed = arm(CrashPoint::IndexMade, 2);
        point(CrashPoint::IndexMade);
        point(CrashPoint::Locked);
        assert!(armed.is_waiting());
        let crash = std::panic::catch_unwind(|| point(CrashPoint::IndexMade)).expect_err("armed");
        let at = CrashPoint::IndexMade;
        assert_eq!(crash.downcast_ref::<Crash>(), Some(&Crash { at }));
        assert!(!armed.is_waiting());
        point(CrashPoint::IndexMade);
        drop(arm(CrashPoint::Locked, 1));
        point(CrashPoint::Locked);
    }
}
