//! One instance: its ranks, its schedulers, and where each rank's shard stands.

#![forbid(unsafe_code)]

use pegaflow_shm::control::{Mode, RegisterSpec};
use pegaflow_shm::namespace::NamespaceSpec;
use pegaflow_shm::status::Status;

use crate::cache::domain::DomainId;
use crate::lane::api::Refusal;
use crate::layout::ValidLayout;
use crate::registry::{InstanceId, describe};

/// A group as one rank registered it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberGroup {
    /// Cache group.
    pub group: u16,
    /// Segment sizes in packing order.
    pub segment_bytes: Vec<u64>,
    /// All ranks hold the same bytes.
    pub replicated: bool,
}

impl MemberGroup {
    /// What others need to know of a group that was registered with this layout.
    pub fn of(layout: &ValidLayout) -> MemberGroup {
        MemberGroup {
            group: layout.group(),
            segment_bytes: layout.segment_bytes().to_vec(),
            replicated: layout.is_replicated(),
        }
    }
}

/// A process that belongs to an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its session.
    pub session: u64,
    /// Its registration in that session.
    pub registration: u32,
    /// Its groups; empty for a scheduler.
    pub groups: Vec<MemberGroup>,
}

/// Where a rank's shard stands among the shards of a group's blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupPlace {
    /// Cache group.
    pub group: u16,
    /// Position of this rank among the ranks that hold the group; 0 for a scheduler, and for every
    /// rank if the group is replicated: whoever comes first saves the one shard, all load it.
    pub shard: u16,
    /// Shards of a block: the ranks that hold the group, or 1 if it is replicated.
    pub shards: u16,
    /// Ranks that hold the group, each of which may load.
    pub ranks: u16,
}

/// One replica of an inference engine.
#[derive(Debug)]
pub struct Instance {
    /// Its number.
    pub id: InstanceId,
    /// Isolation domain of its processes: another domain's instance of this name is another one.
    pub domain: DomainId,
    /// Its name.
    pub name: String,
    /// What its blocks mean.
    pub namespace: NamespaceSpec,
    /// Ranks it needs.
    pub world_size: u32,
    /// Save only, or also load.
    pub mode: Mode,
    /// Index key of its namespace, while it is complete.
    pub ready: Option<u32>,
    ranks: Vec<Option<Member>>,
    schedulers: Vec<Member>,
}

impl Instance {
    pub(super) fn new(id: InstanceId, domain: DomainId, spec: &RegisterSpec) -> Instance {
        Instance {
            id,
            domain,
            name: spec.instance.clone(),
            namespace: spec.namespace.clone(),
            world_size: spec.world_size,
            mode: spec.mode,
            ready: None,
            ranks: vec![None; spec.world_size as usize],
            schedulers: Vec::new(),
        }
    }

    pub(super) fn check_same(&self, spec: &RegisterSpec) -> Result<(), Refusal> {
        if self.namespace == spec.namespace
            && self.world_size == spec.world_size
            && self.mode == spec.mode
        {
            return Ok(());
        }
        Err(Refusal::new(
            Status::NamespaceMismatch,
            format!(
                "instance `{}` is registered as {}, this process registers {}: all its processes must \
                 say the same, or use another instance name",
                self.name,
                describe(&self.namespace, self.world_size, self.mode),
                describe(&spec.namespace, spec.world_size, spec.mode),
            ),
        ))
    }

    pub(super) fn join(&mut self, rank: Option<u32>, member: Member) -> Result<(), Refusal> {
        let Some(rank) = rank else {
            self.schedulers.push(member);
            return Ok(());
        };
        self.check_replicas(rank, &member)?;
        let Some(place) = self.ranks.get_mut(rank as usize) else {
            return Err(Refusal::new(
                Status::InvalidArgument,
                format!(
                    "rank {rank} of instance `{}`: ranks are 0..{}",
                    self.name, self.world_size
                ),
            ));
        };
        if let Some(holder) = place {
            return Err(Refusal::new(
                Status::AlreadyRegistered,
                format!(
                    "rank {rank} of instance `{}` is held by session {}: end that process, or use \
                     another instance name",
                    self.name, holder.session
                ),
            ));
        }
        *place = Some(member);
        Ok(())
    }

