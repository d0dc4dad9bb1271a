// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Administration virtqueues inside the process: the driver's side and the device's side of one queue (design D6).
//!
//! The driver puts descriptor chains into a split ring in memory of its own, and the device takes them out, as it would those
//! of a guest. What differs is how the two notify each other: the doorbell is a call of the device's side, on the thread
//! that submits, so a command that doesn't have to wait has completed when `submit` returns. One that does (for rings to
//! stop) blocks the queue, since commands of one queue are carried out in order; whoever ends the wait goes on with the
//! queue.

use std::sync::atomic::{fence, AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use super::admin::AdminDevice;
use super::command::{COMMAND_HEADER, RESULT_HEADER};
use super::trace::{Begun, Origin};
use crate::device::{Request, Step};
use crate::error::{Error, Fault, Result};
use crate::event::Waker;
use crate::memory::{HostArea, MemoryMap, Region};
use crate::ring::split::{area_sizes, AddressSpace, RingAddresses, SplitRing};
use crate::ring::RingFeatures;

/// Most entries of a ring; each command takes two.
const MAX_SIZE: u16 = 512;
/// Commands that can be in the queue of an owner driver at once.
pub const DEPTH: u16 = MAX_SIZE / 2;
/// The same of a forwarder: it has one under way, and some that were given up.
const FORWARDER_DEPTH: u16 = 16;
/// Bytes of either part of a short command.
const SHORT: usize = 512;
/// Bytes of either part of a long one.
pub const LONG: usize = 1 << 20;
/// Long commands at once.
const LONGS: usize = 4;
/// Where short buffers begin; the ring is before.
const BUFFERS: u64 = 1 << 16;
/// Where long ones begin.
const LONG_BUFFERS: u64 = BUFFERS + DEPTH as u64 * 2 * SHORT as u64;
const MEMORY: u64 = LONG_BUFFERS + (LONGS * 2 * LONG) as u64;

const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;
const AVAIL_F_NO_INTERRUPT: u16 = 1;

/// A command in the queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ticket {
    slot: u16,
    turn: u64,
}

/// What has become of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Submitted {
    /// It has completed; so many bytes were written.
    Done(usize),
    /// The waker will be called; then `take` it.
    Later(Ticket),
}

/// Why a command could not be put into the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// There is no room at the moment.
    Queue,
    /// A part is longer than [`LONG`].
    Length,
}

enum State {
    Free,
    Submitted(Option<Waker>),
    Completed(u32),
    /// Completed or not, nobody will ask.
    Abandoned,
}

struct Slot {
    state: State,
    /// Not to be carried out any more.
    void: bool,
    turn: u64,
    origin: Origin,
    begun: Begun,
    long: Option<usize>,
    writable: usize,
}

/// Both sides, and the memory between them.
struct Sides {
    size: u16,
    map: Arc<MemoryMap>,
    area: HostArea,
    // The driver's side.
    slots: Vec<Slot>,
    free: Vec<u16>,
    longs: Vec<usize>,
    avail_idx: u16,
    last_used: u16,
    // The device's side.
    ring: SplitRing,
    request: Request,
    /// The request waits.
    blocked: bool,
    broken: Option<Fault>,
}

/// An administration virtqueue of the process's own.
pub struct LocalQueue {
    device: Arc<AdminDevice>,
    sides: Mutex<Sides>,
    /// The command that blocks the queue may go on.
    woken: AtomicBool,
    submitted: AtomicU64,
    completed: AtomicU64,
}

impl LocalQueue {
    /// An empty queue for an owner driver.
    ///
    /// # Errors
    /// [`Error::Fault`] when there is no memory for it.
    pub fn new(device: Arc<AdminDevice>) -> Result<Arc<Self>> {
        Self::with_depth(device, DEPTH, LONGS)
    }

    /// An empty queue for a forwarder: a short one, for short commands.
    ///
    /// # Errors
    /// [`Error::Fault`] when there is no memory for it.
    pub fn for_forwarder(device: Arc<AdminDevice>) -> Result<Arc<Self>> {
        Self::with_depth(device, FORWARDER_DEPTH, 0)
    }

