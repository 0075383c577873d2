// Blocks, warps and their divergence, and who runs when.
//
// A warp is a set of splits: lanes that stand at one instruction in one frame. The split that is furthest behind
// runs first (deepest call, then lowest instruction), so that lanes meet again where the program's paths do. Warps run
// for random spans in random order.
#include <cxxabi.h>

#include <algorithm>
#include <sstream>

#include "emulator.h"

namespace ptx {
namespace {

std::array<uint32_t, 3> unflatten(uint64_t i, const std::array<uint32_t, 3>& extent) {
  return {static_cast<uint32_t>(i % extent[0]), static_cast<uint32_t>(i / extent[0] % extent[1]),
          static_cast<uint32_t>(i / extent[0] / extent[1])};
}

}  // namespace

std::string coordinates(const std::array<uint32_t, 3>& x) {
  return "(" + std::to_string(x[0]) + ", " + std::to_string(x[1]) + ", " + std::to_string(x[2]) +
         ")";
}

std::string place(const Machine& m, const Instruction& ins) {
  std::string out;
  for (int site = ins.site; site >= 0; site = m.module->sites[static_cast<size_t>(site)].caller) {
    const Place& p = m.module->sites[static_cast<size_t>(site)].place;
    auto file = m.module->files.find(p[0]);
    if (file == m.module->files.end()) break;
    std::string path = file->second;
    out +=
        (out.empty() ? "" : " in ") + path.substr(path.rfind('/') + 1) + ":" + std::to_string(p[1]);
  }
  return out.empty() ? "no line" : out;
}

std::string demangled(const std::string& name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  std::string out = status == 0 ? text : name;
  std::free(text);
  return out;
}

std::string hex(uint64_t x) {
  std::ostringstream out;
  out << "0x" << std::hex << x;
  return out.str();
}

std::string describe(const Instruction& ins) { return "`" + ins.text + "`"; }

void fault(Context& c, int lane, const std::string& check, const std::string& detail) {
  uint64_t thread = static_cast<uint64_t>(c.warp.index) * kLanes + static_cast<uint64_t>(lane);
  throw Fault(check + ": kernel " + demangled(c.machine.current->kernel) + ", " +
              place(c.machine, c.ins) + ", block " + coordinates(c.block.index) + ", thread " +
              coordinates(unflatten(thread, c.machine.current->block)) + ": " + detail + "; " +
              describe(c.ins));
}

// ---- Operands --------------------------------------------------------------------------------------------------

uint64_t special(Context& c, uint32_t which, int lane) {
  const Launch& l = *c.machine.current;
  uint64_t thread = static_cast<uint64_t>(c.warp.index) * kLanes + static_cast<uint64_t>(lane);
  auto axis = [](const std::array<uint32_t, 3>& x, uint32_t i) { return uint64_t{x[i]}; };
  uint32_t bit = 1u << lane;
  switch (which) {
    case 0:
    case 1:
    case 2: return axis(unflatten(thread, l.block), which);
    case 3:
    case 4:
    case 5: return axis(l.block, which - 3);
    case 6:
    case 7:
    case 8: return axis(c.block.index, which - 6);
    case 9:
    case 10:
    case 11: return axis(l.grid, which - 9);
    case 12: return static_cast<uint64_t>(lane);
    case 13: return static_cast<uint64_t>(c.warp.index);
    case 14: return c.block.warps.size();
    case 15: return c.block.index[0] % static_cast<uint32_t>(c.machine.device.sms);
    case 16: return static_cast<uint64_t>(c.machine.device.sms);
    case 17: return 1;
    case 18: return bit;
    case 19: return bit | (bit - 1);
    case 20: return bit - 1;
    case 21: return ~(bit - 1);
    case 22: return ~(bit | (bit - 1));
    case 23:
    case 24:
    case 25:
    case 44: return c.machine.clock;
    case 26:
    case 27:
    case 28: return c.block.index[which - 26] / l.cluster[which - 26];
    case 29:
    case 30:
    case 31: return l.grid[which - 29] / l.cluster[which - 29];
    case 32:
    case 33:
    case 34: return c.block.index[which - 32] % l.cluster[which - 32];
    case 35:
    case 36:
    case 37: return l.cluster[which - 35];
    case 38: return static_cast<uint64_t>(c.block.rank);
    case 39: return c.block.cluster->blocks.size();
    case 40: return l.dynamic_shared;
    case 41: return l.dynamic_shared + l.static_shared;
    case 42: return kLanes;
    case 43: return c.machine.clock >> 32;
    case 45: return c.machine.clock >> 32;
    case 46: return c.block.cluster->blocks.size() > 1;
    default: fault(c, lane, "unknown instruction", "a special register");
  }
}

void fetch_cells(Context& c, const Operand& o, uint64_t (&out)[kLanes]) {
  switch (o.kind) {
    case Operand::kRegister: {
      const uint8_t* cells = c.frame.registers.data() + o.slot;
      if (o.cell == 8) {
        std::memcpy(out, cells, sizeof out);
      } else {
        uint32_t narrow[kLanes];
        std::memcpy(narrow, cells, sizeof narrow);
        for (int i = 0; i < kLanes; ++i) out[i] = narrow[i];
      }
      return;
    }
    case Operand::kImmediate: {
      uint64_t value = o.value;
      if (o.dynamic_shared) value += c.machine.dynamic_offset;
      if (o.space == Space::local) value += c.frame.local_base;
      for (uint64_t& v : out) v = value;
      return;
    }
    case Operand::kSpecial:
      for (int i = 0; i < kLanes; ++i) out[i] = special(c, o.slot, i);
      return;
    case Operand::kPredicate: {
      uint32_t bits = fetch_predicate(c, o);
      for (int i = 0; i < kLanes; ++i) out[i] = bits >> i & 1;
      return;
    }
    default:
      fault(c, __builtin_ctz(c.active), "unknown instruction",
            "an operand of a kind that it does not take");
  }
}

uint32_t fetch_predicate(Context& c, const Operand& o) {
  uint32_t bits = o.kind == Operand::kPredicate                   ? c.frame.predicates[o.slot]
                  : o.kind == Operand::kImmediate && o.value != 0 ? kAllLanes
                                                                  : 0;
  return o.negate ? ~bits : bits;
}

void put_predicate(Context& c, const Operand& o, uint32_t lanes) {
  if (o.kind == Operand::kSink) return;
  uint32_t& bits = c.frame.predicates[o.slot];
  bits = (bits & ~c.active) | (lanes & c.active);
}

std::unique_ptr<Frame> new_frame(Function& function, Frame* parent, uint64_t local_base) {
  auto frame = std::make_unique<Frame>();
  frame->function = &function;
  frame->parent = parent;
  frame->depth = parent == nullptr ? 0 : parent->depth + 1;
  frame->local_base = local_base;
  frame->registers.assign(function.register_bytes, 0);
  frame->predicates.assign(function.predicates, 0);
  frame->ready.assign(timed_slots(function), 0);
  frame->parameters.assign(function.frame_parameter_bytes * kLanes, 0);
  return frame;
}

Frame& enter(Frame& parent, uint32_t pc, Function& function) {
  auto& frame = parent.callees[pc];
  if (frame == nullptr) {
    frame = new_frame(function, &parent,
                      parent.local_base + (parent.function->local_bytes + 15) / 16 * 16);
    frame->return_pc = pc + 1;
  }
  return *frame;
}

// ---- Barriers and ends --------------------------------------------------------------------------------------------

void Machine::wake(Warp& warp) {
  bool runnable = false;
  for (Split& s : warp.splits) {
    if (s.state == Split::kConverging) s.state = Split::kReady;
    runnable = runnable || s.state == Split::kReady;
  }
  if (runnable && !warp.queued) {
    warp.queued = true;
    ready_.push_back(&warp);
  }
}

void Machine::block_barrier(Block& block, int id) {
  Barrier& b = block.barriers[static_cast<size_t>(id)];
  if (b.warps == 0) return;
  bool complete = b.expected == 0 ? b.warps >= block.live_warps
                                  : static_cast<uint32_t>(b.warps) * kLanes >= b.expected;
  if (!complete) return;
  Barrier done = std::move(b);
  b = Barrier();
  for (Warp* w : done.waiting) {
    learn(*w, done.known);
    w->line.join(done.time + kBarrierCycles);
    for (size_t i = 0; i < w->splits.size(); ++i) {
      Split& s = w->splits[i];
      if (s.state != Split::kBarrier) continue;
      const Instruction& ins = module->code[s.pc];
      if (ins.words[1] == "red" || (ins.words.size() > 2 && ins.words[2] == "red")) {
        Context c = {*this, block, *w, *s.frame, ins, s.mask, i};
        bool popc = ins.mode == 0;
        uint32_t value = popc ? done.count : ins.mode == 1 ? done.all : done.any;
        if (popc) {
          uint32_t lanes[kLanes];
          std::fill(lanes, lanes + kLanes, value);
          put(c, ins.operands[0], lanes);
        } else {
          put_predicate(c, ins.operands[0], value ? kAllLanes : 0);
        }
      }
      s.state = Split::kReady;
      ++s.pc;
    }
    wake(*w);
  }
}

void Machine::cluster_barrier(Cluster& cluster) {
  if (cluster.arrived == 0 || cluster.arrived < cluster.live_threads) return;
  cluster.arrived = 0;
  ++cluster.phase;
  cluster.time[cluster.phase % 2] = 0;
  for (auto& block : cluster.blocks) {
    for (auto& warp : block->warps) wake(*warp);
  }
}

void Machine::exit_lanes(Warp& warp, uint32_t lanes) {
  warp.exited |= lanes;
  Block& block = *warp.block;
  Cluster& cluster = *block.cluster;
  cluster.live_threads -= static_cast<uint32_t>(__builtin_popcount(lanes));
  // Who arrived and left without waiting is not waited for, but has been counted.
  cluster.arrived -= static_cast<uint32_t>(__builtin_popcount(
      warp.cluster_arrived & lanes & (warp.cluster_phase == cluster.phase ? kAllLanes : 0)));
  warp.cluster_arrived &= ~lanes;
  if (warp.exited == kAllLanes) {
    block.time = std::max(block.time, warp.line.now());
    if (--block.live_warps == 0) {
      --cluster.live_blocks;
      current->critical_path = std::max(current->critical_path, block.time);
      current->critical_sum += block.time;
    }
    for (int id = 0; id < 16; ++id) {
      Barrier& b = block.barriers[static_cast<size_t>(id)];
      b.time = std::max(b.time, b.warps > 0 && b.expected == 0 ? warp.line.now() : 0);
      block_barrier(block, id);
    }
  }
  cluster_barrier(cluster);
  wake(warp);
}

// ---- Scheduling ----------------------------------------------------------------------------------------------------

uint64_t Machine::draw() {
  state_ ^= state_ << 13;
  state_ ^= state_ >> 7;
  state_ ^= state_ << 17;
  return state_;
}

Warp* Machine::new_warp(Block& block, int index, uint32_t threads) {
  auto warp = std::make_unique<Warp>();
  warp->block = &block;
  warp->index = index;
  uint32_t warps = (threads + kLanes - 1) / kLanes;
  warp->cluster_index = block.rank * static_cast<int>(warps) + index;
  uint32_t first = static_cast<uint32_t>(index) * kLanes,
           lanes = std::min<uint32_t>(kLanes, threads - first);
  uint32_t mask = lanes == kLanes ? kAllLanes : (1u << lanes) - 1;
  warp->exited = ~mask;
  warp->frame = new_frame(*kernel_, nullptr, 0);
  uint64_t local = kernel_->local_bytes;
  if (!module->calls.empty()) {
    for (auto& [name, function] : module->functions) local += 16 + function->local_bytes;
  }
  warp->local.assign(local * kLanes, 0);
  warp->local_written.assign(local * kLanes, 0);
  warp->splits.push_back({mask, kernel_->begin, warp->frame.get()});
  block.warps.push_back(std::move(warp));
  return block.warps.back().get();
}

std::array<uint32_t, 3> Machine::block_of(uint64_t cluster, uint64_t rank) const {
  const Launch& l = *current;
  std::array<uint32_t, 3> clusters, inside = unflatten(rank, l.cluster), index;
  for (size_t k = 0; k < 3; ++k) clusters[k] = l.grid[k] / l.cluster[k];
  std::array<uint32_t, 3> first = unflatten(cluster, clusters);
  for (size_t k = 0; k < 3; ++k) index[k] = first[k] * l.cluster[k] + inside[k];
  return index;
}

void Machine::start(uint64_t cluster_index) {
  const Launch& l = *current;
  auto cluster = std::make_unique<Cluster>();
  cluster->number = static_cast<uint32_t>(cluster_index);
  uint32_t blocks = l.cluster[0] * l.cluster[1] * l.cluster[2];
  uint32_t threads = l.block[0] * l.block[1] * l.block[2], warps = (threads + kLanes - 1) / kLanes;
  cluster->live_threads = blocks * threads;
  cluster->live_blocks = static_cast<int>(blocks);
  for (uint32_t rank = 0; rank < blocks; ++rank) {
    auto block = std::make_unique<Block>();
    block->cluster = cluster.get();
    block->index = block_of(cluster_index, rank);
    block->rank = static_cast<int>(rank);
    block->live_warps = static_cast<int>(warps);
    uint64_t shared = dynamic_offset + l.dynamic_shared;
    block->shared.assign(shared, 0xCD);
    block->written.assign(shared, 0);
    block->pages.resize((shared + kSharedPage - 1) / kSharedPage);
    for (uint32_t w = 0; w < warps; ++w) {
      Warp* warp = new_warp(*block, static_cast<int>(w), threads);
      warp->known.clock.assign(blocks * warps, 0);
      warp->known.clock[static_cast<size_t>(warp->cluster_index)] = warp->met = 1;
      wake(*warp);
    }
    cluster->blocks.push_back(std::move(block));
  }
  resident_.push_back(std::move(cluster));
}

void Machine::run(Warp& w, int quantum) {
  while (quantum > 0) {
    size_t best = w.splits.size(), ready = 0;
    for (size_t i = 0; i < w.splits.size(); ++i) {
      const Split& s = w.splits[i];
      if (s.state != Split::kReady) continue;
      ++ready;
      if (best == w.splits.size() || s.frame->depth > w.splits[best].frame->depth ||
          (s.frame->depth == w.splits[best].frame->depth && s.pc < w.splits[best].pc))
        best = i;
    }
    if (ready == 0) return;
    if (ready > 1) {
      // Now and then another one, so that lanes that wait for lanes behind them do not wait for ever.
      if (draw() % 64 == 0) {
        do {
          best = draw() % w.splits.size();
        } while (w.splits[best].state != Split::kReady);
      }
      for (size_t i = w.splits.size(); i-- > 0;) {
        Split &s = w.splits[best], &other = w.splits[i];
        if (i == best || other.state != Split::kReady || other.pc != s.pc || other.frame != s.frame)
          continue;
        s.mask |= other.mask;
        w.splits.erase(w.splits.begin() + static_cast<std::ptrdiff_t>(i));
        if (i < best) --best;
      }
    }
    bool alone = w.splits.size() == 1;
    do {
      Split& s = w.splits[best];
      const Instruction& ins = module->code[s.pc];
      uint32_t active = s.mask;
      if (ins.guarded) {
        uint32_t p = s.frame->predicates[ins.guard];
        active &= ins.guard_negate ? ~p : p;
      }
      ++clock;
      --quantum;
      ++warp_hits_[s.pc];
      thread_hits_[s.pc] += static_cast<uint64_t>(__builtin_popcount(active));
      if (active == 0) {
        pass_by(w, *s.frame, ins);
        ++s.pc;
        continue;
      }
      Context c = {*this, *w.block, w, *s.frame, ins, active, best};
      if (ins.run == nullptr) fault(c, __builtin_ctz(active), "unknown instruction", ins.words[0]);
      Status status = ins.run(c);
      if (!ins.timing.by_handler) issue(c);
      if (status == Status::kChanged) break;
      ++w.splits[c.split].pc;
      if (c.split != best) break;
    } while (alone && quantum > 0);
  }
}

void Machine::launch(Module& m, Function& kernel, Launch what, const std::vector<uint8_t>& values) {
  module = &m;
  kernel_ = &kernel;
  parameters = values.data();
  parameter_bytes = values.size();
  what.kernel = kernel.name;
  what.static_shared = std::max(kernel.shared_bytes, m.shared_bytes);
  dynamic_offset = (what.static_shared + m.dynamic_align - 1) / m.dynamic_align * m.dynamic_align;
  launches.push_back(what);
  if (options.limit == 0) return;
  current = &launches.back();
  ordering.begin_launch(current->programmatic);
  clock = 0;
  random.seed(options.seed);
  state_ = options.seed * 0x9E3779B97F4A7C15ull + 1;
  warp_hits_.assign(m.code.size(), 0);
  thread_hits_.assign(m.code.size(), 0);
  last_ = nullptr;
  ready_.clear();
  resident_.clear();

  const Launch& l = *current;
  uint64_t clusters = 1;
  for (size_t k = 0; k < 3; ++k) clusters *= l.grid[k] / l.cluster[k];
  std::vector<uint32_t> order(clusters);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<uint32_t>(i);
  if (options.shuffle) std::shuffle(order.begin(), order.end(), random);

  size_t next = 0;
  for (;;) {
    while (next < order.size() && resident_.size() < static_cast<size_t>(options.resident))
      start(order[next++]);
    if (ready_.empty()) {
      if (resident_.empty()) break;
      deadlock();
    }
    size_t pick = draw() % ready_.size();
    Warp* warp = ready_[pick];
    run(*warp, 1 + static_cast<int>(draw() % 256));
    if (clock > options.limit) deadlock();
    bool runnable = false;
    for (const Split& s : warp->splits) runnable = runnable || s.state == Split::kReady;
    if (!runnable) {
      // Others may have been queued behind it meanwhile.
      ready_[pick] = ready_.back();
      ready_.pop_back();
      warp->queued = false;
      Cluster* cluster = warp->block->cluster;
      if (cluster->live_blocks == 0) {
        resident_.erase(std::find_if(resident_.begin(), resident_.end(),
                                     [&](auto& r) { return r.get() == cluster; }));
      }
    }
  }
  count();
}

void Machine::deadlock() {
  Warp* first = nullptr;
  size_t split = 0;
  std::string check = clock > options.limit ? "no progress" : "deadlock";
  std::ostringstream who;
  int listed = 0;
  for (auto& cluster : resident_) {
    for (auto& block : cluster->blocks) {
      for (auto& warp : block->warps) {
        for (size_t i = 0; i < warp->splits.size(); ++i) {
          const Split& s = warp->splits[i];
          const Instruction& ins = module->code[s.pc];
          bool block_wide = ins.words[0] == "bar" || ins.words[0] == "barrier";
          bool partial = (s.mask | warp->exited) != kAllLanes;
          if (block_wide && partial) check = "divergent barrier";
          if (!block_wide && check == "deadlock") check = "lanes of a warp that never meet";
          if (first == nullptr || (block_wide && partial)) {
            first = warp.get();
            split = i;
          }
          if (++listed <= 4) {
            who << (listed > 1 ? "; " : "") << "lanes 0x" << std::hex << s.mask << std::dec
                << " of warp " << warp->index << " in block " << coordinates(block->index)
                << " wait at " << place(*this, ins);
          }
        }
      }
    }
  }
  Split& s = first->splits[split];
  Context c = {*this, *first->block, *first, *s.frame, module->code[s.pc], s.mask, split};
  fault(c, __builtin_ctz(s.mask), check,
        who.str() + (listed > 4 ? " and " + std::to_string(listed - 4) + " more" : ""));
}

void Machine::count() {
  for (size_t pc = 0; pc < module->code.size(); ++pc) {
    if (warp_hits_[pc] == 0) continue;
    const Instruction& ins = module->code[pc];
    current->warp_instructions[static_cast<size_t>(ins.kind)] += warp_hits_[pc];
    current->thread_instructions[static_cast<size_t>(ins.kind)] += thread_hits_[pc];
    std::string opcode;
    for (const std::string& word : ins.words) opcode += (opcode.empty() ? "" : ".") + word;
    current->opcodes[opcode] += thread_hits_[pc];
  }
}

}  // namespace ptx
