// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The two views of a member's registers (design D1): the legacy common configuration (virtio 1.4, 4.1.4.10) and
//! struct virtio_pci_common_cfg (4.1.4.3). They are lenses on one state: what is written through one is read through the
//! other.
//!
//! A driver is a legacy driver as long as it hasn't accepted VERSION_1. Its queues run from the first notification or
//! DRIVER_OK on, whichever comes first, with whatever features it has written by then; those of a modern driver run from
//! DRIVER_OK on.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::Arc;

use super::{feature, status, Front, Member, Progress, Queue, Registers, Run, KICK_ISR, NO_VECTOR, QUEUE_ISR};
use crate::error::{Error, Result};
use crate::event::{Completion, Event, Waker};
use crate::ring::split::{area_sizes, RingAddresses};
use crate::ring::MAX_QUEUE_SIZE;
use crate::runner::ring_features;
use crate::sys;
use crate::worker::SourceHandle;

/// Bytes of the legacy common configuration without MSI-X.
pub const LEGACY_SIZE: usize = 20;
/// Bytes of it with MSI-X enabled.
pub const LEGACY_MSIX_SIZE: usize = 24;
/// Bytes of struct virtio_pci_common_cfg.
pub const COMMON_SIZE: usize = 64;

/// "The driver doesn't negotiate": probed for by drivers, never to be offered.
const BAD_FEATURE: u64 = 1 << 30;
/// Feature bits a legacy driver can see.
const LEGACY_BITS: u64 = 0xffff_ffff;
/// Bits that only the legacy view has.
const LEGACY_ONLY: u64 = feature::NOTIFY_ON_EMPTY | feature::ANY_LAYOUT;

/// A register of the legacy common configuration.
pub struct LegacyRegister {
    /// Name in the specification.
    pub name: &'static str,
    /// First byte.
    pub offset: usize,
    /// Bytes.
    pub size: usize,
}

const fn register(name: &'static str, offset: usize, size: usize) -> LegacyRegister {
    LegacyRegister { name, offset, size }
}

/// The legacy common configuration; the last two are there while MSI-X is enabled.
pub const LEGACY_REGISTERS: [LegacyRegister; 10] = [
    register("device_features", 0, 4),
    register("driver_features", 4, 4),
    register("queue_address", 8, 4),
    register("queue_size", 12, 2),
    register("queue_select", 14, 2),
    register("queue_notify", 16, 2),
    register("device_status", 18, 1),
    register("isr_status", 19, 1),
    register("config_msix_vector", 20, 2),
    register("queue_msix_vector", 22, 2),
];

/// Fields of struct virtio_pci_common_cfg: name, first byte, bytes.
const COMMON_FIELDS: [(usize, usize); 18] = [
    (0, 4),
    (4, 4),
    (8, 4),
    (12, 4),
    (16, 2),
    (18, 2),
    (20, 1),
    (21, 1),
    (22, 2),
    (24, 2),
    (26, 2),
    (28, 2),
    (30, 2),
    (32, 8),
    (40, 8),
    (48, 8),
    (56, 2),
    (58, 2),
];

/// Why a legacy access is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// It doesn't lie inside one field of the region.
    Field,
    /// A vhost-user front end has the member; only reads are served then (design D1).
    Busy,
    /// The member can't be driven by legacy drivers.
    NotLegacy,
}

/// The register that an access lies in as a whole.
pub fn legacy_register(offset: usize, len: usize, msix_enabled: bool) -> Option<&'static LegacyRegister> {
    let size = if msix_enabled { LEGACY_MSIX_SIZE } else { LEGACY_SIZE };
    let end = offset.checked_add(len)?;
    if len == 0 || end > size {
        return None;
    }
    LEGACY_REGISTERS
        .iter()
        .find(|register| register.offset <= offset && end <= register.offset + register.size)
}

/// Addresses of a ring in the legacy layout (2.7.2): all from its page frame number.
pub fn legacy_layout(pfn: u32, size: u16) -> RingAddresses {
    let desc = u64::from(pfn) << 12;
    let (table, available, _) = area_sizes(size);
    // At most 44 bits and 2^20 bytes: no sum can wrap.
    let driver = desc + table;
    RingAddresses {
        desc,
        driver,
        device: (driver + available).next_multiple_of(4096),
    }
}

impl Registers {
    /// Whether the driver has accepted VERSION_1.
    fn modern(&self) -> bool {
        self.driver_features & feature::VERSION_1 != 0
    }