    /// What one rank calls replicated, all that hold it do, with pages of the same shape: the bytes
    /// that one of them saves are loaded by the others.
    fn check_replicas(&self, rank: u32, member: &Member) -> Result<(), Refusal> {
        for (other, held) in self.ranks() {
            for theirs in &held.groups {
                let ours = member.groups.iter().find(|ours| ours.group == theirs.group);
                let Some(ours) = ours.filter(|ours| ours.replicated || theirs.replicated) else {
                    continue;
                };
                if ours != theirs {
                    let words = |group: &MemberGroup| match group.replicated {
                        true => format!("replicated, of segments {:?}", group.segment_bytes),
                        false => "each rank's own".to_owned(),
                    };
                    return Err(Refusal::new(
                        Status::BadLayout,
                        format!(
                            "group {} of instance `{}`: rank {rank} says {}, rank {other} says {}: \
                             all ranks must say the same of a replicated group",
                            ours.group,
                            self.name,
                            words(ours),
                            words(theirs)
                        ),
                    ));
                }
            }
        }
        Ok(())
    }

    pub(super) fn leave(&mut self, session: u64, registration: u32) -> bool {
        let is_it = |m: &Member| m.session == session && m.registration == registration;
        self.schedulers.retain(|member| !is_it(member));
        let Some(place) = self
            .ranks
            .iter_mut()
            .find(|place| place.as_ref().is_some_and(is_it))
        else {
            return false;
        };
        *place = None;
        self.ready.take().is_some()
    }

    /// No process of it is left.
    pub fn is_empty(&self) -> bool {
        self.schedulers.is_empty() && self.ranks.iter().all(Option::is_none)
    }

    /// All ranks are in.
    pub fn is_complete(&self) -> bool {
        self.ranks.iter().all(Option::is_some)
    }

    /// Ranks that are in.
    pub fn ranks(&self) -> impl Iterator<Item = (u32, &Member)> {
        self.ranks
            .iter()
            .enumerate()
            .filter_map(|(rank, member)| member.as_ref().map(|member| (rank as u32, member)))
    }

    /// Every process, schedulers (`None`) included.
    pub fn members(&self) -> impl Iterator<Item = (Option<u32>, &Member)> {
        let ranks = self.ranks().map(|(rank, member)| (Some(rank), member));
        ranks.chain(self.schedulers.iter().map(|member| (None, member)))
    }

