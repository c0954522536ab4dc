//! The kernels that the project has, by name, and the PTX in which they come.
//!
//! Both read a table of parts `(base, block stride, bytes, offset in page)` in memory that the
//! device reaches, and a list of block numbers; page `p` of the staging memory lies at
//! `p * page_bytes`. `pega_gather` copies from the blocks to the pages, `pega_scatter` back.

#![forbid(unsafe_code)]

use crate::code::{Code, Outcome};
use crate::driver::driver;
use crate::mapping::{Place, copy};
use crate::ranges::Ranges;

/// A kernel that can be run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// `pega_gather`.
    Gather,
    /// `pega_scatter`.
    Scatter,
}

/// Bytes of each argument of both kernels, in order: `parts`, `part_count`, `blocks`, `pages`,
/// `page_bytes`, `staging`.
pub const ARGUMENT_BYTES: [usize; 6] = [8, 4, 8, 4, 8, 8];
const PART_BYTES: u64 = 24;

impl Kernel {
    /// The kernel of this name.
    pub fn named(name: &str) -> Option<Kernel> {
        match name {
            "pega_gather" => Some(Kernel::Gather),
            "pega_scatter" => Some(Kernel::Scatter),
            _ => None,
        }
    }
}

/// Names of the entry points of a PTX module; an error if it is none.
pub fn entries(ptx: &str) -> Outcome<Vec<String>> {
    let has = |directive: &str| {
        let mut lines = ptx.lines();
        lines.any(|line| line.trim_start().starts_with(directive))
    };
    if !has(".version") || !has(".target") || !has(".address_size") {
        return Err(Code::INVALID_PTX);
    }
    let name = |text: &str| {
        let text = text.trim_start();
        let end = text.find(|c: char| !c.is_alphanumeric() && c != '_' && c != '$');
        text[..end.unwrap_or(text.len())].to_owned()
    };
    Ok(ptx.split(".entry").skip(1).map(name).collect())
}

/// A kernel with its arguments.
pub struct Launch {
    /// Which one.
    pub kernel: Kernel,
    /// The arguments as numbers.
    pub arguments: [u64; 6],
}

struct Part {
    base: u64,
    stride: u64,
    bytes: u64,
    offset: u64,
}

impl Launch {
    /// Runs it; an address where nothing lies is a fault of the context.
    pub fn run(&self) -> Outcome {
        let [parts, part_count, blocks, pages, page_bytes, staging] = self.arguments;
        let parts = read(parts, part_count * PART_BYTES)?;
        let parts: Vec<Part> = parts
            .chunks_exact(PART_BYTES as usize)
            .map(|part| Part {
                base: word(&part[..8]),
                stride: word(&part[8..16]),
                bytes: word(&part[16..20]),
                offset: word(&part[20..24]),
            })
            .collect();
        let blocks = read(blocks, pages * 4)?;
        for (page, block) in blocks.chunks_exact(4).enumerate() {
            // Locked anew for each page: calls of other threads come in between.
            let state = driver()?.lock();
            let ranges = &state.ranges;
            for part in &parts {
                let piece = part.base.wrapping_add(word(block) * part.stride);
                let place = staging + page as u64 * page_bytes + part.offset;
                if part.offset + part.bytes > page_bytes {
                    return Err(Code::ILLEGAL_ADDRESS);
                }
                let (to, from) = match self.kernel {
                    Kernel::Gather => (place, piece),
                    Kernel::Scatter => (piece, place),
                };
                let to = reach(ranges, to, part.bytes)?;
                copy(&to, &reach(ranges, from, part.bytes)?);
            }
        }
        Ok(())
    }
}

/// Bytes that a kernel can reach: device memory, or host memory that the driver knows.
fn reach(ranges: &Ranges, address: u64, bytes: u64) -> Outcome<Vec<Place>> {
    match ranges.resolve(address, bytes) {
        Ok(resolved) if resolved.pinned => Ok(resolved.places),
        _ => Err(Code::ILLEGAL_ADDRESS),
    }
}

fn read(address: u64, bytes: u64) -> Outcome<Vec<u8>> {
    if bytes == 0 {
        return Ok(Vec::new());
    }
    let places = reach(&driver()?.lock().ranges, address, bytes)?;
    let mut out = vec![0; bytes as usize];
    let mut rest = out.as_mut_slice();
    for place in &places {
        let (part, after) = rest.split_at_mut(place.bytes());
        place.read(part);
        rest = after;
    }
    Ok(out)
}

fn word(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entry_points_are_found_by_name() {
        let ptx = ".version 8.0\n.target sm_70\n.address_size 64\n\
                   .visible .entry pega_gather(\n.param .u64 a\n)\n{}\n\
                   .visible .entry other (){}";
        assert_eq!(entries(ptx), Ok(vec!["pega_gather".into(), "other".into()]));
        assert_eq!(entries("nonsense"), Err(Code::INVALID_PTX));
    }
}
