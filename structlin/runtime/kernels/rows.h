// A few tokens: one at a time, with vectors along the factors.

#pragma once

#include <algorithm>

#include "tiles.h"

namespace {

constexpr int GROUP = 4;  // outer indices from which on sharing a pass over their block of the factor pays

// out[j] = sum_q w[begins(j) + q] a[q], L rows at a time, for at least L rows and columns. Each row sums into its own
// vector; the last vector of a row overlaps the one before, with zeros in place of what was counted there: of both, as
// zero times infinity is not zero. P: a pointer to entries, or what reads as one.
template <int L, class P> void dot_rows(const Stage& s, const int32_t* begins, P w, const float* a, float* out) {
  const int rest = s.columns % L;
  float last[L] = {};
  Bits<L> fresh = {};
  for (int q = L - rest; q < L; ++q) last[q] = a[s.columns - L + q], fresh[q] = ~0u;
  const Vector<L> tail = load<L>(last);
  for (int j = 0; j < s.rows; j += L) {
    const int first = std::min(j, s.rows - L);
    Vector<L> sum[L] = {};
    for (int q = 0; q + L <= s.columns; q += L) {
      const Vector<L> value = load<L>(a + q);
      for (int p = 0; p < L; ++p) sum[p] += load<L>(w + begins[first + p] + q) * value;
    }
    if (rest)
      for (int p = 0; p < L; ++p) {
        const Vector<L> entries = load<L>(w + begins[first + p] + (s.columns - L));
        sum[p] += reinterpret_cast<Vector<L>>(reinterpret_cast<Bits<L>>(entries) & fresh) * tail;
      }
    store<L>(out + first, sums<L>(sum));
  }
}

// Runs L outer indices from i on as lanes of a vector; each has its own block of the factor: b = sum_q w a.
template <int L, class W> void run_along(const Stage& s, int i, const W* w, const float* a, float* b) {
  for (int j = 0; j < s.rows; ++j)
    for (int d = 0; d < s.run; d += L) {
      const int first = std::min(d, s.run - L);  // the last vector overlaps the one before
      Vector<L> sum = {};
      for (int q = 0; q < s.columns; ++q)
        sum += load<L>(w + s.w_outer[i] + s.w_row[j] + s.w_column[q] + first) *
               load<L>(a + s.a_outer[i] + s.a_column[q] + first);
      store<L>(b + s.b_outer[i] + s.b_row[j] + first, sum);
    }
}

// Runs outer indices that share a block of the factor as columns of a small matrix product: b = w a. A tile's kernel
// does this, with outer indices in place of tokens.
template <int L, int NV, class W> void run_shared(const Stage& s, const W* w, const float* a, float* b) {
  for (int i = 0; i < s.outer; i += s.shared)
    register_tiles<L, NV, TABLES>(s, 1, s.shared, w + s.w_outer[i], a + s.a_outer[i], b + s.b_outer[i]);
}

template <class W> void run_any_shared(const Stage& s, const W* w, const float* a, float* b) {
  if (s.shared >= 2 * WIDEST) run_shared<WIDEST, 2>(s, w, a, b);
  else if (s.shared >= WIDEST) run_shared<WIDEST, 1>(s, w, a, b);
  else if (s.shared >= NARROW) run_shared<NARROW, 1>(s, w, a, b);
  else run_shared<4, 1>(s, w, a, b);
}

// `dot_rows` for any number of rows and columns.
template <class P> void dot_any_rows(const Stage& s, const int32_t* begins, P w, const float* a, float* out) {
  const int smaller = std::min(s.rows, s.columns);
  if (WIDEST >= 16 && smaller >= 16) return dot_rows<WIDEST>(s, begins, w, a, out);
  if (WIDEST >= 8 && smaller >= 8) return dot_rows<std::min(WIDEST, 8)>(s, begins, w, a, out);
  if (smaller >= 4) return dot_rows<4>(s, begins, w, a, out);
  for (int j = 0; j < s.rows; ++j) {
    out[j] = 0.0f;
    for (int q = 0; q < s.columns; ++q) out[j] += float(w[begins[j] + q]) * a[q];
  }
}

// Scratch of one outer index: its values and results, its block of the factor gathered into order, the gradient of that
// block, and where the block's rows begin.
struct Row {
  float *values, *results, *block, *sums;
  int32_t* begins;
};

constexpr int64_t ROW_PARTS = 5;

int64_t row_floats(const Program& p) { return 3 * int64_t(p.widest()) + 2 * int64_t(p.block()); }

// `more`: entries behind the results.
Row row_of(const Program& p, Scratch& memory, int more = 0) {
  float *values = memory.take(p.widest()), *results = memory.take(p.widest() + more), *begins = memory.take(p.widest());
  float *block = memory.take(p.block()), *sums = memory.take(p.block());
  return {values, results, block, sums, reinterpret_cast<int32_t*>(begins)};
}

// Runs a stage for one token.
template <class W> void run_row(const Stage& s, const W* w, const float* a, float* b, const Row& row) {
  // Overlapping vectors write some results twice, so they must not accumulate.
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
    const float* value = a + s.a_outer[i];
    if (!s.packed) {
      for (int q = 0; q < s.columns; ++q) row.values[q] = value[s.a_column[q]];
      value = row.values;
    }
    if (s.unit) {
      dot_any_rows(s, s.w_row, w + s.w_outer[i], value, row.results);
    } else {  // gather the block into order, once for all neighbouring outer indices that share it
      if (i == 0 || s.w_outer[i] != s.w_outer[i - 1])
        for (int j = 0; j < s.rows; ++j) {
          row.begins[j] = j * s.columns;
          for (int q = 0; q < s.columns; ++q)
            row.block[j * s.columns + q] = w[s.w_outer[i] + s.w_row[j] + s.w_column[q]];
        }
      dot_any_rows(s, row.begins, row.block, value, row.results);
    }
    float* to = b + s.b_outer[i];
    if (s.accumulates)
      for (int j = 0; j < s.rows; ++j) to[s.b_row[j]] += row.results[j];
    else
      for (int j = 0; j < s.rows; ++j) to[s.b_row[j]] = row.results[j];
  }
}

