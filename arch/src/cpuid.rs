//! What a virtual processor says of itself: KVM's supported CPUID, with the topology of this VM.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Why the leaves could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CpuidError {
    /// More leaves than KVM takes.
    #[error("too many CPUID leaves for KVM")]
    TooMany,
}

/// The processors of a VM: one package, `threads_per_core` threads a core.
#[derive(Clone, Copy, Debug)]
pub struct Topology {
    /// Number of virtual processors, at least one.
    pub vcpus: u8,
    /// 1, or 2 with SMT.
    pub threads_per_core: u8,
}

impl Topology {
    /// Bits of an APIC id that number the threads of a core.
    fn thread_bits(self) -> u32 {
        bits(self.threads_per_core)
    }

    /// Bits of an APIC id that number all processors of the package.
    fn package_bits(self) -> u32 {
        bits(self.vcpus)
    }
}

fn bits(count: u8) -> u32 {
    u32::from(count.max(1)).next_power_of_two().trailing_zeros()
}

/// The leaves of the processor with this APIC id, from those that KVM supports
/// (`KVM_GET_SUPPORTED_CPUID`). Intel SDM, volume 2, CPUID; AMD APM, volume 3, appendix E.
pub fn of_vcpu(supported: &CpuId, apic_id: u8, topology: Topology) -> Result<CpuId, CpuidError> {
    let mut leaves: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        // Made anew below, for as many levels as there are.
        .filter(|leaf| !matches!(leaf.function, 0xb | 0x1f))
        .copied()
        .collect();
    let amd =
        leaves.iter().any(|leaf| leaf.function == 0 && leaf.ebx == u32::from_le_bytes(*b"Auth"));
    for leaf in &mut leaves {
        adjust(leaf, apic_id, topology);
    }
    let highest = leaves.iter().find(|leaf| leaf.function == 0).map_or(0, |leaf| leaf.eax);
    if highest >= 0xb {
        leaves.extend(extended_topology(0xb, apic_id, topology));
    }
    if highest >= 0x1f && !amd {
        leaves.extend(extended_topology(0x1f, apic_id, topology));
    }
    CpuId::from_entries(&leaves).map_err(|_| CpuidError::TooMany)
}

fn adjust(leaf: &mut kvm_cpuid_entry2, apic_id: u8, topology: Topology) {
    let set = |word: &mut u32, shift: u32, width: u32, value: u32| {
        let mask = ((1u64 << width) - 1) as u32;
        *word = (*word & !(mask << shift)) | ((value & mask) << shift);
    };
    let package_ids = 1u32 << topology.package_bits();
    match leaf.function {
        0x1 => {
            const X2APIC: u32 = 1 << 21;
            const TSC_DEADLINE: u32 = 1 << 24;
            const HYPERVISOR: u32 = 1 << 31;
            const HYPER_THREADING: u32 = 1 << 28;
            set(&mut leaf.ebx, 24, 8, apic_id.into());
            set(&mut leaf.ebx, 16, 8, package_ids);
            leaf.ecx |= X2APIC | TSC_DEADLINE | HYPERVISOR;
            if topology.vcpus > 1 {
                leaf.edx |= HYPER_THREADING;
            } else {
                leaf.edx &= !HYPER_THREADING;
            }
        }
        // Deterministic cache parameters: who shares each cache.
        0x4 if leaf.eax & 0x1f != 0 => {
            let level = (leaf.eax >> 5) & 7;
            let sharing = if level < 3 { topology.threads_per_core.into() } else { package_ids };
            set(&mut leaf.eax, 14, 12, sharing - 1);
            set(&mut leaf.eax, 26, 6, (package_ids >> topology.thread_bits()) - 1);
        }
        // No power management and no performance counters to promise.
        0x6 => {
            const ALWAYS_RUNNING_TIMER: u32 = 1 << 2;
            leaf.eax &= ALWAYS_RUNNING_TIMER;
            leaf.ebx = 0;
            leaf.ecx = 0;
        }
        0xa => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
        0x8000_0008 => {
            set(&mut leaf.ecx, 0, 8, u32::from(topology.vcpus) - 1);
            set(&mut leaf.ecx, 12, 4, topology.package_bits());
        }
        0x8000_001d if leaf.eax & 0x1f != 0 => {
            let level = (leaf.eax >> 5) & 7;
            let sharing = if level < 3 { topology.threads_per_core.into() } else { package_ids };
            set(&mut leaf.eax, 14, 12, sharing - 1);
        }
        0x8000_001e => {
            leaf.eax = apic_id.into();
            leaf.ebx = u32::from(apic_id) >> topology.thread_bits();
            set(&mut leaf.ebx, 8, 8, u32::from(topology.threads_per_core) - 1);
            leaf.ecx = 0;
        }
        _ => {}
    }
}

