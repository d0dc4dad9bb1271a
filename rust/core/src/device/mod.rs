// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Device models: what a request means. They see requests as buffers, never a ring, a socket or a register.

pub mod blk;
pub mod image;

use std::any::Any;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use crate::error::Fault;
use crate::event::Waker;
use crate::memory::LastByte;
use crate::ring::Chain;
use crate::runner::{Call, WakerFactory};

/// Request counters a device keeps per queue; what each means is the device's ([`Device::counter_names`]).
pub const COUNTERS: usize = 12;

/// Per-queue counters of a device. Written by the queue's worker only, read by anybody.
#[derive(Default)]
pub struct Counters([AtomicU64; COUNTERS]);

impl Counters {
    /// Adds to a counter. There is one writer, so this needs no atomic read-modify-write.
    #[inline]
    pub fn add(&self, which: usize, n: u64) {
        let counter = &self.0[which];
        counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// Reads a counter.
    pub fn get(&self, which: usize) -> u64 {
        self.0[which].load(Ordering::Relaxed)
    }
}

/// What a device may know about the queue a request came from.
pub struct QueueContext<'a> {
    /// Index of the queue.
    pub queue: u16,
    /// Features the driver accepted (0 for a driver that never writes them).
    pub driver_features: u64,
    /// The queue's counters.
    pub counters: &'a Counters,
    /// How a request that waits ([`Step::Wait`]) is woken, where that is possible.
    pub waker: Option<(&'a WakerFactory, u16)>,
}

impl QueueContext<'_> {
    /// A waker for the request at hand; to be called exactly once if the step is [`Step::Wait`].
    pub fn waker(&self) -> Waker {
        match self.waker {
            Some((wakers, slot)) => wakers(slot),
            None => Box::new(|| {}),
        }
    }
}

/// One request in flight: its buffers, and what the device remembers between steps.
#[derive(Default)]
pub struct Request {
    /// The buffers. A device may consume them (`trim_*`).
    pub chain: Chain,
    /// The device's notes.
    pub scratch: Scratch,
}

/// A device's notes on a request in flight.
#[derive(Default)]
pub struct Scratch {
    /// What the request is, in the device's own numbers.
    pub kind: u32,
    /// How far it has come.
    pub step: u32,
    /// Position in the storage, bytes.
    pub offset: u64,
    /// Bytes left to do.
    pub left: u64,
    /// Bytes of the writable part before the status byte.
    pub room: u32,
    /// Bytes written from its start, when the request succeeds.
    pub written: u32,
    /// Where the status byte goes.
    pub status: Option<LastByte>,
    /// What must stay alive until the request ends (the image it works on).
    pub keep: Option<Arc<dyn Any + Send + Sync>>,
    /// A scatter list of the device's own, for I/O that doesn't go to the request's buffers.
    pub iov: IovList,
    /// Parsed parameters (discard segments).
    pub segments: Vec<Segment>,
}

impl Scratch {
    /// Forgets everything but the allocations.
    pub fn clear(&mut self) {
        self.kind = 0;
        self.step = 0;
        self.offset = 0;
        self.left = 0;
        self.room = 0;
        self.written = 0;
        self.status = None;
        self.keep = None;
        self.iov.0.clear();
        self.segments.clear();
    }
}

/// iovecs over memory that lives for ever (the zero page).
#[derive(Default)]
pub struct IovList(pub Vec<libc::iovec>);

// SAFETY: the list only ever points at 'static memory; see `blk::zeroes`.
unsafe impl Send for IovList {}

/// A range of a discard or write-zeroes request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// Whether the blocks may be deallocated.
    pub unmap: bool,
}

/// One asynchronous operation on a file. Buffers named here must stay in place until it completes; they belong to the
/// request, which the queue keeps.
#[derive(Clone, Copy, Debug)]
pub enum IoOp {
    /// Read into a scatter list.
    Readv {
        /// File.
        fd: RawFd,
        /// First iovec.
        iov: *const libc::iovec,
        /// Number of iovecs.
        count: u32,
        /// Position in the file.
        offset: u64,
        /// Bytes.
        bytes: u64,
    },
    /// Write from a scatter list; `dsync`: on stable storage before it completes.
    Writev {
        /// File.
        fd: RawFd,
        /// First iovec.
        iov: *const libc::iovec,
        /// Number of iovecs.
        count: u32,
        /// Position in the file.
        offset: u64,
        /// RWF_DSYNC.
        dsync: bool,
        /// Bytes.
        bytes: u64,
    },
    /// fdatasync.
    Fdatasync {
        /// File.
        fd: RawFd,
    },
    /// fallocate.
    Fallocate {
        /// File.
        fd: RawFd,
        /// FALLOC_FL_*.
        mode: i32,
        /// First byte.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Nothing: others get their turn, then the request goes on.
    Yield,
}

/// What becomes of a request after a step.
#[derive(Debug)]
pub enum Step {
    /// It is done; so many bytes of its writable part were written.
    Done(u32),
    /// It waits for this operation; `Device::resume` goes on with the result.
    Io(IoOp),
    /// It waits until its waker is called; `Device::resume` goes on then.
    Wait,
}

/// A field of the device configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfigField {
    /// Name in the specification.
    pub name: &'static str,
    /// First byte.
    pub offset: usize,
    /// Bytes.
    pub size: usize,
}

