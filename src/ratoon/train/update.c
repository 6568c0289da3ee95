/* What a step does to flat vectors of weights, each in one pass: adding up gradients, their norm, AdamW.
 *
 * The same arithmetic as the torch calls in weights.py and optim.py, which stand where there is no compiler. What is
 * summed is summed in blocks of a fixed size, so that no result depends on the number of threads.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCK = 1 << 14, LANES = 16 };

static inline float widen(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float found;
    memcpy(&found, &bits, 4);
    return found;
}

static inline uint16_t narrow(float value) { /* round to nearest even; NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, nan = bits >> 16 | 64;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* sum[start[p] + i] += gradient[p][i] (bfloat16), for parts that lie one behind the other in `sum`. */
void ratoon_collect(const uint16_t *const *gradient, const int64_t *start, const int64_t *count, int64_t parts,
                    float *sum, int64_t threads) {
    const int64_t end = parts ? start[parts - 1] + count[parts - 1] : 0, blocks = (end + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads((int)smaller(threads, blocks ? blocks : 1))
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t from = block * BLOCK, to = smaller(from + BLOCK, end);
        int64_t low = 0, high = parts; /* the first part that ends behind `from` */
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (start[middle] + count[middle] <= from) low = middle + 1;
            else high = middle;
        }
        for (int64_t part = low; part < parts && start[part] < to; part++) {
            const int64_t begin = start[part] > from ? start[part] : from;
            const int64_t stop = smaller(start[part] + count[part], to);
            const uint16_t *g = gradient[part] + (begin - start[part]);
            float *s = sum + begin;
            for (int64_t i = 0; i < stop - begin; i++) s[i] += widen(g[i]);
        }
    }
}

/* The sum of squares of x. */
double ratoon_square_sum(const float *x, int64_t n, int64_t threads) {
    const int64_t blocks = (n + BLOCK - 1) / BLOCK;
    double *part = malloc(sizeof(double) * (size_t)(blocks + 1)), total = 0;
    if (!part) return NAN;
#pragma omp parallel for schedule(static) num_threads((int)smaller(threads, blocks ? blocks : 1))
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t from = block * BLOCK, to = smaller(from + BLOCK, n), whole = from + (to - from) / LANES * LANES;
        float lane[LANES] = {0};
        for (int64_t i = from; i < whole; i += LANES)
            for (int j = 0; j < LANES; j++) lane[j] += x[i + j] * x[i + j];
        double sum = 0;
        for (int j = 0; j < LANES; j++) sum += lane[j];
        for (int64_t i = whole; i < to; i++) sum += (double)x[i] * x[i];
        part[block] = sum;
    }
    for (int64_t block = 0; block < blocks; block++) total += part[block];
    free(part);
    return total;
}

typedef struct {
    int64_t n, threads;
    float *weight, *gradient, *mean, *square;
    uint16_t *low; /* the weights as the model computes with them, or absent */
    double rate, beta1, beta2, epsilon, decay, step, factor;
} AdamW;

/* One step of AdamW on gradient * factor; afterwards the gradient is 0. */
void ratoon_adamw(const AdamW *s) {
    const float factor = (float)s->factor, keep = (float)(1 - s->rate * s->decay), beta2 = (float)s->beta2;
    const float new1 = (float)(1 - s->beta1), new2 = (float)(1 - s->beta2), epsilon = (float)s->epsilon;
    const float rate = (float)(s->rate / (1 - pow(s->beta1, s->step)));
    const float root = (float)(1 / sqrt(1 - pow(s->beta2, s->step)));
    const int64_t blocks = (s->n + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads((int)smaller(s->threads, blocks ? blocks : 1))
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t from = block * BLOCK, n = smaller(from + BLOCK, s->n) - from;
        float *restrict w = s->weight + from, *restrict g = s->gradient + from;
        float *restrict m = s->mean + from, *restrict v = s->square + from;
        uint16_t *restrict low = s->low ? s->low + from : NULL;
        for (int64_t i = 0; i < n; i++) {
            const float d = g[i] * factor;
            g[i] = 0;
            m[i] += (d - m[i]) * new1;
            v[i] = v[i] * beta2 + d * d * new2;
            w[i] = w[i] * keep - rate * m[i] / (sqrtf(v[i]) * root + epsilon);
        }
        if (low)
            for (int64_t i = 0; i < n; i++) low[i] = narrow(w[i]);
    }
}
