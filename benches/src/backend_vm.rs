// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A backend VM behind the vhost-user carrier: what its QEMU (`vhost-user-test-device-pci`), its driver and a bridge to a
//! vhost-user daemon would do, in one process.
//!
//! The daemon is on the host and gets the eventfds of the device's special indices as they are, so a notification passes
//! nothing but the device on its way between the master and the daemon.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::ram::Ram;
use crate::vring::{self, Vring};
use crate::wire::{feature, protocol, request, words, Connection};
use crate::Failure;

/// Header of a vhost-user message.
pub const HEADER: usize = 12;
const VERSION: u32 = 1;
const FLAG_REPLY: u32 = 4;
const FLAG_NEED_REPLY: u32 = 8;
const NO_FD: u64 = 1 << 8;

const GET_QUEUE_NUM: u32 = 17;
const SET_VRING_ERR: u32 = 14;
const SET_BACKEND_REQ_FD: u32 = 21;
const SET_CONFIG: u32 = 25;
const SET_LOG_BASE: u32 = 6;

const BACKEND_CONFIG_CHANGE: u32 = 2;
const BACKEND_SHMEM_MAP: u32 = 9;
const BACKEND_SHMEM_UNMAP: u32 = 10;

const BACKEND_REQ: u64 = 1 << 5;
const BACKEND_SEND_FD: u64 = 1 << 10;
const SHMEM: u64 = 1 << 22;

/// Bits of the status field.
const SLAVE_UP: u32 = 1;
const MASTER_UP: u32 = 2;

/// Where this VM's RAM starts: not 0, so that a mix-up of address kinds shows.
const GUEST_BASE: u64 = 0x1_0000_0000;
const RXQ: usize = 0;
const TXQ: usize = 1;
/// Longest wait for a buffer of txq.
const TXQ_TIMEOUT: Duration = Duration::from_secs(5);

fn word(bytes: &[u8], at: usize) -> u32 {
    let mut value = [0; 4];
    if let Some(found) = bytes.get(at..at + 4) {
        value.copy_from_slice(found);
    }
    u32::from_le_bytes(value)
}

fn quad(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at)) | u64::from(word(bytes, at + 4)) << 32
}

/// Memory of the master that the device has asked to be mapped.
struct Mapped {
    offset: u64,
    size: u64,
    fd: File,
    fd_offset: u64,
}

#[derive(Default)]
struct Shared {
    mapped: Mutex<Vec<Mapped>>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Vec<Mapped>> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The VMM's thread for requests of the device, until the connection ends.
    fn answer(&self, mut channel: UnixStream, config: &EventFd) -> io::Result<()> {
        loop {
            let mut header = [0; HEADER];
            let (got, fd) = channel.recv_with_fd(&mut header).map_err(io::Error::from)?;
            if got == 0 {
                return Ok(());
            }
            channel.read_exact(&mut header[got..])?;
            let mut payload = vec![0; (word(&header, 8) as usize).min(4096)];
            channel.read_exact(&mut payload)?;
            let request = word(&header, 0);
            let [fd_offset, offset, size] = [8, 16, 24].map(|at| quad(&payload, at));
            let mut failed = false;
            match (request, fd) {
                (BACKEND_SHMEM_MAP, Some(fd)) => self.lock().push(Mapped {
                    offset,
                    size,
                    fd,
                    fd_offset,
                }),
                (BACKEND_SHMEM_UNMAP, _) => {
                    let mut mapped = self.lock();
                    let before = mapped.len();
                    mapped.retain(|one| one.offset != offset || one.size != size);
                    failed = mapped.len() == before;
                }
                (BACKEND_CONFIG_CHANGE, _) => config.write(1)?,
                _ => failed = true,
            }
            if word(&header, 4) & FLAG_NEED_REPLY != 0 {
                let mut reply = words(&[request, VERSION | FLAG_REPLY, 8]);
                reply.extend_from_slice(&u64::from(failed).to_le_bytes());
                channel.write_all(&reply)?;
            }
        }
    }
}

