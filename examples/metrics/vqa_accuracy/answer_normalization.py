"""How the official VQA evaluation compares a short answer with people's answers, as pure functions.

Written after `vqaEval.py` of the VQA data set's authors (https://github.com/GT-Vision-Lab/VQA,
PythonEvaluationTools/vqaEvaluation) in the version that LAVIS runs (lavis/common/vqa_tools/vqa_eval.py), and so the
papers built on it. Scores can be compared only if all agree on every detail, so its oddities are kept, and named where
they are. The authors' present version differs: where all ten people agree, it compares the prediction as it is, and
where they do not, people's answers lose articles and number words as well.
"""

import re

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

# The official pattern is meant to spare periods between digits, but its look-behind is misspelt: it spares every
# period before a digit, and takes "1." for "1".
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # a regular expression's flag, `re.UNICODE`, that is passed where their number goes
_THOUSANDS = re.compile(r"\d,\d")

ARTICLES = {"a", "an", "the"}
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}

_STEMS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'ve": "could I might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'d've": "he I it she somebody someone something there they we who y'all you",
    "'s": "he how somebody someone that there what when where who why",
    "'ll": "how it somebody someone something they what who why y'all you",
    "'re": "there they what why you",
    "'m": "I",
}
_CONTRACTED = [stem + ending for ending, stems in _STEMS.items() for stem in stems.split()]
_CONTRACTED += ["ma'am", "o'clock", "'ow's'at", "'twas", "y'all"]


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:index] + word[index + 1 :] for index, letter in enumerate(word) if letter == "'"]


# "dont" -> "don't"; "couldnt've" and "couldn'tve" -> "couldn't've", but "couldntve" stays. As in the original,
# "somebody'd" loses its apostrophe, and what starts with a capital "I" is never found, because answers are in lower
# case by then.
CONTRACTIONS = {wrong: right for right in _CONTRACTED for wrong in _without_one_apostrophe(right)}
CONTRACTIONS["somebody'd"] = "somebodyd"


def process_punctuation(text: str) -> str:
    """Takes punctuation out of an answer: a mark beside a space goes, one inside a word becomes a space.

    Where the answer holds a comma between digits, every mark goes. Apostrophes, colons, and periods before a digit
    stay.
    """
    drop_all = _THOUSANDS.search(text) is not None
    processed = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        processed = processed.replace(mark, "" if beside_space or drop_all else " ")
    return _PERIOD.sub("", processed, count=_MOST_PERIODS)


def process_digits_and_articles(text: str) -> str:
    """Lower case, number words up to ten as digits, no articles, missing apostrophes put in, single spaces."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def normalize_prediction(answer: str) -> str:
    """What becomes of a model's answer before it is compared."""
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    return process_digits_and_articles(process_punctuation(answer))


def normalize_references(answers: list[str]) -> list[str]:
    """What becomes of people's answers: where they differ, their punctuation goes; where all agree, nothing happens.

    They are neither lower-cased nor stripped, since the published ones are already.
    """
    return [process_punctuation(answer) for answer in answers] if len(set(answers)) > 1 else list(answers)


def vqa_score(prediction: str, answers: list[str]) -> float:
    """Right to the degree that people said the same: min(1, matches / 3), with each person left out once, averaged.

    Source: Goyal et al., CVPR 2017 (VQA v2), and https://visualqa.org/evaluation.html.

    Args:
        prediction: The model's answer.
        answers: The answers of at least 2 people (VQAv2 and OK-VQA: 10).

    Returns:
        The score in [0, 1].

    Raises:
        ValueError: If there are fewer answers, of which none would be left.
    """
    if len(answers) < 2:
        raise ValueError(f"`answers` must hold the answers of at least 2 people, but holds {len(answers)}.")
    said = normalize_prediction(prediction)
    matches = [answer == said for answer in normalize_references(answers)]
    left = [sum(matches) - match for match in matches]  # matches among the others
    return sum(min(1.0, count / 3) for count in left) / len(left)


def gqa_score(prediction: str, answer: str) -> float:
    """1 if the answer is the right one to the letter, after what is done to a VQAv2 prediction; else 0.

    Source: LAVIS, lavis/tasks/vqa.py, `GQATask`. The right answer is taken as it is, so one with a hyphen or an
    article cannot be hit.
    """
    return float(process_digits_and_articles(process_punctuation(prediction)) == answer)
