// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `vhu-bench-engine`: the ring engine alone, ours in both formats against `virtio-queue`, in one process and thread.
//!
//! The driver is three prepared tables in the same memory for all. It makes a lap of chains available at once, which for
//! a split ring is one store (its descriptors and entries stay as they are), for a packed ring a copy of the lap's
//! descriptors; then the device takes and uses them, and only the device is timed. benches/README.md says what counts as
//! a device's work.

#[allow(dead_code)] // the block driver needs more of it
mod ram;

use std::error::Error;
use std::fs::File;
use std::hint::black_box;
use std::io::{self, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ram::Ram;
use vhu_core::memory::{MappingCache, MemoryMap};
use vhu_core::ring::any::{fresh_position, Ring};
use vhu_core::ring::split::{AddressSpace, RingAddresses};
use vhu_core::ring::{Chain, RingFeatures};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const USAGE: &str = "usage: vhu-bench-engine [--quick] [--rounds N] [--slice MS] [--only WORD] [--json PATH]";

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
/// The driver's event suppression structure of a packed ring says: interrupt at this descriptor.
const EVENT_DESC: u16 = 2;

const SIZE: u16 = 1024;
/// Chains that the driver makes available at once.
const LAP: u16 = 256;
/// A second region of guest memory, as a VM with more than a few gigabytes has; the rings are in the first, the
/// buffers and indirect tables in the second.
const HIGH: u64 = 0x1_0000_0000;
const REGION: usize = 4 << 20;
const LOW: u64 = 0x10_0000;

const DESC: usize = 0;
const DRIVER: usize = 0x8000;
const DEVICE: usize = 0x10000;
const TABLES: usize = REGION;
const DATA: usize = REGION + 0x2_0000;
const DATA_STRIDE: usize = 8192;
const BLOCK: u32 = 4096;

type Failure = Box<dyn Error + Send + Sync>;

/// What a chain looks like.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// One buffer of a page for the device to write, as a network card's receive queue has.
    One,
    /// A block request: header, a page, status.
    Three,
    /// The same in an indirect table.
    Indirect,
}

impl Shape {
    const ALL: [Self; 3] = [Self::One, Self::Three, Self::Indirect];

    fn name(self) -> &'static str {
        match self {
            Self::One => "one",
            Self::Three => "three",
            Self::Indirect => "indirect",
        }
    }

    /// Buffers of a chain.
    fn buffers(self) -> usize {
        if self == Self::One {
            1
        } else {
            3
        }
    }

    /// Descriptors of a chain in the ring.
    fn descriptors(self) -> usize {
        if self == Self::Three {
            3
        } else {
            1
        }
    }

    /// Address, length and flags of each of a chain's buffers.
    fn parts(self, chain: usize) -> Vec<(u64, u32, u16)> {
        let at = guest(DATA + chain * DATA_STRIDE);
        match self {
            Self::One => vec![(at, BLOCK, WRITE)],
            Self::Three | Self::Indirect => vec![
                (at, 16, NEXT),
                (at + 512, BLOCK, NEXT | WRITE),
                (at + 512 + u64::from(BLOCK), 1, WRITE),
            ],
        }
    }
}

/// The guest's address of an offset into the memory file.
fn guest(offset: usize) -> u64 {
    if offset < REGION {
        LOW + offset as u64
    } else {
        HIGH + (offset - REGION) as u64
    }
}

/// Guest memory, mapped three times: by the driver, by our engine, by virtio-queue's.
struct Bed {
    ram: Ram,
    map: Arc<MemoryMap>,
    theirs: GuestMemoryMmap<()>,
}