// Runs a large stage for one token on several threads: run(part) for each thread's share of the outer indices (whole runs
// of those that share a block), or of the rows. Returns false, and runs nothing, where one thread is faster.
template <class F> bool shared_out(const Stage& s, const F& run) {
  const int64_t threads = lib::get_num_threads(), outer = s.outer / std::max(s.shared, 1);
  const int64_t shares = std::max<int64_t>(outer, s.rows / (2 * WIDEST));
  if (threads < 2 || shares < threads || s.run || int64_t(s.outer) * s.rows * s.columns < MANY) return false;
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const int64_t all = outer >= threads ? outer : s.rows, runs = s.outer / outer;
    const int first = all * begin / threads, count = all * end / threads - first;
    run(outer >= threads ? s.part(first * runs, count * runs, 0, s.rows) : s.part(0, s.outer, first, count));
  });
  return true;
}

// Copies a token into its layout and pads it with zeros.
template <class S> void copy_in(const S* x, int features, int rows, const Places& at, float* to) {
  if (at.table) {
    for (int f = 0; f < features; ++f) to[at.table[f]] = x[f];
    for (int f = features; f < rows; ++f) to[at.table[f]] = 0.0f;
  } else {
    std::copy(x, x + features, to);
    std::fill(to + features, to + rows, 0.0f);
  }
}

// Runs all stages and the bias for one token, each by run(stage, its input, its output, scratch); buffers as in run_tile.
template <class S, class F> void run_token_by(const Program& p, const S* bias, const S* x, S* y, const F& run) {
  const int64_t floats = int64_t(p.in_rows()) + p.out_rows() + 2 * int64_t(p.rows()) + row_floats(p);
  Scratch memory = scratch(floats, 4 + ROW_PARTS);
  float* const buffer[4] = {memory.take(p.in_rows()), memory.take(p.out_rows()), memory.take(p.rows()),
                            memory.take(p.rows())};
  const Row row = row_of(p, memory);
  copy_in(x, p.in_features(), p.in_rows(), p.inputs(), buffer[0]);
  for (int k = 0; k < p.stages(); ++k) {
    const Stage s = p.stage(k);
    run(s, buffer[s.source], buffer[s.target], row);
  }
  const Places at = p.outputs();
  for (int f = 0; f < p.out_features(); ++f) y[f] = buffer[1][at[f]] + (bias ? float(bias[f]) : 0.0f);
}

