"""The tasks that the harness runs, and their texts: one of each kind of request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BIBLE = (
    "And it came to pass in those days, that there went out a decree from the king, that all the people should be"
    " numbered. And all went to be numbered, every one into his own city. And the word of the LORD came unto him,"
    " saying, Go up, and speak unto the children of Israel."
)
CODE = (
    "def main(args):\n    parser = argparse.ArgumentParser()\n    parser.add_argument('--name', default=None)\n"
    "    for line in sys.stdin:\n        if line.startswith('#'):\n            continue\n        print(line.strip())\n"
)
NOVEL = (
    '"My dear Mr. Bennet," said his lady to him one day, "have you heard that the house is let at last?" He replied'
    ' that he had not. "But it is," returned she; "for Mrs. Long has just been here, and she told me all about it."'
)
UNICODE = "Naïve façades — “quoted” — cost 5 €; 日本語 and 😀 are no part of the vocabulary, so they become bytes.\n"

CHOICES = [
    ("And God said, Let there be", [" light", " argparse", " a good breakfast, my dear"], 0),
    ("import os\nimport", [" sys", " the LORD", " Mr. Bennet"], 0),
    ("It is a truth universally", [" acknowledged", " def main", ","], 0),
    ("for i in range(", ["10):", "Israel", "his lady"], 0),
    (UNICODE, ["Naïve", "日本語", "\n\n"], 0),
]
ROLLING = [BIBLE, CODE, NOVEL, UNICODE, (BIBLE + "\n" + CODE + "\n") * 4, "a"]
PROMPTS = [BIBLE, CODE, NOVEL, "And he said,", "def main(", "import"]

TASKS = ("emoe_choice", "emoe_rolling", "emoe_generate")
COMMON: dict[str, Any] = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1.0}}
SETTINGS: dict[str, dict[str, Any]] = {
    "emoe_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "emoe_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "emoe_generate": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 24, "do_sample": False, "temperature": 0.0},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def write_tasks(directory: Path) -> dict[str, list[str]]:
    """Write the tasks and their documents. Returns the text of each document, by task."""
    documents: dict[str, list[dict[str, Any]]] = {
        "emoe_choice": [{"text": text, "choices": choices, "gold": gold} for text, choices, gold in CHOICES],
        "emoe_rolling": [{"text": text} for text in ROLLING],
        "emoe_generate": [{"text": text} for text in PROMPTS],
    }
    directory.mkdir(parents=True, exist_ok=True)
    for task, rows in documents.items():
        data = directory / f"{task}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        settings = {"task": task, "dataset_kwargs": {"data_files": {"test": str(data)}}, **COMMON, **SETTINGS[task]}
        # JSON is YAML
        (directory / f"{task}.yaml").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    return {task: [row["text"] for row in rows] for task, rows in documents.items()}
