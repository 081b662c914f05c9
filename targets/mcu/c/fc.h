/* needs: base conv */
/*
 * Fully connected layers of one row: the input is read where it lies, in whole units of 4. Weights are packed [blocks
 * of 4 channels][units][4][4], constants [blocks]{4 biases, 4 m}; channels are filled up with zeros.
 */
typedef struct {
    int16_t co, units;
    int8_t zero, lo, hi;
} ek_fc_t;

typedef struct {
    ek_fc_t fc;
    ek_real_t real;
} ek_fc_f32_t;

#if EK_DSP
/* Products of one pixel, r4, and 4 channels, r5 to r8, whose sums are r3, r11, r12, lr. */
#define EK_PRODUCTS14 \
    "sxtb16 r9, r4\n sxtb16 r4, r4, ror #8\n" \
    "sxtb16 r10, r5\n smlad r3, r10, r9, r3\n sxtb16 r5, r5, ror #8\n smlad r3, r5, r4, r3\n" \
    "sxtb16 r10, r6\n smlad r11, r10, r9, r11\n sxtb16 r6, r6, ror #8\n smlad r11, r6, r4, r11\n" \
    "sxtb16 r10, r7\n smlad r12, r10, r9, r12\n sxtb16 r7, r7, ror #8\n smlad r12, r7, r4, r12\n" \
    "sxtb16 r10, r8\n smlad lr, r10, r9, lr\n sxtb16 r8, r8, ror #8\n smlad lr, r8, r4, lr\n"
#define EK_MAC14 "ldr.w r4, [r0], #4\n ldmia.w r1!, {r5-r8}\n" EK_PRODUCTS14
#define EK_CODES14 \
    "cbz r6, 3f\n" \
    "ldrd r9, r10, [r4, #16]\n smmlar r3, r3, r9, r8\n smmlar r11, r11, r10, r8\n" \
    "ldrd r9, r10, [r4, #24]\n smmlar r12, r12, r9, r8\n smmlar lr, lr, r10, r8\n" \
    "ssat r3, #8, r3\n ssat r11, #8, r11\n ssat r12, #8, r12\n ssat lr, #8, lr\n" \
    "strb r3, [r5], #1\n strb r11, [r5], #1\n strb r12, [r5], #1\n strb lr, [r5], #1\n"

EK_ASSEMBLY void ek_mm14(const int8_t *x EK_UNUSED, const int8_t *w EK_UNUSED, int32_t units EK_UNUSED,
                         const ek_tile_t *t EK_UNUSED) {
    __asm__ volatile(EK_TILE_IN(80, 4)
                     "2: ldmia sp, {r0, r2, r4, r5}\n ldmia r5, {r3, r11, r12, lr}\n bx r4\n"
                     EK_TILE_ROUND(EK_MAC14) EK_CODES14 EK_TILE_OUT(32));
}
#else
#define EK_MAC14(k, at) \
    v = u[k]; \
    a0 += v * at(k, 0), a1 += v * at(k, 1), a2 += v * at(k, 2), a3 += v * at(k, 3);
#define EK_MM14(bytes, at) \
    const int32_t *c = t->c; \
    int32_t *sums = (int32_t *)t->y0, zero = t->zero; \
    int8_t *y = (int8_t *)t->y0; \
    for (int32_t b = t->blocks; b > 0; --b, c += 8) { \
        const int8_t *EK_RESTRICT u = x, *end = x + 4 * units; \
        int32_t a0 = c[0], a1 = c[1], a2 = c[2], a3 = c[3]; \
        for (; u != end; u += 4, w += bytes) { \
            int32_t v; \
            EK_MAC14(0, at) \
            EK_MAC14(1, at) \
            EK_MAC14(2, at) \
            EK_MAC14(3, at) \
        } \
        if (!t->y1) { \
            sums[0] = a0, sums[1] = a1, sums[2] = a2, sums[3] = a3; \
            sums += 4; \
            continue; \
        } \
        y[0] = (int8_t)ek_sat8(ek_rqh(a0, c[4]) + zero); \
        y[1] = (int8_t)ek_sat8(ek_rqh(a1, c[5]) + zero); \
        y[2] = (int8_t)ek_sat8(ek_rqh(a2, c[6]) + zero); \
        y[3] = (int8_t)ek_sat8(ek_rqh(a3, c[7]) + zero); \
        y += 4; \
    }
#define EK_CHANNEL8(k, o) w[k + 4 * o]

EK_KERNEL void ek_mm14(const int8_t *EK_RESTRICT x, const int8_t *EK_RESTRICT w, int32_t units, const ek_tile_t *t) {
    EK_MM14(16, EK_CHANNEL8)
}
#endif

typedef void (*ek_mm14_t)(const int8_t *x, const int8_t *w, int32_t units, const ek_tile_t *t);

EK_INLINE void ek_fc_codes(const ek_fc_t *p, const int8_t *x, const int8_t *w, const int32_t *c, int8_t *y,
                           ek_mm14_t mm, int32_t bits) {
    int32_t even = p->co & ~3;
    if (even) {
        ek_tile_t t = {c, y, y, even >> 2, p->zero};
        mm(x, w, p->units, &t);
    }
    if (even != p->co) {
        int8_t last[4];
        ek_tile_t t = {c + 2 * even, last, last, 1, p->zero};
        mm(x, w + even * p->units * bits / 2, p->units, &t);
        memcpy(y + even, last, (size_t)(p->co - even));
    }
    if (p->lo > -128 || p->hi < 127) ek_clamp_codes(y, p->co, p->lo, p->hi);
}

EK_INLINE void ek_fc_real(const ek_fc_f32_t *p, const int8_t *x, const int8_t *w, const int32_t *c, void *y,
                          int32_t coded, ek_mm14_t mm, int32_t bits) {
    for (int32_t o = 0; o < p->fc.co; o += 4, c += 8, w += 2 * bits * p->fc.units) {
        int32_t sums[4];
        ek_tile_t t = {c, sums, 0, 1, 0};
        mm(x, w, p->fc.units, &t);
        for (int32_t i = 0; i < 4 && o + i < p->fc.co; ++i) {
            ek_store_real(&p->real, ek_real_of(sums[i], c[4 + i]), coded, p->fc.zero, y, o + i);
        }
    }
}

EK_KERNEL void ek_fc_s8(const ek_fc_t *p, const int8_t *x, const int8_t *w, const int32_t *c, int8_t *y) {
    ek_fc_codes(p, x, w, c, y, ek_mm14, 8);
}

EK_KERNEL void ek_fc_f32(const ek_fc_f32_t *p, const int8_t *x, const int8_t *w, const int32_t *c, float *y) {
    ek_fc_real(p, x, w, c, y, 0, ek_mm14, 8);
}

EK_KERNEL void ek_fc_f32_s8(const ek_fc_f32_t *p, const int8_t *x, const int8_t *w, const int32_t *c, int8_t *y) {
    ek_fc_real(p, x, w, c, y, 1, ek_mm14, 8);
}
