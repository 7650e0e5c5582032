// Builds the bytes of a GGUF file, and lies about them where a test asks for it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace thaw::testing {

// Appends the bytes of a number, little-endian.
template <class T>
void put(std::string& out, T value) {
  char bytes[sizeof(T)];
  std::memcpy(bytes, &value, sizeof(T));
  out.append(bytes, sizeof(T));
}

// A copy of exactly these bytes, so that AddressSanitizer sees a read past the end.
inline std::vector<std::byte> exact(const std::string& bytes) {
  const auto* data = reinterpret_cast<const std::byte*>(bytes.data());
  return {data, data + bytes.size()};
}

class GgufWriter {
 public:
  // Value types as numbered in the file.
  enum Type : std::uint32_t {
    kU8,
    kI8,
    kU16,
    kI16,
    kU32,
    kI32,
    kF32,
    kBool,
    kString,
    kArray,
    kU64,
    kI64,
    kF64
  };

  struct TensorSpec {
    std::string name;
    std::vector<std::uint64_t> dims;  // innermost (columns) first
    std::uint32_t type;               // number of the ggml type
    std::string data;
    std::optional<std::uint64_t> offset = {};  // instead of the true one
  };

  std::string magic = "GGUF";
  std::uint32_t version = 3;
  std::optional<std::uint64_t> n_tensors, n_entries;  // instead of the true counts
  std::uint64_t alignment = 32;                       // of the data; set() general.alignment too
  std::vector<TensorSpec> tensors;

  // Sets a metadata value, replacing one of that key.
  void set(const std::string& key, std::uint32_t value) { set_raw(key, kU32, number(value)); }
  void set(const std::string& key, float value) { set_raw(key, kF32, number(value)); }
  void set(const std::string& key, bool value) { set_raw(key, kBool, number(std::uint8_t{value})); }
  void set(const std::string& key, const char* value) { set_raw(key, kString, text(value)); }
  void set(const std::string& key, const std::string& value) { set_raw(key, kString, text(value)); }
  void set(const std::string& key, const std::vector<std::string>& values) {
    std::string payload = array_start(kString, values.size());
    for (const std::string& value : values) payload += text(value);
    set_raw(key, kArray, payload);
  }
  void set(const std::string& key, const std::vector<std::int32_t>& values) {
    set_raw(key, kArray, array_start(kI32, values.size()) + numbers(values));
  }
  void set(const std::string& key, const std::vector<float>& values) {
    set_raw(key, kArray, array_start(kF32, values.size()) + numbers(values));
  }
  void set_raw(const std::string& key, std::uint32_t type, const std::string& payload) {
    erase(key);
    entries.push_back({key, type, payload});
  }
  void erase(const std::string& key) {
    std::erase_if(entries, [&](const Entry& entry) { return entry.key == key; });
  }

  TensorSpec& tensor(std::string_view name) {
    return *std::find_if(tensors.begin(), tensors.end(),
                         [&](const TensorSpec& spec) { return spec.name == name; });
  }

  static std::string text(const std::string& value) {
    std::string out;
    put(out, std::uint64_t{value.size()});
    return out + value;
  }
  static std::string array_start(std::uint32_t element_type, std::uint64_t n) {
    std::string out;
    put(out, element_type);
    put(out, n);
    return out;
  }

  // Everything before the tensors' data.
  std::string header() const {
    std::string out = magic;
    put(out, version);
    put(out, n_tensors.value_or(tensors.size()));
    put(out, n_entries.value_or(entries.size()));
    for (const Entry& entry : entries) {
      out += text(entry.key);
      put(out, entry.type);
      out += entry.payload;
    }
    std::uint64_t offset = 0;
    for (const TensorSpec& spec : tensors) {
      out += text(spec.name);
      put(out, static_cast<std::uint32_t>(spec.dims.size()));
      for (const std::uint64_t size : spec.dims) put(out, size);
      put(out, spec.type);
      put(out, spec.offset.value_or(offset));
      offset = aligned(offset + spec.data.size());
    }
    return out;
  }

  std::string bytes() const {
    std::string out = header();
    for (const TensorSpec& spec : tensors) {
      out.resize(aligned(out.size()));
      out += spec.data;
    }
    return out;
  }

  struct Entry {
    std::string key;
    std::uint32_t type;
    std::string payload;
  };
  std::vector<Entry> entries;

 private:
  std::size_t aligned(std::size_t n) const { return (n + alignment - 1) / alignment * alignment; }
  template <class T>
  static std::string number(T value) {
    std::string out;
    put(out, value);
    return out;
  }
  template <class T>
  static std::string numbers(const std::vector<T>& values) {
    std::string out;
    for (const T value : values) put(out, value);
    return out;
  }
};

}  // namespace thaw::testing
