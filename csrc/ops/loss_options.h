// The options of the distillation losses: one table, from which schemas, parsing, checks, error messages and the
// hand-over to others are made. kdkernels/distill says what each of them means.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <c10/core/Scalar.h>
#include <c10/util/SmallVector.h>

#include <functional>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "params.h"

namespace kdkernels {

enum class Reduction { kNone, kSum, kMean };
enum class TeacherKind { kLogits, kLogProbs, kProbs };
enum class Mixture { kProbs, kLogProbs };

// The arguments of a loss that are not tensors. The initial values are the defaults.
struct LossOptions {
  double temperature = 1;
  std::optional<double> alpha;  // 0.5 with labels, 1 without
  math::Divergence divergence = math::Divergence::kForwardKL;
  std::optional<double> divergence_alpha, beta;  // the divergence's own defaults
  Tail tail = Tail::kNone;
  TeacherKind teacher_kind = TeacherKind::kLogits;
  Mixture teacher_mixture = Mixture::kProbs;
  bool standardize = false;
  double logit_scale = 1;
  std::optional<double> soft_cap;
  double teacher_logit_scale = 1;
  std::optional<double> teacher_soft_cap;
  double label_smoothing = 0;
  int64_t ignore_index = -100;
  std::optional<double> num_items;
  Reduction reduction = Reduction::kMean;
  std::optional<int64_t> memory_budget;  // bytes
  std::optional<int64_t> max_rows;  // that count, at most
  // Columns of a vocabulary: [first_class, first_class + V) of all_classes; all_classes 0: it is whole.
  int64_t first_class = 0, all_classes = 0;
  int64_t top_k = 0;  // the student's largest logits that are wanted, a row
  c10::SmallVector<double, kMaxTeachers> teacher_weights;  // none: equal ones
};

// One option: its name in Python, where it is kept, and what it takes.
struct LossOption {
  using Member =
      std::variant<double LossOptions::*, std::optional<double> LossOptions::*, bool LossOptions::*,
                   int64_t LossOptions::*, std::optional<int64_t> LossOptions::*,
                   math::Divergence LossOptions::*, Tail LossOptions::*, TeacherKind LossOptions::*,
                   Mixture LossOptions::*, Reduction LossOptions::*>;
  const char* name;
  Member member;
  // Of a number: least <= x <= most, both left out where `open`.
  double least = 0, most = 0;
  bool open = false;
  const char* takes = "";  // in words, where that is not what the kind and the range say
  RowOption row_option =
      kRowOptions;  // what a tensor [*] of numbers is for; kRowOptions: it takes none
  bool is_public = true;  // an argument of the Python functions
};

const std::vector<LossOption>& loss_options();

// What a choice takes, in the order of its enum.
struct DivergenceEntry {
  const char* name;
  const char *formula, *source;
  std::optional<double> alpha,
      beta;  // defaults of divergence_alpha and beta; none: it has no such parameter
};
const std::vector<DivergenceEntry>& divergences();
// The names of a choice's values; empty where the option is none.
std::vector<std::string> choices_of(const LossOption& option);

// The options as a list that a schema has a type for (Scalar?[]): a number, an int, a bool, the place of a choice,
// none where None was given, in the table's order; then the teachers' weights.
using PackedOptions = c10::List<std::optional<at::Scalar>>;
PackedOptions pack(const LossOptions& options);
// The inverse, checked: ValueError for what is out of range. Without tensors, whose checks need more.
LossOptions unpack(const PackedOptions& packed);

// What numbers the option takes, in words.
std::string range_of(const LossOption& option, math::Divergence divergence);

// Raises unless the options fit each other and the number of teachers. `in_tensors`: row options given as tensors.
void check_options(const LossOptions& options, bool has_labels, size_t teachers,
                   const std::vector<bool>& in_tensors);
// What the kernels take: alpha, and the divergence with its parameters, with all defaults filled in. `in_tensors`
// as above: where a parameter differs from row to row, rows find their exact limits themselves.
double alpha_of(const LossOptions& options, bool has_labels);
void set_divergence(const LossOptions& options, LossParams& params);
std::vector<double> shares_of(const LossOptions& options, size_t teachers);  // sum 1

}  // namespace kdkernels
