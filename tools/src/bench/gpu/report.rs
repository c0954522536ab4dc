//! The figures of `bench gpu`, each beside its limit and its target.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use serde::Serialize;

use super::case::{Case, Compute, Target};
use super::curve::{self, Point};
use super::engine::{Figures, Limit};
use super::interference::{self, RawRow, Slowdown};
use super::raw::Shape;
use crate::output::table;

/// Most CPU of the daemon at full rate with 2-MiB pages, in cores.
const MOST_CPU: f64 = 0.05;
const CPU_CASE_BYTES: usize = 2 << 20;
/// Unit of rates.
const RATE: &str = "GB/s";

/// A GPU and its limit.
#[derive(Clone, Debug, Serialize)]
struct GpuRow {
    gpu: u32,
    name: String,
    /// Large copies of this GPU alone.
    limit: Limit,
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
    /// `GB/s`, `ms`, `us`, `cores`, `x` (of the median) or `x in the mean`.
    pub unit: &'static str,
    /// Of a rate, one large copy; of a slow-down, that by copies of such pages without a daemon.
    pub limit: Option<f64>,
    /// Value by limit.
    pub ratio: Option<f64>,
    /// What the value (of a rate, the ratio) should be.
    pub target: Option<f64>,
    /// Whether it is.
    pub met: Option<bool>,
}

/// Several GPUs and what they do at once.
#[derive(Clone, Debug, Serialize)]
struct JointRow {
    gpus: Vec<u32>,
    /// Large copies of all of them at the same time, together.
    limit: Limit,
}

/// All figures of a run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    gpus: Vec<GpuRow>,
    joint: Vec<JointRow>,
    rows: Vec<Row>,
    raw: Vec<RawRow>,
    curve: Vec<Point>,
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
            ..Row::at_most(value, RATE, target)
        }
    }

    fn slowdown(value: f64, raw: Option<f64>, most: Option<f64>) -> Row {
        Row {
            limit: raw,
            ratio: raw.map(|raw| value / raw),
            ..Row::at_most(value, "x", most)
        }
    }
}

impl Report {
    /// Enters a GPU.
    pub fn add_gpu(&mut self, gpu: u32, name: String, limit: Limit) {
        self.gpus.push(GpuRow { gpu, name, limit });
    }

    /// Enters what several of them do at once.
    pub fn add_joint_limit(&mut self, gpus: Vec<u32>, limit: Limit) {
        self.joint.push(JointRow { gpus, limit });
    }

    /// Enters the planner's alternatives.
    pub fn set_curve(&mut self, curve: Vec<Point>) {
        self.curve = curve;
    }

    /// Enters what copies without a daemon cost a computation.
    pub fn add_raws(&mut self, rows: Vec<RawRow>) {
        self.raw.extend(rows);
    }

    /// What large copies of these GPUs did.
    fn limit(&self, gpus: &[u32]) -> Limit {
        let alone = |row: &GpuRow| (gpus == [row.gpu]).then_some(row.limit);
        let joint = |row: &JointRow| (gpus == row.gpus).then_some(row.limit);
        let found = self.gpus.iter().find_map(alone);
        let found = found.or_else(|| self.joint.iter().find_map(joint));
        found.unwrap_or_default()
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
        let limit = self.limit(&gpus);
        let (out, into) = (limit.out_gbps, limit.in_gbps);
        let rate = |time: fn(&Figures) -> f64| -> f64 {
            figures.values().map(|one| bytes / time(one)).sum()
        };
        let (save, load) = (rate(|one| one.save_ns), rate(|one| one.load_ns));
        let worst = |time: fn(&Figures) -> f64| figures.values().map(time).fold(0.0, f64::max);
        let alone = gpus.len() == 1;
        match case.target {
            Target::Ratio(target) => {
                let target = Some(target);
                self.add(&gpus, case, "save", Row::rate(save, out, target));
                self.add(&gpus, case, "load", Row::rate(load, into, target));
                let both = figures.values().map(|one| Some(bytes / one.both_ns?));
                if let Some(both) = both.sum::<Option<f64>>() {
                    let row = Row::rate(both, limit.both_gbps, None);
                    self.add(&gpus, case, "save and load at once", row);
                }
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
    pub fn add_slowdown(
        &mut self,
        gpu: u32,
        case: &Case,
        compute: Compute,
        (slow, raws): (&Slowdown, &[RawRow]),
    ) {
        let most = compute.most_slowdown(case.shape);
        let raw = raws.iter().find(|row| row.shape == Shape::Pages);
        let raw = raw.map_or([None; 2], |row| row.slowdowns().map(Some));
        let parts = [
            ("save beside", slow.saving, slow.save_gbps),
            ("load beside", slow.loading, slow.load_gbps),
        ];
        let limit = self.limit(&[gpu]);
        let limits = [limit.out_gbps, limit.in_gbps];
        for (((what, product, gbps), limit), raw) in parts.into_iter().zip(limits).zip(raw) {
            let case = Case {
                name: format!("{}, {}", case.name, compute.name()),
                ..case.clone()
            };
            let times = product.times(slow.alone);
            self.add(&[gpu], &case, what, Row::slowdown(times.median, raw, most));
            self.add(
                &[gpu],
                &case,
                what,
                Row::at_most(times.mean, "x in the mean", None),
            );
            self.add(&[gpu], &case, what, Row::rate(gbps, limit, None));
        }
    }

    /// As tables.
    pub fn render(&self) -> String {
        let header = ["GPU", "name", "one large copy out", "in", "both at once"];
        let mut gpus = table(&header, &[0, 2, 3, 4]);
        let mut add = |gpu: String, name: String, limit: Limit| {
            let rate = |gbps: f64| format!("{gbps:.1} GB/s");
            let Limit {
                out_gbps,
                in_gbps,
                both_gbps,
            } = limit;
            gpus.add_row([gpu, name, rate(out_gbps), rate(in_gbps), rate(both_gbps)]);
        };
        for row in &self.gpus {
            add(row.gpu.to_string(), row.name.clone(), row.limit);
        }
        for row in &self.joint {
            let gpus: Vec<String> = row.gpus.iter().map(u32::to_string).collect();
            add(gpus.join(","), "at the same time".into(), row.limit);
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
            let target = row.target.map(|target| match row.unit {
                RATE => format!(">= {}", percent(target)),
                unit => format!("<= {target} {unit}"),
            });
            let of_limit = row
                .limit
                .zip(row.ratio)
                .map(|(limit, ratio)| match row.unit {
                    RATE => percent(ratio),
                    unit => format!("{ratio:.3} of {limit:.3} {unit}"),
                });
            let digits = match row.unit {
                "cores" | "x" | "x in the mean" => 3,
                _ => 1,
            };
            rows.add_row([
                gpus.join(","),
                row.case.clone(),
                row.what.to_owned(),
                format!("{:.digits$} {}", row.value, row.unit),
                of_limit.unwrap_or_default(),
                target.unwrap_or_default(),
                row.met
                    .map_or("", |met| if met { "yes" } else { "NO" })
                    .to_owned(),
            ]);
        }
        let mut text = format!("{gpus}\n{rows}");
        if !self.raw.is_empty() {
            text += &format!("\n{}", interference::render(&self.raw));
        }
        if !self.curve.is_empty() {
            text += &format!("\n{}", curve::render(&self.curve));
        }
        text
    }
}
