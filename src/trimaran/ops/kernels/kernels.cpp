// The kernels by name, as ops/native.py calls them. Plain C functions: no Python, no torch, no C++ library.
#include "attention_long.h"
#include "conv.h"
#include "experts.h"
#include "mamba.h"
#include "scan.h"
#include "stack.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void linear_bf16(const bf16 *x, const bf16 *w, bf16 *y, int64_t m, int64_t k, int64_t n, uint32_t *t, int sq) {
    map(x, w, y, m, k, n, t, sq);
}
EXPORT void linear_fp32(const float *x, const float *w, float *y, int64_t m, int64_t k, int64_t n, uint32_t *t, int sq) {
    map(x, w, y, m, k, n, t, sq);
}

EXPORT void rms_norm_bf16(const bf16 *x, const bf16 *w, bf16 *y, int64_t rows, int64_t width, float eps) {
    rms_norm(x, w, y, rows, width, eps);
}
EXPORT void rms_norm_fp32(const float *x, const float *w, float *y, int64_t rows, int64_t width, float eps) {
    rms_norm(x, w, y, rows, width, eps);
}

#define MAMBA(NAME, T)                                                                                                 \
    EXPORT void NAME(int64_t heads, int64_t width, int64_t groups, int64_t size, int64_t taps, const T *conv_weight,   \
                     const T *conv_bias, const float *A_log, const float *D, const float *dt_bias,                     \
                     const T *norm_weight, float eps, const T *projected, T *out, T *tail, int64_t tail_stride,        \
                     float *state, int64_t state_stride, const int64_t *slots, float *after, int64_t documents,        \
                     int64_t tokens, float *scratch, int64_t threads) {                                                \
        mamba<T>({heads, width, groups, size, taps, conv_weight, conv_bias, A_log, D, dt_bias, norm_weight, eps},      \
                 {projected, out, tail, state, tail_stride, state_stride, slots, after, documents, tokens}, scratch,   \
                 threads);                                                                                             \
    }
MAMBA(mamba_bf16, bf16)
MAMBA(mamba_fp32, float)

#define ATTEND(NAME, T)                                                                                                \
    EXPORT void NAME(const T *q, const T *keys, const T *values, T *out, const int64_t *starts,                        \
                     const int64_t *queries, const int64_t *before, int64_t sequences, int64_t deepest, int64_t page,  \
                     int64_t shift, int64_t heads, int64_t groups, int64_t width, int64_t window, float scale,         \
                     int64_t pieces, float *scratch) {                                                                 \
        attend<T>({q, keys, values, out, starts, queries, before, sequences, deepest, page, shift, heads, groups,      \
                   width, window, scale, pieces}, scratch);                                                            \
    }
ATTEND(attend_bf16, bf16)
ATTEND(attend_fp32, float)

#define ATTEND_LONG(NAME, ROOM, T)                                                                                     \
    EXPORT void NAME(const T *q, const T *keys, const T *values, T *out, const int64_t *starts,                        \
                     const int64_t *queries, const int64_t *before, int64_t sequences, int64_t deepest, int64_t page,  \
                     int64_t shift, int64_t heads, int64_t groups, int64_t width, int64_t window, float scale,         \
                     float *scratch, int64_t threads) {                                                                \
        attend_long<T>({q, keys, values, out, starts, queries, before, sequences, deepest, page, shift, heads, groups, \
                        width, window, scale, 1}, scratch, threads);                                                   \
    }                                                                                                                  \
    EXPORT int64_t ROOM(int64_t width) { return Tiles<T>::numbers(width); }
ATTEND_LONG(attend_long_bf16, attend_long_room_bf16, bf16)
ATTEND_LONG(attend_long_fp32, attend_long_room_fp32, float)