impl Bed {
    fn new() -> Result<Self, Failure> {
        let ram = Ram::new(2 * REGION)?;
        // SAFETY: `ram` keeps the fd open for longer than this borrow.
        let fd: OwnedFd = unsafe { BorrowedFd::borrow_raw(ram.fd()) }.try_clone_to_owned()?;
        let file = Arc::new(File::from(fd.try_clone()?));
        let fd = fd.into();
        let cache = MappingCache::default();
        let mut map = MemoryMap::default();
        let mut ranges = Vec::new();
        for offset in [0, REGION] {
            let user = ram.user_address() + offset as u64;
            map = map.with(cache.region(&fd, guest(offset), REGION as u64, user, offset as u64)?)?;
            let part = FileOffset::from_arc(Arc::clone(&file), offset as u64);
            ranges.push((GuestAddress(guest(offset)), REGION, Some(part)));
        }
        let theirs = GuestMemoryMmap::from_ranges_with_files(&ranges)?;
        Ok(Self {
            ram,
            map: Arc::new(map),
            theirs,
        })
    }

    fn descriptor(&self, at: usize, addr: u64, words: u64) {
        self.ram.u64(at).store(addr, Ordering::Relaxed);
        self.ram.u64(at + 8).store(words, Ordering::Relaxed);
    }

    fn clear(&self) {
        for at in (0..REGION.min(DEVICE + 0x8000)).step_by(8) {
            self.ram.u64(at).store(0, Ordering::Relaxed);
        }
    }
}

/// The driver's side of one run.
struct Driver<'a> {
    bed: &'a Bed,
    shape: Shape,
    packed: bool,
    /// Packed: the second word of each descriptor of a lap through the ring, without AVAIL and USED.
    words: Vec<(u64, u64)>,
    /// Packed: place of the next descriptor, without end. Split: the available index.
    avail: u64,
}

impl<'a> Driver<'a> {
    fn new(bed: &'a Bed, shape: Shape, packed: bool) -> Self {
        bed.clear();
        let mut driver = Self {
            bed,
            shape,
            packed,
            words: Vec::new(),
            avail: 0,
        };
        for chain in 0..usize::from(LAP) {
            driver.prepare(chain);
        }
        if !packed {
            let step = shape.descriptors();
            for slot in 0..usize::from(SIZE) {
                let head = slot % usize::from(LAP) * step;
                bed.ram.u16(DRIVER + 4 + 2 * slot).store(head as u16, Ordering::Relaxed);
            }
        }
        driver
    }

    /// Writes what of a chain stays as it is, and remembers what doesn't.
    fn prepare(&mut self, chain: usize) {
        let parts = self.shape.parts(chain);
        let indirect = self.shape == Shape::Indirect;
        // In packed rings the last half-word is flags and the one before the buffer ID; in split ones NEXT and flags.
        let word = |len: u32, flags: u16, next: usize| {
            let (third, fourth) = if self.packed {
                (chain as u16, flags)
            } else {
                (flags, next as u16)
            };
            u64::from(len) | u64::from(third) << 32 | u64::from(fourth) << 48
        };
        let table = TABLES + chain * 64;
        let first = chain * self.shape.descriptors();
        let mut ring = Vec::new();
        for (at, &(addr, len, flags)) in parts.iter().enumerate() {
            let next = if flags & NEXT != 0 { at + 1 } else { 0 };
            if indirect {
                let flags = if self.packed { flags & !NEXT } else { flags };
                self.bed.descriptor(table + 16 * at, addr, word(len, flags, next));
            } else {
                let next = if flags & NEXT != 0 { first + next } else { 0 };
                ring.push((addr, word(len, flags, next)));
            }
        }
        if indirect {
            ring.push((guest(table), word(16 * parts.len() as u32, INDIRECT, 0)));
        }
        for (at, (addr, words)) in ring.into_iter().enumerate() {
            if self.packed {
                self.words.push((addr, words));
            } else {
                self.bed.descriptor(DESC + 16 * (first + at), addr, words);
            }
        }
    }

    /// Makes a lap of chains available; an interrupt is asked for when all of them are used.
    fn refill(&mut self) {
        let ram = &self.bed.ram;
        let size = u64::from(SIZE);
        if !self.packed {
            self.avail += u64::from(LAP);
            let idx = self.avail as u16;
            let event = DRIVER + 4 + 2 * usize::from(SIZE);
            ram.u16(event).store(idx.wrapping_sub(1), Ordering::Relaxed);
            ram.u16(DRIVER + 2).store(idx, Ordering::Release);
            return;
        }
        for &(addr, words) in &self.words {
            let place = self.avail;
            let owner = if (place / size).is_multiple_of(2) { AVAIL } else { USED };
            let at = DESC + 16 * (place % size) as usize;
            self.bed.descriptor(at, addr, words | u64::from(owner) << 48);
            self.avail += 1;
        }
        let last = self.avail - 1;
        let wrap = u16::from((last / size).is_multiple_of(2)) << 15;
        ram.u16(DRIVER).store((last % size) as u16 | wrap, Ordering::Relaxed);
        ram.u16(DRIVER + 2).store(EVENT_DESC, Ordering::Release);
    }
}

