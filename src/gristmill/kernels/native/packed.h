// y[rows, N] = x[rows, K] Wᵀ with a matrix that was arranged for it once (packed.py says how): panels of PANEL outputs, whose
// inputs follow one another, so that a step of decoding reads each weight once, in order.
//
// A row's sums are added in one fixed order, whatever rows stand beside it: no batch changes a bit.
//
// Kinds: fp32 and bf16 as they are, bf16 in 12 bits (halves.h), and whole numbers of 8 or 4 bits with a scale for each group of
// inputs. For these the row, too, becomes whole numbers, of 16 bits with a scale for each group: products and their sums are then
// exact within a group.
#pragma once
#include "halves.h"
#include "memory.h"

namespace {

const int64_t CHUNK = 48;    // rows whose sums stay in the cache; a multiple of 16, and of 6
const int64_t AHEAD = 4096;  // bytes that are fetched before they are needed

enum Kind { FLOATS, HALVES, BYTES, NIBBLES, SHORT };

struct Matrix {
    const uint8_t* data;
    int64_t kind, N, K, group;
    int64_t inputs() const { return padded(K); }
    int64_t groups() const { return K / group; }
    int64_t panels() const { return (N + PANEL - 1) / PANEL; }
    int64_t panel_bytes() const {
        switch (kind) {
            case FLOATS: return inputs() * PANEL * 4;
            case HALVES: return inputs() * PANEL * 2;
            case SHORT: return Short::bytes(inputs());
            case BYTES: return groups() * PANEL * (2 + group);
            default: return groups() * PANEL * (2 + group / 2);
        }
    }
    const uint8_t* panel(int64_t number) const { return data + number * panel_bytes(); }
    int64_t bytes() const { return panels() * panel_bytes(); }
};

const int64_t ROW_TILE = HAS_TILES ? 16 : 1;
INLINE int64_t tiled(int64_t rows) { return (rows + ROW_TILE - 1) / ROW_TILE * ROW_TILE; }

// [count][PANEL][M] -> [count][M][PANEL] of what four bytes, or two, hold: how a panel is made.
template <class U> void lay_panels(int64_t count, int64_t M, const U* x, U* out) {
    const int64_t strip = 64 / sizeof(U);
    parallel_for(count, [&](int64_t n) {
        for (int64_t from = 0; from < M; from += strip)
            for (int64_t p = 0; p < PANEL; p++)
                for (int64_t m = from; m < from + strip && m < M; m++)
                    out[(n * M + m) * PANEL + p] = x[(n * PANEL + p) * M + m];
    });
}

// The same of whole numbers in words, from the lowest bits up, counted from -2^(bits-1): words [N][K * bits / 32], scales [N][J].
inline void lay_quantized(int64_t bits, int64_t N, int64_t J, int64_t group, const uint32_t* words, const bf16* scales, uint8_t* out) {
    const int64_t each = group * bits / 32, panels = (N + PANEL - 1) / PANEL, bytes = PANEL * (2 + group * bits / 8);
    parallel_for(panels * J, [&](int64_t task) {
        const int64_t first = task / J * PANEL, j = task % J;
        bf16* scale = (bf16*)(out + task * bytes);
        for (int64_t r = 0; r < PANEL; r++) {
            const bool inside = first + r < N;
            scale[r] = inside ? scales[(first + r) * J + j] : bf16{0};
            for (int64_t m = 0; m < each; m++) {
                const uint32_t word = inside ? words[((first + r) * J + j) * each + m] : bits == 4 ? 0x88888888u : 0x80808080u;
                if (bits == 4) {  // inputs 0, 2, 4, 6 in the lower half, the others in the upper
                    uint32_t even = word & 0x0f0f0f0fu, odd = word >> 4 & 0x0f0f0f0fu;
                    even = (even | even >> 4) & 0x00ff00ffu, odd = (odd | odd >> 4) & 0x00ff00ffu;
                    even = (even | even >> 8) & 0xffffu, odd = (odd | odd >> 8) & 0xffffu;
                    ((uint32_t*)(scale + PANEL))[m * PANEL + r] = even | odd << 16;
                } else {
                    const uint32_t codes = word ^ 0x80808080u;
                    uint16_t* to = (uint16_t*)(scale + PANEL) + 2 * m * PANEL + r;
                    to[0] = (uint16_t)codes, to[PANEL] = (uint16_t)(codes >> 16);
                }
            }
        }
    });
}

// ---- rows as they are ----------------------------------------------------------------------------------

template <class T> struct Rows {
    int64_t inputs;
    Buffer<T> values;
    Rows(int64_t rows, const Matrix& w) : inputs(w.inputs()), values(tiled(rows) * w.inputs()) {}
    void set(int64_t row, const T* x, int64_t K) {
        T* to = values.data + row * inputs;
        __builtin_memcpy(to, x, K * sizeof(T));
        __builtin_memset(to + K, 0, (inputs - K) * sizeof(T));
    }
};

// together: vectors of sums in the registers beside one another. The first `outputs` are computed.
template <int ROWS, int together, class T> INLINE void panel_rows(int64_t K, int64_t outputs, const T* A, const T* B, float* C) {
    const int step = Pair<T>::rows;
    for (int v = 0; v * W < outputs; v += together) {
        const T* b = B + v * W * step;
        vf acc[ROWS][4];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int i = 0; i < together; i++) acc[r][i] = vf{};
        for (int64_t k = 0; k < K; k += step, b += step * PANEL) {
            if (ROWS < 3) __builtin_prefetch((const uint8_t*)b + AHEAD);
            if (ROWS < 3 && together * W * step * sizeof(T) > 64) {
                __builtin_prefetch((const uint8_t*)b + AHEAD + 64);
                __builtin_prefetch((const uint8_t*)b + AHEAD + 128);
                __builtin_prefetch((const uint8_t*)b + AHEAD + 192);
            }
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
                for (int i = 0; i < together; i++) acc[r][i] = multiply_add(acc[r][i], A + r * K + k, b + i * W * step);
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int i = 0; i < together; i++) store(C + r * PANEL + (v + i) * W, acc[r][i]);
    }
}

