// Calls of the kernel: the autograd function, and functions for Python that do not box their arguments (torch.ops does,
// which takes longer than a small layer takes to compute).

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Optional = std::optional<at::Tensor>;

using Forward = at::Tensor(const at::Tensor&, at::TensorList, const Optional&, const at::Tensor&, int64_t);
using Backward = std::vector<at::Tensor>(const at::Tensor&, const at::Tensor&, at::TensorList, const at::Tensor&, bool,
                                         at::IntArrayRef);

template <class F> c10::TypedOperatorHandle<F> operation(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

at::Tensor forward(const at::Tensor& x, at::TensorList factors, const Optional& bias, const at::Tensor& program,
                   int64_t out_features) {
  static const auto op = operation<Forward>("structlin::chain");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, factors, bias, program, out_features);
}

// Saves the input and the factors only: the backward pass recomputes the activations, one tile of tokens at a time.
struct Function : torch::autograd::Function<Function> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const Optional& bias, const at::Tensor& program,
                            int64_t out_features, at::TensorList factors) {
    variable_list saved{x};
    saved.insert(saved.end(), factors.begin(), factors.end());
    ctx->save_for_backward(std::move(saved));
    // Not saved as a variable: saved-tensor hooks may hand back a copy, and SPECS in operators.py finds the spec of a
    // program by the identity of its tensor.
    ctx->saved_data["program"] = program;
    ctx->saved_data["bias"] = bias.has_value();
    return ::forward(x, factors, bias, program, out_features);
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &dy = gradients[0], &x = saved[0], program = ctx->saved_data["program"].toTensor();
    const at::TensorList factors = at::TensorList(saved).slice(1);
    // needs_input_grad counts the tensors that forward was given: x (0), bias if there is one, program, factors. The
    // gradients returned count arguments, present or not: x, bias, program, out_features, factors from 4 on.
    const bool biased = ctx->saved_data["bias"].toBool(), of_x = ctx->needs_input_grad(0);
    std::vector<int64_t> wanted;
    for (size_t k = 0; k < factors.size(); ++k)
      if (ctx->needs_input_grad(2 + biased + k)) wanted.push_back(k);
    // With create_graph=True the gradients must be differentiable themselves.
    static const auto plain = operation<Backward>("structlin::chain_backward");
    static const auto differentiable = operation<Backward>("structlin::chain_differentiable_backward");
    const auto found = (at::GradMode::is_enabled() ? differentiable : plain).call(dy, x, factors, program, of_x, wanted);
    variable_list result(4 + factors.size());
    if (of_x) result[0] = found[0];
    if (biased && ctx->needs_input_grad(1)) result[1] = dy.reshape_symint({-1, dy.sym_size(-1)}).sum(0);
    for (size_t k = 0; k < wanted.size(); ++k) result[4 + wanted[k]] = found[of_x + k];
    return result;
  }
};

at::Tensor chain(const at::Tensor& x, at::TensorList factors, const Optional& bias, const at::Tensor& program,
                 int64_t out_features) {
  const auto learns = [](const at::Tensor& tensor) { return tensor.requires_grad(); };
  if (at::GradMode::is_enabled() &&
      (learns(x) || (bias.has_value() && learns(*bias)) || std::any_of(factors.begin(), factors.end(), learns)))
    return Function::apply(x, bias, program, out_features, factors);
  return forward(x, factors, bias, program, out_features);
}

}  // namespace

TORCH_LIBRARY_IMPL(structlin, Autograd, library) { library.impl("chain", chain); }

#if __has_include(<Python.h>)  // without Python's headers native.py calls torch.ops
#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/python_numbers.h>

