// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! vfio-user messages as bytes: headers, bodies, the version's capabilities. Nothing here decides anything.
//!
//! All numbers are in the host's byte order. A body is decoded only when it has the length that its kind asks for.

use serde_json::{json, Map, Value};

use super::function::RegionInfo;
use crate::memory::MAX_REGIONS;

/// Bytes of a header.
pub const HEADER_SIZE: usize = 16;
/// Most data bytes of one message, either way; the protocol's default.
pub const MAX_DATA: usize = 1 << 20;
/// Longest message that is taken: the longest data with any header and body, and some room.
pub const MAX_MESSAGE: usize = MAX_DATA + 4096;
/// Most fds that may come with one message; QEMU refuses a server that says more.
pub const MAX_FDS: usize = 16;
/// Most writes in one WRITE_MULTI; QEMU collects 200.
pub const MAX_WRITES: usize = 1024;
/// Longest version data that is looked at.
const MAX_VERSION: usize = 16 << 10;

/// Commands.
pub mod command {
    /// Version and capabilities.
    pub const VERSION: u16 = 1;
    /// Memory that the device may use.
    pub const DMA_MAP: u16 = 2;
    /// Memory that it may not use any more.
    pub const DMA_UNMAP: u16 = 3;
    /// What the device is.
    pub const DEVICE_GET_INFO: u16 = 4;
    /// What a region is.
    pub const DEVICE_GET_REGION_INFO: u16 = 5;
    /// Eventfds that stand for parts of a region.
    pub const DEVICE_GET_REGION_IO_FDS: u16 = 6;
    /// What a kind of interrupt is.
    pub const DEVICE_GET_IRQ_INFO: u16 = 7;
    /// Assigns, masks or triggers interrupts.
    pub const DEVICE_SET_IRQS: u16 = 8;
    /// Reads a region.
    pub const REGION_READ: u16 = 9;
    /// Writes a region.
    pub const REGION_WRITE: u16 = 10;
    /// From us: reads memory that came without an fd.
    pub const DMA_READ: u16 = 11;
    /// From us: writes memory that came without an fd.
    pub const DMA_WRITE: u16 = 12;
    /// Resets the device.
    pub const DEVICE_RESET: u16 = 13;
    /// Several small writes to regions.
    pub const REGION_WRITE_MULTI: u16 = 15;
}

const TYPE_MASK: u32 = 0xf;
const TYPE_REPLY: u32 = 1;
const FLAG_NO_REPLY: u32 = 1 << 4;
const FLAG_ERROR: u32 = 1 << 5;

/// What a message is, by its flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Something to do.
    Command,
    /// The answer to one of ours.
    Reply,
    /// Neither.
    Unknown,
}

/// A message's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The sender's number of the message; a reply repeats it.
    pub id: u16,
    /// Which; see [`command`].
    pub command: u16,
    /// Bytes of the whole message.
    pub size: u32,
    /// Type and flags.
    pub flags: u32,
    /// Of a reply with the error flag: an errno, perhaps 0.
    pub error: u32,
}

impl Header {
    /// The header at the start of some bytes; None when they are too few.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        Some(Self {
            id: u16_at(bytes, 0)?,
            command: u16_at(bytes, 2)?,
            size: u32_at(bytes, 4)?,
            flags: u32_at(bytes, 8)?,
            error: u32_at(bytes, 12)?,
        })
    }

    /// What the message is.
    pub fn kind(&self) -> Kind {
        match self.flags & TYPE_MASK {
            0 => Kind::Command,
            TYPE_REPLY => Kind::Reply,
            _ => Kind::Unknown,
        }
    }

    /// Whether nobody waits for an answer.
    pub fn no_reply(&self) -> bool {
        self.flags & FLAG_NO_REPLY != 0
    }

    /// Of a reply: whether it says that the command failed.
    pub fn is_error(&self) -> bool {
        self.flags & FLAG_ERROR != 0
    }

    /// Replaces `to` by the beginning of a reply to this command; `finish` completes it when the body is there.
    pub fn begin_reply(&self, to: &mut Vec<u8>) {
        begin(to, self.id, self.command, TYPE_REPLY);
    }

    /// Replaces `to` by a reply that says that this command failed.
    pub fn error_reply(&self, errno: i32, to: &mut Vec<u8>) {
        begin(to, self.id, self.command, TYPE_REPLY | FLAG_ERROR);
        to[12..16].copy_from_slice(&errno.to_ne_bytes());
        finish(to);
    }
}

