// placekern._cuda: device addresses, sizes and a stream in; results written in place. No logic.
// Arguments have places rather than names, and stand in few objects: a kernel may take ten
// microseconds, and a call must not take longer than that.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "codebook_gradient.h"
#include "kmeans_assign.h"
#include "linear_backward.h"
#include "ops.h"

namespace py = pybind11;
using namespace placekern;
using namespace placekern::cuda;

namespace {

template <class T = const void>
T* address(uintptr_t at) {
    return reinterpret_cast<T*>(at);
}

using Released = py::call_guard<py::gil_scoped_release>;

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    // Types are local to the module: _cpu names some alike, and tests load a second, emulated
    // _cuda.
    m.doc() = "placekern's ops on CUDA devices; called through placekern._native only.";
    m.attr("architectures") = PLACEKERN_CUDA_ARCHS;
    m.def("device_count", &device_count,
          "CUDA devices that can be used; 0 without a GPU or driver.");
    py::class_<Properties>(m, "Properties", py::module_local())
        .def_readonly("multiprocessors", &Properties::multiprocessors)
        .def_readonly("shared_memory", &Properties::shared_memory)
        .def_readonly("capability", &Properties::capability);
    m.def("properties", &properties, py::arg("device"));

    py::class_<DeviceWeight>(m, "Weight", py::module_local())
        .def(py::init([](int64_t M, int64_t K, int bits, int layout, uintptr_t positions,
                         uintptr_t codes, uintptr_t codebook, int dtype, int64_t group_size,
                         int taps) {
            return DeviceWeight{M,
                                K,
                                bits,
                                static_cast<Layout>(layout),
                                address<const uint8_t>(positions),
                                address<const uint8_t>(codes),
                                {address(codebook), static_cast<Dtype>(dtype)},
                                group_size,
                                taps};
        }));
    py::class_<Output>(m, "Output", py::module_local())
        .def(py::init([](uintptr_t y, int dtype, uintptr_t bias, int bias_dtype, bool relu,
                         int64_t M, int64_t N, int64_t pixels, int64_t image_stride,
                         int64_t pixel_stride, int64_t row_stride, int splits, uintptr_t partial) {
            return Output{{address<void>(y), static_cast<Dtype>(dtype)},
                          {address(bias), static_cast<Dtype>(bias_dtype)},
                          relu,
                          M,
                          N,
                          pixels,
                          image_stride,
                          pixel_stride,
                          row_stride,
                          splits,
                          address<float>(partial)};
        }));
    py::class_<ConvShape>(m, "ConvShape", py::module_local())
        .def(py::init([](int64_t batch, int64_t groups, int64_t channels, int64_t height,
                         int64_t width, int64_t out_height, int64_t out_width, int64_t kernel_h,
                         int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t padding_top,
                         int64_t padding_left, int64_t dilation_h, int64_t dilation_w) {
            return ConvShape{batch,      groups,      channels,     height,     width,
                             out_height, out_width,   kernel_h,     kernel_w,   stride_h,
                             stride_w,   padding_top, padding_left, dilation_h, dilation_w};
        }));
    py::class_<Source>(m, "Source", py::module_local())
        .def(py::init([](uintptr_t x, int dtype, int64_t stride) {
            return Source{address(x), static_cast<Dtype>(dtype), stride, false, {}, 0, 0, 0, 0,
                          false};
        }))
        .def(py::init(
            [](uintptr_t x, int dtype, const ConvShape& shape, const std::array<int, 4>& strides) {
                return Source{address(x), static_cast<Dtype>(dtype),
                              0,          true,
                              shape,      strides[0],
                              strides[1], strides[2],
                              strides[3], false};
            }));

