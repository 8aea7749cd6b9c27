// The chunked scan of ops.ssd, forward: all chunks of some heads of a group, one after the other, in a core's cache.
//
//   M = decay * (C B^T)         Y = M (dt x) + r C S^T         S = e S + (l dt x)^T B
//
// The state is kept turned, [N, P], so that every product reads its right side row by row.
#pragma once
#include "linear.h"

// c [m, n] (+)= a [m, k] b: rows of a as they lie, b packed [k / NUMBERS][n]. n is a multiple of the lanes.
template <class T, int R, int V>
static inline void tile(const T *a, int64_t lda, const uint32_t *b, int64_t n, float *c, int64_t ldc, int64_t steps, bool add) {
    vf acc[R][V] = {};
    for (int64_t k = 0; k < steps; k++)
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++)
                acc[r][v] = Inner<T>::spread(acc[r][v], a + r * lda + k * Inner<T>::NUMBERS, b + k * n + v * LANES);
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) {
            float *to = c + r * ldc + v * LANES;
            store(to, add ? load(to) + acc[r][v] : acc[r][v]);
        }
}

// As many sums at a time as fill the registers: 32 of them with AVX-512, 16 without.
static const int ACROSS = LANES / 4;

template <class T, int V>
static void columns_of(const T *a, int64_t lda, const uint32_t *b, int64_t n, float *c, int64_t ldc, int64_t m, int64_t steps, bool add) {
    const int R = V == ACROSS ? 6 : 8;
    int64_t r = 0;
    for (; r + R <= m; r += R) tile<T, R, V>(a + r * lda, lda, b, n, c + r * ldc, ldc, steps, add);
    for (; r + 2 <= m; r += 2) tile<T, 2, V>(a + r * lda, lda, b, n, c + r * ldc, ldc, steps, add);
    for (; r < m; r++) tile<T, 1, V>(a + r * lda, lda, b, n, c + r * ldc, ldc, steps, add);
}

template <class T>
static void vector_product(const T *a, int64_t lda, const uint32_t *b, int64_t n, float *c, int64_t ldc, int64_t m, int64_t k, bool add) {
    int64_t steps = k / Inner<T>::NUMBERS, column = 0;
    for (; column + ACROSS * LANES <= n; column += ACROSS * LANES)
        columns_of<T, ACROSS>(a, lda, b + column, n, c + column, ldc, m, steps, add);
    for (; ACROSS > 2 && column + 2 * LANES <= n; column += 2 * LANES) columns_of<T, 2>(a, lda, b + column, n, c + column, ldc, m, steps, add);
    for (; column < n; column += LANES) columns_of<T, 1>(a, lda, b + column, n, c + column, ldc, m, steps, add);
}

// What fills the matrix unit's tiles is multiplied there, where there is one: whoever calls has a MatrixUnit.
template <class T>
static void product(const T *a, int64_t lda, const uint32_t *b, int64_t n, float *c, int64_t ldc, int64_t m, int64_t k, bool add) {
    int64_t rows = 0;
    if constexpr (on_unit<T>()) {
        int64_t inner = k - k % TILE_INNER;
        if (inner) rows = m - m % TILE_ROWS;
        if (rows) multiply(a, lda, b, n, c, ldc, rows, inner, add);
        if (rows && inner < k) vector_product(a + inner, lda, b + inner / Inner<T>::NUMBERS * n, n, c, ldc, rows, k - inner, true);
    }
    if (rows < m) vector_product(a + rows * lda, lda, b, n, c + rows * ldc, ldc, m - rows, k, add);
}

// Rows k, k + 1 of the right side of a product, packed.
static inline void pack(uint32_t *to, vf one, vf, float) { memcpy(to, &one, sizeof one); }
static inline void pack(uint32_t *to, vf one, vf two, bf16) {
    uint16_t low[LANES], high[LANES];
    store((bf16 *)low, one);
    store((bf16 *)high, two);
    vh a, b;
    memcpy(&a, low, sizeof a);
    memcpy(&b, high, sizeof b);
    vu both = __builtin_convertvector(a, vu) | __builtin_convertvector(b, vu) << 16;
    memcpy(to, &both, sizeof both);
}

template <class T> struct Scan {
    const T *x, *B, *C;   // [batch, T, H, P], [batch, T, G, N] twice: batch and token strides given, the rest contiguous
    const float *dt, *A;  // [batch, T, H], [H]
    const int64_t *seg;   // [batch, T] or null
    float *state;         // [batch, H, P, N]: before the first token, and after the last when done
    float *before;        // [chunks, batch, H, P, N] or null: the state before each chunk
    float *y;             // [batch, T, H, P]
    int64_t x_batch, x_token, B_batch, B_token, dt_batch, dt_token;
    int64_t batch, length, heads, width, groups, size, chunk;

    int64_t wide() const { return (chunk + LANES - 1) / LANES * LANES; }
};

