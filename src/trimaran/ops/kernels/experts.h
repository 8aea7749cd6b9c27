// A sigmoid router and relu^2 experts for a few tokens. Each expert that somebody chose reads its weights once; threads
// share the columns, so that no two write the same number.
#pragma once
#include "linear.h"

// logits = x W^T in fp32; scores = sigmoid; the k largest of score + bias; weights = their scores, normalised, times factor.
template <class T>
static void route(const T *x, const T *weight, const float *bias, int64_t tokens, int64_t inner, int64_t experts, int64_t k,
                  int normalise, float factor, float *scores, int64_t *ids, float *weights) {
#pragma omp parallel for schedule(static) if (tokens * inner * experts > 1 << 16)
    for (int64_t n = 0; n < tokens * experts; n++) {
        const T *a = x + n / experts * inner, *b = weight + n % experts * inner;
        vf acc = {};
        int64_t i = 0;
        for (; i + LANES <= inner; i += LANES) acc += load(a + i) * load(b + i);
        float logit = sum(acc);
        for (; i < inner; i++) logit += widen(a[i]) * widen(b[i]);
        scores[n] = 1 / (1 + expf(-logit));
    }
    for (int64_t t = 0; t < tokens; t++) {
        const float *own = scores + t * experts;
        float total = 0;
        for (int64_t j = 0; j < k; j++) {
            int64_t best = -1;
            for (int64_t e = 0; e < experts; e++) {
                bool taken = false;
                for (int64_t i = 0; i < j; i++) taken |= ids[t * k + i] == e;
                if (!taken && (best < 0 || own[e] + bias[e] > own[best] + bias[best])) best = e;
            }
            ids[t * k + j] = best;
            weights[t * k + j] = own[best];
            total += own[best];
        }
        for (int64_t j = 0; j < k; j++)
            weights[t * k + j] = (normalise ? weights[t * k + j] / (total + 1e-20f) : weights[t * k + j]) * factor;
    }
}

static const int MOST_TOKENS = 32, MOST_CHOICES = 512;

// out[t] = sum over the choices of t of weight * down relu(up x)^2, in fp32.
// hidden: [choices, ffn]; fed: [choices, width] fp32; each in the order of experts, then tokens.
template <class T>
static void experts(const T *x, const int64_t *ids, const float *weights, const T *up, const T *down, float *out,
                    int64_t tokens, int64_t k, int64_t count, int64_t width, int64_t ffn, T *hidden, float *fed) {
    int64_t choice_of[MOST_CHOICES], begins[MOST_CHOICES + 1], expert_of[MOST_CHOICES], used = 0, placed = 0;
    for (int64_t e = 0; e < count; e++) {
        int64_t before = placed;
        for (int64_t c = 0; c < tokens * k; c++)
            if (ids[c] == e) choice_of[placed++] = c;
        if (placed > before) begins[used] = before, expert_of[used++] = e;
    }
    begins[used] = placed;
    const T *rows[MOST_CHOICES], *between[MOST_CHOICES];
    T *to[MOST_CHOICES];
    float *fed_to[MOST_CHOICES];
    for (int64_t i = 0; i < placed; i++) {
        rows[i] = x + choice_of[i] / k * width;
        between[i] = to[i] = hidden + i * ffn;
        fed_to[i] = fed + i * width;
    }
    const int BLOCK = 32;
    int64_t ahead = prefetched<T>(width * ffn);
    int64_t up_blocks = (ffn + BLOCK - 1) / BLOCK, down_blocks = (width + BLOCK - 1) / BLOCK;
#pragma omp parallel if (placed * width * ffn > 1 << 15)
    {
#pragma omp for schedule(static)
        for (int64_t n = 0; n < used * up_blocks; n++) {
            int64_t e = n / up_blocks, from = n % up_blocks * BLOCK, end = from + BLOCK < ffn ? from + BLOCK : ffn;
            Product<T, T> p = {rows + begins[e], up + expert_of[e] * ffn * width, to + begins[e], begins[e + 1] - begins[e], width, true, ahead};
            p.dotted(from, end);
        }
#pragma omp for schedule(static)
        for (int64_t n = 0; n < used * down_blocks; n++) {
            int64_t e = n / down_blocks, from = n % down_blocks * BLOCK, end = from + BLOCK < width ? from + BLOCK : width;
            Product<T, float> p = {between + begins[e], down + expert_of[e] * ffn * width, fed_to + begins[e], begins[e + 1] - begins[e], ffn, false, ahead};
            p.dotted(from, end);
        }
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) {
            for (int64_t i = 0; i < width; i++) out[t * width + i] = 0;
            for (int64_t i = 0; i < placed; i++)
                if (choice_of[i] / k == t) {
                    float w = weights[choice_of[i]];
                    for (int64_t j = 0; j < width; j++) {
                        T rounded;  // as it leaves the expert
                        put(&rounded, fed[i * width + j]);
                        out[t * width + j] += w * widen(rounded);
                    }
                }
        }
    }
}
