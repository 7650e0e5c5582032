#include <algorithm>

#include "device/error.h"
#include "model/gemm_cuda.h"
#include "model/pack_cuda.cuh"
#include "model/weight_unit_cuda.cuh"

namespace thaw {
namespace {

constexpr int kWidenThreads = 128;
constexpr int kWidenUnits = 4;
constexpr int kRowsTogether = 128;  // rows of W that cuBLASLt's own tiles have, or a part of them
constexpr std::size_t kWorkspaceBytes = 32 << 20;  // at most: what NVIDIA advises for Hopper

void check_blas(cublasStatus_t status, const char* what) {
  require(status == CUBLAS_STATUS_SUCCESS, what, ": ", cublasLtGetStatusString(status));
}

// The format that weights are multiplied in.
DType product_type(DType type) { return dtype_info(type).block == 1 ? type : DType::kF16; }
int padded(DType type, int cols) {  // whole units of 16 bytes
  const int unit = type == DType::kF32 ? 4 : 8;
  return (cols + unit - 1) / unit * unit;
}
std::size_t bytes_of(DType type) { return type == DType::kF32 ? 4 : 2; }
cudaDataType_t cuda_type(DType type) {
  return type == DType::kF32 ? CUDA_R_32F : type == DType::kF16 ? CUDA_R_16F : CUDA_R_16BF;
}

// Computes  tile (n x w.cols, f16) = rows first.. of w, rounded
// Grid      units of all n rows / (kWidenThreads x kWidenUnits), rounded up
// Block     kWidenThreads; a thread widens kWidenUnits units of 16 bytes, all on their way at once
// Shared    a warp's units, widened, so that its lanes write 16 bytes side by side
// Bytes     reads the rows, writes the tile
template <DType kType>
__global__ void __launch_bounds__(kWidenThreads)
    widen_rows(__half* tile, DeviceMatrix w, int first, int n) {
  using Unit = WeightUnit<kType>;
  constexpr int kPieces = Unit::kElements / 8;  // of 16 bytes, of a unit
  __shared__ uint4 widened[kWidenThreads / kWarp][kWarp * kPieces];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int n_units = n * w.units, lane = lane_index();  // units count on from row to row
  const int begin =
      static_cast<int>(blockIdx.x) * kWidenThreads * kWidenUnits + warp_index() * kWarp;
  // Eight lanes that touch piece i of their units, or eight pieces that follow, meet all banks.
  const auto place = [](int unit, int i) {
    return unit * kPieces + (i ^ unit * kPieces / 8 % kPieces);
  };
  uint4* mine = widened[warp_index()];
  Unit units[kWidenUnits];
#pragma unroll
  for (int j = 0; j < kWidenUnits; ++j) {
    const int unit = begin + j * kWidenThreads + lane;
    if (unit < n_units) units[j].load(row_of(w, first + unit / w.units), unit % w.units);
  }
#pragma unroll
  for (int j = 0; j < kWidenUnits; ++j) {
    const Unit& unit = units[j];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const float4 a = unit.weights(2 * i), b = unit.weights(2 * i + 1);
      mine[place(lane, i)] = make_uint4(pack2<__half>(a.x, a.y), pack2<__half>(a.z, a.w),
                                        pack2<__half>(b.x, b.y), pack2<__half>(b.z, b.w));
    }
    __syncwarp();  // the lanes' units are there
    const int first_unit = begin + j * kWidenThreads;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int piece = i * kWarp + lane, from = piece / kPieces;
      if (first_unit + from < n_units)
        store_16(tile + (static_cast<std::int64_t>(first_unit) * kPieces + piece) * 8,
                 mine[place(from, piece % kPieces)]);
    }
    __syncwarp();  // and read: the next overwrite them
  }
}

}  // namespace