fn begin(to: &mut Vec<u8>, id: u16, command: u16, flags: u32) {
    to.clear();
    to.extend_from_slice(&id.to_ne_bytes());
    to.extend_from_slice(&command.to_ne_bytes());
    to.extend_from_slice(&0u32.to_ne_bytes());
    to.extend_from_slice(&flags.to_ne_bytes());
    to.extend_from_slice(&0u32.to_ne_bytes());
}

/// Writes the size of a message into its header, when its body is complete.
pub fn finish(message: &mut [u8]) {
    // Messages we make have at most MAX_MESSAGE bytes.
    let size = message.len() as u32;
    message[4..8].copy_from_slice(&size.to_ne_bytes());
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    array_at(bytes, at).map(u16::from_ne_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    array_at(bytes, at).map(u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    array_at(bytes, at).map(u64::from_ne_bytes)
}

fn words(to: &mut Vec<u8>, values: &[u32]) {
    for value in values {
        to.extend_from_slice(&value.to_ne_bytes());
    }
}

/// Version and capabilities that a client proposes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Version {
    /// Incompatible versions differ here.
    pub major: u16,
    /// Messages and capabilities were added.
    pub minor: u16,
    capabilities: Map<String, Value>,
}

/// What was agreed with a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// Most data that the client takes in one message.
    pub max_data: usize,
    /// WRITE_MULTI may come.
    pub write_multiple: bool,
}

impl Version {
    /// Decodes a body.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(body: &[u8]) -> Result<Self, String> {
        let (Some(major), Some(minor)) = (u16_at(body, 0), u16_at(body, 2)) else {
            return Err(format!("version data of {} bytes", body.len()));
        };
        let mut version = Self {
            major,
            minor,
            capabilities: Map::new(),
        };
        let text = &body[4..];
        if text.is_empty() {
            return Ok(version);
        }
        if text.len() > MAX_VERSION {
            return Err(format!("version data of {} bytes", body.len()));
        }
        let text = text.strip_suffix(&[0]).ok_or("version data without its NUL")?;
        let value: Value = serde_json::from_slice(text).map_err(|e| format!("version data is not JSON: {e}"))?;
        let Value::Object(mut members) = value else {
            return Err("version data is not an object".into());
        };
        match members.remove("capabilities") {
            None => {}
            Some(Value::Object(capabilities)) => version.capabilities = capabilities,
            Some(_) => return Err("capabilities are not an object".into()),
        }
        Ok(version)
    }

    fn number(&self, name: &str) -> Result<Option<u64>, String> {
        match self.capabilities.get(name) {
            None => Ok(None),
            Some(value) => match value.as_u64() {
                Some(number) => Ok(Some(number)),
                None => Err(format!("capability {name} is not a number from 0 to 2^64 - 1")),
            },
        }
    }

    /// Appends the body of the answer to `to`: version 0.0, and of the capabilities proposed those that we have, each with
    /// what we can.
    ///
    /// # Errors
    /// Why there is no agreement.
    pub fn answer(&self, to: &mut Vec<u8>) -> Result<Agreed, String> {
        if self.major != 0 {
            return Err(format!(
                "version {}.{} is proposed; 0.0 is spoken here",
                self.major, self.minor
            ));
        }
        let mut agreed = Agreed {
            max_data: MAX_DATA,
            write_multiple: false,
        };
        let mut ours = Map::new();
        if self.number("max_msg_fds")?.is_some() {
            ours.insert("max_msg_fds".into(), json!(MAX_FDS));
        }
        if let Some(max) = self.number("max_data_xfer_size")? {
            if max == 0 {
                return Err("max_data_xfer_size is 0".into());
            }
            agreed.max_data = usize::try_from(max).unwrap_or(MAX_DATA).min(MAX_DATA);
            ours.insert("max_data_xfer_size".into(), json!(MAX_DATA));
        }
        if let Some(max) = self.number("max_dma_maps")? {
            ours.insert("max_dma_maps".into(), json!(max.min(MAX_REGIONS as u64)));
        }
        if let Some(sizes) = self.number("pgsizes")? {
            // Any granularity will do here.
            if sizes == 0 {
                return Err("pgsizes is 0".into());
            }
            ours.insert("pgsizes".into(), json!(sizes));
        }
        match self.capabilities.get("write_multiple") {
            None => {}
            Some(Value::Bool(wanted)) => {
                agreed.write_multiple = *wanted;
                ours.insert("write_multiple".into(), json!(wanted));
            }
            Some(_) => return Err("capability write_multiple is not a boolean".into()),
        }
        to.extend_from_slice(&0u16.to_ne_bytes());
        to.extend_from_slice(&0u16.to_ne_bytes());
        to.extend_from_slice(json!({ "capabilities": ours }).to_string().as_bytes());
        to.push(0);
        Ok(agreed)
    }
}

