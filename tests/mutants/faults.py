"""Small faults that tests must notice: what to replace, with what, and which tests see it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One fault.

    name: for the command line; file: where; text: what stands there exactly once; instead: the
    fault; tests: pytest's arguments; no_fault: why nothing can notice, where nothing can.
    """

    name: str
    file: str
    text: str
    instead: str
    tests: str
    no_fault: str = ""


LAUNCHERS = "tests/test_launchers.py -k "

CUDA = [
    Fault(
        "tile-barrier-after-copy",
        "csrc/cuda/short_rows.cuh",
        """t_image[i] = t_tile[row * p.teacher_strides[0] + column];
      }
    }
    __syncthreads();
""",
        """t_image[i] = t_tile[row * p.teacher_strides[0] + column];
      }
    }
""",
        LAUNCHERS + "distillation-",
    ),
    Fault(
        "tile-label-read-after-write",
        "csrc/cuda/short_rows.cuh",
        "      __syncwarp();  // all lanes have read the label's logit\n",
        "",
        LAUNCHERS + "distillation-",
    ),
    Fault(
        "tile-one-row-more",
        "csrc/cuda/short_rows.cuh",
        "const bool live = in_tile < rows;",
        "const bool live = in_tile <= rows;",
        LAUNCHERS + "distillation-",
    ),
    Fault(
        "warp-last-slot-skipped",
        "csrc/cuda/short_rows.cuh",
        "const int slots = (span.body + kWarp - 1) / kWarp;",
        "const int slots = span.body / kWarp;",
        LAUNCHERS + "distillation-",
    ),
    Fault(
        "warp-no-room-for-the-skew",
        "csrc/cuda/short_rows.cuh",
        "if (span.body > kSlots * kWarp) {",
        "if (span.body > kSlots * kWarp + 1) {",
        LAUNCHERS + "'distillation- and -1024]'",
    ),
    Fault(
        "cluster-leaves-before-its-peers",
        "csrc/cuda/long_rows.cuh",
        """    if (!arrived) cluster_arrive();
    cluster_wait();
  }
}
""",
        """    if (arrived) cluster_wait();
  }
}
""",
        LAUNCHERS + "more_rows_than_blocks",
    ),
    Fault(
        "parts-have-one-turn",
        "csrc/cuda/long_rows.cuh",
        "    turn ^= 1;\n",
        "",
        LAUNCHERS + "more_rows_than_blocks",
    ),
    Fault(
        "teachers-sum-by-the-students-error",
        "csrc/cuda/long_rows.cuh",
        "sums.sum_t = math::fma(of_t, part.sum_t, sums.sum_t);",
        "sums.sum_t = math::fma(of_s, part.sum_t, sums.sum_t);",
        LAUNCHERS + "'distillation- and -1100]'",
    ),
    Fault(
        "students-shift-error-left-out-of-the-sums",
        "csrc/cuda/long_rows.cuh",
        "float of_s = shifts.s.factor(), of_t = shifts.t.factor();",
        "float of_s = 1.0f, of_t = shifts.t.factor();",
        LAUNCHERS + "'distillation- and -1100]'",
    ),
    Fault(
        "teachers-shift-error-left-out-of-the-term",
        "csrc/cuda/long_rows.cuh",
        "Policy::moved(part, shifts.s.error, shifts.t.error, of_s, of_t)",
        "Policy::moved(part, shifts.s.error, 0.0f, of_s, of_t)",
        LAUNCHERS + "'distillation- and -1100]'",
    ),
    Fault(
        "teachers-shift-error-left-out-of-the-gradient",
        "csrc/cuda/long_rows.cuh",
        "const Real of_ey = result.of_ey * shifts.t.factor();",
        "const Real of_ey = result.of_ey;",
        LAUNCHERS + "'distillation- and -1100]'",
    ),
    Fault(
        "held-waits-for-an-older-copy",
        "csrc/cuda/long_rows.cuh",
        "if (g == kGroups - 2) wait_copies<1>();",
        "if (g == kGroups - 2) wait_copies<2>();",
        LAUNCHERS + "distillation-",
    ),
    Fault(
        "held-last-slot-skipped",
        "csrc/cuda/long_rows.cuh",
        "const int from = max(skip, g * group_slots), to = min(slots, (g + 1) * group_slots);",
        "const int from = max(skip, g * group_slots), to = min(slots - 1, (g + 1) * group_slots);",
        LAUNCHERS + "distillation-",
    ),
    Fault(
        "peers-first-bytes-four-times",
        "csrc/cuda/device.cuh",
        '"r"(address + 16 * i)',
        '"r"(address)',
        LAUNCHERS + "'distillation- and -128256]'",
    ),
    Fault(
        "reduction-barrier",
        "csrc/cuda/device.cuh",
        """shared[v * kWarps + warp] = value[v];
    }
    __syncthreads();
""",
        """shared[v * kWarps + warp] = value[v];
    }
""",
        LAUNCHERS + "distillation-",
    ),
    Fault(
        "absent-logits-are-0",
        "csrc/cuda/device.cuh",
        "narrow(-INFINITY, x.value[j]);",
        "narrow(0.0f, x.value[j]);",
        LAUNCHERS + "distillation-",
    ),
    Fault(
        "scale-rows-of-any-number",
        "csrc/cuda/distillation.cu",
        "std::min<int64_t>(32768, flat.rows)",
        "std::min<int64_t>(flat.rows, flat.rows)",
        LAUNCHERS + "scale_rows-",
    ),
    Fault(
        "mean-counts-ignored-rows",
        "csrc/cuda/distillation.cu",
        "return ignored ? 0.0 : static_cast<double>(weight);",
        "return static_cast<double>(weight);",
        LAUNCHERS + "distillation-",
    ),
    Fault(
        "sums-of-weights-not-inverted",
        "csrc/cuda/distillation.cu",
        "  if (blocks > 1) inverse_kernel<<<1, kSumThreads, 0, stream>>>(weights, blocks, inverse);\n",
        "",
        LAUNCHERS + "'distillation- and -5]'",
    ),
    Fault(
        "near-rows-over-the-others-sums",
        "csrc/cuda/distillation.cu",
        "p.loss != nullptr ? partial + count : nullptr",
        "p.loss != nullptr ? partial : nullptr",
        LAUNCHERS + "distillation-",
    ),
    Fault(
        "divergence-barrier-between-rows",
        "csrc/cuda/divergence.cu",
        "      __syncthreads();  // the last row no longer needs what is shared\n",
        "",
        LAUNCHERS + "divergence-",
    ),
    Fault(
        "divergence-weight-ignored",
        "csrc/cuda/divergence.cuh",
        "emit(weight() * g.loss);",
        "emit(g.loss);",
        LAUNCHERS + "divergence-",
    ),
    Fault(
        "divergence-chunk-overwritten",
        "csrc/cuda/divergence.cuh",
        "    __syncthreads();  // the last chunk is no longer needed\n",
        "",
        LAUNCHERS + "'divergence- and -200000]'",
    ),
    Fault(
        "divergence-index-unchecked",
        "csrc/cuda/divergence.cuh",
        "bad |= at < -1 || at >= p.all_classes;",
        "bad |= at < -1;",
        LAUNCHERS + "divergence-",
    ),
    Fault(
        "divergence-last-of-equal-logits",
        "csrc/cuda/divergence.cuh",
        "at_s = u > acc[0] ? lane.first + i : at_s;",
        "at_s = u >= acc[0] ? lane.first + i : at_s;",
        LAUNCHERS + "divergence-",
    ),
    Fault(
        "counters-high-word",
        "csrc/cuda/elements.cuh",
        "    if (counter_at(begin) >> 32 != counter_at(chunk_steps) >> 32) end = 0;\n",
        "",
        LAUNCHERS + "noise-",
    ),
    Fault(
        "staged-numbers-overwritten",
        "csrc/cuda/elements.cuh",
        """if (i >= 0 && i < numel) use(i, warp[j]);
    }
    __syncwarp();
""",
        """if (i >= 0 && i < numel) use(i, warp[j]);
    }
""",
        LAUNCHERS + "noise-",
    ),
    Fault(
        "last-tensors-last-chunk",
        "csrc/cuda/elements.cuh",
        "totals.first_chunk[tensors] = static_cast<uint32_t>(chunks);",
        "totals.first_chunk[tensors] = static_cast<uint32_t>(chunks - 1);",
        LAUNCHERS + "noise_dot-",
    ),
    Fault(
        "std-pattern-without-carry",
        "csrc/cuda/noise.cu",
        "place += place_step + carry;",
        "place += place_step;",
        LAUNCHERS + "noise-",
    ),
    Fault(
        "seeds-staged-too-early",
        "csrc/cuda/noise.cu",
        """const int lane = static_cast<int>(threadIdx.x) % kWarp;
    __syncwarp();
    if (lane < kTermsStaged""",
        """const int lane = static_cast<int>(threadIdx.x) % kWarp;
    if (lane < kTermsStaged""",
        LAUNCHERS + "combine-",
    ),
    Fault(
        "found-inf-passed-over",
        "csrc/cuda/update.cu",
        "  if (list.found_inf != nullptr && *list.found_inf != 0) return;\n",
        "",
        LAUNCHERS + "update-",
    ),
    Fault(
        "unscaled-gradient-not-kept",
        "csrc/cuda/update.cu",
        """g /= scale;
        narrow(g, grads[i]);
""",
        """g /= scale;
""",
        LAUNCHERS + "update-",
    ),
    Fault(
        "steps-that-differ-share-numbers",
        "csrc/cuda/update.cu",
        """bool known = slot >= 0 &&
                   (device || step_of(p.tensors[owner[static_cast<size_t>(slot)]]) == step_of(x));""",
        "bool known = slot >= 0;",
        LAUNCHERS + "update-",
    ),
    Fault(
        "means-overwritten",
        "csrc/cuda/regression.cu",
        """path = lane == j ? replica.theta : path;
      }
      __syncwarp();
""",
        """path = lane == j ? replica.theta : path;
      }
""",
        LAUNCHERS + "noisy_linear_regression-",
    ),
    Fault(
        "paths-overwritten",
        "csrc/cuda/regression.cu",
        """p.trajectory[(first + 1 + row) * p.replicas + begin + column] = paths[row][column];
      __syncthreads();
""",
        """p.trajectory[(first + 1 + row) * p.replicas + begin + column] = paths[row][column];
""",
        LAUNCHERS + "noisy_linear_regression-",
    ),
    Fault(
        "noise-of-absent-samples",
        "csrc/cuda/regression.cu",
        "    if (i + j >= p.samples) continue;\n",
        "",
        LAUNCHERS + "noisy_linear_regression-",
    ),
    Fault(
        "held-plan-without-the-tail",
        "csrc/cuda/plan.h",
        "int64_t vectors = classes / (16 / element_size) + 1;",
        "int64_t vectors = classes / (16 / element_size);",
        "tests/test_plan.py",
    ),
]

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
        "guess-of-maxima-never-far",
        "csrc/cpu/distillation.h",
        "near(max_s * scale - shift.s, kFar)",
        "near(0 * max_s * scale, kFar)",
        f"{DISTILLATION} {DIVERGENCES} -k 'peaked or leading or hard_numbers or exp_overflows'",
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
        "csrc/ops/noise.cpp",
        "return tensor.has_value() ? tensor->clone() : Tensor();",
        "return tensor.has_value() ? *tensor : Tensor();",
        NOISE + " -k step_tensor",
    ),
    Fault(
        "autograd-does-not-see-the-write",
        "csrc/ops/noise.cpp",
        "if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();",
        "(void)tensor;",
        NOISE + " -k version",
    ),
    Fault(
        "tensors-that-share-memory",
        "csrc/ops/noise.cpp",
        "ranges_[j].begin < ranges_[i].end;",
        "ranges_[j].begin < ranges_[i].begin;",
        NOISE + " -k share_memory",
    ),
    Fault(
        "std-varies-in-two-blocks",
        "csrc/ops/noise.cpp",
        "    one_block &= !(varies && ended);\n",
        "    one_block &= true;\n",
        NOISE + " -k 'any_shape or every_way'",
    ),
    Fault(
        "moments-that-a-rule-needs",
        "csrc/ops/update.cpp",
        "return update == math::Update::kAdamW || update == math::Update::kPsgld;",
        "return update == math::Update::kAdamW;",
        "tests/test_ops_integration.py -k bad_update",
    ),
    Fault(
        "interpreter-held-by-a-kernel",
        "csrc/bindings.cpp",
        "      py::gil_scoped_release no_gil;\n",
        "",
        "tests/test_threads.py -k interpreter",
    ),
]

