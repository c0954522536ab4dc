//! Which instances there are, which ranks of them have registered, and who must be told.
//!
//! An instance is complete when all `world_size` ranks are in. Only then is its namespace known,
//! because the namespace covers what every rank packs into its pages; until then queries and saves
//! answer "not ready". Nothing here knows about rings or memory.

#![forbid(unsafe_code)]

mod instance;

use std::collections::HashMap;

use pegaflow_shm::control::{Mode, RegisterSpec};
use pegaflow_shm::namespace::{NamespaceSpec, PackedGroup};
use pegaflow_shm::status::Status;

pub use instance::{GroupPlace, Instance, Member, MemberGroup};

use crate::cache::domain::DomainId;
use crate::isolation::share::may_take;
use crate::lane::api::Refusal;

/// Number of an instance; never used twice by one daemon. Clients that make instances and end them
/// as fast as they can would come round 32 bits within days.
pub type InstanceId = u64;

/// All instances.
pub struct Registry {
    instances: HashMap<InstanceId, Instance>,
    next: InstanceId,
    max_instances: usize,
}

impl Registry {
    /// An empty registry of at most `max_instances`.
    pub fn new(max_instances: usize) -> Registry {
        Registry {
            instances: HashMap::new(),
            next: 1,
            max_instances,
        }
    }

    /// An instance.
    pub fn get(&self, id: InstanceId) -> Option<&Instance> {
        self.instances.get(&id)
    }

    /// An instance, to change.
    pub fn get_mut(&mut self, id: InstanceId) -> Option<&mut Instance> {
        self.instances.get_mut(&id)
    }

    /// All instances.
    pub fn iter(&self) -> impl Iterator<Item = &Instance> {
        self.instances.values()
    }

    /// Adds a rank or a scheduler to its instance, which is made if it is not there.
    ///
    /// # Errors
    /// The registration contradicts the instance, its rank is taken, or there are too many
    /// instances.
    pub fn join(
        &mut self,
        domain: DomainId,
        spec: &RegisterSpec,
        member: Member,
    ) -> Result<InstanceId, Refusal> {
        let known = self
            .instances
            .values()
            .find(|i| i.domain == domain && i.name == spec.instance);
        let id = match known {
            Some(instance) => {
                instance.check_same(spec)?;
                instance.id
            }
            None => self.make(domain, spec)?,
        };
        let joined = match self.instances.get_mut(&id) {
            Some(instance) => instance.join(spec.rank, member),
            None => Err(Refusal::new(
                Status::Internal,
                "the instance vanished while joining it",
            )),
        };
        if joined.is_err() {
            self.drop_if_empty(id);
        }
        joined.map(|()| id)
    }

    fn make(&mut self, domain: DomainId, spec: &RegisterSpec) -> Result<InstanceId, Refusal> {
        if self.instances.len() >= self.max_instances {
            return Err(Refusal::new(
                Status::Limit,
                format!(
                    "instance `{}` would be one more than the {} this daemon keeps: raise \
                     --max-instances or end an instance",
                    spec.instance, self.max_instances
                ),
            ));
        }
        let own = self.instances.values().filter(|i| i.domain == domain);
        let (own, free) = (own.count(), self.max_instances - self.instances.len());
        if !may_take(own as u64, free as u64) {
            return Err(Refusal::new(
                Status::Limit,
                format!(
                    "instance `{}`: its isolation domain has {own} of the {} this daemon keeps and \
                     leaves the other {free} to others: raise --max-instances or end an instance",
                    spec.instance, self.max_instances
                ),
            ));
        }
        let id = self.next;
        self.next += 1;
        self.instances.insert(id, Instance::new(id, domain, spec));
        Ok(id)
    }

    /// Removes a member. True when the instance was complete before and is not any more.
    pub fn leave(&mut self, id: InstanceId, session: u64, registration: u32) -> bool {
        let Some(instance) = self.instances.get_mut(&id) else {
            return false;
        };
        let broken = instance.leave(session, registration);
        self.drop_if_empty(id);
        broken
    }

    fn drop_if_empty(&mut self, id: InstanceId) {
        if self.instances.get(&id).is_some_and(Instance::is_empty) {
            self.instances.remove(&id);
        }
    }
}

/// The digest inputs of a complete instance.
pub fn packed_groups(instance: &Instance) -> Vec<PackedGroup> {
    instance
        .ranks()
        .flat_map(|(rank, member)| {
            member.groups.iter().map(move |group| PackedGroup {
                rank,
                group: group.group,
                segment_bytes: group.segment_bytes.clone(),
                replicated: group.replicated,
            })
        })
        .collect()
}

/// Words for a namespace in a refusal.
pub(crate) fn describe(namespace: &NamespaceSpec, world_size: u32, mode: Mode) -> String {
    format!(
        "{} (world size {world_size}, {mode:?})",
        namespace.summary()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_instance_never_gets_the_number_of_one_that_lives_on() {
        let spec = |name: &str| RegisterSpec {
            instance: name.into(),
            namespace: NamespaceSpec::default(),
            world_size: 2,
            rank: None,
            mode: Mode::ReadWrite,
            groups: Vec::new(),
        };
        let member = |session| Member {
            session,
            registration: 1,
            groups: Vec::new(),
        };
        let mut registry = Registry::new(16);
        let old = registry.join(0, &spec("old"), member(1)).unwrap();
        // As after four billion short-lived ones.
        registry.next = InstanceId::from(u32::MAX);
        for session in 2..5 {
            let name = session.to_string();
            let new = registry.join(1, &spec(&name), member(session)).unwrap();
            assert_ne!(new, old);
        }
        assert_eq!(registry.get(old).unwrap().name, "old");
        assert_eq!(registry.iter().count(), 4);
    }
}
