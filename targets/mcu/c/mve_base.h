/* needs: base */
/* Helium helpers: copies and fills without a remainder loop, and what layers share. */
#ifndef EK_MVE_BASE_H
#define EK_MVE_BASE_H

EK_INLINE int32_t ek_mve_int(const int8_t *from) {
    int32_t v;
    memcpy(&v, from, 4);
    return v;
}

#if EK_MVE
/* n bytes, any alignment, n >= 0. Nothing beyond them is touched. */
EK_INLINE void ek_mve_copy(int8_t *to, const int8_t *from, int32_t n) {
    __asm__ volatile(
        "wlstp.8 lr, %2, 1f\n"
        "2: vldrb.8 q0, [%1], #16\n"
        "vstrb.8 q0, [%0], #16\n"
        "letp lr, 2b\n"
        "1:"
        : "+r"(to), "+r"(from)
        : "r"(n)
        : "lr", "q0", "memory");
}

EK_INLINE void ek_mve_fill(int8_t *to, int32_t code, int32_t n) {
    __asm__ volatile(
        "vdup.8 q0, %2\n"
        "wlstp.8 lr, %1, 1f\n"
        "2: vstrb.8 q0, [%0], #16\n"
        "letp lr, 2b\n"
        "1:"
        : "+r"(to)
        : "r"(n), "r"(code)
        : "lr", "q0", "memory");
}
#else
EK_INLINE void ek_mve_copy(int8_t *to, const int8_t *from, int32_t n) { memcpy(to, from, (size_t)n); }
EK_INLINE void ek_mve_fill(int8_t *to, int32_t code, int32_t n) { memset(to, (int)code, (size_t)n); }
#endif

/* Fused or separate addition of codes: ((self * a + other * b + start) >> shift) + zero, clamped. `start` holds the
 * rounding and the zero points of both operands; the sum fits 32 bits. */
typedef struct {
    int32_t self, other, start, shift, zero, lo, hi;
} ek_mve_add_t;

EK_INLINE int32_t ek_mve_add(const ek_mve_add_t *p, int32_t a, int32_t b) {
    uint32_t sum = (uint32_t)p->self * (uint32_t)a + (uint32_t)p->other * (uint32_t)b + (uint32_t)p->start;
    return ek_clamp(((int32_t)sum >> p->shift) + p->zero, p->lo, p->hi);
}

#endif
