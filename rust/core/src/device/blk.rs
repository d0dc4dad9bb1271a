// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! virtio-blk (virtio 1.4, 5.2), legacy and modern.
//!
//! A request is a 16-byte header, data, and one status byte, in whatever descriptors the driver likes
//! (VIRTIO_F_ANY_LAYOUT, and free in 1.x): the header is the first 16 readable bytes, the status the last writable one.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwap;

use super::image::{Image, Storage, SECTOR};
use super::{ConfigField, Device, IoOp, QueueContext, Request, Scratch, Segment, Step};
use crate::error::{Error, Fault, Result};
use crate::ring::MAX_QUEUE_SIZE;

/// Feature bits of the block device.
pub mod feature {
    /// seg_max is valid.
    pub const SEG_MAX: u64 = 1 << 2;
    /// The disk is read-only.
    pub const RO: u64 = 1 << 5;
    /// blk_size is valid.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// The FLUSH command (legacy name: WCE).
    pub const FLUSH: u64 = 1 << 9;
    /// Topology fields are valid.
    pub const TOPOLOGY: u64 = 1 << 10;
    /// The cache mode can be read and written.
    pub const CONFIG_WCE: u64 = 1 << 11;
    /// num_queues is valid.
    pub const MQ: u64 = 1 << 12;
    /// The DISCARD command.
    pub const DISCARD: u64 = 1 << 13;
    /// The WRITE_ZEROES command.
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
/// Legacy second name of FLUSH.
const T_FLUSH_OUT: u32 = 5;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

const HEADER: usize = 16;
const ID_BYTES: usize = 20;
const SEGMENT: usize = 16;
/// Bytes copied to or from memory at a stretch.
const CHUNK: u64 = 1 << 20;
/// Pieces of one readv or writev (the kernel's UIO_MAXIOV).
const IOV_MAX: usize = 1024;
/// Segments of one discard or write-zeroes request.
const MAX_SEGMENTS: u32 = 32;
/// Sectors of one discard segment: 2 GiB less one sector.
const MAX_DISCARD_SECTORS: u32 = (1 << 22) - 1;
/// Sectors of one write-zeroes segment: 32 MiB, since it may have to be written out.
const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 16;

/// Size of struct virtio_blk_config with all fields of virtio 1.4.
pub const CONFIG_SIZE: usize = 96;
const WRITEBACK_OFFSET: usize = 32;
/// Up to the write-zeroes fields: neither secure erase nor zones are offered.
const OFFERED_CONFIG: usize = 60;

const fn field(name: &'static str, offset: usize, size: usize) -> ConfigField {
    ConfigField { name, offset, size }
}

/// struct virtio_blk_config (virtio 1.4, 5.2.4), as far as it is offered.
const CONFIG_FIELDS: [ConfigField; 21] = [
    field("capacity", 0, 8),
    field("size_max", 8, 4),
    field("seg_max", 12, 4),
    field("geometry.cylinders", 16, 2),
    field("geometry.heads", 18, 1),
    field("geometry.sectors", 19, 1),
    field("blk_size", 20, 4),
    field("topology.physical_block_exp", 24, 1),
    field("topology.alignment_offset", 25, 1),
    field("topology.min_io_size", 26, 2),
    field("topology.opt_io_size", 28, 4),
    field("writeback", 32, 1),
    field("unused0", 33, 1),
    field("num_queues", 34, 2),
    field("max_discard_sectors", 36, 4),
    field("max_discard_seg", 40, 4),
    field("discard_sector_alignment", 44, 4),
    field("max_write_zeroes_sectors", 48, 4),
    field("max_write_zeroes_seg", 52, 4),
    field("write_zeroes_may_unmap", 56, 1),
    field("unused1", 57, 3),
];

/// Indices into the per-queue counters.
pub mod counter {
    /// Reads.
    pub const IN: usize = 0;
    /// Writes.
    pub const OUT: usize = 1;
    /// Flushes.
    pub const FLUSH: usize = 2;
    /// Serial number requests.
    pub const GET_ID: usize = 3;
    /// Discards.
    pub const DISCARD: usize = 4;
    /// Write-zeroes.
    pub const WRITE_ZEROES: usize = 5;
    /// Types we don't know.
    pub const UNSUPPORTED: usize = 6;
    /// Requests answered with an error.
    pub const FAILED: usize = 7;
    /// Bytes read.
    pub const BYTES_READ: usize = 8;
    /// Bytes written.
    pub const BYTES_WRITTEN: usize = 9;
}

const COUNTER_NAMES: [&str; 10] = [
    "in",
    "out",
    "flush",
    "get_id",
    "discard",
    "write_zeroes",
    "unsupported",
    "failed",
    "bytes_read",
    "bytes_written",
];

/// Steps of a request after its first operation.
mod step {
    /// Data moves; a short count goes on where it stopped.
    pub const DATA: u32 = 0;
    /// Deallocating or zeroing segment by segment.
    pub const SEGMENTS: u32 = 1;
    /// Writing zeroes of the current segment because the file system can't zero by itself.
    pub const ZEROES: u32 = 2;
    /// The last operation; its result is the request's.
    pub const LAST: u32 = 3;
    /// Copying to or from memory, piece by piece.
    pub const COPY: u32 = 4;
}

/// Zeroes to write where a file system has no fallocate for it.
fn zeroes() -> &'static [u8] {
    static ZEROES: OnceLock<Vec<u8>> = OnceLock::new();
    ZEROES.get_or_init(|| vec![0; 1 << 16])
}

