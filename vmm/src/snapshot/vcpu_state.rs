//! The state of a virtual processor, as KVM gives and takes it.

#![allow(unsafe_code, reason = "KVM reads as much of an XSAVE area as CPUID says")]

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use crate::StartError;

const MSR_IA32_TSC: u32 = 0x10;
const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;
/// Registers in one call.
const MSRS_PER_CALL: usize = 256;

/// Where CPUID names features (Intel SDM, volume 2; AMD APM, volume 3, appendix E; KVM's own): leaf,
/// subleaf, and the bits of EAX, EBX, ECX and EDX that do. Without those by which KVM tells of a
/// processor's registers: MONITOR, OSXSAVE, APIC and OSPKE.
const FEATURES: [(u32, u32, [u32; 4]); 8] = [
    (0x1, 0, [0, 0, !(1 << 3 | 1 << 27), !(1 << 9)]),
    (0x7, 0, [0, !0, !(1 << 4), !0]),
    (0x7, 1, [!0; 4]),
    (0xd, 0, [!0, 0, 0, !0]),
    (0xd, 1, [!0, 0, 0, 0]),
    (0x4000_0001, 0, [!0, 0, 0, 0]),
    (0x8000_0001, 0, [0, 0, !0, !0]),
    (0x8000_0008, 0, [0, !0, 0, 0]),
];

/// All that a processor is.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    cpuid: Vec<kvm_cpuid_entry2>,
    msrs: Vec<kvm_msr_entry>,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
    tsc_khz: Option<u32>,
}

impl VcpuState {
    /// Asks KVM, also for these model-specific registers. The order matters: the state of halting is brought up to date first, and reading
    /// registers may change pending events.
    pub fn save(vcpu: &VcpuFd, saved_msrs: &[u32]) -> Result<VcpuState, StartError> {
        let mp_state = vcpu.get_mp_state().map_err(StartError::kvm("KVM_GET_MP_STATE"))?;
        let regs = vcpu.get_regs().map_err(StartError::kvm("KVM_GET_REGS"))?;
        let sregs = vcpu.get_sregs().map_err(StartError::kvm("KVM_GET_SREGS"))?;
        let xsave = vcpu.get_xsave().map_err(StartError::kvm("KVM_GET_XSAVE"))?;
        let xcrs = vcpu.get_xcrs().map_err(StartError::kvm("KVM_GET_XCRS"))?;
        let debug_regs = vcpu.get_debug_regs().map_err(StartError::kvm("KVM_GET_DEBUGREGS"))?;
        let lapic = vcpu.get_lapic().map_err(StartError::kvm("KVM_GET_LAPIC"))?;
        let tsc_khz = vcpu.get_tsc_khz().ok();
        let cpuid =
            vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(StartError::kvm("KVM_GET_CPUID2"))?;
        let msrs = read_msrs(vcpu, saved_msrs)?;
        let events = vcpu.get_vcpu_events().map_err(StartError::kvm("KVM_GET_VCPU_EVENTS"))?;
        let cpuid = cpuid.as_slice().to_vec();
        Ok(VcpuState {
            cpuid,
            msrs,
            regs,
            sregs,
            xsave,
            xcrs,
            debug_regs,
            lapic,
            events,
            mp_state,
            tsc_khz,
        })
    }

