// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The owner of the group: its members, and the administration commands that concern them (design D6, D9, D10).
//!
//! From the bottom up: [`trace`] (what was accessed, for people), [`command`] (a command's execution), [`admin`] (the device
//! behind an administration virtqueue), [`local`] (administration virtqueues inside the process, with the driver's side),
//! [`forward`] (the legacy I/O BAR of a member as commands).
//!
//! An owner can have several drivers at once: a guest on its PCI function, our own in-process driver, and the forwarders of
//! members' legacy functions. What a driver negotiates (lists of commands, capabilities, resource objects) belongs to a
//! [`Context`] of its own, so that one driver's reset doesn't take another's commands away. Members are shared.

pub mod admin;
pub mod command;
pub mod forward;
pub mod local;
pub mod trace;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::{ArcSwap, Guard};

use crate::error::{Error, Result};
use crate::member::Member;
use crate::worker::Pool;

use admin::AdminDevice;
use local::LocalQueue;
use trace::Trace;

/// VFs that the SR-IOV capability can count.
pub const TOTAL_VFS: u16 = u16::MAX;
/// Resource objects of each kind that a driver may have.
pub const OBJECT_LIMIT: u8 = 64;

/// Where the specification contradicts itself, or Linux differs (design D9; docs/ARCHITECTURE.md lists them).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compat {
    /// LIST_QUERY and LIST_USE of the SR-IOV group work while VF Enable is 0: Linux sends them once, before there are VFs.
    pub lists_without_vfs: bool,
    /// The capability commands of the self group are in the SR-IOV group's list too: Linux looks for them there.
    pub capabilities_in_sr_iov_list: bool,
    /// All commands of the self group may be used without LIST_USE: Linux never sends it for that group.
    pub self_group_preset: bool,
    /// A queue address (PFN) of 0 resets the whole device instead of the selected queue, as QEMU has it.
    pub pfn_zero_resets_device: bool,
}

impl Compat {
    /// What works with Linux, or the letter of the specification.
    pub fn new(strict: bool) -> Self {
        Self {
            lists_without_vfs: !strict,
            capabilities_in_sr_iov_list: !strict,
            self_group_preset: !strict,
            pfn_zero_resets_device: false,
        }
    }
}

/// How a group is to be.
#[derive(Clone, Copy, Debug)]
pub struct GroupOptions {
    /// The switches.
    pub compat: Compat,
    /// DEVICE_MGMT and DEVICE_MGMT_ATTRS are there (design D10).
    pub feature_management: bool,
    /// LEGACY_NOTIFY_INFO is there.
    pub notify_region: bool,
    /// In-process administration virtqueues.
    pub admin_queues: u16,
}

/// A resource object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Object {
    /// The member it belongs to.
    pub member: u32,
    /// 0: to get device parts; 1: to set them.
    pub operation: u8,
}

/// What one driver of the owner has negotiated.
pub struct Context {
    /// Usable opcodes of the self and of the SR-IOV group, as bits. Asked for by every command, so without a lock.
    used: [AtomicU64; 2],
    state: Mutex<ContextState>,
}

#[derive(Default)]
pub(crate) struct ContextState {
    /// Limits of the driver's device parts capability: objects to get, objects to set.
    pub limits: (u8, u8),
    /// Resource objects of type DEV_PARTS by id.
    pub objects: BTreeMap<u32, Object>,
}

impl Context {
    fn new(core: &Core) -> Arc<Self> {
        let context = Arc::new(Self {
            used: Default::default(),
            state: Mutex::default(),
        });
        context.reset(core);
        context
    }

    /// Usable opcodes of a group type.
    pub(crate) fn used(&self, group: u16) -> u64 {
        self.used
            .get(usize::from(group))
            .map_or(0, |used| used.load(Ordering::Relaxed))
    }

