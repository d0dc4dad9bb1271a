// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A virtio-vhost-user device in memory, as either carrier shows it, and a vhost-user daemon on a socket. The test plays the
//! master and the daemon's thoughts.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use vvu_bridge::bridge::{run, Resources, Settings};
use vvu_bridge::driver::DMA_LENGTH;
use vvu_bridge::error::{Error, Result};
use vvu_bridge::interrupts::Line;
use vvu_bridge::memory::Dma;
use vvu_bridge::message::{Header, HEADER};
use vvu_bridge::proxy::Window;
use vvu_bridge::registers::{common, config, status, Registers, Structure};
use vvu_bridge::sys::{eventfd, eventfd_add, eventfd_take, DmaPages};

pub const QUEUES: u16 = 3;
pub const SPECIALS: u16 = 2 * QUEUES + 3;
pub const WINDOW: Window = Window {
    offset: 0x1000,
    length: 0x10_0000,
};
const PAGE: usize = 0x1000;
const MULTIPLIER: u32 = 4;
const PATIENCE: Duration = Duration::from_secs(20);

/// Waits for something that happens in another thread.
pub fn eventually(what: &str, mut happened: impl FnMut() -> bool) {
    let start = Instant::now();
    while !happened() {
        assert!(start.elapsed() < PATIENCE, "never: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// How the device is carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// By vhost-user: special indices are queues, all interrupts alike.
    VhostUser,
    /// By vfio-user: special indices are no queues, kicks have an ISR bit.
    VfioUser,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Queue {
    pub size: u16,
    pub enabled: bool,
    pub desc: u64,
    pub driver: u64,
    pub device: u64,
}

#[derive(Debug)]
pub struct State {
    pub status: u8,
    pub features: u64,
    pub offered: u64,
    feature_select: u32,
    driver_select: u32,
    queue_select: u16,
    pub queues: BTreeMap<u16, Queue>,
    isr: u8,
    pub link: u32,
    pub max_queues: u32,
    pub notify_length: u64,
    pub doorbells: Vec<u16>,
    pub resets: usize,
    masked: bool,
    /// The device sends no interrupt, though it should.
    pub mute: bool,
    /// Next entries of the available rings, and the used indices.
    taken: [u16; 2],
    used: [u16; 2],
}

/// Offset, length, whether it is the device's to write.
type Buffer = (usize, usize, bool);

pub struct Device {
    carrier: Carrier,
    memory: Arc<Dma>,
    state: Mutex<State>,
    line: OwnedFd,
}

impl Device {
    fn new(carrier: Carrier, memory: Arc<Dma>) -> Self {
        let device = Self {
            carrier,
            memory,
            line: eventfd(0).unwrap(),
            state: Mutex::new(State {
                status: 0x0f,
                features: 0,
                offered: 1 << 32 | 1 << 29 | 1 << 28,
                feature_select: 0,
                driver_select: 0,
                queue_select: 0,
                queues: BTreeMap::new(),
                isr: 0,
                link: 0,
                max_queues: QUEUES.into(),
                notify_length: u64::from(SPECIALS) * u64::from(MULTIPLIER),
                doorbells: Vec::new(),
                resets: 0,
                masked: false,
                mute: false,
                taken: [0; 2],
                used: [0; 2],
            }),
        };
        device.reset(&mut device.state());
        device
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn reset(&self, state: &mut State) {
        state.status = 0;
        state.features = 0;
        state.link = 0;
        state.isr = 0;
        state.taken = [0; 2];
        state.used = [0; 2];
        let real = match self.carrier {
            Carrier::VhostUser => SPECIALS,
            Carrier::VfioUser => 2,
        };
        state.queues = (0..real)
            .map(|index| {
                let size = 64;
                (
                    index,
                    Queue {
                        size,
                        ..Queue::default()
                    },
                )
            })
            .collect();
    }

    fn interrupt(&self, state: &mut State, bits: u8) {
        state.isr |= bits;
        if !state.masked && !state.mute {
            state.masked = true;
            eventfd_add(&self.line);
        }
    }

    fn offset(&self, address: u64) -> usize {
        (0..self.memory.pages().length() / PAGE)
            .find_map(|page| {
                let start = self.memory.physical(page * PAGE);
                (start..start + PAGE as u64)
                    .contains(&address)
                    .then(|| page * PAGE + (address - start) as usize)
            })
            .unwrap_or_else(|| panic!("the driver gave {address:#x}, which is none of its pages"))
    }

    /// Takes a chain: its head and its buffers.
    fn take(&self, state: &mut State, index: u16) -> Option<(u16, Vec<Buffer>)> {
        let pages = self.memory.pages();
        let queue = state.queues[&index];
        if state.status & status::DRIVER_OK == 0 || !queue.enabled {
            return None;
        }
        let avail = self.offset(queue.driver);
        let taken = &mut state.taken[usize::from(index)];
        if pages.load16(avail + 2, Ordering::Acquire) == *taken {
            return None;
        }
        let head = pages.load16(avail + 4 + 2 * usize::from(*taken % queue.size), Ordering::Relaxed);
        *taken = taken.wrapping_add(1);
        let mut chain = Vec::new();
        let mut next = head;
        loop {
            assert!(next < queue.size && chain.len() < 2);
            let at = self.offset(queue.desc) + 16 * usize::from(next);
            let flags = pages.load16(at + 12, Ordering::Relaxed);
            chain.push((
                self.offset(pages.load64(at)),
                pages.load32(at + 8) as usize,
                flags & 2 != 0,
            ));
            if flags & 1 == 0 {
                return Some((head, chain));
            }
            next = pages.load16(at + 14, Ordering::Relaxed);
        }
    }

    fn give_back(&self, state: &mut State, index: u16, head: u16, length: usize) {
        let pages = self.memory.pages();
        let queue = state.queues[&index];
        let device = self.offset(queue.device);
        let used = &mut state.used[usize::from(index)];
        let at = device + 4 + 8 * usize::from(*used % queue.size);
        pages.store32(at, head.into());
        pages.store32(at + 4, length as u32);
        *used = used.wrapping_add(1);
        pages.store16(device + 2, *used, Ordering::Release);
        let no_interrupt = pages.load16(self.offset(queue.driver), Ordering::Relaxed) & 1 != 0;
        if !no_interrupt {
            self.interrupt(state, 1);
        }
    }

    /// Puts a message on the rxq; false when the driver has given no buffer.
    pub fn try_send(&self, message: &[u8]) -> bool {
        let mut state = self.state();
        let Some((head, chain)) = self.take(&mut state, 0) else {
            return false;
        };
        let mut rest = message;
        for (offset, length, write) in chain {
            assert!(write, "rx buffers are the device's to write");
            let (now, later) = rest.split_at(rest.len().min(length));
            self.memory.pages().write(offset, now);
            rest = later;
        }
        assert!(rest.is_empty(), "an rx buffer is too small");
        self.give_back(&mut state, 0, head, message.len());
        true
    }

    pub fn send(&self, message: &[u8]) {
        eventually("an rx buffer", || self.try_send(message));
    }

    /// Gives back an rx buffer in a way that isn't allowed.
    pub fn misuse(&self) {
        let mut state = self.state();
        self.give_back(&mut state, 0, 1, 20);
        self.interrupt(&mut state, 1);
    }

    pub fn try_receive(&self) -> Option<Vec<u8>> {
        let mut state = self.state();
        let (head, chain) = self.take(&mut state, 1)?;
        let mut message = Vec::new();
        for (offset, length, write) in chain {
            assert!(!write, "tx buffers are the device's to read");
            let mut part = vec![0; length];
            self.memory.pages().read(offset, &mut part);
            message.extend(part);
        }
        self.give_back(&mut state, 1, head, 0);
        Some(message)
    }

    /// The next message on the txq.
    pub fn receive(&self) -> Vec<u8> {
        let mut message = None;
        eventually("a message on the txq", || {
            message = self.try_receive();
            message.is_some()
        });
        message.unwrap()
    }

    pub fn wait_for_slave(&self) {
        eventually("slave up", || self.state().link & config::SLAVE_UP != 0);
    }

    /// A master connects.
    pub fn connect(&self) {
        self.wait_for_slave();
        let mut state = self.state();
        state.link = config::SLAVE_UP | config::MASTER_UP;
        self.interrupt(&mut state, 2);
    }

    /// The master goes.
    pub fn disconnect(&self) {
        let mut state = self.state();
        state.link = 0;
        self.interrupt(&mut state, 2);
    }

    /// The master kicks a queue.
    pub fn kick(&self) {
        let bit = match self.carrier {
            Carrier::VhostUser => 1,
            Carrier::VfioUser => 4,
        };
        self.interrupt(&mut self.state(), bit);
    }

    /// Rings of special doorbells so far, which are forgotten.
    pub fn take_doorbells(&self) -> Vec<u16> {
        let mut state = self.state();
        let all = std::mem::take(&mut state.doorbells);
        all.into_iter().filter(|&index| index >= 2).collect()
    }

    pub fn expect_doorbell(&self, index: u16) {
        let mut seen = Vec::new();
        eventually("a doorbell", || {
            seen.extend(self.take_doorbells());
            !seen.is_empty()
        });
        assert!(seen.iter().all(|&rung| rung == index), "{seen:?} instead of {index}");
    }
}

impl Registers for Device {
    fn read8(&self, structure: Structure, offset: usize) -> u8 {
        let mut state = self.state();
        match (structure, offset) {
            (Structure::Common, common::DEVICE_STATUS) => state.status,
            (Structure::Isr, 0) => std::mem::take(&mut state.isr),
            other => panic!("8 bits of {other:?}"),
        }
    }

    fn read16(&self, structure: Structure, offset: usize) -> u16 {
        let state = self.state();
        let queue = state.queues.get(&state.queue_select).copied().unwrap_or_default();
        match (structure, offset) {
            (Structure::Common, common::QUEUE_SIZE) => queue.size,
            (Structure::Common, common::QUEUE_NOTIFY_OFF) => state.queue_select,
            (Structure::Common, common::QUEUE_ENABLE) => queue.enabled.into(),
            other => panic!("16 bits of {other:?}"),
        }
    }

    fn read32(&self, structure: Structure, offset: usize) -> u32 {
        let state = self.state();
        match (structure, offset) {
            (Structure::Common, common::DEVICE_FEATURE) => (state.offered >> (32 * state.feature_select)) as u32,
            (Structure::Device, config::STATUS) => state.link,
            (Structure::Device, config::MAX_VHOST_QUEUES) => state.max_queues,
            (Structure::Device, config::UUID..config::LENGTH) => 0x0101_0101 * offset as u32,
            other => panic!("32 bits of {other:?}"),
        }
    }

    fn write8(&self, structure: Structure, offset: usize, value: u8) {
        assert_eq!((structure, offset), (Structure::Common, common::DEVICE_STATUS));
        let mut state = self.state();
        if value == 0 {
            self.reset(&mut state);
            state.resets += 1;
        } else {
            assert_eq!(state.status & !value, 0, "status bits are only set");
            state.status = value;
        }
    }

    fn write16(&self, structure: Structure, offset: usize, value: u16) {
        let mut state = self.state();
        if structure == Structure::Notify {
            assert_eq!(offset, usize::from(value) * MULTIPLIER as usize);
            assert!(state.status & status::DRIVER_OK != 0, "no doorbell before DRIVER_OK");
            state.doorbells.push(value);
            return;
        }
        let select = state.queue_select;
        match (structure, offset, state.queues.get_mut(&select)) {
            (Structure::Common, common::QUEUE_SELECT, _) => state.queue_select = value,
            (Structure::Common, common::QUEUE_SIZE, Some(queue)) => queue.size = value,
            (Structure::Common, common::QUEUE_ENABLE, Some(queue)) => queue.enabled = value == 1,
            other => panic!("16 bits to {other:?}"),
        }
    }

    fn write32(&self, structure: Structure, offset: usize, value: u32) {
        let mut state = self.state();
        let select = state.queue_select;
        let value64 = u64::from(value);
        let half = |field: &mut u64, high: bool| {
            *field = if high {
                (*field & 0xffff_ffff) | value64 << 32
            } else {
                (*field & !0xffff_ffff) | value64
            };
        };
        match (structure, offset) {
            (Structure::Common, common::DEVICE_FEATURE_SELECT) => state.feature_select = value,
            (Structure::Common, common::DRIVER_FEATURE_SELECT) => state.driver_select = value,
            (Structure::Common, common::DRIVER_FEATURE) => {
                let high = state.driver_select == 1;
                half(&mut state.features, high);
            }
            (Structure::Common, field @ common::QUEUE_DESC..common::LENGTH) => {
                let queue = state.queues.get_mut(&select).expect("a queue");
                let high = field % 8 != 0;
                match field & !7 {
                    common::QUEUE_DESC => half(&mut queue.desc, high),
                    common::QUEUE_DRIVER => half(&mut queue.driver, high),
                    _ => half(&mut queue.device, high),
                }
            }
            (Structure::Device, config::STATUS) => {
                assert_eq!(value & !config::SLAVE_UP, 0);
                state.link = value;
            }
            other => panic!("32 bits to {other:?}"),
        }
    }

    fn notify_length(&self) -> u64 {
        self.state().notify_length
    }

    fn notify_multiplier(&self) -> u32 {
        MULTIPLIER
    }
}

struct TestLine(Arc<Device>);

impl Line for TestLine {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.line.as_fd()
    }

    fn take(&self) -> Result<()> {
        eventfd_take(&self.0.line);
        Ok(())
    }

    fn rearm(&self) -> Result<()> {
        let mut state = self.0.state();
        state.masked = false;
        // Level-triggered.
        if state.isr != 0 {
            self.0.interrupt(&mut state, 0);
        }
        Ok(())
    }
}

/// A bridge in a thread, with everything around it.
pub struct World {
    pub device: Arc<Device>,
    pub listener: Option<UnixListener>,
    pub socket: PathBuf,
    pub file: Arc<File>,
    stop: Arc<OwnedFd>,
    bridge: Option<JoinHandle<Result<()>>>,
}

/// Changes the device before the bridge sees it.
pub type Prepare = fn(&mut State);

/// How to set a world up.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub carrier: Carrier,
    pub line: bool,
    pub once: bool,
    pub wait: Option<Duration>,
    pub listening: bool,
    pub prepare: Prepare,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            carrier: Carrier::VfioUser,
            line: true,
            once: false,
            wait: None,
            listening: true,
            prepare: |_| {},
        }
    }
}

