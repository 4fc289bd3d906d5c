//! Limits on how much a device does: bytes in a time, and operations in a time.
//!
//! A [`TokenBucket`] is Firecracker's: it holds `size` tokens, fills at `size` tokens in
//! `refill_time`, and has a burst beside them that is there once. A [`RateLimiter`] is one bucket for
//! bytes, one for operations, and a timer for whoever was refused.
//!
//! All of it is integer arithmetic that keeps the fraction of the next token, so that nothing is
//! lost however often a bucket is looked at: a consumer that is always waiting gets exactly its
//! share. The time is an argument; only [`RateLimiter::allows`] asks the clock.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use serde::{Deserialize, Serialize};

const NANOSECONDS_PER_MILLISECOND: u128 = 1_000_000;
/// Time counted at once, 292 years: times any size, and with any fraction, it fits 128 bits.
const LONGEST_ELAPSED: u128 = i64::MAX as u128;
/// The timer is set for no longer, an hour, and then again. So no wait is too long for it.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// Tokens that are taken and come back at a steady rate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenBucket {
    size: u64,
    refill_time_ms: u64,
    /// Tokens that are left of the burst.
    one_time_burst: u64,
    /// Tokens in the bucket; below zero what is owed for a request that was larger than it.
    level: i128,
    /// Of the next token, so many of as many parts as it takes nanoseconds to fill the bucket.
    fraction: u128,
    /// When `level` and `fraction` were so; before the first request it does not matter.
    updated: Option<Instant>,
}

impl TokenBucket {
    /// A full bucket of `size` tokens that is filled from empty in `refill_time_ms` milliseconds.
    /// The burst is used up first, and is not filled again. None, that is no limit, where the size
    /// or the time is 0.
    pub fn new(size: u64, one_time_burst: u64, refill_time_ms: u64) -> Option<TokenBucket> {
        (size > 0 && refill_time_ms > 0).then(|| TokenBucket {
            size,
            refill_time_ms,
            one_time_burst,
            level: size.into(),
            fraction: 0,
            updated: None,
        })
    }

    /// In nanoseconds.
    fn refill_time(&self) -> u128 {
        u128::from(self.refill_time_ms) * NANOSECONDS_PER_MILLISECOND
    }

    /// Adds the tokens that have come since the last time. None come before the burst is used up: the
    /// bucket is full until then.
    fn refill(&mut self, now: Instant) {
        let since = self.updated.unwrap_or(now);
        self.updated = Some(now.max(since));
        let elapsed = now.saturating_duration_since(since).as_nanos().min(LONGEST_ELAPSED);
        let parts = elapsed * u128::from(self.size) + self.fraction;
        // A quotient by at least a million, far from the sign.
        self.level += (parts / self.refill_time()) as i128;
        self.fraction = parts % self.refill_time();
        if self.level >= self.size.into() {
            self.level = self.size.into();
            self.fraction = 0;
        }
    }

    /// Time until so many tokens can be taken, [`LONGEST_WAIT`] at most; none where they can be taken
    /// now. More than the bucket holds can be taken when it is full: it then owes the rest, and
    /// nothing else is taken before that has come.
    fn wait(&self, tokens: u64) -> Duration {
        let wanted = tokens.saturating_sub(self.one_time_burst);
        let missing = i128::from(wanted.min(self.size)) - self.level;
        // What costs nothing does not wait for what others owe.
        if wanted == 0 || missing <= 0 {
            return Duration::ZERO;
        }
        let nanoseconds = missing
            .unsigned_abs()
            .checked_mul(self.refill_time())
            // The fraction is less than one token, of which at least one is missing.
            .map(|parts| (parts - self.fraction).div_ceil(self.size.into()))
            .and_then(|nanoseconds| u64::try_from(nanoseconds).ok());
        nanoseconds.map_or(LONGEST_WAIT, Duration::from_nanos).min(LONGEST_WAIT)
    }

    /// Takes tokens for which there is no wait.
    fn take(&mut self, tokens: u64) {
        let from_burst = tokens.min(self.one_time_burst);
        self.one_time_burst -= from_burst;
        self.level -= i128::from(tokens - from_burst);
    }

