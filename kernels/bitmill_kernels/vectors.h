// Vectors of 32-bit lanes, as many as a register of the processor holds; the compiler's own, so one
// source serves AVX-512, AVX2 and NEON.

#pragma once

#include <cstdint>

#if defined(__AVX512BW__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
