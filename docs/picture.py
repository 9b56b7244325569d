"""Draws docs/quickstart.png: a run's view pairs above its curves.

python docs/picture.py runs/quickstart docs/quickstart.png
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

from byolt.files.rows import read_metrics
from byolt.tools.ablation.results import save_curves

PANELS = {"loss": "BYOL loss", "knn_top1": "kNN top-1 (%)", "projection_std": "spread of the projections"}


def main(run: Path, out: Path) -> None:
    """Puts RUN/views.png and the curves of RUN/metrics.jsonl into one PNG of 1,000 pixels in width."""
    with tempfile.TemporaryDirectory() as scratch:
        curves = Path(scratch) / "curves.png"
        rows = read_metrics(run / "metrics.jsonl")
        save_curves(curves, {"quickstart": [rows]}, PANELS, "The curves of the run")
        parts = [Image.open(path).convert("RGB") for path in (run / "views.png", curves)]
        parts = [part.resize((1000, round(1000 * part.height / part.width))) for part in parts]
    page = Image.new("RGB", (1000, sum(part.height for part in parts)), "white")
    page.paste(parts[0], (0, 0))
    page.paste(parts[1], (0, parts[0].height))
    page.quantize(256).save(out, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
