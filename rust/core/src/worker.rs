// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The worker pool (design D4): a few threads serve all queues of all members.
//!
//! Each worker has one epoll (kicks, commands, its io_uring) and one io_uring (file I/O and interrupts). A queue
//! belongs to one worker for as long as it runs, and nothing on its path takes a lock. The control side talks to a
//! worker by commands through a channel and an eventfd; a command that somebody waits for carries a
//! [`Completion`], dropped when it is carried out.
//!
//! Order in a turn: commands first, so that whatever the control side has said (a new memory map, a stop) holds for
//! every request taken afterwards; then kicked queues take a batch each; then one submit for all I/O; completions;
//! one publish per queue touched; one more submit for the interrupts.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::dirty::DirtyLog;
use crate::error::{Error, Fault, Result};
use crate::event::{Completion, Event, Events, Waker};
use crate::memory::{MappingCache, MemoryMap};
use crate::runner::{Call, Runner, WakerFactory};
use crate::sys::{self, Epoll};
use crate::uring::Uring;

const TOKEN_COMMANDS: u64 = 0;
const TOKEN_URING: u64 = 1;
const TOKEN_QUEUES: u64 = 2;
/// Sources have their key here; queue tokens are small.
const TOKEN_SOURCES: u64 = 1 << 63;
/// Numbers in user data from here on are interrupts of sources; queues have smaller ones.
const SIGNALS: usize = 1 << 32;

/// Workers by default: one per CPU, at most this many.
pub const DEFAULT_WORKERS: usize = 4;
/// How long closing the pool waits for requests in flight.
pub const CLOSE_PATIENCE: Duration = Duration::from_secs(10);
/// How long the last interrupt of a stopping queue may take.
const LINGER: Duration = Duration::from_millis(100);
/// Pieces of long copies made each time completions are looked at; more wait, so that everybody else gets a turn.
const COPIES: u32 = 2;
/// Commands carried out in one turn: whoever sends many doesn't keep requests waiting.
const COMMANDS_PER_TURN: usize = 256;
/// Turns without a look at epoll while queues are busy.
const TURNS_PER_POLL: u32 = 8;

/// A member as its queues see it: who to blame and how to say so.
pub struct Owner {
    /// Member id.
    pub id: u32,
    broken: AtomicBool,
    fault: Mutex<Option<Fault>>,
    last_fault: Mutex<Option<Fault>>,
    events: Arc<Events>,
}

impl Owner {
    /// A member that is well.
    pub fn new(id: u32, events: Arc<Events>) -> Self {
        Self {
            id,
            broken: AtomicBool::new(false),
            fault: Mutex::new(None),
            last_fault: Mutex::new(None),
            events,
        }
    }

    /// Whether its rings must not be touched.
    #[inline]
    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// Marks the member broken. Only the first fault counts, is logged and told; it stays until [`Owner::mend`].
    pub fn break_it(&self, fault: Fault) {
        let mut current = self.fault.lock().unwrap_or_else(PoisonError::into_inner);
        if current.is_none() {
            *self.last_fault.lock().unwrap_or_else(PoisonError::into_inner) = Some(fault.clone());
            *current = Some(fault.clone());
            self.broken.store(true, Ordering::Release);
            self.events.push(Event::Broken { member: self.id, fault });
        }
    }

    /// The member was reset or has a new front end.
    pub fn mend(&self) {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.broken.store(false, Ordering::Release);
    }

