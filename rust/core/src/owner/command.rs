// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Execution of administration commands (virtio 1.4, 2.12 and 2.13): bytes in, status and bytes out.
//!
//! Checks are made in the order of 2.12.1.1: group, opcode, member, fields; the first that fails decides. A command that
//! fails has changed nothing. Any length of either part is taken: what is missing reads as 0, what is too much is ignored,
//! results are cut to the room there is.

use std::sync::Arc;

use super::{Context, Core, GroupOptions, Object, OBJECT_LIMIT};
use crate::event::Waker;
use crate::member::lens::Refused;
use crate::member::parts::{Part, SetError, HEADER as PART_HEADER};
use crate::member::{Member, Progress};

/// Bytes before command_specific_data.
pub const COMMAND_HEADER: usize = 24;
/// Bytes before command_specific_result.
pub const RESULT_HEADER: usize = 8;
/// Opcodes that are counted one by one: those of the first word of a list.
pub const COUNTED: usize = 64;

/// Group type: the device itself.
pub const SELF: u16 = 0;
/// Group type: its virtual functions.
pub const SR_IOV: u16 = 1;

/// Opcodes.
pub const LIST_QUERY: u16 = 0x0;
/// See the specification.
pub const LIST_USE: u16 = 0x1;
/// See the specification.
pub const LEGACY_COMMON_CFG_WRITE: u16 = 0x2;
/// See the specification.
pub const LEGACY_COMMON_CFG_READ: u16 = 0x3;
/// See the specification.
pub const LEGACY_DEV_CFG_WRITE: u16 = 0x4;
/// See the specification.
pub const LEGACY_DEV_CFG_READ: u16 = 0x5;
/// See the specification.
pub const LEGACY_NOTIFY_INFO: u16 = 0x6;
const CAP_ID_LIST_QUERY: u16 = 0x7;
const DEVICE_CAP_GET: u16 = 0x8;
const DRIVER_CAP_SET: u16 = 0x9;
const RESOURCE_OBJ_CREATE: u16 = 0xa;
// The table of opcodes says so; the text has the two the other way round.
const RESOURCE_OBJ_QUERY: u16 = 0xb;
const RESOURCE_OBJ_MODIFY: u16 = 0xc;
const RESOURCE_OBJ_DESTROY: u16 = 0xd;
const DEV_PARTS_METADATA_GET: u16 = 0xe;
const DEV_PARTS_GET: u16 = 0xf;
const DEV_PARTS_SET: u16 = 0x10;
/// See the specification.
pub const DEV_MODE_SET: u16 = 0x11;
const DEVICE_MGMT: u16 = 0x3e;
const DEVICE_MGMT_ATTRS: u16 = 0x3f;

/// LIST_QUERY and LIST_USE, as bits.
pub const LISTS: u64 = 0b11;
/// The five legacy commands, as bits.
pub const LEGACY: u64 = 0x7c;
const CAPABILITIES: u64 = 0x380;
const MIGRATION: u64 = 0x3_fc00;

/// Name of an opcode, without its prefix.
pub fn opcode_name(opcode: u16) -> &'static str {
    match opcode {
        LIST_QUERY => "LIST_QUERY",
        LIST_USE => "LIST_USE",
        LEGACY_COMMON_CFG_WRITE => "LEGACY_COMMON_CFG_WRITE",
        LEGACY_COMMON_CFG_READ => "LEGACY_COMMON_CFG_READ",
        LEGACY_DEV_CFG_WRITE => "LEGACY_DEV_CFG_WRITE",
        LEGACY_DEV_CFG_READ => "LEGACY_DEV_CFG_READ",
        LEGACY_NOTIFY_INFO => "LEGACY_NOTIFY_INFO",
        CAP_ID_LIST_QUERY => "CAP_ID_LIST_QUERY",
        DEVICE_CAP_GET => "DEVICE_CAP_GET",
        DRIVER_CAP_SET => "DRIVER_CAP_SET",
        RESOURCE_OBJ_CREATE => "RESOURCE_OBJ_CREATE",
        RESOURCE_OBJ_QUERY => "RESOURCE_OBJ_QUERY",
        RESOURCE_OBJ_MODIFY => "RESOURCE_OBJ_MODIFY",
        RESOURCE_OBJ_DESTROY => "RESOURCE_OBJ_DESTROY",
        DEV_PARTS_METADATA_GET => "DEV_PARTS_METADATA_GET",
        DEV_PARTS_GET => "DEV_PARTS_GET",
        DEV_PARTS_SET => "DEV_PARTS_SET",
        DEV_MODE_SET => "DEV_MODE_SET",
        DEVICE_MGMT => "DEVICE_MGMT",
        DEVICE_MGMT_ATTRS => "DEVICE_MGMT_ATTRS",
        _ => "UNKNOWN",
    }
}

