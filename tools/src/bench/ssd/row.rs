//! What one page size comes to in one direction.

#![forbid(unsafe_code)]

use serde::Serialize;

use crate::replay::latency::{median, quantile};

/// Bytes per second, and seconds of CPU time and of checksums per GiB.
#[derive(Clone, Copy, Debug)]
pub(super) struct Figure {
    pub(super) rate: f64,
    pub(super) cpu: f64,
    pub(super) checksums: f64,
}

/// The figures of one round: ours, fio's, and those of a fio that verifies what it reads.
pub(super) type Round = (Figure, Figure, Option<Figure>);

/// Our rate as a share of fio's: the median of the rounds, and between what their middle half lies.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Ratio {
    pub(super) median: f64,
    pub(super) middle_half: [f64; 2],
}

/// One page size in one direction.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    pub(super) page_bytes: u64,
    pub(super) direction: &'static str,
    /// Bytes per second; medians of the rounds.
    pub(super) ours: f64,
    pub(super) fio: f64,
    pub(super) ratio: Ratio,
    /// The same of a fio that compares what it reads with a CRC-32C, as we do. None for writes: fio
    /// makes up what it writes with one, which takes longer than all else.
    pub(super) fio_verify: Option<f64>,
    pub(super) ratio_verify: Option<Ratio>,
    /// Seconds of CPU time per GiB, checksums included.
    pub(super) ours_cpu: f64,
    /// Seconds per GiB of `ours_cpu` that went into checksums; fio takes none.
    pub(super) checksum_cpu: f64,
    pub(super) fio_cpu: f64,
    pub(super) fio_verify_cpu: Option<f64>,
    pub(super) fio_psync_cpu: f64,
    pub(super) fio_psync_verify_cpu: Option<f64>,
}

impl Row {
    /// Our CPU time as a share of that of a psync that checks what it reads, as we do, and without
    /// our checksums of that of one that does not.
    pub(super) fn cpu_ratios(&self) -> (Option<f64>, f64) {
        let verified = self.fio_psync_verify_cpu.map(|cpu| self.ours_cpu / cpu);
        let plain = (self.ours_cpu - self.checksum_cpu) / self.fio_psync_cpu;
        (verified, plain)
    }
}

pub(super) fn row(
    page: u32,
    direction: &'static str,
    rounds: &[Round],
    fio_psync_cpu: f64,
    fio_psync_verify_cpu: Option<f64>,
) -> Row {
    let of = |pick: &dyn Fn(&Round) -> f64| rounds.iter().map(pick).collect::<Vec<f64>>();
    let verified: Vec<(Figure, Figure)> = rounds
        .iter()
        .filter_map(|(ours, _, verified)| Some((*ours, (*verified)?)))
        .collect();
    let of_verified = |pick: &dyn Fn(&(Figure, Figure)) -> f64| {
        let values: Vec<f64> = verified.iter().map(pick).collect();
        (!values.is_empty()).then_some(values)
    };
    let ratio = |ratios: &[f64]| Ratio {
        median: median(ratios),
        middle_half: [0.25, 0.75].map(|share| quantile(ratios, share)),
    };
    Row {
        page_bytes: u64::from(page),
        direction,
        ours: median(&of(&|(ours, ..)| ours.rate)),
        fio: median(&of(&|(_, fio, _)| fio.rate)),
        ratio: ratio(&of(&|(ours, fio, _)| ours.rate / fio.rate)),
        fio_verify: of_verified(&|(_, fio)| fio.rate).map(|rates| median(&rates)),
        ratio_verify: of_verified(&|(ours, fio)| ours.rate / fio.rate).map(|all| ratio(&all)),
        ours_cpu: median(&of(&|(ours, ..)| ours.cpu)),
        checksum_cpu: median(&of(&|(ours, ..)| ours.checksums)),
        fio_cpu: median(&of(&|(_, fio, _)| fio.cpu)),
        fio_verify_cpu: of_verified(&|(_, fio)| fio.cpu).map(|times| median(&times)),
        fio_psync_cpu,
        fio_psync_verify_cpu,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(rate: f64) -> Figure {
        Figure {
            rate,
            cpu: 1.0 / rate,
            checksums: 0.25 / rate,
        }
    }

    #[test]
    fn ratios_are_those_of_neighbours_and_not_of_medians() {
        // A drive that halves its speed from round to round: the sides stay alike.
        let rounds: Vec<Round> = [(8.0, 10.0), (4.0, 5.0), (2.4, 2.0), (1.0, 1.25), (0.6, 0.5)]
            .map(|(ours, fio)| (figure(ours), figure(fio), Some(figure(ours * 2.0))))
            .to_vec();
        let row = row(4096, "read", &rounds, 0.5, Some(2.0));
        assert!((row.ratio.median - 0.8).abs() < 1e-9);
        assert_eq!(row.ratio_verify.map(|ratio| ratio.median), Some(0.5));
        assert_eq!((row.ours, row.fio, row.fio_verify), (2.4, 2.0, Some(4.8)));
        let (verified, plain) = row.cpu_ratios();
        assert!((verified.unwrap() - 1.0 / 2.4 / 2.0).abs() < 1e-9);
        assert!((plain - 0.75 / 2.4 / 0.5).abs() < 1e-9);
    }

    #[test]
    fn writes_are_compared_with_no_fio_that_verifies() {
        let rounds = [(figure(3.0), figure(2.0), None)];
        let row = row(4096, "write", &rounds, 0.5, None);
        assert_eq!(row.ratio.median, 1.5);
        assert!(row.fio_verify.is_none() && row.ratio_verify.is_none());
        assert!(row.fio_verify_cpu.is_none() && row.cpu_ratios().0.is_none());
    }
}
