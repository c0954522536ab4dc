//! How far the start is: a bar on a terminal, now and then a line in the log.

#![forbid(unsafe_code)]

use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Distance of two lines in the log, or of two looks of the bar.
const LOG_EVERY: Duration = Duration::from_secs(5);
const BAR_EVERY: Duration = Duration::from_millis(100);
const STYLE: &str = "pool {wide_bar} {binary_bytes} of {binary_total_bytes}, {eta}";

/// Bytes of the pool that are there.
pub(super) struct Progress {
    total_bytes: u64,
    done_bytes: AtomicU64,
    drives: AtomicBool,
    bar: Option<ProgressBar>,
}

impl Progress {
    pub(super) fn new(total_bytes: u64) -> Progress {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar =
                ProgressBar::with_draw_target(Some(total_bytes), ProgressDrawTarget::stderr());
            if let Ok(style) = ProgressStyle::with_template(STYLE) {
                bar.set_style(style);
            }
            bar
        });
        Progress {
            total_bytes,
            done_bytes: AtomicU64::new(0),
            drives: AtomicBool::new(false),
            bar,
        }
    }

    /// Notes the bytes done so far; several threads may say so in any order.
    pub(super) fn set(&self, done_bytes: u64) {
        self.done_bytes.fetch_max(done_bytes, Ordering::Relaxed);
    }

    /// The pool is there, and the shards of the SSD tier are being opened.
    pub(super) fn waits_for_drives(&self) {
        self.drives.store(true, Ordering::Relaxed);
    }

    /// Shows it until the future is dropped.
    pub(super) async fn report(&self) {
        loop {
            tokio::time::sleep(if self.bar.is_some() {
                BAR_EVERY
            } else {
                LOG_EVERY
            })
            .await;
            let done = self.done_bytes.load(Ordering::Relaxed);
            match &self.bar {
                None if self.drives.load(Ordering::Relaxed) => tracing::warn!(
                    "the shards of the SSD tier are not open yet: a drive is slow or does not \
                     answer; its shards are waited for --ssd-open-wait for each of three steps"
                ),
                Some(bar) => bar.set_position(done),
                None => {
                    let percent = 100 * done / self.total_bytes.max(1);
                    tracing::info!(percent, done_bytes = done, "the pool is coming up");
                }
            }
        }
    }

    /// Takes the bar away.
    pub(super) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
