// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The client's side of vfio-user, for tests, and a function that does what a test tells it to.

#![allow(dead_code)]
#![allow(missing_docs, clippy::unwrap_used)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use vhu_core::error::{Error, Fault};
use vhu_core::event::{Completion, Waker};
use vhu_core::memory::{MemoryMap, Region};
use vhu_core::sys;
use vhu_core::vfio_user::function::{Access, IrqChange, Mappable, PciFunction, RegionInfo};
use vhu_core::vfio_user::server::Server;
use vhu_core::worker::{Pool, SourceHandle};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

pub const PATIENCE: Duration = Duration::from_secs(10);

pub const VERSION: u16 = 1;
pub const DMA_MAP: u16 = 2;
pub const DMA_UNMAP: u16 = 3;
pub const GET_INFO: u16 = 4;
pub const GET_REGION_INFO: u16 = 5;
pub const GET_REGION_IO_FDS: u16 = 6;
pub const GET_IRQ_INFO: u16 = 7;
pub const SET_IRQS: u16 = 8;
pub const REGION_READ: u16 = 9;
pub const REGION_WRITE: u16 = 10;
pub const DMA_READ: u16 = 11;
pub const DMA_WRITE: u16 = 12;
pub const RESET: u16 = 13;
pub const WRITE_MULTI: u16 = 15;

pub const NO_REPLY: u32 = 0x10;
pub const CAPABILITIES: &str = r#"{"capabilities":{"max_msg_fds":16,"max_data_xfer_size":1048576,"max_dma_maps":65535,
    "pgsizes":4096,"migration":{"pgsize":4096,"max_bitmap_size":268435456},"write_multiple":true}}"#;

pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "timed out: {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

pub fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

