//! The figures of `bench gpu`, each beside its limit and its target.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use serde::Serialize;

use super::case::{Case, Compute, Target};
use super::engine::{Figures, Slowdown};
use crate::output::table;

/// Most CPU of the daemon at full rate with 2-MiB pages, in cores.
const MOST_CPU: f64 = 0.05;
const CPU_CASE_BYTES: usize = 2 << 20;

/// A GPU and its limit.
#[derive(Clone, Debug, Serialize)]
struct GpuRow {
    gpu: u32,
    name: String,
    /// One large copy to the host.
    out_gbps: f64,
    /// One large copy to the GPU.
    in_gbps: f64,
}

/// One figure.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// GPUs that did it at the same time.
    pub gpus: Vec<u32>,
    /// What was done.
    pub case: String,
    /// What was measured.
    pub what: &'static str,
    /// Its value.
    pub value: f64,
    /// `GB/s`, `ms`, `us`, `cores` or `x`.
    pub unit: &'static str,
    /// One large copy, where the value is a rate.
    pub limit: Option<f64>,
    /// Value by limit.
    pub ratio: Option<f64>,
    /// What value (or ratio, where there is a limit) should be.
    pub target: Option<f64>,
    /// Whether it is.
    pub met: Option<bool>,
}

/// All figures of a run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    gpus: Vec<GpuRow>,
    rows: Vec<Row>,
}

impl Row {
    fn at_most(value: f64, unit: &'static str, target: Option<f64>) -> Row {
        Row {
            gpus: Vec::new(),
            case: String::new(),
            what: "",
            value,
            unit,
            limit: None,
            ratio: None,
            target,
            met: target.map(|target| value <= target),
        }
    }

    fn rate(value: f64, limit: f64, target: Option<f64>) -> Row {
        let ratio = value / limit;
        Row {
            limit: Some(limit),
            ratio: Some(ratio),
            met: target.map(|target| ratio >= target),
            ..Row::at_most(value, "GB/s", target)
        }
    }
}

impl Report {
    /// Enters a GPU.
    pub fn add_gpu(&mut self, gpu: u32, name: String, (out_gbps, in_gbps): (f64, f64)) {
        self.gpus.push(GpuRow {
            gpu,
            name,
            out_gbps,
            in_gbps,
        });
    }

    /// Sum of the limits of some GPUs, out and in.
    fn limit(&self, gpus: &[u32]) -> (f64, f64) {
        let known = self.gpus.iter().filter(|row| gpus.contains(&row.gpu));
        known.fold((0.0, 0.0), |sum, row| {
            (sum.0 + row.out_gbps, sum.1 + row.in_gbps)
        })
    }

    fn add(&mut self, gpus: &[u32], case: &Case, what: &'static str, row: Row) {
        self.rows.push(Row {
            gpus: gpus.to_vec(),
            case: case.name.clone(),
            what,
            ..row
        });
    }

    /// Enters a case that some GPUs did at the same time.
    pub fn add_case(&mut self, case: &Case, figures: &BTreeMap<u32, Figures>) {
        let gpus: Vec<u32> = figures.keys().copied().collect();
        let bytes = case.shape.total_bytes() as f64;
        let (out, into) = self.limit(&gpus);
        let rate = |time: fn(&Figures) -> f64| -> f64 {
            figures.values().map(|one| bytes / time(one)).sum()
        };
        let (save, load) = (rate(|one| one.save_ns), rate(|one| one.load_ns));
        let worst = |time: fn(&Figures) -> f64| figures.values().map(time).fold(0.0, f64::max);
        let alone = gpus.len() == 1;
        match case.target {
            Target::Ratio(target) => {
                // How much several GPUs reach together is the host's to say.
                let target = alone.then_some(target);
                self.add(&gpus, case, "save", Row::rate(save, out, target));
                self.add(&gpus, case, "load", Row::rate(load, into, target));
            }
            Target::SaveMs(target) => {
                let ms = worst(|one| one.save_ns) / 1e6;
                self.add(&gpus, case, "save", Row::at_most(ms, "ms", Some(target)));
                self.add(&gpus, case, "save", Row::rate(save, out, None));
                self.add(&gpus, case, "load", Row::rate(load, into, None));
            }
            Target::LoadUs(target) => {
                let us = worst(|one| one.load_ns) / 1e3;
                self.add(&gpus, case, "load", Row::at_most(us, "us", Some(target)));
                let us = worst(|one| one.save_ns) / 1e3;
                self.add(&gpus, case, "save", Row::at_most(us, "us", None));
            }
        }
        if alone && case.shape.segment_bytes >= CPU_CASE_BYTES {
            let (save, load) = (worst(|one| one.save_cpu), worst(|one| one.load_cpu));
            let most = Some(MOST_CPU);
            self.add(
                &gpus,
                case,
                "daemon's CPU saving",
                Row::at_most(save, "cores", most),
            );
            self.add(
                &gpus,
                case,
                "daemon's CPU loading",
                Row::at_most(load, "cores", most),
            );
        }
    }

    /// Enters what the copies cost a computation.
    pub fn add_slowdown(&mut self, gpu: u32, case: &Case, compute: Compute, slow: &Slowdown) {
        let most = Some(compute.most_slowdown(case.shape));
        let parts = [
            ("save beside", slow.saving_ns, slow.save_gbps),
            ("load beside", slow.loading_ns, slow.load_gbps),
        ];
        let (out, into) = self.limit(&[gpu]);
        for ((what, ns, gbps), limit) in parts.into_iter().zip([out, into]) {
            let case = Case {
                name: format!("{}, {}", case.name, compute.name()),
                ..case.clone()
            };
            self.add(
                &[gpu],
                &case,
                what,
                Row::at_most(ns / slow.alone_ns, "x", most),
            );
            self.add(&[gpu], &case, what, Row::rate(gbps, limit, None));
        }
    }

    /// As tables.
    pub fn render(&self) -> String {
        let mut gpus = table(&["GPU", "name", "one large copy out", "in"], &[0, 2, 3]);
        for row in &self.gpus {
            gpus.add_row([
                row.gpu.to_string(),
                row.name.clone(),
                format!("{:.1} GB/s", row.out_gbps),
                format!("{:.1} GB/s", row.in_gbps),
            ]);
        }
        let header = [
            "GPUs",
            "case",
            "what",
            "measured",
            "of the limit",
            "target",
            "met",
        ];
        let mut rows = table(&header, &[3, 4, 5]);
        for row in &self.rows {
            let gpus: Vec<String> = row.gpus.iter().map(u32::to_string).collect();
            let percent = |ratio: f64| format!("{:.1} %", 100.0 * ratio);
            let target = row.target.map(|target| match row.limit {
                Some(_) => format!(">= {}", percent(target)),
                None => format!("<= {target} {}", row.unit),
            });
            let digits = if matches!(row.unit, "cores" | "x") {
                3
            } else {
                1
            };
            rows.add_row([
                gpus.join(","),
                row.case.clone(),
                row.what.to_owned(),
                format!("{:.digits$} {}", row.value, row.unit),
                row.ratio.map(percent).unwrap_or_default(),
                target.unwrap_or_default(),
                row.met
                    .map_or("", |met| if met { "yes" } else { "NO" })
                    .to_owned(),
            ]);
        }
        format!("{gpus}\n{rows}")
    }
}
