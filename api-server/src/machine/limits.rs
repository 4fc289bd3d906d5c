//! Limits on what a device moves: token buckets, as their holder's JSON has them.

use serde::{Deserialize, Serialize};

use super::MachineError;

/// Limits on bandwidth and on operations, each for itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiter {
    /// Bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    /// Operations: requests or frames.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

/// A bucket that refills evenly. With a size or a refill time of 0 it is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// Tokens it holds.
    pub size: u64,
    /// Tokens that are there once, at the beginning, beside those of the bucket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_time_burst: Option<u64>,
    /// Milliseconds in which an empty bucket fills.
    pub refill_time: u64,
}

/// `PATCH /drives/{drive_id}`: what changes of a drive while the guest runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartialDrive {
    /// Which drive.
    pub drive_id: String,
    /// The file from now on; the same path again tells of a new size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_on_host: Option<std::path::PathBuf>,
    /// The limits from now on; a bucket that is not named stays as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// `PATCH /network-interfaces/{iface_id}`: the limits from now on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartialNetworkInterface {
    /// Which interface.
    pub iface_id: String,
    /// On what the guest receives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// On what the guest sends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// `PATCH /pmem/{id}`: the limits from now on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartialPmem {
    /// Which device.
    pub id: String,
    /// The limits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// The guest's serial port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Serial {
    /// A file or FIFO that its output goes to, in place of standard output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial_out_path: Option<std::path::PathBuf>,
    /// A limit on its output in bytes; what is above it is dropped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<TokenBucket>,
}

impl PartialDrive {
    /// Refuses what changes nothing.
    pub fn check(&self) -> Result<(), MachineError> {
        if self.path_on_host.is_none() && self.rate_limiter.is_none() {
            return Err(MachineError::new(
                "at least one property to update: path_on_host or rate_limiter",
            ));
        }
        Ok(())
    }
}
