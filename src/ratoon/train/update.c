/* What a step does to flat vectors of weights, each in one pass: adding up gradients, their norm, AdamW.
 *
 * The same arithmetic as the torch calls in weights.py and optim.py, which stand where there is no compiler. What is
 * summed is summed in blocks of a fixed size, and what is rounded by chance takes its chance from its place and the
 * step, so that no result depends on the number of threads.
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

/* Round to nearest, halves away from 0 (so that what is left fits 16 bits with its sign); NaN stays NaN. */
static inline uint16_t narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x8000) >> 16, nan = bits >> 16 | 64;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Parts of one long vector, one behind the other: bfloat16 numbers that lie in many places. */
typedef struct {
    const uint16_t *const *gradient;
    const int64_t *start, *count;
    int64_t parts;
} Parts;

/* The first part that ends behind `from`. */
static int64_t first_part(const Parts *p, int64_t from) {
    int64_t low = 0, high = p->parts;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (p->start[middle] + p->count[middle] <= from) low = middle + 1;
        else high = middle;
    }
    return low;
}

/* sum[i] += the parts' numbers [from, to). */
static void add_parts(const Parts *p, int64_t from, int64_t to, float *restrict sum) {
    for (int64_t part = first_part(p, from); part < p->parts && p->start[part] < to; part++) {
        const int64_t begin = p->start[part] > from ? p->start[part] : from;
        const int64_t stop = smaller(p->start[part] + p->count[part], to);
        const uint16_t *restrict g = p->gradient[part] + (begin - p->start[part]);
        float *restrict s = sum + (begin - from);
        for (int64_t i = 0; i < stop - begin; i++) s[i] += widen(g[i]);
    }
}

/* sum[start[p] + i] += gradient[p][i] (bfloat16), for parts that lie one behind the other in `sum`. */
void ratoon_collect(const Parts *p, float *sum, int64_t threads) {
    const int64_t end = p->parts ? p->start[p->parts - 1] + p->count[p->parts - 1] : 0;
    const int64_t blocks = (end + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads((int)smaller(threads, blocks ? blocks : 1))
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t from = block * BLOCK;
        add_parts(p, from, smaller(from + BLOCK, end), sum + from);
    }
}

static double block_squares(const float *restrict x, int64_t n) {
    const int64_t whole = n / LANES * LANES;
    float lane[LANES] = {0};
    for (int64_t i = 0; i < whole; i += LANES)
        for (int j = 0; j < LANES; j++) lane[j] += x[i + j] * x[i + j];
    double sum = 0;
    for (int j = 0; j < LANES; j++) sum += lane[j];
    for (int64_t i = whole; i < n; i++) sum += (double)x[i] * x[i];
    return sum;
}

/* The sum of squares of x, or, without x, of the parts in a vector of n numbers that is 0 between them. */
double ratoon_square_sum(const float *x, const Parts *p, int64_t n, int64_t threads) {
    const int64_t blocks = (n + BLOCK - 1) / BLOCK;
    double *part = malloc(sizeof(double) * (size_t)(blocks + 1)), total = 0;
    if (!part) return NAN;
#pragma omp parallel for schedule(static) num_threads((int)smaller(threads, blocks ? blocks : 1))
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t from = block * BLOCK, to = smaller(from + BLOCK, n);
        if (x) {
            part[block] = block_squares(x + from, to - from);
        } else {
            float wide[BLOCK] = {0};
            add_parts(p, from, to, wide);
            part[block] = block_squares(wide, to - from);
        }
    }
    for (int64_t block = 0; block < blocks; block++) total += part[block];
    free(part);
    return total;
}

/* A float32 number as bfloat16 and what the rounding left, in units of float32's last place. */
static inline void split(float value, uint16_t *high, int16_t *rest) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    *high = narrow(value);
    *rest = (int16_t)(bits - ((uint32_t)*high << 16));
}

static inline float join(uint16_t high, int16_t rest) {
    const uint32_t bits = ((uint32_t)high << 16) + (uint32_t)(int32_t)rest;
    float found;
    memcpy(&found, &bits, 4);
    return found;
}

void ratoon_narrow(const float *value, int64_t n, uint16_t *low) {
    for (int64_t i = 0; i < n; i++) low[i] = narrow(value[i]);
}

void ratoon_split(const float *value, int64_t n, uint16_t *high, int16_t *rest) {
    for (int64_t i = 0; i < n; i++) split(value[i], high + i, rest + i);
}

void ratoon_join(const uint16_t *high, const int16_t *rest, int64_t n, float *value) {
    for (int64_t i = 0; i < n; i++) value[i] = join(high[i], rest[i]);
}

