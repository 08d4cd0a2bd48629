// Causal attention over packed documents, block by block (FlashAttention, Dao et al., 2022, arXiv:2205.14135).
//
// B sequences, S positions, H query heads, G key heads (H a multiple of G), C head size; starts[b][s] is the first position of the
// document that s belongs to. One thread takes one query head of one sequence. Blocks of keys that no query of the block
// may see are skipped. Blocks are padded with zeros to BLOCK positions and to a head size that is a multiple of DEPTH.
#pragma once
#include "constants.h"
#include "gemm.h"
#include "memory.h"
#include "team.h"

namespace {

template <class T> struct Heads {  // a tensor [B, S, heads, C] whose last dimension lies together
    T* data;
    int64_t batch, position, head;  // strides in elements
    T* row(int64_t b, int64_t s, int64_t h) const { return data + b * batch + s * position + h * head; }
};

struct Sizes {
    int64_t B, S, H, G, C;
    float scale;
    const int64_t* starts;
    int64_t padded_head() const { return padded(C); }
    int64_t padded_length() const { return (S + BLOCK - 1) / BLOCK * BLOCK; }
};

// BLOCK positions from `first` on of head h as the left side of a product: rows [BLOCK][padded head] ...
template <class T> void as_rows(const Heads<const T>& x, const Sizes& z, int64_t b, int64_t h, int64_t first, T* out) {
    const int64_t width = z.padded_head();
    for (int64_t i = 0; i < BLOCK; i++) {
        const int64_t inside = first + i < z.S ? z.C : 0;
        if (inside) __builtin_memcpy(out + i * width, x.row(b, first + i, h), inside * sizeof(T));
        __builtin_memset(out + i * width + inside, 0, (width - inside) * sizeof(T));
    }
}

// ... or columns, [padded head][BLOCK].
template <class T> void as_columns(const Heads<const T>& x, const Sizes& z, int64_t b, int64_t h, int64_t first, T* out) {
    for (int64_t i = 0; i < BLOCK; i++) {
        const int64_t inside = first + i < z.S ? z.C : 0;
        const T* row = x.row(b, inside ? first + i : 0, h);
        for (int64_t c = 0; c < inside; c++) out[c * BLOCK + i] = row[c];
        for (int64_t c = inside; c < z.padded_head(); c++) out[c * BLOCK + i] = T{};
    }
}

// As the right side of a product over the head size, packed for `gemm`: [padded head][BLOCK], where four bytes (one fp32
// number, or two bf16 ones) stay together. C is even.
template <class T> void pack_columns(const Heads<const T>& x, const Sizes& z, int64_t b, int64_t h, int64_t first, T* out) {
    typedef uint32_t __attribute__((may_alias, aligned(2))) unit;
    const int64_t units = z.C / Pair<T>::rows, all = z.padded_head() / Pair<T>::rows;
    for (int64_t i = 0; i < BLOCK; i++) {
        const int64_t inside = first + i < z.S ? units : 0;
        const unit* row = (const unit*)x.row(b, inside ? first + i : 0, h);
        unit* column = (unit*)out + i;
        for (int64_t u = 0; u < inside; u++) column[u * BLOCK] = row[u];
        for (int64_t u = inside; u < all; u++) column[u * BLOCK] = 0;
    }
}

// As the right side of a product over positions.
INLINE void pair_rows(const float* upper, const float*, int64_t C, float* out) { __builtin_memcpy(out, upper, C * 4); }
INLINE void pair_rows(const bf16* upper, const bf16* lower, int64_t C, bf16* out) {
    typedef uint32_t __attribute__((may_alias, aligned(2))) unit;
    for (int64_t c = 0; c < C; c++) ((unit*)out)[c] = upper[c].bits | (lower ? (uint32_t)lower[c].bits << 16 : 0);
}
template <class T> void pack_rows(const Heads<const T>& x, const Sizes& z, int64_t b, int64_t h, int64_t first, T* out) {
    const int64_t pair = Pair<T>::rows, width = z.padded_head(), rows = z.S - first < BLOCK ? z.S - first : BLOCK;
    __builtin_memset(out, 0, BLOCK * width * sizeof(T));
    for (int64_t i = 0; i < rows; i += pair) {
        const T *upper = x.row(b, first + i, h), *lower = i + 1 < rows ? x.row(b, first + i + 1, h) : nullptr;
        pair_rows(upper, lower, z.C, out + i * width);
    }
}

// Two rows of BLOCK numbers as the right side of a product over rows.
INLINE void store_pair(float* out, int64_t j, vf upper, vf lower) {
    store(out + j, upper);
    store(out + BLOCK + j, lower);
}
INLINE void store_pair(bf16* out, int64_t j, vf upper, vf lower) {
    vu pairs = __builtin_convertvector(to_bf16(upper), vu) | (__builtin_convertvector(to_bf16(lower), vu) << 16);
    *(vu_at*)(out + 2 * j) = pairs;
}

// Which of W keys from `key` on a query sees: those from its document's start to itself.
INLINE vi visible(int64_t key, int64_t start, int64_t query) {
    vi number = lane_numbers();
    return (number >= (int32_t)(start - key)) & (number <= (int32_t)(query - key));
}

// The softmax over blocks of keys as it goes, of up to BLOCK rows of queries. Row i sees the keys from start[i] to query[i].
template <class T> struct Running {
    int64_t width;
    T *queries, *probs;
    float *scores, *sums;
    int64_t start[BLOCK], query[BLOCK];
    float highest[BLOCK], total[BLOCK];
    bool begun;

    static int64_t bytes(int64_t width) { return BLOCK * (width + BLOCK) * (sizeof(T) + 4) + 64 * 4; }
    Running(int64_t width, Arena& arena)
        : width(width), queries(arena.take<T>(BLOCK * width)), probs(arena.take<T>(BLOCK * BLOCK)),
          scores(arena.take<float>(BLOCK * BLOCK)), sums(arena.take<float>(BLOCK * width)) {}
    void begin() {
        for (int64_t i = 0; i < BLOCK; i++) highest[i] = -1e30f, total[i] = 0;
        begun = false;
    }
    // The keys [width][BLOCK] and values [BLOCK][width], packed, of the positions from k0 on. rows: see `gemm`.
    void add(int64_t rows, const T* keys, const T* values, int64_t k0, float scale, bool all_visible) {
        gemm(false, rows, BLOCK, width, queries, width, keys, BLOCK, scores, BLOCK);
        for (int64_t i = 0; i < rows; i++) {
            float* row = scores + i * BLOCK;
            vf most = splat(highest[i]);
            for (int64_t j = 0; j < BLOCK; j += W) {
                vf s = load(row + j) * scale;
                if (!all_visible) s = select(visible(k0 + j, start[i], query[i]), s, splat(-1e38f));
                store(row + j, s);
                most = larger(most, s);
            }
            const float now = max(most);
            vf sum_now = {};
            for (int64_t j = 0; j < BLOCK; j += W) {
                vf p = exp(load(row + j) - now);
                sum_now += p;
                store(probs + i * BLOCK + j, p);
            }
            if (begun && highest[i] != now) {
                const float shrink = exp(splat(highest[i] - now))[0];
                total[i] *= shrink;
                for (int64_t c = 0; c < width; c += W) store(sums + i * width + c, load(sums + i * width + c) * shrink);
            }
            total[i] += sum(sum_now);
            highest[i] = now;
        }
        gemm(begun, rows, width, BLOCK, probs, BLOCK, values, width, sums, width);
        begun = true;
    }
    void result(int64_t i, int64_t C, T* out) const {
        const float inverse = 1.0f / total[i];
        for (int64_t c = 0; c < C; c += W) store_some(out + c, C - c, load(sums + i * width + c) * inverse);
    }
};

template <class T>
void forward_head(const Sizes& z, const Heads<const T>& q, const Heads<const T>& k, const Heads<const T>& v, T* out,
                  float* lse, int64_t b, int64_t h, Arena& arena) {
    const int64_t width = z.padded_head(), length = z.padded_length(), g = h / (z.H / z.G);
    const int64_t* starts = z.starts + b * z.S;
    T *keys = arena.take<T>(width * length), *values = arena.take<T>(width * length);
    Running<T> softmax(width, arena);
    for (int64_t first = 0; first < z.S; first += BLOCK) {
        pack_columns(k, z, b, g, first, keys + first * width);
        pack_rows(v, z, b, g, first, values + first * width);
    }
    Tiles configured;
    for (int64_t q0 = 0; q0 < z.S; q0 += BLOCK) {
        const int64_t rows = z.S - q0 < BLOCK ? z.S - q0 : BLOCK;
        as_rows(q, z, b, h, q0, softmax.queries);
        for (int64_t i = 0; i < BLOCK; i++) {
            softmax.query[i] = i < rows ? q0 + i : z.S - 1;
            softmax.start[i] = starts[softmax.query[i]];
        }
        softmax.begin();
        for (int64_t k0 = starts[q0] / BLOCK * BLOCK; k0 < q0 + rows; k0 += BLOCK) {
            const bool all_visible = k0 + BLOCK <= q0 + 1 && starts[q0 + rows - 1] <= k0;
            softmax.add(BLOCK, keys + k0 * width, values + k0 * width, k0, z.scale, all_visible);
        }
        for (int64_t i = 0; i < rows; i++) {
            softmax.result(i, z.C, out + ((b * z.S + q0 + i) * z.H + h) * z.C);
            lse[(b * z.H + h) * z.S + q0 + i] = softmax.highest[i] + __builtin_logf(softmax.total[i]);
        }
    }
}

// The gradients of one query head: dq in its place, dk and dv [S, C] in fp32, to be summed over the heads of a group.
template <class T>
void backward_head(const Sizes& z, const Heads<const T>& q, const Heads<const T>& k, const Heads<const T>& v,
                   const Heads<const T>& out, const Heads<const T>& grad, const float* lse, T* dq, float* dk, float* dv, int64_t b,
                   int64_t h, Arena& arena) {
    const int64_t width = z.padded_head(), length = z.padded_length(), g = h / (z.H / z.G);
    const int64_t* starts = z.starts + b * z.S;
    T *key_columns = arena.take<T>(width * length), *value_columns = arena.take<T>(width * length);
    T* key_rows = arena.take<T>(width * length);
    float *dkeys = arena.take<float>(width * length), *dvalues = arena.take<float>(width * length);
    T *queries = arena.take<T>(BLOCK * width), *grads = arena.take<T>(BLOCK * width);
    T *query_columns = arena.take<T>(BLOCK * width), *grad_columns = arena.take<T>(BLOCK * width);
    T *probs = arena.take<T>(BLOCK * BLOCK), *dscore_pairs = arena.take<T>(BLOCK * BLOCK);
    T* dscore_rows = arena.take<T>(BLOCK * BLOCK);
    float *scores = arena.take<float>(BLOCK * BLOCK), *dprobs = arena.take<float>(BLOCK * BLOCK);
    float *dqueries = arena.take<float>(BLOCK * width), log_sum[BLOCK], delta[BLOCK];
    for (int64_t first = 0; first < z.S; first += BLOCK) {
        pack_columns(k, z, b, g, first, key_columns + first * width);
        pack_columns(v, z, b, g, first, value_columns + first * width);
        pack_rows(k, z, b, g, first, key_rows + first * width);
    }
    __builtin_memset(dkeys, 0, width * length * 4);
    __builtin_memset(dvalues, 0, width * length * 4);
    Tiles configured;
    for (int64_t q0 = 0; q0 < z.S; q0 += BLOCK) {
        const int64_t rows = z.S - q0 < BLOCK ? z.S - q0 : BLOCK;
        as_rows(q, z, b, h, q0, queries);
        as_rows(grad, z, b, h, q0, grads);
        as_columns(q, z, b, h, q0, query_columns);
        as_columns(grad, z, b, h, q0, grad_columns);
        for (int64_t i = 0; i < BLOCK; i++) {
            vf product = {};
            log_sum[i] = 1e30f;  // rows beyond the end: probability 0
            if (i < rows) {
                const T *o = out.row(b, q0 + i, h), *d = grad.row(b, q0 + i, h);
                for (int64_t c = 0; c < z.C; c += W) product += load_some(o + c, z.C - c, 0) * load_some(d + c, z.C - c, 0);
                log_sum[i] = lse[(b * z.H + h) * z.S + q0 + i];
            }
            delta[i] = sum(product);
        }
        __builtin_memset(dqueries, 0, BLOCK * width * 4);
        for (int64_t k0 = starts[q0] / BLOCK * BLOCK; k0 < q0 + rows; k0 += BLOCK) {
            const bool all_visible = k0 + BLOCK <= q0 + 1 && starts[q0 + rows - 1] <= k0;
            gemm(false, BLOCK, BLOCK, width, queries, width, key_columns + k0 * width, BLOCK, scores, BLOCK);
            gemm(false, BLOCK, BLOCK, width, grads, width, value_columns + k0 * width, BLOCK, dprobs, BLOCK);
            for (int64_t i = 0; i < BLOCK; i += 2)
                for (int64_t j = 0; j < BLOCK; j += W) {
                    vf p[2], ds[2];
                    for (int r = 0; r < 2; r++) {
                        const int64_t row = i + r, query = row < rows ? q0 + row : z.S - 1;
                        p[r] = exp(load(scores + row * BLOCK + j) * z.scale - log_sum[row]);
                        if (!all_visible) p[r] = select(visible(k0 + j, starts[query], query), p[r], vf{});
                        ds[r] = p[r] * (load(dprobs + row * BLOCK + j) - delta[row]) * z.scale;
                        store(dscore_rows + row * BLOCK + j, ds[r]);
                    }
                    store_pair(probs + i * BLOCK, j, p[0], p[1]);
                    store_pair(dscore_pairs + i * BLOCK, j, ds[0], ds[1]);
                }
            gemm(true, width, BLOCK, BLOCK, grad_columns, BLOCK, probs, BLOCK, dvalues + k0 * width, BLOCK);
            gemm(true, width, BLOCK, BLOCK, query_columns, BLOCK, dscore_pairs, BLOCK, dkeys + k0 * width, BLOCK);
            gemm(true, BLOCK, width, BLOCK, dscore_rows, BLOCK, key_rows + k0 * width, width, dqueries, width);
        }
        for (int64_t i = 0; i < rows; i++) {
            T* row = dq + ((b * z.S + q0 + i) * z.H + h) * z.C;
            for (int64_t c = 0; c < z.C; c += W) store_some(row + c, z.C - c, load(dqueries + i * width + c));
        }
    }
    for (int64_t s = 0; s < z.S; s++)
        for (int64_t c = 0; c < z.C; c++) {
            const int64_t from = s / BLOCK * BLOCK * width + c * BLOCK + s % BLOCK;
            dk[s * z.C + c] = dkeys[from];
            dv[s * z.C + c] = dvalues[from];
        }
}

template <class T>
void attention_forward(const Sizes& z, Heads<const T> q, Heads<const T> k, Heads<const T> v, T* out, float* lse) {
    const int64_t width = z.padded_head(), all = width * z.padded_length();
    const int64_t bytes = 2 * all * sizeof(T) + 64 * 2 + Running<T>::bytes(width);
    parallel_for(z.B * z.H, [&](int64_t task) {
        Arena arena(bytes);
        forward_head(z, q, k, v, out, lse, task / z.H, task % z.H, arena);
    });
}

template <class T>
void attention_backward(const Sizes& z, Heads<const T> q, Heads<const T> k, Heads<const T> v, Heads<const T> out,
                        Heads<const T> grad, const float* lse, T* dq, float* dk, float* dv) {
    const int64_t width = z.padded_head(), all = width * z.padded_length();
    const int64_t bytes = 3 * all * sizeof(T) + 2 * all * 4 + BLOCK * (4 * width + 3 * BLOCK) * sizeof(T) +
                          BLOCK * (width + 2 * BLOCK) * 4 + 64 * 16;
    parallel_for(z.B * z.H, [&](int64_t task) {
        Arena arena(bytes);
        const int64_t rows = task * z.S * z.C;
        backward_head(z, q, k, v, out, grad, lse, dq, dk + rows, dv + rows, task / z.H, task % z.H, arena);
    });
}

}  // namespace
