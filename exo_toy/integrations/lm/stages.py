"""The stages of the pipeline but for the evaluation."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from trl import ModelConfig, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer, get_peft_config

from exo_toy.integrations.config import CandidateConfig, check_loss, check_support
from exo_toy.integrations.lm.data import check_texts, for_alignment, for_reward, for_sft
from exo_toy.integrations.lm.generation import Prompts
from exo_toy.integrations.lm.models import load, load_policy, load_tokenizer, require_model, require_whole
from exo_toy.integrations.lm.records import (
    CONTENT,
    Lines,
    LmError,
    Row,
    digest,
    read_rows,
    require_same,
    require_writable,
    write_whole,
)
from exo_toy.integrations.lm.rewarding import reward_source, scorer
from exo_toy.integrations.lm.settings import AlignSettings, SampleSettings, ScoreSettings, TrainSettings
from exo_toy.integrations.objective import check_values
from exo_toy.integrations.sampling import as_texts, end_tokens
from exo_toy.integrations.trainer import CandidateTrainer

# In the folder of a training: what it was asked to do, and whether it is done.
STATE = "exo_toy.json"
# Settings that change nothing of a result.
NO_MATTER = (
    *("batch_size", "device", "disable_tqdm", "logging_steps", "offline", "output", "output_dir", "report_to"),
    *("reward_batch_size", "save_steps", "save_total_limit", "use_cpu"),
)


def sample(settings: SampleSettings) -> None:
    """Completions of prompts: rows ``{"prompt", "completions", "finished"}``, the last whether each came to its end.

    Args:
        settings: of the stage.

    Raises:
        LmError: bad data or settings, a model that cannot be loaded.
    """
    require_model("model_name_or_path", settings.model_name_or_path)
    rows = read_rows(settings.data, ["prompt"], limit=settings.limit)
    name = settings.model_name_or_path
    lines = Lines(settings.output, identity("sample", settings, data=settings.data, model_name_or_path=name))
    if already_complete(lines.path, lines.complete):
        return
    prompts = Prompts(rows, "model_name_or_path", name, settings)
    policy = load_policy("model_name_or_path", name, settings)
    ends, tokenizer = end_tokens(policy, prompts.tokenizer), prompts.tokenizer
    how: dict[str, Any] = dict(count=settings.num_candidates, ends=ends, top_p=settings.top_p, top_k=settings.top_k)
    for start, stop in batches("sample", lines.done, len(rows), settings.batch_size):
        drawn = prompts.draw(policy, start, stop, **how)
        lines.append(
            [
                {
                    "prompt": row["prompt"],
                    "completions": as_texts(row["prompt"], some, tokenizer),
                    "finished": [tokens[-1] in ends for tokens in some],
                }
                for row, some in zip(rows[start:stop], drawn, strict=True)
            ]
        )
    print(f"{lines.path}: {lines.finish()} prompts with {settings.num_candidates} completions each")


def score(settings: ScoreSettings) -> None:
    """Rewards of completions: rows ``{"prompt", "completions", "rewards"}``, or ``{"prompt", "chosen", "rejected"}``.

    Args:
        settings: of the stage.

    Raises:
        LmError: bad data or settings, a model or function that cannot be loaded, a reward that is no finite number.
    """
    source = reward_source(settings)
    rows = read_rows(settings.data, ["prompt", "completions"])
    check_texts(settings.data, rows, ["completions"])
    lines = Lines(settings.output, identity("score", settings, data=settings.data, rewards=source))
    if already_complete(lines.path, lines.complete):
        return
    score_rows = scorer(settings)
    at_once = max(1, settings.reward_batch_size // max(len(row["completions"]) for row in rows))
    for start, stop in batches("score", lines.done, len(rows), at_once):
        some = rows[start:stop]
        lines.append([{**row, "rewards": numbers} for row, numbers in zip(some, score_rows(some), strict=True)])
    kept = lines.finish(best_and_worst if settings.pairs else None)
    ties = f"; {len(rows) - kept} left out, all rewards equal" if settings.pairs else ""
    print(f"{lines.path}: {kept} rows{ties}")


def best_and_worst(row: Row) -> Row | None:
    """The pair of a row's candidates with the highest and the lowest reward; None where they are equal.

    Args:
        row: with completions and rewards; ``finished`` of them goes with the pair.

    Example:
        >>> best_and_worst({"prompt": "a", "completions": ["b", "c"], "rewards": [0.0, 1.0]})
        {'prompt': 'a', 'chosen': 'c', 'rejected': 'b'}
    """
    rewards, completions = row["rewards"], row["completions"]
    best, worst = max(rewards), min(rewards)
    if best == worst:
        return None
    places = rewards.index(best), rewards.index(worst)
    chosen, rejected = (completions[place] for place in places)
    ends = {} if row.get("finished") is None else {"finished": [row["finished"][place] for place in places]}
    return {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected, **ends}


def sft(settings: TrainSettings, args: SFTConfig, model_config: ModelConfig) -> None:
    """Supervised fine-tuning by TRL's SFTTrainer, of rows ``{"prompt", "chosen"}`` or as that trainer takes them.

    Rows without text to learn are left out and counted.

    Args:
        settings: of the stage.
        args: of the trainer.
        model_config: of the model and its adapter.

    Raises:
        LmError: bad data or settings, a model that cannot be loaded.
    """
    data = {name: for_sft(name, path) for name, path in _files(settings).items()}
    tokenizer = _tokenizer(settings, model_config)

    def build() -> Trainer:
        model = _trainable(AutoModelForCausalLM, settings, model_config)
        peft_config = get_peft_config(model_config)
        return SFTTrainer(model, args, processing_class=tokenizer, peft_config=peft_config, **data)

    _train("sft", settings, args, model_config, build)


def reward(settings: TrainSettings, args: RewardConfig, model_config: ModelConfig) -> None:
    """A reward model by TRL's RewardTrainer, from rows ``{"prompt", "chosen", "rejected"}``.

    Rows where one has no text, or both are the same, are left out and counted.

    Args:
        settings: of the stage.
        args: of the trainer.
        model_config: of the model and its adapter.

    Raises:
        LmError: bad data or settings, a model that cannot be loaded.
    """
    data = {name: for_reward(name, path) for name, path in _files(settings).items()}
    tokenizer = _tokenizer(settings, model_config)
    if model_config.use_peft:
        model_config.lora_task_type = "SEQ_CLS"

    def build() -> Trainer:
        model = _trainable(AutoModelForSequenceClassification, settings, model_config, num_labels=1, new_head=True)
        model.config.pad_token_id = tokenizer.pad_token_id
        peft_config = get_peft_config(model_config)
        return RewardTrainer(model, args, processing_class=tokenizer, peft_config=peft_config, **data)

    _train("reward", settings, args, model_config, build)


def align(settings: AlignSettings, args: CandidateConfig, model_config: ModelConfig) -> None:
    """Alignment by our trainer, from rows ``{"prompt", "completions", "rewards"}`` or ``{"prompt", "chosen",
    "rejected"}``.

    Completions without text are left out, and rows with fewer than two others; both are counted.

    Args:
        settings: of the stage.
        args: of the trainer.
        model_config: of the model and its adapter.

    Raises:
        LmError: bad data or settings, a model that cannot be loaded.
    """
    try:
        check_support(args)
        check_loss(args)
        check_values(args)
    except ValueError as error:
        raise LmError(f"align: {error}") from error
    if settings.ref_model is not None:
        require_model("ref_model", settings.ref_model)
    tokenizer = _tokenizer(settings, model_config)
    data: dict[str, Any] = {
        name: for_alignment(name, path, args, tokenizer, count=settings.num_candidates)
        for name, path in _files(settings).items()
    }

    def build() -> Trainer:
        model = _trainable(AutoModelForCausalLM, settings, model_config)
        ref_model = None
        if settings.ref_model is not None:
            beside = {"setting": "ref_model", "name": settings.ref_model}
            ref_model = _trainable(AutoModelForCausalLM, settings, model_config, **beside)
        peft_config = get_peft_config(model_config)
        try:
            return CandidateTrainer(
                model, args, processing_class=tokenizer, ref_model=ref_model, peft_config=peft_config, **data
            )
        except ValueError as error:
            raise LmError(f"align: {error}") from error

    _train("align", settings, args, model_config, build)


def identity(stage: str, settings: Any, **paths: str | None) -> dict[str, Any]:
    """What a result depends on: the settings that matter, and what the files and folders hold.

    Args:
        stage: of the pipeline.
        settings: a dataclass.
        paths: settings that name files or folders.
    """
    matter = {name: value for name, value in dataclasses.asdict(settings).items() if name not in NO_MATTER}
    held = {f"{CONTENT}{name}": digest(path) for name, path in paths.items() if path is not None}
    return {"stage": stage, **matter, **held}


def already_complete(path: Path, complete: bool) -> bool:
    """Say so where there is nothing left to do.

    Args:
        path: of the result.
        complete: whether it is.
    """
    if complete:
        print(f"{path}: is complete, nothing to do")
    return complete


def batches(stage: str, done: int, total: int, size: int) -> Iterator[tuple[int, int]]:
    """Start and end of each batch that is left, with a progress bar over all rows.

    Args:
        stage: what the bar is called.
        done: rows that are there; what is left of the batch in which they end comes first.
        total: rows in all.
        size: of a batch.
    """
    with tqdm(total=total, initial=done, desc=stage, unit="row") as bar:
        while done < total:
            start, done = done, min(done - done % size + size, total)
            yield start, done
            bar.update(done - start)


def _train(stage: str, settings: Any, args: Any, model_config: ModelConfig, build: Callable[[], Trainer]) -> None:
    """Train in the folder of the output, from the last checkpoint there if there is one, and save the model there."""
    folder = Path(args.output_dir)
    models = {"model_name_or_path": model_config.model_name_or_path, "ref_model": getattr(settings, "ref_model", None)}
    paths = {**_files(settings), **models}
    asked = {**identity(stage, settings, **paths), **_plain(args), **_plain(model_config)}
    asked = json.loads(json.dumps(asked, default=str))
    state = folder / STATE
    if state.exists():
        was = json.loads(state.read_text(encoding="utf-8"))
        require_same(str(folder), was["settings"], asked, "remove the folder, or choose another output_dir")
        if already_complete(folder, was["complete"]):
            return
    elif folder.is_dir() and any(folder.iterdir()):
        raise LmError(f"output_dir: {folder} holds files, and not of this command; choose another")
    require_writable("output_dir", folder)
    main = args.process_index == 0
    # No process writes before all have looked.
    PartialState().wait_for_everyone()
    trainer = build()
    # An adapter of the alignment is one to its reference; to what came before it would be one to no model on disk.
    merged = model_config.use_peft and stage != "align"
    if merged and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise LmError(f"{stage}: use_peft must be False where the model is sharded: its adapter could not be merged")
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(state, json.dumps({"complete": False, "settings": asked}, indent=1) + "\n")
    PartialState().wait_for_everyone()
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    if not merged:
        trainer.save_model()
    elif main:
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        parts: list[Any] = [model.merge_and_unload(), trainer.processing_class]
        for part in parts:
            part.save_pretrained(folder)
    trainer.save_state()
    if main:
        write_whole(state, json.dumps({"complete": True, "settings": asked}, indent=1) + "\n")
        print(f"{folder}: trained for {trainer.state.global_step} steps")


def last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that is whole; one that an interruption left has no state of the trainer, written last.

    Args:
        folder: of the training.
    """
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{TRAINER_STATE_NAME}") if _is_json(path)]
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def _plain(settings: Any) -> dict[str, Any]:
    """The settings of a trainer or model that are not the default, those left out that change no result."""
    found = {}
    for entry in dataclasses.fields(settings):
        value = getattr(settings, entry.name)
        if entry.name in NO_MATTER or not entry.init or entry.name in ("logging_dir", "run_name"):
            continue
        if isinstance(value, int | float | str | list | None) and value != entry.default:
            found[entry.name] = value
    return found


