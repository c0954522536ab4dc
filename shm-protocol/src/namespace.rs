//! Namespaces: the domain in which one block hash means one run of bytes.
//!
//! Two instances share blocks only when everything that decides the bytes is equal: the model and
//! its revision, the dtype, how the engine lays a block out, the parallel topology, the tokens in a
//! block, the hash algorithm and its salt, and the sizes of the segments that each rank packs into
//! a page. All of it goes into one BLAKE3 digest; nothing is left to a default that could silently
//! differ.

#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

/// What the engine says about its blocks. Text is compared byte by byte.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct NamespaceSpec {
    /// Model name or path, as the operator would recognise it. Required.
    pub model: String,
    /// Model revision, LoRA set, quantisation: whatever changes the KV values.
    #[serde(default)]
    pub revision: String,
    /// Element type of the KV cache, such as `bfloat16` or `fp8_e4m3`. Required.
    pub dtype: String,
    /// Layout of a block inside its segments, such as `NHD` or `HND`.
    #[serde(default)]
    pub kv_layout: String,
    /// Parallel topology beyond the world size, such as `tp4pp2`.
    #[serde(default)]
    pub topology: String,
    /// Algorithm, seed and input format of the block hashes. Required.
    pub hash_algorithm: String,
    /// Tenant or cache salt.
    #[serde(default)]
    pub salt: String,
    /// Tokens in a block. Required.
    pub block_tokens: u32,
}

/// Longest text field in bytes.
pub const MAX_FIELD_BYTES: usize = 1024;

/// Segment sizes, in packing order, of one rank's group: what gives the bytes of a page their
/// meaning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedGroup {
    /// Worker rank.
    pub rank: u32,
    /// Cache group.
    pub group: u16,
    /// Bytes of each segment.
    pub segment_bytes: Vec<u64>,
    /// All ranks hold the same bytes, which are stored once.
    pub replicated: bool,
}

/// In the digest's count of segments: the group is replicated.
const REPLICATED: u64 = 1 << 63;

/// A namespace field that cannot be accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NamespaceFault {
    /// A required field is empty.
    #[error("namespace field `{0}` is empty: set it, or blocks of different meaning would mix")]
    Empty(&'static str),
    /// A field is too long.
    #[error("namespace field `{field}` has {bytes} bytes, at most {MAX_FIELD_BYTES} are allowed")]
    TooLong {
        /// The field.
        field: &'static str,
        /// Its length.
        bytes: usize,
    },
}

impl NamespaceSpec {
    fn fields(&self) -> [(&'static str, &str, bool); 7] {
        [
            ("model", &self.model, true),
            ("revision", &self.revision, false),
            ("dtype", &self.dtype, true),
            ("kv_layout", &self.kv_layout, false),
            ("topology", &self.topology, false),
            ("hash_algorithm", &self.hash_algorithm, true),
            ("salt", &self.salt, false),
        ]
    }

    /// Checks that the required fields are there and none is too long.
    ///
    /// # Errors
    /// Names the first field that is not acceptable.
    pub fn check(&self) -> Result<(), NamespaceFault> {
        for (field, value, required) in self.fields() {
            if required && value.is_empty() {
                return Err(NamespaceFault::Empty(field));
            }
            if value.len() > MAX_FIELD_BYTES {
                return Err(NamespaceFault::TooLong {
                    field,
                    bytes: value.len(),
                });
            }
        }
        if self.block_tokens == 0 {
            return Err(NamespaceFault::Empty("block_tokens"));
        }
        Ok(())
    }

    /// Digest over the spec, the world size and every rank's packed groups, sorted by rank and
    /// group.
    pub fn digest(&self, world_size: u32, groups: &[PackedGroup]) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key("pegaflow namespace v1");
        for (_, value, _) in self.fields() {
            hasher.update(&(value.len() as u64).to_le_bytes());
            hasher.update(value.as_bytes());
        }
        hasher.update(&self.block_tokens.to_le_bytes());
        hasher.update(&world_size.to_le_bytes());
        let mut sorted: Vec<&PackedGroup> = groups.iter().collect();
        sorted.sort_by_key(|packed| (packed.rank, packed.group));
        for packed in sorted {
            hasher.update(&packed.rank.to_le_bytes());
            hasher.update(&packed.group.to_le_bytes());
            let mark = if packed.replicated { REPLICATED } else { 0 };
            let segments = packed.segment_bytes.len() as u64 | mark;
            hasher.update(&segments.to_le_bytes());
            for bytes in &packed.segment_bytes {
                hasher.update(&bytes.to_le_bytes());
            }
        }
        *hasher.finalize().as_bytes()
    }

