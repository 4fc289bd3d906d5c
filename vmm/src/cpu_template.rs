//! Carrying out a custom CPU template.

use api_server::machine::{CpuConfig, CpuidRegister};
use kvm_bindings::{CpuId, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use crate::StartError;

/// Refuses a template that asks for what this KVM does not have.
pub fn check_capabilities(kvm: &Kvm, template: &CpuConfig) -> Result<(), StartError> {
    for capability in &template.kvm_capabilities {
        if capability.required && kvm.check_extension_raw(capability.number.into()) <= 0 {
            return Err(failed(format!("KVM has no capability {}", capability.number)));
        }
    }
    Ok(())
}

/// Changes CPUID leaves, which must be there.
pub fn modify_cpuid(cpuid: &mut CpuId, template: &CpuConfig) -> Result<(), StartError> {
    for change in &template.cpuid_modifiers {
        let (leaf, subleaf) = (change.leaf.0, change.subleaf.0);
        let entry = cpuid
            .as_mut_slice()
            .iter_mut()
            .find(|entry| entry.function == leaf && entry.index == subleaf)
            .ok_or_else(|| {
                failed(format!("this processor has no CPUID leaf {leaf:#x}, subleaf {subleaf:#x}"))
            })?;
        entry.flags = change.flags;
        for modifier in &change.modifiers {
            let register = match modifier.register {
                CpuidRegister::Eax => &mut entry.eax,
                CpuidRegister::Ebx => &mut entry.ebx,
                CpuidRegister::Ecx => &mut entry.ecx,
                CpuidRegister::Edx => &mut entry.edx,
            };
            *register = modifier.bitmap.apply((*register).into()) as u32;
        }
    }
    Ok(())
}

/// Changes model-specific registers, each of which KVM must have.
pub fn modify_msrs(vcpu: &VcpuFd, template: &CpuConfig) -> Result<(), StartError> {
    for change in &template.msr_modifiers {
        let index = change.addr.0;
        let refused = || failed(format!("KVM does not let MSR {index:#x} be changed"));
        let entry = kvm_msr_entry { index, ..Default::default() };
        let mut msrs = Msrs::from_entries(&[entry]).map_err(StartError::device("MSRs"))?;
        let got = vcpu.get_msrs(&mut msrs).map_err(StartError::kvm("KVM_GET_MSRS"))?;
        let entry = msrs.as_mut_slice().first_mut().filter(|_| got == 1).ok_or_else(refused)?;
        entry.data = change.bitmap.apply(entry.data);
        if vcpu.set_msrs(&msrs).map_err(StartError::kvm("KVM_SET_MSRS"))? != 1 {
            return Err(refused());
        }
    }
    Ok(())
}

fn failed(reason: String) -> StartError {
    StartError::Device { device: "CPU template".to_owned(), reason }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_cpuid_entry2;

    use super::*;

    #[test]
    fn leaves_change_as_the_template_says_and_no_other() {
        let leaf = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            eax: 0b1010,
            edx: 7,
            ..Default::default()
        };
        let mut cpuid = CpuId::from_entries(&[leaf(1, 0), leaf(7, 0), leaf(7, 1)]).unwrap();
        let text = |subleaf: &str| {
            format!(
                r#"{{"cpuid_modifiers": [{{"leaf": "0x7", "subleaf": "{subleaf}", "flags": 1,
                "modifiers": [{{"register": "eax", "bitmap": "0b01x1"}}]}}]}}"#
            )
        };
        let template: CpuConfig = serde_json::from_str(&text("1")).unwrap();
        modify_cpuid(&mut cpuid, &template).unwrap();
        let registers: Vec<_> =
            cpuid.as_slice().iter().map(|leaf| (leaf.eax, leaf.edx, leaf.flags)).collect();
        assert_eq!(registers, [(0b1010, 7, 0), (0b1010, 7, 0), (0b0111, 7, 1)]);
        let template: CpuConfig = serde_json::from_str(&text("2")).unwrap();
        assert!(modify_cpuid(&mut cpuid, &template).is_err());
    }
}
