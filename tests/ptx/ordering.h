// Which accesses to global memory are ordered, after the memory model of PTX (ISA 9.0, chapter 8).
//
// In a cluster, vector clocks over its warps, which barriers join. From one cluster to another, a release (a fence,
// then a strong write: an atomic, volatile or relaxed one) that a strong read observes, and the fence after that. Each
// word that a launch touches has a cell of its last write and reads; whatever conflicts with them must be ordered
// after them.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptx {

struct Context;
struct Instruction;
struct Warp;
enum class Access { kRead, kWrite, kAtomic };

// Who sees an operation in order. Weak operations have no scope.
enum Scope : uint8_t { kNoScope, kBlockScope, kClusterScope, kDeviceScope };

struct Semantics {
  Scope scope = kNoScope;
  bool acquire = false, release = false;
  bool read_only = false;  // ld.global.nc
  bool uncached = false;  // by L1
};
Semantics semantics_of(const Instruction& ins);

struct Log;
// How much of a log a warp knows: the releases that it observed, and of those, the ones before its last fence.
struct Heard {
  Log* log;
  uint32_t observed, acquired;
};

// What a warp knows to have happened.
struct Knowledge {
  std::vector<uint32_t> clock;  // by warp of the cluster: what it did before that
  // How much of it fences have made visible, to the block and to the device; empty: nothing.
  std::vector<uint32_t> to_block, to_device;
  std::vector<Heard> heard;
  bool waited = false;  // for the launch before this one

  void join(const Knowledge& other);
};

// What one warp made visible by a strong write to the log's address.
struct Release {
  uint32_t cluster, warp;
  std::vector<uint32_t> to_block, to_device;
  std::array<uint32_t, 32> lane_fences;
  std::vector<Heard> heard;  // by it and by those before it
};

struct Log {
  std::vector<Release> releases;
  std::unordered_map<uint32_t, std::vector<uint32_t>>
      by_cluster;  // places in `releases`, ascending

  // Whether `holds` is true of one of the cluster's releases in [begin, end).
  template <class Holds>
  bool any(uint32_t cluster, uint32_t begin, uint32_t end, Holds holds) const {
    auto found = by_cluster.find(cluster);
    if (found == by_cluster.end()) return false;
    const std::vector<uint32_t>& places = found->second;
    auto last = std::lower_bound(places.begin(), places.end(), end);
    while (last != places.begin() && *--last >= begin) {
      if (holds(releases[*last])) return true;
    }
    return false;
  }
};

// One access to a word.
struct Stamp {
  uint32_t cluster = 0;  // its number plus 1; 0: there was no access
  uint32_t clock = 0, pc = 0;
  uint16_t thread = 0;  // warp of the cluster * 64 + lane, or + kSeveralLanes
  Scope scope = kNoScope;
};
constexpr uint16_t kSeveralLanes = 32;

struct Cell {
  Stamp write, read;  // the last ones
  Stamp other, foreign;  // reads before `read`: by another warp of its cluster, by another cluster
  bool read_only = false;  // it was read through the read-only path
  bool cached = false;  // it was read since the last write, so that an L1 may hold it
  bool stale = false;  // an L1 may hold what was there before the last write
};

// Cells of kBytes bytes of memory. Their size is that of the smallest access so far.
struct Page {
  static constexpr uint64_t kBytes = 4096;
  int shift = 0;
  std::vector<Cell> cells;

  void refine(int to);
};

class PageTable {
 public:
  Page* find(uint64_t address);
  Page& make(uint64_t address, int shift);
  void clear();

 private:
  struct Recent {
    uint64_t number = ~uint64_t{0};
    Page* page = nullptr;
  };
  std::unordered_map<uint64_t, std::unique_ptr<Page>> pages_;
  std::vector<std::unique_ptr<Page>> spare_;
  std::array<Recent, 64> recent_;
};

// Where a cluster announced something by a strong write, and what it heard by a strong read: the last places.
struct Signals {
  std::array<uint64_t, 4> written{}, observed{};
  size_t writes = 0, observations = 0;
};

class Ordering {
 public:
  void begin_launch(bool programmatic);
  void clear();
  // An access of `bytes` bytes: faults if it is not ordered after those that it conflicts with.
  void touch(Context& c, int lane, uint64_t address, int bytes, Access access);
  // The other half of a strong access: what it observes, what it releases.
  void observe(Context& c, uint64_t address);
  void release(Context& c, uint64_t address);
  void fence(Context& c, Scope scope);

 private:
  void read(Context& c, int lane, uint64_t address, Cell& cell);
  void write(Context& c, int lane, uint64_t address, Cell& cell);
  void check_previous(Context& c, int lane, uint64_t address, int bytes, bool writes);
  bool announced(const Context& c, const Stamp& s, bool acquired) const;
  bool ordered(const Context& c, int lane, const Stamp& s) const;
  bool signalled(const Context& c, const Stamp& s) const;
  [[noreturn]] void race(Context& c, int lane, const char* what, uint64_t address, const Stamp& s);

  bool programmatic_ = false;
  PageTable now_, before_;  // this launch's and the one's before it
  std::unordered_map<uint64_t, std::unique_ptr<Log>> logs_;  // by address
  std::vector<Signals> signals_;  // by cluster
};

// Between lanes of a warp and warps of a cluster: whether what `thread` did at `clock` comes before what the lane does
// now.
bool ordered_in_cluster(const Warp& warp, int lane, uint16_t thread, uint32_t clock);
// What a warp did so far is before whatever joins `known` later.
void publish(Warp& warp, Knowledge& known);
void learn(Warp& warp, const Knowledge& known);
// Lanes of a warp meet: what each of them did is before what all of them do from here on.
void meet_lanes(Warp& warp);

}  // namespace ptx
