// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Administration commands: any bytes, and commands right in form, to a group whose members' rings run.
//!
//! Each command must end with a result that is well formed and no longer than there is room. One that waits (for rings to stop)
//! must end as well, also when its member leaves the group or loses its client meanwhile.

#![no_main]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use vhu_core::event::Waker;
use vhu_core::member::{Front, Member, MemberOptions};
use vhu_core::owner::command;
use vhu_core::owner::forward::Forwarder;
use vhu_core::owner::local::{header, Full, LocalQueue, Submitted, Ticket};
use vhu_core::owner::trace::{Begun, Origin};
use vhu_core::owner::{Compat, DeviceGroup, GroupOptions};
use vhu_core::sys::PeerFd;
use vhu_core::vfio_user::function::Access;
use vhu_fuzz::driver::{self, empty, layout, Blk, SIZE};
use vhu_fuzz::host::{blk, check_leaks, line, memfd, pool, Calls};
use vhu_fuzz::Number;

const MOST_OPS: usize = 64;
const MEMBERS: u32 = 3;
const GUEST: u64 = 0x10_0000;
const QUEUE_SIZE: u16 = 32;

// Those that the core doesn't name outside.
const CAP_ID_LIST_QUERY: u16 = 0x7;
const DEVICE_CAP_GET: u16 = 0x8;
const DRIVER_CAP_SET: u16 = 0x9;
const RESOURCE_OBJ_CREATE: u16 = 0xa;
const RESOURCE_OBJ_QUERY: u16 = 0xb;
const RESOURCE_OBJ_MODIFY: u16 = 0xc;
const RESOURCE_OBJ_DESTROY: u16 = 0xd;
const DEV_PARTS_METADATA_GET: u16 = 0xe;
const DEV_PARTS_GET: u16 = 0xf;
const DEV_PARTS_SET: u16 = 0x10;
const DEVICE_MGMT: u16 = 0x3e;
const DEVICE_MGMT_ATTRS: u16 = 0x3f;

/// Something like a resource object.
#[derive(Arbitrary, Clone, Copy, Debug)]
struct Object {
    kind: u8,
    id: u8,
    operation: u8,
}

impl Object {
    fn bytes(self) -> Vec<u8> {
        // Few types and ids, so that some are met again.
        let mut bytes = vec![self.kind / 200, 0, 0, 0, self.id % 70, 0, 0, 0];
        bytes.extend([0; 8]);
        bytes.push(self.operation % 3);
        bytes
    }
}

#[derive(Arbitrary, Debug)]
enum Command {
    ListQuery,
    ListUse(Number),
    /// Everything that is supported.
    ListUseAll,
    Write {
        device: bool,
        offset: u8,
        data: Vec<u8>,
    },
    Read {
        device: bool,
        offset: u8,
    },
    NotifyInfo,
    CapList,
    CapGet(u8),
    CapSet {
        id: u8,
        get: u8,
        set: u8,
    },
    Create(Object),
    Query(Object),
    Modify(Object),
    Destroy(Object),
    Metadata(Object, u8),
    /// Headers of parts that were read before, or any.
    PartsGet {
        object: Object,
        what: u8,
        headers: Vec<u8>,
    },
    PartsSet {
        object: Object,
        parts: Vec<u8>,
    },
    /// The parts that were read last, with some bytes changed.
    PartsSetAgain {
        object: Object,
        changes: Vec<(u16, u8)>,
        cut: u8,
    },
    Mode(u8),
    Manage {
        operation: u8,
        resource: u8,
        value: Number,
    },
    Attributes,
    Any {
        opcode: u16,
        data: Vec<u8>,
    },
}

