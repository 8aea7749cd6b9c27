// The way back through the chunked scan: chunks in reverse, all heads of a group one after the other, so that what B and
// C get from each adds up in a core's cache. With the names of scan.h, W = dt x and d for a gradient:
//
//   dM = (dy W^T) decay       dW = M^T dy + dleft            dx = dt dW       d(dt) = A da + dW . x
//   dleft = l (B dS^T)        dS_before = e dS + (r dy)^T C  da = what later s of the chunk get, each token's added up
//
// Matrices of tokens by tokens are kept turned, a row for each token that is seen: [j, i], i >= j.
#pragma once
#include "scan.h"

template <class T> struct ScanBack {
    Scan<T> a;           // inputs of the forward, `before` with them; state and y are not read
    const T *dy;         // [batch, T, H, P]
    bool carried;        // something came before the first chunk
    T *dx, *dB, *dC;     // [batch, T, H, P], [batch, T, G, N] twice
    float *ddt, *dA;     // [batch, T, H], [batch, H]
    float *dstate;       // [batch, H, P, N]: by the last state, and by the first when done
};

// What a thread works in: everything of one chunk. Arrays of T are rows as they lie; `paired` ones are right sides.
template <class T> struct BackDesk {
    Desk<T> d;                                        // s, dt, r, l and scores of the forward, and room
    T *B, *C, *W, *dy, *far, *left, *farT, *M, *S, *dS;
    uint32_t *paired;
    float *scores, *dM, *dscores, *dB, *dC, *dW, *one, *ds;

    static int64_t numbers(const Scan<T> &a) {
        int64_t Q = a.wide(), N = a.size, P = a.width, most = Q > P ? Q : P;
        return Desk<T>::numbers(a, 1) + 2 * Q * N + 5 * Q * P + Q * Q + 2 * P * N + most * (most > N ? most : N) +
               3 * Q * Q + 2 * Q * N + Q * P + Q * (P > N ? P : N) + Q + 24 * LANES;
    }
    BackDesk(const Scan<T> &a, float *at) : d(a, 1, at) {
        int64_t Q = a.wide(), N = a.size, P = a.width, most = Q > P ? Q : P;
        at += Desk<T>::numbers(a, 1);
        auto take = [&](int64_t count) {
            float *own = at;
            at += (count + LANES - 1) / LANES * LANES;
            return own;
        };
        B = (T *)take(Q * N), C = (T *)take(Q * N), W = (T *)take(Q * P), dy = (T *)take(Q * P), far = (T *)take(Q * P);
        left = (T *)take(Q * P), farT = (T *)take(Q * P), M = (T *)take(Q * Q), S = (T *)take(P * N), dS = (T *)take(P * N);
        paired = (uint32_t *)take(most * (most > N ? most : N));
        scores = take(Q * Q), dM = take(Q * Q), dscores = take(Q * Q), dB = take(Q * N), dC = take(Q * N), dW = take(Q * P);
        one = take(Q * (P > N ? P : N)), ds = take(Q);
    }
};

// The right side whose rows are those of x [rows, n].
template <class T> static const uint32_t *paired_rows(const T *x, int64_t rows, int64_t n, uint32_t *to) {
    const int K = Inner<T>::NUMBERS;
    for (int64_t k = 0; k < rows; k += K)
        for (int64_t i = 0; i < n; i += LANES) pack(to + k / K * n + i, load(x + k * n + i), load(x + (k + K - 1) * n + i), T());
    return to;
}

// The right side whose columns are the rows of x [rows, n].
template <class T> static const uint32_t *paired_columns(const T *x, int64_t rows, int64_t n, uint32_t *to) {
    const int K = Inner<T>::NUMBERS;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t k = 0; k < n / K; k++) memcpy(to + k * rows + i, x + i * n + k * K, 4);
    return to;
}

template <class T> static void rounded(const float *from, T *to, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) store(to + i, load(from + i));
}

// `count` rows of `width` numbers, and zeros up to `wide` rows.
template <class T>
static void rows_of(const T *from, int64_t stride, T *to, int64_t count, int64_t wide, int64_t width) {
    for (int64_t i = 0; i < count; i++) memcpy(to + i * width, from + i * stride, width * sizeof(T));
    memset((void *)(to + count * width), 0, (wide - count) * width * sizeof(T));
}

static inline float dotted(const float *a, const float *b, int64_t count) {
    vf total = {};
    for (int64_t i = 0; i < count; i += LANES) total += load(a + i) * load(b + i);
    return sum(total);
}