PYTHON = [
    Fault(
        "every-step-has-one-noise",
        "kdkernels/optim.py",
        'group["noise_step"] = step + 1',
        'group["noise_step"] = step',
        OPTIM + " -k 'add_noise or stopping'",
    ),
    Fault(
        "step-of-a-new-group",
        "kdkernels/optim.py",
        '        group["noise_step"] = self.param_groups[0]["noise_step"]\n',
        "",
        OPTIM + " -k new_groups",
    ),
    Fault(
        "resumed-schedule-forgotten",
        "kdkernels/optim.py",
        """            if callable(std):
                group["std"] = std
""",
        "",
        OPTIM + " -k 'schedules or stopping'",
    ),
    Fault(
        "shards-have-one-noise",
        "kdkernels/noise.py",
        "offsets = [o + shard[1] for o, shard in zip(offsets, shards, strict=True)]",
        "offsets = [o for o, shard in zip(offsets, shards, strict=True)]",
        NOISE + " -k shards",
    ),
    Fault(
        "perturbation-follows-the-step",
        "kdkernels/noise.py",
        "        step = step.clone()  # the body may advance it\n",
        "        pass\n",
        NOISE + " -k perturbed",
    ),
    Fault(
        "noise-in-evaluation",
        "kdkernels/noise.py",
        "if not self.training:",
        "if self.training is None:",
        NOISE + " -k 'training_only'",
    ),
    Fault(
        "shard-begins-at-the-first-class",
        "kdkernels/distill.py",
        "first = process_group.rank() * own",
        "first = 0 * own",
        LINEAR + " -k ranks",
    ),
    Fault(
        "samples-importance-left-out",
        "kdkernels/distill.py",
        "log_p.gather(-1, drawn) * (1 - proposal_power)",
        "log_p.gather(-1, drawn) * (0 * proposal_power)",
        DIVERGENCES + " -k sample",
    ),
    Fault(
        "temperature-once-not-squared",
        "kdkernels/compat.py",
        "loss / temperature**2",
        "loss / temperature",
        "tests/test_compat.py -k kd_loss",
    ),
]