    fn with_depth(device: Arc<AdminDevice>, depth: u16, longs: usize) -> Result<Arc<Self>> {
        let size = depth * 2;
        // Pages that nobody touches cost nothing.
        let region = Region::local(0, MEMORY)?;
        let map = Arc::new(MemoryMap::default().with(region)?);
        let area = map.area_by_guest(0, MEMORY).ok_or(Error::Closed)?;
        let (desc, driver, _) = area_sizes(size);
        let addresses = RingAddresses {
            desc: 0,
            driver: desc,
            device: (desc + driver).next_multiple_of(4),
        };
        // The driver's side asks for no interrupts: it looks when the device's side has been called.
        area.u16(addresses.driver as usize)
            .store(AVAIL_F_NO_INTERRUPT.to_le(), Ordering::Relaxed);
        let ring = SplitRing::new(
            &map,
            AddressSpace::Guest,
            addresses,
            size,
            size,
            RingFeatures::default(),
            0,
        )?;
        let slot = || Slot {
            state: State::Free,
            void: false,
            turn: 0,
            origin: Origin::Admin,
            begun: Begun::now(),
            long: None,
            writable: 0,
        };
        Ok(Arc::new(Self {
            device,
            sides: Mutex::new(Sides {
                size,
                map,
                area,
                slots: (0..depth).map(|_| slot()).collect(),
                free: (0..depth).rev().collect(),
                longs: (0..longs).collect(),
                avail_idx: 0,
                last_used: 0,
                ring,
                request: Request::default(),
                blocked: false,
                broken: None,
            }),
            woken: AtomicBool::new(false),
            submitted: AtomicU64::new(0),
            completed: AtomicU64::new(0),
        }))
    }

    /// The device's side.
    pub fn device(&self) -> &Arc<AdminDevice> {
        &self.device
    }

    /// Commands submitted and completed so far.
    pub fn statistics(&self) -> (u64, u64) {
        (
            self.submitted.load(Ordering::Relaxed),
            self.completed.load(Ordering::Relaxed),
        )
    }

    /// Submits a command (its device-readable part, and how many bytes the device may write), rings the doorbell, and copies
    /// what was written to `out` if the command has completed by then.
    ///
    /// # Errors
    /// [`Full`].
    pub fn submit(
        self: &Arc<Self>,
        readable: &[&[u8]],
        out: &mut [u8],
        origin: Origin,
        begun: Begun,
        wake: impl FnOnce() -> Waker,
    ) -> std::result::Result<Submitted, Full> {
        let room = out.len();
        let (result, wakers) = {
            let mut sides = self.lock();
            let ticket = sides.put(readable, room, origin, begun)?;
            self.submitted.fetch_add(1, Ordering::Relaxed);
            let mut wakers = Vec::new();
            self.doorbell(&mut sides, &mut wakers);
            let result = match sides.take(ticket, out) {
                Some(written) => Submitted::Done(written),
                None => {
                    sides.slots[usize::from(ticket.slot)].state = State::Submitted(Some(wake()));
                    Submitted::Later(ticket)
                }
            };
            (result, wakers)
        };
        self.after(wakers);
        Ok(result)
    }

    /// Submits several commands with one doorbell and takes their results: for those who have many. `parts` are the
    /// device-readable parts; `done` is called with each result's bytes, in order, by those that have completed.
    ///
    /// # Errors
    /// [`Full`]; those before have been carried out.
    pub fn submit_all(
        self: &Arc<Self>,
        parts: &[&[u8]],
        room: usize,
        mut done: impl FnMut(usize, &[u8]),
    ) -> std::result::Result<(), Full> {
        let mut out = [0; SHORT];
        let out = out.get_mut(..room).ok_or(Full::Length)?;
        let mut wakers = Vec::new();
        let result = {
            let mut sides = self.lock();
            let mut tickets = [None; DEPTH as usize];
            let mut result = Ok(());
            for (part, ticket) in parts.iter().zip(&mut tickets) {
                match sides.put(&[part], room, Origin::Admin, Begun::now()) {
                    Ok(put) => *ticket = Some(put),
                    Err(full) => {
                        result = Err(full);
                        break;
                    }
                }
            }
            let count = tickets.iter().flatten().count();
            self.submitted.fetch_add(count as u64, Ordering::Relaxed);
            self.doorbell(&mut sides, &mut wakers);
            for (index, ticket) in tickets.iter().flatten().enumerate() {
                match sides.take(*ticket, out) {
                    Some(written) => done(index, &out[..written]),
                    None => sides.slots[usize::from(ticket.slot)].state = State::Abandoned,
                }
            }
            if count < parts.len() && result.is_ok() {
                result = Err(Full::Queue);
            }
            result
        };
        self.after(wakers);
        result
    }

