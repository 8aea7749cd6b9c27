// Norms of rows, Mamba-2's gate, squared ReLU: one pass over each row, sums in fp32.
#pragma once
#include "lanes.h"

// x / sqrt(mean(x^2) + eps) * weight
template <class T, class W>
static void rms_norm(const T *x, const W *weight, T *y, int64_t rows, int64_t width, float eps) {
    int64_t wide = width / LANES * LANES;
#pragma omp parallel for schedule(static) if (rows * width > 1 << 14)
    for (int64_t r = 0; r < rows; r++) {
        const T *from = x + r * width;
        vf squares = {};
        for (int64_t i = 0; i < wide; i += LANES) squares += load(from + i) * load(from + i);
        float total = sum(squares);
        for (int64_t i = wide; i < width; i++) total += widen(from[i]) * widen(from[i]);
        float scale = 1 / sqrtf(total / width + eps);
        for (int64_t i = 0; i < wide; i += LANES) store(y + r * width + i, load(from + i) * scale * load(weight + i));
        for (int64_t i = wide; i < width; i++) put(y + r * width + i, widen(from[i]) * scale * widen(weight[i]));
    }
}

// The gate and norm of one group: out = u / rms(u) * weight with u = y silu(gate). y is scratch of this thread.
template <class T, class W>
static void gated_norm_slice(float *y, const T *gate, const W *weight, T *out, int64_t width, float eps) {
    int64_t wide = width / LANES * LANES;
    vf squares = {};
    for (int64_t i = 0; i < wide; i += LANES) {
        vf u = load(y + i) * vsilu(load(gate + i));
        store(y + i, u);
        squares += u * u;
    }
    float total = sum(squares);
    for (int64_t i = wide; i < width; i++) {
        float z = widen(gate[i]), u = y[i] * (z / (1 + expf(-z)));
        y[i] = u;
        total += u * u;
    }
    float scale = 1 / sqrtf(total / width + eps);
    for (int64_t i = 0; i < wide; i += LANES) store(out + i, load(y + i) * scale * load(weight + i));
    for (int64_t i = wide; i < width; i++) put(out + i, y[i] * scale * widen(weight[i]));
}

// y + D x, gate and norm of each token and group, as `gated_norm_slice`. y [rows, H P] contiguous fp32; x and gate have
// a stride between rows.
template <class T>
static void gated_norm(const float *y, const T *x, int64_t x_stride, const float *D, const T *gate, int64_t gate_stride,
                       const float *weight, T *out, int64_t rows, int64_t heads, int64_t width, int64_t groups, float eps,
                       float *scratch, int64_t threads) {
    int64_t inner = heads * width, part = inner / groups;
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int64_t thread = 0; thread < threads; thread++) {
        float *own = scratch + thread * part;
        for (int64_t n = thread * rows / threads; n < (thread + 1) * rows / threads; n++)
            for (int64_t g = 0; g < groups; g++) {
                memcpy(own, y + n * inner + g * part, part * sizeof(float));
                for (int64_t h = 0; h < part / width; h++) {
                    const T *from = x + n * x_stride + g * part + h * width;
                    float *to = own + h * width, skip = D[g * (part / width) + h];
                    int64_t i = 0;
                    for (; i + LANES <= width; i += LANES) store(to + i, load(to + i) + skip * load(from + i));
                    for (; i < width; i++) to[i] += skip * widen(from[i]);
                }
                gated_norm_slice(own, gate + n * gate_stride + g * part, weight + g * part, out + n * inner + g * part, part, eps);
            }
    }
}

// relu(x)^2; NaN stays NaN.
template <class T> static void relu2_all(const T *x, T *y, int64_t count) {
    const int64_t BLOCK = 1 << 12;
#pragma omp parallel for schedule(static) if (count > 1 << 14)
    for (int64_t b = 0; b < count; b += BLOCK)
        for (int64_t i = b; i < count && i < b + BLOCK; i += LANES) {
            if (i + LANES <= count) {
                vf v = load(x + i);
                store(y + i, vrelu2(v));
            } else
                for (int64_t j = i; j < count; j++) put(y + j, widen(x[j]) <= 0 ? 0 : widen(x[j]) * widen(x[j]));
        }
}
