// Chains of small contractions on a CPU: all stages of a structured layer, and its bias, in one call.
//
// A stage maps activations a to b[o(i) + r(j)] += sum_q w[v(i) + m(j) + n(q)] a[x(i) + c(q)], for all outer i, rows j.
// All seven offsets are tables in the program (int32), which structlin/kernels/program.py writes: a factor is read in
// the order in which it is stored, and activations are never permuted. Batches of tokens are transposed into tiles whose
// innermost axis is the token, so that every stage is vectorised over tokens whatever its modes; single tokens are
// vectorised over the factors' innermost axis. The vectors are those of the compiler: AVX-512, AVX2 and NEON alike.
// Tensors are float32 or bfloat16, all of one kind; whatever is computed in between is float32.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
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
constexpr int GROUP = 4;  // outer indices that are worth going through a block of a factor together
constexpr int64_t MANY = 1 << 21;  // multiplications for one token in a stage that are worth waking threads
constexpr int64_t CACHE = 1 << 23;  // bytes of intermediates that a tile may have

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
template <int L> inline Vector<L> load(const at::BFloat16* from) {
  Halves<L> halves;
  std::memcpy(&halves, from, sizeof(halves));
  return reinterpret_cast<Vector<L>>(__builtin_convertvector(halves, Bits<L>) << 16);
}

// Rounds to nearest, ties to even. No NaN is carried over to a number: those here come from bfloat16 or from the
// processor, and their lower half is zero.
template <int L> inline void store(at::BFloat16* to, Vector<L> value) {
  const Bits<L> bits = reinterpret_cast<Bits<L>>(value);
  const Halves<L> halves = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Halves<L>);
  std::memcpy(to, &halves, sizeof(halves));
}

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
  int shared;   // x and o advance by one while v stays, in runs of this length
  const int32_t *x, *v, *o, *r, *m, *c, *n;

  // The stage from the gradient of its output to that of its input.
  Stage transposed(bool accumulate) const {
    return {factor, target, source, accumulate, outer, columns, rows, false, 0, false, shared, o, v, x, c, n, r, m};
  }

  // Outer indices from i on, and rows from j on.
  Stage part(int i, int many, int j, int count) const {
    Stage s = *this;
    s.x += i, s.v += i, s.o += i, s.outer = many;
    s.r += j, s.m += j, s.rows = count;
    return s;
  }
};

constexpr int HEADER = 11, RECORD = 18;

// Where the features of an input or output stand in its layout.
struct Places {
  const int32_t* table;
  int64_t operator[](int64_t feature) const { return table ? table[feature] : feature; }
};

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
  Program few() const { return {data + data[10]}; }  // what single tokens go forward by
  Places inputs() const { return {data[8] ? data + data[8] : nullptr}; }
  Places outputs() const { return {data[9] ? data + data[9] : nullptr}; }
  Stage stage(int k) const {
    const int32_t* f = data + HEADER + RECORD * k;
    return {f[0], f[1], f[2], f[3] != 0, f[4], f[5], f[6], f[7] == 1, f[7] > 1 ? f[7] : 0, f[8] != 0, f[10],
            data + f[11], data + f[12], data + f[13], data + f[14], data + f[15], data + f[16], data + f[17]};
  }

  // Nothing beyond the factors is read, whatever has become of them.
  void check(at::TensorList factors) const {
    for (int k = 0; k < stages(); ++k) {
      const int32_t* f = data + HEADER + RECORD * k;
      TORCH_CHECK(f[0] < int64_t(factors.size()) && factors[f[0]].numel() >= f[9],
                  "structlin::chain: factor ", f[0], " is missing, or has fewer than ", f[9], " entries");
    }
  }
};

// Aligned scratch of a thread, kept between calls: of a tile (0), or for factors (1), for which fresh memory would take
// longer to map than they take to convert.
template <int USE = 0> float* scratch(int64_t floats) {
  thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < floats + 16) memory.resize(floats + 16);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<float*>((address + 63) & ~static_cast<uintptr_t>(63));
}

