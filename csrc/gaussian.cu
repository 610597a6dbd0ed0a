// Draws on a CUDA device: normals, product with the factor and mean in one kernel.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "gaussian.h"
#include "philox.h"

namespace spa_fast {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 128;          // of the factor that a block multiplies at a time
constexpr int kDepth = 32;          // columns of them in shared memory, a warp's width
constexpr int kPitch = kRows + 4;   // keeps 16-byte stores of a warp in different banks
constexpr int kQuads = kRows / 16;  // four rows of one column that a thread carries

__host__ __device__ constexpr int round_up(int x, int multiple) { return (x + multiple - 1) / multiple * multiple; }

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ inline float get(const void* from, FloatType type, int64_t i) {
    switch (type) {
        case FloatType::f16: return widen(static_cast<const __half*>(from)[i]);
        case FloatType::bf16: return widen(static_cast<const __nv_bfloat16*>(from)[i]);
        default: return static_cast<const float*>(from)[i];
    }
}

template <class T>
struct alignas(4 * sizeof(T)) Four {
    T x[4];
};

template <class T, class Round>
__device__ inline void put4(void* to, int64_t i, int count, const float (&x)[4], Round round) {
    T* out = static_cast<T*>(to) + i;
    if (count == 4 && i % 4 == 0) {
        *reinterpret_cast<Four<T>*>(out) = {round(x[0]), round(x[1]), round(x[2]), round(x[3])};
    } else {
        for (int j = 0; j < 4; ++j)
            if (j < count) out[j] = round(x[j]);
    }
}

// The first `count` of four neighbours.
__device__ inline void put4(void* to, FloatType type, int64_t i, int count, const float (&x)[4]) {
    switch (type) {
        case FloatType::f16: return put4<__half>(to, i, count, x, [](float y) { return __float2half_rn(y); });
        case FloatType::bf16:
            return put4<__nv_bfloat16>(to, i, count, x, [](float y) { return __float2bfloat16_rn(y); });
        default: return put4<float>(to, i, count, x, [](float y) { return y; });
    }
}

__device__ inline int64_t row_of(const GaussianArgs& args, int64_t c) {
    return args.rows == nullptr ? c : args.rows[c];
}

__device__ inline uint64_t seed_of(const GaussianArgs& args) { return static_cast<uint64_t>(*args.seed); }

// One thread: four dimensions of one sample.
__global__ void __launch_bounds__(kThreads) diagonal(const GaussianArgs args) {
    const int64_t quads = (args.D + 3) / 4, item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (item >= args.C * args.n * quads) return;
    const int64_t row = item / quads, c = row / args.n, d = item % quads * 4, from = row_of(args, c);
    const int count = static_cast<int>(args.D - d < 4 ? args.D - d : 4);
    float x[4];
    normals<Scalar>(static_cast<uint32_t>(d / 4), static_cast<uint32_t>(args.first + row % args.n),
                    static_cast<uint32_t>(args.class_ids[c]), seed_of(args), x);
    for (int j = 0; j < 4; ++j)
        if (j < count)
            x[j] = fmaf(get(args.factor, args.factor_type, from * args.factor_stride + d + j), x[j],
                        get(args.mean, args.mean_type, from * args.D + d + j));
    put4(args.out, args.mean_type, row * args.D + d, count, x);
}

// Normals of one sample that a product needs, and where they start: whole counters and whole steps.
struct Span {
    int start, offset, count;

