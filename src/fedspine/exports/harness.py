"""Exported language models under EleutherAI's lm-evaluation-harness (`lm_eval`), pruned ones too.

Stock `lm_eval` loads a folder by its configuration, which cannot describe widths that differ from
layer to layer. So the module that `load_model` builds is handed to the harness's own class for
Hugging Face models; tasks, requests and metrics are all the harness's. The only file that imports
lm_eval.
"""

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fedspine.core.errors import BadInput, unknown
from fedspine.exports.load import load_model
from fedspine.exports.loaded import Loaded

EXTRA = "pip install 'fedspine[lm-eval]'"


def evaluate(
    folder: Path,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    limit: int | None = None,
    batch: int = 1,
) -> dict[str, dict[str, Any]]:
    """The metrics of each task, as the harness reports them, of the language model in `folder`.

    `include` is a folder with task files of one's own, which alone are then known, so that nothing
    is downloaded; `limit` takes the first rows of each task. Raises BadInput where lm_eval is not
    installed, for a model that is no language model or that another runtime computes, and for an
    unknown task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise BadInput(f"scoring with lm_eval needs that package; {EXTRA}")
    if include is not None and not include.is_dir():
        raise BadInput(f"{include} is not a folder; give one with task files (.yaml)")
    loaded = _language_model(folder)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(
        include_path=None if include is None else str(include), include_defaults=include is None
    )
    for task in tasks:
        if task not in manager.all_tasks:
            raise unknown("task", task, manager.all_tasks)
    model = HFLM(
        pretrained=loaded.module,
        tokenizer=loaded.tokenizer,
        backend="causal",
        batch_size=batch,
        device="cpu",
    )
    results = simple_evaluate(
        model=model, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0
    )
    return dict(results["results"])


def _language_model(folder: Path) -> Loaded:
    loaded = load_model(folder)
    if loaded.kind != "causal-lm":
        raise BadInput(
            f"{folder} is a classifier, and lm_eval scores language models; give one of kind "
            "causal-lm"
        )
    if not isinstance(loaded.module, PreTrainedModel):
        raise BadInput(
            f"{folder} is computed by {loaded.runtime}, which lm_eval cannot drive; export the "
            "model with --format hf"
        )
    return loaded
