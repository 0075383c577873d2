"""Faults in the sweeps over rows of a divergence: CUDA's, the CPU's, and the formulas of both."""

from mutants.fault import Fault

LAUNCHERS = "tests/test_launchers.py -k "
DIVERGENCES = "tests/test_divergences.py"
# Rows so near that D feels how the sums were rounded: the tile, the warp, a held row, a stream.
NEAR = LAUNCHERS + "'divergence- and (-9] or -90] or -610] or -1610] or -60001])'"
TRAINING = DIVERGENCES + " -k 'rows_of_training or frozen_teacher'"

LONG_ROWS = [
    Fault(
        "long-rows-do-not-refine-their-sums",
        "csrc/cuda/long_rows.cuh",
        "      sweep.refine(excess[0]);\n",
        "",
        NEAR,
    ),
    Fault(
        "long-rows-keep-the-derivatives-sum",
        "csrc/cuda/long_rows.cuh",
        "sweep.of_q = -sweep.other * of_a;",
        "",
        LAUNCHERS + "'divergence-'",
    ),
    Fault(
        "terms-of-a-clusters-first-block",
        "csrc/cuda/team.cuh",
        "Part<Real> x = part(lane & (parts() - 1));",
        "Part<Real> x = part(lane & (warps - 1));",
        LAUNCHERS + "more_rows_than_blocks",
    ),
    Fault(
        "edges-left-out-of-the-later-sweeps",
        "csrc/cuda/long_rows.cuh",
        "for (int s = from; s < slots; ++s) {",
        "for (int s = from; s < whole; ++s) {",
        LAUNCHERS + "'divergence-'",
    ),
    Fault(
        "streamed-student-in-place-of-the-teacher",
        "csrc/cuda/long_rows.cuh",
        "convert(fetch(z_row, s), fetch(t_row, s), z, t);",
        "convert(fetch(z_row, s), fetch(z_row, s), z, t);",
        LAUNCHERS + "more_rows_than_blocks",
    ),
    Fault(
        "slopes-over-the-students-logits",
        "csrc/cuda/long_rows.cuh",
        "t_slots.put(s, slopes);",
        "z_slots.put(s, slopes);",
        LAUNCHERS + "more_rows_than_blocks",
    ),
    Fault(
        "slopes-of-16-bits-kept",
        "csrc/cuda/long_rows.cuh",
        "kHeld && math::kHasSlope<Terms> && sizeof(T) > 2;",
        "kHeld && math::kHasSlope<Terms>;",
        LAUNCHERS + "'divergence-'",
    ),
    Fault(
        "cluster-arrives-before-its-terms",
        "csrc/cuda/long_rows.cuh",
        "kThird || p.row_loss != nullptr",
        "p.row_loss != nullptr",
        LAUNCHERS + "more_rows_than_blocks",
    ),
    Fault(
        "label-in-the-edge-without-its-share",
        "csrc/cuda/long_rows.cuh",
        ": slots > mine && label == edge().first;",
        ": false;",
        LAUNCHERS + "'distillation- or divergence-'",
    ),
    Fault(
        "teachers-maximum-not-raised",
        "csrc/cuda/vector_sums.cuh",
        "if (max_s > sums.max_s || max_t > sums.max_t) {",
        "if (max_s > sums.max_s) {",
        LAUNCHERS + "'distillation-'",
    ),
]

SHORT_ROWS = [
    Fault(
        "labels-teacher-is-its-student",
        "csrc/cuda/short_rows.cuh",
        "gradient = solved.sweep.gradient_of(p, task, label_z, label_t);",
        "gradient = solved.sweep.gradient_of(p, task, label_z, label_z);",
        LAUNCHERS + "'divergence-'",
    ),
    Fault(
        "padding-counts-in-smoothing",
        "csrc/cuda/short_rows.cuh",
        "hard_sums[1] += valid(k) ? z[k] - maxima[0] : Real(0);",
        "hard_sums[1] += z[k] - maxima[0];",
        LAUNCHERS + "'distillation-'",
    ),
    Fault(
        "lanes-refine-by-their-own-excess",
        "csrc/cuda/short_rows.cuh",
        "      reduce_lanes<Sum>(excess, lanes);\n",
        "",
        NEAR,
    ),
    Fault(
        "short-rows-keep-the-derivatives-sum",
        "csrc/cuda/short_rows.cuh",
        "        out.sweep.of_q = -out.sweep.other * terms[1];\n",
        "",
        LAUNCHERS + "'divergence-'",
    ),
    Fault(
        "warps-skew-is-read",
        "csrc/cuda/short_rows.cuh",
        "return item >= span.skew && item < span.body;",
        "return item < span.body;",
        LAUNCHERS + "'distillation-'",
    ),
    Fault(
        "label-in-a-warps-edge-without-its-share",
        "csrc/cuda/short_rows.cuh",
        "narrow(z[kElements] - (edge.first == label ? at_label : Real(0)), g_row[edge.first]);",
        "narrow(z[kElements], g_row[edge.first]);",
        LAUNCHERS + "'distillation-'",
    ),
]

