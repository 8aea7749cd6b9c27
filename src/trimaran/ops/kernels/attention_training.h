// Attention of whole passes in training, forward and backward: a head's queries a block at a time, in a core's cache.
//
//   P = exp(scale q.k - lse)    out = P v    dv = P^T do    dS = P (do v^T - rowsum(do out))    dq = scale dS k
//                                                                                             dk = scale dS^T q
//
// Scores are kept turned, [keys, queries], so that lanes are queries: sums over keys need no shuffling, and each product
// reads its left side as it lies. A query sees the keys [first, end).
#pragma once
#include "scan.h"

static const int BLOCK = 64;  // queries at a time

template <class T> struct Attention {
    const T *q, *k, *v;                        // [batch, T, H, K], [batch, T, G, K] twice: batch and token strides given
    const int32_t *first, *end;                // [batch, T]
    int64_t q_batch, q_token, k_batch, k_token, v_batch, v_token;
    int64_t batch, length, heads, groups, width;
    float scale;
    T *out;          // [batch, T, H, K] contiguous
    float *lse;      // [batch, H, T]
    const T *grad;   // as out, for backward alone
    T *dq, *dk, *dv; // contiguous

    int64_t wide() const { return (length + LANES - 1) / LANES * LANES; }
};

template <class T> struct Bench {
    T *turned, *P, *dS;                       // [K, S], [S, BLOCK] twice
    uint32_t *qt, *gt, *qp, *gp, *packed;     // packed [K][BLOCK] twice, [BLOCK][K] twice, [S][BLOCK]
    float *scores, *lean, *across, *dk, *dv;  // [S, BLOCK] twice, [K, BLOCK], [S, K] twice

    static int64_t numbers(const Attention<T> &a) {
        int64_t S = a.wide(), K = a.width;
        return 3 * S * K + 5 * S * BLOCK + 5 * K * BLOCK + 16 * LANES;
    }
    Bench(const Attention<T> &a, float *at) {
        int64_t S = a.wide(), K = a.width;
        auto take = [&](int64_t count) {
            float *own = at;
            at += count;
            return own;
        };
        turned = (T *)take(K * S), P = (T *)take(S * BLOCK), dS = (T *)take(S * BLOCK);
        qt = (uint32_t *)take(K * BLOCK), gt = (uint32_t *)take(K * BLOCK), qp = (uint32_t *)take(K * BLOCK);
        gp = (uint32_t *)take(K * BLOCK), packed = (uint32_t *)take(S * BLOCK);
        scores = take(S * BLOCK), lean = take(S * BLOCK), across = take(K * BLOCK), dk = take(S * K), dv = take(S * K);
    }
};

// Rows [count, K] as [K, S], zeros behind them.
template <class T> static void turn_rows(const T *from, int64_t token, int64_t count, int64_t K, int64_t S, T *to) {
    memset((void *)to, 0, K * S * sizeof(T));
    for (int64_t s = 0; s < count; s++)
        for (int64_t i = 0; i < K; i++) to[i * S + s] = from[s * token + i];
}

// Rows of a block as the right side of a product over K: packed [K][BLOCK], zeros behind them.
template <class T> static void turn_block(const T *from, int64_t token, int64_t count, int64_t K, uint32_t *to) {
    const int N = Inner<T>::NUMBERS;
    memset(to, 0, K / N * BLOCK * 4);
    for (int64_t i = 0; i < count; i++)
        for (int64_t k = 0; k < K / N; k++) memcpy(to + k * BLOCK + i, from + i * token + k * N, 4);
}

// Rows of a block as the right side of a product over the block: packed [BLOCK][K].
template <class T> static void pack_block(const T *from, int64_t token, int64_t count, int64_t K, uint32_t *to) {
    const int N = Inner<T>::NUMBERS;
    for (int64_t i = 0; i < BLOCK; i += N)
        for (int64_t k = 0; k < K; k += LANES) {
            vf one = i < count ? load(from + i * token + k) : all(0);
            vf two = i + N - 1 < count ? load(from + (i + N - 1) * token + k) : all(0);
            pack(to + i / N * K + k, one, two, T());
        }
}

