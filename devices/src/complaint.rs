//! Warnings that a guest causes, as few of them as a log can hold.
//!
//! A guest can break a rule a million times a second. The first few lines tell what is wrong; the
//! rest would only fill the host's disk.

use std::sync::atomic::{AtomicU32, Ordering};

/// Lines from each place in the code while the process (that is, the machine) lives.
const LIMIT: u32 = 16;

/// How often one place has complained.
pub struct Complaints(AtomicU32);

/// Whether a complaint is to be written.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    Write,
    /// Write it, and say that it is the last.
    WriteLast,
    Drop,
}

impl Complaints {
    pub const fn new() -> Complaints {
        Complaints(AtomicU32::new(0))
    }

    pub fn another(&self) -> Verdict {
        // Stays at the limit, so that it never wraps.
        let count = self.0.try_update(Ordering::Relaxed, Ordering::Relaxed, |count| {
            (count < LIMIT).then(|| count + 1)
        });
        match count {
            Ok(count) if count + 1 == LIMIT => Verdict::WriteLast,
            Ok(_) => Verdict::Write,
            Err(_) => Verdict::Drop,
        }
    }
}

/// `tracing::warn!` for what a guest can cause: each place in the code that says so writes
/// [`LIMIT`] of them at most, and that there are no more.
macro_rules! guest_warning {
    ($($arguments:tt)+) => {{
        static COMPLAINTS: $crate::complaint::Complaints = $crate::complaint::Complaints::new();
        match COMPLAINTS.another() {
            $crate::complaint::Verdict::Write => tracing::warn!($($arguments)+),
            $crate::complaint::Verdict::WriteLast => {
                tracing::warn!($($arguments)+);
                tracing::warn!("no more of the last kind is written");
            }
            $crate::complaint::Verdict::Drop => {}
        }
    }};
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_complains_a_few_times_and_then_never_again() {
        let complaints = Complaints::new();
        for _ in 1..LIMIT {
            assert_eq!(complaints.another(), Verdict::Write);
        }
        assert_eq!(complaints.another(), Verdict::WriteLast);
        for _ in 0..1000 {
            assert_eq!(complaints.another(), Verdict::Drop);
        }
    }
}
