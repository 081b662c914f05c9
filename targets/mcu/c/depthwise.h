/* needs: base clamp add */
/*
 * Depthwise convolution of codes. A pixel is computed from one pointer per kernel tap, four channels at a time; taps in
 * the padding point to a row of zero points, so borders and the inside run through the same code. The constants of a
 * group of four channels lie in one stream in the order of their use: four biases; for each pair of taps two int16
 * weights of each channel; for an odd last tap the weights of channels 0, 2, 1, 3; four multipliers. Where
 * multipliers are not all below one half, twelve numbers stand for these: m, add and post (see scale.h) of the first two
 * channels, and of the other two; weights and bias contain the unit. When
 * channels are no multiple of four, the last group is that of the last four channels. Layers that are not computed in
 * groups have for each channel: bias, multiplier, shift, int16 weights in whole words.
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

/* A run of neighbouring pixels of one output row. Assembly below knows the offsets of fields. */
typedef struct {
    void *out;
    int32_t end; /* channels in groups */
    int32_t zero;
    const int32_t *weights;
    int32_t skip, jump, back; /* jump: from one pixel's inputs to the next one's; jump - end; channels - jump */
    int32_t pixels, channels, lo, hi;
    int32_t count; /* taps */
    const int8_t *taps[];
} ek_dw_t;

/* Computes a run and may change all fields but weights, jump, back, channels, lo, hi and count. */
typedef void ek_dw_run(ek_dw_t *r);

#if EK_DSP
/* r7 and r8 point to two taps: widen them to pairs of int16, one pair for each channel. */
#define EK_DW_PAIR \
    "ldr r7, [r7, r2]\n" \
    "ldr r8, [r8, r2]\n" \
    "pkhbt r9, r7, r8, lsl #16\n" \
    "pkhtb r7, r8, r7, asr #16\n" \
    "ldm r1!, {r10-r12, lr}\n" \
    "sxtb16 r8, r9\n" \
    "sxtb16 r9, r9, ror #8\n" \
    "smlad r3, r8, r10, r3\n" \
    "smlad r4, r9, r11, r4\n" \
    "sxtb16 r8, r7\n" \
    "sxtb16 r7, r7, ror #8\n" \
    "smlad r5, r8, r12, r5\n" \
    "smlad r6, r7, lr, r6\n"
/* r7 points to a tap. */
#define EK_DW_LAST \
    "ldr r7, [r7, r2]\n" \
    "ldrd r10, r11, [r1], #8\n" \
    "sxtb16 r8, r7\n" \
    "sxtb16 r9, r7, ror #8\n" \
    "smlabb r3, r8, r10, r3\n" \
    "smlatt r5, r8, r10, r5\n" \
    "smlabb r4, r9, r11, r4\n" \
    "smlatt r6, r9, r11, r6\n"
/* Four codes, as `ek_rqh`. */
#define EK_DW_HALVES \
    "ldm r1!, {r10-r12, lr}\n" \
    "ldm r0, {r7-r9}\n" \
    "smmlar r3, r3, r10, r9\n" \
    "smmlar r4, r4, r11, r9\n" \
    "smmlar r5, r5, r12, r9\n" \
    "smmlar r6, r6, lr, r9\n"
/* Four codes, as `ek_rescaled`. */
#define EK_DW_SCALES \
    "ldm r1!, {r7-r12}\n" \
    "smmla r3, r3, r7, r9\n" \
    "smmla r4, r4, r8, r10\n" \
    "asr r3, r11\n" \
    "asr r4, r12\n" \
    "ldm r1!, {r7-r12}\n" \
    "smmla r5, r5, r7, r9\n" \
    "smmla r6, r6, r8, r10\n" \
    "asr r5, r11\n" \
    "asr r6, r12\n" \
    "ldrd r7, r8, [r0]\n"
