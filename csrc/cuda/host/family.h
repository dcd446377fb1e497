// A phase of an op may have several kernel families. Each is a row of the phase's table, best first; choose() takes the first
// that serves the call. RAT_EXT_KERNELS, read once, puts others first:
//
//   RAT_EXT_KERNELS=sm80                                  in every phase that has a family of that name
//   RAT_EXT_KERNELS=attention_fwd=sm80,recurrence_bwd=scan  phase by phase
//   RAT_EXT_KERNELS=auto                                  nothing, as when it is unset
//
// A family that is named but does not serve the call is passed over: the sm80 family takes no float32.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "../explain.h"
#include "../phases.h"

namespace rat::cuda {

template <class Params, class Scratch>
struct Family {
  const char* name;
  const char* (*refuses)(const Params&);  // null where it serves the call, else the reason in words
  Launch (*plan)(const Params&, Scratch&, Arena&);
  bool reads_narrow_rows = false;  // of out_gate, in a forward (launchers.h)
};

// A name that RAT_EXT_KERNELS may give. Tables call it when the library is loaded.
void register_family(const char* phase, const char* family);

// Does RAT_EXT_KERNELS name this family of this phase? Throws std::invalid_argument where it names one that no table has.
bool is_forced(const char* phase, const char* family);

// The families of a phase. Row is a Family, or anything else with a name and refuses(). Tables are constants of a namespace.
template <class Row>
class FamilyTable {
 public:
  FamilyTable(const char* phase, std::initializer_list<Row> rows) : phase_(phase), rows_(rows) {
    for (const Row& row : rows_) register_family(phase, row.name);
  }

  template <class Params>
  const Row& choose(const Params& params) const {
    if (const Row* row = pick(params)) return *row;
    std::string reasons;
    for (const Row& row : rows_) {
      reasons += std::string(reasons.empty() ? "" : "; ") + row.name + ": " + row.refuses(params);
    }
    throw std::runtime_error(std::string("rat_ext: ") + phase_ + ": no kernel family serves this call (" + reasons +
                             ")");
  }

  template <class Params>
  std::vector<Choice> explain(const Params& params) const {
    const Row* picked = pick(params);
    std::vector<Choice> choices;
    for (const Row& row : rows_) {
      const bool forced = is_forced(phase_, row.name);
      const char* reason = row.refuses(params);
      std::string why;
      if (&row == picked) {
        why = forced ? "forced by RAT_EXT_KERNELS" : "the first that serves the call";
      } else if (reason != nullptr) {
        why = std::string(forced ? "forced by RAT_EXT_KERNELS, but " : "") + reason;
      } else {
        why = std::string("serves the call too, but ") + picked->name +
              (is_forced(phase_, picked->name) && !forced ? " is forced by RAT_EXT_KERNELS" : " comes first");
      }
      choices.push_back({phase_, row.name, &row == picked, why});
    }
    return choices;
  }

 private:
  template <class Params>
  const Row* pick(const Params& params) const {
    for (const Row& row : rows_) {
      if (is_forced(phase_, row.name) && row.refuses(params) == nullptr) return &row;
    }
    for (const Row& row : rows_) {
      if (row.refuses(params) == nullptr) return &row;
    }
    return nullptr;
  }

  const char* phase_;
  std::vector<Row> rows_;
};

}  // namespace rat::cuda