    /// Whether the registers let a ring of a PCI function run. Indices from `doorbells` on have no ring.
    pub(super) fn may_start(&self, index: u64, doorbells: u64) -> bool {
        if self.stopped || self.draining || self.resetting.is_some() {
            return false;
        }
        let queue = usize::try_from(index).ok().and_then(|index| self.queues.get(index));
        queue.is_some_and(|queue| {
            let driver_ok = self.status & status::DRIVER_OK != 0;
            if index >= doorbells {
                return driver_ok;
            }
            // A modern driver's rings are left alone before DRIVER_OK, whatever it does.
            let early = queue.by_pfn && queue.notified && !self.modern();
            queue.active && !queue.resetting && (driver_ok || early)
        })
    }

    fn selected(&mut self) -> Option<&mut Queue> {
        self.queues.get_mut(usize::from(self.queue_select))
    }

    fn status_value(&self) -> u8 {
        self.resetting.unwrap_or(self.status)
    }
}

/// Copies an access's part out of a field.
fn slice_out(value: &[u8], skip: usize, data: &mut [u8]) {
    if let Some(part) = value.get(skip..skip + data.len()) {
        data.copy_from_slice(part);
    }
}

fn u16_of(bytes: &[u8]) -> u16 {
    let mut word = [0; 2];
    word.copy_from_slice(&bytes[..2]);
    u16::from_le_bytes(word)
}

fn u32_of(bytes: &[u8]) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[..4]);
    u32::from_le_bytes(word)
}

fn u64_of(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[..8]);
    u64::from_le_bytes(word)
}

impl Member {
    // --- the client of a PCI function ---------------------------------------------------------------------

    /// Takes the member for a client of a PCI function. `line` is woken when there are interrupts to send
    /// (`take_signals`).
    ///
    /// # Errors
    /// [`Error::Busy`].
    pub fn attach_function(&self, kind: Front, line: SourceHandle) -> Result<()> {
        let mut registers = self.lock();
        if registers.closed {
            return Err(Error::Busy(self.id(), "it is being removed"));
        }
        if registers.draining {
            return Err(Error::Busy(
                self.id(),
                "requests of the last front end are still in flight",
            ));
        }
        if registers.attached {
            return Err(Error::Busy(self.id(), "another front end is attached"));
        }
        if !registers.stopped {
            // Its owner may have written registers with nobody attached (of a stopped device on purpose: device parts).
            self.forget(&mut registers);
        }
        registers.attached = true;
        registers.front = Some(kind);
        registers.connections += 1;
        registers.lines.client = Some(line);
        registers.lines.vectors = vec![None; usize::from(self.vectors)];
        self.device.fresh();
        Ok(())
    }

    /// The client is gone: rings stop, then everything is as after power-up, and `done` ends.
    pub fn detach_function(self: &Arc<Self>, done: Completion) {
        self.with(|registers, last| {
            if !matches!(registers.front, Some(front) if front != Front::VhostUser) {
                *last = Some(done);
                return;
            }
            registers.draining = true;
            registers.lines.client = None;
            let member = Arc::clone(self);
            let done = Completion::call(move || {
                member.finish_detach();
                member.owner().mend();
                member.was_reset();
                drop(done);
            });
            for queue in &mut registers.queues {
                queue.stop(|| done.clone());
            }
            *last = Some(done);
        });
    }

    /// Size of the MSI-X table; 0: the function has no MSI-X.
    pub fn vectors(&self) -> u16 {
        self.vectors
    }

    /// Queues of the device, administration virtqueues, and indices that are notified like queues.
    pub fn queue_count(&self) -> u16 {
        let admin = self.admin.as_ref().map_or(0, |admin| admin.count);
        self.device.queues() + self.device.doorbells().map_or(admin, |doorbells| doorbells.count())
    }

    /// Whether packed rings are offered.
    pub fn packed(&self) -> bool {
        self.packed
    }

    /// The MSI-X enable bit of the function.
    pub fn set_msix_enabled(&self, on: bool) {
        let mut registers = self.lock();
        if registers.lines.msix_enabled != on {
            registers.lines.msix_enabled = on;
            self.rewire(&registers, |_| true);
        }
    }

    /// The MSI-X enable bit.
    pub fn msix_enabled(&self) -> bool {
        self.lock().lines.msix_enabled
    }

    /// The eventfd of an MSI-X vector; one beyond the table is ignored.
    pub fn set_msix_vector(&self, vector: u16, fd: Option<Arc<OwnedFd>>) {
        let mut registers = self.lock();
        if let Some(slot) = registers.lines.vectors.get_mut(usize::from(vector)) {
            *slot = fd;
            self.rewire(&registers, |queue| queue.vector == vector);
        }
    }

    /// The eventfd of INTx.
    pub fn set_intx(&self, fd: Option<Arc<OwnedFd>>) {
        let mut registers = self.lock();
        registers.lines.intx = fd;
        if !registers.lines.msix_enabled {
            self.rewire(&registers, |_| true);
        }
    }

