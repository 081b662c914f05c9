/* needs: base add scale */
/* Element by element: sums, products and other scales of codes; tables; the way from real numbers and back. */

/* A broadcast: rows of n elements, three axes of rows. a, b: steps of the operands along each; sa, sb: within a row. */
typedef struct {
    int32_t n;
    int16_t sa, sb;
    int32_t rows[3], a[3], b[3];
} ek_broadcast_t;

typedef void ek_row_fn(const void *p, const int8_t *a, int32_t sa, const int8_t *b, int32_t sb, int8_t *y, int32_t n);

EK_KERNEL void ek_broadcast(const ek_broadcast_t *s, const void *p, const int8_t *a, const int8_t *b, int8_t *y,
                            ek_row_fn *row) {
    for (int32_t i = 0; i < s->rows[0]; i++)
        for (int32_t j = 0; j < s->rows[1]; j++)
            for (int32_t k = 0; k < s->rows[2]; k++, y += s->n)
                row(p, a + i * s->a[0] + j * s->a[1] + k * s->a[2], s->sa,
                    b + i * s->b[0] + j * s->b[1] + k * s->b[2], s->sb, y, s->n);
}

typedef struct {
    ek_add_t add;
    int32_t n;
} ek_qadd_t;

typedef struct {
    ek_add_t add;
    ek_broadcast_t shape;
} ek_qadd_broadcast_t;

EK_KERNEL void ek_qadd_i8(const ek_qadd_t *p, const int8_t *a, const int8_t *b, int8_t *y) {
    ek_add_row(&p->add, a, 1, b, 1, y, p->n);
}

EK_KERNEL void ek_qadd_broadcast_i8(const ek_qadd_broadcast_t *p, const int8_t *a, const int8_t *b, int8_t *y) {
    ek_broadcast(&p->shape, &p->add, a, b, y, ek_add_row);
}

typedef struct {
    ek_scale_t scale;
    int16_t za, zb;
} ek_product_t;

typedef struct {
    ek_product_t product;
    int32_t n;
} ek_qmul_t;

typedef struct {
    ek_product_t product;
    ek_broadcast_t shape;
} ek_qmul_broadcast_t;

EK_KERNEL void ek_mul_row(const void *parameters, const int8_t *a, int32_t sa, const int8_t *b, int32_t sb, int8_t *y,
                          int32_t n) {
    const ek_product_t p = *(const ek_product_t *)parameters;
    int32_t start = -p.zb * p.scale.unit;
    for (const int8_t *end = y + n; y != end; a += sa, b += sb)
        *y++ = ek_narrow(ek_rescaled(p.scale, (*a - p.za) * (*b * p.scale.unit + start)), p.scale.lo, p.scale.hi);
    ek_narrowed(y - n, n, p.scale.lo, p.scale.hi);
}

EK_KERNEL void ek_qmul_i8(const ek_qmul_t *p, const int8_t *a, const int8_t *b, int8_t *y) {
    ek_mul_row(&p->product, a, 1, b, 1, y, p->n);
}

EK_KERNEL void ek_qmul_broadcast_i8(const ek_qmul_broadcast_t *p, const int8_t *a, const int8_t *b, int8_t *y) {
    ek_broadcast(&p->shape, &p->product, a, b, y, ek_mul_row);
}

typedef struct {
    ek_scale_t scale;
    int32_t zero, n;
} ek_qrescale_t;

EK_KERNEL void ek_qrescale_i8(const ek_qrescale_t *p, const int8_t *x, int8_t *y) {
    const ek_scale_t s = p->scale;
    int32_t start = -p->zero * s.unit;
    for (const int8_t *end = x + p->n; x != end;)
        *y++ = ek_narrow(ek_rescaled(s, *x++ * s.unit + start), s.lo, s.hi);
    ek_narrowed(y - p->n, p->n, s.lo, s.hi);
}

/* Tables of 256 codes, one for each of `channels`, each for `inner` elements in a row. */
typedef struct {
    int32_t outer, channels, inner;
} ek_qlut_t;

EK_KERNEL void ek_qlut_i8(const ek_qlut_t *p, const int8_t *x, const int8_t *table, int8_t *y) {
    for (int32_t i = 0; i < p->outer; i++)
        for (int32_t c = 0; c < p->channels; c++) {
            const int8_t *middle = table + 256 * c + 128, *end = x + p->inner;
            for (; end - x >= 4; x += 4, y += 4) {
                y[0] = middle[x[0]];
                y[1] = middle[x[1]];
                y[2] = middle[x[2]];
                y[3] = middle[x[3]];
            }
            while (x != end) *y++ = middle[*x++];
        }
}

typedef struct {
    float scale;
    int32_t zero, n;
} ek_grid_t;

EK_KERNEL void ek_quantize_i8(const ek_grid_t *p, const float *x, int8_t *y) {
    const float lo = (float)(-128 - p->zero), hi = (float)(127 - p->zero), scale = p->scale;
    for (const float *end = x + p->n; x != end; x++) {
        float v = *x / scale;
        v = v > lo ? v : lo;
        v = v < hi ? v : hi;
        /* Nearest whole number, halves to even: the sum has no bits behind the point. */
        v += 12582912.0f;
        *y++ = (int8_t)((int32_t)(v - 12582912.0f) + p->zero);
    }
}

EK_KERNEL void ek_dequantize_i8(const ek_grid_t *p, const int8_t *x, float *y) {
    const float scale = p->scale;
    for (const int8_t *end = x + p->n; x != end; x++) *y++ = scale * (float)(*x - p->zero);
}