// Many tokens: vectors of tokens ------------------------------------------------------------------------------------

// MT rows of one outer index, for NV vectors of tokens out of T.
template <int L, int NV, int MT, bool UNIT, class W>
inline void register_tile(const Stage& s, int64_t T, const W* w, const float* a, float* b, int j) {
  const int32_t *m = s.m + j, *r = s.r + j, *c = s.c, *n = s.n;
  const W* row[MT];
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

// All rows of one outer index, for `length` columns of a and b, whose rows are T apart. The last vectors overlap those
// before where they do not fit.
template <int L, int NV, bool UNIT, int MT, class W>
inline void register_tiles(const Stage& s, int64_t T, int64_t length, const W* w, const float* a, float* b, int j) {
  for (; j + MT <= s.rows; j += MT)
    for (int64_t t = 0; t < length; t += L * NV) {
      const int64_t first = std::min(t, length - L * NV);
      register_tile<L, NV, MT, UNIT>(s, T, w, a + first, b + first, j);
    }
  if constexpr (MT > 8) register_tiles<L, NV, UNIT, 8>(s, T, length, w, a, b, j);
  else if constexpr (MT > 4) register_tiles<L, NV, UNIT, 4>(s, T, length, w, a, b, j);
  else if constexpr (MT > 1) register_tiles<L, NV, UNIT, MT / 2>(s, T, length, w, a, b, j);
}

template <int L, int NV, bool UNIT, class W>
inline void register_tiles(const Stage& s, int64_t T, int64_t length, const W* w, const float* a, float* b) {
  // 16 rows: two tiles of 8, not 12 and 4
  if (ROWS > 8 && s.rows % ROWS && s.rows % 8 == 0) register_tiles<L, NV, UNIT, 8>(s, T, length, w, a, b, 0);
  else register_tiles<L, NV, UNIT, ROWS>(s, T, length, w, a, b, 0);
}

template <int L, int NV, bool UNIT> void run_stage(const Stage& s, int64_t T, const float* w, const float* a, float* b) {
  for (int i = 0; i < s.outer; ++i)
    register_tiles<L, NV, UNIT>(s, T, T, w + s.v[i], a + s.x[i] * T, b + s.o[i] * T);
}

template <int L, int NV> void run_stage(const Stage& s, int64_t T, const float* w, const float* a, float* b) {
  if (s.unit) run_stage<L, NV, true>(s, T, w, a, b);
  else run_stage<L, NV, false>(s, T, w, a, b);
}

// Rows of `features` entries each into a tile of T columns; rows of the tile beyond the features are zero.
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

template <class S> using Factors = std::vector<const S*>;

template <int L, int NV, class S>
void run_tile(const Program& p, const Factors<float>& factors, const S* bias, const S* x, S* y, int64_t tokens) {
  constexpr int T = L * NV;
  float* buffer[4] = {scratch((p.in_rows() + p.out_rows() + 2 * int64_t(p.rows())) * T)};
  buffer[1] = buffer[0] + int64_t(p.in_rows()) * T;
  buffer[2] = buffer[1] + int64_t(p.out_rows()) * T;
  buffer[3] = buffer[2] + int64_t(p.rows()) * T;
  read_tile<L>(x, tokens, p.in_features(), p.in_rows(), p.inputs(), T, buffer[0]);
  for (int k = 0; k < p.stages(); ++k) {
    const Stage s = p.stage(k);
    run_stage<L, NV>(s, T, factors[s.factor], buffer[s.source], buffer[s.target]);
  }
  write_tile<L>(y, tokens, p.out_features(), p.outputs(), T, buffer[1], bias);
}

// A few tokens: vectors along the factors ---------------------------------------------------------------------------

// out[j] = sum_q w[m(j) + q] a[q], L rows at a time; there are at least L rows and columns.
template <int L, class W> void dot_rows(const Stage& s, const int32_t* m, const W* w, const float* a, float* out) {
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
template <int L, class W> void run_along(const Stage& s, int i, const W* w, const float* a, float* b) {
  for (int j = 0; j < s.rows; ++j)
    for (int d = 0; d < s.run; d += L) {
      const int first = std::min(d, s.run - L);  // the last vector overlaps the one before
      Vector<L> sum = {};
      for (int q = 0; q < s.columns; ++q)
        sum += load<L>(w + s.v[i] + s.m[j] + s.n[q] + first) * load<L>(a + s.x[i] + s.c[q] + first);
      store<L>(b + s.o[i] + s.r[j] + first, sum);
    }
}

// Vectors along outer indices that share their block of the factor: b = w a, all columns of it at a time.
template <int L, int NV, class W> void run_shared(const Stage& s, const W* w, const float* a, float* b) {
  for (int i = 0; i < s.outer; i += s.shared)
    register_tiles<L, NV, false>(s, 1, s.shared, w + s.v[i], a + s.x[i], b + s.o[i]);
}

template <class W> void run_any_shared(const Stage& s, const W* w, const float* a, float* b) {
  if (s.shared >= 2 * WIDEST) run_shared<WIDEST, 2>(s, w, a, b);
  else if (s.shared >= WIDEST) run_shared<WIDEST, 1>(s, w, a, b);
  else if (s.shared >= NARROW) run_shared<NARROW, 1>(s, w, a, b);
  else run_shared<4, 1>(s, w, a, b);
}

// The same for any number of rows and columns.
template <class W> void dot_any_rows(const Stage& s, const int32_t* m, const W* w, const float* a, float* out) {
  const int smaller = std::min(s.rows, s.columns);
  if (WIDEST >= 16 && smaller >= 16) return dot_rows<WIDEST>(s, m, w, a, out);
  if (WIDEST >= 8 && smaller >= 8) return dot_rows<std::min(WIDEST, 8)>(s, m, w, a, out);
  if (smaller >= 4) return dot_rows<4>(s, m, w, a, out);
  for (int j = 0; j < s.rows; ++j) {
    out[j] = 0.0f;
    for (int q = 0; q < s.columns; ++q) out[j] += float(w[m[j] + q]) * a[q];
  }
}

// Scratch of a row: the values of one outer index, its results, a block of the factor, and of its gradient, and where
// its rows begin.
struct Row {
  float *values, *results, *block, *sums;
  int32_t* begins;
};

int64_t row_floats(const Program& p) { return 3 * int64_t(p.widest()) + 2 * int64_t(p.block()); }

Row row_of(const Program& p, float* memory) {
  float* block = memory + 3 * int64_t(p.widest());
  return {memory, memory + p.widest(), block, block + p.block(), reinterpret_cast<int32_t*>(memory + 2 * p.widest())};
}

template <class W> void run_row(const Stage& s, const W* w, const float* a, float* b, const Row& row) {
  // Where vectors overlap, nothing can be added to what is there.
  if (s.shared >= 4 && !s.accumulates) return run_any_shared(s, w, a, b);
  if (s.run && !s.accumulates) {
    for (int i = 0; i < s.outer; i += s.run) {
      if (WIDEST >= 16 && s.run >= 16) run_along<WIDEST>(s, i, w, a, b);
      else if (WIDEST >= 8 && s.run >= 8) run_along<std::min(WIDEST, 8)>(s, i, w, a, b);
      else run_along<4>(s, i, w, a, b);
    }
    return;
  }
  for (int i = 0; i < s.outer; ++i) {
    const float* value = a + s.x[i];
    if (!s.packed) {
      for (int q = 0; q < s.columns; ++q) row.values[q] = value[s.c[q]];
      value = row.values;
    }
    if (s.unit) {
      dot_any_rows(s, s.m, w + s.v[i], value, row.results);
    } else {  // put the block in order; the outer indices that share it follow one another
      if (i == 0 || s.v[i] != s.v[i - 1])
        for (int j = 0; j < s.rows; ++j) {
          row.begins[j] = j * s.columns;
          for (int q = 0; q < s.columns; ++q) row.block[j * s.columns + q] = w[s.v[i] + s.m[j] + s.n[q]];
        }
      dot_any_rows(s, row.begins, row.block, value, row.results);
    }
    float* to = b + s.o[i];
    if (s.accumulates)
      for (int j = 0; j < s.rows; ++j) to[s.r[j]] += row.results[j];
    else
      for (int j = 0; j < s.rows; ++j) to[s.r[j]] = row.results[j];
  }
}

// By several threads where it is worth waking them: each takes some of the outer indices, or some of the rows.
template <class W>
void run_large_row(const Program& p, const Stage& s, const W* w, const float* a, float* b, const Row& row) {
  const int64_t threads = at::get_num_threads(), outer = s.outer / std::max(s.shared, 1);
  const int64_t shares = std::max<int64_t>(outer, s.rows / (2 * WIDEST));
  if (threads < 2 || shares < threads || s.run || int64_t(s.outer) * s.rows * s.columns < MANY)
    return run_row(s, w, a, b, row);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const Row own = row_of(p, scratch<2>(row_floats(p)));
    const int64_t all = outer >= threads ? outer : s.rows, runs = s.outer / outer;
    const int first = all * begin / threads, count = all * end / threads - first;
    run_row(outer >= threads ? s.part(first * runs, count * runs, 0, s.rows) : s.part(0, s.outer, first, count), w, a, b,
            own);
  });
}

