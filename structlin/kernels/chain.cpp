// Chains of small contractions on a CPU: all stages of a structured layer, and its bias, in one call.
//
// A stage maps activations a to b[o(i) + r(j)] += sum_q w[v(i) + m(j) + n(q)] a[x(i) + c(q)], for all outer i, rows j.
// All seven offsets are tables in the program (int32), which structlin/kernels/program.py writes: a factor is read in
// the order in which it is stored, and activations are never permuted. Batches of tokens are transposed into tiles whose
// innermost axis is the token, so that every stage is vectorised over tokens whatever its modes; single tokens are
// vectorised over the factors' innermost axis. The vectors are those of the compiler: AVX-512, AVX2 and NEON alike.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace {

// Vectors -----------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int WIDEST = 16;
constexpr int ROWS = 12;  // of a register tile, two vectors each
#elif defined(__AVX__)
constexpr int WIDEST = 8;
constexpr int ROWS = 6;
#else
constexpr int WIDEST = 4;
constexpr int ROWS = 8;
#endif

constexpr int NARROW = WIDEST > 4 ? WIDEST / 2 : 4;
constexpr int64_t FEW = 3;  // tokens that go one by one
constexpr int64_t CACHE = 1 << 23;  // bytes of intermediates that a tile may have

template <int L> struct Lanes;
template <> struct Lanes<4> { typedef float Vector __attribute__((vector_size(16))); };
template <> struct Lanes<8> { typedef float Vector __attribute__((vector_size(32))); };
template <> struct Lanes<16> { typedef float Vector __attribute__((vector_size(64))); };
template <int L> using Vector = typename Lanes<L>::Vector;

template <int L> inline Vector<L> load(const float* from) {
  Vector<L> value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

template <int L> inline void store(float* to, Vector<L> value) { std::memcpy(to, &value, sizeof(value)); }

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

// Lane j of the result is the sum of the lanes of rows[j].
template <int L, int D = L / 2> inline Vector<L> sums(Vector<L>* rows) {
  for (int p = 0; p < D; ++p) rows[p] = folded<L, D>(rows[p], rows[p + D], std::make_integer_sequence<int, L>());
  if constexpr (D == 1) return rows[0];
  else return sums<L, D / 2>(rows);
}

template <int L, int D = L / 2> inline void transpose(Vector<L>* rows) {
  for (int p = 0; p < L; ++p)
    if (!(p & D)) exchange<L, D>(rows[p], rows[p + D], std::make_integer_sequence<int, L>());
  if constexpr (D > 1) transpose<L, D / 2>(rows);
}

// Programs ----------------------------------------------------------------------------------------------------------

struct Stage {
  int factor, source, target;  // buffers: 0 is x, 1 is y
  bool accumulates;
  int outer, rows, columns;
  bool unit;    // n(q) = q
  int run;      // x, v and o advance by one in runs of this length, 0: they do not
  bool packed;  // c(q) = q
  const int32_t *x, *v, *o, *r, *m, *c, *n;

  // The stage from the gradient of its output to that of its input.
  Stage transposed(bool accumulate) const {
    return {factor, target, source, accumulate, outer, columns, rows, false, 0, false, o, v, x, c, n, r, m};
  }
};

constexpr int HEADER = 8, RECORD = 16;

struct Program {
  const int32_t* data;
  int stages() const { return data[0]; }
  int in_features() const { return data[1]; }
  int out_features() const { return data[2]; }
  int in_rows() const { return data[3]; }   // of x, padded
  int out_rows() const { return data[4]; }  // of y, padded
  int rows() const { return data[5]; }      // of the largest intermediate
  int widest() const { return data[6]; }    // most rows or columns of a stage
  int block() const { return data[7]; }     // most rows times columns of a stage whose n(q) is not q
  Stage stage(int k) const {
    const int32_t* f = data + HEADER + RECORD * k;
    return {f[0], f[1], f[2], f[3] != 0, f[4], f[5], f[6], f[7] == 1, f[7] > 1 ? f[7] : 0, f[8] != 0,
            data + f[9], data + f[10], data + f[11], data + f[12], data + f[13], data + f[14], data + f[15]};
  }
};

// Aligned scratch of a thread, kept between calls.
float* scratch(int64_t floats) {
  thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < floats + 16) memory.resize(floats + 16);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<float*>((address + 63) & ~static_cast<uintptr_t>(63));
}

