//! One isolation domain: what the catalog knows it by, its name, and the models it may use.

#![forbid(unsafe_code)]

use std::fmt;

use pegaflow_shm::node::DOMAIN_NAME_BYTES;
use pegaflow_shm::status::Status;
use twox_hash::XxHash3_64;
use wildmatch::WildMatch;

use crate::lane::api::Refusal;

/// Longest name of a domain in bytes: what a row of the node file holds.
pub const MAX_DOMAIN_NAME_BYTES: usize = DOMAIN_NAME_BYTES;
/// Begins the names of domains that follow from a user id; no configured name may.
pub const USER_PREFIX: &str = "uid-";
/// The pattern that every model name fits.
pub const ANY_MODEL: &str = "*";

/// What a domain is known by where it must outlive the daemon: the user id of a domain that is one
/// user, a digest of name and patterns (top bit set) of a configured one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DomainKey(pub u64);

const NAMED: u64 = 1 << 63;

impl DomainKey {
    /// The domain that is one user.
    pub const fn of_user(uid: u32) -> DomainKey {
        DomainKey(uid as u64)
    }

    /// The user, when the domain is one.
    pub fn user(self) -> Option<u32> {
        u32::try_from(self.0).ok()
    }

    /// Each text goes in with its length, so that no two lists of texts are the same bytes.
    fn of_rules(name: &str, patterns: &[String]) -> DomainKey {
        let mut bytes = Vec::new();
        for text in std::iter::once(name).chain(patterns.iter().map(String::as_str)) {
            bytes.extend((text.len() as u64).to_le_bytes());
            bytes.extend(text.as_bytes());
        }
        DomainKey(XxHash3_64::oneshot(&bytes) | NAMED)
    }
}

/// A domain as sessions belong to it.
#[derive(Clone, Debug, PartialEq)]
pub struct IsolationDomain {
    key: DomainKey,
    name: String,
    patterns: Vec<String>,
    matchers: Vec<WildMatch>,
}

impl IsolationDomain {
    /// The domain of a user whom no rule mentions: named after the user id, every model.
    pub fn of_user(uid: u32) -> IsolationDomain {
        let name = format!("{USER_PREFIX}{uid}");
        IsolationDomain::new(DomainKey::of_user(uid), name, vec![ANY_MODEL.to_owned()])
    }

    /// A configured domain. The order of the patterns and repeated ones do not matter.
    pub fn named(name: &str, patterns: &[String]) -> IsolationDomain {
        let mut patterns = patterns.to_vec();
        patterns.sort_unstable();
        patterns.dedup();
        let key = DomainKey::of_rules(name, &patterns);
        IsolationDomain::new(key, name.to_owned(), patterns)
    }

    fn new(key: DomainKey, name: String, patterns: Vec<String>) -> IsolationDomain {
        let matchers = patterns.iter().map(|pattern| WildMatch::new(pattern));
        IsolationDomain {
            key,
            name,
            matchers: matchers.collect(),
            patterns,
        }
    }

    /// What the catalog knows it by.
    pub fn key(&self) -> DomainKey {
        self.key
    }

    /// Its name in tables, logs and metrics.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether its sessions may use this model's blocks.
    pub fn allows(&self, model: &str) -> bool {
        self.matchers.iter().any(|matcher| matcher.matches(model))
    }

    /// [`Self::allows`], in words for the client.
    ///
    /// # Errors
    /// The model is not one of the domain's; names model, domain and patterns.
    pub fn check_model(&self, model: &str) -> Result<(), Refusal> {
        if self.allows(model) {
            return Ok(());
        }
        let text = format!(
            "model `{model}` is none of isolation domain `{self}`, which may use `{}`: add a \
             pattern to the domain's `namespaces` in pegaflowd's configuration, or run the engine \
             as a user of another domain",
            self.patterns.join("`, `")
        );
        Err(Refusal::new(Status::PermissionDenied, text))
    }
}

impl fmt::Display for IsolationDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str, patterns: &[&str]) -> IsolationDomain {
        let patterns: Vec<String> = patterns.iter().map(ToString::to_string).collect();
        IsolationDomain::named(name, &patterns)
    }

    #[test]
    fn a_key_changes_with_name_and_patterns_and_with_nothing_else() {
        let base = named("serving", &["a/*", "b"]).key();
        assert_eq!(base, named("serving", &["b", "a/*", "b"]).key());
        for other in [
            named("serving2", &["a/*", "b"]),
            named("serving", &["a/*"]),
            named("serving", &["a/*b"]),
            named("servinga/*", &["b"]),
        ] {
            assert_ne!(base, other.key(), "{other:?}");
        }
        assert_eq!(base.user(), None, "no user id looks like a named domain");
    }

    #[test]
    fn a_user_is_known_by_the_user_id() {
        let domain = IsolationDomain::of_user(u32::MAX);
        assert_eq!(domain.key(), DomainKey(u64::from(u32::MAX)));
        assert_eq!(domain.key().user(), Some(u32::MAX));
        assert_eq!(domain.name(), "uid-4294967295");
        assert!(domain.name().len() <= MAX_DOMAIN_NAME_BYTES);
        assert!(domain.allows("any/model at all"));
    }

    #[test]
    fn patterns_name_models_with_stars_and_question_marks_alone() {
        let domain = named("d", &["meta-llama/*", "qwen-?b", "exact[1]"]);
        for yes in ["meta-llama/", "meta-llama/a/b", "qwen-7b", "exact[1]"] {
            assert_eq!(domain.check_model(yes), Ok(()), "{yes}");
        }
        for no in ["", "Meta-llama/x", "x/meta-llama/y", "qwen-70b", "exact1"] {
            let refusal = domain.check_model(no).unwrap_err();
            assert_eq!(refusal.status, Status::PermissionDenied);
            let named = format!("model `{no}`");
            for word in [named.as_str(), "domain `d`", "`meta-llama/*`, `qwen-?b`"] {
                assert!(refusal.message.contains(word), "{refusal}");
            }
        }
    }
}
