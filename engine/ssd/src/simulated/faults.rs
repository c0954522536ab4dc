//! Drives that fail, hang and come back: the tier answers at once, says what is wrong, and gives no
//! wrong byte.

use std::time::Duration;

use super::rig::{Rig, Setup};
use crate::block::BlockKey;
use crate::io::disk::{Dice, lock};
use crate::outcome::{Outcome, Refused};
use crate::stats::{ShardFault, ShardHealth};

const SETUP: Setup = Setup {
    shards: 1,
    segments: 8,
    alignment: 512,
    checksums: false,
};

fn key(block: u64) -> BlockKey {
    let mut hash = [0; 32];
    hash[..8].copy_from_slice(&block.to_le_bytes());
    BlockKey {
        scope: [9; 32],
        group: 0,
        hash,
    }
}

struct World {
    rig: Rig,
    dice: Dice,
}

impl World {
    fn new(setup: Setup) -> Self {
        Self {
            rig: Rig::new(setup, 77),
            dice: Dice::new(77),
        }
    }

    fn write(&mut self, block: u64) -> Result<Outcome, Refused> {
        let content = [vec![block as u8; 3000], vec![!block as u8; 4096]];
        let taken = self.rig.write(&key(block), &content, false, &mut self.dice);
        let ticket = taken.expect("the pool has room")?;
        Ok(self.end_of(ticket))
    }

    fn read(&mut self, block: u64) -> Result<Outcome, Refused> {
        let taken = self.rig.read(&key(block), &mut self.dice);
        let (ticket, pages) = taken.expect("it is there")?;
        let outcome = self.end_of(ticket);
        if outcome == Outcome::Read {
            let first = self.rig.pool.content(pages[0].offset, pages[0].bytes);
            assert!(first.iter().all(|&byte| byte == block as u8));
        }
        Ok(outcome)
    }

    fn end_of(&mut self, ticket: u64) -> Outcome {
        for _ in 0..1000 {
            if let Some(end) = self.rig.poll().into_iter().find(|end| end.ticket == ticket) {
                return end.outcome;
            }
        }
        panic!("{ticket} does not end");
    }

    fn fail(&mut self, errno: Option<i32>) {
        for disk in &self.rig.disks {
            let mut disk = lock(disk);
            disk.faults = errno.into_iter().collect();
            disk.fault_one_in = u64::from(errno.is_some());
        }
    }

    fn hang(&mut self, hangs: bool) {
        for disk in &self.rig.disks {
            lock(disk).hangs = hangs;
        }
    }

    fn health(&self) -> ShardHealth {
        self.rig.tier.stats()[0].health.clone()
    }
}

#[test]
fn a_full_or_read_only_drive_refuses_writes_serves_reads_and_is_tried_again() {
    for (errno, fault) in [
        (libc::ENOSPC, ShardFault::NoSpace),
        (libc::EDQUOT, ShardFault::NoSpace),
        (libc::EROFS, ShardFault::ReadOnly),
        (libc::EIO, ShardFault::Io(libc::EIO)),
    ] {
        let mut world = World::new(SETUP);
        assert_eq!(world.write(1), Ok(Outcome::Written));
        world.rig.settle();
        world.fail(Some(errno));
        assert_eq!(world.write(2), Ok(Outcome::Failed(fault.clone())));
        assert!(world.rig.tier.lookup(&key(2)).is_none());
        world.fail(None);
        assert_eq!(world.health(), ShardHealth::ReadsOnly(fault.clone()));
        for block in 3..10 {
            assert_eq!(world.write(block), Err(Refused::Degraded(fault.clone())));
        }
        assert_eq!(world.read(1), Ok(Outcome::Read), "reads go on");
        // It asks to be called when it may be tried again, and one request does.
        let retry = world
            .rig
            .tier
            .next_deadline()
            .expect("there is a time to try again");
        world.rig.now = retry;
        assert_eq!(world.write(3), Ok(Outcome::Written));
        assert_eq!(world.health(), ShardHealth::Healthy);
        let stats = world.rig.tier.stats()[0].clone();
        assert_eq!((stats.degradations, stats.refused_degraded), (1, 7));
        world.rig.settle();
    }
}

