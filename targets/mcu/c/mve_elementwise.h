/* needs: mve_base */
/* Arithmetic on codes, tables, pools, and the two ends of an integer region, on Helium. Last vectors are predicated. */
#ifndef EK_MVE_ELEMENTWISE_H
#define EK_MVE_ELEMENTWISE_H

typedef struct {
    int32_t n;
    ek_mve_add_t add;
} ek_mve_qadd_t;

/* y may be a or b. */
EK_KERNEL void ek_mve_qadd_s8(const ek_mve_qadd_t *p, const int8_t *a, const int8_t *b, int8_t *y) {
#if EK_MVE
    const ek_mve_add_t *q = &p->add;
    int32x4_t start = vdupq_n_s32(q->start), lo = vdupq_n_s32(q->lo), hi = vdupq_n_s32(q->hi);
    __asm__ volatile(
        "dlstp.32 lr, %3\n"
        "1: vldrb.s32 q0, [%0], #4\n"
        "vmov q1, %q8\n"
        "vmla.s32 q1, q0, %4\n"
        "vldrb.s32 q0, [%1], #4\n"
        "vmla.s32 q1, q0, %5\n"
        "vshl.s32 q1, %6\n"
        "vadd.i32 q1, q1, %7\n"
        "vmax.s32 q1, q1, %q9\n"
        "vmin.s32 q1, q1, %q10\n"
        "vstrb.32 q1, [%2], #4\n"
        "letp lr, 1b"
        : "+l"(a), "+l"(b), "+l"(y)
        : "r"(p->n), "r"(q->self), "r"(q->other), "r"(-q->shift), "r"(q->zero), "w"(start), "w"(lo), "w"(hi)
        : "lr", "q0", "q1", "memory");
#else
    for (int32_t i = 0; i < p->n; i++) y[i] = (int8_t)ek_mve_add(&p->add, a[i], b[i]);
#endif
}

/* An integer times m at 2^-(32 + shrink), after `grow` bits to the left; shrink > 0. Rounds once, halves up. */
typedef struct {
    int32_t m, grow, shrink, zero, lo, hi;
} ek_mve_rescale_t;

EK_INLINE int32_t ek_mve_rescale(const ek_mve_rescale_t *p, int32_t v) {
    v = (int32_t)(((int64_t)v * ((int64_t)1 << p->grow) * p->m) >> 32);
    return ek_clamp(((v + (1 << (p->shrink - 1))) >> p->shrink) + p->zero, p->lo, p->hi);
}

/* rows: of n elements. again: whether b is one row, for all of a. */
typedef struct {
    int32_t rows, n, again, za, zb;
    ek_mve_rescale_t to;
} ek_mve_qmul_t;

/* y may be a, and b where that is not repeated. */
EK_KERNEL void ek_mve_qmul_s8(const ek_mve_qmul_t *p, const int8_t *a, const int8_t *b, int8_t *y) {
    for (int32_t row = 0; row < p->rows; row++) {
        const int8_t *factors = b;
#if EK_MVE
        const ek_mve_rescale_t *q = &p->to;
        int32x4_t m = vdupq_n_s32(q->m), lo = vdupq_n_s32(q->lo), hi = vdupq_n_s32(q->hi), z = vdupq_n_s32(q->zero);
        __asm__ volatile(
            "dlstp.32 lr, %3\n"
            "1: vldrb.s32 q0, [%0], #4\n"
            "vsub.i32 q0, q0, %4\n"
            "vldrb.s32 q1, [%1], #4\n"
            "vsub.i32 q1, q1, %5\n"
            "vmul.i32 q0, q0, q1\n"
            "vshl.s32 q0, %6\n"
            "vmulh.s32 q0, q0, %q8\n"
            "vrshl.s32 q0, %7\n"
            "vadd.i32 q0, q0, %q9\n"
            "vmax.s32 q0, q0, %q10\n"
            "vmin.s32 q0, q0, %q11\n"
            "vstrb.32 q0, [%2], #4\n"
            "letp lr, 1b"
            : "+l"(a), "+l"(factors), "+l"(y)
            : "r"(p->n), "r"(p->za), "r"(p->zb), "r"(q->grow), "r"(-q->shrink), "w"(m), "w"(z), "w"(lo), "w"(hi)
            : "lr", "q0", "q1", "memory");
        /* The last vector moved them beyond the row. */
        a -= -p->n & 3;
        y -= -p->n & 3;
#else
        for (int32_t i = 0; i < p->n; i++) *y++ = (int8_t)ek_mve_rescale(&p->to, (*a++ - p->za) * (*factors++ - p->zb));
#endif
        if (!p->again) b += p->n;
    }
}

