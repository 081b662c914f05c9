/* needs: base clamp add */
/*
 * Convolutions, matrix products and fully connected layers on int8: any kernel, stride, padding, dilation and groups.
 *
 * The inputs under the kernel of two output pixels are gathered into two columns side by side; then each pair of output
 * channels is multiplied with both. A column consists of units of 4 inputs. Inputs are taken in the order (row of the
 * kernel, its column, channel), but what each row has beyond whole units comes last, all rows together, and weights of
 * zero fill the last unit. Weights are packed [groups][pairs of channels][units][2][4], constants [groups][pairs]{bias,
 * bias, m, m}; an odd number of channels is filled up with zeros. The zero point of the input is folded into the bias.
 * Weights of 4 bits (`conv4.h`) go in pairs, too: the first channel's are the upper halves of the bytes.
 */

/* Geometry and codes. depth, outputs: input and output channels of a group. units: of a column. row: whole units of a
 * row of the kernel, rest: inputs beyond them. flat: a column is the next `ci` inputs, whole units of them. A kernel
 * from row 0..inner_h - 1, column 0..inner_w - 1 of the input on lies inside, each of its rows in one stretch.
 */
typedef struct {
    int32_t h, w, oh, ow, inner_h, inner_w;
    int16_t ci, co, groups, depth, outputs, kh, kw, sh, sw, dh, dw, top, left, units, row, rest, flat;
    int8_t x_zp, zero, lo, hi;
} ek_conv_t;

/* add: of the layer's code and a residual. */
typedef struct {
    ek_conv_t conv;
    ek_add_t add;
} ek_conv_add_t;

/* Real results. act, a set of bits: 1 takes v or slope v below 0, 2 and 4 clip to lo and to hi. scale: what real values
 * are multiplied with when their codes are stored. */
typedef struct {
    int32_t act;
    float slope, lo, hi, scale;
} ek_real_t;

typedef struct {
    ek_conv_t conv;
    ek_real_t real;
} ek_conv_f32_t;

/* What a tile function makes of blocks of channels: codes with this zero point, the second pixel's at y1; or, when y1
 * is null, the sums [channel][pixel] as int32. */
typedef struct {
    const int32_t *c;
    void *y0;
    int8_t *y1;
    int32_t blocks, zero;
} ek_tile_t;

/* Channels whose results wait on the stack. */
#define EK_CHUNK 16

#if EK_DSP
/* Words of a unit of both columns: bytes 0 and 2 of the first, 1 and 3, those of the second; as 16 bits each. */
#define EK_UNIT 4
EK_INLINE void ek_put(ek_u32 *d, uint32_t v) {
    uint32_t even, odd;
    __asm__("sxtb16 %0, %1" : "=r"(even) : "r"(v));
    __asm__("sxtb16 %0, %1, ror #8" : "=r"(odd) : "r"(v));
    d[0] = even;
    d[1] = odd;
}
#else
#define EK_UNIT 2
EK_INLINE void ek_put(ek_u32 *d, uint32_t v) { d[0] = v; }
#endif
/* Words from the first column to the second. */
#define EK_COLUMN (EK_UNIT / 2)

#if EK_DSP
/* Products of 2 pixels and 2 channels. Sums: r3, r11 of the first channel, r12, lr of the second. */
#define EK_PRODUCTS22 \
    "sxtb16 r10, r8\n smlad r3, r10, r4, r3\n smlad r11, r10, r6, r11\n" \
    "sxtb16 r8, r8, ror #8\n smlad r3, r8, r5, r3\n smlad r11, r8, r7, r11\n" \
    "sxtb16 r10, r9\n smlad r12, r10, r4, r12\n smlad lr, r10, r6, lr\n" \
    "sxtb16 r9, r9, ror #8\n smlad r12, r9, r5, r12\n smlad lr, r9, r7, lr\n"
#define EK_MAC22 "ldmia.w r0!, {r4-r7}\n ldrd r8, r9, [r1], #8\n" EK_PRODUCTS22