#define EXPERTS(ROUTE, NAME, T)                                                                                        \
    EXPORT void ROUTE(const T *x, const T *weight, const float *bias, int64_t tokens, int64_t inner, int64_t count,    \
                      int64_t k, int normalise, float factor, float *scores, int64_t *ids, float *weights) {           \
        route(x, weight, bias, tokens, inner, count, k, normalise, factor, scores, ids, weights);                      \
    }                                                                                                                  \
    EXPORT void NAME(const T *x, const int64_t *ids, const float *weights, const T *up, const T *down, float *out,     \
                     int64_t tokens, int64_t k, int64_t count, int64_t width, int64_t ffn, T *hidden, float *fed) {    \
        experts(x, ids, weights, up, down, out, tokens, k, count, width, ffn, hidden, fed);                            \
    }
EXPERTS(route_bf16, experts_bf16, bf16)
EXPERTS(route_fp32, experts_fp32, float)

#define PREFILL(CONV, SCAN, ROOM, NORM, RELU2, T)                                                                      \
    EXPORT void CONV(const T *x, int64_t x_batch, int64_t x_token, const float *weight, const float *bias,             \
                     const T *tail,                                                                                    \
                     const int64_t *seg, T *y, int64_t batch, int64_t length, int64_t channels, int64_t taps) {        \
        conv_silu(x, x_batch, x_token, weight, bias, tail, seg, y, batch, length, channels, taps);                     \
    }                                                                                                                  \
    EXPORT void SCAN(const T *x, const T *B, const T *C, const float *dt, const float *A, const int64_t *seg,          \
                     float *state, float *before, float *y, int64_t x_batch, int64_t x_token, int64_t B_batch,         \
                     int64_t B_token, int64_t dt_batch, int64_t dt_token, int64_t batch, int64_t length,               \
                     int64_t heads, int64_t width, int64_t groups, int64_t size, int64_t chunk, int64_t parts,         \
                     int64_t threads, float *scratch) {                                                                \
        scan<T>({x, B, C, dt, A, seg, state, before, y, x_batch, x_token, B_batch, B_token, dt_batch, dt_token, batch, \
                 length, heads, width, groups, size, chunk}, parts, threads, scratch);                                 \
    }                                                                                                                  \
    EXPORT int64_t ROOM(int64_t width, int64_t size, int64_t chunk, int64_t heads) {                                   \
        Scan<T> a = {};                                                                                                \
        a.width = width, a.size = size, a.chunk = chunk;                                                               \
        return Desk<T>::numbers(a, heads);                                                                             \
    }                                                                                                                  \
    EXPORT void NORM(const float *y, const T *x, int64_t x_stride, const float *D, const T *gate, int64_t gate_stride, \
                     const float *weight, T *out, int64_t rows, int64_t heads, int64_t width, int64_t groups,          \
                     float eps,                                                                                        \
                     float *scratch, int64_t threads) {                                                                \
        gated_norm(y, x, x_stride, D, gate, gate_stride, weight, out, rows, heads, width, groups, eps, scratch,        \
                   threads);                                                                                           \
    }                                                                                                                  \
    EXPORT void RELU2(const T *x, T *y, int64_t count) { relu2_all(x, y, count); }
PREFILL(conv_silu_bf16, scan_bf16, scan_room_bf16, gated_norm_bf16, relu2_bf16, bf16)
PREFILL(conv_silu_fp32, scan_fp32, scan_room_fp32, gated_norm_fp32, relu2_fp32, float)

#define STACK(NAME, DRAFTS, KEEP, T)                                                                                   \
    EXPORT void NAME(const int64_t *pass, const int64_t *parts, int64_t count) {                                       \
        stack(read_pass<T>({pass}), parts, count);                                                                     \
    }                                                                                                                  \
    EXPORT void DRAFTS(const int64_t *pass, const int64_t *parts, int64_t count, const int64_t *more) {                \
        drafts(read_pass<T>({pass}), parts, count, {more});                                                            \
    }                                                                                                                  \
    EXPORT void KEEP(const int64_t *words, int64_t layers, const int64_t *slots, const int64_t *kept,                  \
                     int64_t documents, int64_t tokens, int64_t before, int64_t channels, int64_t numbers) {           \
        keep<T>({words}, layers, slots, kept, documents, tokens, before, channels, numbers);                           \
    }
STACK(stack_bf16, drafts_bf16, keep_bf16, bf16)
STACK(stack_fp32, drafts_fp32, keep_fp32, float)
#include "training_exports.h"
