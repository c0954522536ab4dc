//! What the pages lie in, for the tier and for fio: how many physical pieces a page has decides how
//! much the kernel and a virtual drive have to do.

#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::Command;

use clap::ValueEnum;
use pegaflow_ssd::PoolMemory;
use rand::RngExt;

use crate::error::ToolError;

/// Whether the pages lie in huge pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Hugepages {
    /// In pages of 4 KiB: tier and fio use the very same ones.
    #[default]
    Off,
    /// In huge pages, fio in its own.
    Advise,
}

/// Memory for the tier, and how fio gets the like.
pub(super) enum Memory {
    File(File),
    /// Bytes in huge pages, of how many.
    Huge(u64, u64),
}

impl Memory {
    /// So many bytes, not all alike.
    pub(super) fn new(hugepages: Hugepages, bytes: usize) -> Result<(PoolMemory, Self), ToolError> {
        let mut content = vec![0; bytes];
        rand::rng().fill(&mut content[..]);
        if hugepages == Hugepages::Off {
            let (pool, file) =
                PoolMemory::in_a_file(&content).map_err(ToolError::io("memory for the pages"))?;
            return Ok((pool, Self::File(file)));
        }
        let before = huge_bytes()?;
        let pool =
            PoolMemory::in_huge_pages(&content).map_err(ToolError::io("memory for the pages"))?;
        let got = huge_bytes()?.saturating_sub(before);
        Ok((pool, Self::Huge(got, bytes as u64)))
    }

    /// In words.
    pub(super) fn words(&self) -> String {
        match self {
            Self::File(_) => "pages of 4 KiB, the same for both".to_owned(),
            Self::Huge(got, of) => format!("{} % in huge pages", (got.min(of) * 100) / of),
        }
    }

    /// Gives fio this memory, or its own of this kind.
    pub(super) fn tell_fio(&self, command: &mut Command) {
        match self {
            Self::File(file) => {
                let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
                command.arg(format!("--iomem=mmapshared:{path}"));
            }
            Self::Huge(..) => {
                command.arg("--iomem_align=2097152");
                // The C library asks for huge pages for what fio allocates.
                command.env("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1");
            }
        }
    }
}

/// Bytes of this process's memory that are in huge pages.
fn huge_bytes() -> Result<u64, ToolError> {
    const PATH: &str = "/proc/self/smaps_rollup";
    let text = std::fs::read_to_string(PATH).map_err(ToolError::io(PATH))?;
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("AnonHugePages:"))
        .and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok());
    Ok(kib.unwrap_or(0) << 10)
}
