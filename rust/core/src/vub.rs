// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Any member behind the stock `VhostUserDaemon` of the crate vhost-user-backend (design D2).
//!
//! The daemon keeps the protocol, the memory and the vrings; on a kick we take a ring's addresses and positions from its
//! vring state, run our engine and our device over it, and give the positions back. That makes it a second opinion on
//! everything around the engine (a differential test does just that), and a row in the benchmark.
//!
//! What differs is the crate's: two threads and eleven fds a member, at most 64 queues, no STATUS, no CONFIG_CHANGE, no
//! protection against a memory file that is truncated, and requests of one kick are waited for together.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vhost::vhost_user::{Listener, VhostUserProtocolFeatures};
use vhost_user_backend::{ShutdownHandle, VhostUserBackend, VhostUserDaemon, VringRwLock, VringState, VringT};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{new_event_consumer_and_notifier, EventConsumer, EventFlag, EventNotifier};

use crate::error::{Error, Fault, Result};
use crate::member::{feature, Member};
use crate::memory::{MemoryMap, Region};
use crate::ring::split::{self, AddressSpace, RingAddresses};
use crate::ring::MAX_QUEUE_SIZE;
use crate::runner::{Call, QueueSetup, Runner};
use crate::session::MAX_CONFIG;
use crate::sys;
use crate::uring::Uring;

/// Queues the crate can serve: its masks have 64 bits.
pub const MAX_QUEUES: u16 = 64;

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
type Vring = VringRwLock<Memory>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a cached runner was made from; a difference means the ring was set up anew.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Origin {
    addresses: RingAddresses,
    size: u16,
    features: u64,
    map: usize,
}

struct State {
    /// The connection has read the configuration.
    config_read: bool,
    /// Made by the crate's worker when it first serves a ring: an io_uring belongs to one thread.
    uring: Option<Uring>,
    map: Arc<MemoryMap>,
    features: u64,
    runners: Vec<Option<(Origin, Runner)>>,
    /// Exit events that vhost-user-backend 0.23 leaves open.
    exit_fds: Vec<RawFd>,
    done: Vec<(u64, i32)>,
}

/// A member as the crate sees it.
pub struct Adapter {
    member: Arc<Member>,
    /// The connection is over: a driver that goes on offering requests must not keep the crate's worker.
    ended: AtomicBool,
    state: Mutex<State>,
}

impl Adapter {
    /// # Errors
    /// [`Error::Invalid`] for a member with more than [`MAX_QUEUES`] queues.
    pub fn new(member: Arc<Member>) -> Result<Arc<Self>> {
        let queues = member.device().queues();
        if queues > MAX_QUEUES {
            return Err(Error::Invalid(format!(
                "queues = {queues}; the engine rust-vmm serves at most {MAX_QUEUES}"
            )));
        }
        let state = State {
            config_read: false,
            uring: None,
            map: Arc::default(),
            features: 0,
            runners: (0..queues).map(|_| None).collect(),
            exit_fds: Vec::new(),
            done: Vec::new(),
        };
        Ok(Arc::new(Self {
            member,
            ended: AtomicBool::new(false),
            state: Mutex::new(state),
        }))
    }

