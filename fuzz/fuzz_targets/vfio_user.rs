// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A vfio-user client that sends what it likes, to a PCI function whose rings run.
//!
//! Bytes and fds go through a socket into the stream decoder, and messages from there into the session of a real function, as
//! the server's connection does it. Some memory comes without an fd: then the client is asked for it, and answers well or
//! badly. Whatever comes, each command that is deferred ends, replies are whole and to what was asked, and nothing is left behind.

#![no_main]

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use vhu_core::error::Fault;
use vhu_core::function::{Function, COMMON_OFFSET, LEGACY_BAR, MODERN_BAR, MSIX_BAR, NOTIFY_OFFSET};
use vhu_core::member::{AdminQueues, Member, MemberOptions};
use vhu_core::memory::RemoteMemory;
use vhu_core::owner::forward::Forwarder;
use vhu_core::owner::{Compat, DeviceGroup, GroupOptions};
use vhu_core::vfio_user::dma::{DmaTable, Link};
use vhu_core::vfio_user::function::{PciFunction, CONFIG_REGION};
use vhu_core::vfio_user::session::{Context, Counters, Outcome, Session};
use vhu_core::vfio_user::stream::{Input as Stream, Received};
use vhu_core::vfio_user::wire::{self, command, Header, Kind, HEADER_SIZE};
use vhu_fuzz::driver::{self, empty, layout, longs, words, Blk, SIZE};
use vhu_fuzz::host::{blk, check_leaks, line, memfd, pool, send, Calls, Fd};
use vhu_fuzz::Number;

const MOST_OPS: usize = 64;
const GUEST: u64 = 0x10_0000;
const QUEUE_SIZE: u16 = 32;
const NO_REPLY: u32 = 1 << 4;
const USUAL: &str = r#"{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":1048576,"write_multiple":true}}"#;

#[derive(Arbitrary, Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    Owner,
    Legacy,
    Transitional,
    Modern,
}

/// A region, and a place in it that is one of its own as a rule.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Target {
    Config(u8),
    Extended(u16),
    Legacy(u8),
    Table(u8),
    Common(u8),
    Modern(u16),
    Any(u8, Number),
}

impl Target {
    fn get(self) -> (u32, u64) {
        match self {
            Self::Config(offset) => (CONFIG_REGION, offset.into()),
            Self::Extended(offset) => (CONFIG_REGION, u64::from(offset % 4096)),
            Self::Legacy(offset) => (LEGACY_BAR.into(), u64::from(offset % 96)),
            Self::Table(offset) => (MSIX_BAR.into(), u64::from(offset)),
            Self::Common(offset) => (MODERN_BAR.into(), u64::from(COMMON_OFFSET) + u64::from(offset % 64)),
            Self::Modern(offset) => (MODERN_BAR.into(), u64::from(offset % 0x4000)),
            Self::Any(region, offset) => (u32::from(region % 11), offset.get()),
        }
    }
}

/// A range of memory: pages of the guest's as a rule.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Range {
    All,
    Pages(u8, u8),
    Any(Number, Number),
}

impl Range {
    fn get(self) -> (u64, u64) {
        match self {
            Self::All => (GUEST, SIZE),
            Self::Pages(first, count) => (GUEST + u64::from(first % 16) * 4096, u64::from(count % 17) * 4096),
            Self::Any(iova, size) => (iova.get(), size.get()),
        }
    }
}