/// The VM: its VMM's connection to the device, and its driver.
pub struct BackendVm {
    connection: Connection,
    shared: Arc<Shared>,
    ram: Ram,
    rings: [Vring; 2],
    /// Of all indices, special ones too: what the driver's writes to notification addresses arrive at.
    pub kicks: Vec<EventFd>,
    /// Of all indices: the interrupts.
    pub calls: Vec<EventFd>,
    config: EventFd,
}

impl BackendVm {
    /// Connects, and brings the device up to DRIVER_OK, without SLAVE_UP. `flags` are those of eventfds.
    ///
    /// # Errors
    /// What goes wrong.
    pub fn start(path: &Path, flags: libc::c_int) -> io::Result<Self> {
        let mut connection = Connection::open(path)?;
        let accepted = feature::VERSION_1 | feature::PROTOCOL_FEATURES;
        if connection.get_u64(request::GET_FEATURES)? & accepted != accepted {
            return Err(io::Error::other("the device doesn't offer VERSION_1"));
        }
        let needed = protocol::MQ | protocol::REPLY_ACK | BACKEND_REQ | protocol::CONFIG | BACKEND_SEND_FD | SHMEM;
        let offered = connection.get_u64(request::GET_PROTOCOL_FEATURES)?;
        if offered & needed != needed {
            return Err(io::Error::other(format!(
                "protocol features {offered:#x} lack some of {needed:#x}"
            )));
        }
        connection.set_u64(request::SET_PROTOCOL_FEATURES, needed)?;
        connection.use_reply_ack();
        let queues = connection.get_u64(GET_QUEUE_NUM)?;
        let queues = u32::try_from(queues).ok().filter(|queues| (5..=256).contains(queues));
        let queues = queues.ok_or_else(|| io::Error::other("this is no virtio-vhost-user device"))?;
        let shared = Arc::new(Shared::default());
        let config = EventFd::new(EFD_NONBLOCK)?;
        let (ours, theirs) = UnixStream::pair()?;
        connection.set(SET_BACKEND_REQ_FD, &[], &[theirs.as_raw_fd()])?;
        {
            let (shared, config) = (Arc::clone(&shared), config.try_clone()?);
            std::thread::spawn(move || {
                if let Err(error) = shared.answer(ours, &config) {
                    eprintln!("vhu-bench-vvu: requests of the device: {error}");
                }
            });
        }
        connection.set(request::SET_OWNER, &[], &[])?;
        connection.set_u64(request::SET_FEATURES, accepted)?;
        // rxq, txq, and one ring that is never used for all special indices.
        let ram = Ram::new((3 * vring::ROOM).next_multiple_of(2 << 20))?;
        let ring = |n: usize| Vring::new(n * vring::ROOM, GUEST_BASE);
        let (rings, dummy) = ([ring(RXQ), ring(TXQ)], ring(2));
        let mut table = words(&[1, 0]);
        for value in [GUEST_BASE, ram.len() as u64, ram.user_address(), 0] {
            table.extend_from_slice(&value.to_le_bytes());
        }
        connection.set(request::SET_MEM_TABLE, &table, &[ram.fd()])?;
        let eventfds = || (0..queues).map(|_| EventFd::new(flags)).collect::<io::Result<Vec<_>>>();
        let (kicks, calls) = (eventfds()?, eventfds()?);
        for (index, (kick, call)) in (0..queues).zip(kicks.iter().zip(&calls)) {
            let ring = rings.get(index as usize).unwrap_or(&dummy);
            connection.set_vring(request::SET_VRING_NUM, index, u32::from(vring::SIZE))?;
            connection.set_vring(request::SET_VRING_BASE, index, 0)?;
            let mut addresses = words(&[index, 0]);
            let [desc, driver, device] = ring.areas();
            for place in [desc, device, driver] {
                addresses.extend_from_slice(&(ram.user_address() + place as u64).to_le_bytes());
            }
            addresses.extend_from_slice(&[0; 8]);
            connection.set(request::SET_VRING_ADDR, &addresses, &[])?;
            let payload = u64::from(index).to_le_bytes();
            connection.set(request::SET_VRING_KICK, &payload, &[kick.as_raw_fd()])?;
            connection.set(request::SET_VRING_CALL, &payload, &[call.as_raw_fd()])?;
        }
        for index in 0..queues {
            connection.set_vring(request::SET_VRING_ENABLE, index, 1)?;
        }
        Ok(Self {
            connection,
            shared,
            ram,
            rings,
            kicks,
            calls,
            config,
        })
    }

