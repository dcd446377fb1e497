// One call of an operator: its arguments by name, the checks that name them, the results. An op's run() reads
//
//   lead<"x">(call);                                      // every other tensor is held against its device and dtype
//   const int64_t heads = size<"gate">(call, 2);
//   p.x = rows<"x">(call, {batch, tokens, groups, dim});
//   p.y = make_rows<"y">(call, {batch, tokens, heads, dim});
//   launch(call, p, RAT_LAUNCHERS(recurrence_fwd));
//
// Names are looked up in the op's schema (schemas.h) when this is compiled; one that is not there does not compile.
//
// Bad arguments throw std::invalid_argument, which reaches Python as ValueError and reads
// "rat_ext.<op>: <argument>: expected <...>, got <...>".
#pragma once

// This folder is the only one that sees torch. It uses the LibTorch stable ABI, so one build runs on every torch from 2.11 on:
// TORCH_TARGET_VERSION comes from csrc/build.txt.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <forward_list>
#include <initializer_list>
#include <iterator>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "../arena.h"
#include "../launchers.h"
#include "../wrong_value.h"
#include "schemas.h"

namespace rat {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::initializer_list<int64_t>;

// ---- schemas, read when compiling ---------------------------------------------------------------------------------------

enum class Kind { tensor, maybe_tensor, integer, real, boolean };

struct Parameter {
  std::string_view name;
  Kind kind = Kind::tensor;
  bool seldom = false;  // most calls do without it: an optional tensor, or a flag that has its usual value
};

struct Signature {
  static constexpr size_t kMost = 40;
  std::string_view op;
  std::array<Parameter, kMost> arguments{}, results{};
  size_t argument_count = 0, result_count = 0;
};

consteval Kind kind_of(std::string_view type) {
  if (type.starts_with("Tensor")) return type.ends_with("?") ? Kind::maybe_tensor : Kind::tensor;  // also "Tensor(a!)?"
  if (type == "SymInt") return Kind::integer;
  if (type == "float") return Kind::real;
  if (type == "bool") return Kind::boolean;
  throw "a type that no schema has used yet";
}

// Of packed sequences, of a state that is continued, returned or gets a gradient, of a pool in pages or FP8.
consteval bool is_seldom(std::string_view name, Kind kind) {
  constexpr std::string_view kTensors[] = {"cu_seqlens",   "chunk_k",        "chunk_v",        "running_k",
                                           "running_v",    "lengths",        "initial_state",  "dchunk_k_out",
                                           "dchunk_v_out", "drunning_k_out", "drunning_v_out", "dfinal_state",
                                           "page_table",   "scale_k",        "scale_v"};
  if (kind == Kind::boolean) return name == "return_state" || name == "deterministic";
  return kind == Kind::maybe_tensor && std::ranges::find(kTensors, name) != std::end(kTensors);
}

// The value of a flag that is seldom given.
constexpr bool usual(std::string_view name) { return name == "deterministic"; }

// "Type name, Type name": fills `list`, returns how many.
consteval size_t parse_list(std::string_view text, std::array<Parameter, Signature::kMost>& list) {
  size_t count = 0;
  while (!text.empty()) {
    const std::string_view item = text.substr(0, text.find(", "));
    text.remove_prefix(item.size() < text.size() ? item.size() + 2 : item.size());
    const size_t space = item.find(' ');
    const std::string_view name = item.substr(space + 1);
    const Kind kind = kind_of(item.substr(0, space));
    list[count++] = {name, kind, is_seldom(name, kind)};
  }
  return count;
}

// "op(Type name, ...) -> (Type name, ...)"
consteval Signature parse(std::string_view schema) {
  Signature s;
  const size_t open = schema.find('('), arrow = schema.find(") -> (");
  s.op = schema.substr(0, open);
  s.argument_count = parse_list(schema.substr(open + 1, arrow - open - 1), s.arguments);
  s.result_count = parse_list(schema.substr(arrow + 6, schema.size() - arrow - 7), s.results);
  return s;
}

// A name as a template argument.
template <size_t N>
struct Name {
  char text[N]{};
  consteval Name(const char (&name)[N]) {  // NOLINT: names are written as plain text
    for (size_t i = 0; i < N; ++i) text[i] = name[i];
  }
  constexpr std::string_view view() const { return {text, N - 1}; }
};

constexpr size_t kNone = ~size_t{0};

constexpr size_t find(const std::array<Parameter, Signature::kMost>& list, size_t count, std::string_view name) {
  for (size_t i = 0; i < count; ++i) {
    if (list[i].name == name) return i;
  }
  return kNone;
}

// ---- a call -------------------------------------------------------------------------------------------------------------

// What is done with a call. Arguments are checked alike in all.
enum class Mode {
  run,
  check,   // tensors have sizes and strides but no memory (those of tracing, of the meta device): nothing runs
  explain  // nothing runs; tells which kernels would
};

// Where a tensor is: a GPU's index, or one of these.
constexpr int32_t kCpu = -1;
constexpr int32_t kMeta = -2;
constexpr int32_t kElsewhere = -3;

// A tensor of torch. torch::stable::Tensor would put a counter beside each, which a call of many small tensors would notice.
struct Release {
  void operator()(AtenTensorHandle x) const { aoti_torch_delete_tensor_object(x); }
};
using Handle = std::unique_ptr<std::remove_pointer_t<AtenTensorHandle>, Release>;

void* address_of(const Handle& x);
Tensor torch_tensor(const Handle& x);  // the same tensor, for torch's own functions

// A tensor and what is asked of it more than once.
struct View {
  explicit View(Handle x);
  int64_t numel() const;
  bool is_contiguous() const;

