// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A vhost-user front end that sends what it likes, to a member whose rings run.
//!
//! Messages are right in form as a rule, so that they get past the table of sizes, and wrong in one thing at times; some are
//! raw bytes. A driver fills the rings meanwhile. Whatever comes, each pending request ends, replies look like replies, a
//! session that has failed can be replaced by another, and nothing is left behind.

#![no_main]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::sync::Arc;

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use vhost::vhost_user::message::FrontendReq;
use vhu_core::error::Error;
use vhu_core::member::{Member, MemberOptions};
use vhu_core::ring::any::fresh_position;
use vhu_core::session::{payload_size, protocol_features, Outcome, Session, HEADER_SIZE, MAX_FDS};
use vhu_core::sys::{self, PeerFd};
use vhu_fuzz::driver::{self, empty, layout, longs, words, Blk, QUEUE, SIZE};
use vhu_fuzz::host::{blk, check_leaks, memfd, pool, wait_for, Fd};
use vhu_fuzz::Number;

const MOST_OPS: usize = 48;
/// The guest's memory is at this guest address, and at this address of the front end.
const GUEST: u64 = 0x10_0000;
const USER: u64 = 0x7f00_0000_0000;
const REPLY: u32 = 1 | 4;
const NEED_REPLY: u32 = 1 | 8;

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Features {
    /// What a modern driver takes.
    Modern,
    /// And without VERSION_1, EVENT_IDX, and so on.
    Without(u64),
    Legacy,
    Any(u64),
}

impl Features {
    fn get(self, offered: u64) -> u64 {
        match self {
            Self::Modern => offered,
            Self::Without(bits) => offered & !bits,
            Self::Legacy => offered & 0x7fff_ffff,
            Self::Any(bits) => bits,
        }
    }
}

/// A region of memory, the guest's own as a rule.
#[derive(Arbitrary, Clone, Copy, Debug)]
struct Row {
    guest: Option<Number>,
    size: Option<Number>,
    user: Option<Number>,
    offset: Option<Number>,
}

impl Row {
    fn bytes(&self) -> Vec<u8> {
        let or = |number: Option<Number>, usual: u64| number.map_or(usual, Number::get);
        longs(&[
            or(self.guest, GUEST),
            or(self.size, SIZE),
            or(self.user, USER),
            or(self.offset, 0),
        ])
    }
}

#[derive(Arbitrary, Clone, Debug)]
enum Request {
    GetFeatures,
    SetFeatures(Features),
    SetOwner,
    ResetOwner,
    SetMemTable(Vec<(Row, Fd)>),
    SetLogBase {
        size: Number,
        offset: Number,
        fd: Fd,
    },
    SetLogFd(Fd),
    SetVringNum {
        queue: u8,
        size: Number,
    },
    SetVringAddr {
        queue: u8,
        flags: u32,
        desc: Number,
        used: Number,
        avail: Number,
        log: Number,
    },
    /// Where the driver's ring is.
    UsualVringAddr {
        queue: u8,
        log: bool,
    },
    SetVringBase {
        queue: u8,
        base: Number,
    },
    GetVringBase(u8),
    SetVringKick {
        queue: u8,
        fd: Option<Fd>,
    },
    SetVringCall {
        queue: u8,
        fd: Option<Fd>,
    },
    SetVringErr {
        queue: u8,
        fd: Option<Fd>,
    },
    GetProtocolFeatures,
    SetProtocolFeatures(Features),
    GetQueueNum,
    SetVringEnable {
        queue: u8,
        on: u8,
    },
    SendRarp(u64),
    NetSetMtu(u64),
    SetBackendReqFd(Fd),
    IotlbMsg([u8; 32]),
    SetVringEndian {
        queue: u8,
        big: u8,
    },
    GetConfig {
        offset: Number,
        size: Number,
        flags: u32,
        data: bool,
    },
    SetConfig {
        offset: Number,
        flags: u32,
        data: Vec<u8>,
    },
    PostcopyAdvise,
    PostcopyListen,
    PostcopyEnd,
    GetInflightFd {
        size: Number,
        offset: Number,
        queues: u8,
        queue_size: u16,
    },
    SetInflightFd {
        size: Number,
        offset: Number,
        queues: u8,
        queue_size: u16,
        fd: Fd,
    },
    ResetDevice,
    GetMaxMemSlots,
    AddMemReg(Row, Fd),
    RemMemReg(Row, Option<Fd>),
    SetStatus(u8),
    GetStatus,
    GetSharedObject([u8; 16]),
    SetDeviceStateFd {
        direction: u32,
        phase: u32,
        fd: Fd,
    },
    CheckDeviceState,
    Unknown(u32, Vec<u8>),
}

