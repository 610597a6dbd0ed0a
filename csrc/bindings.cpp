// spa_fast._C: raw pointers in, raw pointers out. Python validates and allocates.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <sstream>
#include <string>
#include <tuple>

#include "gaussian.h"
#include "patches.h"
#include "similarity.h"
#include "sinkhorn.h"

namespace py = pybind11;

namespace {

using namespace spa_fast;

constexpr Isa kIsas[] = {Isa::portable, Isa::avx2, Isa::avx512};

Isa isa_of(const std::string& name) {
    if (name == "auto") return best_isa();
    for (const Isa isa : kIsas)
        if (name == isa_name(isa)) return isa;
    throw py::value_error("isa: expected auto, portable, avx2 or avx512, got " + name);
}

// Without the lock of the interpreter.
template <class Args>
void run(void (*call)(const Args&, int, Isa), const Args& args, int threads, const std::string& isa) {
    const Isa chosen = isa_of(isa);
    const py::gil_scoped_release release;
    call(args, threads, chosen);
}

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

CostType type_of(int dtype, const char* name) {
    if (dtype < 0 || dtype > 2)
        throw py::value_error(std::string(name) + ": expected 0 (fp32), 1 (fp16) or 2 (bf16), got " +
                              std::to_string(dtype));
    return static_cast<CostType>(dtype);
}

TransportBatch batch(uintptr_t cost, int cost_dtype, int64_t C, bool similarity, uintptr_t a, int64_t a_stride,
                     uintptr_t b, int64_t b_stride, int64_t P, int64_t K, int64_t M, double eps) {
    return {pointer<const void>(cost),
            type_of(cost_dtype, "cost_dtype"),
            C,
            similarity,
            pointer<const float>(a),
            a_stride,
            pointer<const float>(b),
            b_stride,
            P,
            K,
            M,
            eps};
}

void forward(uintptr_t cost, int cost_dtype, uintptr_t a, int64_t a_stride, uintptr_t b, int64_t b_stride, int64_t P,
             int64_t K, int64_t M, double eps, int64_t max_iter, double tol, bool value, uintptr_t score, uintptr_t f,
             uintptr_t g, uintptr_t n_iter, uintptr_t marginal_error, int threads, const std::string& isa, int64_t C,
             bool similarity) {
    const SinkhornArgs args{batch(cost, cost_dtype, C, similarity, a, a_stride, b, b_stride, P, K, M, eps),
                            max_iter,
                            tol,
                            value,
                            pointer<float>(score),
                            pointer<float>(f),
                            pointer<float>(g),
                            pointer<int32_t>(n_iter),
                            pointer<float>(marginal_error)};
    run(sinkhorn_fwd, args, threads, isa);
}

void backward(uintptr_t grad_score, uintptr_t cost, int cost_dtype, uintptr_t a, int64_t a_stride, uintptr_t b,
              int64_t b_stride, uintptr_t f, uintptr_t g, int64_t P, int64_t K, int64_t M, double eps,
              uintptr_t grad_cost, int threads, const std::string& isa, int64_t C, bool similarity) {
    const SinkhornGradArgs args{batch(cost, cost_dtype, C, similarity, a, a_stride, b, b_stride, P, K, M, eps),
                                pointer<const float>(grad_score), pointer<const float>(f), pointer<const float>(g),
                                pointer<void>(grad_cost)};
    run(sinkhorn_bwd, args, threads, isa);
}

typedef std::array<int64_t, 3> Strides;  // from product to product, row to row, number to number

void inner_products(uintptr_t x, const Strides& x_strides, uintptr_t y, const Strides& y_strides, int dtype, int64_t P,
                    int64_t R, int64_t Q, int64_t D, bool normalize, uintptr_t out, int threads,
                    const std::string& isa) {
    const SimilarityArgs args{{pointer<const void>(x), R, x_strides[1], x_strides[2], x_strides[0]},
                              {pointer<const void>(y), Q, y_strides[1], y_strides[2], y_strides[0]},
                              type_of(dtype, "dtype"),
                              P,
                              D,
                              normalize,
                              pointer<float>(out)};
    run(similarity, args, threads, isa);
}

Reduce reduce_of(const std::string& name) {
    if (name == "max") return Reduce::max;
    if (name == "mean") return Reduce::mean;
    if (name == "softmax") return Reduce::softmax;
    throw py::value_error("reduce: expected max, mean or softmax, got " + name);
}

typedef std::array<int64_t, 4> Sizes;  // B, N, C, k

// patches, tokens, their dtype, M, D and token_mask (0: none)
typedef std::tuple<uintptr_t, uintptr_t, int, int64_t, int64_t, uintptr_t> FeatureTuple;

Features features(const FeatureTuple& from) {
    const auto& [patches, tokens, dtype, M, D, token_mask] = from;
    return {pointer<const void>(patches), pointer<const void>(tokens), type_of(dtype, "dtype"), M, D,
            pointer<const bool>(token_mask)};
}

SelectionArgs selection(const FeatureTuple& by, uintptr_t patch_mask, const Sizes& sizes, const std::string& reduce,
                        bool class_conditional, uintptr_t indices) {
    const auto [B, N, C, k] = sizes;
    return {features(by), pointer<const bool>(patch_mask), B, N, C, k, reduce_of(reduce), class_conditional,
            pointer<int64_t>(indices)};
}

void topk_forward(const FeatureTuple& by, uintptr_t patch_mask, const Sizes& sizes, const std::string& reduce,
                  bool class_conditional, uintptr_t scores, uintptr_t indices, uintptr_t argmax, int threads,
                  const std::string& isa) {
    const TopkPatchesArgs args{selection(by, patch_mask, sizes, reduce, class_conditional, indices),
                               pointer<float>(scores), pointer<int32_t>(argmax)};
    run(topk_patches, args, threads, isa);
}

void scores_forward(const FeatureTuple& by, const FeatureTuple& aligned, uintptr_t patch_mask, const Sizes& sizes,
                    const std::string& reduce, bool class_conditional, double eps, int64_t max_iter, double tol,
                    bool value, uintptr_t score, uintptr_t indices, uintptr_t f, uintptr_t g, uintptr_t n_iter,
                    int threads, const std::string& isa) {
    const SpaScoresArgs args{selection(by, patch_mask, sizes, reduce, class_conditional, indices),
                             features(aligned),
                             eps,
                             max_iter,
                             tol,
                             value,
                             pointer<float>(score),
                             pointer<float>(f),
                             pointer<float>(g),
                             pointer<int32_t>(n_iter)};
    run(spa_scores_fwd, args, threads, isa);
}

void scores_backward(uintptr_t grad_score, const FeatureTuple& aligned, uintptr_t patch_mask, const Sizes& sizes,
                     uintptr_t indices, double eps, bool value, uintptr_t f, uintptr_t g, uintptr_t grad_patches,
                     uintptr_t grad_tokens, int threads, const std::string& isa) {
    const auto [B, N, C, k] = sizes;
    const SpaScoresGradArgs args{features(aligned),
                                 pointer<const bool>(patch_mask),
                                 B,
                                 N,
                                 C,
                                 k,
                                 pointer<const int64_t>(indices),
                                 eps,
                                 value,
                                 pointer<const float>(grad_score),
                                 pointer<const float>(f),
                                 pointer<const float>(g),
                                 pointer<void>(grad_patches),
                                 pointer<float>(grad_tokens)};
    run(spa_scores_bwd, args, threads, isa);
}

GaussianArgs gaussian(uintptr_t rows, uintptr_t mean, int mean_dtype, uintptr_t factor, int factor_dtype,
                      int64_t factor_stride, uintptr_t diag, int64_t diag_stride, uintptr_t class_ids, uintptr_t seed,
                      uintptr_t out, int kind, int64_t C, int64_t D, int64_t n, int64_t rank, int64_t first) {
    if (kind < 0 || kind > 2)
        throw py::value_error("kind: expected 0 (tril), 1 (diag) or 2 (lowrank), got " + std::to_string(kind));
    return {static_cast<FactorKind>(kind),
            C,
            D,
            n,
            rank,
            first,
            pointer<const int64_t>(rows),
            pointer<const void>(mean),
            type_of(mean_dtype, "mean_dtype"),
            pointer<const void>(factor),
            type_of(factor_dtype, "factor_dtype"),
            factor_stride,
            pointer<const void>(diag),
            diag_stride,
            pointer<const int64_t>(class_ids),
            pointer<const int64_t>(seed),
            pointer<void>(out)};
}

py::dict build_info() {
    py::list compiled;
    for (const Isa isa : kIsas)
        if (isa_compiled(isa)) compiled.append(isa_name(isa));
    py::dict info;
    info["version"] = SPA_FAST_VERSION;
    info["compiler"] = SPA_FAST_COMPILER;
    info["build_type"] = SPA_FAST_BUILD_TYPE;
    info["simd_compiled"] = compiled;
    info["simd"] = isa_name(best_isa());
    info["openmp"] = openmp_enabled();
    py::list archs;
#ifdef SPA_FAST_CUDA_ARCHS
    std::istringstream names(SPA_FAST_CUDA_ARCHS);
    for (std::string name; std::getline(names, name, ',');) archs.append(name);
#endif
    info["cuda_archs"] = archs;
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    py::class_<GaussianArgs>(module, "GaussianArgs", "A draw over raw pointers; csrc/gaussian.h has the contract.")
        .def(py::init(&gaussian), py::kw_only(), py::arg("rows"), py::arg("mean"), py::arg("mean_dtype"),
             py::arg("factor"), py::arg("factor_dtype"), py::arg("factor_stride"), py::arg("diag"),
             py::arg("diag_stride"), py::arg("class_ids"), py::arg("seed"), py::arg("out"), py::arg("kind"),
             py::arg("C"), py::arg("D"), py::arg("n"), py::arg("rank"), py::arg("first"));
    module.def(
        "sample_gaussian_cpu",
        [](const GaussianArgs& args, int threads, const std::string& isa) {
            run(sample_gaussian_cpu, args, threads, isa);
        },
        "On CPU memory.", py::arg("args"), py::arg("threads"), py::arg("isa") = "auto");
#ifdef SPA_FAST_CUDA_ARCHS
    module.def(
        "sample_gaussian_cuda",
        [](const GaussianArgs& args, int device, uintptr_t stream) {
            const py::gil_scoped_release release;
            sample_gaussian_cuda(args, device, pointer<void>(stream));
        },
        "On memory of a CUDA device.", py::arg("args"), py::arg("device"), py::arg("stream"));
#endif
    module.def("build_info", &build_info, "What this binary was built with and what it runs on this processor.");
    module.def("sinkhorn_fwd", &forward, "Entropic transport over raw CPU pointers; csrc/sinkhorn.h has the contract.",
               py::arg("cost_ptr"), py::arg("cost_dtype"), py::arg("a_ptr"), py::arg("a_stride"), py::arg("b_ptr"),
               py::arg("b_stride"), py::arg("P"), py::arg("K"), py::arg("M"), py::arg("eps"), py::arg("max_iter"),
               py::arg("tol"), py::arg("value"), py::arg("score_ptr"), py::arg("f_ptr"), py::arg("g_ptr"),
               py::arg("n_iter_ptr"), py::arg("err_ptr"), py::arg("threads"), py::arg("isa") = "auto",
               py::arg("C") = 1, py::arg("similarity") = false);
    module.def("sinkhorn_bwd", &backward, "Its gradient for a fixed plan; csrc/sinkhorn.h has the contract.",
               py::arg("grad_score_ptr"), py::arg("cost_ptr"), py::arg("cost_dtype"), py::arg("a_ptr"),
               py::arg("a_stride"), py::arg("b_ptr"), py::arg("b_stride"), py::arg("f_ptr"), py::arg("g_ptr"),
               py::arg("P"), py::arg("K"), py::arg("M"), py::arg("eps"), py::arg("grad_cost_ptr"), py::arg("threads"),
               py::arg("isa") = "auto", py::arg("C") = 1, py::arg("similarity") = false);
    module.def("similarity", &inner_products, "All pairs of rows; csrc/similarity.h has the contract.",
               py::arg("x_ptr"), py::arg("x_strides"), py::arg("y_ptr"), py::arg("y_strides"), py::arg("dtype"),
               py::arg("P"), py::arg("R"), py::arg("Q"), py::arg("D"), py::arg("normalize"), py::arg("out_ptr"),
               py::arg("threads"), py::arg("isa") = "auto");
    module.def("topk_patches_fwd", &topk_forward, "Selection; csrc/patches.h has the contract.", py::arg("by"),
               py::arg("patch_mask_ptr"), py::arg("sizes"), py::arg("reduce"), py::arg("class_conditional"),
               py::arg("scores_ptr"), py::arg("indices_ptr"), py::arg("argmax_ptr"), py::arg("threads"),
               py::arg("isa") = "auto");
    module.def("spa_scores_fwd", &scores_forward, "Selection and transport; csrc/patches.h has the contract.",
               py::arg("by"), py::arg("aligned"), py::arg("patch_mask_ptr"), py::arg("sizes"), py::arg("reduce"),
               py::arg("class_conditional"), py::arg("eps"), py::arg("max_iter"), py::arg("tol"), py::arg("value"),
               py::arg("score_ptr"), py::arg("indices_ptr"), py::arg("f_ptr"), py::arg("g_ptr"), py::arg("n_iter_ptr"),
               py::arg("threads"), py::arg("isa") = "auto");
    module.def("spa_scores_bwd", &scores_backward, "Its gradient; csrc/patches.h has the contract.",
               py::arg("grad_score_ptr"), py::arg("aligned"), py::arg("patch_mask_ptr"), py::arg("sizes"),
               py::arg("indices_ptr"), py::arg("eps"), py::arg("value"), py::arg("f_ptr"), py::arg("g_ptr"),
               py::arg("grad_patches_ptr"), py::arg("grad_tokens_ptr"), py::arg("threads"), py::arg("isa") = "auto");
}