/* Assembly, because all 14 registers are taken: GCC would spill. A unit is `size` bytes of code and 1 << `log` bytes of
 * weights. The frame: columns, rounds of 4 units, where the first round starts, c, y0, y1, end of the weights, zero. */
#define EK_TILE_IN(size, log) \
    "push {r4-r11, lr}\n sub sp, #36\n" \
    "ldmia r3, {r4-r8}\n str r8, [sp, #28]\n" \
    "mul r7, r7, r2\n add r7, r1, r7, lsl #" #log "\n" \
    "add r8, sp, #12\n stmia r8, {r4-r7}\n" \
    "rsb r4, r2, #0\n and r4, r4, #3\n movs r5, #" #size "\n" \
    "adr.w r6, 1f\n orr r6, r6, #1\n mla r4, r4, r5, r6\n" \
    "adds r2, #3\n lsrs r2, r2, #2\n stmia sp, {r0, r2, r4}\n"
#define EK_TILE_ROUND(unit) \
    ".p2align 2\n1:\n" unit unit unit unit "subs r2, #1\n bne 1b\n add r0, sp, #12\n ldmia r0, {r4-r8}\n"
#define EK_TILE_OUT(bytes) \
    "4: adds r4, #" #bytes "\n stmia r0, {r4-r6}\n cmp r1, r7\n bne 2b\n" \
    "add sp, #36\n pop {r4-r11, pc}\n" \
    "3: stmia r5!, {r3, r11, r12, lr}\n b 4b\n"
/* The second pixel first: a lone pixel is both. */
#define EK_CODES22 \
    "cbz r6, 3f\n ldrd r9, r10, [r4, #8]\n" \
    "smmlar r3, r3, r9, r8\n smmlar r11, r11, r9, r8\n smmlar r12, r12, r10, r8\n smmlar lr, lr, r10, r8\n" \
    "ssat r3, #8, r3\n ssat r11, #8, r11\n ssat r12, #8, r12\n ssat lr, #8, lr\n" \
    "strb r11, [r6], #1\n strb lr, [r6], #1\n strb r3, [r5], #1\n strb r12, [r5], #1\n"

EK_ASSEMBLY void ek_mm22(const ek_u32 *col EK_UNUSED, const int8_t *w EK_UNUSED, int32_t units EK_UNUSED,
                         const ek_tile_t *t EK_UNUSED) {
    __asm__ volatile(EK_TILE_IN(56, 3)
                     "2: ldmia sp, {r0, r2, r4, r5}\n ldrd r3, r12, [r5]\n mov r11, r3\n mov lr, r12\n bx r4\n"
                     EK_TILE_ROUND(EK_MAC22) EK_CODES22 EK_TILE_OUT(16));
}
#else
/* Spelt out, because compilers do not unroll at -O2. */
#define EK_MAC22(k, first, second) \
    x0 = x[k], x1 = x[k + 4], w0 = first, w1 = second; \
    a00 += x0 * w0, a01 += x1 * w0, a10 += x0 * w1, a11 += x1 * w1;
#define EK_MM22(bytes, first, second) \
    const int32_t *c = t->c; \
    int32_t *sums = (int32_t *)t->y0, zero = t->zero; \
    int8_t *y0 = (int8_t *)t->y0, *y1 = t->y1; \
    for (int32_t b = t->blocks; b > 0; --b, c += 4) { \
        const int8_t *EK_RESTRICT x = (const int8_t *)col, *end = x + 8 * units; \
        int32_t a00 = c[0], a01 = c[0], a10 = c[1], a11 = c[1]; \
        for (; x != end; x += 8, w += bytes) { \
            int32_t x0, x1, w0, w1; \
            EK_MAC22(0, first(0), second(0)) \
            EK_MAC22(1, first(1), second(1)) \
            EK_MAC22(2, first(2), second(2)) \
            EK_MAC22(3, first(3), second(3)) \
        } \
        if (!y1) { \
            sums[0] = a00, sums[1] = a01, sums[2] = a10, sums[3] = a11; \
            sums += 4; \
            continue; \
        } \
        /* The second pixel first: a lone pixel is both. */ \
        y1[0] = (int8_t)ek_sat8(ek_rqh(a01, c[2]) + zero); \
        y1[1] = (int8_t)ek_sat8(ek_rqh(a11, c[3]) + zero); \
        y0[0] = (int8_t)ek_sat8(ek_rqh(a00, c[2]) + zero); \
        y0[1] = (int8_t)ek_sat8(ek_rqh(a10, c[3]) + zero); \
        y0 += 2; \
        y1 += 2; \
    }