pub fn longs(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

pub fn message(id: u16, command: u16, flags: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = id.to_ne_bytes().to_vec();
    bytes.extend(command.to_ne_bytes());
    bytes.extend(words(&[16 + body.len() as u32, flags, 0]));
    bytes.extend(body);
    bytes
}

pub fn access(offset: u64, region: u32, data: &[u8]) -> Vec<u8> {
    let mut body = longs(&[offset]);
    body.extend(words(&[region, data.len() as u32]));
    body.extend(data);
    body
}

pub fn dma_map(flags: u32, offset: u64, iova: u64, size: u64) -> Vec<u8> {
    let mut body = words(&[32, flags]);
    body.extend(longs(&[offset, iova, size]));
    body
}

pub fn dma_unmap(flags: u32, iova: u64, size: u64) -> Vec<u8> {
    let mut body = words(&[24, flags]);
    body.extend(longs(&[iova, size]));
    body
}

/// A message from the server.
#[derive(Debug, PartialEq, Eq)]
pub struct Message {
    pub id: u16,
    pub command: u16,
    pub flags: u32,
    pub error: u32,
    pub body: Vec<u8>,
}

pub struct Client {
    pub socket: UnixStream,
    pub next: u16,
}

impl Client {
    /// Connects; says nothing.
    pub fn raw(address: &SocketAddr) -> Self {
        let socket = UnixStream::connect_addr(address).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_write_timeout(Some(PATIENCE)).unwrap();
        Self { socket, next: 1 }
    }

    /// Connects and agrees on the version.
    pub fn new(address: &SocketAddr) -> Self {
        let mut client = Self::raw(address);
        let reply = client.version(0, 0, CAPABILITIES);
        assert_eq!(reply.flags, 1, "{reply:?}");
        client
    }

    pub fn version(&mut self, major: u16, minor: u16, data: &str) -> Message {
        let mut body = major.to_ne_bytes().to_vec();
        body.extend(minor.to_ne_bytes());
        body.extend(data.as_bytes());
        body.push(0);
        self.send(VERSION, 0, &body);
        self.receive().unwrap()
    }

    pub fn send(&mut self, command: u16, flags: u32, body: &[u8]) -> u16 {
        let id = self.next;
        self.next = self.next.wrapping_add(1);
        self.write(&message(id, command, flags, body));
        id
    }

    pub fn send_fds(&mut self, command: u16, body: &[u8], fds: &[RawFd]) -> u16 {
        let id = self.next;
        self.next = self.next.wrapping_add(1);
        let bytes = message(id, command, 0, body);
        let sent = self.socket.send_with_fds(&[&bytes[..]], fds).unwrap();
        assert_eq!(sent, bytes.len());
        id
    }

    pub fn write(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    /// The next message; None when the server has closed the connection.
    pub fn receive(&mut self) -> Option<Message> {
        let mut header = [0; 16];
        match self.socket.read_exact(&mut header) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => panic!("no answer"),
            Err(_) => return None,
        }
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        let mut body = vec![0; word(4) as usize - 16];
        self.socket.read_exact(&mut body).unwrap();
        Some(Message {
            id: u16::from_ne_bytes([header[0], header[1]]),
            command: u16::from_ne_bytes([header[2], header[3]]),
            flags: word(8),
            error: word(12),
            body,
        })
    }

    /// Whether there is something to receive, now or soon.
    pub fn quiet(&self) -> bool {
        std::thread::sleep(Duration::from_millis(20));
        !sys::look(self.socket.as_raw_fd()).readable
    }

    /// Sends a command and returns the body of the reply, or the errno.
    pub fn ask(&mut self, command: u16, body: &[u8]) -> Result<Vec<u8>, u32> {
        let id = self.send(command, 0, body);
        self.answer(id, command)
    }

    pub fn ask_fds(&mut self, command: u16, body: &[u8], fds: &[RawFd]) -> Result<Vec<u8>, u32> {
        let id = self.send_fds(command, body, fds);
        self.answer(id, command)
    }

    pub fn answer(&mut self, id: u16, command: u16) -> Result<Vec<u8>, u32> {
        let reply = self.receive().expect("the connection was closed");
        assert_eq!((reply.id, reply.command, reply.flags & 0xf), (id, command, 1));
        if reply.flags & 0x20 != 0 {
            assert!(reply.body.is_empty(), "an error has no body");
            return Err(reply.error);
        }
        Ok(reply.body)
    }

    /// The body of the next reply, which came in one piece, and the fds with it.
    pub fn answer_with_fds(&mut self, id: u16, command: u16) -> (Vec<u8>, Vec<File>) {
        let mut bytes = [0u8; 256];
        let mut iov = [libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        }];
        let mut fds = [0; 4];
        // SAFETY: the one iovec describes a live buffer.
        let (count, fd_count) = unsafe { self.socket.recv_with_fds(&mut iov, &mut fds).unwrap() };
        // SAFETY: made for us just now.
        let files = fds[..fd_count]
            .iter()
            .map(|&fd| unsafe { File::from_raw_fd(fd) })
            .collect();
        assert_eq!(bytes[..4], [id.to_ne_bytes(), command.to_ne_bytes()].concat());
        assert_eq!(bytes[4..8], (count as u32).to_ne_bytes());
        assert_eq!(bytes[8..16], words(&[1, 0])[..]);
        (bytes[16..count].to_vec(), files)
    }

    pub fn ask_with_fds(&mut self, command: u16, body: &[u8]) -> (Vec<u8>, Vec<File>) {
        let id = self.send(command, 0, body);
        self.answer_with_fds(id, command)
    }

    pub fn read(&mut self, region: u32, offset: u64, count: u32) -> Result<Vec<u8>, u32> {
        let mut body = longs(&[offset]);
        body.extend(words(&[region, count]));
        let reply = self.ask(REGION_READ, &body)?;
        assert_eq!(reply[..16], body[..]);
        assert_eq!(reply.len(), 16 + count as usize);
        Ok(reply[16..].to_vec())
    }

    pub fn write_region(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), u32> {
        let body = access(offset, region, data);
        let reply = self.ask(REGION_WRITE, &body)?;
        assert_eq!(reply, body[..16]);
        Ok(())
    }

    pub fn post(&mut self, region: u32, offset: u64, data: &[u8]) {
        self.send(REGION_WRITE, NO_REPLY, &access(offset, region, data));
    }

    /// Waits until the server closes the connection.
    pub fn is_closed(&mut self) -> bool {
        self.receive().is_none()
    }
}

/// Writes to this offset of BAR 0 are deferred, reads from it as well.
pub const SLOW: u64 = 0xf0;
/// Accesses at this offset of BAR 0 are refused with EBUSY.
pub const BAD: u64 = 0xe0;
pub const BAR_SIZE: usize = 256;

#[derive(Default)]
pub struct Deeds {
    pub bar: Vec<u8>,
    pub config: Vec<u8>,
    /// Writes to BAR 0, in order: offset, data.
    pub writes: Vec<(u64, Vec<u8>)>,
    pub irqs: Vec<String>,
    pub vectors: Vec<Option<Arc<OwnedFd>>>,
    pub wakers: Vec<Waker>,
    /// How many more times a deferred access says Later.
    pub again: u32,
    pub resumed: u32,
    pub given_up: u32,
    pub resets: u32,
    pub attached: u32,
    pub detached: u32,
    pub line: Option<SourceHandle>,
    pub map: Arc<MemoryMap>,
    pub signals: Vec<Arc<OwnedFd>>,
    /// Completions of detach that are held back.
    pub leaving: Vec<Completion>,
}