// Many tokens: vectors of tokens ------------------------------------------------------------------------------------

// MT rows of one outer index, for NV vectors of tokens out of T.
template <int L, int NV, int MT, bool UNIT>
inline void register_tile(const Stage& s, int64_t T, const float* w, const float* a, float* b, int j) {
  const int32_t *m = s.m + j, *r = s.r + j, *c = s.c, *n = s.n;
  const float* row[MT];
  Vector<L> sum[MT][NV];
  for (int p = 0; p < MT; ++p) {
    row[p] = w + m[p];
    for (int u = 0; u < NV; ++u) sum[p][u] = s.accumulates ? load<L>(b + r[p] * T + u * L) : Vector<L>{};
  }
  for (int q = 0; q < s.columns; ++q) {
    const float* from = a + c[q] * T;
    const int offset = UNIT ? q : n[q];
    Vector<L> value[NV];
    for (int u = 0; u < NV; ++u) value[u] = load<L>(from + u * L);
    for (int p = 0; p < MT; ++p) {
      const float weight = row[p][offset];
      for (int u = 0; u < NV; ++u) sum[p][u] += weight * value[u];
    }
  }
  for (int p = 0; p < MT; ++p)
    for (int u = 0; u < NV; ++u) store<L>(b + r[p] * T + u * L, sum[p][u]);
}

template <int L, int NV, bool UNIT, int MT = ROWS>
inline void register_tiles(const Stage& s, int64_t T, const float* w, const float* a, float* b, int j) {
  for (; j + MT <= s.rows; j += MT)
    for (int64_t t = 0; t < T; t += L * NV) register_tile<L, NV, MT, UNIT>(s, T, w, a + t, b + t, j);
  if constexpr (MT > 8) register_tiles<L, NV, UNIT, 8>(s, T, w, a, b, j);
  else if constexpr (MT > 4) register_tiles<L, NV, UNIT, 4>(s, T, w, a, b, j);
  else if constexpr (MT > 1) register_tiles<L, NV, UNIT, MT / 2>(s, T, w, a, b, j);
}

template <int L, int NV, bool UNIT> void run_stage(const Stage& s, int64_t T, const float* w, const float* a, float* b) {
  const bool eights = ROWS > 8 && s.rows % ROWS && s.rows % 8 == 0;  // 16 rows: two tiles of 8, not 12 and 4
  for (int i = 0; i < s.outer; ++i) {
    const float *weight = w + s.v[i], *from = a + s.x[i] * T;
    if (eights) register_tiles<L, NV, UNIT, 8>(s, T, weight, from, b + s.o[i] * T, 0);
    else register_tiles<L, NV, UNIT>(s, T, weight, from, b + s.o[i] * T, 0);
  }
}

template <int L, int NV> void run_stage(const Stage& s, int64_t T, const float* w, const float* a, float* b) {
  if (s.unit) run_stage<L, NV, true>(s, T, w, a, b);
  else run_stage<L, NV, false>(s, T, w, a, b);
}

// Rows of `features` entries each into a tile of T columns; rows of the tile beyond the features are zero.
template <int L> void read_tile(const float* x, int64_t tokens, int features, int rows, int64_t T, float* tile) {
  static const float zeros[L] = {};
  for (int64_t t = 0; t < T; t += L) {
    int f = 0;
    for (; f + L <= features; f += L) {
      Vector<L> part[L];
      for (int p = 0; p < L; ++p) part[p] = load<L>(t + p < tokens ? x + int64_t(t + p) * features + f : zeros);
      transpose<L>(part);
      for (int p = 0; p < L; ++p) store<L>(tile + (f + p) * T + t, part[p]);
    }
    for (; f < features; ++f)
      for (int p = 0; p < L; ++p) tile[f * T + t + p] = t + p < tokens ? x[int64_t(t + p) * features + f] : 0.0f;
  }
  std::fill(tile + features * T, tile + rows * T, 0.0f);
}