typedef struct {
    int32_t n, zero;
    ek_mve_rescale_t to;
} ek_mve_qrescale_t;

/* y may be x. */
EK_KERNEL void ek_mve_qrescale_s8(const ek_mve_qrescale_t *p, const int8_t *x, int8_t *y) {
#if EK_MVE
    const ek_mve_rescale_t *q = &p->to;
    int32x4_t m = vdupq_n_s32(q->m), lo = vdupq_n_s32(q->lo), hi = vdupq_n_s32(q->hi);
    __asm__ volatile(
        "dlstp.32 lr, %2\n"
        "1: vldrb.s32 q0, [%0], #4\n"
        "vsub.i32 q0, q0, %3\n"
        "vshl.s32 q0, %4\n"
        "vmulh.s32 q0, q0, %q7\n"
        "vrshl.s32 q0, %5\n"
        "vadd.i32 q0, q0, %6\n"
        "vmax.s32 q0, q0, %q8\n"
        "vmin.s32 q0, q0, %q9\n"
        "vstrb.32 q0, [%1], #4\n"
        "letp lr, 1b"
        : "+l"(x), "+l"(y)
        : "r"(p->n), "r"(p->zero), "r"(q->grow), "r"(-q->shrink), "r"(q->zero), "w"(m), "w"(lo), "w"(hi)
        : "lr", "q0", "memory");
#else
    for (int32_t i = 0; i < p->n; i++) y[i] = (int8_t)ek_mve_rescale(&p->to, x[i] - p->zero);
#endif
}

typedef struct {
    int32_t n;
} ek_mve_lut_t;

/* table: for codes from -128 on. */
EK_KERNEL void ek_mve_lut_s8(const ek_mve_lut_t *p, const int8_t *x, const int8_t *table, int8_t *y) {
#if EK_MVE
    uint8x16_t half = vdupq_n_u8(128);
    __asm__ volatile(
        "dlstp.8 lr, %2\n"
        "1: vldrb.8 q0, [%0], #16\n"
        "veor q0, q0, %q4\n"
        "vldrb.u8 q1, [%3, q0]\n"
        "vstrb.8 q1, [%1], #16\n"
        "letp lr, 1b"
        : "+r"(x), "+r"(y)
        : "r"(p->n), "r"(table), "w"(half)
        : "lr", "q0", "q1", "memory");
#else
    for (int32_t i = 0; i < p->n; i++) y[i] = table[x[i] + 128];
#endif
}

typedef struct {
    int32_t ih, iw, c, oh, ow, kh, kw, sh, sw, dh, dw, top, left;
    int32_t x_zero;
    ek_mve_rescale_t to;
} ek_mve_pool_t;

/* The part of a window that lies in the input: taps from `at`, `d` elements apart, as their number; at becomes the
 * place of the first. */
EK_INLINE int32_t ek_mve_clip(int32_t *at, int32_t d, int32_t k, int32_t size) {
    int32_t first = *at, last = *at + (k - 1) * d;
    while (first < 0) first += d;
    while (last >= size) last -= d;
    *at = first;
    return last < first ? 0 : (last - first) / d + 1;
}

