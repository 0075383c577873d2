#include "ordering.h"

#include "emulator.h"

namespace ptx {

namespace {

void join_clocks(std::vector<uint32_t>& into, const std::vector<uint32_t>& from) {
  if (into.size() < from.size()) into.resize(from.size(), 0);
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

void join_heard(std::vector<Heard>& into, const std::vector<Heard>& from) {
  for (const Heard& h : from) {
    auto same = std::find_if(into.begin(), into.end(), [&](Heard& x) { return x.log == h.log; });
    if (same == into.end()) {
      into.push_back(h);
    } else {
      same->observed = std::max(same->observed, h.observed);
      same->acquired = std::max(same->acquired, h.acquired);
    }
  }
}

uint32_t cluster_of(const Context& c) { return c.block.cluster->number + 1; }
size_t self(const Warp& warp) { return static_cast<size_t>(warp.cluster_index); }

void remember(std::array<uint64_t, 4>& places, size_t& count, uint64_t address) {
  if (std::find(places.begin(), places.end(), address) == places.end())
    places[count++ % places.size()] = address;
}

std::string thread_of(const Context& c, const Stamp& s) {
  size_t blocks = c.block.cluster->blocks.size();
  size_t warps = c.warp.known.clock.size() / blocks, warp = s.thread / 64;
  std::array<uint32_t, 3> block = c.machine.block_of(s.cluster - 1, warp / warps);
  std::string lane =
      s.thread % 64 == kSeveralLanes ? "several lanes" : "lane " + std::to_string(s.thread % 64);
  return "block " + coordinates(block) + ", warp " + std::to_string(warp % warps) + ", " + lane +
         ", at " + place(c.machine, c.machine.module->code[s.pc]);
}

// "byte 12 of out", where the address belongs to a buffer.
std::string byte_of(Context& c, uint64_t address) {
  uint64_t base = 0;
  Allocation* a = c.machine.find(address, base);
  std::string text = "global address " + hex(address);
  if (a != nullptr && address < base + a->size)
    text += ", byte " + std::to_string(address - base) + " of " + a->name;
  return text;
}

// Whether both are strong enough to race with nothing of the other's.
bool strong(const Context& c, const Stamp& s, Scope now) {
  Scope scope = std::min(s.scope, now);
  if (s.cluster != cluster_of(c)) return scope == kDeviceScope;
  size_t warps = c.warp.known.clock.size() / c.block.cluster->blocks.size();
  bool same_block = s.thread / 64 / warps == static_cast<size_t>(c.block.rank);
  return scope >= (same_block ? kBlockScope : kClusterScope);
}

// Between lanes of a warp and warps of a cluster: whether the access comes before what the lane does now.
bool ordered_in_cluster(const Warp& warp, int lane, const Stamp& s) {
  if (s.thread / 64 != warp.cluster_index) return warp.known.clock[s.thread / 64] > s.clock;
  return s.thread % 64 == lane || warp.met > s.clock;
}

}  // namespace

Semantics semantics_of(const Instruction& ins) {
  const std::string& name = ins.words[0];
  Semantics s;
  bool atomic = name == "atom" || name == "red", sided = name == "membar" || name == "fence";
  if (name != "ld" && name != "st" && !atomic && !sided) return s;
  bool acq_rel = has(ins, "acq_rel");
  s.acquire = acq_rel || has(ins, "acquire");
  s.release = acq_rel || has(ins, "release");
  bool strong = atomic || sided || s.acquire || s.release || has(ins, "relaxed") ||
                has(ins, "volatile") || has(ins, "mmio");
  if (strong)
    s.scope = has(ins, "cta") ? kBlockScope : has(ins, "cluster") ? kClusterScope : kDeviceScope;
  if (has(ins, "proxy") || has(ins, "mbarrier_init")) s.scope = kNoScope;  // other kinds of fence
  s.read_only = name == "ld" && has(ins, "nc");
  s.uncached = strong || has(ins, "cg") || has(ins, "cv");
  return s;
}

void Knowledge::join(const Knowledge& other) {
  join_clocks(clock, other.clock);
  join_clocks(to_block, other.to_block);
  join_clocks(to_device, other.to_device);
  join_heard(heard, other.heard);
  waited = waited || other.waited;
}

void meet_lanes(Warp& warp) {
  warp.met = ++warp.known.clock[self(warp)];
  if (!warp.lane_fenced) return;
  uint32_t last = *std::max_element(warp.lane_fences.begin(), warp.lane_fences.end());
  for (auto* visible : {&warp.known.to_block, &warp.known.to_device})
    (*visible)[self(warp)] = std::max((*visible)[self(warp)], last);
  warp.lane_fences.fill(0);
  warp.lane_fenced = false;
}

void publish(Warp& warp, Knowledge& known) {
  meet_lanes(warp);
  known.join(warp.known);
}

void learn(Warp& warp, const Knowledge& known) { warp.known.join(known); }

// ---- Pages ---------------------------------------------------------------------------------------------------------

void Page::reach(uint64_t bytes, int to) {
  if (cells.empty()) {
    cells.resize(bytes >> to);
    shift = to;
  } else if (to < shift) {
    std::vector<Cell> fine(bytes >> to);
    for (size_t i = 0; i < fine.size(); ++i) fine[i] = cells[i >> (shift - to)];
    cells = std::move(fine);
    shift = to;
  }
}

Page* PageTable::find(uint64_t address) {
  uint64_t number = address / kBytes;
  Recent& recent = recent_[number % recent_.size()];
  if (recent.number == number) return recent.page;
  auto found = pages_.find(number);
  if (found == pages_.end()) return nullptr;
  recent = {number, found->second.get()};
  return recent.page;
}

Page& PageTable::make(uint64_t address, int shift) {
  Page* page = find(address);
  if (page == nullptr) {
    auto& made = pages_[address / kBytes];
    if (spare_.empty()) {
      made = std::make_unique<Page>();
    } else {
      made = std::move(spare_.back());
      spare_.pop_back();
    }
    made->cells.clear();
    page = made.get();
  }
  page->reach(kBytes, shift);
  return *page;
}

void PageTable::clear() {
  for (auto& [number, page] : pages_) spare_.push_back(std::move(page));
  pages_.clear();
  recent_.fill(Recent());
}

// ---- Releases and acquires -----------------------------------------------------------------------------------------

void Ordering::begin_launch(bool programmatic) {
  programmatic_ = programmatic;
  std::swap(now_, before_);
  now_.clear();
  logs_.clear();
  signals_.clear();
}

void Ordering::clear() {
  begin_launch(false);
  before_.clear();
}

void Ordering::fence(Context& c, Scope scope) {
  Warp& w = c.warp;
  Knowledge& k = w.known;
  uint32_t now = ++k.clock[self(w)];
  bool all = c.active == ~w.exited;
  if (scope != kNoScope) join_clocks(k.to_block, k.clock);
  if (scope != kDeviceScope) return;
  uint32_t before = k.to_device.empty() ? 0 : k.to_device[self(w)];
  join_clocks(k.to_device, k.clock);
  if (!all) {
    // A fence of some lanes covers what the others of the warp did before they met, and theirs up to here.
    k.to_device[self(w)] = std::max(before, w.met);
    for (size_t i = 0; i < kLanes; ++i)
      w.lane_fences[i] = c.active >> i & 1 ? now : w.lane_fences[i];
    w.lane_fenced = true;
  }
  for (Heard& h : k.heard) h.acquired = h.observed;
}

void Ordering::observe(Context& c, uint64_t address) {
  uint32_t cluster = cluster_of(c);
  if (signals_.size() < cluster) signals_.resize(cluster);
  remember(signals_[cluster - 1].observed, signals_[cluster - 1].observations, address);
  auto found = logs_.find(address);
  if (found == logs_.end()) return;
  Log& log = *found->second;
  Knowledge& known = c.warp.known;
  uint32_t count = static_cast<uint32_t>(log.releases.size()), before = 0;
  for (const Heard& h : known.heard) before = h.log == &log ? h.observed : before;
  if (before < count) join_heard(known.heard, log.releases.back().heard);
  join_heard(known.heard, {{&log, count, c.ins.semantics.acquire ? count : 0}});
  // Of the same cluster, the clocks themselves.
  log.any(cluster, before, count, [&](const Release& r) {
    join_clocks(known.clock, r.to_block);
    return false;
  });
}

void Ordering::release(Context& c, uint64_t address) {
  uint32_t cluster = cluster_of(c);
  if (signals_.size() < cluster) signals_.resize(cluster);
  remember(signals_[cluster - 1].written, signals_[cluster - 1].writes, address);
  if (c.ins.semantics.release) fence(c, c.ins.semantics.scope);
  const Knowledge& k = c.warp.known;
  if (k.to_block.empty()) return;
  auto& log = logs_[address];
  if (log == nullptr) log = std::make_unique<Log>();
  uint32_t warp = static_cast<uint32_t>(c.warp.cluster_index);
  Release r = {cluster, warp, k.to_block, k.to_device, c.warp.lane_fences, {}};
  if (!log->releases.empty()) {
    const Release& last = log->releases.back();
    if (last.cluster == cluster && last.warp == warp && last.to_block == r.to_block &&
        last.to_device == r.to_device && last.lane_fences == r.lane_fences)
      return;
    r.heard = last.heard;
  }
  for (const Heard& h : k.heard) {
    if (h.log != log.get()) join_heard(r.heard, {{h.log, h.acquired, h.acquired}});
  }
  log->by_cluster[cluster].push_back(static_cast<uint32_t>(log->releases.size()));
  log->releases.push_back(std::move(r));
}

// Whether a release that the warp observed, or acquired, made it visible.
bool Ordering::announced(const Context& c, const Stamp& s, bool acquired) const {
  size_t warp = s.thread / 64, lane = s.thread % 64;
  auto covers = [&](const Release& r) {
    return (warp < r.to_device.size() && r.to_device[warp] > s.clock) ||
           (r.warp == warp && lane < kLanes && r.lane_fences[lane] > s.clock);
  };
  for (const Heard& h : c.warp.known.heard) {
    if (h.log->any(s.cluster, 0, acquired ? h.acquired : h.observed, covers)) return true;
  }
  return false;
}

bool Ordering::ordered(const Context& c, int lane, const Stamp& s) const {
  return s.cluster == cluster_of(c) ? ordered_in_cluster(c.warp, lane, s) : announced(c, s, false);
}

// Whether the other cluster wrote, strongly, where this one read so: a fence is all that was missing.
bool Ordering::signalled(const Context& c, const Stamp& s) const {
  uint32_t mine = cluster_of(c);
  if (s.cluster == mine || signals_.size() < std::max(s.cluster, mine)) return false;
  for (uint64_t address : signals_[mine - 1].observed) {
    const auto& written = signals_[s.cluster - 1].written;
    if (address != 0 && std::find(written.begin(), written.end(), address) != written.end())
      return true;
  }
  return false;
}

// ---- Accesses ------------------------------------------------------------------------------------------------------

// What is accessed, by a lane.
struct Ordering::Word {
  int lane;
  bool shared;
  uint64_t address;
  Scope scope;  // of the access
  uint32_t cluster, clock, pc;  // of the warp
  uint16_t thread;

