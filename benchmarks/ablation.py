"""Does each part of TGR matter? Grouping, gradient regularization and task loss, over several seeds, on one bank.

    python benchmarks/ablation.py --seeds 0 1 2 --out benchmarks/results/ablation.json

Every row is the main recipe *without replay*, so that what stage 4 does is seen, with one thing changed and ``--steps``
steps. All rows and seeds share one bank, and are scored on the same stored meta-test episodes. Differences to the first
row are paired over episodes, with each episode's accuracy averaged over the seeds first.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from metapool.base.store import Store
from metapool.episodes import sample_episodes
from metapool.evaluate import Scores, evaluate, paired_difference
from metapool.interface.recipe import evaluation_images, load_recipe, open_pool
from metapool.methods.tgr import TGR

CLASSIFY = {"task_loss": "classify", "batch": 50, "learning_rate": 1e-3}
VARIANTS: dict[str, dict[str, Any]] = {
    "dissimilar groups": {},
    "similar groups": {"grouping": "similar"},
    "random groups": {"grouping": "random"},
    "no gradient regularization": {"alpha": 0.0},
    "a hundred times the regularization": {"alpha": 1e-1},
    "task loss episodic": {"task_loss": "episodic"},
    "task loss classify": CLASSIFY,
    "task loss classify, episodes replayed": {**CLASSIFY, "replay": "episodes", "replay_updates": 4},
    "relational replay, half the steps": {"replay": "relational", "steps": 30},
}


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown page.

    Args:
        result: content of the JSON file.

    Returns:
        Markdown.
    """
    settings = result["settings"]
    lines = [
        "# Does each part of TGR matter?",
        "",
        f"Made by `{result['command']}` from `benchmarks/results/ablation.json`: stage 4 without replay unless said,",
        f"{settings['steps']} steps, seeds {', '.join(map(str, settings['seeds']))}, one bank, 600 5-way episodes of",
        "meta-test classes. Mean ± deviation over the seeds, in percent; difference to the first row with its 95 %",
        "interval over episodes.",
        "",
        "| variant | 1-shot | difference | 5-shot | difference |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        cells = [name]
        for shot in ("1", "5"):
            score, gap = row["shots"][shot], row["shots"][shot]["difference_to_first"]
            cells += [f"{score['mean']:.1f} ± {score['spread']:.1f}"]
            cells += [f"{gap['mean']:+.1f} ({gap['low']:+.1f} to {gap['high']:+.1f})"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs all variants and writes one JSON file and one page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), help="names of variants")
    parser.add_argument("--store", type=Path, default=Path("store"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ablation.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/ablation.md"))
    parser.add_argument("--page-only", action="store_true", help="write the page from the JSON file and run nothing")
    options = parser.parse_args()
    if options.page_only:
        options.page.write_text(table(json.loads(options.out.read_text())))
        return
    recipe = load_recipe("main")
    assert isinstance(recipe.method, TGR)
    pool = open_pool(recipe.pool)
    store = Store(options.store, jobs=2)
    input = pool.manifest.models[0].input
    images, validation = (evaluation_images("icons", split, input) for split in ("test", "val"))
    episodes = {shot: sample_episodes(images, 5, shot, 15, 600, recipe.evaluation.seed) for shot in (1, 5)}
    base = recipe.method.model_copy(update={"replay": "none", "steps": options.steps, "check_every": 50})
    rows: dict[str, Any] = {}
    reference: dict[int, Scores] = {}
    for name in options.only:
        method = base.model_copy(update=VARIANTS[name])
        accuracies: dict[int, list[Any]] = {1: [], 5: []}
        for seed in options.seeds:
            model = method.fit(pool, store, seed, validation)
            for shot, drawn in episodes.items():
                accuracies[shot].append(evaluate(model, images, drawn).accuracies)
        row: dict[str, Any] = {"changed": {k: str(v) for k, v in VARIANTS[name].items()}, "shots": {}}
        for shot, runs in accuracies.items():
            means = [100 * float(run.mean()) for run in runs]
            scores = Scores(np.mean(runs, axis=0))
            difference = paired_difference(scores, reference.setdefault(shot, scores))
            row["shots"][str(shot)] = {
                "mean": round(float(np.mean(means)), 2),
                "per_seed": [round(mean, 2) for mean in means],
                "spread": round(float(np.std(means, ddof=1)), 2) if len(means) > 1 else None,
                "difference_to_first": {k: round(v, 2) for k, v in vars(difference).items()},
            }
        rows[name] = row
        print(name, row["shots"], flush=True)
        settings = {"steps": options.steps, "seeds": options.seeds, "method": base.model_dump(mode="json")}
        settings["episodes"] = {str(shot): drawn.digest() for shot, drawn in episodes.items()}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        command = f"python benchmarks/ablation.py --seeds {' '.join(map(str, options.seeds))} --steps {options.steps}"
        options.out.write_text(json.dumps({"command": command, "settings": settings, "rows": rows}, indent=1) + "\n")
    options.page.write_text(table(json.loads(options.out.read_text())))


if __name__ == "__main__":
    main()
