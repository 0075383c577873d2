// When the registers of a warp are ready: the critical path of a block, if nothing but latency held it up.
//
// Instructions of a straight section, from one branch or barrier to the next, start as soon as what they read is
// ready, as if ptxas had put them in the best order, and take an issue slot each. The section ends when all of its
// instructions have started. Barriers join their warps' times; copies in the background complete later.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace ptx {

struct Context;
struct Frame;
struct Function;
struct Instruction;
struct Warp;

// What an instruction waits for and how long its result takes, found when it is parsed.
struct Timing {
  bool ends = false;  // a section
  bool by_handler = false;  // threads meet in it: the executing function says when
  bool copies = false;  // in the background
  uint16_t cycles = 0;
  uint16_t results = 0, count = 0;
  uint32_t begin = 0;  // of its registers in Module::timed, results first
};

struct Timeline {
  uint64_t begin = 0;  // of the section
  uint64_t issued = 0;  // instructions of the section
  uint64_t latest = 0;  // start of an instruction so far
  uint64_t stored = 0;  // latest start of a store that later loads of the warp may read
  uint64_t polling = 0;  // since when the warp polls an mbarrier, plus 1; 0: it does not
  uint64_t copies = 0;  // when the cp.async since the last commit are complete
  std::vector<uint64_t> groups;  // by commit, those that were not waited for yet

  uint64_t now() const { return std::max(latest, begin + issued); }
  // Nothing starts before `time` any more.
  void join(uint64_t time) {
    latest = begin = std::max(now(), time);
    issued = 0;
  }
  void commit_copies() {
    groups.push_back(copies);
    copies = 0;
  }
  void wait_copies(size_t keep) {
    for (; groups.size() > keep; groups.erase(groups.begin())) join(groups.front());
  }
};

// From the last arrival to those who wait. What releases to other blocks waits for the warp's stores, as SASS shows:
// MEMBAR.ALL.GPU stands before every UCGABAR_ARV that is not relaxed.
constexpr uint64_t kBarrierCycles = 25, kClusterBarrierCycles = 190;
constexpr uint64_t kFenceCycles = 500, kBlockFenceCycles = 20;

// The instruction's results are ready its latency after its operands are; returns when it starts.
uint64_t issue(Context& c);
// It is passed by: its guard is false for all lanes.
void pass_by(Warp& warp, const Frame& frame, const Instruction& ins);
// A wait for an mbarrier whose phase was complete at `completed`, or is not yet: polls take no time of their own, for
// how many there are depends on the order of warps.
void poll(Context& c, uint64_t before, bool over, uint64_t completed);
// The instruction's registers are appended to `timed`.
Timing timing_of(const Instruction& ins, const Function& function, std::vector<uint32_t>& timed);
// Registers and predicates that a frame of the function has a time for.
size_t timed_slots(const Function& function);

}  // namespace ptx
