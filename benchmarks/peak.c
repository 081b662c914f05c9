/*
 * What one core of this machine can do at most: multiply-adds in registers, and reads from a buffer.
 *
 * Every loop has more independent chains than the latency of the instruction times its throughput. Build:
 *   cc -O2 -march=native -shared -fPIC peak.c -o peak.so
 */
#include <stddef.h>
#include <stdint.h>

#if defined(__AVX512F__)
#define REG "v"
typedef float vec __attribute__((vector_size(64)));
#define FMA(a) __asm__ volatile("vfmadd231ps %1, %1, %0" : "+v"(a) : "v"(x));
#elif defined(__FMA__)
#define REG "x"
typedef float vec __attribute__((vector_size(32)));
#define FMA(a) __asm__ volatile("vfmadd231ps %1, %1, %0" : "+x"(a) : "x"(x));
#elif defined(__aarch64__)
#define REG "w"
typedef float vec __attribute__((vector_size(16)));
#define FMA(a) __asm__ volatile("fmla %0.4s, %1.4s, %1.4s" : "+w"(a) : "w"(x));
#endif

#if defined(__AVX512VNNI__)
#define DOT(a) __asm__ volatile("vpdpbusd %1, %1, %0" : "+v"(a) : "v"(x));
#elif defined(__AVXVNNI__)
#define DOT(a) __asm__ volatile("{vex} vpdpbusd %1, %1, %0" : "+x"(a) : "x"(x));
#elif defined(__ARM_FEATURE_MATMUL_INT8)
#define DOT(a) __asm__ volatile("smmla %0.4s, %1.16b, %1.16b" : "+w"(a) : "w"(x));
#define DOT_MACS 32
#elif defined(__ARM_FEATURE_DOTPROD)
#define DOT(a) __asm__ volatile("sdot %0.4s, %1.16b, %1.16b" : "+w"(a) : "w"(x));
#endif
#ifndef DOT_MACS
#define DOT_MACS ((int)sizeof(vec))
#endif

#define TWELVE(F) F(a0) F(a1) F(a2) F(a3) F(a4) F(a5) F(a6) F(a7) F(a8) F(a9) F(a10) F(a11)
#define LOOP(F)                                                                                       \
    vec x = {0}, a0 = x, a1 = x, a2 = x, a3 = x, a4 = x, a5 = x, a6 = x, a7 = x, a8 = x, a9 = x, a10 = x, a11 = x; \
    for (long i = 0; i < n; i++) { TWELVE(F) }                                                        \
    /* Nothing that is measured may be left out. */                                                   \
    __asm__ volatile("" ::REG(a0), REG(a1), REG(a2), REG(a3), REG(a4), REG(a5), REG(a6), REG(a7));    \
    __asm__ volatile("" ::REG(a8), REG(a9), REG(a10), REG(a11));

/* Each does 12 n instructions and returns the multiply-adds done; 0 where the machine has no such instruction. */
double peak_fp32(long n) {
#ifdef FMA
    LOOP(FMA)
    return 12.0 * (double)n * (double)(sizeof(vec) / sizeof(float));
#else
    return (double)n * 0;
#endif
}

double peak_int8(long n) {
#if defined(DOT) && defined(REG)
    LOOP(DOT)
    return 12.0 * (double)n * DOT_MACS;
#else
    return (double)n * 0;
#endif
}

/* Read `bytes` at `data` (aligned to 64, a multiple of 1024), n times; returns the bytes read. */
double peak_read(const uint8_t *data, size_t bytes, long n) {
#ifdef REG
    for (long i = 0; i < n; i++)
        for (size_t at = 0; at < bytes; at += 8 * sizeof(vec)) {
            const vec *v = (const vec *)(data + at);
            for (int j = 0; j < 8; j++) {
                const vec value = v[j];
                __asm__ volatile("" ::REG(value));
            }
        }
    return (double)n * (double)bytes;
#else
    (void)data, (void)bytes;
    return (double)n * 0;
#endif
}
