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
    T *projected = memory.address<T>();
    steps.slots = p.slots, steps.documents = p.documents, steps.tokens = p.tokens;
    int64_t tasks = p.documents * m.groups;
    mamba_block(s, in, out, m, steps, projected, p.turned, p.threads < tasks ? p.threads : tasks, {p.arena});
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

template <class T> static void stack(Words of_pass, const int64_t *parts, int64_t count) {
    Pass<T> p = {};
    p.x = of_pass.address<T>(), p.beside = of_pass.address<T>(), p.y = of_pass.address<T>();
    p.rows = of_pass.number(), p.width = of_pass.number();
    p.slots = of_pass.address<int64_t>(), p.documents = of_pass.number(), p.tokens = of_pass.number();
    p.places = of_pass.address<int64_t>(), p.starts = of_pass.address<int64_t>();
    p.queries = of_pass.address<int64_t>(), p.before = of_pass.address<int64_t>();
    p.sequences = of_pass.number(), p.deepest = of_pass.number(), p.page = of_pass.number(), p.shift = of_pass.number();
    p.threads = of_pass.number();
    p.turned = of_pass.address<uint32_t>(), p.arena = of_pass.address<char>();
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
