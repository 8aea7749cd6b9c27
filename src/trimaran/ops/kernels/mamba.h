// A few tokens of running documents through a Mamba-2 mixer, between its two projections: short convolution and SiLU,
// step size, state update, D x, gated norm. A (document, group) is a task of its own: heads, B, C and the norm of a
// group meet no other group's numbers.
#pragma once
#include "norm.h"

template <class T> struct Mamba {
    int64_t heads, width, groups, size, taps;  // H, P of a head, G, N, W
    const T *conv_weight, *conv_bias;          // [C, W], [C] or null
    const float *A_log, *D, *dt_bias;          // [H]
    const T *norm_weight;                      // [H P]
    float eps;

    int64_t inner() const { return heads * width; }
    int64_t channels() const { return inner() + 2 * groups * size; }
    int64_t projected() const { return inner() + channels() + heads; }
};

template <class T> struct Steps {
    const T *projected;      // [S K, z | x B C | dt]
    T *out;                  // [S K, H P]
    T *tail;                 // [slots, W-1, C]
    float *state;            // [slots, H, P, N]
    int64_t tail_stride, state_stride;
    const int64_t *slots;    // of the S documents; null: 0, 1, 2 ...
    float *after;            // on trial: the state after each token [K, S, H, P, N], and the slot's stays as it is
    int64_t documents, tokens;
};