  Handle handle;
  bool defined = false;
  ScalarType dtype{};
  int32_t device = kElsewhere;
  size_t rank = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  void* data = nullptr;
};

// What does not depend on the op's schema.
class CallBase {
 public:
  CallBase(std::string_view op_, std::string_view state, Mode mode_) : op(op_), mode(mode_), state_(state) {}
  CallBase(const CallBase&) = delete;

  template <class... Parts>
  [[noreturn]] void fail(std::string_view argument, const Parts&... parts) const {
    std::ostringstream message;
    message << "rat_ext." << op << ": " << shown(argument) << ": ";
    (message << ... << parts);
    throw std::invalid_argument(message.str());
  }

  // Sets the device and the dtype of the call.
  void set_lead(std::string_view argument, const View& x);
  bool on_gpu() const { return device >= 0; }
  DType kernel_dtype() const;
  int64_t element_size() const { return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2; }

  void check_place(std::string_view argument, const View& x, ScalarType type) const;
  void check_shape(std::string_view argument, const View& x, Shape sizes) const;
  void check_rank(std::string_view argument, const View& x, size_t rank, const char* form) const;
  // A contiguous last dimension, in the dtype of the call.
  void check_rows(std::string_view argument, const View& x) const;
  void check_packed(std::string_view argument, const View& x, ScalarType type, Shape sizes) const;

  // The same numbers as kernels read them, the last dimension being contiguous: on a GPU, where some row does not start at a
  // multiple of 16 bytes, memory that copy_rows() fills. With `leave_narrow` narrow rows (launchers.h) of two-byte elements stay
  // where they are, and the call `has_narrow`.
  const View& with_rows(const View& x);
  // Before the kernels of the call, on their stream: all copies that were asked for, at once.
  void copy_rows(void* stream);
  // Columns of the last dimension: the same memory.
  const View& columns(const View& x, int64_t first, int64_t count);
  // Rows of a (B, T, heads, D) tensor of any strides; of one (B, T, width), whose stride of heads is the caller's to set.
  Rows rows_of(const View& tensor);
  // The same numbers at an address that is a multiple of 16 bytes.
  void* aligned_data(const View& x);
  // Checked, and copied where the strides are not what kernels read.
  Rows copied_rows(std::string_view argument, const View& x, Shape sizes);
  const void* copied(std::string_view argument, const View& x, ScalarType type, Shape sizes);