// What a block of queries sees: lanes' first and end, and the keys [from, to) that any of them sees.
struct Sight {
    int32_t first[BLOCK], end[BLOCK];
    int64_t from, to, padded;

    Sight(const int32_t *firsts, const int32_t *ends, int64_t count, int numbers) {
        from = INT32_MAX, to = 0;
        for (int64_t i = 0; i < BLOCK; i++) {
            first[i] = i < count ? firsts[i] : 0, end[i] = i < count ? ends[i] : 0;
            if (first[i] >= end[i]) continue;
            from = first[i] < from ? first[i] : from, to = end[i] > to ? end[i] : to;
        }
        from = from < to ? from / numbers * numbers : to = 0;
        padded = (to + numbers - 1) / numbers * numbers;
    }
    vi sees(int64_t key, int v) const {
        vi a, b;
        memcpy(&a, first + v * LANES, sizeof a), memcpy(&b, end + v * LANES, sizeof b);
        return (a <= (int32_t)key) & (b > (int32_t)key);
    }
};

template <class T> static void attend_block(const Attention<T> &a, const Bench<T> &d, int64_t b, int64_t h, int64_t at) {
    const int N = Inner<T>::NUMBERS, V = BLOCK / LANES;
    int64_t K = a.width, S = a.wide(), count = a.length - at < BLOCK ? a.length - at : BLOCK;
    Sight s(a.first + b * a.length + at, a.end + b * a.length + at, count, N);
    turn_block(a.q + b * a.q_batch + at * a.q_token + h * K, a.q_token, count, K, d.qt);
    const T *keys = a.k + b * a.k_batch + h / (a.heads / a.groups) * K;
    product<T>(keys + s.from * a.k_token, a.k_token, d.qt, BLOCK, d.scores + s.from * BLOCK, BLOCK, s.to - s.from, K, false);
    vf top[V], total[V] = {};
    for (int v = 0; v < V; v++) top[v] = all(-INFINITY);
    for (int64_t j = s.from; j < s.to; j++)
        for (int v = 0; v < V; v++) {
            float *own = d.scores + j * BLOCK + v * LANES;
            vf x = select(s.sees(j, v), load(own) * a.scale, all(-INFINITY));
            store(own, x);
            top[v] = larger(top[v], x);
        }
    for (int v = 0; v < V; v++) top[v] = select(top[v] == -INFINITY, all(0), top[v]);
    for (int64_t j = s.from; j < s.padded; j += N)
        for (int v = 0; v < V; v++) {
            vf e[2] = {};
            for (int n = 0; n < N && j + n < s.to; n++) e[n] = vexp(load(d.scores + (j + n) * BLOCK + v * LANES) - top[v]);
            total[v] += e[0] + e[1];
            pack(d.packed + j / N * BLOCK + v * LANES, e[0], e[1], T());
        }
    product<T>(d.turned + s.from, S, d.packed + s.from / N * BLOCK, BLOCK, d.across, BLOCK, K, s.padded - s.from, false);
    for (int64_t i = 0; i < count; i++) {
        float sum = total[i / LANES][i % LANES], share = sum == 0 ? 0 : 1 / sum;
        a.lse[(b * a.heads + h) * a.length + at + i] = sum == 0 ? 0 : top[i / LANES][i % LANES] + logf(sum);
        T *to = a.out + ((b * a.length + at + i) * a.heads + h) * K;
        for (int64_t k = 0; k < K; k++) put(to + k, d.across[k * BLOCK + i] * share);
    }
}

