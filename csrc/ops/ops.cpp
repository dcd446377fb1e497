// The torch side of rat_ext, and the only file that sees torch: schemas, argument checks, allocation, dispatch to the
// launchers of launchers.h. It uses the LibTorch stable ABI, so one build runs on every torch from 2.11 on.
//
// One description of each op's arguments serves CPU and CUDA. Bad arguments throw std::invalid_argument, which reaches
// Python as ValueError and reads "rat_ext.<op>: <argument>: expected <...>, got <...>".
#define TORCH_TARGET_VERSION 0x020b000000000000

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>

#include "../arena.h"
#include "../launchers.h"

// Lives in libtorch_cuda: absent beside a CPU-only torch, where a CUDA build of rat_ext must still load.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream) __attribute__((weak));

namespace rat {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// ---- errors -----------------------------------------------------------------------------------------------------------

template <class... Parts>
[[noreturn]] void fail(const char* op, const char* argument, const Parts&... parts) {
  std::ostringstream message;
  message << "rat_ext." << op << ": " << argument << ": ";
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

std::string text(std::initializer_list<int64_t> sizes) {
  std::string out = "(";
  for (int64_t size : sizes) out += (out.size() > 1 ? ", " : "") + std::to_string(size);
  return out + ")";
}

std::string shape_of(const Tensor& x) {
  std::string out = "(";
  for (int64_t i = 0; i < x.dim(); ++i) out += (i ? ", " : "") + std::to_string(x.size(i));
  return out + ")";
}

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
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: return "another dtype";
  }
}

// The op's name, device and dtypes: what every other tensor of the call is held against.
struct Context {
  const char* op;
  bool is_cuda;
  int32_t device;
  ScalarType dtype;
  ScalarType acc;

  Context(const char* op_, const char* argument, const Tensor& lead)
      : op(op_), is_cuda(lead.is_cuda()), device(lead.get_device_index()), dtype(lead.scalar_type()) {
    const bool low = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
    if (!low && dtype != ScalarType::Float && (is_cuda || dtype != ScalarType::Double)) {
      fail(op, argument, "expected dtype bfloat16, float16", is_cuda ? " or float32" : ", float32 or float64", ", got ",
           name_of(dtype));
    }
    acc = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }

  DType kernel_dtype() const {
    switch (dtype) {
      case ScalarType::Double: return DType::f64;
      case ScalarType::BFloat16: return DType::bf16;
      case ScalarType::Half: return DType::f16;
      default: return DType::f32;
    }
  }

  void check_place(const char* argument, const Tensor& x, ScalarType type) const {
    if (!x.defined()) fail(op, argument, "expected a tensor, got none");
    if (x.is_cuda() != is_cuda || x.get_device_index() != device) {
      fail(op, argument, "expected a tensor on ", is_cuda ? "cuda:" + std::to_string(device) : "the CPU",
           ", got one on ",
           x.is_cuda()  ? "cuda:" + std::to_string(x.get_device_index())
           : x.is_cpu() ? "the CPU"
                        : "another device");
    }
    if (x.scalar_type() != type) {
      fail(op, argument, "expected dtype ", name_of(type), ", got ", name_of(x.scalar_type()));
    }
  }

  void check_shape(const char* argument, const Tensor& x, std::initializer_list<int64_t> sizes) const {
    bool same = x.dim() == static_cast<int64_t>(sizes.size());
    int64_t i = 0;
    for (int64_t size : sizes) same = same && x.size(i++) == size;
    if (!same) fail(op, argument, "expected shape ", text(sizes), ", got ", shape_of(x));
  }

  void check_rank(const char* argument, const Tensor& x, int64_t rank, const char* form) const {
    if (x.dim() != rank) fail(op, argument, "expected ", rank, " dimensions ", form, ", got shape ", shape_of(x));
  }

  // A contiguous tensor of known shape: tables, states, lengths.
  void* packed(const char* argument, const Tensor& x, ScalarType type, std::initializer_list<int64_t> sizes) const {
    check_place(argument, x, type);
    check_shape(argument, x, sizes);
    if (!x.is_contiguous()) fail(op, argument, "expected a contiguous tensor, got strides that are not");
    return x.data_ptr();
  }

  void check_rows(const char* argument, const Tensor& x) const {
    check_place(argument, x, dtype);
    if (x.numel() > 0 && x.stride(x.dim() - 1) != 1) {
      fail(op, argument, "expected a contiguous last dimension (stride 1), got stride ", x.stride(x.dim() - 1));
    }
  }

  // A (B, T, heads, D) tensor of any strides with a contiguous last dimension.
  Rows rows(const char* argument, const Tensor& x, std::initializer_list<int64_t> sizes) const {
    check_shape(argument, x, sizes);
    check_rows(argument, x);
    return rows_of(x);
  }

  static Rows rows_of(const Tensor& x) {
    const auto stride = [&](int64_t d) { return x.size(d) > 1 ? x.stride(d) : 0; };
    return Rows{x.data_ptr(), stride(0), stride(1), stride(2)};
  }

  int64_t element_size() const { return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2; }

  bool aligned(std::initializer_list<Rows> all) const {
    const int64_t unit = 16 / element_size();
    for (const Rows& r : all) {
      if (reinterpret_cast<uintptr_t>(r.ptr) % 16 || r.batch % unit || r.token % unit || r.head % unit) return false;
    }
    return true;
  }

  // On a GPU the plain call of the C interface, which spares the boxed dispatcher: a forward and backward allocate many
  // tensors. On the CPU the operator, which fills fresh memory where torch is told to.
  Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) const {
    if (!is_cuda) return torch::stable::new_empty(like, sizes, type);
    int64_t strides[4], stride = 1;
    for (size_t d = sizes.size(); d-- > 0;) {
      strides[d] = stride;
      stride *= sizes.begin()[d] > 0 ? sizes.begin()[d] : 1;
    }
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
                                                    shim_dtype(type), aoti_torch_device_type_cuda(), device, &handle));
    return Tensor(handle);
  }

  static int32_t shim_dtype(ScalarType type) {
    switch (type) {
      case ScalarType::Double: return aoti_torch_dtype_float64();
      case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
      case ScalarType::Half: return aoti_torch_dtype_float16();
      case ScalarType::Int: return aoti_torch_dtype_int32();
      case ScalarType::Byte: return aoti_torch_dtype_uint8();
      default: return aoti_torch_dtype_float32();
    }
  }

  // Scratch from torch's caching allocator, which aligns to 512 bytes on CUDA and 64 on the CPU: 256 more make it sure.
  Tensor workspace(const Tensor& like, size_t bytes, void** aligned_ptr) const {
    Tensor w = empty(like, {static_cast<int64_t>(bytes) + 256}, ScalarType::Byte);
    const uintptr_t address = reinterpret_cast<uintptr_t>(w.data_ptr());
    *aligned_ptr = reinterpret_cast<void*>((address + 255) / 256 * 256);
    return w;
  }
};

