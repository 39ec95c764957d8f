"""Many methods, several seeds, one table: the same pool, the same episodes, and what each method cost to make."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metapool.base.errors import MetapoolError
from metapool.base.store import Progress, Store, silent
from metapool.evaluate import Interval, Scores, paired_difference
from metapool.interface.recipe import Recipe, open_pool
from metapool.interface.run import Line, prepare, results
from metapool.interface.run.files import by_domain, episodes_row, replace_text, run_file, write_json
from metapool.methods import NAMED, describe, suits


def compare(recipe: Recipe, names: Sequence[str], seeds: int, progress: Progress = silent) -> Path:
    """Fits methods with several seeds and scores all on the same episodes.

    Args:
        recipe: pool, episodes, the method that is the headline; its own rivals are left out.
        names: of the rivals, as in a recipe's ``compare``; ``all`` for every one that has a name and suits the pool,
            ``ensemble-5`` and ``input-control``.
        seeds: how many, from the recipe's own on.
        progress: called as ``progress(stage, done, total)``.

    Returns:
        ``<out>/<name>/compare.json``; the same as a table in Markdown lies beside it.

    Raises:
        MetapoolError: when there are no seeds.
    """
    if seeds < 1:
        raise MetapoolError(f"--seeds: at least 1, not {seeds}")
    main = recipe.method.name
    rivals = list(names)
    if rivals == ["all"]:
        pool = open_pool(recipe.pool)
        rivals = [*(name for name, method in NAMED.items() if suits(method, pool)), "ensemble-5", "input-control"]
    recipe = recipe.model_copy(update={"compare": tuple(name for name in rivals if name != main)})
    job = prepare(recipe, progress)
    found = [results(job, recipe.seed + number) for number in range(seeds)]
    lines = {name: [one[name] for one in found] for name in found[0]}
    scores = {
        name: {shot: _mean([one.scores[shot] for one in every]) for shot in job.episodes}
        for name, every in lines.items()
    }
    table = {
        name: {
            **({} if name in job.references else {k: v for k, v in describe(job.methods[name]).items() if k != "cost"}),
            **({} if name in job.references else {"settings": job.methods[name].model_dump(mode="json")}),
            **every[0].row,
            "seconds": None if name in job.references else [_seconds(one, job.store) for one in every],
            "shots": _shots(scores[name], [one.scores for one in every]),
            **_domains(scores[name], [one.scores for one in every]),
        }
        for name, every in lines.items()
    }
    kinds = {name: job.methods[name].name for name in lines if name not in job.references}
    pairs: list[tuple[str, str]] = [(main, name) for name in lines if name != main]
    pairs += [(name, kind) for name, kind in kinds.items() if kind not in (name, main) and kind in lines]
    paired = [
        {"a": a, "b": b, "shot": shot, **_rounded(paired_difference(scores[a][shot], scores[b][shot]))}
        for a, b in pairs
        for shot in job.episodes
    ]
    about, named = run_file(recipe, job.pool, "", main), "" if recipe.name == "compare" else f"{recipe.name} "
    result = {
        "command": f"metapool compare {named}--methods {' '.join(names)} --seeds {seeds}",
        **{key: about[key] for key in ("version", "machine", "recipe")},
        "pool": about["pool"]["name"],
        "seeds": [recipe.seed + number for number in range(seeds)],
        "episodes": {k: v for k, v in episodes_row(job.episodes, scores[main]).items() if k != "hash"},
        "methods": dict(sorted(table.items(), key=lambda item: -sum(s["mean"] for s in item[1]["shots"].values()))),
        "paired": paired,
    }
    folder = Path(recipe.out) / recipe.name
    write_json(folder / "compare.json", result)
    replace_text(folder / "compare.md", table_of(result))
    return folder / "compare.json"


def table_of(result: dict[str, Any]) -> str:
    """A comparison as a table in Markdown, best first.

    Args:
        result: content of ``compare.json``.

    Returns:
        The table and a sentence that says what its numbers are.
    """
    shots, several = list(next(iter(result["methods"].values()))["shots"]), len(result["seeds"]) > 1
    heads = ["method", *(f"{shot}-shot" for shot in shots), "CPU seconds", "networks", "ms / image", "needs"]
    domains = list(next(iter(result["methods"].values())).get("domains", ()))
    rows = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    alone = ["| " + " | ".join(["method", *(f"{domain}, {shot}-shot" for domain in domains for shot in shots)]) + " |"]
    alone.append("|" + "---|" * (1 + len(domains) * len(shots)))
    for name, row in result["methods"].items():
        shown = (
            f"*{name}* (real images)"
            if not row["data_free"]
            else f"{name} (transductive)"
            if row["transductive"]
            else name
        )
        accuracies = [_cell(score, several) for score in row["shots"].values()]
        cells = [_cell(score, several) for domain in domains for score in row["domains"][domain].values()]
        alone.append("| " + " | ".join([shown, *cells]) + " |")
        seconds = "" if row["seconds"] is None else f"{statistics.fmean(row['seconds']):.0f}"
        cells = [
            shown,
            *accuracies,
            seconds,
            str(row["models_at_inference"]),
            f"{row['ms_per_image']:.2f}",
            row.get("needs", "images"),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    episodes = result["episodes"]
    over = (
        f"mean over {len(result['seeds'])} seeds with the 95 % interval over episodes and, in brackets, the standard "
        "deviation between seeds"
        if several
        else f"with 95 % intervals over episodes, seed {result['seeds'][0]} alone"
    )
    said = (
        f"{episodes['n']} {episodes['way']}-way episodes of unseen classes, {episodes['query']} queries a class; "
        f"percent, {over}. CPU seconds: all that one such model was made of, from the pool on, each part on one thread."
    )
    if domains:
        said = f"Means over {len(domains)} domains, each with as many episodes. " + said
        return "\n".join([*rows, "", said, "", "Each domain alone:", "", *alone, "", *_variants(result)])
    return "\n".join([*rows, "", said, "", *_variants(result)])


def _variants(result: dict[str, Any]) -> list[str]:
    """Variants beside the method that they are of, where both were compared."""
    main = result["recipe"]["method"]["name"]
    gaps: dict[tuple[str, str], dict[int, str]] = {}
    for pair in result["paired"]:
        if pair["a"] != main:
            said = f"{pair['mean']:+.1f} ({pair['low']:+.1f} to {pair['high']:+.1f})"
            gaps.setdefault((pair["a"], pair["b"]), {})[pair["shot"]] = said
    if not gaps:
        return []
    shots = list(next(iter(gaps.values())))
    rows = ["| " + " | ".join(["variant", "against", *(f"{shot}-shot" for shot in shots)]) + " |"]
    rows.append("|" + "---|" * (2 + len(shots)))
    rows += [f"| {a} | {b} | {' | '.join(found.values())} |" for (a, b), found in gaps.items()]
    return ["Each variant against its method, points of accuracy (95 % interval over episodes):", "", *rows, ""]


def _cell(score: dict[str, Any], several: bool) -> str:
    return f"{score['mean']:.1f} ± {score['ci95']:.1f}" + (f" ({score['between_seeds']:.1f})" if several else "")


def methods_summary() -> list[dict[str, Any]]:
    """All methods that have a name.

    Returns:
        One dictionary for each: ``name``, ``paper``, ``needs``, ``cost``, ``about``.
    """
    return [{"name": name, **describe(method)} for name, method in NAMED.items()]


def _mean(scores: list[Scores]) -> Scores:
    """Accuracy on every episode, averaged over seeds: seeds of one episode are not episodes of their own."""
    return Scores.of(np.mean([score.every for score in scores], axis=0), tuple(scores[0].domains))


def _domains(mean: dict[int, Scores], every: list[dict[int, Scores]]) -> dict[str, Any]:
    alone = [by_domain(one) for one in every]
    found = {name: _shots(scores, [one[name] for one in alone]) for name, scores in by_domain(mean).items()}
    return {"domains": found} if found else {}


def _shots(mean: dict[int, Scores], every: list[dict[int, Scores]]) -> dict[str, Any]:
    return {str(shot): _numbers(scores, [one[shot] for one in every]) for shot, scores in mean.items()}


def _numbers(mean: Scores, every: list[Scores]) -> dict[str, Any]:
    seeds = [round(score.interval.mean, 3) for score in every]
    spread = statistics.stdev(seeds) if len(seeds) > 1 else 0.0
    interval = mean.interval
    return {
        "mean": round(interval.mean, 3),
        "ci95": round(interval.ci95, 3),
        "seeds": seeds,
        "between_seeds": round(spread, 3),
    }


def _rounded(interval: Interval) -> dict[str, float]:
    return {end: round(value, 3) for end, value in vars(interval).items()}


def _seconds(line: Line, store: Store) -> float:
    own: list[float] = [made["cpu_seconds"] for made in store.ancestry(line.folder).values()]
    return round(sum(own), 1)
