// PTX text to a Module. Registers become offsets in a frame, labels instruction numbers, variables addresses.
#include <algorithm>
#include <cctype>

#include "emulator.h"

namespace ptx {
namespace {

struct Token {
  std::string text;
  size_t begin;
  int line;
};

[[noreturn]] void error(int line, const std::string& what) {
  throw std::runtime_error("PTX line " + std::to_string(line) + ": " + what);
}

bool starts_word(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' ||
         c == '.';
}

std::vector<Token> tokenize(const std::string& text) {
  std::vector<Token> tokens;
  int line = 1;
  for (size_t i = 0; i < text.size();) {
    char c = text[i];
    if (c == '\n') ++line;
    if (std::isspace(static_cast<unsigned char>(c)) || c == '\0') {
      ++i;
    } else if (text.compare(i, 2, "//") == 0) {
      while (i < text.size() && text[i] != '\n') ++i;
    } else if (text.compare(i, 2, "/*") == 0) {
      size_t end = text.find("*/", i);
      if (end == std::string::npos) error(line, "a comment without end");
      line += static_cast<int>(std::count(text.begin() + i, text.begin() + end, '\n'));
      i = end + 2;
    } else if (c == '"') {
      size_t end = text.find('"', i + 1);
      tokens.push_back({text.substr(i, end - i + 1), i, line});
      i = end + 1;
    } else if (starts_word(c)) {
      size_t begin = i;
      while (i < text.size()) {
        if (starts_word(text[i])) {
          ++i;
        } else if (text.compare(i, 2, "::") == 0) {
          i += 2;
        } else {
          break;
        }
      }
      tokens.push_back({text.substr(begin, i - begin), begin, line});
    } else {
      tokens.push_back({std::string(1, c), i, line});
      ++i;
    }
  }
  tokens.push_back({"", text.size(), line});
  return tokens;
}

const std::map<std::string, Type>& type_names() {
  static const std::map<std::string, Type> names = {
      {"pred", Type::pred},   {"b8", Type::b8},       {"b16", Type::b16},
      {"b32", Type::b32},     {"b64", Type::b64},     {"b128", Type::b128},
      {"u8", Type::u8},       {"u16", Type::u16},     {"u32", Type::u32},
      {"u64", Type::u64},     {"s8", Type::s8},       {"s16", Type::s16},
      {"s32", Type::s32},     {"s64", Type::s64},     {"f16", Type::f16},
      {"bf16", Type::bf16},   {"f16x2", Type::f16x2}, {"bf16x2", Type::bf16x2},
      {"f32", Type::f32},     {"f32x2", Type::f32x2}, {"f64", Type::f64},
      {"u16x2", Type::u16x2}, {"s16x2", Type::s16x2}};
  return names;
}

struct Symbol {
  enum Kind { kRegister, kPredicate, kVariable, kDynamicShared, kParameter } kind;
  uint8_t cell = 4;
  uint32_t slot = 0;
  Space space = Space::generic;
  Variable variable;
};

struct Declaration {
  std::string name;
  Type type = Type::b8;
  uint64_t size = 0, align = 1;
  bool open = false;  // name[]
  std::vector<uint64_t> values;  // as bits of `type`
};

class Parser {
 public:
  Parser(const std::string& text, const std::string& name)
      : text_(text), tokens_(tokenize(text)), module_(new Module) {
    module_->name = name;
  }

  std::unique_ptr<Module> parse() {
    scopes_.push_back({-1, {}, {}});
    while (!at("")) top_level();
    for (auto& [pc, operand] : calls_) {
      auto& name = module_->code[pc].operands[operand].name;
      auto found = module_->functions.find(name);
      if (found == module_->functions.end())
        error(tokens_[here_].line, "call of the unknown function " + name);
      module_->calls[module_->code[pc].operands[operand].value].function = found->second.get();
    }
    return std::move(module_);
  }

 private:
  struct Scope {
    int parent;
    std::unordered_map<std::string, Symbol> symbols;
    std::unordered_map<std::string, uint32_t> labels;
  };
  struct Fixup {
    uint32_t pc;
    size_t operand;
    int scope;
    int line;
  };

