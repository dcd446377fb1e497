// Registration of the operators of schemas.h. Each stands in four libraries, with one body:
//
//   rat_ext          runs it
//   rat_ext_eager    runs it for rat_ext/_autograd.py, which records the gradient itself: it has no autograd of its own, and its
//                    results may share memory. The overload "brief" leaves out arguments that are seldom there, each of which
//                    costs the host as much when it is None as when it is a tensor; "y" is brief and returns y alone, for calls
//                    without a gradient. "saving", and the brief overload of an op that has a gradient, return one more:
//                    Call::copies(), so that what a forward had to copy is saved as it was copied
//   rat_ext_check    checks the arguments alone. Tensors are on the meta device; `devices` tells, argument by argument, where
//                    those that they stand for are. What torch.ops.rat_ext.<op> would say of them is what this says
//   rat_ext_explain  tells which kernels would run: a line "phase<tab>family<tab>1 or 0<tab>why" for each family, 1 where it is chosen
#include <sstream>
#include <string>

#include "call.h"

namespace rat {

// ---- the host's thread pool -------------------------------------------------------------------------------------------

void cpu::parallel_for(int64_t n, int64_t grain, ParallelBody body, void* context) {
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

int cpu::num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

// Told by rat_ext._C.build_info(); module.cpp includes no torch header and cannot know.
extern const uint64_t torch_target_version;
const uint64_t torch_target_version = TORCH_TARGET_VERSION;

namespace {

using torch::stable::detail::StableLibrary;

template <class Op>
void run_boxed(StableIValue* stack, uint64_t, uint64_t) {
  Call<Op> call(stack, Mode::run);
  run(call);
  call.push_results(stack);
}

template <class Op, bool kBrief, bool kOnlyY, bool kSaving>
void run_eager_boxed(StableIValue* stack, uint64_t, uint64_t) {
  Call<Op> call(stack, Mode::run, kBrief);
  call.share = true;
  call.only_y = kOnlyY;
  call.saves_copies = kSaving;
  run(call);
  call.push_results(stack);
  if constexpr (kSaving) stack[Call<Op>::kSignature.result_count] = torch::stable::detail::from(call.copies());
}

template <class Op>
void check_boxed(StableIValue* stack, uint64_t, uint64_t) {
  const auto devices = torch::stable::detail::to<std::vector<int64_t>>(stack[0]);
  Call<Op> call(stack + 1, Mode::check, false, &devices);
  run(call);
}

template <class Op>
void explain_boxed(StableIValue* stack, uint64_t, uint64_t) {
  Call<Op> call(stack, Mode::explain);
  run(call);
  stack[0] = torch::stable::detail::from(call.choices);
}

// Calls f with a null pointer to each op.
template <class F>
void for_each_op(F&& f) {
  f(static_cast<RatAttention*>(nullptr));
  f(static_cast<RatAttentionBackward*>(nullptr));
  f(static_cast<RatAttentionPacked*>(nullptr));
  f(static_cast<RatAttentionPackedBackward*>(nullptr));
  f(static_cast<ChunkRecurrence*>(nullptr));
  f(static_cast<ChunkRecurrenceBackward*>(nullptr));
  f(static_cast<RatDecodeStep*>(nullptr));
  f(static_cast<RatAttentionCached*>(nullptr));
}

template <class Op>
std::string name_of(Op*) {
  return std::string(Call<Op>::kSignature.op);
}

// "op(" + first + the arguments + ") -> " + result. Nothing is written: no aliases.
std::string schema_like(std::string schema, const char* first, const char* result) {
  schema = schema.substr(0, schema.find(" -> ")) + " -> " + result;
  for (size_t at; (at = schema.find("!)")) != std::string::npos;) schema.erase(at - 2, 4);
  return schema.insert(schema.find('(') + 1, first);
}

// Are there results beside y? Those are the forwards that have a gradient.
template <class Op>
constexpr bool kMoreThanY = Call<Op>::kSignature.results[0].name == "y" && Call<Op>::kSignature.result_count > 1;

// "op.overload(", those arguments that are not seldom, and the results.
template <class Op>
std::string brief_schema(Op* op, const char* overload) {
  const std::string whole = Op::kSchema;
  const size_t open = whole.find('('), close = whole.find(") -> ");
  std::istringstream items(whole.substr(open + 1, close - open - 1));
  std::string brief = name_of(op) + "." + overload + "(", item;
  for (size_t i = 0; std::getline(items >> std::ws, item, ','); ++i) {
    if (!Call<Op>::kSignature.arguments[i].seldom) brief += (brief.back() == '(' ? "" : ", ") + item;
  }
  return brief + whole.substr(close);
}

// The same with the result Call::copies().
std::string saving_schema(const std::string& schema) {
  return schema.substr(0, schema.size() - 1) + ", Tensor?[]? copies)";
}

void implement(StableLibrary& m) {
  for_each_op([&]<class Op>(Op* op) { m.impl(name_of(op).c_str(), run_boxed<Op>); });
}

void implement_eager(StableLibrary& m) {
  for_each_op([&]<class Op>(Op* op) {
    m.impl(name_of(op).c_str(), run_eager_boxed<Op, false, false, false>);
    m.impl((name_of(op) + ".brief").c_str(), run_eager_boxed<Op, true, false, kMoreThanY<Op>>);
    if constexpr (kMoreThanY<Op>) {
      m.impl((name_of(op) + ".y").c_str(), run_eager_boxed<Op, true, true, false>);
      m.impl((name_of(op) + ".saving").c_str(), run_eager_boxed<Op, false, false, true>);
    }
  });
}

}  // namespace
}  // namespace rat

STABLE_TORCH_LIBRARY(rat_ext, m) {
  rat::for_each_op([&]<class Op>(Op*) { m.def(Op::kSchema); });
  m.def("decode_workspace(SymInt pool, SymInt heads, SymInt chunk_rows, SymInt head_dim) -> SymInt");
}
STABLE_TORCH_LIBRARY_IMPL(rat_ext, CPU, m) { rat::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(rat_ext, CUDA, m) { rat::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(rat_ext, CompositeExplicitAutograd, m) {
  m.impl("decode_workspace", TORCH_BOX(&rat::decode_workspace));
}

STABLE_TORCH_LIBRARY(rat_ext_eager, m) {
  rat::for_each_op([&]<class Op>(Op* op) {
    m.def(Op::kSchema);
    const std::string brief = rat::brief_schema(op, "brief");
    if constexpr (rat::kMoreThanY<Op>) {
      m.def(rat::saving_schema(brief).c_str());
      const std::string schema = rat::brief_schema(op, "y"), whole = Op::kSchema;
      m.def((schema.substr(0, schema.find(" -> ")) + " -> Tensor").c_str());
      m.def(rat::saving_schema(whole.substr(0, whole.find('(')) + ".saving" + whole.substr(whole.find('('))).c_str());
    } else {
      m.def(brief.c_str());
    }
  });
}
STABLE_TORCH_LIBRARY_IMPL(rat_ext_eager, CPU, m) { rat::implement_eager(m); }
STABLE_TORCH_LIBRARY_IMPL(rat_ext_eager, CUDA, m) { rat::implement_eager(m); }

STABLE_TORCH_LIBRARY(rat_ext_check, m) {
  rat::for_each_op([&]<class Op>(Op*) { m.def(rat::schema_like(Op::kSchema, "int[] devices, ", "()").c_str()); });
}
STABLE_TORCH_LIBRARY_IMPL(rat_ext_check, CompositeExplicitAutograd, m) {
  rat::for_each_op([&]<class Op>(Op* op) { m.impl(rat::name_of(op).c_str(), rat::check_boxed<Op>); });
}

STABLE_TORCH_LIBRARY(rat_ext_explain, m) {
  rat::for_each_op([&]<class Op>(Op*) { m.def(rat::schema_like(Op::kSchema, "", "str").c_str()); });
}
STABLE_TORCH_LIBRARY_IMPL(rat_ext_explain, CompositeExplicitAutograd, m) {
  rat::for_each_op([&]<class Op>(Op* op) { m.impl(rat::name_of(op).c_str(), rat::explain_boxed<Op>); });
}
