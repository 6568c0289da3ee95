/* One token more for a few rows: the decoder's forward pass in one call, weights read in place.
 *
 * The same arithmetic as model/transformer.py, for the dense decoders that native.py says it can express; a test
 * compares the two for every family. Activations are float, weights and cache float or bfloat16. Reading the weights
 * from memory is the whole cost, so they are read once, by all threads, in order.
 *
 * Letters as in transformer.py: B rows, D width, H query heads, K key/value heads, C channels, F hidden, V vocabulary.
 */
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

typedef float f16x __attribute__((vector_size(64)));
typedef float f8x __attribute__((vector_size(32)));
typedef float f4x __attribute__((vector_size(16)));
typedef uint32_t u16x __attribute__((vector_size(64)));
typedef uint16_t h16x __attribute__((vector_size(32)));
#define INLINE static inline __attribute__((always_inline))

enum { PRE, PARALLEL, SANDWICH };
enum { NO_QK_NORM, BEFORE_ROPE, AFTER_ROPE };
enum { GELU, GELU_TANH, RELU2, SILU };
enum { BATCH_BLOCK = 4, LEAST_PIECE = 8, PHASES_PER_LAYER = 5 };

typedef struct {
    const float *weight, *bias; /* either may be absent */
} Norm;

typedef struct {
    const void *weight; /* (out, in), float or bfloat16 */
    const float *bias;
} Linear;

typedef struct {
    Norm attention_norm, attention_post, mlp_norm, mlp_post, q_norm, k_norm;
    Linear q, k, v, o, gate, up, down;
    void *keys, *values;    /* (B, K, capacity, C) */
    const float *cos, *sin; /* (positions, rotating), or absent */
    int64_t window;         /* keys a token sees, itself included; 0 = all */
} Layer;

typedef struct {
    int64_t threads, rows, width, layers, heads, kv_heads, channels, hidden, vocab, rotating, capacity, slot;
    int64_t bf16, layer_norm, layout, qk_norm, activation, gated;
    double eps, scale, attention_softcap, logit_softcap;
    const Layer *layer;
    Norm final;
    Linear head;
    const int64_t *position; /* (B): of the new token */
    const int64_t *first;    /* (B): the first slot that is no padding */
    const float *x;          /* (B, D): the embedded token */
    float *logits;           /* (B, V) */
} Step;

typedef struct {
    const Step *s;
    float *qkv, *mixed, *out, *hidden;
    atomic_long *next; /* the first row of each phase that nobody has taken */
    atomic_int waiting, round, failed;
} Shared;

INLINE float widen(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float found;
    memcpy(&found, &bits, 4);
    return found;
}

INLINE uint16_t narrow(float value) { /* round to nearest even; NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 64);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE f16x load16(const void *from, int64_t index, int bf16) {
    f16x found;
    if (!bf16) {
        memcpy(&found, (const float *)from + index, sizeof found);
        return found;
    }
    const uint16_t *half = (const uint16_t *)from + index;
#if defined(__AVX512F__) /* compilers split the conversion of a whole vector into pieces */
    __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)half)), 16);
    memcpy(&found, &wide, sizeof found);
#elif defined(__AVX2__)
    __m256i low = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)half)), 16);
    __m256i high = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(half + 8))), 16);
    memcpy(&found, &low, sizeof low);
    memcpy((char *)&found + sizeof low, &high, sizeof high);
#else
    h16x narrow16;
    memcpy(&narrow16, half, sizeof narrow16);
    u16x wide = __builtin_convertvector(narrow16, u16x) << 16;
    memcpy(&found, &wide, sizeof found);
#endif
    return found;
}

INLINE float load1(const void *from, int64_t index, int bf16) {
    return bf16 ? widen(((const uint16_t *)from)[index]) : ((const float *)from)[index];
}

