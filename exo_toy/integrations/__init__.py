"""Training language models with these losses, in the Hugging Face ecosystem.

Nothing here is loaded by ``import exo_toy``; each module imports what it needs of the extra ``hf`` when it is imported.

From the data to the loss, a module for each step, of use on its own in another training loop:

* :mod:`~exo_toy.integrations.texts`: from texts to token ids.
* :mod:`~exo_toy.integrations.candidates`: from rows of a dataset to padded batches of candidates.
* :mod:`~exo_toy.integrations.rows`: whole datasets, checked before training, in an order that no split changes.
* :mod:`~exo_toy.integrations.scoring`: log-probabilities of completions under a causal language model.
* :mod:`~exo_toy.integrations.policy`: what is asked of the models of a trainer.
* :mod:`~exo_toy.integrations.reference`: where the reference policy's log-probabilities come from.
* :mod:`~exo_toy.integrations.objective`, :mod:`~exo_toy.integrations.metrics`: the losses of a batch's prompts, and
  what is logged of them.

The trainers:

* :mod:`~exo_toy.integrations.config`, :mod:`~exo_toy.integrations.trainer`: on any number of candidates per prompt;
  :mod:`~exo_toy.integrations.loading` reads their data.
* :mod:`~exo_toy.integrations.online`: on candidates sampled from the policy as it learns;
  :mod:`~exo_toy.integrations.sampling` draws and rewards them, :mod:`~exo_toy.integrations.vllm` has an engine do it.

The losses in the trainers of others: :mod:`~exo_toy.integrations.trl`, :mod:`~exo_toy.integrations.torchtune`.

:mod:`~exo_toy.integrations.lm` is the whole pipeline as commands, ``exo-toy lm``.
"""
