"""Sends the rows of a run to Weights & Biases. Whatever fails there is a warning; the run continues without it."""

import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from byolt.configs.schema import Config
from byolt.files.atomic import replacing
from byolt.files.paths import hide_secrets

FILE = "wandb.json"  # in the run's folder: project and id, by which a resumed run continues the same one
_INIT_SECONDS = 30  # wait this long for the service before the run is recorded offline
# A run that receives a signal has 10 seconds to end; rows that are not sent by then stay on the disk.
_FINISH_SECONDS = 5


class WandbLog:
    """A run at Weights & Biases, online, or offline by WANDB_MODE=offline, without a login, or without a network."""

    def __init__(self, config: Config, first_step: int, say: Callable[[str], object]) -> None:
        """
        Args:
            config: of the run; run.wandb names the project.
            first_step: steps done; with 0 a new run begins, otherwise the one in wandb.json continues.
            say: prints a line.
        """
        self._say, self._out = say, Path(config.run.out)
        self._run: Any = None
        self.is_new = True  # it has no rows yet
        with self._harmless():
            self._begin(config, first_step)

    def _begin(self, config: Config, first_step: int) -> None:
        import wandb  # takes seconds, and needs to be installed only where it is asked for

        *entity, project = str(config.run.wandb).split("/")
        known = _read(self._out / FILE) if first_step else {}
        self.is_new = known.get("project") != config.run.wandb
        identity = secrets.token_hex(4) if self.is_new else known["id"]
        with replacing(self._out / FILE) as temporary:
            temporary.write_text(json.dumps({"project": config.run.wandb, "id": identity}) + "\n")
        given = {
            "project": project, "entity": entity[0] if entity else None, "dir": str(self._out),
            "name": self._out.resolve().name, "id": identity, "resume": "allow",
            "config": hide_secrets(config.model_dump(mode="json")),
        }  # fmt: skip
        settings = wandb.Settings(
            console="off", silent=True, disable_code=True, disable_git=True, init_timeout=_INIT_SECONDS,
            finish_timeout=_FINISH_SECONDS, x_disable_meta=True,
        )  # fmt: skip
        wandb.setup(settings=wandb.Settings(silent=True))
        reason = ""
        if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(prompt=False, verify=False):
            reason = "nobody is logged in (wandb login)"
        else:
            try:
                self._run = wandb.init(**given, settings=settings)
            except Exception as error:
                reason = " ".join(str(error).split())[:300]
        if reason:
            self._say(f"warning: wandb: {reason}: the run is recorded offline")
            wandb.teardown()  # a service that did not answer keeps the id
            self._run = wandb.init(**given, mode="offline", settings=settings)
        later = f"offline; wandb sync {self._out}/wandb/offline-run-*-{identity} sends it"
        place = later if self._run.offline else self._run.url
        self._say(f"wandb: run {identity} of {config.run.wandb}: {place}")

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Sends a row, unless a later one was sent before the run was killed and resumed."""
        with self._harmless():
            if self._run is not None and step >= self._run.step:
                self._run.log(dict(values), step=step)

    def close(self, failed: bool = False) -> None:
        """Ends the run there, at the first call; waits a few seconds for what is not yet sent."""
        with self._harmless():
            run, self._run = self._run, None
            if run is not None:
                run.finish(exit_code=int(failed))

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        """Turns an error into a warning, after which nothing more is sent."""
        try:
            yield
        except Exception as error:
            self._run = None
            reason = " ".join(str(error).split()) or type(error).__name__
            self._say(f"warning: wandb: {reason[:300]}: the run continues without it")


def _read(path: Path) -> dict[str, str]:
    """Project and id of the run so far; {} if they are not known."""
    try:
        found = json.loads(path.read_bytes())
        return found if isinstance(found["project"], str) and isinstance(found["id"], str) else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}