EXTRAS = [
    Fault(
        "last-class-of-a-tie",
        "csrc/cuda/row.cuh",
        "if (z == sums.max_s) s = Max::apply(s, -at);",
        "if (z == sums.max_s) s = -at;",
        LAUNCHERS + "'divergence-'",
        source="sweeps_statistics.cu",
    ),
    Fault(
        "entropy-keeps-the-shifts-error",
        "csrc/cuda/vector_sums.cuh",
        "return math::fma(factor(), of_shifted, -error * sum);",
        "return factor() * of_shifted;",
        LAUNCHERS + "'divergence-'",
        source="sweeps_statistics.cu",
    ),
    Fault(
        "told-classes-overwritten",
        "csrc/cuda/team.cuh",
        "      if (!told) {\n",
        "      {\n",
        LAUNCHERS + "'divergence-'",
        source="sweeps_statistics.cu",
    ),
    Fault(
        "gradient-in-the-compared-logit",
        "csrc/cuda/long_rows.cuh",
        "narrow(task.template back<kExtra>(zs[j], gradient), out.value[j]);",
        "narrow(gradient, out.value[j]);",
        LAUNCHERS + "'divergence-'",
        source="sweeps_transforms.cu",
    ),
    Fault(
        "label-is-not-transformed",
        "csrc/cuda/long_rows.cuh",
        "? task.template student<kExtra>(widen(z_row[row.label]))",
        "? widen(z_row[row.label])",
        LAUNCHERS + "'divergence-'",
        source="sweeps_transforms.cu",
    ),
    Fault(
        "second-plane-over-the-first",
        "csrc/cuda/long_rows.cuh",
        "for (int i = 0; i < kPlanes; ++i) at(slot)[i * plane] = bits[i];",
        "for (int i = 0; i < kPlanes; ++i) at(slot)[0] = bits[i];",
        LAUNCHERS + "'divergence-'",
        source="sweeps_transforms.cu",
    ),
    Fault(
        "tanh-of-large-values-by-the-series",
        "csrc/math/divergence.h",
        "return ::fabsf(x) < 0.6f ?",
        "return ::fabsf(x) < 1.2f ?",
        LAUNCHERS + "'divergence-'",
        source="sweeps_transforms.cu",
    ),
    Fault(
        "skipped-rows-have-no-statistics",
        "csrc/cuda/long_rows.cuh",
        "if (wants_statistics()) blank_statistics(p, row, r);",
        "",
        LAUNCHERS + "'divergence-'",
        source="sweeps_statistics.cu",
    ),
]

ROW = [
    Fault(
        "larger-probability-for-the-smaller",
        "csrc/cuda/row.cuh",
        "x.q = x.d < Real(0) ? top : low;",
        "x.q = top;",
        LAUNCHERS + "'divergence-'",
        source="sweeps_statistics.cu",
    ),
    Fault(
        "rounding-of-the-maxima-lost",
        "csrc/cuda/row.cuh",
        "math::fma(-lost, task.inv_temperature, this->above);",
        "this->above;",
        LAUNCHERS + "'distillation- or divergence-'",
    ),
]