/// What is wrong with a message.
#[derive(Arbitrary, Clone, Debug)]
enum Twist {
    Flags(u32),
    /// The size that the header says.
    Size(u32),
    Shorter(u8),
    Longer(Vec<u8>),
    Byte {
        at: u8,
        value: u8,
    },
    Fds(Vec<Fd>),
}

#[derive(Arbitrary, Clone, Debug)]
struct Message {
    request: Request,
    need_reply: bool,
    twist: Option<Twist>,
}

#[derive(Arbitrary, Debug)]
enum Op {
    Send(Message),
    /// Two at once: nobody may, while the first one waits.
    SendBoth(Message, Message),
    Raw {
        header: [u8; HEADER_SIZE],
        payload: Vec<u8>,
        fds: Vec<Fd>,
    },
    /// All that it takes to get a queue running, up to a point.
    Start {
        queue: u8,
        size: u8,
        features: Features,
        protocol: Features,
        call: Option<Fd>,
        steps: u8,
    },
    /// Block requests in the ring that Start has set up, and a kick.
    Requests(u8, Vec<Blk>),
    /// Anything in the guest's memory.
    Scribble {
        queue: u8,
        at: u16,
        bytes: [u8; 8],
    },
    Kick(u8),
    /// Asks for memory for records of requests in flight, and hands it over.
    Inflight {
        queues: u8,
        queue_size: u8,
    },
    GiveInflight,
    ScribbleInflight {
        at: u16,
        bytes: [u8; 4],
    },
    TruncateInflight(u16),
    Log {
        pages: u8,
    },
    /// The memory file gets another length.
    Truncate(u16),
    ConfigChange,
    BackendReply {
        header: [u8; HEADER_SIZE],
        payload: Vec<u8>,
    },
    Resume(u64),
    Reconnect,
}

#[derive(Arbitrary, Debug)]
struct Input {
    null: bool,
    read_only: bool,
    queues: u8,
    queue_size: u8,
    packed: bool,
    in_order: bool,
    ops: Vec<Op>,
}

fn inflight(size: Number, offset: Number, queues: u8, queue_size: u16) -> Vec<u8> {
    let mut bytes = longs(&[size.get(), offset.get()]);
    bytes.extend(u16::from(queues).to_le_bytes());
    bytes.extend(queue_size.to_le_bytes());
    bytes
}

