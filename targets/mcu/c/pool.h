/* needs: base scale */
/* Average and largest value of windows, NHWC. Taps in the padding are left out. */
typedef struct {
    int32_t h, w, c, oh, ow;
    int16_t kh, kw, sy, sx, dy, dx, top, left;
} ek_pool_t;

/* Taps from..to of a window that starts at `first` fall on 0..size. */
EK_INLINE void ek_pool_taps(int32_t first, int32_t kernel, int32_t dilation, int32_t size, int32_t *from,
                              int32_t *to) {
    int32_t room = size - 1 - first;
    *from = first < 0 ? (dilation - 1 - first) / dilation : 0;
    *to = room < 0 ? 0 : room / dilation + 1;
    *to = *to < kernel ? *to : kernel;
    *from = *from < *to ? *from : *to;
}

/* What is left of a window: `rows` times `columns` taps from x. down, right: elements from one to the next. */
typedef struct {
    const void *x;
    int32_t rows, columns, down, right;
} ek_taps_t;

/* Reduces a window for `c` channels into y. */
typedef void ek_reduce(const void *p, const ek_taps_t *t, int32_t c, void *y);

EK_KERNEL void ek_pool(const ek_pool_t *w, const void *p, const void *x, void *y, int32_t size, ek_reduce *reduce) {
    ek_taps_t t;
    t.right = w->dx * w->c;
    t.down = w->dy * w->w * w->c;
    int8_t *out = (int8_t *)y;
    for (int32_t row = 0; row < w->oh; row++)
        for (int32_t column = 0; column < w->ow; column++, out += w->c * size) {
            int32_t i = row * w->sy - w->top, j = column * w->sx - w->left, up, left;
            ek_pool_taps(i, w->kh, w->dy, w->h, &up, &t.rows);
            ek_pool_taps(j, w->kw, w->dx, w->w, &left, &t.columns);
            t.rows -= up;
            t.columns -= left;
            i += up * w->dy;
            j += left * w->dx;
            if (t.rows <= 0 || t.columns <= 0) i = j = t.rows = t.columns = 0;
            t.x = (const int8_t *)x + (i * w->w + j) * w->c * size;
            reduce(p, &t, w->c, out);
        }
}

typedef struct {
    ek_pool_t window;
    ek_scale_t scale;
    int32_t zero;
} ek_avg_pool_t;

EK_KERNEL void ek_avg_reduce_i8(const void *parameters, const ek_taps_t *t, int32_t c, void *y) {
    const ek_avg_pool_t *p = (const ek_avg_pool_t *)parameters;
    const ek_scale_t s = p->scale;
    int32_t start = -p->zero * (t->rows * t->columns), right = t->right, k = 0;
    int8_t *out = (int8_t *)y;
#if EK_DSP
    for (; k + 4 <= c; k += 4) {
        int32_t a0 = start, a1 = start, a2 = start, a3 = start;
        const int8_t *row = (const int8_t *)t->x + k;
        for (int32_t i = 0; i < t->rows; i++, row += t->down) {
            const int8_t *x = row;
            for (int32_t left = t->columns; left > 0;) {
                /* 256 codes add up to 16 bits. */
                int32_t n = left < 256 ? left : 256;
                uint32_t even = 0, odd = 0, v, u;
                left -= n;
                if (n & 1) {
                    memcpy(&v, x, 4);
                    x += right;
                    __asm__("sxtb16 %0, %2\n sxtb16 %1, %2, ror #8" : "=&r"(even), "=r"(odd) : "r"(v));
                }
                for (n >>= 1; n > 0; n--) {
                    memcpy(&v, x, 4);
                    memcpy(&u, x + right, 4);
                    x += 2 * right;
                    __asm__("sxtab16 %0, %0, %2\n sxtab16 %1, %1, %2, ror #8\n"
                            "sxtab16 %0, %0, %3\n sxtab16 %1, %1, %3, ror #8"
                            : "+&r"(even), "+&r"(odd)
                            : "r"(v), "r"(u));
                }
                a0 += (int16_t)even;
                a1 += (int16_t)odd;
                a2 += (int32_t)even >> 16;
                a3 += (int32_t)odd >> 16;
            }
        }
        out[k] = ek_narrow(ek_rescaled(s, a0 * s.unit), s.lo, s.hi);
        out[k + 1] = ek_narrow(ek_rescaled(s, a1 * s.unit), s.lo, s.hi);
        out[k + 2] = ek_narrow(ek_rescaled(s, a2 * s.unit), s.lo, s.hi);
        out[k + 3] = ek_narrow(ek_rescaled(s, a3 * s.unit), s.lo, s.hi);
    }
#endif
    for (; k < c; k++) {
        int32_t acc = start;
        const int8_t *row = (const int8_t *)t->x + k;
        for (int32_t i = 0; i < t->rows; i++, row += t->down) {
            const int8_t *x = row;
            for (int32_t j = t->columns; j > 0; j--, x += right) acc += *x;
        }
        out[k] = ek_narrow(ek_rescaled(s, acc * s.unit), s.lo, s.hi);
    }
    ek_narrowed(out, c, s.lo, s.hi);
}

