#include "ops/loss_options.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>

#include "row_task.h"

namespace kdkernels {
namespace {

using math::Divergence;
constexpr double kAny = kLargestNumber;

template <class... F>
struct Overloaded : F... {
  using F::operator()...;
};

// The names of an enum's values, in its order.
template <class Enum>
std::vector<std::string> names_of(Enum);
template <>
std::vector<std::string> names_of(Tail) {
  return {"none", "renormalize", "bucket", "ignore"};
}
template <>
std::vector<std::string> names_of(TeacherKind) {
  return {"logits", "log_probs", "probs"};
}
template <>
std::vector<std::string> names_of(Mixture) {
  return {"probs", "log_probs"};
}
template <>
std::vector<std::string> names_of(Reduction) {
  return {"none", "sum", "mean"};
}
template <>
std::vector<std::string> names_of(Divergence) {
  std::vector<std::string> out;
  for (const DivergenceEntry& entry : divergences()) out.push_back(entry.name);
  return out;
}

void check_range(const LossOption& option, double value, Divergence divergence) {
  bool fits = option.open ? value > option.least && value < option.most
                          : value >= option.least && value <= option.most;
  TORCH_CHECK_VALUE(fits && std::isfinite(value), option.name, " is ", value, "; it takes ",
                    range_of(option, divergence));
}

const DivergenceEntry& entry_of(Divergence divergence) {
  return divergences()[static_cast<size_t>(divergence)];
}

}  // namespace

std::string range_of(const LossOption& option, Divergence divergence) {
  if (*option.takes != 0) return option.takes;
  if (option.open) return "a finite number above 0";
  bool parameter = option.row_option == kDivergenceAlpha || option.row_option == kBeta;
  double most = parameter ? math::largest_parameter(divergence) : option.most;
  return most == 1 ? "a number in [0, 1]" : "a finite number of at least 0";
}

const std::vector<LossOption>& loss_options() {
  using O = LossOptions;
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  static const std::vector<LossOption> table = {
      {"temperature", &O::temperature, kLeastTemperature, kLargestTemperature, false,
       "a number above 0 (from 1e-15 to 1e15)", kTemperature},
      {"alpha", &O::alpha, 0, 1, false, "", kAlpha},
      {"divergence", &O::divergence},
      {"divergence_alpha", &O::divergence_alpha, 0, kAny, false, "", kDivergenceAlpha},
      {"beta", &O::beta, 0, kAny, false, "", kBeta},
      {"tail", &O::tail},
      {"teacher_kind", &O::teacher_kind},
      {"teacher_mixture", &O::teacher_mixture},
      {"standardize", &O::standardize},
      {"logit_scale", &O::logit_scale, 0, kInfinity, true, "", kLogitScale},
      {"soft_cap", &O::soft_cap, 0, kInfinity, true, "", kSoftCap},
      {"teacher_logit_scale", &O::teacher_logit_scale, 0, kInfinity, true, "", kTeacherLogitScale},
      {"teacher_soft_cap", &O::teacher_soft_cap, 0, kInfinity, true, "", kTeacherSoftCap},
      {"label_smoothing", &O::label_smoothing, 0, 1},
      {"ignore_index", &O::ignore_index},
      {"num_items", &O::num_items, 0, kInfinity, true},
      {"reduction", &O::reduction},
      {"memory_budget", &O::memory_budget, 1, kAny, false, "a number of bytes above 0"},
      {"max_rows", &O::max_rows, 1, kAny, false, "a number of rows above 0"},
      {"first_class", &O::first_class, 0, 0, false, "", kRowOptions, false},
      {"all_classes", &O::all_classes, 0, 0, false, "", kRowOptions, false},
      {"top_k", &O::top_k, 0, 0, false, "", kRowOptions, false},
  };
  return table;
}

const std::vector<DivergenceEntry>& divergences() {
  constexpr std::nullopt_t kNone = std::nullopt;
  // In the order of math::Divergence.
  static const std::vector<DivergenceEntry> table = {
      {"forward_kl", "sum p (log p - log q)", "Hinton, Vinyals and Dean, arXiv 1503.02531", kNone,
       kNone},
      {"reverse_kl", "sum q (log q - log p)", "MiniLLM, arXiv 2306.08543", kNone, kNone},
      {"js",
       "beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; "
       "beta 0 is forward_kl, beta 1 is reverse_kl",
       "GKD, arXiv 2306.13649", kNone, 0.5},
      {"skew_forward_kl", "KL(p || beta p + (1 - beta) q)", "DistiLLM, arXiv 2402.03898", kNone,
       0.1},
      {"skew_reverse_kl", "KL(q || beta q + (1 - beta) p)", "DistiLLM, arXiv 2402.03898", kNone,
       0.1},
      {"total_variation", "1/2 sum |p - q|", "f-distill, arXiv 2307.15190", kNone, kNone},
      {"alpha_beta",
       "-1/(a b) sum (p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)), a = divergence_alpha, "
       "b = beta, continued to a = 0 or b = 0; (1, 0) is forward_kl, (0, 1) is reverse_kl",
       "ABKD, arXiv 2505.04560", 0.2, 0.7},
      {"decoupled",
       "divergence_alpha KL(b_t || b_s) + beta KL(p' || q'), b = (probability of the label, of "
       "all others), p' and q' the distributions over the others",
       "DKD, arXiv 2203.08679, equation 7", 1.0, 8.0},
  };
  return table;
}

std::vector<std::string> choices_of(const LossOption& option) {
  return std::visit([](auto member) -> std::vector<std::string> {
    using Value = std::decay_t<decltype(std::declval<LossOptions&>().*member)>;
    if constexpr (std::is_enum_v<Value>) return names_of(Value{});
    return {};
  }, option.member);
}

PackedOptions pack(const LossOptions& options) {
  PackedOptions out;
  out.reserve(loss_options().size() + options.teacher_weights.size());
  for (const LossOption& option : loss_options()) {
    std::visit([&](auto member) {
      const auto& value = options.*member;
      using Value = std::decay_t<decltype(value)>;
      if constexpr (std::is_enum_v<Value>) {
        out.push_back(at::Scalar(static_cast<int64_t>(value)));
      } else if constexpr (std::is_arithmetic_v<Value>) {
        out.push_back(at::Scalar(value));
      } else {
        out.push_back(value.has_value() ? std::optional(at::Scalar(*value)) : std::nullopt);
      }
    }, option.member);
  }
  for (double weight : options.teacher_weights) out.push_back(at::Scalar(weight));
  return out;
}

LossOptions unpack(const PackedOptions& packed) {
  LossOptions out;
  size_t place = 0;
  for (const LossOption& option : loss_options()) {
    if (place >= packed.size()) break;
    std::optional<at::Scalar> value = packed.get(place++);
    if (!value.has_value()) continue;
    std::visit(
        Overloaded{
            [&](double LossOptions::* m) {
      check_range(option, out.*m = value->toDouble(), out.divergence);
    },
            [&](std::optional<double> LossOptions::* m) {
      out.*m = value->toDouble();
      check_range(option, *(out.*m), out.divergence);
    },
            [&](std::optional<int64_t> LossOptions::* m) {
      out.*m = value->toLong();
      check_range(option, static_cast<double>(*(out.*m)), out.divergence);
    },
            [&](int64_t LossOptions::* m) { out.*m = value->toLong(); },
            [&](bool LossOptions::* m) { out.*m = value->toBool(); },
            [&](auto m) { out.*m = static_cast<std::decay_t<decltype(out.*m)>>(value->toLong()); },
        },
        option.member);
  }
  for (; place < packed.size(); ++place) {
    out.teacher_weights.push_back(packed.get(place)->toDouble());
  }
  return out;
}

// ---- what must fit each other -------------------------------------------------------------------

namespace {

void check_parameter(const LossOptions& o, const char* name, std::optional<double> given,
                     bool in_tensor, std::optional<double> usual) {
  if (!given.has_value() && !in_tensor) return;
  const DivergenceEntry& entry = entry_of(o.divergence);
  TORCH_CHECK_VALUE(usual.has_value(), name, " is ",
                    in_tensor ? std::string("a tensor") : c10::str(*given), ", but divergence \"",
                    entry.name, "\" has no such parameter");
  double largest = math::largest_parameter(o.divergence);
  TORCH_CHECK_VALUE(in_tensor || *given <= largest, name, " is ", given.value_or(0),
                    "; divergence \"", entry.name, "\" takes a number in [0, 1]");
}

void check_divergence(const LossOptions& o, const std::vector<bool>& in_tensors) {
  const DivergenceEntry& entry = entry_of(o.divergence);
  bool alpha = in_tensors[kDivergenceAlpha], beta = in_tensors[kBeta];
  check_parameter(o, "divergence_alpha", o.divergence_alpha, alpha, entry.alpha);
  check_parameter(o, "beta", o.beta, beta, entry.beta);
  TORCH_CHECK_VALUE(o.divergence != Divergence::kAlphaBeta || alpha || beta ||
                        o.divergence_alpha.value_or(*entry.alpha) > 0 ||
                        o.beta.value_or(*entry.beta) > 0,
                    "divergence_alpha and beta are both 0; divergence \"alpha_beta\" takes at "
                    "least one above 0");
}

void check_teacher_weights(const LossOptions& o, size_t teachers) {
  TORCH_CHECK_VALUE(teachers >= 1 && teachers <= kMaxTeachers, "teacher_logits holds ", teachers,
                    " teachers; it takes from 1 to ", kMaxTeachers);
  if (o.teacher_weights.empty()) return;
  TORCH_CHECK_VALUE(o.teacher_weights.size() == teachers, "teacher_weights holds ",
                    o.teacher_weights.size(), " numbers for ", teachers,
                    teachers == 1 ? " teacher" : " teachers");
  double total = 0;
  for (double w : o.teacher_weights) {
    TORCH_CHECK_VALUE(std::isfinite(w) && w >= 0, "teacher_weights holds ", w,
                      "; it takes finite numbers of at least 0");
    total += w;
  }
  TORCH_CHECK_VALUE(total > 0, "teacher_weights are all 0");
}

}  // namespace

void check_options(const LossOptions& o, bool has_labels, size_t teachers,
                   const std::vector<bool>& in_tensors) {
  check_divergence(o, in_tensors);
  TORCH_CHECK_VALUE(has_labels || (o.alpha.value_or(1) == 1 && !in_tensors[kAlpha]), "alpha is ",
                    in_tensors[kAlpha] ? std::string("a tensor") : c10::str(*o.alpha),
                    " without labels; cross-entropy's share 1 - alpha needs them");
  TORCH_CHECK_VALUE(has_labels || o.divergence != Divergence::kDecoupled,
                    "labels is None; divergence \"decoupled\" needs them");
  bool logits = o.teacher_kind == TeacherKind::kLogits && o.tail == Tail::kNone;
  TORCH_CHECK_VALUE(logits || (o.teacher_logit_scale == 1 && !in_tensors[kTeacherLogitScale]),
                    "teacher_logit_scale goes with teacher_kind=\"logits\" only");
  TORCH_CHECK_VALUE(logits || (!o.teacher_soft_cap.has_value() && !in_tensors[kTeacherSoftCap]),
                    "teacher_soft_cap goes with teacher_kind=\"logits\" only");
  TORCH_CHECK_VALUE(!o.num_items.has_value() || o.reduction == Reduction::kMean,
                    "num_items goes with reduction=\"mean\" only, not \"",
                    names_of(o.reduction)[static_cast<size_t>(o.reduction)], "\"");
  check_teacher_weights(o, teachers);
}

double alpha_of(const LossOptions& o, bool has_labels) {
  return o.alpha.value_or(has_labels ? 0.5 : 1.0);
}

void set_divergence(const LossOptions& o, LossParams& p) {
  const DivergenceEntry& entry = entry_of(o.divergence);
  double alpha = o.divergence_alpha.value_or(entry.alpha.value_or(0));
  double beta = o.beta.value_or(entry.beta.value_or(0));
  set_divergence(o.divergence, alpha, beta, p);
  // Each row finds its own limits.
  bool per_row = p.row_options[kDivergenceAlpha] != nullptr || p.row_options[kBeta] != nullptr;
  if (per_row) p.divergence = o.divergence;
}

std::vector<double> shares_of(const LossOptions& o, size_t teachers) {
  std::vector<double> out(o.teacher_weights.begin(), o.teacher_weights.end());
  if (out.empty()) out.assign(teachers, 1.0);
  double total = 0;
  for (double w : out) total += w;
  for (double& w : out) w /= total;
  return out;
}

}  // namespace kdkernels