    /// Serves a ring until it is empty.
    fn serve(&self, index: u16, vring: &mut VringState<Memory>) -> std::result::Result<(), Fault> {
        let mut state = lock(&self.state);
        let State {
            config_read: _,
            uring,
            map,
            features,
            runners,
            exit_fds: _,
            done,
        } = &mut *state;
        let broken_ring = |e: io::Error| Fault::new("internal.io-uring", e.to_string());
        let uring = match uring {
            Some(uring) => uring,
            None => uring.insert(Uring::new(256).map_err(broken_ring)?),
        };
        let slot = runners
            .get_mut(usize::from(index))
            .ok_or_else(|| Fault::new("vring.index", format!("queue {index}")))?;
        let queue = vring.get_queue();
        let addresses = RingAddresses {
            desc: queue.desc_table(),
            driver: queue.avail_ring(),
            device: queue.used_ring(),
        };
        let (size, next_avail) = (queue.size(), queue.next_avail());
        let origin = Origin {
            addresses,
            size,
            features: *features,
            map: Arc::as_ptr(map) as usize,
        };
        // Made anew when anything about the ring has changed since the last kick.
        let current = slot.take_if(|(old, runner)| *old == origin && runner.next_avail() == next_avail);
        let (_, runner) = slot.insert(match current {
            Some(current) => current,
            None => {
                // There is no record of what is in flight, so the used index has to say what is done. The front end's word may
                // be older: where the back end outlives the connection (virtio-vhost-user) it has gone on meanwhile.
                let packed = *features & feature::RING_PACKED != 0;
                let position = if packed {
                    next_avail
                } else {
                    split::used_idx(map, AddressSpace::Guest, addresses, size, MAX_QUEUE_SIZE)?
                };
                let setup = QueueSetup {
                    index,
                    size,
                    addresses,
                    space: AddressSpace::Guest,
                    position: u32::from(position),
                    driver_features: *features,
                    inflight: None,
                    ordered: true,
                    log: None,
                    call: Call::default(),
                    stats: self.member.queue_stats(index),
                };
                (
                    origin,
                    Runner::new(Arc::clone(self.member.device()), Arc::clone(map), setup)?,
                )
            }
        });
        runner.stats().kicked();
        loop {
            runner.disable_notification();
            let taken = runner.take(uring);
            while runner.in_flight() > 0 {
                if let Err(e) = uring.wait() {
                    // The kernel may still write to the requests' buffers: they are left to it, with all they need.
                    std::mem::forget(slot.take());
                    return Err(broken_ring(e));
                }
                uring.reap(done);
                for (user_data, result) in done.drain(..) {
                    runner.complete(user_data, result, uring);
                }
            }
            let signal = runner.publish_quietly();
            let queue = vring.get_queue_mut();
            queue.set_next_avail(runner.next_avail());
            queue.set_next_used(runner.used_idx());
            if signal {
                // Nobody to tell when the front end is gone.
                let _ = vring.signal_used_queue();
            }
            let taken = taken.map_err(|fault| fault.on_queue(index))?;
            if (!runner.enable_notification() && taken == 0) || self.ended.load(Ordering::Relaxed) {
                return Ok(());
            }
        }
    }
}

impl Drop for Adapter {
    fn drop(&mut self) {
        // The daemon is gone, and with it everybody who knew these.
        for fd in lock(&self.state).exit_fds.drain(..) {
            drop(sys::PeerFd::adopt(fd));
        }
    }
}

impl VhostUserBackend for Adapter {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        usize::from(self.member.device().queues())
    }

    fn max_queue_size(&self) -> usize {
        usize::from(MAX_QUEUE_SIZE)
    }

    fn features(&self) -> u64 {
        self.member.offered_features() | feature::PROTOCOL_FEATURES
    }

    fn acked_features(&self, features: u64) {
        match self.member.set_features(features, feature::PROTOCOL_FEATURES) {
            Ok(_) => lock(&self.state).features = features,
            Err(fault) => self.member.owner().break_it(fault),
        }
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn reset_device(&self) {
        // No ring of the member's own runs, so there is nothing to wait for.
        let _ = self.member.reset();
        lock(&self.state).runners.fill_with(|| None);
    }

    fn set_event_idx(&self, _enabled: bool) {
        // Follows from the features.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        if offset.checked_add(size).is_none_or(|end| end > MAX_CONFIG) {
            return Vec::new();
        }
        if !std::mem::replace(&mut lock(&self.state).config_read, true) && !self.member.features_written() {
            self.member.device().fresh();
        }
        let mut data = vec![0; size as usize];
        self.member.device().read_config(offset as usize, &mut data);
        data
    }

    fn set_config(&self, offset: u32, data: &[u8]) -> io::Result<()> {
        lock(&self.state).config_read = true;
        match self.member.device().write_config(offset as usize, data) {
            Ok(_) => Ok(()),
            Err(fault) => Err(io::Error::new(io::ErrorKind::InvalidInput, fault)),
        }
    }

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        let snapshot = memory.memory();
        let mut map = MemoryMap::default();
        for region in snapshot.iter() {
            let Some(host) = NonNull::new(region.as_ptr()) else {
                continue;
            };
            let keep = Arc::new(snapshot.clone());
            // SAFETY: the region is mapped as a whole by the crate, and the snapshot that owns it is kept.
            let region = unsafe { Region::foreign(region.start_addr().0, region.len(), host, keep) };
            map = map
                .with(region)
                .map_err(|fault| io::Error::new(io::ErrorKind::InvalidInput, fault))?;
        }
        lock(&self.state).map = Arc::new(map);
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        // One thread for all queues; the default mask would leave queues 32 and up unserved.
        let queues = u32::from(self.member.device().queues());
        vec![u64::MAX >> (u64::BITS - queues)]
    }

    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        // Without one, dropping the daemon would wait for its worker for ever.
        let (consumer, notifier) = new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()?;
        // The crate takes the raw fd out of the consumer and never closes it; see `Adapter::drop`.
        lock(&self.state).exit_fds.push(consumer.as_raw_fd());
        Some((consumer, notifier))
    }

    fn handle_event(&self, event: u16, _set: EventSet, vrings: &[Vring], _thread: usize) -> io::Result<()> {
        // An error would end the crate's worker without a word, so faults go to the member instead.
        let Some(vring) = vrings.get(usize::from(event)) else {
            return Ok(());
        };
        if self.member.owner().is_broken() {
            return Ok(());
        }
        if let Err(fault) = self.serve(event, &mut vring.get_mut()) {
            self.member.owner().break_it(fault);
        }
        Ok(())
    }
}

