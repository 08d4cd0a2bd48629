// The library's functions for one instruction set, which the build names: `glu_forward_bf16_avx2` and so on. Each takes its arguments
// as numbers of 64 bits, a structure as its address, so that calls can be kept and made again (`replay` in cpu.cpp).
#include "attention.h"
#include "packed.h"
#include "paged.h"
#include "rows.h"

namespace {

template <class A> struct Slot {
    typedef A type;
    static A read(const uint64_t*& next) { return *(const A*)*next++; }
};
template <class A> struct Slot<const A&> {
    typedef const A& type;
    static type read(const uint64_t*& next) { return *(const A*)*next++; }
};
template <class A> struct Slot<A*> {
    typedef A* type;
    static type read(const uint64_t*& next) { return (A*)*next++; }
};
template <> struct Slot<int64_t> {
    typedef int64_t type;
    static type read(const uint64_t*& next) { return (int64_t)*next++; }
};
template <> struct Slot<float> {
    typedef float type;
    static type read(const uint64_t*& next) {
        float value;
        __builtin_memcpy(&value, next++, sizeof(value));
        return value;
    }
};

struct Call {
    template <class... A> Call(void (*function)(A...), typename Slot<A>::type... arguments) { function(arguments...); }
};
template <class... A> void call(void (*function)(A...), const uint64_t* slots) {
    Call{function, Slot<A>::read(slots)...};  // in braces: from left to right
}

}  // namespace

#define JOIN(name, type, isa) name##_##type##_##isa
#define NAMED(name, type, isa) JOIN(name, type, isa)
#define EXPORT(name, function, type) \
    extern "C" void NAMED(name, type, ISA)(const uint64_t* slots) { call(function, slots); }

#define FOR_TYPE(T, type)                                       \
    EXPORT(glu_forward, glu_forward<T>, type)                   \
    EXPORT(glu_backward, glu_backward<T>, type)                 \
    EXPORT(cross_entropy, cross_entropy<T>, type)               \
    EXPORT(add, add<T>, type)                                   \
    EXPORT(widen, widen<T>, type)                               \
    EXPORT(route, route<T>, type)                               \
    EXPORT(rotate, rotate<T>, type)                             \
    EXPORT(rotate_normed, rotate_normed<T>, type)               \
    EXPORT(rotate_backward, rotate_backward<T>, type)           \
    EXPORT(rms_norm, rms_norm<T>, type)                         \
    EXPORT(rms_norm_backward, rms_norm_backward<T>, type)       \
    EXPORT(attention_forward, attention_forward<T>, type)       \
    EXPORT(attention_backward, attention_backward<T>, type)     \
    EXPORT(lay_panels, lay_panels<T>, type)                     \
    EXPORT(lay_quantized, lay_quantized, type)                  \
    EXPORT(lay_halves, lay_halves, type)                        \
    EXPORT(product, product<T>, type)                           \
    EXPORT(experts, experts<T>, type)                           \
    EXPORT(paged_attention, paged_attention<T>, type)

FOR_TYPE(float, f32)
FOR_TYPE(bf16, bf16)
