#include "kernel_table.h"

#include <cstdarg>
#include <cstdio>
#include <deque>
#include <string>
#include <vector>

namespace rat::cuda {

struct KernelTable::Entries {
  std::deque<std::string> names;
  std::vector<KernelEntry> kernels;
};

KernelTable::KernelTable() : entries_(new Entries) {}

void KernelTable::add(const void* kernel, const char* form, ...) {
  char name[200];
  std::va_list arguments;
  va_start(arguments, form);
  std::vsnprintf(name, sizeof(name), form, arguments);
  va_end(arguments);
  entries_->names.emplace_back(name);
  entries_->kernels.push_back({entries_->names.back().c_str(), kernel});
}

void KernelTable::add(KernelList list) {
  entries_->kernels.insert(entries_->kernels.end(), list.entries, list.entries + list.count);
}

KernelList KernelTable::list() const { return {entries_->kernels.data(), static_cast<int>(entries_->kernels.size())}; }

}  // namespace rat::cuda
