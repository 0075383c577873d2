"""Faults in the rest of csrc."""

from mutants.fault import Fault

DISTILLATION = "tests/test_distillation.py"
DIVERGENCES = "tests/test_divergences.py"
NOISE = "tests/test_noise.py"
OPTIM = "tests/test_optim.py"
LINEAR = "tests/test_linear.py"

CPU = [
    Fault(
        "smoothing-with-the-wrong-sign",
        "csrc/math/distillation.h",
        "cross_entropy -= smoothing * inv_classes * sums.sum_z;",
        "cross_entropy += smoothing * inv_classes * sums.sum_z;",
        DISTILLATION + " -k test_fp32_against_fp64",
    ),
    Fault(
        "js-shares-confused",
        "csrc/math/divergence.h",
        "Real larger = p_larger ? x.p : x.q, s = p_larger ? rest : beta;",
        "Real larger = p_larger ? x.p : x.q, s = p_larger ? beta : rest;",
        DIVERGENCES + " -k 'everything and js'",
    ),
    Fault(
        "class-without-probability",
        "csrc/math/divergence.h",
        "return select(a == F(0), b, y);",
        "return y;",
        f"{DISTILLATION} {DIVERGENCES} -k 'classes_without or excluded_classes'",
    ),
    Fault(
        "bucket-of-no-class",
        "csrc/math/row.h",
        "bool any = x.part_p < 1 && x.entry_count < task.all_classes;",
        "bool any = x.part_p < 1;",
        DIVERGENCES,
    ),
    Fault(
        "equal-logits-have-a-spread",
        "csrc/math/row.h",
        "bool flat = variance <= 1e-14 * mean * mean || variance == 0;",
        "bool flat = variance == 0;",
        DIVERGENCES + " -k equal_logits",
    ),
    Fault(
        "philox-key-bump",
        "csrc/math/philox.h",
        "kPhiloxBump1 = 0xBB67AE85u",
        "kPhiloxBump1 = 0xBB67AE86u",
        NOISE + " -k sha256",
    ),
    Fault(
        "laplace-scale-off-by-an-ulp",
        "csrc/math/distribution.h",
        "-0x1.6a09e6p-1f * log_normal(u)",
        "-0x1.6a09e8p-1f * log_normal(u)",
        NOISE + " -k sha256",
    ),
    Fault(
        "adamw-second-correction-a-step-late",
        "csrc/math/update.h",
        "n.root = static_cast<Real>(1 / sqrt(1 - power(r.beta2, step)));",
        "n.root = static_cast<Real>(1 / sqrt(1 - power(r.beta2, step + 1)));",
        OPTIM + " -k equals_torch",
    ),
    Fault(
        "sgd-dampens-its-first-step",
        "csrc/math/update.h",
        "n.take1 = static_cast<Real>(first ? 1 : 1 - r.dampening);",
        "n.take1 = static_cast<Real>(1 - r.dampening);",
        OPTIM + " -k equals_torch",
    ),
    Fault(
        "regression-decays-twice",
        "csrc/math/regression.h",
        "return theta - lr * fma(lam, theta, gradient);",
        "return theta - lr * fma(2.0 * lam, theta, gradient);",
        "tests/test_regression.py -k 'one_replica or ridge'",
    ),
    Fault(
        "last-class-without-gradient",
        "csrc/cpu/distillation.h",
        """if (whole < classes) {
    store_part(make(whole)""",
        """if (whole + 1 < classes) {
    store_part(make(whole)""",
        DISTILLATION + " -k against_fp64",
    ),
    Fault(
        "row-weight-ignored",
        "csrc/cpu/distillation.h",
        "row_loss[row] = weight * result.loss;",
        "row_loss[row] = result.loss;",
        DISTILLATION + " -k against_fp64",
    ),
    Fault(
        "ignored-rows-keep-their-gradient",
        "csrc/cpu/distillation.h",
        "      if (keep) std::memset(static_cast<void*>(gradient), 0, p.classes * sizeof(T));\n",
        "",
        DISTILLATION + " -k 'against_fp64 or ignored or left_out'",
    ),
    Fault(
        "entries-counted-twice",
        "csrc/cpu/divergence.h",
        "      if (column[k] >= 0) u[column[k]] = -kInfinity<Real>;\n",
        "",
        DIVERGENCES + " -k everything",
    ),
    Fault(
        "slice-forgets-its-first-class",
        "csrc/cpu/divergence.h",
        "label_here = label - p.first_class;",
        "label_here = label;",
        LINEAR + " -k ranks",
    ),
    Fault(
        "block-across-a-counters-high-word",
        "csrc/cpu/noise.h",
        "    most = most < shared ? most : shared;\n",
        "",
        NOISE + " -k 'numpys or address or shard'",
    ),
    Fault(
        "counters-in-32-bits",
        "csrc/cpu/noise.h",
        "static_cast<uint32_t>(first >> 32), stream.key.stream",
        "0, stream.key.stream",
        NOISE + " -k 'sha256 or address'",
    ),
    Fault(
        "rows-in-32-bits-on-the-host",
        "csrc/cpu/distillation.h",
        "const T* z = static_cast<const T*>(p.student) + row * p.student_stride;",
        "const T* z = static_cast<const T*>(p.student) + static_cast<int>(row * p.student_stride);",
        DISTILLATION + " -k beyond_2_to_the_31",
    ),
    Fault(
        "seeds-in-32-bits",
        "csrc/cpu/noise.h",
        "key.seed_high = static_cast<uint32_t>(seed >> 32);",
        "key.seed_high = 0;",
        NOISE + " -k combine",
    ),
    Fault(
        "one-step-for-a-tile-of-them",
        "csrc/cpu/regression.h",
        "key.step + static_cast<uint32_t>(j)",
        "key.step",
        "tests/test_regression.py -k one_replica",
    ),
    Fault(
        "gradients-stay-scaled",
        "csrc/cpu/update.h",
        "    for (int j = 0; j < count; ++j) narrow(scaled[j], grad[j]);\n",
        "",
        OPTIM + " -k 'unscaled or scaler'",
    ),
    Fault(
        "two-empty-tensors-in-a-list",
        "csrc/cpu/dispatch.cpp",
        "while (chunk >= first_chunk[t + 1]) ++t;",
        "if (chunk >= first_chunk[t + 1]) ++t;",
        NOISE + " -k 'list or mixed'",
    ),
    Fault(
        "found-inf-on-the-host",
        "csrc/cpu/dispatch.cpp",
        "skip ? 0 : p.count",
        "p.count",
        OPTIM + " -k scaler",
    ),
    Fault(
        "team-in-a-forked-child",
        "csrc/cpu/parallel.h",
        "if (parts <= 1 || forked || omp_in_parallel()) {",
        "if (parts <= 1 || omp_in_parallel()) {",
        "tests/test_threads.py -k forked",
    ),
    Fault(
        "last-piece-beyond-the-end",
        "csrc/cpu/parallel.h",
        "f(begin, std::min(begin + piece, n));",
        "f(begin, begin + piece);",
        "tests/test_threads.py -k any_number_of_threads",
    ),
]

