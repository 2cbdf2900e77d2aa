"""The other two recipes from start to end, on another model and other files."""

import json
from pathlib import Path

import pytest
from transformers import LlamaForSequenceClassification

from exo_toy.integrations.lm import main
from tests.hf.conftest import tiny_llama
from tests.hf.lm_commands import Home, rows_of, write_pairs

RECIPES = Path(main.__file__).parent / "recipes"
# Of each recipe: its data, and the files that it writes between them and the alignment.
FILES = {
    "hh": (["hh/train.json", "hh/test.json"], ["hh_sft/train.json", "hh_rw/train.json"]),
    "imdb": (
        ["imdb_prefix10/train.json", "imdb_prefix10/test.json"],
        ["imdb_prefix10_sft/train.json", "imdb_prefix10_pref/train.json", "imdb_prefix10_rw/train.json"],
    ),
}


@pytest.mark.parametrize("recipe", FILES)
def test_a_recipe_ends_with_an_evaluation(recipe, tmp_path, tokenizer):
    given, written = FILES[recipe]
    model = tiny_llama(len(tokenizer))
    model.save_pretrained(tmp_path / "weights")
    tokenizer.save_pretrained(tmp_path / "weights")
    made = Home(tmp_path, RECIPES / f"{recipe}.yaml")
    if recipe == "imdb":
        made.vars["oracle"] = tmp_path / "oracle"
        classifier = LlamaForSequenceClassification(tiny_llama(len(tokenizer), num_labels=2).config)
        classifier.save_pretrained(tmp_path / "oracle")
        tokenizer.save_pretrained(tmp_path / "oracle")
    for seed, name in enumerate(given):
        write_pairs(tmp_path / "data" / name, 6, seed=seed)
    made.run_all()
    columns = [rows_of(tmp_path / "data" / name)[0].keys() for name in written]
    assert columns[0] == {"prompt", "completions", "finished"}
    assert columns[-1] == {"prompt", "completions", "finished", "rewards"}
    if recipe == "imdb":
        assert columns[1] == {"prompt", "chosen", "rejected", "finished"}
    summary = json.loads((tmp_path / "runs/evaluation/summary.json").read_text())
    assert [entry["name"] for entry in summary["policies"]] == ["reference", "checkpoint-2", "checkpoint-3"]
    assert all(abs(entry["reward"]["mean"]) > 0 for entry in summary["policies"])
