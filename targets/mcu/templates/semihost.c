#include "semihost.h"

enum { OPEN = 0x01, CLOSE = 0x02, WRITE = 0x05, READ = 0x06, GET_CMDLINE = 0x15, EXIT_EXTENDED = 0x20 };
/* Modes of OPEN: rb, w, wb. The name of the console is :tt. */
enum { MODE_READ = 1, MODE_CONSOLE = 4, MODE_WRITE = 5 };
#define APPLICATION_EXIT 0x20026u
#define PAINT 0xC5C5C5C5u

extern uint32_t edgec_stack_limit[];

static uintptr_t host(uintptr_t operation, const void *arguments) {
#if defined(__riscv)
    register uintptr_t a0 __asm__("a0") = operation;
    register const void *a1 __asm__("a1") = arguments;
    /* The emulator knows the three instructions together, uncompressed, on one page. */
    __asm__ volatile(
        ".option push\n.option norvc\n.balign 16\n"
        "slli x0, x0, 0x1f\nebreak\nsrai x0, x0, 7\n.option pop"
        : "+r"(a0)
        : "r"(a1)
        : "memory");
    return a0;
#else
    register uintptr_t r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = arguments;
    __asm__ volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
#endif
}

static size_t length(const char *text) {
    size_t n = 0;
    while (text[n]) n++;
    return n;
}

static int open_mode(const char *name, uintptr_t mode) {
    const uintptr_t arguments[3] = {(uintptr_t)name, mode, length(name)};
    return (int)host(OPEN, arguments);
}

int semihost_open(const char *name, int writing) { return open_mode(name, writing ? MODE_WRITE : MODE_READ); }

/* READ and WRITE return how many bytes are left to do. */
int semihost_read(int handle, void *data, size_t bytes) {
    uint8_t *to = (uint8_t *)data;
    while (bytes) {
        const uintptr_t arguments[3] = {(uintptr_t)handle, (uintptr_t)to, bytes};
        const uintptr_t left = host(READ, arguments);
        if (left >= bytes) return -1;
        to += bytes - left;
        bytes = left;
    }
    return 0;
}

int semihost_write(int handle, const void *data, size_t bytes) {
    const uint8_t *from = (const uint8_t *)data;
    while (bytes) {
        const uintptr_t arguments[3] = {(uintptr_t)handle, (uintptr_t)from, bytes};
        const uintptr_t left = host(WRITE, arguments);
        if (left >= bytes) return -1;
        from += bytes - left;
        bytes = left;
    }
    return 0;
}

void semihost_close(int handle) {
    const uintptr_t arguments[1] = {(uintptr_t)handle};
    host(CLOSE, arguments);
}

int semihost_arguments(char *line, size_t bytes, char **words, int most) {
    uintptr_t arguments[2] = {(uintptr_t)line, bytes};
    if (host(GET_CMDLINE, arguments)) return -1;
    int count = 0;
    for (char *c = line; *c; c++) {
        if (*c == ' ') {
            *c = 0;
        } else if (c == line || c[-1] == 0) {
            if (count == most) return -1;
            words[count++] = c;
        }
    }
    return count;
}

int32_t semihost_number(const char *text) {
    int32_t value = 0;
    if (!*text) return -1;
    for (; *text; text++) {
        if (*text < '0' || *text > '9' || value > (INT32_MAX - 9) / 10) return -1;
        value = 10 * value + (*text - '0');
    }
    return value;
}

void semihost_print(const char *text) {
    static int console = -1;
    if (console < 0) console = open_mode(":tt", MODE_CONSOLE);
    semihost_write(console, text, length(text));
}

static void print_digits(uint32_t value, uint32_t base) {
    char digits[12];
    char *start = digits + sizeof digits - 1;
    *start = 0;
    do {
        *--start = "0123456789abcdef"[value % base];
        value /= base;
    } while (value);
    semihost_print(start);
}

void semihost_print_unsigned(uint32_t value) { print_digits(value, 10); }

void semihost_print_hex(uint32_t value) {
    semihost_print("0x");
    print_digits(value, 16);
}

void semihost_exit(int status) {
    const uintptr_t arguments[2] = {APPLICATION_EXIT, (uintptr_t)status};
    for (;;) host(EXIT_EXTENDED, arguments);
}

void semihost_fill_stack(uintptr_t sp) {
    (void)sp;
    /* Up to this function's own frame. */
    volatile uint32_t *const end = (volatile uint32_t *)(semihost_sp() - 32);
    for (volatile uint32_t *p = edgec_stack_limit; p < end; p++) *p = PAINT;
}

uint32_t semihost_stack_below(uintptr_t sp) {
    const volatile uint32_t *p = edgec_stack_limit;
    while ((uintptr_t)p < sp && *p == PAINT) p++;
    return (uint32_t)(sp - (uintptr_t)p);
}

#if defined(__riscv)
uint32_t semihost_clock(void) {
    uint32_t clock;
    __asm__ volatile(".option push\n.option arch, +zicsr\ncsrr %0, minstret\n.option pop" : "=r"(clock));
    return clock;
}

uint32_t semihost_ticks_since(uint32_t clock) { return semihost_clock() - clock; }
#else
#define SYST_CSR (*(volatile uint32_t *)0xE000E010u)
#define SYST_RVR (*(volatile uint32_t *)0xE000E014u)
#define SYST_CVR (*(volatile uint32_t *)0xE000E018u)

uint32_t semihost_clock(void) {
    if (!(SYST_CSR & 1u)) {
        SYST_RVR = 0xFFFFFFu;
        SYST_CVR = 0;
        /* Enabled, on the processor's clock, no interrupt; the counter starts with its first tick. */
        SYST_CSR = 5;
        while (!SYST_CVR) continue;
    }
    return 0xFFFFFFu - SYST_CVR;
}

uint32_t semihost_ticks_since(uint32_t clock) { return (semihost_clock() - clock) & 0xFFFFFFu; }
#endif