/* Store four codes to r7, until r2 is r8; next group, next pixel. */
#define EK_DW_STORE \
    "ssat r3, #8, r3\n" \
    "ssat r4, #8, r4\n" \
    "ssat r5, #8, r5\n" \
    "ssat r6, #8, r6\n" \
    "bfi r3, r4, #8, #8\n" \
    "bfi r3, r5, #16, #8\n" \
    "bfi r3, r6, #24, #8\n" \
    "str r3, [r7, r2]\n" \
    "adds r2, #4\n" \
    "cmp r2, r8\n" \
    "bne 2b\n" \
    "ldrd r3, r4, [r0, #16]\n" \
    "ldrd r5, r6, [r0, #24]\n" \
    "adds r2, r3\n" \
    "add r8, r4\n" \
    "adds r7, r5\n" \
    "strd r7, r8, [r0]\n" \
    "subs r6, #1\n" \
    "str r6, [r0, #28]\n" \
    "bne 1b\n"

/* Any number of taps: r0 walks over them. */
#define EK_DW_ALL(codes) \
    "push {r4-r11, lr}\n" \
    "ldr r5, [r0, #44]\n" \
    "add r3, r0, #48\n" \
    "asr r4, r5, #1\n" \
    "add r4, r3, r4, lsl #3\n" \
    "push {r0, r3, r4, r5}\n" \
    "movs r2, #0\n" \
    "1: ldr r1, [r0, #12]\n" \
    "2: ldm r1!, {r3-r6}\n" \
    "ldrd r0, r7, [sp, #4]\n" \
    "cmp r0, r7\n" \
    "beq 4f\n" \
    "3: ldrd r7, r8, [r0], #8\n" EK_DW_PAIR "ldr r7, [sp, #8]\n" \
    "cmp r0, r7\n" \
    "bne 3b\n" \
    "4: ldr r7, [sp, #12]\n" \
    "lsls r7, #31\n" \
    "beq 5f\n" \
    "ldr r7, [r0]\n" EK_DW_LAST "5: ldr r0, [sp]\n" codes EK_DW_STORE "add sp, #16\n" \
    "pop {r4-r11, pc}\n"

__attribute__((naked, noinline, unused)) static void ek_dw_groups(__attribute__((unused)) ek_dw_t *r) {
    __asm__ volatile(EK_DW_ALL(EK_DW_HALVES));
}

__attribute__((naked, noinline, unused)) static void ek_dw_groups_any(__attribute__((unused)) ek_dw_t *r) {
    __asm__ volatile(EK_DW_ALL(EK_DW_SCALES));
}

/* Nine taps. */
__attribute__((naked, noinline, unused)) static void ek_dw_groups9(__attribute__((unused)) ek_dw_t *r) {
    __asm__ volatile("push {r4-r11, lr}\n"
                     "movs r2, #0\n"
                     "1: ldr r1, [r0, #12]\n"
                     "2: ldm r1!, {r3-r6}\n"
                     "ldrd r7, r8, [r0, #48]\n" EK_DW_PAIR "ldrd r7, r8, [r0, #56]\n" EK_DW_PAIR
                     "ldrd r7, r8, [r0, #64]\n" EK_DW_PAIR "ldrd r7, r8, [r0, #72]\n" EK_DW_PAIR
                     "ldr r7, [r0, #80]\n" EK_DW_LAST EK_DW_HALVES EK_DW_STORE "pop {r4-r11, pc}\n");
}
#else
EK_INLINE void ek_dw_sums(ek_dw_t *r, int any) {
    int8_t *out = (int8_t *)r->out;
    int32_t start = 0, pairs = r->count >> 1;
    for (int32_t pixel = 0; pixel < r->pixels; pixel++, start += r->jump, out += r->channels) {
        const int32_t *s = r->weights;
        for (int32_t c = 0; c < r->end; c += 4) {
            const int8_t *const *tap = r->taps;
            int32_t at = start + c, a0 = s[0], a1 = s[1], a2 = s[2], a3 = s[3];
            const ek_i16 *w = (const ek_i16 *)(s + 4), *end = w + 8 * pairs;
            for (; w != end; tap += 2, w += 8) {
                const int8_t *u = tap[0] + at, *v;
                a0 += u[0] * w[0];
                a1 += u[1] * w[2];
                a2 += u[2] * w[4];
                a3 += u[3] * w[6];
                v = tap[1] + at;
                a0 += v[0] * w[1];
                a1 += v[1] * w[3];
                a2 += v[2] * w[5];
                a3 += v[3] * w[7];
            }
            if (r->count & 1) {
                const int8_t *u = *tap + at;
                a0 += u[0] * w[0];
                a2 += u[2] * w[1];
                a1 += u[1] * w[2];
                a3 += u[3] * w[3];
                w += 4;
            }
            s = (const int32_t *)w;
            int8_t *y = out + c;
            if (any) {
                y[0] = ek_narrow(ek_smmla(a0, s[0], s[2]) >> s[4], r->lo, r->hi);
                y[1] = ek_narrow(ek_smmla(a1, s[1], s[3]) >> s[5], r->lo, r->hi);
                y[2] = ek_narrow(ek_smmla(a2, s[6], s[8]) >> s[10], r->lo, r->hi);
                y[3] = ek_narrow(ek_smmla(a3, s[7], s[9]) >> s[11], r->lo, r->hi);
            } else {
                y[0] = ek_narrow(ek_rqh(a0, s[0]) + r->zero, r->lo, r->hi);
                y[1] = ek_narrow(ek_rqh(a1, s[1]) + r->zero, r->lo, r->hi);
                y[2] = ek_narrow(ek_rqh(a2, s[2]) + r->zero, r->lo, r->hi);
                y[3] = ek_narrow(ek_rqh(a3, s[3]) + r->zero, r->lo, r->hi);
            }
            s += any ? 12 : 4;
        }
    }
}

