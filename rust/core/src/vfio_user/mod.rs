// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! PCI functions over vfio-user (design D7).
//!
//! [`function`] says what a PCI function is to the transport. From bytes up: [`wire`] (messages), [`stream`] (messages and
//! fds in a stream), [`session`] (one connection without its socket), [`dma`] (the client's memory), [`server`] (sockets on
//! the worker pool).

pub mod dma;
pub mod function;
pub mod server;
pub mod session;
pub mod stream;
pub mod wire;
