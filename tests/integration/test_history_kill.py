"""`kill -9` at any moment loses no finished turn: what a program reported as saved is there when it is opened again."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

from koala_local.chat.history import History

REPOSITORY = Path(__file__).parents[2]

CHAT = """
import sys
from pathlib import Path
from koala_local.chat.history import History
history = History.open(Path(sys.argv[1]))
assert history.path, history.warning
session = history.create(model="m", format="f", system="", seed=1)
parent = None
for number in range(100_000):
    text = f"turn {number} " + "x" * (number * 97 % 9000)
    parent = history.add_turn(session.id, parent=parent, user=text, reply=text[::-1], finish="stop",
                              reply_ids=range(number % 500), vocabulary="v", attempt=0, dropped=0).id
    print(session.id, parent, flush=True)
"""


def killed_after(folder: Path, seconds: float) -> list[tuple[str, int]]:
    """Let a program talk, kill it `seconds` after its first turn, and return what it said was saved."""
    command = [sys.executable, "-c", CHAT, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as child:
        assert child.stdout is not None
        first = child.stdout.readline()
        time.sleep(seconds)
        child.kill()
        lines = [first, *child.stdout.read().splitlines(keepends=True)]
    whole = [line.split() for line in lines if line.endswith("\n")]
    return [(session, int(node)) for session, node in whole]


def test_every_reported_turn_survives(tmp_path: Path) -> None:
    dice = random.Random(15)
    reported: list[tuple[str, int]] = []
    for _ in range(15):
        reported += killed_after(tmp_path, dice.uniform(0.0, 0.4))
        history = History.open(tmp_path)
        assert history.warning == "" and history.path is not None
        saved = {}
        for summary in history.sessions():
            session, nodes = history.load(summary.id)
            saved[session.id] = {node.id for node in nodes}
            assert session.head == nodes[-1].id
            for number, node in enumerate(nodes):
                assert node.user.startswith(f"turn {number} ") and node.reply == node.user[::-1]
                assert node.reply_ids == tuple(range(number % 500))
        assert all(node in saved[session] for session, node in reported)
        history.close()
    assert len(reported) > 15 and len(saved) == 15
