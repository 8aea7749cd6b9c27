// The short causal convolution and SiLU over whole passes, forward.
#pragma once
#include "mamba.h"

// x [batch, length, C] with strides; tail [batch, W-1, C] contiguous or null (zeros); seg [batch, length] or null.
template <class T>
static void conv_silu(const T *x, int64_t x_batch, int64_t x_token, const float *weight, const float *bias, const T *tail,
                      const int64_t *seg, T *y, int64_t batch, int64_t length, int64_t channels, int64_t taps) {
    const int64_t BLOCK = 64;
    int64_t blocks = (length + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) if (batch * length * channels > 1 << 14)
    for (int64_t n = 0; n < batch * blocks; n++) {
        int64_t b = n / blocks, from = n % blocks * BLOCK, to = from + BLOCK < length ? from + BLOCK : length;
        // Channels outside: four filters are taken apart once for all tokens of the block.
        for (int64_t c = 0; c < channels; c += LANES) {
            int64_t count = channels - c < LANES ? channels - c : LANES;
            float w[16][LANES] = {}, plus[LANES] = {};
            for (int64_t j = 0; j < count; j++) {
                for (int64_t i = 0; i < taps; i++) w[i][j] = weight[(c + j) * taps + i];
                if (bias) plus[j] = bias[c + j];
            }
            int64_t t = from;
            if (taps == 4 && count == LANES && !seg && from) {  // the usual case: what the taps see moves along in registers
                const T *in = x + b * x_batch + c;
                vf one = load(in + (t - 3) * x_token), two = load(in + (t - 2) * x_token), three = load(in + (t - 1) * x_token);
                for (; t < to; t++) {
                    vf four = load(in + t * x_token);
                    vf u = load(plus) + load(w[0]) * one + load(w[1]) * two + load(w[2]) * three + load(w[3]) * four;
                    store(y + (b * length + t) * channels + c, vsilu(u));
                    one = two, two = three, three = four;
                }
            }
            for (; t < to; t++) {
                vf u = load(plus);
                for (int64_t i = 0; i < taps; i++) {
                    int64_t at = t + i - (taps - 1);
                    if (seg && (at < 0 ? seg[b * length + t] != 0 : seg[b * length + at] != seg[b * length + t])) continue;
                    if (at < 0 && !tail) continue;
                    const T *seen = (at < 0 ? tail + (b * (taps - 1) + at + taps - 1) * channels : x + b * x_batch + at * x_token) + c;
                    if (count == LANES)
                        u += load(w[i]) * load(seen);
                    else
                        for (int64_t j = 0; j < count; j++) u[j] += w[i][j] * widen(seen[j]);
                }
                u = vsilu(u);
                T *out = y + (b * length + t) * channels + c;
                if (count == LANES)
                    store(out, u);
                else
                    for (int64_t j = 0; j < count; j++) put(out + j, u[j]);
            }
        }
    }
}
