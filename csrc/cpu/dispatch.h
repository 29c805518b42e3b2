// One row an op, one column an ISA: which function runs. The level is chosen once, outside every
// loop. Each level owns a namespace, so that the linker can never mix code of two levels.
#pragma once

#include <string>
#include <vector>

#include "../args.h"

namespace placekern {

enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };
constexpr int kIsaCount = 3;

// The levels that this processor (and this build) can run, lowest first.
std::vector<std::string> available_isas();

// The level in use: PLACEKERN_ISA, or the highest available. Throws on a level that is unknown or
// lacking.
std::string get_isa();
void set_isa(const std::string& name);

void linear(const LinearArgs<float>& args);
void linear(const LinearArgs<double>& args);
void linear_backward(const LinearBackwardArgs<float>& args);
void linear_backward(const LinearBackwardArgs<double>& args);
void conv2d(const Conv2dArgs<float>& args);
void conv2d(const Conv2dArgs<double>& args);
void conv2d_backward(const Conv2dBackwardArgs<float>& args);
void conv2d_backward(const Conv2dBackwardArgs<double>& args);
void kmeans_assign(const KmeansAssignArgs& args);

// What an ISA file provides; float64 runs at the scalar level only.
#define PK_DECLARE_ISA(isa)                                      \
    namespace isa {                                              \
    void linear(const LinearArgs<float>& args);                  \
    void linear_backward(const LinearBackwardArgs<float>& args); \
    void conv2d(const Conv2dArgs<float>& args);                  \
    void conv2d_backward(const Conv2dBackwardArgs<float>& args); \
    void kmeans_assign(const KmeansAssignArgs& args);            \
    }
PK_DECLARE_ISA(scalar)
PK_DECLARE_ISA(avx2)
PK_DECLARE_ISA(avx512)
#undef PK_DECLARE_ISA

namespace scalar {
void linear(const LinearArgs<double>& args);
void linear_backward(const LinearBackwardArgs<double>& args);
void conv2d(const Conv2dArgs<double>& args);
void conv2d_backward(const Conv2dBackwardArgs<double>& args);
}  // namespace scalar

}  // namespace placekern
