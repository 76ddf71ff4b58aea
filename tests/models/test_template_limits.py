"""Chat templates that never end, or want all memory: one line, in bounded time."""

import resource
import signal
import time

import pytest

from jaxdistill.cli import main
from jaxdistill.models import template_limits
from jaxdistill.models.chat_template import TemplateError, render
from tests import tiny

CHAT = [{"role": "user", "content": "hi"}]
LOOP = "{% for i in range(99999) %}"
BOMBS = {
    "a long range": ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    "loops in loops": (f"{LOOP}{LOOP}{LOOP}x{'{% endfor %}' * 3}", "more than 1 seconds"),
    "loops that write nothing": (f"{LOOP}{LOOP}{'{% endfor %}' * 2}", "more than 1 seconds"),
    "a repeated text": ("{{ 'x' * 10**11 }}", "GiB of memory"),
    "a doubled text": (
        "{% set n = namespace(x='xx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
        "{% endfor %}",
        "GiB of memory|more than 1 seconds",
    ),
    "a long text": ("{{ 'x' * 20000000 }}", "writes 20000000 characters|more than 1 seconds"),
    "a call without end": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "what it says itself": ("{{ raise_exception('only\\nsystem') }}", "only system"),
    "no syntax": ("{% if", "unexpected|end of template|Expected"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_is_bounded(name, monkeypatch):
    template, message = BOMBS[name]
    monkeypatch.setattr(template_limits, "SECONDS", 1.0)
    before = signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)
    began = time.monotonic()
    with pytest.raises(TemplateError, match=message) as error:
        render(tiny.byte_tokenizer(template), CHAT)
    assert "\n" not in str(error.value) and time.monotonic() - began < 8
    assert (signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)) == before
    assert not signal.getitimer(signal.ITIMER_REAL)[0]


def test_generate_says_a_templates_error_in_one_line(tmp_path, capsys):
    tiny.save_model(tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text("{{ raise_exception('no users') }}")
    with pytest.raises(SystemExit) as end:
        main(["generate", "--model", str(tmp_path / "m"), "--prompt", "hi"])
    assert end.value.code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("note: ")]
    assert line.startswith("error: ") and "no users" in line


def test_templates_without_a_default_are_one_line(tmp_path, capsys):
    tiny.save_model(tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").unlink(missing_ok=True)
    folder = tmp_path / "m" / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text("B")
    (tmp_path / "m" / "checksums.crc32").unlink(missing_ok=True)
    with pytest.raises(SystemExit) as end:
        main(["generate", "--model", str(tmp_path / "m"), "--prompt", "hi"])
    assert end.value.code == 2 and "tool_use" in capsys.readouterr().err
