// What PyTorch needs for its CPU tensors to stand for a device's in the tests of the emulated ops.
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>

extern "C" {
void ptx_allocated(uint64_t address, uint64_t size, const char* name, uint16_t pattern);
void ptx_freed(uint64_t address);
}

namespace {

// Every CPU tensor is a buffer of the device with its extent, between two gaps that belong to none. Memory that
// nothing was written to, by a kernel or by the CPU, holds a pattern: NaN in every floating-point format.
class DeviceMemory final : public c10::Allocator {
 public:
  explicit DeviceMemory(c10::Allocator* host) : host_(host) {}

  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return host_->allocate(0);
    c10::DataPtr memory = host_->allocate(bytes + 2 * kGap);
    auto* data = static_cast<uint8_t*>(memory.mutable_get()) + kGap;
    auto* words = reinterpret_cast<uint16_t*>(data);
    std::fill(words, words + (bytes + 1) / 2, kPattern);
    ptx_allocated(reinterpret_cast<uint64_t>(data), bytes, "a tensor", kPattern);
    // Its owner is noted in the gap before it, because the context has to be the address.
    static_assert(sizeof(c10::DataPtr) <= kGap);
    new (data - kGap) c10::DataPtr(std::move(memory));
    return {data, data, release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  static constexpr size_t kGap = 256;
  static constexpr uint16_t kPattern = 0xFFA5;
  static void release(void* data) {
    if (data == nullptr) return;
    ptx_freed(reinterpret_cast<uint64_t>(data));
    auto* owner = reinterpret_cast<c10::DataPtr*>(static_cast<uint8_t*>(data) - kGap);
    c10::DataPtr memory = std::move(*owner);
    owner->~DataPtr();
  }

  c10::Allocator* host_;
};

// torch has it for CUDA alone: a product of 16 bits that is summed in fp32 and rounded to nothing less.
at::Tensor& addmm_dtype_out(const at::Tensor& self, const at::Tensor& a, const at::Tensor& b,
                            at::ScalarType dtype, const at::Scalar& beta, const at::Scalar& alpha,
                            at::Tensor& out) {
  TORCH_CHECK(a.scalar_type() == b.scalar_type() && a.element_size() == 2 && dtype == at::kFloat &&
              self.scalar_type() == dtype && out.scalar_type() == dtype);
  return at::addmm_out(out, self, a.to(dtype), b.to(dtype), beta, alpha);
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, CPU, m) { m.impl("addmm.dtype_out", addmm_dtype_out); }

extern "C" void track_tensors() {
  c10::SetCPUAllocator(new DeviceMemory(c10::GetCPUAllocator()), /*priority=*/255);
}
