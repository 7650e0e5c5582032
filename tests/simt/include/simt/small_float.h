// 16-bit numbers: arithmetic in f32, rounded after each operation, which for + - * / gives the same
// bits as arithmetic in 16.
#pragma once

#include <cstdint>

#include "device/half.h"
#include "simt/types.h"

namespace simt {

struct F16 {
  static std::uint16_t round(float x) { return thaw::f32_to_f16(x); }
  static float widen(std::uint16_t bits) { return thaw::f16_to_f32(bits); }
};
struct BF16 {
  static std::uint16_t round(float x) { return thaw::f32_to_bf16(x); }
  static float widen(std::uint16_t bits) { return thaw::bf16_to_f32(bits); }
};

template <class Format>
struct SmallFloat {
  std::uint16_t bits;
  SmallFloat() = default;
  SmallFloat(float x) : bits(Format::round(x)) {}
  operator float() const { return Format::widen(bits); }

  friend SmallFloat operator+(SmallFloat a, SmallFloat b) { return float{a} + float{b}; }
  friend SmallFloat operator-(SmallFloat a, SmallFloat b) { return float{a} - float{b}; }
  friend SmallFloat operator*(SmallFloat a, SmallFloat b) { return float{a} * float{b}; }
  friend SmallFloat operator/(SmallFloat a, SmallFloat b) { return float{a} / float{b}; }
  friend SmallFloat operator-(SmallFloat a) { return -float{a}; }
  friend bool operator<(SmallFloat a, SmallFloat b) { return float{a} < float{b}; }
  friend bool operator>(SmallFloat a, SmallFloat b) { return float{a} > float{b}; }
  friend bool operator==(SmallFloat a, SmallFloat b) { return float{a} == float{b}; }
};

template <class Format>
struct alignas(4) SmallFloat2 {
  SmallFloat<Format> x, y;
};

template <class Format>
float2 widen(SmallFloat2<Format> a) {
  return {a.x, a.y};
}

}  // namespace simt

template <class F>
simt::SmallFloat<F> __hadd(simt::SmallFloat<F> a, simt::SmallFloat<F> b) {
  return a + b;
}
template <class F>
simt::SmallFloat<F> __hsub(simt::SmallFloat<F> a, simt::SmallFloat<F> b) {
  return a - b;
}
template <class F>
simt::SmallFloat<F> __hmul(simt::SmallFloat<F> a, simt::SmallFloat<F> b) {
  return a * b;
}
template <class F>
simt::SmallFloat<F> __hmax(simt::SmallFloat<F> a, simt::SmallFloat<F> b) {
  return a < b ? b : a;
}
template <class F>
simt::SmallFloat<F> __hfma(simt::SmallFloat<F> a, simt::SmallFloat<F> b, simt::SmallFloat<F> c) {
  return float{a} * float{b} + float{c};
}
template <class F>
simt::SmallFloat2<F> __hadd2(simt::SmallFloat2<F> a, simt::SmallFloat2<F> b) {
  return {a.x + b.x, a.y + b.y};
}
template <class F>
simt::SmallFloat2<F> __hsub2(simt::SmallFloat2<F> a, simt::SmallFloat2<F> b) {
  return {a.x - b.x, a.y - b.y};
}
template <class F>
simt::SmallFloat2<F> __hmul2(simt::SmallFloat2<F> a, simt::SmallFloat2<F> b) {
  return {a.x * b.x, a.y * b.y};
}
template <class F>
simt::SmallFloat2<F> __hfma2(simt::SmallFloat2<F> a, simt::SmallFloat2<F> b,
                             simt::SmallFloat2<F> c) {
  return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
template <class F>
float __low2float(simt::SmallFloat2<F> a) {
  return a.x;
}
template <class F>
float __high2float(simt::SmallFloat2<F> a) {
  return a.y;
}