template <int L>
void write_tile(float* y, int64_t tokens, int features, int64_t T, const float* tile, const float* bias) {
  for (int64_t t = 0; t < std::min(T, tokens); t += L) {
    const int count = std::min<int64_t>(L, tokens - t);
    int f = 0;
    for (; f + L <= features; f += L) {
      Vector<L> part[L];
      for (int p = 0; p < L; ++p) part[p] = load<L>(tile + (f + p) * T + t);
      transpose<L>(part);
      const Vector<L> shift = bias ? load<L>(bias + f) : Vector<L>{};
      for (int p = 0; p < count; ++p) store<L>(y + int64_t(t + p) * features + f, part[p] + shift);
    }
    for (; f < features; ++f)
      for (int p = 0; p < count; ++p) y[int64_t(t + p) * features + f] = tile[f * T + t + p] + (bias ? bias[f] : 0.0f);
  }
}

using Factors = std::vector<const float*>;

template <int L, int NV>
void run_tile(const Program& p, const Factors& factors, const float* bias, const float* x, float* y, int64_t tokens) {
  constexpr int T = L * NV;
  float* buffer[4] = {scratch((p.in_rows() + p.out_rows() + 2 * int64_t(p.rows())) * T)};
  buffer[1] = buffer[0] + int64_t(p.in_rows()) * T;
  buffer[2] = buffer[1] + int64_t(p.out_rows()) * T;
  buffer[3] = buffer[2] + int64_t(p.rows()) * T;
  read_tile<L>(x, tokens, p.in_features(), p.in_rows(), T, buffer[0]);
  for (int k = 0; k < p.stages(); ++k) {
    const Stage s = p.stage(k);
    run_stage<L, NV>(s, T, factors[s.factor], buffer[s.source], buffer[s.target]);
  }
  write_tile<L>(y, tokens, p.out_features(), T, buffer[1], bias);
}

// A few tokens: vectors along the factors ---------------------------------------------------------------------------

// out[j] = sum_q w[m(j) + q] a[q], L rows at a time; there are at least L rows and columns.
template <int L> void dot_rows(const Stage& s, const int32_t* m, const float* w, const float* a, float* out) {
  const int rest = s.columns % L;
  float last[L] = {};
  for (int q = L - rest; q < L; ++q) last[q] = a[s.columns - L + q];
  const Vector<L> tail = load<L>(last);
  for (int j = 0; j < s.rows; j += L) {
    const int first = std::min(j, s.rows - L);
    Vector<L> sum[L] = {};
    for (int q = 0; q + L <= s.columns; q += L) {
      const Vector<L> value = load<L>(a + q);
      for (int p = 0; p < L; ++p) sum[p] += load<L>(w + m[first + p] + q) * value;
    }
    if (rest)
      for (int p = 0; p < L; ++p) sum[p] += load<L>(w + m[first + p] + s.columns - L) * tail;
    store<L>(out + first, sums<L>(sum));
  }
}

// Vectors along outer indices from i on that share nothing: b = sum_q w a, L of them at a time.
template <int L> void run_along(const Stage& s, int i, const float* w, const float* a, float* b) {
  for (int j = 0; j < s.rows; ++j)
    for (int d = 0; d < s.run; d += L) {
      const int first = std::min(d, s.run - L);  // the last vector overlaps the one before
      Vector<L> sum = {};
      for (int q = 0; q < s.columns; ++q)
        sum += load<L>(w + s.v[i] + s.m[j] + s.n[q] + first) * load<L>(a + s.x[i] + s.c[q] + first);
      store<L>(b + s.o[i] + s.r[j] + first, sum);
    }
}

// Scratch of a row: the values of one outer index, its results, a block of the factor, and where its rows begin.
struct Row {
  float *values, *results, *block;
  int32_t* begins;
};

