// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device behind an administration virtqueue: a request is a command.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use super::command::{Command, Execution, Failure, Reply, Touched, COUNTED, DEV_MODE_SET, RESULT_HEADER};
use super::trace::{Begun, Entry, Origin};
use super::{Context, Core};
use crate::device::{ConfigField, Device, QueueContext, Request, Step};
use crate::error::Fault;
use crate::event::Waker;
use crate::member::Progress;

/// Longest command that is looked at; what is behind is excess.
const MAX_COMMAND: u64 = 1 << 20;
/// Commands of this length need no allocation.
const SHORT: usize = 256;
/// Entries of an administration virtqueue.
const QUEUE_SIZE: u16 = 128;
/// How long a command waits for a member's rings to stop. Storage may hang for good; a driver of the owner that waits for
/// its command may not.
const PATIENCE: Duration = Duration::from_millis(500);

/// Executes the commands of one driver of the owner.
pub struct AdminDevice {
    core: Arc<Core>,
    context: Arc<Context>,
    /// Tells queues apart in the trace.
    number: usize,
    /// By opcode; a queue's own, so that queues don't share a cache line here.
    commands: [AtomicU64; COUNTED],
    failed: AtomicU64,
}

const WAITING: u8 = 0;
const DONE: u8 = 1;
const LATE: u8 = 2;

/// A command that waits for rings to stop, or for its time to be up.
struct Waiting {
    state: AtomicU8,
    /// None before somebody waits, and after they were woken.
    waker: Mutex<Option<Waker>>,
    note: OnceLock<Note>,
}

impl Waiting {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            state: AtomicU8::new(WAITING),
            waker: Mutex::new(None),
            note: OnceLock::new(),
        })
    }

    /// It is over, one way or the other; whoever says so first decides.
    fn settle(&self, state: u8) {
        if self
            .state
            .compare_exchange(WAITING, state, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
        {
            let waker = self.waker.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(waker) = waker {
                waker();
            }
        }
    }

    /// Has the waker called when it is over, or now if it is.
    fn wait(&self, waker: Waker) {
        let mut slot = self.waker.lock().unwrap_or_else(PoisonError::into_inner);
        if self.state.load(Ordering::Acquire) == WAITING {
            *slot = Some(waker);
        } else {
            drop(slot);
            waker();
        }
    }
}

/// What the trace will say of a command.
#[derive(Clone, Copy)]
struct Note {
    origin: Origin,
    begun: Begun,
    opcode: u16,
    member: u64,
    touched: Touched,
}

impl AdminDevice {
    /// A device for commands of the driver that `context` belongs to; `number` tells its queue apart from others.
    pub fn new(core: Arc<Core>, context: Arc<Context>, number: usize) -> Arc<Self> {
        Arc::new(Self {
            core,
            context,
            number,
            commands: std::array::from_fn(|_| AtomicU64::new(0)),
            failed: AtomicU64::new(0),
        })
    }

    /// What its driver has negotiated.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Commands with an opcode so far.
    pub fn commands(&self, opcode: usize) -> u64 {
        self.commands
            .get(opcode)
            .map_or(0, |count| count.load(Ordering::Relaxed))
    }

