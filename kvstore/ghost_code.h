// Where the codes and scales of a ghost stand in its group and what they mean: pure functions, the
// same on host and device. kvstore/ghost.h says what they are for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kvstore/policy.h"

namespace thaw {

// +1 or -1 for dimension i of a rotation: a bit of a hash (the finalizer of SplitMix64).
THAW_HOST_DEVICE inline float rotation_sign(int i) {
  std::uint64_t h = static_cast<std::uint64_t>(i + 1) * 0x9e3779b97f4a7c15;
  h = (h ^ (h >> 30)) * 0xbf58476d1ce4e5b9;
  h = (h ^ (h >> 27)) * 0x94d049bb133111eb;
  return (h >> 63) != 0 ? -1.0f : 1.0f;
}

// Where part of a code stands: bits [shift, shift + width) of `byte` hold bits [low, low + width)
// of the code. Codes of 3 bits have two parts, of 2 and 1 bits; all others one.
struct CodePlace {
  std::size_t byte;
  int shift, width, low;
};

THAW_HOST_DEVICE inline int code_parts(int bits) { return bits == 3 ? 2 : 1; }

// Eight vectors of 32 codes are packed together, 8 / width of them in the bits of each byte: code
// `lane` of vector i.
THAW_HOST_DEVICE inline CodePlace code_place(int i, int lane, int bits, int part) {
  const int width = bits == 3 ? (part == 0 ? 2 : 1) : bits;
  const int per_byte = 8 / width;
  const std::size_t start = part == 0 ? 0 : 64;
  return {start + static_cast<std::size_t>(i / per_byte * 32 + lane), i % per_byte * width, width,
          part == 0 ? 0 : 2};
}

// Keys, from the group's start: a packet of eight vectors holds 8 dimensions of 32 tokens; a vector
// holds two neighbouring dimensions of 16 tokens. token: 0 .. 31.
THAW_HOST_DEVICE inline CodePlace key_place(int token, int dim, int bits, int part) {
  CodePlace place = code_place(dim % 8 / 2 * 2 + token / 16, token % 16 * 2 + dim % 2, bits, part);
  place.byte += static_cast<std::size_t>(dim / 8 * 32 * bits);
  return place;
}

// Values, from the group's first value code: a packet holds 16 dimensions of 16 tokens; a vector
// holds 16 dimensions of two neighbouring tokens.
THAW_HOST_DEVICE inline CodePlace value_place(int token, int dim, int bits, int part) {
  CodePlace place = code_place(token / 2 % 8, dim % 16 * 2 + token % 2, bits, part);
  place.byte += static_cast<std::size_t>((dim / 16 * 2 + token / 16) * 32 * bits);
  return place;
}

// What a scale byte stands for, over its unit.
THAW_HOST_DEVICE inline float scale_of_byte(std::uint32_t code) {
  const std::uint32_t bits = (code << 18) + ((127u - 4) << 23);
  float scale;
  memcpy(&scale, &bits, sizeof scale);
  return code == 0 ? 0.0f : scale;
}

}  // namespace thaw
