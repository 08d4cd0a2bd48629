// C[M, N] (+)= A[M, K] B[K, N] in fp32 sums, for blocks that stay in the cache.
//
// A is row-major. B is packed so that one load feeds W columns: fp32 as [K][N]; bf16 as pairs of rows, [K/2][N][2], which is
// what AVX-512 BF16 and AMX multiply. M is a multiple of 16, N of 16, K of 32 (the callers pad with zeros).
#pragma once
#include "simd.h"

#if defined(__AMX_BF16__)
#define HAS_AMX 1
#elif defined(EMULATE_AMX)
#define HAS_AMX 1
#include "amx_emulated.h"
#endif

namespace {

template <class T> struct Pair;  // what one multiplication takes from A and from a column of B
template <> struct Pair<float> {
    static const int rows = 1;
};
template <> struct Pair<bf16> {
    static const int rows = 2;
};

INLINE vf multiply_add(vf sum, const float* a, const float* b) { return sum + *a * load(b); }
INLINE vf multiply_add(vf sum, const bf16* a, vu pairs) {
    uint32_t two = *(const uint32_t __attribute__((may_alias, aligned(2)))*)a;
#if defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(two), (__m512bh)pairs);
#else
    vf low = (vf)(pairs << 16), high = (vf)(pairs & 0xffff0000u);
    sum = sum + to_float(bf16{(uint16_t)two}) * low;
    return sum + to_float(bf16{(uint16_t)(two >> 16)}) * high;
#endif
}
INLINE vf multiply_add(vf sum, const bf16* a, const bf16* b) { return multiply_add(sum, a, *(const vu_at*)b); }

template <int ROWS, int VECTORS, class T>
INLINE void tile(bool add, int64_t K, const T* A, int64_t lda, const T* B, int64_t ldb, float* C, int64_t ldc) {
    const int step = Pair<T>::rows;
    vf acc[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) acc[r][v] = add ? load(C + r * ldc + v * W) : vf{};
    for (int64_t k = 0; k < K; k += step) {
        const T* b = B + k * ldb;
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) acc[r][v] = multiply_add(acc[r][v], A + r * lda + k, b + v * W * step);
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) store(C + r * ldc + v * W, acc[r][v]);
}

template <int VECTORS, class T>
INLINE void columns(bool add, int64_t M, int64_t K, const T* A, int64_t lda, const T* B, int64_t ldb, float* C, int64_t ldc) {
    int64_t m = 0;
    for (; m + 6 <= M; m += 6) tile<6, VECTORS>(add, K, A + m * lda, lda, B, ldb, C + m * ldc, ldc);
    for (; m < M; m += 2) tile<2, VECTORS>(add, K, A + m * lda, lda, B, ldb, C + m * ldc, ldc);
}

template <class T>
void gemm(bool add, int64_t M, int64_t N, int64_t K, const T* A, int64_t lda, const T* B, int64_t ldb, float* C, int64_t ldc) {
    const int step = Pair<T>::rows, vectors = W == 16 ? 4 : 2;  // 6 x 4 sums of 32 registers, 6 x 2 of 16
    int64_t n = 0;
    for (; n + vectors * W <= N; n += vectors * W) columns<vectors>(add, M, K, A, lda, B + n * step, ldb, C + n, ldc);
    for (; n < N; n += W) columns<1>(add, M, K, A, lda, B + n * step, ldb, C + n, ldc);
}

#if defined(HAS_AMX)
const bool HAS_TILES = true;

// A tile is 16 rows of 64 bytes: A 16 x 32, B 16 pairs of rows x 16, C 16 x 16. Tiles 0-3 sum, 4-5 hold A, 6-7 B.
struct Tiles {
    Tiles() {
        struct __attribute__((aligned(64))) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        __asm__ volatile("" : : "r"(&config) : "memory");  // gcc 12 would otherwise store parts of it too late
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
};

template <int ROWS, int COLUMNS>
INLINE void tiles(bool add, int64_t K, const bf16* A, int64_t lda, const bf16* B, int64_t ldb, float* C, int64_t ldc) {
    __asm__ volatile("" : : : "memory");  // some compilers do not know that loading a tile reads memory
    if (add) {
        _tile_loadd(0, C, ldc * 4);
        if (COLUMNS > 1) _tile_loadd(1, C + 16, ldc * 4);
        if (ROWS > 1) _tile_loadd(2, C + 16 * ldc, ldc * 4);
        if (ROWS > 1 && COLUMNS > 1) _tile_loadd(3, C + 16 * ldc + 16, ldc * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < K; k += 32) {
        _tile_loadd(4, A + k, lda * 2);
        _tile_loadd(6, B + k * ldb, ldb * 4);
        _tile_dpbf16ps(0, 4, 6);
        if (COLUMNS > 1) {
            _tile_loadd(7, B + k * ldb + 32, ldb * 4);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (ROWS > 1) {
            _tile_loadd(5, A + 16 * lda + k, lda * 2);
            _tile_dpbf16ps(2, 5, 6);
            if (COLUMNS > 1) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, C, ldc * 4);
    if (COLUMNS > 1) _tile_stored(1, C + 16, ldc * 4);
    if (ROWS > 1) _tile_stored(2, C + 16 * ldc, ldc * 4);
    if (ROWS > 1 && COLUMNS > 1) _tile_stored(3, C + 16 * ldc + 16, ldc * 4);
}

template <>
void gemm<bf16>(bool add, int64_t M, int64_t N, int64_t K, const bf16* A, int64_t lda, const bf16* B, int64_t ldb, float* C, int64_t ldc) {
    for (int64_t m = 0; m < M; m += 32)
        for (int64_t n = 0; n < N; n += 32) {
            const bf16 *a = A + m * lda, *b = B + n * 2;
            float* c = C + m * ldc + n;
            bool tall = m + 32 <= M, wide = n + 32 <= N;
            if (tall && wide) tiles<2, 2>(add, K, a, lda, b, ldb, c, ldc);
            else if (tall) tiles<2, 1>(add, K, a, lda, b, ldb, c, ldc);
            else if (wide) tiles<1, 2>(add, K, a, lda, b, ldb, c, ldc);
            else tiles<1, 1>(add, K, a, lda, b, ldb, c, ldc);
        }
}
#else
const bool HAS_TILES = false;

struct Tiles {
    Tiles() {}  // nothing to configure
};
#endif

}  // namespace
