// Attention over keys and values in blocks of a cache (PagedAttention, Kwon et al., 2023, arXiv:2309.06180): what attention.h
// computes, in its order, so that a query gets the same bits in training, in a prompt cut anyhow, and in decoding.
//
// Blocks of B positions (even, at most BLOCK). A layer's keys lie as [N][G][width/2][B][2] in bf16, [N][G][width][B] in fp32, its values as
// [N][G][B/2][width][2] or [N][G][B][width]: what `gemm` multiplies when blocks are laid beside one another.
#pragma once
#include "attention.h"

namespace {

struct PagedSizes {
    int64_t T, H, G, C, B, parts;
    float scale;
    const int64_t *slots, *part, *tables;  // part: first token, tokens, position of the first, where in tables its blocks begin
    int64_t width() const { return padded(C); }
    int64_t block_size() const { return width() * B; }
};

template <class T>
void keep(const PagedSizes& z, Heads<const T> k, Heads<const T> v, T* keys, T* values, int64_t t, int64_t g) {
    const int64_t width = z.width(), pair = Pair<T>::rows, b = z.slots[t] % z.B, block = z.slots[t] / z.B;
    T *key = keys + (block * z.G + g) * z.block_size(), *value = values + (block * z.G + g) * z.block_size();
    const T *from_key = k.row(0, t, g), *from_value = v.row(0, t, g);
    for (int64_t c = 0; c < width; c++) {
        key[(c / pair * z.B + b) * pair + c % pair] = c < z.C ? from_key[c] : T{};
        value[(b / pair * width + c) * pair + b % pair] = c < z.C ? from_value[c] : T{};
    }
}

// `count` times four bytes: a call of memcpy takes longer than so few.
INLINE void copy_units(void* to, const void* from, int64_t count) {
    for (; count >= W; count -= W, to = (vu*)to + 1, from = (const vu*)from + 1) *(vu_at*)to = *(const vu_at*)from;
    __builtin_memcpy(to, from, count * 4);
}

// BLOCK positions from k0 on, of which `length` exist; the others are 0, whatever lay there.
template <class T>
void gather(const PagedSizes& z, const int64_t* table, const T* keys, const T* values, int64_t g, int64_t k0, int64_t length, T* key,
            T* value) {
    const int64_t width = z.width(), pair = Pair<T>::rows, per_block = z.block_size();
    for (int64_t b0 = 0; b0 < BLOCK; b0 += z.B) {
        T* to = value + b0 * width;
        if (k0 + b0 >= length) {
            for (int64_t u = 0; u < width / pair; u++) __builtin_memset(key + (u * BLOCK + b0) * pair, 0, z.B * pair * sizeof(T));
            __builtin_memset(to, 0, per_block * sizeof(T));
            continue;
        }
        const int64_t at = (table[(k0 + b0) / z.B] * z.G + g) * per_block;
        for (int64_t u = 0; u < width / pair; u++) copy_units(key + (u * BLOCK + b0) * pair, keys + at + u * z.B * pair, z.B);
        __builtin_memcpy(to, values + at, per_block * sizeof(T));
        for (int64_t b = length - k0 - b0; b < z.B; b++)
            for (int64_t c = 0; c < width; c++) to[(b / pair * width + c) * pair + b % pair] = T{};
    }
}

// Queries from `first` on of a part, and their heads that share key head g: rows [query][head].
template <class T>
void attend_tile(const PagedSizes& z, const int64_t* part, int64_t g, int64_t first, int64_t count, Heads<const T> q, const T* keys,
                 const T* values, T* out, Arena& arena) {
    const int64_t width = z.width(), shared = z.H / z.G, rows = count * shared, last = part[2] + first + count - 1;
    T *key = arena.take<T>(BLOCK * width), *value = arena.take<T>(BLOCK * width);
    Running<T> softmax(width, arena);
    const int64_t whole = HAS_TILES ? (rows + 15) / 16 * 16 : (rows + 1) / 2 * 2;
    for (int64_t i = 0; i < whole; i++) {
        const int64_t n = i < rows ? first + i / shared : first;
        softmax.start[i] = 0;
        softmax.query[i] = part[2] + n;
        __builtin_memcpy(softmax.queries + i * width, q.row(0, part[0] + n, g * shared + i % shared), z.C * sizeof(T));
        __builtin_memset(softmax.queries + i * width + z.C, 0, (width - z.C) * sizeof(T));
    }
    Tiles configured;
    softmax.begin();
    for (int64_t k0 = 0; k0 <= last; k0 += BLOCK) {
        gather(z, z.tables + part[3], keys, values, g, k0, part[2] + part[1], key, value);
        softmax.add(whole, key, value, k0, z.scale, k0 + BLOCK <= part[2] + first + 1);
    }
    for (int64_t i = 0; i < rows; i++)
        softmax.result(i, z.C, out + ((part[0] + first + i / shared) * z.H + g * shared + i % shared) * z.C);
}

// q [T, H, C], k and v [T, G, C]: k and v go into their slots, then each query sees its sequence up to itself. out [T, H, C].
template <class T>
void paged_attention(const PagedSizes& z, Heads<const T> q, Heads<const T> k, Heads<const T> v, T* keys, T* values, T* out) {
    const int64_t width = z.width(), shared = z.H / z.G, tile = shared < BLOCK ? BLOCK / shared : 1;
    int64_t tasks = 0;
    for (int64_t p = 0; p < z.parts; p++) tasks += (z.part[4 * p + 1] + tile - 1) / tile;
    Buffer<int64_t> owner(tasks), first(tasks);
    for (int64_t p = 0, n = 0; p < z.parts; p++)
        for (int64_t t = 0; t < z.part[4 * p + 1]; t += tile, n++) owner.data[n] = p, first.data[n] = t;
    const bool one_each = z.parts == z.T;  // whose keys nobody else waits for
    if (!one_each) parallel_for(z.T * z.G, 4, [&](int64_t i) { keep(z, k, v, keys, values, i / z.G, i % z.G); });
    parallel_for(tasks * z.G, [&](int64_t task) {
        const int64_t n = task / z.G, *part = z.part + 4 * owner.data[n], left = part[1] - first.data[n];
        if (one_each) keep(z, k, v, keys, values, part[0], task % z.G);
        Arena arena(2 * BLOCK * width * sizeof(T) + 64 * 2 + Running<T>::bytes(width));
        attend_tile(z, part, task % z.G, first.data[n], left < tile ? left : tile, q, keys, values, out, arena);
    });
}

}  // namespace