/// An engine under test: takes what there is in batches of `batch`, resolves each buffer to an address in this process,
/// uses each chain, and decides about the interrupt after each batch. Returns chains and interrupts.
trait Engine {
    fn lap(&mut self, batch: usize) -> Result<(usize, usize), Failure>;
}

struct Ours<'a> {
    map: &'a Arc<MemoryMap>,
    ring: Ring,
    chains: Vec<Chain>,
}

impl<'a> Ours<'a> {
    fn new(bed: &'a Bed, packed: bool) -> Result<Self, Failure> {
        let features = RingFeatures {
            event_idx: true,
            indirect: true,
            packed,
            ..RingFeatures::default()
        };
        let addresses = RingAddresses {
            desc: guest(DESC),
            driver: guest(DRIVER),
            device: guest(DEVICE),
        };
        let space = AddressSpace::Guest;
        let position = fresh_position(packed);
        Ok(Self {
            map: &bed.map,
            ring: Ring::new(&bed.map, space, addresses, SIZE, SIZE, features, position)?,
            chains: (0..LAP).map(|_| Chain::default()).collect(),
        })
    }
}

impl Engine for Ours<'_> {
    fn lap(&mut self, batch: usize) -> Result<(usize, usize), Failure> {
        let (mut total, mut signals) = (0, 0);
        while self.ring.available()? > 0 {
            let mut count = 0;
            for chain in &mut self.chains[..batch] {
                if !self.ring.pop(self.map, chain)? {
                    break;
                }
                count += 1;
            }
            for chain in &mut self.chains[..count] {
                black_box(chain.readable.iovecs());
                black_box(chain.writable.iovecs());
                self.ring.push_used(chain.head, BLOCK + 1);
                chain.clear();
            }
            self.ring.publish();
            signals += usize::from(self.ring.should_signal(0));
            total += count;
        }
        Ok((total, signals))
    }
}

struct Theirs<'a> {
    memory: &'a GuestMemoryMmap<()>,
    queue: Queue,
    /// Whether buffers are looked up, or only seen.
    resolve: bool,
    heads: Vec<u16>,
    readable: Vec<(*mut u8, usize)>,
    writable: Vec<(*mut u8, usize)>,
}

impl<'a> Theirs<'a> {
    fn new(bed: &'a Bed, resolve: bool) -> Result<Self, Failure> {
        let mut queue = Queue::new(SIZE)?;
        queue.set_size(SIZE);
        let halves = |offset| {
            let address = guest(offset);
            (Some(address as u32), Some((address >> 32) as u32))
        };
        let (low, high) = halves(DESC);
        queue.set_desc_table_address(low, high);
        let (low, high) = halves(DRIVER);
        queue.set_avail_ring_address(low, high);
        let (low, high) = halves(DEVICE);
        queue.set_used_ring_address(low, high);
        queue.set_event_idx(true);
        queue.set_ready(true);
        if !queue.is_valid(&bed.theirs) {
            return Err("virtio-queue doesn't accept the ring".into());
        }
        Ok(Self {
            memory: &bed.theirs,
            queue,
            resolve,
            heads: Vec::new(),
            readable: Vec::new(),
            writable: Vec::new(),
        })
    }
}

