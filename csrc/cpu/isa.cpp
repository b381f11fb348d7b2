#include "isa.h"

#include <cstdlib>
#include <stdexcept>

namespace pathrnn {

std::vector<const Isa*> compiled_isas() {
#if defined(__x86_64__)
  return {&kAvx512, &kAvx2, &kPortable};
#else
  return {&kPortable};
#endif
}

namespace {

const Isa* find_isa() {
  const char* wanted = std::getenv("PATHRNN_CPU_ISA");
  std::string known;
  for (const Isa* isa : compiled_isas()) {
    const bool named = wanted && std::string(wanted) == isa->name;
    if (named && !isa->supported()) {
      throw std::invalid_argument(std::string("PATHRNN_CPU_ISA is ") + wanted + ", which this CPU does not support");
    }
    if (named || (!wanted && isa->supported())) return isa;
    known += std::string(known.empty() ? "" : ", ") + isa->name;
  }
  throw std::invalid_argument(std::string("PATHRNN_CPU_ISA is ") + wanted + "; use one of " + known);
}

}  // namespace

const Isa& active_isa() {
  static const Isa* const isa = find_isa();
  return *isa;
}

}  // namespace pathrnn
