// A panel of bf16 in 12 bits a weight, of which none changes: the lower byte of each as it is (an exponent's last bit, the
// mantissa), and in 4 bits which of the panel's 16 most frequent upper bytes (the sign, the exponent's first 7 bits) it has.
// A weight with another one is listed as an exception. Trained weights have few exponents; DFloat11 (Zhang et al., 2025,
// arXiv:2504.11651) gives them codes of different lengths, for GPUs. These all have one length: to decode 64 weights takes five
// instructions. A sum takes its terms in the order in which it takes them from plain panels: its bits are the same.
#pragma once
#include "constants.h"
#include "gemm.h"
#include "team.h"

namespace {

const int64_t EACH = 2 * PANEL;        // weights of a step, a pair of inputs: output 0's two, output 1's two, ...
const int64_t STEP = EACH + EACH / 2;  // bytes
const int64_t MOST_INPUTS = 1 << 18;   // that an exception can tell apart

// The bytes of a panel: 128 of this, room for exceptions (one weight in 256: more would cost time), the steps.
struct Short {
    uint8_t upper[64];  // four times the same 16
    int64_t exceptions;
    uint8_t unused[56];
    static int64_t room(int64_t inputs) { return (inputs / 4 + 15) / 16 * 16; }
    static int64_t bytes(int64_t inputs) { return (int64_t)sizeof(Short) + inputs / 2 * STEP + room(inputs) * 4; }
    // In their order: a step, which of its weights (7 bits), the upper byte (8 bits).
    const uint32_t* listed() const { return (const uint32_t*)(this + 1); }
    const uint8_t* steps(int64_t inputs) const { return (const uint8_t*)(listed() + room(inputs)); }
};

// ---- how a panel is made -------------------------------------------------------------------------------

// Where a weight of a step lies, so that `decode` can interleave lower and upper bytes as CPUs do it, in each 16 bytes alone.
INLINE int64_t place(int64_t weight) { return weight / 64 * 64 + weight % 32 / 8 * 16 + weight % 64 / 32 * 8 + weight % 8; }

struct Source {  // [N][K], either of which may lie together
    int64_t N, K, row, column;
    const bf16* x;
    // PANEL outputs x DEPTH inputs as steps in that order, zeros beyond the matrix.
    void read(int64_t output, int64_t input, uint16_t* to) const {
        const int64_t outputs = N - output < PANEL ? N - output : PANEL, inputs = K - input < DEPTH ? K - input : DEPTH;
        const bf16* from = x + output * row + input * column;
        if (outputs == PANEL && inputs == DEPTH) {  // in pairs
            typedef uint32_t pair __attribute__((may_alias));
            pair* pairs = (pair*)to;
            for (int64_t p = 0; column == 1 && p < PANEL; p++)
                for (int64_t k = 0; k < DEPTH; k += 2) __builtin_memcpy(pairs + k * 32 + place(2 * p) / 2, from + p * row + k, 4);
            for (int64_t k = 0; column != 1 && k < DEPTH; k += 2)
                for (int64_t four = 0; four < PANEL; four += 4)
                    for (int64_t p = four; p < four + 4; p++) {
                        const bf16* two = from + p * row + k * column;
                        pairs[k * 32 + place(2 * four) / 2 + p - four] = two[0].bits | (uint32_t)two[column].bits << 16;
                    }
            return;
        }
        __builtin_memset(to, 0, PANEL * DEPTH * 2);
        for (int64_t p = 0; p < outputs; p++)
            for (int64_t k = 0; k < inputs; k++) to[k / 2 * EACH + place(2 * p) + k % 2] = from[p * row + k * column].bits;
    }
};

// Whether its exceptions had room.
inline bool lay_short(const Source& source, int64_t output, uint8_t* out) {
    const int64_t inputs = padded(source.K);
    alignas(64) uint16_t weights[PANEL * DEPTH];
    int32_t counts[4][256] = {};  // neighbours are often equal: a CPU waits less when it counts them apart
    for (int64_t k = 0; k < inputs; k += DEPTH) {
        source.read(output, k, weights);
        for (int64_t i = 0; i < PANEL * DEPTH; i++) counts[i % 4][weights[i] >> 8]++;
    }
    for (int u = 0; u < 256; u++) counts[0][u] += counts[1][u] + counts[2][u] + counts[3][u];
    Short& panel = *(Short*)out;
    __builtin_memset(out, 0, sizeof(Short));
    uint8_t code[256];
    __builtin_memset(code, 16, 256);
    for (int n = 0; n < 16; n++) {
        int most = 0;
        for (int u = 1; u < 256; u++) most = counts[0][u] > counts[0][most] ? u : most;
        for (int copy = n; copy < 64; copy += 16) panel.upper[copy] = (uint8_t)most;
        code[most] = (uint8_t)n, counts[0][most] = -1;
    }
    uint32_t* listed = (uint32_t*)panel.listed();
    uint8_t* to = (uint8_t*)panel.steps(inputs);
    for (int64_t k = 0; k < inputs; k += DEPTH) {
        source.read(output, k, weights);
        for (int64_t s = 0; s < 16; s++, to += STEP) {
            const uint16_t* step = weights + s * EACH;
            uint8_t any = 0;
            for (int64_t i = 0; i < EACH; i++) to[i] = (uint8_t)step[i];
            for (int64_t i = 0; i < 64; i++) {
                const uint8_t one = code[step[i] >> 8], two = code[step[64 + i] >> 8];
                any |= one | two, to[EACH + i] = (uint8_t)((one & 15) | two << 4);
            }
            for (int64_t i = 0; any & 16 && i < EACH; i++) {
                const uint16_t weight = step[place(i)];
                if (code[weight >> 8] < 16) continue;
                if (panel.exceptions == Short::room(inputs)) return false;
                listed[panel.exceptions++] = (uint32_t)((k / 2 + s) << 15 | i << 8 | weight >> 8);
            }
        }
    }
    __builtin_memset(listed + panel.exceptions, 0, (Short::room(inputs) - panel.exceptions) * 4);
    return true;
}

// x [N][K] by strides -> panels; *fits: whether all of their exceptions had room.
inline void lay_halves(int64_t N, int64_t K, int64_t row, int64_t column, const bf16* x, uint8_t* out, int64_t* fits) {
    const Source source{N, K, row, column, x};
    const int64_t inputs = padded(K);
    int64_t failed = inputs > MOST_INPUTS;
    if (!failed) {
        parallel_for((N + PANEL - 1) / PANEL, [&](int64_t panel) {
            if (!lay_short(source, panel * PANEL, out + panel * Short::bytes(inputs))) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        });
    }
    *fits = !failed;
}

// ---- how it is read ------------------------------------------------------------------------------------

// 4 W weights of a step, from a multiple of 4 W on: first those of the W outputs from `output(from)` on, then those of 16 further.
INLINE int64_t output(int64_t from) { return from / 64 * 32 + from % 64 / 4; }
INLINE void decode(const Short& panel, const uint8_t* step, int64_t from, vu* pairs) {
    const vu lower = *(const vu_at*)(step + from);
    const vu codes = *(const vu_at*)(step + EACH + from % 64) >> (from / 64 * 4) & 0x0f0f0f0fu;
#if defined(__AVX512F__)
    const __m512i upper = _mm512_shuffle_epi8(_mm512_loadu_si512(panel.upper), (__m512i)codes);
    pairs[0] = (vu)_mm512_unpacklo_epi8((__m512i)lower, upper);
    pairs[1] = (vu)_mm512_unpackhi_epi8((__m512i)lower, upper);
#elif defined(__AVX2__)
    const __m256i upper = _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i*)panel.upper), (__m256i)codes);
    pairs[0] = (vu)_mm256_unpacklo_epi8((__m256i)lower, upper);
    pairs[1] = (vu)_mm256_unpackhi_epi8((__m256i)lower, upper);
