// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The loop: device, daemon and everything between them, in one thread.
//!
//! A session is one connection to the daemon: it begins with SLAVE_UP and ends when master or daemon go, when either of them
//! sends what makes no sense, or when the device breaks. Then both sides are told, and the next one begins.
//!
//! Nothing is buffered without bound: messages stay in the rxq while the daemon doesn't read, and in the daemon's socket
//! while the txq is full.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::channel::{Channel, ChannelError};
use crate::driver::{self, Device, Link};
use crate::error::{Context, Error, Result};
use crate::interrupts::{Line, Pace};
use crate::log;
use crate::memory::Dma;
use crate::message::{request, u32_at};
use crate::proxy::{refusal, Fds, Proxy, Route, Violation, Window};
use crate::registers::{isr, Registers};
use crate::sys::{connect_unix, eventfd, eventfd_add, eventfd_take, socket_pair, Epoll, Event, Interest, Timer};

/// Messages relayed per direction before the others get their turn.
const TURN: usize = 16;
/// How often the device is looked after without being asked to; finds lost interrupts and moved pages, too.
const TICK: Duration = Duration::from_secs(1);
/// When the driver and the daemon are reminded of each other after a ring was set up or enabled.
///
/// A master that has reconnected may have requests in its ring that nobody will kick for again, and used elements that nobody
/// was interrupted for: the kick went to, or the call came from, a session that is over. Its QEMU makes up for that with a
/// kick as soon as the ring has an eventfd; but daemons throw away what comes before the ring is enabled (rust-vmm's do), and
/// only they know when it is. One that comes for nothing costs a look at the ring.
const REMINDERS: [Duration; 3] = [
    Duration::from_millis(5),
    Duration::from_millis(50),
    Duration::from_millis(500),
];
/// Pause between attempts to reach the daemon, and after a session that somebody spoilt.
const PAUSE: Duration = Duration::from_millis(100);
/// Resets in a row, without a master in between, after which the device is given up.
const MAX_RESETS: u32 = 5;
/// Ticks in a row that find work which no interrupt has announced, after which the line is given up.
const MAX_LOST: u32 = 3;

const STOP: u64 = 0;
const LINE: u64 = 1;
const TIMER: u64 = 2;
const DAEMON: u64 = 3;
const SLAVE: u64 = 4;
const LOG: u64 = 5;
const CALL: u64 = 0x100;
const ERR: u64 = 0x200;

/// How to run.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The daemon's socket.
    pub socket: PathBuf,
    /// How long to wait for it each time; None: for ever.
    pub wait: Option<Duration>,
    /// End after the first session with a master.
    pub once: bool,
    /// Longest pause when polling.
    pub poll: Duration,
}

/// What the bridge works with.
pub struct Resources<'a, R> {
    /// The device's registers.
    pub registers: &'a R,
    /// DMA memory of at least [`driver::DMA_LENGTH`].
    pub memory: Arc<Dma>,
    /// The file with the shared memory, for the daemon.
    pub file: BorrowedFd<'a>,
    /// The shared memory in it.
    pub window: Window,
    /// The interrupt line; None: polling.
    pub line: Option<&'a dyn Line>,
    /// Becomes readable when the bridge is to stop.
    pub stop: BorrowedFd<'a>,
}

/// Why a session ended.
#[derive(Debug)]
enum End {
    Stopped,
    MasterGone,
    Daemon(ChannelError),
    FromMaster(Violation),
    FromDaemon(Violation),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stopped => f.write_str("stopped"),
            Self::MasterGone => f.write_str("master gone"),
            Self::Daemon(ChannelError::Closed) => f.write_str("daemon gone"),
            Self::Daemon(error) => write!(f, "daemon: {error}"),
            Self::FromMaster(violation) => write!(f, "protocol error from the master: {violation}"),
            Self::FromDaemon(violation) => write!(f, "protocol error from the daemon: {violation}"),
        }
    }
}

/// What takes the loop out of a session.
#[derive(Debug)]
enum Leave {
    End(End),
    Error(Error),
}

