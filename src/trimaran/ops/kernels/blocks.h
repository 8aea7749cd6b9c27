// Whole residual blocks for a few tokens, y = x + mixer(norm(x)): norm, maps and what lies between them. y may be x.
// Roundings stand where the steps' tensors would have been rounded.
#pragma once
#include "attention.h"
#include "experts.h"
#include "mamba.h"

// A piece of scratch after the other.
struct Arena {
    char *at;
    template <class T> T *take(int64_t count) {
        T *own = (T *)at;
        at += (count * sizeof(T) + 63) / 64 * 64;
        return own;
    }
};

// The block's input and its norm; `turned` as linear wants it.
template <class T> struct Stream {
    const T *x, *norm;
    T *y;
    int64_t rows, width;
    float eps;

    T *normed(Arena &arena) const {
        T *out = arena.take<T>(rows * width);
        rms_norm(x, norm, out, rows, width, eps);
        return out;
    }
    void add(const T *more) const {
        for (int64_t i = 0; i < rows * width; i += LANES) {
            if (i + LANES <= rows * width)
                store(y + i, load(x + i) + load(more + i));
            else
                for (int64_t j = i; j < rows * width; j++) put(y + j, widen(x[j]) + widen(more[j]));
        }
    }
};

// One map of x: y = x weight^T, and relu(y)^2 where it is squared.
template <class T> struct Map {
    const T *weight;
    T *y;
    int64_t outputs;
    bool squared;
};

// Up to three maps of the same rows, begun together.
template <class T, int N>
static void maps(const T *x, const Map<T> (&some)[N], int64_t rows, int64_t inner, uint32_t *turned) {
    const T *from[MOST_ROWS];
    T *to[N][MOST_ROWS];
    Product<T, T> products[N];
    int64_t outputs[N];
    for (int64_t r = 0; r < rows; r++) from[r] = x + r * inner;
    for (int n = 0; n < N; n++) {
        for (int64_t r = 0; r < rows; r++) to[n][r] = some[n].y + r * some[n].outputs;
        products[n] = {from, some[n].weight, to[n], rows, inner, some[n].squared, prefetched<T>(some[n].outputs * inner)};
        outputs[n] = some[n].outputs;
    }
    linears(products, outputs, N, turned);
}

template <class T>
static void map(const T *x, const T *weight, T *y, int64_t rows, int64_t inner, int64_t outputs, uint32_t *turned, bool squared = false) {
    maps(x, {{weight, y, outputs, squared}}, rows, inner, turned);
}

template <class T> static void ffn_block(const Stream<T> &s, const T *up, const T *down, int64_t ffn, uint32_t *turned, Arena arena) {
    T *normed = s.normed(arena), *hidden = arena.take<T>(s.rows * ffn), *out = arena.take<T>(s.rows * s.width);
    map(normed, up, hidden, s.rows, s.width, ffn, turned, true);
    map(hidden, down, out, s.rows, ffn, s.width, turned);
    s.add(out);
}

// `steps.projected` and `steps.out` are filled here. window: null, or room for each document's tail with the inputs of
// the convolution behind it [documents, taps - 1 + tokens, channels], for a trial to be taken back to.
template <class T>
static void mamba_block(const Stream<T> &s, const T *in, const T *out, const Mamba<T> &m, Steps<T> steps, T *window,
                        uint32_t *turned, int64_t threads, Arena arena) {
    T *normed = s.normed(arena), *mixed = arena.take<T>(s.rows * m.inner()), *back = arena.take<T>(s.rows * s.width);
    T *projected = arena.take<T>(s.rows * m.projected());
    float *scratch = arena.take<float>(threads * 2 * (m.inner() / m.groups + m.size));
    map(normed, in, projected, s.rows, s.width, m.projected(), turned);
    for (int64_t d = 0, wide = m.channels(); window && d < steps.documents; d++) {
        memcpy(window, steps.tail + (steps.slots ? steps.slots[d] : d) * steps.tail_stride, (m.taps - 1) * wide * sizeof(T));
        window += (m.taps - 1) * wide;
        for (int64_t t = 0; t < steps.tokens; t++, window += wide)
            memcpy(window, projected + (d * steps.tokens + t) * m.projected() + m.inner(), wide * sizeof(T));
    }
    steps.projected = projected;
    steps.out = mixed;
    mamba(m, steps, scratch, threads);
    map(mixed, out, back, s.rows, m.inner(), s.width, turned);
    s.add(back);
}

