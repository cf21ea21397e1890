// Factors as codes: read one by one as floats, and integer dot products of their rows with activations, for one token.
//
// The codes of a factor are integers of 8 or 4 bits. Activations become integers of 16 bits, one scale for all of a sum:
// v = 256 high + low, each half a signed byte. Two dot products of bytes then give the sum as exactly as float32 needs
// it: an entry is off by at most max |a| / 65024.

#pragma once

#include <algorithm>
#include <cmath>

#include "vectors.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_MATMUL_INT8)
#include <arm_neon.h>
#endif

namespace {

// L lanes of 32 bits; as Pairs 2 L of 16, as Bytes 4 L of 8. Signs: L of 8; as Twos L / 2 of 16.
template <int L> struct IntegerLanes;
template <> struct IntegerLanes<4> {
  typedef int32_t Ints __attribute__((vector_size(16)));
  typedef int16_t Pairs __attribute__((vector_size(16)));
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  typedef int8_t Signs __attribute__((vector_size(4)));
  typedef uint16_t Twos __attribute__((vector_size(4)));
};
template <> struct IntegerLanes<8> {
  typedef int32_t Ints __attribute__((vector_size(32)));
  typedef int16_t Pairs __attribute__((vector_size(32)));
  typedef uint8_t Bytes __attribute__((vector_size(32)));
  typedef int8_t Signs __attribute__((vector_size(8)));
  typedef uint16_t Twos __attribute__((vector_size(8)));
};
template <> struct IntegerLanes<16> {
  typedef int32_t Ints __attribute__((vector_size(64)));
  typedef int16_t Pairs __attribute__((vector_size(64)));
  typedef uint8_t Bytes __attribute__((vector_size(64)));
  typedef int8_t Signs __attribute__((vector_size(16)));
  typedef uint16_t Twos __attribute__((vector_size(16)));
};
template <int L> using Ints = typename IntegerLanes<L>::Ints;
template <int L> using Pairs = typename IntegerLanes<L>::Pairs;
template <int L> using Bytes = typename IntegerLanes<L>::Bytes;
template <int L> using Signs = typename IntegerLanes<L>::Signs;
template <int L> using Twos = typename IntegerLanes<L>::Twos;

template <int L> inline Bytes<L> load_bytes(const void* from) {
  Bytes<L> value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

// Adds to each lane of `sum` the products of its four bytes: `u` unsigned, `s` signed. Vector extensions have no word
// for it; the last branch spells it out.
template <int L> inline Ints<L> dot4(Ints<L> sum, Bytes<L> u, Bytes<L> s) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  if constexpr (L == 16) return (Ints<L>)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)u, (__m512i)s);
  else if constexpr (L == 8) return (Ints<L>)_mm256_dpbusd_epi32((__m256i)sum, (__m256i)u, (__m256i)s);
  else return (Ints<L>)_mm_dpbusd_epi32((__m128i)sum, (__m128i)u, (__m128i)s);
#elif defined(__ARM_FEATURE_MATMUL_INT8)
  return (Ints<L>)vusdotq_s32((int32x4_t)sum, (uint8x16_t)u, (int8x16_t)s);
#else
  const Pairs<L> even = (Pairs<L>)u & 0xff, odd = ((Pairs<L>)u >> 8) & 0xff;
  const Pairs<L> even_s = ((Pairs<L>)s << 8) >> 8, odd_s = (Pairs<L>)s >> 8;
#if defined(__AVX512BW__)
  if constexpr (L == 16)
    return sum + (Ints<L>)_mm512_madd_epi16((__m512i)even, (__m512i)even_s) +
           (Ints<L>)_mm512_madd_epi16((__m512i)odd, (__m512i)odd_s);
#endif
#if defined(__AVX2__)
  if constexpr (L == 8)
    return sum + (Ints<L>)_mm256_madd_epi16((__m256i)even, (__m256i)even_s) +
           (Ints<L>)_mm256_madd_epi16((__m256i)odd, (__m256i)odd_s);
  if constexpr (L == 4)
    return sum + (Ints<L>)_mm_madd_epi16((__m128i)even, (__m128i)even_s) +
           (Ints<L>)_mm_madd_epi16((__m128i)odd, (__m128i)odd_s);
#endif
  const Ints<L> first = (Ints<L>)(even * even_s), second = (Ints<L>)(odd * odd_s);  // 255 * 128 fits 16 bits
  return sum + ((first << 16) >> 16) + (first >> 16) + ((second << 16) >> 16) + (second >> 16);