  bool at(const std::string& text) const { return tokens_[here_].text == text; }
  const Token& peek() const { return tokens_[here_]; }
  std::string take() { return tokens_[here_++].text; }
  bool skip(const std::string& text) {
    if (!at(text)) return false;
    ++here_;
    return true;
  }
  void expect(const std::string& text) {
    if (!skip(text)) error(peek().line, "`" + text + "` expected before `" + peek().text + "`");
  }
  void skip_line() {
    int line = tokens_[here_ - 1].line;
    while (!at("") && peek().line == line) ++here_;
  }

  static bool is_number(const std::string& word) {
    return !word.empty() && std::isdigit(static_cast<unsigned char>(word[0]));
  }

  // A literal's bits; float_bits tells 0f and 0d literals and decimal fractions from integers.
  uint64_t number(const std::string& word, uint8_t& float_bits) {
    float_bits = 0;
    if (word.size() > 2 && word[0] == '0' && (word[1] == 'f' || word[1] == 'F') &&
        word.size() == 10) {
      float_bits = 32;
      return std::stoull(word.substr(2), nullptr, 16);
    }
    if (word.size() > 2 && word[0] == '0' && (word[1] == 'd' || word[1] == 'D') &&
        word.size() == 18) {
      float_bits = 64;
      return std::stoull(word.substr(2), nullptr, 16);
    }
    if (word.find('.') != std::string::npos) {
      float_bits = 64;
      double value = std::stod(word);
      uint64_t bits;
      std::memcpy(&bits, &value, 8);
      return bits;
    }
    if (word.compare(0, 2, "0b") == 0) return std::stoull(word.substr(2), nullptr, 2);
    return std::stoull(word, nullptr, 0);
  }

  uint64_t integer() {
    bool negative = skip("-");
    uint8_t bits;
    uint64_t value = number(take(), bits);
    return negative ? 0 - value : value;
  }

  const Symbol* lookup(const std::string& name) const {
    for (int scope = scope_; scope >= 0; scope = scopes_[scope].parent) {
      auto found = scopes_[scope].symbols.find(name);
      if (found != scopes_[scope].symbols.end()) return &found->second;
    }
    return nullptr;
  }

  void top_level() {
    std::string word = take();
    if (word == ".version" || word == ".address_size") {
      skip_line();
    } else if (word == ".target") {
      std::string target = peek().text;
      module_->arch = std::atoi(target.c_str() + target.find('_') + 1);
      skip_line();
    } else if (word == ".file") {
      uint32_t index = static_cast<uint32_t>(integer());
      std::string path = take();
      module_->files[index] = path.substr(1, path.size() - 2);
      skip_line();
    } else if (word == ".section") {
      while (!at("{")) ++here_;
      for (int depth = 0;;) {
        std::string token = take();
        depth += token == "{" ? 1 : token == "}" ? -1 : 0;
        if (depth == 0) break;
      }
    } else if (word == ".loc") {
      location();
    } else if (word == ".pragma") {
      while (take() != ";") {
      }
    } else if (word == ".visible" || word == ".weak" || word == ".common" || word == ".extern") {
      external_ = word == ".extern";
    } else if (word == ".entry" || word == ".func") {
      function(word == ".entry");
      external_ = false;
    } else if (word == ".global" || word == ".const" || word == ".shared") {
      variable(word);
      external_ = false;
    } else {
      error(tokens_[here_ - 1].line, "unknown directive " + word);
    }
  }

  // .loc file line column {, function_name symbol, inlined_at file line column}
  void location() {
    int line = tokens_[here_ - 1].line;
    auto place = [&] {
      Place p;
      for (uint32_t& number : p) number = static_cast<uint32_t>(integer());
      return p;
    };
    Site site = {place(), -1};
    while (!at("") && peek().line == line) {
      if (take() != "inlined_at") continue;
      // The call's own place was given by an earlier .loc if it is inlined itself.
      Place caller = place();
      auto known = latest_.find(caller);
      if (known == latest_.end()) {
        module_->sites.push_back({caller, -1});
        known = latest_.emplace(caller, static_cast<int>(module_->sites.size()) - 1).first;
      }
      site.caller = known->second;
    }
    module_->sites.push_back(site);
    site_ = latest_[site.place] = static_cast<int>(module_->sites.size()) - 1;
  }

