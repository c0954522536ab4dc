//! The rules: which domain a process belongs to, and which domain a stored key means.

#![forbid(unsafe_code)]

use std::sync::Arc;

use rustix::process::geteuid;

use super::domain::{DomainKey, IsolationDomain};
use crate::config::{Config, DomainRule};

/// What the kernel says about the process at the other end of a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// Its effective user when it connected.
    pub uid: u32,
    /// Its effective group, then its supplementary groups.
    pub gids: Vec<u32>,
}

/// A process that may not connect.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotAdmitted {
    /// On no list.
    #[error(
        "user {uid} (groups {}) may not connect: start pegaflowd with --allow-uid {uid} or with \
         --allow-gid, or list the user in a [[domain]] of its configuration",
        list(.gids)
    )]
    Unlisted {
        /// The user.
        uid: u32,
        /// Its groups.
        gids: Vec<u32>,
    },
    /// Its groups lie in several domains.
    #[error(
        "user {uid} belongs by its groups to the isolation domains `{}` and `{}`: list the user id in \
         the one that is meant (a user id beats a group)",
        .domains[0], .domains[1]
    )]
    Ambiguous {
        /// The user.
        uid: u32,
        /// Two of the domains.
        domains: [String; 2],
    },
}

fn list(gids: &[u32]) -> String {
    let gids: Vec<String> = gids.iter().map(u32::to_string).collect();
    gids.join(", ")
}

#[derive(Clone, Debug)]
struct Named {
    uids: Vec<u32>,
    gids: Vec<u32>,
    domain: Arc<IsolationDomain>,
}

/// Who is admitted, and to which domain.
#[derive(Clone, Debug)]
pub struct DomainRules {
    allowed_uids: Vec<u32>,
    allowed_gids: Vec<u32>,
    named: Vec<Named>,
}

impl DomainRules {
    /// The rules of a configuration. The daemon's own user and root are always admitted.
    pub fn of(config: &Config) -> DomainRules {
        let mut allowed_uids = config.allow_uid.clone();
        allowed_uids.extend([0, geteuid().as_raw()]);
        DomainRules {
            allowed_uids,
            allowed_gids: config.allow_gid.clone(),
            named: config.domains.iter().map(Named::of).collect(),
        }
    }

    /// Exactly these users, each a domain of its own.
    pub fn only(uids: impl Into<Vec<u32>>) -> DomainRules {
        DomainRules {
            allowed_uids: uids.into(),
            allowed_gids: Vec::new(),
            named: Vec::new(),
        }
    }

    /// Admits members of group 0, so that any user's own domain may be one.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn any_user() -> DomainRules {
        DomainRules {
            allowed_uids: Vec::new(),
            allowed_gids: vec![0],
            named: Vec::new(),
        }
    }

    /// The domain of a process.
    ///
    /// # Errors
    /// It is on no list, or on those of two domains.
    pub fn domain_of(&self, peer: &Credentials) -> Result<Arc<IsolationDomain>, NotAdmitted> {
        let uid = peer.uid;
        if let Some(named) = self.named.iter().find(|named| named.uids.contains(&uid)) {
            return Ok(named.domain.clone());
        }
        let has_one = |gids: &[u32]| peer.gids.iter().any(|gid| gids.contains(gid));
        let mut by_group = self.named.iter().filter(|named| has_one(&named.gids));
        if let Some(first) = by_group.next() {
            return match by_group.next() {
                None => Ok(first.domain.clone()),
                Some(second) => Err(NotAdmitted::Ambiguous {
                    uid,
                    domains: [&first.domain, &second.domain].map(|domain| domain.name().to_owned()),
                }),
            };
        }
        if self.allowed_uids.contains(&uid) || has_one(&self.allowed_gids) {
            return Ok(Arc::new(IsolationDomain::of_user(uid)));
        }
        Err(NotAdmitted::Unlisted {
            uid,
            gids: peer.gids.clone(),
        })
    }

    /// The domain that a key of an earlier daemon means under today's rules; `None` when nobody can
    /// be of that domain any more. The groups of a user who is not connected are not known, so a
    /// user's own domain stays while any group is admitted.
    pub fn domain_by_key(&self, key: DomainKey) -> Option<Arc<IsolationDomain>> {
        let Some(uid) = key.user() else {
            let named = self.named.iter().find(|named| named.domain.key() == key)?;
            return Some(named.domain.clone());
        };
        let moved = self.named.iter().any(|named| named.uids.contains(&uid));
        let admitted = self.allowed_uids.contains(&uid) || !self.allowed_gids.is_empty();
        (admitted && !moved).then(|| Arc::new(IsolationDomain::of_user(uid)))
    }

    /// True when a user besides the daemon's own and root may connect.
    pub fn serves_others(&self) -> bool {
        let own = geteuid().as_raw();
        let other = |uid: &u32| *uid != own && *uid != 0;
        let listed = self.named.iter().flat_map(|named| &named.uids);
        self.allowed_uids.iter().chain(listed).any(other)
            || !self.allowed_gids.is_empty()
            || self.named.iter().any(|named| !named.gids.is_empty())
    }

    /// The configured domains.
    pub fn named(&self) -> impl Iterator<Item = &Arc<IsolationDomain>> {
        self.named.iter().map(|named| &named.domain)
    }
}

