// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A block driver on one queue, as small as it gets.
//!
//! It works like a guest driver does: it takes all completions there are, gives each slot its next request, publishes
//! the available index once, and kicks once, if the device asks for it. Between two rounds it either blocks on the
//! call eventfd (`Wait::Eventfd`, an interrupt-driven guest) or looks at the ring (`Wait::Polled`, a polling
//! driver, which also tells the device not to send calls).

use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{fence, Ordering};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use crate::ram::Ram;
use crate::ring::{area_sizes, Areas, Format, Part, Ring, NEXT, WRITE};
use crate::wire::{feature, protocol, request, words, Connection, Inflight};

const SECTOR: u64 = 512;
const HEADER: usize = 16;
const PAGE: usize = 4096;
/// What a slot has beside its data: the indirect table, the header and the status byte, each on lines of its own.
const SLOT_META: usize = 256;
const META_HEADER: usize = 64;
const META_STATUS: usize = 128;

/// Where guest RAM starts in guest-physical addresses: not 0, so that a mix-up of address kinds shows.
const GUEST_BASE: u64 = 0x1_0000_0000;

/// Longest wait for a back end that was lost.
const RECONNECT_TIMEOUT: Duration = Duration::from_secs(20);

/// Longest wait for a completion.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// How completions are noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Block on the call eventfd.
    Eventfd,
    /// Spin on the ring; calls are suppressed.
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
    /// Accept INFLIGHT_SHMFD when offered.
    pub inflight: bool,
    /// Ask for RING_PACKED.
    pub packed: bool,
    /// Ask for IN_ORDER.
    pub in_order: bool,
    /// Seed of the random positions.
    pub seed: u64,
    /// Connect again when the back end is lost, trying at this distance.
    pub reconnect: Option<Duration>,
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

/// What was agreed on with a back end.
struct Terms {
    connection: Connection,
    features: u64,
    protocol: u64,
    capacity: u64,
}

impl Terms {
    /// As QEMU: the memory is asked for once, and handed over before the rings start; a back end that takes another's
    /// place gets what that one had.
    fn track_inflight(&mut self, job: &Job, known: &mut Option<Inflight>) -> io::Result<()> {
        if self.protocol & protocol::INFLIGHT_SHMFD == 0 {
            return Ok(());
        }
        let inflight = match known.take() {
            Some(inflight) => inflight,
            None => self.connection.get_inflight(1, job.queue_size)?,
        };
        self.connection.set_inflight(known.insert(inflight))
    }
}