#[derive(Arbitrary, Clone, Debug)]
enum Body {
    Version {
        major: u8,
        text: Option<Vec<u8>>,
        data: Option<Number>,
        multiple: bool,
    },
    DmaMap {
        flags: u8,
        offset: Option<Number>,
        range: Range,
        fd: Option<Fd>,
    },
    DmaUnmap {
        flags: u8,
        range: Range,
    },
    UnmapAll,
    DeviceInfo,
    RegionInfo(u8),
    IoFds(u8),
    IrqInfo(u8),
    SetIrqs {
        flags: u8,
        index: u8,
        start: Number,
        count: u8,
        bools: Vec<u8>,
        fds: Vec<Fd>,
    },
    /// Eventfds for interrupts, as QEMU gives them.
    Assign {
        index: u8,
        fds: Vec<Fd>,
    },
    Read(Target, u8),
    Write(Target, Vec<u8>),
    /// Registers are 1, 2, 4 or 8 bytes wide.
    Register {
        target: Target,
        width: u8,
        value: u64,
    },
    Long {
        target: Target,
        len: u16,
    },
    Multi(Vec<(Target, u8, u64)>),
    Reset,
    Any {
        command: u8,
        body: Vec<u8>,
        fds: Vec<Fd>,
    },
}

#[derive(Arbitrary, Clone, Debug)]
enum Twist {
    Flags(u32),
    Size(u32),
    Shorter(u8),
    Longer(Vec<u8>),
    Byte { at: u8, value: u8 },
    Fds(Vec<Fd>),
}

#[derive(Arbitrary, Clone, Debug)]
struct Message {
    id: u8,
    body: Body,
    no_reply: bool,
    twist: Option<Twist>,
}

/// How the client answers what it is asked.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Answers {
    Right,
    Error(u8),
    Short,
    Wrong,
    Unasked,
}

#[derive(Arbitrary, Debug)]
enum Op {
    Send(Message),
    /// Several in one piece, cut into two at this place.
    Burst(Vec<Message>, u16),
    Bytes(Vec<u8>, Vec<Fd>),
    Decode(Vec<u8>),
    Answer(Answers),
    /// Deferred commands are waited for, or answered before they are done.
    Patience(bool),
    /// A driver, up to DRIVER_OK.
    Drive {
        legacy: bool,
        queue: u8,
        features: u64,
        memory: bool,
        interrupts: Option<Fd>,
    },
    Requests {
        queue: u8,
        requests: Vec<Blk>,
    },
    Scribble {
        at: u16,
        bytes: [u8; 8],
    },
    Truncate(u16),
    /// The guest's own memory, which is asked for without a ring.
    Fetch {
        range: Range,
        write: bool,
    },
    Table {
        ranges: Vec<(Range, bool)>,
        asked: Range,
    },
    Reconnect,
}

#[derive(Arbitrary, Debug)]
struct Input {
    shape: Shape,
    packed: bool,
    greeted: bool,
    ops: Vec<Op>,
}

fn bytes_of(id: u16, command: u16, flags: u32, size: Option<u32>, body: &[u8]) -> Vec<u8> {
    let mut bytes = id.to_ne_bytes().to_vec();
    bytes.extend(command.to_ne_bytes());
    bytes.extend(words(&[size.unwrap_or((HEADER_SIZE + body.len()) as u32), flags, 0]));
    bytes.extend(body);
    bytes
}

fn access(target: Target, data: &[u8], count: usize) -> Vec<u8> {
    let (region, offset) = target.get();
    [longs(&[offset]), words(&[region, count as u32]), data.to_vec()].concat()
}