/// The device may read the memory.
pub const DMA_READABLE: u32 = 1;
/// The device may write the memory.
pub const DMA_WRITABLE: u32 = 2;

/// Body of DMA_MAP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaMap {
    /// Its own size.
    pub argsz: u32,
    /// [`DMA_READABLE`] and [`DMA_WRITABLE`].
    pub flags: u32,
    /// Where the memory starts in its file.
    pub offset: u64,
    /// Its address for the device.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
}

impl DmaMap {
    /// Bytes of the body.
    pub const SIZE: usize = 32;

    /// Decodes a body.
    pub fn parse(body: &[u8]) -> Option<Self> {
        let map = Self {
            argsz: u32_at(body, 0)?,
            flags: u32_at(body, 4)?,
            offset: u64_at(body, 8)?,
            iova: u64_at(body, 16)?,
            size: u64_at(body, 24)?,
        };
        (body.len() == Self::SIZE).then_some(map)
    }
}

/// In DMA_UNMAP: the client wants to know which pages were written.
pub const UNMAP_GET_DIRTY: u32 = 1;
/// In DMA_UNMAP: everything; address and size are 0 then.
pub const UNMAP_ALL: u32 = 2;

/// Body of DMA_UNMAP, and of the reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaUnmap {
    /// Room for the reply.
    pub argsz: u32,
    /// [`UNMAP_GET_DIRTY`] or [`UNMAP_ALL`].
    pub flags: u32,
    /// First address.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
}

impl DmaUnmap {
    /// Bytes of the body.
    pub const SIZE: usize = 24;

    /// Decodes a body.
    pub fn parse(body: &[u8]) -> Option<Self> {
        let unmap = Self {
            argsz: u32_at(body, 0)?,
            flags: u32_at(body, 4)?,
            iova: u64_at(body, 8)?,
            size: u64_at(body, 16)?,
        };
        (body.len() == Self::SIZE).then_some(unmap)
    }
}

/// The first word of a body of exactly `size` bytes, when it says that there is room for a reply of that size.
pub fn argsz(body: &[u8], size: usize) -> Option<u32> {
    let argsz = u32_at(body, 0)?;
    (body.len() == size && argsz as usize >= size).then_some(argsz)
}

/// Bytes of the body of DEVICE_GET_INFO, and of the reply.
pub const DEVICE_INFO_SIZE: usize = 16;
/// DEVICE_RESET works.
const DEVICE_RESETTABLE: u32 = 1;
/// It is a PCI device.
const DEVICE_PCI: u32 = 2;

/// Appends the reply to DEVICE_GET_INFO.
pub fn device_info(to: &mut Vec<u8>, regions: u32, irqs: u32) {
    let flags = DEVICE_RESETTABLE | DEVICE_PCI;
    words(to, &[DEVICE_INFO_SIZE as u32, flags, regions, irqs]);
}

/// Bytes of the body of DEVICE_GET_REGION_INFO, and of the reply without capabilities.
pub const REGION_INFO_SIZE: usize = 32;
/// Bytes of the reply for a region that can be mapped: with struct vfio_region_info_cap_sparse_mmap of one area.
pub const SPARSE_INFO_SIZE: usize = REGION_INFO_SIZE + 32;
/// It can be mapped, from the fd that comes with the reply.
const REGION_MMAP: u32 = 1 << 2;
/// It has capabilities.
const REGION_CAPS: u32 = 1 << 3;
/// Which parts of a region can be mapped.
const CAP_SPARSE_MMAP: u16 = 1;