    /// Whether INTx is asserted: the interrupt handler hasn't read the ISR status yet.
    pub fn intx_pending(&self) -> bool {
        let registers = self.lock();
        !registers.lines.msix_enabled && registers.lines.isr.load(Ordering::Relaxed) != 0
    }

    /// What an interrupt of a queue, or of a doorbell's index, sets in the ISR status.
    fn isr_bits(&self, index: usize) -> u8 {
        if self.is_doorbell(index as u64) {
            KICK_ISR
        } else {
            QUEUE_ISR
        }
    }

    /// Tells running rings where their interrupts go now.
    fn rewire(&self, registers: &Registers, which: impl Fn(&Queue) -> bool) {
        for (index, queue) in registers.queues.iter().enumerate().filter(|(_, queue)| which(queue)) {
            if let Some(handle) = queue.running() {
                handle.rewire(registers.lines.call(queue.vector, self.isr_bits(index)));
            }
        }
    }

    /// Moves interrupts that the client's connection is to send to `to`.
    pub fn take_signals(&self, to: &mut Vec<Arc<OwnedFd>>) {
        to.append(&mut self.lock().lines.signals);
    }

    /// Has INTx signalled once more if it is still asserted (the client has unmasked it).
    pub fn intx_again(&self) {
        let mut registers = self.lock();
        let lines = &mut registers.lines;
        if !lines.msix_enabled && lines.isr.load(Ordering::Relaxed) != 0 {
            lines.signals.extend(lines.intx.clone());
        }
    }

    /// The device configuration has changed, or the device needs a reset: tells the driver. False when there is none to be
    /// told, or it isn't ready to be.
    pub fn config_changed(&self) -> bool {
        let mut registers = self.lock();
        registers.config_generation = registers.config_generation.wrapping_add(1);
        Self::tell_config(&mut registers)
    }

    fn tell_config(registers: &mut Registers) -> bool {
        let function = matches!(registers.front, Some(front) if front != Front::VhostUser);
        if !function || registers.status & status::DRIVER_OK == 0 {
            return false;
        }
        if registers.stopped {
            // When it goes on.
            registers.config_pending = true;
            return false;
        }
        let vector = registers.config_vector;
        let lines = &mut registers.lines;
        // Before the notification, with MSI-X too (4.1.4.5.1).
        lines.isr.fetch_or(2, Ordering::Release);
        let fd = if lines.msix_enabled {
            lines.vector(vector)
        } else {
            lines.intx.clone()
        };
        lines.signals.extend(fd);
        if let Some(client) = &lines.client {
            client.wake();
        }
        true
    }

    // --- both views ---------------------------------------------------------------------------------------

    /// Features offered to drivers of a PCI function, legacy ones aside.
    pub(super) fn function_features(&self, registers: &Registers) -> u64 {
        let mut offered = self.device.features()
            | feature::INDIRECT_DESC
            | feature::EVENT_IDX
            | feature::VERSION_1
            | feature::RING_RESET;
        offered |= self.ring_formats();
        if self.admin.is_some() {
            offered |= feature::SR_IOV | feature::ADMIN_VQ;
        }
        offered & registers.assigned.unwrap_or(u64::MAX)
    }

    /// Features offered through the legacy view.
    pub(super) fn legacy_features(&self, registers: &Registers) -> u64 {
        let ring = feature::INDIRECT_DESC | feature::EVENT_IDX | feature::NOTIFY_ON_EMPTY;
        let offered = (self.device.features() | ring) & registers.assigned.unwrap_or(u64::MAX);
        (offered & LEGACY_BITS) | feature::ANY_LAYOUT
    }

    /// All features that this member could be assigned.
    pub fn manageable_features(&self) -> u64 {
        let ring = feature::INDIRECT_DESC | feature::EVENT_IDX | feature::VERSION_1 | feature::RING_RESET;
        let packed = self.ring_formats();
        let legacy = if self.legacy() { LEGACY_ONLY } else { 0 };
        self.device.known_features() | ring | packed | legacy
    }

    /// The features its owner lets it offer; None: all that it has.
    pub fn assigned_features(&self) -> Option<u64> {
        self.lock().assigned
    }

    /// Restricts the features it offers. False when a driver has noticed the device already.
    pub fn assign_features(&self, mask: u64) -> bool {
        let mut registers = self.lock();
        if registers.front == Some(Front::VhostUser) || registers.status_value() & status::ACKNOWLEDGE != 0 {
            return false;
        }
        registers.assigned = Some(mask);
        true
    }

    /// Bytes of the device configuration.
    pub fn config_size(&self) -> usize {
        self.device.config_size()
    }