    __host__ __device__ Span(const GaussianArgs& args, int rows) {
        const bool lowrank = args.kind == FactorKind::lowrank;
        start = lowrank ? static_cast<int>(args.D) / 4 * 4 : 0;
        offset = static_cast<int>(lowrank ? args.D : 0) - start;
        count = round_up(offset + round_up(lowrank ? static_cast<int>(args.rank) : rows, kDepth), 4);
    }
};

// L z for `Samples` samples of one class, whose normals stay in shared memory. A block owns every `groups`-th tile of
// 128 rows, the longest first; 32 columns at a time pass through shared memory, the next ones already on their way to
// registers. A thread keeps Samples / 4 rows x 4 samples, summed from column 0 on whatever the launch looks like.
template <class S, int Samples>
__global__ void __launch_bounds__(kThreads, Samples == 32 ? 2 : 3)
    product(const GaussianArgs args, int tiles, int groups) {
    constexpr int kOwn = Samples / 4, kRowThreads = kRows / kOwn, kBatch = kOwn < 4 ? 1 : 4;
    extern __shared__ float4 shared[];
    float* const columns = reinterpret_cast<float*>(shared);  // [kDepth][kPitch]
    float* const z = columns + kDepth * kPitch;               // [span.count][Samples]

    const int D = static_cast<int>(args.D), rank = static_cast<int>(args.rank);
    const bool lowrank = args.kind == FactorKind::lowrank;
    const int group = blockIdx.x % groups;
    const int64_t c = blockIdx.x / groups / tiles, from = row_of(args, c);
    const int64_t sample = static_cast<int64_t>(blockIdx.x / groups % tiles) * Samples;
    const S* const factor = static_cast<const S*>(args.factor) + from * args.factor_stride;
    const uint32_t class_id = static_cast<uint32_t>(args.class_ids[c]);
    const uint64_t seed = seed_of(args);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row_thread = threadIdx.x % kRowThreads, sample_thread = threadIdx.x / kRowThreads * 4;

    S carried[kQuads][4];
    const auto fetch = [&](int row0, int k) {
        // Where rows begin is cheap to find and would fill 32 registers if it were kept from chunk to chunk.
        asm volatile("" : "+r"(row0));
#pragma unroll
        for (int i = 0; i < kQuads; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int d = row0 + 4 * (warp + 4 * i) + j;
                const int length = d >= D ? 0 : lowrank ? rank : d + 1;
                const unsigned begin = lowrank ? unsigned(d) * rank : unsigned(d) * (unsigned(d) + 1) / 2;
                carried[i][j] = k + lane < length ? factor[begin + k + lane] : S(0.0f);
            }
    };

    const int last = (D + kRows - 1) / kRows - 1 - group;
    fetch(last * kRows, 0);
    const Span span(args, min(D, (last + 1) * kRows));
    for (int item = threadIdx.x; item < span.count / 4 * Samples; item += kThreads) {
        const int s = item % Samples, block = item / Samples;
        float x[4] = {};
        if (sample + s < args.n)
            normals<Scalar>(span.start / 4 + block, static_cast<uint32_t>(args.first + sample + s), class_id, seed, x);
#pragma unroll
        for (int j = 0; j < 4; ++j) z[(4 * block + j) * Samples + s] = x[j];
    }

    for (int tile = last; tile >= 0; tile -= groups) {
        const int row0 = tile * kRows, depth = lowrank ? rank : min(D, row0 + kRows);
        float sum[kOwn][4] = {};
        if (tile != last) fetch(row0, 0);
        for (int k0 = 0; k0 < depth; k0 += kDepth) {
            __syncthreads();
#pragma unroll
            for (int i = 0; i < kQuads; ++i)
                *reinterpret_cast<float4*>(columns + lane * kPitch + 4 * (warp + 4 * i)) =
                    make_float4(widen(carried[i][0]), widen(carried[i][1]), widen(carried[i][2]), widen(carried[i][3]));
            __syncthreads();
            if (k0 + kDepth < depth) fetch(row0, k0 + kDepth);
#pragma unroll 4
            for (int k = 0; k < kDepth; ++k) {
                const float4 y = *reinterpret_cast<const float4*>(z + (span.offset + k0 + k) * Samples + sample_thread);
#pragma unroll
                for (int r = 0; r < kOwn; r += kBatch) {
                    float x[kBatch];
                    const float* chunk = columns + k * kPitch + r * kRowThreads + kBatch * row_thread;
                    if (kBatch == 4)
                        *reinterpret_cast<float4*>(x) = *reinterpret_cast<const float4*>(chunk);
                    else
                        x[0] = *chunk;
#pragma unroll
                    for (int j = 0; j < kBatch; ++j) {
                        sum[r + j][0] = fmaf(x[j], y.x, sum[r + j][0]);
                        sum[r + j][1] = fmaf(x[j], y.y, sum[r + j][1]);
                        sum[r + j][2] = fmaf(x[j], y.z, sum[r + j][2]);
                        sum[r + j][3] = fmaf(x[j], y.w, sum[r + j][3]);
                    }
                }
            }
        }
#pragma unroll
        for (int r = 0; r < kOwn; r += kBatch) {
            const int d = row0 + r * kRowThreads + kBatch * row_thread, count = min(kBatch, D - d);
            if (count <= 0) continue;
            float center[kBatch], spread[kBatch];
#pragma unroll
            for (int j = 0; j < kBatch; ++j) {
                const bool inside = j < count;
                center[j] = inside ? get(args.mean, args.mean_type, from * D + d + j) : 0.0f;
                spread[j] =
                    inside && lowrank ? get(args.diag, args.factor_type, from * args.diag_stride + d + j) : 0.0f;
            }
#pragma unroll
            for (int s = 0; s < 4; ++s) {
                const int64_t i = sample + sample_thread + s;
                if (i >= args.n) continue;
                float own[4] = {}, x[4];
                if (lowrank) normals<Scalar>(d / 4, static_cast<uint32_t>(args.first + i), class_id, seed, own);
                if (kBatch == 1) own[0] = d % 4 < 2 ? (d % 4 == 0 ? own[0] : own[1]) : (d % 4 == 2 ? own[2] : own[3]);
#pragma unroll
                for (int j = 0; j < kBatch; ++j) x[j] = center[j] + fmaf(spread[j], own[j], sum[r + j][s]);
                put4(args.out, args.mean_type, (c * args.n + i) * D + d, count, x);
            }
        }
    }
}

void require(cudaError_t status) {
    if (status == cudaSuccess) return;
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status) + " (error " +
                             std::to_string(static_cast<int>(status)) + ")");
}

