// Chains of small contractions on a CPU: all stages of a structured layer, and its bias, in one call.
//
// A stage contracts the activations with one factor. All its offsets are tables of int32 in the program, which
// program.py writes (Stage in program.h has the formula): a factor is read in the order in which it is stored, and
// activations are never permuted. Batches of tokens are transposed into tiles whose innermost axis is the token: there
// every stage vectorises over tokens, in any layout of modes (tiles.h). Single tokens vectorise along the factors, or
// along modes that a factor does not touch (rows.h). Tensors are float32 or bfloat16, all of one dtype; everything
// computed in between is float32.

#include <algorithm>
#include <type_traits>
#include <vector>

#include "rows.h"
#include "tiles.h"

namespace {

constexpr int64_t CACHE = 1 << 23;  // bytes of intermediates in a tile, at most
constexpr int64_t LARGE = 1 << 22;  // factors of more entries have gradients that leave the cache between two tiles

template <class S> constexpr bool HALF = std::is_same_v<S, c10::BFloat16>;

// Contiguous factors, as floats if W is float. Single tokens read bfloat16 as it is (measured: half the time).
template <class W> struct Operands {
  Factors<W> pointers;
  std::vector<lib::Tensor> kept;

  Operands(TensorList factors, bool half) {
    kept.reserve(factors.size());
    pointers.reserve(factors.size());
    for (const lib::Tensor& factor : factors) kept.push_back(contiguous_of(factor));
    if constexpr (std::is_same_v<W, float>)
      if (half) {
        convert();
        return;
      }
    for (const lib::Tensor& factor : kept) pointers.push_back(read<W>(factor));
  }

  void convert() {
    int64_t total = 0;
    for (const lib::Tensor& factor : kept) total += factor.numel();
    Scratch memory = scratch<1>(total, kept.size());
    for (const lib::Tensor& factor : kept) {
      float* to = memory.take(factor.numel());
      const c10::BFloat16* from = read<c10::BFloat16>(factor);
      parallel_for(0, factor.numel(), 1 << 16, [&](int64_t begin, int64_t end) {
        for (int64_t e = begin; e < end; ++e) to[e] = from[e];
      });
      pointers.push_back(to);
    }
  }
};

// Returns whether all tensors are bfloat16; if not, all are float32.
bool halves(const lib::Tensor& x, TensorList factors, const char* name, const lib::Tensor& other) {
  const ScalarType type = x.scalar_type();
  REQUIRE(type == ScalarType::Float || type == ScalarType::BFloat16,
              "structlin::chain: x is ", type, "; the kernel takes Float or BFloat16");
  const auto check = [&](const lib::Tensor& tensor, const auto&... what) {
    REQUIRE(tensor.scalar_type() == type,
                "structlin::chain: x is ", type, ", ", what..., " is ", tensor.scalar_type(), "; all must be of one dtype");
  };
  for (size_t k = 0; k < factors.size(); ++k) check(factors[k], "factor ", k);
  if (other.defined()) check(other, name);
  return type == ScalarType::BFloat16;
}

template <class S>
void run_chain(const Program& p, TensorList factors, const S* bias, const S* x, S* y, int64_t tokens) {
  const int64_t in = p.in_features(), out = p.out_features();
  if (tokens <= p.few_tokens()) {
    const Operands<S> operands(factors, HALF<S>);
    for (int64_t t = 0; t < tokens; ++t) run_token(p.few(), operands.pointers, bias, x + t * in, y + t * out);
    return;
  }
  const Operands<float> operands(factors, HALF<S>);
  const int64_t share = p.share(tokens);
  const int T = share > WIDEST ? 2 * WIDEST : share > NARROW ? WIDEST : NARROW;
  parallel_for(0, (tokens + T - 1) / T, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t t = tile * T, count = std::min<int64_t>(T, tokens - t);
      const auto run = count > WIDEST   ? run_tile<WIDEST, 2, S>
                       : count > NARROW ? run_tile<WIDEST, 1, S>
                                        : run_tile<NARROW, 1, S>;
      run(p, operands.pointers, bias, x + t * in, y + t * out, count);
    }
  });
}

// out_features is an argument for the fake kernel in operators.py, which cannot read the program.
lib::Tensor chain(const lib::Tensor& x, TensorList factors, const std::optional<lib::Tensor>& bias,
                  const lib::Tensor& program, int64_t out_features) {
  const Program p{program.const_data_ptr<int32_t>()};
  REQUIRE(x.dim() > 0 && x.size(-1) == p.in_features() && out_features == p.out_features(),
              "structlin::chain: the input does not fit the program");
  p.check(factors);
  const lib::Tensor shift = bias.has_value() ? contiguous_of(*bias) : lib::Tensor();
  REQUIRE(!shift.defined() || shift.numel() == out_features,
              "structlin::chain: bias has ", shift.numel(), " entries, not ", out_features);
  const bool half = halves(x, factors, "bias", shift);
  const lib::Tensor rows = contiguous_of(x);
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = p.out_features();
  lib::Tensor y = empty_of(sizes, x);
  const auto go = [&](auto zero) {
    using S = decltype(zero);
    run_chain<S>(p, factors, shift.defined() ? read<S>(shift) : nullptr, read<S>(rows),
                 write<S>(y), x.numel() / p.in_features());
  };
  if (half) go(c10::BFloat16());
  else go(0.0f);
  return y;
}

