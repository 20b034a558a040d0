// The Python module mta_fast._C: loading it registers torch.ops.mta_fast_cpp. Of its own it has what must read Python's
// lists.
#undef Py_LIMITED_API  // torch's build sets its own
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <torch/headeronly/macros/Macros.h>
#include <torch/headeronly/version.h>

#include <cstdint>

#ifdef __clang__
#define MTA_FAST_COMPILER __VERSION__
#else
#define MTA_FAST_COMPILER "GCC " __VERSION__
#endif
#ifndef MTA_FAST_SANITIZERS
#define MTA_FAST_SANITIZERS
#endif

// mta_fast/_extension.py reads this from the file, before it loads it.
static const char build[] = "mta_fast._C|torch=" TORCH_VERSION "|target=" C10_STRINGIZE(
    MTA_FAST_TARGET_TORCH) "|compiler=" MTA_FAST_COMPILER "|sanitizers=" C10_STRINGIZE((MTA_FAST_SANITIZERS)) "|";

// The items of a list or tuple, which differ in nothing else here.
struct Items {
  explicit Items(PyObject* sequence) : sequence(sequence), is_list(PyList_CheckExact(sequence)) {
    if (is_list) size = PyList_Size(sequence);
    if (PyTuple_CheckExact(sequence)) size = PyTuple_Size(sequence);
  }
  PyObject* operator[](Py_ssize_t i) const {
    return is_list ? PyList_GetItem(sequence, i) : PyTuple_GetItem(sequence, i);
  }

  PyObject* sequence;
  bool is_list;
  Py_ssize_t size = -1;  // neither
};

// Whether `pair` is a list or tuple of two integers within int64, which go to `out`.
static bool read_pair(PyObject* pair, int64_t* out) {
  Items items(pair);
  if (items.size != 2) return false;
  for (Py_ssize_t i = 0; i < 2; ++i) {
    PyObject* value = items[i];
    if (!PyLong_CheckExact(value)) return false;
    out[i] = PyLong_AsLongLong(value);
    if (out[i] == -1 && PyErr_Occurred() != nullptr) {
      PyErr_Clear();
      return false;
    }
  }
  return true;
}

static PyObject* pairs(PyObject*, PyObject* row) {
  Items items(row);
  if (items.size < 0) Py_RETURN_NONE;
  PyObject* bytes = PyBytes_FromStringAndSize(nullptr, 2 * sizeof(int64_t) * items.size);
  if (bytes == nullptr) return nullptr;
  int64_t* values = reinterpret_cast<int64_t*>(PyBytes_AsString(bytes));
  for (Py_ssize_t i = 0; i < items.size; ++i) {
    if (!read_pair(items[i], values + 2 * i)) {
      Py_DECREF(bytes);
      Py_RETURN_NONE;
    }
  }
  return bytes;
}

static PyMethodDef methods[] = {
    {"pairs", pairs, METH_O,
     "pairs(row) -> the bytes of an int64 array, or None where row is no list of integer pairs"},
    {nullptr, nullptr, 0, nullptr},
};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "_C",
    "C++ kernels for CPUs; see mta_fast.cpp.",
    -1,
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

PyMODINIT_FUNC PyInit__C() {
  PyObject* module = PyModule_Create(&definition);
  if (module != nullptr && PyModule_AddStringConstant(module, "BUILD", build) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