impl Request {
    fn encode(&self, size: u16, offered: u64) -> (u32, Vec<u8>, Vec<Fd>) {
        use FrontendReq as R;
        let vring = |queue: u8, value: u64| words(&[queue.into(), value as u32]);
        let with_fd = |queue: u8, fd: Option<Fd>| {
            let none = if fd.is_some() { 0 } else { 1 << 8 };
            (longs(&[u64::from(queue) | none]), fd.into_iter().collect())
        };
        let plain = |bytes: Vec<u8>| (bytes, Vec::new());
        let padded = |row: &Row| [longs(&[0]), row.bytes()].concat();
        let (code, (payload, fds)) = match self {
            Self::GetFeatures => (R::GET_FEATURES, plain(vec![])),
            Self::SetFeatures(features) => (R::SET_FEATURES, plain(longs(&[features.get(offered)]))),
            Self::SetOwner => (R::SET_OWNER, plain(vec![])),
            Self::ResetOwner => (R::RESET_OWNER, plain(vec![])),
            Self::SetMemTable(rows) => {
                let mut bytes = words(&[rows.len() as u32, 0]);
                bytes.extend(rows.iter().flat_map(|(row, _)| row.bytes()));
                (R::SET_MEM_TABLE, (bytes, rows.iter().map(|(_, fd)| *fd).collect()))
            }
            Self::SetLogBase { size, offset, fd } => (R::SET_LOG_BASE, (longs(&[size.get(), offset.get()]), vec![*fd])),
            Self::SetLogFd(fd) => (R::SET_LOG_FD, (vec![], vec![*fd])),
            Self::SetVringNum { queue, size } => (R::SET_VRING_NUM, plain(vring(*queue, size.get()))),
            Self::SetVringAddr {
                queue,
                flags,
                desc,
                used,
                avail,
                log,
            } => {
                let mut bytes = words(&[u32::from(*queue), *flags]);
                let user = |number: &Number| USER.wrapping_add(number.get());
                bytes.extend(longs(&[user(desc), user(used), user(avail), log.get()]));
                (R::SET_VRING_ADDR, plain(bytes))
            }
            Self::UsualVringAddr { queue, log } => {
                let ring = layout(*queue, size);
                let mut bytes = words(&[u32::from(*queue), u32::from(*log)]);
                let [desc, used, avail] = [ring.desc, ring.device, ring.driver].map(|offset| USER + offset);
                bytes.extend(longs(&[desc, used, avail, GUEST + ring.device]));
                (R::SET_VRING_ADDR, plain(bytes))
            }
            Self::SetVringBase { queue, base } => (R::SET_VRING_BASE, plain(vring(*queue, base.get()))),
            Self::GetVringBase(queue) => (R::GET_VRING_BASE, plain(vring(*queue, 0))),
            Self::SetVringKick { queue, fd } => (R::SET_VRING_KICK, with_fd(*queue, *fd)),
            Self::SetVringCall { queue, fd } => (R::SET_VRING_CALL, with_fd(*queue, *fd)),
            Self::SetVringErr { queue, fd } => (R::SET_VRING_ERR, with_fd(*queue, *fd)),
            Self::GetProtocolFeatures => (R::GET_PROTOCOL_FEATURES, plain(vec![])),
            Self::SetProtocolFeatures(features) => {
                let value = features.get(protocol_features().bits());
                (R::SET_PROTOCOL_FEATURES, plain(longs(&[value])))
            }
            Self::GetQueueNum => (R::GET_QUEUE_NUM, plain(vec![])),
            Self::SetVringEnable { queue, on } => (R::SET_VRING_ENABLE, plain(vring(*queue, u64::from(*on)))),
            Self::SendRarp(value) => (R::SEND_RARP, plain(longs(&[*value]))),
            Self::NetSetMtu(value) => (R::NET_SET_MTU, plain(longs(&[*value]))),
            Self::SetBackendReqFd(fd) => (R::SET_BACKEND_REQ_FD, (vec![], vec![*fd])),
            Self::IotlbMsg(bytes) => (R::IOTLB_MSG, plain(bytes.to_vec())),
            Self::SetVringEndian { queue, big } => (R::SET_VRING_ENDIAN, plain(vring(*queue, u64::from(*big)))),
            Self::GetConfig {
                offset,
                size,
                flags,
                data,
            } => {
                let size = size.get() as u32;
                let mut bytes = words(&[offset.get() as u32, size, *flags]);
                bytes.resize(12 + if *data { (size % 512) as usize } else { 0 }, 0);
                (R::GET_CONFIG, plain(bytes))
            }
            Self::SetConfig { offset, flags, data } => {
                let mut bytes = words(&[offset.get() as u32, data.len() as u32, *flags]);
                bytes.extend(data);
                (R::SET_CONFIG, plain(bytes))
            }
            Self::PostcopyAdvise => (R::POSTCOPY_ADVISE, plain(vec![])),
            Self::PostcopyListen => (R::POSTCOPY_LISTEN, plain(vec![])),
            Self::PostcopyEnd => (R::POSTCOPY_END, plain(vec![])),
            Self::GetInflightFd {
                size,
                offset,
                queues,
                queue_size,
            } => (
                R::GET_INFLIGHT_FD,
                plain(inflight(*size, *offset, *queues, *queue_size)),
            ),
            Self::SetInflightFd {
                size,
                offset,
                queues,
                queue_size,
                fd,
            } => {
                let bytes = inflight(*size, *offset, *queues, *queue_size);
                (R::SET_INFLIGHT_FD, (bytes, vec![*fd]))
            }
            Self::ResetDevice => (R::RESET_DEVICE, plain(vec![])),
            Self::GetMaxMemSlots => (R::GET_MAX_MEM_SLOTS, plain(vec![])),
            Self::AddMemReg(row, fd) => (R::ADD_MEM_REG, (padded(row), vec![*fd])),
            Self::RemMemReg(row, fd) => (R::REM_MEM_REG, (padded(row), fd.iter().copied().collect())),
            Self::SetStatus(status) => (R::SET_STATUS, plain(longs(&[u64::from(*status)]))),
            Self::GetStatus => (R::GET_STATUS, plain(vec![])),
            // Later than the crate: GET_SHARED_OBJECT, SET_DEVICE_STATE_FD, CHECK_DEVICE_STATE.
            Self::GetSharedObject(uuid) => return (41, uuid.to_vec(), vec![]),
            Self::SetDeviceStateFd { direction, phase, fd } => return (42, words(&[*direction, *phase]), vec![*fd]),
            Self::CheckDeviceState => return (43, vec![], vec![]),
            Self::Unknown(code, bytes) => return (*code, bytes.clone(), vec![]),
        };
        (code as u32, payload, fds)
    }
}

