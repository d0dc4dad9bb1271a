// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How long a notification takes through the device, there and back to the thread that has sent it, against the least that two
//! wake-ups cost: a thread that blocks in a read and writes an eventfd.

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{json, Value};
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use crate::backend_vm::BackendVm;
use crate::pci_client::{PciClient, HEADER};
use crate::wire::{request, Connection};
use crate::{watch, Failure};

/// Index of queue 0's call doorbell and kick notification.
const SPECIAL: u16 = 2;
/// Bytes of the reply to a write of two bytes.
const WRITE_REPLY: usize = HEADER + 16;
/// Longest wait for the master's messages to come out of rxq.
const SETUP_TIMEOUT: Duration = Duration::from_secs(5);
/// A notification that takes longer has been lost.
const LOST: Duration = Duration::from_secs(5);
/// No carrier's measurements take longer.
const LIMIT: Duration = Duration::from_secs(100);

/// How the backend VM is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// QEMU's vhost-user device.
    VhostUser,
    /// A PCI function.
    VfioUser,
}

/// What to do.
pub struct Plan {
    /// The device's carrier.
    pub carrier: Carrier,
    /// Its socket.
    pub device: PathBuf,
    /// The socket for masters.
    pub front: PathBuf,
    /// How often both sides are timed.
    pub rounds: usize,
    /// Notifications of a sample.
    pub count: usize,
    /// Flags of the neighbours' eventfds: those of QEMU and KVM don't block, others' may.
    pub flags: libc::c_int,
    /// CPUs of the thread that measures, and of the floor's thread; None: any.
    pub cpus: Option<(usize, usize)>,
}

/// Has the calling thread run on one CPU.
fn pin(cpu: Option<usize>) -> io::Result<()> {
    let Some(cpu) = cpu else { return Ok(()) };
    // SAFETY: an all-zero cpu_set_t is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    if cpu >= libc::CPU_SETSIZE as usize {
        return Err(io::Error::other(format!("CPU {cpu}")));
    }
    // SAFETY: the number was compared with the set's size.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: set is live and of the size that is said.
    match unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Waits for an eventfd of either kind. The flag that makes one non-blocking belongs to both its ends.
fn wait_readable(fd: &EventFd) -> io::Result<()> {
    let mut poll = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd, ours alone.
    match unsafe { libc::poll(&raw mut poll, 1, LOST.as_millis() as libc::c_int) } {
        1 => Ok(()),
        0 => Err(io::Error::other("a notification is lost")),
        _ => Err(io::Error::last_os_error()),
    }
}

/// How a notification is sent.
enum Trigger {
    /// An eventfd is written.
    Eventfd(EventFd),
    /// A message is written to a socket; its reply, of this many bytes, is read when the notification has arrived.
    Message(UnixStream, Vec<u8>, usize),
}

/// A way for notifications that begins and ends here.
struct Way {
    trigger: Trigger,
    end: EventFd,
}

impl Way {
    /// Nanoseconds of each of `count` notifications, one at a time.
    fn time(&mut self, count: usize) -> io::Result<Vec<u32>> {
        let mut samples = Vec::with_capacity(count);
        let mut reply = [0; WRITE_REPLY];
        for _ in 0..count {
            let at = Instant::now();
            match &mut self.trigger {
                Trigger::Eventfd(fd) => fd.write(1)?,
                Trigger::Message(stream, message, _) => stream.write_all(message)?,
            }
            wait_readable(&self.end)?;
            let seen = self.end.read()?;
            if let Trigger::Message(stream, _, size @ 1..) = &mut self.trigger {
                stream.read_exact(&mut reply[..*size])?;
            }
            samples.push(u32::try_from(at.elapsed().as_nanos()).unwrap_or(u32::MAX));
            if seen != 1 {
                return Err(io::Error::other(format!("{seen} notifications where 1 was sent")));
            }
        }
        Ok(samples)
    }

    /// The least there can be between the same kind of beginning and an eventfd: one thread that blocks.
    fn floor(&self, far: Option<usize>) -> io::Result<Self> {
        let end = EventFd::new(EFD_NONBLOCK)?;
        let out = end.try_clone()?;
        let trigger = match &self.trigger {
            Trigger::Eventfd(_) => {
                let begin = EventFd::new(0)?;
                let from = begin.try_clone()?;
                std::thread::spawn(move || -> io::Result<()> {
                    pin(far)?;
                    loop {
                        from.read()?;
                        out.write(1)?;
                    }
                });
                Trigger::Eventfd(begin)
            }
            Trigger::Message(_, message, answer) => {
                let (begin, mut from) = UnixStream::pair()?;
                let (mut request, reply) = (vec![0; message.len()], vec![0; *answer]);
                std::thread::spawn(move || -> io::Result<()> {
                    pin(far)?;
                    loop {
                        from.read_exact(&mut request)?;
                        out.write(1)?;
                        if !reply.is_empty() {
                            from.write_all(&reply)?;
                        }
                    }
                });
                Trigger::Message(begin, message.clone(), *answer)
            }
        };
        Ok(Self { trigger, end })
    }
}

