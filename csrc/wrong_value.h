// What a launcher on the CPU throws where the values of a tensor are wrong: cu_seqlens, lengths, slots. The call that it serves
// knows the op, and what its user calls the argument, and makes the message of it (csrc/ops/call.h).
#pragma once

#include <stdexcept>
#include <string>

namespace rat {

struct WrongValue : std::invalid_argument {
  WrongValue(const std::string& argument_, const std::string& expected, const std::string& got)
      : std::invalid_argument("expected " + expected + ", got " + got), argument(argument_) {}

  std::string argument;  // of the operator, with an index: "lengths[3]"
};

}  // namespace rat