// What a thread works in. Q: a chunk, rounded up to lanes; tokens behind its end are zeros.
template <class T> struct Desk {
    T *C, *Bt, *mix;                   // [Q, N], [N, Q], [Q, Q]
    uint32_t *B, *write, *left, *S;    // packed [N][Q], [Q][P] twice, [N][P]
    float *scores, *y, *state;         // [Q, Q], [Q, P], [heads][N, P]
    float *s, *dt, *r, *l;             // [Q] each

    static int64_t numbers(const Scan<T> &a, int64_t heads) {
        int64_t Q = a.wide(), N = a.size, P = a.width;
        return Q * N + N * Q + Q * Q + Q * N + 2 * Q * P + N * P + Q * Q + Q * P + heads * N * P + 4 * Q + 16 * LANES;
    }
    Desk(const Scan<T> &a, int64_t heads, float *at) {
        int64_t Q = a.wide(), N = a.size, P = a.width;
        auto take = [&](int64_t count) {
            float *own = at;
            at += (count + LANES - 1) / LANES * LANES;
            return own;
        };
        C = (T *)take(Q * N), Bt = (T *)take(N * Q), mix = (T *)take(Q * Q);
        B = (uint32_t *)take(Q * N), write = (uint32_t *)take(Q * P), left = (uint32_t *)take(Q * P), S = (uint32_t *)take(N * P);
        scores = take(Q * Q), y = take(Q * P), state = take(heads * N * P);
        s = take(Q), dt = take(Q), r = take(Q), l = take(Q);
    }
};

// B and C of a chunk in the three layouts that products want, and C B^T.
template <class T> static void open_group(const Scan<T> &a, const Desk<T> &d, int64_t b, int64_t g, int64_t from, int64_t count) {
    int64_t Q = a.wide(), N = a.size;
    const int K = Inner<T>::NUMBERS;
    memset((void *)d.C, 0, Q * N * sizeof(T));
    memset((void *)d.Bt, 0, Q * N * sizeof(T));
    memset(d.B, 0, Q * N / K * 4);
    for (int64_t i = 0; i < count; i++) {
        int64_t at = b * a.B_batch + (from + i) * a.B_token + g * N;
        memcpy(d.C + i * N, a.C + at, N * sizeof(T));
        for (int64_t n = 0; n < N; n++) d.Bt[n * Q + i] = a.B[at + n];
        for (int64_t n = 0; n < N / K; n++) memcpy(d.B + n * Q + i, a.B + at + n * K, 4);
    }
    product<T>(d.C, N, d.B, Q, d.scores, Q, Q, N, false);
}

// Running sums and decays of a head in a chunk; returns how much of the state before it is left at its end.
template <class T>
static float open_head(const Scan<T> &a, const Desk<T> &d, int64_t b, int64_t h, int64_t from, int64_t count) {
    const int64_t *seg = a.seg ? a.seg + b * a.length : nullptr;
    int64_t past = seg && from ? seg[from - 1] : 0, last = seg ? seg[from + count - 1] : 0;
    float total = 0;
    for (int64_t i = 0; i < a.wide(); i++) {
        d.dt[i] = i < count ? a.dt[b * a.dt_batch + (from + i) * a.dt_token + h] : 0;
        d.s[i] = total += d.dt[i] * a.A[h];
    }
    for (int64_t i = 0; i < a.wide(); i += LANES) {
        store(d.r + i, vexp(load(d.s + i)));
        store(d.l + i, vexp(total - load(d.s + i)));
    }
    for (int64_t i = 0; seg && i < count; i++) {
        if (seg[from + i] != past) d.r[i] = 0;
        if (seg[from + i] != last) d.l[i] = 0;
    }
    return past == last ? expf(total) : 0;
}

// mix = decay * scores, zero where a token may not see another.
template <class T> static void mix_of(const Scan<T> &a, const Desk<T> &d, int64_t b, int64_t from, int64_t count) {
    int64_t Q = a.wide();
    const int64_t *seg = a.seg ? a.seg + b * a.length + from : nullptr;
    vi place;
    for (int i = 0; i < LANES; i++) place[i] = i;
    for (int64_t i = 0; i < Q; i++)
        for (int64_t j = 0; j < Q; j += LANES) {
            vf value = {};
            if (j <= i && i < count) {
                vf decay = vexp(d.s[i] - load(d.s + j));
                value = select(place + (int32_t)j > (int32_t)i, all(0), decay * load(d.scores + i * Q + j));
                for (int64_t k = 0; seg && k < LANES && j + k <= i; k++)
                    if (seg[j + k] != seg[i]) value[k] = 0;
            }
            store(d.mix + i * Q + j, value);
        }
}

