"""In which order steps run, two at a time: a step starts when its parent is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

AT_ONCE = 2


def run_all(
    names: Sequence[str],
    *,
    parents: Mapping[str, str | None],
    run: Callable[[str], None],
    stop: Callable[[], None],
    at_once: int = AT_ONCE,
) -> None:
    """Run every step after its parent; the first error stops the rest and is raised when nothing runs any more."""
    waiting = list(names)
    running: dict[Future[None], str] = {}
    finished = set(parents) - set(names)
    with ThreadPoolExecutor(at_once) as pool:
        try:
            while waiting or running:
                ready = [name for name in waiting if (parent := parents[name]) is None or parent in finished]
                for name in ready[: at_once - len(running)]:
                    waiting.remove(name)
                    running[pool.submit(run, name)] = name
                if not running:
                    raise ValueError(f"the parents of {', '.join(waiting)} are never built")
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    name = running.pop(done)
                    done.result()
                    finished.add(name)
        except BaseException:
            stop()
            raise