/// What an operator can choose.
#[derive(Clone, Debug)]
pub struct BlkOptions {
    /// Number of request queues.
    pub queues: u16,
    /// Largest queue size.
    pub queue_size: u16,
    /// Logical block size in bytes.
    pub blk_size: u32,
    /// Serial number, up to 20 bytes.
    pub serial: String,
}

fn check_serial(serial: &str) -> Result<()> {
    if serial.len() > ID_BYTES {
        return Err(Error::Invalid(format!(
            "serial {serial:?} is longer than {ID_BYTES} bytes"
        )));
    }
    Ok(())
}

/// A virtio block device on an [`Image`].
pub struct Blk {
    image: ArcSwap<Image>,
    options: BlkOptions,
    serial: ArcSwap<String>,
    /// The writeback field of the configuration; meaningful with CONFIG_WCE negotiated.
    writeback: AtomicU8,
    /// Enforced at once when an operator asks for it; offered as RO from the next negotiation on.
    read_only: AtomicBool,
}

impl Blk {
    /// A device on `image`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for options out of range, [`Error::Image`] when the image doesn't fit them.
    pub fn new(image: Image, options: BlkOptions) -> Result<Self> {
        let invalid = |text: String| Err(Error::Invalid(text));
        if !(1..=256).contains(&options.queues) {
            return invalid(format!("queues = {}; 1 to 256 are possible", options.queues));
        }
        let size = options.queue_size;
        if !size.is_power_of_two() || !(4..=MAX_QUEUE_SIZE).contains(&size) {
            return invalid(format!(
                "queue_size = {size}; a power of two from 4 to {MAX_QUEUE_SIZE} is possible"
            ));
        }
        if !options.blk_size.is_power_of_two() || !(512..=4096).contains(&options.blk_size) {
            return invalid(format!(
                "blk_size = {}; 512, 1024, 2048 or 4096 are possible",
                options.blk_size
            ));
        }
        check_serial(&options.serial)?;
        let serial = ArcSwap::from_pointee(options.serial.clone());
        let read_only = AtomicBool::new(image.read_only);
        let this = Self {
            image: ArcSwap::from_pointee(image),
            options,
            serial,
            // Write-through until a front end has read the configuration: one that reconnects to a new process doesn't
            // read it again, and its guest may rely on write-through.
            writeback: AtomicU8::new(0),
            read_only,
        };
        this.check_blocks(&this.image.load())?;
        Ok(this)
    }