    /// Refuses a state of another maker's processor, or of one with features that a new processor of
    /// this machine would not have, whose leaves these are: its guest has chosen its code by them.
    pub fn check(&self, leaves: &CpuId) -> Result<(), StartError> {
        let refused = |reason: String| StartError::device("snapshot")(reason);
        let vendor = |leaves: &[kvm_cpuid_entry2]| {
            let leaf = leaves.iter().find(|leaf| leaf.function == 0)?;
            Some((leaf.ebx, leaf.ecx, leaf.edx))
        };
        if vendor(&self.cpuid) != vendor(leaves.as_slice()) {
            return Err(refused("it was taken on a processor of another maker".to_owned()));
        }
        for (leaf, subleaf, masks) in FEATURES {
            let registers = |leaves: &[kvm_cpuid_entry2]| {
                let mut leaves = leaves.iter();
                let found = leaves.find(|entry| (entry.function, entry.index) == (leaf, subleaf));
                found.map_or([0; 4], |entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
            };
            let (saved, here) = (registers(&self.cpuid), registers(leaves.as_slice()));
            let names = ["EAX", "EBX", "ECX", "EDX"];
            for (name, ((saved, here), mask)) in
                names.into_iter().zip(saved.iter().zip(here).zip(masks))
            {
                let missing = saved & !here & mask;
                if missing != 0 {
                    return Err(refused(format!(
                        "it was taken on a processor with features that there are not here: CPUID leaf \
                         {leaf:#x}, subleaf {subleaf}, {name}: {missing:#x}"
                    )));
                }
            }
        }
        Ok(())
    }

    /// Makes a new processor this one. The order matters: CPUID decides what registers may hold,
    /// the local APIC's mode is in the special registers, and its timer is armed by a register that
    /// needs both the APIC and the time stamp counter.
    pub fn restore(&self, vcpu: &VcpuFd) -> Result<(), StartError> {
        let cpuid = CpuId::from_entries(&self.cpuid).map_err(StartError::device("CPUID"))?;
        vcpu.set_cpuid2(&cpuid).map_err(StartError::kvm("KVM_SET_CPUID2"))?;
        if let Some(khz) = self.tsc_khz
            && vcpu.get_tsc_khz().is_ok_and(|own| own != khz)
        {
            vcpu.set_tsc_khz(khz).map_err(StartError::kvm("KVM_SET_TSC_KHZ"))?;
        }
        vcpu.set_mp_state(self.mp_state).map_err(StartError::kvm("KVM_SET_MP_STATE"))?;
        vcpu.set_regs(&self.regs).map_err(StartError::kvm("KVM_SET_REGS"))?;
        vcpu.set_sregs(&self.sregs).map_err(StartError::kvm("KVM_SET_SREGS"))?;
        // SAFETY: the structure is as large as KVM_CAP_XSAVE2 says where no dynamic feature was
        // asked for, which this process never does.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(StartError::kvm("KVM_SET_XSAVE"))?;
        vcpu.set_xcrs(&self.xcrs).map_err(StartError::kvm("KVM_SET_XCRS"))?;
        vcpu.set_debug_regs(&self.debug_regs).map_err(StartError::kvm("KVM_SET_DEBUGREGS"))?;
        vcpu.set_lapic(&self.lapic).map_err(StartError::kvm("KVM_SET_LAPIC"))?;
        let (deadline, others): (Vec<_>, Vec<_>) =
            self.msrs.iter().partition(|msr| msr.index == MSR_IA32_TSC_DEADLINE);
        for part in others.chunks(MSRS_PER_CALL).chain([deadline.as_slice()]) {
            write_msrs(vcpu, part)?;
        }
        vcpu.set_vcpu_events(&self.events).map_err(StartError::kvm("KVM_SET_VCPU_EVENTS"))
    }
}

/// Registers whose values are part of a processor's state.
///
/// The kernel names those that can be read; some of them hold what belongs to the host, or what
/// KVM does not let be written back.
pub fn saved_msrs(kvm: &Kvm) -> Result<Vec<u32>, StartError> {
    let list = kvm.get_msr_index_list().map_err(StartError::kvm("KVM_GET_MSR_INDEX_LIST"))?;
    let mut list = list.as_slice().to_vec();
    // First, so that everything that counts from it comes after it.
    list.sort_by_key(|index| *index != MSR_IA32_TSC);
    Ok(list)
}

fn read_msrs(vcpu: &VcpuFd, saved: &[u32]) -> Result<Vec<kvm_msr_entry>, StartError> {
    let mut wanted: Vec<kvm_msr_entry> =
        saved.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
    let mut read = Vec::with_capacity(wanted.len());
    while !wanted.is_empty() {
        let part = wanted.len().min(MSRS_PER_CALL);
        let mut msrs = Msrs::from_entries(&wanted[..part]).map_err(StartError::device("MSRs"))?;
        let got = vcpu.get_msrs(&mut msrs).map_err(StartError::kvm("KVM_GET_MSRS"))?;
        read.extend_from_slice(&msrs.as_slice()[..got]);
        // KVM stops at one that this processor does not have.
        wanted.drain(..part.min(if got < part { got + 1 } else { got }));
    }
    // One that is zero was never used, and some of those cannot be written at all.
    read.retain(|msr| msr.data != 0 || msr.index == MSR_IA32_TSC);
    Ok(read)
}

fn write_msrs(vcpu: &VcpuFd, entries: &[&kvm_msr_entry]) -> Result<(), StartError> {
    let mut entries: Vec<kvm_msr_entry> = entries.iter().map(|entry| **entry).collect();
    while !entries.is_empty() {
        let msrs = Msrs::from_entries(&entries).map_err(StartError::device("MSRs"))?;
        let set = vcpu.set_msrs(&msrs).map_err(StartError::kvm("KVM_SET_MSRS"))?;
        let Some(refused) = entries.get(set) else { break };
        tracing::warn!("KVM does not take MSR {:#x} = {:#x}", refused.index, refused.data);
        entries.drain(..=set);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, ebx: u32, ecx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, ebx, ecx, ..Default::default() }
    }

