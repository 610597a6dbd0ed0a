// Products of rows with groups of W rows, one of these per vector lane: every product is the same chain of operations
// over the width, wherever its two rows lie and whatever lies beside them.
//
// Included by files compiled once per instruction set, as vector.h.
#pragma once

#include "vector.h"

namespace spa_fast {
namespace {

// kRows x kGroups accumulators, kGroups operands and a broadcast fill 32 registers (16 below AVX-512).
constexpr int kRows = W == 16 ? 8 : 4;
constexpr int kGroups = W == 4 ? 2 : 3;
constexpr int64_t kBlock = 3 * W;  // rows multiplied with one group after the other: they stay in the L1 cache
constexpr int64_t kChain = 128;    // products summed in one accumulator; then chains are added in order

// 1 / |row|: 0 where the norm is 0 or subnormal, NaN where it is not finite. Squares of 1e-30 or 1e30 fit fp64 only.
template <class S>
float inverse_norm(const S* row, int64_t width) {
    D sum[2] = {};
    const auto add = [&sum](F x) {
        for (int half = 0; half < 2; ++half) {
            const D part = __builtin_convertvector(load<FH>(reinterpret_cast<const float*>(&x) + half * H), D);
            sum[half] += part * part;
        }
    };
    int64_t d = 0;
    for (; d + W <= width; d += W) add(widen(row + d));
    if (d < width) add(widen(row + d, width - d));
    const D lanes = sum[0] + sum[1];
    double total = 0;
    for (int l = 0; l < H; ++l) total += lanes[l];
    const double norm = __builtin_sqrt(total);
    if (norm < 0x1p-126) return 0;
    return norm < __builtin_inf() ? static_cast<float>(1 / norm) : __builtin_nanf("");
}

// A row without a norm is 0, whatever it holds.
inline F scaled(F x, F inverse) { return inverse == 0.0f ? F{} : x * inverse; }

template <class S>
void scale_row(const S* row, float inverse, int64_t width, float* out) {
    const F factor = splat<F>(inverse);
    int64_t d = 0;
    for (; d + W <= width; d += W) store(out + d, scaled(widen(row + d), factor));
    if (d < width) narrow(out + d, scaled(widen(row + d, width - d), factor), width - d);
}

// out[d] holds number d of W rows; row l starts at from + offset[l].
template <class S>
void pack_group(const S* from, const int64_t* offset, F inverse, int64_t width, F* out) {
    for (int64_t d = 0; d < width; d += W) {
        const int64_t n = width - d < W ? width - d : W;
        F rows[W];
        for (int l = 0; l < W; ++l) rows[l] = n == W ? widen(from + offset[l] + d) : widen(from + offset[l] + d, n);
        transpose(rows);
        for (int64_t l = 0; l < n; ++l) out[d + l] = scaled(rows[l], inverse);
    }
}

// Numbers of `count` <= W rows, zeros beside them, where column follows column `step` apart; out_step likewise.
template <class S>
void pack_columns(const S* from, int64_t step, int64_t count, int64_t width, F* out, int64_t out_step) {
    for (int64_t d = 0; d < width; ++d)
        out[d * out_step] = count == W ? widen(from + d * step) : widen(from + d * step, count);
}

// Adds `terms` products, or begins with them: R rows, number d of row r at x[r * row + d * step], with G groups.
template <int R, int G>
void multiply_tile(const float* x, int64_t row, int64_t step, const F* y, int64_t group, int64_t terms, bool begin,
                   float* out, int64_t out_row) {
    F sum[R][G];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
        for (int g = 0; g < G; ++g) sum[r][g] = F{};
    for (int64_t d = 0; d < terms; ++d) {
        F lanes[G];
#pragma GCC unroll 3
        for (int g = 0; g < G; ++g) lanes[g] = y[g * group + d];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const F number = splat<F>(x[r * row + d * step]);
#pragma GCC unroll 3
            for (int g = 0; g < G; ++g) sum[r][g] += number * lanes[g];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
        for (int g = 0; g < G; ++g) {
            float* const to = out + r * out_row + g * W;
            store(to, begin ? sum[r][g] : load<F>(to) + sum[r][g]);
        }
}

template <int G>
void multiply_groups(const float* x, int64_t row, int64_t step, int64_t rows, const F* y, int64_t width, float* out,
                     int64_t out_row) {
    int64_t d = 0;
    do {
        const int64_t terms = width - d < kChain ? width - d : kChain;
        int64_t r = 0;
        const auto tile = [&](auto kernel) {
            kernel(x + r * row + d * step, row, step, y + d, width, terms, d == 0, out + r * out_row, out_row);
        };
        for (; r + kRows <= rows; r += kRows) tile(multiply_tile<kRows, G>);
        if (kRows > 4 && r + 4 <= rows) tile(multiply_tile<4, G>), r += 4;
        if (r + 2 <= rows) tile(multiply_tile<2, G>), r += 2;
        if (r < rows) tile(multiply_tile<1, G>);
        d += kChain;
    } while (d < width);
}

// out[r * out_row + l] = row r . row l of `groups` packed groups; whole groups are written.
inline void multiply(const float* x, int64_t row, int64_t step, int64_t rows, const F* y, int64_t groups,
                     int64_t width, float* out, int64_t out_row) {
    int64_t g = 0;
    for (; g + kGroups <= groups; g += kGroups)
        multiply_groups<kGroups>(x, row, step, rows, y + g * width, width, out + g * W, out_row);
    if (kGroups > 2 && g + 2 <= groups) {
        multiply_groups<2>(x, row, step, rows, y + g * width, width, out + g * W, out_row);
        g += 2;
    }
    if (g < groups) multiply_groups<1>(x, row, step, rows, y + g * width, width, out + g * W, out_row);
}

// Sums of all lanes of `count` vectors, in a fixed order.
inline void sum_lanes(const F* from, int64_t count, float* out) {
    for (int64_t start = 0; start < count; start += W) {
        F rows[W];
        for (int64_t i = 0; i < W; ++i) rows[i] = start + i < count ? from[start + i] : F{};
        transpose(rows);
        for (int n = H; n > 0; n /= 2)
            for (int i = 0; i < n; ++i) rows[i] += rows[i + n];
        if (count - start < W)
            narrow(out + start, rows[0], count - start);
        else
            store(out + start, rows[0]);
    }
}

// Inner products of rows that lie anywhere, a vector of W numbers at a time: rows are a multiple of W long.
constexpr int kDotRows = 4, kDotColumns = W == 16 ? 6 : 2;

template <int C>
void dot_tile(const float* const* x, const float* y, int64_t y_row, int64_t width, F* out, int64_t out_row) {
    F sum[kDotRows][C];
#pragma GCC unroll 4
    for (int r = 0; r < kDotRows; ++r)
#pragma GCC unroll 6
        for (int c = 0; c < C; ++c) sum[r][c] = F{};
    for (int64_t d = 0; d < width; d += W) {
        F row[kDotRows];
#pragma GCC unroll 4
        for (int r = 0; r < kDotRows; ++r) row[r] = load<F>(x[r] + d);
#pragma GCC unroll 6
        for (int c = 0; c < C; ++c) {
            const F column = load<F>(y + c * y_row + d);
#pragma GCC unroll 4
            for (int r = 0; r < kDotRows; ++r) sum[r][c] += row[r] * column;
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kDotRows; ++r)
#pragma GCC unroll 6
        for (int c = 0; c < C; ++c) out[r * out_row + c] = sum[r][c];
}

// Columns a tile takes so that none is left with few of them.
constexpr int64_t even_step(int64_t columns, int64_t most) {
    const int64_t tiles = (columns + most - 1) / most;
    return (columns + tiles - 1) / tiles;
}

// out[i * columns + j] = x[i] . (y + j * y_row); `sums` holds kDotRows * columns vectors.
inline void dots(const float* const* x, int64_t rows, const float* y, int64_t y_row, int64_t columns, int64_t width,
                 F* sums, float* out) {
    const int64_t step = even_step(columns, kDotColumns);
    for (int64_t i = 0; i < rows; i += kDotRows) {
        const float* row[kDotRows];
        const int64_t n = rows - i < kDotRows ? rows - i : kDotRows;
        for (int64_t r = 0; r < kDotRows; ++r) row[r] = x[i + (r < n ? r : n - 1)];
        for (int64_t j = 0; j < columns; j += step) {
            const auto tile = [&](auto kernel) { kernel(row, y + j * y_row, y_row, width, sums + j, columns); };
            switch (columns - j < step ? columns - j : step) {
                case 1: tile(dot_tile<1>); break;
                case 2: tile(dot_tile<2>); break;
                case 3: tile(dot_tile<kDotColumns == 2 ? 2 : 3>); break;
                case 4: tile(dot_tile<kDotColumns == 2 ? 2 : 4>); break;
                case 5: tile(dot_tile<kDotColumns == 2 ? 2 : 5>); break;
                default: tile(dot_tile<kDotColumns>);
            }
        }
        sum_lanes(sums, n * columns, out + i * columns);
    }
}

}  // namespace
}  // namespace spa_fast