CPU = [
    Fault(
        "padding-lanes-are-classes",
        "csrc/cpu/distillation.h",
        "constexpr Real kExcluded = -std::numeric_limits<Real>::infinity();",
        "constexpr Real kExcluded = 0;",
        "tests/test_distillation.py -k against_fp64",
    ),
    Fault(
        "derivatives-added-twice",
        "csrc/cpu/distillation.h",
        "part_f = part_a = V(Real(0));",
        "part_f = V(Real(0));",
        DIVERGENCES + " -k frozen_teacher",
    ),
    Fault(
        "excluded-by-both-is-not-a-number",
        "csrc/cpu/distillation.h",
        "smaller(p, q) / (larger(p, q) + tiny)",
        "smaller(p, q) / larger(p, q)",
        DIVERGENCES + " -k 'everything or excluded_classes'",
        "The row's sum is not a number then, and the walker of any divergence does it once more.",
    ),
    Fault(
        "label-of-the-first-lane",
        "csrc/cpu/distillation.h",
        ".lanes[label % V::kLanes];",
        ".lanes[0];",
        DIVERGENCES + " -k 'everything or frozen_teacher'",
    ),
    Fault(
        "teachers-guess-stays-far",
        "csrc/cpu/distillation.h",
        "near(max_t * scale - shift.t, kFar) &&",
        "true &&",
        "tests/test_distillation.py -k 'against_fp64 or peaked or guessed_from'",
    ),
    Fault(
        "parameters-of-the-last-call",
        "csrc/cpu/distillation.h",
        "p.divergence != divergence || p.divergence_alpha != alpha || p.beta != beta",
        "p.divergence != divergence || p.divergence_alpha != alpha",
        DIVERGENCES + " -k 'everything or limits or frozen_teacher'",
    ),
    Fault(
        "short-rows-do-not-refine-their-sums",
        "csrc/cpu/short_rows.h",
        "above[r] += math::log_of_excess(excess[r]);",
        "",
        DIVERGENCES + " -k rounding_of_sums",
    ),
    Fault(
        "short-rows-keep-what-is-not-a-number",
        "csrc/cpu/short_rows.h",
        "loss[r] - loss[r] == 0 && sum_s[r] > 0 && sum_t[r] > 0;",
        "sum_s[r] > 0 || true;",
        DIVERGENCES + " -k 'excluded_classes or bad_rows'",
    ),
    Fault(
        "short-rows-smooth-by-no-logit",
        "csrc/cpu/short_rows.h",
        "(smooth ? of_classes * sum_z[r] : Real(0));",
        "Real(0);",
        "tests/test_distillation.py -k against_fp64",
    ),
    Fault(
        "label-stays-among-the-others",
        "csrc/cpu/divergence.h",
        "u[label_here] = t[label_here] = -kInfinity<Real>;",
        "u[label_here] = -kInfinity<Real>;",
        DIVERGENCES + " -k 'everything or decoupled'",
    ),
    Fault(
        "walker-does-not-refine-its-sums",
        "csrc/cpu/divergence.h",
        "if (math::needs_exact_sums(p.divergence) && p.state == nullptr) {",
        "if (math::needs_exact_sums(p.divergence) && p.rows < 0) {",
        DIVERGENCES + " -k rounding_of_sums",
    ),
    Fault(
        "rows-last-class-not-written",
        "csrc/cpu/vector.h",
        "store_part(at(whole), static_cast<int>(n - whole), out + whole);",
        "store_part(at(whole), static_cast<int>(n - whole) - 1, out + whole);",
        DIVERGENCES + " -k 'everything or nothing_of_a_longer_row'",
    ),
]

MATH = [
    Fault(
        "close-terms-cancel",
        "csrc/math/divergence.h",
        "return {select(small, a * series, fma(a, e, difference)),",
        "return {fma(a, e, difference),",
        TRAINING,
    ),
    Fault(
        "close-probabilities-differ-by-rounding",
        "csrc/math/divergence.h",
        "select(small, a * (series - e), difference)};",
        "difference};",
        DIVERGENCES + " -k 'four_digits or frozen_teacher'",
        no_fault="rounding a difference of p and q is below the error of the sums' ratio, 1e-7",
    ),
    Fault(
        "close-classes-without-series",
        "csrc/math/divergence.h",
        "y.close = sizeof(Real) == 4 ? Real(0.5) : Real(0.25);",
        "y.close = Real(0);",
        TRAINING,
    ),
    Fault(
        "sign-in-a-teachers-series",
        "csrc/math/divergence.h",
        "b = combine(1, log_p, beta, combine(1, one, -1, p_over_m));",
        "b = combine(1, log_p, -beta, combine(1, one, -1, p_over_m));",
        DIVERGENCES + " -k 'everything or four_digits or derivatives'",
    ),
    Fault(
        "mixtures-of-16-bits-have-three-sweeps",
        "csrc/math/divergence.h",
        "return !rounded || (beta >= 0.05 && beta <= 0.95);",
        "return true;",
        DIVERGENCES + " -k 'four_digits'",
    ),
    Fault(
        "skew-of-16-bits-has-three-sweeps",
        "csrc/math/divergence.h",
        "return !rounded || beta <= 0.6;",
        "return true;",
        DIVERGENCES + " -k 'four_digits'",
    ),
    Fault(
        "nothing-times-infinity",
        "csrc/math/divergence.h",
        "return select(a == F(0), F(0), a * e);",
        "return a * e;",
        DIVERGENCES + " -k 'excluded_classes or one_hot'",
    ),
    Fault(
        "close-powers-cancel",
        "csrc/math/divergence.h",
        "const F f = select(magnitude(of_both) < F(RealOf<F>(kSmall)), close, direct);",
        "const F f = direct;",
        DIVERGENCES + " -k 'four_digits or frozen_teacher'",
    ),
]

FAULTS = LONG_ROWS + SHORT_ROWS + EXTRAS + ROW + CPU + MATH
