"""The one training loop of all stages: transformers' Trainer fed by step number, with exact resume."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback

from mmllm.contracts import StepHook
from mmllm.data.loader import loader_plan
from mmllm.errors import UserError
from mmllm.train.batches import BatchFn, StepBatches
from mmllm.train.disk import publish_folder, writing
from mmllm.train.launch import available_cores, is_main, local_processes, set_threads
from mmllm.train.params import ParamGroup, as_groups, print_trainable
from mmllm.train.progress import MetricsLog, ProgressReport
from mmllm.train.run import HELD_OUT, RunFolder
from mmllm.train.section import TrainSection
from mmllm.train.sharded_trainer import ShardedTrainer

WEIGHTS = "model.safetensors"


class MMTrainer(ShardedTrainer):
    """Trains one phase of a stage.

    Usage of a stage::

        run = RunFolder.open(out, "pretrain", config, resume, seed=config.train.seed)
        trainer = MMTrainer(model, batch_fn, groups, config.train, run)
        summary = trainer.fit()
        if is_main():
            with run.final() as folder:
                model.save_pretrained(folder)

    The model must be the same at every start of the run: seed (``transformers.set_seed(train.seed)``) before making
    it. A checkpoint then holds what trains, all buffers, and the states of optimizer, schedule and random generators;
    frozen weights come from their source again.

    Args:
        model: ``model(batch) -> {"loss": scalar or [B], ...}``; further entries that are scalar tensors are averaged
            over the steps between two log lines and logged by their names.
        batch_fn: ``batch_fn(step, rank, world) -> batch``, where step counts micro-batches (optimizer steps times
            ``gradient_accumulation_steps``). A pure function: it must not draw from the global random generators, as it
            runs in a background thread. A batch is a dict (or dataclass) of tensors and other things; tensors are moved
            to the device. Its entry ``num_items`` (int), where present, says how many targets the mean loss is over:
            accumulation steps and processes are then weighted by it, so that the update equals that of one big batch.
        groups: what trains, as ParamGroups or ``(name, params, lr)``; everything else must be frozen
            (``set_trainable`` does it). ``lr`` None means the section's ``learning_rate``.
        section: the config's ``train``.
        run: the run folder.
        phase: name of the phase when a stage has several; each has its checkpoints in ``checkpoints/PHASE``.
        items: number of training items, needed only when the length is given by ``num_train_epochs``.
        hooks: StepHooks, called around every micro-batch.
        also_save: prefixes of frozen parameters that change all the same (a moving-average teacher).
        held_out: gives the loss on items that are not trained on; measured at each checkpoint, of which the best is
            kept beside the last ones. It must draw from no global random generator.
        unpack_batch: call ``model(**batch)`` instead of ``model(batch)``.
        overrides: TrainingArguments that win over the section (a phase's ``max_steps``, ``learning_rate``).

    Raises:
        UserError: values that TrainingArguments refuses.
        ValueError: ``groups`` do not match what is trainable.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_fn: BatchFn,
        groups: Sequence[ParamGroup | tuple],
        section: TrainSection,
        run: RunFolder,
        *,
        phase: str = "",
        items: int | None = None,
        hooks: Sequence[StepHook] = (),
        also_save: Sequence[str] = (),
        held_out: Callable[[], float] | None = None,
        unpack_batch: bool = False,
        **overrides: Any,
    ):
        set_threads(section.threads)
        self.batch_fn, self.section, self.run, self.phase = batch_fn, section, run, phase
        self.groups = as_groups(groups)
        self.hooks, self.also_save, self.unpack_batch = list(hooks), tuple(also_save), unpack_batch
        self.held_out = held_out
        args = section.to_arguments(run.checkpoints(phase), items, **overrides)
        self.progress = ProgressReport(phase or run.stage)
        self._saving_to: Path | None = None
        self._terms: dict[str, Tensor] = {}
        self._terms_count = 0
        super().__init__(model, args, callbacks=[self.progress, MetricsLog(run, phase)])
        self.remove_callback(PrinterCallback)
        # The model gives a mean; we scale it by num_items ourselves, so the Trainer only divides by accumulation.
        self.model_accepts_loss_kwargs = False
        self.followers: list[Any] = [m for m in model.modules() if hasattr(m, "after_step")]
        for hook in self.hooks:
            hook.groups = {g.name: g.params for g in self.groups}
        if self.hooks or self.followers:
            self.add_callback(_StepCallback(self))

    # ---- the run ----

    def fit(self) -> dict[str, Any]:
        """Trains to the end, from the last checkpoint where there is one.

        Returns:
            ``{"steps", "loss" (last logged), "seconds", "resumed_from"}``.

        Raises:
            UserError: a checkpoint that does not fit the model, or a loss that is not finite.
        """
        print_trainable(self.model, self.groups, self.args.learning_rate)
        last = self.run.last_checkpoint(self.phase)
        start = int(last.name.split("-")[1]) if last else 0
        try:
            if last is not None and start >= self.args.max_steps:
                self._load_from_checkpoint(str(last))
            else:
                self.model.train()  # parts may be in eval mode inside a model that is not, and would lack their dropout
                self.train(resume_from_checkpoint=str(last) if last else None)
                if self.run.last_checkpoint(self.phase) is None:  # save_strategy "no": still mark the phase as done
                    self._save_checkpoint(self.model_wrapped, None)
            self._free_model()
        finally:
            self.progress.close()
        self.run.update()
        rows = [r for r in self.run.read_metrics() if r.get("phase", "") == self.phase and "loss" in r]
        ended = rows[-1] if rows else {}
        return {
            "steps": self.args.max_steps,
            "loss": ended.get("loss"),
            "seconds": ended.get("seconds", 0.0),
            "resumed_from": start,
        }

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader:
        length = self.args.max_steps * self.args.gradient_accumulation_steps
        a = self.args
        prefetch = self.section.prefetch
        if prefetch is None:
            prefetch = loader_plan(a.device.type, available_cores(), local_processes()).prefetch
        self._batches = StepBatches(self.batch_fn, length, a.process_index, a.world_size, prefetch)
        # A batch sampler of single numbers lets a resumed run skip by number, without making the skipped batches.
        return DataLoader(self._batches, batch_sampler=[[i] for i in range(length)], collate_fn=itemgetter(0))

    def train(self, *args: Any, **kwargs: Any):
        self._batches: StepBatches | None = None
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._batches is not None:
                self._batches.close()

    def _prepare_input(self, data: Any) -> Any:
        if self.args.device.type == "cpu" and not self.is_deepspeed_enabled:
            return data  # it is there already; looking at each name and box of a large batch takes milliseconds
        if dataclasses.is_dataclass(data) and not isinstance(data, type):
            fields = {f.name: self._prepare_input(getattr(data, f.name)) for f in dataclasses.fields(data) if f.init}
            return dataclasses.replace(data, **fields)
        return super()._prepare_input(data)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> float | None:
        """Targets of this optimizer step over micro-batches and processes; None when batches don't count them."""
        if not batch_samples or not isinstance(batch_samples[0], dict) or "num_items" not in batch_samples[0]:
            return None
        total = float(sum(float(b["num_items"]) for b in batch_samples))
        if self.args.world_size > 1:
            counts = self.accelerator.gather(torch.tensor([total], device=device))
            total = float(counts.sum())  # type: ignore[union-attr]
        return total

    # ---- one step ----

    # The Trainer walks over all modules and parameters three times a step (train mode, clipping, zeroing); with a large
    # frozen model that costs more than training a small connector, so these touch only what trains.

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        model, loader = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._trained = [p for group in self.groups for p in group.params]
        if self._native_format():
            model.zero_grad = self._zero_grad
        return model, loader

    def _zero_grad(self, set_to_none: bool = True) -> None:
        for p in self._trained:
            p.grad = None

    def _clip_grad_norm(self, model):
        if not self._native_format() or self.accelerator.scaler is not None:
            return super()._clip_grad_norm(model)
        return nn.utils.clip_grad_norm_(self._trained, self.args.max_grad_norm)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if not model.training:
            model.train()
        inputs = self._prepare_inputs(inputs)
        loss: Tensor = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)  # type: ignore[assignment]
        loss = loss / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}))
        for hook in self.hooks:
            hook.after_backward(self.model, self.state.global_step)
        return loss.detach()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss of one micro-batch, scaled so that the sum over micro-batches (mean over processes) is the mean loss."""
        step = self.state.global_step
        for hook in self.hooks:
            hook.before_forward(self.model, inputs, step)
        outputs = model(**inputs) if self.unpack_batch else model(inputs)
        for hook in self.hooks:
            hook.after_loss(self.model, inputs, outputs, step)
        loss = outputs["loss"].mean() if outputs["loss"].ndim else outputs["loss"]
        for name, value in outputs.items():
            if name != "loss" and isinstance(value, Tensor) and value.ndim == 0:
                held = self._terms.get(name)
                self._terms[name] = value.detach().float() if held is None else held + value.detach().float()
        self._terms_count += 1
        if num_items_in_batch:
            # The Trainer divides by the accumulation steps and DDP by the processes: undo both.
            pieces = self.args.world_size * self.current_gradient_accumulation_steps
            share = float(inputs["num_items"]) / num_items_in_batch * pieces
            loss = loss * share if share != 1.0 else loss
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the named loss terms; stops the run when the loss is not a number.

        Raises:
            UserError: the loss is NaN or infinite.
        """
        if "loss" in logs:
            for name, total in self._terms.items():
                logs.setdefault(name, float(total) / max(self._terms_count, 1))
            self._terms, self._terms_count = {}, 0
            if not torch.isfinite(torch.tensor(logs["loss"])):
                where = f"step {self.state.global_step}"
                raise UserError(f"the loss is {logs['loss']}", where, "lower train.learning_rate or check the data")
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated: the Trainer's formula knows nothing of towers and costs a walk over all parameters a step."""
        return 0

    # ---- optimizer ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One optimizer group per parameter group, split by whether weight decay applies."""
        if self.optimizer is None:
            grouped = []
            for group in self.groups:
                decay = self.args.weight_decay if group.weight_decay is None else group.weight_decay
                lr = self.args.learning_rate if group.lr is None else group.lr
                for params, value in (
                    ([p for p in group.params if p.ndim >= 2], decay),
                    ([p for p in group.params if p.ndim < 2], 0.0),
                ):
                    if params:
                        grouped.append({"params": params, "lr": lr, "weight_decay": value, "name": group.name})
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            try:
                self.optimizer = optimizer_class(grouped, **kwargs)
            except TypeError:
                raise UserError(f"optimizer '{self.args.optim}' takes no parameter groups", "train.optim") from None
        return self.optimizer

    # ---- checkpoints ----

    def _state_names(self) -> set[str]:
        """What a checkpoint must hold: parameters that train, those named by ``also_save``, and all buffers."""
        names = {n for n, p in self.model.named_parameters() if p.requires_grad or n.startswith(self.also_save)}
        params = {n for n, _ in self.model.named_parameters(remove_duplicate=False)}
        buffers = set(self.model.state_dict()) - params
        # Weights in 4 bits put their scales beside them in the state dict, under their own name.
        inside = {b for b in buffers if any(b[:i] in params for i, c in enumerate(b) if c == ".")}
        return names | (buffers - inside)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._saving_to) if self._saving_to is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes the checkpoint under another name and renames it when complete, so a kill leaves no half of one."""
        folder = self.run.checkpoints(self.phase)
        name = f"checkpoint-{self.state.global_step}"
        self._saving_to = folder / f"{name}.part"
        if is_main():
            shutil.rmtree(self._saving_to, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        part = self._saving_to
        measured = None if self.held_out is None else self._measure_held_out()
        try:
            with writing("a checkpoint", folder):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if is_main():
                    if measured is not None:
                        (part / name / HELD_OUT).write_text(json.dumps({"held_out_loss": measured}))
                    publish_folder(part / name, folder / name)
                    part.rmdir()
        except UserError:
            shutil.rmtree(part, ignore_errors=True)
            raise
        finally:
            self._saving_to = None
        if is_main():
            self.run.prune(self.args.save_total_limit, self.phase)
            self.run.update()
        self.accelerator.wait_for_everyone()

    def _measure_held_out(self) -> float:
        """The held-out loss in evaluation mode, also written to ``metrics.jsonl``; every module's mode comes back."""
        assert self.held_out is not None
        modes = [(m, m.training) for m in self.model.modules()]
        self.model.eval()
        try:
            with torch.no_grad():
                loss = float(self.held_out())
        finally:
            for module, mode in modes:
                module.training = mode
        phase = {"phase": self.phase} if self.phase else {}
        self.run.log({"step": self.state.global_step, **phase, "held_out_loss": loss})
        if is_main():
            print(f"{self.phase or self.run.stage} {self.state.global_step}: held-out loss {loss:.4f}", flush=True)
        return loss

    def load_best(self) -> int | None:
        """Takes the weights of the checkpoint with the lowest held-out loss; returns its step."""
        best = self.run.best_checkpoint(self.phase)
        if best is None:
            return None
        self._load_from_checkpoint(str(best))
        return int(best.name.split("-")[1])

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir) if output_dir else self.run.checkpoints(self.phase)
        folder.mkdir(parents=True, exist_ok=True)
        state = state_dict if state_dict is not None else self.model.state_dict()
        wanted = self._state_names()
        tensors = {n: t.detach().contiguous() for n, t in state.items() if n in wanted}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Loads exactly what a checkpoint of this run must hold: a missing or foreign weight is an error."""
        target = self.model if model is None else model
        file = Path(resume_from_checkpoint) / WEIGHTS
        do = "start anew with another --out"
        if not file.is_file():
            raise UserError(f"this checkpoint has no {WEIGHTS}", resume_from_checkpoint, do)
        loaded, wanted = load_file(file), self._state_names()
        odd = sorted(wanted ^ set(loaded))
        if odd:
            what = "lacks" if odd[0] in wanted else "has, and the model does not train,"
            raise UserError(f"the checkpoint {what} '{odd[0]}' ({len(odd)} such weights)", resume_from_checkpoint, do)
        current = target.state_dict()
        wrong = [n for n, t in loaded.items() if current[n].shape != t.shape]
        if wrong:
            shapes = f"{tuple(loaded[wrong[0]].shape)} in the checkpoint, {tuple(current[wrong[0]].shape)} in the model"
            raise UserError(f"'{wrong[0]}' is {shapes}", resume_from_checkpoint, do)
        target.load_state_dict(loaded, strict=False)


class _StepCallback(TrainerCallback):
    """Calls StepHooks before, and whatever has an ``after_step`` after, each optimizer step."""

    def __init__(self, trainer: MMTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for hook in self.trainer.hooks:
            hook.before_optimizer_step(self.trainer.model, state.global_step)

    def on_optimizer_step(self, args, state, control, **kwargs):
        with torch.no_grad():
            for module in self.trainer.followers:
                module.after_step(self.trainer.model)