// places: where each row's new key and value go in the pools, which `a.keys` and `a.values` are.
template <class T>
static void attention_block(const Stream<T> &s, const T *wq, const T *wk, const T *wv, const T *wo, const int64_t *places,
                            Attend<T> a, uint32_t *turned, Arena arena) {
    int64_t wide = a.heads * a.width, narrow = a.groups * a.width;
    T *normed = s.normed(arena), *q = arena.take<T>(s.rows * wide), *k = arena.take<T>(s.rows * narrow);
    T *v = arena.take<T>(s.rows * narrow), *seen = arena.take<T>(s.rows * wide), *back = arena.take<T>(s.rows * s.width);
    float *scratch = arena.take<float>(a.sequences * a.groups * a.pieces * 64 * (2 + a.width));
    maps(normed, {{wq, q, wide, false}, {wk, k, narrow, false}, {wv, v, narrow, false}}, s.rows, s.width, turned);
    for (int64_t r = 0; r < s.rows; r++) {
        memcpy((T *)a.keys + places[r] * narrow, k + r * narrow, narrow * sizeof(T));
        memcpy((T *)a.values + places[r] * narrow, v + r * narrow, narrow * sizeof(T));
    }
    a.q = q;
    a.out = seen;
    attend(a, scratch);
    map(seen, wo, back, s.rows, wide, s.width, turned);
    s.add(back);
}

// null where a model has none: `into` and `from` a latent space, the shared expert.
template <class T> struct MoE {
    const T *router;
    const float *bias;
    const T *into, *from, *up, *down, *shared_up, *shared_down;
    int64_t count, k, latent, ffn, shared;
    int normalise;
    float factor;
};

template <class T> static void moe_block(const Stream<T> &s, const MoE<T> &m, uint32_t *turned, Arena arena) {
    T *normed = s.normed(arena), *latent = normed, *hidden = arena.take<T>(s.rows * m.k * m.ffn);
    T *routed = arena.take<T>(s.rows * m.latent), *back = routed;
    float *scores = arena.take<float>(s.rows * m.count), *weights = arena.take<float>(s.rows * m.k);
    float *fed = arena.take<float>(s.rows * m.k * m.latent), *sum = arena.take<float>(s.rows * m.latent);
    int64_t *ids = arena.take<int64_t>(s.rows * m.k);
    route(normed, m.router, m.bias, s.rows, s.width, m.count, m.k, m.normalise, m.factor, scores, ids, weights);
    T *between = m.shared_up ? arena.take<T>(s.rows * m.shared) : nullptr;
    if (m.into) latent = arena.take<T>(s.rows * m.latent);
    Map<T> into = {m.into, latent, m.latent, false}, shared = {m.shared_up, between, m.shared, true};
    if (m.into && m.shared_up) maps(normed, {into, shared}, s.rows, s.width, turned);
    else if (m.into) maps(normed, {into}, s.rows, s.width, turned);
    else if (m.shared_up) maps(normed, {shared}, s.rows, s.width, turned);
    experts(latent, ids, weights, m.up, m.down, sum, s.rows, m.k, m.count, m.latent, m.ffn, hidden, fed);
    for (int64_t i = 0; i < s.rows * m.latent; i++) put(routed + i, sum[i]);
    if (m.from) {
        back = arena.take<T>(s.rows * s.width);
        map(routed, m.from, back, s.rows, m.latent, s.width, turned);
    }
    if (m.shared_up) {
        T *own = arena.take<T>(s.rows * s.width);
        map(between, m.shared_down, own, s.rows, m.shared, s.width, turned);
        for (int64_t i = 0; i < s.rows * s.width; i++) put(back + i, widen(back[i]) + widen(own[i]));
    }
    s.add(back);
}
