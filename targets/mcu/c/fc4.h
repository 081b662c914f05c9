/* needs: base conv fc */
/* Fully connected layers by weights of 4 bits: [blocks][units][2][4] bytes of two channels, the first one's above. */
#if EK_DSP
/* Weights are taken as 16 times what they are; sums begin at zero and are shifted back. */
#define EK_MAC14_W4 \
    "ldr.w r4, [r0], #4\n ldrd r6, r8, [r1], #8\n" \
    "and r5, r6, #0xf0f0f0f0\n lsl.w r6, r6, #4\n and r6, r6, #0xf0f0f0f0\n" \
    "and r7, r8, #0xf0f0f0f0\n lsl.w r8, r8, #4\n and r8, r8, #0xf0f0f0f0\n" EK_PRODUCTS14

EK_ASSEMBLY void ek_mm14_w4(const int8_t *x EK_UNUSED, const int8_t *w EK_UNUSED, int32_t units EK_UNUSED,
                            const ek_tile_t *t EK_UNUSED) {
    __asm__ volatile(EK_TILE_IN(104, 3)
                     "2: ldmia sp, {r0, r2, r4}\n movs r3, #0\n mov r11, r3\n mov r12, r3\n mov lr, r3\n bx r4\n"
                     EK_TILE_ROUND(EK_MAC14_W4)
                     "ldrd r9, r10, [r4]\n add r3, r9, r3, asr #4\n add r11, r10, r11, asr #4\n"
                     "ldrd r9, r10, [r4, #8]\n add r12, r9, r12, asr #4\n add lr, r10, lr, asr #4\n"
                     EK_CODES14 EK_TILE_OUT(32));
}
#else
#define EK_CHANNEL4(k, o) (o % 2 ? (int8_t)((uint8_t)w[k + o / 2 * 4] << 4) >> 4 : w[k + o / 2 * 4] >> 4)

EK_KERNEL void ek_mm14_w4(const int8_t *EK_RESTRICT x, const int8_t *EK_RESTRICT w, int32_t units,
                          const ek_tile_t *t) {
    EK_MM14(8, EK_CHANNEL4)
}
#endif

EK_KERNEL void ek_fc4_s8(const ek_fc_t *p, const int8_t *x, const int8_t *w, const int32_t *c, int8_t *y) {
    ek_fc_codes(p, x, w, c, y, ek_mm14_w4, 4);
}

EK_KERNEL void ek_fc4_f32(const ek_fc_f32_t *p, const int8_t *x, const int8_t *w, const int32_t *c, float *y) {
    ek_fc_real(p, x, w, c, y, 0, ek_mm14_w4, 4);
}

EK_KERNEL void ek_fc4_f32_s8(const ek_fc_f32_t *p, const int8_t *x, const int8_t *w, const int32_t *c, int8_t *y) {
    ek_fc_real(p, x, w, c, y, 1, ek_mm14_w4, 4);
}