#endif
}

// Codes of a row as a pointer to floats, for `dot_rows` of rows.h: the scale is left out. Of 4-bit codes, from an even
// column on.
template <int BITS> struct Entries {
  const uint8_t* data;
  Entries operator+(int64_t q) const { return {data + q * BITS / 8}; }
  float operator[](int64_t q) const {
    return BITS == 8 ? float(int8_t(data[q])) : float(((data[q / 2] >> (q % 2 * 4)) & 15) - 8);
  }
};

// Compilers split the widening of bytes into pieces, so AVX has its instructions by name.
template <int L> inline Vector<L> floats_of(Signs<L> codes) {
#if defined(__AVX512F__)
  if constexpr (L == 16) return (Vector<L>)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)codes));
#endif
#if defined(__AVX2__)
  __m128i padded = {};
  std::memcpy(&padded, &codes, sizeof(codes));
  if constexpr (L == 8) return (Vector<L>)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(padded));
  if constexpr (L == 4) return (Vector<L>)_mm_cvtepi32_ps(_mm_cvtepi8_epi32(padded));
#endif
  Vector<L> value;
  for (int k = 0; k < L; ++k) value[k] = float(codes[k]);
  return value;
}

template <int L> inline Vector<L> load(Entries<8> from) {
  Signs<L> codes;
  std::memcpy(&codes, from.data, sizeof(codes));
  return floats_of<L>(codes);
}

template <int L> inline Vector<L> load(Entries<4> from) {
#if defined(__AVX512F__)
  if constexpr (L == 16) {  // a permutation reads the last 4 bits of a lane; those of the odd ones move there
    const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)from.data));
    return (Vector<L>)_mm512_permutexvar_ps(_mm512_or_si512(bytes, _mm512_slli_epi64(bytes, 28)), values);
  }
#endif
  Twos<L> pairs;  // of a byte: its low half, the even column, then its high half
#if defined(__AVX2__)
  __m128i bytes = {};
  std::memcpy(&bytes, from.data, L / 2);
  const __m128i wide = _mm_cvtepu8_epi16(bytes);
  std::memcpy(&pairs, &wide, sizeof(pairs));
#else
  for (int k = 0; k < L / 2; ++k) pairs[k] = from.data[k];
#endif
  return floats_of<L>((Signs<L>)((pairs | (pairs << 4)) & 0x0f0f) - 8);
}

// The matrix of a factor: a row for each index that the stage keeps, a column for each that it sums over.
struct Codes {
  const uint8_t* data;
  const float* scales;  // (rows / shared, groups)
  int bits;             // 32: not rounded, `data` holds floats; there are no scales
  int columns;
  int group;   // neighbouring columns that share a scale
  int shared;  // neighbouring rows that share it too

  int64_t stride() const { return (int64_t(columns) * bits + 7) / 8; }  // bytes of a row
  int groups() const { return (columns + group - 1) / group; }
  const uint8_t* row(int64_t r) const { return data + r * stride(); }
  const float* scale(int64_t r) const { return scales + (shared > 1 ? r / shared : r) * groups(); }

  // Whether `Entries` reads rows: each has one scale and begins with a byte.
  bool one_by_one() const { return bits < 32 && groups() == 1 && columns * bits % 8 == 0; }

  // Multiplies `count` sums, of the rows from r on, by the rows' scales.
  void scale_rows(int64_t r, int count, float* sums) const {
    const float* step = scale(r);
    if (shared == 1) {
      for (int j = 0; j < count; ++j) sums[j] *= step[j];
      return;
    }
    for (int j = 0, left = shared - int(r % shared); j < count; ++j) {
      sums[j] *= *step;
      if (--left == 0) ++step, left = shared;
    }
  }