    fn check_blocks(&self, image: &Image) -> Result<()> {
        if image.size().is_multiple_of(u64::from(self.options.blk_size)) {
            Ok(())
        } else {
            let reason = format!("size of {} bytes is not a multiple of blk_size", image.size());
            Err(Error::Image {
                spec: image.spec.clone(),
                reason,
            })
        }
    }

    /// The options.
    pub fn options(&self) -> &BlkOptions {
        &self.options
    }

    /// The image now in use.
    pub fn image(&self) -> Arc<Image> {
        self.image.load_full()
    }

    /// The serial number.
    pub fn serial(&self) -> Arc<String> {
        self.serial.load_full()
    }

    /// Changes the serial number.
    ///
    /// # Errors
    /// [`Error::Invalid`] when it is too long.
    pub fn set_serial(&self, serial: &str) -> Result<()> {
        check_serial(serial)?;
        self.serial.store(Arc::new(serial.to_owned()));
        Ok(())
    }

    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        self.read_only.load(Ordering::Relaxed)
    }

    /// Sets the writeback field, as another process has left it.
    pub fn set_writeback(&self, on: bool) {
        self.writeback.store(u8::from(on), Ordering::Relaxed);
    }

    /// The writeback field.
    pub fn writeback(&self) -> bool {
        self.writeback.load(Ordering::Relaxed) != 0
    }

    /// Swaps the image, resizes it, or changes read-only. May block (opening, resizing). True when the driver can see a
    /// difference.
    ///
    /// Requests in flight end on the image they began on.
    ///
    /// # Errors
    /// [`Error::Image`]; nothing has changed then.
    pub fn modify(&self, image: Option<&str>, size: Option<u64>, read_only: Option<bool>) -> Result<bool> {
        let old = self.image.load_full();
        let ro = read_only.unwrap_or_else(|| self.read_only());
        let reopen = match image {
            Some(_) => true,
            // A file opened for reading only must be opened again before it can be written.
            None => old.read_only && !ro && old.fd().is_some(),
        };
        let capacity = old.size();
        let fail = |reason: &str| {
            Err(Error::Image {
                spec: old.spec.clone(),
                reason: reason.into(),
            })
        };
        if size.is_some_and(|size| !size.is_multiple_of(u64::from(self.options.blk_size))) {
            return fail("the new size is not a multiple of blk_size");
        }
        if reopen {
            let spec = image.unwrap_or(&old.spec);
            let new = Image::open_after(spec, ro, old.shared, Some(&old)).and_then(|new| {
                // Resizing comes last: whatever is refused before leaves the file as it is.
                self.check_blocks(&new)?;
                size.map_or(Ok(()), |size| new.resize(size))?;
                Ok(new)
            });
            let new = match new {
                Ok(new) => new,
                Err(error) => {
                    // The new opening, gone by now, may have taken over the lock.
                    old.lock_again();
                    return Err(error);
                }
            };
            self.image.store(Arc::new(new));
            // What was acknowledged on the old image and not flushed yet.
            if let Err(error) = old.sync() {
                log::error!("an image was swapped for another and may lack its last writes: {error}");
            }
        } else if let Some(size) = size {
            if ro && old.kind() == "file" {
                return fail("a read-only image can't be resized");
            }
            old.resize(size)?;
        }
        let ro_changed = self.read_only.swap(ro, Ordering::Relaxed) != ro;
        Ok(self.image.load().size() != capacity || ro_changed)
    }

    /// Whether a completed write must be on stable storage (virtio 1.4, 5.2.6.2). A driver that can't flush can never ask
    /// for it later.
    fn write_through(&self, features: u64) -> bool {
        features & feature::FLUSH == 0 || (features & feature::CONFIG_WCE != 0 && !self.writeback())
    }

    fn config(&self) -> [u8; CONFIG_SIZE] {
        let mut config = [0; CONFIG_SIZE];
        let mut put = |offset: usize, bytes: &[u8]| config[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(0, &(self.image.load().size() / SECTOR).to_le_bytes());
        // Header and status take a descriptor each.
        put(12, &u32::from(self.options.queue_size - 2).to_le_bytes());
        put(20, &self.options.blk_size.to_le_bytes());
        // Files go through the page cache: 4 KiB is the unit that needs no read first.
        let blocks = (4096 / self.options.blk_size).max(1);
        put(24, &[blocks.trailing_zeros() as u8, 0]);
        put(26, &(blocks as u16).to_le_bytes());
        put(WRITEBACK_OFFSET, &[self.writeback.load(Ordering::Relaxed)]);
        put(34, &self.options.queues.to_le_bytes());
        if !self.read_only() {
            put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
            put(40, &MAX_SEGMENTS.to_le_bytes());
            put(
                44,
                &blocks
                    .saturating_mul(self.options.blk_size / SECTOR as u32)
                    .to_le_bytes(),
            );
            put(48, &MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
            put(52, &MAX_SEGMENTS.to_le_bytes());
            put(56, &[1]);
        }
        config
    }

    /// Ends a request: status byte, counters, used length.
    fn finish(&self, scratch: &mut Scratch, context: &QueueContext<'_>, status: u8) -> Step {
        if let Some(byte) = scratch.status.take() {
            byte.set(status);
        }
        scratch.keep = None;
        if status != S_OK {
            context.counters.add(counter::FAILED, 1);
            scratch.written = 0;
        }
        // The used length counts bytes written from the start of the writable part; the status byte, its last, belongs
        // to them only when nothing before it was left out.
        Step::Done(
            scratch
                .written
                .saturating_add(u32::from(scratch.written == scratch.room)),
        )
    }

    /// A range of the disk, if it is one: in whole sectors, inside the image.
    fn range(image: &Image, sector: u64, len: u64) -> Option<u64> {
        let offset = sector.checked_mul(SECTOR)?;
        let end = offset.checked_add(len)?;
        (len.is_multiple_of(SECTOR) && end <= image.size()).then_some(offset)
    }

    fn start_in(&self, request: &mut Request, context: &QueueContext<'_>, sector: u64) -> Step {
        let len = request.chain.writable.len();
        let scratch = &mut request.scratch;
        scratch.written = scratch.room;
        context.counters.add(counter::IN, 1);
        let image = self.image.load();
        let Some(offset) = Self::range(&image, sector, len) else {
            return self.finish(scratch, context, S_IOERR);
        };
        context.counters.add(counter::BYTES_READ, len);
        self.begin_data(request, context, &image, offset, len)
    }

    fn start_out(&self, request: &mut Request, context: &QueueContext<'_>, sector: u64) -> Step {
        let len = request.chain.readable.len();
        let scratch = &mut request.scratch;
        context.counters.add(counter::OUT, 1);
        let image = self.image.load();
        if self.read_only() {
            return self.finish(scratch, context, S_IOERR);
        }
        let Some(offset) = Self::range(&image, sector, len) else {
            return self.finish(scratch, context, S_IOERR);
        };
        context.counters.add(counter::BYTES_WRITTEN, len);
        self.begin_data(request, context, &image, offset, len)
    }

    /// Moves the data of a request whose range has been checked.
    fn begin_data(
        &self,
        request: &mut Request,
        context: &QueueContext<'_>,
        image: &Arc<Image>,
        offset: u64,
        len: u64,
    ) -> Step {
        if len == 0 {
            return self.finish(&mut request.scratch, context, S_OK);
        }
        request.scratch.offset = offset;
        request.scratch.left = len;
        match &image.storage {
            Storage::File(_) => {
                request.scratch.keep = Some(Arc::clone(image) as _);
                self.data_op(request, context, image)
            }
            _ if len <= CHUNK => self.copy_op(request, context, image),
            // Long copies are made in pieces, so that others get their turn; the image must stay meanwhile.
            _ => {
                request.scratch.keep = Some(Arc::clone(image) as _);
                self.copy_op(request, context, image)
            }
        }
    }

    /// Copies the next piece to or from an image in memory.
    fn copy_op(&self, request: &mut Request, context: &QueueContext<'_>, image: &Image) -> Step {
        let scratch = &mut request.scratch;
        let reading = scratch.kind == T_IN;
        let buffers = if reading {
            &mut request.chain.writable
        } else {
            &mut request.chain.readable
        };
        let piece = scratch.left.min(CHUNK);
        match &image.storage {
            Storage::Ram(ram) => {
                let Some(place) = ram.at(scratch.offset, piece) else {
                    return self.finish(scratch, context, S_IOERR);
                };
                // SAFETY: `at` vouches for `piece` bytes, as many as are copied at most.
                unsafe {
                    if reading {
                        buffers.copy_in(place, piece);
                    } else {
                        buffers.copy_out(place, piece);
                    }
                }
            }
            Storage::Null if reading => buffers.zero(piece),
            Storage::Null => {}
            Storage::File(_) => return self.finish(scratch, context, S_IOERR),
        }
        scratch.left -= piece;
        if scratch.left == 0 {
            return self.finish(scratch, context, S_OK);
        }
        scratch.offset += piece;
        buffers.trim_front(piece);
        scratch.step = step::COPY;
        Step::Io(IoOp::Yield)
    }

    /// The next read or write of a data request. Only file images come here.
    fn data_op(&self, request: &mut Request, context: &QueueContext<'_>, image: &Image) -> Step {
        let scratch = &mut request.scratch;
        let Some(fd) = image.fd() else {
            return self.finish(scratch, context, S_IOERR);
        };
        scratch.step = step::DATA;
        let buffers = if scratch.kind == T_IN {
            &request.chain.writable
        } else {
            &request.chain.readable
        };
        let iovecs = buffers.iovecs();
        // The kernel takes so many at once; the rest follows as after a short transfer.
        let count = iovecs.len().min(IOV_MAX) as u32;
        let (iov, offset, bytes) = (iovecs.as_ptr(), scratch.offset, scratch.left);
        if scratch.kind == T_IN {
            Step::Io(IoOp::Readv {
                fd,
                iov,
                count,
                offset,
                bytes,
            })
        } else {
            let dsync = self.write_through(context.driver_features);
            Step::Io(IoOp::Writev {
                fd,
                iov,
                count,
                offset,
                dsync,
                bytes,
            })
        }
    }

    fn start_flush(&self, request: &mut Request, context: &QueueContext<'_>) -> Step {
        context.counters.add(counter::FLUSH, 1);
        let image = self.image.load();
        match image.fd() {
            // A read-only image has nothing to write back, and its fd may not allow it.
            Some(fd) if !image.read_only => {
                request.scratch.step = step::LAST;
                request.scratch.keep = Some(Arc::clone(&image) as _);
                Step::Io(IoOp::Fdatasync { fd })
            }
            _ => self.finish(&mut request.scratch, context, S_OK),
        }
    }

    fn start_get_id(&self, request: &mut Request, context: &QueueContext<'_>) -> Step {
        context.counters.add(counter::GET_ID, 1);
        let room = request.chain.writable.len();
        let scratch = &mut request.scratch;
        if room < ID_BYTES as u64 {
            return self.finish(scratch, context, S_IOERR);
        }
        // A longer buffer is left as it is beyond the 20 bytes.
        let mut id = [0; ID_BYTES];
        let serial = self.serial.load();
        id[..serial.len()].copy_from_slice(serial.as_bytes());
        scratch.written = request.chain.writable.write(&id) as u32;
        self.finish(scratch, context, S_OK)
    }

    /// Parses the segments of a discard or write-zeroes request, or says the status to refuse it with.
    fn segments(&self, request: &mut Request, image: &Image) -> std::result::Result<(), u8> {
        let discard = request.scratch.kind == T_DISCARD;
        if self.read_only() {
            return Err(S_IOERR);
        }
        let len = request.chain.readable.len();
        let limit = u64::from(MAX_SEGMENTS) * SEGMENT as u64;
        if len == 0 || !len.is_multiple_of(SEGMENT as u64) || len > limit {
            return Err(S_IOERR);
        }
        let mut raw = [0u8; MAX_SEGMENTS as usize * SEGMENT];
        let len = request.chain.readable.read(&mut raw[..len as usize]);
        let max = if discard {
            MAX_DISCARD_SECTORS
        } else {
            MAX_WRITE_ZEROES_SECTORS
        };
        for segment in raw[..len].chunks_exact(SEGMENT) {
            let word = |at: usize| u32::from_le_bytes([segment[at], segment[at + 1], segment[at + 2], segment[at + 3]]);
            let sector = u64::from(word(0)) | u64::from(word(4)) << 32;
            let (sectors, flags) = (word(8), word(12));
            // Bit 0 is unmap, for write-zeroes only; everything else is reserved.
            if flags & !1 != 0 || (discard && flags != 0) {
                return Err(S_UNSUPP);
            }
            let bytes = u64::from(sectors) * SECTOR;
            if sectors > max {
                return Err(S_IOERR);
            }
            let offset = Self::range(image, sector, bytes).ok_or(S_IOERR)?;
            if bytes > 0 {
                request.scratch.segments.push(Segment {
                    offset,
                    len: bytes,
                    unmap: discard || flags & 1 != 0,
                });
            }
        }
        // Taken from the back.
        request.scratch.segments.reverse();
        Ok(())
    }

    fn start_segments(&self, request: &mut Request, context: &QueueContext<'_>) -> Step {
        let discard = request.scratch.kind == T_DISCARD;
        context.counters.add(
            if discard {
                counter::DISCARD
            } else {
                counter::WRITE_ZEROES
            },
            1,
        );
        let image = self.image.load();
        if let Err(status) = self.segments(request, &image) {
            return self.finish(&mut request.scratch, context, status);
        }
        match &image.storage {
            Storage::Null => self.finish(&mut request.scratch, context, S_OK),
            Storage::Ram(_) | Storage::File(_) => {
                request.scratch.keep = Some(Arc::clone(&image) as _);
                self.segment_op(request, context, &image)
            }
        }
    }

    /// The next segment, or the sync that a write-through disk owes at the end.
    fn segment_op(&self, request: &mut Request, context: &QueueContext<'_>, image: &Image) -> Step {
        let scratch = &mut request.scratch;
        if let Storage::Ram(ram) = &image.storage {
            let Some(segment) = scratch.segments.last() else {
                return self.finish(scratch, context, S_OK);
            };
            ram.zero(segment.offset, segment.len);
            scratch.step = step::SEGMENTS;
            return Step::Io(IoOp::Yield);
        }
        let Some(fd) = image.fd() else {
            return self.finish(scratch, context, S_IOERR);
        };
        if let Some(&Segment { offset, len, unmap }) = scratch.segments.last() {
            scratch.step = step::SEGMENTS;
            let mode = if unmap {
                libc::FALLOC_FL_PUNCH_HOLE
            } else {
                libc::FALLOC_FL_ZERO_RANGE
            };
            return Step::Io(IoOp::Fallocate {
                fd,
                mode: mode | libc::FALLOC_FL_KEEP_SIZE,
                offset,
                len,
            });
        }
        if self.write_through(context.driver_features) {
            scratch.step = step::LAST;
            return Step::Io(IoOp::Fdatasync { fd });
        }
        self.finish(scratch, context, S_OK)
    }

    /// Writes zeroes over what is left of the current segment.
    fn zeroes_op(&self, request: &mut Request, context: &QueueContext<'_>, image: &Image) -> Step {
        let scratch = &mut request.scratch;
        let Some(fd) = image.fd() else {
            return self.finish(scratch, context, S_IOERR);
        };
        if scratch.left == 0 {
            scratch.segments.pop();
            return self.segment_op(request, context, image);
        }
        scratch.step = step::ZEROES;
        let source = zeroes();
        let bytes = scratch.left.min(16 * source.len() as u64);
        let mut room = bytes;
        scratch.iov.0.clear();
        while room > 0 {
            let len = room.min(source.len() as u64);
            scratch.iov.0.push(libc::iovec {
                iov_base: source.as_ptr().cast_mut().cast(),
                iov_len: len as usize,
            });
            room -= len;
        }
        let (iov, count) = (scratch.iov.0.as_ptr(), scratch.iov.0.len() as u32);
        Step::Io(IoOp::Writev {
            fd,
            iov,
            count,
            offset: scratch.offset,
            dsync: false,
            bytes,
        })
    }

    fn resume_data(&self, request: &mut Request, context: &QueueContext<'_>, image: &Image, n: u64) -> Step {
        let reading = request.scratch.kind == T_IN;
        if n == 0 {
            // The file ends before its recorded size (somebody truncated it), or the device is full in an odd way.
            return self.finish(&mut request.scratch, context, S_IOERR);
        }
        let scratch = &mut request.scratch;
        scratch.left = scratch.left.saturating_sub(n);
        if scratch.left == 0 {
            return self.finish(scratch, context, S_OK);
        }
        scratch.offset += n;
        let buffers = if reading {
            &mut request.chain.writable
        } else {
            &mut request.chain.readable
        };
        buffers.trim_front(n);
        self.data_op(request, context, image)
    }

    fn resume_segment(&self, request: &mut Request, context: &QueueContext<'_>, image: &Image, result: i32) -> Step {
        if result >= 0 {
            request.scratch.segments.pop();
            return self.segment_op(request, context, image);
        }
        if !matches!(-result, libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV) {
            return self.finish(&mut request.scratch, context, S_IOERR);
        }
        if request.scratch.kind == T_DISCARD {
            // A discard is advice; a file system that can't take it loses nothing.
            request.scratch.segments.pop();
            return self.segment_op(request, context, image);
        }
        if let Some(&segment) = request.scratch.segments.last() {
            request.scratch.offset = segment.offset;
            request.scratch.left = segment.len;
        }
        self.zeroes_op(request, context, image)
    }
}

impl Device for Blk {
    fn type_name(&self) -> &'static str {
        "blk"
    }

    fn device_id(&self) -> u32 {
        2
    }

    fn features(&self) -> u64 {
        let absent = if self.read_only() {
            feature::DISCARD | feature::WRITE_ZEROES
        } else {
            feature::RO
        };
        self.known_features() & !absent
    }

    fn known_features(&self) -> u64 {
        feature::SEG_MAX
            | feature::RO
            | feature::BLK_SIZE
            | feature::FLUSH
            | feature::TOPOLOGY
            | feature::CONFIG_WCE
            | feature::MQ
            | feature::DISCARD
            | feature::WRITE_ZEROES
    }

    fn queues(&self) -> u16 {
        self.options.queues
    }

    fn queue_size(&self) -> u16 {
        self.options.queue_size
    }

    fn tail(&self) -> u32 {
        1
    }

    fn config_fields(&self) -> &'static [ConfigField] {
        &CONFIG_FIELDS
    }

    fn config_size(&self) -> usize {
        OFFERED_CONFIG
    }

    fn legacy_config_size(&self) -> usize {
        OFFERED_CONFIG
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let config = self.config();
        data.fill(0);
        if let Some(tail) = config.get(offset..) {
            let n = tail.len().min(data.len());
            data[..n].copy_from_slice(&tail[..n]);
        }
    }

    fn write_config(&self, offset: usize, data: &[u8]) -> std::result::Result<bool, Fault> {
        // A front end may send the whole structure with one byte changed (QEMU's generic device does): what is equal
        // doesn't matter, and only one field can differ.
        let config = self.config();
        let mut changed = false;
        for (at, &byte) in (offset..).zip(data) {
            let old = config.get(at).copied().unwrap_or(0);
            if at == WRITEBACK_OFFSET {
                if byte > 1 {
                    return Err(Fault::new(
                        "config.writeback",
                        format!("writeback = {byte}; 0 or 1 is allowed"),
                    ));
                }
                changed = byte != old;
            } else if byte != old {
                return Err(Fault::new(
                    "config.read-only",
                    format!("byte {at} of the configuration is read-only"),
                ));
            }
        }
        if changed {
            // Exactly one bit flips: `changed` says the byte differs from what it was.
            self.writeback
                .store(u8::from(config[WRITEBACK_OFFSET] == 0), Ordering::Relaxed);
        }
        Ok(changed)
    }

    fn fresh(&self) {
        self.writeback.store(1, Ordering::Relaxed);
    }

    fn start(&self, request: &mut Request, context: &QueueContext<'_>) -> std::result::Result<Step, Fault> {
        let mut header = [0u8; HEADER];
        let chain = &mut request.chain;
        if chain.readable.read(&mut header) < HEADER {
            let reason = format!(
                "request at {} has {} readable bytes, less than a header",
                chain.head,
                chain.readable.len()
            );
            return Err(Fault::new("blk.request-header", reason));
        }
        chain.readable.trim_front(HEADER as u64);
        let Some(status) = chain.writable.pop_last_byte() else {
            let reason = format!("request at {} has no writable byte for the status", chain.head);
            return Err(Fault::new("blk.request-status", reason));
        };
        let scratch = &mut request.scratch;
        scratch.status = Some(status);
        // Chains are shorter than 4 GiB (ring.total-length).
        scratch.room = chain.writable.len() as u32;
        scratch.kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        // Bytes 4 to 7 are the legacy I/O priority: a hint.
        let mut sector = [0u8; 8];
        sector.copy_from_slice(&header[8..16]);
        let sector = u64::from_le_bytes(sector);
        Ok(match scratch.kind {
            T_IN => self.start_in(request, context, sector),
            T_OUT => self.start_out(request, context, sector),
            T_FLUSH | T_FLUSH_OUT => self.start_flush(request, context),
            T_GET_ID => self.start_get_id(request, context),
            T_DISCARD | T_WRITE_ZEROES => self.start_segments(request, context),
            _ => {
                context.counters.add(counter::UNSUPPORTED, 1);
                self.finish(scratch, context, S_UNSUPP)
            }
        })
    }

    fn resume(&self, request: &mut Request, context: &QueueContext<'_>, result: i32) -> Step {
        let image = request
            .scratch
            .keep
            .clone()
            .and_then(|keep| keep.downcast::<Image>().ok());
        let Some(image) = image else {
            return self.finish(&mut request.scratch, context, S_IOERR);
        };
        let again = matches!(-result, libc::EINTR | libc::EAGAIN);
        match (request.scratch.step, u64::try_from(result)) {
            (step::SEGMENTS, _) if again => self.segment_op(request, context, &image),
            (step::SEGMENTS, _) => self.resume_segment(request, context, &image, result),
            (step::DATA, _) if again => self.data_op(request, context, &image),
            (step::DATA, Ok(n)) => self.resume_data(request, context, &image, n),
            (step::ZEROES, _) if again => self.zeroes_op(request, context, &image),
            (step::ZEROES, Ok(n)) if n > 0 => {
                request.scratch.offset += n;
                request.scratch.left = request.scratch.left.saturating_sub(n);
                self.zeroes_op(request, context, &image)
            }
            (step::COPY, _) => self.copy_op(request, context, &image),
            (step::LAST, Ok(_)) => self.finish(&mut request.scratch, context, S_OK),
            _ => self.finish(&mut request.scratch, context, S_IOERR),
        }
    }

    fn counter_names(&self) -> &'static [&'static str] {
        &COUNTER_NAMES
    }

    fn failed_counter(&self) -> usize {
        counter::FAILED
    }
}
