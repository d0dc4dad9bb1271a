// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A backend VM behind the vfio-user carrier: its VMM's client and its driver, up to SLAVE_UP.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use vhu_core::vfio_user::wire::{command, RegionAccess};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::ram::Ram;
use crate::vring::{self, Vring};

/// Bytes of a header.
pub const HEADER: usize = 16;
const FLAG_REPLY: u32 = 1;
const FLAG_NO_REPLY: u32 = 1 << 4;
const FLAG_ERROR: u32 = 1 << 5;
const CONFIG_REGION: u32 = 7;
const MSIX: u32 = 2;
const TIMEOUT: Duration = Duration::from_secs(5);

const IOVA: u64 = 0x1_0000_0000;
const RXQ: u16 = 0;
/// Virtio structures in the configuration space.
const COMMON: u8 = 1;
const NOTIFY: u8 = 2;
const DEVICE: u8 = 4;

/// A whole command. `answered`: its reply is waited for.
fn message(id: u16, command: u16, body: &[u8], answered: bool) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + body.len());
    bytes.extend(id.to_ne_bytes());
    bytes.extend(command.to_ne_bytes());
    bytes.extend(((HEADER + body.len()) as u32).to_ne_bytes());
    bytes.extend((if answered { 0 } else { FLAG_NO_REPLY }).to_ne_bytes());
    bytes.extend([0; 4]);
    bytes.extend(body);
    bytes
}

fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

/// Part of a region.
#[derive(Clone, Copy, Default)]
struct Place {
    region: u32,
    offset: u64,
}

impl Place {
    fn access(self, at: u64, count: usize) -> Vec<u8> {
        let mut body = Vec::new();
        let access = RegionAccess {
            offset: self.offset + at,
            region: self.region,
            count: count as u32,
        };
        access.encode(&mut body);
        body
    }
}

/// The VM.
pub struct PciClient {
    stream: UnixStream,
    common: Place,
    notify: Place,
    multiplier: u32,
    ram: Ram,
    receive: Vring,
    /// MSI-X: configuration, rxq, txq, and the kick notification of queue 0.
    pub vectors: [EventFd; 4],
}