#[test]
fn while_a_drive_still_fails_only_one_request_per_interval_tries_it() {
    let mut world = World::new(SETUP);
    world.fail(Some(libc::ENOSPC));
    let mut tried = 0;
    for _ in 0..300 {
        tried += u32::from(world.write(1).is_ok());
        world.rig.pass(Duration::from_secs(1));
    }
    assert!(
        (9..=11).contains(&tried),
        "{tried} in 300 s, one in 30 s is right"
    );
    assert_eq!(
        world.rig.tier.stats()[0].degradations,
        1,
        "it never was well in between"
    );
}

#[test]
fn a_read_that_fails_is_a_miss_and_several_make_the_shard_refuse() {
    let mut world = World::new(SETUP);
    for block in 0..8 {
        assert_eq!(world.write(block), Ok(Outcome::Written));
    }
    world.rig.settle();
    world.fail(Some(libc::EIO));
    let fault = ShardFault::Io(libc::EIO);
    assert_eq!(world.read(0), Ok(Outcome::Failed(fault.clone())));
    assert!(
        world.rig.tier.lookup(&key(0)).is_none(),
        "it is not offered again"
    );
    assert_eq!(world.read(1), Ok(Outcome::Failed(fault.clone())));
    world.fail(None);
    assert_eq!(world.health(), ShardHealth::Degraded(fault));
    assert!(
        world.rig.tier.lookup(&key(5)).is_none(),
        "nobody waits for a drive that fails"
    );
    assert!(world.rig.tier.knows(&key(5)), "but it is not forgotten");
    world.rig.now = world
        .rig
        .tier
        .next_deadline()
        .expect("there is a time to try again");
    world.rig.poll();
    assert_eq!(world.read(5), Ok(Outcome::Read));
    assert_eq!(world.health(), ShardHealth::Healthy);
}

#[test]
fn a_drive_that_hangs_is_noticed_refuses_at_once_and_recovers_by_itself() {
    let mut world = World::new(SETUP);
    for block in 0..4 {
        assert_eq!(world.write(block), Ok(Outcome::Written));
    }
    world.rig.settle();
    world.hang(true);
    let (reading, _) = world
        .rig
        .read(&key(1), &mut world.dice)
        .expect("it is there")
        .expect("nothing is known yet");
    let content = [vec![9; 100]];
    let writing = world
        .rig
        .write(&key(9), &content, false, &mut world.dice)
        .expect("the pool has room")
        .expect("nothing is known yet");
    // Somebody looks when the limit is over, even if nothing else happens.
    world.rig.now = world
        .rig
        .tier
        .next_deadline()
        .expect("something is under way");
    assert!(world.rig.poll().is_empty());
    assert_eq!(world.health(), ShardHealth::Degraded(ShardFault::Stalled));
    for second in 0..30 {
        world.rig.pass(Duration::from_secs(1));
        let refused = world
            .rig
            .write(&key(100 + second), &content, false, &mut world.dice);
        assert_eq!(refused, Some(Err(Refused::Degraded(ShardFault::Stalled))));
        assert!(world.rig.tier.lookup(&key(2)).is_none());
        assert!(
            world.rig.poll().is_empty(),
            "their memory is still the drive's"
        );
    }
    assert_eq!(world.rig.tier.in_flight(), 2);
    world.hang(false);
    let mut ended = Vec::new();
    for _ in 0..1000 {
        ended.extend(world.rig.poll());
        if ended.len() == 2 {
            break;
        }
    }
    ended.sort_by_key(|end| end.ticket);
    let tickets: Vec<u64> = ended.iter().map(|end| end.ticket).collect();
    assert_eq!(tickets, [reading, writing]);
    assert!(
        ended
            .iter()
            .all(|end| matches!(end.outcome, Outcome::Read | Outcome::Written))
    );
    assert_eq!(world.health(), ShardHealth::Healthy);
    assert_eq!(world.read(2), Ok(Outcome::Read));
}

