// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How the bridge learns that the device has something.
//!
//! Neither way says which queue was kicked, but the ISR status says that something was: its bits are set whether or not an
//! interrupt gets through, as long as MSI-X is off. So polling is reading one register.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use crate::error::Result;

/// An interrupt line: level-triggered, masked when it fires.
pub trait Line {
    /// What can be waited for.
    fn fd(&self) -> BorrowedFd<'_>;
    /// Forgets that it fired.
    ///
    /// # Errors
    /// The line is of no more use.
    fn take(&self) -> Result<()>;
    /// Lets it fire again; at once, when the device still asserts it.
    ///
    /// # Errors
    /// The line is of no more use.
    fn rearm(&self) -> Result<()>;
}

/// How long the registers are read without a pause after something happened.
const SPIN: Duration = Duration::from_micros(50);
/// The first pause.
const FIRST_PAUSE: Duration = Duration::from_micros(50);

/// When to look next: at once for a while after something happened, then with growing pauses.
#[derive(Debug)]
pub struct Pace {
    longest: Duration,
    spin_until: Option<Instant>,
    pause: Duration,
}

impl Pace {
    /// Pauses of at most `longest`.
    pub fn new(longest: Duration) -> Self {
        Self {
            longest: longest.max(Duration::from_micros(1)),
            spin_until: None,
            pause: FIRST_PAUSE,
        }
    }

    /// Something happened.
    pub fn busy(&mut self, now: Instant) {
        self.spin_until = Some(now + SPIN.min(self.longest));
        self.pause = FIRST_PAUSE;
    }

    /// Nothing has: how long to pause, None for not at all.
    pub fn idle(&mut self, now: Instant) -> Option<Duration> {
        if self.spin_until.is_some_and(|until| now < until) {
            return None;
        }
        let pause = self.pause.min(self.longest);
        self.pause = (pause * 2).min(self.longest);
        Some(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn polling_spins_after_activity_then_pauses_longer_and_longer_up_to_the_bound() {
        let start = Instant::now();
        let mut pace = Pace::new(Duration::from_micros(300));
        pace.busy(start);
        assert_eq!(pace.idle(start + SPIN / 2), None);
        let pauses: Vec<_> = (0..5)
            .filter_map(|_| pace.idle(start + SPIN))
            .map(|pause| pause.as_micros())
            .collect();
        assert_eq!(pauses, [50, 100, 200, 300, 300]);
        pace.busy(start + SPIN);
        assert_eq!(pace.idle(start + SPIN * 2).map(|pause| pause.as_micros()), Some(50));
    }

    #[test]
    fn a_bound_below_the_first_pause_is_kept() {
        let start = Instant::now();
        let mut pace = Pace::new(Duration::from_micros(10));
        pace.busy(start);
        assert_eq!(
            pace.idle(start + Duration::from_micros(10))
                .map(|pause| pause.as_micros()),
            Some(10)
        );
    }
}