// Through M: M itself, the gradient by the scores (added up over heads) and what s gets.
template <class T> static void back_mix(const ScanBack<T> &k, const BackDesk<T> &w, int64_t b, int64_t from, int64_t count) {
    int64_t Q = k.a.wide();
    const int64_t *seg = k.a.seg ? k.a.seg + b * k.a.length + from : nullptr;
    vi place;
    for (int i = 0; i < LANES; i++) place[i] = i;
    for (int64_t j = 0; j < Q; j++) {
        vf row = {};
        for (int64_t i = 0; i < Q; i += LANES) {
            vf mix = {}, scored = {};
            if (i + LANES > j && j < count && i < count) {
                vf decay = vexp(load(w.d.s + i) - w.d.s[j]);
                vi token = place + (int32_t)i;
                decay = select((token >= (int32_t)j) & (token < (int32_t)count), decay, all(0));
                for (int64_t n = 0; seg && n < LANES && i + n < count; n++)
                    if (seg[i + n] != seg[j]) decay[n] = 0;
                vf score = load(w.scores + j * Q + i);
                vi some = decay != 0;
                mix = select(some, decay * score, all(0));
                scored = select(some, load(w.dM + j * Q + i) * decay, all(0));
                vf leans = scored * score;
                row += leans;
                store(w.ds + i, load(w.ds + i) + leans);
            }
            store(w.M + j * Q + i, mix);
            store(w.dscores + j * Q + i, load(w.dscores + j * Q + i) + scored);
        }
        w.ds[j] -= sum(row);
    }
}

// Through y = r (C S^T): adds to ds, dC and the gradient by the state before the chunk.
template <class T> static void back_past(const ScanBack<T> &k, const BackDesk<T> &w, float *dstate, int64_t count) {
    int64_t Q = k.a.wide(), N = k.a.size, P = k.a.width;
    product<T>(w.C, N, paired_columns(w.S, P, N, w.paired), P, w.one, P, Q, N, false);
    for (int64_t i = 0; i < Q; i++) {
        vf lean = {};
        for (int64_t p = 0; p < P; p += LANES) {
            vf far = load(w.dy + i * P + p) * w.d.r[i];
            if (i < count) lean += far * load(w.one + i * P + p);
            store(w.far + i * P + p, far);
        }
        w.ds[i] += sum(lean);
        for (int64_t p = 0; p < P; p++) w.farT[p * Q + i] = w.far[i * P + p];
    }
    product<T>(w.far, P, paired_rows(w.S, P, N, w.paired), N, w.dC, N, Q, P, true);
    product<T>(w.farT, Q, paired_rows(w.C, Q, N, w.paired), N, dstate, N, P, Q, true);
}

// Through S' = e S + (l W)^T B: adds to dW, dB and ds; the gradient by S' becomes that by e S.
template <class T>
static void back_state(const ScanBack<T> &k, const BackDesk<T> &w, const float *before, float *dstate, float kept, int64_t count) {
    int64_t Q = k.a.wide(), N = k.a.size, P = k.a.width;
    float end = 0;
    product<T>(w.B, N, paired_columns(w.dS, P, N, w.paired), P, w.one, P, Q, N, false);
    for (int64_t j = 0; j < Q; j++) {
        vf lean = {};
        for (int64_t p = 0; p < P; p += LANES) {
            vf own = load(w.one + j * P + p) * w.d.l[j], write = load(w.W + j * P + p);
            store(w.dW + j * P + p, load(w.dW + j * P + p) + own);
            store(w.left + j * P + p, write * w.d.l[j]);
            lean += own * write;
        }
        float total = sum(lean);
        w.ds[j] -= total;
        end += total;
    }
    product<T>(w.left, P, paired_rows(w.dS, P, N, w.paired), N, w.dB, N, Q, P, true);
    for (int64_t i = 0; i < P * N; i += LANES) store(dstate + i, load(dstate + i) * kept);
    w.ds[count - 1] += end + dotted(dstate, before, P * N);
}