void run_row(const Stage& s, const float* w, const float* a, float* b, const Row& row) {
  const int smaller = std::min(s.rows, s.columns);
  if (s.run && !s.accumulates) {
    for (int i = 0; i < s.outer; i += s.run) {
      if (WIDEST >= 16 && s.run >= 16) run_along<WIDEST>(s, i, w, a, b);
      else if (WIDEST >= 8 && s.run >= 8) run_along<std::min(WIDEST, 8)>(s, i, w, a, b);
      else run_along<4>(s, i, w, a, b);
    }
    return;
  }
  for (int i = 0; i < s.outer; ++i) {
    const float *weight = w + s.v[i], *value = a + s.x[i];
    if (!s.packed) {
      for (int q = 0; q < s.columns; ++q) row.values[q] = value[s.c[q]];
      value = row.values;
    }
    const int32_t* begins = s.m;
    if (!s.unit) {  // put the block in order; the outer indices that share it follow one another
      if (i == 0 || s.v[i] != s.v[i - 1])
        for (int j = 0; j < s.rows; ++j) {
          row.begins[j] = j * s.columns;
          for (int q = 0; q < s.columns; ++q) row.block[j * s.columns + q] = weight[s.m[j] + s.n[q]];
        }
      weight = row.block;
      begins = row.begins;
    }
    if (WIDEST >= 16 && smaller >= 16) dot_rows<WIDEST>(s, begins, weight, value, row.results);
    else if (WIDEST >= 8 && smaller >= 8) dot_rows<std::min(WIDEST, 8)>(s, begins, weight, value, row.results);
    else if (smaller >= 4) dot_rows<4>(s, begins, weight, value, row.results);
    else
      for (int j = 0; j < s.rows; ++j) {
        float sum = 0.0f;
        for (int q = 0; q < s.columns; ++q) sum += weight[begins[j] + q] * value[q];
        row.results[j] = sum;
      }
    float* to = b + s.o[i];
    if (s.accumulates)
      for (int j = 0; j < s.rows; ++j) to[s.r[j]] += row.results[j];
    else
      for (int j = 0; j < s.rows; ++j) to[s.r[j]] = row.results[j];
  }
}

void run_token(const Program& p, const Factors& factors, const float* bias, const float* x, float* y) {
  float* buffer[4] = {scratch(p.in_rows() + p.out_rows() + 2 * p.rows() + 3 * int64_t(p.widest()) + p.block())};
  buffer[1] = buffer[0] + p.in_rows();
  buffer[2] = buffer[1] + p.out_rows();
  buffer[3] = buffer[2] + p.rows();
  float* rest = buffer[3] + p.rows();
  const Row row{rest, rest + p.widest(), rest + 3 * p.widest(), reinterpret_cast<int32_t*>(rest + 2 * p.widest())};
  std::copy(x, x + p.in_features(), buffer[0]);
  std::fill(buffer[0] + p.in_features(), buffer[0] + p.in_rows(), 0.0f);
  for (int k = 0; k < p.stages(); ++k) {
    const Stage s = p.stage(k);
    run_row(s, factors[s.factor], buffer[s.source], buffer[s.target], row);
  }
  for (int f = 0; f < p.out_features(); ++f) y[f] = buffer[1][f] + (bias ? bias[f] : 0.0f);
}

// Backward ----------------------------------------------------------------------------------------------------------

// MT rows and NV vectors of columns of one outer index: dw += sum over tokens of g[r(j)] a, a transposed to T x stride.
template <int L, int NV, int MT>
inline void gradient_tile(const Stage& s, int64_t T, const float* a, int64_t stride, const float* g, float* dw, int j, int q) {
  const float* row[MT];
  for (int p = 0; p < MT; ++p) row[p] = g + s.r[j + p] * T;
  Vector<L> sum[MT][NV] = {};
  for (int64_t t = 0; t < T; ++t) {
    Vector<L> value[NV];
    for (int u = 0; u < NV; ++u) value[u] = load<L>(a + t * stride + u * L);
    for (int p = 0; p < MT; ++p) {
      const float slope = row[p][t];
      for (int u = 0; u < NV; ++u) sum[p][u] += slope * value[u];
    }
  }
  for (int p = 0; p < MT; ++p) {
    float* to = dw + s.m[j + p];
    for (int u = 0; u < NV; ++u) {
      const int first = q + u * L, count = std::min(L, s.columns - first);
      if (s.unit && count == L) {
        store<L>(to + first, load<L>(to + first) + sum[p][u]);
      } else {
        float entry[L];
        store<L>(entry, sum[p][u]);
        for (int d = 0; d < count; ++d) to[s.n[first + d]] += entry[d];
      }
    }
  }
}

template <int L, int NV, int MT = 8>
inline void gradient_tiles(const Stage& s, int64_t T, const float* a, int64_t stride, const float* g, float* dw, int q, int j = 0) {
  for (; j + MT <= s.rows; j += MT) gradient_tile<L, NV, MT>(s, T, a, stride, g, dw, j, q);
  if constexpr (MT > 1) gradient_tiles<L, NV, MT / 2>(s, T, a, stride, g, dw, q, j);
}

