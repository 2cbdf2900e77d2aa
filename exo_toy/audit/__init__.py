"""What the log of a run says: losses, effective sample sizes and sampled estimates, per prompt and over prompts.

The log is JSON lines, or one JSON list, of objects with ``prompt``, ``completions``, ``rewards`` and, where known,
``policy_logps`` and ``ref_logps``: K >= 2 candidates, as many as the prompt happens to have. Other fields are ignored.
Texts are strings or lists of messages. Log-probabilities are sums over the tokens of a completion, in nats. The
estimates take candidates for independent draws from the reference, repeats included, at the temperature of its
log-probabilities.

* :func:`read`: the records of a log, and what is wrong with the others.
* :func:`run`: the audit, written to a folder; :func:`staged`: a folder that takes its place when complete.
"""

from exo_toy.audit.log import Problem, Record, read
from exo_toy.audit.measures import Settings
from exo_toy.audit.report import FIGURES, PROBLEMS, PROMPTS, SUMMARY, AuditError, Report, run, staged

__all__ = [
    "FIGURES",
    "PROBLEMS",
    "PROMPTS",
    "SUMMARY",
    "AuditError",
    "Problem",
    "Record",
    "Report",
    "Settings",
    "read",
    "run",
    "staged",
]
