// An emulator of PTX, NVIDIA's virtual instruction set, for tests: what nvcc or Triton made of a kernel runs
// on the CPU, every thread of it, with the checks of a sanitizer and the counts of a profiler.
//
// parse.cpp     PTX text -> Module (instructions with resolved operands)
// decode.cpp    an instruction's words -> the function that executes it
// arithmetic.cpp, memory.cpp, synchronize.cpp     those functions
// latency.cpp   when registers are ready: the critical path
// ordering.cpp  what is before what in global memory: races, missing fences
// machine.cpp   blocks, warps, divergence, scheduling
// limits.cpp    what the runtime refuses to launch
// runtime.cpp   the CUDA runtime that launchers call, and the C interface of the Python face
//
// Source of the semantics: NVIDIA, "Parallel Thread Execution ISA", version 9.0.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "latency.h"
#include "ordering.h"

namespace ptx {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

enum class Type : uint8_t {
  none,
  pred,
  b8,
  b16,
  b32,
  b64,
  b128,
  u8,
  u16,
  u32,
  u64,
  s8,
  s16,
  s32,
  s64,
  f16,
  bf16,
  f16x2,
  bf16x2,
  f32,
  f32x2,
  f64,
  u16x2,
  s16x2,
};  // clang-format skip
int bytes_of(Type type);
bool is_float(Type type);
bool is_signed(Type type);

enum class Space : uint8_t { generic, global, shared, local, param, constant };

// Generic addresses: host addresses are global memory, the other spaces are windows above them.
constexpr uint64_t kWindow = uint64_t{1} << 56;
constexpr uint64_t kSharedWindow = kWindow, kLocalWindow = 2 * kWindow, kParamWindow = 3 * kWindow;
// A shared address of another block of the cluster holds 1 + the block's rank in its high byte.
constexpr int kRankShift = 24;
// Parameters of device functions live in the frame, those of the kernel below this.
constexpr uint64_t kFrameParam = uint64_t{1} << 30;

struct Operand {
  enum Kind : uint8_t {
    kNone,
    kRegister,
    kPredicate,
    kImmediate,
    kSpecial,
    kAddress,
    kLabel,
    kVector,
    kFunction,
    kSink
  };
  Kind kind = kNone;
  bool negate = false;  // of a predicate
  bool dynamic_shared = false;  // the value counts from the block's dynamic shared memory
  uint8_t cell = 4;  // bytes that a lane of the register takes
  uint8_t literal_bits = 0;  // a float literal's own width
  bool has_base = false;  // kAddress: a register is added
  Space space = Space::generic;  // of the variable that is named
  uint32_t slot = 0;  // register: byte offset in the frame; predicate and special: index
  uint64_t value = 0;  // immediate, address, label
  std::vector<Operand> elements;  // kVector; setp's and shfl's pair d|p
  std::string name;
};

struct Context;
// What executing an instruction did to its warp.
enum class Status { kNext, kChanged };
using Handler = Status (*)(Context&);

enum class Rounding : uint8_t { rn, rz, rm, rp };
enum class Class : uint8_t {
  fp32,
  fp64,
  fp16,
  integer,
  convert,
  mufu,
  memory,
  move,
  control,
  barrier,
  count
};

using Place = std::array<uint32_t, 3>;  // file, line, column
struct Site {
  Place place;
  int caller;  // the site that the function was inlined into, or -1
};

struct Instruction {
  Handler run = nullptr;
  std::vector<std::string> words;  // opcode and modifiers
  std::vector<Operand> operands;  // destination first
  bool guarded = false, guard_negate = false;
  uint32_t guard = 0;
  // What the decoder made of the words.
  Type type = Type::none, from = Type::none;
  Rounding rounding = Rounding::rn;
  bool integral = false;  // cvt.rni and its kind: round to an integer
  bool ftz = false, sat = false, approx = false, nan = false, abs = false;
  Space space = Space::generic;
  uint8_t vector = 1;
  uint8_t unused = 0;  // elements of a vector load that nothing reads, as bits
  int compare = 0, combine = 0, mode = 0;
  Class kind = Class::integer;
  Timing timing;
  Semantics semantics;
  int site = -1;  // in the source
  std::string text;
};

struct Variable {
  uint64_t offset = 0, size = 0, align = 1;
};

struct Function {
  std::string name;
  bool entry = false;
  uint32_t begin = 0;
  uint32_t register_bytes = 0, predicates = 0;
  std::vector<Variable> parameters, results;
  uint64_t parameter_bytes = 0;  // of a kernel
  uint64_t local_bytes = 0, frame_parameter_bytes = 0, shared_bytes = 0;
  int max_threads = 0;
  bool exact_threads = false;  // .reqntid
  std::array<int, 3> cluster = {0, 0, 0};
};

struct Call {
  Function* function = nullptr;
  std::vector<Variable> arguments, results;
};

struct Allocation {
  uint64_t size = 0;
  std::string name;
  bool tracked = false;  // `written` says which bytes hold something
  std::vector<uint8_t> written;  // made when a kernel first comes here
  // Not 0: words that hold this pattern were not written by the host, either.
  uint16_t pattern = 0;
};

uint8_t* written_bytes(Allocation& allocation);

struct Module {
  std::string name;
  int arch = 0;
  std::vector<Instruction> code;
  std::vector<Call> calls;
  std::map<std::string, std::unique_ptr<Function>> functions;
  std::map<std::string, std::vector<uint64_t>> globals;  // storage, 8-byte cells
  std::map<std::string, uint64_t> global_sizes;
  std::map<uint32_t, std::string> files;
  std::vector<Site> sites;
  std::vector<uint32_t>
      timed;  // what the instructions' timings wait for, as places in Frame::ready
  uint64_t shared_bytes = 0;  // of variables outside functions
  uint64_t dynamic_align = 16;
};

std::unique_ptr<Module> parse(const std::string& text, const std::string& name);
void decode(Instruction& instruction);

// A finding: the text that the test sees.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Frame {
  Function* function;
  Frame* parent;
  uint32_t return_pc = 0, call = 0;
  int depth = 0;
  uint64_t local_base = 0;
  std::vector<uint8_t> registers;  // [slot][lane] cells
  std::vector<uint32_t> predicates;
  std::vector<uint8_t> parameters;  // [lane][byte]
  std::vector<uint64_t>
      ready;  // the cycle in which registers, predicates and the carry hold their values
  std::unordered_map<uint32_t, std::unique_ptr<Frame>> callees;  // by call site
};