/// Opcodes of a group type, as bits.
pub fn supported(options: &GroupOptions, group: u16) -> u64 {
    match group {
        SELF => LISTS | CAPABILITIES,
        SR_IOV => {
            let mut list = LISTS | LEGACY | MIGRATION;
            if !options.notify_region {
                list &= !(1 << LEGACY_NOTIFY_INFO);
            }
            if options.feature_management {
                list |= 1 << DEVICE_MGMT | 1 << DEVICE_MGMT_ATTRS;
            }
            if options.compat.capabilities_in_sr_iov_list {
                list |= CAPABILITIES;
            }
            list
        }
        _ => 0,
    }
}

/// How a command failed: its status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// EINVAL, INVALID_OPCODE.
    Opcode,
    /// EINVAL, INVALID_FIELD.
    Field,
    /// EINVAL, INVALID_GROUP.
    Group,
    /// EINVAL, INVALID_MEMBER.
    Member,
    /// ENXIO.
    NoSuch,
    /// EEXIST: not in the table of statuses, but in the text.
    Exists,
    /// EBUSY.
    Busy,
    /// ENOSPC.
    NoSpace,
    /// ENOMEM.
    NoMemory,
}

impl Failure {
    /// Status and qualifier.
    pub fn codes(self) -> (u16, u16) {
        match self {
            Self::Opcode => (22, 2),
            Self::Field => (22, 3),
            Self::Group => (22, 4),
            Self::Member => (22, 5),
            Self::NoSuch => (6, 1),
            Self::Exists => (17, 1),
            Self::Busy => (16, 1),
            Self::NoSpace => (28, 6),
            Self::NoMemory => (12, 6),
        }
    }
}

impl From<Refused> for Failure {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Field => Self::Field,
            Refused::Busy => Self::Busy,
            Refused::NotLegacy => Self::NoSuch,
        }
    }
}

impl From<SetError> for Failure {
    fn from(error: SetError) -> Self {
        match error {
            SetError::Running => Self::Busy,
            SetError::Invalid(why) => {
                log::debug!("device parts refused: {why}");
                Self::Field
            }
        }
    }
}

const INLINE: usize = 80;

/// Header and result of a command. Short ones need no allocation.
pub struct Reply {
    inline: [u8; INLINE],
    len: usize,
    long: Vec<u8>,
}

impl Reply {
    /// Status OK and no result.
    pub fn new() -> Self {
        Self {
            inline: [0; INLINE],
            len: RESULT_HEADER,
            long: Vec::new(),
        }
    }

    fn put(&mut self, result: &[u8]) {
        let len = RESULT_HEADER + result.len();
        if len <= INLINE {
            self.inline[RESULT_HEADER..len].copy_from_slice(result);
        } else {
            self.long = vec![0; RESULT_HEADER];
            self.long.extend_from_slice(result);
        }
        self.len = len;
    }

    /// Room for a short result (at most 64 bytes), to be filled in place.
    fn room(&mut self, len: usize) -> &mut [u8] {
        self.len = RESULT_HEADER + len.min(INLINE - RESULT_HEADER);
        &mut self.inline[RESULT_HEADER..self.len]
    }

    /// The command has failed: status, qualifier, and as many zeroes (at most 72) for a result of fixed size.
    pub fn fail(&mut self, failure: Failure, zeroes: usize) {
        let (status, qualifier) = failure.codes();
        self.long = Vec::new();
        self.inline = [0; INLINE];
        self.len = RESULT_HEADER + zeroes.min(INLINE - RESULT_HEADER);
        self.inline[..2].copy_from_slice(&status.to_le_bytes());
        self.inline[2..4].copy_from_slice(&qualifier.to_le_bytes());
    }

