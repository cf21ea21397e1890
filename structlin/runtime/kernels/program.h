// Programs as structlin/kernels/program.py writes them, and memory to run them in.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace {

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

constexpr int64_t MANY = 1 << 21;  // multiplications that are worth waking threads

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

  // Of how many tokens each of several threads takes its share: all of them where they are not worth waking threads.
  int64_t share(int64_t tokens) const {
    int64_t multiplications = 0;
    for (int k = 0; k < stages(); ++k) {
      const int32_t* f = data + HEADER + RECORD * k;
      multiplications += int64_t(f[4]) * f[5] * f[6];
    }
    const int64_t threads = tokens * multiplications < MANY ? 1 : at::get_num_threads();
    return (tokens + threads - 1) / threads;
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

template <class S> using Factors = std::vector<const S*>;

// Rows of the output of each stage but the last ones of the equations, which go to y.
int64_t kept_rows(const Program& p) {
  int64_t rows = 0;
  for (int k = 0; k < p.stages(); ++k)
    if (p.stage(k).target != 1) rows += p.rows();
  return rows;
}

}  // namespace
