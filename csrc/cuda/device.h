// Errors of the CUDA runtime as exceptions, and a device made current for a scope.
#pragma once

#ifdef INFLUENCE_FAST_SIMT

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

#else

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    if (device_ != before_) check_cuda(cudaSetDevice(device_), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (device_ != before_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, before_ = 0;
};

#endif  // INFLUENCE_FAST_SIMT
