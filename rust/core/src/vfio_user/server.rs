// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A PCI function on a listening socket: one client at a time, all on the worker pool.
//!
//! Two sources: the listener, and the client's connection while there is one. The connection makes all calls into the
//! function, so the function sees one thread.
//!
//! A visit to a connection does a bounded amount of work, in this order: go on with a deferred command, send, take a
//! message, receive. It receives at most once, and only when everything received before has been handled; so an access of a
//! guest's is one receive and one send. While output is pending, nothing more is taken: a client that doesn't read is asked
//! for nothing, and holds up only itself.
//!
//! Each message is sent by a system call of its own. The kernel may take part of it only, and QEMU gives up a connection on
//! which it sees part of a header; a message of its own begins with a header that the kernel takes as a whole.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::dma::Link;
use super::function::{IrqChange, PciFunction, IRQ_INTX};
use super::session::{count, Context, Counters, Outcome, Session, UnmaskFd};
use super::stream::{Input, Received};
use super::wire::{self, Kind};
use crate::error::{Error, Fault, Result};
use crate::event::{Completion, Event, Events, Waker};
use crate::memory::RemoteMemory;
use crate::sys::{self, PeerFd};
use crate::worker::{Flow, Interest, Pool, Source, SourceHandle, SourceIo};

/// How long a client waits for the answer to a command that the function can't end at once. QEMU gives up after five
/// seconds, and a late reply then breaks its connection for good.
pub const DEADLINE: Duration = Duration::from_millis(800);
/// How long a client may take to say which version it speaks: while it says nothing nobody else can have the function.
pub const GREETING: Duration = Duration::from_secs(5);
/// Messages of one visit.
const BATCH: u32 = 32;
/// Bytes of messages after which a visit takes no more.
const BATCH_BYTES: usize = 64 << 10;
/// Connections accepted in one visit.
const ACCEPTS: u32 = 16;
/// How long to wait when there are no fds left to accept with.
const RETRY: Duration = Duration::from_millis(100);
/// A buffer larger than this is given back after use.
const LARGE: usize = 64 << 10;
/// At most one log line about clients in this time.
const QUIET: Duration = Duration::from_secs(1);

/// A client's socket. Fds may be queued in it that nobody has looked at, so it isn't closed on a worker.
struct Socket(Option<OwnedFd>);

impl Socket {
    fn raw(&self) -> RawFd {
        self.0.as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        drop(self.0.take().map(PeerFd::from));
    }
}

/// Who the function belongs to.
enum Client {
    /// Nobody.
    None,
    /// A client that is connected.
    Connected {
        line: SourceHandle,
        socket: Arc<Socket>,
        pid: Option<i32>,
        /// The function is attached.
        attached: bool,
    },
    /// A client that has left, but not everything of it has ended.
    Leaving,
}

struct State {
    client: Client,
    closed: bool,
    /// Why the client is sent away.
    reason: Option<String>,
    /// Who waits for the client's end.
    waiting: Vec<Completion>,
    /// Last time something was logged, and how much wasn't since.
    logged: Option<Instant>,
    unsaid: u64,
}

struct Shared {
    function: Arc<dyn PciFunction>,
    events: Arc<Events>,
    listener: OnceLock<SourceHandle>,
    state: Mutex<State>,
    counters: Arc<Counters>,
    connections: AtomicU64,
    refused: AtomicU64,
}

/// What to do with whoever wants to connect.
enum Admission {
    Admit,
    Refuse,
    /// The last client has left, or will be seen to have: wait until everything of it has ended.
    Hold,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn admission(&self) -> Admission {
        let state = self.lock();
        match &state.client {
            _ if state.closed => Admission::Refuse,
            Client::None => Admission::Admit,
            // Its end and the next client's coming are seen by two workers, in any order.
            Client::Connected { socket, .. } if sys::look(socket.raw()).hung_up => Admission::Hold,
            Client::Connected { .. } => Admission::Refuse,
            Client::Leaving => Admission::Hold,
        }
    }

    /// The function could not be attached, or everything of the last client has ended.
    fn free(&self) {
        let waiting = {
            let mut state = self.lock();
            state.client = Client::None;
            state.reason = None;
            std::mem::take(&mut state.waiting)
        };
        if let Some(listener) = self.listener.get() {
            listener.wake();
        }
        drop(waiting);
    }