/// The index in the body of DEVICE_GET_REGION_INFO, DEVICE_GET_REGION_IO_FDS, or DEVICE_GET_IRQ_INFO.
pub fn index(body: &[u8]) -> Option<u32> {
    u32_at(body, 8)
}

/// Appends the reply to DEVICE_GET_REGION_INFO to a client that has room for so many bytes of it. Returns whether it tells
/// what can be mapped, and so wants the fd with it.
pub fn region_info(to: &mut Vec<u8>, index: u32, room: u32, info: &RegionInfo) -> bool {
    let access = u32::from(info.readable) | u32::from(info.writable) << 1;
    let (needed, flags, capabilities) = match info.mappable {
        None => (REGION_INFO_SIZE, access, 0),
        Some(_) => (SPARSE_INFO_SIZE, access | REGION_MMAP | REGION_CAPS, REGION_INFO_SIZE),
    };
    words(to, &[needed as u32, flags, index, capabilities as u32]);
    to.extend_from_slice(&info.size.to_ne_bytes());
    // Where the region begins in the file.
    to.extend_from_slice(&0u64.to_ne_bytes());
    let Some(mappable) = info.mappable.as_ref().filter(|_| room as usize >= needed) else {
        // It asks again with as much room as it was told is needed.
        return false;
    };
    to.extend_from_slice(&CAP_SPARSE_MMAP.to_ne_bytes());
    // Version 1, no next one.
    to.extend_from_slice(&1u16.to_ne_bytes());
    words(to, &[0, 1, 0]);
    to.extend_from_slice(&0u64.to_ne_bytes());
    to.extend_from_slice(&mappable.length.to_ne_bytes());
    true
}

/// Bytes of the body of DEVICE_GET_REGION_IO_FDS, and of the reply: there are none.
pub const IO_FDS_SIZE: usize = 16;

/// The flags in the body of DEVICE_GET_REGION_IO_FDS.
pub fn io_fds_flags(body: &[u8]) -> Option<u32> {
    u32_at(body, 4)
}

/// Appends the reply to DEVICE_GET_REGION_IO_FDS.
pub fn io_fds(to: &mut Vec<u8>, index: u32) {
    words(to, &[IO_FDS_SIZE as u32, 0, index, 0]);
}

/// Bytes of the body of DEVICE_GET_IRQ_INFO, and of the reply.
pub const IRQ_INFO_SIZE: usize = 16;
/// Eventfds can be assigned.
pub const IRQ_EVENTFD: u32 = 1;
/// MASK and UNMASK work.
pub const IRQ_MASKABLE: u32 = 2;
/// Masked by being triggered.
pub const IRQ_AUTOMASKED: u32 = 4;

/// Appends the reply to DEVICE_GET_IRQ_INFO.
pub fn irq_info(to: &mut Vec<u8>, index: u32, flags: u32, count: u32) {
    words(to, &[IRQ_INFO_SIZE as u32, flags, index, count]);
}

/// What the data of SET_IRQS is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqData {
    /// There is none.
    None,
    /// A byte for each interrupt: whether it is meant.
    Bool,
    /// An fd for each interrupt.
    Eventfd,
}

/// What SET_IRQS does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqAction {
    /// Mask.
    Mask,
    /// Unmask.
    Unmask,
    /// Trigger, or say what is done when triggered.
    Trigger,
}

/// Body of SET_IRQS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IrqSet<'a> {
    /// What the data is.
    pub data: IrqData,
    /// What to do.
    pub action: IrqAction,
    /// Kind of interrupt.
    pub index: u32,
    /// First of them.
    pub start: u32,
    /// How many.
    pub count: u32,
    /// With [`IrqData::Bool`]: `count` bytes.
    pub bools: &'a [u8],
}

impl<'a> IrqSet<'a> {
    const SIZE: usize = 20;