/// Where the records of requests in flight are, as GET_INFLIGHT_FD has said.
struct Inflight {
    file: File,
    size: u64,
    queues: u16,
    queue_size: u16,
}

struct Bed {
    member: Arc<Member>,
    session: Option<Session>,
    guest: File,
    size: u16,
    /// Kicks of the queues, as Start has made them.
    kicks: [Option<Arc<OwnedFd>>; 4],
    packed: bool,
    /// Where the driver is in packed rings.
    places: [u64; 4],
    inflight: Option<Inflight>,
}

impl Bed {
    fn new(input: &Input) -> Self {
        let image = if input.null { "null:65536" } else { "ram:65536" };
        let device = blk(
            image,
            u16::from(input.queues % 3) + 1,
            4 << (input.queue_size % 4),
            input.read_only,
        );
        let options = MemberOptions {
            legacy: true,
            packed: input.packed,
            in_order: input.in_order,
            ..MemberOptions::default()
        };
        let member = Member::new(Arc::clone(pool()), 1, device, options);
        let mut bed = Self {
            member,
            session: None,
            guest: memfd(SIZE),
            size: 4 << (input.queue_size % 4),
            kicks: Default::default(),
            packed: false,
            places: [0; 4],
            inflight: None,
        };
        bed.connect();
        bed
    }

    fn connect(&mut self) {
        self.session = Some(Session::new(Arc::clone(&self.member)).expect("the last session has ended"));
        assert!(
            matches!(Session::new(Arc::clone(&self.member)), Err(Error::Busy(..))),
            "two sessions at once"
        );
    }

    /// Features that a driver and its front end find.
    fn offered(&self) -> u64 {
        self.member.offered_features() | 1 << 26 | 1 << 30
    }

    fn session(&mut self) -> &mut Session {
        self.session.as_mut().expect("a session")
    }

    /// As the owner of the socket does when the connection is over.
    fn disconnect(&mut self) {
        if let Some(mut session) = self.session.take() {
            if let Some(token) = session.detach() {
                wait_for(token);
                let outcome = session.resume(token);
                assert!(outcome.pending.is_none());
            }
            assert!(session.detach().is_none(), "detached twice");
        }
    }

    fn fds(&self, fds: &[Fd]) -> Vec<PeerFd> {
        fds.iter().take(MAX_FDS).map(|fd| fd.make(&self.guest).into()).collect()
    }

    /// A message's header, payload and fds.
    fn message(&self, message: &Message) -> ([u8; HEADER_SIZE], Vec<u8>, Vec<PeerFd>) {
        let (code, mut payload, mut fds) = message.request.encode(self.size, self.offered());
        let mut flags = if message.need_reply { NEED_REPLY } else { 1 };
        let mut size = None;
        match &message.twist {
            None => {}
            Some(Twist::Flags(bits)) => flags = *bits,
            Some(Twist::Size(bytes)) => size = Some(*bytes),
            Some(Twist::Shorter(by)) => payload.truncate(payload.len().saturating_sub((*by).into())),
            Some(Twist::Longer(more)) => payload.extend(more),
            Some(Twist::Byte { at, value }) => {
                if let Some(byte) = payload.get_mut(usize::from(*at)) {
                    *byte = *value;
                }
            }
            Some(Twist::Fds(others)) => fds.clone_from(others),
        }
        let size = size.unwrap_or(payload.len() as u32);
        let header: Vec<u8> = words(&[code, flags, size]);
        (header.try_into().expect("three words"), payload, self.fds(&fds))
    }

