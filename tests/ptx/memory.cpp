// Loads, stores, atomics and asynchronous copies: where an address lies, whether it may be touched, what it costs.
#include <algorithm>
#include <cmath>
#include <sstream>

#include "emulator.h"

namespace ptx {
namespace {

void address_lanes(Context& c, const Operand& o, uint64_t (&out)[kLanes]) {
  uint64_t base = o.value;
  if (o.dynamic_shared) base += c.machine.dynamic_offset;
  if (o.space == Space::local) base += c.frame.local_base;
  if (!o.has_base) {
    for (uint64_t& a : out) a = base;
    return;
  }
  Operand reg;
  reg.kind = Operand::kRegister;
  reg.cell = o.cell;
  reg.slot = o.slot;
  fetch_cells(c, reg, out);
  for (uint64_t& a : out) a += base;
}

Space space_of(uint64_t address) {
  switch (address / kWindow) {
    case 0: return Space::global;
    case 1: return Space::shared;
    case 2: return Space::local;
    default: return Space::param;
  }
}

uint8_t* local_bytes(Context& c, int lane, uint64_t address, int bytes, Access access) {
  size_t size = c.warp.local.size() / kLanes;
  if (address + static_cast<uint64_t>(bytes) > size)
    fault(c, lane, "out of bounds",
          "local address " + hex(address) + " of " + std::to_string(size) + " bytes");
  size_t at = size * static_cast<size_t>(lane) + address;
  uint8_t* written = c.warp.local_written.data() + at;
  for (int i = 0; i < bytes; ++i) {
    if (access == Access::kRead && !written[i])
      fault(c, lane, "never written", "local address " + hex(address));
    if (access != Access::kRead) written[i] = 1;
  }
  return c.warp.local.data() + at;
}

uint8_t* parameter_bytes(Context& c, int lane, uint64_t address, int bytes, Access access) {
  if (address < kFrameParam) {
    if (access != Access::kRead)
      fault(c, lane, "out of bounds", "a store to the kernel's parameters");
    if (address + static_cast<uint64_t>(bytes) > c.machine.parameter_bytes)
      fault(c, lane, "out of bounds",
            "parameter address " + hex(address) + " of " +
                std::to_string(c.machine.parameter_bytes) + " bytes");
    return const_cast<uint8_t*>(c.machine.parameters) + address;
  }
  address -= kFrameParam;
  uint64_t size = c.frame.function->frame_parameter_bytes;
  if (address + static_cast<uint64_t>(bytes) > size)
    fault(c, lane, "out of bounds", "a function's parameter at " + hex(address));
  return c.frame.parameters.data() + size * static_cast<uint64_t>(lane) + address;
}

const char* name_of(Space space) {
  static const char* const names[] = {"generic", "global", "shared", "local", "param", "const"};
  return names[static_cast<int>(space)];
}

// The bytes behind each active lane's address, checked. Generic addresses are resolved lane by lane.
struct Lanes {
  uint64_t address[kLanes];
  uint8_t* bytes[kLanes];
  Space space;  // of the first active lane
};

uint8_t* resolve(Context& c, int lane, Space space, uint64_t address, int bytes, Access access) {
  if (address % static_cast<uint64_t>(bytes) != 0)
    fault(c, lane, "misaligned",
          std::to_string(bytes) + " bytes at " + name_of(space) + " address " + hex(address));
  switch (space) {
    case Space::shared: return shared_bytes(c, lane, static_cast<uint32_t>(address), bytes, access);
    case Space::local: return local_bytes(c, lane, address, bytes, access);
    case Space::param: return parameter_bytes(c, lane, address, bytes, access);
    default: return global_bytes(c, lane, address, bytes, access);
  }
}

// 32-byte sectors that a request touches.
uint64_t sectors(const uint64_t* address, uint32_t active, int bytes) {
  uint64_t touched[2 * kLanes];
  size_t n = 0;
  for (int i = 0; i < kLanes; ++i) {
    if (!(active >> i & 1)) continue;
    for (uint64_t s = address[i] / 32;
         s <= (address[i] + static_cast<uint64_t>(bytes) - 1) / 32 && n < 2 * kLanes; ++s)
      touched[n++] = s;
  }
  std::sort(touched, touched + n);
  return static_cast<uint64_t>(std::unique(touched, touched + n) - touched);
}

// Cycles beyond the first that a shared-memory request takes: 32 banks of 4 bytes; 8-byte requests run in two
// halves, 16-byte ones in four quarters.
uint64_t conflicts(const uint64_t* address, uint32_t active, int bytes) {
  int parts = std::max(1, bytes / 4), lanes = kLanes / parts;
  uint64_t extra = 0;
  for (int part = 0; part < parts; ++part) {
    uint64_t words[4 * kLanes];
    size_t n = 0;
    for (int i = part * lanes; i < (part + 1) * lanes; ++i) {
      if (!(active >> i & 1)) continue;
      for (int k = 0; k < parts; ++k) words[n++] = address[i] / 4 + static_cast<uint64_t>(k);
    }
    std::sort(words, words + n);
    n = static_cast<size_t>(std::unique(words, words + n) - words);
    int load[32] = {}, most = 0;
    for (size_t i = 0; i < n; ++i) most = std::max(most, ++load[words[i] % 32]);
    if (most > 1) extra += static_cast<uint64_t>(most - 1);
  }
  return extra;
}

void count(Context& c, Space space, Direction direction, const uint64_t* address, int bytes) {
  if (space == Space::param) return;
  Traffic& t = c.machine.current->traffic[static_cast<int>(space)][direction];
  ++t.requests;
  t.bytes += static_cast<uint64_t>(__builtin_popcount(c.active) * bytes);
  if (space == Space::shared) {
    t.conflicts += conflicts(address, c.active, bytes);
  } else {
    t.sectors += sectors(address, c.active, bytes);
  }
}

bool is_written(Context& c, uint64_t address, uint64_t bytes) {
  uint64_t base = 0;
  Allocation* a = c.machine.find(address, base);
  if (a == nullptr || address + bytes > base + a->size) return false;
  const uint8_t* written = written_bytes(*a) + (address - base);
  return !a->tracked ||
         std::count(written, written + bytes, 1) == static_cast<std::ptrdiff_t>(bytes);
}

bool is_peer(const Context& c, uint32_t address) {
  uint32_t high = address >> kRankShift;
  return high != 0 && high - 1 != static_cast<uint32_t>(c.block.rank);
}

// What a strong access tells other warps, and hears from them.
void communicate(Context& c, const uint64_t* address, Access how) {
  bool reads = how == Access::kRead || c.ins.words[0] == "atom";
  for (int i = 0; i < kLanes; ++i) {
    if (!(c.active >> i & 1)) continue;
    if (reads) c.machine.ordering.observe(c, address[i]);
    if (how != Access::kRead) c.machine.ordering.release(c, address[i]);
  }
}

// unseen: lanes whose store changes nothing, which nothing needs to be ordered with.
void access(Context& c, const Operand& o, int bytes, Access how, Lanes& out, uint32_t unseen = 0) {
  address_lanes(c, o, out.address);
  out.space = c.ins.space;
  auto reach = [&](int lane, Space space, uint64_t address, int size) {
    bool seen = !(unseen >> lane & 1);
    if (space == Space::shared && !seen) return static_cast<uint8_t*>(nullptr);
    uint8_t* at = resolve(c, lane, space, address, size, how);
    if (space == Space::global && seen) c.machine.ordering.touch(c, lane, address, size, how);
    return at;
  };
  bool first = true;
  for (int i = 0; i < kLanes; ++i) {
    if (!(c.active >> i & 1)) continue;
    Space space = c.ins.space;
    if (space == Space::generic) {
      space = space_of(out.address[i]);
      if (space != Space::global) out.address[i] %= kWindow;
      if (first) out.space = space;
    }
    first = false;
    if (c.ins.unused == 0) {
      out.bytes[i] = reach(i, space, out.address[i], bytes);
      continue;
    }
    // A vector that the compiler made wider than what is used: the rest need not have been written.
    bool aligned = out.address[i] % static_cast<uint64_t>(bytes) == 0;
    int part = bytes_of(c.ins.type);
    for (int k = 0; k < c.ins.vector; ++k) {
      if (c.ins.unused >> k & 1) continue;
      uint64_t at = out.address[i] + static_cast<uint64_t>(k * part);
      out.bytes[i] =
          reach(i, space, aligned ? at : out.address[i], aligned ? part : bytes) - k * part;
    }
  }
  c.space = out.space;
  c.peer = out.space == Space::shared &&
           is_peer(c, static_cast<uint32_t>(out.address[__builtin_ctz(c.active)]));
  if (c.ins.semantics.scope != kNoScope && out.space == Space::global)
    communicate(c, out.address, how);
  Direction direction = how == Access::kRead ? kLoad : how == Access::kWrite ? kStore : kAtomic;
  count(c, out.space, direction, out.address, bytes);
}

Status load(Context& c) {
  int bytes = bytes_of(c.ins.type), n = c.ins.vector;
  Lanes lanes;
  access(c, c.operand(1), bytes * n, Access::kRead, lanes);
  const Operand& d = c.operand(0);
  for (int k = 0; k < n; ++k) {
    uint64_t value[kLanes] = {};
    for (int i = 0; i < kLanes; ++i) {
      if (c.active >> i & 1)
        std::memcpy(&value[i], lanes.bytes[i] + k * bytes, static_cast<size_t>(bytes));
    }
    if (is_signed(c.ins.type) && bytes < 8) {
      for (uint64_t& v : value)
        v = static_cast<uint64_t>(static_cast<int64_t>(v << (64 - 8 * bytes)) >> (64 - 8 * bytes));
    }
    put(c, n == 1 && d.kind != Operand::kVector ? d : d.elements[static_cast<size_t>(k)], value);
  }
  return Status::kNext;
}

// Of lanes that store the same value to the same place all but one: the result is defined.
uint32_t repeated(Context& c, const uint64_t* address, const uint64_t (*value)[kLanes], int bytes) {
  bool ascending = true;
  int last = -1;
  for (int i = 0; i < kLanes; ++i) {
    if (!(c.active >> i & 1)) continue;
    ascending = ascending && (last < 0 || address[i] > address[last]);
    last = i;
  }
  uint32_t out = 0;
  if (ascending) return out;
  for (int i = 0; i < kLanes; ++i) {
    Space space = c.ins.space == Space::generic ? space_of(address[i]) : c.ins.space;
    if (!(c.active >> i & 1) || (space != Space::shared && space != Space::global)) continue;
    for (int j = 0; j < i && !(out >> i & 1); ++j) {
      bool same = (c.active >> j & 1) && address[j] == address[i];
      for (int k = 0; same && k < c.ins.vector; ++k)
        same = std::memcmp(&value[k][i], &value[k][j], static_cast<size_t>(bytes)) == 0;
      if (same) out |= 1u << i;
    }
  }
  return out;
}

// Lanes that store what the memory holds.
uint32_t unchanged(Context& c, const uint64_t* address, const uint64_t (*value)[kLanes],
                   int bytes) {
  uint32_t out = 0;
  uint64_t size = static_cast<uint64_t>(bytes * c.ins.vector);
  for (int i = 0; i < kLanes; ++i) {
    if (!(c.active >> i & 1)) continue;
    const uint8_t* held = nullptr;
    if (c.ins.space == Space::shared && address[i] + size <= c.block.shared.size()) {
      const uint8_t* written = c.block.written.data() + address[i];
      if (std::count(written, written + size, 1) == static_cast<std::ptrdiff_t>(size))
        held = c.block.shared.data() + address[i];
    } else if (c.ins.space == Space::global && is_written(c, address[i], size)) {
      held = reinterpret_cast<const uint8_t*>(address[i]);
    }
    bool same = held != nullptr;
    for (int k = 0; same && k < c.ins.vector; ++k)
      same = std::memcmp(held + k * bytes, &value[k][i], static_cast<size_t>(bytes)) == 0;
    if (same) out |= 1u << i;
  }
  return out;
}

Status store(Context& c) {
  int bytes = bytes_of(c.ins.type), n = c.ins.vector;
  uint64_t value[16][kLanes];
  const Operand& s = c.operand(1);
  for (int k = 0; k < n; ++k) {
    const Operand& from =
        n == 1 && s.kind != Operand::kVector ? s : s.elements[static_cast<size_t>(k)];
    if (from.literal_bits == 64 && bytes == 4) {
      double literal;
      std::memcpy(&literal, &from.value, 8);
      float x = static_cast<float>(literal);
      for (uint64_t& v : value[k]) std::memcpy(&v, &x, sizeof x);
    } else {
      fetch_cells(c, from, value[k]);
    }
  }
  Lanes lanes;
  address_lanes(c, c.operand(0), lanes.address);
  uint32_t unseen = repeated(c, lanes.address, value, bytes);
  if (c.machine.options.same_values) unseen |= unchanged(c, lanes.address, value, bytes);
  access(c, c.operand(0), bytes * n, Access::kWrite, lanes, unseen);
  for (int k = 0; k < n; ++k) {
    for (int i = 0; i < kLanes; ++i) {
      if ((c.active & ~unseen) >> i & 1)
        std::memcpy(lanes.bytes[i] + k * bytes, &value[k][i], static_cast<size_t>(bytes));
    }
  }
  return Status::kNext;
}

// 8 x 8 matrices of 16-bit elements: lane 8 j + r holds the address of row r of matrix j, 16 bytes;
// lane i holds elements 2 (i % 4) and the next of row i / 4 of each matrix, or transposed.
Status matrix(Context& c) {
  bool loads = c.ins.words[0] == "ldmatrix", transposed = has(c.ins, "trans");
  int n = has(c.ins, "x4") ? 4 : has(c.ins, "x2") ? 2 : 1;
  if (c.active != kAllLanes) fault(c, 0, "inactive lanes", "all lanes must execute it");
  uint64_t address[kLanes];
  address_lanes(c, c.operand(loads ? 1 : 0), address);
  uint8_t* rows[kLanes];
  for (int i = 0; i < 8 * n; ++i)
    rows[i] = resolve(c, i, Space::shared, address[i], 16, loads ? Access::kRead : Access::kWrite);
  Traffic& t = c.machine.current->traffic[static_cast<int>(Space::shared)][loads ? kLoad : kStore];
  ++t.requests;
  t.bytes += static_cast<uint64_t>(128 * n);
  for (int j = 0; j < n; ++j) {
    uint32_t value[kLanes] = {};
    const Operand& held = c.operand(loads ? 0 : 1);
    const Operand& o = held.kind == Operand::kVector ? held.elements[static_cast<size_t>(j)] : held;
    if (!loads) fetch(c, o, value);
    for (int i = 0; i < kLanes; ++i) {
      for (int half = 0; half < 2; ++half) {
        int row = i / 4, column = 2 * (i % 4) + half;
        uint8_t* at = transposed ? rows[8 * j + column] + 2 * row : rows[8 * j + row] + 2 * column;
        uint8_t* part = reinterpret_cast<uint8_t*>(&value[i]) + 2 * half;
        std::memcpy(loads ? part : at, loads ? at : part, 2);
      }
    }
    if (loads) put(c, o, value);
  }
  return Status::kNext;
}

enum AtomicOp { kAdd, kMin, kMax, kInc, kDec, kAnd, kOr, kXor, kExch, kCas };
const char* const kAtomicNames[] = {"add", "min", "max", "inc",  "dec",
                                    "and", "or",  "xor", "exch", "cas"};

template <class T>
T integer_atomic(int op, T old, T b, T e) {
  using U = std::make_unsigned_t<T>;
  switch (op) {
    case kAdd: return static_cast<T>(static_cast<U>(old) + static_cast<U>(b));
    case kMin: return std::min(old, b);
    case kMax: return std::max(old, b);
    case kInc: return old >= b ? T(0) : static_cast<T>(old + 1);
    case kDec: return old == 0 || old > b ? b : static_cast<T>(old - 1);
    case kAnd: return old & b;
    case kOr: return old | b;
    case kXor: return old ^ b;
    case kExch: return b;
    default: return old == b ? e : old;
  }
}

// flushes: of subnormal fp32, which additions to global memory do and those to shared memory do not.
uint64_t atomic_result(Type t, int op, uint64_t old, uint64_t b, uint64_t e, bool flushes) {
  auto f32 = [](uint64_t x) {
    float y;
    std::memcpy(&y, &x, 4);
    return y;
  };
  auto f64 = [](uint64_t x) {
    double y;
    std::memcpy(&y, &x, 8);
    return y;
  };
  switch (t) {
    case Type::f32: {
      auto flush = [&](float x) {
        return flushes && std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x;
      };
      float s = flush(flush(f32(old)) + flush(f32(b)));
      uint32_t bits;
      std::memcpy(&bits, &s, 4);
      return s != s ? 0x7FFFFFFFu : bits;
    }
    case Type::f64: {
      double s = f64(old) + f64(b);
      uint64_t bits;
      std::memcpy(&bits, &s, 8);
      return bits;
    }
    case Type::f16:
    case Type::bf16: return half_sum(t, static_cast<uint16_t>(old), static_cast<uint16_t>(b));
    case Type::f16x2:
    case Type::bf16x2:
      return half_sum(t, static_cast<uint16_t>(old), static_cast<uint16_t>(b)) |
             static_cast<uint64_t>(
                 half_sum(t, static_cast<uint16_t>(old >> 16), static_cast<uint16_t>(b >> 16)))
                 << 16;
    case Type::b16:
    case Type::u16:
      return integer_atomic(op, static_cast<uint16_t>(old), static_cast<uint16_t>(b),
                            static_cast<uint16_t>(e));
    case Type::s32:
      return static_cast<uint32_t>(integer_atomic(
          op, static_cast<int32_t>(old), static_cast<int32_t>(b), static_cast<int32_t>(e)));
    case Type::s64:
      return static_cast<uint64_t>(integer_atomic(
          op, static_cast<int64_t>(old), static_cast<int64_t>(b), static_cast<int64_t>(e)));
    case Type::b64:
    case Type::u64: return integer_atomic(op, old, b, e);
    default:
      return integer_atomic(op, static_cast<uint32_t>(old), static_cast<uint32_t>(b),
                            static_cast<uint32_t>(e));
  }
}

// atom d, [a], b{, c} and red [a], b. Which lane comes first is not defined, so the seed says.
Status atomic(Context& c) {
  bool returns = c.ins.words[0] == "atom";
  size_t at = returns ? 1 : 0;
  int bytes = bytes_of(c.ins.type);
  Lanes lanes;
  access(c, c.operand(at), bytes, Access::kAtomic, lanes);
  uint64_t b[kLanes], e[kLanes] = {}, old[kLanes] = {};
  fetch_cells(c, c.operand(at + 1), b);
  if (c.ins.mode == kCas) fetch_cells(c, c.operand(at + 2), e);
  int first = static_cast<int>(c.machine.random() % kLanes);
  for (int k = 0; k < kLanes; ++k) {
    int i = (first + k) % kLanes;
    if (!(c.active >> i & 1)) continue;
    std::memcpy(&old[i], lanes.bytes[i], static_cast<size_t>(bytes));
    uint64_t next =
        atomic_result(c.ins.type, c.ins.mode, old[i], b[i], e[i], lanes.space == Space::global);
    std::memcpy(lanes.bytes[i], &next, static_cast<size_t>(bytes));
  }
  if (returns) put(c, c.operand(0), old);
  return Status::kNext;
}

// ---- cp.async -----------------------------------------------------------------------------------------------

void mark_unwritten(Context& c, int lane, uint32_t address, int bytes) {
  Block& owner = shared_owner(c, lane, address);
  std::fill_n(owner.written.data() + address, bytes, 0);
}

const uint8_t* copied_bytes(Context& c, int lane, uint64_t address, int bytes) {
  const uint8_t* at = global_bytes(c, lane, address, bytes, Access::kRead);
  c.machine.ordering.touch(c, lane, address, bytes, Access::kRead);
  return at;
}

// The copy may happen at any time up to its wait: the seed decides whether the source is read now or then. Until then
// the destination counts as never written.
Status async_copy(Context& c) {
  int bytes = static_cast<int>(c.operand(2).value);
  uint64_t source_bytes[kLanes];
  for (uint64_t& n : source_bytes) n = static_cast<uint64_t>(bytes);
  if (c.ins.operands.size() > 3 && c.operand(3).kind != Operand::kPredicate)
    fetch_cells(c, c.operand(3), source_bytes);
  uint64_t to[kLanes], from[kLanes];
  address_lanes(c, c.operand(0), to);
  address_lanes(c, c.operand(1), from);
  for (int i = 0; i < kLanes; ++i) {
    if (!(c.active >> i & 1)) continue;
    AsyncCopy copy = {static_cast<uint32_t>(to[i]),          from[i], static_cast<uint8_t>(bytes),
                      static_cast<uint8_t>(source_bytes[i]), false,   {}};
    if (from[i] % static_cast<uint64_t>(bytes) != 0 || to[i] % static_cast<uint64_t>(bytes) != 0)
      fault(c, i, "misaligned",
            std::to_string(bytes) + " bytes from global address " + hex(from[i]) +
                " to shared address " + hex(to[i]));
    const uint8_t* source =
        copy.source_bytes > 0 ? copied_bytes(c, i, from[i], copy.source_bytes) : nullptr;
    shared_bytes(c, i, copy.destination, bytes, Access::kWrite);
    mark_unwritten(c, i, copy.destination, bytes);
    if (c.machine.random() & 1 && source != nullptr) {
      copy.captured = true;
      std::memcpy(copy.data.data(), source, copy.source_bytes);
    }
    c.warp.async[static_cast<size_t>(i)].open.push_back(copy);
  }
  count(c, Space::global, kLoad, from, bytes);
  count(c, Space::shared, kStore, to, bytes);
  return Status::kNext;
}

Status async_commit(Context& c) {
  for (int i = 0; i < kLanes; ++i) {
    if (!(c.active >> i & 1)) continue;
    AsyncGroups& groups = c.warp.async[static_cast<size_t>(i)];
    groups.committed.push_back(std::move(groups.open));
    groups.open.clear();
  }
  c.warp.line.commit_copies();
  return Status::kNext;
}

Status async_wait(Context& c) {
  bool all = c.ins.words[2] == "wait_all";
  if (all) c.warp.line.commit_copies();
  issue(c);
  c.warp.line.wait_copies(all ? 0 : c.operand(0).value);
  for (int i = 0; i < kLanes; ++i) {
    if (!(c.active >> i & 1)) continue;
    if (all) {
      AsyncGroups& groups = c.warp.async[static_cast<size_t>(i)];
      groups.committed.push_back(std::move(groups.open));
      groups.open.clear();
      finish_async(c, i, 0);
    } else {
      finish_async(c, i, c.operand(0).value);
    }
  }
  return Status::kNext;
}

// ---- Addresses ------------------------------------------------------------------------------------------------

uint64_t window(Space space) {
  return space == Space::shared  ? kSharedWindow
         : space == Space::local ? kLocalWindow
         : space == Space::param ? kParamWindow
                                 : 0;
}

Status convert_address(Context& c) {
  uint64_t a[kLanes];
  fetch_cells(c, c.operand(1), a);
  bool to = c.ins.words[1] == "to";
  for (uint64_t& x : a)
    x = to ? (c.ins.space == Space::global ? x : x % kWindow) : x + window(c.ins.space);
  put(c, c.operand(0), a);
  return Status::kNext;
}

Status is_space(Context& c) {
  uint64_t a[kLanes];
  fetch_cells(c, c.operand(1), a);
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i)
    bits |= static_cast<uint32_t>(space_of(a[i]) == c.ins.space) << i;
  put_predicate(c, c.operand(0), bits);
  return Status::kNext;
}

// The same place in the shared memory of another block of the cluster.
Status map_rank(Context& c) {
  uint64_t a[kLanes];
  uint32_t rank[kLanes];
  fetch_cells(c, c.operand(1), a);
  fetch(c, c.operand(2), rank);
  constexpr uint64_t kPlace = (uint64_t{1} << kRankShift) - 1;
  for (int i = 0; i < kLanes; ++i) {
    if (!(c.active >> i & 1)) continue;
    if (rank[i] >= c.block.cluster->blocks.size())
      fault(c, i, "out of bounds",
            "block " + std::to_string(rank[i]) + " of a cluster of " +
                std::to_string(c.block.cluster->blocks.size()));
    a[i] = (a[i] & kWindow) | (a[i] & kPlace) | (uint64_t{rank[i]} + 1) << kRankShift;
  }
  put(c, c.operand(0), a);
  return Status::kNext;
}

Status rank_of(Context& c) {
  uint64_t a[kLanes];
  uint32_t rank[kLanes];
  fetch_cells(c, c.operand(1), a);
  for (int i = 0; i < kLanes; ++i) {
    uint32_t high = static_cast<uint32_t>(a[i] % kWindow >> kRankShift);
    rank[i] = high == 0 ? static_cast<uint32_t>(c.block.rank) : high - 1;
  }
  put(c, c.operand(0), rank);
  return Status::kNext;
}

Status nothing(Context&) { return Status::kNext; }

Status no_policy(Context& c) {
  uint64_t zero[kLanes] = {};
  put(c, c.operand(0), zero);
  return Status::kNext;
}

// Whether the host wrote all the bytes that no kernel did, as far as 8 bytes at a time show it: in each 8, a byte that
// no kernel wrote differs from the pattern.
bool host_wrote(Allocation& a, uint64_t base, uint64_t offset, uint64_t bytes) {
  if (a.pattern == 0) return false;
  const uint8_t* memory = reinterpret_cast<const uint8_t*>(base);
  for (uint64_t first = offset / 8 * 8; first < offset + bytes; first += 8) {
    uint64_t last = std::min(first + 8, a.size);
    bool wrote = false, open = false;
    for (uint64_t i = first; i < last; ++i) {
      if (a.written[i] == 1) continue;
      open = open || (i >= offset && i < offset + bytes);
      wrote = wrote || memory[i] != static_cast<uint8_t>(a.pattern >> i % 2 * 8);
    }
    if (open && !wrote) return false;
    if (wrote) std::fill(a.written.begin() + first, a.written.begin() + last, 1);
  }
  return true;
}

}  // namespace

