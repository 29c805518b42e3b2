// placekern._cuda: device addresses, sizes and a stream in; results written in place. No logic.
#include <pybind11/pybind11.h>

#include "linear.h"

namespace py = pybind11;
using namespace placekern;

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "placekern's ops on CUDA devices; called through placekern._native only.";
    m.attr("architectures") = PLACEKERN_CUDA_ARCHS;
    m.def("device_count", &cuda::device_count,
          "CUDA devices that can be used; 0 without a GPU or driver.");
    // Local to the module: _cpu registers the same struct.
    py::class_<Weight<float>>(m, "WeightFloat", py::module_local())
        .def(py::init([](int64_t M, int64_t K, int bits, int layout, uintptr_t row_ptr, bool wide,
                         uintptr_t positions, uintptr_t codes, uintptr_t codebook) {
                 return Weight<float>{M,
                                      K,
                                      bits,
                                      static_cast<Layout>(layout),
                                      wide ? nullptr : reinterpret_cast<const int32_t*>(row_ptr),
                                      wide ? reinterpret_cast<const int64_t*>(row_ptr) : nullptr,
                                      reinterpret_cast<const uint8_t*>(positions),
                                      reinterpret_cast<const uint8_t*>(codes),
                                      reinterpret_cast<const float*>(codebook)};
             }),
             py::kw_only(), py::arg("M"), py::arg("K"), py::arg("bits"), py::arg("layout"),
             py::arg("row_ptr"), py::arg("wide"), py::arg("positions"), py::arg("codes"),
             py::arg("codebook"));
    m.def(
        "linear",
        [](const Weight<float>& weight, int64_t N, uintptr_t x, uintptr_t bias, uintptr_t y,
           bool relu, int device, uintptr_t stream) {
            const LinearArgs<float> args{weight,
                                         N,
                                         reinterpret_cast<const float*>(x),
                                         reinterpret_cast<const float*>(bias),
                                         reinterpret_cast<float*>(y),
                                         relu,
                                         0};
            py::gil_scoped_release release;
            cuda::linear(args, device, stream);
        },
        py::arg("weight"), py::kw_only(), py::arg("N"), py::arg("x"), py::arg("bias"), py::arg("y"),
        py::arg("relu"), py::arg("device"), py::arg("stream"));
}
