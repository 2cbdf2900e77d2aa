"""Commands of the pipeline, files for them, and what they refuse."""

import json
import random

from exo_toy import cli
from exo_toy.integrations.lm.settings import read_recipe

ROW = {"prompt": "a", "completions": ["b", "c"], "rewards": [0.0, 1.0]}
SAMPLE = ["--temperature", "1", "--max_new_tokens", "4"]
WORDS = "the film was good bad very and cat sat on mat".split()
# What a run on a CPU in seconds changes of a recipe.
SMALL = {
    "sft": ["--use_cpu", "--max_steps", "2", "--per_device_train_batch_size", "2"],
    "reward": ["--use_cpu", "--max_steps", "2", "--per_device_train_batch_size", "2"],
    "align": ["--use_cpu", "--max_steps", "3", "--save_steps", "2", "--learning_rate", "1e-3"],
    "sample": ["--device", "cpu", "--max_new_tokens", "8", "--batch_size", "4"],
    "score": ["--device", "cpu"],
    "evaluate": ["--device", "cpu", "--max_new_tokens", "8", "--batch_size", "4", "--num_samples", "3"],
}
for flags in (SMALL["sft"], SMALL["reward"], SMALL["align"]):
    flags += ["--gradient_accumulation_steps", "1", "--activation_checkpointing", "False", "--disable_tqdm", "True"]


def text(generator, count):
    return " " + " ".join(generator.choices(WORDS, k=count))


def write_pairs(path, count, seed):
    generator = random.Random(seed)
    rows = [
        {"prompt": text(generator, 4)[1:], "chosen": text(generator, 3) + " good", "rejected": text(generator, 5)}
        for _ in range(count)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))


def rows_of(path):
    content = path.read_text()
    return json.loads(content) if content.startswith("[") else [json.loads(line) for line in content.splitlines()]


class Home:
    """A folder with a tiny model, data, and the recipe on them."""

    def __init__(self, path, recipe, **variables):
        self.path, self.recipe = path, recipe
        self.vars = {name: path / name for name in ("weights", "data", "runs")} | {"bf16": "false"} | variables

    def run(self, section, *flags):
        given = [f"--var={name}={value}" for name, value in self.vars.items()]
        stage = section.split("-")[0]
        own = ["--config", str(self.recipe), "--section", section, *given]
        return cli.main(["lm", stage, *own, *SMALL[stage], *flags])

    def run_all(self):
        for section in read_recipe(str(self.recipe), [f"{name}={value}" for name, value in self.vars.items()]).sections:
            assert self.run(section) == 0, section


def refused(capsys, *arguments):
    """The message of a command that exits with 2."""
    assert cli.main(["lm", *arguments]) == 2
    # Before the message at most a progress bar.
    *bar, message = capsys.readouterr().err.strip("\n").split("\n")
    assert message.startswith("exo-toy: ") and len(bar) <= 1
    return message


def file(folder, *rows, name="data.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)
