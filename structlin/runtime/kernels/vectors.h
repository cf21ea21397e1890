// The compiler's vector extensions: one source for AVX-512, AVX2, SSE and NEON.

#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "tensors.h"

namespace {

#if defined(__AVX512F__)
constexpr int WIDEST = 16;
constexpr int ROWS = 12;  // rows of a register tile, two vectors each: 24 of 32 registers hold sums
#elif defined(__AVX__)
constexpr int WIDEST = 8;
constexpr int ROWS = 6;
#else
constexpr int WIDEST = 4;
constexpr int ROWS = 8;
#endif

// Before a loop with a fixed number of passes: GCC unrolls most by itself, but too late for arrays to become registers.
#define UNROLLED _Pragma("GCC unroll 16")

constexpr int NARROW = WIDEST > 4 ? WIDEST / 2 : 4;

template <int L> struct Lanes;
template <> struct Lanes<4> {
  typedef float Vector __attribute__((vector_size(16)));
  typedef uint32_t Bits __attribute__((vector_size(16)));
  typedef uint16_t Halves __attribute__((vector_size(8)));
};
template <> struct Lanes<8> {
  typedef float Vector __attribute__((vector_size(32)));
  typedef uint32_t Bits __attribute__((vector_size(32)));
  typedef uint16_t Halves __attribute__((vector_size(16)));
};
template <> struct Lanes<16> {
  typedef float Vector __attribute__((vector_size(64)));
  typedef uint32_t Bits __attribute__((vector_size(64)));
  typedef uint16_t Halves __attribute__((vector_size(32)));
};
template <int L> using Vector = typename Lanes<L>::Vector;
template <int L> using Bits = typename Lanes<L>::Bits;
template <int L> using Halves = typename Lanes<L>::Halves;

template <int L> inline Vector<L> load(const float* from) {
  Vector<L> value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

template <int L> inline void store(float* to, Vector<L> value) { std::memcpy(to, &value, sizeof(value)); }

// A bfloat16 is the upper half of a float32.
template <int L> inline Vector<L> load(const c10::BFloat16* from) {
  Halves<L> halves;
  std::memcpy(&halves, from, sizeof(halves));
  return reinterpret_cast<Vector<L>>(__builtin_convertvector(halves, Bits<L>) << 16);
}

// Rounds to nearest, ties to even. Rounding could carry a NaN over into a number: all become one, as in torch.
template <int L> inline void store(c10::BFloat16* to, Vector<L> value) {
  const Bits<L> bits = reinterpret_cast<Bits<L>>(value);
  const Bits<L> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, none = Bits<L>{} + 0x7fc0;
  const Halves<L> halves = __builtin_convertvector(value == value ? rounded : none, Halves<L>);
  std::memcpy(to, &halves, sizeof(halves));
}

// Lanes to pick for a butterfly of distance D between two vectors a (lanes 0 to L) and b (lanes L to 2 L).
template <int L, int D, int J> constexpr int own() { return J & D ? L + J : J; }
template <int L, int D, int J> constexpr int other() { return J & D ? L + (J ^ D) : (J ^ D); }
template <int L, int D, int J> constexpr int low() { return J & D ? L + (J ^ D) : J; }
template <int L, int D, int J> constexpr int high() { return J & D ? L + J : (J ^ D); }

template <int L, int D, int... J>
inline Vector<L> folded(Vector<L> a, Vector<L> b, std::integer_sequence<int, J...>) {
  return __builtin_shufflevector(a, b, own<L, D, J>()...) + __builtin_shufflevector(a, b, other<L, D, J>()...);
}

template <int L, int D, int... J>
inline void exchange(Vector<L>& a, Vector<L>& b, std::integer_sequence<int, J...>) {
  const Vector<L> first = __builtin_shufflevector(a, b, low<L, D, J>()...);
  b = __builtin_shufflevector(a, b, high<L, D, J>()...);
  a = first;
}

// Lane j of the result is the sum of the lanes of rows[j], by log2(L) rounds that each fold pairs of vectors into one.
template <int L, int D = L / 2> inline Vector<L> sums(Vector<L>* rows) {
  for (int p = 0; p < D; ++p) rows[p] = folded<L, D>(rows[p], rows[p + D], std::make_integer_sequence<int, L>());
  if constexpr (D == 1) return rows[0];
  else return sums<L, D / 2>(rows);
}

// Transposes L vectors of L lanes in place, by exchanging halves, then quarters, and so on.
template <int L, int D = L / 2> inline void transpose(Vector<L>* rows) {
  for (int p = 0; p < L; ++p)
    if (!(p & D)) exchange<L, D>(rows[p], rows[p + D], std::make_integer_sequence<int, L>());
  if constexpr (D > 1) transpose<L, D / 2>(rows);
}

}  // namespace