    /// Why it is broken.
    pub fn fault(&self) -> Option<Fault> {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Why it was broken the last time; survives a reset.
    pub fn last_fault(&self) -> Option<Fault> {
        self.last_fault.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A queue on its way to a worker.
pub struct Start {
    /// Its member.
    pub owner: Arc<Owner>,
    /// The queue.
    pub runner: Runner,
    /// Notifications come here.
    pub kick: Arc<OwnedFd>,
    /// Whether it may take requests at once.
    pub enabled: bool,
}

enum Command {
    Start(u64, Box<Start>),
    Stop(u64, Completion),
    Enable(u64, bool, Completion),
    SetCall(u64, Call, Completion),
    Rewire(u64, Arc<Mutex<Option<Call>>>),
    SetKick(u64, Arc<OwnedFd>, Completion),
    Resume(u64, u16),
    Look(u64),
    SetMemory(u64, Arc<MemoryMap>, Completion),
    SetFeatures(u64, u64, Completion),
    SetLog(u64, Option<Arc<DirtyLog>>, Completion),
    AddSource(u64, Box<dyn Source>),
    WakeSource(u64),
    RemoveSource(u64, Completion),
    Timer(Instant, Waker),
    Quit,
}

#[derive(Default)]
struct WorkerStats {
    queues: AtomicUsize,
    wakeups: AtomicU64,
    turns: AtomicU64,
}

struct WorkerHandle {
    commands: Mutex<Sender<Command>>,
    wake: Arc<OwnedFd>,
    pending: Arc<AtomicBool>,
    stats: Arc<WorkerStats>,
}

impl WorkerHandle {
    fn send(&self, command: Command) {
        let sent = self
            .commands
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .send(command);
        if let Err(unsent) = sent {
            // The worker is gone. The command's completion ends with it, and may call somebody who wants a lock that our
            // caller holds: so elsewhere.
            sys::drop_later(unsent.0);
        }
        self.pending.store(true, Ordering::Release);
        sys::eventfd_signal(&self.wake);
    }
}

/// A running queue, seen from the control side. Dropping it does not stop the queue.
pub struct QueueHandle {
    worker: Arc<WorkerHandle>,
    /// Number of the worker.
    pub worker_index: u32,
    key: u64,
    /// What `rewire` has in store.
    call: Arc<Mutex<Option<Call>>>,
}

impl QueueHandle {
    /// Takes no more requests, ends those in flight, then lets go of the ring; the position is in the queue's stats when
    /// `done` ends. The handle is of no use afterwards.
    pub fn stop(&self, done: Completion) {
        self.worker.send(Command::Stop(self.key, done));
    }

    /// Allows or forbids taking requests; those in flight go on.
    pub fn enable(&self, on: bool, done: Completion) {
        self.worker.send(Command::Enable(self.key, on, done));
    }

    /// Has the ring looked at: the device can do with another request.
    pub fn look(&self) {
        self.worker.send(Command::Look(self.key));
    }

    /// Replaces the way the driver is interrupted.
    pub fn set_call(&self, call: Call, done: Completion) {
        self.worker.send(Command::SetCall(self.key, call, done));
    }

    /// Replaces the way the driver is interrupted, soon; what comes quickly after another takes its place. A client can cause
    /// these as fast as it likes, and pays nothing.
    pub fn rewire(&self, call: Call) {
        let before = self.call.lock().unwrap_or_else(PoisonError::into_inner).replace(call);
        if before.is_none() {
            self.worker.send(Command::Rewire(self.key, Arc::clone(&self.call)));
        }
    }

    /// Replaces the kick eventfd.
    pub fn set_kick(&self, kick: Arc<OwnedFd>, done: Completion) {
        self.worker.send(Command::SetKick(self.key, kick, done));
    }

    /// Replaces the accepted features.
    pub fn set_features(&self, features: u64, done: Completion) {
        self.worker.send(Command::SetFeatures(self.key, features, done));
    }

    /// Has pages that are written marked in a log from now on, or no more.
    pub fn set_log(&self, log: Option<Arc<DirtyLog>>, done: Completion) {
        self.worker.send(Command::SetLog(self.key, log, done));
    }

    /// Replaces the memory map.
    pub fn set_memory(&self, map: Arc<MemoryMap>, done: Completion) {
        self.worker.send(Command::SetMemory(self.key, map, done));
    }
}

/// What a source wants to be woken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interest {
    /// There is something to read.
    pub read: bool,
    /// There is room to write.
    pub write: bool,
}

/// What becomes of a source after a visit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Nothing to do until its fd, its handle or its deadline says so.
    Wait,
    /// There is more to do; others first.
    Again,
    /// It is done for: to be removed.
    End,
}

/// Something with a socket that lives on a worker beside the queues: it is visited when its fd is ready, when its handle was
/// used to wake it, and when its deadline has passed.
pub trait Source: Send {
    /// The fd to watch, level triggered. Always the same one, and open until the source is dropped.
    fn fd(&self) -> RawFd;
    /// Whether a visit takes all that there is: then it is watched for what is new only (a peer's eventfd that counts down by
    /// one would be ready for ever). Never with an interest that changes.
    fn edge(&self) -> bool {
        false
    }
    /// What to watch it for; asked again after each visit.
    fn interest(&self) -> Interest;
    /// Do a bounded amount of work; never block. A panic ends the source.
    fn ready(&mut self, io: &mut SourceIo<'_>) -> Flow;
    /// To be visited then at the latest.
    fn deadline(&self) -> Option<Instant>;
    /// It is being removed (asked for, ended by itself, or after a panic) and will be dropped next: let go of everything.
    fn end(&mut self);
}

/// What a worker lends to a source for a visit.
pub struct SourceIo<'a> {
    signals: &'a mut Signals,
    uring: &'a mut Uring,
}

impl SourceIo<'_> {
    /// Adds one to an eventfd of the peer, without ever waiting for it. One write at a time: those asked for while it is under
    /// way become one more, after it.
    pub fn signal(&mut self, fd: &Arc<OwnedFd>) {
        self.signals.send(fd, self.uring);
    }
}

/// A write to an eventfd that is under way.
struct Signal {
    fd: Arc<OwnedFd>,
    /// It was asked for again since. The peer may have seen the write before we see that it has ended, so this can't be left
    /// out.
    again: bool,
    /// When it began.
    since: Instant,
}

/// Interrupts of sources that are under way.
#[derive(Default)]
struct Signals {
    under_way: Vec<Option<Signal>>,
    free: Vec<usize>,
    /// Addresses of those under way, and where they are.
    known: HashMap<usize, usize>,
}

impl Signals {
    /// Most that may be under way at once. Only eventfds that their owner has filled and made blocking stay so.
    const MOST: usize = 4096;
    /// From so many on, those that don't get through are given up: each keeps a descriptor of the peer's open.
    const CROWD: usize = 32;

