/* needs: base */
/*
 * Windows of maps, in bytes: `planes` maps of `map` bytes each, whose rows are `stride` bytes apart; the window starts
 * `offset` bytes into a map and has `rows` rows of `run` bytes. Tiles are dense.
 */
typedef struct {
    int32_t planes, map, stride, offset, rows, run;
} ek_crop_t;

/* y = the window of x. */
EK_KERNEL void ek_crop_bytes(const ek_crop_t *p, const void *x, void *y) {
    const uint8_t *from = (const uint8_t *)x + p->offset;
    uint8_t *to = (uint8_t *)y;
    for (int32_t k = 0; k < p->planes; k++, from += p->map) {
        for (int32_t i = 0; i < p->rows; i++, to += p->run) memcpy(to, from + i * p->stride, (size_t)p->run);
    }
}

/* The window of y = tile; the rest of y stays. */
EK_KERNEL void ek_place_bytes(const ek_crop_t *p, const void *tile, void *y) {
    const uint8_t *from = (const uint8_t *)tile;
    uint8_t *to = (uint8_t *)y + p->offset;
    for (int32_t k = 0; k < p->planes; k++, to += p->map) {
        for (int32_t i = 0; i < p->rows; i++, from += p->run) memcpy(to + i * p->stride, from, (size_t)p->run);
    }
}

/* y = canvas with its window replaced by tile; y may be the canvas. */
EK_KERNEL void ek_place_on_bytes(const ek_crop_t *p, const void *canvas, const void *tile, void *y) {
    if (y != canvas) memcpy(y, canvas, (size_t)p->planes * (size_t)p->map);
    ek_place_bytes(p, tile, y);
}