impl Body {
    fn encode(&self) -> (u16, Vec<u8>, Vec<Fd>) {
        let plain = |command: u16, body: Vec<u8>| (command, body, vec![]);
        let about =
            |size: u32, index: u8| words(&[size, 0, u32::from(index % 10), 0, 0, 0, 0, 0])[..size as usize].to_vec();
        let irqs = |flags: u32, index: u8, start: u32, count: u32, bools: &[u8]| {
            let size = 20 + bools.len() as u32;
            [
                words(&[size, flags, u32::from(index % 6), start, count]),
                bools.to_vec(),
            ]
            .concat()
        };
        match self {
            Self::Version {
                major,
                text,
                data,
                multiple,
            } => {
                let json = || {
                    let data = data.map_or(1 << 20, Number::get);
                    format!(
                        r#"{{"capabilities":{{"max_msg_fds":8,"max_data_xfer_size":{data},"write_multiple":{multiple}}}}}"#
                    )
                };
                let mut body = vec![major / 200, 0, 0, 0];
                body.extend(text.clone().unwrap_or_else(|| json().into_bytes()));
                body.push(0);
                plain(command::VERSION, body)
            }
            Self::DmaMap {
                flags,
                offset,
                range,
                fd,
            } => {
                let (iova, size) = range.get();
                let usual = iova.wrapping_sub(GUEST) & 0xf_ffff;
                let offset = offset.map_or(usual, Number::get);
                let body = [words(&[32, u32::from(flags % 5)]), longs(&[offset, iova, size])].concat();
                (command::DMA_MAP, body, fd.iter().copied().collect())
            }
            Self::DmaUnmap { flags, range } => {
                let (iova, size) = range.get();
                let body = [words(&[24, u32::from(flags / 64)]), longs(&[iova, size])].concat();
                plain(command::DMA_UNMAP, body)
            }
            Self::UnmapAll => plain(command::DMA_UNMAP, [words(&[24, 2]), longs(&[0, 0])].concat()),
            Self::DeviceInfo => plain(command::DEVICE_GET_INFO, about(16, 0)),
            Self::RegionInfo(index) => plain(command::DEVICE_GET_REGION_INFO, about(32, *index)),
            Self::IoFds(index) => plain(command::DEVICE_GET_REGION_IO_FDS, about(16, *index)),
            Self::IrqInfo(index) => plain(command::DEVICE_GET_IRQ_INFO, about(16, *index)),
            Self::SetIrqs {
                flags,
                index,
                start,
                count,
                bools,
                fds,
            } => {
                let count = if bools.is_empty() {
                    u32::from(*count)
                } else {
                    bools.len() as u32
                };
                let body = irqs((*flags).into(), *index, start.get() as u32, count, bools);
                (command::DEVICE_SET_IRQS, body, fds.clone())
            }
            Self::Assign { index, fds } => {
                let fds: Vec<Fd> = fds.iter().copied().take(16).collect();
                let body = irqs(4 | 4 << 3, *index, 0, fds.len() as u32, &[]);
                (command::DEVICE_SET_IRQS, body, fds)
            }
            Self::Read(target, count) => plain(command::REGION_READ, access(*target, &[], (*count).into())),
            Self::Write(target, data) => plain(command::REGION_WRITE, access(*target, data, data.len())),
            Self::Register { target, width, value } => {
                let width = 1 << (width % 4);
                let data = &value.to_le_bytes()[..width];
                plain(command::REGION_WRITE, access(*target, data, width))
            }
            Self::Long { target, len } => {
                let data = vec![0x5a; usize::from(*len)];
                plain(command::REGION_WRITE, access(*target, &data, data.len()))
            }
            Self::Multi(writes) => {
                let mut body = longs(&[writes.len() as u64]);
                for (target, width, value) in writes {
                    let count = usize::from(width % 9);
                    body.extend(access(*target, &value.to_le_bytes(), count));
                }
                plain(command::REGION_WRITE_MULTI, body)
            }
            Self::Reset => plain(command::DEVICE_RESET, vec![]),
            Self::Any { command, body, fds } => (u16::from(*command), body.clone(), fds.clone()),
        }
    }
}

impl Message {
    fn encode(&self) -> (Vec<u8>, Vec<Fd>) {
        let (command, mut body, mut fds) = self.body.encode();
        let mut flags = if self.no_reply { NO_REPLY } else { 0 };
        let mut size = None;
        match &self.twist {
            None => {}
            Some(Twist::Flags(bits)) => flags = *bits,
            Some(Twist::Size(bytes)) => size = Some(*bytes),
            Some(Twist::Shorter(by)) => body.truncate(body.len().saturating_sub((*by).into())),
            Some(Twist::Longer(more)) => body.extend(more),
            Some(Twist::Byte { at, value }) => {
                if let Some(byte) = body.get_mut(usize::from(*at)) {
                    *byte = *value;
                }
            }
            Some(Twist::Fds(others)) => fds.clone_from(others),
        }
        (bytes_of(self.id.into(), command, flags, size, &body), fds)
    }
}