// dw[v(i) + m(j) + n(q)] += sum over tokens of g[o(i) + r(j)] a[x(i) + c(q)].
template <int L> void factor_gradient(const Stage& s, int64_t T, const float* a, const float* g, float* turned, float* dw) {
  const int64_t stride = (s.columns + L - 1) / L * L;
  for (int i = 0; i < s.outer; ++i) {
    const float* from = a + s.x[i] * T;
    for (int q = 0; q < stride; q += L)
      for (int64_t t = 0; t < T; t += L) {
        Vector<L> part[L];
        for (int p = 0; p < L; ++p) part[p] = q + p < s.columns ? load<L>(from + s.c[q + p] * T + t) : Vector<L>{};
        transpose<L>(part);
        for (int p = 0; p < L; ++p) store<L>(turned + (t + p) * stride + q, part[p]);
      }
    int q = 0;
    for (; q + 2 * L <= stride; q += 2 * L)
      gradient_tiles<L, 2>(s, T, turned + q, stride, g + s.o[i] * T, dw + s.v[i], q);
    if (q < stride) gradient_tiles<L, 1>(s, T, turned + q, stride, g + s.o[i] * T, dw + s.v[i], q);
  }
}

// By vectors that waste little of few columns, and divide the tile.
template <int L> void any_factor_gradient(const Stage& s, int64_t T, const float* a, const float* g, float* turned, float* dw) {
  if constexpr (L > 4)
    if (s.columns <= L / 2) return any_factor_gradient<L / 2>(s, T, a, g, turned, dw);
  factor_gradient<L>(s, T, a, g, turned, dw);
}

// Rows of the output of each stage but the last ones of the equations, which go to y.
int64_t kept_rows(const Program& p) {
  int64_t rows = 0;
  for (int k = 0; k < p.stages(); ++k)
    if (p.stage(k).target != 1) rows += p.rows();
  return rows;
}

// Gradients of one tile: activations are computed anew and kept, then the stages are gone through from the last.
template <int L, int NV>
void run_tile_backward(const Program& p, const Factors& factors, const float* x, const float* dy, float* dx,
                       const std::vector<float*>& gradients, int64_t tokens, int T) {
  const int64_t in = int64_t(p.in_rows()) * T, out = int64_t(p.out_rows()) * T, inner = int64_t(p.rows()) * T;
  float* memory = scratch(2 * in + out + kept_rows(p) * T + 2 * inner + (p.widest() + L) * int64_t(T));
  float *input = memory, *d_input = input + in, *d_output = d_input + in, *ping = d_output + out, *pong = ping + inner;
  float* turned = pong + inner;
  std::vector<float*> outputs(p.stages());
  float* next = turned + (p.widest() + L) * int64_t(T);
  read_tile<L>(x, tokens, p.in_features(), p.in_rows(), T, input);
  read_tile<L>(dy, tokens, p.out_features(), p.out_rows(), T, d_output);
  for (int k = 0; k < p.stages(); ++k) {
    const Stage s = p.stage(k);
    if (s.target == 1) continue;
    outputs[k] = next;
    next += inner;
    run_stage<L, NV>(s, T, factors[s.factor], s.source == 0 ? input : outputs[k - 1], outputs[k]);
  }
  bool written = false;
  const float* gradient = d_output;
  for (int k = p.stages() - 1; k >= 0; --k) {
    const Stage s = p.stage(k);
    if (s.target == 1) gradient = d_output;
    if (gradients[s.factor])
      any_factor_gradient<L>(s, T, s.source == 0 ? input : outputs[k - 1], gradient, turned, gradients[s.factor]);
    if (s.source == 0) {
      if (dx) run_stage<L, NV>(s.transposed(written), T, factors[s.factor], gradient, d_input);
      written = true;
    } else {
      float* to = gradient == ping ? pong : ping;
      run_stage<L, NV>(s.transposed(false), T, factors[s.factor], gradient, to);
      gradient = to;
    }
  }
  if (dx) write_tile<L>(dx, tokens, p.in_features(), T, d_input, nullptr);
}

