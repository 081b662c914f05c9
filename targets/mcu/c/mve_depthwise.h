/* needs: mve_base */
/*
 * Depthwise convolution of int8 codes on Helium, 16 channels at a time.
 *
 * Products of bytes are 16 bits wide, and so is the sum of two, since a weight is never -128. Vectors hold them for
 * even and for odd channels; of these the upper half of every 32-bit lane is added to a 32-bit sum by vqdmlah with
 * 2^15, which is an addition of lane >> 16, and the lower half once widened. The sums therefore hold channels 0, 4, 8,
 * 12, then 2, 6, 10, 14, then 1, 5, 9, 13, then 3, 7, 11, 15 of a block.
 *
 * Packed weights, per 16 channels: 16 int32 biases and 16 int32 multipliers in the order of the sums, then 16 weights
 * of every tap. The taps of the window are followed by one of zeros where their number is even.
 */
#ifndef EK_MVE_DEPTHWISE_H
#define EK_MVE_DEPTHWISE_H

/*
 * taps: odd. padded: whether a tap may lie beside the input, or is the one of zeros. joined: whether neighbouring pixels
 * are taken as channels of one, with a stride of 1 and 1, 2, 4 or 8 channels; the packed weights repeat them up to 16.
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

/* Products of even channels in q6 and of odd ones in q4 into the sums. */
#define EK_MVE_DW_ADD                                                                                                 \
    "vqdmlah.s32 q1, q6, r11\n"                                                                                       \
    "vmovlb.s16 q6, q6\n"                                                                                             \
    "vqdmlah.s32 q3, q4, r11\n"                                                                                       \
    "vadd.i32 q0, q0, q6\n"                                                                                           \
    "vmovlb.s16 q4, q4\n"                                                                                             \
    "vadd.i32 q2, q2, q4\n"
