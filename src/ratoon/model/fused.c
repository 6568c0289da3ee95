/* What training spends its time on beside the matrix products, for bfloat16 on the CPU: attention, forward and backward,
 * tanh-GELU, the gradient of the embedding, and the cross entropy. Attention is rotation and norm of queries and keys,
 * products within documents, causal or in both directions, softmax, values; nothing of the size of tokens x tokens is
 * kept or written to memory.
 *
 * The same arithmetic as model/attention.py and model/rotary.py, with float sums; a test compares the two. Queries,
 * keys and values lie side by side in one tensor, as one projection writes them: qkv (B, T, (H + 2 K) C). Products
 * are AVX512-BF16's: two bfloat16 times two, added to a float; so the second factor lies in pairs of the inner index
 * ("paired": [inner / 2][columns][2]).
 *
 * Letters as in transformer.py: B rows, T tokens, H query heads, K key/value heads, C channels. Queries are taken in
 * blocks of QB; keys before the first that one of them sees, and those after the last, are never multiplied.
 */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;
typedef uint32_t pair; /* two bfloat16 */
#define INLINE static inline __attribute__((always_inline))
enum { QB = 32, STEP = 16, MOST = 256, AHEAD = 12 }; /* MOST: channels of a head */

typedef struct {
    int64_t threads, rows, tokens, heads, kv_heads, channels, window, rotating, causal;
    double scale, eps;       /* eps < 0: queries and keys are not normed */
    const bf16 *qkv;         /* (B, T, (H + 2 K) C) */
    const float *cos, *sin;  /* (positions, rotating), or absent: the first 2 * rotating channels turn */
    const int64_t *position; /* (B, T), or absent: 0, 1, … */
    const int64_t *first;    /* (B, T): the first token of the own document, or absent: 0 */
    const int64_t *last;     /* (B, T): its last token, or absent: T - 1; not read where attention is causal */
    bf16 *out;               /* (B, T, H C): written by the forward pass, absent in the backward */
    float *lse;              /* (B, H, T): log of the sum of the exponentials */
    const bf16 *d_out;       /* (B, T, H C) */
    bf16 *d_qkv;             /* (B, T, (H + 2 K) C) */
} Call;

INLINE __m512 widen(const bf16 *from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16));
}

INLINE __m256i narrow(__m512 value) { return (__m256i)_mm512_cvtneps_pbh(value); }

INLINE void store(bf16 *to, __m512 value) { _mm256_storeu_si256((__m256i *)to, narrow(value)); }

