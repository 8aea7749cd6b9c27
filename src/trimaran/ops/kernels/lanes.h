// Lanes of fp32, sixteen or eight as a register has, and bf16 in pairs: what the kernels are written in.
//
// GCC's and clang's vector extensions carry one source to AVX-512 and AVX2; where the processor multiplies bf16 itself,
// `dot2` says so. Sums are fp32 everywhere. bf16 is rounded to nearest even, as torch does. Vectors are never longer than
// a register: GCC would keep them in memory, and take their comparisons apart, lane by lane.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
static const int LANES = 16;
#else
static const int LANES = 8;
#endif
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
struct bf16 {
    uint16_t bits;
};

static inline vf all(float x) { return x - (vf){}; }

static inline float widen(bf16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}
static inline float widen(float x) { return x; }

static inline void put(float *to, float x) { *to = x; }
static inline void put(bf16 *to, float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    to->bits = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static inline vf load(const float *from) {
    vf out;
    memcpy(&out, from, sizeof out);
    return out;
}
static inline vf load(const bf16 *from) {
    vh half;
    memcpy(&half, from, sizeof half);
    return (vf)(__builtin_convertvector(half, vu) << 16);
}

static inline void store(float *to, vf x) { memcpy(to, &x, sizeof x); }
static inline void store(bf16 *to, vf x) {
#ifdef __AVX512BF16__
    __m256bh half = _mm512_cvtneps_pbh((__m512)x);
    memcpy(to, &half, sizeof half);
#else
    vu bits = (vu)x;
    vu rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    vi odd = x != x;
    rounded = (rounded & ~(vu)odd) | (0x7fc0 & (vu)odd);
    vh half = __builtin_convertvector(rounded, vh);
    memcpy(to, &half, sizeof half);
#endif
}

static inline vf select(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }

static inline float sum(vf x) {
    typedef float quarter __attribute__((vector_size(16)));
    quarter q[LANES / 4];
    memcpy(q, &x, sizeof q);
    for (int half = LANES / 8; half; half /= 2)
        for (int i = 0; i < half; i++) q[i] += q[i + half];
    return q[0][0] + q[0][2] + (q[0][1] + q[0][3]);
}

// The sums of as many vectors as there are lanes, side by side: by halves, where lanes can be moved across a register.
static inline vf sums(const vf *x) {
#ifdef __AVX512F__
    vf eight[8], four[4], two[2];
    for (int i = 0; i < 8; i++) {
        vf a = x[2 * i], b = x[2 * i + 1];
        eight[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                   __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    for (int i = 0; i < 4; i++) {
        vf a = eight[2 * i], b = eight[2 * i + 1];
        four[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                  __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    }
    for (int i = 0; i < 2; i++) {
        vf a = four[2 * i], b = four[2 * i + 1];
        two[i] = __builtin_shufflevector(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
                 __builtin_shufflevector(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
    }
    return __builtin_shufflevector(two[0], two[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           __builtin_shufflevector(two[0], two[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#else
    vf out;
    for (int i = 0; i < LANES; i++) out[i] = sum(x[i]);
    return out;
#endif
}

// The larger of two, lane by lane; b where either is NaN.
static inline vf larger(vf a, vf b) {
#ifdef __AVX512F__
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return select(a > b, a, b);
#endif
}

// Rows as columns, as many of each as there are lanes: blocks of 8, 4, 2, 1 across the diagonal change places.
static inline void turn(vf *x) {
#ifdef __AVX512F__
    for (int i = 0; i < 8; i++) {
        vf a = x[i], b = x[i + 8];
        x[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        x[i + 8] = __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    for (int i = 0; i < 16; i = (i + 5) & ~4) {
        vf a = x[i], b = x[i + 4];
        x[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
        x[i + 4] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    }
    for (int i = 0; i < 16; i = (i + 3) & ~2) {
        vf a = x[i], b = x[i + 2];
        x[i] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
        x[i + 2] = __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
    for (int i = 0; i < 16; i += 2) {
        vf a = x[i], b = x[i + 1];
        x[i] = __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
        x[i + 1] = __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    }
#else
    float rows[LANES][LANES], columns[LANES][LANES];
    memcpy(rows, x, sizeof rows);
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++) columns[j][i] = rows[i][j];
    memcpy(x, columns, sizeof columns);
#endif
}

// exp between -ln 2 / 2 and ln 2 / 2 (the polynomial of Cephes' expf).
static inline vf exp_of_rest(vf r) {
    vf p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 0.5f;
    return p * r * r + r + 1.0f;
}

// exp, within 2 ulp; 0 below the smallest normal number, infinity above the largest. NaN stays NaN.
static inline vf vexp(vf x) {
#ifdef __AVX512F__
    __m512 inside = _mm512_min_ps(_mm512_set1_ps(100.0f), (__m512)x);  // e^100 is infinity, infinity less infinity is not
    __m512 whole = _mm512_roundscale_ps(inside * 1.44269504f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vf r = (vf)inside - (vf)whole * 0.693359375f + (vf)whole * 2.12194440e-4f;
    __mmask16 some = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.3365f), _CMP_NLT_UQ);
    return (vf)_mm512_maskz_scalef_ps(some, (__m512)exp_of_rest(r), whole);
#else
    const vf high = all(88.7228f), low = all(-87.3365f);
    vf inside = select(x > high, high, select(x < low, low, x));
    vf scaled = inside * 1.44269504f;
    vi whole = __builtin_convertvector(scaled + select(scaled < 0, all(-0.5f), all(0.5f)), vi);
    vf n = __builtin_convertvector(whole, vf);
    vf p = exp_of_rest(inside - n * 0.693359375f + n * 2.12194440e-4f);
    // Two steps, so that 2^128 and the smallest numbers do not leave the exponent's range on the way.
    vi half = whole >> 1;
    vf y = p * (vf)((half + 127) << 23) * (vf)((whole - half + 127) << 23);
    y = select(x > high, all(INFINITY), select(x < low, all(0.0f), y));
    return select(x != x, x, y);
#endif
}
static inline vf vsilu(vf x) { return x / (1.0f + vexp(-x)); }

// acc + the products of pairs of bf16, lane by lane. Each 32-bit lane of a and b holds two neighbours.
static inline vf dot2(vf acc, vu a, vu b) {
#ifdef __AVX512BF16__
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
    acc += (vf)(a << 16) * (vf)(b << 16);
    return acc + (vf)(a & 0xffff0000u) * (vf)(b & 0xffff0000u);
#endif
}