    fn save(&self, now: Instant) -> BucketState {
        let mut bucket = self.clone();
        bucket.refill(now);
        let tokens = u64::try_from(bucket.level.unsigned_abs()).unwrap_or(u64::MAX);
        let (budget, debt) = if bucket.level < 0 { (0, tokens) } else { (tokens, 0) };
        BucketState {
            size: bucket.size,
            refill_time_ms: bucket.refill_time_ms,
            one_time_burst: bucket.one_time_burst,
            budget,
            debt,
            fraction: u64::try_from(bucket.fraction).unwrap_or(u64::MAX),
        }
    }

    fn restore(state: &BucketState, now: Instant) -> Option<TokenBucket> {
        let mut bucket = TokenBucket::new(state.size, state.one_time_burst, state.refill_time_ms)?;
        bucket.updated = Some(now);
        bucket.level = i128::from(state.budget.min(state.size)) - i128::from(state.debt);
        bucket.fraction = u128::from(state.fraction).min(bucket.refill_time() - 1);
        Some(bucket)
    }
}

/// A bucket in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BucketState {
    /// Tokens that it holds.
    pub size: u64,
    /// Milliseconds in which it is filled.
    pub refill_time_ms: u64,
    /// Tokens left of its burst.
    pub one_time_burst: u64,
    /// Tokens in it.
    pub budget: u64,
    /// Tokens owed for a request that was larger than the bucket.
    pub debt: u64,
    /// Of the next token, in parts of which a token has as many as `refill_time_ms` has
    /// nanoseconds.
    pub fraction: u64,
}

/// A limiter in a snapshot. It knows no time: none passes while a machine is not there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimiterState {
    /// Of bytes.
    pub bandwidth: Option<BucketState>,
    /// Of operations.
    pub ops: Option<BucketState>,
}

/// What becomes of a bucket while a machine runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum BucketUpdate {
    /// It stays as it is.
    #[default]
    None,
    /// There is no limit any more.
    Disabled,
    /// This one takes its place.
    Set(TokenBucket),
}

impl BucketUpdate {
    fn apply(self, bucket: &mut Option<TokenBucket>) {
        match self {
            BucketUpdate::None => {}
            BucketUpdate::Disabled => *bucket = None,
            BucketUpdate::Set(new) => *bucket = Some(new),
        }
    }
}

/// Limits on bytes and on operations, independent of each other. By default there are none, and
/// then it costs nothing.
///
/// A device asks before each request. If that is refused it leaves the request where it is, and
/// does nothing while the limiter [is blocked](RateLimiter::is_blocked): the timer, which the device
/// has in its event loop, becomes readable when the request would be allowed.
#[derive(Debug, Default)]
pub struct RateLimiter {
    bandwidth: Option<TokenBucket>,
    ops: Option<TokenBucket>,
    /// There as soon as there has been a limit.
    timer: Option<TimerFd>,
    /// The timer is in an event loop.
    watched: bool,
    /// A request was refused, and the timer runs.
    blocked: bool,
}

impl RateLimiter {
    /// A limiter with these buckets, `bandwidth` of bytes and `ops` of operations. Fails where it
    /// needs a timerfd and none can be made.
    pub fn new(
        bandwidth: Option<TokenBucket>,
        ops: Option<TokenBucket>,
    ) -> io::Result<RateLimiter> {
        let mut limiter = RateLimiter { bandwidth, ops, ..RateLimiter::default() };
        if !limiter.is_unlimited() {
            limiter.need_timer()?;
        }
        Ok(limiter)
    }

    /// The limiter that was saved, its time going on at `now`. A bucket that makes no sense is as
    /// full as a bucket can be, or no limit. Fails as [`RateLimiter::new`] does.
    pub fn restore(state: &RateLimiterState, now: Instant) -> io::Result<RateLimiter> {
        let restore = |bucket: &Option<BucketState>| TokenBucket::restore(bucket.as_ref()?, now);
        RateLimiter::new(restore(&state.bandwidth), restore(&state.ops))
    }

    /// What a snapshot keeps of it, as of `now`. That a request waits is not kept: it is in the
    /// queue still, and is refused again.
    pub fn save(&self, now: Instant) -> RateLimiterState {
        let save = |bucket: &Option<TokenBucket>| Some(bucket.as_ref()?.save(now));
        RateLimiterState { bandwidth: save(&self.bandwidth), ops: save(&self.ops) }
    }