EK_KERNEL void ek_avg_pool_i8(const ek_avg_pool_t *p, const int8_t *x, int8_t *y) {
    ek_pool(&p->window, p, x, y, 1, ek_avg_reduce_i8);
}

EK_KERNEL void ek_max_reduce_i8(const void *p, const ek_taps_t *t, int32_t c, void *y) {
    int8_t *out = (int8_t *)y;
    int32_t k = 0;
    (void)p;
#if EK_DSP
    /* The last four channels may overlap the ones before them. */
    for (; k < c && c >= 4; k = k + 8 > c && k + 4 < c ? c - 4 : k + 4) {
        uint32_t most = 0x80808080u, v, d;
        const int8_t *row = (const int8_t *)t->x + k;
        for (int32_t i = 0; i < t->rows; i++, row += t->down) {
            const int8_t *x = row;
            for (int32_t n = t->columns; n > 0; n--, x += t->right) {
                memcpy(&v, x, 4);
                __asm__("ssub8 %1, %0, %2\n sel %0, %0, %2" : "+r"(most), "=&r"(d) : "r"(v) : "cc");
            }
        }
        memcpy(out + k, &most, 4);
    }
#endif
    for (; k < c; k++) {
        int8_t most = -128;
        const int8_t *row = (const int8_t *)t->x + k;
        for (int32_t i = 0; i < t->rows; i++, row += t->down) {
            const int8_t *x = row;
            for (int32_t j = 0; j < t->columns; j++, x += t->right) most = *x > most ? *x : most;
        }
        out[k] = most;
    }
}

EK_KERNEL void ek_max_pool_i8(const ek_pool_t *p, const int8_t *x, int8_t *y) {
    ek_pool(p, p, x, y, 1, ek_max_reduce_i8);
}

typedef struct {
    ek_pool_t window;
    float share; /* 1 / (taps of a whole window) */
} ek_avg_pool_f32_t;

EK_KERNEL void ek_avg_reduce_f32(const void *parameters, const ek_taps_t *t, int32_t c, void *y) {
    const ek_avg_pool_f32_t *p = (const ek_avg_pool_f32_t *)parameters;
    for (int32_t k = 0; k < c; k++) {
        float acc = 0.0f;
        const float *row = (const float *)t->x + k;
        for (int32_t i = 0; i < t->rows; i++, row += t->down) {
            const float *x = row;
            for (int32_t j = 0; j < t->columns; j++, x += t->right) acc += *x;
        }
        ((float *)y)[k] = acc * p->share;
    }
}

EK_KERNEL void ek_avg_pool_f32(const ek_avg_pool_f32_t *p, const float *x, float *y) {
    ek_pool(&p->window, p, x, y, 4, ek_avg_reduce_f32);
}

EK_KERNEL void ek_max_reduce_f32(const void *p, const ek_taps_t *t, int32_t c, void *y) {
    (void)p;
    for (int32_t k = 0; k < c; k++) {
        float most = -EK_INFINITY;
        const float *row = (const float *)t->x + k;
        for (int32_t i = 0; i < t->rows; i++, row += t->down) {
            const float *x = row;
            for (int32_t j = 0; j < t->columns; j++, x += t->right) most = *x > most ? *x : most;
        }
        ((float *)y)[k] = most;
    }
}

EK_KERNEL void ek_max_pool_f32(const ek_pool_t *p, const float *x, float *y) {
    ek_pool(p, p, x, y, 4, ek_max_reduce_f32);
}
