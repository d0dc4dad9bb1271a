// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! System calls, device registers and shared pages behind safe functions: the only module with `unsafe`.

mod fd;
mod pages;
mod registers;

pub use fd::{
    block_signals, connect_unix, eventfd, eventfd_add, eventfd_take, lock_exclusively, make_character_device, receive,
    send, socket_pair, Epoll, Event, Interest, Received, Timer,
};
pub use pages::{page_size, DmaPages, HUGE_PAGE};
pub use registers::Mmio;

use std::io;

/// Turns -1 into the OS error.
fn check(ret: libc::c_int) -> io::Result<libc::c_int> {
    if ret < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(ret)
    }
}