#[test]
fn with_one_shard_degraded_the_others_take_the_blocks() {
    let mut world = World::new(Setup { shards: 2, ..SETUP });
    {
        let mut disk = lock(&world.rig.disks[0]);
        disk.faults = vec![libc::EROFS];
        disk.fault_one_in = 1;
    }
    let mut written = 0;
    for block in 0..20 {
        written += u32::from(world.write(block) == Ok(Outcome::Written));
    }
    assert_eq!(written, 19, "one was the one that found out");
    let stats = world.rig.tier.stats();
    assert_eq!((stats[0].blocks, stats[1].blocks), (0, 19));
}

#[test]
fn when_a_sync_fails_what_it_should_have_covered_is_not_offered() {
    let mut world = World::new(SETUP);
    assert_eq!(world.write(1), Ok(Outcome::Written));
    world.fail(Some(libc::EIO));
    world.rig.tier.flush(world.rig.now);
    for _ in 0..50 {
        world.rig.poll();
    }
    assert!(world.rig.tier.lookup(&key(1)).is_none());
    assert_eq!(world.rig.tier.stats()[0].uncommitted_blocks, 0);
    world.fail(None);
    world.rig.pass(Duration::from_secs(31));
    assert_eq!(world.write(1), Ok(Outcome::Written));
    world.rig.settle();
    let mut rig = world.rig.lose_power();
    assert!(rig.tier.lookup(&key(1)).is_some());
    rig.poll();
}

#[test]
fn with_faults_at_random_every_request_ends_and_no_byte_is_wrong() {
    let mut failed = 0;
    for seed in 0..80 {
        let mut world = World::new(Setup { shards: 2, ..SETUP });
        world.dice = Dice::new(seed);
        for disk in &world.rig.disks {
            let mut disk = lock(disk);
            disk.faults = vec![libc::EIO, libc::ENOSPC, libc::EROFS];
            disk.fault_one_in = 6;
            disk.short_one_in = 5;
            disk.unit = 512;
        }
        for _ in 0..300 {
            let block = world.dice.below(40);
            let outcome = if world.rig.tier.lookup(&key(block)).is_some() {
                world.read(block)
            } else {
                world.write(block)
            };
            failed += u32::from(matches!(outcome, Ok(Outcome::Failed(_))));
            assert_ne!(outcome, Ok(Outcome::Bad), "a fault is told, not found");
            world.rig.pass(Duration::from_secs(world.dice.below(60)));
        }
        assert_eq!(world.rig.tier.in_flight(), 0);
        world.fail(None);
        world.rig.pass(Duration::from_secs(31));
        world.rig.settle();
    }
    assert!(failed > 50, "{failed} failed");
}

#[test]
fn bits_that_rot_anywhere_are_found_or_do_not_matter() {
    for seed in 0..60 {
        let mut world = World::new(SETUP);
        for block in 0..30 {
            assert_eq!(world.write(block), Ok(Outcome::Written));
        }
        world.rig.settle();
        let mut dice = Dice::new(seed);
        {
            let mut disk = lock(&world.rig.disks[0]);
            let bytes = super::rig::geometry(&SETUP).file_bytes() - (1 << 20);
            for _ in 0..200 {
                let offset = (1 << 20) + dice.below(bytes / 3) as usize;
                disk.rot(offset, dice.below(8) as u8);
            }
        }
        world.rig = world.rig.lose_power();
        let (mut fine, mut bad) = (0, 0);
        for block in 0..30 {
            if world.rig.tier.lookup(&key(block)).is_none() {
                continue;
            }
            match world.read(block) {
                // `read` has compared the bytes.
                Ok(Outcome::Read) => fine += 1,
                Ok(Outcome::Bad) => bad += 1,
                other => panic!("{other:?}"),
            }
        }
        let stats = world.rig.tier.stats()[0].clone();
        assert!(
            bad > 0 || world.rig.reports[0].bad_chunks > 0,
            "seed {seed}: {fine} fine"
        );
        assert!(stats.bad_pages >= bad);
        assert_eq!(stats.blocks, fine);
    }
}
