"""URLs as people write and mistype them: refused with the setting and a remedy, and their secrets are never printed."""

import argparse
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("obstore")

from byolt.configs import command_line, schema
from byolt.configs.schema import DataConfig
from byolt.files.console import say
from byolt.files.paths import copy_first, home_path, without_secrets
from byolt.files.storage import retry
from byolt.files.weights import weights_kind
from byolt.pipelines.convert.from_files import expand_source
from byolt.pipelines.remote import dataset
from byolt.pipelines.sources import check_paths, open_split

SECRET = "planted-secret-4711"
URLS = {  # URL: what is said of it as data.path
    f"http://h/a.beton?image=a&X-Amz-Signature={SECRET}": "a query after the question mark",
    f"http://h/a.beton?label=a&label={SECRET}/x": "",
    f"http://h/s?a,{SECRET}": "a query",
    f"http://h/s?a 'b {SECRET}": "a query",
    f"http://u:SEK/{SECRET}@h/s": "holds a user name or a password",
    f"http://u:a b{SECRET}@h/s": "holds a user name or a password",
    f"http://u:?#{SECRET}@h/s": "holds a user name or a password",
    f"HTTP://u:{SECRET}@h/s": "holds a user name or a password",
    f"http:/u:{SECRET}@h/s": "holds a user name or a password",
    f"http:u:{SECRET}@h/s": "holds a user name or a password",
    f"http:\\\\u:{SECRET}@h\\s": "holds a user name or a password",
    f"train,http://u:{SECRET}@h/s": "holds a user name or a password",
    f"ftp://u:{SECRET}@h/s": "URLs are read as s3, gs, az, http, https",
    f"http://h/s#{SECRET}": "what follows # or ;",
    f"http://h/s;{SECRET}": "what follows # or ;",
    "http:/h/s": "is not a valid URL: name one folder as scheme://host/folder",
    "http://[::1/s": "is not a valid URL",
    "http://127.0.0.1:99999/s": "is not a valid URL.* a port up to 65535",
    "http://h h/s": "is not a valid URL",
    "http:///a.tar": "is not a valid URL",
}


def _data_path(url: str) -> None:
    check_paths({"data.path": url})


def _setting(url: str, key: str) -> None:
    schema.load("quickstart", [f"{key}={url}"])


OUTPUTS: dict[str, Callable[[str], object]] = {  # what begins the message: what reads the URL
    "data.path: ": _data_path,
    "eval.path: ": lambda url: check_paths({"eval.path": url}),
    "model.init_from=.*only local files are read": weights_kind,
    "run.out=.*must be a local or mounted folder": lambda url: _setting(url, "run.out"),
    "data.cache=.*must be a local or mounted folder": lambda url: _setting(url, "data.cache"),
    "must be a local or mounted path": home_path,  # of options
    "SRC .* must be local": expand_source,
    "--resume .* does not exist": command_line.check_resume,
}


def test_a_folder_is_copied_recursively_and_a_file_is_not() -> None:
    """The AWS command copies nothing of a single file with --recursive."""
    for url, command in (
        ("s3://b/run", "aws s3 cp --recursive"),
        ("s3://b/encoder.safetensors", "aws s3 cp"),
    ):
        assert copy_first(url).endswith(f"with {command}")


@pytest.mark.parametrize("said", OUTPUTS)
def test_no_output_shows_a_secret(said: str) -> None:
    for url in URLS:
        if url.startswith("http://h/a.beton?label") and said.endswith("path: "):  # is sound
            continue
        with pytest.raises((ValueError, argparse.ArgumentTypeError), match=said) as caught:
            OUTPUTS[said](url)
        assert SECRET not in str(caught.value), url


def test_a_line_of_output_shows_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    for url in URLS:
        say(f"error: config file {url} does not exist")
        said = capsys.readouterr().out
        assert SECRET not in said and said.startswith("error: config file "), url


@pytest.mark.parametrize("url", URLS)
def test_a_url_is_refused_with_a_remedy(url: str) -> None:
    assert SECRET not in without_secrets(f"warning: {url}: HTTP 503\nfor 3 s") + retry.cause(OSError(url))
    assert without_secrets(f"warning: {url}\nfor 3 s: a@b").endswith("\nfor 3 s: a@b")
    if URLS[url]:
        with pytest.raises(ValueError, match=f"^data.path: .*{URLS[url]}"):
            _data_path(url)


def test_the_config_is_shown_without_secrets_that_yaml_would_fold() -> None:
    config = schema.load("quickstart", [f"eval.path=http://user:{'a ' * 50}{SECRET}@h/s"])
    assert SECRET not in schema.to_yaml(config, secrets=False)
    assert SECRET in schema.to_yaml(config)


@pytest.mark.parametrize("scheme", ["s3://b", "https://h", "GS://b"])
def test_sound_urls_are_data_paths_alone(scheme: str) -> None:
    _data_path(f"{scheme}/a%40b/train")
    with pytest.raises(ValueError, match=rf"run\.out='{scheme}/run': must be a local or mounted folder"):
        _setting(f"{scheme}/run", "run.out")


# ── answers of servers ──────────────────────────────────────────────────────────────────────────────────────


class _Server(ThreadingHTTPServer):
    answer: tuple[int, dict[str, str], bytes]  # status, headers, body
    asked: list[str]


@pytest.fixture
def odd_server() -> Iterator[_Server]:
    class Handler(BaseHTTPRequestHandler):
        server: _Server

        def log_message(self, format: str, *args: object) -> None: ...

        def do_GET(self) -> None:
            self.server.asked.append(self.path)
            status, headers, body = self.server.answer
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_GET

    with _Server(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize(
    ("answer", "message", "asked"),
    [
        ((302, {"Location": "/s/manifest.json"}, b""), "the server redirects in a circle: check the URL", 11),
        ((302, {"Location": "ftp://u:pw@h/s"}, b""), "redirects to a URL that is not read", 1),
        ((200, {}, b"\n<!DOCTYPE html><html>"), "not a manifest: it begins with '<!DOCTYPE html", 1),
        ((200, {}, b'{"format": "tar"}'), "is not a byolt-shards manifest", 1),
        ((200, {"Content-Length": "1000000000"}, b"{}"), "has 1,000,000,000 bytes, .* at most are read", 1),
    ],
)
def test_another_answer_than_a_manifest_is_final(
    odd_server: _Server, tmp_path: Path, answer: tuple[int, dict[str, str], bytes], message: str, asked: int
) -> None:
    odd_server.answer = answer
    settings = DataConfig.model_validate({"path": "-", "cache": str(tmp_path)})
    with pytest.raises(ValueError, match=rf"^data\.path: http.*/s/manifest\.json.*{message}") as caught:
        open_split("data.path", f"http://127.0.0.1:{odd_server.server_address[1]}/s", settings)
    assert odd_server.asked == ["/s/manifest.json"] * asked and len(str(caught.value)) < 250
    assert not [*tmp_path.rglob(dataset.MANIFEST)]