    /// One line for logs and tables.
    pub fn summary(&self) -> String {
        let mut line = format!("{} {} {}tok", self.model, self.dtype, self.block_tokens);
        for extra in [&self.revision, &self.kv_layout, &self.topology] {
            if !extra.is_empty() {
                line.push(' ');
                line.push_str(extra);
            }
        }
        line
    }
}

/// What a tier below the pool knows a namespace by, for as long as its bytes last: the isolation
/// domain is part of it, so that no domain ever asks for another one's blocks.
pub fn tier_scope(domain_key: u64, digest: &[u8; 32]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("pegaflow tier scope v1");
    hasher.update(&domain_key.to_le_bytes());
    hasher.update(digest);
    *hasher.finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> NamespaceSpec {
        NamespaceSpec {
            model: "m".into(),
            dtype: "bf16".into(),
            hash_algorithm: "sha256".into(),
            block_tokens: 16,
            ..NamespaceSpec::default()
        }
    }

    fn groups() -> Vec<PackedGroup> {
        vec![
            PackedGroup {
                rank: 0,
                group: 0,
                segment_bytes: vec![64, 64],
                replicated: false,
            },
            PackedGroup {
                rank: 1,
                group: 0,
                segment_bytes: vec![128],
                replicated: false,
            },
        ]
    }

    #[test]
    fn every_field_changes_the_digest() {
        let base = spec().digest(2, &groups());
        let changed = [
            NamespaceSpec {
                model: "n".into(),
                ..spec()
            },
            NamespaceSpec {
                revision: "r".into(),
                ..spec()
            },
            NamespaceSpec {
                dtype: "fp8".into(),
                ..spec()
            },
            NamespaceSpec {
                kv_layout: "HND".into(),
                ..spec()
            },
            NamespaceSpec {
                topology: "tp2".into(),
                ..spec()
            },
            NamespaceSpec {
                hash_algorithm: "x".into(),
                ..spec()
            },
            NamespaceSpec {
                salt: "tenant".into(),
                ..spec()
            },
            NamespaceSpec {
                block_tokens: 32,
                ..spec()
            },
        ];
        let digests: std::collections::HashSet<_> = changed
            .iter()
            .map(|spec| spec.digest(2, &groups()))
            .collect();
        assert_eq!(digests.len(), changed.len());
        assert!(!digests.contains(&base));
        assert_ne!(base, spec().digest(3, &groups()));
        let mut merged = groups();
        merged[0].segment_bytes = vec![128];
        assert_ne!(base, spec().digest(2, &merged));
    }

    #[test]
    fn every_part_of_every_ranks_layout_changes_the_digest() {
        let base = spec().digest(2, &groups());
        let changes: [fn(&mut Vec<PackedGroup>); 7] = [
            |groups| groups[1].replicated = true,
            |groups| groups[0].segment_bytes[1] = 65,
            |groups| groups[0].segment_bytes.swap(0, 1),
            |groups| groups[1].segment_bytes.push(128),
            |groups| groups[1].group = 1,
            |groups| groups[1].rank = 2,
            |groups| drop(groups.pop()),
        ];
        for (number, change) in changes.iter().enumerate() {
            let mut changed = groups();
            changed[0].segment_bytes[0] = 32;
            let before = spec().digest(2, &changed);
            change(&mut changed);
            assert_ne!(spec().digest(2, &changed), before, "change {number}");
            assert_ne!(spec().digest(2, &changed), base, "change {number}");
        }
    }

    #[test]
    fn text_cannot_move_between_fields() {
        let left = NamespaceSpec {
            model: "ab".into(),
            revision: "c".into(),
            ..spec()
        };
        let right = NamespaceSpec {
            model: "a".into(),
            revision: "bc".into(),
            ..spec()
        };
        assert_ne!(left.digest(1, &[]), right.digest(1, &[]));
    }

    #[test]
    fn order_of_registration_does_not_matter() {
        let mut reversed = groups();
        reversed.reverse();
        assert_eq!(spec().digest(2, &groups()), spec().digest(2, &reversed));
    }

    #[test]
    fn missing_fields_are_named() {
        let fault = NamespaceSpec {
            dtype: String::new(),
            ..spec()
        }
        .check();
        assert_eq!(fault, Err(NamespaceFault::Empty("dtype")));
        assert!(
            NamespaceSpec {
                block_tokens: 0,
                ..spec()
            }
            .check()
            .is_err()
        );
        assert!(
            NamespaceSpec {
                salt: "x".repeat(2000),
                ..spec()
            }
            .check()
            .is_err()
        );
        assert_eq!(spec().check(), Ok(()));
    }

    #[test]
    fn a_scope_tells_domains_and_namespaces_apart() {
        let scope = |domain, byte| tier_scope(domain, &[byte; 32]);
        assert_eq!(scope(1, 2), scope(1, 2));
        assert_ne!(scope(1, 2), scope(2, 2));
        assert_ne!(scope(1, 2), scope(1, 3));
    }
}