/// Both ends of a connection.
struct Line {
    client: UnixStream,
    server: UnixStream,
    stream: Stream,
    session: Session,
    link: Arc<Link>,
    remote: Arc<dyn RemoteMemory>,
    woken: Calls,
}

struct Bed {
    function: Arc<Function>,
    members: Vec<Arc<Member>>,
    guest: File,
    answers: Answers,
    patient: bool,
    line: Option<Line>,
    _group: Arc<DeviceGroup>,
}

impl Bed {
    fn new(input: &Input) -> Self {
        let options = GroupOptions {
            compat: Compat::new(false),
            feature_management: true,
            notify_region: true,
            admin_queues: 1,
        };
        let group = DeviceGroup::new(Arc::clone(pool()), options).expect("a group");
        let member = |id: u32, admin: Option<AdminQueues>| {
            let options = MemberOptions {
                legacy: id != 0,
                packed: input.packed,
                vectors: 5,
                admin,
                ..MemberOptions::default()
            };
            Member::new(Arc::clone(pool()), id, blk("ram:65536", 2, QUEUE_SIZE, false), options)
        };
        let one = member(1, None);
        group.add(Arc::clone(&one)).expect("a free id");
        let ports = Arc::new(Forwarder::new(Arc::clone(&group), Arc::clone(&one)).expect("a queue"));
        let mut members = vec![Arc::clone(&one)];
        let function = match input.shape {
            Shape::Owner => {
                let device = group.function_device();
                let owner = member(0, Some(AdminQueues { device, count: 1 }));
                members.push(Arc::clone(&owner));
                Function::owner(owner, Arc::clone(&group) as _)
            }
            Shape::Legacy => Function::legacy(one, ports),
            Shape::Transitional => Function::transitional(one, ports),
            Shape::Modern => Function::modern(one),
        };
        let mut bed = Self {
            function: function.expect("a function"),
            members,
            guest: memfd(SIZE),
            answers: Answers::Right,
            patient: true,
            line: None,
            _group: group,
        };
        bed.connect(input.greeted);
        bed
    }

    fn connect(&mut self, greeted: bool) {
        self.function.attach(line().clone()).expect("nobody is attached");
        let (client, server) = UnixStream::pair().expect("sockets");
        client.set_nonblocking(true).expect("a flag");
        server.set_nonblocking(true).expect("a flag");
        let link = Arc::new(Link::new(line().clone()));
        self.line = Some(Line {
            client,
            server,
            stream: Stream::default(),
            session: Session::new(Arc::clone(&self.function) as _, Arc::new(Counters::default())),
            remote: Arc::clone(&link) as _,
            link,
            woken: Calls::default(),
        });
        if greeted {
            self.say(command::VERSION, &[&[0; 4], USUAL.as_bytes(), &[0]].concat(), None);
        }
    }

    fn disconnect(&mut self) {
        let Some(mut line) = self.line.take() else { return };
        line.link.close();
        line.session.abandon();
        let done = Calls::default();
        self.function.detach(done.completion());
        done.wait(0, "a detach", || {});
    }

    fn reconnect(&mut self) {
        self.disconnect();
        self.connect(true);
    }

    /// Sends bytes with fds, and lets the server look.
    fn send(&mut self, bytes: &[u8], fds: &[Fd]) {
        let made: Vec<OwnedFd> = fds.iter().take(20).map(|fd| fd.make(&self.guest)).collect();
        let numbers: Vec<i32> = made.iter().map(AsRawFd::as_raw_fd).collect();
        let mut rest = bytes;
        let mut numbers = numbers.as_slice();
        while !rest.is_empty() {
            let Some(line) = &self.line else { return };
            let sent = send(line.client.as_raw_fd(), rest, numbers);
            if sent == 0 {
                break;
            }
            (rest, numbers) = (&rest[sent..], &[]);
            if let Err(fault) = self.serve() {
                assert!(!fault.rule.is_empty());
                return self.reconnect();
            }
        }
    }

