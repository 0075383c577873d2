// Control flow, and instructions in which threads meet: branches, calls, shuffles, votes, barriers.
#include <algorithm>

#include "emulator.h"

namespace ptx {
namespace {

void drop_empty(Warp& warp, size_t split) {
  if (warp.splits[split].mask == 0)
    warp.splits.erase(warp.splits.begin() + static_cast<std::ptrdiff_t>(split));
}

// The active lanes go to `pc` in `frame`, the others of the split on to the next instruction.
Status go(Context& c, uint32_t pc, Frame* frame) {
  Split& s = c.warp.splits[c.split];
  if (c.active == s.mask) {
    s.pc = pc;
    s.frame = frame;
  } else {
    s.mask &= ~c.active;
    ++s.pc;
    c.warp.splits.push_back({c.active, pc, frame});
  }
  return Status::kChanged;
}

Status branch(Context& c) { return go(c, static_cast<uint32_t>(c.operand(0).value), &c.frame); }

Status branch_indexed(Context& c) {
  uint32_t index[kLanes];
  fetch(c, c.operand(0), index);
  const auto& table = c.operand(1).elements;
  Split s = c.warp.splits[c.split];
  uint32_t left = c.active;
  std::vector<Split> parts;
  while (left != 0) {
    int lane = __builtin_ctz(left);
    if (index[lane] >= table.size())
      fault(c, lane, "out of bounds",
            "branch target " + std::to_string(index[lane]) + " of " + std::to_string(table.size()));
    uint32_t same = 0;
    for (int i = 0; i < kLanes; ++i)
      same |= (left >> i & 1 && index[i] == index[lane] ? 1u : 0u) << i;
    parts.push_back({same, static_cast<uint32_t>(table[index[lane]].value), s.frame});
    left &= ~same;
  }
  if (s.mask != c.active) parts.push_back({s.mask & ~c.active, s.pc + 1, s.frame});
  c.warp.splits.erase(c.warp.splits.begin() + static_cast<std::ptrdiff_t>(c.split));
  c.warp.splits.insert(c.warp.splits.end(), parts.begin(), parts.end());
  return Status::kChanged;
}

Status leave(Context& c) {
  issue(c);
  Split& s = c.warp.splits[c.split];
  s.mask &= ~c.active;
  ++s.pc;
  uint32_t lanes = c.active;
  drop_empty(c.warp, c.split);
  c.machine.exit_lanes(c.warp, lanes);
  return Status::kChanged;
}

uint8_t* argument(Frame& frame, const Variable& v, int lane) {
  return frame.parameters.data() +
         frame.function->frame_parameter_bytes * static_cast<uint64_t>(lane) +
         (v.offset - kFrameParam);
}

Status give_back(Context& c) {
  if (c.frame.parent == nullptr) return leave(c);
  issue(c);
  Frame& parent = *c.frame.parent;
  const Call& call = c.machine.module->calls[c.frame.call];
  for (size_t k = 0; k < call.results.size(); ++k) {
    for (int i = 0; i < kLanes; ++i) {
      if (c.active >> i & 1)
        std::memcpy(argument(parent, call.results[k], i),
                    argument(c.frame, c.frame.function->results[k], i), call.results[k].size);
    }
  }
  return go(c, c.frame.return_pc, &parent);
}

// A string behind a generic address.
std::string text_at(Context& c, int lane, uint64_t address) {
  std::string text;
  for (;; ++address) {
    char ch = static_cast<char>(*global_bytes(c, lane, address, 1, Access::kRead));
    if (ch == '\0') return text;
    text += ch;
  }
}

Status call(Context& c) {
  Call& call = c.machine.module->calls[c.operand(0).value];
  Function& function = *call.function;
  if (function.begin == kAllLanes) {  // declared only: what the driver brings
    auto value = [&](size_t k, int lane) {
      uint64_t v = 0;
      std::memcpy(&v, argument(c.frame, call.arguments[k], lane), call.arguments[k].size);
      return v;
    };
    int lane = __builtin_ctz(c.active);
    if (function.name == "__assertfail") {
      fault(c, lane, "assert",
            text_at(c, lane, value(0, lane)) + " in " + text_at(c, lane, value(1, lane)) + ":" +
                std::to_string(value(2, lane)));
    }
    if (function.name != "vprintf")
      fault(c, lane, "unknown instruction", "a call of " + function.name);
    for (int i = 0; i < kLanes; ++i) {
      if (c.active >> i & 1) c.machine.output += text_at(c, i, value(0, i));
    }
    return Status::kNext;
  }
  uint32_t pc = c.warp.splits[c.split].pc;
  Frame& callee = enter(c.frame, pc, function);
  callee.call = static_cast<uint32_t>(c.operand(0).value);
  for (size_t k = 0; k < call.arguments.size(); ++k) {
    for (int i = 0; i < kLanes; ++i) {
      if (c.active >> i & 1)
        std::memcpy(argument(callee, function.parameters[k], i),
                    argument(c.frame, call.arguments[k], i), call.arguments[k].size);
    }
  }
  return go(c, function.begin, &callee);
}

Status trap(Context& c) { fault(c, __builtin_ctz(c.active), "trap", "the kernel stopped itself"); }
Status nothing(Context&) { return Status::kNext; }

Status wait_for_grid(Context& c) {
  c.warp.known.waited = true;
  return Status::kNext;
}

// ---- Within a warp ---------------------------------------------------------------------------------------------

// Waits for the lanes that the mask operand of a .sync instruction names. Lanes may stand here with different masks:
// each group goes by itself.
bool meet(Context& c, const Operand& mask) {
  uint32_t members[kLanes], same = 0;
  fetch(c, mask, members);
  uint32_t named = members[__builtin_ctz(c.active)];
  for (int i = 0; i < kLanes; ++i) {
    if (!(c.active >> i & 1)) continue;
    if (!(members[i] >> i & 1)) {
      fault(c, i, "shuffle mask",
            "the mask leaves out lane " + std::to_string(i) + ", which executes it");
    }
    same |= (members[i] == named ? 1u : 0u) << i;
  }
  if (same != c.active) {
    Split& s = c.warp.splits[c.split];
    Split others = {c.active & ~same, s.pc, s.frame};
    s.mask &= ~others.mask;
    c.active = same;
    c.warp.splits.push_back(others);
  }
  if (converge(c, named) == 0) return false;
  issue(c);
  return true;
}

Status shuffle(Context& c) {
  size_t last = c.ins.operands.size() - 1;
  if (!meet(c, c.operand(last))) return Status::kChanged;
  uint32_t a[kLanes], b[kLanes], limits[kLanes], d[kLanes];
  fetch(c, c.operand(1), a);
  fetch(c, c.operand(2), b);
  fetch(c, c.operand(3), limits);
  const std::string& mode = c.ins.words[2];
  uint32_t in_range = 0;
  for (int i = 0; i < kLanes; ++i) {
    if (!(c.active >> i & 1)) continue;
    int offset = static_cast<int>(b[i] & 31), clamp = static_cast<int>(limits[i] & 31),
        segment = static_cast<int>(limits[i] >> 8 & 31);
    int top = (i & segment) | (clamp & ~segment), bottom = i & segment, j;
    bool inside;
    if (mode == "up") {
      j = i - offset;
      inside = j >= top;
    } else if (mode == "down") {
      j = i + offset;
      inside = j <= top;
    } else if (mode == "bfly") {
      j = i ^ offset;
      inside = j <= top;
    } else {
      j = bottom | (offset & ~segment);
      inside = j <= top;
    }
    in_range |= static_cast<uint32_t>(inside) << i;
    if (!inside) j = i;
    if (!(c.active >> j & 1)) {
      if (c.machine.options.undefined_shuffles) {
        d[i] = static_cast<uint32_t>(c.machine.random());
        continue;
      }
      fault(c, i, "shuffle from an inactive lane",
            "lane " + std::to_string(j) + " does not execute it");
    }
    d[i] = a[j];
  }
  const Operand& o = c.operand(0);
  if (o.kind == Operand::kVector) {
    put(c, o.elements[0], d);
    put_predicate(c, o.elements[1], in_range);
  } else {
    put(c, o, d);
  }
  return Status::kNext;
}

Status vote(Context& c) {
  if (!meet(c, c.operand(c.ins.operands.size() - 1))) return Status::kChanged;
  uint32_t bits = fetch_predicate(c, c.operand(1)) & c.active;
  if (has(c.ins, "ballot")) {
    uint32_t d[kLanes];
    std::fill(d, d + kLanes, bits);
    put(c, c.operand(0), d);
  } else {
    bool yes = has(c.ins, "all")   ? bits == c.active
               : has(c.ins, "any") ? bits != 0
                                   : bits == 0 || bits == c.active;
    put_predicate(c, c.operand(0), yes ? kAllLanes : 0);
  }
  return Status::kNext;
}

Status match(Context& c) {
  if (!meet(c, c.operand(c.ins.operands.size() - 1))) return Status::kChanged;
  uint64_t a[kLanes];
  fetch_cells(c, c.operand(1), a);
  if (bytes_of(c.ins.type) == 4) {
    for (uint64_t& v : a) v &= 0xFFFFFFFFu;
  }
  uint32_t d[kLanes] = {};
  bool all = true;
  int first = __builtin_ctz(c.active);
  for (int i = 0; i < kLanes; ++i) {
    if (!(c.active >> i & 1)) continue;
    for (int j = 0; j < kLanes; ++j) d[i] |= (c.active >> j & 1 && a[i] == a[j] ? 1u : 0u) << j;
    all = all && a[i] == a[first];
  }
  const Operand& o = c.operand(0);
  if (has(c.ins, "all")) {
    for (uint32_t& v : d) v = all ? c.active : 0;
    put(c, o.kind == Operand::kVector ? o.elements[0] : o, d);
    if (o.kind == Operand::kVector) put_predicate(c, o.elements[1], all ? kAllLanes : 0);
  } else {
    put(c, o, d);
  }
  return Status::kNext;
}

Status reduce(Context& c) {
  if (!meet(c, c.operand(2))) return Status::kChanged;
  uint32_t a[kLanes], d[kLanes];
  fetch(c, c.operand(1), a);
  const std::string& op = c.ins.words[2];
  bool sign = is_signed(c.ins.type);
  int first = __builtin_ctz(c.active);
  uint32_t x = a[first];
  for (int i = first + 1; i < kLanes; ++i) {
    if (!(c.active >> i & 1)) continue;
    bool less = sign ? static_cast<int32_t>(a[i]) < static_cast<int32_t>(x) : a[i] < x;
    x = op == "add"   ? x + a[i]
        : op == "min" ? (less ? a[i] : x)
        : op == "max" ? (less ? x : a[i])
        : op == "and" ? x & a[i]
        : op == "or"  ? x | a[i]
                      : x ^ a[i];
  }
  std::fill(d, d + kLanes, x);
  put(c, c.operand(0), d);
  return Status::kNext;
}

Status active_mask(Context& c) {
  uint32_t d[kLanes];
  std::fill(d, d + kLanes, c.active);
  put(c, c.operand(0), d);
  return Status::kNext;
}

Status elect(Context& c) {
  if (!meet(c, c.operand(1))) return Status::kChanged;
  uint32_t leader = static_cast<uint32_t>(__builtin_ctz(c.active)), d[kLanes];
  std::fill(d, d + kLanes, leader);
  put(c, c.operand(0).elements[0], d);
  put_predicate(c, c.operand(0).elements[1], 1u << leader);
  return Status::kNext;
}

Status warp_barrier(Context& c) {
  if (!meet(c, c.operand(0))) return Status::kChanged;
  meet_lanes(c.warp);
  return Status::kNext;
}

// ---- Within a block ----------------------------------------------------------------------------------------------

// bar.sync a{, b}; bar.arrive a, b; bar.red.op d, a{, b}, p. Counted in warps, as the hardware does.
Status block_barrier(Context& c) {
  if (converge(c, ~c.warp.exited) == 0) return Status::kChanged;
  bool arrive = has(c.ins, "arrive"), reduction = has(c.ins, "red");
  size_t at = reduction ? 1 : 0, sources = c.ins.operands.size() - at - (reduction ? 1 : 0);
  uint32_t id[kLanes], threads[kLanes] = {};
  fetch(c, c.operand(at), id);
  if (sources > 1) fetch(c, c.operand(at + 1), threads);
  int lane = __builtin_ctz(c.active);
  if (id[lane] > 15)
    fault(c, lane, "out of bounds", "barrier " + std::to_string(id[lane]) + " of 16");
  Barrier& b = c.block.barriers[id[lane]];
  Split& s = c.warp.splits[c.split];
  if (b.warps > 0 && b.expected != threads[lane])
    fault(c, lane, "divergent barrier",
          "barrier " + std::to_string(id[lane]) +
              " is used with other numbers of threads at the same time");
  if (b.warps > 0 && threads[lane] == 0 && b.pc != s.pc)
    fault(c, lane, "divergent barrier", "warps of the block stand at different barriers");
  b.expected = threads[lane];
  b.pc = s.pc;
  ++b.warps;
  if (reduction) {
    uint32_t bits = fetch_predicate(c, c.operand(c.ins.operands.size() - 1)) & c.active;
    b.count += static_cast<uint32_t>(__builtin_popcount(bits));
    b.all &= bits == c.active;
    b.any |= bits != 0;
  }
  publish(c.warp, b.known);
  issue(c);
  b.time = std::max(b.time, c.warp.line.now());
  uint32_t which = id[lane];
  if (arrive) {
    ++s.pc;
  } else {
    s.state = Split::kBarrier;
    b.waiting.push_back(&c.warp);
  }
  c.machine.block_barrier(c.block, static_cast<int>(which));
  return Status::kChanged;
}

Status fence(Context& c) {
  issue(c);
  Scope scope = c.ins.semantics.scope;
  c.machine.ordering.fence(c, scope);
  c.warp.line.join(c.warp.line.now() + (scope > kBlockScope ? kFenceCycles : kBlockFenceCycles));
  return Status::kNext;
}

Status cluster_arrive(Context& c) {
  if (has(c.ins, "aligned") && converge(c, ~c.warp.exited) == 0) return Status::kChanged;
  Cluster& cluster = *c.block.cluster;
  if (c.warp.cluster_arrived & c.active)
    fault(c, __builtin_ctz(c.warp.cluster_arrived & c.active), "divergent barrier",
          "barrier.cluster.arrive a second time before a wait");
  c.warp.cluster_arrived |= c.active;
  c.warp.cluster_phase = cluster.phase;
  issue(c);
  if (!has(c.ins, "relaxed")) {
    publish(c.warp, cluster.known);
    c.warp.line.join(c.warp.line.now() + kFenceCycles);
  }
  uint64_t& last = cluster.time[cluster.phase % 2];
  last = std::max(last, c.warp.line.now());
  cluster.arrived += static_cast<uint32_t>(__builtin_popcount(c.active));
  ++c.warp.splits[c.split].pc;
  c.machine.cluster_barrier(cluster);
  return Status::kChanged;
}

Status cluster_wait(Context& c) {
  if (has(c.ins, "aligned") && converge(c, ~c.warp.exited) == 0) return Status::kChanged;
  Cluster& cluster = *c.block.cluster;
  if (c.active & ~c.warp.cluster_arrived)
    fault(c, __builtin_ctz(c.active & ~c.warp.cluster_arrived), "divergent barrier",
          "barrier.cluster.wait without an arrive");
  if (c.warp.cluster_phase == cluster.phase) {
    c.warp.splits[c.split].state = Split::kConverging;
    return Status::kChanged;
  }
  c.warp.cluster_arrived &= ~c.active;
  learn(c.warp, cluster.known);
  issue(c);
  c.warp.line.join(cluster.time[c.warp.cluster_phase % 2] + kClusterBarrierCycles);
  return Status::kNext;
}

// ---- mbarrier ------------------------------------------------------------------------------------------------------

MBarrier& object(Context& c, int lane, uint64_t address, bool create) {
  uint32_t at = static_cast<uint32_t>(address % kWindow);
  Block& owner = shared_owner(c, lane, at);
  if (at % 8 != 0) fault(c, lane, "misaligned", "an mbarrier takes 8 aligned bytes");
  if (at + 8 > owner.shared.size())
    fault(c, lane, "out of bounds", "an mbarrier beyond shared memory");
  auto found = owner.mbarriers.find(at);
  if (found == owner.mbarriers.end()) {
    if (!create) fault(c, lane, "never written", "an mbarrier that was not initialised");
    found = owner.mbarriers.emplace(at, MBarrier()).first;
  }
  return found->second;
}

void complete(Context& c, MBarrier& b) {
  if (b.pending != 0 || b.transactions != 0) return;
  ++b.phase;
  b.pending = b.expected;
  b.completed = b.time;
  for (auto& warp : c.block.warps) c.machine.wake(*warp);
}

Status mbarrier(Context& c) {
  const std::string& what = c.ins.words[1];
  bool result =
      what == "test_wait" || what == "try_wait" ||
      (what == "arrive" && c.ins.operands.size() > 0 && c.operand(0).kind != Operand::kAddress);
  size_t at = result ? 1 : 0;
  const Operand& o = c.operand(at);
  uint64_t address[kLanes], extra[kLanes] = {}, state[kLanes] = {};
  Operand base = o;
  base.kind = o.has_base ? Operand::kRegister : Operand::kImmediate;
  fetch_cells(c, base, address);
  if (o.has_base) {
    for (uint64_t& a : address) a += o.value;
  }
  if (c.ins.operands.size() > at + 1) fetch_cells(c, c.operand(at + 1), extra);
  uint32_t done = 0;
  uint64_t before = c.warp.line.now(), completed = 0;
  issue(c);
  for (int i = 0; i < kLanes; ++i) {
    if (!(c.active >> i & 1)) continue;
    MBarrier& b = object(c, i, address[i], what == "init");
    if (what == "init") {
      b = MBarrier();
      b.expected = b.pending = static_cast<uint32_t>(extra[i]);
    } else if (what == "inval") {
      b = MBarrier();
    } else if (what == "expect_tx") {
      b.transactions += static_cast<int64_t>(extra[i]);
    } else if (what == "complete_tx") {
      b.transactions -= static_cast<int64_t>(extra[i]);
      complete(c, b);
    } else if (what == "arrive") {
      state[i] = b.phase;
      bool expect = has(c.ins, "expect_tx");
      if (expect) b.transactions += static_cast<int64_t>(extra[i]);
      uint64_t count = expect || c.ins.operands.size() <= at + 1 ? 1 : extra[i];
      if (count > b.pending)
        fault(c, i, "divergent barrier",
              "more arrivals at an mbarrier than it was initialised for");
      b.pending -= static_cast<uint32_t>(count);
      publish(c.warp, b.known);
      b.time = std::max(b.time, c.warp.line.now());
      complete(c, b);
    } else {
      bool parity = has(c.ins, "parity");
      bool over =
          parity ? (b.phase & 1) != (extra[i] & 1) : b.phase != static_cast<uint32_t>(extra[i]);
      done |= static_cast<uint32_t>(over) << i;
      if (over) {
        learn(c.warp, b.known);
        completed = std::max(completed, b.completed);
      }
    }
  }
  if (what == "arrive" && result) put(c, c.operand(0), state);
  if (what == "test_wait" || what == "try_wait") {
    put_predicate(c, c.operand(0), done);
    poll(c, before, done == c.active, completed);
  }
  return Status::kNext;
}

}  // namespace

uint32_t converge(Context& c, uint32_t members) {
  Warp& w = c.warp;
  if (c.active != w.splits[c.split].mask) {  // lanes whose guard is false pass by
    Split& s = w.splits[c.split];
    Split others = {s.mask & ~c.active, s.pc + 1, s.frame};
    s.mask = c.active;
    w.splits.push_back(others);
  }
  uint32_t pc = w.splits[c.split].pc;
  for (size_t i = w.splits.size(); i-- > 0;) {
    Split& other = w.splits[i];
    if (i == c.split || other.pc != pc || other.frame != &c.frame ||
        other.state != Split::kConverging || (other.mask & ~members) != 0)
      continue;
    w.splits[c.split].mask |= other.mask;
    w.splits.erase(w.splits.begin() + static_cast<std::ptrdiff_t>(i));
    if (i < c.split) --c.split;
  }
  Split& s = w.splits[c.split];
  uint32_t needed = members & ~w.exited;
  if ((s.mask & needed) != needed) {
    s.state = Split::kConverging;
    return 0;
  }
  c.active = s.mask;
  return c.active;
}

Handler synchronize_handler(Instruction& ins) {
  const std::string& name = ins.words[0];
  ins.kind = Class::control;
  if (name == "bra") return branch;
  if (name == "brx") return branch_indexed;
  if (name == "call") return call;
  if (name == "ret") return give_back;
  if (name == "exit") return leave;
  if (name == "trap" || name == "brkpt") return trap;
  if (name == "griddepcontrol" && has(ins, "wait")) return wait_for_grid;
  if (name == "nanosleep" || name == "pmevent" || name == "griddepcontrol" || name == "setmaxnreg")
    return nothing;
  ins.kind = Class::barrier;
  if (name == "membar" || name == "fence") return fence;
  if (name == "bar" || name == "barrier") {
    if (has(ins, "warp")) return warp_barrier;
    if (has(ins, "cluster"))
      return has(ins, "arrive") ? cluster_arrive : has(ins, "wait") ? cluster_wait : nullptr;
    ins.mode = has(ins, "popc") ? 0 : has(ins, "and") ? 1 : 2;
    return block_barrier;
  }
  if (name == "mbarrier") return mbarrier;
  ins.kind = Class::integer;
  if (name == "shfl" && has(ins, "sync")) return shuffle;
  if (name == "vote" && has(ins, "sync")) return vote;
  if (name == "match" && has(ins, "sync")) return match;
  if (name == "redux" && has(ins, "sync") && !is_float(ins.type)) return reduce;
  if (name == "activemask") return active_mask;
  if (name == "elect") return elect;
  return nullptr;
}

}  // namespace ptx