void check_head_dim(const Context& c, const char* argument, int64_t head_dim) {
  if (head_dim < 8 || head_dim > 256 || head_dim % 8) {
    fail(c.op, argument, "expected a head size D that is a multiple of 8 from 8 to 256, got ", head_dim);
  }
}

void check_groups(const Context& c, const char* argument, int64_t groups, int64_t heads) {
  if (groups < 1 || heads % groups) {
    fail(c.op, argument, "expected a number of groups that divides the ", heads, " heads, got ", groups);
  }
}

void check_chunk_size(const Context& c, int64_t chunk_size) {
  if (chunk_size < 1) fail(c.op, "chunk_size", "expected at least 1, got ", chunk_size);
}

Rotary rotary_of(const Context& c, const MaybeTensor& cos, const MaybeTensor& sin, int64_t head_dim) {
  if (cos.has_value() != sin.has_value()) {
    fail(c.op, cos ? "rotary_sin" : "rotary_cos", "expected both rotary tables or none, got one");
  }
  if (!cos) return {};
  c.check_rank("rotary_cos", *cos, 2, "(chunks, D / 2)");
  const int64_t rows = cos->size(0);
  return Rotary{c.packed("rotary_cos", *cos, c.acc, {rows, head_dim / 2}),
                c.packed("rotary_sin", *sin, c.acc, {rows, head_dim / 2}), rows};
}

void check_int32_range(const Context& c, const char* argument, int64_t tokens) {
  if (tokens > INT32_MAX) fail(c.op, argument, "expected at most 2147483647 tokens in a row, got ", tokens);
}

// Sequences of the call: rows of the batch, or runs of one row that cu_seqlens delimits.
void set_sequences(const Context& c, Sizes& s, const MaybeTensor& cu_seqlens) {
  s.sequences = s.batch;
  check_int32_range(c, "tokens", s.tokens);
  if (!cu_seqlens) return;
  if (s.batch != 1) fail(c.op, "cu_seqlens", "expected packed sequences in a batch of 1, got a batch of ", s.batch);
  c.check_rank("cu_seqlens", *cu_seqlens, 1, "(sequences + 1)");
  s.sequences = cu_seqlens->size(0) - 1;
  if (s.sequences < 0) fail(c.op, "cu_seqlens", "expected at least one element, got none");
  if (s.sequences == 0 && s.tokens != 0) {
    fail(c.op, "cu_seqlens", "expected its last element to be the number of tokens ", s.tokens, ", got no sequence");
  }
  s.cu_seqlens = static_cast<const int32_t*>(c.packed("cu_seqlens", *cu_seqlens, ScalarType::Int, {s.sequences + 1}));
}

[[maybe_unused]] void* current_stream(const Context& c) {
  if (!aoti_torch_get_current_cuda_stream) {
    throw std::runtime_error(std::string("rat_ext.") + c.op +
                             ": this torch is a CPU-only build and has no CUDA stream");
  }
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(c.device, &stream));
  return stream;
}

void check_can_run(const Context& c) {
  if (!c.is_cuda) return;
#ifdef RAT_EXT_CUDA
  cuda::check_device(c.device);
#else
  throw std::runtime_error(std::string("rat_ext.") + c.op +
                           ": the tensors are on a GPU, but this rat_ext was built for the CPU only. Reinstall it "
                           "where nvcc and a CUDA torch are found (RAT_EXT_CUDA=1 says what is missing)");
#endif
}

// Hands a launcher memory from torch, as one tensor that lives until the launcher returns.
class Scratch {
 public:
  Scratch(const Context& c, const Tensor& like) : context_(c), like_(like) {}
  Allocator allocator() { return {&Scratch::allocate, this}; }

 private:
  static void* allocate(void* self_, size_t bytes) {
    Scratch& self = *static_cast<Scratch*>(self_);
    void* aligned = nullptr;
    self.tensor_ = self.context_.workspace(self.like_, bytes, &aligned);
    return aligned;
  }

  const Context& context_;
  const Tensor& like_;
  Tensor tensor_;
};

// Runs the launcher of the tensors' device; on a GPU there, on the current stream.
template <class Params>
void launch(const Context& c, const Tensor& like, const Params& params, void (*on_cpu)(const Params&, const Allocator&),
            [[maybe_unused]] void (*on_cuda)(const Params&, const Allocator&, void*)) {
  Scratch scratch(c, like);
#ifdef RAT_EXT_CUDA
  if (c.is_cuda) {
    const torch::stable::accelerator::DeviceGuard guard(c.device);
    return on_cuda(params, scratch.allocator(), current_stream(c));
  }
#endif
  on_cpu(params, scratch.allocator());
}

#ifdef RAT_EXT_CUDA
#define RAT_LAUNCHERS(op) cpu::op, cuda::op
#else
#define RAT_LAUNCHERS(op) cpu::op, nullptr
#endif

// ---- rat_attention ----------------------------------------------------------------------------------------------------

// The arguments that rat_attention, its packed entry and both backwards share.
struct AttentionOptions {
  const MaybeTensor& gate_bias;
  const MaybeTensor& rotary_cos;
  const MaybeTensor& rotary_sin;
  const MaybeTensor& cu_seqlens;
  const MaybeTensor& chunk_k;
  const MaybeTensor& chunk_v;
  const MaybeTensor& running_k;
  const MaybeTensor& running_v;
  const MaybeTensor& lengths;
  int64_t chunk_size;
  double scale;
  int64_t chunk_rows;
  bool return_state;
};

