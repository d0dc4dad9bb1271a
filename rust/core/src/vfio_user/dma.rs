// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The client's memory: which ranges the device was given, and how to reach those that came without an fd.
//!
//! The function has the memory itself. [`DmaTable`] is what is needed to check the client's messages, and to undo all of
//! them. [`Link`] reads and writes by DMA_READ and DMA_WRITE messages of ours, whose answers come in between the client's
//! own commands. Their count has 64 bits, as QEMU 11.1 and the protocol have it; QEMU 10.1 and 10.2 had 32.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::wire::{self, Header};
use crate::error::Fault;
use crate::memory::{RemoteMemory, MAX_REGIONS, MAX_SHADOW};
use crate::worker::SourceHandle;

/// A range that is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    size: u64,
    /// It came without an fd.
    remote: bool,
}

/// The ranges of one connection, by address.
#[derive(Default)]
pub struct DmaTable {
    ranges: BTreeMap<u64, Range>,
    /// Bytes of those that came without an fd.
    remote: u64,
}

impl DmaTable {
    /// Whether a range can be added; an errno when not.
    ///
    /// # Errors
    /// EINVAL for a range that is empty or wraps, EEXIST for one that overlaps another, ENOSPC when there are too many,
    /// ENOMEM when there would be too much memory without an fd.
    pub fn check(&self, iova: u64, size: u64, remote: bool) -> Result<(), i32> {
        let end = iova.checked_add(size).filter(|_| size > 0).ok_or(libc::EINVAL)?;
        let before = self.ranges.range(..end).next_back();
        // None of them wraps.
        if before.is_some_and(|(start, range)| start + range.size > iova) {
            return Err(libc::EEXIST);
        }
        if self.ranges.len() >= MAX_REGIONS {
            return Err(libc::ENOSPC);
        }
        if remote && self.remote.checked_add(size).is_none_or(|sum| sum > MAX_SHADOW) {
            return Err(libc::ENOMEM);
        }
        Ok(())
    }

    /// Adds a range that was checked.
    pub fn insert(&mut self, iova: u64, size: u64, remote: bool) {
        if remote {
            self.remote += size;
        }
        self.ranges.insert(iova, Range { size, remote });
    }

    /// Forgets a range.
    pub fn remove(&mut self, iova: u64) {
        if let Some(range) = self.ranges.remove(&iova) {
            if range.remote {
                self.remote -= range.size;
            }
        }
    }

    /// The ranges that make up `[iova, iova + size)`, as (address, size). A client with an IOMMU of its own unmaps several
    /// at once; part of one can't be unmapped.
    ///
    /// # Errors
    /// ENOENT when there is none, EINVAL when one is inside only in part.
    pub fn inside(&self, iova: u64, size: u64) -> Result<Vec<(u64, u64)>, i32> {
        let end = iova.checked_add(size).filter(|_| size > 0).ok_or(libc::EINVAL)?;
        let mut found = Vec::new();
        for (&start, range) in self.ranges.range(..end).rev() {
            if start + range.size <= iova {
                break;
            }
            if start < iova || start + range.size > end {
                return Err(libc::EINVAL);
            }
            found.push((start, range.size));
        }
        if found.is_empty() {
            return Err(libc::ENOENT);
        }
        Ok(found)
    }

    /// All ranges, as (address, size).
    pub fn all(&self) -> Vec<(u64, u64)> {
        self.ranges.iter().map(|(&iova, range)| (iova, range.size)).collect()
    }
}

/// Most bytes that one message of ours asks for or brings. Less than the protocol allows, so that the reply to an access of
/// the guest's doesn't wait for long behind it.
pub const CHUNK: usize = 128 << 10;
/// How long an answer of the client's is waited for.
pub const PATIENCE: Duration = Duration::from_secs(2);
/// How often those who wait look whether they still should.
const LOOK: Duration = Duration::from_millis(10);
/// Most messages of ours that are under way, those that were given up included.
const MOST: usize = 1024;

