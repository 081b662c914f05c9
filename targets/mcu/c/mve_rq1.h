/* needs: mve_conv */
/* Convolutions and matrix products on Helium with any multipliers: RQ1 with a shift for every output channel. */
#ifndef EK_MVE_RQ1_H
#define EK_MVE_RQ1_H

EK_KERNEL void ek_mve_rq1(const ek_mve_conv_t *p, const ek_mve_out_t *out, const int8_t *col, int32_t step,
                          int32_t first, int32_t n) {
    const int8_t *res = (const int8_t *)out->res;
    int8_t *y = (int8_t *)out->y;
    int32_t at = first * p->co;
    for (; n; n--, col += step) {
        const int8_t *block = out->w;
        for (int32_t o = 0; o < p->co; block += 32 + 64 * p->steps) {
            const int8_t *factors = block + 64 * p->steps + 16;
            int32_t sums[4], end = p->co - o < 4 ? p->co : o + 4;
            ek_mve_sums(col, block, p->steps, p->kh * p->kw * p->ci, sums);
            for (; o < end; o++, at++) {
                int32_t i = o & 3;
                int64_t v = ek_rq1(sums[i], ek_mve_int(factors + 4 * i), out->shift[o]);
                int32_t code = ek_code(v, p->y_zero, p->lo, p->hi);
                y[at] = (int8_t)(res ? ek_mve_add(&p->add, code, res[at]) : code);
            }
        }
    }
}

EK_KERNEL void ek_mve_conv_rq1_s8(const ek_mve_conv_t *p, const int8_t *x, const int8_t *w, const int8_t *shift,
                                  int8_t *y, int8_t *scratch) {
    ek_mve_out_t out = {w, 0, y, shift};
    ek_mve_walk(p, x, scratch, ek_mve_rq1, &out);
}

/* y may be res. */
EK_KERNEL void ek_mve_conv_rq1_add_s8(const ek_mve_conv_t *p, const int8_t *x, const int8_t *w, const int8_t *shift,
                                      const int8_t *res, int8_t *y, int8_t *scratch) {
    ek_mve_out_t out = {w, res, y, shift};
    ek_mve_walk(p, x, scratch, ek_mve_rq1, &out);
}

#endif
