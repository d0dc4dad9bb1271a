// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The virtio driver of a virtio-vhost-user device.

use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::memory::Dma;
use crate::message::HEADER;
use crate::registers::{common, config, isr, status, Registers, Structure};
use crate::ring::{self, Parts, Ring, RingError, STRIDE};

const RX: u16 = 0;
const TX: u16 = 1;
const VERSION_1_WORD: u32 = 1;
const VERSION_1: u32 = 1;
/// Queues that the 8 bits of SET_VRING_KICK, CALL and ERR can name.
const ADDRESSABLE: u32 = 256;
/// How long a reset or a change of status may take. A reset ends requests of a back end behind another socket.
const PATIENCE: Duration = Duration::from_secs(5);

// DMA memory: a page for each ring, then the buffers.
const RX_RING: usize = 0;
const TX_RING: usize = 0x1000;
const DUMMY_RING: usize = 0x2000;
const BUFFERS: usize = 0x3000;
const RING_BUFFERS: usize = ring::MAX_SIZE as usize / 2 * STRIDE;
/// Bytes of DMA memory that a device needs.
pub const DMA_LENGTH: usize = BUFFERS + 2 * RING_BUFFERS;

/// What the configuration's status field says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// The slave isn't up (any more).
    Down,
    /// The slave is up, no master is there.
    Waiting,
    /// A master is connected.
    Up,
}

/// A device that runs: features negotiated, rings set up, rx buffers posted.
pub struct Device<'a, R> {
    registers: &'a R,
    rx: Ring,
    tx: Ring,
    queues: u16,
    uuid: [u8; 16],
    /// Where the doorbell of each index is; the last one is the log's.
    doorbells: Vec<usize>,
    /// The log's index: 2N+2 with the N that the device says, which may be more than can be used.
    log: u16,
    /// Bits of the ISR status that can mean a kick.
    kick_bits: u8,
}

impl From<RingError> for Error {
    fn from(error: RingError) -> Self {
        Self::Device(error.to_string())
    }
}

/// Resets the device and waits for it.
///
/// # Errors
/// The device doesn't become reset.
pub fn reset(registers: &impl Registers) -> Result<()> {
    registers.write8(Structure::Common, common::DEVICE_STATUS, 0);
    let start = Instant::now();
    loop {
        match registers.read8(Structure::Common, common::DEVICE_STATUS) {
            0 => return Ok(()),
            // No function answers.
            0xff if start.elapsed() > PATIENCE / 5 => return Err(Error::Device("its registers read as ones".into())),
            _ if start.elapsed() > PATIENCE => return Err(Error::Device("reset doesn't end".into())),
            _ => sleep(Duration::from_millis(1)),
        }
    }
}

/// The uuid, which can be read at any time.
pub fn uuid(registers: &impl Registers) -> [u8; 16] {
    let mut uuid = [0; 16];
    for (word, bytes) in uuid.chunks_exact_mut(4).enumerate() {
        bytes.copy_from_slice(
            &registers
                .read32(Structure::Device, config::UUID + 4 * word)
                .to_le_bytes(),
        );
    }
    uuid
}

impl<'a, R: Registers> Device<'a, R> {
    /// Initializes the device. Without `interrupts` it is asked not to send any for rxq and txq.
    ///
    /// # Errors
    /// It isn't a device for this driver, or doesn't behave.
    pub fn start(registers: &'a R, memory: &Arc<Dma>, interrupts: bool) -> Result<Self> {
        reset(registers)?;
        memory.look_up()?;
        let set_status = |bits| registers.write8(Structure::Common, common::DEVICE_STATUS, bits);
        set_status(status::ACKNOWLEDGE);
        set_status(status::ACKNOWLEDGE | status::DRIVER);
        let started = Self::initialize(registers, memory, interrupts);
        if started.is_err() {
            set_status(registers.read8(Structure::Common, common::DEVICE_STATUS) | status::FAILED);
        }
        started
    }

