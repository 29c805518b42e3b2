// Checks that throw with the values in the message; the bindings turn them into Python errors.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace placekern {

template <class... Parts>
std::string join(const Parts&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    return text.str();
}

}  // namespace placekern

// PK_CHECK(x > 0, "linear: N must be positive, got ", x);
#define PK_CHECK(condition, ...)                                                       \
    do {                                                                               \
        if (!(condition)) throw std::invalid_argument(::placekern::join(__VA_ARGS__)); \
    } while (0)