impl From<Error> for Leave {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

impl From<End> for Leave {
    fn from(end: End) -> Self {
        Self::End(end)
    }
}

impl From<ChannelError> for Leave {
    fn from(error: ChannelError) -> Self {
        Self::End(End::Daemon(error))
    }
}

type Step<T> = std::result::Result<T, Leave>;

/// Serves until `stop` becomes readable (or one session has been, with `once`), then resets the device.
///
/// # Errors
/// The machine doesn't have what is needed, the daemon doesn't appear in time, or the device stays broken.
pub fn run<R: Registers>(resources: &Resources<'_, R>, settings: &Settings) -> Result<()> {
    let mut bridge = Bridge::new(resources, settings)?;
    let served = bridge.serve_with_resets();
    // The pages are about to be free for others: the device must not have them any longer.
    match (served, driver::reset(resources.registers)) {
        (Ok(()), reset) => reset,
        (served, _) => served,
    }
}

struct Bridge<'a, R> {
    resources: &'a Resources<'a, R>,
    settings: &'a Settings,
    epoll: Epoll,
    timer: Timer,
    events: Vec<Event>,
    /// None: polling.
    line: Option<&'a dyn Line>,
    pace: Pace,
    /// The ISR status has been seen to work, so no kick is missed by relying on it.
    isr_works: bool,
    lost: u32,
    next_tick: Instant,
    resets: u32,
}

/// What one turn of waiting brought.
#[derive(Clone, Copy, Debug, Default)]
struct News {
    stop: bool,
    isr: u8,
    /// Polling, and the ISR status can't be relied upon: anything may have happened.
    blind: bool,
    tick: bool,
}

struct Session {
    proxy: Proxy,
    daemon: Channel,
    daemon_interest: Interest,
    slave: Option<(Channel, Interest)>,
    /// The daemon watches these.
    kicks: Vec<Option<OwnedFd>>,
    /// One for the whole session: what the daemon has signalled on an earlier copy isn't lost.
    calls: Vec<Option<OwnedFd>>,
    errs: Vec<Option<OwnedFd>>,
    log: Option<OwnedFd>,
    link: Link,
    master_seen: bool,
    reminders: Reminders,
}

/// Reminders to come.
#[derive(Default)]
struct Reminders {
    since: Option<Instant>,
    given: usize,
}

impl Reminders {
    fn begin(&mut self, now: Instant) {
        self.since = Some(now);
        self.given = 0;
    }

    /// Until the next one.
    fn left(&self, now: Instant) -> Option<Duration> {
        let at = self.since? + *REMINDERS.get(self.given)?;
        Some(at.saturating_duration_since(now))
    }

    fn take(&mut self, now: Instant) -> bool {
        let due = self.left(now).is_some_and(|left| left.is_zero());
        self.given += usize::from(due);
        due
    }
}

impl<'a, R: Registers> Bridge<'a, R> {
    fn new(resources: &'a Resources<'a, R>, settings: &'a Settings) -> Result<Self> {
        let epoll = Epoll::new().context(|| "epoll".into())?;
        let timer = Timer::new().context(|| "timer".into())?;
        let watch = || -> io::Result<()> {
            epoll.add(resources.stop, Interest::READ, STOP)?;
            epoll.add(&timer, Interest::READ, TIMER)?;
            if let Some(line) = resources.line {
                epoll.add(line.fd(), Interest::READ, LINE)?;
            }
            Ok(())
        };
        watch().context(|| "epoll".into())?;
        Ok(Self {
            resources,
            settings,
            epoll,
            timer,
            events: Vec::new(),
            line: resources.line,
            pace: Pace::new(settings.poll),
            isr_works: false,
            lost: 0,
            next_tick: Instant::now(),
            resets: 0,
        })
    }

    fn serve_with_resets(&mut self) -> Result<()> {
        loop {
            match self.serve() {
                Err(Error::Device(reason)) => {
                    log::line(format_args!("device broken: {reason}"));
                    self.resets += 1;
                    if self.resets > MAX_RESETS {
                        return Err(Error::Device(format!("{reason}; given up after {MAX_RESETS} resets")));
                    }
                    if self.pause(None, PAUSE * self.resets)? {
                        return Ok(());
                    }
                }
                served => return served,
            }
        }
    }