#define EK_MVE_DW(name, load, store)                                                                                  \
    __attribute__((naked, noinline, unused)) static void name(const ek_mve_dw_t *p __attribute__((unused))) {         \
        __asm__ volatile(                                                                                             \
            "push {r4-r11, lr}\n"                                                                                     \
            "vpush {d8-d15}\n"                                                                                        \
            "ldm r0!, {r2, r6-r10, r12}\n"                                                                            \
            "ldrd r4, r5, [r0]\n"                                                                                     \
            "push {r4, r5}\n"                                                                                         \
            "mov r3, #0\n"                                                                                            \
            "mov r11, #0x8000\n"                                                                                      \
            "1: vctp.8 r6\n"                                                                                          \
            "mov r0, r8\n"                                                                                            \
            "mov r1, r7\n"                                                                                            \
            "adds r7, r7, #128\n"                                                                                     \
            "vldrw.32 q0, [r1]\n"                                                                                     \
            "vldrw.32 q1, [r1, #16]\n"                                                                                \
            "vldrw.32 q2, [r1, #32]\n"                                                                                \
            "vldrw.32 q3, [r1, #48]\n"                                                                                \
            "ldr r4, [r0], #4\n"                                                                                      \
            "add r4, r4, r3\n"                                                                                        \
            load " q4, [r4]\n"                                                                                        \
            "vldrb.8 q5, [r7], #16\n"                                                                                 \
            "vmullb.s8 q6, q4, q5\n"                                                                                  \
            "vmullt.s8 q4, q4, q5\n"                                                                                  \
            EK_MVE_DW_ADD                                                                                             \
            "wls lr, r10, 3f\n"                                                                                       \
            "2: ldrd r4, r5, [r0], #8\n"                                                                              \
            "add r4, r4, r3\n"                                                                                        \
            "add r5, r5, r3\n"                                                                                        \
            load " q4, [r4]\n"                                                                                        \
            "vldrb.8 q5, [r7], #16\n"                                                                                 \
            "vmullb.s8 q6, q4, q5\n"                                                                                  \
            load " q7, [r5]\n"                                                                                        \
            "vmullt.s8 q4, q4, q5\n"                                                                                  \
            "vldrb.8 q5, [r7]\n"                                                                                      \
            "vmullb.s8 q5, q7, q5\n"                                                                                  \
            "vadd.i16 q6, q6, q5\n"                                                                                   \
            "vldrb.8 q5, [r7], #16\n"                                                                                 \
            "vmullt.s8 q7, q7, q5\n"                                                                                  \
            "vadd.i16 q4, q4, q7\n"                                                                                   \
            EK_MVE_DW_ADD                                                                                             \
            "le lr, 2b\n"                                                                                             \
            "3: vldrw.32 q4, [r1, #64]\n"                                                                             \
            "sub r7, r7, r12\n"                                                                                       \
            "vrmulh.s32 q0, q0, q4\n"                                                                                 \
            "vldrw.32 q5, [r1, #80]\n"                                                                                \
            "vrmulh.s32 q1, q1, q5\n"                                                                                 \
            "vldrw.32 q6, [r1, #96]\n"                                                                                \
            "vrmulh.s32 q2, q2, q6\n"                                                                                 \
            "vldrw.32 q7, [r1, #112]\n"                                                                               \
            "vrmulh.s32 q3, q3, q7\n"                                                                                 \
            "vqmovnb.s32 q0, q0\n"                                                                                    \
            "vqmovnb.s32 q2, q2\n"                                                                                    \
            "vqmovnt.s32 q0, q1\n"                                                                                    \
            "vqmovnt.s32 q2, q3\n"                                                                                    \
            "ldrd r0, r1, [sp]\n"                                                                                     \
            "vqadd.s16 q0, q0, r9\n"                                                                                  \
            "vqadd.s16 q2, q2, r9\n"                                                                                  \
            "vdup.8 q4, r0\n"                                                                                         \
            "vqmovnb.s16 q0, q0\n"                                                                                    \
            "vqmovnt.s16 q0, q2\n"                                                                                    \
            "vdup.8 q5, r1\n"                                                                                         \
            "vmax.s8 q0, q0, q4\n"                                                                                    \
            "adds r3, r3, #16\n"                                                                                      \
            "vmin.s8 q0, q0, q5\n"                                                                                    \
            store " q0, [r2], #16\n"                                                                                  \
            "subs r6, r6, #16\n"                                                                                      \
            "bgt 1b\n"                                                                                                \
            "add sp, sp, #8\n"                                                                                        \
            "vpop {d8-d15}\n"                                                                                         \
            "pop {r4-r11, pc}\n");                                                                                    \
    }
EK_MVE_DW(ek_mve_dw_whole, "vldrb.8", "vstrb.8")
EK_MVE_DW(ek_mve_dw_part, "vpst\nvldrbt.8", "vpst\nvstrbt.8")

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
            if (dw.channels & 15)
                ek_mve_dw_part(&dw);
            else
                ek_mve_dw_whole(&dw);
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
                const int8_t *block = w + (i >> 4) * (128 + 16 * p->taps), *at = block + 128 + (i & 15);
                int32_t sum = ek_mve_int(block + 4 * ek_mve_lane(i & 15));
                for (int32_t ky = 0, iy = top; ky < p->kh; ky++, iy += p->dh) {
                    for (int32_t kx = 0, ix = left; kx < p->kw; kx++, ix += p->dw, at += 16) {
                        int padding = iy < 0 || iy >= p->ih || ix < 0 || ix >= p->iw;
                        sum += *at * (padding ? p->x_zero : x[(iy * p->iw + ix) * c + i]);
                    }
                }
                int32_t m = ek_mve_int(block + 64 + 4 * ek_mve_lane(i & 15));
                y[i] = (int8_t)ek_clamp(ek_rqh(sum, m) + p->y_zero, p->lo, p->hi);
            }
        }
    }
}
#endif

#endif