// Lanes of a warp that stand at the same instruction.
struct Split {
  uint32_t mask, pc;
  Frame* frame;
  enum State : uint8_t { kReady, kConverging, kBarrier } state = kReady;
};

struct AsyncCopy {
  uint32_t destination;
  uint64_t source;
  uint8_t bytes, source_bytes;
  bool captured;
  std::array<uint8_t, 16> data;
};
struct AsyncGroups {
  std::vector<AsyncCopy> open;
  std::vector<std::vector<AsyncCopy>> committed;
};

struct Block;
struct Warp {
  Block* block;
  int index;  // in the block
  int cluster_index;  // in the cluster
  uint32_t exited = 0, alive = 0;
  uint32_t carry = 0;
  Timeline line;
  bool queued = false;
  std::vector<Split> splits;
  std::unique_ptr<Frame> frame;
  std::vector<uint8_t> local, local_written;  // [lane][byte]
  Knowledge known;
  uint32_t met = 0;  // this warp's clock when its lanes met last
  std::array<uint32_t, kLanes>
      lane_fences{};  // its clock at fences since then that not all lanes executed
  bool lane_fenced = false;
  std::array<AsyncGroups, kLanes> async;
  uint32_t cluster_arrived = 0;  // lanes that arrived and did not wait yet
  uint32_t cluster_phase = 0;
};

struct Barrier {
  int warps = 0;
  uint32_t expected = 0;  // threads, or 0 for the whole block
  uint32_t pc = 0;
  uint32_t count = 0, all = 1, any = 0;  // what bar.red found
  Knowledge known;
  uint64_t time = 0;  // of the last arrival
  std::vector<Warp*> waiting;
};

