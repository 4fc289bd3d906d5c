//! Where RAM is, and what the kernel is told of it.

use std::num::NonZeroUsize;

use vm_memory::GuestAddress;
use vm_memory::bitmap::{AtomicBitmap, Bitmap, NewBitmap, WithBitmapSlice};

use crate::layout;

/// What a range of the memory map is for; the numbers are those of the e820 map and of PVH.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RangeKind {
    /// Usable RAM.
    Ram = 1,
    /// Not to be touched.
    Reserved = 2,
    /// ACPI tables, RAM once they were read.
    AcpiData = 3,
}

/// A range of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub size: u64,
    /// What it is for.
    pub kind: RangeKind,
}

/// The pages of a region that the monitor itself wrote, where somebody wants to know. What the
/// guest writes, KVM records.
#[derive(Debug, Default)]
pub struct DirtyBitmap(Option<AtomicBitmap>);

impl DirtyBitmap {
    /// A record of a region of so many bytes.
    pub fn tracking(bytes: usize) -> DirtyBitmap {
        DirtyBitmap(Some(AtomicBitmap::new(bytes, PAGE)))
    }

    /// Whether anything is recorded.
    pub fn is_tracking(&self) -> bool {
        self.0.is_some()
    }

    /// The record, one bit a page, which begins anew.
    pub fn take(&self) -> Vec<u64> {
        self.0.as_ref().map(AtomicBitmap::get_and_reset).unwrap_or_default()
    }
}

/// Bytes that a bit stands for, in this record as in KVM's.
const PAGE: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

impl<'a> WithBitmapSlice<'a> for DirtyBitmap {
    type S = <Option<AtomicBitmap> as WithBitmapSlice<'a>>::S;
}

impl Bitmap for DirtyBitmap {
    fn mark_dirty(&self, offset: usize, length: usize) {
        self.0.mark_dirty(offset, length);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.0.dirty_at(offset)
    }

    fn slice_at(&self, offset: usize) -> <Self as WithBitmapSlice<'_>>::S {
        self.0.slice_at(offset)
    }
}

/// Memory that is made without a word about it records nothing.
impl NewBitmap for DirtyBitmap {
    fn with_len(_bytes: usize) -> Self {
        DirtyBitmap(None)
    }
}

/// The pieces of guest memory of `size` bytes: one, or two around the MMIO hole.
pub fn regions(size: u64) -> Vec<(GuestAddress, usize)> {
    let low = size.min(layout::MMIO_HOLE);
    let mut regions = vec![(GuestAddress(0), low as usize)];
    if size > low {
        regions.push((GuestAddress(layout::MMIO_HOLE_END), (size - low) as usize));
    }
    regions
}

/// Where memory that is no RAM from the beginning may be, for RAM of `size` bytes: above it, and
/// aligned for whatever unit a guest plugs memory in.
pub fn above(size: u64) -> GuestAddress {
    const ALIGNMENT: u64 = 1 << 30;
    let end = layout::MMIO_HOLE_END + size.saturating_sub(layout::MMIO_HOLE);
    GuestAddress(end.next_multiple_of(ALIGNMENT))
}

/// End of the RAM below the MMIO hole, for memory of `size` bytes.
pub fn low_end(size: u64) -> u64 {
    size.min(layout::MMIO_HOLE)
}

/// The memory map for memory of `size` bytes.
pub fn map(size: u64) -> Vec<Range> {
    let acpi_end = layout::ACPI + layout::ACPI_SIZE;
    let mut map = vec![
        Range { start: 0, size: layout::LOW_RAM_END, kind: RangeKind::Ram },
        Range { start: layout::ACPI, size: layout::ACPI_SIZE, kind: RangeKind::AcpiData },
    ];
    for (start, size) in regions(size) {
        let from = start.0.max(acpi_end);
        let end = start.0 + size as u64;
        if end > from {
            map.push(Range { start: from, size: end - from, kind: RangeKind::Ram });
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_map_is_sorted_inside_memory_and_outside_the_hole(mib in 1u64..(1 << 20)) {
            let size = mib << 20;
            let regions = regions(size);
            prop_assert_eq!(regions.iter().map(|(_, size)| *size as u64).sum::<u64>(), size);
            let mut last = 0;
            for range in map(size) {
                prop_assert!(range.start >= last && range.size > 0);
                last = range.start + range.size;
                let inside = |(start, size): &(GuestAddress, usize)| {
                    start.0 <= range.start && last <= start.0 + *size as u64
                };
                prop_assert!(regions.iter().any(inside));
                prop_assert!(last <= layout::MMIO_HOLE || range.start >= layout::MMIO_HOLE_END);
            }
        }

        /// Memory that is plugged, and the PCI bus's window behind that, lie on nothing else.
        #[test]
        fn what_is_behind_ram_is_apart_from_it(mib in 1u64..(1 << 24), plugged in 0u64..(1 << 20)) {
            let size = mib << 20;
            let above = above(size).0;
            prop_assert!(above.is_multiple_of(1 << 30) && above >= layout::MMIO_HOLE_END);
            for (start, size) in regions(size) {
                prop_assert!(start.0 + size as u64 <= above);
            }
            let end = above + (plugged << 20);
            let window = layout::pci_memory_64(end);
            prop_assert!(window >= end && window.is_multiple_of(layout::PCI_MEMORY_64_SIZE));
        }
    }

    #[test]
    fn what_does_not_fit_below_the_hole_goes_above_four_gib() {
        let five = 5u64 << 30;
        assert_eq!(regions(five), [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 2 << 30)]);
    }
}
