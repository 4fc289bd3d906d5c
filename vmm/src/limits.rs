//! Limits of the API as the devices have them.

use std::io;

use api_server::machine::{RateLimiter as Limits, TokenBucket as Bucket};
use devices::rate_limiter::{BucketUpdate, RateLimiter, TokenBucket};

fn bucket(bucket: &Bucket) -> Option<TokenBucket> {
    TokenBucket::new(bucket.size, bucket.one_time_burst.unwrap_or(0), bucket.refill_time)
}

/// The limiter that was asked for; none is no limit.
pub fn limiter(limits: Option<&Limits>) -> io::Result<RateLimiter> {
    let part =
        |part: fn(&Limits) -> Option<Bucket>| limits.and_then(part).as_ref().and_then(bucket);
    RateLimiter::new(part(|limits| limits.bandwidth), part(|limits| limits.ops))
}

/// A limit on bytes alone.
pub fn byte_limiter(bytes: Option<&Bucket>) -> io::Result<RateLimiter> {
    RateLimiter::new(bytes.and_then(bucket), None)
}

/// What a `PATCH` changes: bandwidth, operations.
pub fn updates(limits: &Limits) -> (BucketUpdate, BucketUpdate) {
    let update = |given: &Option<Bucket>| match given {
        None => BucketUpdate::None,
        Some(given) => bucket(given).map_or(BucketUpdate::Disabled, BucketUpdate::Set),
    };
    (update(&limits.bandwidth), update(&limits.ops))
}
