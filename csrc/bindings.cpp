// spa_fast._C: raw pointers in, raw pointers out. Python validates and allocates.
#include <pybind11/pybind11.h>

#include <string>

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

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

TransportBatch batch(uintptr_t cost, int cost_dtype, int64_t C, bool similarity, uintptr_t a, int64_t a_stride,
                     uintptr_t b, int64_t b_stride, int64_t P, int64_t K, int64_t M, double eps) {
    if (cost_dtype < 0 || cost_dtype > 2)
        throw py::value_error("cost_dtype: expected 0 (fp32), 1 (fp16) or 2 (bf16), got " + std::to_string(cost_dtype));
    return {pointer<const void>(cost),
            static_cast<CostType>(cost_dtype),
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
    const Isa chosen = isa_of(isa);
    const py::gil_scoped_release release;
    sinkhorn_fwd(args, threads, chosen);
}

void backward(uintptr_t grad_score, uintptr_t cost, int cost_dtype, uintptr_t a, int64_t a_stride, uintptr_t b,
              int64_t b_stride, uintptr_t f, uintptr_t g, int64_t P, int64_t K, int64_t M, double eps,
              uintptr_t grad_cost, int threads, const std::string& isa, int64_t C, bool similarity) {
    const SinkhornGradArgs args{batch(cost, cost_dtype, C, similarity, a, a_stride, b, b_stride, P, K, M, eps),
                                pointer<const float>(grad_score), pointer<const float>(f), pointer<const float>(g),
                                pointer<void>(grad_cost)};
    const Isa chosen = isa_of(isa);
    const py::gil_scoped_release release;
    sinkhorn_bwd(args, threads, chosen);
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
    info["cuda_archs"] = py::list();
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
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
}