    /// The bytes for the device-writable part.
    pub fn bytes(&self) -> &[u8] {
        if self.long.is_empty() {
            &self.inline[..self.len]
        } else {
            &self.long
        }
    }

    /// Status.
    pub fn status(&self) -> u16 {
        u16::from_le_bytes([self.bytes()[0], self.bytes()[1]])
    }

    /// Qualifier.
    pub fn qualifier(&self) -> u16 {
        u16::from_le_bytes([self.bytes()[2], self.bytes()[3]])
    }
}

impl Default for Reply {
    fn default() -> Self {
        Self::new()
    }
}

/// The device-readable part of a command, as a device reads it.
pub struct Command<'a> {
    /// Opcode.
    pub opcode: u16,
    /// Group type.
    pub group: u16,
    /// Group member id.
    pub member: u64,
    /// command_specific_data, as much as there is.
    pub data: &'a [u8],
}

impl<'a> Command<'a> {
    /// Bytes that are missing read as 0.
    pub fn parse(part: &'a [u8]) -> Self {
        let mut header = [0; COMMAND_HEADER];
        let n = part.len().min(COMMAND_HEADER);
        header[..n].copy_from_slice(&part[..n]);
        let mut member = [0; 8];
        member.copy_from_slice(&header[16..]);
        Self {
            opcode: u16::from_le_bytes([header[0], header[1]]),
            group: u16::from_le_bytes([header[2], header[3]]),
            member: u64::from_le_bytes(member),
            data: part.get(COMMAND_HEADER..).unwrap_or_default(),
        }
    }

    fn byte(&self, at: usize) -> u8 {
        self.data.get(at).copied().unwrap_or(0)
    }

    /// `N` bytes from `at` on, zeroes where there is nothing.
    fn field<const N: usize>(&self, at: usize) -> [u8; N] {
        std::array::from_fn(|i| self.byte(at + i))
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.field(at))
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.field(at))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.field(at))
    }
}

/// What a command accessed, for the trace.
#[derive(Clone, Copy, Default)]
pub struct Touched {
    /// Written, not read.
    pub write: bool,
    /// Offset in the command.
    pub offset: u16,
    /// Bytes.
    pub width: u16,
    /// Little-endian, when at most 8 bytes.
    pub value: Option<u64>,
}

fn number(data: &[u8]) -> Option<u64> {
    let mut word = [0; 8];
    word.get_mut(..data.len())?.copy_from_slice(data);
    Some(u64::from_le_bytes(word))
}

type Done = std::result::Result<Progress, Failure>;

/// Executes commands of one driver.
pub struct Execution<'a> {
    /// What all drivers share.
    pub core: &'a Core,
    /// What this driver has negotiated.
    pub context: &'a Context,
}