#[derive(Arbitrary, Debug)]
enum Op {
    Run {
        command: Command,
        own_group: bool,
        member: u8,
        room: u16,
    },
    /// Any bytes as the device-readable part, in one piece or several.
    Bytes {
        parts: Vec<Vec<u8>>,
        room: u16,
    },
    /// Several with one doorbell.
    Batch {
        parts: Vec<Vec<u8>>,
        room: u8,
    },
    /// An access to a member's I/O BAR.
    Access {
        member: u8,
        offset: u8,
        write: Option<u32>,
        width: u8,
        give_up: bool,
    },
    /// A legacy driver, up to DRIVER_OK.
    Drive {
        member: u8,
        queue: u8,
    },
    Requests {
        member: u8,
        queue: u8,
        requests: Vec<Blk>,
    },
    Attach(u8),
    Detach(u8),
    Remove(u8),
    Add(u8),
    Vfs {
        enable: bool,
        count: u16,
    },
    Reset,
    Void,
    Abandon,
    Collect,
    Trace {
        since: u8,
        limit: u8,
        member: Option<u8>,
    },
    Scribble {
        member: u8,
        at: u16,
        bytes: [u8; 8],
    },
}

#[derive(Arbitrary, Debug)]
struct Input {
    strict: bool,
    pfn_zero: bool,
    no_management: bool,
    no_notify: bool,
    ops: Vec<Op>,
}

/// A member and its guest.
struct Machine {
    member: Arc<Member>,
    ports: Forwarder,
    guest: File,
    attached: bool,
}

/// A command that waits.
struct Waiting {
    ticket: Ticket,
    woken: Calls,
    room: usize,
}

struct Bed {
    group: Arc<DeviceGroup>,
    queue: Arc<LocalQueue>,
    machines: Vec<Machine>,
    waiting: Vec<Waiting>,
    parts: Vec<u8>,
}

fn never() -> Waker {
    Box::new(|| {})
}

impl Bed {
    fn new(input: &Input) -> Self {
        let mut compat = Compat::new(input.strict);
        compat.pfn_zero_resets_device = input.pfn_zero;
        let options = GroupOptions {
            compat,
            feature_management: !input.no_management,
            notify_region: !input.no_notify,
            admin_queues: 1,
        };
        let group = DeviceGroup::new(Arc::clone(pool()), options).expect("a group");
        let machines = (1..=MEMBERS)
            .map(|id| {
                let options = MemberOptions {
                    // One that legacy drivers must leave alone.
                    legacy: id != 3,
                    vectors: 3,
                    ..MemberOptions::default()
                };
                let device = blk(if id == 1 { "null:65536" } else { "ram:65536" }, 2, QUEUE_SIZE, false);
                let member = Member::new(Arc::clone(pool()), id, device, options);
                group.add(Arc::clone(&member)).expect("a free id");
                Machine {
                    ports: Forwarder::new(Arc::clone(&group), Arc::clone(&member)).expect("a queue"),
                    member,
                    guest: memfd(SIZE),
                    attached: false,
                }
            })
            .collect();
        let queue = Arc::clone(group.queue(0).expect("a queue"));
        let bed = Self {
            group,
            queue,
            machines,
            waiting: Vec::new(),
            parts: Vec::new(),
        };
        bed.check(&bed.call(command::LIST_QUERY, command::SELF, 0, &[], 8));
        bed
    }

    fn machine(&mut self, member: u8) -> &mut Machine {
        &mut self.machines[usize::from(member) % MEMBERS as usize]
    }

    /// A result is whole: a header, and an error says why.
    fn check(&self, result: &[u8]) {
        let Some(head) = result.get(..8) else { return };
        let half = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
        let known = [0, 6, 12, 16, 17, 22, 28];
        assert!(known.contains(&half(0)), "status {}", half(0));
        assert_eq!(
            half(0) == 0,
            half(2) == 0,
            "status {} with qualifier {}",
            half(0),
            half(2)
        );
        assert_eq!(head[4..], [0; 4], "reserved");
    }

    /// A command that doesn't wait.
    fn call(&self, opcode: u16, group: u16, member: u64, data: &[u8], room: usize) -> Vec<u8> {
        let mut out = vec![0xaa; 8 + room];
        let head = header(opcode, group, member);
        let submitted = self
            .queue
            .submit(&[&head, data], &mut out, Origin::Admin, Begun::now(), never);
        match submitted.expect("room in the queue") {
            Submitted::Done(written) => out.truncate(written),
            Submitted::Later(ticket) => {
                self.queue.abandon(ticket);
                out.clear();
            }
        }
        out
    }

