/* needs: mve_base */
/*
 * Convolutions and matrix products of int8 codes on Helium.
 *
 * Products are summed 16 at a time from a column (the window of one output pixel: left to right, from top to bottom,
 * channels) and from the weights of 4 output channels. Packed weights, per 4 channels: for every 16 places of the
 * column 16 weights of each channel, then 4 int32 biases and 4 int32 multipliers. Weights behind the end of a column
 * are zero, so what is read there does not matter.
 */
#ifndef EK_MVE_CONV_H
#define EK_MVE_CONV_H

/*
 * steps: vectors of 16 places in a column. pixels: of a row, how many are worked on at a time. shared: whether columns
 * of neighbours overlap in scratch memory. direct: with a 1 x 1 kernel, how many pixels have columns that may be read
 * from the input, since no vector goes beyond its end; 0 with other kernels. add: of the fused addition, if any.
 */
typedef struct {
    int32_t ih, iw, ci, oh, ow, co, kh, kw, sh, sw, dh, dw, top, left, steps, pixels, shared, pointwise, direct;
    int32_t x_zero, y_zero, lo, hi;
    ek_mve_add_t add;
} ek_mve_conv_t;

#if EK_MVE
/* Two columns, or one, by all channels. Offsets of the fields are written out in the code below. */
typedef struct {
    const int8_t *x0, *x1;
    int32_t steps, co;
    const ek_mve_add_t *add; /* or 0 */
    int32_t beside;          /* address of the residual less that of y */
    int8_t *y;               /* of x0; that of x1 follows it */
    const int8_t *w;
    int32_t zero, lo, hi;
} ek_mve_mm_t;

#define EK_MVE_MM_ENTER                    \
    "push {r4-r11, lr}\n"                  \
    "vpush {d8-d15}\n"                     \
    "ldm r0!, {r1-r6}\n"                   \
    "push {r1-r6}\n"                       \
    "ldm r0, {r5, r11, r12}\n"             \
    "vdup.32 q5, r12\n"                    \
    "ldrd r12, lr, [r0, #12]\n"            \
    "vdup.32 q6, r12\n"                    \
    "vdup.32 q7, lr\n"                     \
    "mov r9, r4\n"
#define EK_MVE_MM_LEAVE                    \
    "add sp, sp, #24\n"                    \
    "vpop {d8-d15}\n"                      \
    "pop {r4-r11, pc}\n"
/* 16 places of the columns by 4 channels. op: of the first 16, which set the sums, and of those that add to them. */
#define EK_MVE_MM_STEP2(op)                \
    "vldrb.8 q0, [r1], #16\n"              \
    "vldrb.8 q2, [r11], #16\n"             \
    op " r0, q0, q2\n"                     \
    "vldrb.8 q1, [r3], #16\n"              \
    op " r8, q1, q2\n"                     \
    "vldrb.8 q3, [r11], #16\n"             \
    op " r2, q0, q3\n"                     \
    "vldrb.8 q2, [r11], #16\n"             \
    op " r10, q1, q3\n"                    \
    "vldrb.8 q3, [r11], #16\n"             \
    op " r4, q0, q2\n"                     \
    op " r12, q1, q2\n"                    \
    op " r6, q0, q3\n"                     \
    op " lr, q1, q3\n"
#define EK_MVE_MM_STEP1(op)                \
    "vldrb.8 q0, [r1], #16\n"              \
    "vldrb.8 q1, [r11], #16\n"             \
    op " r0, q0, q1\n"                     \
    "vldrb.8 q2, [r11], #16\n"             \
    op " r2, q0, q2\n"                     \
    "vldrb.8 q3, [r11], #16\n"             \
    op " r4, q0, q3\n"                     \
    "vldrb.8 q1, [r11], #16\n"             \
    op " r6, q0, q1\n"
/* Sums of 4 channels in vector q, without the biases in q2, by the multipliers in q3 to codes. */
#define EK_MVE_MM_CODE(q)                  \
    "vadd.i32 " q ", " q ", q2\n"          \
    "vrmulh.s32 " q ", " q ", q3\n"        \
    "vadd.i32 " q ", " q ", q5\n"          \
    "vmax.s32 " q ", " q ", q6\n"          \
    "vmin.s32 " q ", " q ", q7\n"

