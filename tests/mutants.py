"""Plant mistakes that others have made, or that are easily made, and see that a test fails.

    make mutants

Works on a copy of the checkout. Every mutant names the tests that ought to notice it; they must
pass on the unchanged copy and fail on the mutant. Exit status 1 if one survives.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = (
    *("megatron_rw", "tests", "tools", "examples", "benchmarks"),
    *("pretrain_gpt_rw.py", "pyproject.toml", "setup.py"),
)
PASSED, FAILED = 0, 1

REWEIGHTING = "megatron_rw/reweighting"
SCOPES = f"{REWEIGHTING}/scopes.py"
WEIGHTS = "megatron_rw/kernels/weights.py"
STEP = "megatron_rw/integrations/step.py"
RESILIENCE = "megatron_rw/resilience"
BAD_NUMBERS = "tests/resilience/test_nonfinite.py"
KERNEL_TESTS = "tests/kernels/test_cross_entropy.py"
LAYER_TESTS = "tests/kernels/test_linear_cross_entropy.py"
LAYER = "megatron_rw/kernels/linear_autograd.py"
PROBABILITIES = "megatron_rw/kernels/torch_probabilities.py"
CUDA_TESTS = "tests/kernels/test_cuda.py"
CSRC = "megatron_rw/kernels/csrc"


def cell(layout: str) -> str:
    """A row of the exactness table."""
    test = "test_gradient_is_the_single_process_oracles"
    return f"tests/exactness/test_exactness.py::{test}[{layout}]"


@dataclass(frozen=True)
class Mutant:
    """A mistake: what it is, the tests that notice it, and the edits `(file, old, new)`."""

    mistake: str
    test: str
    edits: tuple[tuple[str, str, str], ...]


def one(mistake: str, test: str, file: str, old: str, new: str) -> Mutant:
    """A mutant of a single edit."""
    return Mutant(mistake, test, ((file, old, new),))


MUTANTS = (
    one(
        "weights taken by local rank, as if every node were the first",
        cell("DP2"),
        f"{REWEIGHTING}/samples.py",
        "start = ranks.dp_rank * count",
        "start = 0 * count",
    ),
    one(
        "each rank weighs its own samples alone",
        cell("DP2"),
        f"{REWEIGHTING}/samples.py",
        "    if ranks.group is not None:",
        "    if ranks.group is None:",
    ),
    one(
        "deferred: normaliser of the own samples",
        cell("DP2"),
        SCOPES,
        "total = statistics[Statistic.TOTAL]",
        "total = weights[samples.local].sum() * self.ranks.dp_size",
    ),
    one(
        "deferred: normaliser applied twice",
        cell("one process"),
        STEP,
        "scale_gradients(shared[0])",
        "scale_gradients(shared[0] ** 2)",
    ),
    one(
        "deferred: normaliser forgotten on other pipeline stages",
        cell("PP2"),
        STEP,
        "        groups.share_with_pipeline(shared)\n",
        "",
    ),
    one(
        "deferred: auxiliary losses scaled by the normaliser",
        "tests/refusals/test_refusals.py::test_refusal[auxiliary loss scaled with the gradients]",
        STEP,
        'if config.scope == "deferred" and others:',
        'if config.scope == "deferred" and not others:',
    ),
    one(
        "deferred: decay of the moments ignored",
        cell("one process"),
        SCOPES,
        "updated = seen + self.config.moment_decay * (kept - seen)",
        "updated = seen + 0 * (kept - seen)",
    ),
    one(
        "deferred: an empty step forgets the moments",
        cell("one process"),
        SCOPES,
        "self.moments = torch.where(seen.isfinite(), updated, used)",
        "self.moments = seen + 0 * (updated - used)",
    ),
    one(
        "deferred: losses beyond the old range not clamped",
        cell("one process"),
        WEIGHTS,
        "scaled.clamp(-delta, delta)",
        "scaled",
    ),
    one(
        "deferred: moments not in the checkpoint",
        "tests/parallel/test_resume.py"
        "::test_killed_at_ten_and_resumed_is_bitwise_the_uninterrupted_run"
        "[distributed-optimizer-deferred]",
        STEP,
        "        self._state.moments = shared[1:]\n",
        "",
    ),
    one(
        "context-parallel factor forgotten",
        cell("CP2"),
        STEP,
        "loss * reweighter.ranks.size",
        "loss * reweighter.ranks.dp_size",
    ),
    one(
        "mean over data-parallel ranks for a sum",
        cell("DP2"),
        STEP,
        "loss * reweighter.ranks.size",
        "loss",
    ),
    one(
        "sample mean over the own shard's tokens",
        cell("CP2"),
        SCOPES,
        "weighted.samples.tokens[own])",
        "sums.tokens)",
    ),
    Mutant(
        "weights not detached",
        cell("one process"),
        (
            (
                WEIGHTS,
                "@torch.no_grad()\ndef weigh_samples(",
                "def weigh_samples(",
            ),
            (SCOPES, "SampleSums(sums.loss_sum.detach(), sums.tokens)", "sums"),
        ),
    ),
    one(
        "moments from samples without an active token",
        cell("one process"),
        SCOPES,
        "*self._weights(samples.losses, samples.has_tokens))",
        "*self._weights(samples.losses, samples.tokens >= 0))",
    ),
    one(
        "Megatron divides by the micro-batch's tokens",
        cell("one process"),
        STEP,
        "return loss * reweighter.ranks.size, one",
        "return loss * reweighter.ranks.size, sums.tokens.sum().to(torch.int)",
    ),
    one(
        "other losses divided by ranks instead of tokens",
        "tests/exactness/test_other_losses.py::test_other_losses_keep_their_gradient[per-token]",
        STEP,
        "bool(others) and config.calculate_per_token_loss",
        "bool(others) and not config.calculate_per_token_loss",
    ),
    one(
        "global: mean over micro-batches for a sum",
        cell("one process"),
        SCOPES,
        "return self._num_microbatches * _weighted_sum(",
        "return _weighted_sum(",
    ),
    one(
        "global: micro-batches get each other's weights",
        cell("one process"),
        SCOPES,
        "+ self._weighed * count",
        "+ (self._num_microbatches - 1 - self._weighed) * count",
    ),
    one(
        "global: scoring moves the random state",
        "tests/exactness/test_scoring.py::test_scoring_sees_the_training_passs_dropout[one]",
        "megatron_rw/integrations/schedule.py",
        "with torch.no_grad(), _fork_rng(), ",
        "with torch.no_grad(), ",
    ),
    one(
        "a sample of weight 0 spreads its NaN",
        "tests/reweighting/test_reweighter.py::test_nonfinite_sample_never_spreads",
        SCOPES,
        "return (torch.where(weights > 0, own_loss_sum, 0.0) *",
        "return (own_loss_sum *",
    ),
    one(
        "cross-entropy: upstream gradient read as a scalar",
        f"{KERNEL_TESTS}::test_upstream_is_per_token_not_a_scalar[torch]",
        "megatron_rw/kernels/torch_backend.py",
        "            gradient *= factor\n",
        "            gradient *= factor.mean()\n",
    ),
    one(
        "cross-entropy: label smoothing over the own shard's vocabulary",
        f"{KERNEL_TESTS}::test_shards_together_are_the_whole[torch-2-label smoothing]",
        "megatron_rw/kernels/options.py",
        "options.label_smoothing * self.vocab_size / (self.vocab_size - 1)",
        "options.label_smoothing * self.columns / (self.columns - 1)",
    ),
    one(
        "cross-entropy: autograd is not told that the logits are overwritten",
        f"{KERNEL_TESTS}::test_second_backward_raises_instead_of_lying[triton]",
        "megatron_rw/kernels/cross_entropy.py",
        "            torch.autograd.graph.increment_version(logits)\n",
        "            pass\n",
    ),
    one(
        "cross-entropy: a row without weight is multiplied by 0",
        f"{KERNEL_TESTS}::test_nan_in_a_row_that_does_not_count_stays_there[torch-ignored]",
        "megatron_rw/kernels/torch_backend.py",
        "            clear_rows(gradient, zero)\n",
        "",
    ),
    one(
        "cross-entropy: sums of the samples without their mask",
        f"{KERNEL_TESTS}::test_sums_of_the_samples_and_their_gradient[torch-plain]",
        "megatron_rw/kernels/sums.py",
        "torch.where(mask > 0, token_losses * mask, 0.0)",
        "token_losses",
    ),
    one(
        "CUDA: threads read what others write, without a barrier",
        f"{CUDA_TESTS}::test_sanitizers_find_nothing[thread]",
        f"{CSRC}/device.cuh",
        "  if (lane == 0) scratch[warp] = value;\n  __syncthreads();\n",
        "  if (lane == 0) scratch[warp] = value;\n",
    ),
    one(
        "CUDA: a last vector that sticks out of the row",
        f"{CUDA_TESTS}::test_sanitizers_find_nothing[address undefined]",
        f"{CSRC}/device.cuh",
        "(count - head) / kSize;",
        "(count - head + kSize - 1) / kSize;",
    ),
    one(
        "CUDA: offset of a row in 32 bits",
        f"{KERNEL_TESTS}::test_offsets_beyond_two_to_the_31[cuda]",
        f"{CSRC}/statistics.cu",
        "sequence * a.logits.stride_sequence + sample",
        "static_cast<int>(sequence * a.logits.stride_sequence) + sample",
    ),
    one(
        "CUDA: gradient apart from the logits, aligned as they are",
        f"{KERNEL_TESTS}::test_rows_that_begin_anywhere[cuda-3-dtype1]",
        f"{CSRC}/gradient.cu",
        "stride == 1 && out_stride == 1 && aligned_alike",
        "stride == 1 && out_stride == 1 && (aligned_alike || true)",
    ),
    one(
        "CUDA: a row without weight is multiplied by 0",
        f"{KERNEL_TESTS}::test_nan_in_a_row_that_does_not_count_stays_there[cuda-zero upstream]",
        f"{CSRC}/gradient.cu",
        "if (scale == 0.0f || label == a.ignore_index)",
        "if (label == a.ignore_index)",
    ),
    one(
        "CUDA: sums over the samples lose their digits",
        "tests/kernels/test_weights.py::test_sums_over_many_samples_keep_their_digits[cuda]",
        f"{CSRC}/device.cuh",
        "    lost += (total - (sum - part)) + (value - part);\n",
        "    lost += 0.0f * part;\n",
    ),
    one(
        "output layer: the weight's gradient of hidden states without their tokens' weights",
        f"{LAYER_TESTS}::test_loss_and_gradients_are_those_of_fp64[keep-dtype1-torch-plain]",
        LAYER,
        "scale_rows(whole.flatten(0, 1), self.factor.flatten(), scaled)",
        "scale_rows(whole.flatten(0, 1), torch.ones_like(self.factor.flatten()), scaled)",
    ),
    one(
        "output layer: a token without weight is multiplied by 0",
        f"{LAYER_TESTS}::test_nan_in_a_token_that_does_not_count_stays_there[keep-torch-ignored]",
        PROBABILITIES,
        "        out.masked_fill_(factor == 0, 0.0)\n",
        "",
    ),
    one(
        "output layer: what is not finite is kept where its token has no weight",
        f"{LAYER_TESTS}::test_nan_in_a_token_that_does_not_count_stays_there[keep-torch-"
        "zero upstream]",
        PROBABILITIES,
        "if probabilities.is_cuda or (lost & ~ignored).any():",
        "if probabilities.is_cuda:",
    ),
    one(
        "output layer: exp of the other shards' lead overflows",
        f"{LAYER_TESTS}::test_target_in_a_shard_without_probability[dtype4-torch]",
        PROBABILITIES,
        "lost = ~(ratio.abs() <= largest_ratio(probabilities.dtype))",
        "lost = ratio.isnan()",
    ),
    one(
        "output layer: factor of the z-loss left out of the gradient",
        f"{LAYER_TESTS}::test_loss_and_gradients_are_those_of_fp64[keep-dtype1-torch-z-loss]",
        PROBABILITIES,
        "ratio = torch.exp(lse - within) / (1.0 + 2.0 * options.z_loss * lse)",
        "ratio = torch.exp(lse - within)",
    ),
    one(
        "output layer: the hidden states' gradient is this rank's alone",
        f"{LAYER_TESTS}::test_two_tensor_parallel_ranks[keep--plain]",
        LAYER,
        "return gradient, dist.all_reduce(gradient, group=self.tp_group, async_op=True)",
        "return gradient, None",
    ),
    one(
        "output layer: a split begins where the first does",
        f"{LAYER_TESTS}::test_loss_and_gradients_are_those_of_fp64[split-dtype1-torch-plain]",
        LAYER,
        "start = self.shard.start + columns.start",
        "start = self.shard.start",
    ),
    one(
        "output layer: main_grad is overwritten, not added to",
        "tests/kernels/test_linear_layer.py::test_main_grad_adds_up_in_fp32[keep]",
        "megatron_rw/kernels/products.py",
        "            into.addmm_(part.to(into.dtype), piece.to(into.dtype))\n",
        "            into.zero_().addmm_(part.to(into.dtype), piece.to(into.dtype))\n",
    ),
    one(
        "output layer: called without the module's hooks, its parameters still on their way",
        "tests/integrations/test_output_layer.py::test_output_processor_keeps_what_a_module_does",
        "megatron_rw/integrations/output_layer.py",
        "losses, sums = output_layer(scale_logits(hidden_states), weight=output_weight)",
        "losses, sums = forward(scale_logits(hidden_states), weight=output_weight)",
    ),
    one(
        "CUDA: what registers do not hold of a row is written from its beginning",
        f"{LAYER_TESTS}::test_row_longer_than_registers_hold[cuda-dtype1]",
        f"{CSRC}/probabilities.cu",
        "    const Vector<T> logits = load_vector(vectors[at].values);\n",
        "    const Vector<T> logits = load_vector(vectors[thread].values);\n",
    ),
    one(
        "bad numbers: gradients of the pass with the bad sample kept",
        f"{BAD_NUMBERS}::test_dropped_sample_might_not_have_been_there",
        f"{RESILIENCE}/dropping.py",
        "            chunk.zero_grad_buffer()\n",
        "            pass\n",
    ),
    one(
        "bad numbers: the dropped sample's blank tokens compete for weight",
        f"{BAD_NUMBERS}::test_dropped_sample_might_not_have_been_there",
        f"{RESILIENCE}/dropping.py",
        '("tokens", "labels", "loss_mask")',
        '("tokens", "labels")',
    ),
    one(
        "bad numbers: a gradient is not looked at where every loss is finite",
        f"{BAD_NUMBERS}::test_raise_names_the_gradient_and_its_rank",
        f"{RESILIENCE}/nonfinite.py",
        "torch.stack([loss, gradient])",
        "torch.stack([loss, loss])",
    ),
    one(
        "bad numbers: the step counts as skipped, but not in a row",
        f"{BAD_NUMBERS}::test_dropping_cannot_help_a_gradient",
        f"{RESILIENCE}/nonfinite.py",
        "        self._in_a_row += 1\n",
        "        self._in_a_row = 1\n",
    ),
)


def run_tests(folder: Path, tests: list[str]) -> int:
    """Pytest's exit status in a copy."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=folder, capture_output=True).returncode


