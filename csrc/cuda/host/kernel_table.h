// Names and addresses of the kernels of a family, for build_info().
#pragma once

#include "../phases.h"

namespace rat::cuda {

// Lives as long as the process, copies too: what it holds is not given back.
class KernelTable {
 public:
  KernelTable();
  // "name", "name<type, W>", or as printf makes it.
  template <class... Arguments>
  void add(const char* name, void (*kernel)(Arguments...)) {
    add(reinterpret_cast<const void*>(kernel), "%s", name);
  }
  template <class V, class... Arguments>
  void add(const char* name, V, const char* type, void (*kernel)(Arguments...)) {
    add(reinterpret_cast<const void*>(kernel), "%s<%s, %d>", name, type, V::W);
  }
  void add(const void* kernel, const char* form, ...) __attribute__((format(printf, 3, 4)));
  void add(KernelList list);
  KernelList list() const;

 private:
  struct Entries;
  Entries* entries_;
};

}  // namespace rat::cuda
