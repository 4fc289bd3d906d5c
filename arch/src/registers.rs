//! What a virtual processor's registers hold when it starts.

use kvm_bindings::{kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::{GuestMemory, boot::Entry, layout};

/// x86 control and model-specific register bits that are set here (Intel SDM, volume 3, 2.5).
const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// General registers at the entry of the boot processor.
pub fn general(entry: &Entry) -> kvm_regs {
    let mut registers = kvm_regs { rflags: 2, rsp: layout::BOOT_STACK, ..Default::default() };
    match *entry {
        // PVH boot ABI: rbx has the start info.
        Entry::Pvh(address) => {
            registers.rip = address.0;
            registers.rbx = layout::PVH_START_INFO;
            registers.rsp = 0;
        }
        // Linux boot protocol, 64-bit: rsi has the zero page.
        Entry::Linux64(address) => {
            registers.rip = address.0;
            registers.rbp = layout::BOOT_STACK;
            registers.rsi = layout::ZERO_PAGE;
        }
    }
    registers
}

fn segment(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

/// Changes the boot processor's special registers from what KVM resets them to, and writes the
/// tables they point to.
pub fn special(
    memory: &GuestMemory,
    entry: &Entry,
    registers: &mut kvm_sregs,
) -> Result<(), GuestMemoryError> {
    const CODE: u8 = 0xb;
    const DATA: u8 = 0x3;
    let long = matches!(entry, Entry::Linux64(_));
    // Selectors as the Linux boot protocol has them: __BOOT_CS and __BOOT_DS.
    registers.cs = segment(0x10, CODE, long);
    let data = segment(0x18, DATA, false);
    registers.ds = data;
    registers.es = data;
    registers.fs = data;
    registers.gs = data;
    registers.ss = data;
    registers.tr = kvm_segment {
        limit: 0x67,
        selector: 0x20,
        type_: 0xb,
        present: 1,
        s: 0,
        ..Default::default()
    };
    registers.idt.base = 0;
    registers.idt.limit = 0;
    registers.gdt.base = layout::GDT;
    let gdt = gdt(long);
    registers.gdt.limit = (size_of_val(&gdt) - 1) as u16;
    for (index, entry) in gdt.iter().enumerate() {
        memory.write_obj(*entry, GuestAddress(layout::GDT + 8 * index as u64))?;
    }
    registers.cr0 = CR0_PE | CR0_ET;
    registers.cr4 = 0;
    registers.efer = 0;
    if long {
        identity_map(memory)?;
        registers.cr3 = layout::PAGE_TABLES;
        registers.cr4 = CR4_PAE;
        registers.cr0 |= CR0_PG;
        registers.efer = EFER_LME | EFER_LMA;
    }
    Ok(())
}

/// Null, unused, flat code, flat data, and a task state segment (Intel SDM, volume 3, 3.4.5).
fn gdt(long: bool) -> [u64; 5] {
    let code = if long { 0x00af_9b00_0000_ffff } else { 0x00cf_9b00_0000_ffff };
    [0, 0, code, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067]
}

/// Maps the first GiB to itself with 2 MiB pages.
fn identity_map(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let pml4 = layout::PAGE_TABLES;
    let pdpt = pml4 + 0x1000;
    let directory = pdpt + 0x1000;
    memory.write_obj(pdpt | PRESENT_WRITABLE, GuestAddress(pml4))?;
    memory.write_obj(directory | PRESENT_WRITABLE, GuestAddress(pdpt))?;
    for index in 0..512u64 {
        let entry = (index << 21) | PRESENT_WRITABLE | LARGE;
        memory.write_obj(entry, GuestAddress(directory + 8 * index))?;
    }
    Ok(())
}

/// Floating-point state after reset, as Linux expects it of a boot loader.
pub fn floating_point() -> kvm_fpu {
    kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() }
}

/// Model-specific registers that Linux reads before it writes them.
pub fn model_specific() -> Vec<kvm_msr_entry> {
    const IA32_SYSENTER_CS: u32 = 0x174;
    const IA32_SYSENTER_ESP: u32 = 0x175;
    const IA32_SYSENTER_EIP: u32 = 0x176;
    const IA32_MISC_ENABLE: u32 = 0x1a0;
    const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
    const STAR: u32 = 0xc000_0081;
    const LSTAR: u32 = 0xc000_0082;
    const CSTAR: u32 = 0xc000_0083;
    const SYSCALL_MASK: u32 = 0xc000_0084;
    const KERNEL_GS_BASE: u32 = 0xc000_0102;
    const FAST_STRING: u64 = 1;
    // Memory is write-back where nothing says otherwise, as firmware would set it up.
    const MTRR_ENABLED_WRITE_BACK: u64 = (1 << 11) | 6;
    let zeroed = [
        IA32_SYSENTER_CS,
        IA32_SYSENTER_ESP,
        IA32_SYSENTER_EIP,
        STAR,
        LSTAR,
        CSTAR,
        SYSCALL_MASK,
        KERNEL_GS_BASE,
    ];
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    zeroed
        .into_iter()
        .map(|index| entry(index, 0))
        .chain([
            entry(IA32_MISC_ENABLE, FAST_STRING),
            entry(IA32_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
        ])
        .collect()
}