OPS = [
    Fault(
        "chunks-overwrite-the-heads-gradient",
        "csrc/ops/linear_distillation.cpp",
        "head.weight_gradient(loss.gradient, h, from == 0 ? 0 : 1, alpha, out.head);",
        "head.weight_gradient(loss.gradient, h, 0, alpha, out.head);",
        LINEAR + " -k 'any_teacher or blocks'",
    ),
    Fault(
        "rows-left-out-without-gradient",
        "csrc/ops/linear_distillation.cpp",
        "  if (out.hidden.defined() && rows.index.defined()) out.hidden.zero_();\n",
        "",
        LINEAR + " -k 'left_out or any_teacher'",
    ),
    Fault(
        "weights-of-0-multiplied-all-the-same",
        "csrc/ops/linear_distillation.cpp",
        "if (w != 0) kept.push_back(i);",
        "kept.push_back(i);",
        LINEAR + " -k left_out",
    ),
    Fault(
        "default-beta",
        "csrc/ops/loss_options.cpp",
        '"GKD, arXiv 2306.13649", kNone, 0.5}',
        '"GKD, arXiv 2306.13649", kNone, 0.4}',
        DIVERGENCES + " -k papers",
    ),
    Fault(
        "strides-confused",
        "csrc/ops/loss_launch.cpp",
        "} else if (logits.stride(d) != stride * rows) {",
        "} else if (logits.stride(d) < stride * rows) {",
        f"{DISTILLATION} {DIVERGENCES} -k 'layout or everything or against'",
    ),
    Fault(
        "labels-of-no-class",
        "csrc/ops/loss_checks.cpp",
        "uint64_t(x) < uint64_t(classes)",
        "uint64_t(x) <= uint64_t(classes)",
        f"{DISTILLATION} -k 'out_of_range or bad_argument'",
    ),
    Fault(
        "classes-twice-in-a-row",
        "csrc/ops/loss_checks.cpp",
        "      seen[at / 64] |= bit;\n",
        "",
        DIVERGENCES + " -k bad_argument",
    ),
    Fault(
        "fp16-gradient-scaled-for-good",
        "csrc/ops/distillation.cpp",
        "holder->scale = gradient_scale(call);",
        "holder->scale = 1;",
        DISTILLATION + " -k 'fp16 or 16_bits'",
    ),
    Fault(
        "inplace-over-a-shifted-teacher",
        "csrc/ops/loss_checks.cpp",
        "at::get_overlap_status(student, teacher) != at::MemOverlapStatus::Partial",
        "at::get_overlap_status(student, teacher) != at::MemOverlapStatus::TooHard",
        DISTILLATION + " -k 'overlaps'",
    ),
    Fault(
        "step-moves-on-before-backward",
        "csrc/ops/noise_autograd.cpp",
        "return tensor.has_value() ? tensor->clone() : Tensor();",
        "return tensor.has_value() ? *tensor : Tensor();",
        NOISE + " -k step_tensor",
    ),
    Fault(
        "autograd-does-not-see-the-write",
        "csrc/ops/tensor_lists.cpp",
        "if (!w.tensor->is_inference()) w.tensor->unsafeGetTensorImpl()->bump_version();",
        "(void)w;",
        NOISE + " -k version",
    ),
    Fault(
        "tensors-that-share-memory",
        "csrc/ops/tensor_lists.cpp",
        "sorted[j]->begin < sorted[i]->end;",
        "sorted[j]->begin < sorted[i]->begin;",
        NOISE + " -k share_memory",
    ),
    Fault(
        "std-varies-in-two-blocks",
        "csrc/ops/noise_kernels.cpp",
        "    one_block &= !(varies && ended);\n",
        "    one_block &= true;\n",
        NOISE + " -k 'any_shape or every_way'",
    ),
    Fault(
        "moments-that-a-rule-needs",
        "csrc/math/update.h",
        "{ return u == Update::kAdamW || u == Update::kPsgld; }",
        "{ return u == Update::kAdamW; }",
        "tests/test_ops_integration.py -k opcheck",
    ),
    Fault(
        "interpreter-held-by-a-kernel",
        "csrc/bindings.cpp",
        "      py::gil_scoped_release no_gil;\n",
        "",
        "tests/test_threads.py -k interpreter",
    ),
]

FAULTS = CPU + OPS
