// Exchanges between the lanes of a warp: the last lane to arrive gives each its result.
#include <algorithm>

#include "device/half.h"
#include "tests/simt/memory.h"
#include "tests/simt/multiprocessor.h"

namespace simt {
namespace {

Fiber& checked_lane(unsigned mask, Where where) {
  Fiber& f = *active->current;
  if ((mask >> lane() & 1u) == 0)
    fatal("%s:%u: lane %d is not in its own mask %08x", where.file_name(), where.line(), lane(),
          mask);
  f.mask = mask, f.where = where;
  return f;
}

std::int64_t join(Exchange what, std::int64_t x, std::int64_t y) {
  switch (what) {
    case Exchange::kAdd:
      return x + y;
    case Exchange::kMin:
      return std::min(x, y);
    case Exchange::kMax:
      return std::max(x, y);
    case Exchange::kAnd:
      return x & y;
    case Exchange::kXor:
      return x ^ y;
    default:
      return x | y;
  }
}

constexpr int kOfIntegers = 2;  // what is multiplied: 0 f16, 1 bf16

void multiply_integers(const std::unique_ptr<Fiber>* lanes) {
  const auto number = [](std::uint32_t four, int which) {
    return static_cast<std::int8_t>(four >> 8 * which);
  };
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
      for (int k = 0; k < 32; ++k) {
        const int t = k % 16 / 4, high = k / 16;
        lanes[lane]->dots[i] += number(lanes[row % 8 * 4 + t]->a[row / 8 + 2 * high], k % 4) *
                                number(lanes[col * 4 + t]->b[high], k % 4);
      }
    }
  }
}

// d += A B^T of the warp's fragments, in the order of k; see device/kernel.cuh for who holds what.
void multiply(const std::unique_ptr<Fiber>* lanes, bool bf16) {
  const auto number = [&](std::uint32_t pair, int which) {
    const auto bits = static_cast<std::uint16_t>(pair >> 16 * which);
    return bf16 ? thaw::bf16_to_f32(bits) : thaw::f16_to_f32(bits);
  };
  float a[16][16], b[8][16];
  for (int lane = 0; lane < kWarp; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int c = 2 * t + i % 2;
      a[g + i / 2 % 2 * 8][c + i / 4 * 8] = number(lanes[lane]->a[i / 2], i % 2);
      if (i < 4) b[g][c + i / 2 * 8] = number(lanes[lane]->b[i / 2], i % 2);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
      for (int k = 0; k < 16; ++k) lanes[lane]->product[i] += a[row][k] * b[col][k];
    }
  }
}

// Every lane of the mask is here: gives each its result.
void complete(const std::unique_ptr<Fiber>* lanes, const Fiber& last) {
  std::int64_t joined = 0;
  bool any = false;
  for (int i = 0; i < kWarp; ++i) {
    if ((last.mask >> i & 1u) == 0) continue;
    const std::int64_t value =
        last.what == Exchange::kBallot ? lanes[i]->value << i : lanes[i]->value;
    joined = any ? join(last.what, joined, value) : value;
    any = true;
  }
  for (int i = 0; i < kWarp; ++i) {
    if ((last.mask >> i & 1u) == 0) continue;
    lanes[i]->result = joined;
    if (last.what != Exchange::kShuffle) continue;
    const int source = lanes[i]->argument;
    if ((last.mask >> source & 1u) == 0)
      fatal("shuffle at %s:%u: lane %d reads lane %d, which is not in the mask %08x",
            last.where.file_name(), last.where.line(), i, source, last.mask);
    lanes[i]->result = lanes[source]->value;
  }
  if (last.what != Exchange::kMultiply) return;
  if (last.argument == kOfIntegers) return multiply_integers(lanes);
  multiply(lanes, last.argument != 0);
}

// The last lane to arrive joins the clocks of all: 32 acquisitions and not 32 by each. By turns: it
// may be the last of the next __syncwarp before all have left this one.
void join_clocks(const std::unique_ptr<Fiber>* lanes, Fiber& last) {
  char* joined = &last.joined[last.turn ^= 1u];
  for (int i = 0; i < kWarp; ++i) {
    if ((last.mask >> i & 1u) == 0) continue;
    acquire(&lanes[i]->arrived);
    lanes[i]->complete = joined;
  }
  release(joined);
}

}  // namespace

int lane() { return active->current->thread % kWarp; }

std::int64_t exchange(Exchange what, unsigned mask, std::int64_t value, int argument, Where where) {
  Fiber& f = checked_lane(mask, where);
  if (what == Exchange::kSync && skipped(where)) return 0;
  f.what = what, f.value = value, f.argument = argument;
  const bool orders = what == Exchange::kSync;  // no other exchange orders memory
  if (orders) release(&f.arrived);
  const int first = f.thread - lane();
  const std::unique_ptr<Fiber>* lanes = &active->fibers[first];
  f.state = State::kInExchange;
  bool all = true;
  for (int i = 0; i < kWarp && all; ++i) {
    if ((mask >> i & 1u) == 0) continue;
    all = first + i < active->n_threads && lanes[i]->state == State::kInExchange &&
          lanes[i]->mask == mask && lanes[i]->what == what &&
          lanes[i]->where.line() == where.line();
  }
  if (all) {
    complete(lanes, f);
    if (orders) join_clocks(lanes, f);
    const int start = random().below(kWarp);
    for (int i = 0; i < kWarp; ++i) {
      const int next = (start + i) % kWarp;
      if (mask >> next & 1u) push(first + next);
    }
  }
  suspend();
  if (orders) acquire(f.complete);
  return f.result;
}

void mma(float* d, const std::uint32_t* a, const std::uint32_t* b, bool bf16, Where where) {
  Fiber& f = *active->current;
  f.product = d, f.a = a, f.b = b;
  exchange(Exchange::kMultiply, 0xffffffffu, 0, bf16, where);
}
void mma(int* d, const std::uint32_t* a, const std::uint32_t* b, Where where) {
  Fiber& f = *active->current;
  f.dots = d, f.a = a, f.b = b;
  exchange(Exchange::kMultiply, 0xffffffffu, 0, kOfIntegers, where);
}

}  // namespace simt
