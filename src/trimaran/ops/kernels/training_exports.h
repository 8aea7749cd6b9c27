// The kernels of training by name, as ops/native_training.py calls them.
#pragma once
#include "attention_training.h"
#include "scan_training.h"
#include "training.h"

#define TRAINING(LOSS, NORM, NORM_BACK, GATED_BACK, RELU2_BACK, CONV_BACK, T)                                          \
    EXPORT void LOSS(const T *logits, const int64_t *targets, const float *weights, float *losses, T *gradient,        \
                     int64_t rows, int64_t vocab, float *room, int64_t threads) {                                      \
        loss(logits, targets, weights, losses, gradient, rows, vocab, room, threads);                                  \
    }                                                                                                                  \
    EXPORT void NORM(const void *x, int wide, const float *weight, T *y, float *scales, int64_t rows, int64_t width,   \
                     float eps) {                                                                                      \
        if (wide)                                                                                                      \
            norm_forward((const float *)x, weight, y, scales, rows, width, eps);                                       \
        else                                                                                                           \
            norm_forward((const T *)x, weight, y, scales, rows, width, eps);                                           \
    }                                                                                                                  \
    EXPORT void NORM_BACK(const void *x, int wide, const float *weight, const float *scales, const T *grad, void *dx,  \
                          float *dweight, int64_t rows, int64_t width, int64_t threads) {                              \
        if (wide)                                                                                                      \
            norm_backward((const float *)x, weight, scales, grad, (float *)dx, dweight, rows, width, threads);         \
        else                                                                                                           \
            norm_backward((const T *)x, weight, scales, grad, (T *)dx, dweight, rows, width, threads);                 \
    }                                                                                                                  \
    EXPORT void GATED_BACK(const float *y, const float *D, const float *weight, const T *x, const T *gate,             \
                           const T *grad, int64_t x_stride, int64_t gate_stride, float *dy, float *dweight, float *dD, \
                           T *dx, T *dgate, int64_t rows, int64_t heads, int64_t width, int64_t groups, float eps,     \
                           float *room, int64_t threads) {                                                             \
        GatedBack<T>{y, D, weight, x, gate, grad, x_stride, gate_stride, dy, dweight, dD, dx, dgate, rows, heads,      \
                     width, groups, eps}.run(room, threads);                                                           \
    }                                                                                                                  \
    EXPORT void RELU2_BACK(const T *x, const T *grad, T *dx, int64_t count) { relu2_backward(x, grad, dx, count); }    \
    EXPORT void CONV_BACK(const T *x, const T *tail, const T *grad, const float *weight, const float *bias,            \
                          const int64_t *seg, T *dx, T *dtail, float *dweight, float *dbias, int64_t x_batch,          \
                          int64_t x_token, int64_t grad_batch, int64_t grad_token, int64_t batch, int64_t length,      \
                          int64_t channels, int64_t taps, float *room, int64_t threads) {                              \
        ConvBack<T>{x, tail, grad, weight, bias, seg, dx, dtail, dweight, dbias, x_batch, x_token, grad_batch,         \
                    grad_token, batch, length, channels, taps}.run(room, threads);                                     \
    }
TRAINING(loss_bf16, train_norm_bf16, train_norm_back_bf16, gated_back_bf16, relu2_back_bf16, conv_back_bf16, bf16)
TRAINING(loss_fp32, train_norm_fp32, train_norm_back_fp32, gated_back_fp32, relu2_back_fp32, conv_back_fp32, float)

#define ATTENTION_TRAINING(NAME, ROOM, T)                                                                              \
    EXPORT void NAME(const T *q, const T *k, const T *v, const int32_t *first, const int32_t *end, int64_t q_batch,    \
                     int64_t q_token, int64_t k_batch, int64_t k_token, int64_t v_batch, int64_t v_token,              \
                     int64_t batch, int64_t length, int64_t heads, int64_t groups, int64_t width, float scale, T *out, \
                     float *lse, const T *grad, T *dq, T *dk, T *dv, float *room, int64_t threads) {                   \
        attention_all<T>({q, k, v, first, end, q_batch, q_token, k_batch, k_token, v_batch, v_token, batch, length,    \
                          heads, groups, width, scale, out, lse, grad, dq, dk, dv},                                    \
                         grad != nullptr, room, threads);                                                              \
    }                                                                                                                  \
    EXPORT int64_t ROOM(int64_t length, int64_t width) {                                                               \
        Attention<T> a = {};                                                                                           \
        a.length = length, a.width = width;                                                                            \
        return Bench<T>::numbers(a);                                                                                   \
    }
ATTENTION_TRAINING(attention_training_bf16, attention_room_bf16, bf16)
ATTENTION_TRAINING(attention_training_fp32, attention_room_fp32, float)

#define SCAN_BACK(NAME, ROOM, T)                                                                                       \
    EXPORT void NAME(const T *x, const T *B, const T *C, const float *dt, const float *A, const int64_t *seg,          \
                     float *before, const T *dy, int carried, T *dx, T *dB, T *dC, float *ddt, float *dA,              \
                     float *dstate, int64_t x_batch, int64_t x_token, int64_t B_batch, int64_t B_token,                \
                     int64_t dt_batch, int64_t dt_token, int64_t batch, int64_t length, int64_t heads, int64_t width,  \
                     int64_t groups, int64_t size, int64_t chunk, int64_t threads, float *scratch) {                   \
        scan_back<T>({{x, B, C, dt, A, seg, nullptr, before, nullptr, x_batch, x_token, B_batch, B_token, dt_batch,    \
                       dt_token, batch, length, heads, width, groups, size, chunk},                                    \
                      dy, carried != 0, dx, dB, dC, ddt, dA, dstate}, threads, scratch);                               \
    }                                                                                                                  \
    EXPORT int64_t ROOM(int64_t width, int64_t size, int64_t chunk) {                                                  \
        Scan<T> a = {};                                                                                                \
        a.width = width, a.size = size, a.chunk = chunk;                                                               \
        return BackDesk<T>::numbers(a);                                                                                \
    }
SCAN_BACK(scan_back_bf16, scan_back_room_bf16, bf16)
SCAN_BACK(scan_back_fp32, scan_back_room_fp32, float)
