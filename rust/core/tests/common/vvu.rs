// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A virtio-vhost-user device served as a PCI function, with a driver (the slave) and a master to be scripted. For tests that
//! have `common` and `vfio` beside it.

#![allow(dead_code)]
#![allow(missing_docs, clippy::unwrap_used)]

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use vhu_core::error::Fault;
use vhu_core::event::Event;
use vhu_core::function::{Function, COMMON_OFFSET, DEVICE_OFFSET, ISR_OFFSET, NOTIFY_OFFSET};
use vhu_core::member::{Member, MemberOptions};
use vhu_core::sys::{self, PeerFd};
use vhu_core::vfio_user::function::PciFunction;
use vhu_core::vfio_user::server::Server;
use vhu_core::vvu::{Options, Taken, VvuDevice};
use vhu_core::worker::Pool;

use crate::common::{peer, Guest, Ring, NEXT, WRITE};
use crate::vfio::{self, until, words, Client};

/// vhost-user queues.
pub const N: u16 = 2;
pub const VECTORS: u16 = 2 * N + 4;
/// Bytes of the shared memory region.
pub const REGION: u64 = 1 << 20;
pub const NO_VECTOR: u32 = 0xffff;
pub const CONFIG: u32 = 7;
pub const MODERN: u32 = 2;
pub const SHARED: u32 = 4;

const BASE: u64 = 0x10_0000;
const SIZE: u64 = 0x20_0000;
const RX: u64 = BASE + 0x4_0000;
const TX: u64 = BASE + 0x10_0000;
const SLOT: u64 = 0x2000;
pub const ENTRIES: u16 = 64;
pub const RX_SIZE: u32 = 12 + 4096;

pub const GET_FEATURES: u32 = 1;
pub const SET_FEATURES: u32 = 2;
pub const SET_OWNER: u32 = 3;
pub const SET_MEM_TABLE: u32 = 5;
pub const SET_LOG_BASE: u32 = 6;
pub const SET_LOG_FD: u32 = 7;
pub const SET_VRING_KICK: u32 = 12;
pub const SET_VRING_CALL: u32 = 13;
pub const SET_VRING_ERR: u32 = 14;
pub const GET_PROTOCOL_FEATURES: u32 = 15;
pub const SET_PROTOCOL_FEATURES: u32 = 16;
pub const GET_QUEUE_NUM: u32 = 17;
pub const SET_BACKEND_REQ_FD: u32 = 21;
pub const VERSION: u32 = 1;
pub const REPLY: u32 = 5;

pub struct Bed {
    pub pool: Arc<Pool>,
    pub device: Arc<VvuDevice>,
    pub member: Arc<Member>,
    pub function: Arc<Function>,
    pub server: Arc<Server>,
    pub address: SocketAddr,
}

pub fn options() -> Options {
    Options {
        max_queues: N,
        uuid: *b"0123456789abcdef",
        shared_memory: REGION,
        ram_file: None,
    }
}

pub fn device(pool: &Arc<Pool>, options: Options, vectors: u16) -> (Arc<VvuDevice>, Arc<Member>) {
    let device = VvuDevice::new(Arc::clone(pool), 7, options).unwrap();
    let options = MemberOptions {
        vectors,
        ..MemberOptions::default()
    };
    let member = Member::new(Arc::clone(pool), 7, Arc::clone(&device) as _, options);
    device.bind(&member);
    (device, member)
}

impl Bed {
    pub fn new() -> Self {
        Self::with(options())
    }

    /// With a RAM file of so many bytes.
    pub fn with_ram(file: &File, len: u64) -> Self {
        Self::with(Options {
            ram_file: Some((file.try_clone().unwrap().into(), len)),
            ..options()
        })
    }

    pub fn with(options: Options) -> Self {
        let pool = Arc::new(Pool::new(Some(2)).unwrap());
        let (device, member) = device(&pool, options, VECTORS);
        let function = Function::modern(Arc::clone(&member)).unwrap();
        let (listener, address) = vfio::listener();
        let server = Server::new(&pool, Arc::clone(&function) as Arc<dyn PciFunction>, listener.into()).unwrap();
        Self {
            pool,
            device,
            member,
            function,
            server,
            address,
        }
    }

