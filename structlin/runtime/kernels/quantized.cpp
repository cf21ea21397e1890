// Chains of small contractions (chain.cpp) whose factors are integers with scales: forward passes only.

#include <algorithm>
#include <vector>

#include "quantized.h"

namespace {

struct Form {  // a row of `forms`, as quantized.py writes it
  int32_t bits, columns, group, shared;
};

// The codes of all factors, and the tensors that they point into. Refuses tensors of another size than the program
// reads.
struct Factored {
  std::vector<Codes> codes;
  std::vector<lib::Tensor> kept;

  Factored(const Program& p, TensorList stored, TensorList scales, const lib::Tensor& forms) {
    REQUIRE(stored.size() == scales.size() && forms.numel() == int64_t(4 * stored.size()),
            "structlin::quantized_chain: ", stored.size(), " factors, ", scales.size(), " scales, ", forms.numel() / 4,
            " forms; give one of each per factor");
    const Form* form = reinterpret_cast<const Form*>(read<int32_t>(forms));
    kept.reserve(2 * stored.size());
    for (size_t k = 0; k < stored.size(); ++k) {
      const lib::Tensor& code = kept.emplace_back(contiguous_of(stored[k]));
      const bool floats = scales[k].scalar_type() == ScalarType::Float;
      const lib::Tensor& scale =
          kept.emplace_back(contiguous_of(floats ? scales[k] : converted(scales[k], ScalarType::Float)));
      const Codes one = {static_cast<const uint8_t*>(code.const_data_ptr()), read<float>(scale),
                         form[k].bits, form[k].columns, form[k].group, form[k].shared};
      check(p, k, one, code.numel() * code.element_size(), scale.numel());
      codes.push_back(one);
    }
  }

  static void check(const Program& p, size_t k, const Codes& one, int64_t bytes, int64_t scales) {
    for (int stage = 0; stage < p.stages(); ++stage) {
      if (p.record(stage).factor != int(k)) continue;
      const int64_t rows = p.record(stage).entries / one.columns;
      const int64_t steps = one.bits == 32 ? 0 : (rows + one.shared - 1) / one.shared * one.groups();
      REQUIRE(bytes == rows * one.stride() && scales == steps,
              "structlin::quantized_chain: factor ", k, " has ", bytes, " bytes and ", scales, " scales, not ",
              rows * one.stride(), " and ", steps);
    }
  }
};

template <class S>
void run_chain(const Program& p, const std::vector<Codes>& factors, const S* bias, const S* x, S* y, int64_t tokens) {
  const int64_t in = p.in_features(), out = p.out_features();
  if (tokens <= p.few_tokens()) {
    for (int64_t t = 0; t < tokens; ++t) run_codes_token<S>(p, factors, bias, x + t * in, y + t * out);
    return;
  }
  const int64_t share = p.share(tokens);
  const int T = share >= 8 * WIDEST ? 8 * WIDEST : share > WIDEST ? 2 * WIDEST : share > NARROW ? WIDEST : NARROW;
  parallel_for(0, (tokens + T - 1) / T, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t t = tile * T, count = std::min<int64_t>(T, tokens - t);
      const auto run = count > 2 * WIDEST ? run_codes_tile<WIDEST, 2, 4, S>
                       : count > WIDEST   ? run_codes_tile<WIDEST, 2, 1, S>
                       : count > NARROW   ? run_codes_tile<WIDEST, 1, 1, S>
                                          : run_codes_tile<NARROW, 1, 1, S>;
      run(p, factors, bias, x + t * in, y + t * out, count);
    }
  });
}

// out_features is an argument for the fake kernel in operators.py, which cannot read the program.
lib::Tensor quantized_chain(const lib::Tensor& x, TensorList codes, TensorList scales,
                            const std::optional<lib::Tensor>& bias, const lib::Tensor& program,
                            const lib::Tensor& forms, int64_t out_features) {
  const Program p{read<int32_t>(program)};
  REQUIRE(x.dim() > 0 && x.size(-1) == p.in_features() && out_features == p.out_features(),
          "structlin::quantized_chain: the input does not fit the program");
  REQUIRE(!wants_gradient(x),
          "structlin::quantized_chain has no gradient; call it under torch.no_grad(), or dequantise the factors");
  const lib::Tensor shift = bias.has_value() ? contiguous_of(*bias) : lib::Tensor();
  const ScalarType type = x.scalar_type();
  REQUIRE(type == ScalarType::Float || type == ScalarType::BFloat16,
          "structlin::quantized_chain: x is ", type, "; the kernel takes Float or BFloat16");
  REQUIRE(!shift.defined() || (shift.numel() == out_features && shift.scalar_type() == type),
          "structlin::quantized_chain: bias has ", shift.numel(), " entries of ", shift.scalar_type(), ", not ",
          out_features, " of ", type);
  const Factored factors(p, codes, scales, forms);
  const lib::Tensor rows = contiguous_of(x);
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = out_features;
  lib::Tensor y = empty_of(sizes, x);
  const auto go = [&](auto zero) {
    using S = decltype(zero);
    run_chain<S>(p, factors.codes, shift.defined() ? read<S>(shift) : nullptr, read<S>(rows), write<S>(y),
                 x.numel() / p.in_features());
  };
  if (type == ScalarType::Float) go(0.0f);
  else go(c10::BFloat16());
  return y;
}

}  // namespace

DEFINE_OPERATORS(structlin, library) {
  library.def(
      "quantized_chain(Tensor x, Tensor[] codes, Tensor[] scales, Tensor? bias, Tensor program, Tensor forms, "
      "int out_features) -> Tensor");
}

IMPLEMENT_OPERATORS(structlin, CPU, library) { library.impl("quantized_chain", OPERATOR(quantized_chain)); }