uint8_t* written_bytes(Allocation& a) {
  if (a.written.empty()) a.written.assign(a.size, 0);
  return a.written.data();
}

void Machine::announce(uint64_t address, Allocation allocation) {
  last_ = nullptr;
  memory[address] = std::move(allocation);
}

void Machine::forget(uint64_t address) {
  last_ = nullptr;
  memory.erase(address);
}

void Machine::forget_all() {
  last_ = nullptr;
  memory.clear();
}

Allocation* Machine::find(uint64_t address, uint64_t& base) {
  if (last_ == nullptr || address < last_->first || address >= last_->first + last_->second.size) {
    auto after = memory.upper_bound(address);
    if (after == memory.begin()) return nullptr;
    last_ = &*std::prev(after);
  }
  base = last_->first;
  return &last_->second;
}

uint8_t* global_bytes(Context& c, int lane, uint64_t address, int bytes, Access access) {
  uint64_t base = 0;
  Allocation* a = c.machine.find(address, base);
  if (a == nullptr || address + static_cast<uint64_t>(bytes) > base + a->size) {
    std::string where = "global address " + hex(address);
    if (a != nullptr)
      where += ", " +
               std::to_string(
                   static_cast<int64_t>(address + static_cast<uint64_t>(bytes) - base - a->size)) +
               " bytes past the end of " + a->name + " (" + std::to_string(a->size) + " bytes)";
    auto next = c.machine.memory.upper_bound(address);
    if (next != c.machine.memory.end() && next->first - address < 4096)
      where += ", " + std::to_string(next->first - address) + " bytes before " + next->second.name;
    fault(c, lane, "out of bounds", where);
  }
  if (a->tracked) {
    uint8_t* written = written_bytes(*a) + (address - base);
    if (access != Access::kWrite && std::count(written, written + bytes, 1) != bytes &&
        !host_wrote(*a, base, address - base, static_cast<uint64_t>(bytes)))
      fault(c, lane, "never written",
            "global address " + hex(address) + ", byte " + std::to_string(address - base) + " of " +
                a->name);
    if (access != Access::kRead) std::fill_n(written, bytes, 1);
  }
  return reinterpret_cast<uint8_t*>(address);
}

