// The tensors that the kernel reads and writes: ATen's in a local build, those of torch's stable ABI (2.10 and later)
// in a wheel. Everything that differs between the two stands here; variants.py has the macros' names.

#pragma once

#ifdef STRUCTLIN_STABLE
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <sstream>
#include <stdexcept>
#else
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>
#endif

#include <cstdint>
#include <optional>
#include <vector>

#ifdef STRUCTLIN_STABLE

namespace lib = torch::stable;  // Tensor, parallel_for, get_num_threads

namespace {

using ScalarType = torch::headeronly::ScalarType;
using TensorList = torch::headeronly::HeaderOnlyArrayRef<lib::Tensor>;
using Integers = torch::headeronly::HeaderOnlyArrayRef<int64_t>;

inline lib::Tensor contiguous_of(const lib::Tensor& x) { return x.is_contiguous() ? x : lib::contiguous(x); }

// By the C function: a call of the dispatcher takes about 1 us longer.
inline lib::Tensor empty_of(Integers sizes, const lib::Tensor& like) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t k = sizes.size(); k-- > 1;) strides[k - 1] = strides[k] * std::max<int64_t>(sizes[k], 1);
  int32_t dtype;
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &made));
  return lib::Tensor(made);
}

inline lib::Tensor zeros_of(Integers sizes, const lib::Tensor& like) {
  return lib::new_zeros(like, sizes, ScalarType::Float);
}
// Unlike the typed pointers of torch, without a check of the dtype, which takes long here: `halves` has checked it.
template <class T> const T* read(const lib::Tensor& x) { return static_cast<const T*>(x.const_data_ptr()); }
template <class T> T* write(const lib::Tensor& x) { return static_cast<T*>(x.mutable_data_ptr()); }

inline lib::Tensor converted(const lib::Tensor& x, ScalarType type) { return lib::to(x, type); }

inline bool wants_gradient(const lib::Tensor&) { return false; }  // the stable ABI cannot tell

template <class... Words> [[noreturn]] void refuse(const Words&... words) {
  std::ostringstream text;
  ((text << words), ...);
  throw std::runtime_error(text.str());
}

}  // namespace

#define REQUIRE(condition, ...) \
  if (!(condition)) refuse(__VA_ARGS__)
#define DEFINE_OPERATORS STABLE_TORCH_LIBRARY_FRAGMENT
#define IMPLEMENT_OPERATORS STABLE_TORCH_LIBRARY_IMPL
#define OPERATOR(function) TORCH_BOX(&function)

#else

namespace lib = at;

namespace {

using ScalarType = at::ScalarType;
using TensorList = at::TensorList;
using Integers = at::IntArrayRef;

inline at::Tensor contiguous_of(const at::Tensor& x) { return x.contiguous(); }
inline at::Tensor empty_of(Integers sizes, const at::Tensor& like) { return at::empty(sizes, like.options()); }
inline at::Tensor zeros_of(Integers sizes, const at::Tensor&) { return at::zeros(sizes, at::kFloat); }
template <class T> const T* read(const at::Tensor& x) { return x.const_data_ptr<T>(); }
template <class T> T* write(const at::Tensor& x) { return x.mutable_data_ptr<T>(); }

inline at::Tensor converted(const at::Tensor& x, ScalarType type) { return x.to(type); }
inline bool wants_gradient(const at::Tensor& x) { return at::GradMode::is_enabled() && x.requires_grad(); }

}  // namespace

#define REQUIRE TORCH_CHECK
#define DEFINE_OPERATORS TORCH_LIBRARY_FRAGMENT
#define IMPLEMENT_OPERATORS TORCH_LIBRARY_IMPL
#define OPERATOR(function) function

#endif
