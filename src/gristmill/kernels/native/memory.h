// Working memory: freed at the end of its scope, in pieces that begin at a multiple of 64 bytes.
#pragma once
#include <stdint.h>

extern "C" void* malloc(__SIZE_TYPE__);
extern "C" void free(void*);

namespace {

struct Arena {
    uint8_t *base, *next;
    explicit Arena(int64_t bytes) : base((uint8_t*)malloc(bytes + 64)), next(base + 64 - (uintptr_t)base % 64) {
        if (!base) __builtin_trap();
    }
    ~Arena() { free(base); }
    Arena(const Arena&) = delete;
    template <class T> T* take(int64_t count) {
        T* piece = (T*)next;
        next += (count * (int64_t)sizeof(T) + 63) / 64 * 64;
        return piece;
    }
};

template <class T> struct Buffer : Arena {
    T* data;
    explicit Buffer(int64_t count) : Arena(count * (int64_t)sizeof(T)), data((T*)next) {}
};

}  // namespace
