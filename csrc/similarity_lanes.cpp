// A part of the product: one operand packed a row per lane, the other read row by row where it lies.
#include "similarity_lanes.h"
#include "tile.h"

namespace spa_fast {
namespace {

// Rows of a block are kept apart by a line more than their width: powers of two would share few sets of the L1 cache.
constexpr int64_t kPad = 16;

struct Workspace {
    F* groups;
    float *tile, *rows;
    int64_t tile_row, rows_row, bytes;

    Workspace(void* memory, int64_t lane_count, int64_t width) {
        const int64_t count = (lane_count + W - 1) / W;
        tile_row = count * W + kPad;
        rows_row = (width + W - 1) / W * W + kPad;
        const int64_t tile_at = count * width * static_cast<int64_t>(sizeof(F));
        const int64_t rows_at = tile_at + kBlock * tile_row * 4;
        groups = static_cast<F*>(memory);
        tile = reinterpret_cast<float*>(static_cast<char*>(memory) + tile_at);
        rows = reinterpret_cast<float*>(static_cast<char*>(memory) + rows_at);
        bytes = (rows_at + kBlock * rows_row * 4 + 63) / 64 * 64;
    }
};

int64_t workspace_bytes(int64_t lane_count, int64_t width) { return Workspace(nullptr, lane_count, width).bytes; }

template <class S>
float factor(const SimilarityArgs& args, const S* row) {
    return args.normalize ? inverse_norm(row, args.D) : 1.0f;
}

template <class S>
const S* row(const Rows& from, int64_t product, int64_t index) {
    return static_cast<const S*>(from.data) + product * from.apart + index * from.stride;
}

template <class S>
void pack(const SimilarityArgs& args, const Rows& from, const S* rows, int64_t count, int64_t width, F* out) {
    for (int64_t start = 0; start < count; start += W, out += width) {
        const int64_t n = count - start < W ? count - start : W;
        if (from.step != 1) {
            pack_columns(rows + start, from.step, n, width, out, 1);
            continue;
        }
        int64_t offset[W];
        F inverse = {};
        for (int64_t l = 0; l < W; ++l) {
            offset[l] = (start + (l < n ? l : n - 1)) * from.stride;
            if (l < n) inverse[l] = factor(args, rows + offset[l]);
        }
        pack_group(rows, offset, inverse, width, out);
    }
}

// Rows in fp32: number d of row r is data[r * row + d * step].
struct Block {
    const float* data;
    int64_t row, step;
};

template <class S>
Block block(const SimilarityArgs& args, const Rows& from, const S* rows, int64_t count, int64_t width,
            const Workspace& space) {
    if (from.step != 1) {
        if (sizeof(S) == sizeof(float)) return {reinterpret_cast<const float*>(rows), from.stride, from.step};
        for (int64_t start = 0; start < count; start += W)
            pack_columns(rows + start, from.step, count - start < W ? count - start : W, width,
                         reinterpret_cast<F*>(space.rows) + start / W, kBlock / W);
        return {space.rows, 1, kBlock};
    }
    if (sizeof(S) == sizeof(float) && !args.normalize)
        return {reinterpret_cast<const float*>(rows), from.stride, 1};
    for (int64_t r = 0; r < count; ++r) {
        const S* const of = rows + r * from.stride;
        scale_row(of, factor(args, of), width, space.rows + r * space.rows_row);
    }
    return {space.rows, space.rows_row, 1};
}

// x to `count` <= W numbers at `to`, or added to them.
inline void put(float* to, F x, int64_t count, bool begin) {
    if (count == W)
        store(to, begin ? x : load<F>(to) + x);
    else
        narrow(to, begin ? x : widen(to, count) + x, count);
}

// tile [count, lanes] to, or added to, out [count, lanes], a row of which is `stride` long.
void write_rows(const float* tile, int64_t tile_row, int64_t count, int64_t lanes, float* out, int64_t stride,
                bool begin) {
    for (int64_t r = 0; r < count; ++r)
        for (int64_t l = 0; l < lanes; l += W)
            put(out + r * stride + l, load<F>(tile + r * tile_row + l), lanes - l < W ? lanes - l : W, begin);
}

// The same to out [lanes, count].
void write_transposed(const float* tile, int64_t tile_row, int64_t count, int64_t lanes, float* out, int64_t stride,
                      bool begin) {
    for (int64_t l = 0; l < lanes; l += W)
        for (int64_t r = 0; r < count; r += W) {
            F square[W];
            for (int64_t i = 0; i < W; ++i) square[i] = load<F>(tile + (r + i) * tile_row + l);
            transpose(square);
            for (int64_t i = 0; i < W && l + i < lanes; ++i)
                put(out + (l + i) * stride + r, square[i], count - r < W ? count - r : W, begin);
        }
}

template <class S>
void solve(const SimilarityArgs& args, const SimilarityPart& part, void* memory) {
    const Rows& lanes = part.x_in_lanes ? args.x : args.y;
    const Rows& rows = part.x_in_lanes ? args.y : args.x;
    const int64_t lane_count = part.last_lane - part.first_lane, stride = args.y.count;
    const int64_t panel = panel_width(args);
    const Workspace space(memory, lane_count, panel);
    float* const out = args.out + part.product * args.x.count * stride;
    int64_t d = 0;
    do {
        const int64_t width = args.D - d < panel ? args.D - d : panel;
        pack(args, lanes, row<S>(lanes, part.product, part.first_lane) + d * lanes.step, lane_count, width,
             space.groups);
        for (int64_t first = part.first_row; first < part.last_row; first += kBlock) {
            const int64_t count = part.last_row - first < kBlock ? part.last_row - first : kBlock;
            const S* const numbers = row<S>(rows, part.product, first) + d * rows.step;
            const Block from = block(args, rows, numbers, count, width, space);
            multiply(from.data, from.row, from.step, count, space.groups, (lane_count + W - 1) / W, width, space.tile,
                     space.tile_row);
            if (part.x_in_lanes)
                write_transposed(space.tile, space.tile_row, count, lane_count,
                                 out + part.first_lane * stride + first, stride, d == 0);
            else
                write_rows(space.tile, space.tile_row, count, lane_count, out + first * stride + part.first_lane,
                           stride, d == 0);
        }
        d += panel;
    } while (d < args.D);
}

void run(const SimilarityArgs& args, const SimilarityPart& part, void* workspace) {
    switch (args.type) {
        case CostType::f32: return solve<float>(args, part, workspace);
        case CostType::f16: return solve<Half>(args, part, workspace);
        case CostType::bf16: return solve<BFloat>(args, part, workspace);
    }
}

}  // namespace

#define SPA_FAST_JOIN(x, y) x##y
#define SPA_FAST_NAME(isa) SPA_FAST_JOIN(similarity_, isa)
extern const SimilarityKernel SPA_FAST_NAME(SPA_FAST_ISA);
const SimilarityKernel SPA_FAST_NAME(SPA_FAST_ISA) = {W, workspace_bytes, run};

}  // namespace spa_fast
