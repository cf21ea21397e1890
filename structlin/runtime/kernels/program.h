// Programs as program.py writes them, and the scratch memory to run them in.

#pragma once

#include <cstdint>
#include <vector>

#include "guards.h"
#include "tensors.h"

namespace {

// The integers of a program, in the order of `Header` and `Record` in program.py (a test compares the names). Offsets
// of tables and programs count from the beginning of the program.
struct Header {
  int32_t stages, in_features, out_features, in_rows, out_rows, rows, widest, block, inputs, outputs, few, few_tokens;
};
struct Record {
  int32_t factor, source, target, accumulates, outer, rows, columns, order, packed, entries, shared, a_outer, w_outer,
      b_outer, b_row, w_row, a_column, w_column;
};

// One factor absorbed: for outer indices i and rows j, sums over columns q,
//   b[b_outer(i) + b_row(j)] += sum_q w[w_outer(i) + w_row(j) + w_column(q)] a[a_outer(i) + a_column(q)].
struct Stage {
  int factor, source, target;  // of w, a and b; buffer 0 is x, 1 is y, 2 and 3 take turns in between
  bool accumulates;            // else b is overwritten
  int outer, rows, columns;
  bool unit;    // w_column(q) = q: a row of the factor is contiguous
  int run;      // all outer offsets advance by one in runs of this length; 0: they do not
  bool packed;  // a_column(q) = q
  int shared;   // a_outer and b_outer advance by one while w_outer stays, in runs of this length
  const int32_t *a_outer, *w_outer, *b_outer, *b_row, *w_row, *a_column, *w_column;

  // The stage that maps the gradient of b to that of a, by the transposed blocks of w.
  Stage transposed(bool accumulate) const {
    return {.factor = factor, .source = target, .target = source, .accumulates = accumulate, .outer = outer,
            .rows = columns, .columns = rows, .unit = false, .run = 0, .packed = false, .shared = shared,
            .a_outer = b_outer, .w_outer = w_outer, .b_outer = a_outer, .b_row = a_column, .w_row = w_column,
            .a_column = b_row, .w_column = w_row};
  }

  // The part with outer indices i to i + many and rows j to j + count.
  Stage part(int i, int many, int j, int count) const {
    Stage s = *this;
    s.a_outer += i, s.w_outer += i, s.b_outer += i, s.outer = many;
    s.b_row += j, s.w_row += j, s.rows = count;
    return s;
  }
};

constexpr int64_t MANY = 1 << 21;  // multiplications from which on waking threads pays

// Maps the features of an input or output to their places in its layout; no table: they stay where they are.
struct Places {
  const int32_t* table;
  int64_t operator[](int64_t feature) const { return table ? table[feature] : feature; }
};

struct Program {
  const int32_t* data;
  const Header& header() const { return *reinterpret_cast<const Header*>(data); }
  const Record& record(int k) const { return reinterpret_cast<const Record*>(data + sizeof(Header) / 4)[k]; }
  int stages() const { return header().stages; }
  int in_features() const { return header().in_features; }
  int out_features() const { return header().out_features; }
  int in_rows() const { return header().in_rows; }        // features of x, padded
  int out_rows() const { return header().out_rows; }      // features of y, padded
  int rows() const { return header().rows; }              // features of the largest intermediate
  int widest() const { return header().widest; }          // most rows or columns of a stage
  int block() const { return header().block; }            // largest block of a factor that is not `unit`
  int few_tokens() const { return header().few_tokens; }  // up to this many tokens go one by one
  Program few() const { return {data + header().few}; }   // the program of single tokens' forward pass
  Places inputs() const { return {header().inputs ? data + header().inputs : nullptr}; }
  Places outputs() const { return {header().outputs ? data + header().outputs : nullptr}; }
  Stage stage(int k) const {
    const Record& r = record(k);
    return {r.factor, r.source, r.target, r.accumulates != 0, r.outer, r.rows, r.columns, r.order == 1,
            r.order > 1 ? r.order : 0, r.packed != 0, r.shared, data + r.a_outer, data + r.w_outer, data + r.b_outer,
            data + r.b_row, data + r.w_row, data + r.a_column, data + r.w_column};
  }

  // Tokens for each of several threads; all of them where the work does not pay for waking threads.
  int64_t share(int64_t tokens) const {
    int64_t multiplications = 0;
    for (int k = 0; k < stages(); ++k) {
      const Record& r = record(k);
      multiplications += int64_t(r.outer) * r.rows * r.columns;
    }
    const int64_t threads = tokens * multiplications < MANY ? 1 : lib::get_num_threads();
    return (tokens + threads - 1) / threads;
  }

  // Refuses factors of another size than the offsets cover: a parameter's `.data` may have been replaced since the
  // program was written. No read may leave a factor, and a larger one would be read in the wrong order.
  void check(TensorList factors) const {
    for (int k = 0; k < stages(); ++k) {
      const Record& r = record(k);
      REQUIRE(r.factor < int64_t(factors.size()) && factors[r.factor].numel() == r.entries,
                  "structlin::chain: factor ", r.factor, " is missing, or has not ", r.entries, " entries");
    }
  }
};

// Aligned scratch memory, taken part by part.
struct Scratch {
  float* next;

  float* take(int64_t floats) {
    float* part = next;
    // A guarded part begins at a multiple of 64 bytes: a sanitizer knows what is poisoned by groups of 8.
    next += GUARD ? (floats + 2 * GUARD - 1) / GUARD * GUARD : floats;
    unpoison(part, floats);
    return part;
  }
};

// Returns the scratch memory of a thread, kept between calls, for so many floats in at most so many parts. Each USE has
// its own: a tile (0), converted factors (1; fresh memory would take longer to map than they take to convert), a share of
// a row (2, inside of a parallel region that reads 0).
template <int USE = 0> Scratch scratch(int64_t floats, int64_t parts) {
  thread_local std::vector<float> memory;
  const int64_t size = floats + 16 + 2 * GUARD * parts;
  unpoison(memory.data(), memory.size());
  if (static_cast<int64_t>(memory.size()) < size) memory.resize(size);
  poison(memory.data(), memory.size());
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  return {reinterpret_cast<float*>((address + 63) & ~static_cast<uintptr_t>(63))};
}

template <class S> using Factors = std::vector<const S*>;

// Rows of all intermediates, which a backward pass keeps: the outputs of all stages that do not write to y.
int64_t kept_rows(const Program& p) {
  int64_t rows = 0;
  for (int k = 0; k < p.stages(); ++k)
    if (p.stage(k).target != 1) rows += p.rows();
  return rows;
}

}  // namespace