#define EK_FIRST8(k) w[k]
#define EK_SECOND8(k) w[k + 4]

EK_KERNEL void ek_mm22(const ek_u32 *col, const int8_t *EK_RESTRICT w, int32_t units, const ek_tile_t *t) {
    EK_MM22(8, EK_FIRST8, EK_SECOND8)
}
#endif

/* -- columns ------------------------------------------------------------------------------------------------------- */

EK_KERNEL ek_u32 *ek_fill(ek_u32 *d, int32_t code, int32_t units) {
    uint32_t v = (uint8_t)code * 0x01010101u;
    for (; units > 0; --units, d += EK_UNIT) ek_put(d, v);
    return d;
}

/* `rows` times `units` of inputs, `step` bytes from one row to the next. At least one row. */
#if EK_DSP
#define EK_SPREAD "ldr r6, [r4], #4\n sxtb16 r7, r6\n sxtb16 r8, r6, ror #8\n strd r7, r8, [r0], #16\n"
EK_ASSEMBLY ek_u32 *ek_spread(ek_u32 *d EK_UNUSED, const int8_t *s EK_UNUSED, int32_t units EK_UNUSED,
                              int32_t rows EK_UNUSED, int32_t step EK_UNUSED) {
    __asm__ volatile(
        "push {r4-r8, lr}\n ldr r12, [sp, #24]\n"
        "1: mov r4, r1\n subs r5, r2, #4\n blt 3f\n"
        "2:\n" EK_SPREAD EK_SPREAD EK_SPREAD EK_SPREAD "subs r5, #4\n bge 2b\n"
        "3: adds r5, #4\n beq 5f\n"
        "4:\n" EK_SPREAD "subs r5, #1\n bne 4b\n"
        "5: add r1, r12\n subs r3, #1\n bne 1b\n"
        "pop {r4-r8, pc}\n");
}
#else
EK_KERNEL ek_u32 *ek_spread(ek_u32 *d, const int8_t *s, int32_t units, int32_t rows, int32_t step) {
    for (;; s += step) {
        for (int32_t i = 0; i < units; ++i, d += EK_UNIT) {
            uint32_t v;
            memcpy(&v, s + 4 * i, 4);
            ek_put(d, v);
        }
        if (--rows == 0) return d;
    }
}
#endif

/* Codes come in at the upper end of `v`; the units that this fills go to d. */
typedef struct {
    ek_u32 *d;
    uint32_t v;
    int32_t n;
} ek_bytes_t;

EK_INLINE void ek_push(ek_bytes_t *b, int8_t code) {
    b->v = b->v >> 8 | (uint32_t)(uint8_t)code << 24;
    if ((++b->n & 3) == 0) {
        ek_put(b->d, b->v);
        b->d += EK_UNIT;
    }
}

EK_INLINE void ek_pushed(ek_bytes_t *b) {
    if (b->n & 3) ek_put(b->d, b->v >> (32 - 8 * (b->n & 3)));
}