    fn status(&mut self) -> io::Result<u32> {
        Ok(word(&self.connection.config(0, 4)?, 0))
    }

    /// Posts all buffers of rxq and sets SLAVE_UP.
    ///
    /// # Errors
    /// What the connection says.
    pub fn up(&mut self) -> io::Result<()> {
        self.rings[RXQ].fill(&self.ram);
        self.kicks[RXQ].write(1)?;
        let mut payload = words(&[0, 4, 0]);
        payload.extend_from_slice(&SLAVE_UP.to_le_bytes());
        self.connection.set(SET_CONFIG, &payload, &[])
    }

    /// The master's next message, or slave-channel reply.
    ///
    /// # Errors
    /// A used ring that makes no sense.
    pub fn receive(&mut self) -> io::Result<Option<Vec<u8>>> {
        let message = self.rings[RXQ].take(&self.ram)?;
        if message.is_some() {
            self.rings[RXQ].fill(&self.ram);
            self.kicks[RXQ].write(1)?;
        }
        Ok(message)
    }

    /// Puts a message into txq.
    fn send(&mut self, message: &[u8]) -> io::Result<()> {
        let end = Instant::now() + TXQ_TIMEOUT;
        loop {
            while self.rings[TXQ].take(&self.ram)?.is_some() {}
            if self.rings[TXQ].send(&self.ram, message) {
                return self.kicks[TXQ].write(1);
            }
            if Instant::now() > end {
                return Err(io::Error::other("the device doesn't take messages from txq"));
            }
            wait(&[self.calls[TXQ].as_raw_fd()], 10)?;
            drain(&self.calls[TXQ]);
        }
    }

    /// The table as the daemon is to have it, and its files: regions are where the device has put them.
    fn memory_table(&self, payload: &[u8]) -> io::Result<(Vec<u8>, Vec<File>)> {
        let mut table = payload.to_vec();
        let mut files = Vec::new();
        let mut base = 0;
        let mapped = self.shared.lock();
        for row in table.get_mut(8..).unwrap_or_default().chunks_exact_mut(32) {
            let (size, gap) = (quad(row, 8), quad(row, 24));
            let at = base + gap;
            let found = mapped
                .iter()
                .find(|one| at >= one.offset && at - one.offset <= one.size && size <= one.size - (at - one.offset));
            let one = found.ok_or_else(|| io::Error::other(format!("{size:#x} bytes at {at:#x} aren't mapped")))?;
            row[24..].copy_from_slice(&(one.fd_offset + at - one.offset).to_le_bytes());
            files.push(one.fd.try_clone()?);
            base = at + size;
        }
        Ok((table, files))
    }
}

/// Waits until one of these is readable, or has hung up; milliseconds, -1 for ever.
fn wait(fds: &[RawFd], timeout: libc::c_int) -> io::Result<Vec<bool>> {
    let mut polls: Vec<libc::pollfd> = fds
        .iter()
        .map(|&fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    // SAFETY: as many pollfds as said, ours alone.
    let done = unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, timeout) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(polls.iter().map(|poll| poll.revents != 0).collect())
}

fn drain(fd: &EventFd) {
    // Nothing in it is nothing to do.
    let _ = fd.read();
}

/// A vhost-user daemon, as a front end sees it: whole messages.
struct Daemon(UnixStream);