  // Writes columns `first` to `last` of `count` rows from r on as floats; 4-bit codes from an even column on.
  void decode(int64_t r, int count, int first, int last, float* to) const {
    const int length = last - first;
    if (bits == 32) {
      for (; count > 0; --count, ++r, to += length)
        std::memcpy(to, row(r) + 4 * int64_t(first), 4 * int64_t(length));
    } else if (groups() == 1 && length == columns && columns * bits % 8 == 0) {
      const float* step = scale(r);
      // Rows that share a scale go as one long row; what is left of the first such rows may be fewer.
      for (int rows = shared - int(shared > 1 ? r % shared : 0); count > 0; rows = shared, ++step) {
        rows = std::min(rows, count);
        decode_run(row(r), *step, 0, rows * columns, to);
        r += rows, count -= rows, to += int64_t(rows) * columns;
      }
    } else {
      for (; count > 0; --count, ++r, to += length)
        for (int q = first, next; q < last; q = next) {
          next = std::min({(q / group + 1) * group, columns, last});
          decode_run(row(r), scale(r)[q / group], q, next, to + q - first);
        }
    }
  }

  // Asks for what will be decoded next.
  void prefetch(int64_t r, int count, int first, int last) const {
    for (; count > 0; --count, ++r)
      for (int64_t byte = int64_t(first) * bits / 8; byte < int64_t(last) * bits / 8; byte += 64)
        __builtin_prefetch(row(r) + byte);
  }

 private:
  // Writes columns `first` to `last` of a row, which share a scale.
  void decode_run(const uint8_t* from, float step, int first, int last, float* to) const {
    if (bits == 8) return decode_run(Entries<8>{from}, step, first, last, to);
    if (first % 2 && first < last) *to++ = step * Entries<4>{from}[first], ++first;
    decode_run(Entries<4>{from}, step, first, last, to);
  }

  template <int L = WIDEST, int BITS>
  static void decode_run(Entries<BITS> from, float step, int first, int last, float* to) {
    for (; first + L <= last; first += L, to += L) store<L>(to, step * load<L>(from + first));
    if constexpr (L > 4) decode_run<L / 2>(from, step, first, last, to);
    else
      for (; first < last; ++first) *to++ = step * from[first];
  }
};

// Columns whose products are summed as integers: of one scale, and few enough for 32 bits.
struct Run {
  int vectors;        // number of vectors
  int group;          // index of the scale
  int32_t high, low;  // what the sums of both halves begin with: codes are read with an offset, which is taken off here
};

// Activations of one sum as integers.
struct Levels {
  const uint8_t* bytes;  // for each vector of codes: high, low; of 4-bit codes those of even columns, then of odd ones
  const Run* runs;
  int count;    // number of runs
  float scale;  // an entry is scale * (256 high + low)
};

constexpr int LONGEST = 32768;  // columns of a run: 255 * 128 * LONGEST < 2^31
constexpr float MOST = 32512;   // 127 * 256: the high half then fits a byte

// Lanes of the vectors by which a row of codes is read, 0 if it is shorter than one or its groups do not fill them.
inline int lanes_of(const Codes& w) {
  if (w.bits == 32) return 0;
  for (int lanes = WIDEST; lanes >= 4; lanes /= 2)
    if (w.stride() >= 4 * lanes && (w.groups() == 1 || w.group % (32 * lanes / w.bits) == 0)) return lanes;
  return 0;
}

// Writes round(a / scale) as bytes `high` and `low`; returns the scale, NaN if an entry is not finite.
inline float halves_of(const float* __restrict__ a, int columns, uint8_t* __restrict__ high, uint8_t* __restrict__ low) {
  constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: the sum's last bits are the integer
  Vector<WIDEST> largest = {}, zero = {};
  int q = 0;
  for (; q + WIDEST <= columns; q += WIDEST) {
    const Vector<WIDEST> value = load<WIDEST>(a + q), size = value < 0 ? -value : value;
    largest = size > largest ? size : largest;
    zero += value * 0.0f;
  }
  float most = 0.0f, finite = 0.0f;
  for (int k = 0; k < WIDEST; ++k) most = std::max(most, largest[k]), finite += zero[k];
  for (; q < columns; ++q) most = std::max(most, std::abs(a[q])), finite += a[q] * 0.0f;
  const float steps = most > 0.0f && most < INFINITY ? std::min(MOST / most, 1e38f) : 0.0f;
  for (q = 0; q < columns; ++q) {
    const float shifted = a[q] * steps + ROUND;
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    const int32_t value = bits - 0x4b400000, upper = (value + 128) >> 8;
    high[q] = uint8_t(upper), low[q] = uint8_t(value);
  }
  return (steps > 0.0f ? 1.0f / steps : 0.0f) + finite;
}