    /// A reply is whole, and to this request.
    fn check_reply(outcome: &Outcome, code: u32) {
        let Some(reply) = &outcome.reply else { return };
        let word = |at: usize| u32::from_le_bytes(reply[at..at + 4].try_into().expect("four bytes"));
        assert!(outcome.pending.is_none(), "a reply before the request is done");
        assert_eq!((word(0), word(4)), (code, REPLY));
        assert_eq!(word(8) as usize, reply.len() - HEADER_SIZE);
    }

    /// Sends one, and waits for its end as the connection does.
    fn send(&mut self, header: &[u8; HEADER_SIZE], payload: &[u8], fds: Vec<PeerFd>) {
        let code = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        // The connection reads as many bytes as the header says, or none at all.
        match payload_size(header) {
            Ok(_) => {}
            Err(fault) => {
                self.session().fail(fault);
                return self.reconnect();
            }
        }
        let mut outcome = self.session().handle(header, payload, fds);
        loop {
            Self::check_reply(&outcome, code);
            if let (Some(fd), Some(reply)) = (outcome.reply_fd.take(), &outcome.reply) {
                self.keep_inflight(fd, &reply[HEADER_SIZE..]);
            }
            if outcome.config_changed {
                self.session().config_change();
            }
            if outcome.error.is_some() {
                assert!(
                    self.member.owner().fault().is_some(),
                    "a member with a fault isn't broken"
                );
                return self.reconnect();
            }
            let Some(token) = outcome.pending else { return };
            wait_for(token);
            outcome = self.session().resume(token);
        }
    }

    fn keep_inflight(&mut self, fd: OwnedFd, payload: &[u8]) {
        let (size, rest) = payload.split_at(8);
        self.inflight = Some(Inflight {
            file: fd.into(),
            size: u64::from_le_bytes(size.try_into().expect("eight bytes")),
            queues: u16::from_le_bytes([rest[8], rest[9]]),
            queue_size: u16::from_le_bytes([rest[10], rest[11]]),
        });
    }

    /// Gives the records back, as after a restart.
    fn give_inflight(&mut self) {
        let Some(inflight) = &self.inflight else { return };
        let mut payload = longs(&[inflight.size, 0]);
        payload.extend(inflight.queues.to_le_bytes());
        payload.extend(inflight.queue_size.to_le_bytes());
        let fd = OwnedFd::from(inflight.file.try_clone().expect("an fd"));
        let header = words(&[FrontendReq::SET_INFLIGHT_FD as u32, NEED_REPLY, payload.len() as u32]);
        self.send(&header.try_into().expect("three words"), &payload, vec![fd.into()]);
    }

    fn reconnect(&mut self) {
        self.disconnect();
        self.connect();
    }

    fn send_message(&mut self, message: &Message) {
        let (header, payload, fds) = self.message(message);
        self.send(&header, &payload, fds);
    }

    fn request(&mut self, request: Request) {
        let twist = None;
        self.send_message(&Message {
            request,
            need_reply: true,
            twist,
        });
    }

    fn start(&mut self, queue: u8, size: u16, features: Features, protocol: Features, call: Option<Fd>, steps: u8) {
        self.size = size;
        self.packed = features.get(self.offered()) & 1 << 34 != 0;
        self.places[usize::from(queue % 4)] = 0;
        let all = [
            Request::SetOwner,
            Request::GetFeatures,
            Request::SetProtocolFeatures(protocol),
            Request::SetFeatures(features),
            Request::SetMemTable(vec![(
                Row {
                    guest: None,
                    size: None,
                    user: None,
                    offset: None,
                },
                Fd::Guest,
            )]),
            Request::SetVringNum {
                queue,
                size: Number::Short(size),
            },
            Request::SetVringBase {
                queue,
                base: Number::Any(fresh_position(self.packed).into()),
            },
            Request::UsualVringAddr { queue, log: false },
            Request::SetVringCall {
                queue,
                fd: Some(call.unwrap_or(Fd::Event)),
            },
        ];
        empty(&self.guest, &layout(queue, size));
        if self.packed {
            self.write(layout(queue, size).desc, &vec![0; 16 * usize::from(size)]);
        }
        let steps = usize::from(steps % 16);
        for request in all.into_iter().rev().skip(steps.saturating_sub(8)).rev() {
            self.request(request);
        }
        let kick = Arc::new(sys::eventfd().expect("an eventfd"));
        let fd = kick.try_clone().expect("an fd");
        self.kicks[usize::from(queue % 4)] = Some(kick);
        let header: Vec<u8> = words(&[FrontendReq::SET_VRING_KICK as u32, 1, 8]);
        let header: [u8; HEADER_SIZE] = header.try_into().expect("three words");
        self.send(&header, &longs(&[queue.into()]), vec![fd.into()]);
        self.request(Request::SetVringEnable { queue, on: 1 });
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        self.guest.write_all_at(bytes, offset).expect("writing to a memfd");
    }

