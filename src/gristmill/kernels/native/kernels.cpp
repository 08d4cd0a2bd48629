// The library's functions for one instruction set, which the build names: `glu_forward_bf16_avx2` and so on.
#include "attention.h"
#include "packed.h"
#include "paged.h"
#include "rows.h"

#define JOIN(name, type, isa) name##_##type##_##isa
#define NAMED(name, type, isa) JOIN(name, type, isa)

#define FOR_TYPE(T, type)                                                                                                \
    extern "C" void NAMED(glu_forward, type, ISA)(int64_t P, int64_t F, const T* h, const float* weight, T* act) {       \
        glu_forward(P, F, h, weight, act);                                                                               \
    }                                                                                                                    \
    extern "C" void NAMED(glu_backward, type, ISA)(int64_t P, int64_t F, const T* h, const float* weight, const T* grad, \
                                                   T* act, T* dh, float* dweight) {                                      \
        glu_backward(P, F, h, weight, grad, act, dh, dweight);                                                           \
    }                                                                                                                    \
    extern "C" void NAMED(cross_entropy, type, ISA)(int64_t rows, int64_t V, T* logits, const int64_t* targets,          \
                                                    float* nll) {                                                        \
        cross_entropy(rows, V, logits, targets, nll);                                                                    \
    }                                                                                                                    \
    extern "C" void NAMED(rotate, type, ISA)(int64_t tokens, int64_t N, int64_t C, int64_t turned, const T* x,           \
                                             int64_t stride, const float* cos, const float* sin, float clip, T* out) {   \
        rotate(tokens, N, C, turned, x, stride, cos, sin, clip, out);                                                    \
    }                                                                                                                    \
    extern "C" void NAMED(rotate_normed, type, ISA)(int64_t tokens, int64_t N, int64_t C, int64_t queries, int64_t keys, \
                                                    const T* x, int64_t stride, const float* q_weight,                   \
                                                    const float* k_weight, float eps, const float* cos,                  \
                                                    const float* sin, T* out) {                                          \
        rotate_normed(tokens, N, C, queries, keys, x, stride, q_weight, k_weight, eps, cos, sin, out);                   \
    }                                                                                                                    \
    extern "C" void NAMED(rotate_backward, type, ISA)(int64_t tokens, int64_t N, int64_t C, int64_t turned, const T* x,  \
                                                      int64_t stride, const float* cos, const float* sin, float clip,    \
                                                      const T* grad, T* dx) {                                            \
        rotate_backward(tokens, N, C, turned, x, stride, cos, sin, clip, grad, dx);                                      \
    }                                                                                                                    \
    extern "C" void NAMED(rms_norm, type, ISA)(int64_t N, int64_t D, const T* x, const float* weight, float eps, T* out, \
                                               float* inverse) {                                                         \
        rms_norm(N, D, x, weight, eps, out, inverse);                                                                    \
    }                                                                                                                    \
    extern "C" void NAMED(rms_norm_backward, type, ISA)(int64_t N, int64_t D, int64_t parts, const T* x,                 \
                                                        const float* weight, const float* inverse, const T* grad, T* dx, \
                                                        float* dweight) {                                                \
        rms_norm_backward(N, D, parts, x, weight, inverse, grad, dx, dweight);                                           \
    }                                                                                                                    \
    extern "C" void NAMED(attention_forward, type, ISA)(Sizes z, Heads<const T> q, Heads<const T> k, Heads<const T> v,   \
                                                        T* out, float* lse) {                                            \
        attention_forward(z, q, k, v, out, lse);                                                                         \
    }                                                                                                                    \
    extern "C" void NAMED(attention_backward, type, ISA)(Sizes z, Heads<const T> q, Heads<const T> k, Heads<const T> v,  \
                                                         Heads<const T> out, Heads<const T> grad, const float* lse,      \
                                                         T* dq, float* dk, float* dv) {                                  \
        attention_backward(z, q, k, v, out, grad, lse, dq, dk, dv);                                                      \
    }                                                                                                                    \
    extern "C" void NAMED(lay_panels, type, ISA)(int64_t count, int64_t M, const T* x, T* out) {                         \
        lay_panels(count, M, x, out);                                                                                    \
    }                                                                                                                    \
    extern "C" void NAMED(lay_quantized, type, ISA)(int64_t bits, int64_t N, int64_t J, int64_t group,                   \
                                                    const uint32_t* words, const bf16* scales, uint8_t* out) {           \
        lay_quantized(bits, N, J, group, words, scales, out);                                                            \
    }                                                                                                                    \
    extern "C" void NAMED(product, type, ISA)(int64_t rows, const T* x, Matrix w, T* out) { product(rows, x, w, out); }  \
    extern "C" void NAMED(experts, type, ISA)(Sizes3 z, const T* x, const float* weights, const int64_t* ids,            \
                                              const uint8_t* const* places, T* out) {                                    \
        experts(z, x, weights, ids, places, out);                                                                        \
    }                                                                                                                    \
    extern "C" void NAMED(paged_attention, type, ISA)(PagedSizes z, Heads<const T> q, Heads<const T> k,                  \
                                                      Heads<const T> v, T* keys, T* values, T* out) {                    \
        paged_attention(z, q, k, v, keys, values, out);                                                                  \
    }

FOR_TYPE(float, f32)
FOR_TYPE(bf16, bf16)