    fn submit(&mut self, parts: &[&[u8]], room: usize) -> Option<Vec<u8>> {
        let mut out = vec![0xaa; room];
        let woken = Calls::default();
        let mut again = true;
        let submitted = loop {
            let wake = || woken.waker();
            let queue = Arc::clone(&self.queue);
            match queue.submit(parts, &mut out, Origin::Admin, Begun::now(), wake) {
                Ok(submitted) => break submitted,
                Err(Full::Length) => {
                    assert!(
                        parts.iter().all(|part| part.is_empty()),
                        "a command that is short enough"
                    );
                    return None;
                }
                // Few long ones fit. What was abandoned takes its place until it is done.
                Err(Full::Queue) if again => self.collect(),
                Err(Full::Queue) => return None,
            }
            again = false;
        };
        match submitted {
            Submitted::Done(written) => {
                assert!(written <= room, "{written} bytes in a room of {room}");
                let untouched = out[written..] == vec![0xaa; room - written];
                assert!(untouched, "more was written than was said");
                out.truncate(written);
                self.check(&out);
                Some(out)
            }
            Submitted::Later(ticket) => {
                self.waiting.push(Waiting { ticket, woken, room });
                None
            }
        }
    }

    /// Waits for all commands that wait.
    fn collect(&mut self) {
        for Waiting { ticket, woken, room } in std::mem::take(&mut self.waiting) {
            woken.wait(0, "a command", || {});
            let mut out = vec![0xaa; room];
            let written = self.queue.take(ticket, &mut out).expect("a result");
            assert!(written <= room);
            self.check(&out[..written]);
            assert_eq!(woken.count(), 1, "woken twice");
        }
    }

    /// Opcode, and what comes behind the header.
    fn encode(&self, command: &Command, group: u16) -> (u16, Vec<u8>) {
        let object = |object: &Object, what: u8| {
            let mut bytes = object.bytes();
            bytes.truncate(8);
            bytes.extend([what % 4, 0, 0, 0, 0, 0, 0, 0]);
            bytes
        };
        match command {
            Command::ListQuery => (command::LIST_QUERY, vec![]),
            Command::ListUse(list) => (command::LIST_USE, list.get().to_le_bytes().to_vec()),
            Command::ListUseAll => {
                let all = self.group.core().supported(group);
                (command::LIST_USE, all.to_le_bytes().to_vec())
            }
            Command::Write { device, offset, data } => {
                let mut bytes = vec![*offset, 0, 0, 0, 0, 0, 0, 0];
                bytes.extend(data);
                let opcode = if *device {
                    command::LEGACY_DEV_CFG_WRITE
                } else {
                    command::LEGACY_COMMON_CFG_WRITE
                };
                (opcode, bytes)
            }
            Command::Read { device: false, offset } => (command::LEGACY_COMMON_CFG_READ, vec![*offset]),
            Command::Read { device: true, offset } => (command::LEGACY_DEV_CFG_READ, vec![*offset]),
            Command::NotifyInfo => (command::LEGACY_NOTIFY_INFO, vec![]),
            Command::CapList => (CAP_ID_LIST_QUERY, vec![]),
            Command::CapGet(id) => (DEVICE_CAP_GET, vec![id / 200, 0]),
            Command::CapSet { id, get, set } => (DRIVER_CAP_SET, vec![id / 200, 0, 0, 0, 0, 0, 0, 0, *get, *set]),
            Command::Create(object) => (RESOURCE_OBJ_CREATE, object.bytes()),
            Command::Query(object) => (RESOURCE_OBJ_QUERY, object.bytes()),
            Command::Modify(object) => (RESOURCE_OBJ_MODIFY, object.bytes()),
            Command::Destroy(object) => (RESOURCE_OBJ_DESTROY, object.bytes()),
            Command::Metadata(of, what) => (DEV_PARTS_METADATA_GET, object(of, *what)),
            Command::PartsGet {
                object: of,
                what,
                headers,
            } => (DEV_PARTS_GET, [object(of, *what), headers.clone()].concat()),
            Command::PartsSet { object: of, parts } => {
                let mut bytes = object(of, 0);
                bytes.truncate(8);
                bytes.extend(parts);
                (DEV_PARTS_SET, bytes)
            }
            Command::PartsSetAgain {
                object: of,
                changes,
                cut,
            } => {
                let mut bytes = object(of, 0);
                bytes.truncate(8);
                bytes.extend(&self.parts);
                for (at, value) in changes {
                    let len = bytes.len();
                    bytes[usize::from(*at) % len] = *value;
                }
                bytes.truncate(bytes.len().saturating_sub((*cut).into()).max(8));
                (DEV_PARTS_SET, bytes)
            }
            Command::Mode(flags) => (command::DEV_MODE_SET, vec![flags % 3]),
            Command::Manage {
                operation,
                resource,
                value,
            } => {
                let mut bytes = vec![operation % 4, resource / 200, 0];
                bytes.extend(value.get().to_le_bytes());
                (DEVICE_MGMT, bytes)
            }
            Command::Attributes => (DEVICE_MGMT_ATTRS, vec![]),
            Command::Any { opcode, data } => (*opcode, data.clone()),
        }
    }