struct MBarrier {
  uint32_t expected = 0, pending = 0, phase = 0;
  int64_t transactions = 0;
  Knowledge known;
  uint64_t time = 0, completed = 0;  // of the last arrival, and of the last one in the phase before
};

struct Cluster;
struct Block {
  Cluster* cluster;
  std::array<uint32_t, 3> index;
  int rank = 0;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<uint8_t> shared;
  std::vector<uint8_t> written;  // by byte of `shared`
  std::vector<Page> pages;  // of kSharedPage bytes of it
  std::array<Barrier, 16> barriers;
  std::unordered_map<uint32_t, MBarrier> mbarriers;
  int live_warps = 0;
  uint64_t time = 0;  // of the last exit
};

struct Cluster {
  uint32_t number = 0;  // in the grid
  std::vector<std::unique_ptr<Block>> blocks;
  uint32_t phase = 0, arrived = 0, live_threads = 0;
  uint64_t time[2] = {0, 0};  // of the last arrival in even and odd phases
  Knowledge known;
  int live_blocks = 0;
};

struct Traffic {
  uint64_t requests = 0, bytes = 0, sectors = 0, conflicts = 0;
};
enum Direction { kLoad, kStore, kAtomic };

struct Launch {
  std::string kernel;
  std::array<uint32_t, 3> grid = {1, 1, 1}, block = {1, 1, 1}, cluster = {1, 1, 1};
  uint64_t static_shared = 0, dynamic_shared = 0;
  bool programmatic = false;  // it may start before the launch before it has ended
  // Counts: warp instructions and thread instructions by class; memory by space and direction.
  std::array<uint64_t, static_cast<size_t>(Class::count)> warp_instructions{},
      thread_instructions{};
  std::map<std::string, uint64_t> opcodes;  // thread instructions
  uint64_t critical_path = 0, critical_sum = 0;  // cycles of the longest block and of all blocks
  Traffic traffic[6][3];
};

struct Device {
  int arch = 90, sms = 132;
  int shared_per_block = 232448, shared_per_sm = 233472, max_cluster = 8;
  int l2 = 50 << 20;
};

struct Options {
  uint64_t seed = 0;
  bool shuffle = true;  // the order of blocks
  int resident = 3;  // blocks or clusters that run at the same time
  bool perturb = true;  // approximate functions err as far as documented
  // A shuffle from a lane that does not take part gives random bits, as the ISA allows, and no finding.
  bool undefined_shuffles = false;
  // A store of what shared memory holds already races with nothing.
  bool same_values = false;
  uint64_t limit =
      uint64_t{1} << 28;  // warp instructions of a launch, against kernels that wait for ever
};

class Machine {
 public:
  std::map<uint64_t, Allocation> memory;  // global, by address
  Options options;
  Device device;
  std::vector<Launch> launches;
  std::string output;  // of printf

  void launch(Module& module, Function& kernel, Launch what,
              const std::vector<uint8_t>& parameters);

  // For the instructions.
  Module* module = nullptr;
  Launch* current = nullptr;
  const uint8_t* parameters = nullptr;
  uint64_t parameter_bytes = 0, dynamic_offset = 0;
  Ordering ordering;
  std::mt19937_64 random;
  uint64_t clock = 0;

  void wake(Warp& warp);
  void block_barrier(Block& block, int id);
  void cluster_barrier(Cluster& cluster);
  void exit_lanes(Warp& warp, uint32_t lanes);
  Allocation* find(uint64_t address, uint64_t& base);
  void announce(uint64_t address, Allocation allocation);
  void forget(uint64_t address);
  void forget_all();
  std::array<uint32_t, 3> block_of(uint64_t cluster, uint64_t rank) const;  // its index in the grid

 private:
  void start(uint64_t cluster_index);
  Warp* new_warp(Block& block, int index, uint32_t threads);
  void run(Warp& warp, int quantum);
  void count();
  [[noreturn]] void deadlock();
  uint64_t draw();  // cheap pseudo-random numbers