template <class T> static void back_block(const Attention<T> &a, const Bench<T> &d, int64_t b, int64_t h, int64_t at) {
    const int N = Inner<T>::NUMBERS, V = BLOCK / LANES;
    int64_t K = a.width, S = a.wide(), count = a.length - at < BLOCK ? a.length - at : BLOCK, token = a.heads * K;
    Sight s(a.first + b * a.length + at, a.end + b * a.length + at, count, N);
    const T *q = a.q + b * a.q_batch + at * a.q_token + h * K;
    int64_t here = ((b * a.length + at) * a.heads + h) * K, group = h / (a.heads / a.groups) * K;
    const T *keys = a.k + b * a.k_batch + group, *values = a.v + b * a.v_batch + group;
    turn_block(q, a.q_token, count, K, d.qt);
    pack_block(q, a.q_token, count, K, d.qp);
    turn_block(a.grad + here, token, count, K, d.gt);
    pack_block(a.grad + here, token, count, K, d.gp);
    float lse[BLOCK] = {}, lean[BLOCK] = {};
    for (int64_t i = 0; i < count; i++) {
        vf dot = {};
        for (int64_t k = 0; k < K; k += LANES) dot += load(a.grad + here + i * token + k) * load(a.out + here + i * token + k);
        lean[i] = sum(dot), lse[i] = a.lse[(b * a.heads + h) * a.length + at + i];
    }
    int64_t from = s.from, rows = s.to - s.from;
    product<T>(keys + from * a.k_token, a.k_token, d.qt, BLOCK, d.scores + from * BLOCK, BLOCK, rows, K, false);
    product<T>(values + from * a.v_token, a.v_token, d.gt, BLOCK, d.lean + from * BLOCK, BLOCK, rows, K, false);
    for (int64_t j = from; j < s.padded; j += N)
        for (int v = 0; v < V; v++) {
            vf ds[2] = {};
            for (int n = 0; n < N && j + n < s.to; n++) {
                int64_t own = (j + n) * BLOCK + v * LANES;
                vf p = vexp(load(d.scores + own) * a.scale - load(lse + v * LANES));
                p = select(s.sees(j + n, v), p, all(0));
                ds[n] = select(s.sees(j + n, v), p * (load(d.lean + own) - load(lean + v * LANES)), all(0));
                store(d.P + own, p);
                store(d.dS + own, ds[n]);
            }
            pack(d.packed + j / N * BLOCK + v * LANES, ds[0], ds[1], T());
        }
    product<T>(d.P + from * BLOCK, BLOCK, d.gp, K, d.dv + from * K, K, rows, BLOCK, true);
    product<T>(d.dS + from * BLOCK, BLOCK, d.qp, K, d.dk + from * K, K, rows, BLOCK, true);
    product<T>(d.turned + from, S, d.packed + from / N * BLOCK, BLOCK, d.across, BLOCK, K, s.padded - from, false);
    for (int64_t i = 0; i < count; i++)
        for (int64_t k = 0; k < K; k++) put(a.dq + here + i * token + k, d.across[k * BLOCK + i] * a.scale);
}

// One group of a row: all queries of its heads.
template <class T> static void attention_task(const Attention<T> &a, bool back, int64_t b, int64_t g, float *room) {
    Bench<T> d(a, room);
    int64_t K = a.width, S = a.wide(), own = a.heads / a.groups;
    if (back)
        turn_rows(a.k + b * a.k_batch + g * K, a.k_token, a.length, K, S, d.turned);
    else
        turn_rows(a.v + b * a.v_batch + g * K, a.v_token, a.length, K, S, d.turned);
    if (back) memset(d.dk, 0, S * K * sizeof(float)), memset(d.dv, 0, S * K * sizeof(float));
    for (int64_t h = g * own; h < (g + 1) * own; h++)
        for (int64_t at = 0; at < a.length; at += BLOCK) back ? back_block(a, d, b, h, at) : attend_block(a, d, b, h, at);
    for (int64_t s = 0; back && s < a.length; s++)
        for (int64_t k = 0; k < K; k += LANES) {
            int64_t to = ((b * a.length + s) * a.groups + g) * K + k;
            store(a.dk + to, load(d.dk + s * K + k) * a.scale);
            store(a.dv + to, load(d.dv + s * K + k));
        }
}

template <class T> static void attention_all(const Attention<T> &a, bool back, float *room, int64_t threads) {
    int64_t tasks = a.batch * a.groups, each = Bench<T>::numbers(a);
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int64_t thread = 0; thread < threads; thread++) {
        MatrixUnit<T> unit;
        for (int64_t n = thread; n < tasks; n += threads)
            attention_task(a, back, n / a.groups, n % a.groups, room + thread * each);
    }
}
