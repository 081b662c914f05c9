/* needs: base */
/*
 * Addition of codes: clamp(((ma (a - za) + mb (b - zb) + 2^(f - 1)) >> f) + zero). `start` holds the zero points and the
 * rounding: 2^(f - 1) - ma za - mb zb. No sum leaves int32, by the choice of f.
 */
typedef struct {
    int32_t ma, mb, start;
    int16_t f, zero, lo, hi;
} ek_add_t;

EK_INLINE int32_t ek_add_one(const ek_add_t *p, int32_t a, int32_t b) {
    return ek_clamp(((a * p->ma + p->start + b * p->mb) >> p->f) + p->zero, p->lo, p->hi);
}

/* Limits codes to lo..hi. */
EK_KERNEL void ek_clamp_codes(int8_t *y, int32_t n, int32_t lo, int32_t hi) {
    int32_t i = 0;
#if EK_DSP
    uint32_t low = (uint8_t)lo * 0x01010101u, high = (uint8_t)hi * 0x01010101u, v;
    for (; i + 4 <= n; i += 4) {
        memcpy(&v, y + i, 4);
        uint32_t t;
        __asm__("ssub8 %1, %0, %2\n sel %0, %0, %2\n ssub8 %1, %0, %3\n sel %0, %3, %0"
                : "+r"(v), "=&r"(t)
                : "r"(low), "r"(high)
                : "cc");
        memcpy(y + i, &v, 4);
    }
#endif
    for (; i < n; i++) y[i] = (int8_t)ek_clamp(y[i], lo, hi);
}