    /// Bytes of the device configuration in the legacy view.
    pub fn legacy_config_size(&self) -> usize {
        self.device.legacy_config_size()
    }

    /// Reads the device configuration, any bytes of it; beyond its end they are 0.
    pub fn config_read(&self, offset: usize, data: &mut [u8]) {
        self.device.read_config(offset, data);
    }

    /// Writes the device configuration. What can't be written is left alone.
    pub fn config_write(&self, offset: usize, data: &[u8]) {
        match self.device.write_config(offset, data) {
            Ok(true) => self.pool.events().push(Event::Config { member: self.id() }),
            Ok(false) => {}
            Err(fault) => log::debug!("member {}: configuration write ignored: {fault}", self.id()),
        }
    }

    /// Reads and clears the ISR status.
    pub fn isr_read(&self) -> u8 {
        self.lock().lines.isr.swap(0, Ordering::AcqRel)
    }

    /// The driver has made buffers available in a queue. Queues that don't exist are ignored, and so are those of a stopped
    /// device: their rings are looked at when they start.
    pub fn notify(&self, index: u16) {
        let mut registers = self.lock();
        if registers.front == Some(Front::VhostUser) {
            return;
        }
        let Registers { queues, lines, .. } = &mut *registers;
        let Some(queue) = queues.get_mut(usize::from(index)) else {
            return;
        };
        if let Some(doorbells) = self.device.doorbells().filter(|_| self.is_doorbell(index.into())) {
            if queue.running().is_some() {
                // The client's connection, on which this came, sends them when it is done with the message.
                doorbells.ring(index - self.device.queues(), &mut lines.signals);
            }
            return;
        }
        if let (Run::Running(_), Some(bell)) = (&queue.run, &queue.bell) {
            sys::eventfd_signal(bell);
            return;
        }
        if !queue.notified {
            queue.notified = true;
            self.start_ready(&mut registers);
        }
    }

    /// Function-level reset: everything as after power-up, but for the client and its memory.
    pub fn reset_now(self: &Arc<Self>, wake: &dyn Fn() -> Waker) -> Progress {
        self.device.fresh();
        let progress = self.with(|registers, last| {
            if registers.front == Some(Front::VhostUser) {
                return Progress::Done;
            }
            self.reset_registers(registers, last, wake)
        });
        self.was_reset();
        progress
    }

    fn was_reset(&self) {
        if let Some(on_reset) = self.on_reset.get() {
            on_reset();
        }
    }

    /// Registers are cleared at once; the status reads as before until the rings have stopped.
    fn reset_registers(
        self: &Arc<Self>,
        registers: &mut Registers,
        last: &mut Option<Completion>,
        wake: &dyn Fn() -> Waker,
    ) -> Progress {
        let before = registers.status_value();
        self.stop_function(registers, last, wake, |_, _| true);
        // What rings still finish isn't to be seen in the ISR status of the next driver.
        registers.lines.isr = Arc::default();
        self.set_status_register(registers, 0);
        registers.driver_features = 0;
        registers.features_written = false;
        self.device.reset();
        self.clear_function(registers);
        if last.is_none() {
            self.owner.mend();
            return Progress::Done;
        }
        registers.resetting = Some(before);
        Progress::Later
    }

    /// Tells rings to stop; when they have, `stopped` is called, and then the waker.
    fn stop_function(
        self: &Arc<Self>,
        registers: &mut Registers,
        last: &mut Option<Completion>,
        wake: &dyn Fn() -> Waker,
        which: impl Fn(usize, &Queue) -> bool,
    ) {
        for index in 0..registers.queues.len() {
            let queue = &mut registers.queues[index];
            if !which(index, queue) || matches!(queue.run, Run::Stopped) {
                continue;
            }
            if last.is_none() {
                let member = Arc::clone(self);
                let wake = wake();
                *last = Some(Completion::call(move || {
                    member.rings_stopped();
                    wake();
                }));
            }
            let Some(done) = last else { continue };
            // Each ring by itself reports that it has stopped: others may be told to stop, and take longer.
            let member = Arc::downgrade(self);
            let after = done.clone();
            let starts = queue.starts;
            queue.stop(|| {
                Completion::call(move || {
                    if let Some(member) = member.upgrade() {
                        member.ring_stopped(index, starts);
                    }
                    drop(after);
                })
            });
        }
    }

    fn ring_stopped(&self, index: usize, starts: u64) {
        let mut registers = self.lock();
        // Of this ring, not of one that was started in its place.
        if let Some(queue) = registers.queues.get_mut(index).filter(|queue| queue.starts == starts) {
            queue.collect();
            if queue.resetting {
                let size = queue.size;
                queue.clear(size);
            }
        }
        self.end_reset(&mut registers);
    }