    fn say(&mut self, command: u16, body: &[u8], fd: Option<Fd>) {
        let fds: Vec<Fd> = fd.into_iter().collect();
        self.send(&bytes_of(7, command, 0, None, body), &fds);
    }

    /// As the server's connection does: takes all that is there.
    fn serve(&mut self) -> Result<(), Fault> {
        loop {
            while self.take()? {}
            self.answer_all()?;
            let line = self.line.as_mut().expect("a connection");
            match line.stream.receive(line.server.as_raw_fd())? {
                Received::Some { .. } => {}
                Received::Nothing => return Ok(()),
                other => panic!("{other:?} while both ends are open and nothing is held up"),
            }
        }
    }

    fn take(&mut self) -> Result<bool, Fault> {
        let Self {
            line,
            guest,
            answers,
            patient,
            function,
            ..
        } = self;
        let line = line.as_mut().expect("a connection");
        if line.stream.message().is_none() {
            return Ok(false);
        }
        let fds = line.stream.take_fds();
        let Some((header, body, seen)) = line.stream.message() else {
            return Ok(false);
        };
        let size = header.size as usize;
        match header.kind() {
            Kind::Command => {
                let woken = line.woken.clone();
                let wake = || woken.waker();
                let context = Context {
                    mappings: pool().mappings(),
                    remote: &line.remote,
                    wake: &wake,
                };
                let mut before = woken.count();
                let mut outcome = line.session.handle(&header, body, fds, &context);
                if header.command == command::VERSION {
                    if let Some(agreed) = line.session.agreed() {
                        line.link.open(agreed.max_data);
                    }
                }
                if header.command == command::DEVICE_SET_IRQS {
                    drop(line.session.take_unmask());
                }
                let mut fault = None;
                while outcome == Outcome::Deferred {
                    assert!(line.session.is_deferred());
                    if *patient {
                        // It may wait for memory that the client is asked for.
                        let mut rounds = 0;
                        woken.wait(before, "a deferred command", || {
                            let more = answer(&line.link, &line.client, guest, *answers);
                            let heard = more.and_then(|()| listen(&mut line.stream, &line.server, &line.link));
                            if let Err(other) = heard.and_then(|()| patience(&mut rounds)) {
                                fault.get_or_insert(other);
                                line.link.close();
                            }
                        });
                        before = woken.count();
                        outcome = line.session.resume(&context);
                    } else {
                        outcome = line.session.expire(&context);
                    }
                }
                assert!(!line.session.is_deferred());
                check_reply(&outcome, &header, line.session.reply());
                if let Some(fault) = fault {
                    return Err(fault);
                }
                if let Outcome::Last(fault) = outcome {
                    return Err(fault);
                }
                let mut signals = Vec::new();
                function.take_signals(&mut signals);
            }
            Kind::Reply if seen => {}
            Kind::Reply if fds.is_empty() => line.link.answer(&header, body)?,
            Kind::Reply => return Err(Fault::new("message.fds", "fds with a reply")),
            Kind::Unknown => return Err(Fault::new("message.type", "neither a command nor a reply")),
        }
        line.stream.consume(size);
        Ok(true)
    }

    fn answer_all(&mut self) -> Result<(), Fault> {
        let line = self.line.as_ref().expect("a connection");
        answer(&line.link, &line.client, &self.guest, self.answers)
    }

    fn register(&mut self, region: u8, offset: u64, data: &[u8]) {
        let body = [
            longs(&[offset]),
            words(&[region.into(), data.len() as u32]),
            data.to_vec(),
        ]
        .concat();
        self.say(command::REGION_WRITE, &body, None);
    }

