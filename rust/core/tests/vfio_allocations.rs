// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An access to a region allocates nothing, once the connection has its buffers.

#![allow(missing_docs, clippy::unwrap_used)]

#[path = "common/vfio.rs"]
mod vfio;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use vfio::{Client, Fake};
use vhu_core::error::{Error, Fault};
use vhu_core::event::{Completion, Waker};
use vhu_core::memory::Region;
use vhu_core::vfio_user::function::{Access, IrqChange, PciFunction, RegionInfo};
use vhu_core::vfio_user::server::Server;
use vhu_core::worker::{Pool, SourceHandle};

/// Allocations on threads that are watched.
static COUNT: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static WATCHED: Cell<bool> = const { Cell::new(false) };
}

struct Counting;

// SAFETY: everything is left to the system's allocator; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if WATCHED.try_with(Cell::get).unwrap_or(false) {
            COUNT.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: as the caller vouches.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as the caller vouches.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A function whose accesses put the worker's thread under watch.
struct Watching(Arc<Fake>);

impl PciFunction for Watching {
    fn label(&self) -> String {
        self.0.label()
    }

    fn kind(&self) -> &'static str {
        self.0.kind()
    }

    fn member_id(&self) -> u32 {
        self.0.member_id()
    }

    fn region(&self, index: u32) -> RegionInfo {
        self.0.region(index)
    }

    fn irq_count(&self, index: u32) -> u32 {
        self.0.irq_count(index)
    }

    fn attach(&self, line: SourceHandle) -> Result<(), Error> {
        self.0.attach(line)
    }

    fn detach(&self, done: Completion) {
        self.0.detach(done);
    }

    fn read(&self, _region: u32, _offset: u64, data: &mut [u8], _wake: &dyn Fn() -> Waker) -> Access {
        WATCHED.set(true);
        data.fill(1);
        Access::Done
    }

    fn write(&self, _region: u32, _offset: u64, _data: &[u8], _wake: &dyn Fn() -> Waker) -> Access {
        WATCHED.set(true);
        Access::Done
    }

    fn resume(&self, data: &mut [u8], wake: &dyn Fn() -> Waker) -> Access {
        self.0.resume(data, wake)
    }

    fn give_up(&self) {
        self.0.give_up();
    }

    fn dma_map(&self, region: Region) -> Result<(), Fault> {
        self.0.dma_map(region)
    }

    fn dma_unmap(&self, iova: u64, size: u64, wake: &dyn Fn() -> Waker) -> Result<Access, Fault> {
        self.0.dma_unmap(iova, size, wake)
    }

    fn set_irqs(&self, change: IrqChange) -> Result<(), i32> {
        self.0.set_irqs(change)
    }

    fn reset(&self, wake: &dyn Fn() -> Waker) -> Access {
        self.0.reset(wake)
    }

    fn take_signals(&self, _to: &mut Vec<Arc<OwnedFd>>) {}
}

#[test]
fn accesses_allocate_nothing() {
    const ROUNDS: u64 = 2000;
    let pool = Arc::new(Pool::new(Some(1)).unwrap());
    let (listener, address) = vfio::listener();
    let function = Arc::new(Watching(Fake::new(1)));
    let _server = Server::new(&pool, function, listener.into()).unwrap();
    let mut client = Client::new(&address);
    let mut round = || {
        client.read(0, 0, 4).unwrap();
        client.write_region(0, 0, &[1, 2]).unwrap();
        client.post(0, 0, &[1]);
    };
    for _ in 0..100 {
        round();
    }
    let before = COUNT.load(Ordering::Relaxed);
    for _ in 0..ROUNDS {
        round();
    }
    let count = COUNT.load(Ordering::Relaxed) - before;
    assert!(count < ROUNDS / 10, "{count} allocations in {ROUNDS} rounds");
}
