//! A JSON line as Firecracker writes it.

use std::collections::BTreeMap;
use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use devices::legacy::i8042::I8042Metrics;
use devices::legacy::serial::SerialMetrics;
use devices::virtio::balloon::BalloonMetrics;
use devices::virtio::block::BlockMetrics;
use devices::virtio::mem::MemMetrics;
use devices::virtio::net::NetMetrics;
use devices::virtio::pmem::PmemMetrics;
use devices::virtio::rng::RngMetrics;
use devices::virtio::vsock::VsockMetrics;
use mmds::MmdsMetrics;
use serde::Serialize;
use telemetry::{Kind, Readings};

use super::Sample;
use crate::vcpu::VcpuMetrics;

/// What each count was: by group, name of the thing, and name of the number.
pub type Previous = BTreeMap<(&'static str, Option<String>, &'static str), u64>;

/// Numbers by group and name.
pub type Groups = BTreeMap<String, BTreeMap<&'static str, u64>>;

/// Kinds of things of which each has a group of its own, beside the one of their sum.
const SEVERAL: [&str; 3] = ["block", "net", "pmem"];

/// Groups that each line has, whether there is such a device or not.
pub fn always() -> [Readings; 11] {
    [
        BalloonMetrics::default().readings(),
        BlockMetrics::default().readings(),
        I8042Metrics::default().readings(),
        MemMetrics::default().readings(),
        MmdsMetrics::default().readings(),
        NetMetrics::default().readings(),
        PmemMetrics::default().readings(),
        RngMetrics::default().readings(),
        SerialMetrics::default().readings(),
        VcpuMetrics::default().readings(),
        VsockMetrics::default().readings(),
    ]
}

/// The numbers of a line, and what the line after it is to compare with.
pub fn groups(samples: &[Sample], previous: &Previous) -> (Groups, Previous) {
    let mut groups = Groups::new();
    for readings in always() {
        let group = groups.entry(readings.group.to_owned()).or_default();
        group.extend(readings.readings.iter().map(|reading| (reading.name, reading.value)));
    }
    let mut now = Previous::new();
    for Sample { name, readings } in samples {
        let own = name.as_ref().filter(|_| SEVERAL.contains(&readings.group));
        for reading in &readings.readings {
            let value = match readings.kind {
                Kind::Microseconds => reading.value,
                Kind::Counter => {
                    let key = (readings.group, name.clone(), reading.name);
                    let before = previous.get(&key).copied().unwrap_or(0);
                    now.insert(key, reading.value);
                    // Another device may have taken the place of one that is gone.
                    reading.value.checked_sub(before).unwrap_or(reading.value)
                }
            };
            let sum = groups.entry(readings.group.to_owned()).or_default();
            *sum.entry(reading.name).or_default() += value;
            if let Some(name) = own {
                let group = groups.entry(format!("{}_{name}", readings.group)).or_default();
                group.insert(reading.name, value);
            }
        }
    }
    (groups, now)
}

#[derive(Serialize)]
struct Line<'a> {
    utc_timestamp_ms: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    properties: &'a BTreeMap<String, String>,
    #[serde(flatten)]
    groups: &'a Groups,
}

/// A line with these numbers, of this moment.
pub fn line(
    id: Option<&str>,
    properties: &BTreeMap<String, String>,
    groups: &Groups,
) -> io::Result<Vec<u8>> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let utc_timestamp_ms = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
    let mut line = serde_json::to_vec(&Line { utc_timestamp_ms, id, properties, groups })?;
    line.push(b'\n');
    Ok(line)
}
