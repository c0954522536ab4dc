//! Rows of the node file's tables: sessions, leases, namespaces, isolation domains, GPUs, SSD
//! shards.
//!
//! Text fields are UTF-8, cut to the field and padded with zeros.

#![forbid(unsafe_code)]

use bytemuck::{Pod, Zeroable};

/// Sessions the table shows; also the most a daemon serves.
pub const SESSION_ROWS: usize = 256;
/// Leases the table shows; a daemon may hold more, which only the gauge counts.
pub const LEASE_ROWS: usize = 1024;
/// Namespaces the table shows; also the most a daemon keeps.
pub const NAMESPACE_ROWS: usize = 256;
/// Isolation domains the table shows; also the most a daemon keeps.
pub const DOMAIN_ROWS: usize = 64;
/// GPUs the table shows.
pub const DEVICE_ROWS: usize = 32;
/// SSD shards the table shows; also the most a daemon opens.
pub const SSD_ROWS: usize = 64;
/// Buckets of an SSD shard's latencies: up to 16 us, then twice as long each, the last one open.
pub const SSD_BUCKETS: usize = 21;
/// Longest name of an isolation domain in bytes.
pub const DOMAIN_NAME_BYTES: usize = 32;

/// A connected session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct SessionRow {
    /// Session id; 0 marks a free row.
    pub session: u64,
    /// Process id of the client.
    pub pid: u32,
    /// User id of the client.
    pub uid: u32,
    /// Unix time of the connection in milliseconds.
    pub connected_unix_ms: u64,
    /// Slots of the submission ring.
    pub submission_slots: u32,
    /// Slots of the completion ring.
    pub completion_slots: u32,
    /// Submissions read.
    pub submissions: u64,
    /// Completions posted.
    pub completions: u64,
    /// Requests taken and not completed.
    pub unfinished: u32,
    /// Registrations.
    pub registrations: u32,
    /// Copy tasks handed out and not done.
    pub copies: u32,
    /// Of these, those that its process holds up.
    pub stuck_copies: u32,
    /// Rank of the first registration, `u32::MAX` for a scheduler or none.
    pub rank: u32,
    /// World size of the first registration, 0 for none.
    pub world_size: u32,
    /// Name the client gave itself.
    pub client_name: [u8; 64],
    /// Instance of the first registration.
    pub instance: [u8; 64],
    /// Isolation domain.
    pub domain: [u8; DOMAIN_NAME_BYTES],
}

/// A live lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct LeaseRow {
    /// Lease id; 0 marks a free row.
    pub lease: u64,
    /// Session that holds it.
    pub session: u64,
    /// The engine's request key.
    pub request_key: u64,
    /// Unix time at which it expires, in milliseconds.
    pub expires_unix_ms: u64,
    /// Blocks it pins.
    pub blocks: u32,
    /// Workers that have loaded.
    pub consumed_by: u32,
    /// Workers that may load.
    pub world_size: u32,
    /// Copies still running.
    pub copies: u32,
    /// Cache group.
    pub group: u32,
    /// Namespace row.
    pub namespace: u32,
}

/// A namespace with blocks or registrations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct NamespaceRow {
    /// 1 when the row is in use.
    pub used: u32,
    /// World size of its instances.
    pub world_size: u32,
    /// Tokens per block.
    pub block_tokens: u32,
    /// Zero.
    pub reserved: u32,
    /// Sealed blocks held.
    pub blocks: u64,
    /// Bytes of their pages.
    pub bytes: u64,
    /// Blocks queried.
    pub queried: u64,
    /// Blocks hit.
    pub hits: u64,
    /// Digest.
    pub digest: [u8; 32],
    /// Summary of the spec.
    pub summary: [u8; 160],
    /// Isolation domain.
    pub domain: [u8; DOMAIN_NAME_BYTES],
}

/// An isolation domain that has had sessions or blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct DomainRow {
    /// What the catalog knows it by.
    pub key: u64,
    /// 1 when the row is in use.
    pub used: u32,
    /// Sessions.
    pub sessions: u32,
    /// Live leases.
    pub leases: u64,
    /// Sealed blocks.
    pub blocks: u64,
    /// Bytes of the pages of its blocks, finished or not.
    pub bytes: u64,
    /// Blocks that leases or unfinished queries hold.
    pub pinned: u64,
    /// Pins of all of them: a block that several hold has several.
    pub pins: u64,
    /// Name.
    pub name: [u8; DOMAIN_NAME_BYTES],
}