/* `rest` inputs of each of `rows` rows. */
EK_KERNEL void ek_rest(ek_u32 *d, const int8_t *s, int32_t rest, int32_t rows, int32_t step) {
    if (rest == 1 && rows == 3) {
        /* 3x3 on the 3 channels of an image. */
        const uint8_t *u = (const uint8_t *)s;
        ek_put(d, u[0] | (uint32_t)u[step] << 8 | (uint32_t)u[2 * step] << 16);
        return;
    }
    ek_bytes_t b = {d, 0, 0};
    for (; rows > 0; --rows, s += step) {
        for (int32_t i = 0; i < rest; ++i) ek_push(&b, s[i]);
    }
    ek_pushed(&b);
}

/* `count` inputs from the `first` of a row of the kernel, one by one. x: the row of the input; null outside of it. */
EK_KERNEL void ek_codes(const ek_conv_t *p, ek_bytes_t *out, const int8_t *x, int32_t ix, int32_t first,
                        int32_t count) {
    ek_bytes_t b = *out;
    int32_t kx = first / p->depth, k = first - kx * p->depth, cx = ix + kx * p->dw;
    for (; count > 0; cx += p->dw, k = 0) {
        int32_t there = x && cx >= 0 && cx < p->w, at = cx * p->ci;
        for (; k < p->depth && count > 0; ++k, --count) ek_push(&b, there ? x[at + k] : p->x_zp);
    }
    *out = b;
}

/* A column that meets the border or has taps apart from each other. */
EK_KERNEL void ek_border(const ek_conv_t *p, ek_u32 *d, const int8_t *x, int32_t iy, int32_t ix) {
    int32_t units = p->depth >> 2, line = p->w * p->ci, y = iy;
    for (int32_t ky = 0; ky < p->kh; ++ky, y += p->dh) {
        /* No address is computed outside the input. */
        const int8_t *s = y < 0 || y >= p->h ? 0 : x + y * line;
        if (!s) {
            d = ek_fill(d, p->x_zp, p->row);
        } else if (ix >= 0 && ix < p->inner_w) {
            d = ek_spread(d, s + ix * p->ci, p->row, 1, 0);
        } else if (p->depth & 3) {
            ek_bytes_t b = {d, 0, 0};
            ek_codes(p, &b, s, ix, 0, 4 * p->row);
            d = b.d;
        } else {
            for (int32_t kx = 0, cx = ix; kx < p->kw; ++kx, cx += p->dw) {
                d = cx < 0 || cx >= p->w ? ek_fill(d, p->x_zp, units) : ek_spread(d, s + cx * p->ci, units, 1, 0);
            }
        }
    }
    if (p->rest) {
        ek_bytes_t b = {d, 0, 0};
        for (int32_t ky = 0; ky < p->kh; ++ky, iy += p->dh) {
            ek_codes(p, &b, iy < 0 || iy >= p->h ? 0 : x + iy * line, ix, 4 * p->row, p->rest);
        }
        ek_pushed(&b);
    }
}

/* The inputs of a group, whose first channel x points to, under the kernel at row iy, column ix of the input. */
EK_INLINE void ek_column(const ek_conv_t *p, ek_u32 *d, const int8_t *x, int32_t iy, int32_t ix) {
    if (iy >= 0 && ix >= 0 && iy < p->inner_h && ix < p->inner_w) {
        const int8_t *s = x + (iy * p->w + ix) * p->ci;
        int32_t step = p->dh * p->w * p->ci;
        d = ek_spread(d, s, p->row, p->kh, step);
        if (p->rest) ek_rest(d, s + 4 * p->row, p->rest, p->kh, step);
    } else {
        ek_border(p, d, x, iy, ix);
    }
}

/* -- walks --------------------------------------------------------------------------------------------------------- */

typedef void (*ek_mm22_t)(const ek_u32 *col, const int8_t *w, int32_t units, const ek_tile_t *t);

/* What all convolutions are given. mm: multiplies with weights of so many `bits`. */
typedef struct {
    const int8_t *x, *w;
    const int32_t *c;
    void *scratch;
    ek_mm22_t mm;
    int32_t bits;
} ek_conv_in_t;
#define EK_BITS8 ek_mm22, 8