// Fills what does not depend on whether q, k, v, gate come as five tensors or as one. `size` has batch, tokens, heads,
// groups and head_dim; rows are set.
void set_options(const Context& c, AttentionFwdParams& p, const AttentionOptions& o) {
  Sizes& s = p.size;
  s.dtype = c.kernel_dtype();
  s.chunk_size = o.chunk_size;
  check_chunk_size(c, s.chunk_size);
  check_head_dim(c, "q", s.head_dim);
  check_groups(c, "q", s.q_groups, s.heads);
  check_groups(c, "k", s.k_groups, s.heads);
  set_sequences(c, s, o.cu_seqlens);
  if (o.gate_bias) p.gate_bias = c.packed("gate_bias", *o.gate_bias, c.acc, {s.heads, s.head_dim});
  p.rotary = rotary_of(c, o.rotary_cos, o.rotary_sin, s.head_dim);
  p.scale = o.scale;

  const bool carried = o.lengths.has_value();
  if (carried != o.chunk_k.has_value() || carried != o.chunk_v.has_value() || carried != o.running_k.has_value() ||
      carried != o.running_v.has_value()) {
    fail(c.op, "initial_state", "expected all of its five tensors or none");
  }
  if (carried) {
    c.check_rank("initial_state.chunk_k", *o.chunk_k, 4, "(sequences, H, chunks, D)");
    const int64_t rows = o.chunk_k->size(2);
    p.initial.rows = rows;
    p.initial.k = c.packed("initial_state.chunk_k", *o.chunk_k, c.dtype, {s.sequences, s.heads, rows, s.head_dim});
    p.initial.v = c.packed("initial_state.chunk_v", *o.chunk_v, c.dtype, {s.sequences, s.heads, rows, s.head_dim});
    p.initial.running_k = c.packed("initial_state.running_k", *o.running_k, c.acc, {s.sequences, s.heads, s.head_dim});
    p.initial.running_v = c.packed("initial_state.running_v", *o.running_v, c.acc, {s.sequences, s.heads, s.head_dim});
    s.lengths =
        static_cast<const int32_t*>(c.packed("initial_state.lengths", *o.lengths, ScalarType::Int, {s.sequences}));
  }

  const bool packed_layout = s.cu_seqlens && !carried && !o.return_state;
  const int64_t needed = s.tokens / s.chunk_size + (packed_layout ? s.sequences : 0);
  if (carried ? o.chunk_rows < p.initial.rows : o.chunk_rows < needed) {
    fail(c.op, "chunk_rows", "expected room for at least ", carried ? p.initial.rows : needed, " chunk states, got ",
         o.chunk_rows);
  }
  p.chunks.rows = o.chunk_rows;
  p.chunks.compact = packed_layout;
  p.chunks.head = o.chunk_rows * s.head_dim;
  p.chunks.sequence = packed_layout ? 0 : s.heads * p.chunks.head;

  // Positions that only the device knows are checked by the launcher.
  if (p.rotary.cos && !s.cu_seqlens && !carried && s.tokens > 0) {
    const int64_t last = (s.tokens - 1) / s.chunk_size;
    if (p.rotary.rows <= last) {
      fail(c.op, "rotary_cos", "expected at least ", last + 1, " rows, one for each chunk, got ", p.rotary.rows);
    }
  }
  check_can_run(c);
}

// q (B, T, G, D); k (B, T, G, D), or (B, T, H, D) without a gate; v (B, T, H, D).
AttentionFwdParams attention_params(const Context& c, const Tensor& q, const Tensor& k, const Tensor& v,
                                    const MaybeTensor& gate, const MaybeTensor& out_gate, const AttentionOptions& o) {
  c.check_rank("q", q, 4, "(B, T, G, D)");
  const char* k_name = gate ? "k" : "k_states";
  const char* v_name = gate ? "v" : "v_states";
  c.check_rank(k_name, k, 4, gate ? "(B, T, G, D)" : "(B, T, H, D)");
  c.check_rank(v_name, v, 4, "(B, T, H, D)");
  AttentionFwdParams p;
  Sizes& s = p.size;
  s.batch = v.size(0);
  s.tokens = v.size(1);
  s.heads = v.size(2);
  s.head_dim = v.size(3);
  s.q_groups = q.size(2);
  s.k_groups = gate ? s.q_groups : s.heads;
  check_groups(c, "q", s.q_groups, s.heads);
  const std::initializer_list<int64_t> per_head = {s.batch, s.tokens, s.heads, s.head_dim};
  p.q = c.rows("q", q, {s.batch, s.tokens, s.q_groups, s.head_dim});
  p.k = c.rows(k_name, k, {s.batch, s.tokens, s.k_groups, s.head_dim});
  p.v = c.rows(v_name, v, per_head);
  if (gate) p.gate = c.rows("gate", *gate, per_head);
  if (out_gate) p.out_gate = c.rows("out_gate", *out_gate, per_head);
  set_options(c, p, o);
  s.aligned16 = c.aligned({p.q, p.k, p.v, p.gate, p.out_gate});
  return p;
}

// Views of one projection (B, T, [q: G, k: G, v: H, gate: H, out_gate: H or none] x D).
void set_projection_rows(AttentionFwdParams& p, const Rows& base, int64_t element_size, bool has_out_gate) {
  const Sizes& s = p.size;
  int64_t offset = 0;
  const auto next = [&](int64_t heads) {
    Rows r = base;
    r.head = s.head_dim;
    r.ptr = static_cast<char*>(base.ptr) + offset * element_size;
    offset += heads * s.head_dim;
    return r;
  };
  p.q = next(s.q_groups);
  p.k = next(s.k_groups);
  p.v = next(s.heads);
  p.gate = next(s.heads);
  if (has_out_gate) p.out_gate = next(s.heads);
}

Rows projection_base(const Tensor& projection) {
  return Rows{projection.data_ptr(), projection.size(0) > 1 ? projection.stride(0) : 0,
              projection.size(1) > 1 ? projection.stride(1) : 0, 0};
}