INLINE __m512i paired(__m512 even, __m512 odd) { /* rows i and i + 1 -> pairs along i */
    __m512i low = _mm512_cvtepu16_epi32(narrow(even)), high = _mm512_cvtepu16_epi32(narrow(odd));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

INLINE __m512 exp16(__m512 x) { /* e^x for x <= about 0, relative error below 1e-6 */
    x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x); /* in this order NaN stays NaN */
    __m512 y = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896f));
    __m512 n = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145751953125f), x);
    f = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.428606765330187e-6f), f);
    __m512 p = _mm512_set1_ps(1.3888889e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(8.3333333e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(4.1666667e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.6666667e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* -- products ------------------------------------------------------------------------------------------------------ */

/* to (m, 16 nv) = or += a (m, 2 k) · b (2 k, 16 nv): a's pairs lie at a[row * row_step + i * inner_step]; b is paired
 * with `columns` columns a line. m and nv are constants, so that the sums stay in registers. */
INLINE void tile(const int m, const int nv, const pair *a, int64_t row_step, int64_t inner_step, const pair *b,
                 int64_t columns, int64_t k, float *to, int64_t to_step, int add) {
    __m512 sum[8][4];
    for (int i = 0; i < m; i++)
        for (int j = 0; j < nv; j++)
            sum[i][j] = add ? _mm512_loadu_ps(to + i * to_step + 16 * j) : _mm512_setzero_ps();
    for (int64_t p = 0; p < k; p++) {
        __m512bh line[4];
        for (int j = 0; j < nv; j++) line[j] = (__m512bh)_mm512_loadu_si512(b + p * columns + 16 * j);
        for (int i = 0; i < m; i++) {
            __m512bh one = (__m512bh)_mm512_set1_epi32((int)a[i * row_step + p * inner_step]);
            for (int j = 0; j < nv; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], one, line[j]);
        }
    }
    for (int i = 0; i < m; i++)
        for (int j = 0; j < nv; j++) _mm512_storeu_ps(to + i * to_step + 16 * j, sum[i][j]);
}

/* As `tile`, for any m and any n that is a multiple of 16. */
static void product(int64_t m, int64_t n, const pair *a, int64_t row_step, int64_t inner_step, const pair *b,
                    int64_t columns, int64_t k, float *to, int64_t to_step, int add) {
#define ROWS(count, width)                                                                                             \
    for (; i + count <= m; i += count)                                                                                 \
        tile(count, width, a + i * row_step, row_step, inner_step, b + j, columns, k, to + i * to_step + j, to_step, add)
    int64_t j = 0;
    for (; j + 64 <= n; j += 64) {
        int64_t i = 0;
        ROWS(6, 4);
        ROWS(4, 4);
        ROWS(2, 4);
        ROWS(1, 4);
    }
    for (; j + 32 <= n; j += 32) {
        int64_t i = 0;
        ROWS(8, 2);
        ROWS(2, 2);
        ROWS(1, 2);
    }
    for (; j < n; j += 16) {
        int64_t i = 0;
        ROWS(8, 1);
        ROWS(1, 1);
    }
#undef ROWS
}

/* 16 x 16 pairs, lines `from_step` apart, turned. */
INLINE void turn16(const pair *from, int64_t from_step, pair *to, int64_t to_step) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(from + i * from_step);
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) { /* 128-bit lanes of r[i], r[i+4], r[i+8], r[i+12] */
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_si512(to + (i)*to_step, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
        _mm512_storeu_si512(to + (i + 8) * to_step, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
        _mm512_storeu_si512(to + (i + 4) * to_step, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
        _mm512_storeu_si512(to + (i + 12) * to_step, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd));
    }
}

/* Rows (n, C) -> paired along the channels, [C / 2][n]: the second factor of x · rowsᵀ. n is a multiple of 16. Sixteen
 * pairs at a time; where C / 2 is no multiple of 16 the last ones by hand. */
static void pair_channels(const bf16 *rows, int64_t n, int64_t C, pair *to) {
    const pair *from = (const pair *)rows;
    int64_t half = C / 2, whole = half / 16 * 16;
    for (int64_t i = 0; i < n; i += 16) {
        for (int64_t c = 0; c < whole; c += 16) turn16(from + i * half + c, half, to + c * n + i, n);
        for (int64_t c = whole; c < half; c++)
            for (int64_t r = 0; r < 16; r++) to[c * n + i + r] = from[(i + r) * half + c];
    }
}

/* Rows (n, C) -> paired along the rows, [n / 2][C]. n is even. */
static void pair_rows(const bf16 *rows, int64_t n, int64_t C, pair *to) {
    for (int64_t i = 0; i < n; i += 2)
        for (int64_t c = 0; c < C; c += 16) {
            __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(rows + i * C + c)));
            __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(rows + (i + 1) * C + c)));
            _mm512_storeu_si512(to + i / 2 * C + c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
}

/* -- queries and keys: turned, then normed ------------------------------------------------------------------------- */

/* Lines of heads lie far apart in memory, where the processor's own prefetcher does not look. */
INLINE void fetch(const bf16 *line, int64_t C) {
    for (int64_t c = 0; c < C; c += 32) _mm_prefetch((const char *)(line + c), _MM_HINT_T0);
}

