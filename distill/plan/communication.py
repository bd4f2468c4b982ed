"""Bytes that a rank sends in one optimizer step, by strategy.

Rajbhandari et al. 2019, arXiv 1910.02054, section 7: a ring all-reduce is a reduce-scatter and an all-gather, each of which sends
`(n − 1) / n` of the data per rank. Ψ parameters, of which Ψt are trained, m micro-batches a step, b bytes a value.
"""

from distill.plan.job import Job, Strategy


def sent(kind: str, size: int, ranks: int) -> float:
    """Bytes that a rank sends for one collective in a ring of n.

    Args:
        kind: `all_reduce`, `all_gather`, `reduce_scatter`, `broadcast` or `reduce`.
        size: bytes of the whole: what is reduced, what has been gathered, what is scattered.
        ranks: n.
    """
    share = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0}
    return share[kind] * size * (ranks - 1) / ranks if kind in share else float(size if ranks > 1 else 0)


def collectives(job: Job, strategy: Strategy) -> dict[str, int]:
    """Bytes of the whole that go through each kind of collective in one step, as the libraries do it.

    - DDP: one all-reduce of `wΨt`, in the last micro-batch.
    - ZeRO-1: the gradients once a step, ZeRO-2 once a micro-batch; then an all-gather of `bΨt`. The paper's reduce-scatter is an all-reduce
      in DeepSpeed 0.19.8 (`use_multi_rank_bucket_allreduce`), of which each rank keeps its part: twice the bytes.
    - ZeRO-3: in every micro-batch the parameters are gathered for the forward pass and again for the backward pass, `2bΨ`; the gradients
      are reduced and scattered, `bΨt`. Counted for a student whose head is tied to its embedding.
    - FSDP2: the same, but embedding and head, which the root keeps, are gathered once; gradients are reduced in w bytes.
    - A sharded teacher: an all-gather of its weights in every micro-batch, whatever the student's strategy.
    """
    w, b, m = job.weight, job.compute, job.accumulate
    if strategy.zero in (1, 2):
        found = {"all_reduce": b * job.trainable * (m if strategy.zero == 2 else 1), "all_gather": b * job.trainable}
    elif strategy.zero == 3:
        found = {"all_gather": m * b * 2 * job.parameters, "reduce_scatter": m * b * job.trainable}
    elif strategy.fsdp:
        root = job.parameters - job.student.layers * job.student.layer
        found = {"all_gather": m * b * (2 * job.parameters - root), "reduce_scatter": m * w * job.trainable}
    else:
        found = {"all_reduce": w * job.trainable}
    if job.teacher is not None and job.teacher_sharded:
        found["all_gather"] = found.get("all_gather", 0) + m * job.teacher_bytes * job.teacher.parameters
    return found


def by_the_paper(job: Job, strategy: Strategy) -> float:
    """Volume of one step over Ψt of a single micro-batch, by section 7 of the paper: 2 for DDP, ZeRO-1 and ZeRO-2, 3 for ZeRO-3."""
    return 3.0 if strategy.zero == 3 or strategy.fsdp else 2.0


def per_step(job: Job, strategy: Strategy, ranks: int) -> float:
    """Bytes that a rank sends in one step."""
    return sum(sent(kind, size, ranks) for kind, size in collectives(job, strategy).items())