    /// A command that doesn't wait, from its fields: the status, and the result in `result`.
    ///
    /// # Errors
    /// [`Full`]; also when the command would have to wait.
    pub fn call(
        self: &Arc<Self>,
        opcode: u16,
        group: u16,
        member: u64,
        data: &[u8],
        result: &mut [u8],
    ) -> std::result::Result<u16, Full> {
        let header = header(opcode, group, member);
        let mut out = vec![0; RESULT_HEADER + result.len()];
        let begun = Begun::now();
        match self.submit(&[&header, data], &mut out, Origin::Admin, begun, || Box::new(|| {}))? {
            Submitted::Done(_) => {
                result.copy_from_slice(&out[RESULT_HEADER..]);
                Ok(u16::from_le_bytes([out[0], out[1]]))
            }
            Submitted::Later(ticket) => {
                self.abandon(ticket);
                Err(Full::Queue)
            }
        }
    }

    /// The result of a command whose waker was called; None when it isn't there yet, and then the waker is needed again.
    pub fn take(self: &Arc<Self>, ticket: Ticket, out: &mut [u8]) -> Option<usize> {
        let written = self.lock().take(ticket, out);
        self.after(Vec::new());
        written
    }

    /// The same, of a command whose room isn't known to the caller any more.
    pub fn take_all(self: &Arc<Self>, ticket: Ticket) -> Option<Vec<u8>> {
        let out = Self::take_written(&mut self.lock(), ticket);
        self.after(Vec::new());
        out
    }

    fn take_written(sides: &mut Sides, ticket: Ticket) -> Option<Vec<u8>> {
        let slot = sides
            .slots
            .get(usize::from(ticket.slot))
            .filter(|slot| slot.turn == ticket.turn)?;
        let mut out = vec![0; slot.writable];
        let written = sides.take(ticket, &mut out)?;
        out.truncate(written);
        Some(out)
    }

    /// Nobody will ask for the result of this command. It is carried out nevertheless.
    pub fn abandon(self: &Arc<Self>, ticket: Ticket) {
        Self::forget(&mut self.lock(), ticket);
        self.after(Vec::new());
    }

    fn forget(sides: &mut Sides, ticket: Ticket) {
        let Some(slot) = sides.slots.get_mut(usize::from(ticket.slot)) else {
            return;
        };
        if slot.turn != ticket.turn {
            return;
        }
        match slot.state {
            State::Completed(_) => sides.release(ticket.slot),
            State::Submitted(_) => slot.state = State::Abandoned,
            State::Free | State::Abandoned => {}
        }
    }

    /// Commands in the queue that haven't been begun are not carried out any more.
    pub fn void(self: &Arc<Self>) {
        for slot in &mut self.lock().slots {
            slot.void = true;
        }
        self.after(Vec::new());
    }

    fn lock(&self) -> MutexGuard<'_, Sides> {
        self.sides.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What has to be done when the sides have been let go of: calling wakers, and looking whether the queue was woken
    /// meanwhile by somebody who found it locked.
    fn after(self: &Arc<Self>, wakers: Vec<Waker>) {
        for waker in wakers {
            waker();
        }
        // Pairs with the fence in `wake`: either the sides are seen to be free there, or the flag is seen here.
        fence(Ordering::SeqCst);
        if self.woken.load(Ordering::Acquire) {
            self.wake();
        }
    }

