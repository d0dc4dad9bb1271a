// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The register trace: the last accesses to members' registers that came as administration commands, or through a legacy I/O
//! BAR.

use std::collections::VecDeque;
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

#[derive(Default)]
struct Entries {
    /// Number of the first entry that is still there.
    first: u64,
    entries: VecDeque<Entry>,
}

/// The last [`CAPACITY`] accesses.
#[derive(Default)]
pub struct Trace {
    entries: Mutex<Entries>,
}

impl Trace {
    /// Remembers an access.
    pub fn push(&self, entry: Entry) {
        let mut trace = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if trace.entries.len() == CAPACITY {
            trace.entries.pop_front();
            trace.first += 1;
        }
        trace.entries.push_back(entry);
    }

    /// Accesses from number `since` on, at most `limit` of them, of one member or of all: the number to go on with, how many
    /// were forgotten before, and the accesses with their numbers.
    pub fn read(&self, since: u64, limit: usize, member: Option<u32>) -> (u64, u64, Vec<(u64, Entry)>) {
        let trace = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let end = trace.first + trace.entries.len() as u64;
        let start = since.clamp(trace.first, end);
        let lost = trace.first.saturating_sub(since);
        let mut found = Vec::new();
        let mut next = end;
        for (number, entry) in (start..).zip(trace.entries.range((start - trace.first) as usize..)) {
            if member.is_some_and(|member| member != entry.member) {
                continue;
            }
            if found.len() == limit {
                next = number;
                break;
            }
            found.push((number, *entry));
        }
        (next, lost, found)
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