fn negotiate(mut connection: Connection, job: &Job) -> io::Result<Terms> {
    let offered = connection.get_u64(request::GET_FEATURES)?;
    let mut accepted = 0;
    let mut agreed = 0;
    if offered & feature::PROTOCOL_FEATURES != 0 {
        accepted |= feature::PROTOCOL_FEATURES;
        let mut known = protocol::MQ | protocol::REPLY_ACK | protocol::CONFIG | protocol::STATUS;
        known |= if job.inflight { protocol::INFLIGHT_SHMFD } else { 0 };
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
    for (on, bit, name) in [
        (job.packed, feature::RING_PACKED, "RING_PACKED"),
        (job.in_order, feature::IN_ORDER, "IN_ORDER"),
    ] {
        if on && offered & bit == 0 {
            return Err(io::Error::other(format!("the back end doesn't offer {name}")));
        }
    }
    let wanted = [
        // As every driver does that can flush: without it each write has to be on stable storage when it completes.
        (true, feature::BLK_FLUSH),
        (job.version_1, feature::VERSION_1),
        (job.event_idx, feature::EVENT_IDX),
        (job.indirect, feature::INDIRECT),
        (job.packed, feature::RING_PACKED),
        (job.in_order, feature::IN_ORDER),
    ];
    accepted |= wanted
        .into_iter()
        .fold(0, |sum, (on, bit)| if on { sum | bit } else { sum })
        & offered;
    connection.set_u64(request::SET_FEATURES, accepted)?;
    if agreed & protocol::STATUS != 0 {
        connection.set_u64(request::SET_STATUS, 11)?;
    }
    Ok(Terms {
        connection,
        features: accepted,
        protocol: agreed,
        capacity,
    })
}

/// One line for whoever kills back ends: what happened, and when (CLOCK_MONOTONIC).
fn tell(event: &str) {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: one timespec, ours alone.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    let nanos = now.tv_sec * 1_000_000_000 + now.tv_nsec;
    // Nobody may be listening, which is no reason to stop.
    let _ = writeln!(io::stdout(), "{{\"event\":\"{event}\",\"ns\":{nanos}}}");
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
    /// Requests in flight survive the back end in here.
    inflight: Option<Inflight>,
    areas: Areas,
    ring: Ring,
    slots: usize,
    data: usize,
    /// Slots that were taken in this round.
    done: Vec<usize>,
    /// Slots that are in flight: a request that completes twice is a mistake to be found.
    busy: Vec<bool>,
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
        let mut terms = negotiate(Connection::open_patiently(socket)?, &job)?;
        let mut inflight = None;
        terms.track_inflight(&job, &mut inflight)?;
        let mut driver = Self::lay_out(terms, job)?;
        driver.inflight = inflight;
        driver.start_queue()?;
        Ok(driver)
    }

    /// Connects again to a back end that was lost, trying every `pause`, and goes on where the ring is, as QEMU does with
    /// reconnect-ms.
    fn reconnect(&mut self, socket: &Path, pause: Duration) -> io::Result<()> {
        let end = Instant::now() + RECONNECT_TIMEOUT;
        // An attempt can reach the listener of the process that is just dying, so it fails at any message.
        while let Err(error) = self.resume(socket) {
            if Instant::now() > end {
                return Err(error);
            }
            std::thread::sleep(pause);
        }
        // For what was made available while nobody was there.
        self.kick.write(1)?;
        tell("started");
        Ok(())
    }

    fn resume(&mut self, socket: &Path) -> io::Result<()> {
        let mut terms = negotiate(Connection::open(socket)?, &self.job)?;
        tell("negotiated");
        if (terms.features, terms.protocol) != (self.features, self.protocol) {
            return Err(io::Error::other("the back end offers other features than before"));
        }
        terms.track_inflight(&self.job, &mut self.inflight)?;
        self.connection = terms.connection;
        self.start_queue()
    }

    fn lay_out(terms: Terms, job: Job) -> io::Result<Self> {
        let Terms {
            connection,
            features,
            protocol,
            capacity,
        } = terms;
        let indirect = features & feature::INDIRECT != 0;
        let needed = job.depth * if indirect { 1 } else { 3 };
        if needed > job.queue_size || job.depth == 0 {
            return Err(io::Error::other(format!(
                "depth {} doesn't fit in a queue of {}",
                job.depth, job.queue_size
            )));
        }
        let format = Format {
            size: job.queue_size,
            packed: features & feature::RING_PACKED != 0,
            in_order: features & feature::IN_ORDER != 0,
            event_idx: features & feature::EVENT_IDX != 0,
        };
        let (driver_size, device_size) = area_sizes(format);
        let depth = usize::from(job.depth);
        let driver = 16 * usize::from(job.queue_size);
        let device = (driver + driver_size).next_multiple_of(PAGE);
        let slots = (device + device_size).next_multiple_of(PAGE);
        let data = (slots + depth * SLOT_META).next_multiple_of(PAGE);
        let ram = Ram::new((data + depth * job.block).next_multiple_of(2 << 20))?;
        let areas = Areas {
            desc: 0,
            driver,
            device,
        };
        let address = |place: usize| GUEST_BASE + place as u64;
        let (kind, data_flags) = if job.op == Op::In { (0, WRITE) } else { (1, 0) };
        let requests = (0..depth)
            .map(|slot| {
                let meta = slots + slot * SLOT_META;
                ram.u32(meta + META_HEADER).store(kind, Ordering::Relaxed);
                let part = |place, len: usize, flags| Part {
                    addr: address(place),
                    len: len as u32,
                    flags,
                };
                vec![
                    part(meta + META_HEADER, HEADER, NEXT),
                    part(data + slot * job.block, job.block, NEXT | data_flags),
                    part(meta + META_STATUS, 1, WRITE),
                ]
            })
            .collect();
        let table = |slot: usize| (slots + slot * SLOT_META, address(slots + slot * SLOT_META));
        let tables: Option<&dyn Fn(usize) -> (usize, u64)> = if indirect { Some(&table) } else { None };
        let ring = Ring::new(&ram, areas, format, requests, tables);
        Ok(Self {
            connection,
            ram,
            kick: EventFd::new(EFD_NONBLOCK)?,
            call: EventFd::new(EFD_NONBLOCK)?,
            features,
            protocol,
            capacity,
            inflight: None,
            areas,
            ring,
            slots,
            data,
            done: Vec::with_capacity(depth),
            busy: vec![false; depth],
            kicks: 0,
            calls: 0,
            sectors: vec![0; depth],
            started: vec![Instant::now(); depth],
            random: job.seed | 1,
            job,
        })
    }

    /// Whether the back end notes its requests in memory that outlives it.
    pub fn tracks_inflight(&self) -> bool {
        self.inflight.is_some()
    }

    fn start_queue(&mut self) -> io::Result<()> {
        let user = self.ram.user_address();
        let mut table = words(&[1, 0]);
        for value in [GUEST_BASE, self.ram.len() as u64, user, 0] {
            table.extend_from_slice(&value.to_le_bytes());
        }
        self.ring.ask(&self.ram, self.job.wait == Wait::Polled);
        let connection = &mut self.connection;
        connection.set(request::SET_MEM_TABLE, &table, &[self.ram.fd()])?;
        connection.set_vring(request::SET_VRING_NUM, 0, u32::from(self.job.queue_size))?;
        connection.set_vring(request::SET_VRING_BASE, 0, self.ring.position())?;
        let mut addresses = words(&[0, 0]);
        let Areas { desc, driver, device } = self.areas;
        for place in [desc, device, driver] {
            addresses.extend_from_slice(&(user + place as u64).to_le_bytes());
        }
        addresses.extend_from_slice(&[0; 8]);
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

    /// Fills a slot with its next request and puts it on the ring; `publish` makes it known.
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
        self.busy[slot] = true;
        self.ring.push(&self.ram, slot);
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

    /// Shows the device what was submitted, and kicks when it wants that.
    fn publish(&mut self) -> io::Result<()> {
        if self.ring.publish(&self.ram) {
            self.kick.write(1)?;
            self.kicks += 1;
        }
        Ok(())
    }

    /// Waits until there is a completion.
    fn wait(&mut self) -> io::Result<()> {
        loop {
            self.ring.ask(&self.ram, self.job.wait == Wait::Polled);
            // The request for a call before the look at the ring.
            fence(Ordering::SeqCst);
            if self.ring.has_used(&self.ram) {
                return Ok(());
            }
            if self.job.wait == Wait::Eventfd {
                self.wait_for_call()?;
            } else {
                while !self.ring.has_used(&self.ram) {
                    std::hint::spin_loop();
                }
            }
        }
    }

    /// Blocks until the call eventfd is written, or the back end is gone. poll and read rather than a blocking read: the
    /// flag that makes an eventfd non-blocking belongs to both ends, and some back ends set it.
    fn wait_for_call(&mut self) -> io::Result<()> {
        let entry = |fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        let mut poll = [entry(self.call.as_raw_fd()), entry(self.connection.as_raw_fd())];
        // Looking at one fd is a little cheaper, and what counts when time does.
        let count = if self.job.reconnect.is_some() { 2 } else { 1 };
        let limit = CALL_TIMEOUT.as_millis() as libc::c_int;
        // SAFETY: at least `count` pollfds, ours alone.
        match unsafe { libc::poll(poll.as_mut_ptr(), count, limit) } {
            0 => Err(io::Error::other(format!("no call for {} s", CALL_TIMEOUT.as_secs()))),
            n if n < 0 => Err(io::Error::last_os_error()),
            _ if poll[0].revents != 0 => {
                self.calls += self.call.read()?;
                Ok(())
            }
            // Nothing is sent unasked on it.
            _ => Err(io::ErrorKind::ConnectionReset.into()),
        }
    }

    /// Takes the completions there are; `done` has their slots afterwards. Nothing is submitted meanwhile: in a packed
    /// ring that would be seen at once, and there might be no end.
    fn reap(&mut self) -> io::Result<()> {
        self.done.clear();
        self.ring.look(&self.ram)?;
        let expected = if self.job.op == Op::In { self.job.block + 1 } else { 1 };
        while let Some((slot, len)) = self.ring.pop(&self.ram)? {
            if len.is_some_and(|len| len as usize != expected) {
                return Err(io::Error::other(format!(
                    "used element: slot {slot}, length {len:?} for {expected}"
                )));
            }
            if !std::mem::take(&mut self.busy[slot]) {
                return Err(io::Error::other(format!("request {slot} completed twice")));
            }
            self.check(slot)?;
            self.done.push(slot);
        }
        Ok(())
    }

    /// Gives the slots that were taken their next requests.
    fn refill(&mut self, now: Instant, begin: Option<Instant>, latencies: &mut Vec<u32>) -> io::Result<()> {
        for at in 0..self.done.len() {
            let slot = self.done[at];
            // What was on its way while the CPU time was looked up would look slower than it was.
            if begin.is_some_and(|begin| self.started[slot] >= begin) {
                let nanos = (now - self.started[slot]).as_nanos();
                latencies.push(u32::try_from(nanos).unwrap_or(u32::MAX));
            }
            self.submit(slot, now);
        }
        self.publish()
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
    pub fn run(
        &mut self,
        socket: &Path,
        cpu: impl Fn() -> io::Result<Option<f64>>,
    ) -> io::Result<(Outcome, Option<f64>)> {
        let mut used = None;
        let mut outcome = Outcome {
            latencies: Vec::with_capacity(1 << 20),
            ..Outcome::default()
        };
        let mut now = Instant::now();
        for slot in 0..usize::from(self.job.depth) {
            self.submit(slot, now);
        }
        self.publish()?;
        let (warm, mut end) = (now + self.job.warmup, now + self.job.warmup + self.job.time);
        let mut begin: Option<Instant> = None;
        let mut resumed = false;
        while now < end {
            match (self.wait(), self.job.reconnect) {
                (Err(error), Some(pause)) if error.kind() == io::ErrorKind::ConnectionReset => {
                    tell("lost");
                    // What it completed last, it may not have called for; the next one goes on behind that.
                    self.reap()?;
                    self.refill(Instant::now(), begin, &mut outcome.latencies)?;
                    self.reconnect(socket, pause)?;
                    resumed = true;
                    continue;
                }
                (result, _) => result?,
            }
            now = Instant::now();
            let measuring = begin.is_some();
            self.reap()?;
            if std::mem::take(&mut resumed) {
                tell("completed");
            }
            self.refill(now, begin, &mut outcome.latencies)?;
            if measuring {
                outcome.requests += self.done.len() as u64;
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
        while self.ring.in_flight() > 0 {
            self.wait()?;
            self.reap()?;
        }
        self.connection.get(request::GET_VRING_BASE, &words(&[0, 0]))?;
        Ok(())
    }
}