/// A function of 256 bytes of BAR 0, a read-only BAR 2, and a configuration space.
#[derive(Default)]
pub struct Fake {
    pub deeds: Mutex<Deeds>,
    pub busy: AtomicBool,
    pub hold_detach: AtomicBool,
    pub slow_unmap: AtomicBool,
    pub slow_reset: AtomicBool,
    pub calls: AtomicU64,
    /// What BAR 2 shows; to be set before a client comes.
    pub mappable: OnceLock<Mappable>,
    pub id: u32,
}

impl Fake {
    pub fn new(id: u32) -> Arc<Self> {
        let fake = Self { id, ..Self::default() };
        {
            let mut deeds = fake.deeds.lock().unwrap();
            deeds.bar = (0..BAR_SIZE).map(|n| n as u8).collect();
            deeds.config = vec![0x5a; 4096];
        }
        Arc::new(fake)
    }

    pub fn deeds(&self) -> std::sync::MutexGuard<'_, Deeds> {
        self.deeds.lock().unwrap()
    }

    /// Lets deferred accesses go on.
    pub fn wake(&self) {
        let wakers = std::mem::take(&mut self.deeds().wakers);
        for waker in wakers {
            waker();
        }
    }

    /// Waits until an access is deferred.
    pub fn deferred(&self) {
        until("a deferred access", || !self.deeds().wakers.is_empty());
    }

    fn later(deeds: &mut Deeds, wake: &dyn Fn() -> Waker) -> Access {
        deeds.wakers.push(wake());
        Access::Later
    }
}

impl PciFunction for Fake {
    fn label(&self) -> String {
        format!("fake {}", self.id)
    }

    fn kind(&self) -> &'static str {
        "modern"
    }

    fn member_id(&self) -> u32 {
        self.id
    }

    fn region(&self, index: u32) -> RegionInfo {
        let (size, writable) = match index {
            0 => (BAR_SIZE as u64, true),
            2 => (2 << 20, false),
            4 => (2 << 20, true),
            7 => (4096, true),
            _ => return RegionInfo::default(),
        };
        RegionInfo {
            size,
            readable: index != 4,
            writable,
            mappable: self.mappable.get().filter(|_| index == 2).cloned(),
        }
    }

    fn irq_count(&self, index: u32) -> u32 {
        [1, 0, 64, 0, 1][index as usize]
    }

    fn attach(&self, line: SourceHandle) -> Result<(), Error> {
        if self.busy.load(Ordering::Relaxed) {
            return Err(Error::Busy(self.id, "attached elsewhere"));
        }
        let mut deeds = self.deeds();
        assert_eq!(deeds.attached, deeds.detached, "one client at a time");
        deeds.attached += 1;
        deeds.line = Some(line);
        Ok(())
    }

    fn detach(&self, done: Completion) {
        let mut deeds = self.deeds();
        deeds.detached += 1;
        deeds.line = None;
        deeds.map = Arc::default();
        deeds.vectors.clear();
        if self.hold_detach.load(Ordering::Relaxed) {
            deeds.leaving.push(done);
        }
    }

    fn read(&self, region: u32, offset: u64, data: &mut [u8], wake: &dyn Fn() -> Waker) -> Access {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let mut deeds = self.deeds();
        let at = offset as usize;
        match (region, offset) {
            (0, SLOW) => return Self::later(&mut deeds, wake),
            (0, BAD) => return Access::Refused(libc::EBUSY),
            (0, _) => data.copy_from_slice(&deeds.bar[at..at + data.len()]),
            (7, _) => data.copy_from_slice(&deeds.config[at..at + data.len()]),
            _ => data.fill(0x77),
        }
        Access::Done
    }

    fn write(&self, region: u32, offset: u64, data: &[u8], wake: &dyn Fn() -> Waker) -> Access {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let mut deeds = self.deeds();
        let at = offset as usize;
        match (region, offset) {
            (0, BAD) => return Access::Refused(libc::EBUSY),
            (0, _) => {
                deeds.writes.push((offset, data.to_vec()));
                deeds.bar[at..at + data.len()].copy_from_slice(data);
                if offset == SLOW {
                    return Self::later(&mut deeds, wake);
                }
            }
            (7, _) => deeds.config[at..at + data.len()].copy_from_slice(data),
            _ => {}
        }
        Access::Done
    }

    fn resume(&self, data: &mut [u8], wake: &dyn Fn() -> Waker) -> Access {
        let mut deeds = self.deeds();
        deeds.resumed += 1;
        if deeds.again > 0 {
            deeds.again -= 1;
            return Self::later(&mut deeds, wake);
        }
        data.fill(0x99);
        Access::Done
    }

    fn give_up(&self) {
        self.deeds().given_up += 1;
    }

    fn dma_map(&self, region: Region) -> Result<(), Fault> {
        let mut deeds = self.deeds();
        deeds.map = Arc::new(deeds.map.with(region)?);
        Ok(())
    }

    fn dma_unmap(&self, iova: u64, size: u64, wake: &dyn Fn() -> Waker) -> Result<Access, Fault> {
        let mut deeds = self.deeds();
        deeds.map = Arc::new(deeds.map.without(iova, size, iova)?);
        if self.slow_unmap.load(Ordering::Relaxed) {
            return Ok(Self::later(&mut deeds, wake));
        }
        Ok(Access::Done)
    }

    fn set_irqs(&self, change: IrqChange) -> Result<(), i32> {
        let mut deeds = self.deeds();
        let text = match change {
            IrqChange::Assign { index, start, fds } => {
                let which: String = fds.iter().map(|fd| if fd.is_some() { 'x' } else { '-' }).collect();
                deeds.vectors.resize(64, None);
                let end = start as usize + fds.len();
                deeds.vectors[start as usize..end].clone_from_slice(&fds);
                format!("assign {index} {start} {which}")
            }
            IrqChange::Disable { index } => format!("disable {index}"),
            IrqChange::Mask { index, start, count } => format!("mask {index} {start} {count}"),
            IrqChange::Unmask { index, start, count } => format!("unmask {index} {start} {count}"),
            IrqChange::Trigger { index, start, count } => format!("trigger {index} {start} {count}"),
        };
        deeds.irqs.push(text);
        Ok(())
    }

    fn reset(&self, wake: &dyn Fn() -> Waker) -> Access {
        let mut deeds = self.deeds();
        deeds.resets += 1;
        if self.slow_reset.load(Ordering::Relaxed) {
            return Self::later(&mut deeds, wake);
        }
        Access::Done
    }

    fn take_signals(&self, to: &mut Vec<Arc<OwnedFd>>) {
        to.append(&mut self.deeds().signals);
    }
}

