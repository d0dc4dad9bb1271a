// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A block driver on one split queue, as small as it gets.
//!
//! It works like a guest driver does: it takes all completions there are, gives each slot its next request, publishes
//! the available index once, and kicks once, if the device asks for it. Between two rounds it either blocks on the
//! call eventfd (`Wait::Eventfd`, an interrupt-driven guest) or looks at the used index (`Wait::Polled`, a polling
//! driver, which also tells the device not to send calls).

use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{fence, Ordering};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use crate::ram::Ram;
use crate::wire::{feature, protocol, request, words, Connection};

const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const DESC_INDIRECT: u16 = 4;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

const SECTOR: u64 = 512;
const HEADER: usize = 16;
const PAGE: usize = 4096;
/// What a slot has beside its data: the indirect table, the header and the status byte, each on lines of its own.
const SLOT_META: usize = 256;
const META_HEADER: usize = 64;
const META_STATUS: usize = 128;

/// Where guest RAM starts in guest-physical addresses: not 0, so that a mix-up of address kinds shows.
const GUEST_BASE: u64 = 0x1_0000_0000;

/// Longest wait for a completion.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// How completions are noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Block on the call eventfd.
    Eventfd,
    /// Spin on the used index; calls are suppressed.
    Polled,
}

/// What is asked of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Read.
    In,
    /// Write.
    Out,
}

/// What to run.
#[derive(Clone, Debug)]
pub struct Job {
    /// How completions are noticed.
    pub wait: Wait,
    /// Reads or writes.
    pub op: Op,
    /// Requests in flight.
    pub depth: u16,
    /// Bytes of a request.
    pub block: usize,
    /// Not measured, first.
    pub warmup: Duration,
    /// Measured.
    pub time: Duration,
    /// Read data must be sector numbers; written data is.
    pub verify: bool,
    /// Queue size.
    pub queue_size: u16,
    /// Use EVENT_IDX when offered.
    pub event_idx: bool,
    /// Use indirect descriptors when offered.
    pub indirect: bool,
    /// Accept VERSION_1 when offered.
    pub version_1: bool,
    /// Seed of the random positions.
    pub seed: u64,
}

/// What was seen.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Requests completed in the measured time.
    pub requests: u64,
    /// The measured time.
    pub elapsed: Duration,
    /// Nanoseconds of each measured request.
    pub latencies: Vec<u32>,
    /// Kicks sent in the measured time.
    pub kicks: u64,
    /// Calls received in the measured time (the sum of the eventfd's counts).
    pub calls: u64,
}

/// A running device.
pub struct Driver {
    connection: Connection,
    ram: Ram,
    job: Job,
    kick: EventFd,
    call: EventFd,
    /// Features that were agreed on.
    pub features: u64,
    /// Protocol features that were agreed on.
    pub protocol: u64,
    /// Size of the disk in bytes.
    pub capacity: u64,
    avail: usize,
    used: usize,
    slots: usize,
    data: usize,
    event_idx: bool,
    avail_idx: u16,
    used_idx: u16,
    kicks: u64,
    calls: u64,
    /// Sector of each slot's request.
    sectors: Vec<u64>,
    /// When each slot's request was submitted.
    started: Vec<Instant>,
    random: u64,
}

impl Driver {
    /// Connects, negotiates and starts the queue.
    ///
    /// # Errors
    /// The socket's errors, and anything the back end refuses or answers wrongly.
    pub fn start(socket: &Path, job: Job) -> io::Result<Self> {
        let mut connection = Connection::open(socket)?;
        let offered = connection.get_u64(request::GET_FEATURES)?;
        let mut accepted = 0;
        let mut agreed = 0;
        if offered & feature::PROTOCOL_FEATURES != 0 {
            accepted |= feature::PROTOCOL_FEATURES;
            let known = protocol::MQ | protocol::REPLY_ACK | protocol::CONFIG | protocol::STATUS;
            agreed = connection.get_u64(request::GET_PROTOCOL_FEATURES)? & known;
            connection.set_u64(request::SET_PROTOCOL_FEATURES, agreed)?;
            if agreed & protocol::REPLY_ACK != 0 {
                connection.use_reply_ack();
            }
        }
        connection.set(request::SET_OWNER, &[], &[])?;
        if agreed & protocol::CONFIG == 0 {
            return Err(io::Error::other(
                "the back end has no GET_CONFIG, so the disk's size can't be known",
            ));
        }
        let mut raw = [0u8; 8];
        raw.copy_from_slice(&connection.config(0, 8)?);
        let capacity = u64::from_le_bytes(raw) * SECTOR;
        if capacity < job.block as u64 {
            return Err(io::Error::other(format!("a disk of {capacity} bytes is too small")));
        }
        let mut wanted = 0;
        for (on, bit) in [
            (job.version_1, feature::VERSION_1),
            (job.event_idx, feature::EVENT_IDX),
            (job.indirect, feature::INDIRECT),
        ] {
            wanted |= if on { bit } else { 0 };
        }
        accepted |= offered & wanted;
        connection.set_u64(request::SET_FEATURES, accepted)?;
        if agreed & protocol::STATUS != 0 {
            connection.set_u64(request::SET_STATUS, 11)?;
        }

        let mut driver = Self::lay_out(connection, job, accepted, agreed, capacity)?;
        driver.start_queue()?;
        Ok(driver)
    }

