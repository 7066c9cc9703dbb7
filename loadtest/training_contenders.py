"""The contenders of ``medassist bench train``: this project's step, a minimal loop, and Hugging Face's Trainer.

All of them train a model of the same weights on the same windows in the same order, with fused AdamW, the same clipping
and a constant learning rate. A window of T tokens has T - 1 targets in each, since ``forward(labels=...)`` of Hugging
Face's models shifts the labels within the window.
"""

import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modeling.layers.objective import IGNORED
from training import acceleration, parallel
from training.data import Batch, Windows
from training.loop import train_step
from training.optimizer import Optimizers

OURS, TRAINER, MINIMAL = "medassist", "Trainer", "minimal loop"
LR, WEIGHT_DECAY, BETAS, CLIP = 3e-4, 0.1, (0.9, 0.95), 1.0


@dataclass(frozen=True)
class Turn:
    """What a contender did in one round.

    Attributes:
        who: its name.
        seconds: CPU-seconds of the process, all threads; of a GPU run the time passed, the GPU waited for.
        passed: seconds passed.
        losses: of each step, in nats a token.
        loading: of ``seconds``, those in which batches were made; 0 where that is not known.
        memory: bytes of GPU memory that a step took beyond weights and the optimizer's state; 0 on CPUs.
    """

    who: str
    seconds: float
    passed: float
    losses: list[float]
    loading: float = 0.0
    memory: int = 0


class Stopwatch:
    """Seconds since it was made, as :class:`Turn` counts them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._used, self._passed = used(device), time.perf_counter()

    def read(self) -> tuple[float, float]:
        """``seconds`` and ``passed``."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return used(self.device) - self._used, time.perf_counter() - self._passed


def used(device: torch.device) -> float:
    """CPU-seconds of the process so far; with a GPU the clock, as the GPU is what is to be used."""
    return time.perf_counter() if device.type == "cuda" else time.process_time()


@dataclass(frozen=True)
class Work:
    """What all contenders do. ``windows`` are stretches of text: a model needs no mask for them."""

    windows: Windows
    batch_size: int
    precision: torch.dtype
    device: torch.device

    def rows(self, first: int, steps: int) -> np.ndarray:
        """Numbers of the windows of some steps: (steps, batch_size)."""
        return self.windows.numbers(first * self.batch_size, steps * self.batch_size).reshape(steps, -1)

    def window(self, number: int) -> Tensor:
        """(T,) int64, read from the mapped file."""
        which = int(np.searchsorted(self.windows.first_of_shard, number, side="right")) - 1
        start = int(number - self.windows.first_of_shard[which]) * self.windows.window
        ids = self.windows.shards[which].tokens[start : start + self.windows.window]
        return torch.from_numpy(ids.astype(np.int64))


@dataclass(frozen=True)
class Choice:
    """What may be changed of our step.

    Attributes:
        name: as it was asked for.
        fused: AdamW in one kernel; else torch's own choice without it.
    """

    name: str = OURS
    precision: torch.dtype | None = None
    compile: bool = False
    activation_checkpointing: bool = False
    fused: bool = True
    loss_chunk: int = 0
    batch_size: int = 0


class Ours:
    """:func:`training.loop.train_step`, with the recipe's way of making batches.

    Args:
        model: copied, not changed.
        choice: options that differ from those of ``work``.
    """

    def __init__(self, model: Any, work: Work, choice: Choice | None = None) -> None:
        self.work, choice = work, choice or Choice()
        self.name = choice.name
        self.batch_size = choice.batch_size or work.batch_size
        model = deepcopy(model)
        model.loss_chunk = choice.loss_chunk
        if choice.compile:
            acceleration.compile_layers(model)
        if choice.activation_checkpointing:
            acceleration.checkpoint_activations(model)
        self.trainable = parallel.distribute(model, parallel.start(), "auto", choice.precision or work.precision)
        self.optimizers = Optimizers(model, "adamw", LR, WEIGHT_DECAY, BETAS)
        if not choice.fused:
            for group in self.optimizers.all[0].param_groups:
                group["fused"] = None
        model.train()

    def turn(self, first: int, steps: int) -> Turn:
        device, losses, loading = self.work.device, [], 0.0
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        watch = Stopwatch(device)
        for step in range(first, first + steps):
            start = used(device)
            parts = self.work.windows.micro_batches(step, self.batch_size, self.batch_size)
            for part in parts:
                part.labels[:, -1] = IGNORED
            loading += used(device) - start
            losses.append(train_step(self.trainable, self.optimizers, parts, CLIP).losses["loss"])
        seconds, passed = watch.read()
        memory = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else 0
        return Turn(self.name, seconds, passed, losses, loading, memory)


