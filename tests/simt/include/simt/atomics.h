// Atomics are relaxed, as CUDA's are; only fences order other memory. ThreadSanitizer knows no
// fences, so their rule is spelled out for it: what a thread did before a fence is visible to one
// that passes a fence after it saw an atomic that the first thread wrote behind its fence.
#pragma once

#include <cstring>

#include "simt/sites.h"

namespace simt {

#ifdef __SANITIZE_THREAD__
void before_atomic(void* at);  // releases, once this thread has passed a fence
void after_atomic(void* at);   // remembers what the next fence acquires
void fence();
#else
inline void before_atomic(void*) {}
inline void after_atomic(void*) {}
inline void fence() {}
#endif

// *at = change(*at); returns the old value. T is a type of 4 or 8 bytes.
template <class T, class Change>
T update(T* at, Where where, const Change& change) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  if (skipped(where)) {
    const T old = *at;
    *at = change(old);
    return old;
  }
  before_atomic(at);
  T old, wanted;
  __atomic_load(at, &old, __ATOMIC_RELAXED);
  do {
    wanted = change(old);
  } while (
      !__atomic_compare_exchange(at, &old, &wanted, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  after_atomic(at);
  return old;
}

template <class T>
struct Same {
  using Type = T;
};
template <class T>
using same = typename Same<T>::Type;  // not deduced from this argument

}  // namespace simt

template <class T>
T atomicAdd(T* at, simt::same<T> x, simt::Where where = simt::Where::current()) {
  return simt::update(at, where, [&](T old) { return static_cast<T>(old + x); });
}
template <class T>
T atomicSub(T* at, simt::same<T> x, simt::Where where = simt::Where::current()) {
  return simt::update(at, where, [&](T old) { return static_cast<T>(old - x); });
}
template <class T>
T atomicMax(T* at, simt::same<T> x, simt::Where where = simt::Where::current()) {
  return simt::update(at, where, [&](T old) { return old < x ? x : old; });
}
template <class T>
T atomicMin(T* at, simt::same<T> x, simt::Where where = simt::Where::current()) {
  return simt::update(at, where, [&](T old) { return x < old ? x : old; });
}
template <class T>
T atomicAnd(T* at, simt::same<T> x, simt::Where where = simt::Where::current()) {
  return simt::update(at, where, [&](T old) { return old & x; });
}
template <class T>
T atomicOr(T* at, simt::same<T> x, simt::Where where = simt::Where::current()) {
  return simt::update(at, where, [&](T old) { return old | x; });
}
template <class T>
T atomicXor(T* at, simt::same<T> x, simt::Where where = simt::Where::current()) {
  return simt::update(at, where, [&](T old) { return old ^ x; });
}
template <class T>
T atomicExch(T* at, simt::same<T> x, simt::Where where = simt::Where::current()) {
  return simt::update(at, where, [&](T) { return x; });
}
template <class T>
T atomicCAS(T* at, simt::same<T> expected, simt::same<T> x,
            simt::Where where = simt::Where::current()) {
  return simt::update(at, where, [&](T old) { return old == expected ? x : old; });
}
inline unsigned atomicInc(unsigned* at, unsigned last, simt::Where where = simt::Where::current()) {
  return simt::update(at, where, [&](unsigned old) { return old >= last ? 0 : old + 1; });
}

inline void __threadfence(simt::Where where = simt::Where::current()) {
  if (!simt::skipped(where)) simt::fence();
}
inline void __threadfence_block(simt::Where where = simt::Where::current()) {
  __threadfence(where);
}
inline void __threadfence_system(simt::Where where = simt::Where::current()) {
  __threadfence(where);
}
