"""One batch, from its first pass to its outcome.

     micro-batches --> super().training_step each         the first pass is the probe: no extra forward
                         | rows judged, mean over the rows that are kept, then over ranks (the one collective)
                   Observation --> repeat_scheduler.decide --> repeats, clamped to what is left of the budget
                         |
          0: the batch never happened    1: nothing to do    n: (n-1) x [clip, optimizer.step, zero_grad, pass again]
                         |                                      as long as the scheduler says `goes_on`;
                         |                                      then the same for earlier batches that it `replay`s
                         |
     stock Trainer resumes: clip, optimizer.step, lr_scheduler.step, global_step += 1
                         |
                     Outcome --> repeat_scheduler.observe
                             +-> callbacks
                         |
     stock Trainer resumes: log / evaluate / save

The decision falls between forward and backward of the micro-batch that completes the batch. A rule that wants the norm
of the gradient is asked once more, after that backward.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ..schedulers import Outcome
from ..schedulers.base import NO_TARGETS, OFF_POLICY, TOO_FEW_ROWS, BadDecision
from .config import setting
from .deciding import AGAIN, BUDGET, NO_ROOM, NON_FINITE, Decision, decide, look_at_gradient
from .dropped_rows import DroppedRow, excerpts, with_text
from .dropping import BatchRows, RowGate, batch_rows, without_broken
from .held import Call, HeldBatch, check_holdable, rollouts_of
from .identity import taken_out
from .memory import memory_of_batch
from .notices import say_what_is_left_out
from .passes import Pass, Passes, before_backward, counted_once
from .rollouts import Policy, Rollout, generates, policy_sums
from .signals import Hits, summed
from .targets import first_target, tally
from .waiting import say_if_waiting


class Batch:
    """One batch: its micro-batches as they arrive, the decision, and what became of it.

    Attributes:
        outcome: None until the decision is carried out.
        update_is_withheld: Trainer must not make its update.
        rows: Its rows, over all ranks; None where no rule is asked about rows.
    """

    def __init__(self) -> None:
        self.outcome: Outcome | None = None
        self.update_is_withheld = False
        self.rows: BatchRows | None = None
        self._started = time.perf_counter()
        self._arrived: list[Call] = []
        self._calls: list[Call] = []
        self._losses: list[Tensor] = []
        self._hits: list[Hits] = []
        self._indices: list[Tensor | None] = []
        self._dropped: list[DroppedRow] = []
        self._marks_before: dict[str, int] = {}
        self._tr_loss_before: Tensor | None = None
        self._decision: Decision | None = None
        self._whole = self._came = HeldBatch(self._calls, tokens=0, forward_flops=0.0)
        self._excerpts: list[list[int]] = []
        self._evaluation_is_due = self._checkpoint_is_due = False

    @property
    def seconds(self) -> float:
        """Wall-clock time since this rank began to wait for the batch."""
        return time.perf_counter() - self._started

    # ---- The first pass ----

    def take(self, passes: Passes, call: Call) -> Tensor:
        """Pass over one micro-batch. If it is the last one, decide, and carry out the decision.

        Returns:
            What Trainer adds to the sum of losses that it logs.
        """
        trainer = passes.trainer
        inputs, indices = taken_out(call.inputs)
        call = call._replace(inputs=inputs, rollout=Rollout() if generates(trainer) else None)
        if not self._calls:
            self._begin(passes, call)
        self._arrived.append(call._replace(inputs=copy.copy(inputs)))
        self._calls = self._arrived
        self._indices.append(indices)
        if not trainer.accelerator.gradient_state.sync_gradients:
            self._losses.append(passes.one(call, self._hits, judges_rows=True))
            return self._losses[-1]

        def is_trained_on(loss: Tensor) -> bool:
            self._decision = self._decision or self._decide(trainer, [*self._losses, loss.detach()])
            return self._decision.repeats > 0

        with self._before_last_backward(trainer, is_trained_on):
            loss = passes.one(call, self._hits, judges_rows=True)
        backwards = len(self._calls) - (self._decision is not None and self._decision.repeats == 0)
        is_trained_on(loss)  # decides if no backward has asked
        self._losses.append(loss)
        passed_over = self._came
        if self._decision is not None and self._decision.reason == AGAIN:
            self._charge(trainer, backwards, passed_over)
            backwards, passed_over = self._pass_without_broken_rows(passes), self._whole
        assert self._decision is not None
        self._decision = decision = look_at_gradient(passes, self._decision)
        if decision.reason != NO_ROOM:
            self._charge(trainer, backwards, passed_over)
        self._carry_out(passes, decision)
        if math.isfinite(decision.observation.loss):
            return self._as_logged(trainer, loss, decision)
        # No loss of this batch enters the logged mean; the log divides by the other batches.
        trainer._tr_loss.copy_(self._tr_loss_before)
        trainer._run.non_finite_batches += 1
        return torch.zeros_like(loss)

    def _begin(self, passes: Passes, first: Call) -> None:
        trainer, run = passes.trainer, passes.trainer._run
        trainer._continue_log()
        self._marks_before = {flag: run.budget.marks_passed(flag) for flag in ("eval_passes", "save_passes")}
        if run.consensus.loss_scale is None:
            with counted_once(trainer):
                run.consensus.find_loss_scale(trainer, passes.model, first)
        if run.rows is not None:
            run.rows.begin(run.ledger.batches, asks=run.ledger.batches >= setting(trainer.args, "primer_batches"))
        run.extra_forwards = 0
        self._tr_loss_before = trainer._tr_loss.clone()

    def _before_last_backward(self, trainer: Any, wanted: Callable[[Tensor], bool]) -> Any:
        """Return a context in which `wanted` is asked before the last backward of the batch, where that may be left
        out.
        """
        if self._must_finish(trainer):
            return contextlib.nullcontext()
        return before_backward(trainer.accelerator, wanted)

    def _must_finish(self, trainer: Any) -> bool:
        """Tell whether no backward of the batch may be left out.

        Before its last backward, FSDP keeps the gradients of a batch where `zero_grad` does not reach them.
        """
        return bool(trainer.is_fsdp_enabled) and len(self._calls) > 1

    def _as_logged(self, trainer: Any, loss: Tensor, decision: Decision) -> Tensor:
        """Return what the last micro-batch adds to the sum that Trainer logs.

        Where rows were dropped, the losses were divided by the targets of all rows. They are logged as the mean of the
        rows that were kept, on Trainer's scale.
        """
        if self.rows is None or not self.rows.dropped:
            return loss
        share = self._whole.share
        total = torch.stack(self._losses).sum() / share if share else torch.full_like(loss, decision.observation.loss)
        added: Tensor = trainer._tr_loss - self._tr_loss_before
        return total - added.to(loss.device)

    def _charge(self, trainer: Any, backwards: int, held: HeldBatch) -> None:
        trainer.ledger.charge_pass(len(held.calls), backwards, held.tokens, held.forward_flops)

    # ---- The decision ----

    def _decide(self, trainer: Any, losses: list[Tensor]) -> Decision:
        """Average the first-pass loss over ranks, and decide. All ranks see the same, and so decide the same."""
        run = trainer._run
        tallied = tally([call.inputs for call in self._calls], first_target(trainer), trainer.label_names)
        main_input = getattr(trainer.model, "main_input_name", "input_ids")
        hits = summed(self._hits)
        policy = policy_sums(rollouts_of(self._calls))
        cured, lists, longest = self._own_rows(trainer, run.rows)
        came, stays = (sum(call.tokens(main_input) for call in calls) for calls in (self._calls, cured or self._calls))
        costs = (came, stays, run.extra_forwards)
        agreed = run.consensus.begin_mean(
            trainer,
            self._calls,
            losses,
            *(*tallied, *costs, cured is None, *policy, *hits),
            greatest=run.clock.measured(),
            lists=lists,
            longest=longest,
        )()
        run.times = run.clock.agree(agreed.greatest)
        targets, empty_rows, rows, came, stays, extra_forwards, incurable, *others = agreed.sums
        of_policy, of_hits = others[: len(policy)], others[len(policy) :]
        run.policy = Policy.of(trainer, of_policy)
        run.ledger.extra_forwards = Fraction(int(extra_forwards), trainer.args.world_size * len(self._calls))
        trainer._rows_without_targets.count(int(empty_rows), int(rows))
        self.rows = batch_rows(agreed.lists, trainer.args.world_size) if lists else None
        share, flops = self.rows.share if self.rows else 1.0, trainer._forward_flops_per_token
        self._came = HeldBatch(self._calls, int(came), came * flops, share)
        self._calls = cured or self._calls
        self._whole = HeldBatch(self._calls, int(stays), stays * flops, share)
        loss = agreed.mean
        # A custom loss may use more than labels: then a batch without targets is empty only if its loss says so.
        if not targets and (trainer._loss_is_of_tokens or not loss or not math.isfinite(loss)):
            return decide(trainer, math.nan, of_hits, NO_TARGETS)
        if self.rows is not None and self.rows.dropped:
            if self.rows.most_are_dropped:
                return decide(trainer, self.rows.mean_loss, of_hits, TOO_FEW_ROWS)
            if self.rows.has_broken:
                return decide(trainer, math.nan, of_hits, NON_FINITE if incurable else AGAIN)
        return decide(trainer, loss / self._whole.share, of_hits)

    def _own_rows(self, trainer: Any, gate: RowGate | None) -> tuple[list[Call] | None, list[list[float]], int]:
        """Return the micro-batches of this rank with the rows that are kept, None if broken ones cannot be taken out;
        what to tell the other ranks of them; and the most rows that a rank can have.
        """
        if gate is None:
            return self._calls, [], 0
        gate.check_judged(trainer, self._calls)
        kept = self._calls if gate.rule is None else without_broken(self._calls, gate.judged)
        return kept, gate.lists(self._indices), gate.longest

    def _pass_without_broken_rows(self, passes: Passes) -> int:
        """Make the first pass once more, over all micro-batches of all ranks, and decide by it.

        The gradients of the forwards in which broken rows were found are forgotten.

        Returns:
            The backwards that were made now.
        """
        trainer, run = passes.trainer, passes.trainer._run
        passes.forget()
        trainer._tr_loss.copy_(self._tr_loss_before)
        self._decision = None
        if run.budget.is_spent:
            self._decision = decide(trainer, math.nan, [], NO_ROOM)
            return 0

        def is_trained_on(losses: list[Tensor], hits: list[Hits]) -> bool:
            if self._decision is None:
                agreed = run.consensus.begin_mean(trainer, self._calls, losses, *summed(hits))()
                self._decision = decide(trainer, agreed.mean / self._whole.share, agreed.sums)
            return self._decision.repeats > 0

        must_finish = self._must_finish(trainer)
        self._losses, hits = passes.over(self._whole, None if must_finish else is_trained_on)
        return len(self._calls) - (not is_trained_on(self._losses, hits) and not must_finish)

    # ---- Repeats, replays, or a skip ----

    def _carry_out(self, passes: Passes, decision: Decision) -> None:
        """Make all updates but the last, which Trainer makes; or none, and keep Trainer from making it."""
        trainer, run = passes.trainer, passes.trainer._run
        losses, repeats, reason = [decision.observation.loss], decision.repeats, decision.reason
        rule, seen = trainer.repeat_scheduler, decision.observation
        accuracy: float | None = None
        drifts = [run.policy.drift] if run.policy else []

        def keeps_policy(found: Pass) -> bool:
            return found.drift is None or rule.may_update(seen, [*drifts, found.drift])

        while len(losses) < repeats:
            if run.budget.is_spent:  # of seconds, nobody knows before how many passes they buy
                repeats, reason = len(losses), BUDGET
                break
            goes_on = len(losses) == 1 or rule.goes_on(seen, losses, accuracy)
            if not goes_on or (drifts and not rule.may_repeat(seen, drifts)):
                repeats = len(losses)
                break
            passes.update()
            found = passes.again(self._whole, keeps_policy)
            accuracy = found.accuracy
            losses.append(found.loss)
            if not math.isfinite(found.loss):
                repeats, reason = len(losses) - 1, NON_FINITE
            elif not keeps_policy(found):
                repeats, reason = len(losses) - 1, OFF_POLICY
            if found.drift is not None:
                drifts.append(found.drift)
        replayed = self._replay(passes, decision) if 0 < repeats == len(losses) else ()
        if repeats < len(losses) or not all(math.isfinite(loss) for _, loss in replayed):
            passes.withhold_update()
            self.update_is_withheld = True
        if repeats == 0:
            self._excerpts = run.consensus.gather_lists(excerpts(self._arrived))  # all ranks skip it
        if run.rows is not None and self.rows is not None and self.rows.dropped:
            dropped = run.consensus.gather_lists(run.rows.describe_dropped(self._arrived, self.rows))
            self._dropped = with_text(trainer, dropped)
        counts = self.rows is not None and trainer.row_rule is not None
        judged, dropped = (len(self.rows.judged), len(self.rows.dropped)) if counts and self.rows else (0, 0)
        self.outcome = Outcome(
            decision.observation, repeats, tuple(losses), reason, replayed, judged, dropped, tuple(drifts)
        )
        if run.budget.is_spent:
            trainer.state.max_steps = trainer.state.global_step + 1  # Trainer stops, evaluates and saves by its rules
        is_last = trainer.state.global_step + 1 >= trainer.state.max_steps
        by_passes = setting(trainer.args, "eval_passes") is not None
        wants_last = is_last and trainer.args.load_best_model_at_end and by_passes
        crossed = [flag for flag, before in self._marks_before.items() if run.budget.marks_passed(flag) > before]
        self._evaluation_is_due = "eval_passes" in crossed or wants_last
        self._checkpoint_is_due = "save_passes" in crossed

    def _replay(self, passes: Passes, decision: Decision) -> tuple[tuple[int, float], ...]:
        """Pass over the earlier batches that the rule names, up to the first whose loss is not finite."""
        if decision.reason == "primer":
            return ()
        rule, run = passes.trainer.repeat_scheduler, passes.trainer._run
        replayed: list[tuple[int, float]] = []
        for index in rule.replay(decision.observation):
            if index not in run.held:
                must = 'batches that it held, by index from 0; to hold any, it must have "inputs" in `wants`'
                raise BadDecision(rule, "replay", index, must)
            if run.budget.left < 1:
                break
            passes.update()
            loss = passes.again(run.held[index]).loss
            replayed.append((index, loss))
            if not math.isfinite(loss):
                break
        return tuple(replayed)

    # ---- The outcome ----

    def finish(self, trainer: Any, outcome: Outcome) -> None:
        """Tell the rule, the log and the callbacks what became of the batch, after Trainer's update."""
        assert self._decision is not None
        seconds = self.seconds
        control = trainer.control
        control.should_evaluate = control.should_evaluate or self._evaluation_is_due
        control.should_save = control.should_save or self._checkpoint_is_due
        trainer.accelerator.gradient_state._set_sync_gradients(True)  # a skip has switched it off, for the process
        trainer._run.count(outcome, seconds)
        say_what_is_left_out(trainer, outcome, self._dropped, self._excerpts)
        say_if_waiting(trainer)
        trainer.repeat_scheduler.observe(outcome)
        if trainer._run.rows is not None and self.rows is not None:
            trainer._run.rows.observe(self.rows)
        self._hold(trainer)
        for callback in trainer.callback_handler.callbacks:
            if hasattr(callback, "on_outcome"):
                callback.on_outcome(
                    trainer.args,
                    trainer.state,
                    trainer.control,
                    outcome=outcome,
                    ledger=trainer.ledger,
                    learning_rate=self._decision.learning_rate,
                    seconds=seconds,
                    times=trainer._run.times,
                    memory=memory_of_batch(trainer.args.device),
                    excerpts=self._excerpts,
                    rows=self.rows,
                    dropped_rows=self._dropped,
                )

    def _hold(self, trainer: Any) -> None:
        """Keep the inputs of the batches that the rule wants to come back to, and no others."""
        rule, run = trainer.repeat_scheduler, trainer._run
        if "inputs" not in rule.wants or self._decision is None:
            return
        check_holdable(self._calls)
        batches = {**run.held, self._decision.observation.batch: self._whole}
        wanted = set(rule.held())
        run.held = {index: batch for index, batch in batches.items() if index in wanted}