impl Engine for Theirs<'_> {
    fn lap(&mut self, batch: usize) -> Result<(usize, usize), Failure> {
        let (mut total, mut signals) = (0, 0);
        loop {
            // `iter` rather than `pop_descriptor_chain`, which makes such an iterator for each chain.
            for chain in self.queue.iter(self.memory)?.take(batch) {
                self.heads.push(chain.head_index());
                for descriptor in chain {
                    if !self.resolve {
                        black_box((descriptor.addr(), descriptor.len(), descriptor.is_write_only()));
                        continue;
                    }
                    let slice = self.memory.get_slice(descriptor.addr(), descriptor.len() as usize)?;
                    let host = slice.ptr_guard_mut().as_ptr();
                    if descriptor.is_write_only() {
                        self.writable.push((host, slice.len()));
                    } else {
                        self.readable.push((host, slice.len()));
                    }
                }
                black_box(&self.readable);
                black_box(&self.writable);
                self.readable.clear();
                self.writable.clear();
            }
            if self.heads.is_empty() {
                return Ok((total, signals));
            }
            total += self.heads.len();
            for head in self.heads.drain(..) {
                self.queue.add_used(self.memory, head, BLOCK + 1)?;
            }
            signals += usize::from(self.queue.needs_notification(self.memory)?);
        }
    }
}

const ENGINES: [&str; 4] = ["ours split", "ours packed", "virtio-queue", "virtio-queue, walk only"];
/// What the ratios are taken against.
const PEER: usize = 2;
const BAR: f64 = 3.0;

/// Chains a second of the device's time, in the median lap.
fn run(bed: &Bed, which: usize, shape: Shape, batch: usize, time: Duration) -> Result<f64, Failure> {
    let packed = which == 1;
    let mut driver = Driver::new(bed, shape, packed);
    let mut engine: Box<dyn Engine> = match which {
        0 | 1 => Box::new(Ours::new(bed, packed)?),
        _ => Box::new(Theirs::new(bed, which == PEER)?),
    };
    let mut lap = |engine: &mut dyn Engine| -> Result<Duration, Failure> {
        driver.refill();
        let start = Instant::now();
        let (chains, signals) = engine.lap(batch)?;
        let spent = start.elapsed();
        // The first decision is "yes" in any engine: it can't know what the driver has seen.
        if chains != usize::from(LAP) || signals == 0 || signals > 2 {
            return Err(format!("{}: {chains} chains and {signals} interrupts in a lap", ENGINES[which]).into());
        }
        Ok(spent)
    };
    // Pages, caches, branch predictors.
    for _ in 0..8 {
        lap(engine.as_mut())?;
    }
    let (mut laps, mut spent) = (Vec::new(), Duration::ZERO);
    while spent < time {
        let lap = lap(engine.as_mut())?;
        laps.push(lap.as_secs_f64());
        spent += lap;
    }
    // Not the mean: a lap in which something else had the CPU says nothing about the engine.
    let [_, median, _] = spread(laps);
    Ok(f64::from(LAP) / median)
}

struct Options {
    rounds: usize,
    slice: Duration,
    only: String,
    json: Option<String>,
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut options = Options {
        rounds: 7,
        slice: Duration::from_millis(20),
        only: String::new(),
        json: None,
    };
    while let Some(option) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{option} needs a value"));
        match option.as_str() {
            "--quick" => (options.rounds, options.slice) = (3, Duration::from_millis(5)),
            "--rounds" => options.rounds = number(&value()?)?,
            "--slice" => options.slice = Duration::from_millis(number(&value()?)?),
            "--only" => options.only = value()?,
            "--json" => options.json = Some(value()?),
            _ => return Err(format!("unknown option {option}")),
        }
    }
    if options.rounds == 0 || options.slice.is_zero() {
        return Err("--rounds and --slice: at least 1".into());
    }
    Ok(options)
}

fn number<T: std::str::FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{text}: not a number that fits"))
}

/// Minimum, median and maximum.
fn spread(mut samples: Vec<f64>) -> [f64; 3] {
    samples.sort_by(f64::total_cmp);
    let at = |index: usize| samples.get(index).copied().unwrap_or(f64::NAN);
    [at(0), at(samples.len() / 2), at(samples.len().saturating_sub(1))]
}

/// The rates of one cell: of each engine in each round.
struct Cell {
    shape: Shape,
    batch: usize,
    rates: [Vec<f64>; ENGINES.len()],
}