    /// A reset is over with the last ring; at once, since others may ask before those who wait are told.
    fn end_reset(&self, registers: &mut Registers) {
        let stopping = |queue: &Queue| matches!(queue.run, Run::Stopping(_));
        if registers.resetting.is_some() && !registers.draining && !registers.queues.iter().any(stopping) {
            // Once more: an administration queue may have executed commands until it stopped.
            self.was_reset();
            registers.resetting = None;
            self.owner.mend();
        }
    }

    /// Rings that were told to stop have.
    fn rings_stopped(&self) {
        let mut registers = self.lock();
        if registers.draining {
            return;
        }
        self.end_reset(&mut registers);
        self.start_ready(&mut registers);
    }

    /// Stops the device for its owner (DEV_MODE_SET): what its rings have taken is finished, and they are left alone until
    /// `resume_device`.
    pub fn stop_device(self: &Arc<Self>, wake: &dyn Fn() -> Waker) -> Progress {
        self.with(|registers, last| {
            registers.stopped = true;
            self.stop_function(registers, last, wake, |_, _| true);
            if last.is_some() {
                Progress::Later
            } else {
                Progress::Done
            }
        })
    }

    /// Lets the device go on.
    pub fn resume_device(&self) {
        let mut registers = self.lock();
        registers.stopped = false;
        if std::mem::take(&mut registers.config_pending) {
            Self::tell_config(&mut registers);
        }
        self.start_ready(&mut registers);
    }

    /// Whether it was stopped by its owner.
    pub fn stopped(&self) -> bool {
        self.lock().stopped
    }

    /// Whether a vhost-user front end is attached.
    pub fn vhost_user_attached(&self) -> bool {
        self.lock().front == Some(Front::VhostUser)
    }

    pub(super) fn broken_bit(&self) -> u8 {
        if self.owner.is_broken() {
            status::NEEDS_RESET
        } else {
            0
        }
    }

    /// A vector as it can be mapped.
    fn mapped(&self, vector: u16) -> u16 {
        if vector < self.vectors {
            vector
        } else {
            NO_VECTOR
        }
    }

    fn set_queue_vector(&self, registers: &mut Registers, vector: u16) {
        let doorbells = self
            .device
            .doorbells()
            .filter(|_| self.is_doorbell(registers.queue_select.into()));
        let silent = doorbells.is_some_and(|it| !it.interrupts(registers.queue_select - self.device.queues()));
        let vector = if silent { NO_VECTOR } else { self.mapped(vector) };
        if let Some(queue) = registers.selected() {
            if queue.vector == vector {
                return;
            }
            queue.vector = vector;
            let select = registers.queue_select;
            let call = registers.lines.call(vector, self.isr_bits(usize::from(select)));
            if let Some(handle) = registers.queues[usize::from(select)].running() {
                handle.rewire(call);
            }
        }
    }

    /// Features that the driver accepts take effect in running rings: a legacy driver may write them late.
    fn take_features(&self, registers: &mut Registers, features: u64) {
        let old = std::mem::replace(&mut registers.driver_features, features);
        registers.features_written = true;
        if ring_features(old) != ring_features(features) || old != features {
            for handle in registers.queues.iter().filter_map(Queue::running) {
                handle.set_features(features, Completion::call(|| {}));
            }
        }
    }

    // --- the legacy view ----------------------------------------------------------------------------------

    fn legacy_access(&self, registers: &Registers, write: bool) -> std::result::Result<(), Refused> {
        if !self.legacy() {
            return Err(Refused::NotLegacy);
        }
        if write && registers.front == Some(Front::VhostUser) {
            return Err(Refused::Busy);
        }
        Ok(())
    }

    fn legacy_value(&self, registers: &mut Registers, offset: usize) -> u32 {
        match offset {
            0 => self.legacy_features(registers) as u32,
            4 => registers.driver_features as u32,
            8 => registers
                .selected()
                .filter(|queue| queue.active)
                .and_then(|queue| queue.addresses)
                .map_or(0, |addresses| (addresses.desc >> 12) as u32),
            12 => registers.selected().map_or(0, |queue| u32::from(queue.size)),
            14 => u32::from(registers.queue_select),
            18 => u32::from(registers.status_value() | self.broken_bit()),
            20 => u32::from(registers.config_vector),
            22 => u32::from(registers.selected().map_or(NO_VECTOR, |queue| queue.vector)),
            _ => 0,
        }
    }