int64_t rounded_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// Adds to the gradients of the factors. Every thread but the first sums into memory of its own, added at the end.
template <class S>
void run_chain_backward(const Program& p, TensorList factors, const S* x, const S* dy, S* dx, int64_t tokens,
                        Integers wanted, const std::vector<lib::Tensor>& gradients) {
  const int64_t in = p.in_features(), out = p.out_features();
  std::vector<float*> sums(factors.size(), nullptr);
  int64_t total = 0;
  for (size_t k = 0; k < wanted.size(); ++k) {
    sums[wanted[k]] = write<float>(gradients[k]);
    total += gradients[k].numel();
  }
  if (tokens <= p.few_tokens()) {
    const Operands<S> operands(factors, HALF<S>);
    for (int64_t t = 0; t < tokens; ++t)
      run_token_backward(p, operands.pointers, x + t * in, dy + t * out, dx ? dx + t * in : nullptr, sums);
    return;
  }
  const Operands<float> operands(factors, HALF<S>);
  // Sums over the tokens of a tile are added to memory once: tiles are longer where these sums leave the cache, as long as
  // their intermediates fit it. Those of a thread have equal lengths, of whole vectors: the rest of a vector is padding.
  const int64_t floats = 2 * int64_t(p.in_rows()) + p.out_rows() + kept_rows(p) + 2 * int64_t(p.rows());
  const int64_t share = p.share(tokens), parts = (tokens + share - 1) / share;
  const int64_t longest = std::min<int64_t>(CACHE / (floats * int64_t(sizeof(float))), total > LARGE ? 128 : 64);
  const int64_t most = std::max<int64_t>(longest / WIDEST, 1) * WIDEST;
  const int64_t tiles = (share + most - 1) / most, T = rounded_up((share + tiles - 1) / tiles, WIDEST);
  const lib::Tensor others = zeros_of(std::vector<int64_t>{parts - 1, total}, factors[0]);
  float* other = write<float>(others);
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      std::vector<float*> own = sums;
      int64_t place = (part - 1) * total;
      for (size_t k = 0; part > 0 && k < wanted.size(); place += gradients[k++].numel()) own[wanted[k]] = other + place;
      const int64_t last = std::min(tokens, (part + 1) * share);
      for (int64_t t = part * share; t < last; t += T) {
        const int64_t count = std::min(T, last - t);
        const int64_t L = count > NARROW ? WIDEST : count > 4 ? NARROW : 4;
        const auto run = count > WIDEST  ? run_tile_backward<WIDEST, 2, S>
                         : L == WIDEST   ? run_tile_backward<WIDEST, 1, S>
                         : L == NARROW   ? run_tile_backward<NARROW, 1, S>
                                         : run_tile_backward<4, 1, S>;
        run(p, operands.pointers, x + t * in, dy + t * out, dx ? dx + t * in : nullptr, own, count, rounded_up(count, L));
      }
    }
  });
  if (parts == 1) return;
  for (size_t k = 0; k < wanted.size(); ++k) {
    const int64_t count = gradients[k].numel();
    parallel_for(0, count, 1 << 14, [&, to = sums[wanted[k]]](int64_t begin, int64_t end) {
      for (int64_t part = 0; part + 1 < parts; ++part)
        for (int64_t e = begin; e < end; ++e) to[e] += other[part * total + e];
    });
    other += count;
  }
}

// Returns the gradient of x if `input_gradient`, then those of the wanted factors, in their order.
std::vector<lib::Tensor> chain_backward(const lib::Tensor& dy, const lib::Tensor& x, TensorList factors,
                                       const lib::Tensor& program, bool input_gradient, Integers wanted) {
  const Program p{program.const_data_ptr<int32_t>()};
  const bool half = halves(x, factors, "dy", dy);
  REQUIRE(x.size(-1) == p.in_features() && dy.size(-1) == p.out_features() &&
                  x.numel() / p.in_features() == dy.numel() / p.out_features(),
              "structlin::chain_backward: the tensors do not fit the program");
  p.check(factors);
  for (const int64_t k : wanted)
    REQUIRE(k >= 0 && k < int64_t(factors.size()), "structlin::chain_backward: there is no factor ", k);
  const lib::Tensor rows = contiguous_of(x), grad_output = contiguous_of(dy);
  std::vector<lib::Tensor> result, gradients;
  if (input_gradient) result.push_back(empty_of(x.sizes(), x));
  for (const int64_t k : wanted) gradients.push_back(zeros_of(factors[k].sizes(), x));
  const auto go = [&](auto zero) {
    using S = decltype(zero);
    run_chain_backward<S>(p, factors, read<S>(rows), read<S>(grad_output),
                          input_gradient ? write<S>(result[0]) : nullptr, x.numel() / p.in_features(),
                          wanted, gradients);
  };
  if (half) go(c10::BFloat16());
  else go(0.0f);
  for (lib::Tensor& gradient : gradients) {
    result.push_back(half ? converted(gradient, ScalarType::BFloat16) : gradient);
    gradient = lib::Tensor();
  }
  return result;
}

}  // namespace

DEFINE_OPERATORS(structlin, library) {
  library.def("chain(Tensor x, Tensor[] factors, Tensor? bias, Tensor program, int out_features) -> Tensor");
  library.def(
      "chain_backward(Tensor dy, Tensor x, Tensor[] factors, Tensor program, bool input_gradient, int[] wanted) -> "
      "Tensor[]");
  library.def(  // implemented in operators.py
      "chain_differentiable_backward(Tensor dy, Tensor x, Tensor[] factors, Tensor program, bool input_gradient, "
      "int[] wanted) -> Tensor[]");
}

IMPLEMENT_OPERATORS(structlin, CPU, library) {
  library.impl("chain", OPERATOR(chain));
  library.impl("chain_backward", OPERATOR(chain_backward));
}
