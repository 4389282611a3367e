"""How like its reference an answer is: exact match, and ROUGE-L (Lin 2004, "ROUGE: A Package for
Automatic Evaluation of Summaries").

Words are what the package `rouge-score` takes for words without its stemmer: letters and digits of
ASCII, in lower case. So the numbers are its own, without the packages that it needs.
"""

import re
from collections.abc import Sequence


def exact_match(answer: str, reference: str) -> bool:
    """Whether two texts are equal but for white space.

    >>> exact_match(" Paris.\\n", "Paris."), exact_match("paris.", "Paris.")
    (True, False)
    """
    return answer.split() == reference.split()


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, 0 to 1; 0 where either has no word.

    >>> round(rouge_l("the cat was here", "The cat is here."), 2)
    0.75
    """
    said, wanted = _words(answer), _words(reference)
    if not said or not wanted:
        return 0.0
    common = _longest_common(said, wanted)
    # the harmonic mean of common / said and common / wanted
    return 2 * common / (len(said) + len(wanted))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    lengths = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for place, candidate in enumerate(other, start=1):
            above = lengths[place]
            lengths[place] = diagonal + 1 if word == candidate else max(above, lengths[place - 1])
            diagonal = above
    return lengths[-1]
