// A few queries of each sequence over the keys that it remembers, wherever they lie in a pool: a table says where the
// pages of a sequence begin. Softmax runs along blocks of sixteen keys with a running maximum; a long sequence is cut
// into pieces whose results are joined, so that one sequence can keep several threads busy.
#pragma once
#include "lanes.h"

template <class T> struct Attend {
    const T *q, *keys, *values;  // [queries, H, K], [places, G, K] twice
    T *out;                      // [queries, H, K]
    const int64_t *starts;       // [sequences, deepest]: the place where each page begins
    const int64_t *queries;      // [sequences + 1]: where each sequence's queries begin
    const int64_t *before;       // [sequences]: keys before the first of them
    int64_t sequences, deepest, page, shift, heads, groups, width, window;  // window 0: none
    float scale;
    int64_t pieces;  // of each sequence

    int64_t shared() const { return heads / groups; }
    int64_t place(int64_t s, int64_t key) const {
        int64_t at = key + shift;
        return (starts[s * deepest + at / page] + at % page) * groups * width;
    }
};

// One piece's result for one row: sum of weights, their largest exponent, weighted values [width].
struct Partial {
    float *top, *total, *values;
};

static inline vf dot(const float *a, const float *b, int64_t width) {
    vf total = {};
    for (int64_t i = 0; i < width; i += LANES) total += load(a + i) * load(b + i);
    return total;
}
static inline vf dot(const bf16 *a, const bf16 *b, int64_t width) {
    vf total = {};
    int64_t i = 0;
    for (; i + 2 * LANES <= width; i += 2 * LANES) {
        vu x, y;
        memcpy(&x, a + i, sizeof x);
        memcpy(&y, b + i, sizeof y);
        total = dot2(total, x, y);
    }
    for (; i < width; i += LANES) total += load(a + i) * load(b + i);
    return total;
}

// Rows (query, head of the group) over up to sixteen keys, of which row r sees those from low[r] to below high[r].
template <class T>
static void attend_block(const Attend<T> &a, const T *const *q, const T *const *keys, const T *const *values,
                         int64_t first, int64_t count, const int64_t *low, const int64_t *high, int64_t rows, Partial to) {
    for (int64_t r = 0; r < rows; r++) {
        vf products[LANES] = {};
        int64_t begin = low[r] > first ? low[r] - first : 0, end = high[r] - first < count ? high[r] - first : count;
        for (int64_t j = begin; j < end; j++) products[j] = dot(q[r], keys[j], a.width);
        vf scores = sums(products) * a.scale;
        float top = to.top[r];
        for (int64_t j = 0; j < LANES; j++) {
            if (j < begin || j >= end) scores[j] = -INFINITY;
            else top = scores[j] > top || scores[j] != scores[j] ? scores[j] : top;
        }
        if (top == -INFINITY) continue;
        vf weights = vexp(scores - top);
        const T *seen[LANES];  // what has weight 0 is not read: it may be memory that nobody has written
        float weight[LANES];
        int64_t some = 0;
        for (int64_t j = 0; j < count; j++)
            if (weights[j] != 0) weight[some] = weights[j], seen[some++] = values[j];
        float fade = expf(to.top[r] - top), *out = to.values + r * a.width;
        to.top[r] = top;
        to.total[r] = to.total[r] * fade + sum(weights);
        for (int64_t i = 0; i < a.width; i += LANES) {
            vf acc = load(out + i) * fade;
            for (int64_t j = 0; j < some; j++) acc += weight[j] * load(seen[j] + i);
            store(out + i, acc);
        }
    }
}

template <class T>
static void attend_piece(const Attend<T> &a, int64_t s, int64_t g, int64_t piece, Partial to) {
    int64_t from = a.queries[s], count = a.queries[s + 1] - from, rows = count * a.shared();
    const T *q[64], *keys[LANES], *values[LANES];
    int64_t low[64], high[64];
    for (int64_t r = 0; r < rows; r++) {
        int64_t t = r / a.shared(), head = g * a.shared() + r % a.shared(), end = a.before[s] + t + 1;
        q[r] = a.q + ((from + t) * a.heads + head) * a.width;
        high[r] = end;
        low[r] = a.window && end > a.window ? end - a.window : 0;
        to.top[r] = -INFINITY;
        to.total[r] = 0;
        memset(to.values + r * a.width, 0, a.width * sizeof(float));
    }
    int64_t begin = low[0], total = high[rows - 1] - begin, each = (total + a.pieces - 1) / a.pieces;
    int64_t stop = begin + (piece + 1) * each < high[rows - 1] ? begin + (piece + 1) * each : high[rows - 1];
    for (int64_t key = begin + piece * each; key < stop; key += LANES) {
        int64_t block = stop - key < LANES ? stop - key : LANES;
        for (int64_t j = 0; j < block; j++) {
            int64_t at = a.place(s, key + j) + g * a.width;
            keys[j] = a.keys + at;
            values[j] = a.values + at;
        }
        attend_block(a, q, keys, values, key, block, low, high, rows, to);
    }
}

// scratch: for each (sequence, group, piece) 64 (2 + width) numbers
template <class T> static void attend(const Attend<T> &a, float *scratch) {
    int64_t each = 64 * (2 + a.width), tasks = a.sequences * a.groups;
    auto partial = [&](int64_t task, int64_t piece) {
        float *at = scratch + (task * a.pieces + piece) * each;
        return Partial{at, at + 64, at + 128};
    };
#pragma omp parallel for schedule(dynamic, 1) if (tasks * a.pieces > 1)
    for (int64_t n = 0; n < tasks * a.pieces; n++) {
        int64_t task = n / a.pieces;
        attend_piece(a, task / a.groups, task % a.groups, n % a.pieces, partial(task, n % a.pieces));
    }
    for (int64_t task = 0; task < tasks; task++) {
        int64_t s = task / a.groups, g = task % a.groups, from = a.queries[s];
        for (int64_t r = 0; r < (a.queries[s + 1] - from) * a.shared(); r++) {
            float top = -INFINITY, total = 0;
            for (int64_t p = 0; p < a.pieces; p++) {
                float other = partial(task, p).top[r];
                top = other > top || other != other ? other : top;
            }
            float part[64];
            for (int64_t p = 0; p < a.pieces; p++) {
                Partial one = partial(task, p);
                part[p] = one.total[r] == 0 ? 0 : expf(one.top[r] - top);
                total += one.total[r] * part[p];
            }
            T *out = a.out + ((from + r / a.shared()) * a.heads + g * a.shared() + r % a.shared()) * a.width;
            for (int64_t i = 0; i < a.width; i += LANES) {
                vf acc = {};
                for (int64_t p = 0; p < a.pieces; p++)
                    if (part[p] != 0) acc += part[p] * load(partial(task, p).values + r * a.width + i);
                store(out + i, acc / total);
            }
        }
    }
}