    pub(crate) fn set_used(&self, group: u16, list: u64) {
        if let Some(used) = self.used.get(usize::from(group)) {
            used.store(list, Ordering::Relaxed);
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, ContextState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a reset of the owner does to it.
    pub fn reset(&self, core: &Core) {
        let own = if core.options.compat.self_group_preset {
            core.supported(command::SELF)
        } else {
            command::LISTS
        };
        self.set_used(command::SELF, own);
        self.set_used(command::SR_IOV, command::LISTS);
        *self.lock() = ContextState::default();
    }
}

/// What all drivers of the owner share.
pub struct Core {
    /// The pool.
    pub pool: Arc<Pool>,
    /// How the group is.
    pub options: GroupOptions,
    /// Replaced as a whole: commands look it up without a lock.
    members: ArcSwap<Members>,
    changing: Mutex<()>,
    /// What was accessed.
    pub trace: Trace,
}

/// The members, and which of them are virtual functions that exist.
#[derive(Clone, Default)]
struct Members {
    by_id: BTreeMap<u32, Entry>,
    vf_enable: bool,
    num_vfs: u16,
}

/// A member with the commands it has had, by opcode.
#[derive(Clone)]
struct Entry {
    member: Arc<Member>,
    commands: Arc<[AtomicU64; command::COUNTED]>,
}

impl Core {
    fn members(&self) -> Guard<Arc<Members>> {
        self.members.load()
    }

    fn change_members<R>(&self, change: impl FnOnce(&mut Members) -> R) -> R {
        let _one_at_a_time = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut members = Members::clone(&self.members());
        let result = change(&mut members);
        self.members.store(Arc::new(members));
        result
    }

    /// Whether VF Enable is set, and NumVFs.
    pub fn vfs(&self) -> (bool, u16) {
        let members = self.members();
        (members.vf_enable, members.num_vfs)
    }

    /// Sets VF Enable and NumVFs, as a write to the SR-IOV capability does.
    pub fn set_vfs(&self, enable: bool, num_vfs: u16) {
        self.change_members(|members| {
            members.vf_enable = enable;
            members.num_vfs = num_vfs;
        });
    }

    /// VF Enable and NumVFs as the members there are make them. Also after a function-level reset of the owner: software on
    /// the host enables them again, since no guest can.
    pub fn restore_vfs(&self) {
        self.change_members(|members| {
            // Ids have 16 bits.
            members.num_vfs = members.by_id.keys().next_back().map_or(0, |id| *id as u16);
            members.vf_enable = members.num_vfs > 0;
        });
    }

    /// The member that a virtual function's number names, if there is one.
    pub(crate) fn member(&self, id: u64, opcode: u16) -> Option<Arc<Member>> {
        let members = self.members();
        let id = u32::try_from(id)
            .ok()
            .filter(|id| (1..=u32::from(members.num_vfs)).contains(id))?;
        let entry = members.by_id.get(&id)?;
        if let Some(counter) = entry.commands.get(usize::from(opcode)) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
        Some(Arc::clone(&entry.member))
    }

    /// A member, without counting a command.
    pub(crate) fn find(&self, id: u64) -> Option<Arc<Member>> {
        let members = self.members();
        let entry = members.by_id.get(&u32::try_from(id).ok()?)?;
        Some(Arc::clone(&entry.member))
    }

    /// Opcodes of a group type, as bits.
    pub fn supported(&self, group: u16) -> u64 {
        command::supported(&self.options, group)
    }
}

/// The device group.
pub struct DeviceGroup {
    core: Arc<Core>,
    /// Of the in-process owner driver.
    driver: Arc<Context>,
    queues: Vec<Arc<LocalQueue>>,
    /// Behind the forwarders' queues.
    forwarding: Arc<AdminDevice>,
    /// Of the driver of the owner's PCI function.
    function: Arc<AdminDevice>,
}

/// What there is to know about a group, for people.
pub struct GroupInfo {
    /// VF Enable.
    pub vf_enable: bool,
    /// NumVFs.
    pub num_vfs: u16,
    /// Options.
    pub options: GroupOptions,
    /// Usable opcodes, as bits: in-process driver's self and SR-IOV group, then those of the PCI function's driver.
    pub used: [[u64; 2]; 2],
    /// Supported opcodes of the self and the SR-IOV group.
    pub supported: [u64; 2],
    /// Capability limits of the two drivers.
    pub limits: [(u8, u8); 2],
    /// Resource objects of the two drivers: id and object.
    pub objects: [Vec<(u32, Object)>; 2],
    /// Commands by opcode.
    pub commands: Vec<(u16, u64)>,
    /// Commands that failed.
    pub failed: u64,
    /// Submitted and completed, of each in-process queue.
    pub queues: Vec<(u64, u64)>,
    /// Commands of the forwarders.
    pub forwarded: u64,
}

impl DeviceGroup {
    /// A group without members.
    ///
    /// # Errors
    /// [`Error::Invalid`] for options out of range, [`Error::Os`] when there is no memory for the queues.
    pub fn new(pool: Arc<Pool>, options: GroupOptions) -> Result<Arc<Self>> {
        if !(1..=64).contains(&options.admin_queues) {
            return Err(Error::Invalid(format!(
                "admin_queues = {}; 1 to 64 are possible",
                options.admin_queues
            )));
        }
        let core = Arc::new(Core {
            pool,
            options,
            members: ArcSwap::default(),
            changing: Mutex::default(),
            trace: Trace::default(),
        });
        let driver = Context::new(&core);
        let forwarding = Context::new(&core);
        let function = Context::new(&core);
        let number = Cell::new(0);
        let queues = |context: &Arc<Context>| {
            (0..options.admin_queues)
                .map(|_| {
                    number.set(number.get() + 1);
                    LocalQueue::new(AdminDevice::new(Arc::clone(&core), Arc::clone(context), number.get()))
                })
                .collect::<Result<Vec<_>>>()
        };
        let group = Self {
            queues: queues(&driver)?,
            forwarding: AdminDevice::new(Arc::clone(&core), forwarding, usize::from(options.admin_queues) + 1),
            function: AdminDevice::new(Arc::clone(&core), function, 0),
            core: Arc::clone(&core),
            driver,
        };
        group.use_legacy_commands()?;
        Ok(Arc::new(group))
    }

    /// The forwarders' part of being an owner's driver: LIST_QUERY and LIST_USE, through their queue.
    fn use_legacy_commands(&self) -> Result<()> {
        // VF Enable is 0 yet; with strict switches the lists can be asked for only while it is set.
        self.core.set_vfs(true, 0);
        let mut list = [0; 8];
        let queue = self.forwarding_queue()?;
        let queried = queue.call(command::LIST_QUERY, command::SR_IOV, 0, &[], &mut list);
        let wanted = u64::from_le_bytes(list) & command::LEGACY;
        let used = queue.call(command::LIST_USE, command::SR_IOV, 0, &wanted.to_le_bytes(), &mut []);
        self.core.restore_vfs();
        match (queried, used) {
            (Ok(0), Ok(0)) => Ok(()),
            _ => Err(Error::Invalid(
                "the owner refuses the list of its own commands".to_owned(),
            )),
        }
    }

    /// What all drivers share.
    pub fn core(&self) -> &Arc<Core> {
        &self.core
    }

    /// The device behind the administration virtqueues of the owner's PCI function.
    pub fn function_device(&self) -> Arc<AdminDevice> {
        Arc::clone(&self.function)
    }

    /// The owner's PCI function was reset.
    pub fn function_reset(&self) {
        self.function.context().reset(&self.core);
    }

    /// What an owner's reset is to the in-process driver.
    pub fn reset(&self) {
        self.driver.reset(&self.core);
    }

    /// An in-process queue.
    pub fn queue(&self, index: usize) -> Option<&Arc<LocalQueue>> {
        self.queues.get(index)
    }

    /// A queue for a forwarder.
    ///
    /// # Errors
    /// [`Error::Fault`] when there is no memory for it.
    pub fn forwarding_queue(&self) -> Result<Arc<LocalQueue>> {
        LocalQueue::for_forwarder(Arc::clone(&self.forwarding))
    }

    /// Adds a member; NumVFs follows.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the id is taken or not one of a virtual function.
    pub fn add(&self, member: Arc<Member>) -> Result<()> {
        let id = member.id();
        if !(1..=u32::from(TOTAL_VFS)).contains(&id) {
            return Err(Error::Invalid(format!("member id {id}; 1 to {TOTAL_VFS} are possible")));
        }
        let taken = self.core.change_members(|members| {
            if members.by_id.contains_key(&id) {
                return true;
            }
            let entry = Entry {
                member,
                commands: Arc::new(std::array::from_fn(|_| AtomicU64::new(0))),
            };
            members.by_id.insert(id, entry);
            false
        });
        if taken {
            return Err(Error::Invalid(format!("there is already a member {id}")));
        }
        self.core.restore_vfs();
        Ok(())
    }

    /// Removes a member; NumVFs follows. False: there is none.
    pub fn remove(&self, id: u32) -> bool {
        let removed = self.core.change_members(|members| members.by_id.remove(&id));
        // Its resource objects go with it: nobody could name them any more.
        for context in [&self.driver, self.function.context()] {
            context.lock().objects.retain(|_, object| object.member != id);
        }
        self.core.restore_vfs();
        removed.is_some()
    }

    /// A member.
    pub fn member(&self, id: u32) -> Option<Arc<Member>> {
        self.core
            .members()
            .by_id
            .get(&id)
            .map(|entry| Arc::clone(&entry.member))
    }

    /// Commands that a member has had, by opcode; those never seen are left out.
    pub fn member_commands(&self, id: u32) -> Vec<(u16, u64)> {
        let members = self.core.members();
        members.by_id.get(&id).map_or_else(Vec::new, |entry| {
            seen(command::COUNTED, |opcode| {
                entry.commands[opcode].load(Ordering::Relaxed)
            })
        })
    }

    /// Everything about the group, for people.
    pub fn info(&self) -> GroupInfo {
        let (vf_enable, num_vfs) = self.core.vfs();
        let contexts = [&self.driver, self.function.context()];
        let local = self.queues.iter().map(|queue| queue.device());
        let devices: Vec<&Arc<AdminDevice>> = local.chain([&self.forwarding, &self.function]).collect();
        let count = |opcode: usize| devices.iter().map(|device| device.commands(opcode)).sum();
        let queues = |queues: &[Arc<LocalQueue>]| queues.iter().map(|queue| queue.statistics()).collect();
        GroupInfo {
            vf_enable,
            num_vfs,
            options: self.core.options,
            used: contexts.map(|context| [command::SELF, command::SR_IOV].map(|group| context.used(group))),
            supported: [command::SELF, command::SR_IOV].map(|group| self.core.supported(group)),
            limits: contexts.map(|context| context.lock().limits),
            objects: contexts.map(|context| {
                context
                    .lock()
                    .objects
                    .iter()
                    .map(|(id, object)| (*id, *object))
                    .collect()
            }),
            commands: seen(command::COUNTED, count),
            failed: devices.iter().map(|device| device.failed()).sum(),
            queues: queues(&self.queues),
            forwarded: (0..command::COUNTED)
                .map(|opcode| self.forwarding.commands(opcode))
                .sum(),
        }
    }
}

fn seen(opcodes: usize, count: impl Fn(usize) -> u64) -> Vec<(u16, u64)> {
    (0..opcodes)
        .map(|opcode| (opcode as u16, count(opcode)))
        .filter(|(_, count)| *count > 0)
        .collect()
}