static COUNT: AtomicU32 = AtomicU32::new(0);

impl World {
    pub fn new(setup: Setup) -> Self {
        let pages = DmaPages::small(DMA_LENGTH).unwrap();
        // No two pages are neighbours, and they go down.
        let count = pages.length() as u64 / PAGE as u64;
        let addresses = (0..count)
            .map(|page| 0x12_3400_0000 + 0x2000 * (count - page))
            .collect();
        let memory = Arc::new(Dma::new(pages, addresses, PAGE));
        let device = Arc::new(Device::new(setup.carrier, memory.clone()));
        (setup.prepare)(&mut device.state());
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let socket = std::env::temp_dir().join(format!("vvu-bridge-{}-{number}.sock", std::process::id()));
        let _ = std::fs::remove_file(&socket);
        let listener = setup.listening.then(|| UnixListener::bind(&socket).unwrap());
        let file = Arc::new(shared_file());
        let stop = Arc::new(eventfd(0).unwrap());
        let settings = Settings {
            socket: socket.clone(),
            wait: setup.wait,
            once: setup.once,
            poll: Duration::from_millis(1),
        };
        let bridge = {
            let (device, file, stop) = (device.clone(), file.clone(), stop.clone());
            thread::spawn(move || {
                let line = TestLine(device.clone());
                run(
                    &Resources {
                        registers: &*device,
                        memory,
                        file: file.as_fd(),
                        window: WINDOW,
                        line: setup.line.then_some(&line as &dyn Line),
                        stop: stop.as_fd(),
                    },
                    &settings,
                )
            })
        };
        Self {
            device,
            listener,
            socket,
            file,
            stop,
            bridge: Some(bridge),
        }
    }