    fn drive(&mut self, legacy: bool, queue: u8, features: u64, memory: bool, interrupts: Option<Fd>) {
        let ring = layout(queue, QUEUE_SIZE);
        empty(&self.guest, &ring);
        let body = [words(&[32, 3]), longs(&[0, GUEST, SIZE])].concat();
        self.say(command::DMA_MAP, &body, memory.then_some(Fd::Guest));
        if let Some(fd) = interrupts {
            let body = words(&[20, 4 | 4 << 3, 2, 0, 1]);
            self.say(command::DEVICE_SET_IRQS, &body, Some(fd));
        }
        let command = [longs(&[4]), words(&[CONFIG_REGION, 2]), vec![7, 0]].concat();
        self.say(command::REGION_WRITE, &command, None);
        let queue = u16::from(queue % 2).to_le_bytes();
        let [desc, driver, device] = [ring.desc, ring.driver, ring.device].map(|offset| GUEST + offset);
        if legacy {
            let bar = LEGACY_BAR;
            self.register(bar, 18, &[3]);
            self.register(bar, 4, &(features as u32).to_le_bytes());
            self.register(bar, 14, &queue);
            self.register(bar, 8, &((desc >> 12) as u32).to_le_bytes());
            self.register(bar, 18, &[7]);
        } else {
            let bar = MODERN_BAR;
            let features = features & self.members[0].offered_features() | 1 << 32;
            self.register(bar, 20, &[3]);
            for half in 0..2u32 {
                self.register(bar, 8, &half.to_le_bytes());
                self.register(bar, 12, &((features >> (32 * half)) as u32).to_le_bytes());
            }
            self.register(bar, 20, &[11]);
            self.register(bar, 22, &queue);
            self.register(bar, 24, &QUEUE_SIZE.to_le_bytes());
            self.register(bar, 32, &desc.to_le_bytes());
            self.register(bar, 40, &driver.to_le_bytes());
            self.register(bar, 48, &device.to_le_bytes());
            self.register(bar, 28, &[1, 0]);
            self.register(bar, 20, &[15]);
        }
    }

    fn run(&mut self, op: &Op) {
        match op {
            Op::Send(message) => {
                let (bytes, fds) = message.encode();
                self.send(&bytes, &fds);
            }
            Op::Burst(messages, cut) => {
                let bytes: Vec<u8> = messages
                    .iter()
                    .take(32)
                    .flat_map(|message| message.encode().0)
                    .collect();
                let (first, second) = bytes.split_at(usize::from(*cut).min(bytes.len()));
                self.send(first, &[]);
                self.send(second, &[]);
            }
            Op::Bytes(bytes, fds) => self.send(bytes, fds),
            Op::Decode(bytes) => decode(bytes),
            Op::Answer(answers) => self.answers = *answers,
            Op::Patience(patient) => self.patient = *patient,
            Op::Drive {
                legacy,
                queue,
                features,
                memory,
                interrupts,
            } => self.drive(*legacy, *queue, *features, *memory, *interrupts),
            Op::Requests { queue, requests } => {
                driver::offer(&self.guest, GUEST, *queue, QUEUE_SIZE, requests);
                let queue = u16::from(queue % 2);
                self.register(
                    MODERN_BAR,
                    u64::from(NOTIFY_OFFSET) + 4 * u64::from(queue),
                    &queue.to_le_bytes(),
                );
                self.register(LEGACY_BAR, 16, &queue.to_le_bytes());
            }
            Op::Scribble { at, bytes } => {
                let offset = u64::from(*at) % (SIZE - 8);
                self.guest.write_all_at(bytes, offset).expect("writing to a memfd");
            }
            Op::Truncate(len) => self.guest.set_len(u64::from(*len)).expect("the size of a memfd"),
            Op::Fetch { range, write } => self.fetch(*range, *write),
            Op::Table { ranges, asked } => table(ranges, *asked),
            Op::Reconnect => self.reconnect(),
        }
    }