#[derive(Default)]
struct Control {
    closing: bool,
    running: bool,
    connection: Option<ShutdownHandle>,
}

/// Serves a member on a socket with the crate's daemon, one front end after the other.
pub struct Daemon {
    member: Arc<Member>,
    path: PathBuf,
    wake: OwnedFd,
    control: Mutex<Control>,
    ended: Condvar,
}

impl Daemon {
    /// # Errors
    /// [`Error::Invalid`] for a member the crate can't serve, [`Error::Os`] without an eventfd.
    pub fn new(member: Arc<Member>, path: &Path) -> Result<Self> {
        Adapter::new(Arc::clone(&member))?;
        let wake = sys::eventfd().map_err(|source| Error::Os {
            what: "eventfd",
            source,
        })?;
        Ok(Self {
            member,
            path: path.to_owned(),
            wake,
            control: Mutex::default(),
            ended: Condvar::new(),
        })
    }

    /// Binds the socket and serves front ends until [`Daemon::close`]. Blocks.
    ///
    /// # Errors
    /// [`Error::Os`] when the socket can't be bound.
    pub fn run(&self) -> Result<()> {
        {
            let mut control = lock(&self.control);
            if control.closing {
                return Ok(());
            }
            control.running = true;
        }
        let result = self.serve_all();
        lock(&self.control).running = false;
        self.ended.notify_all();
        result
    }

    fn serve_all(&self) -> Result<()> {
        let os = |what| move |source| Error::Os { what, source };
        let listener = UnixListener::bind(&self.path).map_err(os("binding the vhost-user socket"))?;
        let result = (|| {
            let mut listener = Listener::from(listener.try_clone().map_err(os("dup"))?);
            loop {
                // The crate's accept can't be interrupted, so it is called only when somebody waits.
                sys::wait_readable(&[listener.as_raw_fd(), self.wake.as_raw_fd()]);
                if lock(&self.control).closing {
                    return Ok(());
                }
                if let Err(error) = self.serve_one(&mut listener) {
                    log::warn!("member {}: {error}", self.member.id());
                    // The front end still waits, if it was not accepted; so as not to spin on whatever is wrong.
                    std::thread::sleep(Duration::from_millis(200));
                }
            }
        })();
        // Whatever happened, the socket goes with us.
        let _ = std::fs::remove_file(&self.path);
        result
    }

    fn serve_one(&self, listener: &mut Listener) -> Result<()> {
        let broken = |error: vhost_user_backend::Error| Fault::new("rust-vmm", format!("{error}"));
        // A daemon takes one connection in its life.
        let adapter = Adapter::new(Arc::clone(&self.member))?;
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let name = format!("vub-{}", self.member.id());
        let mut daemon = VhostUserDaemon::new(name, Arc::clone(&adapter), memory).map_err(broken)?;
        self.member.attach()?;
        let served = daemon.start(listener).and_then(|()| {
            lock(&self.control).connection = daemon.shutdown_handle();
            if lock(&self.control).closing {
                daemon.request_shutdown();
            }
            daemon.wait()
        });
        lock(&self.control).connection = None;
        adapter.ended.store(true, Ordering::Relaxed);
        // Joins the crate's worker, so that nothing of this connection is left when the member is free again.
        drop(daemon);
        if let Err(error) = served {
            use vhost::vhost_user::Error as Protocol;
            use vhost_user_backend::Error as Vub;
            match error {
                Vub::HandleRequest(Protocol::Disconnected | Protocol::PartialMessage) => {}
                error => self.member.owner().break_it(broken(error)),
            }
        }
        if self.member.detach().is_some() {
            // Can't be: no ring of the member's own ran.
            self.member.finish_detach();
        }
        Ok(())
    }

    /// Makes `run` return, and waits until it has. Idempotent.
    pub fn close(&self) {
        let mut control = lock(&self.control);
        control.closing = true;
        if let Some(connection) = &control.connection {
            connection.shutdown();
        }
        sys::eventfd_signal(&self.wake);
        while control.running {
            control = self.ended.wait(control).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
