// Which of the instruction sets that the library was compiled for this CPU, and its system, can run.
#include "constants.h"
#include <omp.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

// What native.py must agree with: raised when a function's arguments change.
extern "C" int interface() { return 5; }

// In the order of `Constants` in native.py.
extern "C" const int64_t* constants() {
    static const int64_t values[] = {PANEL, DEPTH, BLOCK};
    return values;
}

struct Call {
    void (*function)(const uint64_t* slots);
    const uint64_t* slots;
};

// One call after the other.
extern "C" void replay(int64_t count, const Call* calls) {
    for (int64_t i = 0; i < count; i++) calls[i].function(calls[i].slots);
}

// This thread's parallel loops get no other thread.
extern "C" void compute_alone() { omp_set_num_threads(1); }

// 0 plain, 1 avx2, 2 avx512, 3 avx512_bf16, 4 amx_bf16.
extern "C" int best_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512dq"))
        return 1;
    if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vnni")) return 2;
    unsigned a, b, c, d = 0;
    const bool tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);  // amx_bf16, amx_tile
    const long request_permission = 0x1023, tile_data = 18;  // of arch_prctl(2): Linux gives tiles to who asks
    return tiles && syscall(SYS_arch_prctl, request_permission, tile_data) == 0 ? 4 : 3;
#else
    return 0;
#endif
}
