//! Whether this host's KVM can boot Linux. One that only opens proves nothing: some emulate
//! kernel-mode code and lack instructions that every kernel executes.

#![allow(unsafe_code, reason = "makes a mapping a memory slot of KVM")]

use kvm_bindings::{kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// 64-bit kernel-mode code: `lock cmpxchg16b [rdi]`, `fxsave`/`xrstor` by `xsetbv`-less means, then
/// `int3`, whose handler writes to port 0x10 and halts.
///
/// ```text
///   lock cmpxchg16b [rdi]
///   xor edx, edx ; mov eax, 3
///   xrstor [rsi]
///   int3
/// ```
const CODE: &[u8] = &[
    0xf0, 0x48, 0x0f, 0xc7, 0x0f, // lock cmpxchg16b [rdi]
    0x31, 0xd2, // xor edx, edx
    0xb8, 3, 0, 0, 0, // mov eax, 3
    0x0f, 0xae, 0x2e, // xrstor [rsi]
    0xcc, // int3
    0xf4, // hlt: not reached
];
/// The handler: `mov al, 42; out 0x10, al; hlt`.
const HANDLER: &[u8] = &[0xb0, 42, 0xe6, 0x10, 0xf4];

const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const DIRECTORY: u64 = 0x3000;
const IDT: u64 = 0x4000;
const GDT: u64 = 0x5000;
const ENTRY: u64 = 0x6000;
const HANDLER_AT: u64 = 0x7000;
const DATA: u64 = 0x8000;
const XSAVE: u64 = 0x9000;
const STACK: u64 = 0xf000;
const SIZE: usize = 0x20_0000;

/// Runs a few of the instructions in question in a guest.
pub fn host_boots_linux() -> bool {
    // A KVM that hangs on them is no good either; the process that asks is not to hang with it.
    let (send, receive) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let _ = send.send(guest_runs().unwrap_or(false));
    });
    receive.recv_timeout(std::time::Duration::from_secs(10)).unwrap_or(false)
}

fn guest_runs() -> Option<bool> {
    let kvm = Kvm::new().ok()?;
    let vm = kvm.create_vm().ok()?;
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), SIZE)]).ok()?;
    let slot = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: SIZE as u64,
        userspace_addr: memory.get_host_address(GuestAddress(0)).ok()? as u64,
    };
    // SAFETY: the mapping lives until the end of this function, as the VM does.
    unsafe { vm.set_user_memory_region(slot) }.ok()?;
    write_tables(&memory)?;

    let mut vcpu = vm.create_vcpu(0).ok()?;
    let cpuid = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).ok()?;
    vcpu.set_cpuid2(&cpuid).ok()?;
    let mut special = vcpu.get_sregs().ok()?;
    let segment = |selector, kind, long: bool| kvm_segment {
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        s: 1,
        g: 1,
        l: u8::from(long),
        db: u8::from(!long),
        ..Default::default()
    };
    special.cs = segment(8, 0xb, true);
    let data = segment(0x10, 3, false);
    (special.ds, special.es, special.ss) = (data, data, data);
    (special.fs, special.gs) = (data, data);
    (special.gdt.base, special.gdt.limit) = (GDT, 23);
    (special.idt.base, special.idt.limit) = (IDT, 0xfff);
    special.cr3 = PML4;
    // PE, ET, PG; PAE, OSFXSR, OSXMMEXCPT, OSXSAVE; LME, LMA.
    special.cr0 = 1 | 1 << 4 | 1 << 31;
    special.cr4 = 1 << 5 | 1 << 9 | 1 << 10 | 1 << 18;
    special.efer = 1 << 8 | 1 << 10;
    vcpu.set_sregs(&special).ok()?;
    let mut general = vcpu.get_regs().ok()?;
    (general.rip, general.rsp, general.rflags) = (ENTRY, STACK, 2);
    (general.rdi, general.rsi) = (DATA, XSAVE);
    vcpu.set_regs(&general).ok()?;

    // A handful of exits at the most.
    for _ in 0..16 {
        match vcpu.run().ok()? {
            VcpuExit::IoOut(0x10, [42]) => return Some(true),
            VcpuExit::Intr => {}
            _ => return Some(false),
        }
    }
    Some(false)
}

fn write_tables(memory: &GuestMemoryMmap<()>) -> Option<()> {
    let put = |value: u64, at: u64| memory.write_obj(value, GuestAddress(at)).ok();
    put(PDPT | 3, PML4)?;
    put(DIRECTORY | 3, PDPT)?;
    // The first 2 MiB, in one page.
    put(3 | 1 << 7, DIRECTORY)?;
    put(0x00af_9b00_0000_ffff, GDT + 8)?;
    put(0x00cf_9300_0000_ffff, GDT + 16)?;
    // Gate of vector 3: an interrupt gate into the code segment.
    put((HANDLER_AT & 0xffff) | 8 << 16 | 0x8e00 << 32, IDT + 3 * 16)?;
    memory.write_slice(CODE, GuestAddress(ENTRY)).ok()?;
    memory.write_slice(HANDLER, GuestAddress(HANDLER_AT)).ok()
}
