// Makes this library importable; importing it registers the kernels of the operators that
// dn_detr/layers/deformable/operators.py defines.
#include <Python.h>

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&definition);
}
