#include "model/gguf.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <optional>
#include <span>
#include <sstream>
#include <utility>

#include "device/error.h"
#include "model/file_kind.h"

namespace thaw {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF files are read in place");

// More than any real file has; they bound the memory that a small hostile file can ask for.
constexpr std::uint64_t kMaxEntries = 1 << 16;        // metadata keys, and tensors
constexpr std::uint64_t kMaxArrayElements = 1 << 24;  // in all arrays together
constexpr int kMaxArrayDepth = 4;
constexpr std::uint64_t kMaxName = 65535;  // bytes of a key, as the format says
constexpr std::uint64_t kMaxText = 1 << 24;
constexpr std::uint64_t kMaxLength = std::numeric_limits<std::int64_t>::max();

// Metadata value types, by their number in the file.
enum class ValueType : std::uint32_t {
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
constexpr std::uint32_t kValueTypes = 13;

// Bytes of a value; of strings and arrays, the least they can have.
std::uint64_t least_bytes(ValueType type) {
  constexpr std::uint8_t kBytes[kValueTypes] = {1, 1, 2, 2, 4, 4, 4, 1, 8, 12, 8, 8, 8};
  return kBytes[static_cast<std::uint32_t>(type)];
}

// Names of ggml tensor types, number 0 first (ggml.h, enum ggml_type); "-" where there is none.
constexpr const char* kGgmlTypes =
    "F32 F16 Q4_0 Q4_1 - - Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS "
    "IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M BF16 - - - TQ1_0 TQ2_0 - - - "
    "MXFP4";

std::string ggml_type_name(std::uint32_t number) {
  std::istringstream names(kGgmlTypes);
  std::string name;
  for (std::uint64_t i = 0; i <= number && names >> name; ++i) {
    if (i == number && name != "-") return name;
  }
  return join("number ", number);
}

struct TensorInfo {
  Tensor tensor;
  std::uint64_t offset = 0;  // from the start of the data
};

class Parser {
 public:
  Parser(std::span<const std::byte> bytes, const std::string& source)
      : bytes_(bytes), source_(source) {}

  void header();
  std::pair<std::string, GgufValue> entry();  // index 0 .. n_entries - 1
  TensorInfo tensor_info();
  // Checks where the tensors lie and points them at their data.
  void place(std::vector<TensorInfo>& infos, std::uint64_t alignment) const;

  int version = 0;
  std::uint64_t n_tensors = 0;
  std::uint64_t n_entries = 0;

 private:
  std::uint64_t left() const { return bytes_.size() - at_; }
  void need(std::uint64_t n, std::string_view field) const;
  template <class T>
  T scalar(std::string_view field);
  std::string_view text(std::string_view field, std::uint64_t least = 0,
                        std::uint64_t most = kMaxText);
  ValueType value_type(std::string_view field);
  GgufValue value(ValueType type, std::string_view field, int depth);
  GgufValue array(std::string_view field, int depth);
  template <class T>
  GgufValue elements(ValueType type, std::uint64_t n, std::string_view field);

