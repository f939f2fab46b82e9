"""The answer rule of VQAv2: normalisation of free-form answers, and the soft accuracy over several annotators.

Source: Antol et al., "VQA: Visual Question Answering", ICCV 2015, and the evaluation rules at visualqa.org/evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

ARTICLES = {"a", "an", "the"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Only forms whose spelling without the apostrophe is no other word ("its", "were", "well" stay as they are).
_FORMS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd've he's how'd
how'll how's i'm i've isn't it'd it'd've it'll let's ma'am might've mightn't mightn't've must've mustn't needn't not've
o'clock oughtn't shan't she'd've she's should've shouldn't shouldn't've somebody'd somebody'll somebody's someone'd
someone'll someone's something'd something'll that'd that'll that's there'd there're there's they'd they'll they're
they've wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've
who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all you'd you'll you're you've
"""
CONTRACTIONS = {form.replace("'", ""): form for form in _FORMS.split()}
DIGIT_COMMA = re.compile(r"\d,\d")
LONE_PERIOD = re.compile(r"\.(?!\d)")


def normalize(answer: str) -> str:
    """The answer in lower case without punctuation and articles, number words as digits, apostrophes in place.

    A punctuation mark beside a space, or anywhere if the answer has a comma between digits, is dropped; any other
    becomes a space ("red/blue" → "red blue"). A period stays in front of a digit alone.
    """
    text = " ".join(answer.split())
    dropped = DIGIT_COMMA.search(text) is not None
    out = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if dropped or beside_space else " ")
    out = LONE_PERIOD.sub("", out).lower()
    words = [DIGITS.get(word, word) for word in out.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def exact_match(prediction: str, truth: str) -> float:
    """1.0 if both are equal after :func:`normalize`, else 0.0."""
    return float(normalize(prediction) == normalize(truth))


def plain_match(prediction: str, truth: str) -> float:
    """1.0 if both are equal in lower case without white space at the ends (as GQA's answers are compared), else 0.0."""
    return float(prediction.strip().lower() == truth.strip().lower())


def soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """min(1, matches / 3), averaged over all subsets that leave one annotator out (the VQAv2 rule).

    With a single answer there is no such subset, and it is :func:`exact_match`.
    """
    if len(answers) == 1:
        return exact_match(prediction, answers[0])
    said = normalize(prediction)
    hits = [normalize(answer) == said for answer in answers]
    total = sum(hits)
    return sum(min(1.0, (total - hit) / 3) for hit in hits) / len(hits)
