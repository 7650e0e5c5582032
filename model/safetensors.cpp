#include "model/safetensors.h"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "device/error.h"
#include "device/json.h"
#include "model/file_kind.h"

namespace thaw {
namespace {

using nlohmann::json;

constexpr std::uint64_t kLengthBytes = 8;

std::optional<DType> dtype_of_safetensors(std::string_view name) {
  for (const DType type : {DType::kF32, DType::kF16, DType::kBF16}) {
    if (dtype_info(type).name == name) return type;
  }
  return std::nullopt;
}

std::string shown(const std::vector<std::uint64_t>& shape) {
  std::string out;
  for (const std::uint64_t size : shape) out += join(out.empty() ? "" : " x ", size);
  return shape.empty() ? "a scalar" : out;
}

// The list of whole numbers at object[key].
std::vector<std::uint64_t> numbers(const json& object, const char* key, const std::string& field) {
  const auto it = object.find(key);
  require(it != object.end() && it->is_array(), field, ": ", key,
          ": expected a list of whole numbers, found ",
          it == object.end() ? "none" : it->type_name());
  std::vector<std::uint64_t> out;
  for (const json& value : *it) {
    require(value.is_number_unsigned(), field, ": ", key, ": expected whole numbers, found ",
            printable(value.dump(-1, ' ', true, json::error_handler_t::replace)));
    out.push_back(value.get<std::uint64_t>());
  }
  return out;
}

}  // namespace

Safetensors::Safetensors(std::span<const std::byte> bytes, const std::string& source)
    : source_(source) {
  const auto kind = mistaken_for(bytes);
  require(kind.empty(), source, ": expected safetensors, found ", kind);
  require(bytes.size() >= kLengthBytes, source, ": header length: expected ", kLengthBytes,
          " bytes, found ", bytes.size());
  std::uint64_t length = 0;
  std::memcpy(&length, bytes.data(), kLengthBytes);
  require(length <= bytes.size() - kLengthBytes, source, ": header length: expected at most the ",
          bytes.size() - kLengthBytes, " bytes that follow, found ", length);
  data_ = bytes.subspan(kLengthBytes + length);

  const std::string_view text(reinterpret_cast<const char*>(bytes.data()) + kLengthBytes, length);
  const json header = parse_json(text, source + ": header");
  require(header.is_object(), source, ": header: expected a JSON object, found ",
          header.type_name());
  for (const auto& [name, value] : header.items()) {
    if (name == "__metadata__") continue;
    const std::string field = join(source, ": tensor ", printable(name));
    require(value.is_object(), field, ": expected a JSON object, found ", value.type_name());
    const auto dtype = value.find("dtype");
    require(dtype != value.end() && dtype->is_string(), field, ": dtype: expected a string, found ",
            dtype == value.end() ? "none" : dtype->type_name());
    const auto offsets = numbers(value, "data_offsets", field);
    require(offsets.size() == 2 && offsets[0] <= offsets[1] && offsets[1] <= data_.size(), field,
            ": data_offsets: expected begin <= end <= ", data_.size(), ", found ",
            value["data_offsets"].size() == 2 ? join(offsets[0], " and ", offsets[1])
                                              : join(offsets.size(), " numbers"));
    entries_[name] = {dtype->get<std::string>(), numbers(value, "shape", field), offsets[0],
                      offsets[1]};
  }
  check_overlap();
}

void Safetensors::check_overlap() const {
  std::vector<std::pair<const std::string*, const Entry*>> order;
  for (const auto& [name, entry] : entries_) order.emplace_back(&name, &entry);
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
    return std::pair(a.second->begin, a.second->end) < std::pair(b.second->begin, b.second->end);
  });
  for (std::size_t i = 1; i < order.size(); ++i) {
    const auto& [before_name, before] = order[i - 1];
    const auto& [name, entry] = order[i];
    require(entry->begin >= before->end, source_, ": tensor ", printable(*name),
            ": data_offsets: expected to begin at ", before->end, " or later, the end of ",
            printable(*before_name), ", found ", entry->begin);
  }
}

std::vector<std::string> Safetensors::names() const {
  std::vector<std::string> out;
  for (const auto& [name, entry] : entries_) out.push_back(name);
  return out;
}

Tensor Safetensors::tensor(std::string_view name) const {
  const Entry& entry = entries_.find(name)->second;
  const std::string field = join(source_, ": tensor ", printable(name));
  const auto type = dtype_of_safetensors(entry.dtype);
  require(type.has_value(), field, ": dtype: expected F32, F16 or BF16, found ",
          printable(entry.dtype));
  require(entry.shape.size() == 1 || entry.shape.size() == 2, field,
          ": shape: expected a vector or a matrix, found ", shown(entry.shape));
  const auto element = static_cast<std::uint64_t>(dtype_info(*type).block_bytes);
  std::uint64_t bytes = element;
  for (const std::uint64_t size : entry.shape) {
    require(size >= 1, field, ": shape: expected sizes of 1 or more, found ", shown(entry.shape));
    require(!__builtin_mul_overflow(bytes, size, &bytes), field,
            ": shape: expected what fits the file, found ", shown(entry.shape));
  }
  require(bytes == entry.end - entry.begin, field, ": data_offsets: expected ", bytes,
          " bytes for ", shown(entry.shape), " in ", entry.dtype, ", found ",
          entry.end - entry.begin);
  const std::byte* data = data_.data() + entry.begin;
  const std::uint64_t address = reinterpret_cast<std::uintptr_t>(data);
  require(address % element == 0, field, ": data: expected to begin at a multiple of ", element,
          " bytes in the file, found a remainder of ", address % element);
  return {std::string(name), *type,
          entry.shape.size() == 2 ? static_cast<std::int64_t>(entry.shape[0]) : 1,
          static_cast<std::int64_t>(entry.shape.back()), data};
}

}  // namespace thaw