    /// Asks the client for memory on another thread, as a queue does.
    fn fetch(&mut self, range: Range, write: bool) {
        let (iova, size) = range.get();
        let remote = Arc::clone(&self.line.as_ref().expect("a connection").remote);
        let done = Calls::default();
        let completion = done.completion();
        let thread = std::thread::spawn(move || {
            let mut data = vec![0; (size % 0x4_0000) as usize];
            let _ = if write {
                remote.write(iova, &data)
            } else {
                remote.read(iova, &mut data)
            };
            drop(completion);
        });
        let mut fault = false;
        let mut rounds = 0;
        done.wait(0, "a transfer", || {
            if !fault && self.serve().and_then(|()| patience(&mut rounds)).is_err() {
                self.line.as_ref().expect("a connection").link.close();
                fault = true;
            }
        });
        thread.join().expect("a transfer");
        if fault {
            self.reconnect();
        }
    }
}

/// Behind a message that is torn no answer is heard; then the client leaves, long before it would be given up.
fn patience(rounds: &mut u32) -> Result<(), Fault> {
    *rounds += 1;
    if *rounds < 200 {
        Ok(())
    } else {
        Err(Fault::new("connection", "the client has left"))
    }
}

/// Takes what we ask for, and sends answers.
fn answer(link: &Link, client: &UnixStream, guest: &File, answers: Answers) -> Result<(), Fault> {
    let mut message = Vec::new();
    while link.next_message(&mut message) {
        let header = Header::parse(&message).expect("a header");
        assert_eq!(header.size as usize, message.len());
        assert_eq!(header.kind(), Kind::Command);
        let body = &message[HEADER_SIZE..];
        let word = |at: usize| u64::from_ne_bytes(body[at..at + 8].try_into().expect("eight bytes"));
        let (iova, count) = (word(0), word(8));
        assert!(count as usize <= vhu_core::vfio_user::dma::CHUNK);
        let at = iova.wrapping_sub(GUEST);
        let mut reply = body[..16].to_vec();
        let (mut command, mut id, mut flags) = (header.command, header.id, 1);
        if header.command == command::DMA_READ {
            let mut data = vec![0; count as usize];
            if at < SIZE {
                let _ = guest.read_at(&mut data, at);
            }
            reply.extend(data);
        } else {
            assert_eq!(header.command, command::DMA_WRITE);
            let data = &body[16..];
            assert_eq!(data.len() as u64, count);
            if at < SIZE && count <= SIZE - at {
                guest.write_all_at(data, at).expect("writing to a memfd");
            }
        }
        match answers {
            Answers::Right => {}
            Answers::Error(_) => {
                flags |= 1 << 5;
                reply.clear();
            }
            Answers::Short => reply.truncate(reply.len() - 1),
            Answers::Wrong => command = command::REGION_READ,
            Answers::Unasked => id = id.wrapping_add(1),
        }
        let mut bytes = bytes_of(id, command, flags, None, &reply);
        if let Answers::Error(errno) = answers {
            bytes[12..16].copy_from_slice(&u32::from(errno).to_ne_bytes());
        }
        // Answers of more than the socket holds don't come by it.
        if send(client.as_raw_fd(), &bytes, &[]) != bytes.len() {
            return Err(Fault::new("connection", "the socket is full"));
        }
    }
    let mut client = client;
    let mut said = [0; 64];
    let _ = client.read(&mut said);
    Ok(())
}

/// Looks for answers while a command is in the middle.
fn listen(stream: &mut Stream, server: &UnixStream, link: &Link) -> Result<(), Fault> {
    if link.is_waiting() && stream.has_room() {
        stream.receive(server.as_raw_fd())?;
        stream.scan(|header, body| match header.kind() {
            Kind::Reply => link.answer(header, body),
            _ => Ok(()),
        })?;
    }
    Ok(())
}

