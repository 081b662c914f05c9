/* needs: mve_base */
/*
 * Depthwise convolution of int8 codes on Helium, 16 channels at a time.
 *
 * Products of bytes are 16 bits wide, and so is the sum of two, since a weight is never -128. Vectors hold them for
 * even and for odd channels; of these the upper half of every 32-bit lane is added to a 32-bit sum by vqdmlah with
 * 2^15, which is an addition of lane >> 16, and the lower half once widened. The sums therefore hold channels 0, 4, 8,
 * 12, then 2, 6, 10, 14, then 1, 5, 9, 13, then 3, 7, 11, 15 of a block.
 *
 * Packed weights, per 16 channels: 16 int32 biases in the order of the sums, 16 weights of every tap, and 16 int32
 * multipliers in that order. The taps of the window are followed by one of zeros where their number is even.
 */
#ifndef EK_MVE_DEPTHWISE_H
#define EK_MVE_DEPTHWISE_H

/*
 * taps: odd. padded: whether a tap may lie beside the input, or is the one of zeros. joined: whether neighbours in a
 * row are taken as channels of one pixel, with a stride of 1, an odd number of taps, and 1, 2, 4 or 8 channels, which
 * the packed weights repeat up to 16.
 */
typedef struct {
    int32_t ih, iw, c, oh, ow, kh, kw, sh, sw, dh, dw, top, left, taps, padded, joined, x_zero, y_zero, lo, hi;
} ek_mve_depthwise_t;

#if EK_MVE
/* One pixel. back: bytes from the end of a block of weights to the next. Offsets of the fields are written out in the
 * code below. */
typedef struct {
    int8_t *y;
    int32_t channels;
    const int8_t *w;
    const ek_u32 *taps; /* where the input under each tap starts */
    int32_t zero, pairs, back, lo, hi;
} ek_mve_dw_t;

/* r9: y, r11: channels, r12: 2^15, lr: zero point; on the stack the ends of the range, 16 times each. */
#define EK_MVE_DW_ENTER                         \
    "push {r4-r11, lr}\n"                       \
    "vpush {d8-d15}\n"                          \
    "ldrd r1, r2, [r0, #28]\n"                  \
    "vdup.8 q0, r1\n"                           \
    "vdup.8 q1, r2\n"                           \
    "sub sp, sp, #32\n"                         \
    "vstrw.32 q0, [sp]\n"                       \
    "vstrw.32 q1, [sp, #16]\n"                  \
    "ldrd r9, r11, [r0]\n"                      \
    "ldr lr, [r0, #16]\n"                       \
    "mov r12, #0x8000\n"
#define EK_MVE_DW_LEAVE                         \
    "add sp, sp, #32\n"                         \
    "vpop {d8-d15}\n"                           \
    "pop {r4-r11, pc}\n"
#define EK_MVE_DW_BIAS                          \
    "vldrw.32 q0, [r10], #16\n"                 \
    "vldrw.32 q1, [r10], #16\n"                 \
    "vldrw.32 q2, [r10], #16\n"                 \
    "vldrw.32 q3, [r10], #16\n"
/* Products of even channels in q6 and of odd ones in q4 into the sums. */
#define EK_MVE_DW_ADD                           \
    "vqdmlah.s32 q1, q6, r12\n"                 \
    "vmovlb.s16 q6, q6\n"                       \
    "vqdmlah.s32 q3, q4, r12\n"                 \
    "vadd.i32 q0, q0, q6\n"                     \
    "vmovlb.s16 q4, q4\n"                       \
    "vadd.i32 q2, q2, q4\n"
/* Two taps, whose addresses are in a and b. */
#define EK_MVE_DW_TWO(a, b)                     \
    "vldrb.8 q4, [" a "], #16\n"                \
    "vldrb.8 q5, [r10], #16\n"                  \
    "vmullb.s8 q6, q4, q5\n"                    \
    "vldrb.8 q7, [" b "], #16\n"                \
    "vmullt.s8 q4, q4, q5\n"                    \
    "vldrb.8 q5, [r10]\n"                       \
    "vmullb.s8 q5, q7, q5\n"                    \
    "vadd.i16 q6, q6, q5\n"                     \
    "vldrb.8 q5, [r10], #16\n"                  \
    "vmullt.s8 q7, q7, q5\n"                    \
    "vadd.i16 q4, q4, q7\n"                     \
    EK_MVE_DW_ADD