class Minimal:
    """The loop that one writes by hand, after nanoGPT's: a batch from the mapped file, ``forward``, ``backward``,
    clipping, AdamW. Losses stay on the device until the turn is over."""

    name = MINIMAL

    def __init__(self, model: Any, work: Work) -> None:
        self.work = work
        self.model = deepcopy(model).to(work.device).train()
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)

    def turn(self, first: int, steps: int) -> Turn:
        work, losses = self.work, []
        rows = work.rows(first, steps)
        watch = Stopwatch(work.device)
        for row in rows:
            ids = torch.stack([work.window(number) for number in row])
            if work.device.type == "cuda":
                ids = ids.pin_memory().to(work.device, non_blocking=True)
            with acceleration.autocast(work.device, work.precision):
                loss = self.model(input_ids=ids, labels=ids).loss
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        seconds, passed = watch.read()
        return Turn(self.name, seconds, passed, torch.stack(losses).tolist())


def with_trainer(
    model: Any, work: Work, rounds: int, steps: int, between: Callable[[int], None], after: Callable[[Turn], None]
) -> None:
    """Trains with Hugging Face's Trainer, which is held after each round of steps while others have their turns.

    Its start is not counted, and it neither logs, saves nor evaluates.

    Args:
        model: copied, not changed.
        between: called with the number of each round that the Trainer has finished, after ``after``.
        after: called with each turn of the Trainer.
    """
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    model = deepcopy(model)
    losses: list[Tensor] = []
    model.register_forward_hook(lambda _module, _inputs, output: losses.append(output.loss.detach()))
    numbers = work.rows(0, rounds * steps).flatten()

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(numbers)

        def __getitem__(self, at: int) -> dict[str, Tensor]:
            ids = work.window(numbers[at])
            return {"input_ids": ids, "labels": ids}

    class Turns(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.watch = Stopwatch(work.device)

        def on_step_end(self, _arguments: Any, state: Any, _control: Any, **__: Any) -> None:
            if state.global_step % steps:
                return
            seconds, passed = self.watch.read()
            after(Turn(TRAINER, seconds, passed, torch.stack(losses).tolist()))
            losses.clear()
            between(state.global_step // steps - 1)
            self.watch = Stopwatch(work.device)

    with tempfile.TemporaryDirectory(prefix="medassist-benchmark-") as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=rounds * steps,
            per_device_train_batch_size=work.batch_size,
            optim="adamw_torch_fused",
            learning_rate=LR,
            weight_decay=WEIGHT_DECAY,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            max_grad_norm=CLIP,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            bf16=work.precision == torch.bfloat16,
            use_cpu=work.device.type == "cpu",
            dataloader_pin_memory=work.device.type == "cuda",
            eval_strategy="no",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[Turns()])
        trainer.remove_callback(PrinterCallback)  # prints a summary of its own
        trainer.train()


def loading_seconds(windows: Windows, batch_size: int, steps: int, device: torch.device) -> float:
    """What making a step's batch costs alone, in seconds as :class:`Turn` counts them."""
    start = used(device)
    made: list[Batch] = []
    for step in range(steps):
        made = windows.micro_batches(step, batch_size, batch_size)
    assert made
    return (used(device) - start) / steps