/// A GPU that the daemon can use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct DeviceRow {
    /// 1 when the row is in use.
    pub used: u32,
    /// 0: no engine has shared memory of it yet; 1: it serves; 2: it is down.
    pub state: u32,
    /// Its number in the daemon.
    pub ordinal: u32,
    /// Allocations of engines that are mapped.
    pub regions: u32,
    /// Bytes copied from it.
    pub saved_bytes: u64,
    /// Bytes copied to it.
    pub loaded_bytes: u64,
    /// Time during which copies from it were under way, in nanoseconds.
    pub save_busy_nanos: u64,
    /// Time during which copies to it were under way, in nanoseconds.
    pub load_busy_nanos: u64,
    /// Bytes copied segment by segment.
    pub direct_bytes: u64,
    /// Bytes gathered or scattered by a kernel.
    pub staged_bytes: u64,
    /// Of both, those that went through a pinned buffer and the CPU.
    pub bounced_bytes: u64,
    /// Copy tasks handed to it and not done.
    pub tasks: u64,
    /// Bytes of its memory that the daemon has taken beside the context.
    pub staging_bytes: u64,
    /// Times it went down.
    pub downs: u64,
    /// UUID, as `nvidia-smi -L` prints it behind `GPU-` or `MIG-`.
    pub uuid: [u8; 40],
    /// The driver's name for it.
    pub name: [u8; 64],
}

/// A file of the SSD tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct SsdRow {
    /// 1 when the row is in use.
    pub used: u32,
    /// 0: reads and writes; 1: reads alone; 2: out of order.
    pub state: u32,
    /// Requests queued or at the drive.
    pub pending: u32,
    /// Zero.
    pub reserved: u32,
    /// Bytes that can hold pages.
    pub capacity_bytes: u64,
    /// Bytes of pages that can be read.
    pub live_bytes: u64,
    /// Blocks that can be read.
    pub blocks: u64,
    /// Of these, those that a power loss now would lose.
    pub uncommitted_blocks: u64,
    /// Bytes of pages written.
    pub written_bytes: u64,
    /// Bytes that went to the drive for them: pages, padding, tables.
    pub device_written_bytes: u64,
    /// Bytes of pages read and found right.
    pub read_bytes: u64,
    /// Pages whose bytes were not those that were written.
    pub bad_pages: u64,
    /// Reads that the system failed.
    pub read_errors: u64,
    /// Writes and syncs that the system failed.
    pub write_errors: u64,
    /// Times that it went out of order.
    pub degradations: u64,
    /// Requests refused because it was out of order.
    pub refused: u64,
    /// Blocks that left to make room.
    pub evicted_blocks: u64,
    /// Segments that were emptied and used again.
    pub segments_reclaimed: u64,
    /// Commits: tables written and synced.
    pub commits: u64,
    /// Time of all pages read, in nanoseconds.
    pub read_nanos: u64,
    /// Time of all pages written, in nanoseconds.
    pub write_nanos: u64,
    /// Pages read, by how long each took; see [`ssd_bucket_end`].
    pub read_buckets: [u64; SSD_BUCKETS],
    /// Pages written, likewise.
    pub write_buckets: [u64; SSD_BUCKETS],
    /// Why it is in its state; empty when nothing is wrong.
    pub reason: [u8; 64],
    /// The file.
    pub path: [u8; 256],
}

/// The longest time in nanoseconds that a bucket of [`SsdRow`] counts; `None` for the last.
pub fn ssd_bucket_end(bucket: usize) -> Option<u64> {
    (bucket + 1 < SSD_BUCKETS).then(|| 16_000 << bucket)
}

impl SsdRow {
    /// [`SsdRow::state`] in a word.
    pub fn state_text(&self) -> &'static str {
        match self.state {
            0 => "healthy",
            1 => "reads only",
            _ => "degraded",
        }
    }

    /// Bytes sent to the drive for each byte of pages; 1 before the first.
    pub fn write_amplification(&self) -> f64 {
        match self.written_bytes {
            0 => 1.0,
            written => self.device_written_bytes as f64 / written as f64,
        }
    }
}

impl DeviceRow {
    /// [`DeviceRow::state`] in a word.
    pub fn state_text(&self) -> &'static str {
        match self.state {
            0 => "unused",
            1 => "up",
            _ => "down",
        }
    }
}

const _: () = {
    assert!(size_of::<DeviceRow>() == 200);
    assert!(size_of::<SsdRow>() == 808);
    assert!(size_of::<SessionRow>() == 232);
    assert!(size_of::<LeaseRow>() == 56);
    assert!(size_of::<NamespaceRow>() == 272);
    assert!(size_of::<DomainRow>() == 88);
};

/// Puts text into a fixed field, cut at a character boundary.
pub fn text_field<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [0; N];
    let mut end = text.len().min(N);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    field[..end].copy_from_slice(&text.as_bytes()[..end]);
    field
}

/// Reads a fixed field.
pub fn field_text(field: &[u8]) -> String {
    let end = field
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(field.len());
    String::from_utf8_lossy(&field[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_cut_at_a_character() {
        assert_eq!(field_text(&text_field::<4>("abcé")), "abc");
        assert_eq!(field_text(&text_field::<8>("abcé")), "abcé");
        assert_eq!(field_text(&text_field::<2>("")), "");
    }
}
