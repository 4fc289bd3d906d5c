//! The machine underneath: memory, ports, model-specific registers, and a console to say things on.

use core::arch::{asm, global_asm};
use core::fmt::{self, Write};

global_asm!(include_str!("boot.s"), options(att_syntax));

/// The serial port.
const CONSOLE: u16 = 0x3f8;
/// Memory from here on is for rings, buffers and whatever devices write; this kernel is below.
pub const SCRATCH: u64 = 16 << 20;
/// The local APIC, which is in KVM.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// All that the page tables map.
pub const MAPPED: u64 = 64 << 30;

/// Reads so many bytes (1, 2, 4 or 8) at a physical address that is mapped.
pub fn read(address: u64, size: u8) -> u64 {
    // SAFETY: the page tables map the first 64 GiB. That no object of this program changes under
    // it is the callers' part: they read devices and scratch memory.
    unsafe {
        match size {
            1 => (address as *const u8).read_volatile().into(),
            2 => load16(address).into(),
            4 => load32(address).into(),
            _ => load64(address),
        }
    }
}

/// Writes so many bytes at a physical address that is mapped.
pub fn write(address: u64, size: u8, value: u64) {
    // SAFETY: as above; what is written are devices, scratch memory and the firmware's tables,
    // where this program has nothing.
    unsafe {
        match size {
            1 => (address as *mut u8).write_volatile(value as u8),
            2 => asm!("mov [{}], {:x}", in(reg) address, in(reg) value, options(nostack)),
            4 => asm!("mov [{}], {:e}", in(reg) address, in(reg) value, options(nostack)),
            _ => asm!("mov [{}], {}", in(reg) address, in(reg) value, options(nostack)),
        }
    }
}

// By instructions, since a volatile access of Rust's must be aligned, and these are not.

unsafe fn load16(address: u64) -> u16 {
    let value: u16;
    // SAFETY: the caller's.
    unsafe { asm!("mov {:x}, [{}]", out(reg) value, in(reg) address, options(nostack)) };
    value
}

unsafe fn load32(address: u64) -> u32 {
    let value: u32;
    // SAFETY: the caller's.
    unsafe { asm!("mov {:e}, [{}]", out(reg) value, in(reg) address, options(nostack)) };
    value
}

unsafe fn load64(address: u64) -> u64 {
    let value: u64;
    // SAFETY: the caller's.
    unsafe { asm!("mov {}, [{}]", out(reg) value, in(reg) address, options(nostack)) };
    value
}

/// Sixteen bytes at once, which KVM hands over as two accesses.
pub fn write_vector(address: u64) {
    // SAFETY: as `write`; the register holds whatever it holds.
    unsafe { asm!("movups [{}], xmm0", in(reg) address, options(nostack)) };
}

/// Writes bytes into scratch memory.
pub fn fill(address: u64, bytes: &[u8]) {
    for (offset, byte) in bytes.iter().enumerate() {
        write(address + offset as u64, 1, (*byte).into());
    }
}

/// Reads a port by 1, 2 or 4 bytes.
pub fn port_read(port: u16, size: u8) -> u32 {
    let mut value: u32 = 0;
    // SAFETY: a port is a device of the monitor's and no memory of this program.
    unsafe {
        match size {
            1 => asm!("in al, dx", inout("eax") value, in("dx") port, options(nostack)),
            2 => asm!("in ax, dx", inout("eax") value, in("dx") port, options(nostack)),
            _ => asm!("in eax, dx", inout("eax") value, in("dx") port, options(nostack)),
        }
    }
    value
}

/// Writes a port by 1, 2 or 4 bytes.
pub fn port_write(port: u16, size: u8, value: u32) {
    // SAFETY: as above.
    unsafe {
        match size {
            1 => asm!("out dx, al", in("eax") value, in("dx") port, options(nostack)),
            2 => asm!("out dx, ax", in("eax") value, in("dx") port, options(nostack)),
            _ => asm!("out dx, eax", in("eax") value, in("dx") port, options(nostack)),
        }
    }
}

/// Writes a port from scratch memory, so many times by one instruction.
pub fn port_write_string(port: u16, count: u64) {
    // SAFETY: `count` bytes of scratch memory are read.
    unsafe {
        asm!("rep outsb", inout("rsi") SCRATCH => _, inout("rcx") count => _, in("dx") port, options(nostack));
    }
}