impl Execution<'_> {
    /// Executes a command. `room`: bytes for the result. With [`Progress::Later`] the waker will be called, and the reply is
    /// what it is to be then.
    pub fn run(
        &self,
        command: &Command<'_>,
        room: usize,
        reply: &mut Reply,
        touched: &mut Touched,
        wake: &dyn Fn() -> Waker,
    ) -> Progress {
        match self
            .check(command)
            .and_then(|()| self.execute(command, room, reply, touched, wake))
        {
            Ok(progress) => progress,
            Err(failure) => {
                // A result of fixed size is initialised in any case.
                reply.fail(failure, if command.opcode == LEGACY_NOTIFY_INFO { 64 } else { 0 });
                Progress::Done
            }
        }
    }

    fn check(&self, command: &Command<'_>) -> std::result::Result<(), Failure> {
        let lists = command.opcode < 64 && LISTS & (1 << command.opcode) != 0;
        match command.group {
            SELF => {}
            SR_IOV => {
                let (enabled, _) = self.core.vfs();
                if !(enabled || (lists && self.core.options.compat.lists_without_vfs)) {
                    return Err(Failure::Group);
                }
            }
            _ => return Err(Failure::Group),
        }
        let supported = self.core.supported(command.group);
        let used = self.context.used(command.group);
        let capability = command.opcode < 64 && CAPABILITIES & (1 << command.opcode) != 0;
        // The capability commands may be in the SR-IOV group's list, for Linux to find, but aren't commands of that group.
        if command.opcode >= 64
            || supported & used & (1 << command.opcode) == 0
            || (capability && command.group != SELF)
        {
            return Err(Failure::Opcode);
        }
        if command.group == SELF && !lists && command.member != 0 {
            return Err(Failure::Member);
        }
        Ok(())
    }

    fn member(&self, command: &Command<'_>) -> std::result::Result<Arc<Member>, Failure> {
        self.core.member(command.member, command.opcode).ok_or(Failure::Member)
    }

    fn execute(
        &self,
        command: &Command<'_>,
        room: usize,
        reply: &mut Reply,
        touched: &mut Touched,
        wake: &dyn Fn() -> Waker,
    ) -> Done {
        match command.opcode {
            LIST_QUERY => reply.put(&self.core.supported(command.group).to_le_bytes()),
            LIST_USE => self.list_use(command)?,
            LEGACY_COMMON_CFG_WRITE | LEGACY_DEV_CFG_WRITE => return self.legacy_write(command, touched, wake),
            LEGACY_COMMON_CFG_READ | LEGACY_DEV_CFG_READ => self.legacy_read(command, room, reply, touched)?,
            LEGACY_NOTIFY_INFO => {
                self.member(command)?;
                notify_info(reply.room(64));
            }
            CAP_ID_LIST_QUERY => reply.put(&1u64.to_le_bytes()),
            DEVICE_CAP_GET => match command.u16(0) {
                0 => reply.put(&[OBJECT_LIMIT, OBJECT_LIMIT]),
                _ => return Err(Failure::NoSuch),
            },
            DRIVER_CAP_SET => self.capability_set(command)?,
            RESOURCE_OBJ_CREATE => self.object_create(command)?,
            RESOURCE_OBJ_QUERY => self.object_query(command, reply)?,
            RESOURCE_OBJ_MODIFY => self.object_modify(command)?,
            RESOURCE_OBJ_DESTROY => self.object_destroy(command)?,
            DEV_PARTS_METADATA_GET => self.parts_metadata(command, room, reply)?,
            DEV_PARTS_GET => self.parts_get(command, reply)?,
            DEV_PARTS_SET => self.parts_set(command)?,
            DEV_MODE_SET => return self.mode_set(command, touched, wake),
            DEVICE_MGMT => self.management(command, reply, touched)?,
            DEVICE_MGMT_ATTRS => {
                let member = self.member(command)?;
                let result = reply.room(64);
                result[..8].copy_from_slice(&1u64.to_le_bytes());
                result[8..16].copy_from_slice(&member.manageable_features().to_le_bytes());
            }
            _ => return Err(Failure::Opcode),
        }
        Ok(Progress::Done)
    }

    fn list_use(&self, command: &Command<'_>) -> std::result::Result<(), Failure> {
        let wanted = command.u64(0);
        let beyond = command.data.iter().skip(8).any(|byte| *byte != 0);
        if beyond || wanted & !self.core.supported(command.group) != 0 {
            return Err(Failure::Field);
        }
        self.context.set_used(command.group, wanted);
        Ok(())
    }

    // --- legacy registers ---------------------------------------------------------------------------------

    fn legacy_write(&self, command: &Command<'_>, touched: &mut Touched, wake: &dyn Fn() -> Waker) -> Done {
        let member = self.member(command)?;
        let offset = command.byte(0);
        // The length of the access is that of the data: neither padded nor guessed.
        let data = command.data.get(8..).unwrap_or_default();
        *touched = Touched {
            write: true,
            offset: u16::from(offset),
            width: u16::try_from(data.len()).unwrap_or(u16::MAX),
            value: number(data),
        };
        if command.opcode == LEGACY_DEV_CFG_WRITE {
            member.legacy_config_write(usize::from(offset), data)?;
            return Ok(Progress::Done);
        }
        let zero_resets = self.core.options.compat.pfn_zero_resets_device;
        Ok(member.legacy_write(usize::from(offset), data, zero_resets, wake)?)
    }

    fn legacy_read(
        &self,
        command: &Command<'_>,
        room: usize,
        reply: &mut Reply,
        touched: &mut Touched,
    ) -> std::result::Result<(), Failure> {
        let member = self.member(command)?;
        let offset = command.byte(0);
        touched.offset = u16::from(offset);
        touched.width = u16::try_from(room).unwrap_or(u16::MAX);
        // No field is longer than 8 bytes or so; one that is asked for more than 64 doesn't lie in one.
        if room > 64 {
            return Err(Failure::Field);
        }
        let data = reply.room(room);
        if command.opcode == LEGACY_COMMON_CFG_READ {
            member.legacy_read(usize::from(offset), data)?;
        } else {
            member.legacy_config_read(usize::from(offset), data)?;
        }
        touched.value = number(data);
        Ok(())
    }

    // --- capabilities and resource objects ------------------------------------------------------------------

    fn capability_set(&self, command: &Command<'_>) -> std::result::Result<(), Failure> {
        if command.u16(0) != 0 {
            return Err(Failure::NoSuch);
        }
        let [get, set] = command.field(8);
        if get > OBJECT_LIMIT || set > OBJECT_LIMIT {
            return Err(Failure::Field);
        }
        let mut state = self.context.lock();
        let limits = [u32::from(get), u32::from(set)];
        let outside = |(id, object): (&u32, &Object)| *id >= limits[usize::from(object.operation)];
        if state.objects.iter().any(outside) {
            return Err(Failure::Busy);
        }
        state.limits = (get, set);
        Ok(())
    }

    /// The object's id, after a check of its type: there is only DEV_PARTS.
    fn object_id(command: &Command<'_>) -> std::result::Result<u32, Failure> {
        if command.u16(0) != 0 {
            return Err(Failure::NoSuch);
        }
        Ok(command.u32(4))
    }

    fn object(&self, command: &Command<'_>) -> std::result::Result<Object, Failure> {
        let id = Self::object_id(command)?;
        let object = self.context.lock().objects.get(&id).copied();
        object
            .filter(|object| u64::from(object.member) == command.member)
            .ok_or(Failure::NoSuch)
    }

    fn object_create(&self, command: &Command<'_>) -> std::result::Result<(), Failure> {
        let member = self.member(command)?.id();
        let id = Self::object_id(command)?;
        let operation = command.byte(16);
        if operation > 1 {
            return Err(Failure::Field);
        }
        let mut state = self.context.lock();
        if state.objects.contains_key(&id) {
            return Err(Failure::Exists);
        }
        check_object(&state.limits, id, operation)?;
        state.objects.insert(id, Object { member, operation });
        Ok(())
    }

    fn object_query(&self, command: &Command<'_>, reply: &mut Reply) -> std::result::Result<(), Failure> {
        self.member(command)?;
        let object = self.object(command)?;
        reply.put(&[object.operation, 0, 0, 0, 0, 0, 0, 0]);
        Ok(())
    }

    fn object_modify(&self, command: &Command<'_>) -> std::result::Result<(), Failure> {
        self.member(command)?;
        self.object(command)?;
        let id = Self::object_id(command)?;
        let operation = command.byte(16);
        if operation > 1 {
            return Err(Failure::Field);
        }
        let mut state = self.context.lock();
        check_object(&state.limits, id, operation)?;
        if let Some(object) = state.objects.get_mut(&id) {
            object.operation = operation;
        }
        Ok(())
    }

    fn object_destroy(&self, command: &Command<'_>) -> std::result::Result<(), Failure> {
        self.member(command)?;
        self.object(command)?;
        let id = Self::object_id(command)?;
        self.context.lock().objects.remove(&id);
        Ok(())
    }

    // --- device parts ---------------------------------------------------------------------------------------

    fn parts_metadata(
        &self,
        command: &Command<'_>,
        room: usize,
        reply: &mut Reply,
    ) -> std::result::Result<(), Failure> {
        let member = self.member(command)?;
        self.parts_object(command, 0)?;
        let parts = member.parts();
        let head = |value: usize| {
            let mut head = [0; 8];
            // A few thousand at most.
            head[..4].copy_from_slice(&(value as u32).to_le_bytes());
            head
        };
        let mut result = match command.byte(8) {
            0 => head(parts.iter().map(|part| PART_HEADER + part.value.len()).sum()).to_vec(),
            1 | 2 => head(parts.len()).to_vec(),
            _ => return Err(Failure::Field),
        };
        if command.byte(8) == 2 {
            parts.iter().for_each(|part| result.extend(part.header()));
        }
        // Of this command the specification says so, against its rule that results are cut.
        if result.len() > room {
            return Err(Failure::NoMemory);
        }
        reply.put(&result);
        Ok(())
    }

    fn parts_object(&self, command: &Command<'_>, operation: u8) -> std::result::Result<(), Failure> {
        if self.object(command)?.operation == operation {
            Ok(())
        } else {
            Err(Failure::Field)
        }
    }

    fn parts_get(&self, command: &Command<'_>, reply: &mut Reply) -> std::result::Result<(), Failure> {
        let member = self.member(command)?;
        self.parts_object(command, 0)?;
        let mut parts = member.parts();
        match command.byte(8) {
            0 => {
                let wanted: Vec<[u8; PART_HEADER]> = command
                    .data
                    .get(16..)
                    .unwrap_or_default()
                    .chunks_exact(PART_HEADER)
                    .map(|header| std::array::from_fn(|i| header[i]))
                    .collect();
                // In the order in which they have to be set, whatever the order asked for; unknown ones are left out.
                parts.retain(|part| {
                    wanted
                        .iter()
                        .any(|header| header[..2] == part.part_type.to_le_bytes() && header[4..12] == part.selector)
                });
            }
            1 => {}
            _ => return Err(Failure::Field),
        }
        let mut result = Vec::new();
        for part in &parts {
            result.extend(part.header());
            result.extend(&part.value);
        }
        reply.put(&result);
        Ok(())
    }

    fn parts_set(&self, command: &Command<'_>) -> std::result::Result<(), Failure> {
        let member = self.member(command)?;
        self.parts_object(command, 1)?;
        if member.vhost_user_attached() {
            return Err(Failure::Busy);
        }
        let mut rest = command.data.get(8..).unwrap_or_default();
        let mut parts = Vec::new();
        while !rest.is_empty() {
            let (part, behind) = Part::parse(rest).ok_or(Failure::Field)?;
            parts.push(part);
            rest = behind;
        }
        Ok(member.set_parts(&parts)?)
    }

    fn mode_set(&self, command: &Command<'_>, touched: &mut Touched, wake: &dyn Fn() -> Waker) -> Done {
        let member = self.member(command)?;
        let flags = command.byte(0);
        *touched = Touched {
            write: true,
            offset: 0,
            width: 1,
            value: Some(u64::from(flags)),
        };
        if member.vhost_user_attached() {
            return Err(Failure::Busy);
        }
        match flags {
            0 => {
                member.resume_device();
                Ok(Progress::Done)
            }
            1 => Ok(member.stop_device(wake)),
            _ => Err(Failure::Field),
        }
    }

    // --- feature management (design D10) ---------------------------------------------------------------------

    fn management(
        &self,
        command: &Command<'_>,
        reply: &mut Reply,
        touched: &mut Touched,
    ) -> std::result::Result<(), Failure> {
        let member = self.member(command)?;
        let (operation, resource, value) = (command.byte(0), command.u16(1), command.u64(3));
        if resource != 0 {
            return Err(Failure::Field);
        }
        match operation {
            1 => {
                *touched = Touched {
                    write: true,
                    offset: 0,
                    width: 8,
                    value: Some(value),
                };
                if value & !member.manageable_features() != 0 {
                    return Err(Failure::Field);
                }
                if !member.assign_features(value) {
                    return Err(Failure::Busy);
                }
            }
            2 => {}
            _ => return Err(Failure::Field),
        }
        let now = member
            .assigned_features()
            .unwrap_or_else(|| member.manageable_features());
        reply.room(16)[..8].copy_from_slice(&now.to_le_bytes());
        Ok(())
    }
}

fn check_object(limits: &(u8, u8), id: u32, operation: u8) -> std::result::Result<(), Failure> {
    let limit = if operation == 0 { limits.0 } else { limits.1 };
    match u32::from(limit) {
        0 => Err(Failure::NoSpace),
        limit if id >= limit => Err(Failure::Field),
        _ => Ok(()),
    }
}

/// BAR of a member's function that has the notification structure, and its place there.
pub const NOTIFY_BAR: u8 = 2;
/// See [`NOTIFY_BAR`].
pub const NOTIFY_OFFSET: u64 = 0x3000;

/// One entry (member device, BAR, offset), then the end of the list.
fn notify_info(result: &mut [u8]) {
    result.fill(0);
    result[0] = 2;
    result[1] = NOTIFY_BAR;
    result[8..16].copy_from_slice(&NOTIFY_OFFSET.to_le_bytes());
}