/// Leaves 0xb and 0x1f: a level for threads, one for cores, and the end.
fn extended_topology(
    function: u32,
    apic_id: u8,
    topology: Topology,
) -> impl Iterator<Item = kvm_cpuid_entry2> {
    const THREADS: u32 = 1;
    const CORES: u32 = 2;
    let levels = [
        (topology.thread_bits(), u32::from(topology.threads_per_core), THREADS),
        (topology.package_bits(), u32::from(topology.vcpus), CORES),
        (0, 0, 0),
    ];
    (0u32..).zip(levels).map(move |(index, (shift, count, kind))| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: (kind << 8) | index,
        edx: apic_id.into(),
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let leaf =
            |function, eax, ebx| kvm_cpuid_entry2 { function, eax, ebx, ..Default::default() };
        CpuId::from_entries(&[
            leaf(0, 0x1f, 0),
            leaf(1, 0, 0),
            leaf(4, 1 << 5 | 1, 0),
            leaf(4, 3 << 5 | 3, 0),
            leaf(0xb, 99, 99),
            leaf(0x8000_0008, 0, 0),
            leaf(0x8000_001e, 0, 0),
        ])
        .unwrap()
    }

    #[test]
    fn each_processor_has_its_id_and_all_see_one_package() {
        for vcpus in 1..=32u8 {
            let topology = Topology { vcpus, threads_per_core: 1 };
            for id in 0..vcpus {
                let leaves = of_vcpu(&supported(), id, topology).unwrap();
                let find = |function, index| {
                    *leaves
                        .as_slice()
                        .iter()
                        .find(|leaf| (leaf.function, leaf.index) == (function, index))
                        .unwrap()
                };
                let one = find(1, 0);
                assert_eq!(one.ebx >> 24, u32::from(id));
                assert!((one.ebx >> 16) & 0xff >= u32::from(vcpus));
                assert_ne!(one.ecx & (1 << 31), 0);
                for function in [0xb, 0x1f] {
                    assert_eq!(find(function, 1).edx, u32::from(id));
                    assert_eq!(find(function, 1).ebx, u32::from(vcpus));
                    assert!(1 << find(function, 1).eax >= u32::from(vcpus));
                    assert_eq!(find(function, 2).ecx, 2);
                }
                assert_eq!(find(0x8000_001e, 0).eax, u32::from(id));
                assert_eq!(find(0x8000_0008, 0).ecx & 0xff, u32::from(vcpus) - 1);
            }
        }
    }

    #[test]
    fn threads_of_a_core_share_its_caches() {
        let topology = Topology { vcpus: 4, threads_per_core: 2 };
        let leaves = of_vcpu(&supported(), 3, topology).unwrap();
        let caches: Vec<_> = leaves.as_slice().iter().filter(|leaf| leaf.function == 4).collect();
        assert_eq!((caches[0].eax >> 14) & 0xfff, 1);
        assert_eq!((caches[1].eax >> 14) & 0xfff, 3);
        assert_eq!(caches[0].eax >> 26, 1);
    }
}
