"""The dry run: one real step through the real trainer, with everything shown and nothing saved."""

import itertools
import resource
from typing import Any

import pytorch_lightning as pl
import torch

from distill.losses.chunked import chunk_size
from distill.module import DistillModule
from distill.report import tables
from distill.report.run import describe
from distill.report.sources.situation import situation
from distill.report.sources.sources import recommend, table
from distill.tasks import unwrap
from distill.teachers.several import teachers_of

MB = 1e6


class DryRun(pl.Callback):
    """Shows the data, the vocabularies, the sizes and a memory estimate, then lets one step run and says what it took."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show what would run."""
        assert isinstance(pl_module, DistillModule)
        tables.show(tables.banner("What would run", describe(trainer, pl_module)))
        tables.show(tables.banner("Vocabulary", vocabulary(pl_module)))
        print(f"First training row, trained tokens between ⟦ and ⟧:\n{marked(pl_module.data.example())}\n")
        tables.show(tables.banner("Memory per device, estimated", {k: f"{v / MB:,.1f} MB" for k, v in memory(pl_module).items()}))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Say that the step went well, compare the sources of the signal, and stop."""
        if trainer.global_step < 1:
            return
        trainer.should_stop = True
        if torch.cuda.is_available():
            peak, what = torch.cuda.max_memory_allocated(), "on the device"
        else:
            peak, what = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "of the whole process, libraries included"
        loss = float(trainer.callback_metrics["train/loss"])
        print(f"One real forward and backward: fine. loss {loss:.4f}, peak memory {peak / MB:,.0f} MB {what}")
        assert isinstance(pl_module, DistillModule)
        if pl_module.teacher is not None:
            parts = memory(pl_module)
            look = situation(trainer, pl_module, args[1], parts["sum"] - parts["teacher"])
            tables.show(table(look))
            print(recommend(look))


def vocabulary(module: DistillModule) -> dict[str, str]:
    """How many tokens or labels the data have, and how many rows each head has for them."""
    rows = {"data": f"{module.data.num_classes:,} classes; tokenizer of {len(module.data.tokenizer):,} tokens"}
    assert module.student is not None, "configure_model comes first"
    teachers = [] if module.teacher is None else [each.structure() for each in teachers_of(module.teacher)]
    names = ["teacher"] if len(teachers) == 1 else [f"teacher {number}" for number, _ in enumerate(teachers, start=1)]
    for name, model in zip(["student", *names], [module.student, *teachers], strict=True):
        if model is None:
            continue
        config = unwrap(model).config.get_text_config()
        head = config.num_labels if module.task.unit == "sample" else config.vocab_size
        rows[name] = f"head of {head:,}; {head - module.data.num_classes:,} left out before the softmax"
    if module.teacher is not None:
        rows["same tokens"] = "yes, teacher and data agree on every token's id"
    return rows


def marked(example: list[tuple[str, bool]], longest: int = 2000) -> str:
    """The text of an example, with what is trained on between ⟦ and ⟧."""
    runs = itertools.groupby(example, key=lambda pair: pair[1])
    text = "".join(f"⟦{piece}⟧" if trained else piece for trained, pairs in runs for piece in ["".join(t for t, _ in pairs)])
    return text if len(text) <= longest else f"{text[:longest]} … ({len(example)} tokens)"


def memory(module: DistillModule) -> dict[str, float]:
    """Estimate the bytes on a device, by part.

    Parameters, gradients and AdamW's two moments, all of the parameters' dtype, are exact. Activations follow Korthikanti et al. 2022
    (arXiv 2205.05198, equation 1, without the attention scores, which fused attention does not keep): 17 values a position, width and
    layer; with gradient checkpointing one. Logits: the four float32 `[chunk, V]` copies of each side that exist at once, and beside
    them what a dense loss would need for the whole micro-batch.
    """
    assert module.student is not None, "configure_model comes first"
    student = list(module.student.parameters())
    trainable = float(sum(p.numel() * p.element_size() for p in student if p.requires_grad))
    model = unwrap(module.student)
    config: Any = model.config.get_text_config()
    width, layers = config.hidden_size, config.num_hidden_layers  # every config has them, GPT-2's n_embd under this name too
    positions, classes = module.data.batch_size * module.data.max_length, module.data.num_classes
    predictions = positions if module.task.unit == "token" else module.data.batch_size
    per_value = 1 if model.is_activation_checkpointing else 17
    teachers = [] if module.teacher is None else teachers_of(module.teacher)
    sides = 1 + len(teachers)
    parts = {
        "student": float(sum(p.numel() * p.element_size() for p in student)),
        "gradients": trainable,
        "AdamW": 2 * trainable,
        "teacher": MB * sum(each.describe()["megabytes"] for each in teachers if each.models()),
        "activations": float(per_value * positions * width * layers * student[0].element_size()),
        "logits, in chunks": 16.0 * sides * min(predictions, chunk_size(classes, module.device)) * classes,
    }
    return {**parts, "sum": sum(parts.values()), "(logits of a dense loss)": 16.0 * sides * predictions * classes}
