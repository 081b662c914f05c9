/*
 * What a program on an emulated board gets from its host: files, console, command line, exit. By semihosting, whose calls
 * are those of Arm ("Semihosting for AArch32 and AArch64"); RISC-V took them over. No libc.
 */
#ifndef EDGEC_SEMIHOST_H
#define EDGEC_SEMIHOST_H

#include <stddef.h>
#include <stdint.h>

/* Exit status of a program that the fault handler ended. */
#define SEMIHOST_FAULT 125

/* Open a file of the host for reading, or anew for writing. Returns a handle, negative when that fails. */
int semihost_open(const char *name, int writing);

/* Read or write all of `bytes`. Return 0, or -1 when there is less to read or no room to write. */
int semihost_read(int handle, void *data, size_t bytes);
int semihost_write(int handle, const void *data, size_t bytes);

void semihost_close(int handle);

/*
 * Cut the command line into words at its spaces; the first is the program. They lie in `line`, which has room for
 * `bytes`. Returns how many there are, or -1 for a longer line or more than `most` words.
 */
int semihost_arguments(char *line, size_t bytes, char **words, int most);

/* The decimal number in `text`, or -1. */
int32_t semihost_number(const char *text);

/* To the host's standard output. */
void semihost_print(const char *text);
void semihost_print_unsigned(uint32_t value);
void semihost_print_hex(uint32_t value);

/* End the program and the emulator with a status from 0 to 255. */
void semihost_exit(int status) __attribute__((noreturn));

/* Fill the unused stack below `sp` with a pattern; bytes below `sp` that were written to since. */
void semihost_fill_stack(uintptr_t sp);
uint32_t semihost_stack_below(uintptr_t sp);

/*
 * A clock: of SysTick on Arm, where it has 24 bits and starts with the first call; on RISC-V the instructions executed,
 * 32 bits. It follows the instructions when QEMU does (-icount shift=0), else the host's time. And the ticks since.
 */
uint32_t semihost_clock(void);
uint32_t semihost_ticks_since(uint32_t clock);

static inline __attribute__((always_inline)) uintptr_t semihost_sp(void) {
    uintptr_t sp;
#if defined(__riscv)
    __asm__ volatile("mv %0, sp" : "=r"(sp));
#else
    __asm__ volatile("mov %0, sp" : "=r"(sp));
#endif
    return sp;
}

/*
 * Measure how much stack the functions use that the calling function calls from here on. The program's start has
 * done this once, so that without another `semihost_paint_stack` the whole program is measured.
 */
#define semihost_paint_stack() semihost_fill_stack(semihost_sp())
#define semihost_stack_used() semihost_stack_below(semihost_sp())

#endif
