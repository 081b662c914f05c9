/* needs: base */
/*
 * Addition of codes: clamp(((ma (a - za) + mb (b - zb) + 2^(f - 1)) >> f) + zero). `start` holds the zero points and the
 * rounding: 2^(f - 1) - ma za - mb zb. No sum leaves int32, by the choice of f.
 */
typedef struct {
    int32_t ma, mb, start;
    int16_t f, zero, lo, hi;
} ek_add_t;

/* Limits codes to lo..hi. */
EK_KERNEL void ek_clamp_codes(int8_t *y, int32_t n, int32_t lo, int32_t hi) {
    int32_t i = 0;
#if EK_DSP
    uint32_t low = (uint8_t)lo * 0x01010101u, high = (uint8_t)hi * 0x01010101u, v, t;
    for (; i + 4 <= n; i += 4) {
        memcpy(&v, y + i, 4);
        __asm__("ssub8 %1, %0, %2\n sel %0, %0, %2\n ssub8 %1, %0, %3\n sel %0, %3, %0"
                : "+r"(v), "=&r"(t)
                : "r"(low), "r"(high)
                : "cc");
        memcpy(y + i, &v, 4);
    }
#endif
    for (; i < n; i++) y[i] = (int8_t)ek_clamp(y[i], lo, hi);
}

/* n sums; sa and sb are 1, or 0 for an operand that stays the same. The result may lie over an operand that moves. */
EK_KERNEL void ek_add_row(const void *parameters, const int8_t *a, int32_t sa, const int8_t *b, int32_t sb, int8_t *y,
                          int32_t n) {
    const ek_add_t *p = (const ek_add_t *)parameters;
    int32_t ma = p->ma, mb = p->mb, start = p->start, zero = p->zero, i = 0;
#if EK_DSP
    if (p->f > 1) {
        /* The upper half of a product with 2^(32 - f) is a shift by f, and comes with an addition. */
        int32_t up = (int32_t)((uint32_t)1 << (32 - p->f));
#define EK_ADD_ONE(k) \
    y[k] = (int8_t)ek_sat8(ek_smmla(a[(k) * sa] * ma + start + b[(k) * sb] * mb, up, zero))
        for (; i + 4 <= n; i += 4, a += 4 * sa, b += 4 * sb, y += 4) {
            EK_ADD_ONE(0);
            EK_ADD_ONE(1);
            EK_ADD_ONE(2);
            EK_ADD_ONE(3);
        }
        for (; i < n; i++, a += sa, b += sb, y++) EK_ADD_ONE(0);
#undef EK_ADD_ONE
        if (p->lo > -128 || p->hi < 127) ek_clamp_codes(y - n, n, p->lo, p->hi);
        return;
    }
#endif
    for (; i < n; i++, a += sa, b += sb)
        *y++ = (int8_t)ek_clamp(((*a * ma + start + *b * mb) >> p->f) + zero, p->lo, p->hi);
}
