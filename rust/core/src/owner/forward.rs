// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The legacy interface of a member as an I/O BAR: each access becomes an administration command (design D6), by the rules of
//! the one driver that does this on real hardware, but for every type and size of device.
//!
//! Queue notifications go through the notify region when the owner has one (LEGACY_NOTIFY_INFO), else as commands. Offsets
//! below the split, which follows the member's MSI-X enable bit, are common configuration, the others device configuration.
//! An access to the device configuration that lies in several fields has to work in the BAR but not as a command, so it is
//! made byte by byte.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use super::command::{
    LEGACY_COMMON_CFG_READ, LEGACY_COMMON_CFG_WRITE, LEGACY_DEV_CFG_READ, LEGACY_DEV_CFG_WRITE, LEGACY_NOTIFY_INFO,
    NOTIFY_BAR, NOTIFY_OFFSET, RESULT_HEADER, SR_IOV,
};
use super::local::{header, Full, LocalQueue, Submitted, Ticket};
use super::trace::{Begun, Entry, Origin};
use super::DeviceGroup;
use crate::error::Result;
use crate::event::Waker;
use crate::member::lens::{LEGACY_MSIX_SIZE, LEGACY_SIZE};
use crate::member::Member;
use crate::vfio_user::function::Access;

/// Offset of queue_notify.
const QUEUE_NOTIFY: u64 = 16;
const EIO: i32 = 5;
const EINVAL: i32 = 22;
const EAGAIN: i32 = 11;
/// Longest access: what one instruction can do, and a bit.
const MAX_WIDTH: usize = 8;

/// An access under way.
#[derive(Clone, Copy)]
struct Work {
    ticket: Ticket,
    opcode: u16,
    write: bool,
    /// Offset in the space that the command is for.
    offset: u8,
    len: usize,
    /// Bytes that have been done one by one; None: the whole access is one command.
    bytewise: Option<usize>,
    data: [u8; MAX_WIDTH],
    bar_offset: u16,
    begun: Begun,
}

/// Turns accesses to a member's legacy I/O BAR into commands.
pub struct Forwarder {
    group: Arc<DeviceGroup>,
    member: Arc<Member>,
    queue: Arc<LocalQueue>,
    notify_region: Mutex<Option<bool>>,
    work: Mutex<Option<Work>>,
}

/// What a step of an access came to.
enum Outcome {
    /// The status, with the data in place.
    Status(u16),
    Later(Ticket),
    Full,
}

impl Forwarder {
    /// For one member, with a queue of its own: a member whose rings take their time to stop keeps nobody else waiting.
    ///
    /// # Errors
    /// [`Error`](crate::error::Error) when there is no memory for the queue.
    pub fn new(group: Arc<DeviceGroup>, member: Arc<Member>) -> Result<Self> {
        let queue = group.forwarding_queue()?;
        Ok(Self {
            group,
            member,
            queue,
            notify_region: Mutex::new(None),
            work: Mutex::new(None),
        })
    }

    /// Bytes of the BAR that mean something.
    pub fn size(&self) -> usize {
        LEGACY_MSIX_SIZE + self.member.legacy_config_size()
    }

    /// Whether notifications can go past the commands: asked of the owner once, when it has the time to answer.
    fn has_notify_region(&self) -> bool {
        let mut known = self.notify_region.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = *known {
            return known;
        }
        let mut entries = [0; 64];
        let id = u64::from(self.member.id());
        let Ok(status) = self.queue.call(LEGACY_NOTIFY_INFO, SR_IOV, id, &[], &mut entries) else {
            return false;
        };
        let ours =
            |entry: &[u8]| entry[0] == 2 && entry[1] == NOTIFY_BAR && entry[8..16] == NOTIFY_OFFSET.to_le_bytes();
        let found = status == 0 && entries.chunks_exact(16).take_while(|entry| entry[0] != 0).any(ours);
        if status == 0 {
            *known = Some(found);
        }
        found
    }

    fn work(&self) -> MutexGuard<'_, Option<Work>> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the BAR.
    pub fn read(&self, offset: u64, data: &mut [u8], wake: &dyn Fn() -> Waker) -> Access {
        let len = data.len();
        self.begin(offset, len, None, wake, data)
    }

    /// Writes the BAR.
    pub fn write(&self, offset: u64, data: &[u8], wake: &dyn Fn() -> Waker) -> Access {
        if offset == QUEUE_NOTIFY && data.len() == 2 && self.has_notify_region() {
            return self.notify(u16::from_le_bytes([data[0], data[1]]));
        }
        self.begin(offset, data.len(), Some(data), wake, &mut [])
    }

    /// A write of the notify region.
    fn notify(&self, queue: u16) -> Access {
        let begun = Begun::now();
        self.member.notify(queue);
        let entry = Entry {
            at: SystemTime::now(),
            member: self.member.id(),
            origin: Origin::Bar0(QUEUE_NOTIFY as u16),
            write: true,
            opcode: None,
            offset: QUEUE_NOTIFY as u16,
            width: 2,
            value: Some(u64::from(queue)),
            status: 0,
            qualifier: 0,
            nanoseconds: begun.nanoseconds(),
        };
        self.group.core().trace.push(self.member.id() as usize, entry);
        Access::Done
    }

