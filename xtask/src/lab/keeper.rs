//! A micro-VM that is never run, on the lab's machine, for as long as that lives.
//!
//! KVM switches code of its own on and off with the first and the last VM, by patching instructions
//! that other processors may be executing. Real processors are told; QEMU's emulation with a thread
//! per processor now and then still executes the breakpoint that stands there meanwhile, and the
//! machine's kernel, or a guest, dies of it. With one VM always there, nothing is patched.

use std::io::Write;

use anyhow::Result;
use kvm_ioctls::Kvm;

/// Makes the VM, says so with a line on standard output, and waits for the end of the machine.
pub fn keep() -> Result<()> {
    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    // The local APIC of a processor that never ran is switched off, which is what is counted.
    vm.create_irq_chip()?;
    let _vcpu = vm.create_vcpu(0)?;
    println!("kept");
    std::io::stdout().flush()?;
    loop {
        nix::unistd::pause();
    }
}
