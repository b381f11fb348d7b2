#include "check.h"

#include <algorithm>
#include <fstream>
#include <string>

namespace pathrnn {
namespace {

constexpr double kUnlimited = std::numeric_limits<double>::infinity();

// The number at the head of a file of the system's; unlimited where there is none ("max", or no such file).
double number_in(const char* path) {
  std::ifstream file(path);
  double value;
  return file >> value ? value : kUnlimited;
}

}  // namespace

double available_memory() {
  double result = kUnlimited;
  std::ifstream file("/proc/meminfo");
  for (std::string name, unit; file >> name;) {
    double kibibytes;
    if (name == "MemAvailable:" && file >> kibibytes) result = kibibytes * 1024;
    std::getline(file, unit);
  }
  // What a container may take. Its use counts files that the system keeps in memory only as long as there is room.
  const double limit = number_in("/sys/fs/cgroup/memory.max");
  return std::min(result, limit);
}

}  // namespace pathrnn