/* 8 sums in the even registers, which are those that vmladava adds to; lr is one of them and cannot count loops. */
__attribute__((naked, noinline, unused)) static void ek_mve_mm2(const ek_mve_mm_t *p __attribute__((unused))) {
    __asm__ volatile(
        EK_MVE_MM_ENTER
        "1: ldrd r1, r3, [sp]\n"
        "ldr r7, [sp, #8]\n"
        EK_MVE_MM_STEP2("vmladav.s8")
        "subs r7, r7, #1\n"
        "beq 3f\n"
        "2:\n"
        EK_MVE_MM_STEP2("vmladava.s8")
        "subs r7, r7, #1\n"
        "bne 2b\n"
        "3:\n"
        "vmov q0[2], q0[0], r0, r4\n"
        "vmov q0[3], q0[1], r2, r6\n"
        "vmov q1[2], q1[0], r8, r12\n"
        "vmov q1[3], q1[1], r10, lr\n"
        "vldrw.32 q2, [r11], #16\n"
        "vldrw.32 q3, [r11], #16\n"
        EK_MVE_MM_CODE("q0")
        EK_MVE_MM_CODE("q1")
        "ldrd r7, r2, [sp, #12]\n"
        "vctp.32 r9\n"
        "cbz r2, 4f\n"
        "ldr r1, [sp, #20]\n"
        "add r1, r1, r5\n"
        "adds r3, r1, r7\n"
        "ldm r2, {r2, r4, r6, r8, r10, r12, lr}\n"
        "rsb r8, r8, #0\n"
        "vdup.32 q2, r6\n"
        "vdup.32 q3, r6\n"
        "vmla.s32 q2, q0, r2\n"
        "vmla.s32 q3, q1, r2\n"
        "vpstt\n"
        "vldrbt.s32 q0, [r1]\n"
        "vldrbt.s32 q1, [r3]\n"
        "vmla.s32 q2, q0, r4\n"
        "vmla.s32 q3, q1, r4\n"
        "vshl.s32 q2, r8\n"
        "vshl.s32 q3, r8\n"
        "vadd.i32 q0, q2, r10\n"
        "vadd.i32 q1, q3, r10\n"
        "vdup.32 q2, r12\n"
        "vdup.32 q3, lr\n"
        "vmax.s32 q0, q0, q2\n"
        "vmax.s32 q1, q1, q2\n"
        "vmin.s32 q0, q0, q3\n"
        "vmin.s32 q1, q1, q3\n"
        "4: add r7, r7, r5\n"
        "vpstt\n"
        "vstrbt.32 q0, [r5], #4\n"
        "vstrbt.32 q1, [r7]\n"
        "subs r9, r9, #4\n"
        "bgt 1b\n"
        EK_MVE_MM_LEAVE);
}

__attribute__((naked, noinline, unused)) static void ek_mve_mm1(const ek_mve_mm_t *p __attribute__((unused))) {
    __asm__ volatile(
        EK_MVE_MM_ENTER
        "1: ldr r1, [sp]\n"
        "ldr r7, [sp, #8]\n"
        "subs r7, r7, #1\n"
        EK_MVE_MM_STEP1("vmladav.s8")
        "wls lr, r7, 3f\n"
        "2:\n"
        EK_MVE_MM_STEP1("vmladava.s8")
        "le lr, 2b\n"
        "3:\n"
        "vmov q0[2], q0[0], r0, r4\n"
        "vmov q0[3], q0[1], r2, r6\n"
        "vldrw.32 q2, [r11], #16\n"
        "vldrw.32 q3, [r11], #16\n"
        EK_MVE_MM_CODE("q0")
        "ldr r2, [sp, #16]\n"
        "vctp.32 r9\n"
        "cbz r2, 4f\n"
        "ldr r1, [sp, #20]\n"
        "add r1, r1, r5\n"
        "ldm r2, {r2, r4, r6, r8, r10, r12, lr}\n"
        "rsb r8, r8, #0\n"
        "vdup.32 q2, r6\n"
        "vmla.s32 q2, q0, r2\n"
        "vpst\n"
        "vldrbt.s32 q0, [r1]\n"
        "vmla.s32 q2, q0, r4\n"
        "vshl.s32 q2, r8\n"
        "vadd.i32 q0, q2, r10\n"
        "vdup.32 q2, r12\n"
        "vdup.32 q3, lr\n"
        "vmax.s32 q0, q0, q2\n"
        "vmin.s32 q0, q0, q3\n"
        "4: vpst\n"
        "vstrbt.32 q0, [r5], #4\n"
        "subs r9, r9, #4\n"
        "bgt 1b\n"
        EK_MVE_MM_LEAVE);
}
#endif