  // What follows .global, .shared, .local, .param or .reg: alignment, type, name, extent, values.
  Declaration declaration() {
    Declaration d;
    uint64_t vector = 1;
    d.align = 0;
    for (;;) {
      std::string word = peek().text;
      if (word == ".align") {
        ++here_;
        d.align = integer();
      } else if (word == ".v2" || word == ".v4") {
        ++here_;
        vector = static_cast<uint64_t>(word[2] - '0');
      } else if (word == ".ptr") {  // what follows is said of the memory that it points to
        ++here_;
        while (peek().text[0] == '.') {
          if (take() == ".align") integer();
        }
      } else if (word == ".global" || word == ".shared" || word == ".const" || word == ".local") {
        ++here_;
      } else if (word == ".attribute") {
        while (take() != ")") {
        }
      } else if (word[0] == '.' && type_names().count(word.substr(1))) {
        ++here_;
        d.type = type_names().at(word.substr(1));
      } else {
        break;
      }
    }
    d.name = take();
    uint64_t count = vector;
    while (skip("[")) {
      if (skip("]")) {
        d.open = true;
      } else {
        count *= integer();
        expect("]");
      }
    }
    d.size = count * static_cast<uint64_t>(bytes_of(d.type));
    if (d.align == 0) d.align = static_cast<uint64_t>(bytes_of(d.type)) * vector;
    if (skip("=")) values(d);
    return d;
  }

  void values(Declaration& d) {
    for (int depth = 0;;) {
      if (skip("{")) {
        ++depth;
      } else if (skip("}")) {
        --depth;
      } else if (!skip(",")) {
        const Symbol* symbol = lookup(peek().text);
        if (symbol != nullptr) {
          ++here_;
          d.values.push_back(symbol->variable.offset);
        } else if (at("generic")) {
          here_ += 2;
          d.values.push_back(lookup(take())->variable.offset);
          expect(")");
        } else {
          bool negative = skip("-");
          uint8_t bits;
          uint64_t value = number(take(), bits);
          d.values.push_back(negative ? 0 - value : value);
        }
      }
      if (depth == 0) return;
    }
  }

  static uint64_t place(uint64_t& used, const Declaration& d) {
    used = (used + d.align - 1) / d.align * d.align;
    uint64_t offset = used;
    used += d.size;
    return offset;
  }

  void variable(const std::string& space) {
    do {
      Declaration d = declaration();
      Symbol s = {Symbol::kVariable};
      s.variable = {0, d.size, d.align};
      if (space == ".shared") {
        s.space = Space::shared;
        if (external_ || d.open) {
          s.kind = Symbol::kDynamicShared;
          module_->dynamic_align = std::max(module_->dynamic_align, d.align);
        } else {
          bool entry = function_ != nullptr && function_->entry;
          s.variable.offset =
              entry ? place(function_->shared_bytes, d) : place(module_->shared_bytes, d);
          if (!entry && kernel_seen_)
            error(peek().line, "shared memory of a function or module after a kernel");
          kernel_seen_ = kernel_seen_ || entry;
        }
      } else if (space == ".local") {
        s.space = Space::local;
        s.variable.offset = place(function_->local_bytes, d);
      } else if (space == ".param") {
        s.kind = Symbol::kParameter;
        s.space = Space::param;
        s.variable.offset = kFrameParam + place(function_->frame_parameter_bytes, d);
      } else {
        s.space = space == ".const" ? Space::constant : Space::global;
        auto& storage = module_->globals[d.name];
        // Room to align the first byte by hand.
        storage.assign((d.size + d.align) / 8 + 2, 0);
        uint64_t address = reinterpret_cast<uint64_t>(storage.data());
        address = (address + d.align - 1) / d.align * d.align;
        s.variable.offset = address;
        module_->global_sizes[d.name] = d.size;
        for (size_t i = 0; i < d.values.size(); ++i) {
          size_t bytes = static_cast<size_t>(bytes_of(d.type));
          std::memcpy(reinterpret_cast<uint8_t*>(address) + i * bytes, &d.values[i], bytes);
        }
      }
      scopes_[scope_].symbols[d.name] = s;
    } while (skip(","));
    expect(";");
  }