  // Memory for the result `name`, uninitialised.
  Handle empty(std::string_view name, Shape sizes, ScalarType type);
  // Results of the call's dtype that are made from here on, `elements` of them in up to six tensors, may share one allocation,
  // and scratch memory with them. Each allocation costs the host a microsecond or two, but one that is shared lives as long as
  // the last of its tensors: only a small one is.
  void expect(int64_t elements);
  // Memory of a kernel, 256-byte aligned; lives as long as the call.
  void* scratch(size_t bytes);
  // For a result that is not returned.
  void* scratch(std::string_view name, Shape sizes, ScalarType type);
  void* current_stream() const;
  // Throws where the kernels cannot run: a GPU that is too old, a build without CUDA.
  void check_can_run() const;

  // Adds a row to what Mode::explain returns.
  void explain(std::string_view phase, std::string_view family, bool chosen, std::string_view why);
  // Adds what becomes of rows that do not start at multiples of 16 bytes. `narrow`: kernels read narrow ones.
  void explain_rows(std::string_view argument, const View& x, bool narrow);

  std::string_view op;
  Mode mode;
  bool states_given = false;  // chunk_attention: "k_states" and "v_states"
  ScalarType dtype{};         // of the rows
  ScalarType acc{};           // of tables, biases and running states: float32, or float64 beside float64
  int32_t device = kElsewhere;
  bool only_y = false;  // is the first result all that is returned? Others are scratch then
  bool share = false;  // may results share memory? Where torch looks on (tracing, its checks of operators) they may not
  bool saves_copies = false;  // are copies() returned, for a backward that reads them?
  bool leave_narrow = false, has_narrow = false;
  std::string choices;  // of Mode::explain, a line for each family: phase, family, 1 where it is chosen, why

 protected:
  // The copy that with_rows() made, null where it made none.
  const View* copy_of(const View& x) const;
  bool has_copies() const { return !copies_.empty(); }

 private:
  struct Copied {
    const View* from;
    const View* to;
  };

  std::string shown(std::string_view argument) const;
  // Bytes that all rows start at multiples of: 16, or a smaller power of two.
  int64_t row_multiple(const View& x) const;
  int64_t bytes_of(std::string_view name, Shape sizes, ScalarType type) const;
  Handle torch_empty(Shape sizes, ScalarType type) const;
  // Null where the shared allocation has no room.
  Handle shared_empty(Shape sizes, ScalarType type, int64_t bytes);
  const View& keep(const Tensor& copy);
  const View& keep(Handle x) { return kept_.emplace_front(std::move(x)); }

  std::string_view state_;
  const View* lead_ = nullptr;
  std::forward_list<View> kept_;  // copies and scratch
  std::vector<Copied> copies_;    // those of with_rows()
  Handle block_;                  // what results and scratch share: of the call's dtype, in one dimension
  size_t block_used_ = 0, block_bytes_ = 0;
};

template <class Op>
class Call : public CallBase {
 public:
  static constexpr Signature kSignature = parse(Op::kSchema);

  // Takes the arguments from the stack, which in a brief call has those alone that are not `seldom`. `devices`, of a checked call:
  // where its tensors are, argument by argument.
  Call(StableIValue* stack, Mode mode, bool brief = false, const std::vector<int64_t>* devices = nullptr)
      : CallBase(kSignature.op, Op::kState, mode), brief_(brief) {
    for (size_t i = 0; i < kSignature.argument_count; ++i) {
      const Kind kind = kSignature.arguments[i].kind;
      if (brief && kSignature.arguments[i].seldom) {
        if (kind == Kind::boolean) numbers_[i] = torch::stable::detail::from(usual(kSignature.arguments[i].name));
        continue;
      }
      const StableIValue value = *stack++;
      if (kind == Kind::tensor) {
        tensors_[i].emplace(Handle(torch::stable::detail::to<AtenTensorHandle>(value)));
      } else if (kind == Kind::maybe_tensor) {
        auto x = torch::stable::detail::to<std::optional<AtenTensorHandle>>(value);
        if (x) tensors_[i].emplace(Handle(*x));
      } else {
        numbers_[i] = value;
      }
      if (devices && tensors_[i]) tensors_[i]->device = static_cast<int32_t>(devices->at(i));
    }
  }