    /// Commands that failed so far.
    pub fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }

    /// What all drivers share.
    pub fn core(&self) -> &Arc<Core> {
        &self.core
    }

    /// Executes the command in a request.
    pub fn run(&self, request: &mut Request, origin: Origin, begun: Begun, wake: &dyn Fn() -> Waker) -> Step {
        let readable = &request.chain.readable;
        let len = readable.len().min(MAX_COMMAND) as usize;
        let mut short = [0; SHORT];
        let mut long = Vec::new();
        let part: &mut [u8] = if len <= SHORT {
            &mut short[..len]
        } else {
            long.resize(len, 0);
            &mut long
        };
        readable.read(part);
        let command = Command::parse(part);
        // At most 4 GiB.
        let room = (request.chain.writable.len() as usize).saturating_sub(RESULT_HEADER);
        let execution = Execution {
            core: &self.core,
            context: &self.context,
        };
        let mut reply = Reply::new();
        let mut touched = Touched::default();
        // A command has one thing to wait for.
        let waiting: RefCell<Option<Arc<Waiting>>> = RefCell::new(None);
        let make = || -> Waker {
            let waiting = Arc::clone(waiting.borrow_mut().get_or_insert_with(Waiting::new));
            Box::new(move || waiting.settle(DONE))
        };
        let progress = execution.run(&command, room, &mut reply, &mut touched, &make);
        let note = Note {
            origin,
            begun,
            opcode: command.opcode,
            member: command.member,
            touched,
        };
        match (progress, waiting.take()) {
            (Progress::Later, Some(waiting)) => {
                let _ = waiting.note.set(note);
                request.scratch.keep = Some(Arc::clone(&waiting) as _);
                let timer = Arc::clone(&waiting);
                self.core.pool.after(PATIENCE, Box::new(move || timer.settle(LATE)));
                waiting.wait(wake());
                Step::Wait
            }
            _ => self.finish(request, &note, &reply),
        }
    }

    /// Goes on with a command after its waker was called.
    pub fn wake_up(&self, request: &mut Request) -> Step {
        let waiting = request
            .scratch
            .keep
            .take()
            .and_then(|keep| keep.downcast::<Waiting>().ok());
        let Some((waiting, note)) = waiting
            .as_ref()
            .and_then(|waiting| Some((waiting, waiting.note.get()?)))
        else {
            return Step::Done(0);
        };
        let mut reply = Reply::new();
        if waiting.state.load(Ordering::Acquire) == LATE {
            log::warn!(
                "member {}: its rings have not stopped within {PATIENCE:?}; the command is answered with EBUSY",
                note.member
            );
            reply.fail(Failure::Busy, 0);
            if note.opcode == DEV_MODE_SET {
                // It has failed, so the device isn't stopped.
                if let Some(member) = self.core.find(note.member) {
                    member.resume_device();
                }
            }
        }
        self.finish(request, note, &reply)
    }

    fn finish(&self, request: &Request, note: &Note, reply: &Reply) -> Step {
        let written = request.chain.writable.write(reply.bytes());
        let status = reply.status();
        if let Some(count) = self.commands.get(usize::from(note.opcode)) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        if status != 0 {
            self.failed.fetch_add(1, Ordering::Relaxed);
        }
        // Commands that concern a member; the lists and capabilities don't.
        if note.opcode > 1 && note.member != 0 {
            let entry = Entry {
                at: SystemTime::now(),
                member: u32::try_from(note.member).unwrap_or(u32::MAX),
                origin: note.origin,
                write: note.touched.write,
                opcode: Some(note.opcode),
                offset: note.touched.offset,
                width: note.touched.width,
                value: note.touched.value.filter(|_| status == 0 || note.touched.write),
                status,
                qualifier: reply.qualifier(),
                nanoseconds: note.begun.nanoseconds(),
            };
            self.core.trace.push(self.number, entry);
        }
        // Replies are at most a few thousand bytes.
        Step::Done(written as u32)
    }
}

impl Device for AdminDevice {
    fn type_name(&self) -> &'static str {
        "admin"
    }

    fn device_id(&self) -> u32 {
        0
    }

    fn features(&self) -> u64 {
        0
    }

    fn known_features(&self) -> u64 {
        0
    }

    fn queues(&self) -> u16 {
        1
    }

    fn queue_size(&self) -> u16 {
        QUEUE_SIZE
    }

    fn serial(&self) -> bool {
        true
    }

    fn config_fields(&self) -> &'static [ConfigField] {
        &[]
    }

    fn config_size(&self) -> usize {
        0
    }

    fn legacy_config_size(&self) -> usize {
        0
    }

    fn read_config(&self, _offset: usize, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&self, _offset: usize, _data: &[u8]) -> Result<bool, Fault> {
        Ok(false)
    }

    fn fresh(&self) {}

    fn start(&self, request: &mut Request, context: &QueueContext<'_>) -> Result<Step, Fault> {
        Ok(self.run(request, Origin::Admin, Begun::now(), &|| context.waker()))
    }

    fn resume(&self, request: &mut Request, _context: &QueueContext<'_>, _result: i32) -> Step {
        self.wake_up(request)
    }

    fn counter_names(&self) -> &'static [&'static str] {
        &["commands", "failed"]
    }

    fn failed_counter(&self) -> usize {
        1
    }
}
