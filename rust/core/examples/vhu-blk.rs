// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One blk member behind the stock daemon of the crate vhost-user-backend, as a program:
//!
//! ```text
//! vhu-blk SOCKET IMAGE [QUEUES]
//! ```
//!
//! `IMAGE` is a raw file or a block device, written through to storage: the guest that is served can't know of the cache of
//! the one that serves it, which may be gone with all that is in it at any moment. Linked statically it runs in a guest that is another guest's
//! back end, where it serves what qemu-storage-daemon refuses: legacy drivers. It runs until it is killed.

use std::error::Error;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use vhu_core::device::blk::{Blk, BlkOptions};
use vhu_core::device::image::Image;
use vhu_core::member::{Member, MemberOptions};
use vhu_core::vub::Daemon;
use vhu_core::worker::Pool;

fn serve(socket: &str, image: &str, queues: u16) -> Result<(), Box<dyn Error>> {
    let options = BlkOptions {
        queues,
        queue_size: 256,
        blk_size: 512,
        serial: "vhu-blk".into(),
    };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DSYNC)
        .open(image)?;
    let blk = Blk::new(Image::adopt(image, false, true, file.into())?, options)?;
    // The daemon serves rings in threads of its own; the pool keeps the member's events and mappings.
    let pool = Arc::new(Pool::new(Some(1))?);
    let options = MemberOptions {
        legacy: true,
        ..MemberOptions::default()
    };
    let member = Member::new(pool, 1, Arc::new(blk), options);
    Ok(Daemon::new(member, Path::new(socket))?.run()?)
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let (socket, image, queues) = match words.as_slice() {
        [socket, image] => (socket, image, Ok(1)),
        [socket, image, queues] => (socket, image, queues.parse()),
        _ => {
            eprintln!("usage: vhu-blk SOCKET IMAGE [QUEUES]");
            return ExitCode::from(2);
        }
    };
    let Ok(queues) = queues else {
        eprintln!("vhu-blk: the number of queues is not a number");
        return ExitCode::from(2);
    };
    match serve(socket, image, queues) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vhu-blk: {error}");
            ExitCode::FAILURE
        }
    }
}