/* A step: columns of one or two pixels, weights and constants of the group, where results of the first pixel go. */
typedef struct {
    const ek_u32 *col;
    const int8_t *w;
    const int32_t *c;
    ek_mm22_t mm;
    int32_t bits, at, count, group;
} ek_step_t;

/* Columns of all pixels by twos; `finish` gets each step and `more`. */
EK_INLINE void ek_conv_walk(const ek_conv_t *p, ek_conv_in_t from,
                            void (*finish)(const ek_step_t *s, const void *more), const void *more) {
    ek_u32 *col = (ek_u32 *)from.scratch;
    int32_t blocks = (p->outputs + 1) >> 1;
    for (int32_t g = 0; g < p->groups; ++g) {
        ek_step_t s = {col, from.w, from.c, from.mm, from.bits, g * p->outputs, 2, g};
        const int8_t *in = from.x + g * p->depth;
        int32_t iy = -p->top, ix = -p->left, remaining = p->ow;
        for (int32_t n = p->oh * p->ow; n > 0; n -= 2) {
            if (n == 1) s.count = 1;
            for (int32_t j = 0; j < s.count; ++j) {
                ek_u32 *d = col + j * EK_COLUMN;
                if (p->flat) {
                    ek_spread(d, in, p->units, 1, 0);
                    in += p->ci;
                    continue;
                }
                ek_column(p, d, in, iy, ix);
                ix += p->sw;
                if (--remaining == 0) {
                    remaining = p->ow;
                    ix = -p->left;
                    iy += p->sh;
                }
            }
            finish(&s, more);
            s.at += 2 * p->co;
        }
        from.w += blocks * p->units * from.bits;
        from.c += blocks * 4;
    }
}

/* Codes of `count` channels from the `first` of a step's, second pixel at y1; null: sums. Even channels, or room. */
EK_INLINE void ek_conv_tile(const ek_step_t *s, const ek_conv_t *p, int32_t first, int32_t count, void *y0,
                            int8_t *y1) {
    ek_tile_t t = {s->c + 2 * first, y0, y1, (count + 1) >> 1, p->zero};
    s->mm(s->col, s->w + first * p->units * s->bits / 2, p->units, &t);
}

typedef struct {
    const ek_conv_t *p;
    int8_t *y;
} ek_conv_codes_t;

EK_INLINE void ek_conv_codes(const ek_step_t *s, const void *more) {
    const ek_conv_codes_t *m = (const ek_conv_codes_t *)more;
    const ek_conv_t *p = m->p;
    int32_t n = p->outputs, even = n & ~1;
    int8_t *y0 = m->y + s->at, *y1 = s->count == 2 ? y0 + p->co : y0;
    if (even) ek_conv_tile(s, p, 0, even, y0, y1);
    if (n != even) {
        int8_t last[4];
        ek_conv_tile(s, p, even, 1, last, last + 2);
        if (s->count == 2) y1[even] = last[2];
        y0[even] = last[0];
    }
    if (p->lo > -128 || p->hi < 127) {
        ek_clamp_codes(y0, n, p->lo, p->hi);
        if (s->count == 2) ek_clamp_codes(y1, n, p->lo, p->hi);
    }
}

EK_KERNEL void ek_conv_s8(const ek_conv_t *p, const int8_t *x, const int8_t *w, const int32_t *c, int8_t *y,
                          void *scratch) {
    ek_conv_codes_t m = {p, y};
    ek_conv_walk(p, (ek_conv_in_t){x, w, c, scratch, EK_BITS8}, ek_conv_codes, &m);
}

/* -- with a residual ----------------------------------------------------------------------------------------------- */

typedef struct {
    const ek_conv_add_t *p;
    const int8_t *r;
    int8_t *y;
} ek_conv_sum_t;