INLINE void turned(const int64_t C, const int64_t r, const bf16 *x, const float *cos, const float *sin, __m512 *y) {
    for (int64_t i = 0; i < r / 16; i++) {
        const __m512 a = widen(x + 16 * i), b = widen(x + r + 16 * i);
        const __m512 c = _mm512_loadu_ps(cos + 16 * i), s = _mm512_loadu_ps(sin + 16 * i);
        y[i] = _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s));
        y[i + r / 16] = _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s));
    }
    for (int64_t i = 2 * r / 16; i < C / 16; i++) y[i] = widen(x + 16 * i);
}

INLINE float inverse_root(const int64_t C, const __m512 *y, float eps) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < C / 16; i++) sum = _mm512_fmadd_ps(y[i], y[i], sum);
    return 1.0f / sqrtf(_mm512_reduce_add_ps(sum) / (float)C + eps);
}

INLINE void placed_as(const int64_t C, const int64_t r, const Call *s, int64_t row, const bf16 *x, int64_t step,
                      bf16 *to) {
    const float eps = (float)s->eps;
    __m512 y[MOST / 16];
    for (int64_t t = 0; t < s->tokens; t++) {
        const int64_t place = s->position ? s->position[row * s->tokens + t] : t;
        fetch(x + (t + AHEAD) * step, C);
        turned(C, r, x + t * step, s->cos + place * r, s->sin + place * r, y);
        const __m512 by = _mm512_set1_ps(eps < 0 ? 1.0f : inverse_root(C, y, eps));
        for (int64_t i = 0; i < C / 16; i++) store(to + t * C + 16 * i, _mm512_mul_ps(y[i], by));
    }
}

/* One head's vector of each token -> (n, C) for the products; lines of tokens that do not exist stay zero. */
static void placed(const Call *s, int64_t row, const bf16 *x, int64_t step, bf16 *to) {
    const int64_t C = s->channels, r = s->rotating;
    if (C == 32 && r == 16) placed_as(32, 16, s, row, x, step, to);
    else if (C == 64 && r == 32) placed_as(64, 32, s, row, x, step, to);
    else if (C == 128 && r == 64) placed_as(128, 64, s, row, x, step, to);
    else placed_as(C, r, s, row, x, step, to);
}

INLINE void unplaced_as(const int64_t C, const int64_t r, const Call *s, int64_t row, int64_t from, int64_t to,
                        const bf16 *x, int64_t step, const float *d, bf16 *dx) {
    const float eps = (float)s->eps;
    __m512 y[MOST / 16], g[MOST / 16];
    for (int64_t t = from; t < to; t++, d += C) {
        const int64_t place = s->position ? s->position[row * s->tokens + t] : t;
        const float *cos = s->cos + place * r, *sin = s->sin + place * r;
        for (int64_t i = 0; i < C / 16; i++) g[i] = _mm512_loadu_ps(d + 16 * i);
        if (eps >= 0) { /* n = y / rms(y): dy = (d - n mean(d n)) / rms(y) */
            turned(C, r, x + t * step, cos, sin, y);
            const float by = inverse_root(C, y, eps);
            __m512 dot = _mm512_setzero_ps();
            for (int64_t i = 0; i < C / 16; i++) dot = _mm512_fmadd_ps(g[i], y[i], dot);
            const __m512 share = _mm512_set1_ps(_mm512_reduce_add_ps(dot) * by * by / (float)C);
            for (int64_t i = 0; i < C / 16; i++)
                g[i] = _mm512_mul_ps(_mm512_set1_ps(by), _mm512_fnmadd_ps(y[i], share, g[i]));
        }
        bf16 *out = dx + t * step;
        for (int64_t i = 0; i < r / 16; i++) {
            const __m512 a = g[i], b = g[i + r / 16];
            const __m512 c = _mm512_loadu_ps(cos + 16 * i), n = _mm512_loadu_ps(sin + 16 * i);
            store(out + 16 * i, _mm512_fmadd_ps(a, c, _mm512_mul_ps(b, n)));
            store(out + r + 16 * i, _mm512_fmsub_ps(b, c, _mm512_mul_ps(a, n)));
        }
        for (int64_t i = 2 * r / 16; i < C / 16; i++) store(out + 16 * i, g[i]);
    }
}

