// y = x W^T for few rows: what decoding spends its time on. Weights are read once, in the order they lie in memory.
//
//   up to 8 rows   rows of W against rows of x, a register of the inner axis at a time
//   more           x turned once, so that lanes are rows of x; every number of W is broadcast to them, or the matrix unit
//                  multiplies tiles of both
//
// `rows` points at each row of x, so that experts read their tokens where they lie.
#pragma once
#include "matrix.h"

static const int MOST_ROWS = 64;
static const int SIDE = LANES / 4, FEW = 8, FEW_TILED = 4, COLUMNS = 2 * LANES;
// Bytes of W between use and prefetch: memory is slower than the products. A small W comes from a cache, and what lies
// behind it would be fetched for nothing.
static const int64_t AHEAD = 48 << 10, SMALL = 1 << 19;

// What the two number formats do differently: fp32 steps over one number of the inner axis, bf16 over a pair.
template <class T> struct Inner;
template <> struct Inner<float> {
    static const int NUMBERS = 1;
    static inline vf step(vf acc, const float *a, const float *b) { return acc + load(a) * load(b); }
    static inline vf spread(vf acc, const float *w, const uint32_t *x) {
        vf lanes;
        memcpy(&lanes, x, sizeof lanes);
        return acc + *w * lanes;
    }
};
template <> struct Inner<bf16> {
    static const int NUMBERS = 2;
    static inline vf step(vf acc, const bf16 *a, const bf16 *b) {
        vu x, y;
        memcpy(&x, a, sizeof x);
        memcpy(&y, b, sizeof y);
        return dot2(acc, x, y);
    }
    static inline vf spread(vf acc, const bf16 *w, const uint32_t *x) {
        vu lanes;
        uint32_t pair;
        memcpy(&lanes, x, sizeof lanes);
        memcpy(&pair, w, sizeof pair);
        return dot2(acc, pair - (vu){}, lanes);
    }
};

static inline vf vrelu2(vf x) { return select(x != x, x, select(x > 0, x * x, all(0))); }
static inline float relu2(float x) { return x != x ? x : x > 0 ? x * x : 0; }

template <class T> static inline int64_t prefetched(int64_t numbers) {
    return numbers * (int64_t)sizeof(T) > SMALL ? AHEAD : 0;
}

