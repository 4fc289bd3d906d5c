//! What virtual processors begin as.

use api_server::machine::{CpuConfig, MachineConfig};
use arch::boot::Entry;
use arch::cpuid::{self, Topology};
use arch::registers;
use devices::GuestMemory;
use kvm_bindings::{CpuId, Msrs};
use kvm_ioctls::{VcpuFd, VmFd};

use crate::{StartError, cpu_template};

/// What a processor is to be.
#[derive(Clone, Copy)]
pub(super) struct VcpuPlan<'a> {
    /// Its number, which is its APIC id.
    pub id: u8,
    /// The machine's processors.
    pub config: &'a MachineConfig,
    /// What is to be changed of them.
    pub template: &'a CpuConfig,
}

impl VcpuPlan<'_> {
    /// Its CPUID leaves on a host that supports these.
    pub fn leaves(&self, supported: &CpuId) -> Result<CpuId, StartError> {
        let threads_per_core = if self.config.smt && self.config.vcpu_count > 1 { 2 } else { 1 };
        let topology = Topology { vcpus: self.config.vcpu_count, threads_per_core };
        let mut leaves = cpuid::of_vcpu(supported, self.id, topology)?;
        cpu_template::modify_cpuid(&mut leaves, self.template)?;
        Ok(leaves)
    }
}

/// Makes a processor; the first one is about to enter the kernel.
pub(super) fn make(
    vm: &VmFd,
    plan: &VcpuPlan,
    supported: &CpuId,
    entry: &Entry,
    memory: &GuestMemory,
) -> Result<VcpuFd, StartError> {
    let vcpu = vm.create_vcpu(plan.id.into()).map_err(StartError::kvm("KVM_CREATE_VCPU"))?;
    let leaves = plan.leaves(supported)?;
    vcpu.set_cpuid2(&leaves).map_err(StartError::kvm("KVM_SET_CPUID2"))?;
    cpu_template::modify_msrs(&vcpu, plan.template)?;
    // The others wait for the boot processor's INIT and SIPI in the state KVM made them in.
    if plan.id != 0 {
        return Ok(vcpu);
    }
    let msrs = registers::model_specific();
    let wanted = msrs.len();
    let msrs = Msrs::from_entries(&msrs).map_err(StartError::device("MSRs"))?;
    let set = vcpu.set_msrs(&msrs).map_err(StartError::kvm("KVM_SET_MSRS"))?;
    if set != wanted {
        let index = msrs.as_slice().get(set).map_or(0, |entry| entry.index);
        tracing::debug!("KVM does not take MSR {index:#x}");
    }
    vcpu.set_fpu(&registers::floating_point()).map_err(StartError::kvm("KVM_SET_FPU"))?;
    let mut special = vcpu.get_sregs().map_err(StartError::kvm("KVM_GET_SREGS"))?;
    registers::special(memory, entry, &mut special)?;
    vcpu.set_sregs(&special).map_err(StartError::kvm("KVM_SET_SREGS"))?;
    vcpu.set_regs(&registers::general(entry)).map_err(StartError::kvm("KVM_SET_REGS"))?;
    Ok(vcpu)
}
