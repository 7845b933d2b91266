// Which kernel tables were compiled, which this CPU can run, and the one in use.
#pragma once

#include <string>
#include <vector>

#include "kernels.hpp"

namespace specfast {

struct IsaEntry {
  const KernelTable* table;
  bool supported;  // by this CPU
};

/// Every compiled table, slowest first.
const std::vector<IsaEntry>& compiled_isas();

/// The table named `isa`; empty means SPECFAST_ISA if set, else the best supported one. Null when unknown or
/// unsupported, with the reason in *why.
const KernelTable* find_kernels(const std::string& isa, std::string* why);

}  // namespace specfast