/* Sums to codes in the order of the channels. */
#define EK_MVE_DW_CODES                         \
    "vldrw.32 q4, [r10], #16\n"                 \
    "vrmulh.s32 q0, q0, q4\n"                   \
    "vldrw.32 q5, [r10], #16\n"                 \
    "vrmulh.s32 q1, q1, q5\n"                   \
    "vldrw.32 q6, [r10], #16\n"                 \
    "vrmulh.s32 q2, q2, q6\n"                   \
    "vldrw.32 q7, [r10], #16\n"                 \
    "vrmulh.s32 q3, q3, q7\n"                   \
    "vqmovnb.s32 q0, q0\n"                      \
    "vqmovnb.s32 q2, q2\n"                      \
    "vqmovnt.s32 q0, q1\n"                      \
    "vqmovnt.s32 q2, q3\n"                      \
    "vqadd.s16 q0, q0, lr\n"                    \
    "vldrw.32 q4, [sp]\n"                       \
    "vqadd.s16 q2, q2, lr\n"                    \
    "vqmovnb.s16 q0, q0\n"                      \
    "vldrw.32 q5, [sp, #16]\n"                  \
    "vqmovnt.s16 q0, q2\n"                      \
    "vmax.s8 q0, q0, q4\n"                      \
    "vmin.s8 q0, q0, q5\n"

/* 9 taps, and whole blocks of channels: the addresses stay in registers. */
__attribute__((naked, noinline, unused)) static void ek_mve_dw9(const ek_mve_dw_t *p __attribute__((unused))) {
    __asm__ volatile(
        EK_MVE_DW_ENTER
        "ldrd r10, r0, [r0, #8]\n"
        "ldm r0, {r0-r8}\n"
        "1:\n"
        EK_MVE_DW_BIAS
        "vldrb.8 q4, [r0], #16\n"
        "vldrb.8 q5, [r10], #16\n"
        "vmullb.s8 q6, q4, q5\n"
        "vmullt.s8 q4, q4, q5\n"
        EK_MVE_DW_ADD
        EK_MVE_DW_TWO("r1", "r2")
        EK_MVE_DW_TWO("r3", "r4")
        EK_MVE_DW_TWO("r5", "r6")
        EK_MVE_DW_TWO("r7", "r8")
        EK_MVE_DW_CODES
        "vstrb.8 q0, [r9], #16\n"
        "subs r11, r11, #16\n"
        "bgt 1b\n"
        EK_MVE_DW_LEAVE);
}

/* Any number of taps and channels. */
__attribute__((naked, noinline, unused)) static void ek_mve_dw(const ek_mve_dw_t *p __attribute__((unused))) {
    __asm__ volatile(
        EK_MVE_DW_ENTER
        "ldrd r10, r1, [r0, #8]\n"
        "ldrd r2, r6, [r0, #20]\n"
        "mov r3, #0\n"
        "mov r7, lr\n"
        "1: vctp.8 r11\n"
        "mov r0, r1\n"
        EK_MVE_DW_BIAS
        "ldr r4, [r0], #4\n"
        "add r4, r4, r3\n"
        "vpst\n"
        "vldrbt.8 q4, [r4]\n"
        "vldrb.8 q5, [r10], #16\n"
        "vmullb.s8 q6, q4, q5\n"
        "vmullt.s8 q4, q4, q5\n"
        EK_MVE_DW_ADD
        "wls lr, r2, 3f\n"
        "2: ldrd r4, r5, [r0], #8\n"
        "add r4, r4, r3\n"
        "add r5, r5, r3\n"
        "vpst\n"
        "vldrbt.8 q4, [r4]\n"
        "vldrb.8 q5, [r10], #16\n"
        "vmullb.s8 q6, q4, q5\n"
        "vpst\n"
        "vldrbt.8 q7, [r5]\n"
        "vmullt.s8 q4, q4, q5\n"
        "vldrb.8 q5, [r10]\n"
        "vmullb.s8 q5, q7, q5\n"
        "vadd.i16 q6, q6, q5\n"
        "vldrb.8 q5, [r10], #16\n"
        "vmullt.s8 q7, q7, q5\n"
        "vadd.i16 q4, q4, q7\n"
        EK_MVE_DW_ADD
        "le lr, 2b\n"
        "3: mov lr, r7\n"
        EK_MVE_DW_CODES
        "vpst\n"
        "vstrbt.8 q0, [r9], #16\n"
        "sub r10, r10, r6\n"
        "adds r3, r3, #16\n"
        "subs r11, r11, #16\n"
        "bgt 1b\n"
        EK_MVE_DW_LEAVE);
}

/* Moves n > 0 addresses on. */
EK_INLINE void ek_mve_advance(ek_u32 *taps, int32_t n, int32_t by) {
    __asm__ volatile(
        "dlstp.32 lr, %1\n"
        "1: vldrw.32 q0, [%0]\n"
        "vadd.i32 q0, q0, %2\n"
        "vstrw.32 q0, [%0], #16\n"
        "letp lr, 1b"
        : "+r"(taps)
        : "r"(n), "r"(by)
        : "lr", "q0", "memory");
}

