//! The figures for a person.

#![forbid(unsafe_code)]

use comfy_table::Table;

use super::row::{Ratio, Row};
use crate::output::{size, table};

fn or_none(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(String::new, |value| format!("{value:.digits$}"))
}

pub(super) fn rates(rows: &[Row]) -> Table {
    let header = [
        "GB/s",
        "",
        "ours",
        "fio",
        "ours to it",
        "middle half",
        "fio, verifying",
        "ours to it",
        "middle half",
    ];
    let mut table = table(&header, &[0, 2, 3, 4, 5, 6, 7, 8]);
    for row in rows {
        let middle_half = |ratio: Ratio| {
            let [low, high] = ratio.middle_half;
            format!("{low:.2}\u{2013}{high:.2}")
        };
        let gbps = |rate: f64| rate / 1e9;
        table.add_row([
            size(row.page_bytes),
            row.direction.to_owned(),
            format!("{:.2}", gbps(row.ours)),
            format!("{:.2}", gbps(row.fio)),
            format!("{:.2}", row.ratio.median),
            middle_half(row.ratio),
            or_none(row.fio_verify.map(gbps), 2),
            or_none(row.ratio_verify.map(|ratio| ratio.median), 2),
            row.ratio_verify.map_or_else(String::new, middle_half),
        ]);
    }
    table
}

pub(super) fn cpu_times(rows: &[Row]) -> Table {
    let header = [
        "CPU s/GiB",
        "",
        "ours",
        "of it checksums",
        "fio",
        "verifying",
        "fio psync",
        "verifying",
        "ours to that",
        "ours without checksums to fio psync",
    ];
    let mut table = table(&header, &[0, 2, 3, 4, 5, 6, 7, 8, 9]);
    for row in rows {
        let (verified, plain) = row.cpu_ratios();
        table.add_row([
            size(row.page_bytes),
            row.direction.to_owned(),
            format!("{:.3}", row.ours_cpu),
            format!("{:.3}", row.checksum_cpu),
            format!("{:.3}", row.fio_cpu),
            or_none(row.fio_verify_cpu, 3),
            format!("{:.3}", row.fio_psync_cpu),
            or_none(row.fio_psync_verify_cpu, 3),
            or_none(verified, 2),
            format!("{plain:.2}"),
        ]);
    }
    table
}