    /// Sessions on one device, from its reset on.
    fn serve(&mut self) -> Result<()> {
        let mut device = Device::start(self.resources.registers, &self.resources.memory, self.line.is_some())?;
        if let Some(line) = self.line {
            // A line left masked by somebody before us.
            line.rearm()?;
        }
        log::line(format_args!(
            "device started: {} queues, uuid {}",
            device.queues(),
            crate::options::Uuid(device.uuid())
        ));
        loop {
            let Some(daemon) = self.connect(&device)? else {
                return Ok(());
            };
            log::line("daemon connected");
            if !device.slave_up()? {
                log::line("session ended: device went down at once");
                if self.pause(Some(&device), PAUSE)? {
                    return Ok(());
                }
                continue;
            }
            log::line("slave up");
            let mut session = Session::new(daemon, device.queues(), self.resources.window);
            let end = self.run_session(&mut device, &mut session);
            let master_seen = session.master_seen;
            if master_seen {
                self.resets = 0;
            }
            self.forget(&session);
            drop(session);
            let end = match end {
                Leave::End(end) => end,
                Leave::Error(error) => {
                    log::line(format_args!("session ended: {error}"));
                    let was_last = matches!(error, Error::Device(_)) && self.settings.once && master_seen;
                    return if was_last { Ok(()) } else { Err(error) };
                }
            };
            if matches!(end, End::MasterGone) {
                log::line("master gone");
            }
            log::line(format_args!("session ended: {end}"));
            device.slave_down()?;
            if matches!(end, End::Stopped) || (self.settings.once && master_seen) {
                return Ok(());
            }
            // Whoever spoils sessions shall not have the daemon and us start new ones as fast as the machine can. And a
            // daemon that is about to die may close its connection a moment before the socket that it listens on.
            if !matches!(end, End::MasterGone) && self.pause(Some(&device), PAUSE)? {
                return Ok(());
            }
        }
    }

    /// Connects to the daemon as soon as it is there; None when told to stop.
    fn connect(&mut self, device: &Device<'_, R>) -> Result<Option<Channel>> {
        let start = Instant::now();
        let mut said = false;
        loop {
            let error = match connect_unix(&self.settings.socket) {
                Ok(socket) => return Ok(Some(Channel::new(socket))),
                Err(error) => error,
            };
            let name = self.settings.socket.display();
            if self.settings.wait.is_some_and(|wait| start.elapsed() >= wait) {
                return Err(Error::Io(
                    format!("no daemon on {name} within {:?}", start.elapsed()),
                    error,
                ));
            }
            if !said {
                log::line(format_args!("waiting for a daemon on {name} ({error})"));
                said = true;
            }
            let news = self.wait_at_most(Some(device), PAUSE)?;
            if news.stop {
                return Ok(None);
            }
            if news.tick {
                device.check()?;
            }
        }
    }

