"""Where training text is from and under which licence: the card of exported weights names all that was read."""

from collections.abc import Iterable

from training.verifier.clusters import KEPT_OUT, Cluster
from training.verifier.public import FOUND, TRAINING
from training.verifier.stories import Story

OWN = "Apache-2.0, written for this project"
WORDNET = "WordNet licence"
FOUND_LICENCES = {
    "mnli_a": "OANC, CC BY 3.0, CC BY-SA 3.0, MIT",
    "mnli_b": "OANC, CC BY 3.0, CC BY-SA 3.0, MIT",
    "wanli": "CC BY 4.0",
    "fever_train_part": "CC BY-SA 3.0",
    "snli_a": "CC BY-SA 4.0",
    "negation_nli": "MIT; texts of MultiNLI and SNLI",
    "ambient": "CC BY 4.0",
    "fool_me_twice": "Apache-2.0; Wikipedia text CC BY-SA 3.0",
    "med": "CC BY-SA 4.0",
    "scone": "CC0",
    "hans": "MIT",
}
DERIVED = frozenset({"pool", "repeated", "unrelated"})
"""Sources of examples that put texts of the others together anew."""


def licences(clusters: Iterable[Cluster], stories: Iterable[Story]) -> dict[str, str]:
    """The licence of every source that a stage may read: public sets, files of the corpus, stories, templates, WordNet."""
    return (
        {source.file: source.licence for source in TRAINING}
        | {name: FOUND_LICENCES[name] for name in FOUND}
        | {cluster.source: OWN for cluster in clusters if cluster.source not in KEPT_OUT}
        | {f"stories/{story.source}": OWN for story in stories}
        | {"templates": OWN, "wordnet": WORDNET}
    )


def named(read: Iterable[str], known: dict[str, str]) -> list[dict[str, str]]:
    """``{"name", "licence"}`` of what stands behind ``read``, the sources of examples; ``known``: ``licences(...)``.

    Raises:
        ValueError: the licence of a source is not known.
    """
    names: set[str] = set()
    for source in set(read) - DERIVED:
        if source == "story":
            names.update(name for name in known if name.startswith("stories/"))
        else:
            names.add("templates" if source.startswith("generated-") else source)
    unknown = sorted(names - known.keys())
    if unknown:
        raise ValueError(f"no licence is known of {', '.join(unknown)}")
    return [{"name": name, "licence": licence} for name, licence in known.items() if name in names]