pub struct Bed {
    pub pool: Arc<Pool>,
    pub fake: Arc<Fake>,
    pub server: Arc<Server>,
    pub address: SocketAddr,
}

static NAMES: AtomicU64 = AtomicU64::new(0);

pub fn listener() -> (UnixListener, SocketAddr) {
    let name = format!(
        "vhu-test-{}-{}",
        std::process::id(),
        NAMES.fetch_add(1, Ordering::Relaxed)
    );
    let address = SocketAddr::from_abstract_name(name).unwrap();
    (UnixListener::bind_addr(&address).unwrap(), address)
}

impl Bed {
    pub fn new() -> Self {
        Self::on(&Arc::new(Pool::new(Some(2)).unwrap()), 1)
    }

    pub fn on(pool: &Arc<Pool>, id: u32) -> Self {
        let fake = Fake::new(id);
        let (listener, address) = listener();
        let function = Arc::clone(&fake) as Arc<dyn PciFunction>;
        let server = Server::new(pool, function, listener.into()).unwrap();
        Self {
            pool: Arc::clone(pool),
            fake,
            server,
            address,
        }
    }

    pub fn raw(&self) -> Client {
        Client::raw(&self.address)
    }

    pub fn client(&self) -> Client {
        Client::new(&self.address)
    }

    /// Waits until the function is free again.
    pub fn free(&self) {
        until("detached", || {
            let deeds = self.fake.deeds();
            deeds.attached == deeds.detached && !self.server.statistics().connected
        });
    }
}

/// A completion and what becomes true when it ends.
pub fn completion() -> (Completion, Arc<AtomicBool>) {
    let done = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&done);
    (Completion::call(move || flag.store(true, Ordering::Release)), done)
}

/// Fds of this process.
pub fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Fds of this process that name a file.
pub fn fds_of(file: &File) -> usize {
    let id = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
    let wanted = id(file.metadata().unwrap());
    std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter(|entry| {
            let path = entry.as_ref().unwrap().path();
            // Those of others come and go.
            std::fs::metadata(path).is_ok_and(|metadata| id(metadata) == wanted)
        })
        .count()
}
