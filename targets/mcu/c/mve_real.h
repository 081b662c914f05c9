/* needs: mve_conv conv */
/*
 * Convolutions and matrix products of int8 codes on Helium with real results: float32(sum) * factor, then residual,
 * activation, and codes where the output has them. The factors stand in the place of the multipliers.
 */
#ifndef EK_MVE_REAL_H
#define EK_MVE_REAL_H

typedef struct {
    ek_mve_conv_t conv;
    ek_real_t real;
    int32_t coded;
} ek_mve_real_t;

/* In plain floating-point instructions, which keep subnormal numbers; vectors do not. p is that of an ek_mve_real_t. */
EK_KERNEL void ek_mve_reals(const ek_mve_conv_t *p, const ek_mve_out_t *out, const int8_t *col, int32_t step,
                            int32_t first, int32_t n) {
    const ek_mve_real_t *q = (const ek_mve_real_t *)(const void *)p;
    const float *res = (const float *)out->res;
    int32_t plain = !q->coded && !q->real.act, at = first * p->co;
    for (; n; n--, col += step) {
        const int8_t *block = out->w;
        for (int32_t left = p->co; left > 0; left -= 4, block += 32 + 64 * p->steps) {
            const int8_t *factors = block + 64 * p->steps + 16;
            int32_t sums[4], some = left < 4 ? left : 4;
            ek_mve_sums(col, block, p->steps, p->kh * p->kw * p->ci, sums);
            for (int32_t i = 0; i < some; i++, at++) {
                float v = ek_real_of(sums[i], ek_mve_int(factors + 4 * i));
                if (res) v += res[at];
                if (plain)
                    ((float *)out->y)[at] = v;
                else
                    ek_store_real(&q->real, v, q->coded, p->y_zero, out->y, at);
            }
        }
    }
}

EK_KERNEL void ek_mve_conv_f32(const ek_mve_real_t *p, const int8_t *x, const int8_t *w, void *y, int8_t *scratch) {
    ek_mve_out_t out = {w, 0, y, 0};
    ek_mve_walk(&p->conv, x, scratch, ek_mve_reals, &out);
}

/* y may be res. */
EK_KERNEL void ek_mve_conv_add_f32(const ek_mve_real_t *p, const int8_t *x, const int8_t *w, const float *res, void *y,
                                   int8_t *scratch) {
    ek_mve_out_t out = {w, res, y, 0};
    ek_mve_walk(&p->conv, x, scratch, ek_mve_reals, &out);
}

#endif
