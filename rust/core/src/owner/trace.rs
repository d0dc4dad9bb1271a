// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The register trace: the last accesses to members' registers that came as administration commands, or through a legacy I/O
//! BAR.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Instant, SystemTime};

/// Accesses remembered.
pub const CAPACITY: usize = 1 << 16;

/// Where an access came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The legacy I/O BAR of a member, at this offset.
    Bar0(u16),
    /// An administration command of some driver of the owner.
    Admin,
}

/// One access.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// When, by the wall clock.
    pub at: SystemTime,
    /// The member.
    pub member: u32,
    /// Where it came from.
    pub origin: Origin,
    /// Written, not read.
    pub write: bool,
    /// The command; None: through the notify region.
    pub opcode: Option<u16>,
    /// Offset in the command, or for a notification the register's.
    pub offset: u16,
    /// Bytes accessed; 0 for commands that access no register.
    pub width: u16,
    /// Little-endian; None when it isn't known, or is longer than 8 bytes.
    pub value: Option<u64>,
    /// The command's status.
    pub status: u16,
    /// Its qualifier.
    pub qualifier: u16,
    /// How long it took.
    pub nanoseconds: u64,
}

/// Accesses of one administration virtqueue after the other, so that queues don't wait for each other here.
#[derive(Default)]
struct Shard {
    /// With their numbers, ascending.
    entries: VecDeque<(u64, Entry)>,
}

const SHARDS: usize = 8;

/// The last accesses, [`CAPACITY`] in all when they are spread evenly over queues.
#[derive(Default)]
pub struct Trace {
    shards: [Mutex<Shard>; SHARDS],
    next: AtomicU64,
}

impl Trace {
    /// Remembers an access; `queue` tells those of different queues apart.
    pub fn push(&self, queue: usize, entry: Entry) {
        let mut shard = self.shards[queue % SHARDS]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if shard.entries.len() == CAPACITY / SHARDS {
            shard.entries.pop_front();
        }
        // Numbered under the lock: whoever holds all locks sees all numbers given out.
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        shard.entries.push_back((number, entry));
    }

    /// Accesses from number `since` on, at most `limit` of them, of one member or of all: the number to go on with, how many
    /// of any member were forgotten from there on, and the accesses with their numbers.
    pub fn read(&self, since: u64, limit: usize, member: Option<u32>) -> (u64, u64, Vec<(u64, Entry)>) {
        let shards: Vec<_> = self
            .shards
            .iter()
            .map(|shard| shard.lock().unwrap_or_else(PoisonError::into_inner))
            .collect();
        let end = self.next.load(Ordering::Relaxed);
        let mut present = 0;
        let mut found: Vec<(u64, Entry)> = Vec::new();
        for shard in &shards {
            let start = shard.entries.partition_point(|(number, _)| *number < since);
            present += (shard.entries.len() - start) as u64;
            let wanted = |(_, entry): &&(u64, Entry)| member.is_none_or(|member| member == entry.member);
            // No more of one queue are needed than of all.
            found.extend(
                shard
                    .entries
                    .range(start..)
                    .filter(wanted)
                    .take(limit.saturating_add(1)),
            );
        }
        found.sort_unstable_by_key(|(number, _)| *number);
        let next = match found.get(limit) {
            Some((number, _)) => *number,
            None => end.max(since),
        };
        found.truncate(limit);
        // Numbers have no holes.
        (next, end.saturating_sub(since) - present, found)
    }
}

/// When an access began.
#[derive(Clone, Copy)]
pub struct Begun {
    at: Instant,
}

impl Begun {
    /// Now.
    pub fn now() -> Self {
        Self { at: Instant::now() }
    }

    /// How long ago that was.
    pub fn nanoseconds(self) -> u64 {
        u64::try_from(self.at.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}
