// Draws on a CPU: normals of W counters at a time, and dot products of factor rows with them.
//
// A dot product is summed in one order wherever it stands: lane l takes entries l, l + W, ..., and the lanes are added
// by halves. So a draw does not depend on its neighbours, and zeros behind a row's end change nothing.
#include "gaussian_lanes.h"
#include "philox.h"
#include "vector.h"

namespace spa_fast {
namespace {

// Samples and rows whose W dot products are in registers at once.
constexpr int kSamples = 4;
constexpr int kRows = W / kSamples;
// Normals of a block of samples stay in the second-level cache beside the rows that pass by.
constexpr int64_t kBlockBytes = 512 << 10;
// How far rows that are read once are fetched ahead of their use.
constexpr int kAhead = 8 << 10;

constexpr int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

struct Lanewise {
    typedef spa_fast::F F;
    typedef spa_fast::I I;
    typedef spa_fast::U U;

    static F from(U x) { return __builtin_convertvector(x, F); }
    static F from(I x) { return __builtin_convertvector(x, F); }
    static F splat(float x) { return spa_fast::splat<F>(x); }
    static U bits(F x) { return (U)x; }
    static F number(U x) { return (F)x; }
#if defined(__AVX512F__)
    static F mad(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
    static F sqrt(F x) { return (F)_mm512_maskz_sqrt_ps(0xffff, (__m512)x); }
    static U high(U a, uint32_t b) {
        const __m512i even = (__m512i)a, odd = _mm512_maskz_srli_epi64(0xff, even, 32);
        const __m512i factor = _mm512_set1_epi32(static_cast<int>(b));
        const __m512i low = _mm512_maskz_srli_epi64(0xff, _mm512_maskz_mul_epu32(0xff, even, factor), 32);
        return (U)_mm512_mask_blend_epi32(0xaaaa, low, _mm512_maskz_mul_epu32(0xff, odd, factor));
    }
#elif defined(__AVX2__)
    static F mad(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
    static F sqrt(F x) { return (F)_mm256_sqrt_ps((__m256)x); }
    static U high(U a, uint32_t b) {
        const __m256i even = (__m256i)a, factor = _mm256_set1_epi32(static_cast<int>(b));
        const __m256i low = _mm256_srli_epi64(_mm256_mul_epu32(even, factor), 32);
        return (U)_mm256_blend_epi32(low, _mm256_mul_epu32(_mm256_srli_epi64(even, 32), factor), 0xaa);
    }
#else
    static F mad(F a, F b, F c) { return a * b + c; }
    static F sqrt(F x) {
        F root;
        for (int l = 0; l < W; ++l) root[l] = __builtin_sqrtf(x[l]);
        return root;
    }
    static U high(U a, uint32_t b) {
        typedef uint64_t Wide __attribute__((vector_size(W * 8)));
        return __builtin_convertvector(__builtin_convertvector(a, Wide) * b >> 32, U);
    }
#endif
};

typedef typename Count<W>::type All;

U lane_numbers() {
    U lane;
    for (int l = 0; l < W; ++l) lane[l] = l;
    return lane;
}

// Normals 0 .. count - 1 of a sample; count is a multiple of 4 W.
void fill_normals(uint64_t seed, int64_t class_id, int64_t sample, int64_t count, float* z) {
    const U lane = lane_numbers();
    const U samples = splat<U>(static_cast<uint32_t>(sample)), classes = splat<U>(static_cast<uint32_t>(class_id));
    for (int64_t d = 0; d < count; d += 4 * W) {
        F x[4];
        normals<Lanewise>(lane + static_cast<uint32_t>(d / 4), samples, classes, seed, x);
        const F low02 = zip<0>(x[0], x[2], All()), high02 = zip<H>(x[0], x[2], All());
        const F low13 = zip<0>(x[1], x[3], All()), high13 = zip<H>(x[1], x[3], All());
        store(z + d, zip<0>(low02, low13, All()));
        store(z + d + W, zip<H>(low02, low13, All()));
        store(z + d + 2 * W, zip<0>(high02, high13, All()));
        store(z + d + 3 * W, zip<H>(high02, high13, All()));
    }
}

// Lane i of the result is the sum over the lanes of x[i].
inline F sums(F (&x)[W]) {
    for (int n = H; n > 0; n /= 2)
        for (int i = 0; i < n; ++i) x[i] = zip<0>(x[i], x[i + n], All()) + zip<H>(x[i], x[i + n], All());
    return x[0];
}

inline void put_sums(F (&sum)[W], int start, float (*product)[W]) {
    float found[W];
    store(found, sums(sum));
    for (int s = 0; s < kSamples; ++s)
        __builtin_memcpy(&product[s][start], found + s * kRows, kRows * sizeof(float));
}

// product[s][r] = row r of the panel times sample s. On its own, so that the sums keep their registers.
__attribute__((noinline)) void multiply(const float* panel, int64_t panel_stride, const float* z, int64_t z_stride,
                                        int64_t steps, float (*product)[W]) {
    for (int start = 0; start < W; start += kRows, panel += kRows * panel_stride) {
        F sum[W] = {};
        for (int64_t j = 0; j < steps * W; j += W) {
            F x[kRows];
            for (int r = 0; r < kRows; ++r) x[r] = load<F>(panel + r * panel_stride + j);
            for (int s = 0; s < kSamples; ++s) {
                const F y = load<F>(z + s * z_stride + j);
                for (int r = 0; r < kRows; ++r) sum[s * kRows + r] = Lanewise::mad(x[r], y, sum[s * kRows + r]);
            }
        }
        put_sums(sum, start, product);
    }
}

// The first n <= W entries, 0 beyond; reads on to `end` at most.
template <class S>
inline F head(const S* from, int64_t n, const S* end) {
    if (end - from < W) return n == W ? widen(from) : widen(from, n);
    return (F)((I)widen(from) & ((I)lane_numbers() < static_cast<int32_t>(n)));
}

// The same for one group of four samples straight from the factor, whose rows are then read once and not copied: all
// have `steps` whole vectors, row r has tail[r] <= W entries more.
template <class S>
__attribute__((noinline)) void multiply_streamed(const S* const* rows, const S* end, const float* z, int64_t z_stride,
                                                 int64_t steps, const int* tail, float (*product)[W]) {
    for (int start = 0; start < W; start += kRows) {
        const S* from[kRows];
        for (int r = 0; r < kRows; ++r) from[r] = rows[start + r];
        const char* ahead = reinterpret_cast<const char*>(from[0]) + kAhead;
        F sum[W] = {};
        for (int64_t j = 0; j < steps * W; j += W) {
            for (size_t byte = 0; byte < kRows * W * sizeof(S); byte += 64) __builtin_prefetch(ahead + byte);
            ahead += kRows * W * sizeof(S);
            F x[kRows];
            for (int r = 0; r < kRows; ++r) x[r] = widen(from[r] + j);
            for (int s = 0; s < kSamples; ++s) {
                const F y = load<F>(z + s * z_stride + j);
                for (int r = 0; r < kRows; ++r) sum[s * kRows + r] = Lanewise::mad(x[r], y, sum[s * kRows + r]);
            }
        }
        for (int r = 0; r < kRows; ++r) {
            const F x = head(from[r] + steps * W, tail[start + r], end);
            for (int s = 0; s < kSamples; ++s)
                sum[s * kRows + r] = Lanewise::mad(x, load<F>(z + s * z_stride + steps * W), sum[s * kRows + r]);
        }
        put_sums(sum, start, product);
    }
}

// One row of a factor as fp32, zeros behind it.
template <class S>
inline void expand(const S* from, int64_t length, const S* end, float* to, int64_t steps) {
    int64_t k = 0;
    for (; k + W <= length; k += W) store(to + k, widen(from + k));
    if (k < length) store(to + k, head(from + k, length - k, end)), k += W;
    for (; k < steps * W; k += W) store(to + k, F{});
}

struct Layout {
    int64_t normals;       // of a sample, a multiple of 4 W
    int64_t z_stride;      // a line more: strides of a power of two would meet in one set of the cache
    int64_t panel_stride;  // 0 where nothing is multiplied
    int64_t block;

    explicit Layout(const GaussianArgs& args) {
        const bool lowrank = args.kind == FactorKind::lowrank;
        normals = round_up(args.D + (lowrank ? round_up(args.rank, W) : 0), 4 * W);
        z_stride = normals + 16;
        const int64_t row = round_up(lowrank ? args.rank : args.D, W);
        panel_stride = args.kind == FactorKind::diag ? 0 : row + 16;
        const int64_t fit = kBlockBytes / (z_stride * 4) / kSamples * kSamples, all = round_up(args.n, kSamples);
        block = args.kind == FactorKind::diag ? 64 : fit < kSamples ? kSamples : fit < all ? fit : all;
    }
    int64_t z_rows() const { return panel_stride == 0 ? 1 : block; }
};

int64_t block(const GaussianArgs& args) { return Layout(args).block; }

int64_t workspace_bytes(const GaussianArgs& args) {
    const Layout layout(args);
    return (layout.z_rows() * layout.z_stride + W * layout.panel_stride) * 4;
}

// mean + x to dimensions d and on of one sample.
template <class M>
inline void put(M* out, int64_t d, int64_t D, F x) {
    if (d + W <= D) return narrow(out + d, x);
    narrow(out + d, x, D - d);
}
template <class S>
inline F get(const S* from, int64_t d, int64_t D) {
    return d + W <= D ? widen(from + d) : widen(from + d, D - d);
}

int64_t row_of(const GaussianArgs& args, int64_t c) {
    return args.rows == nullptr ? c : args.rows[c];
}

template <class M, class S>
void draw_diagonal(const GaussianArgs& args, int64_t c, int64_t start, int64_t stop, float* z, const Layout& layout) {
    const int64_t from = row_of(args, c);
    const M* mean = static_cast<const M*>(args.mean) + from * args.D;
    const S* std = static_cast<const S*>(args.factor) + from * args.factor_stride;
    M* out = static_cast<M*>(args.out) + (c * args.n + start) * args.D;
    for (int64_t i = start; i < stop; ++i, out += args.D) {
        fill_normals(static_cast<uint64_t>(*args.seed), args.class_ids[c], args.first + i, layout.normals, z);
        for (int64_t d = 0; d < args.D; d += W)
            put(out, d, args.D, Lanewise::mad(get(std, d, args.D), load<F>(z + d), get(mean, d, args.D)));
    }
}

template <class M, class S>
void draw_product(const GaussianArgs& args, int64_t c, int64_t start, int64_t stop, float* z, const Layout& layout) {
    const int64_t D = args.D, count = stop - start, quads = round_up(count, kSamples);
    const bool lowrank = args.kind == FactorKind::lowrank;
    const int64_t from = row_of(args, c);
    const M* mean = static_cast<const M*>(args.mean) + from * D;
    const S* factor = static_cast<const S*>(args.factor) + from * args.factor_stride;
    const S* end = factor + (lowrank ? D * args.rank : D * (D + 1) / 2);
    const S* diag = static_cast<const S*>(args.diag) + (lowrank ? from * args.diag_stride : 0);
    float* panel = z + layout.z_rows() * layout.z_stride;
    // The last three of a block that is no multiple of four only fill registers.
    for (int64_t i = 0; i < quads; ++i)
        fill_normals(static_cast<uint64_t>(*args.seed), args.class_ids[c], args.first + start + i, layout.normals,
                     z + i * layout.z_stride);

    const bool streamed = count <= kSamples;
    const int64_t offset = lowrank ? D : 0;
    const S* row = factor;
    for (int64_t d = 0; d < D; d += W) {
        const int64_t steps = lowrank ? (args.rank + W - 1) / W : d / W + 1;
        const S* rows[W];
        int tail[W];
        for (int64_t r = 0; r < W; ++r) {
            const int64_t length = d + r >= D ? 0 : lowrank ? args.rank : d + r + 1;
            // Behind the last row the first one is multiplied again, for nobody.
            rows[r] = length > 0 ? row : rows[0];
            tail[r] = length > 0 ? static_cast<int>(length - (steps - 1) * W) : 0;
            if (!streamed) expand(row, length, end, panel + r * layout.panel_stride, steps);
            row += length;
        }
        const F center = get(mean, d, D), spread = lowrank ? get(diag, d, D) : F{};
        for (int64_t i = 0; i < quads; i += kSamples) {
            const float* quad = z + i * layout.z_stride;
            float product[kSamples][W];
            if (streamed)
                multiply_streamed(rows, end, quad + offset, layout.z_stride, steps - 1, tail, product);
            else
                multiply(panel, layout.panel_stride, quad + offset, layout.z_stride, steps, product);
            for (int64_t s = 0; s < kSamples && i + s < count; ++s) {
                F x = load<F>(product[s]);
                if (lowrank) x = Lanewise::mad(spread, load<F>(quad + s * layout.z_stride + d), x);
                put(static_cast<M*>(args.out) + (c * args.n + start + i + s) * D, d, D, center + x);
            }
        }
    }
}

template <class M, class S>
void draw(const GaussianArgs& args, int64_t c, int64_t start, int64_t stop, float* workspace) {
    const Layout layout(args);
    (args.kind == FactorKind::diag ? draw_diagonal<M, S> : draw_product<M, S>)(args, c, start, stop, workspace, layout);
}

template <class M>
void draw_from(const GaussianArgs& args, int64_t c, int64_t start, int64_t stop, float* workspace) {
    switch (args.factor_type) {
        case FloatType::f16: return draw<M, Half>(args, c, start, stop, workspace);
        case FloatType::bf16: return draw<M, BFloat>(args, c, start, stop, workspace);
        default: return draw<M, float>(args, c, start, stop, workspace);
    }
}

void draw_any(const GaussianArgs& args, int64_t c, int64_t start, int64_t stop, void* workspace) {
    float* memory = static_cast<float*>(workspace);
    switch (args.mean_type) {
        case FloatType::f16: return draw_from<Half>(args, c, start, stop, memory);
        case FloatType::bf16: return draw_from<BFloat>(args, c, start, stop, memory);
        default: return draw_from<float>(args, c, start, stop, memory);
    }
}

}  // namespace

#define SPA_FAST_JOIN(x, y) x##y
#define SPA_FAST_NAME(isa) SPA_FAST_JOIN(gaussian_, isa)
extern const GaussianLanes SPA_FAST_NAME(SPA_FAST_ISA);
const GaussianLanes SPA_FAST_NAME(SPA_FAST_ISA) = {block, workspace_bytes, draw_any};

}  // namespace spa_fast