template <class S> void run_token(const Program& p, const Factors<S>& factors, const S* bias, const S* x, S* y) {
  run_token_by(p, bias, x, y, [&](const Stage& s, const float* a, float* b, const Row& row) {
    const S* w = factors[s.factor];
    const bool done = shared_out(s, [&](const Stage& part) {
      Scratch memory = scratch<2>(row_floats(p), ROW_PARTS);
      run_row(part, w, a, b, row_of(p, memory));
    });
    if (!done) run_row(s, w, a, b, row);
  });
}

// Backward --------------------------------------------------------------------------------------------------------------

// sum[p] = sum_k scale(p, k) value(k), for p below a count of at most MT.
template <int L, int MT, class Value, class Scale>
inline void sums_of(int count, int terms, const Value& value, const Scale& scale, Vector<L>* sum) {
  for (int p = 0; p < MT; ++p) sum[p] = Vector<L>{};
  for (int k = 0; k < terms; ++k) {
    const Vector<L> vector = value(k);
    if (count == MT)
      for (int p = 0; p < MT; ++p) sum[p] += scale(p, k) * vector;
    else
      for (int p = 0; p < count; ++p) sum[p] += scale(p, k) * vector;
  }
}

// Gradients of the outer indices that share a block of the factor, L columns at a time from q on: dw += sum_i g_i a_i and
// da_i = w^T g_i. The block's rows begin at begins(j); they and the columns of a are contiguous.
template <int L, class W>
void group_backward(const Stage& s, const int32_t* begins, const W* w, const float* a, const float* g, float* da,
                    bool accumulate, float* dw, int q) {
  constexpr int MT = 8;
  Vector<L> sum[MT];
  for (; q + L <= s.columns; q += L) {
    for (int j = 0; dw && j < s.rows; j += MT) {
      const int count = std::min(MT, s.rows - j);
      sums_of<L, MT>(
          count, s.outer, [&](int i) { return load<L>(a + s.a_outer[i] + q); },
          [&](int p, int i) { return g[s.b_outer[i] + s.b_row[j + p]]; }, sum);
      for (int p = 0; p < count; ++p) {
        float* to = dw + begins[j + p] + q;
        store<L>(to, load<L>(to) + sum[p]);
      }
    }
    for (int i = 0; da && i < s.outer; i += MT) {
      const int count = std::min(MT, s.outer - i);
      sums_of<L, MT>(
          count, s.rows, [&](int j) { return load<L>(w + begins[j] + q); },
          [&](int p, int j) { return g[s.b_outer[i + p] + s.b_row[j]]; }, sum);
      for (int p = 0; p < count; ++p) {
        float* to = da + s.a_outer[i + p] + q;
        store<L>(to, accumulate ? load<L>(to) + sum[p] : sum[p]);
      }
    }
  }
  if constexpr (L > 4) {
    if (q < s.columns) group_backward<L / 2>(s, begins, w, a, g, da, accumulate, dw, q);
  } else {
    for (; q < s.columns; ++q)
      for (int i = 0; i < s.outer; ++i) {
        float sum = accumulate && da ? da[s.a_outer[i] + q] : 0.0f;
        for (int j = 0; j < s.rows; ++j) {
          const float gradient = g[s.b_outer[i] + s.b_row[j]];
          sum += gradient * float(w[begins[j] + q]);
          if (dw) dw[begins[j] + q] += gradient * a[s.a_outer[i] + q];
        }
        if (da) da[s.a_outer[i] + q] = sum;
      }
  }
}

