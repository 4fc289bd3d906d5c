# From the entry by PVH (32 bits, no paging, ebx has the start info) to `main` in 64 bits, with the
# first 64 GiB mapped to themselves; and the second processor's way from real mode to `second`.

.section .note.pvh, "a", @note
    .p2align 2
    .long 4, 8, 18              # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad entry

.section .text.entry, "ax"
.code32
.global entry
entry:
    cli
    cld
    movl $stack_end, %esp
    movl %ebx, %edi

    movl $directory_pointers, %eax
    orl $3, %eax
    movl %eax, top_table
    xorl %ecx, %ecx
1:  movl %ecx, %eax
    shll $12, %eax
    addl $directories, %eax
    orl $3, %eax
    movl %eax, directory_pointers(, %ecx, 8)
    incl %ecx
    cmpl $64, %ecx
    jb 1b
    xorl %ecx, %ecx
2:  movl %ecx, %eax
    shll $21, %eax
    orl $0x83, %eax             # present, writable, 2 MiB
    movl %eax, directories(, %ecx, 8)
    movl %ecx, %eax
    shrl $11, %eax
    movl %eax, directories + 4(, %ecx, 8)
    incl %ecx
    cmpl $32768, %ecx
    jb 2b
    movl $main, %esi

# Both processors: the stack in esp, what to call in esi, its argument in edi.
paged:
    movl $top_table, %eax
    movl %eax, %cr3
    movl %cr4, %eax
    orl $0x620, %eax            # PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $0xc0000080, %ecx      # EFER.LME
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl %cr0, %eax
    andl $~0x60000004, %eax     # not CD, NW, EM
    orl $0x80000002, %eax       # PG, MP
    movl %eax, %cr0
    lgdt gdt_pointer
    ljmp $8, $long_mode

.code64
long_mode:
    movl $16, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    lidt idt_pointer
    # Their upper halves are anything.
    movl %edi, %edi
    movl %esi, %esi
    movl %esp, %esp
    call *%rsi
3:  cli
    hlt
    jmp 3b

.code32
second_protected:
    movl $16, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $second_stack_end, %esp
    xorl %edi, %edi
    movl $second, %esi
    jmp paged
.code64

# A general protection fault is of an instruction of two bytes (rdmsr, wrmsr): the next one is due.
.global protection_fault
protection_fault:
    addq $8, %rsp
    addq $2, (%rsp)
    incl faults(%rip)
    iretq

.section .data
.p2align 4
gdt:
    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cf9b000000ffff
gdt_pointer:
    .word 31
    .quad gdt
idt_pointer:
    .word 14 * 16 - 1
    .quad idt
.global faults
faults:
    .long 0

# Copied to a page that real mode reaches, which a processor begins at with cs as the page says.
.section .rodata
.code16
.global trampoline, trampoline_end
trampoline:
    cli
    movw %cs, %ax
    movw %ax, %ds
    lgdtl trampoline_gdt - trampoline
    movl %cr0, %eax
    orl $1, %eax                # PE
    movl %eax, %cr0
    ljmpl $24, $second_protected
trampoline_gdt:
    .word 31
    .long gdt
trampoline_end:
.code64

.section .bss
.p2align 12
top_table: .skip 4096
directory_pointers: .skip 4096
directories: .skip 64 * 4096
.global idt
idt: .skip 4096
    .skip 65536
stack_end:
    .skip 65536
second_stack_end:
