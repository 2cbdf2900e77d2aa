"""The pipeline of alignment as commands: ``exo-toy lm sft | sample | reward | score | align | evaluate | run``.

Each reads JSON (a list, or lines) in the formats of the official repository, takes its settings from a section of a
YAML file, from flags, or both (flags win), goes on where it was interrupted, and leaves nothing half-written under the
name of its output.

* :mod:`~exo_toy.integrations.lm.main`: the command line.
* :mod:`~exo_toy.integrations.lm.settings`: settings of each stage, from YAML and flags.
* :mod:`~exo_toy.integrations.lm.records`: rows in and out, interrupted and gone on with.
* :mod:`~exo_toy.integrations.lm.data`: rows for the trainers, checked.
* :mod:`~exo_toy.integrations.lm.models`: models and tokenizers, found on disk or refused.
* :mod:`~exo_toy.integrations.lm.generation`, :mod:`~exo_toy.integrations.lm.rewarding`: completions and their rewards.
* :mod:`~exo_toy.integrations.lm.stages`: supervised fine-tuning, reward model, candidates, rewards, alignment.
* :mod:`~exo_toy.integrations.lm.evaluation`, :mod:`~exo_toy.integrations.lm.figures`: the paper's measures, drawn.
"""
