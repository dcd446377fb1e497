// Checks and allocation of a call: what does not depend on the op.
#include "call.h"

#include <algorithm>
#include <utility>

#ifdef RAT_EXT_CUDA
#include "../cuda/explain.h"
#endif

// Lives in libtorch_cuda: absent beside a CPU-only torch, where a CUDA build of rat_ext must still load.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream) __attribute__((weak));
// Newer than the oldest torch that a build runs on.
extern "C" const char* torch_exception_get_what_without_backtrace() __attribute__((weak));

namespace rat {
namespace {

std::string text(const int64_t* begin, const int64_t* end) {
  std::string out = "(";
  for (const int64_t* n = begin; n != end; ++n) out += (n != begin ? ", " : "") + std::to_string(*n);
  return out + ")";
}

std::string shape_of(const View& x) { return text(x.sizes, x.sizes + x.rank); }

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return "float64";
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Short: return "int16";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::Float8_e5m2: return "float8_e5m2";
    case ScalarType::ComplexHalf: return "complex32";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: return "another dtype";
  }
}

std::string place(int32_t device) {
  if (device >= 0) return "cuda:" + std::to_string(device);
  return device == kCpu ? "the CPU" : device == kMeta ? "the meta device" : "another device";
}

int32_t device_of(AtenTensorHandle x) {
  int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x, &type));
  if (type == aoti_torch_device_type_cpu()) return kCpu;
  if (type == aoti_torch_device_type_cuda()) {
    int32_t index = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x, &index));
    return index;
  }
  return type == aoti_torch_device_type_meta() ? kMeta : kElsewhere;
}

int32_t shim_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return aoti_torch_dtype_float64();
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    case ScalarType::Half: return aoti_torch_dtype_float16();
    case ScalarType::Int: return aoti_torch_dtype_int32();
    case ScalarType::Byte: return aoti_torch_dtype_uint8();
    default: return aoti_torch_dtype_float32();
  }
}

int64_t element_bytes(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return 8;
    case ScalarType::Float:
    case ScalarType::Int: return 4;
    case ScalarType::Byte: return 1;
    default: return 2;
  }
}

// Why torch's last call failed, in its first line.
std::string torch_reason(bool on_gpu) {
  if (torch_exception_get_what_without_backtrace) {
    const std::string all = torch_exception_get_what_without_backtrace();
    return all.substr(0, all.find('\n'));
  }
  return on_gpu ? "the reason is on stderr" : "can't allocate memory";
}

constexpr size_t kMostDimensions = 4;  // of a result

void contiguous_strides(Shape sizes, int64_t* strides) {
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes.begin()[d], 1);
  }
}

// Where the tensors of a shared allocation begin: multiples of this.
constexpr size_t kPlace = 512;

size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

}  // namespace

void* address_of(const Handle& x) {
  void* data = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(x.get(), &data));
  return data;
}

Tensor torch_tensor(const Handle& x) {
  AtenTensorHandle same = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(x.get(), &same));
  return Tensor(same);
}

View::View(Handle x) : handle(std::move(x)) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_is_defined(handle.get(), &defined));
  if (!defined) return;
  int32_t type = 0;
  int64_t dimensions = 0;
  int64_t *size = nullptr, *stride = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle.get(), &dimensions));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle.get(), &size));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle.get(), &stride));
  dtype = torch::stable::detail::to<ScalarType>(torch::stable::detail::from(type));
  device = device_of(handle.get());
  rank = static_cast<size_t>(dimensions);
  sizes = size;
  strides = stride;
  data = address_of(handle);
}

bool View::is_contiguous() const {
  bool contiguous = false;
  TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(handle.get(), &contiguous));
  return contiguous;
}

int64_t View::numel() const {
  int64_t n = 1;
  for (size_t d = 0; d < rank; ++d) n *= sizes[d];
  return n;
}

