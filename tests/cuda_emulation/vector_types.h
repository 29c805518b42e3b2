// Vector types, with the alignment that a vector load needs: a misaligned one is undefined
// behaviour here too, and a sanitizer sees it.
#pragma once

#define EMULATED_PAIR(name, type)           \
    struct alignas(2 * sizeof(type)) name { \
        type x, y;                          \
    };                                      \
    inline name make_##name(type x, type y) { return {x, y}; }

#define EMULATED_QUADRUPLE(name, type)                                   \
    struct alignas(4 * sizeof(type) < 16 ? 4 * sizeof(type) : 16) name { \
        type x, y, z, w;                                                 \
    };                                                                   \
    inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }

EMULATED_PAIR(char2, signed char)
EMULATED_PAIR(uchar2, unsigned char)
EMULATED_PAIR(short2, short)
EMULATED_PAIR(ushort2, unsigned short)
EMULATED_PAIR(int2, int)
EMULATED_PAIR(uint2, unsigned)
EMULATED_PAIR(float2, float)
EMULATED_PAIR(double2, double)
EMULATED_PAIR(longlong2, long long)
EMULATED_PAIR(ulonglong2, unsigned long long)
EMULATED_QUADRUPLE(char4, signed char)
EMULATED_QUADRUPLE(uchar4, unsigned char)
EMULATED_QUADRUPLE(short4, short)
EMULATED_QUADRUPLE(ushort4, unsigned short)
EMULATED_QUADRUPLE(int4, int)
EMULATED_QUADRUPLE(uint4, unsigned)
EMULATED_QUADRUPLE(float4, float)

#undef EMULATED_PAIR
#undef EMULATED_QUADRUPLE

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
