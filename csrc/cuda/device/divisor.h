// Division by a number that the host knows.
#pragma once

#include <cstdint>

namespace rat::cuda {

// The quotient of numbers below 2^31: a multiplication and a shift, where the chip, which has no division, takes some 25
// instructions. Where a kernel's first instructions come from memory, that is most of a microsecond for each division.
//
// With 2^s the smallest power of two that is no less than d, factor is floor(2^(31 + s) / d) + 1: too large by at most 2^s / d units, which
// x < 2^31 cannot turn into a whole one.
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(int64_t divisor) : one_(divisor == 1) {
    int s = 0;
    while ((int64_t{1} << s) < divisor) ++s;
    if (s == 0 || s > 31) return;  // one; or more than every x: the quotient is 0
    factor_ = static_cast<uint32_t>((uint64_t{1} << (31 + s)) / static_cast<uint64_t>(divisor) + 1);
    shift_ = static_cast<uint32_t>(s - 1);
  }

#ifdef __CUDACC__
  __device__ __forceinline__ uint32_t quotient(uint32_t x) const { return one_ ? x : __umulhi(x, factor_) >> shift_; }
#endif

 private:
  uint32_t factor_ = 0, shift_ = 0;
  bool one_ = true;
};

}  // namespace rat::cuda