  // (.param .u64 a, .param .u64 b): their places one after the other.
  void parameters(std::vector<Variable>& list, bool entry, uint64_t& used) {
    expect("(");
    while (!skip(")")) {
      std::string space = take();
      if (space != ".param" && space != ".reg") error(peek().line, "a parameter in " + space);
      Declaration d = declaration();
      Symbol s = {Symbol::kParameter};
      s.space = Space::param;
      s.variable = {0, d.size, d.align};
      uint64_t offset = place(used, d);
      s.variable.offset = entry ? offset : kFrameParam + offset;
      list.push_back(s.variable);
      scopes_[scope_].symbols[d.name] = s;
      skip(",");
    }
  }

  void function(bool entry) {
    scopes_.push_back({0, {}, {}});
    scope_ = static_cast<int>(scopes_.size()) - 1;
    auto owned = std::make_unique<Function>();
    function_ = owned.get();
    function_->entry = entry;
    // A kernel's own shared variables stand behind those of the module.
    if (entry) function_->shared_bytes = (module_->shared_bytes + 127) / 128 * 128;
    if (at("(")) parameters(function_->results, false, function_->frame_parameter_bytes);
    function_->name = take();
    if (at("(")) {
      parameters(function_->parameters, entry,
                 entry ? function_->parameter_bytes : function_->frame_parameter_bytes);
    }
    while (!at("{") && !at(";")) directive();
    function_->begin = static_cast<uint32_t>(module_->code.size());
    bool body = at("{");
    if (body) {
      ++here_;
      statements();
      Instruction end;
      end.words = {entry ? "exit" : "ret"};
      end.text = end.words[0];
      end.site = site_;
      decode(end);
      module_->code.push_back(end);
      resolve();
    } else {
      expect(";");
    }
    if (body || !module_->functions.count(function_->name)) {
      auto& slot = module_->functions[function_->name];
      if (slot == nullptr) {
        slot = std::move(owned);
      } else {
        *slot = std::move(*owned);  // declared before
      }
      if (!body) slot->begin = kAllLanes;
    }
    function_ = nullptr;
    scope_ = 0;
  }

  void directive() {
    std::string word = take();
    std::vector<int> numbers;
    while (is_number(peek().text)) {
      numbers.push_back(static_cast<int>(integer()));
      if (!skip(",")) break;
    }
    if (word == ".maxntid" || word == ".reqntid") {
      function_->max_threads = 1;
      for (int n : numbers) function_->max_threads *= n;
      function_->exact_threads = word == ".reqntid";
    } else if (word == ".reqnctapercluster") {
      for (size_t i = 0; i < 3; ++i) function_->cluster[i] = i < numbers.size() ? numbers[i] : 1;
    }
  }

  void statements() {
    int outer = scope_;
    while (!skip("}")) {
      std::string word = peek().text;
      if (word.empty()) error(peek().line, "a function without end");
      if (word == "{") {
        ++here_;
        scopes_.push_back({scope_, {}, {}});
        scope_ = static_cast<int>(scopes_.size()) - 1;
        statements();
        scope_ = outer;
      } else if (word == ".loc") {
        ++here_;
        location();
      } else if (word == ".reg") {
        ++here_;
        registers();
      } else if (word == ".local" || word == ".shared" || word == ".param" || word == ".global" ||
                 word == ".const") {
        ++here_;
        variable(word);
      } else if (word == ".pragma") {
        while (take() != ";") {
        }
      } else if (tokens_[here_ + 1].text == ":") {
        scopes_[scope_].labels[take()] = static_cast<uint32_t>(module_->code.size());
        ++here_;
        if (at(".branchtargets")) branch_targets();
      } else {
        instruction();
      }
    }
  }

  void registers() {
    std::string word = take();
    auto found = type_names().find(word.substr(1));
    if (found == type_names().end() || found->second == Type::b128)
      error(peek().line, "registers of type " + word);
    bool predicate = found->second == Type::pred;
    uint8_t cell = bytes_of(found->second) == 8 ? 8 : 4;
    auto add = [&](const std::string& name) {
      Symbol s = {predicate ? Symbol::kPredicate : Symbol::kRegister};
      s.cell = cell;
      if (predicate) {
        s.slot = function_->predicates++;
      } else {
        s.slot = function_->register_bytes;
        function_->register_bytes += uint32_t{cell} * kLanes;
      }
      scopes_[scope_].symbols[name] = s;
    };
    do {
      std::string name = take();
      if (skip("<")) {
        uint64_t count = integer();
        expect(">");
        for (uint64_t i = 0; i < count; ++i) add(name + std::to_string(i));
      } else {
        add(name);
      }
    } while (skip(","));
    expect(";");
  }

