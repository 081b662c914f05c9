/* needs: base clamp */
/*
 * Rescaling of sums whose size is known when the model is compiled: RQ1 as
 * clamp((upper half of (acc * unit * m) + add) >> post, lo, hi), with post >= 1. unit: a power of two that brings the
 * shift to 33 or more. add: zero point and rounding, at 2^post.
 */
typedef struct {
    int32_t m, unit, add;
    int16_t post, lo, hi;
} ek_scale_t;

/* acc: multiplied by `unit` already. To be limited: see `ek_narrow`. */
EK_INLINE int32_t ek_rescaled(ek_scale_t p, int32_t acc) { return ek_smmla(acc, p.m, p.add) >> p.post; }