Block& shared_owner(Context& c, int lane, uint32_t& address) {
  uint32_t high = address >> kRankShift;
  if (high == 0) return c.block;
  address &= (1u << kRankShift) - 1;
  auto& blocks = c.block.cluster->blocks;
  if (high - 1 >= blocks.size())
    fault(c, lane, "out of bounds",
          "shared address of block " + std::to_string(high - 1) + " of the cluster");
  Block& owner = *blocks[high - 1];
  if (&owner != &c.block) {
    if (owner.live_warps == 0)
      fault(c, lane, "out of bounds", "shared memory of a block of the cluster that has ended");
    if (c.block.cluster->phase == 0)
      fault(c, lane, "shared-memory race",
            "shared memory of another block before a first barrier.cluster, so it may not have "
            "begun");
  }
  return owner;
}

uint8_t* shared_bytes(Context& c, int lane, uint32_t address, int bytes, Access access) {
  uint32_t given = address;
  Block& owner = shared_owner(c, lane, address);
  if (address + static_cast<uint32_t>(bytes) > owner.shared.size())
    fault(c, lane, "out of bounds",
          "shared address " + hex(given) + " of " + std::to_string(owner.shared.size()) + " bytes");
  // A race is the more telling finding.
  c.machine.ordering.touch_shared(c, lane, owner, address, bytes, access);
  uint8_t* written = owner.written.data() + address;
  if (access == Access::kWrite) {
    std::fill_n(written, bytes, 1);
  } else if (std::count(written, written + bytes, 1) != bytes) {
    fault(c, lane, "never written", "shared address " + hex(given));
  }
  return owner.shared.data() + address;
}