template <class S> void copy_in(const S* x, int features, int rows, const Places& at, float* to) {
  if (at.table) {
    for (int f = 0; f < features; ++f) to[at.table[f]] = x[f];
    for (int f = features; f < rows; ++f) to[at.table[f]] = 0.0f;
  } else {
    std::copy(x, x + features, to);
    std::fill(to + features, to + rows, 0.0f);
  }
}

template <class S> void run_token(const Program& p, const Factors<S>& factors, const S* bias, const S* x, S* y) {
  float* buffer[4] = {scratch(p.in_rows() + p.out_rows() + 2 * p.rows() + row_floats(p))};
  buffer[1] = buffer[0] + p.in_rows();
  buffer[2] = buffer[1] + p.out_rows();
  buffer[3] = buffer[2] + p.rows();
  const Row row = row_of(p, buffer[3] + p.rows());
  copy_in(x, p.in_features(), p.in_rows(), p.inputs(), buffer[0]);
  for (int k = 0; k < p.stages(); ++k) {
    const Stage s = p.stage(k);
    run_large_row(p, s, factors[s.factor], buffer[s.source], buffer[s.target], row);
  }
  const Places at = p.outputs();
  for (int f = 0; f < p.out_features(); ++f) y[f] = buffer[1][at[f]] + (bias ? float(bias[f]) : 0.0f);
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
template <int L, int NV, class S>
void run_tile_backward(const Program& p, const Factors<float>& factors, const S* x, const S* dy, S* dx,
                       const std::vector<float*>& gradients, int64_t tokens, int T) {
  const int64_t in = int64_t(p.in_rows()) * T, out = int64_t(p.out_rows()) * T, inner = int64_t(p.rows()) * T;
  float* memory = scratch(2 * in + out + kept_rows(p) * T + 2 * inner + (p.widest() + L) * int64_t(T));
  float *input = memory, *d_input = input + in, *d_output = d_input + in, *ping = d_output + out, *pong = ping + inner;
  float* turned = pong + inner;
  std::vector<float*> outputs(p.stages());
  float* next = turned + (p.widest() + L) * int64_t(T);
  read_tile<L>(x, tokens, p.in_features(), p.in_rows(), p.inputs(), T, input);
  read_tile<L>(dy, tokens, p.out_features(), p.out_rows(), p.outputs(), T, d_output);
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
  if (dx) write_tile<L, S>(dx, tokens, p.in_features(), p.inputs(), T, d_input, nullptr);
}

// Outer indices that share a block of the factor, whose rows begin at m(j), are packed and in order, for L columns at a
// time from q on: dw += sum_i g_i a_i and da_i = w^T g_i.
template <int L, class W>
void group_backward(const Stage& s, const int32_t* m, const W* w, const float* a, const float* g, float* da,
                    bool accumulate, float* dw, int q) {
  constexpr int MT = 8;
  for (; q + L <= s.columns; q += L) {
    for (int j = 0; dw && j < s.rows; j += MT) {
      const int count = std::min(MT, s.rows - j);
      Vector<L> sum[MT] = {};
      for (int i = 0; i < s.outer; ++i) {
        const Vector<L> value = load<L>(a + s.x[i] + q);
        const float* slope = g + s.o[i];
        if (count == MT)
          for (int p = 0; p < MT; ++p) sum[p] += slope[s.r[j + p]] * value;
        else
          for (int p = 0; p < count; ++p) sum[p] += slope[s.r[j + p]] * value;
      }
      for (int p = 0; p < count; ++p) {
        float* to = dw + m[j + p] + q;
        store<L>(to, load<L>(to) + sum[p]);
      }
    }
    for (int i = 0; da && i < s.outer; i += MT) {
      const int count = std::min(MT, s.outer - i);
      Vector<L> sum[MT] = {};
      for (int j = 0; j < s.rows; ++j) {
        const Vector<L> weight = load<L>(w + m[j] + q);
        const float* slope = g + s.r[j];
        if (count == MT)
          for (int p = 0; p < MT; ++p) sum[p] += slope[s.o[i + p]] * weight;
        else
          for (int p = 0; p < count; ++p) sum[p] += slope[s.o[i + p]] * weight;
      }
      for (int p = 0; p < count; ++p) {
        float* to = da + s.x[i + p] + q;
        store<L>(to, accumulate ? load<L>(to) + sum[p] : sum[p]);
      }
    }
  }
  if constexpr (L > 4) {
    if (q < s.columns) group_backward<L / 2>(s, m, w, a, g, da, accumulate, dw, q);
  } else {
    for (; q < s.columns; ++q)
      for (int i = 0; i < s.outer; ++i) {
        float sum = accumulate && da ? da[s.x[i] + q] : 0.0f;
        for (int j = 0; j < s.rows; ++j) {
          const float slope = g[s.o[i] + s.r[j]];
          sum += slope * float(w[m[j] + q]);
          if (dw) dw[m[j] + q] += slope * a[s.x[i] + q];
        }
        if (da) da[s.x[i] + q] = sum;
      }
  }
}

// The same for a block in any order.
template <class W>
void run_group_backward(const Stage& s, const W* w, const float* a, const float* g, float* da, bool accumulate,
                        float* dw, const Row& row) {
  const auto run = [&](const auto* block, const int32_t* m, float* sums) {
    if (s.columns >= WIDEST) group_backward<WIDEST>(s, m, block, a, g, da, accumulate, sums, 0);
    else if (s.columns >= NARROW) group_backward<NARROW>(s, m, block, a, g, da, accumulate, sums, 0);
    else group_backward<4>(s, m, block, a, g, da, accumulate, sums, 0);
  };
  if (s.unit) return run(w, s.m, dw);
  for (int j = 0; j < s.rows; ++j) {
    row.begins[j] = j * s.columns;
    for (int q = 0; q < s.columns; ++q) row.block[j * s.columns + q] = w[s.m[j] + s.n[q]];
  }
  if (dw) std::fill(row.sums, row.sums + s.rows * s.columns, 0.0f);
  run(static_cast<const float*>(row.block), row.begins, dw ? row.sums : nullptr);
  for (int j = 0; dw && j < s.rows; ++j)
    for (int q = 0; q < s.columns; ++q) dw[s.m[j] + s.n[q]] += row.sums[j * s.columns + q];
}

// One token of one stage: da = w^T g and dw += g a, row by row of the factor.
template <class W>
void run_row_backward(const Stage& s, const W* w, const float* a, const float* g, float* da, bool accumulate,
                      float* dw, const Row& row) {
  for (int i = 0, next; i < s.outer; i = next) {
    for (next = i + 1; next < s.outer && s.v[next] == s.v[i]; ++next) {}
    if (s.packed && next - i >= GROUP) {
      run_group_backward(s.part(i, next - i, 0, s.rows), w + s.v[i], a, g, da, accumulate, dw ? dw + s.v[i] : nullptr, row);
      continue;
    }
    next = i + 1;
    const float* value = a + s.x[i];
    if (!s.packed) {
      for (int q = 0; q < s.columns; ++q) row.values[q] = value[s.c[q]];
      value = row.values;
    }
    float* __restrict__ sum = row.results;
    if (da) std::fill(sum, sum + s.columns, 0.0f);
    for (int j = 0; j < s.rows; ++j) {
      const float slope = g[s.o[i] + s.r[j]];
      const W* weight = w + s.v[i] + s.m[j];
      if (s.unit) {
        if (da)
          for (int q = 0; q < s.columns; ++q) sum[q] += slope * float(weight[q]);
        if (float* __restrict__ to = dw ? dw + s.v[i] + s.m[j] : nullptr)
          for (int q = 0; q < s.columns; ++q) to[q] += slope * value[q];
      } else {
        if (da)
          for (int q = 0; q < s.columns; ++q) sum[q] += slope * float(weight[s.n[q]]);
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

template <class S>
void run_token_backward(const Program& p, const Factors<S>& factors, const S* x, const S* dy, S* dx,
                        const std::vector<float*>& gradients) {
  float* input = scratch(2 * int64_t(p.in_rows()) + p.out_rows() + 2 * p.rows() + kept_rows(p) + row_floats(p));
  float *d_input = input + p.in_rows(), *d_output = d_input + p.in_rows(), *ping = d_output + p.out_rows();
  float* pong = ping + p.rows();
  const Row row = row_of(p, pong + p.rows());
  std::vector<float*> outputs(p.stages());
  float* next = row.sums + p.block();
  copy_in(x, p.in_features(), p.in_rows(), p.inputs(), input);
  copy_in(dy, p.out_features(), p.out_rows(), p.outputs(), d_output);
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
  const Places at = p.inputs();
  if (dx)
    for (int f = 0; f < p.in_features(); ++f) dx[f] = d_input[at[f]];
}

// The operators -----------------------------------------------------------------------------------------------------

template <class S> constexpr bool HALF = std::is_same_v<S, at::BFloat16>;

// Contiguous factors, as floats if these are asked for. Single tokens read them as they are (measured: half the time).
template <class W> struct Operands {
  Factors<W> pointers;
  std::vector<at::Tensor> kept;

  Operands(at::TensorList factors, bool half) {
    kept.reserve(factors.size());
    pointers.reserve(factors.size());
    for (const at::Tensor& factor : factors) kept.push_back(factor.contiguous());
    if constexpr (std::is_same_v<W, float>)
      if (half) {
        convert();
        return;
      }
    for (const at::Tensor& factor : kept) pointers.push_back(factor.const_data_ptr<W>());
  }

  void convert() {
    int64_t total = 0;
    for (const at::Tensor& factor : kept) total += factor.numel();
    float* to = scratch<1>(total);
    for (const at::Tensor& factor : kept) {
      const at::BFloat16* from = factor.const_data_ptr<at::BFloat16>();
      at::parallel_for(0, factor.numel(), 1 << 16, [&](int64_t begin, int64_t end) {
        for (int64_t e = begin; e < end; ++e) to[e] = from[e];
      });
      pointers.push_back(to);
      to += factor.numel();
    }
  }
};

// Whether all is bfloat16; else all is float32.
bool halves(const at::Tensor& x, at::TensorList factors, const char* name, const at::Tensor& other) {
  const at::ScalarType type = x.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16,
              "structlin::chain: x is ", type, "; the kernel takes Float or BFloat16");
  const auto check = [&](const at::Tensor& tensor, const auto&... what) {
    TORCH_CHECK(tensor.scalar_type() == type,
                "structlin::chain: x is ", type, ", ", what..., " is ", tensor.scalar_type(), "; all must be of one dtype");
  };
  for (size_t k = 0; k < factors.size(); ++k) check(factors[k], "factor ", k);
  if (other.defined()) check(other, name);
  return type == at::kBFloat16;
}

template <class S>
void run_chain(const Program& p, at::TensorList factors, const S* bias, const S* x, S* y, int64_t tokens) {
  const int64_t in = p.in_features(), out = p.out_features();
  if (tokens <= FEW) {
    const Operands<S> operands(factors, HALF<S>);
    for (int64_t t = 0; t < tokens; ++t) run_token(p.few(), operands.pointers, bias, x + t * in, y + t * out);
    return;
  }
  const Operands<float> operands(factors, HALF<S>);
  constexpr int T = 2 * WIDEST;
  at::parallel_for(0, (tokens + T - 1) / T, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t t = tile * T, count = std::min<int64_t>(T, tokens - t);
      const auto run = count > WIDEST   ? run_tile<WIDEST, 2, S>
                       : count > NARROW ? run_tile<WIDEST, 1, S>
                                        : run_tile<NARROW, 1, S>;
      run(p, operands.pointers, bias, x + t * in, y + t * out, count);
    }
  });
}

// out_features is there for the fake kernel in operators.py, which cannot read the program.
at::Tensor chain(const at::Tensor& x, at::TensorList factors, const std::optional<at::Tensor>& bias,
                 const at::Tensor& program, int64_t out_features) {
  const Program p{program.const_data_ptr<int32_t>()};
  TORCH_CHECK(x.dim() > 0 && x.size(-1) == p.in_features() && out_features == p.out_features(),
              "structlin::chain: the input does not fit the program");
  p.check(factors);
  const at::Tensor shift = bias.has_value() ? bias->contiguous() : at::Tensor();
  TORCH_CHECK(!shift.defined() || shift.numel() == out_features,
              "structlin::chain: bias has ", shift.numel(), " entries, not ", out_features);
  const bool half = halves(x, factors, "bias", shift);
  const at::Tensor rows = x.contiguous();
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = p.out_features();
  at::Tensor y = at::empty(sizes, x.options());
  const auto go = [&](auto zero) {
    using S = decltype(zero);
    run_chain<S>(p, factors, shift.defined() ? shift.const_data_ptr<S>() : nullptr, rows.const_data_ptr<S>(),
                 y.mutable_data_ptr<S>(), x.numel() / p.in_features());
  };
  if (half) go(at::BFloat16());
  else go(0.0f);
  return y;
}

// The gradients of the factors are added to; the sums of each thread but the first are kept apart until the end.
template <class S>
void run_chain_backward(const Program& p, at::TensorList factors, const S* x, const S* dy, S* dx, int64_t tokens,
                        at::IntArrayRef wanted, const std::vector<at::Tensor>& gradients) {
  const int64_t in = p.in_features(), out = p.out_features();
  std::vector<float*> sums(factors.size(), nullptr);
  int64_t total = 0;
  for (size_t k = 0; k < wanted.size(); ++k) {
    sums[wanted[k]] = gradients[k].mutable_data_ptr<float>();
    total += gradients[k].numel();
  }
  if (tokens <= FEW) {
    const Operands<S> operands(factors, HALF<S>);
    for (int64_t t = 0; t < tokens; ++t)
      run_token_backward(p, operands.pointers, x + t * in, dy + t * out, dx ? dx + t * in : nullptr, sums);
    return;
  }
  const Operands<float> operands(factors, HALF<S>);
  // Tiles as long as the intermediates leave room in a cache, so that sums over tokens pay.
  const int64_t floats = 2 * int64_t(p.in_rows()) + p.out_rows() + kept_rows(p) + 2 * int64_t(p.rows());
  const int L = tokens > NARROW ? WIDEST : tokens > 4 ? NARROW : 4;
  int T = tokens > L ? 2 * L : L;
  while (T < 8 * WIDEST && T < tokens && 2 * T * floats * int64_t(sizeof(float)) <= CACHE) T *= 2;
  const int64_t tiles = (tokens + T - 1) / T;
  const int64_t parts = std::min<int64_t>(at::get_num_threads(), tiles);
  const at::Tensor others = at::zeros({parts - 1, total}, at::kFloat);
  float* other = others.mutable_data_ptr<float>();
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      std::vector<float*> own = sums;
      int64_t place = (part - 1) * total;
      for (size_t k = 0; part > 0 && k < wanted.size(); place += gradients[k++].numel()) own[wanted[k]] = other + place;
      for (int64_t tile = part * tiles / parts; tile < (part + 1) * tiles / parts; ++tile) {
        const int64_t t = tile * T;
        const auto run = T >= 2 * WIDEST ? run_tile_backward<WIDEST, 2, S>
                         : L == WIDEST   ? run_tile_backward<WIDEST, 1, S>
                         : L == NARROW   ? run_tile_backward<NARROW, 1, S>
                                         : run_tile_backward<4, 1, S>;
        run(p, operands.pointers, x + t * in, dy + t * out, dx ? dx + t * in : nullptr, own,
            std::min<int64_t>(T, tokens - t), T);
      }
    }
  });
  if (parts == 1) return;
  for (size_t k = 0; k < wanted.size(); ++k) {
    const int64_t count = gradients[k].numel();
    at::parallel_for(0, count, 1 << 14, [&, to = sums[wanted[k]]](int64_t begin, int64_t end) {
      for (int64_t part = 0; part + 1 < parts; ++part)
        for (int64_t e = begin; e < end; ++e) to[e] += other[part * total + e];
    });
    other += count;
  }
}