    fn kick(&self, queue: u8) {
        if let Some(kick) = &self.kicks[usize::from(queue % 4)] {
            sys::eventfd_signal(kick);
        }
    }

    fn run(&mut self, op: &Op) {
        match op {
            Op::Send(message) => self.send_message(message),
            Op::SendBoth(first, second) => {
                let (header, payload, fds) = self.message(first);
                let outcome = self.session().handle(&header, &payload, fds);
                if outcome.pending.is_some() {
                    let (header, payload, fds) = self.message(second);
                    let outcome = self.session().handle(&header, &payload, fds);
                    assert!(outcome.error.is_some(), "two requests at once");
                }
                self.reconnect();
            }
            Op::Raw { header, payload, fds } => {
                let fds = self.fds(fds);
                self.send(header, payload, fds);
            }
            Op::Start {
                queue,
                size,
                features,
                protocol,
                call,
                steps,
            } => self.start(*queue % 4, 4 << (size % 4), *features, *protocol, *call, *steps),
            Op::Requests(queue, requests) => {
                let (guest, size) = (&self.guest, self.size);
                if self.packed {
                    let place = &mut self.places[usize::from(queue % 4)];
                    driver::offer_packed(guest, GUEST, *queue, size, place, requests);
                } else {
                    driver::offer(guest, GUEST, *queue, size, requests);
                }
                self.kick(*queue);
                // What comes next mostly finds them done, sometimes under way.
                let stats = self.member.queue_stats(u16::from(queue % 4));
                let before = stats.requests.load(Ordering::Relaxed);
                for _ in 0..64 {
                    if stats.requests.load(Ordering::Relaxed) != before {
                        break;
                    }
                    std::thread::yield_now();
                }
            }
            Op::Scribble { queue, at, bytes } => {
                let offset = QUEUE * u64::from(queue % 4) + u64::from(*at) % QUEUE;
                self.write(offset, bytes);
            }
            Op::Inflight { queues, queue_size } => {
                self.request(Request::GetInflightFd {
                    size: Number::Small(0),
                    offset: Number::Small(0),
                    queues: queues % 4,
                    queue_size: 4 << (queue_size % 4),
                });
                self.give_inflight();
            }
            Op::GiveInflight => self.give_inflight(),
            Op::ScribbleInflight { at, bytes } => {
                if let Some(inflight) = &self.inflight {
                    let offset = u64::from(*at) % inflight.size.max(1);
                    // It can't grow.
                    let _ = inflight.file.write_at(bytes, offset);
                }
            }
            Op::TruncateInflight(len) => {
                if let Some(inflight) = &self.inflight {
                    // It is sealed, or it isn't: both are to be survived.
                    let _ = inflight.file.set_len((*len).into());
                }
            }
            Op::Log { pages } => {
                self.request(Request::SetLogBase {
                    size: Number::Short(u16::from(*pages) << 6),
                    offset: Number::Small(0),
                    fd: Fd::Memory(4),
                });
            }
            Op::Kick(queue) => self.kick(*queue),
            Op::Truncate(len) => self.guest.set_len(u64::from(*len) * 4).expect("the size of a memfd"),
            Op::ConfigChange => {
                if let Some(bytes) = self.session().config_change() {
                    assert_eq!(bytes.len(), HEADER_SIZE);
                }
            }
            Op::BackendReply { header, payload } => {
                let _ = self.session().backend_reply(header, payload);
            }
            Op::Resume(token) => {
                let outcome = self.session().resume(*token);
                assert!(outcome.reply.is_none() && outcome.pending.is_none() && outcome.error.is_none());
            }
            Op::Reconnect => self.reconnect(),
        }
    }
}

fn run(input: &Input) {
    let mut bed = Bed::new(input);
    for op in input.ops.iter().take(MOST_OPS) {
        bed.run(op);
    }
    bed.disconnect();
    assert!(!bed.member.attached());
    bed.member.close().expect("nobody is attached");
}

fuzz_target!(|input: Input| {
    run(&input);
    check_leaks();
});