def apply(folder: Path, edits: tuple[tuple[str, str, str], ...]) -> None:
    """Make the edits; each old text stands in its file exactly once."""
    for file, old, new in edits:
        path = folder / file
        text = path.read_text()
        if text.count(old) != 1:
            raise SystemExit(f"{file}: {text.count(old)} times, expected once: {old!r}")
        path.write_text(text.replace(old, new))


def copy_checkout(folder: Path) -> None:
    """The checkout's sources, fresh."""
    for name in COPIED:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)


def main() -> int:
    """Run all mutants, or those whose mistake contains the first argument."""
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [mutant for mutant in MUTANTS if wanted in mutant.mistake]
    survived = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_checkout(folder)
        tests = list(dict.fromkeys(mutant.test for mutant in chosen))
        if run_tests(folder, tests) != PASSED:
            print("error: the tests fail without any mutant; run make test", file=sys.stderr)
            return 2
        for mutant in chosen:
            copy_checkout(folder)
            apply(folder, mutant.edits)
            start = time.perf_counter()
            status = run_tests(folder, [mutant.test])
            # A negative one is a signal: it wrote or read where there is no memory.
            caught = status == FAILED or status < 0
            survived += not caught
            verdict = "caught" if caught else "SURVIVED"
            print(f"{verdict:8} {time.perf_counter() - start:4.0f} s  {mutant.mistake}", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} mutants caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