AttentionFwdParams projection_params(const Context& c, const Tensor& projection, int64_t heads, int64_t groups,
                                     const AttentionOptions& o, bool has_out_gate) {
  c.check_rank("projection", projection, 3, "(B, T, width)");
  c.check_rows("projection", projection);
  if (heads < 1) fail(c.op, "num_heads", "expected at least 1, got ", heads);
  check_groups(c, "num_groups", groups, heads);
  AttentionFwdParams p;
  Sizes& s = p.size;
  s.batch = projection.size(0);
  s.tokens = projection.size(1);
  s.heads = heads;
  s.q_groups = s.k_groups = groups;
  const int64_t width = projection.size(2);
  const int64_t parts = 2 * groups + (has_out_gate ? 3 : 2) * heads;
  if (width % parts) {
    fail(c.op, "projection", "expected a width that is a multiple of ", parts, " (2 num_groups + ",
         has_out_gate ? 3 : 2, " num_heads), got ", width);
  }
  s.head_dim = width / parts;
  set_projection_rows(p, projection_base(projection), c.element_size(), has_out_gate);
  set_options(c, p, o);
  s.aligned16 = c.aligned({p.q, p.k, p.v, p.gate, p.out_gate});
  return p;
}

// y, lse, chunk states; the returned running states and lengths where wanted. An absent output is none rather than an empty
// tensor, which costs the host about three quarters of what one with elements does.
using FwdResult = std::tuple<Tensor, Tensor, Tensor, Tensor, MaybeTensor, MaybeTensor, MaybeTensor>;

// Allocates y, lse, chunk states and the returned state, and runs the forward.
FwdResult run_forward(const Context& c, AttentionFwdParams& p, const Tensor& like, bool return_state) {
  const Sizes& s = p.size;
  Tensor y = c.empty(like, {s.batch, s.tokens, s.heads, s.head_dim}, c.dtype);
  Tensor lse = c.empty(like, {s.batch, s.heads, s.tokens}, c.acc);
  const int64_t owners = p.chunks.compact ? 1 : s.sequences;
  Tensor chunk_k = c.empty(like, {owners, s.heads, p.chunks.rows, s.head_dim}, c.dtype);
  Tensor chunk_v = c.empty(like, {owners, s.heads, p.chunks.rows, s.head_dim}, c.dtype);
  MaybeTensor running_k, running_v, lengths;
  p.y = Context::rows_of(y);
  p.lse = lse.data_ptr();
  p.chunks.k = chunk_k.data_ptr();
  p.chunks.v = chunk_v.data_ptr();
  if (return_state) {
    running_k = c.empty(like, {s.sequences, s.heads, s.head_dim}, c.acc);
    running_v = c.empty(like, {s.sequences, s.heads, s.head_dim}, c.acc);
    lengths = c.empty(like, {s.sequences}, ScalarType::Int);
    p.running_k = running_k->data_ptr();
    p.running_v = running_v->data_ptr();
    p.lengths_out = static_cast<int32_t*>(lengths->data_ptr());
  }
  if (s.sequences > 0 && s.heads > 0 && (s.batch * s.tokens > 0 || return_state))
    launch(c, like, p, RAT_LAUNCHERS(attention_fwd));
  return {y, lse, chunk_k, chunk_v, running_k, running_v, lengths};
}

FwdResult rat_attention(Tensor q, Tensor k, Tensor v, MaybeTensor gate, MaybeTensor gate_bias, MaybeTensor out_gate,
                        MaybeTensor rotary_cos, MaybeTensor rotary_sin, MaybeTensor cu_seqlens, MaybeTensor chunk_k,
                        MaybeTensor chunk_v, MaybeTensor running_k, MaybeTensor running_v, MaybeTensor lengths,
                        int64_t chunk_size, double scale, int64_t chunk_rows, bool return_state,
                        bool /*deterministic*/) {
  const Context c(gate ? "rat_attention" : "chunk_attention", "q", q);
  AttentionFwdParams p = attention_params(c, q, k, v, gate, out_gate,
                                          {gate_bias, rotary_cos, rotary_sin, cu_seqlens, chunk_k, chunk_v, running_k,
                                           running_v, lengths, chunk_size, scale, chunk_rows, return_state});
  return run_forward(c, p, q, return_state);
}

FwdResult rat_attention_packed(Tensor projection, int64_t num_heads, int64_t num_groups, bool has_out_gate,
                               MaybeTensor gate_bias, MaybeTensor rotary_cos, MaybeTensor rotary_sin,
                               MaybeTensor cu_seqlens, MaybeTensor chunk_k, MaybeTensor chunk_v, MaybeTensor running_k,
                               MaybeTensor running_v, MaybeTensor lengths, int64_t chunk_size, double scale,
                               int64_t chunk_rows, bool return_state, bool /*deterministic*/) {
  const Context c("rat_attention_packed", "projection", projection);
  AttentionFwdParams p = projection_params(c, projection, num_heads, num_groups,
                                           {gate_bias, rotary_cos, rotary_sin, cu_seqlens, chunk_k, chunk_v, running_k,
                                            running_v, lengths, chunk_size, scale, chunk_rows, return_state},
                                           has_out_gate);
  return run_forward(c, p, projection, return_state);
}

// What the forward saved and what autograd brings back.
struct SavedAndGrads {
  const Tensor& dy;
  const MaybeTensor& dchunk_k;
  const MaybeTensor& dchunk_v;
  const MaybeTensor& drunning_k;
  const MaybeTensor& drunning_v;
  const Tensor& y;
  const Tensor& lse;
  const Tensor& saved_chunk_k;
  const Tensor& saved_chunk_v;
};

// Each present where its argument is.
struct StateGrads {
  MaybeTensor dgate_bias, dchunk_k, dchunk_v, drunning_k, drunning_v;
};

