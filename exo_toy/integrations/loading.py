"""From the datasets that a trainer is given to batches, as many for each process."""

from typing import Any

from torch.utils.data import DataLoader
from transformers import Trainer

from exo_toy.integrations.config import LOSSES_ON_LABELS, needs_other_completions
from exo_toy.integrations.objective import Loss, check_rewards
from exo_toy.integrations.policy import check_positions
from exo_toy.integrations.reference import ReferenceCache
from exo_toy.integrations.rows import Epochs, Rows, tokenize_dataset


class RowsTrainer(Trainer):
    """The part of :class:`~exo_toy.integrations.trainer.CandidateTrainer` that reads its data."""

    _settings: Any
    _cache: ReferenceCache | None
    _tokenizer: Any
    _model_given: Any
    _custom_loss: Loss | None
    _pairs: bool | None
    reports: dict[str, Any]

    def _tokenized(self, name: str, dataset: Any) -> Rows:
        """A dataset's rows, checked; its kind becomes the trainer's where that is still open."""
        args, named = self._settings, self._custom_loss is None
        rows = tokenize_dataset(
            name,
            dataset,
            self._tokenizer,
            pairs=self._pairs,
            max_prompt_length=args.max_prompt_length,
            max_completion_length=args.max_completion_length,
            single=named and args.loss in LOSSES_ON_LABELS,
        )
        try:
            if named:
                check_rewards(rows.rewards(), args)
            if named and needs_other_completions(args):
                rows.mismatch()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        check_positions(name, rows.longest, self._model_given)
        self._pairs = rows.pairs
        self.reports[name] = rows.report
        return rows

    def _loader(self, rows: Rows, batch_size: int, *, seed: int | None, drop_last: bool = False) -> DataLoader[Any]:
        """Batches of rows, as many for each process."""
        args = self._settings
        processes = self.accelerator.num_processes
        multiple = batch_size * processes if processes > 1 or drop_last else 1
        loader: DataLoader[Any] = DataLoader(
            Epochs(rows, multiple=multiple, seed=seed, drop_last=drop_last),
            batch_size=batch_size,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches in an order that depends on the seed (``data_seed`` where given) and the epoch alone."""
        if not isinstance(self.train_dataset, Rows):
            raise ValueError("train_dataset must be given to train; got None")
        args = self._settings
        seed = args.seed if args.data_seed is None else args.data_seed
        return self._loader(
            self.train_dataset,
            self._train_batch_size,
            seed=None if args.train_sampling_strategy == "sequential" else seed,
            drop_last=args.dataloader_drop_last,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Batches of the evaluation rows, in the order in which they stand.

        Args:
            eval_dataset: a dataset, the name of one of the trainer's, or None for the trainer's own.
        """
        own: Any = self.eval_dataset
        chosen = own[eval_dataset] if isinstance(eval_dataset, str) else own if eval_dataset is None else eval_dataset
        if chosen is None:
            raise ValueError("eval_dataset must be given to evaluate; got None")
        rows = chosen if isinstance(chosen, Rows) else self._tokenized("eval_dataset", chosen)
        if self._cache is not None and rows.cache is None:
            rows.read_reference(self._cache)
        return self._loader(rows, self._settings.eval_batch_size, seed=None)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """As :meth:`get_eval_dataloader`.

        Args:
            test_dataset: a dataset.
        """
        return self.get_eval_dataloader(test_dataset)