// Orders activations as the vectors of codes read them. `bytes` takes 16 bytes for 4 columns and two vectors more,
// `runs` one for each group and each LONGEST columns; `high` and `low` hold `columns` entries and are overwritten.
template <int L, int BITS>
Levels levels_of(const Codes& w, const float* a, uint8_t* high, uint8_t* low, uint8_t* bytes, Run* runs) {
  constexpr int PARTS = 8 / BITS, COLUMNS = 4 * L * PARTS, OFFSET = 1 << (BITS - 1);
  Levels found = {bytes, runs, 0, halves_of(a, w.columns, high, low)};
  int vectors = 0;
  for (int start = 0; start < w.columns;) {
    const int end = std::min({start + LONGEST, (start / w.group + 1) * w.group, w.columns});
    Run run = {0, start / w.group, 0, 0};
    for (int c = start; c < end; ++c) run.high -= OFFSET * int8_t(high[c]), run.low -= OFFSET * int8_t(low[c]);
    for (; start < end; start += COLUMNS, ++run.vectors, bytes += 8 * L * PARTS) {
      // The last vector of a row overlaps the one before, with zeros in place of what was counted there.
      const int first = std::min<int>(start, (w.stride() - 4 * L) * PARTS);
      for (int part = 0; part < PARTS; ++part)
        for (int half = 0; half < 2; ++half) {
          const uint8_t* from = (half ? low : high) + first + part;
          uint8_t* to = bytes + (2 * part + half) * 4 * L;
          if (first == start && first + COLUMNS <= w.columns)
            for (int k = 0; k < 4 * L; ++k) to[k] = from[k * PARTS];
          else
            for (int k = 0; k < 4 * L; ++k) {
              const int column = first + part + k * PARTS;
              to[k] = column >= start && column < end ? from[k * PARTS] : 0;
            }
        }
    }
    start = end;
    vectors += run.vectors;
    runs[found.count++] = run;
  }
  return found;
}

// sum[p] = the products of row r[p] with the activations, by lanes.
template <int L, int BITS, int MT>
inline void dot_codes(const Codes& w, const uint8_t* const* rows, const float* const* scales, const Levels& a,
                      Vector<L>* sum) {
  const int64_t last = w.stride() - 4 * L;
  const uint8_t* levels = a.bytes;
  int64_t at = 0;
  for (int p = 0; p < MT; ++p) sum[p] = Vector<L>{};
  for (int k = 0; k < a.count; ++k) {
    const Run& run = a.runs[k];
    const Ints<L> high_start = {run.high}, low_start = {run.low};
    Ints<L> high[MT], low[MT];
    for (int p = 0; p < MT; ++p) high[p] = high_start, low[p] = low_start;
    for (int v = 0; v < run.vectors; ++v, at += 4 * L) {
      const int64_t from = std::min(at, last);
      for (int part = 0; part < 8 / BITS; ++part, levels += 8 * L) {
        const Bytes<L> upper = load_bytes<L>(levels), lower = load_bytes<L>(levels + 4 * L);
        for (int p = 0; p < MT; ++p) {
          Bytes<L> code = load_bytes<L>(rows[p] + from);
          if constexpr (BITS == 8) code ^= 128;
          else if (part) code = (Bytes<L>)(((Pairs<L>)code >> 4) & 0x0f0f);
          else code &= 15;
          high[p] = dot4<L>(high[p], code, upper);
          low[p] = dot4<L>(low[p], code, lower);
        }
      }
    }
    for (int p = 0; p < MT; ++p)
      sum[p] += scales[p][run.group] * (256.0f * __builtin_convertvector(high[p], Vector<L>) +
                                        __builtin_convertvector(low[p], Vector<L>));
  }
}

// out[j] = sum_q w[first + j, q] a[q] for j below `count`; writes up to L - 1 entries more.
template <int L, int BITS> void dot_rows(const Codes& w, int64_t first, int count, const Levels& a, float* out) {
  constexpr int MT = 4;
  for (int j = 0; j < count; j += L) {
    Vector<L> sum[L] = {};
    for (int p = 0; p < L && j + p < count; p += MT) {
      const uint8_t* rows[MT];
      const float* scales[MT];
      for (int m = 0; m < MT; ++m) {
        const int64_t r = first + std::min(j + p + m, count - 1);
        rows[m] = w.row(r), scales[m] = w.scale(r);
      }
      dot_codes<L, BITS, MT>(w, rows, scales, a, sum + p);
    }
    store<L>(out + j, a.scale * sums<L>(sum));
  }
}

}  // namespace