    fn lay_out(connection: Connection, job: Job, features: u64, protocol: u64, capacity: u64) -> io::Result<Self> {
        let indirect = features & feature::INDIRECT != 0;
        let needed = job.depth * if indirect { 1 } else { 3 };
        if needed > job.queue_size || job.depth == 0 {
            return Err(io::Error::other(format!(
                "depth {} doesn't fit in a queue of {}",
                job.depth, job.queue_size
            )));
        }
        let n = usize::from(job.queue_size);
        let depth = usize::from(job.depth);
        let avail = 16 * n;
        let used = (avail + 6 + 2 * n).next_multiple_of(PAGE);
        let slots = (used + 6 + 8 * n).next_multiple_of(PAGE);
        let data = (slots + depth * SLOT_META).next_multiple_of(PAGE);
        let ram = Ram::new((data + depth * job.block).next_multiple_of(2 << 20))?;
        let driver = Self {
            connection,
            ram,
            kick: EventFd::new(EFD_NONBLOCK)?,
            call: EventFd::new(EFD_NONBLOCK)?,
            features,
            protocol,
            capacity,
            avail,
            used,
            slots,
            data,
            event_idx: features & feature::EVENT_IDX != 0,
            avail_idx: 0,
            used_idx: 0,
            kicks: 0,
            calls: 0,
            sectors: vec![0; depth],
            started: vec![Instant::now(); depth],
            random: job.seed | 1,
            job,
        };
        for slot in 0..depth {
            driver.lay_out_slot(slot, indirect);
        }
        Ok(driver)
    }

    /// Writes a slot's descriptors: they stay as they are, only the sector changes from request to request.
    fn lay_out_slot(&self, slot: usize, indirect: bool) {
        let meta = self.slots + slot * SLOT_META;
        let (table, first) = if indirect { (meta, 0) } else { (0, slot * 3) };
        let kind: u32 = if self.job.op == Op::In { 0 } else { 1 };
        self.ram.u32(meta + META_HEADER).store(kind, Ordering::Relaxed);
        let data_flags = if self.job.op == Op::In { DESC_WRITE } else { 0 };
        let parts = [
            (meta + META_HEADER, HEADER, DESC_NEXT),
            (
                self.data + slot * self.job.block,
                self.job.block,
                DESC_NEXT | data_flags,
            ),
            (meta + META_STATUS, 1, DESC_WRITE),
        ];
        for (i, (place, len, flags)) in parts.into_iter().enumerate() {
            let next = if flags & DESC_NEXT != 0 { first + i + 1 } else { 0 };
            self.write_descriptor(table + (first + i) * 16, place, len, flags, next);
        }
        if indirect {
            self.write_descriptor(slot * 16, meta, 48, DESC_INDIRECT, 0);
        }
    }

    fn write_descriptor(&self, at: usize, place: usize, len: usize, flags: u16, next: usize) {
        self.ram.u64(at).store(GUEST_BASE + place as u64, Ordering::Relaxed);
        self.ram.u32(at + 8).store(len as u32, Ordering::Relaxed);
        self.ram.u16(at + 12).store(flags, Ordering::Relaxed);
        self.ram.u16(at + 14).store(next as u16, Ordering::Relaxed);
    }

    fn start_queue(&mut self) -> io::Result<()> {
        let user = self.ram.user_address();
        let mut table = words(&[1, 0]);
        for value in [GUEST_BASE, self.ram.len() as u64, user, 0] {
            table.extend_from_slice(&value.to_le_bytes());
        }
        self.suppress_or_request_call();
        let connection = &mut self.connection;
        connection.set(request::SET_MEM_TABLE, &table, &[self.ram.fd()])?;
        connection.set_vring(request::SET_VRING_NUM, 0, u32::from(self.job.queue_size))?;
        connection.set_vring(request::SET_VRING_BASE, 0, 0)?;
        let mut addresses = words(&[0, 0]);
        for value in [user, user + self.used as u64, user + self.avail as u64, 0] {
            addresses.extend_from_slice(&value.to_le_bytes());
        }
        connection.set(request::SET_VRING_ADDR, &addresses, &[])?;
        connection.set(request::SET_VRING_CALL, &0u64.to_le_bytes(), &[self.call.as_raw_fd()])?;
        connection.set(request::SET_VRING_KICK, &0u64.to_le_bytes(), &[self.kick.as_raw_fd()])?;
        if self.features & feature::PROTOCOL_FEATURES != 0 {
            connection.set_vring(request::SET_VRING_ENABLE, 0, 1)?;
        }
        if self.protocol & protocol::STATUS != 0 {
            connection.set_u64(request::SET_STATUS, 15)?;
        }
        // Without acknowledgements: an answer to this says that everything before it was taken.
        connection.get_u64(request::GET_FEATURES)?;
        Ok(())
    }

