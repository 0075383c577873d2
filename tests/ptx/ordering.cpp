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

bool strong(const Context& c, const Stamp& s) {
  Scope scope = std::min(s.scope, c.ins.semantics.scope);
  if (s.cluster != cluster_of(c)) return scope == kDeviceScope;
  size_t warps = c.warp.known.clock.size() / c.block.cluster->blocks.size();
  bool same_block = s.thread / 64 / warps == static_cast<size_t>(c.block.rank);
  return scope >= (same_block ? kBlockScope : kClusterScope);
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

bool ordered_in_cluster(const Warp& warp, int lane, uint16_t thread, uint32_t clock) {
  if (thread / 64 != warp.cluster_index) return warp.known.clock[thread / 64] > clock;
  return thread % 64 == lane || warp.met > clock;
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

void Page::refine(int to) {
  std::vector<Cell> fine(kBytes >> to);
  for (size_t i = 0; i < fine.size(); ++i) fine[i] = cells[i >> (shift - to)];
  cells = std::move(fine);
  shift = to;
}

Page* PageTable::find(uint64_t address) {
  uint64_t number = address / Page::kBytes;
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
    auto& made = pages_[address / Page::kBytes];
    if (spare_.empty()) {
      made = std::make_unique<Page>();
    } else {
      made = std::move(spare_.back());
      spare_.pop_back();
    }
    made->shift = shift;
    made->cells.assign(Page::kBytes >> shift, Cell());
    page = made.get();
  } else if (shift < page->shift) {
    page->refine(shift);
  }
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
  return s.cluster == cluster_of(c) ? ordered_in_cluster(c.warp, lane, s.thread, s.clock)
                                    : announced(c, s, false);
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

void Ordering::race(Context& c, int lane, const char* what, uint64_t address, const Stamp& s) {
  bool fence = signalled(c, s);
  fault(c, lane, fence ? "missing fence" : "global-memory race",
        std::string(what) + " at " + byte_of(c, address) + " by " + thread_of(c, s) +
            (fence ? ", announced without a fence (__threadfence) after it"
                   : ", which nothing orders before it"));
}

void Ordering::read(Context& c, int lane, uint64_t address, Cell& cell) {
  const Semantics& semantics = c.ins.semantics;
  const Stamp& w = cell.write;
  if (w.cluster != 0) {
    if (!ordered(c, lane, w) && !strong(c, w)) race(c, lane, "a read after a write", address, w);
    if (semantics.read_only)
      fault(c, lane, "read-only path",
            "ld.global.nc of what the launch wrote: " + byte_of(c, address) + ", by " +
                thread_of(c, w));
    if (cell.stale && !semantics.uncached && w.cluster != cluster_of(c) && !announced(c, w, true))
      fault(c, lane, "missing fence",
            "a read at " + byte_of(c, address) +
                " that an L1 cache may answer with what it held "
                "before the write by " +
                thread_of(c, w) +
                ": no fence (__threadfence) stands between "
                "what announced that and this read");
  }
  cell.read_only = cell.read_only || semantics.read_only;
  cell.cached = cell.cached || !semantics.uncached;
  Stamp& r = cell.read;
  uint32_t cluster = cluster_of(c), now = c.warp.known.clock[self(c.warp)];
  uint16_t thread = static_cast<uint16_t>(c.warp.cluster_index * 64 + lane);
  if (r.cluster != cluster) {
    if (r.cluster != 0) cell.foreign = r;
  } else if (r.thread / 64 != c.warp.cluster_index) {
    cell.other = r;
  } else if (r.clock == now && r.thread != thread) {
    thread = static_cast<uint16_t>(c.warp.cluster_index * 64 + kSeveralLanes);
  }
  r = {cluster, now, static_cast<uint32_t>(&c.ins - c.machine.module->code.data()), thread,
       semantics.scope};
}

void Ordering::write(Context& c, int lane, uint64_t address, Cell& cell) {
  Stamp& w = cell.write;
  if (w.cluster != 0 && !ordered(c, lane, w) && !strong(c, w))
    race(c, lane, "a write after a write", address, w);
  for (const Stamp* r : {&cell.read, &cell.other, &cell.foreign}) {
    if (r->cluster != 0 && !ordered(c, lane, *r) && !strong(c, *r))
      race(c, lane, "a write after a read", address, *r);
  }
  if (cell.read_only)
    fault(c, lane, "read-only path",
          "a write to what the launch read by ld.global.nc: " + byte_of(c, address) + ", by " +
              thread_of(c, cell.read));
  cell.stale = cell.stale || cell.cached;
  cell.cached = false;
  w = {cluster_of(c), c.warp.known.clock[self(c.warp)],
       static_cast<uint32_t>(&c.ins - c.machine.module->code.data()),
       static_cast<uint16_t>(c.warp.cluster_index * 64 + lane), c.ins.semantics.scope};
}

// A launch that may start before the one before it has ended must not touch what that one touches.
void Ordering::check_previous(Context& c, int lane, uint64_t address, int bytes, bool writes) {
  Page* page = before_.find(address);
  if (page == nullptr) return;
  uint64_t first = address % Page::kBytes >> page->shift;
  uint64_t last = (address % Page::kBytes + static_cast<uint64_t>(bytes) - 1) >> page->shift;
  for (uint64_t i = first; i <= last; ++i) {
    const Cell& cell = page->cells[i];
    if (cell.write.cluster != 0 || (writes && cell.read.cluster != 0))
      fault(c, lane, "programmatic launch",
            byte_of(c, address) + " before griddepcontrol.wait: the launch before this one " +
                (cell.write.cluster != 0 ? "writes" : "reads") + " it");
  }
}

void Ordering::touch(Context& c, int lane, uint64_t address, int bytes, Access access) {
  if (programmatic_ && !c.warp.known.waited)
    check_previous(c, lane, address, bytes, access != Access::kRead);
  Page& page = now_.make(address, __builtin_ctz(static_cast<unsigned>(bytes)));
  uint64_t first = address % Page::kBytes >> page.shift;
  uint64_t last = (address % Page::kBytes + static_cast<uint64_t>(bytes) - 1) >> page.shift;
  for (uint64_t i = first; i <= last; ++i) {
    uint64_t at = address + ((i - first) << page.shift);
    if (access == Access::kRead) {
      read(c, lane, at, page.cells[i]);
    } else {
      write(c, lane, at, page.cells[i]);
    }
  }
}

}  // namespace ptx