#else
    uint8_t low[4 * W], code[4 * W];
    uint16_t made[4 * W];
    __builtin_memcpy(low, &lower, sizeof low);
    __builtin_memcpy(code, &codes, sizeof code);
    for (int i = 0; i < 4 * W; i++) made[i] = (uint16_t)(low[i] | panel.upper[code[i]] << 8);
    __builtin_memcpy(pairs, made, sizeof made);
#endif
}

// A step with exceptions, as plain panels have it; how many those are.
inline int64_t decode_listed(const Short& panel, const uint8_t* step, const uint32_t* listed, const uint32_t* end, bf16* out) {
    for (int64_t from = 0; from < EACH; from += 4 * W) {
        vu pairs[2];
        decode(panel, step, from, pairs);
        *(vu_at*)(out + 2 * output(from)) = pairs[0];
        *(vu_at*)(out + 2 * output(from) + 32) = pairs[1];
    }
    int64_t n = 0;
    for (; listed + n < end && listed[n] >> 15 == *listed >> 15; n++) {
        bf16& weight = out[listed[n] >> 8 & 127];
        weight.bits = (uint16_t)((weight.bits & 255) | listed[n] << 8);
    }
    return n;
}

template <int ROWS> INLINE void short_rows(int64_t K, const bf16* A, const Short& panel, float* C) {
    const int vectors = W == 16 ? 4 : 2;  // of sums in the registers beside one another
    const uint32_t* const end = panel.listed() + panel.exceptions;
    for (int64_t from = 0; from < EACH; from += 2 * vectors * W) {
        const uint8_t* step = panel.steps(K);
        const uint32_t* listed = panel.listed();
        vf acc[ROWS][vectors];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int i = 0; i < vectors; i++) acc[r][i] = vf{};
        for (int64_t s = 0;;) {  // what a CPU fetches ahead by itself is faster here than anything that it is told to
            const int64_t until = listed < end ? *listed >> 15 : K / 2;
            for (; s < until; s++, step += STEP) {
                vu pairs[vectors];
#pragma GCC unroll 2
                for (int i = 0; i < vectors; i += 2) decode(panel, step, from + 2 * i * W, pairs + i);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
                    for (int i = 0; i < vectors; i++) acc[r][i] = multiply_add(acc[r][i], A + r * K + 2 * s, pairs[i]);
            }
            if (s == K / 2) break;
            bf16 weights[EACH];
            listed += decode_listed(panel, step, listed, end, weights);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
                for (int i = 0; i < vectors; i++) {
                    const bf16* b = weights + 2 * (output(from + i / 2 * 4 * W) + i % 2 * 16);
                    acc[r][i] = multiply_add(acc[r][i], A + r * K + 2 * s, b);
                }
            s++, step += STEP;
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int i = 0; i < vectors; i++) store(C + r * PANEL + output(from + i / 2 * 4 * W) + i % 2 * 16, acc[r][i]);
    }
}

// C [count][PANEL] of rows [count][K].
inline void short_product(int64_t count, int64_t K, const bf16* A, const Short& panel, float* C) {
    int64_t r = 0;
    for (; r + 6 <= count; r += 6) short_rows<6>(K, A + r * K, panel, C + r * PANEL);
    switch (count - r) {
        case 5: short_rows<5>(K, A + r * K, panel, C + r * PANEL); break;
        case 4: short_rows<4>(K, A + r * K, panel, C + r * PANEL); break;
        case 3: short_rows<3>(K, A + r * K, panel, C + r * PANEL); break;
        case 2: short_rows<2>(K, A + r * K, panel, C + r * PANEL); break;
        case 1: short_rows<1>(K, A + r * K, panel, C + r * PANEL); break;
    }
}

}  // namespace