template <int together, class T> void panel_rows(int64_t count, int64_t K, int64_t outputs, const T* A, const T* B, float* C) {
    int64_t r = 0;
    for (; r + 6 <= count; r += 6) panel_rows<6, together>(K, outputs, A + r * K, B, C + r * PANEL);
    switch (count - r) {
        case 5: panel_rows<5, together>(K, outputs, A + r * K, B, C + r * PANEL); break;
        case 4: panel_rows<4, together>(K, outputs, A + r * K, B, C + r * PANEL); break;
        case 3: panel_rows<3, together>(K, outputs, A + r * K, B, C + r * PANEL); break;
        case 2: panel_rows<2, together>(K, outputs, A + r * K, B, C + r * PANEL); break;
        case 1: panel_rows<1, together>(K, outputs, A + r * K, B, C + r * PANEL); break;
    }
}

// C [count][PANEL]: sums of rows from `first` on, of one panel.
template <class T> void panel_product(const Rows<T>& x, int64_t first, int64_t count, const Matrix& w, const uint8_t* panel, float* C) {
    const T *A = x.values.data + first * x.inputs, *B = (const T*)panel;
    const int64_t K = x.inputs;
    if (sizeof(T) == 2 && w.kind == SHORT) return short_product(count, K, (const bf16*)A, *(const Short*)panel, C);
#if defined(HAS_AMX)
    if (sizeof(T) == 2) {
        Tiles configured;
        gemm<T>(false, tiled(count), PANEL, K, A, K, B, PANEL, C, PANEL);
        return;
    }
#endif
    if (w.N <= W) panel_rows<1>(count, K, w.N, A, B, C);  // a router of few experts
    else panel_rows<W == 16 ? 4 : W == 8 ? 2 : 1>(count, K, PANEL, A, B, C);
}

// ---- rows as whole numbers -----------------------------------------------------------------------------

typedef int16_t vs __attribute__((vector_size(2 * W)));
typedef int16_t vs_at __attribute__((vector_size(2 * W), aligned(2), may_alias));

