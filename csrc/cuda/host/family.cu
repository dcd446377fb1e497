// RAT_EXT_KERNELS: which families are put first.
#include "family.h"

#include <cstdlib>
#include <cstring>
#include <sstream>
#include <utility>
#include <vector>

namespace rat::cuda {
namespace {

struct Name {
  const char* phase;
  const char* family;
};
// Every row of every table.
constexpr Name kNames[] = {
    {"attention_fwd", "sm90"}, {"attention_fwd", "sm80"}, {"attention_fwd", "f32"},    {"attention_bwd", "sm90"},
    {"attention_bwd", "sm80"}, {"attention_bwd", "f32"},  {"recurrence_bwd", "short"}, {"recurrence_bwd", "scan"},
};

struct Forced {
  std::string phase;  // empty: every phase
  std::string family;
};

std::vector<Forced> read_forced() {
  std::vector<Forced> forced;
  const char* variable = std::getenv("RAT_EXT_KERNELS");
  const std::string text = variable ? variable : "";
  if (text.empty() || text == "auto") return forced;
  std::istringstream items(text);
  for (std::string item; std::getline(items, item, ',');) {
    const size_t equals = item.find('=');
    Forced one;
    if (equals != std::string::npos) one.phase = item.substr(0, equals);
    one.family = equals == std::string::npos ? item : item.substr(equals + 1);
    bool known = false;
    for (const Name& name : kNames) {
      known = known || (one.family == name.family && (one.phase.empty() || one.phase == name.phase));
    }
    if (!known) {
      std::string names = "auto";
      for (const Name& name : kNames) names += std::string(", ") + name.phase + "=" + name.family;
      throw std::runtime_error("rat_ext: RAT_EXT_KERNELS: expected " + names + " or a family's name alone, got '" +
                               item + "'");
    }
    forced.push_back(std::move(one));
  }
  return forced;
}

}  // namespace

bool is_forced(const char* phase, const char* family) {
  static const std::vector<Forced> forced = read_forced();
  for (const Forced& one : forced) {
    if (one.family == family && (one.phase.empty() || one.phase == phase)) return true;
  }
  return false;
}

}  // namespace rat::cuda
