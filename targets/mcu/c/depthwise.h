/* needs: base add */
/*
 * Depthwise convolution of codes. A pixel is computed from one pointer per kernel tap, four channels at a time; taps in
 * the padding point to a row of zero points, so borders and the inside run through the same code. The constants of a
 * group of four channels lie in one stream in the order of their use: four biases; for each pair of taps two int16
 * weights of each channel; for an odd last tap the weights of channels 0, 2, 1, 3; four multipliers. Channels that make
 * no group of four follow one by one: bias, multiplier, shift, int16 weights in whole words.
 */
typedef struct {
    int32_t h, w, c, oh, ow;
    int16_t kh, kw, sy, sx, dy, dx, top, left;
    int16_t x_zp, zero, lo, hi;
} ek_depthwise_t;

typedef struct {
    ek_depthwise_t conv;
    ek_add_t add;
} ek_depthwise_add_t;

/* A run of neighbouring pixels of one output row. */
typedef struct {
    const int32_t *weights;
    void *out;
    int32_t channels, groups, pixels;
    int32_t jump; /* from one pixel's inputs to the next one's */
    int32_t zero, lo, hi;
    int32_t count; /* taps */
    const int8_t *taps[];
} ek_dw_t;

typedef void ek_dw_run(ek_dw_t *r);

enum { EK_DW_HALF, EK_DW_ANY, EK_DW_FLOAT };

/* Groups of four channels, multipliers below one half. */
EK_KERNEL void ek_dw_groups(ek_dw_t *r) {
    const int8_t *const *taps = r->taps;
    int8_t *out = (int8_t *)r->out;
    int32_t start = 0;
    for (int32_t pixel = 0; pixel < r->pixels; pixel++, start += r->jump, out += r->channels) {
        const int32_t *s = r->weights;
        for (int32_t g = 0; g < r->groups; g++) {
            int32_t at = start + 4 * g, t = 0;
            int32_t a0 = s[0], a1 = s[1], a2 = s[2], a3 = s[3];
            const ek_i16 *w = (const ek_i16 *)(s + 4);
            for (; t + 1 < r->count; t += 2, w += 8) {
                const int8_t *u = taps[t] + at, *v = taps[t + 1] + at;
                a0 += u[0] * w[0] + v[0] * w[1];
                a1 += u[1] * w[2] + v[1] * w[3];
                a2 += u[2] * w[4] + v[2] * w[5];
                a3 += u[3] * w[6] + v[3] * w[7];
            }
            if (t < r->count) {
                const int8_t *u = taps[t] + at;
                a0 += u[0] * w[0];
                a2 += u[2] * w[1];
                a1 += u[1] * w[2];
                a3 += u[3] * w[3];
                w += 4;
            }
            s = (const int32_t *)w;
            int8_t *y = out + 4 * g;
            y[0] = (int8_t)ek_clamp(ek_rqh(a0, s[0]) + r->zero, r->lo, r->hi);
            y[1] = (int8_t)ek_clamp(ek_rqh(a1, s[1]) + r->zero, r->lo, r->hi);
            y[2] = (int8_t)ek_clamp(ek_rqh(a2, s[2]) + r->zero, r->lo, r->hi);
            y[3] = (int8_t)ek_clamp(ek_rqh(a3, s[3]) + r->zero, r->lo, r->hi);
            s += 4;
        }
    }
}

/* Channels one by one, behind the groups. */
EK_INLINE void ek_dw_singles(ek_dw_t *r, int mode) {
    int32_t words = (r->count + 1) >> 1, first = 4 * r->groups, start = 0;
    const int32_t *rest = r->weights + r->groups * (8 + 4 * (r->count >> 1) + 2 * (r->count & 1));
    for (int32_t pixel = 0; pixel < r->pixels; pixel++, start += r->jump) {
        const int32_t *s = rest;
        for (int32_t c = first; c < r->channels; c++, s += 3 + words) {
            const ek_i16 *w = (const ek_i16 *)(s + 3);
            int32_t acc = s[0], to = pixel * r->channels + c;
            for (int32_t t = 0; t < r->count; t++) acc += r->taps[t][start + c] * w[t];
            if (mode == EK_DW_FLOAT) {
                float m;
                memcpy(&m, s + 1, 4);
                ((float *)r->out)[to] = (float)acc * m;
            } else {
                int64_t v = mode == EK_DW_HALF ? ek_rqh(acc, s[1]) : ek_rq1(acc, s[1], s[2]);
                ((int8_t *)r->out)[to] = (int8_t)ek_code(v, r->zero, r->lo, r->hi);
            }
        }
    }
}

EK_KERNEL void ek_dw_run_half(ek_dw_t *r) {
    ek_dw_groups(r);
    if (r->channels & 3) ek_dw_singles(r, EK_DW_HALF);
}

EK_KERNEL void ek_dw_run_any(ek_dw_t *r) { ek_dw_singles(r, EK_DW_ANY); }

