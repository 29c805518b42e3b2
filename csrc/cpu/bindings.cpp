// placekern._cpu: addresses and sizes in, results written in place, the GIL released. No logic.
// Arguments have places rather than names: looking names up took a quarter of a small layer's call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "dispatch.h"
#include "kmeans_optimal.h"
#include "pack_pairs.h"

namespace py = pybind11;
using namespace placekern;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

template <class T>
void bind_weight(py::module_& m, const char* name) {
    py::class_<Weight<T>>(m, name, py::module_local())
        .def(py::init([](int64_t M, int64_t K, int bits, int layout, uintptr_t row_ptr, bool wide,
                         uintptr_t positions, uintptr_t codes, uintptr_t codebook,
                         int64_t group_size) {
            return Weight<T>{M,
                             K,
                             bits,
                             static_cast<Layout>(layout),
                             wide ? nullptr : at<const int32_t>(row_ptr),
                             wide ? at<const int64_t>(row_ptr) : nullptr,
                             at<const uint8_t>(positions),
                             at<const uint8_t>(codes),
                             at<const T>(codebook),
                             group_size};
        }));
}

template <class T>
void bind_ops(py::module_& m) {
    m.def("linear", [](const Weight<T>& weight, int64_t N, uintptr_t x, uintptr_t bias, uintptr_t y,
                       bool relu, int threads) {
        const LinearArgs<T> args{weight,   N,    at<const T>(x), at<const T>(bias),
                                 at<T>(y), relu, threads};
        py::gil_scoped_release release;
        linear(args);
    });
    m.def(
        "linear_backward",
        [](const Weight<T>& weight, int64_t N, uintptr_t x, uintptr_t grad_y, uintptr_t grad_x,
           uintptr_t grad_codebook, int threads) {
            const LinearBackwardArgs<T> args{weight,         N,
                                             at<const T>(x), at<const T>(grad_y),
                                             at<T>(grad_x),  at<double>(grad_codebook),
                                             threads};
            py::gil_scoped_release release;
            linear_backward(args);
        },
        py::arg("weight"), py::kw_only(), py::arg("N"), py::arg("x"), py::arg("grad_y"),
        py::arg("grad_x"), py::arg("grad_codebook"), py::arg("threads"));
    m.def("conv2d", [](const Weight<T>& weight, const ConvShape& shape, uintptr_t x,
                       const std::array<int64_t, 4>& x_strides, uintptr_t bias, uintptr_t y,
                       const std::array<int64_t, 4>& y_strides, bool relu, int way, int threads) {
        const auto& xs = x_strides;
        const auto& ys = y_strides;
        const Conv2dArgs<T> args{weight,
                                 shape,
                                 {at<const T>(x), xs[0], xs[1], xs[2], xs[3]},
                                 at<const T>(bias),
                                 {at<T>(y), ys[0], ys[1], ys[2], ys[3]},
                                 relu,
                                 static_cast<Way>(way),
                                 threads};
        py::gil_scoped_release release;
        conv2d(args);
    });
    m.def(
        "conv2d_backward",
        [](const Weight<T>& weight, const ConvShape& shape, uintptr_t x,
           const std::array<int64_t, 4>& x_strides, uintptr_t grad_y,
           const std::array<int64_t, 4>& grad_y_strides, uintptr_t grad_x,
           const std::array<int64_t, 4>& grad_x_strides, uintptr_t grad_codebook, int threads) {
            const auto& xs = x_strides;
            const auto& ys = grad_y_strides;
            const auto& gs = grad_x_strides;
            const Conv2dBackwardArgs<T> args{weight,
                                             shape,
                                             {at<const T>(x), xs[0], xs[1], xs[2], xs[3]},
                                             {at<const T>(grad_y), ys[0], ys[1], ys[2], ys[3]},
                                             {at<T>(grad_x), gs[0], gs[1], gs[2], gs[3]},
                                             at<double>(grad_codebook),
                                             threads};
            py::gil_scoped_release release;
            conv2d_backward(args);
        },
        py::arg("weight"), py::arg("shape"), py::kw_only(), py::arg("x"), py::arg("x_strides"),
        py::arg("grad_y"), py::arg("grad_y_strides"), py::arg("grad_x"), py::arg("grad_x_strides"),
        py::arg("grad_codebook"), py::arg("threads"));
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "placekern's ops on the CPU; called through placekern._native only.";
    m.attr("WINDOW") = kWindow;
    m.attr("PAIRS_WINDOW") = kPairsWindow;
    m.attr("READ_PADDING") = kReadPadding;
    m.def("available_isas", &available_isas, "Levels that this processor runs, lowest first.");
    m.def("get_isa", &get_isa, "The level in use.");
    m.def("set_isa", &set_isa, py::arg("name"), "Uses this level from now on, in every thread.");

    bind_weight<float>(m, "WeightFloat");
    bind_weight<double>(m, "WeightDouble");
    py::class_<ConvShape>(m, "ConvShape", py::module_local())
        .def(py::init([](int64_t batch, int64_t groups, int64_t channels, int64_t height,
                         int64_t width, int64_t out_height, int64_t out_width, int64_t kernel_h,
                         int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t padding_top,
                         int64_t padding_left, int64_t dilation_h, int64_t dilation_w) {
            return ConvShape{batch,      groups,      channels,     height,     width,
                             out_height, out_width,   kernel_h,     kernel_w,   stride_h,
                             stride_w,   padding_top, padding_left, dilation_h, dilation_w};
        }));
    bind_ops<float>(m);
    bind_ops<double>(m);
    m.def(
        "kmeans_assign",
        [](int64_t n, int count, uintptr_t points, uintptr_t boundaries, uintptr_t codes,
           uintptr_t sums, uintptr_t counts, int threads) {
            const KmeansAssignArgs args{n,
                                        count,
                                        at<const float>(points),
                                        at<const float>(boundaries),
                                        at<uint8_t>(codes),
                                        at<double>(sums),
                                        at<int64_t>(counts),
                                        threads};
            py::gil_scoped_release release;
            kmeans_assign(args);
        },
        py::kw_only(), py::arg("n"), py::arg("count"), py::arg("points"), py::arg("boundaries"),
        py::arg("codes"), py::arg("sums"), py::arg("counts"), py::arg("threads"));
    m.def(
        "kmeans_optimal",
        [](int64_t n, int clusters, uintptr_t points, uintptr_t weights, uintptr_t starts) {
            py::gil_scoped_release release;
            kmeans_optimal(n, clusters, at<const double>(points), at<const double>(weights),
                           at<int64_t>(starts));
        },
        py::kw_only(), py::arg("n"), py::arg("clusters"), py::arg("points"), py::arg("weights"),
        py::arg("starts"));
    m.def(
        "count_chunks",
        [](int64_t M, int64_t K, uintptr_t row_ptr, uintptr_t col_ind, uintptr_t run_chunks,
           int threads) {
            py::gil_scoped_release release;
            count_chunks(M, K, at<const int64_t>(row_ptr), at<const int32_t>(col_ind),
                         at<uint8_t>(run_chunks), threads);
        },
        py::arg("M"), py::arg("K"), py::kw_only(), py::arg("row_ptr"), py::arg("col_ind"),
        py::arg("run_chunks"), py::arg("threads"));
    m.def(
        "pack_pairs",
        [](int64_t M, int64_t K, uintptr_t row_ptr, uintptr_t col_ind, uintptr_t codes,
           uintptr_t chunk_ptr, uintptr_t chunks, int threads) {
            const PackPairsArgs args{M,
                                     K,
                                     at<const int64_t>(row_ptr),
                                     at<const int32_t>(col_ind),
                                     at<const uint8_t>(codes),
                                     at<const int32_t>(chunk_ptr),
                                     at<uint8_t>(chunks),
                                     threads};
            py::gil_scoped_release release;
            pack_pairs(args);
        },
        py::arg("M"), py::arg("K"), py::kw_only(), py::arg("row_ptr"), py::arg("col_ind"),
        py::arg("codes"), py::arg("chunk_ptr"), py::arg("chunks"), py::arg("threads"));
}