    /// Tells the device when to call next: at the next completion, or (polled) never.
    fn suppress_or_request_call(&self) {
        let polled = self.job.wait == Wait::Polled;
        if self.event_idx {
            // Half the number circle away, and moved along with each round: never reached.
            let event = if polled {
                self.used_idx.wrapping_add(0x8000)
            } else {
                self.used_idx
            };
            let at = self.avail + 4 + 2 * usize::from(self.job.queue_size);
            self.ram.u16(at).store(event, Ordering::Relaxed);
        } else {
            self.ram
                .u16(self.avail)
                .store(if polled { NO_INTERRUPT } else { 0 }, Ordering::Relaxed);
        }
    }

    fn device_used_idx(&self) -> u16 {
        self.ram.u16(self.used + 2).load(Ordering::Acquire)
    }

    /// Fills a slot with its next request and puts it on the available ring; `publish` makes it known.
    fn submit(&mut self, slot: usize, now: Instant) {
        // xorshift64: the positions need no better.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let blocks = self.capacity / self.job.block as u64;
        let sector = self.random % blocks * (self.job.block as u64 / SECTOR);
        let meta = self.slots + slot * SLOT_META;
        self.ram.u64(meta + META_HEADER + 8).store(sector, Ordering::Relaxed);
        self.ram.u8(meta + META_STATUS).store(0xff, Ordering::Relaxed);
        if self.job.verify {
            self.prepare_data(slot, sector);
        }
        self.sectors[slot] = sector;
        self.started[slot] = now;
        let indirect = self.features & feature::INDIRECT != 0;
        let head = if indirect { slot } else { slot * 3 };
        let place = usize::from(self.avail_idx % self.job.queue_size);
        self.ram
            .u16(self.avail + 4 + 2 * place)
            .store(head as u16, Ordering::Relaxed);
        self.avail_idx = self.avail_idx.wrapping_add(1);
    }

    fn prepare_data(&self, slot: usize, sector: u64) {
        let base = self.data + slot * self.job.block;
        for at in (0..self.job.block).step_by(8) {
            // A read has to overwrite this; the disk's last sector has another number.
            let value = if self.job.op == Op::Out {
                sector + at as u64 / SECTOR
            } else {
                u64::MAX
            };
            self.ram.u64(base + at).store(value, Ordering::Relaxed);
        }
    }

