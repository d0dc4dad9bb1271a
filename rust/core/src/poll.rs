// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How long an empty queue is looked at before its driver is asked to notify: adaptive, bounded, and off by default.
//!
//! Only the decision is here; the looking is the worker's, in its turns, so that nobody waits for it.

use std::time::{Duration, Instant};

/// Longest bound: an idle queue is left after it at the latest, each time it runs empty.
pub const MAX_POLL: Duration = Duration::from_millis(1);
/// What a window begins with, in parts of the bound.
const FIRST_PART: u32 = 8;

/// The window of one queue.
///
/// It grows when work came in after it and within the bound, since a longer one would have met it, and is gone when work
/// kept away for longer than the bound, since none would have. What is measured is the time from running empty to the next
/// work, so a sleep and what it costs both sides is part of it: a driver that would be back at once, were it not for
/// that, is found out by the second request.
#[derive(Debug, Default)]
pub struct Polling {
    bound: Duration,
    window: Duration,
    /// When the queue was found empty; None: it had work when last seen.
    since: Option<Instant>,
}

impl Polling {
    /// Windows of at most `bound`, itself at most [`MAX_POLL`]; 0: never.
    pub fn new(bound: Duration) -> Self {
        Self {
            bound: bound.min(MAX_POLL),
            ..Self::default()
        }
    }

    /// Whether to look at all at the moment. Not: nobody has to know the time.
    #[inline]
    pub fn is_on(&self) -> bool {
        !self.bound.is_zero()
    }

    /// The queue is empty at `now`: true to go on looking, false to sleep.
    pub fn empty(&mut self, now: Instant) -> bool {
        let since = *self.since.get_or_insert(now);
        now.saturating_duration_since(since) < self.window
    }

    /// Whether it was empty when last seen: then [`Polling::work`] wants to know when that ended.
    #[inline]
    pub fn was_empty(&self) -> bool {
        self.since.is_some()
    }

    /// There is work at `now`.
    pub fn work(&mut self, now: Instant) {
        let Some(since) = self.since.take() else { return };
        let idle = now.saturating_duration_since(since);
        if idle > self.bound {
            self.window = Duration::ZERO;
        } else if idle >= self.window {
            self.window = (self.window * 2).max(self.bound / FIRST_PART).min(self.bound);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn us(us: u64) -> Duration {
        Duration::from_micros(us)
    }

    /// Runs empty at `at`, is looked at every microsecond, and has work after `idle`; how long it was looked at.
    fn round(polling: &mut Polling, at: Instant, idle: Duration) -> Duration {
        let mut looked = Duration::ZERO;
        while looked < idle && polling.empty(at + looked) {
            looked += us(1);
        }
        assert!(polling.was_empty());
        polling.work(at + idle);
        assert!(!polling.was_empty());
        looked
    }

    #[test]
    fn off_never_looks() {
        let mut polling = Polling::default();
        assert!(!polling.is_on());
        let now = Instant::now();
        for n in 0..10 {
            assert!(!polling.empty(now + us(n)));
            polling.work(now + us(n));
        }
    }

    #[test]
    fn it_grows_by_doubling_up_to_what_is_needed() {
        let mut polling = Polling::new(us(80));
        let now = Instant::now();
        let looked: Vec<Duration> = (0..5).map(|_| round(&mut polling, now, us(25))).collect();
        // 10 and 20 are too short for work that comes after 25; 40 isn't.
        assert_eq!(looked, [us(0), us(10), us(20), us(25), us(25)]);
        let looked: Vec<Duration> = (0..4).map(|_| round(&mut polling, now, us(79))).collect();
        assert_eq!(looked, [us(40), us(79), us(79), us(79)]);
    }

    #[test]
    fn it_never_exceeds_its_bound() {
        let mut polling = Polling::new(us(50));
        let now = Instant::now();
        for _ in 0..20 {
            assert!(round(&mut polling, now, us(50)) <= us(50));
        }
        assert_eq!(round(&mut polling, now, us(1000)), us(50));
        let mut polling = Polling::new(Duration::from_secs(1));
        for _ in 0..20 {
            assert!(round(&mut polling, now, MAX_POLL) <= MAX_POLL);
        }
    }

    #[test]
    fn a_slow_driver_is_not_waited_for() {
        let mut polling = Polling::new(us(80));
        let now = Instant::now();
        for _ in 0..10 {
            round(&mut polling, now, us(20));
        }
        assert_eq!(round(&mut polling, now, us(81)), us(40), "one window in vain");
        for _ in 0..10 {
            assert_eq!(round(&mut polling, now, us(81)), us(0));
        }
        // Back in time again: from the beginning.
        assert_eq!(round(&mut polling, now, us(20)), us(0));
        assert_eq!(round(&mut polling, now, us(20)), us(10));
    }

    #[test]
    fn an_idle_queue_is_left_for_good() {
        let mut polling = Polling::new(us(8));
        let now = Instant::now();
        for _ in 0..10 {
            round(&mut polling, now, us(7));
        }
        assert!(polling.empty(now));
        assert!(polling.empty(now + us(7)));
        assert!((8..1000).all(|n| !polling.empty(now + us(n))));
    }

    #[test]
    fn a_clock_that_stands_does_no_harm() {
        let mut polling = Polling::new(us(8));
        let now = Instant::now();
        for _ in 0..10 {
            assert!(!polling.empty(now) || polling.window > Duration::ZERO);
            polling.work(now - us(5));
        }
        assert!(polling.window <= us(8));
    }
}