// `b.fwd` and the gradient rows are set; checks and sets the rest, allocates the small gradients, runs the backward. Pointers
// do not tell what was given: those of tensors without elements are null.
// Incoming gradients with a last dimension that is not contiguous (those of a sum are expanded scalars) are copied.
StateGrads run_backward(const Context& c, AttentionBwdParams& b, const Tensor& like, const SavedAndGrads& g,
                        bool has_bias, bool carried) {
  AttentionFwdParams& p = b.fwd;
  const Sizes& s = p.size;
  p.y = c.rows("y", g.y, {s.batch, s.tokens, s.heads, s.head_dim});
  p.lse = c.packed("lse", g.lse, c.acc, {s.batch, s.heads, s.tokens});
  const int64_t owners = p.chunks.compact ? 1 : s.sequences;
  p.chunks.k = c.packed("chunk_k", g.saved_chunk_k, c.dtype, {owners, s.heads, p.chunks.rows, s.head_dim});
  p.chunks.v = c.packed("chunk_v", g.saved_chunk_v, c.dtype, {owners, s.heads, p.chunks.rows, s.head_dim});

  c.check_place("dy", g.dy, c.dtype);
  c.check_shape("dy", g.dy, {s.batch, s.tokens, s.heads, s.head_dim});
  const Tensor dy = g.dy.numel() > 0 && g.dy.stride(3) != 1 ? torch::stable::contiguous(g.dy) : g.dy;
  b.dy = Context::rows_of(dy);
  std::array<Tensor, 4> keep;
  const auto state_grad = [&](int i, const char* name, const MaybeTensor& x, ScalarType type,
                              std::initializer_list<int64_t> sizes) -> const void* {
    if (!x) return nullptr;
    keep[i] = torch::stable::contiguous(*x);
    return c.packed(name, keep[i], type, sizes);
  };
  if (p.chunks.compact && (g.dchunk_k || g.dchunk_v))
    fail(c.op, "dchunk_k", "expected none for packed sequences, got one");
  b.dchunk_k = state_grad(0, "dchunk_k", g.dchunk_k, c.dtype, {owners, s.heads, p.chunks.rows, s.head_dim});
  b.dchunk_v = state_grad(1, "dchunk_v", g.dchunk_v, c.dtype, {owners, s.heads, p.chunks.rows, s.head_dim});
  b.drunning_k = state_grad(2, "drunning_k", g.drunning_k, c.acc, {s.sequences, s.heads, s.head_dim});
  b.drunning_v = state_grad(3, "drunning_v", g.drunning_v, c.acc, {s.sequences, s.heads, s.head_dim});

  StateGrads out;
  if (has_bias) {
    out.dgate_bias = c.empty(like, {s.heads, s.head_dim}, c.acc);
    b.dgate_bias = out.dgate_bias->data_ptr();
  }
  if (carried) {
    out.dchunk_k = c.empty(like, {s.sequences, s.heads, p.initial.rows, s.head_dim}, c.dtype);
    out.dchunk_v = c.empty(like, {s.sequences, s.heads, p.initial.rows, s.head_dim}, c.dtype);
    out.drunning_k = c.empty(like, {s.sequences, s.heads, s.head_dim}, c.acc);
    out.drunning_v = c.empty(like, {s.sequences, s.heads, s.head_dim}, c.acc);
    b.dinitial = CarriedState{out.dchunk_k->data_ptr(), out.dchunk_v->data_ptr(), p.initial.rows,
                              out.drunning_k->data_ptr(), out.drunning_v->data_ptr()};
  }
  p.size.aligned16 = c.aligned({p.q, p.k, p.v, p.gate, p.out_gate, p.y, b.dy, b.dq, b.dk, b.dv, b.dgate, b.dout_gate});
  if (s.sequences > 0 && s.heads > 0 && (s.batch * s.tokens > 0 || carried)) {
    launch(c, like, b, RAT_LAUNCHERS(attention_bwd));
  } else if (out.dgate_bias) {
    torch::stable::zero_(*out.dgate_bias);
  }
  return out;
}

using BwdResult = std::tuple<Tensor, Tensor, Tensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor,
                             MaybeTensor, MaybeTensor>;

BwdResult rat_attention_backward(Tensor dy, MaybeTensor dchunk_k, MaybeTensor dchunk_v, MaybeTensor drunning_k,
                                 MaybeTensor drunning_v, Tensor q, Tensor k, Tensor v, MaybeTensor gate,
                                 MaybeTensor gate_bias, MaybeTensor out_gate, MaybeTensor rotary_cos,
                                 MaybeTensor rotary_sin, MaybeTensor cu_seqlens, MaybeTensor chunk_k,
                                 MaybeTensor chunk_v, MaybeTensor running_k, MaybeTensor running_v, MaybeTensor lengths,
                                 Tensor y, Tensor lse, Tensor saved_chunk_k, Tensor saved_chunk_v, int64_t chunk_size,
                                 double scale, bool return_state, bool deterministic) {
  const Context c(gate ? "rat_attention_backward" : "chunk_attention_backward", "q", q);
  c.check_rank("chunk_k", saved_chunk_k, 4, "(sequences, H, chunks, D)");
  AttentionBwdParams b;
  b.deterministic = deterministic;
  b.fwd = attention_params(c, q, k, v, gate, out_gate,
                           {gate_bias, rotary_cos, rotary_sin, cu_seqlens, chunk_k, chunk_v, running_k, running_v,
                            lengths, chunk_size, scale, saved_chunk_k.size(2), return_state});
  const Sizes& s = b.fwd.size;
  Tensor dq = c.empty(q, {s.batch, s.tokens, s.q_groups, s.head_dim}, c.dtype);
  Tensor dk = c.empty(q, {s.batch, s.tokens, s.k_groups, s.head_dim}, c.dtype);
  Tensor dv = c.empty(q, {s.batch, s.tokens, s.heads, s.head_dim}, c.dtype);
  MaybeTensor dgate, dout_gate;
  if (gate) dgate = c.empty(q, {s.batch, s.tokens, s.heads, s.head_dim}, c.dtype);
  if (out_gate) dout_gate = c.empty(q, {s.batch, s.tokens, s.heads, s.head_dim}, c.dtype);
  b.dq = Context::rows_of(dq);
  b.dk = Context::rows_of(dk);
  b.dv = Context::rows_of(dv);
  if (dgate) b.dgate = Context::rows_of(*dgate);
  if (dout_gate) b.dout_gate = Context::rows_of(*dout_gate);
  StateGrads small =
      run_backward(c, b, q, {dy, dchunk_k, dchunk_v, drunning_k, drunning_v, y, lse, saved_chunk_k, saved_chunk_v},
                   gate_bias.has_value(), lengths.has_value());
  return {dq,
          dk,
          dv,
          dgate,
          small.dgate_bias,
          dout_gate,
          small.dchunk_k,
          small.dchunk_v,
          small.drunning_k,
          small.drunning_v};
}