struct Whole {
    int64_t inputs, groups, group;
    Buffer<int16_t> codes;
    Buffer<float> scales;
    Buffer<int32_t> sums;
    Whole(int64_t rows, const Matrix& w)
        : inputs(w.K), groups(w.groups()), group(w.group), codes(rows * w.K), scales(rows * w.groups()), sums(rows * w.groups()) {}
    template <class T> void set(int64_t row, const T* x, int64_t) {
        for (int64_t j = 0; j < groups; j++) {
            const T* from = x + j * group;
            vf most = {};
            for (int64_t i = 0; i < group; i += W) {
                vf value = load(from + i);
                most = larger(most, larger(value, -value));
            }
            const float largest = max(most), inverse = largest > 0 ? 32767.0f / largest : 0;
            vi total = {};
            for (int64_t i = 0; i < group; i += W) {
                vi code = (vi)(load(from + i) * inverse + 12582912.0f) - 0x4b400000;  // to the nearest, see `exp`
                total += code;
                *(vs_at*)(codes.data + row * inputs + j * group + i) = __builtin_convertvector(code, vs);
            }
            int32_t sum = 0;
            for (int i = 0; i < W; i++) sum += total[i];
            scales.data[row * groups + j] = largest * (1.0f / 32767.0f);
            sums.data[row * groups + j] = sum;
        }
    }
};

// W sums of products of two numbers of 16 bits.
INLINE vi pair_dot(vi sum, vi pairs, int32_t two) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)pairs, _mm512_set1_epi32(two));
#elif defined(__AVX512F__)
    return sum + (vi)_mm512_madd_epi16((__m512i)pairs, _mm512_set1_epi32(two));
#elif defined(__AVX2__)
    return sum + (vi)_mm256_madd_epi16((__m256i)pairs, _mm256_set1_epi32(two));
#else
    const int32_t low = (int16_t)(uint16_t)two, high = two >> 16;
    return sum + ((vi)((vu)pairs << 16) >> 16) * low + (pairs >> 16) * high;
#endif
}

// 2 W bytes with a sign, as pairs of 16 bits.
INLINE vi widened(const int8_t* p) {
    typedef int8_t vb_at __attribute__((vector_size(2 * W), aligned(1), may_alias));
    typedef int16_t vp __attribute__((vector_size(4 * W)));
    return (vi)__builtin_convertvector(*(const vb_at*)p, vp);
}

template <int ROWS, int BITS>
INLINE void panel_whole(const Whole& x, int64_t first, const uint8_t* panel, float* C) {
    typedef int32_t two_at __attribute__((may_alias, aligned(2)));
    const int vectors = 64 / W, together = W == 16 ? 4 : W == 8 ? 2 : 1;
    const int64_t group = x.group, bytes = PANEL * (2 + group * BITS / 8);
    for (int v = 0; v < vectors; v += together) {
        vf total[ROWS][4];
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < together; i++) total[r][i] = vf{};
        for (int64_t j = 0; j < x.groups; j++) {
            const uint8_t* scales = panel + j * bytes;
            const uint8_t* codes = scales + PANEL * 2;
            vi acc[ROWS][4];
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
                for (int i = 0; i < together; i++)
                    acc[r][i] = vi{} - (BITS == 4 ? 8 * x.sums.data[(first + r) * x.groups + j] : 0);
            const int16_t* a = x.codes.data + first * x.inputs + j * group;
            if (BITS == 8) {
                const int8_t* b = (const int8_t*)codes + v * W * 2;
                for (int64_t k = 0; k < group; k += 2, b += PANEL * 2) {
                    if (ROWS < 5) {
                        __builtin_prefetch(b + AHEAD);
                        __builtin_prefetch(b + AHEAD + 64);
                    }
#pragma GCC unroll 4
                    for (int i = 0; i < together; i++) {
                        const vi pairs = widened(b + i * W * 2);
#pragma GCC unroll 8
                        for (int r = 0; r < ROWS; r++)
                            acc[r][i] = pair_dot(acc[r][i], pairs, *(const two_at*)(a + r * x.inputs + k));
                    }
                }
            } else {
                const uint8_t* b = codes + v * W * 4;
                for (int64_t k = 0; k < group; k += 8, b += PANEL * 4) {
                    if (ROWS < 5) {
                        __builtin_prefetch(b + AHEAD);
                        __builtin_prefetch(b + AHEAD + 64);
                        __builtin_prefetch(b + AHEAD + 128);
                        __builtin_prefetch(b + AHEAD + 192);
                    }
#pragma GCC unroll 4
                    for (int i = 0; i < together; i++) {
                        const vu four = *(const vu_at*)(b + i * W * 4);
#pragma GCC unroll 4
                        for (int n = 0; n < 4; n++) {
                            const vi pairs = (vi)((four >> (4 * n)) & 0x000f000fu);
#pragma GCC unroll 8
                            for (int r = 0; r < ROWS; r++)
                                acc[r][i] = pair_dot(acc[r][i], pairs, *(const two_at*)(a + r * x.inputs + k + 2 * n));
                        }
                    }
                }
            }
#pragma GCC unroll 4
            for (int i = 0; i < together; i++) {
                const vf scale = load((const bf16*)scales + (v + i) * W);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) {
                    const vf part = __builtin_convertvector(acc[r][i], vf) * scale;
                    total[r][i] = total[r][i] + part * x.scales.data[(first + r) * x.groups + j];
                }
            }
        }
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < together; i++) store(C + r * PANEL + (v + i) * W, total[r][i]);
    }
}

