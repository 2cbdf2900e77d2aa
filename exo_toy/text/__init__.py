"""k-gram references fitted to a text, and what a reward for keywords makes of them, exactly.

The tokens are a file's characters or its words; the completions all strings of T of them. A completion stands for a
piece of text that begins anywhere: it has no end token, and its first tokens have the shorter contexts of lower orders.

* :func:`fit_kgram`: the reference, from tokens; :func:`witten_bell`, :func:`absolute_discounting`, :func:`add_delta`.
* :func:`read_keywords`, :func:`keyword_automaton`: the reward.
* :func:`run`: from files to numbers; :func:`lines`: those for a terminal; :func:`staged`: a file that takes its place
  when complete.
"""

from exo_toy.text.fitting import absolute_discounting, add_delta, fit_kgram, from_counts, kgram_counts, witten_bell
from exo_toy.text.keywords import Keyword, LeftOut, keyword_automaton, read_keywords
from exo_toy.text.printing import lines
from exo_toy.text.reading import TextError, Vocabulary, characters, pieces, words
from exo_toy.text.report import Settings, fit_file, measure, run
from exo_toy.text.writing import staged, write

__all__ = [
    "Keyword",
    "LeftOut",
    "Settings",
    "TextError",
    "Vocabulary",
    "absolute_discounting",
    "add_delta",
    "characters",
    "fit_file",
    "fit_kgram",
    "from_counts",
    "keyword_automaton",
    "kgram_counts",
    "lines",
    "measure",
    "pieces",
    "read_keywords",
    "run",
    "staged",
    "witten_bell",
    "words",
    "write",
]