using PackedBwdResult = std::tuple<Tensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor>;

PackedBwdResult rat_attention_packed_backward(Tensor dy, MaybeTensor dchunk_k, MaybeTensor dchunk_v,
                                              MaybeTensor drunning_k, MaybeTensor drunning_v, Tensor projection,
                                              int64_t num_heads, int64_t num_groups, bool has_out_gate,
                                              MaybeTensor gate_bias, MaybeTensor rotary_cos, MaybeTensor rotary_sin,
                                              MaybeTensor cu_seqlens, MaybeTensor chunk_k, MaybeTensor chunk_v,
                                              MaybeTensor running_k, MaybeTensor running_v, MaybeTensor lengths,
                                              Tensor y, Tensor lse, Tensor saved_chunk_k, Tensor saved_chunk_v,
                                              int64_t chunk_size, double scale, bool return_state, bool deterministic) {
  const Context c("rat_attention_packed_backward", "projection", projection);
  c.check_rank("chunk_k", saved_chunk_k, 4, "(sequences, H, chunks, D)");
  AttentionBwdParams b;
  b.deterministic = deterministic;
  b.fwd = projection_params(c, projection, num_heads, num_groups,
                            {gate_bias, rotary_cos, rotary_sin, cu_seqlens, chunk_k, chunk_v, running_k, running_v,
                             lengths, chunk_size, scale, saved_chunk_k.size(2), return_state},
                            has_out_gate);
  const Sizes& s = b.fwd.size;
  Tensor dprojection = c.empty(projection, {s.batch, s.tokens, projection.size(2)}, c.dtype);
  AttentionFwdParams grads;
  grads.size = s;
  set_projection_rows(grads, projection_base(dprojection), c.element_size(), has_out_gate);
  b.dq = grads.q;
  b.dk = grads.k;
  b.dv = grads.v;
  b.dgate = grads.gate;
  b.dout_gate = grads.out_gate;
  StateGrads small = run_backward(
      c, b, projection, {dy, dchunk_k, dchunk_v, drunning_k, drunning_v, y, lse, saved_chunk_k, saved_chunk_v},
      gate_bias.has_value(), lengths.has_value());
  return {dprojection, small.dgate_bias, small.dchunk_k, small.dchunk_v, small.drunning_k, small.drunning_v};
}

// ---- chunk_recurrence -------------------------------------------------------------------------------------------------

RecurrenceFwdParams recurrence_params(const Context& c, const Tensor& x, const Tensor& gate,
                                      const MaybeTensor& gate_bias, const MaybeTensor& cu_seqlens,
                                      const MaybeTensor& initial_state, const MaybeTensor& lengths,
                                      int64_t chunk_size) {
  c.check_rank("x", x, 4, "(B, T, G, D)");
  c.check_rank("gate", gate, 4, "(B, T, H, D)");
  RecurrenceFwdParams p;
  Sizes& s = p.size;
  s.dtype = c.kernel_dtype();
  s.batch = gate.size(0);
  s.tokens = gate.size(1);
  s.heads = gate.size(2);
  s.head_dim = gate.size(3);
  s.k_groups = s.q_groups = x.size(2);
  s.chunk_size = chunk_size;
  check_chunk_size(c, chunk_size);
  check_head_dim(c, "gate", s.head_dim);
  check_groups(c, "x", s.k_groups, s.heads);
  p.x = c.rows("x", x, {s.batch, s.tokens, s.k_groups, s.head_dim});
  p.gate = c.rows("gate", gate, {s.batch, s.tokens, s.heads, s.head_dim});
  set_sequences(c, s, cu_seqlens);
  if (gate_bias) p.gate_bias = c.packed("gate_bias", *gate_bias, c.acc, {s.heads, s.head_dim});
  if (initial_state.has_value() != lengths.has_value()) {
    fail(c.op, initial_state ? "lengths" : "initial_state", "expected initial_state and lengths together, got one");
  }
  if (initial_state) {
    p.initial = c.packed("initial_state", *initial_state, c.acc, {s.sequences, s.heads, s.head_dim});
    s.lengths = static_cast<const int32_t*>(c.packed("lengths", *lengths, ScalarType::Int, {s.sequences}));
  }
  s.aligned16 = c.aligned({p.x, p.gate});
  check_can_run(c);
  return p;
}

std::tuple<Tensor, MaybeTensor> chunk_recurrence(Tensor x, Tensor gate, MaybeTensor gate_bias, MaybeTensor cu_seqlens,
                                                 MaybeTensor initial_state, MaybeTensor lengths, int64_t chunk_size,
                                                 bool return_state) {
  const Context c("chunk_recurrence", "x", x);
  RecurrenceFwdParams p = recurrence_params(c, x, gate, gate_bias, cu_seqlens, initial_state, lengths, chunk_size);
  const Sizes& s = p.size;
  Tensor y = c.empty(x, {s.batch, s.tokens, s.heads, s.head_dim}, c.dtype);
  MaybeTensor final_state;
  p.y = Context::rows_of(y);
  if (return_state) {
    final_state = c.empty(x, {s.sequences, s.heads, s.head_dim}, c.acc);
    p.final_state = final_state->data_ptr();
  }
  if (s.sequences > 0 && s.heads > 0 && (s.batch * s.tokens > 0 || return_state))
    launch(c, x, p, RAT_LAUNCHERS(recurrence_fwd));
  return {y, final_state};
}