/// Notifications that are no rings': virtqueue indices right behind those of the device's queues that a driver notifies like a
/// queue, or that interrupt it like one (virtio-vhost-user: doorbells and kick notifications).
///
/// Called with the registers' lock held: nothing here may call back into the member.
pub trait Doorbells: Send + Sync {
    /// How many indices.
    fn count(&self) -> u16;
    /// Whether an index interrupts, and so takes a vector.
    fn interrupts(&self, index: u16) -> bool;
    /// The driver has set an index up. Its notifications come from `kick` (None: by `ring`), interrupts go to `call`.
    fn connect(&self, index: u16, kick: Option<Arc<OwnedFd>>, call: Call);
    /// Interrupts go elsewhere.
    fn set_call(&self, index: u16, call: Call);
    /// The index is not used any more; what is under way may still come through.
    fn disconnect(&self, index: u16);
    /// The driver has notified the index: eventfds to signal are added to `signals`.
    fn ring(&self, index: u16, signals: &mut Vec<Arc<OwnedFd>>);
}

/// Memory of somebody else's that a device shows its driver (virtio 1.4, 2.10), as one region.
pub trait SharedMemory: Send + Sync {
    /// Bytes of the region, a power of two.
    fn size(&self) -> u64;
    /// The file that the first so many bytes of the region are, whatever happens; the rest can only be read and written.
    fn file(&self) -> Option<(Arc<OwnedFd>, u64)>;
    /// Reads; what is not there is 0. The range has been checked against the size.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes; what is not there is left alone. The range has been checked against the size.
    fn write(&self, offset: u64, data: &[u8]);
}

/// A device model.
///
/// `start` and `resume` run on a worker and must not block. They are never called twice at a time for one request, but
/// for different requests from several workers at once.
pub trait Device: Send + Sync {
    /// Name of the type as the group file has it.
    fn type_name(&self) -> &'static str;
    /// Virtio device id.
    fn device_id(&self) -> u32;
    /// Device-type feature bits offered at the moment.
    fn features(&self) -> u64;
    /// All feature bits the device may offer at one time or another. A front end that has negotiated once repeats what
    /// its driver accepted, also after the offer has changed (an image made read-only).
    fn known_features(&self) -> u64;
    /// Number of queues.
    fn queues(&self) -> u16;
    /// Largest queue size.
    fn queue_size(&self) -> u16;
    /// Bytes at the end of the writable part that a request may write whatever its used length says (a status byte).
    fn tail(&self) -> u32 {
        0
    }
    /// Requests are carried out one at a time, in the order of the ring.
    fn serial(&self) -> bool {
        false
    }
    /// Whether `may_take` has to be asked.
    fn gated(&self) -> bool {
        false
    }
    /// Whether there is something to do with another request of the queue. Until then it stays in the ring: whoever changes
    /// this calls `Member::look` afterwards.
    fn may_take(&self, _queue: u16) -> bool {
        true
    }
    /// Indices behind the queues.
    fn doorbells(&self) -> Option<&dyn Doorbells> {
        None
    }
    /// Shared memory that the driver can see.
    fn shared_memory(&self) -> Option<&dyn SharedMemory> {
        None
    }
    /// The device was reset, or nobody is attached to it any more. Called with the registers' lock held, perhaps more than
    /// once.
    fn reset(&self) {}
    /// A queue's ring starts, over vhost-user. `continues`: where it was stopped, so that the driver may be the same one (resets
    /// and pauses look alike). Called with the registers' lock held.
    fn ring_starts(&self, _queue: u16, _continues: bool) {}
    /// Rings run, or don't: the front end has changed that, or (`ready` only, perhaps more than once) a PCI function's driver.
    /// `ready`: all of them do. Called with the registers' lock held.
    fn rings_changed(&self, _ready: bool) {}
    /// Fields of the device configuration, by offset and without holes.
    fn config_fields(&self) -> &'static [ConfigField];
    /// Bytes of the device configuration that the offered features give a meaning.
    fn config_size(&self) -> usize;
    /// Bytes of it that a legacy driver, who has features 0 to 31, can have a use for.
    fn legacy_config_size(&self) -> usize;
    /// Copies from the device configuration; bytes beyond its end read 0.
    fn read_config(&self, offset: usize, data: &mut [u8]);
    /// Writes the device configuration; true when something changed.
    ///
    /// # Errors
    /// `config.*` when the field can't be written; nothing has changed then.
    fn write_config(&self, offset: usize, data: &[u8]) -> Result<bool, Fault>;
    /// A front end reads the configuration for the first time: what an earlier driver has changed goes back to the
    /// state after power-up. Not at a device reset: QEMU keeps its copy of the configuration over resets and
    /// reconnections, so the two would disagree.
    fn fresh(&self);
    /// Begins a request.
    ///
    /// # Errors
    /// A fault when the request can't be answered at all (no place for a status): the member is to be broken.
    fn start(&self, request: &mut Request, context: &QueueContext<'_>) -> Result<Step, Fault>;
    /// Goes on after an operation ended with `result` (bytes, or a negative errno).
    fn resume(&self, request: &mut Request, context: &QueueContext<'_>, result: i32) -> Step;
    /// What the counters mean.
    fn counter_names(&self) -> &'static [&'static str];
    /// The counter that counts failed requests.
    fn failed_counter(&self) -> usize;
}