EK_INLINE void ek_conv_sum(const ek_step_t *s, const void *more) {
    const ek_conv_sum_t *m = (const ek_conv_sum_t *)more;
    const ek_conv_t *p = &m->p->conv;
    for (int32_t first = 0; first < p->outputs; first += EK_CHUNK) {
        int32_t n = p->outputs - first < EK_CHUNK ? p->outputs - first : EK_CHUNK;
        int32_t at = s->at + first;
        int8_t codes[2 * EK_CHUNK];
        ek_conv_tile(s, p, first, n, codes, codes + EK_CHUNK);
        if (p->lo > -128 || p->hi < 127) ek_clamp_codes(codes, 2 * EK_CHUNK, p->lo, p->hi);
        ek_add_row(&m->p->add, codes, 1, m->r + at, 1, m->y + at, n);
        at += p->co;
        if (s->count == 2) ek_add_row(&m->p->add, codes + EK_CHUNK, 1, m->r + at, 1, m->y + at, n);
    }
}

/* y may be r. */
EK_KERNEL void ek_conv_add_s8(const ek_conv_add_t *p, const int8_t *x, const int8_t *w, const int32_t *c,
                              const int8_t *r, int8_t *y, void *scratch) {
    ek_conv_sum_t m = {p, r, y};
    ek_conv_walk(&p->conv, (ek_conv_in_t){x, w, c, scratch, EK_BITS8}, ek_conv_sum, &m);
}

/* -- multipliers of one half and more ------------------------------------------------------------------------------ */

typedef struct {
    const ek_conv_t *p;
    const ek_add_t *add;
    const int8_t *shift, *r;
    int8_t *y;
} ek_conv_rq1_t;

EK_KERNEL void ek_conv_rq1(const ek_step_t *s, const void *more) {
    const ek_conv_rq1_t *m = (const ek_conv_rq1_t *)more;
    const ek_conv_t *p = m->p;
    const int8_t *shift = m->shift + s->group * ((p->outputs + 1) & ~1);
    for (int32_t first = 0; first < p->outputs; first += EK_CHUNK) {
        int32_t n = p->outputs - first < EK_CHUNK ? p->outputs - first : EK_CHUNK;
        int32_t at = s->at + first;
        int32_t sums[2 * EK_CHUNK];
        ek_conv_tile(s, p, first, n, sums, 0);
        for (int32_t j = 0; j < s->count; ++j, at += p->co) {
            int8_t codes[EK_CHUNK], *y = m->add ? codes : m->y + at;
            for (int32_t i = 0; i < n; ++i) {
                int32_t o = first + i, factor = s->c[(o >> 1) * 4 + 2 + (o & 1)];
                y[i] = (int8_t)ek_code(ek_rq1(sums[2 * i + j], factor, shift[o]), p->zero, p->lo, p->hi);
            }
            if (m->add) ek_add_row(m->add, codes, 1, m->r + at, 1, m->y + at, n);
        }
    }
}

EK_KERNEL void ek_conv_rq1_s8(const ek_conv_t *p, const int8_t *x, const int8_t *w, const int32_t *c,
                              const int8_t *shift, int8_t *y, void *scratch) {
    ek_conv_rq1_t m = {p, 0, shift, 0, y};
    ek_conv_walk(p, (ek_conv_in_t){x, w, c, scratch, EK_BITS8}, ek_conv_rq1, &m);
}

/* y may be r. */
EK_KERNEL void ek_conv_rq1_add_s8(const ek_conv_add_t *p, const int8_t *x, const int8_t *w, const int32_t *c,
                                  const int8_t *shift, const int8_t *r, int8_t *y, void *scratch) {
    ek_conv_rq1_t m = {&p->conv, &p->add, shift, r, y};
    ek_conv_walk(&p->conv, (ek_conv_in_t){x, w, c, scratch, EK_BITS8}, ek_conv_rq1, &m);
}

/* -- real results -------------------------------------------------------------------------------------------------- */

/* Rounds to float32 here: the compiler must not contract a product and a sum. */
EK_INLINE float ek_rounded(float v) {
    __asm__("" : "+m"(v));
    return v;
}