std::tuple<Tensor, Tensor, MaybeTensor, MaybeTensor> chunk_recurrence_backward(
    Tensor dy, MaybeTensor dfinal, Tensor x, Tensor gate, MaybeTensor gate_bias, MaybeTensor cu_seqlens,
    MaybeTensor initial_state, MaybeTensor lengths, Tensor y, int64_t chunk_size) {
  const Context c("chunk_recurrence_backward", "x", x);
  RecurrenceBwdParams b;
  b.fwd = recurrence_params(c, x, gate, gate_bias, cu_seqlens, initial_state, lengths, chunk_size);
  const Sizes& s = b.fwd.size;
  b.fwd.y = c.rows("y", y, {s.batch, s.tokens, s.heads, s.head_dim});
  c.check_place("dy", dy, c.dtype);
  c.check_shape("dy", dy, {s.batch, s.tokens, s.heads, s.head_dim});
  const Tensor dy_rows = dy.numel() > 0 && dy.stride(3) != 1 ? torch::stable::contiguous(dy) : dy;
  b.dy = Context::rows_of(dy_rows);
  Tensor dfinal_rows;
  if (dfinal) {
    dfinal_rows = torch::stable::contiguous(*dfinal);
    b.dfinal = c.packed("dfinal", dfinal_rows, c.acc, {s.sequences, s.heads, s.head_dim});
  }
  Tensor dx = c.empty(x, {s.batch, s.tokens, s.k_groups, s.head_dim}, c.dtype);
  Tensor dgate = c.empty(x, {s.batch, s.tokens, s.heads, s.head_dim}, c.dtype);
  MaybeTensor dgate_bias, dinitial;
  b.dx = Context::rows_of(dx);
  b.dgate = Context::rows_of(dgate);
  if (gate_bias) {
    dgate_bias = c.empty(x, {s.heads, s.head_dim}, c.acc);
    b.dgate_bias = dgate_bias->data_ptr();
  }
  if (initial_state) {
    dinitial = c.empty(x, {s.sequences, s.heads, s.head_dim}, c.acc);
    b.dinitial = dinitial->data_ptr();
  }
  b.fwd.size.aligned16 = c.aligned({b.fwd.x, b.fwd.gate, b.fwd.y, b.dy, b.dx, b.dgate});
  if (s.sequences > 0 && s.heads > 0 && (s.batch * s.tokens > 0 || initial_state)) {
    launch(c, x, b, RAT_LAUNCHERS(recurrence_bwd));
  } else if (dgate_bias) {
    torch::stable::zero_(*dgate_bias);
  }
  return {dx, dgate, dgate_bias, dinitial};
}

// ---- decode -----------------------------------------------------------------------------------------------------------

int64_t decode_workspace(int64_t pool, int64_t heads, int64_t chunk_rows, int64_t head_dim) {
#ifdef RAT_EXT_CUDA
  DecodeParams p;
  p.pool = p.batch = pool;
  p.heads = heads;
  p.rows = chunk_rows;
  p.head_dim = head_dim;
  return static_cast<int64_t>(cuda::decode_workspace(p));
#else
  (void)pool, (void)heads, (void)chunk_rows, (void)head_dim;
  return 0;
#endif
}

Tensor rat_decode_step(Tensor q, Tensor k, Tensor v, Tensor gate, MaybeTensor gate_bias, MaybeTensor out_gate,
                       MaybeTensor rotary_cos, MaybeTensor rotary_sin, MaybeTensor slots, Tensor chunk_k,
                       Tensor chunk_v, Tensor running_k, Tensor running_v, Tensor lengths, Tensor workspace,
                       int64_t chunk_size, double scale) {
  const Context c("rat_decode_step", "q", q);
  c.check_rank("q", q, 3, "(B, G, D)");
  c.check_rank("v", v, 3, "(B, H, D)");
  DecodeParams p;
  p.dtype = c.kernel_dtype();
  p.batch = v.size(0);
  p.heads = v.size(1);
  p.head_dim = v.size(2);
  p.q_groups = p.k_groups = q.size(1);
  p.chunk_size = chunk_size;
  p.scale = scale;
  check_chunk_size(c, chunk_size);
  check_head_dim(c, "v", p.head_dim);
  check_groups(c, "q", p.q_groups, p.heads);
  const auto rows = [&](const char* argument, const Tensor& x, int64_t heads) {
    c.check_shape(argument, x, {p.batch, heads, p.head_dim});
    c.check_rows(argument, x);
    return Rows{x.data_ptr(), x.size(0) > 1 ? x.stride(0) : 0, 0, x.size(1) > 1 ? x.stride(1) : 0};
  };
  p.q = rows("q", q, p.q_groups);
  p.k = rows("k", k, p.k_groups);
  p.v = rows("v", v, p.heads);
  p.gate = rows("gate", gate, p.heads);
  if (out_gate) p.out_gate = rows("out_gate", *out_gate, p.heads);
  if (gate_bias) p.gate_bias = c.packed("gate_bias", *gate_bias, c.acc, {p.heads, p.head_dim});
  p.rotary = rotary_of(c, rotary_cos, rotary_sin, p.head_dim);
  c.check_rank("cache.chunk_k", chunk_k, 4, "(sequences, H, chunks, D)");
  p.pool = chunk_k.size(0);
  p.rows = chunk_k.size(2);
  p.chunk_k = c.packed("cache.chunk_k", chunk_k, c.dtype, {p.pool, p.heads, p.rows, p.head_dim});
  p.chunk_v = c.packed("cache.chunk_v", chunk_v, c.dtype, {p.pool, p.heads, p.rows, p.head_dim});
  p.running_k = c.packed("cache.running_k", running_k, c.acc, {p.pool, p.heads, p.head_dim});
  p.running_v = c.packed("cache.running_v", running_v, c.acc, {p.pool, p.heads, p.head_dim});
  p.lengths = static_cast<int32_t*>(c.packed("cache.lengths", lengths, ScalarType::Int, {p.pool}));
  if (slots) {
    p.slots = static_cast<const int64_t*>(c.packed("slots", *slots, ScalarType::Long, {p.batch}));
  } else if (p.batch > p.pool) {
    fail(c.op, "q", "expected at most ", p.pool, " rows, one for each sequence of the cache, got ", p.batch);
  }
  c.check_rank("cache.workspace", workspace, 1, "(bytes)");
  const int64_t bytes = c.is_cuda ? decode_workspace(p.pool, p.heads, p.rows, p.head_dim) : 0;
  c.packed("cache.workspace", workspace, ScalarType::Byte, {workspace.numel()});
  if (workspace.numel() < bytes) {
    fail(c.op, "cache.workspace", "expected at least ", bytes, " bytes, got ", workspace.numel());
  }
  p.workspace = workspace.data_ptr();
  Tensor y = c.empty(q, {p.batch, p.heads, p.head_dim}, c.dtype);
  p.y = Rows{y.data_ptr(), p.heads * p.head_dim, 0, p.head_dim};
  p.aligned16 = c.aligned({p.q, p.k, p.v, p.gate, p.out_gate});
  check_can_run(c);
  if (p.batch == 0 || p.heads == 0) return y;
#ifdef RAT_EXT_CUDA
  if (c.is_cuda) {
    const torch::stable::accelerator::DeviceGuard guard(c.device);
    cuda::decode_step(p, current_stream(c));
    return y;
  }
#endif
  cpu::decode_step(p);
  return y;
}

}  // namespace

