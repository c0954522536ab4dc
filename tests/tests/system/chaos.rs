//! Daemon and engines killed at random under load; `make chaos` is the long form.

use std::time::Duration;

use pegaflow_tests::chaos::plan::Mode;
use pegaflow_tests::chaos::{self, Settings};
use pegaflow_tests::trials;

/// Whatever the machine does beside.
const GENEROUS: Duration = Duration::from_secs(15);

#[test]
fn kills_of_daemon_and_engines_lose_no_block_hang_no_call_and_give_no_wrong_byte() {
    let settings = Settings {
        program: env!("CARGO_BIN_EXE_chaos").into(),
        seed: trials("CHAOS_SEED", 20_261),
        kills: trials("PEGAFLOW_CHAOS_KILLS", 13) as u32,
        modes: vec![Mode::Both, Mode::Startup, Mode::SmallPool, Mode::BothTiers],
        service_bound: GENEROUS,
        slack: GENEROUS,
        pool_mib: 96,
        verbose: false,
    };
    let summary = chaos::run(&settings).unwrap_or_else(|error| panic!("{error:#}"));
    assert_eq!(summary.daemon_kills(), settings.kills);
    assert_eq!(summary.late, 0, "{}", summary.table());
    assert!(summary.tally.loads > 0 && summary.tally.sealed > 0);
}
