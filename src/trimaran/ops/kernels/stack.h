// A stack of residual blocks for a few tokens in one call. Python hands over 64-bit words: one list for the pass, and
// for each part of the stack WORDS of them, in the order in which the functions below read them (ops/native_stack.py).
#pragma once
#include "blocks.h"

enum Kind { FFN, MAMBA, ATTENTION, MOE, JOIN, NORM };
static const int64_t WORDS = 32, MEMORY = 24;  // of a part; the first of those that a pass brings

struct Words {
    const int64_t *at;
    int64_t number() { return *at++; }
    float real() {
        double value;
        memcpy(&value, at++, sizeof value);
        return (float)value;
    }
    template <class P> P *address() { return (P *)*at++; }
};

// What all parts share: the stream, whose documents these are, where attention's keys lie, and scratch.
template <class T> struct Pass {
    const T *x, *beside;  // beside: what a JOIN reads next to x
    T *y;
    int64_t rows, width;
    const int64_t *slots;
    int64_t documents, tokens;
    const int64_t *places, *starts, *queries, *before;
    int64_t sequences, deepest, page, shift;
    int64_t threads;
    uint32_t *turned;
    char *arena;
};

template <class T> static void ffn_part(const Stream<T> &s, Words w, const Pass<T> &p) {
    const T *up = w.address<T>(), *down = w.address<T>();
    ffn_block(s, up, down, w.number(), p.turned, {p.arena});
}

template <class T> static void mamba_part(const Stream<T> &s, Words w, Words memory, const Pass<T> &p) {
    const T *in = w.address<T>(), *out = w.address<T>();
    Mamba<T> m = {};
    m.heads = w.number(), m.width = w.number(), m.groups = w.number(), m.size = w.number(), m.taps = w.number();
    m.conv_weight = w.address<T>(), m.conv_bias = w.address<T>();
    m.A_log = w.address<float>(), m.D = w.address<float>(), m.dt_bias = w.address<float>();
    m.norm_weight = w.address<T>(), m.eps = w.real();
    Steps<T> steps = {};
    steps.tail = memory.address<T>(), steps.tail_stride = memory.number();
    steps.state = memory.address<float>(), steps.state_stride = memory.number();
    steps.after = memory.address<float>();
    T *window = memory.address<T>();
    steps.slots = p.slots, steps.documents = p.documents, steps.tokens = p.tokens;
    int64_t tasks = p.documents * m.groups;
    mamba_block(s, in, out, m, steps, window, p.turned, p.threads < tasks ? p.threads : tasks, {p.arena});
}

template <class T> static void attention_part(const Stream<T> &s, Words w, Words memory, const Pass<T> &p) {
    const T *q = w.address<T>(), *k = w.address<T>(), *v = w.address<T>(), *o = w.address<T>();
    Attend<T> a = {};
    a.heads = w.number(), a.groups = w.number(), a.width = w.number(), a.window = w.number(), a.scale = w.real();
    a.keys = memory.address<T>(), a.values = memory.address<T>(), a.pieces = memory.number();
    a.starts = p.starts, a.queries = p.queries, a.before = p.before;
    a.sequences = p.sequences, a.deepest = p.deepest, a.page = p.page, a.shift = p.shift;
    attention_block(s, q, k, v, o, p.places, a, p.turned, {p.arena});
}

template <class T> static void moe_part(const Stream<T> &s, Words w, const Pass<T> &p) {
    MoE<T> m = {};
    m.router = w.address<T>(), m.bias = w.address<float>();
    m.into = w.address<T>(), m.from = w.address<T>(), m.up = w.address<T>(), m.down = w.address<T>();
    m.shared_up = w.address<T>(), m.shared_down = w.address<T>();
    m.count = w.number(), m.k = w.number(), m.latent = w.number(), m.ffn = w.number(), m.shared = w.number();
    m.normalise = (int)w.number(), m.factor = w.real();
    moe_block(s, m, p.turned, {p.arena});
}

// y = W [norm(x) ; norm'(beside)]
template <class T> static void join_part(const Stream<T> &s, Words w, const Pass<T> &p) {
    const T *norm = w.address<T>();
    float eps = w.real();
    Arena arena = {p.arena};
    T *joined = arena.take<T>(2 * s.rows * s.width);
    for (int64_t r = 0; r < s.rows; r++) {
        rms_norm(s.x + r * s.width, s.norm, joined + 2 * r * s.width, 1, s.width, s.eps);
        rms_norm(p.beside + r * s.width, norm, joined + (2 * r + 1) * s.width, 1, s.width, eps);
    }
    map(joined, w.address<T>(), s.y, s.rows, 2 * s.width, s.width, p.turned);
}

template <class T> static Pass<T> read_pass(Words w) {
    Pass<T> p = {};
    p.x = w.address<T>(), p.beside = w.address<T>(), p.y = w.address<T>();
    p.rows = w.number(), p.width = w.number();
    p.slots = w.address<int64_t>(), p.documents = w.number(), p.tokens = w.number();
    p.places = w.address<int64_t>(), p.starts = w.address<int64_t>();
    p.queries = w.address<int64_t>(), p.before = w.address<int64_t>();
    p.sequences = w.number(), p.deepest = w.number(), p.page = w.number(), p.shift = w.number();
    p.threads = w.number();
    p.turned = w.address<uint32_t>(), p.arena = w.address<char>();
    return p;
}

