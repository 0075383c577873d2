// The kernels of every device that this build has, and what a CUDA launch needs of PyTorch.
#pragma once

#include "cpu/kernels.h"
#if defined(KDKERNELS_WITH_CUDA)
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/kernels.h"
#endif
