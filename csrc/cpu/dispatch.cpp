// Detects the processor, keeps the chosen level, and holds the table from op to function.
#include "dispatch.h"

#include <atomic>
#include <cstdlib>

#include "../check.h"

namespace placekern {
namespace {

constexpr const char* kNames[kIsaCount] = {"scalar", "avx2", "avx512"};

bool supports(Isa isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    switch (isa) {
        case Isa::kScalar:
            return true;
        case Isa::kAvx2:
            return avx2;
        case Isa::kAvx512:
            // Ice Lake and Zen 4 onwards: the byte permutes (VBMI) and byte compressions (VBMI2)
            // carry the decoding.
            return avx2 && __builtin_cpu_supports("avx512f") &&
                   __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
                   __builtin_cpu_supports("avx512vbmi2");
    }
    return false;
#else
    return isa == Isa::kScalar;
#endif
}

std::string list(const std::vector<std::string>& names) {
    std::string text;
    for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
    return text;
}

Isa parse(const std::string& name) {
    for (int i = 0; i < kIsaCount; ++i) {
        if (name != kNames[i]) continue;
        PK_CHECK(supports(static_cast<Isa>(i)), "PLACEKERN_ISA=", name,
                 ": this processor has only ", list(available_isas()));
        return static_cast<Isa>(i);
    }
    throw std::invalid_argument(join("PLACEKERN_ISA=", name, " is not a level; this processor has ",
                                     list(available_isas())));
}

Isa initial() {
    if (const char* name = std::getenv("PLACEKERN_ISA"); name != nullptr && *name != '\0')
        return parse(name);
    for (int i = kIsaCount - 1; i > 0; --i) {
        if (supports(static_cast<Isa>(i))) return static_cast<Isa>(i);
    }
    return Isa::kScalar;
}

std::atomic<Isa>& current() {
    static std::atomic<Isa> isa{initial()};
    return isa;
}

template <class Args>
using Row = void (*[kIsaCount])(const Args&);

// clang-format off
#if defined(__x86_64__)
//                                                     scalar                   avx2                   avx512
constexpr Row<LinearArgs<float>>         kLinear         = {scalar::linear,          avx2::linear,          avx512::linear};
constexpr Row<LinearBackwardArgs<float>> kLinearBackward = {scalar::linear_backward, avx2::linear_backward, avx512::linear_backward};
constexpr Row<Conv2dArgs<float>>         kConv2d         = {scalar::conv2d,          avx2::conv2d,          avx512::conv2d};
constexpr Row<Conv2dBackwardArgs<float>> kConv2dBackward = {scalar::conv2d_backward, avx2::conv2d_backward, avx512::conv2d_backward};
constexpr Row<KmeansAssignArgs>          kKmeansAssign   = {scalar::kmeans_assign,   avx2::kmeans_assign,   avx512::kmeans_assign};
#else
constexpr Row<LinearArgs<float>>         kLinear         = {scalar::linear};
constexpr Row<LinearBackwardArgs<float>> kLinearBackward = {scalar::linear_backward};
constexpr Row<Conv2dArgs<float>>         kConv2d         = {scalar::conv2d};
constexpr Row<Conv2dBackwardArgs<float>> kConv2dBackward = {scalar::conv2d_backward};
constexpr Row<KmeansAssignArgs>          kKmeansAssign   = {scalar::kmeans_assign};
#endif
// clang-format on

template <class Args>
void run(const Row<Args>& row, const Args& args) {
    row[static_cast<int>(current().load(std::memory_order_relaxed))](args);
}

}  // namespace

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (int i = 0; i < kIsaCount; ++i) {
        if (supports(static_cast<Isa>(i))) names.emplace_back(kNames[i]);
    }
    return names;
}

std::string get_isa() { return kNames[static_cast<int>(current().load())]; }

void set_isa(const std::string& name) { current().store(parse(name)); }

void linear(const LinearArgs<float>& args) { run<LinearArgs<float>>(kLinear, args); }
void linear(const LinearArgs<double>& args) { scalar::linear(args); }
void linear_backward(const LinearBackwardArgs<float>& args) {
    run<LinearBackwardArgs<float>>(kLinearBackward, args);
}
void linear_backward(const LinearBackwardArgs<double>& args) { scalar::linear_backward(args); }
void conv2d(const Conv2dArgs<float>& args) { run<Conv2dArgs<float>>(kConv2d, args); }
void conv2d(const Conv2dArgs<double>& args) { scalar::conv2d(args); }
void conv2d_backward(const Conv2dBackwardArgs<float>& args) {
    run<Conv2dBackwardArgs<float>>(kConv2dBackward, args);
}
void conv2d_backward(const Conv2dBackwardArgs<double>& args) { scalar::conv2d_backward(args); }
void kmeans_assign(const KmeansAssignArgs& args) { run<KmeansAssignArgs>(kKmeansAssign, args); }

}  // namespace placekern