    /// The command that blocks the queue may go on. From any thread, also from one that holds the queue: then that one goes
    /// on when it lets go.
    fn wake(self: &Arc<Self>) {
        self.woken.store(true, Ordering::Release);
        fence(Ordering::SeqCst);
        while self.woken.load(Ordering::Acquire) {
            let mut wakers = Vec::new();
            match self.sides.try_lock() {
                Ok(mut sides) => self.doorbell(&mut sides, &mut wakers),
                Err(TryLockError::Poisoned(poisoned)) => self.doorbell(&mut poisoned.into_inner(), &mut wakers),
                Err(TryLockError::WouldBlock) => return,
            }
            for waker in wakers {
                waker();
            }
        }
    }

    /// The device's side takes what it can; then the driver's side collects what has completed.
    fn doorbell(self: &Arc<Self>, sides: &mut Sides, wakers: &mut Vec<Waker>) {
        if self.woken.swap(false, Ordering::AcqRel) && sides.blocked {
            sides.blocked = false;
            let step = self.device.wake_up(&mut sides.request);
            self.used(sides, step);
        }
        while !sides.blocked && sides.broken.is_none() {
            match self.serve(sides) {
                Ok(true) => {}
                Ok(false) => break,
                Err(fault) => {
                    // Both sides are ours.
                    log::error!("a bug in vhu_legacy: an in-process administration virtqueue broke: {fault}");
                    sides.broken = Some(fault);
                }
            }
        }
        sides.ring.publish();
        let completed = sides.collect(wakers);
        self.completed.fetch_add(completed, Ordering::Relaxed);
    }

    fn serve(self: &Arc<Self>, sides: &mut Sides) -> std::result::Result<bool, Fault> {
        if sides.ring.available()? == 0 {
            return Ok(false);
        }
        sides.request.chain.clear();
        sides.request.scratch.clear();
        if !sides.ring.pop(&sides.map, &mut sides.request.chain)? {
            return Ok(false);
        }
        let slot = &sides.slots[usize::from(sides.request.chain.head / 2)];
        if slot.void {
            sides.ring.push_used(sides.request.chain.head, 0);
            return Ok(true);
        }
        let (origin, begun) = (slot.origin, slot.begun);
        let queue = Arc::clone(self);
        let step = self.device.run(&mut sides.request, origin, begun, &|| {
            let queue = Arc::clone(&queue);
            Box::new(move || queue.wake())
        });
        self.used(sides, step);
        Ok(true)
    }

    fn used(&self, sides: &mut Sides, step: Step) {
        match step {
            Step::Done(written) => sides.ring.push_used(sides.request.chain.head, written),
            // An administration device does no I/O.
            Step::Wait | Step::Io(_) => sides.blocked = true,
        }
    }
}

/// The header of a command.
pub fn header(opcode: u16, group: u16, member: u64) -> [u8; COMMAND_HEADER] {
    let mut header = [0; COMMAND_HEADER];
    header[..2].copy_from_slice(&opcode.to_le_bytes());
    header[2..4].copy_from_slice(&group.to_le_bytes());
    header[16..].copy_from_slice(&member.to_le_bytes());
    header
}

impl Sides {
    /// Places of a slot's two parts.
    fn place(&self, slot: u16) -> (u64, u64) {
        match self.slots[usize::from(slot)].long {
            Some(long) => {
                let readable = LONG_BUFFERS + (long * 2 * LONG) as u64;
                (readable, readable + LONG as u64)
            }
            None => {
                let readable = BUFFERS + u64::from(slot) * 2 * SHORT as u64;
                (readable, readable + SHORT as u64)
            }
        }
    }

