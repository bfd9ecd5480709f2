#include "isa/permission.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#endif

namespace tokenswift {
namespace {

#if defined(__x86_64__) && defined(__linux__)
bool processor_has_tiles() {
  constexpr unsigned bf16 = 1u << 22, registers = 1u << 24, bytes = 1u << 25, all = bf16 | registers | bytes;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & all) == all;
}

// The system has to save the registers when it changes threads. It says in XCR0 which ones it does.
bool system_saves_tiles() {
  constexpr unsigned reads_xcr0 = 1u << 27;  // OSXSAVE
  constexpr uint32_t tiles = 3u << 17;       // their configuration, and their data
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & reads_xcr0)) return false;
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & tiles) == tiles;
}

// Returns an empty text where tiles are allowed.
std::string why_not() {
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM in Linux's headers from 5.16 on
  if (!processor_has_tiles()) return "the processor has no AMX with bf16 and int8";
  if (!system_saves_tiles()) return "the system does not save AMX's registers";
  if (syscall(SYS_arch_prctl, request, tile_data) == 0) return "";
  return std::string("the system does not allow AMX: ") + std::strerror(errno);
}
#else
bool processor_has_tiles() { return false; }
std::string why_not() { return "AMX is for Linux on x86-64"; }
#endif

}  // namespace

bool tiles_allowed(std::string* why) {
  static const std::string reason = why_not();
  if (why && !reason.empty()) *why = reason;
  return reason.empty();
}

std::string refused_tiles() {
  std::string why;
  return processor_has_tiles() && !tiles_allowed(&why) ? why : "";
}

}  // namespace tokenswift