    fn command(&mut self, command: &Command, own_group: bool, member: u8, room: usize) {
        let group = if own_group { command::SELF } else { command::SR_IOV };
        let (opcode, data) = self.encode(command, group);
        let head = header(opcode, group, member.into());
        if let Some(result) = self.submit(&[&head, &data], room) {
            if opcode == DEV_PARTS_GET && result.len() > 8 && result[..2] == [0, 0] {
                self.parts = result[8..].to_vec();
            }
        }
    }

    fn access(&mut self, member: u8, offset: u8, write: Option<u32>, width: u8, give_up: bool) {
        let machine = self.machine(member);
        let woken = Calls::default();
        let wake = || woken.waker();
        let width = usize::from(width % 8) + 1;
        // The function checks accesses against the size of the BAR.
        let size = machine.ports.size();
        let offset = u64::from(offset) % (size - width) as u64;
        let mut data = [0; 8];
        let data = &mut data[..width];
        let mut access = match write {
            Some(value) => {
                data[..width.min(4)].copy_from_slice(&value.to_le_bytes()[..width.min(4)]);
                machine.ports.write(offset, data, &wake)
            }
            None => machine.ports.read(offset, data, &wake),
        };
        let mut before = 0;
        while access == Access::Later {
            if give_up {
                machine.ports.give_up();
                return;
            }
            woken.wait(before, "an access", || {});
            before += 1;
            access = machine.ports.resume(data, &wake);
        }
    }

    fn drive(&mut self, member: u8, queue: u8) {
        let id = u64::from(member) % u64::from(MEMBERS) + 1;
        let ring = layout(queue, QUEUE_SIZE);
        empty(&self.machine(member).guest, &ring);
        let write = |bed: &mut Self, offset: u8, data: &[u8]| {
            let mut bytes = vec![offset, 0, 0, 0, 0, 0, 0, 0];
            bytes.extend(data);
            let head = header(command::LEGACY_COMMON_CFG_WRITE, command::SR_IOV, id);
            bed.submit(&[&head, &bytes], 8);
        };
        self.command(&Command::ListUseAll, false, 0, 8);
        write(self, 18, &[3]);
        write(self, 4, &0x244u32.to_le_bytes());
        write(self, 14, &u16::from(queue % 2).to_le_bytes());
        write(self, 8, &(((GUEST + ring.desc) >> 12) as u32).to_le_bytes());
        write(self, 18, &[7]);
    }

