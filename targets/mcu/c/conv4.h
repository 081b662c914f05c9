/* needs: base conv */
/* Convolutions by weights of 4 bits: see conv.h. */
#if EK_DSP
/* Weights are taken as 16 times what they are; sums begin at zero and are shifted back. */
#define EK_MAC22_W4 \
    "ldmia.w r0!, {r4-r7}\n ldr.w r9, [r1], #4\n" \
    "and r8, r9, #0xf0f0f0f0\n lsl.w r9, r9, #4\n and r9, r9, #0xf0f0f0f0\n" EK_PRODUCTS22

EK_ASSEMBLY void ek_mm22_w4(const ek_u32 *col EK_UNUSED, const int8_t *w EK_UNUSED, int32_t units EK_UNUSED,
                            const ek_tile_t *t EK_UNUSED) {
    __asm__ volatile(EK_TILE_IN(68, 2)
                     "2: ldmia sp, {r0, r2, r4}\n movs r3, #0\n mov r11, r3\n mov r12, r3\n mov lr, r3\n bx r4\n"
                     EK_TILE_ROUND(EK_MAC22_W4)
                     "ldrd r9, r10, [r4]\n add r3, r9, r3, asr #4\n add r11, r9, r11, asr #4\n"
                     "add r12, r10, r12, asr #4\n add lr, r10, lr, asr #4\n"
                     EK_CODES22 EK_TILE_OUT(16));
}
#else
#define EK_FIRST4(k) (w[k] >> 4)
#define EK_SECOND4(k) ((int8_t)((uint8_t)w[k] << 4) >> 4)

EK_KERNEL void ek_mm22_w4(const ek_u32 *col, const int8_t *EK_RESTRICT w, int32_t units, const ek_tile_t *t) {
    EK_MM22(4, EK_FIRST4, EK_SECOND4)
}
#endif
#define EK_BITS4 ek_mm22_w4, 4

EK_KERNEL void ek_conv4_s8(const ek_conv_t *p, const int8_t *x, const int8_t *w, const int32_t *c, int8_t *y,
                           void *scratch) {
    ek_conv_codes_t m = {p, y};
    ek_conv_walk(p, (ek_conv_in_t){x, w, c, scratch, EK_BITS4}, ek_conv_codes, &m);
}

/* y may be r. */
EK_KERNEL void ek_conv4_add_s8(const ek_conv_add_t *p, const int8_t *x, const int8_t *w, const int32_t *c,
                               const int8_t *r, int8_t *y, void *scratch) {
    ek_conv_sum_t m = {p, r, y};
    ek_conv_walk(&p->conv, (ek_conv_in_t){x, w, c, scratch, EK_BITS4}, ek_conv_sum, &m);
}

EK_KERNEL void ek_conv4_rq1_s8(const ek_conv_t *p, const int8_t *x, const int8_t *w, const int32_t *c,
                               const int8_t *shift, int8_t *y, void *scratch) {
    ek_conv_rq1_t m = {p, 0, shift, 0, y};
    ek_conv_walk(p, (ek_conv_in_t){x, w, c, scratch, EK_BITS4}, ek_conv_rq1, &m);
}

/* y may be r. */
EK_KERNEL void ek_conv4_rq1_add_s8(const ek_conv_add_t *p, const int8_t *x, const int8_t *w, const int32_t *c,
                                   const int8_t *shift, const int8_t *r, int8_t *y, void *scratch) {
    ek_conv_rq1_t m = {&p->conv, &p->add, shift, r, y};
    ek_conv_walk(&p->conv, (ek_conv_in_t){x, w, c, scratch, EK_BITS4}, ek_conv_rq1, &m);
}

EK_KERNEL void ek_conv4_f32(const ek_conv_f32_t *p, const int8_t *x, const int8_t *w, const int32_t *c, float *y,
                            void *scratch) {
    ek_conv_real_t m = {p, 0, y, 0};
    ek_conv_walk(&p->conv, (ek_conv_in_t){x, w, c, scratch, EK_BITS4}, ek_conv_real, &m);
}

/* y may be r. */
EK_KERNEL void ek_conv4_add_f32(const ek_conv_f32_t *p, const int8_t *x, const int8_t *w, const int32_t *c,
                                const float *r, float *y, void *scratch) {
    ek_conv_real_t m = {p, r, y, 0};
    ek_conv_walk(&p->conv, (ek_conv_in_t){x, w, c, scratch, EK_BITS4}, ek_conv_real, &m);
}

EK_KERNEL void ek_conv4_f32_s8(const ek_conv_f32_t *p, const int8_t *x, const int8_t *w, const int32_t *c, int8_t *y,
                               void *scratch) {
    ek_conv_real_t m = {p, 0, y, 1};
    ek_conv_walk(&p->conv, (ek_conv_in_t){x, w, c, scratch, EK_BITS4}, ek_conv_real, &m);
}

EK_KERNEL void ek_conv4_add_f32_s8(const ek_conv_f32_t *p, const int8_t *x, const int8_t *w, const int32_t *c,
                                   const float *r, int8_t *y, void *scratch) {
    ek_conv_real_t m = {p, r, y, 1};
    ek_conv_walk(&p->conv, (ek_conv_in_t){x, w, c, scratch, EK_BITS4}, ek_conv_real, &m);
}