/* The gradient of the placed vectors (n, C) -> that of the vectors as they came. */
static void unplaced(const Call *s, int64_t row, int64_t from, int64_t to, const bf16 *x, int64_t step, const float *d,
                     bf16 *dx) {
    const int64_t C = s->channels, r = s->rotating;
    if (C == 32 && r == 16) unplaced_as(32, 16, s, row, from, to, x, step, d, dx);
    else if (C == 64 && r == 32) unplaced_as(64, 32, s, row, from, to, x, step, d, dx);
    else if (C == 128 && r == 64) unplaced_as(128, 64, s, row, from, to, x, step, d, dx);
    else unplaced_as(C, r, s, row, from, to, x, step, d, dx);
}

/* -- what a query sees ---------------------------------------------------------------------------------------------- */

INLINE int64_t earliest(const Call *s, int64_t row, int64_t t) { /* the first key that token t sees */
    int64_t low = s->first ? s->first[row * s->tokens + t] : 0;
    if (s->window && t - s->window + 1 > low) low = t - s->window + 1;
    return low;
}

INLINE int64_t latest(const Call *s, int64_t row, int64_t t) { /* the last key that token t sees */
    if (s->causal) return t;
    int64_t high = s->last ? s->last[row * s->tokens + t] : s->tokens - 1;
    if (s->window && t + s->window - 1 < high) high = t + s->window - 1;
    return high;
}

typedef struct {
    int64_t low, n; /* the keys low .. low + n - 1, both multiples of STEP */
} Keys;

INLINE Keys keys_of(const Call *s, int64_t row, int64_t t, int64_t stop) { /* what the tokens t .. stop - 1 see */
    int64_t low = t, high = t;
    for (; t < stop; t++) {
        const int64_t begin = earliest(s, row, t), end = latest(s, row, t);
        if (begin < low) low = begin;
        if (end > high) high = end;
    }
    low = low / STEP * STEP;
    return (Keys){low, (high - low) / STEP * STEP + STEP};
}

INLINE __mmask16 seen(int64_t at, int64_t low, int64_t last) { /* of the keys at .. at + 15, those in low .. last */
    uint32_t mask = 0xffff;
    if (at < low) mask &= low - at >= 16 ? 0 : 0xffffu << (low - at);
    if (at + 15 > last) mask &= last < at ? 0 : 0xffffu >> (15 - (last - at));
    return (__mmask16)mask;
}

typedef struct {
    bf16 *q, *k, *v, *d_out;                   /* placed queries and keys, values, gradients: (N, C) */
    pair *k_channels, *v_channels;             /* [C / 2][N] */
    pair *k_rows, *v_rows, *q_rows, *do_rows;  /* [N / 2][C] */
    float *scores, *d_scores, *to, *dk, *dv;   /* (QB, N) twice, (QB, C), (N, C) twice */
    bf16 *flat;                                /* (QB, N): probabilities, or gradients of scores */
    pair *p_pairs, *ds_pairs;                  /* [QB / 2][N] */
} Room;

static size_t room(const Call *s, int backward, char *base, Room *r) {
    size_t C = (size_t)s->channels, N = ((size_t)s->tokens + QB - 1) / QB * QB, used = 0;
#define TAKE(name, bytes) (r->name = (void *)(base + used), used += ((bytes) + 63) / 64 * 64)
    TAKE(q, 2 * N * C);
    TAKE(k, 2 * N * C);
    TAKE(v, 2 * N * C);
    TAKE(k_channels, 2 * N * C);
    TAKE(scores, 4 * QB * N);
    TAKE(to, 4 * QB * C);
    TAKE(flat, 2 * QB * N);
    if (!backward) {
        TAKE(v_rows, 2 * N * C);
        return used;
    }
    TAKE(d_out, 2 * N * C);
    TAKE(v_channels, 2 * N * C);
    TAKE(k_rows, 2 * N * C);
    TAKE(q_rows, QB * 2 * C);
    TAKE(do_rows, QB * 2 * C);
    TAKE(d_scores, 4 * QB * N);
    TAKE(dk, 4 * N * C);
    TAKE(dv, 4 * N * C);
    TAKE(p_pairs, QB * 2 * N);
    TAKE(ds_pairs, QB * 2 * N);
#undef TAKE
    return used;
}

