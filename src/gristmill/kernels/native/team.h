// Loops that several threads share, see team.cpp.
#pragma once
#include "simd.h"

extern "C" void team_run(int64_t count, int64_t run, void (*body)(const void* context, int64_t from, int64_t to), const void* context);

namespace {

// body(i) for each i from 0 to count - 1, in any order. A thread takes at least `few` at a time: fewer are not worth another thread.
template <class F> void parallel_for(int64_t count, int64_t few, const F& body) {
    team_run(count, few > 1 ? few : 1, [](const void* context, int64_t from, int64_t to) {
        for (int64_t i = from; i < to; i++) (*(const F*)context)(i);
    }, &body);
}
template <class F> void parallel_for(int64_t count, const F& body) { parallel_for(count, 1, body); }

}  // namespace
