/* needs: base */
/* Softmax of rows of real numbers and its logarithm, without the mathematical library. */
typedef struct {
    int32_t rows, columns;
} ek_softmax_t;

/* e^x of x <= 0 to a few units in the last place: 2^k times a polynomial on +-log(2)/2. 0 below 2^-126. */
EK_KERNEL float ek_exp(float x) {
    if (x < -87.3f) return 0.0f;
    /* The integer nearest to x / log(2) in the low bits, and NaN when x is. */
    float near = x * 1.44269504f + 12582912.0f, k = near - 12582912.0f, r = x - k * 0.693359375f + k * 2.12194440e-4f;
    uint32_t bits;
    memcpy(&bits, &near, 4);
    bits = (bits + 127u) << 23;
    float power;
    memcpy(&power, &bits, 4);
    float s = 1.9875691e-4f;
    s = s * r + 1.3981999e-3f;
    s = s * r + 8.3334519e-3f;
    s = s * r + 4.1665795e-2f;
    s = s * r + 1.6666665e-1f;
    s = s * r + 5.0000001e-1f;
    return (s * r * r + r + 1.0f) * power;
}

/* log(x) of x >= 1: the series of 2 artanh((f - 1) / (f + 1)) for f within a factor of sqrt(2) of one. */
EK_KERNEL float ek_log(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    int32_t k = (int32_t)(bits - 0x3f3504f3u) >> 23;
    bits -= (uint32_t)k << 23;
    float f;
    memcpy(&f, &bits, 4);
    float s = (f - 1.0f) / (f + 1.0f), q = s * s;
    float series = ((0.22222222f * q + 0.28571429f) * q + 0.4f) * q + 0.66666667f;
    /* x - x: nothing, or NaN. */
    return (float)k * 0.69314718f + (s * q * series + 2.0f * s) + (x - x);
}

EK_INLINE float ek_row_maximum(const float *x, int32_t n) {
    float most = x[0];
    for (int32_t i = 1; i < n; i++) most = x[i] > most ? x[i] : most;
    return most;
}

EK_KERNEL void ek_softmax_f32(const ek_softmax_t *p, const float *x, float *y) {
    for (int32_t i = 0; i < p->rows; i++, x += p->columns, y += p->columns) {
        float most = ek_row_maximum(x, p->columns), sum = 0.0f;
        for (int32_t j = 0; j < p->columns; j++) {
            y[j] = ek_exp(x[j] - most);
            sum += y[j];
        }
        sum = 1.0f / sum;
        for (int32_t j = 0; j < p->columns; j++) y[j] *= sum;
    }
}

EK_KERNEL void ek_log_softmax_f32(const ek_softmax_t *p, const float *x, float *y) {
    for (int32_t i = 0; i < p->rows; i++, x += p->columns, y += p->columns) {
        float most = ek_row_maximum(x, p->columns), sum = 0.0f;
        for (int32_t j = 0; j < p->columns; j++) sum += ek_exp(x[j] - most);
        sum = ek_log(sum);
        for (int32_t j = 0; j < p->columns; j++) y[j] = (x[j] - most) - sum;
    }
}
