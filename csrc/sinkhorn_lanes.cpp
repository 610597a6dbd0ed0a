// The solver, one problem per vector lane: no horizontal sums, and a lane's arithmetic never sees its neighbours.
//
// A problem takes one of two branches:
//   kernel space, fp32: K_ij = exp((rowmin_i - C_ij) / eps), u = a / (K v), v = b / (K^T u); two FMAs an entry and
//                       iteration;
//   log domain, fp64:   where K would underflow (row range beyond 80 eps, +inf entries, or a denominator seen below
//                       1e-30) and where eps is so large against C that log(K v) loses C in fp32.
// Of a similarity S they solve the cost -S, exact where S is tiny, whose f is smaller by 1: <P, S> is then not a
// difference of larger numbers.
#include "sinkhorn_lanes.h"
#include "vector.h"

namespace spa_fast {
namespace {

// Row range / eps of the kernel space: e^-80 = 1.8e-35 is still a normal fp32.
constexpr double kMaxRange = 80;
// eps / max|C| of the kernel space: log(K v) is good to about 2e-7, so potentials and value to eps * 2e-7.
constexpr double kMaxEps = 2;
constexpr float kMinDenominator = 1e-30f;  // entries lost to underflow, below 1e-38, do not show beside it
constexpr float kMinScaling = 1e-36f;      // u and v stay normal numbers
// Sums of the log domain, whose terms below 2^-1000 are lost and above 2^1000 cut.
constexpr double kLogTiny = 0x1p-300, kLogHuge = 0x1p300;

struct Group {
    F *cost, *a, *b;  // [K, M] (-S for a similarity), [K], [M]; entries without weight are 0 in cost
    F *f, *g;         // results, units of cost
    F* kernel;        // [K, M], 1 where there is no weight
    F *rowmin, *u, *u_next, *u_stop;
    F *v, *v_sum, *v_stop;
    D *phi, *phi_next, *phi_stop, *log_a;             // [K], base-2 logarithms
    D *gamma, *gamma_stop, *log_b, *col, *part, *sum;  // [M]
    F score = {}, marginal_error = {};
    I n_iter = {};