  void branch_targets() {
    ++here_;
    // The table is found again by the label before it.
    std::string name = tokens_[here_ - 3].text;
    do {
      targets_[name].push_back(take());
    } while (skip(","));
    expect(";");
  }

  Operand named(const std::string& word) {
    Operand o;
    o.name = word;
    const Symbol* symbol = lookup(word);
    if (symbol == nullptr) {
      static const std::vector<std::string> specials = {"%tid.x",
                                                        "%tid.y",
                                                        "%tid.z",
                                                        "%ntid.x",
                                                        "%ntid.y",
                                                        "%ntid.z",
                                                        "%ctaid.x",
                                                        "%ctaid.y",
                                                        "%ctaid.z",
                                                        "%nctaid.x",
                                                        "%nctaid.y",
                                                        "%nctaid.z",
                                                        "%laneid",
                                                        "%warpid",
                                                        "%nwarpid",
                                                        "%smid",
                                                        "%nsmid",
                                                        "%gridid",
                                                        "%lanemask_eq",
                                                        "%lanemask_le",
                                                        "%lanemask_lt",
                                                        "%lanemask_ge",
                                                        "%lanemask_gt",
                                                        "%clock",
                                                        "%clock64",
                                                        "%globaltimer",
                                                        "%clusterid.x",
                                                        "%clusterid.y",
                                                        "%clusterid.z",
                                                        "%nclusterid.x",
                                                        "%nclusterid.y",
                                                        "%nclusterid.z",
                                                        "%cluster_ctaid.x",
                                                        "%cluster_ctaid.y",
                                                        "%cluster_ctaid.z",
                                                        "%cluster_nctaid.x",
                                                        "%cluster_nctaid.y",
                                                        "%cluster_nctaid.z",
                                                        "%cluster_ctarank",
                                                        "%cluster_nctarank",
                                                        "%dynamic_smem_size",
                                                        "%total_smem_size",
                                                        "WARP_SZ",
                                                        "%clock_hi",
                                                        "%globaltimer_lo",
                                                        "%globaltimer_hi",
                                                        "%is_explicit_cluster"};
      auto found = std::find(specials.begin(), specials.end(), word);
      if (found != specials.end()) {
        o.kind = Operand::kSpecial;
        o.slot = static_cast<uint32_t>(found - specials.begin());
        return o;
      }
      if (word[0] == '%') error(peek().line, "unknown register " + word);
      o.kind = module_->functions.count(word) ? Operand::kFunction : Operand::kLabel;
      return o;
    }
    switch (symbol->kind) {
      case Symbol::kRegister:
        o.kind = Operand::kRegister;
        o.slot = symbol->slot;
        o.cell = symbol->cell;
        break;
      case Symbol::kPredicate:
        o.kind = Operand::kPredicate;
        o.slot = symbol->slot;
        break;
      default:
        o.kind = Operand::kImmediate;
        o.space = symbol->space;
        o.value = symbol->variable.offset;
        o.dynamic_shared = symbol->kind == Symbol::kDynamicShared;
    }
    return o;
  }

  Operand operand() {
    Operand o;
    if (skip("{")) {
      o.kind = Operand::kVector;
      while (!skip("}")) {
        o.elements.push_back(operand());
        skip(",");
      }
      return o;
    }
    if (skip("[")) {
      o = named_or_number();
      bool base = o.kind == Operand::kRegister;
      if (at("+") || at("-")) {
        bool negative = take() == "-";
        uint64_t offset = integer();
        // A register's own value field is free for the constant part.
        o.value += negative ? 0 - offset : offset;
      }
      o.kind = Operand::kAddress;
      o.has_base = base;
      // Tensor-map coordinates and the like are not known.
      if (!skip("]")) error(peek().line, "an address of a form that is not known");
      return o;
    }
    bool negate = skip("!");
    o = named_or_number();
    o.negate = negate;
    if (at("+") && o.kind == Operand::kImmediate) {
      ++here_;
      o.value += integer();
    }
    if (skip("|")) {
      Operand pair;
      pair.kind = Operand::kVector;
      pair.elements = {o, operand()};
      return pair;
    }
    return o;
  }