/* n > 0 addresses: of the pixels at columns ix + columns[i], `offsets` behind x, or `zeros` where there are none. */
EK_INLINE void ek_mve_place(ek_u32 *taps, const ek_u32 *offsets, const ek_u32 *columns, int32_t n, uint32_t x,
                            int32_t ix, int32_t iw, uint32_t zeros) {
    uint32x4_t beside = vdupq_n_u32(zeros), width = vdupq_n_u32((uint32_t)iw);
    __asm__ volatile(
        "dlstp.32 lr, %3\n"
        "1: vldrw.32 q0, [%1], #16\n"
        "vldrw.32 q1, [%2], #16\n"
        "vadd.i32 q0, q0, %4\n"
        "vadd.i32 q1, q1, %5\n"
        "vmov q2, %q6\n"
        "vpt.u32 hi, %q7, q1\n"
        "vmovt q2, q0\n"
        "vstrw.32 q2, [%0], #16\n"
        "letp lr, 1b"
        : "+r"(taps), "+r"(offsets), "+r"(columns)
        : "r"(n), "r"(x), "r"(ix), "w"(beside), "w"(width)
        : "lr", "q0", "q1", "q2", "memory");
}

/* scratch: for each tap an address, an offset and a column, then a pixel of zero points where `padded`. */
EK_KERNEL void ek_mve_depthwise_s8(const ek_mve_depthwise_t *p, const int8_t *x, const int8_t *w, int8_t *y,
                                   int8_t *scratch) {
    int32_t c = p->c, kw = p->kw, all = p->taps, ow = p->ow, window = (kw - 1) * p->dw;
    ek_u32 *taps = (ek_u32 *)(void *)scratch, *offsets = taps + all, *columns = offsets + all, *to = offsets;
    uint32_t zeros = (uint32_t)(columns + all);
    ek_mve_dw_t dw = {y, c, w, taps, p->y_zero, all >> 1, p->joined ? 128 + 16 * all : 0, p->lo, p->hi};
    if (p->padded) ek_mve_fill(scratch + 12 * all, p->x_zero, (c + 15) & ~15);
    for (int32_t ky = 0; ky < p->kh; ky++) {
        for (int32_t kx = 0; kx < kw; kx++, to++) {
            to[0] = (uint32_t)((ky * p->dh * p->iw + kx * p->dw) * c);
            to[all] = (uint32_t)(kx * p->dw);
        }
    }
    for (int32_t oy = 0, iy = -p->top; oy < p->oh; oy++, iy += p->sh) {
        /* Taps above the input, and up to the end of those in it. */
        int32_t first = 0, end, n, ix = -p->left, before = 0;
        while (first < p->kh && iy + first * p->dh < 0) first++;
        for (end = first; end < p->kh && iy + end * p->dh < p->ih;) end++;
        first *= kw;
        end *= kw;
        for (int32_t i = 0; i < all; i++) taps[i] = zeros;
        for (int32_t ox = 0; ox < ow; ox += n, ix += n * p->sw) {
            int32_t inside = ix >= 0 && ix + window < p->iw;
            n = 1;
            if (inside & before)
                ek_mve_advance(taps + first, end - first, p->sw * c);
            else if (end > first)
                ek_mve_place(taps + first, offsets + first, columns + first, end - first,
                             (uint32_t)x + (uint32_t)((iy * p->iw + ix) * c), ix, p->iw, zeros);
            before = inside && end > first;
            /* All pixels whose windows lie inside, and whose taps therefore follow one another. */
            if (inside && p->joined && first == 0 && end == p->kh * kw) {
                n = p->iw - window - ix;
                if (n > ow - ox) n = ow - ox;
                before = 0;
            }
            dw.channels = n * c;
            if (all == 9 && !(c & 15))
                ek_mve_dw9(&dw);
            else
                ek_mve_dw(&dw);
            dw.y += n * c;
        }
    }
}
#else
EK_INLINE int32_t ek_mve_lane(int32_t c) { return (c & 1) * 8 + (c >> 1 & 1) * 4 + (c >> 2 & 3); }

EK_KERNEL void ek_mve_depthwise_s8(const ek_mve_depthwise_t *p, const int8_t *x, const int8_t *w, int8_t *y,
                                   int8_t *scratch) {
    int32_t c = p->c;
    (void)scratch;
    for (int32_t oy = 0, top = -p->top; oy < p->oh; oy++, top += p->sh) {
        for (int32_t ox = 0, left = -p->left; ox < p->ow; ox++, left += p->sw, y += c) {
            for (int32_t i = 0; i < c; i++) {
                const int8_t *block = w + (i >> 4) * (128 + 16 * p->taps), *at = block + 64 + (i & 15);
                int32_t sum = ek_mve_int(block + 4 * ek_mve_lane(i & 15));
                for (int32_t ky = 0, iy = top; ky < p->kh; ky++, iy += p->dh) {
                    for (int32_t kx = 0, ix = left; kx < p->kw; kx++, ix += p->dw, at += 16) {
                        int padding = iy < 0 || iy >= p->ih || ix < 0 || ix >= p->iw;
                        sum += *at * (padding ? p->x_zero : x[(iy * p->iw + ix) * c + i]);
                    }
                }
                int32_t m = ek_mve_int(block + 64 + 16 * p->taps + 4 * ek_mve_lane(i & 15));
                y[i] = (int8_t)ek_clamp(ek_rqh(sum, m) + p->y_zero, p->lo, p->hi);
            }
        }
    }
}
#endif

#endif