    /// Logs what a client did wrong, not more often than anybody wants to read.
    fn complain(&self, what: &str) {
        let mut state = self.lock();
        let now = Instant::now();
        if state.logged.is_some_and(|last| now - last < QUIET) {
            state.unsaid += 1;
            return;
        }
        state.logged = Some(now);
        let unsaid = std::mem::take(&mut state.unsaid);
        drop(state);
        let label = self.function.label();
        if unsaid == 0 {
            log::warn!("{label}: {what}");
        } else {
            log::warn!("{label}: {what} (and {unsaid} more)");
        }
    }
}

/// What the server has been doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// A client is connected.
    pub connected: bool,
    /// Its process.
    pub peer_pid: Option<i32>,
    /// Clients so far.
    pub connections: u64,
    /// Clients sent away because there was another, here or at another socket of the member.
    pub refused: u64,
    /// Commands taken.
    pub messages: u64,
    /// Region reads.
    pub reads: u64,
    /// Region writes.
    pub writes: u64,
    /// Commands that failed, and connections that broke the protocol.
    pub errors: u64,
}

/// A function being served.
pub struct Server {
    shared: Arc<Shared>,
    listener: SourceHandle,
}

impl Server {
    /// Serves `function` on a listening UNIX stream socket.
    ///
    /// # Errors
    /// [`Error::Invalid`] for another kind of fd, [`Error::Os`].
    pub fn new(pool: &Arc<Pool>, function: Arc<dyn PciFunction>, listener: OwnedFd) -> Result<Arc<Self>> {
        let listener = Socket(Some(listener));
        let fits = |fd: &OwnedFd| {
            if !sys::is_unix_listener(fd) {
                let reason = "a vfio-user server needs a listening stream socket of the UNIX family";
                return Err(Error::Invalid(reason.into()));
            }
            sys::set_nonblocking(fd).map_err(|source| Error::Os { what: "fcntl", source })
        };
        listener.0.as_ref().map_or(Ok(()), fits)?;
        let shared = Arc::new(Shared {
            function,
            events: Arc::clone(pool.events()),
            listener: OnceLock::new(),
            state: Mutex::new(State {
                client: Client::None,
                closed: false,
                reason: None,
                waiting: Vec::new(),
                logged: None,
                unsaid: 0,
            }),
            counters: Arc::default(),
            connections: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        });
        let listener = pool.add_source(|line| {
            // The first of all.
            let _ = shared.listener.set(line);
            Box::new(Listener {
                shared: Arc::clone(&shared),
                pool: Arc::clone(pool),
                socket: listener,
                retry: None,
                holding: false,
            })
        });
        Ok(Arc::new(Self { shared, listener }))
    }

    /// What it has been doing.
    pub fn statistics(&self) -> Statistics {
        let (connected, peer_pid) = match &self.shared.lock().client {
            Client::Connected {
                pid, attached: true, ..
            } => (true, *pid),
            _ => (false, None),
        };
        let Shared {
            counters,
            connections,
            refused,
            ..
        } = &*self.shared;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Statistics {
            connected,
            peer_pid,
            connections: get(connections),
            refused: get(refused),
            messages: get(&counters.messages),
            reads: get(&counters.reads),
            writes: get(&counters.writes),
            errors: get(&counters.errors),
        }
    }

    /// Sends the client away, if there is one; the next may come.
    pub fn disconnect(&self, reason: &str) {
        self.send_away(reason, Completion::call(|| ()));
    }

    fn send_away(&self, reason: &str, done: Completion) {
        let line = {
            let mut state = self.shared.lock();
            let line = match &state.client {
                Client::None => return,
                Client::Leaving => None,
                Client::Connected { line, .. } => Some(line.clone()),
            };
            state.waiting.push(done.clone());
            if line.is_some() {
                state.reason.get_or_insert_with(|| reason.to_owned());
            }
            line
        };
        if let Some(line) = line {
            line.remove(done);
        }
    }

    /// Stops listening and sends the client away. `done` ends when the listening socket is closed and everything of the
    /// client has ended. Idempotent.
    pub fn close(&self, done: Completion) {
        self.shared.lock().closed = true;
        self.listener.remove(done.clone());
        self.send_away("the server was closed", done);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.close(Completion::call(|| ()));
    }
}

