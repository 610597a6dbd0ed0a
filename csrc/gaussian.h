// Draws from class-wise Gaussians: the contract between the samplers and whoever calls them.
//
//     out[c, i] = mean_c + L_c z,   z_d = the normal of (seed, class_ids[c], first + i, d) of philox.h
//
// accumulated in fp32. A draw depends, bit for bit on one device and instruction set, on nothing else: not on the
// number of classes or samples drawn with it, nor on threads or launch geometry.
#pragma once

#include <cstdint>

#include "sinkhorn.h"

namespace spa_fast {

using FloatType = CostType;

enum class FactorKind : int {
    tril = 0,     // lower triangle packed by rows, D (D + 1) / 2 a class
    diag = 1,     // standard deviations, D a class
    lowrank = 2,  // F [D, rank] beside standard deviations [D], of F F^T + diag^2; F takes z_D .. z_{D + rank - 1}
};

struct GaussianArgs {
    FactorKind kind;
    int64_t C, D, n, rank;
    int64_t first;  // 0 <= first, first + n <= 2^32
    // Classes that a draw may read, by rows: class c's is rows[c], or c where rows is null.
    const int64_t* rows;
    const void* mean;  // [., D]
    FloatType mean_type;
    const void* factor;
    FloatType factor_type;
    int64_t factor_stride;  // entries from a row to the next; 0 shares one factor
    const void* diag;       // lowrank only, in factor_type
    int64_t diag_stride;
    const int64_t* class_ids;  // [C], modulo 2^32
    const int64_t* seed;       // [1], 64 bits
    void* out;                 // [C, n, D] in mean_type
};

// Throws std::invalid_argument, naming what does not fit.
void check_gaussian(const GaussianArgs& args);

// On CPU memory, by up to `threads` OpenMP threads. Throws std::invalid_argument on sizes out of range or an unusable
// isa, std::bad_alloc.
void sample_gaussian_cpu(const GaussianArgs& args, int threads, Isa isa);

// On memory of a CUDA device, in order on `stream`: one launch, no synchronisation, no allocation, so that a graph may
// capture it. Throws std::invalid_argument on sizes out of range, std::runtime_error with CUDA's own message.
void sample_gaussian_cuda(const GaussianArgs& args, int device, void* stream);

// Largest D + rank on a CUDA device: the normals of four samples lie in shared memory, 99 KB on the smallest.
constexpr int64_t kMaxCudaWidth = 4096;

}  // namespace spa_fast