    fn initialize(registers: &'a R, memory: &Arc<Dma>, interrupts: bool) -> Result<Self> {
        let agreed = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        negotiate(registers, agreed)?;
        let count = registers.read32(Structure::Device, config::MAX_VHOST_QUEUES);
        let log = count
            .checked_mul(2)
            .and_then(|doorbells| u16::try_from(doorbells.checked_add(2)?).ok())
            .filter(|_| count > 0)
            .ok_or_else(|| Error::Setup(format!("device: {count} vhost-user queues are not possible")))?;
        // In range: `log` is.
        let queues = count.min(ADDRESSABLE) as u16;

        let rx_size = queue_size(registers, RX)?;
        let tx_size = queue_size(registers, TX)?;
        let rx = Ring::new(memory.clone(), RX_RING, rx_size, BUFFERS, true, interrupts);
        let tx = Ring::new(
            memory.clone(),
            TX_RING,
            tx_size,
            BUFFERS + RING_BUFFERS,
            false,
            interrupts,
        );
        let mut doorbells = vec![
            enable(registers, memory, RX, rx_size, rx.parts())?,
            enable(registers, memory, TX, tx_size, tx.parts())?,
        ];
        // Where special indices are queues to the transport, those without a ring don't exist: all share an empty one.
        memory.pages().write(DUMMY_RING, &[0; 4096]);
        let mut special_queues = false;
        for index in (2..2 * queues + 2).chain([log]) {
            registers.write16(Structure::Common, common::QUEUE_SELECT, index);
            let largest = registers.read16(Structure::Common, common::QUEUE_SIZE);
            doorbells.push(if largest == 0 {
                notify_offset(registers, index)?
            } else {
                special_queues = true;
                let size = largest.min(ring::MAX_SIZE);
                enable(registers, memory, index, size, Parts::new(DUMMY_RING, size))?
            });
        }
        registers.write8(Structure::Common, common::DEVICE_STATUS, agreed | status::DRIVER_OK);
        let mut device = Self {
            registers,
            rx,
            tx,
            queues,
            uuid: uuid(registers),
            doorbells,
            log,
            kick_bits: if special_queues {
                isr::QUEUE | isr::KICK
            } else {
                isr::KICK
            },
        };
        device.check()?;
        while device.rx.offer() {}
        device.notify();
        Ok(device)
    }

    /// vhost-user queues that can be used.
    pub fn queues(&self) -> u16 {
        self.queues
    }

    /// The device's uuid.
    pub fn uuid(&self) -> [u8; 16] {
        self.uuid
    }

    /// Bits of the ISR status that can mean a kick.
    pub fn kick_bits(&self) -> u8 {
        self.kick_bits
    }

    /// Whether the device still works as it was set up.
    ///
    /// # Errors
    /// It wants a reset, has been reset by somebody else, or is gone.
    pub fn check(&self) -> Result<()> {
        let expected = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
        match self.registers.read8(Structure::Common, common::DEVICE_STATUS) {
            bits if bits == expected => Ok(()),
            0xff => Err(Error::Device("its registers read as ones".into())),
            bits if bits & status::NEEDS_RESET != 0 => Err(Error::Device("needs a reset".into())),
            bits => Err(Error::Device(format!("status is {bits:#x}"))),
        }
    }

    /// What the configuration says about slave and master.
    ///
    /// # Errors
    /// Bits that mean nothing.
    pub fn link(&self) -> Result<Link> {
        match self.registers.read32(Structure::Device, config::STATUS) {
            bits if bits & !(config::SLAVE_UP | config::MASTER_UP) != 0 => {
                Err(Error::Device(format!("configuration status is {bits:#x}")))
            }
            bits if bits & config::SLAVE_UP == 0 => Ok(Link::Down),
            bits if bits & config::MASTER_UP == 0 => Ok(Link::Waiting),
            _ => Ok(Link::Up),
        }
    }

    /// Lets a master connect. What former sessions have left in the queues is thrown away first.
    ///
    /// Returns false when the device is down again at once: the master has come and gone, or it doesn't want to.
    ///
    /// # Errors
    /// The device doesn't behave.
    pub fn slave_up(&mut self) -> Result<bool> {
        self.slave_down()?;
        let start = Instant::now();
        loop {
            while self.receive()?.is_some() {}
            while self.tx.take_used()?.is_some() {}
            self.notify();
            if self.tx.is_idle() {
                break;
            }
            // A message of the last session must not get into the next one, and can't be taken back without a reset.
            if start.elapsed() > PATIENCE / 5 {
                return Err(Error::Device("keeps messages of the last session".into()));
            }
            sleep(Duration::from_millis(1));
        }
        self.registers
            .write32(Structure::Device, config::STATUS, config::SLAVE_UP);
        self.wait_for(PATIENCE / 5, |link| link != Link::Down)
    }

    /// Disconnects the master, if there is one.
    ///
    /// # Errors
    /// The device doesn't do that.
    pub fn slave_down(&mut self) -> Result<()> {
        self.registers.write32(Structure::Device, config::STATUS, 0);
        // Reading back is also what makes the write take effect on devices that pass it on. A device may take its time until it
        // says so: it has to take shared memory back, which a reset right behind could make impossible.
        if self.wait_for(PATIENCE, |link| link == Link::Down)? {
            Ok(())
        } else {
            Err(Error::Device("stays up".into()))
        }
    }

    fn wait_for(&self, patience: Duration, wanted: impl Fn(Link) -> bool) -> Result<bool> {
        let start = Instant::now();
        loop {
            if wanted(self.link()?) {
                return Ok(true);
            }
            if start.elapsed() > patience {
                self.check()?;
                return Ok(false);
            }
            sleep(Duration::from_millis(1));
        }
    }

    /// The next message from the device; None when there is none. Its buffer is offered again.
    ///
    /// # Errors
    /// The device breaks the rules of the ring.
    pub fn receive(&mut self) -> Result<Option<Vec<u8>>> {
        while let Some((slot, length)) = self.rx.take_used()? {
            let message = self.rx.copy(slot, length);
            self.rx.offer();
            // An empty one was for a master who went in the middle of it.
            if !message.is_empty() {
                return Ok(Some(message));
            }
        }
        Ok(None)
    }