    /// Reads the legacy common configuration, as LEGACY_COMMON_CFG_READ does: little-endian, inside one register.
    ///
    /// # Errors
    /// [`Refused::Field`], [`Refused::NotLegacy`]; nothing has changed then.
    pub fn legacy_read(&self, offset: usize, data: &mut [u8]) -> std::result::Result<(), Refused> {
        let mut registers = self.lock();
        self.legacy_access(&registers, false)?;
        let msix = registers.lines.msix_enabled;
        let register = legacy_register(offset, data.len(), msix).ok_or(Refused::Field)?;
        let value = match register.offset {
            19 => u32::from(registers.lines.isr.swap(0, Ordering::AcqRel)),
            // Administration queues are not seen by legacy drivers, nor is a queue beyond the device's.
            12 if registers.queue_select >= self.device.queues() => 0,
            at => self.legacy_value(&mut registers, at),
        };
        slice_out(&value.to_le_bytes(), offset - register.offset, data);
        Ok(())
    }

    /// Writes the legacy common configuration, as LEGACY_COMMON_CFG_WRITE does: little-endian, inside one register. A
    /// register that is written in pieces takes effect with its last byte. `pfn_zero_resets`: a PFN of 0 resets the whole
    /// device, as QEMU has it.
    ///
    /// # Errors
    /// [`Refused`]; nothing has changed then.
    pub fn legacy_write(
        self: &Arc<Self>,
        offset: usize,
        data: &[u8],
        pfn_zero_resets: bool,
        wake: &dyn Fn() -> Waker,
    ) -> std::result::Result<Progress, Refused> {
        let mut notify = None;
        let mut reset = false;
        let progress = self.with(|registers, last| {
            self.legacy_access(registers, true)?;
            let msix = registers.lines.msix_enabled;
            let register = legacy_register(offset, data.len(), msix).ok_or(Refused::Field)?;
            let (at, size) = (register.offset, register.size);
            let mut bytes = [0; 4];
            if data.len() == size {
                bytes[..size].copy_from_slice(data);
            } else {
                if offset == at {
                    let now = self.legacy_value(registers, at).to_le_bytes();
                    registers.latch[at..at + size].copy_from_slice(&now[..size]);
                }
                registers.latch[offset..offset + data.len()].copy_from_slice(data);
                if offset + data.len() < at + size {
                    return Ok(Progress::Done);
                }
                bytes[..size].copy_from_slice(&registers.latch[at..at + size]);
            }
            let value = u32::from_le_bytes(bytes);
            match at {
                4 => {
                    let wanted = u64::from(value);
                    let accepted = if wanted & BAD_FEATURE != 0 {
                        // It hasn't looked at what is offered.
                        0
                    } else {
                        wanted & self.legacy_features(registers)
                    };
                    self.take_features(registers, accepted);
                }
                8 => {
                    if value == 0 && pfn_zero_resets {
                        reset = true;
                        return Ok(self.reset_registers(registers, last, wake));
                    }
                    return Ok(self.write_pfn(registers, last, value, wake));
                }
                14 => registers.queue_select = value as u16,
                16 => notify = Some(value as u16),
                18 if value == 0 => {
                    reset = true;
                    return Ok(self.reset_registers(registers, last, wake));
                }
                18 => self.write_status(registers, value as u8),
                20 => registers.config_vector = self.mapped(value as u16),
                22 => self.set_queue_vector(registers, value as u16),
                // Read-only.
                _ => {}
            }
            Ok(Progress::Done)
        })?;
        if let Some(queue) = notify {
            self.notify(queue);
        }
        if reset {
            self.was_reset();
        }
        Ok(progress)
    }

    fn write_pfn(
        self: &Arc<Self>,
        registers: &mut Registers,
        last: &mut Option<Completion>,
        pfn: u32,
        wake: &dyn Fn() -> Waker,
    ) -> Progress {
        let select = usize::from(registers.queue_select);
        if select >= usize::from(self.device.queues()) {
            return Progress::Done;
        }
        let running = match registers.queues[select].run {
            Run::Stopped => false,
            Run::Running(_) => true,
            // By a reset: its driver goes on, and this ring starts when the old one has ended.
            Run::Stopping(_) => registers.resetting.is_none(),
        };
        if running {
            self.stop_function(registers, last, wake, |index, _| index == select);
        }
        let Some(queue) = registers.queues.get_mut(select) else {
            return Progress::Done;
        };
        queue.discard = !matches!(queue.run, Run::Stopped);
        queue.position = None;
        queue.from_used = false;
        queue.notified = false;
        queue.by_pfn = pfn != 0;
        queue.active = pfn != 0;
        queue.addresses = (pfn != 0).then(|| legacy_layout(pfn, queue.size));
        if running {
            return Progress::Later;
        }
        self.start_ready(registers);
        Progress::Done
    }