    /// A client with memory; nothing was written to a register.
    pub fn slave(&self) -> Slave {
        let mut client = Client::new(&self.address);
        let guest = Guest::new(BASE, SIZE);
        let map = vfio::dma_map(3, 0, BASE, SIZE);
        client.ask_fds(vfio::DMA_MAP, &map, &[guest.file.as_raw_fd()]).unwrap();
        Slave {
            client,
            guest,
            rx: Ring::legacy(BASE, ENTRIES, 4096),
            tx: Ring::legacy(BASE + 0x1_0000, ENTRIES, 4096),
            rx_seen: 0,
        }
    }

    /// A driver that runs, has MSI-X, and has set SLAVE_UP; its eventfds.
    pub fn up(&self) -> (Slave, Vec<OwnedFd>) {
        let mut slave = self.slave();
        let vectors = slave.enable_msix();
        slave.start();
        slave.set_status(1);
        assert!(self.device.slave_up());
        (slave, vectors)
    }

    pub fn master(&self) -> Master {
        Master {
            device: Arc::clone(&self.device),
            session: self.device.connect_master().unwrap(),
        }
    }

    /// The relay's events so far.
    pub fn relay_events(&self) -> usize {
        let events = self.pool.events().take();
        events
            .iter()
            .filter(|event| matches!(event, Event::Relay { .. }))
            .count()
    }

    /// The rule that a driver has broken.
    pub fn broken(&self) -> Option<&'static str> {
        self.member.owner().fault().map(|fault| fault.rule)
    }

    pub fn free(&self) {
        until("no client any more", || {
            !self.server.statistics().connected && !self.member.attached()
        });
    }
}

pub struct Slave {
    pub client: Client,
    pub guest: Guest,
    pub rx: Ring,
    pub tx: Ring,
    rx_seen: u16,
}

impl Slave {
    pub fn get(&mut self, region: u32, offset: u64, width: u32) -> u32 {
        let mut bytes = [0; 4];
        let read = self.client.read(region, offset, width).unwrap();
        bytes[..width as usize].copy_from_slice(&read);
        u32::from_le_bytes(bytes)
    }

    pub fn put(&mut self, region: u32, offset: u64, width: usize, value: u32) {
        self.client
            .write_region(region, offset, &value.to_le_bytes()[..width])
            .unwrap();
    }

    pub fn common(&mut self, field: u64, width: u32) -> u32 {
        self.get(MODERN, u64::from(COMMON_OFFSET) + field, width)
    }

    pub fn set_common(&mut self, field: u64, width: usize, value: u32) {
        self.put(MODERN, u64::from(COMMON_OFFSET) + field, width, value);
    }

    pub fn select(&mut self, index: u16) {
        self.set_common(22, 2, index.into());
    }

    /// Maps a vector for an index and reads it back.
    pub fn set_vector(&mut self, index: u16, vector: u32) -> u32 {
        self.select(index);
        self.set_common(26, 2, vector);
        self.common(26, 2)
    }

    pub fn device_status(&mut self) -> u32 {
        self.common(20, 1)
    }

    pub fn isr(&mut self) -> u32 {
        self.get(MODERN, ISR_OFFSET.into(), 1)
    }

    pub fn status(&mut self) -> u32 {
        self.get(MODERN, DEVICE_OFFSET.into(), 4)
    }

    pub fn set_status(&mut self, status: u32) {
        self.put(MODERN, DEVICE_OFFSET.into(), 4, status);
    }

    /// Notifies an index, as for available buffers.
    pub fn notify(&mut self, index: u16) {
        let offset = u64::from(NOTIFY_OFFSET) + 4 * u64::from(index);
        self.put(MODERN, offset, 2, index.into());
    }

    /// Offset of a capability with this id, and this `cfg_type` if it is virtio's.
    pub fn find(&mut self, id: u32, cfg_type: Option<u32>) -> Option<u64> {
        let mut at = u64::from(self.get(CONFIG, 0x34, 1));
        while at != 0 {
            if self.get(CONFIG, at, 1) == id {
                let kind = self.get(CONFIG, at + 3, 1);
                if cfg_type.is_none_or(|wanted| kind == wanted) {
                    return Some(at);
                }
            }
            at = self.get(CONFIG, at + 1, 1).into();
        }
        None
    }

