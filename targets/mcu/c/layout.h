/* needs: base */
/* Elements in other places: transposition, repetition, parts and borders of tensors, several tensors as one. */

/* A result of four axes, the last one the fastest; steps: from one element to the next one of the input. */
typedef struct {
    int32_t sizes[4], steps[4];
} ek_transpose_t;

#define EK_TRANSPOSE(type)                                                                    \
    for (int32_t i = 0; i < p->sizes[0]; i++)                                                 \
        for (int32_t j = 0; j < p->sizes[1]; j++)                                             \
            for (int32_t k = 0; k < p->sizes[2]; k++) {                                       \
                const type *from = x + i * p->steps[0] + j * p->steps[1] + k * p->steps[2];   \
                for (int32_t n = p->sizes[3]; n > 0; n--, from += p->steps[3]) *y++ = *from;  \
            }

EK_KERNEL void ek_transpose_i8(const ek_transpose_t *p, const int8_t *x, int8_t *y) { EK_TRANSPOSE(int8_t) }

EK_KERNEL void ek_transpose_f32(const ek_transpose_t *p, const float *x, float *y) { EK_TRANSPOSE(float) }

/* Runs of neighbouring bytes along four axes. All sizes but those of the axes are in bytes, steps of 0 repeat. */
typedef struct {
    int32_t sizes[4], from[4], to[4];
    int32_t first, start; /* where the first run comes from and goes to */
    int32_t run;
    int32_t filled, fill; /* how much of the result is set to `fill` before */
} ek_move_t;

/* Short runs are not worth a call. */
EK_INLINE void ek_copy_run(int8_t *y, const int8_t *x, int32_t n) {
    if (n >= 16) {
        memcpy(y, x, (size_t)n);
    } else {
        while (n-- > 0) *y++ = *x++;
    }
}

EK_KERNEL void ek_move(const ek_move_t *p, const void *x, void *y) {
    const int8_t *in = (const int8_t *)x + p->first;
    int8_t *out = (int8_t *)y + p->start;
    if (p->filled) memset(y, p->fill, (size_t)p->filled);
    for (int32_t i = 0; i < p->sizes[0]; i++)
        for (int32_t j = 0; j < p->sizes[1]; j++)
            for (int32_t k = 0; k < p->sizes[2]; k++) {
                const int8_t *from = in + i * p->from[0] + j * p->from[1] + k * p->from[2];
                int8_t *to = out + i * p->to[0] + j * p->to[1] + k * p->to[2];
                for (int32_t n = p->sizes[3]; n > 0; n--, from += p->from[3], to += p->to[3])
                    ek_copy_run(to, from, p->run);
            }
}

/* Two to four tensors, `rows` times `bytes` of each one after the other. */
typedef struct {
    int32_t rows;
    int32_t bytes[4];
} ek_concat_t;

EK_KERNEL void ek_concat(const ek_concat_t *p, const void *const *x, int32_t count, void *y) {
    int8_t *out = (int8_t *)y;
    for (int32_t i = 0; i < p->rows; i++)
        for (int32_t k = 0; k < count; out += p->bytes[k++])
            ek_copy_run(out, (const int8_t *)x[k] + i * p->bytes[k], p->bytes[k]);
}

EK_KERNEL void ek_concat2(const ek_concat_t *p, const void *a, const void *b, void *y) {
    const void *x[2] = {a, b};
    ek_concat(p, x, 2, y);
}

EK_KERNEL void ek_concat3(const ek_concat_t *p, const void *a, const void *b, const void *c, void *y) {
    const void *x[3] = {a, b, c};
    ek_concat(p, x, 3, y);
}

EK_KERNEL void ek_concat4(const ek_concat_t *p, const void *a, const void *b, const void *c, const void *d, void *y) {
    const void *x[4] = {a, b, c, d};
    ek_concat(p, x, 4, y);
}