EK_KERNEL void ek_dw_groups(ek_dw_t *r) { ek_dw_sums(r, 0); }

EK_KERNEL void ek_dw_groups_any(ek_dw_t *r) { ek_dw_sums(r, 1); }

#define ek_dw_groups9 ek_dw_groups
#endif

/*
 * groups: a form of ek_dw_groups, for at least four channels. The last group may overlap the one before it. words: in
 * the stream beside the weights.
 */
EK_KERNEL void ek_dw_grouped(ek_dw_t *r, ek_dw_run *groups, int32_t words) {
    int8_t *out = (int8_t *)r->out;
    int32_t pixels = r->pixels, channels = r->channels, last = channels & 3 ? channels - 4 : 0;
    r->end = channels & -4;
    r->skip = r->jump - r->end;
    groups(r);
    if (last) {
        const int32_t *weights = r->weights;
        r->weights += (channels >> 2) * (words + 4 * (r->count >> 1) + 2 * (r->count & 1));
        for (int32_t t = 0; t < r->count; t++) r->taps[t] += last;
        r->out = out + last;
        r->end = 4;
        r->skip = r->jump - 4;
        r->pixels = pixels;
        groups(r);
        r->weights = weights;
    }
    ek_narrowed(out, pixels * channels, r->lo, r->hi);
}

EK_KERNEL void ek_dw_run_half(ek_dw_t *r) { ek_dw_grouped(r, ek_dw_groups, 8); }

EK_KERNEL void ek_dw_run_half9(ek_dw_t *r) { ek_dw_grouped(r, ek_dw_groups9, 8); }

EK_KERNEL void ek_dw_run_any(ek_dw_t *r) { ek_dw_grouped(r, ek_dw_groups_any, 16); }

/* Channels one by one: any multipliers, or real results. */
EK_INLINE void ek_dw_singles(ek_dw_t *r, int real) {
    int32_t words = (r->count + 1) >> 1, start = 0;
    for (int32_t pixel = 0; pixel < r->pixels; pixel++, start += r->jump) {
        const int32_t *s = r->weights;
        for (int32_t c = 0; c < r->channels; c++, s += 3 + words) {
            const ek_i16 *w = (const ek_i16 *)(s + 3);
            int32_t acc = s[0], to = pixel * r->channels + c;
            for (int32_t t = 0; t < r->count; t++) acc += r->taps[t][start + c] * w[t];
            if (real) {
                float m;
                memcpy(&m, s + 1, 4);
                ((float *)r->out)[to] = (float)acc * m;
            } else {
                ((int8_t *)r->out)[to] = (int8_t)ek_code(ek_rq1(acc, s[1], s[2]), r->zero, r->lo, r->hi);
            }
        }
    }
}

EK_KERNEL void ek_dw_run_each(ek_dw_t *r) { ek_dw_singles(r, 0); }

