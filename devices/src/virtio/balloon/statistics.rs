//! What the driver tells of its memory (virtio 1.2, 5.5.6.3).

use serde::Serialize;

use crate::GuestMemory;
use crate::virtio::queue::Buffers;

/// Tags there are; those from 10 on are newer than virtio 1.2.
const TAGS: usize = 16;
/// A tag of 16 bits, then a value of 64.
const ENTRY: usize = 10;
/// Most entries read from one buffer: room for tags to come, and for a driver that repeats some.
const MAX_ENTRIES: usize = 4 * TAGS;

/// The latest value of each tag, where there was one.
pub type Values = [Option<u64>; TAGS];

/// The latest statistics, as the driver gives them: not to be trusted. The names are those of
/// Firecracker's `BalloonStats`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BalloonStatistics {
    /// Pages of 4 KiB that the host wants in the balloon.
    pub target_pages: u32,
    /// Pages of 4 KiB that are in it, as the driver says.
    pub actual_pages: u32,
    /// The target in MiB.
    pub target_mib: u32,
    /// What is in it in MiB.
    pub actual_mib: u32,
    /// Bytes swapped in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_in: Option<u64>,
    /// Bytes swapped out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_out: Option<u64>,
    /// Page faults that needed the disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub major_faults: Option<u64>,
    /// Page faults that did not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minor_faults: Option<u64>,
    /// Bytes not used for anything.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free_memory: Option<u64>,
    /// Bytes of memory in all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_memory: Option<u64>,
    /// Bytes that programs could have without swapping, an estimate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub available_memory: Option<u64>,
    /// Bytes of caches that could be dropped at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_caches: Option<u64>,
    /// Huge pages handed out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugetlb_allocations: Option<u64>,
    /// Huge pages asked for in vain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugetlb_failures: Option<u64>,
    /// Times that a process was killed for lack of memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oom_kill: Option<u64>,
    /// Times that memory was not there at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alloc_stall: Option<u64>,
    /// Pages looked at for reclaim, in the background.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub async_scan: Option<u64>,
    /// Pages looked at for reclaim, while somebody waited.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direct_scan: Option<u64>,
    /// Pages reclaimed in the background.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub async_reclaim: Option<u64>,
    /// Pages reclaimed while somebody waited.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direct_reclaim: Option<u64>,
}

impl BalloonStatistics {
    /// Names the driver's values (virtio 1.2, 5.5.6.4: each index is a tag).
    pub(super) fn new(values: Values, target_pages: u32, actual_pages: u32) -> BalloonStatistics {
        let [
            swap_in,
            swap_out,
            major_faults,
            minor_faults,
            free_memory,
            total_memory,
            available_memory,
            disk_caches,
            hugetlb_allocations,
            hugetlb_failures,
            oom_kill,
            alloc_stall,
            async_scan,
            direct_scan,
            async_reclaim,
            direct_reclaim,
        ] = values;
        BalloonStatistics {
            target_pages,
            actual_pages,
            target_mib: target_pages / super::PAGES_PER_MIB,
            actual_mib: actual_pages / super::PAGES_PER_MIB,
            swap_in,
            swap_out,
            major_faults,
            minor_faults,
            free_memory,
            total_memory,
            available_memory,
            disk_caches,
            hugetlb_allocations,
            hugetlb_failures,
            oom_kill,
            alloc_stall,
            async_scan,
            direct_scan,
            async_reclaim,
            direct_reclaim,
        }
    }
}

/// Reads the driver's buffer. A tag that is not in it keeps its value; one that is not known is
/// ignored.
pub fn update(values: &mut Values, buffer: &Buffers, memory: &GuestMemory) {
    let mut bytes = [0; ENTRY * MAX_ENTRIES];
    let got = buffer.read(memory, 0, &mut bytes).unwrap_or(0);
    for entry in bytes[..got].as_chunks::<ENTRY>().0 {
        let [t0, t1, value @ ..] = *entry;
        let tag = usize::from(u16::from_le_bytes([t0, t1]));
        if let Some(slot) = values.get_mut(tag) {
            *slot = Some(u64::from_le_bytes(value));
        }
    }
}