    /// Eventfds for vectors from 0 on, or for INTx.
    pub fn assign(&mut self, index: u32, count: u16) -> Vec<OwnedFd> {
        let fds: Vec<OwnedFd> = (0..count).map(|_| sys::eventfd().unwrap()).collect();
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let body = words(&[20, 0x24, index, 0, count.into()]);
        self.client.ask_fds(vfio::SET_IRQS, &body, &raw).unwrap();
        fds
    }

    /// Vector 0 is the configuration's, x + 1 that of index x.
    pub fn enable_msix(&mut self) -> Vec<OwnedFd> {
        let msix = self.find(0x11, None).unwrap();
        self.put(CONFIG, msix + 2, 2, 0x8000);
        self.assign(2, VECTORS)
    }

    /// Reset to DRIVER_OK; every index asks for a vector.
    pub fn start(&mut self) {
        self.prepare();
        self.set_common(20, 1, 0xf);
        assert_eq!(self.device_status(), 0xf);
    }

    /// Everything before DRIVER_OK.
    pub fn prepare(&mut self) {
        self.set_common(20, 1, 0);
        assert_eq!(self.device_status(), 0);
        (self.rx.avail_idx, self.tx.avail_idx, self.rx_seen) = (0, 0, 0);
        for ring in [&self.rx, &self.tx] {
            self.guest.write(ring.addresses.desc, &[0; 0x2000]);
        }
        self.set_common(20, 1, 3);
        self.set_common(8, 4, 1);
        self.set_common(12, 4, 1);
        self.set_common(20, 1, 0xb);
        assert_eq!(self.device_status(), 0xb);
        self.set_common(16, 2, 0);
        for index in 0..2 * N + 3 {
            self.set_vector(index, u32::from(index) + 1);
        }
        let addresses = [self.rx.addresses, self.tx.addresses];
        for (index, addresses) in (0..).zip(addresses) {
            self.select(index);
            assert_eq!(self.common(24, 2), u32::from(ENTRIES));
            for (at, address) in [(32, addresses.desc), (40, addresses.driver), (48, addresses.device)] {
                self.set_common(at, 4, address as u32);
            }
            self.set_common(28, 2, 1);
        }
    }

    /// Makes a buffer available in rxq.
    pub fn post(&mut self, size: u32) {
        let slot = self.rx.avail_idx % ENTRIES;
        let address = RX + SLOT * u64::from(slot);
        self.rx.descriptor(&self.guest, slot, address, size, WRITE, 0);
        self.rx.offer(&self.guest, slot);
        self.notify(0);
    }

    /// Whether rxq has used a buffer that was not taken yet.
    pub fn has_message(&self) -> bool {
        self.rx.used_idx(&self.guest) != self.rx_seen
    }

    /// Waits for the next message in rxq.
    pub fn take(&mut self) -> Vec<u8> {
        until("a message", || self.has_message());
        let (slot, len) = self.rx.used(&self.guest, self.rx_seen);
        self.rx_seen = self.rx_seen.wrapping_add(1);
        self.guest.read(RX + SLOT * u64::from(slot), len as usize)
    }

    /// Posts a buffer and waits for a message in it.
    pub fn receive(&mut self) -> Vec<u8> {
        self.post(RX_SIZE);
        self.take()
    }

    /// Makes a message available in txq.
    pub fn offer(&mut self, bytes: &[u8]) {
        let slot = self.tx.avail_idx % ENTRIES;
        let address = TX + SLOT * u64::from(slot);
        self.guest.write(address, bytes);
        self.tx.descriptor(&self.guest, slot, address, bytes.len() as u32, 0, 0);
        self.tx.offer(&self.guest, slot);
    }

