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
typedef int32_t i16x __attribute__((vector_size(64)));
typedef uint32_t u16x __attribute__((vector_size(64)));
typedef uint16_t h16x __attribute__((vector_size(32)));
#define INLINE static inline __attribute__((always_inline))

enum { PRE, PARALLEL, SANDWICH };
enum { NO_QK_NORM, BEFORE_ROPE, AFTER_ROPE };
enum { GELU, GELU_TANH, RELU2, SILU };
enum { BATCH_BLOCK = 4, PHASES_PER_LAYER = 5, PIECES = 4, SPINS = 4000 };

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
    atomic_long *taken; /* by phase and share: rows that somebody has taken */
    atomic_int waiting, round, failed;
} Shared;

typedef struct {
    Shared *shared;
    pthread_t thread;
    int64_t number;
    int round;
    float *x, *normed, *spare; /* (B, D) each: every thread keeps its own stream, so nobody waits for it */
    float *wide;               /* scores of a query, or gates */
} Worker;

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

static float total(const float *x, float shift, int squared, int64_t d) {
    f16x sum = {0};
    int64_t i = 0;
    for (; i + 16 <= d; i += 16) {
        f16x value = load16(x, i, 0) - shift;
        sum += squared ? value * value : value;
    }
    float found = sum16(sum);
    for (; i < d; i++) found += squared ? (x[i] - shift) * (x[i] - shift) : x[i] - shift;
    return found;
}

static void norm(const Norm *n, const float *x, float *out, int64_t d, const Step *s) {
    float mean = s->layer_norm ? total(x, 0, 0, d) / (float)d : 0;
    float factor = 1 / sqrtf(total(x, mean, 1, d) / (float)d + (float)s->eps);
    for (int64_t i = 0; i < d; i++) out[i] = (x[i] - mean) * factor;
    if (n->weight)
        for (int64_t i = 0; i < d; i++) out[i] *= n->weight[i];
    if (n->bias)
        for (int64_t i = 0; i < d; i++) out[i] += n->bias[i];
}

/* Lane by lane: a where the mask is set, else b. */
INLINE f16x choose(i16x mask, f16x a, f16x b) { return (f16x)((mask & (i16x)a) | (~mask & (i16x)b)); }

/* e ** x to a unit or two in the last place: 2 ** (whole part) times a polynomial in the rest (Taylor, degree 7). */
INLINE f16x exp16(f16x x) {
    const f16x zero = {0}, shift = zero + 12582912.0f; /* 1.5 * 2 ** 23: adding it rounds to whole numbers */
    x = choose(x < -87.0f, zero - 87.0f, x);
    x = choose(x > 88.0f, zero + 88.0f, x);
    f16x n = (x * 1.44269504088896341f + shift) - shift;
    f16x r = x - n * 0.693359375f + n * 2.12194440e-4f; /* ln 2 in two parts */
    f16x p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * (f16x)((__builtin_convertvector(n, i16x) + 127) << 23);
}

INLINE f16x activate16(f16x x, int64_t kind) {
    switch (kind) {
    case GELU:
        for (int i = 0; i < 16; i++) x[i] = 0.5f * x[i] * (1 + erff(x[i] * 0.70710678118654752f));
        return x;
    case GELU_TANH: /* 0.5 (1 + tanh z) = 1 / (1 + e ** -2z) */
        return x / (1 + exp16(-1.59576912160573071f * (x + 0.044715f * x * x * x)));
    case RELU2: return choose(x > 0, x * x, (f16x){0});
    default: return x / (1 + exp16(-x));
    }
}

/* hidden = activation(hidden), or with a gate activation(gate) * hidden. */
static void activate(float *hidden, const float *gate, int64_t n, int64_t kind) {
    for (int64_t i = 0; i < n; i += 16) {
        size_t bytes = sizeof(float) * (size_t)(n - i < 16 ? n - i : 16);
        f16x h = {0}, g = {0};
        memcpy(&h, hidden + i, bytes);
        if (gate) {
            memcpy(&g, gate + i, bytes);
            h *= activate16(g, kind);
        } else {
            h = activate16(h, kind);
        }
        memcpy(hidden + i, &h, bytes);
    }
}