  template <Name name>
  static constexpr bool has_argument = find(kSignature.arguments, kSignature.argument_count, name.view()) != kNone;

  template <Name name>
  static consteval size_t argument() {
    constexpr size_t i = find(kSignature.arguments, kSignature.argument_count, name.view());
    static_assert(i != kNone, "no such argument in the op's schema");
    return i;
  }
  template <Name name>
  static consteval size_t result() {
    constexpr size_t i = find(kSignature.results, kSignature.result_count, name.view());
    static_assert(i != kNone, "no such result in the op's schema");
    return i;
  }

  // Python's None arrives as a tensor that is not defined.
  void check_required() const {
    for (size_t i = 0; i < kSignature.argument_count; ++i) {
      if (kSignature.arguments[i].kind == Kind::tensor && !tensors_[i]->defined) {
        fail(kSignature.arguments[i].name, "expected a tensor, got None");
      }
    }
  }

  const std::optional<View>& tensor(size_t i) const { return tensors_[i]; }
  StableIValue number(size_t i) const { return numbers_[i]; }
  Handle& returned(size_t i) { return results_[i]; }

  // Hands the results over to the stack.
  void push_results(StableIValue* stack) {
    for (size_t i = 0; i < (only_y ? 1 : kSignature.result_count); ++i) {
      if (kSignature.results[i].kind == Kind::tensor) {
        stack[i] = torch::stable::detail::from(results_[i].release());
      } else {
        stack[i] = torch::stable::detail::from(results_[i] ? std::optional(results_[i].release()) : std::nullopt);
      }
    }
  }

  // For each argument that the call took from the stack the copy of its rows that kernels read, where there is one. None where
  // nothing was copied, as mostly.
  std::optional<std::vector<std::optional<Tensor>>> copies() const {
    if (!has_copies()) return std::nullopt;
    std::vector<std::optional<Tensor>> list;
    for (size_t i = 0; i < kSignature.argument_count; ++i) {
      if (brief_ && kSignature.arguments[i].seldom) continue;
      const View* copy = tensors_[i] ? copy_of(*tensors_[i]) : nullptr;
      list.push_back(copy ? std::optional(torch_tensor(copy->handle)) : std::nullopt);
    }
    return list;
  }