static void rows_of(const bf16 *from, int64_t step, int64_t tokens, int64_t C, bf16 *to) {
    for (int64_t t = 0; t < tokens; t++) {
        fetch(from + (t + AHEAD) * step, C);
        memcpy(to + t * C, from + t * step, (size_t)(2 * C));
    }
}

/* -- forward --------------------------------------------------------------------------------------------------------- */

static void forward_head(const Call *s, Room *r, int64_t row, int64_t head, int64_t N) {
    const int64_t T = s->tokens, C = s->channels, wide = (s->heads + 2 * s->kv_heads) * C;
    const float scale = (float)s->scale;
    placed(s, row, s->qkv + row * T * wide + head * C, wide, r->q);
    for (int64_t t = 0; t < T; t += QB) {
        const int64_t stop = t + QB < T ? t + QB : T, m = stop - t;
        const Keys keys = keys_of(s, row, t, stop);
        const int64_t low = keys.low, n = keys.n;
        product(m, n, (const pair *)(r->q + t * C), C / 2, 1, r->k_channels + low, N, C / 2, r->scores, n, 0);
        float inverse[QB];
        for (int64_t i = 0; i < m; i++) {
            float *line = r->scores + i * n;
            bf16 *p = r->flat + i * n;
            const int64_t begin = earliest(s, row, t + i) - low, last = latest(s, row, t + i) - low;
            const int64_t from = begin / 16 * 16, end = last / 16 * 16 + 16;
            __m512 top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
            for (int64_t j = from; j < end; j += 16)
                top = _mm512_mask_max_ps(top, seen(j, begin, last), top, _mm512_loadu_ps(line + j));
            const float most = _mm512_reduce_max_ps(top) * scale;
            for (int64_t j = 0; j < from; j += 16) _mm256_storeu_si256((__m256i *)(p + j), _mm256_setzero_si256());
            for (int64_t j = from; j < end; j += 16) {
                __m512 e = exp16(_mm512_fmsub_ps(_mm512_loadu_ps(line + j), _mm512_set1_ps(scale), _mm512_set1_ps(most)));
                e = _mm512_maskz_mov_ps(seen(j, begin, last), e);
                sum = _mm512_add_ps(sum, e);
                store(p + j, e);
            }
            for (int64_t j = end; j < n; j += 16) _mm256_storeu_si256((__m256i *)(p + j), _mm256_setzero_si256());
            const float total = _mm512_reduce_add_ps(sum);
            inverse[i] = 1.0f / total;
            s->lse[(row * s->heads + head) * T + t + i] = most + logf(total);
        }
        product(m, C, (const pair *)r->flat, n / 2, 1, r->v_rows + low / 2 * C, C, n / 2, r->to, C, 0);
        for (int64_t i = 0; i < m; i++) {
            bf16 *out = s->out + (row * T + t + i) * s->heads * C + head * C;
            for (int64_t c = 0; c < C; c += 16)
                store(out + c, _mm512_mul_ps(_mm512_loadu_ps(r->to + i * C + c), _mm512_set1_ps(inverse[i])));
        }
    }
}

/* -- backward -------------------------------------------------------------------------------------------------------- */

INLINE void blank(float *p, float *d, bf16 *flat, int64_t from, int64_t end) { /* keys that a query does not see */
    for (int64_t j = from; j < end; j += 16) {
        _mm512_storeu_ps(p + j, _mm512_setzero_ps());
        _mm512_storeu_ps(d + j, _mm512_setzero_ps());
        _mm256_storeu_si256((__m256i *)(flat + j), _mm256_setzero_si256());
    }
}

