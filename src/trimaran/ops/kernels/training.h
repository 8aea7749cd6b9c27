// What training adds to a pass: the loss with its gradient, and the way back through norms, gate, squared ReLU and the
// short convolution. One pass over each row in a core's cache, sums in fp32; each thread sums gradients of weights into
// rows of its own, which the caller adds up.
#pragma once
#include "norm.h"

static inline float largest(vf x) {
    float top = x[0];
    for (int i = 1; i < LANES; i++) top = x[i] > top ? x[i] : top;
    return top;
}

// Each row's cross-entropy, and w (softmax - one-hot) in place of its logits or elsewhere. room: `vocab` numbers for
// each thread, rounded up to lanes.
template <class T>
static void loss(const T *logits, const int64_t *targets, const float *weights, float *losses, T *gradient, int64_t rows,
                 int64_t vocab, float *room, int64_t threads) {
    int64_t wide = vocab / LANES * LANES, each = (vocab + LANES - 1) / LANES * LANES;
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int64_t thread = 0; thread < threads; thread++) {
        float *own = room + thread * each;
        for (int64_t r = thread * rows / threads; r < (thread + 1) * rows / threads; r++) {
            const T *from = logits + r * vocab;
            T *to = gradient + r * vocab;
            vf tops = all(-INFINITY), sums = {};
            for (int64_t i = 0; i < wide; i += LANES) {
                vf x = load(from + i);
                tops = larger(x, tops);
            }
            float top = largest(tops), target = widen(from[targets[r]]);
            for (int64_t i = wide; i < vocab; i++) top = widen(from[i]) > top ? widen(from[i]) : top;
            for (int64_t i = 0; i < wide; i += LANES) {
                vf e = vexp(load(from + i) - top);
                store(own + i, e);
                sums += e;
            }
            float total = sum(sums);
            for (int64_t i = wide; i < vocab; i++) total += own[i] = expf(widen(from[i]) - top);
            losses[r] = top + logf(total) - target;
            float scale = weights[r] / total;
            for (int64_t i = 0; i < wide; i += LANES) store(to + i, load(own + i) * scale);
            for (int64_t i = wide; i < vocab; i++) put(to + i, own[i] * scale);
            put(to + targets[r], own[targets[r]] * scale - weights[r]);
        }
    }
}

// x / rms(x) * weight; keeps 1 / rms of each row. x in X, y in T: a wide residual stream, a narrow output.
template <class X, class T>
static void norm_forward(const X *x, const float *weight, T *y, float *scales, int64_t rows, int64_t width, float eps) {
    int64_t wide = width / LANES * LANES;
#pragma omp parallel for schedule(static) if (rows * width > 1 << 14)
    for (int64_t r = 0; r < rows; r++) {
        const X *from = x + r * width;
        T *to = y + r * width;
        vf squares = {};
        for (int64_t i = 0; i < wide; i += LANES) squares += load(from + i) * load(from + i);
        float total = sum(squares);
        for (int64_t i = wide; i < width; i++) total += widen(from[i]) * widen(from[i]);
        float scale = scales[r] = 1 / sqrtf(total / width + eps);
        for (int64_t i = 0; i < wide; i += LANES) store(to + i, load(from + i) * scale * load(weight + i));
        for (int64_t i = wide; i < width; i++) put(to + i, widen(from[i]) * scale * weight[i]);
    }
}

// dweight: [threads, width], zeros at first.
template <class X, class T>
static void norm_backward(const X *x, const float *weight, const float *scales, const T *grad, X *dx, float *dweight,
                          int64_t rows, int64_t width, int64_t threads) {
    int64_t wide = width / LANES * LANES;
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int64_t thread = 0; thread < threads; thread++) {
        float *dw = dweight + thread * width;
        for (int64_t r = thread * rows / threads; r < (thread + 1) * rows / threads; r++) {
            const X *from = x + r * width;
            const T *g = grad + r * width;
            X *to = dx + r * width;
            float scale = scales[r];
            vf dots = {};
            for (int64_t i = 0; i < wide; i += LANES) {
                vf lean = load(g + i) * load(from + i);
                store(dw + i, load(dw + i) + lean * scale);
                dots += lean * load(weight + i);
            }
            float dot = sum(dots);
            for (int64_t i = wide; i < width; i++) {
                float lean = widen(g[i]) * widen(from[i]);
                dw[i] += lean * scale;
                dot += lean * weight[i];
            }
            float mean = dot * scale * scale / width;
            for (int64_t i = 0; i < wide; i += LANES)
                store(to + i, (load(g + i) * load(weight + i) - load(from + i) * mean) * scale);
            for (int64_t i = wide; i < width; i++) put(to + i, (widen(g[i]) * weight[i] - widen(from[i]) * mean) * scale);
        }
    }
}

