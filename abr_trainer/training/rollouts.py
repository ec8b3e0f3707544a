"""Batches that a trainer generates while it trains, as TRL's GRPO and RLOO do: kept for repeats, and how stale.

Such a trainer makes the inputs of the loss in `_prepare_inputs`, out of prompts. A repeat gives it the same inputs
again, together with the log-probabilities that the policy gave the tokens at the first pass: the loss then weighs each
token by the ratio of its probability now to that, and clips it, as the trainer does by itself with `num_iterations`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..schedulers import PolicyDrift
from .checkpoints import UnfitCheckpoint

SEAMS = ("_prepare_inputs", "_generate_and_score_completions", "_get_per_token_logps_and_entropies")
"""What a trainer must have for its batches to be repeated."""

OLD = "old_per_token_logps"
"""The input of GRPO's loss that holds the log-probabilities of the policy that generated."""

ROLLOUTS_NAME = "_abr_rollouts_{rank}.safetensors"


def generates(trainer: Any) -> bool:
    """Tell whether a trainer generates its batches in a way that lets us repeat them."""
    return hasattr(trainer, "_buffered_inputs") and all(hasattr(trainer, seam) for seam in SEAMS)


class Rollout:
    """A generated micro-batch.

    Attributes:
        inputs: What the loss is computed from; None before the first pass.
    """

    def __init__(self) -> None:
        self.inputs: dict[str, Any] | None = None
        self._old: Tensor | None = None
        self._counts: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens of a pass: prompts and completions, padding included."""
        return sum(self.inputs[name].numel() for name in ("prompt_ids", "completion_ids")) if self.inputs else 0

    @contextlib.contextmanager
    def serving(self, trainer: Any) -> Iterator[None]:
        """Let the trainer generate this micro-batch at its first pass, and get it again at all others."""
        prepare, generate, log_probabilities = (getattr(trainer, seam) for seam in SEAMS)
        is_prepared = False

        def prepared(inputs: Any) -> dict[str, Any]:
            nonlocal is_prepared
            if self.inputs is None:
                self.inputs = dict(prepare(inputs))
            is_prepared = True
            return dict(self.inputs)

        def generated(inputs: Any) -> Any:
            with trainer._run.clock.generating():
                return generate(inputs)

        def looked_at(*args: Any, **kwargs: Any) -> Any:
            found = log_probabilities(*args, **kwargs)
            if is_prepared:  # else it is a part of generating
                self._compare(trainer, found[0].detach())
            return found

        shadowed = dict(zip(SEAMS, (prepared, generated, looked_at), strict=True))
        before = {seam: vars(trainer)[seam] for seam in SEAMS if seam in vars(trainer)}
        vars(trainer).update(shadowed)
        try:
            yield
        finally:
            for seam in SEAMS:
                del vars(trainer)[seam]
            vars(trainer).update(before)

    @torch.no_grad()
    def _compare(self, trainer: Any, now: Tensor) -> None:
        """Count how far the policy has moved, of the log-probabilities that it gives the tokens now."""
        assert self.inputs is not None
        if self._old is None:
            self._old = self.inputs.get(OLD)
            if self._old is None:
                self._old = now
                if "old_logps" not in self.inputs:  # of RLOO
                    self.inputs[OLD] = now
        mask = self.inputs["completion_mask"] * self.inputs.get("tool_mask", 1)
        moved = torch.where(mask.bool(), now - self._old, 0.0).double()
        ratio = torch.exp(moved)
        clipped = _clipped(trainer, moved, mask, self.inputs["advantages"])
        self._counts = torch.stack(
            [
                mask.sum().double(),
                ((ratio - 1 - moved) * mask).sum(),
                (clipped * mask).sum().double(),
                (ratio * mask).sum(),
                (ratio.square() * mask).sum(),
            ]
        )

    def counts(self) -> Tensor:
        """Return tokens, and sums over them: the divergence, those clipped, the ratios, and their squares.

        Raises:
            ValueError: The trainer has not asked for the log-probabilities.
        """
        if self._counts is None:
            raise ValueError(
                "The loss was computed without `_get_per_token_logps_and_entropies`: how far the policy has moved is "
                "not known, and a repeat would not be right. Switch off the fused loss of the trainer."
            )
        return self._counts

    def advantages(self) -> tuple[Tensor, int]:
        """Return the sum of the absolute advantages, and their number."""
        assert self.inputs is not None
        found: Tensor = self.inputs["advantages"]
        return found.abs().sum(), found.numel()


def _clipped(trainer: Any, moved: Tensor, mask: Tensor, advantages: Tensor) -> Tensor:
    """Return which tokens get no gradient because their ratio, or that of their row, has left the clip range."""
    if not hasattr(trainer, "importance_sampling_level"):  # RLOO: the ratio of a row is the product over its tokens
        moved = moved.sum(1, keepdim=True)
    elif trainer.importance_sampling_level == "sequence":
        moved = moved.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    ratio = torch.exp(moved)
    gains = advantages if advantages.dim() > 1 else advantages[:, None]
    is_low = (ratio < 1 - trainer.epsilon_low) & (gains < 0)
    is_high = (ratio > 1 + trainer.epsilon_high) & (gains > 0)
    found: Tensor = is_low | is_high
    return found.expand_as(mask)


def counted(rollouts: Sequence[Rollout]) -> list[Tensor]:
    """Return the counts of a batch on this rank, as `Rollout.counts` does of a micro-batch; none without rollouts."""
    return list(torch.stack([rollout.counts() for rollout in rollouts]).sum(0)) if rollouts else []


def drift_of(counts: Sequence[float]) -> PolicyDrift | None:
    """Return how far the policy has moved, of the counts of all ranks; None if there are none.

    >>> drift_of([4, 0.2, 1, 4, 4])
    PolicyDrift(kl=0.05, clip_fraction=0.25, ess=1.0)
    """
    if not counts:
        return None
    tokens, divergence, clipped, ratios, squares = counts
    if not tokens:
        return PolicyDrift(0.0, 0.0, 1.0)
    return PolicyDrift(divergence / tokens, clipped / tokens, ratios**2 / (tokens * squares) if squares else 0.0)


@dataclass(frozen=True, slots=True)
class Policy:
    """What a rule may know of a generated batch.

    Attributes:
        drift: How far the policy had moved at the first pass.
        advantage: Mean absolute advantage; None where the gradient is not 0 without advantages.
    """

    drift: PolicyDrift
    advantage: float | None

    @classmethod
    def of(cls, trainer: Any, sums: Sequence[float]) -> Policy | None:
        """Return it, of the `policy_sums` of all ranks; None under a trainer that does not generate."""
        if not sums:
            return None
        total, rows, *counts = sums
        drift = drift_of(counts)
        assert drift is not None
        return cls(drift, total / rows if rows and learns_by_advantage_alone(trainer) else None)


def policy_sums(rollouts: Sequence[Rollout]) -> list[Tensor | float]:
    """Return what ranks tell each other of a generated batch at its first pass."""
    if not rollouts:
        return []
    sums, numbers = zip(*(rollout.advantages() for rollout in rollouts), strict=True)
    return [torch.stack(sums).sum(), sum(numbers), *counted(rollouts)]


def learns_by_advantage_alone(trainer: Any) -> bool:
    """Tell whether a batch whose advantages are all 0 has a gradient of 0."""
    is_penalised = hasattr(trainer, "importance_sampling_level") and trainer.beta != 0  # RLOO has it in its rewards
    has_bonus = getattr(trainer, "_entropy_bonus_enabled", False)
    return not (is_penalised or has_bonus or getattr(trainer, "aux_loss_enabled", False))


# ---- Checkpoints ----


def save_rollouts(directory: Path, trainer: Any) -> None:
    """Write the generated rows of this rank that have not been trained on yet into a checkpoint, if there are any."""
    path = directory / ROLLOUTS_NAME.format(rank=trainer.args.process_index)
    path.unlink(missing_ok=True)  # of a run that was here before
    if not _is_amid_generation(trainer):
        return
    tensors: dict[str, Tensor] = {}
    others: list[dict[str, Any]] = []
    for i, part in enumerate(trainer._buffered_inputs):
        others.append({name: value for name, value in part.items() if not isinstance(value, Tensor)})
        for name, value in part.items():
            if isinstance(value, Tensor):
                tensors[f"{i}.{name}"] = value.detach().cpu().contiguous().clone()
    save_file(tensors, path, metadata={"others": json.dumps(others)})


def load_rollouts(directory: Path, trainer: Any, step: int) -> None:
    """Give a trainer back what `save_rollouts` wrote, and where it was in it.

    Raises:
        UnfitCheckpoint: There is no such file, but the checkpoint was made amid the rows of a generation.
    """
    trainer._step = step
    if not _is_amid_generation(trainer):
        return
    path = directory / ROLLOUTS_NAME.format(rank=trainer.args.process_index)
    if not path.exists():
        raise UnfitCheckpoint(
            f"{path} is missing: the rows that were generated before this checkpoint and not yet trained on. Resume "
            "from another checkpoint, with as many processes as before."
        )
    with safe_open(path, framework="pt") as file:
        parts: list[dict[str, Any]] = json.loads(file.metadata()["others"])
        for name in file.keys():  # noqa: SIM118  # it is no mapping
            i, _, key = name.partition(".")
            parts[int(i)][key] = file.get_tensor(name).to(trainer.args.device)
    trainer._buffered_inputs = parts


def _is_amid_generation(trainer: Any) -> bool:
    """Tell whether the next micro-batch is one that has been generated already."""
    is_amid: bool = trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations) != 0
    return is_amid
