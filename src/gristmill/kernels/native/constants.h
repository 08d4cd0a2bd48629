// The constants that the kernels share with Python, which reads them through `constants` in cpu.cpp.
#pragma once
#include <stdint.h>

namespace {

const int64_t PANEL = 64;  // outputs of a panel of a packed matrix, which are stored together
const int64_t DEPTH = 32;  // the inner dimension of a product is padded with zeros to a multiple of this
const int64_t BLOCK = 64;  // positions of a tile of attention, and the most heads that may share a key head

inline int64_t padded(int64_t inputs) { return (inputs + DEPTH - 1) / DEPTH * DEPTH; }

}  // namespace