static void backward_head(const Call *s, Room *r, int64_t row, int64_t head, int64_t N) {
    const int64_t T = s->tokens, C = s->channels, H = s->heads, wide = (H + 2 * s->kv_heads) * C;
    const float scale = (float)s->scale;
    const bf16 *x = s->qkv + row * T * wide + head * C;
    placed(s, row, x, wide, r->q);
    rows_of(s->d_out + row * T * H * C + head * C, H * C, T, C, r->d_out);
    for (int64_t t = 0; t < T; t += QB) {
        const int64_t stop = t + QB < T ? t + QB : T, m = stop - t;
        const Keys keys = keys_of(s, row, t, stop);
        const int64_t low = keys.low, n = keys.n, even = (m + 1) / 2 * 2;
        product(m, n, (const pair *)(r->q + t * C), C / 2, 1, r->k_channels + low, N, C / 2, r->scores, n, 0);
        product(m, n, (const pair *)(r->d_out + t * C), C / 2, 1, r->v_channels + low, N, C / 2, r->d_scores, n, 0);
        for (int64_t i = 0; i < even; i++) {
            float *p = r->scores + i * n, *d = r->d_scores + i * n;
            bf16 *flat = r->flat + i * n;
            if (i == m) { /* an odd number of queries: the pair's other half is nothing */
                blank(p, d, flat, 0, n);
                continue;
            }
            const int64_t begin = earliest(s, row, t + i) - low, last = latest(s, row, t + i) - low;
            const int64_t from = begin / 16 * 16, end = last / 16 * 16 + 16;
            const __m512 lse = _mm512_set1_ps(s->lse[(row * H + head) * T + t + i]), by = _mm512_set1_ps(scale);
            __m512 dot = _mm512_setzero_ps(); /* out · d_out, without out's rounding */
            for (int64_t j = from; j < end; j += 16) {
                __m512 e = exp16(_mm512_fmsub_ps(_mm512_loadu_ps(p + j), by, lse));
                e = _mm512_maskz_mov_ps(seen(j, begin, last), e);
                dot = _mm512_fmadd_ps(e, _mm512_loadu_ps(d + j), dot);
                _mm512_storeu_ps(p + j, e);
            }
            const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(dot));
            for (int64_t j = from; j < end; j += 16) {
                const __m512 e = _mm512_mul_ps(_mm512_loadu_ps(p + j), by);
                const __m512 g = _mm512_mul_ps(e, _mm512_sub_ps(_mm512_loadu_ps(d + j), mean));
                _mm512_storeu_ps(d + j, g);
                store(flat + j, g);
            }
            blank(p, d, flat, 0, from);
            blank(p, d, flat, end, n);
        }
        for (int64_t i = 0; i < even; i += 2)
            for (int64_t j = 0; j < n; j += 16) {
                const float *p = r->scores + i * n + j, *d = r->d_scores + i * n + j;
                _mm512_storeu_si512(r->p_pairs + i / 2 * n + j, paired(_mm512_loadu_ps(p), _mm512_loadu_ps(p + n)));
                _mm512_storeu_si512(r->ds_pairs + i / 2 * n + j, paired(_mm512_loadu_ps(d), _mm512_loadu_ps(d + n)));
            }
        pair_rows(r->q + t * C, even, C, r->q_rows);
        pair_rows(r->d_out + t * C, even, C, r->do_rows);
        product(m, C, (const pair *)r->flat, n / 2, 1, r->k_rows + low / 2 * C, C, n / 2, r->to, C, 0);
        unplaced(s, row, t, stop, x, wide, r->to, s->d_qkv + row * T * wide + head * C);
        product(n, C, r->ds_pairs, 1, n, r->q_rows, C, even / 2, r->dk + low * C, C, 1);
        product(n, C, r->p_pairs, 1, n, r->do_rows, C, even / 2, r->dv + low * C, C, 1);
    }
}

/* -- the rows and heads of a batch ----------------------------------------------------------------------------------- */