/* The sum (less x_zero for each) or the maximum of a window, for all channels of a pixel. */
EK_INLINE void ek_mve_window(const ek_mve_pool_t *p, const int8_t *x, int32_t oy, int32_t ox, int8_t *y, int average) {
    int32_t iy = oy * p->sh - p->top, ix = ox * p->sw - p->left, c = p->c;
    int32_t rows = ek_mve_clip(&iy, p->dh, p->kh, p->ih), columns = ek_mve_clip(&ix, p->dw, p->kw, p->iw);
    int32_t across = p->dw * c, down = p->dh * p->iw * c;
    if (!rows || !columns) rows = columns = 0;
    x += (iy * p->iw + ix) * c;
#if EK_MVE
    /* No intrinsics with predicates here: GCC cannot be told that assembler writes VPR. */
    if (average) {
        const ek_mve_rescale_t *q = &p->to;
        int32x4_t lo = vdupq_n_s32(q->lo), hi = vdupq_n_s32(q->hi);
        for (int32_t i = 0; i < c; i += 4) {
            int32x4_t sum = vdupq_n_s32(-rows * columns * p->x_zero);
            const int8_t *row = x + i, *at;
            for (int32_t k = 0; k < rows; k++, row += down) {
                at = row;
                __asm__ volatile(
                    "vctp.32 %4\n"
                    "dls lr, %2\n"
                    "1: vpst\n"
                    "vldrbt.s32 q0, [%1]\n"
                    "add %1, %1, %3\n"
                    "vadd.i32 %q0, %q0, q0\n"
                    "le lr, 1b"
                    : "+w"(sum), "+l"(at)
                    : "r"(columns), "r"(across), "r"(c - i)
                    : "lr", "q0", "memory");
            }
            sum = vmulhq_s32(vshlq_r_s32(sum, q->grow), vdupq_n_s32(q->m));
            sum = vaddq_n_s32(vrshlq_n_s32(sum, -q->shrink), q->zero);
            sum = vminq_s32(vmaxq_s32(sum, lo), hi);
            __asm__ volatile("vctp.32 %2\nvpst\nvstrbt.32 %q0, [%1]" : : "w"(sum), "l"(y + i), "r"(c - i) : "memory");
        }
    } else {
        for (int32_t i = 0; i < c; i += 16) {
            int8x16_t most = vdupq_n_s8(-128);
            const int8_t *row = x + i, *at;
            for (int32_t k = 0; k < rows; k++, row += down) {
                at = row;
                __asm__ volatile(
                    "vctp.8 %4\n"
                    "dls lr, %2\n"
                    "1: vpst\n"
                    "vldrbt.8 q0, [%1]\n"
                    "add %1, %1, %3\n"
                    "vmax.s8 %q0, %q0, q0\n"
                    "le lr, 1b"
                    : "+w"(most), "+r"(at)
                    : "r"(columns), "r"(across), "r"(c - i)
                    : "lr", "q0", "memory");
            }
            __asm__ volatile("vctp.8 %2\nvpst\nvstrbt.8 %q0, [%1]" : : "w"(most), "r"(y + i), "r"(c - i) : "memory");
        }
    }
#else
    for (int32_t i = 0; i < c; i++) {
        int32_t sum = -rows * columns * p->x_zero, most = -128;
        for (int32_t k = 0; k < rows; k++) {
            for (int32_t j = 0; j < columns; j++) {
                int32_t v = x[k * down + j * across + i];
                sum += v;
                most = v > most ? v : most;
            }
        }
        y[i] = (int8_t)(average ? ek_mve_rescale(&p->to, sum) : most);
    }
#endif
}

EK_KERNEL void ek_mve_avg_pool_s8(const ek_mve_pool_t *p, const int8_t *x, int8_t *y) {
    for (int32_t oy = 0; oy < p->oh; oy++) {
        for (int32_t ox = 0; ox < p->ow; ox++, y += p->c) ek_mve_window(p, x, oy, ox, y, 1);
    }
}

