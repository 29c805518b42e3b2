// placekern._cuda: device addresses, sizes and a stream in; results written in place. No logic.
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

    py::enum_<Dtype>(m, "Dtype", py::module_local())
        .value("float32", Dtype::kFloat32)
        .value("float16", Dtype::kFloat16)
        .value("bfloat16", Dtype::kBfloat16);
    py::class_<Queue>(m, "Queue", py::module_local())
        .def(py::init([](int device, uintptr_t stream) { return Queue{device, stream}; }),
             py::arg("device"), py::arg("stream"));
    py::class_<Vector>(m, "Vector", py::module_local())
        .def(py::init([](uintptr_t data, Dtype dtype) { return Vector{address(data), dtype}; }));
    py::class_<VectorOut>(m, "VectorOut", py::module_local())
        .def(py::init(
            [](uintptr_t data, Dtype dtype) { return VectorOut{address<void>(data), dtype}; }));
    py::class_<DeviceWeight>(m, "Weight", py::module_local())
        .def(py::init([](int64_t M, int64_t K, int bits, int layout, uintptr_t positions,
                         uintptr_t codes, const Vector& codebook, int64_t group_size) {
                 return DeviceWeight{M,
                                     K,
                                     bits,
                                     static_cast<Layout>(layout),
                                     address<const uint8_t>(positions),
                                     address<const uint8_t>(codes),
                                     codebook,
                                     group_size};
             }),
             py::kw_only(), py::arg("M"), py::arg("K"), py::arg("bits"), py::arg("layout"),
             py::arg("positions"), py::arg("codes"), py::arg("codebook"), py::arg("group_size"));
    py::class_<Output>(m, "Output", py::module_local())
        .def(py::init([](const VectorOut& y, const Vector& bias, bool relu, int64_t M, int64_t N,
                         int64_t pixels, int64_t image_stride, int64_t pixel_stride,
                         int64_t row_stride, int splits, uintptr_t partial) {
                 return Output{y,
                               bias,
                               relu,
                               M,
                               N,
                               pixels,
                               image_stride,
                               pixel_stride,
                               row_stride,
                               splits,
                               address<float>(partial)};
             }),
             py::kw_only(), py::arg("y"), py::arg("bias"), py::arg("relu"), py::arg("M"),
             py::arg("N"), py::arg("pixels"), py::arg("image_stride"), py::arg("pixel_stride"),
             py::arg("row_stride"), py::arg("splits"), py::arg("partial"));
    py::class_<ConvShape>(m, "ConvShape", py::module_local())
        .def(py::init([](const std::map<std::string, int64_t>& size) {
            return ConvShape{size.at("batch"),        size.at("groups"),     size.at("channels"),
                             size.at("height"),       size.at("width"),      size.at("out_height"),
                             size.at("out_width"),    size.at("kernel_h"),   size.at("kernel_w"),
                             size.at("stride_h"),     size.at("stride_w"),   size.at("padding_top"),
                             size.at("padding_left"), size.at("dilation_h"), size.at("dilation_w")};
        }));
    py::class_<Source>(m, "Source", py::module_local())
        .def(py::init([](uintptr_t x, int64_t stride, bool image, const ConvShape& shape,
                         const std::array<int, 4>& strides) {
                 return Source{address(x), stride,     image,      shape,
                               strides[0], strides[1], strides[2], strides[3]};
             }),
             py::kw_only(), py::arg("x"), py::arg("stride") = 0, py::arg("image") = false,
             py::arg("shape") = ConvShape{}, py::arg("strides") = std::array<int, 4>{});

    m.def(
        "direct",
        [](const DeviceWeight& weight, Dtype dtype, const Source& source, const Output& out,
           const Queue& queue) { direct({weight, dtype, source, out}, queue); },
        Released());
    m.def(
        "matmul",
        [](const DeviceWeight& weight, Dtype dtype, const Source& source, const Output& out,
           const Queue& queue) { return matmul({weight, dtype, source, out}, queue); },
        Released());
    m.def(
        "decode",
        [](const DeviceWeight& weight, int64_t first, int64_t rows, const VectorOut& dense,
           const Queue& queue) { decode({weight, first, rows, dense}, queue); },
        Released());
    m.def("kmeans_assign_workspace", &kmeans_assign_workspace, py::arg("n"), py::arg("count"),
          py::arg("device"));
    m.def(
        "kmeans_assign",
        [](int64_t n, int count, uintptr_t points, uintptr_t centroids, uintptr_t codes,
           uintptr_t sums, uintptr_t counts, uintptr_t workspace, const Queue& queue) {
            kmeans_assign({n, count, address<const float>(points), address<const float>(centroids),
                           address<uint8_t>(codes), address<double>(sums), address<int64_t>(counts),
                           address<void>(workspace)},
                          queue);
        },
        py::kw_only(), py::arg("n"), py::arg("count"), py::arg("points"), py::arg("centroids"),
        py::arg("codes"), py::arg("sums"), py::arg("counts"), py::arg("workspace"),
        py::arg("queue"), Released());
    py::class_<LinearBackwardPlan>(m, "LinearBackwardPlan", py::module_local())
        .def_readonly("warps", &LinearBackwardPlan::warps)
        .def_readonly("columns", &LinearBackwardPlan::columns)
        .def_readonly("chunks", &LinearBackwardPlan::chunks)
        .def_readonly("splits", &LinearBackwardPlan::splits)
        .def_readonly("partials", &LinearBackwardPlan::partials);
    m.def("linear_backward_plan", &linear_backward_plan);
    m.def(
        "linear_backward",
        [](const DeviceWeight& weight, Dtype dtype, const LinearBackwardPlan& plan, int64_t N,
           uintptr_t x, int64_t x_stride, uintptr_t grad_y, uintptr_t grad_x,
           uintptr_t grad_codebook, const Queue& queue) {
            linear_backward({weight, dtype, plan, N, address(x), x_stride, address(grad_y),
                             address<float>(grad_x), address<double>(grad_codebook)},
                            queue);
        },
        py::arg("weight"), py::arg("dtype"), py::arg("plan"), py::kw_only(), py::arg("N"),
        py::arg("x"), py::arg("x_stride"), py::arg("grad_y"), py::arg("grad_x"),
        py::arg("grad_codebook"), py::arg("queue"), Released());
    py::class_<GradYSource>(m, "GradYSource", py::module_local())
        .def(py::init([](uintptr_t grad_y, int64_t pixels, int64_t image_stride,
                         int64_t pixel_stride, int64_t row_stride) {
            return GradYSource{address(grad_y), pixels, image_stride, pixel_stride, row_stride};
        }));
    py::class_<CodebookGradientPlan>(m, "CodebookGradientPlan", py::module_local())
        .def_readonly("blocks", &CodebookGradientPlan::blocks);
    m.def("codebook_gradient_plan", &codebook_gradient_plan);
    m.def(
        "codebook_gradient",
        [](const DeviceWeight& weight, Dtype dtype, const CodebookGradientPlan& plan, int64_t first,
           int64_t rows, int64_t N, const Source& source, const GradYSource& grad_y,
           uintptr_t partial, const Queue& queue) {
            codebook_gradient(
                {weight, dtype, plan, first, rows, N, source, grad_y, address<double>(partial)},
                queue);
        },
        py::arg("weight"), py::arg("dtype"), py::arg("plan"), py::kw_only(), py::arg("first"),
        py::arg("rows"), py::arg("N"), py::arg("source"), py::arg("grad_y"), py::arg("partial"),
        py::arg("queue"), Released());
}