static void one(const Call *s, int backward, int64_t item, char *base) {
    Room r;
    room(s, backward, base, &r);
    const int64_t T = s->tokens, C = s->channels, H = s->heads, K = s->kv_heads, wide = (H + 2 * K) * C;
    const int64_t N = (T + QB - 1) / QB * QB, row = item / K, kv = item % K;
    const bf16 *k = s->qkv + row * T * wide + (H + kv) * C, *v = k + K * C;
    placed(s, row, k, wide, r.k);
    rows_of(v, wide, T, C, r.v);
    pair_channels(r.k, N, C, r.k_channels);
    if (backward) {
        pair_channels(r.v, N, C, r.v_channels);
        pair_rows(r.k, N, C, r.k_rows);
        memset(r.dk, 0, (size_t)(4 * N * C));
        memset(r.dv, 0, (size_t)(4 * N * C));
    } else {
        pair_rows(r.v, N, C, r.v_rows);
    }
    for (int64_t head = kv * (H / K); head < (kv + 1) * (H / K); head++)
        (backward ? backward_head : forward_head)(s, &r, row, head, N);
    if (!backward) return;
    bf16 *d_k = s->d_qkv + row * T * wide + (H + kv) * C, *d_v = d_k + K * C;
    unplaced(s, row, 0, T, k, wide, r.dk, d_k);
    for (int64_t t = 0; t < T; t++)
        for (int64_t c = 0; c < C; c += 16) store(d_v + t * wide + c, _mm512_loadu_ps(r.dv + t * C + c));
}

static int all(const Call *s, int backward) {
    Room unused;
    const size_t bytes = (room(s, backward, NULL, &unused) + 4095) / 4096 * 4096;
    const int64_t items = s->rows * s->kv_heads;
    int failed = 0;
#pragma omp parallel num_threads((int)(s->threads < items ? s->threads : items))
    {
        char *base = aligned_alloc(4096, bytes);
        if (base) memset(base, 0, bytes); /* lines of tokens that do not exist are multiplied too: they must be finite */
        else failed = 1;
#pragma omp for schedule(static)
        for (int64_t item = 0; item < items; item++)
            if (base) one(s, backward, item, base);
        free(base);
    }
    return failed;
}

int ratoon_attention(const Call *s) { return all(s, 0); }

int ratoon_attention_backward(const Call *s) { return all(s, 1); }

/* The gradient of an embedding: d_table (V, D) float += the gradient (N, D) of each token's vector. Each thread has
 * its own channels, and takes the tokens in their order: the sum does not depend on the threads' luck. */
void ratoon_embedding_backward(const int64_t *ids, const bf16 *d, float *d_table, int64_t tokens, int64_t width,
                               int64_t threads) {
    const int64_t parts = (width + 15) / 16;
#pragma omp parallel for schedule(static) num_threads((int)(threads < parts ? threads : parts))
    for (int64_t part = 0; part < threads; part++) {
        const int64_t from = parts * part / threads * 16, to = parts * (part + 1) / threads * 16;
        for (int64_t t = 0; t < tokens; t++) {
            float *line = d_table + ids[t] * width;
            for (int64_t c = from; c < to && c < width; c += 16) {
                if (c + 16 <= width) {
                    _mm512_storeu_ps(line + c, _mm512_add_ps(_mm512_loadu_ps(line + c), widen(d + t * width + c)));
                } else {
                    for (int64_t i = c; i < width; i++) {
                        uint32_t bits = (uint32_t)d[t * width + i] << 16;
                        float value;
                        memcpy(&value, &bits, 4);
                        line[i] += value;
                    }
                }
            }
        }
    }
}

/* The cross entropy of each row of scores (N, V): loss[n] = -w log softmax(scores)[target]. With `gradient` the scores
 * become the gradient of the sum of the losses. Rows of weight 0 cost nothing, and their target is not read. Returns 1
 * where there is no memory, 2 where a target is outside the vocabulary. */
