"""The two that benchmarks time: this product's forward and post-processing, and transformers', which trains, too.

Both compute the same model: the weights of ours are copied into theirs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.bench.inputs import Pairs, settings_of, squad_of
from pipeline.bert.config import BertConfig
from pipeline.bert.encoder import initialise
from pipeline.bert.folder import HEADS, POOLER, ModelFolder
from pipeline.bert.packing import Batch
from pipeline.bert.weight_files import load_into
from pipeline.engine.precision import AUTOCAST
from pipeline.engine.ranks import Ranks
from pipeline.finetune.glue import TASKS
from pipeline.finetune.options import SQUAD
from pipeline.finetune.predict import packed
from pipeline.finetune.problems import GlueProblem, Problem, SquadProblem
from pipeline.finetune.samples import Samples
from pipeline.finetune.table import Table

PAIR_TASK = TASKS["mrpc"]  # two texts, two classes
N_BEST, LONGEST_ANSWER = 20, 30


class Engine(Protocol):
    """One way from text to answers, for sequences of one task."""

    name: str

    def inputs(self, samples: Samples) -> Any:
        """Tokenised samples as this engine's forward wants them, on the device."""

    def forward(self, inputs: Any) -> tuple[Tensor, ...]:
        """Logits: ``(start [N, L], end [N, L])`` or ``(classes [N, 2],)``; computed when it returns."""

    def answers(self, pairs: Pairs) -> list[str]:
        """The whole way: an answer or a class for each pair of texts."""


class Pipeline:
    """This product: WordPiece, packing without pads, our model, the post-processing of `pipeline.finetune`."""

    name = "pipeline"

    def __init__(self, task: str, folder: ModelFolder, seq_len: int, device: torch.device, precision: str) -> None:
        self.device, self.seq_len, self.ranks = device, seq_len, Ranks(0, 1, None, device)
        settings = settings_of(seq_len)
        self.squad = SquadProblem(settings, folder.tokenizer) if task == SQUAD else None
        self.glue = GlueProblem(PAIR_TASK, settings, folder.tokenizer)
        self.model = model_of(self.squad or self.glue, folder).to(device, AUTOCAST.get(precision, torch.float32))

    def ask(self, pairs: Pairs) -> Samples:
        """The pairs as samples, one each, which the next judgement refers to."""
        if self.squad:
            return self.squad.ask(squad_of(pairs))
        columns = ([first for first, _ in pairs], [second for _, second in pairs])
        return self.glue.ask(Table(columns, None, list(range(len(pairs)))))

    def inputs(self, samples: Samples) -> Batch:
        return packed(samples, self.device, self.seq_len)

    def forward(self, inputs: Batch) -> tuple[Tensor, ...]:
        outputs = self.model(inputs)
        _wait_for(self.device)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def answers(self, pairs: Pairs) -> list[str]:
        logits = [values.float().cpu().numpy() for values in self.forward(self.inputs(self.ask(pairs)))]
        if self.squad:
            files, _ = self.squad.judge([np.stack(row, axis=-1) for row in zip(*logits, strict=True)], self.ranks)
        else:
            files, _ = self.glue.judge(list(logits[0]), self.ranks)
        return list(files["predictions.json"].values())


class Transformers:
    """Hugging Face's tokenizer, model and the n-best decoding of its examples; padded to the longest of a batch."""

    name = "transformers"

    def __init__(self, ours: Pipeline, folder: ModelFolder) -> None:
        import transformers

        self.device, self.seq_len = ours.device, ours.seq_len
        model = of_transformers(ours.model, folder.config)
        self.model = model.to(ours.device, next(ours.model.parameters()).dtype).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder.path, local_files_only=True)
        self.cut = "only_second" if ours.squad else "longest_first"

    def inputs(self, samples: Samples) -> dict[str, Tensor]:
        return padded(samples, self.device)

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.model(**inputs).to_tuple()
        _wait_for(self.device)
        return outputs

    def answers(self, pairs: Pairs) -> list[str]:
        encoded = self.tokenizer(
            *map(list, zip(*pairs, strict=True)),
            truncation=self.cut,
            max_length=self.seq_len,
            padding="longest",
            return_tensors="pt",
            return_offsets_mapping=self.cut == "only_second",
        )
        names = ("input_ids", "attention_mask", "token_type_ids")
        outputs = self.forward({name: encoded[name].to(self.device) for name in names})
        logits = [values.float().cpu().numpy() for values in outputs]
        if self.cut != "only_second":
            return [PAIR_TASK.labels[i] for i in logits[0].argmax(1).tolist()]
        offsets = encoded["offset_mapping"].numpy()
        inside = (encoded["token_type_ids"] * encoded["attention_mask"]).numpy().astype(bool)
        return [
            best_text([(start, end, offsets[i], inside[i])], pairs[i][1])
            for i, (start, end) in enumerate(zip(*logits, strict=True))
        ]


