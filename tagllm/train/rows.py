"""Which rows a rank sees in a step, and how they are cut into micro-batches: a function of config and data alone."""

from __future__ import annotations

from collections.abc import Sequence

from tagllm.config import RunConfig
from tagllm.data.batch import in_chunks
from tagllm.data.encode import Example
from tagllm.data.examples import Examples
from tagllm.data.sampler import Groups, Sampler, deal
from tagllm.errors import SharedError


class StepRows:
    """The training rows of a run as one of `num_ranks` ranks sees them."""

    def __init__(self, config: RunConfig, sources: Sequence[Examples], rank: int, num_ranks: int) -> None:
        self.sources, self.rank, self.num_ranks = sources, rank, num_ranks
        given = config.data.sources
        shares = {"proportional": None, "equal": [1.0] * len(given), "given": [source.weight for source in given]}
        groups = [
            Groups(examples.groups_n, source.rows_per_group) if source.group_by else None
            for examples, source in zip(sources, given, strict=True)
        ]
        sizes = [len(examples) for examples in sources]
        self.rows_per_epoch = sum(sizes)
        self.rows_per_micro_batch = config.optim.rows_per_micro_batch
        self.sampler = Sampler(sizes, shares[config.data.mix], config.optim.rows_per_step, config.seed, groups)
        if never := [at for at, draws in enumerate(self.sampler.draws) if sizes[at] and not draws]:
            raise SharedError(
                f"data.sources.{never[0]}.weight is {given[never[0]].weight:g}, which beside the others is none of the "
                f"{self.rows_per_epoch} rows of an epoch, so it would never be trained on. Raise it, or leave the "
                "source out."
            )

    def micro_batches(self, step: int) -> list[list[Example]]:
        """This rank's rows, alike in length within a micro-batch."""
        draws = self.sampler.step(step)
        homes = [self.sources[draw.source].home(draw.row) for draw in draws]
        mine = deal(draws, homes, self.num_ranks)[self.rank]
        examples = [self.sources[draw.source][draw.row] for draw in mine]
        return [[examples[i] for i in chunk] for chunk in in_chunks(examples, self.rows_per_micro_batch)]
