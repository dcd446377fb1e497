// Names and addresses of the kernels of a family, for build_info().
#pragma once

#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "../phases.h"
#include "variant.h"

namespace rat::cuda {

class KernelTable {
 public:
  template <class... Arguments>
  void add(std::string name, void (*kernel)(Arguments...)) {
    add(std::move(name), reinterpret_cast<const void*>(kernel));
  }
  void add(std::string name, const void* function) {
    names_.push_back(std::move(name));
    entries_.push_back({names_.back().c_str(), function});
  }
  template <class V, class... Arguments>
  void add(const char* name, V variant, const char* type, void (*kernel)(Arguments...)) {
    add(name, variant, type, reinterpret_cast<const void*>(kernel));
  }
  template <class V>
  void add(const char* name, V, const char* type, const void* function) {
    add(std::string(name) + "<" + type + ", " + std::to_string(V::W) + (V::kVector ? ">" : ", unaligned>"), function);
  }
  void add(KernelList list) {
    for (int i = 0; i < list.count; ++i) add(list.entries[i].name, list.entries[i].function);
  }
  KernelList list() const { return {entries_.data(), static_cast<int>(entries_.size())}; }

 private:
  std::deque<std::string> names_;
  std::vector<KernelEntry> entries_;
};

}  // namespace rat::cuda