    /// Decodes a body. None also for flags that contradict each other and for data of another length than they say.
    pub fn parse(body: &'a [u8]) -> Option<Self> {
        let (argsz, flags) = (u32_at(body, 0)?, u32_at(body, 4)?);
        let (index, start, count) = (u32_at(body, 8)?, u32_at(body, 12)?, u32_at(body, 16)?);
        let data = match flags & 0b111 {
            1 => IrqData::None,
            2 => IrqData::Bool,
            4 => IrqData::Eventfd,
            _ => return None,
        };
        let action = match flags >> 3 {
            1 => IrqAction::Mask,
            2 => IrqAction::Unmask,
            4 => IrqAction::Trigger,
            _ => return None,
        };
        let bools = body.get(Self::SIZE..)?;
        let wanted = if data == IrqData::Bool { count as usize } else { 0 };
        (bools.len() == wanted && argsz as usize >= Self::SIZE).then_some(Self {
            data,
            action,
            index,
            start,
            count,
            bools,
        })
    }
}

/// The part of a region that an access is about; begins the bodies of REGION_READ and REGION_WRITE and of their replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionAccess {
    /// First byte.
    pub offset: u64,
    /// Which region.
    pub region: u32,
    /// Bytes.
    pub count: u32,
}

impl RegionAccess {
    /// Bytes of it.
    pub const SIZE: usize = 16;

    /// Decodes it, and returns what follows.
    #[inline]
    pub fn parse(body: &[u8]) -> Option<(Self, &[u8])> {
        let access = Self {
            offset: u64_at(body, 0)?,
            region: u32_at(body, 8)?,
            count: u32_at(body, 12)?,
        };
        Some((access, &body[Self::SIZE..]))
    }

    /// Appends it.
    #[inline]
    pub fn encode(&self, to: &mut Vec<u8>) {
        to.extend_from_slice(&self.offset.to_ne_bytes());
        words(to, &[self.region, self.count]);
    }
}

/// Bytes of one write of WRITE_MULTI: the access, and room for 8 bytes of data.
pub const MULTI_ENTRY: usize = RegionAccess::SIZE + 8;

/// The writes in the body of WRITE_MULTI; None when there are more or fewer than it says.
pub fn multi_entries(body: &[u8]) -> Option<&[u8]> {
    let count = u64_at(body, 0)?;
    let entries = &body[8..];
    let fits = entries.len().is_multiple_of(MULTI_ENTRY) && (entries.len() / MULTI_ENTRY) as u64 == count;
    fits.then_some(entries)
}

/// One write of WRITE_MULTI.
pub fn multi_entry(entries: &[u8], index: usize) -> Option<(RegionAccess, &[u8])> {
    let at = index.checked_mul(MULTI_ENTRY)?;
    let entry = entries.get(at..at.checked_add(MULTI_ENTRY)?)?;
    let (access, data) = RegionAccess::parse(entry)?;
    // None for more than the room that there is.
    Some((access, data.get(..access.count as usize).unwrap_or_default()))
}

/// Appends the reply to WRITE_MULTI.
pub fn multi_reply(to: &mut Vec<u8>, count: u64) {
    to.extend_from_slice(&count.to_ne_bytes());
}

/// Bytes of the body of DMA_READ, and of that of DMA_WRITE before the data.
pub const DMA_ACCESS_SIZE: usize = 16;

/// Replaces `to` by a DMA_READ of ours.
pub fn dma_read(to: &mut Vec<u8>, id: u16, iova: u64, count: u64) {
    begin(to, id, command::DMA_READ, 0);
    to.extend_from_slice(&iova.to_ne_bytes());
    to.extend_from_slice(&count.to_ne_bytes());
    finish(to);
}

/// Replaces `to` by a DMA_WRITE of ours.
pub fn dma_write(to: &mut Vec<u8>, id: u16, iova: u64, data: &[u8]) {
    begin(to, id, command::DMA_WRITE, 0);
    to.extend_from_slice(&iova.to_ne_bytes());
    to.extend_from_slice(&(data.len() as u64).to_ne_bytes());
    to.extend_from_slice(data);
    finish(to);
}

/// Address, count and data in the reply to a DMA_READ.
pub fn dma_read_reply(body: &[u8]) -> Option<(u64, u64, &[u8])> {
    Some((u64_at(body, 0)?, u64_at(body, 8)?, &body[DMA_ACCESS_SIZE..]))
}