template <int BITS> void panel_whole(const Whole& x, int64_t first, int64_t count, const uint8_t* panel, float* C) {
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) panel_whole<4, BITS>(x, first + r, panel, C + r * PANEL);
    switch (count - r) {
        case 3: panel_whole<3, BITS>(x, first + r, panel, C + r * PANEL); break;
        case 2: panel_whole<2, BITS>(x, first + r, panel, C + r * PANEL); break;
        case 1: panel_whole<1, BITS>(x, first + r, panel, C + r * PANEL); break;
    }
}

inline void panel_product(const Whole& x, int64_t first, int64_t count, const Matrix& w, const uint8_t* panel, float* C) {
    if (w.kind == BYTES) panel_whole<8>(x, first, count, panel, C);
    else panel_whole<4>(x, first, count, panel, C);
}

// ---- one matrix ----------------------------------------------------------------------------------------

const int64_t SHORT_COPY = 16384;  // numbers that one thread arranges sooner than another one wakes

template <class Left, class T> void product_with(int64_t rows, const T* x, const Matrix& w, T* out) {
    Left left(rows, w);
    parallel_for(rows, SHORT_COPY / w.K, [&](int64_t row) { left.set(row, x + row * w.K, w.K); });
    parallel_for(w.panels(), [&](int64_t number) {
        float sums[CHUNK * PANEL];
        const int64_t column = number * PANEL, width = w.N - column < PANEL ? w.N - column : PANEL;
        for (int64_t first = 0; first < rows; first += CHUNK) {
            const int64_t count = rows - first < CHUNK ? rows - first : CHUNK;
            panel_product(left, first, count, w, w.panel(number), sums);
            for (int64_t r = 0; r < count; r++)
                for (int64_t i = 0; i < width; i += W)
                    store_some(out + (first + r) * w.N + column + i, width - i, load(sums + r * PANEL + i));
        }
    });
}

// x [rows, K] -> out [rows, N].
template <class T> void product(int64_t rows, const T* x, const Matrix& w, T* out) {
    if (w.kind == BYTES || w.kind == NIBBLES) product_with<Whole>(rows, x, w, out);
    else product_with<Rows<T>>(rows, x, w, out);
}

// ---- the experts of a layer ----------------------------------------------------------------------------

struct Sizes3 {
    int64_t tokens, top_k, experts, D, F, kind, group;
};

// Which rows are whose: those of one expert together, in the order of their tokens, from a multiple of ROW_TILE on.
struct Assignments {
    Buffer<int64_t> row, first, count, chosen;  // of each assignment; of each expert; the experts that have rows
    int64_t rows = 0, num_chosen = 0;
    Assignments(const Sizes3& z, const int64_t* ids)
        : row(z.tokens * z.top_k), first(z.experts), count(z.experts), chosen(z.experts) {
        for (int64_t e = 0; e < z.experts; e++) count.data[e] = 0;
        for (int64_t a = 0; a < z.tokens * z.top_k; a++) row.data[a] = count.data[ids[a]]++;
        for (int64_t e = 0; e < z.experts; e++) {
            first.data[e] = rows;
            rows += tiled(count.data[e]);
            if (count.data[e]) chosen.data[num_chosen++] = e;
        }
        for (int64_t a = 0; a < z.tokens * z.top_k; a++) row.data[a] += first.data[ids[a]];
    }
};