def padded(samples: Samples, device: torch.device) -> dict[str, Tensor]:
    """Samples as transformers' model takes them, a row each, as long as the longest."""
    lengths = samples.lengths
    real = np.arange(lengths.max()) < lengths[:, None]
    ids = np.zeros(real.shape, np.int64)
    ids[real] = samples.tokens
    segments = (np.arange(lengths.max()) >= samples.b_start[:, None]) & real
    inputs = {"input_ids": ids, "attention_mask": real.astype(np.int64), "token_type_ids": segments.astype(np.int64)}
    return {name: torch.from_numpy(values).to(device) for name, values in inputs.items()}


def of_transformers(ours: nn.Module, config: BertConfig) -> nn.Module:
    """Hugging Face's model of a task with the weights of ours."""
    import transformers

    kind = getattr(transformers, type(ours).__name__)
    described = transformers.BertConfig(**config.to_hugging_face(vocab_size=config.vocab_size))
    model: nn.Module = kind._from_config(described, attn_implementation="sdpa")
    own = model.state_dict().keys()
    model.load_state_dict({name: tensor for name, tensor in ours.state_dict().items() if name in own})
    return model


def transformers_step(
    model: nn.Module, precision: str, batches: Callable[[int], Sequence[Mapping[str, Tensor]]], *, scaled: bool = False
) -> Callable[[int, float], Tensor]:
    """A training step as Hugging Face's users make it, on the micro-batches that ``batches`` gives for its number.

    ``scaled``: with torch's loss scale in fp16. A step returns the mean of the losses.
    """
    device = next(model.parameters()).device
    trained: Any = nn.parallel.DistributedDataParallel(model.train()) if dist.is_initialized() else model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    scale = torch.amp.GradScaler(device.type, enabled=scaled and precision == "fp16")

    def step(number: int, learning_rate: float) -> Tensor:
        repeatable = torch.are_deterministic_algorithms_enabled()  # ours; its users run it without
        torch.use_deterministic_algorithms(False)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        parts, losses = batches(number), []
        for place, part in enumerate(parts, 1):
            waits = dist.is_initialized() and place < len(parts)
            with trained.no_sync() if waits else nullcontext():
                with autocast(precision, device):
                    loss = trained(**part).loss / len(parts)
                scale.scale(loss).backward()
            losses.append(loss.detach())
        scale.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale.step(optimizer)
        scale.update()
        optimizer.zero_grad(set_to_none=True)
        torch.use_deterministic_algorithms(repeatable)
        return torch.stack(losses).sum()

    return step


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """torch's own, for those who have nothing of ours."""
    return torch.autocast(device.type, dtype=AUTOCAST.get(precision, torch.bfloat16), enabled=precision in AUTOCAST)


Window = tuple[Any, Any, Any, Any]
"""Start and end logits of a window's tokens, their characters in the context, and which lie in it."""


def best_text(windows: Iterable[Window], context: str) -> str:
    """The n-best answer of transformers' question answering examples: 20 starts, 20 ends, softmax, the best text."""
    spans = []
    for start, end, offsets, inside in windows:
        ends = [j for j in np.argsort(-end)[:N_BEST].tolist() if inside[j]]
        for i in (i for i in np.argsort(-start)[:N_BEST].tolist() if inside[i]):
            spans += [(start[i] + end[j], offsets[i][0], offsets[j][1]) for j in ends if i <= j < i + LONGEST_ANSWER]
    best = sorted(spans, reverse=True)[:N_BEST]
    texts = [context[first:last] for _, first, last in best]
    weights = np.exp([score - best[0][0] for score, _, _ in best])
    answers = [{"text": text, "probability": p} for text, p in zip(texts, weights / weights.sum(), strict=True)]
    return answers[0]["text"] if answers else ""


def model_of(problem: Problem, folder: ModelFolder) -> nn.Module:
    """The task's model with the folder's encoder and a random head; all of it random when the folder has no weights."""
    model = problem.new_model(folder.config)
    initialise(model, folder.config, torch.Generator().manual_seed(0))
    if folder.has_weights:
        new = HEADS if any(name.startswith(POOLER) for name in folder.state) else (*HEADS, POOLER)
        load_into(model, folder.state, origin=str(folder.path), new=new, drop=HEADS)
    return model.eval()


def transformers_is_there() -> bool:
    """Whether the other engine can be timed here."""
    return importlib.util.find_spec("transformers") is not None


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
