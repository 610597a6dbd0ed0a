// Patches and tokens of a type known at run time, at norm 1.
//
// Included by files compiled once per instruction set, as vector.h.
#pragma once

#include "patches.h"
#include "tile.h"

namespace spa_fast {
namespace {

// work(row), for row `index` of rows [.., width] in their type.
template <class Work>
inline void with_row(const void* rows, CostType type, int64_t index, int64_t width, const Work& work) {
    switch (type) {
        case CostType::f32: return work(static_cast<const float*>(rows) + index * width);
        case CostType::f16: return work(static_cast<const Half*>(rows) + index * width);
        case CostType::bf16: return work(static_cast<const BFloat*>(rows) + index * width);
    }
}

inline void inverse_norms(const void* rows, CostType type, const bool* mask, int64_t count, int64_t width, float* out) {
    with_row(rows, type, 0, width, [&](auto row) {
        for (int64_t i = 0; i < count; ++i) out[i] = mask && !mask[i] ? 0 : inverse_norm(row + i * width, width);
    });
}

inline int64_t padded(int64_t width) { return (width + W - 1) / W * W; }

// `count` rows from `first` on at norm 1, out_row apart, zeros after them to a multiple of W.
inline void unit_rows(const void* rows, CostType type, int64_t first, int64_t count, int64_t width,
                      const float* inverse, float* out, int64_t out_row) {
    with_row(rows, type, first, width, [&](auto row) {
        for (int64_t i = 0; i < count; ++i) {
            scale_row(row + i * width, inverse[i], width, out + i * out_row);
            for (int64_t d = width; d < padded(width); ++d) out[i * out_row + d] = 0;
        }
    });
}

// The same, packed a row per lane; index null takes rows in order. The last group is filled up with zeros.
inline void pack_unit(const void* rows, CostType type, int64_t first, const int32_t* index, int64_t count,
                      int64_t width, const float* inverse, F* out) {
    with_row(rows, type, first, width, [&](auto row) {
        for (int64_t start = 0; start < count; start += W, out += width) {
            int64_t offset[W];
            F factor = {};
            for (int64_t l = 0; l < W; ++l) {
                const int64_t at = start + l < count ? start + l : count - 1, i = index ? index[at] : at;
                offset[l] = i * width;
                if (start + l < count) factor[l] = inverse[i];
            }
            pack_group(row, offset, factor, width, out);
        }
    });
}

// Uniform over the unmasked, 0 elsewhere.
inline void uniform_weights(const bool* mask, const int64_t* index, int64_t n, float* out) {
    int64_t active = 0;
    for (int64_t i = 0; i < n; ++i) active += mask[index ? index[i] : i];
    for (int64_t i = 0; i < n; ++i) out[i] = mask[index ? index[i] : i] ? 1.0f / static_cast<float>(active) : 0.0f;
}

}  // namespace
}  // namespace spa_fast