// dx, d(dt) and dA of a head from dW and ds.
template <class T> static void close_head(const ScanBack<T> &k, const BackDesk<T> &w, int64_t b, int64_t h, int64_t from, int64_t count) {
    int64_t P = k.a.width;
    float later = 0, dA = 0;
    for (int64_t i = count - 1; i >= 0; i--) {
        const T *x = k.a.x + b * k.a.x_batch + (from + i) * k.a.x_token + h * P;
        int64_t at = (b * k.a.length + from + i) * k.a.heads + h;
        vf seen = {};
        for (int64_t p = 0; p < P; p += LANES) {
            vf dW = load(w.dW + i * P + p);
            seen += dW * load(x + p);
            store(k.dx + at * P + p, dW * w.d.dt[i]);
        }
        later += w.ds[i];
        dA += later * w.d.dt[i];
        k.ddt[at] = later * k.a.A[h] + sum(seen);
    }
    k.dA[b * k.a.heads + h] += dA;
}

template <class T>
static void back_head(const ScanBack<T> &k, const BackDesk<T> &w, int64_t b, int64_t h, int64_t from, int64_t count) {
    const Scan<T> &a = k.a;
    int64_t Q = a.wide(), N = a.size, P = a.width, z = from / a.chunk, at = ((b * a.length + from) * a.heads + h) * P;
    const float *before = a.before + ((z * a.batch + b) * a.heads + h) * P * N;
    float *dstate = k.dstate + (b * a.heads + h) * P * N, kept = open_head(a, w.d, b, h, from, count);
    rows_of(k.dy + at, a.heads * P, w.dy, count, Q, P);
    rows_of(a.x + b * a.x_batch + from * a.x_token + h * P, a.x_token, w.W, count, Q, P);
    for (int64_t i = 0; i < count; i++)
        for (int64_t p = 0; p < P; p += LANES) store(w.W + i * P + p, load(w.W + i * P + p) * w.d.dt[i]);
    rounded(before, w.S, P * N);
    rounded(dstate, w.dS, P * N);
    memset(w.ds, 0, Q * sizeof(float));
    product<T>(w.W, P, paired_columns(w.dy, Q, P, w.paired), Q, w.dM, Q, Q, P, false);
    back_mix(k, w, b, from, count);
    product<T>(w.M, Q, paired_rows(w.dy, Q, P, w.paired), P, w.dW, P, Q, Q, false);
    back_state(k, w, before, dstate, kept, count);
    if (k.carried || z) back_past(k, w, dstate, count);
    close_head(k, w, b, h, from, count);
}

template <class T> static void back_task(const ScanBack<T> &k, int64_t b, int64_t g, float *scratch) {
    const Scan<T> &a = k.a;
    BackDesk<T> w(a, scratch);
    int64_t Q = a.wide(), N = a.size, own = a.heads / a.groups;
    for (int64_t z = (a.length - 1) / a.chunk; z >= 0; z--) {
        int64_t from = z * a.chunk, count = a.length - from < a.chunk ? a.length - from : a.chunk;
        int64_t at = b * a.B_batch + from * a.B_token + g * N;
        rows_of(a.B + at, a.B_token, w.B, count, Q, N);
        rows_of(a.C + at, a.B_token, w.C, count, Q, N);
        product<T>(w.B, N, paired_columns(w.C, Q, N, w.paired), Q, w.scores, Q, Q, N, false);
        memset(w.dscores, 0, Q * Q * sizeof(float));
        memset(w.dB, 0, Q * N * sizeof(float));
        memset(w.dC, 0, Q * N * sizeof(float));
        for (int64_t h = g * own; h < (g + 1) * own; h++) back_head(k, w, b, h, from, count);
        rounded(w.dscores, w.M, Q * Q);
        product<T>(w.M, Q, paired_rows(w.C, Q, N, w.paired), N, w.dB, N, Q, Q, true);
        for (int64_t j = 0; j < Q; j++)
            for (int64_t i = 0; i < Q; i++) put(w.d.mix + i * Q + j, w.dscores[j * Q + i]);
        product<T>(w.d.mix, Q, paired_rows(w.B, Q, N, w.paired), N, w.dC, N, Q, Q, true);
        for (int64_t i = 0; i < count; i++) {
            int64_t to = ((b * a.length + from + i) * a.groups + g) * N;
            rounded(w.dB + i * N, k.dB + to, N);
            rounded(w.dC + i * N, k.dC + to, N);
        }
    }
}

// scratch: BackDesk::numbers for each of `threads`
template <class T> static void scan_back(const ScanBack<T> &k, int64_t threads, float *scratch) {
    int64_t tasks = k.a.batch * k.a.groups, room = BackDesk<T>::numbers(k.a);
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int64_t thread = 0; thread < threads; thread++) {
        MatrixUnit<T> unit;
        for (int64_t n = thread; n < tasks; n += threads) back_task(k, n / k.a.groups, n % k.a.groups, scratch + thread * room);
    }
}
