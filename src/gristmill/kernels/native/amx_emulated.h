// AMX's tile instructions in plain C++, so that the code above them is tested on machines without AMX.
#pragma once
#include "simd.h"

namespace {

static thread_local uint8_t amx_tile[8][16][64];

INLINE void _tile_loadconfig(const void*) {}
INLINE void _tile_release() {}
INLINE void _tile_zero(int t) { __builtin_memset(amx_tile[t], 0, sizeof amx_tile[t]); }
INLINE void _tile_loadd(int t, const void* base, int64_t stride) {
    for (int r = 0; r < 16; r++) __builtin_memcpy(amx_tile[t][r], (const uint8_t*)base + r * stride, 64);
}
INLINE void _tile_stored(int t, void* base, int64_t stride) {
    for (int r = 0; r < 16; r++) __builtin_memcpy((uint8_t*)base + r * stride, amx_tile[t][r], 64);
}
static void _tile_dpbf16ps(int c, int a, int b) {
    for (int m = 0; m < 16; m++) {
        float sum[16];
        bf16 left[32], right[32];
        __builtin_memcpy(sum, amx_tile[c][m], 64);
        __builtin_memcpy(left, amx_tile[a][m], 64);
        for (int k = 0; k < 16; k++) {
            __builtin_memcpy(right, amx_tile[b][k], 64);
            for (int n = 0; n < 16; n++)
                for (int i = 0; i < 2; i++) sum[n] += to_float(left[2 * k + i]) * to_float(right[2 * n + i]);
        }
        __builtin_memcpy(amx_tile[c][m], sum, 64);
    }
}

}  // namespace