std::string CallBase::shown(std::string_view argument) const {
  constexpr std::string_view kState[] = {"chunk_k",   "chunk_v", "running_k", "running_v", "lengths",
                                         "workspace", "error",   "scale_k",   "scale_v",   "page_table"};
  const std::string_view name = argument.substr(0, argument.find('['));  // "lengths[3]"
  if (!state_.empty() && std::ranges::find(kState, name) != std::end(kState)) {
    return std::string(state_) + "." + std::string(argument);
  }
  if (states_given && (argument == "k" || argument == "v")) return std::string(argument) + "_states";
  return std::string(argument);
}

void CallBase::set_lead(std::string_view argument, const View& x) {
  lead_ = &x;
  device = x.device;
  dtype = x.dtype;
  const bool low = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  if (!low && dtype != ScalarType::Float && (on_gpu() || dtype != ScalarType::Double)) {
    fail(argument, "expected dtype bfloat16, float16", on_gpu() ? " or float32" : ", float32 or float64", ", got ",
         name_of(dtype));
  }
  acc = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

DType CallBase::kernel_dtype() const {
  switch (dtype) {
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: return DType::f32;
  }
}

// ---- checks -------------------------------------------------------------------------------------------------------------

void CallBase::check_place(std::string_view argument, const View& x, ScalarType type) const {
  if (x.device != device) fail(argument, "expected a tensor on ", place(device), ", got one on ", place(x.device));
  if (x.dtype != type) fail(argument, "expected dtype ", name_of(type), ", got ", name_of(x.dtype));
}

void CallBase::check_shape(std::string_view argument, const View& x, Shape sizes) const {
  if (!std::equal(sizes.begin(), sizes.end(), x.sizes, x.sizes + x.rank)) {
    fail(argument, "expected shape ", text(sizes.begin(), sizes.end()), ", got ", shape_of(x));
  }
}

void CallBase::check_rank(std::string_view argument, const View& x, size_t rank, const char* form) const {
  if (x.rank != rank) fail(argument, "expected ", rank, " dimensions ", form, ", got shape ", shape_of(x));
}

void CallBase::check_rows(std::string_view argument, const View& x) const {
  check_place(argument, x, dtype);
  if (x.strides[x.rank - 1] != 1 && x.numel() > 0) {
    fail(argument, "expected a contiguous last dimension (stride 1), got stride ", x.strides[x.rank - 1]);
  }
}

void CallBase::check_packed(std::string_view argument, const View& x, ScalarType type, Shape sizes) const {
  check_place(argument, x, type);
  check_shape(argument, x, sizes);
  if (!x.is_contiguous()) {
    fail(argument, "expected a contiguous tensor, got strides ", text(x.strides, x.strides + x.rank));
  }
}

void check_head_dim(const CallBase& call, std::string_view argument, int64_t head_dim) {
  if (head_dim < 8 || head_dim > 256 || head_dim % 8) {
    call.fail(argument, "expected a head size D that is a multiple of 8 from 8 to 256, got ", head_dim);
  }
}

void check_groups(const CallBase& call, std::string_view argument, int64_t groups, int64_t heads) {
  if (heads > INT32_MAX) call.fail(argument, "expected at most 2147483647 heads, got ", heads);
  if (groups < 1 || heads % groups) {
    call.fail(argument, "expected a number of groups that divides the ", heads, " heads, got ", groups);
  }
}

void check_chunk_size(const CallBase& call, int64_t chunk_size) {
  if (chunk_size < 1) call.fail("chunk_size", "expected at least 1, got ", chunk_size);
}

void check_tokens(const CallBase& call, int64_t tokens) {
  if (tokens > INT32_MAX) call.fail("tokens", "expected at most 2147483647 tokens in a row, got ", tokens);
}

// ---- memory -------------------------------------------------------------------------------------------------------------

int64_t CallBase::row_multiple(const View& x) const {
  uint64_t bits = reinterpret_cast<uintptr_t>(x.data) | 16;
  for (size_t d = 0; d + 1 < x.rank; ++d) {
    if (x.sizes[d] != 1) bits |= static_cast<uint64_t>(x.strides[d] * element_size());
  }
  return static_cast<int64_t>(bits & (~bits + 1));
}

const View& CallBase::with_rows(const View& x) {
  if (!on_gpu() || mode == Mode::check || x.numel() == 0) return x;
  const int64_t multiple = row_multiple(x);
  if (multiple == 16) return x;
  if (leave_narrow && multiple == 8 && element_size() == 2) {
    has_narrow = true;
    return x;
  }
  if (const View* copy = copy_of(x)) return *copy;
  constexpr std::string_view kName = "a copy of rows that are not aligned to 16 bytes";
  const int64_t* n = x.sizes;
  const View& copy =
      keep(x.rank == 4 ? empty(kName, {n[0], n[1], n[2], n[3]}, dtype) : empty(kName, {n[0], n[1], n[2]}, dtype));
  copies_.push_back({&x, &copy});
  return copy;
}

void CallBase::copy_rows([[maybe_unused]] void* stream) {
#ifdef RAT_EXT_CUDA
  if (copies_.empty()) return;
  std::vector<RowCopy> rows;
  for (const auto& [from, to] : copies_) {
    RowCopy copy;
    copy.source = from->data;
    copy.target = to->data;
    for (size_t d = 0; d < 3; ++d) {
      const bool outer = d + 1 < from->rank;
      copy.sizes[d] = outer ? from->sizes[d] : 1;
      copy.strides[d] = outer ? from->strides[d] : 0;
    }
    copy.row = from->sizes[from->rank - 1];
    copy.element_bytes = element_size();
    rows.push_back(copy);
  }
  cuda::align_rows(rows.data(), rows.size(), stream);
#endif
}

const View* CallBase::copy_of(const View& x) const {
  const auto copied = std::ranges::find(copies_, &x, &Copied::from);
  return copied == copies_.end() ? nullptr : copied->to;
}

const View& CallBase::columns(const View& x, int64_t first, int64_t count) {
  Tensor all = torch_tensor(x.handle);
  return keep(torch::stable::narrow(all, static_cast<int64_t>(x.rank) - 1, first, count));
}

Rows CallBase::rows_of(const View& tensor) {
  const View& x = with_rows(tensor);
  const auto stride = [&](size_t d) { return x.sizes[d] > 1 ? x.strides[d] : 0; };
  return {x.data, stride(0), stride(1), stride(2)};
}

void* CallBase::aligned_data(const View& x) {
  if (is_aligned(x.data)) return x.data;
  return keep(torch::stable::clone(torch_tensor(x.handle))).data;
}

const View& CallBase::keep(const Tensor& copy) {
  AtenTensorHandle same = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(copy.get(), &same));
  return kept_.emplace_front(Handle(same));
}