impl Cell {
    fn ratios(&self, which: usize, base: usize) -> [f64; 3] {
        let pairs = self.rates[which].iter().zip(&self.rates[base]);
        spread(pairs.map(|(one, other)| one / other).collect())
    }
}

fn measure(options: &Options) -> Result<Vec<Cell>, Failure> {
    let bed = Bed::new()?;
    let mut cells: Vec<Cell> = Shape::ALL
        .into_iter()
        .flat_map(|shape| [1, 8, 32, 128].map(|batch| (shape, batch)))
        .map(|(shape, batch)| Cell {
            shape,
            batch,
            rates: Default::default(),
        })
        .filter(|cell| options.only.is_empty() || cell.shape.name() == options.only)
        .collect();
    for round in 0..options.rounds {
        for cell in &mut cells {
            for turn in 0..ENGINES.len() {
                let which = (turn + round) % ENGINES.len();
                let rate = run(&bed, which, cell.shape, cell.batch, options.slice)?;
                cell.rates[which].push(rate);
            }
        }
    }
    Ok(cells)
}

fn report(cells: &[Cell], options: &Options) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "ring engine alone, {} rounds of {} ms: million descriptors a second (medians), ratios to virtio-queue (min median max)\n",
        options.rounds,
        options.slice.as_millis()
    )?;
    writeln!(
        out,
        "{:9} {:>5}  {:>8} {:>8} {:>8} {:>9}   {:^17}   {:^17}   {:>9}",
        "chain", "batch", "split", "packed", "v-queue", "walk only", "split", "packed", "walk only"
    )?;
    for cell in cells {
        let scale = cell.shape.buffers() as f64 / 1e6;
        let [split, packed, peer, walk] = [0, 1, 2, 3].map(|which| spread(cell.rates[which].clone())[1] * scale);
        let ratio = |which| {
            let [min, median, max] = cell.ratios(which, PEER);
            format!("{min:5.2} {median:5.2} {max:5.2}")
        };
        writeln!(
            out,
            "{:9} {:>5}  {split:8.1} {packed:8.1} {peer:8.1} {walk:9.1}   {}   {}   {:9.2}",
            cell.shape.name(),
            cell.batch,
            ratio(0),
            ratio(1),
            cell.ratios(0, 3)[1],
        )?;
    }
    for (which, name) in [(0, "split"), (1, "packed")] {
        let medians: Vec<f64> = cells.iter().map(|cell| cell.ratios(which, PEER)[1]).collect();
        let met = medians.iter().filter(|&&ratio| ratio >= BAR).count();
        let [least, _, most] = spread(medians.clone());
        writeln!(
            out,
            "bar: {name} >= {BAR} times virtio-queue: {met} of {} cells (medians {least:.2} to {most:.2})",
            medians.len()
        )?;
    }
    Ok(())
}

fn json(cells: &[Cell], options: &Options) -> String {
    let rows: Vec<serde_json::Value> = cells
        .iter()
        .map(|cell| {
            let chains: serde_json::Map<_, _> = ENGINES
                .iter()
                .zip(&cell.rates)
                .map(|(name, rates)| ((*name).to_owned(), serde_json::json!(rates)))
                .collect();
            serde_json::json!({
                "chain": cell.shape.name(),
                "buffers": cell.shape.buffers(),
                "batch": cell.batch,
                "chains_per_second": chains,
                "ratios": {"split": cell.ratios(0, PEER), "packed": cell.ratios(1, PEER)},
            })
        })
        .collect();
    let slice = options.slice.as_millis() as u64;
    serde_json::json!({"rounds": options.rounds, "slice_ms": slice, "bar": BAR, "cells": rows}).to_string()
}

fn main() -> ExitCode {
    let options = match parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(reason) => {
            eprintln!("vhu-bench-engine: {reason}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let done = measure(&options).and_then(|cells| {
        report(&cells, &options)?;
        if let Some(path) = &options.json {
            std::fs::write(path, json(&cells, &options) + "\n")?;
        }
        Ok(())
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vhu-bench-engine: {error}");
            ExitCode::FAILURE
        }
    }
}