    Group(Arena& arena, int64_t K, int64_t M) {
        cost = arena.take<F>(K * M);
        kernel = arena.take<F>(K * M);
        F** const rows32[] = {&a, &f, &rowmin, &u, &u_next, &u_stop};
        F** const cols32[] = {&b, &g, &v, &v_sum, &v_stop};
        D** const rows64[] = {&phi, &phi_next, &phi_stop, &log_a};
        D** const cols64[] = {&gamma, &gamma_stop, &log_b, &col, &part, &sum};
        for (F** piece : rows32) *piece = arena.take<F>(K);
        for (F** piece : cols32) *piece = arena.take<F>(M);
        for (D** piece : rows64) *piece = arena.take<D>(K);
        for (D** piece : cols64) *piece = arena.take<D>(M);
    }
};

int64_t workspace_bytes(int64_t K, int64_t M) {
    Arena arena{nullptr};
    Group group(arena, K, M);
    return arena.used;
}

// R rows of one iteration: u = a / (K v), column_sum += K^T u; the marginal error of the iterate before it comes for
// free.
template <int R, bool Error>
inline void iterate_rows(const Group& s, int64_t i, int64_t M, F& error, F& smallest) {
    const F* kernel = s.kernel + i * M;
    F sum[R], u[R];
    for (int r = 0; r < R; ++r) sum[r] = F{};
    for (int64_t j = 0; j < M; ++j) {
        const F v = s.v[j];
        for (int r = 0; r < R; ++r) sum[r] += kernel[r * M + j] * v;
    }
    for (int r = 0; r < R; ++r) {
        u[r] = s.a[i + r] / sum[r];
        smallest = min(smallest, sum[r]);
        if (Error) error += abs(s.u[i + r] * sum[r] - s.a[i + r]);
        s.u_next[i + r] = u[r];
    }
    for (int64_t j = 0; j < M; ++j) {
        F column = s.v_sum[j];
        for (int r = 0; r < R; ++r) column += kernel[r * M + j] * u[r];
        s.v_sum[j] = column;
    }
}

template <bool Error>
void iterate(const Group& s, int64_t K, int64_t M, F& error, F& smallest) {
    for (int64_t j = 0; j < M; ++j) s.v_sum[j] = F{};
    int64_t i = 0;
    for (; i + 8 <= K; i += 8) iterate_rows<8, Error>(s, i, M, error, smallest);
    if (i + 4 <= K) iterate_rows<4, Error>(s, i, M, error, smallest), i += 4;
    for (; i < K; ++i) iterate_rows<1, Error>(s, i, M, error, smallest);
}

template <class V, class Mask>
inline void keep(V* to, const V* from, Mask mask, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = mask ? from[i] : to[i];
}

// Solves the lanes of `running`; returns those whose denominators came too near to underflow, to be solved again.
I solve_kernel(Group& s, const SinkhornArgs& args, I running) {
    const int64_t K = args.K, M = args.M;
    const float tol = static_cast<float>(args.tol);
    const I wanted = running;
    F smallest = splat<F>(1.0f);
    I underflow = {};
    for (int64_t i = 0; i < K; ++i) s.u_stop[i] = F{};
    for (int64_t j = 0; j < M; ++j) s.v[j] = s.v_stop[j] = s.b[j];
    s.n_iter = I{};
    s.marginal_error = F{};

    const auto stop = [&](I mask, int64_t n) {
        keep(s.u_stop, s.u, mask, K);
        keep(s.v_stop, s.v, mask, M);
        s.n_iter = mask ? splat<I>(static_cast<int32_t>(n)) : s.n_iter;
        underflow |= mask & ~(smallest >= kMinDenominator);
        running &= ~mask;
    };
    for (int64_t n = 0; n < args.max_iter; ++n) {
        if (tol > 0 && n > 0) {
            F error = {};
            iterate<true>(s, K, M, error, smallest);
            const I done = running & (error <= tol);
            if (any(done)) {
                s.marginal_error = done ? error : s.marginal_error;
                stop(done, n);
                if (!any(running)) break;
            }
        } else {
            F unused;
            iterate<false>(s, K, M, unused, smallest);
        }
        for (int64_t j = 0; j < M; ++j) {
            smallest = min(smallest, s.v_sum[j]);
            s.v[j] = s.b[j] / s.v_sum[j];
        }
        F* const u = s.u;
        s.u = s.u_next;
        s.u_next = u;
    }
    const I exhausted = running;
    stop(exhausted, args.max_iter);

    const float eps = static_cast<float>(args.eps), to_cost = static_cast<float>(args.eps * kLn2);
    const float shift = args.similarity ? 1.0f : 0.0f;
    F transport = {}, value = {}, error = {}, sum_a = {}, sum_b = {};
    for (int64_t i = 0; i < K; ++i) {
        const F* kernel = s.kernel + i * M;
        const F* cost = s.cost + i * M;
        F mass = {}, moved = {};
        for (int64_t j = 0; j < M; ++j) {
            const F plan = kernel[j] * s.v_stop[j];
            mass += plan;
            moved += plan * cost[j];
        }
        const F u = s.u_stop[i], a = s.a[i];
        underflow |= (a > 0.0f) & ~(u >= kMinScaling);
        s.f[i] = a > 0.0f ? shift + s.rowmin[i] + to_cost * log2(u / a) : F{};
        mass *= u;
        transport += moved * u;
        value += mass * s.f[i];
        error += abs(mass - a);
        sum_a += a;
    }
    for (int64_t j = 0; j < M; ++j) {
        const F v = s.v_stop[j], b = s.b[j];
        underflow |= (b > 0.0f) & ~(v >= kMinScaling);
        s.g[j] = b > 0.0f ? to_cost * log2(v / b) : F{};
        value += b * s.g[j];
        sum_b += b;
    }
    s.marginal_error = exhausted ? error : s.marginal_error;
    s.score = args.value ? value - eps * (sum_b - sum_a * sum_b) : args.similarity ? 0.0f - transport : transport;
    return underflow & wanted;
}

inline D widen_half(const F* from, int half) {
    return __builtin_convertvector(load<FH>(reinterpret_cast<const float*>(from) + half * H), D);
}
inline void narrow_half(F* to, int half, D x, I64 mask) {
    float* at = reinterpret_cast<float*>(to) + half * H;
    store(at, __builtin_convertvector(mask, IH) ? __builtin_convertvector(x, FH) : load<FH>(at));
}
inline D log2_weight(D weight) { return weight > 0.0 ? log2(weight) : splat<D>(-__builtin_inf()); }
// 2^x for x < 1000; -inf and all else below fp64 goes to 2^-1000.
inline D exp2_clamped(D x) { return exp2(max(x, splat<D>(-1000.0))); }

// Solves the lanes of `running` in one half of the group, the others are left as they are.
//
// One exponential an entry and iteration: of the plan at the last potentials, whose row sums correct f and, with f
// corrected, whose column sums correct g. Where a sum is so far from its weight that terms may have been lost or have
// overflowed, which the first iterations can do, its logarithm is taken anew from its largest term.
void solve_log(Group& s, const SinkhornArgs& args, int half, I64 running) {
    const int64_t K = args.K, M = args.M;
    const double scale = kLog2E / args.eps, shift = args.similarity ? 1 : 0;
    const D nothing = splat<D>(-__builtin_inf());
    const I64 wanted = running;
    D error_stop = {}, n_stop = {};
    for (int64_t i = 0; i < K; ++i) {
        s.log_a[i] = log2_weight(widen_half(s.a + i, half));
        s.phi[i] = D{};
    }
    D* const scaled = reinterpret_cast<D*>(s.kernel);  // as many bytes, and kernel space is done with them
    for (int64_t e = 0; e < K * M; ++e) scaled[e] = widen_half(s.cost + e, half) * scale;
    for (int64_t j = 0; j < M; ++j) {
        s.log_b[j] = s.col[j] = log2_weight(widen_half(s.b + j, half));
        s.gamma[j] = D{};
    }

    // n counts iterations done; the rows of iteration n + 1 give the marginal error of iterate n.
    for (int64_t n = 0;; ++n) {
        D error = {};
        for (int64_t j = 0; j < M; ++j) s.sum[j] = D{};
        for (int64_t i = 0; i < K; ++i) {
            const D* cost = scaled + i * M;
            const D phi = s.phi[i], a = widen_half(s.a + i, half);
            D mass = {};
            for (int64_t j = 0; j < M; ++j) {
                const D part = exp2_clamped(min(s.col[j] - cost[j] + phi, splat<D>(1000.0)));
                s.part[j] = part;
                mass += part;
            }
            D next = phi - log2(mass), share = a / mass;
            const I64 lost = wanted & ~((mass > kLogTiny) & (mass < kLogHuge));
            if (any(lost)) {
                D top = nothing, sum = {};
                for (int64_t j = 0; j < M; ++j) top = max(s.col[j] - cost[j], top);
                const I64 reached = top > nothing;
                top = reached ? top : D{};
                for (int64_t j = 0; j < M; ++j) {
                    const D part = exp2_clamped(s.col[j] - cost[j] - top);
                    s.part[j] = lost ? part : s.part[j];
                    sum += part;
                }
                const D exact = reached ? -(top + log2(sum)) : D{};
                next = lost ? exact : next;
                share = lost ? (reached ? a / sum : D{}) : share;
                mass = lost ? (reached ? exp2_clamped(phi - exact) : D{}) : mass;
            }
            s.phi_next[i] = next;
            error += a * abs(mass - 1.0);
            for (int64_t j = 0; j < M; ++j) s.sum[j] += s.part[j] * share;
        }
        if (n > 0) {
            const I64 done = n == args.max_iter ? running : args.tol > 0 ? running & (error <= args.tol) : I64{};
            if (any(done)) {
                keep(s.phi_stop, s.phi, done, K);
                keep(s.gamma_stop, s.gamma, done, M);
                error_stop = done ? error : error_stop;
                n_stop = done ? splat<D>(static_cast<double>(n)) : n_stop;
                running &= ~done;
                if (!any(running)) break;
            }
        }
        for (int64_t i = 0; i < K; ++i) s.phi[i] = s.phi_next[i];
        for (int64_t j = 0; j < M; ++j) {
            const D b = widen_half(s.b + j, half), sum = s.sum[j];
            D next = s.gamma[j] - log2(sum / b);
            const I64 lost = wanted & (b > 0.0) & ~((sum > kLogTiny) & (sum < kLogHuge));
            if (any(lost)) {
                D top = nothing, exact = {};
                for (int64_t i = 0; i < K; ++i) top = max(s.log_a[i] + s.phi[i] - scaled[i * M + j], top);
                const I64 reached = top > nothing;
                top = reached ? top : D{};
                for (int64_t i = 0; i < K; ++i)
                    exact += exp2_clamped(s.log_a[i] + s.phi[i] - scaled[i * M + j] - top);
                next = lost ? (reached ? -(top + log2(exact)) : D{}) : next;
            }
            s.gamma[j] = b > 0.0 ? next : D{};
            s.col[j] = s.log_b[j] + s.gamma[j];
        }
    }

    D transport = {}, value = {}, total = {}, sum_a = {}, sum_b = {};
    for (int64_t j = 0; j < M; ++j) {
        s.col[j] = s.log_b[j] + s.gamma_stop[j];
        s.sum[j] = D{};
        sum_b += widen_half(s.b + j, half);
    }
    for (int64_t i = 0; i < K; ++i) {
        const D row = s.log_a[i] + s.phi_stop[i];
        D mass = {};
        I64 reached = {};
        for (int64_t j = 0; j < M; ++j) {
            const D cost = widen_half(s.cost + i * M + j, half);
            const D exponent = row + s.col[j] - scaled[i * M + j];
            const D plan = exponent > -1000.0 ? exp2_clamped(exponent) : D{};
            reached |= exponent > nothing;
            mass += plan;
            s.sum[j] += plan;
            transport += plan > 0.0 ? plan * cost : D{};
        }
        const D f = reached ? s.phi_stop[i] / scale + shift : D{};
        value += mass * f;
        total += mass;
        sum_a += widen_half(s.a + i, half);
        narrow_half(s.f + i, half, f, wanted);
    }
    for (int64_t j = 0; j < M; ++j) {
        value += s.sum[j] * s.gamma_stop[j] / scale;
        narrow_half(s.g + j, half, s.log_b[j] > nothing ? s.gamma_stop[j] / scale : D{}, wanted);
    }
    const D plain = args.similarity ? 0.0 - transport : transport;
    narrow_half(&s.score, half, args.value ? value - args.eps * (total - sum_a * sum_b) : plain, wanted);
    narrow_half(&s.marginal_error, half, error_stop, wanted);
    int32_t* const n_iter = reinterpret_cast<int32_t*>(&s.n_iter) + half * H;
    store(n_iter, __builtin_convertvector(wanted, IH) ? __builtin_convertvector(n_stop, IH) : load<IH>(n_iter));
}

// Row minima, the kernel, and per lane what the branches need to know.
template <bool Masked>
void build_kernel(Group& s, int64_t K, int64_t M, float scale, F& range, F& largest, F& poison) {
    range = largest = poison = F{};
    for (int64_t i = 0; i < K; ++i) {
        F* cost = s.cost + i * M;
        F* kernel = s.kernel + i * M;
        const I row = s.a[i] > 0.0f;
        F low = splat<F>(kInf), high = splat<F>(-kInf);
        for (int64_t j = 0; j < M; ++j) {
            if (Masked) {
                const I active = row & (s.b[j] > 0.0f);
                cost[j] = active ? cost[j] : F{};
                low = min(active ? cost[j] : low, low);
                high = max(active ? cost[j] : high, high);
            } else {
                low = min(cost[j], low);
                high = max(cost[j], high);
            }
            poison += cost[j] * 0.0f;
        }
        if (Masked) {
            low = row ? low : F{};
            high = row ? high : F{};
        }
        s.rowmin[i] = low;
        range = max(high - low, range);
        largest = max(max(abs(low), abs(high)), largest);
        for (int64_t j = 0; j < M; ++j) {
            kernel[j] = exp2((low - cost[j]) * scale);
            if (Masked) {
                const I active = row & (s.b[j] > 0.0f);
                kernel[j] = active ? kernel[j] : splat<F>(1.0f);
            }
        }
    }
}

template <class S>
void load_group(const SinkhornArgs& args, const int64_t* problem, F* out) {
    const int64_t K = args.K, M = args.M, C = args.C;
    int64_t offset[W];
    for (int l = 0; l < W; ++l) offset[l] = (problem[l] / C) * K * C * M + problem[l] % C * M;
    const S* const from = static_cast<const S*>(args.cost);
    if (C == 1)
        interleave(from, offset, K * M, out);
    else
        for (int64_t i = 0; i < K; ++i) interleave(from + i * C * M, offset, M, out + i * M);
    if (args.similarity)
        for (int64_t e = 0; e < K * M; ++e) out[e] = 0.0f - out[e];
}

// Weights of W problems, interleaved; `sound` loses the lanes with a weight that is negative, NaN or infinite.
void load_weights(const float* from, int64_t stride, const int64_t* problem, int64_t n, F* out, F& total, I& all,
                  I& sound) {
    int64_t offset[W];
    for (int l = 0; l < W; ++l) offset[l] = problem[l] * stride;
    if (stride == 0)
        for (int64_t i = 0; i < n; ++i) out[i] = splat<F>(from[i]);
    else
        interleave(from, offset, n, out);
    total = F{};
    for (int64_t i = 0; i < n; ++i) {
        total += out[i];
        all &= out[i] > 0.0f;
        sound &= (out[i] >= 0.0f) & (out[i] < kInf);
    }
}

void solve(const SinkhornArgs& args, int64_t index, void* workspace) {
    const int64_t K = args.K, M = args.M, first = index * W;
    const int count = static_cast<int>(args.P - first < W ? args.P - first : W);
    int64_t problem[W];  // lanes past the end repeat the last problem and are not written
    for (int l = 0; l < W; ++l) problem[l] = first + (l < count ? l : count - 1);

    Arena arena{static_cast<char*>(workspace)};
    Group s(arena, K, M);
    F sum_a, sum_b, range, largest, poison;
    I all = splat<I>(-1), sound = splat<I>(-1);
    load_weights(args.a, args.a_stride, problem, K, s.a, sum_a, all, sound);
    load_weights(args.b, args.b_stride, problem, M, s.b, sum_b, all, sound);
    switch (args.cost_type) {
        case CostType::f32: load_group<float>(args, problem, s.cost); break;
        case CostType::f16: load_group<Half>(args, problem, s.cost); break;
        case CostType::bf16: load_group<BFloat>(args, problem, s.cost); break;
    }
    const float scale = static_cast<float>(kLog2E / args.eps), eps = static_cast<float>(args.eps);
    if (any(~all))
        build_kernel<true>(s, K, M, scale, range, largest, poison);
    else
        build_kernel<false>(s, K, M, scale, range, largest, poison);

    const I empty = sound & ((sum_a == 0.0f) | (sum_b == 0.0f));
    const I finite = poison == 0.0f;
    if (any(~finite))  // NaN and -inf spoil a problem, +inf only forbids a pair
        for (int64_t e = 0; e < K * M; ++e) sound &= s.cost[e] > -kInf;
    const I solvable = sound & ~empty;
    if (args.similarity) largest = max(largest, splat<F>(1.0f));
    const I fast = solvable & finite & (range * scale <= static_cast<float>(kMaxRange * kLog2E)) &
                   (largest * static_cast<float>(kMaxEps) >= eps);
    I slow = solvable & ~fast;
    if (any(fast)) slow |= solve_kernel(s, args, fast);
    if (any(slow))
        for (int half = 0; half < 2; ++half) {
            const I64 lanes = __builtin_convertvector(load<IH>(reinterpret_cast<int32_t*>(&slow) + half * H), I64);
            if (any(lanes)) solve_log(s, args, half, lanes);
        }

    for (int l = 0; l < count; ++l) {
        const int64_t p = first + l;
        const bool dead = !solvable[l];
        const float fill = empty[l] ? 0.0f : __builtin_nanf("");
        for (int64_t i = 0; i < K; ++i) args.f[p * K + i] = !dead ? s.f[i][l] : s.a[i][l] == 0.0f ? 0.0f : fill;
        for (int64_t j = 0; j < M; ++j) args.g[p * M + j] = !dead ? s.g[j][l] : s.b[j][l] == 0.0f ? 0.0f : fill;
        args.score[p] = dead ? fill : s.score[l];
        args.marginal_error[p] = dead ? fill : s.marginal_error[l];
        args.n_iter[p] = dead ? 0 : s.n_iter[l];
    }
}

}  // namespace

#define SPA_FAST_JOIN(x, y) x##y
#define SPA_FAST_NAME(isa) SPA_FAST_JOIN(lanes_, isa)
extern const LaneSolver SPA_FAST_NAME(SPA_FAST_ISA);
const LaneSolver SPA_FAST_NAME(SPA_FAST_ISA) = {W, workspace_bytes, solve};

}  // namespace spa_fast