    /// The driver's side: a chain for the command, made available.
    fn put(
        &mut self,
        readable: &[&[u8]],
        writable: usize,
        origin: Origin,
        begun: Begun,
    ) -> std::result::Result<Ticket, Full> {
        let len: usize = readable.iter().map(|part| part.len()).sum();
        if len > LONG || writable > LONG || len == 0 {
            return Err(Full::Length);
        }
        if self.broken.is_some() {
            return Err(Full::Queue);
        }
        let slot = *self.free.last().ok_or(Full::Queue)?;
        let long = if len > SHORT || writable > SHORT {
            Some(self.longs.pop().ok_or(Full::Queue)?)
        } else {
            None
        };
        self.free.pop();
        let entry = &mut self.slots[usize::from(slot)];
        entry.state = State::Submitted(None);
        entry.void = false;
        entry.turn += 1;
        entry.origin = origin;
        entry.begun = begun;
        entry.long = long;
        entry.writable = writable;
        let turn = entry.turn;
        let (to_read, to_write) = self.place(slot);
        let mut at = to_read as usize;
        for part in readable {
            self.area.write(at, part);
            at += part.len();
        }
        let head = slot * 2;
        if writable > 0 {
            self.describe(head, to_read, len, DESC_F_NEXT);
            self.describe(head + 1, to_write, writable, DESC_F_WRITE);
        } else {
            self.describe(head, to_read, len, 0);
        }
        let (desc, _, _) = area_sizes(self.size);
        let entry = desc as usize + 4 + 2 * usize::from(self.avail_idx % self.size);
        self.area.u16(entry).store(head.to_le(), Ordering::Relaxed);
        self.avail_idx = self.avail_idx.wrapping_add(1);
        // Pairs with the device's load in SplitRing::available.
        self.area
            .u16(desc as usize + 2)
            .store(self.avail_idx.to_le(), Ordering::Release);
        Ok(Ticket { slot, turn })
    }

    fn describe(&self, index: u16, addr: u64, len: usize, flags: u16) {
        let at = usize::from(index) * 16;
        // Addresses here are below 2^32, lengths at most LONG.
        self.area.u32(at).store((addr as u32).to_le(), Ordering::Relaxed);
        self.area.u32(at + 4).store(0, Ordering::Relaxed);
        self.area.u32(at + 8).store((len as u32).to_le(), Ordering::Relaxed);
        self.area.u16(at + 12).store(flags.to_le(), Ordering::Relaxed);
        self.area.u16(at + 14).store((index + 1).to_le(), Ordering::Relaxed);
    }

    /// The driver's side: what the device has used.
    fn collect(&mut self, wakers: &mut Vec<Waker>) -> u64 {
        let (desc, driver, _) = area_sizes(self.size);
        let used = (desc + driver).next_multiple_of(4) as usize;
        let idx = u16::from_le(self.area.u16(used + 2).load(Ordering::Acquire));
        let mut count = 0;
        while self.last_used != idx {
            let at = used + 4 + 8 * usize::from(self.last_used % self.size);
            let head = u32::from_le(self.area.u32(at).load(Ordering::Relaxed));
            let written = u32::from_le(self.area.u32(at + 4).load(Ordering::Relaxed));
            self.last_used = self.last_used.wrapping_add(1);
            count += 1;
            let slot = (head / 2) as u16;
            let Some(entry) = self.slots.get_mut(usize::from(slot)) else {
                continue;
            };
            match std::mem::replace(&mut entry.state, State::Completed(written)) {
                State::Submitted(waker) => wakers.extend(waker),
                State::Abandoned => self.release(slot),
                State::Free | State::Completed(_) => {}
            }
        }
        count
    }

    fn take(&mut self, ticket: Ticket, out: &mut [u8]) -> Option<usize> {
        let slot = self.slots.get(usize::from(ticket.slot))?;
        if slot.turn != ticket.turn {
            return None;
        }
        let State::Completed(written) = slot.state else {
            return None;
        };
        let written = (written as usize).min(out.len());
        let (_, to_write) = self.place(ticket.slot);
        self.area.read(to_write as usize, &mut out[..written]);
        self.release(ticket.slot);
        Some(written)
    }

    fn release(&mut self, slot: u16) {
        let entry = &mut self.slots[usize::from(slot)];
        entry.state = State::Free;
        // A ticket is good for one result.
        entry.turn += 1;
        self.longs.extend(entry.long.take());
        self.free.push(slot);
    }
}
