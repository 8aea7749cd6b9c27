// Many queries of each sequence over the keys that it remembers and their own, with a running maximum (Dao et al.,
// arXiv 2205.14135): a block of queries of one head at a time as lanes, over a tile of keys in a core's cache.
//
//   S = keys Q^T        P = exp(scale S - top)        out^T = out^T exp(top before - top) + values^T P
//
// Scores are kept turned, [keys, queries], so that maxima and sums over keys need no shuffling. The tile's values are
// turned once for all blocks of a task: those heads of a group that share keys, and their neighbours in time.
#pragma once
#include "attention.h"
#include "scan.h"

static const int64_t QUERIES = 64;   // of one head, as lanes
static const int64_t TILE = 192;     // keys: a multiple of the lanes and of the rows of a product's tile
static const int64_t TOGETHER = 6;   // blocks of queries that share a tile of keys

template <class T> struct Tiles {
    T *keys, *values;                    // [TILE, K], and turned [K, TILE]
    uint32_t *q, *weights;               // packed [TOGETHER][K][QUERIES], [TILE][QUERIES]
    float *scores, *out, *top, *total;   // [TILE, QUERIES], [TOGETHER][K, QUERIES], [TOGETHER][QUERIES] twice

    static int64_t numbers(int64_t K) { return 2 * K * TILE + (2 * K * TOGETHER + 2 * TILE + 2 * TOGETHER) * QUERIES; }
    Tiles(int64_t K, float *at) {
        auto take = [&](int64_t count) {
            float *own = at;
            at += count;
            return own;
        };
        keys = (T *)take(K * TILE), values = (T *)take(K * TILE);
        q = (uint32_t *)take(TOGETHER * K * QUERIES), weights = (uint32_t *)take(TILE * QUERIES);
        scores = take(TILE * QUERIES), out = take(TOGETHER * K * QUERIES);
        top = take(TOGETHER * QUERIES), total = take(TOGETHER * QUERIES);
    }
};

// Queries [from, from + count) of a sequence and one head.
struct Block {
    int64_t head, from, count;
};

template <class T> struct LongTask {
    const Attend<T> &a;
    const Tiles<T> &d;
    int64_t s, g;
    Block blocks[TOGETHER];
    int64_t count = 0;

    static const int V = QUERIES / LANES;

    // Keys, zeros with the last, that fill what a product takes in at a time.
    static int64_t filled(int64_t keys) {
        const int64_t STEP = on_unit<T>() ? TILE_INNER : Inner<T>::NUMBERS;
        return (keys + STEP - 1) / STEP * STEP;
    }
    int64_t low(int64_t query) const {
        int64_t end = a.before[s] + query + 1;
        return a.window && end > a.window ? end - a.window : 0;
    }
    int64_t high(int64_t query) const { return a.before[s] + query + 1; }
    int64_t row(const Block &own, int64_t query) const { return ((a.queries[s] + query) * a.heads + own.head) * a.width; }

    void open(int64_t b) const {
        const Block &own = blocks[b];
        const int N = Inner<T>::NUMBERS;
        uint32_t *q = d.q + b * a.width * QUERIES;
        memset(q, 0, a.width / N * QUERIES * 4);
        for (int64_t i = 0; i < own.count; i++)
            for (int64_t k = 0; k < a.width / N; k++) memcpy(q + k * QUERIES + i, a.q + row(own, own.from + i) + k * N, 4);
        memset(d.out + b * a.width * QUERIES, 0, a.width * QUERIES * sizeof(float));
        for (int64_t i = 0; i < QUERIES; i++) d.top[b * QUERIES + i] = -INFINITY, d.total[b * QUERIES + i] = 0;
    }

    // Keys [first, first + taken) as rows at one distance, which is returned with where they begin; values turned.
    const T *read(int64_t first, int64_t taken, int64_t *distance) const {
        int64_t K = a.width, far = a.groups * K, begin = a.place(s, first);
        *distance = far;
        const T *keys = a.keys + begin + g * K, *values[TILE];
        bool neighbours = true;
        for (int64_t j = 0; j < taken; j++) {
            int64_t at = a.place(s, first + j);
            neighbours &= at == begin + j * far;
            values[j] = a.values + at + g * K;
        }
        if (!neighbours) {
            for (int64_t j = 0; j < taken; j++) memcpy(d.keys + j * K, a.keys + a.place(s, first + j) + g * K, K * sizeof(T));
            *distance = K, keys = d.keys;
        }
        for (int64_t j = 0; j < filled(taken); j += LANES)
            for (int64_t k = 0; k < K; k += LANES) {
                vf x[LANES];
                for (int i = 0; i < LANES; i++) x[i] = j + i < taken ? load(values[j + i] + k) : all(0);
                turn(x);
                for (int i = 0; i < LANES; i++) store(d.values + (k + i) * TILE + j, x[i]);
            }
        return keys;
    }

    // Scores as -inf where a query may not see a key; lanes without a query see what they like.
    void hide(const Block &own, int64_t first, int64_t taken) const {
        vi place;
        for (int i = 0; i < LANES; i++) place[i] = i;
        for (int v = 0; v < V; v++) {
            vi last = place + (int32_t)(a.before[s] + own.from + v * LANES - first);  // its own key, counted from the tile's first
            for (int32_t j = 0; j < taken; j++) {
                float *at = d.scores + j * QUERIES + v * LANES;
                vi sees = last >= j;
                if (a.window) sees &= last - (int32_t)a.window < j;
                store(at, select(sees, load(at), all(-INFINITY)));
            }
        }
    }

    // What the maxima grow by is taken from all that was summed up before.
    void fade(int64_t b, int64_t taken, vf *base) const {
        for (int v = 0; v < V; v++) {
            vf top = all(-INFINITY);
            for (int64_t j = 0; j < taken; j++) top = larger(top, load(d.scores + j * QUERIES + v * LANES));
            float *at = d.top + b * QUERIES + v * LANES, *total = d.total + b * QUERIES + v * LANES;
            vf before = load(at);
            top = larger(before, top * a.scale);
            base[v] = select(top == -INFINITY, all(0), top);
            if (memcmp(&top, &before, sizeof top) == 0) continue;
            vf share = vexp(before - base[v]);
            store(at, top);
            store(total, load(total) * share);
            float *out = d.out + b * a.width * QUERIES + v * LANES;
            for (int64_t k = 0; k < a.width; k++) store(out + k * QUERIES, load(out + k * QUERIES) * share);
        }
    }

    void look(int64_t b, const T *keys, int64_t distance, int64_t first, int64_t taken) const {
        const Block &own = blocks[b];
        const int N = Inner<T>::NUMBERS;
        if (first >= high(own.from + own.count - 1) || first + taken <= low(own.from)) return;
        product<T>(keys, distance, d.q + b * a.width * QUERIES, QUERIES, d.scores, QUERIES, taken, a.width, false);
        if (first + taken > high(own.from) || first < low(own.from + own.count - 1)) hide(own, first, taken);
        vf base[V], total[V] = {};
        fade(b, taken, base);
        int64_t padded = filled(taken);
        for (int64_t j = 0; j < padded; j += N)
            for (int v = 0; v < V; v++) {
                vf e[2] = {};
                for (int n = 0; n < N && j + n < taken; n++)
                    e[n] = vexp(load(d.scores + (j + n) * QUERIES + v * LANES) * a.scale - base[v]);
                total[v] += e[0] + e[1];
                pack(d.weights + j / N * QUERIES + v * LANES, e[0], e[1], T());
            }
        for (int v = 0; v < V; v++) {
            float *at = d.total + b * QUERIES + v * LANES;
            store(at, load(at) + total[v]);
        }
        product<T>(d.values, TILE, d.weights, QUERIES, d.out + b * a.width * QUERIES, QUERIES, a.width, padded, true);
    }

    void close(int64_t b) const {
        const Block &own = blocks[b];
        const float *out = d.out + b * a.width * QUERIES;
        for (int64_t i = 0; i < own.count; i += LANES) {
            vf share = 1.0f / load(d.total + b * QUERIES + i);
            for (int64_t k = 0; k < a.width; k += LANES) {
                vf x[LANES];
                for (int n = 0; n < LANES; n++) x[n] = load(out + (k + n) * QUERIES + i) * share;
                turn(x);
                for (int n = 0; n < LANES && i + n < own.count; n++) store(a.out + row(own, own.from + i + n) + k, x[n]);
            }
        }
    }

    void run() const {
        int64_t begin = INT64_MAX, end = 0;
        for (int64_t b = 0; b < count; b++) {
            open(b);
            int64_t from = low(blocks[b].from), to = high(blocks[b].from + blocks[b].count - 1);
            begin = from < begin ? from : begin, end = to > end ? to : end;
        }
        for (int64_t first = begin; first < end; first += TILE) {
            int64_t taken = end - first < TILE ? end - first : TILE, distance;
            const T *keys = read(first, taken, &distance);
            for (int64_t b = 0; b < count; b++) look(b, keys, distance, first, taken);
        }
        for (int64_t b = 0; b < count; b++) close(b);
    }
};

