/* needs: base clamp */
/*
 * Addition of codes: clamp(((ma (a - za) + mb (b - zb) + 2^(f - 1)) >> f) + zero). `start` holds the zero points and the
 * rounding: 2^(f - 1) - ma za - mb zb. No sum leaves int32, by the choice of f.
 */
typedef struct {
    int32_t ma, mb, start;
    int16_t f, zero, lo, hi;
} ek_add_t;

/* n sums; sa and sb are 1, or 0 for an operand that stays the same. The result may lie over an operand that moves. */
EK_KERNEL void ek_add_row(const void *parameters, const int8_t *a, int32_t sa, const int8_t *b, int32_t sb, int8_t *y,
                          int32_t n) {
    const ek_add_t p = *(const ek_add_t *)parameters;
    int32_t i = 0;
#if EK_DSP
    if (p.f > 1 && sa == sb) {
        /* The upper half of a product with 2^(32 - f) is a shift by f, and comes with an addition. */
        int32_t up = (int32_t)((uint32_t)1 << (32 - p.f)), ma = p.ma, mb = p.mb, start = p.start, zero = p.zero;
#define EK_ADD_ONE(k) *y++ = (int8_t)ek_sat8(ek_smmla(a[k] * ma + start + b[k] * mb, up, zero))
        for (; i + 4 <= n; i += 4, a += 4, b += 4) {
            EK_ADD_ONE(0);
            EK_ADD_ONE(1);
            EK_ADD_ONE(2);
            EK_ADD_ONE(3);
        }
        for (; i < n; i++, a++, b++) EK_ADD_ONE(0);
#undef EK_ADD_ONE
        ek_narrowed(y - n, n, p.lo, p.hi);
        return;
    }
#endif
    for (; i < n; i++, a += sa, b += sb)
        *y++ = (int8_t)ek_clamp(((*a * p.ma + p.start + *b * p.mb) >> p.f) + p.zero, p.lo, p.hi);
}