    /// Publishes the available index and kicks when the device wants it.
    fn publish(&mut self, old: u16) -> io::Result<()> {
        let new = self.avail_idx;
        self.ram.u16(self.avail + 2).store(new, Ordering::Release);
        // The index before the look at whether a kick is wanted.
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let at = self.used + 4 + 8 * usize::from(self.job.queue_size);
            let event = self.ram.u16(at).load(Ordering::Relaxed);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.ram.u16(self.used).load(Ordering::Relaxed) & NO_NOTIFY == 0
        };
        if wanted {
            self.kick.write(1)?;
            self.kicks += 1;
        }
        Ok(())
    }

    /// Waits until there is a completion.
    fn wait(&mut self) -> io::Result<()> {
        loop {
            self.suppress_or_request_call();
            // The request for a call before the look at the index.
            fence(Ordering::SeqCst);
            if self.device_used_idx() != self.used_idx {
                return Ok(());
            }
            if self.job.wait == Wait::Eventfd {
                self.wait_for_call()?;
            } else {
                while self.device_used_idx() == self.used_idx {
                    std::hint::spin_loop();
                }
            }
        }
    }

    /// Blocks until the call eventfd is written. poll and read rather than a blocking read: the flag that makes an
    /// eventfd non-blocking belongs to both ends, and some back ends set it.
    fn wait_for_call(&mut self) -> io::Result<()> {
        let mut poll = libc::pollfd {
            fd: self.call.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let limit = CALL_TIMEOUT.as_millis() as libc::c_int;
        // SAFETY: one pollfd, ours alone.
        match unsafe { libc::poll(&raw mut poll, 1, limit) } {
            0 => Err(io::Error::other(format!("no call for {} s", CALL_TIMEOUT.as_secs()))),
            n if n < 0 => Err(io::Error::last_os_error()),
            _ => {
                self.calls += self.call.read()?;
                Ok(())
            }
        }
    }

    /// Takes the completions there are, calling `done` with each slot.
    fn reap(&mut self, mut done: impl FnMut(&mut Self, usize)) -> io::Result<u64> {
        let end = self.device_used_idx();
        let count = end.wrapping_sub(self.used_idx);
        if count > self.job.depth {
            return Err(io::Error::other(format!(
                "{count} completions of {} requests",
                self.job.depth
            )));
        }
        let indirect = self.features & feature::INDIRECT != 0;
        while self.used_idx != end {
            let place = self.used + 4 + 8 * usize::from(self.used_idx % self.job.queue_size);
            let id = self.ram.u32(place).load(Ordering::Relaxed) as usize;
            let len = self.ram.u32(place + 4).load(Ordering::Relaxed) as usize;
            let slot = if indirect { id } else { id / 3 };
            let expected = if self.job.op == Op::In { self.job.block + 1 } else { 1 };
            if slot >= usize::from(self.job.depth) || len != expected {
                return Err(io::Error::other(format!(
                    "used element: id {id}, length {len} for {expected}"
                )));
            }
            self.check(slot)?;
            self.used_idx = self.used_idx.wrapping_add(1);
            done(self, slot);
        }
        Ok(u64::from(count))
    }

    fn check(&self, slot: usize) -> io::Result<()> {
        let status = self
            .ram
            .u8(self.slots + slot * SLOT_META + META_STATUS)
            .load(Ordering::Relaxed);
        let sector = self.sectors[slot];
        if status != 0 {
            return Err(io::Error::other(format!("status {status} for sector {sector}")));
        }
        if self.job.verify && self.job.op == Op::In {
            let base = self.data + slot * self.job.block;
            for at in (0..self.job.block).step_by(8) {
                let (found, right) = (
                    self.ram.u64(base + at).load(Ordering::Relaxed),
                    sector + at as u64 / SECTOR,
                );
                if found != right {
                    return Err(io::Error::other(format!(
                        "byte {at} of sector {sector}: {found}, not {right}"
                    )));
                }
            }
        }
        Ok(())
    }

    /// Runs the job and stops the queue. `cpu` is the CPU time that the back end has used so far; what comes back with
    /// the outcome is how much it used in the measured time.
    ///
    /// # Errors
    /// What goes wrong on the way, among it a wrong status, length or content.
    pub fn run(&mut self, cpu: impl Fn() -> io::Result<Option<f64>>) -> io::Result<(Outcome, Option<f64>)> {
        let mut used = None;
        let mut outcome = Outcome {
            latencies: Vec::with_capacity(1 << 20),
            ..Outcome::default()
        };
        let mut now = Instant::now();
        for slot in 0..usize::from(self.job.depth) {
            self.submit(slot, now);
        }
        self.publish(0)?;
        let (warm, mut end) = (now + self.job.warmup, now + self.job.warmup + self.job.time);
        let mut begin: Option<Instant> = None;
        while now < end {
            self.wait()?;
            now = Instant::now();
            let old = self.avail_idx;
            let latencies = &mut outcome.latencies;
            let measuring = begin.is_some();
            let count = self.reap(|driver, slot| {
                // What was on its way while the CPU time was looked up would look slower than it was.
                if begin.is_some_and(|begin| driver.started[slot] >= begin) {
                    let nanos = (now - driver.started[slot]).as_nanos();
                    latencies.push(u32::try_from(nanos).unwrap_or(u32::MAX));
                }
                driver.submit(slot, now);
            })?;
            self.publish(old)?;
            if measuring {
                outcome.requests += count;
            } else if now >= warm {
                used = cpu()?;
                // Looking took its time.
                now = Instant::now();
                begin = Some(now);
                end = now + self.job.time;
                (self.kicks, self.calls) = (0, 0);
            }
        }
        outcome.elapsed = begin.map(|begin| now - begin).unwrap_or_default();
        let used = used.zip(cpu()?).map(|(before, after)| after - before);
        outcome.kicks = self.kicks;
        if self.job.wait == Wait::Polled {
            self.calls = self.call.read().unwrap_or(0);
        }
        outcome.calls = self.calls;
        self.drain()?;
        Ok((outcome, used))
    }

    fn drain(&mut self) -> io::Result<()> {
        while self.used_idx != self.avail_idx {
            self.wait()?;
            self.reap(|_, _| {})?;
        }
        self.connection.get(request::GET_VRING_BASE, &words(&[0, 0]))?;
        Ok(())
    }
}