    m.def(
        "direct",
        [](const DeviceWeight& weight, const Source& source, const Output& out, int device,
           uintptr_t stream) { direct({weight, source, out}, {device, stream}); },
        Released());
    m.def(
        "matmul",
        [](const DeviceWeight& weight, const Source& source, const Output& out, int device,
           uintptr_t stream) { return matmul({weight, source, out}, {device, stream}); },
        Released());
    m.def("matmul_splits", [](int64_t M, int64_t K, int bits, int layout, int dtype, int64_t N,
                              int groups, int device) {
        const DeviceWeight weight = {M, K, bits, static_cast<Layout>(layout), {}, {}, {}, M, 1};
        return matmul_splits(weight, static_cast<Dtype>(dtype), N, groups, device);
    });
    m.def(
        "decode",
        [](const DeviceWeight& weight, int64_t first, int64_t rows, int taps, uintptr_t dense,
           int dtype, int device, uintptr_t stream) {
            decode({weight, first, rows, taps, {address<void>(dense), static_cast<Dtype>(dtype)}},
                   {device, stream});
        },
        Released());
    m.def("kmeans_assign_workspace", &kmeans_assign_workspace);
    m.def(
        "kmeans_assign",
        [](int64_t n, int count, uintptr_t points, uintptr_t centroids, uintptr_t codes,
           uintptr_t sums, uintptr_t counts, uintptr_t workspace, int device, uintptr_t stream) {
            kmeans_assign({n, count, address<const float>(points), address<const float>(centroids),
                           address<uint8_t>(codes), address<double>(sums), address<int64_t>(counts),
                           address<void>(workspace)},
                          {device, stream});
        },
        Released());
    py::class_<LinearBackwardPlan>(m, "LinearBackwardPlan", py::module_local())
        .def_readonly("warps", &LinearBackwardPlan::warps)
        .def_readonly("columns", &LinearBackwardPlan::columns)
        .def_readonly("chunks", &LinearBackwardPlan::chunks)
        .def_readonly("workspace", &LinearBackwardPlan::workspace);
    m.def("linear_backward_plan", [](const DeviceWeight& weight, int dtype, int64_t N, bool grad_x,
                                     bool grad_codebook, int device) {
        return linear_backward_plan(weight, static_cast<Dtype>(dtype), N, grad_x, grad_codebook,
                                    device);
    });
    m.def(
        "linear_backward",
        [](const DeviceWeight& weight, int dtype, const LinearBackwardPlan& plan, int64_t N,
           uintptr_t x, int64_t x_stride, uintptr_t grad_y, uintptr_t grad_x,
           uintptr_t grad_codebook, uintptr_t workspace, int device, uintptr_t stream) {
            linear_backward(
                {weight, static_cast<Dtype>(dtype), plan, N, address(x), x_stride, address(grad_y),
                 address<void>(grad_x), address<double>(grad_codebook), address<void>(workspace)},
                {device, stream});
        },
        Released());
    py::class_<GradYSource>(m, "GradYSource", py::module_local())
        .def(py::init([](uintptr_t grad_y, int64_t pixels, int64_t image_stride,
                         int64_t pixel_stride, int64_t row_stride) {
            return GradYSource{address(grad_y), pixels, image_stride, pixel_stride, row_stride};
        }));
    py::class_<CodebookGradientPlan>(m, "CodebookGradientPlan", py::module_local())
        .def_readonly("blocks", &CodebookGradientPlan::blocks);
    m.def("codebook_gradient_plan", [](const DeviceWeight& weight, int dtype, int64_t first,
                                       int64_t rows, int64_t N, int device) {
        return codebook_gradient_plan(weight, static_cast<Dtype>(dtype), first, rows, N, device);
    });
    m.def(
        "codebook_gradient",
        [](const DeviceWeight& weight, const CodebookGradientPlan& plan, int64_t first,
           int64_t rows, int64_t N, const Source& source, const GradYSource& grad_y,
           uintptr_t partial, int device, uintptr_t stream) {
            codebook_gradient(
                {weight, plan, first, rows, N, source, grad_y, address<double>(partial)},
                {device, stream});
        },
        Released());
}
