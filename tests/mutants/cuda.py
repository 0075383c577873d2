"""Faults in csrc/cuda."""

from mutants.fault import Fault

LAUNCHERS = "tests/test_launchers.py -k "

FAULTS = [
    Fault(
        "tile-barrier-after-copy",
        "csrc/cuda/short_rows.cuh",
        """t_image[i] = row_at<T>(p.teacher_data[0], p.teacher_rows[0], first + row)[column];
      }
    }
    __syncthreads();
""",
        """t_image[i] = row_at<T>(p.teacher_data[0], p.teacher_rows[0], first + row)[column];
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
        "csrc/cuda/team.cuh",
        """    if (!arrived) cluster_arrive();
    cluster_wait();
""",
        "    if (arrived) cluster_wait();\n",
        LAUNCHERS + "more_rows_than_blocks",
    ),
    Fault(
        "sums-of-terms-have-one-turn",
        "csrc/cuda/team.cuh",
        """turn ^= 1;
    maxima[kMaxima] = 0;""",
        "maxima[kMaxima] = 0;",
        LAUNCHERS + "more_rows_than_blocks",
    ),
    Fault(
        "parts-have-one-turn",
        "csrc/cuda/team.cuh",
        """turn ^= 1;
    return merge_lanes""",
        "return merge_lanes",
        LAUNCHERS + "more_rows_than_blocks",
    ),
    Fault(
        "teachers-sum-by-the-students-error",
        "csrc/cuda/vector_sums.cuh",
        "sums.sum_t = math::fma(shifts.t.factor(), part.sum_t, sums.sum_t);",
        "sums.sum_t = math::fma(of_s, part.sum_t, sums.sum_t);",
        LAUNCHERS + "'distillation- and -1100]'",
    ),
    Fault(
        "students-shift-error-left-out-of-the-sums",
        "csrc/cuda/vector_sums.cuh",
        "  float of_s = shifts.s.factor();",
        "  float of_s = 1.0f;",
        LAUNCHERS + "'distillation- and -1100]'",
    ),
    Fault(
        "shifts-errors-left-out-of-the-cross-term",
        "csrc/cuda/vector_sums.cuh",
        "math::fma(part.sum_s, shifts.t.error - shifts.s.error, part.cross)",
        "part.cross",
        LAUNCHERS + "'divergence- and -1100]'",
    ),
    Fault(
        "teachers-shift-error-left-out-of-the-gradient",
        "csrc/cuda/long_rows.cuh",
        "    sweep.inv_t *= of_t;",
        "",
        LAUNCHERS + "'distillation- and -1100]'",
    ),
    Fault(
        "rows-in-32-bits",
        "csrc/params.h",
        "return row * rows.inner;",
        "return static_cast<int>(row * rows.inner);",
        LAUNCHERS + "beyond",
    ),
    Fault(
        "rows-of-a-run-not-counted-anew",
        "csrc/params.h",
        "(row - run * rows.run) * rows.inner",
        "row * rows.inner",
        LAUNCHERS + "in_runs",
    ),
    Fault(
        "tiles-over-the-gap-of-two-runs",
        "csrc/cuda/short_rows.cuh",
        "- offset_of(strides, first) == flat_elements",
        "- offset_of(strides, first) >= flat_elements",
        LAUNCHERS + "in_runs",
    ),
    Fault(
        "sequences-length-first-as-one-span",
        "csrc/cuda/short_rows.cuh",
        "return strides.inner == classes &&",
        "return",
        LAUNCHERS + "length_first",
    ),
    Fault(
        "losses-added-before-the-rows-end",
        "csrc/cuda/distillation.cu",
        "  wait_for_launch_before();\n  double sum",
        "  double sum",
        LAUNCHERS + "distillation-",
    ),
    Fault(
        "groups-not-padded",
        "csrc/cuda/divergence.cuh",
        "    held.pad();\n",
        "",
        LAUNCHERS + "divergence-",
    ),
    Fault(
        "gradient-by-the-students-stride",
        "csrc/cuda/long_rows.cuh",
        "row_at<T>(p.gradient, p.gradient_rows, r)",
        "row_at<T>(p.gradient, p.student_rows, r)",
        LAUNCHERS + "distillation-",
    ),
    Fault(
        "tile-overwritten-by-the-next",
        "csrc/cuda/short_rows.cuh",
        """[i - row * classes] = z_image[i];
      }
    }
    __syncthreads();
""",
        """[i - row * classes] = z_image[i];
      }
    }
""",
        LAUNCHERS + "more_rows_than_blocks",
    ),
    Fault(
        "held-waits-for-an-older-copy",
        "csrc/cuda/long_rows.cuh",
        "if (g == kGroups - 2) wait_copies<1>();",
        "if (g == kGroups - 2) wait_copies<2>();",
        LAUNCHERS + "distillation-",
    ),
    Fault(
        "row-loss-of-the-first-block-alone",
        "csrc/cuda/team.cuh",
        "return cluster > 1 ? read_peer(at, i >> log_warps).loss : at->loss;",
        "return at->loss;",
        LAUNCHERS + "distillation-",
    ),
    Fault(
        "held-last-slot-skipped",
        "csrc/cuda/long_rows.cuh",
        "const int from = max(skip, g * of_group), to = min(slots, (g + 1) * of_group);",
        "const int from = max(skip, g * of_group), to = min(slots - 1, (g + 1) * of_group);",
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
        "if (blocks > 1) inverse_kernel",
        "if (blocks > 256) inverse_kernel",
        LAUNCHERS + "'distillation- and -5]'",
    ),
    Fault(
        "other-blocks-of-a-cluster-left-out-of-the-loss",
        "csrc/cuda/sweeps.cuh",
        "rows.partials = plan.partials(p.rows) * plan.cluster;",
        "rows.partials = plan.partials(p.rows);",
        LAUNCHERS + "distillation-",
    ),
    Fault(
        "divergence-barrier-between-rows",
        "csrc/cuda/divergence.cu",
        "    __syncthreads();  // the last row no longer needs what is shared\n",
        "",
        LAUNCHERS + "divergence-",
        no_fault="the passes of a row end behind a barrier after they read what is shared last",
    ),
    Fault(
        "sums-refined-while-they-are-read",
        "csrc/cuda/divergence.cuh",
        "      if (stage == kRefine) __syncthreads();  // all have read what this changes\n",
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
        "if (task.best && largest > max) {",
        "if (task.best && largest >= max) {",
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
        "second-half-of-a-groups-bits",
        "csrc/cuda/bits.cuh",
        "r = {{r.word[2], r.word[3], next.word[0], next.word[1]}};",
        "r = {{r.word[2], r.word[3], next.word[2], next.word[3]}};",
        LAUNCHERS + "update-",
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
        "(device || step_of(",
        "(true || step_of(",
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
