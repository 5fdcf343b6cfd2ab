"""Second names of models. Over the whole repository a name means one thing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from repository.snapshot import ModelFolder, Problem


def settle_aliases(models: Mapping[str, ModelFolder]) -> dict[str, ModelFolder]:
    """The same models, each alias with one owner: a model's own name comes first, then the first
    claimant by name. The others lose the alias and are told."""
    owners: dict[str, str] = {}
    settled = dict(models)
    for name in sorted(n for n, m in models.items() if m.aliases):
        folder = models[name]
        kept: list[str] = []
        told: list[Problem] = []
        for alias in folder.aliases:
            owner = alias if alias in models else owners.setdefault(alias, name)
            if owner == name and alias != name:
                kept.append(alias)
            elif owner != name:
                whose = "is a model's name" if owner == alias else f"belongs to '{owner}' already"
                message = f"the alias '{alias}' {whose}"
                told.append(Problem(_where(folder), "alias", message, "choose another", None, True))
        if len(kept) != len(folder.aliases):
            problems = (*folder.problems, *(p for p in told if p not in folder.problems))
            settled[name] = replace(folder, aliases=tuple(kept), problems=problems)
    return settled


def _where(folder: ModelFolder) -> str:
    source = next((s.sources.get("aliases", "") for s in folder.specs.values()), "")
    return f"{folder.name}/{source}" if source else folder.name
