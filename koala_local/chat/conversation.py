"""One conversation: a tree of turns, kept on disk as it grows and warm in the cache where it was last.

Every operation is a walk in the tree. The path from the root to `head` is what the model sees; a new turn becomes a
child of `head`, so nothing that was said is ever overwritten.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from koala_local.chat.history import History
from koala_local.chat.kv_files import CacheMiss, KvFiles
from koala_local.chat.ledger import Answer, Exchange, Ledger
from koala_local.chat.locks import SessionLock
from koala_local.chat.saved import Branch, Node, Session, dropped_turns, lines, path_to, reply_seed, sound_ids
from koala_local.dialogue import FORMATS, PromptFormat, Turn
from koala_local.engine.cache import common_prefix
from koala_local.engine.sampling import Sampling
from koala_local.engine.text_stream import one_line
from koala_local.errors import KoalaError, SessionError

LAST_MODEL = "last-model"  # the setting that keeps which model was used last

OnText = Callable[[str], None]
OnPrefill = Callable[[int, int], None]


class Conversation:
    """The state of a chat. `note` is told, in one line each, what the user should know."""

    def __init__(
        self,
        ledger: Ledger,
        history: History,
        files: KvFiles,
        *,
        model: str,
        sampling: Sampling,
        note: Callable[[str], None],
        seed: int | None = None,
        system: str = "",
    ) -> None:
        """Raises ContextError when the system text is too long."""
        self.ledger, self.history, self.files = ledger, history, files
        self.model, self.sampling, self.note = model, sampling, note
        self._fixed_seed = seed
        self._lock: SessionLock | None = None
        ledger.check_system(system)
        self._begin(system)

    # -- where we are

    def _begin(self, system: str) -> None:
        self.session: Session | None = None
        self.system = system
        self.seed = secrets.randbits(31) if self._fixed_seed is None else self._fixed_seed
        self.nodes: dict[int, Node] = {}
        self.head: int | None = None
        self._owner = True
        self._refused = False  # the disk refused the last turn
        self._saved_ids: list[int] = []
        self.ledger.cache.adopt([])
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
        self._lock = None

    @property
    def key(self) -> str:
        """Under which vocabulary and format sampled ids mean the same."""
        return f"{self.ledger.engine.vocabulary.key[:32]}/{self.ledger.format.key}"

    @property
    def title(self) -> str:
        """The title that the user gave, else the beginning of the first message, else nothing."""
        given = self.session.title if self.session else ""
        return one_line(given or next((node.user for node in self.nodes.values()), ""), 60)

    def path(self, head: int | None = None) -> list[Node]:
        """The turns from the first one to `head` (default: the current one)."""
        return path_to(self.nodes, self.head if head is None else head)

    def exchanges(self, path: Sequence[Node]) -> list[Exchange]:
        """The path as the ledger wants it: ids only where they were sampled under this vocabulary and format."""
        key, size = self.key, self.ledger.engine.vocabulary.size
        return [
            Exchange(Turn(node.user, node.reply), sound_ids(node, size) if node.vocabulary == key else None)
            for node in path
        ]

    def branches(self) -> list[Branch]:
        """Every line of the tree; their numbers stay."""
        return lines(self.nodes, self.head)

    def turn(self, number: int) -> Node:
        """Turn `number` (from 1) of the current path. Raises KoalaError."""
        path = self.path()
        if not 1 <= number <= len(path):
            raise KoalaError(f"there is no turn {number}", f"this branch has {len(path)} turn{'s' * (len(path) != 1)}")
        return path[number - 1]

    def _last(self) -> Node:
        if self.head is None:
            raise KoalaError("nothing has been said here yet", "send a message first")
        return self.nodes[self.head]

    # -- talking

    def send(self, text: str, on_text: OnText, on_prefill: OnPrefill = lambda done, total: None) -> Answer:
        """A new turn behind the current one. Raises ContextError or Interrupted with the conversation unchanged."""
        return self._reply(self.head, text, on_text, on_prefill)

    def regenerate(self, on_text: OnText, on_prefill: OnPrefill = lambda done, total: None) -> Answer:
        """Another reply to the last message, beside the first one."""
        last = self._last()
        return self._reply(last.parent, last.user, on_text, on_prefill)

    def edit(self, number: int, text: str, on_text: OnText, on_prefill: OnPrefill = lambda done, total: None) -> Answer:
        """Say something else at turn `number`; what followed it stays on its own branch."""
        return self._reply(self.turn(number).parent, text, on_text, on_prefill)

    def _reply(self, parent: int | None, user: str, on_text: OnText, on_prefill: OnPrefill) -> Answer:
        before = self.path(parent) if parent is not None else []
        attempts = [node for node in self.nodes.values() if node.parent == parent]
        dropped = dropped_turns(before)
        path = [*self.exchanges(before), Exchange(Turn(user))]
        seed = reply_seed(self.seed, len(before), len(attempts))
        answer = self.ledger.reply(self.system, path, dropped, self.sampling, seed, on_text, on_prefill)
        self._keep(parent, user, answer, len(attempts))
        self._tell_dropped(max([dropped, *(node.dropped for node in attempts)]), answer.stats.dropped_turns)
        return answer

    def _tell_dropped(self, before: int, now: int) -> None:
        if now > before:
            which = f"turn {now}" if now == before + 1 else f"turns {before + 1} to {now}"
            self.note(f"the context is full: {which} left it; the model no longer sees them (they stay saved)")

    def _keep(self, parent: int | None, user: str, answer: Answer, attempt: int) -> None:
        """Commit a finished turn. While the disk refuses, turns wait in memory, with negative ids."""
        node = Node(
            id=min([0, *self.nodes]) - 1,
            parent=parent,
            user=user,
            reply=answer.text,
            finish=answer.finish,
            reply_ids=answer.ids,
            vocabulary=self.key,
            attempt=attempt,
            dropped=answer.stats.dropped_turns,
            name="",
            created=time.time(),
        )
        self.nodes[node.id] = node
        self.head = node.id
        self._save_waiting()

    def _save_waiting(self) -> None:
        """Commit the turns that the disk refused before."""
        waiting = sorted((number for number in self.nodes if number < 0), reverse=True)
        try:
            for number in waiting:
                self._commit(self.nodes[number])
        except SessionError as error:
            if not self._refused:  # once, not at every turn
                self.note(f"from here on turns are not saved: {error.message}")
            self._refused = True
        else:
            if self._refused:
                self.note("all turns are saved again")
            self._refused = False

    def _commit(self, node: Node) -> None:
        """Save one turn; its id becomes the saved one, everywhere. Raises SessionError, nothing changed."""
        turn = node._asdict()
        del turn["id"], turn["created"]
        head = self._owner and self.head == node.id
        saved = self.history.add_turn(self._saved_session().id, move_head=head, **turn)
        del self.nodes[node.id]
        self.nodes[saved.id] = saved
        for number, child in self.nodes.items():
            if child.parent == node.id:
                self.nodes[number] = child._replace(parent=saved.id)
        if self.head == node.id:
            self.head = saved.id

    def _saved_session(self) -> Session:
        if self.session is None:
            self.session = self.history.create(
                model=self.model, format=self.ledger.format.name, system=self.system, seed=self.seed
            )
            self._lock = self.history.lock(self.session.id)
        return self.session

    # -- walking the tree

    def undo(self) -> Node:
        """Step back behind the last turn, which stays on its own branch; returns it."""
        last = self._last()
        self._move(last.parent)
        return last

    def branch(self, number: int | None = None, name: str = "") -> None:
        """Keep the current line, as `name`, and go on behind turn `number` (default: the last) on a new one."""
        last = self._last()
        target = last if number is None else (self.turn(number) if number else None)
        if name:
            if any(node.name == name for node in self.nodes.values()):
                raise KoalaError(f"there is a branch called {name} already", "choose another name")
            if last.name:
                raise KoalaError(f"this line is called {last.name} already", "say something, then name the longer line")
            self.nodes[last.id] = last._replace(name=name)
            if last.id >= 0:
                self._try_save(lambda: self.history.name_node(last.id, name))
        self._move(target.id if target else None)

    def switch(self, reference: str) -> Branch:
        """Go to the end of a branch, by its number or name. Raises KoalaError."""
        for branch in self.branches():
            if reference in (str(branch.number), branch.last.name):
                self._move(branch.last.id)
                with suppress(KoalaError):  # a template that fails here tells so at the next message
                    self.warm()
                return branch
        raise KoalaError(f"there is no branch {reference}", "/tree shows them with their numbers")

    def _move(self, head: int | None) -> None:
        self.head = head
        if self.session is not None and self._owner and (head is None or head >= 0):
            self._try_save(partial(self.history.set_head, self.session.id, head))

    def _try_save(self, write: Callable[[], object]) -> None:
        try:
            write()
        except SessionError as error:
            self.note(f"this change is not saved: {error.message}")

    def warm(self) -> None:
        """Bring the current path into the active slot as far as a held branch has it; evaluates nothing."""
        self.ledger.cache.adopt(self.prompt_ids())

    @property
    def dropped(self) -> int:
        """How many turns of the current path have left the context."""
        return dropped_turns(self.path())

    def prompt_ids(self) -> list[int]:
        """The token ids of the current path, without the turns that left the context."""
        path = self.path()
        return self.ledger.ids(self.system, self.exchanges(path), dropped_turns(path)) if path else []

    # -- sessions

    def new(self, system: str | None = None) -> None:
        """Begin another conversation. The present one is saved."""
        self.save()
        self._tell_lost()
        self._begin(self.system if system is None else system)

    def set_system(self, system: str) -> None:
        """Change the system text of the whole conversation. Raises ContextError, nothing changed."""
        self.ledger.check_system(system)
        if system == self.system:
            return
        self._tell_anew("the system text changed")
        self.system = system
        self._see_all_turns()
        self._update(system=system)

    def _see_all_turns(self) -> None:
        """The next prompt tries all turns again, also those that had left the context."""
        changed = any(node.dropped for node in self.nodes.values())
        self.nodes = {number: node._replace(dropped=0) for number, node in self.nodes.items()}
        if changed and self.session is not None and self._owner:
            self._try_save(partial(self.history.forget_dropped, self.session.id))

    def _tell_anew(self, reason: object) -> None:
        if self.head is not None:
            self.note(f"the next reply evaluates the conversation again: {reason}")

    def _update(self, **changes: str) -> None:
        """Change the session's row, which belongs to the program that opened it first."""
        if self.session is not None:
            if self._owner:
                self._try_save(partial(self.history.update, self.session.id, **changes))
            else:
                self.note("this change is not saved: the session is open in another window")

    def rename(self, title: str) -> None:
        """Give the session a title. Raises KoalaError before the first turn."""
        if self.session is None:
            raise KoalaError("there is nothing to rename yet", "say something first")
        if not self._owner:
            raise KoalaError("this session is open in another window", "/rename it there")
        self._update(title=title)
        self.session = self.session._replace(title=title)

    def resume(self, session_id: str) -> None:
        """Go on with a saved session. Says why when old turns must be evaluated again. Raises SessionError."""
        self._save_waiting()
        session, nodes = self.history.load(session_id)
        self.save()
        self._tell_lost()
        self._begin(session.system)
        self.session, self.head = session, session.head
        self.seed = session.seed if self._fixed_seed is None else self._fixed_seed
        self.nodes = {node.id: node for node in nodes}
        self._lock = self.history.lock(session.id)
        self._owner = self._lock is not None
        if not self._owner:
            self.note("this session is open in another window: what you say here goes onto a branch of its own")
        if session.format in FORMATS and session.format != self.ledger.format.name:
            self.ledger.use_format(FORMATS[session.format])
        if self._owner and (session.model, session.format) != (self.model, self.ledger.format.name):
            self._update(model=self.model, format=self.ledger.format.name)
        self._restore_cache(session.id)

    def _restore_cache(self, session_id: str) -> None:
        if not self.nodes:
            return
        try:
            self.ledger.cache.restore(lambda slot: self.files.restore(session_id, self.ledger.engine, slot))
        except CacheMiss as miss:
            self._see_all_turns()
            self._tell_anew(miss)
            return
        self._saved_ids = list(self.ledger.cache.ids)
        with suppress(KoalaError):  # a template that fails here tells so at the next message
            self._tell_cold()

    def _tell_cold(self) -> None:
        """Say so when the saved cache does not hold the path that goes on."""
        ids = self.prompt_ids()
        cold = len(ids) - common_prefix(ids, self.ledger.cache.ids)
        if cold:
            self.note(f"the saved KV cache holds another line or an earlier state: {cold} tokens are evaluated again")

    def use_model(self, load: Callable[[], Ledger], model: str, back: Callable[[], Ledger]) -> None:
        """Go on with another model. The present one makes room first; when the other cannot be loaded, or cannot hold
        the system text, `back` loads it again and the error is raised."""
        self.save()
        system, ledger = self.system, self.ledger
        try:
            ledger.engine.close()
            ledger = load()
            ledger.check_system(system)
        except BaseException:
            ledger.engine.close()
            self.ledger = back()
            raise
        self.ledger, self.model = ledger, model
        self._prompt_changed()
        self._try_save(lambda: self.history.set_setting(LAST_MODEL, model))

    def use_format(self, format: PromptFormat) -> None:
        """Write the prompt in another format from now on."""
        old_key = self.key
        self.ledger.use_format(format)
        if self.key != old_key:
            self._tell_anew("the prompt format changed")
            self._prompt_changed()

    def _prompt_changed(self) -> None:
        """Text is the truth: for another model or format the prompt is made anew."""
        self._saved_ids = []
        self._see_all_turns()
        self._update(model=self.model, format=self.ledger.format.name)

    def lost_turns(self) -> int:
        """How many turns are not on disk; they are gone when the program ends."""
        return sum(number < 0 for number in self.nodes)

    def _tell_lost(self) -> None:
        if lost := self.lost_turns():
            self.note(f"{lost} {'turn is' if lost == 1 else 'turns are'} lost: the disk refused")

    def save(self) -> None:
        """Write what is not saved yet: turns that the disk refused, and the KV cache if it changed."""
        self._save_waiting()
        ids = self.ledger.cache.ids
        if self.session is None or not self._owner or not ids or ids == self._saved_ids or self.lost_turns():
            return
        try:
            self.files.save(self.session.id, self.ledger.engine, self.ledger.cache.active, ids)
            self._saved_ids = list(ids)
        except KoalaError as error:
            self.note(f"the KV cache is not saved, resuming will take longer: {error.message}")

    def close(self) -> None:
        """Save and let go of everything."""
        self.save()
        self._tell_lost()
        self._unlock()
        self.history.close()
        self.ledger.engine.close()
