/* Vectors, start and fault handler of a program on an emulated board with a Cortex-M core. */
#include "semihost.h"

#define CCR (*(volatile uint32_t *)0xE000ED14u)
#define CFSR (*(volatile uint32_t *)0xE000ED28u)
#define MMFAR (*(volatile uint32_t *)0xE000ED34u)
#define BFAR (*(volatile uint32_t *)0xE000ED38u)
#define CPACR (*(volatile uint32_t *)0xE000ED88u)

extern uint32_t edgec_stack_limit[], edgec_stack_top[];
extern uint32_t edgec_data_start[], edgec_data_end[], edgec_data_load[], edgec_bss_start[], edgec_bss_end[];

int main(void);
void edgec_start(void) __attribute__((noreturn));
void edgec_fault(void);
void edgec_report_fault(const uint32_t *frame) __attribute__((noreturn));

/* The handler has a stack of its own: an overflow of the program's may be what it reports. */
uint32_t edgec_fault_stack[256] __attribute__((aligned(8)));

__attribute__((section(".vectors"), used)) static const uintptr_t vectors[16] = {
    (uintptr_t)edgec_stack_top, (uintptr_t)edgec_start, (uintptr_t)edgec_fault, (uintptr_t)edgec_fault,
    (uintptr_t)edgec_fault,     (uintptr_t)edgec_fault, (uintptr_t)edgec_fault, (uintptr_t)edgec_fault,
    (uintptr_t)edgec_fault,     (uintptr_t)edgec_fault, (uintptr_t)edgec_fault, (uintptr_t)edgec_fault,
    (uintptr_t)edgec_fault,     (uintptr_t)edgec_fault, (uintptr_t)edgec_fault, (uintptr_t)edgec_fault,
};

void edgec_start(void) {
#if defined(__ARM_FP) || defined(__ARM_FEATURE_MVE)
    /* Full access to coprocessors 10 and 11: float and vector registers. */
    CPACR |= 0xFu << 20;
    __asm__ volatile("dsb\nisb" ::: "memory");
#endif
#if !defined(__ARM_FEATURE_UNALIGNED)
    /* The core has no unaligned access, the board's may: let it fault here too. */
    CCR |= 1u << 3;
#endif
    /* volatile: as calls of memcpy and memset these would go into every program. */
    const uint32_t *from = edgec_data_load;
    for (volatile uint32_t *to = edgec_data_start; to < edgec_data_end;) *to++ = *from++;
    for (volatile uint32_t *to = edgec_bss_start; to < edgec_bss_end;) *to++ = 0;
    semihost_paint_stack();
    semihost_exit(main());
}

__attribute__((naked)) void edgec_fault(void) {
    __asm__ volatile(
        "mrs r0, msp\n"
        "ldr r1, =edgec_fault_stack + 1024\n"
        "msr msp, r1\n"
        "bl edgec_report_fault\n"
        ".ltorg\n");
}

/* Bits of CFSR and what they say. */
static const struct {
    uint32_t bits;
    const char *text;
} REASONS[] = {
    {0x00000001u, "execution of memory that holds no code"},
    {0x00000082u, "access to protected memory"},
    {0x00000100u, "execution of memory that does not exist"},
    {0x00000600u, "access to memory that does not exist"},
    {0x00001010u, "stack overflow"},
    {0x00100000u, "stack overflow"},
    {0x00010000u, "undefined instruction"},
    {0x00020000u, "jump to Arm code"},
    {0x00040000u, "bad return from an exception"},
    {0x00080000u, "no such coprocessor"},
    {0x01000000u, "unaligned access"},
    {0x02000000u, "division by zero"},
};

void edgec_report_fault(const uint32_t *frame) {
    const uint32_t reason = CFSR;
    /* r0-r3, r12, lr, pc: what the core saved; not where the stack has no room for it. */
    const int saved = frame >= edgec_stack_limit && frame < edgec_stack_top;
    semihost_print("\nfault: ");
    const char *text = saved ? "exception" : "stack overflow";
    for (size_t i = 0; saved && i < sizeof REASONS / sizeof *REASONS; i++) {
        if (reason & REASONS[i].bits) text = REASONS[i].text;
    }
    semihost_print(text);
    if (reason & 0x00008000u || reason & 0x00000080u) {
        semihost_print(" at ");
        semihost_print_hex(reason & 0x00008000u ? BFAR : MMFAR);
    }
    if (saved) {
        semihost_print(", pc ");
        semihost_print_hex(frame[6]);
    }
    semihost_print("\n");
    semihost_exit(SEMIHOST_FAULT);
}