INLINE float sum16(f16x value) {
    f8x low, high;
    memcpy(&low, &value, sizeof low);
    memcpy(&high, (char *)&value + sizeof low, sizeof high);
    low += high;
    f4x a, b;
    memcpy(&a, &low, sizeof a);
    memcpy(&b, (char *)&low + sizeof a, sizeof b);
    a += b;
    return (a[0] + a[2]) + (a[1] + a[3]);
}

/* out[b] = row · x_b for `nb` rows of the batch. One row of the weight after the other, each from left to right: the
 * processor's prefetcher doubles the speed of a single stream, and gives up on four. */
INLINE void dot(const void *weight, int64_t row, const float *x, int64_t d, const int nb, const int bf16, float *out) {
    enum { LANES = 4 }; /* independent sums, so that additions need not wait for each other */
    f16x total[BATCH_BLOCK][LANES];
    int64_t i = 0, at = row * d;
    for (int b = 0; b < nb; b++)
        for (int u = 0; u < LANES; u++) total[b][u] = (f16x){0};
    for (; i + 16 * LANES <= d; i += 16 * LANES)
        for (int u = 0; u < LANES; u++) {
            f16x w = load16(weight, at + i + 16 * u, bf16);
            for (int b = 0; b < nb; b++) total[b][u] += w * load16(x + b * d, i + 16 * u, 0);
        }
    for (; i + 16 <= d; i += 16) {
        f16x w = load16(weight, at + i, bf16);
        for (int b = 0; b < nb; b++) total[b][0] += w * load16(x + b * d, i, 0);
    }
    for (int b = 0; b < nb; b++) {
        float sum = sum16((total[b][0] + total[b][1]) + (total[b][2] + total[b][3]));
        for (int64_t j = i; j < d; j++) sum += load1(weight, at + j, bf16) * x[b * d + j];
        out[b] = sum;
    }
}

INLINE void dot_any(const void *weight, int64_t row, const float *x, int64_t d, int64_t nb, const int bf16, float *out) {
    switch (nb) {
    case 1: dot(weight, row, x, d, 1, bf16, out); break;
    case 2: dot(weight, row, x, d, 2, bf16, out); break;
    case 3: dot(weight, row, x, d, 3, bf16, out); break;
    default: dot(weight, row, x, d, BATCH_BLOCK, bf16, out);
    }
}

/* Rows `from` to `to` of a linear layer: out[b * stride + row] = W x_b + bias. */
static void linear(const Linear *l, const float *x, int64_t d, int64_t rows, int64_t from, int64_t to, int bf16,
                   float *out, int64_t stride) {
    float found[BATCH_BLOCK];
    for (int64_t row = from; row < to; row++)
        for (int64_t b = 0; b < rows; b += BATCH_BLOCK) { /* from the second block on the row is in the cache */
            int64_t nb = rows - b < BATCH_BLOCK ? rows - b : BATCH_BLOCK;
            if (bf16) dot_any(l->weight, row, x + b * d, d, nb, 1, found);
            else dot_any(l->weight, row, x + b * d, d, nb, 0, found);
            for (int64_t j = 0; j < nb; j++) out[(b + j) * stride + row] = found[j] + (l->bias ? l->bias[row] : 0);
        }
}

static void norm(const Norm *n, const float *x, float *out, int64_t d, const Step *s) {
    double sum = 0, square = 0;
    for (int64_t i = 0; i < d; i++) sum += x[i];
    float mean = s->layer_norm ? (float)(sum / (double)d) : 0;
    for (int64_t i = 0; i < d; i++) square += (double)(x[i] - mean) * (x[i] - mean);
    float factor = (float)(1 / sqrt(square / (double)d + s->eps));
    for (int64_t i = 0; i < d; i++)
        out[i] = (x[i] - mean) * factor * (n->weight ? n->weight[i] : 1) + (n->bias ? n->bias[i] : 0);
}