// dt x, and what of it is left at the chunk's end, packed for products.
template <class T> static void write_of(const Scan<T> &a, const Desk<T> &d, int64_t b, int64_t h, int64_t from, int64_t count) {
    int64_t P = a.width;
    const int K = Inner<T>::NUMBERS;
    const T *x = a.x + b * a.x_batch + from * a.x_token + h * P;
    for (int64_t i = 0; i < a.wide(); i += K)
        for (int64_t p = 0; p < P; p += LANES) {
            vf w[2] = {}, left[2] = {};
            for (int k = 0; k < K; k++)
                if (i + k < count) {
                    w[k] = load(x + (i + k) * a.x_token + p) * d.dt[i + k];
                    left[k] = w[k] * d.l[i + k];
                }
            pack(d.write + i / K * P + p, w[0], w[1], T());
            pack(d.left + i / K * P + p, left[0], left[1], T());
        }
}

template <class T>
static void scan_task(const Scan<T> &a, int64_t b, int64_t g, int64_t first, int64_t last, float *scratch) {
    Desk<T> d(a, last - first, scratch);
    int64_t N = a.size, P = a.width, Q = a.wide();
    const int K = Inner<T>::NUMBERS;
    for (int64_t h = first; h < last; h++)
        for (int64_t p = 0; p < P; p++)
            for (int64_t n = 0; n < N; n++)
                d.state[((h - first) * N + n) * P + p] = a.state[((b * a.heads + h) * P + p) * N + n];
    for (int64_t from = 0; from < a.length; from += a.chunk) {
        int64_t count = a.length - from < a.chunk ? a.length - from : a.chunk;
        open_group(a, d, b, g, from, count);
        for (int64_t h = first; h < last; h++) {
            float *state = d.state + (h - first) * N * P;
            if (a.before) {
                float *to = a.before + ((from / a.chunk * a.batch + b) * a.heads + h) * P * N;
                for (int64_t n = 0; n < N; n++)
                    for (int64_t p = 0; p < P; p++) to[p * N + n] = state[n * P + p];
            }
            float kept = open_head(a, d, b, h, from, count);
            mix_of(a, d, b, from, count);
            write_of(a, d, b, h, from, count);
            for (int64_t n = 0; n < N; n += K)
                for (int64_t p = 0; p < P; p += LANES)
                    pack(d.S + n / K * P + p, load(state + n * P + p), load(state + (n + K - 1) * P + p), T());
            product<T>(d.C, N, d.S, P, d.y, P, count, N, false);
            for (int64_t i = 0; i < count; i++)
                for (int64_t p = 0; p < P; p += LANES) store(d.y + i * P + p, load(d.y + i * P + p) * d.r[i]);
            product<T>(d.mix, Q, d.write, P, d.y, P, count, Q, true);
            for (int64_t i = 0; i < count; i++)
                memcpy(a.y + (((b * a.length + from + i) * a.heads) + h) * P, d.y + i * P, P * sizeof(float));
            for (int64_t i = 0; i < N * P; i += LANES) store(state + i, load(state + i) * kept);
            product<T>(d.Bt, Q, d.left, P, state, P, N, Q, true);
        }
    }
    for (int64_t h = first; h < last; h++)
        for (int64_t p = 0; p < P; p++)
            for (int64_t n = 0; n < N; n++)
                a.state[((b * a.heads + h) * P + p) * N + n] = d.state[((h - first) * N + n) * P + p];
}

// Each group's heads in `parts` parts; scratch: Desk::numbers for each of `threads`.
template <class T> static void scan(const Scan<T> &a, int64_t parts, int64_t threads, float *scratch) {
    int64_t own = a.heads / a.groups, each = (own + parts - 1) / parts, tasks = a.batch * a.groups * parts;
    int64_t room = Desk<T>::numbers(a, each);
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int64_t thread = 0; thread < threads; thread++) {
        MatrixUnit<T> unit;
        for (int64_t n = thread; n < tasks; n += threads) {
            int64_t g = n / parts % a.groups, from = n % parts * each, to = from + each < own ? from + each : own;
            if (from < to) scan_task(a, n / parts / a.groups, g, g * own + from, g * own + to, scratch + thread * room);
        }
    }
}
