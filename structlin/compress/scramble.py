"""More calibration text than was given: batches with some of their tokens exchanged, which the dense model answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from structlin.batches import updated
from structlin.compress.targets import Target

# Shares of the tokens that are exchanged in the copies of each batch. The dense blocks say what is right for any input,
# so a block that is refined on more than the calibration text overfits it less: several copies seen a few times are
# better than one seen often. Where text is scarce, copies go FAR from it, down to words in no order: at a half and a
# quarter of its weights MiniLM keeps .02 to .04 more cosine on other text so, and .003 to .014 less on its own;
# stories260k loses .7 of perplexity on its own where it has much text; with 2,048 tokens both do alike.
NEAR, FAR = (0.3, 0.3, 0.3), (0.5, 1.0, 1.0)
# Tokens for each input of a map from which on its Gram needs no other text: MiniLM (4 to 14) loses .02 less cosine on
# other text with copies in its statistics, stories260k (340) gains nothing there, and .45 of perplexity on its own.
ENOUGH = 16
KEY = "input_ids"


def widened(batches: Sequence[Any], seed: int, vocabulary: int, few: bool) -> tuple[Any, ...]:
    """Return batches and, if they are tokens, scrambled copies of all of them behind; see `scrambled`.

    Args:
        batches: of the calibration.
        seed: of the draws.
        vocabulary: number of tokens that the model knows.
        few: whether they are `scarce`.
    """
    shares = FAR if few else NEAR
    copies = (scrambled(batches, share, seed + number, vocabulary) for number, share in enumerate(shares))
    return (*batches, *(batch for copy in copies for batch in copy))


def scarce(batches: Sequence[Any], targets: Sequence[Target]) -> bool:
    """Whether batches have so few tokens that statistics of targets take in the copies, too."""
    widest = max((t.linear.in_features for t in targets if not t.reason and not t.on_request), default=0)
    return sum(map(_tokens, batches)) < ENOUGH * widest


def _tokens(batch: Any) -> int:
    """Count the tokens of a batch, padding left out."""
    ids, mask = (batch.get(name) for name in (KEY, "attention_mask")) if isinstance(batch, Mapping) else (None, None)
    if not isinstance(ids, Tensor):
        return 0
    return int(mask.sum()) if isinstance(mask, Tensor) and mask.shape == ids.shape else ids.numel()


def scrambled(batches: Sequence[Any], share: float, seed: int = 0, vocabulary: int = 0) -> list[Any]:
    """Copy batches and exchange a share of their tokens for tokens drawn from all of them, and from the vocabulary.

    Each token of the vocabulary counts once more than the batches have it: of a short text most are drawn from the
    vocabulary, as other texts have other words; of a long one, most from the text. Tokens that every row has exactly
    once (the first, a separator) stay, as do padded ones.

    Args:
        batches: mappings with integer `input_ids` (rows, tokens) and no float tensors, such as images; if one is not,
            there is nothing to exchange.
        share: of the tokens.
        seed: of the draws.
        vocabulary: number of tokens that the model knows.
    Returns:
        The copies, or an empty list.
    """
    if not batches or not all(isinstance(batch, Mapping) and _are_text(batch) for batch in batches):
        return []
    once = _once([batch[KEY] for batch in batches])
    known = [_free(batch, once) for batch in batches]
    pool = torch.cat([batch[KEY][free] for batch, free in zip(batches, known, strict=True)]).cpu()
    if not len(pool):
        return []
    pool = torch.cat([pool, torch.arange(vocabulary, dtype=pool.dtype)])
    generator, found = torch.Generator().manual_seed(seed), []
    for batch, free in zip(batches, known, strict=True):
        ids = batch[KEY]
        drawn = pool[torch.randint(len(pool), ids.shape, generator=generator)].to(ids.device)
        chosen = free & (torch.rand(ids.shape, generator=generator) < share).to(ids.device)
        found.append(updated(batch, {KEY: torch.where(chosen, drawn, ids)}))
    return found


def _are_text(batch: Mapping[str, Any]) -> bool:
    """Whether a batch is tokens; beside images, say, some of them stand for what is not exchanged."""
    ids = batch.get(KEY)
    others = (value for name, value in batch.items() if name != "attention_mask" and isinstance(value, Tensor))
    return (
        isinstance(ids, Tensor)
        and ids.ndim == 2
        and not ids.is_floating_point()
        and not any(other.is_floating_point() for other in others)
    )


def _once(rows: Sequence[Tensor]) -> Tensor:
    """Return the tokens that every row has exactly once."""
    counts = [torch.unique(row, return_counts=True) for ids in rows for row in ids.cpu()]
    singles = torch.cat([tokens[number == 1] for tokens, number in counts])
    tokens, number = torch.unique(singles, return_counts=True)
    return tokens[number == len(counts)]


def _free(batch: Mapping[str, Any], once: Tensor) -> Tensor:
    """Return which tokens of a batch may be exchanged."""
    ids, mask = batch[KEY], batch.get("attention_mask")
    free = ~torch.isin(ids, once.to(ids.device))
    return free & mask.bool() if isinstance(mask, Tensor) and mask.shape == ids.shape else free
