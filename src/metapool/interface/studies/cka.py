"""Whether models of one architecture, or of one domain, see the same images alike (figure 1 of TGR)."""

from typing import ClassVar

import numpy as np
import pydantic

from metapool.base.store import Store, generator_for
from metapool.interface.figures.pools import similarity_map
from metapool.interface.studies.pools import PoolsStudy, pool_cka
from metapool.interface.studies.resampling import Estimate, alike, block_means, contrast, mean_of_pairs
from metapool.interface.studies.study import Findings, Row


class CKAStudy(PoolsStudy):
    """Unbiased CKA of the features of all pairs of models, on recovered images of all of them."""

    title: ClassVar[str] = "Do models of one architecture or domain see images alike?"
    source: ClassVar[str] = "TGR, figure 1"
    named: ClassVar[tuple[str, ...]] = ("first", "second")

    images: int = pydantic.Field(default=1200, ge=4)
    """Images that all models look at, about; the same number recovered from each."""
    batch: int = pydantic.Field(default=100, ge=4)
    """Images of a minibatch of the estimate."""
    seed: int = 0
    """Of the order of the images and of the bootstrap."""

    def measure(self, store: Store) -> Findings:
        """CKA of all pairs; means of pairs that are alike and of pairs that are not, with the other trait held equal.

        Args:
            store: finished stages.

        Returns:
            A row for each pair.
        """
        _, pools, bank = self.opened(store)
        similarity = pool_cka(pools, bank, self.images, self.batch, self.seed, store)
        ids, domains, architectures = list(pools.entries), pools.domains, pools.architectures
        rows: list[Row] = [
            {
                "first": ids[i],
                "second": ids[j],
                "domain_first": domains[i],
                "domain_second": domains[j],
                "architecture_first": architectures[i],
                "architecture_second": architectures[j],
                "cka": round(float(similarity[i, j]), 5),
            }
            for i, j in zip(*np.triu_indices(len(ids), 1))
        ]
        traits = {"architecture": alike(architectures), "domain": alike(domains)}
        found: dict[str, dict[str, Estimate]] = {}
        for trait, same in traits.items():
            (held,) = (other for name, other in traits.items() if name != trait)
            generator = generator_for(self.seed, "study-cka", trait)
            found[trait] = {
                "same": mean_of_pairs(similarity, same & held, generator),
                "different": mean_of_pairs(similarity, ~same & held, generator),
                "difference": contrast(similarity, same & held, ~same & held, generator),
            }
        blocks = block_means(similarity, architectures, alike(domains), generator_for(self.seed, "study-cka", "blocks"))
        summary = {
            "models": [
                {"id": id, "domain": domain, "architecture": architecture}
                for id, domain, architecture in zip(ids, domains, architectures)
            ],
            **{trait: {name: part.rounded() for name, part in parts.items()} for trait, parts in found.items()},
            "architectures_of_one_domain": {name: block.rounded() for name, block in blocks.items()},
        }
        return Findings(rows, _answer(found, len(ids)), summary)

    def draw(self, findings: Findings) -> dict[str, str]:
        """The heat map.

        Args:
            findings: what :meth:`measure` gave.

        Returns:
            One SVG.
        """
        models = findings.summary["models"]
        place = {model["id"]: number for number, model in enumerate(models)}
        matrix = np.eye(len(models))
        for row in findings.rows:
            i, j = place[str(row["first"])], place[str(row["second"])]
            matrix[i, j] = matrix[j, i] = float(row["cka"] or 0)
        labels = [(model["domain"], model["architecture"]) for model in models]
        return {"": similarity_map(matrix, labels)}


def _answer(found: dict[str, dict[str, Estimate]], models: int) -> str:
    sentences: list[str] = []
    held = {"architecture": "domain", "domain": "architecture"}
    for trait, parts in found.items():
        if not parts["difference"].measured:
            continue
        how = {1: "more alike than", -1: "less alike than", 0: "not clearly more or less alike than"}
        sentences.append(
            f"Models of one {trait} are {how[parts['difference'].sign]} models of different {trait}s (of the same "
            f"{held[trait]}): mean CKA {parts['same']} against {parts['different']}, difference {parts['difference']}."
        )
    if not sentences:
        return "There are no pairs to compare: the models differ neither in architecture nor in domain."
    return f"{' '.join(sentences)} {models} models, 95 % intervals by resampling models."