impl PciClient {
    /// Connects, and does what driver and VMM do until the device has SLAVE_UP. `flags` are those of eventfds.
    ///
    /// # Errors
    /// What goes wrong.
    pub fn start(path: &Path, flags: libc::c_int) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        let new = || EventFd::new(flags);
        let mut vm = Self {
            stream,
            common: Place::default(),
            notify: Place::default(),
            multiplier: 0,
            ram: Ram::new(2 << 20)?,
            receive: Vring::new(0, IOVA),
            vectors: [new()?, new()?, new()?, new()?],
        };
        let mut version = vec![0; 4];
        version.extend(b"{\"capabilities\":{\"max_msg_fds\":16,\"max_data_xfer_size\":1048576}}\0");
        vm.call(command::VERSION, &version, &[])?;
        let mut map = words(&[32, 3]);
        for value in [0, IOVA, vm.ram.len() as u64] {
            map.extend(value.to_ne_bytes());
        }
        let fd = vm.ram.fd();
        vm.call(command::DMA_MAP, &map, &[fd])?;
        let config = Place {
            region: CONFIG_REGION,
            offset: 0,
        };
        let device = vm.find_structures(config)?;
        // Memory and bus master.
        vm.write(config, 4, &6u16.to_ne_bytes())?;
        let given: Vec<RawFd> = vm.vectors.iter().map(AsRawFd::as_raw_fd).collect();
        // Eventfds, triggered, from vector 0 on.
        let mut irqs = words(&[20, 1 << 2 | 1 << 5, MSIX, 0]);
        irqs.extend((given.len() as u32).to_ne_bytes());
        vm.call(command::DEVICE_SET_IRQS, &irqs, &given)?;
        vm.drive()?;
        // SLAVE_UP.
        vm.write(device, 0, &1u32.to_ne_bytes())?;
        Ok(vm)
    }

    /// Sends a command and waits for its reply; the body of that.
    fn call(&mut self, command: u16, body: &[u8], fds: &[RawFd]) -> io::Result<Vec<u8>> {
        let bytes = message(1, command, body, true);
        let sent = self.stream.send_with_fds(&[&bytes[..]], fds).map_err(io::Error::from)?;
        let mut header = [0; HEADER];
        self.stream.read_exact(&mut header)?;
        let word = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let mut reply = vec![0; (word(4) as usize).saturating_sub(HEADER).min(1 << 16)];
        self.stream.read_exact(&mut reply)?;
        if sent != bytes.len() || word(8) & (FLAG_REPLY | FLAG_ERROR) != FLAG_REPLY {
            return Err(io::Error::other(format!(
                "vfio-user command {command}: error {}",
                word(12)
            )));
        }
        Ok(reply)
    }

    fn read<const N: usize>(&mut self, place: Place, at: u64) -> io::Result<[u8; N]> {
        let reply = self.call(command::REGION_READ, &place.access(at, N), &[])?;
        let data = reply.get(RegionAccess::SIZE..).and_then(|data| data.try_into().ok());
        data.ok_or_else(|| io::Error::other(format!("a read of {N} bytes: {} in the reply", reply.len())))
    }

    fn write(&mut self, place: Place, at: u64, data: &[u8]) -> io::Result<()> {
        let mut body = place.access(at, data.len());
        body.extend_from_slice(data);
        self.call(command::REGION_WRITE, &body, &[]).map(|_| ())
    }

    /// Goes through the capabilities and turns MSI-X on; where the device configuration is.
    fn find_structures(&mut self, config: Place) -> io::Result<Place> {
        let mut device = None;
        let mut at = u64::from(self.read::<1>(config, 0x34)?[0]);
        for _ in 0..48 {
            if at == 0 {
                break;
            }
            let [id, next, _, kind, bar, ..] = self.read::<8>(config, at)?;
            if id == 0x11 {
                self.write(config, at + 2, &0x8000u16.to_ne_bytes())?;
            }
            if id == 0x09 && matches!(kind, COMMON | NOTIFY | DEVICE) {
                let place = Place {
                    region: bar.into(),
                    offset: u32::from_ne_bytes(self.read(config, at + 8)?).into(),
                };
                match kind {
                    COMMON => self.common = place,
                    NOTIFY => {
                        self.notify = place;
                        self.multiplier = u32::from_ne_bytes(self.read(config, at + 16)?);
                    }
                    _ => device = Some(place),
                }
            }
            at = next.into();
        }
        device.ok_or_else(|| io::Error::other("a function without a device configuration"))
    }

    /// The driver, from reset to DRIVER_OK.
    fn drive(&mut self) -> io::Result<()> {
        let common = self.common;
        for status in [0u8, 1, 3] {
            self.write(common, 20, &[status])?;
        }
        // VERSION_1, which is bit 0 of the upper half.
        self.write(common, 8, &1u32.to_ne_bytes())?;
        self.write(common, 12, &1u32.to_ne_bytes())?;
        self.write(common, 20, &[11])?;
        if self.read::<1>(common, 20)? != [11] {
            return Err(io::Error::other("the device doesn't take VERSION_1"));
        }
        self.write(common, 16, &0u16.to_ne_bytes())?;
        for queue in 0..3u16 {
            self.write(common, 22, &queue.to_ne_bytes())?;
            self.write(common, 26, &(queue + 1).to_ne_bytes())?;
            if u16::from_ne_bytes(self.read(common, 26)?) != queue + 1 {
                return Err(io::Error::other(format!("no vector for index {queue}")));
            }
            if queue == 2 {
                // A special index: it has no ring here.
                continue;
            }
            self.write(common, 24, &vring::SIZE.to_ne_bytes())?;
            let areas = Vring::new(usize::from(queue) * vring::ROOM, IOVA).areas();
            for (field, area) in [32, 40, 48].into_iter().zip(areas) {
                self.write(common, field, &(IOVA + area as u64).to_ne_bytes())?;
            }
            self.write(common, 28, &1u16.to_ne_bytes())?;
        }
        self.write(common, 20, &[15])?;
        self.receive.fill(&self.ram);
        self.notify(RXQ)
    }

    fn notify(&mut self, index: u16) -> io::Result<()> {
        let bytes = self.doorbell(index, false);
        self.stream.write_all(&bytes)
    }

    /// The message of a write to an index's notification address.
    pub fn doorbell(&self, index: u16, answered: bool) -> Vec<u8> {
        // queue_notify_off is the index (checked by nobody: it is our device).
        let mut body = self.notify.access(u64::from(index) * u64::from(self.multiplier), 2);
        body.extend(index.to_ne_bytes());
        message(2, command::REGION_WRITE, &body, answered)
    }

    /// The connection, for doorbells.
    pub fn stream(&mut self) -> &mut UnixStream {
        &mut self.stream
    }

    /// The master's next message.
    ///
    /// # Errors
    /// A used ring that makes no sense, or what the connection says.
    pub fn receive(&mut self) -> io::Result<Option<Vec<u8>>> {
        let message = self.receive.take(&self.ram)?;
        if message.is_some() {
            self.receive.fill(&self.ram);
            self.notify(RXQ)?;
        }
        Ok(message)
    }
}
