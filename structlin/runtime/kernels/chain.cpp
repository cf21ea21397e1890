// Chains of small contractions on a CPU: all stages of a structured layer, and its bias, in one call.
//
// A stage contracts the activations with one factor. All its offsets are tables of int32 in the program, which
// program.py writes (Stage in program.h has the formula): a factor is read in the order in which it is stored, and
// activations are never permuted. Batches of tokens are transposed into tiles whose innermost axis is the token: there
// every stage vectorises over tokens, in any layout of modes (tiles.h). Single tokens vectorise along the factors, or
// along modes that a factor does not touch (rows.h). Tensors are float32 or bfloat16, all of one dtype; everything
// computed in between is float32.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "rows.h"
#include "tiles.h"

namespace {

constexpr int64_t CACHE = 1 << 23;  // bytes of intermediates in a tile, at most

template <class S> constexpr bool HALF = std::is_same_v<S, at::BFloat16>;

// Contiguous factors, as floats if W is float. Single tokens read bfloat16 as it is (measured: half the time).
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
    Scratch memory = scratch<1>(total, kept.size());
    for (const at::Tensor& factor : kept) {
      float* to = memory.take(factor.numel());
      const at::BFloat16* from = factor.const_data_ptr<at::BFloat16>();
      parallel_for(0, factor.numel(), 1 << 16, [&](int64_t begin, int64_t end) {
        for (int64_t e = begin; e < end; ++e) to[e] = from[e];
      });
      pointers.push_back(to);
    }
  }
};

// Returns whether all tensors are bfloat16; if not, all are float32.
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

// Adds to the gradients of the factors. Every thread but the first sums into memory of its own, added at the end.
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
  if (tokens <= p.few_tokens()) {
    const Operands<S> operands(factors, HALF<S>);
    for (int64_t t = 0; t < tokens; ++t)
      run_token_backward(p, operands.pointers, x + t * in, dy + t * out, dx ? dx + t * in : nullptr, sums);
    return;
  }
  const Operands<float> operands(factors, HALF<S>);
  // Tiles as long as their intermediates fit the cache: sums over tokens are added to memory once per tile.
  const int64_t floats = 2 * int64_t(p.in_rows()) + p.out_rows() + kept_rows(p) + 2 * int64_t(p.rows());
  const int64_t share = p.share(tokens);
  const int L = share > NARROW ? WIDEST : share > 4 ? NARROW : 4;
  int T = share > L ? 2 * L : L;
  while (T < 8 * WIDEST && T < share && 2 * T * floats * int64_t(sizeof(float)) <= CACHE) T *= 2;
  const int64_t tiles = (tokens + T - 1) / T;
  const int64_t parts = std::min<int64_t>(at::get_num_threads(), tiles);
  const at::Tensor others = at::zeros({parts - 1, total}, at::kFloat);
  float* other = others.mutable_data_ptr<float>();
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
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
    parallel_for(0, count, 1 << 14, [&, to = sums[wanted[k]]](int64_t begin, int64_t end) {
      for (int64_t part = 0; part + 1 < parts; ++part)
        for (int64_t e = begin; e < end; ++e) to[e] += other[part * total + e];
    });
    other += count;
  }
}

// Returns the gradient of x if `input_gradient`, then those of the wanted factors, in their order.
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
  const at::Tensor rows = x.contiguous(), grad_output = dy.contiguous();
  std::vector<at::Tensor> result, gradients;
  if (input_gradient) result.push_back(at::empty(x.sizes(), x.options()));
  for (const int64_t k : wanted) gradients.push_back(at::zeros(factors[k].sizes(), at::kFloat));
  const auto go = [&](auto zero) {
    using S = decltype(zero);
    run_chain_backward<S>(p, factors, rows.const_data_ptr<S>(), grad_output.const_data_ptr<S>(),
                          input_gradient ? result[0].mutable_data_ptr<S>() : nullptr, x.numel() / p.in_features(),
                          wanted, gradients);
  };
  if (half) go(at::BFloat16());
  else go(0.0f);
  for (at::Tensor& gradient : gradients) {
    result.push_back(half ? gradient.to(at::kBFloat16) : gradient);
    gradient.reset();
  }
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(structlin, library) {
  library.def("chain(Tensor x, Tensor[] factors, Tensor? bias, Tensor program, int out_features) -> Tensor");
  library.def(
      "chain_backward(Tensor dy, Tensor x, Tensor[] factors, Tensor program, bool input_gradient, int[] wanted) -> "
      "Tensor[]");
  library.def(  // implemented in operators.py
      "chain_differentiable_backward(Tensor dy, Tensor x, Tensor[] factors, Tensor program, bool input_gradient, "
      "int[] wanted) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(structlin, CPU, library) {
  library.impl("chain", chain);
  library.impl("chain_backward", chain_backward);
}