    /// As `offer`, in two buffers.
    pub fn offer_in_two(&mut self, bytes: &[u8], at: usize) {
        let slot = self.tx.avail_idx % ENTRIES;
        let address = TX + SLOT * u64::from(slot);
        self.guest.write(address, bytes);
        let (second, len) = ((slot + 1) % ENTRIES, bytes.len());
        self.tx.descriptor(&self.guest, slot, address, at as u32, NEXT, second);
        self.tx
            .descriptor(&self.guest, second, address + at as u64, (len - at) as u32, 0, 0);
        self.tx.offer(&self.guest, slot);
    }

    /// Sends a message and waits until it was taken.
    pub fn send(&mut self, bytes: &[u8]) {
        self.offer(bytes);
        self.notify(1);
        until("txq's end", || self.tx.used_idx(&self.guest) == self.tx.avail_idx);
    }

    /// Sends one that the device can't take.
    pub fn send_broken(&mut self, bytes: &[u8]) {
        self.offer(bytes);
        self.notify(1);
    }
}

/// A region of SET_MEM_TABLE: guest address, bytes, mmap_offset, file.
pub type Row<'a> = (u64, u64, u64, &'a File);

/// The front end of the vhost-user device.
pub struct Master {
    pub device: Arc<VvuDevice>,
    pub session: u64,
}

pub fn head(request: u32, flags: u32, size: u32) -> [u8; 12] {
    words(&[request, flags, size]).try_into().unwrap()
}

pub fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = head(request, flags, payload.len() as u32).to_vec();
    bytes.extend(payload);
    bytes
}

pub fn eventfd() -> PeerFd {
    sys::eventfd().unwrap().into()
}

/// Two ends of the same eventfd.
pub fn pair() -> (PeerFd, OwnedFd) {
    let fd = sys::eventfd().unwrap();
    (fd.try_clone().unwrap().into(), fd)
}

impl Master {
    pub fn send(&self, request: u32, payload: &[u8], fds: Vec<PeerFd>) -> Result<Taken, Fault> {
        let header = head(request, VERSION, payload.len() as u32);
        self.device.master_message(self.session, &header, payload, fds)
    }

    pub fn say(&self, request: u32, payload: &[u8], fds: Vec<PeerFd>) {
        let taken = self.send(request, payload, fds).unwrap();
        assert!(taken.operations.is_empty());
    }

    pub fn number(&self, request: u32, value: u64, fds: Vec<PeerFd>) {
        self.say(request, &value.to_le_bytes(), fds);
    }

    pub fn memory(&self, regions: &[Row<'_>]) -> Result<Taken, Fault> {
        let (payload, fds) = table(regions);
        self.send(SET_MEM_TABLE, &payload, fds)
    }

    pub fn log(&self, size: u64, offset: u64, file: &File) -> Result<Taken, Fault> {
        let payload = [size.to_le_bytes(), offset.to_le_bytes()].concat();
        self.send(SET_LOG_BASE, &payload, vec![peer(file)])
    }

    pub fn leave(&self) -> bool {
        self.device.disconnect_master(self.session, None)
    }
}

pub fn table(regions: &[Row<'_>]) -> (Vec<u8>, Vec<PeerFd>) {
    let mut payload = words(&[regions.len() as u32, 0]);
    for (guest, size, offset, _) in regions {
        // The user address means nothing here.
        payload.extend(vfio::longs(&[*guest, *size, 0x7fff_0000_0000, *offset]));
    }
    (payload, regions.iter().map(|(.., file)| peer(file)).collect())
}

pub fn signalled(fd: &OwnedFd) -> bool {
    sys::eventfd_drain(fd.as_raw_fd())
}

/// Not signalled, also not a little later.
pub fn quiet(fd: &OwnedFd) -> bool {
    std::thread::sleep(Duration::from_millis(30));
    !signalled(fd)
}

pub fn wait_signal(what: &str, fd: &OwnedFd) {
    until(what, || signalled(fd));
}

/// An fd of a kind that is never right.
pub fn pipe() -> PeerFd {
    let mut fds = [0; 2];
    // SAFETY: room for two fds; those made are nobody else's.
    unsafe {
        assert_eq!(libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC), 0);
        drop(OwnedFd::from_raw_fd(fds[1]));
        OwnedFd::from_raw_fd(fds[0]).into()
    }
}