// y (n x rows) of x (n x inner) and w (rows x inner), all row-major, is to cuBLAS, which is
// column-major, y^T (rows x n) = w^T transposed (inner x rows) times x^T (inner x n).
struct Gemm::Plan {
  Owned<cublasLtMatrixLayout_t> w, x, y;
  cublasLtMatmulAlgo_t algorithm = {};
  std::size_t workspace = 0;  // bytes
};

Gemm::Gemm(const Stream& stream, std::size_t tile_bytes)
    : stream_(stream), tile_bytes_(tile_bytes) {
  cublasLtHandle_t handle = nullptr;
  check_blas(cublasLtCreate(&handle), "cublasLtCreate");
  handle_.reset(handle);
  cublasLtMatmulDesc_t transposed = nullptr;
  check_blas(cublasLtMatmulDescCreate(&transposed, CUBLAS_COMPUTE_32F, CUDA_R_32F),
             "cublasLtMatmulDescCreate");
  transposed_.reset(transposed);
  const cublasOperation_t t = CUBLAS_OP_T;
  check_blas(cublasLtMatmulDescSetAttribute(transposed, CUBLASLT_MATMUL_DESC_TRANSA, &t, sizeof t),
             "cublasLtMatmulDescSetAttribute");
}

Gemm::~Gemm() = default;

void* Gemm::scratch(DeviceBuffer<std::byte>& buffer, std::size_t bytes) {
  if (buffer.size() < bytes) {
    buffer = {};  // the old one goes first
    buffer = DeviceBuffer<std::byte>(bytes, "GEMM scratch");
  }
  return buffer.data();
}

void Gemm::set_activations(const float* x, const float* norm, float eps, int n_rows, int cols) {
  x_ = x, up_ = nullptr, norm_ = norm, eps_ = eps, n_rows_ = n_rows, cols_ = cols;
  is_packed_ = false;
}

void Gemm::set_gated(const float* gate, const float* up, int n_rows, int cols) {
  set_activations(gate, nullptr, 0, n_rows, cols);
  up_ = up;
}

void Gemm::pack(DType type) {
  if (is_packed_ && packed_type_ == type) return;
  const int n_padded = padded(type, cols_);
  void* to = scratch(packed_, static_cast<std::size_t>(n_rows_) * n_padded * bytes_of(type));
  is_packed_ = true, packed_type_ = type;
  const auto launch_pack = [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    const auto launch_rows = [&](auto kernel, auto... rows) {
      launch_overlapping("pack", kernel, static_cast<unsigned>(n_rows_), kPackThreads, 0, stream_,
                         typed, rows..., cols_, n_padded);
    };
    if (norm_ != nullptr)
      launch_rows(pack_normalized<T>, x_, norm_, eps_);
    else if (up_ != nullptr)
      launch_rows(pack_rows<T, GatedRows>, GatedRows{x_, up_});
    else
      launch_rows(pack_rows<T, PlainRows>, PlainRows{x_});
  };
  if (type == DType::kF32) launch_pack(static_cast<float*>(to));
  if (type == DType::kF16) launch_pack(static_cast<__half*>(to));
  if (type == DType::kBF16) launch_pack(static_cast<__nv_bfloat16*>(to));
}

// Rows first to first + n in the format of the product.
const void* Gemm::widened(const DeviceMatrix& w, int first, int n) {
  if (product_type(w.type) == w.type) return w.codes + static_cast<std::int64_t>(first) * w.units;
  auto* tile =
      static_cast<__half*>(scratch(tile_, static_cast<std::size_t>(n) * w.cols * sizeof(__half)));
  with_type(w.type, [&](auto known) {
    constexpr DType kType = decltype(known)::value;
    constexpr int kUnits = kWidenThreads * kWidenUnits;  // of a block
    if constexpr (WeightUnit<kType>::kHasScale)
      launch_overlapping("widen", widen_rows<kType>,
                         static_cast<unsigned>((n * w.units + kUnits - 1) / kUnits), kWidenThreads,
                         0, stream_, tile, w, first, n);
  });
  return tile;
}