    fn send(&mut self, fd: &Arc<OwnedFd>, uring: &mut Uring) {
        let address = Arc::as_ptr(fd) as usize;
        if let Some(&index) = self.known.get(&address) {
            if let Some(Some(signal)) = self.under_way.get_mut(index) {
                signal.again = true;
            }
            return;
        }
        let now = Instant::now();
        if self.known.len() >= Self::CROWD {
            for (index, signal) in self.under_way.iter_mut().enumerate() {
                if let Some(signal) = signal
                    .as_mut()
                    .filter(|it| now.saturating_duration_since(it.since) > LINGER)
                {
                    signal.since = now;
                    uring.cancel(((SIGNALS + index) as u64) << 16, u64::MAX);
                }
            }
        }
        let index = match self.free.pop() {
            Some(index) => index,
            None if self.under_way.len() < Self::MOST => {
                self.under_way.push(None);
                self.under_way.len() - 1
            }
            None => return,
        };
        self.known.insert(address, index);
        self.under_way[index] = Some(Signal {
            fd: Arc::clone(fd),
            again: false,
            since: now,
        });
        uring.signal(fd.as_raw_fd(), ((SIGNALS + index) as u64) << 16);
    }

    fn ended(&mut self, number: usize, result: i32, uring: &mut Uring) {
        let index = number - SIGNALS;
        let Some(slot) = self.under_way.get_mut(index) else {
            return;
        };
        match slot {
            // One that was cancelled, or has failed, would only fail again.
            Some(signal) if signal.again && result > 0 => {
                signal.again = false;
                signal.since = Instant::now();
                uring.signal(signal.fd.as_raw_fd(), ((SIGNALS + index) as u64) << 16);
            }
            _ => {
                if let Some(signal) = slot.take() {
                    self.known.remove(&(Arc::as_ptr(&signal.fd) as usize));
                    self.free.push(index);
                }
            }
        }
    }

    /// Gives up all that are left; they end with an error.
    fn cancel(&self, uring: &mut Uring) {
        for (index, _) in self.under_way.iter().enumerate().filter(|(_, fd)| fd.is_some()) {
            uring.cancel(((SIGNALS + index) as u64) << 16, u64::MAX);
        }
    }
}

/// A source, seen from elsewhere.
#[derive(Clone)]
pub struct SourceHandle {
    worker: Arc<WorkerHandle>,
    key: u64,
}

impl SourceHandle {
    /// Has the source visited soon.
    pub fn wake(&self) {
        self.worker.send(Command::WakeSource(self.key));
    }

    /// Removes the source; `done` ends when it is gone.
    pub fn remove(&self, done: Completion) {
        self.worker.send(Command::RemoveSource(self.key, done));
    }
}

/// What the pool says of a worker.
pub struct WorkerStatistics {
    /// Queues it serves.
    pub queues: usize,
    /// Times it woke up.
    pub wakeups: u64,
    /// Rounds over its busy queues.
    pub turns: u64,
}

/// The pool.
pub struct Pool {
    events: Arc<Events>,
    mappings: MappingCache,
    workers: Vec<Arc<WorkerHandle>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    keys: AtomicU64,
    next: AtomicU32,
}

impl Pool {
    /// Starts `workers` threads (default: one per CPU, at most [`DEFAULT_WORKERS`]).
    ///
    /// # Errors
    /// [`Error::Invalid`] for 0 or more than 256 workers, [`Error::Os`] when the kernel refuses (no io_uring).
    pub fn new(workers: Option<usize>) -> Result<Self> {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let count = workers.unwrap_or(cpus.min(DEFAULT_WORKERS));
        if !(1..=256).contains(&count) {
            return Err(Error::Invalid(format!("workers = {count}; 1 to 256 are possible")));
        }
        let mut pool = Self {
            events: Arc::new(Events::new()?),
            mappings: MappingCache::default(),
            workers: Vec::with_capacity(count),
            threads: Mutex::new(Vec::with_capacity(count)),
            keys: AtomicU64::new(0),
            next: AtomicU32::new(0),
        };
        for index in 0..count {
            match start_worker(index) {
                Ok((handle, thread)) => {
                    pool.workers.push(handle);
                    pool.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
                }
                Err(e) => {
                    pool.close();
                    return Err(e);
                }
            }
        }
        Ok(pool)
    }

    /// The group's events.
    pub fn events(&self) -> &Arc<Events> {
        &self.events
    }

    /// Guest memory mapped by this process.
    pub fn mappings(&self) -> &MappingCache {
        &self.mappings
    }

    /// Gives a queue to the worker with the fewest.
    pub fn start(&self, start: Start) -> QueueHandle {
        let first = self.next.fetch_add(1, Ordering::Relaxed) as usize;
        let count = self.workers.len();
        // Round robin among the least loaded.
        let index = (0..count)
            .map(|i| (first + i) % count)
            .min_by_key(|&i| self.workers[i].stats.queues.load(Ordering::Relaxed))
            .unwrap_or(0);
        let worker = Arc::clone(&self.workers[index]);
        worker.stats.queues.fetch_add(1, Ordering::Relaxed);
        let key = self.keys.fetch_add(1, Ordering::Relaxed);
        worker.send(Command::Start(key, Box::new(start)));
        QueueHandle {
            worker,
            worker_index: index as u32,
            key,
            call: Arc::default(),
        }
    }