// Back through out = norm(v silu(z)) * weight with v = y + D x, each group of heads a norm of its own. Widths are
// multiples of the lanes. dy, dx, dgate: rows side by side; dweight [threads, H P] and dD [threads, H]: zeros at first;
// room: [threads, 2, H P / groups].
template <class T> struct GatedBack {
    const float *y, *D, *weight;
    const T *x, *gate, *grad;
    int64_t x_stride, gate_stride;
    float *dy, *dweight, *dD;
    T *dx, *dgate;
    int64_t rows, heads, width, groups;
    float eps;

    void slice(int64_t r, int64_t g, float *dw, float *dd, float *v, float *silu) const {
        int64_t inner = heads * width, part = inner / groups, at = g * part;
        const T *z = gate + r * gate_stride + at, *in = x + r * x_stride + at, *from = grad + r * inner + at;
        const float *own = y + r * inner + at, *w = weight + at, *skip = D + at / width;
        vf squares = {}, dots = {};
        for (int64_t i = 0; i < part; i += LANES) {
            vf whole = load(own + i) + skip[i / width] * load(in + i), s = vsilu(load(z + i)), u = whole * s;
            store(v + i, whole);
            store(silu + i, s);
            squares += u * u;
            dots += load(from + i) * load(w + i) * u;
        }
        float scale = 1 / sqrtf(sum(squares) / part + eps), mean = sum(dots) * scale * scale / part;
        for (int64_t h = 0; h < part; h += width) {
            vf lean = {};
            for (int64_t i = h; i < h + width; i += LANES) {
                vf whole = load(v + i), s = load(silu + i), u = whole * s, narrow = load(from + i);
                vf du = (narrow * load(w + i) - u * mean) * scale;
                store(dw + at + i, load(dw + at + i) + narrow * u * scale);
                vf dv = du * s;
                store(dy + r * inner + at + i, dv);
                store(dx + r * inner + at + i, dv * skip[i / width]);
                lean += dv * load(in + i);
                vf sigmoid = 1.0f / (1.0f + vexp(-load(z + i)));
                store(dgate + r * inner + at + i, du * whole * (sigmoid + s * (1.0f - sigmoid)));
            }
            dd[(at + h) / width] += sum(lean);
        }
    }

    void run(float *room, int64_t threads) const {
        int64_t inner = heads * width, part = inner / groups;
#pragma omp parallel for schedule(static, 1) num_threads(threads)
        for (int64_t thread = 0; thread < threads; thread++)
            for (int64_t r = thread * rows / threads; r < (thread + 1) * rows / threads; r++)
                for (int64_t g = 0; g < groups; g++)
                    slice(r, g, dweight + thread * inner, dD + thread * heads, room + 2 * thread * part,
                          room + (2 * thread + 1) * part);
    }
};

// 2 grad relu(x)
template <class T> static void relu2_backward(const T *x, const T *grad, T *dx, int64_t count) {
    const int64_t BLOCK = 1 << 12;
#pragma omp parallel for schedule(static) if (count > 1 << 14)
    for (int64_t b = 0; b < count; b += BLOCK)
        for (int64_t i = b; i < count && i < b + BLOCK; i += LANES) {
            if (i + LANES <= count) {
                vf v = load(x + i);
                store(dx + i, select(v <= 0, all(0), v) * load(grad + i) * 2.0f);
            } else
                for (int64_t j = i; j < count; j++) put(dx + j, (widen(x[j]) <= 0 ? 0 : widen(x[j])) * widen(grad[j]) * 2);
        }
}

// Back through silu(conv(x)). x and grad [batch, length, C] with strides, dx and dtail [batch, W-1, C] contiguous, dweight
// [batch, W, C], dbias [batch, C]. Channels are a multiple of the lanes, taps at most as many. room: [threads, length, lanes].
template <class T> struct ConvBack {
    const T *x, *tail, *grad;
    const float *weight, *bias;  // [W, C], [C] or null
    const int64_t *seg;
    T *dx, *dtail;
    float *dweight, *dbias;
    int64_t x_batch, x_token, grad_batch, grad_token, batch, length, channels, taps;

    bool sees(int64_t b, int64_t t, int64_t at) const {
        if (at < 0 && !tail) return false;
        const int64_t *own = seg ? seg + b * length : nullptr;
        return !own || own[t] == (at < 0 ? 0 : own[at]);
    }
    const T *input(int64_t b, int64_t at, int64_t c) const {
        return (at < 0 ? tail + (b * (taps - 1) + at + taps - 1) * channels : x + b * x_batch + at * x_token) + c;
    }

    void lanes(int64_t b, int64_t c, float *du) const {
        vf w[LANES], dw[LANES] = {}, db = {}, plus = bias ? load(bias + c) : all(0);
        for (int64_t i = 0; i < taps; i++) w[i] = load(weight + i * channels + c);
        for (int64_t t = 0; t < length; t++) {
            vf u = plus, seen[LANES];
            for (int64_t i = 0; i < taps; i++) {
                int64_t at = t + i - (taps - 1);
                seen[i] = sees(b, t, at) ? load(input(b, at, c)) : all(0);
                u += w[i] * seen[i];
            }
            vf sigmoid = 1.0f / (1.0f + vexp(-u));
            vf d = load(grad + b * grad_batch + t * grad_token + c) * sigmoid * (1.0f + u * (1.0f - sigmoid));
            store(du + t * LANES, d);
            db += d;
            for (int64_t i = 0; i < taps; i++) dw[i] += d * seen[i];
        }
        for (int64_t at = tail ? 1 - taps : 0; at < length; at++) {
            vf d = {};
            for (int64_t i = 0; i < taps; i++) {
                int64_t t = at + (taps - 1) - i;
                if (t >= 0 && t < length && sees(b, t, at)) d += w[i] * load(du + t * LANES);
            }
            store((at < 0 ? dtail + (b * (taps - 1) + at + taps - 1) * channels : dx + (b * length + at) * channels) + c, d);
        }
        for (int64_t i = 0; i < taps; i++) store(dweight + (b * taps + i) * channels + c, dw[i]);
        store(dbias + b * channels + c, db);
    }

    void run(float *room, int64_t threads) const {
        int64_t vectors = channels / LANES, tasks = batch * vectors;
#pragma omp parallel for schedule(static, 1) num_threads(threads)
        for (int64_t thread = 0; thread < threads; thread++)
            for (int64_t n = thread * tasks / threads; n < (thread + 1) * tasks / threads; n++)
                lanes(n / vectors, n % vectors * LANES, room + thread * length * LANES);
    }
};