Rows CallBase::copied_rows(std::string_view argument, const View& x, Shape sizes) {
  check_place(argument, x, dtype);
  check_shape(argument, x, sizes);
  if (x.strides[x.rank - 1] == 1 || x.numel() == 0) return rows_of(x);
  return rows_of(keep(torch::stable::contiguous(torch_tensor(x.handle))));
}

const void* CallBase::copied(std::string_view argument, const View& x, ScalarType type, Shape sizes) {
  check_place(argument, x, type);
  check_shape(argument, x, sizes);
  if (x.is_contiguous()) return aligned_data(x);
  return keep(torch::stable::contiguous(torch_tensor(x.handle))).data;
}

int64_t CallBase::bytes_of(std::string_view name, Shape sizes, ScalarType type) const {
  int64_t bytes = element_bytes(type);
  for (const int64_t n : sizes) {
    if (__builtin_mul_overflow(bytes, n, &bytes)) {
      fail(name, "expected a tensor of less than 2^63 bytes, got shape ", text(sizes.begin(), sizes.end()));
    }
  }
  return bytes;
}

// Its error names what the memory was for, and then torch's reason, by whose words programs know that memory is used up.
Handle CallBase::empty(std::string_view name, Shape sizes, ScalarType type) {
  const int64_t bytes = bytes_of(name, sizes, type);
  if (Handle x = shared_empty(sizes, type, bytes)) return x;
  try {
    return torch_empty(sizes, type);
  } catch (const std::exception&) {
    std::ostringstream message;
    message << "rat_ext." << op << ": " << name << ": expected memory for shape " << text(sizes.begin(), sizes.end())
            << " " << name_of(type) << ", " << bytes << " bytes, got none: " << torch_reason(on_gpu());
    throw std::runtime_error(message.str());
  }
}

