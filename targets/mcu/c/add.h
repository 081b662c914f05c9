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
