// The module specfast._core: exceptions, then one binding file per concept. No MLX here.
#include "bindings.hpp"

NB_MODULE(_core, m) {
  nb::set_leak_warnings(false);  // a host may hold engines until the interpreter is gone
  main_thread = nb::cast<unsigned long>(nb::module_::import_("threading").attr("main_thread")().attr("ident"));
  m.doc() = "Native kernels and decoder of specfast: NumPy arrays in and out, weights used in place.";
  PyObject* base = PyErr_NewExceptionWithDoc("specfast._core.SpecfastError", "Base of every error specfast raises.",
                                             nullptr, nullptr);
  m.attr("SpecfastError") = nb::steal(base);
  nb::exception<specfast::NumericalError>(m, "NumericalError", base);
  nb::exception<specfast::ContextFullError>(m, "ContextFullError", base);
  nb::exception<specfast::ShapeError>(m, "ShapeError", base);
  bind_matrix(m);
  bind_law(m);
  bind_model(m);
  bind_cache(m);
  bind_machine(m);
  bind_ops(m);
  bind_drafters(m);
  bind_graph(m);
}