/* 32 bits that look random, of a number's place and the step (Wellons' "lowbias32" mixing). */
static inline uint32_t chance(uint32_t place, uint32_t step) {
    uint32_t x = place * 0x9e3779b1u + step * 0x85ebca77u;
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

/* Round up or down, each as likely as the number lies near to it: on average nothing is lost. `odds`: 16 bits. */
static inline uint16_t narrow_by_chance(float value, uint32_t odds) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + odds) >> 16, nan = bits >> 16 | 64;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

/* mean and square, the numbers from place `from` on, as bfloat16. */
static void narrow_moments(const float *restrict mean, const float *restrict square, int64_t from, int64_t n,
                           uint32_t step, uint16_t *restrict low_mean, uint16_t *restrict low_square) {
    for (int64_t i = 0; i < n; i++) {
        const uint32_t odds = chance((uint32_t)(from + i), step);
        low_mean[i] = narrow_by_chance(mean[i], odds & 0xffff);
        low_square[i] = narrow_by_chance(square[i], odds >> 16);
    }
}

void ratoon_narrow_moments(const float *mean, const float *square, int64_t n, int64_t step, uint16_t *low_mean,
                           uint16_t *low_square) {
    narrow_moments(mean, square, 0, n, (uint32_t)step, low_mean, low_square);
}

static void widen_all(const uint16_t *restrict low, int64_t n, float *restrict value) {
    for (int64_t i = 0; i < n; i++) value[i] = widen(low[i]);
}

typedef struct {
    int64_t n, threads;
    float *weight, *gradient, *mean, *square;
    uint16_t *low_mean, *low_square; /* without `mean` and `square`: both in bfloat16, rounded by chance */
    uint16_t *low;  /* the weights as the model computes with them, or absent */
    int16_t *rest;  /* without `weight`: what `low` lacks of the float32 weights */
    const Parts *parts; /* without `gradient`: where it lies */
    double rate, beta1, beta2, epsilon, decay, step, factor;
} AdamW;

typedef struct {
    float factor, keep, new1, beta2, new2, epsilon, rate, root;
} Numbers;

static void adamw(const Numbers *c, int64_t n, float *restrict w, const float *restrict g, float *restrict m,
                  float *restrict v) {
    const Numbers k = *c;
    for (int64_t i = 0; i < n; i++) {
        const float d = g[i] * k.factor;
        m[i] += (d - m[i]) * k.new1;
        v[i] = v[i] * k.beta2 + d * d * k.new2;
        w[i] = w[i] * k.keep - k.rate * m[i] / (sqrtf(v[i]) * k.root + k.epsilon);
    }
}

/* One step of AdamW on gradient * factor; afterwards the gradient is 0. */
void ratoon_adamw(const AdamW *s) {
    const Numbers numbers = {
        .factor = (float)s->factor, .keep = (float)(1 - s->rate * s->decay), .new1 = (float)(1 - s->beta1),
        .beta2 = (float)s->beta2, .new2 = (float)(1 - s->beta2), .epsilon = (float)s->epsilon,
        .rate = (float)(s->rate / (1 - pow(s->beta1, s->step))),
        .root = (float)(1 / sqrt(1 - pow(s->beta2, s->step))),
    };
    const int64_t blocks = (s->n + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads((int)smaller(s->threads, blocks ? blocks : 1))
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t from = block * BLOCK, n = smaller(from + BLOCK, s->n) - from;
        float joined[BLOCK], wide[BLOCK], mean[BLOCK], square[BLOCK];
        float *w = joined, *g = wide, *m = mean, *v = square;
        uint16_t *low = s->low ? s->low + from : NULL;
        if (s->weight) w = s->weight + from;
        else ratoon_join(low, s->rest + from, n, joined);
        if (s->gradient) {
            g = s->gradient + from;
        } else {
            memset(wide, 0, sizeof(float) * (size_t)n);
            add_parts(s->parts, from, from + n, wide);
        }
        if (s->mean) {
            m = s->mean + from;
            v = s->square + from;
        } else {
            widen_all(s->low_mean + from, n, mean);
            widen_all(s->low_square + from, n, square);
        }
        adamw(&numbers, n, w, g, m, v);
        if (!s->mean)
            narrow_moments(m, v, from, n, (uint32_t)s->step, s->low_mean + from, s->low_square + from);
        if (s->gradient) memset(g, 0, sizeof(float) * (size_t)n);
        if (!s->weight) ratoon_split(joined, n, low, s->rest + from);
        else if (low) ratoon_narrow(w, n, low);
    }
}