    fn state(cpuid: Vec<kvm_cpuid_entry2>) -> VcpuState {
        VcpuState {
            cpuid,
            msrs: Vec::new(),
            regs: kvm_regs::default(),
            sregs: kvm_sregs::default(),
            xsave: kvm_xsave::default(),
            xcrs: kvm_xcrs::default(),
            debug_regs: kvm_debugregs::default(),
            lapic: kvm_lapic_state::default(),
            events: kvm_vcpu_events::default(),
            mp_state: kvm_mp_state::default(),
            tsc_khz: None,
        }
    }

    /// docs/hostile.md 25: a state of another processor.
    #[test]
    fn hostile_25_processors_with_what_this_host_has_not_are_refused() {
        const OSXSAVE: u32 = 1 << 27;
        const AVX512F: u32 = 1 << 16;
        let here = [leaf(0, 0, 1, 2), leaf(1, 0, 9, 0xf0), leaf(7, 0, 0xff, 0), leaf(7, 1, 0, 0)];
        let here = CpuId::from_entries(&here).unwrap();
        let said = |cpuid: &[kvm_cpuid_entry2]| match state(cpuid.to_vec()).check(&here) {
            Ok(()) => String::new(),
            Err(error) => error.to_string(),
        };
        // The same, fewer features, other identifiers, and what the guest itself switched on.
        let fewer = [leaf(0, 0, 1, 2), leaf(1, 0, 77, 0x10 | OSXSAVE), leaf(7, 0, 0, 0)];
        for good in [here.as_slice(), &fewer, &fewer[..1]] {
            assert_eq!(said(good), "");
        }
        assert!(said(&[leaf(0, 0, 1, 3)]).contains("another maker"));
        assert!(said(&[]).contains("another maker"));
        let more = said(&[leaf(0, 0, 1, 2), leaf(7, 0, 0xff | AVX512F, 0)]);
        assert!(more.contains("leaf 0x7, subleaf 0, EBX: 0x10000"), "{more}");
        // In a leaf that is not here at all.
        let more = said(&[leaf(0, 0, 1, 2), leaf(0x8000_0008, 0, 4, 0)]);
        assert!(more.contains("leaf 0x80000008, subleaf 0, EBX: 0x4"), "{more}");
    }
}