impl Named {
    fn of(rule: &DomainRule) -> Named {
        Named {
            uids: rule.uids.clone(),
            gids: rule.gids.clone(),
            domain: Arc::new(IsolationDomain::named(&rule.name, &rule.namespaces)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(name: &str, uids: &[u32], gids: &[u32]) -> DomainRule {
        DomainRule {
            name: name.into(),
            uids: uids.to_vec(),
            gids: gids.to_vec(),
            namespaces: vec!["*".into()],
        }
    }

    fn rules() -> DomainRules {
        DomainRules::of(&Config {
            allow_uid: vec![20],
            allow_gid: vec![300],
            domains: vec![rule("a", &[10, 11], &[100]), rule("b", &[12], &[200, 201])],
            ..Config::default()
        })
    }

    fn name(uid: u32, gids: &[u32]) -> Result<String, NotAdmitted> {
        let gids = gids.to_vec();
        let domain = rules().domain_of(&Credentials { uid, gids })?;
        Ok(domain.name().to_owned())
    }

    #[test]
    fn listed_users_share_a_domain_and_others_have_their_own() {
        assert_eq!(name(10, &[1]), name(11, &[2]));
        assert_eq!(name(10, &[1]), Ok("a".into()));
        assert_eq!(name(12, &[1]), Ok("b".into()));
        assert_eq!(name(20, &[1]), Ok("uid-20".into()));
        assert_eq!(name(0, &[0]), Ok("uid-0".into()), "root keeps its own");
        let own = geteuid().as_raw();
        assert_eq!(name(own, &[1]), Ok(format!("uid-{own}")));
    }

    #[test]
    fn a_group_admits_whether_primary_or_supplementary() {
        assert_eq!(name(50, &[100]), Ok("a".into()));
        assert_eq!(name(50, &[1, 2, 201]), Ok("b".into()));
        assert_eq!(name(50, &[1, 300]), Ok("uid-50".into()));
        assert_eq!(
            name(0, &[1, 100]),
            Ok("a".into()),
            "root may be listed, too"
        );
    }

    #[test]
    fn a_user_id_beats_a_group_and_a_domain_beats_the_allow_lists() {
        assert_eq!(name(12, &[100]), Ok("b".into()));
        assert_eq!(name(20, &[100]), Ok("a".into()));
        assert_eq!(name(50, &[300, 200]), Ok("b".into()));
    }

    #[test]
    fn groups_of_two_domains_are_refused_and_never_guessed() {
        let refused = name(50, &[200, 100]).unwrap_err().to_string();
        assert!(refused.contains("`a` and `b`"), "{refused}");
        assert_eq!(name(50, &[200, 201]), Ok("b".into()), "two of one domain");
    }

    #[test]
    fn a_user_on_no_list_is_told_the_ways_in() {
        let refused = name(99, &[7, 8]).unwrap_err().to_string();
        for word in [
            "user 99",
            "7, 8",
            "--allow-uid 99",
            "--allow-gid",
            "[[domain]]",
        ] {
            assert!(refused.contains(word), "{refused} lacks {word}");
        }
    }

    #[test]
    fn keys_of_domains_that_nobody_can_be_of_are_not_found() {
        let key = |uid| DomainKey::of_user(uid);
        let found = |rules: &DomainRules, key| {
            let domain = rules.domain_by_key(key);
            domain.map(|domain| domain.name().to_owned())
        };
        let rules = rules();
        assert_eq!(found(&rules, key(20)), Some("uid-20".into()));
        assert_eq!(found(&rules, key(50)), Some("uid-50".into()), "by a group");
        assert_eq!(found(&rules, key(10)), None, "moved to `a`");
        let named = rules.named().next().unwrap().key();
        assert_eq!(found(&rules, named), Some("a".into()));
        assert_eq!(found(&rules, DomainKey(named.0 ^ 1)), None);
        let none = DomainRules::only([5]);
        assert_eq!(found(&none, key(5)), Some("uid-5".into()));
        assert_eq!(found(&none, key(6)), None);
        assert_eq!(found(&none, named), None);
    }
}