  std::span<const std::byte> bytes_;
  const std::string& source_;
  std::uint64_t at_ = 0;
  std::uint64_t array_elements_ = 0;
};

void Parser::need(std::uint64_t n, std::string_view field) const {
  require(n <= left(), source_, ": ", field, ": expected ", n, " bytes at offset ", at_, ", found ",
          left(), " before the end of the file");
}

template <class T>
T Parser::scalar(std::string_view field) {
  need(sizeof(T), field);
  T value;
  std::memcpy(&value, bytes_.data() + at_, sizeof(T));
  at_ += sizeof(T);
  return value;
}

std::string_view Parser::text(std::string_view field, std::uint64_t least, std::uint64_t most) {
  const auto n = scalar<std::uint64_t>(field);
  need(n, field);
  require(n >= least, source_, ": ", field, ": expected a text, found an empty one");
  require(n <= most, source_, ": ", field, ": expected a text of at most ", most, " bytes, found ",
          n);
  const auto* begin = reinterpret_cast<const char*>(bytes_.data() + at_);
  at_ += n;
  return {begin, static_cast<std::size_t>(n)};
}

void Parser::header() {
  const auto kind = mistaken_for(bytes_);
  require(kind.empty(), source_, ": expected a GGUF model, found ", kind);
  constexpr std::string_view kMagic = "GGUF";
  const std::string_view start(reinterpret_cast<const char*>(bytes_.data()),
                               std::min(bytes_.size(), kMagic.size()));
  require(start == kMagic, source_, ": magic: expected \"GGUF\", found \"", printable(start), "\"");
  at_ = kMagic.size();
  const auto number = scalar<std::uint32_t>("version");
  require(number != 0x02000000 && number != 0x03000000, source_,
          ": byte order: expected a little-endian GGUF file, found a big-endian one");
  require(number == 2 || number == 3, source_, ": version: expected 2 or 3, found ", number);
  version = static_cast<int>(number);
  n_tensors = scalar<std::uint64_t>("tensor count");
  n_entries = scalar<std::uint64_t>("metadata count");
  for (const auto& [field, n] :
       {std::pair("tensor count", n_tensors), {"metadata count", n_entries}}) {
    require(n <= kMaxEntries, source_, ": ", field, ": expected at most ", kMaxEntries, ", found ",
            n);
  }
}

ValueType Parser::value_type(std::string_view field) {
  const auto number = scalar<std::uint32_t>(field);
  require(number < kValueTypes, source_, ": ", field, ": value type: expected 0 to ",
          kValueTypes - 1, ", found ", number);
  return static_cast<ValueType>(number);
}

std::pair<std::string, GgufValue> Parser::entry() {
  const std::string key(text("metadata key", 1, kMaxName));
  const std::string field = printable(key);
  const ValueType type = value_type(field);
  return {key, value(type, field, 0)};
}

GgufValue Parser::value(ValueType type, std::string_view field, int depth) {
  switch (type) {
    case ValueType::kU8:
      return std::uint64_t{scalar<std::uint8_t>(field)};
    case ValueType::kU16:
      return std::uint64_t{scalar<std::uint16_t>(field)};
    case ValueType::kU32:
      return std::uint64_t{scalar<std::uint32_t>(field)};
    case ValueType::kU64:
      return scalar<std::uint64_t>(field);
    case ValueType::kI8:
      return std::int64_t{scalar<std::int8_t>(field)};
    case ValueType::kI16:
      return std::int64_t{scalar<std::int16_t>(field)};
    case ValueType::kI32:
      return std::int64_t{scalar<std::int32_t>(field)};
    case ValueType::kI64:
      return scalar<std::int64_t>(field);
    case ValueType::kF32:
      return double{scalar<float>(field)};
    case ValueType::kF64:
      return scalar<double>(field);
    case ValueType::kString:
      return text(field);
    case ValueType::kArray:
      return array(field, depth);
    case ValueType::kBool:
      break;
  }
  const int byte = scalar<std::uint8_t>(field);
  require(byte <= 1, source_, ": ", field, ": expected a bool of 0 or 1, found ", byte);
  return byte == 1;
}

template <class T>
GgufValue Parser::elements(ValueType type, std::uint64_t n, std::string_view field) {
  std::vector<T> out;
  out.reserve(n);
  for (std::uint64_t i = 0; i < n; ++i) {
    const GgufValue element = value(type, field, 0);
    if constexpr (std::is_same_v<T, std::int64_t>) {
      if (const auto* u = std::get_if<std::uint64_t>(&element)) {
        require(*u <= kMaxLength, source_, ": ", field, ": expected elements up to ", kMaxLength,
                ", found ", *u);
        out.push_back(static_cast<std::int64_t>(*u));
      } else if (const auto* b = std::get_if<bool>(&element)) {
        out.push_back(*b ? 1 : 0);
      } else {
        out.push_back(std::get<std::int64_t>(element));
      }
    } else {
      out.push_back(std::get<T>(element));
    }
  }
  return out;
}

GgufValue Parser::array(std::string_view field, int depth) {
  require(depth < kMaxArrayDepth, source_, ": ", field, ": expected arrays nested at most ",
          kMaxArrayDepth, " deep, found more");
  const ValueType type = value_type(field);
  const auto n = scalar<std::uint64_t>(field);
  const std::uint64_t room = left() / least_bytes(type);
  require(n <= room, source_, ": ", field, ": array length: expected at most the ", room,
          " that fit the rest of the file, found ", n);
  array_elements_ += n;
  require(array_elements_ <= kMaxArrayElements, source_, ": ", field,
          ": array elements in the file: expected at most ", kMaxArrayElements, ", found more");
  switch (type) {
    case ValueType::kString:
      return elements<std::string_view>(type, n, field);
    case ValueType::kF32:
    case ValueType::kF64:
      return elements<double>(type, n, field);
    case ValueType::kArray:
      for (std::uint64_t i = 0; i < n; ++i) array(field, depth + 1);
      return std::vector<std::int64_t>();
    default:
      return elements<std::int64_t>(type, n, field);
  }
}

TensorInfo Parser::tensor_info() {
  TensorInfo info;
  Tensor& tensor = info.tensor;
  tensor.name = text("tensor name", 1, kMaxName);
  const std::string field = join("tensor ", printable(tensor.name));
  const auto n_dims = scalar<std::uint32_t>(field + ": dimensions");
  require(n_dims >= 1 && n_dims <= 4, source_, ": ", field, ": dimensions: expected 1 to 4, found ",
          n_dims);
  std::uint64_t dims[4] = {1, 1, 1, 1};  // innermost first: columns, rows, ...
  for (std::uint32_t i = 0; i < n_dims; ++i) {
    dims[i] = scalar<std::uint64_t>(field + ": shape");
    require(dims[i] >= 1 && dims[i] <= kMaxLength, source_, ": ", field,
            ": shape: expected sizes of 1 to ", kMaxLength, ", found ", dims[i]);
    require(i < 2 || dims[i] == 1, source_, ": ", field,
            ": shape: expected a vector or a matrix, found size ", dims[i], " in dimension ",
            i + 1);
  }
  const std::string format_name = ggml_type_name(scalar<std::uint32_t>(field + ": type"));
  const std::optional<DType> type = dtype_named(format_name);
  require(type.has_value(), source_, ": ", field, ": type: expected one of ", dtype_names(),
          ", found ", format_name);
  info.offset = scalar<std::uint64_t>(field + ": offset");

  tensor.type = *type;
  tensor.cols = static_cast<std::int64_t>(dims[0]);
  tensor.rows = static_cast<std::int64_t>(dims[1]);
  const DTypeInfo& format = dtype_info(*type);
  require(tensor.cols % format.block == 0, source_, ": ", field, ": shape: expected a multiple of ",
          format.block, " columns in ", format.name, ", found ", tensor.cols);
  std::int64_t bytes = 0;
  require(!__builtin_mul_overflow(tensor.cols / format.block, format.block_bytes, &bytes) &&
              !__builtin_mul_overflow(bytes, tensor.rows, &bytes) &&
              static_cast<std::uint64_t>(bytes) <= bytes_.size(),
          source_, ": ", field, ": shape: expected what fits the file of ", bytes_.size(),
          " bytes, found ", tensor.rows, " x ", tensor.cols, " in ", format.name);
  return info;
}

void Parser::place(std::vector<TensorInfo>& infos, std::uint64_t alignment) const {
  const std::uint64_t data =
      std::min<std::uint64_t>((at_ + alignment - 1) / alignment * alignment, bytes_.size());
  const std::uint64_t room = bytes_.size() - data;
  std::vector<const TensorInfo*> order;
  for (TensorInfo& info : infos) {
    const std::string field = join("tensor ", printable(info.tensor.name));
    const auto bytes = static_cast<std::uint64_t>(info.tensor.bytes());
    require(info.offset % alignment == 0, source_, ": ", field, ": offset: expected a multiple of ",
            alignment, ", found ", info.offset);
    require(info.offset <= room && bytes <= room - info.offset, source_, ": ", field,
            ": data: expected ", bytes, " bytes at offset ", info.offset,
            " of the data, found only ", room, " bytes of data in the file");
    info.tensor.data = bytes_.data() + data + info.offset;
    order.push_back(&info);
  }
  std::sort(order.begin(), order.end(), [](auto* a, auto* b) { return a->offset < b->offset; });
  for (std::size_t i = 1; i < order.size(); ++i) {
    const TensorInfo& before = *order[i - 1];
    const std::uint64_t end = before.offset + static_cast<std::uint64_t>(before.tensor.bytes());
    require(order[i]->offset >= end, source_, ": tensor ", printable(order[i]->tensor.name),
            ": offset: expected at least ", end, ", the end of ", printable(before.tensor.name),
            ", found ", order[i]->offset);
  }
}

std::uint64_t alignment_of(const Gguf& gguf) {
  constexpr std::string_view kKey = "general.alignment";
  const std::int64_t alignment = gguf.integer(kKey, 32);
  require(alignment >= 8 && alignment <= (1 << 20) && (alignment & (alignment - 1)) == 0,
          gguf.path().string(), ": ", kKey, ": expected a power of two from 8 to 1048576, found ",
          alignment);
  return static_cast<std::uint64_t>(alignment);
}

std::string_view kind_of(const GgufValue& value) {
  constexpr std::string_view kKinds[] = {"an integer",
                                         "an integer",
                                         "a real number",
                                         "a bool",
                                         "a string",
                                         "an array of integers",
                                         "an array of real numbers",
                                         "an array of strings"};
  return kKinds[value.index()];
}

}  // namespace

Gguf::Gguf(const std::filesystem::path& path) : file_(path), path_(path) { parse(file_.bytes()); }

Gguf::Gguf(std::span<const std::byte> bytes, const std::string& name) : path_(name) {
  parse(bytes);
}

void Gguf::parse(std::span<const std::byte> bytes) {
  const std::string source = path_.string();
  Parser parser(bytes, source);
  parser.header();
  version_ = parser.version;
  for (std::uint64_t i = 0; i < parser.n_entries; ++i) {
    const auto [it, inserted] = metadata_.insert(parser.entry());
    require(inserted, source, ": ", printable(it->first),
            ": expected the key once, found it twice");
  }
  std::vector<TensorInfo> infos;
  for (std::uint64_t i = 0; i < parser.n_tensors; ++i) infos.push_back(parser.tensor_info());
  parser.place(infos, alignment_of(*this));
  for (TensorInfo& info : infos) {
    const auto [it, inserted] = index_.emplace(info.tensor.name, tensors_.size());
    require(inserted, source, ": tensor ", printable(info.tensor.name),
            ": expected the name once, found it twice");
    tensors_.push_back(std::move(info.tensor));
  }
}

const Tensor* Gguf::find_tensor(std::string_view name) const {
  const auto it = index_.find(name);
  return it == index_.end() ? nullptr : &tensors_[it->second];
}

bool Gguf::has(std::string_view key) const { return metadata_.find(key) != metadata_.end(); }

const GgufValue& Gguf::value(std::string_view key) const {
  const auto it = metadata_.find(key);
  require(it != metadata_.end(), path_.string(), ": ", key, ": expected the key, found none");
  return it->second;
}

template <class T>
const T& Gguf::get(std::string_view key, std::string_view wanted) const {
  const GgufValue& found = value(key);
  const T* typed = std::get_if<T>(&found);
  require(typed, path_.string(), ": ", key, ": expected ", wanted, ", found ", kind_of(found));
  return *typed;
}

std::int64_t Gguf::integer(std::string_view key) const {
  if (const auto* u = std::get_if<std::uint64_t>(&value(key))) {
    require(*u <= kMaxLength, path_.string(), ": ", key, ": expected at most ", kMaxLength,
            ", found ", *u);
    return static_cast<std::int64_t>(*u);
  }
  return get<std::int64_t>(key, "an integer");
}

std::int64_t Gguf::integer(std::string_view key, std::int64_t fallback) const {
  return has(key) ? integer(key) : fallback;
}

double Gguf::real(std::string_view key) const { return get<double>(key, "a real number"); }

double Gguf::real(std::string_view key, double fallback) const {
  return has(key) ? real(key) : fallback;
}

bool Gguf::boolean(std::string_view key, bool fallback) const {
  return has(key) ? get<bool>(key, "a bool") : fallback;
}

std::string_view Gguf::string(std::string_view key) const {
  return get<std::string_view>(key, "a string");
}

std::string_view Gguf::string(std::string_view key, std::string_view fallback) const {
  return has(key) ? string(key) : fallback;
}

const std::vector<std::string_view>& Gguf::strings(std::string_view key) const {
  return get<std::vector<std::string_view>>(key, "an array of strings");
}

const std::vector<std::int64_t>& Gguf::integers(std::string_view key) const {
  return get<std::vector<std::int64_t>>(key, "an array of integers");
}

const std::vector<double>& Gguf::reals(std::string_view key) const {
  return get<std::vector<double>>(key, "an array of numbers");
}

}  // namespace thaw