  Operand named_or_number() {
    Operand o;
    bool negative = skip("-");
    std::string word = take();
    if (word == "_") {
      o.kind = Operand::kSink;
      return o;
    }
    if (negative || is_number(word)) {
      o.kind = Operand::kImmediate;
      o.value = number(word, o.literal_bits);
      if (negative) {
        if (o.literal_bits == 0) o.value = 0 - o.value;
        if (o.literal_bits == 32) o.value ^= 0x80000000u;
        if (o.literal_bits == 64) o.value ^= uint64_t{1} << 63;
      }
      return o;
    }
    return named(word);
  }

  void instruction() {
    Instruction ins;
    size_t begin = peek().begin;
    int line = peek().line;
    if (skip("@")) {
      ins.guard_negate = skip("!");
      Operand guard = named(take());
      if (guard.kind != Operand::kPredicate) error(line, "a guard that is no predicate");
      ins.guarded = true;
      ins.guard = guard.slot;
    }
    std::string opcode = take();
    for (size_t i = 0; i <= opcode.size();) {
      size_t dot = std::min(opcode.find('.', i), opcode.size());
      ins.words.push_back(opcode.substr(i, dot - i));
      i = dot + 1;
    }
    ins.site = site_;
    uint32_t pc = static_cast<uint32_t>(module_->code.size());
    if (ins.words[0] == "call") {
      call(ins, pc);
    } else {
      while (!at(";")) {
        ins.operands.push_back(operand());
        if (!skip(",")) break;
      }
    }
    std::string text = text_.substr(begin, peek().begin - begin);
    for (char& c : text) {
      if (std::isspace(static_cast<unsigned char>(c))) c = ' ';
    }
    ins.text = text;
    expect(";");
    for (size_t i = 0; i < ins.operands.size(); ++i) {
      if (ins.operands[i].kind == Operand::kLabel) fixups_.push_back({pc, i, scope_, line});
    }
    decode(ins);
    module_->code.push_back(std::move(ins));
  }

  // call (results), name, (arguments);  one operand, which numbers the call.
  void call(Instruction& ins, uint32_t pc) {
    Call c;
    auto list = [&](std::vector<Variable>& variables) {
      expect("(");
      while (!skip(")")) {
        const Symbol* symbol = lookup(take());
        if (symbol == nullptr || symbol->kind != Symbol::kParameter)
          error(peek().line, "a call's argument that is no .param");
        variables.push_back(symbol->variable);
        skip(",");
      }
    };
    if (at("(")) {
      list(c.results);
      expect(",");
    }
    Operand o;
    o.kind = Operand::kFunction;
    o.name = take();
    if (o.name[0] == '%') error(peek().line, "a call through a pointer is not known");
    if (skip(",") && at("(")) list(c.arguments);
    o.value = module_->calls.size();
    module_->calls.push_back(c);
    ins.operands.push_back(o);
    calls_.push_back({pc, 0});
  }

  uint32_t label(const std::string& name, int scope, int line) {
    for (; scope >= 0; scope = scopes_[scope].parent) {
      auto found = scopes_[scope].labels.find(name);
      if (found != scopes_[scope].labels.end()) return found->second;
    }
    error(line, "unknown name " + name);
  }

  void resolve() {
    for (const Fixup& f : fixups_) {
      Operand& o = module_->code[f.pc].operands[f.operand];
      auto table = targets_.find(o.name);
      if (table == targets_.end()) {
        o.value = label(o.name, f.scope, f.line);
        continue;
      }
      o.kind = Operand::kVector;
      for (const std::string& name : table->second) {
        Operand target;
        target.kind = Operand::kLabel;
        target.value = label(name, f.scope, f.line);
        o.elements.push_back(target);
      }
    }
    fixups_.clear();
    targets_.clear();
    mark_unused();
    for (size_t pc = function_->begin; pc < module_->code.size(); ++pc)
      module_->code[pc].timing = timing_of(module_->code[pc], *function_, module_->timed);
  }

