//! Warnings that a guest or a client causes.
//!
//! A guest can break a rule a million times a second. The first few lines tell what is wrong; the
//! rest would only fill the host's disk. A machine that lives for months is not silenced for ever,
//! though: with time there may be more.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines that each place in the code may write at once.
const LIMIT: u32 = 16;
/// How long it takes until there may be one more.
const REFILL: Duration = Duration::from_secs(600);

/// How often one place has complained.
pub struct Complaints(Mutex<State>);

struct State {
    /// Lines that may still be written.
    left: u32,
    /// When one was last added to these; before the first complaint it does not matter.
    refilled: Option<Instant>,
    /// Complaints since the last line that was written.
    kept_back: u64,
}

/// A line that may be written.
#[derive(Debug, PartialEq, Eq)]
pub struct Line {
    /// Lines that were not, since the one before.
    pub kept_back: u64,
    /// There is none for the next complaint, unless it takes its time.
    pub last: bool,
}

impl Complaints {
    /// A place that has not complained.
    #[allow(clippy::new_without_default, reason = "a static is made of it")]
    pub const fn new() -> Complaints {
        Complaints(Mutex::new(State { left: LIMIT, refilled: None, kept_back: 0 }))
    }

    /// One more complaint at this moment; the line for it, if there is one.
    pub fn another(&self, now: Instant) -> Option<Line> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let since = *state.refilled.get_or_insert(now);
        let intervals = now.saturating_duration_since(since).as_secs() / REFILL.as_secs();
        let added = u32::try_from(intervals).unwrap_or(u32::MAX).min(LIMIT - state.left);
        state.left += added;
        // A full place does not save up for later; another keeps the part of an interval.
        state.refilled = if state.left == LIMIT { Some(now) } else { Some(since + REFILL * added) };
        if state.left == 0 {
            state.kept_back += 1;
            return None;
        }
        state.left -= 1;
        let kept_back = std::mem::take(&mut state.kept_back);
        Some(Line { kept_back, last: state.left == 0 })
    }
}

/// `tracing::warn!` for what a guest or a client can cause. Each place in the code that says so
/// writes a few lines at once and then one in ten minutes, and says how many it did not write.
#[macro_export]
macro_rules! limited_warning {
    ($($arguments:tt)+) => {{
        static COMPLAINTS: $crate::Complaints = $crate::Complaints::new();
        if let Some(line) = COMPLAINTS.another(::std::time::Instant::now()) {
            $crate::tracing::warn!($($arguments)+);
            if line.kept_back > 0 {
                $crate::tracing::warn!("{} more of the last kind were not written", line.kept_back);
            } else if line.last {
                $crate::tracing::warn!("from now on one of the last kind is written in ten minutes");
            }
        }
    }};
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of so many complaints at one moment, the number of those that are written.
    fn written(complaints: &Complaints, count: u32, now: Instant) -> usize {
        (0..count).filter(|_| complaints.another(now).is_some()).count()
    }

    #[test]
    fn a_place_complains_a_few_times_and_then_no_more() {
        let (complaints, now) = (Complaints::new(), Instant::now());
        for _ in 1..LIMIT {
            assert_eq!(complaints.another(now), Some(Line { kept_back: 0, last: false }));
        }
        assert_eq!(complaints.another(now), Some(Line { kept_back: 0, last: true }));
        assert_eq!(written(&complaints, 1000, now), 0);
    }

    #[test]
    fn with_time_a_place_may_complain_again_and_says_what_it_kept_back() {
        let (complaints, start) = (Complaints::new(), Instant::now());
        assert_eq!(written(&complaints, 100, start), LIMIT as usize);
        assert_eq!(written(&complaints, 5, start + REFILL - Duration::from_secs(1)), 0);
        let line = complaints.another(start + REFILL);
        assert_eq!(line, Some(Line { kept_back: 100 - u64::from(LIMIT) + 5, last: true }));
        // Parts of an interval are not lost however often there is a complaint.
        let half = REFILL / 2;
        assert_eq!(written(&complaints, 1, start + REFILL + half), 0);
        assert_eq!(written(&complaints, 1, start + REFILL * 2), 1);
        // And never more at once than in the beginning.
        assert_eq!(written(&complaints, 100, start + REFILL * 1000), LIMIT as usize);
    }

    #[test]
    fn a_quiet_place_does_not_save_lines_up() {
        let (complaints, start) = (Complaints::new(), Instant::now());
        assert_eq!(written(&complaints, 1, start), 1);
        let later = start + REFILL * 100;
        assert_eq!(written(&complaints, 100, later), LIMIT as usize);
        assert_eq!(written(&complaints, 100, later + REFILL), 1);
        // Nor does a clock that runs backwards give any.
        assert_eq!(written(&complaints, 1, start), 0);
    }
}
