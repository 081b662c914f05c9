/* Start and fault handler of a program on QEMU's `virt` board with a RISC-V core. */
#include "semihost.h"

extern uint32_t edgec_stack_limit[];
extern uint32_t edgec_data_start[], edgec_data_end[], edgec_data_load[], edgec_bss_start[], edgec_bss_end[];

int main(void);
void edgec_run(void) __attribute__((noreturn));
void edgec_report_fault(uint32_t cause, uint32_t pc, uint32_t value, uint32_t sp) __attribute__((noreturn));

/* The handler has a stack of its own: an overflow of the program's may be what it reports. */
uint32_t edgec_fault_stack[256] __attribute__((aligned(16)));

/*
 * Where the board begins to execute. The first region of the memory protection, from 0 to the end of the flash, can be
 * read and executed, and stays so (0x8D: locked, up to the address, execute, read): writes to weights, and the stack
 * below its limit, fault.
 */
__asm__(
    ".option push\n"
    ".section .vectors, \"ax\"\n"
    ".option arch, +zicsr\n"
    ".global edgec_start\n"
    ".type edgec_start, @function\n"
    "edgec_start:\n"
    ".option push\n.option norelax\n"
    "la gp, __global_pointer$\n"
    ".option pop\n"
    "la sp, edgec_stack_top\n"
    "la tp, edgec_thread_data\n"
    "la t0, edgec_trap\n"
    "csrw mtvec, t0\n"
    "la t0, edgec_flash_end\n"
    "srli t0, t0, 2\n"
    "csrw pmpaddr0, t0\n"
    "li t0, 0x8D\n"
    "csrw pmpcfg0, t0\n"
    "call edgec_run\n"
    ".balign 4\n"
    "edgec_trap:\n"
    "csrr a0, mcause\n"
    "csrr a1, mepc\n"
    "csrr a2, mtval\n"
    "mv a3, sp\n"
    "la sp, edgec_fault_stack + 1024\n"
    "call edgec_report_fault\n"
    ".size edgec_start, .-edgec_start\n"
    ".option pop\n"
    ".text\n");

void edgec_run(void) {
    /* volatile: as calls of memcpy and memset these would go into every program. */
    const uint32_t *from = edgec_data_load;
    for (volatile uint32_t *to = edgec_data_start; to < edgec_data_end;) *to++ = *from++;
    for (volatile uint32_t *to = edgec_bss_start; to < edgec_bss_end;) *to++ = 0;
    semihost_paint_stack();
    semihost_exit(main());
}

void edgec_report_fault(uint32_t cause, uint32_t pc, uint32_t value, uint32_t sp) {
    static const char *const REASONS[8] = {
        "execution of an unaligned address", "execution of memory that holds no code", "undefined instruction",
        "breakpoint", "unaligned access", "access to memory that does not exist", "unaligned access",
        "write to memory that is read-only or does not exist",
    };
    semihost_print("\nfault: ");
    if (sp < (uintptr_t)edgec_stack_limit + 16) {
        semihost_print("stack overflow");
    } else {
        semihost_print(cause < 8 ? REASONS[cause] : "exception");
    }
    semihost_print(" at ");
    semihost_print_hex(value);
    semihost_print(", pc ");
    semihost_print_hex(pc);
    semihost_print("\n");
    semihost_exit(SEMIHOST_FAULT);
}
