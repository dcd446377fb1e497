// RAT_EXT_KERNELS: which families are put first.
#include "family.h"

#include <algorithm>
#include <cstdlib>
#include <sstream>
#include <utility>

namespace rat::cuda {
namespace {

using Name =
    std::pair<std::string, std::string>;  // phase, family; in RAT_EXT_KERNELS the phase may be empty: every phase

std::vector<Name>& names() {  // a function's own, so that it is there before the tables of other files
  static std::vector<Name> all;
  return all;
}

template <class Text>
bool matches(const Name& forced, const Text& phase, const Text& family) {
  return forced.second == family && (forced.first.empty() || forced.first == phase);
}

std::vector<Name> read_forced() {
  std::vector<Name> forced;
  const char* variable = std::getenv("RAT_EXT_KERNELS");
  const std::string text = variable ? variable : "";
  if (text.empty() || text == "auto") return forced;
  std::istringstream items(text);
  for (std::string item; std::getline(items, item, ',');) {
    const size_t equals = item.find('=');
    const Name one =
        equals == std::string::npos ? Name("", item) : Name(item.substr(0, equals), item.substr(equals + 1));
    const auto& all = names();
    if (std::none_of(all.begin(), all.end(), [&](const Name& n) { return matches(one, n.first, n.second); })) {
      std::vector<Name> sorted = all;
      std::sort(sorted.begin(), sorted.end());
      std::string known = "auto";
      for (const Name& name : sorted) known += ", " + name.first + "=" + name.second;
      throw std::invalid_argument("rat_ext: RAT_EXT_KERNELS: expected " + known + " or a family's name alone, got '" +
                                  item + "'");
    }
    forced.push_back(one);
  }
  return forced;
}

}  // namespace

void register_family(const char* phase, const char* family) { names().emplace_back(phase, family); }

bool is_forced(const char* phase, const char* family) {
  static const std::vector<Name> forced = read_forced();
  return std::any_of(forced.begin(), forced.end(), [&](const Name& one) { return matches(one, phase, family); });
}

void check_forced() { is_forced("", ""); }

}  // namespace rat::cuda
