// CUB's device-wide sum, prefix sum and radix sort as its own host code launches them. The scan's and
// the sort's tiles wait for each other's results in global memory (decoupled look-back).
#include <cstdint>
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_reduce.cuh>
#include <cub/device/device_scan.cuh>

extern "C" {

// With storage null, only *bytes is set: what the algorithm needs there.
int device_sum(void* storage, size_t* bytes, const float* in, float* out, int n) {
  return cub::DeviceReduce::Sum(storage, *bytes, in, out, n);
}

int device_scan(void* storage, size_t* bytes, const int* in, int* out, int n) {
  return cub::DeviceScan::ExclusiveSum(storage, *bytes, in, out, n);
}

int device_sort(void* storage, size_t* bytes, const uint32_t* keys, uint32_t* keys_out,
                const int* values, int* values_out, int n) {
  return cub::DeviceRadixSort::SortPairs(storage, *bytes, keys, keys_out, values, values_out, n);
}
}