// Tasks of a sequence: parts of the group's heads, and blocks of queries, the later ones with more keys first.
template <class T> struct LongTasks {
    const Attend<T> &a;
    int64_t heads, across, each;  // of a group in one task; tasks that a group's heads make; blocks of one head in a task

    LongTasks(const Attend<T> &a) : a(a) {
        heads = a.shared() < TOGETHER ? a.shared() : TOGETHER;
        across = (a.shared() + heads - 1) / heads;
        each = TOGETHER / heads;
    }
    int64_t length(int64_t s) const { return a.queries[s + 1] - a.queries[s]; }
    int64_t along(int64_t s) const { return (length(s) + each * QUERIES - 1) / (each * QUERIES); }
    int64_t of(int64_t s) const { return a.groups * across * along(s); }

    void run(int64_t s, int64_t n, float *scratch) const {
        Tiles<T> d(a.width, scratch);
        int64_t g = n % a.groups, part = n / a.groups % across, late = n / a.groups / across;
        LongTask<T> task{a, d, s, g};
        int64_t first = (along(s) - 1 - late) * each * QUERIES;
        for (int64_t from = first; from < first + each * QUERIES && from < length(s); from += QUERIES)
            for (int64_t h = part * heads; h < (part + 1) * heads && h < a.shared(); h++)
                task.blocks[task.count++] = {g * a.shared() + h, from, length(s) - from < QUERIES ? length(s) - from : QUERIES};
        task.run();
    }
};

// scratch: Tiles::numbers for each of `threads`
template <class T> static void attend_long(const Attend<T> &a, float *scratch, int64_t threads) {
    LongTasks<T> tasks(a);
    int64_t room = Tiles<T>::numbers(a.width);
    for (int64_t s = 0; s < a.sequences; s++) {
        int64_t count = tasks.of(s), next = 0;
#pragma omp parallel for schedule(static, 1) num_threads(threads)
        for (int64_t thread = 0; thread < threads; thread++) {
            MatrixUnit<T> unit;
            for (;;) {
                int64_t n = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
                if (n >= count) break;
                tasks.run(s, n, scratch + thread * room);
            }
        }
    }
}