  // Registers of vector loads that stand nowhere else in the function.
  void mark_unused() {
    std::unordered_map<uint32_t, int> uses;
    auto count = [&](auto&& self, const Operand& o) -> void {
      if (o.kind == Operand::kRegister || (o.kind == Operand::kAddress && o.has_base))
        ++uses[o.slot];
      for (const Operand& e : o.elements) self(self, e);
    };
    for (size_t pc = function_->begin; pc < module_->code.size(); ++pc) {
      for (const Operand& o : module_->code[pc].operands) count(count, o);
    }
    for (size_t pc = function_->begin; pc < module_->code.size(); ++pc) {
      Instruction& ins = module_->code[pc];
      if (ins.words[0] != "ld" || ins.vector == 1) continue;
      for (size_t k = 0; k < ins.operands[0].elements.size(); ++k) {
        const Operand& e = ins.operands[0].elements[k];
        if (e.kind == Operand::kSink || (e.kind == Operand::kRegister && uses[e.slot] == 1))
          ins.unused |= static_cast<uint8_t>(1u << k);
      }
      if (ins.unused == (1u << ins.vector) - 1) ins.unused = 0;
    }
  }

  const std::string& text_;
  std::vector<Token> tokens_;
  std::unique_ptr<Module> module_;
  size_t here_ = 0;
  std::vector<Scope> scopes_;
  int scope_ = 0;
  Function* function_ = nullptr;
  bool external_ = false, kernel_seen_ = false;
  int site_ = -1;
  std::map<Place, int> latest_;
  std::vector<Fixup> fixups_;
  std::vector<std::pair<uint32_t, size_t>> calls_;
  std::map<std::string, std::vector<std::string>> targets_;
};

}  // namespace

int bytes_of(Type type) {
  switch (type) {
    case Type::b8:
    case Type::u8:
    case Type::s8: return 1;
    case Type::b16:
    case Type::u16:
    case Type::s16:
    case Type::f16:
    case Type::bf16: return 2;
    case Type::b64:
    case Type::u64:
    case Type::s64:
    case Type::f64:
    case Type::f32x2: return 8;
    case Type::b128: return 16;
    default: return 4;
  }
}

bool is_float(Type type) { return type >= Type::f16 && type <= Type::f64; }
bool is_signed(Type type) { return type >= Type::s8 && type <= Type::s64; }

std::unique_ptr<Module> parse(const std::string& text, const std::string& name) {
  return Parser(text, name).parse();
}

// The words that mean the same in every instruction; then the tables of executing functions.
void decode(Instruction& ins) {
  bool first = true;
  for (size_t i = 1; i < ins.words.size(); ++i) {
    const std::string& word = ins.words[i];
    auto type = type_names().find(word);
    if (type != type_names().end()) {
      (first ? ins.type : ins.from) = type->second;
      first = false;
    } else if (word == "ftz") {
      ins.ftz = true;
    } else if (word == "sat" || word == "satfinite") {
      ins.sat = true;
    } else if (word == "approx" || word == "full") {
      ins.approx = true;
    } else if (word == "NaN") {
      ins.nan = true;
    } else if (word == "v2" || word == "v4" || word == "v8") {
      ins.vector = static_cast<uint8_t>(word[1] - '0');
    } else if (word == "global" || word == "const") {
      ins.space = Space::global;
    } else if (word.compare(0, 6, "shared") == 0) {
      if (ins.space == Space::generic) ins.space = Space::shared;
    } else if (word == "local") {
      ins.space = Space::local;
    } else if (word.compare(0, 5, "param") == 0) {
      ins.space = Space::param;
    } else if (word.size() >= 2 && word[0] == 'r' &&
               std::string("nzmp").find(word[1]) != std::string::npos &&
               (word.size() == 2 || (word.size() == 3 && word[2] == 'i'))) {
      ins.rounding = static_cast<Rounding>(std::string("nzmp").find(word[1]));
      ins.integral = word.size() == 3;
    }
  }
  ins.semantics = semantics_of(ins);
  ins.run = memory_handler(ins);
  if (ins.run == nullptr) ins.run = synchronize_handler(ins);
  if (ins.run == nullptr) ins.run = arithmetic_handler(ins);
  // Unknown: an error once it is reached, which names it.
}

}  // namespace ptx
