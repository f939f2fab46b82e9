"""Retrieval: finds the captions of an image (TR) and the image of a caption (IR); recall at 1, 5 and 10.

Candidates are ranked by the cosine of embeddings, as for CLIP and SigLIP. For models with a matching head, the best
``rerank`` candidates are sorted again by matching logit plus cosine, as for BLIP (Li et al., 2022) and BLIP-2 (Li et
al., 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ecoflap.errors import InvalidOption
from ecoflap.evaluation.embeddings import Matcher, embedder_of, similarity
from ecoflap.evaluation.task import (
    Shared,
    Task,
    TaskResult,
    TestData,
    Unit,
    captions_of,
    check_finite,
    common_settings,
    in_chunks,
    measured,
    open_data,
    pictures,
)
from ecoflap.model.trace import evaluating
from ecoflap.support.progress import Progress
from ecoflap.support.progress import Task as Bar
from ecoflap.support.workers import ALONE, Workers

ROWS = 256  # queries at a time: 26 MB of scores for the 25,000 captions of COCO's test set


@dataclass(frozen=True)
class Queries:
    """Queries against all candidates.

    Attributes:
        count: number of queries.
        scores: scores of all candidates for some queries, ``[B, C]``.
        right: which candidates are right for them, bool ``[B, C]``.
        match: matching scores of some candidates for one query, ``[number of them]``.
    """

    count: int
    scores: Callable[[slice], Tensor]
    right: Callable[[slice], Tensor]
    match: Callable[[int, list[int]], Tensor]


def rank_queries(queries: Queries, rerank: int, bar: Bar, workers: Workers = ALONE) -> list[int]:
    """Rank of the best right candidate of each query, 0 = first; the best ``rerank`` candidates are sorted again.

    With ``rerank``, workers share the queries.
    """
    collected: Shared[int] = Shared(workers)
    found: list[int] = []
    for start in range(0, queries.count, ROWS):
        rows = slice(start, min(start + ROWS, queries.count))
        scores, right = queries.scores(rows), queries.right(rows)
        if not rerank:
            found += ranks(scores, right).tolist()
            bar.advance(rows.stop - rows.start)
            continue
        for row, query in enumerate(range(rows.start, rows.stop)):
            collected.add(partial(_matched, queries, query, scores[row], right[row], rerank))
            bar.advance()
    return found + collected.all()


def _matched(queries: Queries, query: int, scores: Tensor, right: Tensor, rerank: int) -> int:
    top = scores.topk(min(rerank, len(scores))).indices
    return _reranked(scores, right, top, queries.match(query, top.tolist()))


def ranks(scores: Tensor, right: Tensor) -> Tensor:
    """Number of wrong candidates that score at least as high as the best right one, ``[B]`` from ``[B, C]``.

    A tie counts against the right one, so that a model with equal scores finds nothing.
    """
    best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    return ((scores >= best) & ~right).sum(dim=1)


def _reranked(scores: Tensor, right: Tensor, top: Tensor, matched: Tensor) -> int:
    """:func:`ranks` of one query ``[C]`` after the candidates ``top`` were sorted by matching score plus score."""
    if not bool(right[top].any()):  # the right one stays behind all of them
        return int(ranks(scores[None], right[None]))
    return int(ranks((matched + scores[top])[None], right[top][None]))


DEPTHS = (1, 5, 10)


@dataclass
class _Gallery:
    """All images and captions; ``owners[t]`` is the image of caption ``t``, ``rows[p]`` the source's row of image
    ``p``."""

    rows: list[int] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Retrieval(Task):
    """Share of images with one of their captions among the first k (TR@k), of captions with their image (IR@k).

    A wrong candidate with the same score as the right one is ranked before it. Standard errors are binomial over the
    queries. ``n`` is the number of images. Recall depends on the number of candidates, and so of samples.

    Data: images with captions: several per row, or rows that share an image by their group column. The sequence
    length has no effect; captions are cut to the text tower's limit.

    Attributes:
        rerank: number of best candidates that the matching head scores (published: 256 for COCO, 128 for Flickr30k); 0
            for none.
    """

    unit: ClassVar[Unit] = "%"
    hub_type: ClassVar[str] = "image-text-retrieval"
    takes: ClassVar[tuple[str, ...]] = ("columns", "image_folder")
    needs_pictures: ClassVar[bool] = True

    rerank: int = 0

    @torch.no_grad()
    def run(self, model: nn.Module, processor: Any, test: TestData) -> TaskResult:
        """As :meth:`Task.run`.

        Raises:
            InvalidOption: the model does not compare images with texts, or has no matching head to re-rank with.
            CalibrationError: there are no images, or no captions.
            NonFiniteLoss: an embedding is NaN or infinite.
        """
        rerank, batch_size = self.rerank, test.batch_size
        embedder = embedder_of(model, processor, "retrieval")
        if rerank < 0:
            raise InvalidOption(f"rerank must be at least 0, not {rerank}")
        if isinstance(embedder, Matcher):
            embedder.keep = rerank > 0
        elif rerank:
            raise InvalidOption(f"rerank needs a model with a matching head, and {type(model).__name__} has none")
        reader = open_data("retrieval", test)
        gallery, places = _Gallery(), dict[str, int]()
        # Re-ranking needs all encoded images, so all workers encode all of them then.
        encoded: Shared[Tensor] = Shared(ALONE if rerank else test.workers)
        read: Shared[Tensor] = Shared(test.workers)
        with evaluating(model):
            for part in in_chunks(reader, test.batch_size, test.progress, "retrieval, images"):
                images = pictures(part, "retrieval", reader.source)
                fresh = []
                for (index, sample), image in zip(part, images, strict=True):
                    key = f"row {index}" if sample.group is None else f"group {sample.group}"
                    if key not in places:
                        places[key] = len(gallery.rows)
                        gallery.rows.append(index)
                        fresh.append(image)
                    captions = captions_of(index, sample, "retrieval", reader.source)
                    gallery.captions += captions
                    gallery.owners += [places[key]] * len(captions)
                if fresh:
                    encoded.add(partial(embedder.pictures, fresh))
            with test.progress.stage("retrieval, captions", total=len(gallery.captions)) as bar:
                for start in range(0, len(gallery.captions), batch_size):
                    batch = gallery.captions[start : start + batch_size]
                    read.add(partial(embedder.texts, batch))
                    bar.advance(len(batch))
            seen, texts = torch.cat(encoded.all()), torch.cat(read.all())
            check_finite(seen, "the embedding of an image", reader.source)
            check_finite(texts, "the embedding of a caption", reader.source)

            def match(pairs: list[tuple[int, int]]) -> Tensor:
                assert isinstance(embedder, Matcher)
                parts = [pairs[i : i + batch_size] for i in range(0, len(pairs), batch_size)]
                scores = torch.cat(
                    [embedder.match([p for p, _ in part], [gallery.captions[t] for _, t in part]) for part in parts]
                )
                check_finite(scores, "a matching score", reader.source)
                return scores

            hits = _ranks(gallery, seen, texts, match, rerank, test.progress, test.workers)
        values = {
            f"{way}@{depth}": measured([float(r < depth) for r in of_way])
            for way, of_way in hits.items()
            for depth in DEPTHS
        }
        best = [gallery.captions[int(similarity(row[None], texts)[0].argmax())] for row in seen]
        own: list[list[str]] = [[] for _ in gallery.rows]
        for owner, caption in zip(gallery.owners, gallery.captions, strict=True):
            own[owner].append(caption)
        predictions = [
            {"index": index, "prediction": said, "truth": truth, "score": float(rank < 1)}
            for index, said, truth, rank in zip(gallery.rows, best, own, hits["TR"], strict=True)
        ]
        settings = common_settings(
            reader,
            test,
            rerank=rerank,
            pictures=len(gallery.rows),
            captions=len(gallery.captions),
        )
        first = values.pop("TR@1")
        return TaskResult(
            "retrieval",
            "TR@1",
            first.value,
            first.stderr,
            len(gallery.rows),
            settings,
            predictions=predictions,
            others=values,
        )


def _ranks(
    gallery: _Gallery,
    seen: Tensor,
    texts: Tensor,
    match: Callable[[list[tuple[int, int]]], Tensor],
    rerank: int,
    progress: Progress,
    workers: Workers,
) -> dict[str, list[int]]:
    """Rank of the best right candidate of each query, 0 = first, for captions of images and images of captions."""
    owners, places = torch.tensor(gallery.owners), torch.arange(len(seen))
    ways = {
        "TR": Queries(
            count=len(seen),
            scores=lambda rows: similarity(seen[rows], texts),
            right=lambda rows: places[rows, None] == owners[None],
            match=lambda picture, captions: match([(picture, caption) for caption in captions]),
        ),
        "IR": Queries(
            count=len(texts),
            scores=lambda rows: similarity(seen, texts[rows]).t(),
            right=lambda rows: owners[rows, None] == places[None],
            match=lambda caption, pictures: match([(picture, caption) for picture in pictures]),
        ),
    }
    with progress.stage("retrieval, ranks", total=len(seen) + len(texts)) as bar:
        return {way: rank_queries(queries, rerank, bar, workers) for way, queries in ways.items()}
