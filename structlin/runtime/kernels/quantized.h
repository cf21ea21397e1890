// Chains whose factors are codes: integer dot products for a few tokens, decoded blocks where those do not pay.

#pragma once

#include <algorithm>
#include <vector>

#include "integers.h"
#include "rows.h"
#include "tiles.h"

namespace {

constexpr int BLOCK = 8192;          // floats of a decoded block: it stays in the first cache
constexpr int TILE_COLUMNS = 512;    // columns of a block that is decoded for a tile, at most: even
constexpr int SHARED_COLUMNS = 512;  // sums from this length on are faster as integers than along shared outer indices
constexpr int INTEGER_COLUMNS = 128;  // sums from this length on are faster as integers than code by code as floats

// Scratch of one stage: activations and results of an outer index, the levels of the activations, a decoded block with
// the offsets of its rows, and the block's offset for each outer index: 0.
struct Work {
  Row row;
  uint8_t *high, *low, *bytes;
  Run* runs;
  float* block;
  int32_t *begins, *zeros;
};

constexpr int64_t WORK_PARTS = ROW_PARTS + 7;

// Rows of a factor with so many columns that are decoded at a time: for one token, and for a tile, whose activations
// need the first cache, too.
int block_rows(int columns) { return std::max(BLOCK / columns, ROWS); }
int tile_rows(int columns) { return std::max(BLOCK / 2 / columns / ROWS, 1) * ROWS; }

struct WorkSizes {
  int64_t widest, outer;
  explicit WorkSizes(const Program& p) : widest(p.widest()), outer(1) {
    for (int k = 0; k < p.stages(); ++k) outer = std::max<int64_t>(outer, p.record(k).outer);
  }
  int64_t halves() const { return widest / 4 + 1; }
  int64_t bytes() const { return widest / 2 + 8 * WIDEST; }
  int64_t runs() const { return widest / 4 + 8; }
  int64_t block() const { return std::max<int64_t>(BLOCK, ROWS * widest); }
  int64_t begins() const { return std::max(BLOCK, ROWS); }
  int64_t floats(const Program& p) const {
    return row_floats(p) + WIDEST + 2 * halves() + bytes() + runs() + block() + begins() + outer;
  }
};

Work work_of(const Program& p) {
  const WorkSizes sizes(p);
  Scratch memory = scratch<3>(sizes.floats(p), WORK_PARTS);
  const auto bytes = [&](int64_t floats) { return reinterpret_cast<uint8_t*>(memory.take(floats)); };
  Work work;
  work.bytes = bytes(sizes.bytes());
  work.row = row_of(p, memory, WIDEST);
  work.high = bytes(sizes.halves()), work.low = bytes(sizes.halves());
  work.runs = reinterpret_cast<Run*>(bytes(sizes.runs()));
  work.block = memory.take(sizes.block());
  work.begins = reinterpret_cast<int32_t*>(bytes(sizes.begins()));
  work.zeros = reinterpret_cast<int32_t*>(bytes(sizes.outer));
  return work;
}

// The row of its factor's matrix with which a stage, or a part of one, begins for outer index i.
int64_t first_row(const Stage& s, const Codes& w, int i) { return (int64_t(s.w_outer[i]) + s.w_row[0]) / w.columns; }

// Decodes the blocks of a stage, at most `most` rows and `width` columns at a time, and runs each for all neighbouring
// outer indices that share it: run(part of the stage, floats that it takes for the factor).
template <class F>
void run_decoded(const Stage& s, const Codes& w, const Work& work, int most, int width, const F& run) {
  for (int i = 0, next; i < s.outer; i = next) {
    for (next = i + 1; next < s.outer && s.w_outer[next] == s.w_outer[i]; ++next) {}
    std::fill_n(work.zeros, next - i, 0);
    for (int j = 0; j < s.rows; j += most) {
      const int count = std::min(most, s.rows - j);
      const int64_t r = first_row(s, w, i) + j;
      Stage part = s.part(i, next - i, j, count);
      part.w_outer = work.zeros, part.w_row = work.begins;
      for (int q = 0; q < s.columns; q += width) {
        part.columns = std::min(width, s.columns - q), part.a_column = s.a_column + q;
        part.accumulates = s.accumulates || q > 0;
        for (int k = 0; k < count; ++k) work.begins[k] = k * part.columns;
        w.decode(r, count, q, q + part.columns, work.block);
        const int after = q + width < s.columns ? q + width : 0, last = std::min(after + width, s.columns);
        if (after) w.prefetch(r, count, after, last);
        else w.prefetch(r + count, std::min(most, s.rows - j - count), 0, last);
        run(part, work.block);
      }
    }
  }
}

// Runs a stage for one token: products(outer index, its values in order) writes to work.row.results.
template <class F> void run_products(const Stage& s, const float* a, float* b, const Work& work, const F& products) {
  for (int i = 0; i < s.outer; ++i) {
    const float* value = a + s.a_outer[i];
    if (!s.packed) {
      for (int q = 0; q < s.columns; ++q) work.row.values[q] = value[s.a_column[q]];
      value = work.row.values;
    }
    products(i, value);
    const float* result = work.row.results;
    float* to = b + s.b_outer[i];
    if (s.accumulates)
      for (int j = 0; j < s.rows; ++j) to[s.b_row[j]] += result[j];
    else
      for (int j = 0; j < s.rows; ++j) to[s.b_row[j]] = result[j];
  }
}

// Runs a stage for one token by integer dot products.
template <int L, int BITS>
void run_integers(const Stage& s, const Codes& w, const float* a, float* b, const Work& work) {
  run_products(s, a, b, work, [&](int i, const float* value) {
    const Levels levels = levels_of<L, BITS>(w, value, work.high, work.low, work.bytes, work.runs);
    dot_rows<L, BITS>(w, first_row(s, w, i), s.rows, levels, work.row.results);
  });
}

// Runs a stage for one token with codes that become floats on their way: for short rows of one scale each.
template <int BITS> void run_entries(const Stage& s, const Codes& w, const float* a, float* b, const Work& work) {
  run_products(s, a, b, work, [&](int i, const float* value) {
    dot_any_rows(s, s.w_row, Entries<BITS>{w.data} + s.w_outer[i], value, work.row.results);
    w.scale_rows(first_row(s, w, i), s.rows, work.row.results);
  });
}

template <int BITS>
void run_any_integers(int lanes, const Stage& s, const Codes& w, const float* a, float* b, const Work& work) {
  if (WIDEST >= 16 && lanes == 16) run_integers<WIDEST, BITS>(s, w, a, b, work);
  else if (WIDEST >= 8 && lanes == 8) run_integers<std::min(WIDEST, 8), BITS>(s, w, a, b, work);
  else run_integers<4, BITS>(s, w, a, b, work);
}

// Runs a stage for one token.
void run_codes(const Program& p, const Stage& s, const Codes& w, const float* a, float* b) {
  const Work work = work_of(p);
  const bool again = s.outer > 1 && s.w_outer[1] == s.w_outer[0];  // outer indices share a block: decode it once
  const int lanes = again && s.columns < SHARED_COLUMNS ? 0 : lanes_of(w);
  if (!again && s.columns < INTEGER_COLUMNS && w.one_by_one()) {
    if (w.bits == 8) run_entries<8>(s, w, a, b, work);
    else run_entries<4>(s, w, a, b, work);
  } else if (lanes && w.bits == 8) run_any_integers<8>(lanes, s, w, a, b, work);
  else if (lanes) run_any_integers<4>(lanes, s, w, a, b, work);
  else
    run_decoded(s, w, work, block_rows(s.columns), s.columns,
                [&](const Stage& part, const float* block) { run_row(part, block, a, b, work.row); });
}

// Runs all stages and the bias for one token; buffers as in run_tile.
template <class S>
void run_codes_token(const Program& p, const std::vector<Codes>& factors, const S* bias, const S* x, S* y) {
  run_token_by(p, bias, x, y, [&](const Stage& s, const float* a, float* b, const Row&) {
    if (!shared_out(s, [&](const Stage& part) { run_codes(p, part, factors[s.factor], a, b); }))
      run_codes(p, s, factors[s.factor], a, b);
  });
}

// Runs all stages on one tile of L * NV * PARTS tokens; each block of a factor is decoded once.
template <int L, int NV, int PARTS, class S>
void run_codes_tile(const Program& p, const std::vector<Codes>& factors, const S* bias, const S* x, S* y,
                    int64_t tokens) {
  constexpr int T = L * NV * PARTS;
  const Work work = work_of(p);
  run_tile_by<L, T>(p, bias, x, y, tokens, [&](const Stage& s, const float* a, float* b) {
    run_decoded(s, factors[s.factor], work, tile_rows(s.columns), TILE_COLUMNS,
                [&](const Stage& part, const float* block) { run_stage<L, NV, UNIT>(part, T, block, a, b); });
  });
}

}  // namespace