    fn write_status(&self, registers: &mut Registers, value: u8) {
        self.set_status_register(registers, value & !status::NEEDS_RESET);
        if value & status::DRIVER_OK != 0 {
            self.start_ready(registers);
        }
    }

    /// Checks an access to the device configuration in the legacy view.
    fn config_field(&self, offset: usize, len: usize) -> std::result::Result<(), Refused> {
        let end = offset.checked_add(len).ok_or(Refused::Field)?;
        if len == 0 || end > self.device.legacy_config_size() {
            return Err(Refused::Field);
        }
        let inside = |field: &crate::device::ConfigField| field.offset <= offset && end <= field.offset + field.size;
        if self.device.config_fields().iter().any(inside) {
            Ok(())
        } else {
            Err(Refused::Field)
        }
    }

    /// Reads the device configuration, as LEGACY_DEV_CFG_READ does: inside one field.
    ///
    /// # Errors
    /// [`Refused::Field`], [`Refused::NotLegacy`].
    pub fn legacy_config_read(&self, offset: usize, data: &mut [u8]) -> std::result::Result<(), Refused> {
        self.legacy_access(&self.lock(), false)?;
        self.config_field(offset, data.len())?;
        self.device.read_config(offset, data);
        Ok(())
    }

    /// Writes the device configuration, as LEGACY_DEV_CFG_WRITE does: inside one field.
    ///
    /// # Errors
    /// [`Refused`]; nothing has changed then.
    pub fn legacy_config_write(&self, offset: usize, data: &[u8]) -> std::result::Result<(), Refused> {
        self.legacy_access(&self.lock(), true)?;
        self.config_field(offset, data.len())?;
        self.config_write(offset, data);
        Ok(())
    }

    // --- the modern view ----------------------------------------------------------------------------------

    /// Reads struct virtio_pci_common_cfg, any bytes of it; beyond its end they are 0. Reading changes nothing.
    pub fn modern_read(&self, offset: usize, data: &mut [u8]) {
        let mut registers = self.lock();
        let common = self.common(&mut registers);
        data.fill(0);
        if let Some(tail) = common.get(offset..) {
            let n = tail.len().min(data.len());
            data[..n].copy_from_slice(&tail[..n]);
        }
    }