// One token of one stage: da = w^T g and dw += g a, row by row of the factor.
void run_row_backward(const Stage& s, const float* w, const float* a, const float* g, float* da, bool accumulate,
                      float* dw, const Row& row) {
  for (int i = 0; i < s.outer; ++i) {
    const float* value = a + s.x[i];
    if (!s.packed) {
      for (int q = 0; q < s.columns; ++q) row.values[q] = value[s.c[q]];
      value = row.values;
    }
    float* __restrict__ sum = row.results;
    if (da) std::fill(sum, sum + s.columns, 0.0f);
    for (int j = 0; j < s.rows; ++j) {
      const float slope = g[s.o[i] + s.r[j]];
      const float* weight = w + s.v[i] + s.m[j];
      if (s.unit) {
        if (da)
          for (int q = 0; q < s.columns; ++q) sum[q] += slope * weight[q];
        if (float* __restrict__ to = dw ? dw + s.v[i] + s.m[j] : nullptr)
          for (int q = 0; q < s.columns; ++q) to[q] += slope * value[q];
      } else {
        if (da)
          for (int q = 0; q < s.columns; ++q) sum[q] += slope * weight[s.n[q]];
        if (dw)
          for (int q = 0; q < s.columns; ++q) dw[s.v[i] + s.m[j] + s.n[q]] += slope * value[q];
      }
    }
    if (!da) continue;
    float* to = da + s.x[i];
    if (accumulate)
      for (int q = 0; q < s.columns; ++q) to[s.c[q]] += sum[q];
    else
      for (int q = 0; q < s.columns; ++q) to[s.c[q]] = sum[q];
  }
}

void run_token_backward(const Program& p, const Factors& factors, const float* x, const float* dy, float* dx,
                        const std::vector<float*>& gradients) {
  const int64_t widest = p.widest();
  float* input = scratch(2 * int64_t(p.in_rows()) + p.out_rows() + 2 * p.rows() + kept_rows(p) + 3 * widest + p.block());
  float *d_input = input + p.in_rows(), *d_output = d_input + p.in_rows(), *ping = d_output + p.out_rows();
  float *pong = ping + p.rows(), *rest = pong + p.rows();
  const Row row{rest, rest + widest, rest + 3 * widest, reinterpret_cast<int32_t*>(rest + 2 * widest)};
  std::vector<float*> outputs(p.stages());
  float* next = row.block + p.block();
  std::copy(x, x + p.in_features(), input);
  std::fill(input + p.in_features(), d_input, 0.0f);
  std::copy(dy, dy + p.out_features(), d_output);
  std::fill(d_output + p.out_features(), ping, 0.0f);
  for (int k = 0; k < p.stages(); ++k) {
    const Stage s = p.stage(k);
    if (s.target == 1) continue;
    outputs[k] = next;
    next += p.rows();
    run_row(s, factors[s.factor], s.source == 0 ? input : outputs[k - 1], outputs[k], row);
  }
  bool written = false;
  const float* gradient = d_output;
  for (int k = p.stages() - 1; k >= 0; --k) {
    const Stage s = p.stage(k);
    if (s.target == 1) gradient = d_output;
    float* to = s.source == 0 ? (dx ? d_input : nullptr) : gradient == ping ? pong : ping;
    run_row_backward(s, factors[s.factor], s.source == 0 ? input : outputs[k - 1], gradient, to,
                     s.source == 0 && written, gradients[s.factor], row);
    if (s.source == 0) written = true;
    else gradient = to;
  }
  if (dx) std::copy(d_input, d_input + p.in_features(), dx);
}

// The operators -----------------------------------------------------------------------------------------------------

struct Operands {
  Factors pointers;
  std::vector<at::Tensor> kept;

  explicit Operands(at::TensorList factors) {
    for (const at::Tensor& factor : factors) {
      kept.push_back(factor.contiguous());
      pointers.push_back(kept.back().const_data_ptr<float>());
    }
  }
};