fn at(samples: &mut [u32], share: f64) -> u32 {
    samples.sort_unstable();
    let last = samples.len().saturating_sub(1);
    samples.get((last as f64 * share) as usize).copied().unwrap_or(0)
}

/// Both sides in turns, in an order that changes from round to round.
fn compare(name: &str, mut ours: Way, plan: &Plan) -> Result<Value, Failure> {
    let mut floor = ours.floor(plan.cpus.map(|(_, far)| far))?;
    let names = ["ours", "floor"];
    for way in [&mut ours, &mut floor] {
        way.time(plan.count.div_ceil(10))?;
    }
    let mut rounds = Vec::new();
    for round in 0..plan.rounds {
        let mut found = serde_json::Map::new();
        for which in [round % 2, 1 - round % 2] {
            let way = if which == 0 { &mut ours } else { &mut floor };
            let mut samples = way.time(plan.count)?;
            let value = json!({"median_ns": at(&mut samples, 0.5), "p99_ns": at(&mut samples, 0.99)});
            found.insert(names[which].into(), value);
        }
        rounds.push(Value::Object(found));
    }
    Ok(json!({"way": name, "rounds": rounds}))
}

/// The master of queue 0.
struct Master {
    /// To be kept.
    _connection: Connection,
    kick: EventFd,
    call: EventFd,
}

impl Master {
    /// Connects and hands over its eventfds; `receive` takes what arrives in rxq.
    fn start(plan: &Plan, mut receive: impl FnMut() -> io::Result<Option<Vec<u8>>>) -> io::Result<Self> {
        let mut connection = Connection::open_patiently(&plan.front)?;
        let (kick, call) = (EventFd::new(plan.flags)?, EventFd::new(plan.flags)?);
        let none = 0u64.to_le_bytes();
        connection.set(request::SET_VRING_CALL, &none, &[call.as_raw_fd()])?;
        connection.set(request::SET_VRING_KICK, &none, &[kick.as_raw_fd()])?;
        let end = Instant::now() + SETUP_TIMEOUT;
        let mut missing = vec![request::SET_VRING_KICK, request::SET_VRING_CALL];
        while let Some(next) = missing.last() {
            match receive()? {
                Some(message) if message.get(..4) == Some(&next.to_le_bytes()) => {
                    missing.pop();
                }
                Some(other) => return Err(io::Error::other(format!("rxq has {other:?}"))),
                None if Instant::now() > end => return Err(io::Error::other("nothing comes out of rxq")),
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        Ok(Self {
            _connection: connection,
            kick,
            call,
        })
    }

    fn kick(&self) -> io::Result<Trigger> {
        Ok(Trigger::Eventfd(self.kick.try_clone()?))
    }
}

fn index(fds: &[EventFd]) -> io::Result<EventFd> {
    fds.get(usize::from(SPECIAL))
        .ok_or_else(|| io::Error::other("no special index"))?
        .try_clone()
}

/// Times all ways of a carrier and prints one line of JSON.
///
/// # Errors
/// What goes wrong.
pub fn run(plan: &Plan) -> Result<(), Failure> {
    watch(LIMIT);
    pin(plan.cpus.map(|(near, _)| near))?;
    let mut ways = Vec::new();
    match plan.carrier {
        Carrier::VhostUser => {
            let mut vm = BackendVm::start(&plan.device, plan.flags)?;
            vm.up()?;
            let master = Master::start(plan, || vm.receive())?;
            let doorbell = Way {
                trigger: Trigger::Eventfd(index(&vm.kicks)?),
                end: master.call.try_clone()?,
            };
            ways.push(compare("doorbell", doorbell, plan)?);
            let kick = Way {
                trigger: master.kick()?,
                end: index(&vm.calls)?,
            };
            ways.push(compare("kick", kick, plan)?);
        }
        Carrier::VfioUser => {
            let mut vm = PciClient::start(&plan.device, plan.flags)?;
            let master = Master::start(plan, || vm.receive())?;
            for (name, answer) in [("doorbell", 0), ("doorbell, answered", WRITE_REPLY)] {
                let message = vm.doorbell(SPECIAL, answer != 0);
                let way = Way {
                    trigger: Trigger::Message(vm.stream().try_clone()?, message, answer),
                    end: master.call.try_clone()?,
                };
                ways.push(compare(name, way, plan)?);
            }
            let kick = Way {
                trigger: master.kick()?,
                end: vm.vectors[3].try_clone()?,
            };
            ways.push(compare("kick", kick, plan)?);
        }
    }
    println!("{}", json!({"ways": ways}));
    Ok(())
}
