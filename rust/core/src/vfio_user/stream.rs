// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Messages in a stream of bytes and fds.
//!
//! One system call takes whatever is there, many messages as a rule. A receive stops after a piece that fds came with, and
//! a client sends fds with the message they are for; so they belong to the last message that begins in what was received,
//! or, when none begins there, to the one in the middle.

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;

use super::wire::{Header, Kind, HEADER_SIZE, MAX_FDS, MAX_MESSAGE};
use crate::error::Fault;
use crate::sys::{self, PeerFd};

/// Bytes of a buffer as a rule. It grows for a message that is longer.
const BUFFER: usize = 4096;
/// A buffer larger than this is given back when it is empty.
const LARGE: usize = 64 << 10;
/// Most bytes that may be held.
const LIMIT: usize = 2 * MAX_MESSAGE;
/// No more is received while this many fds are held.
const FDS_HELD: usize = 32 * MAX_FDS;

/// What a receive has brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// Nothing is there.
    Nothing,
    /// Something; `more`: there may be more.
    Some {
        /// As much was there as there was room for, or the kernel stopped at fds.
        more: bool,
    },
    /// The client sends no more.
    End,
    /// There is no room until messages are taken.
    Full,
}

/// What has been received and not yet taken. Positions count from the beginning of the stream.
#[derive(Default)]
pub struct Input {
    buffer: Vec<u8>,
    /// Of the first byte held, in the buffer.
    start: usize,
    /// Behind the last byte held, in the buffer.
    end: usize,
    /// Position of the buffer's first byte.
    base: u64,
    /// Position of the last message that has begun.
    last: u64,
    /// Where that one ends, once its header is there.
    last_end: Option<u64>,
    /// With the position of the message each is for.
    fds: VecDeque<(u64, PeerFd)>,
    fresh: Vec<PeerFd>,
    /// Replies before this position have been looked at.
    scanned: u64,
}

impl Input {
    /// Whether a message is there in part.
    pub fn is_torn(&self) -> bool {
        self.start < self.end
    }

    /// Whether more can be received before messages are taken.
    pub fn has_room(&self) -> bool {
        self.wanted() <= LIMIT && self.fds.len() < FDS_HELD
    }

    /// Takes what is there.
    ///
    /// # Errors
    /// `message.size`, `message.fds`; `connection` for what the kernel says.
    pub fn receive(&mut self, socket: RawFd) -> Result<Received, Fault> {
        if !self.make_room() {
            return Ok(Received::Full);
        }
        let room = self.buffer.len() - self.end;
        let bytes = match sys::receive(socket, &mut self.buffer[self.end..], &mut self.fresh) {
            Ok(0) => return Ok(Received::End),
            Ok(bytes) => bytes,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return Ok(Received::Nothing)
            }
            Err(e) if e.raw_os_error() == Some(libc::ECONNRESET) => return Ok(Received::End),
            Err(e) => return Err(Fault::new("connection", e.to_string())),
        };
        self.end += bytes;
        let message = self.find_last()?;
        let came = self.fresh.len();
        if came > 0 {
            let held = self.fds.iter().filter(|(position, _)| *position == message).count();
            if held + came > MAX_FDS {
                let reason = format!("{} fds with one message, more than {MAX_FDS}", held + came);
                return Err(Fault::new("message.fds", reason));
            }
            self.fds.extend(self.fresh.drain(..).map(|fd| (message, fd)));
        }
        Ok(Received::Some {
            more: bytes == room || came > 0,
        })
    }

    /// Bytes that there must be room for: what is held, and the rest of the last message, as far as it is known.
    fn wanted(&self) -> usize {
        let first = self.base + self.start as u64;
        let last_end = self.last_end.unwrap_or(self.last + HEADER_SIZE as u64);
        let wanted = usize::try_from(last_end.saturating_sub(first)).unwrap_or(usize::MAX);
        wanted.max(self.end - self.start + 1)
    }

    /// Makes room for at least the rest of the last message; false when too much is held.
    fn make_room(&mut self) -> bool {
        if self.start == self.end {
            self.base += self.end as u64;
            (self.start, self.end) = (0, 0);
            if self.buffer.len() > LARGE {
                self.buffer = Vec::new();
            }
        }
        if !self.has_room() {
            return false;
        }
        let wanted = self.wanted();
        let held = self.end - self.start;
        if self.start > 0 && self.start + wanted > self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            self.base += self.start as u64;
            (self.start, self.end) = (0, held);
        }
        if wanted > self.buffer.len() {
            self.buffer.resize(wanted.max(BUFFER), 0);
        }
        true
    }

    /// Finds the last message that has begun.
    fn find_last(&mut self) -> Result<u64, Fault> {
        let limit = self.base + self.end as u64;
        loop {
            let end = match self.last_end {
                Some(end) => end,
                None => {
                    // It begins in the buffer: nothing of it was taken.
                    let at = usize::try_from(self.last - self.base).unwrap_or(usize::MAX);
                    let Some(header) = Header::parse(self.buffer.get(at..self.end).unwrap_or_default()) else {
                        return Ok(self.last);
                    };
                    let size = header.size as usize;
                    if !(HEADER_SIZE..=MAX_MESSAGE).contains(&size) {
                        let reason = format!(
                            "command {} announces {size} bytes; {HEADER_SIZE} to {MAX_MESSAGE} are possible",
                            header.command
                        );
                        return Err(Fault::new("message.size", reason));
                    }
                    *self.last_end.insert(self.last + u64::from(header.size))
                }
            };
            if end >= limit {
                return Ok(self.last);
            }
            self.last = end;
            self.last_end = None;
        }
    }

    /// The next message, when it is there as a whole: header, body, and whether it is a reply that was looked at already.
    pub fn message(&self) -> Option<(Header, &[u8], bool)> {
        let held = &self.buffer[self.start..self.end];
        let header = Header::parse(held)?;
        let body = held.get(HEADER_SIZE..header.size as usize)?;
        Some((header, body, self.base + (self.start as u64) < self.scanned))
    }

    /// The fds of the next message.
    pub fn take_fds(&mut self) -> Vec<PeerFd> {
        let position = self.base + self.start as u64;
        let count = self.fds.iter().take_while(|(at, _)| *at <= position).count();
        self.fds.drain(..count).map(|(_, fd)| fd).collect()
    }

    /// The next message, of so many bytes, was taken.
    pub fn consume(&mut self, size: usize) {
        self.start = (self.start + size).min(self.end);
    }

    /// Looks at the messages that nobody looked at before, without taking them.
    ///
    /// # Errors
    /// Those of `look`.
    pub fn scan(&mut self, mut look: impl FnMut(&Header, &[u8]) -> Result<(), Fault>) -> Result<(), Fault> {
        let skip = self.scanned.saturating_sub(self.base);
        let mut at = self.start.max(usize::try_from(skip).unwrap_or(usize::MAX));
        loop {
            let held = self.buffer.get(at..self.end).unwrap_or_default();
            let Some(header) = Header::parse(held) else { break };
            let Some(body) = held.get(HEADER_SIZE..header.size as usize) else {
                break;
            };
            look(&header, body)?;
            at += header.size as usize;
            self.scanned = self.base + at as u64;
        }
        Ok(())
    }

    /// Takes the replies at the front that were looked at.
    pub fn drop_seen(&mut self) {
        while let Some((header, _, true)) = self.message() {
            if header.kind() != Kind::Reply {
                return;
            }
            // Whatever came with it.
            drop(self.take_fds());
            self.consume(header.size as usize);
        }
    }
}
