// Many tokens: tiles of shape (features, T), whose innermost axis, and with it all vectors, runs over tokens.

#pragma once

#include <algorithm>

#include "program.h"
#include "vectors.h"

namespace {

// Computes MT rows of one outer index for NV vectors of tokens. The MT x NV sums stay in registers; a column of the
// factor is broadcast. UNIT: a row of the factor is contiguous.
template <int L, int NV, int MT, bool UNIT, class W>
inline void register_tile(const Stage& s, int64_t T, const W* w, const float* a, float* b, int j) {
  const int32_t *w_row = s.w_row + j, *b_row = s.b_row + j;
  const W* row[MT];
  Vector<L> sum[MT][NV] = {};
  UNROLLED
  for (int p = 0; p < MT; ++p) row[p] = w + w_row[p];
  if (s.accumulates)
    UNROLLED
    for (int p = 0; p < MT; ++p)
      UNROLLED
      for (int u = 0; u < NV; ++u) sum[p][u] = load<L>(b + b_row[p] * T + u * L);
  int q = 0;
  do {  // there is a column: a test before the first one would keep the sums out of registers
    const float* from = a + s.a_column[q] * T;
    const int offset = UNIT ? q : s.w_column[q];
    Vector<L> value[NV];
    UNROLLED
    for (int u = 0; u < NV; ++u) value[u] = load<L>(from + u * L);
    UNROLLED
    for (int p = 0; p < MT; ++p) {
      const float weight = row[p][offset];
      UNROLLED
      for (int u = 0; u < NV; ++u) sum[p][u] += weight * value[u];
    }
  } while (++q < s.columns);
  UNROLLED
  for (int p = 0; p < MT; ++p)
    UNROLLED
    for (int u = 0; u < NV; ++u) store<L>(b + b_row[p] * T + u * L, sum[p][u]);
}

// Computes rows j onwards of one outer index, for `length` columns of a and b, whose rows are T apart. What is left of
// the columns goes by single vectors; if they do not divide it, the last one overlaps those before and writes the same
// sums again.
template <int L, int NV, bool UNIT, int MT, class W>
inline void register_tiles(const Stage& s, int64_t T, int64_t length, const W* w, const float* a, float* b, int j) {
  for (; j + MT <= s.rows; j += MT) {
    int64_t t = 0;
    for (; t + L * NV <= length; t += L * NV) register_tile<L, NV, MT, UNIT>(s, T, w, a + t, b + t, j);
    for (; t < length; t += L) {
      const int64_t first = std::min(t, length - L);
      register_tile<L, 1, MT, UNIT>(s, T, w, a + first, b + first, j);
    }
  }
  if constexpr (MT > 8) register_tiles<L, NV, UNIT, 8>(s, T, length, w, a, b, j);
  else if constexpr (MT > 4) register_tiles<L, NV, UNIT, 4>(s, T, length, w, a, b, j);
  else if constexpr (MT > 1) register_tiles<L, NV, UNIT, MT / 2>(s, T, length, w, a, b, j);
}

template <int L, int NV, bool UNIT, class W>
inline void register_tiles(const Stage& s, int64_t T, int64_t length, const W* w, const float* a, float* b) {
  // 16 rows go as two tiles of 8: tiles of 12 and 4 are slower.
  if (ROWS > 8 && s.rows % ROWS && s.rows % 8 == 0) register_tiles<L, NV, UNIT, 8>(s, T, length, w, a, b, 0);
  else register_tiles<L, NV, UNIT, ROWS>(s, T, length, w, a, b, 0);
}

template <int L, int NV, bool UNIT> void run_stage(const Stage& s, int64_t T, const float* w, const float* a, float* b) {
  for (int i = 0; i < s.outer; ++i)
    register_tiles<L, NV, UNIT>(s, T, T, w + s.w_outer[i], a + s.a_outer[i] * T, b + s.b_outer[i] * T);
}

template <int L, int NV> void run_stage(const Stage& s, int64_t T, const float* w, const float* a, float* b) {
  if (s.unit) run_stage<L, NV, true>(s, T, w, a, b);
  else run_stage<L, NV, false>(s, T, w, a, b);
}

// Transposes tokens of `features` entries each into a tile (rows, T). Rows beyond the features, and columns beyond the
// tokens, become zero.
template <int L, class S>
void read_tile(const S* x, int64_t tokens, int features, int rows, const Places& at, int64_t T, float* tile) {
  static const S zeros[L] = {};
  for (int64_t t = 0; t < T; t += L) {
    int f = 0;
    for (; f + L <= features; f += L) {
      Vector<L> part[L];
      for (int p = 0; p < L; ++p) part[p] = load<L>(t + p < tokens ? x + int64_t(t + p) * features + f : zeros);
      transpose<L>(part);
      for (int p = 0; p < L; ++p) store<L>(tile + at[f + p] * T + t, part[p]);
    }
    for (; f < features; ++f)
      for (int p = 0; p < L; ++p)
        tile[at[f] * T + t + p] = t + p < tokens ? float(x[int64_t(t + p) * features + f]) : 0.0f;
  }
  for (int f = features; f < rows; ++f) std::fill_n(tile + at[f] * T, T, 0.0f);
}

// Transposes a tile back into tokens and adds the bias.
template <int L, class S>
void write_tile(S* y, int64_t tokens, int features, const Places& at, int64_t T, const float* tile, const S* bias) {
  for (int64_t t = 0; t < std::min(T, tokens); t += L) {
    const int count = std::min<int64_t>(L, tokens - t);
    int f = 0;
    for (; f + L <= features; f += L) {
      Vector<L> part[L];
      for (int p = 0; p < L; ++p) part[p] = load<L>(tile + at[f + p] * T + t);
      transpose<L>(part);
      const Vector<L> shift = bias ? load<L>(bias + f) : Vector<L>{};
      for (int p = 0; p < count; ++p) store<L>(y + int64_t(t + p) * features + f, part[p] + shift);
    }
    for (; f < features; ++f)
      for (int p = 0; p < count; ++p)
        y[int64_t(t + p) * features + f] = tile[at[f] * T + t + p] + (bias ? float(bias[f]) : 0.0f);
  }
}

// Runs all stages on one tile of T tokens, each by run(stage, its input, its output). Buffers: padded input, padded
// output, two intermediates in turn.
template <int L, int T, class S, class F>
void run_tile_by(const Program& p, const S* bias, const S* x, S* y, int64_t tokens, const F& run) {
  const int64_t in = int64_t(p.in_rows()) * T, out = int64_t(p.out_rows()) * T, inner = int64_t(p.rows()) * T;
  Scratch memory = scratch(in + out + 2 * inner, 4);
  float* const buffer[4] = {memory.take(in), memory.take(out), memory.take(inner), memory.take(inner)};
  faults(buffer[0] + in);
  read_tile<L>(x, tokens, p.in_features(), p.in_rows(), p.inputs(), T, buffer[0]);
  for (int k = 0; k < p.stages(); ++k) {
    const Stage s = p.stage(k);
    run(s, buffer[s.source], buffer[s.target]);
  }
  write_tile<L>(y, tokens, p.out_features(), p.outputs(), T, buffer[1], bias);
}

template <int L, int NV, class S>
void run_tile(const Program& p, const Factors<float>& factors, const S* bias, const S* x, S* y, int64_t tokens) {
  run_tile_by<L, L * NV>(p, bias, x, y, tokens, [&](const Stage& s, const float* a, float* b) {
    run_stage<L, NV>(s, L * NV, factors[s.factor], a, b);
  });
}

// Backward --------------------------------------------------------------------------------------------------------------

// For MT rows and NV vectors of columns of one outer index: dw += sum over tokens of g[b_row(j)] a. Here a is stored as
// (T, stride), so that vectors run over columns and the gradient of a row is broadcast.
template <int L, int NV, int MT>
inline void gradient_tile(const Stage& s, int64_t T, int64_t tokens, const float* a, int64_t stride, const float* g,
                          float* dw, int j, int q) {
  const float* row[MT];
  for (int p = 0; p < MT; ++p) row[p] = g + s.b_row[j + p] * T;
  Vector<L> sum[MT][NV] = {};
  for (int64_t t = 0; t < tokens; ++t) {
    Vector<L> value[NV];
    for (int u = 0; u < NV; ++u) value[u] = load<L>(a + t * stride + u * L);
    for (int p = 0; p < MT; ++p) {
      const float gradient = row[p][t];
      for (int u = 0; u < NV; ++u) sum[p][u] += gradient * value[u];
    }
  }
  for (int p = 0; p < MT; ++p) {
    float* to = dw + s.w_row[j + p];
    for (int u = 0; u < NV; ++u) {
      const int first = q + u * L, count = std::min(L, s.columns - first);
      if (s.unit && count == L) {
        store<L>(to + first, load<L>(to + first) + sum[p][u]);
      } else {
        float entry[L];
        store<L>(entry, sum[p][u]);
        for (int d = 0; d < count; ++d) to[s.w_column[first + d]] += entry[d];
      }
    }
  }
}

template <int L, int NV, int MT = 8>
inline void gradient_tiles(const Stage& s, int64_t T, int64_t tokens, const float* a, int64_t stride, const float* g,
                           float* dw, int q, int j = 0) {
  for (; j + MT <= s.rows; j += MT) gradient_tile<L, NV, MT>(s, T, tokens, a, stride, g, dw, j, q);
  if constexpr (MT > 1) gradient_tiles<L, NV, MT / 2>(s, T, tokens, a, stride, g, dw, q, j);
}

// dw[w_outer(i) + w_row(j) + w_column(q)] += sum over tokens of g[b_outer(i) + b_row(j)] a[a_outer(i) + a_column(q)].
template <int L>
void factor_gradient(const Stage& s, int64_t T, int64_t tokens, const float* a, const float* g, float* transposed, float* dw) {
  const int64_t stride = (s.columns + L - 1) / L * L;
  for (int i = 0; i < s.outer; ++i) {
    const float* from = a + s.a_outer[i] * T;
    for (int q = 0; q < stride; q += L)
      for (int64_t t = 0; t < tokens; t += L) {
        Vector<L> part[L];
        for (int p = 0; p < L; ++p) part[p] = q + p < s.columns ? load<L>(from + s.a_column[q + p] * T + t) : Vector<L>{};
        transpose<L>(part);
        for (int p = 0; p < L; ++p) store<L>(transposed + (t + p) * stride + q, part[p]);
      }
    const auto tiles = [&](auto vectors, int q) {
      gradient_tiles<L, vectors()>(s, T, tokens, transposed + q, stride, g + s.b_outer[i] * T, dw + s.w_outer[i], q);
    };
    int q = 0;
    for (; q + 3 * L <= stride; q += 3 * L) tiles(std::integral_constant<int, 3>(), q);
    for (; q + 2 * L <= stride; q += 2 * L) tiles(std::integral_constant<int, 2>(), q);
    if (q < stride) tiles(std::integral_constant<int, 1>(), q);
  }
}

// Picks the vector's length: half of it suffices for few columns, and every length divides the tile.
template <int L>
void any_factor_gradient(const Stage& s, int64_t T, int64_t tokens, const float* a, const float* g, float* transposed, float* dw) {
  if constexpr (L > 4)
    if (s.columns <= L / 2) return any_factor_gradient<L / 2>(s, T, tokens, a, g, transposed, dw);
  factor_gradient<L>(s, T, tokens, a, g, transposed, dw);
}

// Adds the gradients of one tile: recomputes and keeps all activations, then runs the stages in reverse.
template <int L, int NV, class S>
void run_tile_backward(const Program& p, const Factors<float>& factors, const S* x, const S* dy, S* dx,
                       const std::vector<float*>& gradients, int64_t tokens, int T) {
  const int64_t in = int64_t(p.in_rows()) * T, out = int64_t(p.out_rows()) * T, inner = int64_t(p.rows()) * T;
  const int64_t square = (p.widest() + L) * int64_t(T);
  Scratch memory = scratch(2 * in + out + kept_rows(p) * T + 2 * inner + square, 6 + p.stages());
  float *input = memory.take(in), *d_input = memory.take(in), *d_output = memory.take(out);
  float *ping = memory.take(inner), *pong = memory.take(inner), *transposed = memory.take(square);
  std::vector<float*> outputs(p.stages());
  read_tile<L>(x, tokens, p.in_features(), p.in_rows(), p.inputs(), T, input);
  read_tile<L>(dy, tokens, p.out_features(), p.out_rows(), p.outputs(), T, d_output);
  for (int k = 0; k < p.stages(); ++k) {
    const Stage s = p.stage(k);
    if (s.target == 1) continue;
    outputs[k] = memory.take(inner);
    run_stage<L, NV>(s, T, factors[s.factor], s.source == 0 ? input : outputs[k - 1], outputs[k]);
  }
  bool written = false;
  const float* gradient = d_output;
  for (int k = p.stages() - 1; k >= 0; --k) {
    const Stage s = p.stage(k);
    if (s.target == 1) gradient = d_output;
    if (gradients[s.factor])
      any_factor_gradient<L>(s, T, tokens, s.source == 0 ? input : outputs[k - 1], gradient, transposed, gradients[s.factor]);
    if (s.source == 0) {
      if (dx) run_stage<L, NV>(s.transposed(written), T, factors[s.factor], gradient, d_input);
      written = true;
    } else {
      float* to = gradient == ping ? pong : ping;
      run_stage<L, NV>(s.transposed(false), T, factors[s.factor], gradient, to);
      gradient = to;
    }
  }
  if (dx) write_tile<L, S>(dx, tokens, p.in_features(), p.inputs(), T, d_input, nullptr);
}

}  // namespace