template <class T> INLINE vf rounded(vf x) {  // as it is when it was stored
    T stored[W];
    store(stored, x);
    return load(stored);
}

// x [tokens, D], weights and ids [tokens, top_k] -> out [tokens, D]: the sum over a token's experts of
// (weight * silu(x w1ᵀ) * (x v1ᵀ)) w2. places[e]: the expert's panels, of w1 and v1 in turn, then of w2ᵀ.
template <class Left, class T>
void experts_with(const Sizes3& z, const T* x, const float* weights, const int64_t* ids, const uint8_t* const* places, T* out) {
    const Matrix up{nullptr, z.kind, z.F, z.D, z.group}, down{nullptr, z.kind, z.D, z.F, z.group};
    const Assignments to(z, ids);
    Left inner(to.rows, up), hidden(to.rows, down);
    Buffer<T> acts(to.rows * z.F), results(to.rows * z.D);
    Buffer<float> weight(to.rows);
    parallel_for(z.tokens * z.top_k, SHORT_COPY / z.D, [&](int64_t a) {
        inner.set(to.row.data[a], x + a / z.top_k * z.D, z.D);
        weight.data[to.row.data[a]] = weights[a];
    });
    parallel_for(to.num_chosen * up.panels(), [&](int64_t task) {
        float gate[CHUNK * PANEL], sums[CHUNK * PANEL];
        const int64_t e = to.chosen.data[task / up.panels()], number = task % up.panels(), column = number * PANEL;
        const int64_t width = z.F - column < PANEL ? z.F - column : PANEL, end = to.first.data[e] + to.count.data[e];
        for (int64_t first = to.first.data[e]; first < end; first += CHUNK) {
            const int64_t count = end - first < CHUNK ? end - first : CHUNK;
            panel_product(inner, first, count, up, places[e] + 2 * number * up.panel_bytes(), gate);
            panel_product(inner, first, count, up, places[e] + (2 * number + 1) * up.panel_bytes(), sums);
            for (int64_t r = 0; r < count; r++)
                for (int64_t i = 0; i < width; i += W) {
                    vf g = rounded<T>(load(gate + r * PANEL + i)), u = rounded<T>(load(sums + r * PANEL + i));
                    store_some(acts.data + (first + r) * z.F + column + i, width - i, g * sigmoid(g) * u * weight.data[first + r]);
                }
        }
    });
    parallel_for(z.tokens * z.top_k, SHORT_COPY / z.F, [&](int64_t a) {
        hidden.set(to.row.data[a], acts.data + to.row.data[a] * z.F, z.F);
    });
    parallel_for(to.num_chosen * down.panels(), [&](int64_t task) {
        float sums[CHUNK * PANEL];
        const int64_t e = to.chosen.data[task / down.panels()], number = task % down.panels(), column = number * PANEL;
        const int64_t width = z.D - column < PANEL ? z.D - column : PANEL, end = to.first.data[e] + to.count.data[e];
        for (int64_t first = to.first.data[e]; first < end; first += CHUNK) {
            const int64_t count = end - first < CHUNK ? end - first : CHUNK;
            panel_product(hidden, first, count, down, places[e] + 2 * up.bytes() + number * down.panel_bytes(), sums);
            for (int64_t r = 0; r < count; r++)
                for (int64_t i = 0; i < width; i += W)
                    store_some(results.data + (first + r) * z.D + column + i, width - i, load(sums + r * PANEL + i));
        }
    });
    parallel_for(z.tokens, SHORT_COPY / (z.top_k * z.D), [&](int64_t t) {
        for (int64_t i = 0; i < z.D; i += W) {
            vf sum = {};
            for (int64_t k = 0; k < z.top_k; k++)
                sum += load_some(results.data + to.row.data[t * z.top_k + k] * z.D + i, z.D - i, 0);
            store_some(out + t * z.D + i, z.D - i, sum);
        }
    });
}

template <class T>
void experts(const Sizes3& z, const T* x, const float* weights, const int64_t* ids, const uint8_t* const* places, T* out) {
    if (z.kind == BYTES || z.kind == NIBBLES) experts_with<Whole>(z, x, weights, ids, places, out);
    else experts_with<Rows<T>>(z, x, weights, ids, places, out);
}

}  // namespace