    pub fn listen(&mut self) {
        let _ = std::fs::remove_file(&self.socket);
        self.listener = Some(UnixListener::bind(&self.socket).unwrap());
    }

    /// The bridge's next connection to the daemon.
    pub fn accept(&self) -> Daemon {
        let listener = self.listener.as_ref().unwrap();
        listener.set_nonblocking(true).unwrap();
        let mut stream = None;
        eventually("a connection", || {
            stream = listener.accept().ok().map(|(stream, _)| stream);
            stream.is_some()
        });
        let stream = stream.unwrap();
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Daemon(stream)
    }

    /// A session with a master.
    pub fn session(&self) -> Daemon {
        let daemon = self.accept();
        self.device.connect();
        daemon
    }

    /// Sends a request and sees it arrive, with as many fds.
    pub fn request(&self, daemon: &Daemon, message: &[u8], fds: usize) -> (Vec<u8>, Vec<OwnedFd>) {
        self.device.send(message);
        let (received, received_fds) = daemon.receive();
        assert_eq!(received_fds.len(), fds, "fds of {message:?}");
        (received, received_fds)
    }

    pub fn result(&mut self) -> Result<()> {
        let bridge = self.bridge.take().unwrap();
        eventually("the bridge's end", || bridge.is_finished());
        bridge.join().unwrap()
    }