/* A sum times a factor, whose bits are given. */
EK_INLINE float ek_real_of(int32_t sum, int32_t bits) {
    return ek_rounded((float)sum * ek_float_of(bits));
}

/* y[at], of float values or of codes, from a sum and the residual. */
EK_KERNEL void ek_store_real(const ek_real_t *p, float v, int32_t coded, int32_t zero, void *y, int32_t at) {
    if ((p->act & 1) && !(v > 0)) v *= p->slope;
    if ((p->act & 2) && v < p->lo) v = p->lo;
    if ((p->act & 4) && v > p->hi) v = p->hi;
    if (!coded) {
        ((float *)y)[at] = v;
        return;
    }
    /* Adding 1.5 * 2^23 rounds to a whole number, half to even. What is not a number becomes -128. */
    float low = (float)(-128 - zero), high = (float)(127 - zero), magic = 12582912.0f;
    v = ek_rounded(ek_rounded(v) * p->scale);
    v = v > low ? v < high ? v : high : low;
    v = ek_rounded(v + magic) - magic;
    ((int8_t *)y)[at] = (int8_t)((int32_t)v + zero);
}

typedef struct {
    const ek_conv_f32_t *p;
    const float *r;
    void *y;
    int32_t coded;
} ek_conv_real_t;

EK_KERNEL void ek_conv_real(const ek_step_t *s, const void *more) {
    const ek_conv_real_t *m = (const ek_conv_real_t *)more;
    const ek_conv_t *p = &m->p->conv;
    for (int32_t first = 0; first < p->outputs; first += EK_CHUNK) {
        int32_t n = p->outputs - first < EK_CHUNK ? p->outputs - first : EK_CHUNK;
        int32_t at = s->at + first;
        int32_t sums[2 * EK_CHUNK];
        ek_conv_tile(s, p, first, n, sums, 0);
        for (int32_t j = 0; j < s->count; ++j, at += p->co) {
            for (int32_t i = 0; i < n; ++i) {
                int32_t o = first + i;
                float v = ek_real_of(sums[2 * i + j], s->c[(o >> 1) * 4 + 2 + (o & 1)]);
                if (m->r) v += m->r[at + i];
                ek_store_real(&m->p->real, v, m->coded, p->zero, m->y, at + i);
            }
        }
    }
}

EK_KERNEL void ek_conv_f32(const ek_conv_f32_t *p, const int8_t *x, const int8_t *w, const int32_t *c, float *y,
                           void *scratch) {
    ek_conv_real_t m = {p, 0, y, 0};
    ek_conv_walk(&p->conv, (ek_conv_in_t){x, w, c, scratch, EK_BITS8}, ek_conv_real, &m);
}

/* y may be r. */
EK_KERNEL void ek_conv_add_f32(const ek_conv_f32_t *p, const int8_t *x, const int8_t *w, const int32_t *c,
                               const float *r, float *y, void *scratch) {
    ek_conv_real_t m = {p, r, y, 0};
    ek_conv_walk(&p->conv, (ek_conv_in_t){x, w, c, scratch, EK_BITS8}, ek_conv_real, &m);
}

EK_KERNEL void ek_conv_f32_s8(const ek_conv_f32_t *p, const int8_t *x, const int8_t *w, const int32_t *c, int8_t *y,
                              void *scratch) {
    ek_conv_real_t m = {p, 0, y, 1};
    ek_conv_walk(&p->conv, (ek_conv_in_t){x, w, c, scratch, EK_BITS8}, ek_conv_real, &m);
}

EK_KERNEL void ek_conv_add_f32_s8(const ek_conv_f32_t *p, const int8_t *x, const int8_t *w, const int32_t *c,
                                  const float *r, int8_t *y, void *scratch) {
    ek_conv_real_t m = {p, r, y, 1};
    ek_conv_walk(&p->conv, (ek_conv_in_t){x, w, c, scratch, EK_BITS8}, ek_conv_real, &m);
}
