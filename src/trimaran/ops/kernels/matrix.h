// Products of bf16 on the matrix unit of newer Xeons (AMX), which does in one instruction what takes 128 of AVX-512: a tile
// of sums takes in sixteen rows by sixteen pairs of the left side and sixteen pairs by sixteen columns of the right.
//
//   tiles 0-3   sums, two by two        4, 5   left, rows as they lie        6, 7   right, packed [k / 2][n]
//
// Elsewhere there is no unit, and the vector forms do everything.
#pragma once
#include "lanes.h"

static const int64_t TILE_ROWS = 16, TILE_INNER = 32;

template <class T> struct MatrixUnit {
    MatrixUnit() {}
};

#ifdef __AMX_BF16__
static const bool UNIT = true;

// Sets this thread's tiles up for `multiply`, and back to what they were when it goes: others use them too.
template <> struct MatrixUnit<bf16> {
    struct alignas(64) Shape {
        uint8_t bytes[64];
    } before, ours;

    MatrixUnit() : ours{} {
        ours.bytes[0] = 1;                                                      // the palette
        for (int t = 0; t < 8; t++) ours.bytes[16 + 2 * t] = 64, ours.bytes[48 + t] = TILE_ROWS;  // bytes in a row, rows
        __asm__ volatile("sttilecfg %0" : "=m"(before));
        __asm__ volatile("ldtilecfg %0" : : "m"(ours));
    }
    ~MatrixUnit() {
        if (before.bytes[0]) __asm__ volatile("ldtilecfg %0" : : "m"(before));
        else __asm__ volatile("tilerelease");
    }
    MatrixUnit(const MatrixUnit &) = delete;
};

#define TILE_LOAD(T, FROM, BYTES) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #T : : "r"(FROM), "r"((int64_t)(BYTES)) : "memory")
#define TILE_STORE(T, TO, BYTES) \
    __asm__ volatile("tilestored %%tmm" #T ", (%0,%1,1)" : : "r"(TO), "r"((int64_t)(BYTES)) : "memory")
#define TILE_ZERO(T) __asm__ volatile("tilezero %%tmm" #T : :)
#define TILE_MULTIPLY(SUMS, LEFT, RIGHT) \
    __asm__ volatile("tdpbf16ps %%tmm" #RIGHT ", %%tmm" #LEFT ", %%tmm" #SUMS : :)

// R by V tiles of c; `ahead`: bytes of the left side between use and prefetch, 0: none.
template <int R, int V>
static inline void multiply_tiles(const bf16 *a, int64_t lda, const uint32_t *b, int64_t n, float *c, int64_t ldc, int64_t k,
                                  bool add, int64_t ahead) {
    const int64_t left = lda * 2, right = n * 4, sums = ldc * 4, row = TILE_ROWS;
    if (add) {
        TILE_LOAD(0, c, sums);
        if (V > 1) TILE_LOAD(1, c + 16, sums);
        if (R > 1) TILE_LOAD(2, c + row * ldc, sums);
        if (R > 1 && V > 1) TILE_LOAD(3, c + row * ldc + 16, sums);
    } else {
        TILE_ZERO(0);
        if (V > 1) TILE_ZERO(1);
        if (R > 1) TILE_ZERO(2);
        if (R > 1 && V > 1) TILE_ZERO(3);
    }
    for (int64_t i = 0; i < k; i += TILE_INNER) {
        const uint32_t *pairs = b + i / 2 * n;
        if (ahead)
            for (int r = 0; r < R * TILE_ROWS; r++) __builtin_prefetch((const char *)(a + r * lda + i) + ahead, 0, 2);
        TILE_LOAD(4, a + i, left);
        TILE_LOAD(6, pairs, right);
        TILE_MULTIPLY(0, 4, 6);
        if (R > 1) TILE_LOAD(5, a + row * lda + i, left);
        if (R > 1) TILE_MULTIPLY(2, 5, 6);
        if (V > 1) TILE_LOAD(7, pairs + 16, right);
        if (V > 1) TILE_MULTIPLY(1, 4, 7);
        if (R > 1 && V > 1) TILE_MULTIPLY(3, 5, 7);
    }
    TILE_STORE(0, c, sums);
    if (V > 1) TILE_STORE(1, c + 16, sums);
    if (R > 1) TILE_STORE(2, c + row * ldc, sums);
    if (R > 1 && V > 1) TILE_STORE(3, c + row * ldc + 16, sums);
}

template <int R>
static inline void multiply_rows(const bf16 *a, int64_t lda, const uint32_t *b, int64_t n, float *c, int64_t ldc, int64_t k,
                                 bool add, int64_t ahead) {
    int64_t column = 0;
    for (; column + 32 <= n; column += 32) multiply_tiles<R, 2>(a, lda, b + column, n, c + column, ldc, k, add, column ? 0 : ahead);
    if (column < n) multiply_tiles<R, 1>(a, lda, b + column, n, c + column, ldc, k, add, column ? 0 : ahead);
}

// c [m, n] (+)= a [m, k] b for multiples of 16, 16 and 32, where a MatrixUnit lives: rows of a as they lie, b packed.
static inline void multiply(const bf16 *a, int64_t lda, const uint32_t *b, int64_t n, float *c, int64_t ldc, int64_t m, int64_t k,
                            bool add, int64_t ahead = 0) {
    int64_t r = 0;
    for (; r + 2 * TILE_ROWS <= m; r += 2 * TILE_ROWS) multiply_rows<2>(a + r * lda, lda, b, n, c + r * ldc, ldc, k, add, ahead);
    if (r < m) multiply_rows<1>(a + r * lda, lda, b, n, c + r * ldc, ldc, k, add, ahead);
}
#else
static const bool UNIT = false;
#endif

// Whether products of this type can be the unit's; `multiply` is there for no others.
template <class T> static constexpr bool on_unit() { return UNIT && sizeof(T) == 2; }
