//! What every eviction policy must hold, tried on each of them.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::{EvictionPolicy, PolicyKind, build};

const CAPACITY: u32 = 48;

#[derive(Clone, Debug)]
enum Step {
    Insert(u32, u64),
    Touch(u32),
    Remove(u32),
    /// Asks for a victim while the ids of the set bits cannot leave, and removes it or not.
    Victim {
        pinned: u64,
        remove: bool,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let id = 0..CAPACITY;
    let pinned = prop_oneof![Just(0), Just(u64::MAX), any::<u64>()];
    prop_oneof![
        4 => (id.clone(), 0..96u64).prop_map(|(id, key)| Step::Insert(id, key)),
        4 => id.clone().prop_map(Step::Touch),
        1 => id.prop_map(Step::Remove),
        3 => (pinned, any::<bool>()).prop_map(|(pinned, remove)| Step::Victim { pinned, remove }),
    ]
}

fn check_members(policy: &dyn EvictionPolicy, members: &BTreeSet<u32>) {
    assert_eq!(policy.len(), members.len());
    assert_eq!(policy.is_empty(), members.is_empty());
    for id in 0..CAPACITY {
        assert_eq!(
            policy.contains(id),
            members.contains(&id),
            "membership of {id}"
        );
    }
}

/// Looks ahead, all the way and half of it, and checks that only members are shown, once each.
fn check_upcoming(policy: &dyn EvictionPolicy, members: &BTreeSet<u32>) {
    let look = |most: usize| {
        let mut shown = Vec::new();
        policy.upcoming(&mut |id| {
            shown.push(id);
            shown.len() < most
        });
        shown
    };
    let all = look(usize::MAX);
    assert_eq!(all.len(), members.len(), "each once");
    assert_eq!(&all.iter().copied().collect::<BTreeSet<_>>(), members);
    let most = (members.len() / 2).max(1);
    assert_eq!(look(most), all[..most.min(all.len())]);
}

/// Asks for a victim and checks the answer against the members and what may leave.
fn check_victim(
    policy: &mut dyn EvictionPolicy,
    members: &BTreeSet<u32>,
    pinned: u64,
) -> Option<u32> {
    let mut asked = BTreeSet::new();
    let mut questions = 0;
    let victim = policy.victim(&mut |id| {
        questions += 1;
        asked.insert(id);
        pinned >> id & 1 == 0
    });
    assert!(asked.is_subset(members), "only members are asked");
    assert!(
        questions <= 16 * members.len(),
        "{questions} questions for {}",
        members.len()
    );
    match victim {
        Some(id) => assert!(members.contains(&id) && pinned >> id & 1 == 0 && asked.contains(&id)),
        None => assert_eq!(&asked, members, "each member is asked before none is found"),
    }
    victim
}

fn run(kind: PolicyKind, steps: &[Step]) {
    let mut policy = build(kind, CAPACITY);
    let mut members = BTreeSet::new();
    for step in steps {
        match *step {
            Step::Insert(id, key) => {
                policy.insert(id, key);
                members.insert(id);
            }
            Step::Touch(id) => policy.touch(id),
            Step::Remove(id) => {
                policy.remove(id);
                members.remove(&id);
            }
            Step::Victim { pinned, remove } => {
                let victim = check_victim(policy.as_mut(), &members, pinned);
                if let (Some(id), true) = (victim, remove) {
                    policy.remove(id);
                    members.remove(&id);
                }
            }
        }
        check_members(policy.as_ref(), &members);
        check_upcoming(policy.as_ref(), &members);
    }
    drain_around_pins(policy.as_mut(), &mut members);
}

/// Whatever happened before: with half the ids pinned exactly the other half can be drained, and
/// then the rest.
fn drain_around_pins(policy: &mut dyn EvictionPolicy, members: &mut BTreeSet<u32>) {
    for pinned in [0x5555_5555_5555_5555, 0] {
        while let Some(id) = check_victim(policy, members, pinned) {
            policy.remove(id);
            members.remove(&id);
        }
        members
            .iter()
            .for_each(|id| assert!(pinned >> id & 1 == 1, "{id} never came up"));
        check_members(policy, members);
    }
    assert!(members.is_empty());
}

proptest! {
    #[test]
    fn membership_is_exact_and_victims_can_leave(
        steps in prop::collection::vec(step(), 0..400),
    ) {
        for kind in PolicyKind::ALL {
            run(kind, &steps);
        }
    }
}

#[test]
fn a_use_protects_from_the_next_eviction() {
    for kind in PolicyKind::ALL {
        let mut policy = build(kind, CAPACITY);
        for id in 0..CAPACITY {
            policy.insert(id, u64::from(id));
        }
        for _ in 0..3 {
            policy.touch(0);
        }
        for _ in 0..CAPACITY - 1 {
            let id = policy.victim(&mut |_| true).expect("members are left");
            assert_ne!(id, 0, "{} evicted the one used entry", policy.name());
            policy.remove(id);
        }
    }
}

#[test]
fn what_is_shown_to_come_next_is_what_leaves_next() {
    for kind in PolicyKind::ALL {
        let mut policy = build(kind, CAPACITY);
        for id in 0..CAPACITY {
            policy.insert(id, u64::from(id));
        }
        while !policy.is_empty() {
            let mut next = None;
            policy.upcoming(&mut |id| {
                next = Some(id);
                false
            });
            let victim = policy.victim(&mut |_| true);
            assert_eq!(next, victim, "{}", policy.name());
            victim.into_iter().for_each(|id| policy.remove(id));
        }
    }
}

#[test]
fn an_unremoved_victim_stays_a_member_and_can_be_asked_for_again() {
    for kind in PolicyKind::ALL {
        let mut policy = build(kind, 4);
        policy.insert(2, 9);
        assert_eq!(policy.victim(&mut |_| true), Some(2));
        assert_eq!(policy.victim(&mut |_| false), None);
        assert_eq!(policy.victim(&mut |_| true), Some(2));
        policy.remove(2);
        policy.remove(2);
        policy.touch(2);
        assert_eq!(policy.victim(&mut |_| true), None);
        policy.insert(2, 9);
        assert_eq!(policy.len(), 1);
    }
}
