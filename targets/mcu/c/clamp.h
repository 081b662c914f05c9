/* needs: base */
/*
 * Codes are limited to lo..hi in two steps where int8 comes for nothing: one by one to int8, and all of them to lo..hi
 * when that is less.
 */
/* Limits codes to lo..hi. */
EK_KERNEL void ek_clamp_codes(int8_t *y, int32_t n, int32_t lo, int32_t hi) {
    int32_t i = 0;
#if EK_DSP
    uint32_t low = (uint8_t)lo * 0x01010101u, high = (uint8_t)hi * 0x01010101u, v, t;
    for (; i + 4 <= n; i += 4) {
        memcpy(&v, y + i, 4);
        __asm__("ssub8 %1, %0, %2\n sel %0, %0, %2\n ssub8 %1, %0, %3\n sel %0, %3, %0"
                : "+r"(v), "=&r"(t)
                : "r"(low), "r"(high)
                : "cc");
        memcpy(y + i, &v, 4);
    }
#endif
    for (; i < n; i++) y[i] = (int8_t)ek_clamp(y[i], lo, hi);
}

#if EK_DSP
#define ek_narrow(v, lo, hi) ((int8_t)ek_sat8(v))
#define ek_narrowed(y, n, lo, hi) ((lo) > -128 || (hi) < 127 ? ek_clamp_codes(y, n, lo, hi) : (void)0)
#else
#define ek_narrow(v, lo, hi) ((int8_t)ek_clamp(v, lo, hi))
#define ek_narrowed(y, n, lo, hi) ((void)0)
#endif