void finish_async(Context& c, int lane, size_t keep) {
  AsyncGroups& groups = c.warp.async[static_cast<size_t>(lane)];
  while (groups.committed.size() > keep) {
    for (AsyncCopy& copy : groups.committed.front()) {
      if (!copy.captured && copy.source_bytes > 0)
        std::memcpy(copy.data.data(), copied_bytes(c, lane, copy.source, copy.source_bytes),
                    copy.source_bytes);
      std::memcpy(shared_bytes(c, lane, copy.destination, copy.bytes, Access::kWrite),
                  copy.data.data(), copy.bytes);
    }
    groups.committed.erase(groups.committed.begin());
  }
}

Handler memory_handler(Instruction& ins) {
  const std::string& name = ins.words[0];
  ins.kind = Class::memory;
  if (name == "ld" || name == "ldu") {
    if (ins.space == Space::param)
      ins.kind = Class::move;  // the constant bank: an operand on the machine
    return load;
  }
  if (name == "st" && ins.words[1] != "async" && ins.words[1] != "bulk") {
    if (ins.space == Space::param) ins.kind = Class::move;
    return store;
  }
  if ((name == "atom" || name == "red") && ins.words[1] != "async") {
    ins.mode = -1;
    for (int k = kAdd; k <= kCas; ++k) {
      for (const std::string& w : ins.words) {
        if (w == kAtomicNames[k]) ins.mode = k;
      }
    }
    bool known = ins.mode >= 0 && ins.vector == 1 &&
                 (!is_float(ins.type) || ins.mode == kAdd || ins.mode == kExch || ins.mode == kCas);
    if (known && is_float(ins.type) && ins.mode != kAdd)
      ins.type = bytes_of(ins.type) == 8 ? Type::b64 : Type::b32;
    return known ? atomic : nullptr;
  }
  if (name == "cp" && ins.words.size() > 2 && ins.words[1] == "async") {
    const std::string& what = ins.words[2];
    if (what == "ca" || what == "cg") return async_copy;
    if (what == "commit_group") return async_commit;
    if (what == "wait_group" || what == "wait_all") return async_wait;
    return nullptr;
  }
  if (name == "ldmatrix" || name == "stmatrix") return matrix;
  if (name == "prefetch" || name == "prefetchu" || name == "applypriority" || name == "discard")
    return nothing;
  ins.kind = Class::integer;
  if (name == "cvta") {
    ins.kind = Class::move;
    return convert_address;
  }
  if (name == "isspacep") return is_space;
  if (name == "mapa") return map_rank;
  if (name == "getctarank") return rank_of;
  if (name == "createpolicy") return no_policy;
  return nullptr;
}

}  // namespace ptx