/* `count` pieces of n bytes, all > 0: from one another in the input, to places `apart` bytes apart. */
EK_INLINE void ek_mve_spread(int8_t *to, const int8_t *from, int32_t n, int32_t step, int32_t count, int32_t apart) {
#if EK_MVE
    if (n <= 16) {
        __asm__ volatile(
            "vctp.8 %2\n"
            "dls lr, %3\n"
            "1: vpstt\n"
            "vldrbt.8 q0, [%1]\n"
            "vstrbt.8 q0, [%0]\n"
            "add %1, %1, %4\n"
            "add %0, %0, %5\n"
            "le lr, 1b"
            : "+r"(to), "+r"(from)
            : "r"(n), "r"(count), "r"(step), "r"(apart)
            : "lr", "q0", "memory");
    } else {
        int8_t *t;
        const int8_t *f;
        __asm__ volatile(
            "1: mov %0, %2\n"
            "mov %1, %3\n"
            "dlstp.8 lr, %5\n"
            "2: vldrb.8 q0, [%1], #16\n"
            "vstrb.8 q0, [%0], #16\n"
            "letp lr, 2b\n"
            "add %2, %2, %7\n"
            "add %3, %3, %6\n"
            "subs %4, %4, #1\n"
            "bne 1b"
            : "=&r"(t), "=&r"(f), "+r"(to), "+r"(from), "+r"(count)
            : "r"(n), "r"(step), "r"(apart)
            : "lr", "q0", "cc", "memory");
    }
#else
    for (; count; count--, to += apart, from += step) memcpy(to, from, (size_t)n);
#endif
}

/* Sums of 4 output channels, from their block of packed weights. depth: places of the column in use. */
EK_INLINE void ek_mve_sums(const int8_t *col, const int8_t *block, int32_t steps, int32_t depth, int32_t *sums) {
    const int8_t *bias = block + 64 * steps;
    int32_t a = ek_mve_int(bias), b = ek_mve_int(bias + 4), c = ek_mve_int(bias + 8), d = ek_mve_int(bias + 12);
#if EK_MVE
    (void)depth;
    __asm__ volatile(
        "dls lr, %6\n"
        "1: vldrb.8 q0, [%4], #16\n"
        "vldrb.8 q1, [%5], #16\n"
        "vmladava.s8 %0, q0, q1\n"
        "vldrb.8 q2, [%5], #16\n"
        "vmladava.s8 %1, q0, q2\n"
        "vldrb.8 q3, [%5], #16\n"
        "vmladava.s8 %2, q0, q3\n"
        "vldrb.8 q1, [%5], #16\n"
        "vmladava.s8 %3, q0, q1\n"
        "le lr, 1b"
        : "+Te"(a), "+Te"(b), "+Te"(c), "+Te"(d), "+r"(col), "+r"(block)
        : "r"(steps)
        : "lr", "q0", "q1", "q2", "q3", "memory");
#else
    for (int32_t k = 0; k < depth; k++) {
        const int8_t *w = block + (k >> 4) * 64 + (k & 15);
        a += col[k] * w[0];
        b += col[k] * w[16];
        c += col[k] * w[32];
        d += col[k] * w[48];
    }
#endif
    sums[0] = a;
    sums[1] = b;
    sums[2] = c;
    sums[3] = d;
}

/* What pixels are computed from and stored to: packed weights, the residual or 0, the output, shifts or 0. */
typedef struct {
    const int8_t *w;
    const void *res;
    void *y;
    const int8_t *shift;
} ek_mve_out_t;

/* Computes n pixels from number `first` on, whose columns lie `step` bytes apart. */
typedef void (*ek_mve_pixels_t)(const ek_mve_conv_t *p, const ek_mve_out_t *out, const int8_t *col, int32_t step,
                                int32_t first, int32_t n);

/* Codes, of the addition where there is a residual. */
__attribute__((noinline, unused)) static void ek_mve_codes(const ek_mve_conv_t *p, const ek_mve_out_t *out,
                                                           const int8_t *col, int32_t step, int32_t first, int32_t n) {
    const int8_t *res = (const int8_t *)out->res;
    int8_t *y = (int8_t *)out->y + first * p->co;
    if (res) res += first * p->co;
#if EK_MVE
    int32_t beside = (int32_t)((uintptr_t)res - (uintptr_t)y);
    ek_mve_mm_t mm = {col, col, p->steps, p->co, res ? &p->add : 0, beside, y, out->w, p->y_zero, p->lo, p->hi};
    for (; n > 1; n -= 2) {
        mm.x1 = mm.x0 + step;
        ek_mve_mm2(&mm);
        mm.x0 = mm.x1 + step;
        mm.y += 2 * p->co;
    }
    if (n) ek_mve_mm1(&mm);
#else
    for (; n; n--, col += step, y += p->co) {
        const int8_t *block = out->w;
        for (int32_t o = 0; o < p->co; o += 4, block += 32 + 64 * p->steps) {
            const int8_t *factors = block + 64 * p->steps + 16;
            int32_t sums[4], some = p->co - o < 4 ? p->co - o : 4;
            ek_mve_sums(col, block, p->steps, p->kh * p->kw * p->ci, sums);
            for (int32_t i = 0; i < some; i++) {
                int32_t v = ek_rqh(sums[i], ek_mve_int(factors + 4 * i));
                v = ek_clamp(v + p->y_zero, p->lo, p->hi);
                y[o + i] = (int8_t)(res ? ek_mve_add(&p->add, v, res[o + i]) : v);
            }
        }
        if (res) res += p->co;
    }
#endif
}