INLINE float activate(float x, int64_t kind) {
    switch (kind) {
    case GELU: return 0.5f * x * (1 + erff(x * 0.70710678118654752f));
    case GELU_TANH: return 0.5f * x * (1 + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case RELU2: return x > 0 ? x * x : 0;
    default: return x / (1 + expf(-x));
    }
}

static void wait_all(Shared *shared, int *round) {
    int now = *round;
    if (atomic_fetch_add(&shared->waiting, 1) == shared->s->threads - 1) {
        atomic_store(&shared->waiting, 0);
        atomic_store(&shared->round, now + 1);
    } else {
        for (int spins = 0; atomic_load_explicit(&shared->round, memory_order_acquire) == now; spins++)
            if (spins > 4000) sched_yield(); /* another program has the core */
    }
    *round = now + 1;
}

/* Take the next piece of `total` rows; false when none is left. */
INLINE int take(Shared *shared, int64_t phase, int64_t total, int64_t piece, int64_t *from, int64_t *to) {
    *from = atomic_fetch_add_explicit(&shared->next[phase], piece, memory_order_relaxed);
    *to = *from + piece < total ? *from + piece : total;
    return *from < total;
}

INLINE int64_t piece_of(const Step *s, int64_t total) {
    int64_t piece = total / (s->threads * 6);
    return piece < LEAST_PIECE ? LEAST_PIECE : piece;
}

static void turn(float *head, const float *cos, const float *sin, int64_t r) {
    for (int64_t i = 0; i < r; i++) {
        float first = head[i], second = head[i + r];
        head[i] = first * cos[i] - second * sin[i];
        head[i + r] = second * cos[i] + first * sin[i];
    }
}

static void place(float *head, const Norm *n, const Step *s, const Layer *l, int64_t position) {
    float normed[s->channels];
    if (s->qk_norm == BEFORE_ROPE) {
        norm(n, head, normed, s->channels, s);
        memcpy(head, normed, sizeof normed);
    }
    if (l->cos) turn(head, l->cos + position * s->rotating, l->sin + position * s->rotating, s->rotating);
    if (s->qk_norm == AFTER_ROPE) {
        norm(n, head, normed, s->channels, s);
        memcpy(head, normed, sizeof normed);
    }
}

INLINE void mix_keys(const Step *s, const void *keys, const void *values, const float *q, int64_t from, int64_t end,
                     float *score, float *out, int bf16) {
    int64_t C = s->channels;
    float top = -INFINITY, total = 0;
    float cap = (float)s->attention_softcap, scale = (float)s->scale;
    for (int64_t slot = from; slot <= end; slot++) {
        f16x sum = {0};
        int64_t i = 0;
        for (; i + 16 <= C; i += 16) sum += load16(keys, slot * C + i, bf16) * load16(q, i, 0);
        float found = sum16(sum);
        for (; i < C; i++) found += load1(keys, slot * C + i, bf16) * q[i];
        found *= scale;
        if (cap > 0) found = cap * tanhf(found / cap);
        score[slot] = found;
        if (found > top) top = found;
    }
    for (int64_t i = 0; i < C; i++) out[i] = 0;
    for (int64_t slot = from; slot <= end; slot++) {
        float weight = expf(score[slot] - top);
        total += weight;
        int64_t i = 0;
        for (; i + 16 <= C; i += 16) {
            f16x sum = load16(out, i, 0) + weight * load16(values, slot * C + i, bf16);
            memcpy(out + i, &sum, sizeof sum);
        }
        for (; i < C; i++) out[i] += weight * load1(values, slot * C + i, bf16);
    }
    for (int64_t i = 0; i < C; i++) out[i] /= total;
}

/* The new key and value of one row and key/value head, stored; then its group of query heads. */
static void attend(Shared *shared, const Layer *l, int64_t b, int64_t kv, float *score) {
    const Step *s = shared->s;
    int64_t C = s->channels, group = s->heads / s->kv_heads, all = (s->heads + 2 * s->kv_heads) * C;
    int64_t start = (b * s->kv_heads + kv) * s->capacity * C, at = start + s->slot * C;
    float *row = shared->qkv + b * all;
    float *k = row + (s->heads + kv) * C, *v = row + (s->heads + s->kv_heads + kv) * C;
    place(k, &l->k_norm, s, l, s->position[b]);
    size_t size = s->bf16 ? 2 : 4;
    for (int64_t i = 0; i < C; i++) {
        if (s->bf16) {
            ((uint16_t *)l->keys)[at + i] = narrow(k[i]);
            ((uint16_t *)l->values)[at + i] = narrow(v[i]);
        } else {
            ((float *)l->keys)[at + i] = k[i];
            ((float *)l->values)[at + i] = v[i];
        }
    }
    int64_t from = s->first[b];
    if (l->window && s->slot - l->window + 1 > from) from = s->slot - l->window + 1;
    for (int64_t h = kv * group; h < (kv + 1) * group; h++) {
        place(row + h * C, &l->q_norm, s, l, s->position[b]);
        const void *keys = (const char *)l->keys + start * size, *values = (const char *)l->values + start * size;
        float *out = shared->mixed + (b * s->heads + h) * C;
        if (s->bf16) mix_keys(s, keys, values, row + h * C, from, s->slot, score, out, 1);
        else mix_keys(s, keys, values, row + h * C, from, s->slot, score, out, 0);
    }
}

static void norm_rows(const Norm *n, const float *x, float *out, const Step *s) {
    for (int64_t b = 0; b < s->rows; b++) norm(n, x + b * s->width, out + b * s->width, s->width, s);
}

/* x += out, normed first where the layout says so. Every thread keeps its own x, so nobody waits for it. */
static void add(float *x, const float *out, const Norm *post, float *spare, const Step *s) {
    if (s->layout == SANDWICH) {
        norm_rows(post, out, spare, s);
        out = spare;
    }
    for (int64_t i = 0; i < s->rows * s->width; i++) x[i] += out[i];
}

static void run_layer(Shared *shared, int64_t number, float *x, float *normed, float *score, int *round) {
    const Step *s = shared->s;
    const Layer *l = &s->layer[number];
    int64_t B = s->rows, D = s->width, C = s->channels, F = s->hidden, phase = number * PHASES_PER_LAYER, from, to;
    int64_t q = s->heads * C, kv = s->kv_heads * C, all = q + 2 * kv;
    int bf16 = (int)s->bf16;
    norm_rows(&l->attention_norm, x, normed, s);
    while (take(shared, phase, all, piece_of(s, all), &from, &to)) {
        const Linear *part[] = {&l->q, &l->k, &l->v};
        int64_t begin[] = {0, q, q + kv, all};
        for (int p = 0; p < 3; p++) {
            int64_t a = from > begin[p] ? from : begin[p], e = to < begin[p + 1] ? to : begin[p + 1];
            if (a < e) linear(part[p], normed, D, B, a - begin[p], e - begin[p], bf16, shared->qkv + begin[p], all);
        }
    }
    wait_all(shared, round);
    while (take(shared, phase + 1, B * s->kv_heads, 1, &from, &to))
        attend(shared, l, from / s->kv_heads, from % s->kv_heads, score);
    wait_all(shared, round);
    while (take(shared, phase + 2, D, piece_of(s, D), &from, &to))
        linear(&l->o, shared->mixed, q, B, from, to, bf16, shared->out, D);
    if (s->layout == PARALLEL) norm_rows(&l->mlp_norm, x, normed, s); /* of the stream before attention */
    wait_all(shared, round);
    add(x, shared->out, &l->attention_post, normed + B * D, s);
    if (s->layout != PARALLEL) norm_rows(&l->mlp_norm, x, normed, s);
    while (take(shared, phase + 3, F, piece_of(s, F), &from, &to)) {
        linear(&l->up, normed, D, B, from, to, bf16, shared->hidden, F);
        if (s->gated) {
            float *gate = score; /* room for B * F, see run */
            linear(&l->gate, normed, D, B, from, to, bf16, gate, F);
            for (int64_t b = 0; b < B; b++)
                for (int64_t i = from; i < to; i++) shared->hidden[b * F + i] *= activate(gate[b * F + i], s->activation);
        } else {
            for (int64_t b = 0; b < B; b++)
                for (int64_t i = from; i < to; i++)
                    shared->hidden[b * F + i] = activate(shared->hidden[b * F + i], s->activation);
        }
    }
    wait_all(shared, round);
    while (take(shared, phase + 4, D, piece_of(s, D), &from, &to))
        linear(&l->down, shared->hidden, F, B, from, to, bf16, shared->out, D);
    wait_all(shared, round);
    add(x, shared->out, &l->mlp_post, normed + B * D, s);
}

static void *run(void *argument) {
    Shared *shared = argument;
    const Step *s = shared->s;
    int64_t B = s->rows, BD = B * s->width, from, to;
    int64_t spare = s->capacity > B * s->hidden ? s->capacity : B * s->hidden;
    float *x = malloc(sizeof(float) * (size_t)(3 * BD + spare));
    int round = 0;
    if (!x) atomic_store(&shared->failed, 1);
    wait_all(shared, &round);
    if (atomic_load(&shared->failed)) {
        free(x);
        return NULL;
    }
    float *normed = x + BD, *score = x + 3 * BD;
    memcpy(x, s->x, sizeof(float) * (size_t)BD);
    for (int64_t number = 0; number < s->layers; number++) run_layer(shared, number, x, normed, score, &round);
    norm_rows(&s->final, x, normed, s);
    int64_t V = s->vocab;
    float cap = (float)s->logit_softcap;
    while (take(shared, s->layers * PHASES_PER_LAYER, V, piece_of(s, V), &from, &to)) {
        linear(&s->head, normed, s->width, B, from, to, (int)s->bf16, s->logits, V);
        if (cap > 0)
            for (int64_t b = 0; b < B; b++)
                for (int64_t i = from; i < to; i++) s->logits[b * V + i] = cap * tanhf(s->logits[b * V + i] / cap);
    }
    free(x);
    return NULL;
}

/* Returns 0, or 1 when there is no memory for it. Threads live for this call only: none spins between tokens. */
int ratoon_step(Step *s) {
    int64_t B = s->rows, all = (s->heads + 2 * s->kv_heads) * s->channels, q = s->heads * s->channels;
    Shared shared = {.s = s};
    shared.qkv = malloc(sizeof(float) * (size_t)(B * (all + q + s->width + s->hidden)));
    shared.next = calloc((size_t)(s->layers * PHASES_PER_LAYER + 1), sizeof(atomic_long));
    if (!shared.qkv || !shared.next) {
        free(shared.qkv);
        free(shared.next);
        return 1;
    }
    shared.mixed = shared.qkv + B * all;
    shared.out = shared.mixed + B * q;
    shared.hidden = shared.out + B * s->width;
    int64_t wanted = s->threads, started = 0;
    pthread_t thread[wanted];
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 1 << 20);
    while (started + 1 < wanted && !pthread_create(&thread[started], &attributes, run, &shared)) started++;
    if (started + 1 < wanted) { /* all leave at the first wait; the missing ones are counted as having come */
        atomic_store(&shared.failed, 1);
        atomic_fetch_add(&shared.waiting, (int)(wanted - 1 - started));
    }
    run(&shared);
    for (int64_t i = 0; i < started; i++) pthread_join(thread[i], NULL);
    pthread_attr_destroy(&attributes);
    int failed = atomic_load(&shared.failed);
    free(shared.qkv);
    free(shared.next);
    return failed;
}