struct Listener {
    shared: Arc<Shared>,
    pool: Arc<Pool>,
    socket: Socket,
    /// There were no fds left; try again then.
    retry: Option<Instant>,
    /// Nobody is accepted until we are woken.
    holding: bool,
}

impl Listener {
    fn admit(&self, socket: OwnedFd) {
        let pid = sys::peer_pid(&socket);
        let socket = Arc::new(Socket(Some(socket)));
        // Held until the source has been handed over: whoever finds the client here and removes it must not be faster than
        // that.
        let mut state = self.shared.lock();
        self.pool.add_source(|line| {
            let (shared, pool) = (Arc::clone(&self.shared), Arc::clone(&self.pool));
            let mut connection = Connection::new(shared, pool, line.clone(), Arc::clone(&socket), pid);
            if state.closed {
                // Meanwhile. It is gone before it begins.
                connection.phase = Phase::Ended;
            } else {
                state.client = Client::Connected {
                    line,
                    socket,
                    pid,
                    attached: false,
                };
            }
            Box::new(connection)
        });
    }
}

impl Source for Listener {
    fn fd(&self) -> RawFd {
        self.socket.raw()
    }

    fn interest(&self) -> Interest {
        Interest {
            read: self.retry.is_none() && !self.holding,
            write: false,
        }
    }

    fn ready(&mut self, _io: &mut SourceIo<'_>) -> Flow {
        self.retry = None;
        self.holding = false;
        let Some(listener) = &self.socket.0 else {
            return Flow::End;
        };
        for _ in 0..ACCEPTS {
            let admission = self.shared.admission();
            if matches!(admission, Admission::Hold) {
                self.holding = true;
                return Flow::Wait;
            }
            match (sys::accept(listener), admission) {
                (Ok(socket), Admission::Admit) => self.admit(socket),
                (Ok(socket), _) => {
                    count(&self.shared.refused);
                    drop(Socket(Some(socket)));
                }
                (Err(e), _) => match e.raw_os_error() {
                    Some(libc::EAGAIN) => return Flow::Wait,
                    // Whoever it was is gone already.
                    Some(libc::ECONNABORTED | libc::EINTR) => {}
                    _ => {
                        self.shared.complain(&format!("accepting a client: {e}"));
                        self.retry = Some(Instant::now() + RETRY);
                        return Flow::Wait;
                    }
                },
            }
        }
        Flow::Again
    }

    fn deadline(&self) -> Option<Instant> {
        self.retry
    }

    fn end(&mut self) {
        if let Some(socket) = &self.socket.0 {
            // It is closed on another thread, later; nobody shall get in until then.
            sys::shut_down(socket);
        }
    }
}

/// Why a connection ends.
enum End {
    /// The client left.
    Left,
    /// It left in the middle of a message.
    Torn,
    /// It broke the protocol.
    Fault(Fault),
}