    pub(super) fn common(&self, registers: &mut Registers) -> [u8; COMMON_SIZE] {
        let window = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            // No feature beyond 63 is known here.
            _ => 0,
        };
        let mut common = [0; COMMON_SIZE];
        let mut put = |offset: usize, bytes: &[u8]| common[offset..offset + bytes.len()].copy_from_slice(bytes);
        let offered = self.function_features(registers);
        put(0, &registers.device_feature_select.to_le_bytes());
        put(4, &window(offered, registers.device_feature_select).to_le_bytes());
        put(8, &registers.driver_feature_select.to_le_bytes());
        put(
            12,
            &window(registers.driver_features, registers.driver_feature_select).to_le_bytes(),
        );
        put(16, &registers.config_vector.to_le_bytes());
        put(18, &self.device.queues().to_le_bytes());
        put(
            20,
            &[
                registers.status_value() | self.broken_bit(),
                registers.config_generation,
            ],
        );
        put(22, &registers.queue_select.to_le_bytes());
        let select = registers.queue_select;
        let doorbell = self.is_doorbell(select.into());
        match registers.selected() {
            // No ring: it is there to be notified, and for its vector (virtio-vhost-user v5).
            Some(queue) if doorbell => {
                put(26, &queue.vector.to_le_bytes());
                put(30, &select.to_le_bytes());
                put(56, &select.to_le_bytes());
            }
            Some(queue) => {
                let addresses = queue.addresses.unwrap_or_default();
                put(24, &queue.size.to_le_bytes());
                put(26, &queue.vector.to_le_bytes());
                put(28, &u16::from(queue.active).to_le_bytes());
                put(30, &select.to_le_bytes());
                put(32, &addresses.desc.to_le_bytes());
                put(40, &addresses.driver.to_le_bytes());
                put(48, &addresses.device.to_le_bytes());
                put(56, &select.to_le_bytes());
                put(58, &u16::from(queue.resetting).to_le_bytes());
            }
            None => put(26, &NO_VECTOR.to_le_bytes()),
        }
        if let Some(admin) = &self.admin {
            // Right behind the device's queues: Linux up to 7.1 expects it there when it uses INTx.
            put(60, &self.device.queues().to_le_bytes());
            put(62, &admin.count.to_le_bytes());
        }
        common
    }

    /// Writes struct virtio_pci_common_cfg, any bytes of it: fields that are written in part keep the rest. What is
    /// read-only, or beyond its end, is left alone.
    pub fn modern_write(self: &Arc<Self>, offset: usize, data: &[u8], wake: &dyn Fn() -> Waker) -> Progress {
        let mut reset = false;
        let progress = self.with(|registers, last| {
            if registers.front == Some(Front::VhostUser) {
                return Progress::Done;
            }
            let Some(end) = offset.checked_add(data.len()) else {
                return Progress::Done;
            };
            let mut progress = Progress::Done;
            for &(start, size) in &COMMON_FIELDS {
                let (from, to) = (start.max(offset), (start + size).min(end));
                if from >= to {
                    continue;
                }
                let mut bytes = [0; 8];
                bytes[..size].copy_from_slice(&self.common(registers)[start..start + size]);
                bytes[from - start..to - start].copy_from_slice(&data[from - offset..to - offset]);
                if start == 20 && bytes[0] == 0 {
                    reset = true;
                }
                if self.write_common(registers, last, start, &bytes, wake) == Progress::Later {
                    progress = Progress::Later;
                }
            }
            progress
        });
        if reset {
            self.was_reset();
        }
        progress
    }

    fn write_common(
        self: &Arc<Self>,
        registers: &mut Registers,
        last: &mut Option<Completion>,
        field: usize,
        bytes: &[u8; 8],
        wake: &dyn Fn() -> Waker,
    ) -> Progress {
        let word = u16_of(bytes);
        match field {
            0 => registers.device_feature_select = u32_of(bytes),
            8 => registers.driver_feature_select = u32_of(bytes),
            // A driver has to say all of it before FEATURES_OK.
            12 if registers.status & status::FEATURES_OK == 0 => {
                let value = u64::from(u32_of(bytes));
                let old = registers.driver_features;
                match registers.driver_feature_select {
                    0 => self.take_features(registers, (old & !LEGACY_BITS) | value),
                    1 => self.take_features(registers, (old & LEGACY_BITS) | value << 32),
                    _ => {}
                }
            }
            16 => registers.config_vector = self.mapped(word),
            20 if bytes[0] == 0 => return self.reset_registers(registers, last, wake),
            20 => {
                let mut value = bytes[0];
                let before = registers.status;
                if value & !before & status::FEATURES_OK != 0 && !self.features_fit(registers) {
                    value &= !status::FEATURES_OK;
                }
                self.write_status(registers, value);
            }
            22 => registers.queue_select = word,
            // An index without a ring has nothing but its vector.
            24 | 28 | 32 | 40 | 48 | 58 if self.is_doorbell(registers.queue_select.into()) => {}
            24 => {
                let packed = registers.driver_features & feature::RING_PACKED != 0;
                if let Some(queue) = registers.selected() {
                    let fits = (1..=MAX_QUEUE_SIZE).contains(&word) && (packed || word.is_power_of_two());
                    if fits && !queue.active {
                        queue.size = word;
                    }
                }
            }
            26 => self.set_queue_vector(registers, word),
            28 if word == 1 => {
                if let Some(queue) = registers.selected() {
                    queue.active = true;
                    queue.addresses.get_or_insert_default();
                }
                self.start_ready(registers);
            }
            32 | 40 | 48 => {
                if let Some(queue) = registers.selected() {
                    if !queue.active {
                        let addresses = queue.addresses.get_or_insert_default();
                        let value = u64_of(bytes);
                        match field {
                            32 => addresses.desc = value,
                            40 => addresses.driver = value,
                            _ => addresses.device = value,
                        }
                    }
                }
            }
            58 if word == 1 && registers.driver_features & feature::RING_RESET != 0 => {
                return self.reset_queue(registers, last, wake);
            }
            _ => {}
        }
        Progress::Done
    }

    /// queue_reset: the selected queue as after power-up.
    fn reset_queue(
        self: &Arc<Self>,
        registers: &mut Registers,
        last: &mut Option<Completion>,
        wake: &dyn Fn() -> Waker,
    ) -> Progress {
        let select = usize::from(registers.queue_select);
        let Some(queue) = registers.queues.get_mut(select) else {
            return Progress::Done;
        };
        queue.resetting = true;
        queue.discard = true;
        if matches!(queue.run, Run::Stopped) {
            let size = queue.size;
            queue.clear(size);
            return Progress::Done;
        }
        self.stop_function(registers, last, wake, |index, _| index == select);
        Progress::Later
    }

    /// Whether the features that the driver has written can be accepted: all of them offered, and VERSION_1 among them (a
    /// driver that doesn't know it has no business here).
    fn features_fit(&self, registers: &Registers) -> bool {
        let features = registers.driver_features;
        features & !self.function_features(registers) == 0 && features & feature::VERSION_1 != 0
    }
}