    /// Puts a source on a worker; `make` gets the handle first.
    pub fn add_source(&self, make: impl FnOnce(SourceHandle) -> Box<dyn Source>) -> SourceHandle {
        let index = self.next.fetch_add(1, Ordering::Relaxed) as usize % self.workers.len();
        let key = self.keys.fetch_add(1, Ordering::Relaxed);
        let handle = SourceHandle {
            worker: Arc::clone(&self.workers[index]),
            key,
        };
        let source = make(handle.clone());
        handle.worker.send(Command::AddSource(key, source));
        handle
    }

    /// Calls `then` after some time, on a worker. When the pool is closed before, it is dropped.
    pub fn after(&self, time: Duration, then: Waker) {
        self.workers[0].send(Command::Timer(Instant::now() + time, then));
    }

    /// What each worker has been doing.
    pub fn statistics(&self) -> Vec<WorkerStatistics> {
        self.workers
            .iter()
            .map(|worker| WorkerStatistics {
                queues: worker.stats.queues.load(Ordering::Relaxed),
                wakeups: worker.stats.wakeups.load(Ordering::Relaxed),
                turns: worker.stats.turns.load(Ordering::Relaxed),
            })
            .collect()
    }

    /// Ends the workers and joins them. Requests in flight are waited for (their buffers are somebody's memory), but not
    /// longer than [`CLOSE_PATIENCE`]: storage may hang for good, and then its worker is left behind. Idempotent.
    pub fn close(&self) {
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for worker in &self.workers {
            worker.send(Command::Quit);
        }
        let deadline = Instant::now() + CLOSE_PATIENCE;
        for thread in threads {
            while !thread.is_finished() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
            if thread.is_finished() {
                // A worker catches panics itself; one that still died has been logged by the runtime.
                let _ = thread.join();
            } else {
                log::error!("a worker still waits for I/O after {CLOSE_PATIENCE:?}; it is left behind");
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.close();
    }
}

fn start_worker(index: usize) -> Result<(Arc<WorkerHandle>, JoinHandle<()>)> {
    let os = |what| move |source| Error::Os { what, source };
    let wake = Arc::new(sys::eventfd().map_err(os("eventfd"))?);
    let (sender, receiver) = channel();
    let handle = Arc::new(WorkerHandle {
        commands: Mutex::new(sender),
        wake,
        pending: Arc::new(AtomicBool::new(false)),
        stats: Arc::new(WorkerStats::default()),
    });
    // SINGLE_ISSUER wants the ring made on the thread that uses it, so the thread reports how its set-up went.
    let (report, reported) = channel();
    let thread = {
        let myself = Arc::downgrade(&handle);
        let (wake, pending, stats) = (
            Arc::clone(&handle.wake),
            Arc::clone(&handle.pending),
            Arc::clone(&handle.stats),
        );
        std::thread::Builder::new()
            .name(format!("vhu-worker-{index}"))
            .spawn(move || {
                let worker = Worker::new(receiver, myself, wake, pending, stats);
                match worker {
                    Ok(mut worker) => {
                        let _ = report.send(Ok(()));
                        worker.run();
                    }
                    Err(e) => {
                        let _ = report.send(Err(e));
                    }
                }
            })
            .map_err(os("starting a worker thread"))?
    };
    match reported.recv() {
        Ok(Ok(())) => Ok((handle, thread)),
        Ok(Err(e)) => Err(e),
        Err(_) => Err(Error::Closed),
    }
}

/// A queue on its worker.
struct Queue {
    key: u64,
    owner: Arc<Owner>,
    runner: Runner,
    kick: Arc<OwnedFd>,
    enabled: bool,
    /// Not empty: the queue goes away when nothing is in flight any more, and tells all of these.
    stopping: Vec<Completion>,
    /// In `Worker::lingering`.
    lingering: bool,
    /// In `Worker::ready`.
    ready: bool,
    /// In `Worker::touched`.
    touched: bool,
}

impl Queue {
    /// Whether it goes away as soon as nothing is in flight.
    fn ending(&self, quit: bool) -> bool {
        quit || !self.stopping.is_empty()
    }

    fn may_take(&self) -> bool {
        let wanted = if self.stopping.is_empty() {
            self.enabled
        } else {
            self.runner.unfinished() > 0
        };
        wanted && !self.runner.suspended() && !self.owner.is_broken()
    }
}

/// A source on its worker.
struct Held {
    source: Box<dyn Source>,
    interest: Interest,
    /// In `Worker::woken`.
    woken: bool,
}

struct Worker {
    epoll: Epoll,
    uring: Uring,
    commands: Receiver<Command>,
    /// The handle that others have; weak, or the pool's end could not be told from here.
    myself: Weak<WorkerHandle>,
    wake: Arc<OwnedFd>,
    pending: Arc<AtomicBool>,
    stats: Arc<WorkerStats>,
    /// Slab: the index is what epoll and io_uring know a queue by.
    queues: Vec<Option<Box<Queue>>>,
    free: Vec<usize>,
    keys: HashMap<u64, usize>,
    /// Queues to take requests from.
    ready: Vec<usize>,
    /// Queues with something to publish, or that may be done stopping.
    touched: Vec<usize>,
    /// Stopping queues whose last interrupt doesn't get through: until when, index, key.
    lingering: Vec<(Instant, usize, u64)>,
    sources: HashMap<u64, Held>,
    /// Sources to visit.
    woken: Vec<u64>,
    signals: Signals,
    timers: Vec<(Instant, Waker)>,
    /// The earliest of the timers' and the sources' deadlines.
    alarm: Option<Instant>,
    tokens: Vec<u64>,
    done: Vec<(u64, i32)>,
    quit: bool,
}

impl Worker {
    fn new(
        commands: Receiver<Command>,
        myself: Weak<WorkerHandle>,
        wake: Arc<OwnedFd>,
        pending: Arc<AtomicBool>,
        stats: Arc<WorkerStats>,
    ) -> Result<Self> {
        let os = |what| move |source| Error::Os { what, source };
        let epoll = Epoll::new().map_err(os("epoll_create1"))?;
        let uring = Uring::new(256).map_err(os("io_uring_setup (is io_uring forbidden here?)"))?;
        epoll.add(wake.as_raw_fd(), TOKEN_COMMANDS).map_err(os("epoll_ctl"))?;
        epoll.add(uring.fd(), TOKEN_URING).map_err(os("epoll_ctl"))?;
        Ok(Self {
            epoll,
            uring,
            commands,
            myself,
            wake,
            pending,
            stats,
            queues: Vec::new(),
            free: Vec::new(),
            keys: HashMap::new(),
            ready: Vec::new(),
            touched: Vec::new(),
            lingering: Vec::new(),
            sources: HashMap::new(),
            woken: Vec::new(),
            signals: Signals::default(),
            timers: Vec::new(),
            alarm: None,
            tokens: Vec::new(),
            done: Vec::new(),
            quit: false,
        })
    }

    fn run(&mut self) {
        let mut turn: u32 = 0;
        while !(self.quit && self.keys.is_empty()) {
            if self.pending.swap(false, Ordering::AcqRel) {
                self.handle_commands();
            }
            let idle =
                self.ready.is_empty() && self.touched.is_empty() && self.done.is_empty() && self.woken.is_empty();
            if idle {
                // What completions have queued since the turn's last submission.
                self.uring.submit();
            }
            if idle || turn.is_multiple_of(TURNS_PER_POLL) {
                // A submission the kernel would not take is tried again soon.
                let timeout = match (idle, self.uring.has_queued(), self.lingering.is_empty()) {
                    (false, ..) => 0,
                    (true, true, _) => 1,
                    (true, false, false) => 10,
                    (true, false, true) => self.until_alarm(),
                };
                self.poll(timeout);
                if self.alarm.is_some_and(|alarm| alarm <= Instant::now()) {
                    self.ring_alarm();
                }
            }
            turn = turn.wrapping_add(1);
            self.turn();
        }
    }

    fn poll(&mut self, timeout: i32) {
        let mut tokens = std::mem::take(&mut self.tokens);
        self.epoll.wait(timeout, &mut tokens);
        self.stats.wakeups.fetch_add(u64::from(timeout != 0), Ordering::Relaxed);
        for &token in &tokens {
            match token {
                TOKEN_COMMANDS => {
                    sys::eventfd_drain(self.wake.as_raw_fd());
                    self.pending.store(false, Ordering::Release);
                    self.handle_commands();
                }
                TOKEN_URING => {}
                token if token & TOKEN_SOURCES != 0 => self.wake_source(token & !TOKEN_SOURCES),
                token => {
                    let index = (token - TOKEN_QUEUES) as usize;
                    // A token may be of a queue that a command of this very turn has ended.
                    if let Some(Some(queue)) = self.queues.get_mut(index) {
                        if sys::eventfd_drain(queue.kick.as_raw_fd()) {
                            queue.runner.stats().kicked();
                        }
                        self.wake_queue(index);
                    }
                }
            }
        }
        self.tokens = tokens;
    }

    fn wake_queue(&mut self, index: usize) {
        if let Some(Some(queue)) = self.queues.get_mut(index) {
            if !queue.ready && queue.may_take() {
                queue.ready = true;
                self.ready.push(index);
            }
        }
    }

    fn touch(&mut self, index: usize) {
        if let Some(Some(queue)) = self.queues.get_mut(index) {
            if !queue.touched {
                queue.touched = true;
                self.touched.push(index);
            }
        }
    }

    /// Milliseconds until the next alarm; -1: there is none.
    fn until_alarm(&self) -> i32 {
        let Some(alarm) = self.alarm else { return -1 };
        let left = alarm.saturating_duration_since(Instant::now());
        // Rounded up: too early would be a wake-up for nothing.
        i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
    }

    /// Some deadline has passed: of timers, or of sources.
    fn ring_alarm(&mut self) {
        let now = Instant::now();
        let due: Vec<u64> = self
            .sources
            .iter()
            .filter(|(_, held)| held.source.deadline().is_some_and(|deadline| deadline <= now))
            .map(|(key, _)| *key)
            .collect();
        for key in due {
            self.wake_source(key);
        }
        let (due, later) = std::mem::take(&mut self.timers)
            .into_iter()
            .partition(|(deadline, _)| *deadline <= now);
        self.timers = later;
        for (_, then) in due {
            then();
        }
        let deadlines = self
            .sources
            .values()
            .filter(|held| !held.woken)
            .filter_map(|held| held.source.deadline());
        self.alarm = deadlines.chain(self.timers.iter().map(|(at, _)| *at)).min();
    }

    fn set_alarm(&mut self, at: Instant) {
        self.alarm = Some(self.alarm.map_or(at, |alarm| alarm.min(at)));
    }

    fn wake_source(&mut self, key: u64) {
        if let Some(held) = self.sources.get_mut(&key) {
            if !std::mem::replace(&mut held.woken, true) {
                self.woken.push(key);
            }
        }
    }

    /// Visits the sources that something has happened to.
    fn visit(&mut self) {
        let mut woken = std::mem::take(&mut self.woken);
        for key in woken.drain(..) {
            let Some(held) = self.sources.get_mut(&key) else {
                continue;
            };
            held.woken = false;
            let mut io = SourceIo {
                signals: &mut self.signals,
                uring: &mut self.uring,
            };
            let flow = catch_unwind(AssertUnwindSafe(|| held.source.ready(&mut io)));
            match flow {
                Ok(Flow::Wait) => {}
                Ok(Flow::Again) => {
                    held.woken = true;
                    self.woken.push(key);
                }
                Ok(Flow::End) => {
                    self.end_source(key);
                    continue;
                }
                Err(_) => {
                    log::error!("a bug in vhu_legacy: a connection's worker panicked; the connection is closed");
                    self.end_source(key);
                    continue;
                }
            }
            let interest = held.source.interest();
            if interest != held.interest {
                held.interest = interest;
                self.epoll
                    .change(held.source.fd(), TOKEN_SOURCES | key, interest.read, interest.write);
            }
            if let Some(deadline) = held.source.deadline() {
                self.set_alarm(deadline);
            }
        }
        // Keeps the allocation.
        woken.append(&mut self.woken);
        self.woken = woken;
    }

    fn add_source(&mut self, key: u64, mut source: Box<dyn Source>) {
        let interest = source.interest();
        let added = if source.edge() {
            self.epoll.add_edge(source.fd(), TOKEN_SOURCES | key)
        } else {
            self.epoll
                .add_for(source.fd(), TOKEN_SOURCES | key, interest.read, interest.write)
        };
        if self.quit || added.is_err() {
            source.end();
            return;
        }
        self.sources.insert(
            key,
            Held {
                source,
                interest,
                woken: false,
            },
        );
        self.wake_source(key);
    }

    fn end_source(&mut self, key: u64) {
        if let Some(mut held) = self.sources.remove(&key) {
            self.epoll.remove(held.source.fd());
            if catch_unwind(AssertUnwindSafe(|| held.source.end())).is_err() {
                log::error!("a bug in vhu_legacy: closing a connection panicked");
            }
        }
    }

    /// One round over the busy queues.
    fn turn(&mut self) {
        self.stats.turns.fetch_add(1, Ordering::Relaxed);
        if !self.woken.is_empty() {
            self.visit();
        }
        let mut ready = std::mem::take(&mut self.ready);
        for &index in &ready {
            self.take(index);
        }
        self.uring.submit();
        self.reap();
        let mut touched = std::mem::take(&mut self.touched);
        for &index in &touched {
            self.settle(index);
        }
        touched.clear();
        if self.touched.is_empty() {
            self.touched = touched;
        }
        // The interrupts, and what completions have started. Interrupts end at once, as a rule.
        self.uring.submit();
        self.reap();
        if !self.lingering.is_empty() {
            self.give_up();
        }
        let alone = ready.len() == 1 && self.ready.is_empty() && self.touched.is_empty();
        ready.retain(|&index| self.rest(index, alone));
        // Queues woken meanwhile were pushed to self.ready.
        ready.append(&mut self.ready);
        self.ready = ready;
    }

    fn take(&mut self, index: usize) {
        let Some(Some(queue)) = self.queues.get_mut(index) else {
            return;
        };
        if !queue.may_take() {
            return;
        }
        let uring = &mut self.uring;
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            queue.runner.disable_notification();
            queue.runner.take(uring)
        }));
        Self::judge(queue, outcome);
        self.touch(index);
    }

    /// Moves completions from the kernel to their queues.
    fn reap(&mut self) {
        let mut done = std::mem::take(&mut self.done);
        self.uring.reap(&mut done);
        let mut copies = COPIES;
        done.retain(|&(user_data, result)| {
            let index = Runner::number_of(user_data);
            if index >= SIGNALS {
                self.signals.ended(index, result, &mut self.uring);
                return false;
            }
            let queue = self.queues.get(index).and_then(Option::as_deref);
            if queue.is_some_and(|queue| queue.runner.is_copy(user_data)) {
                if copies == 0 {
                    return true;
                }
                copies -= 1;
            }
            self.complete(user_data, result);
            false
        });
        // Copies beyond the turn's share, for the next.
        self.done.append(&mut done);
    }

    fn complete(&mut self, user_data: u64, result: i32) {
        let index = Runner::number_of(user_data);
        let Some(Some(queue)) = self.queues.get_mut(index) else {
            return;
        };
        let uring = &mut self.uring;
        let before = queue.runner.in_flight();
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            queue.runner.complete(user_data, result, uring);
            Ok(0)
        }));
        if outcome.is_err() {
            queue.runner.abandon(before);
        }
        Self::judge(queue, outcome);
        if queue.runner.in_flight() != before {
            // There is something to publish, and slots are free again: a driver with more in flight than its ring
            // holds may go on.
            self.touch(index);
            self.wake_queue(index);
        } else if queue.ending(self.quit) {
            self.touch(index);
        }
    }

    /// Publishes what a queue has done; ends it when it was stopping and nothing is left.
    ///
    /// A broken member's requests are still answered when they end: its position stays consistent, and whoever goes on
    /// from there meets the same fault again instead of a hole.
    fn settle(&mut self, index: usize) {
        let quit = self.quit;
        let Some(Some(queue)) = self.queues.get_mut(index) else {
            return;
        };
        queue.touched = false;
        let uring = &mut self.uring;
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            queue.runner.publish(uring);
            Ok(0)
        }));
        Self::judge(queue, outcome);
        if let Some(fault) = queue.runner.lost() {
            queue.owner.break_it(fault);
        }
        if queue.ending(quit) && queue.runner.in_flight() == 0 && !queue.may_take() {
            if queue.runner.idle() {
                self.end(index);
            } else if !queue.lingering {
                // Its last interrupt is under way. That takes no time, unless the front end has filled its eventfd.
                queue.lingering = true;
                self.lingering.push((Instant::now() + LINGER, index, queue.key));
            }
        }
    }

    /// Gives up interrupts of stopping queues that didn't get through.
    fn give_up(&mut self) {
        let now = Instant::now();
        let mut lingering = std::mem::take(&mut self.lingering);
        lingering.retain(|&(deadline, index, key)| {
            let Some(Some(queue)) = self.queues.get_mut(index) else {
                return false;
            };
            if queue.key != key {
                return false;
            }
            if deadline <= now {
                queue.runner.give_up(&mut self.uring);
                // Another one that starts now gets its own time.
                queue.lingering = false;
                return false;
            }
            true
        });
        self.lingering = lingering;
    }

    /// Decides whether a queue stays in `ready`: true when there is more to take. `alone`: nobody else is ready.
    fn rest(&mut self, index: usize, alone: bool) -> bool {
        let alone = alone && !self.pending.load(Ordering::Relaxed);
        let Some(Some(queue)) = self.queues.get_mut(index) else {
            return false;
        };
        let more = queue.may_take() && {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                Ok(u16::from(
                    queue.runner.keep_looking(alone) || queue.runner.enable_notification(),
                ))
            }));
            Self::judge(queue, outcome) == 1
        };
        queue.ready = more;
        more
    }

    /// Breaks the member when the driver (or we) did wrong; what was returned otherwise.
    fn judge(queue: &mut Queue, outcome: std::thread::Result<std::result::Result<u16, Fault>>) -> u16 {
        match outcome {
            Ok(Ok(value)) => value,
            Ok(Err(fault)) => {
                queue.owner.break_it(queue.runner.explain(fault));
                0
            }
            Err(_) => {
                // The panic's message is on stderr. The member is the only thing whose state can be wrong.
                let fault = Fault::new("internal.panic", "a bug in vhu_legacy; see the log");
                queue.owner.break_it(fault.on_queue(queue.runner.index()));
                0
            }
        }
    }

    fn handle_commands(&mut self) {
        for _ in 0..COMMANDS_PER_TURN {
            let Ok(command) = self.commands.try_recv() else { return };
            self.handle(command);
        }
        // There may be more: in the next turn, which doesn't wait.
        self.pending.store(true, Ordering::Release);
        sys::eventfd_signal(&self.wake);
    }

    fn index_of(&self, key: u64) -> Option<usize> {
        self.keys.get(&key).copied()
    }

    fn queue(&mut self, key: u64) -> Option<(usize, &mut Queue)> {
        let index = self.index_of(key)?;
        self.queues.get_mut(index)?.as_deref_mut().map(|queue| (index, queue))
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Start(key, start) => self.begin(key, *start),
            Command::Stop(key, done) => {
                if let Some((index, queue)) = self.queue(key) {
                    queue.stopping.push(done);
                    queue.runner.close();
                    self.touch(index);
                    self.wake_queue(index);
                }
            }
            Command::Enable(key, on, _done) => {
                if let Some((index, queue)) = self.queue(key) {
                    queue.enabled = on;
                    // What was notified while it was disabled has been drained: look at the ring.
                    self.wake_queue(index);
                }
            }
            Command::SetCall(key, call, _done) => {
                if let Some(index) = self.index_of(key) {
                    if let Some(Some(queue)) = self.queues.get_mut(index) {
                        queue.runner.set_call(call, &mut self.uring);
                    }
                }
            }
            Command::Rewire(key, call) => {
                let call = call.lock().unwrap_or_else(PoisonError::into_inner).take();
                if let (Some(index), Some(call)) = (self.index_of(key), call) {
                    if let Some(Some(queue)) = self.queues.get_mut(index) {
                        queue.runner.set_call(call, &mut self.uring);
                    }
                }
            }
            Command::SetKick(key, kick, _done) => {
                if let Some(index) = self.index_of(key) {
                    if let Some(Some(queue)) = self.queues.get_mut(index) {
                        self.epoll.remove(queue.kick.as_raw_fd());
                        queue.kick = kick;
                        let added = self.epoll.add_edge(queue.kick.as_raw_fd(), TOKEN_QUEUES + index as u64);
                        if let Err(e) = added {
                            queue.owner.break_it(kick_fault(queue.runner.index(), &e));
                        }
                    }
                    self.wake_queue(index);
                }
            }
            Command::Resume(key, slot) => {
                if let Some(index) = self.index_of(key) {
                    self.complete(Runner::user_data(index, slot), 0);
                }
            }
            Command::Look(key) => {
                if let Some(index) = self.index_of(key) {
                    self.wake_queue(index);
                }
            }
            Command::SetMemory(key, map, _done) => {
                if let Some((index, queue)) = self.queue(key) {
                    if let Err(fault) = queue.runner.set_memory(map) {
                        queue.owner.break_it(fault);
                    }
                    self.wake_queue(index);
                }
            }
            Command::SetFeatures(key, features, _done) => {
                if let Some((index, queue)) = self.queue(key) {
                    queue.runner.set_features(features);
                    self.wake_queue(index);
                }
            }
            Command::SetLog(key, log, _done) => {
                if let Some((_, queue)) = self.queue(key) {
                    queue.runner.set_log(log);
                }
            }
            Command::AddSource(key, source) => self.add_source(key, source),
            Command::WakeSource(key) => self.wake_source(key),
            Command::RemoveSource(key, _done) => self.end_source(key),
            Command::Timer(at, then) => {
                self.timers.push((at, then));
                self.set_alarm(at);
            }
            Command::Quit => {
                self.quit = true;
                let keys: Vec<u64> = self.sources.keys().copied().collect();
                for key in keys {
                    self.end_source(key);
                }
                self.timers.clear();
                self.signals.cancel(&mut self.uring);
                for index in 0..self.queues.len() {
                    if let Some(Some(queue)) = self.queues.get_mut(index) {
                        queue.enabled = false;
                    }
                    self.touch(index);
                }
            }
        }
    }

    fn begin(&mut self, key: u64, mut start: Start) {
        if self.quit {
            self.stats.queues.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        let index = self.free.pop().unwrap_or_else(|| {
            self.queues.push(None);
            self.queues.len() - 1
        });
        if let Err(e) = self.epoll.add_edge(start.kick.as_raw_fd(), TOKEN_QUEUES + index as u64) {
            start.owner.break_it(kick_fault(start.runner.index(), &e));
        }
        start.runner.set_tag(index);
        start.runner.set_wakers(self.wakers(key));
        start.runner.remind(&mut self.uring);
        self.keys.insert(key, index);
        self.queues[index] = Some(Box::new(Queue {
            key,
            owner: start.owner,
            runner: start.runner,
            kick: start.kick,
            enabled: start.enabled,
            stopping: Vec::new(),
            lingering: false,
            ready: false,
            touched: false,
        }));
        // Look at once: a driver may have kicked before we had the eventfd, or an earlier back end has died with the
        // kick.
        self.wake_queue(index);
    }

    /// Requests of a queue that wait are woken by a command to this worker.
    fn wakers(&self, key: u64) -> WakerFactory {
        let myself = Weak::clone(&self.myself);
        Arc::new(move |slot| {
            let myself = Weak::clone(&myself);
            Box::new(move || {
                if let Some(worker) = myself.upgrade() {
                    worker.send(Command::Resume(key, slot));
                }
            })
        })
    }

    fn end(&mut self, index: usize) {
        if let Some(queue) = self.queues[index].take() {
            self.epoll.remove(queue.kick.as_raw_fd());
            self.keys.remove(&queue.key);
            self.free.push(index);
            self.stats.queues.fetch_sub(1, Ordering::Relaxed);
            let Queue { runner, stopping, .. } = *queue;
            // The ring's memory is let go of before anybody is told.
            drop(runner);
            drop(stopping);
        }
    }
}

fn kick_fault(queue: u16, error: &std::io::Error) -> Fault {
    Fault::new("vring.kick", format!("the kick fd can't be watched: {error}")).on_queue(queue)
}