def _files(settings: TrainSettings) -> dict[str, str]:
    """The data by the trainers' names."""
    files = {"train_dataset": settings.data, "eval_dataset": settings.eval_data}
    return {name: path for name, path in files.items() if path is not None}


def _tokenizer(settings: TrainSettings, model_config: ModelConfig) -> Any:
    if model_config.model_name_or_path is None:
        raise LmError("model_name_or_path must be given; got None")
    for name in ("load_in_4bit", "load_in_8bit"):
        if getattr(model_config, name):
            raise LmError(f"{name} must be False: quantised models are not supported here")
    require_whole("model_name_or_path", model_config.model_name_or_path)
    return load_tokenizer("model_name_or_path", model_config.model_name_or_path, offline=settings.offline)


def _trainable(
    kind: Any,
    settings: TrainSettings,
    model_config: ModelConfig,
    *,
    setting: str = "model_name_or_path",
    name: str | None = None,
    **given: Any,
) -> Any:
    """The model of a training, or another to stand beside it, where the trainer will move and cast it."""
    if name is None:
        name, given["revision"] = str(model_config.model_name_or_path), model_config.model_revision
    given["attn_implementation"] = model_config.attn_implementation
    return load(kind, setting, name, offline=settings.offline, dtype=model_config.dtype or "auto", **given)