fn check_reply(outcome: &Outcome, asked: &Header, reply: &[u8]) {
    match outcome {
        Outcome::Silent => assert!(asked.no_reply()),
        Outcome::Reply => assert!(!asked.no_reply(), "a reply that nobody asked for"),
        Outcome::Last(_) if reply.is_empty() => return,
        Outcome::Last(_) => {}
        Outcome::Deferred => unreachable!("it was waited for"),
    }
    if *outcome != Outcome::Silent {
        let header = Header::parse(reply).expect("a header");
        assert_eq!((header.id, header.command), (asked.id, asked.command));
        assert_eq!(header.kind(), Kind::Reply);
        assert_eq!(header.size as usize, reply.len());
        assert!(reply.len() <= wire::MAX_MESSAGE);
        assert!(!header.is_error() || reply.len() == HEADER_SIZE);
    }
}

/// The decoders by themselves.
fn decode(bytes: &[u8]) {
    let _ = Header::parse(bytes);
    if let Ok(version) = wire::Version::parse(bytes) {
        let _ = version.answer(&mut Vec::new());
    }
    let _ = wire::DmaMap::parse(bytes);
    let _ = wire::DmaUnmap::parse(bytes);
    let _ = wire::argsz(bytes, 16);
    let _ = wire::index(bytes);
    let _ = wire::io_fds_flags(bytes);
    if let Some(set) = wire::IrqSet::parse(bytes) {
        assert!(set.bools.is_empty() || set.bools.len() == set.count as usize);
    }
    if let Some((access, rest)) = wire::RegionAccess::parse(bytes) {
        let mut again = Vec::new();
        access.encode(&mut again);
        assert_eq!([&again, rest].concat(), bytes);
    }
    if let Some(entries) = wire::multi_entries(bytes) {
        for index in 0..entries.len() / wire::MULTI_ENTRY {
            let (access, data) = wire::multi_entry(entries, index).expect("as many as there is room for");
            assert!(data.len() <= 8 && data.len() <= access.count as usize);
        }
    }
    if let Some((_, _, data)) = wire::dma_read_reply(bytes) {
        assert!(data.len() <= bytes.len());
    }
}

/// The table of ranges against a list of them.
fn table(ranges: &[(Range, bool)], asked: Range) {
    let mut table = DmaTable::default();
    let mut list: Vec<(u64, u64)> = Vec::new();
    for (range, remote) in ranges.iter().take(64) {
        let (iova, size) = range.get();
        let fits = size > 0
            && iova
                .checked_add(size)
                .is_some_and(|end| list.iter().all(|(start, len)| end <= *start || iova >= start + len));
        match table.check(iova, size, *remote) {
            Ok(()) => {
                assert!(fits, "{iova:#x} {size:#x} was taken");
                table.insert(iova, size, *remote);
                list.push((iova, size));
            }
            Err(errno) => assert!(!fits || (*remote && errno == libc::ENOMEM)),
        }
    }
    list.sort_unstable();
    assert_eq!(table.all(), list);
    let (iova, size) = asked.get();
    let Some(end) = iova.checked_add(size).filter(|_| size > 0) else {
        assert_eq!(table.inside(iova, size), Err(libc::EINVAL));
        return;
    };
    let touched: Vec<(u64, u64)> = list
        .into_iter()
        .filter(|(start, len)| *start < end && start + len > iova)
        .collect();
    let expected = if touched.is_empty() {
        Err(libc::ENOENT)
    } else if touched.iter().any(|(start, len)| *start < iova || start + len > end) {
        Err(libc::EINVAL)
    } else {
        Ok(touched)
    };
    let mut found = table.inside(iova, size);
    if let Ok(found) = &mut found {
        found.sort_unstable();
    }
    assert_eq!(found, expected);
    table.all().into_iter().for_each(|(iova, _)| table.remove(iova));
    assert!(table.all().is_empty());
}

fn run(input: &Input) {
    let mut bed = Bed::new(input);
    for op in input.ops.iter().take(MOST_OPS) {
        bed.run(op);
    }
    bed.disconnect();
    for member in &bed.members {
        member.close().expect("nobody is attached");
    }
}

fuzz_target!(|input: Input| {
    run(&input);
    check_leaks();
});