// On a GPU the plain call of the C interface, which spares the boxed dispatcher: a forward and backward allocate many
// tensors. Elsewhere the operator, which fills fresh memory where torch is told to.
Handle CallBase::torch_empty(Shape sizes, ScalarType type) const {
  AtenTensorHandle handle = nullptr;
  if (mode == Mode::check || !on_gpu()) {
    const Tensor made = torch::stable::new_empty(torch_tensor(lead_->handle), sizes, type);
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(made.get(), &handle));
    return Handle(handle);
  }
  int64_t strides[kMostDimensions];
  contiguous_strides(sizes, strides);
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
                                                  shim_dtype(type), aoti_torch_device_type_cuda(), device, &handle));
  return Handle(handle);
}

void CallBase::expect(int64_t elements) {
  constexpr int64_t kMost = 256 << 10, kTensors = 6;
  if (!share || elements <= 0 || elements > kMost / element_size()) return;
  // As much again for scratch, which seldom needs more; where it does, it is allocated alone.
  const int64_t room = 2 * (elements + kTensors * static_cast<int64_t>(kPlace) / element_size());
  block_ = torch_empty({room}, dtype);
  block_bytes_ = static_cast<size_t>(room * element_size());
}

Handle CallBase::shared_empty(Shape sizes, ScalarType type, int64_t bytes) {
  if (!block_ || type != dtype || static_cast<size_t>(bytes) > block_bytes_ - block_used_) return nullptr;
  int64_t strides[kMostDimensions];
  contiguous_strides(sizes, strides);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(block_.get(), static_cast<int64_t>(sizes.size()), sizes.begin(),
                                                        strides, static_cast<int64_t>(block_used_) / element_size(),
                                                        &handle));
  block_used_ = std::min(block_bytes_, round_up(block_used_ + static_cast<size_t>(bytes), kPlace));
  return Handle(handle);
}

// torch's caching allocator aligns to 512 bytes on CUDA and 64 on the CPU: 256 more make it sure.
void* CallBase::scratch(size_t bytes) {
  constexpr size_t kAlignment = 256;
  if (block_) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(address_of(block_));
    const uintptr_t from = round_up(begin + block_used_, kAlignment);
    if (from + bytes <= begin + block_bytes_) {
      block_used_ = from + bytes - begin;
      return reinterpret_cast<void*>(from);
    }
  }
  kept_.emplace_front(empty("scratch memory", {static_cast<int64_t>(bytes + kAlignment)}, ScalarType::Byte));
  return reinterpret_cast<void*>(round_up(reinterpret_cast<uintptr_t>(kept_.front().data), kAlignment));
}

void* CallBase::scratch(std::string_view name, Shape sizes, ScalarType type) {
  return scratch(static_cast<size_t>(bytes_of(name, sizes, type)));
}

// ---- the device ---------------------------------------------------------------------------------------------------------

