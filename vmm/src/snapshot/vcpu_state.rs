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

    /// Refuses a state of another maker's processor: its features cannot be had here, and its
    /// guest has chosen its code by them.
    pub fn check_vendor(&self, supported: &CpuId) -> Result<(), StartError> {
        let vendor = |leaves: &[kvm_cpuid_entry2]| {
            let leaf = leaves.iter().find(|leaf| leaf.function == 0)?;
            Some((leaf.ebx, leaf.ecx, leaf.edx))
        };
        if vendor(&self.cpuid) != vendor(supported.as_slice()) {
            return Err(StartError::Device {
                device: "snapshot".to_owned(),
                reason: "it was taken on a processor of another maker".to_owned(),
            });
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