int blocks_of(int64_t blocks) {
    if (blocks > INT32_MAX)
        throw std::invalid_argument("a draw of this many samples and classes takes more than 2^31 - 1 blocks");
    return static_cast<int>(blocks);
}

// Bytes of shared memory of product<S, samples>.
int shared_bytes(const GaussianArgs& args, int samples) {
    return (kDepth * kPitch + Span(args, static_cast<int>(args.D)).count * samples) * 4;
}

template <class S, int Samples>
void launch_product(const GaussianArgs& args, int processors, cudaStream_t stream) {
    const int bytes = shared_bytes(args, Samples), row_tiles = (static_cast<int>(args.D) + kRows - 1) / kRows;
    const int64_t tiles = (args.n + Samples - 1) / Samples;
    // Where classes and samples do not fill the device, the rows of a class are dealt out too, and their normals are
    // made more than once.
    const int64_t wanted = (4 * static_cast<int64_t>(processors) + args.C * tiles - 1) / (args.C * tiles);
    const int groups = static_cast<int>(wanted < row_tiles ? wanted : row_tiles);
    require(cudaFuncSetAttribute(product<S, Samples>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    product<S, Samples><<<blocks_of(args.C * tiles * groups), kThreads, bytes, stream>>>(
        args, static_cast<int>(tiles), groups);
}

template <class S>
void launch(const GaussianArgs& args, int device, cudaStream_t stream) {
    int most_shared, processors;
    require(cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    require(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    if (args.n > 16 && shared_bytes(args, 32) <= most_shared) return launch_product<S, 32>(args, processors, stream);
    if (args.n > 4 && shared_bytes(args, 16) <= most_shared) return launch_product<S, 16>(args, processors, stream);
    launch_product<S, 4>(args, processors, stream);
}

}  // namespace

void sample_gaussian_cuda(const GaussianArgs& args, int device, void* stream) {
    check_gaussian(args);
    if (args.D + args.rank > kMaxCudaWidth)
        throw std::invalid_argument("D + rank: expected <= " + std::to_string(kMaxCudaWidth) + " on CUDA, got " +
                                    std::to_string(args.D + args.rank));
    require(cudaSetDevice(device));
    if (args.C == 0 || args.n == 0 || args.D == 0) return;

    const auto queue = static_cast<cudaStream_t>(stream);
    if (args.kind == FactorKind::diag) {
        const int64_t items = args.C * args.n * ((args.D + 3) / 4);
        diagonal<<<blocks_of((items + kThreads - 1) / kThreads), kThreads, 0, queue>>>(args);
    } else {
        switch (args.factor_type) {
            case FloatType::f16: launch<__half>(args, device, queue); break;
            case FloatType::bf16: launch<__nv_bfloat16>(args, device, queue); break;
            default: launch<float>(args, device, queue);
        }
    }
    require(cudaGetLastError());
}

}  // namespace spa_fast