  Word(const Context& c, int lane, bool shared, uint64_t address, Access access)
      : lane(lane),
        shared(shared),
        address(address),
        // Volatile accesses to shared memory are no atomics.
        scope(shared && access != Access::kAtomic ? kNoScope : c.ins.semantics.scope),
        cluster(cluster_of(c)),
        clock(c.warp.known.clock[self(c.warp)]),
        pc(c.warp.splits[c.split].pc),
        thread(static_cast<uint16_t>(c.warp.cluster_index * 64 + lane)) {}
};

void Ordering::race(Context& c, const Word& word, const char* what, const Stamp& s) {
  if (word.shared)
    fault(c, word.lane, "shared-memory race",
          std::string(what) + " at shared address " + hex(word.address) + " by " + thread_of(c, s) +
              ", without a barrier between");
  bool fence = signalled(c, s);
  fault(c, word.lane, fence ? "missing fence" : "global-memory race",
        std::string(what) + " at " + byte_of(c, word.address) + " by " + thread_of(c, s) +
            (fence ? ", announced without a fence (__threadfence) after it"
                   : ", which nothing orders before it"));
}

void Ordering::read(Context& c, const Word& word, Cell& cell) {
  const Semantics& semantics = c.ins.semantics;
  Stamp& w = cell.write;
  if (w.cluster != 0) {
    if (!ordered(c, word.lane, w) && !strong(c, w, word.scope))
      race(c, word, "a read after a write", w);
    if (semantics.read_only)
      fault(c, word.lane, "read-only path",
            "ld.global.nc of what the launch wrote: " + byte_of(c, word.address) + ", by " +
                thread_of(c, w));
    if ((w.history & kStale) && !semantics.uncached && w.cluster != word.cluster &&
        !announced(c, w, true))
      fault(c, word.lane, "missing fence",
            "a read at " + byte_of(c, word.address) +
                " that an L1 cache may answer with what it "
                "held before the write by " +
                thread_of(c, w) +
                ": no fence (__threadfence) stands "
                "between what announced that and this read");
  }
  w.history |= (semantics.read_only ? kReadOnly : 0) | (semantics.uncached ? 0 : kCached);
  Stamp& r = cell.read;
  uint16_t thread = word.thread;
  if (r.cluster != word.cluster) {
    if (r.cluster != 0) cell.foreign = r;
  } else if (r.thread / 64 != thread / 64) {
    cell.other = r;
  } else if (r.clock == word.clock && r.thread != thread) {
    thread = static_cast<uint16_t>(thread / 64 * 64 + kSeveralLanes);
  }
  r = {word.cluster, word.clock, word.pc, thread, word.scope, 0};
}

void Ordering::write(Context& c, const Word& word, Cell& cell) {
  Stamp& w = cell.write;
  if (w.cluster != 0 && !ordered(c, word.lane, w) && !strong(c, w, word.scope))
    race(c, word, "a write after a write", w);
  for (const Stamp* r : {&cell.read, &cell.other, &cell.foreign}) {
    if (r->cluster != 0 && !ordered(c, word.lane, *r) && !strong(c, *r, word.scope))
      race(c, word, "a write after a read", *r);
  }
  if (w.history & kReadOnly)
    fault(c, word.lane, "read-only path",
          "a write to what the launch read by ld.global.nc: " + byte_of(c, word.address) + ", by " +
              thread_of(c, cell.read));
  uint8_t stale = w.history & (kStale | kCached) ? kStale : 0;
  w = {word.cluster, word.clock, word.pc, word.thread, word.scope, stale};
}

// A launch that may start before the one before it has ended must not touch what that one touches.
void Ordering::check_previous(Context& c, int lane, uint64_t address, int bytes, bool writes) {
  Page* page = before_.find(address);
  if (page == nullptr) return;
  uint64_t offset = address % PageTable::kBytes;
  for (uint64_t i = offset >> page->shift;
       i <= (offset + static_cast<uint64_t>(bytes) - 1) >> page->shift; ++i) {
    const Cell& cell = page->cells[i];
    if (cell.write.cluster != 0 || (writes && cell.read.cluster != 0))
      fault(c, lane, "programmatic launch",
            byte_of(c, address) + " before griddepcontrol.wait: the launch before this one " +
                (cell.write.cluster != 0 ? "writes" : "reads") + " it");
  }
}

void Ordering::touch_cells(Context& c, Word word, Page& page, uint64_t offset, int bytes,
                           Access access) {
  uint64_t first = offset >> page.shift;
  uint64_t last = (offset + static_cast<uint64_t>(bytes) - 1) >> page.shift;
  for (uint64_t i = first; i <= last; ++i, word.address += uint64_t{1} << page.shift) {
    if (access == Access::kRead) {
      read(c, word, page.cells[i]);
    } else {
      write(c, word, page.cells[i]);
    }
  }
}

void Ordering::touch(Context& c, int lane, uint64_t address, int bytes, Access access) {
  if (programmatic_ && !c.warp.known.waited)
    check_previous(c, lane, address, bytes, access != Access::kRead);
  Page& page = now_.make(address, __builtin_ctz(static_cast<unsigned>(bytes)));
  Word word(c, lane, false, address, access);
  touch_cells(c, word, page, address % PageTable::kBytes, bytes, access);
}

void Ordering::touch_shared(Context& c, int lane, Block& owner, uint32_t address, int bytes,
                            Access access) {
  Page& page = owner.pages[address / kSharedPage];
  page.reach(kSharedPage, __builtin_ctz(static_cast<unsigned>(bytes)));
  Word word(c, lane, true, address, access);
  touch_cells(c, word, page, address % kSharedPage, bytes, access);
}

}  // namespace ptx