static void wait_all(Shared *shared, Worker *w) {
    int now = w->round;
    if (atomic_fetch_add(&shared->waiting, 1) == shared->s->threads - 1) {
        atomic_store(&shared->waiting, 0);
        atomic_store(&shared->round, now + 1);
    } else {
        for (int spins = 0; atomic_load_explicit(&shared->round, memory_order_acquire) == now; spins++)
            if (spins > SPINS) sched_yield(); /* another program has the core */
    }
    w->round = now + 1;
}

/* Rows of a phase are dealt out in equal shares, each read from its beginning on; who is done helps the others, for
 * another program may have their core. True while there is a piece to do. */
static int take(Shared *shared, const Worker *w, int64_t phase, int64_t total, int64_t least, int64_t *from,
                int64_t *to) {
    int64_t threads = shared->s->threads;
    for (int64_t i = 0; i < threads; i++) {
        int64_t share = (w->number + i) % threads;
        int64_t begin = total * share / threads, end = total * (share + 1) / threads;
        int64_t piece = (end - begin) / PIECES;
        if (piece < least) piece = least;
        atomic_long *taken = &shared->taken[phase * threads + share];
        if (begin + atomic_load_explicit(taken, memory_order_relaxed) >= end) continue;
        *from = begin + atomic_fetch_add_explicit(taken, piece, memory_order_relaxed);
        *to = *from + piece < end ? *from + piece : end;
        if (*from < end) return 1;
    }
    return 0;
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

INLINE float score_of(const void *key, const float *q, int64_t C, const int bf16) {
    f16x sum = {0};
    int64_t i = 0;
    for (; i + 16 <= C; i += 16) sum += load16(key, i, bf16) * load16(q, i, 0);
    float found = sum16(sum);
    for (; i < C; i++) found += load1(key, i, bf16) * q[i];
    return found;
}

INLINE void mix_in(float weight, const void *value, float *out, int64_t C, const int bf16) {
    int64_t i = 0;
    for (; i + 16 <= C; i += 16) {
        f16x sum = load16(out, i, 0) + weight * load16(value, i, bf16);
        memcpy(out + i, &sum, sizeof sum);
    }
    for (; i < C; i++) out[i] += weight * load1(value, i, bf16);
}

/* softmax(scale q · keys) values over the slots `from` to the new one, whose key and value are given apart. */
INLINE void mix(const Step *s, const char *keys, const char *values, const void *key, const void *value, const float *q,
                int64_t from, float *score, float *out, const int bf16) {
    int64_t C = s->channels, stride = C * (bf16 ? 2 : 4), count = s->slot - from + 1;
    float cap = (float)s->attention_softcap, top = -INFINITY, sum;
    keys += from * stride, values += from * stride;
    for (int64_t i = 0; i < count; i++) {
        score[i] = (float)s->scale * score_of(i < count - 1 ? keys + i * stride : key, q, C, bf16);
        if (cap > 0) score[i] = cap * tanhf(score[i] / cap);
        if (score[i] > top) top = score[i];
    }
    for (int64_t i = 0; i < count; i += 16) {
        size_t bytes = sizeof(float) * (size_t)(count - i < 16 ? count - i : 16);
        f16x part = {0};
        memcpy(&part, score + i, bytes);
        part = exp16(part - top);
        memcpy(score + i, &part, bytes);
    }
    sum = total(score, 0, 0, count);
    for (int64_t i = 0; i < C; i++) out[i] = 0;
    for (int64_t i = 0; i < count; i++)
        mix_in(score[i] / sum, i < count - 1 ? values + i * stride : value, out, C, bf16);
}

/* One query head of one row. The heads of a group make the same new key and value; the first one stores them. */
static void attend(Shared *shared, const Layer *l, int64_t b, int64_t h, float *score) {
    const Step *s = shared->s;
    int64_t C = s->channels, group = s->heads / s->kv_heads, kv = h / group, all = (s->heads + 2 * s->kv_heads) * C;
    size_t size = s->bf16 ? 2 : 4, start = (size_t)((b * s->kv_heads + kv) * s->capacity * C) * size;
    float *row = shared->qkv + b * all, *q = row + h * C, *v = row + (s->heads + s->kv_heads + kv) * C, k[C];
    char key[(size_t)C * size], value[(size_t)C * size];
    memcpy(k, row + (s->heads + kv) * C, sizeof k);
    place(k, &l->k_norm, s, l, s->position[b]);
    place(q, &l->q_norm, s, l, s->position[b]);
    if (s->bf16) {
        for (int64_t i = 0; i < C; i++) {
            uint16_t narrowed[] = {narrow(k[i]), narrow(v[i])};
            memcpy(key + 2 * i, &narrowed[0], 2);
            memcpy(value + 2 * i, &narrowed[1], 2);
        }
    } else {
        memcpy(key, k, sizeof key);
        memcpy(value, v, sizeof value);
    }
    if (h % group == 0) {
        memcpy((char *)l->keys + start + (size_t)s->slot * sizeof key, key, sizeof key);
        memcpy((char *)l->values + start + (size_t)s->slot * sizeof value, value, sizeof value);
    }
    int64_t from = s->first[b];
    if (l->window && s->slot - l->window + 1 > from) from = s->slot - l->window + 1;
    const char *keys = (const char *)l->keys + start, *values = (const char *)l->values + start;
    float *out = shared->mixed + (b * s->heads + h) * C;
    if (s->bf16) mix(s, keys, values, key, value, q, from, score, out, 1);
    else mix(s, keys, values, key, value, q, from, score, out, 0);
}

static void norm_rows(const Norm *n, const float *x, float *out, const Step *s) {
    for (int64_t b = 0; b < s->rows; b++) norm(n, x + b * s->width, out + b * s->width, s->width, s);
}

/* x += out, normed first where the layout says so. */
static void add(float *x, const float *out, const Norm *post, float *spare, const Step *s) {
    if (s->layout == SANDWICH) {
        norm_rows(post, out, spare, s);
        out = spare;
    }
    for (int64_t i = 0; i < s->rows * s->width; i++) x[i] += out[i];
}

static void run_layer(Shared *shared, Worker *w, int64_t number) {
    const Step *s = shared->s;
    const Layer *l = &s->layer[number];
    int64_t B = s->rows, D = s->width, C = s->channels, F = s->hidden, phase = number * PHASES_PER_LAYER, from, to;
    int64_t q = s->heads * C, kv = s->kv_heads * C, all = q + 2 * kv;
    int bf16 = (int)s->bf16;
    float *x = w->x, *normed = w->normed, *spare = w->spare;
    norm_rows(&l->attention_norm, x, normed, s);
    while (take(shared, w, phase, all, 8, &from, &to)) {
        const Linear *part[] = {&l->q, &l->k, &l->v};
        int64_t begin[] = {0, q, q + kv, all};
        for (int p = 0; p < 3; p++) {
            int64_t a = from > begin[p] ? from : begin[p], e = to < begin[p + 1] ? to : begin[p + 1];
            if (a < e) linear(part[p], normed, D, B, a - begin[p], e - begin[p], bf16, shared->qkv + begin[p], all);
        }
    }
    wait_all(shared, w);
    while (take(shared, w, phase + 1, B * s->heads, 1, &from, &to))
        for (; from < to; from++) attend(shared, l, from / s->heads, from % s->heads, w->wide);
    wait_all(shared, w);
    while (take(shared, w, phase + 2, D, 8, &from, &to))
        linear(&l->o, shared->mixed, q, B, from, to, bf16, shared->out, D);
    if (s->layout == PARALLEL) norm_rows(&l->mlp_norm, x, normed, s); /* of the stream before attention */
    wait_all(shared, w);
    add(x, shared->out, &l->attention_post, spare, s);
    if (s->layout != PARALLEL) norm_rows(&l->mlp_norm, x, normed, s);
    while (take(shared, w, phase + 3, F, 8, &from, &to)) {
        linear(&l->up, normed, D, B, from, to, bf16, shared->hidden, F);
        if (s->gated) linear(&l->gate, normed, D, B, from, to, bf16, w->wide, F);
        for (int64_t at = from; at < B * F; at += F)
            activate(shared->hidden + at, s->gated ? w->wide + at : NULL, to - from, s->activation);
    }
    wait_all(shared, w);
    while (take(shared, w, phase + 4, D, 8, &from, &to))
        linear(&l->down, shared->hidden, F, B, from, to, bf16, shared->out, D);
    wait_all(shared, w);
    add(x, shared->out, &l->mlp_post, spare, s);
}

static void *run(void *argument) {
    Worker *w = argument;
    Shared *shared = w->shared;
    const Step *s = shared->s;
    int64_t B = s->rows, BD = B * s->width, from, to;
    int64_t wide = s->capacity > B * s->hidden ? s->capacity : B * s->hidden;
    w->x = malloc(sizeof(float) * (size_t)(3 * BD + wide));
    if (!w->x) atomic_store(&shared->failed, 1);
    wait_all(shared, w);
    if (atomic_load(&shared->failed)) {
        free(w->x);
        return NULL;
    }
    w->normed = w->x + BD, w->spare = w->x + 2 * BD, w->wide = w->x + 3 * BD;
    memcpy(w->x, s->x, sizeof(float) * (size_t)BD);
    for (int64_t number = 0; number < s->layers; number++) run_layer(shared, w, number);
    norm_rows(&s->final, w->x, w->normed, s);
    int64_t V = s->vocab;
    float cap = (float)s->logit_softcap;
    while (take(shared, w, s->layers * PHASES_PER_LAYER, V, 8, &from, &to)) {
        linear(&s->head, w->normed, s->width, B, from, to, (int)s->bf16, s->logits, V);
        if (cap > 0)
            for (int64_t b = 0; b < B; b++)
                for (int64_t i = b * V + from; i < b * V + to; i++) s->logits[i] = cap * tanhf(s->logits[i] / cap);
    }
    free(w->x);
    return NULL;
}

/* Returns 0, or 1 when there is no memory or no thread. Threads live for this call only: none spins between tokens. */
int ratoon_step(Step *s) {
    int64_t B = s->rows, all = (s->heads + 2 * s->kv_heads) * s->channels, q = s->heads * s->channels;
    int64_t phases = s->layers * PHASES_PER_LAYER + 1;
    Shared shared = {.s = s};
    shared.qkv = malloc(sizeof(float) * (size_t)(B * (all + q + s->width + s->hidden)));
    shared.taken = calloc((size_t)(phases * s->threads), sizeof(atomic_long));
    Worker *worker = calloc((size_t)s->threads, sizeof(Worker));
    if (!shared.qkv || !shared.taken || !worker) {
        free(shared.qkv);
        free(shared.taken);
        free(worker);
        return 1;
    }
    shared.mixed = shared.qkv + B * all;
    shared.out = shared.mixed + B * q;
    shared.hidden = shared.out + B * s->width;
    for (int64_t i = 0; i < s->threads; i++) worker[i] = (Worker){.shared = &shared, .number = i};
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 1 << 20);
    int64_t started = 1;
    while (started < s->threads && !pthread_create(&worker[started].thread, &attributes, run, &worker[started])) started++;
    if (started < s->threads) { /* all leave at the first wait; the missing ones are counted as having come */
        atomic_store(&shared.failed, 1);
        atomic_fetch_add(&shared.waiting, (int)(s->threads - started));
    }
    run(&worker[0]);
    for (int64_t i = 1; i < started; i++) pthread_join(worker[i].thread, NULL);
    pthread_attr_destroy(&attributes);
    int failed = atomic_load(&shared.failed);
    free(shared.qkv);
    free(shared.taken);
    free(worker);
    return failed;
}