// The gradient of x, where asked for, then those of the wanted factors, in their order.
std::vector<at::Tensor> chain_backward(const at::Tensor& dy, const at::Tensor& x, at::TensorList factors,
                                       const at::Tensor& program, bool input_gradient, at::IntArrayRef wanted) {
  const Program p{program.const_data_ptr<int32_t>()};
  const bool half = halves(x, factors, "dy", dy);
  TORCH_CHECK(x.size(-1) == p.in_features() && dy.size(-1) == p.out_features() &&
                  x.numel() / p.in_features() == dy.numel() / p.out_features(),
              "structlin::chain_backward: the tensors do not fit the program");
  p.check(factors);
  for (const int64_t k : wanted)
    TORCH_CHECK(k >= 0 && k < int64_t(factors.size()), "structlin::chain_backward: there is no factor ", k);
  const at::Tensor rows = x.contiguous(), slopes = dy.contiguous();
  std::vector<at::Tensor> result, gradients;
  if (input_gradient) result.push_back(at::empty(x.sizes(), x.options()));
  for (const int64_t k : wanted) gradients.push_back(at::zeros(factors[k].sizes(), at::kFloat));
  const auto go = [&](auto zero) {
    using S = decltype(zero);
    run_chain_backward<S>(p, factors, rows.const_data_ptr<S>(), slopes.const_data_ptr<S>(),
                          input_gradient ? result[0].mutable_data_ptr<S>() : nullptr, x.numel() / p.in_features(),
                          wanted, gradients);
  };
  if (half) go(at::BFloat16());
  else go(0.0f);
  for (const at::Tensor& gradient : gradients) result.push_back(half ? gradient.to(at::kBFloat16) : gradient);
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(structlin, library) {
  library.def("chain(Tensor x, Tensor[] factors, Tensor? bias, Tensor program, int out_features) -> Tensor");
  library.def(
      "chain_backward(Tensor dy, Tensor x, Tensor[] factors, Tensor program, bool input_gradient, int[] wanted) -> "
      "Tensor[]");
  library.def(  // in operators.py
      "chain_differentiable_backward(Tensor dy, Tensor x, Tensor[] factors, Tensor program, bool input_gradient, "
      "int[] wanted) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(structlin, CPU, library) {
  library.impl("chain", chain);
  library.impl("chain_backward", chain_backward);
}