// Four taps of sixteen channels, whose filters lie side by side: [c][i] -> tap i of all.
template <class T> static inline void taps_apart(const T *weight, vf *w) {
#ifdef __AVX512F__
    vf a = load(weight), b = load(weight + 16), c = load(weight + 32), d = load(weight + 48);
    vf ab = __builtin_shufflevector(a, b, 0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
    vf cd = __builtin_shufflevector(c, d, 0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
    vf AB = __builtin_shufflevector(a, b, 2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31);
    vf CD = __builtin_shufflevector(c, d, 2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31);
    w[0] = __builtin_shufflevector(ab, cd, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    w[1] = __builtin_shufflevector(ab, cd, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    w[2] = __builtin_shufflevector(AB, CD, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    w[3] = __builtin_shufflevector(AB, CD, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
#else
    for (int i = 0; i < 4 * LANES; i++) w[i % 4][i / 4] = widen(weight[i]);
#endif
}

// Channels [from, to) of token t: what a tap sees lies in the tail or among the tokens before.
template <class T>
static void convolve(const Mamba<T> &m, const T *tail, const T *inputs, int64_t stride, int64_t t, int64_t from,
                     int64_t to, float *out) {
    auto seen = [&](int64_t i) {
        int64_t at = t + i - (m.taps - 1);
        return at < 0 ? tail + (at + m.taps - 1) * m.channels() : inputs + at * stride;
    };
    int64_t c = from;
    for (; m.taps == 4 && c + LANES <= to; c += LANES) {
        vf u = m.conv_bias ? load(m.conv_bias + c) : (vf){}, w[4];
        taps_apart(m.conv_weight + c * 4, w);
        for (int i = 0; i < 4; i++) u += w[i] * load(seen(i) + c);
        store(out + (c - from), u);
    }
    for (; c < to; c++) {
        float u = m.conv_bias ? widen(m.conv_bias[c]) : 0;
        for (int64_t i = 0; i < m.taps; i++) u += widen(m.conv_weight[c * m.taps + i]) * widen(seen(i)[c]);
        out[c - from] = u;
    }
    int64_t count = to - from, wide = count / LANES * LANES;
    T rounded[LANES];
    for (int64_t i = 0; i < wide; i += LANES) {
        store(rounded, vsilu(load(out + i)));
        store(out + i, load(rounded));
    }
    for (int64_t i = wide; i < count; i++) {
        put(rounded, out[i] / (1 + expf(-out[i])));
        out[i] = widen(rounded[0]);
    }
}

// One head: state = decay state + (dt x) B^T, y = state C + D x. size is a multiple of the lanes.
static inline void update(const float *before, float *after, const float *x, const float *B, const float *C, float *y,
                          float dt, float decay, float D, int64_t width, int64_t size) {
    vf totals[LANES];
    float sixteen[LANES];
    for (int64_t p = 0; p < width; p++) {
        vf total = {};
        float write = dt * x[p];
        for (int64_t n = 0; n < size; n += LANES) {
            vf s = load(before + p * size + n) * decay + write * load(B + n);
            store(after + p * size + n, s);
            total += s * load(C + n);
        }
        totals[p % LANES] = total;
        if (p % LANES < LANES - 1 && p + 1 < width) continue;
        int64_t first = p / LANES * LANES;
        for (int64_t i = p + 1 - first; i < LANES; i++) totals[i] = all(0.0f);
        store(sixteen, sums(totals));
        for (int64_t i = first; i <= p; i++) y[i] = sixteen[i - first] + D * x[i];
    }
}

static inline float softplus(float x) { return x > 20 ? x : log1pf(expf(x)); }

// scratch: of this thread, (heads per group) P + 2 N + (heads per group) P numbers
template <class T>
static void mamba_task(const Mamba<T> &m, const Steps<T> &s, int64_t document, int64_t g, float *scratch) {
    int64_t own = m.heads / m.groups, part = own * m.width, stride = m.projected();
    int64_t slot = s.slots ? s.slots[document] : document;
    T *tail = s.tail + slot * s.tail_stride;
    float *state = s.state + slot * s.state_stride;
    float *x = scratch, *B = x + part, *C = B + m.size, *y = C + m.size;
    const T *first = s.projected + document * s.tokens * stride, *inputs = first + m.inner();
    int64_t at_B = m.inner() + g * m.size, at_C = at_B + m.groups * m.size, each = m.width * m.size;
    for (int64_t t = 0; t < s.tokens; t++) {
        const T *row = first + t * stride;
        convolve(m, tail, inputs, stride, t, g * part, (g + 1) * part, x);
        convolve(m, tail, inputs, stride, t, at_B, at_B + m.size, B);
        convolve(m, tail, inputs, stride, t, at_C, at_C + m.size, C);
        for (int64_t i = 0; i < own; i++) {
            int64_t h = g * own + i, place = h * each;
            float dt = softplus(widen(row[m.inner() + m.channels() + h]) + m.dt_bias[h]);
            float decay = expf(-dt * expf(m.A_log[h]));
            float *after = state + place, *before = after;
            if (s.after) {
                after = s.after + (t * s.documents + document) * m.heads * each + place;
                if (t) before = after - s.documents * m.heads * each;
            }
            update(before, after, x + i * m.width, B, C, y + i * m.width, dt, decay, m.D[h], m.width, m.size);
        }
        gated_norm_slice(y, row + g * part, m.norm_weight + g * part,
                         s.out + (document * s.tokens + t) * m.inner() + g * part, part, m.eps);
    }
    if (s.after) return;
    // The tail moves on: the last W-1 of itself and the tokens, for this task's channels.
    int64_t from[3] = {g * part, at_B, at_C}, count[3] = {part, m.size, m.size};
    for (int64_t i = 0; i < m.taps - 1; i++) {
        int64_t at = s.tokens + i - (m.taps - 1);
        for (int r = 0; r < 3; r++) {
            const T *source = at < 0 ? tail + (at + m.taps - 1) * m.channels() : inputs + at * stride;
            memcpy(tail + i * m.channels() + from[r], source + from[r], count[r] * sizeof(T));
        }
    }
}

// scratch: 2 (H P / G + N) numbers for each thread
template <class T> static void mamba(const Mamba<T> &m, const Steps<T> &s, float *scratch, int64_t threads) {
    int64_t tasks = s.documents * m.groups, each = 2 * (m.inner() / m.groups + m.size);
    int64_t share = (tasks + threads - 1) / threads;
#pragma omp parallel for schedule(static, 1) if (tasks * s.tokens * m.inner() * m.size > 1 << 16)
    for (int64_t n = 0; n < threads; n++)
        for (int64_t task = n * share; task < (n + 1) * share && task < tasks; task++)
            mamba_task(m, s, task / m.groups, task % m.groups, scratch + n * each);
}
