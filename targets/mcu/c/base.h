/*
 * Kernels of edgec for int8 networks on microcontrollers: portable C99, with forms for the DSP extension of Armv7E-M
 * and Armv8-M and for Helium (MVE) where the compiler has them. Define EK_PORTABLE to leave those out.
 *
 * Activations are int8, NHWC. A kernel takes its parameters, then pointers: activations, weights as the compiler packed
 * them, further activations, the result, scratch memory. All pointers are 4-byte aligned unless said otherwise.
 */
#ifndef EDGEC_NN_H
#define EDGEC_NN_H

#include <stdint.h>
#include <string.h>

#if defined(__ARM_FEATURE_DSP) && __ARM_ARCH_PROFILE == 'M' && !defined(EK_PORTABLE)
#define EK_DSP 1
#include <arm_acle.h>
#else
#define EK_DSP 0
#endif

#if defined(__ARM_FEATURE_MVE) && !defined(EK_PORTABLE)
#define EK_MVE 1
#include <arm_mve.h>
#else
#define EK_MVE 0
#endif

#define EK_RESTRICT __restrict
#define EK_INLINE static inline __attribute__((always_inline))
/* A kernel: unused ones leave no code and no warning. */
#define EK_KERNEL static __attribute__((noinline, unused))
/* A function in assembly, of which compilers must not believe to know what registers it leaves alone. */
#if defined(__clang__)
#define EK_ASSEMBLY static __attribute__((naked, noinline, unused))
#else
#define EK_ASSEMBLY static __attribute__((naked, noipa, unused))
#endif
#define EK_UNUSED __attribute__((unused))

typedef uint32_t __attribute__((may_alias)) ek_u32;
typedef int16_t __attribute__((may_alias)) ek_i16;

#define EK_INFINITY __builtin_inff()

EK_INLINE int32_t ek_clamp(int32_t v, int32_t lo, int32_t hi) { return v < lo ? lo : v > hi ? hi : v; }

/* The bits of a number, and the number with these bits. */
EK_INLINE int32_t ek_bits_of(float v) {
    int32_t bits;
    memcpy(&bits, &v, 4);
    return bits;
}
EK_INLINE float ek_float_of(int32_t bits) {
    float v;
    memcpy(&v, &bits, 4);
    return v;
}

#if defined(__ARM_ARCH_6M__)
/* (a * b + round * 2^16) >> 32 by halves, as these cores have no long product; round: 0 or 2^15. */
EK_KERNEL int32_t ek_high(int32_t a, int32_t b, uint32_t round) {
    uint32_t a0 = (uint32_t)a & 0xffff, b0 = (uint32_t)b & 0xffff;
    int32_t a1 = a >> 16, b1 = b >> 16, left = a1 * (int32_t)b0, right = b1 * (int32_t)a0;
    uint32_t low = (a0 * b0 >> 16) + ((uint32_t)left & 0xffff) + ((uint32_t)right & 0xffff) + round;
    return a1 * b1 + (left >> 16) + (right >> 16) + (int32_t)(low >> 16);
}
#else
EK_INLINE int32_t ek_high(int32_t a, int32_t b, uint32_t round) {
    return (int32_t)(((int64_t)a * b + ((int64_t)round << 16)) >> 32);
}
#endif

/* (acc * m + 2^31) >> 32: what layers do whose multipliers are below one half. */
EK_INLINE int32_t ek_rqh(int32_t acc, int32_t m) {
#if EK_DSP
    int32_t r;
    __asm__("smmulr %0, %1, %2" : "=r"(r) : "r"(acc), "r"(m));
    return r;
#else
    return ek_high(acc, m, 1u << 15);
#endif
}

/* ((a * b) >> 32) + c. */
EK_INLINE int32_t ek_smmla(int32_t a, int32_t b, int32_t c) {
#if EK_DSP
    int32_t r;
    __asm__("smmla %0, %1, %2, %3" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
#else
    return ek_high(a, b, 0) + c;
#endif
}

EK_INLINE int32_t ek_sat8(int32_t v) {
#if defined(__ARM_FEATURE_SAT) && !defined(EK_PORTABLE)
    int32_t r;
    __asm__("ssat %0, #8, %1" : "=r"(r) : "r"(v));
    return r;
#else
    return ek_clamp(v, -128, 127);
#endif
}

/* (acc * m + 2^(shift - 1)) >> shift, shift 1..62, as int64: large multipliers may leave int32. */
EK_INLINE int64_t ek_rq1(int32_t acc, int32_t m, int32_t shift) {
    return ((int64_t)acc * m + ((int64_t)1 << (shift - 1))) >> shift;
}

/* The code of an RQ1 result: zero point, clamp. */
EK_INLINE int32_t ek_code(int64_t v, int32_t zero, int32_t lo, int32_t hi) {
    v += zero;
    return v < lo ? lo : v > hi ? hi : (int32_t)v;
}

#endif