  Function* kernel_ = nullptr;
  std::vector<std::unique_ptr<Cluster>> resident_;
  std::vector<Warp*> ready_;
  uint64_t state_ = 1;
  std::vector<uint64_t> warp_hits_, thread_hits_;  // by instruction
  std::pair<const uint64_t, Allocation>* last_ = nullptr;
};

struct Context {
  Machine& machine;
  Block& block;
  Warp& warp;
  Frame& frame;
  const Instruction& ins;
  uint32_t active;
  size_t split;
  // Of the first active lane's address; `peer`: shared memory of another block.
  Space space = ins.space;
  bool peer = false;

  const Operand& operand(size_t i) const { return ins.operands[i]; }
};

[[noreturn]] void fault(Context& c, int lane, const std::string& check, const std::string& detail);

// Operands of all lanes, as bits or numbers of T's size.
uint64_t special(Context& c, uint32_t which, int lane);
void fetch_cells(Context& c, const Operand& o, uint64_t (&out)[kLanes]);

template <class T>
void fetch(Context& c, const Operand& o, T (&out)[kLanes]) {
  if (o.kind == Operand::kRegister && o.cell == sizeof(T)) {
    std::memcpy(out, c.frame.registers.data() + o.slot, sizeof out);
    return;
  }
  uint64_t cells[kLanes];
  fetch_cells(c, o, cells);
  for (int i = 0; i < kLanes; ++i) std::memcpy(&out[i], &cells[i], sizeof(T));
}

// Writes the active lanes of a register; T is extended by its sign to the register's width.
template <class T>
void put(Context& c, const Operand& o, const T (&value)[kLanes]) {
  if (o.kind == Operand::kSink) return;
  uint8_t* cells = c.frame.registers.data() + o.slot;
  if (sizeof(T) == o.cell && c.active == kAllLanes) {
    std::memcpy(cells, value, sizeof value);
    return;
  }
  for (int i = 0; i < kLanes; ++i) {
    if (!(c.active >> i & 1)) continue;
    uint64_t wide = 0;
    if constexpr (std::is_integral_v<T> && std::is_signed_v<T>) {
      wide = static_cast<uint64_t>(static_cast<int64_t>(value[i]));
    } else {
      std::memcpy(&wide, &value[i], sizeof(T));
    }
    std::memcpy(cells + size_t{o.cell} * i, &wide, o.cell);
  }
}

uint32_t fetch_predicate(Context& c, const Operand& o);
void put_predicate(Context& c, const Operand& o, uint32_t lanes);

// Tables of the executing functions, one a file; null where the words name nothing that they know.
Handler arithmetic_handler(Instruction& ins);
Handler memory_handler(Instruction& ins);
Handler synchronize_handler(Instruction& ins);

std::string describe(const Instruction& ins);
std::string demangled(const std::string& name);
std::string hex(uint64_t x);
std::string coordinates(const std::array<uint32_t, 3>& x);
// file.cu:12, and for an inlined function the places that it was called from.
std::string place(const Machine& machine, const Instruction& ins);
// Whether a word is among the opcode and its modifiers.
inline bool has(const Instruction& ins, const char* word) {
  return std::find(ins.words.begin(), ins.words.end(), word) != ins.words.end();
}
// Of f16 or bf16, rounded once.
uint16_t half_sum(Type type, uint16_t a, uint16_t b);
// Makes the callee's frame of a call, its registers and places; frames are kept for the next call from there.
Frame& enter(Frame& parent, uint32_t pc, Function& function);
std::unique_ptr<Frame> new_frame(Function& function, Frame* parent, uint64_t local_base);
// The lanes named by a .sync instruction's mask, once all of them stand here; 0: this split waits for them.
uint32_t converge(Context& c, uint32_t members);

// Shared memory, seen by its races and by whether it was ever written.
uint8_t* shared_bytes(Context& c, int lane, uint32_t address, int bytes, Access access);
uint8_t* global_bytes(Context& c, int lane, uint64_t address, int bytes, Access access);
Block& shared_owner(Context& c, int lane, uint32_t& address);
void finish_async(Context& c, int lane, size_t keep);

}  // namespace ptx
