#include "similarity.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "similarity_lanes.h"
#include "team.h"

namespace spa_fast {
namespace {

const SimilarityKernel& kernel_of(Isa isa) {
#ifdef SPA_FAST_X86
    if (isa == Isa::avx512) return similarity_avx512;
    if (isa == Isa::avx2) return similarity_avx2;
#else
    (void)isa;
#endif
    return similarity_portable;
}

constexpr int64_t kPacked = 1 << 17;  // numbers packed at once: half a megabyte, which an L2 cache holds
constexpr int64_t kMinRows = 64;      // of a part: below, packing its lanes shows

// In multiplications: packing a number costs about as much as 13 of them.
double cost(int64_t lane_count, int64_t row_count, int64_t width, int64_t lanes) {
    const int64_t groups = (lane_count + lanes - 1) / lanes;
    return static_cast<double>(width) * (13.0 * lane_count + static_cast<double>(groups * lanes) * row_count);
}

}  // namespace

void similarity(const SimilarityArgs& args, int threads, Isa isa) {
    const int64_t R = args.x.count, Q = args.y.count, D = args.D, panel = panel_width(args);
    if (args.P < 0 || R < 0 || Q < 0 || D < 0) throw std::invalid_argument("expected x [P, R, D] and y [P, Q, D]");
    if (!isa_usable(isa)) throw std::invalid_argument(std::string("instruction set not usable here: ") + isa_name(isa));
    if (args.P == 0 || R == 0 || Q == 0) return;
    for (const Rows& rows : {args.x, args.y})
        if (rows.stride < 0 || rows.step < 0 || rows.apart < 0 ||
            (rows.step != 1 && (rows.stride != 1 || args.normalize)))
            throw std::invalid_argument("expected rows or, not to be normalised, columns that are contiguous");

    const SimilarityKernel& kernel = kernel_of(isa);
    const int64_t W = kernel.lanes;
    const bool x_in_lanes = cost(R, Q, D, W) < cost(Q, R, D, W);
    const int64_t lane_count = x_in_lanes ? R : Q, row_count = x_in_lanes ? Q : R;
    const int64_t groups = (lane_count + W - 1) / W;
    // A multiple of 6 groups leaves no narrow tile but in the last block.
    const int64_t fitting = std::max<int64_t>(1, kPacked / (W * std::max<int64_t>(panel, 1)));
    const int64_t block = std::min(groups, fitting >= 6 ? fitting / 6 * 6 : fitting) * W;
    const int64_t blocks = (lane_count + block - 1) / block;
    const int64_t wanted = threads > 1 ? (4 * threads - 1) / (blocks * args.P) + 1 : 1;
    const int64_t splits = std::max<int64_t>(1, std::min(wanted, row_count / kMinRows));
    const int64_t rows = (row_count + splits - 1) / splits;
    const auto part = [&](int64_t index, char* memory) {
        const int64_t lane = index / splits % blocks * block, row = index % splits * rows;
        kernel.run(args,
                   {index / (splits * blocks), x_in_lanes, lane, std::min(lane_count, lane + block), row,
                    std::min(row_count, row + rows)},
                   memory);
    };
    run_team(args.P * blocks * splits, threads, kernel.workspace_bytes(std::min(block, lane_count), panel), part);
}

}  // namespace spa_fast