 private:
  bool brief_;
  std::array<std::optional<View>, kSignature.argument_count> tensors_;
  std::array<StableIValue, kSignature.argument_count> numbers_{};
  std::array<Handle, kSignature.result_count> results_;
};

// ---- arguments by name --------------------------------------------------------------------------------------------------

template <Name name, class Op>
bool given(const Call<Op>& call) {
  return call.tensor(Call<Op>::template argument<name>()).has_value();
}

template <Name name, class Op>
const View& tensor(const Call<Op>& call) {
  return *call.tensor(Call<Op>::template argument<name>());
}

template <Name name, class Op>
int64_t size(const Call<Op>& call, size_t d) {
  return tensor<name>(call).sizes[d];
}

// A number or a flag, in the type that the schema gives it.
template <Name name, class Op>
auto value(const Call<Op>& call) {
  constexpr size_t i = Call<Op>::template argument<name>();
  constexpr Kind kind = Call<Op>::kSignature.arguments[i].kind;
  static_assert(kind != Kind::tensor && kind != Kind::maybe_tensor);
  using T = std::conditional_t<kind == Kind::integer, int64_t, std::conditional_t<kind == Kind::real, double, bool>>;
  return torch::stable::detail::to<T>(call.number(i));
}

template <Name name, class Op>
void lead(Call<Op>& call) {
  call.check_required();
  call.set_lead(name.view(), tensor<name>(call));
}

template <Name name, class Op>
void check_rank(const Call<Op>& call, size_t rank, const char* form) {
  call.check_rank(name.view(), tensor<name>(call), rank, form);
}

// A (B, T, heads, D) tensor of the call's dtype, of any strides with a contiguous last dimension. Null where not given.
template <Name name, class Op>
Rows rows(Call<Op>& call, Shape sizes) {
  if (!given<name>(call)) return {};
  const View& x = tensor<name>(call);
  call.check_shape(name.view(), x, sizes);
  call.check_rows(name.view(), x);
  return call.rows_of(x);
}

// A contiguous tensor: states, lengths. 16-byte aligned, by a copy where it has to be. Null where not given.
template <Name name, class Op>
void* packed(Call<Op>& call, ScalarType type, Shape sizes) {
  if (!given<name>(call)) return nullptr;
  const View& x = tensor<name>(call);
  call.check_packed(name.view(), x, type, sizes);
  return call.aligned_data(x);
}

// Of any strides, copied where they are not what kernels read: tables, and gradients that come in (those of a sum are expanded
// scalars). Null where not given.
template <Name name, class Op>
const void* copied(Call<Op>& call, ScalarType type, Shape sizes) {
  return given<name>(call) ? call.copied(name.view(), tensor<name>(call), type, sizes) : nullptr;
}

template <Name name, class Op>
Rows copied_rows(Call<Op>& call, Shape sizes) {
  return call.copied_rows(name.view(), tensor<name>(call), sizes);
}

// ---- results by name ----------------------------------------------------------------------------------------------------

// Allocates a result. Its memory is uninitialised.
template <Name name, class Op>
void* make(Call<Op>& call, Shape sizes, ScalarType type) {
  if (call.only_y && Call<Op>::template result<name>() > 0) return call.scratch(name.view(), sizes, type);
  Handle& x = call.returned(Call<Op>::template result<name>());
  x = call.empty(name.view(), sizes, type);
  return address_of(x);
}

template <Name name, class Op>
Rows make_rows(Call<Op>& call, Shape sizes) {
  const int64_t* n = sizes.begin();
  return {make<name>(call, sizes, call.dtype), n[1] * n[2] * n[3], n[2] * n[3], n[3]};
}

// Where nothing runs that would write it.
template <Name name, class Op>
void zero(Call<Op>& call) {
  if (const Handle& x = call.returned(Call<Op>::template result<name>())) {
    Tensor target = torch_tensor(x);
    torch::stable::zero_(target);
  }
}

// ---- checks that several ops share ----------------------------------------------------------------------------------------

void check_head_dim(const CallBase& call, std::string_view argument, int64_t head_dim);
void check_groups(const CallBase& call, std::string_view argument, int64_t groups, int64_t heads);
void check_chunk_size(const CallBase& call, int64_t chunk_size);
void check_tokens(const CallBase& call, int64_t tokens);

// (H, D), or null.
template <class Op>
const void* gate_bias_of(Call<Op>& call, int64_t heads, int64_t head_dim) {
  return copied<"gate_bias">(call, call.acc, {heads, head_dim});
}

template <class Op>
Rotary rotary_of(Call<Op>& call, int64_t head_dim) {
  if (given<"rotary_cos">(call) != given<"rotary_sin">(call)) {
    call.fail(given<"rotary_cos">(call) ? "rotary_sin" : "rotary_cos", "expected both rotary tables or none, got one");
  }
  if (!given<"rotary_cos">(call)) return {};
  check_rank<"rotary_cos">(call, 2, "(chunks, D / 2)");
  const int64_t table_rows = size<"rotary_cos">(call, 0);
  return {copied<"rotary_cos">(call, call.acc, {table_rows, head_dim / 2}),
          copied<"rotary_sin">(call, call.acc, {table_rows, head_dim / 2}), table_rows};
}

// At least `needed` rows. Tables without any have no memory either, and would pass for none.
template <class Op>
void check_rotary_rows(const Call<Op>& call, int64_t needed) {
  if (!given<"rotary_cos">(call) || size<"rotary_cos">(call, 0) >= needed) return;
  call.fail("rotary_cos", "expected at least ", needed, needed == 1 ? " row" : " rows", ", one for each chunk, got ",
            size<"rotary_cos">(call, 0));
}

// Sequences of the call: rows of the batch, or runs of one row that cu_seqlens delimits.
template <class Op>
void set_sequences(Call<Op>& call, Sizes& s) {
  check_tokens(call, s.tokens);
  s.sequences = s.batch;
  if (!given<"cu_seqlens">(call)) return;
  if (s.batch != 1) {
    call.fail("cu_seqlens", "expected packed sequences in a batch of 1, got a batch of ", s.batch);
  }
  check_rank<"cu_seqlens">(call, 1, "(sequences + 1)");
  s.sequences = size<"cu_seqlens">(call, 0) - 1;
  if (s.sequences < 0) call.fail("cu_seqlens", "expected at least one element, got none");
  if (s.sequences == 0 && s.tokens != 0) {
    call.fail("cu_seqlens", "expected its last element to be the number of tokens ", s.tokens, ", got no sequence");
  }
  s.cu_seqlens = static_cast<const int32_t*>(packed<"cu_seqlens">(call, ScalarType::Int, {s.sequences + 1}));
}

// ---- kernels ------------------------------------------------------------------------------------------------------------

#ifdef RAT_EXT_CUDA
#define RAT_LAUNCHERS(op) cpu::op, cuda::op
#else
#define RAT_LAUNCHERS(op) cpu::op, nullptr
#endif

// What Mode::explain says of a launch: every phase that has several families on a GPU; on the CPU, the instruction set.
void explain(CallBase&, const AttentionFwdParams&);
void explain(CallBase&, const AttentionBwdParams&);
void explain(CallBase&, const RecurrenceFwdParams&);
void explain(CallBase&, const RecurrenceBwdParams&);
void explain(CallBase&, const DecodeParams&);
void explain(CallBase&, const AttentionCachedParams&);

// Narrow rows that the kernels of a call read. On a GPU.
template <class Params>
NarrowRows narrow_rows(const CallBase&, const Params&);

// Runs the launcher of the tensors' device; on a GPU there, on the current stream.
template <class Params>
void launch(CallBase& call, const Params& params,
            std::type_identity_t<void (*)(const Params&, const Allocator&)> on_cpu,
            [[maybe_unused]] std::type_identity_t<void (*)(const Params&, const Allocator&, void*)> on_gpu) {
  if (call.mode == Mode::check) return;
  if (call.mode == Mode::explain) return explain(call, params);
  call.check_can_run();
  const Allocator allocator = {
      [](void* context, size_t bytes) { return static_cast<CallBase*>(context)->scratch(bytes); }, &call};
#ifdef RAT_EXT_CUDA
  if (call.on_gpu()) {
    const torch::stable::accelerator::DeviceGuard guard(call.device);
    void* const stream = call.current_stream();
    call.copy_rows(stream);
    return on_gpu(params, allocator, stream);
  }
#endif
  try {
    on_cpu(params, allocator);
  } catch (const WrongValue& error) {
    call.fail(error.argument, error.what());
  }
}

// Each op's body, in the file of its name.
void run(Call<RatAttention>&);
void run(Call<RatAttentionBackward>&);
void run(Call<RatAttentionPacked>&);
void run(Call<RatAttentionPackedBackward>&);
void run(Call<ChunkRecurrence>&);
void run(Call<ChunkRecurrenceBackward>&);
void run(Call<RatDecodeStep>&);
void run(Call<RatAttentionCached>&);
int64_t decode_workspace(int64_t pool, int64_t heads, int64_t chunk_rows, int64_t head_dim);

}  // namespace rat
