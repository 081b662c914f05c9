/* needs: base */
/* Elements in another order. */

/* A result of four axes, the last one the fastest; steps: from one element to the next one of the input. */
typedef struct {
    int32_t sizes[4], steps[4];
} ek_transpose_t;

#define EK_TRANSPOSE(type, x, y)                                                                              \
    for (int32_t i = 0; i < p->sizes[0]; i++)                                                                 \
        for (int32_t j = 0; j < p->sizes[1]; j++)                                                             \
            for (int32_t k = 0; k < p->sizes[2]; k++) {                                                       \
                const type *from = x + i * p->steps[0] + j * p->steps[1] + k * p->steps[2];                   \
                for (int32_t n = p->sizes[3]; n > 0; n--, from += p->steps[3]) *y++ = *from;                  \
            }

EK_KERNEL void ek_transpose_i8(const ek_transpose_t *p, const int8_t *x, int8_t *y) { EK_TRANSPOSE(int8_t, x, y) }

EK_KERNEL void ek_transpose_f32(const ek_transpose_t *p, const float *x, float *y) { EK_TRANSPOSE(float, x, y) }