/// Reads a model-specific register; one that is not there is a fault, which is passed over.
pub fn msr_read(index: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the handler of the fault skips the instruction.
    unsafe {
        asm!("rdmsr", inout("eax") 0 => low, inout("edx") 0 => high, in("ecx") index);
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Writes a model-specific register.
pub fn msr_write(index: u32, value: u64) {
    // SAFETY: as above; callers leave out those on which this program depends.
    unsafe {
        asm!("wrmsr", in("eax") value as u32, in("edx") (value >> 32) as u32, in("ecx") index)
    };
}

unsafe extern "C" {
    static mut idt: [u64; 512];
    static faults: u32;
    static trampoline: u8;
    static trampoline_end: u8;
    fn protection_fault();
}

/// Protection faults until now.
pub fn fault_count() -> u32 {
    // SAFETY: only the handler writes it, between two instructions of this program.
    unsafe { (&raw const faults).read_volatile() }
}

/// Starts the second processor, in `second`, by an INIT and a startup interrupt (Intel SDM, volume 3,
/// 9.4.4).
pub fn start_second_processor() {
    /// Between the boot stack and the command line: free, and in reach of real mode.
    const PAGE: u64 = 0x1_0000;
    const SPURIOUS_VECTOR: u64 = LOCAL_APIC + 0xf0;
    const INTERRUPT_COMMAND: u64 = LOCAL_APIC + 0x300;
    const DESTINATION: u64 = LOCAL_APIC + 0x310;
    const INIT: u64 = 0x4500;
    const STARTUP: u64 = 0x4600;
    let start = (&raw const trampoline) as u64;
    let end = (&raw const trampoline_end) as u64;
    for at in start..end {
        write(PAGE + at - start, 1, read(at, 1));
    }
    // Enabled: KVM looks for others' APICs when it is.
    write(SPURIOUS_VECTOR, 4, 0x1ff);
    for command in [INIT, STARTUP | PAGE >> 12] {
        write(DESTINATION, 4, 1 << 24);
        write(INTERRUPT_COMMAND, 4, command);
    }
}

/// Has protection faults passed over.
pub fn catch_faults() {
    const VECTOR: usize = 13;
    // Present, interrupt gate, code segment 8 (Intel SDM, volume 3, 6.14.1).
    let handler = protection_fault as *const () as u64;
    let low = handler & 0xffff | 8 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
    // SAFETY: one processor, no interrupts: nobody reads the table now.
    unsafe {
        let table = &raw mut idt as *mut u64;
        table.add(2 * VECTOR).write_volatile(low);
        table.add(2 * VECTOR + 1).write_volatile(handler >> 32);
    }
}

/// Stands still for ever, without interrupts.
pub fn halt() -> ! {
    loop {
        // SAFETY: nothing is touched.
        unsafe { asm!("cli", "hlt", options(nostack, nomem)) };
    }
}

/// A fault without a handler, in the handling of a fault without a handler.
pub fn triple_fault() -> ! {
    let no_table = [0u8; 10];
    // SAFETY: the machine ends here.
    unsafe { asm!("lidt [{}]", "ud2", in(reg) &no_table, options(noreturn)) };
}

struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            port_write(CONSOLE, 1, byte.into());
        }
        Ok(())
    }
}

/// Writes a line to the console.
pub fn say(text: fmt::Arguments<'_>) {
    let _ = Console.write_fmt(format_args!("{text}\n"));
}

#[panic_handler]
fn panicked(info: &core::panic::PanicInfo<'_>) -> ! {
    say(format_args!("the attacker is wrong: {info}"));
    halt()
}

// What the compiler calls, which the standard library of C would have. In terms of themselves they
// would never end, so by instructions.

/// # Safety
/// As C has it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: the caller's.
    unsafe {
        asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") count => _, options(nostack));
    }
    to
}

/// # Safety
/// As C has it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= count {
        // SAFETY: the caller's; the copy overtakes nothing.
        return unsafe { memcpy(to, from, count) };
    }
    // SAFETY: the caller's; from the end to the beginning.
    unsafe {
        asm!("std", "rep movsb", "cld",
            inout("rdi") to.wrapping_add(count).wrapping_sub(1) => _,
            inout("rsi") from.wrapping_add(count).wrapping_sub(1) => _,
            inout("rcx") count => _, options(nostack));
    }
    to
}

/// # Safety
/// As C has it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memset(to: *mut u8, byte: i32, count: usize) -> *mut u8 {
    // SAFETY: the caller's.
    unsafe {
        asm!("rep stosb", inout("rdi") to => _, inout("rcx") count => _, in("al") byte as u8, options(nostack));
    }
    to
}

/// # Safety
/// As C has it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcmp(one: *const u8, other: *const u8, count: usize) -> i32 {
    for index in 0..count {
        // SAFETY: the caller's.
        let (a, b) = unsafe { (one.add(index).read_volatile(), other.add(index).read_volatile()) };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
    }
    0
}

/// # Safety
/// As C has it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bcmp(one: *const u8, other: *const u8, count: usize) -> i32 {
    // SAFETY: the caller's.
    unsafe { memcmp(one, other, count) }
}

/// What the core library's frames name, and nobody calls: a panic ends in its handler.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