EK_KERNEL void ek_mve_max_pool_s8(const ek_mve_pool_t *p, const int8_t *x, int8_t *y) {
    for (int32_t oy = 0; oy < p->oh; oy++) {
        for (int32_t ox = 0; ox < p->ow; ox++, y += p->c) ek_mve_window(p, x, oy, ox, y, 0);
    }
}

/* The integer instructions may be there alone. */
#if EK_MVE && (__ARM_FEATURE_MVE & 2)
#define EK_MVE_FLOAT 1
#else
#define EK_MVE_FLOAT 0
#endif

/* limit: 512 scales, beyond which codes are at their ends. inverse: the rounded reciprocal. */
typedef struct {
    int32_t n;
    float scale, inverse, limit;
    int32_t zero;
} ek_mve_grid_t;

/* x / scale by two steps of Markstein's division, which give the correctly rounded quotient; Helium does not divide. */
EK_KERNEL void ek_mve_quantize_f32(const ek_mve_grid_t *p, const float *x, int8_t *y) {
#if EK_MVE_FLOAT
    float32x4_t low = vdupq_n_f32(-p->limit), high = vdupq_n_f32(p->limit);
    int32x4_t lo = vdupq_n_s32(-128), hi = vdupq_n_s32(127);
    __asm__ volatile(
        "dlstp.32 lr, %2\n"
        "1: vldrw.32 q0, [%0], #16\n"
        "vmaxnm.f32 q0, q0, %q6\n"
        "vminnm.f32 q0, q0, %q7\n"
        "vmul.f32 q1, q0, %3\n"
        "vmov q2, q0\n"
        "vfma.f32 q2, q1, %4\n"
        "vfma.f32 q1, q2, %3\n"
        "vfma.f32 q0, q1, %4\n"
        "vfma.f32 q1, q0, %3\n"
        "vcvtn.s32.f32 q1, q1\n"
        "vadd.i32 q1, q1, %5\n"
        "vmax.s32 q1, q1, %q8\n"
        "vmin.s32 q1, q1, %q9\n"
        "vstrb.32 q1, [%1], #4\n"
        "letp lr, 1b"
        : "+r"(x), "+l"(y)
        : "r"(p->n), "r"(p->inverse), "r"(-p->scale), "r"(p->zero), "w"(low), "w"(high), "w"(lo), "w"(hi)
        : "lr", "q0", "q1", "q2", "memory");
#else
    for (int32_t i = 0; i < p->n; i++) {
        float v = x[i] < -p->limit ? -p->limit : x[i] > p->limit ? p->limit : x[i];
        /* In this sum the last bit counts ones, and halves are rounded to even. */
        float shifted = v / p->scale + 12582912.0f;
        int32_t bits;
        memcpy(&bits, &shifted, 4);
        y[i] = (int8_t)ek_clamp(bits - 0x4B400000 + p->zero, -128, 127);
    }
#endif
}

EK_KERNEL void ek_mve_dequantize_s8(const ek_mve_grid_t *p, const int8_t *x, float *y) {
#if EK_MVE_FLOAT
    __asm__ volatile(
        "dlstp.32 lr, %2\n"
        "1: vldrb.s32 q0, [%0], #4\n"
        "vsub.i32 q0, q0, %3\n"
        "vcvt.f32.s32 q0, q0\n"
        "vmul.f32 q0, q0, %4\n"
        "vstrw.32 q0, [%1], #16\n"
        "letp lr, 1b"
        : "+l"(x), "+r"(y)
        : "r"(p->n), "r"(p->zero), "r"(p->scale)
        : "lr", "q0", "memory");
#else
    for (int32_t i = 0; i < p->n; i++) y[i] = p->scale * (float)(x[i] - p->zero);
#endif
}

#endif