/// What a message of ours is about.
#[derive(Clone, Copy)]
struct Asked {
    write: bool,
    iova: u64,
    count: usize,
}

enum Slot {
    /// Somebody waits.
    Waiting(Asked),
    /// The answer: data, for a read.
    Answered(Result<Vec<u8>, Fault>),
    /// Nobody waits any more. The number isn't used again before the answer has come: it would be taken for another's.
    Abandoned,
}

#[derive(Default)]
struct State {
    closed: bool,
    /// Most bytes the client takes in a message; 0 before that was agreed.
    max: usize,
    next: u16,
    /// To be sent: number, and the data of a write.
    outgoing: VecDeque<(u16, Vec<u8>)>,
    slots: HashMap<u16, Slot>,
}

/// The client's memory through messages of ours: those who use it on one side, the connection on the other.
pub struct Link {
    line: SourceHandle,
    /// There is something in `outgoing`.
    queued: AtomicBool,
    /// Numbers in use.
    outstanding: AtomicUsize,
    state: Mutex<State>,
    come: Condvar,
}

impl Link {
    /// For the connection that `line` wakes.
    pub fn new(line: SourceHandle) -> Self {
        Self {
            line,
            queued: AtomicBool::new(false),
            outstanding: AtomicUsize::new(0),
            state: Mutex::default(),
            come: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The version was agreed: messages may carry so many bytes.
    pub fn open(&self, max: usize) {
        self.lock().max = max.min(CHUNK);
    }

    /// The connection is over: everybody who waits is told.
    pub fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.outgoing.clear();
        drop(state);
        self.come.notify_all();
    }

    /// Whether answers are to come.
    pub fn is_waiting(&self) -> bool {
        self.outstanding.load(Ordering::Acquire) > 0
    }

    /// Replaces `to` by the next message to send; false when there is none.
    pub fn next_message(&self, to: &mut Vec<u8>) -> bool {
        if !self.queued.load(Ordering::Acquire) {
            return false;
        }
        let mut state = self.lock();
        while let Some((id, data)) = state.outgoing.pop_front() {
            let Some(Slot::Waiting(asked)) = state.slots.get(&id) else {
                // Given up before it was sent, so no answer will come.
                self.forget(&mut state, id);
                continue;
            };
            if asked.write {
                wire::dma_write(to, id, asked.iova, &data);
            } else {
                wire::dma_read(to, id, asked.iova, asked.count as u64);
            }
            return true;
        }
        self.queued.store(false, Ordering::Release);
        false
    }

    fn forget(&self, state: &mut State, id: u16) -> Option<Slot> {
        let slot = state.slots.remove(&id);
        self.outstanding.store(state.slots.len(), Ordering::Release);
        slot
    }

    /// A reply has come.
    ///
    /// # Errors
    /// `message.reply` when it is to nothing of ours.
    pub fn answer(&self, header: &Header, body: &[u8]) -> Result<(), Fault> {
        let mut state = self.lock();
        let asked = match state.slots.get(&header.id) {
            Some(Slot::Waiting(asked)) => *asked,
            Some(Slot::Abandoned) => {
                self.forget(&mut state, header.id);
                return Ok(());
            }
            Some(Slot::Answered(_)) | None => {
                let reason = format!("a reply to message {}, which was not asked", header.id);
                return Err(Fault::new("message.reply", reason));
            }
        };
        let answer = Self::judge(asked, header, body);
        state.slots.insert(header.id, Slot::Answered(answer));
        drop(state);
        self.come.notify_all();
        Ok(())
    }

    fn judge(asked: Asked, header: &Header, body: &[u8]) -> Result<Vec<u8>, Fault> {
        let what = if asked.write { "DMA_WRITE" } else { "DMA_READ" };
        let place = format!("{what} of {} bytes at {:#x}", asked.count, asked.iova);
        if header.is_error() {
            let error = std::io::Error::from_raw_os_error(header.error as i32);
            // QEMU says so while the guest has bus mastering switched off: in the middle of a reset, as a rule.
            let rule = if header.error == libc::ENODEV as u32 {
                "dma.no-master"
            } else {
                "dma.refused"
            };
            return Err(Fault::new(rule, format!("{place}: {error}")));
        }
        let expected = if asked.write {
            wire::command::DMA_WRITE
        } else {
            wire::command::DMA_READ
        };
        if header.command != expected {
            let reason = format!("{place}: answered as command {}", header.command);
            return Err(Fault::new("dma.reply", reason));
        }
        if asked.write {
            // What comes back with it differs between clients, and says nothing new.
            return Ok(Vec::new());
        }
        match wire::dma_read_reply(body) {
            Some((iova, count, data))
                if iova == asked.iova && count == asked.count as u64 && data.len() == asked.count =>
            {
                Ok(data.to_vec())
            }
            _ => Err(Fault::new(
                "dma.reply",
                format!("{place}: answered with {} bytes", body.len()),
            )),
        }
    }

    /// Sends one message and waits for its answer.
    fn ask(&self, asked: Asked, data: Vec<u8>, cancelled: Option<&AtomicBool>) -> Result<Vec<u8>, Fault> {
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.lock();
        let gone = || Fault::new("dma.disconnected", "the client is gone");
        if state.closed || state.max == 0 {
            return Err(gone());
        }
        if state.slots.len() >= MOST {
            return Err(Fault::new("dma.busy", "too many messages wait for an answer"));
        }
        let mut id = state.next;
        while state.slots.contains_key(&id) {
            id = id.wrapping_add(1);
        }
        state.next = id.wrapping_add(1);
        state.slots.insert(id, Slot::Waiting(asked));
        self.outstanding.store(state.slots.len(), Ordering::Release);
        state.outgoing.push_back((id, data));
        self.queued.store(true, Ordering::Release);
        self.line.wake();
        loop {
            if let Some(Slot::Answered(_)) = state.slots.get(&id) {
                if let Some(Slot::Answered(answer)) = self.forget(&mut state, id) {
                    return answer;
                }
            }
            if state.closed {
                self.forget(&mut state, id);
                return Err(gone());
            }
            let now = Instant::now();
            let left = deadline.saturating_duration_since(now);
            let stop = cancelled.is_some_and(|cancelled| cancelled.load(Ordering::Relaxed));
            if left.is_zero() || stop {
                state.slots.insert(id, Slot::Abandoned);
                return Err(if stop {
                    Fault::new("dma.cancelled", "nobody waits for it any more")
                } else {
                    let reason = format!("no answer for {} bytes at {:#x}", asked.count, asked.iova);
                    Fault::new("dma.timeout", reason)
                });
            }
            let wait = if cancelled.is_some() { left.min(LOOK) } else { left };
            state = self
                .come
                .wait_timeout(state, wait)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Bytes of a message at present.
    fn chunk(&self) -> usize {
        // 0 will be refused by `ask`.
        self.lock().max.max(1)
    }

    fn read_all(&self, mut iova: u64, data: &mut [u8], cancelled: Option<&AtomicBool>) -> Result<(), Fault> {
        for part in data.chunks_mut(self.chunk()) {
            let asked = Asked {
                write: false,
                iova,
                count: part.len(),
            };
            part.copy_from_slice(&self.ask(asked, Vec::new(), cancelled)?);
            iova = iova.wrapping_add(part.len() as u64);
        }
        Ok(())
    }
}

impl RemoteMemory for Link {
    fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Fault> {
        self.read_all(iova, data, None)
    }

    fn write(&self, mut iova: u64, data: &[u8]) -> Result<(), Fault> {
        for part in data.chunks(self.chunk()) {
            let asked = Asked {
                write: true,
                iova,
                count: part.len(),
            };
            self.ask(asked, part.to_vec(), None)?;
            iova = iova.wrapping_add(part.len() as u64);
        }
        Ok(())
    }

    fn read_unless(&self, iova: u64, data: &mut [u8], cancelled: &AtomicBool) -> Result<(), Fault> {
        self.read_all(iova, data, Some(cancelled))
    }
}
