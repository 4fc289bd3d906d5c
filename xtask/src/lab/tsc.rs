//! The rate of the processor's time stamp counter, which QEMU's emulation hands through.
//!
//! A kernel measures it twice: roughly at first, exactly a second later. Where the machine is held up
//! meanwhile the two differ, and a KVM that was there before the second measure gives its guests the
//! first: they get no timer's interrupt at all. So the kernel is told what it is.

#![allow(unsafe_code, reason = "reads the time stamp counter")]

use std::arch::x86_64::_rdtsc;
use std::thread;
use std::time::{Duration, Instant};

/// A moment by both clocks, and how long it took to look at them.
struct Look {
    at: Instant,
    ticks: u64,
    took: Duration,
}

fn look() -> Look {
    let at = Instant::now();
    // SAFETY: every x86_64 processor has the instruction, and it only reads a counter.
    let ticks = unsafe { _rdtsc() };
    Look { at, ticks, took: at.elapsed() }
}

/// Of several looks the quickest: it was not interrupted.
fn sharp_look() -> Look {
    (0..100).map(|_| look()).min_by_key(|look| look.took).unwrap_or_else(look)
}

/// The rate in kHz, to a few parts in a million.
pub fn khz() -> u64 {
    let begin = sharp_look();
    thread::sleep(Duration::from_millis(50));
    let end = sharp_look();
    let nanoseconds = end.at.duration_since(begin.at).as_nanos().max(1);
    (u128::from(end.ticks.wrapping_sub(begin.ticks)) * 1_000_000 / nanoseconds) as u64
}