int ratoon_cross_entropy(bf16 *scores, const int64_t *target, const float *weight, float *loss, int64_t rows,
                         int64_t vocab, int64_t gradient, int64_t threads) {
    int failed = 0;
    const int64_t whole = vocab / 16 * 16;
    const __mmask16 rest = (__mmask16)((1u << (vocab - whole)) - 1);
#pragma omp parallel num_threads((int)(threads < rows ? threads : rows))
    {
        float *line = aligned_alloc(64, (size_t)(whole + 16) * 4);
        if (!line) failed = 1;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < rows; n++) {
            bf16 *s = scores + n * vocab;
            loss[n] = 0;
            if (!line) continue;
            if (weight[n] == 0) {
                if (gradient) memset(s, 0, (size_t)vocab * 2);
                continue;
            }
            if (target[n] < 0 || target[n] >= vocab) {
                failed = 2;
                continue;
            }
            __m512 top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
            for (int64_t j = 0; j < whole; j += 16) {
                __m512 x = widen(s + j);
                _mm512_store_ps(line + j, x);
                top = _mm512_max_ps(top, x);
            }
            if (rest) {
                __m512i half = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(rest, s + whole));
                __m512 x = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), rest, _mm512_castsi512_ps(_mm512_slli_epi32(half, 16)));
                _mm512_store_ps(line + whole, x);
                top = _mm512_max_ps(top, x);
            }
            const float most = _mm512_reduce_max_ps(top), hit = line[target[n]];
            for (int64_t j = 0; j < whole + (rest ? 16 : 0); j += 16) {
                __m512 e = exp16(_mm512_sub_ps(_mm512_load_ps(line + j), _mm512_set1_ps(most)));
                if (j == whole) e = _mm512_maskz_mov_ps(rest, e);
                sum = _mm512_add_ps(sum, e);
                _mm512_store_ps(line + j, e);
            }
            const float total = _mm512_reduce_add_ps(sum);
            loss[n] = weight[n] * (most + logf(total) - hit);
            if (!gradient) continue;
            const __m512 by = _mm512_set1_ps(weight[n] / total);
            line[target[n]] -= total;
            for (int64_t j = 0; j < whole; j += 16) store(s + j, _mm512_mul_ps(_mm512_load_ps(line + j), by));
            if (rest) _mm256_mask_storeu_epi16(s + whole, rest, narrow(_mm512_mul_ps(_mm512_load_ps(line + whole), by)));
        }
        free(line);
    }
    return failed;
}

/* tanh-GELU (Hendrycks & Gimpel, arXiv:1606.08415) in its form x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), on
 * x + bias; with `gradient` (that of the output) the gradient of x. Width is a multiple of 16. */
void ratoon_gelu_tanh(const bf16 *x, const bf16 *bias, const bf16 *gradient, bf16 *out, int64_t rows, int64_t width,
                      int64_t threads) {
    const __m512 one = _mm512_set1_ps(1.0f), a = _mm512_set1_ps(1.5957691216057308f);
    const __m512 b = _mm512_set1_ps(0.07135481627159855f), b3 = _mm512_set1_ps(3 * 0.07135481627159855f);
#pragma omp parallel for schedule(static) num_threads((int)(threads < rows ? threads : rows))
    for (int64_t n = 0; n < rows; n++)
        for (int64_t j = 0; j < width; j += 16) {
            __m512 v = widen(x + n * width + j);
            if (bias) v = _mm512_add_ps(v, widen(bias + j));
            const __m512 square = _mm512_mul_ps(v, v), u = _mm512_mul_ps(v, _mm512_fmadd_ps(b, square, a));
            const __m512 e = exp16(_mm512_sub_ps(_mm512_setzero_ps(), u)), s = _mm512_div_ps(one, _mm512_add_ps(one, e));
            if (!gradient) {
                store(out + n * width + j, _mm512_mul_ps(v, s));
                continue;
            }
            const __m512 slope = _mm512_mul_ps(_mm512_mul_ps(v, _mm512_fmadd_ps(b3, square, a)), _mm512_sub_ps(one, s));
            const __m512 d = _mm512_mul_ps(s, _mm512_add_ps(one, slope));
            store(out + n * width + j, _mm512_mul_ps(d, widen(gradient + n * width + j)));
        }
}
