// The Python module mta_fast._C: loading it registers torch.ops.mta_fast_cpp.
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "C++ kernels for CPUs; see mta_fast.cpp.", -1};

extern "C" PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
