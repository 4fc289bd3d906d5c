//! The balloon's objects.

use serde::{Deserialize, Serialize};

/// A balloon device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// Target size in MiB.
    pub amount_mib: u32,
    /// The guest may take pages back when it runs out of memory.
    pub deflate_on_oom: bool,
    /// Seconds between statistics; 0 for none, ever.
    #[serde(default)]
    pub stats_polling_interval_s: u16,
    /// Offer free page hinting.
    #[serde(default)]
    pub free_page_hinting: bool,
    /// Offer free page reporting.
    #[serde(default)]
    pub free_page_reporting: bool,
}

/// `PATCH /balloon`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonUpdate {
    /// Target size in MiB.
    pub amount_mib: u32,
}

/// `PATCH /balloon/statistics`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonStatsUpdate {
    /// Seconds between statistics.
    pub stats_polling_interval_s: u16,
}

/// `PATCH /balloon/hinting/start`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonHintingStart {
    /// Let the guest use its pages again as soon as it has told of all of them.
    #[serde(default = "super::model::yes")]
    pub acknowledge_on_stop: bool,
}

impl Default for BalloonHintingStart {
    fn default() -> Self {
        BalloonHintingStart { acknowledge_on_stop: true }
    }
}
