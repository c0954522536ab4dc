//! Which isolation domain the namespaces of a previous daemon belong to now.

#![forbid(unsafe_code)]

use crate::cache::Cache;
use crate::cache::domain::DomainId;
use crate::catalog::{CatalogError, Namespace};
use crate::isolation::{DomainKey, DomainRules};

/// The domain of each stored namespace, by its row of the catalog.
pub(super) struct Homes(Vec<Option<DomainId>>);

impl Homes {
    /// `None` when nobody can ask for the namespace's blocks.
    pub(super) fn of(&self, slot: u32) -> Option<DomainId> {
        self.0.get(slot as usize).copied().flatten()
    }
}

impl Cache {
    /// Opens the domains that the stored namespaces belong to under today's rules.
    pub(super) fn stored_domains(&mut self, rules: &DomainRules) -> Homes {
        let stored: Vec<Namespace> = self.catalog.namespaces().collect();
        let mut homes = Vec::new();
        for namespace in stored {
            let slot = namespace.slot as usize;
            homes.resize(homes.len().max(slot + 1), None);
            let Some(identity) = rules.domain_by_key(DomainKey(namespace.domain_key)) else {
                continue;
            };
            match self.domain(&identity) {
                Ok(domain) => homes[slot] = Some(domain),
                Err(error) => {
                    tracing::warn!(%error, domain = %identity, "its blocks are not taken over");
                }
            }
        }
        Homes(homes)
    }

    /// Gives up the namespaces without a home. Their pages are out of the catalog by now.
    pub(super) fn forget_homeless(&mut self, homes: &Homes) -> Result<(), CatalogError> {
        let slots = self.catalog.namespaces().map(|stored| stored.slot);
        let homeless: Vec<u32> = slots.filter(|slot| homes.of(*slot).is_none()).collect();
        for slot in &homeless {
            self.catalog.remove_namespace(*slot)?;
        }
        if !homeless.is_empty() {
            tracing::warn!(
                namespaces = homeless.len(),
                "the blocks of isolation domains that the configuration has no more are discarded"
            );
        }
        Ok(())
    }
}