    fn attach(&mut self, member: u8) {
        let machine = self.machine(member);
        if machine.attached {
            return;
        }
        machine.guest.set_len(SIZE).expect("the size of a memfd");
        machine
            .member
            .attach_function(Front::Legacy, line().clone())
            .expect("nobody is attached");
        machine.attached = true;
        let fd = PeerFd::from(OwnedFd::from(machine.guest.try_clone().expect("an fd")));
        let region = pool().mappings().region(&fd, GUEST, SIZE, GUEST, 0).expect("a region");
        machine.member.add_memory(region).expect("room for it");
    }

    fn detach(&mut self, member: u8) {
        let machine = self.machine(member);
        if !std::mem::replace(&mut machine.attached, false) {
            return;
        }
        machine.ports.leave();
        let done = Calls::default();
        machine.member.detach_function(done.completion());
        done.wait(0, "a detach", || {});
    }

    fn run(&mut self, op: &Op) {
        match op {
            Op::Run {
                command,
                own_group,
                member,
                room,
            } => self.command(command, *own_group, member % 5, usize::from(*room)),
            Op::Bytes { parts, room } => {
                let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
                self.submit(&parts, usize::from(*room));
            }
            Op::Batch { parts, room } => {
                if self.waiting.len() > 50 {
                    self.collect();
                }
                let parts: Vec<&[u8]> = parts.iter().take(32).map(Vec::as_slice).collect();
                let mut results = Vec::new();
                let queued = self
                    .queue
                    .submit_all(&parts, (*room).into(), |_, result| results.push(result.to_vec()));
                // Those that stand behind a command that waits are nobody's.
                if queued.is_err() {
                    self.collect();
                }
                results.iter().for_each(|result| self.check(result));
            }
            Op::Access {
                member,
                offset,
                write,
                width,
                give_up,
            } => self.access(*member, *offset, *write, *width, *give_up),
            Op::Drive { member, queue } => {
                self.attach(*member);
                self.drive(*member, *queue);
            }
            Op::Requests {
                member,
                queue,
                requests,
            } => {
                let machine = self.machine(*member);
                driver::offer(&machine.guest, GUEST, *queue, QUEUE_SIZE, requests);
                machine.member.notify(u16::from(queue % 4));
            }
            Op::Attach(member) => self.attach(*member),
            Op::Detach(member) => self.detach(*member),
            Op::Remove(member) => {
                let id = self.machine(*member).member.id();
                self.group.remove(id);
                assert!(self.group.member(id).is_none());
            }
            Op::Add(member) => {
                let member = Arc::clone(&self.machine(*member).member);
                let free = self.group.member(member.id()).is_none();
                assert_eq!(self.group.add(member).is_ok(), free);
            }
            Op::Vfs { enable, count } => self.group.core().set_vfs(*enable, *count),
            Op::Reset => self.group.reset(),
            Op::Void => {
                self.queue.void();
            }
            Op::Abandon => {
                if let Some(waiting) = self.waiting.pop() {
                    self.queue.abandon(waiting.ticket);
                    assert!(self.queue.take(waiting.ticket, &mut []).is_none());
                }
            }
            Op::Collect => self.collect(),
            Op::Trace { since, limit, member } => {
                let trace = &self.group.core().trace;
                let (next, _, found) = trace.read((*since).into(), (*limit).into(), member.map(u32::from));
                assert!(found.len() <= usize::from(*limit));
                assert!(found
                    .iter()
                    .all(|(number, _)| *number >= u64::from(*since) && *number < next));
            }
            Op::Scribble { member, at, bytes } => {
                let offset = u64::from(*at) % (SIZE - 8);
                let guest = &self.machine(*member).guest;
                guest.write_all_at(bytes, offset).expect("writing to a memfd");
            }
        }
    }
}

fn run(input: &Input) {
    let mut bed = Bed::new(input);
    for op in input.ops.iter().take(MOST_OPS) {
        bed.run(op);
    }
    bed.collect();
    for member in 0..MEMBERS as u8 {
        bed.detach(member);
    }
    bed.group.info();
    for machine in &bed.machines {
        machine.member.close().expect("nobody is attached");
    }
}

fuzz_target!(|input: Input| {
    run(&input);
    check_leaks();
});