// A plan that could not be made is not kept.
const Gemm::Plan& Gemm::plan(const Shape& shape) {
  const auto known = plans_.find(shape);
  return known != plans_.end() ? known->second
                               : plans_.emplace(shape, make_plan(shape)).first->second;
}

Gemm::Plan Gemm::make_plan(const Shape& shape) const {
  Plan p;
  const auto [type_index, n_rows, rows, inner, stride, alignment] = shape;
  const cudaDataType_t type = cuda_type(static_cast<DType>(type_index));
  const auto layout = [](cudaDataType_t of, std::int64_t r, std::int64_t c, std::int64_t ld) {
    cublasLtMatrixLayout_t made = nullptr;
    check_blas(cublasLtMatrixLayoutCreate(&made, of, static_cast<std::uint64_t>(r),
                                          static_cast<std::uint64_t>(c), ld),
               "cublasLtMatrixLayoutCreate");
    return Owned<cublasLtMatrixLayout_t>(made);
  };
  p.w = layout(type, inner, rows, inner), p.x = layout(type, inner, n_rows, inner);
  p.y = layout(CUDA_R_32F, rows, n_rows, stride);
  cublasLtMatmulPreference_t preference = nullptr;
  check_blas(cublasLtMatmulPreferenceCreate(&preference), "cublasLtMatmulPreferenceCreate");
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t which, auto value) {
    cublasLtMatmulPreferenceSetAttribute(preference, which, &value, sizeof value);
  };
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspaceBytes);
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, std::uint32_t{16});
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, std::uint32_t{16});
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, static_cast<std::uint32_t>(alignment));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, static_cast<std::uint32_t>(alignment));
  cublasLtMatmulHeuristicResult_t found = {};
  int n_found = 0;
  const cublasStatus_t status =
      cublasLtMatmulAlgoGetHeuristic(handle_.get(), transposed_.get(), p.w.get(), p.x.get(),
                                     p.y.get(), p.y.get(), preference, 1, &found, &n_found);
  cublasLtMatmulPreferenceDestroy(preference);
  require(status == CUBLAS_STATUS_SUCCESS && n_found == 1, "cuBLASLt: no way to multiply ", n_rows,
          " x ", inner, " and ", rows, " x ", inner, ": ", cublasLtGetStatusString(status));
  p.algorithm = found.algo, p.workspace = found.workspaceSize;
  return p;
}

void Gemm::multiply(const char* name, float* y, const DeviceMatrix& w, bool add) {
  require(w.cols == cols_, name, ": columns: expected ", cols_, ", found ", w.cols);
  const DType type = product_type(w.type);
  pack(type);
  const int inner = padded(type, w.cols);
  const bool is_tiled = type != w.type;
  const auto row_size = static_cast<std::size_t>(inner) * bytes_of(type);
  int tile_rows =
      is_tiled ? static_cast<int>(std::max<std::size_t>(1, tile_bytes_ / row_size)) : w.rows;
  if (is_tiled && tile_rows > kRowsTogether) tile_rows -= tile_rows % kRowsTogether;
  const float one = 1, beta = add ? 1 : 0;
  for (int first = 0; first < w.rows; first += tile_rows) {
    const int n = std::min(tile_rows, w.rows - first);
    const void* tile = widened(w, first, n);
    // The largest power of two, up to 16, that divides the address.
    const auto address = reinterpret_cast<std::uintptr_t>(y + first) | 16;
    const auto alignment = static_cast<std::int64_t>(address & -address);
    const Plan& p = plan({static_cast<std::int64_t>(type), n_rows_, n, inner, w.rows, alignment});
    scratch(workspace_, p.workspace);
    const ProfileRange range(name);
    check_blas(
        cublasLtMatmul(handle_.get(), transposed_.get(), &one, tile, p.w.get(), packed_.data(),
                       p.x.get(), &beta, y + first, p.y.get(), y + first, p.y.get(), &p.algorithm,
                       workspace_.data(), workspace_.size(), stream_.get()),
        name);
  }
}

}  // namespace thaw
