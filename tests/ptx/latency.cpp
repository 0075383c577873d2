// The cycles from an instruction's start to its result, and the walk of a warp along them.
//
// An H100's, as far as they are published:
// [1] Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture", arXiv:2402.13499: shared memory
//     29, L2 263, global memory 479 on an idle device, another block's shared memory 180.
// [2] Jia et al., "Dissecting the NVidia Turing T4 GPU via Microbenchmarking", arXiv:1903.07486, table 4.1 (Volta):
//     fp32, integer and logic 4, multiply-add of integers 5, fp16 6, fp64 8, special functions and bit counts 10 to 14.
// [3] Abdelkhalik et al., "Demystifying the Nvidia Ampere Architecture through Microbenchmarking and Instruction-level
//     Analysis", arXiv:2208.11174: approximate functions with what the compiler adds to them 18 to 24, division by
//     sequences of dozens of instructions.
// Global memory counts as busy, which an idle device's latency is not.
#include "latency.h"

#include "emulator.h"

namespace ptx {
namespace {

constexpr uint16_t kStart = 1;  // of what has no result
constexpr uint16_t kMove = 1;  // ptxas renames most of them away
constexpr uint16_t kBranch = 6;
constexpr uint16_t kFp32 = 4, kFp16 = 6, kFp64 = 8, kInteger = 4, kMultiply = 5;
constexpr uint16_t kBitCount = 14, kSpecial = 24, kConvert = 8, kConvertFp64 = 20;
constexpr uint16_t kDivide32 = 45, kDivide64 = 150;
constexpr uint16_t kShared = 30, kLocal = 40, kConstant = 30, kGlobal = 650, kPeer = 200;
constexpr uint16_t kCopy = 700;  // cp.async, from global to shared memory
constexpr uint16_t kShuffle = 25, kPoll = 30;

bool one_of(const std::string& name, std::initializer_list<const char*> names) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

uint16_t arithmetic_cycles(const Instruction& ins) {
  const std::string& name = ins.words[0];
  bool wide = bytes_of(ins.type) == 8;
  bool divides = one_of(name, {"div", "rem", "rcp", "sqrt", "rsqrt"});
  switch (ins.kind) {
    case Class::move: return kMove;
    case Class::mufu: return kSpecial;
    case Class::fp64: return divides ? kDivide64 : kFp64;
    case Class::fp32: return divides ? (ins.approx ? kSpecial : kDivide32) : kFp32;
    case Class::fp16: return kFp16;
    case Class::convert:
      return ins.type == Type::f64 || ins.from == Type::f64 ? kConvertFp64 : kConvert;
    default: break;
  }
  if (divides) return wide ? kDivide64 : kDivide32;
  if (one_of(name, {"shfl", "vote", "match", "redux", "elect"})) return kShuffle;
  if (one_of(name, {"popc", "clz", "brev", "bfind", "fns"})) return kBitCount;
  return one_of(name, {"mul", "mad", "mad24", "mul24", "dp4a", "dp2a"}) ? kMultiply : kInteger;
}

uint16_t memory_cycles(Space space, bool peer) {
  if (space == Space::shared) return peer ? kPeer : kShared;
  return space == Space::local ? kLocal : kGlobal;
}

uint16_t cycles_of(const Instruction& ins) {
  const std::string& name = ins.words[0];
  if (ins.kind == Class::control) return name == "bra" ? kBranch : kStart;
  if (ins.kind == Class::barrier) return kStart;
  if (ins.kind != Class::memory) return arithmetic_cycles(ins);
  if (name == "cp") return ins.operands.size() > 1 ? kCopy : kStart;
  if (has(ins, "const")) return kConstant;
  if (one_of(name, {"ld", "ldu", "atom", "ldmatrix"})) return memory_cycles(ins.space, false);
  return kStart;
}

bool has_result(const Instruction& ins) {
  const std::string& name = ins.words[0];
  if (ins.operands.empty() || ins.kind == Class::control) return false;
  if (ins.kind == Class::barrier)
    return has(ins, "red") || (name == "mbarrier" && ins.operands[0].kind != Operand::kAddress);
  return !one_of(
      name, {"st", "stmatrix", "red", "cp", "prefetch", "prefetchu", "discard", "applypriority"});
}

// In a frame's times: registers, predicates, the carry flag.
uint32_t register_slot(uint32_t offset) { return offset / (4 * kLanes); }
uint32_t predicate_slot(const Function& f, uint32_t index) {
  return register_slot(f.register_bytes) + index;
}
uint32_t carry_slot(const Function& f) { return predicate_slot(f, f.predicates); }

void slots(const Operand& o, const Function& f, std::vector<uint32_t>& out) {
  if (o.kind == Operand::kRegister || (o.kind == Operand::kAddress && o.has_base))
    out.push_back(register_slot(o.slot));
  if (o.kind == Operand::kPredicate) out.push_back(predicate_slot(f, o.slot));
  for (const Operand& e : o.elements) slots(e, f, out);
}

}  // namespace

size_t timed_slots(const Function& function) { return carry_slot(function) + 1; }

Timing timing_of(const Instruction& ins, const Function& function, std::vector<uint32_t>& timed) {
  const std::string& name = ins.words[0];
  Timing t;
  t.cycles = cycles_of(ins);
  t.copies = t.cycles == kCopy;
  bool waits = name == "cp" && (has(ins, "wait_group") || has(ins, "wait_all"));
  t.ends = waits || ins.kind == Class::control || ins.kind == Class::barrier;
  t.by_handler = waits || ins.kind == Class::barrier ||
                 one_of(name, {"ret", "exit", "shfl", "vote", "match", "redux", "elect"});
  t.begin = static_cast<uint32_t>(timed.size());
  size_t first = has_result(ins) ? 1 : 0;
  if (first == 1) slots(ins.operands[0], function, timed);
  if (has(ins, "cc")) timed.push_back(carry_slot(function));
  t.results = static_cast<uint16_t>(timed.size() - t.begin);
  for (size_t i = first; i < ins.operands.size(); ++i) slots(ins.operands[i], function, timed);
  if (one_of(name, {"addc", "subc", "madc"})) timed.push_back(carry_slot(function));
  if (ins.guarded) timed.push_back(predicate_slot(function, ins.guard));
  t.count = static_cast<uint16_t>(timed.size() - t.begin);
  return t;
}

uint64_t issue(Context& c) {
  const Timing& timing = c.ins.timing;
  Timeline& line = c.warp.line;
  uint64_t* ready = c.frame.ready.data();
  const uint32_t* slot = c.machine.module->timed.data() + timing.begin;
  uint64_t start = timing.ends ? line.now() : line.begin;
  for (int k = timing.results; k < timing.count; ++k) start = std::max(start, ready[slot[k]]);
  uint64_t cycles = timing.cycles;
  // What a warp stored to shared or local memory it may read again; global memory is seldom used so.
  if (c.ins.kind == Class::memory && c.space != Space::global) {
    if (timing.results > 0) {
      start = std::max(start, line.stored);
      cycles = memory_cycles(c.space, c.peer);
    } else if (!timing.copies) {
      line.stored = std::max(line.stored, start);
    }
  }
  // Of a register that lanes elsewhere hold, too, the last part counts.
  bool all = !c.ins.guarded && c.active == ~c.warp.exited;
  for (int k = 0; k < timing.results; ++k) {
    uint64_t& r = ready[slot[k]];
    r = all ? start + cycles : std::max(r, start + cycles);
  }
  ++line.issued;
  line.latest = std::max(line.latest, start);
  if (timing.copies) line.copies = std::max(line.copies, start + cycles);
  if (timing.ends) line.join(start + cycles);
  return start;
}

void pass_by(Warp& warp, const Frame& frame, const Instruction& ins) {
  ++warp.line.issued;
  if (ins.timing.ends) warp.line.join(frame.ready[predicate_slot(*frame.function, ins.guard)]);
}

void poll(Context& c, uint64_t before, bool over, uint64_t completed) {
  Timeline& line = c.warp.line;
  if (line.polling == 0) line.polling = before + 1;
  if (!over) return;
  line.begin = line.latest = std::max(line.polling - 1, completed) + kPoll;
  line.issued = line.polling = 0;
  const uint32_t* slot = c.machine.module->timed.data() + c.ins.timing.begin;
  for (int k = 0; k < c.ins.timing.results; ++k) c.frame.ready[slot[k]] = line.begin;
}

}  // namespace ptx