template <class T> static void stack(Pass<T> p, const int64_t *parts, int64_t count) {
    for (int64_t i = 0; i < count; i++, p.x = p.y) {
        Words w = {parts + i * WORDS}, memory = {parts + i * WORDS + MEMORY};
        Kind kind = (Kind)w.number();
        const T *norm = w.address<T>();
        Stream<T> s = {p.x, norm, p.y, p.rows, p.width, w.real()};
        switch (kind) {
        case FFN: ffn_part(s, w, p); break;
        case MAMBA: mamba_part(s, w, memory, p); break;
        case ATTENTION: attention_part(s, w, memory, p); break;
        case MOE: moe_part(s, w, p); break;
        case JOIN: join_part(s, w, p); break;
        case NORM: rms_norm(s.x, s.norm, s.y, s.rows, s.width, s.eps); break;
        }
    }
}

// The first of the largest; -1 where a model gave no numbers.
template <class T> static int64_t likeliest(const T *logits, int64_t ids) {
    int64_t best = 0;
    for (int64_t i = 0; i < ids; i++) {
        float own = widen(logits[i]);
        if (!(own - own == 0)) return -1;
        if (own > widen(logits[best])) best = i;
    }
    return best;
}

// Greedy drafts of a draft block. First it reads pairs, hidden vectors [pairs, width] (p.beside) and the tokens after
// them, some of each sequence; then it goes on alone: from a sequence's newest hidden vector to its likeliest token, from
// both to the next hidden vector, `depth` tokens. p: places, queries and before are those of all that is read, the pairs
// and depth - 1 drafts of each sequence; x and y have room for the larger of the two passes.
template <class T> static void drafts(Pass<T> p, const int64_t *parts, int64_t count, Words w) {
    const T *embeddings = w.address<T>(), *head = w.address<T>();
    int64_t ids = w.number(), depth = w.number(), rows = p.sequences, pairs = 0;
    const int64_t *following = w.address<int64_t>(), *places = p.places, *begins = p.queries;
    T *newest = w.address<T>(), *logits = w.address<T>(), *x = (T *)p.x;
    int64_t *tokens = w.address<int64_t>(), own[MOST_ROWS], queries[MOST_ROWS + 1] = {}, before[MOST_ROWS];
    for (int64_t r = 0; r < rows; r++) {
        int64_t due = begins[r + 1] - begins[r] - (depth - 1);
        for (int64_t j = 0; j < due; j++) own[pairs++] = places[begins[r] + j];
        queries[r + 1] = pairs;
        before[r] = p.before[r];
    }
    auto embed = [&](int64_t row, int64_t token) { memcpy(x + row * p.width, embeddings + token * p.width, p.width * sizeof(T)); };
    for (int64_t n = 0; n < pairs; n++) embed(n, following[n]);
    p.places = own, p.queries = queries, p.before = before, p.rows = pairs;
    stack(p, parts, count);
    for (int64_t r = 0; r < rows; r++) {
        memcpy(newest + r * p.width, p.y + (queries[r + 1] - 1) * p.width, p.width * sizeof(T));
        before[r] += queries[r + 1] - queries[r];
    }
    for (int64_t r = 0; r <= rows; r++) queries[r] = r;
    p.beside = newest, p.rows = rows;
    for (int64_t d = 0;; d++, p.beside = p.y) {
        map(p.beside, head, logits, rows, p.width, ids, p.turned);
        for (int64_t r = 0; r < rows; r++) {
            tokens[r * depth + d] = likeliest(logits + r * ids, ids);
            if (tokens[r * depth + d] < 0) return;
        }
        if (d + 1 == depth) return;
        for (int64_t r = 0; r < rows; r++) {
            embed(r, tokens[r * depth + d]);
            own[r] = places[begins[r + 1] - (depth - 1) + d];
        }
        stack(p, parts, count);
        for (int64_t r = 0; r < rows; r++) before[r]++;
    }
}

// Ends a trial in all layers of a stack: each document's state becomes that after the tokens that stay, its tail what
// the convolution saw before the next. words, of each layer: tail, its stride, state, its stride, window, after.
template <class T>
static void keep(Words w, int64_t layers, const int64_t *slots, const int64_t *kept, int64_t documents, int64_t tokens,
                 int64_t before, int64_t channels, int64_t numbers) {
    for (int64_t layer = 0; layer < layers; layer++) {
        T *tail = w.address<T>();
        int64_t tail_stride = w.number();
        float *state = w.address<float>();
        int64_t state_stride = w.number();
        const T *window = w.address<T>();
        const float *after = w.address<float>();
        for (int64_t d = 0; d < documents; d++) {
            int64_t slot = slots ? slots[d] : d;
            if (!kept[d]) continue;
            memcpy(tail + slot * tail_stride, window + (d * (before + tokens) + kept[d]) * channels, before * channels * sizeof(T));
            memcpy(state + slot * state_stride, after + ((kept[d] - 1) * documents + d) * numbers, numbers * sizeof(float));
        }
    }
}