impl From<Fault> for End {
    fn from(fault: Fault) -> Self {
        End::Fault(fault)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Not attached yet.
    New,
    Attached,
    Ended,
}

/// A deferred command, seen from the connection.
#[derive(Clone, Copy)]
struct Parked {
    /// Its client waits since then.
    since: Instant,
}

/// What a connection lends to its session.
struct Lender {
    pool: Arc<Pool>,
    line: SourceHandle,
    remote: Arc<dyn RemoteMemory>,
    /// The latest ticket that a waker was called for.
    called: Arc<AtomicU64>,
}

impl Lender {
    /// For a call that may defer something; wakers are for `ticket`.
    fn lend(&self, ticket: u64, act: impl FnOnce(&Context<'_>) -> Outcome) -> Outcome {
        let wake = || -> Waker {
            let (line, called) = (self.line.clone(), Arc::clone(&self.called));
            Box::new(move || {
                called.fetch_max(ticket, Ordering::AcqRel);
                line.wake();
            })
        };
        act(&Context {
            mappings: self.pool.mappings(),
            remote: &self.remote,
            wake: &wake,
        })
    }
}

struct Connection {
    shared: Arc<Shared>,
    lender: Lender,
    socket: Arc<Socket>,
    pid: Option<i32>,
    phase: Phase,
    reason: Option<String>,
    session: Session,
    link: Arc<Link>,
    input: Input,
    /// There may be more to receive than the last receive has brought.
    more: bool,
    /// The message being sent, from `sent` on.
    output: Vec<u8>,
    /// What goes with its first byte.
    output_fd: Option<Arc<OwnedFd>>,
    sent: usize,
    /// The session's reply is to be sent.
    reply: bool,
    /// The connection ends when everything was sent.
    last: Option<Fault>,
    parked: Option<Parked>,
    /// Counts what may be deferred; a waker calls for the one it was made for.
    ticket: u64,
    /// When it began.
    since: Instant,
    /// When what is in `input` came.
    received: Instant,
    /// What is received next came then, or may have.
    waited: Option<Instant>,
    signals: Vec<Arc<OwnedFd>>,
    unmask: Option<SourceHandle>,
    unmasked: Arc<AtomicBool>,
}

impl Connection {
    fn new(shared: Arc<Shared>, pool: Arc<Pool>, line: SourceHandle, socket: Arc<Socket>, pid: Option<i32>) -> Self {
        let link = Arc::new(Link::new(line.clone()));
        Self {
            session: Session::new(Arc::clone(&shared.function), Arc::clone(&shared.counters)),
            shared,
            lender: Lender {
                pool,
                line,
                remote: Arc::clone(&link) as Arc<dyn RemoteMemory>,
                called: Arc::new(AtomicU64::new(0)),
            },
            socket,
            pid,
            phase: Phase::New,
            reason: None,
            link,
            input: Input::default(),
            more: false,
            output: Vec::new(),
            output_fd: None,
            sent: 0,
            reply: false,
            last: None,
            parked: None,
            ticket: 0,
            since: Instant::now(),
            received: Instant::now(),
            waited: None,
            signals: Vec::new(),
            unmask: None,
            unmasked: Arc::new(AtomicBool::new(false)),
        }
    }

    /// Makes the function ours; false when somebody else has it.
    fn attach(&mut self) -> bool {
        if let Err(error) = self.shared.function.attach(self.lender.line.clone()) {
            log::debug!("{}: {error}", self.shared.function.label());
            count(&self.shared.refused);
            return false;
        }
        self.phase = Phase::Attached;
        count(&self.shared.connections);
        if let Client::Connected { attached, .. } = &mut self.shared.lock().client {
            *attached = true;
        }
        self.shared.events.push(Event::FunctionConnected {
            member: self.shared.function.member_id(),
            function: self.shared.function.kind(),
            peer_pid: self.pid,
        });
        true
    }

    /// Whether no command may be taken at present.
    fn is_held_up(&self) -> bool {
        self.parked.is_some() || !self.output.is_empty()
    }

    fn visit(&mut self) -> std::result::Result<Flow, End> {
        let mut messages = BATCH;
        let mut bytes = BATCH_BYTES;
        let mut receives = 1;
        let mut moved = false;
        loop {
            if let Some(parked) = self.parked {
                if self.go_on(parked) {
                    moved = true;
                    messages = messages.saturating_sub(1);
                    if messages == 0 {
                        return Ok(Flow::Again);
                    }
                    continue;
                }
            }
            self.flush()?;
            let held_up = self.is_held_up();
            if held_up {
                // A client with answers to give is listened to: it may have to get rid of them before it reads, and what
                // is deferred may wait for them. Of any other it is enough to know whether it is there.
                if !self.link.is_waiting() {
                    if !moved && sys::look(self.socket.raw()).hung_up {
                        return Err(End::Left);
                    }
                    return Ok(Flow::Wait);
                }
            } else {
                if let Some(fault) = self.last.take() {
                    return Err(fault.into());
                }
                if self.unmask.is_some() && self.unmasked.swap(false, Ordering::AcqRel) {
                    // It has nobody to tell.
                    let _ = self.shared.function.set_irqs(IrqChange::Unmask {
                        index: IRQ_INTX,
                        start: 0,
                        count: 1,
                    });
                }
                if messages == 0 || bytes == 0 {
                    return Ok(Flow::Again);
                }
                if let Some(size) = self.take()? {
                    moved = true;
                    messages -= 1;
                    bytes = bytes.saturating_sub(size);
                    continue;
                }
            }
            if receives == 0 {
                self.expect_greeting()?;
                return Ok(if self.more { Flow::Again } else { Flow::Wait });
            }
            receives -= 1;
            self.more = false;
            match self.input.receive(self.socket.raw())? {
                Received::Nothing => {
                    self.expect_greeting()?;
                    return Ok(Flow::Wait);
                }
                Received::End if self.input.is_torn() => return Err(End::Torn),
                Received::End => return Err(End::Left),
                // Only while held up.
                Received::Full if sys::look(self.socket.raw()).hung_up => return Err(End::Left),
                Received::Full => return Ok(Flow::Wait),
                Received::Some { more } => {
                    self.more = more;
                    self.received = self.waited.take().unwrap_or_else(Instant::now);
                }
            }
            if held_up {
                let link = &self.link;
                self.input.scan(|header, body| match header.kind() {
                    Kind::Reply => link.answer(header, body),
                    _ => Ok(()),
                })?;
                self.input.drop_seen();
            }
        }
    }