    /// Whether [`Device::send`] has room. Takes back buffers first.
    ///
    /// # Errors
    /// The device breaks the rules of the ring.
    pub fn can_send(&mut self) -> Result<bool> {
        while self.tx.take_used()?.is_some() {}
        Ok(self.tx.has_free())
    }

    /// Puts a message on the txq; false when there is no room.
    pub fn send(&mut self, message: &[u8]) -> bool {
        debug_assert!(message.len() >= HEADER);
        self.tx.send(message)
    }

    /// Tells the device what has been made available.
    pub fn notify(&mut self) {
        if self.rx.take_notification() {
            self.ring(RX, usize::from(RX));
        }
        if self.tx.take_notification() {
            self.ring(TX, usize::from(TX));
        }
    }

    /// Rings the call doorbell of a queue.
    pub fn call(&self, queue: u8) {
        self.doorbell(2 * u16::from(queue) + 2);
    }

    /// Rings the err doorbell of a queue.
    pub fn err(&self, queue: u8) {
        self.doorbell(2 * u16::from(queue) + 3);
    }

    /// Rings the log doorbell.
    pub fn log(&self) {
        self.ring(self.log, self.doorbells.len() - 1);
    }

    fn doorbell(&self, index: u16) {
        if index < 2 * self.queues + 2 {
            self.ring(index, index.into());
        }
    }

    fn ring(&self, index: u16, place: usize) {
        self.registers.write16(Structure::Notify, self.doorbells[place], index);
    }

    /// Reads the ISR status, which clears it and takes the interrupt back.
    pub fn read_isr(&self) -> u8 {
        self.registers.read8(Structure::Isr, 0)
    }
}

fn negotiate(registers: &impl Registers, agreed: u8) -> Result<()> {
    registers.write32(Structure::Common, common::DEVICE_FEATURE_SELECT, VERSION_1_WORD);
    if registers.read32(Structure::Common, common::DEVICE_FEATURE) & VERSION_1 == 0 {
        return Err(Error::Setup("device: doesn't offer VERSION_1".into()));
    }
    for (word, bits) in [(0, 0), (VERSION_1_WORD, VERSION_1)] {
        registers.write32(Structure::Common, common::DRIVER_FEATURE_SELECT, word);
        registers.write32(Structure::Common, common::DRIVER_FEATURE, bits);
    }
    registers.write8(Structure::Common, common::DEVICE_STATUS, agreed);
    match registers.read8(Structure::Common, common::DEVICE_STATUS) {
        bits if bits == agreed => Ok(()),
        bits => Err(Error::Device(format!(
            "doesn't accept VERSION_1 alone: status is {bits:#x}"
        ))),
    }
}

/// The size to use for rxq or txq: what the device allows, rounded down to a power of two.
fn queue_size(registers: &impl Registers, index: u16) -> Result<u16> {
    registers.write16(Structure::Common, common::QUEUE_SELECT, index);
    match registers
        .read16(Structure::Common, common::QUEUE_SIZE)
        .min(ring::MAX_SIZE)
    {
        size @ 0..=1 => Err(Error::Setup(format!("device: queue {index} has {size} entries"))),
        size => Ok(1 << size.ilog2()),
    }
}

/// Sets a queue up and enables it; where its doorbell is.
fn enable(registers: &impl Registers, memory: &Dma, index: u16, size: u16, parts: Parts) -> Result<usize> {
    let size = 1 << size.ilog2();
    registers.write16(Structure::Common, common::QUEUE_SELECT, index);
    registers.write16(Structure::Common, common::QUEUE_SIZE, size);
    if registers.read16(Structure::Common, common::QUEUE_SIZE) != size {
        return Err(Error::Device(format!("queue {index} doesn't take a size of {size}")));
    }
    for (field, offset) in [
        (common::QUEUE_DESC, parts.desc),
        (common::QUEUE_DRIVER, parts.avail),
        (common::QUEUE_DEVICE, parts.used),
    ] {
        let address = memory.physical(offset);
        // Halves, low first; truncation is meant.
        registers.write32(Structure::Common, field, address as u32);
        registers.write32(Structure::Common, field + 4, (address >> 32) as u32);
    }
    let place = notify_offset(registers, index)?;
    registers.write16(Structure::Common, common::QUEUE_ENABLE, 1);
    Ok(place)
}

/// Where the doorbell of the selected index is, checked against the structure.
fn notify_offset(registers: &impl Registers, index: u16) -> Result<usize> {
    let offset = u64::from(registers.read16(Structure::Common, common::QUEUE_NOTIFY_OFF))
        * u64::from(registers.notify_multiplier());
    // 16 times 32 bits: the product and 2 more can't wrap.
    if offset + 2 > registers.notify_length() {
        return Err(Error::Setup(format!(
            "device: the doorbell of index {index} is not in the notification structure"
        )));
    }
    usize::try_from(offset).map_err(|_| Error::Setup(format!("device: the doorbell of index {index} is too far away")))
}