EK_KERNEL void ek_dw_run_float(ek_dw_t *r) { ek_dw_singles(r, 1); }

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
                           int8_t *y, void *scratch, ek_dw_run *run, int32_t size, const ek_add_t *add) {
    ek_dw_t *r = (ek_dw_t *)(((uintptr_t)scratch + sizeof(void *) - 1) & ~(uintptr_t)(sizeof(void *) - 1));
    r->count = p->kh * p->kw;
    r->weights = weights;
    r->channels = p->c;
    r->jump = p->sx * p->c;
    r->back = p->c - r->jump;
    r->zero = p->zero;
    r->lo = p->lo;
    r->hi = p->hi;
    int8_t *border = (int8_t *)(r->taps + r->count), *codes = border + p->c;
    memset(border, p->x_zp, (size_t)p->c);
    int32_t top, bottom, left, right;
    ek_dw_inner(p->h, p->oh, p->kh, p->sy, p->dy, p->top, &top, &bottom);
    ek_dw_inner(p->w, p->ow, p->kw, p->sx, p->dx, p->left, &left, &right);
    for (int32_t row = 0; row < p->oh; row++)
        for (int32_t column = 0, pixels; column < p->ow; column += pixels) {
            int inside = !add && row >= top && row < bottom && column >= left && column < right;
            pixels = r->pixels = inside ? right - column : 1;
            r->out = add ? codes : y;
            ek_dw_aim(p, r, x, border, row * p->sy - p->top, column * p->sx - p->left);
            run(r);
            if (add) {
                ek_add_row(add, codes, 1, other, 1, y, p->c);
                other += p->c;
            }
            y += pixels * p->c * size;
        }
}

EK_KERNEL void ek_dw_plain(const ek_depthwise_t *p, const int8_t *x, const int32_t *w, int8_t *y, void *scratch,
                           ek_dw_run *run, int32_t size) {
    ek_dw_drive(p, x, w, NULL, y, scratch, run, size, NULL);
}

EK_KERNEL void ek_depthwise_i8(const ek_depthwise_t *p, const int8_t *x, const int32_t *w, int8_t *y, void *scratch) {
    ek_dw_plain(p, x, w, y, scratch, ek_dw_run_half, 1);
}

/* Nine taps. */
EK_KERNEL void ek_depthwise9_i8(const ek_depthwise_t *p, const int8_t *x, const int32_t *w, int8_t *y, void *scratch) {
    ek_dw_plain(p, x, w, y, scratch, ek_dw_run_half9, 1);
}

EK_KERNEL void ek_depthwise_add_i8(const ek_depthwise_add_t *p, const int8_t *x, const int32_t *w, const int8_t *other,
                                   int8_t *y, void *scratch) {
    ek_dw_drive(&p->conv, x, w, other, y, scratch, ek_dw_run_half, 1, &p->add);
}

/* Any multipliers, in groups of four channels. */
EK_KERNEL void ek_depthwise_any_i8(const ek_depthwise_t *p, const int8_t *x, const int32_t *w, int8_t *y,
                                   void *scratch) {
    ek_dw_plain(p, x, w, y, scratch, ek_dw_run_any, 1);
}

EK_KERNEL void ek_depthwise_any_add_i8(const ek_depthwise_add_t *p, const int8_t *x, const int32_t *w,
                                       const int8_t *other, int8_t *y, void *scratch) {
    ek_dw_drive(&p->conv, x, w, other, y, scratch, ek_dw_run_any, 1, &p->add);
}

/* Any multipliers, channel by channel. */
EK_KERNEL void ek_depthwise_each_i8(const ek_depthwise_t *p, const int8_t *x, const int32_t *w, int8_t *y,
                                   void *scratch) {
    ek_dw_plain(p, x, w, y, scratch, ek_dw_run_each, 1);
}

EK_KERNEL void ek_depthwise_each_add_i8(const ek_depthwise_add_t *p, const int8_t *x, const int32_t *w,
                                       const int8_t *other, int8_t *y, void *scratch) {
    ek_dw_drive(&p->conv, x, w, other, y, scratch, ek_dw_run_each, 1, &p->add);
}

/* Real results. */
EK_KERNEL void ek_depthwise_i8_f32(const ek_depthwise_t *p, const int8_t *x, const int32_t *w, float *y,
                                   void *scratch) {
    ek_dw_plain(p, x, w, (int8_t *)y, scratch, ek_dw_run_float, 4);
}