    /// Changes limits. Nobody is blocked after that; who was refused may ask again at once. Fails
    /// where a timerfd is needed and none can be made, and nothing has changed then.
    pub fn update(&mut self, bandwidth: BucketUpdate, ops: BucketUpdate) -> io::Result<()> {
        if [&bandwidth, &ops].iter().any(|update| matches!(update, BucketUpdate::Set(_))) {
            self.need_timer()?;
        }
        bandwidth.apply(&mut self.bandwidth);
        ops.apply(&mut self.ops);
        self.blocked = false;
        if let Some(timer) = &self.timer {
            // If it fires nevertheless, somebody asks once too often.
            let _ = timer.unset();
        }
        Ok(())
    }

    /// Whether there is no limit.
    pub fn is_unlimited(&self) -> bool {
        self.bandwidth.is_none() && self.ops.is_none()
    }

    /// Whether a request was refused, and the time for it has not come.
    pub fn is_blocked(&self) -> bool {
        self.blocked
    }

    /// [`RateLimiter::consume`] at this moment.
    pub fn allows(&mut self, bytes: u64, ops: u64) -> bool {
        self.is_unlimited() || self.consume(bytes, ops, Instant::now())
    }

    /// Takes tokens for a request of so many bytes and operations, from both buckets or from none.
    /// Where that is refused, by false, the limiter is blocked until the timer fires.
    pub fn consume(&mut self, bytes: u64, ops: u64, now: Instant) -> bool {
        let mut wait = Duration::ZERO;
        for (bucket, tokens) in [(&mut self.bandwidth, bytes), (&mut self.ops, ops)] {
            if let Some(bucket) = bucket {
                bucket.refill(now);
                wait = wait.max(bucket.wait(tokens));
            }
        }
        if !wait.is_zero() && self.block(wait) {
            return false;
        }
        for (bucket, tokens) in [(&mut self.bandwidth, bytes), (&mut self.ops, ops)] {
            if let Some(bucket) = bucket {
                bucket.take(tokens);
            }
        }
        true
    }

    /// Starts the timer; false where that cannot be. The request is then allowed, and owed for:
    /// otherwise it would wait for ever.
    fn block(&mut self, wait: Duration) -> bool {
        let after = Expiration::OneShot(TimeSpec::from_duration(wait));
        self.blocked = match &self.timer {
            Some(timer) => match timer.set(after, TimerSetTimeFlags::empty()) {
                Ok(()) => true,
                Err(error) => {
                    tracing::error!(%error, "cannot set the timer of a rate limiter");
                    false
                }
            },
            None => false,
        };
        self.blocked
    }

    /// To be called when the timer's descriptor is readable: nobody is blocked any more, unless the
    /// timer was set anew since.
    pub fn timer_fired(&mut self) {
        if self.timer.as_ref().is_some_and(|timer| timer.wait().is_ok()) {
            self.blocked = false;
        }
    }

