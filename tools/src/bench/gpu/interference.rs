//! What saves and loads cost an engine that computes meanwhile, and what copies without a daemon
//! do: everything in turns, so that a clock that drifts is the same for all.

#![forbid(unsafe_code)]

use serde::Serialize;

use super::case::Compute;
use super::engine::{Answer, Order, Product, Way};
use super::raw::Shape;
use super::{Engine, say};
use crate::error::ToolError;
use crate::output::table;
use crate::replay::latency::median;

/// How often each is measured.
const TURNS: usize = 5;

/// What the copies cost a computation.
#[derive(Clone, Debug, Serialize)]
pub struct Slowdown {
    /// A product alone.
    pub alone: Product,
    /// While saving.
    pub saving: Product,
    /// While loading.
    pub loading: Product,
    /// Rate of the saves meanwhile.
    pub save_gbps: f64,
    /// Rate of the loads meanwhile.
    pub load_gbps: f64,
}

/// What copies of one shape cost a computation.
#[derive(Clone, Debug, Serialize)]
pub struct RawRow {
    gpu: u32,
    pub shape: Shape,
    name: &'static str,
    compute: &'static str,
    /// A product alone.
    alone: Product,
    /// Beside copies to the host, and to the GPU.
    beside_out: Product,
    beside_in: Product,
    /// Their rates meanwhile.
    out_gbps: f64,
    in_gbps: f64,
}

impl RawRow {
    /// By how much a product slows down in the median, beside copies to the host and to the GPU.
    pub fn slowdowns(&self) -> [f64; 2] {
        [self.beside_out, self.beside_in].map(|beside| beside.times(self.alone).median)
    }
}

/// Who copies beside a computation.
#[derive(Clone, Copy, Debug)]
enum Beside {
    Nobody,
    Daemon(Way),
    Raw(Shape, Way),
}

/// The turns of one of them.
struct Turns {
    beside: Beside,
    products: Vec<Product>,
    rates: Vec<f64>,
}

impl Turns {
    fn of(beside: Beside) -> Turns {
        Turns {
            beside,
            products: Vec::new(),
            rates: Vec::new(),
        }
    }

    fn product(&self) -> Product {
        Product::of_turns(&self.products)
    }

    fn gbps(&self) -> f64 {
        median(&self.rates)
    }
}

/// A process that copies without a daemon.
pub struct Copier(Engine);

impl Copier {
    /// On this GPU.
    pub(super) fn start(gpu: u32) -> Result<Copier, ToolError> {
        let mut engine = Engine::start(gpu)?;
        match engine.ask(&Order::Open { gpu })? {
            Answer::Opened { .. } => Ok(Copier(engine)),
            other => Err(engine.unexpected(&other)),
        }
    }

    fn begin(&mut self, way: Way, shape: Shape) -> Result<(), ToolError> {
        match self.0.ask(&Order::StartCopies { way, shape })? {
            Answer::Done => Ok(()),
            other => Err(self.0.unexpected(&other)),
        }
    }

    fn end(&mut self) -> Result<f64, ToolError> {
        match self.0.ask(&Order::StopCopies)? {
            Answer::Rate(gbps) => Ok(gbps),
            other => Err(self.0.unexpected(&other)),
        }
    }
}

/// Measures one computation beside the engine's saves and loads, and beside all shapes of copies
/// if there is somebody who makes them.
pub(super) fn measure(
    engine: &mut Engine,
    mut copier: Option<&mut Copier>,
    compute: Compute,
    part_ms: u64,
) -> Result<(Slowdown, Vec<RawRow>), ToolError> {
    let [out, into] = [Way::Out, Way::In];
    let mut all: Vec<Turns> = [Beside::Nobody, Beside::Daemon(out), Beside::Daemon(into)]
        .map(Turns::of)
        .into();
    if copier.is_some() {
        let shapes = Shape::ALL.into_iter();
        let ways = shapes.flat_map(|shape| [out, into].map(|way| Beside::Raw(shape, way)));
        all.extend(ways.map(Turns::of));
    }
    for turn in 0..TURNS {
        say(&format!("{}, turn {} of {TURNS}", compute.name(), turn + 1));
        for turns in &mut all {
            one_turn(engine, copier.as_deref_mut(), (compute, part_ms), turns)?;
        }
        // What comes first in one turn comes last in the next.
        all.reverse();
    }
    if TURNS % 2 == 1 {
        all.reverse();
    }
    let (alone, saves, loads) = (&all[0], &all[1], &all[2]);
    let slowdown = Slowdown {
        alone: alone.product(),
        saving: saves.product(),
        loading: loads.product(),
        save_gbps: saves.gbps(),
        load_gbps: loads.gbps(),
    };
    let raws = all[3..]
        .chunks(2)
        .zip(Shape::ALL)
        .map(|(ways, shape)| RawRow {
            gpu: engine.gpu,
            shape,
            name: shape.name(),
            compute: compute.name(),
            alone: alone.product(),
            beside_out: ways[0].product(),
            beside_in: ways[1].product(),
            out_gbps: ways[0].gbps(),
            in_gbps: ways[1].gbps(),
        });
    Ok((slowdown, raws.collect()))
}

fn one_turn(
    engine: &mut Engine,
    copier: Option<&mut Copier>,
    (compute, part_ms): (Compute, u64),
    turns: &mut Turns,
) -> Result<(), ToolError> {
    let way = match turns.beside {
        Beside::Daemon(way) => Some(way),
        Beside::Nobody | Beside::Raw(..) => None,
    };
    let mut product = |beside| {
        let order = Order::Compute {
            compute,
            part_ms,
            beside,
        };
        match engine.ask(&order)? {
            Answer::Product(product, gbps) => Ok((product, gbps)),
            other => Err(engine.unexpected(&other)),
        }
    };
    let (product, gbps) = match (turns.beside, copier) {
        (Beside::Raw(shape, way), Some(copier)) => {
            copier.begin(way, shape)?;
            let (product, _) = product(None)?;
            (product, Some(copier.end()?))
        }
        _ => product(way)?,
    };
    turns.products.push(product);
    turns.rates.extend(gbps);
    Ok(())
}

/// As a table.
pub(super) fn render(rows: &[RawRow]) -> String {
    let header = [
        "GPU",
        "raw copies",
        "engine",
        "out",
        "in",
        "slow-down by out (mean)",
        "by in (mean)",
    ];
    let mut raws = table(&header, &[0, 3, 4, 5, 6]);
    let rate = |gbps: f64| format!("{gbps:.1} GB/s");
    for row in rows {
        raws.add_row([
            row.gpu.to_string(),
            row.name.to_owned(),
            row.compute.to_owned(),
            rate(row.out_gbps),
            rate(row.in_gbps),
            row.beside_out.times(row.alone).to_string(),
            row.beside_in.times(row.alone).to_string(),
        ]);
    }
    format!("Copies of a process of its own, without a daemon\n{raws}")
}
