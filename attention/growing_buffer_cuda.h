// Device memory that kernels of one call pass things on in.
#pragma once

#include <vector>

#include "device/cuda.h"

namespace thaw {

// Grows to the most that was asked for. What is outgrown stays: graphs may refer to it.
template <class T>
class GrowingBuffer {
 public:
  // At least n elements, not initialised.
  T* reserve(std::int64_t n) {
    if (now_.size() < static_cast<std::size_t>(n)) {
      outgrown_.push_back(std::move(now_));
      now_ = DeviceBuffer<T>(static_cast<std::size_t>(n), "attention");
    }
    return now_.data();
  }
  // The same; 0 when they are new.
  T* reserve_zeros(std::int64_t n, const Stream& stream) {
    const bool grows = now_.size() < static_cast<std::size_t>(n);
    T* data = reserve(n);
    if (grows) fill_device(data, 0, now_.bytes(), stream);
    return data;
  }

 private:
  DeviceBuffer<T> now_;
  std::vector<DeviceBuffer<T>> outgrown_;
};

}  // namespace thaw