    /// The groups that a member can name in a complete instance: a rank those it registered, a
    /// scheduler those of any rank.
    pub fn places(&self, rank: Option<u32>) -> Vec<GroupPlace> {
        let mut groups: Vec<u16> = self
            .ranks()
            .filter(|(holder, _)| rank.is_none_or(|rank| rank == *holder))
            .flat_map(|(_, member)| member.groups.iter().map(|group| group.group))
            .collect();
        groups.sort_unstable();
        groups.dedup();
        groups
            .into_iter()
            .map(|group| {
                let mut holders = Vec::new();
                let mut replicated = false;
                for (rank, member) in self.ranks() {
                    if let Some(held) = member.groups.iter().find(|held| held.group == group) {
                        holders.push(rank);
                        replicated |= held.replicated;
                    }
                }
                let ranks = holders.len() as u16;
                if replicated {
                    return GroupPlace {
                        group,
                        shard: 0,
                        shards: 1,
                        ranks,
                    };
                }
                let shard = holders
                    .iter()
                    .position(|holder| Some(*holder) == rank)
                    .unwrap_or(0);
                GroupPlace {
                    group,
                    shard: shard as u16,
                    shards: ranks,
                    ranks,
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::Registry;

    fn spec(rank: Option<u32>) -> RegisterSpec {
        RegisterSpec {
            instance: "engine".into(),
            namespace: NamespaceSpec {
                model: "m".into(),
                dtype: "bf16".into(),
                hash_algorithm: "sha256".into(),
                block_tokens: 16,
                ..NamespaceSpec::default()
            },
            world_size: 2,
            rank,
            mode: Mode::ReadWrite,
            groups: Vec::new(),
        }
    }

    fn member(session: u64, groups: &[u16]) -> Member {
        let groups = groups
            .iter()
            .map(|group| MemberGroup {
                group: *group,
                segment_bytes: vec![64],
                replicated: false,
            })
            .collect();
        Member {
            session,
            registration: 1,
            groups,
        }
    }

    #[test]
    fn complete_when_every_rank_is_in_and_broken_when_one_leaves() {
        let mut registry = Registry::new(4);
        let id = registry.join(0, &spec(None), member(1, &[])).unwrap();
        assert_eq!(registry.join(0, &spec(Some(0)), member(2, &[0])), Ok(id));
        assert!(!registry.get(id).unwrap().is_complete());
        assert_eq!(registry.join(0, &spec(Some(1)), member(3, &[0, 1])), Ok(id));
        assert!(registry.get(id).unwrap().is_complete());
        registry.get_mut(id).unwrap().ready = Some(0);
        assert!(registry.leave(id, 3, 1));
        assert!(!registry.leave(id, 2, 1));
        assert!(!registry.leave(id, 1, 1));
        assert!(registry.get(id).is_none());
    }

    #[test]
    fn a_taken_rank_and_a_different_namespace_are_refused() {
        let mut registry = Registry::new(4);
        registry.join(0, &spec(Some(0)), member(1, &[0])).unwrap();
        let taken = registry
            .join(0, &spec(Some(0)), member(2, &[0]))
            .unwrap_err();
        assert_eq!(taken.status, Status::AlreadyRegistered);
        let mut other = spec(Some(1));
        other.namespace.salt = "tenant".into();
        let mixed = registry.join(0, &other, member(2, &[0])).unwrap_err();
        assert_eq!(mixed.status, Status::NamespaceMismatch);
        let beyond = registry
            .join(0, &spec(Some(9)), member(2, &[0]))
            .unwrap_err();
        assert_eq!(beyond.status, Status::InvalidArgument);
        assert!(
            registry.join(1, &other, member(2, &[0])).is_ok(),
            "another domain's instance"
        );
    }

    #[test]
    fn a_full_registry_names_its_limit() {
        let mut registry = Registry::new(0);
        let refused = registry.join(0, &spec(None), member(1, &[])).unwrap_err();
        assert_eq!(refused.status, Status::Limit);
        assert!(refused.message.contains("--max-instances"));
    }

    #[test]
    fn a_replicated_group_has_one_shard_and_all_ranks_must_agree_on_it() {
        let mut registry = Registry::new(4);
        let replicas = |session, bytes: u64| {
            let mut member = member(session, &[0, 3]);
            member.groups[0].replicated = true;
            member.groups[0].segment_bytes = vec![bytes];
            member
        };
        let id = registry.join(0, &spec(Some(0)), replicas(1, 64)).unwrap();
        for other in [member(2, &[0]), replicas(2, 128)] {
            let refused = registry.join(0, &spec(Some(1)), other).unwrap_err();
            assert_eq!(refused.status, Status::BadLayout);
            assert!(refused.message.contains("group 0"), "{}", refused.message);
        }
        registry.join(0, &spec(Some(1)), replicas(2, 64)).unwrap();
        let instance = registry.get(id).unwrap();
        for rank in [None, Some(0), Some(1)] {
            let places = instance.places(rank);
            let only = GroupPlace {
                group: 0,
                shard: 0,
                shards: 1,
                ranks: 2,
            };
            assert_eq!(places[0], only, "{rank:?}");
            assert_eq!(places[1].shards, 2, "a group beside it has a shard of each");
        }
    }

    #[test]
    fn shards_are_counted_among_the_ranks_that_hold_the_group() {
        let mut registry = Registry::new(4);
        let id = registry.join(0, &spec(Some(0)), member(1, &[0])).unwrap();
        registry
            .join(0, &spec(Some(1)), member(2, &[0, 3]))
            .unwrap();
        let instance = registry.get(id).unwrap();
        let place = |group, shard, shards| GroupPlace {
            group,
            shard,
            shards,
            ranks: shards,
        };
        assert_eq!(
            instance.places(Some(1)),
            vec![place(0, 1, 2), place(3, 0, 1)]
        );
        assert_eq!(instance.places(Some(0)), vec![place(0, 0, 2)]);
        assert_eq!(instance.places(None), vec![place(0, 0, 2), place(3, 0, 1)]);
    }
}
