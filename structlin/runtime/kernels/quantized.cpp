// Chains of small contractions (chain.cpp) whose factors are integers with scales: forward passes only.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "quantized.h"

namespace {

struct Form {  // a row of `forms`, as quantized.py writes it
  int32_t bits, columns, group, shared;
};

// The codes of all factors. Refuses tensors of another size than the program reads.
std::vector<Codes> codes_of(const Program& p, at::TensorList codes, at::TensorList scales, const at::Tensor& forms) {
  TORCH_CHECK(codes.size() == scales.size() && forms.numel() == int64_t(4 * codes.size()),
              "structlin::quantized_chain: ", codes.size(), " factors, ", scales.size(), " scales, ", forms.numel() / 4,
              " forms; give one of each per factor");
  const auto* form = reinterpret_cast<const Form*>(forms.const_data_ptr<int32_t>());
  std::vector<Codes> found;
  for (size_t k = 0; k < codes.size(); ++k) {
    const at::Tensor &code = codes[k], &scale = scales[k];
    TORCH_CHECK(code.is_contiguous() && scale.is_contiguous() && scale.scalar_type() == at::kFloat,
                "structlin::quantized_chain: codes and scales must be contiguous, scales Float");
    const Codes one = {static_cast<const uint8_t*>(code.const_data_ptr()), scale.const_data_ptr<float>(),
                       form[k].bits, form[k].columns, form[k].group, form[k].shared};
    for (int stage = 0; stage < p.stages(); ++stage) {
      if (p.record(stage).factor != int(k)) continue;
      const int64_t rows = p.record(stage).entries / one.columns;
      const int64_t steps = one.bits == 32 ? 0 : (rows + one.shared - 1) / one.shared * one.groups();
      TORCH_CHECK(int64_t(code.nbytes()) == rows * one.stride() && scale.numel() == steps,
                  "structlin::quantized_chain: factor ", k, " has ", code.nbytes(), " bytes and ", scale.numel(),
                  " scales, not ", rows * one.stride(), " and ", steps);
    }
    found.push_back(one);
  }
  return found;
}

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
at::Tensor quantized_chain(const at::Tensor& x, at::TensorList codes, at::TensorList scales,
                           const std::optional<at::Tensor>& bias, const at::Tensor& program, const at::Tensor& forms,
                           int64_t out_features) {
  const Program p{program.const_data_ptr<int32_t>()};
  TORCH_CHECK(x.dim() > 0 && x.size(-1) == p.in_features() && out_features == p.out_features(),
              "structlin::quantized_chain: the input does not fit the program");
  TORCH_CHECK(!(at::GradMode::is_enabled() && x.requires_grad()),
              "structlin::quantized_chain has no gradient; call it under torch.no_grad(), or dequantise the factors");
  const at::Tensor shift = bias.has_value() ? bias->contiguous() : at::Tensor();
  const at::ScalarType type = x.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16,
              "structlin::quantized_chain: x is ", type, "; the kernel takes Float or BFloat16");
  TORCH_CHECK(!shift.defined() || (shift.numel() == out_features && shift.scalar_type() == type),
              "structlin::quantized_chain: bias has ", shift.numel(), " entries of ", shift.scalar_type(), ", not ",
              out_features, " of ", type);
  const std::vector<Codes> factors = codes_of(p, codes, scales, forms);
  const at::Tensor rows = x.contiguous();
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = out_features;
  at::Tensor y = at::empty(sizes, x.options());
  const auto go = [&](auto zero) {
    using S = decltype(zero);
    run_chain<S>(p, factors, shift.defined() ? shift.const_data_ptr<S>() : nullptr, rows.const_data_ptr<S>(),
                 y.mutable_data_ptr<S>(), x.numel() / p.in_features());
  };
  if (type == at::kFloat) go(0.0f);
  else go(at::BFloat16());
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(structlin, library) {
  library.def(
      "quantized_chain(Tensor x, Tensor[] codes, Tensor[] scales, Tensor? bias, Tensor program, Tensor forms, "
      "int out_features) -> Tensor");
}

TORCH_LIBRARY_IMPL(structlin, CPU, library) { library.impl("quantized_chain", quantized_chain); }
