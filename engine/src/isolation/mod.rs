//! Isolation domains: who shares blocks with whom, and who sees whose index.
//!
//! A user belongs to exactly one domain. Without configuration the user *is* the domain; a
//! `[[domain]]` table of the configuration makes several users one domain, and may restrict it to
//! some models. The domain of a session is chosen once, when it connects, from what the kernel says
//! about its process, and decides which index it is given, which instances it can join and which
//! blocks it can reach.
//!
//! | file | what it does |
//! | --- | --- |
//! | [`domain`] | a domain: key, name, models |
//! | [`rules`] | from credentials, or from a stored key, to a domain |
//! | [`peer_groups`] | the groups of the process at the other end of a socket |
//! | [`share`] | how much of what is left one holder may take |

pub mod domain;
pub mod peer_groups;
pub mod rules;
pub mod share;

pub use domain::{DomainKey, IsolationDomain, MAX_DOMAIN_NAME_BYTES};
pub use rules::{Credentials, DomainRules, NotAdmitted};