impl Daemon {
    fn send(&self, message: &[u8], files: &[RawFd]) -> io::Result<()> {
        match self.0.send_with_fds(&[message], files).map_err(io::Error::from)? {
            sent if sent == message.len() => Ok(()),
            sent => Err(io::Error::other(format!("{sent} of {} bytes sent", message.len()))),
        }
    }

    /// None: it has hung up.
    fn receive(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut message = vec![0; HEADER];
        // Descriptors of a daemon's have no meaning behind the device.
        let (got, _) = self.0.recv_with_fd(&mut message).map_err(io::Error::from)?;
        if got == 0 {
            return Ok(None);
        }
        self.0.read_exact(&mut message[got..])?;
        let size = word(&message, 8) as usize;
        if HEADER + size > vring::BUFFER {
            return Err(io::Error::other(format!("the daemon announces {size} bytes")));
        }
        message.resize(HEADER + size, 0);
        self.0.read_exact(&mut message[HEADER..])?;
        Ok(Some(message))
    }
}

/// A message of the master's for the daemon, with descriptors instead of what the device has consumed.
fn pass_on(vm: &BackendVm, daemon: &Daemon, message: &[u8]) -> io::Result<()> {
    let (head, payload) = message
        .split_at_checked(HEADER)
        .ok_or_else(|| io::Error::other("half a message in rxq"))?;
    let request = word(head, 0);
    if word(head, 4) & FLAG_REPLY != 0 {
        return Ok(());
    }
    match request {
        request::SET_MEM_TABLE => {
            let (table, files) = vm.memory_table(payload)?;
            let files: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
            daemon.send(&[head, &table].concat(), &files)
        }
        request::SET_VRING_KICK | request::SET_VRING_CALL | SET_VRING_ERR => {
            let value = quad(payload, 0);
            let index = 2 + 2 * (value & 0xff) as usize;
            // Kicks come by the notification of the index, calls and errors leave by the doorbells.
            let fd = match request {
                request::SET_VRING_KICK => vm.calls.get(index),
                request::SET_VRING_CALL => vm.kicks.get(index),
                _ => vm.kicks.get(index + 1),
            };
            let fd = fd.ok_or_else(|| io::Error::other(format!("queue {}", value & 0xff)))?;
            let fds = if value & NO_FD == 0 {
                vec![fd.as_raw_fd()]
            } else {
                Vec::new()
            };
            daemon.send(message, &fds)
        }
        SET_LOG_BASE | SET_BACKEND_REQ_FD => Err(io::Error::other(format!(
            "request {request} is none that this backend VM can pass on"
        ))),
        _ => daemon.send(message, &[]),
    }
}

/// Serves masters with a daemon, one after the other, until the device is gone.
///
/// # Errors
/// What goes wrong.
pub fn serve(device: &Path, path: &Path) -> Result<(), Failure> {
    let mut vm = BackendVm::start(device, EFD_NONBLOCK)?;
    loop {
        let mut daemon = Daemon(UnixStream::connect(path).map_err(|e| format!("{}: {e}", path.display()))?);
        let mut early: VecDeque<Vec<u8>> = VecDeque::new();
        // What is left in rxq is an earlier master's.
        while vm.receive()?.is_some() {}
        vm.up()?;
        println!("up");
        loop {
            let fds = [
                vm.calls[RXQ].as_raw_fd(),
                vm.config.as_raw_fd(),
                daemon.0.as_raw_fd(),
                vm.connection.as_raw_fd(),
            ];
            let ready = wait(&fds, -1)?;
            if ready[3] {
                return Ok(());
            }
            drain(&vm.calls[RXQ]);
            while let Some(message) = vm.receive()? {
                early.push_back(message);
            }
            if ready[1] {
                drain(&vm.config);
                if vm.status()? & (SLAVE_UP | MASTER_UP) == 0 {
                    break;
                }
            }
            for message in early.drain(..) {
                pass_on(&vm, &daemon, &message)?;
            }
            if ready[2] {
                let answer = daemon.receive()?.ok_or("the daemon has hung up")?;
                vm.send(&answer)?;
            }
        }
    }
}