template <class T, class Out> struct Product {
    const T *const *rows;  // of x, `inner` numbers each
    const T *weight;       // [outputs, inner]
    Out *const *out;       // a row per row of x
    int64_t count, inner;
    bool squared;        // relu(y)^2
    int64_t ahead = 0;   // bytes, 0: no prefetch

    void emit(int64_t row, int64_t column, float value) const {
        put(out[row] + column, value);  // rounded first, as where the square is a step of its own
        if (squared) put(out[row] + column, relu2(widen(out[row][column])));
    }

    template <int R, int W> void dots(int64_t row, int64_t column) const {
        const int STEP = LANES * Inner<T>::NUMBERS;
        vf acc[R][W] = {};
        int64_t k = 0;
        for (; k + STEP <= inner; k += STEP)
            for (int w = 0; w < W; w++) {
                if (ahead) __builtin_prefetch((const char *)(weight + (column + w) * inner + k) + ahead, 0, 2);
                for (int r = 0; r < R; r++)
                    acc[r][w] = Inner<T>::step(acc[r][w], rows[row + r] + k, weight + (column + w) * inner + k);
            }
        for (int r = 0; r < R; r++)
            for (int w = 0; w < W; w++) {
                float total = sum(acc[r][w]);
                for (int64_t i = k; i < inner; i++)
                    total += widen(rows[row + r][i]) * widen(weight[(column + w) * inner + i]);
                emit(row + r, column + w, total);
            }
    }

    // Columns whose products with R rows are summed up together.
    template <int R> static constexpr int wide() { return R == 1 ? LANES : R == 2 ? LANES / 2 : LANES / 4; }

    // Of R rows and so many columns, W at a time.
    template <int R, int W> void together(int64_t row, int64_t column) const {
        const int STEP = LANES * Inner<T>::NUMBERS, WIDE = wide<R>();
        vf acc[LANES] = {};
        for (int g = 0; g < WIDE; g += W) {
            const T *from = weight + (column + g) * inner;
            vf own[R][W] = {};
            for (int64_t k = 0; k < inner; k += STEP)
                for (int w = 0; w < W; w++) {
                    if (ahead) __builtin_prefetch((const char *)(from + w * inner + k) + ahead, 0, 2);
                    for (int r = 0; r < R; r++) own[r][w] = Inner<T>::step(own[r][w], rows[row + r] + k, from + w * inner + k);
                }
            for (int r = 0; r < R; r++)
                for (int w = 0; w < W; w++) acc[r * WIDE + g + w] = own[r][w];
        }
        vf total = sums(acc);
        Out rounded[LANES];  // first, as where the square is a step of its own
        store(rounded, total);
        if (squared) store(rounded, vrelu2(load(rounded)));
        for (int r = 0; r < R; r++) memcpy(out[row + r] + column, rounded + r * WIDE, WIDE * sizeof(Out));
    }

    // What a single row reads from memory is read in the order in which it lies there, which is a twentieth quicker; else in
    // as many rows as keep the products busy.
    template <int R> void across(int64_t row, int64_t from, int64_t to) const {
        const int WIDE = wide<R>();
        int64_t column = from;
        if (inner % (LANES * Inner<T>::NUMBERS) == 0)
            for (; column + WIDE <= to; column += WIDE)
                ahead && R == 1 ? together<R, 1>(row, column) : together<R, R < 3 ? 4 : SIDE>(row, column);
        for (; column + SIDE <= to; column += SIDE) dots<R, SIDE>(row, column);
        for (; column < to; column++) dots<R, 1>(row, column);
    }

    // Rows [first, first + taken) as lanes, for steps [from, to) of the inner axis: turned[step][lane].
    void turn(int64_t first, int64_t taken, int64_t lanes, int64_t from, int64_t to, uint32_t *turned) const {
        for (int64_t k = from; k < to; k++)
            for (int64_t lane = 0; lane < lanes; lane++) {
                uint32_t bits = 0;
                if (lane < taken) memcpy(&bits, rows[first + lane] + k * Inner<T>::NUMBERS, sizeof bits);
                turned[k * lanes + lane] = bits;
            }
    }

    template <int V, int W> void spread(int64_t first, int64_t taken, const uint32_t *turned, int64_t column) const {
        vf acc[W][V] = {};
        const T *w = weight + column * inner;
        for (int64_t k = 0; k < steps(); k++) {
            if (ahead && k % LANES == 0)
                for (int i = 0; i < W; i++)
                    __builtin_prefetch((const char *)(w + i * inner + k * Inner<T>::NUMBERS) + ahead, 0, 2);
            for (int i = 0; i < W; i++)
                for (int v = 0; v < V; v++)
                    acc[i][v] = Inner<T>::spread(acc[i][v], w + i * inner + k * Inner<T>::NUMBERS, turned + (k * V + v) * LANES);
        }
        for (int i = 0; i < W; i++)
            for (int64_t lane = 0; lane < taken; lane++) emit(first + lane, column + i, acc[i][lane / LANES][lane % LANES]);
    }

    template <int V> void spread_all(int64_t first, int64_t taken, const uint32_t *turned, int64_t from, int64_t to) const {
        const int W = LANES / V;
        int64_t column = from;
        for (; column + W <= to; column += W) spread<V, W>(first, taken, turned, column);
        for (; column < to; column++) spread<V, 1>(first, taken, turned, column);
    }

    // Columns [from, to) of rows that are lanes of `turned`, on the matrix unit; a multiple of its rows.
    void multiplied(int64_t first, int64_t taken, int64_t lanes, const uint32_t *turned, int64_t from, int64_t to) const {
        const int64_t WIDE = 2 * TILE_ROWS;
        alignas(64) float sums[WIDE * COLUMNS];
        for (int64_t column = from; column < to; column += WIDE) {
            int64_t wide = to - column < WIDE ? to - column : WIDE;
            multiply(weight + column * inner, inner, turned, lanes, sums, lanes, wide, inner, false, ahead);
            for (int64_t w = 0; w < wide; w += LANES)
                for (int64_t lane = 0; lane < taken; lane += LANES) {
                    vf x[LANES];
                    for (int i = 0; i < LANES; i++) x[i] = load(sums + (w + i) * lanes + lane);
                    ::turn(x);
                    for (int i = 0; i < LANES && lane + i < taken; i++) {
                        Out *to_row = out[first + lane + i] + column + w;
                        store(to_row, x[i]);
                        if (squared) store(to_row, vrelu2(load(to_row)));
                    }
                }
        }
    }

    // Output columns [from, to) of all rows, four rows at a time.
    void dotted(int64_t from, int64_t to) const {
        int64_t row = 0;
        for (; row + 4 <= count; row += 4) across<4>(row, from, to);
        switch (count - row) {
        case 3: return across<3>(row, from, to);
        case 2: return across<2>(row, from, to);
        case 1: return across<1>(row, from, to);
        }
    }

    // Output columns [from, to) of all rows; `turned`: as `turns` has left them.
    void columns(int64_t from, int64_t to, const uint32_t *turned) const {
        if (!by_lanes()) return dotted(from, to);
        for (int64_t first = 0; first < count; first += COLUMNS) {
            int64_t taken = count - first < COLUMNS ? count - first : COLUMNS;
            const uint32_t *part = turned + first * steps();
            int64_t rest = from;
            if constexpr (on_unit<T>()) {
                if (tiled()) {
                    rest = to - (to - from) % TILE_ROWS;
                    multiplied(first, taken, taken > LANES ? COLUMNS : LANES, part, from, rest);
                }
            }
            if (taken > LANES)
                spread_all<2>(first, taken, part, rest, to);
            else
                spread_all<1>(first, taken, part, rest, to);
        }
    }

    bool tiled() const { return on_unit<T>() && inner % TILE_INNER == 0; }
    bool by_lanes() const { return count > (tiled() ? FEW_TILED : FEW) && inner % Inner<T>::NUMBERS == 0; }

    // Steps [from, to) of the inner axis of all rows, turned.
    void turns(int64_t from, int64_t to, uint32_t *turned) const {
        for (int64_t first = 0; first < count; first += COLUMNS) {
            int64_t taken = count - first < COLUMNS ? count - first : COLUMNS;
            turn(first, taken, taken > LANES ? COLUMNS : LANES, from, to, turned + first * steps());
        }
    }

    int64_t steps() const { return inner / Inner<T>::NUMBERS; }
};

// All of `count` products of the same rows, by all threads. `turned`: 4 bytes for each of the rows, rounded up to 32, and
// each step of the inner axis.
template <class T, class Out>
static void linears(const Product<T, Out> *p, const int64_t *outputs, int count, uint32_t *turned) {
    const int BLOCK = 32;
    int64_t blocks = 0, wide = 0;
    for (int i = 0; i < count; i++) blocks += (outputs[i] + BLOCK - 1) / BLOCK, wide += outputs[i];
#pragma omp parallel if (wide * p->inner > 1 << 15)
    {
        MatrixUnit<T> unit;
        if (p->by_lanes()) {
#pragma omp for schedule(static)
            for (int64_t k = 0; k < p->steps(); k += BLOCK)
                p->turns(k, k + BLOCK < p->steps() ? k + BLOCK : p->steps(), turned);
        }
#pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; b++) {
            int64_t from = b * BLOCK;
            int i = 0;
            for (; from >= (outputs[i] + BLOCK - 1) / BLOCK * BLOCK; i++) from -= (outputs[i] + BLOCK - 1) / BLOCK * BLOCK;
            p[i].columns(from, from + BLOCK < outputs[i] ? from + BLOCK : outputs[i], turned);
        }
    }
}