EK_KERNEL void ek_dw_run_float(ek_dw_t *r) { ek_dw_singles(r, EK_DW_FLOAT); }

/* Point the taps at the window whose upper left corner is (row, column) of the input. */
EK_KERNEL void ek_dw_aim(const ek_depthwise_t *p, ek_dw_t *r, const int8_t *x, const int8_t *border, int32_t row,
                         int32_t column) {
    const int8_t **tap = r->taps;
    for (int32_t i = 0, y = row; i < p->kh; i++, y += p->dy)
        for (int32_t j = 0, k = column; j < p->kw; j++, k += p->dx) {
            int inside = y >= 0 && y < p->h && k >= 0 && k < p->w;
            *tap++ = inside ? x + (y * p->w + k) * p->c : border;
        }
}

/* Outputs from..to of one axis see no padding. */
EK_INLINE void ek_dw_inner(int32_t size, int32_t out, int32_t kernel, int32_t stride, int32_t dilation, int32_t before,
                           int32_t *from, int32_t *to) {
    int32_t room = size - 1 - (kernel - 1) * dilation + before;
    *from = (before + stride - 1) / stride;
    *to = room < 0 ? 0 : room / stride + 1;
    *to = *to < out ? *to : out;
    if (*from >= *to) *from = *to = out;
}

/* scratch: the taps, behind them a row of zero points. size: bytes of a result. add: NULL, or what adds `other`. */
EK_INLINE void ek_dw_drive(const ek_depthwise_t *p, const int8_t *x, const int32_t *weights, const int8_t *other,
                           int8_t *y, void *scratch, int mode, ek_dw_run *run, int32_t size, const ek_add_t *add) {
    ek_dw_t *r = (ek_dw_t *)(((uintptr_t)scratch + sizeof(void *) - 1) & ~(uintptr_t)(sizeof(void *) - 1));
    r->count = p->kh * p->kw;
    r->weights = weights;
    r->channels = p->c;
    r->groups = mode == EK_DW_HALF ? p->c >> 2 : 0;
    r->jump = p->sx * p->c;
    r->zero = p->zero;
    r->lo = p->lo;
    r->hi = p->hi;
    int8_t *border = (int8_t *)(r->taps + r->count), *codes = border + p->c;
    memset(border, p->x_zp, (size_t)p->c);
    int32_t top, bottom, left, right;
    ek_dw_inner(p->h, p->oh, p->kh, p->sy, p->dy, p->top, &top, &bottom);
    ek_dw_inner(p->w, p->ow, p->kw, p->sx, p->dx, p->left, &left, &right);
    for (int32_t row = 0; row < p->oh; row++)
        for (int32_t column = 0; column < p->ow; column += r->pixels) {
            int inside = !add && row >= top && row < bottom && column >= left && column < right;
            r->pixels = inside ? right - column : 1;
            r->out = add ? codes : y;
            ek_dw_aim(p, r, x, border, row * p->sy - p->top, column * p->sx - p->left);
            run(r);
            if (add) {
                for (int32_t c = 0; c < p->c; c++) y[c] = (int8_t)ek_add_one(add, codes[c], other[c]);
                other += p->c;
            }
            y += r->pixels * p->c * size;
        }
}

EK_KERNEL void ek_depthwise_i8(const ek_depthwise_t *p, const int8_t *x, const int32_t *w, int8_t *y, void *scratch) {
    ek_dw_drive(p, x, w, NULL, y, scratch, EK_DW_HALF, ek_dw_run_half, 1, NULL);
}

EK_KERNEL void ek_depthwise_add_i8(const ek_depthwise_add_t *p, const int8_t *x, const int32_t *w, const int8_t *other,
                                   int8_t *y, void *scratch) {
    ek_dw_drive(&p->conv, x, w, other, y, scratch, EK_DW_HALF, ek_dw_run_half, 1, &p->add);
}

/* Any multipliers. */
EK_KERNEL void ek_depthwise_any_i8(const ek_depthwise_t *p, const int8_t *x, const int32_t *w, int8_t *y,
                                   void *scratch) {
    ek_dw_drive(p, x, w, NULL, y, scratch, EK_DW_ANY, ek_dw_run_any, 1, NULL);
}

EK_KERNEL void ek_depthwise_any_add_i8(const ek_depthwise_add_t *p, const int8_t *x, const int32_t *w,
                                       const int8_t *other, int8_t *y, void *scratch) {
    ek_dw_drive(&p->conv, x, w, other, y, scratch, EK_DW_ANY, ek_dw_run_any, 1, &p->add);
}

/* Real results. */
EK_KERNEL void ek_depthwise_i8_f32(const ek_depthwise_t *p, const int8_t *x, const int32_t *w, float *y,
                                   void *scratch) {
    ek_dw_drive(p, x, w, NULL, (int8_t *)y, scratch, EK_DW_FLOAT, ek_dw_run_float, 4, NULL);
}