    /// Lets time pass; true when told to stop.
    fn pause(&mut self, device: Option<&Device<'_, R>>, length: Duration) -> Result<bool> {
        let end = Instant::now() + length;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            if self.wait_at_most(device, left)?.stop {
                return Ok(true);
            }
        }
    }

    /// Waits while there is no session. Interrupts are acknowledged, or they would come back for ever.
    fn wait_at_most(&mut self, device: Option<&Device<'_, R>>, length: Duration) -> Result<News> {
        self.epoll.wait(&mut self.events, length).context(|| "epoll".into())?;
        let mut news = News::default();
        for event in &self.events {
            match (event.token, self.line) {
                (STOP, _) => news.stop = true,
                (TIMER, _) => self.timer.take(),
                (LINE, Some(line)) => {
                    line.take()?;
                    // Without a device to ask it stays masked until there is one (see `serve`).
                    if let Some(device) = device {
                        news.isr |= device.read_isr();
                        line.rearm()?;
                    }
                }
                _ => {}
            }
        }
        news.tick = self.take_tick();
        Ok(news)
    }

    fn take_tick(&mut self) -> bool {
        let now = Instant::now();
        let due = now >= self.next_tick;
        if due {
            self.next_tick = now + TICK;
        }
        due
    }

    fn run_session(&mut self, device: &mut Device<'_, R>, session: &mut Session) -> Leave {
        match self.relay(device, session) {
            Ok(never) => match never {},
            Err(leave) => leave,
        }
    }

    fn relay(&mut self, device: &mut Device<'_, R>, session: &mut Session) -> Step<std::convert::Infallible> {
        self.watch(&session.daemon, Interest::READ, DAEMON)?;
        // Whatever came before the loop has to be looked at without being announced.
        let mut news = News {
            isr: isr::CONFIG,
            ..News::default()
        };
        loop {
            if news.stop {
                return Err(End::Stopped.into());
            }
            if news.tick {
                device.check()?;
                if self.resources.memory.has_moved() {
                    return Err(Error::Device("its memory has been moved by the kernel".into()).into());
                }
            }
            if news.tick || news.isr & isr::CONFIG != 0 {
                self.look_at_link(device, session)?;
            }
            // Requests first: a kick can be for an eventfd that one of them brings.
            let mut busy = self.relay_from_device(device, session)?;
            busy |= self.relay_from_daemon(device, session)?;
            busy |= self.relay_from_slave(device, session)?;
            device.notify();
            if news.blind || news.isr & device.kick_bits() != 0 {
                session.kicks.iter().flatten().for_each(eventfd_add);
            }
            if session.reminders.take(Instant::now()) {
                for (queue, kick) in (0..).zip(&session.kicks) {
                    if let Some(kick) = kick {
                        eventfd_add(kick);
                        device.call(queue);
                    }
                }
            }
            self.update_interest(device, session)?;
            news = self.wait(device, session, busy)?;
        }
    }

    fn look_at_link(&self, device: &Device<'_, R>, session: &mut Session) -> Step<()> {
        let link = device.link()?;
        if link == Link::Down {
            return Err(End::MasterGone.into());
        }
        if link == Link::Up && session.link != Link::Up {
            session.master_up();
        }
        // From Up it only goes Down: the device lets a next master in when the slave is up again.
        session.link = link;
        Ok(())
    }

    /// Waits for news in a session; doorbells are rung from here.
    fn wait(&mut self, device: &Device<'_, R>, session: &mut Session, busy: bool) -> Step<News> {
        let now = Instant::now();
        let mut timeout = self.next_tick.saturating_duration_since(now);
        if let Some(left) = session.reminders.left(now) {
            timeout = timeout.min(left);
        }
        let mut paused = false;
        if busy {
            timeout = Duration::ZERO;
            self.pace.busy(now);
        } else if self.line.is_none() {
            match self.pace.idle(now) {
                None => timeout = Duration::ZERO,
                Some(pause) => {
                    paused = true;
                    self.timer.start(pause).context(|| "timer".into())?;
                }
            }
        }
        self.epoll.wait(&mut self.events, timeout).context(|| "epoll".into())?;
        let mut news = News::default();
        let mut interrupted = false;
        let mut active = false;
        for event in &self.events {
            match event.token {
                STOP => news.stop = true,
                TIMER => self.timer.take(),
                LINE => interrupted = true,
                // Nothing is read while the txq is full, and then a hang-up would be reported without end.
                DAEMON if event.gone && !session.daemon_interest.read => {
                    return Err(ChannelError::Closed.into());
                }
                DAEMON => {
                    active = true;
                    session.daemon.flush()?;
                }
                SLAVE => {
                    active = true;
                    let flushed = session.slave.as_mut().map(|(channel, interest)| {
                        let stuck = event.gone && !interest.read;
                        channel.flush().is_ok() && !stuck
                    });
                    if flushed == Some(false) {
                        self.drop_slave(session);
                    }
                }
                LOG if session.log.as_ref().is_some_and(eventfd_take) => device.log(),
                token @ CALL..ERR => {
                    active = true;
                    if let Some(queue) = signalled(&session.calls, token - CALL) {
                        device.call(queue);
                    }
                }
                token if token >= ERR => {
                    if let Some(queue) = signalled(&session.errs, token - ERR) {
                        device.err(queue);
                    }
                }
                _ => {}
            }
        }
        news.tick = self.take_tick();
        match self.line {
            Some(line) => {
                if interrupted {
                    self.lost = 0;
                    line.take()?;
                    news.isr = device.read_isr();
                    // After the read, which takes the interrupt back; what comes from now on asserts it again.
                    line.rearm()?;
                } else if news.tick {
                    news.isr = device.read_isr();
                    self.count_lost(news.isr != 0);
                }
            }
            None => {
                news.isr = device.read_isr();
                self.isr_works |= news.isr != 0;
                news.blind = paused && !self.isr_works;
            }
        }
        if active || news.isr != 0 {
            self.pace.busy(Instant::now());
        }
        Ok(news)
    }

    /// An interrupt may come between the wait and the read now and then; but if none ever does, the line doesn't work.
    fn count_lost(&mut self, found: bool) {
        self.lost = if found { self.lost + 1 } else { 0 };
        if let Some(line) = self.line.filter(|_| self.lost >= MAX_LOST) {
            log::line("interrupts: poll (the line brings none)");
            self.epoll.remove(line.fd());
            self.line = None;
        }
    }

    fn relay_from_device(&mut self, device: &mut Device<'_, R>, session: &mut Session) -> Step<bool> {
        for _ in 0..TURN {
            // A daemon that doesn't read holds up the master, as it would without us in between.
            if !session.daemon.is_flushed() {
                return Ok(false);
            }
            let Some(mut message) = device.receive()? else {
                return Ok(false);
            };
            // The message may overtake the notification that there is a master.
            if session.link != Link::Up {
                session.link = Link::Up;
                session.master_up();
            }
            match session.proxy.from_device(&mut message).map_err(End::FromMaster)? {
                Route::SlaveReply => {
                    let sent = session
                        .slave
                        .as_mut()
                        .map(|(channel, _)| channel.send(message, Vec::new()));
                    if let Some(Err(error)) = sent {
                        log::line(format_args!("slave channel: {error}"));
                        self.drop_slave(session);
                    }
                }
                Route::Nowhere => {}
                Route::Request(fds) => {
                    let number = u32_at(&message, 0);
                    if matches!(number, Some(request::SET_VRING_KICK | request::SET_VRING_ENABLE)) {
                        session.reminders.begin(Instant::now());
                    }
                    let fds = self.fds_for(fds, session)?;
                    session.daemon.send(message, fds)?;
                }
            }
        }
        Ok(true)
    }

    fn fds_for(&mut self, fds: Fds, session: &mut Session) -> Step<Vec<OwnedFd>> {
        let copy = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().context(|| "fd".into());
        Ok(match fds {
            Fds::None => Vec::new(),
            Fds::Memory(count) => (0..count).map(|_| copy(self.resources.file)).collect::<Result<_>>()?,
            Fds::Kick(queue) => {
                // The kick may have come before this message, or to the eventfd that this one replaces: so it starts
                // signalled. A new one each time, since a daemon that has closed its copy may still watch the old one
                // as long as there is another copy.
                let kick = eventfd(1).context(|| "eventfd".into())?;
                let theirs = copy(kick.as_fd())?;
                session.kicks[usize::from(queue)] = Some(kick);
                vec![theirs]
            }
            Fds::NoKick(queue) => {
                session.kicks[usize::from(queue)] = None;
                Vec::new()
            }
            Fds::Call(queue) => {
                let place = &mut session.calls[usize::from(queue)];
                vec![self.watched_eventfd(place, CALL + u64::from(queue))?]
            }
            Fds::Err(queue) => {
                let place = &mut session.errs[usize::from(queue)];
                vec![self.watched_eventfd(place, ERR + u64::from(queue))?]
            }
            Fds::Log => vec![self.watched_eventfd(&mut session.log, LOG)?],
            Fds::SlaveChannel => {
                self.drop_slave(session);
                let (ours, theirs) = socket_pair().context(|| "socketpair".into())?;
                self.watch(&ours, Interest::READ, SLAVE)?;
                session.slave = Some((Channel::new(ours), Interest::READ));
                vec![theirs]
            }
        })
    }

    fn watched_eventfd(&self, place: &mut Option<OwnedFd>, token: u64) -> Result<OwnedFd> {
        if place.is_none() {
            let fd = eventfd(0).context(|| "eventfd".into())?;
            self.watch(&fd, Interest::READ, token)?;
            *place = Some(fd);
        }
        match place {
            Some(fd) => fd.try_clone().context(|| "fd".into()),
            None => Err(Error::Setup("no eventfd".into())),
        }
    }

    fn relay_from_daemon(&self, device: &mut Device<'_, R>, session: &mut Session) -> Step<bool> {
        for _ in 0..TURN {
            if !device.can_send()? {
                return Ok(false);
            }
            let Some(mut message) = session.daemon.receive()? else {
                return Ok(false);
            };
            if message.fds != 0 {
                log::line(format_args!(
                    "error: the daemon sent {} fds with a reply; they can't cross the device and are closed",
                    message.fds
                ));
            }
            session.proxy.from_daemon(&mut message.bytes).map_err(End::FromDaemon)?;
            device.send(&message.bytes);
        }
        Ok(true)
    }

    fn relay_from_slave(&self, device: &mut Device<'_, R>, session: &mut Session) -> Step<bool> {
        for _ in 0..TURN {
            let Some((channel, _)) = session.slave.as_mut() else {
                return Ok(false);
            };
            // Also when it doesn't read: refusals must not pile up.
            if !channel.is_flushed() || !device.can_send()? {
                return Ok(false);
            }
            let message = match channel.receive() {
                Ok(Some(message)) => message,
                Ok(None) => return Ok(false),
                Err(error) => {
                    if !matches!(error, ChannelError::Closed) {
                        log::line(format_args!("slave channel: {error}"));
                    }
                    self.drop_slave(session);
                    return Ok(false);
                }
            };
            if message.fds != 0 {
                log::line(format_args!(
                    "error: the daemon sent {} fds with a slave request; they can't cross the device and are closed, \
                     and the request is refused",
                    message.fds
                ));
                if let Some(reply) = refusal(&message.bytes) {
                    if channel.send(reply, Vec::new()).is_err() {
                        self.drop_slave(session);
                        return Ok(false);
                    }
                }
                continue;
            }
            session.proxy.from_slave(&message.bytes).map_err(End::FromDaemon)?;
            device.send(&message.bytes);
        }
        Ok(true)
    }

    fn update_interest(&self, device: &mut Device<'_, R>, session: &mut Session) -> Step<()> {
        let read = device.can_send()?;
        let wanted = Interest {
            read,
            write: !session.daemon.is_flushed(),
        };
        if wanted != session.daemon_interest {
            self.epoll
                .modify(&session.daemon, wanted, DAEMON)
                .context(|| "epoll".into())?;
            session.daemon_interest = wanted;
        }
        if let Some((channel, interest)) = session.slave.as_mut() {
            let flushed = channel.is_flushed();
            let wanted = Interest {
                read: read && flushed,
                write: !flushed,
            };
            if wanted != *interest {
                self.epoll.modify(&*channel, wanted, SLAVE).context(|| "epoll".into())?;
                *interest = wanted;
            }
        }
        Ok(())
    }

    fn watch(&self, fd: impl AsFd, interest: Interest, token: u64) -> Result<()> {
        self.epoll.add(fd, interest, token).context(|| "epoll".into())
    }

    fn drop_slave(&self, session: &mut Session) {
        if let Some((channel, _)) = session.slave.take() {
            self.epoll.remove(&channel);
        }
    }

    /// The daemon has copies of all eventfds, so closing ours doesn't end the watching.
    fn forget(&self, session: &Session) {
        self.epoll.remove(&session.daemon);
        if let Some((channel, _)) = &session.slave {
            self.epoll.remove(channel);
        }
        let watched = [&session.calls, &session.errs];
        for fd in watched.into_iter().flatten().flatten().chain(&session.log) {
            self.epoll.remove(fd);
        }
    }
}

/// The queue of an eventfd that has been signalled, and now isn't any more.
fn signalled(eventfds: &[Option<OwnedFd>], queue: u64) -> Option<u8> {
    let queue = u8::try_from(queue).ok()?;
    eventfds
        .get(usize::from(queue))?
        .as_ref()
        .filter(|fd| eventfd_take(fd))
        .map(|_| queue)
}

impl Session {
    fn new(daemon: Channel, queues: u16, window: Window) -> Self {
        let none = || (0..queues).map(|_| None).collect();
        Self {
            proxy: Proxy::new(queues, window),
            daemon,
            daemon_interest: Interest::READ,
            slave: None,
            kicks: none(),
            calls: none(),
            errs: none(),
            log: None,
            link: Link::Waiting,
            master_seen: false,
            reminders: Reminders::default(),
        }
    }

    fn master_up(&mut self) {
        if !self.master_seen {
            log::line("master up");
            self.master_seen = true;
        }
    }
}
