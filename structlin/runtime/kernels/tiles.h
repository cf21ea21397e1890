// Many tokens: tiles of shape (features, T), whose innermost axis, and with it all vectors, runs over tokens.

#pragma once

#include <algorithm>

#include "program.h"
#include "vectors.h"

namespace {

// How a block of the factor lies in memory: by tables, rows contiguous, or a panel of MT rows by columns.
enum Layout { TABLES, UNIT, PANEL };

// Computes MT rows of one outer index for NV vectors of tokens. The MT x NV sums stay in registers; a column of the
// factor is broadcast.
template <int L, int NV, int MT, Layout LAYOUT, class W>
inline void register_tile(const Stage& s, int64_t T, const W* w, const float* a, float* b, int j) {
  const int32_t *w_row = s.w_row + j, *b_row = s.b_row + j;
  const W* row[MT];
  Vector<L> sum[MT][NV] = {};
  UNROLLED
  for (int p = 0; p < MT; ++p) row[p] = w + (LAYOUT == PANEL ? p : w_row[p]);
  if (s.accumulates)
    UNROLLED
    for (int p = 0; p < MT; ++p)
      UNROLLED
      for (int u = 0; u < NV; ++u) sum[p][u] = load<L>(b + b_row[p] * T + u * L);
  int q = 0;
  do {  // there is a column: a test before the first one would keep the sums out of registers
    const float* from = a + s.a_column[q] * T;
    const int offset = LAYOUT == TABLES ? s.w_column[q] : LAYOUT == UNIT ? q : q * MT;
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
// sums again. PANEL: the rows of a block are neighbours, and each panel is copied to `panel` first.
template <int L, int NV, Layout LAYOUT, int MT, class W>
inline void register_tiles(const Stage& s, int64_t T, int64_t length, const W* w, const float* a, float* b, int j, W* panel) {
  for (; j + MT <= s.rows; j += MT) {
    const W* from = w;
    if constexpr (LAYOUT == PANEL) {
      for (int q = 0; q < s.columns; ++q) std::memcpy(panel + q * MT, w + s.w_column[q] + j, MT * sizeof(W));
      from = panel;
    }
    int64_t t = 0;
    for (; t + L * NV <= length; t += L * NV) register_tile<L, NV, MT, LAYOUT>(s, T, from, a + t, b + t, j);
    for (; t < length; t += L) {
      const int64_t first = std::min(t, length - L);
      register_tile<L, 1, MT, LAYOUT>(s, T, from, a + first, b + first, j);
    }
  }
  if constexpr (MT > 8) register_tiles<L, NV, LAYOUT, 8>(s, T, length, w, a, b, j, panel);
  else if constexpr (MT > 4) register_tiles<L, NV, LAYOUT, 4>(s, T, length, w, a, b, j, panel);
  else if constexpr (MT > 1) register_tiles<L, NV, LAYOUT, MT / 2>(s, T, length, w, a, b, j, panel);
}

template <int L, int NV, Layout LAYOUT, class W>
inline void register_tiles(const Stage& s, int64_t T, int64_t length, const W* w, const float* a, float* b, W* panel = nullptr) {
  // 16 rows go as two tiles of 8: tiles of 12 and 4 are slower.
  if (ROWS > 8 && s.rows % ROWS && s.rows % 8 == 0) register_tiles<L, NV, LAYOUT, 8>(s, T, length, w, a, b, 0, panel);
  else register_tiles<L, NV, LAYOUT, ROWS>(s, T, length, w, a, b, 0, panel);
}

template <int L, int NV, Layout LAYOUT>
void run_stage(const Stage& s, int64_t T, const float* w, const float* a, float* b, float* panel = nullptr) {
  for (int i = 0; i < s.outer; ++i)
    register_tiles<L, NV, LAYOUT>(s, T, T, w + s.w_outer[i], a + s.a_outer[i] * T, b + s.b_outer[i] * T, panel);
}

template <int L, int NV> void run_stage(const Stage& s, int64_t T, const float* w, const float* a, float* b) {
  if (s.unit) run_stage<L, NV, UNIT>(s, T, w, a, b);
  else run_stage<L, NV, TABLES>(s, T, w, a, b);
}

// Runs a stage on the transposed blocks of its factor. Where their rows are neighbours, several vectors of tokens share a
// panel of them: in a large factor its columns are pages apart. Memory for a panel: ROWS entries for each column.
template <int L, int NV>
void run_transposed(const Stage& s, bool accumulates, int64_t T, const float* w, const float* a, float* b, float* panel) {
  const Stage turned = s.transposed(accumulates);
  if (s.unit && T >= 2 * L * NV) run_stage<L, NV, PANEL>(turned, T, w, a, b, panel);
  else run_stage<L, NV, TABLES>(turned, T, w, a, b);
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

// For MT rows and NV vectors of columns of one outer index: dw += sum over tokens of g[b_row(j)] a. Here a is stored by
// tokens, so that vectors run over columns and the gradient of a row is broadcast.
template <int L, int NV, int MT>
inline void gradient_tile(const Stage& s, int64_t T, int64_t tokens, const float* a, const float* g, float* dw, int j, int q) {
  const float* row[MT];
  for (int p = 0; p < MT; ++p) row[p] = g + s.b_row[j + p] * T;
  for (int p = 0; p < MT; ++p)  // rows of a large factor are pages apart
    for (int u = 0; s.unit && u < NV; ++u) __builtin_prefetch(dw + s.w_row[j + p] + q + u * L, 1);
  Vector<L> sum[MT][NV] = {};
  for (int64_t t = 0; t < tokens; ++t) {
    Vector<L> value[NV];
    for (int u = 0; u < NV; ++u) value[u] = load<L>(a + (t * NV + u) * L);
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
inline void gradient_tiles(const Stage& s, int64_t T, int64_t tokens, const float* a, const float* g, float* dw, int q, int j = 0) {
  for (; j + MT <= s.rows; j += MT) gradient_tile<L, NV, MT>(s, T, tokens, a, g, dw, j, q);
  if constexpr (MT > 1) gradient_tiles<L, NV, MT / 2>(s, T, tokens, a, g, dw, q, j);
}

// Does this for NV vectors of columns, from column q on, and all rows. Memory: NV vectors for each of T tokens.
template <int L, int NV>
void gradient_strip(const Stage& s, int64_t T, int64_t tokens, const float* a, const float* g, float* strip, float* dw, int q) {
  for (int u = 0; u < NV; ++u)
    for (int64_t t = 0; t < tokens; t += L) {
      Vector<L> part[L];
      for (int p = 0; p < L; ++p) {
        const int column = q + u * L + p;
        part[p] = column < s.columns ? load<L>(a + s.a_column[column] * T + t) : Vector<L>{};
      }
      transpose<L>(part);
      for (int p = 0; p < L; ++p) store<L>(strip + ((t + p) * NV + u) * L, part[p]);
    }
  gradient_tiles<L, NV>(s, T, tokens, strip, g, dw, q);
}

// dw[w_outer(i) + w_row(j) + w_column(q)] += sum over tokens of g[b_outer(i) + b_row(j)] a[a_outer(i) + a_column(q)].
template <int L>
void factor_gradient(const Stage& s, int64_t T, int64_t tokens, const float* a, const float* g, float* strip, float* dw) {
  for (int i = 0; i < s.outer; ++i) {
    const float *from = a + s.a_outer[i] * T, *gradient = g + s.b_outer[i] * T;
    float* to = dw + s.w_outer[i];
    int q = 0;
    for (; s.columns - q > 2 * L; q += 3 * L) gradient_strip<L, 3>(s, T, tokens, from, gradient, strip, to, q);
    if (s.columns - q > L) gradient_strip<L, 2>(s, T, tokens, from, gradient, strip, to, q);
    else if (s.columns > q) gradient_strip<L, 1>(s, T, tokens, from, gradient, strip, to, q);
  }
}

// Picks the vector's length: half of it suffices for few columns, and every length divides the tile.
template <int L>
void any_factor_gradient(const Stage& s, int64_t T, int64_t tokens, const float* a, const float* g, float* strip, float* dw) {
  if constexpr (L > 4)
    if (s.columns <= L / 2) return any_factor_gradient<L / 2>(s, T, tokens, a, g, strip, dw);
  factor_gradient<L>(s, T, tokens, a, g, strip, dw);
}

// Adds the gradients of one tile: recomputes and keeps all activations, then runs the stages in reverse.
template <int L, int NV, class S>
void run_tile_backward(const Program& p, const Factors<float>& factors, const S* x, const S* dy, S* dx,
                       const std::vector<float*>& gradients, int64_t tokens, int T) {
  const int64_t in = int64_t(p.in_rows()) * T, out = int64_t(p.out_rows()) * T, inner = int64_t(p.rows()) * T;
  const int64_t strips = (p.widest() + 3 * L) * int64_t(T);  // columns of a stage by tokens, or of a transposed factor by rows
  Scratch memory = scratch(2 * in + out + kept_rows(p) * T + 2 * inner + strips, 6 + p.stages());
  float *input = memory.take(in), *d_input = memory.take(in), *d_output = memory.take(out);
  float *ping = memory.take(inner), *pong = memory.take(inner), *strip = memory.take(strips);
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
      any_factor_gradient<L>(s, T, tokens, s.source == 0 ? input : outputs[k - 1], gradient, strip, gradients[s.factor]);
    if (s.source == 0) {
      if (dx) run_transposed<L, NV>(s, written, T, factors[s.factor], gradient, d_input, strip);
      written = true;
    } else {
      float* to = gradient == ping ? pong : ping;
      run_transposed<L, NV>(s, false, T, factors[s.factor], gradient, to, strip);
      gradient = to;
    }
  }
  if (dx) write_tile<L, S>(dx, tokens, p.in_features(), p.inputs(), T, d_input, nullptr);
}

}  // namespace
