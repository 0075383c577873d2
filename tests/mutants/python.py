"""Faults in kdkernels."""

from mutants.fault import Fault

NOISE = "tests/test_noise.py"
OPTIM = "tests/test_optim.py"
LINEAR = "tests/test_linear.py"
DIVERGENCES = "tests/test_divergences.py"

PYTHON = [
    Fault(
        "first-teacher-for-all-rows",
        "kdkernels/distill/calls.py",
        "out = torch.where(index == m, teacher, out)",
        "out = torch.where(index >= m, first, out)",
        "tests/test_teacher_index.py -k bits",
    ),
    Fault(
        "every-step-has-one-noise",
        "kdkernels/optim/noisy.py",
        'group["noise_step"] = step + 1',
        'group["noise_step"] = step',
        OPTIM + " -k fed_reference_noise",
    ),
    Fault(
        "step-of-a-new-group",
        "kdkernels/optim/noisy.py",
        '        group["noise_step"] = self.param_groups[0]["noise_step"]\n',
        "",
        OPTIM + " -k new_groups",
    ),
    Fault(
        "resumed-schedule-forgotten",
        "kdkernels/optim/noisy.py",
        """            if callable(std):
                group["std"] = std
""",
        "            pass\n",
        OPTIM + " -k 'schedules or stopping'",
    ),
    Fault(
        "default-betas",
        "kdkernels/optim/optimizers.py",
        "betas: tuple[float, float] = (0.9, 0.999),",
        "betas: tuple[float, float] = (0.9, 0.99),",
        OPTIM + " -k torch",
    ),
    Fault(
        "shards-have-one-noise",
        "kdkernels/noise/arguments.py",
        "offsets = [o + shard[1] for o, shard in zip(offsets, shards, strict=True)]",
        "offsets = [o for o, shard in zip(offsets, shards, strict=True)]",
        NOISE + " -k shards",
    ),
    Fault(
        "perturbation-follows-the-step",
        "kdkernels/noise/functions.py",
        "        step = step.clone()  # the body may advance it\n",
        "        pass\n",
        NOISE + " -k perturbed",
    ),
    Fault(
        "noise-in-evaluation",
        "kdkernels/noise/modules.py",
        "if not self.training:",
        "if self.training is None:",
        NOISE + " -k 'training_only'",
    ),
    Fault(
        "shard-begins-at-the-first-class",
        "kdkernels/distill/calls.py",
        "first = process_group.rank() * own",
        "first = 0 * own",
        "tests/test_parallel.py -k ranks_agree",
    ),
    Fault(
        "samples-importance-left-out",
        "kdkernels/distill/teachers.py",
        "log_p.gather(-1, drawn) * (1 - proposal_power)",
        "log_p.gather(-1, drawn) * (0 * proposal_power)",
        DIVERGENCES + " -k samples_weigh",
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
        "        torch.manual_seed(int(key.generate_state(1, np.uint64)[0] >> 1))\n",
        "        del key\n",
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
        "tests/test_train.py -k order_each",
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
        ROBUST + " -k 'disk or replaced'",
    ),
    Fault(
        "metrics-after-the-checkpoint-stay",
        "kdkernels/train/run_folder.py",
        "for record in self.metrics() if keep(record)]",
        "for record in self.metrics()]",
        ROBUST + " -k 'every_step or nan'",
    ),
    Fault(
        "all-images-cropped-alike",
        "kdkernels/train/images.py",
        "np.random.SeedSequence((self.seed, number, view))",
        "np.random.SeedSequence((self.seed, view))",
        "tests/test_data.py -k view",
    ),
    Fault(
        "augmentation-moves-the-generator",
        "kdkernels/train/images.py",
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

FAULTS = PYTHON + TRAIN
