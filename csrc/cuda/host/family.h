// A phase of an op may have several kernel families. Each is a row of the phase's table, best first; choose() takes the first
// that serves the call. RAT_EXT_KERNELS, read once, puts others first:
//
//   RAT_EXT_KERNELS=sm80                                  in every phase that has a family of that name
//   RAT_EXT_KERNELS=attention_fwd=sm80,recurrence_bwd=scan  phase by phase
//   RAT_EXT_KERNELS=auto                                  nothing, as when it is unset
//
// A family that is named but does not serve the call is passed over: the sm80 family takes no float32.
#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <stdexcept>
#include <string>

#include "../../arena.h"

namespace rat::cuda {

// What a phase does once its scratch is there. It holds references to the params, which live as long as the call.
using Launch = std::function<void(cudaStream_t)>;

template <class Params, class Scratch>
struct Family {
  const char* name;
  const char* (*refuses)(const Params&);  // null where it serves the call, else the reason in words
  Launch (*plan)(const Params&, const Scratch&, Arena&);
};

// Does RAT_EXT_KERNELS name this family of this phase? Throws std::runtime_error where it names one that does not exist.
bool is_forced(const char* phase, const char* family);

// The table of a phase, as choose() and explain() walk it.
template <class Row, size_t N, class Params>
const Row& choose(const char* phase, const Row (&table)[N], const Params& params) {
  for (const Row& row : table) {
    if (is_forced(phase, row.name) && row.refuses(params) == nullptr) return row;
  }
  std::string reasons;
  for (const Row& row : table) {
    const char* reason = row.refuses(params);
    if (reason == nullptr) return row;
    reasons += std::string(reasons.empty() ? "" : "; ") + row.name + ": " + reason;
  }
  throw std::runtime_error(std::string("rat_ext: ") + phase + ": no kernel family serves this call (" + reasons + ")");
}

}  // namespace rat::cuda