ROBUST = "tests/test_robust.py"

TRAIN = [
    Fault(
        "dropout-begins-anew-at-a-resume",
        "kdkernels/train/loop.py",
        'k.removeprefix("random."): v for k, v in tensors.items() if k.startswith("random.")',
        "k: v for k, v in self.random.items()",
        ROBUST + " -k every_step",
    ),
    Fault(
        "second-moments-not-loaded",
        "kdkernels/train/loop.py",
        'for key in ("step", "exp_avg", "exp_avg_sq"):',
        'for key in ("step", "exp_avg"):',
        ROBUST + " -k every_step",
    ),
    Fault(
        "noise-begins-anew-at-a-resume",
        "kdkernels/train/loop.py",
        '{"seed": self.noise.seed, "step": self.step}',
        '{"seed": self.noise.seed, "step": 0}',
        ROBUST + " -k every_step",
    ),
    Fault(
        "every-epoch-in-one-order",
        "kdkernels/train/loop.py",
        "(seed * 0x9E3779B97F4A7C15 + epoch)",
        "(seed * 0x9E3779B97F4A7C15)",
        ROBUST,
    ),
    Fault(
        "ranks-share-the-first-ones-noise",
        "kdkernels/train/loop.py",
        "inputs = self.noise.on_input(clean, self.step, rows.start)",
        "inputs = self.noise.on_input(clean, self.step, 0)",
        "tests/test_train_parallel.py",
    ),
    Fault(
        "uneven-shares-weigh-alike",
        "kdkernels/train/loop.py",
        "weight = len(own) * ranks.world / len(index)",
        "weight = 1",
        "tests/test_train_parallel.py",
    ),
    Fault(
        "checkpoint-written-in-place",
        "kdkernels/train/run_folder.py",
        "        os.replace(beside, path)\n",
        "        path.write_bytes(beside.read_bytes())\n        beside.unlink()\n",
        ROBUST + " -k 'disk or kill'",
    ),
    Fault(
        "metrics-after-the-checkpoint-stay",
        "kdkernels/train/run_folder.py",
        'for record in self.metrics() if keep(record)]',
        'for record in self.metrics()]',
        ROBUST + " -k 'every_step or nan'",
    ),
    Fault(
        "all-images-cropped-alike",
        "kdkernels/train/data.py",
        "np.random.SeedSequence((self.seed, number, view))",
        "np.random.SeedSequence((self.seed, view))",
        "tests/test_data.py -k view",
    ),
    Fault(
        "augmentation-moves-the-generator",
        "kdkernels/train/data.py",
        "            generator.set_state(before)\n",
        "            pass\n",
        "tests/test_data.py -k view",
    ),
    Fault(
        "part-of-the-set-reads-others-rows",
        "kdkernels/train/predictions.py",
        "ids = index.cpu() if self._ids is None else self._ids[index.cpu()]",
        "ids = index.cpu()",
        "tests/test_data.py -k part_of_the_set",
    ),
]

FAULTS = CUDA + CPU + OPS + PYTHON + TRAIN