    /// Whether the client has said which version it speaks, or still has time for it.
    fn expect_greeting(&self) -> std::result::Result<(), End> {
        if self.session.agreed().is_none() && Instant::now() >= self.since + GREETING {
            let reason = format!("no version within {GREETING:?}");
            return Err(Fault::new("message.version", reason).into());
        }
        Ok(())
    }

    /// Goes on with a deferred command, if it can or must; false when there is nothing to do about it now.
    fn go_on(&mut self, parked: Parked) -> bool {
        let called = self.lender.called.load(Ordering::Acquire) >= self.ticket;
        if !called && Instant::now() < parked.since + DEADLINE {
            return false;
        }
        self.ticket += 1;
        let session = &mut self.session;
        let outcome = self.lender.lend(self.ticket, |context| {
            if called {
                session.resume(context)
            } else {
                session.expire(context)
            }
        });
        self.parked = None;
        self.apply(outcome, parked.since);
        if self.parked.is_none() && sys::look(self.socket.raw()).readable {
            // It may have waited as long as this one.
            self.waited = Some(parked.since);
        }
        true
    }

    /// Takes the next message, if it is there; its size.
    fn take(&mut self) -> std::result::Result<Option<usize>, End> {
        if self.input.message().is_none() {
            return Ok(None);
        }
        let fds = self.input.take_fds();
        let Some((header, body, seen)) = self.input.message() else {
            return Ok(None);
        };
        match header.kind() {
            Kind::Command => {
                self.ticket += 1;
                let session = &mut self.session;
                let outcome = self
                    .lender
                    .lend(self.ticket, |context| session.handle(&header, body, fds, context));
                self.apply(outcome, self.received);
                self.follow(header.command);
            }
            Kind::Reply if seen => {}
            Kind::Reply if fds.is_empty() => self.link.answer(&header, body)?,
            Kind::Reply => return Err(Fault::new("message.fds", "fds with a reply").into()),
            Kind::Unknown => {
                let reason = format!("command {} with flags {:#x}", header.command, header.flags);
                return Err(Fault::new("message.type", reason).into());
            }
        }
        let size = header.size as usize;
        self.input.consume(size);
        Ok(Some(size))
    }

    fn apply(&mut self, outcome: Outcome, since: Instant) {
        match outcome {
            Outcome::Silent => {}
            Outcome::Reply => self.reply = true,
            Outcome::Last(fault) => {
                self.reply = !self.session.reply().is_empty();
                self.last = Some(fault);
            }
            Outcome::Deferred => self.parked = Some(Parked { since }),
        }
    }

    /// What a command has changed that isn't the session's.
    fn follow(&mut self, command: u16) {
        if command == wire::command::VERSION {
            if let Some(agreed) = self.session.agreed() {
                self.link.open(agreed.max_data);
            }
        }
        if command == wire::command::DEVICE_SET_IRQS {
            match self.session.take_unmask() {
                None => {}
                Some(UnmaskFd::Clear) => self.drop_unmask(),
                Some(UnmaskFd::Set(fd)) => {
                    self.drop_unmask();
                    let (raised, line) = (Arc::clone(&self.unmasked), self.lender.line.clone());
                    self.unmask = Some(self.lender.pool.add_source(|_| Box::new(Unmask { fd, raised, line })));
                }
            }
        }
    }

    fn drop_unmask(&mut self) {
        if let Some(unmask) = self.unmask.take() {
            unmask.remove(Completion::call(|| ()));
        }
    }