void* CallBase::current_stream() const {
  if (!aoti_torch_get_current_cuda_stream) {
    throw std::runtime_error("rat_ext." + std::string(op) + ": this torch is a CPU-only build and has no CUDA stream");
  }
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

void CallBase::check_can_run() const {
  if (!on_gpu()) return;
#ifdef RAT_EXT_CUDA
  cuda::check_device(device);
#else
  throw std::runtime_error("rat_ext." + std::string(op) +
                           ": the tensors are on a GPU, but this rat_ext was built for the CPU only. Reinstall it "
                           "where nvcc and a CUDA torch are found (RAT_EXT_CUDA=1 says what is missing)");
#endif
}

// ---- which kernels ------------------------------------------------------------------------------------------------------

void CallBase::explain(std::string_view phase, std::string_view family, bool chosen, std::string_view why) {
  choices.append(phase).append("\t").append(family).append(chosen ? "\t1\t" : "\t0\t").append(why).append("\n");
}

void CallBase::explain_rows(std::string_view argument, const View& x, bool narrow) {
  if (!on_gpu() || x.numel() == 0) return;
  const int64_t multiple = row_multiple(x);
  if (multiple == 16) return;
  const bool stay = narrow && multiple == 8 && element_size() == 2;
  const std::string phase = std::string(argument) + "_rows";
  const std::string where = "rows start at multiples of " + std::to_string(multiple) + " bytes";
  explain(
      phase, "in_place", stay,
      where +
          (stay ? ", which the forward reads (of a projection, all but q); where a gradient is recorded they are copied"
           : multiple == 8 ? ", which a kernel of the call does not read"
                           : ""));
  explain(phase, "copied", !stay,
          stay ? "serves the call too, but in_place comes first" : "the first that serves the call");
}

template <class Params>
NarrowRows narrow_rows(const CallBase& call, [[maybe_unused]] const Params& p) {
  call.check_can_run();
#ifdef RAT_EXT_CUDA
  const torch::stable::accelerator::DeviceGuard guard(call.device);
  return cuda::narrow_rows(p);
#else
  return {};
#endif
}
template NarrowRows narrow_rows(const CallBase&, const AttentionFwdParams&);
template NarrowRows narrow_rows(const CallBase&, const AttentionCachedParams&);

namespace {

// The phase has one family. On the CPU that is one for each instruction set.
void explain_single(CallBase& call, const char* phase) {
  call.check_can_run();
  if (call.on_gpu()) return call.explain(phase, "cuda", true, "the only family");
  call.explain(phase, cpu::isa(), true, "the widest instruction set of this machine, or RAT_EXT_CPU_ISA");
}

#ifdef RAT_EXT_CUDA
void add(CallBase& call, const std::vector<cuda::Choice>& rows) {
  for (const cuda::Choice& row : rows) call.explain(row.phase, row.family, row.chosen, row.why);
}
#endif

}  // namespace

void explain(CallBase& call, [[maybe_unused]] const AttentionFwdParams& p) {
#ifdef RAT_EXT_CUDA
  if (call.on_gpu()) {
    call.check_can_run();
    const torch::stable::accelerator::DeviceGuard guard(call.device);
    add(call, cuda::explain_attention_fwd(p));
    return add(call, cuda::explain_recurrence_fwd(p));
  }
#endif
  explain_single(call, "attention_fwd");
}

void explain(CallBase& call, [[maybe_unused]] const AttentionBwdParams& p) {
#ifdef RAT_EXT_CUDA
  if (call.on_gpu()) {
    call.check_can_run();
    const torch::stable::accelerator::DeviceGuard guard(call.device);
    add(call, cuda::explain_attention_bwd(p));
    return add(call, cuda::explain_recurrence_bwd(p));
  }
#endif
  explain_single(call, "attention_bwd");
}

void explain(CallBase& call, [[maybe_unused]] const AttentionCachedParams& p) {
#ifdef RAT_EXT_CUDA
  if (call.on_gpu()) {
    call.check_can_run();
    const torch::stable::accelerator::DeviceGuard guard(call.device);
    return add(call, cuda::explain_attention_cached(p));
  }
#endif
  explain_single(call, "attention_fwd");
}

void explain(CallBase& call, const RecurrenceFwdParams&) { explain_single(call, "recurrence_fwd"); }
void explain(CallBase& call, const RecurrenceBwdParams&) { explain_single(call, "recurrence_bwd"); }
void explain(CallBase& call, const DecodeParams&) { explain_single(call, "decode"); }

}  // namespace rat