// ---- the host's thread pool -------------------------------------------------------------------------------------------

void cpu::parallel_for(int64_t n, int64_t grain, ParallelBody body, void* context) {
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

int cpu::num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

}  // namespace rat

// ---- schemas ----------------------------------------------------------------------------------------------------------

// Arguments that the forward and the backward of both entries share, in order.
#define RAT_STATE_ARGS                                                                                                 \
  "Tensor? rotary_cos, Tensor? rotary_sin, Tensor? cu_seqlens, Tensor? chunk_k, Tensor? chunk_v, Tensor? running_k, "  \
  "Tensor? running_v, Tensor? lengths, "
#define RAT_INPUT_ARGS                                                                                                 \
  "Tensor q, Tensor k, Tensor v, Tensor? gate, Tensor? gate_bias, Tensor? out_gate, " RAT_STATE_ARGS
#define RAT_PACKED_ARGS                                                                                                \
  "Tensor projection, SymInt num_heads, SymInt num_groups, bool has_out_gate, Tensor? gate_bias, " RAT_STATE_ARGS
#define RAT_GRAD_ARGS "Tensor dy, Tensor? dchunk_k, Tensor? dchunk_v, Tensor? drunning_k, Tensor? drunning_v, "
#define RAT_SAVED_ARGS "Tensor y, Tensor lse, Tensor saved_chunk_k, Tensor saved_chunk_v, "
#define RAT_FWD_RESULT                                                                                                 \
  "(Tensor y, Tensor lse, Tensor chunk_k_out, Tensor chunk_v_out, Tensor? running_k_out, Tensor? running_v_out, "      \
  "Tensor? lengths_out)"
#define RAT_STATE_GRADS                                                                                                \
  "Tensor? dinitial_chunk_k, Tensor? dinitial_chunk_v, Tensor? dinitial_running_k, Tensor? dinitial_running_v"

STABLE_TORCH_LIBRARY(rat_ext, m) {
  m.def("rat_attention(" RAT_INPUT_ARGS
        "SymInt chunk_size, float scale, SymInt chunk_rows, bool return_state, bool deterministic) -> " RAT_FWD_RESULT);
  m.def("rat_attention_backward(" RAT_GRAD_ARGS RAT_INPUT_ARGS RAT_SAVED_ARGS
        "SymInt chunk_size, float scale, bool return_state, bool deterministic) -> (Tensor dq, Tensor dk, Tensor dv, "
        "Tensor? dgate, "
        "Tensor? dgate_bias, Tensor? dout_gate, " RAT_STATE_GRADS ")");
  m.def("rat_attention_packed(" RAT_PACKED_ARGS
        "SymInt chunk_size, float scale, SymInt chunk_rows, bool return_state, bool deterministic) -> " RAT_FWD_RESULT);
  m.def("rat_attention_packed_backward(" RAT_GRAD_ARGS RAT_PACKED_ARGS RAT_SAVED_ARGS
        "SymInt chunk_size, float scale, bool return_state, bool deterministic) -> (Tensor dprojection, Tensor? "
        "dgate_bias, " RAT_STATE_GRADS ")");
  m.def(
      "chunk_recurrence(Tensor x, Tensor gate, Tensor? gate_bias, Tensor? cu_seqlens, Tensor? initial_state, "
      "Tensor? lengths, SymInt chunk_size, bool return_state) -> (Tensor y, Tensor? final_state)");
  m.def(
      "chunk_recurrence_backward(Tensor dy, Tensor? dfinal, Tensor x, Tensor gate, Tensor? gate_bias, "
      "Tensor? cu_seqlens, Tensor? initial_state, Tensor? lengths, Tensor y, SymInt chunk_size) -> (Tensor dx, "
      "Tensor dgate, Tensor? dgate_bias, Tensor? dinitial)");
  m.def(
      "rat_decode_step(Tensor q, Tensor k, Tensor v, Tensor gate, Tensor? gate_bias, Tensor? out_gate, "
      "Tensor? rotary_cos, Tensor? rotary_sin, Tensor? slots, Tensor(a!) chunk_k, Tensor(b!) chunk_v, "
      "Tensor(c!) running_k, Tensor(d!) running_v, Tensor(e!) lengths, Tensor(f!) workspace, SymInt chunk_size, "
      "float scale) -> Tensor");
  m.def("decode_workspace(SymInt pool, SymInt heads, SymInt chunk_rows, SymInt head_dim) -> SymInt");
}

#define RAT_IMPL_ALL(m)                                                                                                \
  m.impl("rat_attention", TORCH_BOX(&rat::rat_attention));                                                             \
  m.impl("rat_attention_backward", TORCH_BOX(&rat::rat_attention_backward));                                           \
  m.impl("rat_attention_packed", TORCH_BOX(&rat::rat_attention_packed));                                               \
  m.impl("rat_attention_packed_backward", TORCH_BOX(&rat::rat_attention_packed_backward));                             \
  m.impl("chunk_recurrence", TORCH_BOX(&rat::chunk_recurrence));                                                       \
  m.impl("chunk_recurrence_backward", TORCH_BOX(&rat::chunk_recurrence_backward));                                     \
  m.impl("rat_decode_step", TORCH_BOX(&rat::rat_decode_step))

STABLE_TORCH_LIBRARY_IMPL(rat_ext, CPU, m) { RAT_IMPL_ALL(m); }
STABLE_TORCH_LIBRARY_IMPL(rat_ext, CUDA, m) { RAT_IMPL_ALL(m); }
STABLE_TORCH_LIBRARY_IMPL(rat_ext, CompositeExplicitAutograd, m) {
  m.impl("decode_workspace", TORCH_BOX(&rat::decode_workspace));
}

// Told by rat_ext._C.build_info(); module.cpp includes no torch header and cannot know.
namespace rat {
extern const uint64_t torch_target_version;
const uint64_t torch_target_version = TORCH_TARGET_VERSION;
}  // namespace rat
