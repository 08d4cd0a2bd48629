// Vectors of W floats, bf16 in and out, exp. Written once in the compiler's vector types; each file is compiled for
// several instruction sets, and only what a compiler cannot find by itself has intrinsics.
//
// No standard library here: an inline function of it, compiled for a newer CPU, could be the copy that the linker keeps.
#pragma once
#include <stdint.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define W 16
#elif defined(__AVX2__)
#define W 8
#else
#define W 4
#endif

#define INLINE static inline __attribute__((always_inline))

namespace {

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef float vf_at __attribute__((vector_size(4 * W), aligned(4), may_alias));     // at any address
typedef uint32_t vu_at __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t vh_at __attribute__((vector_size(2 * W), aligned(2), may_alias));

struct bf16 {
    uint16_t bits;
};

INLINE vf splat(float x) { return x - vf{}; }
INLINE vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }
INLINE vf larger(vf a, vf b) { return select(a > b, a, b); }

INLINE vf load(const float* p) { return *(const vf_at*)p; }
INLINE void store(float* p, vf x) { *(vf_at*)p = x; }

INLINE vf load(const bf16* p) { return (vf)(__builtin_convertvector((vh)(*(const vh_at*)p), vu) << 16); }

INLINE vh to_bf16(vf x) {  // rounds to nearest even, as torch does; what is not a number stays so
#if defined(__AVX512BF16__)
    return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
    vu bits = (vu)x;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vu nan = (vu)(x != x);
    return __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), vh);
#endif
}
INLINE void store(bf16* p, vf x) { *(vh_at*)p = to_bf16(x); }

INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) {
    union { uint32_t bits; float value; } both = {(uint32_t)x.bits << 16};
    return both.value;
}
INLINE void assign(float& to, float x) { to = x; }
INLINE void assign(bf16& to, float x) { to = {to_bf16(splat(x))[0]}; }

// Up to W elements at p; the others are `fill`. The same vector arithmetic then serves a row's end.
template <class T> INLINE vf load_some(const T* p, int64_t n, float fill) {
    if (n >= W) return load(p);
    vf x = splat(fill);
    for (int64_t i = 0; i < n; i++) x[i] = to_float(p[i]);
    return x;
}
template <class T> INLINE void store_some(T* p, int64_t n, vf x) {
    if (n >= W) return store(p, x);
    for (int64_t i = 0; i < n; i++) assign(p[i], x[i]);
}

INLINE vi lane_numbers() {
    vi x;
    for (int i = 0; i < W; i++) x[i] = i;
    return x;
}

// Over the lanes, by halves.
INLINE float sum(vf x) {
#pragma GCC unroll 4
    for (int half = W / 2; half > 0; half /= 2) x += __builtin_shuffle(x, lane_numbers() ^ half);
    return x[0];
}
INLINE float max(vf x) {
#pragma GCC unroll 4
    for (int half = W / 2; half > 0; half /= 2) x = larger(x, __builtin_shuffle(x, lane_numbers() ^ half));
    return x[0];
}

// exp to within 2 units in the last place: 2^n times a polynomial of what is left (Cephes, Moshier 1989).
// Below -87 it is 0: no denormal numbers. Above 88.37 it is what it is there.
INLINE vf exp(vf x) {
    const float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
    vf clamped = select(x < 88.37f, x, splat(88.37f));
    vf shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's lowest bits are the nearest integer
    vi n = (vi)shifted - 0x4b400000;
    vf whole = shifted - 12582912.0f;
    vf r = clamped - whole * ln2_high - whole * ln2_low;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vf scale = (vf)((n + 127) << 23);
    vf result = select(x > -87.0f, p * scale, splat(0.0f));
    return select(x != x, x, result);
}

INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

}  // namespace
