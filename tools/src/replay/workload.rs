//! A seeded workload of conversations, for when there is no trace.
//!
//! Conversations share a few system prompts and grow turn by turn, so their prefixes overlap as a
//! chat service's do. Same seed, same workload, on any machine.

#![forbid(unsafe_code)]

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::trace::Request;

/// Requests when no limit is given.
pub const DEFAULT_REQUESTS: usize = 2_000;
/// Conversations that are open at the same time.
const OPEN_CONVERSATIONS: usize = 48;
/// System prompts that conversations start from.
const SYSTEM_PROMPTS: u64 = 6;
/// Blocks of a system prompt.
const PROMPT_BLOCKS: std::ops::RangeInclusive<u64> = 2..=12;
/// Blocks that one turn adds.
const TURN_BLOCKS: std::ops::RangeInclusive<u64> = 1..=8;
/// Turns of a conversation.
const TURNS: std::ops::RangeInclusive<u32> = 1..=12;
/// Milliseconds between two requests on average.
const MEAN_GAP_MS: u64 = 150;

struct Conversation {
    number: u64,
    blocks: Vec<u64>,
    turns_left: u32,
}

struct Generator {
    rng: SmallRng,
    next_id: u64,
    next_conversation: u64,
    prompts: Vec<Vec<u64>>,
}

impl Generator {
    fn fresh_ids(&mut self, count: u64) -> Vec<u64> {
        let first = self.next_id;
        self.next_id += count;
        (first..self.next_id).collect()
    }

    fn open(&mut self) -> Conversation {
        // The lower of two draws makes some prompts more popular than others.
        let prompts = self.prompts.len();
        let pick = self
            .rng
            .random_range(0..prompts)
            .min(self.rng.random_range(0..prompts));
        let number = self.next_conversation;
        self.next_conversation += 1;
        Conversation {
            number,
            blocks: self.prompts[pick].clone(),
            turns_left: self.rng.random_range(TURNS),
        }
    }
}

/// Generates `requests` requests from `seed`.
pub fn generate(seed: u64, requests: usize) -> Vec<Request> {
    let rng = SmallRng::seed_from_u64(seed);
    let mut generator = Generator {
        rng,
        next_id: 0,
        next_conversation: 0,
        prompts: Vec::new(),
    };
    for _ in 0..SYSTEM_PROMPTS {
        let blocks = generator.rng.random_range(PROMPT_BLOCKS);
        let prompt = generator.fresh_ids(blocks);
        generator.prompts.push(prompt);
    }
    let mut open: Vec<Conversation> = (0..OPEN_CONVERSATIONS).map(|_| generator.open()).collect();
    let mut timestamp_ms = 0;
    let mut out = Vec::with_capacity(requests);
    while out.len() < requests {
        let at = generator.rng.random_range(0..open.len());
        let added = generator.rng.random_range(TURN_BLOCKS);
        let fresh = generator.fresh_ids(added);
        let conversation = &mut open[at];
        conversation.blocks.extend(fresh);
        conversation.turns_left -= 1;
        out.push(Request {
            timestamp_ms,
            conversation: Some(conversation.number),
            hash_ids: conversation.blocks.clone(),
        });
        timestamp_ms += generator.rng.random_range(0..=2 * MEAN_GAP_MS);
        if open[at].turns_left == 0 {
            open[at] = generator.open();
        }
    }
    out
}

/// Deals requests to engines: a conversation stays with its engine, others go round robin.
pub fn deal(requests: Vec<Request>, engines: usize) -> Vec<Vec<Request>> {
    let mut dealt = vec![Vec::new(); engines];
    for (position, request) in requests.into_iter().enumerate() {
        let number = request.conversation.unwrap_or(position as u64);
        dealt[(number % engines as u64) as usize].push(request);
    }
    dealt
}

/// Blocks in all requests, different blocks among them, and blocks of the longest request.
pub fn totals(requests: &[Request]) -> (u64, u64, usize) {
    let all = requests
        .iter()
        .map(|request| request.hash_ids.len() as u64)
        .sum();
    let different: std::collections::HashSet<u64> = requests
        .iter()
        .flat_map(|request| request.hash_ids.iter().copied())
        .collect();
    let longest = requests
        .iter()
        .map(|request| request.hash_ids.len())
        .max()
        .unwrap_or(0);
    (all, different.len() as u64, longest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_decides_the_workload() {
        assert_eq!(generate(7, 300), generate(7, 300));
        assert_ne!(generate(7, 300), generate(8, 300));
    }

    #[test]
    fn turns_grow_a_shared_prefix() {
        let requests = generate(1, 500);
        let mut last = std::collections::HashMap::new();
        let mut continued = 0;
        for request in &requests {
            let number = request.conversation.unwrap();
            if let Some(before) = last.insert(number, request.hash_ids.clone()) {
                assert!(request.hash_ids.starts_with(&before));
                assert!(request.hash_ids.len() > before.len());
                continued += 1;
            }
        }
        assert!(
            continued > 250,
            "{continued} of 500 continue a conversation"
        );
        let (all, different, longest) = totals(&requests);
        assert!(
            different * 2 < all,
            "{different} of {all} blocks are different"
        );
        assert!(longest <= 12 + 8 * 12);
    }

    #[test]
    fn a_conversation_stays_with_its_engine_and_order_is_kept() {
        let requests = generate(1, 200);
        let dealt = deal(requests.clone(), 3);
        assert_eq!(dealt.iter().map(Vec::len).sum::<usize>(), 200);
        for (engine, requests) in dealt.iter().enumerate() {
            assert!(requests.is_sorted_by_key(|request| request.timestamp_ms));
            assert!(
                requests
                    .iter()
                    .all(|r| r.conversation.unwrap() % 3 == engine as u64)
            );
        }
        assert_eq!(deal(requests.clone(), 1)[0], requests);
    }
}