    fn begin(&self, offset: u64, len: usize, write: Option<&[u8]>, wake: &dyn Fn() -> Waker, out: &mut [u8]) -> Access {
        let begun = Begun::now();
        if len == 0 || len > MAX_WIDTH || offset.saturating_add(len as u64) > self.size() as u64 {
            return Access::Refused(EINVAL);
        }
        let split = if self.member.msix_enabled() {
            LEGACY_MSIX_SIZE
        } else {
            LEGACY_SIZE
        } as u64;
        let (opcode, at) = match (offset < split, write.is_some()) {
            (true, true) => (LEGACY_COMMON_CFG_WRITE, offset),
            (true, false) => (LEGACY_COMMON_CFG_READ, offset),
            (false, true) => (LEGACY_DEV_CFG_WRITE, offset - split),
            (false, false) => (LEGACY_DEV_CFG_READ, offset - split),
        };
        // Commands have a byte for the offset: what is behind can't be reached.
        let Ok(at) = u8::try_from(at) else {
            return Access::Refused(EINVAL);
        };
        let mut data = [0; MAX_WIDTH];
        if let Some(write) = write {
            data[..len].copy_from_slice(write);
        }
        let mut work = Work {
            ticket: Ticket::default(),
            opcode,
            write: write.is_some(),
            offset: at,
            len,
            bytewise: None,
            data,
            // Below the BAR's size.
            bar_offset: offset as u16,
            begun,
        };
        let outcome = self.step(&mut work, wake);
        self.go_on(work, outcome, wake, out)
    }

    /// Goes on with the access that had to wait.
    pub fn resume(&self, out: &mut [u8], wake: &dyn Fn() -> Waker) -> Access {
        let Some(mut work) = self.work().take() else {
            return Access::Refused(EIO);
        };
        let mut reply = [0; RESULT_HEADER + MAX_WIDTH];
        match self.queue.take(work.ticket, &mut reply) {
            Some(written) => {
                let outcome = Self::reply(&mut work, &reply[..written]);
                self.go_on(work, outcome, wake, out)
            }
            None => Access::Refused(EIO),
        }
    }

    /// Nobody waits for the access any more.
    pub fn give_up(&self) {
        if let Some(work) = self.work().take() {
            self.queue.abandon(work.ticket);
        }
    }

    /// The client is gone: commands of its that haven't been begun are not for the next client's device.
    pub fn leave(&self) {
        self.give_up();
        self.queue.void();
    }

    /// One command of an access.
    fn step(&self, work: &mut Work, wake: &dyn Fn() -> Waker) -> Outcome {
        let (skip, len) = match work.bytewise {
            Some(done) => (done, 1),
            None => (0, work.len),
        };
        let header = header(work.opcode, SR_IOV, u64::from(self.member.id()));
        // Sums stay below the BAR's size.
        let offset = work.offset + skip as u8;
        let mut reply = [0; RESULT_HEADER + MAX_WIDTH];
        let origin = Origin::Bar0(work.bar_offset + skip as u16);
        let submitted = if work.write {
            let parts: [&[u8]; 3] = [&header, &[offset, 0, 0, 0, 0, 0, 0, 0], &work.data[skip..skip + len]];
            let room = &mut reply[..RESULT_HEADER];
            self.queue.submit(&parts, room, origin, work.begun, wake)
        } else {
            let parts: [&[u8]; 2] = [&header, &[offset]];
            let room = &mut reply[..RESULT_HEADER + len];
            self.queue.submit(&parts, room, origin, work.begun, wake)
        };
        match submitted {
            Ok(Submitted::Done(written)) => Self::reply(work, &reply[..written]),
            Ok(Submitted::Later(ticket)) => Outcome::Later(ticket),
            Err(Full::Queue | Full::Length) => Outcome::Full,
        }
    }

    fn reply(work: &mut Work, reply: &[u8]) -> Outcome {
        let Some(header) = reply.get(..RESULT_HEADER) else {
            return Outcome::Full;
        };
        if !work.write {
            let skip = work.bytewise.unwrap_or(0);
            let result = &reply[RESULT_HEADER..];
            work.data[skip..skip + result.len()].copy_from_slice(result);
        }
        Outcome::Status(u16::from_le_bytes([header[0], header[1]]))
    }

    fn go_on(&self, mut work: Work, mut outcome: Outcome, wake: &dyn Fn() -> Waker, out: &mut [u8]) -> Access {
        loop {
            match outcome {
                Outcome::Later(ticket) => {
                    work.ticket = ticket;
                    *self.work() = Some(work);
                    return Access::Later;
                }
                Outcome::Full => return Access::Refused(EAGAIN),
                Outcome::Status(0) => match work.bytewise {
                    Some(done) if done + 1 < work.len => work.bytewise = Some(done + 1),
                    _ => {
                        out.copy_from_slice(&work.data[..out.len()]);
                        return Access::Done;
                    }
                },
                Outcome::Status(22)
                    if work.bytewise.is_none()
                        && work.len > 1
                        && matches!(work.opcode, LEGACY_DEV_CFG_READ | LEGACY_DEV_CFG_WRITE) =>
                {
                    work.bytewise = Some(0);
                }
                // Statuses are errnos.
                Outcome::Status(status) => return Access::Refused(i32::from(status)),
            }
            work.begun = Begun::now();
            outcome = self.step(&mut work, wake);
        }
    }
}
