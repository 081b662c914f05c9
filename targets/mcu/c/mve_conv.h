/* needs: mve_base */
/*
 * Convolutions and matrix products of int8 codes on Helium.
 *
 * Products are summed 16 at a time from a column (the window of one output pixel, kernel row by kernel row) and from
 * the weights of 4 output channels. Packed weights, per 4 channels: 4 int32 biases, 4 int32 multipliers, then for every
 * 16 places of the column 16 weights of each channel. Weights behind the end of a column are zero, so what a column
 * holds there does not matter.
 */
#ifndef EK_MVE_CONV_H
#define EK_MVE_CONV_H

/* steps: vectors of 16 places in a column. added: whether `add` follows. */
typedef struct {
    int32_t ih, iw, ci, oh, ow, co, kh, kw, sh, sw, dh, dw, top, left, steps, x_zero, y_zero, lo, hi, added;
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
/* Sums of 4 channels in vector q to codes. */
#define EK_MVE_MM_CODE(q)                  \
    "vrmulh.s32 " q ", " q ", q4\n"        \
    "vadd.i32 " q ", " q ", q5\n"          \
    "vmax.s32 " q ", " q ", q6\n"          \
    "vmin.s32 " q ", " q ", q7\n"

/* 8 sums in the even registers, which are those that vmladava adds to; lr is one of them and cannot count loops. */
__attribute__((naked, noinline, unused)) static void ek_mve_mm2(const ek_mve_mm_t *p __attribute__((unused))) {
    __asm__ volatile(
        EK_MVE_MM_ENTER
        "1: ldrd r0, r2, [r11], #8\n"
        "ldrd r4, r6, [r11], #8\n"
        "vldrw.32 q4, [r11], #16\n"
        "mov r8, r0\n"
        "mov r10, r2\n"
        "mov r12, r4\n"
        "mov lr, r6\n"
        "ldrd r1, r3, [sp]\n"
        "ldr r7, [sp, #8]\n"
        "2: vldrb.8 q0, [r1], #16\n"
        "vldrb.8 q2, [r11], #16\n"
        "vmladava.s8 r0, q0, q2\n"
        "vldrb.8 q1, [r3], #16\n"
        "vmladava.s8 r8, q1, q2\n"
        "vldrb.8 q3, [r11], #16\n"
        "vmladava.s8 r2, q0, q3\n"
        "vldrb.8 q2, [r11], #16\n"
        "vmladava.s8 r10, q1, q3\n"
        "vldrb.8 q3, [r11], #16\n"
        "vmladava.s8 r4, q0, q2\n"
        "vmladava.s8 r12, q1, q2\n"
        "vmladava.s8 r6, q0, q3\n"
        "vmladava.s8 lr, q1, q3\n"
        "subs r7, r7, #1\n"
        "bne 2b\n"
        "vmov q0[2], q0[0], r0, r4\n"
        "vmov q0[3], q0[1], r2, r6\n"
        "vmov q1[2], q1[0], r8, r12\n"
        "vmov q1[3], q1[1], r10, lr\n"
        EK_MVE_MM_CODE("q0")
        EK_MVE_MM_CODE("q1")
        "ldrd r7, r2, [sp, #12]\n"
        "vctp.32 r9\n"
        "cbz r2, 3f\n"
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
        "3: add r7, r7, r5\n"
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
        "1: ldrd r0, r2, [r11], #8\n"
        "ldrd r4, r6, [r11], #8\n"
        "vldrw.32 q4, [r11], #16\n"
        "ldr r1, [sp]\n"
        "ldr r7, [sp, #8]\n"
        "dls lr, r7\n"
        "2: vldrb.8 q0, [r1], #16\n"
        "vldrb.8 q1, [r11], #16\n"
        "vmladava.s8 r0, q0, q1\n"
        "vldrb.8 q2, [r11], #16\n"
        "vmladava.s8 r2, q0, q2\n"
        "vldrb.8 q3, [r11], #16\n"
        "vmladava.s8 r4, q0, q3\n"
        "vldrb.8 q1, [r11], #16\n"
        "vmladava.s8 r6, q0, q1\n"
        "le lr, 2b\n"
        "vmov q0[2], q0[0], r0, r4\n"
        "vmov q0[3], q0[1], r2, r6\n"
        EK_MVE_MM_CODE("q0")
        "ldr r2, [sp, #16]\n"
        "vctp.32 r9\n"
        "cbz r2, 3f\n"
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
        "3: vpst\n"
        "vstrbt.32 q0, [r5], #4\n"
        "subs r9, r9, #4\n"
        "bgt 1b\n"
        EK_MVE_MM_LEAVE);
}
#endif

/* The column of output pixel (oy, ox). */
EK_INLINE void ek_mve_column(const ek_mve_conv_t *p, const int8_t *x, int32_t oy, int32_t ox, int8_t *col) {
    int32_t ci = p->ci, y = oy * p->sh - p->top, left = ox * p->sw - p->left;
    /* Taps next to one another are one run of bytes. */
    int32_t joined = p->dw == 1 ? p->kw : 1, run = joined * ci;
    for (int32_t ky = 0; ky < p->kh; ky++, y += p->dh) {
        int32_t at = left;
        for (int32_t kx = 0; kx < p->kw; kx += joined, at += p->dw) {
            int32_t before = at < 0 ? -at : 0, behind = at + joined - p->iw;
            if (y < 0 || y >= p->ih || before >= joined || behind >= joined) {
                ek_mve_fill(col, p->x_zero, run);
            } else {
                before *= ci;
                behind = behind > 0 ? behind * ci : 0;
                const int8_t *from = x + (y * p->iw + at) * ci;
                if (before) ek_mve_fill(col, p->x_zero, before);
                ek_mve_copy(col + before, from + before, run - before - behind);
                if (behind) ek_mve_fill(col + run - behind, p->x_zero, behind);
            }
            col += run;
        }
    }
}

#if !EK_MVE
EK_INLINE int32_t ek_mve_int(const int8_t *from) {
    int32_t v;
    memcpy(&v, from, 4);
    return v;
}

/* What ek_mve_mm1 does. depth: places of the column in use. */
EK_INLINE void ek_mve_mm(const ek_mve_conv_t *p, const int8_t *col, int32_t depth, const int8_t *w, const int8_t *res,
                         int8_t *y) {
    for (int32_t o = 0; o < p->co; o++) {
        const int8_t *block = w + (o >> 2) * (32 + 64 * p->steps), *row = block + 32 + (o & 3) * 16;
        int32_t sum = ek_mve_int(block + (o & 3) * 4);
        for (int32_t k = 0; k < depth; k++) sum += col[k] * row[(k >> 4) * 64 + (k & 15)];
        int32_t code = ek_clamp(ek_rqh(sum, ek_mve_int(block + 16 + (o & 3) * 4)) + p->y_zero, p->lo, p->hi);
        y[o] = (int8_t)(res ? ek_mve_add(&p->add, code, res[o]) : code);
    }
}
#endif

EK_KERNEL void ek_mve_conv_add_s8(const ek_mve_conv_t *p, const int8_t *x, const int8_t *w, const int8_t *res,
                                  int8_t *y, int8_t *scratch) {
    int32_t pixels = p->oh * p->ow, depth = p->kh * p->kw * p->ci, oy = 0, ox = 0;
    int pointwise = p->kh * p->kw * p->sh * p->sw == 1 && p->oh * p->ow == p->ih * p->iw && !(p->top | p->left);
#if EK_MVE
    int32_t width = p->steps * 16, end = p->ih * p->iw * p->ci;
    ek_mve_mm_t mm = {0,       0,    p->steps, p->co, p->added ? &p->add : 0, res ? (int32_t)(res - y) : 0, y, w,
                      p->y_zero, p->lo, p->hi};
    for (int32_t i = 0; i < pixels; i += 2) {
        int two = i + 1 < pixels;
        for (int k = 0; k <= two; k++) {
            const int8_t *at = x + (i + k) * p->ci;
            /* The last columns would be read beyond the input where their length is no multiple of 16. */
            if (!pointwise || (i + k) * p->ci + width > end) {
                int8_t *col = scratch + k * width;
                if (pointwise)
                    ek_mve_copy(col, at, depth);
                else
                    ek_mve_column(p, x, oy, ox, col);
                at = col;
            }
            if (k)
                mm.x1 = at;
            else
                mm.x0 = at;
            if (++ox == p->ow) {
                ox = 0;
                oy++;
            }
        }
        mm.y = y + i * p->co;
        if (two)
            ek_mve_mm2(&mm);
        else
            ek_mve_mm1(&mm);
    }
#else
    for (int32_t i = 0; i < pixels; i++) {
        const int8_t *col = x + i * p->ci;
        if (!pointwise) {
            ek_mve_column(p, x, oy, ox, scratch);
            col = scratch;
        }
        ek_mve_mm(p, col, depth, w, p->added ? res + i * p->co : 0, y + i * p->co);
        if (++ox == p->ow) {
            ox = 0;
            oy++;
        }
    }
#endif
}

EK_KERNEL void ek_mve_conv_s8(const ek_mve_conv_t *p, const int8_t *x, const int8_t *w, int8_t *y, int8_t *scratch) {
    ek_mve_conv_add_s8(p, x, w, 0, y, scratch);
}

#endif
