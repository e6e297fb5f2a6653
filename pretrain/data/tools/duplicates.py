"""A report on the duplicates in the data of a configuration."""

from collections.abc import Iterator

import numpy as np

from pretrain.data.duplicates import Duplicates, find_duplicates
from pretrain.data.mixture.data import MixtureData

# Tokens of the beginning of a document in an example, and its characters.
_SHOWN_TOKENS, _SHOWN_CHARACTERS = 60, 160


def report(data: MixtureData) -> Iterator[str]:
    """Lines with the number and share of duplicates, an example, and held-out documents that the
    model is trained on.

    If ``data.deduplicate`` is none, near duplicates are looked for, of the default similarity.

    Raises:
        PretrainError: as :func:`pretrain.data.duplicates.find_duplicates`.
    """
    found = data.duplicates
    if found is None:
        found = find_duplicates(data.documents, data.config, "near")
    yield found.summary()
    if len(found.numbers):
        # A near duplicate says more than an exact one.
        example = int(np.argmax(found.near))
        for title, number in (
            ("example", int(found.originals[example])),
            ("near duplicate" if found.near[example] else "duplicate", int(found.numbers[example])),
        ):
            yield f"{title}: {found.name(number)}{_beginning(found, number)}"
    held_out, count = found.overlap()
    if data.duplicates is None:
        fix = "; data.deduplicate=near leaves these out of training" if held_out else ""
        yield f"{held_out:,} of {count:,} held-out documents have duplicates to train on{fix}"
    else:
        yield f"none of {count:,} held-out documents has a duplicate to train on: they are left out"


def _beginning(found: Duplicates, number: int) -> str:
    documents, local = found.locate(number)
    content = documents.content(local)
    if isinstance(content, bytes):
        return ""
    text = documents.composer.tokenizer.decode(content[:_SHOWN_TOKENS].tolist())
    return f": {' '.join(text.split())[:_SHOWN_CHARACTERS]} …"