at::Tensor chain(const at::Tensor& x, at::TensorList factors, const std::optional<at::Tensor>& bias,
                 const at::Tensor& program) {
  const Program p{program.const_data_ptr<int32_t>()};
  TORCH_CHECK(x.dim() > 0 && x.size(-1) == p.in_features(), "structlin::chain: the input does not fit the program");
  const at::Tensor rows = x.contiguous();
  const Operands operands(factors);
  const float* shift = bias.has_value() ? bias->const_data_ptr<float>() : nullptr;
  const int64_t in = p.in_features(), out = p.out_features(), tokens = x.numel() / in;
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = out;
  at::Tensor y = at::empty(sizes, x.options());
  const float* from = rows.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  if (tokens <= FEW) {
    for (int64_t t = 0; t < tokens; ++t) run_token(p, operands.pointers, shift, from + t * in, to + t * out);
    return y;
  }
  constexpr int T = 2 * WIDEST;
  at::parallel_for(0, (tokens + T - 1) / T, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t t = tile * T, count = std::min<int64_t>(T, tokens - t);
      const auto run = count > WIDEST ? run_tile<WIDEST, 2> : count > NARROW ? run_tile<WIDEST, 1> : run_tile<NARROW, 1>;
      run(p, operands.pointers, shift, from + t * in, to + t * out, count);
    }
  });
  return y;
}

// Gradients of x (undefined unless asked for) and of the factors (those not asked for are undefined).
std::vector<at::Tensor> chain_backward(const at::Tensor& dy, const at::Tensor& x, at::TensorList factors,
                                       const at::Tensor& program, bool input_gradient, at::IntArrayRef wanted) {
  const Program p{program.const_data_ptr<int32_t>()};
  const at::Tensor rows = x.contiguous(), slopes = dy.contiguous();
  const Operands operands(factors);
  const int64_t in = p.in_features(), out = p.out_features(), tokens = x.numel() / in;
  at::Tensor dx = input_gradient ? at::empty(x.sizes(), x.options()) : at::Tensor();
  int64_t total = 0;
  for (const int64_t k : wanted) total += factors[k].numel();
  // Tiles as long as the intermediates leave room in a cache, so that sums over tokens pay.
  const int64_t floats = 2 * int64_t(p.in_rows()) + p.out_rows() + kept_rows(p) + 2 * int64_t(p.rows());
  const int L = tokens > NARROW ? WIDEST : tokens > 4 ? NARROW : 4;
  int T = tokens > L ? 2 * L : L;
  while (T < 8 * WIDEST && T < tokens && 2 * T * floats * int64_t(sizeof(float)) <= CACHE) T *= 2;
  const int64_t tiles = (tokens + T - 1) / T;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), tiles));
  at::Tensor sums = at::zeros({parts, total}, x.options());
  const float *from = rows.const_data_ptr<float>(), *slope = slopes.const_data_ptr<float>();
  float *to = input_gradient ? dx.mutable_data_ptr<float>() : nullptr, *sum = sums.mutable_data_ptr<float>();
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      std::vector<float*> gradients(factors.size(), nullptr);
      float* next = sum + part * total;
      for (const int64_t k : wanted) {
        gradients[k] = next;
        next += factors[k].numel();
      }
      if (tokens <= FEW) {
        for (int64_t t = 0; t < tokens; ++t)
          run_token_backward(p, operands.pointers, from + t * in, slope + t * out, to ? to + t * in : nullptr, gradients);
        continue;
      }
      for (int64_t tile = part * tiles / parts; tile < (part + 1) * tiles / parts; ++tile) {
        const int64_t t = tile * T;
        const auto run = T >= 2 * WIDEST ? run_tile_backward<WIDEST, 2>
                         : L == WIDEST   ? run_tile_backward<WIDEST, 1>
                         : L == NARROW   ? run_tile_backward<NARROW, 1>
                                         : run_tile_backward<4, 1>;
        run(p, operands.pointers, from + t * in, slope + t * out, to ? to + t * in : nullptr,
            gradients, std::min<int64_t>(T, tokens - t), T);
      }
    }
  });
  const at::Tensor flat = parts > 1 ? sums.sum(0) : sums[0];
  std::vector<at::Tensor> result{dx};
  int64_t position = 0;
  result.resize(1 + factors.size());
  for (const int64_t k : wanted) {
    result[1 + k] = flat.narrow(0, position, factors[k].numel()).view(factors[k].sizes());
    position += factors[k].numel();
  }
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(structlin, library) {
  library.def("chain(Tensor x, Tensor[] factors, Tensor? bias, Tensor program) -> Tensor");
  library.def(
      "chain_backward(Tensor dy, Tensor x, Tensor[] factors, Tensor program, bool input_gradient, int[] wanted) -> "
      "Tensor[]");
}

TORCH_LIBRARY_IMPL(structlin, CPU, library) {
  library.impl("chain", chain);
  library.impl("chain_backward", chain_backward);
}