// `group_backward` for a block in any order.
template <class W>
void run_group_backward(const Stage& s, const W* w, const float* a, const float* g, float* da, bool accumulate,
                        float* dw, const Row& row) {
  const auto run = [&](const auto* block, const int32_t* begins, float* sums) {
    if (s.columns >= WIDEST) group_backward<WIDEST>(s, begins, block, a, g, da, accumulate, sums, 0);
    else if (s.columns >= NARROW) group_backward<NARROW>(s, begins, block, a, g, da, accumulate, sums, 0);
    else group_backward<4>(s, begins, block, a, g, da, accumulate, sums, 0);
  };
  if (s.unit) return run(w, s.w_row, dw);
  for (int j = 0; j < s.rows; ++j) {
    row.begins[j] = j * s.columns;
    for (int q = 0; q < s.columns; ++q) row.block[j * s.columns + q] = w[s.w_row[j] + s.w_column[q]];
  }
  if (dw) std::fill(row.sums, row.sums + s.rows * s.columns, 0.0f);
  run(static_cast<const float*>(row.block), row.begins, dw ? row.sums : nullptr);
  for (int j = 0; dw && j < s.rows; ++j)
    for (int q = 0; q < s.columns; ++q) dw[s.w_row[j] + s.w_column[q]] += row.sums[j * s.columns + q];
}

// Gradients of a stage for one token, row by row of the factor: da = w^T g and dw += g a. `accumulate`: da +=.
template <class W>
void run_row_backward(const Stage& s, const W* w, const float* a, const float* g, float* da, bool accumulate,
                      float* dw, const Row& row) {
  for (int i = 0, next; i < s.outer; i = next) {
    for (next = i + 1; next < s.outer && s.w_outer[next] == s.w_outer[i]; ++next) {}
    if (s.packed && next - i >= GROUP) {
      run_group_backward(s.part(i, next - i, 0, s.rows), w + s.w_outer[i], a, g, da, accumulate,
                         dw ? dw + s.w_outer[i] : nullptr, row);
      continue;
    }
    next = i + 1;
    const float* value = a + s.a_outer[i];
    if (!s.packed) {
      for (int q = 0; q < s.columns; ++q) row.values[q] = value[s.a_column[q]];
      value = row.values;
    }
    float* __restrict__ sum = row.results;
    if (da) std::fill(sum, sum + s.columns, 0.0f);
    for (int j = 0; j < s.rows; ++j) {
      const float gradient = g[s.b_outer[i] + s.b_row[j]];
      const W* weight = w + s.w_outer[i] + s.w_row[j];
      if (s.unit) {
        if (da)
          for (int q = 0; q < s.columns; ++q) sum[q] += gradient * float(weight[q]);
        if (float* __restrict__ to = dw ? dw + s.w_outer[i] + s.w_row[j] : nullptr)
          for (int q = 0; q < s.columns; ++q) to[q] += gradient * value[q];
      } else {
        if (da)
          for (int q = 0; q < s.columns; ++q) sum[q] += gradient * float(weight[s.w_column[q]]);
        if (dw)
          for (int q = 0; q < s.columns; ++q) dw[s.w_outer[i] + s.w_row[j] + s.w_column[q]] += gradient * value[q];
      }
    }
    if (!da) continue;
    float* to = da + s.a_outer[i];
    if (accumulate)
      for (int q = 0; q < s.columns; ++q) to[s.a_column[q]] += sum[q];
    else
      for (int q = 0; q < s.columns; ++q) to[s.a_column[q]] = sum[q];
  }
}

// Adds the gradients of one token, as run_tile_backward does for a tile.
template <class S>
void run_token_backward(const Program& p, const Factors<S>& factors, const S* x, const S* dy, S* dx,
                        const std::vector<float*>& gradients) {
  const int64_t floats = 2 * int64_t(p.in_rows()) + p.out_rows() + 2 * int64_t(p.rows()) + kept_rows(p) + row_floats(p);
  Scratch memory = scratch(floats, 5 + ROW_PARTS + p.stages());
  float *input = memory.take(p.in_rows()), *d_input = memory.take(p.in_rows()), *d_output = memory.take(p.out_rows());
  float *ping = memory.take(p.rows()), *pong = memory.take(p.rows());
  const Row row = row_of(p, memory);
  std::vector<float*> outputs(p.stages());
  copy_in(x, p.in_features(), p.in_rows(), p.inputs(), input);
  copy_in(dy, p.out_features(), p.out_rows(), p.outputs(), d_output);
  for (int k = 0; k < p.stages(); ++k) {
    const Stage s = p.stage(k);
    if (s.target == 1) continue;
    outputs[k] = memory.take(p.rows());
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

}  // namespace