/* `count` strips, of kh pieces of ci bytes each, from input columns ix, ix + across, ... and rows iy, iy + dh, ... */
__attribute__((noinline, unused)) static void ek_mve_strips(const ek_mve_conv_t *p, const int8_t *x, int32_t iy,
                                                            int32_t ix, int32_t across, int32_t count, int8_t *to) {
    int32_t ci = p->ci, strip = p->kh * ci, inside;
    int8_t *end = to + count * strip, *start = to;
    for (; count && ix < 0; count--, ix += across) to += strip;
    for (inside = count; inside && ix + (inside - 1) * across >= p->iw;) inside--;
    if (to > start) ek_mve_fill(start, p->x_zero, to - start);
    start = to + inside * strip;
    if (end > start) ek_mve_fill(start, p->x_zero, end - start);
    if (!inside) return;
    for (int32_t ky = 0; ky < p->kh; ky++, iy += p->dh, to += ci) {
        if (iy < 0 || iy >= p->ih) {
            for (int8_t *at = to; at < start; at += strip) ek_mve_fill(at, p->x_zero, ci);
        } else {
            ek_mve_spread(to, x + (iy * p->iw + ix) * ci, ci, across * ci, inside, strip);
        }
    }
}

/* The columns of n pixels from (oy, ox). */
EK_INLINE void ek_mve_columns(const ek_mve_conv_t *p, const int8_t *x, int32_t oy, int32_t ox, int32_t n, int8_t *to) {
    int32_t iy = oy * p->sh - p->top, ix = ox * p->sw - p->left;
    if (p->shared || p->kw == 1) {
        ek_mve_strips(p, x, iy, ix, p->shared ? 1 : p->sw, p->shared ? (n - 1) * p->sw + p->kw : n, to);
        return;
    }
    for (; n; n--, ix += p->sw, to += p->kw * p->kh * p->ci) ek_mve_strips(p, x, iy, ix, p->dw, p->kw, to);
}

__attribute__((noinline, unused)) static void ek_mve_walk(const ek_mve_conv_t *p, const int8_t *x, int8_t *scratch,
                                                          ek_mve_pixels_t pixels, const ek_mve_out_t *out) {
    int32_t ci = p->ci, step = (p->shared ? p->sw : p->kw) * p->kh * ci;
    if (p->pointwise) {
        int32_t rest = p->oh * p->ow - p->direct;
        pixels(p, out, x, ci, 0, p->direct);
        if (!rest) return;
        ek_mve_copy(scratch, x + p->direct * ci, rest * ci);
        pixels(p, out, scratch, ci, p->direct, rest);
        return;
    }
    for (int32_t oy = 0; oy < p->oh; oy++) {
        for (int32_t ox = 0; ox < p->ow; ox += p->pixels) {
            int32_t n = p->ow - ox < p->pixels ? p->ow - ox : p->pixels;
            ek_mve_columns(p, x, oy, ox, n, scratch);
            pixels(p, out, scratch, step, oy * p->ow + ox, n);
        }
    }
}

EK_KERNEL void ek_mve_conv_s8(const ek_mve_conv_t *p, const int8_t *x, const int8_t *w, int8_t *y, int8_t *scratch) {
    ek_mve_out_t out = {w, 0, y, 0};
    ek_mve_walk(p, x, scratch, ek_mve_codes, &out);
}

/* y may be res. */
EK_KERNEL void ek_mve_conv_add_s8(const ek_mve_conv_t *p, const int8_t *x, const int8_t *w, const int8_t *res,
                                  int8_t *y, int8_t *scratch) {
    ek_mve_out_t out = {w, res, y, 0};
    ek_mve_walk(p, x, scratch, ek_mve_codes, &out);
}

#endif