    /// The timer, for an event loop to wait until it is readable. It is given once, and not before
    /// there is a limit, which may be in the middle of the machine's life.
    pub fn timer_to_watch(&mut self) -> Option<BorrowedFd<'_>> {
        let timer = self.timer.as_ref()?;
        (!std::mem::replace(&mut self.watched, true)).then(|| timer.as_fd())
    }

    fn need_timer(&mut self) -> io::Result<()> {
        if self.timer.is_none() {
            // Non-blocking: an event loop may tell of an expiry that is no more, because the timer
            // was set anew.
            let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
            self.timer = Some(TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?);
        }
        Ok(())
    }

    /// As if so much time had passed since the last request: for tests that do not want to wait.
    #[cfg(test)]
    pub(crate) fn pass(&mut self, time: Duration) {
        for bucket in [&mut self.bandwidth, &mut self.ops].into_iter().flatten() {
            bucket.updated = bucket.updated.map(|updated| updated - time);
        }
        let Some(left) = self.time_left() else { return };
        let left = left.saturating_sub(time).max(Duration::from_nanos(1));
        let timer = self.timer.as_ref().unwrap();
        let after = Expiration::OneShot(TimeSpec::from_duration(left));
        timer.set(after, TimerSetTimeFlags::empty()).unwrap();
        if left.as_nanos() == 1 {
            use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
            let mut wait = [PollFd::new(timer.as_fd(), PollFlags::POLLIN)];
            assert_eq!(poll(&mut wait, PollTimeout::from(10_000u16)).unwrap(), 1);
        }
    }

    /// Until the timer fires.
    #[cfg(test)]
    fn time_left(&self) -> Option<Duration> {
        match self.timer.as_ref()?.get().unwrap()? {
            Expiration::OneShot(left) => Some(left.into()),
            other => panic!("{other:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn bucket(size: u64, burst: u64, refill_time_ms: u64) -> TokenBucket {
        TokenBucket::new(size, burst, refill_time_ms).unwrap()
    }

    /// Asks a bucket as a limiter does.
    fn consume(bucket: &mut TokenBucket, tokens: u64, now: Instant) -> bool {
        bucket.refill(now);
        let allowed = bucket.wait(tokens).is_zero();
        if allowed {
            bucket.take(tokens);
        }
        allowed
    }

    /// Tokens that a bucket may have given, in whole ones.
    fn share(size: u64, burst: u64, refill_time_ms: u64, elapsed: u64) -> u128 {
        let refilled =
            u128::from(elapsed) * u128::from(size) / (u128::from(refill_time_ms) * 1_000_000);
        u128::from(size) + u128::from(burst) + refilled
    }

    /// Numbers of every magnitude.
    fn any_magnitude() -> impl Strategy<Value = u64> {
        (any::<u64>(), 0..64u32).prop_map(|(number, shift)| number >> shift)
    }

    proptest! {
        /// A request larger than the bucket counts as the bucket when it is allowed; what it owes
        /// counts for all that come after it.
        #[test]
        fn nobody_gets_more_than_its_share(
            size in any_magnitude(),
            burst in any_magnitude(),
            refill_time_ms in any_magnitude(),
            requests in prop::collection::vec((any_magnitude(), any_magnitude()), 0..50),
        ) {
            let (size, refill_time_ms) = (size.max(1), refill_time_ms.max(1));
            let mut bucket = bucket(size, burst, refill_time_ms);
            let start = Instant::now();
            let (mut elapsed, mut consumed) = (0u64, 0u128);
            for (pause, tokens) in requests {
                // In all less than 300 years, which an Instant holds.
                elapsed += pause >> 8;
                if consume(&mut bucket, tokens, start + Duration::from_nanos(elapsed)) {
                    let most = share(size, burst, refill_time_ms, elapsed);
                    prop_assert!(tokens == 0 || consumed + u128::from(tokens.min(size)) <= most);
                    consumed += u128::from(tokens);
                }
            }
        }

        /// Whoever takes what there is gets all of it, to the token, at whatever moments it asks:
        /// no fraction is lost.
        #[test]
        fn a_busy_consumer_gets_exactly_its_share(
            size in 1..1_000_000u64,
            burst in 0..1000u64,
            refill_time_ms in 1..100_000u64,
            requests in prop::collection::vec(1..1_000_000u64, 1..50),
        ) {
            prop_assume!(u128::from(size) <= u128::from(refill_time_ms) * 1_000_000);
            let mut bucket = bucket(size, burst, refill_time_ms);
            let start = Instant::now();
            let (mut elapsed, mut consumed) = (0u64, 0u128);
            prop_assert!(consume(&mut bucket, burst, start));
            prop_assert!(consume(&mut bucket, size, start));
            consumed += u128::from(burst) + u128::from(size);
            for tokens in requests {
                let tokens = tokens % size + 1;
                let now = start + Duration::from_nanos(elapsed);
                prop_assert!(!consume(&mut bucket, tokens, now));
                // The wait is neither too long nor too short.
                elapsed += bucket.wait(tokens).as_nanos() as u64;
                let now = start + Duration::from_nanos(elapsed);
                prop_assert!(!consume(&mut bucket, tokens, now - Duration::from_nanos(1)));
                prop_assert!(consume(&mut bucket, tokens, now));
                consumed += u128::from(tokens);
                prop_assert_eq!(consumed, share(size, burst, refill_time_ms, elapsed));
            }
        }

        /// A snapshot is no difference for whoever asks after it, but that no time passes in it.
        #[test]
        fn what_is_restored_is_what_was_saved(
            size in any_magnitude(),
            burst in any_magnitude(),
            refill_time_ms in 1..10_000_000_000_000u64,
            requests in prop::collection::vec((any_magnitude(), any_magnitude()), 0..20),
            absence in 0..1_000_000_000_000_000u64,
        ) {
            let bandwidth = TokenBucket::new(size, burst, refill_time_ms);
            let mut limiter = RateLimiter::new(bandwidth, None).unwrap();
            let mut now = Instant::now();
            for (pause, tokens) in requests {
                now += Duration::from_nanos(pause >> 8);
                limiter.consume(tokens, 1, now);
            }
            let state = limiter.save(now);
            let text = serde_json::to_string(&state).unwrap();
            let state: RateLimiterState = serde_json::from_str(&text).unwrap();
            let later = now + Duration::from_nanos(absence);
            let restored = RateLimiter::restore(&state, later).unwrap();
            prop_assert_eq!(&restored.save(later), &state);
            let again = Duration::from_millis(7);
            prop_assert_eq!(restored.save(later + again), limiter.save(now + again));
        }

        /// Whatever a file says, a restored bucket gives no more than one can, and is filled again.
        #[test]
        fn a_state_that_makes_no_sense_is_a_bucket_all_the_same(
            state in (
                any_magnitude(), any_magnitude(), any_magnitude(),
                any_magnitude(), any_magnitude(), any_magnitude(),
            ).prop_map(|(size, refill_time_ms, one_time_burst, budget, debt, fraction)| {
                BucketState { size, refill_time_ms, one_time_burst, budget, debt, fraction }
            }),
        ) {
            let now = Instant::now();
            let restored = TokenBucket::restore(&state, now);
            prop_assert_eq!(restored.is_some(), state.size > 0 && state.refill_time_ms > 0);
            let Some(mut bucket) = restored else { return Ok(()) };
            prop_assert!(bucket.level <= state.size.into());
            let wait = bucket.wait(1);
            if wait < LONGEST_WAIT {
                prop_assert!(consume(&mut bucket, 1, now + wait));
            }
        }
    }

    #[test]
    fn a_size_or_a_time_of_nothing_is_no_limit() {
        assert_eq!(TokenBucket::new(0, 5, 100), None);
        assert_eq!(TokenBucket::new(5, 5, 0), None);
        let mut limiter = RateLimiter::new(None, None).unwrap();
        assert!(limiter.is_unlimited() && limiter.timer_to_watch().is_none());
        assert!(limiter.allows(u64::MAX, u64::MAX));
        assert!(!limiter.is_blocked() && limiter.timer.is_none());
    }

    /// Seven tokens in three seconds, looked at every 100 ns for one of them.
    #[test]
    fn looking_often_loses_nothing() {
        let start = Instant::now();
        let mut bucket = bucket(7, 0, 3000);
        assert!(consume(&mut bucket, 7, start));
        for step in 0..3_000_000u64 {
            bucket.refill(start + Duration::from_nanos(100 * step));
        }
        bucket.refill(start + 3 * SECOND - Duration::from_nanos(1));
        assert_eq!(bucket.level, 6);
        bucket.refill(start + 3 * SECOND);
        assert_eq!((bucket.level, bucket.fraction), (7, 0));
    }

    #[test]
    fn the_burst_goes_first_and_refilling_begins_when_it_is_gone() {
        let start = Instant::now();
        let mut bucket = bucket(10, 5, 1000);
        assert!(consume(&mut bucket, 3, start));
        assert_eq!((bucket.one_time_burst, bucket.level), (2, 10));
        // A year later nothing was added; what the burst lacks is taken from the bucket.
        let later = start + 365 * 24 * 3600 * SECOND;
        assert!(consume(&mut bucket, 12, later));
        assert_eq!((bucket.one_time_burst, bucket.level), (0, 0));
        assert!(!consume(&mut bucket, 1, later));
        assert!(consume(&mut bucket, 10, later + SECOND));
        assert!(!consume(&mut bucket, 1, later + SECOND));
    }

    #[test]
    fn rest_gives_no_more_than_a_full_bucket() {
        let start = Instant::now();
        let mut bucket = bucket(10, 0, 1000);
        assert!(consume(&mut bucket, 1, start));
        // Not half a token either.
        let later = start + 1000 * SECOND + Duration::from_millis(50);
        assert!(consume(&mut bucket, 10, later));
        assert_eq!(bucket.wait(1), Duration::from_millis(100));
    }

    #[test]
    fn a_request_larger_than_the_bucket_is_paid_for_afterwards() {
        let start = Instant::now();
        let mut bucket = bucket(10, 0, 1000);
        assert!(consume(&mut bucket, 35, start));
        // 2.5 times the refill time for what it took beyond the bucket, and then for one's own.
        assert_eq!(bucket.wait(1), Duration::from_millis(2600));
        assert!(!consume(&mut bucket, 1, start + 2 * SECOND));
        assert!(consume(&mut bucket, 0, start + 2 * SECOND));
        assert!(consume(&mut bucket, 1, start + Duration::from_millis(2600)));
        // The next large one waits for a full bucket.
        assert!(!consume(&mut bucket, 35, start + Duration::from_millis(3599)));
        assert!(consume(&mut bucket, 35, start + Duration::from_millis(3600)));
    }

    #[test]
    fn a_clock_that_goes_backwards_gives_nothing() {
        let start = Instant::now() + 100 * SECOND;
        let mut bucket = bucket(10, 0, 1000);
        assert!(consume(&mut bucket, 10, start));
        for _ in 0..3 {
            assert!(!consume(&mut bucket, 1, start - 50 * SECOND));
            assert!(!consume(&mut bucket, 1, start));
        }
    }

    #[test]
    fn a_request_takes_from_both_buckets_or_from_none() {
        let start = Instant::now();
        let (bytes, ops) = (bucket(100, 20, 1000), bucket(2, 0, 10_000));
        let mut limiter = RateLimiter::new(Some(bytes), Some(ops)).unwrap();
        assert!(limiter.consume(40, 1, start));
        let before = limiter.save(start);
        // Too many bytes for one, then too many operations for the other.
        assert!(!limiter.consume(90, 1, start));
        assert!(!limiter.consume(10, 2, start));
        assert_eq!(limiter.save(start), before);
        assert!(limiter.consume(80, 1, start));
    }

    #[test]
    fn the_timer_fires_when_the_request_is_allowed() {
        let hour = 3_600_000;
        let start = Instant::now();
        let mut limiter =
            RateLimiter::new(Some(bucket(60, 0, hour)), Some(bucket(4, 0, hour))).unwrap();
        assert_eq!(limiter.time_left(), None);
        assert!(limiter.consume(60, 1, start));
        assert_eq!(limiter.time_left(), None);
        // The later of both: 10 minutes for the bytes, 15 for the operations.
        assert!(!limiter.consume(10, 5, start));
        assert!(limiter.is_blocked());
        let near = |left: Duration, minutes: u64| {
            left <= Duration::from_secs(60 * minutes)
                && left > Duration::from_secs(60 * minutes - 30)
        };
        assert!(near(limiter.time_left().unwrap(), 15));
        assert!(!limiter.consume(30, 1, start));
        assert!(near(limiter.time_left().unwrap(), 30));
        // An event that is no more does not unblock.
        limiter.timer_fired();
        assert!(limiter.is_blocked());
        limiter.pass(Duration::from_secs(29 * 60));
        limiter.timer_fired();
        assert!(limiter.is_blocked());
        limiter.pass(Duration::from_secs(60));
        limiter.timer_fired();
        assert!(!limiter.is_blocked() && limiter.time_left().is_none());
        assert!(limiter.consume(30, 1, start));
    }

    #[test]
    fn limits_change_each_for_itself_and_unblock() {
        let start = Instant::now();
        let mut limiter = RateLimiter::default();
        limiter.update(BucketUpdate::None, BucketUpdate::Disabled).unwrap();
        assert!(limiter.is_unlimited() && limiter.timer_to_watch().is_none());
        limiter.update(BucketUpdate::Set(bucket(1, 0, 1000)), BucketUpdate::None).unwrap();
        assert!(limiter.timer_to_watch().is_some() && limiter.timer_to_watch().is_none());
        assert!(limiter.consume(1, 1, start) && !limiter.consume(1, 1, start));
        limiter.update(BucketUpdate::None, BucketUpdate::Set(bucket(1, 0, 1000))).unwrap();
        assert!(!limiter.is_blocked() && limiter.time_left().is_none());
        // The old bucket is as empty as it was.
        assert!(!limiter.consume(1, 1, start) && limiter.consume(0, 1, start));
        limiter.update(BucketUpdate::Disabled, BucketUpdate::None).unwrap();
        assert!(!limiter.consume(1, 1, start));
        limiter.update(BucketUpdate::None, BucketUpdate::Disabled).unwrap();
        assert!(limiter.is_unlimited() && limiter.consume(1, 1, start));
    }
}