    /// Sends as much as goes.
    fn flush(&mut self) -> std::result::Result<(), End> {
        loop {
            if self.output.is_empty() {
                if self.reply {
                    self.reply = false;
                    std::mem::swap(&mut self.output, self.session.reply());
                    self.output_fd = self.session.take_reply_fd();
                } else if !self.link.next_message(&mut self.output) {
                    return Ok(());
                }
            }
            while let Some(rest) = self.output.get(self.sent..).filter(|rest| !rest.is_empty()) {
                let sent = match &self.output_fd {
                    Some(fd) => sys::send_with_fd(self.socket.raw(), rest, fd),
                    None => sys::send(self.socket.raw(), rest),
                };
                match sent {
                    Ok(bytes) => {
                        self.sent += bytes;
                        self.output_fd = None;
                    }
                    Err(e) => match e.raw_os_error() {
                        Some(libc::EAGAIN) => return Ok(()),
                        Some(libc::EINTR) => {}
                        Some(libc::EPIPE | libc::ECONNRESET) => return Err(End::Left),
                        _ => return Err(Fault::new("connection", e.to_string()).into()),
                    },
                }
            }
            self.sent = 0;
            self.output.clear();
            if self.output.capacity() > LARGE {
                self.output = Vec::new();
            }
        }
    }
}

impl Source for Connection {
    fn fd(&self) -> RawFd {
        self.socket.raw()
    }

    fn interest(&self) -> Interest {
        Interest {
            read: !self.is_held_up() || (self.link.is_waiting() && self.input.has_room()),
            write: !self.output.is_empty(),
        }
    }

    fn ready(&mut self, io: &mut SourceIo<'_>) -> Flow {
        if self.phase == Phase::Ended || (self.phase == Phase::New && !self.attach()) {
            return Flow::End;
        }
        match self.visit() {
            Ok(flow) => {
                self.shared.function.take_signals(&mut self.signals);
                for fd in self.signals.drain(..) {
                    io.signal(&fd);
                }
                flow
            }
            Err(end) => {
                let reason = match end {
                    End::Left => "the client has left".to_owned(),
                    End::Torn => "the client has left in the middle of a message".to_owned(),
                    End::Fault(fault) => {
                        count(&self.shared.counters.errors);
                        let reason = fault.to_string();
                        self.shared.complain(&format!("connection closed: {reason}"));
                        reason
                    }
                };
                self.reason = Some(reason);
                Flow::End
            }
        }
    }

    fn deadline(&self) -> Option<Instant> {
        match self.parked {
            Some(parked) => Some(parked.since + DEADLINE),
            // One that doesn't read the answer either can't be told apart from one that is slow.
            None if self.session.agreed().is_none() && self.output.is_empty() => Some(self.since + GREETING),
            None => None,
        }
    }

    fn end(&mut self) {
        let phase = std::mem::replace(&mut self.phase, Phase::Ended);
        if phase == Phase::Ended {
            return;
        }
        if let Some(socket) = &self.socket.0 {
            sys::shut_down(socket);
        }
        self.link.close();
        self.drop_unmask();
        self.input = Input::default();
        if phase == Phase::New {
            self.shared.free();
            return;
        }
        self.session.abandon();
        let reason = {
            let mut state = self.shared.lock();
            state.client = Client::Leaving;
            let asked = state.reason.take();
            asked.or(self.reason.take())
        };
        let shared = Arc::clone(&self.shared);
        self.shared.function.detach(Completion::call(move || {
            shared.events.push(Event::FunctionDisconnected {
                member: shared.function.member_id(),
                function: shared.function.kind(),
                reason: reason.unwrap_or_else(|| "the connection was closed".to_owned()),
            });
            shared.free();
        }));
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // A pool that is closed drops what it is given.
        self.end();
    }
}

/// Watches the eventfd by which KVM says that a guest has ended an INTx.
///
/// A client can make one that is always readable. It then costs as much as one that goes on sending messages: turns of two
/// workers, between those of everybody else.
struct Unmask {
    fd: OwnedFd,
    raised: Arc<AtomicBool>,
    line: SourceHandle,
}

impl Source for Unmask {
    fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    fn interest(&self) -> Interest {
        Interest {
            read: true,
            write: false,
        }
    }

    fn ready(&mut self, _io: &mut SourceIo<'_>) -> Flow {
        if sys::eventfd_drain(self.fd.as_raw_fd()) {
            self.raised.store(true, Ordering::Release);
            self.line.wake();
        }
        Flow::Wait
    }

    fn deadline(&self) -> Option<Instant> {
        None
    }

    fn end(&mut self) {}
}
