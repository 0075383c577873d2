// The losses as functions of kdkernels._C.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace kdkernels {

void bind_losses(pybind11::module_& m);

}  // namespace kdkernels
