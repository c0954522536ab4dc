//! What is true, whatever the daemon believes: what each page and block holds, which blocks a lease
//! was given for.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use crate::sim::kv::Content;

/// A lease as its client heard of it.
#[derive(Clone, Debug)]
pub struct GivenLease {
    pub instance: usize,
    pub group: u16,
    /// Hashes of its blocks, in order.
    pub hits: Vec<u64>,
}

/// A broken invariant.
#[derive(Clone, Debug)]
pub struct Violation {
    /// Name of the check.
    pub invariant: &'static str,
    /// What was found.
    pub what: String,
}

/// The end of a check.
pub type Checked = Result<(), Violation>;

/// A violation, unless `holds`.
pub fn ensure(holds: bool, invariant: &'static str, what: impl FnOnce() -> String) -> Checked {
    if holds {
        return Ok(());
    }
    Err(Violation {
        invariant,
        what: what(),
    })
}

/// The model.
#[derive(Default)]
pub struct Truth {
    /// What each page holds, by its offset in the pool; absent while nothing, or something
    /// incomplete, lies there.
    pub pages: BTreeMap<u64, Content>,
    /// Leases given by the running daemon.
    pub leases: BTreeMap<u64, GivenLease>,
    /// Leases of daemons that are gone.
    pub old_leases: Vec<u64>,
    /// Namespace of each row of the catalog, as far as the running daemon told.
    pub rows: BTreeMap<u32, usize>,
    pub last_version: u64,
}

impl Truth {
    /// A page holds this from now on; `None` for what nobody can tell.
    pub fn set_page(&mut self, offset: u64, content: Option<Content>) {
        match content {
            Some(content) => self.pages.insert(offset, content),
            None => self.pages.remove(&offset),
        };
    }
}