namespace {

using Factors = c10::SmallVector<at::Tensor, 8>;

const at::Tensor& tensor(PyObject* given) {
  TORCH_CHECK_TYPE(THPVariable_Check(given), "chain takes tensors, not ", Py_TYPE(given)->tp_name);
  return THPVariable_Unpack(given);
}

Optional optional(PyObject* given) { return given == Py_None ? Optional() : tensor(given); }

PyObject* wrapped(const at::Tensor& x, at::TensorList factors, const Optional& bias, const at::Tensor& program,
                  int64_t out_features) {
  static const auto op = operation<Forward>("structlin::chain");
  at::Tensor y;
  {
    pybind11::gil_scoped_release release;
    y = op.call(x, factors, bias, program, out_features);
  }
  return THPVariable_Wrap(std::move(y));
}

// chain(x, factors, bias, program, out_features): the operator, for Python.
PyObject* call_chain(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 5 && PyTuple_Check(given[1]), "chain takes x, a tuple of factors, bias, program, out_features");
  Factors factors;
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(given[1]); ++k) factors.push_back(tensor(PyTuple_GET_ITEM(given[1], k)));
  return wrapped(tensor(given[0]), factors, optional(given[2]), tensor(given[3]), THPUtils_unpackLong(given[4]));
  END_HANDLE_TH_ERRORS
}

// The same question as `unobserved` in runtime/eager.py, asked of torch's thread-local state. It is stricter: a mode that
// only sets a default device counts as an observer here, which leads to the slower way and no further.
bool unobserved() {
  const auto local = c10::impl::tls_local_dispatch_key_set();
  return (local.included_ - c10::default_included_set).empty() &&
         (c10::default_excluded_set - local.excluded_).empty() &&  // no autocast
         !at::impl::torch_function_mode_enabled() && !torch::autograd::ForwardADLevel::try_get_by_idx(0);
}

// recall(known, x, parameters): runs a layer in one call, where everything is as it was when `known` (Known in native.py)
// was written: the same parameter objects, a plain input of their dtype, a number of rows for which the kernel is the
// fastest way, nobody watching. Returns None in any other case: the caller has to choose again.
PyObject* call_recall(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 3 && PyTuple_Check(given[0]) && PyDict_Check(given[2]), "recall takes known, x, parameters");
  PyObject *const known = given[0], *const names = PyTuple_GET_ITEM(known, 0), *const seen = PyTuple_GET_ITEM(known, 1);
  if (!THPVariable_CheckExact(given[1]) || !unobserved()) Py_RETURN_NONE;
  Factors factors;
  const Py_ssize_t last = PyTuple_GET_SIZE(names) - 1;
  bool learns = false;
  for (Py_ssize_t k = 0; k <= last; ++k) {
    PyObject* const parameter = PyTuple_GET_ITEM(seen, k);
    if (PyDict_GetItem(given[2], PyTuple_GET_ITEM(names, k)) != parameter) Py_RETURN_NONE;
    if (k == last) break;
    factors.push_back(tensor(parameter));
    learns |= factors.back().requires_grad();
  }
  const at::Tensor& x = tensor(given[1]);
  if (x.layout() != at::kStrided || x.is_nested()) Py_RETURN_NONE;
  const int64_t in_features = THPUtils_unpackLong(PyTuple_GET_ITEM(known, 5));
  // `.data = ` may have changed the dtype of the very parameters that are known.
  if (x.scalar_type() != at::kFloat && x.scalar_type() != at::kBFloat16) Py_RETURN_NONE;
  if (!x.is_cpu() || x.scalar_type() != factors[0].scalar_type() || x.dim() == 0 || x.size(-1) != in_features)
    Py_RETURN_NONE;
  THPObjectPtr rows(PyLong_FromLongLong(x.numel() / in_features));
  const int fastest = PySet_Contains(PyTuple_GET_ITEM(known, learns && at::GradMode::is_enabled() ? 3 : 2), rows.get());
  if (fastest < 0) return nullptr;
  if (!fastest) Py_RETURN_NONE;
  return wrapped(x, factors, optional(PyTuple_GET_ITEM(seen, last)), tensor(PyTuple_GET_ITEM(known, 4)),
                 THPUtils_unpackLong(PyTuple_GET_ITEM(known, 6)));
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"chain", reinterpret_cast<PyCFunction>(call_chain), METH_FASTCALL, nullptr},
    {"recall", reinterpret_cast<PyCFunction>(call_recall), METH_FASTCALL, nullptr},
    {},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "structlin_chain", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit_structlin_chain() { return PyModule_Create(&module); }
#endif