    pub fn stop(&mut self) -> Result<()> {
        eventfd_add(&self.stop);
        self.result()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        eventfd_add(&self.stop);
        if let Some(Err(panic)) = self.bridge.take().map(JoinHandle::join) {
            if !thread::panicking() {
                std::panic::resume_unwind(panic);
            }
        }
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// The daemon's end of a connection.
#[derive(Debug)]
pub struct Daemon(pub UnixStream);

impl Daemon {
    pub fn receive(&self) -> (Vec<u8>, Vec<OwnedFd>) {
        let (mut message, fds) = receive_with_fds(&self.0, HEADER);
        assert_eq!(message.len(), HEADER, "the connection has ended");
        let size = Header::parse(&message).unwrap().size as usize;
        let mut payload = vec![0; size];
        (&self.0).read_exact(&mut payload).unwrap();
        message.extend(payload);
        (message, fds)
    }

    pub fn send(&self, message: &[u8]) {
        (&self.0).write_all(message).unwrap();
    }

    pub fn send_with_fd(&self, message: &[u8], fd: impl AsRawFd) {
        assert_eq!(self.0.send_with_fd(message, fd.as_raw_fd()).unwrap(), message.len());
    }

    /// Whether the bridge has hung up, after whatever it had written before.
    pub fn expect_end(&self) {
        let mut rest = Vec::new();
        match (&self.0).read_to_end(&mut rest) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
            Err(error) => panic!("no end: {error}"),
        }
    }
}

fn receive_with_fds(stream: &UnixStream, length: usize) -> (Vec<u8>, Vec<OwnedFd>) {
    let mut bytes = vec![0; length];
    let mut raw = [-1; 16];
    let mut parts = [libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: length,
    }];
    // SAFETY: the buffer lives over the call and has this length.
    let (count, fds) = unsafe { stream.recv_with_fds(&mut parts, &mut raw) }.unwrap();
    bytes.truncate(count);
    // SAFETY: these fds have just been received, nobody else has them.
    let fds = raw[..fds]
        .iter()
        .map(|&fd| unsafe { OwnedFd::from_raw_fd(fd) })
        .collect();
    (bytes, fds)
}

fn shared_file() -> File {
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("vvu-bridge-{}-{number}.ram", std::process::id()));
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    std::fs::remove_file(&path).unwrap();
    file.set_len(WINDOW.offset + WINDOW.length).unwrap();
    file
}

pub fn is_device_error(result: &Result<()>) -> bool {
    matches!(result, Err(Error::Device(_)))
}
