"""Makes tests/fixtures/checkpoint_v1.pt.xz, once for each version of the format; prints its digest.

python tests/make_golden_checkpoint.py

A checkpoint that train.py wrote after two steps. So that it is small, all floats are rounded to quarters: most become 0.
"""

import lzma
import tempfile
from pathlib import Path

from torch import Tensor
from whole_runs import Run, write_images

from byolt.model.run import checkpoint
from byolt.model.run.digest import digest

TO = Path(__file__).parent / "fixtures" / f"checkpoint_v{checkpoint.VERSION}.pt.xz"


def coarse(tensor: Tensor) -> Tensor:
    return (tensor * 4).round() / 4 if tensor.is_floating_point() else tensor


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), write_images(Path(folder) / "images"))
        assert run("train.stop_at_step=2").wait() == 0
        state = run.newest()[1]
        state["model"] = {name: coarse(tensor) for name, tensor in state["model"].items()}
        state["momentum"] = {i: {"momentum": coarse(of["momentum"])} for i, of in state["momentum"].items()}
        state["config"]["run"]["out"], state["config"]["data"]["path"] = "run", "images"
        checkpoint.write(Path(folder) / "golden.pt", state)
        TO.write_bytes(lzma.compress((Path(folder) / "golden.pt").read_bytes(), preset=9))
    print(f"{TO}: {TO.stat().st_size:,} bytes, digest {digest(state)}")


if __name__ == "__main__":
    main()
