"""Compares a short answer with people's answers as the official VQA evaluation does, in pure functions.

Source: `vqaEval.py` of the VQA data set's authors (https://github.com/GT-Vision-Lab/VQA,
PythonEvaluationTools/vqaEvaluation), in the version that LAVIS runs (lavis/common/vqa_tools/vqa_eval.py). Papers that
build on LAVIS use this version. Its oddities are kept, since scores can be compared only if every detail agrees;
comments name them.

The authors' present version differs. If all ten people agree, it does not normalise the prediction. If they differ,
people's answers also lose articles and number words.
"""

import re

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

# The official pattern should keep periods between digits, but its look-behind is misspelt. It keeps every period
# before a digit, and turns "1." into "1".
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32  # the official tool passes the flag `re.UNICODE`, which is 32, as the number of replacements
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

# "dont" -> "don't"; "couldnt've" and "couldn'tve" -> "couldn't've", but "couldntve" stays. As in the official tool,
# "somebody'd" loses its apostrophe. Entries with a capital "I" are never found, since answers are in lower case.
CONTRACTIONS = {
    right[:index] + right[index + 1 :]: right
    for right in _CONTRACTED
    for index, letter in enumerate(right)
    if letter == "'"
}
CONTRACTIONS["somebody'd"] = "somebodyd"


def process_punctuation(text: str) -> str:
    """Removes punctuation from an answer.

    A mark beside a space is removed; a mark inside a word becomes a space. In an answer with a comma between digits,
    all marks are removed. Apostrophes, colons, and periods before a digit stay.
    """
    drop_all = _THOUSANDS.search(text) is not None
    processed = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        processed = processed.replace(mark, "" if beside_space or drop_all else " ")
    return _PERIOD.sub("", processed, count=_MAX_PERIODS)


def process_digits_and_articles(text: str) -> str:
    """Lower case, number words up to ten as digits, no articles, missing apostrophes added, single spaces."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def normalize_prediction(answer: str) -> str:
    """Normalises a model's answer."""
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    return process_digits_and_articles(process_punctuation(answer))


def normalize_references(answers: list[str]) -> list[str]:
    """Removes punctuation from people's answers if they differ. They are lower-cased and stripped already."""
    return [process_punctuation(answer) for answer in answers] if len(set(answers)) > 1 else list(answers)


def vqa_score(prediction: str, answers: list[str]) -> float:
    """min(1, matches / 3), averaged over leaving out each person once; matches are people with the same answer.

    Source: Goyal et al., CVPR 2017 (VQA v2), and https://visualqa.org/evaluation.html. The score is in [0, 1]. Raises
    a ValueError if there are fewer than 2 answers: leaving out one would leave none. VQAv2 and OK-VQA have 10.
    """
    if len(answers) < 2:
        raise ValueError(f"`answers` must hold the answers of at least 2 people, but holds {len(answers)}.")
    normalized = normalize_prediction(prediction)
    matches = [answer == normalized for answer in normalize_references(answers)]
    matches_of_others = [sum(matches) - match for match in matches]
    return sum(min(1.0, count / 3) for count in matches_of_others) / len(matches)


def gqa_score(prediction: str, answer: str) -> float:
    """1 if the prediction, normalised as for VQAv2, equals the right answer; else 0.

    Source: LAVIS, lavis/tasks/vqa.py, `GQATask`. The right answer is not normalised, so an answer with a hyphen or an
    article cannot be matched.
    """
    return float(process_digits_and_articles(process_punctuation(prediction)) == answer)
